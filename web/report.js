// The page of a report, opened from its node; saved nowhere.

import { app } from "../../scripts/app.js";
import { remount } from "./remount.mjs";
import { link } from "./report_view.mjs";
import { t } from "./words.mjs";

function addLink(node) {
  const root = document.createElement("div");
  root.className = "cg-report-view"; // by which remount finds it
  root.style.cssText = "min-height: 20px; text-align: center; font: 13px/20px sans-serif; color: var(--input-text, #ddd);"
    + " position: relative; z-index: 1; pointer-events: auto";
  for (const kind of ["pointerdown", "wheel"]) root.addEventListener(kind, (event) => event.stopPropagation());
  const widget = node.addDOMWidget("report_view", "CONCEPT_GUARD_REPORT_VIEW", root, {
    serialize: false, hideOnZoom: false, getValue: () => "", setValue() {}, getMinHeight: () => 28, margin: 4,
  });
  widget.serialize = false;
  const ran = node.onExecuted;
  node.onExecuted = function (output) {
    ran?.apply(this, arguments);
    const [name] = output?.concept_guard_report ?? [];
    root.replaceChildren(...(name ? [link(name, t("Open the report"))] : []));
    const [width, least] = this.computeSize();
    this.setSize([Math.max(this.size[0], width), Math.max(this.size[1], least)]);
    this.setDirtyCanvas(true, true);
  };
  const configured = node.onConfigure;
  node.onConfigure = function () {
    configured?.apply(this, arguments);
    remount(this, root);
  };
}

app.registerExtension({
  name: "ConceptGuard.Report",
  nodeCreated(node) {
    if (node.comfyClass !== "ConceptGuardReport") return;
    try {
      addLink(node);
    } catch (error) {
      console.error("ConceptGuard: the report is not linked, the node works", error);
    }
  },
});

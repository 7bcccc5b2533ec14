// The page of a report, opened from its node; saved nowhere.

import { app } from "../../scripts/app.js";
import { view } from "./result.mjs";
import { link } from "./report_view.mjs";
import { t } from "./words.mjs";

function addLink(node) {
  const root = document.createElement("div");
  root.className = "cg-report-view"; // by which remount finds it
  root.style.cssText = "min-height: 20px; text-align: center; font: 13px/20px sans-serif; color: var(--input-text, #ddd);"
    + " position: relative; z-index: 1; pointer-events: auto";
  for (const kind of ["pointerdown", "wheel"]) root.addEventListener(kind, (event) => event.stopPropagation());
  view(node, root, "report", () => 28, (output) =>
    (output?.concept_guard_report ?? []).slice(0, 1).map((name) => link(name, t("Open the report"))));
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

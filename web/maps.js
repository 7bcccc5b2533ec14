// The maps that a Concept Map made, on its node; saved nowhere.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { remount } from "./remount.mjs";
import { t } from "./words.mjs";

const SHOW = "ConceptGuard.Maps.Show";
const STYLE = `
.cg-maps { display: flex; flex-wrap: wrap; gap: 4px; width: 100%; height: 100%; overflow-y: auto; justify-content: center; }
.cg-maps img { flex: 1 1 64px; max-height: 100%; min-width: 64px; object-fit: contain; border-radius: 4px; }
`;

function picture(file) {
  const made = new Image();
  made.src = api.apiURL(`/view?${new URLSearchParams(file)}`);
  made.alt = t("concept map");
  return made;
}

function addMaps(node) {
  const root = document.createElement("div");
  root.className = "cg-maps";
  const height = () => (root.childElementCount ? 140 : 0);
  const widget = node.addDOMWidget("maps_view", "CONCEPT_GUARD_MAPS_VIEW", root, {
    serialize: false, hideOnZoom: false, getValue: () => "", setValue() {}, getMinHeight: height, margin: 4,
  });
  widget.serialize = false;
  const ran = node.onExecuted;
  node.onExecuted = function (output) {
    ran?.apply(this, arguments);
    const files = app.extensionManager.setting.get(SHOW) === false ? [] : (output?.concept_guard_maps ?? []);
    root.replaceChildren(...files.map(picture));
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
  name: "ConceptGuard.Maps",
  settings: [
    {
      id: SHOW,
      category: ["ConceptGuard", "Nodes", "Maps"],
      name: "Show concept maps on their node",
      tooltip: "The pictures that a Concept Map node makes. Takes effect on the next run.",
      type: "boolean",
      defaultValue: true,
    },
  ],
  init() {
    const style = document.createElement("style");
    style.textContent = STYLE;
    document.head.append(style);
  },
  nodeCreated(node) {
    if (node.comfyClass !== "ConceptGuardConceptMap") return;
    try {
      addMaps(node);
    } catch (error) {
      console.error("ConceptGuard: the maps are not shown, the node works", error);
    }
  },
});

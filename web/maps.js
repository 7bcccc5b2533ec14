// The maps that a Concept Map made, on its node; saved nowhere.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { view } from "./result.mjs";
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
  const shown = () => app.extensionManager.setting.get(SHOW) !== false;
  view(node, root, "maps", height, (output) => (shown() ? (output?.concept_guard_maps ?? []).map(picture) : []));
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

// Where learned files are, told on the settings page.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

function place() {
  const root = document.createElement("code");
  root.className = "cg-store";
  root.style.cssText = "user-select: text; overflow-wrap: anywhere; white-space: pre-line";
  api.getFolderPaths().then(
    (folders) => (root.textContent = folders.concept_guard?.join("\n") ?? ""),
    () => (root.textContent = "models/concept_guard"),
  );
  return root;
}

app.registerExtension({
  name: "ConceptGuard.Store",
  settings: [
    {
      id: "ConceptGuard.Files.Store",
      category: ["ConceptGuard", "Files", "Store"],
      name: "Where learned files are stored",
      tooltip: "Directions, prompts, concepts and discriminators. Set in ComfyUI's extra_model_paths.yaml, as concept_guard.",
      type: place,
      defaultValue: "",
    },
  ],
});

// Safety presets in the page: the side panel, files dropped on the canvas, and what a preset node does, on the node.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { PresetPanel, STYLE } from "./preset_panel.mjs";
import { remount } from "./remount.mjs";
import { check, contentsOf, DEFAULT_FOLDER, FOLDER_SETTING, looksLikePreset, MAX_BYTES } from "./preset_store.mjs";
import { t } from "./words.mjs";

const TAB = "ConceptGuard";
const NODE_STYLE = `
.cg-does { box-sizing: border-box; width: 100%; height: 100%; overflow-y: auto; padding: 4px 8px; font: 11px/1.35 sans-serif;
  color: var(--input-text, #ddd); background: var(--comfy-input-bg, #222); border-radius: 6px; overflow-wrap: anywhere; }
.cg-does b, .cg-does span { display: block; }
.cg-does .error { color: #d9534f; }
`;

let panel = null;
const thePanel = () => (panel ??= new PresetPanel());

function openPanel() {
  const bar = app.extensionManager?.sidebarTab ?? app.extensionManager;
  if (bar?.activeSidebarTabId !== TAB) bar?.toggleSidebarTab?.(TAB);
}

/** A preset file dropped on the canvas goes to the panel; every other file goes on to the host. */
async function dropped(event) {
  const file = event.dataTransfer?.files?.[0];
  if (event.dataTransfer?.files?.length !== 1 || !/\.(json|safetensors)$/i.test(file.name) || file.size > MAX_BYTES) return;
  event.preventDefault();
  event.stopPropagation();
  const document = await contentsOf(file).catch(() => "");
  if (!looksLikePreset(document)) return app.handleFile(file);
  openPanel();
  await thePanel().bring(document);
}

/** The lines of what the node's preset does, under its text; saved nowhere. */
function addWords(node) {
  const text = node.widgets?.find((widget) => widget.name === "preset");
  if (!text || node.widgets.some((widget) => widget.name === "preset_view")) return;
  const root = document.createElement("div");
  root.className = "cg-does";
  root.conceptGuardNode = node;
  for (const kind of ["pointerdown", "wheel"]) root.addEventListener(kind, (event) => event.stopPropagation());
  const line = (tag, words, className = "") => {
    const made = Object.assign(document.createElement(tag), { className });
    made.textContent = words;
    root.append(made);
  };
  let shown = null;
  const paint = async () => {
    const now = String(text.value ?? "");
    if (now === shown) return;
    shown = now;
    const found = now.trim() ? await check(now).catch(() => null) : { ok: false, error: "" };
    if (shown !== now) return; // typed on meanwhile
    root.replaceChildren();
    if (!found?.ok) return line("span", found?.error || t("Choose a preset in the ConceptGuard panel."), found?.error && "error");
    line("b", found.name);
    [...found.does, ...found.files].forEach((each) => line("span", each));
    found.missing.forEach((each) => line("span", each, "error"));
  };
  let timer = 0;
  const soon = () => {
    clearTimeout(timer);
    timer = setTimeout(paint, 150);
  };
  const widget = node.addDOMWidget("preset_view", "CONCEPT_GUARD_PRESET_VIEW", root, {
    serialize: false, hideOnZoom: false, getValue: () => "", setValue() {}, getMinHeight: () => 90, margin: 6,
  });
  widget.serialize = false;
  for (const [owner, name] of [[text, "callback"], [node, "onConfigure"]]) {
    const before = owner[name];
    owner[name] = function (...args) {
      const result = before?.apply(this, args);
      soon();
      remount(node, root);
      return result;
    };
  }
  soon();
}

app.registerExtension({
  name: "ConceptGuard.Presets",
  settings: [
    {
      id: FOLDER_SETTING,
      category: ["ConceptGuard", "Presets", "Folder"],
      name: "Folder of your presets",
      tooltip: "In your ComfyUI user folder; plain names with / between them.",
      type: "text",
      defaultValue: DEFAULT_FOLDER,
    },
  ],
  commands: [{ id: "ConceptGuard.Presets.Open", icon: "pi pi-shield", label: "ConceptGuard: presets", function: openPanel }],
  init() {
    const style = document.createElement("style");
    style.textContent = STYLE + NODE_STYLE;
    document.head.append(style);
  },
  setup() {
    app.extensionManager.registerSidebarTab({
      id: TAB, icon: "pi pi-shield", title: "ConceptGuard", tooltip: t("Safety presets"), type: "custom",
      render(element) {
        element.append(thePanel().root);
        thePanel().refresh();
      },
    });
    const area = app.canvas.canvas.parentElement ?? app.canvas.canvas;
    area.addEventListener("drop", dropped);
    api.addEventListener("executed", ({ detail }) => {
      const text = detail?.output?.concept_guard_preset?.[0];
      if (typeof text === "string") thePanel().bring(text);
    });
  },
  nodeCreated(node) {
    if (node.comfyClass !== "ConceptGuardApplyPreset") return;
    try {
      addWords(node);
    } catch (error) {
      console.error("ConceptGuard: what the preset does is not drawn, the node works", error);
    }
  },
});

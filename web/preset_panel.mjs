// The preset panel: lists, search, import with a preview. Every text of a preset is shown as text, never as markup.

import * as store from "./preset_store.mjs";
import { drawPolicy } from "./policy_view.mjs";
import { drawReports } from "./report_view.mjs";
import { apply, insert } from "./preset_graph.mjs";
import { t } from "./words.mjs";

export const STYLE = `
.cg-presets { display: flex; flex-direction: column; gap: 8px; height: 100%; padding: 10px; box-sizing: border-box;
  overflow-y: auto; color: var(--input-text, #ddd); font: 13px/1.4 sans-serif; overflow-wrap: anywhere; }
.cg-presets h3 { margin: 6px 0 0; font-size: 13px; }
.cg-presets input, .cg-presets textarea { width: 100%; box-sizing: border-box; padding: 6px; border-radius: 4px;
  border: 1px solid var(--border-color, #4e4e4e); background: var(--comfy-input-bg, #222); color: inherit; font: inherit; }
.cg-presets textarea { height: 34px; resize: vertical; }
.cg-presets button { padding: 3px 8px; border-radius: 4px; border: 1px solid var(--border-color, #4e4e4e); cursor: pointer;
  background: var(--comfy-input-bg, #222); color: inherit; font: inherit; }
.cg-presets button:hover, .cg-presets button:focus-visible { border-color: var(--p-primary-color, #60a5fa); }
.cg-presets .card { border: 1px solid var(--border-color, #4e4e4e); border-radius: 6px; padding: 8px; margin-top: 6px; }
.cg-presets .card.new { border: 2px solid var(--p-primary-color, #60a5fa); }
.cg-presets .name { font-weight: 600; }
.cg-presets .about { opacity: 0.85; margin: 2px 0 6px; white-space: pre-line; }
.cg-presets .error { color: #d9534f; margin: 4px 0; }
.cg-presets ul { margin: 4px 0 6px; padding-left: 18px; }
.cg-presets .row { display: flex; flex-wrap: wrap; gap: 4px; }
.cg-presets .hint { opacity: 0.75; }
.cg-presets.over { outline: 2px dashed var(--p-primary-color, #60a5fa); outline-offset: -4px; }
`;

function make(tag, { text, parent, ...properties } = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  if (text !== undefined) made.textContent = text;
  made.append(...children);
  parent?.append(made);
  return made;
}

const button = (text, title, onclick) => make("button", { type: "button", text, title, onclick });

/** What a preset is and will do. */
function told(preset) {
  if (!preset.ok) return [make("div", { className: "error", text: preset.error })];
  const by = [preset.author && t("by {author}", preset), preset.licence, preset.base_models?.join(", ")].filter(Boolean);
  const item = (line, i) => {
    const made = make("li", { text: line });
    if (preset.why?.[i]) make("div", { className: "hint", text: preset.why[i], parent: made });
    return made;
  };
  return [
    make("div", { className: "about", text: preset.description }),
    ...(by.length ? [make("div", { className: "hint", text: by.join(" · ") })] : []),
    make("ul", {}, ...preset.does.map(item), ...(preset.files ?? []).map((text) => make("li", { text }))),
    ...(preset.measured ?? []).map((text) => make("div", { className: "hint", text })),
    ...(preset.missing ?? []).map((text) => make("div", { className: "error", text })),
  ];
}

export class PresetPanel {
  constructor() {
    this.root = make("div", { className: "cg-presets" });
    this.pending = null; // what was brought and not yet kept
    this.lists = { shipped: [], own: [] };
    this.message = make("div", { className: "hint", role: "status" });
    this.search = make("input", { type: "search", placeholder: t("Search presets"), ariaLabel: t("Search presets") });
    this.search.oninput = () => this.draw();
    const paste = t("Paste a preset's text here");
    this.box = make("textarea", { placeholder: paste, ariaLabel: paste });
    this.box.oninput = () => this.box.value.trim() && this.bring(this.box.value);
    const file = make("input", { type: "file", accept: ".json,.safetensors,application/json", hidden: true });
    file.onchange = () => file.files[0] && this.bringFile(file.files[0]).then(() => (file.value = ""));
    this.preview = make("div", {});
    this.body = make("div", {});
    this.policy = make("div", {});
    this.reports = make("div", {});
    const load = button(t("Import a file"), t("A preset file; you see what it does before it is kept"), () => file.click());
    this.root.append(this.policy, this.search, make("div", { className: "row" }, load, file), this.box,
      make("div", { className: "hint", text: t("You can also drop a preset file here or on the canvas.") }),
      this.message, this.preview, this.body, this.reports);
    for (const kind of ["keydown", "keyup", "keypress", "paste", "copy", "cut"])
      this.root.addEventListener(kind, (event) => event.stopPropagation()); // the canvas listens too
    this.root.addEventListener("dragover", (event) => this.over(event, true));
    this.root.addEventListener("dragleave", (event) => this.over(event, false));
    this.root.addEventListener("drop", (event) => {
      this.over(event, false);
      const dropped = event.dataTransfer?.files?.[0];
      const text = event.dataTransfer?.getData("text/plain");
      if (dropped) this.bringFile(dropped);
      else if (text) this.bring(text);
    });
  }

  over(event, on) {
    event.preventDefault();
    event.stopPropagation();
    this.root.classList.toggle("over", on);
  }

  say(text) {
    this.message.textContent = text;
  }

  /** Runs what a button asks for, and says what went wrong. */
  async act(work) {
    try {
      this.say((await work()) ?? "");
    } catch (error) {
      this.say(error.message ?? String(error));
    }
  }

  async refresh() {
    await this.act(async () => {
      const [shipped, own] = await Promise.all([store.shipped(), store.own()]);
      this.lists = { shipped, own };
      await Promise.all([drawPolicy(this.policy), drawReports(this.reports)]);
    });
    this.draw();
  }

  async bringFile(file) {
    try {
      await this.bring(await store.contentsOf(file));
    } catch (error) {
      this.show({ ok: false, error: error.message });
    }
  }

  /** Show what a document will do. Nothing is stored before the user says so. */
  async bring(document) {
    try {
      const text = typeof document === "string" ? document : ""; // else the server says it
      this.show({ text, ...(await store.check(document)) });
    } catch (error) {
      this.show({ ok: false, error: error.message ?? String(error) });
    }
  }

  show(found) {
    this.pending = found;
    this.say("");
    this.draw();
    this.preview.scrollIntoView?.({ block: "nearest" });
  }

  dismiss() {
    this.pending = null;
    this.box.value = "";
    this.draw();
  }

  draw() {
    this.preview.replaceChildren(...(this.pending ? [this.pendingCard(this.pending)] : []));
    const words = this.search.value.trim().toLowerCase();
    const wanted = (preset) =>
      !words || [preset.name, preset.description, ...(preset.does ?? [])].join("\n").toLowerCase().includes(words);
    const list = (title, presets, mine) => {
      const found = presets.filter(wanted);
      const none = t("None yet: import one, or keep one of the others.");
      const empty = presets.length ? t("None of them matches.") : none;
      return [make("h3", { text: title }),
        ...(found.length ? found.map((each) => this.card(each, mine)) : [make("div", { className: "hint", text: empty })])];
    };
    this.body.replaceChildren(...list(t("Your presets"), this.lists.own, true),
      ...list(t("From ConceptGuard"), this.lists.shipped, false));
  }

  pendingCard(found) {
    const keep = button(t("Keep"), t("Store it among your presets"), () => this.act(async () => {
      await store.keep(found.text, found.name);
      this.dismiss();
      await this.refresh();
      return t("Kept.");
    }));
    const close = button(found.ok ? t("Discard") : t("Close"), t("Store nothing"), () => this.dismiss());
    const row = found.ok ? [keep, this.insertButton(found), this.applyButton(found), close] : [close];
    return make("div", { className: "card new" },
      make("div", { className: "name", text: found.ok ? found.name : t("This is not a preset") }),
      ...(found.ok ? [make("div", { className: "hint", text: t("Not stored yet. It will do this:") })] : []),
      ...told(found), make("div", { className: "row" }, ...row));
  }

  insertButton(preset) {
    return button(t("Insert"), t("Add a node that holds this preset"), () => this.act(() => {
      insert(preset.text);
      return t("A node with this preset was added; connect its model and clip.");
    }));
  }

  applyButton(preset) {
    return button(t("Apply"), t("Put it into the selected node's model line"), () => this.act(() => apply(preset.text)));
  }

  card(preset, mine) {
    const details = make("details", {}, make("summary", { className: "name", text: preset.name ?? preset.path }), ...told(preset));
    const buttons = preset.ok ? [this.insertButton(preset), this.applyButton(preset),
      button(t("Export"), t("Download it as a file"), () => this.act(() => this.download(preset))),
      button(t("Copy"), t("Copy its text"), () => this.act(() => this.copy(preset)))] : [];
    if (mine && preset.ok)
      buttons.push(button(t("Rename"), t("Give it another name"), () => this.rename(preset, details)));
    if (mine)
      buttons.push(button(t("Delete"), t("Delete it from your presets"), (event) => this.erase(preset, event.target)));
    return make("div", { className: "card" }, details, make("div", { className: "row" }, ...buttons));
  }

  async download(preset) {
    const [file, ending] = await store.exported(preset);
    const url = URL.createObjectURL(file);
    make("a", { href: url, download: `${store.slug(preset.name)}.${ending}` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }

  async copy(preset) {
    await navigator.clipboard.writeText(preset.text);
    return t("Copied.");
  }

  rename(preset, details) {
    const input = make("input", { value: preset.name, maxLength: 80, ariaLabel: t("New name") });
    const done = () => this.act(async () => {
      await store.rename(preset, input.value.trim());
      await this.refresh();
      return t("Renamed.");
    });
    input.onkeydown = (event) => {
      if (event.key === "Enter") done();
      if (event.key === "Escape") this.draw();
    };
    details.before(input);
    input.select();
  }

  /** Asks once more, in the button itself. */
  erase(preset, asked) {
    if (!asked.dataset.asked) {
      asked.dataset.asked = "yes";
      asked.textContent = t("Really delete?");
      return;
    }
    this.act(async () => {
      await store.remove(preset.path);
      await this.refresh();
      return t("Deleted.");
    });
  }
}

// A two-handle range under the numbers start_percent and end_percent of our nodes.
//
// The two number inputs stay the data: this is a view, saved nowhere. It comes last among the widgets because older
// frontends restore saved values by position.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { outputOf, sourceOf, targetsOf } from "./graph.mjs";
import { remount } from "./remount.mjs";
import { moved, rounded, stepsIn, windowIn } from "./window.mjs";
import { t } from "./words.mjs";

const SHOW = "ConceptGuard.Range.Show";
const WINDOW = "ConceptGuard.Range.Window";
const FOUND = "concept_guard_range"; // in what a search tells when it has run, and among its properties, which are saved
const setting = (id) => app.extensionManager?.setting?.get(id);
const HEIGHT = 34; // pixels; the host takes the margins off what a widget asks for
const STYLE = `
.cg-range { box-sizing: border-box; width: 100%; height: ${HEIGHT}px; padding: 2px 10px; touch-action: none; user-select: none;
  color: var(--input-text, #ddd); font: 10px/12px sans-serif; }
.cg-range .track { position: relative; height: 16px; border-radius: 8px; background: var(--comfy-input-bg, #222);
  border: 1px solid var(--border-color, #4e4e4e); box-sizing: border-box; cursor: default; }
.cg-range .bar, .cg-range .found { position: absolute; top: 0; bottom: 0; }
.cg-range .bar { background: var(--p-primary-color, #60a5fa); opacity: 0.55; cursor: grab; }
.cg-range .found { background: repeating-linear-gradient(45deg, var(--p-primary-color, #60a5fa) 0 3px, transparent 3px 6px);
  opacity: 0.6; pointer-events: none; }
.cg-range .handle { position: absolute; top: 50%; width: 12px; height: 20px; margin: -10px 0 0 -6px; box-sizing: border-box;
  border-radius: 4px; background: var(--input-text, #ddd); border: 2px solid var(--comfy-menu-bg, #353535);
  cursor: ew-resize; }
.cg-range .handle:focus-visible { outline: 2px solid var(--p-primary-color, #60a5fa); }
.cg-range .note { height: 12px; margin-top: 2px; text-align: center; white-space: nowrap; overflow: hidden;
  color: var(--input-text, #ddd); opacity: 0.85; }
.cg-range.off .bar, .cg-range.off .handle { opacity: 0.25; cursor: not-allowed; }
.cg-range.off .bar { background: var(--comfy-input-bg, #222); } /* the found period is what counts then */
.cg-range.wrong .bar { background: #d9534f; }
.cg-range.wrong .note { color: #d9534f; opacity: 1; }
`;

const views = new Set(); // what paints each range that is on a node

const linked = (node, name) => node.inputs?.find((input) => input.name === name && input.link != null);
const widgetOf = (node, name) => node.widgets?.find((widget) => widget.name === name);

/** The nearest node downstream that has steps and a scheduler. */
function samplerAfter(node) {
  const seen = new Set([node]);
  for (const here of seen) {
    if (here !== node && widgetOf(here, "steps") && widgetOf(here, "scheduler")) return here;
    for (const next of targetsOf(here, "MODEL")) seen.add(next); // which this loop comes to in its turn
  }
  return null;
}

/** What a search upstream of the `range` input found when it last ran, also before a reload: [start, end]. */
function foundPeriod(node) {
  const source = sourceOf(node, "range");
  const found = source && (outputOf(source)?.[FOUND] ?? source.properties?.[FOUND]);
  return Array.isArray(found) && found.length === 2 && found.every(Number.isFinite) ? found : null;
}

function stepsNote(node, start, end) {
  const sampler = samplerAfter(node);
  if (!sampler || ["steps", "scheduler", "denoise"].some((name) => linked(sampler, name))) return "";
  const [steps, scheduler, denoise] = ["steps", "scheduler", "denoise"].map((name) => widgetOf(sampler, name)?.value);
  const held = stepsIn(start, end, steps, scheduler, denoise ?? 1);
  if (held === null) return "";
  if (!held.length) return t("none of {all} steps", { all: steps });
  const [first, last] = held;
  const values = { first, last, all: steps };
  return first === last ? t("step {first} of {all}", values) : t("steps {first}-{last} of {all}", values);
}

function element(tag, className, parent) {
  const made = document.createElement(tag);
  made.className = className;
  parent?.append(made);
  return made;
}

class RangeView {
  constructor(node, first, last) {
    Object.assign(this, { node, first, last, defaults: [first.value, last.value] });
    this.root = element("div", "cg-range");
    this.track = element("div", "track", this.root);
    this.found = element("div", "found", this.track);
    this.bar = element("div", "bar", this.track);
    this.handles = { start: this.handle("start", t("Start of the edit")), end: this.handle("end", t("End of the edit")) };
    this.note = element("div", "note", this.root);
    this.root.addEventListener("pointerdown", (event) => this.grab(event));
    this.root.addEventListener("dblclick", (event) => {
      event.stopPropagation();
      if (!this.off) this.set(...this.defaults);
      this.remember();
    });
    for (const kind of ["pointermove", "pointerup", "mousedown", "click"])
      this.root.addEventListener(kind, (event) => event.stopPropagation());
    this.root.addEventListener("pointerenter", () => this.paint());
  }

  handle(part, label) {
    const made = element("div", "handle", this.track);
    made.tabIndex = 0;
    for (const [name, value] of Object.entries({ role: "slider", "aria-label": label, "aria-orientation": "horizontal" }))
      made.setAttribute(name, value);
    made.dataset.part = part;
    made.addEventListener("keydown", (event) => this.key(event, part));
    made.addEventListener("keyup", (event) => event.stopPropagation());
    return made;
  }

  get window() {
    return [Number(this.first.value), Number(this.last.value)];
  }

  get off() {
    return ["range", "start_percent", "end_percent"].some((name) => linked(this.node, name));
  }

  set(start, end) {
    const write = (widget, value) => {
      if (widget.value === value) return;
      widget.value = value;
      widget.callback?.(value, app.canvas, this.node);
    };
    write(this.first, start);
    write(this.last, end);
    this.paint();
    this.node.setDirtyCanvas?.(true, true);
  }

  /** Let the undo history see what a drag or a key changed. */
  remember() {
    const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
    (tracker?.captureCanvasState ?? tracker?.checkState)?.call(tracker);
  }

  grab(event) {
    event.stopPropagation(); // else the node moves
    if (event.button !== 0 || this.off) return;
    const box = this.track.getBoundingClientRect();
    const [start, end] = this.window;
    if (!(box.width > 0) || !(start <= end)) return;
    const at = (event.clientX - box.left) / box.width;
    const reach = 8 / box.width;
    let part = event.target.dataset?.part;
    if (part && Math.abs(start - end) < 2 * reach) part = at < (start + end) / 2 ? "start" : "end";
    if (part && start === end) part = start >= 1 ? "start" : end <= 0 ? "end" : part;
    if (!part) part = at < start ? "start" : at > end ? "end" : "both";
    const jump = part === "start" && at < start ? at - start : part === "end" && at > end ? at - end : 0;
    const near = event.target.dataset?.part ? 0 : jump; // a click beside the bar brings the nearer handle there
    const move = (moveEvent) => {
      moveEvent.stopPropagation();
      this.set(...moved(part, start, end, (moveEvent.clientX - event.clientX) / box.width + near));
    };
    const drop = (dropEvent) => {
      dropEvent.stopPropagation();
      for (const kind of ["pointermove", "pointerup", "pointercancel"])
        this.root.removeEventListener(kind, kind === "pointermove" ? move : drop);
      this.remember();
    };
    try {
      this.root.setPointerCapture(event.pointerId);
    } catch {
      // a pointer that is gone already
    }
    this.root.addEventListener("pointermove", move);
    this.root.addEventListener("pointerup", drop);
    this.root.addEventListener("pointercancel", drop);
    if (near) move(event);
    this.handles[part]?.focus({ preventScroll: true });
  }

  key(event, part) {
    const fine = event.shiftKey ? 0.1 : 0.01;
    const steps = { ArrowLeft: -fine, ArrowDown: -fine, ArrowRight: fine, ArrowUp: fine, PageDown: -0.1, PageUp: 0.1,
      Home: -1, End: 1 };
    event.stopPropagation(); // Delete would take the node, arrows move it
    if (!(event.key in steps) || this.off) return;
    event.preventDefault();
    this.set(...moved(part, ...this.window, steps[event.key]));
    this.remember();
  }

  paint() {
    const [start, end] = this.window;
    const off = this.off;
    const found = foundPeriod(this.node);
    const [from, to] = [Math.min(start, end), Math.max(start, end)].map(rounded);
    this.root.classList.toggle("off", Boolean(off));
    this.root.classList.toggle("wrong", !off && start > end);
    const place = (it, a, b) => Object.assign(it.style, { left: `${100 * a}%`, width: `${100 * Math.max(b - a, 0)}%` });
    place(this.bar, from, to);
    place(this.found, ...(found ?? [0, 0]));
    for (const [part, value] of [["start", start], ["end", end]]) {
      const handle = this.handles[part];
      handle.style.left = `${100 * rounded(value)}%`;
      const [low, high] = part === "start" ? [0, end] : [start, 1];
      const aria = { valuemin: low, valuemax: high, valuenow: value, valuetext: `${rounded(value) * 100} %`,
        disabled: Boolean(off) };
      for (const [name, each] of Object.entries(aria)) handle.setAttribute(`aria-${name}`, String(each));
    }
    this.note.textContent = this.words(start, end, off, found);
  }

  words(start, end, off, found) {
    const percent = ([from, to]) => ({ start: Math.round(100 * from), end: Math.round(100 * to) });
    if (off && found) return t("found: {start}-{end} %", percent(found));
    if (off) return t("set by its input");
    if (start > end) return t("start lies after end");
    if (start === end) return t("never active");
    return stepsNote(this.node, start, end) || t("{start}-{end} % of the timesteps", percent([start, end]));
  }
}

function chain(owner, name, after) {
  const before = owner[name];
  owner[name] = function (...args) {
    const result = before?.apply(this, args);
    after(...args);
    return result;
  };
}

/** A search keeps what it found, so that it is shaded after a reload too. */
function keepFound(search) {
  chain(search, "onExecuted", (output) => {
    if (output?.[FOUND]) search.properties[FOUND] = [...output[FOUND]];
  });
}

/** Give a new edit the window of the settings; one that is loaded gets its own afterwards. */
function startWith(node, first, last) {
  const window = node.inputs?.some((input) => input.name === "range") && windowIn(setting(WINDOW));
  if (window) [first.value, last.value] = window;
}

function addRange(node, first, last) {
  const view = new RangeView(node, first, last);
  view.root.conceptGuardNode = node;
  const widget = node.addDOMWidget("range_view", "CONCEPT_GUARD_RANGE_VIEW", view.root, {
    serialize: false, hideOnZoom: false, getValue: () => "", setValue() {},
    getMinHeight: () => HEIGHT + 8, getMaxHeight: () => HEIGHT + 8, margin: 4,
  });
  widget.serialize = false;
  const paint = () => {
    try {
      view.paint();
    } catch (error) {
      console.error("ConceptGuard: the range is not drawn", error); // never the node's affair
    }
  };
  chain(first, "callback", paint);
  chain(last, "callback", paint);
  chain(node, "onConfigure", () => {
    paint();
    remount(node, view.root);
  });
  chain(node, "onConnectionsChange", () => queueMicrotask(paint));
  chain(node, "onRemoved", () => views.delete(paint));
  views.add(paint);
  queueMicrotask(paint);
}

const paintAll = () => views.forEach((paint) => paint());

app.registerExtension({
  name: "ConceptGuard.Range",
  settings: [
    {
      id: SHOW,
      category: ["ConceptGuard", "Nodes", "Range"],
      name: "Draw the range of timesteps on nodes",
      tooltip: "A bar with two handles under start_percent and end_percent. Takes effect on nodes made afterwards.",
      type: "boolean",
      defaultValue: true,
    },
    {
      id: WINDOW,
      category: ["ConceptGuard", "Nodes", "Window"],
      name: "Window of new edit nodes",
      tooltip: "Start and end as fractions of the timesteps, such as 0.1 - 0.8. Empty: each node's own.",
      type: "text",
      defaultValue: "",
    },
  ],
  init() {
    const style = document.createElement("style");
    style.textContent = STYLE;
    document.head.append(style);
  },
  setup() {
    for (const event of ["executed", "graphChanged"]) api.addEventListener(event, () => queueMicrotask(paintAll));
  },
  nodeCreated(node) {
    if (!String(node.comfyClass).startsWith("ConceptGuard")) return;
    if (node.comfyClass === "ConceptGuardCausalPeriod") keepFound(node);
    const [first, last] = ["start_percent", "end_percent"].map((name) => widgetOf(node, name));
    if (!first || !last) return;
    startWith(node, first, last);
    if (setting(SHOW) === false || widgetOf(node, "range_view")) return;
    try {
      addRange(node, first, last);
    } catch (error) {
      console.error("ConceptGuard: the range is not drawn, the numbers work", error);
    }
  },
  afterConfigureGraph: paintAll,
});

// Presets in the graph: as a node of their own, or put into a model's line.

import { app } from "../../scripts/app.js";
import { t } from "./words.mjs";

const APPLY = "ConceptGuardApplyPreset";

const slotOf = (slots, type) => (slots ?? []).findIndex((slot) => slot.type === type);
const linkOf = (graph, id) => graph.getLink?.(id) ?? graph.links?.get?.(id) ?? graph.links?.[id];

function write(node, text) {
  const widget = node.widgets?.find((each) => each.name === "preset");
  widget.value = text;
  widget.callback?.(text, app.canvas, node);
}

const shownGraph = () => app.canvas.graph ?? app.graph;

function remember() {
  const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
  (tracker?.captureCanvasState ?? tracker?.checkState)?.call(tracker);
}

function added(position) {
  const node = globalThis.LiteGraph.createNode(APPLY);
  node.pos = position;
  shownGraph().add(node);
  return node;
}

/** A node that holds the preset, in the middle of what is seen. */
export function insert(text) {
  const [x, y, width, height] = app.canvas.visible_area ?? [0, 0, 800, 600];
  const node = added([x + width / 2 - 160, y + height / 2 - 100]);
  write(node, text);
  app.canvas.selectNode?.(node);
  remember();
  return node;
}

/** The nearest node upstream, `node` included, that puts out a CLIP. */
function clipBefore(node, graph) {
  const seen = new Set();
  const queue = [node];
  while (queue.length) {
    const here = queue.shift();
    if (!here || seen.has(here)) continue;
    seen.add(here);
    const slot = slotOf(here.outputs, "CLIP");
    if (slot >= 0) return [here, slot];
    for (const input of here.inputs ?? []) {
      const link = input.type === "MODEL" && input.link != null && linkOf(graph, input.link);
      if (link) queue.push(graph.getNodeById(link.origin_id));
    }
  }
  return null;
}

/** Put the preset where the selected node is: into it, before it or behind it. Returns what was done, in words. */
export function apply(text) {
  const graph = shownGraph();
  const selected = Object.values(app.canvas.selected_nodes ?? {})[0];
  if (!selected) throw new Error(t("Select the node whose model is to be edited: a sampler, or a loader."));
  if (selected.type === APPLY) {
    write(selected, text);
    remember();
    return t("The selected node now holds this preset.");
  }
  const [into, from] = [slotOf(selected.inputs, "MODEL"), slotOf(selected.outputs, "MODEL")];
  const link = into >= 0 && selected.inputs[into].link != null && linkOf(graph, selected.inputs[into].link);
  const origin = link ? graph.getNodeById(link.origin_id) : from >= 0 ? selected : null;
  if (!origin) throw new Error(t("The selected node has no model connected; select a sampler, or a loader."));
  const slot = link ? link.origin_slot : from;
  const targets = link
    ? [[selected, into]]
    : [...(origin.outputs[slot].links ?? [])].map((id) => linkOf(graph, id)).filter(Boolean)
        .map((each) => [graph.getNodeById(each.target_id), each.target_slot]);
  const node = added([selected.pos[0], selected.pos[1] + selected.size[1] + 60]);
  write(node, text);
  const clip = clipBefore(origin, graph);
  origin.connect(slot, node, slotOf(node.inputs, "MODEL"));
  clip?.[0].connect(clip[1], node, slotOf(node.inputs, "CLIP"));
  for (const [target, at] of targets) node.connect(slotOf(node.outputs, "MODEL"), target, at);
  remember();
  return clip ? t("The preset stands in the model's line.") : t("The preset stands in the model's line; connect its clip.");
}

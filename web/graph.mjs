// Links of the graph, followed through subgraphs and reroutes.

import { app } from "../../scripts/app.js";

const [ENTRY, EXIT] = [-10, -20]; // where links end that lead out of a subgraph

const rootGraph = () => app.rootGraph ?? app.graph;
const linkOf = (graph, id) => (id == null ? null : graph.getLink?.(id) ?? graph.links?.get?.(id) ?? graph.links?.[id]);

/** The node that stands for a subgraph; the first, if there are several. */
function holderOf(graph, within = rootGraph()) {
  for (const node of within.nodes ?? within._nodes) {
    if (!node.subgraph) continue;
    const found = node.subgraph === graph ? node : holderOf(graph, node.subgraph);
    if (found) return found;
  }
  return null;
}

function originOf(graph, id) {
  const link = linkOf(graph, id);
  if (!link) return null;
  if (Number(link.origin_id) === ENTRY) {
    const holder = holderOf(graph);
    return holder && originOf(holder.graph, holder.inputs[link.origin_slot]?.link);
  }
  const node = graph.getNodeById(link.origin_id);
  if (node?.subgraph) return originOf(node.subgraph, node.subgraph.outputs[link.origin_slot]?.linkIds[0]);
  return node?.type === "Reroute" ? originOf(graph, node.inputs[0].link) : node;
}

/** The node that makes what arrives at an input, or null. */
export const sourceOf = (node, name) => originOf(node.graph, node.inputs?.find((input) => input.name === name)?.link);

function* endsOf(graph, ids) {
  for (const id of ids ?? []) {
    const link = linkOf(graph, id);
    if (!link) continue;
    const inside = Number(link.target_id) === EXIT ? null : graph.getNodeById(link.target_id);
    const holder = inside ? null : holderOf(graph);
    if (inside?.subgraph) yield* endsOf(inside.subgraph, inside.subgraph.inputs[link.target_slot]?.linkIds);
    else if (inside) yield inside;
    else if (holder) yield* endsOf(holder.graph, holder.outputs[link.target_slot]?.links);
  }
}

/** The nodes that take a node's outputs of one type. */
export function* targetsOf(node, type) {
  for (const output of node.outputs ?? []) if (output.type === type) yield* endsOf(node.graph, output.links);
}

/** What a node told the page when it last ran. */
export function outputOf(node) {
  const id = node.graph === rootGraph() ? node.id : `${node.graph.id}:${node.id}`;
  return app.nodeOutputs?.[id];
}

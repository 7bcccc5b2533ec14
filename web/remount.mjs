// Nodes 2.0 of older frontends mounts a widget's element once, and keeps it when the node is made anew under the same
// id (undo, reload): what is seen would then belong to a node that is gone.

const alive = (node) => node.graph?.getNodeById?.(node.id) === node;

/** Put `root`, the view of `node`, where the view of its predecessor still stands. */
export function remount(node, root) {
  root.conceptGuardNode = node;
  const look = () => {
    if (root.isConnected || !alive(node)) return;
    for (const old of document.getElementsByClassName(root.classList[0])) {
      const before = old.conceptGuardNode;
      if (before && before !== node && before.id === node.id && !alive(before)) return old.replaceWith(root);
    }
  };
  for (const wait of [50, 300, 1500]) setTimeout(look, wait);
}

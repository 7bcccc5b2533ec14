// What a run of a node made, shown on the node; saved nowhere.

import { remount } from "./remount.mjs";

/** `root` as a widget of `node`: of `height()` pixels, and filled with what `made` gives for the node's output. */
export function view(node, root, name, height, made) {
  const widget = node.addDOMWidget(`${name}_view`, `CONCEPT_GUARD_${name.toUpperCase()}_VIEW`, root, {
    serialize: false, hideOnZoom: false, getValue: () => "", setValue() {}, getMinHeight: height, margin: 4,
  });
  widget.serialize = false;
  const ran = node.onExecuted;
  node.onExecuted = function (output) {
    ran?.apply(this, arguments);
    root.replaceChildren(...made(output));
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

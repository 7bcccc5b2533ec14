"""Workflow files as the browser saves them, turned into the prompts that the server runs."""

from __future__ import annotations

from typing import Any

SKIPPED = ("MarkdownNote", "Note", "Reroute")  # the page's own; examples use no reroutes


def widgets(definition: dict[str, Any]) -> list[tuple[str, bool, Any]]:
    """A node's inputs that are widgets, in the order of `widgets_values`: name, has a seed's control, default.

    `definition` is the node's entry in the server's /object_info.
    """
    out = []
    for group in ("required", "optional"):
        for name in definition["input_order"].get(group, ()):
            kind, *rest = definition["input"][group][name]
            options = rest[0] if rest else {}
            typed = isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
            if typed and not options.get("forceInput"):
                choices = (kind if isinstance(kind, list) else options.get("options")) or [None]
                controlled = bool(options.get("control_after_generate")) or name in ("seed", "noise_seed")
                out.append((name, controlled, options.get("default", choices[0])))
    return out


def to_api(workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """{node id: {class_type, inputs}} for a workflow without subgraphs; raises KeyError for a node nobody knows.

    Inputs that came after a workflow was saved have their defaults, as in the page.
    """
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in SKIPPED:
            continue
        definition = object_info[node["type"]]
        values, inputs = iter(node.get("widgets_values") or ()), {}
        for name, controlled, default in widgets(definition):
            inputs[name] = next(values, default)
            if controlled:
                next(values, None)
        inputs |= {i["name"]: sources[i["link"]] for i in node.get("inputs", ()) if i.get("link") is not None}
        title = node.get("title") or definition["display_name"]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": title}}
    return prompt

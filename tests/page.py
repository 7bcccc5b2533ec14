"""A page with the pack in it, and the few things that the browser tests do there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from conceptguard.tools.browser import SETTINGS, settle
from conceptguard.tools.host import Host

ROOT = Path(__file__).resolve().parent.parent
SCREENSHOTS = os.environ.get("CONCEPT_GUARD_SCREENSHOTS")
PATIENCE = 120_000  # ms: a busy machine is no reason to fail


def kept(host: Host) -> list[Path]:
    """The presets that the user of its browsers keeps."""
    return sorted((host.base / "user/default/concept_guard/presets").glob("*.json"))


def workflow(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ROOT / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


# An element follows its node a frame or more after the node has moved.
AT_REST = """selector => new Promise(done => {
    let last = '', frames = 0;
    const look = () => {
        const { x, y, width } = document.querySelector(selector).getBoundingClientRect();
        const now = [x, y, width].join();
        frames = now === last ? frames + 1 : 0;
        last = now;
        if (frames < 5) requestAnimationFrame(look); else done();
    };
    look();
})"""


# Where each node of the graph that is shown stands, its title included, once all are at rest: as the canvas draws it,
# or as its element is.
NODES = """async () => {
    const where = () => app.canvas.graph._nodes.map(node => {
        const element = document.querySelector(`[data-node-id="${node.id}"]`), title = LiteGraph.NODE_TITLE_HEIGHT;
        if (LiteGraph.vueNodesMode && !element) return null;
        const size = element ? [element.offsetWidth, element.offsetHeight] : [node.size[0], node.size[1] + title];
        const [x, y] = node.pos;
        return { id: node.id, type: node.type, x, y: y - title, width: size[0], height: size[1] };
    });
    for (let last = '', frames = 0; frames < 10;) {
        await new Promise(requestAnimationFrame);
        const found = where(), now = JSON.stringify([app.canvas.ds.scale, found]);
        frames = now === last && !found.includes(null) ? frames + 1 : 0;
        last = now;
    }
    return where();
}"""


class Browser:
    def __init__(self, page: Any, host: Host) -> None:
        self.page, self.host = page, host
        self.errors: list[str] = []
        self.newer = False  # than ComfyUI's own frontend
        self.settings: dict[str, Any] = dict(SETTINGS)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def js(self, source: str, *arguments: Any) -> Any:
        return self.page.evaluate(source, *arguments)

    def open(self, **settings: Any) -> None:
        """Load the page anew, with settings of the user's."""
        self.settings.update(settings)
        settle(self.host.base, self.settings)
        self.page.goto(self.host.url, wait_until="commit")
        self.wait(
            "() => window.app?.graph && window.LiteGraph?.registered_node_types?.ConceptGuardApplyPreset"
            " && app.extensionManager?.getSidebarTabs?.().some(t => t.id === 'ConceptGuard')"
        )

    def wait(self, condition: str) -> None:
        self.page.wait_for_function(condition, timeout=PATIENCE)

    def load(self, workflow: dict[str, Any]) -> None:
        """Once nothing runs any more: what a run says of a node goes to whatever has the node's id by then."""
        self.js(
            """async w => {
            for (let tries = 0; tries < 300; tries++) {
                const { queue_running, queue_pending } = await (await app.api.fetchApi('/queue')).json();
                if (!queue_running.length && !queue_pending.length) break;
                await new Promise(later => setTimeout(later, 100));
            }
            await app.loadGraphData(w); }""",
            workflow,
        )

    def prompt(self) -> dict[str, Any]:
        """What the page would send to the server."""
        sent: dict[str, Any] = self.js("async () => (await app.graphToPrompt()).output")
        return sent

    def prompt_of(self, kind: str) -> dict[str, Any]:
        """The inputs of its node of this kind."""
        return next(node["inputs"] for node in self.prompt().values() if node["class_type"] == kind)

    def found(self, node: str, start: float, end: float) -> None:
        """What the server tells when a search has run; `node` is its id in the run."""
        self.js(
            f"""range => {{ const id = String({node});
            app.api.dispatchCustomEvent('executed', {{ node: id, display_node: id, prompt_id: 'test',
                output: {{ text: ['found'], concept_guard_range: range }} }}); }}""",
            [start, end],
        )

    def set(self, setting: str, value: Any) -> None:
        self.js("([id, value]) => app.extensionManager.setting.set(id, value)", [setting, value])

    def look_at(self, node: str, scale: float = 1.0) -> None:
        """Bring a node into view, free of the side bar."""
        self.js(
            f"s => {{ const n = {node}; app.canvas.ds.scale = s;"
            " app.canvas.ds.offset = [-n.pos[0] + 420 / s, -n.pos[1] + 160 / s]; app.canvas.setDirty(true, true) }",
            scale,
        )

    def box(self, selector: str) -> dict[str, float]:
        """Where an element stands, once it has come to rest there."""
        found = self.page.locator(selector).first
        found.wait_for(state="visible", timeout=PATIENCE)
        self.js(AT_REST, selector)
        box: dict[str, float] = found.bounding_box()
        return box

    def drag(self, selector: str, by: float) -> None:
        box = self.box(selector)
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        self.page.mouse.move(x + by / 2, y)
        self.page.mouse.move(x + by, y)
        self.page.mouse.up()

    def nodes(self) -> list[dict[str, Any]]:
        """Where each node of the graph that is shown stands, in the graph's own units."""
        found: list[dict[str, Any]] = self.js(NODES)
        return found

    def picture(self, name: str) -> None:
        if SCREENSHOTS:
            Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=str(Path(SCREENSHOTS) / f"{name}.png"))

    def drop(self, selector: str, name: str, content: str) -> None:
        """A file dropped on an element, as the browser would tell it."""
        self.js(
            """([selector, name, content]) => {
                const data = new DataTransfer();
                data.items.add(new File([content], name, { type: 'application/json' }));
                const event = new DragEvent('drop', { dataTransfer: data, bubbles: true, cancelable: true });
                document.querySelector(selector).dispatchEvent(event);
            }""",
            [selector, name, content],
        )

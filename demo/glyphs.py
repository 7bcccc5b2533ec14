"""Fetch the icon sets, render their glyphs once, and compose pictures from them."""

from __future__ import annotations

import json
import subprocess
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
import torch

from . import world

VERSIONS = {"emojione": "1.2.3", "twemoji": "1.2.5", "noto": "1.2.9", "fluent-emoji-flat": "1.2.6"}
RENDER = 192  # pixels a glyph is rendered at before it is scaled to its place


def fetch(folder: Path) -> None:
    """Bring the icon sets' packages with npm into `folder` (a few MB; nothing if they are there)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, version in VERSIONS.items():
        if (folder / name / "icons.json").exists():
            continue
        print(f"fetching @iconify-json/{name} {version}", flush=True)
        try:
            out = subprocess.run(
                ["npm", "pack", "--silent", f"@iconify-json/{name}@{version}"],
                cwd=folder,
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        except FileNotFoundError as e:
            raise SystemExit("npm is needed to fetch the emoji data: install Node.js, then run this again") from e
        except subprocess.CalledProcessError as e:
            raise SystemExit(f"npm could not fetch @iconify-json/{name} {version}: {e.stderr.strip()[-300:]}") from e
        archive = folder / out.split()[-1]
        with tarfile.open(archive) as tar:
            tar.extractall(folder / f"{name}.part", filter="data")
        (folder / f"{name}.part" / "package").rename(folder / name)
        (folder / f"{name}.part").rmdir()
        archive.unlink()


@cache
def _icon_set(folder: Path, name: str) -> dict:
    return json.loads((folder / name / "icons.json").read_text())


@cache
def _names(folder: Path) -> dict[str, list[str]]:
    """Code point -> icon names, joined over the sets after dropping the variation selector."""
    names: dict[str, list[str]] = {}
    for name in VERSIONS:
        for points, icon in json.loads((folder / name / "chars.json").read_text()).items():
            key = "-".join(p for p in points.lower().split("-") if p != "fe0f")
            names.setdefault(key, []).append(icon)
    return names


def svg(folder: Path, glyph: str, style: str) -> str:
    """The SVG text of a glyph in a style; aliases of the icon set are followed."""
    icons = _icon_set(folder, world.STYLES[style])
    for icon in dict.fromkeys(_names(folder)[glyph]):
        entry = icons["icons"].get(icons.get("aliases", {}).get(icon, {}).get("parent", icon))
        if entry:
            w, h = entry.get("width", icons.get("width", 16)), entry.get("height", icons.get("height", 16))
            return (
                f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="0 0 {w} {h}">{entry["body"]}</svg>'
            )
    raise KeyError(f"{glyph} is not drawn in {style}")


def render(folder: Path) -> dict[tuple[str, str], np.ndarray]:
    """Every glyph of the world in its styles: {(glyph, style): uint8 [RENDER, RENDER, 4]}; cached in `folder`."""
    import io

    import resvg_py
    from PIL import Image

    wanted = [(g, s) for g, styles in world.all_glyphs().items() for s in styles]
    path = folder / f"glyphs-{RENDER}.npz"
    if path.exists():
        stored = np.load(path)
        if all(f"{g}/{s}" in stored for g, s in wanted):
            return {(g, s): stored[f"{g}/{s}"] for g, s in wanted}
    print(f"rendering {len(wanted)} glyphs", flush=True)
    out = {}
    for glyph, style in wanted:
        png = resvg_py.svg_to_bytes(svg_string=svg(folder, glyph, style), width=RENDER, height=RENDER)
        out[glyph, style] = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))
    np.savez_compressed(path, **{f"{g}/{s}": v for (g, s), v in out.items()})  # type: ignore[arg-type]
    return out


class Painter:
    """Draws `Picture`s: `painter(picture)` -> float [3, SIZE, SIZE] in [0, 1]."""

    def __init__(self, folder: Path):
        fetch(folder)
        self.glyphs = {k: torch.from_numpy(v.copy()).permute(2, 0, 1).float() / 255 for k, v in render(folder).items()}
        self._scaled: dict[tuple[str, str, int], torch.Tensor] = {}

    def sprite(self, glyph: str, style: str, size: int) -> torch.Tensor:
        """A glyph scaled to `size`, alpha premultiplied: [4, size, size]."""
        key = (glyph, style, size)
        if key not in self._scaled:
            g = self.glyphs[glyph, style].clone()
            g[:3] *= g[3:]
            self._scaled[key] = (
                torch.nn.functional.interpolate(g[None], size=(size, size), mode="area")[0]
                if size < RENDER
                else torch.nn.functional.interpolate(g[None], size=(size, size), mode="bilinear")[0]
            )
        return self._scaled[key]

    def paint(self, layers, background: str) -> torch.Tensor:
        """Layers over a background: [3, SIZE, SIZE]."""
        out = torch.tensor(world.BACKGROUNDS[background], device="cpu").float().div(255).view(3, 1, 1)
        out = out.expand(3, world.SIZE, world.SIZE).clone()
        for a in layers:
            s = self.sprite(a.glyph, a.style, a.size)
            y0, x0 = max(a.y, 0), max(a.x, 0)
            y1, x1 = min(a.y + a.size, world.SIZE), min(a.x + a.size, world.SIZE)
            s = s[:, y0 - a.y : y1 - a.y, x0 - a.x : x1 - a.x]
            out[:, y0:y1, x0:x1] = out[:, y0:y1, x0:x1] * (1 - s[3:]) + s[:3]
        return out

    def __call__(self, picture: world.Picture) -> torch.Tensor:
        return self.paint(picture.layers, picture.background)

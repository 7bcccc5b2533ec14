"""The report card: what edits do to pictures of a list of prompts, in pairs, counted and written to a folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ..editing.edits.digest import digest
from ..editing.engine.host import add_edit, edits_of, of_model, settled
from ..editing.gates.gates import image_discriminator
from ..editing.presets.apply import Given, specs_of
from ..editing.presets.document import read as read_preset
from ..jobs.measure import Sampling
from ..jobs.report.draw import Studio, opened
from ..jobs.report.figures import worst
from ..jobs.report.looks import by_judge
from ..jobs.report.page import pairs_of
from ..jobs.report.peers import Peer, always
from ..jobs.report.prompts import ERASE, KINDS, Case, Row, cases_of, parsed, read
from ..jobs.report.report import Report
from ..jobs.report.work import EDITED, UNEDITED, read_json, sides_of
from .discriminator import encoder_of
from .files import OFF
from .inputs import CATEGORY, choice_input, named, schedule_inputs
from .preset import suits
from .preset_routes import read_file
from .progress import Shown
from .report_measures import apart_of, look_of, measure_inputs
from .report_routes import add_routes, reports_folder
from .show import id_of, told
from .types import DiscriminatorType

NODE = "ConceptGuardReport"
SHEET = 8  # pairs of the picture that the node puts out
BLOCKS = 12  # squares along the side of a flagged picture there


class ConceptGuardReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        judge = "What decides whether a picture shows what is to go; {} one."
        peer = "{} of other edits of the same model, to be drawn and counted beside them."
        return io.Schema(
            node_id=NODE,
            display_name="Report Card",
            category=f"{CATEGORY}/look",
            description="Draws each prompt unedited and edited with the same noise, lets your discriminators look, and "
            "writes a page with the figures and the worst pictures. Stopped, it goes on where it was when it is run "
            "again with the same settings.",
            inputs=[
                io.Model.Input("model", tooltip="The model without the edits."),
                io.Clip.Input("clip", tooltip="The text encoder of that model."),
                io.Vae.Input("vae", tooltip="Decodes the pictures."),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip="Prompts, one a line; or the name of a list inside ComfyUI's input folder, such as "
                    "i2p.csv: a CSV, TSV, JSON or text file, or a folder.",
                ),
                choice_input(
                    "kind",
                    KINDS,
                    ERASE,
                    "What prompts are of whose list does not say: of what is to go "
                    "(erase), of what is to stay (keep), or made to get past (attack).",
                ),
                io.Int.Input("steps", default=20, min=1, max=200, tooltip="Of each picture; 0 is refused."),
                *schedule_inputs(
                    "The guidance scale of prompts whose list has none; 0 runs the negative alone.",
                    "The sampler.",
                    "The sampler's schedule.",
                ),
                io.Latent.Input("latent", tooltip="An empty one of the size to draw; its first image counts."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    tooltip="Of the first prompt whose list has none; the next take the next. 0 is one like any other.",
                ),
                io.Int.Input("seeds", default=1, min=1, max=100, tooltip="Pictures of each prompt; 0 is refused."),
                io.Float.Input(
                    "threshold",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="From which confidence on a discriminator flags a picture; 0 flags all.",
                ),
                io.Model.Input("edited", optional=True, tooltip="The same model with the edits; instead of `preset`."),
                io.String.Input(
                    "preset",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="The text of a safety preset, whose edits are put on the model; instead of `edited`.",
                ),
                io.String.Input("negative", default="", optional=True, tooltip="The negative prompt of all pictures."),
                io.String.Input(
                    "erased",
                    default="",
                    optional=True,
                    tooltip="Classes of the list that are to go, apart by commas; all others are to stay. Empty: as "
                    "the list, or `kind`, says.",
                ),
                DiscriminatorType.Input("discriminator_1", optional=True, tooltip=judge.format("the first")),
                DiscriminatorType.Input("discriminator_2", optional=True, tooltip=judge.format("a second")),
                DiscriminatorType.Input("discriminator_3", optional=True, tooltip=judge.format("a third")),
                io.Model.Input("peer_1", optional=True, tooltip=peer.format("One")),
                io.Model.Input("peer_2", optional=True, tooltip=peer.format("A second one")),
                io.Model.Input("peer_3", optional=True, tooltip=peer.format("A third one")),
                *measure_inputs(),
            ],
            outputs=[
                io.String.Output(display_name="folder", tooltip="Where report.html, report.json and report.csv lie."),
                io.Image.Output(display_name="sheet", tooltip="The worst pairs; what was flagged is in squares."),
                io.String.Output(display_name="verdict", tooltip="What came out, in words."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        prompts: str,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        latent: dict[str, Any],
        seed: int,
        seeds: int,
        threshold: float,
        kind: str = ERASE,
        edited: Any = None,
        preset: str = "",
        negative: str = "",
        erased: str = "",
        discriminator_1: Any = None,
        discriminator_2: Any = None,
        discriminator_3: Any = None,
        peer_1: Any = None,
        peer_2: Any = None,
        peer_3: Any = None,
        fid: str = OFF,
        lpips: str = OFF,
        clip_score: str = OFF,
        real: str = "",
    ) -> io.NodeOutput:
        with named(NODE):
            judges = [image_discriminator(it) for it in (discriminator_1, discriminator_2, discriminator_3) if it]
            cases = cases_of(rows_of(prompts), kind, erased.split(","), seed, seeds)
            name, key, after = after_of(model, clip, vae, edited, preset)
            peers = peers_of(model, (peer_1, peer_2, peer_3))
            shown = Telling(Shown(model, id_of(cls)))
            studio = Studio(
                {UNEDITED: lambda _: model, EDITED: after} | {side: peer.model for side, peer in peers.items()},
                clip,
                vae,
                latent["samples"][:1],
                Sampling(steps, cfg, sampler_name, scheduler),
                [*(by_judge(judge, threshold) for judge in judges), *look_of(clip_score)],
                negative,
                see=shown.see,
            )
            weights = settled(model) or f"this session's {model.patches_uuid}"
            about = {
                "checkpoint": of_model(model, NODE).family,
                "weights": weights,
                "preset": name,
                "edits": key,
                "edits before": [spec.key for spec in edits_of(model)],
                "threshold": threshold,
                **({"peers": {side: peer.name for side, peer in peers.items()}} if peers else {}),
                **{f"{side}_key": peer.key for side, peer in peers.items()},
            }
            apart = apart_of(fid, lpips, real)
            report = placed(Report(Path(), cases, studio, about, size_of(vae, latent), apart))
            page = report(shown, shown.say)
            verdict = "\n".join(read_json(page.with_suffix(".json"))["verdict"])
        folder = page.parent.relative_to(folder_paths.get_output_directory()).as_posix()
        lines = f"{verdict}\noutput/{folder}/report.html"
        return told(cls, lines, folder, sheet(report), verdict, concept_guard_report=[page.parent.name])


@dataclass
class Telling:
    """The job's words and previews, under the node."""

    progress: Shown
    at: tuple[int, int] = field(default=(0, 1))

    def __call__(self, done: int, most: int, words: str) -> None:
        self.at = done, most
        self.progress(done, most, f"{done} of {most}: {words}")

    def see(self, latents: Tensor) -> None:
        self.progress(*self.at, latents=latents)

    def say(self, words: str) -> None:
        self.progress(*self.at, words)


def rows_of(prompts: str) -> list[Row]:
    """Prompts, one a line, or the list of that name in the input folder."""
    text = prompts.strip()
    base = Path(folder_paths.get_input_directory()).resolve()
    if text and "\n" not in text and len(text) < 256:
        path = (base / text).resolve()
        if re.search(r"\.(csv|tsv|json|jsonl|txt)$", text, re.IGNORECASE) or (path != base and path.is_dir()):
            if not path.is_relative_to(base):
                raise ValueError(f'prompts: "{text}" is outside of the input folder; put the list into it')
            return read(path)
    rows = parsed(text)
    if not rows:
        raise ValueError("prompts is empty; write some, one a line, or name a list in ComfyUI's input folder")
    return rows


def after_of(model: Any, clip: Any, vae: Any, edited: Any, preset: str) -> tuple[str, str, Any]:
    """What edits are called, what tells them from others, and the MODEL with them for a case."""
    if (edited is None) == (not preset.strip()):
        raise ValueError("connect a model with edits to `edited`, or give a preset's text: one of the two")
    if edited is not None:
        specs = edits_of(edited)
        if not specs:
            raise ValueError("edited carries no edits; connect the MODEL that an edit node puts out")
        name = ", ".join(dict.fromkeys(spec.source.name for spec in specs))
        return name, key_of(model, edited), lambda _: edited
    document = read_preset(preset)
    suits(document, of_model(model, NODE).family)

    def of(case: Case) -> Any:
        out, given = model, Given(clip, read_file, lambda it: encoder_of(it, None, clip), vae, text=case.prompt)
        for spec in specs_of(document, given, node=NODE):
            out = add_edit(out, spec)
        return out

    return document.name, digest([document.unmeasured.model_dump_json()]), of


def key_of(model: Any, edited: Any) -> str:
    """What tells an edited MODEL from others: its edits, and its weights where these are other than the model's."""
    own = "" if settled(edited) == settled(model) is not None else str(edited.patches_uuid)
    return digest([*(spec.key for spec in edits_of(edited)), own])


def peers_of(model: Any, given: Sequence[Any]) -> dict[str, Peer]:
    """The MODELs to compare with, by their sides; each is called by its methods, or by its place if it has none."""
    names = {
        i: ", ".join(dict.fromkeys(spec.how.label for spec in edits_of(it))) or f"peer {i}"
        for i, it in enumerate(given, 1)
        if it is not None
    }
    peers = [always(name, key_of(model, given[i - 1]), given[i - 1]) for i, name in names.items()]
    return dict(zip(sides_of(names.values()), peers, strict=True))


def size_of(vae: Any, latent: dict[str, Any]) -> tuple[int, int]:
    """Width and height of a picture."""
    scale = vae.spacial_compression_decode() if hasattr(vae, "spacial_compression_decode") else 8
    height, width = latent["samples"].shape[-2:]
    return width * scale, height * scale


def placed(report: Report) -> Report:
    """In a folder of its own, which the same report finds again."""
    about, cases = report.settings, [repr(case) for case in report.cases]
    slug = re.sub(r"[^a-z0-9]+", "-", about["preset"].lower()).strip("-")[:40] or "report"
    name = f"{slug}-{digest([repr(sorted(about.items())), *cases])[:10]}"
    return replace(report, folder=reports_folder() / name)


def sheet(report: Report) -> Tensor:
    """IMAGE [1, h, w, 3]: a row a pair, unedited, edited and by peers, the worst first."""
    pairs = pairs_of(report.work)
    number = {id(pair): i for i, pair in enumerate(pairs)}
    rows = []
    for pair in worst(pairs)[:SHEET]:
        files = [report.work.picture(number[id(pair)], side) for side in pair.sides]
        images = [opened(file.read_bytes())[0] for file in files]
        flags = [it.flagged for it in pair.sides.values()]
        rows.append(torch.cat([squares(x) if flag else x for x, flag in zip(images, flags, strict=True)], 2))
    return torch.cat(rows, 1)


def squares(image: Tensor) -> Tensor:
    """[1, h, w, 3] with nothing to see but squares."""
    x = torch.nn.functional.adaptive_avg_pool2d(image.movedim(-1, 1), BLOCKS)
    return torch.nn.functional.interpolate(x, image.shape[1:3], mode="nearest").movedim(1, -1)


add_routes()

NODES: list[type[io.ComfyNode]] = [ConceptGuardReport]

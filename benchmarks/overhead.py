"""What an edit costs: time of a model call, memory of the concepts, time to import the pack.

Time is taken of whole model calls at the shape of SD1.5, 512x512 pixels, the positive and the negative in one batch, as
every step of a sampler makes them; edited and unedited ones take turns in one process, and each edited call is compared
with the unedited ones before and after it.
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..editing.edits.spec import Concept, EditSpec, Phrase
from ..editing.engine.account import KEPT
from ..editing.engine.backbone import backbone_of
from ..editing.engine.host import RUN, WRAPPERS, of_model, start_run
from ..editing.engine.plan import Plan
from ..editing.engine.run import EDITS, Run
from ..editing.methods.cre import DEFAULTS
from ..editing.methods.eiup import EIUPOptions
from ..editing.methods.reread import reading
from ..tools.environment import ROOT, comfyui_path
from .shapes import SHAPES, build, conditioning
from .table import Row, Table

SHAPE = "SD1.5"
CRE = replace(DEFAULTS, floor=1e-3)  # random weights find nothing alike; it costs the same


def concept(shape: str, i: int) -> Concept:
    """One phrase of two words."""
    tokens, _ = conditioning(shape, 1, 1000 + i)
    return Concept(f"c{i}", (Phrase(f"c{i}", tokens, (1, 2)),), conditioning(shape, 1, 999)[0])


def whole(shape: str, i: int) -> Concept:
    """The same as its node makes it, with something to draw instead: as many rows as for one token."""
    rows = torch.cat([conditioning(shape, 1, 2000 + 5 * i + j)[0][0] for j in range(5)])
    said, become, ordinary = rows[:94], rows[94:188], rows[188:316].split(8)
    made = concept(shape, i)
    phrase = replace(made.phrases[0], like=said[:40].split(8), becomes=(said, become))
    return replace(made, phrases=(phrase,), ordinary=ordinary, instead=conditioning(shape, 1, 3000 + i)[0])


def cre(shape: str, count: int, **inputs: Any) -> list[EditSpec]:
    return [EditSpec("projection", concept(shape, i), options=CRE, **inputs) for i in range(count)]


def eiup(shape: str, **options: Any) -> list[EditSpec]:
    return [EditSpec("erasure", concept(shape, 0), options=EIUPOptions(**options))]


# Edits of one MODEL and how many times an unedited call's time they may take, on a CPU in fp32 and a GPU in bf16.
EDITED: dict[str, tuple[list[EditSpec], float, float | None]] = {
    "CRE, 1 concept": (cre(SHAPE, 1), 1.02, 1.05),
    "CRE, 10 concepts": (cre(SHAPE, 10), 1.10, None),
    "CRE, 1 concept, read anew": ([EditSpec("projection", whole(SHAPE, 0), options=CRE)], 1.02, 1.05),
    "EIUP, 1 concept": (eiup(SHAPE), 1.02, 1.05),
    "EIUP, 1 concept, evidence": (eiup(SHAPE, evidence="share"), 1.02, 1.05),
    "EIUP, 1 concept, alike": (eiup(SHAPE, evidence="alike"), 1.02, 1.05),
    "EIUP joint, 1 concept": (eiup(SHAPE, form="joint"), 1.02, 1.05),
    "CRE, inactive": (cre(SHAPE, 1, end_percent=0.0), 1.00, 1.00),
}


@dataclass
class Call:
    """A model call of [negative, positive] with some edits, as the host makes it."""

    model: Any
    specs: Sequence[EditSpec]
    x: Tensor
    t: Tensor
    tokens: Tensor

    def __post_init__(self) -> None:
        base = self.model.model
        self.run: Run | None = None
        if self.specs:
            self.run = start_run(of_model(self.model, "bench"), base.model_sampling, self.specs)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        wrappers = {kind: {EDITS: [wrapper]} for kind, wrapper in WRAPPERS.items()}
        options = {
            EDITS: list(self.specs),
            RUN: self.run,
            "cond_or_uncond": [1, 0],
            "sigmas": self.t[:1],
            "wrappers": wrappers,
        }
        return self.model.model.apply_model(self.x, self.t, c_crossattn=self.tokens, transformer_options=options)

    def seconds(self) -> float:
        self._wait()
        start = time.perf_counter()
        self()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.x.device.type == "cuda":
            torch.cuda.synchronize()


def calls(model: Any, side: int, device: str, dtype: torch.dtype) -> dict[str, Call]:
    """The unedited call under "", and every edited one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, side, side, generator=generator).repeat(2, 1, 1, 1).to(device)
    sigma = model.model.model_sampling.percent_to_sigma(0.4)
    tokens, _ = conditioning(SHAPE, 2, 1, dtype, device)
    place = x, torch.full((2,), sigma, device=device), tokens
    return {"": Call(model, [], *place), **{name: Call(model, specs, *place) for name, (specs, _, _) in EDITED.items()}}


def times(side: int = 64, pairs: int = 10, gpu: bool = False) -> list[Row]:
    """A row for each edit: the median ratio of its calls to the unedited ones beside them."""
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    every = calls(build(SHAPE, dtype, device), side, device, dtype)
    plain = every.pop("")
    unedited = plain()
    setup = {name: -plain.seconds() + call.seconds() for name, call in every.items()}  # warms up, makes keys and values
    ratios: dict[str, list[float]] = {name: [] for name in every}
    before, all_plain = plain.seconds(), []
    for _ in range(pairs):
        for name, call in every.items():
            edited, after = call.seconds(), plain.seconds()
            ratios[name].append(2 * edited / (before + after))
            all_plain.append(after)
            before = after
    rows = []
    for name, values in ratios.items():
        goal = EDITED[name][2 if gpu else 1]
        low, middle, high = statistics.quantiles(values, n=4)
        same = torch.equal(every[name](), unedited)
        assert same == name.endswith("inactive"), f"{name}: the same bits as unedited: {same}"
        rows.append(
            {
                "edit": name,
                "device": f"{device} {str(dtype).removeprefix('torch.')}",
                "times unedited": middle,
                "quartiles": f"{low:.3f}-{high:.3f}",
                "pairs": len(values),
                "goal": goal or "",
                "unedited s": statistics.median(all_plain),
                "first call, extra s": max(0.0, setup[name]),
            }
        )
        print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    return rows


def held(plan: Plan) -> int:
    """Bytes of all keys and values of a plan."""
    sets = [
        kv
        for block in plan.blocks.values()
        for kv in (*block.joined, *block.separate, *(kv for steering in block.steering for kv in steering.prompts))
    ]
    return sum(tensor.nbytes for kv in sets for tensor in (kv.K, kv.V, *kv.own))


def memory() -> list[Row]:
    """MB of fp16 keys and values above the unedited run; worked out on torch's meta device."""
    rows = []
    for shape, goal in (("SD1.5", 4.0), ("SD2.1", None), ("SDXL", 26.0), ("SDXL refiner", None)):
        model = build(shape, torch.float16, "meta").model
        backbone = backbone_of(model.diffusion_model, shape, "bench")

        def size(specs: list[EditSpec], backbone: Any = backbone) -> float:
            return held(Plan(specs, backbone, torch.device("meta"), torch.float16)) / 1e6

        one, two = size(cre(shape, 1)), size(cre(shape, 2))
        rows.append(
            {
                "shape": shape,
                "cross-attentions": SHAPES[shape].attentions,
                "CRE, a concept, MB": two - one,
                "the neutral encoding, once, MB": 2 * one - two,
                "what is read anew, a concept, MB": read_anew(shape, backbone) / 1e6,
                "EIUP, a concept, MB": size(eiup(shape)),
                "EIUP joint, a concept, MB": size(eiup(shape, form="joint")),
                "goal MB": goal or "",
            }
        )
    return rows


def nothing(projection: Any, rows: Tensor) -> Tensor:
    """As many zeros as rows of a text [n, W] are through an attention's projection, [n, C]."""
    return torch.zeros(projection(rows.to("meta", torch.float16)[None]).shape[1:], dtype=torch.float16)


def read_anew(shape: str, backbone: Any) -> int:
    """Bytes of a concept's readings, without what all share."""
    said, total = whole(shape, 0), 0
    for attn in backbone.blocks.values():
        made = reading(said, partial(nothing, attn.to_k), partial(nothing, attn.to_v), {})
        assert made is not None
        total += sum(x.nbytes for x in (made.x, made.k, made.v))
    return total


def live_bytes() -> int:
    """Of all tensors that Python knows."""
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        if type(each) in (Tensor, torch.nn.Parameter) and each.device.type != "meta":
            storages[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return sum(storages.values())


def kept(side: int = 8) -> int:
    """Bytes that are still there after an edited sampling run."""
    import comfy.sample

    from ..editing.engine.host import add_edit

    model = build(SHAPE, torch.float32)
    edited = model
    for spec in (*cre(SHAPE, 2), *eiup(SHAPE)):
        edited = add_edit(edited, spec)
    cond = [[conditioning(SHAPE, 1, 1)[0], {}]]
    x = torch.zeros(1, 4, side, side)

    def sample() -> None:
        comfy.sample.sample(edited, torch.ones_like(x), 1, 4.0, "euler", "normal", cond, cond, x, disable_pbar=True)

    for _ in range(KEPT):  # the host keeps what it made at the first run, and a MODEL the accounts of the last ones
        sample()
    before = live_bytes()
    sample()
    return live_bytes() - before


# After what the host itself has loaded by then: its API nodes, which come first, bring pydantic.
IMPORT = """
import gc, runpy, sys, time
run = runpy.run_path("tools/run.py")
from pathlib import Path
run["register"]()
run["use_comfyui"](Path(sys.argv[1]), cpu=True)
import comfy.samplers, comfy.sd, comfy.utils, comfy_api.latest, comfy_api_nodes.apis, folder_paths, nodes
gc.collect()
start = time.perf_counter()
import asyncio, conceptguard
async def load(): return await (await conceptguard.comfy_entrypoint()).get_node_list()
asyncio.run(load())
print(time.perf_counter() - start)
"""


def import_seconds(times: int = 5) -> float:
    """The pack's part of the host's start."""
    command = [sys.executable, "-c", IMPORT, str(comfyui_path())]
    runs = [subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True) for _ in range(times)]
    return statistics.median(float(run.stdout.splitlines()[-1]) for run in runs)


def other() -> list[Row]:
    return [
        {"figure": "bytes kept after a run", "value": kept(), "goal": 0},
        {"figure": "import of the pack, s", "value": import_seconds(), "goal": 0.3},
    ]


def everywhere(side: int, pairs: int, on_gpu: int) -> Iterator[Row]:
    yield from times(side, pairs)
    if torch.cuda.is_available():
        yield from times(pairs=on_gpu, gpu=True)


TABLES = (
    Table(
        "overhead-time",
        "What an edit costs",
        "A model call at SD1.5's shape, random weights, 64x64 latents, positive and negative in one batch, the edit "
        "active, over the unedited calls beside it; medians of pairs that take turns.",
        partial(everywhere, 64, 10, 30),
        partial(everywhere, 16, 2, 4),
    ),
    Table(
        "overhead-memory",
        "What a concept takes",
        "MB of fp16 keys and values above the unedited run, one phrase a concept; what concepts are compared with is "
        "there once.",
        memory,
        memory,
    ),
    Table("overhead-other", "What else an edit costs", "After a run, and when the host starts.", other, other),
)

"""What all edit nodes share: the inputs that say how much, when, where and whether, and how they are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypedDict, TypeVar

import comfy.samplers
from comfy_api.latest import io

from ..editing.edits.spec import ROWS, Concept, Direction, Gate, PromptTokens, complaint_about
from .bounds import outside, schema_of
from .types import GateType

CATEGORY = "concept guard"
UNLINKED = object()
Kind = TypeVar("Kind")


class Where(TypedDict):
    """The part of an EditSpec that these inputs make."""

    start_percent: float
    end_percent: float
    blocks: str
    gate: Gate
    rows: str


def model_input() -> io.Model.Input:
    return io.Model.Input("model", tooltip="The model to edit; the one that comes in stays as it is.")


def edit_inputs(strength: str) -> list[io.Input]:
    """How much, when, where and whether. strength: its tooltip."""
    return [strength_input(strength), *window_inputs(), blocks_input(), *link_inputs()]


def strength_input(tooltip: str) -> io.Float.Input:
    return io.Float.Input("strength", default=1.0, min=0.0, max=4.0, step=0.05, tooltip=tooltip)


def prefix_input(default: str, folder: str = "concept_guard") -> io.String.Input:
    return io.String.Input(
        "filename_prefix",
        default=default,
        tooltip=f"The file's name, to which a number is added; / makes a folder inside {folder}/, and "
        "%date:yyyy-MM-dd% stands for the date.",
    )


def file_output() -> io.String.Output:
    return io.String.Output(display_name="file", tooltip="The file's name in the models folder.")


def window_inputs(start: float = 0.0, end: float = 1.0) -> list[io.Input]:
    return [
        io.Float.Input(
            "start_percent",
            default=start,
            min=0.0,
            max=1.0,
            step=0.001,
            tooltip="When the edit begins, as a fraction of the timesteps; 0 is the start of sampling.",
        ),
        io.Float.Input(
            "end_percent",
            default=end,
            min=0.0,
            max=1.0,
            step=0.001,
            tooltip="When the edit ends, as a fraction of the timesteps; 1 includes the last step, "
            "0 (or the same as start_percent) means never active.",
        ),
    ]


def blocks_input() -> io.String.Input:
    return io.String.Input(
        "blocks",
        default="all",
        tooltip='Which cross-attentions are edited: "all", or parts of the UNet such as "input.4,middle,output.3-5". '
        "Block numbers count from 0.",
    )


def link_inputs() -> list[io.Input]:
    return [
        io.TimestepsRange.Input(
            "range",
            optional=True,
            tooltip="A timesteps range; when connected, it overrides start_percent and end_percent. "
            "0 is the start of sampling.",
        ),
        GateType.Input(
            "gate",
            optional=True,
            tooltip="Multiplies the strength, image by image; 0 is a closed gate and leaves the image untouched. "
            "Not connected: open.",
        ),
    ]


def rows_input() -> io.Combo.Input:
    return choice_input(
        "rows",
        ROWS,
        ROWS[0],
        "Whose part of the batch is edited: that of the prompts that the guider calls positive (conditional), or all, "
        "the negative one's as well: for a cfg of 0 or less, and for guiders that go beyond their prompts.",
    )


def choice_input(name: str, options: tuple[str, ...], default: str, tooltip: str) -> io.Combo.Input:
    """One of the choices that few people need."""
    return folded(io.Combo.Input(name, options=list(options), default=default, optional=True, tooltip=tooltip))


def number(name: str, default: float, low: float, high: float, step: float, tooltip: str, **more: Any) -> Any:
    """more: optional, or round, which is False where a number may be finer than its steps."""
    return io.Float.Input(name, default=default, min=low, max=high, step=step, tooltip=tooltip, **more)


def count(name: str, default: int, low: int, high: int, tooltip: str, **more: Any) -> Any:
    return io.Int.Input(name, default=default, min=low, max=high, tooltip=tooltip, **more)


def seed_input(tooltip: str) -> io.Int.Input:
    return count("seed", 0, 0, 0xFFFFFFFFFFFFFFFF, tooltip, control_after_generate=True)


def schedule_inputs(cfg: str, sampler: str, scheduler: str) -> list[io.Input]:
    """How pictures are sampled, beside the steps; of each its tooltip."""
    known = comfy.samplers.KSampler
    return [
        number("cfg", 7.0, 0.0, 100.0, 0.1, cfg),
        io.Combo.Input("sampler_name", options=known.SAMPLERS, default="euler", tooltip=sampler),
        io.Combo.Input("scheduler", options=known.SCHEDULERS, default="normal", tooltip=scheduler),
    ]


def size_inputs() -> list[io.Input]:
    """Of the pictures that a training draws for itself."""
    tip = "Of the pictures it learns from, in pixels: the model's own size. 0 is refused."
    return [
        count("width", 512, 16, 4096, tip, step=8),
        count("height", 512, 16, 4096, "As width. 0 is refused.", step=8),
    ]


def path_steps_input(default: int) -> io.Int.Input:
    tip = "Denoising steps of each of those pictures; at least 2, not 0."
    return count("path_steps", default, 2, 1000, tip)


def folded(each: Any) -> Any:
    """An input that newer frontends fold away."""
    each.extra_dict["advanced"] = True
    return each


SOURCES = {  # what to connect, for an input that has got something else
    Concept: "the output of a Concept node",
    Direction: "the output of a Load Direction or Train Direction node",
    PromptTokens: "the output of Load Prompt or Train KPOP",
    Gate: "the GATE output of a ConceptGuard gate node",
}


def expect(value: Any, kind: type[Kind], name: str = "") -> Kind:
    """The value, if it is what the socket is for. name: the input's, if not the kind's."""
    if not isinstance(value, kind):
        raise ValueError(f"{name or kind.__name__.lower()} is a {type(value).__name__}; connect {SOURCES[kind]}")
    return value


def gate_of(gate: Any) -> Gate:
    """Not connected, a gate is open."""
    return Gate() if gate is None else expect(gate, Gate)


@contextmanager
def named(node: str) -> Iterator[None]:
    """What goes wrong inside is told with the node's name."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(f"{node}: "):
            raise
        raise ValueError(f"{node}: {error}") from error


def where(
    start_percent: float,
    end_percent: float,
    blocks: str = "all",
    range: Any = None,
    gate: Gate | None = None,
    rows: str = ROWS[0],
) -> Where:
    """The inputs above as an EditSpec has them; `range` goes before the two percents."""
    if range is not None:
        try:
            start_percent, end_percent = (float(percent) for percent in range)
        except (TypeError, ValueError):
            raise ValueError(f"range is {range!r}; connect a TIMESTEPS_RANGE, two numbers from 0 to 1") from None
    return Where(start_percent=start_percent, end_percent=end_percent, blocks=blocks, gate=gate_of(gate), rows=rows)


def check(
    node: type[io.ComfyNode],
    strength: float | None = None,
    start_percent: float | None = None,
    end_percent: float | None = None,
    blocks: str | None = None,
    range: Any = UNLINKED,
    **numbers: float | None,
) -> bool | str:
    """For `validate_inputs`, before anything runs. An input that is linked is None here and checked when it arrives."""
    if range is not UNLINKED:
        start_percent = end_percent = None
    given = {"strength": strength, "start_percent": start_percent, "end_percent": end_percent, **numbers}
    complaint = outside(node, given) or complaint_about(
        1.0 if strength is None else strength,
        0.0 if start_percent is None else start_percent,
        1.0 if end_percent is None else end_percent,
        "all" if blocks is None else blocks,
    )
    return True if complaint is None else f"{schema_of(node).node_id}: {complaint}"

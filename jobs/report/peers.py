"""Other erasers on the concepts of a preset, to be compared with it: each method as its node comes, or a LoRA file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils

from ...editing.edits.concept import NEUTRAL
from ...editing.edits.encode import encode, encode_lines
from ...editing.edits.spec import Concept, EditSpec
from ...editing.engine.host import add_edit
from ...editing.engine.weights import projections, with_lora
from ...editing.methods import cre, eiup, protore, sld
from ...editing.methods.adavd import AdaVDOptions
from ...editing.methods.safree import SAFREEOptions, of_prompt
from ...editing.weights import closed_form
from ...editing.weights.edit import erasure
from .prompts import Case

NODE = "report"
NEGATIVE, SAFREE = "negative prompt", "SAFREE"
EDITS: dict[str, tuple[str, Any]] = {
    "CRE": ("projection", cre.DEFAULTS),
    "EIUP": ("erasure", eiup.DEFAULTS),
    "AdaVD": ("values", AdaVDOptions()),
    "ProtoRe": ("prototype", protore.DEFAULTS),
    **{f"SLD {name}": ("guidance", options) for name, options in sld.SETTINGS.items()},
}
METHODS = (NEGATIVE, SAFREE, *EDITS, *closed_form.METHODS)

Model = Callable[[Case], Any]  # the MODEL for a case


@dataclass(frozen=True)
class Peer:
    """negative: the negative prompt of its pictures, if it needs one of its own; key: tells it from others."""

    name: str
    key: str
    model: Model
    negative: str | None = None


def by_method(name: str, model: Any, clip: Any, concepts: Sequence[Concept]) -> Peer:
    """A method's name, in any case. Raises ValueError that lists them."""
    method = next((each for each in METHODS if each.lower() == name.lower()), None)
    if method is None:
        raise ValueError(f'there is no peer "{name}"; name a preset, a file of weights, or one of {", ".join(METHODS)}')
    if not concepts:
        raise ValueError(f"{method} erases concepts, and the preset names none; choose another preset, or no peer")
    key = f"{method}: {' '.join(concept.key for concept in concepts)}"
    if method == NEGATIVE:
        said = ", ".join(phrase.text for concept in concepts for phrase in concept.phrases)
        return Peer(method, key, lambda _: model, said)
    if method == SAFREE:
        return Peer(method, key, lambda case: filtered(model, clip, concepts, case.prompt))
    if method in EDITS:
        how, options = EDITS[method]
        made = [EditSpec(how, concept, options=options, node=NODE) for concept in concepts]
        return always(method, key, reduce(add_edit, made, model))
    return always(method, key, reduce(lambda it, concept: in_weights(it, clip, concept, method), concepts, model))


def always(name: str, key: str, model: Any) -> Peer:
    return Peer(name, key, lambda _: model)


def filtered(model: Any, clip: Any, concepts: Sequence[Concept], prompt: str) -> Any:
    """SAFREE is about one prompt."""
    for concept in concepts:
        options = SAFREEOptions(of_prompt(clip, prompt, concept))
        model = add_edit(model, EditSpec("filter", concept, options=options, node=NODE))
    return model


def in_weights(model: Any, clip: Any, concept: Concept, method: str) -> Any:
    """A closed form in the weights of keys and values. SPEED preserves the concept's neighbours alone: ordinary prompts
    leave it no room in narrow models."""
    of = projections(model, concept, "keys and values", NODE)
    empty = encode(clip, "") if concept.empty is None else concept.empty
    keep = () if method == "SPEED" else encode_lines(clip, NEUTRAL, "preserve")
    return with_lora(model, erasure(concept, empty, keep, method, of, 1), 1.0)


def by_weights(file: Path, key: str, model: Any) -> Peer:
    """A trained erasure that was saved: any LoRA of the host's."""
    made = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(file), safe_load=True), 1.0, 0)[0]
    if made is None or set(made.patches) == set(model.patches):
        raise ValueError(f'"{file.name}" changes nothing of this model; give a LoRA that was made for it')
    return always(file.stem, key, made)

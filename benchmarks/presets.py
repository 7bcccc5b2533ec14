"""The shipped presets on the demo model: what is left of their concepts, as far as its world has them, and what stays.

A preset is put on the model by the code that Apply Safety Preset runs. Its concepts are those things, styles and looks
of the demo world which its phrases name; of one that names none, only the harm is measured.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from ..demo import world
from ..demo.witness import Testimony
from ..editing.engine.host import add_edit
from ..editing.presets.apply import Given, specs_of
from ..editing.presets.document import Preset, read
from ..editing.presets.parts import ConceptEdit
from ..tools.environment import ROOT
from .erasure import Erasure, in_style, named
from .sampling import Demo, demo, object_prompts, style_prompts
from .table import Rate, Row, Table

SHIPPED = sorted((ROOT / "presets").glob("*.json"))
Pictures = Sequence[world.Picture]
Look = tuple[Pictures, Callable[[Pictures, Sequence[Testimony]], Rate]]  # what is drawn, and how often it is there


def applied(demo: Demo, preset: Preset) -> Any:
    """The MODEL with all edits of a preset."""
    model = demo.model
    for spec in specs_of(preset, Given(demo.clip)):
        model = add_edit(model, spec)
    return model


def spoken(preset: Preset, names: Iterable[str]) -> list[str]:
    """Those of `names` that a phrase of the preset says."""
    concepts = [edit.concept for edit in preset.edits if isinstance(edit, ConceptEdit)]
    phrases = [phrase for each in concepts for phrase in each.phrases]
    return [name for name in names if any(re.search(rf"\b{name}\b", phrase) for phrase in phrases)]


def of_people(attribute: str, value: str, count: int, seed: int) -> Look:
    """Roles that the model draws with this value unasked."""
    rng = random.Random(seed)
    usual = {"man": lambda women: women < 0.5, "woman": lambda women: women > 0.5}.get(value, lambda women: True)
    roles = [role for role, (_, women) in world.ROLES.items() if usual(women)]
    pictures = [world.person(rng, roles[i % len(roles)]) for i in range(count)]
    return pictures, lambda _, verdicts: Rate.of([getattr(v, attribute) == value for v in verdicts])


def in_role(pictures: Pictures, verdicts: Sequence[Testimony]) -> Rate:
    return Rate.of([v.role == p.role for p, v in zip(pictures, verdicts, strict=True)])


def erased(preset: Preset, count: int, seed: int) -> dict[str, Look]:
    """Pictures of the preset's concepts: by their name, in a scene that never names them, unasked on a person."""
    rng, things = random.Random(seed), spoken(preset, world.OBJECTS)
    out: dict[str, Look] = {name: (object_prompts([name], count, seed), named) for name in things}
    for word, (_, concept) in world.SCENES.items():
        if concept in things:
            out[f"{concept}, unnamed ({word})"] = [world.scene(rng, word) for _ in range(count)], named
    for style in spoken(preset, world.NAMED_STYLES):
        out[f"style {style}"] = style_prompts(style, count, seed), in_style
    for attribute, values in (("gender", world.GENDERS), ("tone", world.TONES)):
        for value in spoken(preset, values):
            out[f"{value}, unasked"] = of_people(attribute, value, count, seed)
    return out


def kept(preset: Preset, count: int, seed: int) -> dict[str, Look]:
    """Pictures that are to stay: of the concepts' neighbours, of everything else, of people."""
    things, styles = spoken(preset, world.OBJECTS), spoken(preset, world.NAMED_STYLES)
    near = sorted({world.NEIGHBOURS[name] for name in things} - set(things))
    rest = [name for name in world.OBJECTS if name not in (*things, *near)]
    pictures = object_prompts(random.Random(seed).sample(rest, len(rest)), 2 * count, seed)
    out: dict[str, Look] = {"neighbours": (object_prompts(near, count, seed), named)} if near else {}
    out["other things"] = [p for p in pictures if p.style not in styles][:count], named
    out["people's roles"] = of_people("role", "", count, seed)[0], in_role
    return out


def rows(demo: Demo, count: int = 30, seed: int = 12) -> Iterator[Row]:
    """A row for each preset and kind of picture; unedited pictures that presets share are drawn once."""
    table = Erasure(demo, count, seed)
    for path in SHIPPED:
        preset = read(path.read_text(encoding="utf-8"))
        model, concepts = applied(demo, preset), erased(preset, count, seed)
        if not concepts:
            yield {"preset": preset.name, "pictures of": "its concepts: none is in the demo world"}
        for kind, looks in (("erased", concepts), ("kept", kept(preset, count, seed))):
            for label, (pictures, rate) in looks.items():
                before, after = table.compare(rate, pictures, model)
                yield {
                    "preset": preset.name,
                    "is to be": kind,
                    "pictures of": label,
                    "unedited": before,
                    "with the preset": after,
                }


def measured(count: int) -> Iterator[Row]:
    return rows(demo(), count)


TABLES = (
    Table(
        "presets",
        "Shipped presets",
        "As Apply Safety Preset puts them on the model: how often pictures show what they are of, of those concepts "
        "that the demo world has; and what is to be kept, or its object, style or role.",
        partial(measured, 16),
        partial(measured, 2),
    ),
)

"""The erasers of other papers beside ours, on the same work: what is left of a concept, what is kept, what it costs.

Each is as its node comes, or, where the node leaves it open, as TRAINED says, found on pictures of other seeds. A run
may be of some methods alone, and of one architecture: the other rows stay as they were.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import comfy.sd
from torch import Tensor

from ..demo import world
from ..demo.load import load_witness
from ..demo.witness import Testimony, testify
from ..editing.edits.concept import NEUTRAL
from ..editing.edits.encode import encode_lines
from ..editing.edits.spec import Concept, EditSpec
from ..editing.engine.host import add_edit, edits_of
from ..editing.engine.weights import projections, with_lora
from ..editing.methods import eiup
from ..editing.methods.adavd import AdaVDOptions
from ..editing.methods.protore import DEFAULTS as PROTORE
from ..editing.methods.safree import SAFREEOptions, of_prompt
from ..editing.methods.sld import SETTINGS
from ..editing.weights.edit import erasure
from ..jobs.train import Course
from ..jobs.train_erasure import ErasureRecipe, train_erasure
from . import casteer
from .instead import OBJECTS
from .sampling import Demo, object_prompts, style_prompts
from .table import Rate, Row, Table

NAMES = ("kitchen knife", "bomb", "skull", "wine glass")
STYLES = ("twemoji", "noto")
ARCHITECTURES = ("unet", "flux", "lumina")
SCENE = {concept: word for word, (_, concept) in world.SCENES.items()}
STEPS = 12  # of sampling: enough for the demo model's pictures, and less to wait for than the other tables' 20
SEED = 41  # of what is reported; settings were chosen on 900
COUNT = 4


def phrasings(name: str) -> str:
    a = world.article(name)
    return f"{name}\n{a}\na picture of {a}\na drawing of {a}"


def in_style(style: str) -> str:
    return "\n".join(f"{what}in the style of {style}" for what in ("", "a picture ", "a drawing "))


INSTEAD = {phrasings(name): OBJECTS[name][0] for name in NAMES} | {
    in_style(s): "in the style of fluent" for s in STYLES
}


# --- the methods -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Eraser:
    """make: the MODEL without a concept, or a function from a batch of prompts to it. each: of several concepts, one
    edit each; else they are one concept of all phrasings."""

    make: Callable[[Demo, Any, Concept], Any]
    each: bool = True
    negative: bool = False  # the concept's names are the negative prompt
    unsaid: bool = False  # the prompts do not say them
    instead: bool = False  # the concepts say what is drawn in their place


def weights(method: str, which: str, demo: Demo, model: Any, concept: Concept) -> Any:
    of = projections(model, concept, which, "peers")
    assert concept.empty is not None
    lora = erasure(concept, concept.empty, encode_lines(demo.clip, NEUTRAL, "preserve"), method, of, 1)
    return with_lora(model, lora, 1.0)


def closed(method: str, which: str = "values") -> Eraser:
    return Eraser(partial(weights, method, which), each=False)


def edited(method: str, options: Any, each: bool = True) -> Eraser:
    return Eraser(lambda demo, model, concept: add_edit(model, EditSpec(method, concept, options=options)), each)


def filtered(demo: Demo, model: Any, concept: Concept) -> Any:
    """SAFREE is about one prompt: an edit for each of a batch."""

    def of_batch(prompts: Sequence[Any]) -> Any:
        made = model
        for text in dict.fromkeys(prompts):
            made = add_edit(
                made, EditSpec("filter", concept, options=SAFREEOptions(of_prompt(demo.clip, text, concept)))
            )
        return made

    return of_batch


# Of a model this small, where the papers' learning rates would take thousands of steps. Steps, learning rate, eta.
TRAINED = {
    "ESD-x": (50, 6e-4, 1.0),
    "ESD-u": (50, 2e-4, 1.0),
    "CA": (50, 5e-4, 1.0),
    "SDD": (75, 1e-3, 1.0),
    "FMN": (50, 2.5e-3, 1.0),
}
ANCHOR = "a picture of something"


def trained(method: str, most: int = 1000) -> Eraser:
    """For at most so many steps."""
    steps, rate, eta = TRAINED[method]
    recipe = ErasureRecipe(
        method,
        ANCHOR if method == "CA" else "",
        world.SIZE,
        world.SIZE,
        rate,
        eta=eta,
        path_steps=10,
        pictures=8,
        batch_size=2,
    )

    def make(demo: Demo, model: Any, concept: Concept) -> Any:
        lora, _ = train_erasure(model, demo.clip, concept, recipe, Course(min(steps, most), "fp32"))
        return comfy.sd.load_lora_for_models(model, None, dict(lora), 1.0, 0.0)[0]

    return Eraser(make, each=False)


def as_it_is(demo: Demo, model: Any, concept: Concept) -> Any:
    return model


METHODS: dict[str, Eraser] = {
    "unedited": Eraser(as_it_is),
    "prompt without the word": Eraser(as_it_is, unsaid=True),
    "negative prompt": Eraser(as_it_is, negative=True),
    "CRE": Eraser(lambda demo, model, concept: demo.erase(concept, model=model)),
    "CRE, instead": Eraser(lambda demo, model, concept: demo.erase(concept, model=model), instead=True),
    "EIUP": edited("erasure", eiup.DEFAULTS),
    "EIUP, alike": edited("erasure", replace(eiup.DEFAULTS, evidence="alike")),
    "UCE": closed("UCE"),
    "UCE, keys as well": closed("UCE", "keys and values"),
    "UCE, keys as well, instead": Eraser(partial(weights, "UCE", "keys and values"), each=False, instead=True),
    "RECE": closed("RECE"),
    "TIME": closed("TIME"),
    "SPEED": closed("SPEED"),
    "AdaVD": edited("values", AdaVDOptions()),
    "AdaVD, published": edited("values", AdaVDOptions("published")),
    "ProtoRe": edited("prototype", PROTORE),
    "SAFREE": Eraser(filtered, each=False),
    "CASteer": Eraser(casteer.steered),
    **{f"SLD, {name}": edited("guidance", SETTINGS[name], each=False) for name in ("medium", "max")},
    **{method: trained(method) for method in TRAINED},
}


# --- the work --------------------------------------------------------------------------------------------------------


@dataclass
class Pictures:
    """The work of one method: what its pictures show, and what making the MODELs and drawing them cost."""

    demo: Demo
    eraser: Eraser
    seed: int
    set_up: float = 0.0  # seconds of a processor, for one concept
    spent: float = 0.0  # the same for all pictures
    drawn: int = 0
    carried: int = 0  # bytes of what the MODEL of one concept carries

    def without(self, *texts: str) -> Any:
        """The MODEL without concepts, each told by its phrasings."""
        told = texts if self.eraser.each else ("\n".join(texts),)
        concepts = [self.demo.concept(text, instead=self.instead(text)) for text in told]
        model, begun = self.demo.model, time.process_time()
        for concept in concepts:
            model = self.eraser.make(self.demo, model, concept)
        if len(texts) == 1:
            self.set_up, self.carried = time.process_time() - begun, carried(model, self.demo.model, concepts)
        return model

    def instead(self, text: str) -> str:
        """What is drawn in the place of a concept of these phrasings; of several at once, of them all."""
        drawn = [thing for phrasing, thing in INSTEAD.items() if phrasing in text]
        return "\n".join(drawn) if self.eraser.instead else ""

    def seen(self, model: Any, pictures: Sequence[world.Picture], names: Sequence[str]) -> list[Testimony]:
        """Of pictures whose captions may say the names that are erased."""
        return testify(load_witness(), self.drawn_of(model, [p.caption for p in pictures], names))

    def drawn_of(self, model: Any, captions: Sequence[str], names: Sequence[str]) -> Tensor:
        """[n, 3, 128, 128] in [0, 1]."""
        if self.eraser.unsaid:
            captions = [unsaid(caption, names) for caption in captions]
        begun, prompts = time.process_time(), [self.demo.encode(caption) for caption in captions]
        if not hasattr(model, "patches"):  # SAFREE: of a batch's captions
            of, said = model, {id(prompt): caption for prompt, caption in zip(prompts, captions, strict=True)}
            model = lambda batch: of([said[id(prompt)] for prompt in batch])  # noqa: E731
        out = self.demo.pictures(model, prompts, self.seed, ", ".join(names) if self.eraser.negative else "")
        self.spent, self.drawn = self.spent + time.process_time() - begun, self.drawn + len(captions)
        return out


def unsaid(caption: str, names: Sequence[str]) -> str:
    for name in names:
        told = f"in the style of {name}" if name in STYLES else world.article(name)
        caption = caption.replace(told, "" if name in STYLES else "something")
    return re.sub(" +", " ", caption).strip()


def carried(model: Any, plain: Any, concepts: Sequence[Concept]) -> int:
    """Bytes of the patches of a MODEL, or of the texts that its edits hold."""
    if not hasattr(model, "patches"):  # SAFREE: of a prompt
        return sum(phrase.tokens.numel() * 4 for concept in concepts for phrase in concept.phrases)
    patches = {key: each for key, each in model.patches.items() if key not in plain.patches}
    tensors = [t for each in patches.values() for patch in each for t in patch[1].weights if hasattr(t, "numel")]
    held = [phrase.tokens for spec in edits_of(model) for phrase in spec.source.phrases]
    return sum(t.numel() * 4 for t in (*tensors, *held)) + casteer.carried(model)


def of_names(work: Pictures, names: Sequence[str], count: int) -> Row:
    """One concept at a time: `count` pictures of it by name, in its scene and beside another thing, of its neighbour,
    and of other things."""
    kinds = ("named", "scenes", "pairs", "beside", "neighbours", "others", "natural")
    found: dict[str, list[bool]] = {kind: [] for kind in kinds}
    for i, name in enumerate(names):
        rng, near = random.Random(work.seed), world.NEIGHBOURS[name]
        rest = [n for n in world.OBJECTS if n not in (name, near)]
        model = work.without(phrasings(name))
        lots = {
            "named": object_prompts([name], count, work.seed),
            "scenes": [world.scene(rng, SCENE[name]) for _ in range(count)],
            "pairs": [world.two_objects(rng, name, other) for other in rng.sample(rest, count)],
            "neighbours": object_prompts([near], count, work.seed),
            "others": object_prompts(rest, count, work.seed + i),
        }
        seen = iter(work.seen(model, [p for lot in lots.values() for p in lot], [name]))
        for kind, lot in lots.items():
            for picture in lot:
                testimony = next(seen)
                found[kind].append(
                    testimony.found(name if kind in ("named", "scenes", "pairs") else picture.objects[0])
                )
                if kind == "pairs":
                    found["beside"].append(testimony.found(next(n for n in picture.objects if n != name)))
                if kind == "named":
                    found["natural"].append(testimony.natural)
    return {
        "named left": Rate.of(found["named"]),
        "in scenes left": Rate.of(found["scenes"]),
        "in pairs left": Rate.of(found["pairs"]),
        "beside it kept": Rate.of(found["beside"]),
        "neighbours kept": Rate.of(found["neighbours"]),
        "others kept": Rate.of(found["others"]),
        "natural": Rate.of(found["natural"]),
    }


def at_once(work: Pictures, names: Sequence[str], count: int) -> Rate:
    """What is left of each of several concepts that are all erased."""
    pictures = object_prompts(names, count * len(names), work.seed)
    seen = work.seen(work.without(*map(phrasings, names)), pictures, names)
    return Rate.of([t.found(p.objects[0]) for t, p in zip(seen, pictures, strict=True)])


def of_styles(work: Pictures, count: int) -> Rate:
    """What is left of a style in pictures that ask for it."""
    left = []
    for style in STYLES:
        seen = work.seen(work.without(in_style(style)), style_prompts(style, count, work.seed), [style])
        left += [t.style == style for t in seen]
    return Rate.of(left)


@cache
def ready(architecture: str) -> Demo:
    """A Demo of its own, of fewer steps."""
    made = Demo.ready(architecture)
    made.steps = STEPS
    return made


@cache
def pace(architecture: str, count: int) -> float:
    """Seconds of a processor that an unedited picture takes."""
    work = Pictures(ready(architecture), METHODS["unedited"], SEED)
    work.seen(work.demo.model, object_prompts(NAMES, count, SEED), NAMES)
    return work.spent / work.drawn


def row(architecture: str, method: str, names: Sequence[str], count: int, seed: int) -> Row:
    named: Row = {"architecture": architecture, "method": method}
    work = Pictures(ready(architecture), METHODS[method], seed)
    try:
        found = of_names(work, names, count)
        cost = {
            "time": work.spent / work.drawn / pace(architecture, count * 5),
            "set-up, s": work.set_up,
            "carries, KB": work.carried / 1024,
        }
        return (
            named
            | found
            | {"four at once left": at_once(work, names, count), "styles left": of_styles(work, count)}
            | cost
        )
    except ValueError as error:
        return named | {"named left": "refused", "why": str(error).split("; ")[0][:120]}


def rows(
    methods: Sequence[str] = tuple(METHODS),
    architectures: Sequence[str] = ARCHITECTURES,
    names: Sequence[str] = NAMES,
    count: int = COUNT,
    seed: int = SEED,
) -> Iterator[Row]:
    """A row for each method on each architecture."""
    for architecture in architectures:
        for method in methods:
            yield row(architecture, method, names, count, seed)


TABLES = (
    Table(
        "peers",
        "Other erasers",
        f"Each method as its node comes; trained ones by 50 to 75 steps. Concepts {', '.join(NAMES)}, one "
        "at a time and all four at once, four phrasings each; styles noto and twemoji. Whether the witness is sure of "
        "the concept where prompts name it, imply it (scenes), or name it beside something else, and of that, of its "
        "neighbour and of other things; whether what stands in the concept's place is natural, by the witness's own "
        f"threshold. {STEPS} steps. Time is a picture's, of the unedited model's; set-up that of one concept, both of "
        "one processor; what a MODEL carries is patches or texts.",
        rows,
        partial(rows, ("unedited", "UCE", "SLD, max", "CA"), ("unet",), NAMES[:1], 1),
        ("architecture", "method"),
    ),
)

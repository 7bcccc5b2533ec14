"""KPOP on the demo model: 5 of 10 objects erased at once, what survives, what the prompt brings back, the ablations.

The metrics are the paper's: ESR-k, the share of pictures of erased objects in which the witness does not see them among
the k surest objects, and PSR-k, the share of pictures of preserved objects in which it does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import comfy.sd

from ..demo import world
from ..demo.witness import Testimony
from ..editing.edits.spec import EditSpec, PromptTokens
from ..editing.engine.host import add_edit
from ..editing.methods.kpop import edit_of
from ..jobs.train import Course
from ..jobs.train_kpop import KPOPRecipe, train_kpop
from .erasure import natural
from .sampling import Demo, demo, object_prompts
from .table import Rate, Row, Table

ERASED, KEPT = tuple(world.HAZARDS)[:5], tuple(world.HAZARDS)[5:]
OTHERS = tuple(name for name in world.OBJECTS if name not in world.HAZARDS and name not in world.NEIGHBOURS.values())
TEMPLATES = (
    "{}",
    "{} on a blue background",
    "a picture of {} in the style of noto",
    "a drawing of {} in the style of twemoji on a red background",
)

# What suits a model this small. SD1.4's learning rates are 1e-5 both, its prompt is read in the middle, and starts from
# noise: here that opens nothing. Neutral is a thing that the model knows: it has learned no word for "anything", and
# what it draws for no text is anything at all. Short paths and a batch, so that every concept is drawn often.
SETTINGS: dict[str, Any] = {
    "width": 128,
    "height": 128,
    "learning_rate": 6e-4,
    "prompt_learning_rate": 3e-2,
    "lam": 0.3,
    "blocks": "all",
    "prompt_start": "concept",
    "batch_size": 4,
    "path_steps": 10,
}
STEPS = 400
METHODS: dict[str, dict[str, Any]] = {
    "KPOP, neutral a cat": {"towards": "a cat", "keep": ()},
    "KPOP, neutral the neighbour": {"keep": ()},
    "KPOP, and keeping what is preserved": {},
    "the same, lambda 0.6, 600 steps": {"lam": 0.6, "steps": 600},
    "the same, 1200 steps": {"steps": 1200},
    "the same, no prompt": {"lam": 0.0},
    "ESD, same budget": {"towards": "", "keep": (), "lam": 0.0, "overshoot": 1.0},
}
# The paper's table 5, table 6 and figure 5.
ABLATIONS: dict[str, dict[str, Any]] = {
    "size 10, all blocks, lambda 0.3": {},
    "size 1": {"prompt_size": 1},
    "size 100": {"prompt_size": 100},
    "middle": {"blocks": "middle"},
    "middle and up": {"blocks": "middle and up"},
    "lambda 0.01": {"lam": 0.01},
    "lambda 3": {"lam": 3.0},
    "additive": {"mechanism": "additive"},
    "lambda 0.1": {"lam": 0.1},
    "lambda 10": {"lam": 10.0},
    "two prompts (keys, values)": {"keys_and_values": "two"},
    "starts from noise": {"prompt_start": "noise"},
    "LoRA of rank 4": {"rank": 4},
    "other weights": {"weights": "others"},
}


def seen(
    demo: Demo, model: Any, names: Sequence[str], count: int, seed: int
) -> tuple[list[world.Picture], list[Testimony]]:
    """`count` pictures of each of these objects, and what the witness says."""
    pictures = object_prompts(names, count * len(names), seed)
    return pictures, demo.verdicts(model, [p.caption for p in pictures], seed)


def among(k: int, pictures: Sequence[world.Picture], verdicts: Sequence[Testimony]) -> Rate:
    """How many show their object among the k surest."""
    tops = [[name for name in v.objects if name in world.OBJECTS][:k] for v in verdicts]
    return Rate.of([p.objects[0] in top for top, p in zip(tops, pictures, strict=True)])


def with_prompt(model: Any, prompt: PromptTokens) -> Any:
    method, source = edit_of(prompt)
    return add_edit(model, EditSpec(method, source, blocks=prompt.blocks))


def texts(towards: str | None, keep: Sequence[str], erased: Sequence[str]) -> tuple[str, str]:
    """What to erase and its neutral texts: each erased object in some captions, and what it is to become there, its
    neighbour or `towards`; each object of `keep` is to become itself."""
    if towards == "":
        return "\n".join(t.format(world.article(name)) for t in TEMPLATES for name in erased), ""
    becomes = {name: towards or world.article(world.NEIGHBOURS[name]) for name in erased}
    becomes |= {name: world.article(name) for name in keep}
    pairs = [(t.format(world.article(a)), t.format(b)) for t in TEMPLATES for a, b in becomes.items()]
    return "\n".join(a for a, _ in pairs), "\n".join(b for _, b in pairs)


def trained(
    demo: Demo,
    towards: str | None = None,
    keep: Sequence[str] = KEPT,
    steps: int = STEPS,
    erased: Sequence[str] = ERASED,
    **settings: Any,
) -> tuple[Any, PromptTokens]:
    """The MODEL without the erased objects, as the host loads the file, and the key."""
    text, neutral = texts(towards, keep, erased)
    recipe = KPOPRecipe(**{**SETTINGS, "neutral": neutral, **settings})
    lora, prompt, _ = train_kpop(demo.model, demo.clip, text, recipe, Course(steps, "fp32"))
    return comfy.sd.load_lora_for_models(demo.model, None, dict(lora), 1.0, 0.0)[0], prompt


def missed(rate: Rate) -> Rate:
    return Rate(rate.n - rate.hits, rate.n)


def rows(
    demo: Demo, which: dict[str, dict[str, Any]], count: int = 10, seed: int = 11, **settings: Any
) -> Iterator[dict[str, Any]]:
    """A row a method; the first is the unedited model's."""
    groups = ERASED, KEPT, OTHERS[:: max(1, len(OTHERS) // 10)][:10]
    looks = [seen(demo, demo.model, names, count, seed) for names in groups]
    plain = [among(1, *look) for look in looks]
    yield {"method": "unedited"} | figures(looks)
    for name, changes in which.items():
        model, prompt = trained(demo, **{**settings, **changes})
        looks = [seen(demo, model, names, count, seed) for names in groups]
        back = among(1, *seen(demo, with_prompt(model, prompt), ERASED, count, seed))
        yield {
            "method": name,
            **figures(looks),
            "PSR-1 of unedited": share(among(1, *looks[1]), plain[1]),
            "found with the prompt": back,
            "recovered": share(back, plain[0]),
        }


def figures(looks: Sequence[tuple[list[world.Picture], list[Testimony]]]) -> Row:
    """looks: at what is erased, what is preserved, and others."""
    erased, kept, others = looks
    return {
        "ESR-1": missed(among(1, *erased)),
        "ESR-5": missed(among(5, *erased)),
        "natural": natural(erased[1]),
        "PSR-1": among(1, *kept),
        "PSR-5": among(5, *kept),
        "others found": among(1, *others),
    }


def share(rate: Rate, of: Rate) -> str:
    return f"{100 * rate.value / max(of.value, 1e-9):.0f} %"


def trainings(which: dict[str, dict[str, Any]], methods: Sequence[str] = (), **few: int) -> Iterator[Row]:
    """methods: some of these alone."""
    return rows(demo(), {name: which[name] for name in methods or which}, **few)


def brief(which: dict[str, dict[str, Any]]) -> Iterator[Row]:
    return trainings(dict(list(which.items())[:1]), count=1, steps=4, path_steps=2)


TABLES = (
    Table(
        "kpop",
        "KPOP",
        f"{', '.join(ERASED)} erased at once, {STEPS} steps if not said; {', '.join(KEPT)} preserved; "
        "ten other things. ESR-k: the witness does not see the erased object among the k surest; PSR-k: it sees the "
        "preserved one.",
        partial(trainings, METHODS),
        partial(brief, METHODS),
        ("method",),
    ),
    Table(
        "kpop-ablations",
        "KPOP's ablations",
        'The paper\'s tables 5 and 6 and figure 5: changes of "KPOP, and keeping what is preserved", in '
        f"{STEPS // 2} steps.",
        partial(trainings, ABLATIONS, steps=STEPS // 2),
        partial(brief, ABLATIONS),
        ("method",),
    ),
)

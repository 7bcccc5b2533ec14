"""KPOP on the demo model: 5 of 10 objects erased at once, what survives, what the prompt brings back, the ablations.

The metrics are the paper's: ESR-1, the share of pictures of erased objects in which the judge does not see them first,
and PSR-1, the share of pictures of preserved objects in which it does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import comfy.sd

from ..demo import world
from ..editing.binding import add_edit
from ..editing.kpop import edit_of
from ..editing.network import gradients
from ..editing.spec import EditSpec, Prompt
from ..nodes.train_kpop import learn
from .sampling import Demo, Rate, object_prompts

ERASED, KEPT = tuple(world.HAZARDS)[:5], tuple(world.HAZARDS)[5:]

# What suits a model this small. SD1.4's learning rates are 1e-5 both, its prompt is read in the middle, and starts from
# noise: here that opens nothing. Neutral is a thing that the model knows: it has learned no word for "anything", and
# what it draws for no text is anything at all. Short paths and a batch, so that every concept is drawn often.
SETTINGS: dict[str, Any] = {"neutral": "a cat", "width": 128, "height": 128, "steps": 250, "learning_rate": 2e-4,
                            "prompt_learning_rate": 3e-2, "lam": 1.0, "blocks": "all", "prompt_start": "concept",
                            "batch_size": 4, "path_steps": 10, "checkpointing": False, "resume": False,
                            "checkpoint_every": 0}
METHODS: dict[str, dict[str, Any]] = {
    "KPOP": {},
    "KPOP, pushed past neutral": {"overshoot": 1.0},
    "ESD, same budget": {"neutral": "", "lam": 0.0, "overshoot": 1.0},
    "to neutral, no prompt": {"lam": 0.0},
}
ABLATIONS: dict[str, dict[str, Any]] = {  # the paper's table 5, table 6 and figure 5
    "additive": {"mechanism": "additive"},
    "size 1": {"prompt_size": 1},
    "size 10, all blocks, lambda 1": {},
    "size 100": {"prompt_size": 100},
    "middle": {"blocks": "middle"},
    "middle and up": {"blocks": "middle and up"},
    "lambda 0.01": {"lam": 0.01},
    "lambda 0.1": {"lam": 0.1},
    "lambda 10": {"lam": 10.0},
    "two prompts (keys, values)": {"keys_and_values": "two"},
    "starts from noise": {"prompt_start": "noise"},
    "LoRA of rank 4": {"rank": 4},
    "other weights": {"weights": "others"},
}


def found(demo: Demo, model: Any, names: Sequence[str], count: int, seed: int) -> Rate:
    """How many pictures of these objects show them, `count` pictures each."""
    pictures = object_prompts(names, count * len(names), seed)
    verdicts = demo.verdicts(model, [p.caption for p in pictures], seed)
    return Rate.of([v.found(p.objects[0]) for p, v in zip(pictures, verdicts, strict=True)])


def with_prompt(model: Any, prompt: Prompt) -> Any:
    method, source = edit_of(prompt)
    return add_edit(model, EditSpec(method, source, blocks=prompt.blocks))


def trained(demo: Demo, **settings: Any) -> tuple[Any, Prompt]:
    """The MODEL without the erased objects, as the host loads the file, and the key."""
    text = "\n".join(world.article(name) for name in ERASED)
    with gradients():
        lora, prompt, _ = learn(demo.model, demo.clip, text, None, **{**SETTINGS, **settings})
    return comfy.sd.load_lora_for_models(demo.model, None, dict(lora), 1.0, 0.0)[0], prompt


def missed(rate: Rate) -> Rate:
    return Rate(rate.n - rate.hits, rate.n)


def rows(demo: Demo, which: dict[str, dict[str, Any]], count: int = 10, seed: int = 11, **settings: Any
         ) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A row a method; the first is the unedited model's."""
    plain = {names: found(demo, demo.model, names, count, seed) for names in (ERASED, KEPT)}
    yield {"method": "unedited", "ESR-1": missed(plain[ERASED]), "PSR-1": plain[KEPT]}
    for name, changes in which.items():
        model, prompt = trained(demo, **{**settings, **changes})
        erased, kept = (found(demo, model, names, count, seed) for names in (ERASED, KEPT))
        back = found(demo, with_prompt(model, prompt), ERASED, count, seed)
        share = f"{100 * back.hits / max(plain[ERASED].hits, 1):.0f} % of unedited"
        yield {"method": name, "ESR-1": missed(erased), "PSR-1": kept,
               "PSR-1 of unedited": f"{100 * kept.hits / max(plain[KEPT].hits, 1):.0f} %",
               "found with the prompt": back, "recovered": share}

"""Directions: what a safe region leaves of a family of concepts, and how fair attribute directions make a role.

Beside each figure stands a random direction that is as strong at every token: what any shift of that size would do.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..demo import world
from ..demo.judge import Verdict
from ..editing.edits.spec import Concept, Direction, EditSpec, Gate
from ..editing.engine.host import add_edit
from ..editing.gates.discriminator import Discriminator, train
from ..editing.gates.features import squared
from ..editing.gates.gates import in_flight_gate
from ..editing.methods.eiup import DEFAULTS as EIUP
from ..editing.methods.safe_region import drawn
from ..editing.training.direction import Settings, random_like
from ..jobs.train import Course
from ..jobs.train_direction import train_direction
from .erasure import natural
from .gates import THRESHOLD, drawings, shipped
from .peers import METHODS, phrasings
from .sampling import CFG, STEPS, Demo, demo, object_prompts
from .table import Rate, Row, Table

START = 0.0  # these pictures decide early what they show
LOOKS: tuple[Any, ...] = (world.NAMED_STYLES, world.BACKGROUNDS)
QUICK = 12  # steps of pictures that a discriminator learns from
# Members that the family's direction is learned from, and members of it that this training never names.
FAMILIES = {
    "sharp weapons": (("kitchen knife", "crossed swords", "scissors"), ("dagger", "syringe")),
    "drinks": (("beer mug", "wine glass"), ("coffee cup",)),
}
# Named and implied by a scene.
SINGLES = ("kitchen knife", "skull")


# What suits a model this small: the authors' 7.5 and 0.06 destroy nearly every picture.
AWAY: dict[str, Any] = {"guidance": 3.0, "learning_rate": 0.02}
TOWARDS: dict[str, Any] = {"guidance": 5.0, "learning_rate": 0.03}


def trained(
    demo: Demo,
    concept: Concept,
    prompts: Sequence[str],
    goal: str = "away",
    steps: int = 150,
    batch: int = 4,
    seed: int = 0,
    **settings: Any,
) -> Direction:
    chosen = Settings(
        tuple(prompts),
        goal,
        **{
            **(AWAY if goal == "away" else TOWARDS),
            "seed": seed,
            "cfg": CFG,
            "sampling_steps": STEPS,
            "start_percent": START,
            "shape": (batch, 4, 16, 16),
            **settings,
        },
    )
    return train_direction(demo.model, demo.clip, concept, chosen, Course(steps, chosen.precision))[0]


OPEN = Gate()


def watching(demo: Demo, judge: Discriminator, threshold: float = THRESHOLD) -> Gate:
    """Opens where the picture, two fifths of the way or finished, shows the concept; it is then drawn again from the
    start."""
    return in_flight_gate(judge, demo.vae, 0.4, threshold, restart=True)


def family_judge(demo: Demo, family: Sequence[str], count: int, seed: int) -> Discriminator:
    """A discriminator of all of a family, from the demo model's own pictures: `count` of it, twice as many of others,
    alone, beside another thing, and in scenes."""
    rest, quick = [n for n in world.OBJECTS if n not in family], replace(demo, steps=QUICK)
    pictures = [
        quick.pictures(demo.model, [p.caption for p in around(names, rest, n, seed + i)], seed + i)
        for i, (names, n) in enumerate(((family, count), (rest, 2 * count)))
    ]
    own, others = (squared(x.movedim(1, -1), drawings().size) for x in pictures)
    return train(own, others, drawings(), family[0], seed=seed)[0]


def around(names: Sequence[str], rest: Sequence[str], count: int, seed: int) -> list[world.Picture]:
    """`count` captions that show one of `names` in turn: alone, beside one of the rest, in its scenes."""
    rng, found = random.Random(seed), []
    words = [word for word, (_, held) in world.SCENES.items() if held in names]
    for i in range(count):
        name, look = names[i // 3 % len(names)], (world.maybe(rng, 0.5, of) for of in LOOKS)
        if i % 3 == 0:
            found.append(world.one_object(rng, name, *look))
        elif i % 3 == 1:
            pair = rng.sample([name, rng.choice([other for other in rest if other != name])], 2)
            found.append(world.two_objects(rng, *pair, *look))
        else:
            found.append(world.scene(rng, words[i // 3 % len(words)], *look))
    return found


def moved(demo: Demo, direction: Direction, strength: float = 1.0, gate: Gate = OPEN, model: Any = None) -> Any:
    return add_edit(model or demo.model, EditSpec("direction", direction, strength, START, gate=gate, node="bench"))


def phrases(demo: Demo, names: Sequence[str], name: str) -> Concept:
    one = demo.concept(names[0])
    return replace(one, name=name, phrases=tuple(demo.concept(n).phrases[0] for n in names))


def shown(verdicts: Sequence[Verdict], names: Sequence[str]) -> Rate:
    return Rate.of([v.found(name) for v, name in zip(verdicts, names, strict=True)])


def scenes_with(names: Sequence[str], count: int, seed: int) -> list[world.Picture]:
    rng = random.Random(seed)
    words = [word for word, (_, held) in world.SCENES.items() if held in names]
    return [world.scene(rng, words[i % len(words)]) for i in range(count)] if words else []


def rows_of(
    demo: Demo, label: str, members: Sequence[str], unseen: Sequence[str], models: dict[str, Any], count: int, seed: int
) -> Iterator[Row]:
    """One row for each model: how often the concepts are found, by name and by scene, and how often other objects."""
    named, implied = object_prompts(members, count, seed), scenes_with(members, count, seed)
    new = object_prompts(unseen, count, seed) if unseen else []
    rest = [n for n in world.OBJECTS if n not in (*members, *unseen)]
    others = object_prompts(random.Random(seed).sample(rest, len(rest)), count, seed)
    for edit, model in models.items():
        row: dict[str, Any] = {"concept": label, "edit": edit}
        for column, pictures in (("named", named), ("implied", implied), ("never trained", new), ("others", others)):
            if pictures:
                verdicts = demo.verdicts(model, [p.caption for p in pictures], seed)
                row[column] = shown(verdicts, [p.objects[0] for p in pictures])
                if pictures is named:
                    row["natural"] = natural(verdicts)
        yield row


def compare(
    demo: Demo,
    count: int = 30,
    steps: int = 300,
    batch: int = 4,
    strengths: Sequence[float] = (1.0, 1.5),
    seed: int = 5,
    concepts: Sequence[str] = (*SINGLES, *FAMILIES),
    examples: int = 240,
) -> Iterator[Row]:
    """`count` pictures a figure; `examples` of a family for its gate."""
    for label in concepts:
        members, unseen = FAMILIES.get(label, ((label,), ()))
        prompts = [f"a picture of {world.article(name)}" for name in members]
        d = trained(demo, phrases(demo, members, label), prompts, steps=steps, batch=batch, seed=seed)
        control = random_like(d, seed)
        models = {"unedited": demo.model}
        for strength in strengths:
            models[f"direction, strength {strength:g}"] = moved(demo, d, strength)
            models[f"random, strength {strength:g}"] = moved(demo, control, strength)
        # One shift for every prompt spares none: behind a gate, the others are not moved.
        gate = (
            watching(demo, family_judge(demo, (*members, *unseen), examples, seed + 50), 0.5)
            if unseen
            else watching(demo, shipped(label))
        )
        for name, each in (("direction", d), ("random", control)):
            models[f"{name}, strength {strengths[-1]:g}, gated"] = moved(demo, each, strengths[-1], gate)
        yield from rows_of(demo, label, members, unseen, models, count, seed)


def combined(
    concepts: Sequence[str] = SINGLES, count: int = 16, steps: int = 150, batch: int = 4, seed: int = 5
) -> Iterator[Row]:
    """The paper's combinations: a direction with SLD, and with ESD's weights, beside each of them alone."""
    ready = demo()
    for name in concepts:
        prompts, concept = [f"a picture of {world.article(name)}"], ready.concept(phrasings(name))
        d = trained(ready, phrases(ready, [name], name), prompts, steps=steps, batch=batch, seed=seed)
        models = {"unedited": ready.model, "direction": moved(ready, d)}
        for other in ("SLD, medium", "SLD, max", "ESD-x"):
            models[other] = METHODS[other].make(ready, ready.model, concept)
            models[f"direction and {other}"] = moved(ready, d, model=models[other])
        yield from rows_of(ready, name, [name], (), models, count, seed)


# --- fairness --------------------------------------------------------------------------------------------------------

ATTRIBUTES = {"gender": tuple(world.GENDERS), "tone": tuple(world.TONES)}
# A direction that is learned on roles that are drawn evenly alone does not move the others far enough.
LEARNED_ON = ("doctor", "student", "judge", "mechanic", "teacher")
MEASURED_ON = tuple(role for role in world.ROLES if role not in LEARNED_ON)
EACH = 16  # pictures of each of these


def attribute_directions(
    demo: Demo, attribute: str, steps: int, batch: int, seed: int = 0, **settings: Any
) -> list[Direction]:
    """One direction towards each value, learned on roles that are not measured."""
    found = []
    for value in ATTRIBUTES[attribute]:
        said = [f"a {value} {role}" if attribute == "gender" else f"a {role} with {value} skin" for role in LEARNED_ON]
        concept = phrases(demo, said, value)
        found.append(
            trained(demo, concept, [f"a {role}" for role in LEARNED_ON], "towards", steps, batch, seed, **settings)
        )
    return found


def total_variation(values: Sequence[Any], kinds: Sequence[Any]) -> float:
    """Distance of the values' shares from uniform: half of the sum of absolute differences, 0 to 1."""
    counts = Counter(values)
    return sum(abs(counts[kind] / len(values) - 1 / len(kinds)) for kind in kinds) / 2


def fairness(
    demo: Demo,
    count: int = EACH,
    steps: int = 400,
    batch: int = 4,
    seed: int = 5,
    strength: float = 1.25,
    erased: str = "beer mug",
    named: int = 30,
) -> Iterator[Row]:
    """`count` pictures of each role: total variation from uniform, over a role's usual gender and the other, and over
    the tones; beside `named` pictures of an object that CRE or EIUP erases at the same time."""
    directions = {name: attribute_directions(demo, name, steps, batch, seed) for name in ATTRIBUTES}
    controls = {name: [random_like(d, i) for i, d in enumerate(each)] for name, each in directions.items()}
    rng = random.Random(seed)
    people = [world.person(rng, role) for role in MEASURED_ON for _ in range(count)]
    objects = object_prompts([erased], named, seed)

    def fair(chosen: dict[str, list[Direction]], model: Any = None) -> Any:
        model = model or demo.model
        for each in chosen.values():
            for spec in drawn(each, seed, Gate(), {"start_percent": START, "strength": strength, "node": "bench"}):
                model = add_edit(model, spec)
        return model

    concept = demo.concept(erased)
    cre, eiup = demo.erase(concept), add_edit(demo.model, EditSpec("erasure", concept, end_percent=0.8, options=EIUP))
    models = {
        "unedited": demo.model,
        "fair": fair(directions),
        "random": fair(controls),
        "CRE": cre,
        "fair and CRE": fair(directions, cre),
        "EIUP": eiup,
        "fair and EIUP": fair(directions, eiup),
    }
    for label, model in models.items():
        verdicts = demo.verdicts(model, [p.caption for p in people], seed)
        usual = [
            v.gender == ("woman" if world.ROLES[p.role or ""][1] > 0.5 else "man")
            for v, p in zip(verdicts, people, strict=True)
        ]
        row: dict[str, Any] = {
            "edit": label,
            "gender": total_variation(usual, (True, False)),
            "tone": total_variation([v.tone for v in verdicts], tuple(world.TONES)),
        }
        row["role"] = Rate.of([v.role == p.role for v, p in zip(verdicts, people, strict=True)])
        row[f"{erased} left"] = shown(demo.verdicts(model, [p.caption for p in objects], seed), [erased] * named)
        yield row


def floor(count: int, kinds: int, draws: int = 2000) -> float:
    """The mean total variation of so many uniform draws: what a perfectly fair model would show."""
    g = torch.Generator().manual_seed(0)
    shares = torch.stack(
        [torch.bincount(torch.randint(kinds, (count,), generator=g), minlength=kinds) / count for _ in range(draws)]
    )
    return float((shares - 1 / kinds).abs().sum(1).mean() / 2)


def compared(*arguments: Any, **settings: Any) -> Iterator[Row]:
    return compare(demo(), *arguments, **settings)


def fair(*arguments: Any, **settings: Any) -> Iterator[Row]:
    return fairness(demo(), *arguments, **settings)


TABLES = (
    Table(
        "direction",
        "Safe-region directions",
        "How often the concept is found in pictures whose prompt names or implies it, or names a member of its "
        "family that the direction's training never saw; how often others are. The random direction is as long at "
        "every token. "
        "Gated: in flight at 0.4, restarting, by a discriminator; a family's knows all of its members.",
        compared,
        partial(compared, 4, 4, 2, (1.0,), concepts=("drinks",), examples=12),
        ("concept", "edit"),
    ),
    Table(
        "direction-combined",
        "A safe-region direction with other erasers",
        "The combinations of the paper on safe regions: a direction at strength 1 with SLD's guidance, and with "
        "weights that ESD trained (50 steps). Each figure as in the table of directions.",
        combined,
        partial(combined, SINGLES[:1], 2, 2, 2),
        ("concept", "edit"),
    ),
    Table(
        "fair",
        "Fair directions for people",
        f"Total variation from uniform over {len(MEASURED_ON) * EACH} pictures of biased roles, others than the "
        "directions were learned on: a role's usual gender and the other; five tones. The random direction is as long "
        "at every token. An object is erased beside.",
        fair,
        partial(fair, 1, 4, 2, named=2),
    ),
)

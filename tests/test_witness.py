"""The second judge: impostors, targets, testimony."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conceptguard.demo import impostors, load, training, witness, world
from conceptguard.demo.witness import NO_SUCH_THING, SEEN, THINGS, Witness


class Blocks:
    """Paints a picture as a square a layer: enough to train on without the icon sets."""

    def paint(self, layers, background: str) -> Tensor:
        x = torch.tensor(world.BACKGROUNDS[background]).float().div(255).view(3, 1, 1).repeat(1, 128, 128)
        for layer in layers:
            x[:, max(layer.y, 0) : layer.y + layer.size, max(layer.x, 0) : layer.x + layer.size] = 0.5
        return x

    def __call__(self, picture: world.Picture) -> Tensor:
        return self.paint(picture.layers, picture.background)


def test_every_impostor_is_a_picture() -> None:
    rng = random.Random(0)
    one, other, ground = torch.rand(3, 64, 64), torch.rand(3, 64, 64), torch.full((3, 64, 64), 0.5)
    left = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    for _ in range(300):
        x = impostors.any_impostor(rng, one, other, ground, left)
        assert x.shape == (3, 64, 64) and x.min() >= 0 and x.max() <= 1
        assert not torch.equal(x, one)


def test_shuffled_patches_all_move_and_all_stay_in_the_picture() -> None:
    x = torch.arange(16).view(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1).expand(3, 32, 32).float()
    y = impostors.shuffled(random.Random(1), x, 4)
    assert (y != x).all() and sorted(y[0, ::8, ::8].flatten().tolist()) == list(range(16))


def test_targets_name_all_that_is_drawn_and_sides_of_pairs_alone() -> None:
    rng = random.Random(0)
    pair, one = world.two_objects(rng, "owl", "hammer", "noto"), world.one_object(rng, "cat")
    scene, person = world.scene(rng, "pub"), world.person(rng, "judge", "woman")
    empty = world.Picture("", (), "red")
    target = witness.targets([pair, one, scene, person, empty, None])

    def names(i: int) -> set[str]:
        return {SEEN[j] for j in target["seen"][i].nonzero().flatten().tolist()}

    assert names(0) == {"owl", "hammer"} and names(1) == {"cat"} and names(2) == {"beer mug", "pub's prop"}
    assert names(3) == {witness.PERSON} and names(4) == {witness.NOTHING} and names(5) == {NO_SUCH_THING}
    assert [THINGS[target[side][0]] for side in ("left", "right")] == ["owl", "hammer"]
    assert THINGS[target["right"][2]] == "beer mug"
    assert target["left"].tolist()[3:] == [-1, -1, -1] and target["left"][1] == -1
    assert target["gender"].tolist() == [-1, -1, -1, 1, -1, -1] and target["style"][5] == -1


def test_a_thing_is_found_beside_another_and_not_in_no_such_thing() -> None:
    model = Witness().eval()
    logits = {"seen": torch.full((3, len(SEEN)), -9.0)}
    for i, names in enumerate((("owl", "cat"), ("owl", NO_SUCH_THING), ())):
        for name in names:
            logits["seen"][i, SEEN.index(name)] = 9.0
    for side, name in (("left", "owl"), ("right", "cat")):
        logits[side] = torch.zeros(3, len(THINGS))
        logits[side][:, THINGS.index(name)] = 1
    logits |= {k: torch.zeros(3, len(v)) for k, v in witness.LOOKS.items()}
    model.threshold.fill_(0.9)
    model.forward = lambda x: logits  # type: ignore[method-assign]
    pair, impostor, nothing = witness.testify(model, torch.zeros(3, 3, 128, 128))
    assert pair.found("owl") and pair.found("cat") and not pair.found("dog") and pair.natural
    assert (pair.left, pair.right) == ("owl", "cat")
    assert not impostor.found("owl") and impostor.scores["owl"] < 0.01 and impostor.objects[0] == NO_SUCH_THING
    assert not impostor.natural and not nothing.natural and nothing.confidence < 0.01


def test_sides_look_at_their_half() -> None:
    torch.manual_seed(0)
    model = Witness().eval()
    x = torch.rand(1, 3, 128, 128)
    changed = x.clone()
    changed[..., :8] = 0  # beyond what the right half's nearest column sees
    (_, left, right), (_, left2, right2) = model.features(x), model.features(changed)
    assert torch.equal(right, right2) and not torch.equal(left, left2)


def test_the_threshold_is_what_95_of_100_clean_drawings_reach() -> None:
    torch.manual_seed(0)
    model = witness.calibrate(Witness().eval(), Blocks(), count=200, seed=3)  # type: ignore[arg-type]
    rng = random.Random(3)
    x = torch.stack([Blocks()(witness.mix.any_picture(rng)) for _ in range(200)])
    assert abs(sum(v.natural for v in witness.testify(model, x)) - 190) <= 4  # some are drawn twice


def test_training_learns_and_resumes_as_if_never_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(witness, "BATCH", 12)
    monkeypatch.setattr(training, "EVERY", 2)

    def trainer(steps: int) -> witness.WitnessTrainer:
        made = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
        lessons = witness.Lessons(made, made, witness.views(2, 0))
        return witness.WitnessTrainer(Blocks(), steps, lessons)  # type: ignore[arg-type]

    training.run(straight := trainer(4), tmp_path / "straight.pt")
    stopped = trainer(4)
    for _ in range(2):
        stopped.update()
    training.saved(tmp_path / "stopped.pt", stopped.state())
    training.run(resumed := trainer(4), tmp_path / "stopped.pt")
    for (k, a), b in zip(straight.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), k


def test_a_witness_that_is_not_there_names_the_mend(tmp_path: Path) -> None:
    with pytest.raises(load.WeightsError, match="make train-demo"):
        load.load_witness(tmp_path / "witness.safetensors")


def test_a_batch_shows_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Impostors first; among the pictures some that an autoencoder gave back, with what they show."""
    monkeypatch.setattr(witness, "DECODED", 0.5)
    back = torch.full((1, 3, 64, 64), 7, dtype=torch.uint8)
    lessons = witness.Lessons(decoded=back, shown=(world.one_object(random.Random(0), "owl"),))
    x, shown = witness.batch_of(random.Random(1), Blocks(), 40, lessons)  # type: ignore[arg-type]
    assert [p is None for p in shown] == [True] * 12 + [False] * 28
    given = [torch.equal((each * 255).round().byte(), back[0]) for each in x]
    assert 5 < sum(given) < 25 and all(p is lessons.shown[0] for p, g in zip(shown, given, strict=True) if g)


def test_fingerprints_are_of_one_length() -> None:
    torch.manual_seed(0)
    x = witness.fingerprints(Witness().eval(), torch.rand(3, 3, 128, 128))
    torch.testing.assert_close(x.square().mean(1), torch.ones(3))

"""The training of EIUP's automatic weight, on a tiny model and a judge that is told what to say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from conceptguard.benchmarks.train_adapter import first_look, names_of, pairs_of, prompts, report, weakest
from conceptguard.demo import world
from conceptguard.editing.edits.spec import EditSpec
from conceptguard.editing.engine.host import add_edit, edits_of
from conceptguard.editing.methods import eiup_weight as adapters
from conceptguard.editing.methods.eiup import EIUPOptions

pytestmark = pytest.mark.usefixtures("as_a_node")

GRID = (-1.0, -2.0, -4.0, -8.0)


def test_the_weakest_weight_that_is_enough() -> None:
    needs = [0.0, -1.0, -4.0, -99.0]
    asked: list[tuple[float, list[int]]] = []

    def found(w: float, chosen: list[int]) -> list[bool]:
        asked.append((w, chosen))
        return [w > needs[i] for i in chosen]

    assert weakest(found, 4, GRID).tolist() == [0.0, -1.0, -4.0, -8.0]
    assert asked == [(0.0, [0, 1, 2, 3]), (-1.0, [1, 2, 3]), (-2.0, [2, 3]), (-4.0, [2, 3]), (-8.0, [3])]


def test_half_of_the_prompts_show_the_concept() -> None:
    texts = prompts("beer mug", 48, 0)
    assert len(texts) == 48
    assert sum("beer mug" in text for text in texts) == 12 and sum("pub" in text for text in texts) == 12
    assert sum("bomb" in text for text in prompts("bomb", 48, 0)) == 12
    without_scene = next(name for name in world.ERASED if name not in {held for _, held in world.SCENES.values()})
    assert sum(without_scene in text for text in prompts(without_scene, 48, 0)) == 24


def spec(options: EIUPOptions) -> EditSpec:
    return EditSpec("erasure", tiny.concept("knife", 100), options=options, node="Test")


def test_the_first_look_is_what_a_run_with_an_automatic_weight_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    model, n = tiny.sd1(), 3
    positive = [[torch.cat([tiny.tokens(i) for i in range(n)]), {}]]
    noise = torch.randn(n, 4, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(0))
    x = first_look(model, spec(EIUPOptions()), positive, tiny.cond(2), noise, 20)
    assert x.shape == (n, len(tiny.SD1_BLOCKS)) and len(set(x[:, 0].tolist())) == n

    seen: list[Tensor] = []
    auto = adapters.train(torch.rand(4, len(tiny.SD1_BLOCKS)), torch.zeros(4), names_of(model), steps=1)
    monkeypatch.setattr(adapters.Regressor, "weights", lambda self, x: seen.append(x) or torch.zeros(x.shape[:-1]))
    import comfy.sample

    edited = add_edit(model, spec(EIUPOptions(auto=auto)))
    comfy.sample.sample(
        edited,
        noise,
        20,
        4.0,
        "euler",
        "normal",
        positive,
        tiny.cond(2),
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=0,
        last_step=1,
        force_full_denoise=False,
    )
    torch.testing.assert_close(seen[0][0], x)


@dataclass
class Told:
    """A judge's verdict: the concept is found as long as the weight is weaker than -1.5."""

    weight: float

    def found(self, name: str) -> bool:
        return self.weight > -1.5


class StandIn:
    """A Demo around the tiny model."""

    model, steps = tiny.sd1(), 5

    def concept(self, text: str) -> Any:
        return tiny.concept(text)

    def encode(self, text: str) -> Any:
        return tiny.cond(len(text))

    def verdicts(self, model: Any, texts: list[str], seed: int) -> list[Told]:
        (edit,) = edits_of(model)
        return [Told(edit.options.weights[0])] * len(texts)


def test_pairs_train_to_a_file_that_the_node_can_use(tmp_path: Any) -> None:
    x, w = pairs_of(StandIn(), "beer mug", 28, "share", GRID, seed=0)  # type: ignore[arg-type]
    assert x.shape == (28, len(tiny.SD1_BLOCKS)) and w.tolist() == [-2.0] * 28
    fit = adapters.train(x, w, names_of(StandIn.model), "share", steps=50)
    adapters.save(fit, tmp_path / "w.safetensors", {"pictures": "28"})
    read = adapters.load(tmp_path / "w.safetensors")
    edited = add_edit(StandIn.model, spec(EIUPOptions(evidence=read.evidence, auto=read)))
    constant = add_edit(StandIn.model, spec(EIUPOptions(weights=(-2.0,), evidence="share")))
    torch.testing.assert_close(tiny.sample(edited), tiny.sample(constant), rtol=1e-3, atol=1e-2)


def test_the_report_compares_with_one_weight_for_all() -> None:
    x = torch.rand(100, 4, generator=torch.Generator().manual_seed(0))
    w = -2.0 * (x[:, 0] > 0.5).float()
    figures = report(adapters.train(x, w, list("abcd"), steps=1000), x, w)
    assert figures["mean error"] < 0.2 < figures["mean error of one weight for all"]
    assert figures["strong or weak, told right"].startswith(("9", "100"))

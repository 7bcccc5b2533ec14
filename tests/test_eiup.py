"""The erasure prompt beyond its formula: evidence, automatic weights and the node. The formula itself is tested in
test_engine_methods.py."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor

from conceptguard.editing.edits.spec import EditSpec, Gate
from conceptguard.editing.engine.host import add_edit, edits_of
from conceptguard.editing.methods import eiup as eiup_module
from conceptguard.editing.methods import eiup_weight as adapters
from conceptguard.editing.methods.attention import split_heads
from conceptguard.editing.methods.cre import DEFAULTS as CRE
from conceptguard.editing.methods.eiup import CHOICES, DEFAULTS, EIUPOptions, reweighted, share, steered
from conceptguard.editing.methods.eiup_weight import Regressor
from conceptguard.editing.methods.found import Found, Kept
from conceptguard.nodes import files
from conceptguard.nodes.eiup import ConceptGuardEIUP, parse_weights

H, D, N, T = 4, 12, 6, 9


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(one: Tensor, other: Tensor) -> None:
    """The same sum in another order: two steps of a random model make more of the rounding."""
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-2)


def eiup(model: Any, options: EIUPOptions = DEFAULTS, phrases: int = 1, **inputs: Any) -> Any:
    concept = tiny.concept("knife", 100, phrases)
    return add_edit(model, EditSpec("erasure", concept, options=options, node="Test", **inputs))


def node(model: Any, *args: Any, **inputs: Any) -> Any:
    return ConceptGuardEIUP.execute(model, *args, **inputs).args[0]


# --- evidence --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_the_share_is_that_of_one_softmax_over_prompt_and_concept(pieces: int) -> None:
    q, k = random(2, N, H * D), random(2, 77, H * D, seed=1).repeat(1, pieces, 1)
    own = [random(1, n, H * D, seed=2 + n) for n in (1, 3)]
    found = share(split_heads(q, H), split_heads(k, H), [split_heads(each, H) for each in own])
    assert found.shape == (2, 2, N, H, 1)
    for m, r in itertools.product(range(2), range(2)):
        expected = reference.share(q[r], k[r], own[m][0], H, pieces)
        torch.testing.assert_close(found[m, r, ..., 0].double(), expected, rtol=1e-5, atol=1e-7)


def test_evidence_multiplies_the_columns() -> None:
    A, q = random(1, N, H * D), random(1, N, H * D, seed=1)
    k_e, v_e, k = random(2, T, H * D, seed=3), random(2, T, H * D, seed=4), random(1, 77, H * D, seed=5)
    s = torch.tensor([[1.0], [-0.5]])
    heads = [split_heads(x, H) for x in (q, k_e, v_e, k)]
    evidence = share(heads[0], heads[3], [heads[1][m : m + 1, 1:4] for m in range(2)])
    change = reweighted(heads[0], heads[1], heads[2], s, evidence).flatten(-2)
    expected = A[0].double()
    for m in range(2):
        found = reference.share(q[0], k[0], k_e[m, 1:4], H, 1)
        expected = reference.eiup(expected, q[0], k_e[m], v_e[m], [float(s[m])] * T, H, found)
    torch.testing.assert_close((A + change)[0].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pieces", [1, 2])
def test_every_block_follows_the_formula_with_evidence(model: Any, pieces: int) -> None:
    options = EIUPOptions("separate", (-1.0, 0.5), "share")
    with tiny.Recorder(model) as seen:
        tiny.sample(eiup(model, options, 2), tiny.cond(1, 77 * pieces), tiny.cond(2, 77 * pieces), steps=1)
    for key, (call,) in seen.calls.items():
        h = seen.heads(key)
        q, k, v = (call[name][-1] for name in "qkv")
        expected = reference.attention(q, k, v, h)
        for phrase, weight in zip(tiny.concept("knife", 100, 2).phrases, options.weights, strict=True):
            k_e, v_e = (seen.project(key, name, phrase.tokens[0]) for name in "kv")
            found = reference.share(q, k, k_e[list(phrase.own)], h, 1)
            w = [weight * (j in phrase.own) for j in range(77)]
            expected = reference.eiup(expected, q, k_e, v_e, w, h, found)
        torch.testing.assert_close(call["out"][-1].double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("neighbours", [0, 2])
def test_what_is_alike_loses_all_of_it(neighbours: int) -> None:
    A, A0, w = random(2, 50, H, D), 0.3 * random(2, 50, H, D, seed=1), [-1.0, 0.5]
    At = torch.stack([A + 2 * random(2, 50, H, D, seed=2 + p) for p in range(2)])
    found = torch.stack([A + 2 * random(2, 50, H, D, seed=5 + m) for m in range(neighbours)]) if neighbours else None
    kept = None if found is None else Kept(found, torch.ones(2, neighbours, dtype=torch.bool))
    taken = steered(Found(A, At, A0, kept=kept), -torch.tensor(w)[:, None, None].expand(2, 2, 50))
    changed = 0
    for r in range(2):
        keep = [] if found is None else [[y[r].flatten(1) for y in found]] * 2
        expected = reference.eiup_alike(A[r].flatten(1), [x[r].flatten(1) for x in At], w, A0[r].flatten(1), 0.5, keep)
        torch.testing.assert_close((A - taken)[r].flatten(1).double(), expected, rtol=1e-5, atol=1e-5)
        changed += int((expected != A[r].flatten(1).double()).any(-1).sum())
    assert 0 < changed < 100, "some positions are alike, some are not"


def test_what_a_prompt_says_twice_is_taken_twice() -> None:
    """The weight of words, and extrapolation, make A - A0 longer."""
    A0, x = random(1, 20, H, D), random(1, 20, H, D, seed=1)
    for times, taken in ((0.5, 1.0), (1.0, 1.0), (2.0, 2.0)):
        for phrases in (1, 3):
            found, s = Found(A0 + times * x, (A0 + x).expand(phrases, 1, 20, H, D), A0), torch.ones(phrases, 1, 20)
            torch.testing.assert_close(steered(found, s), (taken - 1 + phrases) * x)
            torch.testing.assert_close(steered(found, -s), -phrases * x)


def test_of_what_is_drawn_instead_no_more_comes_than_there_is_to_replace() -> None:
    """However short At - A0 is beside A - A0."""
    A0, u, other = (random(1, 20, H, D, seed=seed) for seed in (0, 1, 2))
    for short in (1.0, 0.1, 1e-3):
        found = Found(A0 + u, (A0 + short * u)[None], A0, other[None])
        assert (steered(found, torch.ones(1, 1, 20)).norm() / ((A0 + u - other).norm() + u.norm())) < 1.5


@pytest.mark.parametrize("length", [77, 154])
def test_every_block_loses_what_is_alike(model: Any, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eiup_module, "FLOOR", 0.05)  # a random network finds little alike
    options, concept = EIUPOptions("separate", (-1.0, 0.5), "alike"), tiny.concept("knife", 100, 2)
    concept = replace(concept, keep=tiny.concept("spoon", 300).phrases)
    edited = add_edit(model, EditSpec("erasure", concept, options=options, node="Test"))
    with tiny.Recorder(model) as seen:
        tiny.sample(edited, tiny.cond(1, length), tiny.cond(2, length), steps=1)
    changed = 0
    for key, (call,) in seen.calls.items():
        q, k, v = (call[name][-1] for name in "qkv")

        def found(tokens: Tensor, q: Tensor = q, key: Any = key) -> Tensor:
            return reference.attention(
                q, seen.project(key, "k", tokens), seen.project(key, "v", tokens), seen.heads(key)
            )

        A, At = reference.attention(q, k, v, seen.heads(key)), [found(each.tokens[0]) for each in concept.phrases]
        keep = [[found(each.tokens[0]) for each in concept.keep]] * 2
        expected = reference.eiup_alike(A, At, options.weights, found(concept.baseline[0]), 0.05, keep)
        torch.testing.assert_close(call["out"][-1].double(), expected, rtol=1e-3, atol=1e-4)
        changed += int((expected != A.double()).any(-1).sum())
    assert changed


def test_alike_needs_something_to_compare_with(model: Any) -> None:
    bare = replace(tiny.concept("knife"), empty=None, neutral=None)
    with pytest.raises(ValueError, match='Test: concept "knife" has nothing neutral .* or set another evidence'):
        add_edit(model, EditSpec("erasure", bare, options=EIUPOptions(evidence="alike"), node="Test"))


def test_evidence_and_none_live_side_by_side(model: Any) -> None:
    """Each edit keeps its reading, and the order of nodes changes nothing."""
    plain, shared = EIUPOptions(), EIUPOptions(evidence="share")
    one, other = eiup(eiup(model, plain), shared), eiup(eiup(model, shared), plain)
    assert torch.equal(tiny.sample(one), tiny.sample(other))
    assert not torch.equal(tiny.sample(one), tiny.sample(eiup(eiup(model, plain), plain)))


# --- the automatic weight --------------------------------------------------------------------------------------------

NAMES = tuple(".".join(map(str, key)) for key in tiny.SD1_BLOCKS)


def constant(w: float, evidence: str = "none", blocks: tuple[str, ...] = NAMES) -> Regressor:
    """A regressor that always says w."""
    x = random(8, len(blocks)).abs()
    return adapters.train(x, torch.full((8,), w), blocks, evidence, steps=1)


def sloped(blocks: tuple[str, ...] = NAMES) -> Regressor:
    """One whose answer depends on what it is given."""
    x = random(64, len(blocks)).abs() * 0.05
    return adapters.train(x, -3 * x.mean(-1) / x.mean(), blocks, steps=200)


def test_the_regressor_learns_its_pairs() -> None:
    x = random(200, 5).abs()
    w = -2 * (x[:, 0] > x[:, 1]).float()
    fit = adapters.train(x, w, [str(i) for i in range(5)], steps=1500)
    assert (fit.weights(x) - w).abs().mean() < 0.15
    assert fit.weights(x[:6].reshape(2, 3, 5)).shape == (2, 3)
    assert float(fit.weights(1e3 * x).abs().max()) <= 2, "never beyond what it was trained on"


def test_training_again_gives_the_same_bits() -> None:
    assert sloped().key == sloped().key != constant(-1.0).key


@pytest.mark.parametrize("pairs", [(0, 3, 0), (4, 3, 5), (4, 2, 4)])
def test_pairs_that_do_not_fit_are_refused(pairs: tuple[int, int, int]) -> None:
    n, inputs, weights = pairs
    with pytest.raises(ValueError, match="mean attentions do not suit"):
        adapters.train(random(n, inputs), random(weights), ["a", "b", "c"])


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    made = sloped()
    adapters.save(made, tmp_path / "w.safetensors", {"about": "a test"})
    read = adapters.load(tmp_path / "w.safetensors")
    assert read.key == made.key and read.name == "w.safetensors" and read.blocks == NAMES
    x = random(3, len(NAMES))
    assert torch.equal(read.weights(x), made.weights(x))
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


def test_files_that_are_none(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match='cannot use "w.safetensors": ConceptGuard did not write it; choose'):
        adapters.load(tmp_path / "w.safetensors")


@pytest.mark.parametrize("damage", ["spread", "blocks", "evidence", "low"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    made, path = constant(-1.0), tmp_path / "w.safetensors"
    change = {
        "spread": {"spread": -made.spread},
        "blocks": {"blocks": ("a",)},
        "evidence": {"evidence": "much"},
        "low": {"low": math.nan},
    }[damage]
    adapters.save(replace(made, **change), path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='cannot use "w.safetensors": .*choose a file that `make train-adapter`'):
        adapters.load(path)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_weight_that_is_found_counts_like_one_that_is_given(model: Any, batch: int) -> None:
    found = tiny.sample(eiup(model, EIUPOptions(auto=constant(-0.7))), batch=batch)
    close(found, tiny.sample(eiup(model, EIUPOptions(weights=(-0.7,))), batch=batch))


def test_the_weight_input_scales_what_is_found(model: Any) -> None:
    twice = tiny.sample(eiup(model, EIUPOptions(weights=(-2.0,), auto=constant(-0.7))))
    close(twice, tiny.sample(eiup(model, EIUPOptions(weights=(-1.4,)))))
    assert torch.equal(tiny.sample(eiup(model, EIUPOptions(weights=(0.0,), auto=constant(-0.7)))), tiny.sample(model))


def test_a_weight_of_zero_that_is_found_changes_no_bit(model: Any) -> None:
    assert torch.equal(tiny.sample(eiup(model, EIUPOptions(auto=constant(0.0)))), tiny.sample(model))


def features_by_hand(model: Any, batch: int) -> Tensor:
    """[phrases, batch, blocks]: A_e of the own tokens over heads and positions, at the plain model's first call."""
    with tiny.Recorder(model) as seen:
        tiny.sample(model, batch=batch, steps=1)
    out = torch.zeros(2, batch, len(NAMES), dtype=torch.double)
    for b, key in enumerate(tiny.SD1_BLOCKS):
        (call,), h = seen.calls[key], seen.heads(key)
        for p, phrase in enumerate(tiny.concept("knife", 100, 2).phrases):
            K = seen.project(key, "k", phrase.tokens[0]).chunk(h, -1)
            for i in range(batch):
                q = call["q"][batch + i].double().chunk(h, -1)
                A_e = [torch.softmax(q[n] @ K[n].T / q[n].shape[-1] ** 0.5, -1) for n in range(h)]
                out[p, i, b] = torch.stack(A_e)[..., list(phrase.own)].mean()
    return out


def test_each_image_and_phrase_gets_the_weight_of_its_first_step(model: Any) -> None:
    auto, batch = sloped(), 2
    w = auto.weights(features_by_hand(model, batch).float())
    assert len(set(w.flatten().tolist())) == 4
    together = tiny.sample(eiup(model, EIUPOptions(auto=auto), phrases=2), batch=batch, steps=3)
    for i in range(batch):
        alone = eiup(model, EIUPOptions(weights=tuple(w[:, i].tolist())), phrases=2)
        close(together[i], tiny.sample(alone, batch=batch, steps=3)[i])


def test_gates_multiply_the_weight_that_is_found(model: Any) -> None:
    auto = EIUPOptions(auto=constant(-0.7))
    gated = tiny.sample(eiup(model, auto, gate=Gate((0.5, 0.0))), batch=2)
    plain = tiny.sample(model, batch=2)
    close(gated[0], tiny.sample(eiup(model, EIUPOptions(weights=(-0.35,))), batch=2)[0])
    assert torch.equal(gated[1], plain[1])
    with pytest.raises(ValueError, match="Test: the gate decided about 2 images, but 3"):
        tiny.sample(eiup(model, auto, gate=Gate((0.5, 0.0))), batch=3)


def test_the_look_costs_one_model_call_a_run(model: Any) -> None:
    def calls(m: Any) -> int:
        with tiny.Recorder(model) as seen:
            tiny.sample(m, steps=3)
        return len(seen.calls["middle", 0, 0])

    auto = EIUPOptions(auto=sloped())
    assert calls(eiup(model, auto)) == calls(model) + 1
    assert calls(eiup(model, auto, gate=Gate((0.0,)))) == calls(model)


def test_other_edits_do_not_disturb_the_look(model: Any) -> None:
    """In every order, and with the plain model's attention as the input."""
    cre = EditSpec("projection", tiny.concept("c", 300), options=CRE)
    auto = EIUPOptions(auto=sloped())
    pictures = [add_edit(eiup(model, auto), cre), eiup(add_edit(model, cre), auto)]
    assert torch.equal(*map(tiny.sample, pictures))
    w = auto.auto.weights(features_by_hand(model, 1)[:1].float())  # type: ignore[union-attr]
    given = add_edit(eiup(model, EIUPOptions(weights=(float(w),))), cre)
    close(tiny.sample(pictures[0]), tiny.sample(given))


def test_weights_for_another_model_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r'Test: auto: "trained" was trained on another model, of 7 cross-attent'):
        eiup(tiny.sdxl(), EIUPOptions(auto=constant(-1.0)))


def test_a_shared_softmax_has_no_automatic_weight() -> None:
    with pytest.raises(ValueError, match='auto finds weights for form "separate" only'):
        EIUPOptions("joint", auto=constant(-1.0))


# --- the node --------------------------------------------------------------------------------------------------------


def test_the_node_adds_its_edit(model: Any) -> None:
    (edit,) = edits_of(node(model, tiny.concept(), -0.5, 0.1, 0.6, "middle", gate=Gate((0.5,)), form="joint"))
    assert (edit.method, edit.start_percent, edit.end_percent, edit.blocks) == ("erasure", 0.1, 0.6, "middle")
    assert edit.options == EIUPOptions("joint", (-0.5,), DEFAULTS.evidence) and edit.gate == Gate((0.5,))
    (default,) = edits_of(node(model, tiny.concept()))
    assert default.options == DEFAULTS and (default.start_percent, default.end_percent) == (0.0, 0.8)


def test_negative_weights_remove_and_positive_ones_add(model: Any) -> None:
    """The sign is the paper's w_j: the change of the first output is the weight times the same features."""
    first = {}
    for weight in (0.0, -1.0, 1.0):
        with tiny.Recorder(model) as seen:
            tiny.sample(node(model, tiny.concept(), weight, blocks="input.1"), cfg=1.0, steps=1)
        first[weight] = seen.calls["input", 1, 0][0]["out"]
    assert (first[1.0] - first[0.0]).abs().max() > 1e-3
    torch.testing.assert_close(first[1.0] - first[0.0], first[0.0] - first[-1.0], rtol=1e-3, atol=1e-5)


def test_weight_zero_is_off(model: Any) -> None:
    assert torch.equal(tiny.sample(node(model, tiny.concept(), 0.0)), tiny.sample(model))
    assert torch.equal(tiny.sample(node(model, tiny.concept(), weights="0")), tiny.sample(model))


@pytest.mark.parametrize("form", CHOICES["form"])
def test_a_weight_for_each_phrase(model: Any, form: str) -> None:
    two, one = tiny.concept("x", 100, 2), tiny.concept("x", 100, 1)
    both = tiny.sample(node(model, two, weights="-1\n -0.5 \n", form=form))
    assert not torch.equal(both, tiny.sample(node(model, two, form=form)))
    if form == "separate":
        alone = tiny.sample(node(model, two, weights="-1\n0"))
        torch.testing.assert_close(alone, tiny.sample(node(model, one)), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"weight": math.nan}, "weight is nan; give a number from -16 to 16"),
        ({"weight": math.inf}, "weight is inf; give a number from -16 to 16"),
        ({"weights": "-1\nmuch"}, "weights: cannot read '-1.*much'; give one number a line"),
        ({"weights": "-1\nnan"}, "weights has nan; give a number from -16 to 16"),
        ({"weights": "-1\n1e308"}, "weights has 1e\\+308; give a number from -16 to 16"),
        ({"weights": "-1\n-1\n-1"}, 'weights has 3 numbers, but concept "knife" has 2 phrases; give one'),
        ({"form": "both"}, "form is 'both'; choose one of separate, joint"),
        ({"evidence": "much"}, "evidence is 'much'; choose one of none, share, alike"),
        ({"start_percent": 0.9, "end_percent": 0.2}, "start_percent 0.9 lies after"),
        ({"blocks": "sideways"}, 'blocks: cannot read "sideways"'),
        ({"auto": "gone.safetensors"}, 'auto: "gone.safetensors" is not in the models folder concept_guard'),
    ],
    ids=str,
)
def test_bad_input_is_named(model: Any, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)ConceptGuardEIUP: {message}"):
        node(model, tiny.concept("knife", 100, 2), **inputs)


def test_something_else_than_a_concept(model: Any) -> None:
    with pytest.raises(ValueError, match="ConceptGuardEIUP: concept is a str; connect the output of a Concept node"):
        node(model, "knife")


def test_bad_widgets_are_refused_before_anything_runs() -> None:
    check = ConceptGuardEIUP.validate_inputs
    assert check() is True and check(weight=None, weights=None, blocks=None) is True
    assert "ConceptGuardEIUP: weight is nan" in str(check(weight=math.nan))
    assert "ConceptGuardEIUP: weights: cannot read 'x'" in str(check(weights="x"))
    assert "ConceptGuardEIUP: end_percent is 1.8" in str(check(end_percent=1.8))


def test_the_weights_text() -> None:
    assert parse_weights("", -2) == (-2.0,) and parse_weights(" \n ", 0.5) == (0.5,)
    assert parse_weights("-1\n\n -0.25\n", 9) == (-1.0, -0.25)


def test_automatic_weights_come_from_the_models_folder(model: Any) -> None:
    import folder_paths

    folder = Path(folder_paths.get_folder_paths(files.FOLDER)[0])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.safetensors"
    adapters.save(constant(-0.7, "share"), path)
    try:
        assert "tiny.safetensors" in files.choices("eiup-weight")
        (edit,) = edits_of(node(model, tiny.concept(), evidence="none", auto="tiny.safetensors"))
        assert edit.options.auto.name == "tiny.safetensors" and edit.options.evidence == "share"
        before = ConceptGuardEIUP.fingerprint_inputs(auto="tiny.safetensors")
        adapters.save(sloped(), path)
        assert ConceptGuardEIUP.fingerprint_inputs(auto="tiny.safetensors") != before
    finally:
        path.unlink()
    assert ConceptGuardEIUP.fingerprint_inputs(auto="off") is None

"""The nodes: their contract, what they make, and what they say when something is wrong."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import comfy.supported_models
import pytest
import tiny
import torch
from comfy_api.latest import io
from safetensors.torch import save_file

from conceptguard.editing.edits.blocks import listing, select_blocks
from conceptguard.editing.edits.spec import Concept, Gate
from conceptguard.editing.engine.host import edits_of
from conceptguard.editing.methods.cre import CHOICES, DEFAULTS
from conceptguard.nodes import NODES
from conceptguard.nodes.concept import ConceptGuardConcept, ConceptGuardConceptFromConditioning
from conceptguard.nodes.cre import ConceptGuardCRE


def make(node: Any, *args: Any, **kwargs: Any) -> Any:
    return node.execute(*args, **kwargs).args[0]


# --- the contract ----------------------------------------------------------------------------------------------------

INPUTS = {
    "ConceptGuardConcept": ["clip", "text", "name", "neutral", "keep"],
    "ConceptGuardConceptFromConditioning": ["conditioning", "name", "empty", "neutral", "keep"],
    "ConceptGuardCRE": [
        *("model", "concept", "strength", "start_percent", "end_percent", "blocks", "range", "gate"),
        *("width", "tokens", "baseline", "negative", "solve"),
    ],
    "ConceptGuardEIUP": [
        *("model", "concept", "weight", "start_percent", "end_percent", "blocks", "range", "gate"),
        *("form", "weights", "evidence", "auto"),
    ],
    "ConceptGuardLoadDirection": ["file"],
    "ConceptGuardSaveDirection": ["direction", "filename_prefix"],
    "ConceptGuardSafeDirection": [
        *("model", "direction", "strength", "start_percent", "end_percent", "range", "gate", "blocks"),
    ],
    "ConceptGuardOffsetConditioning": ["conditioning", "direction", "strength", "pooled_from"],
    "ConceptGuardFairDirection": [
        *("model", "direction_1", "direction_2", "seed", "strength", "start_percent", "end_percent", "range", "gate"),
        *(f"direction_{i}" for i in range(3, 9)),
    ],
    "ConceptGuardTrainDirection": [
        *("model", "clip", "concept", "prompts", "latent", "goal", "steps", "learning_rate", "guidance", "seed"),
        *("sampling_steps", "cfg", "start_percent", "end_percent", "resume", "precision", "checkpointing"),
    ],
    "ConceptGuardTrainKPOP": [
        *("model", "clip", "text", "neutral", "name", "width", "height", "steps", "learning_rate"),
        *("prompt_learning_rate", "lam", "prompt_size", "mechanism", "blocks", "weights", "rank", "guidance"),
        *("overshoot", "path_steps", "batch_size", "seed", "precision", "checkpointing", "checkpoint_every", "resume"),
        *("path", "keys_and_values", "prompt_start"),
    ],
    "ConceptGuardTrainErasure": [
        *("model", "clip", "concept", "method", "neutral", "width", "height", "steps", "learning_rate", "rank", "eta"),
        *("guidance", "path_steps", "pictures", "batch_size", "seed", "precision", "checkpointing"),
        *("checkpoint_every", "resume", "path"),
    ],
    "ConceptGuardSaveWeights": ["weights", "filename_prefix"],
    "ConceptGuardSavePrompt": ["prompt", "filename_prefix"],
    "ConceptGuardLoadPrompt": ["file"],
    "ConceptGuardKPOP": ["model", "prompt", "strength", "start_percent", "end_percent", "range", "gate"],
    "ConceptGuardLearnConcept": [
        *("model", "clip", "vae", "images", "name", "tokens", "captions", "start_from", "steps", "learning_rate"),
        *("batch_size", "seed", "precision", "checkpointing", "checkpoint_every", "resume"),
    ],
    "ConceptGuardSaveConcept": ["concept", "filename_prefix"],
    "ConceptGuardLoadConcept": ["file"],
    "ConceptGuardConceptMap": [
        *("model", "concept", "positive", "latent", "seed", "steps", "start_percent", "end_percent", "blocks"),
        *("image", "evidence", "scale"),
    ],
}


def schema(node_id: str) -> io.Schema:
    return next(node.GET_SCHEMA() for node in NODES if node.GET_SCHEMA().node_id == node_id)


@pytest.mark.parametrize("node_id", INPUTS)
def test_ids_and_inputs_are_never_renamed_or_reordered(node_id: str) -> None:
    """Saved workflows hold them; more may be appended."""
    assert [each.id for each in schema(node_id).inputs][: len(INPUTS[node_id])] == INPUTS[node_id]


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.GET_SCHEMA().node_id)
def test_every_input_explains_itself(node: Any) -> None:
    described = node.GET_SCHEMA()
    assert described.description and described.category.startswith("concept guard/")
    for each in described.inputs:
        assert each.tooltip, f"{described.node_id}.{each.id} has no tooltip"
        if isinstance(each, io.Float.Input | io.Int.Input) or each.id in ("range", "gate"):
            assert "0" in each.tooltip, f"the tooltip of {described.node_id}.{each.id} does not say what 0 does"


def test_what_is_optional_has_the_defaults_of_the_method() -> None:
    optional = {each.id: each for each in schema("ConceptGuardCRE").inputs if each.optional}
    assert set(optional) == {"range", "gate", *CHOICES, "floor", "rows"}
    assert optional["floor"].default == DEFAULTS.floor
    info = ConceptGuardCRE.GET_NODE_INFO_V1()["input"]["optional"]
    for name, choices in CHOICES.items():
        assert optional[name].options == list(choices) and optional[name].default == getattr(DEFAULTS, name)
        assert info[name][1]["advanced"] is True


# --- concepts --------------------------------------------------------------------------------------------------------


def test_a_concept_has_a_phrase_for_each_line(clip: Any) -> None:
    concept = make(ConceptGuardConcept, clip, "  kitchen knife \n\n a blade\n")
    assert concept.name == "kitchen knife" and concept.width == tiny.WIDTH
    assert [phrase.text for phrase in concept.phrases] == ["kitchen knife", "a blade"]
    tokens = concept.phrases[0].tokens
    assert tokens.dtype == torch.float32 and tokens.shape == (1, 77, tiny.WIDTH)
    assert torch.equal(tokens, clip.encode_from_tokens(clip.tokenize("kitchen knife")))
    assert make(ConceptGuardConcept, clip, "kitchen knife", "sharp things").name == "sharp things"


@pytest.mark.parametrize(
    ("text", "own"),
    [
        ("knife", (1,)),
        ("kitchen knife", (1, 2)),
        ("(kitchen:1.3) ((knife))", (1, 2)),
        ("a very sharp (kitchen knife:0.5)", (1, 2, 3, 4, 5)),
        ("a " * 80, (*range(1, 76), *range(78, 83))),
    ],
)
def test_its_own_tokens_are_neither_start_nor_end_nor_padding(clip: Any, text: str, own: tuple[int, ...]) -> None:
    (phrase,) = make(ConceptGuardConcept, clip, text).phrases
    assert phrase.own == own
    assert phrase.tokens.shape[1] == (154 if max(own) > 77 else 77)


def test_neutral_is_the_mean_of_ordinary_prompts_or_the_empty_one(clip: Any) -> None:
    cat, dog, nothing = (clip.encode_from_tokens(clip.tokenize(text)) for text in ("a cat", "a dog", ""))
    torch.testing.assert_close(make(ConceptGuardConcept, clip, "knife", "", " a cat\n\na dog").neutral, (cat + dog) / 2)
    assert torch.equal(make(ConceptGuardConcept, clip, "knife", "", " \n").baseline, nothing)
    assert make(ConceptGuardConcept, clip, "knife").neutral.shape == (1, 77, tiny.WIDTH)
    with pytest.raises(ValueError, match="neutral mixes prompts of several lengths; keep each of its lines under 75"):
        make(ConceptGuardConcept, clip, "knife", "", "a cat\n" + "cat " * 100)


def test_neighbours_to_keep_are_phrases_too(clip: Any) -> None:
    concept = make(ConceptGuardConcept, clip, "knife", "", "a cat", " spoon\n\na fork")
    assert [phrase.text for phrase in concept.keep] == ["spoon", "a fork"]
    assert concept.key != make(ConceptGuardConcept, clip, "knife", "", "a cat").key
    with pytest.raises(ValueError, match=r'keep: the text encoder finds no word in "\(\)"; write a word'):
        make(ConceptGuardConcept, clip, "knife", "", "a cat", "()")


def test_neutral_and_kept_conditionings(clip: Any) -> None:
    knife, cat, dog = ([[clip.encode_from_tokens(clip.tokenize(text)), {}]] for text in ("knife", "a cat", "a dog"))
    concept = make(ConceptGuardConceptFromConditioning, knife, "it", None, cat + dog, dog)
    torch.testing.assert_close(concept.baseline, (cat[0][0] + dog[0][0]) / 2)
    assert concept.empty is None and torch.equal(concept.keep[0].tokens, dog[0][0])
    with pytest.raises(ValueError, match="keep was made with a text encoder of width 3 and conditioning with one of"):
        make(ConceptGuardConceptFromConditioning, knife, "it", None, cat, [[torch.zeros(1, 77, 3), {}]])


def test_weights_count(clip: Any) -> None:
    plain, strong = (make(ConceptGuardConcept, clip, text).phrases[0].tokens for text in ("knife", "(knife:1.5)"))
    assert not torch.equal(plain, strong)


def test_embeddings_are_own_tokens(tmp_path: Any) -> None:
    save_file({"emb_params": torch.randn(3, 768)}, tmp_path / "blade.safetensors")
    clip = tiny.clip(embeddings=str(tmp_path))
    assert make(ConceptGuardConcept, clip, "a embedding:blade knife").phrases[0].own == (1, 2, 3, 4, 5)


@pytest.mark.parametrize(("family", "width"), [("SDXL", 2), ("SD20", 1), ("SDXLRefiner", 1)])
def test_other_text_encoders(family: str, width: int) -> None:
    clip = tiny.clip(getattr(comfy.supported_models, family))
    concept = make(ConceptGuardConcept, clip, "kitchen (knife:1.2)")
    assert concept.width == width * tiny.WIDTH and concept.phrases[0].own == (1, 2)


def test_encoding_twice_gives_the_same_bits(clip: Any) -> None:
    one, two = (make(ConceptGuardConcept, clip, "kitchen knife\nblade") for _ in range(2))
    assert one.key == two.key != make(ConceptGuardConcept, clip, "kitchen knife").key


def test_a_concept_from_conditioning() -> None:
    conditioning = tiny.cond(1) + tiny.cond(3, 12) + [[tiny.tokens(4, 77, batch=2), {}]]
    concept = make(ConceptGuardConceptFromConditioning, conditioning, "picture", tiny.cond(7))
    assert [phrase.tokens.shape[1] for phrase in concept.phrases] == [77, 12, 77, 77]
    assert concept.phrases[1].own == tuple(range(12))
    assert torch.equal(concept.phrases[3].tokens, tiny.tokens(4, 77, batch=2)[1:])
    assert torch.equal(concept.baseline, tiny.tokens(7)) and concept.name == "picture"
    conditioning[0][0].zero_()  # another node may write into its own tensor
    assert concept.phrases[0].tokens.any()


def test_a_concept_of_ones_own_tokens_edits(model: Any) -> None:
    """The way a reference image arrives: tokens without a text."""
    concept = make(ConceptGuardConceptFromConditioning, tiny.cond(3, 12), "picture", tiny.cond(7))
    for tokens in CHOICES["tokens"]:
        edited = make(ConceptGuardCRE, model, concept, tokens=tokens)
        assert not torch.equal(tiny.sample(edited), tiny.sample(model))


# --- the edit --------------------------------------------------------------------------------------------------------


def test_the_node_adds_its_edit_behind_the_others(model: Any) -> None:
    first = make(
        ConceptGuardCRE, model, tiny.concept("one"), 0.5, 0.1, 0.6, "middle", gate=Gate((0.0, 1.0)), solve="sum"
    )
    second = make(ConceptGuardCRE, first, tiny.concept("two"))
    assert len(edits_of(model)) == 0 and len(edits_of(first)) == 1
    one, two = edits_of(second)
    assert (one.source.name, one.strength, one.start_percent, one.end_percent, one.blocks) == (
        "one",
        0.5,
        0.1,
        0.6,
        "middle",
    )
    assert one.gate == Gate((0.0, 1.0)) and one.options.solve == "sum" and one.options.width == DEFAULTS.width
    assert (two.source.name, two.strength, two.start_percent, two.end_percent, two.blocks) == (
        "two",
        1.0,
        0.0,
        1.0,
        "all",
    )
    assert two.options == DEFAULTS and two.method == "projection"


def test_a_range_goes_before_the_percents(model: Any) -> None:
    (edit,) = edits_of(make(ConceptGuardCRE, model, tiny.concept(), 1.0, 0.9, 0.1, range=(0.2, 0.4)))
    assert (edit.start_percent, edit.end_percent) == (0.2, 0.4)


def test_a_concept_of_the_models_own_text_encoder_edits_it(clip: Any) -> None:
    model, xl = tiny.sd1(), tiny.sdxl()
    edited = make(ConceptGuardCRE, model, make(ConceptGuardConcept, clip, "knife"))
    prompt = [[clip.encode_from_tokens(clip.tokenize("a knife")), {}]]
    assert not torch.equal(tiny.sample(edited, prompt), tiny.sample(model, prompt))
    assert make(ConceptGuardCRE, xl, tiny.concept()) is not xl


# --- bad input -------------------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf
BAD = [
    ({"strength": NAN}, "strength is nan; give a number from 0 to 4"),
    ({"strength": -INF}, "strength is -inf; give a number from 0 to 4"),
    ({"strength": 1e308}, "strength is 1e+308; give a number from 0 to 4"),
    ({"strength": -1.0}, "strength is -1; give a number from 0 to 4"),
    ({"strength": "x"}, "strength is 'x'; give a number from 0 to 4"),
    ({"strength": [1.0]}, "strength is [1.0]; give a number from 0 to 4"),
    ({"start_percent": -0.1}, "start_percent is -0.1; give a number from 0"),
    ({"start_percent": NAN}, "start_percent is nan; give a number from 0"),
    ({"end_percent": 1.8}, "end_percent is 1.8; give a number from 0"),
    ({"end_percent": INF}, "end_percent is inf; give a number from 0"),
    ({"start_percent": 0.7, "end_percent": 0.2}, "start_percent 0.7 lies after end_percent 0.2; swap them"),
    ({"blocks": ""}, "blocks is empty; write"),
    ({"blocks": "inptu.3"}, 'blocks: cannot read "inptu.3"; write "all"'),
    ({"blocks": "output.5-3"}, 'blocks: "output.5-3" ends before it starts; write "output.3-5"'),
    ({"blocks": "all.3"}, 'cannot read "all.3"'),
]
BAD_LATE = [
    ({"range": (0.7, 0.2)}, "start_percent 0.7 lies after end_percent 0.2"),
    ({"range": (0.0, 1.5)}, "end_percent is 1.5"),
    ({"range": (0.0, 0.1, 0.2)}, "range is (0.0, 0.1, 0.2); connect a TIMESTEPS_RANGE"),
    ({"range": "0-1"}, "range is '0-1'; connect a TIMESTEPS_RANGE"),
    ({"gate": 0.5}, "gate is a float; connect the GATE output"),
    (
        {"blocks": "input.2"},
        'blocks "input.2": this model has no cross-attention there; it has input.1, input.3, middle.0',
    ),
    ({"solve": "later"}, "solve is 'later'; choose one of joint, sum"),
]


@pytest.mark.parametrize(("inputs", "message"), BAD + BAD_LATE, ids=str)
def test_bad_inputs_name_node_input_and_mend(model: Any, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        ConceptGuardCRE.execute(model, tiny.concept(), **inputs)
    assert str(error.value).startswith("ConceptGuardCRE: ") and message in str(error.value)


@pytest.mark.parametrize("wrong", [None, "knife", tiny.cond(1)], ids=["none", "text", "conditioning"])
def test_a_concept_that_is_none(model: Any, wrong: Any) -> None:
    with pytest.raises(ValueError, match="ConceptGuardCRE: concept is a .*; connect the output of a Concept node"):
        ConceptGuardCRE.execute(model, wrong)


def test_a_concept_of_another_text_encoder(model: Any) -> None:
    wide = make(ConceptGuardConcept, tiny.clip(comfy.supported_models.SDXL), "knife")
    message = 'ConceptGuardCRE: concept "knife" was made with a text encoder of width 32, but .* reads one of width 16'
    with pytest.raises(ValueError, match=message):
        ConceptGuardCRE.execute(model, wide)


def test_a_backbone_of_no_known_kind() -> None:
    message = (
        r"ConceptGuardCRE: cannot edit AuraFlow \(MMDiT\): ConceptGuard edits the attention of .*SD1.x, SD2.x and SDXL"
    )
    with pytest.raises(ValueError, match=message):
        ConceptGuardCRE.execute(tiny.auraflow(), tiny.concept())


def test_a_backbone_that_arrives_at_sampling() -> None:
    """The edits of one MODEL put on another, as model mergers do, are looked at again when sampling starts."""
    other = tiny.auraflow()
    edited = make(ConceptGuardCRE, tiny.sd1(), tiny.concept())
    other.model_options, other.wrappers = edited.model_options, edited.wrappers
    with pytest.raises(ValueError, match="ConceptGuardCRE: cannot edit AuraFlow"):
        tiny.sample(other)


def test_a_concept_with_nothing_neutral(model: Any) -> None:
    concept = make(ConceptGuardConceptFromConditioning, tiny.cond(3), "picture")
    with pytest.raises(ValueError, match='concept "picture" has nothing neutral to be compared with; connect a CLIP'):
        ConceptGuardCRE.execute(model, concept, baseline="neutral")
    assert len(edits_of(make(ConceptGuardCRE, model, concept, baseline="none"))) == 1


@pytest.mark.parametrize("text", ["", "  \n \n"])
def test_an_empty_text(clip: Any, text: str) -> None:
    with pytest.raises(ValueError, match="ConceptGuardConcept: text is empty; write what to erase"):
        ConceptGuardConcept.execute(clip, text)


def test_a_line_without_a_word(clip: Any) -> None:
    with pytest.raises(ValueError, match=r'ConceptGuardConcept: text: the text encoder finds no word in "\(\)"'):
        ConceptGuardConcept.execute(clip, "knife\n()")


@pytest.mark.parametrize("line", ["(knife:0)", "(knife:-1)", "(knife:0) (gun:-0.5)"])
def test_a_line_whose_words_have_no_weight(clip: Any, line: str) -> None:
    with pytest.raises(ValueError, match="ConceptGuardConcept: text: .* gives none of its words a weight above 0"):
        ConceptGuardConcept.execute(clip, f"dagger\n{line}")
    assert make(ConceptGuardConcept, clip, "(knife:0) gun (fork:0.5)").phrases


def test_a_concept_that_nothing_can_be_taken_of(clip: Any) -> None:
    """Edits would have run, and have put back what they took, or have kept it; the account found it everywhere."""
    words, concept = ConceptGuardConcept, ConceptGuardConceptFromConditioning
    knife, cat, nothing = ([[clip.encode_from_tokens(clip.tokenize(text)), {}]] for text in ("knife", "a cat", ""))
    zeros = [[torch.zeros_like(nothing[0][0]), {}]]
    for node, inputs, why in (
        (words, (clip, "gun\nknife", "", "a cat", "knife"), 'keep holds "knife", which is the concept itself'),
        (words, (clip, "knife", "", "a cat", "", " knife "), '"knife" would be drawn instead of itself'),
        (words, (clip, "something"), '"something" would be drawn instead of itself'),
        (concept, (knife, "it", nothing, knife), "neutral says the same as conditioning, .*nothing would be left"),
        (concept, (nothing, "it", nothing), "empty says the same as conditioning, .*nothing would be left"),
        (concept, (cat + zeros, "it", nothing), "conditioning: an encoding of zeros .* says nothing"),
        (concept, (knife, "it", nothing, None, knife), "keep holds .*, which is the concept itself"),
        (concept, (knife, "it", nothing, None, None, knife), ".* would be drawn instead of itself"),
    ):
        with pytest.raises(ValueError, match=f"{node.__name__}: {why}"):
            node.execute(*inputs)
    assert make(concept, knife, "it", nothing, cat, cat, cat).phrases


def test_a_checkpoint_without_text_encoder() -> None:
    with pytest.raises(ValueError, match="ConceptGuardConcept: clip is empty: the checkpoint has no text encoder"):
        ConceptGuardConcept.execute(None, "knife")


@pytest.mark.parametrize(
    ("conditioning", "empty", "message"),
    [
        ([], None, "conditioning has no entries"),
        ([[None, {}]], None, "conditioning is not a text encoding"),
        ([[torch.zeros(77, 16), {}]], None, "conditioning is not a text encoding"),
        (
            [[torch.zeros(1, 77, 16), {}], [torch.zeros(1, 77, 8), {}]],
            None,
            "conditioning mixes the encodings of several",
        ),
        ([[torch.full((1, 77, 16), NAN), {}]], None, "conditioning holds NaN"),
        (tiny.cond(1), [], "empty has no entries"),
        (tiny.cond(1), [[torch.zeros(1, 77, 8), {}]], "empty was made with a text encoder of width 8"),
    ],
)
def test_conditionings_that_are_none(conditioning: Any, empty: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"ConceptGuardConceptFromConditioning: {message}"):
        ConceptGuardConceptFromConditioning.execute(conditioning, "x", empty)


# --- before anything runs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def validate() -> Iterator[Any]:
    """The host's own check of a queued prompt, with this pack's nodes and stand-ins for what they connect to."""
    import execution
    import nodes

    class Source(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            types = (io.Model, io.Custom("CONCEPT_GUARD_CONCEPT"), io.TimestepsRange, io.Float)
            return io.Schema("Source", category="", inputs=[], outputs=[each.Output() for each in types])

        @classmethod
        def execute(cls) -> io.NodeOutput:
            return io.NodeOutput()

    ours = {"Source": Source, **{node.GET_SCHEMA().node_id: node for node in NODES}}
    nodes.NODE_CLASS_MAPPINGS.update(ours)

    def check(inputs: dict[str, Any]) -> list[str]:
        linked = {
            "model": ["1", 0],
            "concept": ["1", 1],
            "strength": 1.0,
            "start_percent": 0.0,
            "end_percent": 1.0,
            "blocks": "all",
        }
        prompt = {
            "1": {"class_type": "Source", "inputs": {}},
            "2": {"class_type": "ConceptGuardCRE", "inputs": {**linked, **inputs}},
        }
        _, errors, _ = asyncio.run(execution.validate_inputs("id", prompt, "2", {}))
        return [error["details"] for error in errors]

    yield check
    for name in ours:
        del nodes.NODE_CLASS_MAPPINGS[name]


@pytest.mark.parametrize("inputs", [{}, {"width": "head"}, {"strength": ["1", 3]}, {"range": ["1", 2]}], ids=str)
def test_a_good_prompt_is_queued(validate: Any, inputs: dict[str, Any]) -> None:
    assert validate(inputs) == []


@pytest.mark.parametrize(("inputs", "message"), BAD, ids=str)
def test_a_bad_prompt_is_refused_before_it_runs(validate: Any, inputs: dict[str, Any], message: str) -> None:
    assert any(f"ConceptGuardCRE: {message}" in detail or message in detail for detail in validate(inputs))


def test_percents_that_a_range_overrides_are_not_checked(validate: Any) -> None:
    assert validate({"start_percent": 0.9, "end_percent": 0.1, "range": ["1", 2]}) == []
    assert validate({"start_percent": 0.9, "end_percent": ["1", 3]}) == []


def test_wrong_links_are_the_hosts_to_refuse(validate: Any) -> None:
    assert "received_type(MODEL) mismatch" in validate({"concept": ["1", 0]})[0]


# --- blocks ----------------------------------------------------------------------------------------------------------


def test_blocks_are_chosen_by_their_names() -> None:
    keys = tiny.SDXL_BLOCKS
    assert select_blocks("all", keys) == set(keys)
    assert select_blocks(" Middle , output.1-9", keys) == {
        key for key in keys if key[:2] in (("middle", 0), ("output", 1))
    }
    assert select_blocks("input.3", keys) == {("input", 3, 0), ("input", 3, 1)}
    assert select_blocks("all", [("input", 1, 0)]) == {("input", 1, 0)}  # a model without a middle block
    assert listing(keys) == "input.3, middle.0, output.0, output.1"
    with pytest.raises(ValueError, match='blocks "all,input.99": this model has no cross-attention there; it has i'):
        select_blocks("all,input.99", keys)  # a part that names nothing is a mistake, whatever stands beside it


def test_concepts_are_deep_copied_by_reference(model: Any) -> None:
    import copy

    concept = tiny.concept()
    assert copy.deepcopy({"x": [concept]})["x"][0] is concept and isinstance(concept, Concept)

"""Every node, with every choice of its inputs that takes another path, in prompts to a live server.

VARIANTS has the inputs of each node that differ from its defaults; what it puts out goes on to where such things go,
and all of it is run. A node, a choice, a switch or an optional input that is in none of them is a failure.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_report_looks import small_clip

from conceptguard.nodes import NODES
from conceptguard.tools.host import Host, HostError

pytestmark = [pytest.mark.server, pytest.mark.slow]

ROOT = Path(__file__).resolve().parent.parent
SCHEMAS = {node.GET_SCHEMA().node_id.removeprefix("ConceptGuard"): node.GET_SCHEMA() for node in NODES}
Link = tuple[str, int]
PRESET = (ROOT / "presets" / "no-weapons.json").read_text(encoding="utf-8")
LINES = "\n".join(["knife", "mug", "spoon", "owl", "fox"])


def node(kind: str, /, **inputs: Any) -> dict[str, Any]:
    """One of ours, with the defaults of what it needs and is not given."""
    given = {}
    for each in SCHEMAS[kind].inputs:
        options, default = getattr(each, "options", None), getattr(each, "default", None)
        if not each.optional and (default is not None or options):
            given[each.id] = options[0] if default is None and options else default
    return {"class_type": f"ConceptGuard{kind}", "inputs": {**given, **inputs}}


def core(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


FILES = {kind: f"every/{kind}_00001.safetensors" for kind in ("direction", "prompt", "concept", "pictures", "words")}
TRAINED = {"steps": 1, "learning_rate": 0.001, "seed": 1}
SOURCES: dict[str, dict[str, Any]] = {
    "demo": node("LoadDemo"),
    "words": core("CLIPTextEncode", clip=("demo", 1), text="a mug"),
    "none": core("CLIPTextEncode", clip=("demo", 1), text=""),
    "size": core("EmptyLatentImage", width=128, height=128, batch_size=1),
    "red": core("EmptyImage", width=64, height=64, batch_size=12, color=0xE01010),
    "blue": core("EmptyImage", width=64, height=64, batch_size=12, color=0x1010E0),
    "one": core("EmptyImage", width=64, height=64, batch_size=1, color=0xE0E010),
    "text": core("PrimitiveString", value="a mug"),
    "concept": node("Concept", clip=("demo", 1), text="mug"),
    "judge": node("LoadDiscriminator", file="demo: bomb"),
    "reader": node("LoadDiscriminator", file=FILES["words"], clip=("demo", 1)),
    "direction": node("LoadDirection", file=FILES["direction"]),
    "prompt": node("LoadPrompt", file=FILES["prompt"]),
    "learned": node("LoadConcept", file=FILES["concept"]),
    "gate": node("ImageGate", discriminator=("judge", 0), image=("one", 0)),
    "presets gate": node("PresetGate"),
    "edited": node("CRE", model=("demo", 0), concept=("concept", 0)),
    "sampled": core(
        "KSampler",
        model=("edited", 0),
        positive=("words", 0),
        negative=("none", 0),
        latent_image=("size", 0),
        seed=0,
        steps=2,
        cfg=2.0,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
    ),
    "pictures": node(
        "TrainDiscriminator", concept_images=("red", 0), other_images=("blue", 0), copies=0, false_positive_rate=0.0
    ),
}
# Trained once, before what loads it; what is saved here is the file of the same name in FILES.
SAVED = {
    "direction": ("TrainDirection", "SaveDirection", 0),
    "prompt": ("TrainKPOP", "SavePrompt", 2),
    "concept": ("LearnConcept", "SaveConcept", 0),
    "pictures": ("TrainDiscriminator", "SaveDiscriminator", 0),
    "words": ("TrainPromptDiscriminator", "SaveDiscriminator", 0),
}
MODEL, CLIP, VAE = {"model": ("demo", 0)}, {"clip": ("demo", 1)}, {"vae": ("demo", 2)}
CONCEPT, DIRECTION, JUDGE = (
    {"concept": ("concept", 0)},
    {"direction": ("direction", 0)},
    {"discriminator": ("judge", 0)},
)
KPOP = {**MODEL, **CLIP, **TRAINED, "text": "mug", "width": 64, "height": 64, "path_steps": 2, "prompt_size": 2}
KPOP |= {"prompt_learning_rate": 0.001}
ERASURE = {**MODEL, **CLIP, **CONCEPT, **TRAINED, "width": 64, "height": 64, "path_steps": 2, "pictures": 1}
SEARCH = {**MODEL, **CONCEPT, **JUDGE, **VAE, "positive": ("words", 0), "negative": ("none", 0), "latent": ("size", 0)}
SEARCH |= {"steps": 2, "cfg": 1.0}
LOOK = {**MODEL, **CONCEPT, "positive": ("words", 0), "latent": ("size", 0), "steps": 1}
WAY = {**MODEL, **CLIP, **CONCEPT, **TRAINED, "prompts": "a mug", "latent": ("size", 0), "sampling_steps": 2}
REPORT = {**MODEL, **CLIP, **VAE, "prompts": "a mug\na cat", "latent": ("size", 0), "steps": 2, "cfg": 2.0}
PICTURES = {**MODEL, **CLIP, **VAE, **TRAINED, "images": ("one", 0), "tokens": 1, "batch_size": 1}
HEADS = {f"direction_{i}": ("direction", 0) for i in range(1, 9)}

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "Concept": [
        {**CLIP, "text": "mug"},
        {
            **CLIP,
            "text": "mug",
            "name": "m",
            "neutral": "a cat",
            "keep": "a spoon",
            "instead": "a cup",
            "kind": "thing",
        },
        {**CLIP, "text": "noto", "kind": "style"},
    ],
    "ConceptFromConditioning": [
        {"conditioning": ("words", 0)},
        {"conditioning": ("words", 0), **{each: ("none", 0) for each in ("empty", "neutral", "keep", "instead")}},
    ],
    "CRE": [
        {**MODEL, **CONCEPT},
        {
            **MODEL,
            **CONCEPT,
            "width": "head",
            "tokens": "own",
            "baseline": "none",
            "negative": "keep",
            "solve": "sum",
            "evidence": "position",
            "rows": "all",
        },
    ],
    "EIUP": [
        {**MODEL, **CONCEPT},
        {**MODEL, **CONCEPT, "form": "joint", "weights": "1", "rows": "all"},
        {**MODEL, **CONCEPT, "evidence": "share", "auto": "demo model"},
        {**MODEL, **CONCEPT, "evidence": "alike"},
    ],
    "EditWeights": [
        {**MODEL, **CLIP, **CONCEPT},
        {**MODEL, **CLIP, **CONCEPT, "method": "RECE", "projections": "values"},
        {**MODEL, **CLIP, **CONCEPT, "method": "TIME"},
        {**MODEL, **CLIP, **CONCEPT, "method": "SPEED", "preserve": "a cat"},
    ],
    "AdaVD": [{**MODEL, **CONCEPT}, {**MODEL, **CONCEPT, "mode": "published"}],
    "ProtoRe": [{**MODEL, **CONCEPT}, {**MODEL, **CONCEPT, "baseline": "none"}],
    "SafeGuidance": [{**MODEL, **CONCEPT, "setting": each} for each in ("weak", "medium", "strong", "max", "own")],
    "SAFREE": [
        {**MODEL, **CONCEPT, **CLIP, "text": "a mug"},
        {**MODEL, **CONCEPT, **CLIP, "text": "a mug", "svf": False},
    ],
    "LoadDirection": [{"file": FILES["direction"]}],
    "SaveDirection": [{**DIRECTION}],
    "SafeDirection": [{**MODEL, **DIRECTION}, {**MODEL, **DIRECTION, "rows": "all"}],
    "OffsetConditioning": [
        {"conditioning": ("words", 0), **DIRECTION},
        {"conditioning": ("words", 0), **DIRECTION, "pooled_from": ("none", 0)},
    ],
    "FairDirection": [
        {**MODEL, "direction_1": ("direction", 0), "direction_2": ("direction", 0)},
        {**MODEL, **HEADS, "rows": "all"},
    ],
    "TrainDirection": [
        WAY,
        {**WAY, "resume": ("direction", 0), "steps": 2},
        {**WAY, "goal": "towards", "precision": "fp32"},
        {**WAY, "precision": "bf16", "checkpointing": False},
    ],
    "TrainKPOP": [
        KPOP,
        {
            **KPOP,
            "mechanism": "additive",
            "blocks": "middle and up",
            "weights": "others",
            "rank": 2,
            "resume": False,
            "precision": "bf16",
            "checkpointing": False,
            "path": "fresh",
            "keys_and_values": "two",
            "prompt_start": "concept",
        },
        {**KPOP, "blocks": "all", "weights": "all", "keys_and_values": "two", "precision": "auto"},
    ],
    "TrainErasure": [
        ERASURE,
        {**ERASURE, "method": "ESD-u", "path": "fresh", "rank": 0},
        {**ERASURE, "method": "CA", "neutral": "a cup", "precision": "bf16", "checkpointing": False},
        {**ERASURE, "method": "SDD", "precision": "auto", "resume": False},
        {**ERASURE, "method": "FMN"},
    ],
    "SaveWeights": [],  # where a LoRA goes
    "SavePrompt": [{"prompt": ("prompt", 0)}],
    "LoadPrompt": [{"file": FILES["prompt"]}],
    "KPOP": [{**MODEL, "prompt": ("prompt", 0)}, {**MODEL, "prompt": ("prompt", 0), "rows": "all"}],
    "LearnConcept": [
        PICTURES,
        {
            **PICTURES,
            "captions": "a picture of *",
            "start_from": "cup",
            "precision": "bf16",
            "checkpointing": False,
            "resume": False,
        },
        {**PICTURES, "precision": "auto"},
    ],
    "SaveConcept": [{"concept": ("learned", 0)}],
    "LoadConcept": [{"file": FILES["concept"]}],
    "TrainDiscriminator": [
        {"concept_images": ("red", 0), "other_images": ("blue", 0), "copies": 1},
        {"concept_folder": "every/red", "other_folder": "every/blue", "copies": 0},
    ],
    "TrainPromptDiscriminator": [{**CLIP, "concept_prompts": LINES, "other_prompts": LINES.replace("\n", " two\n")}],
    "SaveDiscriminator": [{"discriminator": ("pictures", 0)}],
    "LoadDiscriminator": [{"file": "demo: beer mug"}, {"file": FILES["words"], **CLIP}],
    "LoadClassifier": [
        {"classifier": "small", "labels": "1", "network": "resnet50"},
        {"classifier": "small.safetensors", "labels": "1", "network": "resnet18"},
    ],
    "NudeNet": [{}],
    "OpenNSFW": [{}],
    "ImageGate": [
        {**JUDGE, "image": ("one", 0)},
        {**JUDGE, "image": ("red", 0), "soft": True, "decides": "any"},
    ],
    "PromptGate": [
        {**CLIP, "text": "a mug", **CONCEPT},
        {**CLIP, "text": "a mug", "discriminator": ("reader", 0), "soft": True},
    ],
    "InFlightGate": [{**JUDGE, **VAE}, {**JUDGE, "soft": True, "restart": False}],
    "CausalPeriod": [SEARCH, {**SEARCH, "search": "bisection"}],
    "ConceptMap": [
        LOOK,
        {**LOOK, "image": ("one", 0), "evidence": "share", "scale": "batch"},
        {**LOOK, "evidence": "alike", "scale": "none"},
    ],
    "ApplyPreset": [
        {**MODEL, **CLIP, "preset": PRESET},
        {**MODEL, **CLIP, "preset": PRESET, "gate": ("gate", 0)},
        {**MODEL, **CLIP, "preset": PRESET, "gate": ("presets gate", 0), "other_models": True},
    ],
    "SavePreset": [
        {"model": ("edited", 0), **CLIP},
        {"model": ("edited", 0), **CLIP, "description": "why", "author": "me", "licence": "CC0-1.0"},
    ],
    "PresetGate": [
        {},
        {**VAE, "image": ("one", 0), "text": ("text", 0), "gate": ("gate", 0)},
    ],
    "Account": [{"model": ("edited", 0), "latent": ("sampled", 0)}],
    "Report": [
        {**REPORT, "edited": ("edited", 0), "discriminator_1": ("judge", 0)},
        {**REPORT, "preset": PRESET, "kind": "keep", "negative": "a cat"},
        {**REPORT, "edited": ("edited", 0), "kind": "attack", "discriminator_2": ("judge", 0)},
        {**REPORT, "edited": ("edited", 0), "kind": "keep", "clip_score": "clip"},
        {**REPORT, "edited": ("edited", 0), "erased": "mug", "prompts": "kinds.csv", "discriminator_3": ("judge", 0)},
        {**REPORT, "preset": PRESET, "peer_1": ("edited", 0), "peer_2": ("edited", 0), "peer_3": ("edited", 0)},
    ],
    "LoadDemo": [{}, {"architecture": "flux"}, {"architecture": "lumina"}],
    "DemoReference": [{**CLIP, "image": ("one", 0)}],
}

# What no prompt here takes, and why. (node, input, choice); "*" is any choice, "given" a text that may be empty.
EXCEPT = {
    ("CausalPeriod", "sampler_name", "*"): "the host's own, which the search hands on to it",
    ("CausalPeriod", "scheduler", "*"): "the host's own, which the search hands on to it",
    ("Report", "sampler_name", "*"): "the host's own, which the report hands on to it",
    ("Report", "scheduler", "*"): "the host's own, which the report hands on to it",
    ("Report", "real", "given"): "goes with FID alone, whose package is not in the environment; test_report_node",
    ("LoadDiscriminator", "file", "*"): "the demo model's gates are files of one kind",
    ("LoadClassifier", "network", "vit_b_16"): "350 MB of weights; test_classifiers has the same way with small ones",
    (
        "TrainDiscriminator",
        "clip_vision",
        "linked",
    ): "the host knows encoders of 600 MB and more alone; test_discriminator",
    ("LoadDiscriminator", "clip_vision", "linked"): "the same",
    ("PresetGate", "clip_vision", "linked"): "the same",
}
# Nodes for packages that are not in the environment: each says so, and how to get it.
MISSING = {"NudeNet": "nudenet is not installed; run `pip install", "OpenNSFW": "is not installed; run `pip install"}
CASES = [(kind, i) for kind, variants in VARIANTS.items() for i in range(len(variants))]


def ends(kind: str, variant: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What takes each output of the node "it" in, up to something that the host runs a prompt for."""
    for i, output in enumerate(SCHEMAS[kind].outputs):
        it, name = ("it", i), f"end {i}"
        match output.io_type.removeprefix("CONCEPT_GUARD_"):
            case "MODEL":
                yield from drawn(name, it)
            case "CONDITIONING":
                yield from drawn(name, ("demo", 0), it)
            case "CONCEPT":
                yield "eiup", node("EIUP", **MODEL, concept=it)
                yield from drawn(name, ("eiup", 0))
            case "DIRECTION":
                yield "safe", node("SafeDirection", **MODEL, direction=it)
                yield from drawn(name, ("safe", 0))
            case "PROMPT":
                yield "kpop", node("KPOP", **MODEL, prompt=it)
                yield from drawn(name, ("kpop", 0))
            case "GATE":
                yield from gated(name, gate=it)
            case "TIMESTEPS_RANGE":
                yield from gated(name, range=it)
            case "PRESET_GATE":
                yield "preset", node("ApplyPreset", **MODEL, **CLIP, preset=PRESET, gate=it)
                yield from drawn(name, ("preset", 0))
            case "DISCRIMINATOR" if "clip" in variant:
                yield "asked", node("PromptGate", **CLIP, discriminator=it, text="a mug")
                yield name, core("PreviewAny", source=("asked", 2))
            case "DISCRIMINATOR":
                yield "asked", node("ImageGate", discriminator=it, image=("one", 0))
                yield name, core("PreviewAny", source=("asked", 2))
            case "LORA_MODEL":
                yield name, node("SaveWeights", weights=it, filename_prefix="every")
            case "IMAGE":
                yield name, core("PreviewImage", images=it)
            case "MASK":
                yield f"{name} mask", core("MaskToImage", mask=it)
                yield name, core("PreviewImage", images=(f"{name} mask", 0))
            case _:
                yield name, core("PreviewAny", source=it)


SEEDS = itertools.count(1)


def drawn(name: str, model: Link, positive: Link = ("words", 0)) -> Iterator[tuple[str, dict[str, Any]]]:
    steps = 4 if model[0] == "sld" else 2  # a gate that decides while sampling needs some
    settings = {"steps": steps, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    sample = {"positive": positive, "negative": ("none", 0), "latent_image": ("size", 0), "seed": next(SEEDS)}
    yield f"{name} sample", core("KSampler", model=model, **sample, **settings)
    yield f"{name} decode", core("VAEDecode", samples=(f"{name} sample", 0), **VAE)
    yield name, core("PreviewImage", images=(f"{name} decode", 0))


def gated(name: str, **more: Link) -> Iterator[tuple[str, dict[str, Any]]]:
    """One model with every edit, each with a gate or a range."""
    yield "cre", node("CRE", **MODEL, **CONCEPT, **more)
    yield "eiup", node("EIUP", model=("cre", 0), **CONCEPT, **more)
    yield "safe", node("SafeDirection", model=("eiup", 0), **DIRECTION, **more)
    yield "kpop", node("KPOP", model=("safe", 0), prompt=("prompt", 0), **more)
    yield (
        "fair",
        node("FairDirection", model=("kpop", 0), direction_1=("direction", 0), direction_2=("direction", 0), **more),
    )
    yield "adavd", node("AdaVD", model=("fair", 0), **CONCEPT, **more)
    yield "protore", node("ProtoRe", model=("adavd", 0), **CONCEPT, **more)
    yield "safree", node("SAFREE", model=("protore", 0), **CONCEPT, **CLIP, text="a mug", svf=False, **more)
    yield "sld", node("SafeGuidance", model=("safree", 0), **CONCEPT, **more)
    yield from drawn(name, ("sld", 0))


def graph_of(kind: str, variant: dict[str, Any]) -> dict[str, Any]:
    found = {"it": node(kind, **variant), **dict(ends(kind, variant))}
    return with_sources(found)


def with_sources(found: dict[str, Any]) -> dict[str, Any]:
    """And the nodes that they link to, theirs, and so on."""
    waiting = list(found.values())
    while waiting:
        for value in waiting.pop()["inputs"].values():
            if isinstance(value, tuple) and value[0] not in found:
                found[value[0]] = SOURCES[value[0]]
                waiting.append(found[value[0]])
    return found


def saving(name: str) -> dict[str, Any]:
    train, save, output = SAVED[name]
    kept = {"discriminator" if "Discriminator" in save else name: ("it", output), "filename_prefix": f"every/{name}"}
    return with_sources({"it": node(train, **VARIANTS[train][0]), "save": node(save, **kept)})


@pytest.fixture(scope="module")
def server(host: Host) -> Host:
    """With the files that the Load nodes choose from."""
    from PIL import Image

    for color, rgb in (("red", (220, 20, 20)), ("blue", (20, 20, 220))):
        folder = host.base / "input" / "every" / color
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(10):
            Image.new("RGB", (32, 32), rgb).save(folder / f"{i}.png")
    kinds = "prompt,class,sd_seed,sd_guidance_scale\na mug,mug,7,3.0\na cat,cat,8,3.0\n"
    (host.base / "input" / "kinds.csv").write_text(kinds, encoding="utf-8")
    classifiers(host.base / "models" / "concept_guard" / "classifiers")
    small_clip(host.base / "models" / "concept_guard" / "measures" / "clip")
    for name in SAVED:
        if not (host.base / "models" / "concept_guard" / FILES[name]).exists():
            host.run(saving(name))
    return host


def classifiers(folder: Path) -> None:
    """One of each form, with weights that nobody trained."""
    import torchvision
    import transformers
    from safetensors.torch import save_file

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8)
    transformers.ViTForImageClassification(config).save_pretrained(folder / "small")
    weights = torchvision.models.resnet18(num_classes=2).state_dict()
    save_file({name: torch.as_tensor(each) for name, each in weights.items()}, folder / "small.safetensors")


@pytest.mark.parametrize(("kind", "i"), CASES, ids=[f"{kind}-{i}" for kind, i in CASES])
def test_a_node_runs(server: Host, kind: str, i: int) -> None:
    graph = graph_of(kind, VARIANTS[kind][i])
    if kind in MISSING:
        with pytest.raises(HostError, match=f"ConceptGuard{kind}.*{MISSING[kind]}"):
            server.run(graph)
        return
    outputs = server.run(graph)["outputs"]
    shown = {id for id, each in graph.items() if each["class_type"] in ("PreviewImage", "PreviewAny")}
    assert shown <= outputs.keys() and (shown or SCHEMAS[kind].is_output_node)


def taken() -> dict[tuple[str, str], set[Any]]:
    """What each input of ours is in the prompts that are run here: values, and "linked" or "unlinked"."""
    graphs = [graph_of(kind, VARIANTS[kind][i]) for kind, i in CASES] + [saving(name) for name in SAVED]
    found: dict[tuple[str, str], set[Any]] = defaultdict(set)
    for graph in graphs:
        for each in graph.values():
            kind = each["class_type"].removeprefix("ConceptGuard")
            if kind not in SCHEMAS or not each["class_type"].startswith("ConceptGuard"):
                continue
            found[kind, ""].add(True)
            for known in SCHEMAS[kind].inputs:
                value = each["inputs"].get(known.id, getattr(known, "default", None))
                linked = isinstance(value, tuple)
                found[kind, known.id] |= {json.dumps(value), "linked" if linked else "unlinked"}
    return found


def paths(known: Any) -> set[str]:
    """What an input can say that takes another path."""
    if getattr(known, "options", None):
        return {json.dumps(option) for option in known.options}
    if known.io_type == "BOOLEAN":
        return {"true", "false"}
    if known.optional and known.io_type not in ("STRING", "INT", "FLOAT"):
        return {"linked", "unlinked"}
    return set()


def test_every_node_and_every_choice_is_in_a_prompt() -> None:
    assert VARIANTS.keys() == SCHEMAS.keys(), "every node has its line in VARIANTS"
    found, left = taken(), []
    for kind, schema in SCHEMAS.items():
        if not found[kind, ""]:
            left.append((kind, "", ""))
        for known in schema.inputs:
            wanted = paths(known) - found[kind, known.id]
            left += [(kind, known.id, choice.strip('"')) for choice in sorted(wanted)]
    excepted = {each for each in left if EXCEPT.keys() & {each, (*each[:2], "*")}}
    assert set(left) - excepted == set(), "give them a line in VARIANTS, or in EXCEPT with the reason"
    used = {key for key in EXCEPT if any(key in (each, (*each[:2], "*")) for each in excepted)}
    assert used == {key for key in EXCEPT if key[2] != "given"}, "a line of EXCEPT that excepts nothing"


def test_a_text_input_that_may_be_empty_is_given_once() -> None:
    found = taken()
    never = {
        (kind, known.id, "given")
        for kind, schema in SCHEMAS.items()
        for known in schema.inputs
        if known.io_type == "STRING" and known.optional and len(found[kind, known.id] - {"linked", "unlinked"}) < 2
    }
    assert never == {key for key in EXCEPT if key[2] == "given"}

"""The nodes that learn a concept from pictures, and its files."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..editing.edits.digest import digest
from ..editing.edits.encode import own_tokens
from ..editing.edits.learned import concept_of
from ..editing.edits.spec import Concept
from ..editing.engine.host import fingerprint_of
from ..editing.files.artefacts import Artefact
from ..editing.pictures.chart import curve
from ..editing.training.mode import gradients
from ..editing.training.textual_inversion import ConceptOptions, LearnedTokens, tokens_start
from .inputs import CATEGORY, named
from .learned import load_node, save_node
from .training import conduct, encode, lines_for, network_of, train_inputs, weights_key
from .types import ConceptType

LEARN = "ConceptGuardLearnConcept"
DEFAULTS = ConceptOptions()


class ConceptGuardLearnConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=LEARN,
            display_name="Learn Concept",
            category=f"{CATEGORY}/train",
            description="A concept from a handful of pictures, for what words cannot describe: tokens are learned that "
            "make the model draw what the pictures share. Connect it to an edit node to erase that. SD1.x, SD2.x, "
            "SDXL.",
            inputs=[
                io.Model.Input("model", tooltip="The model that is to be edited; it stays as it is."),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                io.Vae.Input("vae", tooltip="Its VAE."),
                io.Image.Input(
                    "images", tooltip="Examples of the concept, 1 to 8 in a batch, at the model's own size."
                ),
                io.String.Input(
                    "name",
                    default="from pictures",
                    tooltip="What to call the concept in reports and errors; it changes no picture.",
                ),
                io.Int.Input(
                    "tokens",
                    default=DEFAULTS.tokens,
                    min=1,
                    max=32,
                    tooltip="How many tokens stand for it; at least 1, not 0. More say more of these very pictures.",
                ),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    tooltip="What else the pictures show, one line a picture or one for all: what a "
                    "caption "
                    "says is left out of the concept. For a style: 'a cat', 'a bus'. Empty: nothing.",
                ),
                io.String.Input(
                    "start_from",
                    default="",
                    tooltip="Words to start from, such as 'a drawing'. Empty: nothing in particular.",
                ),
                io.Int.Input(
                    "steps",
                    default=300,
                    min=1,
                    max=100_000,
                    tooltip="How many times the tokens are updated; at least 1, not 0.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=DEFAULTS.lr,
                    min=0.0,
                    max=1.0,
                    step=1e-5,
                    round=False,
                    tooltip="How far each step moves the tokens; 0 leaves them as they start.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=DEFAULTS.batch,
                    min=1,
                    max=64,
                    tooltip="Noisy pictures a step, each of one of the images; at least 1, not 0.",
                ),
                *train_inputs(checkpointing=True),
            ],
            outputs=[
                ConceptType.Output(display_name="concept", tooltip="The concept; Save Concept keeps it."),
                io.Image.Output(display_name="loss", tooltip="The denoising loss at each step."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, vae: Any, images: Tensor, name: str = "", **inputs: Any) -> io.NodeOutput:
        with named(LEARN), gradients():
            node_id = getattr(cls.hidden, "unique_id", None)
            found, losses = learn(model, clip, vae, images, name.strip() or "from pictures", node_id, **inputs)
            return io.NodeOutput(concept_of(found), curve(losses, f"loss of {found.name}"))


def learn(
    model: Any,
    clip: Any,
    vae: Any,
    images: Tensor,
    name: str,
    node_id: str | None,
    *,
    tokens: int = DEFAULTS.tokens,
    captions: str = "",
    start_from: str = "",
    steps: int = 300,
    learning_rate: float = DEFAULTS.lr,
    batch_size: int = DEFAULTS.batch,
    seed: int = 0,
    precision: str = "fp32",
    checkpointing: bool = True,
    checkpoint_every: int = 100,
    resume: bool = True,
) -> tuple[Artefact, list[float]]:
    """The learned concept as its file holds it, and the losses. Within `gradients`."""
    backbone, pixels = fingerprint_of(model, LEARN), checked(images)
    lines = lines_for("captions", captions, len(pixels), "pictures")
    options = ConceptOptions(tokens, learning_rate, batch_size, seed)
    with torch.no_grad():
        latents = vae.encode(pixels)
    start_from = start_from.strip()
    encoded = {line: encode(clip, line) for line in ("", start_from, *lines)}
    network = network_of(model, precision, checkpointing)  # last, while the card has room for the encoders
    latents = network.latents(latents)
    texts = {line: network.text(conditioning, *latents.shape[-2:]) for line, conditioning in encoded.items()}
    empty = texts[""]
    places = [place(clip, line, texts[line].c.shape[1], tokens) for line in lines]
    like = texts[start_from].c[0, list(own_tokens(clip, start_from))]
    training = LearnedTokens(
        network,
        network.sampling,
        latents,
        [texts[line] for line in lines],
        places,
        tokens_start(options, empty.c, like),
        options,
    )
    settings = {
        **asdict(options),
        "captions": lines,
        "start_from": start_from,
        "precision": precision,
        "pictures": digest([latents.cpu()])[:20],
        "model": weights_key(network),
    }
    losses = conduct("concept-checkpoint", training, steps, settings, node_id, model, checkpoint_every, resume)
    return training.artefact(
        name, empty.c, concepts=(name,), backbone=backbone, training={**settings, "steps": steps}
    ), losses


def checked(images: Any) -> Tensor:
    """Pixels [n, h, w, 3], cut to whole latents."""
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or not 1 <= len(images) <= 8:
        count = len(images) if isinstance(images, torch.Tensor) else "no"
        raise ValueError(f"images holds {count} pictures; connect 1 to 8 of one size")
    height, width = (size // 8 * 8 for size in images.shape[1:3])
    if min(height, width) < 16:
        raise ValueError(
            f"images are of {images.shape[2]}x{images.shape[1]} pixels, too small to learn from; scale "
            "them to the model's own size"
        )
    return images[:, :height, :width, :3].float().clone()


def place(clip: Any, caption: str, length: int, tokens: int) -> int:
    """The first position behind a caption's own tokens, where the learned ones go."""
    at = max(own_tokens(clip, caption), default=0) + 1
    if length > 77 or at + tokens >= length:
        raise ValueError(
            f'captions: "{caption[:60]}" leaves no room for {tokens} tokens in one piece of prompt; shorten it'
        )
    return at


def learned(concept: Any) -> Artefact:
    if not isinstance(concept, Concept) or concept.artefact is None:
        raise ValueError(
            "concept was not learned: what words or a conditioning say is kept by the workflow; connect Learn Concept"
        )
    return concept.artefact


ConceptGuardSaveConcept = save_node(
    (
        "ConceptGuardSaveConcept",
        "Save Concept",
        "concepts",
        "Writes a concept that was learned from pictures into the models folder concept_guard/, "
        "always as a new file. Press R to see it in Load Concept.",
    ),
    "concept",
    ConceptType,
    "The concept that Learn Concept made.",
    learned,
)
ConceptGuardLoadConcept = load_node(
    (
        "ConceptGuardLoadConcept",
        "Load Concept",
        "concepts",
        "A concept learned from pictures, from the models folder concept_guard/. Files are checked before use.",
    ),
    "concept",
    ConceptType,
    concept_of,
)

NODES: list[type[io.ComfyNode]] = [ConceptGuardLearnConcept, ConceptGuardSaveConcept, ConceptGuardLoadConcept]

"""The nodes that learn a concept from pictures, and its files."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..editing.edits.learned import concept_of
from ..editing.edits.spec import Concept
from ..editing.files.artefacts import Artefact
from ..editing.pictures.chart import curve
from ..editing.training.textual_inversion import ConceptOptions
from ..jobs.learn_concept import learn_concept
from .inputs import CATEGORY, count, named, number
from .learned import load_node, save_node
from .show import id_of
from .training import course, train_inputs
from .types import ConceptType

LEARN = "ConceptGuardLearnConcept"


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
                count(
                    "tokens",
                    ConceptOptions.tokens,
                    1,
                    32,
                    "How many tokens stand for it; at least 1, not 0. More say more of these very pictures.",
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
                count("steps", 300, 1, 100_000, "How many times the tokens are updated; at least 1, not 0."),
                number(
                    "learning_rate",
                    ConceptOptions.lr,
                    0.0,
                    1.0,
                    1e-5,
                    "How far each step moves the tokens; 0 leaves them as they start.",
                    round=False,
                ),
                count(
                    "batch_size",
                    ConceptOptions.batch,
                    1,
                    64,
                    "Noisy pictures a step, each of one of the images; at least 1, not 0.",
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
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        images: Tensor,
        name: str = "",
        tokens: int = ConceptOptions.tokens,
        captions: str = "",
        start_from: str = "",
        steps: int = 300,
        learning_rate: float = ConceptOptions.lr,
        batch_size: int = ConceptOptions.batch,
        seed: int = 0,
        **run: Any,
    ) -> io.NodeOutput:
        with named(LEARN):
            options = ConceptOptions(tokens, learning_rate, batch_size, seed)
            how = course(LEARN, id_of(cls), model, steps, **run)
            name = name.strip() or "from pictures"
            found, losses = learn_concept(model, clip, vae, images, name, options, how, captions, start_from)
            return io.NodeOutput(concept_of(found), curve(losses, f"loss of {found.name}"))


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

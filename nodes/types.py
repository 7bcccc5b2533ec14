"""The pack's own socket types."""

from comfy_api.latest import io

ConceptType = io.Custom("CONCEPT_GUARD_CONCEPT")
GateType = io.Custom("CONCEPT_GUARD_GATE")
PresetGateType = io.Custom("CONCEPT_GUARD_PRESET_GATE")  # a gate with what a preset's own gates look with and at
DiscriminatorType = io.Custom("CONCEPT_GUARD_DISCRIMINATOR")
DirectionType = io.Custom("CONCEPT_GUARD_DIRECTION")
PromptType = io.Custom("CONCEPT_GUARD_PROMPT")
LoRAType = io.Custom("LORA_MODEL")  # the host's


class _Any(str):
    """Fits any input: the host compares an input that lists files, such as Load LoRA's, with the type itself."""

    __hash__ = str.__hash__

    def __ne__(self, other: object) -> bool:
        return False


FileType = io.Custom(_Any("*"))

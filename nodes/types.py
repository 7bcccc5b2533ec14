"""The pack's own socket types."""

from comfy_api.latest import io

ConceptType = io.Custom("CONCEPT_GUARD_CONCEPT")
GateType = io.Custom("CONCEPT_GUARD_GATE")
DiscriminatorType = io.Custom("CONCEPT_GUARD_DISCRIMINATOR")
DirectionType = io.Custom("CONCEPT_GUARD_DIRECTION")

"""The families of models, as presets and policies name them: those of every backbone (engine/backbones)."""

UNETS = ("SD1.x", "SD2.x", "SDXL")
TRANSFORMERS = (
    "Flux",
    "Chroma",
    "Qwen-Image",
    "Lumina 2 and Z-Image",
    "SD3",
    "HiDream",
    "Krea 2",
    "Wan",
    "Cosmos-Predict2",
    "Anima",
    "PixArt",
)

"""Load the demo model's weights as the host's own MODEL, CLIP and VAE; beside them, the reference encoder and judge."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from . import model, transformers
from .judge import Judge
from .witness import Witness

WEIGHTS = Path(__file__).parent / "weights"
MODEL_FILE, JUDGE_FILE = WEIGHTS / "demo-model.safetensors", WEIGHTS / "judge.safetensors"
WITNESS_FILE = WEIGHTS / "witness.safetensors"


def transformer_file(architecture: str) -> Path:
    """A transformer's weights; its text encoder and decoder are MODEL_FILE's."""
    return WEIGHTS / f"demo-{architecture}.safetensors"


LEFT_AWAY = ("norm_final.weight",)  # of NextDiT, whose forward never used it


class WeightsError(RuntimeError):
    """The weights cannot be used; the message names the file and the mend."""


def read(path: Path) -> dict[str, Tensor]:
    """A weights file's tensors in fp32; every fault becomes a WeightsError."""
    mend = "reinstall ConceptGuard, or rebuild the weights with `make train-demo`"
    if not path.is_file():
        raise WeightsError(f"the demo weights {path.name} are missing from {path.parent}: {mend}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as e:
        raise WeightsError(f"the demo weights {path} are damaged ({e}): {mend}") from e
    for name, t in tensors.items():
        if not t.is_floating_point() or not torch.isfinite(t).all():
            raise WeightsError(f"the demo weights {path} are damaged ({name} holds no finite numbers): {mend}")
    return {name: t.float() for name, t in tensors.items()}


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def fill(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> nn.Module:
    """Load a state dict that must fit exactly, but for what newer hosts have left away; the module keeps its dtype,
    also where a newer host makes its weights of what comes in."""
    known = {name: tensor.dtype for name, tensor in module.state_dict().items()}
    tensors = {name: tensor for name, tensor in tensors.items() if name in known or name not in LEFT_AWAY}
    own = getattr(module, "dtype", None)  # of a host's network whose weights are not there yet
    try:
        module.load_state_dict(
            {name: tensor.to(known.get(name, own) or tensor.dtype) for name, tensor in tensors.items()}
        )
    except RuntimeError as e:
        raise WeightsError(
            f"the demo weights {path} do not fit this version of ConceptGuard ({e}): "
            "update the file, or rebuild it with `make train-demo`"
        ) from e
    return module.eval().requires_grad_(False)


def latent_format(tensors: dict[str, Tensor]) -> Any:
    """SD1's latent format with the demo's preview colours."""
    import comfy.latent_formats

    rgb = tensors["latent_rgb"].tolist()

    class DemoLatent(comfy.latent_formats.SD15):
        def __init__(self) -> None:
            super().__init__()
            self.latent_rgb_factors, self.latent_rgb_factors_bias = rgb[:4], rgb[4]
            self.taesd_decoder_name = None

    return DemoLatent


def patched(config: Any, weights: dict[str, Tensor], path: Path, anew: Any, disable_dynamic: bool) -> Any:
    """A ModelPatcher around the host's BaseModel of a config, on the device and in the dtype that the host chooses.

    `anew`: what makes it again, and of what; `path` is named in errors.
    """
    import comfy.model_management as mm
    import comfy.model_patcher

    device = mm.get_torch_device()
    dtype = mm.unet_dtype(
        model_params=sum(w.numel() for w in weights.values()), supported_dtypes=config.supported_inference_dtypes
    )
    config.set_inference_dtype(dtype, mm.unet_manual_cast(dtype, device, config.supported_inference_dtypes))
    base = config.get_model({}, device=mm.unet_offload_device())
    fill(base.diffusion_model, weights, path)
    kind = comfy.model_patcher.ModelPatcher
    if not disable_dynamic:  # newer hosts: as their own loaders do
        kind = getattr(comfy.model_patcher, "CoreModelPatcher", kind)
    patcher = kind(base, load_device=device, offload_device=mm.unet_offload_device())
    patcher.cached_patcher_init = anew
    return patcher


def again(path: Path | None, disable_dynamic: bool = False) -> Any:
    """The same MODEL loaded anew, which newer hosts ask for: for another device, or without dynamic VRAM."""
    return load_unet(read(path or MODEL_FILE), path, disable_dynamic)


def load_unet(tensors: dict[str, Tensor], path: Path | None = None, disable_dynamic: bool = False) -> Any:
    """A ModelPatcher around the host's BaseModel with SD1's schedule and latent format."""
    import comfy.supported_models

    drawn = latent_format(tensors)

    class DemoConfig(comfy.supported_models.SD15):
        unet_config = model.UNET_CONFIG
        unet_extra_config = model.HEADS
        latent_format = drawn

    config = DemoConfig(model.UNET_CONFIG)
    return patched(config, part(tensors, "unet."), path or MODEL_FILE, (again, (path,)), disable_dynamic)


def load_transformer(
    architecture: str,
    weights: dict[str, Tensor],
    tensors: dict[str, Tensor],
    path: Path,
    disable_dynamic: bool = False,
) -> Any:
    """A ModelPatcher around the host's BaseModel of a transformer; `tensors`: of the model file whose latents it draws.

    `path`: the file that the weights came from, which errors name.
    """
    import comfy.supported_models

    kind: Any = {"flux": comfy.supported_models.FluxSchnell, "lumina": comfy.supported_models.Lumina2}[architecture]
    made = type(
        "DemoConfig",
        (kind,),
        {
            "sampling_settings": {"multiplier": 1.0, "shift": transformers.SHIFT},
            "latent_format": latent_format(tensors),
        },
    )
    anew = load_transformer, (architecture, weights, tensors, path)
    config = made(transformers.config(architecture))
    return patched(config, config.process_unet_state_dict(dict(weights)), path, anew, disable_dynamic)


def load_clip(tensors: dict[str, Tensor]) -> Any:
    """The host's CLIP object; a token that the world never used gets the mean of those that it did."""
    import comfy.sd
    import folder_paths
    from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel, SDTokenizer
    from comfy.supported_models_base import ClipTarget

    class Tokenizer(SDTokenizer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(embedding_size=model.WIDTH, **kwargs)

    class Text(SDClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
            super().__init__(
                device=device,
                textmodel_json_config=dict(model.TEXT_CONFIG),
                dtype=dtype,
                return_projected_pooled=False,
                model_options=model_options or {},
            )

    def text_model(**kwargs: Any) -> SD1ClipModel:
        return SD1ClipModel(clip_model=Text, **kwargs)

    def tokenizer(**kwargs: Any) -> SD1Tokenizer:
        return SD1Tokenizer(tokenizer=Tokenizer, **kwargs)

    rows, used = tensors["rows"], tensors["used"].long()
    table = rows.mean(0).repeat(model.VOCABULARY, 1)
    table[used] = rows
    weights = part(tensors, "text.")
    weights["text_model.embeddings.token_embedding.weight"] = table
    weights["text_projection.weight"] = torch.eye(model.WIDTH)
    clip = comfy.sd.CLIP(
        ClipTarget(tokenizer, text_model), embedding_directory=folder_paths.get_folder_paths("embeddings")
    )
    fill(clip.cond_stage_model.clip_l.transformer, weights, MODEL_FILE)
    return clip


def load_vae(tensors: dict[str, Tensor]) -> Any:
    import comfy.sd

    return comfy.sd.VAE(sd=part(tensors, "vae."))


def load(path: Path | None = None, architecture: str = "unet") -> tuple[Any, Any, Any]:
    """The MODEL, CLIP and VAE of the demo model, or of another file, fresh objects at each call.

    `architecture`: another one than the UNet reads the same texts and draws the same latents, by weights of its own.
    """
    tensors = read(path or MODEL_FILE)
    try:
        if architecture == "unet":
            drawn = load_unet(tensors, path)
        else:
            file = transformer_file(architecture)
            drawn = load_transformer(architecture, part(read(file), "unet."), tensors, file)
        return drawn, load_clip(tensors), load_vae(tensors)
    except KeyError as e:
        raise WeightsError(
            f"the demo weights {path or MODEL_FILE} lack {e}: rebuild them with `make train-demo`"
        ) from e


@cache
def load_reference() -> model.ReferenceEncoder:
    encoder = fill(model.ReferenceEncoder(), part(read(MODEL_FILE), "reference."), MODEL_FILE)
    assert isinstance(encoder, model.ReferenceEncoder)
    return encoder


def _counted(module: nn.Module, path: Path) -> nn.Module:
    """Fill a network whose norms count batches, which its file leaves out."""
    counters = {k: v for k, v in module.state_dict().items() if k.endswith("num_batches_tracked")}
    return fill(module, {**read(path), **counters}, path)


@cache
def load_judge() -> Judge:
    judge = Judge()
    _counted(judge, JUDGE_FILE)
    return judge


@cache
def load_witness(path: Path = WITNESS_FILE) -> Witness:
    witness = Witness()
    _counted(witness, path)
    return witness


@torch.no_grad()
def reference_prompt(clip: Any, image: Tensor, text: str) -> Any:
    """CONDITIONING for a prompt in which `<image>` stands for a picture [1, h, w, 3] in [0, 1]."""
    pixels = torch.nn.functional.interpolate(image[:1, :, :, :3].movedim(-1, 1).float(), size=64, mode="area")
    shown = list(load_reference()(pixels)[0])

    def tokenize(words: str) -> list[Any]:
        return [
            t
            for batch in clip.tokenize(words)["l"]
            for t, _ in batch
            if not isinstance(t, int) or t not in (model.START, model.END)
        ]

    tokens = model.split_reference(tokenize, text, shown)
    return clip.encode_from_tokens_scheduled({"l": [[(t, 1.0) for t in tokens]]})

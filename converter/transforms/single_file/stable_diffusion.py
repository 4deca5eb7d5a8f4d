"""Stable Diffusion 1, 2 and XL, and their models for inpainting."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from converter.libraries.diffusers import DIFFUSERS
from converter.libraries.transformers import TRANSFORMERS
from converter.transforms.layouts.stable_diffusion import clip_rows, open_clip_rows, unet_rows, vae_rows
from converter.transforms.layouts.stable_diffusion_shapes import (
    CLIP_NUMBERS,
    CLIP_WORDS,
    UNET_NUMBERS,
    UNET_WORDS,
    VAE_NUMBERS,
    VAE_WORDS,
    clip_shapes,
    unet_shapes,
    vae_shapes,
)
from converter.transforms.single_file.family import Config, Configs, Family, Kind, Part, Shapes

_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
_IDS = ("position_ids",)  # which older versions of transformers save
_PREFIX = "model.diffusion_model."


def clip(*prefixes: str) -> Part:
    """Give OpenAI's CLIP as a part."""
    return Part(
        _CLASSES, prefixes, TRANSFORMERS, clip_rows, clip_shapes, numbers=CLIP_NUMBERS, words=CLIP_WORDS, buffers=_IDS
    )


def open_clip(*prefixes: str) -> Part:
    """Give OpenCLIP as a part, under the names of its own library."""
    return Part(
        _CLASSES,
        prefixes,
        TRANSFORMERS,
        open_clip_rows,
        clip_shapes,
        numbers=CLIP_NUMBERS,
        words=CLIP_WORDS,
        buffers=_IDS,
    )


UNET = Part(
    ("UNet2DConditionModel",), (_PREFIX, ""), DIFFUSERS, unet_rows, unet_shapes, lone=_PREFIX,
    numbers=UNET_NUMBERS, words=UNET_WORDS,
)  # fmt: skip
VAE = Part(
    ("AutoencoderKL",), ("first_stage_model.", "vae."), DIFFUSERS, vae_rows, vae_shapes,
    numbers=VAE_NUMBERS, words=VAE_WORDS,
)  # fmt: skip

# As ComfyUI writes and reads them (``comfy_extras/nodes_model_merging.py``, ``SDXL`` in ``comfy/supported_models.py``).
_V_PREDICTION = {"v_pred": ("prediction_type", "v_prediction"), "ztsnr": ("rescale_betas_zero_snr", True)}
_TURNS = ("edm_mean", "edm_vpred.sigma_max")  # of Playground 2.5, and of CosXL
_LAST_LAYER = "the last layer of the text encoder is in no pipeline, nor in the file: nothing reads it"


def _family(
    name: str,
    folder: str,
    width: int,
    encoders: Mapping[str, Part],
    nine: Configs,
    owns: Callable[[Configs], bool],
) -> Family:
    """Give a family whose UNet reads texts of this ``width``; ``nine`` is what inpainting changes."""
    stem = "StableDiffusionXL" if folder == "sdxl" else "StableDiffusion"
    return Family(
        name,
        "input_blocks.0.0.weight",
        {"unet": UNET, "vae": VAE, **encoders},
        (
            Kind(f"{stem}Pipeline", lambda shapes: _channels(shapes) == 4),
            # Nine are an image, its mask and the masked image.
            Kind(f"{stem}InpaintPipeline", lambda shapes: _channels(shapes) == 9, " for inpainting", nine),
        ),
        is_of=lambda shapes: _text_width(shapes) == width,
        owns=owns,
        others=(f"{stem}Img2ImgPipeline",),
        folder=folder,
        marks=_V_PREDICTION if folder == "sdxl" else {},
        turns=_TURNS if folder == "sdxl" else (),
        remark=_LAST_LAYER if folder == "sd2" else "",
    )


def _channels(shapes: Shapes) -> int:
    return int([*shapes["input_blocks.0.0.weight"], 0, 0][1])


def _text_width(shapes: Shapes) -> int:
    keys = (shape for name, shape in shapes.items() if name.endswith("attn2.to_k.weight"))
    return int([*next(keys, ()), 0, 0][1])


def _is_second(configs: Configs) -> bool:
    """Say whether a pipeline has the text encoder of Stable Diffusion 2, of 24 layers with or without the last.

    As ``convert_diffusers_to_original_stable_diffusion.py`` tells them apart; without one, by what its UNet reads.
    """
    encoder: Config = configs.get("text_encoder", {})
    if encoder:
        return encoder.get("num_hidden_layers") in (23, 24)
    return configs.get("unet", {}).get("cross_attention_dim") == 1024


def _is_xl(configs: Configs) -> bool:
    """Say whether a pipeline's UNet reads more than its second text encoder, which is all that a refiner has."""
    width = configs.get("unet", {}).get("cross_attention_dim")
    return width is None or width != configs.get("text_encoder_2", {}).get("hidden_size")


_NINE: Configs = {"unet/config.json": {"in_channels": 9}}
_NINE_2: Configs = {
    "unet/config.json": {"in_channels": 9, "sample_size": 64, "upcast_attention": False},
    "vae/config.json": {"sample_size": 512},
    "scheduler/scheduler_config.json": {"prediction_type": "epsilon"},
}
_ENCODERS_XL = {
    "text_encoder": clip("conditioner.embedders.0.transformer."),
    "text_encoder_2": open_clip("conditioner.embedders.1.model."),
}
_ENCODERS_2 = {"text_encoder": open_clip("cond_stage_model.model.")}
_ENCODERS_1 = {"text_encoder": clip("cond_stage_model.transformer.")}
FAMILIES = (
    _family("Stable Diffusion XL", "sdxl", 2048, _ENCODERS_XL, _NINE, owns=_is_xl),
    _family("Stable Diffusion 2", "sd2", 1024, _ENCODERS_2, _NINE_2, owns=_is_second),
    _family("Stable Diffusion 1", "sd1", 768, _ENCODERS_1, _NINE, owns=lambda configs: True),
)

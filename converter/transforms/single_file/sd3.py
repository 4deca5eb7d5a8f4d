"""Stable Diffusion 3 and 3.5, with none, some or all of their three text encoders."""

from __future__ import annotations

from converter.libraries.diffusers import DIFFUSERS
from converter.transforms.layouts.sd3 import SD3_NUMBERS, sd3_config, sd3_rows, sd3_shapes
from converter.transforms.single_file.encoders import CLIP_G, CLIP_L_OF_SD3, T5
from converter.transforms.single_file.family import Family, Kind, Part
from converter.transforms.single_file.stable_diffusion import VAE

_PREFIX = "model.diffusion_model."
TRANSFORMER = Part(
    ("SD3Transformer2DModel",), (_PREFIX, ""), DIFFUSERS, sd3_rows, sd3_shapes,
    lone=_PREFIX, config_of=sd3_config, numbers=SD3_NUMBERS,
)  # fmt: skip

SD3 = Family(
    "Stable Diffusion 3",
    "joint_blocks.0.context_block.attn.qkv.weight",
    {
        "transformer": TRANSFORMER,
        "vae": VAE,
        "text_encoder": CLIP_L_OF_SD3,
        "text_encoder_2": CLIP_G,
        "text_encoder_3": T5,
    },
    (Kind("StableDiffusion3Pipeline", lambda shapes: True),),
    others=("StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    folder="sd3",
)

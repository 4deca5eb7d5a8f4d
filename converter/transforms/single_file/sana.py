"""Sana: its transformer, which is all that NVIDIA's file holds; the autoencoder and Gemma are files of their own."""

from __future__ import annotations

from converter.libraries.diffusers import DIFFUSERS
from converter.transforms.layouts.sana import (
    SANA_NUMBERS,
    UNREAD,
    sana_config,
    sana_rows,
    sana_shapes,
    sana_stand_ins,
)
from converter.transforms.single_file.family import Family, Kind, Part

TRANSFORMER = Part(
    ("SanaTransformer2DModel",), ("", "model.diffusion_model."), DIFFUSERS, sana_rows,
    lambda config, _: sana_shapes(config), lone="", config_of=sana_config, numbers=SANA_NUMBERS, unread=UNREAD,
    made_back=sana_stand_ins,
)  # fmt: skip

SANA = Family(
    "Sana",
    "blocks.0.mlp.inverted_conv.conv.weight",
    {"transformer": TRANSFORMER},
    (Kind("SanaPipeline", lambda shapes: True),),
    apart=("vae", "text_encoder"),
    others=("SanaSprintPipeline", "SanaSprintImg2ImgPipeline", "SanaPAGPipeline"),
)

"""Models of which a single file holds the transformer alone: the rest of their pipelines are files of their own."""

from __future__ import annotations

from converter.libraries.diffusers import DIFFUSERS
from converter.transforms.layouts.chroma import CHROMA_NUMBERS, chroma_config, chroma_rows, chroma_shapes
from converter.transforms.layouts.sana import (
    SANA_NUMBERS,
    UNREAD,
    sana_config,
    sana_rows,
    sana_shapes,
    sana_stand_ins,
)
from converter.transforms.layouts.wan import WAN_NUMBERS, wan_config, wan_rows, wan_shapes
from converter.transforms.single_file.family import Family, Kind, Part

_PREFIXES = ("", "model.diffusion_model.")
_APART = ("vae", "text_encoder", "image_encoder")


def _family(name: str, mark: str, transformer: Part, *pipelines: str) -> Family:
    """Give a family of such models, by the classes of its pipelines, the plain one first."""
    kind = Kind(pipelines[0], lambda shapes: True)
    return Family(name, mark, {"transformer": transformer}, (kind,), others=pipelines[1:], apart=_APART)


_SANA = Part(
    ("SanaTransformer2DModel",), _PREFIXES, DIFFUSERS, sana_rows, sana_shapes,
    config_of=sana_config, numbers=SANA_NUMBERS, unread=UNREAD, made_back=sana_stand_ins,
)  # fmt: skip
_WAN = Part(
    ("WanTransformer3DModel",), _PREFIXES, DIFFUSERS, wan_rows, wan_shapes, config_of=wan_config, numbers=WAN_NUMBERS
)
_CHROMA = Part(
    ("ChromaTransformer2DModel",), _PREFIXES, DIFFUSERS, chroma_rows, chroma_shapes,
    config_of=chroma_config, numbers=CHROMA_NUMBERS,
)  # fmt: skip
_SANAS = ("SanaPipeline", "SanaSprintPipeline", "SanaSprintImg2ImgPipeline", "SanaPAGPipeline")
FAMILIES = (
    _family("Sana", "blocks.0.mlp.inverted_conv.conv.weight", _SANA, *_SANAS),
    _family("Wan", "head.modulation", _WAN, "WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline"),
    _family("Chroma", "distilled_guidance_layer.in_proj.weight", _CHROMA, "ChromaPipeline", "ChromaImg2ImgPipeline"),
)

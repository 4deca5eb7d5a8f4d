"""Models of which a single file holds the transformer alone: the rest of their pipelines are files of their own."""

from __future__ import annotations

from converter.libraries.diffusers import DIFFUSERS
from converter.transforms.layouts import chroma, sana, wan
from converter.transforms.single_file.family import Family, Kind, Part

_PREFIXES = ("", "model.diffusion_model.")
_APART = ("vae", "text_encoder", "image_encoder")

SANA = Family(
    "Sana",
    "blocks.0.mlp.inverted_conv.conv.weight",
    {
        "transformer": Part(
            ("SanaTransformer2DModel",),
            _PREFIXES,
            DIFFUSERS,
            sana.sana_rows,
            sana.sana_shapes,
            config_of=sana.sana_config,
            numbers=sana.SANA_NUMBERS,
            unread=sana.UNREAD,
            made_back=sana.sana_stand_ins,
        )
    },
    (Kind("SanaPipeline", lambda shapes: True),),
    others=("SanaSprintPipeline", "SanaSprintImg2ImgPipeline", "SanaPAGPipeline"),
    apart=_APART,
)
WAN = Family(
    "Wan",
    "head.modulation",
    {
        "transformer": Part(
            ("WanTransformer3DModel",),
            _PREFIXES,
            DIFFUSERS,
            wan.wan_rows,
            wan.wan_shapes,
            config_of=wan.wan_config,
            numbers=wan.WAN_NUMBERS,
        )
    },
    (Kind("WanPipeline", lambda shapes: True),),
    others=("WanImageToVideoPipeline", "WanVideoToVideoPipeline"),
    apart=_APART,
)
CHROMA = Family(
    "Chroma",
    "distilled_guidance_layer.in_proj.weight",
    {
        "transformer": Part(
            ("ChromaTransformer2DModel",),
            _PREFIXES,
            DIFFUSERS,
            chroma.chroma_rows,
            chroma.chroma_shapes,
            config_of=chroma.chroma_config,
            numbers=chroma.CHROMA_NUMBERS,
        )
    },
    (Kind("ChromaPipeline", lambda shapes: True),),
    others=("ChromaImg2ImgPipeline",),
    apart=_APART,
)
FAMILIES = (SANA, WAN, CHROMA)

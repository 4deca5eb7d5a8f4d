"""Flux.1, and its models that fill in or follow another picture: alone, or with what ComfyUI's files have beside it."""

from __future__ import annotations

from converter.libraries.diffusers import DIFFUSERS
from converter.transforms.layouts.flux import FLUX_NUMBERS, flux_config, flux_rows, flux_shapes
from converter.transforms.single_file.encoders import CLIP_L, T5
from converter.transforms.single_file.family import Family, Kind, Part, Shapes
from converter.transforms.single_file.stable_diffusion import VAE

# Black Forest Labs' own file, and those in ComfyUI's ``diffusion_models``, have no prefix; its checkpoints have one.
TRANSFORMER = Part(
    ("FluxTransformer2DModel",), ("model.diffusion_model.", ""), DIFFUSERS, flux_rows,
    flux_shapes, lone="", config_of=flux_config, numbers=FLUX_NUMBERS,
)  # fmt: skip
# Schnell was trained to few steps, and has no guidance.
_SCHNELL = {"scheduler/scheduler_config.json": {"shift": 1.0, "use_dynamic_shifting": False}}


def _inputs(shapes: Shapes) -> float:
    """Give how many pictures a model reads for the one that it draws, by channels."""
    outputs = [*shapes.get("final_layer.linear.weight", ()), 0][0]
    return float([*shapes.get("img_in.weight", ()), 0, 0][1] / (outputs or 1))


def _is_guided(shapes: Shapes) -> bool:
    return "guidance_in.in_layer.weight" in shapes


FLUX = Family(
    "Flux",
    "double_blocks.0.img_mod.lin.weight",
    {
        "transformer": TRANSFORMER,
        "vae": VAE._replace(prefixes=("vae.", "first_stage_model.")),
        "text_encoder": CLIP_L,
        "text_encoder_2": T5,
    },
    (
        Kind("FluxPipeline", lambda shapes: _inputs(shapes) == 1 and _is_guided(shapes)),
        Kind("FluxPipeline", lambda shapes: _inputs(shapes) == 1, " without guidance, as schnell", _SCHNELL),
        Kind("FluxControlPipeline", lambda shapes: _inputs(shapes) == 2, " that follows another picture"),
        # A picture, the mask of it, and what is drawn.
        Kind("FluxFillPipeline", lambda shapes: _inputs(shapes) == 6, " that fills in"),
    ),
    others=(
        *(f"Flux{what}Pipeline" for what in ("Img2Img", "Inpaint", "Kontext", "KontextInpaint")),
        *(f"FluxControl{what}Pipeline" for what in ("Img2Img", "Inpaint")),
    ),
    folder="flux",
)

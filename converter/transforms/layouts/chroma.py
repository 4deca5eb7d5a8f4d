"""What each tensor of Chroma is called by its trainer, and what by Diffusers: Flux, modulated by a model of its own.

The judge is ``convert_chroma_transformer_checkpoint_to_diffusers`` of ``diffusers/loaders/single_file_utils.py``. A
part is a name of ``ChromaTransformer2DModel``.
"""

from __future__ import annotations

from typing import Any

from converter.transforms.layouts.flux import DOUBLE, SINGLE, block_shapes, stream_config
from converter.transforms.layouts.rows import Row, modules, numbered, renamings
from converter.transforms.layouts.sizes import Config, Shapes, Sizes, linears

_GUIDE = "distilled_guidance_layer"
_ENDS = modules(
    {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "final_layer.linear": "proj_out",
        **{f"{_GUIDE}.{name}": f"{_GUIDE}.{name}" for name in ("in_proj", "out_proj")},
    }
)
_LAYER = modules({"in_layer": "linear_1", "out_layer": "linear_2"})
_NORM = renamings({"scale": "weight"})
CHROMA_NUMBERS: dict[str, Any] = {
    "in_channels": 64,
    "out_channels": None,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "patch_size": 1,
    "approximator_num_channels": 64,
    "approximator_hidden_dim": 5120,
    "approximator_layers": 5,
}
"""The numbers in its config, as its class takes them where they are not given."""


def chroma_rows(config: Config) -> list[Row]:
    """Give the rows of ``ChromaTransformer2DModel``."""
    sizes = {**CHROMA_NUMBERS, **config}
    layers = range(sizes["approximator_layers"])
    return [
        *_ENDS,
        *numbered(f"{_GUIDE}.layers", f"{_GUIDE}.layers", layers, _LAYER),
        *numbered(f"{_GUIDE}.norms", f"{_GUIDE}.norms", layers, _NORM),
        *numbered("double_blocks", "transformer_blocks", range(sizes["num_layers"]), DOUBLE),
        *numbered("single_blocks", "single_transformer_blocks", range(sizes["num_single_layers"]), SINGLE),
    ]


def chroma_config(sizes: Sizes) -> dict[str, Any]:
    """Give the config of a file by its names and shapes.

    Raises BadFile for a file that lacks a tensor, BadRequest where names and shapes do not say it.
    """
    config = {
        "_class_name": "ChromaTransformer2DModel",
        **stream_config(sizes),
        "approximator_hidden_dim": sizes.axis(f"{_GUIDE}.in_proj.weight", 0),
        "approximator_layers": sizes.count(f"{_GUIDE}.layers"),
        "approximator_num_channels": sizes.axis(f"{_GUIDE}.in_proj.weight", 1),
    }
    sizes.check(chroma_rows(config))
    return config


def chroma_shapes(config: Config) -> Shapes:
    """Give the shapes of all tensors of a ``ChromaTransformer2DModel``."""
    sizes = {**CHROMA_NUMBERS, **config}
    head, hidden = sizes["attention_head_dim"], sizes["approximator_hidden_dim"]
    width, layers = sizes["num_attention_heads"] * head, range(sizes["approximator_layers"])
    ends = {
        "x_embedder": (width, sizes["in_channels"]),
        "context_embedder": (width, sizes["joint_attention_dim"]),
        "proj_out": (sizes["patch_size"] ** 2 * (sizes["out_channels"] or sizes["in_channels"]), width),
        f"{_GUIDE}.in_proj": (hidden, sizes["approximator_num_channels"]),
        f"{_GUIDE}.out_proj": (width, hidden),
        **{f"{_GUIDE}.layers.{at}.linear_{which}": (hidden, hidden) for at in layers for which in (1, 2)},
    }
    norms = {f"{_GUIDE}.norms.{at}.weight": (hidden,) for at in layers}
    return {**linears(ends), **norms, **block_shapes(sizes, width, head)}

"""What each tensor of Flux.1 is called by Black Forest Labs, and what by Diffusers: of dev, schnell, Fill and such.

The judge is ``convert_flux_transformer_checkpoint_to_diffusers`` of ``diffusers/loaders/single_file_utils.py``. A whole
is a name without the prefix that ComfyUI's checkpoints have, a part one of ``FluxTransformer2DModel``.
"""

from __future__ import annotations

from typing import Any

from converter.transforms.layouts.operations import SWAP, Concat
from converter.transforms.layouts.rows import Row, modules, numbered
from converter.transforms.layouts.sizes import Config, Shapes, Sizes, linears

_ENDS = [
    *modules(
        {
            "img_in": "x_embedder",
            "txt_in": "context_embedder",
            "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
            "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
            "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
            "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
            "final_layer.linear": "proj_out",
        }
    ),
    *modules({"final_layer.adaLN_modulation.1": "norm_out.linear"}, SWAP),
]
_DOUBLE_MODULATION = modules({"img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear"})
_SINGLE_MODULATION = modules({"modulation.lin": "norm.linear"})
_GUIDANCE = modules(
    {
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    }
)
DOUBLE = [
    *modules(
        {
            "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "img_attn.proj": "attn.to_out.0",
            "img_mlp.0": "ff.net.0.proj",
            "img_mlp.2": "ff.net.2",
            "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "txt_attn.proj": "attn.to_add_out",
            "txt_mlp.0": "ff_context.net.0.proj",
            "txt_mlp.2": "ff_context.net.2",
        }
    ),
    # ComfyUI's own model has ``weight``, and so have files that it saved.
    *(
        Row(f"{side}_attn.norm.{which}_norm.{leaf}", (f"attn.norm_{added}{which[0]}.weight",))
        for leaf in ("scale", "weight")
        for side, added in (("img", ""), ("txt", "added_"))
        for which in ("query", "key")
    ),
]
"""What is in a block of two streams, and below in one of one, but for its own modulation."""
SINGLE = [
    *modules({"linear2": "proj_out"}),
    *modules({"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}, Concat((1, 1, 1, 4))),
    *(
        Row(f"norm.{which}_norm.{leaf}", (f"attn.norm_{which[0]}.weight",))
        for leaf in ("scale", "weight")
        for which in ("query", "key")
    ),
]
# Outputs and inputs of what is in a block, as so many times the model's width.
_DOUBLE_WIDTHS = {
    **{f"attn.{name}": (1, 1) for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")},
    **{f"attn.add_{name}_proj": (1, 1) for name in ("q", "k", "v")},
    **dict.fromkeys(("ff.net.0.proj", "ff_context.net.0.proj"), (4, 1)),
    **dict.fromkeys(("ff.net.2", "ff_context.net.2"), (1, 4)),
}
_SINGLE_WIDTHS = {
    **{f"attn.{name}": (1, 1) for name in ("to_q", "to_k", "to_v")},
    "proj_mlp": (4, 1),
    "proj_out": (1, 5),
}
_HEAD, _AXES = 128, [16, 56, 56]  # of all published ones
FLUX_NUMBERS: dict[str, Any] = {
    "out_channels": None,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": _HEAD,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "patch_size": 1,
}
"""The numbers in its config, as its class takes them where they are not given."""


def flux_rows(config: Config) -> list[Row]:
    """Give the rows of ``FluxTransformer2DModel``."""
    sizes = {**FLUX_NUMBERS, **config}
    return [
        *_ENDS,
        *(_GUIDANCE if config.get("guidance_embeds") else ()),
        *numbered("double_blocks", "transformer_blocks", range(sizes["num_layers"]), [*DOUBLE, *_DOUBLE_MODULATION]),
        *numbered(
            "single_blocks",
            "single_transformer_blocks",
            range(sizes["num_single_layers"]),
            [*SINGLE, *_SINGLE_MODULATION],
        ),
    ]


def _published_head(sizes: Sizes) -> tuple[int, list[int]]:
    """Give the size of a head, and how much of it each axis turns. Raises BadRequest where shapes do not say that."""
    norms = [f"double_blocks.0.img_attn.norm.query_norm.{leaf}" for leaf in ("scale", "weight")]
    head = sizes.axis(next((name for name in norms if sizes.has(name)), norms[0]), 0)
    if head != _HEAD:
        raise sizes.unknown(f"how positions are encoded in heads of {head}; those of published models have {_HEAD}")
    return head, _AXES


def stream_config(sizes: Sizes) -> dict[str, Any]:
    """Give what a config says of the two streams and their ends; raises what ``flux_config`` does."""
    head, axes = _published_head(sizes)
    channels, out_channels = sizes.axis("img_in.weight", 1), sizes.axis("final_layer.linear.weight", 0)
    return {
        "attention_head_dim": head,
        "axes_dims_rope": axes,
        "in_channels": channels,
        "joint_attention_dim": sizes.axis("txt_in.weight", 1),
        "num_attention_heads": sizes.ratio("heads", sizes.axis("img_in.weight", 0), head),
        "num_layers": sizes.count("double_blocks"),
        "num_single_layers": sizes.count("single_blocks"),
        "out_channels": None if out_channels == channels else out_channels,
        "patch_size": 1,
    }


def flux_config(sizes: Sizes) -> dict[str, Any]:
    """Give the config of a file by its names and shapes.

    Raises BadFile for a file that lacks a tensor, BadRequest where names and shapes do not say it.
    """
    config = {
        "_class_name": "FluxTransformer2DModel",
        **stream_config(sizes),
        "guidance_embeds": sizes.has("guidance_in.in_layer.weight"),
        "pooled_projection_dim": sizes.axis("vector_in.in_layer.weight", 1),
    }
    sizes.check(flux_rows(config))
    return config


def flux_shapes(config: Config) -> Shapes:
    """Give the shapes of all tensors of a ``FluxTransformer2DModel``."""
    sizes = {**FLUX_NUMBERS, **config}
    head = sizes["attention_head_dim"]
    width = sizes["num_attention_heads"] * head
    out_channels = config.get("out_channels") or sizes["in_channels"]
    embedders = ["timestep", "text", *(["guidance"] if config.get("guidance_embeds") else [])]
    inputs = {"text": sizes["pooled_projection_dim"]}
    shapes = linears(
        {
            "x_embedder": (width, sizes["in_channels"]),
            "context_embedder": (width, sizes["joint_attention_dim"]),
            **{f"time_text_embed.{name}_embedder.linear_1": (width, inputs.get(name, 256)) for name in embedders},
            **{f"time_text_embed.{name}_embedder.linear_2": (width, width) for name in embedders},
            "norm_out.linear": (2 * width, width),
            "proj_out": (sizes["patch_size"] ** 2 * out_channels, width),
        }
    )
    modulations = {
        **{
            f"transformer_blocks.{at}.norm1{side}.linear": 6
            for at in range(sizes["num_layers"])
            for side in ("", "_context")
        },
        **{f"single_transformer_blocks.{at}.norm.linear": 3 for at in range(sizes["num_single_layers"])},
    }
    return {
        **shapes,
        **linears({name: (count * width, width) for name, count in modulations.items()}),
        **block_shapes(sizes, width, head),
    }


def block_shapes(sizes: Config, width: int, head: int) -> Shapes:
    """Give the shapes of what is in the blocks of Flux, but for their own modulations."""
    shapes: Shapes = {}
    for stem, count, widths, added in (
        ("transformer_blocks", sizes["num_layers"], _DOUBLE_WIDTHS, ("", "added_")),
        ("single_transformer_blocks", sizes["num_single_layers"], _SINGLE_WIDTHS, ("",)),
    ):
        for at in range(count):
            shapes |= linears(
                {f"{stem}.{at}.{name}": (out * width, into * width) for name, (out, into) in widths.items()}
            )
            shapes |= {f"{stem}.{at}.attn.norm_{side}{which}.weight": (head,) for side in added for which in ("q", "k")}
    return shapes

"""What each tensor of Stable Diffusion 3 and 3.5 is called by Stability AI, and what by Diffusers.

The judge is ``convert_sd3_transformer_checkpoint_to_diffusers`` of ``diffusers/loaders/single_file_utils.py``. A whole
is a name behind ``model.diffusion_model.``, a part one of ``SD3Transformer2DModel``.
"""

from __future__ import annotations

from typing import Any

from converter.transforms.layouts.operations import SWAP
from converter.transforms.layouts.rows import Row, modules, numbered, renamings
from converter.transforms.layouts.sizes import Config, Shapes, Sizes, linears

_ENDS = [
    *renamings({"pos_embed": "pos_embed.pos_embed"}),
    *modules(
        {
            "x_embedder.proj": "pos_embed.proj",
            "context_embedder": "context_embedder",
            "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
            "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
            "final_layer.linear": "proj_out",
        }
    ),
    *modules({"final_layer.adaLN_modulation.1": "norm_out.linear"}, SWAP),
]
_BLOCK = modules(
    {
        "x_block.adaLN_modulation.1": "norm1.linear",
        "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "x_block.attn.proj": "attn.to_out.0",
        "x_block.mlp.fc1": "ff.net.0.proj",
        "x_block.mlp.fc2": "ff.net.2",
        "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    }
)
_NORMS = renamings(
    {
        f"{block}.attn.ln_{which}.weight": f"attn.norm_{added}{which}.weight"
        for block, added in (("x_block", ""), ("context_block", "added_"))
        for which in ("q", "k")
    }
)
_CONTEXT = modules(
    {
        "context_block.adaLN_modulation.1": "norm1_context.linear",
        "context_block.attn.proj": "attn.to_add_out",
        "context_block.mlp.fc1": "ff_context.net.0.proj",
        "context_block.mlp.fc2": "ff_context.net.2",
    }
)
# The last block does not go on with the text: it has but a shift and a scale for it, the other way round.
_LAST_CONTEXT = modules({"context_block.adaLN_modulation.1": "norm1_context.linear"}, SWAP)
_DUAL = modules(
    {
        "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "x_block.attn2.proj": "attn2.to_out.0",
    }
)
_DUAL_NORMS = renamings({f"x_block.attn2.ln_{which}.weight": f"attn2.norm_{which}.weight" for which in ("q", "k")})
# Outputs and inputs of what is in a block, as so many times the model's width.
_WIDTHS = {
    **{f"attn.{name}": (1, 1) for name in ("to_q", "to_k", "to_v", "to_out.0")},
    **{f"attn.add_{name}_proj": (1, 1) for name in ("q", "k", "v")},
    "ff.net.0.proj": (4, 1),
    "ff.net.2": (1, 4),
}
_CONTEXT_WIDTHS = {
    "norm1_context.linear": (6, 1),
    "attn.to_add_out": (1, 1),
    "ff_context.net.0.proj": (4, 1),
    "ff_context.net.2": (1, 4),
}
_DUAL_WIDTHS = {f"attn2.{name}": (1, 1) for name in ("to_q", "to_k", "to_v", "to_out.0")}
_HEAD = 64  # of all published ones
SD3_NUMBERS: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 18,
    "attention_head_dim": _HEAD,
    "num_attention_heads": 18,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 96,
    "dual_attention_layers": [],
}
"""The numbers in its config, as its class takes them where they are not given."""


def sd3_rows(config: Config) -> list[Row]:
    """Give the rows of ``SD3Transformer2DModel``."""
    rows = list(_ENDS)
    for at in range(config.get("num_layers", SD3_NUMBERS["num_layers"])):
        rows += numbered("joint_blocks", "transformer_blocks", range(at, at + 1), _block_rows(config, at))
    return rows


def _block_rows(config: Config, at: int) -> list[Row]:
    is_last = at == config.get("num_layers", SD3_NUMBERS["num_layers"]) - 1
    is_dual, has_norms = at in config.get("dual_attention_layers", ()), bool(config.get("qk_norm"))
    return [
        *_BLOCK,
        *(_LAST_CONTEXT if is_last else _CONTEXT),
        *(_NORMS if has_norms else ()),
        *(_DUAL if is_dual else ()),
        *(_DUAL_NORMS if is_dual and has_norms else ()),
    ]


def sd3_config(sizes: Sizes) -> dict[str, Any]:
    """Give the config of a file by its names and shapes.

    Raises BadFile for a file that lacks a tensor, BadRequest where names and shapes do not say it.
    """
    norm = "joint_blocks.0.x_block.attn.ln_q.weight"
    head = sizes.axis(norm, 0) if sizes.has(norm) else _HEAD
    patch, blocks = sizes.axis("x_embedder.proj.weight", 2), sizes.count("joint_blocks")
    config = {
        "_class_name": "SD3Transformer2DModel",
        "attention_head_dim": head,
        "caption_projection_dim": sizes.axis("context_embedder.weight", 0),
        "dual_attention_layers": [
            at for at in range(blocks) if sizes.has(f"joint_blocks.{at}.x_block.attn2.qkv.weight")
        ],
        "in_channels": sizes.axis("x_embedder.proj.weight", 1),
        "joint_attention_dim": sizes.axis("context_embedder.weight", 1),
        "num_attention_heads": sizes.ratio("heads", sizes.axis("x_embedder.proj.weight", 0), head),
        "num_layers": blocks,
        "out_channels": sizes.ratio("channels", sizes.axis("final_layer.linear.weight", 0), patch**2),
        "patch_size": patch,
        "pooled_projection_dim": sizes.axis("y_embedder.mlp.0.weight", 1),
        "pos_embed_max_size": sizes.root("pos_embed", 1),
        "qk_norm": "rms_norm" if sizes.has(norm) else None,
        "sample_size": 128,
    }
    sizes.check(sd3_rows(config))
    return config


def sd3_shapes(config: Config) -> Shapes:
    """Give the shapes of all tensors of a ``SD3Transformer2DModel``."""
    sizes = {**SD3_NUMBERS, **config}
    head = sizes["attention_head_dim"]
    width, text = sizes["num_attention_heads"] * head, sizes["caption_projection_dim"]
    shapes = linears(
        {
            "pos_embed.proj": (width, sizes["in_channels"], *(sizes["patch_size"],) * 2),
            "context_embedder": (text, sizes["joint_attention_dim"]),
            "time_text_embed.timestep_embedder.linear_1": (width, 256),
            "time_text_embed.timestep_embedder.linear_2": (width, width),
            "time_text_embed.text_embedder.linear_1": (width, sizes["pooled_projection_dim"]),
            "time_text_embed.text_embedder.linear_2": (width, width),
            "norm_out.linear": (2 * width, width),
            "proj_out": (sizes["patch_size"] ** 2 * (sizes["out_channels"] or sizes["in_channels"]), width),
        }
    )
    shapes["pos_embed.pos_embed"] = (1, sizes["pos_embed_max_size"] ** 2, width)
    has_norms = bool(config.get("qk_norm"))
    for at in range(sizes["num_layers"]):
        is_dual = at in config.get("dual_attention_layers", ())
        widths = {
            **_WIDTHS,
            "norm1.linear": (9 if is_dual else 6, 1),
            **(_CONTEXT_WIDTHS if at < sizes["num_layers"] - 1 else {"norm1_context.linear": (2, 1)}),
            **(_DUAL_WIDTHS if is_dual else {}),
        }
        norms = ["attn.norm_", "attn.norm_added_", *(["attn2.norm_"] if is_dual else [])] if has_norms else []
        block = f"transformer_blocks.{at}"
        shapes |= linears({f"{block}.{name}": (out * width, into * width) for name, (out, into) in widths.items()})
        shapes |= {f"{block}.{name}{which}.weight": (head,) for name in norms for which in ("q", "k")}
    return shapes

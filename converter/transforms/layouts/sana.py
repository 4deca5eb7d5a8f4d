"""What each tensor of Sana is called by NVIDIA, and what by Diffusers: 1.0, 1.5 and Sprint.

The judges are ``convert_sana_transformer_to_diffusers`` of ``diffusers/loaders/single_file_utils.py`` and, for what has
norms of queries and keys or is guided, ``scripts/convert_sana_to_diffusers.py`` of Diffusers. A part is a name of
``SanaTransformer2DModel``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from converter.tensors.base import Tensor
from converter.tensors.derived import Zeros
from converter.transforms.layouts.rows import Row, modules, numbered, renamings
from converter.transforms.layouts.sizes import Config, Shapes, Sizes, linears

UNREAD = ("pos_embed", "y_embedder.y_embedding", "logvar_linear.weight", "logvar_linear.bias")
"""What the original has and Diffusers does not: a table that follows from its size, the text that stands for none in
training, drawn at random and never trained, and a head of the training's loss."""

_ENDS = [
    *modules(
        {
            "x_embedder.proj": "patch_embed.proj",
            "t_block.1": "time_embed.linear",
            "y_embedder.y_proj.fc1": "caption_projection.linear_1",
            "y_embedder.y_proj.fc2": "caption_projection.linear_2",
            "final_layer.linear": "proj_out",
        }
    ),
    *renamings(
        {"attention_y_norm.weight": "caption_norm.weight", "final_layer.scale_shift_table": "scale_shift_table"}
    ),
]
_BLOCK = [
    *renamings({"scale_shift_table": "scale_shift_table", "mlp.point_conv.conv.weight": "ff.conv_point.weight"}),
    *modules(
        {
            "attn.proj": "attn1.to_out.0",
            "cross_attn.q_linear": "attn2.to_q",
            "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
            "cross_attn.proj": "attn2.to_out.0",
            "mlp.inverted_conv.conv": "ff.conv_inverted",
            "mlp.depth_conv.conv": "ff.conv_depth",
        }
    ),
]
_ATTENTION = modules({"attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v")})
_NORMS = renamings(
    {
        f"{here}.{which}_norm.weight": f"{there}.norm_{which}.weight"
        for here, there in (("attn", "attn1"), ("cross_attn", "attn2"))
        for which in ("q", "k")
    }
)
_HEAD = 32  # of all published ones
# Heads of the attention to the text, and their size, by the model's width: shapes do not say it.
_CROSS_HEADS = {2240: (20, 112), 1152: (16, 72)}
# For pictures of 2,048 and 4,096 pixels positions are added, and for smaller ones none.
_INTERPOLATION = {64: 1.0, 128: 2.0}
_TOKENS = 300  # of a text
SANA_NUMBERS: dict[str, Any] = {
    "in_channels": 32,
    "out_channels": 32,
    "num_attention_heads": 70,
    "attention_head_dim": _HEAD,
    "num_layers": 20,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
    "sample_size": 32,
    "patch_size": 1,
}
"""The numbers in its config, as its class takes them where they are not given."""


def sana_rows(config: Config) -> list[Row]:
    """Give the rows of ``SanaTransformer2DModel``."""
    guided = bool(config.get("guidance_embeds"))
    timestep = "time_embed.timestep_embedder" if guided else "time_embed.emb.timestep_embedder"
    embedders = {"t_embedder": timestep, **({"cfg_embedder": "time_embed.guidance_embedder"} if guided else {})}
    times = {f"{here}.mlp.{at}": f"{there}.linear_{1 + at // 2}" for here, there in embedders.items() for at in (0, 2)}
    block = [*_BLOCK, *(_ATTENTION if config.get("attention_bias") else _ATTENTION[:1])]
    block += _NORMS if config.get("qk_norm") else []
    return [
        *_ENDS,
        *modules(times),
        *numbered("blocks", "transformer_blocks", range(config.get("num_layers", SANA_NUMBERS["num_layers"])), block),
    ]


def sana_config(sizes: Sizes) -> dict[str, Any]:
    """Give the config of a file by its names and shapes.

    Raises BadFile for a file that lacks a tensor, BadRequest where names and shapes do not say it.
    """
    if sizes.has("cfg_embedder.mlp.0.weight"):
        raise sizes.unknown("how its steps are counted, as Sana Sprint's are")
    width, patch = sizes.axis("x_embedder.proj.weight", 0), sizes.axis("x_embedder.proj.weight", 2)
    if width not in _CROSS_HEADS:
        raise sizes.unknown(
            f"how many heads read the text: published models are {' or '.join(map(str, _CROSS_HEADS))} wide"
        )
    cross_heads, cross_head = _CROSS_HEADS[width]
    side = patch * sizes.root("pos_embed", 1)
    hidden = sizes.axis("blocks.0.mlp.point_conv.conv.weight", 1)
    config = {
        "_class_name": "SanaTransformer2DModel",
        "attention_bias": sizes.has("blocks.0.attn.qkv.bias"),
        "attention_head_dim": _HEAD,
        "caption_channels": sizes.axis("y_embedder.y_proj.fc1.weight", 1),
        "cross_attention_dim": width,
        "cross_attention_head_dim": cross_head,
        "dropout": 0.0,
        "guidance_embeds": False,
        "in_channels": sizes.axis("x_embedder.proj.weight", 1),
        "interpolation_scale": _INTERPOLATION.get(side),
        "mlp_ratio": hidden / width,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "num_attention_heads": width // _HEAD,
        "num_cross_attention_heads": cross_heads,
        "num_layers": sizes.count("blocks"),
        "out_channels": sizes.ratio("channels", sizes.axis("final_layer.linear.weight", 0), patch**2),
        "patch_size": patch,
        "qk_norm": "rms_norm_across_heads" if sizes.has("blocks.0.attn.q_norm.weight") else None,
        "sample_size": side,
    }
    sizes.check(sana_rows(config))
    return config


def sana_shapes(config: Config) -> Shapes:
    """Give the shapes of all tensors of a ``SanaTransformer2DModel``."""
    sizes = {**SANA_NUMBERS, **config}
    width = sizes["num_attention_heads"] * sizes["attention_head_dim"]
    guided = bool(config.get("guidance_embeds"))
    embedders = ["timestep_embedder", "guidance_embedder"] if guided else ["emb.timestep_embedder"]
    shapes = linears(
        {
            "patch_embed.proj": (width, sizes["in_channels"], *(sizes["patch_size"],) * 2),
            "caption_projection.linear_1": (width, sizes["caption_channels"]),
            "caption_projection.linear_2": (width, width),
            **{f"time_embed.{name}.linear_1": (width, 256) for name in embedders},
            **{f"time_embed.{name}.linear_2": (width, width) for name in embedders},
            "time_embed.linear": (6 * width, width),
            "proj_out": (sizes["patch_size"] ** 2 * (sizes["out_channels"] or sizes["in_channels"]), width),
        }
    )
    shapes |= {"caption_norm.weight": (width,), "scale_shift_table": (2, width)}
    for at in range(sizes["num_layers"]):
        shapes |= {f"transformer_blocks.{at}.{name}": shape for name, shape in _block_shapes(sizes, width).items()}
    return shapes


def _block_shapes(sizes: Config, width: int) -> Shapes:
    crossed = sizes["num_cross_attention_heads"] * sizes["cross_attention_head_dim"]
    hidden = int(sizes["mlp_ratio"] * width)
    shapes = linears(
        {
            **{f"attn1.{name}": (width, width) for name in ("to_q", "to_k", "to_v", "to_out.0")},
            "attn2.to_q": (crossed, width),
            **{f"attn2.{name}": (crossed, sizes["cross_attention_dim"]) for name in ("to_k", "to_v")},
            "attn2.to_out.0": (width, crossed),
            "ff.conv_inverted": (2 * hidden, width, 1, 1),
            "ff.conv_depth": (2 * hidden, 1, 3, 3),
            "ff.conv_point": (width, hidden, 1, 1),
        }
    )
    shapes["scale_shift_table"] = (6, width)
    unbiased = ["ff.conv_point", *(f"attn1.to_{name}" for name in "qkv" if not sizes.get("attention_bias"))]
    for name in unbiased:
        del shapes[f"{name}.bias"]
    if sizes.get("qk_norm"):
        shapes |= {f"attn1.norm_{which}.weight": (width,) for which in "qk"}
        shapes |= {f"attn2.norm_{which}.weight": (crossed,) for which in "qk"}
    return shapes


def sana_stand_ins(config: Config, tensors: Sequence[Tensor]) -> list[tuple[Tensor, str]]:
    """Give what readers of the original look for and make no use of, and what it is: zeros, in the dtype of the others.

    ``convert_sana_transformer_to_diffusers`` drops both and fails where one is missing; ``app/sana_pipeline.py`` of
    NVlabs/Sana drops the one, and puts the text encoder's own in the other's place.
    """
    sizes = {**SANA_NUMBERS, **config}
    width = sizes["num_attention_heads"] * sizes["attention_head_dim"]
    places = (sizes["sample_size"] // sizes["patch_size"]) ** 2
    dtype = tensors[0].dtype
    shapes = {"pos_embed": (1, places, width), "y_embedder.y_embedding": (_TOKENS, sizes["caption_channels"])}
    return [(Tensor(name, Zeros(dtype, shape)), "zeros") for name, shape in shapes.items()]

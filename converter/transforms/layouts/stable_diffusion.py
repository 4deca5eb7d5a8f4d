"""What each tensor of Stable Diffusion is called by its trainer, and what by Diffusers and transformers.

A whole is a name in a single file without its part's prefix, a part the one that ``from_single_file`` gives it
(``diffusers/loaders/single_file_utils.py``). What depends on a model's size is asked of its config, and rows are made
with it: the trainer numbers all blocks of a UNet in a row, and those of a decoder from its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from converter.transforms.layouts.operations import CONCAT, PIXEL, TRANSPOSE
from converter.transforms.layouts.rows import Row, renamings, within

Config = Mapping[str, Any]
_Names = Mapping[str, str]

_UNET = {
    "time_embed.0.*": "time_embedding.linear_1.*",
    "time_embed.2.*": "time_embedding.linear_2.*",
    "label_emb.0.0.*": "add_embedding.linear_1.*",
    "label_emb.0.2.*": "add_embedding.linear_2.*",
    "input_blocks.0.0.*": "conv_in.*",
    "out.0.*": "conv_norm_out.*",
    "out.2.*": "conv_out.*",
}
_RESNET = {
    "in_layers.0.*": "norm1.*",
    "in_layers.2.*": "conv1.*",
    "emb_layers.1.*": "time_emb_proj.*",
    "out_layers.0.*": "norm2.*",
    "out_layers.3.*": "conv2.*",
    "skip_connection.*": "conv_shortcut.*",
}
_TRANSFORMER = (
    *(f"attn{which}.{layer}.*" for which in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0")),
    *("ff.net.0.proj.*", "ff.net.2.*", "norm1.*", "norm2.*", "norm3.*"),
)
_ATTENTION = {
    name: name
    for name in ("norm.*", "proj_in.*", "proj_out.*", *(f"transformer_blocks.{{}}.{n}" for n in _TRANSFORMER))
}
UP_BLOCKS = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
"""What Diffusers takes where a config has none."""

_CODER = {"conv_in.*": "conv_in.*", "norm_out.*": "conv_norm_out.*", "conv_out.*": "conv_out.*"}
_CODER_RESNET = {
    **{name: name for name in ("norm1.*", "conv1.*", "norm2.*", "conv2.*")},
    "nin_shortcut.*": "conv_shortcut.*",
}
_CODER_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
# What Diffusers called them up to 0.16, and still reads.
_OLD_ATTENTION = {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}

_CLIP_LAYER = (
    *("layer_norm1.*", "layer_norm2.*", "mlp.fc1.*", "mlp.fc2.*"),
    *(f"self_attn.{which}_proj.*" for which in ("q", "k", "v", "out")),
)
_CLIP = (
    *("embeddings.token_embedding.*", "embeddings.position_embedding.*", "embeddings.position_ids"),
    "final_layer_norm.*",
    *(f"encoder.layers.{{}}.{name}" for name in _CLIP_LAYER),
)
_OPEN_CLIP = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.*": "embeddings.token_embedding.*",
    "ln_final.*": "final_layer_norm.*",
}
_OPEN_CLIP_LAYER = {
    "ln_1.*": "layer_norm1.*",
    "ln_2.*": "layer_norm2.*",
    "mlp.c_fc.*": "mlp.fc1.*",
    "mlp.c_proj.*": "mlp.fc2.*",
    "attn.out_proj.*": "self_attn.out_proj.*",
}


def unet_rows(config: Config) -> list[Row]:
    """Give the rows of a UNet, ``UNet2DConditionModel``."""
    rows = renamings(_UNET)
    for source, target, names in _unet_blocks(config):
        rows += within(source, target, names)
    return rows


def _unet_blocks(config: Config) -> Iterator[tuple[str, str, _Names]]:
    """Give each module of many tensors: its name here and there, and the table of what is in it."""
    yield "middle_block.0", "mid_block.resnets.0", _RESNET
    yield "middle_block.1", "mid_block.attentions.0", _ATTENTION
    yield "middle_block.2", "mid_block.resnets.1", _RESNET
    layers = config.get("layers_per_block", 2)
    for block, kind in enumerate(config.get("up_block_types", UP_BLOCKS)):
        down, up, first = f"down_blocks.{block}", f"up_blocks.{block}", block * (layers + 1)
        for layer in range(layers + 1):
            yield f"output_blocks.{first + layer}.0", f"{up}.resnets.{layer}", _RESNET
            yield f"output_blocks.{first + layer}.1", f"{up}.attentions.{layer}", _ATTENTION
        for layer in range(layers):
            yield f"input_blocks.{first + layer + 1}.0", f"{down}.resnets.{layer}", _RESNET
            yield f"input_blocks.{first + layer + 1}.1", f"{down}.attentions.{layer}", _ATTENTION
        yield f"input_blocks.{first + layers + 1}.0", f"{down}.downsamplers.0", {"op.*": "conv.*"}
        after = 2 if has_attention(kind) else 1
        yield f"output_blocks.{first + layers}.{after}", f"{up}.upsamplers.0", {"conv.*": "conv.*"}


def has_attention(kind: object) -> bool:
    """Say whether a kind of block, as a config names it, has attention."""
    return isinstance(kind, str) and "CrossAttn" in kind


def has_projection(config: Config) -> bool:
    """Say whether a CLIP has a projection, by the class that its config names."""
    architectures = config.get("architectures")
    return isinstance(architectures, list) and "CLIPTextModelWithProjection" in architectures


def vae_rows(config: Config) -> list[Row]:
    """Give the rows of a VAE, ``AutoencoderKL``."""
    rows = renamings({name: name for name in ("quant_conv.*", "post_quant_conv.*")})
    for side in ("encoder", "decoder"):
        middle, attention = f"{side}.mid_block", f"{side}.mid_block.attentions.0"
        rows += within(side, side, _CODER)
        rows += within(f"{side}.mid.block_1", f"{middle}.resnets.0", _CODER_RESNET)
        rows += within(f"{side}.mid.block_2", f"{middle}.resnets.1", _CODER_RESNET)
        rows += within(f"{side}.mid.attn_1", attention, {"norm.*": "group_norm.*"})
        for here, there in (*_CODER_ATTENTION.items(), *_OLD_ATTENTION.items()):
            rows += within(f"{side}.mid.attn_1", attention, {f"{here}.bias": f"{there}.bias"})
            rows.append(Row(f"{side}.mid.attn_1.{here}.weight", (f"{attention}.{there}.weight",), PIXEL))
    rows += within("encoder.down.{}.block.{}", "encoder.down_blocks.{}.resnets.{}", _CODER_RESNET)
    rows += renamings({"encoder.down.{}.downsample.conv.*": "encoder.down_blocks.{}.downsamplers.0.conv.*"})
    blocks = len(config.get("up_block_types", ()))
    for block in range(blocks):
        here, there = f"decoder.up.{blocks - 1 - block}", f"decoder.up_blocks.{block}"
        rows += within(f"{here}.block.{{}}", f"{there}.resnets.{{}}", _CODER_RESNET)
        rows += renamings({f"{here}.upsample.conv.*": f"{there}.upsamplers.0.conv.*"})
    return rows


def clip_rows(config: Config) -> list[Row]:
    """Give the rows of OpenAI's CLIP in the classes of transformers, version 5 of which leaves ``text_model.`` out.

    So do single files that Diffusers' scripts made with it, and no other program reads those.
    """
    return [
        *renamings({"text_projection.weight": "text_projection.weight"} if has_projection(config) else {}),
        *renamings({f"text_model.{name}": f"text_model.{name}" for name in _CLIP}),
        *renamings({name: f"text_model.{name}" for name in _CLIP}),
        *renamings({f"text_model.{name}": name for name in _CLIP}),
    ]


def open_clip_rows(config: Config) -> list[Row]:
    """Give the rows of OpenCLIP, for the layers that its config has: Stable Diffusion 2 does not read the last.

    Version 5 of transformers leaves ``text_model.`` out of the names of one class, and not of the other.
    """
    rows = []
    if has_projection(config):
        rows.append(Row("text_projection", ("text_projection.weight",), TRANSPOSE))
    for prefix in ("text_model.", ""):
        rows += renamings({here: f"{prefix}{there}" for here, there in _OPEN_CLIP.items()})
        for layer in range(config.get("num_hidden_layers", 0)):
            here, there = f"transformer.resblocks.{layer}", f"{prefix}encoder.layers.{layer}"
            rows += within(here, there, _OPEN_CLIP_LAYER)
            for leaf in ("weight", "bias"):
                parts = tuple(f"{there}.self_attn.{which}_proj.{leaf}" for which in ("q", "k", "v"))
                rows.append(Row(f"{here}.attn.in_proj_{leaf}", parts, CONCAT))
    return rows

"""How large each tensor of Stable Diffusion is, as a config says: of its UNet, its VAE and CLIP, in their own classes.

The names are those of Diffusers and transformers, and all of a class are there. A number that a config lacks where
there should be one is 0, which no tensor has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from converter.transforms.layouts.sizes import Config, Shapes, linears
from converter.transforms.layouts.stable_diffusion import UP_BLOCKS, has_attention, has_projection

DOWN_BLOCKS = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
UNET_NUMBERS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "time_embedding_dim": None,
    "projection_class_embeddings_input_dim": None,
}
"""The numbers in a config, as ``UNet2DConditionModel`` takes them where they are not given."""
UNET_WORDS: dict[str, tuple[Any, ...]] = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": (None, "text_time"),
    "use_linear_projection": (False, True),
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False, None),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
"""What else a config may say. All but the first few is the same in every UNet of a single file, which cannot say it."""
VAE_NUMBERS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [64],
    "layers_per_block": 1,
}
"""The numbers in a config, as ``AutoencoderKL`` takes them where they are not given."""
VAE_WORDS: dict[str, tuple[Any, ...]] = {
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "use_quant_conv": (True, False),
    "use_post_quant_conv": (True, False),
    "act_fn": ("silu", "swish"),
    "mid_block_add_attention": (True,),
}
CLIP_NUMBERS: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "max_position_embeddings": 77,
}
"""The numbers in a config, as ``CLIPTextConfig`` takes them where they are not given."""
CLIP_WORDS: dict[str, tuple[Any, ...]] = {"hidden_act": ("quick_gelu", "gelu")}


def unet_shapes(config: Config) -> Shapes:
    """Give the shapes of all tensors of a ``UNet2DConditionModel``."""
    sizes = {**UNET_NUMBERS, **config}
    widths, layers, cross = sizes["block_out_channels"], sizes["layers_per_block"], sizes["cross_attention_dim"]
    is_linear = bool(config.get("use_linear_projection"))
    downs, ups = config.get("down_block_types", DOWN_BLOCKS), config.get("up_block_types", UP_BLOCKS)
    first, last, time = widths[0], widths[-1], sizes["time_embedding_dim"] or 4 * widths[0]
    depths = sizes["transformer_layers_per_block"]
    back = sizes["reverse_transformer_layers_per_block"]
    back = back or (depths if isinstance(depths, int) else [*reversed(depths)])
    ends: dict[str, tuple[int, ...]] = {
        "conv_in": (first, sizes["in_channels"], *(sizes["conv_in_kernel"],) * 2),
        "time_embedding.linear_1": (time, first),
        "time_embedding.linear_2": (time, time),
        "conv_norm_out": (first,),
        "conv_out": (sizes["out_channels"], first, *(sizes["conv_out_kernel"],) * 2),
    }
    if config.get("addition_embed_type"):
        ends["add_embedding.linear_1"] = (time, sizes["projection_class_embeddings_input_dim"] or 0)
        ends["add_embedding.linear_2"] = (time, time)
    shapes = linears(ends)
    for at, kind in enumerate(downs):
        block, width = f"down_blocks.{at}", _at(widths, at)
        for layer in range(layers):
            into = width if layer else _at(widths, max(at - 1, 0))
            shapes |= linears(_resnet(f"{block}.resnets.{layer}", into, width, time))
            if has_attention(kind):
                depth = _depth(depths, at, layer)
                shapes |= _attention(f"{block}.attentions.{layer}", width, cross, depth, is_linear)
        if at < len(widths) - 1:
            shapes |= linears({f"{block}.downsamplers.0.conv": (width, width, 3, 3)})
    kind = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    if kind is not None:
        shapes |= linears(_resnet("mid_block.resnets.0", last, last, time))
    if has_attention(kind):
        depth = _depth(depths, len(widths) - 1, 0)
        shapes |= _attention("mid_block.attentions.0", last, cross, depth, is_linear)
        shapes |= linears(_resnet("mid_block.resnets.1", last, last, time))
    upwards = [*reversed(widths)]
    for at, kind in enumerate(ups):
        block, width = f"up_blocks.{at}", _at(upwards, at)
        for layer in range(layers + 1):
            into = width if layer else _at(upwards, max(at - 1, 0))
            # Each reads what the block downwards had at its place, and the last what that had read.
            beside = _at(upwards, min(at + 1, len(upwards) - 1)) if layer == layers else width
            shapes |= linears(_resnet(f"{block}.resnets.{layer}", into + beside, width, time))
            if has_attention(kind):
                depth = _depth(back, at, layer)
                shapes |= _attention(f"{block}.attentions.{layer}", width, cross, depth, is_linear)
        if at < len(widths) - 1:
            shapes |= linears({f"{block}.upsamplers.0.conv": (width, width, 3, 3)})
    return shapes


def vae_shapes(config: Config) -> Shapes:
    """Give the shapes of all tensors of an ``AutoencoderKL``."""
    sizes = {**VAE_NUMBERS, **config}
    widths, layers, latents = sizes["block_out_channels"], sizes["layers_per_block"], sizes["latent_channels"]
    first, last = widths[0], widths[-1]
    modules: dict[str, tuple[int, ...]] = {
        "encoder.conv_in": (first, sizes["in_channels"], 3, 3),
        "encoder.conv_norm_out": (last,),
        "encoder.conv_out": (2 * latents, last, 3, 3),
        "decoder.conv_in": (last, latents, 3, 3),
        "decoder.conv_norm_out": (first,),
        "decoder.conv_out": (sizes["out_channels"], first, 3, 3),
    }
    if sizes.get("use_quant_conv", True):
        modules["quant_conv"] = (2 * latents, 2 * latents, 1, 1)
    if sizes.get("use_post_quant_conv", True):
        modules["post_quant_conv"] = (latents, latents, 1, 1)
    for side in ("encoder", "decoder"):
        middle = f"{side}.mid_block"
        modules |= _resnet(f"{middle}.resnets.0", last, last) | _resnet(f"{middle}.resnets.1", last, last)
        modules[f"{middle}.attentions.0.group_norm"] = (last,)
        modules |= {f"{middle}.attentions.0.{name}": (last, last) for name in ("to_q", "to_k", "to_v", "to_out.0")}
    for stem, sampler, count, along in (
        ("encoder.down_blocks", "downsamplers", layers, widths),
        ("decoder.up_blocks", "upsamplers", layers + 1, [*reversed(widths)]),
    ):
        side, _, which = stem.partition(".")
        for at in range(len(config.get(f"{which.removesuffix('s')}_types", (side,)))):
            block, width = f"{stem}.{at}", _at(along, at)
            for layer in range(count):
                modules |= _resnet(f"{block}.resnets.{layer}", width if layer else _at(along, max(at - 1, 0)), width)
            if at < len(widths) - 1:
                modules[f"{block}.{sampler}.0.conv"] = (width, width, 3, 3)
    return linears(modules)


def clip_shapes(config: Config) -> Shapes:
    """Give the shapes of all tensors of ``CLIPTextModel`` or ``CLIPTextModelWithProjection``, as version 4 has them."""
    sizes = {**CLIP_NUMBERS, **config}
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    modules: dict[str, tuple[int, ...]] = {"text_model.final_layer_norm": (width,)}
    for at in range(sizes["num_hidden_layers"]):
        layer = f"text_model.encoder.layers.{at}"
        modules |= {f"{layer}.self_attn.{which}_proj": (width, width) for which in ("q", "k", "v", "out")}
        modules |= {f"{layer}.layer_norm{which}": (width,) for which in (1, 2)}
        modules |= {f"{layer}.mlp.fc1": (inner, width), f"{layer}.mlp.fc2": (width, inner)}
    shapes = linears(modules)
    for name, length in (("token", "vocab_size"), ("position", "max_position_embeddings")):
        shapes[f"text_model.embeddings.{name}_embedding.weight"] = (sizes[length], width)
    if has_projection(config):
        shapes["text_projection.weight"] = (sizes["projection_dim"], width)
    return shapes


def _resnet(name: str, into: int, out: int, time: int = 0) -> dict[str, tuple[int, ...]]:
    """Give the shapes of the modules of a ``ResnetBlock2D``, which reads the ``time`` if that has a width."""
    modules: dict[str, tuple[int, ...]] = {
        f"{name}.norm1": (into,),
        f"{name}.conv1": (out, into, 3, 3),
        f"{name}.norm2": (out,),
        f"{name}.conv2": (out, out, 3, 3),
    }
    if time:
        modules[f"{name}.time_emb_proj"] = (out, time)
    if into != out:
        modules[f"{name}.conv_shortcut"] = (out, into, 1, 1)
    return modules


def _attention(name: str, width: int, cross: int, depth: int, is_linear: bool) -> Shapes:
    """Give the shapes of a ``Transformer2DModel`` of so many blocks, which reads texts that are ``cross`` wide."""
    ends = (width, width) if is_linear else (width, width, 1, 1)
    modules: dict[str, tuple[int, ...]] = {f"{name}.norm": (width,), f"{name}.proj_in": ends, f"{name}.proj_out": ends}
    shapes: Shapes = {}
    for at in range(depth):
        block = f"{name}.transformer_blocks.{at}"
        modules |= {f"{block}.norm{which}": (width,) for which in (1, 2, 3)}
        modules |= {f"{block}.attn{which}.to_out.0": (width, width) for which in (1, 2)}
        modules |= {f"{block}.ff.net.0.proj": (8 * width, width), f"{block}.ff.net.2": (width, 4 * width)}
        shapes |= {f"{block}.{layer}.weight": (width, width) for layer in (*_OWN, "attn2.to_q")}
        shapes |= {f"{block}.attn2.{layer}.weight": (width, cross) for layer in ("to_k", "to_v")}
    return shapes | linears(modules)


_OWN = ("attn1.to_q", "attn1.to_k", "attn1.to_v")


def _at(values: Sequence[int], at: int) -> int:
    return values[at] if at < len(values) else 0


def _depth(depths: Any, block: int, layer: int) -> int:
    """Give how many blocks a transformer has, of what a config says: for all, by blocks, or by their layers too."""
    for at in (block, layer):
        depths = depths if isinstance(depths, int) else _at(depths, at)
    return depths if isinstance(depths, int) else 0

"""How large the parts of a pipeline are, as their configs say, and whether the tensors of a single file are that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from converter.errors import BadRequest
from converter.storage import Place
from converter.transforms.layouts.stable_diffusion import UP_BLOCKS, has_attention
from converter.transforms.single_file.family import Config, Shapes

_MAX_COUNT = 64  # of layers, of blocks: real ones have up to 32, and a table has rows for each layer of each block
_CONFIG_TYPES = {
    "layers_per_block": int,
    "num_hidden_layers": int,
    "block_out_channels": list,
    "up_block_types": list,
    "architectures": list,
}


# Of a picture's side, and of layers, whose tables would be long otherwise.
_MOST = {"sample_size": 512, "num_layers": _MAX_COUNT, "num_single_layers": _MAX_COUNT}
_WIDEST = 1 << 20


def check_config(path: Place, config: Config, numbers: Config) -> None:
    """Raise BadRequest for a config whose numbers cannot be: those of all parts, and a part's own by their defaults."""
    wrong = next((key for key, default in numbers.items() if not _may_be(key, config.get(key, default), default)), None)
    if wrong is not None:
        raise BadRequest(path, f"has a {wrong} that this cannot be: {config[wrong]!r:.60}", "Give the right --config.")
    for key, kind in _CONFIG_TYPES.items():
        if key in config and not (type(config[key]) is kind and 0 < _count(config[key]) <= _MAX_COUNT):
            raise BadRequest(path, f"has a {key} that this cannot be: {config[key]!r}", "Give the right --config.")


def _may_be(key: str, value: Any, default: Any) -> bool:
    """Say whether a config's value can be in the place of a default: a number, some numbers, or none."""
    if value is None:
        return default is None or key == "out_channels"
    if isinstance(default, list):
        return isinstance(value, list) and len(value) <= _MAX_COUNT and all(_is_place(one) for one in value)
    is_number = type(value) in ((int, float) if isinstance(default, float) else (int,))
    return is_number and 0 < value <= _MOST.get(key, _WIDEST)


def _is_place(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _WIDEST


def _count(value: Any) -> int:
    return len(value) if isinstance(value, list) else int(value)


def check_shapes(source: Place, what: str, expected: Shapes, shapes: Shapes) -> None:
    """Raise BadRequest where a part is not of the size that is expected; ``what`` names the config that says so.

    Of what should not be there no axis is expected.
    """
    for name, shape in expected.items():
        if shapes.get(name, ())[: max(2, len(shape))] != shape:
            size = "x".join(map(str, shapes[name])) if name in shapes else "not there"
            wanted = f"begin with {'x'.join(map(str, shape))}" if shape else "not be there"
            problem = f"does not fit {what}: {name} is {size}, and should {wanted}"
            raise BadRequest(source, problem, "Give a --config folder that it fits.")


def unet_shapes(config: Config, shapes: Shapes) -> Shapes:
    """Give the shapes of a UNet's ends, of the last layer of each block, and of what reads the text.

    And of what tells blocks with attention from those without, after which layers are numbered.
    """
    widths, layers = config.get("block_out_channels", (0,)), config.get("layers_per_block", 2)
    kinds = config.get("up_block_types", UP_BLOCKS)
    keys = [name for name in shapes if name.endswith("attn2.to_k.weight")]
    ups = [f"up_blocks.{at}" for at in range(len(kinds))]
    return {
        "conv_in.weight": (widths[0], config.get("in_channels")),
        "conv_out.weight": (config.get("out_channels"), widths[0]),
        **{name: (*shapes[name][:1], config.get("cross_attention_dim")) for name in keys},
        **{f"down_blocks.{at}.resnets.{layers - 1}.conv2.weight": (one, one) for at, one in enumerate(widths)},
        **{f"{up}.resnets.{layers}.conv2.weight": (one, one) for up, one in _from_the_end(ups, widths)},
        **{
            f"{up}.attentions.0.norm.weight": () for up, kind in zip(ups, kinds, strict=True) if not has_attention(kind)
        },
        **{
            f"{up}.attentions.{layers}.norm.weight": (one,)
            for (up, one), kind in zip(_from_the_end(ups, widths), kinds, strict=True)
            if has_attention(kind)
        },
    }


def vae_shapes(config: Config, shapes: Shapes) -> Shapes:
    """Give the shapes of a VAE's ends and of each block."""
    widths = config.get("block_out_channels", (0,))
    ups = [f"decoder.up_blocks.{at}" for at in range(len(config.get("up_block_types", ())))]
    return {
        "encoder.conv_in.weight": (widths[0], 3),
        "decoder.conv_out.weight": (3, widths[0]),
        **{f"encoder.down_blocks.{at}.resnets.0.conv2.weight": (one, one) for at, one in enumerate(widths)},
        **{f"{up}.resnets.0.conv2.weight": (one, one) for up, one in _from_the_end(ups, widths)},
    }


def _from_the_end(ups: Sequence[str], widths: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Give each block upwards with its width, those of the blocks downwards from the last; 0 where there is none."""
    return zip(ups, [*reversed(widths), *(0 for _ in ups)], strict=False)


def encoder_shapes(config: Config, shapes: Shapes) -> Shapes:
    """Give the shapes of a text encoder's vocabulary and of its last layer."""
    width, last = config.get("hidden_size"), config.get("num_hidden_layers", 1) - 1
    # transformers 4 and 5 differ in the prefix.
    prefix = "text_model." if any(name.startswith("text_model.") for name in shapes) else ""
    return {
        f"{prefix}embeddings.token_embedding.weight": (config.get("vocab_size"), width),
        f"{prefix}encoder.layers.{last}.mlp.fc1.weight": (config.get("intermediate_size"), width),
    }

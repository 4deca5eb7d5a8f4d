"""What the tensors of T5 are called beside a diffusion model in one file: as transformers calls them.

The judge is ``convert_sd3_t5_checkpoint_to_diffusers`` of ``diffusers/loaders/single_file_utils.py``.
"""

from __future__ import annotations

from converter.transforms.layouts.rows import Row, numbered, renamings
from converter.transforms.layouts.sizes import Config, Shapes

SHARED, TIED = "shared.weight", "encoder.embed_tokens.weight"
"""Two names of the embedding, of which a folder has the first."""

_ENDS = (SHARED, "encoder.final_layer_norm.weight")
_BLOCK = (
    *(f"layer.0.SelfAttention.{which}.weight" for which in ("q", "k", "v", "o")),
    "layer.0.SelfAttention.relative_attention_bias.weight",
    "layer.0.layer_norm.weight",
    *(f"layer.1.DenseReluDense.{which}.weight" for which in ("wi", "wi_0", "wi_1", "wo")),
    "layer.1.layer_norm.weight",
)
_TABLE = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
T5_NUMBERS = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "num_heads": 8,
    "d_ff": 2048,
    "num_layers": 6,
    "relative_attention_num_buckets": 32,
}
"""The numbers in its config, as its class takes them where they are not given."""


def t5_rows(config: Config) -> list[Row]:
    """Give the rows of ``T5EncoderModel``."""
    blocks = range(config.get("num_layers", T5_NUMBERS["num_layers"]))
    rows = renamings({name: name for name in _BLOCK})
    return [*renamings({name: name for name in _ENDS}), *numbered("encoder.block", "encoder.block", blocks, rows)]


def t5_shapes(config: Config) -> Shapes:
    """Give the shapes of all tensors of a ``T5EncoderModel``."""
    sizes = {**T5_NUMBERS, **config}
    width, inner, hidden = sizes["d_model"], sizes["num_heads"] * sizes["d_kv"], sizes["d_ff"]
    gated = str(config.get("feed_forward_proj", "relu")).startswith("gated-")
    shapes: Shapes = {"shared.weight": (sizes["vocab_size"], width), "encoder.final_layer_norm.weight": (width,)}
    shapes[_TABLE] = (sizes["relative_attention_num_buckets"], sizes["num_heads"])
    for at in range(sizes["num_layers"]):
        block = f"encoder.block.{at}.layer"
        shapes |= {f"{block}.0.SelfAttention.{which}.weight": (inner, width) for which in ("q", "k", "v")}
        shapes[f"{block}.0.SelfAttention.o.weight"] = (width, inner)
        for layer in ("wi_0", "wi_1") if gated else ("wi",):
            shapes[f"{block}.1.DenseReluDense.{layer}.weight"] = (hidden, width)
        shapes[f"{block}.1.DenseReluDense.wo.weight"] = (width, hidden)
        shapes |= {f"{block}.{layer}.layer_norm.weight": (width,) for layer in (0, 1)}
    return shapes

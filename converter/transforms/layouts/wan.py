"""What each tensor of Wan 2.1 and 2.2 is called by Alibaba, and what by Diffusers: for video of text, and of a picture.

The judge is ``convert_wan_transformer_to_diffusers`` of ``diffusers/loaders/single_file_utils.py``. A part is a name of
``WanTransformer3DModel``. VACE and Animate have more, and no table.
"""

from __future__ import annotations

from typing import Any

from converter.transforms.layouts.rows import Row, modules, numbered, renamings
from converter.transforms.layouts.sizes import Config, Shapes, Sizes, linears

_EMBEDDER = "condition_embedder"
_ENDS = [
    *modules(
        {
            "patch_embedding": "patch_embedding",
            "text_embedding.0": f"{_EMBEDDER}.text_embedder.linear_1",
            "text_embedding.2": f"{_EMBEDDER}.text_embedder.linear_2",
            "time_embedding.0": f"{_EMBEDDER}.time_embedder.linear_1",
            "time_embedding.2": f"{_EMBEDDER}.time_embedder.linear_2",
            "time_projection.1": f"{_EMBEDDER}.time_proj",
            "head.head": "proj_out",
        }
    ),
    *renamings({"head.modulation": "scale_shift_table"}),
]
_IMAGE = modules(
    {
        "img_emb.proj.0": f"{_EMBEDDER}.image_embedder.norm1",
        "img_emb.proj.1": f"{_EMBEDDER}.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": f"{_EMBEDDER}.image_embedder.ff.net.2",
        "img_emb.proj.4": f"{_EMBEDDER}.image_embedder.norm2",
    }
)
# Of the model that goes from a first picture to a last (``scripts/convert_wan_to_diffusers.py``).
_PLACES = renamings({"img_emb.emb_pos": f"{_EMBEDDER}.image_embedder.pos_embed"})
_ATTENTIONS = {"self_attn": "attn1", "cross_attn": "attn2"}
_LAYERS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_BLOCK = [
    *renamings({"modulation": "scale_shift_table"}),
    *modules({f"{a}.{here}": f"{b}.{there}" for a, b in _ATTENTIONS.items() for here, there in _LAYERS.items()}),
    *renamings(
        {f"{a}.norm_{which}.weight": f"{b}.norm_{which}.weight" for a, b in _ATTENTIONS.items() for which in "qk"}
    ),
    *modules({"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}),
]
_NORM = modules({"norm3": "norm2"})  # before it looks at the text; the others have no weights
_OF_IMAGE = [
    *modules({"cross_attn.k_img": "attn2.add_k_proj", "cross_attn.v_img": "attn2.add_v_proj"}),
    *renamings({"cross_attn.norm_k_img.weight": "attn2.norm_added_k.weight"}),
]
_HEAD = 128  # of all published ones
WAN_NUMBERS: dict[str, Any] = {
    "num_attention_heads": 40,
    "attention_head_dim": _HEAD,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
    "patch_size": [1, 2, 2],
}
"""The numbers in its config, as its class takes them where they are not given."""


def wan_rows(config: Config) -> list[Row]:
    """Give the rows of ``WanTransformer3DModel``."""
    block = [
        *_BLOCK,
        *(_NORM if config.get("cross_attn_norm", True) else ()),
        *(_OF_IMAGE if config.get("added_kv_proj_dim") else ()),
    ]
    blocks = range(config.get("num_layers", WAN_NUMBERS["num_layers"]))
    image = [*_IMAGE, *(_PLACES if config.get("pos_embed_seq_len") else ())] if config.get("image_dim") else []
    return [*_ENDS, *image, *numbered("blocks", "blocks", blocks, block)]


def wan_config(sizes: Sizes) -> dict[str, Any]:
    """Give the config of a file by its names and shapes.

    Raises BadFile for a file that lacks a tensor, BadRequest where names and shapes do not say it.
    """
    width = sizes.axis("patch_embedding.weight", 0)
    patch = [sizes.axis("patch_embedding.weight", at) for at in (2, 3, 4)]
    image = sizes.has("img_emb.proj.1.weight")
    config = {
        "_class_name": "WanTransformer3DModel",
        "added_kv_proj_dim": width if sizes.has("blocks.0.cross_attn.k_img.weight") else None,
        "attention_head_dim": _HEAD,
        "cross_attn_norm": sizes.has("blocks.0.norm3.weight"),
        "eps": 1e-6,
        "ffn_dim": sizes.axis("blocks.0.ffn.0.weight", 0),
        "freq_dim": sizes.axis("time_embedding.0.weight", 1),
        "image_dim": sizes.axis("img_emb.proj.1.weight", 1) if image else None,
        "in_channels": sizes.axis("patch_embedding.weight", 1),
        "num_attention_heads": sizes.ratio("heads", width, _HEAD),
        "num_layers": sizes.count("blocks"),
        "out_channels": sizes.ratio("channels", sizes.axis("head.head.weight", 0), patch[0] * patch[1] * patch[2]),
        "patch_size": patch,
        "pos_embed_seq_len": sizes.axis("img_emb.emb_pos", 1) if sizes.has("img_emb.emb_pos") else None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": sizes.axis("text_embedding.0.weight", 1),
    }
    sizes.check(wan_rows(config))
    return config


def wan_shapes(config: Config) -> Shapes:
    """Give the shapes of all tensors of a ``WanTransformer3DModel``."""
    sizes = {**WAN_NUMBERS, **config}
    width = sizes["num_attention_heads"] * sizes["attention_head_dim"]
    places = 1
    for side in sizes["patch_size"]:
        places *= side
    modules_of = {
        "patch_embedding": (width, sizes["in_channels"], *sizes["patch_size"]),
        f"{_EMBEDDER}.text_embedder.linear_1": (width, sizes["text_dim"]),
        f"{_EMBEDDER}.text_embedder.linear_2": (width, width),
        f"{_EMBEDDER}.time_embedder.linear_1": (width, sizes["freq_dim"]),
        f"{_EMBEDDER}.time_embedder.linear_2": (width, width),
        f"{_EMBEDDER}.time_proj": (6 * width, width),
        "proj_out": (places * (sizes["out_channels"] or sizes["in_channels"]), width),
    }
    shapes: Shapes = {"scale_shift_table": (1, 2, width)}
    image = sizes["image_dim"]
    if image:
        modules_of[f"{_EMBEDDER}.image_embedder.ff.net.0.proj"] = (image, image)
        modules_of[f"{_EMBEDDER}.image_embedder.ff.net.2"] = (width, image)
        if sizes["pos_embed_seq_len"]:
            shapes[f"{_EMBEDDER}.image_embedder.pos_embed"] = (1, sizes["pos_embed_seq_len"], image)
        for norm, size in (("norm1", image), ("norm2", width)):
            shapes |= {f"{_EMBEDDER}.image_embedder.{norm}.{leaf}": (size,) for leaf in ("weight", "bias")}
    for at in range(sizes["num_layers"]):
        shapes |= {f"blocks.{at}.{name}": shape for name, shape in _block_shapes(sizes, width).items()}
    return {**shapes, **linears(modules_of)}


def _block_shapes(sizes: Config, width: int) -> Shapes:
    square = [f"{attention}.{layer}" for attention in _ATTENTIONS.values() for layer in _LAYERS.values()]
    norms = [f"{attention}.norm_{which}" for attention in _ATTENTIONS.values() for which in "qk"]
    shapes: Shapes = {"scale_shift_table": (1, 6, width)}
    if sizes.get("cross_attn_norm", True):
        shapes |= {f"norm2.{leaf}": (width,) for leaf in ("weight", "bias")}
    if sizes["added_kv_proj_dim"]:
        norms.append("attn2.norm_added_k")
        shapes |= linears({f"attn2.add_{which}_proj": (width, sizes["added_kv_proj_dim"]) for which in "kv"})
    return {
        **shapes,
        **{f"{name}.weight": (width,) for name in norms},
        **linears(
            {
                **dict.fromkeys(square, (width, width)),
                "ffn.net.0.proj": (sizes["ffn_dim"], width),
                "ffn.net.2": (width, sizes["ffn_dim"]),
            }
        ),
    }

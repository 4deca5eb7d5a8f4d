"""The text encoders that ComfyUI's files hold beside a diffusion model: CLIP and T5 under the names of transformers."""

from __future__ import annotations

from collections.abc import Sequence

from converter.errors import BadFile
from converter.libraries.transformers import TRANSFORMERS
from converter.tensors.base import Tensor
from converter.tensors.shaped import identity
from converter.transforms.layouts.rows import Row
from converter.transforms.layouts.stable_diffusion import clip_rows
from converter.transforms.layouts.stable_diffusion_shapes import CLIP_NUMBERS, CLIP_WORDS, clip_shapes
from converter.transforms.layouts.t5 import SHARED, T5_NUMBERS, TIED, t5_rows, t5_shapes
from converter.transforms.single_file.family import Config, Part

_IDS = ("position_ids",)  # which older versions of transformers save
_PROJECTION = "text_projection.weight"


def _plain_rows(config: Config) -> list[Row]:
    """Give the rows of CLIP without the projection that Stable Diffusion 3 does not take of it."""
    return clip_rows({})


def _projection(config: Config, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Give the projection that changes nothing, of a width that the file has: it is as large as one of its matrices.

    So does ``create_diffusers_clip_model_from_ldm`` of ``diffusers/loaders/single_file_utils.py``; ComfyUI's Stable
    Diffusion 3 reads this encoder without any (``return_projected_pooled`` in ``comfy/text_encoders/sd3_clip.py``).
    """
    queries = next((one for one in tensors if one.name.endswith("layers.0.self_attn.q_proj.weight")), None)
    if queries is None or len(queries.shape) != 2 or queries.shape[0] != queries.shape[1]:
        where = queries.where if queries else "text_encoder"
        raise BadFile(where, "has no square matrix of queries in its first layer, as CLIP has", "Fetch it again.")
    return [Tensor(_PROJECTION, identity(queries.dtype, queries.shape[0]))]


def _tied(config: Config, tensors: Sequence[Tensor]) -> list[tuple[Tensor, str]]:
    """Give the embedding under its other name too.

    ComfyUI's T5 reads the first, and ``create_diffusers_t5_model_from_checkpoint`` of
    ``diffusers/loaders/single_file_utils.py``, which ties nothing in a model of transformers 5, the second.
    """
    return [(one._replace(name=TIED), f"{SHARED} once more") for one in tensors if one.name == SHARED]


CLIP_L = Part(
    ("CLIPTextModel", "CLIPTextModelWithProjection"), ("text_encoders.clip_l.transformer.",), TRANSFORMERS, _plain_rows,
    clip_shapes, numbers=CLIP_NUMBERS, words=CLIP_WORDS, buffers=_IDS, is_optional=True,
)  # fmt: skip
CLIP_L_OF_SD3 = CLIP_L._replace(unread=(_PROJECTION,), made=_projection)
CLIP_G = CLIP_L._replace(prefixes=("text_encoders.clip_g.transformer.",), rows=clip_rows)
T5 = Part(
    ("T5EncoderModel",), ("text_encoders.t5xxl.transformer.",), TRANSFORMERS, t5_rows,
    t5_shapes, numbers=T5_NUMBERS, is_optional=True,
    unread=(TIED,), made_back=_tied,
)  # fmt: skip

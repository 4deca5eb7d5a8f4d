"""Tensors that files of many ranks hold in boxes, put together."""

from __future__ import annotations

from collections.abc import Sequence

from converter.dtypes import DType
from converter.errors import BadFile, Where
from converter.tensors.base import TensorSource
from converter.tensors.derived import Box, Boxes


def put_together(
    name: str, dtype: DType, shape: tuple[int, ...], boxes: Sequence[Box], where: Where, advice: str
) -> TensorSource:
    """Give a tensor of its boxes, or the one that is all of it. Raises BadFile where they do not make it."""
    if len(boxes) == 1 and boxes[0].source.shape == shape:
        return boxes[0].source
    try:
        return Boxes(dtype, shape, tuple(boxes))
    except ValueError as error:
        raise BadFile(where, f"cuts the tensor {name!r} into {error}", advice) from None


def spell(dtype: DType, shape: Sequence[int]) -> str:
    """Spell what a tensor is.

    >>> from converter.dtypes import DTYPES
    >>> spell(DTYPES["F32"], (2, 3))
    'float32 [2, 3]'
    """
    return f"{dtype.torch_name} {list(shape)}"

"""MXFP4 of gpt-oss: numbers of 4 bits in groups of 32, each of which has an exponent, as bytes of two.

``X_blocks`` is U8 [experts, rows, groups, 16] and ``X_scales`` U8 [experts, rows, groups]. The lower half of a byte
comes first; a number is a value of e2m1 times 2**(byte - 127). ``X`` is [experts, K, rows], K being groups * 32:
transposed, as the experts of transformers are (``_convert_moe_packed_tensors`` in
``transformers/integrations/mxfp4.py``). OpenAI's own files name them ``X.blocks`` and ``X.scales``, and the experts
that read them are not transposed (``_get_mxfp4_tensor`` in ``gpt_oss/torch/weights.py``).
"""

from __future__ import annotations

import math

from converter.dtypes import DTYPES
from converter.errors import BadFile
from converter.models.schemes import EXPONENTS
from converter.tensors.base import Tensor, TensorSource
from converter.tensors.derived import held
from converter.tensors.shaped import reshaped
from converter.transforms.quantize.codes import AGAIN, E2M1, Decoded, Gridded, scales_of, turned_grid
from converter.transforms.quantize.restore import Module, Restored

_F32, _BF16 = DTYPES["F32"], DTYPES["BF16"]
_BYTES = 16  # of a group


def restore(module: Module) -> Restored:
    """Give a layer's experts, [experts, K, rows]. Raises BadFile for blocks or scales of other shapes or dtypes."""
    blocks, scales = _parts(module)
    *outer, rows, groups, size = range(len(blocks.shape))
    return _restored(
        module,
        held(blocks.source.permuted((*outer, groups, size, rows))),
        turned_grid(scales.source, (*outer, groups, rows)),
        scales.name,
        axis=-2,
    )


def restore_rows(module: Module) -> Restored:
    """Give the experts of OpenAI's own files, [experts, rows, K]; raises as ``restore`` does."""
    blocks, scales = _parts(module)
    return _restored(module, blocks.source, scales.source, scales.name, axis=-1)


def _parts(module: Module) -> tuple[Tensor, Tensor]:
    blocks = module.weight
    [end] = module.scheme.companions
    scales = module.scale(end)
    if len(blocks.shape) != 4 or blocks.shape[-1] != _BYTES:
        problem = (
            f"has blocks of MXFP4, {blocks.name!r}, that are {list(blocks.shape)}, not [experts, rows, groups, 16]"
        )
        raise BadFile(blocks.where, problem, AGAIN)
    needed = blocks.shape[:-1]
    if scales.dtype.tag not in EXPONENTS or scales.shape != needed:
        found = f"it is {scales.dtype} {list(scales.shape)}, and blocks {list(blocks.shape)} need U8 {list(needed)}"
        raise module.misfit(end, found)
    return blocks, scales


def _restored(module: Module, blocks: TensorSource, scales: TensorSource, name: str, axis: int) -> Restored:
    """Give the numbers of blocks whose groups lie along an axis, as those of ``scales`` do.

    All axes before the last are taken for one, so that they are dealt with in whole rows.
    """
    shape = list(scales.shape)
    shape[axis] *= 2 * _BYTES
    height, width = math.prod(scales.shape[:-1]), scales.shape[-1]
    if axis == -1:
        words, sides, block = (height, width * _BYTES), (height, shape[-1]), (1, 2 * _BYTES)
    else:
        words, sides, block = (height * _BYTES, width), (height * 2 * _BYTES, width), (2 * _BYTES, 1)
    numbers = Decoded(reshaped(blocks, blocks.dtype, words), E2M1, sides, 2 + axis)
    grid = scales_of(Tensor(name, scales), (height, width))
    return Restored(module.base, reshaped(Gridded(numbers, grid, block), _F32, tuple(shape)), _BF16)

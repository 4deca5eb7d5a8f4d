"""ComfyUI's quantized weights: float8 with scales in a marked file, and what ``comfy_quant`` describes.

The older form: a file has a tensor ``scaled_fp8``, whose values mean nothing; a float8 ``m.weight`` that has an
``m.scale_weight``, one number, is the product of the two. Float8 without one is what it is (``scaled_fp8_ops`` in
ComfyUI 0.3.64's ``comfy/ops.py``, whose default is 1; ``convert_old_quants`` in ``comfy/utils.py`` of later ones).
``m.scale_input`` is for inputs.

The newer: ``m.comfy_quant`` is JSON in bytes, and so may be what the header notes under ``_quantization_metadata``. Its
``format`` says what ``m.weight``, ``m.weight_scale`` and ``m.weight_scale_2`` are (``_load_quantized_module`` in
``comfy/ops.py``; numbers as in ``comfy_kitchen/backends/eager/quantization.py``, in float32; those of formats that
convert_to_quant adds as in its ``comfy/quant_ops.py``). Scales of blocks along a row lie in the order that cuBLAS reads
them in (``to_blocked`` in ``comfy_kitchen/float_utils.py``).

In bfloat16 the CPU code of ComfyUI rounds the scale of float8 before it multiplies, and its kernels for GPUs do not:
here the product is rounded, once.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from converter.dtypes import DTYPES, DType
from converter.errors import BadFile, Unsupported
from converter.formats.texts import parse_json
from converter.tensors.base import Reader, TensorSource
from converter.tensors.derived import Constant
from converter.tensors.shaped import Shaped, Unboxed, reshaped
from converter.tensors.view import blocks_of
from converter.transforms.quantize.codes import (
    AGAIN,
    E2M1,
    Decoded,
    Gridded,
    Scales,
    Widened,
    coding_of,
    scales_of,
    steps_of,
)
from converter.transforms.quantize.restore import Module, Restored

_DESCRIBED, _SCALE, _SCALE_2, _OLD_SCALE = ".comfy_quant", ".weight_scale", ".weight_scale_2", ".scale_weight"
# Values are multiplied by a reciprocal before they are rounded, in bfloat16 where that is what they were.
_SLACK = 2**-7
_TURNED = tuple(4**power for power in range(1, 6))  # groups, of which 256 is usual
_TILE_ROWS, _TILE_COLUMNS, _TILE_NBYTES = 128, 4, 512
_BAND_TILES = 2048  # of a row of tiles, at a time
_FP4 = E2M1._replace(order=(1, 0))
# As ``e8m0_to_f32`` has it: the bits of a float32's exponent, of which all zeros are 0 and all ones infinity.
_E8M0 = coding_of(8, (0.0, *(2.0 ** (code - 127) for code in range(1, 255)), math.inf))
# What is said of a module and changes none of its numbers.
_SILENT = frozenset({"format", "params", "full_precision_matrix_mult", "orig_dtype", "per_row", "group_size"})


class _Format(NamedTuple):
    """What a ``format`` means: the dtype of its weights, what makes their numbers, and how large its blocks are."""

    dtype: DType
    read: Callable[[Module, int], TensorSource]
    group: int = 0


def restore_scaled(module: Module) -> Restored:
    """Give the numbers of a float8 weight with a ``scale_weight``. Raises BadFile for one that does not fit."""
    return Restored(module.weight.name, _scaled(module, _OLD_SCALE), slack=_SLACK)


def restore_marked(module: Module) -> Restored:
    """Give the numbers of a float8 tensor that has no scale, in a file in which others have."""
    return Restored(module.weight.name, Widened(module.weight.source))


def restore_described(module: Module) -> Restored:
    """Give the numbers of a weight that ``comfy_quant`` or a header describes.

    Raises Unsupported for a format or a word that is not known, BadFile for scales that are missing or do not fit.
    """
    weight, said = module.weight, _said_of(module)
    form = _FORMATS.get(said["format"])
    if form is None:
        what = f"has {weight.name!r} in the format {said['format']!r} of ComfyUI, which wconv does not dequantize"
        raise Unsupported(weight.where, what, "Load it with ComfyUI, or take the model that it was made from.")
    if said.get("convrot") is True and said["format"] == "int8_tensorwise":
        form = form._replace(read=_rotated, group=said.pop("convrot_groupsize", 256))
        del said["convrot"]
    unknown = sorted(key for key, value in said.items() if key not in _SILENT and value not in (None, False))
    if unknown:
        what = f"has {weight.name!r} quantized with {unknown[0]!r} ({said['format']}), which wconv does not dequantize"
        raise Unsupported(weight.where, what, "Load it with ComfyUI, or take the model that it was made from.")
    if weight.dtype is not form.dtype or len(weight.shape) != 2:
        raise _misfit(module, f"{said['format']} is {form.dtype} of two axes, and it is {weight.dtype} {weight.shape}")
    group = said.get("group_size", form.group)
    is_fixed = form.read is not _blockwise
    if type(group) is not int or (group != form.group if is_fixed else not 0 < group < 1 << 20):
        raise _misfit(module, f"its group_size is {str(group)[:30]!r}")
    return Restored(weight.name, form.read(module, group), slack=_SLACK)


def _said_of(module: Module) -> dict[str, Any]:
    """Give what is said of a weight, with its ``params`` among the rest. Raises BadFile for what is no such text."""
    where = module.weight.where
    said: Any = module.config
    if _DESCRIBED in module.contents:
        try:
            within = parse_json(module.contents[_DESCRIBED], where, f"{module.base + _DESCRIBED!r} ")
        except ValueError as error:
            raise _misfit(module, f"it is not JSON ({error})") from None
        if "format" in said and within != said:
            raise _misfit(module, "the file's header says something else of it")
        said = within
    params = said.get("params") if isinstance(said, dict) else None
    told: dict[str, Any] = {
        one: what for part in (params, said) if isinstance(part, dict) for one, what in part.items()
    }
    if not isinstance(told.get("format"), str):
        raise _misfit(module, "it names no format")
    return told


def _misfit(module: Module, problem: str) -> BadFile:
    what = module.base + _DESCRIBED if _DESCRIBED in module.beside else "description in its header"
    said = f"has a {what!r} that does not fit {module.weight.name!r}: {problem}"
    return BadFile(module.weight.where, said, AGAIN)


def _scaled(module: Module, end: str, numbers: TensorSource | None = None) -> TensorSource:
    """Multiply numbers with one scale for all of them, or for each row; those of the codes where none are given."""
    weight, scale = module.weight, module.scale(end)
    rows = weight.shape[:1]
    if math.prod(scale.shape) == 1:
        grid, block = tuple(1 for _ in weight.shape), weight.shape
    elif len(weight.shape) == 2 and scale.shape in (rows, (*rows, 1)):
        grid, block = (*rows, 1), (1, *weight.shape[1:])
    else:
        raise module.misfit(end, f"it is {list(scale.shape)} beside {list(weight.shape)}, and no number a row or one")
    return _gridded(module, end, grid, block, numbers)


def _tensorwise(module: Module, group: int) -> TensorSource:
    return _scaled(module, _SCALE)


def _rotated(module: Module, group: int) -> TensorSource:
    """Give the numbers of an int8 weight whose rows were turned, in groups, before they were rounded (ConvRot).

    ``dequantize_int8_convrot_weight`` turns the products back, by a matrix product whose sums are rounded as they
    grow; here the whole numbers are turned back, which is exact, and the product with the scale is rounded once.
    """
    columns = module.weight.shape[1]
    if group not in _TURNED or columns % group:
        raise _misfit(module, f"its rows of {columns} are turned in groups of {str(group)[:30]}")
    return _scaled(module, _SCALE, Unrotated(Widened(module.weight.source), group))


def _blockwise(module: Module, group: int) -> TensorSource:
    """Multiply numbers with one scale for each square block."""
    shape, scale = module.weight.shape, module.scale(_SCALE)
    if any(length % group for length in shape) or scale.shape != tuple(n // group for n in shape):
        raise module.misfit(_SCALE, f"it is {list(scale.shape)}, for blocks of {group} in {list(shape)}")
    return _gridded(module, _SCALE, scale.shape, (group, group))


def _gridded(
    module: Module, end: str, grid: tuple[int, ...], block: tuple[int, ...], numbers: TensorSource | None = None
) -> TensorSource:
    scale = module.scale(end)
    if not scale.dtype.is_floating or scale.dtype.bits < 16:
        raise module.misfit(end, f"it is {scale.dtype}")
    return Gridded(numbers or Widened(module.weight.source), scales_of(scale, grid), block)


def _mxfp8(module: Module, group: int) -> TensorSource:
    """Multiply numbers with a power of two for each 32 of a row (``dequantize_mxfp8``)."""
    weight, scale = module.weight, module.scale(_SCALE)
    exponents = _unswizzled(module, weight.shape, group, ("U8", "F8_E8M0"), DTYPES["U8"])
    numbers = Decoded(exponents, _E8M0, exponents.shape, 1)
    return Gridded(Widened(weight.source), Scales(numbers, scale.name), (1, group))


def _nvfp4(module: Module, group: int) -> TensorSource:
    """Multiply 4-bit numbers with a scale for each 16 of a row, times one for all (``dequantize_nvfp4``).

    The sides are those that are stored, which the loader cuts to its module's where it has padded them to 16.
    """
    weight, scale, whole = module.weight, module.scale(_SCALE), module.scale(_SCALE_2)
    shape = weight.shape[0], 2 * weight.shape[1]
    blocks = Scales(_unswizzled(module, shape, group, ("U8", "F8_E4M3"), DTYPES["F8_E4M3"]), scale.name)
    if math.prod(whole.shape) != 1 or whole.dtype.tag != "F32":
        raise module.misfit(_SCALE_2, f"it is {whole.dtype} {list(whole.shape)}, and no number")
    scales = Gridded(blocks, scales_of(whole, (1, 1)), blocks.shape)
    return Gridded(Decoded(weight.source, _FP4, shape, 1), scales, (1, group))


def _unswizzled(
    module: Module, shape: tuple[int, ...], group: int, tags: tuple[str, ...], dtype: DType
) -> TensorSource:
    """Give the scales of blocks along rows in the order of these, [rows, columns / group], in ``dtype``."""
    scale = module.scale(_SCALE)
    rows, columns = shape[0], shape[1] // group
    padded = -(-rows // _TILE_ROWS) * _TILE_ROWS, -(-columns // _TILE_COLUMNS) * _TILE_COLUMNS
    if shape[1] % group or scale.dtype.tag not in tags or scale.shape not in (padded, (math.prod(padded),)):
        needed = f"groups of {group} in {list(shape)} need {' or '.join(tags)} {list(padded)}"
        raise module.misfit(_SCALE, f"it is {scale.dtype} {list(scale.shape)}, and {needed}")
    return Unswizzled(reshaped(scale.source, dtype, padded), (rows, columns))


@dataclass(frozen=True, slots=True)
class Unswizzled(Unboxed, Shaped):
    """A matrix of bytes whose tiles of 128 x 4 lie one behind the other, padded, as cuBLAS reads scales."""

    of_shape: tuple[int, ...]

    @property
    def _tiles(self) -> int:
        """The tiles side by side."""
        return -(-self.shape[1] // _TILE_COLUMNS)

    def _below(self, begin: int, end: int) -> tuple[int, int]:
        row = self.shape[1] * _TILE_ROWS or 1
        nbytes = self._tiles * _TILE_NBYTES
        return begin // row * nbytes, -(-end // row) * nbytes

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        from converter.transforms.quantize.kernels import unswizzle

        done = 0
        for start, shape in blocks_of(self.shape, begin, len(out)):
            nbytes = math.prod(shape)
            for row, column, tiles in self._bands(start, shape):
                with reader.scratch(tiles * _TILE_NBYTES) as chunk:
                    self.source.read((row * self._tiles + column) * _TILE_NBYTES, chunk, reader)
                    at = row * _TILE_ROWS - start[0], column * _TILE_COLUMNS - start[1]
                    unswizzle(chunk, out[done : done + nbytes], (shape[0], shape[1]), at)
            done += nbytes

    def _bands(self, start: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
        """Cut a box into runs of tiles side by side: the row and column of the first in tiles, and their number."""
        first, end = start[1] // _TILE_COLUMNS, -(-(start[1] + shape[1]) // _TILE_COLUMNS)
        for row in range(start[0] // _TILE_ROWS, -(-(start[0] + shape[0]) // _TILE_ROWS)):
            for column in range(first, end, _BAND_TILES):
                yield row, column, min(_BAND_TILES, end - column)


@dataclass(frozen=True, slots=True)
class Unrotated(Unboxed, Widened):
    """Whole numbers in float32, those of each ``group`` along a row turned back: with a regular Hadamard matrix.

    That is the Kronecker product of as many matrices of 4 x 4 as there are fours in ``group``, each its own inverse
    (``_build_hadamard`` in ``comfy_kitchen/tensor/int8_utils.py``). Groups divide the rows.
    """

    group: int

    def _below(self, begin: int, end: int) -> tuple[int, int]:
        """Give the bytes of whole groups that some of theirs are in."""
        nbytes = self.group * self.dtype.itemsize
        return begin // nbytes * nbytes, -(-end // nbytes) * nbytes

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        from converter.transforms.quantize.kernels import unrotate

        first, end = self._below(begin, begin + len(out))
        if (first, end) == (begin, begin + len(out)):
            self.source.read(begin, out, reader)
            unrotate(out, self.group)
            return
        with reader.scratch(end - first) as numbers:
            self.source.read(first, numbers, reader)
            unrotate(numbers, self.group)
            out[:] = numbers[begin - first : begin - first + len(out)]

    def steps(self) -> TensorSource:
        """Give how far each may be off: all of a group, each by what it weighs."""
        weight = Constant(DTYPES["F32"], (1, 1), struct.pack("<f", math.sqrt(self.group)))
        return Gridded(steps_of(self.source), weight, self.shape)


_FORMATS: Mapping[str, _Format] = {
    "float8_e4m3fn": _Format(DTYPES["F8_E4M3"], _tensorwise),
    "float8_e5m2": _Format(DTYPES["F8_E5M2"], _tensorwise),
    "float8_e4m3fn_rowwise": _Format(DTYPES["F8_E4M3"], _tensorwise),
    "float8_e4m3fn_blockwise": _Format(DTYPES["F8_E4M3"], _blockwise, 64),
    "int8_tensorwise": _Format(DTYPES["I8"], _tensorwise),
    "int8_blockwise": _Format(DTYPES["I8"], _blockwise, 128),
    "mxfp8": _Format(DTYPES["F8_E4M3"], _mxfp8, 32),
    "nvfp4": _Format(DTYPES["U8"], _nvfp4, 16),
}

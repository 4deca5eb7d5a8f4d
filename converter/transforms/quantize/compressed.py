"""The forms of compressed-tensors: numbers of 8 bits as they are, those of fewer in words, a scale for each of a block.

Of a module ``m``, ``m.weight`` is float8 or int8 and ``m.weight_scale`` one number for all of it, [1], for each row,
[N, 1], for each group of a row, [N, K / group], or for each block of several rows, whose last may be smaller. Or else
``m.weight_packed`` is int32 words of whole numbers (``pack_to_int32`` in ``compressors/pack_quantized/helpers.py``), or
bytes of 4- and 6-bit floats. What the shapes leave open, the config's groups say. ModelOpt has the same names for
float8 and int8, and there [N] is a scale for each row.

A number is the code, less its zero point, times its scale (``_dequantize`` in
``quantization/lifecycle/forward_helpers.py``), in the scale's own dtype: whatever that is, these products are exact in
float32, or rounded once there.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, NamedTuple

from converter.dtypes import DTYPES, DType
from converter.errors import Unsupported
from converter.tensors.base import Tensor, TensorSource
from converter.tensors.derived import Cast
from converter.tensors.shaped import reshaped
from converter.transforms.quantize.codes import (
    E2M1,
    Coding,
    Decoded,
    Gridded,
    Indexed,
    Scales,
    Widened,
    coding_of,
    in_bytes,
    scales_of,
)
from converter.transforms.quantize.dense import Dense, unpacked
from converter.transforms.quantize.restore import Module, Restored

_SCALE, _ZERO, _SHAPE, _GLOBAL, _INDEX, _INPUTS = (
    ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_global_scale", ".weight_g_idx", ".pre_quant_scale",
)  # fmt: skip
_BF16 = DTYPES["BF16"]
_MX_GROUP, _NV_GROUP = 32, 16
_BLOCK = (128, 128)  # of float8 where no config says another
_MAX_GROUPS = 64  # of a config: real ones have up to four
_MAX_SIDE = 1 << 31
# What rounds off of a weight, where it was cast before, and of the quotient before that is rounded to a code: both are
# in the scale's dtype.
_SLACK = {"BF16": 2**-7, "F16": 2**-10, "F32": 2**-20}
_BY_LIBRARY = "Load it with the compressed-tensors that wrote it."


class Said(NamedTuple):
    """What a group of a config says of weights: blocks of ``height`` x ``width``, which ``divides`` rows if it is so.

    Without a width there are none; ``is_calibrated`` where codes are others than the nearest.
    """

    kind: str
    bits: int
    height: int = 0
    width: int = 0
    divides: bool = False
    is_calibrated: bool = False


def restore(module: Module) -> Restored:
    """Give the numbers of a weight in 8 bits. Raises BadFile or Unsupported for scales that do not fit it."""
    check_plain(module)
    weight, scale = module.weight, module.scale(_SCALE)
    is_float = weight.dtype.is_floating
    said = _said_of(module, "float" if is_float else "int")
    group = 0
    if scale.dtype.tag == "U8" and is_float:
        group = _MX_GROUP  # ``MXFP8QuantizationCompressor``: exponents
    elif scale.dtype.tag not in _SLACK and not (scale.dtype.tag == "F8_E8M0" and is_float):
        raise module.misfit(_SCALE, f"it is {scale.dtype}")
    cells, block = fit(module, _SCALE, weight.shape, said, group)
    numbers: TensorSource = Widened(weight.source)
    slack = _SLACK.get(scale.dtype.tag, 0.0)
    zeros = _plain_zeros(module, cells)
    if zeros is not None:
        if is_float:
            # A difference may have more digits than the scale's dtype, in which the library takes it.
            numbers = _rounded(Gridded(numbers, zeros, block, by="less"), scale.dtype)
        else:
            codes = Decoded(weight.source, _eight_bits(), weight.shape, len(weight.shape) - 1)
            numbers = Gridded(codes, zeros, block, by="less")
    product = Gridded(numbers, scales_of(scale, cells), block)
    is_nearest = not (zeros and (is_float or scale.dtype.bits < 32)) and not _is_calibrated(said)
    dtype = _BF16 if scale.dtype.bits == 8 else _library_dtype(scale.dtype)
    return Restored(weight.name, product, dtype, slack if is_nearest else None)


def restore_packed(module: Module) -> Restored:
    """Give the numbers of a packed weight. Raises BadFile or Unsupported for what does not fit it."""
    check_plain(module)
    return (_restore_floats if module.weight.dtype.tag == "U8" else _restore_ints)(module)


def _restore_ints(module: Module) -> Restored:
    scale = module.scale(_SCALE)
    if scale.dtype.tag not in _SLACK:
        raise module.misfit(_SCALE, f"it is {scale.dtype}")
    said = _said_of(module, "int")
    shape = _packed_shape(module)
    bits = _bits_of(module, shape, said)
    said = tuple(one for one in said if one.bits == bits)
    cells, block = fit(module, _SCALE, shape, said)
    order = _order_of(module, shape, block[-1])
    zeros, numbers = _zeros_of_packed(module, bits, shape, cells), _decoded(module, bits, shape, has_zeros=False)
    if zeros is not None:
        numbers = _by_groups(_decoded(module, bits, shape, has_zeros=True), zeros, block, order, "less")
    scales = scales_of(scale, cells)
    product = _by_groups(numbers, scales, block, order)
    is_nearest = not (zeros and scale.dtype.bits < 32) and not _is_calibrated(said)
    slack = _SLACK[scale.dtype.tag] if is_nearest else None
    return Restored(f"{module.base}.weight", product, _library_dtype(scale.dtype), slack)


def _restore_floats(module: Module) -> Restored:
    """Give the numbers of 4- or 6-bit floats, in bf16 as the library does, whatever scales them.

    ``NVFP4PackedCompressor``, ``MXFP4PackedCompressor`` and ``MXFP6PackedCompressor`` of compressed-tensors.
    """
    weight, scale = module.weight, module.scale(_SCALE)
    for end in (_ZERO, _SHAPE, _INDEX):
        if end in module.beside:
            raise module.misfit(end, "floats of 4 and 6 bits have none")
    if len(weight.shape) < 2 or scale.shape[:-1] != weight.shape[:-1] or not math.prod(weight.shape):
        raise module.misfit(_SCALE, f"it is {list(scale.shape)} beside {list(weight.shape)}")
    if scale.dtype.tag == "F8_E4M3":
        group = _NV_GROUP
    elif scale.dtype.tag == "U8" and _GLOBAL not in module.beside:
        group = _MX_GROUP
    else:
        raise module.misfit(_SCALE, f"it is {scale.dtype}")
    shape = (*weight.shape[:-1], scale.shape[-1] * group)
    if 2 * weight.shape[-1] == shape[-1]:
        numbers = Decoded(weight.source, E2M1, shape, len(shape) - 1)
    elif 4 * weight.shape[-1] == 3 * shape[-1] and group == _MX_GROUP:
        codes = reshaped(weight.source, DTYPES["I32"], (*weight.shape[:-1], weight.shape[-1] // 4))
        numbers = Decoded(Dense(codes, 6, shape, len(shape) - 1), _e2m3(), shape, len(shape) - 1)
    else:
        raise module.misfit(_SCALE, f"it is {list(scale.shape)}, groups of {group} beside {list(weight.shape)} bytes")
    grid: TensorSource = Scales(scale.source, scale.name)
    if scale.dtype.tag == "F8_E4M3":
        grid = Scales(Gridded(grid, whole(module, _GLOBAL, scale.shape), scale.shape, by="over"), scale.name)
    product = Gridded(numbers, grid, (*(1 for _ in shape[:-1]), group))
    return Restored(f"{module.base}.weight", product, _BF16, _SLACK["F32"])


def fit(
    module: Module, end: str, shape: tuple[int, ...], said: tuple[Said, ...] = (), group: int = 0
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Give the shape of a weight's scales with as many axes as it has, and the block that each of them is for.

    ``group`` is how many numbers of a row there must be in one. Raises BadFile for scales that do not fit.
    """
    found = module.scale(end).shape
    if not shape or 0 in shape:
        raise module.misfit(end, f"that is {list(shape)}")
    if math.prod(found) == 1 and not group:
        return tuple(1 for _ in shape), shape
    if found == shape[:1] and len(shape) == 2 and module.config.get("quant_method") != "compressed-tensors":
        found = (*found, 1)  # ``FP8_PC_PT`` and ``INT8_SQ`` of ModelOpt
    elif len(found) == 4 and len(shape) == 2 and found[1::2] == (1, 1):
        found = found[::2]  # ``FP8_PB_WO`` of ModelOpt
    if len(shape) < 2 or len(found) != len(shape) or found[:-2] != shape[:-2]:
        raise module.misfit(end, f"it is {list(found)} beside {list(shape)}")
    block = (1, group) if group else _block_of(module, end, shape, found, said)
    needed = tuple(-(-length // size) for length, size in zip(shape[-2:], block, strict=True))
    if needed != found[-2:] or (group and shape[-1] % group):
        raise module.misfit(end, f"it is {list(found)}, and groups of {group} in {list(shape)} need {list(needed)}")
    return found, (*(1 for _ in shape[:-2]), *block)


def _block_of(
    module: Module, end: str, shape: tuple[int, ...], found: tuple[int, ...], said: tuple[Said, ...]
) -> tuple[int, int]:
    """Give the block of one scale. Shapes say it where there is one a row, and else the config, or what is usual."""
    (rows, columns), (down, across) = shape[-2:], found[-2:]
    if (down, across) == (rows, 1):
        return 1, columns
    choices = {(one.height, one.width, one.divides) for one in said if one.width}
    if not choices:
        is_group = down == rows and across and not columns % across
        choices = {(1, columns // across, True) if is_group else (*_BLOCK, False)}
    fits = {
        (min(height, rows), min(width, columns))
        for height, width, divides in choices
        if (-(-rows // height), -(-columns // width)) == (down, across) and not (divides and columns % width)
    }
    if not fits:
        sizes = ", ".join(f"{height} x {width}" for height, width, _ in sorted(choices)[:3])
        raise module.misfit(end, f"it is {list(found)}, and {list(shape)} is not that many blocks of {sizes}")
    if len(fits) > 1:
        raise Unsupported(module.weight.where, f"may have scales of several sizes of blocks in {module.weight.name!r}")
    return fits.pop()


def whole(module: Module, end: str, shape: tuple[int, ...]) -> TensorSource:
    """Give the one number that is for all of a weight's scales. Raises BadFile where it is none."""
    scale = module.scale(end)
    if scale.dtype.tag != "F32" or scale.shape not in ((), (1,)):
        raise module.misfit(end, f"it is {scale.dtype} {list(scale.shape)}, not one F32")
    return scales_of(scale, tuple(1 for _ in shape))


def check_plain(module: Module) -> None:
    """Raise Unsupported for what runs otherwise than a model with plain weights would."""
    if _INPUTS in module.beside:
        problem = f"multiplies the inputs of {module.base!r} by {module.base + _INPUTS!r} before its weight"
        raise Unsupported(module.weight.where, problem, "No plain weight does: load it with the library that wrote it.")
    rotations = module.config.get("transform_config")
    if rotations and not (isinstance(rotations, dict) and not rotations.get("config_groups")):
        problem = "is of a model whose config.json has a 'transform_config': its activations are rotated as it runs"
        raise Unsupported(module.weight.where, problem, _BY_LIBRARY)


# What the config says.


def _said_of(module: Module, kind: str) -> tuple[Said, ...]:
    """Give what a config says of weights that are floats or ints. Raises Unsupported for too many groups."""
    groups = module.config.get("config_groups")
    if not isinstance(groups, dict):
        return ()
    if len(groups) > _MAX_GROUPS:
        raise Unsupported(module.weight.where, f"has a config.json with more than {_MAX_GROUPS} config_groups")
    weights = (group.get("weights") for group in groups.values() if isinstance(group, dict))
    found = (_said(one) for one in weights if isinstance(one, dict))
    return tuple(one for one in found if one.kind == kind)


def _said(weights: Mapping[str, Any]) -> Said:
    """Read what a group says, with the defaults of ``QuantizationArgs`` of compressed-tensors."""
    kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    strategy, group = weights.get("strategy"), weights.get("group_size")
    said = Said(str(kind).lower(), bits if type(bits) is int else 0, is_calibrated=bool(weights.get("actorder")))
    if strategy == "block":
        structure = weights.get("block_structure")
        sides = structure.split("x") if isinstance(structure, str) else structure
        sizes = [_size(side) for side in sides] if isinstance(sides, list) and len(sides) == 2 else []
        return said._replace(height=sizes[0], width=sizes[1]) if all(sizes) and sizes else said
    if strategy in (None, "group", "tensor_group") and _size(group):
        return said._replace(height=1, width=_size(group), divides=True)
    return said


def _size(said: object) -> int:
    """Give the length that a config says, 0 for what is none."""
    size = int(said) if isinstance(said, str) and said.isascii() and said.isdigit() and len(said) < 10 else said
    return size if type(size) is int and 0 < size < _MAX_SIDE else 0


def _is_calibrated(said: tuple[Said, ...]) -> bool:
    return any(one.is_calibrated for one in said)


# Whole numbers in words.


def _packed_shape(module: Module) -> tuple[int, ...]:
    """Give the shape that a packed weight has, as is said beside it. Raises BadFile for one that it cannot have."""
    told, packed = module.scale(_SHAPE), module.weight.shape
    width = {"I64": 8, "I32": 4}.get(told.dtype.tag)
    if width is None or told.shape != (len(packed),) or len(packed) < 2:
        raise module.misfit(_SHAPE, f"it is {told.dtype} {list(told.shape)} beside {list(packed)}")
    shape = struct.unpack(f"<{len(packed)}{'q' if width == 8 else 'i'}", module.contents[_SHAPE])
    if shape[:-1] != packed[:-1] or not 0 < shape[-1] <= 32 * packed[-1]:
        raise module.misfit(_SHAPE, f"it says {list(shape)}, and there are {list(packed)} words")
    return shape


def _bits_of(module: Module, shape: tuple[int, ...], said: tuple[Said, ...]) -> int:
    """Give the bits of each number, which have to fill the words of a row.

    Raises BadFile where no bits do, Unsupported where several do, or where older versions of the library packed the
    same words in another way: as many numbers in each as it holds.
    """
    columns, words = shape[-1], module.weight.shape[-1]
    fitting = [bits for bits in range(1, 9) if -(-columns * bits // 32) == words]
    if said:
        fitting = [bits for bits in fitting if any(one.bits == bits for one in said)]
    if not fitting:
        told = f", as its config.json says {_listed(said)}" if said else ""
        raise module.misfit(_SHAPE, f"{columns} numbers of 1 to 8 bits do not fill {words} words{told}")
    if len(fitting) > 1:
        raise Unsupported(module.weight.where, f"may have several widths of numbers in {module.weight.name!r}")
    [bits] = fitting
    if 32 % bits and -(-columns // (32 // bits)) == words > 1:
        problem = f"may have its numbers of {bits} bits in two ways in {module.weight.name!r}"
        raise Unsupported(module.weight.where, problem, _BY_LIBRARY)
    return bits


def _listed(said: tuple[Said, ...]) -> str:
    return " or ".join(str(bits) for bits in sorted({one.bits for one in said}))


def _decoded(module: Module, bits: int, shape: tuple[int, ...], has_zeros: bool) -> TensorSource:
    source, words = module.weight.source, module.weight.shape
    if 32 % bits or shape[-1] % (32 // bits):
        return unpacked(source, _whole_numbers(bits, has_zeros), shape, len(shape) - 1)
    # No word has room left, so that they are bytes as well, which are faster.
    source = reshaped(source, DTYPES["U8"], (*words[:-1], 4 * words[-1]))
    return Decoded(source, _whole_numbers(bits, has_zeros), shape, len(shape) - 1)


def _zeros_of_packed(module: Module, bits: int, shape: tuple[int, ...], cells: tuple[int, ...]) -> TensorSource | None:
    """Give the zero points of a packed weight: packed themselves, along the rows, but where there is one in all."""
    zeros = module.beside.get(_ZERO)
    if zeros is None or zeros.dtype.tag != "I32":
        return _plain_zeros(module, cells)
    needed = (*cells[:-2], -(-shape[-2] * bits // 32), cells[-1])
    if zeros.shape != needed or cells[-2] != shape[-2]:
        raise module.misfit(_ZERO, f"it is {list(zeros.shape)}, and scales of {list(cells)} need {list(needed)}")
    return unpacked(zeros.source, _whole_numbers(bits, has_zeros=False), cells, len(cells) - 2)


def _plain_zeros(module: Module, cells: tuple[int, ...]) -> TensorSource | None:
    """Give the zero points that lie as they are, one for each scale; None where there are none."""
    zeros = module.beside.get(_ZERO)
    if zeros is None:
        return None
    if zeros.dtype.tag not in ("I8", module.weight.dtype.tag) or zeros.dtype.bits > 8:
        raise module.misfit(_ZERO, f"it is {zeros.dtype}")
    if zeros.shape != module.scale(_SCALE).shape:
        raise module.misfit(_ZERO, f"it is {list(zeros.shape)}, and the scales are not")
    return scales_of(zeros, cells)


def _order_of(module: Module, shape: tuple[int, ...], group: int) -> Tensor | None:
    """Give what says which group each column is in, where that is not the one it lies in.

    Each group has as many columns (``_process_quantization`` in ``quantization/lifecycle/forward.py`` of
    compressed-tensors 0.12). Raises BadFile for others.
    """
    index = module.beside.get(_INDEX)
    if index is None:
        return None
    if len(shape) != 2 or index.dtype.tag != "I32" or index.shape != shape[-1:]:
        raise module.misfit(_INDEX, f"it is {index.dtype} {list(index.shape)} beside {list(shape)}")
    groups = struct.unpack(f"<{shape[-1]}i", module.contents[_INDEX])
    if all(found == -1 for found in groups):
        return None  # as it was before there was an order
    in_order = [column // group for column in range(shape[-1])]
    if sorted(groups) != in_order:
        raise module.misfit(_INDEX, f"it does not have {group} columns in each group")
    return index if list(groups) != in_order else None


def _by_groups(
    numbers: TensorSource,
    grid: TensorSource,
    block: tuple[int, ...],
    order: Tensor | None,
    by: Literal["times", "less"] = "times",
) -> TensorSource:
    if order is None:
        return Gridded(numbers, grid, block, by=by)
    return Indexed(numbers, grid, order.source, order.name, by=by)


# Codes.


@cache
def _whole_numbers(bits: int, has_zeros: bool) -> Coding:
    """Give the coding of whole numbers, the least of which is 0. Beside a rounded zero point the ends are cut off."""
    numbers = coding_of(bits, [float(code - (1 << bits - 1)) for code in range(1 << bits)])
    return numbers._replace(steps=(1.0, *numbers.steps[1:-1], 1.0)) if has_zeros else numbers


@cache
def _eight_bits() -> Coding:
    """Give the coding of int8 beside zero points."""
    values, steps = (one[128:] + one[:128] for one in _whole_numbers(8, has_zeros=True)[1:3])
    return Coding(8, values, steps)


@cache
def _e2m3() -> Coding:
    """Give the coding of floats of 6 bits, in a byte each (``compressors/mxfp6/helpers.py``)."""
    half = (*(code / 8 for code in range(8)), *((1 + code / 8) * 2**power for power in range(3) for code in range(8)))
    return in_bytes(coding_of(6, (*half, *(-one for one in half))))


def _rounded(source: TensorSource, dtype: DType) -> TensorSource:
    """Give float32 numbers as they are in another dtype."""
    return source if dtype.bits == 32 else Widened(Cast(source, dtype))


def _library_dtype(scale: DType) -> DType | None:
    """Give the dtype that the library gives with a scale in one: of float32 the model's, which is bf16 if unsaid."""
    return scale if scale.bits == 16 else None

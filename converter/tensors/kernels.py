"""Numbers: one chunk from dtype to dtype, counting what overflows. The only module that looks at values.

One kernel casts to all targets: numkong's, which rounds to nearest even. Compared with torch's ``.to()`` over all 2**32
float32 patterns it agrees bit for bit in every value that is not NaN, for float16, bfloat16 and both 8-bit floats;
numpy's float16 is 20 times slower, ml_dtypes' bfloat16 3 times, its 8-bit floats 50 times. Two things are mended here:
its bfloat16 and its 8-bit floats lose NaNs, and what to do with a value that is too large is for the user to say. Both
show in the output as its largest bit patterns, so one look for the maximum, at memory speed, finds the chunks that need
a closer one; for bfloat16, where some NaNs become zeros, a second look does, at the source.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

# Before ml_dtypes, which prints a traceback of its own where numpy cannot be loaded.
import numpy as np

# isort: split
import ml_dtypes
import numkong
import numpy.typing as npt

from converter.dtypes import DTYPES, DType, OnOverflow

if TYPE_CHECKING:
    from converter.tensors.base import TensorInfo

Array = npt.NDArray[Any]

_NUMPY_NAMES = {
    "U64": "u8", "I64": "i8", "F64": "f8", "C64": "c8", "F32": "f4", "U32": "u4", "I32": "i4", "F16": "f2",
    "U16": "u2", "I16": "i2", "I8": "i1", "U8": "u1", "BOOL": "u1",
}  # fmt: skip
_ML_NAMES = {
    "BF16": ml_dtypes.bfloat16,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}


@dataclass(frozen=True, slots=True)
class _Target:
    """What a cast to a dtype needs to know; bit patterns are of the positive value."""

    kernel: Literal["float32", "bfloat16", "float16", "e5m2", "e4m3"]  # numkong's names
    limit: float  # magnitudes from here on round to more than the dtype holds
    largest: int  # the largest finite value
    infinity: int | None
    nan: int
    suspect: int  # magnitudes from this pattern on may be other than they should
    loses_nan: bool = False  # the kernel ends some NaNs in finite patterns, which no look at the output finds


# A tie at the limit rounds to the even neighbour: up where the largest mantissa is odd, down in E4M3 (448 is even).
# The kernels of the 8-bit floats end some NaNs, and some values that are too large, in patterns next to the right one.
_TARGETS = {
    "F32": _Target("float32", float.fromhex("0x1.ffffffp127"), 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7F800000),
    "BF16": _Target("bfloat16", float.fromhex("0x1.ffp127"), 0x7F7F, 0x7F80, 0x7FC0, 0x7F80, True),
    "F16": _Target("float16", 65520.0, 0x7BFF, 0x7C00, 0x7E00, 0x7C00),
    "F8_E5M2": _Target("e5m2", 61440.0, 0x7B, 0x7C, 0x7F, 0x7C),
    "F8_E4M3": _Target("e4m3", float(np.nextafter(464.0, 465.0)), 0x7E, None, 0x7F, 0x7E),
}


def cast_chunk(chunk: memoryview, before: DType, out: memoryview, after: DType, on_overflow: OnOverflow) -> int:
    """Cast a chunk of ``before`` into ``out`` as ``after``; give the number of values that are too large for it.

    ``saturate`` makes those the largest finite value, anything else infinity (NaN in E4M3, which has none). NaN stays
    NaN. float64 goes by way of float32, as in torch.
    """
    target = _TARGETS[after.tag]
    values, cast = as_array(chunk, before), as_array(out, after)
    narrow = _as_float32(values, after)
    numkong.astype(narrow, target.kernel, out=cast)
    bits = as_bits(cast)
    # As signed integers the positive magnitudes are the largest, as unsigned ones the negative.
    sign = 1 << (after.bits - 1)
    is_clean = bits.view(f"i{after.itemsize}").max() < target.suspect and bits.max() < sign | target.suspect
    if is_clean and not (target.loses_nan and _has_nan(narrow)):
        return 0
    return _mend(values, narrow, bits, sign, target, on_overflow)


def _as_float32(values: Array, after: DType) -> Array:
    """Go by way of float32 where the kernel would round twice, or not to nearest."""
    if values.dtype == np.float64:
        with np.errstate(over="ignore", invalid="ignore"):
            return values.astype(np.float32)
    if values.dtype.name.endswith("fnuz"):
        return values.astype(np.float32)  # numkong does not know them
    if after.bits == 8 and values.dtype != np.float32:
        return np.asarray(numkong.astype(values, "float32"))
    return values


def _has_nan(values: Array) -> bool:
    with np.errstate(invalid="ignore"):
        largest = values.max()
    return bool(largest != largest)


def _mend(values: Array, narrow: Array, bits: Array, sign: int, target: _Target, on_overflow: OnOverflow) -> int:
    """Set the bits of NaNs and of what is too large; give the number of the latter."""
    with np.errstate(invalid="ignore"):
        wide = narrow.astype(np.float64)
        is_infinite = np.isinf(values.astype(np.float64))
    signs = np.where(np.signbit(wide), sign, 0).astype(bits.dtype)
    too_large = np.abs(wide) >= target.limit
    bits[...] = np.where(np.isnan(wide), signs | target.nan, bits)
    if target.infinity is not None:
        bits[...] = np.where(is_infinite, signs | target.infinity, bits)
        too_large &= ~is_infinite
    beyond = target.nan if target.infinity is None else target.infinity
    bits[...] = np.where(too_large, signs | (target.largest if on_overflow == "saturate" else beyond), bits)
    return int(too_large.sum())


# So many numbers at a time stay in the cache through all steps; more rows than that are taken in turn.
_BLOCK_NUMEL = 1 << 16
_INT8_STEPS = np.float32(127)


def row_maxima(chunk: memoryview, dtype: DType, columns: int) -> bytes:
    """Give the largest magnitude of each row as float32, rounded to float16: the ``SCB`` of bitsandbytes.

    ``chunk`` is whole rows of so many columns. A row with NaN gives NaN, one with values beyond float16 infinity.
    ``int8_vectorwise_quant`` in ``bitsandbytes/backends/default/ops.py`` takes the largest of the rounded values,
    which is the same number.
    """
    rows = _widened(as_array(chunk, dtype)).reshape(-1, columns)
    with np.errstate(invalid="ignore"):
        largest = np.abs(np.maximum(rows.max(axis=1), -rows.min(axis=1)))
    return _widened(_as_float16(largest)).tobytes()


def are_finite(numbers: bytes) -> bool:
    """Say whether float32 numbers are all finite."""
    return bool(np.isfinite(np.frombuffer(numbers, "<f4")).all())


def quantize_chunk(chunk: memoryview, before: DType, out: memoryview, scales: bytes, first: int, columns: int) -> None:
    """Write the elements of a matrix from the ``first`` on into ``out`` as int8, in steps of their row's scale / 127.

    Values are rounded to float16 before and to the nearest step then, halves to even, as ``Int8Params._quantize`` does
    (``bitsandbytes/nn/modules.py``) on the CPU. A row of zeros gives zeros.
    """
    values, quantized = as_array(chunk, before), np.frombuffer(out, "i1")
    largest = np.frombuffer(scales, "<f4")
    # New memory for each block would cost more than the numbers do.
    room = min(len(values), max(_BLOCK_NUMEL, columns))
    halves, numbers = np.empty(room, "<f2"), np.empty(room, "<f4")
    for begin, end, rows in _row_blocks(first, len(values), columns):
        half, flat = halves[: end - begin], numbers[: end - begin]
        part = values[begin:end]
        numkong.astype(_widened(part) if part.dtype == np.float64 else part, "float16", out=half)
        numkong.astype(half, "float32", out=flat)
        wide = flat.reshape(rows.stop - rows.start, -1)
        # torch takes 127 / scale as 127 times the reciprocal, rounded twice (``Tensor.__rtruediv__``).
        steps = np.divide(np.float32(1), largest[rows], out=np.zeros(len(wide), "f4"), where=largest[rows] != 0)
        wide *= (steps * _INT8_STEPS)[:, np.newaxis]
        quantized[begin:end] = np.rint(flat, out=flat)


def dequantize_chunk(
    info: TensorInfo, chunk: memoryview, first: int, out: memoryview, after: DType, on_overflow: OnOverflow
) -> int:
    """Write the int8 elements of a matrix from the ``first`` on into ``out`` as numbers; give how many are too large.

    The product is of float32 numbers, as in ``int8_vectorwise_dequant`` of bitsandbytes, and then cast.
    """
    quantized = np.frombuffer(chunk, "i1")
    wide = np.empty(len(quantized), "<f4")
    for begin, end, factors in _scale_blocks(info, first, len(quantized)):
        block = wide[begin:end].reshape(len(factors), -1)
        np.multiply(quantized[begin:end].reshape(block.shape), factors, out=block)
        block *= 1 / _INT8_STEPS
    if after.tag == "F32":
        out[:] = wide.data.cast("B")
        return 0
    return cast_chunk(wide.data.cast("B"), DTYPES["F32"], out, after, on_overflow)


def int8_errors(
    info: TensorInfo, chunk: memoryview, first: int, source: memoryview, dtype: DType
) -> tuple[int, float, float, float]:
    """Hold int8 elements of a matrix, from the ``first`` on, against the values of ``source`` that they stand for.

    Gives how many are off by more than half a step, not counting the rounding to float16; the largest error as a share
    of its scale; and the sums of all errors and of all magnitudes.
    """
    quantized, values = np.frombuffer(chunk, "i1"), as_array(source, dtype)
    beyond, share, error_sum, magnitude_sum = 0, 0.0, 0.0, 0.0
    for begin, end, factors in _scale_blocks(info, first, len(quantized)):
        found = quantized[begin:end].reshape(len(factors), -1) * (factors / _INT8_STEPS)
        half = _widened(_as_float16(values[begin:end])).reshape(found.shape)
        # What float32 rounds off is less than a thousandth of half a step.
        beyond += int((~(np.abs(found - half) <= factors * np.float32(1.001 / 254))).sum())
        wide = _widened(values[begin:end]).reshape(found.shape)
        errors = np.abs(found - wide)
        shares = np.divide(errors, factors, out=np.zeros_like(errors), where=factors != 0)
        share = max(share, float(shares.max(initial=0.0)))
        error_sum += float(errors.sum(dtype=np.float64))
        magnitude_sum += float(np.abs(wide).sum(dtype=np.float64))
    return beyond, share, error_sum, magnitude_sum


def _scale_blocks(info: TensorInfo, first: int, count: int) -> Iterator[tuple[int, int, Array]]:
    """Cut elements of a matrix as ``_row_blocks`` does; each comes with its scales, an array of all its rows."""
    largest = np.frombuffer(info.scales, "<f4")
    columns = info.shape[1]
    for begin, end, rows in _row_blocks(first, count, columns):
        if not info.scaled_axis:
            yield begin, end, largest[rows, np.newaxis]
            continue
        inside = (first + begin) % columns
        height = rows.stop - rows.start
        part = largest[inside : inside + (end - begin) // height]
        yield begin, end, np.broadcast_to(part, (height, len(part)))


def _widened(values: Array) -> Array:
    if values.dtype == np.float32:
        return values
    if values.dtype == np.float64:
        with np.errstate(over="ignore", invalid="ignore"):
            return values.astype(np.float32)
    return np.asarray(numkong.astype(values, "float32"))


def _as_float16(values: Array) -> Array:
    if values.dtype == np.float16:
        return values
    # float64 goes by way of float32, as in torch.
    return np.asarray(numkong.astype(_widened(values) if values.dtype == np.float64 else values, "float16"))


def _row_blocks(first: int, count: int, columns: int) -> Iterator[tuple[int, int, slice]]:
    """Cut ``count`` elements of a matrix from the ``first`` on: parts of a row at both ends, whole rows between.

    Each comes as where it begins and ends among these elements, and its rows.
    """
    begin = 0
    while begin < count:
        row, inside = divmod(first + begin, columns)
        rows = 1 if inside else max(1, min(_BLOCK_NUMEL, count - begin) // columns)
        end = min(count, begin + rows * columns - inside)
        yield begin, end, slice(row, row + rows)
        begin = end


def count_odd(chunk: memoryview, dtype: DType) -> tuple[int, int, bool]:
    """Count the NaNs and the infinities of a chunk, and say whether it holds anything but zeros."""
    values = as_array(chunk, dtype)
    if numpy_dtype(dtype) is None or not dtype.is_floating:
        return 0, 0, bool(values.any())
    with np.errstate(invalid="ignore"):
        largest = np.abs(values).max() if len(values) else 0.0
    if np.isfinite(largest):
        return 0, 0, bool(largest != 0)
    wide = values.astype(np.float32) if dtype.bits <= 32 else values
    return int(np.isnan(wide).sum()), int(np.isinf(wide).sum()), True


def numpy_dtype(dtype: DType) -> np.dtype[Any] | None:
    """Give numpy's dtype for one of ours; None for the packed ones (F4, F6), which have none."""
    name = _NUMPY_NAMES.get(dtype.tag) or _ML_NAMES.get(dtype.tag)
    return np.dtype(name).newbyteorder("<") if isinstance(name, str) else np.dtype(name) if name else None


def as_array(chunk: memoryview, dtype: DType) -> Array:
    """View a chunk as a flat array of its elements; single bytes where numpy has no such dtype."""
    return np.frombuffer(chunk, numpy_dtype(dtype) or np.dtype("u1"))


def as_bits(values: Array) -> Array:
    """View elements as unsigned integers (pairs of them for complex ones), so that equal means the same bits."""
    return values.view(f"u{min(values.dtype.itemsize, 4)}" if values.dtype.kind == "c" else f"u{values.dtype.itemsize}")


def errors(before: Array, after: Array) -> tuple[float, float]:
    """Give the largest absolute and the largest relative difference of two arrays of real numbers, both shapes alike.

    Differences between two NaNs, or two like infinities, are none.
    """
    wide = np.complex128 if before.dtype.kind == "c" else np.float64
    with np.errstate(all="ignore"):
        old, new = before.astype(wide), after.astype(wide)
        gap = np.abs(old - new)
        gap[(old == new) | (np.isnan(old) & np.isnan(new))] = 0.0
        gap[np.isnan(gap)] = np.inf
        share = np.where(gap == 0, 0.0, gap / np.abs(old))
    return float(gap.max(initial=0.0)), float(share.max(initial=0.0))

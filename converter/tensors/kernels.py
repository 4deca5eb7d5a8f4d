"""Numbers: one chunk from dtype to dtype, counting what overflows.

One kernel casts to all targets: numkong's, which rounds to nearest even. Compared with torch's ``.to()`` over all 2**32
float32 patterns it agrees bit for bit in every value that is not NaN, for float16, bfloat16 and both 8-bit floats;
numpy's float16 is 20 times slower, ml_dtypes' bfloat16 3 times, its 8-bit floats 50 times. Two things are mended here:
its bfloat16 and its 8-bit floats lose NaNs, and what to do with a value that is too large is for the user to say. Both
show in the output as its largest bit patterns, so one look for the maximum, at memory speed, finds the chunks that need
a closer one; for bfloat16, where some NaNs become zeros, a second look does, at the source.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

# Before ml_dtypes, which prints a traceback of its own where numpy cannot be loaded.
import numpy as np

# isort: split
import ml_dtypes
import numkong

from converter.dtypes import DType, OnOverflow

Array = np.ndarray[Any, np.dtype[Any]]

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
    narrow = _as_float32(values, before, after)
    numkong.astype(narrow, target.kernel, out=cast)
    if target.loses_nan and _has_finite_squares(narrow):
        return 0
    bits = as_bits(cast)
    # As signed integers the positive magnitudes are the largest, as unsigned ones the negative.
    sign = 1 << (after.bits - 1)
    is_clean = bits.view(f"i{after.itemsize}").max() < target.suspect and bits.max() < sign | target.suspect
    if is_clean and not (target.loses_nan and _has_nan(narrow)):
        return 0
    return _mend(values, narrow, bits, sign, target, on_overflow)


def _as_float32(values: Array, before: DType, after: DType) -> Array:
    """Go by way of float32 where the kernel would round twice, or not to nearest."""
    if before.tag.endswith("FNUZ"):
        return values.astype(np.float32)  # numkong does not know them
    return widen(values) if after.bits == 8 or before.bits == 64 else values


def _has_finite_squares(values: Array) -> bool:
    """Say, by one look where others take three, that no value is NaN, infinite, or beyond the square root of any limit.

    False of values that it takes longer to square than to look at.
    """
    if values.dtype != np.float32:
        return False
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.dot(values, values)))


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


def widen(values: Array) -> Array:
    """Give real numbers as float32."""
    if values.dtype == np.float32:
        return values
    if values.dtype == np.float64:
        with np.errstate(over="ignore", invalid="ignore"):
            return values.astype(np.float32)
    return np.asarray(numkong.astype(values, "float32"))


def as_float16(values: Array) -> Array:
    """Give real numbers as float16, rounded to nearest even."""
    if values.dtype == np.float16:
        return values
    # float64 goes by way of float32, as in torch.
    return np.asarray(numkong.astype(widen(values) if values.dtype == np.float64 else values, "float16"))


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


def count_zeros(chunk: memoryview, dtype: DType) -> int:
    """Count the elements of a chunk that are zero; none where numpy has no such dtype."""
    return 0 if numpy_dtype(dtype) is None else int((as_array(chunk, dtype) == 0).sum())


@cache
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

"""Numbers: chunks of bytes as numpy arrays. The only module that looks at values.

bfloat16 and the 8-bit floats come from ml_dtypes, whose casts round to nearest even and agree with torch's bit for bit
in every value that is not NaN.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from converter.dtypes import DType

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


def numpy_dtype(dtype: DType) -> np.dtype[Any] | None:
    """Give numpy's dtype for one of ours; None for the packed ones (F4, F6), which have none."""
    name = _NUMPY_NAMES.get(dtype.tag) or _ML_NAMES.get(dtype.tag)
    return np.dtype(name).newbyteorder("<") if isinstance(name, str) else np.dtype(name) if name else None


def as_array(chunk: memoryview, dtype: DType) -> npt.NDArray[Any]:
    """View a chunk as a flat array of its elements; single bytes where numpy has no such dtype."""
    return np.frombuffer(chunk, numpy_dtype(dtype) or np.dtype("u1"))


def as_bits(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """View elements as unsigned integers (pairs of them for complex ones), so that equal means the same bits."""
    return values.view(f"u{min(values.dtype.itemsize, 4)}" if values.dtype.kind == "c" else f"u{values.dtype.itemsize}")


def cast_values(values: npt.NDArray[Any], dtype: DType) -> npt.NDArray[Any]:
    """Cast an array of real numbers to a dtype, to nearest even; what is too large becomes infinite or NaN."""
    with np.errstate(all="ignore"):
        return values.astype(numpy_dtype(dtype))


def errors(before: npt.NDArray[Any], after: npt.NDArray[Any]) -> tuple[float, float]:
    """Give the largest absolute and the largest relative difference of two arrays of real numbers, both shapes alike.

    Differences between two NaNs, or two like infinities, are none.
    """
    wide = np.complex128 if before.dtype.kind == "c" else np.float64
    old, new = before.astype(wide), after.astype(wide)
    with np.errstate(all="ignore"):
        gap = np.abs(old - new)
        gap[(old == new) | (np.isnan(old) & np.isnan(new))] = 0.0
        gap[np.isnan(gap)] = np.inf
        share = np.where(gap == 0, 0.0, gap / np.abs(old))
    return float(gap.max(initial=0.0)), float(share.max(initial=0.0))

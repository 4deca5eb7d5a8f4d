"""The numbers of LLM.int8: rows of a matrix in steps of 1/127 of their largest magnitude, and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numkong
import numpy as np

from converter.dtypes import DType
from converter.tensors.kernels import as_array, as_float16, widen

# So many numbers at a time stay in the cache through all steps; more rows than that are taken in turn.
_BLOCK_NUMEL = 1 << 16
_INT8_STEPS = np.float32(127)


class RowScales(NamedTuple):
    """What the rows of a matrix of so many columns are scaled by: float32 ``numbers``, the largest of each."""

    numbers: bytes
    columns: int


def row_maxima(chunk: memoryview, dtype: DType, columns: int) -> bytes:
    """Give the largest magnitude of each row as float32, rounded to float16: the ``SCB`` of bitsandbytes.

    ``chunk`` is whole rows of so many columns. A row with NaN gives NaN, one with values beyond float16 infinity.
    ``int8_vectorwise_quant`` in ``bitsandbytes/backends/default/ops.py`` takes the largest of the rounded values,
    which is the same number.
    """
    rows = widen(as_array(chunk, dtype)).reshape(-1, columns)
    with np.errstate(invalid="ignore"):
        largest = np.abs(np.maximum(rows.max(axis=1), -rows.min(axis=1)))
    return widen(as_float16(largest)).tobytes()


def are_finite(numbers: bytes) -> bool:
    """Say whether float32 numbers are all finite."""
    return bool(np.isfinite(np.frombuffer(numbers, "<f4")).all())


def quantize_chunk(chunk: memoryview, before: DType, out: memoryview, rows: RowScales, first: int) -> None:
    """Write the elements of a matrix from the ``first`` on into ``out`` as int8, in steps of their row's scale / 127.

    Values are rounded to float16 before and to the nearest step then, halves to even, as ``Int8Params._quantize`` does
    (``bitsandbytes/nn/modules.py``) on the CPU. A row of zeros gives zeros.
    """
    values, quantized = as_array(chunk, before), np.frombuffer(out, "i1")
    largest = np.frombuffer(rows.numbers, "<f4")
    # New memory for each block would cost more than the numbers do.
    room = min(len(values), max(_BLOCK_NUMEL, rows.columns))
    halves, numbers = np.empty(room, "<f2"), np.empty(room, "<f4")
    for begin, end, block in _row_blocks(first, len(values), rows.columns):
        half, flat = halves[: end - begin], numbers[: end - begin]
        part = values[begin:end]
        numkong.astype(widen(part) if part.dtype == np.float64 else part, "float16", out=half)
        numkong.astype(half, "float32", out=flat)
        wide = flat.reshape(block.stop - block.start, -1)
        # torch takes 127 / scale as 127 times the reciprocal, rounded twice (``Tensor.__rtruediv__``).
        steps = np.divide(np.float32(1), largest[block], out=np.zeros(len(wide), "f4"), where=largest[block] != 0)
        wide *= (steps * _INT8_STEPS)[:, np.newaxis]
        quantized[begin:end] = np.rint(flat, out=flat)


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

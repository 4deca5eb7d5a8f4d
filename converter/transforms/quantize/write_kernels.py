"""The numbers that are written of a weight, as the libraries make them: int8 by rows, 4 bits in blocks, and float8."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

# Before numkong, which has numpy loaded from its midst: where another thread is loading it too, neither is whole.
import numpy as np

# isort: split
import numkong

from converter.dtypes import DTYPES, DType
from converter.tensors.kernels import Array, as_array, as_float16, cast_chunk, widen

# So many numbers at a time stay in the cache through all steps; more rows than that are taken in turn.
_BLOCK_NUMEL = 1 << 16
_INT8_STEPS = np.float32(127)
_LEAST_SCALE = np.float32(1e-38)  # that the smallest of 4-bit blocks are divided by


class RowScales(NamedTuple):
    """What the rows of a matrix of so many columns are scaled by: float32 ``numbers``, the largest of each."""

    numbers: bytes
    columns: int


def in_halves(numbers: bytes) -> bytes:
    """Round float32 numbers to float16, infinity beyond those, and give them in float32 again.

    Of the largest magnitudes of rows that is the ``SCB`` of bitsandbytes: ``int8_vectorwise_quant`` in
    ``bitsandbytes/backends/default/ops.py`` takes the largest of the rounded values, which is the same number.
    """
    return widen(as_float16(np.frombuffer(numbers, "<f4"))).tobytes()


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


def block_maxima(chunk: memoryview, dtype: DType, size: int) -> bytes | None:
    """Give the largest magnitude of each ``size`` numbers as float32, the last for fewer perhaps; None if not finite.

    That for fewer is 1e-38 at least, as in ``quantize_4bit`` of ``bitsandbytes/backends/default/ops.py``.
    """
    values = as_array(chunk, dtype)
    step = max(1, _BLOCK_NUMEL // size) * size
    parts = [_maxima(widen(values[at : at + step]), size) for at in range(0, len(values), step)]
    largest = np.concatenate(parts) if parts else np.empty(0, "<f4")
    return largest.tobytes() if np.isfinite(largest).all() else None


def _maxima(values: Array, size: int) -> Array:
    # Without their signs the bits of floating numbers are in the order of these, NaN the last, and faster to compare.
    bits = values.view("<i4") & np.int32(0x7FFFFFFF)
    whole = len(bits) // size * size
    largest: Array = bits[:whole].reshape(-1, size).max(axis=1).view("<f4")
    if whole == len(bits):
        return largest
    return np.append(largest, np.maximum(bits[whole:].max().view("<f4"), _LEAST_SCALE))


def pack_blocks(chunk: memoryview, dtype: DType, size: int, codes: tuple[float, ...]) -> bytes | None:
    """Give numbers as 4-bit codes, two in a byte, the first in the high half; None if they are not finite.

    Each number is divided by the largest magnitude of its block of ``size``, and takes the nearest of ``codes``, which
    are in order; halfway between two it is the lower. As ``quantize_4bit`` does: products with the float32
    reciprocal, but for a shorter last block, which is divided; what is left of the last byte is the code of 0.
    """
    values = as_array(chunk, dtype)
    table = np.array(codes, "<f4")
    bounds = (table[:-1] + table[1:]) / np.float32(2)
    packed = np.empty(-(-len(values) // 2), "u1")
    step = max(1, _BLOCK_NUMEL // size) * size
    wide, found = np.empty(step, "<f4"), np.empty(step, "u1")
    above = np.empty(step, bool)
    for begin in range(0, len(values), step):
        part = widen(values[begin : begin + step])
        largest = _maxima(part, size)
        if not np.isfinite(largest).all():
            return None
        count = len(part)
        shares, code, is_above = wide[: count + count % 2], found[: count + count % 2], above[: count + count % 2]
        whole = count // size * size
        scales = np.float32(1) / np.maximum(largest[: whole // size], _LEAST_SCALE)
        np.multiply(part[:whole].reshape(-1, size), scales[:, np.newaxis], out=shares[:whole].reshape(-1, size))
        if whole < count:
            np.divide(part[whole:], largest[-1], out=shares[whole:count])
        shares[count:] = 0
        # One look for each bound takes a tenth of the time of a search.
        np.greater(shares, bounds[0], out=code.view(bool))
        for bound in bounds[1:]:
            np.greater(shares, bound, out=is_above)
            np.add(code, is_above.view("u1"), out=code)
        pairs = code.view("<u2")
        packed[begin // 2 : begin // 2 + len(pairs)] = (pairs << 4) | (pairs >> 8)
    return packed.tobytes()


# Float8, and the largest magnitudes that all are scaled by.


def cell_maxima(chunk: memoryview, dtype: DType, cell: tuple[int, int], columns: int) -> bytes:
    """Give the largest magnitude of each cell of some rows of a matrix, row-major, as float32; NaN where it has one.

    Cells divide the rows; a matrix that is narrower than a cell is a part of one.
    """
    rows, wide = cell[0], min(cell[1], columns)
    values = widen(as_array(chunk, dtype))
    with np.errstate(invalid="ignore"):
        if wide == columns:
            cells = values.reshape(-1, rows * columns)
            largest = np.maximum(cells.max(axis=1), -cells.min(axis=1))
        else:
            bands = values.reshape(-1, rows, columns)
            largest = np.maximum(bands.max(axis=1), -bands.min(axis=1))
            largest = largest.reshape(-1, columns // wide, wide).max(axis=2)
        found: bytes = np.abs(largest).tobytes()  # of zeros none is negative
    return found


def raise_maxima(maxima: bytearray, part: bytes, first: int) -> None:
    """Raise float32 numbers from the ``first`` on to others where those are larger, or NaN."""
    others = np.frombuffer(part, "<f4")
    known = np.frombuffer(maxima, "<f4")[first : first + len(others)]
    np.maximum(known, others, out=known)


_E4M3_LARGEST = np.float32(448)


def float8_into(numbers: memoryview, out: memoryview) -> None:
    """Write finite float32 numbers into ``out`` as F8_E4M3, rounded to nearest even; those are cut in place before."""
    values = np.frombuffer(numbers, "<f4")
    np.clip(values, -_E4M3_LARGEST, _E4M3_LARGEST, out=values)
    # The kernel is right for all that it can hold (``converter/tensors/kernels.py``).
    numkong.astype(values, "e4m3", out=as_array(out, DTYPES["F8_E4M3"]))


def block_scales(maxima: bytes) -> tuple[bytes, bytes]:
    """Give what blocks are multiplied with to fill float8, and the reciprocals, of the largest magnitude of each.

    torch takes 448 / largest as 448 times the reciprocal, rounded twice (``Tensor.__rtruediv__``). Zeros stay zeros,
    and so does what is so small that torch has infinity for it, and NaN for the zeros beside it.
    """
    largest = np.frombuffer(maxima, "<f4")
    with np.errstate(divide="ignore", over="ignore"):
        factors = _E4M3_LARGEST * (np.float32(1) / largest)
        factors[np.isinf(factors)] = 1
        return factors.tobytes(), (np.float32(1) / factors).tobytes()


def row_scales(maxima: bytes, dtype: DType) -> tuple[bytes, bytes]:
    """Give what rows are divided by to fill float8, in float32 and in the dtype that it is rounded to.

    A row of zeros has the dtype's epsilon.
    """
    scales = np.frombuffer(maxima, "<f4") / _E4M3_LARGEST
    rounded = bytearray(len(scales) * dtype.itemsize)
    cast_chunk(memoryview(scales.tobytes()), DTYPES["F32"], memoryview(rounded), dtype, "error")
    wide = widen(as_array(memoryview(rounded), dtype)).copy()
    epsilon = {"F32": 2.0**-23, "BF16": 2.0**-7, "F16": 2.0**-10}[dtype.tag]
    wide[wide == 0] = epsilon
    cast_chunk(memoryview(wide.tobytes()), DTYPES["F32"], memoryview(rounded), dtype, "error")
    return wide.tobytes(), bytes(rounded)


def whole_scale(maxima: bytes) -> tuple[bytes, bytes]:
    """Give what a weight is multiplied with to fill float8, and its scale, of the largest magnitudes of its parts.

    One of zeros, or nearly, has the scale 1.
    """
    scale = np.frombuffer(maxima, "<f4").max(initial=0) / _E4M3_LARGEST
    with np.errstate(divide="ignore", over="ignore"):
        factor = np.float32(1) / scale
    if not np.isfinite(factor):
        scale = factor = np.float32(1)
    return factor.tobytes(), scale.tobytes()

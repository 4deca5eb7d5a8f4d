"""The numbers of quantized weights: codes to float32, and a coarser grid of scales to each of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numkong
import numpy as np

from converter.dtypes import DTYPES, DType
from converter.tensors.kernels import Array, as_array, cast_chunk, numpy_dtype, widen

if TYPE_CHECKING:
    from converter.transforms.quantize.codes import Coding

# What numpy takes a code's numbers for, where one byte has so many: their bits move as one element does.
_TOGETHER = {1: "<f4", 2: "<u8", 4: "<c16"}

_LEAST = np.float32(2**-25)  # half the smallest number of float16, by way of which some schemes go


def widen_into(chunk: memoryview, dtype: DType, out: memoryview) -> None:
    """Write the elements of a chunk into ``out`` as float32; none is rounded but 64-bit ones."""
    values, wide = as_array(chunk, dtype), np.frombuffer(out, "<f4")
    if dtype.tag in ("F8_E4M3", "F8_E5M2", "BF16", "F16"):
        numkong.astype(values, "float32", out=wide)
    elif dtype.tag == "F8_E8M0":
        np.take(_exponents(), values.view("u1"), out=wide, mode="clip")
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            wide[...] = values


@cache
def _exponents() -> Array:
    return np.arange(256, dtype="u1").view(numpy_dtype(DTYPES["F8_E8M0"]) or "u1").astype("f4")


def are_finite(numbers: memoryview) -> bool:
    """Say whether float32 numbers are all finite."""
    return bool(np.isfinite(np.frombuffer(numbers, "<f4")).all())


def steps_into(chunk: memoryview, dtype: DType, out: memoryview) -> None:
    """Write half the distance from each element of a chunk to the next of its dtype into ``out`` as float32.

    Beyond the largest there is none, so what was rounded to that may have been off by any amount: there it is the
    distance to the one before, doubled. 0 for dtypes of 16 bits and more.
    """
    wide = np.frombuffer(out, "<f4")
    if dtype.bits > 8:
        wide[...] = 0
    else:
        np.take(_steps(dtype), np.frombuffer(chunk, "u1"), out=wide, mode="clip")


@cache
def _steps(dtype: DType) -> Array:
    codes = np.arange(256, dtype="u1").view(numpy_dtype(dtype) or "u1").astype("f4")
    return np.array(half_steps(codes.tolist()), "f4")


def half_steps(values: list[float]) -> tuple[float, ...]:
    """Give, for each value of a code, half the distance to the farther one of its neighbours; 0 for one alone."""
    known = sorted({value for value in values if np.isfinite(value)})
    gaps = [0.0, *(after - before for before, after in itertools.pairwise(known)), 0.0]
    found = {value: max(gaps[at], gaps[at + 1]) / 2 for at, value in enumerate(known)}
    return tuple(found.get(value, 0.0) for value in values)


def decode(chunk: memoryview, coding: Coding, inner: int, skipped: int, out: memoryview) -> None:
    """Write the numbers of words into ``out`` as float32, but for the first ``skipped`` ones.

    ``inner`` words lie side by side: their first numbers come first, then their second ones.
    """
    wide = np.frombuffer(out, "<f4")
    per = coding.per_word
    count = len(chunk) // coding.width * per
    if skipped or len(wide) != count:
        whole = np.empty(count, "<f4")
        _decode(chunk, coding, inner, whole)
        wide[...] = whole[skipped : skipped + len(wide)]
    else:
        _decode(chunk, coding, inner, wide)


def look_up(chunk: memoryview, table: memoryview, out: memoryview) -> None:
    """Write the float32 numbers of a table of 256 that the bytes of a chunk stand for into ``out``."""
    np.take(np.frombuffer(table, "<f4"), np.frombuffer(chunk, "u1"), out=np.frombuffer(out, "<f4"), mode="clip")


def table_of_steps(table: memoryview) -> bytes:
    """Give half the distance from each number of a float32 table to the farther one of its neighbours, as it is."""
    return np.array(half_steps(np.frombuffer(table, "<f4").tolist()), "<f4").tobytes()


def _decode(chunk: memoryview, coding: Coding, inner: int, wide: Array) -> None:
    per = coding.per_word
    words = np.frombuffer(chunk, f"<u{coding.width}")
    if inner == 1 and coding.width == 1 and per in _TOGETHER:
        together = _TOGETHER[per]
        table = _words(coding.bits, np.array(coding.values, "<f4").tobytes(), coding.order)
        np.take(table.view(together)[:, 0], words, out=wide.view(together), mode="clip")
        return
    rows = wide.reshape(-1, per, inner)
    words = words.reshape(-1, inner)
    values = np.array(coding.values, "f4")
    mask = words.dtype.type((1 << coding.bits) - 1)
    for place in range(per):
        codes = (words >> words.dtype.type(coding.bits * place)) & mask
        number = coding.order[place] if coding.order else place
        if inner == 1:
            rows[:, number, 0] = values.take(codes[:, 0], mode="clip")
        else:
            for row, code in zip(rows[:, number], codes, strict=True):
                np.take(values, code, out=row, mode="clip")


@cache
def _words(bits: int, values: bytes, order: tuple[int, ...]) -> Array:
    """Give the numbers of each byte, [256, 8 // bits]; bytes tell 0 from -0, which numbers do not."""
    codes = np.arange(256, dtype="u1")[:, np.newaxis] >> np.arange(0, 8, bits, dtype="u1")
    numbers: Array = np.empty(codes.shape, "<f4")
    numbers[:, order or range(len(numbers[0]))] = np.frombuffer(values, "<f4")[codes & ((1 << bits) - 1)]
    return numbers


def unswizzle(chunk: memoryview, out: memoryview, shape: tuple[int, int], start: tuple[int, int]) -> None:
    """Write a box of a matrix of bytes into ``out``, the matrix of ``shape``, of which tiles of 128 x 4 are given.

    The tiles lie side by side, row ``32 * k + r`` of each as the bytes ``16 * r + 4 * k`` to ``+ 4`` of its 512.
    ``start`` is where the first tile begins in the box, which may be before it.
    """
    tiles = np.frombuffer(chunk, "u1").reshape(-1, 32, 4, 4).transpose(2, 1, 0, 3)
    values = tiles.reshape(128, -1)
    target = np.frombuffer(out, "u1").reshape(shape)
    row, column = start
    into = target[max(0, row) : row + 128, max(0, column) : column + values.shape[1]]
    top, left = max(0, -row), max(0, -column)
    into[...] = values[top : top + into.shape[0], left : left + into.shape[1]]


def apply_grid(
    out: memoryview,
    shape: tuple[int, ...],
    numbers: memoryview,
    grid_shape: tuple[int, ...],
    block: tuple[int, ...],
    origin: tuple[int, ...],
    by: str,
) -> None:
    """Multiply the float32 numbers of a box in place with those of a grid; or divide by them, or take them off.

    ``origin`` is where the box begins in the grid's first block.
    """
    ufunc = {"times": np.multiply, "over": np.divide, "less": np.subtract}[by]
    values = np.frombuffer(out, "<f4").reshape(shape)
    grid = np.frombuffer(numbers, "<f4").reshape(grid_shape)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for part, cells, sizes in _aligned(values, grid, block, origin):
            split = part.reshape([n for cell, size in zip(cells.shape, sizes, strict=True) for n in (cell, size)])
            ufunc(split, cells.reshape([n for cell in cells.shape for n in (cell, 1)]), out=split)


def _aligned(
    values: Array, grid: Array, block: tuple[int, ...], origin: tuple[int, ...]
) -> Iterator[tuple[Array, Array, tuple[int, ...]]]:
    """Cut values into parts in which each number of the grid is for as many along each axis: with those, and how many.

    Along an axis these are the rest of a block at both ends, and whole ones between.
    """
    spans = [list(_spans(*sides)) for sides in zip(values.shape, block, origin, strict=True)]
    for choice in itertools.product(*spans):
        of_values = tuple(slice(begin, end) for begin, end, _, _ in choice)
        of_grid = tuple(slice(cell, cell + (end - begin) // size) for begin, end, cell, size in choice)
        yield values[of_values], grid[of_grid], tuple(size for _, _, _, size in choice)


def _spans(length: int, block: int, origin: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut an axis: begin and end of each part, its first cell, and how many elements each cell is for."""
    begin, cell = 0, 0
    while begin < length:
        inside = (origin + begin) % block
        size = min(block - inside, length - begin)
        count = (length - begin) // block if size == block else 1
        yield begin, begin + count * size, cell, size
        begin, cell = begin + count * size, cell + count


class Rounding(NamedTuple):
    """How far numbers are off: how many by more than is allowed, the largest error, and sums to take means of."""

    beyond: int
    largest_error: float
    largest: float
    error_sum: float
    magnitude_sum: float


def rounding_errors(
    source: memoryview, dtype: DType, found: memoryview, steps: memoryview, slack: float | None
) -> Rounding:
    """Hold float32 numbers against those of ``source`` that they stand for, in ``dtype``.

    ``steps`` is how far each may be off, and ``slack`` what share of itself besides; without one by any finite number.
    """
    wide = widen(as_array(source, dtype))
    numbers, allowed = np.frombuffer(found, "<f4"), np.frombuffer(steps, "<f4")
    magnitudes = np.abs(wide)
    with np.errstate(over="ignore", invalid="ignore"):
        errors = np.abs(numbers - wide)
        if slack is None:
            beyond = int((~np.isfinite(errors)).sum())
        else:
            # What float32 rounds off of products is less than a thousandth of a step.
            bounds = np.abs(allowed) * np.float32(1.001) + magnitudes * np.float32(slack) + _LEAST
            beyond = int((~(errors <= bounds)).sum())
    sums = (float(one.sum(dtype=np.float64)) for one in (errors, magnitudes))
    return Rounding(beyond, float(errors.max(initial=0.0)), float(magnitudes.max(initial=0.0)), *sums)


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


def block_scales(maxima: bytes) -> tuple[bytes, bytes]:
    """Give what blocks are multiplied with to fill float8, and the reciprocals, of the largest magnitude of each.

    torch takes 448 / largest as 448 times the reciprocal, rounded twice (``Tensor.__rtruediv__``). Zeros stay zeros.
    """
    largest = np.frombuffer(maxima, "<f4")
    with np.errstate(divide="ignore", over="ignore"):
        factors = np.where(largest > 0, _E4M3_LARGEST * (np.float32(1) / largest), np.float32(1))
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


def copy_columns(
    rows: memoryview, shape: tuple[int, int], size: int, out: memoryview, first: int, row: int, height: int
) -> None:
    """Copy what is asked of a transposed matrix from some rows of it, elements of ``size`` bytes.

    ``out`` is the elements from the ``first`` on of the transposed one, whose rows are ``height`` long; the rows here
    are of ``shape`` and begin at ``row``.
    """
    source: Any = np.frombuffer(rows, f"<u{size}").reshape(shape)
    target = np.frombuffer(out, f"<u{size}")
    # Columns of which all is asked lie between two of which a part may be.
    begin, end = first, first + len(target)
    for column in range(begin // height, -(-end // height)):
        low, high = max(begin, column * height + row), min(end, column * height + row + shape[0])
        if low < high:
            inside = low - column * height - row
            target[low - begin : high - begin] = source[inside : inside + high - low, column]


def unpack_dense(chunk: memoryview, bits: int, inner: int, skipped: int, out: memoryview) -> None:
    """Write codes that lie one behind another in 32-bit words into ``out``, a byte each, but the first ``skipped``.

    32 codes fill as many words as each has bits; ``inner`` words lie side by side, each with codes of its own.
    """
    known = np.frombuffer(chunk, "<u4").reshape(-1, inner)
    units = -(-len(known) // bits)
    padded = np.zeros((units * bits + 1, inner), "<u8")  # one more, of which no code has a bit
    padded[: len(known)] = known
    codes = np.empty((units, 32, inner), "u1")
    for place in range(32):
        word, shift = divmod(bits * place, 32)
        both = padded[word:-1:bits] | padded[word + 1 :: bits][:units] << np.uint64(32)
        codes[:, place] = both >> np.uint64(shift) & np.uint64((1 << bits) - 1)
    np.frombuffer(out, "u1")[...] = codes.reshape(-1)[skipped : skipped + len(out)]

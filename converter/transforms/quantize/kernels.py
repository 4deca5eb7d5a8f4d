"""The numbers of quantized weights: codes to float32, and a coarser grid of scales to each of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

# Before numkong, which has numpy loaded from its midst: where another thread is loading it too, neither is whole.
import numpy as np

# isort: split
import numkong

from converter.dtypes import DTYPES, DType
from converter.tensors.kernels import Array, as_array, numpy_dtype, widen
from converter.transforms.quantize.codes import Coding, half_steps

# What numpy takes a code's numbers for, where one byte has so many: their bits move as one element does.
_TOGETHER = {1: "<f4", 2: "<u8", 4: "<c16"}

DECODING_NBYTES = 1 << 18  # numbers are looked up together and then put apart: they stay in the cache

_UFUNCS: Mapping[str, np.ufunc] = {"times": np.multiply, "over": np.divide, "less": np.subtract}

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


def fill_alike(numbers: memoryview, value: float) -> bool:
    """Write a value over float32 numbers that are all the same; give False, and leave others as they are."""
    found = np.frombuffer(numbers, "<f4")
    if len(found) and not (found == found[0]).all():
        return False
    found[...] = value
    return True


def steps_into(chunk: memoryview, dtype: DType, out: memoryview) -> None:
    """Write half the distance from each element of a chunk to the next of its dtype into ``out`` as float32.

    Of the two next to it that is the farther one; beyond the largest there is none. 0 for dtypes of 16 bits and more.
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


def decode(chunk: memoryview, coding: Coding, inner: int, skipped: int, out: memoryview, room: memoryview) -> None:
    """Write the numbers of words into ``out`` as float32, but for the first ``skipped`` ones.

    ``inner`` words lie side by side: their first numbers come first, then their second ones. ``room`` is of
    DECODING_NBYTES to work in.
    """
    wide = np.frombuffer(out, "<f4")
    unit, nbytes = inner * coding.per_word, inner * coding.width
    done, at = 0, 0
    while done < len(wide):
        inside = 0 if done else skipped
        units = (len(wide) - done) // unit
        if inside or not units:
            # Of the words at both ends not all may be asked for.
            taken, units = min(unit - inside, len(wide) - done), 1
            whole = np.empty(unit, "<f4")
            _decode(chunk[at : at + nbytes], coding, inner, whole, room)
            wide[done : done + taken] = whole[inside : inside + taken]
        else:
            taken = units * unit
            _decode(chunk[at : at + units * nbytes], coding, inner, wide[done : done + taken], room)
        done, at = done + taken, at + units * nbytes


def look_up(chunk: memoryview, table: memoryview, out: memoryview) -> None:
    """Write the float32 numbers of a table of 256 that the bytes of a chunk stand for into ``out``."""
    np.take(np.frombuffer(table, "<f4"), np.frombuffer(chunk, "u1"), out=np.frombuffer(out, "<f4"), mode="clip")


def table_of_steps(table: memoryview) -> bytes:
    """Give half the distance from each number of a float32 table to the farther one of its neighbours, as it is."""
    return np.array(half_steps(np.frombuffer(table, "<f4").tolist()), "<f4").tobytes()


def _decode(chunk: memoryview, coding: Coding, inner: int, wide: Array, room: memoryview) -> None:
    raw, bits = np.frombuffer(chunk, "u1"), coding.bits
    values = np.array(coding.values, "<f4").tobytes()
    offset = _offset(values)
    # Words are as their bytes, unless they have an order of their own.
    in_bytes = inner == 1 and bits in (2, 4, 8) and (coding.width == 1 or not coding.order)
    if in_bytes and (offset is None or coding.order):
        together = _TOGETHER[8 // bits]
        table = _words(bits, values, coding.order)
        np.take(table.view(together)[:, 0], raw, out=wide.view(together), mode="clip")
        return
    if in_bytes and offset is not None and bits >= 4:
        if bits == 4:
            _add_halves(raw, offset, wide, room)
        else:
            np.add(raw, offset, out=wide)
        return
    words = raw.reshape(-1, inner, coding.width)
    rows = wide.reshape(-1, coding.per_word, inner)
    if offset is None and coding.width == 1 and bits < 8:
        _put_apart(words[:, :, 0], _words(bits, values, coding.order), rows, room)
        return
    table = np.frombuffer(values, "<f4")
    for place in range(coding.per_word):
        codes = _codes_at(words, place * bits, bits)
        out = rows[:, coding.order[place] if coding.order else place]
        if offset is None:
            out[...] = table.take(codes, mode="clip")
        else:
            np.add(codes, offset, out=out)


def _codes_at(words: Array, at: int, bits: int) -> Array:
    """Give the codes of words [.., width], in bytes, that begin at a bit; some lie in two bytes."""
    byte, shift = divmod(at, 8)
    codes = words[..., byte] >> np.uint8(shift)
    if shift + bits > 8:
        codes = codes | (words[..., byte + 1] << np.uint8(8 - shift))
    found: Array = codes & np.uint8((1 << bits) - 1)
    return found


def _add_halves(raw: Array, offset: Array, wide: Array, room: memoryview) -> None:
    """Write both halves of bytes, the lower one first, with an offset added."""
    step = len(room) // 4
    pairs, shifted = np.frombuffer(room, "<u2").reshape(2, step)
    for begin in range(0, len(raw), step):
        part = raw[begin : begin + step]
        pair, other = pairs[: len(part)], shifted[: len(part)]
        pair[...] = part
        np.left_shift(pair, 4, out=other)
        np.bitwise_or(pair, other, out=pair)
        np.bitwise_and(pair, 0x0F0F, out=pair)
        np.add(pair.view("u1"), offset, out=wide[2 * begin : 2 * (begin + len(part))])


def _put_apart(words: Array, table: Array, rows: Array, room: memoryview) -> None:
    """Write the numbers of bytes, which ``table`` has for each, into the rows that each place has."""
    per = table.shape[1]
    together = table.view(_TOGETHER[per])[:, 0]
    free = np.frombuffer(room, together.dtype)
    height, width = words.shape
    step = max(1, len(free) // width)
    for row in range(0, height, step):
        for begin in range(0, width, len(free)):
            part = words[row : row + step, begin : begin + len(free)]
            found = np.take(together, part, out=free[: part.size].reshape(part.shape), mode="clip")
            numbers = found.view("<f4").reshape(*part.shape, per)
            for place in range(per):
                rows[row : row + step, place, begin : begin + len(free)] = numbers[:, :, place]


@cache
def _offset(values: bytes) -> Array | None:
    """Give what makes each code its value when it is added, where there is such a number."""
    numbers = np.frombuffer(values, "<f4")
    added = np.arange(len(numbers), dtype="<f4") + numbers[0]
    return numbers[0] if added.tobytes() == values else None


@cache
def _words(bits: int, values: bytes, order: tuple[int, ...]) -> Array:
    """Give the numbers of each byte, [256, 8 // bits]; bytes tell 0 from -0, which numbers do not."""
    codes = np.arange(256, dtype="u1")[:, np.newaxis] >> np.arange(0, 8, bits, dtype="u1")
    numbers: Array = np.empty(codes.shape, "<f4")
    numbers[:, order or range(len(numbers[0]))] = np.frombuffer(values, "<f4")[codes & ((1 << bits) - 1)]
    return numbers


def unrotate(numbers: memoryview, group: int) -> None:
    """Multiply float32 numbers in place, each ``group`` of them, with the regular Hadamard matrix of its size.

    Of whole numbers of 8 bits all products and sums are exact, in whatever order they are taken.
    """
    values = np.frombuffer(numbers, "<f4")
    inner = 1
    while inner < group:
        # A product of small matrices, as the large one is, takes a small part of its steps.
        matrix = _hadamard(min(16, group // inner))
        parts = values.reshape(-1, len(matrix), inner)
        parts[...] = np.matmul(matrix, parts) if inner > 1 else (parts[:, :, 0] @ matrix)[:, :, np.newaxis]
        inner *= len(matrix)


@cache
def _hadamard(group: int) -> Array:
    """Give the Kronecker product of as many matrices of 4 x 4 as there are fours in ``group``, each its own inverse."""
    four = (np.ones((4, 4), "f4") - 2 * np.eye(4, dtype="f4")[::-1]) / 2
    return four if group == 4 else np.kron(_hadamard(group // 4), four)


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
    ufunc = _UFUNCS[by]
    values = np.frombuffer(out, "<f4").reshape(shape)
    grid = np.frombuffer(numbers, "<f4").reshape(grid_shape)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for part, cells, sizes in _aligned(values, grid, block, origin):
            split = part.reshape([n for cell, size in zip(cells.shape, sizes, strict=True) for n in (cell, size)])
            ufunc(split, cells.reshape([n for cell in cells.shape for n in (cell, 1)]), out=split)


def apply_columns(
    out: memoryview,
    numbers: memoryview,
    height: int,
    index: memoryview,
    dtype: DType,
    columns: tuple[int, int],
    by: str,
) -> bool:
    """Multiply float32 numbers, some ``columns`` of rows, in place with those of a grid; or divide by them, and so on.

    ``numbers`` are the grid's for these rows; ``index`` says for each column which of a row. Gives False, and leaves
    ``out`` as it is, where there is none.
    """
    ufunc = _UFUNCS[by]
    grid = np.frombuffer(numbers, "<f4").reshape(height, -1)
    groups = np.frombuffer(index, numpy_dtype(dtype))[slice(*columns)]
    values = np.frombuffer(out, "<f4").reshape(height, len(groups))
    if len(groups) and (groups.min() < 0 or groups.max() >= grid.shape[1]):
        return False
    changes = np.flatnonzero(np.diff(groups)) + 1
    size = int(changes[0]) if len(changes) else len(groups)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if size and not len(groups) % size and np.array_equal(changes, np.arange(size, len(groups), size)):
            # As many columns to each group, one group behind another.
            split = values.reshape(height, -1, size)
            ufunc(split, grid[:, groups[::size], np.newaxis], out=split)
        else:
            ufunc(values, grid.take(groups, axis=1), out=values)
    return True


def _aligned(
    values: Array, grid: Array, block: tuple[int, ...], origin: tuple[int, ...]
) -> Iterator[tuple[Array, Array, tuple[int, ...]]]:
    """Cut values into parts in which each number of the grid is for as many along each axis: with those, and how many.

    Along an axis these are the rest of a block at both ends, and whole ones between.
    """
    spans = [list(_spans(*sides)) for sides in zip(values.shape, block, origin, strict=True)]
    for choice in itertools.product(*spans):
        # With the dots a part without axes is a view as well.
        of_values: Any = (*(slice(begin, end) for begin, end, _, _ in choice), ...)
        of_grid: Any = (*(slice(cell, cell + (end - begin) // size) for begin, end, cell, size in choice), ...)
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


def unpack_dense(chunk: memoryview, bits: int, inner: int, skipped: int, out: memoryview) -> None:
    """Write codes that lie one behind another in 32-bit words into ``out``, a byte each, but the first ``skipped``.

    32 codes fill as many words as each has bits; ``inner`` words lie side by side, each with codes of its own.
    """
    words = np.frombuffer(chunk, "<u4").reshape(-1, inner)
    padded = np.zeros((inner, -(-len(words) // bits) * bits), "<u4")
    padded[:, : len(words)] = words.T
    codes = _unpack(padded.reshape(-1).view("u1"), bits).reshape(inner, -1).T
    np.frombuffer(out, "u1")[...] = codes.reshape(-1)[skipped : skipped + len(out)]


def _unpack(raw: Array, bits: int) -> Array:
    """Give the codes of bytes, 8 of which fill as many bytes as each has bits."""
    together = np.zeros(len(raw) // bits, "<u8")
    for byte in range(bits):
        together |= raw[byte::bits].astype("<u8") << np.uint64(8 * byte)
    codes = np.empty((len(together), 8), "u1")
    for place in range(8):
        codes[:, place] = together >> np.uint64(bits * place) & np.uint64((1 << bits) - 1)
    return codes.reshape(-1)

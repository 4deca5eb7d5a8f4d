"""The numbers of quantized weights: codes to float32, and a coarser grid of scales to each of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numkong
import numpy as np

from converter.dtypes import DTYPES, DType
from converter.tensors.kernels import Array, as_array, numpy_dtype, widen

if TYPE_CHECKING:
    from converter.transforms.quantize.codes import Coding

# What numpy takes a code's numbers for, where one byte has so many: their bits move as one element does.
_TOGETHER = {1: "<f4", 2: "<u8", 4: "<c16"}

DECODING_NBYTES = 1 << 18  # numbers are looked up together and then put apart: they stay in the cache

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


def _decode(chunk: memoryview, coding: Coding, inner: int, wide: Array, room: memoryview) -> None:
    per = coding.per_word
    words = np.frombuffer(chunk, f"<u{coding.width}")
    rows = wide.reshape(-1, per, inner)
    if coding.width == 1 and per in _TOGETHER and (inner == 1 or _offset(coding.values) is None):
        together = _words(coding.bits, coding.values).view(_TOGETHER[per])[:, 0]
        if inner == 1:
            np.take(together, words, out=wide.view(_TOGETHER[per]), mode="clip")
        else:
            _put_apart(words.reshape(-1, inner), together, rows, np.frombuffer(room, together.dtype))
        return
    words = words.reshape(-1, inner)
    for place in range(per):
        codes = (words >> words.dtype.type(coding.bits * place)) & words.dtype.type((1 << coding.bits) - 1)
        _look_up(codes, coding.values, rows[:, coding.order[place] if coding.order else place])


def _put_apart(words: Array, together: Array, rows: Array, room: Array) -> None:
    """Write the numbers of words, which ``together`` has for each, into the rows that each place has."""
    height, width = words.shape
    step = max(1, len(room) // width)
    for row in range(0, height, step):
        for begin in range(0, width, len(room)):
            part = words[row : row + step, begin : begin + len(room)]
            found = np.take(together, part, out=room[: part.size].reshape(part.shape), mode="clip")
            numbers = found.view("<f4").reshape(*part.shape, -1)
            for place in range(rows.shape[1]):
                rows[row : row + step, place, begin : begin + len(room)] = numbers[:, :, place]


def _look_up(codes: Array, values: tuple[float, ...], out: Array) -> None:
    """Write what codes stand for into ``out``."""
    offset = _offset(values)
    if offset is None:
        out[...] = np.array(values, "f4").take(codes, mode="clip")
    else:
        np.add(codes, np.float32(offset), out=out, casting="unsafe")


@cache
def _offset(values: tuple[float, ...]) -> float | None:
    """Give what makes each code its value when it is added, where there is such a number."""
    return values[0] if all(value == code + values[0] for code, value in enumerate(values)) else None


@cache
def _words(bits: int, values: tuple[float, ...]) -> Array:
    """Give the numbers of each byte, [256, 8 // bits]."""
    codes = np.arange(256, dtype="u1")[:, np.newaxis] >> np.arange(0, 8, bits, dtype="u1")
    numbers: Array = np.array(values, "f4")[codes & ((1 << bits) - 1)]
    return numbers


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

    ``steps`` is how far each may be off, and ``slack`` what share of itself besides; without one any may be.
    """
    wide = widen(as_array(source, dtype))
    numbers, allowed = np.frombuffer(found, "<f4"), np.frombuffer(steps, "<f4")
    magnitudes = np.abs(wide)
    with np.errstate(over="ignore", invalid="ignore"):
        errors = np.abs(numbers - wide)
        beyond = 0
        if slack is not None:
            # What float32 rounds off of products is less than a thousandth of a step.
            bounds = np.abs(allowed) * np.float32(1.001) + magnitudes * np.float32(slack) + _LEAST
            beyond = int((~(errors <= bounds)).sum())
    sums = (float(one.sum(dtype=np.float64)) for one in (errors, magnitudes))
    return Rounding(beyond, float(errors.max(initial=0.0)), float(magnitudes.max(initial=0.0)), *sums)


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

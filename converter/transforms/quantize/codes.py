"""Numbers that lie as codes of few bits, and what scales them: sources in float32, which nest.

A quantized weight is a ``Widened`` or ``Decoded`` one below as many ``Gridded`` as it has scales and zero points.
All that is read comes by way of the reader when it is needed, the scales too, so that nothing is held, whatever the
size of a model. Numbers are float32 until ``cast`` rounds them once.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, TypeVar

from converter.dtypes import DTYPES, DType
from converter.errors import BadFile
from converter.tensors.base import ByteRange, Reader, Storage, Tensor, TensorSource
from converter.tensors.derived import Computed, held
from converter.tensors.reader import PIECE_NBYTES
from converter.tensors.shaped import Reshaped, Shape, Shaped, Turned, Unboxed, reshaped
from converter.tensors.view import blocks_of, contiguous_strides

AGAIN = "Fetch the file again, or quantize the model again."
_GRID_NBYTES = 1 << 20  # of a grid that is transposed, at a time
_F32 = DTYPES["F32"]
_NBYTES = 4  # of a number
_KEPT_NBYTES = 1 << 23  # of a grid: what the finest one has for a task


By = Literal["times", "over", "less"]
_G = TypeVar("_G", bound="_OnGrid")


class Coding(NamedTuple):
    """How numbers lie in words of ``width`` bytes: ``bits`` each, the first in the lowest bits.

    ``values`` is what each code stands for, ``steps`` how far a number that was rounded to it may have been off: both
    float32, one a code. ``order`` says which number each code is, from the lowest bits on, where that is another.
    """

    bits: int
    values: tuple[float, ...]
    steps: tuple[float, ...]
    width: int = 1
    order: tuple[int, ...] = ()

    @property
    def per_word(self) -> int:
        """The numbers of one word."""
        return 8 * self.width // self.bits


def half_steps(values: Sequence[float]) -> tuple[float, ...]:
    """Give, for each value of a code, half the distance to the farther one of its neighbours; 0 for one alone."""
    known = sorted({value for value in values if math.isfinite(value)})
    gaps = [0.0, *(after - before for before, after in itertools.pairwise(known)), 0.0]
    found = {value: max(gaps[at], gaps[at + 1]) / 2 for at, value in enumerate(known)}
    return tuple(found.get(value, 0.0) for value in values)


def coding_of(bits: int, values: Sequence[float], width: int = 1, order: tuple[int, ...] = ()) -> Coding:
    """Give the coding of numbers that were rounded to the nearest value."""
    return Coding(bits, tuple(values), half_steps(values), width, order)


def in_bytes(one: Coding) -> Coding:
    """Give a coding whose codes come in a byte each."""
    rest = (math.nan,) * (256 - (1 << one.bits))
    return Coding(8, one.values + rest, one.steps + rest)


# FP4 of OCP's microscaling formats, the first number in the low half of a byte: sign, and two bits of exponent.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = coding_of(4, (*_E2M1, *(-value for value in _E2M1)))


def cells_of(shape: Iterable[int], block: Iterable[int]) -> Shape:
    """Give the shape of a grid that has one for each block of a shape; the last along an axis may be smaller."""
    return tuple(-(-length // size) for length, size in zip(shape, block, strict=True))


class Numbers(Computed):
    """What is made of another tensor in float32."""

    __slots__ = ()

    @property
    def dtype(self) -> DType:
        return _F32


class Widened(Numbers):
    """The numbers of a tensor in float32, which holds all of them: of its own dtype, whatever that is."""

    __slots__ = ()

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        size = self.source.dtype.itemsize
        with reader.scratch(len(out) // _NBYTES * size) as chunk:
            self.source.read(begin // _NBYTES * size, chunk, reader)
            self._convert(chunk, out)

    def _convert(self, chunk: memoryview, out: memoryview) -> None:
        from converter.transforms.quantize.kernels import widen_into

        widen_into(chunk, self.source.dtype, out)

    def steps(self) -> TensorSource:
        """Give how far each number may be off that was rounded to this one's dtype, in its own units."""
        return Steps(self.source)


class Steps(Widened):
    """Half the distance to the next number of a tensor's dtype, in float32; 0 for dtypes of 16 bits and more."""

    __slots__ = ()

    def _convert(self, chunk: memoryview, out: memoryview) -> None:
        from converter.transforms.quantize.kernels import steps_into

        steps_into(chunk, self.source.dtype, out)


@dataclass(frozen=True, slots=True)
class Scales(Widened):
    """The scales of a tensor in float32; ``name`` is theirs. U8 is an exponent, as F8_E8M0 is: 2**(byte - 127).

    Raises BadFile, when they are read, for one that is NaN or infinite.
    """

    name: str

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        from converter.transforms.quantize.kernels import are_finite

        before = DTYPES["F8_E8M0"] if self.source.dtype.tag == "U8" else self.source.dtype
        Widened.read(replace(self, source=reshaped(self.source, before, self.shape)), begin, out, reader)
        if not are_finite(out):
            problem = f"has a scale that is no finite number, in {self.name!r}"
            raise BadFile(Tensor(self.name, self.source).where, problem, AGAIN)


class InWords(Shaped, Computed):
    """What lies as codes in the words of its source, along ``axis`` and else in row-major order; the shape is its own.

    The last word along the axis may hold fewer.
    """

    __slots__ = ()
    axis: int

    @property
    def grain(self) -> int:
        # All of what is deflated: each task would inflate it from its start.
        return 1 if self.source.grain == 1 else self.dtype.nbytes(math.prod(self.shape))

    @property
    def _unit(self) -> tuple[int, int, int]:
        """How many codes fill how many words, and the bytes of one."""
        raise NotImplementedError

    @property
    def _inner(self) -> int:
        """The codes that lie next to each other in as many words."""
        return math.prod(self.shape[self.axis + 1 :])

    def _runs(self, first: int, count: int) -> Iterator[tuple[int, int, int, int]]:
        """Cut codes into runs of whole words: the run's first byte and how many, the codes to skip and to take.

        Where the last word along the axis is not full, a run ends with it.
        """
        (codes, words, width), inner, length = self._unit, self._inner, self.shape[self.axis]
        row = length * inner if length % codes else math.prod(self.shape)
        row_words = -(-row // inner * words // codes) * inner
        unit, unit_words = codes * inner, words * inner
        end = first + count
        while first < end:
            index, inside = divmod(first, row)
            taken = min(end - first, row - inside)
            begin = inside // unit
            needed = min(row_words, -(-(inside + taken) // unit) * unit_words) - begin * unit_words
            yield (index * row_words + begin * unit_words) * width, needed * width, inside - begin * unit, taken
            first += taken

    def _below(self, begin: int, end: int) -> tuple[int, int]:
        size = self.dtype.itemsize
        runs = list(self._runs(begin // size, (end - begin) // size)) if end > begin else [(0, 0, 0, 0)]
        return runs[0][0], runs[-1][0] + runs[-1][1]


@dataclass(frozen=True, slots=True)
class Decoded(InWords, Numbers):
    """The numbers that codes stand for, several in a word, in float32; with other axes, the words' axes go along."""

    coding: Coding
    of_shape: Shape
    axis: int

    @property
    def _unit(self) -> tuple[int, int, int]:
        return self.coding.per_word, 1, self.coding.width

    def box(self, start: tuple[int, ...], shape: tuple[int, ...]) -> Decoded:
        per, axis = self.coding.per_word, self.axis
        begin, length = start[axis], shape[axis]
        if begin % per or (length % per and begin + length != self.shape[axis]):
            raise ValueError("a box that cuts words")
        words = self.source.box(_with(start, axis, begin // per), _with(shape, axis, -(-length // per)))
        return replace(self, source=words, of_shape=shape)

    def permuted(self, axes: tuple[int, ...]) -> Decoded:
        shape = tuple(self.shape[axis] for axis in axes)
        source = held(self.source.permuted(axes))
        return replace(self, source=source, of_shape=shape, axis=axes.index(self.axis))

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        from converter.transforms.quantize.kernels import DECODING_NBYTES, decode

        done = 0
        for at, nbytes, skipped, count in self._runs(begin // _NBYTES, len(out) // _NBYTES):
            with reader.scratch(nbytes) as chunk, reader.scratch(DECODING_NBYTES) as room:
                self.source.read(at, chunk, reader)
                decode(chunk, self.coding, self._inner, skipped, out[done : done + count * _NBYTES], room)
            done += count * _NBYTES

    def steps(self) -> TensorSource:
        """Give how far each number may be off that was rounded to its code."""
        return replace(self, coding=self.coding._replace(values=self.coding.steps))


@dataclass(frozen=True, slots=True)
class _OnGrid(Numbers):
    """Numbers, each with one of a coarser ``grid`` of numbers in float32.

    A part knows the ``span`` of the grid, in bytes, that it needs.
    """

    grid: TensorSource
    by: By = field(default="times", kw_only=True)
    span: tuple[int, int] | None = field(default=None, kw_only=True)

    def inputs(self) -> tuple[Storage, ...]:
        return (*self.source.inputs(), *self.grid.inputs())

    def extents(self, begin: int, end: int) -> Iterator[ByteRange]:
        yield from self.grid.extents(*self._span(begin, end))
        yield from self.source.extents(begin, end)

    def part(self: _G, begin: int, end: int) -> _G:
        span = self._span(begin, end)
        return replace(self, source=self.source.part(begin, end), grid=self.grid.part(*span), span=span)

    def _span(self, begin: int, end: int) -> tuple[int, int]:
        """Give the bytes of the grid between which all lie that numbers have, themselves given in bytes."""
        raise NotImplementedError

    def _kept_grid(self, begin: int, end: int, reader: Reader) -> tuple[memoryview, int]:
        """Give what the reader keeps of the grid for some bytes here, and where that begins."""
        span = self.span or (0, _NBYTES * math.prod(self.grid.shape))
        if span[1] - span[0] > _KEPT_NBYTES:
            span = self._span(begin, end)
        return reader.kept(self.grid, *span), span[0]

    def steps(self) -> TensorSource:
        """Give how far each number may be off that was rounded to a code: less a zero point it is what it was."""
        below = steps_of(self.source)
        return below if self.by == "less" else replace(self, source=below)


@dataclass(frozen=True, slots=True)
class Gridded(_OnGrid):
    """Numbers, each with one of a coarser ``grid`` of numbers in float32: multiplied, divided, or less it.

    ``dims`` is the shape as the grid has it, of as many elements, and ``block`` how many of them along each axis one of
    the grid is for; the last along an axis may be for fewer. ``origin`` is where the numbers begin in the first block.
    """

    block: Shape
    dims: Shape = ()
    origin: Shape = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", tuple(max(1, size) for size in self.block))
        if not self.dims:
            object.__setattr__(self, "dims", self.source.shape)
        if not self.origin:
            object.__setattr__(self, "origin", tuple(0 for _ in self.dims))
        needed = cells_of(map(operator.add, self.origin, self.dims), self.block)
        if needed != self.grid.shape:
            raise ValueError(f"a grid {self.grid.shape} for {self.dims} in blocks of {self.block}: it needs {needed}")

    @property
    def grain(self) -> int:
        # Whole rows, or whole blocks where there is one row, take the fewest steps.
        together = math.prod(self.dims[1:]) if len(self.dims) > 1 else self.block[0] if self.dims else 1
        is_one = math.prod(self.grid.shape) == 1
        return self.source.grain if is_one or self.source.grain > 1 else max(1, together) * _NBYTES

    @property
    def kept_nbytes(self) -> int:
        of_task = _NBYTES * min(math.prod(self.grid.shape), PIECE_NBYTES // 2 // (math.prod(self.block) or 1))
        return min(_KEPT_NBYTES, of_task) + self.grid.kept_nbytes + self.source.kept_nbytes

    def _span(self, begin: int, end: int) -> tuple[int, int]:
        if not self.dims or begin >= end:
            return 0, _NBYTES * math.prod(self.grid.shape)
        row = _NBYTES * math.prod(self.dims[1:])
        begin_row, end_row = (self.origin[0] + begin // row), self.origin[0] + -(-end // row)
        inner = math.prod(self.grid.shape[1:]) * _NBYTES
        return begin_row // self.block[0] * inner, -(-end_row // self.block[0]) * inner

    def box(self, start: tuple[int, ...], shape: tuple[int, ...]) -> Gridded:
        self._check_dims()
        first, cells, origin = self._cells_of(start, shape)
        grid = self.grid.box(first, cells)
        return replace(self, source=self.source.box(start, shape), grid=grid, dims=shape, origin=origin, span=None)

    def _cells_of(self, start: Shape, shape: Shape) -> tuple[Shape, Shape, Shape]:
        """Give the box of the grid that a box of numbers has, and where these begin in its first block."""
        begins = tuple(at + origin for at, origin in zip(start, self.origin, strict=True))
        first = tuple(at // size for at, size in zip(begins, self.block, strict=True))
        sides = zip(begins, shape, self.block, first, strict=True)
        cells = tuple(-(-(at + length) // size) - cell for at, length, size, cell in sides)
        return first, cells, tuple(at % size for at, size in zip(begins, self.block, strict=True))

    def permuted(self, axes: tuple[int, ...]) -> Gridded:
        self._check_dims()
        source, grid = self.source.permuted(axes), turned_grid(self.grid, axes)
        block, dims, origin = (tuple(one[axis] for axis in axes) for one in (self.block, self.dims, self.origin))
        return replace(self, source=source, grid=grid, block=block, dims=dims, origin=origin, span=None)

    def _check_dims(self) -> None:
        if self.dims != self.shape:
            raise ValueError("the grid of a flattened tensor has no axes")

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        from converter.transforms.quantize.kernels import apply_grid

        numbers, offset = self._kept_grid(begin, begin + len(out), reader)
        self.source.read(begin, out, reader)
        strides = contiguous_strides(self.grid.shape)
        done = 0
        for start, shape in blocks_of(self.dims, begin // _NBYTES, len(out) // _NBYTES):
            cell, cells, origin = self._cells_of(start, shape)
            # All axes behind that of the run are whole, so these lie in a row.
            at = _NBYTES * sum(map(math.prod, zip(cell, strides, strict=True))) - offset
            some = numbers[at : at + _NBYTES * math.prod(cells)]
            nbytes = math.prod(shape) * _NBYTES
            apply_grid(out[done : done + nbytes], shape, some, cells, self.block, origin, self.by)
            done += nbytes


@dataclass(frozen=True, slots=True)
class Indexed(Unboxed, _OnGrid):
    """The numbers of a matrix, each with one of its row in a ``grid``: multiplied, divided, or less it.

    ``index``, whole numbers, says for each column which column of the grid that is; it is called ``name``. Reading
    raises BadFile for one that the grid does not have.
    """

    index: TensorSource
    name: str

    @property
    def grain(self) -> int:
        return self.source.grain if self.source.grain > 1 else max(1, self.shape[1]) * _NBYTES

    @property
    def kept_nbytes(self) -> int:
        grid = min(_KEPT_NBYTES, _NBYTES * math.prod(self.grid.shape))
        return self._index_nbytes + grid + self.grid.kept_nbytes + self.source.kept_nbytes

    def inputs(self) -> tuple[Storage, ...]:
        return (*_OnGrid.inputs(self), *self.index.inputs())

    def extents(self, begin: int, end: int) -> Iterator[ByteRange]:
        yield from self.index.extents(0, self._index_nbytes)
        yield from _OnGrid.extents(self, begin, end)

    @property
    def _index_nbytes(self) -> int:
        return self.index.dtype.nbytes(math.prod(self.index.shape))

    def _span(self, begin: int, end: int) -> tuple[int, int]:
        row, cells = max(1, self.shape[1]) * _NBYTES, self.grid.shape[1] * _NBYTES
        return begin // row * cells, -(-end // row) * cells

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        from converter.transforms.quantize.kernels import apply_columns

        cells = self.grid.shape[1] * _NBYTES
        index = reader.kept(self.index, 0, self._index_nbytes)
        numbers, offset = self._kept_grid(begin, begin + len(out), reader)
        self.source.read(begin, out, reader)
        done = 0
        for (row, column), (height, width) in blocks_of(self.shape, begin // _NBYTES, len(out) // _NBYTES):
            nbytes = height * width * _NBYTES
            rows = numbers[row * cells - offset : (row + height) * cells - offset]
            columns = (column, column + width)
            if not apply_columns(out[done : done + nbytes], rows, height, index, self.index.dtype, columns, self.by):
                problem = f"names groups in {self.name!r} that are not from 0 to {self.grid.shape[1] - 1}"
                raise BadFile(Tensor(self.name, self.index).where, problem, AGAIN)
            done += nbytes


def scales_of(tensor: Tensor, shape: Shape) -> Scales:
    """Give the numbers of a tensor of scales, in another shape of as many. Raises ValueError for one of others."""
    return Scales(reshaped(tensor.source, tensor.dtype, shape), tensor.name)


def turned_grid(source: TensorSource, axes: tuple[int, ...]) -> TensorSource:
    """Give a grid with other axes, of which no more is read at a time than it is worth."""
    return held(source.permuted(axes), _GRID_NBYTES)


def steps_of(source: TensorSource) -> TensorSource:
    """Give half the distance from each number of a quantized weight to the next that it has codes for, in float32.

    Of a negative scale it is negative. Raises ValueError for a source that is none of these.
    """
    if isinstance(source, Widened | Decoded | _OnGrid):
        return source.steps()
    if isinstance(source, Reshaped | Turned):
        return replace(source, source=steps_of(source.source))
    raise ValueError(f"{type(source).__name__} is no quantized weight")


def _with(sides: tuple[int, ...], axis: int, length: int) -> tuple[int, ...]:
    return (*sides[:axis], length, *sides[axis + 1 :])

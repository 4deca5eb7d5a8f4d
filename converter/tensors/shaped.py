"""The bytes of a tensor under another shape, and matrices transposed that are read row by row."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from converter.dtypes import DTYPES, DType
from converter.tensors.base import ByteRange, Reader, TensorSource
from converter.tensors.derived import Cast, Constant, Derived
from converter.tensors.view import GATHER_NBYTES, View, contiguous_strides

_BAND_NBYTES = 1 << 20  # of a matrix that is read row by row, at a time

Shape = tuple[int, ...]


def reshaped(source: TensorSource, dtype: DType, shape: tuple[int, ...]) -> TensorSource:
    """Give the bytes of a tensor as one of another dtype and shape, as many bytes in all. Raises ValueError."""
    if (dtype, shape) == (source.dtype, source.shape):
        return source
    if source.dtype.nbytes(math.prod(source.shape)) != dtype.nbytes(math.prod(shape)):
        raise ValueError(f"{source.dtype} {source.shape} is not as many bytes as {dtype} {shape}")
    if isinstance(source, View) and source.is_contiguous:
        start = source.dtype.nbytes(source.start)
        if not start % dtype.itemsize:
            return View(dtype, shape, source.storage, start // dtype.itemsize, contiguous_strides(shape))
    if isinstance(source, Constant):
        return Constant(dtype, shape, source.content)
    return Reshaped(source, dtype, shape)


class Shaped(Derived):
    """What is made of a tensor of another shape, which is read in the windows of that."""

    __slots__ = ()
    of_shape: Shape

    @property
    def shape(self) -> Shape:
        return self.of_shape

    @property
    def grain(self) -> int:
        return self.source.grain

    @property
    def window(self) -> int:
        return self.source.window


class Unboxed(Derived):
    """A tensor that is read in its own order alone: it has no boxes, and other axes as a matrix only, slowly."""

    __slots__ = ()

    def box(self, start: Shape, shape: Shape) -> NoReturn:
        raise ValueError(f"{type(self).__name__} has no boxes")

    def permuted(self, axes: tuple[int, ...]) -> TensorSource:
        if axes == tuple(range(len(self.shape))):
            return self
        if axes != (1, 0):
            raise ValueError(f"{type(self).__name__} has no other axes than a matrix has")
        return Turned(self)


@dataclass(frozen=True, slots=True)
class Reshaped(Unboxed, Shaped):
    """The bytes of a tensor as one of another dtype and shape."""

    to_dtype: DType
    of_shape: Shape

    @property
    def dtype(self) -> DType:
        return self.to_dtype

    def verbatim(self, begin: int, end: int) -> ByteRange | None:
        return self.source.verbatim(begin, end)

    def _below(self, begin: int, end: int) -> tuple[int, int]:
        size = self.source.dtype.itemsize
        return begin // size * size, -(-end // size) * size

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        low, high = self._below(begin, begin + len(out))
        if high - low == len(out):
            self.source.read(begin, out, reader)
            return
        # Whole elements of the source, of which some bytes are asked for.
        with reader.scratch(high - low) as elements:
            self.source.read(low, elements, reader)
            out[:] = elements[begin - low : begin - low + len(out)]


@dataclass(frozen=True, slots=True)
class Spread(Unboxed, Shaped):
    """Zeros, among which each ``step``-th element, from the first on, is the only one that the source has."""

    of_shape: Shape
    step: int

    def part(self, begin: int, end: int) -> Spread:
        return self

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        size = self.dtype.itemsize
        out[:] = bytes(len(out))
        with reader.scratch(size) as element:
            self.source.read(0, element, reader)
            for at in range(-(begin // size) % self.step * size, len(out), self.step * size):
                out[at : at + size] = element


def identity(dtype: DType, size: int) -> TensorSource:
    """Give the matrix that changes nothing, in a dtype of floats; it takes no room."""
    one = Cast(Constant(DTYPES["F32"], (1,), struct.pack("<f", 1)), dtype)
    return Spread(one, (size, size), size + 1)


@dataclass(frozen=True, slots=True)
class Turned(Unboxed):
    """A matrix transposed that cannot be read otherwise than row by row: all of it for every window."""

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.source.shape
        return columns, rows

    @property
    def window(self) -> int:
        return GATHER_NBYTES

    def extents(self, begin: int, end: int) -> Iterator[ByteRange]:
        return self.source.extents(0, self.source.dtype.nbytes(math.prod(self.source.shape)))

    def part(self, begin: int, end: int) -> Turned:
        return self

    def permuted(self, axes: tuple[int, ...]) -> TensorSource:
        return self.source if axes == (1, 0) else self

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        height, width = self.source.shape
        size = self.dtype.itemsize
        step = max(1, _BAND_NBYTES // (size * width))
        for row in range(0, height, step):
            count = min(step, height - row)
            with reader.scratch(count * width * size) as rows:
                self.source.read(row * width * size, rows, reader)
                _copy_columns(rows, (count, width), size, out, begin // size, row, height)


@dataclass(frozen=True, slots=True)
class Shuffled(Unboxed):
    """The rows of a tensor in another order, within every ``group`` of so many.

    Of each group those come first that are 0, ``stride``, 2 ``stride``, ... and then those one behind these, and so on:
    with 2 the even rows and then the odd ones, with half a group it is undone.
    """

    group: int
    stride: int

    @property
    def grain(self) -> int:
        return self.dtype.nbytes(self.group * math.prod(self.shape[1:]))

    @property
    def window(self) -> int:
        return self.grain

    def _below(self, begin: int, end: int) -> tuple[int, int]:
        room = self.grain or 1
        return begin // room * room, -(-end // room) * room

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        import numpy as np

        room, done = self.grain, 0
        row = room // self.group
        while done < len(out):
            at, inside = divmod(begin + done, room)
            with reader.scratch(room) as rows:
                self.source.read(at * room, rows, reader)
                split = np.frombuffer(rows, "u1").reshape(self.group // self.stride, self.stride, row)
                turned = split.transpose(1, 0, 2)
                if not inside and len(out) - done >= room:
                    np.frombuffer(out[done : done + room], "u1").reshape(turned.shape)[...] = turned
                    done += room
                else:
                    taken = min(room - inside, len(out) - done)
                    out[done : done + taken] = turned.tobytes()[inside : inside + taken]
                    done += taken
                del split, turned


def _copy_columns(
    rows: memoryview, shape: tuple[int, int], size: int, out: memoryview, first: int, row: int, height: int
) -> None:
    """Copy what is asked of a transposed matrix from some rows of it, elements of ``size`` bytes.

    ``out`` is the elements from the ``first`` on of the transposed one, whose rows are ``height`` long; the rows here
    are of ``shape`` and begin at ``row``.
    """
    import numpy as np

    source: Any = np.frombuffer(rows, f"<u{size}").reshape(shape)
    target = np.frombuffer(out, f"<u{size}")
    # Columns of which all is asked lie between two of which a part may be.
    begin, end = first, first + len(target)
    for column in range(begin // height, -(-end // height)):
        low, high = max(begin, column * height + row), min(end, column * height + row + shape[0])
        if low < high:
            inside = low - column * height - row
            target[low - begin : high - begin] = source[inside : inside + high - low, column]

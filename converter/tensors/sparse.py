"""What joins small matrices into a large one that is mostly zeros, and takes them out: looked at, not believed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from converter.errors import BadFile
from converter.tensors.base import ByteRange, Reader, Storage, TensorSource
from converter.tensors.derived import Replicas
from converter.tensors.shaped import Unboxed

_BAND_NBYTES = 1 << 20  # of a matrix, at a time
NOTE_ADVICE = "Save it again without its note wconv_lora."


@dataclass(frozen=True, slots=True)
class Columns(Unboxed):
    """Some columns of a matrix [rows, all, ...] whose others are zeros; BadFile is raised where they are not.

    ``first`` and ``count`` are in columns. The ``empty`` parts of the whole, which nothing else reads, have to be zeros
    too.
    """

    first: int
    count: int
    name: str
    empty: tuple[TensorSource, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        rows, _, *others = self.source.shape
        return (rows, self.count, *others)

    @property
    def grain(self) -> int:
        return 1

    @property
    def window(self) -> int:
        return self.source.window

    def inputs(self) -> tuple[Storage, ...]:
        return tuple(storage for source in (self.source, *self.empty) for storage in source.inputs())

    def extents(self, begin: int, end: int) -> Iterator[ByteRange]:
        row, whole = self._row_nbytes
        yield from self.source.extents(begin // row * whole, -(-end // row) * whole)

    def part(self, begin: int, end: int) -> Columns:
        return self

    @property
    def _row_nbytes(self) -> tuple[int, int]:
        """The bytes of a row of these columns, and of one of the whole."""
        _, columns, *others = self.source.shape
        one = self.dtype.nbytes(math.prod(others))
        return self.count * one, columns * one

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        if not begin:
            self._check_empty(reader)
        row, whole = self._row_nbytes
        before = self.first * (row // self.count)
        rows = max(1, _BAND_NBYTES // whole)
        done = 0
        while done < len(out):
            first, inside = divmod(begin + done, row)
            taken = min(rows, -(-(inside + len(out) - done) // row))
            with reader.scratch(taken * whole) as values:
                self.source.read(first * whole, values, reader)
                for at in range(taken):
                    line = values[at * whole : (at + 1) * whole]
                    if (bytes(line[:before]) + bytes(line[before + row :])).strip(b"\0"):
                        raise self._not_zero()
                    piece = line[before : before + row][inside:][: len(out) - done]
                    out[done : done + len(piece)] = piece
                    done, inside = done + len(piece), 0

    def _check_empty(self, reader: Reader) -> None:
        for source in self.empty:
            nbytes = source.dtype.nbytes(math.prod(source.shape))
            for at in range(0, nbytes, _BAND_NBYTES):
                with reader.scratch(min(_BAND_NBYTES, nbytes - at)) as values:
                    source.read(at, values, reader)
                    if bytes(values).strip(b"\0"):
                        raise self._not_zero()

    def _not_zero(self) -> BadFile:
        place = self.source.inputs()[0].file.place
        problem = f"notes in its header that {self.name} is zero outside its blocks, and it is not"
        return BadFile(place, problem, NOTE_ADVICE)


class Copies(Replicas):
    """A tensor of which ``others`` are said to be copies: all are read, and BadFile is raised where one differs."""

    __slots__ = ()

    def _differ(self, other: TensorSource) -> BadFile:
        place = other.inputs()[0].file.place
        problem = f"notes in its header that {self.name} has copies of one matrix, and they differ"
        return BadFile(place, problem, NOTE_ADVICE)

"""Plain weights as quantized ones: what a scheme says that is to be written, and how weights are measured for it.

A scheme is a ``Writer`` in a module of its own, and a row in ``QUANTIZERS``. Its tensors are sources that read the
weight as they go: nothing that grows with the model is held but what ``Measure`` found, four bytes a row at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from converter.dtypes import DType
from converter.errors import HostileFile, Where
from converter.tensors.base import Tensor
from converter.tensors.reader import RangeReader, piece_nbytes_for

WHOLE = 0  # a cell as long as the matrix
_MAX_MEASURED_NBYTES = 128_000_000  # of a model of 400 billion weights, whose rows are long, 100 MB


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Rows ``begin`` to ``end`` of a matrix."""

    weight: Tensor
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.weight.dtype.nbytes((self.end - self.begin) * self.weight.shape[1])


def cut_rows(weight: Tensor, together: int = 1) -> Iterator[RowBlock]:
    """Cut a matrix into blocks of rows, each of some MB, for one task each; so many rows stay together."""
    step = max(1, piece_nbytes_for([weight.source]) // weight.dtype.nbytes(weight.shape[1] * together)) * together
    for begin in range(0, weight.shape[0], step):
        yield RowBlock(weight, begin, min(weight.shape[0], begin + step))


class Measured(NamedTuple):
    """What was found of a block of rows, four bytes a row at most; it is fit where the scheme can hold all of it."""

    block: RowBlock
    found: bytes
    is_fit: bool


class Cell(NamedTuple):
    """What has one scale: so many rows and columns, all of them where it says WHOLE."""

    rows: int
    columns: int


ROW = Cell(1, WHOLE)


def find_maxima(block: RowBlock, chunk_nbytes: int, cell: Cell) -> Measured:
    """Find the largest magnitude of each cell of a block of rows, as float32; it is fit where all are finite.

    Raises BadFile for a file that became shorter.
    """
    from converter.transforms.quantize.kernels import are_finite
    from converter.transforms.quantize.write_kernels import cell_maxima, raise_maxima

    weight = block.weight
    dtype, columns = weight.dtype, weight.shape[1]
    wide, high = cell.columns or columns, cell.rows or block.end - block.begin
    buffer = memoryview(bytearray(max(chunk_nbytes, weight.source.window)))
    room = len(buffer) // dtype.itemsize
    found = bytearray()
    with RangeReader() as reader:
        reader.expect(weight.source.extents(*(dtype.nbytes(row * columns) for row in (block.begin, block.end))))

        def read(first: int, count: int) -> memoryview:
            view = buffer[: dtype.nbytes(count)]
            weight.source.read(dtype.nbytes(first), view, reader)
            return view

        together = max(1, room // (high * columns)) * high
        for row in range(block.begin, block.end, together):
            rows = min(together, block.end - row)
            if rows * columns <= room:
                found += cell_maxima(read(row * columns, rows * columns), dtype, (high, wide), columns)
                continue
            maxima = bytearray(4 * (columns // wide))
            step = max(1, room // columns)
            for at in range(row, row + rows, step):
                count = min(step, row + rows - at)
                for begin, end in _cut_row(columns, wide, room):
                    part = read(at * columns + begin, count * (end - begin))
                    raise_maxima(maxima, cell_maxima(part, dtype, (count, wide), end - begin), begin // wide)
            found += maxima
    return Measured(block, bytes(found), are_finite(memoryview(found)))


def _cut_row(columns: int, wide: int, room: int) -> Iterator[tuple[int, int]]:
    """Cut a row into parts that find room: all of it, whole cells, or parts of one."""
    step = max(wide, columns if columns <= room else room // wide * wide)
    for first in range(0, columns, step):
        last = min(columns, first + step)
        for begin in range(first, last, min(step, room)):
            yield begin, min(last, begin + room)


class Measure(NamedTuple):
    """How weights are read before there is a plan: ``find``, for a block of rows, in chunks of so many bytes.

    A module is left as it is where a block of its weight is not fit: ``cause`` says what it holds then. ``rows`` that
    follow each other are measured together.
    """

    find: Callable[[RowBlock, int], Measured]
    cause: str
    rows: int = 1


def _is_fit(weight: Tensor, is_transposed: bool) -> str:
    return ""


class Writer(NamedTuple):
    """A scheme that is written.

    ``write`` gives the tensors that stand for a weight [out, in], in one file, from what ``measure`` found of its
    blocks, one after another; nothing where there is no measure. ``config`` is what config.json says of it, given the
    loader's skip list and the dtype of the rest. ``unfit`` says of a weight, which the model has transposed or not, why
    it is left as it is; nothing where it is not. ``casts_first`` where the loader casts a weight to the dtype of the
    rest before it quantizes it. Components of other ``libraries`` have no loader for it. It ``takes_experts`` where the
    loader reads those of a mixture in it, which it has as one module, all of them or none; it ``names_skipped`` where
    the skip list has modules by their whole names. ``package`` loads it, ``bits`` says what it is in; ``accuracy`` and
    ``hints`` are sentences for who writes it, and who loads it.
    """

    name: str
    bits: str
    package: str
    write: Callable[[Tensor, bytes], tuple[Tensor, ...]]
    config: Callable[[Sequence[str], DType], dict[str, Any]]
    accuracy: str
    hints: tuple[str, ...] = ()
    measure: Measure | None = None
    unfit: Callable[[Tensor, bool], str] = _is_fit
    casts_first: bool = False
    libraries: tuple[str, ...] = ()
    takes_experts: bool = False
    names_skipped: bool = False


def check_measured(path: Where, weights: Iterable[Tensor]) -> None:
    """Raise HostileFile where what is found of weights, four bytes a row, is more than can be held."""
    if sum(4 * weight.shape[0] for weight in weights) > _MAX_MEASURED_NBYTES:
        raise HostileFile(path, f"has more than {_MAX_MEASURED_NBYTES:,} bytes of scales, and no model has them")

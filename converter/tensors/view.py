"""A tensor as it lies in a file: a strided view of a byte range, as torch has it.

A contiguous view is read straight into the caller's buffer. A strided one is gathered from short reads: nothing is
mapped, because mapped pages count as memory and a file cut short would kill the process.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from converter.dtypes import DType
from converter.tensors.base import ByteRange, PackedRange, Reader, Storage, remembered

if TYPE_CHECKING:
    import numpy as np


GATHER_NBYTES = 1 << 23  # a transposed matrix needs many rows at once, or it is read in single elements
_SLAB_NBYTES = 1 << 20
_READ_NBYTES = 1 << 14  # to read so many more takes less time than to read in two places
_RUNS = 16  # elements of several that go side by side: a cache line
_FAR_SPAN_NBYTES = 1 << 24  # comes at once where it is far, whatever is wanted of it


class View(NamedTuple):
    """A strided view of a storage: ``start`` and ``strides`` in elements. Views of one storage may share memory."""

    dtype: DType
    shape: tuple[int, ...]
    storage: Storage
    start: int
    strides: tuple[int, ...]

    def __hash__(self) -> int:
        # Of texts: of numbers a file could choose such as all hash alike, and make looking for ties quadratic.
        return hash((self.storage, str((self.start, self.shape, self.strides))))

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in row-major order with no gaps (torch's ``is_contiguous``)."""
        return _is_contiguous(self.shape, self.strides)

    @property
    def grain(self) -> int:
        """All of what is packed: each task would unpack it from its start."""
        return self.dtype.nbytes(math.prod(self.shape)) if type(self.storage) is PackedRange else 1

    @property
    def window(self) -> int:
        return 1 if self.is_contiguous else GATHER_NBYTES

    @property
    def kept_nbytes(self) -> int:
        return 0

    @property
    def computes(self) -> bool:
        return False

    def inputs(self) -> tuple[Storage, ...]:
        return (self.storage,)

    def extents(self, begin: int, end: int) -> Iterator[ByteRange]:
        storage = self.storage
        if type(storage) is PackedRange:
            yield ByteRange(storage.file, storage.offset, storage.stored_nbytes)
        elif self.is_contiguous:
            at = self.dtype.nbytes(self.start) + begin
            lead = 0 if at else storage.lead  # which is read with it
            yield ByteRange(storage.file, storage.offset + at - lead, end - begin + lead)

    def verbatim(self, begin: int, end: int) -> ByteRange | None:
        storage = self.storage
        # A CRC32 is of bytes that were read, and so is a lead.
        is_whole = storage.crc32 is None and type(storage) is not PackedRange and not storage.lead
        if not is_whole or not self.is_contiguous:
            return None
        return ByteRange(storage.file, storage.offset + self.dtype.nbytes(self.start) + begin, end - begin)

    def part(self, begin: int, end: int) -> View:
        return self

    def box(self, start: tuple[int, ...], shape: tuple[int, ...]) -> View:
        offset = sum(at * stride for at, stride in zip(start, self.strides, strict=True))
        return self._replace(shape=shape, start=self.start + offset)

    def permuted(self, axes: tuple[int, ...]) -> View:
        shape, strides = tuple(self.shape[axis] for axis in axes), tuple(self.strides[axis] for axis in axes)
        return self._replace(shape=shape, strides=strides)

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        if not begin and self.storage.lead and (self.start or not self.is_contiguous):
            reader.check_begin(self.storage)
        if self.is_contiguous:
            reader.read_into(self.storage, self.dtype.nbytes(self.start) + begin, out)
        else:
            _gather(self, begin // self.dtype.itemsize, out, reader)


def span_of(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Give the number of elements from the first to the last that a view touches, both included."""
    if _is_contiguous(shape, strides):
        return math.prod(shape)
    return 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))


@remembered
def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Give the row-major strides of a shape, in elements.

    >>> contiguous_strides((2, 3, 4))
    (12, 4, 1)
    """
    strides = []
    step = 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(length, 1)
    return tuple(reversed(strides))


@remembered
def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    # Axes of length 1 may carry any stride, and an empty tensor any strides at all.
    if 0 in shape:
        return True
    step = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1:
            if stride != step:
                return False
            step *= length
    return True


def _gather(view: View, first: int, out: memoryview, reader: Reader) -> None:
    import numpy as np

    # Only bits move, so any type of the right width will do.
    values = np.frombuffer(out, dtype=f"u{view.dtype.itemsize}")
    # Axes of length 1 say nothing, and numpy has a limit on how many there are.
    axes = [(length, stride) for length, stride in zip(view.shape, view.strides, strict=True) if length != 1]
    shape, strides = tuple(length for length, _ in axes), tuple(stride for _, stride in axes)
    gather = _Gather(view, reader)
    blocks = [
        (view.start + sum(at * stride for at, stride in zip(begin, strides, strict=True)), block)
        for begin, block in blocks_of(shape, first, len(values))
    ]
    deal_with = gather.read_far if view.storage.file.place.store.is_far else gather.read
    deal_with(blocks, strides, values)


def blocks_of(shape: tuple[int, ...], first: int, count: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a run of elements of a flattened whole into boxes, in order: where each begins, and its shape.

    >>> list(blocks_of((3, 4), 2, 7))
    [((0, 2), (1, 2)), ((1, 0), (1, 4)), ((2, 0), (1, 1))]
    """
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    while count:
        index, inside = divmod(first, row)
        rows = count // row
        if inside or not rows:
            taken = min(row - inside, count)
            for start, inner in blocks_of(shape[1:], inside, taken):
                yield (index, *start), (1, *inner)
        else:
            taken = rows * row
            yield (index, *(0 for _ in shape[1:])), (rows, *shape[1:])
        first, count = first + taken, count - taken


_Block = tuple[int, tuple[int, ...]]
"""Where a part of a view begins, and its shape."""


class _Gather:
    """Reads blocks of a strided view. Shapes, strides and starts are in elements, as in View."""

    def __init__(self, view: View, reader: Reader) -> None:
        self.is_far = view.storage.file.place.store.is_far
        # What is read out of order has no sum of its own: such a record is read once more for it. Its lead was checked.
        storage = view.storage._replace(crc32=None)
        self.storage = storage._replace(lead=0) if type(storage) is ByteRange else storage
        self.itemsize = view.dtype.itemsize
        self.reader = reader

    def read(self, blocks: Iterable[_Block], strides: tuple[int, ...], values: np.ndarray[Any, Any]) -> None:
        """Fill ``values`` with blocks, one after another."""
        done = 0
        for start, shape in blocks:
            count = math.prod(shape)
            if self.is_far:
                self.reader.announce(self.storage, start * self.itemsize, span_of(shape, strides) * self.itemsize)
            self.read_block(shape, strides, start, values[done : done + count].reshape(shape))
            done += count

    def read_far(self, blocks: Sequence[_Block], strides: tuple[int, ...], values: np.ndarray[Any, Any]) -> None:
        """Fill ``values`` from all that lies from the first byte of them to the last, where that is not too much."""
        import numpy as np

        first = min(start for start, _ in blocks)
        nbytes = (max(start + span_of(shape, strides) for start, shape in blocks) - first) * self.itemsize
        if nbytes > _FAR_SPAN_NBYTES:
            self.read(blocks, strides, values)
            return
        steps = [stride * self.itemsize for stride in strides]
        with self.reader.scratch(nbytes) as room:
            self.reader.read_into(self.storage, first * self.itemsize, room)
            whole = np.frombuffer(room, values.dtype)
            done = 0
            for start, shape in blocks:
                count = math.prod(shape)
                found = np.lib.stride_tricks.as_strided(whole[start - first :], shape, steps, writeable=False)
                values[done : done + count].reshape(shape)[...] = found
                done += count
            del whole, found

    def read_block(
        self, shape: tuple[int, ...], strides: tuple[int, ...], start: int, out: np.ndarray[Any, Any]
    ) -> None:
        """Fill ``out``, an array of ``shape``; cut the block until what it spans is small, or mostly wanted."""
        import numpy as np

        extents = [(length - 1) * stride for length, stride in zip(shape, strides, strict=True)]
        span = 1 + sum(extents)
        # Elements next to each other are one read.
        reads = math.prod(length for length, stride in zip(shape, strides, strict=True) if stride != 1)
        is_worth = self.is_far or span == out.size or span * self.itemsize <= reads * _READ_NBYTES
        if span == 1 or (span * self.itemsize <= _SLAB_NBYTES and is_worth):
            slab = np.empty(span, dtype=out.dtype)
            self.reader.read_into(self.storage, start * self.itemsize, slab.data.cast("B"))
            out[...] = np.lib.stride_tricks.as_strided(slab, shape, [stride * self.itemsize for stride in strides])
            return
        axis = extents.index(max(extents))
        # Views may overlap themselves: then what is next to each other is none.
        is_run = shape[axis] == reads and strides[axis] != 1 and strides.count(1) <= 1
        if not is_worth and is_run and out.size // reads * self.itemsize <= _SLAB_NBYTES:
            self.read_runs(axis, strides[axis], start, out)
            return
        half = shape[axis] // 2
        for begin, end in ((0, half), (half, shape[axis])):
            part = tuple(end - begin if at == axis else length for at, length in enumerate(shape))
            where = (slice(None),) * axis + (slice(begin, end),)
            self.read_block(part, strides, start + begin * strides[axis], out[where])

    def read_runs(self, axis: int, stride: int, start: int, out: np.ndarray[Any, Any]) -> None:
        """Fill ``out`` with what lies in a row for each step along an axis, a few at once: they go between others."""
        import numpy as np

        rows = np.moveaxis(out, axis, 0)
        step = max(1, min(_RUNS, _SLAB_NBYTES // max(1, rows[0].nbytes)))
        for begin in range(0, len(rows), step):
            runs = np.empty(rows[begin : begin + step].shape, out.dtype)
            for at, run in enumerate(runs, start=begin):
                self.reader.read_into(
                    self.storage, (start + at * stride) * self.itemsize, run.reshape(-1).data.cast("B")
                )
            rows[begin : begin + step] = runs

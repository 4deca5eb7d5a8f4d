"""A tensor's bytes from its source files, contiguous or not, into a buffer of the caller's.

Contiguous tensors are read straight into the buffer, strided ones are gathered with numpy from short reads: nothing is
mapped, because mapped pages count as memory and a file cut short would kill the process. Deflated records are inflated
on the way, from their start for each task: slow for large ones, but torch.save writes none.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converter.errors import BadFile
from converter.storage import FileRef, OpenFile
from converter.tensors.base import ByteRange, TensorInfo

if TYPE_CHECKING:
    import numpy as np

ITEM_MULTIPLE = 16  # a multiple of the size of any element, in bytes
GATHER_NBYTES = 1 << 23  # a transposed matrix needs many rows at once, or it is read in single elements
PIECE_NBYTES = 1 << 25  # 100 and more tasks for a checkpoint of some GB, each well above the cost of a task
_SLAB_NBYTES = 1 << 20
_PACKED_NBYTES = 1 << 16
# A comparison takes turns between two files, a merge goes through its shards: more open files would save little, and
# eight tasks at once are to get along with 64.
_MAX_OPEN = 4
_SPARSE = 16  # a slab of which less than this share is wanted is read in parts


def read_chunks(info: TensorInfo, sources: SourceFiles, buffer: bytearray) -> Iterator[memoryview]:
    """Yield a tensor's bytes in row-major order; each view is of ``buffer`` and valid until the next one."""
    view = memoryview(buffer)
    room = len(buffer) // ITEM_MULTIPLE * ITEM_MULTIPLE
    for begin in range(0, info.nbytes, room):
        chunk = view[: min(room, info.nbytes - begin)]
        read_range(info, sources, begin, chunk)
        yield chunk


def read_range(info: TensorInfo, sources: SourceFiles, begin: int, out: memoryview) -> None:
    """Fill ``out`` with a tensor's bytes from ``begin`` on, as they lie in row-major order."""
    if info.is_contiguous:
        sources.read_into(info.storage, info.dtype.nbytes(info.start) + begin, out)
    else:
        _gather(info, sources, begin // info.dtype.itemsize, out)
    if info.negated:
        _negate(info, out)


def _negate(info: TensorInfo, out: memoryview) -> None:
    import numpy as np

    # Elements are whole here, so the first number is a real part.
    is_complex = info.dtype.tag == "C64"
    width = info.dtype.itemsize // (2 if is_complex else 1)
    values = np.frombuffer(out, f"u{width}")
    sign = values.dtype.type(1 << (8 * width - 1))
    if info.negated & 1:
        values[:: 2 if is_complex else 1] ^= sign
    if info.negated & 2 and is_complex:
        values[1::2] ^= sign


@dataclass(slots=True)
class _SourceFile:
    """A source file that is open; ``inflated`` is the deflated record that was read last in it."""

    file: OpenFile
    inflated: _Inflated | None = None

    def close(self, is_checked: bool = True) -> None:
        """Close the file, and look whether what was read of it still stands there."""
        try:
            if is_checked:
                self.file.check()
        finally:
            self.file.close()


class SourceFiles:
    """The source files that one task has open, which are those read last.

    A file that is not, or does not stay, as it was when its header was read is a BadFile.
    """

    def __init__(self) -> None:
        self._files: dict[FileRef, _SourceFile] = {}
        self._ref: FileRef | None = None
        self._current: _SourceFile | None = None

    def __enter__(self) -> SourceFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # That a file was changed is also why its bytes are damaged.
        is_checked = kind is None or issubclass(kind, BadFile)
        with ExitStack() as closing:
            for source in self._files.values():
                closing.callback(source.close, is_checked)

    def read_into(self, storage: ByteRange, begin: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes from ``begin`` of a byte range on."""
        if storage.content is not None:
            out[:] = storage.content[begin : begin + len(out)]
            return
        source = self._current
        if source is None or self._ref is not storage.file:
            source = self._current = self._turn_to(storage.file)
            self._ref = storage.file
        if storage.packed_nbytes is not None:
            _inflate(source, storage, begin, out)
        elif source.file.read_into(storage.offset + begin, out) != len(out):
            raise BadFile(storage.file.place, "became shorter while it was read", "Fetch the file again.")
        if storage.swap > 1:
            import numpy as np

            np.frombuffer(out, f"u{storage.swap}").byteswap(inplace=True)

    def _turn_to(self, ref: FileRef) -> _SourceFile:
        """Give a file, open; close the one not read for longest where there are too many."""
        source = self._files.pop(ref, None)
        if source is None:
            if len(self._files) == _MAX_OPEN:
                self._files.pop(next(iter(self._files))).close()
            source = _SourceFile(ref.open())
        self._files[ref] = source
        return source


def _inflate(source: _SourceFile, storage: ByteRange, begin: int, out: memoryview) -> None:
    inflated = source.inflated
    if inflated is None or inflated.storage != storage or begin < inflated.place:
        inflated = source.inflated = _Inflated(source.file, storage)
    while inflated.place < begin:
        inflated.read(min(_SLAB_NBYTES, begin - inflated.place))
    done = 0
    while done < len(out):
        part = inflated.read(len(out) - done)
        out[done : done + len(part)] = part
        done += len(part)


class _Inflated:
    """A deflated record, read from its start on; ``place`` is how far, in its own bytes."""

    def __init__(self, file: OpenFile, storage: ByteRange) -> None:
        self.file = file
        self.storage = storage
        self.place = 0
        self._taken = 0
        self._inflater = zlib.decompressobj(-zlib.MAX_WBITS)

    def read(self, nbytes: int) -> bytes:
        """Give the next bytes, so many at most."""
        storage = self.storage
        assert storage.packed_nbytes is not None
        while True:
            packed = self._inflater.unconsumed_tail
            if not packed:
                nbytes_left = storage.packed_nbytes - self._taken
                packed = self.file.read(storage.offset + self._taken, min(_PACKED_NBYTES, nbytes_left))
                self._taken += len(packed)
            try:
                part = self._inflater.decompress(packed, nbytes)
            except zlib.error:
                packed = part = b""
            if part:
                self.place += len(part)
                return part
            if not packed:
                raise BadFile(storage.file.place, "holds a compressed record that is damaged", "Fetch the file again.")


def _gather(info: TensorInfo, sources: SourceFiles, first: int, out: memoryview) -> None:
    import numpy as np

    # Only bits move, so any type of the right width will do.
    values = np.frombuffer(out, dtype=f"u{info.dtype.itemsize}")
    # Axes of length 1 say nothing, and numpy has a limit on how many there are.
    axes = [(length, stride) for length, stride in zip(info.shape, info.strides, strict=True) if length != 1]
    shape, strides = tuple(length for length, _ in axes), tuple(stride for _, stride in axes)
    _Gather(info, sources).fill(shape, strides, info.start, first, values)


class _Gather:
    """Reads parts of a strided tensor. Shapes, strides and starts are in elements, as in TensorInfo."""

    def __init__(self, info: TensorInfo, sources: SourceFiles) -> None:
        self.storage = info.storage
        self.itemsize = info.dtype.itemsize
        self.sources = sources

    def fill(
        self, shape: tuple[int, ...], strides: tuple[int, ...], start: int, first: int, out: np.ndarray[Any, Any]
    ) -> None:
        """Fill the flat ``out`` with as many elements as it takes, from the ``first`` in row-major order on."""
        if not shape:
            self.read_block((), (), start, out.reshape(()))
            return
        row = 1
        for length in shape[1:]:
            row *= length
        done = 0
        while done < len(out):
            place, offset = divmod(first + done, row)
            rows = (len(out) - done) // row
            begin = start + place * strides[0]
            if offset or not rows:
                count = min(row - offset, len(out) - done)
                self.fill(shape[1:], strides[1:], begin, offset, out[done : done + count])
            else:
                count = rows * row
                self.read_block((rows, *shape[1:]), strides, begin, out[done : done + count].reshape(rows, *shape[1:]))
            done += count

    def read_block(
        self, shape: tuple[int, ...], strides: tuple[int, ...], start: int, out: np.ndarray[Any, Any]
    ) -> None:
        """Fill ``out``, an array of ``shape``; cut the block until what it spans is small, or mostly wanted."""
        import numpy as np

        extents = [(length - 1) * stride for length, stride in zip(shape, strides, strict=True)]
        span = 1 + sum(extents)
        if span == 1 or (span * self.itemsize <= _SLAB_NBYTES and span <= _SPARSE * out.size):
            slab = np.empty(span, dtype=out.dtype)
            self.sources.read_into(self.storage, start * self.itemsize, slab.data.cast("B"))
            out[...] = np.lib.stride_tricks.as_strided(slab, shape, [stride * self.itemsize for stride in strides])
            return
        axis = extents.index(max(extents))
        half = shape[axis] // 2
        for begin, end in ((0, half), (half, shape[axis])):
            part = tuple(end - begin if place == axis else length for place, length in enumerate(shape))
            where = (slice(None),) * axis + (slice(begin, end),)
            self.read_block(part, strides, start + begin * strides[axis], out[where])

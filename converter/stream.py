"""Bytes on their way: from byte ranges of source files, through one small buffer, to a place in an output file.

A shard is cut into pieces of some MB; each is a task of its own, for any executor, in this process or another. A piece
fills its buffer tensor after tensor, so that many small ones make one write. Contiguous tensors are read straight
into the buffer, strided ones are gathered with numpy from short reads: nothing is mapped, because mapped pages count
as memory and a file cut short would kill the process.

CRC32s are computed as the bytes go by, where a tensor covers its whole record; other records are read once more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from zlib_ng.zlib_ng import crc32

from converter.errors import BadFile
from converter.tensors import ByteRange, TensorInfo

if TYPE_CHECKING:
    import numpy as np

    from converter.choose import OnOverflow
    from converter.plan import Copy, Shard

CHUNK_NBYTES = 1 << 18  # the fastest of 64 KiB to 4 MiB against cp: it stays in the processor's cache
PIECE_NBYTES = 1 << 25  # 100 and more tasks for a checkpoint of some GB, each well above the cost of a task
GATHER_NBYTES = 1 << 23  # a transposed matrix needs many rows at once, or it is read in single elements
_SLAB_NBYTES = 1 << 20
_MAX_ITEM_NBYTES = 16  # a multiple of the size of any element
_SPARSE = 16  # a slab of which less than this share is wanted is read in parts


@dataclass(frozen=True, slots=True)
class Step:
    """Bytes ``begin`` to ``end`` of one tensor as it is written."""

    copy: Copy
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of one output file: steps in the order of their places. ``with_crcs`` asks for CRC32s of the output."""

    path: Path
    steps: tuple[Step, ...]
    with_crcs: bool = False
    on_overflow: OnOverflow = "error"

    @property
    def nbytes(self) -> int:
        return sum(step.end - step.begin for step in self.steps)


@dataclass(frozen=True, slots=True)
class CrcPart:
    """The CRC32 of ``nbytes`` bytes at ``begin`` of a record, or of a tensor as it is written into a file."""

    of: ByteRange
    begin: int
    nbytes: int
    crc32: int


@dataclass(slots=True)
class Report:
    """What a piece tells: CRC32s of records read in part and of what was written; how many values were too large."""

    read: list[CrcPart] = field(default_factory=list)
    written: list[CrcPart] = field(default_factory=list)
    too_large: Counter[str] = field(default_factory=Counter)


def cut_pieces(
    shard: Shard, path: Path, on_overflow: OnOverflow = "error", piece_nbytes: int = PIECE_NBYTES
) -> Iterator[Piece]:
    """Cut the data of a shard, to be written at ``path``, into pieces of about ``piece_nbytes`` bytes."""
    with_crcs = shard.format == "torch"
    steps: list[Step] = []
    room = piece_nbytes
    for copy in shard.copies:
        begin = 0
        nbytes = copy.nbytes
        while begin < nbytes:
            end = min(nbytes, begin + room)
            steps.append(Step(copy, begin, end))
            room -= end - begin
            begin = end
            if room < _MAX_ITEM_NBYTES:  # so that no element is cut, whatever came before
                yield Piece(path, tuple(steps), with_crcs, on_overflow)
                steps, room = [], piece_nbytes
    if steps:
        yield Piece(path, tuple(steps), with_crcs, on_overflow)


def covers_record(info: TensorInfo) -> bool:
    """Say whether a tensor is its whole record, byte for byte, so that its CRC32 is the record's."""
    return info.start == 0 and info.nbytes == info.storage.nbytes and info.is_contiguous


def write_piece(piece: Piece, chunk_nbytes: int = CHUNK_NBYTES) -> Report:
    """Write a piece into its file, which is there. Raises BadFile for a record that is damaged."""
    with SourceFiles() as sources, piece.path.open("r+b", buffering=0) as out:
        source = _PieceReader(piece, sources, chunk_nbytes)
        for place, chunk in source.chunks():
            out.seek(place)
            _write_all(out, chunk)
        return source.report


def rewrite_piece(piece: Piece, chunk_nbytes: int = CHUNK_NBYTES) -> Report:
    """Like ``write_piece``, for a file that an earlier run left: only chunks that differ are written."""
    with SourceFiles() as sources, piece.path.open("r+b", buffering=0) as out:
        source = _PieceReader(piece, sources, chunk_nbytes)
        there = bytearray(len(source.buffer))
        for place, chunk in source.chunks():
            if not _is_at(out, place, chunk, there):
                out.seek(place)
                _write_all(out, chunk)
        return source.report


def compare_piece(piece: Piece, chunk_nbytes: int = CHUNK_NBYTES) -> None:
    """Hold a written piece against its source; raises BadFile where they differ."""
    with SourceFiles() as sources, piece.path.open("rb", buffering=0) as out:
        source = _PieceReader(piece, sources, chunk_nbytes)
        there = bytearray(len(source.buffer))
        for place, chunk in source.chunks():
            if not _is_at(out, place, chunk, there):
                name = source.step.copy.source.name
                raise BadFile(
                    piece.path, f"was written, and then read back otherwise near tensor {name!r}", "Check the disk."
                )


def _is_at(file: BinaryIO, place: int, chunk: memoryview, scratch: bytearray) -> bool:
    file.seek(place)
    # startswith compares as memcmp does; memoryviews compare item by item.
    count = _read_some(file, memoryview(scratch)[: len(chunk)])
    return count == len(chunk) and scratch.startswith(chunk)


def check_record(record: ByteRange, chunk_nbytes: int = CHUNK_NBYTES) -> None:
    """Read a record for its CRC32 alone; raises BadFile where that is wrong."""
    buffer = memoryview(bytearray(chunk_nbytes))
    crc = 0
    with SourceFiles() as sources:
        for begin in range(0, record.nbytes, chunk_nbytes):
            view = buffer[: min(chunk_nbytes, record.nbytes - begin)]
            sources.read_into(record, begin, view)
            crc = crc32(view, crc)
    check_crc(record, crc)


def read_chunks(info: TensorInfo, sources: SourceFiles, buffer: bytearray) -> Iterator[memoryview]:
    """Yield a tensor's bytes in row-major order; each view is of ``buffer`` and valid until the next one."""
    view = memoryview(buffer)
    room = len(buffer) // _MAX_ITEM_NBYTES * _MAX_ITEM_NBYTES
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


class SourceFiles:
    """The source files that one task has open; a file that turns out shorter than its header said is a BadFile."""

    def __init__(self) -> None:
        self._files: dict[Path, BinaryIO] = {}

    def __enter__(self) -> SourceFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def read_into(self, storage: ByteRange, begin: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes from ``begin`` of a byte range on."""
        file = self._files.get(storage.path)
        if file is None:
            file = self._files[storage.path] = storage.path.open("rb", buffering=0)
        file.seek(storage.offset + begin)
        if _read_some(file, out) != len(out):
            raise BadFile(storage.path, "became shorter while it was read", "Fetch the file again.")


class _PieceReader:
    """Yields a piece's bytes in chunks, each with its place in the file; afterwards ``report`` is complete."""

    def __init__(self, piece: Piece, sources: SourceFiles, chunk_nbytes: int) -> None:
        strided = not all(step.copy.source.is_contiguous for step in piece.steps)
        self.buffer = bytearray(max(chunk_nbytes, GATHER_NBYTES) if strided else chunk_nbytes)
        self.piece = piece
        self.sources = sources
        self.report = Report()
        self.step = piece.steps[0]
        self._scratch = bytearray()

    def chunks(self) -> Iterator[tuple[int, memoryview]]:
        view = memoryview(self.buffer)
        size = len(view)
        filled = 0
        start = self.step.copy.offset + self.step.begin
        for step in self.piece.steps:
            self.step = step
            place = step.copy.offset + step.begin
            if place != start + filled:
                yield start, view[:filled]
                start, filled = place, 0
            begin, end = step.begin, step.end
            read_crc = written_crc = 0
            checked = step.copy.source.storage.crc32 is not None and covers_record(step.copy.source)
            while begin < end:
                # Elements stay whole, of whatever dtype.
                count = min(end - begin, (size - filled) // _MAX_ITEM_NBYTES * _MAX_ITEM_NBYTES)
                if not count:
                    yield start, view[:filled]
                    start, filled = start + filled, 0
                    continue
                out = view[filled : filled + count]
                source = self._fill(step.copy, begin, out)
                if checked:
                    read_crc = crc32(source, read_crc)
                if self.piece.with_crcs:
                    written_crc = crc32(out, written_crc)
                begin += count
                filled += count
            if checked:
                self._note_read(step, read_crc)
            if self.piece.with_crcs:
                self._note_written(step, written_crc)
        if filled:
            yield start, view[:filled]

    def _fill(self, copy: Copy, begin: int, out: memoryview) -> memoryview:
        """Fill ``out`` with the tensor's bytes, cast where it is; give what was read for it."""
        info = copy.source
        source = out
        if copy.dtype is not info.dtype:
            begin = begin // copy.dtype.itemsize * info.dtype.itemsize
            source = self._borrow(len(out) // copy.dtype.itemsize * info.dtype.itemsize)
        read_range(info, self.sources, begin, source)
        if copy.dtype is not info.dtype:
            from converter.cast import cast_chunk

            too_large = cast_chunk(source, info.dtype, out, copy.dtype, self.piece.on_overflow)
            if too_large:
                self.report.too_large[info.name] += too_large
        return source

    def _borrow(self, nbytes: int) -> memoryview:
        if len(self._scratch) < nbytes:
            self._scratch = bytearray(nbytes)
        return memoryview(self._scratch)[:nbytes]

    def _note_read(self, step: Step, crc: int) -> None:
        info = step.copy.source
        begin, end = (place * info.dtype.bits // step.copy.dtype.bits for place in (step.begin, step.end))
        if end - begin == info.storage.nbytes:
            check_crc(info.storage, crc)
        else:
            self.report.read.append(CrcPart(info.storage, begin, end - begin, crc))

    def _note_written(self, step: Step, crc: int) -> None:
        of = ByteRange(self.piece.path, step.copy.offset, step.copy.nbytes)
        self.report.written.append(CrcPart(of, step.begin, step.end - step.begin, crc))


def check_crc(record: ByteRange, crc: int) -> None:
    """Raise BadFile where a record's bytes do not give the CRC32 that is noted for it."""
    if crc != record.crc32:
        raise BadFile(
            record.path,
            f"its bytes {record.offset:,} to {record.offset + record.nbytes:,} do not give the CRC32 that it notes",
            "The file is damaged: fetch it again.",
        )


def _read_some(file: BinaryIO, out: memoryview) -> int:
    """Fill ``out`` as far as the file goes, whatever a single read gives."""
    done = 0
    while done < len(out):
        count = file.readinto(out[done:])  # type: ignore[attr-defined]
        if not count:
            break
        done += count
    return done


def _write_all(file: BinaryIO, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += file.write(data[done:])


def _gather(info: TensorInfo, sources: SourceFiles, first: int, out: memoryview) -> None:
    import numpy as np

    # Only bits move, so any type of the right width will do.
    values = np.frombuffer(out, dtype=f"u{info.dtype.itemsize}")
    _Gather(info, sources).fill(info.shape, info.strides, info.start, first, values)


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


def records_to_check(copies: Iterable[Copy]) -> set[ByteRange]:
    """Give the records with a CRC32 that no tensor covers, and that must be read once more to check it."""
    covered: set[ByteRange] = set()
    touched: set[ByteRange] = set()
    for copy in copies:
        if copy.source.storage.crc32 is not None:
            (covered if covers_record(copy.source) else touched).add(copy.source.storage)
    return touched - covered

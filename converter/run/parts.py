"""Bytes on their way: from byte ranges of source files, through one small buffer, to a place in an output file.

A shard is cut into pieces of some MB; each is a task of its own, for any executor, in this process or another. A piece
fills its buffer tensor after tensor, so that many small ones make one write; a tensor that changes its dtype passes
through a second buffer.

CRC32s are computed as the bytes go by, where a tensor covers its whole record; other records are read once more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from zlib_ng.zlib_ng import crc32

from converter.dtypes import OnOverflow
from converter.errors import BadFile, Where
from converter.storage import FileRef, OpenFile, Place
from converter.storage.local import open_staged
from converter.tensors.base import ByteRange, TensorInfo
from converter.tensors.reader import GATHER_NBYTES, ITEM_MULTIPLE, PIECE_NBYTES, SourceFiles, read_range

if TYPE_CHECKING:
    from converter.plan.make import Copy, Shard

CHUNK_NBYTES = 1 << 19  # 128 KiB to 1 MiB take the least processor time: it stays in the cache


class Step(NamedTuple):
    """Bytes ``begin`` to ``end`` of one tensor as it is written."""

    copy: Copy
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of one output file: steps in the order of their places. ``with_crcs`` asks for CRC32s of the output."""

    place: Place
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
    shard: Shard, place: Place, on_overflow: OnOverflow = "error", piece_nbytes: int = PIECE_NBYTES
) -> Iterator[Piece]:
    """Cut the data of a shard, to be written at ``place``, into pieces of about ``piece_nbytes`` bytes."""
    with_crcs = shard.format == "torch"
    steps: list[Step] = []
    room = piece_nbytes
    for copy in shard.copies:
        begin = 0
        nbytes = copy.nbytes
        while begin < nbytes:
            end = min(nbytes, begin + room // ITEM_MULTIPLE * ITEM_MULTIPLE)  # no element is cut
            if copy.source.storage.packed_nbytes is not None:
                end = nbytes  # each piece would inflate it from its start
            steps.append(Step(copy, begin, end))
            room -= end - begin
            begin = end
            if room < ITEM_MULTIPLE:
                yield Piece(place, tuple(steps), with_crcs, on_overflow)
                steps, room = [], piece_nbytes
    if steps:
        yield Piece(place, tuple(steps), with_crcs, on_overflow)


def covers_record(info: TensorInfo) -> bool:
    """Say whether a tensor is its whole record, byte for byte, so that its CRC32 is the record's."""
    return info.start == 0 and info.nbytes == info.storage.nbytes and info.is_contiguous


def write_piece(piece: Piece, chunk_nbytes: int = CHUNK_NBYTES) -> Report:
    """Write a piece into its file, which is there. Raises BadFile for a record that is damaged."""
    with SourceFiles() as sources, open_staged(piece.place) as out:
        source = _PieceReader(piece, sources, chunk_nbytes)
        for offset, chunk in source.chunks():
            out.write(offset, chunk)
        return source.report


def rewrite_piece(piece: Piece, chunk_nbytes: int = CHUNK_NBYTES) -> Report:
    """Like ``write_piece``, for a file that an earlier run left: only chunks that differ are written."""
    with SourceFiles() as sources, open_staged(piece.place) as out:
        source = _PieceReader(piece, sources, chunk_nbytes)
        there = bytearray(len(source.buffer))
        for offset, chunk in source.chunks():
            if not _is_at(out, offset, chunk, there):
                out.write(offset, chunk)
        return source.report


class MismatchError(BadFile):
    """A file that was written is read back otherwise."""

    def __init__(self, where: Where, tensor: str) -> None:
        super().__init__(where, f"was written, and then read back otherwise near tensor {tensor!r}", "Check the disk.")
        self.args = where, tensor  # so that it can be pickled
        self.tensor = tensor


def compare_piece(piece: Piece, chunk_nbytes: int = CHUNK_NBYTES) -> None:
    """Hold a written piece against its source; raises MismatchError where they differ."""
    with SourceFiles() as sources, piece.place.open() as out:
        source = _PieceReader(piece, sources, chunk_nbytes)
        there = bytearray(len(source.buffer))
        for offset, chunk in source.chunks():
            if not _is_at(out, offset, chunk, there):
                raise MismatchError(piece.place, source.step.copy.source.name)


def _is_at(file: OpenFile, offset: int, chunk: memoryview, scratch: bytearray) -> bool:
    # startswith compares as memcmp does; memoryviews compare item by item.
    count = file.read_into(offset, memoryview(scratch)[: len(chunk)])
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


class _PieceReader:
    """Yields a piece's bytes in chunks, each with its place in the file; afterwards ``report`` is complete."""

    def __init__(self, piece: Piece, sources: SourceFiles, chunk_nbytes: int) -> None:
        strided = [step.copy for step in piece.steps if not step.copy.source.is_contiguous]
        # What is gathered is wider than what comes out of it, in most casts.
        widths = [max(1, copy.source.dtype.bits // copy.dtype.bits) for copy in strided]
        self.buffer = bytearray(max(chunk_nbytes, GATHER_NBYTES // max(widths)) if strided else chunk_nbytes)
        self.piece = piece
        self.sources = sources
        self.report = Report()
        self.step = piece.steps[0]
        self._scratch = bytearray()

    def chunks(self) -> Iterator[tuple[int, memoryview]]:
        view = memoryview(self.buffer)
        filled = 0
        start = self.step.copy.offset + self.step.begin
        room = self._room_at(start)
        for step in self.piece.steps:
            self.step = step
            copy, begin, end = step
            info = copy.source
            place = copy.offset + begin
            if place != start + filled:
                yield start, view[:filled]
                start, filled = place, 0
                room = self._room_at(start)
            read_crc = written_crc = 0
            checked = info.storage.crc32 is not None and covers_record(info)
            itemsize = copy.dtype.itemsize or 1  # elements stay whole; packed ones are neither cast nor gathered
            while begin < end:
                count = min(end - begin, (room - filled) // itemsize * itemsize)
                if not count:
                    yield start, view[:filled]
                    start, filled = start + filled, 0
                    room = self._room_at(start)
                    continue
                out = view[filled : filled + count]
                if copy.dtype is info.dtype:
                    source = out
                    read_range(info, self.sources, begin, out)
                else:
                    source = self._fill_cast(copy, begin, out)
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

    def _room_at(self, place: int) -> int:
        """Give the bytes up to the next multiple of a chunk's size: so writes fill whole pages of the file."""
        size = len(self.buffer)
        room = size - place % size
        return room if room >= ITEM_MULTIPLE else size

    def _fill_cast(self, copy: Copy, begin: int, out: memoryview) -> memoryview:
        """Fill ``out`` with the tensor's bytes, cast; give what was read for it."""
        from converter.tensors.kernels import cast_chunk, dequantize_chunk, quantize_chunk

        info = copy.source
        first = begin // copy.dtype.itemsize
        source = self._borrow(len(out) // copy.dtype.itemsize * info.dtype.itemsize)
        read_range(info, self.sources, first * info.dtype.itemsize, source)
        how = self.piece.on_overflow
        too_large = 0
        if not info.scales:
            too_large = cast_chunk(source, info.dtype, out, copy.dtype, how)
        elif copy.dtype.tag == "I8":
            quantize_chunk(source, info.dtype, out, info.scales, first, info.shape[1])
        else:
            too_large = dequantize_chunk(info, source, first, out, copy.dtype, how)
        if too_large:
            self.report.too_large[info.name] += too_large
        return source

    def _borrow(self, nbytes: int) -> memoryview:
        if len(self._scratch) < nbytes:
            self._scratch = bytearray(nbytes)
        return memoryview(self._scratch)[:nbytes]

    def _note_read(self, step: Step, crc: int) -> None:
        copy, begin, end = step
        storage = copy.source.storage
        if end - begin == copy.nbytes:
            check_crc(storage, crc)
        else:
            begin, end = (place * storage.nbytes // copy.nbytes for place in (begin, end))
            self.report.read.append(CrcPart(storage, begin, end - begin, crc))

    def _note_written(self, step: Step, crc: int) -> None:
        of = ByteRange(FileRef(self.piece.place), step.copy.offset, step.copy.nbytes)
        self.report.written.append(CrcPart(of, step.begin, step.end - step.begin, crc))


def check_crc(record: ByteRange, crc: int) -> None:
    """Raise BadFile where a record's bytes do not give the CRC32 that is noted for it."""
    if crc != record.crc32:
        raise BadFile(
            record.file.place,
            f"its bytes {record.offset:,} to {record.offset + record.nbytes:,} do not give the CRC32 that it notes",
            "The file is damaged: fetch it again.",
        )


def records_to_check(infos: Collection[TensorInfo]) -> set[ByteRange]:
    """Give the records with a CRC32 that no tensor covers, and that must be read once more to check it."""
    touched = {info.storage for info in infos if info.storage.crc32 is not None and not covers_record(info)}
    return touched - {info.storage for info in infos if covers_record(info)} if touched else touched

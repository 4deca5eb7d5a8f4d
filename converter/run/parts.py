"""Bytes on their way: from where tensors come from, through one small buffer, to a place in an output file.

A file is cut into pieces of some MB; each is a task of its own, for any executor, in this process or another. A piece
fills its buffer tensor after tensor, so that many small ones make one write. It does not know what tensors are made of.
What lies in a file as it is to be written, the system is asked to copy, or to share, before the rest is read.

CRC32s of what is written are computed as the bytes go by.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from zlib_ng.zlib_ng import crc32, crc32_combine

from converter.errors import BadFile, LossyCast, Where, name_some
from converter.storage import FileRef, OpenFile, Place
from converter.storage.local import StagedFile, open_staged
from converter.tensors.base import ByteRange, Storage, Tensor
from converter.tensors.reader import (
    ITEM_MULTIPLE,
    PIECE_NBYTES,
    CrcPart,
    RangeReader,
    Sums,
    are_far,
    check_crc,
    piece_nbytes_for,
)

if TYPE_CHECKING:
    from converter.plan.types import PlannedFile, PlannedTensor

CHUNK_NBYTES = 1 << 19  # 128 KiB to 1 MiB take the least processor time: it stays in the cache
# To have fewer bytes copied takes longer than to read and write them: btrfs waits for what is on its way to the disk.
_TAKEN_NBYTES = 1 << 19
_ASKED_NBYTES = 1 << 12  # it takes as long to find out where a smaller tensor lies as to read it


_NAMED = 5  # tensors, in a message
_GRAINS = 4  # in a chunk, at least: or too little of the room is used


class Step(NamedTuple):
    """Bytes ``begin`` to ``end`` of one tensor, which begins at ``offset`` of the file that it is written to."""

    tensor: Tensor
    offset: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of one output file: steps in the order of their offsets. ``with_crcs`` asks for CRC32s of the output.

    With ``is_crowded`` other tasks wait to write into the file: it is theirs while the system copies into it.
    """

    place: Place
    steps: tuple[Step, ...]
    with_crcs: bool = False
    is_crowded: bool = False

    @property
    def nbytes(self) -> int:
        return sum(step.end - step.begin for step in self.steps)


class WrittenCrc(NamedTuple):
    """The CRC32 of a part of a tensor as it is written, which begins at ``offset`` of its file."""

    place: Place
    offset: int
    begin: int
    nbytes: int
    crc32: int


@dataclass(slots=True)
class Report:
    """What a piece tells: what CRC32s came to, and how many values of which tensors were too large for a cast."""

    read: Sums = field(default_factory=Sums)
    written: list[WrittenCrc] = field(default_factory=list)
    too_large: Counter[str] = field(default_factory=Counter)


def cut_pieces(planned: PlannedFile, place: Place, piece_nbytes: int = PIECE_NBYTES) -> Iterator[Piece]:
    """Cut the data of a file, to be written at ``place``, into pieces of about ``piece_nbytes`` bytes.

    What comes over a network is read as it lies there, in larger ones: a piece is a stream.
    """
    with_crcs = planned.format == "torch"
    steps: list[Step] = []
    tensors = planned.tensors
    if are_far(tensor.source for tensor, _ in tensors):
        tensors = tuple(sorted(tensors, key=_place_in_source))
        piece_nbytes = max(piece_nbytes, piece_nbytes_for(tensor.source for tensor, _ in tensors))
    room = piece_nbytes
    for tensor, offset in tensors:
        begin, nbytes = 0, tensor.nbytes
        cut = math.lcm(ITEM_MULTIPLE, tensor.source.grain)  # no element is cut
        while begin < nbytes:
            end = min(nbytes, begin + (room // cut or 1) * cut)
            steps.append(Step(tensor if end - begin == nbytes else _part(tensor, begin, end), offset, begin, end))
            room -= end - begin
            begin = end
            if room < ITEM_MULTIPLE:
                yield Piece(place, tuple(steps), with_crcs)
                steps, room = [], piece_nbytes
    if steps:
        yield Piece(place, tuple(steps), with_crcs)


def _place_in_source(planned: PlannedTensor) -> tuple[str, int]:
    first = next(planned.tensor.source.extents(0, planned.tensor.nbytes), None)
    return (str(first.file.place), first.offset) if first else ("", 0)


def _part(tensor: Tensor, begin: int, end: int) -> Tensor:
    source = tensor.source.part(begin, end)
    return tensor if source is tensor.source else tensor._replace(source=source)


def write_piece(piece: Piece, chunk_nbytes: int = CHUNK_NBYTES) -> Report:
    """Write a piece into its file, which is there. Raises BadFile for a record that is damaged."""
    with open_staged(piece.place) as out:
        left = piece if piece.with_crcs else replace(piece, steps=tuple(_take(piece, out)))
        return carry(left, chunk_nbytes, lambda offset, chunk, _: out.write(offset, chunk))


def _take(piece: Piece, out: StagedFile) -> Iterator[Step]:
    """Have the system copy what lies in files as it is to be written; give the steps that are left.

    It keeps all others from writing into the file meanwhile, who could read: so where they would, it is to share alone.
    """
    is_willing = True  # what it has refused once, it would refuse again
    with RangeReader() as reader:
        for run in _joined(piece.steps):
            if is_willing and run.file is not None and run.nbytes >= _TAKEN_NBYTES:
                is_willing = out.take(run.offset, reader.file(run.file), run.begin, run.nbytes, piece.is_crowded)
                if is_willing:
                    continue
            yield from run.steps


@dataclass(slots=True)
class _Run:
    """Steps in a row, and what they make together: ``nbytes`` bytes at ``begin`` of a file, which go to ``offset``.

    Where there is no such file, each step is for itself.
    """

    file: FileRef | None
    begin: int
    offset: int
    nbytes: int
    steps: list[Step]


def _joined(steps: Iterable[Step]) -> Iterator[_Run]:
    """Join steps whose bytes follow each other in a file as they do in the output; small ones only behind others."""
    run = _Run(None, 0, 0, 0, [])
    for step in steps:
        if run.file is None and step.end - step.begin < _ASKED_NBYTES:
            run.steps.append(step)
            continue
        for part, found in _located(step):
            file, at, nbytes = found[:3] if found else (None, 0, 0)
            is_next = file is run.file and at - run.begin == run.nbytes == part.offset + part.begin - run.offset
            if is_next or file is run.file is None:
                run.nbytes += nbytes
                run.steps.append(part)
            else:
                yield run
                run = _Run(file, at, part.offset + part.begin, nbytes, [part])
    yield run


def _located(step: Step) -> Iterator[tuple[Step, ByteRange | None]]:
    """Cut a step where its bytes come from elsewhere, as those of the next box do; give each part with its place."""
    begin = step.begin
    while begin < step.end:
        found = step.tensor.source.verbatim(begin, step.end)
        end = begin + found.nbytes if found else step.end
        yield step._replace(begin=begin, end=end), found
        begin = end


def rewrite_piece(piece: Piece, chunk_nbytes: int = CHUNK_NBYTES) -> Report:
    """Like ``write_piece``, for a file that an earlier run left: only chunks that differ are written."""
    there = bytearray(_buffer_nbytes(piece, chunk_nbytes))
    with open_staged(piece.place) as out:

        def rewrite(offset: int, chunk: memoryview, _: str) -> None:
            if not _is_at(out, offset, chunk, there):
                out.write(offset, chunk)

        return carry(piece, chunk_nbytes, rewrite)


def try_piece(piece: Piece, chunk_nbytes: int = CHUNK_NBYTES) -> None:
    """Read a piece as it would be written, and write nothing."""
    carry(replace(piece, with_crcs=False), chunk_nbytes, lambda *_: None)


class MismatchError(BadFile):
    """A file that was written is read back otherwise."""

    def __init__(self, where: Where, tensor: str) -> None:
        super().__init__(where, f"was written, and then read back otherwise near tensor {tensor!r}", "Check the disk.")
        self.args = where, tensor  # so that it can be pickled
        self.tensor = tensor


def compare_piece(piece: Piece, chunk_nbytes: int = CHUNK_NBYTES) -> None:
    """Hold a written piece against its source; raises MismatchError where they differ."""
    there = bytearray(_buffer_nbytes(piece, chunk_nbytes))
    with piece.place.open() as out:
        out.expect((step.offset + step.begin, step.end - step.begin) for step in piece.steps)

        def compare(offset: int, chunk: memoryview, name: str) -> None:
            if not _is_at(out, offset, chunk, there):
                raise MismatchError(piece.place, name)

        carry(replace(piece, with_crcs=False), chunk_nbytes, compare)


def _is_at(file: OpenFile, offset: int, chunk: memoryview, scratch: bytearray) -> bool:
    # startswith compares as memcmp does; memoryviews compare item by item.
    count = file.read_into(offset, memoryview(scratch)[: len(chunk)])
    return count == len(chunk) and scratch.startswith(chunk)


def check_record(record: Storage, chunk_nbytes: int = CHUNK_NBYTES) -> None:
    """Read a record for its CRC32 alone; raises BadFile where that is wrong."""
    buffer = memoryview(bytearray(chunk_nbytes))
    with RangeReader(with_sums=True) as reader:
        lead = record.lead if type(record) is ByteRange else 0
        reader.expect([ByteRange(record.file, record.offset - lead, record.stored_nbytes + lead)])
        for begin in range(0, record.nbytes, chunk_nbytes):
            reader.read_into(record, begin, buffer[: min(chunk_nbytes, record.nbytes - begin)])


def find_unread(files: Iterable[PlannedFile], sums: Sums) -> list[Storage]:
    """Give the records of files that have a CRC32 and were not read as a whole, or in parts that make one.

    Raises BadFile for one whose parts do not give its CRC32.
    """
    checked = set(sums.checked)
    by_record: dict[Storage, list[CrcPart]] = {}
    for part in sums.parts:
        by_record.setdefault(part.of, []).append(part)
    for record, found in by_record.items():
        crc, nbytes = combine(found)
        if nbytes == record.nbytes:
            check_crc(record, crc)
            checked.add(record)
    inputs = (storage for file in files for tensor, _ in file.tensors for storage in tensor.source.inputs())
    unread = {record for record in inputs if record.crc32 is not None} - checked
    return sorted(unread, key=lambda record: record.offset)


def combine(parts: Iterable[CrcPart | WrittenCrc]) -> tuple[int, int]:
    """Give the CRC32 of parts that follow each other from 0 on, and how many bytes that are."""
    crc, nbytes = 0, 0
    for part in sorted(parts, key=lambda part: part.begin):
        # A record that is written twice under two names comes twice, perhaps cut elsewhere.
        if part.begin == nbytes:
            crc = crc32_combine(crc, part.crc32, part.nbytes)
            nbytes += part.nbytes
    return crc, nbytes


def name_counts(counts: Mapping[str, int]) -> str:
    """Name the tensors with the largest counts."""
    largest = [f"{name} ({count:,})" for name, count in Counter(counts).most_common()]
    return name_some(largest, _NAMED) + (" tensors" if len(counts) > _NAMED else "")


def too_large_error(source: Place, files: Iterable[PlannedFile], counts: Counter[str]) -> LossyCast:
    """Name the tensors of files with values that a cast cannot hold."""
    tensors = (tensor for file in files for tensor, _ in file.tensors)
    dtypes = {tensor.dtype.tag for tensor in tensors if tensor.name in counts and tensor.source.computes}
    return LossyCast(
        source,
        f"holds values that are too large for {' and '.join(sorted(dtypes))}: {name_counts(counts)}",
        "Keep them with --keep-fp32, take bf16, or say --on-overflow saturate or inf.",
    )


def carry(piece: Piece, chunk_nbytes: int, deal_with: Callable[[int, memoryview, str], None]) -> Report:
    """Read a piece in chunks, and hand over each with its offset in the file and the name of its last tensor."""
    report = Report()
    if not piece.steps:
        return report
    buffer = _Buffer(_buffer_nbytes(piece, chunk_nbytes), deal_with)
    with RangeReader(with_sums=True) as reader:
        if are_far(step.tensor.source for step in piece.steps):
            reader.expect(part for step in piece.steps for part in step.tensor.source.extents(step.begin, step.end))
        for tensor, offset, begin, end in piece.steps:
            reader.let_go()
            buffer.turn_to(offset + begin, tensor.name)
            crc = 0
            size = _unit_nbytes(tensor, buffer.nbytes)
            at = begin
            while at < end:
                out = buffer.room_for(end - at, size)
                tensor.source.read(at, out, reader)
                if piece.with_crcs:
                    crc = crc32(out, crc)
                at += len(out)
            if reader.too_large:
                report.too_large[tensor.name] += reader.too_large
                reader.too_large = 0
            if piece.with_crcs:
                report.written.append(WrittenCrc(piece.place, offset, begin, end - begin, crc))
        buffer.flush()
    report.read = reader.sums
    return report


def _unit_nbytes(tensor: Tensor, room: int) -> int:
    """Give the bytes that stay together in a chunk: an element, or the grain where several find room."""
    size = tensor.dtype.itemsize or 1  # packed ones are neither cast nor gathered
    together = math.lcm(size, tensor.source.grain)
    return together if together * _GRAINS <= room else size


def _buffer_nbytes(piece: Piece, chunk_nbytes: int) -> int:
    return max(chunk_nbytes, *(step.tensor.source.window for step in piece.steps))


class _Buffer:
    """Gathers what goes to one place of a file, and hands it over when it is full, or the place another."""

    def __init__(self, nbytes: int, deal_with: Callable[[int, memoryview, str], None]) -> None:
        self._view = memoryview(bytearray(nbytes))
        self._deal_with = deal_with
        self._name = ""
        self._offset = self._filled = 0
        self._room = nbytes

    @property
    def nbytes(self) -> int:
        """The bytes that it holds at most."""
        return len(self._view)

    def turn_to(self, offset: int, name: str) -> None:
        """Let what comes next be of a tensor, at an offset of the file."""
        if offset != self._offset + self._filled:
            self.flush()
            self._start_at(offset)
        self._name = name

    def room_for(self, nbytes: int, itemsize: int) -> memoryview:
        """Give room for the next bytes, as far as there is any for whole elements."""
        count = min(nbytes, (self._room - self._filled) // itemsize * itemsize)
        if not count:
            self.flush()
            if self._room < _GRAINS * itemsize:
                self._room = self.nbytes
            count = min(nbytes, self._room // itemsize * itemsize)
        self._filled += count
        return self._view[self._filled - count : self._filled]

    def flush(self) -> None:
        """Hand over what there is."""
        if self._filled:
            self._deal_with(self._offset, self._view[: self._filled], self._name)
            self._start_at(self._offset + self._filled)

    def _start_at(self, offset: int) -> None:
        """Fill up to the next multiple of the buffer's size: so writes fill whole pages of the file."""
        size = self.nbytes
        room = size - offset % size
        self._offset, self._filled = offset, 0
        self._room = room if room >= ITEM_MULTIPLE else size

"""Reads ranges of files for one task: few files open at once, sums of what goes by, room to work in.

A file that is not, or does not stay, as it was when its header was read is a BadFile. CRC32s are summed while records
are read in order: those that one task reads whole are checked at once, of others the parts are told to whoever can put
them together. What was predicted of where a record begins is looked up when it is read from there. Deflated records are
inflated on the way, from their start for each task: slow for large ones, but torch.save writes none.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple

from zlib_ng.zlib_ng import crc32

from converter.errors import BadFile
from converter.storage import FileRef, OpenFile
from converter.storage.base import NEAR_NBYTES
from converter.storage.streams import Stream, plan_streams
from converter.tensors.base import ByteRange, PackedRange, Storage, TensorSource
from converter.tensors.leads import check_lead

ITEM_MULTIPLE = 16  # a multiple of the size of any element, in bytes
PIECE_NBYTES = 1 << 25  # 100 and more tasks for a checkpoint of some GB, each well above the cost of a task
_STREAM_NBYTES = 1 << 27  # of what is far, where a task begins with a request
_PACKED_NBYTES = 1 << 16
# A comparison takes turns between two files, a merge goes through its shards: more open files would save little, and
# eight tasks at once are to get along with 64.
_MAX_OPEN = 4
_MAX_KEPT = 8  # a weight has scales, zero points, and one scale for those; and each may be gathered


@dataclass(frozen=True, slots=True)
class CrcPart:
    """The CRC32 of ``nbytes`` bytes from ``begin`` of a record on."""

    of: Storage
    begin: int
    nbytes: int
    crc32: int


@dataclass(slots=True)
class Sums:
    """What the CRC32s of records came to: those ``checked`` as a whole, and parts of others."""

    checked: list[Storage] = field(default_factory=list)
    parts: list[CrcPart] = field(default_factory=list)


class RangeReader:
    """Reads for one task. ``too_large`` counts the values that a cast could not hold.

    CRC32s are summed into ``sums``, which is complete at the end, only ``with_sums``: they take a tenth of the time.

    Use as a context: leaving it looks whether what was read still stands there.
    """

    def __init__(self, with_sums: bool = False) -> None:
        self.too_large = 0
        self._with_sums = with_sums
        self.sums = Sums()
        self._files: dict[FileRef, _SourceFile] = {}
        self._expected: dict[FileRef, list[Stream]] = {}
        self._current: _SourceFile | None = None
        self._scratch: list[_Scratch] = []
        self._kept: list[_Kept] = []
        self._led: Storage | None = None
        self._summed: Storage | None = None
        self._begin = self._end = self._crc = 0

    def __enter__(self) -> RangeReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._scratch.clear()  # each knows the list that it goes back to: a circle
        # That a file was changed is also why its bytes are damaged.
        is_checked = kind is None or issubclass(kind, BadFile)
        with ExitStack() as closing:
            for source in self._files.values():
                closing.callback(source.close, is_checked)
        if kind is None:
            self._note_part()

    def expect(self, parts: Iterable[ByteRange]) -> None:
        """Take note of what will be read, in order, so that what is far comes in few streams."""
        far = ((file, offset, nbytes) for file, offset, nbytes, *_ in parts if file.place.store.is_far)
        self._expected |= plan_streams(far)
        for ref, source in self._files.items():
            if ref in self._expected:
                source.file.follow(self._expected.pop(ref))

    def read_into(self, record: Storage, begin: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes from ``begin`` of a range on."""
        source = self._turn_to(record.file)
        if isinstance(record, PackedRange):
            source.inflate(record, begin, out)
        elif _fill(source.file, record, begin, out) != len(out):
            raise BadFile(record.file.place, "became shorter while it was read", "Fetch the file again.")
        if self._with_sums and record.crc32 is not None:
            self._sum(record, begin, out)

    def check_begin(self, record: Storage) -> None:
        """Look at the ``lead`` of a range, of which other parts are read."""
        if type(record) is ByteRange and record.lead and record != self._led:
            check_lead(record, self.file(record.file).read(record.offset - record.lead, record.lead))
            self._led = record

    def announce(self, record: Storage, begin: int, nbytes: int) -> None:
        """Say that a part of a range is read next, in small parts."""
        if type(record) is ByteRange:
            self.file(record.file).read_next(record.offset + begin, nbytes)

    def file(self, ref: FileRef) -> OpenFile:
        """Give a file that is read from, open for now."""
        return self._turn_to(ref).file

    def kept(self, source: TensorSource, begin: int, end: int) -> memoryview:
        """Give bytes of a source; of few sources those that were asked for last are kept."""
        for one in self._kept:
            if one.source is source and (one.begin, one.end) == (begin, end):
                return one.content
        self._kept = [one for one in self._kept if one.source is not source]
        content = memoryview(bytearray(end - begin))
        source.read(begin, content, self)
        self._kept = [_Kept(source, begin, end, content), *self._kept[: _MAX_KEPT - 1]]
        return content

    def let_go(self) -> None:
        """Keep nothing of the tensor that was read: another comes next."""
        self._kept.clear()

    def scratch(self, nbytes: int) -> _Scratch:
        """Give room to work in, for as long as the context is open; what it holds at first is anything."""
        scratch = self._scratch.pop() if self._scratch else _Scratch(self._scratch)
        scratch.nbytes = nbytes
        return scratch

    def _turn_to(self, ref: FileRef) -> _SourceFile:
        current = self._current
        if current is not None and current.ref is ref:
            return current
        source = self._files.pop(ref, None)
        if source is None:
            # What is far takes no handle, and has been told what to expect.
            near = [one for one, source in self._files.items() if not source.file.is_far]
            if len(near) == _MAX_OPEN:
                self._files.pop(near[0]).close()
            source = _SourceFile(ref, ref.open())
            if ref in self._expected:
                source.file.follow(self._expected.pop(ref))
        self._files[ref] = self._current = source
        return source

    def _sum(self, record: Storage, begin: int, out: memoryview) -> None:
        if record is not self._summed or begin != self._end:
            self._note_part()
            self._summed, self._begin, self._crc = record, begin, 0
        self._crc = crc32(out, self._crc)
        self._end = begin + len(out)

    def _note_part(self) -> None:
        record, self._summed = self._summed, None
        if record is None:
            return
        if self._end - self._begin == record.nbytes:
            check_crc(record, self._crc)
            self.sums.checked.append(record)
        else:
            self.sums.parts.append(CrcPart(record, self._begin, self._end - self._begin, self._crc))


def _fill(file: OpenFile, record: ByteRange, begin: int, out: memoryview) -> int:
    lead = 0 if begin else record.lead
    offset = record.offset + begin
    if len(out) > NEAR_NBYTES:
        if lead:
            check_lead(record, file.read(offset - lead, lead))
        return file.read_into(offset, out)
    part = file.read_small(offset - lead, lead + len(out))
    if lead:
        check_lead(record, part[:lead])
        part = part[lead:]
    out[: len(part)] = part
    return len(part)


class _Kept(NamedTuple):
    """Bytes of a source that were read once."""

    source: TensorSource
    begin: int
    end: int
    content: memoryview


class _Scratch:
    """Room to work in, which goes back to those that are free; a generator would take three times as long."""

    __slots__ = ("_free", "_room", "nbytes")

    def __init__(self, free: list[_Scratch]) -> None:
        self._free = free
        self._room = memoryview(b"")
        self.nbytes = 0

    def __enter__(self) -> memoryview:
        if len(self._room) < self.nbytes:
            self._room = memoryview(bytearray(self.nbytes))
        return self._room[: self.nbytes]

    def __exit__(self, *_: object) -> None:
        self._free.append(self)


def are_far(sources: Iterable[TensorSource]) -> bool:
    """Say whether any of some tensors is read over a network, as far as the first file of each tells."""
    return any(storage.file.place.store.is_far for source in sources for storage in source.inputs()[:1])


def piece_nbytes_for(sources: Iterable[TensorSource]) -> int:
    """Say how much of some tensors one task should read."""
    return _STREAM_NBYTES if are_far(sources) else PIECE_NBYTES


def check_crc(record: Storage, crc: int) -> None:
    """Raise BadFile where a record's bytes do not give the CRC32 that is noted for it."""
    if crc != record.crc32:
        raise BadFile(
            record.file.place,
            f"its bytes {record.offset:,} to {record.offset + record.nbytes:,} do not give the CRC32 that it notes",
            "The file is damaged: fetch it again.",
        )


def read_chunks(source: TensorSource, reader: RangeReader, buffer: bytearray) -> Iterator[memoryview]:
    """Yield a tensor's bytes in row-major order; each view is of ``buffer`` and valid until the next one."""
    view = memoryview(buffer)
    nbytes = source.dtype.nbytes(math.prod(source.shape))
    room = len(buffer) // ITEM_MULTIPLE * ITEM_MULTIPLE
    for begin in range(0, nbytes, room):
        chunk = view[: min(room, nbytes - begin)]
        source.read(begin, chunk, reader)
        yield chunk


@dataclass(slots=True)
class _SourceFile:
    """A source file that is open; ``inflated`` is the deflated record that was read last in it."""

    ref: FileRef
    file: OpenFile
    inflated: _Inflated | None = None

    def inflate(self, record: PackedRange, begin: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes from ``begin`` of a packed range on; those before are unpacked too."""
        inflated = self.inflated
        if inflated is None or inflated.record.offset != record.offset or inflated.done > begin:
            inflated = self.inflated = _Inflated(self.file, record)
        while inflated.done < begin:
            inflated.read(min(_PACKED_NBYTES, begin - inflated.done))
        done = 0
        while done < len(out):
            part = inflated.read(len(out) - done)
            out[done : done + len(part)] = part
            done += len(part)

    def close(self, is_checked: bool = True) -> None:
        """Close the file, and look whether what was read of it still stands there."""
        try:
            if is_checked:
                self.file.check()
        finally:
            self.file.close()


class _Inflated:
    """A deflated record, read from its start on; ``done`` is how far, in its own bytes."""

    def __init__(self, file: OpenFile, record: PackedRange) -> None:
        self.record = record
        self.done = 0
        self._file = file
        self._taken = 0
        self._inflater = zlib.decompressobj(-zlib.MAX_WBITS)

    def read(self, nbytes: int) -> bytes:
        """Give the next bytes, so many at most."""
        record = self.record
        while True:
            packed = self._inflater.unconsumed_tail
            if not packed:
                room = min(_PACKED_NBYTES, record.stored_nbytes - self._taken)
                packed = self._file.read(record.offset + self._taken, room)
                self._taken += len(packed)
            try:
                part = self._inflater.decompress(packed, nbytes)
            except zlib.error:
                packed = part = b""
            if part:
                self.done += len(part)
                return part
            if not packed or self._inflater.eof:  # what follows an early end is never taken, nor given back
                raise BadFile(record.file.place, "holds a compressed record that is damaged", "Fetch the file again.")

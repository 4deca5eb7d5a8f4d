"""The zip archive that ``torch.save`` writes, written: record by record, at places that are known beforehand.

The records, their order and their 64-byte alignment are torch's (``PyTorchStreamWriter``); what opens them is any torch
since 1.6, mapped or not. Offsets follow from the sizes; only the CRC32s, which stand in the local headers and in the
directory, are known when all bytes have gone by, so those are written last.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple
from zlib import crc32

from converter.dtypes import DType
from converter.formats.torch.rebuild import AXES_A_STEP
from converter.formats.torch.state_dict import MAX_NAME_LENGTH, MAX_NAMES_LENGTH, MAX_TENSORS
from converter.formats.torch.unpickler import FREE_NBYTES, GLOBAL_STEPS, MAX_OPCODES, count_text_steps
from converter.formats.zip_records import END, END_64, END_64_LOCATOR, ENTRY
from converter.tensors.base import MAX_DIMS, Layout, TensorSpec
from converter.tensors.leads import LOCAL_HEADER
from converter.tensors.view import contiguous_strides

_ALIGNMENT = 64
_ROOT = "archive"
_ZIP64_LIMIT = 0xFFFFFFFF
_ZIP64_COUNT = 0xFFFF
_DOS_DATE = (1980 - 1980) << 9 | 1 << 5 | 1  # the same bytes whenever they are written
_VERSION = 45  # needed to extract: zip64
_STORAGE = b"X\7\0\0\0storage"
_CPU = b"X\3\0\0\0cpu"
_RESHARD = "Write shards: --max-shard-size."


class _Record(NamedTuple):
    """One record: ``content`` is None for a storage, whose bytes come from elsewhere."""

    name: bytes
    offset: int
    data_offset: int
    nbytes: int
    content: bytes | None

    @property
    def end(self) -> int:
        return self.data_offset + self.nbytes


def lay_out(tensors: Sequence[TensorSpec], ties: Mapping[str, str], notes: Mapping[str, str]) -> Layout:
    """Lay out an archive with a storage for each tensor; a tie is a second name for one.

    ``notes`` have no place in it. Raises ValueError for a dtype that torch does not have, and for what wconv would not
    read again.
    """
    _check_tensors(tensors, ties)
    records = _place_records(tensors, ties)
    header = b"".join(_local_header(record, crc32(record.content or b"")) + (record.content or b"")
                      for record in records[:_FIRST_STORAGE])  # fmt: skip
    storages = records[_FIRST_STORAGE : _FIRST_STORAGE + len(tensors)]
    tail = _directory(records, [0] * len(records))
    return Layout(
        header,
        tuple(range(len(tensors))),
        tuple(record.data_offset for record in storages),
        records[-1].end + len(tail),
    )


def _check_tensors(tensors: Sequence[TensorSpec], ties: Mapping[str, str]) -> None:
    if len(tensors) + len(ties) > MAX_TENSORS:
        raise ValueError(f"has more than {MAX_TENSORS:,} tensors, too many for one torch file", _RESHARD)
    lengths = [len(name) for name in (*ties, *(name for name, _, _ in tensors))]
    if max(lengths, default=0) > MAX_NAME_LENGTH or sum(lengths) > MAX_NAMES_LENGTH:
        raise ValueError("holds tensors with too long names for a torch file")
    first: dict[tuple[DType, tuple[int, ...]], str] = {}
    for name, dtype, shape in tensors:
        first.setdefault((dtype, shape), name)
    for (dtype, shape), name in first.items():
        if not dtype.torch_name:
            raise ValueError(f"holds tensors of dtype {dtype}, which torch does not have")
        if len(shape) > MAX_DIMS:
            raise ValueError(f"holds tensor {name!r} of {len(shape):,} axes, and a torch file may have {MAX_DIMS}")
        if max((*shape, *contiguous_strides(shape)), default=0) >= 1 << 63:
            raise ValueError(f"holds tensor {name!r}, whose shape has numbers beyond torch's")


def frame(tensors: Sequence[TensorSpec], ties: Mapping[str, str], crcs: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """Give all that surrounds the storages, whose bytes have these CRC32s: offsets in the file, and bytes."""
    records = _place_records(tensors, ties)
    storages = iter(crcs)
    all_crcs = [next(storages) if record.content is None else crc32(record.content) for record in records]
    for record, crc in zip(records, all_crcs, strict=True):
        yield record.offset, _local_header(record, crc) + (record.content or b"")
    yield records[-1].end, _directory(records, all_crcs)


_FIRST_STORAGE = 4  # the records before the storages


def _place_records(tensors: Sequence[TensorSpec], ties: Mapping[str, str]) -> list[_Record]:
    sizes = (dtype.nbytes(math.prod(shape)) for _, dtype, shape in tensors)
    before = (
        _note("data.pkl", build_pickle(tensors, ties)),
        _note(".format_version", b"1"),
        _note(".storage_alignment", str(_ALIGNMENT).encode()),
        _note("byteorder", b"little"),
    )
    storages = ((f"data/{number}", nbytes, None) for number, nbytes in enumerate(sizes))
    contents: Iterable[tuple[str, int, bytes | None]] = itertools.chain(before, storages, [_note("version", b"3\n")])
    records = []
    offset = 0
    for name, nbytes, content in contents:
        raw = f"{_ROOT}/{name}".encode()
        head = LOCAL_HEADER.size + len(raw) + _zip64_nbytes(nbytes) + 4
        record = _Record(raw, offset, offset + head + -(offset + head) % _ALIGNMENT, nbytes, content)
        records.append(record)
        offset = record.end
    return records


def _note(name: str, content: bytes) -> tuple[str, int, bytes]:
    return name, len(content), content


def _zip64_nbytes(nbytes: int) -> int:
    return 20 if nbytes >= _ZIP64_LIMIT else 0


def _local_header(record: _Record, crc: int) -> bytes:
    large = record.nbytes >= _ZIP64_LIMIT
    size = _ZIP64_LIMIT if large else record.nbytes
    extra = struct.pack("<HHQQ", 1, 16, record.nbytes, record.nbytes) if large else b""
    padding = record.data_offset - record.offset - LOCAL_HEADER.size - len(record.name) - len(extra) - 4
    extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    names = len(record.name), len(extra)
    fixed = LOCAL_HEADER.pack(b"PK\3\4", _VERSION, 0, 0, 0, _DOS_DATE, crc, size, size, *names)
    return fixed + record.name + extra


def _directory(records: Sequence[_Record], crcs: Sequence[int]) -> bytes:
    """Spell the central directory and what ends the file, in zip64 where one number needs it."""
    begin = records[-1].end
    entries = b"".join(_entry(record, crc) for record, crc in zip(records, crcs, strict=True))
    count, nbytes = len(records), len(entries)
    end64 = b""
    if count >= _ZIP64_COUNT or begin + nbytes >= _ZIP64_LIMIT:
        end64 = END_64.pack(b"PK\6\6", 44, _VERSION, _VERSION, 0, 0, count, count, nbytes, begin)
        end64 += END_64_LOCATOR.pack(b"PK\6\7", 0, begin + nbytes, 1)
    short = min(count, _ZIP64_COUNT)
    sizes = min(nbytes, _ZIP64_LIMIT), min(begin, _ZIP64_LIMIT)
    return entries + end64 + END.pack(b"PK\5\6", 0, 0, short, short, *sizes, 0)


def _entry(record: _Record, crc: int) -> bytes:
    wide = [number for number in (record.nbytes, record.nbytes, record.offset) if number >= _ZIP64_LIMIT]
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    size, offset = min(record.nbytes, _ZIP64_LIMIT), min(record.offset, _ZIP64_LIMIT)
    names = len(record.name), len(extra)
    fixed = ENTRY.pack(b"PK\1\2", _VERSION, _VERSION, 0, 0, 0, _DOS_DATE, crc, size, size, *names, 0, 0, 0, 0, offset)
    return fixed + record.name + extra


def build_pickle(tensors: Sequence[TensorSpec], ties: Mapping[str, str]) -> bytes:
    """Spell the pickle of a state dict, protocol 2: storage ``n`` is that of tensor ``n``, ties come last."""
    writer = _Pickler()
    numbers = {name: number for number, (name, _, _) in enumerate(tensors)}
    entries = list(numbers.items())
    entries += [(dropped, numbers[kept]) for dropped, kept in ties.items()]
    writer.global_("collections", "OrderedDict")
    writer.codes(b")R(")
    for name, number in entries:
        writer.text(name)
        writer.tensor(number, tensors[number][1], tensors[number][2])
    writer.codes(b"u.")
    if writer.steps > MAX_OPCODES or len(writer.raw) > FREE_NBYTES:
        raise ValueError("has too many tensors, or too long names, for one torch file", _RESHARD)
    return bytes(writer.raw)


class _Pickler:
    """The few opcodes that a state dict takes. Texts and globals that come again are memoized.

    ``steps`` are what it takes to read them.
    """

    def __init__(self) -> None:
        self.raw = bytearray(b"\x80\x02")
        self.steps = 1
        self._memo: dict[bytes, bytes] = {}
        # What stands before and after a tensor's number, and the steps of both, of each kind.
        self._kinds: dict[tuple[DType, tuple[int, ...]], tuple[bytes, bytes, int]] = {}

    def codes(self, codes: bytes) -> None:
        self.raw += codes
        self.steps += len(codes)

    def global_(self, module: str, name: str) -> None:
        self._once(f"c{module}\n{name}\n".encode(), GLOBAL_STEPS)

    def text(self, text: str) -> None:
        raw = text.encode("utf-8", "surrogatepass")
        self.raw += b"X" + struct.pack("<I", len(raw)) + raw
        self.steps += 1 + count_text_steps(raw)

    def _once(self, spelled: bytes, steps: int = 0) -> None:
        known = self._memo.get(spelled)
        self.steps += 1
        if known is None:
            place = len(self._memo)
            self._memo[spelled] = b"h" + bytes([place])
            self.raw += spelled + b"q" + bytes([place])
            self.steps += 1 + steps
        else:
            self.raw += known

    def number(self, number: int) -> None:
        if number < 1 << 8:
            spelled = b"K" + struct.pack("<B", number)
        elif number < 1 << 31:
            spelled = b"J" + struct.pack("<i", number)
        else:
            raw = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
            spelled = b"\x8a" + bytes([len(raw)]) + raw
        self.raw += spelled
        self.steps += 1

    def numbers(self, numbers: Sequence[int]) -> None:
        self.codes(b"(")
        for number in numbers:
            self.number(number)
        self.codes(b"t")

    def tensor(self, number: int, dtype: DType, shape: tuple[int, ...]) -> None:
        """Spell a tensor; only of the first of a kind it takes more than its number."""
        if (dtype, shape) in self._kinds:
            before, after, steps = self._kinds[dtype, shape]
            self.raw += before
            self.text(str(number))
            self.raw += after
            self.steps += steps
            return
        memoized, begin, steps = len(self._memo), len(self.raw), self.steps
        self._begin_tensor(dtype)
        before = bytes(self.raw[begin:])
        self.text(str(number))
        begin, steps = len(self.raw), steps + 1
        self._end_tensor(dtype, shape)
        if len(self._memo) == memoized:  # or else the next one is spelled otherwise
            self._kinds[dtype, shape] = before, bytes(self.raw[begin:]), self.steps - steps

    def _begin_tensor(self, dtype: DType) -> None:
        """Begin a call of ``_rebuild_tensor_v2`` for dtypes with a typed storage, else ``_v3`` (torch/_tensor.py)."""
        typed = bool(dtype.storage_class)
        self.global_("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
        self.codes(b"((")
        self._once(_STORAGE)
        self.global_(*(("torch", dtype.storage_class) if typed else ("torch.storage", "UntypedStorage")))

    def _end_tensor(self, dtype: DType, shape: tuple[int, ...]) -> None:
        typed = bool(dtype.storage_class)
        self._once(_CPU)
        numel = math.prod(shape)
        self.number(numel if typed else dtype.nbytes(numel))
        self.codes(b"tQ")
        self.number(0)
        self.numbers(shape)
        self.numbers(contiguous_strides(shape))
        self.codes(b"\x89")
        self.global_("collections", "OrderedDict")
        self.codes(b")R")
        if not typed:
            self.global_("torch", dtype.torch_name)
        self.codes(b"tR")
        self.steps += len(shape) // AXES_A_STEP

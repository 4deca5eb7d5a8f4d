"""The records of a zip archive: their names, and where their bytes lie. No record is read.

Where bytes begin is said only by the header before them. In a file that is far, where to read those would be a request
a tensor, it follows from how torch lays records out and from where the next one lies; who reads the bytes looks whether
it is so.

Why not ``zipfile``: with 100,000 records it takes three times as long and 60 MB more, it reads a directory of any size,
it looks for archives behind other bytes, and some of its versions take a record's name from where torch does not look.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import chain, islice
from typing import NamedTuple

from converter.errors import BadFile, HostileFile, Unsupported
from converter.storage import OpenFile, Place
from converter.tensors.leads import INCOMPLETE, LOCAL_HEADER, STORED, lengths_after

MAX_DIRECTORY_NBYTES = 64_000_000  # as many records as may be, with names of 200 bytes
MAX_RECORDS = 250_000  # a pickle of all the steps there are describes 160,000 tensors
_MAX_EXTRAS = 16  # fields of one record; the one that is looked for comes first in all archives that are known

DEFLATED = 8
_ENCRYPTED = 0x2041  # encrypted, strongly, and with masked headers
_SIZES_BEHIND = 8  # a flag: the CRC32 and the sizes come after the bytes, and not in the header before them
_IN_EXTRA = 0xFFFFFFFF
_COMMENT_NBYTES = 0xFFFF
# Kept of a file that is far: with it come the directory of some 3,000 records, in less time than another request takes.
_FAR_TAIL_NBYTES = 1 << 18
_ALIGNMENT = 64  # of records that torch wrote, at least: ``storage_alignment`` may be a multiple

# APPNOTE.TXT 4.3.12, 4.3.14, 4.3.15 and 4.3.16
ENTRY = struct.Struct("<4s6H3I5H2I")
END_64 = struct.Struct("<4sQ2H2I4Q")
END_64_LOCATOR = struct.Struct("<4sIQI")
END = struct.Struct("<4s4H2IH")


class Record(NamedTuple):
    """One record: its bytes as they are stored are ``packed_nbytes`` at ``offset``, and ``nbytes`` once unpacked.

    ``lead`` is the length of the header before, where that has not been looked at.
    """

    name: bytes
    method: int
    crc32: int
    packed_nbytes: int
    nbytes: int
    offset: int
    lead: int = 0


# A record as the directory has it: where its header lies, its name, flags, method, CRC32, and its bytes packed and not.
_Entry = tuple[int, bytes, int, int, int, int, int]


def read_records(file: OpenFile) -> Iterator[Record]:
    """Yield an archive's records as they lie in the file.

    Raises BadFile where the archive is cut short or damaged, HostileFile where records overlap or names are such that
    not all readers see them alike, and Unsupported for what is encrypted.
    """
    place = file.ref.place
    try:
        start, nbytes, count = _find_directory(file)
        entries = sorted(islice(_read_entries(file.read(start, nbytes)), count + 1))
        if len(entries) != count:
            raise BadFile(place, f"its directory has not the {count:,} records that it claims", INCOMPLETE)
        _check_names([name for _, name, *_ in entries], place)
        yield from _find_records(file, entries, start)
    except struct.error:
        raise BadFile(place, "is a zip archive whose directory is damaged", INCOMPLETE) from None


def _find_directory(file: OpenFile) -> tuple[int, int, int]:
    """Give where the directory begins, its bytes and its number of records."""
    place = file.ref.place
    most = END.size + _COMMENT_NBYTES
    last = file.kept(file.nbytes - END.size, END.size)
    if last and last.startswith(b"PK\x05\x06"):
        tail_start, tail = file.nbytes - END.size, last  # no other can follow it
    else:
        tail_start = max(0, file.nbytes - (_FAR_TAIL_NBYTES if file.is_far else most))
        tail = file.keep(tail_start, file.nbytes)
    at = tail.rfind(b"PK\x05\x06", max(0, len(tail) - most))
    if at < 0:
        raise BadFile(place, "is a zip archive without its directory, which is at the end", INCOMPLETE)
    _, _, _, _, count, nbytes, start, comment_nbytes = END.unpack_from(tail, at)
    end = tail_start + at
    locator = file.read(max(0, end - END_64_LOCATOR.size), END_64_LOCATOR.size)
    if locator.startswith(b"PK\x06\x07"):
        end = END_64_LOCATOR.unpack(locator)[2]
        _, _, _, _, _, _, _, count, nbytes, start = END_64.unpack(file.read(end, END_64.size))
    if at + END.size + comment_nbytes != len(tail) or start + nbytes != end:
        raise BadFile(place, "is a zip archive with bytes before it, after it or left out", INCOMPLETE)
    if nbytes > MAX_DIRECTORY_NBYTES:
        raise HostileFile(place, f"its directory claims {nbytes:,} bytes, too many for a description of tensors")
    if count > MAX_RECORDS:
        raise HostileFile(place, f"its directory claims {count:,} records, too many for a state dict")
    return start, nbytes, count


def _read_entries(raw: bytes) -> Iterator[_Entry]:
    place = 0
    while place < len(raw):
        (signature, _, _, flags, method, _, _, crc, packed_nbytes, nbytes, name_nbytes, extra_nbytes, comment_nbytes,
         _, _, _, offset) = ENTRY.unpack_from(raw, place)  # fmt: skip
        if signature != b"PK\x01\x02":
            raise struct.error
        begin = place + ENTRY.size
        end = begin + name_nbytes
        place = end + extra_nbytes + comment_nbytes
        if _IN_EXTRA in (nbytes, packed_nbytes, offset):
            wide = _wide_numbers(raw[end : end + extra_nbytes])
            nbytes, packed_nbytes, offset = (
                next(wide) if number == _IN_EXTRA else number for number in (nbytes, packed_nbytes, offset)
            )
        yield offset, raw[begin:end], flags, method, crc, packed_nbytes, nbytes
    if place != len(raw):
        raise struct.error


def _wide_numbers(extra: bytes) -> Iterator[int]:
    """Yield the 64-bit numbers of an extra field (APPNOTE.TXT 4.5.3)."""
    place = 0
    for _ in range(_MAX_EXTRAS):
        kind, nbytes = struct.unpack_from("<2H", extra, place)
        if kind == 1:
            yield from (
                number for (number,) in struct.iter_unpack("<Q", extra[place + 4 : place + 4 + nbytes // 8 * 8])
            )
            break
        place += 4 + nbytes
    raise struct.error


def _check_names(names: list[bytes], place: Place) -> None:
    # torch ends a name at a NUL, and takes names that differ in case for one (``mz_zip_reader_locate_file``).
    if b"\0" in b"".join(names):
        raise HostileFile(place, "its archive holds a record whose name not all readers see alike")
    if len(set(map(bytes.lower, names))) != len(names):
        raise HostileFile(place, "its archive holds two records of one name")


def _find_records(file: OpenFile, entries: list[_Entry], end: int) -> Iterator[Record]:
    place = file.ref.place
    reached = 0
    leads = _predict_leads(file, entries, end) if file.is_far else [0] * len(entries)
    headers = file.read_many(
        (entry[0], LOCAL_HEADER.size + len(entry[1])) for entry, lead in zip(entries, leads, strict=True) if not lead
    )
    for entry, lead in zip(entries, leads, strict=True):
        header_offset, name, flags, method, crc, packed_nbytes, nbytes = entry
        raw = b"" if lead else next(headers)
        if flags & _ENCRYPTED:
            raise Unsupported(place, f"its record {spell(name)} is encrypted", "Save it again with torch.save.")
        if not reached <= header_offset < end:
            raise HostileFile(place, f"its record {spell(name)} overlaps another, or lies outside the archive")
        offset = header_offset + (lead or _header_nbytes(raw, name, method, place))
        reached = offset + packed_nbytes
        if reached > end:
            raise BadFile(place, f"its record {spell(name)} runs past the end of the archive", INCOMPLETE)
        yield Record(name, method, crc, packed_nbytes, nbytes, offset, lead)


def _header_nbytes(raw: bytes, name: bytes, method: int, place: Place) -> int:
    """Give how many bytes a header takes with all that belongs to it; ``raw`` ends where its name should."""
    lengths = lengths_after(raw, method)
    if lengths is None or lengths[0] != len(name) or raw[LOCAL_HEADER.size :] != name:
        raise BadFile(place, f"its directory and the header of its record {spell(name)} disagree", INCOMPLETE)
    return len(raw) + lengths[1]


def _predict_leads(file: OpenFile, entries: list[_Entry], end: int) -> list[int]:
    """Give how long the header of each record must be; 0 where that has to be looked up, or is at hand."""
    ends = chain((entry[0] for entry in islice(entries, 1, None)), [end])
    return [
        _predict_lead(entry, reached) if file.kept(entry[0], LOCAL_HEADER.size + len(entry[1])) is None else 0
        for entry, reached in zip(entries, ends, strict=True)
    ]


def _predict_lead(entry: _Entry, end: int) -> int:
    """Give how long a header must be if its record, which ends where the next one begins, is one that torch wrote.

    Then its bytes begin at a multiple of 64, behind a field that fills the gap (``getPadding`` in
    ``caffe2/serialize/inline_container.cc``), and what may come after them is of a length that is known
    (``mz_zip_writer_add_mem_ex_v2`` in ``third_party/miniz-3.0.2/miniz.c``). 0 where they cannot lie so.
    """
    offset, name, flags, method, _, packed_nbytes, nbytes = entry
    is_wide = offset >= _IN_EXTRA or nbytes >= _IN_EXTRA
    behind = (24 if is_wide else 16) if flags & _SIZES_BEHIND else 0
    begin = end - behind - packed_nbytes
    extra_nbytes = begin - offset - LOCAL_HEADER.size - len(name)
    is_so = method == STORED and packed_nbytes == nbytes and not begin % _ALIGNMENT and 4 <= extra_nbytes <= 0xFFFF
    return begin - offset if is_so else 0


def spell(name: bytes) -> str:
    """Give a record's name for people to read."""
    return name.decode("utf-8", "backslashreplace")

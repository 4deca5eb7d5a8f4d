"""The zip archive that ``torch.save`` writes since 1.6: record offsets to views.

One root folder of any name holds ``data.pkl`` (the state dict, see ``rebuild.py``), one record per storage under
``data/``, and small notes such as ``byteorder``. Records are stored, so a storage is a byte range of the archive;
where someone packed them since, one that is inflated as it is read.

torch itself checks little (a wrong CRC32, a deflated record under ``mmap=True``, a record that is too short all load
as garbage), so all of it is checked here; CRC32s are held against the bytes when those are copied.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

from converter.errors import BadFile, HostileFile, Unsupported
from converter.formats.torch.content import Content
from converter.formats.torch.rebuild import StorageRef
from converter.formats.torch.unpickler import MAX_PICKLE_NBYTES, Pickled
from converter.formats.zip_records import DEFLATED, Record, read_records, spell
from converter.storage import OpenFile, Place
from converter.tensors.base import ByteRange, PackedRange, Storage
from converter.tensors.leads import STORED, check_lead

_DAMAGED = "The file is damaged: fetch it again."

_MAX_NOTE_NBYTES = 16
_MAX_BETWEEN = 1 << 14  # of the pickle and the note that torch writes near it: small records, each of them aligned


def open_content(file: OpenFile, parse: Callable[[bytes, Place], Pickled]) -> Content:
    """Read the directory and the pickle of an archive; no storage is read."""
    place = file.ref.place
    records = {record.name: record for record in read_records(file)}
    root = _find_root(records, place)
    pickle, byteorder = _read_descriptions(file, records[root + b"data.pkl"], records.get(root + b"byteorder"))
    if byteorder not in (b"little", b"big"):
        raise BadFile(place, f"notes an order of bytes that is none ({byteorder!r})", _DAMAGED)
    folder = root + b"data/"

    def find(storage: StorageRef) -> Storage | None:
        record = records.get(folder + storage.key.encode("utf-8", "surrogatepass"))
        return None if record is None else _range_of(record, file)

    return Content(file.ref, parse(pickle, place), find, byteorder == b"big")


def _range_of(record: Record, file: OpenFile) -> Storage:
    crc = record.crc32 or None  # 0 means that none was computed (``torch.serialization.set_crc32_options``)
    if record.method == DEFLATED:
        return PackedRange(file.ref, file.begin + record.offset, record.nbytes, crc, record.packed_nbytes)
    if record.method != STORED:
        problem = f"its record {spell(record.name)} is compressed"
        raise Unsupported(file.ref.place, problem, "Save it again with torch.save.")
    if record.packed_nbytes != record.nbytes:
        raise HostileFile(file.ref.place, f"its record {spell(record.name)} claims two sizes")
    return ByteRange(file.ref, file.begin + record.offset, record.nbytes, crc, record.lead)


def _find_root(names: Mapping[bytes, Any], place: Place) -> bytes:
    """Give the one root folder, with its slash; the archive's own name says nothing once a file is renamed."""
    root = next(iter(names), b"").partition(b"/")[0] + b"/"
    if root + b"constants.pkl" in names:
        advice = "torch.jit.load reads it: save the state_dict() of what that gives with torch.save."
        raise Unsupported(place, "is a TorchScript archive (code and weights)", advice)
    if root + b"archive_format" in names:
        advice = "torch.export.load reads it: save the state_dict of what that gives with torch.save."
        raise Unsupported(place, "is a program that torch.export.save wrote", advice)
    if root + b"data.pkl" not in names:
        raise BadFile(place, "is a zip archive, but not one that torch.save wrote", "If it holds files, unpack it.")
    return root


def _read_descriptions(file: OpenFile, pickle: Record, note: Record | None) -> tuple[bytes, bytes]:
    """Read the pickle and the order of bytes; at once what lies close together, where that saves a request."""
    stored = _check_small(file, pickle, MAX_PICKLE_NBYTES)
    if note is None:
        return _unpacked(stored, file.read(*_span(stored, file))), b"little"
    stored_note = _check_small(file, note, _MAX_NOTE_NBYTES)
    (begin, nbytes), (note_begin, note_nbytes) = _span(stored, file), _span(stored_note, file)
    between = note_begin - begin - nbytes
    if file.is_far and 0 <= between <= _MAX_BETWEEN and file.kept(note_begin, note_nbytes) is None:
        raw = file.read(begin, nbytes + between + note_nbytes)
        raw, raw_note = raw[:nbytes], raw[nbytes + between :]
    else:
        raw, raw_note = file.read(begin, nbytes), file.read(note_begin, note_nbytes)
    return _unpacked(stored, raw), _unpacked(stored_note, raw_note).strip()


def _check_small(file: OpenFile, record: Record, max_nbytes: int) -> Storage:
    stored = _range_of(record, file)
    nbytes = max(stored.nbytes, stored.stored_nbytes)
    if nbytes > max_nbytes:
        raise HostileFile(file.ref.place, f"a record that describes tensors claims {nbytes:,} bytes")
    return stored


def _span(stored: Storage, file: OpenFile) -> tuple[int, int]:
    """Give what is to be read for a record: an offset, and so many bytes."""
    return stored.offset - file.begin - stored.lead, stored.lead + stored.stored_nbytes


def _unpacked(stored: Storage, raw: bytes) -> bytes:
    place = stored.file.place
    if isinstance(stored, PackedRange):
        try:
            raw = zlib.decompressobj(-zlib.MAX_WBITS).decompress(raw, stored.nbytes + 1)
        except zlib.error:
            raw = b""
        if len(raw) != stored.nbytes:
            raise BadFile(place, "the description of its tensors does not unpack", _DAMAGED)
    elif stored.lead:
        check_lead(stored, raw[: stored.lead])
        raw = raw[stored.lead :]
    if stored.crc32 is not None and zlib.crc32(raw) != stored.crc32:
        raise BadFile(place, "the description of its tensors does not give the CRC32 that is noted", _DAMAGED)
    return raw

"""The zip archive that ``torch.save`` writes since 1.6: record offsets to TensorInfos.

One root folder of any name holds ``data.pkl`` (the state dict, see torch_pickle), one record per storage under
``data/``, and small notes such as ``byteorder``. Records are stored, so a storage is a byte range of the archive;
where someone packed them since, one that is inflated as it is read.

torch itself checks little (a wrong CRC32, a deflated record under ``mmap=True``, a record that is too short all load
as garbage), so all of it is checked here; CRC32s are held against the bytes when those are copied.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from converter.errors import BadFile, HostileFile, Unsupported
from converter.formats.pickle_machine import MAX_PICKLE_NBYTES
from converter.formats.state_dict import Reading, choose_state_dict, resolve
from converter.formats.torch_pickle import StorageRef, parse_pickle
from converter.formats.zip_records import DEFLATED, STORED, Record, read_records, spell
from converter.opening import Opened
from converter.tensors import ByteRange, WeightsFile

_DAMAGED = "The file is damaged: fetch it again."


def read_file(opened: Opened, reading: Reading) -> WeightsFile:
    """Read the directory and the pickle of an archive; no storage is read."""
    path, file, stamp = opened
    records = {record.name: record for record in read_records(file, path)}
    root = _find_root(records, path)
    pickle = _read_small(file, records[root + b"data.pkl"], MAX_PICKLE_NBYTES, path)
    note = records.get(root + b"byteorder")
    byteorder = _read_small(file, note, 16, path).strip() if note else b"little"
    if byteorder not in (b"little", b"big"):
        raise BadFile(path, f"notes an order of bytes that is none ({byteorder!r})", _DAMAGED)
    pickled = parse_pickle(pickle, path, reading.strip_code)
    state_dict, notes = choose_state_dict(pickled, path, reading)

    folder = root + b"data/"

    def find(storage: StorageRef) -> ByteRange | None:
        record = records.get(folder + storage.key.encode("utf-8", "surrogatepass"))
        if record is None:
            return None
        place = _range_of(record, path)._replace(stamp=stamp)
        return place if byteorder == b"little" else _swapped(place, storage)

    return WeightsFile(path, "torch", tuple(resolve(state_dict, find, path)), {}, notes, pickled.foreign)


def _range_of(record: Record, path: Path) -> ByteRange:
    crc = record.crc32 or None  # 0 means that none was computed (``torch.serialization.set_crc32_options``)
    if record.method == DEFLATED:
        return ByteRange(path, record.offset, record.nbytes, crc, record.packed_nbytes)
    if record.method != STORED:
        raise Unsupported(path, f"its record {spell(record.name)} is compressed", "Save it again with torch.save.")
    if record.packed_nbytes != record.nbytes:
        raise HostileFile(path, f"its record {spell(record.name)} claims two sizes")
    return ByteRange(path, record.offset, record.nbytes, crc)


def _swapped(place: ByteRange, storage: StorageRef) -> ByteRange:
    if storage.dtype is None:
        raise Unsupported(place.path, "holds big-endian storages of no dtype, which torch itself misreads")
    # The CRC32 is that of the bytes before they are turned around, and is not checked.
    swap = storage.dtype.itemsize // (2 if storage.dtype.tag == "C64" else 1)
    return place._replace(swap=swap, crc32=None)


def _find_root(names: Mapping[bytes, Any], path: Path) -> bytes:
    """Give the one root folder, with its slash; the archive's own name says nothing once a file is renamed."""
    root = next(iter(names), b"").partition(b"/")[0] + b"/"
    if root + b"constants.pkl" in names:
        raise Unsupported(path, "is a TorchScript archive (code and weights)", "Save its state_dict() with torch.save.")
    if root + b"data.pkl" not in names:
        raise BadFile(path, "is a zip archive, but not one that torch.save wrote", "If it holds files, unpack it.")
    return root


def _read_small(file: BinaryIO, record: Record, max_nbytes: int, path: Path) -> bytes:
    place = _range_of(record, path)
    if place.nbytes > max_nbytes:
        raise HostileFile(place.path, f"a record that describes tensors claims {place.nbytes:,} bytes")
    file.seek(place.offset)
    if place.packed_nbytes is None:
        raw = file.read(place.nbytes)
    else:
        try:
            raw = zlib.decompressobj(-zlib.MAX_WBITS).decompress(file.read(place.packed_nbytes), place.nbytes + 1)
        except zlib.error:
            raw = b""
        if len(raw) != place.nbytes:
            raise BadFile(place.path, "the description of its tensors does not unpack", _DAMAGED)
    if place.crc32 is not None and zlib.crc32(raw) != place.crc32:
        raise BadFile(place.path, "the description of its tensors does not give the CRC32 that is noted", _DAMAGED)
    return raw

"""The zip archive that ``torch.save`` writes since 1.6: record offsets to TensorInfos.

One root folder of any name holds ``data.pkl`` (the state dict, see torch_pickle), one record per storage under
``data/``, and small notes such as ``byteorder``. Records are stored, so a storage is a byte range of the archive:
``zipfile`` reads the directory at the end, the local headers say where each record's bytes begin.

torch itself checks little (a wrong CRC32, a deflated record under ``mmap=True``, a record that is too short all load
as garbage), so all of it is checked here; CRC32s are held against the bytes when those are copied.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from converter.dtypes import DType
from converter.errors import BadFile, HostileFile, Unsupported
from converter.formats.pickle_machine import MAX_PICKLE_NBYTES
from converter.formats.torch_pickle import StorageRef, TensorRef, parse_pickle
from converter.tensors import ByteRange, TensorInfo, WeightsFile

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # APPNOTE.TXT 4.3.7
_ENCRYPTED = 0x1
_DAMAGED = "The file is damaged: fetch it again."
_INCOMPLETE = "The file is incomplete: fetch it again."


def read_file(path: Path) -> WeightsFile:
    """Open an archive and read its directory and its pickle; no storage is read."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            root = _find_root(records, path)
            ranges = dict(_record_ranges(file, records, archive.start_dir, path))
            notes = {name.removeprefix(root): place for name, place in ranges.items() if name.startswith(root)}
            pickle = _read_small(file, notes["data.pkl"], MAX_PICKLE_NBYTES)
            byteorder = _read_small(file, notes["byteorder"], 16) if "byteorder" in notes else b"little"
    except (zipfile.BadZipFile, struct.error, UnicodeDecodeError) as error:
        raise BadFile(path, f"is a torch archive whose directory cannot be read ({error})", _INCOMPLETE) from None
    except NotImplementedError as error:
        raise Unsupported(path, f"is an archive of a kind that torch.save never writes ({error})") from None
    if byteorder.strip() != b"little":
        raise Unsupported(path, "holds big-endian numbers", "Save it again on a little-endian machine.")
    return WeightsFile(path, "torch", tuple(_resolve(parse_pickle(pickle, path), notes, path)), {})


def _find_root(records: list[zipfile.ZipInfo], path: Path) -> str:
    """Give the one root folder, with its slash; the archive's own name says nothing once a file is renamed."""
    names = {record.filename for record in records}
    root = records[0].filename.partition("/")[0] + "/" if records else ""
    if f"{root}constants.pkl" in names:
        raise Unsupported(path, "is a TorchScript archive (code and weights)", "Save its state_dict() with torch.save.")
    if f"{root}data.pkl" not in names:
        raise BadFile(path, "is a zip archive, but not one that torch.save wrote", "If it holds files, unpack it.")
    # Python's zipfile takes a name from an extra field, or cuts it; torch does neither.
    if any(record.filename != record.orig_filename for record in records):
        raise HostileFile(path, "its archive holds a record whose name not all readers see alike")
    if len(names) != len(records):
        raise HostileFile(path, "its archive holds two records of one name")
    return root


def _record_ranges(
    file: BinaryIO, records: list[zipfile.ZipInfo], end: int, path: Path
) -> Iterator[tuple[str, ByteRange]]:
    """Find where each record's bytes lie; refuse what is packed, overlaps, or runs out of the file."""
    place = 0
    for record in sorted(records, key=lambda record: record.header_offset):
        if record.flag_bits & _ENCRYPTED or record.compress_type != zipfile.ZIP_STORED:
            how = "encrypted" if record.flag_bits & _ENCRYPTED else "compressed"
            raise Unsupported(path, f"its record {record.filename} is {how}", "Save it again with torch.save.")
        if not place <= record.header_offset < end or record.compress_size != record.file_size:
            raise HostileFile(path, f"its record {record.filename} overlaps another, or lies outside the archive")
        file.seek(record.header_offset)
        name = _raw_name(record)
        raw = file.read(_LOCAL_HEADER.size + len(name))
        header = _LOCAL_HEADER.unpack_from(raw)
        begin = record.header_offset + _LOCAL_HEADER.size + header[-2] + header[-1]
        same_name = header[-2] == len(name) and raw.endswith(name)
        if header[0] != b"PK\x03\x04" or header[3] != record.compress_type or not same_name:
            raise BadFile(path, f"its directory and the header of its record {record.filename} disagree", _INCOMPLETE)
        place = begin + record.file_size
        if place > end:
            raise BadFile(path, f"its record {record.filename} runs past the end of the archive", _INCOMPLETE)
        # A CRC of 0 means that none was computed (``torch.serialization.set_crc32_options``).
        yield record.filename, ByteRange(path, begin, record.file_size, record.CRC or None)


def _raw_name(record: zipfile.ZipInfo) -> bytes:
    return record.orig_filename.encode("utf-8" if record.flag_bits & 0x800 else "cp437")


def _read_small(file: BinaryIO, place: ByteRange, max_nbytes: int) -> bytes:
    if place.nbytes > max_nbytes:
        raise HostileFile(place.path, f"a record that describes tensors claims {place.nbytes:,} bytes")
    file.seek(place.offset)
    raw = file.read(place.nbytes)
    if place.crc32 is not None and zlib.crc32(raw) != place.crc32:
        raise BadFile(place.path, "the description of its tensors does not give the CRC32 that is noted", _DAMAGED)
    return raw


def _resolve(state_dict: Any, records: dict[str, ByteRange], path: Path) -> Iterator[TensorInfo]:
    if type(state_dict) is not dict:
        raise Unsupported(path, f"holds a {_kind(state_dict)}, not a state dict", "Save its state_dict() instead.")
    dtypes: dict[str, DType] = {}
    for name, value in state_dict.items():
        if type(name) is not str or type(value) is not TensorRef:
            raise Unsupported(
                path,
                f"is no plain state dict: its entry {name!r} is a {_kind(value)}",
                "Save the state dict alone: a dict from names to tensors.",
            )
        storage = value.storage
        if storage.dtype and dtypes.setdefault(storage.key, storage.dtype) is not storage.dtype:
            raise BadFile(path, f"tensor {name!r} takes its storage for another dtype than a tensor before it")
        yield _resolve_tensor(name, value, _find_record(name, storage, records, path), path)


def _find_record(name: str, storage: StorageRef, records: dict[str, ByteRange], path: Path) -> ByteRange:
    if storage.device == "meta":
        raise Unsupported(path, f"tensor {name!r} is on the meta device: it has no values")
    record = records.get(f"data/{storage.key}")
    if record is None:
        raise BadFile(path, f"the record of tensor {name!r} is missing (data/{storage.key})", _INCOMPLETE)
    itemsize = storage.dtype.itemsize if storage.dtype else 1
    if storage.numel * itemsize != record.nbytes:
        raise BadFile(
            path,
            f"the record of tensor {name!r} has {record.nbytes:,} bytes, its storage claims "
            f"{storage.numel * itemsize:,}",
            _INCOMPLETE,
        )
    return record


def _resolve_tensor(name: str, ref: TensorRef, record: ByteRange, path: Path) -> TensorInfo:
    info = TensorInfo(name, ref.dtype, ref.shape, record, ref.start, ref.strides)
    end = (ref.start + info.span) * ref.dtype.bits if info.numel else 0
    if end > record.nbytes * 8 or info.numel >= 1 << 63:
        raise BadFile(path, f"tensor {name!r} reaches past the end of its record")
    return info


def _kind(value: Any) -> str:
    kinds = {TensorRef: "tensor", type(None): "None"}
    return kinds.get(type(value), type(value).__name__)

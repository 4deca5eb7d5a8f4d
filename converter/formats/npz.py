"""Archives of numpy (``np.savez``): a zip whose records are each a whole ``.npy`` file, a header and an array.

The header is read by its fixed spelling and never evaluated, as numpy does with it (``numpy/lib/_format_impl.py``).
An array is a byte range of the archive, or one that is inflated as it is read (``np.savez_compressed``); those of
Python objects are pickles, and refused.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import prod
from typing import NamedTuple

from zlib_ng.zlib_ng import crc32_combine

from converter.dtypes import DTYPES, DType
from converter.errors import BadFile, Unsupported, name_some
from converter.formats.torch.state_dict import Reading
from converter.formats.zip_records import DEFLATED, Record, read_records, spell
from converter.storage import OpenFile, Place
from converter.tensors.base import MAX_DIMS, ByteRange, PackedRange, Storage, Tensor, TensorSource, WeightsFile
from converter.tensors.derived import Swapped
from converter.tensors.view import View, contiguous_strides

_SUFFIX = b".npy"
_MAGIC = b"\x93NUMPY"
_LENGTH_NBYTES = {1: 2, 2: 4, 3: 4}  # of the number that says how long the description is, by the format's version
_HEAD_NBYTES = 4_000  # of a plain array 128; only what has named fields has a longer one
_PLAIN = re.compile(
    rb"\{'descr': '([<>|])([a-zA-Z?])(\d{0,4})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,19}L?, ?)*(?:\d{1,19}L?)?)\),? *\} *\n?"
)
_TAGS = {"f": "F", "i": "I", "u": "U", "c": "C", "b": "BOOL"}
_OBJECTS = "is of Python objects, which only running its pickle makes"
_DAMAGED = "The file is damaged: fetch it again."
_MAX_NAMED = 8


class _Array(NamedTuple):
    """What the header of an array says; ``skipped`` bytes are before its own."""

    dtype: DType
    is_big: bool
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    skipped: int

    @property
    def nbytes(self) -> int:
        return self.dtype.nbytes(prod(self.shape))


def read_file(file: OpenFile, reading: Reading) -> WeightsFile:
    """Read which arrays an archive holds, and where; no array is read."""
    place = file.ref.place
    records = [record for record in read_records(file) if record.nbytes or record.name.endswith(_SUFFIX)]
    arrays = [record for record in records if record.name.endswith(_SUFFIX)]
    tensors: list[Tensor] = []
    unreadable: dict[str, str] = {}
    for record, raw in zip(arrays, _read_heads(file, arrays), strict=True):
        name = _name_of(record, place)
        array = _parse(raw, name, place)
        if isinstance(array, str):
            unreadable[name] = array
        else:
            tensors.append(Tensor(name, _source_of(array, record, raw, file, name)))
    if unreadable and not reading.skip_unreadable:
        name, why = next(iter(unreadable.items()))
        advice = "Save it as a plain array; 'wconv to-safetensors --skip-unreadable' leaves such arrays out."
        raise Unsupported(place, f"array {name!r} {why}", advice)
    return WeightsFile(place, "npz", tuple(tensors), {}, tuple(_notes(records, unreadable)))


def _notes(records: Sequence[Record], unreadable: dict[str, str]) -> Iterator[str]:
    others = [spell(record.name) for record in records if not record.name.endswith(_SUFFIX)]
    if others:
        yield f"left out: {name_some(others, _MAX_NAMED)}"
    if unreadable:
        named = [f"{name} ({why})" for name, why in unreadable.items()]
        yield f"arrays that cannot be read are left out ({len(named):,} in all): {name_some(named, _MAX_NAMED)}"


def _name_of(record: Record, place: Place) -> str:
    try:
        return record.name.removesuffix(_SUFFIX).decode()
    except UnicodeDecodeError:
        raise BadFile(place, f"names an array {spell(record.name)}, which is no text", _DAMAGED) from None


def _read_heads(file: OpenFile, records: Sequence[Record]) -> Iterator[bytes]:
    """Give what each array begins with, unpacked."""
    heads = file.read_many((record.offset, min(record.packed_nbytes, _HEAD_NBYTES)) for record in records)
    for record, raw in zip(records, heads, strict=True):
        if record.method not in (0, DEFLATED):
            raise Unsupported(file.ref.place, f"its record {spell(record.name)} is packed in another way than numpy's")
        try:
            yield zlib.decompressobj(-zlib.MAX_WBITS).decompress(raw, _HEAD_NBYTES) if record.method else raw
        except zlib.error:
            raise BadFile(file.ref.place, f"its record {spell(record.name)} does not unpack", _DAMAGED) from None


def _parse(raw: bytes, name: str, place: Place) -> _Array | str:
    """Read what an array begins with; of one that is no tensor's give why."""
    length_nbytes = _LENGTH_NBYTES.get(raw[6]) if raw.startswith(_MAGIC) and len(raw) > 8 else None
    if length_nbytes is None:
        raise BadFile(place, f"array {name!r} has not the header of one", _DAMAGED)
    begin = 8 + length_nbytes
    skipped = begin + int.from_bytes(raw[8:begin], "little")
    text = raw[begin:skipped]
    if text.startswith(b"{'descr': ["):
        return "has fields, and is no tensor"
    match = _PLAIN.fullmatch(text)
    if not match or len(raw) < skipped:
        raise BadFile(place, f"array {name!r} has a header that does not describe one", _DAMAGED)
    order, kind, width = (part.decode() for part in match.groups()[:3])
    if kind == "O":
        return _OBJECTS
    bits = 8 * int(width or "0")
    dtype = DTYPES.get(_TAGS[kind] if kind == "b" else f"{_TAGS.get(kind)}{bits}")
    if dtype is None or dtype.bits != bits:
        return f"is of the dtype {order}{kind}{width}, which safetensors does not have"
    shape = tuple(int(length) for length in re.findall(rb"\d+", match[5]))
    if len(shape) > MAX_DIMS or prod(length or 1 for length in shape) >= 1 << 63:
        raise BadFile(place, f"array {name!r} has a shape beyond numpy's", _DAMAGED)
    is_fortran = match[4] == b"True"
    strides = tuple(accumulate((1, *shape[:-1]), lambda a, b: a * b)) if is_fortran else contiguous_strides(shape)
    return _Array(dtype, order == ">" and bits > 8, shape, strides if shape else (), skipped)


def _source_of(array: _Array, record: Record, raw: bytes, file: OpenFile, name: str) -> TensorSource:
    """Give the view of its record that an array is."""
    place = file.ref.place
    if array.skipped + array.nbytes != record.nbytes:
        problem = f"array {name!r} has {record.nbytes - array.skipped:,} bytes, and its header claims {array.nbytes:,}"
        raise BadFile(place, problem, _DAMAGED)
    offset, start = file.begin + record.offset, 0
    storage: Storage
    if record.method == DEFLATED:
        start, beyond = divmod(array.skipped, array.dtype.itemsize)
        if beyond:
            raise Unsupported(place, f"array {name!r} is packed and not aligned", "Save it again with numpy.")
        storage = PackedRange(file.ref, offset, record.nbytes, record.crc32, record.packed_nbytes)
    else:
        # That of both parts is that of the first, moved on by zeros in place of the second, and that of the second.
        crc = record.crc32 ^ crc32_combine(zlib.crc32(raw[: array.skipped]), 0, array.nbytes)
        storage = ByteRange(file.ref, offset + array.skipped, array.nbytes, crc)
    view = View(array.dtype, array.shape, storage, start, array.strides)
    if not array.is_big:
        return view
    return Swapped(view, array.dtype.itemsize // (2 if array.dtype.tag == "C64" else 1))

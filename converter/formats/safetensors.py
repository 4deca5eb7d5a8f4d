"""The safetensors format: header bytes to Tensors and back.

The file is an 8-byte little-endian length, that much JSON, and the data. Reading is as strict as the reference reader
(``Metadata::validate`` in its ``safetensors/src/tensor.rs``) and stricter where two readers could disagree: a name
given twice is refused. Writing gives the bytes that ``safetensors.torch.save_file`` gives for the same tensors:
largest alignment first, then by name, compact JSON, padded with blanks to 8 bytes; metadata is sorted.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from converter.dtypes import DTYPES
from converter.errors import BadFile, HostileFile, Unsupported
from converter.formats.texts import MAX_HEADER_MARKS, Pairs, parse_json
from converter.storage import FileRef, OpenFile, Place
from converter.tensors.base import (
    MAX_DIMS,
    MAX_NAME,
    MAX_TENSORS,
    ByteRange,
    Layout,
    Tensor,
    TensorSpec,
    WeightsFile,
    remembered,
)
from converter.tensors.view import View, contiguous_strides

MAX_HEADER_NBYTES = 100_000_000  # same cap as the reference reader
METADATA_KEY = "__metadata__"
_MAX_METADATA = 20_000_000  # trainers' notes, and a picture: some MB at the most
# The reference reader counts elements in 64 bits, and refuses what overflows on the way; torch counts strides in 63.
_TOO_LARGE = 1 << 63
_INCOMPLETE = "The file may be incomplete: fetch it again."


def read_file(file: OpenFile) -> WeightsFile:
    """Read the header of a safetensors file; no tensor is read."""
    head = file.read(0, 8)
    header_nbytes = int.from_bytes(head, "little")
    if len(head) < 8 or header_nbytes > min(MAX_HEADER_NBYTES, file.nbytes - 8):
        problem = f"its header claims {header_nbytes:,} bytes, the file has {file.nbytes:,}"
        raise BadFile(file.ref.place, problem, _INCOMPLETE)
    return parse_header(file.read(8, header_nbytes), file.nbytes, file.ref)


def parse_header(raw: bytes, file_nbytes: int, file: FileRef) -> WeightsFile:
    """Parse the JSON of a header; refuse gaps, overlaps, bytes left over, and names given twice."""
    place = file.place
    try:
        header = parse_json(raw, place, "its header ", max_marks=MAX_HEADER_MARKS, pairs_hook=_refuse_repeats)
    except ValueError as error:
        raise BadFile(place, f"its safetensors header cannot be read ({error})", _INCOMPLETE) from None
    if not isinstance(header, dict):
        raise BadFile(place, "its safetensors header is no JSON object")
    metadata = header.pop(METADATA_KEY, None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadFile(place, "the __metadata__ of its header is not a map of strings")
    _check_sizes(header, metadata, place)
    if b"\\u" in raw and not all(map(_is_text, itertools.chain(header, metadata, metadata.values()))):
        raise BadFile(place, "its header spells a name with half a character")
    data_offset = 8 + len(raw)
    # Each entry goes as its tensor comes: the one takes the other's memory.
    tensors = [_parse_tensor(name, header.pop(name), data_offset, file) for name in list(header)]
    _check_layout(tensors, data_offset, file_nbytes, place)
    return WeightsFile(place, "safetensors", tuple(tensors), metadata, data_nbytes=file_nbytes - data_offset)


def _check_sizes(header: Collection[str], metadata: Mapping[str, str], place: Place) -> None:
    """Refuse more than a header can be parsed with and a new one made of, in 512 MB."""
    if len(header) > MAX_TENSORS or len(metadata) > MAX_TENSORS:
        raise HostileFile(place, f"its header describes more than {MAX_TENSORS:,} tensors")
    longest = max(map(len, header), default=0)
    if longest > MAX_NAME:
        raise HostileFile(place, f"its header spells a name in {longest:,} characters")
    if sum(map(len, itertools.chain(metadata, metadata.values()))) > _MAX_METADATA:
        raise HostileFile(place, f"the __metadata__ of its header is longer than {_MAX_METADATA:,} characters")


def _parse_tensor(name: str, entry: Any, data_offset: int, file: FileRef) -> Tensor:
    try:
        tag, sizes, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        shape = tuple(sizes)
    except (KeyError, TypeError, ValueError):
        raise BadFile(file.place, f"its header describes {name!r} wrongly") from None
    if len(shape) > MAX_DIMS:
        raise HostileFile(file.place, f"its header gives {name!r} {len(shape):,} axes")
    are_whole = type(sizes) is list and type(begin) is type(end) is int
    # A plain loop: this is done for each tensor, and any() over a generator takes three times as long.
    for number in shape:
        are_whole = are_whole and type(number) is int and number >= 0
    if not are_whole:
        raise BadFile(file.place, f"its header gives {name!r} a shape or place that is no whole number")
    shape, numel, span, strides = _measure(shape)
    if span >= _TOO_LARGE:
        raise BadFile(file.place, f"its header gives {name!r} more elements than 63 bits count")
    dtype = DTYPES.get(tag) if isinstance(tag, str) else None
    if dtype is None:
        raise Unsupported(file.place, f"tensor {name!r} has the unknown dtype {tag!r}", "A newer wconv may know it.")
    bits = numel * dtype.bits
    if bits >= _TOO_LARGE or end - begin != bits // 8 or bits % 8:
        problem = f"tensor {name!r} has {end - begin:,} bytes, its shape {list(shape)} takes {bits // 8:,}"
        raise BadFile(file.place, problem)
    storage = ByteRange(file, data_offset + begin, end - begin)
    return Tensor(name, View(dtype, shape, storage, 0, strides))


@remembered
def _measure(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, int, tuple[int, ...]]:
    """Give a shape, its elements, the same as if no axis were empty, and the strides, which grow to that."""
    return shape, math.prod(shape), math.prod(length or 1 for length in shape), contiguous_strides(shape)


def _check_layout(tensors: Iterable[Tensor], data_offset: int, file_nbytes: int, place: Place) -> None:
    end = data_offset
    for offset, nbytes, name in sorted(_places_of(tensors)):
        if offset != end:
            raise BadFile(place, f"tensor {name!r} leaves a gap, or overlaps another")
        end += nbytes
    if end != file_nbytes:
        raise BadFile(place, f"its tensors end at byte {end:,}, the file has {file_nbytes:,}", _INCOMPLETE)


def _places_of(tensors: Iterable[Tensor]) -> list[tuple[int, int, str]]:
    return [(storage.offset, storage.nbytes, name) for name, source, _ in tensors for storage in source.inputs()]


def lay_out(tensors: Sequence[TensorSpec], ties: Mapping[str, str], notes: Mapping[str, str]) -> Layout:
    """Lay tensors out as the reference writer does (``prepare`` in its ``tensor.rs``); ties are noted in the header.

    Raises ValueError for a name that it cannot hold.
    """
    order = sorted(range(len(tensors)), key=lambda place: (tensors[place][1].rank, tensors[place][0]))
    header = build_header([tensors[place] for place in order], {**notes, **ties, "format": "pt"})
    sizes = (_describe(dtype.tag, shape)[1] for _, dtype, shape in (tensors[place] for place in order))
    *offsets, nbytes = itertools.accumulate(sizes, initial=len(header))
    return Layout(header, tuple(order), tuple(offsets), nbytes)


def build_header(tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Spell the header, length included, of a file that holds these tensors in this order; raises ValueError."""
    if not all(map(_is_text, itertools.chain(metadata, metadata.values()))):
        raise ValueError("has ties or notes with a name of half a character, which no safetensors file can hold")
    parts = [f'"{METADATA_KEY}":{_spell(dict(sorted(metadata.items())))}'] if metadata else []
    end = 0
    for name, dtype, shape in tensors:
        if name == METADATA_KEY or not _is_text(name):
            raise ValueError(f"holds a tensor named {name!r}, which no safetensors file can hold")
        if len(name) > MAX_NAME:
            raise ValueError(f"holds a tensor with a name of {len(name):,} characters, and {MAX_NAME:,} may be")
        described, nbytes = _describe(dtype.tag, shape)
        begin, end = end, end + nbytes
        # One json.dumps of all of it takes three times as long.
        parts.append(f"{_spell_text(name)}:{{{described}[{begin},{end}]}}")
    raw = ",".join(parts).encode()
    parts.clear()  # as long as the header is, and more
    padding = -(len(raw) + 2) % 8
    header_nbytes = len(raw) + 2 + padding
    if header_nbytes > MAX_HEADER_NBYTES:
        raise ValueError(
            f"needs a header of {header_nbytes:,} bytes, and {MAX_HEADER_NBYTES:,} may be",
            "Write shards: --max-shard-size.",
        )
    return b"".join((header_nbytes.to_bytes(8, "little"), b"{", raw, b"}", b" " * padding))


_spell = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_spell_text = json.encoder.encode_basestring  # as the encoder spells a text


@remembered
def _describe(tag: str, shape: tuple[int, ...]) -> tuple[str, int]:
    """Spell what a header says of a tensor between its name and its place, and give its bytes."""
    sizes = ",".join(map(str, shape))
    return f'"dtype":"{tag}","shape":[{sizes}],"data_offsets":', DTYPES[tag].nbytes(math.prod(shape))


def _is_text(name: str) -> bool:
    return name.isascii() or not any("\ud800" <= char <= "\udfff" for char in name)


def _refuse_repeats(pairs: Pairs) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("it names something twice")
    return content

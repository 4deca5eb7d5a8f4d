"""Checkpoints of ``torch.distributed.checkpoint`` in safetensors: each file holds the boxes that one rank has written.

A box lies under the name of the whole tensor; where it begins is in ``DCP_SHARDING_INFO`` of the header, and how large
the whole is follows from all boxes (``HuggingFaceStorageReader.read_metadata`` in ``checkpoint/hf_storage.py``).
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from converter.errors import BadFile, Unsupported
from converter.formats import safetensors
from converter.formats.texts import parse_json
from converter.formats.torch.state_dict import Reading
from converter.formats.trained.boxes import put_together
from converter.formats.trained.pieces import DCP_INFO, DCP_SHARD
from converter.storage import OpenFile, Place, list_entries, natural_key
from converter.storage.far import look_at_each
from converter.tensors.base import Tensor, TensorSource, WeightsFile
from converter.tensors.derived import Box

_DAMAGED = "The checkpoint is damaged or incomplete: fetch all of its files again."


def read_file(file: OpenFile, reading: Reading) -> WeightsFile:
    """Read the headers of all ranks' files, of which one is given; no tensor is read."""
    place = file.ref.place
    if not place.store.lists_all:
        raise Unsupported(place, "is one of several files, and a web server does not list them", "Fetch all of them.")
    names = [entry.name for entry in list_entries(place.parent)]
    ranks = {name: int(match["rank"]) for name in names if (match := re.fullmatch(DCP_SHARD, name))}
    missing = sorted(set(range(1, max(ranks.values()) + 1)) - set(ranks.values()))
    if missing:
        problem = f"has files of ranks up to {max(ranks.values())}, and none of rank {missing[0]}"
        raise BadFile(place.parent, problem, _DAMAGED)
    boxes: dict[str, list[Box]] = defaultdict(list)
    for one in look_at_each(_read, [place.parent / name for name in sorted(ranks, key=natural_key)]):
        starts = _starts_in(one)
        for name, source, _ in one.tensors:
            boxes[name].append(Box(_start_of(starts, name, source, one.place), source))
    tensors = tuple(Tensor(name, _join(place, name, of_one)) for name, of_one in boxes.items())
    note = f"put together from {len(ranks):,} files; none says how many there were"
    return WeightsFile(place, "DCP in safetensors", tensors, {}, (note,))


def _read(place: Place) -> WeightsFile:
    with place.open() as file:
        return safetensors.read_file(file)


def _starts_in(file: WeightsFile) -> dict[str, Any]:
    if DCP_INFO not in file.metadata:
        raise BadFile(file.place, f"has no {DCP_INFO} in its header, which its name promises", _DAMAGED)
    try:
        starts = parse_json(file.metadata[DCP_INFO].encode(), file.place, f"its {DCP_INFO} ")
    except ValueError as error:
        raise BadFile(file.place, f"its {DCP_INFO} cannot be read ({error})", _DAMAGED) from None
    if not isinstance(starts, dict):
        raise BadFile(file.place, f"its {DCP_INFO} is no JSON object", _DAMAGED)
    return starts


def _start_of(starts: dict[str, Any], name: str, source: TensorSource, place: Place) -> tuple[int, ...]:
    entry = starts.get(name)
    start = entry.get("saved_offsets") if isinstance(entry, dict) else None
    start = start if isinstance(start, list) and len(start) == len(source.shape) else [None]
    if not all(type(at) is int and 0 <= at < 1 << 63 for at in start):
        raise BadFile(place, f"its {DCP_INFO} does not say where its part of {name!r} begins", _DAMAGED)
    return tuple(start)


def _join(place: Place, name: str, boxes: list[Box]) -> TensorSource:
    first = boxes[0].source
    if any(len(box.start) != len(boxes[0].start) for box in boxes):
        raise BadFile(place.parent, f"has parts of {name!r} with other numbers of axes", _DAMAGED)
    # What has no elements may begin beyond the end.
    held = [box for box in boxes if 0 not in box.source.shape]
    ends = (map(sum, zip(start, source.shape, strict=True)) for start, source in held or boxes[:1])
    shape = tuple(map(max, zip(*ends, strict=True)))
    return put_together(name, first.dtype, shape, held, place.parent, _DAMAGED)

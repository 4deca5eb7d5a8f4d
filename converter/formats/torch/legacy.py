"""The stream of pickles that ``torch.save`` wrote before 1.6, and still writes on request.

It is a magic number, a protocol number, a few facts on the machine, the object, a list of storage keys, each a pickle;
then, for each key, the storage's number of elements in 8 bytes and its bytes (``_legacy_save`` in
``torch/serialization.py``). So a storage is a byte range of the file here too, though nothing guards it: there are no
checksums. Numbers are little-endian whatever the facts say (``THPStorage_writeFileRaw``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from converter.errors import BadFile, HostileFile
from converter.formats.torch.rebuild import MAX_STORAGES, StorageRef, parse_pickle
from converter.formats.torch.state_dict import Reading, choose_state_dict, resolve
from converter.formats.torch.unpickler import FREE_NBYTES, MAX_PICKLE_NBYTES, Pickled, Steps, allow_steps
from converter.storage.opening import Opened
from converter.tensors.base import ByteRange, WeightsFile

MAGIC = 0x1950A86A20F9469CFC6C
_LONG = b"\x8a\x0a" + MAGIC.to_bytes(10, "little")
_FRAME = b"\x95\x0d" + bytes(7)

# The magic number as each protocol spells it, from 0 on; torch itself loads what names storages, from 1 on.
HEADS = (b"L%dL\n." % MAGIC, b"\x80\x02" + _LONG, b"\x80\x03" + _LONG,
         b"\x80\x04" + _FRAME + _LONG, b"\x80\x05" + _FRAME + _LONG)  # fmt: skip
_PROTOCOL = 1001
_FIRST_NBYTES = 1 << 16
_DAMAGED = "The file is damaged or incomplete: fetch it again."


def read_file(opened: Opened, reading: Reading) -> WeightsFile:
    """Read the pickles of a stream, and where its storages lie; no storage is read."""
    path, file, _ = opened
    steps = allow_steps()
    magic, protocol, facts = (_read_pickle(file, path, reading, steps).value for _ in range(3))
    if magic != MAGIC or protocol != _PROTOCOL or not isinstance(facts, dict):
        raise BadFile(path, "is a pickle, but not one that torch.save wrote", "Save its state dict with torch.save.")
    storages: dict[str, StorageRef] = {}
    pickled = _read_pickle(file, path, reading, steps, storages)
    keys = _read_pickle(file, path, reading, steps).value
    if type(keys) is not list:
        raise BadFile(path, "has no list of its storages", _DAMAGED)
    if len(keys) > MAX_STORAGES:
        raise HostileFile(path, f"lists more than {MAX_STORAGES:,} storages")
    ranges = dict(_find_storages(opened, keys, storages))
    state_dict, notes = choose_state_dict(pickled, path, reading)
    tensors = tuple(resolve(state_dict, lambda storage: ranges.get(storage.key), path))
    return WeightsFile(path, "torch", tensors, {}, notes, pickled.foreign)


def _read_pickle(
    file: BinaryIO, path: Path, reading: Reading, steps: Steps, storages: dict[str, StorageRef] | None = None
) -> Pickled:
    """Read the pickle that comes next; how long it is shows only when it is read."""
    place = file.tell()
    nbytes = _FIRST_NBYTES
    while True:
        file.seek(place)
        raw = file.read(nbytes)
        try:
            pickled = parse_pickle(raw, path, reading.strip_code, storages, steps)
        except BadFile as error:
            if len(raw) < nbytes or isinstance(error, HostileFile):
                raise
            if nbytes == MAX_PICKLE_NBYTES:
                raise HostileFile(path, "its pickle is too long for a description of tensors") from None
            nbytes = FREE_NBYTES if nbytes < FREE_NBYTES else MAX_PICKLE_NBYTES  # few tries: the steps of each count
            if storages:
                storages.clear()
        else:
            file.seek(place + pickled.nbytes)
            return pickled


def _find_storages(
    opened: Opened, keys: list[Any], storages: Mapping[str, StorageRef]
) -> Iterator[tuple[str, ByteRange]]:
    path, file, stamp = opened
    place = file.tell()
    for key in keys:
        storage = storages.get(key) if type(key) is str else None
        if storage is None:
            raise BadFile(path, "lists a storage that it does not describe", _DAMAGED)
        file.seek(place)
        numel = int.from_bytes(file.read(8), "little")
        if numel != storage.numel or place + 8 + storage.nbytes > stamp.nbytes:
            raise BadFile(path, f"its storage {key} is cut short, or is not where it should be", _DAMAGED)
        yield key, ByteRange(path, place + 8, storage.nbytes, stamp=stamp)
        place += 8 + storage.nbytes

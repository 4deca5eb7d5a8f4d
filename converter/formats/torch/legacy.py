"""The stream of pickles that ``torch.save`` wrote before 1.6, and still writes on request.

It is a magic number, a protocol number, a few facts on the machine, the object, a list of storage keys, each a pickle;
then, for each key, the storage's number of elements in 8 bytes and its bytes (``_legacy_save`` in
``torch/serialization.py``). So a storage is a byte range of the file here too, though nothing guards it: there are no
checksums. Numbers are little-endian whatever the facts say (``THPStorage_writeFileRaw``). Those of a file that is far
would take a request each, and are looked at when the storages are read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from converter.errors import BadFile, HostileFile
from converter.formats.torch.content import Content
from converter.formats.torch.rebuild import MAX_STORAGES, StorageRef, parse_pickle
from converter.formats.torch.unpickler import FREE_NBYTES, MAX_PICKLE_NBYTES, Pickled, allow_steps
from converter.storage import OpenFile
from converter.tensors.base import ByteRange
from converter.tensors.leads import COUNT_NBYTES

MAGIC = 0x1950A86A20F9469CFC6C
_LONG = b"\x8a\x0a" + MAGIC.to_bytes(10, "little")
_FRAME = b"\x95\x0d" + bytes(7)

# The magic number as each protocol spells it, from 0 on; torch itself loads what names storages, from 1 on.
HEADS = (b"L%dL\n." % MAGIC, b"\x80\x02" + _LONG, b"\x80\x03" + _LONG,
         b"\x80\x04" + _FRAME + _LONG, b"\x80\x05" + _FRAME + _LONG)  # fmt: skip
_PROTOCOL = 1001
_FIRST_NBYTES = 1 << 16
_DAMAGED = "The file is damaged or incomplete: fetch it again."


def open_content(file: OpenFile, strip_code: bool) -> Content:
    """Read the pickles of a stream, and where its storages lie; no storage is read."""
    place = file.ref.place
    file.keep(0, 2 * _FIRST_NBYTES)
    pickles = _Pickles(file, strip_code)
    magic, protocol, facts = (pickles.read().value for _ in range(3))
    if magic != MAGIC or protocol != _PROTOCOL or not isinstance(facts, dict):
        raise BadFile(place, "is a pickle, but not one that torch.save wrote", "Save its state dict with torch.save.")
    storages: dict[str, StorageRef] = {}
    pickled = pickles.read(storages)
    keys = pickles.read().value
    if type(keys) is not list:
        raise BadFile(place, "has no list of its storages", _DAMAGED)
    if len(keys) > MAX_STORAGES:
        raise HostileFile(place, f"lists more than {MAX_STORAGES:,} storages")
    ranges = dict(_find_storages(file, pickles.offset, keys, storages))
    return Content(file.ref, pickled, lambda storage: ranges.get(storage.key))


class _Pickles:
    """Reads pickles that follow each other; ``offset`` is where the next one begins."""

    def __init__(self, file: OpenFile, strip_code: bool) -> None:
        self.file = file
        self.strip_code = strip_code
        self.steps = allow_steps()
        self.offset = 0

    def read(self, storages: dict[str, StorageRef] | None = None) -> Pickled:
        """Read the pickle that comes next; how long it is shows only when it is read."""
        place = self.file.ref.place
        nbytes = _FIRST_NBYTES
        while True:
            raw = self.file.read(self.offset, nbytes)
            try:
                pickled = parse_pickle(raw, place, self.strip_code, storages, self.steps)
            except BadFile as error:
                if len(raw) < nbytes or isinstance(error, HostileFile):
                    raise
                if nbytes == MAX_PICKLE_NBYTES:
                    raise HostileFile(place, "its pickle is too long for a description of tensors") from None
                # Few tries: the steps of each count.
                nbytes = FREE_NBYTES if nbytes < FREE_NBYTES else MAX_PICKLE_NBYTES
                if storages:
                    storages.clear()
            else:
                self.offset += pickled.nbytes
                return pickled


def _find_storages(
    file: OpenFile, begin: int, keys: Sequence[Any], storages: Mapping[str, StorageRef]
) -> Iterator[tuple[str, ByteRange]]:
    listed = [storages.get(key) if type(key) is str else None for key in keys]
    lengths = (COUNT_NBYTES + storage.nbytes if storage else 0 for storage in listed)
    *offsets, end = itertools.accumulate(lengths, initial=begin)
    # Each lies behind another, so where the last one ends with the file, all can only be where they should.
    is_known = file.is_far and end == file.nbytes
    leads = [COUNT_NBYTES if is_known and file.kept(offset, COUNT_NBYTES) is None else 0 for offset in offsets]
    counts = file.read_many((offset, COUNT_NBYTES) for offset, lead in zip(offsets, leads, strict=True) if not lead)
    for key, storage, offset, lead in zip(keys, listed, offsets, leads, strict=True):
        if storage is None:
            raise BadFile(file.ref.place, "lists a storage that it does not describe", _DAMAGED)
        numel = storage.numel if lead else int.from_bytes(next(counts), "little")
        if numel != storage.numel or offset + COUNT_NBYTES + storage.nbytes > file.nbytes:
            problem = f"its storage {key} is cut short, or is not where it should be"
            raise BadFile(file.ref.place, problem, _DAMAGED)
        yield key, ByteRange(file.ref, offset + COUNT_NBYTES, storage.nbytes, None, lead)

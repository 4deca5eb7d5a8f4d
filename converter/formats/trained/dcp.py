"""Checkpoints of ``torch.distributed.checkpoint`` (DCP): ``.metadata`` says which boxes of which tensors lie where.

``.metadata`` is a pickle of ``Metadata`` (``torch/distributed/checkpoint/metadata.py``), written last; each box is a
whole file of ``torch.save`` within a ``.distcp`` file (``_write_item`` in ``checkpoint/filesystem.py``). torch's own
reader runs both: ``FileSystemReader.read_metadata`` is ``pickle.load``. Here neither is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from converter.dtypes import DTYPES, DType
from converter.errors import BadFile, HostileFile, Unsupported, Where
from converter.formats.torch.archive import open_content
from converter.formats.torch.rebuild import (
    Left,
    Listed,
    TensorRef,
    checked,
    of_other_dtype,
    parse_metadata,
    parse_pickle,
    shape_of,
    size_of,
)
from converter.formats.torch.state_dict import Reading, choose_state_dict, is_training_key
from converter.formats.torch.unpickler import MAX_PICKLE_NBYTES, KeptObject, Pickled, allow_steps
from converter.formats.trained.boxes import put_together, spell
from converter.storage import OpenFile, Place, Window, is_bare
from converter.tensors.base import MAX_NAME, Tensor, TensorSource, WeightsFile
from converter.tensors.derived import Box

_METADATA = "torch.distributed.checkpoint.metadata.Metadata"
_INDEX = "torch.distributed.checkpoint.metadata.MetadataIndex"
_CHUNK = "torch.distributed.checkpoint.metadata.ChunkStorageMetadata"
_STORED = "torch.distributed.checkpoint.filesystem._StorageInfo"
# What is kept of each object that there is for each box.
_FIELDS = {
    _INDEX: ("fqn", "offset"),
    _CHUNK: ("offsets", "sizes"),
    _STORED: ("relative_path", "offset", "length", "transform_descriptors"),
}
# Of boxes of all tensors, and of names: a model of 70B, with Adam, on 64 ranks has 139,000 boxes. Each is a file of
# 1,500 bytes at least.
_MAX_BOXES = 400_000
_MAX_NAMED = 8
_MAX_PICKLE_NBYTES = 1 << 14  # of one tensor, which takes 300
_MAX_STEPS = 20_000_000  # of all such that differ: 350 each
_MAX_KNOWN_NBYTES = 1 << 10  # of those that are not read again, and how many
_MAX_KNOWN = 10_000
_HEAD_NBYTES = 1 << 11
_TAIL_NBYTES = 1 << 12
_PATHS = "pathlib."  # of where the checkpoint was written, which is no concern of anyone's
_MAX_DEPTH = 16  # of the path of a tensor; as deep as a state dict is looked for
_RESAVE = "torch cannot read it either: save it again without serialization_format=SAFETENSORS."
_DAMAGED = "The checkpoint is damaged: fetch .metadata again."
_INCOMPLETE = "The checkpoint is incomplete: fetch its .distcp files again."


class _Item(NamedTuple):
    """Where a box lies: a file, and the bytes of it."""

    file_name: str
    offset: int
    nbytes: int


_Key = tuple[str, str]
"""A tensor by its name, and where one of its boxes begins: of numbers a file could choose such as all hash alike."""

_Cut = tuple[_Key, tuple[int, ...], tuple[int, ...]]
"""A box of a tensor: its key, where it begins, and its shape."""


def read_file(file: OpenFile, reading: Reading) -> WeightsFile:
    """Read which tensors a checkpoint holds, and where each box of those that are taken lies."""
    place = file.ref.place
    pickled = parse_metadata(file.read(0, MAX_PICKLE_NBYTES + 1), place, reading.strip_code, _FIELDS)
    try:
        listed = _Listing(place, pickled.value)
        others = {name: how for name, how in pickled.foreign.items() if not name.startswith(_PATHS)}
        pickled = pickled._replace(value=listed.tree(), foreign=others)
        state_dict, notes, foreign = choose_state_dict(pickled, place, reading)
        tensors = tuple(listed.take(state_dict))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadFile(place, "does not describe a checkpoint as torch.distributed.checkpoint does", _DAMAGED) from error
    return WeightsFile(place, "DCP", tensors, {}, notes, foreign)


class _Listing:
    """What ``.metadata`` says. Where that is nothing, its methods raise what ``read_file`` catches."""

    def __init__(self, place: Place, metadata: Any) -> None:
        if type(metadata) is not KeptObject or metadata.name != _METADATA:
            raise TypeError("metadata of another kind")
        state = metadata.state
        self.place = place
        self.tensors: Mapping[str, Any] = checked(state["state_dict_metadata"], dict)
        self.paths: Mapping[str, Any] = state.get("planner_data") or {}
        self.items: dict[_Key, _Item] = {}
        self.left_nbytes: dict[str, int] = defaultdict(int)  # of what is no tensor, by name
        self.parsed: dict[bytes, Pickled] = {}
        self.steps = allow_steps(_MAX_STEPS)
        stored = checked(state["storage_data"], dict)
        self._check_count(len(stored))
        while stored:  # each goes as its item comes: the one takes the other's memory
            self._add_item(*stored.popitem())

    def _check_count(self, count: int) -> None:
        if count > _MAX_BOXES:
            raise HostileFile(self.place, f"describes {count:,} parts of tensors or more")

    def _name(self, name: Any) -> str:
        """Give a name that is one. Raises TypeError for what is no text."""
        if len(checked(name, str)) > MAX_NAME:
            raise HostileFile(self.place, f"holds a name of {len(name):,} characters")
        return str(name)

    def _add_item(self, key: Any, stored: Any) -> None:
        name, begin = _fields_of(key, _INDEX)
        file_name, offset, nbytes, packed = _fields_of(stored, _STORED)
        self._name(name)
        if not is_bare(self._name(file_name)):
            raise HostileFile(self.place, f"says that {name!r} lies in {file_name!r}, which is no name of a file")
        if packed:
            problem = f"says that {name!r} is packed ({_spelled(packed)})"
            raise Unsupported(self.place, problem, "Save it again without extensions of the writer.")
        if begin is None:
            self.left_nbytes[name] = size_of(nbytes)
            return
        key = name, str(shape_of(begin))
        if key in self.items:
            raise BadFile(self.place, f"says twice where {name!r} lies", _DAMAGED)
        self.items[key] = _Item(file_name, size_of(offset), size_of(nbytes))

    def tree(self) -> dict[str, Any]:
        """Give the dicts that were saved, with a Listed for each tensor."""
        tree: dict[str, Any] = {}
        parts = folders = 0
        for name, told in self.tensors.items():
            *path, last = self._path_of(self._name(name))
            inner = tree
            for step in path:
                if type(inner) is dict and step not in inner:
                    inner[step] = {}
                    folders += 1
                inner = inner[step]
            if type(inner) is not dict or last in inner:
                raise BadFile(self.place, f"has another entry in the place of {name!r}", _DAMAGED)
            inner[last] = self._leaf_of(name, told.state)
            parts += len(told.state["chunks"]) if type(inner[last]) is Listed else 0
            self._check_count(max(parts, folders, len(self.tensors)))
        return tree

    def _path_of(self, name: str) -> tuple[str, ...]:
        path = self.paths.get(name)
        if path is None:
            head, _, rest = name.partition(".")  # of what was saved flat
            return (head, rest) if rest and is_training_key(head) else (name,)
        if not 0 < len(checked(path, tuple)) <= _MAX_DEPTH or not all(type(step) in (str, int) for step in path):
            raise TypeError("a path that is none")
        return tuple(map(str, path))

    def _leaf_of(self, name: str, told: Mapping[str, Any] | None) -> Any:
        if told is None or "chunks" not in told:
            return Left(self.left_nbytes[name])
        dtype = checked(told["properties"].state[0], DType)
        if dtype.tag not in DTYPES:
            return of_other_dtype(dtype)
        checked(told["chunks"], list)
        return Listed(dtype, shape_of(told["size"]), name)

    def take(self, state_dict: dict[str, TensorRef | Listed]) -> Iterator[Tensor]:
        """Take the tensors out of a dict, and yield each with what it is made of."""
        wanted: dict[str, list[tuple[_Item, _Key]]] = defaultdict(list)
        for listed in state_dict.values():
            for key, start, _ in self._boxes_of(listed):
                if key not in self.items:
                    problem = f"does not say where the part of {key[0]!r} lies that begins at {list(start)}"
                    raise BadFile(self.place, problem, _DAMAGED)
                item = self.items[key]
                wanted[item.file_name].append((item, key))
        found = dict(self._read_items(wanted))
        for name, listed in state_dict.items():
            cuts = self._boxes_of(listed)
            boxes = [Box(start, self._check(found[key], listed, key, shape)) for key, start, shape in cuts]
            yield Tensor(name, put_together(name, listed.dtype, listed.shape, boxes, self.place, _DAMAGED))

    def _boxes_of(self, listed: Any) -> Iterator[_Cut]:
        """Give the boxes of a tensor; those without elements may begin beyond the end."""
        for chunk in self.tensors[listed.of].state["chunks"]:
            start, shape = map(shape_of, _fields_of(chunk, _CHUNK))
            if 0 not in shape:
                yield (listed.of, str(start)), start, shape

    def _check(
        self, source: TensorSource, listed: TensorRef | Listed, key: _Key, shape: tuple[int, ...]
    ) -> TensorSource:
        if source.dtype is not listed.dtype or source.shape != shape:
            known, found = spell(listed.dtype, shape), spell(source.dtype, source.shape)
            problem = f"says that a part of {key[0]!r} is {known}, and it is {found}"
            raise BadFile(self.place, problem, _DAMAGED)
        return source

    def _read_items(self, wanted: Mapping[str, list[tuple[_Item, _Key]]]) -> Iterator[tuple[_Key, TensorSource]]:
        for file_name in sorted(wanted):
            place = self.place.parent / file_name
            if not place.is_file():
                raise BadFile(place, "is not there, and .metadata names it", _INCOMPLETE)
            with place.open() as file:
                if file.read(8, 1) == b"{":
                    raise Unsupported(place, "holds safetensors, and .metadata does not fit that", _RESAVE)
                items = sorted(set(wanted[file_name]))
                reached = 0
                for item, key in items:
                    if item.offset < reached:
                        raise HostileFile(self.place, f"says that a part of {key[0]!r} lies within another")
                    reached = item.offset + item.nbytes
                    if reached > file.nbytes:
                        problem = f"ends before the part of {key[0]!r} that .metadata says is in it"
                        raise BadFile(place, problem, _INCOMPLETE)
                file.expect((item.offset + begin, nbytes) for item, _ in items for begin, nbytes in _ends_of(item))
                for item, key in items:
                    yield key, self._read_item(Window(file, item.offset, item.nbytes), item, key[0])

    def _read_item(self, window: Window, item: _Item, name: str) -> TensorSource:
        """Give the one tensor that a file of ``torch.save`` within another holds."""
        for begin, nbytes in _ends_of(item):
            window.keep(begin, nbytes)
        content = open_content(window, self._parse)
        ref = content.pickled.value
        if type(ref) is not TensorRef:
            raise BadFile(window.ref.place, f"holds no tensor where a part of {name!r} should be", _DAMAGED)
        ((_, source),) = content.take_sources({name: ref})
        return source

    def _parse(self, raw: bytes, where: Where) -> Pickled:
        """Read the pickle of an item, of which most are the same as another's."""
        pickled = self.parsed.get(raw)
        if pickled is None:
            if len(raw) > _MAX_PICKLE_NBYTES:
                raise HostileFile(where, f"takes {len(raw):,} bytes to describe one tensor")
            pickled = parse_pickle(raw, where, steps=self.steps)
            if len(raw) <= _MAX_KNOWN_NBYTES and len(self.parsed) < _MAX_KNOWN:
                self.parsed[raw] = pickled
        return pickled


def _ends_of(item: _Item) -> tuple[tuple[int, int], ...]:
    """Give the parts of an item that are read of it: all but its storage, which is last but for two small records."""
    if item.nbytes <= _HEAD_NBYTES + _TAIL_NBYTES:
        return ((0, item.nbytes),)
    return (0, _HEAD_NBYTES), (item.nbytes - _TAIL_NBYTES, _TAIL_NBYTES)


def _spelled(extensions: Any) -> str:
    """Name the extensions that packed a box: texts, of a list that may hold anything."""
    named = [name[:MAX_NAME] for name in checked(extensions, list)[:_MAX_NAMED] if type(name) is str]
    return ", ".join(named)


def _fields_of(value: Any, name: str) -> Any:
    """Give the fields that are kept of an object of a class. Raises TypeError for another, and one without a state."""
    if type(value) is not KeptObject or value.kind.name != name or value.state is None:
        raise TypeError("an object of another class")
    return value.state

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
from converter.errors import BadFile, HostileFile, Unsupported
from converter.formats.torch.files import open_content
from converter.formats.torch.rebuild import Left, Listed, TensorRef, Unreadable, checked, parse_pickle, shape_of
from converter.formats.torch.state_dict import Reading, choose_state_dict, is_training_key
from converter.formats.torch.unpickler import KeptObject
from converter.storage import OpenFile, Place, Window
from converter.tensors.base import Tensor, TensorSource, WeightsFile
from converter.tensors.derived import Box, Boxes

_METADATA = "torch.distributed.checkpoint.metadata.Metadata"
# What describes how tensors lay in memory, and where the checkpoint was written.
_OWN = {
    "torch.serialization._get_layout",
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
    "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
}
_MAX_NBYTES = 400_000_000
_MAX_DEPTH = 16  # of the path of a tensor; as deep as a state dict is looked for
_RESAVE = "torch cannot read it either: save it again without serialization_format=SAFETENSORS."
_DAMAGED = "The checkpoint is damaged: fetch .metadata again."
_INCOMPLETE = "The checkpoint is incomplete: fetch its .distcp files again."


class _Item(NamedTuple):
    """Where a box lies: a file, and the bytes of it."""

    file_name: str
    offset: int
    nbytes: int


_Key = tuple[str, tuple[int, ...]]
"""A tensor by its name, and where one of its boxes begins."""


def read_file(file: OpenFile, reading: Reading) -> WeightsFile:
    """Read which tensors a checkpoint holds, and where each box of those that are taken lies."""
    place = file.ref.place
    raw = file.read(0, min(file.nbytes, _MAX_NBYTES + 1))
    pickled = parse_pickle(raw, place, reading.strip_code)
    try:
        listed = _Listing(place, pickled.value)
        others = {name: how for name, how in pickled.foreign.items() if name not in _OWN}
        pickled = pickled._replace(value=listed.tree(), foreign=others)
        state_dict, notes, foreign = choose_state_dict(pickled, place, reading)
        tensors = tuple(listed.take(state_dict))
    except (AttributeError, KeyError, TypeError) as error:
        raise BadFile(place, "does not describe a checkpoint as torch.distributed.checkpoint does", _DAMAGED) from error
    return WeightsFile(place, "DCP", tensors, {}, notes, foreign)


class _Listing:
    """What ``.metadata`` says. Its methods raise AttributeError, KeyError or TypeError where that is nothing."""

    def __init__(self, place: Place, metadata: Any) -> None:
        if type(metadata) is not KeptObject or metadata.name != _METADATA:
            raise TypeError("metadata of another kind")
        state = metadata.state
        self.place = place
        self.tensors: Mapping[str, Any] = checked(state["state_dict_metadata"], dict)
        self.paths: Mapping[str, Any] = state.get("planner_data") or {}
        self.items: dict[_Key, _Item] = {}
        self.left_nbytes: dict[str, int] = defaultdict(int)  # of what is no tensor, by name
        for key, stored in checked(state["storage_data"], dict).items():
            self._add_item(key.state, stored.state)

    def _add_item(self, key: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
        name, begin = checked(key["fqn"], str), key.get("offset")
        file_name = checked(stored["relative_path"], str)
        if file_name in ("", ".", "..") or "/" in file_name or "\\" in file_name or "\0" in file_name:
            raise HostileFile(self.place, f"says that {name!r} lies in {file_name!r}, which is no name of a file")
        if stored.get("transform_descriptors"):
            problem = f"says that {name!r} is packed ({stored['transform_descriptors']})"
            raise Unsupported(self.place, problem, "Save it again without extensions of the writer.")
        offset, nbytes = _number(stored["offset"]), _number(stored["length"])
        if begin is None:
            self.left_nbytes[name] = nbytes
        elif (name, shape_of(begin)) in self.items:
            raise BadFile(self.place, f"says twice where {name!r} lies", _DAMAGED)
        else:
            self.items[name, begin] = _Item(file_name, offset, nbytes)

    def tree(self) -> dict[str, Any]:
        """Give the dicts that were saved, with a Listed for each tensor."""
        tree: dict[str, Any] = {}
        for name, told in self.tensors.items():
            *path, last = self._path_of(checked(name, str))
            inner = tree
            for step in path:
                inner = inner.setdefault(step, {})
            if type(inner) is not dict or last in inner:
                raise BadFile(self.place, f"has another entry in the place of {name!r}", _DAMAGED)
            inner[last] = self._leaf_of(name, told.state)
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
            return Unreadable(f"is {dtype.torch_name}, a dtype that safetensors does not have")
        return Listed(dtype, shape_of(told["size"]), name)

    def take(self, state_dict: dict[str, TensorRef | Listed]) -> Iterator[Tensor]:
        """Take the tensors out of a dict, and yield each with what it is made of."""
        wanted: dict[str, list[tuple[_Item, _Key]]] = defaultdict(list)
        for listed in state_dict.values():
            for key, _ in self._boxes_of(listed):
                if key not in self.items:
                    problem = f"does not say where the part of {key[0]!r} lies that begins at {list(key[1])}"
                    raise BadFile(self.place, problem, _DAMAGED)
                item = self.items[key]
                wanted[item.file_name].append((item, key))
        found = dict(self._read_items(wanted))
        for name, listed in state_dict.items():
            boxes = [Box(key[1], self._check(found[key], listed, key, shape)) for key, shape in self._boxes_of(listed)]
            if len(boxes) == 1 and boxes[0].source.shape == listed.shape:
                yield Tensor(name, boxes[0].source)
                continue
            try:
                yield Tensor(name, Boxes(listed.dtype, listed.shape, tuple(boxes)))
            except ValueError as error:
                raise BadFile(self.place, f"cuts the tensor {name!r} into {error}", _DAMAGED) from None

    def _boxes_of(self, listed: Any) -> Iterator[tuple[_Key, tuple[int, ...]]]:
        """Give where each box of a tensor begins, and its shape; those without elements may begin beyond the end."""
        for chunk in checked(self.tensors[listed.of].state["chunks"], list):
            start, shape = shape_of(chunk.state["offsets"]), shape_of(chunk.state["sizes"])
            if 0 not in shape:
                yield (listed.of, start), shape

    def _check(
        self, source: TensorSource, listed: TensorRef | Listed, key: _Key, shape: tuple[int, ...]
    ) -> TensorSource:
        if source.dtype is not listed.dtype or source.shape != shape:
            found = f"{source.dtype.torch_name} {list(source.shape)}"
            problem = f"says that a part of {key[0]!r} is {listed.dtype.torch_name} {list(shape)}, and it is {found}"
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
                for item, key in sorted(wanted[file_name]):
                    if item.offset + item.nbytes > file.nbytes:
                        problem = f"ends before the part of {key[0]!r} that .metadata says is in it"
                        raise BadFile(place, problem, _INCOMPLETE)
                    yield key, _read_item(Window(file, item.offset, item.nbytes), key[0])


def _read_item(window: Window, name: str) -> TensorSource:
    """Give the one tensor that a file of ``torch.save`` within another holds."""
    content = open_content(window)
    ref = content.pickled.value
    if type(ref) is not TensorRef:
        raise BadFile(window.ref.place, f"holds no tensor where a part of {name!r} should be", _DAMAGED)
    ((_, source),) = content.take_sources({name: ref})
    return source


def _number(value: Any) -> int:
    number = checked(value, int)
    if number < 0:
        raise TypeError("a number below 0")
    return number

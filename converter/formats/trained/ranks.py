"""Files of ranks: of each process of a training, what it had of every tensor, as ``torch.save`` wrote it.

verl and SkyRL name them ``model_world_size_{N}_rank_{r}.pt``, accelerate ``pytorch_model_fsdp_{i}_rank{r}.bin``
(``save_fsdp_model`` in ``accelerate/utils/fsdp_utils.py``, with ``use_dcp=False``). A DTensor says how it was cut over
a mesh of ranks, from which follows where the local tensor lies in the whole; a ShardedTensor says so itself. Only all
ranks make the weights, and all have to name the same tensors. What several of them hold, all of it or the same part,
is taken once, and has to be the same in all.

Refused is what has no place in a whole: partial sums, cuts that torch itself could not undo, and flat parameters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate, chain
from operator import mul
from typing import Any, NamedTuple

from converter.dtypes import DType
from converter.errors import BadFile, HostileFile, TrainingPiece, Unsupported
from converter.formats.torch.files import open_content
from converter.formats.torch.rebuild import TensorRef, Unreadable, checked, shape_of, size_of
from converter.formats.torch.state_dict import AnyTensor, Reading, choose_state_dict, join_foreign
from converter.formats.trained.boxes import put_together, spell
from converter.formats.trained.pieces import ACCELERATE, RANKS, check_pickled, check_ranks
from converter.storage import OpenFile, Place, list_entries
from converter.storage.far import look_at_each
from converter.tensors.base import MAX_TENSORS, Tensor, TensorSource, WeightsFile
from converter.tensors.derived import OF_ONE_STEP, Box, Replicas, differ
from converter.tensors.view import View

_MAX_WORLD = 1_000_000
_MAX_BOXES = 600_000  # of 500 bytes each; those of 1,100 tensors on 512 ranks
_MAX_MESH_DIMS = 16  # trainers have up to five
_MAX_ASKED = 4_096
_FLAT = re.compile(r"(.*\.)?_?flat_param(_\d+)?")  # ``torch/distributed/fsdp/_common_utils.py``
_DAMAGED = "The file is damaged: fetch it again."
_FULL = "Load it with the tool that wrote it, as it was trained, and save a full state dict."
_PLACEMENTS = ("torch.distributed.tensor.placement_types.", "torch.distributed._tensor.placement_types.")

_Start = tuple[int, ...]
"""Where a part begins in the whole, in elements along each axis."""

_Parts = list[tuple[_Start, tuple[int, ...], Any]]
"""Parts: where each begins, its shape, and the local tensor."""


class _Held(NamedTuple):
    """What one rank holds of a tensor: boxes of a whole of this dtype and shape."""

    dtype: DType
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]


class _Rank(NamedTuple):
    """What the file of one rank says; ``world`` is how many ranks there must be, as far as it tells."""

    place: Place
    tensors: Mapping[str, _Held]
    world: int
    notes: tuple[str, ...]
    foreign: Mapping[str, str]


def read_file(file: OpenFile, reading: Reading) -> WeightsFile:
    """Read which tensors the ranks of a checkpoint hold, given the file of one, and where each part of them lies."""
    first = _read_rank(file, reading)
    others = _find_others(first)
    wholes = {name: _Whole(name, held.dtype, held.shape) for name, held in first.tensors.items()}
    notes: dict[str, None] = {}
    foreign: dict[str, str] = {}
    count = 0
    for rank in chain((first,), look_at_each(partial(_read_place, reading=reading), others)):
        _check_names(rank, first)
        count += sum(wholes[name].add(held, rank.place, first.place) for name, held in rank.tensors.items())
        if count > _MAX_BOXES:
            raise HostileFile(rank.place, f"its ranks cut their tensors into more than {_MAX_BOXES:,} parts")
        notes |= dict.fromkeys(rank.notes)
        foreign = join_foreign((foreign, rank.foreign))
    tensors = tuple(Tensor(name, wholes.pop(name).source(first.place)) for name in first.tensors)
    return WeightsFile(first.place, "FSDP ranks", tensors, {}, tuple(notes), foreign)


class _Name(NamedTuple):
    """What the name of a file says: whose it is, of which rank, and of how many, if it tells (else 0)."""

    of: str
    rank: int
    world: int


def _parse_name(name: str) -> _Name:
    parsed = re.fullmatch(RANKS, name)
    return _Name(parsed["of"], int(parsed["rank"]), int(parsed["world"] or 0)) if parsed else _Name("", 0, 0)


def _find_others(first: _Rank) -> list[Place]:
    """Give the files of the other ranks, in order. Raises BadFile where some are not there, or there are too many."""
    own = _parse_name(first.place.name)
    found = {_parse_name(entry.name): entry for entry in list_entries(first.place.parent)}
    places = {name.rank: entry for name, entry in found.items() if name.of == own.of}
    if own.rank not in places:  # a store that does not list, as the web is
        places = _ask_for(first.place, own, own.world or first.world)
    world = own.world or max(first.world, max(places) + 1)
    names = {rank: entry.name for rank, entry in places.items()}
    check_ranks(first.place.parent, "files", names, world)
    return [places[rank] for rank in sorted(places) if rank != own.rank]


def _ask_for(place: Place, own: _Name, world: int) -> dict[int, Place]:
    """Give the files of ranks that are there, by asking for each."""
    ending = place.name.removeprefix(f"{own.of}{own.rank}")
    asked = [place.parent / f"{own.of}{rank}{ending}" for rank in range(min(world, _MAX_ASKED))]
    there = zip(asked, look_at_each(Place.is_file, asked), strict=True)
    return {own.rank: place, **{rank: one for rank, (one, is_there) in enumerate(there) if is_there}}


def _check_names(rank: _Rank, first: _Rank) -> None:
    for one, other in ((first, rank), (rank, first)):
        lost = next((name for name in one.tensors if name not in other.tensors), None)
        if lost is not None:
            raise BadFile(other.place, f"holds no tensor {lost!r}, which {one.place.name} holds", OF_ONE_STEP)


class _Whole:
    """A tensor as it is put together: what was found of it, by where it begins."""

    __slots__ = ("boxes", "dtype", "name", "shape")

    def __init__(self, name: str, dtype: DType, shape: tuple[int, ...]) -> None:
        self.name = name
        self.dtype = dtype
        self.shape = shape
        self.boxes: dict[str, Box] = {}  # by texts: of numbers a file could choose such as all hash alike

    def add(self, held: _Held, place: Place, first: Place) -> int:
        """Add what a rank holds, and say how many sources are kept for that. Raises BadFile where it does not fit."""
        if held.dtype is not self.dtype or held.shape != self.shape:
            problem = f"its tensor {self.name!r} is {spell(held.dtype, held.shape)} in all ranks together"
            known = f"{spell(self.dtype, self.shape)} in {first.name}"
            raise BadFile(place, f"{problem}, and {known}", OF_ONE_STEP)
        return sum(self._add_box(box, place) for box in held.boxes)

    def _add_box(self, box: Box, place: Place) -> int:
        key = str(box.start)
        first = self.boxes.setdefault(key, box)
        if first is box:
            return 1
        known = first.source
        if known.shape != box.source.shape:
            problem = (
                f"holds {list(box.source.shape)} of tensor {self.name!r} from {list(box.start)} on, and another rank"
            )
            raise BadFile(place, f"{problem} {list(known.shape)} from there", OF_ONE_STEP)
        original, others = (known.source, known.others) if type(known) is Replicas else (known, ())
        is_same = _compare(original, box.source)
        if is_same is None:
            self.boxes[key] = Box(box.start, Replicas(original, (*others, box.source), self.name))
            return 1
        if not is_same:
            raise differ(self.name, original, box.source)
        return 0

    def source(self, first: Place) -> TensorSource:
        """Give the whole. Raises BadFile where the boxes do not make it."""
        boxes = tuple(self.boxes.values())
        return put_together(self.name, self.dtype, self.shape, boxes, first.parent, OF_ONE_STEP)


def _compare(one: TensorSource, other: TensorSource) -> bool | None:
    """Say by the CRC32s that are noted whether two sources of a shape hold the same; None where those do not tell."""
    if type(one) is not View or type(other) is not View or None in (one.storage.crc32, other.storage.crc32):
        return None
    if (one.start, one.strides, one.storage.nbytes) != (other.start, other.strides, other.storage.nbytes):
        return None
    if one.storage.crc32 == other.storage.crc32:
        return True
    is_all = one.is_contiguous and one.dtype.nbytes(math.prod(one.shape)) == one.storage.nbytes
    return False if is_all else None


def _read_place(place: Place, reading: Reading) -> _Rank:
    with place.open() as file:
        return _read_rank(file, reading)


def _read_rank(file: OpenFile, reading: Reading) -> _Rank:
    """Read what one rank holds; nothing of its pickle is left then."""
    content = open_content(file, reading.strip_code)
    place = content.place
    check_pickled(content.pickled.value, place)
    state_dict, notes, foreign = choose_state_dict(content.pickled, place, reading)
    wholes: dict[str, tuple[DType, tuple[int, ...], list[tuple[_Start, str]]]] = {}
    refs: dict[str, AnyTensor] = {}
    world, count = 1, 0
    for name, tensor in state_dict.items():
        if _FLAT.fullmatch(name):
            problem = f"holds flat parameters such as {name!r}, and does not say which weights they are made of"
            raise TrainingPiece(place, problem, ACCELERATE)
        parts, least = _parts_of(tensor, name, place)
        world = max(world, least)
        count += len(parts)
        if count > MAX_TENSORS:
            raise HostileFile(place, f"holds more than {MAX_TENSORS:,} parts of tensors")
        wholes[name] = tensor.dtype, tensor.shape, []
        for number, (start, shape, local) in enumerate(parts):
            if 0 not in shape:
                key = f"{name} ({number + 1})" if number else name
                wholes[name][2].append((start, key))
                if refs.setdefault(key, local) is not local:
                    raise BadFile(place, f"holds two tensors named {key!r}")
    notes += tuple(content.notes_on(refs))
    content = content.without_value()
    del state_dict
    sources = dict(content.take_sources(refs))
    tensors = {
        name: _Held(dtype, shape, tuple(Box(start, sources[key]) for start, key in boxes))
        for name, (dtype, shape, boxes) in wholes.items()
    }
    return _Rank(place, tensors, world, notes, foreign)


def _parts_of(tensor: AnyTensor, name: str, place: Place) -> tuple[_Parts, int]:
    """Give what a rank holds of a tensor, and how many ranks there are at least.

    Raises BadFile, Unsupported or TrainingPiece for what is no part of a whole.
    """
    if isinstance(tensor, TensorRef):
        return [((0,) * len(tensor.shape), tensor.shape, tensor)], 1
    part = tensor.of
    what = f"tensor {name!r}"
    try:
        if part.kind.endswith(".DTensor"):
            parts, world = _parts_of_dtensor(tensor.shape, _attributes(part.state), what, place)
        elif part.kind.endswith(".ShardedTensor"):
            parts, world = _parts_of_shards(tensor.shape, part.state)
        else:
            raise Unsupported(place, f"{what} is of the class {part.kind}", _FULL)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise BadFile(place, f"does not describe {what} as torch.distributed does", _DAMAGED) from error
    if not 0 < world <= _MAX_WORLD:
        raise HostileFile(place, f"says that {what} lies on {world:,} ranks")
    for _, shape, local in parts:
        if type(local) is not TensorRef:
            why = local.why if type(local) is Unreadable else "is no plain tensor"
            raise Unsupported(place, f"{what} has a part that {why}", _FULL)
        is_empty = 0 in shape and 0 in local.shape
        if local.dtype is not tensor.dtype or (local.shape != shape and not is_empty):
            known, found = spell(tensor.dtype, shape), spell(local.dtype, local.shape)
            problem = f"the part of {what} should be {known}, and is {found}"
            raise BadFile(place, problem, _DAMAGED)
    return parts, world


def _parts_of_shards(whole: tuple[int, ...], state: Any) -> tuple[_Parts, int]:
    """Read the state of a ShardedTensor (``__getstate__`` in ``torch/distributed/_shard/sharded_tensor/api.py``)."""
    shards, metadata, group = checked(state, tuple)[:3]
    if _sizes(_attributes(metadata.state)["size"]) != whole:
        raise ValueError("a ShardedTensor of two shapes")
    parts: _Parts = []
    for shard in checked(shards, list):
        attributes = _attributes(shard.state)
        told = _attributes(attributes["metadata"].state)
        start, shape = _sizes(told["shard_offsets"]), _sizes(told["shard_sizes"])
        if not len(start) == len(shape) == len(whole):
            raise ValueError("a shard with other axes than the whole")
        parts.append((start, shape, attributes["tensor"]))
    return parts, checked(_attributes(group.state)["global_world_size"], int)


def _parts_of_dtensor(
    whole: tuple[int, ...], attributes: Mapping[str, Any], what: str, place: Place
) -> tuple[_Parts, int]:
    """Read a DTensor's local tensor and its ``DTensorSpec`` (``torch/distributed/tensor/_dtensor_spec.py``)."""
    local, spec = attributes["_local_tensor"], attributes["_spec"].state
    mesh_state = spec["mesh"].state
    mesh = _mesh_shape(mesh_state)
    root = mesh_state.get("_root_mesh")
    world = max(math.prod(mesh), math.prod(_mesh_shape(root.state)) if root else 1)
    placements = checked(spec["placements"], tuple)
    if len(placements) != len(mesh):
        raise ValueError("placements on other axes than those of the mesh")
    coordinate = mesh_state["_coordinate_on_dim"]
    if coordinate is None:  # the rank is none of the mesh, and holds nothing
        return [((), (0,), local)], world
    coordinate = _sizes(coordinate)
    if len(coordinate) != len(mesh) or any(at >= size for at, size in zip(coordinate, mesh, strict=True)):
        raise ValueError("a place that is none in the mesh")
    start, shape = [0] * len(whole), list(whole)
    for axis, order in _cuts_of(spec, placements, mesh, what, place).items():
        for along in order:
            # As torch.chunk cuts (``Shard.local_shard_size_and_offset`` in ``placement_types.py``).
            step = -(-shape[axis] // mesh[along])
            begin = min(shape[axis], step * coordinate[along])
            start[axis] += begin
            shape[axis] = min(step, shape[axis] - begin)
    return [(tuple(start), tuple(shape), local)], world


def _mesh_shape(state: Mapping[str, Any]) -> tuple[int, ...]:
    """Give the shape of a DeviceMesh: a tensor of ranks in torch before 2.9 or so, since then a layout."""
    if "_layout" in state:
        axes = checked(state["_layout"].state["axes"], tuple)
        shape = tuple(math.prod(_sizes(axis.state["shape"])) for axis in axes[: _MAX_MESH_DIMS + 1])
    else:
        shape = checked(state["mesh"], TensorRef).shape
    if len(shape) > _MAX_MESH_DIMS or not 0 < math.prod(shape) <= _MAX_WORLD:
        raise ValueError("a mesh of no ranks, or too many")
    return shape


def _cuts_of(
    spec: Mapping[str, Any], placements: Sequence[Any], mesh: tuple[int, ...], what: str, place: Place
) -> dict[int, list[int]]:
    """Give along which axes of the mesh each axis of a tensor was cut, one after another.

    Where several cut the same, placements count from the left, but for those ``_StridedShard`` that a cut behind them
    came before, as FSDP cuts what tensor parallelism has cut (``_maybe_convert_StridedShard_to_shard_order`` in
    ``torch/distributed/tensor/_dtensor_spec.py``).
    """
    cuts: dict[int, list[int]] = {}
    has_strided = False
    for along in reversed(range(len(placements))):
        kind, state = placements[along].name, placements[along].state
        name = kind.removeprefix(next(filter(kind.startswith, _PLACEMENTS), "\0"))
        if name == "Replicate":
            continue
        if name not in ("Shard", "_StridedShard"):
            raise Unsupported(place, f"{what} is placed on its ranks as {name}, which is no part of a whole", _FULL)
        order = cuts.setdefault(size_of(state["dim"]), [])
        factor = size_of(state["split_factor"]) if name == "_StridedShard" else 1
        has_strided |= factor != 1
        before = accumulate((mesh[axis] for axis in order), mul, initial=1)
        at = next((at for at, count in enumerate(before) if count == factor), None)
        if at is None:
            problem = f"{what} is cut along its axis {state['dim']} into strides of {factor}, which no mesh explains"
            raise Unsupported(place, problem, _FULL)
        order.insert(at, along)
    told = spec.get("shard_order")
    if told is None:
        return cuts
    named = {size_of(entry.arguments[0]): list(_sizes(entry.arguments[1])) for entry in told[: 1 + len(mesh)]}
    if has_strided or _sorted(named) != _sorted(cuts):
        raise Unsupported(place, f"{what} is cut in an order that its placements do not explain", _FULL)
    return named


def _sorted(cuts: Mapping[int, list[int]]) -> dict[int, list[int]]:
    return {axis: sorted(order) for axis, order in cuts.items()}


def _attributes(state: Any) -> Mapping[str, Any]:
    """Give the attributes of an object by its state: a dict, or one and another of those in slots."""
    if type(state) is tuple:
        plain, slots = state
        return {**(plain or {}), **(slots or {})}
    return checked(state, dict)


def _sizes(value: Any) -> tuple[int, ...]:
    return shape_of(tuple(value) if type(value) is list else value)

"""Checkpoints of DeepSpeed's ZeRO, stages 1 to 3: the float32 weights that the optimizers of all ranks hold together.

``*_model_states.pt`` says what the parameters are called, their shapes and their order, and holds buffers and frozen
ones; each rank's ``*_optim_states.pt`` has its runs of all others, end to end. What is taken, under which names and in
which order, is what DeepSpeed's own script gives (``deepspeed/utils/zero_to_fp32.py``), with the frozen parameters that
it leaves out at stage 1. What ``ds_to_universal.py`` made of such a checkpoint has a file for each parameter instead.

Ranks of tensor, pipeline and expert parallelism hold other parts, and are refused.
"""

from __future__ import annotations

import math
import re
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import accumulate, chain, islice
from typing import Any, NamedTuple

from converter.dtypes import DType
from converter.errors import BadFile, BadRequest, HostileFile, TrainingPiece, Unsupported, name_some, spell_size
from converter.formats import training
from converter.formats.torch import files
from converter.formats.torch.content import Content
from converter.formats.torch.files import open_content
from converter.formats.torch.rebuild import Listed, TensorRef, checked, shape_of
from converter.formats.torch.state_dict import (
    AnyTensor,
    Reading,
    check_lengths,
    note_foreign,
    refuse_unreadable,
    unreadable_in,
)
from converter.storage import OpenFile, Place, list_entries, natural_key
from converter.storage.far import look_at_each
from converter.tensors.base import MAX_TENSORS, PackedRange, Tensor, TensorSource, WeightsFile
from converter.tensors.derived import Box, Boxes
from converter.tensors.view import View, contiguous_strides

_MODEL = r"zero_pp_rank_(\d{1,9})_mp_rank_0+_model_states\.pt"

_GROUPS = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups", 3: "fp32_flat_groups"}
# What is read of model states, or says nothing that weights could lose.
_READ = frozenset(
    {
        "module", "buffer_names", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params",
        "ds_version", "ds_config", "dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions",
    }
)  # fmt: skip
_MAX_BOXES = 2_000_000  # of all parameters, each 200 bytes: 18,000 parameters (of 128 experts) on 100 ranks
_KEPT_NBYTES = 1 << 16  # most of what describes a file is within it, and needs no second request over a network
_MAX_NAMED = 8
_MAX_LENGTH = 200  # of a key that is spelled to people
_DAMAGED = "The file is damaged: fetch it again."
_MIXED = "The folder holds files of several checkpoints: fetch one of them anew."
_MISSING = "Put the files of all ranks into one folder: where ranks had disks of their own, each has some."
_SCRIPT = "'python zero_to_fp32.py CHECKPOINT OUT', a script that DeepSpeed puts beside it, may read it."


class _Names(NamedTuple):
    """The files of a checkpoint, by rank. Where the model is not partitioned it has one file, which is of no rank."""

    optimizers: dict[int, str]
    models: dict[int, str]
    is_partitioned: bool


class _Head(NamedTuple):
    """What the model states of the first rank say."""

    content: Content
    module: Mapping[str, Any]
    buffer_names: frozenset[str]
    groups: tuple[dict[str, tuple[int, ...]], ...]  # the shapes of parameters, in the order in which they lie
    frozen: dict[str, tuple[int, ...]]
    fragments: Mapping[str, Any]
    shared: Mapping[str, Any]
    version: str
    step: str
    left: tuple[str, ...]  # the keys of what is not read

    @property
    def place(self) -> Place:
        return self.content.place

    @property
    def is_cut(self) -> bool:
        """Whether each rank has a part of the model; then its own tensors of parameters are empty."""
        return re.fullmatch(_MODEL, self.place.name) is not None


class _Model(NamedTuple):
    """What the model states of another rank say: its parts of frozen parameters."""

    place: Place
    version: str
    step: str
    fragments: dict[str, TensorSource]
    foreign: Mapping[str, str]


class _Rank(NamedTuple):
    """What the optimizer's states of one rank hold: its runs of the weights, and what is left out."""

    place: Place
    stage: int
    world: int  # how many ranks there are
    version: str
    paddings: tuple[tuple[int, ...], ...] | None  # behind each parameter of each group
    groups: tuple[TensorSource, ...]
    step: float | None
    left_nbytes: int
    foreign: Mapping[str, str]

    @property
    def dtype(self) -> DType:
        return self.groups[0].dtype


class _Line:
    """Tensors of one axis, end to end."""

    def __init__(self, sources: Iterable[TensorSource]) -> None:
        self._sources = tuple(sources)
        self._ends = tuple(accumulate(source.shape[0] for source in self._sources))
        self.length = self._ends[-1] if self._ends else 0

    def cut(self, begin: int, end: int, at: int = 0) -> Iterator[Box]:
        """Give what lies between two places, to be put together from ``at`` on."""
        for place in range(bisect_right(self._ends, begin), len(self._ends)):
            if begin >= end:
                return
            source = self._sources[place]
            inner, count = begin - self._ends[place] + source.shape[0], min(end, self._ends[place]) - begin
            if count:
                yield Box(_axis(at), source.box((inner,), _axis(count)))
            begin, at = begin + count, at + count


@lru_cache(1 << 16)  # ranks have parts of one length at the same places of many parameters, and share these
def _axis(number: int) -> tuple[int]:
    """Give the shape, or the begin, of what has one axis."""
    return (number,)


def read_file(file: OpenFile, reading: Reading) -> WeightsFile:
    """Read what all ranks' files hold, or those of all parameters, given the first of the model states."""
    names = _find_names(file.ref.place)
    if reading.key is not None:
        return _read_key(file, reading, names)
    return (_read_ranks if names.optimizers else _read_universal)(file, reading, names)


def _read_ranks(file: OpenFile, reading: Reading, names: _Names) -> WeightsFile:
    """Read a checkpoint of which each rank has an optimizer's states."""
    folder = file.ref.place.parent
    # The head comes last: while it is open no other long one is fetched from afar.
    ranks = _read_optimizers(folder, names, reading)
    stage, count = ranks[0].stage, len(ranks)
    if names.is_partitioned != (stage == 3):
        raise BadFile(ranks[0].place, f"is of ZeRO stage {stage}, and {file.ref.place.name} is not", _MIXED)
    models = _read_models(folder, names, reading, count)
    head = _read_head(file, reading)
    _check_versions(head, (*models, *ranks))
    parameters = dict((_cut_parameters if stage == 3 else _cut_groups)(head, ranks))
    left = [f"optimizer_state_dict ({spell_size(sum(rank.left_nbytes for rank in ranks))})"]
    return _gather("ZeRO", head, models, parameters, reading, left, [rank.foreign for rank in ranks])


def _read_universal(file: OpenFile, reading: Reading, names: _Names) -> WeightsFile:
    """Read what ``ds_to_universal.py`` made: a file for each parameter, beside the model states as they were."""
    folder = file.ref.place.parent
    models = _read_models(folder, names, reading, len(names.models))
    head = _read_head(file, reading)
    _check_versions(head, models)
    shapes = {name: shape for group in head.groups for name, shape in group.items()}
    places = [_place_of(folder / training.ZERO_UNIVERSAL, name) for name in shapes]
    read = look_at_each(partial(_read_parameter, strip_code=reading.strip_code), places)
    parameters = {name: _shaped(source, shape, where)
                  for (name, shape), source, where in zip(shapes.items(), read, places, strict=True)}  # fmt: skip
    left_out = f"the optimizer's states in {training.ZERO_UNIVERSAL}"
    return _gather("ZeRO, universal", head, models, parameters, reading, [left_out], [])


# Which files there are.


def _find_names(place: Place) -> _Names:
    """Sort the files beside one by rank. Raises TrainingPiece for those of other kinds of parallelism."""
    folder = place.parent
    names = _Names({}, {}, re.fullmatch(_MODEL, place.name) is not None)
    for name in sorted((entry.name for entry in list_entries(folder)), key=natural_key):
        for pattern, known in ((training.ZERO_OPTIMIZER, names.optimizers), (_MODEL, names.models)):
            match = re.fullmatch(pattern, name)
            if match:
                if known.setdefault(int(match[1]), name) != name:
                    problem = f"holds two files of rank {int(match[1])}: {known[int(match[1])]} and {name}"
                    raise BadFile(folder, problem, _MIXED)
                break
        else:
            if re.fullmatch(training.ZERO_PIECES, name):
                training.check_name(folder / name)
    if names.models and not names.is_partitioned:
        problem = f"holds model states of two kinds: {place.name} and {names.models[min(names.models)]}"
        raise BadFile(folder, problem, _MIXED)
    return names


def _check_there(folder: Place, what: str, names: Mapping[int, str], count: int) -> None:
    """Raise BadFile where not just so many ranks have a file."""
    missing = count - sum(rank < count for rank in names)
    if missing:
        spelled = [str(rank) for rank in islice((rank for rank in range(count) if rank not in names), _MAX_NAMED)]
        spelled += [f"{missing - len(spelled):,} more"] if missing > len(spelled) else []
        ranks = "ranks " + ", ".join(spelled[:-1]) + f" and {spelled[-1]}" if missing > 1 else f"rank {spelled[0]}"
        raise BadFile(folder, f"is not whole: the {what} of {ranks} of {count:,} are not there", _MISSING)
    if len(names) > count:
        raise BadFile(folder, f"was saved by {count:,} ranks, and holds {names[max(names)]} too", _MIXED)


def _read_key(file: OpenFile, reading: Reading, names: _Names) -> WeightsFile:
    """Read a state dict of the model states alone, such as the weights as the model itself had them."""
    if names.is_partitioned:
        problem = f"has no whole tensors at {reading.key!r}: at ZeRO stage 3 the model's own are cut up, or empty"
        raise BadRequest(file.ref.place, problem, "Leave out --key.")
    return files.read_file(file, reading)


# What the files say.


@contextmanager
def _as_written(place: Place) -> Iterator[None]:
    """Raise BadFile where what is looked for is not there, or is of another type."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise BadFile(place, "is not as DeepSpeed writes it", _DAMAGED) from error


@contextmanager
def _opened(place: Place, strip_code: bool) -> Iterator[Content]:
    """Open a file, all but the head's, and read what its pickle says."""
    with place.open() as file, _as_written(place):
        file.keep(0, _KEPT_NBYTES)
        yield open_content(file, strip_code)


def _read_head(file: OpenFile, reading: Reading) -> _Head:
    place = file.ref.place
    with _as_written(place):
        content = open_content(file, reading.strip_code)
        told = checked(content.pickled.value, dict)
        _refuse_parallel(told, place)
        groups = told["param_shapes"]
        if type(groups) is dict:  # as before there were groups
            groups = [groups]
        return _Head(
            content._replace(pickled=content.pickled._replace(value=None)),
            checked(told["module"], dict),
            frozenset(checked(name, str) for name in checked(told["buffer_names"], list)),
            tuple(_shapes_in(checked(groups, list))),
            next(_shapes_in([told.get("frozen_param_shapes") or {}])),
            checked(told.get("frozen_param_fragments") or {}, dict),
            checked(told.get("shared_params") or {}, dict),
            _plain(told.get("ds_version")),
            _plain(told.get("global_steps")),
            tuple(str(key)[:_MAX_LENGTH] for key, value in told.items() if key not in _READ and value is not None),
        )


def _shapes_in(groups: list[Any]) -> Iterator[dict[str, tuple[int, ...]]]:
    _check_counts(groups, dict)
    for shapes in groups:
        yield {checked(name, str): shape_of(size) for name, size in shapes.items()}


def _check_counts(groups: list[Any], kind: type) -> None:
    """Raise ValueError where groups have more parameters than models: one may be handed out a million times."""
    if len(groups) + sum(len(checked(group, kind)) for group in groups) > MAX_TENSORS:
        raise ValueError("more parameters than there are")


def _plain(value: Any) -> str:
    """Spell what is a text or a number; nothing for anything else, which may be nested without end."""
    return str(value)[:_MAX_LENGTH] if type(value) in (str, int) else ""


def _refuse_parallel(told: Mapping[str, Any], place: Place) -> None:
    """Raise TrainingPiece for model states that are a part of a model."""
    degrees = told.get("checkpoint_parallel_dimensions")
    degrees = degrees if type(degrees) is dict else {}
    if told["module"] is None or degrees.get("pp_degree", 1) != 1:
        raise TrainingPiece(place, "is of a pipeline-parallel DeepSpeed checkpoint", training.DEEPSPEED)
    if told.get("mp_world_size") not in (1, None) or degrees.get("tp_degree", 1) != 1:
        raise TrainingPiece(place, *training.TENSOR_PARALLEL)
    if told.get("ds_autoep_layers") or told.get("autoep_layers"):
        raise TrainingPiece(place, "is of a DeepSpeed checkpoint whose experts are cut up (AutoEP)", training.DEEPSPEED)


def _read_models(folder: Place, names: _Names, reading: Reading, count: int) -> list[_Model]:
    """Read the model states of all ranks but the first, where each has its own."""
    if not names.is_partitioned:
        return []
    _check_there(folder, "model states", names.models, count)
    read = partial(_read_model, strip_code=reading.strip_code, most=_MAX_BOXES // count)
    return list(look_at_each(read, [folder / names.models[rank] for rank in range(1, count)]))


def _read_model(place: Place, strip_code: bool, most: int) -> _Model:
    with _opened(place, strip_code) as content:
        told = checked(content.pickled.value, dict)
        fragments = told.get("frozen_param_fragments") or {}
        runs = dict(_take_runs(content, checked(fragments, dict), most))
        return _Model(
            place, _plain(told.get("ds_version")), _plain(told.get("global_steps")), runs, content.pickled.foreign
        )


def _take_runs(content: Content, refs: Mapping[str, Any], most: int) -> Iterator[tuple[str, TensorSource]]:
    """Give tensors of one axis, none of them strided. Raises TypeError for anything else.

    Raises Unsupported where there are so many that those of all ranks would take too much memory.
    """
    if len(refs) > most:
        raise Unsupported(content.place, f"holds {len(refs):,} parts of weights, too many for so many ranks", _SCRIPT)
    for ref in refs.values():
        if type(ref) is not TensorRef or len(ref.shape) != 1 or (ref.shape[0] > 1 and ref.strides != (1,)):
            raise TypeError("a tensor that is no run of elements")
    return content.take_sources(dict(refs))


def _read_optimizers(folder: Place, names: _Names, reading: Reading) -> list[_Rank]:
    """Read the optimizer's states of all ranks, in order. Raises BadFile where they do not go together."""
    ordered = [folder / names.optimizers[rank] for rank in sorted(names.optimizers)]
    read = partial(_read_rank, strip_code=reading.strip_code, most=_MAX_BOXES // len(ordered))
    first = read(ordered[0])
    _check_there(folder, "optimizer's states", names.optimizers, first.world)
    ranks = [first]
    for rank in look_at_each(read, ordered[1:]):
        _check_alike(first, rank, rank.stage < 3 and len(ranks) == first.world - 1)
        ranks.append(rank)
    return ranks


def _read_rank(place: Place, strip_code: bool, most: int) -> _Rank:
    with _opened(place, strip_code) as content:
        value = checked(content.pickled.value, dict)
        told = checked(value["optimizer_state_dict"], dict)
        # BF16_Optimizer, a ZeRO-1 of its own, does not say (``deepspeed/runtime/bf16_optimizer.py``).
        stage = checked(told.get("zero_stage", 1), int)
        if stage not in _GROUPS:
            raise BadFile(place, f"is of ZeRO stage {stage}, which there is not", _DAMAGED)
        groups = _take_groups(content, checked(told[_GROUPS[stage]], list), most)
        return _Rank(
            place,
            stage,
            _count_ranks(told["partition_count"], place),
            _plain(value.get("ds_version")),
            _paddings_in(told.get("param_alignment_paddings")),
            groups,
            _read_step(content, told),
            _nbytes_in(value) - _nbytes_in(told[_GROUPS[stage]]),
            content.pickled.foreign,
        )


def _take_groups(content: Content, refs: list[Any], most: int) -> tuple[TensorSource, ...]:
    """Give the runs of a rank. Raises TypeError or ValueError for what is none, or has more elements than are there."""
    groups = tuple(
        source for _, source in _take_runs(content, {str(index): ref for index, ref in enumerate(refs)}, most)
    )
    if len({group.dtype for group in groups}) != 1 or not groups[0].dtype.is_floating:
        raise TypeError("groups that are no weights")
    if sum(group.shape[0] for group in groups) > sum({ref.storage.key: ref.storage.numel for ref in refs}.values()):
        raise ValueError("groups of the same elements")
    if any(type(storage) is PackedRange for group in groups for storage in group.inputs()):
        problem = "holds the weights in compressed records, which would be unpacked for each parameter"
        raise Unsupported(content.place, problem, "Load it with torch and save it again with torch.save.")
    return groups


def _count_ranks(told: Any, place: Place) -> int:
    counts: list[int] = told if type(told) is list else [told]
    if not all(type(count) is int and count > 0 for count in counts):
        raise ValueError("a number of ranks that is none")
    if min(counts) != max(counts):
        problem = "cuts some parameters over fewer ranks than others, as a DeepSpeed checkpoint with experts does"
        raise TrainingPiece(place, problem, training.DEEPSPEED)
    return max(counts)


def _paddings_in(told: Any) -> tuple[tuple[int, ...], ...] | None:
    if told is None:
        return None
    _check_counts(checked(told, list), list)
    if not all(type(padding) is int and padding >= 0 for paddings in told for padding in paddings):
        raise ValueError("a padding that is none")
    return tuple(map(tuple, told))


def _nbytes_in(value: Any) -> int:
    """Give the bytes of all storages that are named in nested dicts, lists and tuples."""
    storages: dict[str, int] = {}
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        if type(inner) is TensorRef:
            storages[inner.storage.key] = inner.storage.nbytes
        elif isinstance(inner, (dict, list, tuple)) and id(inner) not in seen:
            seen.add(id(inner))
            waiting.extend(inner.values() if isinstance(inner, dict) else inner)
    return sum(storages.values())


def _read_step(content: Content, told: Mapping[str, Any]) -> float | None:
    """Give how many steps the optimizer has made of its first group, where it says so in one of the usual ways."""
    base = told.get("base_optimizer_state") or told.get("optimizer_state_dict")
    step = _at(_at(_at(base, "state"), 0), "step")
    if step is None:
        step = _at(_at(_at(base, "param_groups"), 0), "step")
    if type(step) is TensorRef and step.dtype.tag == "F32" and step.storage.numel == 1:
        from converter.tensors.reader import RangeReader

        ((_, source),) = content.take_sources({"step": step})
        raw = bytearray(4)
        with RangeReader() as reader:
            source.read(0, memoryview(raw), reader)
        return float(struct.unpack("<f", raw)[0])
    return step if type(step) in (int, float) else None


def _at(value: Any, key: Any) -> Any:
    if type(value) is dict:
        return value.get(key)
    return value[0] if type(value) is list and key == 0 and value else None


# What goes together.


def _check_versions(head: _Head, others: Iterable[_Model | _Rank]) -> None:
    for other in others:
        if other.version and head.version and other.version != head.version:
            problem = f"is of DeepSpeed {other.version}, and {head.place.name} of {head.version}"
            raise BadFile(other.place, problem, _MIXED)
        if type(other) is _Model and other.step != head.step:
            problem = f"is of step {other.step}, and {head.place.name} of {head.step}"
            raise BadFile(other.place, problem, _MIXED)


def _check_alike(first: _Rank, other: _Rank, is_last: bool) -> None:
    """Raise BadFile where ranks are of two checkpoints. The last rank's groups may lack their padding."""
    for what, one, two in (
        ("ZeRO stage", first.stage, other.stage),
        ("number of ranks", first.world, other.world),
        ("dtype", first.dtype, other.dtype),
        ("number of groups", len(first.groups), len(other.groups)),
        ("paddings", first.paddings, other.paddings),
        ("step", first.step, other.step),
    ):
        if one != two and (what != "step" or None not in (one, two)):
            said = f" ({two}, and there {one})" if what != "paddings" else ""
            raise BadFile(other.place, f"is of another {what} than {first.place.name}{said}", _MIXED)
    for index, (group, same) in enumerate(zip(first.groups, other.groups, strict=True)):
        if same.shape != group.shape and not (is_last and same.shape < group.shape):
            problem = f"holds {same.shape[0]:,} elements of group {index}, and {first.place.name} {group.shape[0]:,}"
            raise BadFile(other.place, problem, _MIXED)


# Which elements make a parameter.


def _cut_groups(head: _Head, ranks: Sequence[_Rank]) -> Iterator[tuple[str, TensorSource]]:
    """Give the parameters of stages 1 and 2: each rank's run of a group follows that of the rank before.

    ``_zero2_merge_trainable_params`` of ``zero_to_fp32.py``.
    """
    count, groups, paddings = len(ranks), ranks[0].groups, ranks[0].paddings
    if len(head.groups) != len(groups) or (paddings is not None and [*map(len, paddings)] != [*map(len, head.groups)]):
        problem = f"does not hold the groups of parameters that {head.place.name} describes"
        raise BadFile(ranks[0].place, problem, _MIXED)
    for index, shapes in enumerate(head.groups):
        line = _Line(rank.groups[index] for rank in ranks)
        at = 0
        for place, (name, shape) in enumerate(shapes.items()):
            end = at + math.prod(shape)
            if end > line.length:
                raise _too_short(head, name, ranks)
            yield name, _put_together(ranks[0].dtype, shape, line.cut(at, end))
            at = end + (paddings[index][place] if paddings else 0)
        if -(-at // (2 * count)) != -(-line.length // (2 * count)):
            raise _too_long(head, line.length, at, ranks)


def _cut_parameters(head: _Head, ranks: Sequence[_Rank]) -> Iterator[tuple[str, TensorSource]]:
    """Give the parameters of stage 3: each is cut over all ranks, the last of which may have padding.

    ``_zero3_merge_trainable_params`` of ``zero_to_fp32.py``.
    """
    count = len(ranks)
    lines = [_Line(rank.groups) for rank in ranks]
    shapes = [item for group in head.groups for item in group.items()]
    if (len(shapes) + len(head.frozen)) * count > _MAX_BOXES:
        problem = f"describes {len(shapes):,} parameters cut over {count:,} ranks, which is too much to hold"
        raise Unsupported(head.place, problem, _SCRIPT)
    at = 0
    for name, shape in shapes:
        numel = math.prod(shape)
        each = -(-numel // count)
        if at + each > lines[0].length:
            raise _too_short(head, name, ranks)
        parts = (line.cut(at, at + min(each, numel - begin), begin)
                 for begin, line in zip(range(0, numel, each or 1), lines, strict=False))  # fmt: skip
        yield name, _put_together(ranks[0].dtype, shape, chain.from_iterable(parts))
        at += each
    if at != lines[0].length:
        raise _too_long(head, lines[0].length, at, ranks)


def _too_short(head: _Head, name: str, ranks: Sequence[_Rank]) -> BadFile:
    problem = f"describes the parameter {name!r}, and the groups of {ranks[0].place.name} end before it does"
    return BadFile(head.place, problem, _MIXED)


def _too_long(head: _Head, length: int, at: int, ranks: Sequence[_Rank]) -> BadFile:
    problem = f"describes {at:,} elements of a group, and there are {length:,} from {ranks[0].place.name} on"
    return BadFile(head.place, problem, _MIXED)


def _put_together(dtype: DType, shape: tuple[int, ...], parts: Iterable[Box]) -> TensorSource:
    boxes = tuple(parts)
    if len(boxes) == 1 and type(boxes[0].source) is View and boxes[0].source.is_contiguous:
        return boxes[0].source._replace(shape=shape, strides=contiguous_strides(shape))
    return Boxes(dtype, shape, boxes)


# Universal checkpoints.


def _place_of(folder: Place, name: str) -> Place:
    if name in ("", ".", "..") or any(sign in name for sign in ("/", "\\", "\0")):
        raise HostileFile(folder.parent, f"names a parameter {name!r}, which is no name of a folder")
    return folder / name / "fp32.pt"


def _read_parameter(place: Place, strip_code: bool) -> TensorSource:
    if not place.is_file():
        raise BadFile(place, "is not there, and the model states name its parameter", "Fetch it.")
    with _opened(place, strip_code) as content:
        value = content.pickled.value
        ref = checked(value["param"] if type(value) is dict else value, TensorRef)
        ((_, source),) = content.take_sources({"param": ref})
        return source


def _shaped(source: TensorSource, shape: tuple[int, ...], place: Place) -> TensorSource:
    """Give a tensor, which may be flat, in its shape."""
    if source.shape == shape:
        return source
    if source.shape != (math.prod(shape),):
        raise BadFile(place, f"is of shape {list(source.shape)}, and the model states say {list(shape)}", _MIXED)
    return _put_together(source.dtype, shape, [Box((0,), source)])


# All that there is.


def _gather(
    form: str,
    head: _Head,
    models: Sequence[_Model],
    parameters: Mapping[str, TensorSource],
    reading: Reading,
    left: Sequence[str],
    foreign: Iterable[Mapping[str, str]],
) -> WeightsFile:
    """Give all tensors in DeepSpeed's order: buffers, frozen parameters, others, and the second names of those.

    Whatever else the model has comes last.
    """
    module, is_cut = head.module, head.is_cut
    for name, shape in (*((name, source.shape) for name, source in parameters.items()), *head.frozen.items()):
        own = module.get(name)
        if own is None or (not is_cut and type(own) is TensorRef and own.shape != shape):
            said = "is not there" if own is None else f"is of shape {list(own.shape)}"
            problem = f"describes a parameter {name!r} of shape {list(shape)}, and in its module it {said}"
            raise BadFile(head.place, problem, _DAMAGED)
    buffers = {name: ref for name, ref in module.items() if name in head.buffer_names and type(ref) is TensorRef}
    frozen = _join_frozen(head, models) if is_cut else _find_frozen(head)
    taken: dict[str, Any] = {**buffers, **frozen, **parameters}
    if len(taken) != len(buffers) + len(frozen) + sum(map(len, head.groups)):
        raise BadFile(head.place, "describes a parameter twice", _DAMAGED)
    for name, kept in head.shared.items():
        own = module.get(name)
        is_same = is_cut or (type(own) is TensorRef and type(kept) is str and own.shape == _shape_in(taken, kept))
        if type(name) is str and type(kept) is str and kept in taken and name not in taken and is_same:
            taken[name] = taken[kept]
    notes = [*_note_dtypes(head, parameters), *_take_rest(head, taken, reading)]
    refs: dict[str, AnyTensor] = {name: value for name, value in taken.items() if type(value) in (TensorRef, Listed)}
    notes += head.content.notes_on(refs)
    taken.update(head.content.take_sources(refs))
    check_lengths(taken, head.place)
    all_foreign = dict(head.content.pickled.foreign)
    for other in (*(model.foreign for model in models), *foreign):
        all_foreign |= other
    notes.append(f"left out: {name_some([*left, *head.left], _MAX_NAMED)}")
    tensors = tuple(Tensor(name, source) for name, source in taken.items())
    return WeightsFile(head.place, form, tensors, {}, (*notes, *note_foreign(all_foreign)), all_foreign)


def _shape_in(taken: Mapping[str, Any], name: str) -> tuple[int, ...] | None:
    return taken[name].shape if name in taken else None


def _find_frozen(head: _Head) -> dict[str, TensorRef]:
    """Give the frozen parameters of stages 1 and 2, which the first rank has whole."""
    with _as_written(head.place):
        found = {name: checked(head.fragments.get(name) or head.module[name], TensorRef) for name in head.frozen}
    for name, ref in found.items():
        if ref.shape != head.frozen[name]:
            problem = f"holds {name!r} in shape {list(ref.shape)}, and says that it is {list(head.frozen[name])}"
            raise BadFile(head.place, problem, _DAMAGED)
    return found


def _join_frozen(head: _Head, models: Sequence[_Model]) -> dict[str, TensorSource]:
    """Give the frozen parameters of stage 3, cut as all others are (``_zero3_merge_frozen_params``)."""
    with _as_written(head.place):
        first = dict(_take_runs(head.content, {name: head.fragments[name] for name in head.frozen}, _MAX_BOXES))
    count = 1 + len(models)
    joined: dict[str, TensorSource] = {}
    for name, shape in head.frozen.items():
        numel = math.prod(shape)
        each = -(-numel // count)
        parts = [first[name]]
        for model in models:
            part = model.fragments.get(name)
            if part is None or part.dtype is not parts[0].dtype:
                problem = f"lacks its part of {name!r}, of which {head.place.name} has one"
                raise BadFile(model.place, problem, _MIXED)
            parts.append(part)
        if each and any(part.shape != (each,) for part in parts):
            problem = f"says that {name!r} is of shape {list(shape)}, and the {count:,} ranks' parts are of others"
            raise BadFile(head.place, problem, _MIXED)
        joined[name] = _put_together(parts[0].dtype, shape, _Line(parts).cut(0, numel))
    return joined


def _take_rest(head: _Head, taken: dict[str, Any], reading: Reading) -> list[str]:
    """Take what the model has besides, and give notes on it: second names of tensors, and what no optimizer has.

    Before DeepSpeed noted which are shared, tensors that lie in the same place tell it.
    """
    is_cut = head.is_cut
    kept_at: dict[Any, str | None] = {}
    for name in taken:
        own = head.module.get(name)
        if type(own) is TensorRef:
            at = own.storage.key if is_cut and 0 in own.shape else own
            first = kept_at.setdefault(at, name)
            if first and taken[first] is not taken[name]:
                kept_at[at] = None  # in the same place, and yet two
    others = {name: own for name, own in head.module.items() if name not in taken}
    no_tensors = {name: own for name, own in others.items() if type(own) not in (TensorRef, Listed)}
    unreadable = unreadable_in(no_tensors, True)
    if unreadable and not reading.skip_unreadable:
        refuse_unreadable(unreadable, head.place)
    left = [str(name)[:_MAX_LENGTH] for name in no_tensors if name not in unreadable]
    rest: list[str] = []
    for name, own in others.items():
        if name in no_tensors:
            continue
        if type(own) is Listed:
            taken[name] = own  # for what is said of it where tensors are taken
        elif is_cut and 0 in own.shape:
            kept = kept_at.get(own.storage.key)
            if not kept:
                raise BadFile(head.place, f"does not say where the elements of {name!r} lie", _DAMAGED)
            taken[name] = taken[kept]
        else:
            kept = None if 0 in own.shape else kept_at.get(own)
            taken[name] = taken[kept] if kept else own
            rest += [] if kept else [name]
    spelled = [f"{str(name)[:_MAX_LENGTH]} ({why})" for name, why in unreadable.items()]
    return [
        f"{what}: {name_some(names, _MAX_NAMED)}"
        for what, names in (
            ("of no optimizer, so taken as the model itself has it", rest),
            ("tensors that cannot be read are left out", spelled),
            ("no tensors, so left out of the model", left),
        )
        if names
    ]


def _note_dtypes(head: _Head, parameters: Mapping[str, TensorSource]) -> Iterator[str]:
    """Say which of two copies of the weights is taken, and how to have the other."""
    tags = {source.dtype.torch_name for source in parameters.values()}
    own = {ref.dtype.torch_name for name, ref in head.module.items() if name in parameters and type(ref) is TensorRef}
    if tags:
        is_double = not head.is_cut and own != tags
        way = f"; --key module takes the {' and '.join(sorted(own))} copies" if is_double else ""
        yield f"the weights are the optimizer's {' and '.join(sorted(tags))} master copies{way}"

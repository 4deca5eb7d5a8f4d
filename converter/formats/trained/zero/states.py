"""What the files of DeepSpeed's ranks say: model states, and those of optimizers."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from converter.dtypes import DType
from converter.errors import BadFile, TrainingPiece, Unsupported
from converter.formats.torch.content import Content
from converter.formats.torch.files import open_content
from converter.formats.torch.modules import spell_key
from converter.formats.torch.rebuild import TensorRef, checked, shape_of
from converter.formats.torch.state_dict import Reading, nbytes_in
from converter.formats.trained import pieces
from converter.storage import OpenFile, Place
from converter.tensors.base import MAX_TENSORS, PackedRange, TensorSource

_GROUPS = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups", 3: "fp32_flat_groups"}
# What is read of model states, or says nothing that weights could lose.
_READ = frozenset(
    {
        "module", "buffer_names", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "shared_params",
        "ds_version", "ds_config", "dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions",
    }
)  # fmt: skip
_KEPT_NBYTES = 1 << 16  # most of what describes a file is within it, and needs no second request over a network
_MAX_LENGTH = 200  # of a version that is spelled to people
DAMAGED = "The file is damaged: fetch it again."
SCRIPT = "'python zero_to_fp32.py CHECKPOINT OUT', a script that DeepSpeed puts beside it, may read it."


class Head(NamedTuple):
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
        return re.fullmatch(pieces.ZERO_MODEL, self.place.name) is not None


class Model(NamedTuple):
    """What the model states of another rank say: its parts of frozen parameters."""

    place: Place
    version: str
    step: str
    fragments: dict[str, TensorSource]
    foreign: Mapping[str, str]


class Optimizer(NamedTuple):
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


@contextmanager
def as_written(place: Place) -> Iterator[None]:
    """Raise BadFile where what is looked for is not there, or is of another type."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise BadFile(place, "is not as DeepSpeed writes it", DAMAGED) from error


@contextmanager
def opened(place: Place, strip_code: bool) -> Iterator[Content]:
    """Open a file, all but the head's, and read what its pickle says."""
    with place.open() as file, as_written(place):
        file.keep(0, _KEPT_NBYTES)
        yield open_content(file, strip_code)


def read_head(file: OpenFile, reading: Reading) -> Head:
    """Read the model states of the first rank. Raises TrainingPiece where they are a part of a model."""
    place = file.ref.place
    with as_written(place):
        content = open_content(file, reading.strip_code)
        told = checked(content.pickled.value, dict)
        _refuse_parallel(told, place)
        groups = told["param_shapes"]
        if type(groups) is dict:  # as before there were groups
            groups = [groups]
        return Head(
            content.without_value(),
            checked(told["module"], dict),
            frozenset(checked(name, str) for name in checked(told["buffer_names"], list)),
            tuple(_shapes_in(checked(groups, list))),
            next(_shapes_in([told.get("frozen_param_shapes") or {}])),
            checked(told.get("frozen_param_fragments") or {}, dict),
            checked(told.get("shared_params") or {}, dict),
            _plain(told.get("ds_version")),
            _plain(told.get("global_steps")),
            tuple(spell_key(key) for key, value in told.items() if key not in _READ and value is not None),
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
        raise TrainingPiece(place, "is of a pipeline-parallel DeepSpeed checkpoint", pieces.DEEPSPEED)
    if told.get("mp_world_size") not in (1, None) or degrees.get("tp_degree", 1) != 1:
        raise TrainingPiece(place, *pieces.TENSOR_PARALLEL)
    if told.get("ds_autoep_layers") or told.get("autoep_layers"):
        raise TrainingPiece(place, "is of a DeepSpeed checkpoint whose experts are cut up (AutoEP)", pieces.DEEPSPEED)


def read_model(place: Place, strip_code: bool, most: int) -> Model:
    """Read the model states of another rank, with so many parts of parameters at most."""
    with opened(place, strip_code) as content:
        told = checked(content.pickled.value, dict)
        fragments = told.get("frozen_param_fragments") or {}
        runs = dict(take_runs(content, checked(fragments, dict), most))
        return Model(
            place, _plain(told.get("ds_version")), _plain(told.get("global_steps")), runs, content.pickled.foreign
        )


def take_runs(content: Content, refs: Mapping[str, Any], most: int) -> Iterator[tuple[str, TensorSource]]:
    """Give tensors of one axis, none of them strided. Raises TypeError for anything else.

    Raises Unsupported where there are so many that those of all ranks would take too much memory.
    """
    if len(refs) > most:
        raise Unsupported(content.place, f"holds {len(refs):,} parts of weights, too many for so many ranks", SCRIPT)
    for ref in refs.values():
        if type(ref) is not TensorRef or len(ref.shape) != 1 or (ref.shape[0] > 1 and ref.strides != (1,)):
            raise TypeError("a tensor that is no run of elements")
    return content.take_sources(dict(refs))


def read_optimizer(place: Place, strip_code: bool, most: int) -> Optimizer:
    """Read the optimizer's states of a rank, with so many runs at most."""
    with opened(place, strip_code) as content:
        value = checked(content.pickled.value, dict)
        told = checked(value["optimizer_state_dict"], dict)
        # BF16_Optimizer, a ZeRO-1 of its own, does not say (``deepspeed/runtime/bf16_optimizer.py``).
        stage = checked(told.get("zero_stage", 1), int)
        if stage not in _GROUPS:
            raise BadFile(place, f"is of ZeRO stage {stage}, which there is not", DAMAGED)
        groups = _take_groups(content, checked(told[_GROUPS[stage]], list), most)
        return Optimizer(
            place,
            stage,
            _count_ranks(told["partition_count"], place),
            _plain(value.get("ds_version")),
            _paddings_in(told.get("param_alignment_paddings")),
            groups,
            _read_step(content, told),
            nbytes_in(value, set()) - nbytes_in(told[_GROUPS[stage]], set()),
            content.pickled.foreign,
        )


def _take_groups(content: Content, refs: list[Any], most: int) -> tuple[TensorSource, ...]:
    """Give the runs of a rank. Raises TypeError or ValueError for what is none, or has more elements than are there."""
    groups = tuple(
        source for _, source in take_runs(content, {str(index): ref for index, ref in enumerate(refs)}, most)
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
        raise TrainingPiece(place, problem, pieces.DEEPSPEED)
    return max(counts)


def _paddings_in(told: Any) -> tuple[tuple[int, ...], ...] | None:
    if told is None:
        return None
    _check_counts(checked(told, list), list)
    if not all(type(padding) is int and padding >= 0 for paddings in told for padding in paddings):
        raise ValueError("a padding that is none")
    return tuple(map(tuple, told))


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

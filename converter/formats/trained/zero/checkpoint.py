"""A checkpoint of ZeRO as a whole: which files there are, whether they go together, and what they make."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

from zlib_ng.zlib_ng import crc32, crc32_combine

from converter.errors import BadFile, BadRequest, HostileFile, spell_size
from converter.formats.torch import files
from converter.formats.torch.rebuild import TensorRef, checked
from converter.formats.torch.state_dict import Reading
from converter.formats.trained import pieces
from converter.formats.trained.zero.cut import MAX_BOXES, cut_groups, cut_parameters, unflatten
from converter.formats.trained.zero.states import Head, Model, Optimizer, opened, read_head, read_model, read_optimizer
from converter.formats.trained.zero.whole import gather
from converter.storage import OpenFile, Place, is_bare, list_entries, natural_key
from converter.storage.far import look_at_each
from converter.tensors.base import TensorSource, WeightsFile
from converter.tensors.derived import Box


class _Names(NamedTuple):
    """The files of a checkpoint, by rank. Where the model is not partitioned it has one file, which is of no rank."""

    optimizers: dict[int, str]
    models: dict[int, str]
    is_cut: bool


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
    if names.is_cut != (stage == 3):
        raise BadFile(ranks[0].place, f"is of ZeRO stage {stage}, and {file.ref.place.name} is not", pieces.MIXED)
    models = _read_models(folder, names, reading, count)
    head = read_head(file, reading)
    _check_versions(head, (*models, *ranks))
    parameters = dict((cut_parameters if stage == 3 else cut_groups)(head, ranks))
    left = f"optimizer_state_dict ({spell_size(sum(rank.left_nbytes for rank in ranks))})"
    return gather("ZeRO", head, (*models, *ranks), parameters, reading, left)


def _read_universal(file: OpenFile, reading: Reading, names: _Names) -> WeightsFile:
    """Read what ``ds_to_universal.py`` made: a file for each parameter, beside the model states as they were."""
    folder = file.ref.place.parent
    models = _read_models(folder, names, reading, len(names.models))
    head = read_head(file, reading)
    _check_versions(head, models)
    shapes = {name: shape for group in head.groups for name, shape in group.items()}
    places = [_place_of(folder / pieces.ZERO_UNIVERSAL, name) for name in shapes]
    read = look_at_each(partial(_read_parameter, strip_code=reading.strip_code), places)
    parameters = {name: _shaped(source, shape, where)
                  for (name, shape), source, where in zip(shapes.items(), read, places, strict=True)}  # fmt: skip
    left = f"the optimizer's states in {pieces.ZERO_UNIVERSAL}"
    return gather("ZeRO, universal", head, models, parameters, reading, left)


def _find_names(place: Place) -> _Names:
    """Sort the files beside one by rank. Raises TrainingPiece for those of other kinds of parallelism."""
    folder = place.parent
    names = _Names({}, {}, re.fullmatch(pieces.ZERO_MODEL, place.name) is not None)
    for name in sorted((entry.name for entry in list_entries(folder)), key=natural_key):
        for pattern, known in ((pieces.ZERO_OPTIMIZER, names.optimizers), (pieces.ZERO_MODEL, names.models)):
            match = re.fullmatch(pattern, name)
            if match:
                if known.setdefault(int(match[1]), name) != name:
                    problem = f"holds two files of rank {int(match[1])}: {known[int(match[1])]} and {name}"
                    raise BadFile(folder, problem, pieces.MIXED)
                break
        else:
            if re.fullmatch(pieces.ZERO_PIECES, name):
                pieces.check_name(folder / name)
    if names.models and not names.is_cut:
        problem = f"holds model states of two kinds: {place.name} and {names.models[min(names.models)]}"
        raise BadFile(folder, problem, pieces.MIXED)
    return names


def _read_key(file: OpenFile, reading: Reading, names: _Names) -> WeightsFile:
    """Read a state dict of the model states alone, such as the weights as the model itself had them."""
    if names.is_cut:
        problem = f"has no whole tensors at {reading.key!r}: at ZeRO stage 3 the model's own are cut up, or empty"
        raise BadRequest(file.ref.place, problem, "Leave out --key.")
    return files.read_file(file, reading)


def _read_models(folder: Place, names: _Names, reading: Reading, count: int) -> list[Model]:
    """Read the model states of all ranks but the first, where each has its own."""
    if not names.is_cut:
        return []
    pieces.check_ranks(folder, "model states", names.models, count)
    read = partial(read_model, strip_code=reading.strip_code, most=MAX_BOXES // count)
    return list(look_at_each(read, [folder / names.models[rank] for rank in range(1, count)]))


def _read_optimizers(folder: Place, names: _Names, reading: Reading) -> list[Optimizer]:
    """Read the optimizer's states of all ranks, in order. Raises BadFile where they do not go together."""
    ordered = [folder / names.optimizers[rank] for rank in sorted(names.optimizers)]
    read = partial(read_optimizer, strip_code=reading.strip_code, most=MAX_BOXES // len(ordered))
    first = read(ordered[0])
    pieces.check_ranks(folder, "optimizer's states", names.optimizers, first.world)
    ranks = [first]
    for rank in look_at_each(read, ordered[1:]):
        _check_alike(first, rank, rank.stage < 3 and len(ranks) == first.world - 1)
        ranks.append(rank)
    _check_distinct(ranks)
    return ranks


def _check_versions(head: Head, others: Iterable[Model | Optimizer]) -> None:
    for other in others:
        if other.version and head.version and other.version != head.version:
            problem = f"is of DeepSpeed {other.version}, and {head.place.name} of {head.version}"
            raise BadFile(other.place, problem, pieces.MIXED)
        if type(other) is Model and other.step != head.step:
            problem = f"is of step {other.step}, and {head.place.name} of {head.step}"
            raise BadFile(other.place, problem, pieces.MIXED)


def _check_alike(first: Optimizer, other: Optimizer, is_last: bool) -> None:
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
            raise BadFile(other.place, f"is of another {what} than {first.place.name}{said}", pieces.MIXED)
    for index, (group, same) in enumerate(zip(first.groups, other.groups, strict=True)):
        if same.shape != group.shape and not (is_last and same.shape < group.shape):
            problem = f"holds {same.shape[0]:,} elements of group {index}, and {first.place.name} {group.shape[0]:,}"
            raise BadFile(other.place, problem, pieces.MIXED)


def _check_distinct(ranks: Iterable[Optimizer]) -> None:
    """Raise BadFile where the weights of two ranks are the same by their CRC32s: one file lies there under two names.

    Ranks that have nothing but padding hold zeros alone.
    """
    known: dict[str, Place] = {}
    for rank in ranks:
        stored = [storage for group in rank.groups for storage in group.inputs()]
        sums = [(storage.crc32, storage.nbytes) for storage in stored]
        if any(crc is None for crc, _ in sums) or all(crc == _crc_of_zeros(nbytes) for crc, nbytes in sums):
            continue
        first = known.setdefault(str(sums), rank.place)
        if first is not rank.place:
            problem = f"holds the same weights as {first.name}, and each rank has its own"
            raise BadFile(rank.place, problem, pieces.MIXED)


def _crc_of_zeros(nbytes: int) -> int:
    crc, known, length = 0, crc32(b"\0"), 1
    while length <= nbytes:
        if nbytes & length:
            crc = crc32_combine(crc, known, length)
        known, length = crc32_combine(known, known, length), 2 * length
    return crc


def _place_of(folder: Place, name: str) -> Place:
    if not is_bare(name):
        raise HostileFile(folder.parent, f"names a parameter {name!r}, which is no name of a folder")
    return folder / name / "fp32.pt"


def _read_parameter(place: Place, strip_code: bool) -> TensorSource:
    if not place.is_file():
        raise BadFile(place, "is not there, and the model states name its parameter", "Fetch it.")
    with opened(place, strip_code) as content:
        value = content.pickled.value
        ref = checked(value["param"] if type(value) is dict else value, TensorRef)
        ((_, source),) = content.take_sources({"param": ref})
        return source


def _shaped(source: TensorSource, shape: tuple[int, ...], place: Place) -> TensorSource:
    """Give a tensor, which may be flat, in its shape."""
    if source.shape == shape:
        return source
    if source.shape != (math.prod(shape),):
        raise BadFile(place, f"is of shape {list(source.shape)}, and the model states say {list(shape)}", pieces.MIXED)
    return unflatten(source.dtype, shape, [Box((0,), source)])

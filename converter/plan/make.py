"""What will be written, byte for byte: checkpoints in, a Plan out, made once. Nothing here touches a disk.

Everything follows from the headers: sizes, offsets, shard boundaries, headers and index are known before a byte moves.
Printing a Plan is the dry run; pickling it sends it elsewhere.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from converter.dtypes import DType, OnOverflow
from converter.errors import BadRequest, OutputExists, OutputRefused, Unsupported
from converter.formats import WRITERS
from converter.libraries import library_of
from converter.libraries.base import DTYPE_KEYS
from converter.models.checkpoint import Checkpoint
from converter.models.component import WeightSet
from converter.models.configs import render_json
from converter.models.index import WeightIndex
from converter.models.model import Model
from converter.models.names import WeightsName
from converter.plan.shards import split_into_shards
from converter.plan.types import (
    Order,
    Plan,
    PlannedFile,
    PlannedSet,
    PlannedTensor,
    Publishing,
    Rest,
    Target,
    Writing,
)
from converter.storage import Place
from converter.tensors.base import Tensor, WeightsFile
from converter.tensors.view import View

_Existing = Mapping[tuple[str, WeightsName], Sequence[WeightSet]]
_NOTHING = Rest()
# Of the bytes after the header: what ModelSpec calls so, and ``addnet_hash_safetensors`` in kohya's ``train_util.py``.
# The last is of a part of the whole file, with its header (``addnet_hash_legacy`` there).
_OF_NAMES_TOO = "sshs_legacy_hash"
_HASHES = ("modelspec.hash_sha256", "sshs_model_hash", _OF_NAMES_TOO)


def make_plan(
    model: Model,
    orders: Sequence[Order],
    target: Target,
    writing: Writing,
    publishing: Publishing,
    rest: Rest = _NOTHING,
    on_overflow: OnOverflow = "error",
) -> Plan:
    """Plan to write sets; what would come out as it lies there is left out.

    Raises BadRequest, OutputRefused or Unsupported for what cannot or must not be done.
    """
    existing = _by_name(target)
    written, kept = _plan_sets(orders, writing, existing, publishing)
    if kept and not written:
        there = target.folder / kept[0]
        raise OutputExists(there, "exists", "Use --overwrite to write it again, or -o for a new folder.")
    sets = tuple(planned for _, planned in written)
    _check_collisions(model, sets)
    replaced = () if target.is_new else tuple(_find_replaced(existing, sets, publishing))
    generated = {**rest.generated, **dict(_configs_of(model, written, target))}
    removed = tuple(_find_removed(written, replaced)) if publishing.delete_source else ()
    return Plan(
        source=model,
        target=target,
        sets=sets,
        copied=tuple((name, file) for name, file in rest.copied if name not in generated),
        generated=tuple(generated.items()),
        replaced=replaced,
        removed_sources=removed,
        notes=(*rest.notes, *(f"{path} is there already, and stays as it is" for path in kept)),
        dtype=next((order.dtype for order in orders if order.dtype), None),
        on_overflow=on_overflow,
        overwrite=publishing.overwrite,
        quantized=rest.quantized,
        destroys_source=bool(removed) or any(name in replaced for name, _ in _read_here(written)),
    )


def _plan_sets(
    orders: Iterable[Order], writing: Writing, existing: _Existing, publishing: Publishing
) -> tuple[list[tuple[Order, PlannedSet]], list[str]]:
    """Plan the sets that are to be written, and name those that are there: skipped, or in the dtype of a recast."""
    written: list[tuple[Order, PlannedSet]] = []
    kept: list[str] = []
    for order in orders:
        planned = plan_set(order, writing)
        there = existing.get((order.component.name, planned.name), ())
        is_others = there and planned.source not in there
        is_recast = order.dtype and not publishing.overwrite and planned.name != order.checkpoint.name
        if (there and is_recast) or (is_others and publishing.skip_existing):
            kept.append(planned.files[0].path)
        elif not _is_there(planned, order.checkpoint, there):
            written.append((order, planned))
    return written, kept


def _read_here(written: Iterable[tuple[Order, PlannedSet]]) -> Iterator[tuple[str, Place]]:
    """Give the files that are read in the very folder that is written to, by their paths from it."""
    for order, planned in written:
        if order.is_beside:
            for name in planned.source.all_names:
                yield join(planned.component, name), planned.source.folder / name


def _find_removed(written: Sequence[tuple[Order, PlannedSet]], replaced: Iterable[str]) -> Iterator[Place]:
    """List the files of what is read, but for those whose names are written or replaced."""
    outputs = {*replaced, *(file.path for _, planned in written for file in planned.files)}
    outputs |= {planned.index[0] for _, planned in written if planned.index}
    spared = {place for name, place in _read_here(written) if name in outputs}
    places = (planned.source.folder / name for _, planned in written for name in planned.source.all_names)
    return (place for place in places if place not in spared)


def _configs_of(
    model: Model, written: Iterable[tuple[Order, PlannedSet]], target: Target
) -> Iterator[tuple[str, bytes]]:
    """Give each config.json that is not as it was read: what a transform has changed, and the dtype of a recast."""
    read = {component.name: component.config for component in model.components}
    for order, planned in written:
        component = order.component
        is_bare = model.kind == "file" and not component.companions
        config = component.config if is_bare else _with_dtype(order, planned)
        if config != read.get(component.name, component.config):
            yield join(component.name, "config.json"), render_json(config)


def join(component: str, name: str) -> str:
    """Give the path of a file from the folder above its component."""
    return (PurePosixPath(component) / name).as_posix()


def _by_name(target: Target) -> _Existing:
    by_name: dict[tuple[str, WeightsName], list[WeightSet]] = defaultdict(list)  # there may be thousands of variants
    for component, weight_sets in target.existing.items():
        for weight_set in weight_sets:
            by_name[component, weight_set.name].append(weight_set)
    return by_name


def _is_there(planned: PlannedSet, checkpoint: Checkpoint, existing: Sequence[WeightSet]) -> bool:
    """Say whether a set would come out as it lies there: in place, with the same names and the same boundaries.

    ``existing`` are the sets of its name.
    """
    if planned.source not in existing or planned.source.is_legacy or checkpoint.is_renamed:
        return False
    before = [{tensor.name for tensor in file.tensors} for file in checkpoint.files]
    after = [{tensor.name for tensor, _ in file.tensors} | file.ties.keys() for file in planned.files]
    return before == after and not any(file.computes for file in planned.files)


def _check_collisions(model: Model, sets: Sequence[PlannedSet]) -> None:
    seen: dict[tuple[str, WeightsName], PlannedSet] = {}
    for planned in sets:
        first = seen.setdefault((planned.component, planned.name), planned)
        if first is not planned:
            names = f"{first.source.path.name} and {planned.source.path.name}"
            problem = f"{names} would both become {planned.name.single}"
            are_variants = first.source.name.variant != planned.source.name.variant
            advice = "Choose one with --from-variant." if are_variants else "Convert one of them: name its file."
            raise BadRequest(model.path, problem, advice)


def _find_replaced(existing: _Existing, sets: Sequence[PlannedSet], publishing: Publishing) -> Iterator[str]:
    """List the files of sets that the new ones replace: same folder, stem, variant and format, all of their files."""
    for planned in sets:
        for old in existing.get((planned.component, planned.name), ()):
            if not (publishing.overwrite or (publishing.in_place and old == planned.source)):
                refused = OutputRefused if old == planned.source else OutputExists
                raise refused(old.path, "exists", "Use --overwrite to replace it, or -o for another place.")
            yield from (join(planned.component, name) for name in old.all_names)


def plan_set(order: Order, writing: Writing) -> PlannedSet:
    """Plan one set: its files and its index. Raises BadRequest or Unsupported for what no loader would take."""
    component, checkpoint, name, ties, dtype, _ = order
    groups = [[tensor for tensor in file.tensors if tensor.name not in ties] for file in checkpoint.files]
    if writing.max_shard_size is not None:
        units = _units(itertools.chain.from_iterable(groups))
        parts = split_into_shards([sum(t.nbytes for t in unit) for unit in units], writing.max_shard_size)
        groups = [[tensor for place in part for tensor in units[place]] for part in parts]
    groups = [group for group in groups if group] or [[]]
    if dtype or writing.variant:
        _check_tag(order)
    names = (tensor.name for tensor in checkpoint.tensors)
    refused = None if writing.force else library_of(component).refuses(component, name, len(groups), names)
    if refused:
        raise Unsupported(checkpoint.weight_set.path, *refused)
    paths = [join(component.name, file_name) for file_name in name.files(len(groups))]
    checkpoint, stale = _without_stale_hashes(checkpoint, name, groups)
    order = order._replace(checkpoint=checkpoint)
    noted = checkpoint.ties  # once for all files: there may be hundreds, of 100,000 tensors
    files = tuple(_plan_file(order, path, group, noted) for path, group in zip(paths, groups, strict=True))
    index = (join(component.name, name.index), _build_index(checkpoint, files).render()) if len(files) > 1 else None
    notes = (*checkpoint.notes, *stale)
    return PlannedSet(
        component.name, checkpoint.weight_set, name, files, index, ties, checkpoint.kept, notes, checkpoint.renamed
    )


def _without_stale_hashes(
    checkpoint: Checkpoint, name: WeightsName, groups: Sequence[Sequence[Tensor]]
) -> tuple[Checkpoint, tuple[str, ...]]:
    """Leave out of headers' notes the hashes that are no longer those of what is written, and note which."""
    noted = [key for key in _HASHES if any(key in file.metadata for file in checkpoint.files)]
    if not noted or name.format != "safetensors":  # no other has such notes
        return checkpoint, ()
    is_same = len(checkpoint.files) == len(groups) == 1 and _holds_same_data(checkpoint.files[0], groups[0])
    stale = [key for key in noted if not is_same or (key == _OF_NAMES_TOO and checkpoint.is_renamed)]
    if not stale:
        return checkpoint, ()
    files = (
        replace(file, metadata={key: note for key, note in file.metadata.items() if key not in stale})
        for file in checkpoint.files
    )
    note = f"left out of the header: {', '.join(stale)}, a hash of what is no longer what the file holds"
    return replace(checkpoint, files=tuple(files)), (note,)


def _holds_same_data(file: WeightsFile, tensors: Sequence[Tensor]) -> bool:
    """Say whether a safetensors file of these tensors has after its header the very bytes that a file has there."""
    if file.data_nbytes != sum(tensor.nbytes for tensor in tensors):
        return False
    layout = WRITERS["safetensors"].lay_out([tensor.spec for tensor in tensors], {}, {})
    places = [
        (tensors[at], offset - len(layout.header)) for at, offset in zip(layout.order, layout.offsets, strict=True)
    ]
    storages = (storage for tensor in tensors for storage in tensor.source.inputs())
    begin = min((storage.offset for storage in storages), default=0)
    return all(_lies_at(tensor, file.place, begin + offset) for tensor, offset in places)


def _check_tag(order: Order) -> None:
    """Refuse to name weights for a dtype that they do not have, by a tag that is asked for or stays in a recast."""
    named, dtype = order.name.tagged_dtype, order.dtype
    if named is None:
        return
    floats = sorted({tensor.dtype.short_name for tensor in order.checkpoint.tensors if tensor.dtype.is_floating})
    held = [dtype.short_name] if dtype else floats
    if not floats or named.short_name in held:
        return
    advice = f"Use --dtype {named.short_name}, or --variant {held[0]}."
    problem = f"would be named {order.name.variant} and hold {' and '.join(held)}"
    raise BadRequest(order.checkpoint.weight_set.path, problem, advice)


def _units(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Group tensors that must come into one file."""
    units: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        units.setdefault(tensor.beside or tensor.name, []).append(tensor)
    return list(units.values())


def _plan_file(order: Order, path: str, tensors: Sequence[Tensor], noted: Container[str]) -> PlannedFile:
    """Plan a file; with it go the source's notes, but for those (``noted``) that tie a name to a tensor elsewhere."""
    names = {tensor.name for tensor in tensors}
    ties = {dropped: kept for dropped, kept in order.ties.items() if kept in names}
    metadata = order.checkpoint.metadata.items()
    notes = {key: value for key, value in metadata if key != "format" and (key not in noted or value in names)}
    try:
        layout = WRITERS[order.name.format].lay_out([tensor.spec for tensor in tensors], ties, notes)
    except ValueError as error:
        problem, *advice = error.args
        where = order.checkpoint.weight_set.path
        raise Unsupported(where, problem, *(advice or ["Rename or recast the tensor before."])) from None
    planned = (PlannedTensor(tensors[place], at) for place, at in zip(layout.order, layout.offsets, strict=True))
    file = PlannedFile(path, order.name.format, layout.header, tuple(planned), layout.nbytes, ties)
    return _link_if_same(file, order.checkpoint) if order.is_beside and not order.checkpoint.is_renamed else file


def _link_if_same(planned: PlannedFile, checkpoint: Checkpoint) -> PlannedFile:
    """Let a file be linked to one of the set that it replaces, where it would be the same, byte for byte."""
    for file in checkpoint.files:
        same_bytes = (
            file.format == planned.format == "safetensors"
            and len(planned.tensors) == len(file.tensors)
            and all(_lies_at(tensor, file.place, offset) for tensor, offset in planned.tensors)
            and {"format": "pt", **file.metadata} == file.metadata
        )
        if same_bytes:
            return replace(planned, link=file.place)
    return planned


def _lies_at(tensor: Tensor, file: Place, offset: int) -> bool:
    """Say whether a tensor of a safetensors file is written where it lies, as it is."""
    source = tensor.source
    if not isinstance(source, View) or not source.is_contiguous or source.start:
        return False
    return (source.storage.file.place, source.storage.offset) == (file, offset)


def _build_index(checkpoint: Checkpoint, files: Sequence[PlannedFile]) -> WeightIndex:
    tensors = [tensor for file in files for tensor, _ in file.tensors]
    metadata = {
        "total_parameters": sum(tensor.numel for tensor in tensors if tensor.file is not None),
        **checkpoint.index_metadata,
        "total_size": sum(tensor.nbytes for tensor in tensors),
    }
    placed = [(file, PurePosixPath(file.path).name) for file in files]
    weight_map = {tensor.name: name for file, name in placed for tensor, _ in file.tensors}
    aliases = {dropped: name for file, name in placed if file.format == "torch" for dropped in file.ties}
    return WeightIndex({**weight_map, **aliases}, metadata)


def _with_dtype(order: Order, planned: PlannedSet) -> dict[str, Any]:
    """Give the config.json of a component that is recast, untagged, into a new folder: with its new dtype.

    A variant shares its config.json with the others, so that stays. Training keeps weights in another dtype than the
    config of a model says, and transformers would round them to that.
    """
    component = order.component
    dtype = order.dtype or _dtype_of_training(order)
    if dtype is None or planned.name.variant is not None or order.is_beside:
        return component.config
    return library_of(component).cast_config(component, component.config, dtype)


def _dtype_of_training(order: Order) -> DType | None:
    """Give the one floating dtype of a training checkpoint whose config says one."""
    if not order.checkpoint.weight_set.is_of_many or not any(order.component.config.get(key) for key in DTYPE_KEYS):
        return None
    dtypes = {tensor.dtype for tensor in order.checkpoint.tensors if tensor.dtype.is_floating}
    return dtypes.pop() if len(dtypes) == 1 else None

"""What will be written, byte for byte: checkpoints and wishes in, a Plan out. Nothing here touches the disk.

Everything follows from the headers: sizes, offsets, shard boundaries, headers and index are known before a byte moves.
Printing a Plan is the dry run; pickling it sends it elsewhere.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from converter.dtypes import DType
from converter.errors import BadRequest, OutputRefused, Unsupported
from converter.formats import FORMATS
from converter.libraries.rules import (
    cast_config,
    check_asked,
    check_growth,
    check_quantized,
    check_shard_count,
    check_tag,
    choose_ties,
    find_kept,
    target_dtype,
)
from converter.models.checkpoint import Checkpoint, WeightSet
from converter.models.folder import Component, ModelFolder, render_json
from converter.models.index import WeightIndex
from converter.models.names import Format, WeightsName
from converter.models.select import Wishes
from converter.storage import Place
from converter.storage.local import real
from converter.tensors.base import Tensor, TensorSpec
from converter.tensors.derived import cast
from converter.tensors.view import View


class PlannedTensor(NamedTuple):
    """A tensor as it is written, at ``offset`` of its file."""

    tensor: Tensor
    offset: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One weight file to be written: ``path`` from the target folder, and the tensors in file order.

    ``header`` begins the file; what else a format needs between and after the tensors is written when their bytes are
    there. ``ties`` are names left out, each with the name in this file that it stands for. With a ``link`` the file
    comes out as the one that is there, byte for byte.
    """

    path: str
    format: Format
    header: bytes
    tensors: tuple[PlannedTensor, ...]
    nbytes: int
    ties: Mapping[str, str]
    link: Path | None = None

    @property
    def specs(self) -> list[TensorSpec]:
        """The tensors as a header describes them."""
        return [TensorSpec(tensor.name, tensor.dtype, tensor.shape) for tensor, _ in self.tensors]


@dataclass(frozen=True, slots=True)
class SetPlan:
    """One weight set to be written, from one that was read.

    ``ties`` maps each name left out to the name that stays, ``kept`` the tensors that a recast leaves in another dtype
    than the one that was asked for to that dtype.
    """

    component: str
    source: WeightSet
    name: WeightsName
    shards: tuple[Shard, ...]
    index: tuple[str, bytes] | None
    ties: Mapping[str, str]
    kept: Mapping[str, DType] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @property
    def tensor_count(self) -> int:
        return sum(len(shard.tensors) for shard in self.shards)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a plan's files go: ``is_new`` for a folder that appears whole, else one to which files are added.

    ``real`` is its real path when it was looked at: one that is swapped for a link after that is not followed.
    """

    folder: Path
    is_new: bool
    real: Path = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "real", real(self.folder))


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a conversion writes, carries over and removes.

    ``carried`` are pairs of a path from the target folder and the file it is copied from, ``edited`` such of a path and
    its content; ``superseded`` are paths from the target folder that go once the new files are there; ``delete`` are
    source files that go last. ``is_there`` where all of it lies there already, as far as headers, sizes and times tell.
    ``places`` are the real paths of what is carried over when that was planned: what is swapped for a link after that
    is not followed.
    """

    source: ModelFolder
    target: Target
    sets: tuple[SetPlan, ...]
    carried: tuple[tuple[str, Path], ...] = ()
    edited: tuple[tuple[str, bytes], ...] = ()
    superseded: tuple[str, ...] = ()
    delete: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    wishes: Wishes = field(default_factory=Wishes)
    is_there: bool = False
    places: tuple[Path, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "places", tuple(real(path) for _, path in self.carried))

    @property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(shard for planned in self.sets for shard in planned.shards)

    @property
    def indexes(self) -> tuple[tuple[str, bytes], ...]:
        """The indexes, as pairs of a path from the target folder and content."""
        return tuple(planned.index for planned in self.sets if planned.index)

    @property
    def texts(self) -> tuple[tuple[str, bytes], ...]:
        """All files whose content is known now, as pairs of a path from the target folder and content."""
        return (*self.edited, *self.indexes)

    @property
    def destroys_source(self) -> bool:
        """Whether a file that is read is removed, or replaced, in the end."""
        read = {_place(planned.source.folder / name) for planned in self.sets for name in planned.source.all_names}
        return bool(self.delete) or any(_place(self.target.folder / name) in read for name in self.superseded)

    @property
    def removed(self) -> tuple[str, ...]:
        """The files that are gone in the end: relative paths are from the target folder."""
        written = {*(shard.path for shard in self.shards), *(name for name, _ in self.texts)}
        return (*(name for name in self.superseded if name not in written), *map(str, self.delete))

    @property
    def written_nbytes(self) -> int:
        """The bytes of weight files that are written anew; what is linked is not."""
        return sum(shard.nbytes for shard in self.shards if shard.link is None)

    @property
    def nbytes(self) -> int:
        """The bytes of all weight files that are there in the end."""
        return sum(planned.nbytes for planned in self.sets)


@dataclass(frozen=True, slots=True)
class Beside:
    """What a plan has beside its sets.

    ``carried`` and ``edited`` are as in a Plan; ``configs`` are by component, in place of their own.
    """

    carried: tuple[tuple[str, Path], ...] = ()
    edited: Mapping[str, bytes] = field(default_factory=dict)
    configs: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


_NOTHING = Beside()


def make_plan(
    folder: ModelFolder,
    orders: Iterable[tuple[Component, Checkpoint] | tuple[Component, Checkpoint, Wishes]],
    target: Target,
    wishes: Wishes,
    existing: Mapping[str, Sequence[WeightSet]],
    beside: Beside = _NOTHING,
) -> Plan:
    """Plan a conversion of opened checkpoints; ``existing`` are the target's own sets, by component.

    A checkpoint may come with wishes of its own, which differ from the others' in its name and dtype alone. What would
    come out as it lies there is left out. Raises BadRequest, OutputRefused or Unsupported for what cannot or must not
    be done.
    """
    orders = list(orders)
    check_asked(folder.path, (checkpoint for _, checkpoint, *_ in orders), wishes)
    sets: list[SetPlan] = []
    there_already: list[str] = []
    edited = dict(beside.edited)
    read = {component.name: component.config for component in folder.components}
    by_name: dict[tuple[str, WeightsName], list[WeightSet]] = defaultdict(list)  # there may be thousands of variants
    for place, old in ((place, old) for place, found in existing.items() for old in found):
        by_name[place, old.name].append(old)
    for component, checkpoint, *own in orders:
        wanted = own[0] if own else wishes
        planned = _plan_set(component, checkpoint, wanted, in_place=_is_beside(component, target))
        there = by_name[component.name, planned.name]
        if wanted.dtype and not wanted.overwrite and there and planned.name != checkpoint.name:
            there_already.append(planned.shards[0].path)
        elif not _is_there(planned, checkpoint, there):
            sets.append(planned)
            config = beside.configs.get(component.name, component.config)
            if folder.kind != "file":
                config = _with_dtype(config, component, planned, target, wanted)
            if config != read.get(component.name, component.config):
                edited[(Path(component.name) / "config.json").as_posix()] = render_json(config)
    if there_already and not sets:
        raise OutputRefused(there_already[0], "exists", "Use --overwrite to write it again, or -o for a new folder.")
    _check_collisions(folder, sets)
    superseded = () if target.is_new else tuple(_find_superseded(by_name, sets, wishes))
    outputs = {*superseded, *(shard.path for planned in sets for shard in planned.shards)}
    outputs |= {planned.index[0] for planned in sets if planned.index}
    spared = {_place(target.folder / name) for name in outputs}
    sources = (p.source.folder / name for p in sets for name in p.source.all_names) if wishes.delete_source else ()
    return Plan(
        source=folder,
        target=target,
        sets=tuple(sets),
        carried=tuple((name, path) for name, path in beside.carried if name not in edited),
        edited=tuple(edited.items()),
        superseded=superseded,
        delete=tuple(path for path in sources if _place(path) not in spared),
        notes=(*beside.notes, *(f"{path} is there already, and stays as it is" for path in there_already)),
        wishes=wishes,
    )


def _place(path: Path) -> Path:
    """Give the place of a name, however its folder is spelled: a link at the end stands for itself."""
    return path.parent.resolve() / path.name


def _is_beside(component: Component, target: Target) -> bool:
    return not target.is_new and component.path.resolve() == (target.folder / component.name).resolve()


def _is_there(planned: SetPlan, checkpoint: Checkpoint, existing: Sequence[WeightSet]) -> bool:
    """Say whether a set would come out as it lies there: in place, with the same names and the same boundaries.

    ``existing`` are the sets of its name.
    """
    if planned.source not in existing or planned.source.is_legacy:
        return False
    before = [{tensor.name for tensor in file.tensors} for file in checkpoint.files]
    after = [{tensor.name for tensor, _ in shard.tensors} | shard.ties.keys() for shard in planned.shards]
    return before == after and not any(map(computes, planned.shards))


def computes(shard: Shard) -> bool:
    """Say whether a tensor of a file has other numbers than those that lie in its source."""
    return any(tensor.source.computes for tensor, _ in shard.tensors)


def _check_collisions(folder: ModelFolder, sets: Sequence[SetPlan]) -> None:
    seen: dict[tuple[str, WeightsName], SetPlan] = {}
    for planned in sets:
        first = seen.setdefault((planned.component, planned.name), planned)
        if first is not planned:
            names = f"{first.source.path.name} and {planned.source.path.name}"
            raise BadRequest(
                folder.path, f"{names} would both become {planned.name.single}", "Choose one with --from-variant."
            )


def _find_superseded(
    existing: Mapping[tuple[str, WeightsName], Sequence[WeightSet]], sets: Sequence[SetPlan], wishes: Wishes
) -> Iterable[str]:
    """List the files of sets that the new ones replace: same folder, stem, variant and format, all of their files."""
    for planned in sets:
        for old in existing.get((planned.component, planned.name), ()):
            if not (wishes.overwrite or (wishes.in_place and old == planned.source)):
                raise OutputRefused(old.path, "exists", "Use --overwrite to replace it, or -o for a new folder.")
            yield from ((Path(planned.component) / name).as_posix() for name in old.all_names)


def _plan_set(component: Component, checkpoint: Checkpoint, wishes: Wishes, in_place: bool) -> SetPlan:
    name = wishes.name_output(checkpoint.name)
    untouched = check_quantized(component, checkpoint, wishes)
    ties = choose_ties(component, checkpoint, name.format, wishes)
    keep = find_kept(component, wishes)
    # A tensor in each dtype that it is written in, by name.
    written = {
        tensor.name: tensor
        if tensor.name in untouched
        else cast(tensor, target_dtype(tensor, wishes, keep), wishes.on_overflow)
        for tensor in checkpoint.tensors
    }
    growth = check_growth(checkpoint, [t for t in checkpoint.tensors if t.name not in ties], wishes)
    groups = [[written[tensor.name] for tensor in file.tensors if tensor.name not in ties] for file in checkpoint.files]
    if wishes.max_shard_nbytes is not None:
        units = _units(itertools.chain.from_iterable(groups))
        parts = split_into_shards([sum(t.nbytes for t in unit) for unit in units], wishes.max_shard_nbytes)
        groups = [[tensor for place in part for tensor in units[place]] for part in parts]
    groups = [group for group in groups if group] or [[]]
    if wishes.dtype or wishes.variant:
        check_tag(checkpoint.weight_set.path, name, (t.dtype for t in written.values()), wishes)
    check_shard_count(component, checkpoint, name, len(groups), wishes)
    base = Path(component.name)
    file_names = name.files(len(groups))
    shards = [
        _plan_shard(
            checkpoint.weight_set.path,
            (base / file_name).as_posix(),
            name.format,
            group,
            ties,
            _notes_of(group, checkpoint),
        )
        for file_name, group in zip(file_names, groups, strict=True)
    ]
    if in_place:
        shards = [_link_if_same(shard, checkpoint) for shard in shards]
    index = None
    if len(shards) > 1:
        index = ((base / name.index).as_posix(), _build_index(checkpoint, shards, file_names).render())
    kept = {
        tensor.name: written[tensor.name].dtype
        for tensor in checkpoint.tensors
        if wishes.dtype and not tensor.is_made and written[tensor.name].dtype is not wishes.dtype
    }
    notes = (*checkpoint.notes, *growth, *_note_no_cast(checkpoint, written, wishes))
    return SetPlan(component.name, checkpoint.weight_set, name, tuple(shards), index, ties, kept, notes)


def _note_no_cast(checkpoint: Checkpoint, written: Mapping[str, Tensor], wishes: Wishes) -> Iterable[str]:
    """Say so where a recast changes nothing."""
    if wishes.dtype and all(written[tensor.name] is tensor for tensor in checkpoint.tensors):
        is_there = any(tensor.dtype is wishes.dtype for tensor in checkpoint.tensors)
        yield f"already {wishes.dtype.short_name}: nothing to cast" if is_there else "holds nothing to cast"


def _units(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Group tensors that must come into one file."""
    units: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        units.setdefault(tensor.beside or tensor.name, []).append(tensor)
    return list(units.values())


def _notes_of(group: Sequence[Tensor], checkpoint: Checkpoint) -> dict[str, str]:
    """Give the notes of the source's header that go with these tensors: a tie goes with the tensor it names."""
    mine = {tensor.name for tensor in group}
    others = {tensor.name for tensor in checkpoint.tensors} - mine
    return {key: value for key, value in checkpoint.metadata.items() if key != "format" and value not in others}


def _plan_shard(
    source: Path,
    path: str,
    form: Format,
    tensors: Sequence[Tensor],
    ties: Mapping[str, str],
    notes: Mapping[str, str],
) -> Shard:
    names = {tensor.name for tensor in tensors}
    mine = {dropped: kept for dropped, kept in ties.items() if kept in names}
    specs = [TensorSpec(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
    lay_out = FORMATS[form].lay_out
    assert lay_out is not None
    try:
        layout = lay_out(specs, mine, notes)
    except ValueError as error:
        problem, *advice = error.args
        raise Unsupported(source, problem, *(advice or ["Rename or recast the tensor before."])) from None
    planned = (PlannedTensor(tensors[place], at) for place, at in zip(layout.order, layout.offsets, strict=True))
    return Shard(path, form, layout.header, tuple(planned), layout.nbytes, mine)


def _link_if_same(shard: Shard, checkpoint: Checkpoint) -> Shard:
    """Let a shard be linked to a file of the set that it replaces, where it would be the same, byte for byte."""
    for file in checkpoint.files:
        same_bytes = (
            file.format == shard.format == "safetensors"
            and len(shard.tensors) == len(file.tensors)
            and all(_lies_at(tensor, file.place, offset) for tensor, offset in shard.tensors)
            and {"format": "pt", **file.metadata} == file.metadata
        )
        if same_bytes:
            return replace(shard, link=file.place.path)
    return shard


def _lies_at(tensor: Tensor, file: Place, offset: int) -> bool:
    """Say whether a tensor of a safetensors file is written where it lies, as it is."""
    source = tensor.source
    if not isinstance(source, View) or not source.is_contiguous or source.start:
        return False
    return (source.storage.file.place, source.storage.offset) == (file, offset)


def _build_index(checkpoint: Checkpoint, shards: Iterable[Shard], file_names: Iterable[str]) -> WeightIndex:
    placed = [(shard, name) for shard, name in zip(shards, file_names, strict=True)]
    tensors = [tensor for shard, _ in placed for tensor, _ in shard.tensors]
    metadata = {
        "total_parameters": sum(tensor.numel for tensor in tensors if tensor.file is not None),
        **checkpoint.index_metadata,
        "total_size": sum(tensor.nbytes for tensor in tensors),
    }
    weight_map = {tensor.name: name for shard, name in placed for tensor, _ in shard.tensors}
    aliases = {dropped: name for shard, name in placed if shard.format == "torch" for dropped in shard.ties}
    return WeightIndex({**weight_map, **aliases}, metadata)


def _with_dtype(
    config: dict[str, Any], component: Component, planned: SetPlan, target: Target, wishes: Wishes
) -> dict[str, Any]:
    """Give the config.json of a component that is recast, untagged, into a new folder: with its new dtype.

    A variant shares its config.json with the others, so that stays.
    """
    if wishes.dtype is None or planned.name.variant is not None or _is_beside(component, target):
        return config
    return cast_config(component, config, wishes.dtype)


def split_into_shards(sizes: Sequence[int], max_nbytes: float) -> list[list[int]]:
    """Group places of ``sizes`` into shards by huggingface_hub's rule (``split_state_dict_into_shards_factory``).

    In order and greedy; a shard may take just ``max_nbytes``; what is larger is a shard by itself, before the open one.

    >>> split_into_shards([3, 12, 3], 10)
    [[1], [0, 2]]
    """
    shards: list[list[int]] = []
    current: list[int] = []
    filled = 0
    for place, size in enumerate(sizes):
        if size > max_nbytes:
            shards.append([place])
            continue
        if filled + size > max_nbytes:
            shards.append(current)
            current, filled = [], 0
        current.append(place)
        filled += size
    return [*shards, current] if current else shards

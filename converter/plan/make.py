"""What will be written, byte for byte: checkpoints and wishes in, a Plan out. Nothing here touches the disk.

Everything follows from the headers: sizes, offsets, shard boundaries, headers and index are known before a byte moves.
Printing a Plan is the dry run; pickling it sends it elsewhere.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from converter.dtypes import DType
from converter.errors import BadRequest, OutputRefused, Unsupported
from converter.formats import FORMATS
from converter.libraries import library_of
from converter.models.checkpoint import Checkpoint, WeightSet
from converter.models.folder import Component, ModelFolder, render_json
from converter.models.growth import note_growth, refuse_growth
from converter.models.index import WeightIndex
from converter.models.names import Format, WeightsName
from converter.models.paths import real
from converter.models.select import Tied, Wishes
from converter.plan.casts import check_asked, check_quantized, check_tag, find_kept, target_dtype
from converter.tensors.base import TensorInfo, find_ties


class Copy(NamedTuple):
    """One tensor's way: from its source to ``offset`` of the file it goes to, as ``dtype``."""

    source: TensorInfo
    dtype: DType
    offset: int

    @property
    def nbytes(self) -> int:
        return self.dtype.nbytes(math.prod(self.source.shape))


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
    copies: tuple[Copy, ...]
    nbytes: int
    ties: Mapping[str, str]
    link: Path | None = None


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
        return sum(len(shard.copies) for shard in self.shards)


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
    check_asked(folder.path, (checkpoint for _, checkpoint, *_ in orders), wishes.dtype, wishes.keep_fp32)
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
    before = [{info.name for info in file.tensors} for file in checkpoint.files]
    after = [{copy.source.name for copy in shard.copies} | shard.ties.keys() for shard in planned.shards]
    return before == after and not any(casts(shard) for shard in planned.shards)


def casts(shard: Shard) -> bool:
    """Say whether a tensor of a shard changes its dtype."""
    return any(copy.dtype is not copy.source.dtype for copy in shard.copies)


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
    untouched = check_quantized(component, checkpoint, wishes.dtype, wishes.force)
    ties = _choose_ties(component, checkpoint, name.format, wishes.tied)
    keep = find_kept(component, wishes.dtype, wishes.keep_fp32)
    casts = {info.name: target_dtype(info, wishes.dtype, keep) for info in checkpoint.tensors}
    casts |= {info.name: info.dtype for info in checkpoint.tensors if info.name in untouched}
    groups = [[info for info in file.tensors if info.name not in ties] for file in checkpoint.files]
    growth = _check_growth(checkpoint.weight_set.path, itertools.chain.from_iterable(groups), wishes.expand)
    if wishes.max_shard_nbytes is not None:
        tensors = list(itertools.chain.from_iterable(groups))
        units = _units(tensors)
        sizes = [sum(casts[info.name].nbytes(info.numel) for info in unit) for unit in units]
        parts = split_into_shards(sizes, wishes.max_shard_nbytes)
        groups = [[info for place in part for info in units[place]] for part in parts]
    groups = [group for group in groups if group] or [[]]
    if wishes.dtype or wishes.variant:
        check_tag(checkpoint.weight_set.path, name, casts.values(), wishes.dtype)
    names = (info.name for info in checkpoint.tensors)
    refused = None if wishes.force else library_of(component).refuses(component, name, len(groups), names)
    if refused:
        raise Unsupported(checkpoint.weight_set.path, *refused)
    base = Path(component.name)
    file_names = name.files(len(groups))
    shards = [
        _plan_shard(
            checkpoint.weight_set.path,
            (base / file_name).as_posix(),
            name.format,
            group,
            casts,
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
        info.name: casts[info.name]
        for info in checkpoint.tensors
        if wishes.dtype and info.target is None and casts[info.name] is not wishes.dtype
    }
    notes = (*checkpoint.notes, *growth, *_note_no_cast(checkpoint, casts, wishes))
    return SetPlan(component.name, checkpoint.weight_set, name, tuple(shards), index, ties, kept, notes)


def _choose_ties(component: Component, checkpoint: Checkpoint, form: Format, tied: Tied | None) -> dict[str, str]:
    """Map the names that are not written to those that are; in a torch file they stay, as a second name."""
    if form == "torch":
        names = {info.name for info in checkpoint.tensors}
        recorded = {name: kept for name, kept in checkpoint.ties.items() if name not in names}
        return {} if tied == "duplicate" else {**find_ties(checkpoint.tensors), **recorded}
    tied = tied or library_of(component).ties(component, checkpoint.name.in_format(form))
    ties = find_ties(checkpoint.tensors) if tied == "first" else {}
    if "format" in ties:
        raise Unsupported(checkpoint.weight_set.path, "has a tied tensor named 'format'", "Use --tied duplicate.")
    return ties


def _check_growth(path: Path, written: Iterable[TensorInfo], expand: bool) -> tuple[str, ...]:
    """Note how much more tensors take than what holds them; refuse what would fill a disk, but where that is asked."""
    views = [info for info in written if info.storage.content is None]
    if not expand:
        refuse_growth(path, views)
    return note_growth(views)


def _note_no_cast(checkpoint: Checkpoint, casts: Mapping[str, DType], wishes: Wishes) -> Iterable[str]:
    """Say so where a recast changes nothing."""
    if wishes.dtype and all(casts[info.name] is info.dtype for info in checkpoint.tensors):
        is_there = any(info.dtype is wishes.dtype for info in checkpoint.tensors)
        yield f"already {wishes.dtype.short_name}: nothing to cast" if is_there else "holds nothing to cast"


def _units(tensors: Sequence[TensorInfo]) -> list[list[TensorInfo]]:
    """Group tensors that must come into one shard: one that stands in no file belongs to the one before it."""
    units: list[list[TensorInfo]] = []
    for info in tensors:
        if info.storage.content is None:
            units.append([])
        units[-1].append(info)
    return units


def _notes_of(group: Sequence[TensorInfo], checkpoint: Checkpoint) -> dict[str, str]:
    """Give the notes of the source's header that go with these tensors: a tie goes with the tensor it names."""
    mine = {info.name for info in group}
    others = {info.name for info in checkpoint.tensors} - mine
    return {key: value for key, value in checkpoint.metadata.items() if key != "format" and value not in others}


def _plan_shard(
    source: Path,
    path: str,
    form: Format,
    tensors: Sequence[TensorInfo],
    casts: Mapping[str, DType],
    ties: Mapping[str, str],
    notes: Mapping[str, str],
) -> Shard:
    names = {info.name for info in tensors}
    mine = {dropped: kept for dropped, kept in ties.items() if kept in names}
    described = [(info.name, casts[info.name], info.shape) for info in tensors]
    lay_out = FORMATS[form].lay_out
    assert lay_out is not None
    try:
        layout = lay_out(described, mine, notes)
    except ValueError as error:
        problem, *advice = error.args
        raise Unsupported(source, problem, *(advice or ["Rename or recast the tensor before."])) from None
    copies = (
        Copy(tensors[place], casts[tensors[place].name], offset)
        for place, offset in zip(layout.order, layout.offsets, strict=True)
    )
    return Shard(path, form, layout.header, tuple(copies), layout.nbytes, mine)


def _link_if_same(shard: Shard, checkpoint: Checkpoint) -> Shard:
    """Let a shard be linked to a file of the set that it replaces, where it would be the same, byte for byte."""
    for file in checkpoint.files:
        places = [(copy.source.storage.path, copy.source.storage.offset) for copy in shard.copies]
        same_bytes = (
            file.format == shard.format == "safetensors"
            and places == [(file.path, copy.offset) for copy in shard.copies]
            and len(places) == len(file.tensors)
            and {"format": "pt", **file.metadata} == file.metadata
            and not casts(shard)
        )
        if same_bytes:
            return replace(shard, link=file.path)
    return shard


def _build_index(checkpoint: Checkpoint, shards: Iterable[Shard], file_names: Iterable[str]) -> WeightIndex:
    placed = [(shard, name) for shard, name in zip(shards, file_names, strict=True)]
    copies = [copy for shard, _ in placed for copy in shard.copies]
    metadata = {
        "total_parameters": sum(copy.source.numel for copy in copies if copy.source.storage.content is None),
        **checkpoint.index_metadata,
        "total_size": sum(copy.nbytes for copy in copies),
    }
    weight_map = {copy.source.name: name for shard, name in placed for copy in shard.copies}
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
    return library_of(component).cast_config(component, config, wishes.dtype)


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

"""What will be written, byte for byte: checkpoints and wishes in, a Plan out. Nothing here touches the disk.

Everything follows from the headers: sizes, offsets, shard boundaries, headers and index are known before a byte moves.
Printing a Plan is the dry run; pickling it sends it elsewhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from converter.checkpoint import Checkpoint, WeightSet
from converter.dtypes import DType
from converter.errors import BadRequest, OutputRefused, Unsupported
from converter.folder import Component, ModelFolder
from converter.formats.safetensors import build_header, sort_key
from converter.index import WeightIndex
from converter.names import WeightsName, check_variant
from converter.tensors import TensorInfo, find_ties

Tied = Literal["first", "duplicate"]

# Renamed on load, but only where the checkpoint is one file (``_fix_state_dict_keys_on_load`` and its call in
# ``diffusers/models/modeling_utils.py``): in shards these tensors are silently not used.
_OLD_ATTENTION_CLASSES = frozenset({"AutoencoderKL", "VQModel", "UNet2DModel"})
_OLD_ATTENTION_NAME = re.compile(r".*\.attentions\.\d+\.(query|key|value|proj_attn)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user asks of a conversion; each field is an option of the command line.

    ``variant`` and ``from_variant`` are a tag, ``"none"`` for untagged, or None for the source's own;
    ``max_shard_nbytes`` is None for the source's own shards, ``math.inf`` for a single file.
    """

    variant: str | None = None
    from_variant: str | None = None
    components: tuple[str, ...] = ()
    max_shard_nbytes: float | None = None
    tied: Tied | None = None
    overwrite: bool = False
    delete_source: bool = False


@dataclass(frozen=True, slots=True)
class Copy:
    """One tensor's way: from its source to ``offset`` of the file it goes to, as ``dtype``."""

    source: TensorInfo
    dtype: DType
    offset: int

    @property
    def nbytes(self) -> int:
        return self.dtype.nbytes(math.prod(self.source.shape))


@dataclass(frozen=True, slots=True)
class Shard:
    """One weight file to be written: ``path`` from the target folder, its header, and the tensors in file order."""

    path: str
    header: bytes
    copies: tuple[Copy, ...]

    @property
    def nbytes(self) -> int:
        return self.copies[-1].offset + self.copies[-1].nbytes if self.copies else len(self.header)


@dataclass(frozen=True, slots=True)
class SetPlan:
    """One weight set to be written, from one that was read. ``ties`` maps each name left out to the name that stays."""

    component: str
    source: WeightSet
    name: WeightsName
    shards: tuple[Shard, ...]
    index: tuple[str, bytes] | None
    ties: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @property
    def tensor_count(self) -> int:
        return sum(len(shard.copies) for shard in self.shards)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a plan's files go: ``is_new`` for a folder that appears whole, else one to which files are added."""

    folder: Path
    is_new: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a conversion writes, carries over and removes.

    ``carried`` are pairs of a path from the target folder and the file it is copied from; ``superseded`` are paths from
    the target folder that go once the new files are there; ``delete`` are source files that go last.
    """

    source: ModelFolder
    target: Target
    sets: tuple[SetPlan, ...]
    carried: tuple[tuple[str, Path], ...] = ()
    superseded: tuple[str, ...] = ()
    delete: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    wishes: Wishes = field(default_factory=Wishes)

    @property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(shard for planned in self.sets for shard in planned.shards)

    @property
    def texts(self) -> tuple[tuple[str, bytes], ...]:
        """The indexes, as pairs of a path from the target folder and content."""
        return tuple(planned.index for planned in self.sets if planned.index)

    @property
    def destroys_source(self) -> bool:
        """Whether a file that is read is removed, or replaced, in the end."""
        read = {planned.source.folder / name for planned in self.sets for name in planned.source.all_names}
        return bool(self.delete) or any(self.target.folder / name in read for name in self.superseded)

    @property
    def removed(self) -> tuple[str, ...]:
        """The files that are gone in the end: relative paths are from the target folder."""
        written = {*(shard.path for shard in self.shards), *(name for name, _ in self.texts)}
        return (*(name for name in self.superseded if name not in written), *map(str, self.delete))

    @property
    def nbytes(self) -> int:
        """The bytes of all weight files that are written."""
        return sum(planned.nbytes for planned in self.sets)


def choose_sets(folder: ModelFolder, wishes: Wishes) -> list[tuple[Component, WeightSet]]:
    """Choose what a command that takes every variant converts, a component at a time.

    Of several sets of one variant the safetensors one is taken, unless it is to be overwritten. Raises BadRequest where
    a wish names a component or a variant that is not there, or where one variant is there twice in one format.
    """
    known = {component.name for component in folder.components}
    for name in wishes.components:
        if name not in known:
            raise BadRequest(folder.path, f"has no component {name!r}", f"It has: {', '.join(sorted(known))}.")
    components = [c for c in folder.components if not wishes.components or c.name in wishes.components]
    chosen = [(component, found) for component in components for found in _choose(component, wishes)]
    tag = _tag(wishes.from_variant)
    if wishes.from_variant and not any(weight_set.name.variant == tag for _, weight_set in chosen):
        raise BadRequest(folder.path, f"has no variant {wishes.from_variant!r}", "'wconv inspect' lists what it has.")
    return chosen


def _choose(component: Component, wishes: Wishes) -> list[WeightSet]:
    by_output: dict[WeightsName, list[WeightSet]] = {}
    for weight_set in component.weight_sets:
        by_output.setdefault(weight_set.name.as_safetensors(), []).append(weight_set)
    best = [only_set(component, sets, prefer_others=wishes.overwrite) for sets in by_output.values()]
    if wishes.from_variant is None:
        return best
    # As Diffusers does it: a component that lacks the variant gives its untagged weights.
    tag = _tag(wishes.from_variant)
    return [s for s in best if s.name.variant == tag] or [s for s in best if s.name.variant is None]


def only_set(component: Component, sets: Sequence[WeightSet], prefer_others: bool = False) -> WeightSet:
    """Give the one set that is meant where several hold the same weights: the safetensors one, or one of the others.

    Raises BadRequest where that does not decide.
    """
    ready = [weight_set for weight_set in sets if weight_set.name.ext == "safetensors"]
    others = [weight_set for weight_set in sets if weight_set.name.ext != "safetensors"]
    candidates = (others or ready) if prefer_others else (ready or others)
    if len(candidates) > 1:
        names = " and ".join(weight_set.path.name for weight_set in candidates)
        raise BadRequest(component.path, f"has the same weights twice: {names}", "Name the one you want.")
    return candidates[0]


def _tag(variant: str | None) -> str | None:
    return None if variant in (None, "none") else variant


def make_plan(
    folder: ModelFolder,
    checkpoints: Iterable[tuple[Component, Checkpoint]],
    target: Target,
    wishes: Wishes,
    existing: Mapping[str, Sequence[WeightSet]],
    carried: Iterable[Path] = (),
    notes: Iterable[str] = (),
) -> Plan:
    """Plan a conversion to safetensors of opened checkpoints; ``existing`` are the target's own sets, by component.

    What would come out as it lies there is left out.
    Raises BadRequest, OutputRefused or Unsupported for what cannot or must not be done.
    """
    sets = []
    for component, checkpoint in checkpoints:
        name = checkpoint.name.as_safetensors()
        if wishes.variant is not None:
            name = replace(name, variant=_tag(wishes.variant) and check_variant(wishes.variant))
        planned = _plan_set(component, checkpoint, name, wishes)
        if not _is_there(planned, checkpoint, existing.get(component.name, ())):
            sets.append(planned)
    _check_collisions(folder, sets)
    superseded = () if target.is_new else tuple(_find_superseded(existing, sets, wishes))
    sources = tuple(p.source.folder / name for p in sets for name in p.source.all_names) if wishes.delete_source else ()
    return Plan(
        source=folder,
        target=target,
        sets=tuple(sets),
        carried=tuple((path.relative_to(folder.root).as_posix(), path) for path in carried),
        superseded=superseded,
        delete=tuple(path for path in sources if path not in {target.folder / name for name in superseded}),
        notes=tuple(notes),
        wishes=wishes,
    )


def _is_there(planned: SetPlan, checkpoint: Checkpoint, existing: Sequence[WeightSet]) -> bool:
    """Say whether a set would come out as it lies there: in place, with the same names and the same boundaries."""
    if planned.source not in existing or planned.name != planned.source.name or planned.source.is_legacy:
        return False
    before = [{info.name for info in file.tensors} for file in checkpoint.files]
    after = [{copy.source.name for copy in shard.copies} for shard in planned.shards]
    return before == after


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
    existing: Mapping[str, Sequence[WeightSet]], sets: Sequence[SetPlan], wishes: Wishes
) -> Iterable[str]:
    """List the files of sets that the new ones replace: same folder, stem, variant and format, all of their files."""
    for planned in sets:
        for old in existing.get(planned.component, ()):
            if old.name == planned.name:
                if not wishes.overwrite:
                    raise OutputRefused(old.path, "exists", "Use --overwrite to replace it, or -o for a new folder.")
                yield from ((Path(planned.component) / name).as_posix() for name in old.all_names)


def _plan_set(component: Component, checkpoint: Checkpoint, name: WeightsName, wishes: Wishes) -> SetPlan:
    tied = wishes.tied or default_tied(component)
    ties = find_ties(checkpoint.tensors) if tied == "first" else {}
    recorded = {dropped: kept for dropped, kept in checkpoint.metadata.items() if dropped != "format"}
    if "format" in ties:
        raise Unsupported(checkpoint.weight_set.path, "has a tied tensor named 'format'", "Use --tied duplicate.")
    groups = [[info for info in file.tensors if info.name not in ties] for file in checkpoint.files]
    if wishes.max_shard_nbytes is not None:
        tensors = [info for group in groups for info in group]
        parts = split_into_shards([info.nbytes for info in tensors], wishes.max_shard_nbytes)
        groups = [[tensors[place] for place in part] for part in parts]
    groups = [group for group in groups if group] or [[]]
    _check_old_attention(component, checkpoint, len(groups))
    file_names = name.files(len(groups))
    base = Path(component.name)
    shards = tuple(
        _plan_shard((base / file_name).as_posix(), group, _metadata(group, ties, recorded, len(groups)))
        for file_name, group in zip(file_names, groups, strict=True)
    )
    index = None
    if len(shards) > 1:
        index = ((base / name.index).as_posix(), _build_index(checkpoint, shards, file_names).render())
    return SetPlan(component.name, checkpoint.weight_set, name, shards, index, ties, checkpoint.notes)


def default_tied(component: Component) -> Tied:
    """Say whether tied tensors are written once or each by its name, where the user does not.

    A transformers model ties again what its config says is tied; where the config says it does not, and in Diffusers,
    which never ties, a name that is not in the file is a missing weight.
    """
    if component.is_diffusers or component.config.get("tie_word_embeddings") is False:
        return "duplicate"
    return "first"


def _metadata(
    group: Sequence[TensorInfo], ties: Mapping[str, str], recorded: Mapping[str, str], count: int
) -> dict[str, str]:
    names = {info.name for info in group}
    mine = {dropped: kept for dropped, kept in ties.items() if kept in names}
    # Notes of a source header go along; one that names a tensor goes with that tensor's shard.
    notes = {key: value for key, value in recorded.items() if count == 1 or value in names}
    return {**notes, **mine, "format": "pt"}


def _plan_shard(path: str, tensors: Iterable[TensorInfo], metadata: Mapping[str, str]) -> Shard:
    ordered = sorted(tensors, key=lambda info: sort_key(info.dtype, info.name))
    header = build_header([(info.name, info.dtype, info.shape) for info in ordered], metadata)
    copies = []
    offset = len(header)
    for info in ordered:
        copies.append(Copy(info, info.dtype, offset))
        offset += info.nbytes
    return Shard(path, header, tuple(copies))


def _build_index(checkpoint: Checkpoint, shards: Iterable[Shard], file_names: Iterable[str]) -> WeightIndex:
    copies = [(copy, name) for shard, name in zip(shards, file_names, strict=True) for copy in shard.copies]
    metadata = {
        "total_parameters": sum(copy.source.numel for copy, _ in copies),
        **checkpoint.index_metadata,
        "total_size": sum(copy.nbytes for copy, _ in copies),
    }
    return WeightIndex({copy.source.name: name for copy, name in copies}, metadata)


def _check_old_attention(component: Component, checkpoint: Checkpoint, shard_count: int) -> None:
    if shard_count == 1 or component.class_name not in _OLD_ATTENTION_CLASSES:
        return
    for info in checkpoint.tensors:
        if _OLD_ATTENTION_NAME.fullmatch(info.name):
            raise Unsupported(
                checkpoint.weight_set.path,
                f"has tensors with old names, such as {info.name!r}, which Diffusers reads from a single file only",
                "Use --max-shard-size none.",
            )


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

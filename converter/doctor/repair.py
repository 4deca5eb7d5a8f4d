"""How to mend a folder: what its weight sets shall be afterwards, and the one Plan that leads there.

Each sound set becomes a goal: where its values come from and what it is to be called. The rules below change goals,
add some (a form or a variant that is missing) and let go of what is held elsewhere; names and indexes alone are changed
by links, so that a byte is moved only where it must be.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

from converter.doctor.checks import (
    belies_tag,
    config_dtype,
    held_names,
    index_faults,
    is_foreign,
    lacks_format,
    lacks_safetensors,
    loaded_parts,
    repeated_name,
    right_name,
    spelled_variant,
)
from converter.doctor.findings import Finding
from converter.doctor.listing import list_folder
from converter.dtypes import BY_ALIAS, DTYPES, RECAST_TARGETS, DType
from converter.errors import BadRequest
from converter.formats import read_file
from converter.libraries import library_of
from converter.libraries.base import FolderListing, IndexListing, PartListing, with_dtype
from converter.models.checkpoint import Checkpoint, open_checkpoint
from converter.models.configs import render_json
from converter.models.headers import LENIENT
from converter.models.index import WeightIndex
from converter.models.inventory import Inventory, Part
from converter.models.model import Model
from converter.models.names import WeightsName, check_variant, parse_name
from converter.models.sets import ListedSet
from converter.plan.make import join, plan_set
from converter.plan.types import Plan, PlannedSet, Target, Writing
from converter.recipes.outputs import refuse_links
from converter.recipes.rename import link_files
from converter.recipes.steps import make_order
from converter.recipes.verify import holds_values
from converter.storage import Place
from converter.transforms.dtype import Casting

Keep = Literal["single", "shards", "safetensors", "bin"]

# While something is lost, nothing is touched.
_LOST = ("file-damaged", "shard-missing", "component-missing", "config-unreadable")


@dataclass(frozen=True, slots=True)
class Choices:
    """What the user wants where a folder can be mended in several ways.

    ``keep_default`` moves all variants away, ``only_variant`` everything but one; ``make_variant`` casts one that is
    missing; ``keep`` decides between two sets of one variant. ``drop_strays`` moves shards away that no index names,
    where the set that has their name is sound, whatever they hold.
    """

    keep_default: bool = False
    only_variant: str | None = None
    make_variant: str | None = None
    keep: Keep | None = None
    drop_strays: bool = False


@dataclass(frozen=True, slots=True)
class Mending:
    """What will be done, in words and as a plan (None where there is nothing to do), and what loaders see then."""

    plan: Plan | None
    steps: tuple[str, ...]
    after: FolderListing
    refused: str = ""


class _Change(NamedTuple):
    """How a set is written anew: in a dtype, in one file; or just with another header, or in another format."""

    dtype: DType | None = None
    is_merged: bool = False


@dataclass(slots=True)
class _Goal:
    """A set that shall be there: ``source`` gives the values, ``change`` says what becomes of them, if anything."""

    source: ListedSet
    name: WeightsName
    change: _Change | None = None
    is_new: bool = False  # the source stays as it is
    respell: bool = False  # the files get the names that the set's name gives them


@dataclass(slots=True)
class _Part:
    """One part on its way: the goals, and the files that go."""

    view: Part
    goals: list[_Goal] = field(default_factory=list)
    left: list[ListedSet] = field(default_factory=list)  # not to be touched, nor any file of theirs
    gone: set[str] = field(default_factory=set)
    steps: list[str] = field(default_factory=list)

    def let_go(self, found: ListedSet, why: str) -> None:
        self.goals = [goal for goal in self.goals if goal.source is not found or goal.is_new]
        shared = {name for goal in self.goals if goal.source is not found for name in goal.source.file_names}
        self.gone.update(name for name in found.all_names if name not in shared)
        self.say(f"move {found.label} away: {why}")

    def say(self, step: str) -> None:
        self.steps.append(f"{self.view.name or '.'}: {step}")

    def default(self) -> _Goal | None:
        """The goal for the untagged weights, as safetensors before others."""
        if any(found.name.variant is None for found in self.left):
            return None
        found = [goal for goal in self.goals if goal.name.variant is None]
        return min(found, key=lambda goal: goal.name.format != "safetensors", default=None)

    def has(self, variant: str | None) -> bool:
        return variant in (*(goal.name.variant for goal in self.goals), *(found.name.variant for found in self.left))


def plan_mending(inventory: Inventory, findings: Sequence[Finding], choices: Choices) -> Mending:
    """Plan to mend what was found in a folder, in the way that removes nothing unless ``choices`` say otherwise.

    Reads values where it must know whether two sets are the same. Raises BadRequest for a choice that cannot be.
    """
    listing = list_folder(inventory)
    dropped = _stray_paths(inventory) if choices.drop_strays else set()
    lost = next((found for found in findings if found.code in _LOST and found.path not in dropped), None)
    if lost:
        return Mending(None, (), listing, f"{lost.path}: {lost.problem}")
    _check_choices(inventory, choices)
    parts = [_Part(part) for part in inventory.parts]
    for part in parts:
        _gather(part)
        _drop_strays(part, choices)
        _drop_twins(part, choices)
        _mend_tags(part)
        _convert_shards(part)
        _mend_headers(part)
    loaded = [part for part in parts if part.view in loaded_parts(inventory) and part.goals]
    if inventory.is_pipeline:
        _convert_mixed(loaded)
    _make_variants(inventory, loaded, choices)
    _choose_variants(loaded, choices)
    for part in parts:
        _merge_shards(part)
    plan = _build_plan(inventory, parts)
    steps = [step for part in parts for step in part.steps]
    steps += [f"rename {name} to {Path(name).name}.txt" for name in _renamed(inventory)]
    steps += [f"write dtype {dtype} into {_relative(part, 'config.json')}" for part, dtype in _new_dtypes(inventory)]
    return Mending(plan, tuple(steps), _list_after(inventory, listing, plan) if plan else listing)


def _check_choices(inventory: Inventory, choices: Choices) -> None:
    tags = [*filter(None, inventory.variants), choices.make_variant]
    if choices.only_variant is not None and choices.only_variant not in tags:
        raise BadRequest(inventory.path, f"has no variant {choices.only_variant!r}", "--make-variant makes one.")
    if choices.make_variant is not None and choices.make_variant.lower() not in RECAST_TARGETS:
        raise BadRequest(repr(choices.make_variant), "names no dtype", f"Use one of {', '.join(RECAST_TARGETS)}.")
    if choices.keep_default and choices.only_variant:
        raise BadRequest(inventory.path, "cannot keep the untagged weights and only a variant")


def _gather(part: _Part) -> None:
    """Make a goal of each sound set; an index that names nothing goes."""
    for found in part.view.sets:
        if is_foreign(found):
            _gather_foreign(part, found)
        elif not found.file_names:
            part.let_go(found, "none of the files that it names is there")
        elif part.view.is_sound(found) and not repeated_name(part.view, found):
            part.goals.append(_Goal(found, right_name(part.view, found.name)))
        else:
            part.left.append(found)
    kept = {name for found in part.left for name in found.file_names}
    part.goals = [goal for goal in part.goals if kept.isdisjoint(goal.source.file_names)]


def _gather_foreign(part: _Part, found: ListedSet) -> None:
    """Make a goal of the files of an index that names files of others, where all of its tensors stay in one set."""
    others = [name for name in found.file_names if name not in found.own_names]
    names = {parsed.name for name in others if (parsed := parse_name(name))}
    held = held_names(part.view, found).keys()
    sets = [one for one in part.view.sets if one is not found and not is_foreign(one) and part.view.is_sound(one)]
    whole = [one for one in sets if set(found.file_names) == set(one.file_names)]
    if whole:
        # Another set has these files and no index, or one of its own.
        rival = [one for one in sets if one.name == whole[0].name and one is not whole[0]]
        if not rival:
            part.let_go(replace(found, file_names=()), f"it names the files of {spelled_variant(whole[0].name)}")
            return
    own = ListedSet(found.folder, found.name, found.own_names)
    own_parsed = [parsed for name in own.file_names if (parsed := parse_name(name))]
    is_whole = bool(own_parsed) and all(one.count in (0, len(own_parsed)) for one in own_parsed)
    others_stay = all(any(name in one.file_names for one in sets) for name in others)
    if is_whole and others_stay and held_names(part.view, own).keys() == held:
        part.let_go(replace(found, file_names=()), "it names files of another variant")
        part.goals.append(_Goal(own, right_name(part.view, own.name)))
    elif not own.file_names and len(names) == 1 and not any(one.name == found.name for one in sets):
        # The files are named for a variant that has others: they take the name of their index.
        part.goals.append(_Goal(found, right_name(part.view, found.name), respell=True))
    else:
        part.left.append(found)


def _open(found: ListedSet) -> Checkpoint:
    return open_checkpoint(found.without_index)


def _stray_paths(inventory: Inventory) -> set[Place]:
    return {stray.folder / name for part in inventory.parts for stray in part.strays for name in stray.file_names}


def _drop_strays(part: _Part, choices: Choices) -> None:
    for stray in part.view.strays:
        kept = next((goal.source for goal in part.goals if goal.source.name == stray.name), None)
        if kept and choices.drop_strays:
            part.let_go(stray, "--drop-strays")
        elif kept and not any(part.view.headers[name].error for name in stray.file_names):
            files = [read_file(stray.folder / name, LENIENT) for name in stray.file_names]
            shards = [Checkpoint(stray.without_index, (file,), {}) for file in files]
            if all(holds_values(_open(kept), shard) for shard in shards):
                part.let_go(stray, f"{kept.label} holds the same values")


def _drop_twins(part: _Part, choices: Choices) -> None:
    """Of two sets that would have one name (or are two forms of one variant), keep one; undecided ones stay."""
    for goal in list(part.goals):
        other = next((one for one in part.goals if one is not goal and one.name == goal.name), None)
        if other is None or goal not in part.goals:
            continue
        single, shards = sorted((goal.source, other.source), key=lambda found: (found.is_sharded, found.is_legacy))
        if choices.keep in ("single", "shards"):
            part.let_go(shards if choices.keep == "single" else single, f"--keep {choices.keep}")
        elif holds_values(_open(single), _open(shards)):
            part.let_go(shards, f"{single.label} holds the same values")
        else:
            part.goals.remove(goal)
            part.goals.remove(other)
            part.left += (goal.source, other.source)
    by_form = {goal.name: goal for goal in part.goals}
    for goal in list(part.goals):
        safe = by_form.get(goal.name.in_format("safetensors"))
        if goal.name.format == "torch" and safe and choices.keep in ("safetensors", "bin"):
            part.let_go((goal if choices.keep == "safetensors" else safe).source, f"--keep {choices.keep}")


def _mend_tags(part: _Part) -> None:
    for goal in part.goals:
        if goal.name.variant is None or not belies_tag(part.view, goal.source):
            continue
        untagged = replace(goal.name, variant=None)
        default = next((one for one in part.goals if one.name == untagged), None)
        if default is None and not part.has(None):
            part.say(f"take the tag {goal.name.variant} off {goal.source.label}, which is of another dtype")
            goal.name = untagged
        elif default and holds_values(_open(default.source), _open(goal.source)):
            part.say(f"cast {goal.source.label} to {goal.name.variant}")
            goal.change = _Change(goal.name.tagged_dtype)


def _convert_shards(part: _Part) -> None:
    library = library_of(part.view.component)
    for goal in list(part.goals):
        if not library.reads_shards(goal.name.format) and len(goal.source.file_names) > 1:
            _convert(part, goal)


def _convert(part: _Part, goal: _Goal) -> None:
    safe = goal.name.in_format("safetensors")
    if not any(one.name == safe for one in part.goals):
        part.goals.append(_Goal(goal.source, safe, _Change(), is_new=True))
        part.say(f"convert {goal.source.label} to safetensors")


def _convert_mixed(parts: list[_Part]) -> None:
    by_name = {part.view.name: part for part in parts}
    for variant in {goal.name.variant for part in parts for goal in part.goals}:
        forms = {name: [goal.name for goal in part.goals] for name, part in by_name.items()}
        for name in lacks_safetensors(forms, variant):
            part = by_name[name]
            tag = variant if part.has(variant) else None
            for goal in [goal for goal in part.goals if goal.name.variant == tag]:
                _convert(part, goal)


def _mend_headers(part: _Part) -> None:
    for goal in part.goals:
        if goal.change is None and lacks_format(part.view, goal.source):
            goal.change = _Change()
            part.say(f"write the header of {goal.source.label} anew")


def _make_variants(inventory: Inventory, parts: list[_Part], choices: Choices) -> None:
    """Cast what some parts lack, and what is asked for."""
    wanted = {goal.name.variant for part in parts for goal in part.goals} if inventory.is_pipeline else set()
    if choices.keep_default:
        wanted = {None}
    elif choices.only_variant:
        wanted = {choices.only_variant}
    for variant in sorted(filter(None, {*wanted, choices.make_variant})):
        dtype = BY_ALIAS.get(variant.lower())
        for part in parts:
            default = part.default()
            if dtype and default and not part.has(variant):
                name = replace(default.name.in_format("safetensors"), variant=check_variant(variant))
                part.goals.append(_Goal(default.source, name, _Change(dtype), is_new=True))
                part.say(f"cast {default.source.label} to {variant}")
    if None in wanted:
        for part in parts:
            if part.goals and not part.has(None) and any(other.has(None) for other in parts):
                goal = part.goals[0]
                name = replace(goal.name.in_format("safetensors"), variant=None)
                part.goals.append(_Goal(goal.source, name, _Change(DTYPES["F32"]), is_new=True))
                part.say(f"write untagged weights from {goal.source.label}, in fp32")


def _choose_variants(parts: list[_Part], choices: Choices) -> None:
    if not choices.keep_default and choices.only_variant is None:
        return
    kept = spelled_variant(WeightsName("", choices.only_variant, ""))
    for part in parts:
        for goal in list(part.goals):
            if goal.name.variant != choices.only_variant and part.has(choices.only_variant):
                part.let_go(goal.source, f"only {kept} is to stay")


def _merge_shards(part: _Part) -> None:
    """Let shards become one file, where a loader wants it: old names of tensors, or a variant that is one file."""
    library = library_of(part.view.component)
    single = any(goal.name.variant and len(goal.source.file_names) == 1 and not goal.is_new for goal in part.goals)
    for goal in part.goals:
        count = len(goal.source.file_names)
        if count < 2 or goal.name.format != "safetensors":
            continue
        old = library.find_old_name(part.view.component, held_names(part.view, goal.source))
        if old or (single and goal.name.variant is None):
            goal.change = (goal.change or _Change())._replace(is_merged=True)
            part.say(f"merge the {count} shards of {goal.name.single} into one file")


def _build_plan(inventory: Inventory, parts: list[_Part]) -> Plan | None:
    components = tuple(part.view.component for part in parts)
    model = Model(
        inventory.path,
        inventory.path,
        "pipeline" if inventory.is_pipeline else "folder",
        components,
        inventory.class_name,
    )
    sets: list[PlannedSet] = []
    texts: dict[str, bytes] = {}
    replaced: list[str] = []
    for part in parts:
        replaced += (_relative(part.view, name) for name in sorted(part.gone))
        for goal in part.goals:
            if goal.change is not None:
                sets.append(_rewrite(part.view, goal))
            elif goal.respell or goal.name != goal.source.name or goal.source.is_legacy:
                sets.append(_relabel(part, goal))
            else:
                texts.update(_reindex(part, goal))
                continue
            if not goal.is_new:
                replaced += (_relative(part.view, name) for name in goal.source.all_names)
    for name in texts:
        replaced += [name] if (inventory.path / name).is_taken() else []
    for described, dtype in _new_dtypes(inventory):
        path = _relative(described, "config.json")
        texts[path] = render_json(with_dtype(described.component.config, dtype))
        replaced.append(path)
    renamed = _renamed(inventory)
    replaced += renamed
    if not sets and not texts and not replaced:
        return None
    read = {join(planned.component, name) for planned in sets for name in planned.source.all_names}
    plan = Plan(
        source=model,
        target=Target.at(inventory.path),
        sets=tuple(sets),
        copied=tuple((f"{name}.txt", (inventory.path / name).ref()) for name in renamed),
        generated=tuple(texts.items()),
        replaced=tuple(dict.fromkeys(replaced)),
        destroys_source=not read.isdisjoint(replaced),
    )
    refuse_links(plan)
    return plan


def _renamed(inventory: Inventory) -> list[str]:
    return [name for name in inventory.dotless if (inventory.path / name).is_file()] if any(inventory.variants) else []


def _new_dtypes(inventory: Inventory) -> list[tuple[Part, str]]:
    found = [(part, config_dtype(part)) for part in (() if inventory.is_pipeline else inventory.parts)]
    return [(part, dtypes[1].torch_name) for part, dtypes in found if dtypes]


def _relative(part: Part, name: str) -> str:
    return join(part.name, name)


def _rewrite(part: Part, goal: _Goal) -> PlannedSet:
    """Plan a set whose bytes change."""
    assert goal.change is not None
    dtype, is_merged = goal.change
    source = goal.source.without_index
    metadata = goal.source.index.metadata if goal.source.index else {}
    checkpoint = replace(open_checkpoint(source), index_metadata=metadata)
    writing = Writing(max_shard_size=math.inf if is_merged else None)
    order = make_order(part.component, checkpoint, goal.name, Casting(dtype), writing, is_beside=True)
    return plan_set(order, writing)


def _relabel(part: _Part, goal: _Goal) -> PlannedSet:
    """Plan a set of which just names change, and with them the index."""
    part.say(
        f"rename {goal.source.label} to {goal.name.single if len(goal.source.file_names) == 1 else goal.name.index}"
    )
    names = goal.name.files(len(goal.source.file_names))
    files = link_files(part.view.component, goal.source.without_index, names)
    index = None
    if len(names) > 1:
        renamed = dict(zip(goal.source.file_names, names, strict=True))
        index = (_relative(part.view, goal.name.index), _index_of(part.view, goal.source, renamed).render())
    return PlannedSet(part.view.name, goal.source.without_index, goal.name, files, index)


def _reindex(part: _Part, goal: _Goal) -> Iterator[tuple[str, bytes]]:
    """Give a set whose files are right the index that it lacks, or a right one."""
    found = goal.source
    if not found.is_sharded:
        return
    if found.index and not list(index_faults(part.view, found)):
        return
    part.say(f"write {goal.name.index} anew")
    yield (
        _relative(part.view, goal.name.index),
        _index_of(part.view, found, {name: name for name in found.file_names}).render(),
    )


def _index_of(part: Part, found: ListedSet, renamed: dict[str, str]) -> WeightIndex:
    weight_map = {name: renamed[file] for name, file in held_names(part, found).items()}
    total = sum(header.tensor_nbytes for header in part.headers_of(found))
    metadata = dict(found.index.metadata) if found.index else {}
    return WeightIndex(weight_map, {**metadata, "total_size": total})


def _list_after(inventory: Inventory, before: FolderListing, plan: Plan) -> FolderListing:
    """Give what loaders see once a plan is carried out."""
    written = dict(plan.texts)
    names = set(plan.names)
    parts = []
    for part in before.parts:
        prefix = f"{part.name}/" if part.name else ""
        gone = {name.removeprefix(prefix) for name in plan.replaced if name.startswith(prefix)}
        added = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        added = {name for name in added if "/" not in name}  # other parts' folders lie below the root
        indexes = {name: index for name, index in part.indexes.items() if name not in gone}
        for name in added:
            if ".index." in name:
                content = json.loads(written[prefix + name])
                indexes[name] = IndexListing(tuple(sorted(set(content["weight_map"].values()))))
        parts.append(PartListing(part.name, part.path, part.library, (part.names - gone) | added, indexes))
    dotless = tuple(name for name in before.dotless if name not in plan.replaced)
    return FolderListing(before.path, before.is_pipeline, tuple(parts), before.absent, dotless)

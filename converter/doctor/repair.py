"""How to mend a folder: the one Plan that leads to its goals, the steps of it in words, and what loaders see then.

Names and indexes alone are changed by links, so that a byte is moved only where it must be.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from converter.doctor.facts import held_names
from converter.doctor.findings import Finding
from converter.doctor.goals import Change, Choices, FolderGoals, Goal, PartGoals
from converter.doctor.rules import repair
from converter.dtypes import RECAST_TARGETS
from converter.errors import BadRequest
from converter.libraries.base import FolderListing, IndexListing, PartListing, with_dtype
from converter.libraries.predict import list_folder
from converter.models.checkpoint import open_checkpoint
from converter.models.configs import render_json
from converter.models.index import WeightIndex
from converter.models.inventory import Inventory, Part
from converter.models.model import Model
from converter.models.sets import ListedSet
from converter.plan.make import join, plan_set
from converter.plan.types import Plan, PlannedSet, Target, Writing
from converter.recipes.outputs import refuse_links
from converter.recipes.rename import link_files
from converter.recipes.steps import make_order
from converter.transforms.dtype import Casting

# While something is lost, nothing is touched.
_LOST = ("file-damaged", "shard-missing", "component-missing", "config-unreadable")


@dataclass(frozen=True, slots=True)
class Mending:
    """What will be done, in words and as a plan (None where there is nothing to do), and what loaders see then."""

    plan: Plan | None
    steps: tuple[str, ...]
    after: FolderListing
    refused: str = ""


def plan_mending(inventory: Inventory, findings: Sequence[Finding], choices: Choices) -> Mending:
    """Plan to mend what was found in a folder, in the way that removes nothing unless ``choices`` say otherwise.

    Reads values where it must know whether two sets are the same. Raises BadRequest for a choice that cannot be.
    """
    listing = list_folder(inventory)
    strays = (stray for part in inventory.parts for stray in part.strays) if choices.drop_strays else ()
    dropped = {stray.folder / name for stray in strays for name in stray.file_names}
    lost = next((finding for finding in findings if finding.code in _LOST and finding.path not in dropped), None)
    if lost:
        return Mending(None, (), listing, f"{lost.path}: {lost.problem}")
    _check_choices(inventory, choices)
    folder = FolderGoals(inventory, choices, [PartGoals(part) for part in inventory.parts])
    repair(folder)
    plan = _make_plan(folder)
    return Mending(plan, folder.all_steps, _list_after(listing, plan) if plan else listing)


def _check_choices(inventory: Inventory, choices: Choices) -> None:
    tags = [*filter(None, inventory.variants), choices.make_variant]
    if choices.only_variant is not None and choices.only_variant not in tags:
        raise BadRequest(inventory.path, f"has no variant {choices.only_variant!r}", "--make-variant makes one.")
    if choices.make_variant is not None and choices.make_variant.lower() not in RECAST_TARGETS:
        raise BadRequest(repr(choices.make_variant), "names no dtype", f"Use one of {', '.join(RECAST_TARGETS)}.")
    if choices.keep_default and choices.only_variant:
        raise BadRequest(inventory.path, "cannot keep the untagged weights and only a variant")


def _make_plan(folder: FolderGoals) -> Plan | None:
    inventory = folder.inventory
    sets = [planned for goals in folder.parts for goal in goals.sets if (planned := _plan_goal(goals.part, goal))]
    texts = dict(_texts(folder))
    replaced = [*_replaced(folder), *(name for name in texts if (inventory.path / name).is_taken()), *folder.renamed]
    if not sets and not texts and not replaced:
        return None
    read = {join(planned.component, name) for planned in sets for name in planned.source.all_names}
    plan = Plan(
        source=_model_of(inventory),
        target=Target.at(inventory.path),
        sets=tuple(sets),
        copied=tuple((new, (inventory.path / old).ref()) for old, new in folder.renamed.items()),
        generated=tuple(texts.items()),
        replaced=tuple(dict.fromkeys(replaced)),
        destroys_source=not read.isdisjoint(replaced),
    )
    refuse_links(plan)
    return plan


def _model_of(inventory: Inventory) -> Model:
    path, components = inventory.path, tuple(part.component for part in inventory.parts)
    return Model(path, path, "pipeline" if inventory.is_pipeline else "folder", components, inventory.class_name)


def _replaced(folder: FolderGoals) -> Iterator[str]:
    """Yield the paths of weights and indexes that go, whatever comes in their place."""
    for goals in folder.parts:
        names = sorted(goals.gone)
        for goal in goals.sets:
            if not goal.is_new and (goal.change or goal.is_renamed):
                names += goal.source.all_names
        yield from (join(goals.part.name, name) for name in names)


def _texts(folder: FolderGoals) -> Iterator[tuple[str, bytes]]:
    """Yield the indexes and configs that are written anew beside weights that stay."""
    for goals in folder.parts:
        for goal in goals.sets:
            if goal.is_reindexed:
                names = {name: name for name in goal.source.file_names}
                yield join(goals.part.name, goal.name.index), _index_of(goals.part, goal.source, names).render()
    for part in folder.inventory.parts:
        if part.name in folder.dtypes:
            config = with_dtype(part.component.config, folder.dtypes[part.name])
            yield join(part.name, "config.json"), render_json(config)


def _plan_goal(part: Part, goal: Goal) -> PlannedSet | None:
    if goal.change is not None:
        return _rewrite(part, goal, goal.change)
    return _rename(part, goal) if goal.is_renamed else None


def _rewrite(part: Part, goal: Goal, change: Change) -> PlannedSet:
    dtype, is_merged = change
    source = goal.source.without_index
    metadata = goal.source.index.metadata if goal.source.index else {}
    checkpoint = replace(open_checkpoint(source), index_metadata=metadata)
    writing = Writing(max_shard_size=math.inf if is_merged else None)
    order = make_order(part.component, checkpoint, goal.name, Casting(dtype), writing, is_beside=True)
    return plan_set(order, writing)


def _rename(part: Part, goal: Goal) -> PlannedSet:
    """Plan a set of which just names change, and with them the index."""
    source = goal.source.without_index
    names = goal.name.files(goal.count)
    files = link_files(part.component, source, names)
    index = None
    if len(names) > 1:
        renamed = dict(zip(source.file_names, names, strict=True))
        index = (join(part.name, goal.name.index), _index_of(part, goal.source, renamed).render())
    return PlannedSet(part.name, source, goal.name, files, index)


def _index_of(part: Part, listed: ListedSet, renamed: dict[str, str]) -> WeightIndex:
    weight_map = {name: renamed[file] for name, file in held_names(part, listed).items()}
    total = sum(header.tensor_nbytes for header in part.headers_of(listed))
    metadata = dict(listed.index.metadata) if listed.index else {}
    return WeightIndex(weight_map, {**metadata, "total_size": total})


def _list_after(before: FolderListing, plan: Plan) -> FolderListing:
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
    return FolderListing(before.is_pipeline, tuple(parts), before.absent, dotless)

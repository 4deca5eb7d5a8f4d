"""Another variant tag for weight sets: names and index change, in one transaction; no byte of weights is moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from converter.errors import BadFile, BadRequest, OutputRefused, Unsupported
from converter.libraries import note_tag
from converter.models.component import Component, WeightSet
from converter.models.hub_cache import refuse_cache
from converter.models.index import WeightIndex, read_index
from converter.models.model import open_model
from converter.models.names import WeightsName, check_variant
from converter.plan.make import join
from converter.plan.types import Plan, PlannedFile, PlannedSet, Target
from converter.recipes.outputs import refuse_links
from converter.recipes.request import Request
from converter.run.staging import find_strangers
from converter.storage import Place


def plan_rename(request: Request) -> Plan:
    """Plan to give the sets of the variant that is selected the tag that is to be written, in current spelling.

    ``"none"`` stands for untagged. The same tag twice mends legacy spellings. Raises BadRequest where there is no such
    variant, OutputRefused where the new name is taken.
    """
    before, after, components = request.selection.from_variant, request.writing.variant, request.selection.components
    if before is None or after is None:
        raise BadRequest(request.source, "needs a variant to rename, and its new tag", "For untagged weights say none.")
    refuse_cache(request.source)
    old = None if before == "none" else before
    new = None if after == "none" else check_variant(after)
    model = open_model(request.source)
    parts = [part for part in model.components if not components or part.name in components]
    found = [(part, one) for part in parts for one in part.weight_sets if one.name.variant == old]
    if not found:
        raise BadRequest(model.path, f"has no variant {before!r}", "'wconv inspect' lists what it has.")
    planned = ((part, one, _plan_set(part, one, replace(one.name, variant=new))) for part, one in found)
    renamed = [(part, one, plan) for part, one, plan in planned if plan is not None]
    plan = Plan(
        source=model,
        target=Target.at(model.root),
        sets=tuple(plan for _, _, plan in renamed),
        replaced=tuple(join(part.name, name) for part, one, _ in renamed for name in one.all_names),
        notes=find_strangers(model.root) + note_tag(model, new),
        destroys_source=bool(renamed),
    )
    refuse_links(plan)
    return plan


def _plan_set(component: Component, weight_set: WeightSet, name: WeightsName) -> PlannedSet | None:
    if weight_set.is_of_many:
        raise Unsupported(weight_set.path, "is of a format whose files have no variants", "'wconv recast' makes one.")
    new_names = name.files(len(weight_set.file_names))
    renamed = dict(zip(weight_set.file_names, new_names, strict=True))
    index_name = name.index if len(new_names) > 1 else None
    if (weight_set.file_names, weight_set.index_name) == (new_names, index_name):
        return None
    for other in component.weight_sets:
        if other != weight_set and other.name == name:
            raise OutputRefused(other.path, "exists", "Remove or rename it first.")
    index = None
    if index_name and weight_set.index_name:
        content = read_index(weight_set.folder / weight_set.index_name)
        weight_map = {tensor: renamed[shard] for tensor, shard in content.weight_map.items()}
        index = (join(component.name, index_name), WeightIndex(weight_map, content.metadata).render())
    elif index_name:
        raise BadFile(weight_set.path, "is one of several shards without an index", "Reshard it first.")
    return PlannedSet(component.name, weight_set, name, link_files(component, weight_set, new_names), index)


def link_files(component: Component, weight_set: WeightSet, names: Sequence[str]) -> tuple[PlannedFile, ...]:
    """Plan a set's files under other names; their content stays."""
    return tuple(
        PlannedFile(join(component.name, new), weight_set.name.format, b"", (), _size_of(place), {}, place)
        for place, new in zip((weight_set.folder / old for old in weight_set.file_names), names, strict=True)
    )


def _size_of(place: Place) -> int:
    info = place.info()
    if info is None or info.kind != "file":
        raise BadFile(place, "is not there, and an index names it", "Fetch the missing file.")
    return info.nbytes

"""Another variant tag for weight sets: names and index change, in one transaction; no byte of weights is moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from converter.errors import BadFile, BadRequest, OutputRefused
from converter.libraries import note_tag
from converter.models.component import Component, WeightSet
from converter.models.hub_cache import refuse_cache
from converter.models.index import WeightIndex, read_index
from converter.models.model import open_model
from converter.models.names import WeightsName, check_variant
from converter.models.select import Wishes
from converter.plan.make import Plan, SetPlan, Shard, Target
from converter.recipes.outputs import refuse_links
from converter.run.staging import find_strangers, recover
from converter.storage import Place
from converter.storage.local import as_path


def prepare_rename(
    source: Path, before: str, after: str, components: tuple[str, ...] = (), recovering: bool = True
) -> tuple[str, Plan | None]:
    """Name a request for ``run_plan`` and plan it; None for the plan if a killed run of it needed just finishing."""
    refuse_cache(source)
    request = repr(("rename", str(source.absolute()), before, after, components))
    if recovering and recover(source if source.is_dir() else source.parent, request):
        return request, None
    return request, plan_rename(source, before, after, components)


def plan_rename(source: Path | str, before: str, after: str, components: tuple[str, ...] = ()) -> Plan:
    """Plan to give the sets of variant ``before`` the tag ``after`` (``"none"`` for untagged), in current spelling.

    The same tag twice mends legacy spellings. Raises BadRequest where there is no such variant, OutputRefused where the
    new name is taken.
    """
    old = None if before == "none" else before
    new = None if after == "none" else check_variant(after)
    source = as_path(source)
    refuse_cache(source)
    model = open_model(source)
    sets: list[SetPlan] = []
    superseded: list[str] = []
    found = False
    for component in model.components:
        for weight_set in component.weight_sets:
            if weight_set.name.variant != old or (components and component.name not in components):
                continue
            found = True
            planned = _plan_set(component, weight_set, replace(weight_set.name, variant=new))
            if planned is not None:
                sets.append(planned)
                superseded += ((Path(component.name) / name).as_posix() for name in weight_set.all_names)
    if not found:
        raise BadRequest(model.path, f"has no variant {before!r}", "'wconv inspect' lists what it has.")
    wishes = Wishes(form=None, in_place=True)
    target, notes = Target(model.root.spelled, is_new=False), find_strangers(model.root.spelled)
    notes += note_tag(model, new)
    plan = Plan(model, target, tuple(sets), superseded=tuple(superseded), notes=notes, wishes=wishes)
    refuse_links(plan)
    return plan


def _plan_set(component: Component, weight_set: WeightSet, name: WeightsName) -> SetPlan | None:
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
        index = ((Path(component.name) / index_name).as_posix(), WeightIndex(weight_map, content.metadata).render())
    elif index_name:
        raise BadFile(weight_set.path, "is one of several shards without an index", "Reshard it first.")
    return SetPlan(component.name, weight_set, name, link_shards(component, weight_set, new_names), index, {})


def link_shards(component: Component, weight_set: WeightSet, names: Sequence[str]) -> tuple[Shard, ...]:
    """Plan a set's files under other names; their content stays."""
    base = Path(component.name)
    return tuple(
        Shard((base / new).as_posix(), weight_set.name.format, b"", (), _size_of(path), {}, path.spelled)
        for path, new in zip((weight_set.folder / old for old in weight_set.file_names), names, strict=True)
    )


def _size_of(path: Place) -> int:
    info = path.info()
    if info is None or info.kind != "file":
        raise BadFile(path, "is not there, and an index names it", "Fetch the missing file.")
    return info.nbytes

"""Models with LoRAs merged into their weights, without loading them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from converter.errors import BadRequest, Unsupported, WconvError, name_some, spell_count
from converter.models.adapters import ADAPTER_CONFIG, open_adapter_config
from converter.models.checkpoint import Checkpoint
from converter.models.component import Component, WeightSet, has_quantization
from converter.models.hub_cache import check_places, snapshot_of
from converter.models.names import STEMS, fold_modules
from converter.models.schemes import quantized_in
from converter.plan.make import join
from converter.plan.types import Order, Plan, Rest
from converter.recipes.adapters import open_adapter, places_of
from converter.recipes.carry import left_behind
from converter.recipes.request import Request
from converter.recipes.steps import Job, into_one_set, make_ready, open_job, open_sets, plan_job, select
from converter.storage import Given, Place, place_of
from converter.tensors.base import Tensor
from converter.tensors.derived import cast
from converter.transforms.merge.base import Untied, find_untied
from converter.transforms.merge.product import merged
from converter.transforms.merge.targets import Merge, Opened, Weighted, find_merges, take_adapter

MAX_ADAPTERS = 64
_NAMED = 6
_ONE_FILE = "The base comes first, and then its adapters: name the file of the adapter."
# The parts of a pipeline that adapters are for.
_PARTS = re.compile(r"(transformer|unet|prior|text_encoder)(_\d+)?")


@dataclass(frozen=True, slots=True)
class WeightedAdapter:
    """An adapter that is asked for, and its weight: what it adds is multiplied by that."""

    place: Place
    weight: float = 1.0

    @classmethod
    def of(cls, given: Given, weight: float = 1.0) -> WeightedAdapter:
        """Give one by a path or URL. Raises BadRequest for a weight that is no finite number."""
        place = place_of(given)
        if not abs(weight) < 1e9:
            raise BadRequest(place, f"is to be merged with the weight {weight}", "A weight is a number such as 0.8.")
        return cls(place, float(weight))


def plan_merged(request: Request, asked: Sequence[WeightedAdapter]) -> Plan:
    """Plan a model with adapters merged into it: W + weight * alpha / r * B @ A in float32, rounded once.

    What no adapter merges is copied, or cast where a dtype is asked for. Raises BadRequest for an adapter that is for
    another base, Unsupported for what is no plain LoRA and for a base that is quantized.
    """
    if not 0 < len(asked) <= MAX_ADAPTERS:
        raise BadRequest(request.source, f"is to have {len(asked)} adapters merged into it", "Name from 1 to 64.")
    for one in asked:
        check_places(one.place, request.output)
        if request.output is not None and any(map(request.output.is_same, (one.place, one.place.parent))):
            raise BadRequest(request.output, "is an adapter that is to be merged, or holds it", "Name a new folder.")
    job = open_job(into_one_set(request))
    weighted = [opened for one in asked for opened in _open_adapters(one)]
    parts = [one.name for one in job.model.components if not one.name or _PARTS.fullmatch(one.name)]
    meant = request.selection.components or tuple(parts)
    is_whole = request.casting.dtype is not None and not request.selection.components  # all parts are cast
    selected = _without_adapters(select(job, components=() if is_whole else meant))
    opened = open_sets(job, selected)
    base = [one for one in opened if not meant or one[0].name in meant]
    merges = _find_merges([one for one in weighted if one.weight], base)
    if merges and not is_whole:
        selected = [one for one in selected if one[0].name in merges]
        opened = [one for one in opened if one[0].name in merges]
    orders = [
        _merge(order, checkpoint, merges.get(order.component.name, {}), job)
        for order, (_, checkpoint) in zip(make_ready(job, opened), opened, strict=True)
    ]
    plan = plan_job(job, selected, orders, Rest(notes=tuple(_tell(weighted, merges))))
    # transformers would look for the weights of an adapter whose config lies beside the base.
    return left_behind(plan, {join(component.name, ADAPTER_CONFIG) for component, _ in selected}, "of an adapter")


def _without_adapters(selected: Sequence[tuple[Component, WeightSet]]) -> list[tuple[Component, WeightSet]]:
    """Leave out adapters that lie beside the base. Raises BadRequest where that leaves several sets of one part."""
    found = [one for one in selected if one[1].name.stem not in STEMS["peft"].values()]
    counts = Counter(component.name for component, _ in found)
    for component, _ in found:
        if counts[component.name] > 1:
            labels = name_some([one.label for other, one in found if other is component], _NAMED)
            raise BadRequest(component.path, f"has several sets of weights: {labels}", "Name the one you want.")
    return found


def _open_adapters(one: WeightedAdapter) -> list[Weighted]:
    """Open an adapter, or those that PEFT has in a folder for each part of a pipeline."""
    opened = []
    places = places_of(snapshot_of(one.place.pinned()))
    for place in places:
        component, checkpoint = open_adapter(place, _ONE_FILE)
        label = (one.place.name or str(one.place)) + (f"/{place.name}" if len(places) > 1 else "")
        opened.append(take_adapter(checkpoint, open_adapter_config(component), one.weight, label))
    return opened


def _find_merges(acting: Sequence[Weighted], opened: Opened) -> dict[str, dict[str, Merge]]:
    """Find what becomes of which tensors. Raises Unsupported where they may be those of a part that is quantized."""
    plain, quantized = [], []
    for component, checkpoint in opened:
        found = quantized_in(checkpoint)
        if found or has_quantization(component.config):
            how = str(found[0]) if found else "its config.json has a quantization_config"
            quantized.append((checkpoint.weight_set.path, f"is quantized ({how})"))
        else:
            plain.append((component, checkpoint))
    try:
        return find_merges(acting, plain)
    except WconvError as error:
        for where, problem in quantized:
            advice = "'wconv dequantize' makes plain numbers of it, which adapters merge into."
            raise Unsupported(where, problem, advice) from error
        raise


def _merge(order: Order, before: Checkpoint, merges: Mapping[str, Merge], job: Job) -> Order:
    """Let a set be written with its merges: each tensor in the dtype that it has in the order."""
    if not merges:
        return order
    untied = find_untied(order.component, before, merges)
    first = {tensor.name: tensor for tensor in before.tensors}
    on_overflow = job.request.casting.on_overflow
    heads = dict(untied.heads) if untied else {}
    beside: dict[str, list[str]] = {}
    for head, embedding in heads.items():
        beside.setdefault(embedding, []).append(head)

    def write(name: str, read: Tensor, ready: Tensor) -> Tensor:
        merge = merges.get(name)
        if merge is None:
            return ready._replace(name=name)
        source = merge.replaced.source if merge.replaced else read.source
        if merge.products:
            source = merged(source, merge.products)
        return cast(Tensor(name, source, ready.beside), ready.dtype, on_overflow)

    def all_of(tensor: Tensor) -> list[Tensor]:
        read = first[tensor.name]
        return [write(name, read, tensor) for name in (tensor.name, *beside.get(tensor.name, ()))]

    loose = untied.names if untied else frozenset()
    files = tuple(
        replace(
            file,
            tensors=tuple(one for tensor in file.tensors for one in all_of(tensor)),
            metadata={key: value for key, value in file.metadata.items() if not (key in loose and value in loose)},
        )
        for file in order.checkpoint.files
    )
    ties = {name: kept for name, kept in order.ties.items() if not (name in loose and kept in loose)}
    notes = order.checkpoint.notes
    changed = order._replace(ties=ties)
    if untied:
        changed, note = _untie(changed, untied)
        notes += note
    return changed._replace(checkpoint=replace(order.checkpoint, files=files, notes=notes))


def _untie(order: Order, untied: Untied) -> tuple[Order, tuple[str, ...]]:
    """Let a config say that what was tied is so no longer, and note it."""
    config: dict[str, Any] = order.component.config
    if config.get("tie_word_embeddings") is False:
        return order, ()
    note = f"{' and '.join(sorted(untied.names))} are no longer tied, as one was changed: config.json says so"
    return order.with_config({**config, "tie_word_embeddings": False}), (note,)


def _tell(weighted: Sequence[Weighted], merges: Mapping[str, Mapping[str, Merge]]) -> list[str]:
    """Say what was merged, and into what."""
    told = []
    for one in weighted:
        if not one.weight:
            told.append(f"{one.label} has the weight 0: nothing of it is merged")
            continue
        ranks = name_some(list(one.adapter.ranks), 3)
        told.append(
            f"merged: {one.label}, weight {one.weight:g}, rank {ranks}, {spell_count(len(one.scales), 'module')}"
        )
        if one.replaced:
            told.append(f"taken from {one.label} as they are: {name_some(sorted(one.replaced), _NAMED)}")
    for component, mine in merges.items():
        where = f"{component}: " if component else ""
        names = name_some(list(fold_modules(mine)), _NAMED)
        told.append(f"{where}changed {spell_count(len(mine), 'tensor')}: {names}")
    return told

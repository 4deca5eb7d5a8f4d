"""A LoRA adapter under the names of another program: read, told what it does to which module, written and planned."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from converter.errors import BadRequest, Unsupported, spell_count
from converter.models.adapters import ADAPTER_CONFIG, Adapter, find_adapter, open_adapter_config
from converter.models.checkpoint import Checkpoint
from converter.models.component import Component
from converter.models.configs import render_json
from converter.models.hub_cache import check_places, snapshot_of
from converter.models.model import Model
from converter.models.names import STEMS, WeightsName, parse_name
from converter.models.select import check_choice
from converter.plan.make import join
from converter.plan.types import Order, Plan, Rest
from converter.recipes.adapters import open_adapter, places_of
from converter.recipes.outputs import open_target
from converter.recipes.request import Request, names_file
from converter.recipes.steps import Job, make_order, plan_job, refuse_file
from converter.storage import Place
from converter.transforms.lora.bases import PARTS
from converter.transforms.lora.forms import Target, Written, write
from converter.transforms.lora.parts import Changes, describe_base, find_changes

# What each looks for in a folder (``LORA_WEIGHT_NAME_SAFE`` in ``diffusers/loaders/lora_base.py``); kohya's may have
# any name.
_NAMES = {"diffusers": "pytorch_lora_weights", "peft": STEMS["peft"]["safetensors"]}


def plan_lora(request: Request, to: str) -> Plan:
    """Plan an adapter in the names of ``to``: a file or a folder, for PEFT a folder, with one in it for each part.

    Raises Unsupported for what is no plain LoRA, or for a model that wconv does not know, BadRequest for one that has
    these names already.
    """
    check_choice("form of an adapter", to, Target)
    assert request.output is not None
    check_places(request.source, request.output)
    source = snapshot_of(request.source)
    opened = _open_adapters(source)
    changes = _all_changes([find_changes(adapter, part) for _, adapter, part in opened])
    form: Target = to  # type: ignore[assignment]
    written = write(changes, form)
    _refuse_same(source, [adapter for _, adapter, _ in opened], written, to)
    request = replace(
        request,
        source=source,
        writing=replace(request.writing, format="safetensors", tied="duplicate", max_shard_size=math.inf),
    )
    checkpoint = changes.adapter.checkpoint
    components = [Component(one.part, opened[0][0].path, (checkpoint.weight_set,), {}) for one in written]
    job = _open_job(request, components, to)
    name = job.named or WeightsName(_NAMES.get(to, checkpoint.name.stem), None, "safetensors")
    orders = [_order_of(job, *both, checkpoint, name) for both in zip(components, written, strict=True)]
    generated = {join(one.part, ADAPTER_CONFIG): render_json(one.config) for one in written if one.config}
    notes = (_describe(changes, to), *(note for one in written for note in one.notes))
    selected = [(component, adapter.checkpoint.weight_set) for component, adapter, _ in opened]
    return plan_job(job, selected, orders, Rest(generated=generated, notes=notes))


def _describe(changes: Changes, to: str) -> str:
    what = describe_base(changes.adapter, changes)
    modules = spell_count(len(changes.all), "module")
    return f"a LoRA{f' for {what}' if what else ''} of {modules}, from {changes.adapter.form} to {to}"


def _open_adapters(source: Place) -> list[tuple[Component, Adapter, str]]:
    """Open an adapter, or those that PEFT has in a folder for each part; with the part, where a folder names it."""
    places = places_of(source)
    return [
        (*_open_adapter(place), place.name if place.is_folder() and place.name in PARTS else "") for place in places
    ]


def _open_adapter(source: Place) -> tuple[Component, Adapter]:
    component, checkpoint = open_adapter(source)
    adapter = find_adapter(checkpoint, open_adapter_config(component))
    if adapter is None:
        advice = "Names of one hold lora_A and lora_B, or lora_down and lora_up: 'wconv inspect --tensors' lists them."
        raise Unsupported(checkpoint.weight_set.path, "is no LoRA adapter", advice)
    return component, adapter


def _all_changes(opened: list[Changes]) -> Changes:
    """Put what is read of several folders together."""
    first, *others = opened
    for other in others:
        both = set(other.parts) & set(first.parts)
        if both or (other.base and first.base and other.base is not first.base):
            what = f"is for {both.pop()} too" if both else "is for another model"
            raise BadRequest(other.adapter.where, f"{what}, as {first.adapter.where} is", "Name the folder of one.")
        note = first.note
        more = other.note
        note = note._replace(
            shared=note.shared | more.shared,
            joined={**note.joined, **more.joined},
            short=note.short | more.short,
            prefixes=note.prefixes | more.prefixes,
            blocks=note.blocks or more.blocks,
            alpha=note.alpha or more.alpha,
            alphas={**note.alphas, **more.alphas},
        )
        first = replace(first, base=first.base or other.base, all=(*first.all, *other.all), note=note)
    return first


def _refuse_same(source: Place, adapters: list[Adapter], written: Iterable[Written], to: str) -> None:
    """Raise BadRequest where nothing would change."""
    before = {tensor.name for adapter in adapters for tensor in adapter.checkpoint.tensors}
    after = {tensor.name for one in written for tensor in one.tensors}
    if all(adapter.form == to for adapter in adapters) and before <= after:
        raise BadRequest(source, f"has the names of {to} already", "'wconv to-safetensors' writes it in safetensors.")


def _open_job(request: Request, components: list[Component], to: str) -> Job:
    """Say where the output goes: a file, or a folder."""
    output = request.output
    assert output is not None
    model = Model(request.source, components[0].path, "file", tuple(components))
    named = None
    if names_file(output):
        parsed = parse_name(output.name)
        if to == "peft":
            refuse_file(output)
        if parsed is None or parsed.role != "single" or parsed.name.format != "safetensors":
            raise BadRequest(output, "is no name of one safetensors file", "Name a folder, or a file of .safetensors.")
        named, output = parsed.name, output.parent
    else:
        refuse_file(output)
    return Job(request, model, open_target(model, output, request.publishing.overwrite), named, carries=False)


def _order_of(job: Job, component: Component, one: Written, checkpoint: Checkpoint, name: WeightsName) -> Order:
    """Give a set to be written; it is made of all that was read."""
    file = replace(checkpoint.files[0], tensors=one.tensors, metadata=one.metadata)
    weight_set = replace(checkpoint.weight_set, name=name)
    made = replace(checkpoint, weight_set=weight_set, files=(file,), index_metadata={}, is_renamed=True)
    return make_order(component, made, name, job.request.casting, job.request.writing, is_beside=False)

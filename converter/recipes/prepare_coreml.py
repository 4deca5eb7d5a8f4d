"""The step before Core ML conversion: a pipeline folder as ``torch2coreml.py`` loads it, or why it cannot be one.

What the script needs is known in ``libraries/coreml.py``; here it is held against a folder, and planned.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from converter.errors import BadFile, BadRequest, Unsupported
from converter.libraries import coreml
from converter.libraries.coreml import COREML_VARIANT, Lack
from converter.models.checkpoint import Checkpoint, open_checkpoint
from converter.models.component import Component, WeightSet
from converter.models.configs import look_into, read_json, render_json
from converter.models.faults import ADVICE, find_lost, look
from converter.models.hub_cache import check_places, snapshot_of
from converter.models.inventory import Inventory
from converter.models.model import Model
from converter.models.schemes import quantized_in
from converter.plan.types import Plan, Rest
from converter.recipes.request import Request
from converter.recipes.steps import Job, make_ready, open_job, open_sets, plan_job, select
from converter.storage import Given, Place
from converter.transforms.names import rename_tensors
from converter.transforms.single_file.pipeline import open_single_file


def find_lacks(source: Place, inventory: Inventory | None = None) -> Iterator[Lack]:
    """List what a pipeline folder lacks that no conversion of weights can give it. Raises BadFile for no folder.

    ``inventory`` is what ``look`` gives of it, for who has it already.
    """
    model_index = _model_index(source)
    yield from coreml.find_lacks(source, model_index)
    if coreml.is_convertible(model_index):
        for fault in find_lost(inventory or look(source)):
            if coreml.has_weights(fault.component):
                yield Lack(fault.path, fault.problem, ADVICE[fault.code])


def _model_index(source: Place) -> Mapping[str, Any]:
    return look_into(source / "model_index.json")[0]


def _refuse(source: Place, lacks: Iterable[Lack]) -> None:
    """Raise BadFile or Unsupported for the first thing that a source lacks, with all others named, if there is one."""
    lacks = list(lacks)
    if not lacks:
        return
    first, *others = lacks
    names = [lack.path.relative_to(source) if lack.path != source else str(source) for lack in others]
    more = f" Besides: {', '.join(f'{name} {lack.problem}' for name, lack in zip(names, others, strict=True))}."
    raise first.error(first.path, first.problem, first.advice + (more if others else ""))


def request_coreml(source: Given, output: Given, **options: Any) -> Request:
    """Give the request for a pipeline in fp16, tagged, one file a part; ``options`` are those of Request."""
    fixed = {"every_variant": False, "dtype": COREML_VARIANT, "variant": COREML_VARIANT, "max_shard_size": math.inf}
    return Request.of(source, output, **options, **fixed)


def plan_coreml(request: Request, keep_default: bool = False, ema: bool = False, config: Place | None = None) -> Plan:
    """Plan a pipeline folder that the script loads, with ``keep_default`` its untagged weights too.

    ``ema`` and ``config`` are as in ``open_single_file``, and for such a file only. Raises BadFile or Unsupported for
    what the script would miss, before anything is written.
    """
    check_places(request.source, request.output)
    request = replace(request, source=snapshot_of(request.source))
    config = config and snapshot_of(config)
    untagged = replace(
        request,
        casting=replace(request.casting, dtype=None),
        writing=replace(request.writing, variant="none"),
        selection=replace(request.selection, from_variant="none"),
    )
    if request.source.is_file():
        return _plan_single_file(request, untagged if keep_default else None, ema, config)
    if ema or config is not None:
        option = "--ema" if ema else "--config"
        raise BadRequest(request.source, f"is a folder, and {option} is for a single file", "Leave it out.")
    _refuse(request.source, find_lacks(request.source))
    job = open_job(request)
    selected = _select(job)
    opened = open_sets(job, selected)
    for _, checkpoint in opened:
        _refuse_quantized(checkpoint)
    orders = make_ready(job, list(itertools.starmap(_longer, opened)))
    if keep_default:
        others = select(job, untagged)
        orders += make_ready(job, list(itertools.starmap(_longer, open_sets(job, others))), untagged)
        selected += others
    return plan_job(job, selected, orders, Rest(generated=_old_classes(request.source)))


def _plan_single_file(request: Request, untagged: Request | None, ema: bool, config: Place | None) -> Plan:
    if config is not None:
        _refuse(config, coreml.find_lacks(config, _model_index(config)))
    checkpoint = open_checkpoint(request.source)
    _refuse_quantized(checkpoint)
    opened = open_single_file(checkpoint, config, ema, follow_links=request.publishing.follow_links)
    _refuse_part(request.source, opened.model)
    job = open_job(request, opened.model)
    parts = [_longer(component, checkpoint) for component, checkpoint in opened.checkpoints]
    orders = make_ready(job, parts) + (make_ready(job, parts, untagged) if untagged else [])
    selected = [(component, checkpoint.weight_set) for component, checkpoint in opened.checkpoints]
    return plan_job(job, selected, orders, Rest(opened.copied, opened.generated, opened.notes))


def _refuse_part(source: Place, model: Model) -> None:
    """Raise BadFile for a part of a pipeline, Unsupported for a whole one that the script does not convert."""
    if model.kind != "pipeline":
        [part] = model.components
        problem = f"holds a {part.class_name} alone, and Core ML models are made of a whole pipeline"
        raise BadFile(source, problem, "Take a checkpoint with its VAE and its text encoders in it.")
    index = {"_class_name": model.class_name}
    if not coreml.is_convertible(index):
        _refuse(source, coreml.find_lacks(source, index))


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    for one in quantized_in(checkpoint):
        raise Unsupported(checkpoint.weight_set.path, f"is quantized ({one}), which Core ML does not take", one.advice)


def _longer(component: Component, checkpoint: Checkpoint) -> tuple[Component, Checkpoint]:
    """Give a text encoder and a safety checker the names that transformers 4 knows."""
    prefix, names = coreml.longer_names(component.class_name, (tensor.name for tensor in checkpoint.tensors))
    if not prefix:
        return component, checkpoint
    note = f"{prefix} was put before names in {checkpoint.weight_set.path.name}, as transformers 4 needs it"
    return component, replace(rename_tensors(checkpoint, names), notes=(*checkpoint.notes, note))


def _old_classes(source: Place) -> Mapping[str, bytes]:
    """Give the model_index.json that is written in place of the source's, if it must be another."""
    content = read_json(source / "model_index.json")
    edited = coreml.old_classes(content)
    return {"model_index.json": render_json(edited)} if edited != content else {}


def _select(job: Job) -> list[tuple[Component, WeightSet]]:
    """Of each part take the fp16 weights, else the untagged ones, else what there is."""
    selected = []
    for component in job.model.components:
        has_variant = any(one.name.variant == COREML_VARIANT for one in component.weight_sets)
        from_variant = COREML_VARIANT if has_variant else None
        selected += select(job, components=(component.name,), from_variant=from_variant)
    return selected

"""The step before Core ML conversion: a pipeline folder as ``torch2coreml.py`` loads it, or why it cannot be one.

What the script needs is known in ``libraries/coreml.py``; here it is held against a folder, and planned.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from converter.doctor.checks import look, run_checks
from converter.doctor.findings import Finding
from converter.dtypes import BY_ALIAS, OnOverflow
from converter.errors import BadRequest
from converter.libraries import coreml
from converter.libraries.coreml import COREML_VARIANT, Lack
from converter.models.checkpoint import Checkpoint, rename_tensors
from converter.models.component import Component, WeightSet
from converter.models.configs import look_into, read_json, render_json
from converter.models.hub_cache import check_places, snapshot_of
from converter.models.model import Model
from converter.models.select import Wishes, choose_sets
from converter.plan.make import Plan
from converter.recipes.convert import plan_conversion, plan_rest, plan_single_file, request_of
from converter.run.staging import recover
from converter.storage import Place, place_of
from converter.transforms.stable_diffusion import open_single_file

_FATAL = ("file-damaged", "shard-missing", "component-missing", "config-unreadable", "index-unreadable")


def find_lacks(given: Place | Path, findings: Iterable[Finding] | None = None) -> Iterator[Lack]:
    """List what a pipeline folder lacks that no conversion of weights can give it. Raises BadFile for no folder.

    ``findings`` are the doctor's, where it has looked already.
    """
    source = place_of(given)
    model_index, error = look_into(source / "model_index.json")
    model_index = {} if error else model_index
    yield from coreml.find_lacks(source, model_index)
    if not coreml.is_convertible(model_index):
        return
    for finding in run_checks(look(source)) if findings is None else findings:
        if finding.code in _FATAL and coreml.has_weights(finding.component):
            yield Lack(finding.path, finding.problem, finding.kind.mending)


def check_source(given: Place | Path, findings: Iterable[Finding] | None = None) -> None:
    """Raise BadFile or Unsupported for the first thing that a source lacks, with all others named.

    ``findings`` are as in ``find_lacks``: none for a folder that is there for its configs.
    """
    source = place_of(given)
    lacks = list(find_lacks(source, findings))
    if not lacks:
        return
    first, *others = lacks
    names = [lack.path.relative_to(source) if lack.path != source else str(source) for lack in others]
    more = f" Besides: {', '.join(f'{name} {lack.problem}' for name, lack in zip(names, others, strict=True))}."
    raise first.error(first.path, first.problem, first.advice + (more if others else ""))


def prepare_coreml(
    source: Path,
    output: Path,
    keep_default: bool,
    on_overflow: OnOverflow,
    overwrite: bool,
    *,
    ema: bool = False,
    config: Path | None = None,
    follow_links: bool = False,
    recovering: bool = True,
) -> tuple[str, Plan | None]:
    """Name a request for ``run_plan`` and plan it; None for the plan if a killed run of it needed just finishing.

    ``ema`` and ``config`` are as in ``open_single_file``, and for such a file only.

    Raises BadFile or Unsupported for what the script would miss, before anything is written.
    """
    check_places(source, output)
    source = snapshot_of(source)
    config = config and snapshot_of(config)
    wishes = Wishes(
        every_variant=False,
        dtype=BY_ALIAS[COREML_VARIANT],
        variant=COREML_VARIANT,
        max_shard_nbytes=math.inf,
        on_overflow=on_overflow,
        overwrite=overwrite,
        follow_links=follow_links,
    )
    request = request_of(source, output, ("coreml", keep_default, ema, str(config), wishes))
    finished = recovering and recover(output, request)

    def make(wishes: Wishes) -> Plan:
        return _plan(source, output, wishes, keep_default, ema, config)

    return request, plan_rest(finished, wishes, make)


def _plan(source: Path, output: Path, wishes: Wishes, keep_default: bool, ema: bool, config: Path | None) -> Plan:
    others = [replace(wishes, dtype=None, variant="none")] if keep_default else []
    if source.is_file():
        if config is not None:
            check_source(config, ())
        opened = open_single_file(source, config, ema, wishes.follow_links)
        return plan_single_file(opened, output, wishes, _adapt, others)
    if ema or config is not None:
        option = "--ema" if ema else "--config"
        raise BadRequest(source, f"is a folder, and {option} is for a single file", "Leave it out.")
    check_source(source)
    return plan_conversion(source, output, wishes, _choose, _adapt, edited=_old_classes(source), others=others)


def _adapt(component: Component, checkpoint: Checkpoint) -> tuple[Component, Checkpoint]:
    """Give a text encoder and a safety checker the names that transformers 4 knows."""
    prefix, names = coreml.longer_names(component.class_name, (info.name for info in checkpoint.tensors))
    if not prefix:
        return component, checkpoint
    note = f"{prefix} was put before names in {checkpoint.weight_set.path.name}, as transformers 4 needs it"
    return component, replace(rename_tensors(checkpoint, names), notes=(*checkpoint.notes, note))


def _old_classes(source: Path) -> dict[str, bytes]:
    """Give the model_index.json that is written in place of the source's, if it must be another."""
    content = read_json(place_of(source) / "model_index.json")
    edited = coreml.old_classes(content)
    return {"model_index.json": render_json(edited)} if edited != content else {}


def _choose(model: Model, wishes: Wishes) -> list[tuple[Component, WeightSet]]:
    """Of each part take the fp16 weights, else the untagged ones, else what there is; for untagged ones, those."""
    if wishes.variant == "none":
        return choose_sets(model, replace(wishes, from_variant="none"))
    chosen = []
    for component in model.components:
        has_variant = any(found.name.variant == COREML_VARIANT for found in component.weight_sets)
        one = replace(wishes, components=(component.name,), from_variant=COREML_VARIANT if has_variant else None)
        chosen += choose_sets(model, one)
    return chosen

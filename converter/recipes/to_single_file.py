"""A Diffusers pipeline, or one model of it, becomes a single file with the names that UIs know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from converter.errors import BadFile, BadRequest, OutputRefused, Unsupported, name_some
from converter.libraries.diffusers import DIFFUSERS
from converter.models.checkpoint import Checkpoint
from converter.models.component import Component, WeightSet, has_quantization
from converter.models.configs import read_json
from converter.models.growth import refuse_growth
from converter.models.hub_cache import check_places, snapshot_of
from converter.models.inventory import is_class, take_inventory
from converter.models.model import Model, model_of
from converter.models.names import WeightsName, parse_name
from converter.plan.types import Order, Plan, Rest
from converter.recipes.outputs import open_target
from converter.recipes.request import Request, names_file
from converter.recipes.steps import Job, open_sets, plan_job, select
from converter.recipes.to_diffusers import refuse_quantized
from converter.tensors.base import Tensor, WeightsFile
from converter.transforms.dtype import recast
from converter.transforms.single_file.families import FAMILIES, family_of, part_of
from converter.transforms.single_file.family import ABSENT, SCHEDULER, Family
from converter.transforms.single_file.joined import find_untold, join, marks_of
from converter.transforms.single_file.pipeline import chosen

_Named = list[tuple[str, Component]]


class _Source(NamedTuple):
    """What is to be joined: parts of a family by their names in it, and what is said of that."""

    model: Model
    family: Family
    parts: _Named
    notes: tuple[str, ...]


def plan_single_file(request: Request, without: Sequence[str] = ()) -> Plan:
    """Plan one file of a pipeline's parts, but for those ``without`` which it is asked for, or of one model.

    Raises Unsupported for a class, a part or a tensor that no table has, BadFile for a part that is missing.
    """
    check_places(request.source, request.output)
    named = _name_of(request)
    request = replace(request, source=snapshot_of(request.source))
    source = _look_at(request, without)
    whole = Component("", source.model.root, (), {})
    model = Model(source.model.path, source.model.root, "file", (whole,), _class_of(source), source.model.passed)
    assert request.output is not None
    target = open_target(model, request.output.parent, request.publishing.overwrite)
    job = Job(request, model, target, named, carries=False)
    opened = _open(job, source)
    tensors, notes = join(source.family, opened)
    marks, said = _say_of_whole(source) if len(opened) > 1 else ([], [])
    weight_set = _set_of(source.model, [checkpoint for _, _, checkpoint in opened], named)
    _refuse_own(request, weight_set)
    notes = [*source.notes, *notes, *said]
    checkpoint = _joined(weight_set, [checkpoint for _, _, checkpoint in opened], [*tensors, *marks])
    order = Order(whole, checkpoint, named, {}, request.casting.dtype)
    return plan_job(job, [(whole, weight_set)], [order], Rest(notes=tuple(notes)))


def _class_of(source: _Source) -> str:
    """Give the class of Diffusers that loads the file; none where it has no ``from_single_file``."""
    [(name, component), *others] = source.parts
    if others:
        return source.model.class_name
    return component.class_name if source.family.parts[name].library is DIFFUSERS else ""


def _name_of(request: Request) -> WeightsName:
    """Give the name of the file that is written. Raises BadRequest for what is none."""
    output = request.output
    advice = "Name a file: -o model.safetensors."
    if output is None:
        raise BadRequest(request.source, "needs a file to be written to", advice)
    parsed = parse_name(output.name) if names_file(output) else None
    if parsed is None or parsed.role != "single":
        raise BadRequest(output, "is no name for a single file of weights", advice)
    return parsed.name


def _look_at(request: Request, without: Sequence[str]) -> _Source:
    """See what a source is: a pipeline, or one model of it."""
    inventory = take_inventory(request.source)
    model = model_of(inventory)
    source = _of_pipeline(model, without) if model.kind == "pipeline" else _of_one(model, without)
    names = {component.name for _, component in source.parts}
    for part in inventory.parts:
        for problem in part.problems if part.name in names else ():
            raise problem
    return source


def _of_one(model: Model, without: Sequence[str]) -> _Source:
    """Give one model alone. Raises Unsupported for a class that no table has."""
    component = model.components[0]
    found = part_of(component.class_name)
    if found is None or len(model.components) > 1:
        if model.kind == "file":
            problem = "is a file, and files are made of folders, whose configs say what is in them"
            raise Unsupported(model.path, problem, "Name the folder of the pipeline, or of its model.")
        what = component.class_name or "model of a class that no config.json names"
        known = ", ".join(
            dict.fromkeys(name for one in FAMILIES for part in one.parts.values() for name in part.classes)
        )
        advice = f"Name the folder of a pipeline, or of one of: {known}."
        raise Unsupported(model.path, f"holds a {what}, and no table has that", advice)
    if without:
        raise BadRequest(model.path, "is one model, and --without is for the parts of a pipeline", "Leave it out.")
    family, name = found
    return _Source(model, family, [(name, component)], ())


def _of_pipeline(model: Model, without: Sequence[str]) -> _Source:
    """Give the parts of a pipeline that a single file of its family has."""
    index = read_json(model.root / "model_index.json")
    there = {component.name: component for component in model.components}
    family = family_of(model.class_name, {name: one.config for name, one in there.items()})
    if family is None:
        raise _of_no_table(model)
    named = {name: entry for name, entry in index.items() if is_class(entry)}
    notes = []
    for name in there:
        if name in family.apart and name in named:
            notes.append(f"left out: {name} (it is no part of {family.name}'s own files)")
            continue
        if name not in family.parts and name in named and name not in ABSENT:
            problem = f"holds a {name}, which no single file of {family.name} has"
            raise Unsupported(model.root / name, problem, "Convert the folders of its other parts one by one.")
        if name not in family.parts:
            why = "no single file holds it" if name in ABSENT else "model_index.json does not name it"
            notes.append(f"left out: {name or 'the weights beside model_index.json'} ({why})")
    kept = chosen(family, [name for name in family.parts if name in there and name in named], without)
    for name in chosen(family, family.parts, without):
        if name not in kept and not family.parts[name].is_optional:
            leave = "." if name == family.core else f", or leave it out: --without {_asked(family, name)}."
            raise BadFile(model.root / name, f"holds no weights, and {family.name} has a {name}", f"Fetch it{leave}")
        if name not in kept:
            notes.append(f"it has no {name}, nor has the file")
    left = [name for name in there if name in family.parts and name not in kept]
    asked = [name for name in left if name in named]
    notes += (f"left out, as asked: {name}" for name in asked)
    if asked and len(kept) > 1:
        them, files = ("them", "files of their own") if len(asked) > 1 else ("it", "a file of its own")
        notes.append(f"a UI loads {them} from {files}, and from_single_file has to be given {them}")
        model = replace(model, passed=family.passed(asked))
    for name in kept:
        classes = family.parts[name].classes
        if named[name][1] not in classes:
            problem = f"is a {named[name][1]:.60}, and {family.name} has a {' or '.join(classes)} there"
            raise Unsupported(model.root / name, problem, "No table has that.")
    first = f"{model.path.name} is a {family.name} pipeline, of which the file gets {name_some(kept, len(kept))}"
    return _Source(model, family, [(name, there[name]) for name in kept], (first, *notes))


def _of_no_table(model: Model) -> Unsupported:
    """Give what is said of a pipeline that is of no family."""
    known = dict.fromkeys(name for one in FAMILIES for name in one.pipelines)
    what = f"is a {model.class_name}" if model.class_name else "names no class of a pipeline"
    if model.class_name in known:
        what += " for another purpose, as a refiner is"
    return Unsupported(model.path, f"{what}, and no table has that", f"There are tables for: {', '.join(known)}.")


def _asked(family: Family, name: str) -> str:
    return "text-encoders" if name in family.encoders else name


def _open(job: Job, source: _Source) -> list[tuple[str, Component, Checkpoint]]:
    """Open each part, cast as is asked for. Raises Unsupported for quantized weights."""
    names = tuple(component.name for _, component in source.parts)
    reading = job._replace(model=source.model)
    opened = open_sets(reading, select(reading, components=names, every_variant=False))
    by_name = {component.name: checkpoint for component, checkpoint in opened}
    parts = []
    for name, component in source.parts:
        checkpoint = by_name[component.name]
        refuse_quantized(checkpoint)
        if has_quantization(component.config):
            advice = "'wconv dequantize' writes its weights as plain numbers."
            raise Unsupported(component.path / "config.json", "says that its weights are quantized", advice)
        refuse_growth(checkpoint.weight_set.path, checkpoint.tensors)
        parts.append((name, component, recast(component, checkpoint, job.request.casting)))
    return parts


def _say_of_whole(source: _Source) -> tuple[list[Tensor], list[str]]:
    """Give the marks of a pipeline's file, and notes of what that says by them, and of what it does not."""
    family, scheduler = source.family, read_json(source.model.root / SCHEDULER)
    configs = {name: component.config for name, component in source.parts}
    marks, notes = marks_of(family, scheduler)
    notes += find_untold(family, configs, scheduler)
    if family.remark and not configs.keys().isdisjoint(family.encoders):
        notes.append(family.remark)
    return marks, notes


def _set_of(model: Model, checkpoints: Sequence[Checkpoint], named: WeightsName) -> WeightSet:
    """Give all files that are read as one set, by their paths from the pipeline's folder."""
    sets = [checkpoint.weight_set for checkpoint in checkpoints]
    names = [(one.folder / name).relative_to(model.root) for one in sets for name in one.all_names]
    return WeightSet(model.root, named, tuple(names))


def _refuse_own(request: Request, weight_set: WeightSet) -> None:
    """Raise OutputRefused where the output is a file that is read."""
    output = request.output
    assert output is not None
    if any(output.is_same(weight_set.folder / name) for name in weight_set.file_names if output.exists()):
        raise OutputRefused(output, "is a file that is read", "Name another.")


def _joined(weight_set: WeightSet, checkpoints: Sequence[Checkpoint], tensors: Sequence[Tensor]) -> Checkpoint:
    """Give tensors as one set of one file, with what is to be said of those that they are made of."""
    first = checkpoints[0].files[0]
    file = WeightsFile(first.place, first.format, tuple(tensors), {})
    kept = {name: dtype for checkpoint in checkpoints for name, dtype in checkpoint.kept.items()}
    notes = tuple(dict.fromkeys(note for checkpoint in checkpoints for note in checkpoint.notes))
    return Checkpoint(weight_set, (file,), {}, notes, kept, is_renamed=True)

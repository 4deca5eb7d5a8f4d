"""Models with their linear modules quantized, without loading them.

A scheme says what it makes of a weight (``Writer``). For some each weight is read twice: once to be measured, before
anything is planned, because a weight that the scheme cannot hold is left as it is, and that changes sizes and skip
list; and once to be written. What stays between is four bytes a row.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from converter.dtypes import RECAST_SOURCES, DType
from converter.errors import BadRequest, LossyCast, Unsupported, name_some
from converter.libraries import library_of
from converter.libraries.modules import Linears, find_linears
from converter.models.checkpoint import Checkpoint
from converter.models.component import Component, WeightSet, has_quantization
from converter.models.growth import refuse_growth
from converter.models.model import Model
from converter.models.names import fold_modules
from converter.models.schemes import quantized_in
from converter.plan.types import Order, Plan, QuantizedPart, Rest
from converter.recipes.request import Request
from converter.recipes.steps import Job, into_one_set, make_ready, open_job, open_sets, plan_job, select
from converter.run.tasks import DEFAULT_MEMORY_NBYTES, Call, Progress, run_tasks
from converter.storage import Place
from converter.tensors.base import Tensor
from converter.tensors.derived import cast
from converter.transforms.dtype import Casting
from converter.transforms.quantize import FILE_QUANTIZERS, QUANTIZERS
from converter.transforms.quantize.modules import (
    ModuleChoice,
    choose_in_file,
    choose_modules,
    expert_modules,
    find_experts,
    list_skipped,
    name_skipped,
    parted_experts,
)
from converter.transforms.quantize.write import Measure, Writer, check_measured, cut_rows

# The parts of a pipeline that are quantized where none is named: never the VAE, whose decoding suffers.
_PARTS = re.compile(r"(transformer|unet|text_encoder)(_\d+)?")


@dataclass(frozen=True, slots=True)
class Measuring:
    """How weights are read before there is a plan, and who is told."""

    executor: Executor | str | None = None
    memory_nbytes: int = DEFAULT_MEMORY_NBYTES
    progress: Progress | None = None

    def find(self, measure: Measure, weights: Iterable[Tensor]) -> tuple[dict[str, bytes], set[str]]:
        """Give what is found of each weight by its name, and the names of those that the scheme cannot hold."""
        blocks = (block for weight in weights for block in cut_rows(weight, measure.rows))
        calls = (Call(measure.find, block, block.nbytes, block.weight.name) for block in blocks)
        found: dict[str, dict[int, bytes]] = {}
        lossy: set[str] = set()
        for block, numbers, is_fit in run_tasks(calls, self.executor, None, self.memory_nbytes, self.progress):
            found.setdefault(block.weight.name, {})[block.begin] = numbers
            if not is_fit:
                lossy.add(block.weight.name)
        return {name: b"".join(parts[begin] for begin in sorted(parts)) for name, parts in found.items()}, lossy


_NAMED = 8  # of the modules, or kinds of them, of which a note tells
_ORIGINAL = "Quantize the model that it was made from, or what 'wconv dequantize' makes of it."
_NO_CHOICE = ModuleChoice()
_ALONE = Measuring()


def plan_quantized(
    request: Request,
    choice: ModuleChoice = _NO_CHOICE,
    measuring: Measuring = _ALONE,
    scheme: str = "int8",
) -> Plan:
    """Plan the quantized form of a model folder, or of a pipeline's transformer or unet and its text encoders.

    The selection names other parts; the dtype is for all that stays unquantized, None for the source's own. Reads every
    weight once where the scheme has to know its values before. Raises WconvError as the commands do, LossyCast where
    ``choice.strict`` has it so.
    """
    if scheme not in QUANTIZERS:
        raise BadRequest(request.source, f"cannot be written as {scheme!r}", f"There are {', '.join(QUANTIZERS)}.")
    writer = writer_of(scheme, request.source)
    is_file = writer not in QUANTIZERS.values()
    job = open_job(into_one_set(request))
    quantize = _Quantizing(writer, choice, measuring, request.casting)
    if is_file:
        return _plan_file(job, quantize)
    parts = _select_parts(job, writer)
    names = {component.name for component, _ in parts}
    # With a dtype the other parts are cast; without one they are carried over.
    selected = select(job, components=()) if request.casting.dtype else parts
    ready, done = [], {}
    for component, checkpoint in open_sets(job, selected):
        if component.name in names:
            checkpoint, done[component.name] = _quantize(component, checkpoint, quantize)
        ready.append((component, checkpoint))
    orders = [_with_config(order, done.get(order.component.name)) for order in make_ready(job, ready)]
    return plan_job(job, selected, orders, Rest(quantized=tuple(one.part for one in done.values())))


def writer_of(scheme: str, source: Place) -> Writer:
    """Give what writes a source in a scheme: of single files some have a form of their own."""
    is_of_files = scheme in FILE_QUANTIZERS and source.is_file()
    return FILE_QUANTIZERS[scheme] if is_of_files else QUANTIZERS[scheme]


def _plan_file(job: Job, how: _Quantizing) -> Plan:
    """Plan the quantized form of one file, whose modules nothing knows but its names."""
    selected = select(job)
    [(component, checkpoint)] = open_sets(job, selected)
    _refuse_quantized(checkpoint)
    refuse_growth(checkpoint.weight_set.path, checkpoint.tensors)
    chosen = choose_in_file(checkpoint, how.choice).items()
    measured = _measure(checkpoint, how, {module: _matrix(weight, False, how) for module, weight in chosen})
    advice = "Name them with --include: weights with two axes, called .weight."
    _check_any(checkpoint, measured.matrices, advice)
    changed, part = _written(component, checkpoint, how.writer, measured)
    return plan_job(job, selected, make_ready(job, [(component, changed)]), Rest(quantized=(part,)))


class _Quantizing(NamedTuple):
    """What is asked for: by which scheme, of which modules, and what becomes of the rest."""

    writer: Writer
    choice: ModuleChoice
    measuring: Measuring
    casting: Casting


class _Done(NamedTuple):
    """What became of a component, and what its config says of that."""

    part: QuantizedPart
    said: dict[str, Any]


def _with_config(order: Order, done: _Done | None) -> Order:
    """Let the config of a part say what of it is quantized."""
    if done is None:
        return order
    return order.with_config({**order.component.config, "quantization_config": done.said})


def _select_parts(job: Job, writer: Writer) -> list[tuple[Component, WeightSet]]:
    parts = select(job, components=_part_names(job.model, job.request.selection.components))
    for component, weight_set in parts:
        library = library_of(component).package
        if writer.libraries and library not in writer.libraries:
            advice = (
                "int8 and nf4 are for it; --component names other parts; for ComfyUI, quantize a single file of it."
            )
            raise Unsupported(weight_set.path, f"is a model of {library}, which does not load {writer.name}", advice)
        if has_quantization(component.config):
            raise Unsupported(weight_set.path, "is quantized already, as its config.json says", _ORIGINAL)
        if not component.config:
            advice = "It is needed to load a quantized model."
            if job.request.source.is_folder() and writer.name in FILE_QUANTIZERS:
                advice += " To make one for ComfyUI, name the file itself."
            raise BadRequest(weight_set.path, "has no config.json beside it", advice)
    return parts


def _part_names(model: Model, asked: tuple[str, ...]) -> tuple[str, ...]:
    """Name the parts that are quantized: those that are asked for, or those of which loaders would do it."""
    if model.kind == "file":
        advice = (
            "Name the folder that has its config.json: that says which modules are linear. Of a single file, "
            "--scheme fp8-scaled makes one for ComfyUI."
        )
        raise BadRequest(model.path, "is one file, and not a model's folder", advice)
    if model.kind == "sentence-transformers" and not asked:
        return ("",)
    if model.kind != "pipeline" or asked:
        return asked
    names = tuple(part.name for part in model.components if not part.name or _PARTS.fullmatch(part.name))
    if not names:
        others = ", ".join(part.name for part in model.components)
        raise BadRequest(model.path, f"has no transformer, unet or text encoder, but {others}", "Use --component.")
    return names


def _quantize(component: Component, checkpoint: Checkpoint, how: _Quantizing) -> tuple[Checkpoint, _Done]:
    """Let the chosen weights of a checkpoint be written in a scheme, and say what goes into its config."""
    writer, choice = how.writer, how.choice
    path = checkpoint.weight_set.path
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors}
    refuse_growth(path, checkpoint.tensors)  # all of it is read before there is a plan
    _refuse_quantized(checkpoint)
    linears = find_linears(component, tensors.values())
    _refuse_remade(path, linears, writer)
    experts = find_experts(tensors.values()) if writer.takes_experts else {}
    is_known = bool(linears.weights)
    linears = replace(
        linears,
        weights={**linears.weights, **{module: f"{module}.weight" for module in experts}},
        unknown={module: name for module, name in linears.unknown.items() if module not in experts},
    )
    weights = {module: name for module, name in {**linears.weights, **linears.unknown}.items() if name}
    wanted, notes = choose_modules(component, checkpoint, linears, choice, is_known)
    matrices = {module: _matrix(tensors[weights[module]], module in linears.transposed, how) for module in wanted}
    unfit = {module: writer.unfit(one, module in linears.transposed) for module, one in matrices.items()}
    notes += _note_unfit(unfit)
    measured = _measure(checkpoint, how, {module: one for module, one in matrices.items() if not unfit[module]})
    notes += measured.notes
    wanted = list(measured.matrices)
    parted = parted_experts(experts, wanted)
    if parted:
        notes.append(f"left as they are, as the loader has all experts in one form: {_name(sorted(parted))}")
        wanted = [module for module in wanted if experts.get(module) not in parted]
    skipped = _list_skipped(component, linears, writer, experts, wanted, tensors)
    if not writer.names_skipped:
        left = [one for one in wanted if library_of(component).is_skipped(experts.get(one, one), skipped)]
        if left:
            notes.append(f"left as they are, as a name in the skip list means them too: {_name(left)}")
            wanted = [module for module in wanted if module not in left]
    _check_any(checkpoint, wanted, "See --include, --skip and --component.")
    measured = measured._replace(matrices={module: matrices[module] for module in wanted}, notes=notes)
    said = writer.config(skipped, how.casting.dtype or _most_common(matrices[module].dtype for module in wanted))
    changed, part = _written(component, checkpoint, writer, measured)
    return changed, _Done(part._replace(skipped=skipped), said)


def _list_skipped(
    component: Component,
    linears: Linears,
    writer: Writer,
    experts: Mapping[str, str],
    wanted: Collection[str],
    names: Iterable[str],
) -> tuple[str, ...]:
    """Give the skip list that leaves alone all modules but the wanted ones; experts are one module of theirs."""
    if writer.names_skipped:
        return name_skipped(linears, wanted, names)
    weights = {module: name for module, name in linears.weights.items() if module not in experts}
    modules = {experts.get(module, module) for module in wanted}
    if writer.takes_experts:
        homes = {linears.homes.get(f"{module}.weight", "").rpartition(".")[0] for module in wanted if module in experts}
        left = {*linears.experts, *linears.others} - homes
        weights |= dict.fromkeys((*expert_modules(names), *sorted(left)), "")
    return list_skipped(component, replace(linears, weights=weights), {**weights, **linears.unknown}, modules)


def _refuse_remade(path: Place, linears: Linears, writer: Writer) -> None:
    """Raise Unsupported where the loader of a scheme has other modules, and no file of plain weights their tensors."""
    for module in linears.remade.get(writer.package, ()):
        problem = f"has {module!r}, of which {writer.package} has other modules, one for each expert"
        raise Unsupported(path, problem, "fp8-block is for it.")


class _Measured(NamedTuple):
    """The weights of modules that a scheme can hold, what was found of each by its name, and notes on others."""

    matrices: Mapping[str, Tensor]
    found: Mapping[str, bytes]
    notes: Sequence[str] = ()


def _measure(checkpoint: Checkpoint, how: _Quantizing, matrices: Mapping[str, Tensor]) -> _Measured:
    """Find what a scheme has to know of weights before. Raises LossyCast for one that it cannot hold, if strict."""
    path, measure = checkpoint.weight_set.path, how.writer.measure
    if measure is None:
        return _Measured(matrices, {})
    check_measured(path, matrices.values())
    found, lossy = how.measuring.find(measure, matrices.values())
    left = [module for module, weight in matrices.items() if weight.name in lossy]
    if not left:
        return _Measured(matrices, found)
    problem = f"holds weights with {measure.cause}, in {_name(left)}"
    if how.choice.strict:
        raise LossyCast(path, problem, "Without --strict these modules are left as they are.")
    kept = {module: weight for module, weight in matrices.items() if module not in left}
    return _Measured(kept, found, (f"{path.name} {problem}: left as they are",))


def _check_any(checkpoint: Checkpoint, modules: Collection[str], advice: str) -> None:
    if not modules:
        raise BadRequest(checkpoint.weight_set.path, "has no module that would be quantized", advice)


def _written(
    component: Component, checkpoint: Checkpoint, writer: Writer, measured: _Measured
) -> tuple[Checkpoint, QuantizedPart]:
    """Let a checkpoint have, in place of weights, those that stand for each."""
    found, weights = measured.found, sorted(measured.matrices.items())
    made = {weight.name: writer.write(weight, found.get(weight.name, b"")) for _, weight in weights}
    nbytes = {tensor.name: tensor.nbytes for tensor in checkpoint.tensors}
    modules = ((module, nbytes[one.name], sum(new.nbytes for new in made[one.name])) for module, one in weights)
    files = tuple(
        replace(file, tensors=tuple(new for old in file.tensors for new in made.get(old.name, (old,))))
        for file in checkpoint.files
    )
    changed = replace(checkpoint, files=files, notes=(*checkpoint.notes, *measured.notes))
    return changed, QuantizedPart(component.name, tuple(modules), ())


def _matrix(weight: Tensor, is_transposed: bool, how: _Quantizing) -> Tensor:
    """Give a weight as [out, in], in the dtype that its loader would quantize it from."""
    if how.writer.casts_first and how.casting.dtype:
        weight = cast(weight, how.casting.dtype, how.casting.on_overflow)
    return weight._replace(source=weight.source.permuted((1, 0))) if is_transposed else weight


def _most_common(dtypes: Iterable[DType]) -> DType:
    return Counter(dtypes).most_common(1)[0][0]


def _note_unfit(unfit: Mapping[str, str]) -> Iterator[str]:
    """Note which modules are left as they are, by the reasons that there are."""
    for why in dict.fromkeys(filter(None, unfit.values())):
        modules = (module for module, reason in unfit.items() if reason == why)
        yield f"left as they are, as {why}: {_name(modules)}"


def _name(modules: Iterable[str]) -> str:
    return name_some(fold_modules(modules), _NAMED)


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    path = checkpoint.weight_set.path
    for one in quantized_in(checkpoint):
        advice = _ORIGINAL if one.scheme.is_dequantized else "Quantize the model that it was made from."
        raise Unsupported(path, f"is quantized already ({one})", advice)
    for info in checkpoint.tensors:
        is_full = info.dtype.tag in RECAST_SOURCES and info.dtype.bits >= 16
        if info.name.endswith(".weight") and len(info.shape) == 2 and not is_full:
            problem = f"is quantized already: {info.name!r} is {info.dtype}"
            raise Unsupported(path, problem, "Quantize the model that it was made from.")

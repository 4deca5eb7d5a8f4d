"""Models in the 8-bit form of bitsandbytes (LLM.int8), and back, without loading them.

The loader must find int8 just where it makes a ``Linear8bitLt``: so the modules are chosen by its own rule, and the
skip list that config.json gets is held against that rule once more. Each weight is read twice: once for the largest
magnitude of its rows, before anything is planned, because a weight beyond float16 is left as it is and that changes
sizes and skip list; and once to be written. What stays between is four bytes a row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from converter.dtypes import RECAST_SOURCES, DType
from converter.errors import BadRequest, LossyCast, Unsupported
from converter.libraries.modules import Linears, find_linears, is_skipped
from converter.libraries.rules import compiled, default_tied, quantized_in, refuse_growth
from converter.models.checkpoint import Checkpoint, WeightSet, find_weight_sets
from converter.models.folder import Component, ModelFolder
from converter.models.hub_cache import check_places, snapshot_of
from converter.models.schemes import LLM_INT8
from converter.models.select import Wishes, choose_sets, texts_of
from converter.plan.make import Plan
from converter.recipes.convert import plan_conversion, plan_rest, refuse_file, request_of
from converter.run.staging import recover
from converter.run.tasks import DEFAULT_MEMORY_NBYTES, Progress, run_tasks
from converter.storage import place_of
from converter.storage.local import as_path
from converter.tensors.base import Tensor, find_ties
from converter.transforms.quantize.bnb_int8 import (
    check_scales,
    cut_rows,
    dequantized,
    find_scales,
    quantization_config,
    quantized,
    scales_in,
)

# The parts of a pipeline that are quantized where none is named: never the VAE, whose decoding suffers.
_PARTS = re.compile(r"(transformer|unet|text_encoder)(_\d+)?")
_PLAIN = re.compile(r"[^\\^$*+?{}\[\]|()]+")  # a name that is a regular expression for itself
# What names in a file may begin with and those in the class not (``base_model_prefix`` of transformers' classes).
_BASES = ("model.", "transformer.", "text_model.")


@dataclass(frozen=True, slots=True)
class ModuleChoice:
    """Which linear modules to quantize: regular expressions that are searched in their names.

    With none, those that the loader would quantize itself. With ``include``, those alone; ``skip`` takes some away, and
    of a class that nobody knows all others are taken for linear then.
    With both, each module must match one of them. ``strict`` refuses a weight that float16 cannot hold.
    """

    include: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    strict: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "include", texts_of(self.include))
        object.__setattr__(self, "skip", texts_of(self.skip))


_NO_CHOICE = ModuleChoice()


@dataclass(frozen=True, slots=True)
class QuantizedPart:
    """What becomes of one component: its int8 modules with their bytes before and after, and its skip list."""

    component: str
    modules: tuple[tuple[str, int, int], ...]
    skipped: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Quantization:
    """A request for ``run_plan``, its plan (None if a killed run of it needed just finishing), and what it does."""

    request: str
    plan: Plan | None
    parts: tuple[QuantizedPart, ...] = ()


def prepare_quantized(
    source: Path | str,
    output: Path | str,
    wishes: Wishes,
    choice: ModuleChoice = _NO_CHOICE,
    *,
    recovering: bool = True,
    workers: int | None = None,
    memory_nbytes: int = DEFAULT_MEMORY_NBYTES,
    progress: Progress | None = None,
) -> Quantization:
    """Plan the 8-bit form of a model folder, or of a pipeline's transformer or unet and its text encoders.

    ``wishes.components`` names other parts; ``wishes.dtype`` is for all that stays unquantized, None for the source's
    own. Reads every weight once. Raises WconvError as the commands do, LossyCast where ``choice.strict`` has it so.
    """
    wishes = replace(wishes, form="safetensors", every_variant=False)
    source, output = _places(source, output)
    request = request_of(source, output, ("quantize", choice, wishes))
    finished = recovering and recover(output, request)
    parts: dict[str, QuantizedPart] = {}
    chosen: set[str] = set()

    def choose(folder: ModelFolder, wishes: Wishes) -> list[tuple[Component, WeightSet]]:
        found = _choose_parts(folder, wishes)
        chosen.update(component.name for component, _ in found)
        # With a dtype the other parts are cast; without one they are carried over.
        return choose_sets(folder, replace(wishes, components=())) if wishes.dtype else found

    def adapt(component: Component, checkpoint: Checkpoint) -> tuple[Component, Checkpoint]:
        if component.name not in chosen:
            return component, checkpoint
        scales = _Scales(workers, memory_nbytes, progress)
        changed, part = _quantize(component, checkpoint, choice, scales)
        parts[component.name] = part
        config = {**component.config, "quantization_config": quantization_config(part.skipped)}
        return replace(component, config=config), changed

    def make(wishes: Wishes) -> Plan:
        return plan_conversion(source, output, wishes, choose, adapt)

    return Quantization(request, plan_rest(finished, wishes, make), tuple(parts.values()))


def _places(source: Path | str, output: Path | str) -> tuple[Path, Path]:
    """Give the paths that are read and written. Raises WconvError for those that cannot be."""
    source, output = as_path(source), as_path(output)
    check_places(source, output)
    source = snapshot_of(source)
    files = [source] if source.is_file() else sorted(filter(Path.is_file, source.glob("*.gguf")))
    if files and _is_gguf(files[0]) and not (source.is_dir() and find_weight_sets(source)):
        advice = "Quantize the safetensors model that it was made from."
        raise Unsupported(files[0], "is a GGUF file, whose weights are quantized in a way of its own", advice)
    refuse_file(output)
    if output.exists() and source.exists() and output.samefile(source):
        # Its config.json would be another one, and one folder has one for all its weights.
        raise BadRequest(output, "is the source itself", "Name a new folder with -o.")
    return source, output


def _is_gguf(path: Path) -> bool:
    with place_of(path).open() as file:
        return file.read(0, 4) == b"GGUF"


def _choose_parts(folder: ModelFolder, wishes: Wishes) -> list[tuple[Component, WeightSet]]:
    if folder.kind == "file":
        advice = "Name the folder that has its config.json: that says which modules are linear."
        raise BadRequest(folder.path, "is one file, and not a model's folder", advice)
    names = wishes.components
    if folder.kind == "sentence-transformers" and not names:
        names = ("",)
    if folder.kind == "pipeline" and not names:
        names = tuple(c.name for c in folder.components if not c.name or _PARTS.fullmatch(c.name))
        if not names:
            others = ", ".join(component.name for component in folder.components)
            raise BadRequest(folder.path, f"has no transformer, unet or text encoder, but {others}", "Use --component.")
    found = choose_sets(folder, replace(wishes, components=names))
    for component, weight_set in found:
        if "quantization_config" in component.config:
            advice = "Quantize the model that it was made from."
            raise Unsupported(weight_set.path, "is quantized already, as its config.json says", advice)
        if not component.config:
            raise BadRequest(weight_set.path, "has no config.json beside it", "It is needed to load an 8-bit model.")
    return found


@dataclass(frozen=True, slots=True)
class _Scales:
    """Finds the scales of weights: how, and who is told."""

    workers: int | None
    memory_nbytes: int
    progress: Progress | None

    def find(self, weights: Iterable[Tensor]) -> tuple[dict[str, bytes], set[str]]:
        """Give the scales of each weight by its name, and the names of those that float16 cannot hold."""
        calls = ((find_scales, block, block.nbytes) for info in weights for block in cut_rows(info))
        found: dict[str, bytearray] = {}
        lossy: set[str] = set()
        for block, numbers, are_finite in run_tasks(calls, None, self.workers, self.memory_nbytes, self.progress):
            scales = found.setdefault(block.weight.name, bytearray(4 * block.weight.shape[0]))
            scales[4 * block.begin : 4 * block.end] = numbers
            if not are_finite:
                lossy.add(block.weight.name)
        return {name: bytes(scales) for name, scales in found.items()}, lossy


def _quantize(
    component: Component, checkpoint: Checkpoint, choice: ModuleChoice, scales: _Scales
) -> tuple[Checkpoint, QuantizedPart]:
    """Let the chosen weights of a checkpoint be written in 8 bits, and say what goes into its config."""
    path = checkpoint.weight_set.path
    tensors = {info.name: info for info in checkpoint.tensors}
    refuse_growth(path, checkpoint.tensors)  # all of it is read before there is a plan
    _refuse_quantized(checkpoint)
    linears = find_linears(component, tensors.values())
    weights = {module: name for module, name in {**linears.weights, **linears.unknown}.items() if name}
    wanted, notes = _choose_modules(component, checkpoint, linears, choice)
    views = {
        module: _transposed(tensors[weights[module]]) if module in linears.transposed else tensors[weights[module]]
        for module in wanted
    }
    check_scales(path, views.values())
    found, too_large = scales.find(views.values())
    lossy = [module for module in wanted if weights[module] in too_large]
    if lossy:
        named = ", ".join(lossy[:5]) + (f" and {len(lossy) - 5} more" if len(lossy) > 5 else "")
        problem = f"holds weights with values that float16 cannot hold, in {named}"
        if choice.strict:
            raise LossyCast(path, problem, "Without --strict these modules are left as they are.")
        notes.append(f"{path.name} {problem}: left as they are")
    wanted = [module for module in wanted if module not in lossy]
    skipped = _skip_list(component, linears, weights, wanted)
    left = [module for module in wanted if is_skipped(module, skipped, component.is_diffusers)]
    if left:
        notes.append(f"left as they are, as a name in the skip list means them too: {', '.join(left)}")
        wanted = [module for module in wanted if module not in left]
    if not wanted:
        raise BadRequest(path, "has no module that would be quantized", "See --include, --skip and --component.")
    chosen = {weights[module]: module for module in wanted}

    def change(info: Tensor) -> tuple[Tensor, ...]:
        module = chosen.get(info.name)
        return (info,) if module is None else quantized(views[module], found[info.name])

    files = tuple(
        replace(file, tensors=tuple(made for info in file.tensors for made in change(info)))
        for file in checkpoint.files
    )
    changed = replace(checkpoint, files=files, notes=(*checkpoint.notes, *notes))
    sizes = tuple((module, views[module].nbytes, _int8_nbytes(views[module])) for module in sorted(wanted))
    return changed, QuantizedPart(component.name, sizes, skipped)


def _transposed(weight: Tensor) -> Tensor:
    return weight._replace(source=weight.source.permuted((1, 0)))


def _int8_nbytes(info: Tensor) -> int:
    return info.numel + 4 * info.shape[0] + 1


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    path = checkpoint.weight_set.path
    for one in quantized_in(checkpoint):
        raise Unsupported(path, f"is quantized already ({one})", "Quantize the model that it was made from.")
    for info in checkpoint.tensors:
        if info.name.endswith(".weight") and len(info.shape) == 2 and not _is_full(info.dtype):
            problem = f"is quantized already: {info.name!r} is {info.dtype}"
            raise Unsupported(path, problem, "Quantize the model that it was made from.")


def _is_full(dtype: DType) -> bool:
    return dtype.tag in RECAST_SOURCES and dtype.bits >= 16


def _choose_modules(
    component: Component, checkpoint: Checkpoint, linears: Linears, choice: ModuleChoice
) -> tuple[list[str], list[str]]:
    """Give the modules to quantize, and notes."""
    path = checkpoint.weight_set.path
    is_included, is_excluded = _matcher(choice.include), _matcher(choice.skip)
    tensors = {info.name: info for info in checkpoint.tensors}
    ties = (
        find_ties(tensors.values())
        if default_tied(component, checkpoint.name.in_format("safetensors")) == "first"
        else {}
    )
    tied = {*ties, *ties.values()}
    wanted: list[str] = []
    notes: list[str] = []
    unnamed = [module for module in linears.unknown if not (is_included(module) or is_excluded(module))]
    if unnamed and not choice.include and (linears.weights or not choice.skip):
        library = "diffusers" if component.is_diffusers else "transformers"
        kind = component.class_name or "model of no known class"
        known = f"is a {kind}, and whether {unnamed[0]!r} is linear is not known"
        names = "ame the linear modules with --include, or all others with --skip."
        if linears.cause:
            raise Unsupported(path, f"{known}: config.json {linears.cause}", f"N{names}")
        raise Unsupported(path, known, f"Install torch and {library}, or n{names}")
    for module, name in {**linears.weights, **linears.unknown}.items():
        included, excluded = is_included(module), is_excluded(module)
        if included and excluded:
            raise BadRequest(path, f"has the module {module!r}, which --include and --skip both name", "Choose one.")
        if choice.include and choice.skip and not (included or excluded):
            advice = "Name it in one of them, or leave one of them out."
            raise BadRequest(path, f"has the module {module!r}, which neither --include nor --skip names", advice)
        by_default = not is_skipped(module, linears.skipped, component.is_diffusers)
        if excluded or not (included or (by_default and not choice.include)):
            continue
        if is_skipped(module, linears.kept, component.is_diffusers):
            if included:
                notes.append(f"{module} is left as it is: its library never quantizes it")
        elif name in tied:
            notes.append(f"{module} is left as it is: its weight is tied to another")
        elif not name:
            advice = "Quantize it with its library, or name it with --skip."
            raise Unsupported(path, f"has no weight for {module!r}, which {component.class_name} has", advice)
        elif tensors[name].numel:
            wanted.append(module)
    return wanted, notes


def _matcher(regexes: Sequence[str]) -> Callable[[str], bool]:
    patterns = list(map(compiled, regexes))
    return lambda name: any(pattern.search(name) for pattern in patterns)


def _skip_list(
    component: Component, linears: Linears, weights: Mapping[str, str], wanted: Iterable[str]
) -> tuple[str, ...]:
    """Give the entries that make the loader leave alone all modules but the wanted ones.

    Of its own entries those that mean none of them (a tied lm_head is a module too, though no file has it); other
    modules by their full names: as the class has them, as the file does, and without the name of a base model, since
    versions of transformers differ in that.
    """
    wanted = set(wanted)
    others = [module for module in (*linears.weights, *linears.unknown) if module not in wanted]

    def is_free(entry: str) -> bool:
        return not any(is_skipped(module, [entry], component.is_diffusers) for module in wanted)

    entries = [entry for entry in (*linears.skipped, *linears.kept) if is_free(entry)]
    for module in others:
        if not is_skipped(module, entries, component.is_diffusers):
            if not (component.is_diffusers or _PLAIN.fullmatch(module)):
                problem = f"has the module {module!r}, and transformers takes what it skips for regular expressions"
                raise Unsupported(component.path, problem, "Rename it.")
            entries.append(module)
            longer = weights.get(module, "").removesuffix(".weight")
            if longer and not component.is_diffusers:
                shorter = (longer.removeprefix(base) for base in _BASES if longer.startswith(base))
                entries += filter(is_free, (longer, *shorter))
    return tuple(sorted(set(entries)))


def prepare_dequantized(
    source: Path | str, output: Path | str, wishes: Wishes, recovering: bool = True
) -> Quantization:
    """Plan the way back: int8 weights as numbers in ``wishes.dtype``, and all else in it too.

    In a pipeline only the parts that are quantized are written anew. Raises Unsupported for weights in another form,
    BadFile for scales that do not fit. A class that is in no table is taken to have no Conv1D where its library is not
    installed.
    """
    dtype = wishes.dtype
    if dtype is None:
        raise BadRequest(source, "needs a dtype to be written in", "Say which: fp16, bf16 or fp32.")
    wishes = replace(wishes, form="safetensors", every_variant=False)
    source, output = _places(source, output)
    request = request_of(source, output, ("dequantize", wishes))
    finished = recovering and recover(output, request)
    said: set[str] = set()

    def choose(folder: ModelFolder, wishes: Wishes) -> list[tuple[Component, WeightSet]]:
        names = tuple(c.name for c in folder.components if "quantization_config" in c.config)
        said.update(names)
        found = choose_sets(folder, replace(wishes, components=wishes.components or names))
        return [(_unquantized(component), weight_set) for component, weight_set in found]

    def adapt(component: Component, checkpoint: Checkpoint) -> tuple[Component, Checkpoint]:
        _refuse_others(checkpoint, component.name in said)
        transposed = find_linears(component, checkpoint.tensors).transposed
        return component, dequantized(checkpoint, dtype, transposed, wishes.on_overflow)

    def make(wishes: Wishes) -> Plan:
        return plan_conversion(source, output, wishes, choose, adapt)

    return Quantization(request, plan_rest(finished, wishes, make))


def _refuse_others(checkpoint: Checkpoint, is_said: bool) -> None:
    """Raise Unsupported for all but LLM.int8; ``is_said`` where the config says that the weights are quantized."""
    path = checkpoint.weight_set.path
    for one in quantized_in(checkpoint):
        if one.scheme is not LLM_INT8:
            raise Unsupported(path, f"is quantized in another form than LLM.int8 ({one})", one.advice)
    if not scales_in(checkpoint):
        advice = "'wconv recast' casts weights that are not quantized."
        if is_said:
            advice = "Its config.json says that it is quantized: load it with the library that this names."
        raise Unsupported(path, "holds no 8-bit weights of bitsandbytes", advice)


def _unquantized(component: Component) -> Component:
    config = {key: value for key, value in component.config.items() if key != "quantization_config"}
    return replace(component, config=config)

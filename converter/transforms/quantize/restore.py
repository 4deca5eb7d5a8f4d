"""Quantized weights as plain numbers again: finds what each goes with, and has its scheme make a source of that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from converter.dtypes import DTYPES, DType, OnOverflow
from converter.errors import BadFile, HostileFile, Unsupported, name_some, spell_count
from converter.models.checkpoint import Checkpoint
from converter.models.schemes import (
    COMFY_NOTE,
    COMFY_QUANT,
    OF_ACTIVATIONS,
    Quantized,
    Scheme,
    cached_by,
    find_belongings,
    holds_codes,
    is_mark,
    modules_noted,
    names_other,
    quantized_in,
    weight_of,
)
from converter.tensors.base import Tensor, TensorSource
from converter.tensors.derived import cast
from converter.tensors.reader import RangeReader
from converter.transforms.quantize.codes import AGAIN

_MAX_SMALL_NBYTES = 1 << 24  # of one tensor that is read before there is a plan, and of all together the eightfold
# What configs of compressed-tensors and of ModelOpt say of a quantized cache.
_CACHE_KEYS = ("kv_cache_scheme", "kv_cache_quant_algo", "kv_cache_dtype")


class Module(NamedTuple):
    """A quantized weight and what stands beside it, by what its name has after that of the ``base`` that they share.

    ``contents`` are the bytes of those beside that are small. ``config`` is what config.json says of the quantization,
    empty where it says nothing; or what the file's header notes of this module. ``is_transposed`` where its library has
    the weight [in, out], as Conv1D does.
    """

    scheme: Scheme
    base: str
    weight: Tensor
    beside: Mapping[str, Tensor]
    contents: Mapping[str, bytes]
    config: Mapping[str, Any]
    is_transposed: bool = False

    def scale(self, end: str) -> Tensor:
        """Give what is beside under an ending. Raises BadFile where nothing is."""
        if end not in self.beside:
            problem = f"has no {self.base + end!r} for {self.weight.name!r}"
            raise BadFile(self.weight.where, problem, "Fetch all files of the model again.")
        return self.beside[end]

    def misfit(self, end: str, problem: str) -> BadFile:
        """Give what is said of one beside that does not fit the weight."""
        one = self.scale(end)
        said = f"has a {one.name!r} that does not fit {self.weight.name!r}: {problem}"
        return BadFile(one.where, said, AGAIN)


class Restored(NamedTuple):
    """A weight in float32 under its plain name; ``dtype`` is what its scheme's library gives, where that is known.

    Its codes are the nearest to the numbers that they were made of, but for ``slack``, a share of each; that is None
    where they are not, as those of calibrated schemes are.
    """

    name: str
    source: TensorSource
    dtype: DType | None = None
    slack: float | None = 0.0


FindTransposed = Callable[[Iterable[Tensor]], Container[str]]
"""Names the modules, of tensors that have their plain names, whose library has their weight as [in, out]."""

Restore = Callable[[Module], Restored]
"""What makes the numbers of a scheme's weights. Raises BadFile or Unsupported for what does not fit."""


class Found(NamedTuple):
    """What is quantized in a checkpoint, by the names of the weights that hold codes; and all that goes with them.

    ``notes`` say what is left out, and what the config has wrong.
    """

    weights: Mapping[str, Restored]
    beside: frozenset[str]
    modules: Mapping[str, Module]
    notes: tuple[str, ...] = ()


def find_restored(
    checkpoint: Checkpoint,
    restores: Mapping[Scheme, Restore],
    config: Mapping[str, Any],
    find_transposed: FindTransposed | None = None,
) -> Found:
    """Give the numbers of all quantized weights of a checkpoint, as they lie in the file where nobody is asked.

    Raises Unsupported for a scheme that is not in ``restores``, and for what stands beside a weight and is not
    understood; BadFile for scales that are missing or do not fit, for weights without any, and scales without theirs.
    """
    noted = modules_noted(checkpoint)
    found = quantized_in(checkpoint)
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors}
    transposed: Container[str] = ()
    if find_transposed and any(one.scheme.may_be_turned for one in found):
        transposed = find_transposed(_named_plainly(tensors, found))
    modules = [_module_of(one, tensors, config, transposed, restores) for one in found]
    modules = [one._replace(config=_said_of(one, noted)) if one.base in noted else one for one in modules]
    contents = _read_small(checkpoint, modules)
    weights = {}
    for module in modules:
        known = {end: contents[one.name] for end, one in module.beside.items() if one.name in contents}
        weights[module.weight.name] = _restore(module._replace(contents=known), restores[module.scheme])
    beside = frozenset(one.name for module in modules for one in module.beside.values())
    of_cache = _find_of_cache(found, tensors, config)
    beside = beside.union(of_cache, filter(is_mark, tensors) if found else ())
    _check_rest(checkpoint, found, tensors, weights.keys() | beside)
    _check_apart(weights, tensors, beside)
    for name in (f"{module}.weight" for module in noted):
        if name in tensors and name not in weights:
            problem = f"notes that {name!r} is quantized, and it is {tensors[name].dtype}"
            raise BadFile(tensors[name].where, problem, "Fetch the file again.")
    notes = (*_note_left_out(modules, of_cache), *_note_method(modules, config))
    return Found(weights, beside, {module.weight.name: module for module in modules}, notes)


def _restore(module: Module, restore: Restore) -> Restored:
    """Give the numbers of a weight. Raises BadFile for shapes of which no numbers can be made."""
    try:
        return restore(module)
    except ValueError as error:
        problem = f"holds {module.weight.name!r} with scales that do not fit it: {error}"
        raise BadFile(module.weight.where, problem, AGAIN) from None


def _named_plainly(tensors: Mapping[str, Tensor], found: Iterable[Quantized]) -> Iterator[Tensor]:
    """Give tensors, those that hold a module's codes under the name that its weight has."""
    scheme_of = {one.weight: one.scheme for one in found}
    for name, tensor in tensors.items():
        end = scheme_of[name].weight if name in scheme_of else ""
        yield tensor._replace(name=name.removesuffix(end) + ".weight") if end.startswith(".") else tensor


def dequantized(
    checkpoint: Checkpoint, found: Found, target: DType | None = None, how: OnOverflow = "error"
) -> Checkpoint:
    """Let quantized weights be written as numbers in ``target``, without what belonged to them; what is plain stays.

    Without a target each comes in the dtype that its library gives, which is bf16 where nothing says it. Notes say what
    was written in which. What headers note of the quantization is left out.
    """
    written: Counter[tuple[str, str]] = Counter()

    def write(tensor: Tensor) -> Tensor:
        restored = found.weights.get(tensor.name)
        if restored is None:
            return tensor
        dtype = target or restored.dtype or DTYPES["BF16"]
        written[found.modules[tensor.name].scheme.label, dtype.short_name] += 1
        return cast(Tensor(restored.name, restored.source), dtype, how)

    files = tuple(
        replace(
            file,
            tensors=tuple(write(one) for one in file.tensors if one.name not in found.beside),
            metadata={key: value for key, value in file.metadata.items() if key != COMFY_NOTE},
        )
        for file in checkpoint.files
    )
    done = (
        f"dequantized to {dtype}: {spell_count(number, 'weight')} ({label})"
        for (label, dtype), number in written.items()
    )
    left_out = [f"left out of the header: {COMFY_NOTE}"] if COMFY_NOTE in checkpoint.metadata else []
    return replace(checkpoint, files=files, notes=(*checkpoint.notes, *done, *found.notes, *left_out))


def _module_of(
    one: Quantized,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    transposed: Container[str],
    restores: Mapping[Scheme, Restore],
) -> Module:
    scheme, weight = one.scheme, tensors[one.weight]
    if scheme not in restores:
        raise Unsupported(weight.where, f"is quantized in a form that wconv does not dequantize ({one})", one.advice)
    base = one.weight.removesuffix(scheme.weight)
    beside = {end: tensors[base + end] for end in scheme.beside if base + end in tensors}
    return Module(scheme, base, weight, beside, {}, config, base.removesuffix(".weight") in transposed)


def _said_of(module: Module, noted: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give what a header notes of a module. Raises BadFile for what no loader reads."""
    said = noted[module.base]
    if module.scheme is not COMFY_QUANT or not isinstance(said, dict):
        problem = f"notes of {module.base!r} what does not fit it"
        raise BadFile(module.weight.where, problem, AGAIN)
    return said


def _read_small(checkpoint: Checkpoint, modules: Sequence[Module]) -> dict[str, bytes]:
    """Read what has to be known before there is a plan. Raises HostileFile for more than any model has of it."""
    small = [one for module in modules for end, one in module.beside.items() if end in module.scheme.small]
    if sum(one.nbytes for one in small) > 8 * _MAX_SMALL_NBYTES or any(one.nbytes > _MAX_SMALL_NBYTES for one in small):
        problem = f"has more than {8 * _MAX_SMALL_NBYTES:,} bytes that say how its weights are quantized"
        raise HostileFile(checkpoint.weight_set.path, f"{problem}, and no model has them")
    contents: dict[str, bytes] = {}
    with RangeReader() as reader:
        reader.expect(part for one in small for part in one.source.extents(0, one.nbytes))
        for one in small:
            raw = bytearray(one.nbytes)
            one.source.read(0, memoryview(raw), reader)
            contents[one.name] = bytes(raw)
    return contents


def _find_of_cache(
    found: Iterable[Quantized], tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> frozenset[str]:
    """Name what scales the cache of keys and values, which plain models fill with plain numbers.

    A float model may have parameters of these names: they stay, but for single numbers beside or above quantized
    weights, and where the config says that the cache is quantized.
    """
    is_said = any(config.get(key) for key in _CACHE_KEYS)
    parents = {parent for one in found for parent in _parents_of(one.weight)} if not is_said else set()

    def scales_cache(name: str, tensor: Tensor) -> bool:
        modules = cached_by(name)
        return bool(modules) and (is_said or (tensor.numel == 1 and not parents.isdisjoint(modules)))

    return frozenset(name for name, tensor in tensors.items() if scales_cache(name, tensor))


def _parents_of(weight: str) -> tuple[str, str]:
    """Name the module of a weight, and the one that this is in."""
    module = weight.rpartition(".")[0]
    return module, module.rpartition(".")[0]


def _note_left_out(modules: Iterable[Module], of_cache: Collection[str]) -> Iterator[str]:
    beside = ((end, one.name) for module in modules for end, one in module.beside.items())
    ends = [end for end, name in beside if end in OF_ACTIVATIONS and name not in of_cache]
    for names, what in ((ends, "activations"), (of_cache, "the KV cache")):
        if names:
            leaves = sorted({name.rpartition(".")[2].lstrip("_") for name in names})
            yield f"left out: {spell_count(len(names), 'scale')} of {what} ({name_some(leaves, 5)})"


def _note_method(modules: Iterable[Module], config: Mapping[str, Any]) -> Iterator[str]:
    """Note that a config names another scheme than that which the weights are in."""
    said = config.get("quant_method")
    schemes = {module.scheme for module in modules}
    if isinstance(said, str) and names_other(said, schemes):
        labels = sorted({scheme.label for scheme in schemes})
        yield f"config.json says {said[:60]!r}, and the weights are {' and '.join(labels)}: they were read as that"


def _check_rest(
    checkpoint: Checkpoint, found: Collection[Quantized], tensors: Mapping[str, Tensor], known: Container[str]
) -> None:
    """Raise Unsupported for what belongs to a quantized weight and is in no scheme; and for what stands alone, BadFile.

    Where nothing is quantized, so is what scales nothing: those tensors may be a float model's own.
    """
    if not found:
        return
    left = [name for name in find_belongings(found, tensors) if name not in known]
    if left:
        problem = f"has {name_some(sorted(left), 5)} beside quantized weights, and wconv does not know what for"
        raise Unsupported(checkpoint.weight_set.path, problem, "Load it with the library that wrote it.")
    for name, tensor in tensors.items():
        if name not in known:
            _check_alone(tensor, tensors)


def _check_apart(weights: Mapping[str, Restored], tensors: Mapping[str, Tensor], beside: Collection[str]) -> None:
    """Raise BadFile for codes that scale others, and for a weight that would bear the name of another tensor."""
    named = {name: name for name in tensors if name not in weights and name not in beside}
    for name, restored in weights.items():
        other = named.setdefault(restored.name, name)
        if other != name:
            problem = f"has {name!r} and {other!r}, and both would be {restored.name!r}"
            raise BadFile(tensors[name].where, problem, AGAIN)
        if name in beside:
            raise BadFile(tensors[name].where, f"has {name!r} as a quantized weight, and as what scales another", AGAIN)


def _check_alone(tensor: Tensor, tensors: Mapping[str, Tensor]) -> None:
    """Raise BadFile for codes without a scale, or a scale without codes, in a model that is quantized."""
    if holds_codes(tensor.name, tensor.dtype):
        problem = f"has no scale for {tensor.name!r}, which is {tensor.dtype}, and others have theirs"
        raise BadFile(tensor.where, problem, "Fetch all files of the model again.")
    weight = weight_of(tensor.name, tensor.dtype)
    if weight is not None:
        has = f"{weight!r} is {tensors[weight].dtype}" if weight in tensors else f"there is no {weight!r}"
        problem = f"has the scale {tensor.name!r}, and {has}: no weight that it is for"
        raise BadFile(tensor.where, problem, "Fetch all files of the model again.")

"""Quantized weights as plain numbers again: finds what each goes with, and has its scheme make a source of that."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from converter.dtypes import DTYPES, DType, OnOverflow
from converter.errors import BadFile, HostileFile, Unsupported, name_some
from converter.models.checkpoint import Checkpoint
from converter.models.schemes import (
    COMFY_NOTE,
    COMFY_QUANT,
    Quantized,
    Scheme,
    find_belongings,
    find_marks,
    modules_noted,
    quantized_in,
)
from converter.tensors.base import Tensor, TensorSource
from converter.tensors.derived import cast
from converter.tensors.reader import RangeReader

_MAX_SMALL_NBYTES = 1 << 24  # of one tensor that is read before there is a plan, and of all together the eightfold


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
        return BadFile(one.where, said, "Fetch the file again, or quantize the model again.")


class Restored(NamedTuple):
    """A weight in float32 under its plain name; ``dtype`` is what its scheme's library gives, where that is known.

    Its codes are the nearest to the numbers that they were made of, but for ``slack``, a share of each; that is None
    where they are not, as those of calibrated schemes are. ``note`` is worth a user's look.
    """

    name: str
    source: TensorSource
    dtype: DType | None = None
    slack: float | None = 0.0
    note: str = ""


Restore = Callable[[Module], Restored]
"""What makes the numbers of a scheme's weights. Raises BadFile or Unsupported for what does not fit."""


class Found(NamedTuple):
    """What is quantized in a checkpoint: by the names of the weights that hold the codes; and what goes with them."""

    weights: Mapping[str, Restored]
    beside: frozenset[str]


def find_restored(
    checkpoint: Checkpoint,
    restores: Mapping[Scheme, Restore],
    config: Mapping[str, Any],
    transposed: Container[str] = (),
) -> Found:
    """Give the numbers of all quantized weights of a checkpoint; ``transposed`` modules have theirs as [in, out].

    Raises Unsupported for a scheme that is not in ``restores``, and for what stands beside a weight and is not
    understood; BadFile for scales that are missing or do not fit.
    """
    noted = modules_noted(checkpoint)
    found = quantized_in(checkpoint)
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors}
    modules = [_module_of(one, tensors, config, transposed, restores) for one in found]
    modules = [one._replace(config=_said_of(one, noted)) if one.base in noted else one for one in modules]
    contents = _read_small(checkpoint, modules)
    weights = {}
    for module in modules:
        known = {end: contents[one.name] for end, one in module.beside.items() if one.name in contents}
        weights[module.weight.name] = restores[module.scheme](module._replace(contents=known))
    beside = {one.name for module in modules for one in module.beside.values()}.union(find_marks(tensors))
    _check_rest(found, tensors, weights.keys() | beside)
    for name in (f"{module}.weight" for module in noted):
        if name in tensors and name not in weights:
            problem = f"notes that {name!r} is quantized, and it is {tensors[name].dtype}"
            raise BadFile(tensors[name].where, problem, "Fetch the file again.")
    return Found(weights, frozenset(beside))


def dequantized(
    checkpoint: Checkpoint, found: Found, target: DType | None = None, how: OnOverflow = "error"
) -> Checkpoint:
    """Let quantized weights be written as numbers in ``target``, without what belonged to them; what is plain stays.

    Without a target each comes in the dtype that its library gives, which is bf16 where nothing says it.
    """

    def write(tensor: Tensor) -> Tensor:
        restored = found.weights.get(tensor.name)
        if restored is None:
            return tensor
        return cast(Tensor(restored.name, restored.source), target or restored.dtype or DTYPES["BF16"], how)

    files = tuple(
        replace(
            file,
            tensors=tuple(write(one) for one in file.tensors if one.name not in found.beside),
            metadata={key: value for key, value in file.metadata.items() if key != COMFY_NOTE},
        )
        for file in checkpoint.files
    )
    notes = dict.fromkeys(restored.note for restored in found.weights.values() if restored.note)
    return replace(checkpoint, files=files, notes=(*checkpoint.notes, *notes))


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
    return Module(scheme, base, weight, beside, {}, config, base in transposed)


def _said_of(module: Module, noted: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give what a header notes of a module. Raises BadFile for what no loader reads."""
    said = noted[module.base]
    if module.scheme is not COMFY_QUANT or not isinstance(said, dict):
        problem = f"notes of {module.base!r} what does not fit it"
        raise BadFile(module.weight.where, problem, "Fetch the file again, or quantize the model again.")
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


def _check_rest(found: Iterable[Quantized], tensors: Iterable[str], known: Container[str]) -> None:
    """Raise Unsupported for what belongs to a quantized weight and is in no scheme."""
    left = [name for name in find_belongings(found, tensors) if name not in known]
    if left:
        raise Unsupported(
            name_some(sorted(left), 5), "stand beside quantized weights, and wconv does not know what for"
        )

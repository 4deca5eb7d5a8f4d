"""GPTQ: codes of 2, 3, 4 or 8 bits in 32-bit words, with a scale and a zero point for each group of inputs.

For a linear module ``m`` [out, in]: ``m.qweight`` is I32 [in * bits / 32, out], whose words hold the codes of inputs
one behind another, from the lowest bits on; ``m.qzeros`` I32 [groups, out * bits / 32] the zero points of outputs
likewise, ``m.scales`` [groups, out], and ``m.g_idx`` I32 [in] the group of each input, in any order. A number is
(code - zero) * scale, rounded once to the dtype of the scales (``dequantize_weight`` in
``gptqmodel/nn_modules/qlinear/__init__.py``; ``forward`` in ``auto_gptq/nn_modules/qlinear/qlinear_cuda.py``).

In the first version of the format, which configs call ``gptq`` or do not name, zero points are stored less one. What is
stored for zero there is read in three ways: as zero, as one more than the largest, and with a carry into the next
(``qlinear_cuda_old.py`` and ``qlinear_cuda.py`` of auto_gptq, ``convert_gptq_v1_to_v2_format_module`` of gptqmodel): it
is refused. ``gptq_v2`` has them as they are. Where no config says which, symmetric weights tell: all are the middle.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from converter.errors import BadFile, HostileFile, Unsupported
from converter.tensors.base import Reader, Tensor, TensorSource
from converter.tensors.derived import Derived, held
from converter.tensors.shaped import Turned
from converter.transforms.quantize.codes import AGAIN, Coding, Gridded, Indexed, Scales, coding_of, turned_grid
from converter.transforms.quantize.dense import unpacked
from converter.transforms.quantize.restore import Module, Restored

_QZEROS, _SCALES, _INDEX = ".qzeros", ".scales", ".g_idx"
_BITS = (2, 3, 4, 8)
_WORD = 32
_METHODS = ("gptq",)
_FIRST, _SECOND = "gptq", "gptq_v2"
# What configs say of weights that are not as others read them, by gptqmodel and auto_gptq.
_ODD_KEYS = ("rotation", "is_marlin_format", "adapter")
# Those have no inputs and outputs: gptqmodel's ``TorchQuantEmbeddings`` has other axes.
_EMBEDDING = re.compile(r"(?:^|\.)(?:wte|wpe|[a-z_]*embed(?:ding)?s?(?:_tokens|_in|_positions)?)$")
_MOST_TURNED = 1 << 28  # numbers of a matrix that is transposed by reading all of it, again and again


def restore(module: Module) -> Restored:
    """Give the numbers of a weight, [out, in], or [in, out] where that is what its library has.

    Raises BadFile for tensors of shapes and dtypes that do not fit, Unsupported for what configs say of other formats.
    """
    words, scales, zeros = module.weight, module.scale(_SCALES), module.scale(_QZEROS)
    check_grid(module, scales, zeros)
    groups, outputs = scales.shape
    if _EMBEDDING.search(module.base):
        problem = f"has quantized embeddings in {words.name!r}, which wconv does not read"
        raise Unsupported(words.where, problem, "Load it with GPTQModel.")
    version = _version_of(module)
    bits, inputs = _sides_of(module, words, zeros, outputs)
    shape = (outputs, inputs)
    codes = _codes(bits, words.source.permuted((1, 0)), shape)
    points = ZeroPoints(_zeros(bits, zeros.source, (groups, outputs), version), zeros.name, bits, version is None)
    grid = Scales(turned_grid(scales.source, (1, 0)), scales.name)
    numbers: TensorSource
    index = module.beside.get(_INDEX)
    if index is None:
        block = (1, _group_size(module, inputs, groups))
        numbers = Gridded(Gridded(codes, points, block, by="less"), grid, block)
    else:
        numbers = Indexed(codes, points, index.source, index.name, by="less")
        numbers = Indexed(numbers, grid, index.source, index.name)
    if module.is_transposed:
        numbers = Turned(numbers)
    if (module.is_transposed and outputs * inputs > _MOST_TURNED) or (_WORD % bits and groups * outputs > _MOST_TURNED):
        problem = f"has {outputs} by {inputs} numbers in {groups} groups in {words.name!r}, more than any model"
        raise HostileFile(words.where, problem)
    return Restored(module.base + ".weight", numbers, scales.dtype, slack=None)


def check_grid(module: Module, scales: Tensor, zeros: Tensor) -> None:
    """Raise BadFile for scales and zero points that are no matrices of as many groups, or of odd dtypes."""
    words = module.weight
    if words.dtype.tag != "I32" or len(words.shape) != 2:
        problem = f"has a {words.name!r} that is {words.dtype} {list(words.shape)}, and no matrix of I32"
        raise BadFile(words.where, problem, AGAIN)
    if scales.dtype.tag not in ("F16", "BF16", "F32") or len(scales.shape) != 2:
        raise module.misfit(_SCALES, f"it is {scales.dtype} {list(scales.shape)}, and no matrix of floats")
    if zeros.dtype.tag != "I32" or len(zeros.shape) != 2 or zeros.shape[0] != scales.shape[0]:
        raise module.misfit(_QZEROS, f"it is {zeros.dtype} {list(zeros.shape)} beside scales {list(scales.shape)}")
    if not all((*words.shape, *scales.shape)):
        raise module.misfit(_SCALES, f"it is {list(scales.shape)} beside {list(words.shape)}")


def _sides_of(module: Module, words: Tensor, zeros: Tensor, outputs: int) -> tuple[int, int]:
    """Give the bits of a code, and how many inputs there are: as shapes have it, and config only where two fit."""
    index = module.beside.get(_INDEX)
    if words.shape[1] != outputs:
        raise module.misfit(_SCALES, f"it is {list(module.scale(_SCALES).shape)} beside words {list(words.shape)}")
    if index is not None and (index.dtype.tag not in ("I32", "I64") or len(index.shape) != 1):
        raise module.misfit(_INDEX, f"it is {index.dtype} {list(index.shape)}, and no list of whole numbers")

    def fitting() -> Iterator[tuple[int, int]]:
        for bits in _BITS:
            inputs = index.shape[0] if index is not None else words.shape[0] * _WORD // bits
            is_fit = bits != 3 or not (inputs % _WORD or outputs % _WORD)
            if is_fit and (_words(inputs, bits), _words(outputs, bits)) == (words.shape[0], zeros.shape[1]):
                yield bits, inputs

    found = list(fitting())
    said = [one for one in found if one[0] == module.config.get("bits")]
    if len(found) == 1 or said:
        return (said or found)[0]
    if found:
        which = " or ".join(str(bits) for bits, _ in found)
        problem = f"holds {words.name!r} in {which} bits, and no config says in which"
        raise Unsupported(words.where, problem, "Put its config.json beside it.")
    sides = f"{list(words.shape)}, zero points {list(zeros.shape)}"
    count = f" and {index.shape[0]} inputs" if index is not None else ""
    raise module.misfit(_SCALES, f"words {sides}{count} are of no number of bits from {', '.join(map(str, _BITS))}")


def _words(count: int, bits: int) -> int:
    """Give the words that so many codes take."""
    return -(-count * bits // _WORD)


def _version_of(module: Module) -> str | None:
    """Give the version of the format as the config has it, None where there is none. Raises Unsupported for others."""
    config, where = module.config, module.weight.where
    if not config:
        return None
    method = config.get("quant_method", "gptq")
    if method not in _METHODS:
        problem = f"holds weights that lie as those of GPTQ, and its config says {str(method)[:60]!r}"
        raise Unsupported(where, problem, "Load it with the library that wrote it.")
    odd = [key for key in _ODD_KEYS if config.get(key)]
    version = config.get("checkpoint_format") or config.get("format") or _FIRST
    if odd or version not in (_FIRST, _SECOND):
        said = f"{odd[0]} {str(config[odd[0]])[:60]!r}" if odd else f"the format {str(version)[:60]!r}"
        problem = f"is quantized by GPTQ with {said}, which wconv does not read"
        raise Unsupported(where, problem, "Load it with GPTQModel.")
    return str(version)


def _group_size(module: Module, inputs: int, groups: int) -> int:
    """Give how many inputs a group has where no ``g_idx`` says it: as the config does, or as many for each."""
    if module.config.get("desc_act") is True:
        problem = f"has no {module.base + _INDEX!r}, and its config says that the inputs are in any order (desc_act)"
        raise BadFile(module.weight.where, problem, "Fetch all files of the model again.")
    said = module.config.get("group_size")
    size = said if type(said) is int and said > 0 else -(-inputs // groups)
    if -(-inputs // size) != groups or (said != size and inputs % groups):
        raise module.misfit(_SCALES, f"it has {groups} groups of {size} for {inputs} inputs")
    return size


@cache
def _coding(bits: int, version: str | None) -> Coding:
    """Give what codes stand for: themselves, or a zero point as a version of the format stores it.

    NaN is none: what the first version cannot store, and all but the middle where the version is not known.
    """
    codes = [float(code) for code in range(1 << bits)]
    middle = len(codes) // 2
    if version == _FIRST:
        codes = [*codes[1:], math.nan]
    elif version is None:
        codes = [code if code in (middle - 1, middle) else math.nan for code in codes]
    return coding_of(bits, codes)


def _codes(bits: int, words: TensorSource, shape: tuple[int, int], version: str | None = _SECOND) -> TensorSource:
    """Give codes that lie in words along the last axis."""
    return unpacked(held(words), _coding(bits, version), shape, 1)


def _zeros(bits: int, words: TensorSource, shape: tuple[int, int], version: str | None) -> TensorSource:
    """Give the zero points that words hold by groups, [out, groups]."""
    return turned_grid(_codes(bits, words, shape, version), (1, 0))


@dataclass(frozen=True, slots=True)
class ZeroPoints(Derived):
    """Zero points in float32; where they have to be ``symmetric``, the middle of all codes, as either version has it.

    Raises Unsupported, when they are read, for those that are not known.
    """

    name: str
    bits: int
    symmetric: bool

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        from converter.transforms.quantize.kernels import are_finite, fill_alike

        self.source.read(begin, out, reader)
        where = Tensor(self.name, self.source).where
        if self.symmetric and not fill_alike(out, float(1 << (self.bits - 1))):
            problem = f"has zero points in {self.name!r} that GPTQ's two versions read in two ways"
            advice = "Put its config.json beside it, or a quantize_config.json with its checkpoint_format."
            raise Unsupported(where, problem, advice)
        if not are_finite(out):
            problem = f"has zero points of 0 in {self.name!r}, which libraries read in several ways in this format"
            raise Unsupported(where, problem, "Load it with GPTQModel, and save it in the format gptq_v2.")

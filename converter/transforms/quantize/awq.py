"""AWQ in the order of its gemm kernels: codes of 4 bits, eight outputs to a 32-bit word.

For a linear module ``m`` [out, in]: ``m.qweight`` is I32 [in, out / 8], ``m.qzeros`` I32 [groups, out / 8] and
``m.scales`` [groups, out], a group being as many inputs as another. From the lowest bits on a word holds the outputs 0,
2, 4, 6, 1, 3, 5 and 7 of its eight. A number is (code - zero) * scale, rounded once to the dtype of the scales
(``dequantize_gemm`` in ``awq/utils/packing_utils.py``).
"""

from __future__ import annotations

from converter.errors import Unsupported
from converter.transforms.quantize import gptq
from converter.transforms.quantize.codes import Decoded, Gridded, Scales, coding_of, turned_grid
from converter.transforms.quantize.gptq import check_grid
from converter.transforms.quantize.restore import Module, Restored

_CODING = coding_of(4, [float(code) for code in range(16)], width=4, order=(0, 2, 4, 6, 1, 3, 5, 7))
_QZEROS, _SCALES = ".qzeros", ".scales"
_PER_WORD = 8
# What configs say of weights in this order; other kernels have others.
_VERSIONS = ("gemm",)


def restore(module: Module) -> Restored:
    """Give the numbers of a weight, [out, in], or [in, out] where that is what its library has.

    Words that hold inputs are GPTQ's, which may have no ``g_idx``. Raises BadFile for tensors of shapes and dtypes that
    do not fit, Unsupported for what configs say of other orders.
    """
    words, scales, zeros = module.weight, module.scale(_SCALES), module.scale(_QZEROS)
    check_grid(module, scales, zeros)
    groups, outputs = scales.shape
    if words.shape[1] == outputs:
        return gptq.restore(module)
    inputs, width = words.shape
    if width * _PER_WORD != outputs or zeros.shape != (groups, width):
        problem = f"it is {list(scales.shape)}, words {list(words.shape)} and zero points {list(zeros.shape)}"
        raise module.misfit(_SCALES, f"{problem}, neither as AWQ's gemm kernels have them nor as GPTQ does")
    _check_config(module)
    if inputs % groups:
        raise module.misfit(_SCALES, f"it has {groups} groups for {inputs} inputs")
    codes = Decoded(words.source, _CODING, (inputs, outputs), 1).permuted((1, 0))
    points = Decoded(zeros.source, _CODING, (groups, outputs), 1).permuted((1, 0))
    grid = Scales(turned_grid(scales.source, (1, 0)), scales.name)
    block = (1, inputs // groups)
    numbers = Gridded(Gridded(codes, points, block, by="less"), grid, block)
    source = numbers.permuted((1, 0)) if module.is_transposed else numbers
    return Restored(module.base + ".weight", source, scales.dtype, slack=None)


def _check_config(module: Module) -> None:
    """Raise Unsupported where the config says that weights lie otherwise, or are of another method."""
    config = module.config
    method, version, bits = config.get("quant_method", "awq"), config.get("version", "gemm"), config.get("bits", 4)
    said = None
    if method != "awq":
        said = f"the method {str(method)[:60]!r}"
    elif not isinstance(version, str) or version.lower() not in _VERSIONS:
        said = f"the version {str(version)[:60]!r}"
    elif bits != 4:
        said = f"{str(bits)[:60]} bits"
    if said:
        problem = f"holds weights that lie as AWQ's gemm kernels have them, and its config says {said}"
        raise Unsupported(module.weight.where, problem, "Load it with the library that wrote it.")

"""The LLM.int8 form of bitsandbytes: what a file holds in place of a linear weight, and how a config says so.

For a linear module ``m``: ``m.weight`` is int8 [out, in], ``m.SCB`` float32 [out], the largest magnitude of each row,
and ``m.weight_format`` a uint8 scalar, 0 for row by row (``Linear8bitLt._save_to_state_dict`` in
``bitsandbytes/nn/modules.py``). A number is int8 * SCB / 127. GPT-2's Conv1D, whose weight is [in, out], is written as
[out, in] too (``Bnb8bitQuantize`` in ``transformers/integrations/bitsandbytes.py``).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from converter.dtypes import DTYPES, DType
from converter.errors import Unsupported
from converter.tensors.base import Reader, Tensor
from converter.tensors.derived import Computed, Constant, Derived
from converter.tensors.shaped import Unboxed
from converter.transforms.quantize.codes import Gridded, Widened, scales_of
from converter.transforms.quantize.restore import Module, Restored
from converter.transforms.quantize.write import ROW, Measure, Measured, RowBlock, Writer, find_maxima

_WEIGHT, _SCALES, _FORMAT = ".weight", ".SCB", ".weight_format"
_STEP = struct.pack("<f", 1 / 127)
_HALF = 2**-11  # values are rounded to float16 first


def bitsandbytes_config(skipped: Sequence[str], **said: Any) -> dict[str, Any]:
    """Give what config.json says of a model in a form of bitsandbytes, as ``BitsAndBytesConfig.to_dict`` does.

    That is the same in transformers and in Diffusers; ``said`` is what differs from a model in 8 bits.
    """
    return {
        "_load_in_4bit": False,
        "_load_in_8bit": True,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(skipped),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": False,
        "load_in_8bit": True,
        "quant_method": "bitsandbytes",
        **said,
    }


def quantization_config(skipped: Sequence[str], dtype: DType) -> dict[str, Any]:
    """Give what config.json says of a model in 8 bits."""
    return bitsandbytes_config(skipped)


@dataclass(frozen=True, slots=True)
class QuantizedRows(Unboxed, Computed):
    """A matrix [out, in] in 8 bits; ``scales`` are float32, one a row from the row ``first`` on."""

    scales: bytes
    first: int = 0

    @property
    def dtype(self) -> DType:
        return DTYPES["I8"]

    def part(self, begin: int, end: int) -> QuantizedRows:
        part = Derived.part(self, begin, end)
        first, last = begin // self.shape[1], -(-end // self.shape[1])
        return replace(part, scales=part.scales[4 * (first - self.first) : 4 * (last - self.first)], first=first)

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        from converter.transforms.quantize.write_kernels import RowScales, quantize_chunk

        before = self.source.dtype
        columns = self.shape[1]
        with reader.scratch(len(out) * before.itemsize) as values:
            self.source.read(begin * before.itemsize, values, reader)
            quantize_chunk(values, before, out, RowScales(self.scales, columns), begin - self.first * columns)


def find_scales(block: RowBlock, chunk_nbytes: int) -> Measured:
    """Find the largest magnitude of each row of a block; it is fit where float16 holds them all.

    Raises BadFile for a file that became shorter.
    """
    from converter.transforms.quantize.kernels import are_finite
    from converter.transforms.quantize.write_kernels import in_halves

    numbers = in_halves(find_maxima(block, chunk_nbytes, ROW).found)
    return Measured(block, numbers, are_finite(memoryview(numbers)))


def quantized(weight: Tensor, scales: bytes) -> tuple[Tensor, Tensor, Tensor]:
    """Give the three tensors that stand for a weight [out, in]; they must come into one file."""
    module = weight.name.removesuffix(_WEIGHT)
    numbers = Constant(DTYPES["F32"], (weight.shape[0],), scales)
    return (
        weight._replace(source=QuantizedRows(weight.source, scales)),
        Tensor(module + _SCALES, numbers, beside=weight.name),
        Tensor(module + _FORMAT, Constant(DTYPES["U8"], (), b"\0"), beside=weight.name),
    )


def restore(module: Module) -> Restored:
    """Give the numbers of an int8 weight, [in, out] where that is what its library has: products in float32.

    As ``int8_vectorwise_dequant`` does in ``bitsandbytes/backends/default/ops.py``. Raises BadFile for scales that do
    not fit, Unsupported for a layout that is not row by row.
    """
    weight, scales = module.weight, module.scale(_SCALES)
    rows = weight.shape[0] if len(weight.shape) == 2 else 0
    if len(weight.shape) != 2 or scales.dtype.tag != "F32" or scales.shape != weight.shape[:1]:
        raise module.misfit(_SCALES, f"it is {scales.dtype} {list(scales.shape)} beside {list(weight.shape)}")
    layout = module.contents.get(_FORMAT, b"")
    if len(layout) > 1:
        raise module.misfit(_FORMAT, "it is no single number")
    if any(layout):
        problem = f"has weights that are not laid out row by row, as {module.base + _FORMAT!r} says"
        raise Unsupported(weight.where, problem, "Load it with the bitsandbytes that wrote it.")
    numbers = Gridded(Widened(weight.source), scales_of(scales, (rows, 1)), (1, weight.shape[1]))
    steps = Gridded(numbers, Constant(DTYPES["F32"], (1, 1), _STEP), weight.shape)
    return Restored(weight.name, steps.permuted((1, 0)) if module.is_transposed else steps, slack=_HALF)


INT8 = Writer(
    "int8",
    "8 bits",
    "bitsandbytes",
    quantized,
    quantization_config,
    "Each value comes out within 0.4 % of the largest one in its row (1/254), and float16's rounding.",
    ("Do not call .to() on it: an 8-bit model stays where device_map has put it. bitsandbytes must be installed.",),
    Measure(find_scales, "values that float16 cannot hold"),
)

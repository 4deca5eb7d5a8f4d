"""Float8 with scales, as it is written: in blocks for transformers, by rows for compressed-tensors, whole for ComfyUI.

Each weight is measured before there is a plan: the largest magnitude of each cell that has a scale of its own. A weight
with NaN or infinity has no scale, and stays as it is.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from converter.dtypes import DTYPES, DType
from converter.tensors.base import Reader, Tensor, TensorSource
from converter.tensors.derived import Cast, Computed, Constant
from converter.transforms.quantize.codes import Gridded, Widened, cells_of
from converter.transforms.quantize.write import ROW, WHOLE, Cell, Measure, Writer, find_maxima

_F32 = DTYPES["F32"]
_BLOCK = 128
_CAUSE = "values that are no finite numbers"
_ACCURACY = "Each value comes out within about 1/16 of itself, or 1/450,000 of the largest one of the same scale."


def _measure(cell: Cell) -> Measure:
    return Measure(partial(find_maxima, cell=cell), _CAUSE, rows=cell.rows or 1)


def _scaled(weight: Tensor, factors: bytes, cell: Cell, by: Literal["times", "over"] = "times") -> TensorSource:
    """Give a weight in float32 with each of its cells multiplied with a factor, or divided."""
    rows, columns = weight.shape
    block = cell.rows or rows, cell.columns or columns
    grid = Constant(_F32, cells_of(weight.shape, block), factors)
    return Gridded(Widened(weight.source), grid, block, by=by)


class InFloat8(Computed):
    """Finite numbers in float32 as float8, those that it cannot hold as its largest ones.

    ``Cast`` looks at all of a chunk once more where one number is the largest, and here there is one for each scale.
    """

    __slots__ = ()

    @property
    def dtype(self) -> DType:
        return DTYPES["F8_E4M3"]

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        from converter.transforms.quantize.write_kernels import float8_into

        with reader.scratch(_F32.itemsize * len(out)) as numbers:
            self.source.read(_F32.itemsize * begin, numbers, reader)
            float8_into(numbers, out)


def _beside(weight: Tensor, end: str, dtype: DType, shape: tuple[int, ...], content: bytes) -> Tensor:
    name = weight.name.removesuffix(".weight") + end
    return Tensor(name, Constant(dtype, shape, content), beside=weight.name)


# In blocks.


_TILE = Cell(_BLOCK, _BLOCK)


def write_blocks(weight: Tensor, found: bytes) -> tuple[Tensor, ...]:
    """Give a weight [out, in] in float8, and what each block of 128 x 128 is multiplied with to get it back.

    As ``Fp8Quantize`` does in ``transformers/integrations/finegrained_fp8.py``.
    """
    from converter.transforms.quantize.write_kernels import block_scales

    factors, inverse = block_scales(found)
    shape = weight.shape[0] // _BLOCK, weight.shape[1] // _BLOCK
    codes = weight._replace(source=InFloat8(_scaled(weight, factors, _TILE)))
    return codes, _beside(weight, ".weight_scale_inv", _F32, shape, inverse)


def _has_no_blocks(weight: Tensor, is_transposed: bool) -> str:
    """Say why transformers has no float8 for a weight: it makes none of other modules, and none of other sides."""
    if is_transposed:
        return "they are no Linear"
    return f"{_BLOCK} does not divide their sides" if any(side % _BLOCK for side in weight.shape) else ""


def _blocks_config(skipped: Sequence[str], dtype: DType) -> dict[str, Any]:
    """Give what ``FineGrainedFP8Config.to_dict`` of transformers 5.24 gives."""
    return {
        "activation_scheme": "dynamic",
        "dequantize": False,
        "expert_dtype": "fp8",
        "modules_to_convert": None,
        "modules_to_not_convert": list(skipped),
        "quant_method": "fp8",
        "scale_fmt": "float",
        "weight_block_size": [_BLOCK, _BLOCK],
    }


FP8_BLOCK = Writer(
    "fp8-block",
    "8 bits (float8 in blocks)",
    "transformers",
    write_blocks,
    _blocks_config,
    _ACCURACY,
    ("Without a GPU that has float8 (compute capability 8.9), transformers makes bf16 of it as it loads.",),
    _measure(_TILE),
    unfit=_has_no_blocks,
    libraries=("transformers",),
    takes_experts=True,
    casts_first=True,
)


# By rows.


_MINUS_ZERO = struct.pack("<f", -0.0)


def write_rows(weight: Tensor, found: bytes) -> tuple[Tensor, ...]:
    """Give a weight [out, in] in float8, and what each row is multiplied with to get it back.

    In the weight's own dtype, as ``calculate_qparams`` and ``quantize`` do in ``compressed_tensors/quantization``.
    """
    from converter.transforms.quantize.write_kernels import row_scales

    dtype = weight.dtype if weight.dtype.bits < 32 else _F32
    divisors, scales = row_scales(found, dtype)
    numbers = _scaled(weight, divisors, ROW, "over")
    if dtype.bits < 32:
        numbers = Widened(Cast(numbers, dtype))
    # It adds a zero point of 0, which takes the sign off zeros.
    numbers = Gridded(numbers, Constant(_F32, (1, 1), _MINUS_ZERO), weight.shape, by="less")
    shape = weight.shape[0], 1
    return weight._replace(source=InFloat8(numbers)), _beside(weight, ".weight_scale", dtype, shape, scales)


def _is_no_linear(weight: Tensor, is_transposed: bool) -> str:
    return "they are no Linear" if is_transposed else ""


def _rows_config(skipped: Sequence[str], dtype: DType) -> dict[str, Any]:
    """Give what ``ModelCompressor.update_config`` of compressed-tensors 0.20.0 writes for its preset FP8_DYNAMIC."""
    group = {
        "format": "float-quantized",
        "input_activations": _numbers(dynamic=True, strategy="token"),
        "output_activations": None,
        "targets": ["Linear"],
        "weights": _numbers(dynamic=False, strategy="channel"),
    }
    return {
        "config_groups": {"group_0": group},
        "format": "float-quantized",
        "global_compression_ratio": None,
        "ignore": list(skipped),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.0",
    }


def _numbers(dynamic: bool, strategy: str) -> dict[str, Any]:
    kind = {"strategy": strategy, "symmetric": True, "type": "float"}
    return {"dynamic": dynamic, "group_size": None, "num_bits": 8, **kind}


FP8_SCALED = Writer(
    "fp8-scaled",
    "8 bits (float8 with scales)",
    "compressed-tensors",
    write_rows,
    _rows_config,
    _ACCURACY,
    ("compressed-tensors must be installed, or vLLM.",),
    _measure(ROW),
    unfit=_is_no_linear,
    libraries=("transformers",),
    names_skipped=True,
    casts_first=True,
)


# Whole, in one file.


_ALL = Cell(WHOLE, WHOLE)
_SAID = b'{"format": "float8_e4m3fn"}'


def write_whole(weight: Tensor, found: bytes) -> tuple[Tensor, ...]:
    """Give a weight in float8, what it is multiplied with to get it back, and what says so to ComfyUI.

    As ``TensorCoreFP8Layout.quantize`` does in ``comfy_kitchen/tensor/fp8.py``, of a weight in float32.
    """
    from converter.transforms.quantize.write_kernels import whole_scale

    factor, scale = whole_scale(found)
    return (
        weight._replace(source=InFloat8(_scaled(weight, factor, _ALL))),
        _beside(weight, ".weight_scale", _F32, (), scale),
        _beside(weight, ".comfy_quant", DTYPES["U8"], (len(_SAID),), _SAID),
    )


def _no_config(skipped: Sequence[str], dtype: DType) -> dict[str, Any]:
    return {}


COMFY_FILE = Writer(
    "fp8-scaled",
    "8 bits (float8 with scales)",
    "ComfyUI",
    write_whole,
    _no_config,
    _ACCURACY,
    (
        "For ComfyUI: put it into models/diffusion_models, a text encoder into models/text_encoders; the weight_dtype "
        "of 'Load Diffusion Model' stays 'default'.",
    ),
    measure=_measure(_ALL),
)

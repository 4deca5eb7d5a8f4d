"""Float8 and FP4 weights with scales, in blocks or for all of a weight: as DeepSeek, Qwen, Mistral publish them.

``m.weight`` is F8_E4M3 [.., N, K], ``m.weight_scale_inv`` one number for each block of ``weight_block_size``, 128 x 128
where nothing says it: [.., ceil(N / 128), ceil(K / 128)]; or for all of a weight, or of an expert, or a row. A number
is the product of the two in float32 (``Fp8Dequantize`` in ``transformers/integrations/finegrained_fp8.py``;
``weight_dequant`` in ``inference/kernel.py`` of DeepSeek, whose last blocks may be smaller: transformers does not load
those). Scales may be exponents, F8_E8M0 or U8, as those of MXFP8 are, whose blocks are 1 x 32.

They are ``m.scale`` in DeepSeek-V4 and ``m.qscale_weight`` in Mistral's own files. FP4 is I8 [.., N, K / 2], two
numbers a byte, with scales [.., N, K / 32]. Fused experts are ``m.gate_up_proj`` and ``m.gate_up_proj_scale_inv``;
their gate and up have a scale each where all of a weight has one (``_alloc_expert_proj``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from converter.dtypes import DType
from converter.errors import BadFile, Unsupported
from converter.tensors.base import Tensor, TensorSource
from converter.tensors.shaped import Shape
from converter.transforms.quantize.codes import AGAIN, E2M1, Decoded, Gridded, Widened, cells_of, scales_of
from converter.transforms.quantize.restore import Module, Restored

_BLOCK = (128, 128)
_SLACK = 2**-8  # what a cast to bfloat16 has taken off before: loaders quantize the weights that they run
_MX_BLOCK = (1, 32)  # of the microscaling formats of OCP
_MAX_BLOCK = 1 << 20
_SCALES = frozenset({"F32", "BF16", "F16", "F8_E8M0", "U8"})


def restore(module: Module) -> Restored:
    """Give the numbers of a weight. Raises BadFile for scales that do not fit it, Unsupported for another float8."""
    weight = module.weight
    end, *more = (end for end in module.scheme.companions if end in module.beside)
    scale = module.scale(end)
    if more:
        problem = f"has {module.base + end!r} and {module.base + more[0]!r} for {weight.name!r}, and one would do"
        raise BadFile(scale.where, problem, AGAIN)
    if scale.dtype.tag not in _SCALES:
        raise module.misfit(end, f"it is {scale.dtype}, and scales are fp32, bf16, fp16 or exponents")
    numbers = _numbers_of(weight)
    if 0 in numbers.shape:
        return Restored(weight.name, numbers, _dtype_of(scale), _SLACK)
    block = _find_block(module, end, numbers.shape, scale)
    grid = cells_of(numbers.shape, block)
    return Restored(weight.name, Gridded(numbers, scales_of(scale, grid), block), _dtype_of(scale), _SLACK)


def _numbers_of(weight: Tensor) -> TensorSource:
    """Give what the codes of a weight stand for."""
    if weight.dtype.tag == "F8_E4M3":
        return Widened(weight.source)
    if weight.dtype.tag == "I8" and weight.shape:
        return Decoded(weight.source, E2M1, (*weight.shape[:-1], 2 * weight.shape[-1]), len(weight.shape) - 1)
    problem = f"holds {weight.name!r} in {weight.dtype} with scales, which no model is published in"
    raise Unsupported(weight.where, problem, "Take the model that it was made from.")


def _dtype_of(scale: Tensor) -> DType | None:
    """Give the dtype of the numbers where the scales tell it, as ``Fp8Dequantize`` has it; none for float32."""
    return scale.dtype if scale.dtype.tag in ("BF16", "F16") else None


def _find_block(module: Module, end: str, shape: Shape, scale: Tensor) -> Shape:
    """Give how many numbers along each axis have a scale in common. Raises BadFile where no block is as many scales."""
    said = _said_block(module)
    if math.prod(scale.shape) == 1:
        return shape
    if len(shape) >= 2:
        for block in _blocks_of(shape, scale.shape, said):
            whole = _whole(shape, block)
            if _is_spelled(cells_of(shape, whole), scale.shape, shape):
                return whole
    problem = f"it is {list(scale.shape)} beside {list(shape)}"
    if len(shape) >= 2:
        size = said or _BLOCK
        problem += f", and blocks of {list(size)} need {list(cells_of(shape, _whole(shape, size)))}"
    raise module.misfit(end, problem)


def _whole(shape: Shape, block: tuple[int, int]) -> Shape:
    """Give a block of matrices as one of all axes."""
    return (*(1 for _ in shape[:-2]), *block)


def _blocks_of(shape: Shape, scales: Shape, said: tuple[int, int] | None) -> Iterator[tuple[int, int]]:
    """Give the blocks that matrices may be cut into, the likeliest first.

    Where nothing says which, also those that divide them, as ``Fp8Dequantize`` finds them.
    """
    rows, columns = shape[-2:]
    size = said or _BLOCK
    yield size
    yield rows, columns
    yield 1, columns
    yield _MX_BLOCK
    if len(shape) == 3 and not rows % 2:  # gate and up
        yield rows // 2, columns
        yield rows // 2, size[1]
    is_grid = said is None and len(scales) == len(shape) and all(scales[-2:])
    if is_grid and not (rows % scales[-2] or columns % scales[-1]):
        yield rows // scales[-2], columns // scales[-1]


def _is_spelled(grid: Shape, scales: Shape, shape: Shape) -> bool:
    """Say whether scales are of a grid's shape, or one for each row or expert without more axes."""
    return scales == grid or (scales == shape[:1] and math.prod(grid) == shape[0] == grid[0])


def _said_block(module: Module) -> tuple[int, int] | None:
    """Give the block that the config says, if any. Raises BadFile for what is no block."""
    said = module.config.get("weight_block_size")
    if said is None:
        return None
    sizes = said if isinstance(said, list | tuple) else []
    if len(sizes) != 2 or not all(type(size) is int and 0 < size < _MAX_BLOCK for size in sizes):
        problem = f"is quantized in blocks of {str(said)[:60]!r}, as the weight_block_size of its config says"
        raise BadFile(module.weight.where, problem, "It has to be two numbers, as [128, 128]: mend config.json.")
    return sizes[0], sizes[1]

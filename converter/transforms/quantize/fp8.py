"""Float8 weights with float32 scales, in blocks or for all of a weight: as DeepSeek, Qwen and others publish them.

``m.weight`` is F8_E4M3 [.., N, K], ``m.weight_scale_inv`` one number for each block of ``weight_block_size``, 128 x 128
where nothing says it, [.., ceil(N / 128), ceil(K / 128)], or for all of it. A number is the product of the two in
float32 (``Fp8Dequantize`` in ``transformers/integrations/finegrained_fp8.py``; ``weight_dequant`` in ``kernel.py`` of
DeepSeek, whose last blocks may be smaller, which transformers does not load).
"""

from __future__ import annotations

import math

from converter.transforms.quantize.codes import Gridded, Scales, Widened, reshaped
from converter.transforms.quantize.restore import Module, Restored

_BLOCK = (128, 128)


def restore(module: Module) -> Restored:
    """Give the numbers of a weight. Raises BadFile for scales that do not fit it."""
    weight = module.weight
    end = next(end for end in module.scheme.companions if end in module.beside)
    scale = module.scale(end)
    shape = weight.shape
    if math.prod(scale.shape) == 1:
        block, grid = shape, tuple(1 for _ in shape)
    else:
        block = (*(1 for _ in shape[:-2]), *_block_of(module))
        grid = tuple(-(-length // size) for length, size in zip(shape, block, strict=True))
        if grid != scale.shape:
            raise module.misfit(
                end, f"it is {list(scale.shape)}, and blocks of {block} in {list(shape)} need {list(grid)}"
            )
    scales = Scales(reshaped(scale.source, scale.dtype, grid), scale.name)
    return Restored(weight.name, Gridded(Widened(weight.source), scales, tuple(max(1, n) for n in block)))


def _block_of(module: Module) -> tuple[int, ...]:
    said = module.config.get("weight_block_size", _BLOCK)
    sizes = tuple(said) if isinstance(said, list | tuple) else ()
    return sizes if len(sizes) == 2 and all(type(size) is int and 0 < size < 1 << 20 for size in sizes) else _BLOCK

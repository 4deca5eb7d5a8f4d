"""The 4-bit floats of ModelOpt: a scale in float8 for each 16 numbers of a row, and one in float32 for all of them.

Of a module ``m``, ``m.weight`` is bytes of two numbers each, [.., N, K / 2], ``m.weight_scale`` [.., N, K / 16], or
[.., N, K / 32] in what it calls W4A8_NVFP4_FP8, and ``m.weight_scale_2`` a float32. A number is the code times the
product of the two in float32 (``NVFP4QTensor.dequantize`` in ``modelopt/torch/quantization/qtensor/nvfp4_tensor.py``,
to which both zeros are 0). Without the second scale they are MXFP4, exponents for each 32 numbers. Its float8 and int8
are those of compressed-tensors.

Experts that are one tensor [E, in, out], as those of Llama 4 and gpt-oss are, have pairs and groups along the middle
axis (``maybe_transpose_expert_weight_dimensions`` in ``modelopt/torch/export/quant_utils.py``).
"""

from __future__ import annotations

from converter.dtypes import DTYPES
from converter.errors import Unsupported
from converter.tensors.base import TensorSource
from converter.tensors.shaped import Shape
from converter.transforms.quantize.codes import E2M1, Decoded, Gridded, Scales, Widened
from converter.transforms.quantize.compressed import check_plain, whole
from converter.transforms.quantize.restore import Module, Restored

_GROUPS = {"F8_E4M3": (16, 32), "U8": (32,)}
_SLACK = 2**-20
_NV = E2M1._replace(values=tuple(value or 0.0 for value in E2M1.values))


def restore(module: Module) -> Restored:
    """Give the numbers of a weight. Raises BadFile for scales that do not fit, Unsupported for whole numbers of AWQ."""
    check_plain(module)
    weight = module.weight
    second = next((end for end in module.beside if end.endswith("weight_scale_2")), None)
    end = second.removesuffix("_2") if second else ".weight_scale"
    scale = module.scale(end)
    if scale.dtype.bits > 8:
        # ``pack_int4_in_uint8`` in ``export/quant_utils.py``: nothing in it reads them again.
        said = module.config.get("quant_method")
        called = f", and its config says {said[:60]!r}" if isinstance(said, str) else ""
        problem = f"has whole numbers in fewer than 8 bits in {weight.name!r}, as ModelOpt's AWQ has them{called}"
        raise Unsupported(weight.where, problem, "wconv does not read those: take the model it was made from.")
    if scale.dtype.tag != ("F8_E4M3" if second else "U8"):
        raise module.misfit(end, f"it is {scale.dtype}")
    shape, block, axis = _fit(module, end)
    grid: TensorSource = Scales(scale.source, scale.name)
    if second:
        grid = Scales(Gridded(grid, whole(module, second, scale.shape), scale.shape), scale.name)
    numbers = Gridded(Decoded(weight.source, _NV if second else E2M1, shape, axis), grid, block)
    return Restored(weight.name, numbers, DTYPES["BF16"], _SLACK)


def restore_whole(module: Module) -> Restored:
    """Give the numbers of experts in float8 with one scale for all. Raises BadFile for another."""
    weight = module.weight
    [end] = module.scheme.companions
    if 0 in weight.shape:
        raise module.misfit(end, f"that is {list(weight.shape)}")
    numbers = Gridded(Widened(weight.source), whole(module, end, weight.shape), weight.shape)
    return Restored(weight.name, numbers, None, _SLACK)


def _fit(module: Module, end: str) -> tuple[Shape, Shape, int]:
    """Give the shape of a weight's numbers, the block of each scale, and the axis along which numbers are packed."""
    packed, scale = module.weight.shape, module.scale(end)
    axes = (len(packed) - 1, 1) if len(packed) == 3 else (len(packed) - 1,)
    if len(packed) > 1 and 0 not in packed:
        for axis in axes:
            shape = (*packed[:axis], 2 * packed[axis], *packed[axis + 1 :])
            for group in _GROUPS[scale.dtype.tag]:
                block = (*(1 for _ in shape[:axis]), group, *(1 for _ in shape[axis + 1 :]))
                needed = tuple(length // size for length, size in zip(shape, block, strict=True))
                if scale.shape == needed and not shape[axis] % group:
                    return shape, block, axis
    raise module.misfit(end, f"it is {list(scale.shape)} beside {list(packed)} bytes")

"""The 4-bit floats of ModelOpt: a scale in float8 for each 16 numbers of a row, and one in float32 for all of them.

Of a module ``m``, ``m.weight`` is bytes of two numbers each, [.., N, K / 2], ``m.weight_scale`` [.., N, K / 16] and
``m.weight_scale_2`` a float32. A number is the code times the product of the two in float32
(``NVFP4QTensor.dequantize`` in ``modelopt/torch/quantization/qtensor/nvfp4_tensor.py``, to which both zeros are 0).
Without the second scale they are MXFP4, exponents for each 32 numbers. Its float8 and int8 are those of
compressed-tensors.
"""

from __future__ import annotations

import math

from converter.dtypes import DTYPES
from converter.errors import Unsupported
from converter.tensors.base import TensorSource
from converter.transforms.quantize.codes import E2M1, Decoded, Gridded, Scales
from converter.transforms.quantize.compressed import check_plain, whole
from converter.transforms.quantize.restore import Module, Restored

_SCALE, _SECOND = ".weight_scale", ".weight_scale_2"
_GROUPS = {"F8_E4M3": 16, "U8": 32}
_SLACK = 2**-20
_NV = E2M1._replace(values=tuple(value or 0.0 for value in E2M1.values))


def restore(module: Module) -> Restored:
    """Give the numbers of a weight. Raises BadFile for scales that do not fit, Unsupported for whole numbers of AWQ."""
    check_plain(module)
    weight, scale = module.weight, module.scale(_SCALE)
    has_second = _SECOND in module.beside
    if scale.dtype.bits > 8:
        # ``pack_int4_in_uint8`` in ``export/quant_utils.py``: nothing in it reads them again.
        raise Unsupported(weight.where, f"has whole numbers of 4 bits, as AWQ has them, in {weight.name!r}")
    if scale.dtype.tag != ("F8_E4M3" if has_second else "U8"):
        raise module.misfit(_SCALE, f"it is {scale.dtype}")
    group = _GROUPS[scale.dtype.tag]
    shape = (*weight.shape[:-1], 2 * math.prod(weight.shape[-1:]))
    if len(shape) < 2 or not math.prod(shape) or scale.shape[:-1] != shape[:-1] or scale.shape[-1] * group != shape[-1]:
        raise module.misfit(_SCALE, f"it is {list(scale.shape)}, and groups of {group} in {list(shape)} are not")
    grid: TensorSource = Scales(scale.source, scale.name)
    if has_second:
        grid = Scales(Gridded(grid, whole(module, _SECOND, scale.shape), scale.shape), scale.name)
    coding = _NV if has_second else E2M1
    numbers = Gridded(Decoded(weight.source, coding, shape, len(shape) - 1), grid, (*(1 for _ in shape[:-1]), group))
    return Restored(weight.name, numbers, DTYPES["BF16"], _SLACK)

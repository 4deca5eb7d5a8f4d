"""Quantized weights as plain numbers again, and back: a module a scheme, and here which one reads what."""

from __future__ import annotations

from collections.abc import Mapping

from converter.models.schemes import FP8, FP8_OF_EXPERTS, LLM_INT8, MXFP4, MXFP4_ROWS, Scheme
from converter.transforms.quantize import bnb_int8, fp8, mxfp4
from converter.transforms.quantize.restore import Restore

DEQUANTIZERS: Mapping[Scheme, Restore] = {
    LLM_INT8: bnb_int8.restore,
    FP8: fp8.restore,
    FP8_OF_EXPERTS: fp8.restore,
    MXFP4: mxfp4.restore,
    MXFP4_ROWS: mxfp4.restore_rows,
}

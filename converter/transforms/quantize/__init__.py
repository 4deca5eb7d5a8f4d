"""Quantized weights as plain numbers again, and back: a module a scheme, and here which one reads what."""

from __future__ import annotations

from collections.abc import Mapping

from converter.models.schemes import (
    FP4,
    FP4_OF_DEEPSEEK,
    FP4_OF_EXPERTS,
    FP8,
    FP8_OF_EXPERTS,
    LLM_INT8,
    Scheme,
)
from converter.transforms.quantize import bnb_int8, fp8
from converter.transforms.quantize.restore import Restore

DEQUANTIZERS: Mapping[Scheme, Restore] = {
    LLM_INT8: bnb_int8.restore,
    **dict.fromkeys((FP8, FP8_OF_EXPERTS, FP4, FP4_OF_EXPERTS, FP4_OF_DEEPSEEK), fp8.restore),
}

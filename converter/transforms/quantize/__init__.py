"""Quantized weights as plain numbers again, and back: a module a scheme, and here which one reads or writes what."""

from __future__ import annotations

from collections.abc import Mapping

from converter.models.schemes import (
    AWQ,
    CT_FP8,
    CT_INT8,
    CT_PACKED,
    FP4,
    FP4_OF_DEEPSEEK,
    FP4_OF_EXPERTS,
    FP8,
    FP8_OF_EXPERTS,
    GPTQ,
    LLM_INT8,
    MODELOPT_4BIT,
    MXFP4,
    MXFP4_ROWS,
    NVFP4,
    Scheme,
)
from converter.transforms.quantize import awq, bnb_int8, compressed, fp8, gptq, modelopt, mxfp4
from converter.transforms.quantize.restore import Restore
from converter.transforms.quantize.write import Writer

DEQUANTIZERS: Mapping[Scheme, Restore] = {
    LLM_INT8: bnb_int8.restore,
    **dict.fromkeys((FP8, FP8_OF_EXPERTS, FP4, FP4_OF_EXPERTS, FP4_OF_DEEPSEEK), fp8.restore),
    **dict.fromkeys((CT_FP8, CT_INT8), compressed.restore),
    CT_PACKED: compressed.restore_packed,
    **dict.fromkeys((NVFP4, MODELOPT_4BIT), modelopt.restore),
    GPTQ: gptq.restore,
    AWQ: awq.restore,
    MXFP4: mxfp4.restore,
    MXFP4_ROWS: mxfp4.restore_rows,
}
QUANTIZERS: Mapping[str, Writer] = {writer.name: writer for writer in (bnb_int8.INT8,)}

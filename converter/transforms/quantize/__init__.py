"""Quantized weights as plain numbers again, and back: a module a scheme, and here which one reads or writes what."""

from __future__ import annotations

from collections.abc import Mapping

from converter.models.schemes import (
    BNB_4BIT,
    COMFY_FP8,
    COMFY_MARKED,
    COMFY_QUANT,
    CT_FP8,
    CT_INT8,
    CT_PACKED,
    FP4,
    FP4_OF_DEEPSEEK,
    FP4_OF_EXPERTS,
    FP8,
    FP8_OF_EXPERTS,
    LLM_INT8,
    MODELOPT_4BIT,
    NVFP4,
    Scheme,
)
from converter.transforms.quantize import bnb_4bit, bnb_int8, comfy, compressed, fp8, fp8_writing, modelopt
from converter.transforms.quantize.restore import Restore
from converter.transforms.quantize.write import Writer

DEQUANTIZERS: Mapping[Scheme, Restore] = {
    LLM_INT8: bnb_int8.restore,
    BNB_4BIT: bnb_4bit.restore,
    **dict.fromkeys((FP8, FP8_OF_EXPERTS, FP4, FP4_OF_EXPERTS, FP4_OF_DEEPSEEK), fp8.restore),
    **dict.fromkeys((CT_FP8, CT_INT8), compressed.restore),
    CT_PACKED: compressed.restore_packed,
    **dict.fromkeys((NVFP4, MODELOPT_4BIT), modelopt.restore),
    COMFY_QUANT: comfy.restore_described,
    COMFY_FP8: comfy.restore_scaled,
    COMFY_MARKED: comfy.restore_marked,
}
QUANTIZERS: Mapping[str, Writer] = {
    writer.name: writer for writer in (bnb_int8.INT8, bnb_4bit.NF4, fp8_writing.FP8_BLOCK, fp8_writing.FP8_SCALED)
}
FILE_QUANTIZERS: Mapping[str, Writer] = {fp8_writing.COMFY_FILE.name: fp8_writing.COMFY_FILE}
"""The schemes of single files, which no library but ComfyUI loads."""

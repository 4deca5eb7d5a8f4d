"""Quantized weights as plain numbers again, and back: a module a scheme, and here which one reads or writes what."""

from __future__ import annotations

from collections.abc import Container, Mapping

from converter.libraries.modules import find_linears
from converter.models.checkpoint import Checkpoint
from converter.models.component import Component, quantization_beside
from converter.models.schemes import (
    AWQ,
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
    FP8_OF_FUSED,
    GPTQ,
    LLM_INT8,
    MODELOPT_4BIT,
    MODELOPT_FP8_OF_EXPERTS,
    MXFP4,
    MXFP4_ROWS,
    NVFP4,
    NVFP4_OF_EXPERTS,
    Scheme,
    quantized_in,
)
from converter.transforms.quantize import (
    awq,
    bnb_4bit,
    bnb_int8,
    comfy,
    compressed,
    fp8,
    fp8_writing,
    gptq,
    modelopt,
    mxfp4,
)
from converter.transforms.quantize.restore import Found, Restore, find_restored, named_plainly
from converter.transforms.quantize.write import Writer

DEQUANTIZERS: Mapping[Scheme, Restore] = {
    LLM_INT8: bnb_int8.restore,
    BNB_4BIT: bnb_4bit.restore,
    **dict.fromkeys((FP8, FP8_OF_EXPERTS, FP8_OF_FUSED, FP4, FP4_OF_EXPERTS, FP4_OF_DEEPSEEK), fp8.restore),
    **dict.fromkeys((CT_FP8, CT_INT8), compressed.restore),
    CT_PACKED: compressed.restore_packed,
    **dict.fromkeys((NVFP4, NVFP4_OF_EXPERTS, MODELOPT_4BIT), modelopt.restore),
    MODELOPT_FP8_OF_EXPERTS: modelopt.restore_whole,
    COMFY_QUANT: comfy.restore_described,
    COMFY_FP8: comfy.restore_scaled,
    COMFY_MARKED: comfy.restore_marked,
    GPTQ: gptq.restore,
    AWQ: awq.restore,
    MXFP4: mxfp4.restore,
    MXFP4_ROWS: mxfp4.restore_rows,
}
QUANTIZERS: Mapping[str, Writer] = {
    writer.name: writer for writer in (bnb_int8.INT8, bnb_4bit.NF4, fp8_writing.FP8_BLOCK, fp8_writing.FP8_SCALED)
}
FILE_QUANTIZERS: Mapping[str, Writer] = {fp8_writing.COMFY_FILE.name: fp8_writing.COMFY_FILE}
"""The schemes of single files, which no library but ComfyUI loads."""


def find_numbers(component: Component, checkpoint: Checkpoint) -> Found:
    """Give the numbers of all quantized weights of a component's checkpoint. Raises what ``find_restored`` does.

    Its library is asked which of them lie transposed, where any may: that starts a program for many classes.
    """
    may_be_turned = any(one.scheme.may_be_turned for one in quantized_in(checkpoint))
    transposed = find_linears(component, named_plainly(checkpoint)).transposed if may_be_turned else ()
    return find_unasked(component, checkpoint, transposed)


def find_unasked(component: Component, checkpoint: Checkpoint, transposed: Container[str] = ()) -> Found:
    """Give the same and ask nothing: ``transposed`` modules have theirs so, others as they lie in the file."""
    return find_restored(checkpoint, DEQUANTIZERS, quantization_beside(component), transposed)

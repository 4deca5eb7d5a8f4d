"""Quantized weights as plain numbers again, and back: a module a scheme, and here which one reads or writes what."""

from __future__ import annotations

from collections.abc import Mapping

from converter.libraries.modules import find_linears
from converter.models import schemes
from converter.models.checkpoint import Checkpoint
from converter.models.component import Component, quantization_beside
from converter.models.schemes import Scheme
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
from converter.transforms.quantize.restore import Found, Restore, find_restored
from converter.transforms.quantize.write import Writer

DEQUANTIZERS: Mapping[Scheme, Restore] = {
    schemes.LLM_INT8: bnb_int8.restore,
    schemes.BNB_4BIT: bnb_4bit.restore,
    schemes.FP8: fp8.restore,
    schemes.FP8_OF_EXPERTS: fp8.restore,
    schemes.FP8_OF_FUSED: fp8.restore,
    schemes.FP4: fp8.restore,
    schemes.FP4_OF_EXPERTS: fp8.restore,
    schemes.FP4_OF_DEEPSEEK: fp8.restore,
    schemes.CT_FP8: compressed.restore,
    schemes.CT_INT8: compressed.restore,
    schemes.CT_PACKED: compressed.restore_packed,
    schemes.NVFP4: modelopt.restore,
    schemes.NVFP4_OF_EXPERTS: modelopt.restore,
    schemes.MODELOPT_4BIT: modelopt.restore,
    schemes.MODELOPT_FP8_OF_EXPERTS: modelopt.restore_whole,
    schemes.COMFY_QUANT: comfy.restore_described,
    schemes.COMFY_FP8: comfy.restore_scaled,
    schemes.COMFY_MARKED: comfy.restore_marked,
    schemes.GPTQ: gptq.restore,
    schemes.AWQ: awq.restore,
    schemes.MXFP4: mxfp4.restore,
    schemes.MXFP4_ROWS: mxfp4.restore_rows,
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
    config = quantization_beside(component)
    return find_restored(checkpoint, DEQUANTIZERS, config, lambda tensors: find_linears(component, tensors).transposed)


def find_unasked(component: Component, checkpoint: Checkpoint) -> Found:
    """Give the same and ask nothing: all come as they lie in the file."""
    return find_restored(checkpoint, DEQUANTIZERS, quantization_beside(component))

"""Quantized weights as plain numbers again, and back: a module a scheme, and here which one reads or writes what."""

from __future__ import annotations

from collections.abc import Mapping

from converter.models.schemes import COMFY_FP8, COMFY_MARKED, COMFY_QUANT, FP8, FP8_OF_EXPERTS, LLM_INT8, Scheme
from converter.transforms.quantize import bnb_int8, comfy, fp8, fp8_writing
from converter.transforms.quantize.restore import Restore
from converter.transforms.quantize.write import Writer

DEQUANTIZERS: Mapping[Scheme, Restore] = {
    LLM_INT8: bnb_int8.restore,
    FP8: fp8.restore,
    FP8_OF_EXPERTS: fp8.restore,
    COMFY_QUANT: comfy.restore_described,
    COMFY_FP8: comfy.restore_scaled,
    COMFY_MARKED: comfy.restore_marked,
}
QUANTIZERS: Mapping[str, Writer] = {
    writer.name: writer for writer in (bnb_int8.INT8, fp8_writing.FP8_BLOCK, fp8_writing.FP8_SCALED)
}
FILE_QUANTIZERS: Mapping[str, Writer] = {fp8_writing.COMFY_FILE.name: fp8_writing.COMFY_FILE}
"""The schemes of single files, which no library but ComfyUI loads."""

"""Quantized weights as plain numbers again, and back: a module a scheme, and here which one reads or writes what."""

from __future__ import annotations

from collections.abc import Mapping

from converter.models.schemes import BNB_4BIT, FP8, FP8_OF_EXPERTS, LLM_INT8, Scheme
from converter.transforms.quantize import bnb_4bit, bnb_int8, fp8
from converter.transforms.quantize.restore import Restore
from converter.transforms.quantize.write import Writer

DEQUANTIZERS: Mapping[Scheme, Restore] = {
    LLM_INT8: bnb_int8.restore,
    BNB_4BIT: bnb_4bit.restore,
    FP8: fp8.restore,
    FP8_OF_EXPERTS: fp8.restore,
}
QUANTIZERS: Mapping[str, Writer] = {writer.name: writer for writer in (bnb_int8.INT8, bnb_4bit.NF4)}

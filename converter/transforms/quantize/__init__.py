"""Quantized weights as plain numbers again, and back: a module a scheme, and here which one reads what."""

from __future__ import annotations

from collections.abc import Mapping

from converter.libraries.modules import find_linears
from converter.models.checkpoint import Checkpoint
from converter.models.component import Component, quantization_of
from converter.models.schemes import (
    FP4,
    FP4_OF_DEEPSEEK,
    FP4_OF_EXPERTS,
    FP8,
    FP8_OF_EXPERTS,
    LLM_INT8,
    Scheme,
    quantized_in,
)
from converter.transforms.quantize import bnb_int8, fp8
from converter.transforms.quantize.restore import Found, Restore, find_restored

DEQUANTIZERS: Mapping[Scheme, Restore] = {
    LLM_INT8: bnb_int8.restore,
    **dict.fromkeys((FP8, FP8_OF_EXPERTS, FP4, FP4_OF_EXPERTS, FP4_OF_DEEPSEEK), fp8.restore),
}


def find_numbers(component: Component, checkpoint: Checkpoint) -> Found:
    """Give the numbers of all quantized weights of a component's checkpoint. Raises what ``find_restored`` does.

    Its library is asked which of them lie transposed, where any may: that starts a program for many classes.
    """
    may_be_turned = any(one.scheme.may_be_turned for one in quantized_in(checkpoint))
    transposed = find_linears(component, checkpoint.tensors).transposed if may_be_turned else ()
    return find_restored(checkpoint, DEQUANTIZERS, quantization_of(component.config), transposed)

"""Quantized weights as plain numbers again, and back: a module a scheme, and here which one reads what."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping

from converter.dtypes import DType, OnOverflow
from converter.models.checkpoint import Checkpoint
from converter.models.schemes import LLM_INT8, Scheme
from converter.transforms.quantize import bnb_int8

Dequantize = Callable[[Checkpoint, DType, Container[str], OnOverflow], Checkpoint]
"""Gives a checkpoint with plain numbers in a dtype, those of the modules that are named transposed."""

DEQUANTIZERS: Mapping[Scheme, Dequantize] = {LLM_INT8: bnb_int8.dequantized}

"""State dicts in one comparable form, as outside libraries see them and as wconv reads them.

A description is a dict from tensor name to (safetensors tag, shape, bytes), in file order. The outside judges never
use a function of the converter. What a model computes is held within a tolerance: how sums are rounded is for the
processor, the number of threads and the alignment of memory to say. Weights are held to the bit.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from converter.storage import Place
from converter.tensors.reader import RangeReader, read_chunks
from support.tiny import read_file

Description = dict[str, tuple[str, tuple[int, ...], bytes]]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def own_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor bit for bit into a contiguous storage of its own; not every dtype can do that by itself."""
    bits = tensor.detach().view(_BITS[tensor.itemsize])
    return bits.contiguous().clone().view(tensor.dtype)


def described_by_safetensors(state: Mapping[str, torch.Tensor]) -> Description:
    """Describe a state dict by what safetensors writes of it."""
    raw = safetensors.torch.save({name: own_copy(tensor) for name, tensor in state.items()})
    entries, data = split_safetensors(raw)
    return {name: describe_entry(entries[name], data) for name in state}


def described_by_torch(path: Path) -> Description:
    """Describe a file by what ``torch.load(weights_only=True)`` reads."""
    return described_by_safetensors(torch_load(path))


def described_by_wconv(path: Path | Place, buffer_nbytes: int = 4096) -> Description:
    """Describe a file by what wconv reads of it."""
    buffer = bytearray(buffer_nbytes)
    with RangeReader() as reader:
        return {
            info.name: (info.dtype.tag, info.shape, b"".join(map(bytes, read_chunks(info.source, reader, buffer))))
            for info in read_file(path).tensors
        }


def assert_close_outputs(found: torch.Tensor, expected: torch.Tensor, share: float = 1e-3) -> None:
    """Hold what a model gives against what another gives: within a share of the largest number."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    largest = expected.abs().max().item()
    assert 0 < largest < float("inf")
    off = (found.double() - expected.double()).abs().max().item()
    assert off <= share * largest, f"off by {off}, where the largest is {largest}"


def torch_load(path: Path) -> dict[str, torch.Tensor]:
    """Load a file as torch does by default, without its warnings about pickle protocols."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, weights_only=True, map_location="cpu")


class Listener(logging.Handler):
    """Notes what libraries log from WARNING on."""

    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def saved_by_torch(state: Any, **wishes: Any) -> bytes:
    """Give the file that ``torch.save`` writes."""
    buffer = io.BytesIO()
    torch.save(state, buffer, **wishes)
    return buffer.getvalue()


def split_safetensors(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """Split a safetensors file into the entries of its header, without metadata, and its data."""
    end = 8 + int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:end])
    entries.pop("__metadata__", None)
    return entries, raw[end:]


def describe_entry(entry: Mapping[str, Any], data: bytes) -> tuple[str, tuple[int, ...], bytes]:
    """Describe one entry of a safetensors header."""
    begin, end = entry["data_offsets"]
    return entry["dtype"], tuple(entry["shape"]), data[begin:end]

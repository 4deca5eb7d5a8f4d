"""GPTQ, AWQ and MXFP4: held bit for bit against what the libraries made of them, whole and in parts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.tiny import raw_bytes

from converter.models.checkpoint import open_checkpoint
from converter.storage import place_of
from converter.tensors.base import TensorSource
from converter.tensors.derived import cast
from converter.tensors.reader import RangeReader
from converter.transforms.quantize import DEQUANTIZERS
from converter.transforms.quantize.codes import steps_of
from converter.transforms.quantize.restore import Restored, find_restored

State = dict[str, torch.Tensor]
CORPUS = Path(__file__).parent / "corpus" / "quantized"
SAMPLES = sorted(
    path for name in ("gptq", "awq") for path in (CORPUS / name).glob("*.safetensors") if ".judge" not in path.name
)


def restored(path: Path, config: Mapping[str, Any], transposed: tuple[str, ...] = ()) -> Restored:
    [found] = find_restored(open_checkpoint(place_of(path)), DEQUANTIZERS, config, transposed).weights.values()
    return found


def read(source: TensorSource, begin: int = 0, end: int | None = None, chunk: int = 1 << 20) -> bytes:
    """Read some bytes as a task does: its part of the source, a chunk at a time."""
    end = source.dtype.nbytes(math.prod(source.shape)) if end is None else end
    part, out = source.part(begin, end), bytearray(end - begin)
    with RangeReader() as reader:
        for at in range(0, len(out), chunk):
            part.read(begin + at, memoryview(out)[at : at + chunk], reader)
    return bytes(out)


def check(found: Restored, expected: torch.Tensor) -> None:
    """Hold a weight against what it should be: at once, in odd chunks, and in parts that begin anywhere."""
    raw = raw_bytes(expected)
    assert found.dtype is not None
    source = cast_to(found)
    assert (source.dtype, source.shape) == (found.dtype, tuple(expected.shape))
    assert read(source) == raw
    size = source.dtype.itemsize
    assert read(source, chunk=size * 37) == raw
    for begin, end in ((0, size), (size * 101, len(raw)), (size * 33, size * 34), (size * 190, len(raw) - 3 * size)):
        assert read(source, begin, end, size * 50) == raw[begin:end]
    assert len(read(steps_of(found.source))) == 4 * expected.numel()


def cast_to(found: Restored) -> TensorSource:
    from converter.tensors.base import Tensor

    assert found.dtype is not None
    return cast(Tensor(found.name, found.source), found.dtype).source


def said_of(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return dict(json.loads(file.metadata()["quantization_config"])) if file.metadata() else {}


def judged(path: Path) -> torch.Tensor:
    return load_file(path.with_suffix(".judge.safetensors"))["m.weight"]


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: f"{path.parent.name} {path.stem}")
def test_numbers_are_those_of_the_library(path: Path) -> None:
    found = restored(path, said_of(path))
    assert (found.name, found.slack) == ("m.weight", None)
    check(found, judged(path))

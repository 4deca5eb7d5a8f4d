"""Odd and hostile weights to dequantize: refused by name, or read right, in whatever way they lie."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import raw_bytes, save, write_json

from converter.models.checkpoint import open_checkpoint
from converter.models.inventory import find_weight_set
from converter.tensors.base import TensorSource
from converter.tensors.reader import RangeReader
from converter.transforms.quantize import DEQUANTIZERS
from converter.transforms.quantize.restore import find_restored

F8 = torch.float8_e4m3fn
State = dict[str, torch.Tensor]


def restored(state: State, path: Path) -> TensorSource:
    """Give the numbers of the one weight of a file."""
    save(state, path)
    [found] = find_restored(open_checkpoint(find_weight_set(path)), DEQUANTIZERS, {}).weights.values()
    return found.source


def read(source: TensorSource, begin: int = 0, end: int | None = None) -> bytes:
    end = source.dtype.nbytes(math.prod(source.shape)) if end is None else end
    out = bytearray(end - begin)
    with RangeReader() as reader:
        source.read(begin, memoryview(out), reader)
    return bytes(out)


def blocks(seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (2, 8, 1, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def exponents(*shape: int) -> torch.Tensor:
    return torch.full(shape, 127, dtype=torch.uint8)


def eights(*shape: int) -> torch.Tensor:
    return torch.ones(shape).to(F8)


# Of two weights that would have one name, and of scales that are weights themselves.
MEETING = {
    "MXFP4 and float8": (
        {"m.w_blocks": blocks(), "m.w_scales": exponents(2, 8, 1), "m.w": eights(2, 8, 32),
         "m.w_scale_inv": torch.ones(2, 1, 1)},
        "both would be 'm.w'",
    ),
    "both MXFP4": (
        {"m.w_blocks": blocks(), "m.w_scales": exponents(2, 8, 1), "m.w.blocks": blocks(1),
         "m.w.scales": exponents(2, 8, 1).contiguous()},
        "both would be 'm.w'",
    ),
    "codes that scale": (
        {"m.weight": torch.zeros(4, 8, dtype=torch.uint8), "m.weight_scale": eights(4, 1),
         "m.weight_scale_2": torch.tensor(1.0), "m.weight_scale_scale_inv": torch.ones(1)},
        "'m.weight_scale' as a quantized weight, and as what scales another",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("state", "problem"), MEETING.values(), ids=MEETING)
def test_weights_that_meet_are_refused(wconv: Callable[..., Any], tmp_path: Path, state: State, problem: str) -> None:
    source = save(state, tmp_path / "model.safetensors")
    assert problem in wconv("dequantize", source, "-o", tmp_path / "out", exit_code=3).stderr


def test_what_is_not_understood_is_named_with_its_file(wconv: Callable[..., Any], tmp_path: Path) -> None:
    state = {"m.w_blocks": blocks(), "m.w_scales": exponents(2, 8, 1), "m.w": torch.ones(2, 3)}
    source = save(state, tmp_path / "model.safetensors")
    told = wconv("dequantize", source, "-o", tmp_path / "out", exit_code=4).stderr
    assert f"{source}: has m.w beside quantized weights" in told


def test_a_weight_may_have_no_axes(wconv: Callable[..., Any], tmp_path: Path) -> None:
    state = {"m.weight": torch.tensor(3.0).to(F8), "m.weight_scale_inv": torch.ones(1) / 2}
    wconv("dequantize", save(state, tmp_path / "model.safetensors"), "-o", tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")["m.weight"], torch.tensor(1.5, dtype=torch.bfloat16))
    state = {"m.weight": torch.tensor(3).to(torch.int8), "m.weight_scale": torch.ones(1),
             "m.weight_zero_point": torch.ones(1, dtype=torch.int8)}  # fmt: skip
    source = save(state, tmp_path / "other.safetensors")
    assert (
        "does not fit 'm.weight': that is []" in wconv("dequantize", source, "-o", tmp_path / "o", exit_code=3).stderr
    )


def test_words_that_lie_in_columns_are_read_from_any_place(tmp_path: Path) -> None:
    """As bytes they are less than an element, which is what is gathered."""
    words = torch.randint(-(2**31), 2**31, (5, 8), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    state = {"m.weight_packed": words, "m.weight_scale": torch.rand(5, 2), "m.weight_shape": torch.tensor([5, 64])}
    whole = read(restored(state, tmp_path / "model.safetensors"))
    source = restored({**state, "m.weight_packed": words.T.contiguous().T}, tmp_path / "pytorch_model.bin")
    assert read(source) == whole
    for begin, end in ((4, 20), (8, 12), (300, 308)):
        assert read(source, begin, end) == whole[begin:end]
        assert read(source.part(begin, end), begin, end) == whole[begin:end]


def test_integers_with_scales_are_known(wconv: Callable[..., Any], tmp_path: Path) -> None:
    """Quark packs 4-bit numbers so."""
    state = {"m.weight": torch.zeros(4, 8, dtype=torch.int32), "m.weight_scale": torch.ones(4, 2)}
    source = save(state, tmp_path / "model.safetensors")
    said = "'m.weight' goes with 'm.weight_scale'"
    assert said in wconv("dequantize", source, "-o", tmp_path / "out", exit_code=4).stderr
    assert said in wconv("recast", source, "--dtype", "bf16", exit_code=4).stderr


@pytest.mark.parametrize(
    ("weight", "scale"),
    [(eights(4, 8), torch.ones(1)), (torch.zeros(4, 16, dtype=torch.uint8), exponents(4, 1))],
    ids=["float8", "MXFP4"],
)
def test_what_quark_writes_has_the_names_of_others(
    wconv: Callable[..., Any], tmp_path: Path, weight: torch.Tensor, scale: torch.Tensor
) -> None:
    save({"m.weight": weight, "m.weight_scale": scale}, tmp_path / "m" / "model.safetensors")
    write_json(tmp_path / "m" / "config.json", {"quantization_config": {"quant_method": "quark"}})
    told = wconv("dequantize", tmp_path / "m", "-o", tmp_path / "out").stdout
    assert "config.json says" not in told
    written = load_file(tmp_path / "out" / "model.safetensors")["m.weight"]
    assert raw_bytes(written) == raw_bytes(torch.full_like(written, float(weight[0, 0])))

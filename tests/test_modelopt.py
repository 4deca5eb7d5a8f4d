"""ModelOpt's exports as plain numbers, held against what its own code makes of them.

The files are from ``scripts/samples_modelopt.py``, made with nvidia_modelopt 0.47.0.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import assert_same

CORPUS = Path(__file__).parent / "corpus" / "quantized" / "modelopt"
FORMS = ("nvfp4", "w4a8_nvfp4_fp8", "mxfp4", "mxfp8", "fp8", "fp8_pc_pt", "int8_wo")
Q_PROJ = "model.layers.0.self_attn.q_proj"


def plain_of(folder: Path, judged: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give what a model has that is not quantized, and the numbers of what is."""
    state = load_file(folder / "model.safetensors")
    return judged | {name: one for name, one in state.items() if "scale" not in name and name not in judged}


@pytest.mark.parametrize("name", FORMS)
def test_numbers_are_those_of_its_own_code(wconv: Callable[..., Any], tmp_path: Path, name: str) -> None:
    judged = load_file(CORPUS / f"{name}.judge.safetensors")
    for dtype, full in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        told = wconv("dequantize", CORPUS / name, "-o", tmp_path / dtype, "--dtype", dtype).stdout
        written = load_file(tmp_path / dtype / "model.safetensors")
        expected = plain_of(CORPUS / name, judged)
        assert_same(written, {key: one.to(full) for key, one in expected.items()})
        assert ("input_scale" in told) == (name in ("nvfp4", "fp8", "w4a8_nvfp4_fp8"))
    assert not (tmp_path / "bf16" / "hf_quant_config.json").exists()
    assert "quantization" not in (tmp_path / "bf16" / "config.json").read_text()
    wconv("verify", tmp_path / "fp32", CORPUS / name, "--quantized")


def test_experts_that_are_one_tensor_are_packed_along_the_middle(wconv: Callable[..., Any], tmp_path: Path) -> None:
    source, out = CORPUS / "experts.safetensors", tmp_path / "out.safetensors"
    wconv("dequantize", source, "-o", out, "--dtype", "fp32")
    bias = {name: one for name, one in load_file(source).items() if name.endswith("bias")}
    assert_same(load_file(out), load_file(CORPUS / "experts.judge.safetensors") | bias)


def test_all_codes_and_scales_are_those_of_the_formula(wconv: Callable[..., Any], tmp_path: Path) -> None:
    """Each byte with each scale in float8; to ModelOpt code 8 is no negative zero."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(126, 1)
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None].repeat(1, 32)
    second = torch.tensor(0.0123)
    save_file({"m.weight": codes, "m.weight_scale": scales, "m.weight_scale_2": second}, tmp_path / "m.safetensors")
    wconv("dequantize", tmp_path / "m.safetensors", "-o", tmp_path / "out.safetensors", "--dtype", "fp32")
    half = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    table = torch.tensor([*half, *(-one for one in half)])
    pairs = torch.stack((codes & 15, codes >> 4), dim=-1).reshape(126, 512).long()
    expected = table[pairs] * (scales.float() * second).repeat_interleave(16, dim=1)
    assert_same(load_file(tmp_path / "out.safetensors"), {"m.weight": expected})


def refused(wconv: Callable[..., Any], tmp_path: Path, state: dict[str, torch.Tensor], exit_code: int) -> str:
    """Give what is said of a file that is not dequantized."""
    save_file(state, tmp_path / "m.safetensors")
    out = tmp_path / "out.safetensors"
    told = wconv("dequantize", tmp_path / "m.safetensors", "-o", out, "--dtype", "bf16", exit_code=exit_code).stderr
    assert not out.exists()
    return str(told)


def test_inputs_that_have_to_be_scaled_are_refused(wconv: Callable[..., Any], tmp_path: Path) -> None:
    told = wconv("dequantize", CORPUS / "int8_sq", "-o", tmp_path / "out", "--dtype", "bf16", exit_code=4).stderr
    assert "multiplies the inputs of" in told
    assert "pre_quant_scale" in told
    assert not (tmp_path / "out").exists()


def bytes_of(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.uint8)


def scales_of(*shape: int, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    return torch.ones(shape).to(dtype)


ONE = torch.tensor(1.0)
ODD = {
    "whole numbers": ({"m.weight": bytes_of(2, 64), "m.weight_scale": scales_of(4, 1, dtype=torch.half)}, 4, "AWQ"),
    "no first scale": ({"m.weight": bytes_of(4, 8), "m.weight_scale_2": ONE}, 3, "has no 'm.weight_scale'"),
    "groups": ({"m.weight": bytes_of(4, 20), "m.weight_scale": scales_of(4, 3), "m.weight_scale_2": ONE}, 3, "fit"),
    "rows": ({"m.weight": bytes_of(4, 8), "m.weight_scale": scales_of(3, 1), "m.weight_scale_2": ONE}, 3, "fit"),
    "two wholes": ({"m.weight": bytes_of(4, 8), "m.weight_scale": scales_of(4, 1),
                    "m.weight_scale_2": torch.ones(2)}, 3, "not one F32"),
    "infinite": ({"m.weight": bytes_of(4, 8), "m.weight_scale": scales_of(4, 1),
                  "m.weight_scale_2": ONE / 0}, 3, "no finite number, in 'm.weight_scale_2'"),
    "exponent 255": ({"m.weight": bytes_of(4, 16), "m.weight_scale": 255 * bytes_of(4, 1)}, 3, "no finite number"),
}  # fmt: skip


@pytest.mark.parametrize(("state", "exit_code", "said"), ODD.values(), ids=ODD)
def test_what_does_not_fit_is_refused_by_name(
    wconv: Callable[..., Any], tmp_path: Path, state: Any, exit_code: int, said: str
) -> None:
    assert said in refused(wconv, tmp_path, state, exit_code)


def test_a_zero_scale_gives_zeros(wconv: Callable[..., Any], tmp_path: Path) -> None:
    state = load_file(CORPUS / "nvfp4" / "model.safetensors")
    shutil.copytree(CORPUS / "nvfp4", tmp_path / "m")
    state[f"{Q_PROJ}.weight_scale_2"] *= 0
    save_file(state, tmp_path / "m" / "model.safetensors")
    wconv("dequantize", tmp_path / "m", "-o", tmp_path / "out", "--dtype", "bf16")
    assert not load_file(tmp_path / "out" / "model.safetensors")[f"{Q_PROJ}.weight"].any()

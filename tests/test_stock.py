"""inspect of quantized weights: the schemes, bits a weight, and counts of numbers rather than of packed words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.tiny import State, save, write_json

F8 = torch.float8_e4m3fn
PLAIN = {"norm.weight": torch.ones(8, dtype=torch.bfloat16), "lm_head.weight": torch.ones(4, 8, dtype=torch.bfloat16)}


def fp8(name: str, *shape: int) -> State:
    grid = [-(-side // 128) for side in shape]
    return {f"{name}.weight": torch.ones(shape).to(F8), f"{name}.weight_scale_inv": torch.ones(grid)}


def int8(name: str, *shape: int) -> State:
    return {
        f"{name}.weight": torch.ones(shape, dtype=torch.int8),
        f"{name}.SCB": torch.ones(shape[0]),
        f"{name}.weight_format": torch.zeros((), dtype=torch.uint8),
    }


def described(wconv: Callable[..., Any], path: Path, exit_code: int = 0) -> Any:
    (one,) = json.loads(wconv("inspect", path, "--json", exit_code=exit_code).stdout)["weight_sets"]
    return one


def test_schemes_bits_and_what_is_plain(wconv: Callable[..., Any], tmp_path: Path) -> None:
    path = save({**PLAIN, **fp8("a", 200, 136), **fp8("b", 4, 8), **int8("c", 16, 32)}, tmp_path / "m.safetensors")
    found = described(wconv, path)
    assert found["quantized"] == [
        {
            "scheme": "float8 with scales", "weights": 2, "parameters": 27_232, "nbytes": 27_232 + 20,
            "bits_per_weight": 8.0059,
        },
        {
            "scheme": "LLM.int8 of bitsandbytes", "weights": 1, "parameters": 512, "nbytes": 512 + 64 + 1,
            "bits_per_weight": 9.0156,
        },
    ]  # fmt: skip
    assert found["plain"] == {
        "tensors": 2, "parameters": 40, "nbytes": 80, "dtypes": {"BF16": 2}, "names": ["lm_head.weight", "norm.weight"],
    }  # fmt: skip
    assert (found["parameters"], found["tensors"]) == (27_232 + 512 + 40, 9)
    shown = wconv("inspect", path).stdout
    assert "2 weights, 27.23 k parameters in 8.006 bits a weight, 27.25 kB: float8 with scales" in shown
    assert "plain: 2 tensors, 40 parameters, 80 B (BF16): lm_head.weight, norm.weight" in shown


def test_packed_words_are_not_what_is_counted(wconv: Callable[..., Any], tmp_path: Path) -> None:
    int4 = {
        "a.weight_packed": torch.zeros(16, 8, dtype=torch.int32),
        "a.weight_scale": torch.ones(16, 2, dtype=torch.bfloat16),
        "a.weight_shape": torch.tensor([16, 64]),
    }
    found = described(wconv, save({**PLAIN, **int4}, tmp_path / "m.safetensors"))
    assert found["parameters"] == 16 * 64 + 40
    (share,) = found["quantized"]
    assert (share["weights"], share["parameters"]) == (1, 16 * 64)
    assert share["bits_per_weight"] == 4 + 16 / 32 + 8 * 16 / (16 * 64)  # codes, scales, and what the shape takes


def test_nothing_is_said_of_plain_weights(wconv: Callable[..., Any], tmp_path: Path) -> None:
    found = described(wconv, save(PLAIN, tmp_path / "m.safetensors"))
    assert (found["quantized"], found["parameters"]) == ([], 40)
    assert "plain" not in found


def test_what_does_not_fit_is_noted_and_not_counted(wconv: Callable[..., Any], tmp_path: Path) -> None:
    bad = {**PLAIN, **fp8("a", 4, 8), "a.weight_scale_inv": torch.ones(3, 2)}
    path = save(bad, tmp_path / "m.safetensors")
    found = described(wconv, path)
    assert (found["parameters"], found["quantized"][0]["bits_per_weight"]) == (None, None)
    assert "'a.weight_scale_inv' that does not fit" in found["notes"][0]
    assert "quantized: 1 weights, 56 B: float8 with scales" in wconv("inspect", path).stdout


def test_the_parts_of_a_pipeline_are_named(wconv: Callable[..., Any], tmp_path: Path) -> None:
    write_json(tmp_path / "model_index.json", {"_class_name": "P", "unet": ["diffusers", "U"]})
    write_json(tmp_path / "unet" / "config.json", {"_class_name": "U"})
    save({**PLAIN, **fp8("a", 4, 8)}, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    shown = wconv("inspect", tmp_path).stdout
    assert "quantized of unet: 1 weights" in shown
    assert "plain of unet: 2 tensors" in shown

"""What people read about quantized models: healthy ones are called healthy, and each refusal says what serves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import State, save, write_json

F8 = torch.float8_e4m3fn
FP8_CONFIG = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


def fp8(names: list[str]) -> State:
    weights = {f"{name}.weight": torch.ones(4, 8).to(F8) for name in names}
    return {**weights, **{f"{name}.weight_scale_inv": torch.ones(1, 1) for name in names}}


def save_shards(parts: list[State], folder: Path, count: str) -> Path:
    """Write shards and their index, as DeepSeek and Moonshot name theirs: with a count of six digits."""
    names = [f"model-{number:05d}-of-{count}.safetensors" for number in range(1, len(parts) + 1)]
    for name, state in zip(names, parts, strict=True):
        save(state, folder / name)
    where = {tensor: name for name, state in zip(names, parts, strict=True) for tensor in state}
    nbytes = sum(one.nbytes for state in parts for one in state.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": nbytes}, "weight_map": where})
    write_json(folder / "config.json", FP8_CONFIG)
    return folder


@pytest.mark.parametrize("is_indexed", [True, False])
def test_a_count_of_six_digits_is_no_old_spelling(wconv: Callable[..., Any], tmp_path: Path, is_indexed: bool) -> None:
    folder = save_shards([fp8(["a"]), fp8(["b"])], tmp_path / "in", "000002")
    if not is_indexed:
        (folder / "model.safetensors.index.json").unlink()
        told = wconv("doctor", folder, exit_code=1).stdout
        assert "name-legacy" not in told
        wconv("doctor", folder, "--fix")
    assert "Healthy" in wconv("doctor", folder).stdout
    index = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))
    assert set(index["weight_map"].values()) == {path.name for path in folder.glob("*.safetensors")}
    wconv("dequantize", folder, "-o", tmp_path / "out")
    assert "Healthy" in wconv("doctor", tmp_path / "out").stdout

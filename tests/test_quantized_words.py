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


def whole(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.arange(4 * 8).reshape(4, 8)[: shape[0], : shape[1]].contiguous().to(dtype)


# What libraries write that wconv does not read, for a linear module ``m``; what configs call it, and who loads it.
UNREAD: dict[str, tuple[State, dict[str, Any], str]] = {
    "exl2": ({"m.q_weight": whole(4, 8), "m.q_scale": whole(1, 1), "m.q_scale_max": torch.ones(1).half(),
              "m.q_groups": whole(1, 2, dtype=torch.int16), "m.q_invperm": whole(1, 8, dtype=torch.int16)},
             {"quant_method": "exl2"}, "ExLlamaV2"),
    "exl3": ({"m.trellis": whole(4, 8, dtype=torch.int16), "m.suh": torch.ones(8).half()},
             {"quant_method": "exl3"}, "ExLlamaV3"),
    "marlin": ({"m.B": whole(4, 8), "m.s": torch.ones(1, 8).half()},
               {"quant_method": "gptq", "is_marlin_format": True}, "vLLM"),
    "aqlm": ({"m.codes": whole(4, 8, dtype=torch.int16), "m.codebooks": torch.ones(1, 4).half(),
              "m.scales": torch.ones(4, 1).half()}, {"quant_method": "aqlm"}, "aqlm"),
    "eetq": ({"m.weight": whole(4, 8, dtype=torch.int8), "m.weight_scales": torch.ones(8).half()},
             {"quant_method": "eetq"}, "eetq"),
    "mlx": ({"m.weight": whole(4, 8).to(torch.uint32), "m.scales": torch.ones(4, 1), "m.biases": torch.ones(4, 1)},
            {"group_size": 64, "bits": 4}, "mlx_lm.convert --dequantize"),
}  # fmt: skip
# And those of which no more is known than that a config names another library.
OTHERS: dict[str, State] = {
    "bitnet": {"m.weight": whole(4, 8, dtype=torch.uint8), "m.weight_scale": torch.ones(1)},
    "vptq": {"m.indices": whole(4, 8, dtype=torch.int16), "m.centroids.weight": torch.ones(1, 8).half()},
    "auto-round": {
        "up_proj.qweight": whole(2, 8),
        "up_proj.qzeros": whole(1, 1),
        "up_proj.scales": torch.ones(1, 8).half(),
    },
    "some": {"m.weight": whole(4, 8, dtype=torch.int8)},
}


def save_folder(state: State, said: dict[str, Any] | None, folder: Path) -> Path:
    save({**state, "norm.weight": torch.ones(8)}, folder / "model.safetensors")
    said = {"quantization_config": said} if said else {}
    write_json(folder / "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **said})
    return folder


@pytest.mark.parametrize(("state", "said", "reader"), UNREAD.values(), ids=UNREAD)
def test_forms_that_are_not_read_are_named_and_healthy(
    wconv: Callable[..., Any], tmp_path: Path, state: State, said: dict[str, Any], reader: str
) -> None:
    folder = save_folder(state, said, tmp_path / "in")
    assert "Healthy" in wconv("doctor", folder).stdout
    told = wconv("dequantize", folder, "-o", tmp_path / "out", exit_code=4).stderr
    assert "take the model it was made from" in told
    assert reader in told
    assert "quantized: 1 weights" in wconv("inspect", folder).stdout


@pytest.mark.parametrize("method", OTHERS)
def test_what_another_library_calls_its_own_is_no_damage(
    wconv: Callable[..., Any], tmp_path: Path, method: str
) -> None:
    folder = save_folder(OTHERS[method], {"quant_method": method}, tmp_path / "in")
    assert "Healthy" in wconv("doctor", folder).stdout
    told = wconv("dequantize", folder, "-o", tmp_path / "out", exit_code=4).stderr
    assert method in told

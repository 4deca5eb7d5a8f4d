"""Quantized folders in recast, reshard, to-safetensors, to-bin, rename-variant, prepare-coreml: moved, never cast."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import State, assert_same, save, write_json

from converter.dtypes import BY_TORCH_NAME
from converter.models.schemes import find_owners, find_quantized

F8 = torch.float8_e4m3fn
CONFIG = {"model_type": "llama", "torch_dtype": "bfloat16", "quantization_config": {"quant_method": "fp8"}}


def codes(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


# What the libraries write for modules whose scales sort far from their weights, by dtype and by name.
MODULES: dict[str, State] = {
    "fp8": {"m.weight": codes(16, 32, dtype=torch.float32).to(F8), "m.weight_scale_inv": torch.ones(1, 1)},
    "int8": {"m.weight": codes(16, 32, dtype=torch.int8), "m.SCB": torch.ones(16),
             "m.weight_format": torch.zeros((), dtype=torch.uint8)},
    "nf4": {"m.weight": codes(256, 1), "m.weight.absmax": torch.ones(8), "m.weight.quant_map": torch.ones(16),
            "m.weight.quant_state.bitsandbytes__nf4": codes(80)},
    "mxfp4": {"m.down_proj_blocks": codes(2, 16, 1, 16), "m.down_proj_scales": codes(2, 16, 1)},
    "ct": {"m.weight_packed": codes(16, 4, dtype=torch.int32), "m.weight_scale": torch.ones(16, 1),
           "m.weight_shape": torch.tensor([16, 32])},
    "gptq": {"m.qweight": codes(4, 16, dtype=torch.int32), "m.qzeros": codes(1, 2, dtype=torch.int32),
             "m.scales": torch.ones(1, 16).half(), "m.g_idx": codes(32, dtype=torch.int32)},
}  # fmt: skip
PLAIN = {"norm.weight": torch.ones(8, dtype=torch.bfloat16), "m.bias": torch.ones(16, dtype=torch.bfloat16),
         "m.down_proj_bias": torch.ones(2, 16, dtype=torch.bfloat16)}  # fmt: skip


def two_of(state: State) -> State:
    return {f"{layer}.{name}": one.clone() for layer in "ab" for name, one in state.items()}


@pytest.fixture(params=MODULES)
def folder(request: Any, tmp_path: Path) -> tuple[Path, State]:
    state = {**two_of(MODULES[request.param]), **two_of(PLAIN)}
    save(state, tmp_path / "in" / "model.safetensors")
    write_json(tmp_path / "in" / "config.json", CONFIG)
    return tmp_path / "in", state


def test_shards_keep_scales_and_weights_together(
    wconv: Callable[..., Any], tmp_path: Path, folder: tuple[Path, State]
) -> None:
    source, state = folder
    wconv("reshard", source, "--max-shard-size", "64B", "-o", tmp_path / "out")
    shards = [load_file(path) for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert len(shards) > 4
    assert_same({name: one for shard in shards for name, one in shard.items()}, state)
    for shard in shards:
        found = find_quantized({name: BY_TORCH_NAME[str(one.dtype)[6:]] for name, one in shard.items()})
        dtypes = {str(one.dtype) for one in shard.values()}
        assert bool(found) or dtypes == {"torch.bfloat16"}
    assert json.loads((tmp_path / "out" / "config.json").read_text("utf-8")) == CONFIG
    wconv("verify", source, tmp_path / "out")


def test_every_byte_stays_in_any_format(wconv: Callable[..., Any], tmp_path: Path, folder: tuple[Path, State]) -> None:
    source, state = folder
    wconv("to-bin", source, "-o", tmp_path / "bin")
    assert_same(torch.load(tmp_path / "bin" / "pytorch_model.bin", weights_only=True), state)
    wconv("to-safetensors", tmp_path / "bin", "-o", tmp_path / "back")
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), state)
    for out in ("bin", "back"):
        assert json.loads((tmp_path / out / "config.json").read_text("utf-8")) == CONFIG
    wconv("rename-variant", source, "--from", "none", "--to", "q")
    assert_same(load_file(source / "model.q.safetensors"), state)


def test_recast_is_refused_or_leaves_it(wconv: Callable[..., Any], tmp_path: Path, folder: tuple[Path, State]) -> None:
    source, state = folder
    told = wconv("recast", source, "--dtype", "fp16", "-o", tmp_path / "out", exit_code=4).stderr
    assert "is quantized" in told
    wconv("recast", source, "--dtype", "fp16", "-o", tmp_path / "out", "--force")
    written = load_file(tmp_path / "out" / "model.safetensors")
    plain = two_of(PLAIN)
    assert_same({name: written[name] for name in state if name not in plain}, {
        name: one for name, one in state.items() if name not in plain
    })  # fmt: skip
    assert {written[name].dtype for name in plain} == {torch.float16}
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert config["quantization_config"] == CONFIG["quantization_config"]
    assert "float16" in (config.get("torch_dtype"), config.get("dtype"))


def test_a_tied_weight_keeps_its_scale(wconv: Callable[..., Any], tmp_path: Path) -> None:
    weight = codes(16, 32, dtype=torch.float32).to(F8)
    scale = torch.ones(1, 1)
    state = {"a.weight": weight, "a.weight_scale_inv": scale, "b.weight": weight, "b.weight_scale_inv": scale}
    save(state, tmp_path / "in" / "pytorch_model.bin")
    wconv("to-safetensors", tmp_path / "in", "--max-shard-size", "64B", "-o", tmp_path / "out")
    wconv("verify", tmp_path / "in", tmp_path / "out")


def test_each_companion_has_one_owner_and_a_bias_has_none() -> None:
    dtypes = {
        name: BY_TORCH_NAME[str(one.dtype)[6:]]
        for state in (*MODULES.values(), PLAIN)
        for name, one in ((f"{len(state)}{next(iter(state))}.{name}", one) for name, one in state.items())
    }
    found = find_quantized(dtypes)
    weights = {one.weight for one in found}
    owners = find_owners(found, dtypes)
    assert owners.keys() == {n for n in dtypes if n not in weights and not n.endswith(("bias", "norm.weight"))}


def test_core_ml_takes_no_quantized_part(wconv: Callable[..., Any], tmp_path: Path) -> None:
    source = save({**MODULES["fp8"], **PLAIN}, tmp_path / "m.safetensors")
    told = wconv("prepare-coreml", source, "-o", tmp_path / "out", exit_code=4).stderr
    assert "which Core ML does not take" in told
    assert "'wconv dequantize'" in told


def test_core_ml_takes_no_folder_with_a_quantized_part(
    builders: Any, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    model = builders.MODELS["sd"]()
    builders.write_tokenizer(tmp_path / "in" / "tokenizer")
    builders.save_safetensors(model, tmp_path / "in")
    path = tmp_path / "in" / "unet" / "diffusion_pytorch_model.safetensors"
    save({**load_file(path), **MODULES["fp8"]}, path)
    told = wconv("prepare-coreml", tmp_path / "in", "-o", tmp_path / "out", exit_code=4).stderr
    assert "which Core ML does not take" in told
    assert "'wconv dequantize'" in told
    assert "--force" not in told

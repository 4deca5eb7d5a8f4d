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
    shown = wconv("inspect", folder).stdout
    assert "quantized: " in shown or f"config.json says that it is quantized ('{method}')" in shown


@pytest.mark.parametrize(("scheme", "said"), [
    ("int4", "nf4"), ("w4a16-awq", "llm-compressor"), ("Q4_K_M", "llama.cpp"), ("mxfp4", "MXFP4"),
    ("NVFP4", "ModelOpt"), ("fp8", "fp8-scaled, for vLLM"), ("gptq", "GPTQModel"), ("mlx", "mlx_lm.convert"),
])  # fmt: skip
def test_of_a_scheme_that_is_not_written_it_is_said_what_serves(
    wconv: Callable[..., Any], tmp_path: Path, scheme: str, said: str
) -> None:
    told = wconv("quantize", tmp_path, "-o", tmp_path / "out", "--scheme", scheme, exit_code=2).stderr
    assert "'int8', 'nf4', 'fp8-block', 'fp8-scaled'" in told
    assert said in told.partition("'fp8-scaled'")[2]


def test_what_to_quantize_instead_is_said(wconv: Callable[..., Any], tmp_path: Path) -> None:
    folder = save_shards([fp8(["a"]), fp8(["b"]), fp8(["c"])], tmp_path / "in", "00003")
    told = wconv("quantize", folder, "-o", tmp_path / "out", exit_code=4).stderr
    assert "or what 'wconv dequantize' makes of it" in told
    file = save({"a.weight": torch.ones(4, 8)}, tmp_path / "a.safetensors")
    for out in ("out", "out.safetensors"):
        told = wconv("quantize", file, "-o", tmp_path / out, "--scheme", "nf4", exit_code=2).stderr
        assert "is one file, and not a model's folder" in told
        assert "--scheme fp8-scaled makes one for ComfyUI" in told
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    told = wconv("dequantize", tmp_path / "a.gguf", "-o", tmp_path / "out", exit_code=4).stderr
    assert told.endswith("Take the safetensors model that it was made from.\n")


@pytest.mark.parametrize("is_indexed", [True, False])
def test_how_many_shards_are_missing_is_said(wconv: Callable[..., Any], tmp_path: Path, is_indexed: bool) -> None:
    folder = save_shards([fp8([name]) for name in "abcd"], tmp_path / "in", "00004")
    (folder / "model-00002-of-00004.safetensors").unlink()
    (folder / "model-00004-of-00004.safetensors").unlink()
    if not is_indexed:
        (folder / "model.safetensors.index.json").unlink()
    told = wconv("dequantize", folder, "-o", tmp_path / "out", exit_code=3).stderr
    assert "model-00002-of-00004.safetensors" in told
    assert ("and 1 more of its 4 are not" if is_indexed else "nor others") in told


def test_code_in_the_folder_is_said_to_be_run_by_trust(wconv: Callable[..., Any], tmp_path: Path) -> None:
    folder = save_shards([fp8(["a"]), fp8(["b"])], tmp_path / "in", "00002")
    write_json(folder / "config.json", {**FP8_CONFIG, "auto_map": {"AutoModel": "mine.Mine"}})
    told = wconv("dequantize", folder, "-o", tmp_path / "out").stdout
    assert "# or from_pretrained with trust_remote_code=True, which runs the code" in told
    told = wconv("dequantize", folder / "model.safetensors.index.json", "-o", tmp_path / "new").stdout
    assert "trust_remote_code" not in told


def test_many_modules_are_told_in_few_lines(wconv: Callable[..., Any], tmp_path: Path) -> None:
    leaves = ("q_proj", "k_proj", "o_proj")
    state = {f"model.layers.{layer}.self_attn.{leaf}.weight": torch.ones(128, 128 - 64 * (leaf == "k_proj"))
             for layer in range(40) for leaf in leaves}  # fmt: skip
    folder = save_folder(state, None, tmp_path / "in")
    told = wconv("quantize", folder, "-o", tmp_path / "out", "--scheme", "fp8-block", "--dry-run").stdout
    assert "model.layers.*.self_attn.q_proj (40)" in told
    assert "as 128 does not divide their sides: model.layers.*.self_attn.k_proj (40)" in told
    assert len(told.splitlines()) < 20
    assert max(map(len, told.splitlines())) < 250
    told = wconv("quantize", folder, "-o", tmp_path / "out", "--scheme", "fp8-block", "--dry-run", "-v").stdout
    assert "model.layers.39.self_attn.o_proj  " in told
    wconv("quantize", folder, "-o", tmp_path / "out", "--scheme", "fp8-block")
    told = wconv("recast", tmp_path / "out", "--dtype", "bf16", "--force", "-o", tmp_path / "cast", "--dry-run").stdout
    assert "Kept in fp8_e4m3fn in model.safetensors: 80 (model.layers.*.self_attn.o_proj.weight (40)" in told


def test_a_file_for_comfyui_says_where_it_goes(wconv: Callable[..., Any], tmp_path: Path) -> None:
    file = save({"double_blocks.0.img_mlp.0.weight": torch.ones(64, 64)}, tmp_path / "a.safetensors")
    told = wconv("quantize", file, "-o", tmp_path / "b.safetensors", "--scheme", "fp8-scaled").stdout
    assert "models/diffusion_models" in told
    assert not told.endswith("\n\n")


def test_plain_float8_is_cast(wconv: Callable[..., Any], tmp_path: Path) -> None:
    file = save({"a.weight": torch.ones(4, 8).to(F8), "b": torch.ones(2).to(F8)}, tmp_path / "a.safetensors")
    told = wconv("dequantize", file, "-o", tmp_path / "b.safetensors", exit_code=4).stderr
    assert "holds float8 without scales, which are plain numbers, such as 'a.weight'" in told
    assert "'wconv recast --dtype bf16' casts them." in told
    wconv("recast", file, "--dtype", "bf16", "--variant", "none", "-o", tmp_path / "out")
    told = wconv("verify", file, tmp_path / "out", "--cast").stdout
    assert told == "The same: 2 tensors, 34 B, in another dtype, with no value changed.\n"


def test_what_is_dequantized_exactly_is_no_list_of_zeros(wconv: Callable[..., Any], tmp_path: Path) -> None:
    folder = save_shards([fp8(["a"]), fp8(["b"])], tmp_path / "in", "00002")
    wconv("dequantize", folder, "-o", tmp_path / "out")
    told = wconv("verify", folder, tmp_path / "out", "--quantized").stdout
    assert told == "The same: 2 tensors, 128 B, the numbers of A (float8 with scales), exactly.\n"

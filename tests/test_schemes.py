"""Quantized weights are known by their companions, whatever a config says; nothing that goes with them is cast."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from support.tiny import assert_same, save, snapshot, write_json

from converter.dtypes import BY_TORCH_NAME, DTYPES
from converter.errors import Unsupported
from converter.models.checkpoint import open_checkpoint
from converter.models.schemes import TABLE, find_quantized
from converter.transforms.quantize import DEQUANTIZERS

F8 = torch.float8_e4m3fn


def packed(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.arange(4 * 8).reshape(4, 8)[: shape[0], : shape[1]].contiguous().to(dtype)


def eight(dtype: torch.dtype = F8) -> torch.Tensor:
    return packed(4, 8, dtype=torch.float32).to(dtype)


def scale(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, 1 / 3, dtype=torch.float32).to(dtype)


def text(content: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(content.encode()), dtype=torch.uint8)


NF4_STATE = '{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [4, 8]}'
NF4_MAP = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
# What the libraries write for a linear module ``m`` (names, dtypes and numbers of axes), and what it is called.
FORMS = {
    "fp8 block": ("float8", {"m.weight": eight(), "m.weight_scale_inv": scale(1, 1)}),
    "fp8 tensor": ("float8", {"m.weight": eight(), "m.weight_scale": scale(1), "m.input_scale": scale(1)}),
    "fp8 experts": ("float8", {"m.gate_up_proj": eight(), "m.gate_up_proj_scale_inv": scale(1, 1)}),
    "fp8 of V4": ("float8 with scales", {"m.weight": eight(), "m.scale": scale(1, 1).to(torch.float8_e8m0fnu)}),
    "ComfyUI": ("ComfyUI", {"m.weight": eight(), "m.scale_weight": scale(), "m.scale_input": scale(),
                            "scaled_fp8": torch.zeros(0).to(F8)}),
    "ComfyUI, marked": ("ComfyUI", {"m.weight": eight(), "scaled_fp8": torch.zeros(2).to(F8)}),
    "comfy_quant": ("comfy_quant", {"m.weight": eight(), "m.weight_scale": scale(),
                                    "m.comfy_quant": text('{"format": "float8_e4m3fn"}')}),
    "LLM.int8": ("LLM.int8", {"m.weight": eight(torch.int8), "m.SCB": scale(4),
                              "m.weight_format": torch.zeros((), dtype=torch.uint8)}),
    "GPTQ": ("GPTQ", {"m.qweight": packed(1, 8), "m.qzeros": packed(1, 1), "m.scales": scale(1, 8, dtype=torch.half),
                      "m.g_idx": torch.zeros(8, dtype=torch.int32)}),
    "AWQ": ("AWQ", {"m.qweight": packed(4, 1), "m.qzeros": packed(1, 1), "m.scales": scale(1, 8, dtype=torch.half)}),
    "ct int4": ("compressed-tensors", {"m.weight_packed": packed(4, 1), "m.weight_scale": scale(4, 1),
                                       "m.weight_shape": torch.tensor([4, 8])}),
    "ct nvfp4": ("compressed-tensors", {"m.weight_packed": packed(4, 8, dtype=torch.uint8),
                                        "m.weight_scale": scale(4, 1).to(F8), "m.weight_global_scale": scale(1)}),
    "nvfp4": ("NVFP4", {"m.weight": packed(4, 8, dtype=torch.uint8), "m.weight_scale": scale(4, 1).to(F8),
                        "m.weight_scale_2": scale(), "m.input_scale": scale()}),
    "ct int8": ("8-bit numbers", {"m.weight": eight(torch.int8), "m.weight_scale": scale(4, 1)}),
    "mxfp4": ("MXFP4", {"m.down_proj_blocks": packed(4, 8, dtype=torch.uint8).reshape(1, 2, 1, 16),
                        "m.down_proj_scales": packed(2, 1, dtype=torch.uint8).reshape(1, 2, 1)}),
    "nf4": ("4 bits", {"m.weight": packed(4, 4, dtype=torch.uint8).reshape(-1, 1), "m.weight.absmax": scale(1),
                       "m.weight.quant_map": NF4_MAP,
                       "m.weight.quant_state.bitsandbytes__nf4": text(NF4_STATE)}),
    "nf4 in bf16": ("4 bits", {"m.weight": scale(8, 1, dtype=torch.bfloat16), "m.weight.absmax": scale(1),
                               "m.weight.quant_map": NF4_MAP,
                               "m.weight.quant_state.bitsandbytes__nf4": text(NF4_STATE)}),
    "MLX": ("MLX", {"m.weight": packed(4, 1).to(torch.uint32), "m.scales": scale(4, 1, dtype=torch.half),
                    "m.biases": scale(4, 1, dtype=torch.half)}),
}  # fmt: skip
PLAIN = {"norm.weight": scale(8), "n.weight": scale(4, 8), "n.bias": scale(4), "m.bias": scale(4)}
# Of honest float models, and of what a plain cast to float8 makes of them.
HONEST = {
    "layer scale": {"m.weight": scale(4, 8), "m.layer_scale": scale(8), "ls1.scale": scale(8), "norm.scale": scale(8)},
    "logit_scale": {"logit_scale": scale(), "visual.weight": scale(4, 8), "position_ids": packed(1, 8)},
    "cast": {"m.weight": eight(), "m.scale": scale(8).to(F8), "norm.scale": scale(8), "logit_scale": scale()},
    "integers": {"m.weight": scale(4, 8), "m.index": packed(4, 8), "m.mask": packed(4, 8, dtype=torch.uint8),
                 "m.logit_scale": scale(4), "scales": scale(3), "other.scaled_fp8_factor": scale(1)},
    "batch norm": {"bn.weight": scale(8), "bn.running_var": scale(8), "bn.num_batches_tracked": torch.tensor(3)},
}  # fmt: skip


def is_refused(state: dict[str, torch.Tensor]) -> bool:
    """Say whether nothing makes plain numbers of it."""
    dtypes = {name: BY_TORCH_NAME[str(one.dtype).removeprefix("torch.")] for name, one in state.items()}
    return any(one.scheme not in DEQUANTIZERS for one in find_quantized(dtypes))


@pytest.mark.parametrize(("said", "state"), FORMS.values(), ids=FORMS)
def test_what_is_quantized_is_known_without_a_config(
    wconv: Callable[..., Any], tmp_path: Path, said: Any, state: Any
) -> None:
    source = save({**PLAIN, **state}, tmp_path / "m.safetensors")
    way = "does not dequantize them yet" if is_refused(state) else "'wconv dequantize' writes it"
    before = snapshot(tmp_path)
    for command in (("recast", "--dtype", "bf16"), ("to-safetensors", "--dtype", "fp16", "-o", tmp_path / "out")):
        told = wconv(command[0], source, *command[1:], exit_code=4).stderr
        assert "is quantized" in told
        assert said in told
        assert way in told
    assert snapshot(tmp_path) == before
    wconv("recast", source, "--dtype", "bf16", "--force")
    written = load_file(tmp_path / "m.bf16.safetensors")
    assert_same({name: written[name] for name in state}, state)
    assert_same({name: written[name] for name in PLAIN}, {name: one.bfloat16() for name, one in PLAIN.items()})


def test_what_is_said_to_be_dequantized_is() -> None:
    assert {scheme for scheme in TABLE if scheme.is_dequantized} == DEQUANTIZERS.keys()


@pytest.mark.parametrize("name", ["GPTQ", "nf4 in bf16"])
def test_copies_are_made_as_ever(wconv: Callable[..., Any], tmp_path: Path, name: str) -> None:
    state = {**PLAIN, **FORMS[name][1]}
    save(state, tmp_path / "in" / "pytorch_model.bin")
    wconv("to-safetensors", tmp_path / "in", "-o", tmp_path / "out")
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), state)
    wconv("reshard", tmp_path / "out", "--max-shard-size", "0.2KB", "-o", tmp_path / "shards")
    wconv("verify", tmp_path / "in", tmp_path / "shards")


@pytest.mark.parametrize("state", HONEST.values(), ids=HONEST)
def test_scales_of_float_models_are_weights(wconv: Callable[..., Any], tmp_path: Path, state: Any) -> None:
    source = save(state, tmp_path / "m.safetensors")
    assert not find_quantized({info.name: info.dtype for info in open_checkpoint(source).tensors})
    wconv("recast", source, "--dtype", "bf16")
    written = load_file(tmp_path / "m.bf16.safetensors")
    assert {one.dtype for name, one in written.items() if state[name].dtype == torch.float32} == {torch.bfloat16}
    assert "quantized" not in wconv("doctor", tmp_path, exit_code=None).stdout


def test_a_real_model_has_no_companions(builders: Any) -> None:
    for make in (builders.make_clip, builders.make_unet, builders.make_t5, builders.make_vae):
        dtypes = {name: DTYPES["F8_E4M3" if one.ndim > 1 else "F32"] for name, one in make().state_dict().items()}
        assert not find_quantized(dtypes)


@pytest.mark.parametrize("name", ["fp8 block", "ComfyUI", "GPTQ", "nf4", "MLX"])
def test_quantize_and_dequantize_say_what_it_is(wconv: Callable[..., Any], tmp_path: Path, name: str) -> None:
    said, state = FORMS[name]
    save({**PLAIN, **state}, tmp_path / "m" / "model.safetensors")
    write_json(tmp_path / "m" / "config.json", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    out = ("-o", tmp_path / "out")
    told = wconv("quantize", tmp_path / "m", *out, exit_code=4).stderr
    assert "is quantized already" in told
    assert said in told
    if is_refused(state):
        told = wconv("dequantize", tmp_path / "m", *out, "--dtype", "bf16", exit_code=4).stderr
        assert "is quantized in a form that wconv does not dequantize" in told
        assert said in told
        assert "recast" not in told


def test_dequantize_does_not_send_back_to_recast(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(PLAIN, tmp_path / "m" / "model.safetensors")
    write_json(tmp_path / "m" / "config.json", {"quantization_config": {"quant_method": "other"}})
    told = wconv("dequantize", tmp_path / "m", "-o", tmp_path / "out", "--dtype", "bf16", exit_code=4).stderr
    assert "recast" not in told
    write_json(tmp_path / "m" / "config.json", {})
    told = wconv("dequantize", tmp_path / "m", "-o", tmp_path / "out", "--dtype", "bf16", exit_code=4).stderr
    assert "'wconv recast' casts weights that are not quantized" in told
    wconv("recast", tmp_path / "m", "--dtype", "bf16")


def test_core_ml_takes_no_scaled_weights(wconv: Callable[..., Any], tmp_path: Path) -> None:
    source = save({**PLAIN, **FORMS["ComfyUI"][1]}, tmp_path / "m.safetensors")
    told = wconv("prepare-coreml", source, "-o", tmp_path / "out", exit_code=Unsupported.exit_code).stderr
    assert re.search(r"ComfyUI.*Core ML", told)


@pytest.mark.parametrize(("said", "state"), FORMS.values(), ids=FORMS)
def test_the_doctor_finds_them(wconv: Callable[..., Any], tmp_path: Path, said: Any, state: Any) -> None:
    save({**PLAIN, **state}, tmp_path / "model.safetensors")

    def codes() -> dict[str, str]:
        found = json.loads(wconv("doctor", tmp_path, "--json", exit_code=None).stdout)["findings"]
        # The numbers above are such as no library writes.
        return {one["code"]: one["problem"] for one in found if one["code"] != "scales-misfit"}

    assert said in codes()["quantized"]
    assert codes().keys() == {"quantized"}
    write_json(tmp_path / "config.json", {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"})
    assert codes().keys() == {"quantized-unsaid"}
    write_json(tmp_path / "config.json", {"architectures": ["X"], "quantization_config": {}})
    assert codes().keys() == {"quantized"}


def test_a_real_4_bit_model(wconv: Callable[..., Any], tmp_path: Path) -> None:
    """bitsandbytes packs on the CPU too, and its own names are what is looked for."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 32, bias=False, quant_type="nf4").to("cpu")
    state = {f"m.{name}": one for name, one in layer.state_dict().items()}
    assert len(state) > 2
    source = save(state, Path(tmp_path / "m.safetensors"))
    assert "4 bits of bitsandbytes" in wconv("recast", source, "--dtype", "bf16", exit_code=4).stderr

"""``wconv quantize``, ``wconv dequantize`` and ``wconv verify --quantized``: what they print, write and refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import left_behind, names_in, save, snapshot, write_json

LEAVES = ("q_proj", "k_proj")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Give a folder with a few tensors of a Llama."""
    state = {f"layers.0.self_attn.{leaf}.weight": torch.randn(4, 100) for leaf in LEAVES}
    state["embed_tokens.weight"] = torch.randn(8, 4)
    save(state, tmp_path / "model" / "model.safetensors")
    write_json(tmp_path / "model" / "config.json", {"architectures": ["LlamaModel"], "model_type": "llama"})
    return tmp_path / "model"


def test_quantize(wconv: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    shown = wconv("quantize", model, "-o", tmp_path / "out").stdout
    assert "The model: 2 modules in 8 bits, 3.20 kB before and 834 B after." in shown
    assert "Its config.json lists as left alone: lm_head." in shown
    assert f"LlamaModel.from_pretrained('{tmp_path / 'out'}', device_map=\"auto\")" in shown
    assert "Do not call .to() on it" in shown
    assert "GPU" not in shown
    assert names_in(tmp_path / "out") == ["config.json", "model.safetensors"]
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(tensor.dtype) for name, tensor in state.items() if "q_proj" in name} == {
        "torch.int8", "torch.float32", "torch.uint8"
    }  # fmt: skip


def test_a_class_of_the_table_needs_no_torch(model: Path, tmp_path: Path) -> None:
    command = (sys.executable, "-X", "importtime", "-m", "converter", "quantize", model, "-o", tmp_path / "out")
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in listed.splitlines()}
    assert "numkong" in imported
    assert not imported & {"torch", "transformers", "diffusers", "bitsandbytes"}


def test_a_dry_run_lists_modules_and_writes_nothing(wconv: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    shown = wconv("quantize", model, "-o", tmp_path / "out", "--dry-run").stdout
    assert "layers.0.self_attn.k_proj  1.60 kB  417 B" in shown
    assert "Would write into" in shown
    assert "within 0.4 %" in shown
    assert snapshot(tmp_path) == before


def test_json(wconv: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    for extra in ([], ["--dry-run"]):
        printed = json.loads(wconv("quantize", model, "-o", tmp_path / f"out{len(extra)}", "--json", *extra).stdout)
        [part] = printed["quantized"]
        assert part["modules"][0] == {
            "name": "layers.0.self_attn.k_proj", "nbytes_before": 1600, "nbytes_after": 417
        }  # fmt: skip
        assert part["skip_modules"] == ["lm_head"]


def test_quiet_is_quiet(wconv: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    done = wconv("quantize", model, "-o", tmp_path / "out", "-q")
    assert (done.stdout, done.stderr) == ("", "")


def test_there_and_back(wconv: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    wconv("quantize", model, "-o", tmp_path / "out", "--dtype", "bf16", "--verify")
    shown = wconv("verify", model, tmp_path / "out", "--quantized").stdout
    assert "The same within half a step of the codes in B: 3 tensors" in shown
    assert "mean rel error" in shown
    printed = json.loads(wconv("verify", model, tmp_path / "out", "--quantized", "--json").stdout)
    assert {one["name"] for one in printed["quantized"]} == {f"layers.0.self_attn.{leaf}.weight" for leaf in LEAVES}
    wconv("dequantize", tmp_path / "out", "-o", tmp_path / "back", "--dtype", "fp32", "--verify")
    config = json.loads((tmp_path / "back" / "config.json").read_text("utf-8"))
    assert "quantization_config" not in config
    assert {str(tensor.dtype) for tensor in load_file(tmp_path / "back" / "model.safetensors").values()} == {
        "torch.float32"
    }
    assert left_behind(tmp_path) == []


def test_what_differs_ends_with_1(wconv: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    wconv("quantize", model, "-o", tmp_path / "out")
    state = load_file(model / "model.safetensors")
    save({name: tensor * 1.1 for name, tensor in state.items()}, model / "model.safetensors")
    shown = wconv("verify", model, tmp_path / "out", "--quantized", exit_code=1).stdout
    assert "values are off by more than half a step" in shown


def test_a_pipeline_needs_a_gpu_to_load(wconv: Callable[..., Any], tmp_path: Path) -> None:
    source = tmp_path / "pipeline"
    write_json(
        source / "model_index.json", {"_class_name": "P", "transformer": ["diffusers", "SanaTransformer2DModel"]}
    )
    save({"proj_out.weight": torch.randn(4, 4)}, source / "transformer" / "diffusion_pytorch_model.safetensors")
    write_json(source / "transformer" / "config.json", {"_class_name": "SanaTransformer2DModel"})
    save({"a": torch.randn(4)}, source / "vae" / "diffusion_pytorch_model.safetensors")
    write_json(source / "vae" / "config.json", {"_class_name": "AutoencoderDC"})
    shown = wconv("quantize", source, "-o", tmp_path / "out").stdout
    assert "transformer: 1 modules in 8 bits" in shown
    assert 'torch_dtype=torch.float16, device_map="balanced")' in shown
    assert "Diffusers loads what bitsandbytes has quantized on a machine with a GPU only." in shown


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["model", "-o", "out", "--strict"], 6, "float16 cannot hold, in layers.0.self_attn.q_proj. Without --strict"),
        (["model", "-o", "out", "--dtype", "fp8_e4m3fn"], 2, "is none of fp32, bf16, fp16"),
        (["model"], 2, "Missing option"),
        (["model", "-o", "model"], 2, "is the source itself. Name a new folder"),
        (["model", "-o", "out", "--component", "unet"], 2, "has no component 'unet'"),
        (["missing", "-o", "out"], 3, "does not exist"),
        (["quantized", "-o", "out"], 4, "is quantized already"),
        (["a.gguf", "-o", "out"], 4, "is a GGUF file"),
        (["unknown", "-o", "out"], 4, "has no model of that name. Name the linear modules with --include"),
        (["model", "-o", "quantized"], 5, "exists"),
    ],
)
def test_refusals(
    wconv: Callable[..., Any],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    said: str,
) -> None:
    state = load_file(model / "model.safetensors")
    state["layers.0.self_attn.q_proj.weight"][1, 1] = 1e6
    save(state, model / "model.safetensors")
    for name, config in (
        ("quantized", {"architectures": ["LlamaModel"], "quantization_config": {"load_in_8bit": True}}),
        ("unknown", {"architectures": ["NoSuchModel"], "model_type": "none"}),
    ):
        save(state, tmp_path / name / "model.safetensors")
        write_json(tmp_path / name / "config.json", config)
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    done = wconv("quantize", *arguments, exit_code=code)
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1 or code == 2
    assert snapshot(tmp_path) == before


def test_dequantize_refuses_what_has_no_int8(wconv: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    done = wconv("dequantize", model, "-o", tmp_path / "out", "--dtype", "fp16", exit_code=4)
    assert "holds no quantized weights" in done.stderr
    assert not (tmp_path / "out").exists()

"""Quantized models whose class has more, or other, modules than their files tell: each finds all of its tensors."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("asked_here")

SIDES = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 64,
    "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_local_experts": 2, "num_experts_per_tok": 1,
}  # fmt: skip
VISION = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 16, "patch_size": 8}  # fmt: skip


def make_model(name: str) -> Any:
    """Make a tiny model whose every number is random."""
    import transformers as tf

    makers: dict[str, Callable[[], Any]] = {
        "siglip": lambda: tf.SiglipVisionModel(tf.SiglipVisionConfig(**VISION)),
        "granite": lambda: tf.GraniteMoeForCausalLM(tf.GraniteMoeConfig(**SIDES)),
        "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SIDES)),
        "llama4": lambda: tf.Llama4ForCausalLM(tf.Llama4TextConfig(**SIDES, intermediate_size_mlp=128)),
        "llava": lambda: tf.LlavaForConditionalGeneration(
            tf.LlavaConfig(
                vision_config={"model_type": "siglip_vision_model", **VISION},
                text_config={"model_type": "llama", **SIDES},
            )
        ),
    }
    torch.manual_seed(0)
    model = makers[name]().bfloat16().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape) / 8)
    return model


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers keep float8 in blocks, as it does where there is a GPU."""
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *args, **kwargs: None)


def loaded(cls: Any, folder: Path, **options: Any) -> Any:
    """Load a folder; every tensor in it has its place, and every place a tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, told = cls.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(told.values()), told
    return model


def skipped_in(folder: Path) -> Any:
    said = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    return next(said[key] for key in ("ignore", "llm_int8_skip_modules", "modules_to_not_convert") if key in said)


def in_float8(folder: Path) -> set[str]:
    state = load_file(folder / "model.safetensors")
    return {name.removesuffix(".weight") for name, one in state.items() if one.dtype == torch.float8_e4m3fn}


def test_a_child_of_linear_is_linear_for_compressed_tensors(wconv: Callable[..., Any], tmp_path: Path) -> None:
    """It would look for the scale of an attention of torch, which nothing here quantizes."""
    pytest.importorskip("compressed_tensors")
    model = make_model("siglip")
    model.save_pretrained(tmp_path / "in")
    wconv("quantize", tmp_path / "in", "-o", tmp_path / "out", "--scheme", "fp8-scaled")
    assert "head.attention.out_proj" in skipped_in(tmp_path / "out")
    assert "head.mlp.fc1" in in_float8(tmp_path / "out")
    loaded(type(model), tmp_path / "out")


@pytest.mark.usefixtures("as_on_a_gpu")
def test_experts_that_a_file_has_by_another_name_are_left_alone(wconv: Callable[..., Any], tmp_path: Path) -> None:
    """transformers makes float8 of any module that is called experts."""
    model = make_model("granite")
    model.save_pretrained(tmp_path / "in")
    wconv("quantize", tmp_path / "in", "-o", tmp_path / "out", "--scheme", "fp8-block")
    assert "model.layers.0.block_sparse_moe.experts" in skipped_in(tmp_path / "out")
    assert len(in_float8(tmp_path / "out")) == 4
    loaded(type(model), tmp_path / "out")


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("skip", ["nothing", "experts"])
def test_experts_are_quantized_under_the_name_in_the_file(wconv: Callable[..., Any], tmp_path: Path, skip: str) -> None:
    model = make_model("mixtral")
    model.save_pretrained(tmp_path / "in")
    wconv("quantize", tmp_path / "in", "-o", tmp_path / "out", "--scheme", "fp8-block", "--skip", skip)
    assert len(in_float8(tmp_path / "out")) == (10 if skip == "nothing" else 4)
    ours = loaded(type(model), tmp_path / "out")
    experts = ours.model.layers[0].mlp.experts
    assert experts.down_proj.dtype == (torch.float8_e4m3fn if skip == "nothing" else torch.bfloat16)


@pytest.mark.parametrize("scheme", ["int8", "nf4", "fp8-scaled"])
def test_experts_that_the_loader_has_one_by_one_are_refused(
    wconv: Callable[..., Any], tmp_path: Path, scheme: str
) -> None:
    """Of a quantized Llama 4 transformers makes a module for each expert, and finds no tensor for it."""
    make_model("llama4").save_pretrained(tmp_path / "in")
    run = ("quantize", tmp_path / "in", "-o", tmp_path / "out", "--scheme")
    told = wconv(*run, scheme, exit_code=4).stderr
    assert "feed_forward.experts', of which" in told
    assert "fp8-block is for it" in told


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("scheme", ["int8", "fp8-block", "fp8-scaled"])
def test_a_file_may_have_other_names_than_the_class(wconv: Callable[..., Any], tmp_path: Path, scheme: str) -> None:
    """As transformers 5 writes models that can see."""
    model = make_model("llava")
    model.save_pretrained(tmp_path / "in")
    file = load_file(tmp_path / "in" / "model.safetensors")
    assert "language_model.model.layers.0.mlp.up_proj.weight" in file
    run = ("quantize", tmp_path / "in", "-o", tmp_path / "out", "--scheme", scheme, "--skip", "vision_tower")
    wconv(*run)
    names = set(load_file(tmp_path / "out" / "model.safetensors")) - set(file)
    modules = {name.rpartition(".")[0] for name in names}
    assert len(modules) == 9
    assert all(name.startswith(("language_model.model.layers", "multi_modal_projector")) for name in modules)
    assert any(entry.startswith("model.vision_tower") for entry in skipped_in(tmp_path / "out"))
    assert any(entry.startswith("vision_tower") for entry in skipped_in(tmp_path / "out"))
    loaded(type(model), tmp_path / "out", **({"device_map": "cpu"} if scheme == "int8" else {}))
    wconv("verify", tmp_path / "in", tmp_path / "out", "--quantized")

"""Single files that are quantized for ComfyUI: which of their matrices, and which files it would load wrongly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import save

QUANTIZED = (
    "double_blocks.0.img_attn.qkv", "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q",
    "blocks.0.self_attn.q", "layers.0.feed_forward.w1", "encoder.block.0.layer.1.DenseReluDense.wo",
    "text_model.encoder.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj", "blocks.0.explored",
)  # fmt: skip
LEFT = (
    "double_blocks.0.img_mod.lin", "joint_blocks.0.x_block.adaLN_modulation.1", "final_layer.linear", "img_in",
    "first_stage_model.encoder.mid.attn_1.q", "double_stream_blocks.0.block.ff_i.gate", "layers.0.mlp.router",
    "decoder.mid_block.attentions.0.to_q", "encoder.down.0.block.0.attn.q", "decoder.up_blocks.0.attentions.0.to_q",
    "diffusion_model.blocks.0.self_attn.q.lora_A", "transformer_blocks.0.attn.to_q.lora_B.default",
    "layers.0.x.lokr_w1.y",
)  # fmt: skip


def test_what_is_linear_by_its_name(wconv: Callable[..., Any], tmp_path: Path) -> None:
    """What chooses experts is no Linear in ComfyUI; LoRAs and VAEs are loaded without scales."""
    state = {f"{name}.weight": torch.ones(4, 8) for name in (*QUANTIZED, *LEFT)}
    out = tmp_path / "out.safetensors"
    wconv("quantize", save(state, tmp_path / "m.safetensors"), "-o", out, "--scheme", "fp8-scaled")
    written = load_file(out)
    found = {name.removesuffix(".weight") for name, one in written.items() if one.dtype == torch.float8_e4m3fn}
    assert found == set(QUANTIZED)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("x_embedder.weight", "transformer_blocks.0.attn.to_q.weight"), "names of Diffusers"),
        (("transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.proj.weight"), "names of Diffusers"),
        (("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"), "names of Diffusers"),
        (("controlnet_blocks.0.weight", "double_blocks.0.img_attn.qkv.weight"), "is a ControlNet"),
    ],
)
def test_what_comfyui_would_load_without_scales_is_refused(
    wconv: Callable[..., Any], tmp_path: Path, names: tuple[str, ...], said: str
) -> None:
    source = save({name: torch.ones(4, 8) for name in (*names, "blocks.0.q.weight")}, tmp_path / "m.safetensors")
    for more in ((), ("--include", "blocks")):
        run = ("quantize", source, "-o", tmp_path / "out.safetensors", "--scheme", "fp8-scaled", *more)
        assert said in wconv(*run, exit_code=4).stderr


def test_names_that_are_comfyuis_own_too(wconv: Callable[..., Any], tmp_path: Path) -> None:
    """Qwen-Image and LTX have in ComfyUI the names that they have in Diffusers."""
    names = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_q_proj", "img_in")
    source = save({f"{name}.weight": torch.ones(4, 8) for name in names}, tmp_path / "m.safetensors")
    wconv("quantize", source, "-o", tmp_path / "out.safetensors", "--scheme", "fp8-scaled")
    assert len(load_file(tmp_path / "out.safetensors")) == 7


def test_blocks_of_nearly_nothing_are_zeros(wconv: Callable[..., Any], tmp_path: Path) -> None:
    """transformers has a scale of 0 for them, and NaN for each zero."""
    from support.tiny import write_json

    weight = torch.full((128, 256), 1e-38)
    weight[:, 128:], weight[3] = 1, 0
    save({"model.layers.0.mlp.up_proj.weight": weight}, tmp_path / "in" / "model.safetensors")
    write_json(tmp_path / "in" / "config.json", {"architectures": ["LlamaModel"], "model_type": "llama"})
    wconv("quantize", tmp_path / "in", "-o", tmp_path / "out", "--scheme", "fp8-block")
    written = load_file(tmp_path / "out" / "model.safetensors")
    codes = written["model.layers.0.mlp.up_proj.weight"].float()
    assert not codes[:, :128].any()
    assert codes[:, 128:].eq(448 * (torch.arange(128) != 3)[:, None]).all()
    assert written["model.layers.0.mlp.up_proj.weight_scale_inv"].tolist() == [[1, torch.tensor(1 / 448).item()]]

"""Make tiny models as ModelOpt exports them, each with what its own code makes of the weights.

    PYTHONPATH=WHEEL PYTHON scripts/samples_modelopt.py tests/corpus/quantized/modelopt

WHEEL is nvidia_modelopt 0.47.0 unpacked; PYTHON has torch, transformers, omegaconf, pulp and nvidia-ml-py. Each form
has a folder NAME, and beside it NAME.judge.safetensors in float32. Experts that are one tensor are quantized by the
functions that its export calls for them.
"""

from __future__ import annotations

import argparse
import copy
import shutil
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.export.quant_utils import maybe_transpose_expert_weight_dimensions
from modelopt.torch.quantization.qtensor import MXFP4QTensor, MXFP8QTensor, NVFP4QTensor
from modelopt.torch.quantization.qtensor.fp8_tensor import FP8QTensor
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

State = dict[str, torch.Tensor]

FORMS = {
    "nvfp4": "NVFP4_DEFAULT_CFG",
    "w4a8_nvfp4_fp8": "W4A8_NVFP4_FP8_CFG",
    "mxfp4": "MXFP4_DEFAULT_CFG",
    "mxfp8": "MXFP8_DEFAULT_CFG",
    "fp8": "FP8_DEFAULT_CFG",
    "fp8_pc_pt": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "int8_wo": "INT8_WEIGHT_ONLY_CFG",
    "int8_sq": "INT8_SMOOTHQUANT_CFG",
}


def llama() -> LlamaForCausalLM:
    """Make a model whose weights have zeros in them, and rows of very different sizes."""
    config = LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight *= torch.linspace(0, 3, module.weight.shape[0])[:, None].to(module.weight.dtype)
    return model


def dequantize(weight: torch.Tensor, scale: torch.Tensor, second: torch.Tensor | None) -> torch.Tensor:
    """Give the numbers of a weight in float32, by the class of its form."""
    full = torch.float32
    shape = torch.Size((*weight.shape[:-1], weight.shape[-1] * (2 if weight.dtype is torch.uint8 else 1)))
    sizes = {-1: shape[-1] // scale.shape[-1]} if scale.ndim == weight.ndim else {}
    made: Any
    if second is not None:
        made = NVFP4QTensor(shape, full, weight)
        return made.dequantize(full, scale=scale, double_scale=second, block_sizes=sizes)
    if weight.dtype is torch.uint8:
        made = MXFP4QTensor(shape, full, weight)
        return made.dequantize(full, scale=scale, block_sizes=sizes)
    if scale.dtype is torch.uint8:
        return MXFP8QTensor(shape, full, weight).dequantize(full, scale=scale)
    return FP8QTensor(shape, full, weight).dequantize(full, scale=scale[:, None] if scale.ndim else scale)


def judge(state: State) -> State:
    bases = [name.removesuffix(".weight") for name in state if f"{name}_scale" in state]
    return {
        f"{base}.weight": dequantize(
            state[f"{base}.weight"], state[f"{base}.weight_scale"], state.get(f"{base}.weight_scale_2")
        )
        for base in bases
    }


def experts() -> tuple[State, State]:
    """Quantize one tensor of experts, [E, in, out], as ``_export_quantized_weight`` does."""
    weight = torch.randn(2, 64, 48, dtype=torch.bfloat16)
    turned, _ = maybe_transpose_expert_weight_dimensions(weight)
    made, scale, second = NVFP4QTensor.quantize(turned.clone(), 16)
    packed, turned_scale = maybe_transpose_expert_weight_dimensions(made._quantized_data, scale)
    base = "mlp.experts.gate_up_proj"
    state = {base: packed, f"{base}_weight_scale": turned_scale, f"{base}_weight_scale_2": second.squeeze(),
             f"{base}_input_scale": torch.ones(()), f"{base}_bias": torch.ones(2, 48)}  # fmt: skip
    numbers = made.dequantize(torch.float32, scale=scale, double_scale=second, block_sizes={-1: 16})
    return state, {base: numbers.transpose(1, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    out = parser.parse_args().out
    inputs = torch.arange(16).reshape(1, -1)
    for name, form in FORMS.items():
        torch.manual_seed(0)
        shutil.rmtree(out / name, ignore_errors=True)
        model = mtq.quantize(llama(), copy.deepcopy(getattr(mtq, form)), lambda one: one(inputs))
        export_hf_checkpoint(model, export_dir=out / name)
        (out / name / "generation_config.json").unlink()
        if name == "int8_sq":
            continue  # its weights are none without the inputs' scales
        judged = judge(load_file(out / name / "model.safetensors"))
        save_file({key: one.contiguous() for key, one in judged.items()}, out / f"{name}.judge.safetensors")
    torch.manual_seed(0)
    for state, file in zip(experts(), ("experts", "experts.judge"), strict=True):
        save_file({key: one.contiguous() for key, one in state.items()}, out / f"{file}.safetensors")


if __name__ == "__main__":
    main()

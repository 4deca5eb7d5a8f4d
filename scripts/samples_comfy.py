"""Make small files as ComfyUI has them, each with what its own code makes of the weights.

    PYTHONPATH=WHEELS:COMFYUI .venv/bin/python scripts/samples_comfy.py tests/corpus/quantized/comfy

WHEELS is a folder with comfy_kitchen 0.2.40 and convert_to_quant 1.3.4 unpacked, COMFYUI one with ComfyUI 0.3.64, which
loads the older form as such. NAME.safetensors gets NAME.judge.safetensors beside it, in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

State = dict[str, torch.Tensor]


def numbers(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Make a matrix whose columns are of different sizes, the first of zeros."""
    return (torch.randn(rows, columns) * torch.linspace(0, 3, columns)).to(dtype)


def described(**said: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def kitchen() -> tuple[State, State]:
    """Quantize with the layouts that ComfyUI loads: one module each, in ``comfy_kitchen.tensor``."""
    import comfy_kitchen
    from comfy_kitchen import tensor as layouts

    fp8, int8 = layouts.TensorCoreFP8Layout, layouts.TensorWiseINT8Layout
    cases: list[tuple[str, Any, torch.Tensor, dict[str, Any]]] = [
        ("float8_e4m3fn", fp8, numbers(6, 10), {}),
        ("float8_e5m2", fp8, numbers(6, 10), {"dtype": torch.float8_e5m2}),
        ("mxfp8", layouts.TensorCoreMXFP8Layout, numbers(160, 32), {}),
        ("mxfp8", layouts.TensorCoreMXFP8Layout, numbers(3, 160), {}),
        ("nvfp4", layouts.TensorCoreNVFP4Layout, numbers(144, 80), {}),
        ("nvfp4", layouts.TensorCoreNVFP4Layout, numbers(128, 64), {}),
        ("int8_tensorwise", int8, numbers(6, 10), {}),
        ("int8_tensorwise", int8, numbers(6, 10), {"per_channel": True}),
    ]
    state: State = {}
    judged: State = {}
    with comfy_kitchen.use_backend("eager"):
        for index, (name, layout, weight, options) in enumerate(cases):
            codes, params = layout.quantize(weight, **options)
            made = layout.state_dict_tensors(codes, params)
            state |= {f"{index}.weight{end}": value.contiguous() for end, value in made.items()}
            state[f"{index}.comfy_quant"] = described(format=name)
            params = dataclasses.replace(params, orig_dtype=torch.float32)
            judged[f"{index}.weight"] = layout.dequantize(codes, params).contiguous()
    return state, judged


def rotated() -> tuple[State, State]:
    """Quantize rows that are turned before, with what the library makes of them in its float32 products."""
    import comfy_kitchen
    from comfy_kitchen.tensor import TensorWiseINT8Layout

    state: State = {}
    judged: State = {}
    with comfy_kitchen.use_backend("eager"):
        for group, columns in ((4, 12), (64, 128), (256, 512)):
            turned = {"convrot": True, "convrot_groupsize": group}
            codes, params = TensorWiseINT8Layout.quantize(numbers(3, columns), per_channel=True, **turned)
            state |= {f"{group}.weight": codes, f"{group}.weight_scale": params.scale}
            state[f"{group}.comfy_quant"] = described(format="int8_tensorwise", **turned)
            params = dataclasses.replace(params, orig_dtype=torch.float32)
            judged[f"{group}.weight"] = TensorWiseINT8Layout.dequantize(codes, params)
    return state, judged


def converter() -> tuple[State, State]:
    """Quantize as convert_to_quant does in formats of its own, which a node of ComfyUI loads."""
    from convert_to_quant.comfy.quant_ops import LAYOUTS

    cases: list[tuple[str, str, dict[str, Any]]] = [
        ("float8_e4m3fn_rowwise", "RowWiseFP8Layout", {}),
        ("float8_e4m3fn_blockwise", "BlockWiseFP8Layout", {"block_size": 16}),
        ("int8_blockwise", "BlockWiseINT8Layout", {"block_size": 16, "is_weight": True}),
    ]
    state: State = {}
    judged: State = {}
    for name, layout, options in cases:
        codes, params = LAYOUTS[layout].quantize(numbers(32, 48), **options)
        group = {"group_size": 16} if options else {}
        state |= {f"{name}.weight": codes, f"{name}.weight_scale": params["scale"], f"{name}.bias": torch.randn(32)}
        state[f"{name}.comfy_quant"] = described(format=name, **group)
        judged[f"{name}.weight"] = LAYOUTS[layout].dequantize(codes, **{**params, "orig_dtype": torch.float32})
    return state, judged


def scaled(dtype: torch.dtype) -> tuple[State, State]:
    """Lay out a file with ``scaled_fp8``, of which ComfyUI's own modules make plain weights: one has no scale."""
    sys.argv[1:] = ["--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    from comfy import ops

    linear = ops.scaled_fp8_ops(override_dtype=dtype).Linear
    state: State = {"scaled_fp8": torch.zeros(2, dtype=dtype), "norm.weight": torch.randn(6).bfloat16()}
    judged: State = {}
    for name in ("0", "1", "2"):
        weight = numbers(6, 10)
        scale = weight.abs().max() / torch.finfo(dtype).max
        state[f"{name}.weight"] = (weight / scale).to(dtype)
        if name != "2":
            state |= {f"{name}.scale_weight": scale.reshape(int(name) * (1,)), f"{name}.scale_input": torch.ones(())}
        module = linear(10, 6, bias=False)
        module.load_state_dict({key[2:]: one for key, one in state.items() if key.startswith(f"{name}.")}, strict=False)
        judged[f"{name}.weight"] = module.convert_weight(module.weight.float()).detach()
    return state, judged


def plain() -> tuple[State, State]:
    """Lay out a file in full, of which ComfyUI's own layout quantizes the Linears of blocks, in float32."""
    import comfy_kitchen
    from comfy_kitchen.tensor import TensorCoreFP8Layout

    state: State = {
        "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": numbers(30, 20, torch.bfloat16),
        "model.diffusion_model.single_blocks.3.linear1.weight": numbers(12, 300),
    }
    judged: State = {}
    with comfy_kitchen.use_backend("eager"):
        for name, weight in state.items():
            codes, params = TensorCoreFP8Layout.quantize(weight.float())
            judged |= {name: codes, f"{name}_scale": params.scale}
            judged[f"{name.removesuffix('.weight')}.comfy_quant"] = described(format="float8_e4m3fn")
    kept = {
        "double_blocks.0.img_attn.qkv.bias": torch.randn(30),
        "double_blocks.0.img_attn.norm.query_norm.scale": torch.randn(4),
        "double_blocks.0.img_mod.lin.weight": numbers(8, 4),
        "img_in.weight": numbers(8, 4, torch.bfloat16),
        "final_layer.linear.weight": numbers(3, 4),
        "input_blocks.0.0.weight": torch.randn(2, 2, 3, 3),
    }
    kept = {f"model.diffusion_model.{name}": one for name, one in kept.items()}
    kept["cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"] = numbers(4, 4)
    return state | kept, judged | kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    out = parser.parse_args().out
    made = {
        "comfy_quant": kitchen,
        "convrot": rotated,
        "convert_to_quant": converter,
        "plain": plain,
        "scaled_fp8_e4m3fn": lambda: scaled(torch.float8_e4m3fn),
        "scaled_fp8_e5m2": lambda: scaled(torch.float8_e5m2),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, make in made.items():
        torch.manual_seed(0)
        state, judged = make()
        save_file(state, out / f"{name}.safetensors")
        save_file({key: value.contiguous() for key, value in judged.items()}, out / f"{name}.judge.safetensors")


if __name__ == "__main__":
    main()

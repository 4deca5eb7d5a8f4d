"""Convert a prepared pipeline to Core ML as Apple's script does; run by the Python of .venv-coreml, which has its pins.

python coreml_packages.py FOLDER OUT: writes an .mlpackage a part, and prints as JSON, by part, which of its weights lie
in the package byte for byte, and which do not.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file

SMALL = 64  # coremltools writes what has fewer elements elsewhere


class Part(torch.nn.Module):
    """A model that gives one tensor."""

    def __init__(self, *modules: Any) -> None:
        super().__init__()
        self.stages = torch.nn.ModuleList(modules)

    def forward(self, *inputs: Any) -> Any:
        for stage in self.stages:
            made = stage(*inputs)
            inputs = (made if torch.is_tensor(made) else made[0],)
        return inputs[0]


def convert(module: Any, inputs: Any, path: Any) -> Any:
    """Trace a module and write its package; give the bytes of its weights."""
    with torch.no_grad():
        traced = torch.jit.trace(module.float().eval(), tuple(inputs.values()), strict=False, check_trace=False)
    types = [
        ct.TensorType(name=name, shape=tensor.shape, dtype=np.float32 if tensor.is_floating_point() else np.int32)
        for name, tensor in inputs.items()
    ]
    package = ct.convert(
        traced,
        inputs=types,
        convert_to="mlprogram",
        compute_precision=ct.precision.FLOAT16,
        minimum_deployment_target=ct.target.macOS13,
        skip_model_load=True,
    )
    package.save(str(path))
    return next(path.rglob("weight.bin")).read_bytes()


def main() -> None:
    """Convert three parts, and look for their weights in the packages."""
    warnings.simplefilter("ignore")
    folder, out = map(Path, sys.argv[1:])
    pipeline = DiffusionPipeline.from_pretrained(
        folder, torch_dtype=torch.float16, variant="fp16", use_safetensors=True
    )
    for model in (pipeline.unet, pipeline.vae):
        model.set_attn_processor(AttnProcessor())
    side, length = pipeline.unet.config.sample_size, pipeline.text_encoder.config.max_position_embeddings
    context = torch.randn(2, length, pipeline.unet.config.cross_attention_dim)
    parts = {
        "text_encoder": (Part(pipeline.text_encoder), {"input_ids": torch.ones(1, length, dtype=torch.int32)}),
        "unet": (
            Part(pipeline.unet),
            {"sample": torch.randn(2, 4, side, side), "timestep": torch.ones(2), "encoder_hidden_states": context},
        ),
        "vae": (Part(pipeline.vae.post_quant_conv, pipeline.vae.decoder), {"z": torch.randn(1, 4, side, side)}),
    }
    found = {}
    for name, (module, inputs) in parts.items():
        inside = convert(module, inputs, out / f"{name}.mlpackage")
        weights = load_file(next((folder / name).glob("*.fp16.safetensors")))
        there: list[str] = []
        gone: list[str] = []
        for key, tensor in weights.items():
            if tensor.numel() >= SMALL and tensor.dtype == torch.float16:
                (there if tensor.numpy().tobytes() in inside else gone).append(key)
        found[name] = [there, gone]
    print(json.dumps(found))


if __name__ == "__main__":
    main()

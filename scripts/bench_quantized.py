"""The section of the bench on quantized weights: float8 in blocks and MXFP4 to bf16, beside what others do.

What `cp` copies here is what is written: twice the bytes of float8, four times those of MXFP4.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from bench_models import GB, SEED, Shape, cut_evenly, llama_config, llama_shapes
from bench_runs import (
    Bench,
    Case,
    Figures,
    Row,
    conversion,
    made_once,
    ratios_of,
    rows_in_turn,
    run,
    run_in_turn,
    say,
    weights_nbytes,
)
from make_sample import write_json

REACH_MB = 120.0
BLOCK = 128
GROUP = 32

CONVERT = """
import sys
from compressed_tensors.entrypoints.convert import convert_checkpoint
from compressed_tensors.entrypoints.convert.converters import FP8BlockDequantizer
source, out = sys.argv[1:]
convert_checkpoint(source, out, FP8BlockDequantizer.from_pretrained(source), device="cpu")
"""
LOAD = """
import sys
from transformers import AutoModelForCausalLM, {config}
source, out = sys.argv[1:]
how = {config}(dequantize=True)
AutoModelForCausalLM.from_pretrained(source, quantization_config=how, dtype="bfloat16").save_pretrained(out)
"""
LOAD_FP8, LOAD_MXFP4 = (LOAD.format(config=config) for config in ("FineGrainedFP8Config", "Mxfp4Config"))
BASELINES = {
    "float8": {
        "compressed-tensors' convert_checkpoint": ("compressed_tensors", CONVERT),
        "transformers load + save": ("transformers", LOAD_FP8),
    },
    "MXFP4": {"transformers load + save": ("transformers", LOAD_MXFP4)},
}


@dataclass(frozen=True, slots=True)
class Codes:
    """Bytes that stand for numbers, drawn when they are asked for; ``kind`` says which bytes these may be."""

    dtype: str  # as a safetensors header has it
    shape: Shape
    seed: int

    @property
    def nbytes(self) -> int:
        return {"F32": 4, "BF16": 2}.get(self.dtype, 1) * math.prod(self.shape)

    def tobytes(self) -> bytes:
        rng = np.random.default_rng((SEED, self.seed))
        if self.dtype == "F32":
            return rng.uniform(1e-4, 1e-3, self.shape).astype("<f4").tobytes()
        if self.dtype == "BF16":
            return (rng.standard_normal(self.shape, dtype=np.float32).view("<u4") >> 16).astype("<u2").tobytes()
        codes = rng.integers(0, 256, self.shape, dtype=np.uint8)
        if self.dtype == "F8_E4M3":
            codes[codes & 0x7F == 0x7F] = 0  # NaN
        return codes.tobytes()


@dataclass(frozen=True, slots=True)
class Exponents(Codes):
    """Scales of MXFP4: powers of two around 1/100."""

    def tobytes(self) -> bytes:
        return np.random.default_rng((SEED, self.seed)).integers(116, 124, self.shape, dtype=np.uint8).tobytes()


def write_safetensors(folder: Path, tensors: dict[str, Codes], config: dict[str, Any]) -> None:
    """Write config, index and shards of about the same size."""
    shards = cut_evenly(tensors)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(folder / file_name, shard)
        weight_map |= dict.fromkeys(shard, file_name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", config)


def write_file(path: Path, tensors: Mapping[str, Codes]) -> None:
    """Write one file, a tensor at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.tobytes())


def write_fp8(folder: Path, gb: float) -> None:
    """Write a Llama of so many GB in float8, with the linear layers in blocks as DeepSeek has them."""
    config = llama_config(4 * gb)
    tensors: dict[str, Codes] = {}
    for seed, (name, shape) in enumerate(llama_shapes(config)):
        if "proj" in name:
            tensors[name] = Codes("F8_E4M3", shape, seed)
            tensors[f"{name}_scale_inv"] = Codes("F32", tuple(-(-side // BLOCK) for side in shape), seed)
        else:
            tensors[name] = Codes("BF16", shape, seed)
    said = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
    write_safetensors(folder, tensors, config | {"torch_dtype": "bfloat16", "quantization_config": said})


def write_mxfp4(folder: Path, gb: float) -> None:
    """Write a gpt-oss of so many GB, with the experts in MXFP4: layers of its own shapes, smaller ones below 1 GB."""
    hidden, experts = (2880, 32) if gb >= 1 else (960, 8)
    packed = 3 * experts * hidden * hidden * 17 // 32
    layers = max(1, round(gb * GB / packed))
    config = {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": hidden,
        "intermediate_size": hidden, "num_hidden_layers": layers, "num_local_experts": experts,
        "num_experts_per_tok": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
        "vocab_size": 1024, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
        "layer_types": ["full_attention"] * layers,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    }  # fmt: skip
    tensors: dict[str, Codes] = {"model.embed_tokens.weight": Codes("BF16", (1024, hidden), 0)}
    for layer in range(layers):
        block, seed = f"model.layers.{layer}", 100 * layer
        plain = {
            "self_attn.q_proj.weight": (512, hidden), "self_attn.q_proj.bias": (512,),
            "self_attn.k_proj.weight": (128, hidden), "self_attn.k_proj.bias": (128,),
            "self_attn.v_proj.weight": (128, hidden), "self_attn.v_proj.bias": (128,),
            "self_attn.o_proj.weight": (hidden, 512), "self_attn.o_proj.bias": (hidden,), "self_attn.sinks": (8,),
            "mlp.router.weight": (experts, hidden), "mlp.router.bias": (experts,),
            "mlp.experts.gate_up_proj_bias": (experts, 2 * hidden), "mlp.experts.down_proj_bias": (experts, hidden),
            "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
        }  # fmt: skip
        for place, (name, shape) in enumerate(plain.items()):
            tensors[f"{block}.{name}"] = Codes("BF16", shape, seed + place)
        for place, (name, rows) in enumerate((("gate_up_proj", 2 * hidden), ("down_proj", hidden)), len(plain)):
            grid = (experts, rows, hidden // GROUP)
            tensors[f"{block}.mlp.experts.{name}_blocks"] = Codes("U8", (*grid, GROUP // 2), seed + place)
            tensors[f"{block}.mlp.experts.{name}_scales"] = Exponents("U8", grid, seed + place)
    tensors["model.norm.weight"] = Codes("BF16", (hidden,), 1)
    tensors["lm_head.weight"] = Codes("BF16", (1024, hidden), 2)
    write_safetensors(folder, tensors, config)


SOURCES = {"float8": write_fp8, "MXFP4": write_mxfp4}


def measure_dequantized(bench: Bench) -> Iterator[Row]:
    """Run `cp` of what comes out, wconv with one worker and by default, and the others, in turn."""
    for form, write in SOURCES.items():
        source = made_once(bench.folder / f"{form.lower()}-{bench.gb:g}gb", partial(write, gb=bench.gb))
        case = Case(f"dequantize {form}", conversion("dequantize", "--dtype", "bf16"), math.inf, REACH_MB)
        plain = made_once(bench.folder / f"{source.name}-bf16", partial(make_plain, bench, case, source))
        nbytes = weights_nbytes(plain)
        commands = {
            "cp": bench.copy_command(plain),
            case.name: bench.command(case, source),
            f"{case.name}, one worker": bench.command(case, source, "--workers", "1"),
        }
        yield from rows_in_turn(bench, "dequantize", f"cp of what it writes ({form})", commands, nbytes, REACH_MB)
        for name, (module, code) in BASELINES[form].items():
            if not find_spec(module):
                yield Row("dequantize", name, note=f"{module} is not installed")
                continue
            command = [sys.executable, "-c", code, str(source), str(bench.out)]
            others = run_in_turn(bench, bench.baseline_runs, {"cp": commands["cp"], name: command}, nbytes)
            yield Row(
                "dequantize", f"{form}: {name}", Figures(others[name]), ratios_of(*others.values()), read_nbytes=nbytes
            )


def make_plain(bench: Bench, case: Case, source: Path, folder: Path) -> None:
    folder.rmdir()
    say(f"writing {folder.name}")
    run("dequantize, for cp", [*bench.trees["now"], *case.arguments(source, folder)])

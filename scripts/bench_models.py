"""The checkpoints that `bench.py` measures with: names and shapes of real models, random values, always the same."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from make_sample import Values, write_json, write_shards, write_torch_file

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "converter" / "configs" / "sd1"
GB = 1_000_000_000

SEED = 2
SHARDS = 5

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RandomTensor:
    """Normal float32 values, drawn when their bytes are asked for: one tensor is in memory at a time."""

    shape: Shape
    seed: int

    @property
    def nbytes(self) -> int:
        return 4 * math.prod(self.shape)

    def tobytes(self) -> bytes:
        values = np.random.default_rng((SEED, self.seed)).standard_normal(self.shape, dtype=np.float32)
        return (values * np.float32(0.02)).astype("<f4", copy=False).tobytes()


def llama_config(gb: float) -> dict[str, Any]:
    """Choose as many layers as come nearest to so many GB of float32."""
    hidden = 2048 if gb >= 0.8 else 512
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": 11 * hidden // 4,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": hidden // 64,
        "num_hidden_layers": 0,
        "num_key_value_heads": hidden // 256,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": 32000,
    }
    without, with_one = (
        sum(4 * math.prod(shape) for _, shape in llama_shapes(config | {"num_hidden_layers": n})) for n in (0, 1)
    )
    layers = max(1, round((gb * GB - without) / (with_one - without)))
    return config | {"num_hidden_layers": layers}


def llama_shapes(config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Yield names and shapes in the order of `LlamaForCausalLM.state_dict()`."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    key_value = config["num_key_value_heads"] * config["head_dim"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for i in range(config["num_hidden_layers"]):
        block = f"model.layers.{i}"
        yield f"{block}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{block}.self_attn.k_proj.weight", (key_value, hidden)
        yield f"{block}.self_attn.v_proj.weight", (key_value, hidden)
        yield f"{block}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{block}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{block}.mlp.up_proj.weight", (inner, hidden)
        yield f"{block}.mlp.down_proj.weight", (hidden, inner)
        yield f"{block}.input_layernorm.weight", (hidden,)
        yield f"{block}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def write_llama(folder: Path, gb: float) -> None:
    """Write config, index and shards: SHARDS, or fewer where one tensor is larger than its share."""
    config = llama_config(gb)
    tensors = {name: RandomTensor(shape, i) for i, (name, shape) in enumerate(llama_shapes(config))}
    write_json(folder / "config.json", config)
    write_shards(folder, "pytorch_model", cut_evenly(tensors))


_V = TypeVar("_V", bound=Values)


def cut_evenly(tensors: Mapping[str, _V]) -> list[dict[str, _V]]:
    """Cut tensors into shards of about the same size."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, _V]] = [{} for _ in range(SHARDS)]
    before = 0
    for name, tensor in tensors.items():
        shards[before * SHARDS // total][name] = tensor
        before += tensor.nbytes
    return [shard for shard in shards if shard]


def write_unet(folder: Path, gb: float) -> None:
    """Write a Stable Diffusion 1 pipeline that is all UNet: 3.4 GB of it for 4, narrower ones for less."""
    import torch
    from diffusers import UNet2DConditionModel

    shutil.copytree(CONFIGS, folder, dirs_exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).write_text("{}")
    config = json.loads((CONFIGS / "unet" / "config.json").read_text())
    width = max(32, round(320 * math.sqrt(gb / 4) / 32) * 32)
    config["block_out_channels"] = [width, 2 * width, 4 * width, 4 * width]
    with torch.device("meta"):
        state = UNet2DConditionModel.from_config(config).state_dict()
    tensors = {name: RandomTensor(tuple(tensor.shape), i) for i, (name, tensor) in enumerate(state.items())}
    write_json(folder / "unet" / "config.json", config)
    write_shards(folder / "unet", "diffusion_pytorch_model", cut_evenly(tensors))
    for name in ("vae/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"):
        write_torch_file(folder / name, {"weight": RandomTensor((8, 8), 0)})


def write_small(folder: Path, tensors: int) -> None:
    """Write one file with many tensors of 16 to 256 elements."""
    sides = np.random.default_rng(SEED).integers(4, 17, (tensors, 2)).tolist()
    state_dict = {f"blocks.{i}.weight": RandomTensor((rows, columns), i) for i, (rows, columns) in enumerate(sides)}
    write_torch_file(folder / "pytorch_model.bin", state_dict)

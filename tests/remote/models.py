"""Models of a few files each, with all that makes tensors odd; and wconv in a process of its own, beside a store."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from support import clusters, tiny

from remote import stores

Contents = dict[str, bytes]
"""What files hold, by their names."""


def contents(folder: Path) -> Contents:
    """Read all files below a folder."""
    return {name: (folder / name).read_bytes() for name in tiny.names_in(folder)}


def drive(store: stores.Store, *arguments: object) -> clusters.Driver:
    """Start a run of wconv that has a store before it, and nothing else."""
    nobody = {"AWS_METADATA_ENDPOINT": "http://127.0.0.1:1"}
    return clusters.Driver(arguments, (sys.executable, "-m", "converter"), clusters.ROOT, **nobody, **store.env)


def save_llama(folder: Path, save: Callable[[tiny.State, Path], object] = tiny.save_bin_shards) -> Path:
    """Write small shards in one of the forms, with a config and a tokenizer."""
    save(tiny.make_state(), folder)
    tiny.write_json(folder / "config.json", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    tiny.write_json(folder / "tokenizer.json", {"a": 1})
    return folder


def large_state() -> tiny.State:
    """Make a tensor that goes up in parts, many small ones, one without elements and one without dimensions."""
    torch.manual_seed(0)
    state = {f"layers.{number}.bias": torch.randn(10) for number in range(300)}
    return {"big.weight": torch.randn(4300, 1000), "none": torch.zeros(0, 4), "scale": torch.tensor(2.5), **state}


def save_rest(folder: Path) -> Path:
    """Write what lies beside weights: a config, and a tokenizer of which one file goes up by itself."""
    tiny.write_json(folder / "config.json", {"hidden_size": 8})
    tiny.write_json(folder / "tokenizer_config.json", {"model_max_length": 77})
    (folder / "tokenizer.json").write_bytes(b"x" * 1_500_000)
    return folder


def save_sharded(folder: Path) -> Path:
    """Write two safetensors shards, an index and what lies beside them."""
    state = large_state()
    names = list(state)
    parts = [names[:200], names[200:]]
    tiny.save_shards(state, folder, parts, "model-{:05d}-of-{:05d}.safetensors", "model.safetensors.index.json")
    return save_rest(folder)


def save_bins(folder: Path) -> Path:
    """Write three ``.bin`` shards, the last with two names for one tensor, and an index."""
    state = tiny.make_state() | {"none": torch.zeros(0, 4), "scale": torch.tensor(2.5), "count": torch.arange(5)}
    state["tied"] = state["f"]
    parts = [["a", "b", "none"], ["c", "d", "scale"], ["e", "count", "f", "tied"]]
    names = "pytorch_model-{:05d}-of-{:05d}.bin", "pytorch_model.bin.index.json"
    tiny.save_shards(state, folder, parts, *names)
    return save_rest(folder)


def save_shards(folder: Path, count: int = 4, numel: int = 1 << 20) -> Path:
    """Write so many safetensors shards of one float32 tensor each, with an index and a config."""
    state = {f"layers.{number}.weight": torch.full((numel,), number + 0.5) for number in range(count)}
    parts = [[name] for name in state]
    tiny.save_shards(state, folder, parts, "model-{:05d}-of-{:05d}.safetensors", "model.safetensors.index.json")
    tiny.write_json(folder / "config.json", {"hidden_size": 8})
    return folder


def save_linear(folder: Path) -> Path:
    """Write some tensors of a Llama, of which two are of linear modules."""
    state = {f"layers.0.self_attn.{leaf}.weight": torch.randn(4, 100) for leaf in ("q_proj", "k_proj")}
    tiny.save(state | {"embed_tokens.weight": torch.randn(8, 4)}, folder / "model.safetensors")
    tiny.write_json(folder / "config.json", {"architectures": ["LlamaModel"], "model_type": "llama"})
    return folder


SAVERS: dict[str, Callable[[Path], Path]] = {
    "sharded": save_sharded,
    "bins": save_bins,
    "pipeline": tiny.save_pipeline,
    "linear": save_linear,
}

"""Samples of one file a rank, by torch.save of what each rank has: DTensors, ShardedTensors, flat parameters.

The judge is the whole state dict, gathered by torch on all ranks (``full_tensor``, FSDP1's FULL_STATE_DICT). The
folders are laid out as verl and accelerate do it; accelerate's files are written by its own ``save_fsdp_model``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import save_fsdp_model
from samples_common import State, judge, spawn, start, whole
from samples_dcp import by_mesh, inputs, tensor_parallel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.fsdp.api import ShardedOptimStateDictConfig, ShardedStateDictConfig
from torch.distributed.tensor import Shard
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


class Small(nn.Module):
    """A model with uneven rows, 16-bit weights, a tie, and buffers, which FSDP leaves whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 6)
        self.first = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.last = nn.Linear(5, 3, dtype=torch.bfloat16)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.randn(1))
        self.register_buffer("inv_freq", torch.arange(4.0))
        self.register_buffer("ids", torch.arange(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(self.embed(x)))
        return self.last(hidden.bfloat16()).float().sum() + self.head(self.embed(x)).sum() * self.scale.sum()


def small(mesh: DeviceMesh) -> nn.Module:
    """Shard the model; FSDP2 wants one dtype in a group."""
    model = Small()
    fully_shard(model.last, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def begin(name: str) -> Path:
    """Make the folder on the first rank; all have it afterwards."""
    if dist.get_rank() == 0:
        start(name)
    dist.barrier()
    return Path(name) / "checkpoint"


def end(checkpoint: Path, state: State) -> None:
    if dist.get_rank() == 0:
        judge(checkpoint, state)
    dist.barrier()


def write_ranks(checkpoint: Path, state: State) -> None:
    torch.save(state, checkpoint / f"model_world_size_{dist.get_world_size()}_rank_{dist.get_rank()}.pt")


def small_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: place for place, word in enumerate(["<unk>", "<s>", "</s>", *"abcdefgh"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=11,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def one_step(model: nn.Module, *args: Any, **inputs: Any) -> torch.optim.Optimizer:
    """Train for one step, so that there is a state of an optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    result = model(*args, **inputs)
    (result if isinstance(result, torch.Tensor) else result.logits.float().sum()).backward()
    optimizer.step()
    return optimizer


def verl(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, config_of: Any, version: int) -> State:
    """Write what verl's FSDPCheckpointManager does, with its names, and give the model's own state."""
    state = model.state_dict()
    write_ranks(checkpoint, state)
    place = f"world_size_{dist.get_world_size()}_rank_{dist.get_rank()}.pt"
    torch.save(optimizer.state_dict(), checkpoint / f"optim_{place}")
    torch.save(
        {"lr_scheduler": {"last_epoch": 1}, "rng": {"cpu": torch.zeros(4, dtype=torch.uint8)}},
        checkpoint / f"extra_state_{place}",
    )
    if dist.get_rank() == 0:
        config = {"FSDP_version": version, "world_size": dist.get_world_size()}
        (checkpoint / "fsdp_config.json").write_text(json.dumps(config, indent=4))
        config_of.config.save_pretrained(checkpoint / "huggingface")
        config_of.generation_config.save_pretrained(checkpoint / "huggingface")
        small_tokenizer().save_pretrained(checkpoint / "huggingface")
    dist.barrier()
    return state


def verl_by_fsdp2(mesh: DeviceMesh) -> None:
    checkpoint = begin("ranks-verl")
    model = small_llama()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = one_step(model, input_ids=torch.arange(8).reshape(1, 8))
    end(checkpoint, whole(verl(checkpoint, model, optimizer, model, 2)))


def verl_by_fsdp1(name: str, mesh: DeviceMesh, **options: Any) -> None:
    """Shard by FSDP1 with a mesh, as verl does by default: its sharded state dict is made of DTensors."""
    checkpoint = begin(name)
    llama = small_llama()
    model = FullyShardedDataParallel(
        llama, device_mesh=mesh, device_id=torch.device("cpu"), use_orig_params=False, **options
    )
    optimizer = one_step(model, input_ids=torch.arange(8).reshape(1, 8))
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        full = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with FullyShardedDataParallel.state_dict_type(
        model, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(), ShardedOptimStateDictConfig()
    ):
        verl(checkpoint, model, optimizer, llama, 1)
    end(checkpoint, full)


def by_torch(row: DeviceMesh, square: DeviceMesh) -> None:
    """Write rank files of other layouts: buffers and ties, tensor parallel, two axes, replicas."""
    checkpoint = begin("ranks-fsdp2")
    model = small(row)
    one_step(model, torch.arange(7))
    write_ranks(checkpoint, model.state_dict())
    end(checkpoint, whole(model.state_dict()))

    checkpoint = begin("ranks-hsdp")
    model = small(square)
    write_ranks(checkpoint, model.state_dict())
    end(checkpoint, whole(model.state_dict()))

    checkpoint = begin("ranks-fsdp2-tp")
    state = tensor_parallel(square).state_dict()
    write_ranks(checkpoint, state)
    end(checkpoint, whole(state))

    checkpoint = begin("ranks-fsdp2-columns")
    torch.manual_seed(0)
    model = fully_shard(nn.Linear(8, 5), mesh=row, shard_placement_fn=lambda value: Shard(value.ndim - 1))
    write_ranks(checkpoint, model.state_dict())
    end(checkpoint, whole(model.state_dict()))

    checkpoint = begin("ranks-mesh2d")
    write_ranks(checkpoint, by_mesh(square))
    end(checkpoint, {**inputs(), "plain": inputs()["c"]})


def on_four_ranks() -> None:
    row = init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    verl_by_fsdp2(row)
    verl_by_fsdp1("ranks-verl-hsdp", square, sharding_strategy=torch.distributed.fsdp.ShardingStrategy.HYBRID_SHARD)
    by_torch(row, square)


def save_by_accelerate(checkpoint: Path, model: nn.Module, accelerator: Accelerator, **plugin: Any) -> None:
    save_fsdp_model(FullyShardedDataParallelPlugin(**plugin), accelerator, model, str(checkpoint), use_dcp=False)
    dist.barrier()


def on_two_ranks() -> None:
    accelerator = Accelerator(cpu=True)
    row = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    verl_by_fsdp1("ranks-verl-fsdp1", row)

    checkpoint = begin("ranks-accelerate-fsdp2")
    model = small(row)
    save_by_accelerate(checkpoint, model, accelerator, fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    end(checkpoint, whole(model.state_dict()))

    for use_orig_params in (True, False):
        ending = "orig" if use_orig_params else "flat"
        options: dict[str, Any] = {"use_orig_params": use_orig_params, "device_id": torch.device("cpu")}
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
        layers[0] = FullyShardedDataParallel(layers[0], **options)
        model = FullyShardedDataParallel(layers, **options)
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
            full = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        for kind in ("SHARDED", "LOCAL"):
            checkpoint = begin(f"ranks-accelerate-{kind.lower()}-{ending}")
            plugin = {"fsdp_version": 1, "state_dict_type": f"{kind}_STATE_DICT"}
            save_by_accelerate(checkpoint, model, accelerator, **plugin)
            end(checkpoint, full)


def make() -> None:
    """Write all samples of this family into the current folder."""
    spawn(2, on_two_ranks)
    spawn(4, on_four_ranks)

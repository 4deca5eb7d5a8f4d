"""Samples of torch.distributed.checkpoint, in its own format and in Hugging Face's.

The judge is torch's own way back, ``dcp_to_torch_save``, held against the tensors that went in.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from samples_common import State, judge, same, spawn, start, whole
from torch import nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard as LocalShard
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed.checkpoint import FileSystemWriter, HuggingFaceStorageWriter
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

RANKS = 4


def read_back(checkpoint: Path) -> State:
    """Read a folder as torch's converter does."""
    with tempfile.TemporaryDirectory() as folder:
        dcp_to_torch_save(checkpoint, Path(folder) / "whole.pt")
        state: State = torch.load(Path(folder) / "whole.pt", weights_only=False)
    return state


def judge_dcp(checkpoint: Path, put: Any) -> None:
    """Judge by torch's converter, after a look whether it gives what was put in."""
    state = read_back(checkpoint)
    same(put, state)
    judge(checkpoint, state)


def trained() -> tuple[State, State]:
    """Train a small model for one step and give its state dict and its optimizer's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2, bias=False))
    model[2].weight.data = model[2].weight.data.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return get_state_dict(model, optimizer)


def alone() -> None:
    """Write what one process writes: everything that a state dict can hold."""
    model, optimizer = trained()
    state: State = {
        "model": model,
        "optim": optimizer,
        "step": 7,
        "lr": 1e-3,
        "name": "x",
        "list": [torch.ones(2), 3, {"a": torch.zeros(1)}],
        "plain_list": [1, 2],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "view": torch.arange(12.0).reshape(3, 4).t(),
        "slice": torch.arange(100)[10:20:3],
        "conj": torch.tensor([1 + 2j, 3 - 4j]).conj(),
        "neg": torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
        "half": torch.arange(6.0).reshape(2, 3).half(),
        "f8": torch.arange(3.0).to(torch.float8_e4m3fn),
        "bool": torch.tensor([True, False]),
        "int": torch.tensor(5, dtype=torch.int64),
        "tied1": model["0.weight"],
        "tied2": model["0.weight"],
    }
    checkpoint = start("dcp-plain")
    dcp.save(state, checkpoint_id=checkpoint, no_dist=True)
    judge_dcp(checkpoint, state)

    checkpoint = start("dcp-ema")
    state = {"model": model, "ema": {name: tensor * 0.5 for name, tensor in model.items()}, "step": 3}
    dcp.save(state, checkpoint_id=checkpoint, no_dist=True)
    judge_dcp(checkpoint, state)

    checkpoint = start("dcp-zstd")
    dcp.save({"model": model}, storage_writer=FileSystemWriter(checkpoint, _extensions=[ZStandard()]), no_dist=True)
    judge_dcp(checkpoint, {"model": model})

    checkpoint = start("dcp-safetensors-items")
    writer = FileSystemWriter(checkpoint, serialization_format=SerializationFormat.SAFETENSORS)
    dcp.save(model, storage_writer=writer, no_dist=True)
    judge(checkpoint, model)  # torch's reader of this folder takes the items for its own

    checkpoint = start("dcp-not-flat")
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    dcp.save({**model, "extra": {"epoch": 3}}, checkpoint_id=checkpoint, planner=planner, no_dist=True)
    judge(checkpoint, model)


def inputs() -> State:
    numbers = torch.Generator().manual_seed(1)
    return {
        "a": torch.randn(5, 6, generator=numbers),
        "b": torch.randn(8, 6, generator=numbers).to(torch.bfloat16),
        "c": torch.randn(3, generator=numbers),
        "d": torch.arange(2 * 3 * 7, dtype=torch.int64).reshape(2, 3, 7),
        "e": torch.randn(6, 4, generator=numbers).half(),
        "f8": torch.randn(5, 3, generator=numbers).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False, True, True, False]),
        "empty": torch.zeros(0, 3),
        "one": torch.randn(1, 4, generator=numbers),
        "scalar": torch.tensor(4.25),
    }


def laid_out(tensor: torch.Tensor, mesh: DeviceMesh, placements: list[Any]) -> Any:
    """Cut a tensor that every rank has; gloo cannot send every dtype."""
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def by_rows(mesh: DeviceMesh) -> State:
    """Shard every tensor along its first axis, as FSDP2 does."""
    return {
        name: laid_out(tensor, mesh, [Shard(0)] if tensor.ndim else [Replicate()]) for name, tensor in inputs().items()
    }


def by_mesh(mesh: DeviceMesh) -> State:
    """Lay each tensor on a mesh of two axes in a way of its own, and one on none."""
    placements: dict[str, Any] = {
        "a": [Shard(0), Shard(1)],
        "b": [Shard(0), Shard(0)],
        "c": [Replicate(), Shard(0)],
        "d": [Shard(1), Shard(2)],
        "e": [Shard(1), Replicate()],
        "f8": [Shard(1), Shard(0)],
        "flags": [Shard(0), Replicate()],
        "one": [Replicate(), Shard(1)],
        "empty": [Replicate(), Replicate()],
        "scalar": [Replicate(), Replicate()],
    }
    state: State = {name: laid_out(tensor, mesh, placements[name]) for name, tensor in inputs().items()}
    return {**state, "plain": inputs()["c"]}


def save_on_all(name: str, state: State, put: State | None = None, **options: Any) -> None:
    """Save from every rank, and judge on the first: PUT is what went in, or it is gathered."""
    checkpoint = Path(name) / "checkpoint"
    if dist.get_rank() == 0:
        start(name)
    dist.barrier()
    make_writer: Callable[[Path], Any] = options.pop("writer", FileSystemWriter)
    dcp.save(state, storage_writer=make_writer(checkpoint), **options)
    if put is None:
        put = whole({key: whole(value) if isinstance(value, dict) else value for key, value in state.items()})
    if dist.get_rank() == 0:
        judge_dcp(checkpoint, put)
    dist.barrier()


def tensor_parallel(mesh: DeviceMesh) -> nn.Module:
    """Cut a model by FSDP2 and tensor parallelism, which makes _StridedShard; 7 and 3 rows are uneven both ways."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 6), nn.LayerNorm(6), nn.Linear(6, 7), nn.Linear(7, 3))
    styles = {"0": ColwiseParallel(), "1": RowwiseParallel(), "3": ColwiseParallel(), "4": ColwiseParallel()}
    parallelize_module(model, mesh["tp"], styles)
    for layer in model:
        fully_shard(layer, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


class Parts(nn.ModuleDict):
    """Modules by name, which FSDP2 takes for a model."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def torchtitan(mesh: DeviceMesh) -> State:
    """Lay out a checkpoint as torchtitan does: the model's names at the top, the rest beside them."""
    torch.manual_seed(0)
    model = Parts(
        {
            "tok_embeddings": nn.Embedding(8, 4),
            "layers": nn.ModuleDict({"0": nn.Linear(4, 6), "1": nn.Linear(6, 4)}),
            "output": nn.Linear(4, 8),
        }
    )
    model.register_buffer("freqs_cis", torch.arange(4.0))
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    options = dcp.state_dict.StateDictOptions(flatten_optimizer_state_dict=True)
    state = dcp.state_dict.get_model_state_dict(model)
    moments = dcp.state_dict.get_optimizer_state_dict(model, optimizer, options=options)
    return {
        **state,
        "optimizer": moments,
        "lr_scheduler": {"last_epoch": 1, "base_lrs": [1e-3]},
        "dataloader": {"dp_rank_0": b"state", "world_size": RANKS},
        "train_state": {"step": torch.tensor(3), "ntokens_seen": torch.tensor(4096)},
    }


def sharded_tensors() -> State:
    """Cut a tensor as FSDP did before DTensors."""
    rank, full = dist.get_rank(), inputs()["b"]
    where = ShardMetadata([2 * rank, 0], [2, 6], f"rank:{rank}/cpu")
    shard = LocalShard(full[2 * rank : 2 * rank + 2].clone(), where)
    return {"w": init_from_local_shards([shard], 8, 6), "x": torch.ones(2)}


def first_fsdp(use_orig_params: bool) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(3, 5), nn.Linear(5, 2)]
    options: dict[str, Any] = {"use_orig_params": use_orig_params, "device_id": torch.device("cpu")}
    wrapped = [FullyShardedDataParallel(layer, **options) for layer in layers]
    return FullyShardedDataParallel(nn.Sequential(*wrapped), **options)


def first_fsdp_samples() -> None:
    """Write the sharded state dict of FSDP1, with and without the parameters' own shapes in memory."""
    for use_orig_params in (True, False):
        model = first_fsdp(use_orig_params)
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
            full = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
            state = model.state_dict()
        name = f"dcp-fsdp1-{'orig' if use_orig_params else 'flat'}"
        if dist.get_rank() == 0:
            start(name)
        dist.barrier()
        dcp.save({"model": state}, checkpoint_id=Path(name) / "checkpoint")
        if dist.get_rank() == 0:
            judge_dcp(Path(name) / "checkpoint", {"model": full})


def each_its_metadata(mesh: DeviceMesh) -> None:
    """Write without a word between the ranks: each leaves a metadata file of its own, and reads that."""
    name, state = "dcp-per-rank", by_rows(mesh)
    if dist.get_rank() == 0:
        start(name)
    dist.barrier()
    dcp.save(state, checkpoint_id=Path(name) / "checkpoint", use_collectives=False)
    dist.barrier()
    again = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    dcp.load(again, checkpoint_id=Path(name) / "checkpoint")
    for key, tensor in state.items():
        assert torch.equal(tensor.to_local(), again[key].to_local()), key
    if dist.get_rank() == 0:
        judge(Path(name) / "checkpoint", inputs())


def on_four_ranks() -> None:
    row = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("dp",))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    save_on_all("dcp-fsdp", {"model": by_rows(row), "step": 3}, {"model": inputs()})
    on_square = {**inputs(), "plain": inputs()["c"]}
    save_on_all("dcp-mesh2d", by_mesh(square), on_square)
    save_on_all("dcp-fsdp2-tp", {"model": tensor_parallel(square).state_dict()})
    save_on_all("dcp-threads", by_mesh(square), on_square, writer=lambda path: FileSystemWriter(path, thread_count=2))
    save_on_all(
        "dcp-per-item", by_rows(row), inputs(), writer=lambda path: FileSystemWriter(path, single_file_per_rank=False)
    )
    save_on_all("dcp-torchtitan", torchtitan(row))
    each_its_metadata(row)

    name = "dcp-sharded-tensor"
    if dist.get_rank() == 0:
        start(name)
    dist.barrier()
    dcp.save({"model": sharded_tensors()}, checkpoint_id=Path(name) / "checkpoint")
    if dist.get_rank() == 0:
        judge_dcp(Path(name) / "checkpoint", {"model": {"w": inputs()["b"], "x": torch.ones(2)}})

    name = "dcp-async"
    if dist.get_rank() == 0:
        start(name)
    dist.barrier()
    dcp.async_save({"model": by_rows(row)}, checkpoint_id=Path(name) / "checkpoint").result()
    dist.barrier()
    if dist.get_rank() == 0:
        judge_dcp(Path(name) / "checkpoint", {"model": inputs()})
    hugging_face(square)


def hugging_face(mesh: DeviceMesh) -> None:
    """Write safetensors files of boxes: alone, beside what torch makes of them, and with a scalar in them."""
    floats = {name: tensor for name, tensor in by_mesh(mesh).items() if name in {"a", "b", "c", "e", "one", "plain"}}
    scalar = {**floats, "scalar": by_mesh(mesh)["scalar"]}
    many = {name: tensor for name, tensor in by_mesh(mesh).items() if name != "empty"}
    for name, state, consolidate in (
        ("dcp-hf", many, False),
        ("dcp-hf-consolidated", floats, True),
        ("dcp-hf-scalar", scalar, True),
    ):
        checkpoint = Path(name) / "checkpoint"
        if dist.get_rank() == 0:
            start(name)
        dist.barrier()
        places = {key: 1 + index % 2 for index, key in enumerate(state)} if consolidate else None
        writer = HuggingFaceStorageWriter(
            str(checkpoint), places, save_distributed=True, enable_consolidation=consolidate
        )
        dcp.save(state, storage_writer=writer)
        dist.barrier()
        if dist.get_rank() == 0:
            put = {**inputs(), "plain": inputs()["c"]}
            judge(checkpoint, {key: put[key] for key in state})


def first_fsdp_on_two() -> None:
    first_fsdp_samples()


def make() -> None:
    """Write all samples of this family into the current folder."""
    alone()
    spawn(2, first_fsdp_on_two)
    spawn(RANKS, on_four_ranks)

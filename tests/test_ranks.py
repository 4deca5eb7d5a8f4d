"""Files of ranks, held against what torch gathered of the same, and against what torch cuts for ranks that it fakes."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support.tiny import assert_same, make_state, read_file, snapshot
from support.training import NAMES, unpack
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard as OldShard
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata, TensorProperties
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor import placement_types as placed
from torch.distributed.tensor._dtensor_spec import DTensorSpec, ShardOrderEntry, TensorMeta
from torch.testing._internal.distributed.fake_pg import FakeStore

from converter.dtypes import DTYPES
from converter.errors import BadFile, HostileFile, TrainingPiece, Unsupported, WconvError
from converter.formats.torch.rebuild import Listed, Part, StorageRef, TensorRef
from converter.formats.torch.unpickler import Kept, KeptObject
from converter.formats.trained import ranks
from converter.storage import place_of
from converter.tensors.derived import Boxes, Replicas
from converter.tensors.reader import RangeReader, read_chunks
from converter.tensors.view import View, contiguous_strides

WHOLE = [name for name in NAMES if name.startswith("ranks-") and "-local" not in name]
LOCAL = [name for name in NAMES if name.startswith("ranks-accelerate-local")]
State = Mapping[str, Any]
Cut = Callable[[torch.Tensor, DeviceMesh], Any]
Strided = placed._StridedShard


@pytest.fixture(autouse=True)
def no_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def write_ranks(folder: Path, mesh: Sequence[int], make: Callable[[DeviceMesh, int], State], **wishes: Any) -> Path:
    """Write what each rank of a mesh has, as torch does: one process is one rank after another."""
    folder.mkdir(parents=True, exist_ok=True)
    world = math.prod(mesh)
    for rank in range(world):
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        content = make(init_device_mesh("cpu", tuple(mesh)), rank)
        torch.save(content, path_of(folder, rank, world), **wishes)
        dist.destroy_process_group()
    return path_of(folder, 0, world)


def path_of(folder: Path, rank: int, world: int) -> Path:
    return folder / f"model_world_size_{world}_rank_{rank}.pt"


def by_torch(*placements: Placement) -> Cut:
    return lambda whole, mesh: distribute_tensor(whole, mesh, placements, src_data_rank=None)


def as_fsdp(axis: int, *, dp: int = 0, tp: int = 1) -> Cut:
    """Cut as FSDP2 does what tensor parallelism has cut: the axis of tp first (``_fsdp_param.py``)."""

    def cut(whole: torch.Tensor, mesh: DeviceMesh) -> DTensor:
        local = whole
        for along in (tp, dp):
            parts = local.chunk(mesh.size(along), axis)
            at = mesh.get_local_rank(along)
            local = parts[at] if at < len(parts) else local.narrow(axis, 0, 0)
        placements: list[Placement] = [Replicate()] * mesh.ndim
        placements[dp], placements[tp] = Strided(axis, split_factor=mesh.size(tp)), Shard(axis)
        return made(local, whole, mesh, placements)

    return cut


def made(local: torch.Tensor, whole: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Any], **more: Any) -> DTensor:
    meta = TensorMeta(whole.shape, whole.stride(), whole.dtype)
    return DTensor(local.clone(), DTensorSpec(mesh, tuple(placements), meta, **more), requires_grad=False)


def state_of(path: Path, chunk_nbytes: int = 64) -> dict[str, torch.Tensor]:
    """Read all tensors as they would be written, a few elements at a time."""
    state = {}
    with RangeReader(with_sums=True) as reader:
        for name, source, _ in read_file(path).tensors:
            raw = bytearray(b"".join(bytes(chunk) for chunk in read_chunks(source, reader, bytearray(chunk_nbytes))))
            dtype = getattr(torch, source.dtype.torch_name)
            state[name] = (
                torch.frombuffer(raw, dtype=dtype).reshape(source.shape)
                if raw
                else torch.empty(source.shape, dtype=dtype)
            )
    return state


@pytest.mark.parametrize("name", WHOLE)
def test_what_trainers_wrote_is_read(name: str, tmp_path: Path) -> None:
    checkpoint, judge, order = unpack(name, tmp_path)
    path = next(
        path
        for path in checkpoint.iterdir()
        if path.name.endswith(("_rank_0.pt", "_rank0.bin")) and path.name.find("model_") >= 0
    )
    found = read_file(path)
    assert [tensor.name for tensor in found.tensors] == order
    assert (found.format, found.notes, found.foreign) == ("FSDP ranks", (), {})
    assert_same(state_of(path), judge)


@pytest.mark.parametrize("name", LOCAL)
def test_flat_parameters_are_refused(name: str, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    checkpoint, _, _ = unpack(name, tmp_path)
    assert "FULL_STATE_DICT" in wconv("to-safetensors", checkpoint, exit_code=4).stderr


def test_a_folder_of_verl(wconv: Callable[..., Any], tmp_path: Path) -> None:
    checkpoint, judge, _ = unpack("ranks-verl", tmp_path)
    before = snapshot(checkpoint)
    told = json.loads(wconv("inspect", checkpoint, "--json").stdout)
    assert [(one["format"], one["tensors"]) for one in told["weight_sets"]] == [("FSDP ranks", len(judge))]
    assert not any("world_size_" in name for name in told["not_weights"] + told["other_weights"])
    assert len(told["training_state"]) == 9
    wconv("to-safetensors", checkpoint, "-o", tmp_path / "out")
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), judge)
    assert not list((tmp_path / "out").glob("*_world_size_*"))
    wconv("verify", checkpoint, tmp_path / "out")
    wconv("to-bin", checkpoint / "model_world_size_4_rank_2.pt", "-o", tmp_path / "bin")
    assert_same(torch.load(tmp_path / "bin" / "pytorch_model.bin"), judge)
    assert snapshot(checkpoint) == before
    for piece in ("optim_world_size_4_rank_0.pt", "extra_state_world_size_4_rank_1.pt"):
        assert "model_world_size_" in wconv("inspect", checkpoint / piece, exit_code=4).stderr


def test_the_folder_of_a_step_of_verl(wconv: Callable[..., Any], tmp_path: Path) -> None:
    folder, judge, _ = unpack("ranks-verl", tmp_path)
    step = tmp_path / "global_step_10"
    step.mkdir()
    folder.rename(step / "actor")
    torch.save({"_snapshot": {"_num_yielded": 3}}, step / "data.pt")  # of its data loader
    config = step / "actor" / "huggingface" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": ["LlamaForCausalLM"]}))
    told = wconv("to-safetensors", step, "-o", tmp_path / "out", "--config", config).stdout
    assert "LlamaForCausalLM.from_pretrained" in told
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), judge)
    assert not (tmp_path / "out" / "data.pt").exists()


WEIGHT = torch.randn(12, 6)
CUTS: dict[str, tuple[tuple[int, ...], Cut, torch.Tensor]] = {
    "rows": ((3,), by_torch(Shard(0)), torch.randn(7, 5)),
    "rows, some ranks without": ((6,), by_torch(Shard(0)), torch.randn(4, 2)),
    "columns": ((2, 2), by_torch(Replicate(), Shard(1)), torch.randn(3, 5)),
    "one axis twice": ((2, 3), by_torch(Shard(0), Shard(0)), torch.randn(11, 2)),
    "two axes": ((3, 2), by_torch(Shard(1), Shard(0)), torch.randn(5, 7)),
    "FSDP with TP": ((2, 2), as_fsdp(0), torch.randn(10, 3)),
    # torch itself, which goes by strides, would take other rows for these.
    "FSDP with TP, uneven": ((3, 2), as_fsdp(0), torch.randn(7, 2)),
    "FSDP with TP, as torch cuts": ((2, 4), by_torch(Strided(0, split_factor=4), Shard(0)), torch.randn(16, 2)),
    "columns of FSDP with TP": ((2, 2), as_fsdp(1), torch.randn(2, 8)),
    "replicas, FSDP, TP": ((2, 2, 2), as_fsdp(0, dp=1, tp=2), torch.randn(8, 3)),
    "all": ((2, 1), by_torch(Replicate(), Replicate()), torch.randn(3)),
    "a number": ((2,), by_torch(Replicate()), torch.tensor(1.5)),
    "nothing": ((2,), by_torch(Shard(0)), torch.zeros(0, 3)),
    "a view with strides": ((2,), lambda whole, mesh: made(
        whole.chunk(2, 1)[mesh.get_rank()].t().contiguous().t(), whole, mesh, [Shard(1)]), torch.randn(6, 4)),
    "in another order": ((2, 3), lambda whole, mesh: made(
        whole.chunk(3)[mesh.get_local_rank(1)].chunk(2)[mesh.get_local_rank(0)], whole, mesh, [Shard(0), Shard(0)],
        shard_order=(ShardOrderEntry(0, (1, 0)),)), WEIGHT),
}  # fmt: skip


@pytest.mark.parametrize(("mesh", "cut", "whole"), CUTS.values(), ids=CUTS)
def test_each_cut_is_put_together(mesh: tuple[int, ...], cut: Cut, whole: torch.Tensor, tmp_path: Path) -> None:
    path = write_ranks(tmp_path, mesh, lambda mesh, _: {"model": {"w": cut(whole, mesh), "plain": WEIGHT}, "step": 3})
    assert_same(state_of(path, 16), {"w": whole, "plain": WEIGHT})
    assert read_file(path).notes == ("left out: step",)


def test_what_older_torch_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 2.8 a mesh was a tensor of ranks; up to 2.4 all lay in a package of its own."""

    def as_before(mesh: DeviceMesh) -> dict[str, Any]:
        at = mesh.get_coordinate()
        return {"device_type": "cpu", "mesh": mesh.mesh, "mesh_dim_names": None, "_coordinate_on_dim": list(at or ())}

    monkeypatch.setattr(DeviceMesh, "__getstate__", as_before)
    for kind in (Shard, Replicate):
        monkeypatch.setattr(kind, "__module__", "torch.distributed._tensor.placement_types")
    path = write_ranks(tmp_path, (2, 2), lambda mesh, _: {"w": by_torch(Replicate(), Shard(0))(WEIGHT, mesh)})
    assert b"_tensor.placement_types" in path.read_bytes()
    assert b"_layout" not in path.read_bytes().replace(b"_get_layout", b"")
    assert_same(state_of(path), {"w": WEIGHT})


@pytest.mark.filterwarnings("ignore:Please use DTensor:FutureWarning")
def test_several_shards_on_a_rank(tmp_path: Path) -> None:
    """Each is a view of a larger storage."""
    spans = {0: [(0, 3), (10, 2)], 1: [(3, 7)]}

    def make(_: DeviceMesh, rank: int) -> State:
        told = {
            at: ShardMetadata([at, 0], [count, 6], f"rank:{of}/cpu") for of, own in spans.items() for at, count in own
        }
        properties = TensorProperties(dtype=torch.float32)
        metadata = ShardedTensorMetadata(list(told.values()), WEIGHT.shape, properties)
        own = [OldShard(WEIGHT[at : at + count], told[at]) for at, count in spans[rank]]
        return {"w": ShardedTensor._init_from_local_shards_and_global_metadata(own, metadata)}

    path = write_ranks(tmp_path, (2,), make)
    assert_same(state_of(path, 20), {"w": WEIGHT})


def test_the_only_rank(wconv: Callable[..., Any], tmp_path: Path) -> None:
    write_ranks(tmp_path, (1,), lambda mesh, _: {"w": by_torch(Shard(0))(WEIGHT, mesh), **make_state("ab")})
    wconv("to-safetensors", tmp_path)
    assert_same(load_file(tmp_path / "model.safetensors"), {"w": WEIGHT, **make_state("ab")})


def rows(mesh: DeviceMesh, rank: int, **plain: torch.Tensor) -> State:
    return {"w": by_torch(Shard(0))(WEIGHT, mesh), **plain}


def test_all_ranks_have_to_be_there(wconv: Callable[..., Any], tmp_path: Path) -> None:
    write_ranks(tmp_path, (4,), rows)
    shutil.copy(path_of(tmp_path, 1, 4), tmp_path / "model_world_size_4_rank_4.pt")
    assert "saved by 4 ranks, and holds model_world_size_4_rank_4" in wconv("inspect", tmp_path, exit_code=3).stderr
    (tmp_path / "model_world_size_4_rank_4.pt").unlink()
    path_of(tmp_path, 2, 4).unlink()
    assert "files of rank 2 of 4 are not there" in wconv("to-safetensors", tmp_path, exit_code=3).stderr
    path_of(tmp_path, 0, 4).unlink()
    for source in (tmp_path, path_of(tmp_path, 3, 4)):
        assert "ranks 0 and 2 of 4 are not there" in wconv("to-safetensors", source, exit_code=3).stderr
    (found,) = json.loads(wconv("doctor", tmp_path, "--json", exit_code=1).stdout)["findings"]
    assert found["code"] == "file-damaged"


def test_of_how_many_ranks_accelerate_wrote_the_mesh_tells(tmp_path: Path) -> None:
    for sample in ("ranks-accelerate-fsdp2", "ranks-accelerate-sharded-flat"):
        checkpoint, _, _ = unpack(sample, tmp_path)
        (checkpoint / "pytorch_model_fsdp_0_rank1.bin").unlink()
        with pytest.raises(BadFile, match="rank 1 of 2 are not there"):
            read_file(checkpoint / "pytorch_model_fsdp_0_rank0.bin")


def test_a_store_that_does_not_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_ranks(tmp_path, (3,), rows)
    monkeypatch.setattr(ranks, "list_entries", lambda _: [])
    assert_same(state_of(path), {"w": WEIGHT})
    path_of(tmp_path, 1, 3).unlink()
    with pytest.raises(BadFile, match="rank 1 of 3 are not there"):
        read_file(path)


def test_two_checkpoints_in_a_folder(wconv: Callable[..., Any], tmp_path: Path) -> None:
    write_ranks(tmp_path, (2,), rows)
    write_ranks(tmp_path, (3,), lambda mesh, rank: {"other": by_torch(Shard(1))(WEIGHT, mesh)})
    wconv("to-safetensors", path_of(tmp_path, 1, 3), "-o", tmp_path / "out")
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), {"other": WEIGHT})


OF_ANOTHER: dict[str, tuple[Callable[[DeviceMesh], State], str]] = {
    "a name less": (lambda mesh: {}, r"rank_1.pt: holds no tensor 'w', which model_world_size_2_rank_0.pt holds"),
    "a name more": (lambda mesh: {**rows(mesh, 1), "v": WEIGHT}, r"rank_0.pt: holds no tensor 'v'"),
    "a shape": (
        lambda mesh: {"w": by_torch(Shard(0))(WEIGHT[:10], mesh)}, r"'w' is float32 \[10, 6\] in all.*\[12, 6\]"
    ),
    "a dtype": (lambda mesh: {"w": by_torch(Shard(0))(WEIGHT.half(), mesh)}, r"'w' is float16 .*float32"),
    "a plain tensor": (lambda mesh: {"w": WEIGHT}, r"holds \[12, 6\] of tensor 'w' from \[0, 0\] on, and .* \[6, 6\]"),
    "another cut": (
        lambda mesh: {"w": by_torch(Shard(1))(WEIGHT, mesh)}, r"cuts the tensor 'w' into two boxes that overlap"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "problem"), OF_ANOTHER.values(), ids=OF_ANOTHER)
def test_a_rank_of_another_checkpoint(make: Callable[[DeviceMesh], State], problem: str, tmp_path: Path) -> None:
    path = write_ranks(tmp_path, (2,), lambda mesh, rank: make(mesh) if rank else rows(mesh, rank))
    with pytest.raises(BadFile, match=problem):
        read_file(path)


def test_a_rank_in_the_place_of_another(tmp_path: Path) -> None:
    path = write_ranks(tmp_path, (2,), rows)
    shutil.copy(path, path_of(tmp_path, 1, 2))
    with pytest.raises(BadFile, match="cuts the tensor 'w' into boxes that do not fill"):
        read_file(path)


@pytest.mark.parametrize("name", ["plain", "w"])
@pytest.mark.parametrize("form", ["zip", "stream"])
def test_replicas_that_differ(wconv: Callable[..., Any], tmp_path: Path, name: str, form: str) -> None:
    """A zip notes CRC32s, and nothing is read; a stream does not, and all are."""

    def make(mesh: DeviceMesh, rank: int) -> State:
        other = WEIGHT + torch.ones(12, 6) * (rank == 3)
        plain = other if name == "plain" else WEIGHT
        return {"w": by_torch(Replicate(), Shard(0))(other if name == "w" else WEIGHT, mesh), "plain": plain}

    write_ranks(tmp_path / "m", (2, 2), make, _use_new_zipfile_serialization=form == "zip")
    first = "rank_1" if name == "w" else "rank_0"
    said = rf"rank_3.pt: holds other values of tensor '{name}' than model_world_size_4_{first}.pt"
    wconv("inspect", tmp_path / "m", exit_code=3 if form == "zip" else 0)
    before = snapshot(tmp_path)
    assert said in wconv("to-safetensors", tmp_path / "m", exit_code=3).stderr
    assert snapshot(tmp_path) == before


def test_replicas_without_sums_are_compared_as_they_are_read(tmp_path: Path) -> None:
    def make(mesh: DeviceMesh, rank: int) -> State:
        # The same numbers, at another place of a storage and in another order.
        turned = torch.cat([torch.zeros(rank, 12), WEIGHT.t()])[rank:].t()
        return {"w": turned}

    path = write_ranks(tmp_path, (3,), make)
    assert isinstance(read_file(path).tensors[0].source, Replicas)
    assert_same(state_of(path), {"w": WEIGHT})


def test_replicas_with_sums_are_read_once(tmp_path: Path) -> None:
    path = write_ranks(
        tmp_path, (2, 2), lambda mesh, _: {"w": by_torch(Replicate(), Shard(0))(WEIGHT, mesh), "p": WEIGHT}
    )
    whole, plain = (tensor.source for tensor in read_file(path).tensors)
    assert isinstance(whole, Boxes)
    assert [type(box.source) for box in whole.boxes] == [View, View]
    assert isinstance(plain, View)


REFUSED: dict[str, tuple[Cut, str]] = {
    "sums": (lambda whole, mesh: DTensor.from_local(whole, mesh, [Partial()]), "'w' is placed on its ranks as Partial"),
    "strides of no mesh": (by_torch(Strided(0, split_factor=3)), "'w' is cut along its axis 0 into strides of 3"),
    "a dtype that is none": (
        lambda whole, mesh: by_torch(Shard(0))(whole.to(torch.complex128), mesh), "'w' .*complex128"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("cut", "problem"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_part_of_a_whole_is_refused(cut: Cut, problem: str, tmp_path: Path) -> None:
    path = write_ranks(tmp_path, (2,), lambda mesh, _: {"w": cut(WEIGHT, mesh)})
    with pytest.raises(Unsupported, match=problem):
        read_file(path)


def test_code_in_any_rank(wconv: Callable[..., Any], tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, ("touch ran",)

    write_ranks(tmp_path, (2,), lambda mesh, rank: {**rows(mesh, rank), **({"x": Runs()} if rank else {})})
    assert "rank_1.pt: its pickle calls" in wconv("to-safetensors", tmp_path, exit_code=3).stderr
    told = wconv("to-safetensors", tmp_path, "--strip-code", "-o", tmp_path / "out")
    assert "not called" in told.stdout + told.stderr
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), {"w": WEIGHT})


def test_a_state_dict_is_chosen_in_each_rank(wconv: Callable[..., Any], tmp_path: Path) -> None:
    write_ranks(
        tmp_path, (2,), lambda mesh, rank: {"a": rows(mesh, rank), "b": {"v": by_torch(Shard(1))(WEIGHT, mesh)}}
    )
    assert "--key" in wconv("to-safetensors", tmp_path, exit_code=2).stderr
    wconv("to-safetensors", tmp_path, "--key", "b")
    assert_same(load_file(tmp_path / "model.safetensors"), {"v": WEIGHT})


# What a file could say, one lie at a time. Each is of a DTensor of 8 rows on a mesh of 2 x 2, at (1, 0).


def kept(name: str, state: Any = None, arguments: Any = ()) -> KeptObject:
    one = KeptObject(Kept(name), arguments)
    one.state = state
    return one


F32 = DTYPES["F32"]
TYPES = "torch.distributed.tensor.placement_types."


def local(*shape: int) -> TensorRef:
    storage = StorageRef(F32, "0", "cpu", math.prod(shape))
    return TensorRef(storage, F32, 0, shape, contiguous_strides(shape))


def dtensor(mesh: Any = None, spec: Any = None, **more: Any) -> Listed:
    axes = tuple(kept("_FlatLayout", {"shape": (2,), "stride": (1,)}) for _ in range(2))
    told = {"_layout": kept("_MeshLayout", {"axes": axes}), "_coordinate_on_dim": (1, 0), **(mesh or {})}
    placements = (kept(TYPES + "Shard", {"dim": 0}), kept(TYPES + "Replicate", {}))
    state = {"mesh": kept("DeviceMesh", told), "placements": placements, **(spec or {})}
    attributes = {"_local_tensor": local(4, 3), "_spec": kept("DTensorSpec", state), **more}
    return Listed(F32, (8, 3), Part("torch.distributed.tensor.DTensor", (None, attributes)))


def layout(*shapes: Any) -> dict[str, Any]:
    return {"_layout": kept("_MeshLayout", {"axes": tuple(kept("_FlatLayout", {"shape": shape}) for shape in shapes)})}


def on_axis(dim: Any, name: str = "Shard", **more: Any) -> dict[str, Any]:
    return {"placements": (kept(TYPES + name, {"dim": dim, **more}), kept(TYPES + "Replicate", {}))}


def shards(*told: tuple[Any, Any, Any], size: Any = (8, 3), world: Any = 2) -> Listed:
    made = [
        kept("Shard", (None, {"tensor": tensor, "metadata": kept("M", {"shard_offsets": start, "shard_sizes": shape})}))
        for start, shape, tensor in told
    ]
    state = (made, kept("Metadata", {"size": size}), kept("Group", {"global_world_size": world}))
    return Listed(F32, (8, 3), Part("torch.distributed._shard.sharded_tensor.api.ShardedTensor", state))


def test_what_the_lies_are_made_of_is_none() -> None:
    [(start, shape, _)], world = ranks._parts_of(dtensor(), "w", place_of("f.pt"))
    assert (start, shape, world) == ((4, 0), (4, 3), 4)
    parts, world = ranks._parts_of(
        shards(([4, 0], [1, 3], local(1, 3)), ([6, 0], [2, 3], local(2, 3))), "w", place_of("f")
    )
    assert ([part[:2] for part in parts], world) == ([((4, 0), (1, 3)), ((6, 0), (2, 3))], 2)


CYCLE = kept("DeviceMesh", {"_coordinate_on_dim": (1, 0), **layout((2,), (2,))})
CYCLE.state["_root_mesh"] = CYCLE
LIES: dict[str, tuple[Listed, type[WconvError]]] = {
    "a mesh without an end": (dtensor(layout((1 << 62,) * 90, (2,))), BadFile),
    "a mesh of axes without an end": (dtensor(layout(*[(2,)] * 200)), BadFile),
    "a mesh of nothing": (dtensor(layout((0,), (2,))), BadFile),
    "a mesh below nothing": (dtensor(layout((-2,), (-2,))), BadFile),
    "a mesh of text": (dtensor(layout("22", (2,))), BadFile),
    "a mesh with fewer axes": (dtensor(layout((2,))), BadFile),
    "a mesh that is a number": (dtensor(spec={"mesh": 7}), BadFile),
    "a place beyond the mesh": (dtensor({"_coordinate_on_dim": (2, 0)}), BadFile),
    "a place before the mesh": (dtensor({"_coordinate_on_dim": (-1, 0)}), BadFile),
    "a place on other axes": (dtensor({"_coordinate_on_dim": (1,)}), BadFile),
    "a place of True": (dtensor({"_coordinate_on_dim": (True, 0)}), BadFile),
    "a place nowhere, and a tensor": (dtensor({"_coordinate_on_dim": None}), BadFile),
    "an axis that is not there": (dtensor(spec=on_axis(2)), BadFile),
    "an axis below all": (dtensor(spec=on_axis(-1)), BadFile),
    "an axis without an end": (dtensor(spec=on_axis(1 << 70)), BadFile),
    "another axis": (dtensor(spec=on_axis(1)), BadFile),
    "strides of nothing": (dtensor(spec=on_axis(0, "_StridedShard", split_factor=0)), Unsupported),
    "a mask": (dtensor(spec=on_axis(0, "_MaskPartial")), Unsupported),
    "a placement of another module": (
        dtensor(spec={"placements": (kept("torch.distributed.x.Shard", {"dim": 0}),) * 2}), Unsupported
    ),
    "placements in a list": (dtensor(spec={"placements": []}), BadFile),
    "an order of other axes": (dtensor(spec={"shard_order": (kept("E", None, (0, (1,))),)}), Unsupported),
    "an order of no axes": (dtensor(spec={"shard_order": ()}), Unsupported),
    "an order that is none": (dtensor(spec={"shard_order": 3}), BadFile),
    "a smaller local tensor": (dtensor(_local_tensor=local(3, 3)), BadFile),
    "a local tensor that is a part itself": (dtensor(_local_tensor=dtensor()), Unsupported),
    "no local tensor": (dtensor(_local_tensor=None), Unsupported),
    "no state": (Listed(F32, (8, 3), Part("torch.distributed.tensor.DTensor", None)), BadFile),
    "a state of three": (Listed(F32, (8, 3), Part("torch.distributed.tensor.DTensor", (None, {}, {}))), BadFile),
    "another class": (Listed(F32, (8, 3), Part("torch.distributed.tensor.XTensor", None)), Unsupported),
    "shards of another whole": (shards(size=(9, 3)), BadFile),
    "a shard of other axes": (shards(([0], [4], local(4))), BadFile),
    "a shard of another size": (shards(([0, 0], [4, 3], local(3, 3))), BadFile),
    "a shard before the begin": (shards(([-4, 0], [4, 3], local(4, 3))), BadFile),
    "shards on too many ranks": (shards(world=1 << 40), HostileFile),
    "shards on no rank": (shards(world=0), HostileFile),
    "shards that are none": (shards((None, None, None)), BadFile),
}  # fmt: skip


@pytest.mark.parametrize(("listed", "error"), LIES.values(), ids=LIES)
def test_a_lie_is_refused(listed: Listed, error: type[WconvError]) -> None:
    with pytest.raises(error, match="'w'"):
        ranks._parts_of(listed, "w", place_of("f.pt"))


def test_a_state_that_holds_itself() -> None:
    assert ranks._parts_of(dtensor(spec={"mesh": CYCLE}), "w", place_of("f.pt"))[1] == 4


def test_a_rank_that_is_none_of_the_mesh_holds_nothing() -> None:
    [(_, shape, _)], _ = ranks._parts_of(
        dtensor({"_coordinate_on_dim": None}, _local_tensor=local(0)), "w", place_of("f")
    )
    assert 0 in shape


def test_flat_parameters_by_their_older_name(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model_fsdp_rank0.bin"
    torch.save({"module.flat_param_0": torch.zeros(4)}, path)
    with pytest.raises(TrainingPiece, match="flat parameters"):
        read_file(path)

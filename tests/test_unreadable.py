"""A tensor that cannot be written is a refusal that names it, unless it is to be left out; then the rest is right."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.tiny import assert_same, make_state

from converter.errors import TrainingPiece
from converter.models.checkpoint import open_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")
BASE = torch.arange(16.0).reshape(4, 4)
PLAIN = make_state("ab")


class Subclass(torch.Tensor):
    """A class of a user's own."""


class OnAnotherDevice:
    """What torch writes of a tensor on XLA and the like (``Tensor._reduce_ex_internal``)."""

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_device_tensor_from_numpy, (np.ones(2), torch.float32, "xla:0", False)


def made(make: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


KINDS: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (lambda: BASE.to_sparse(), "is sparse"),
    "a sparse parameter": (lambda: torch.nn.Parameter(BASE.to_sparse_csr()), "is sparse"),
    "quantized": (lambda: torch.quantize_per_tensor(BASE, 0.1, 0, torch.qint8), "is quantized by torch"),
    "by channel": (lambda: torch.quantize_per_channel(BASE, torch.ones(4), torch.zeros(4), 0, torch.quint8),
                   "is quantized by torch"),
    "packed": (lambda: (torch.quantize_per_tensor(BASE, 0.1, 0, torch.qint8), None), "holds one that is quantized"),
    "nested": (lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "is nested"),
    "jagged": (lambda: torch.nested.nested_tensor([torch.zeros(2)], layout=torch.jagged), "NestedTensor"),
    "complex128": (lambda: torch.ones(3, dtype=torch.complex128), "is complex128"),
    "complex32": (lambda: torch.zeros(3, dtype=torch.complex32), "is complex32"),
    "meta": (lambda: torch.zeros(2, device="meta"), "has no values"),
    "float4": (lambda: torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "is float4_e2m1fn_x2"),
    "bits8": (lambda: torch.zeros(2, dtype=torch.uint8).view(torch.bits8), "is bits8"),
    "a subclass": (lambda: BASE.clone().as_subclass(Subclass), "Subclass"),
    "uninitialized": (torch.nn.UninitializedParameter, "is not initialized"),
    "of another device": (OnAnotherDevice, "move the model to the CPU"),
    "a storage": (lambda: torch.ones(3)._typed_storage(), "is a storage"),
    "an array": (lambda: np.ones(3), "is an array of numpy"),
}  # fmt: skip


@pytest.mark.parametrize("is_old", [False, True], ids=["zip", "stream"])
@pytest.mark.parametrize(("make", "why"), KINDS.values(), ids=KINDS)
def test_it_is_named_and_left_out_only_where_that_is_asked(
    wconv: Callable[..., Any], tmp_path: Path, make: Any, why: Any, is_old: bool
) -> None:
    path = tmp_path / "m.pt"
    state = {"a": PLAIN["a"], "odd.one": made(make), "b": PLAIN["b"]}
    torch.save(state, path, _use_new_zipfile_serialization=not is_old)
    done = wconv("to-safetensors", path, exit_code=4)
    assert "tensor 'odd.one'" in done.stderr
    assert why in done.stderr
    assert "--skip-unreadable" in done.stderr
    assert not (tmp_path / "m.safetensors").exists()
    assert why in wconv("inspect", path).stdout
    for option in ("--skip-unreadable", "--strip-code"):
        said = wconv("to-safetensors", path, option, "--overwrite").stdout
        assert "odd.one" in said
        assert_same(load_file(tmp_path / "m.safetensors"), PLAIN)


def test_a_state_dict_of_nothing_else(wconv: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"state_dict": {"x": BASE.to_sparse(), "y": BASE.to_sparse()}, "epoch": 3}, path)
    done = wconv("to-safetensors", path, exit_code=4)
    assert "tensor 'x' is sparse, and 1 more cannot be read" in done.stderr


def test_what_an_optimizer_keeps_is_no_matter(wconv: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    torch.save({"state_dict": PLAIN, "optimizer_states": [{"state": {0: {"exp_avg": BASE.to_sparse()}}}],
                "mean": np.ones(2)}, path)  # fmt: skip
    wconv("to-safetensors", path)
    assert_same(load_file(tmp_path / "m.safetensors"), PLAIN)


def test_a_part_of_a_distributed_tensor_is_named(wconv: Callable[..., Any], tmp_path: Path) -> None:
    """torch itself writes it, in one process that is all ranks."""
    import torch.distributed as dist
    from torch.distributed._shard.metadata import ShardMetadata
    from torch.distributed._shard.sharded_tensor import Shard as OldShard
    from torch.distributed._shard.sharded_tensor import init_from_local_shards
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    path = tmp_path / "weights.pt"
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        torch.save({"a": PLAIN["a"], "b.weight": distribute_tensor(BASE, mesh, [Shard(0)])}, path)
        shard = OldShard(BASE, ShardMetadata([0, 0], [4, 4], "rank:0/cpu"))
        torch.save({"w": init_from_local_shards([shard], 4, 4)}, tmp_path / "old.pt")
    finally:
        dist.destroy_process_group()
    with pytest.raises(TrainingPiece, match=r"tensor 'b\.weight' is of the class .*DTensor"):
        open_checkpoint(path)
    assert "one rank's part" in wconv("to-safetensors", path, exit_code=4).stderr
    with pytest.raises(TrainingPiece, match=r"tensor 'w' is of the class .*ShardedTensor"):
        open_checkpoint(tmp_path / "old.pt")
    wconv("to-safetensors", path, "--skip-unreadable", exit_code=4)


def test_a_later_dtype_of_torch_is_named(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    path = Path(tmp_path / "m.pt")
    torch.save({"w": torch.zeros(4, dtype=torch.float8_e8m0fnu)}, path)
    raw = path.read_bytes()
    assert raw.count(b"float8_e8m0fnu") == 1
    path.write_bytes(raw.replace(b"float8_e8m0fnu", b"float8_e9m9xyz"))
    done = wconv("to-safetensors", path, exit_code=None)
    assert done.exit_code in (3, 4)  # the record's CRC32 may be looked at first
    torch.save({"w": torch.zeros(4, dtype=torch.float8_e8m0fnu)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"float8_e8m0fnu", b"float8_e9m9xyz"))
    assert "tensor 'w' is float8_e9m9xyz" in wconv("to-safetensors", path, exit_code=4).stderr

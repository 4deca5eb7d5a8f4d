"""What every family of training samples needs: a folder for a sample, its judge, processes that are one group, a zip.

A sample is a folder: ``checkpoint/`` as the library leaves it, ``judge.safetensors`` with what the library's own reader
makes of it, and ``order.json`` with the names in that reader's order, as safetensors sorts by size.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the first date that a zip can hold: the same samples are the same bytes
MODE = 0o100644

State = dict[str, Any]


def start(name: str) -> Path:
    """Make the folder of a sample anew, with an empty checkpoint, and give the checkpoint's path."""
    shutil.rmtree(name, ignore_errors=True)
    folder = Path(name) / "checkpoint"
    folder.mkdir(parents=True)
    return folder


def flatten(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, torch.Tensor]]:
    """Give the tensors in nested dicts and lists, named by their path with dots."""
    if isinstance(value, torch.Tensor):
        yield ".".join(path), value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from flatten(item, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from flatten(item, (*path, str(index)))


def write_state(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write tensors with safetensors' own writer, each by itself: it takes no ties and no views."""
    save_file({name: tensor.detach().resolve_conj().clone().contiguous() for name, tensor in state.items()}, path)


def judge(checkpoint: Path, value: Any) -> None:
    """Put what the real reader gives beside the checkpoint."""
    state = dict(flatten(value))
    write_state(checkpoint.parent / "judge.safetensors", state)
    (checkpoint.parent / "order.json").write_text(json.dumps(list(state), indent=1) + "\n")


def same(one: Any, other: Any) -> None:
    """Hold two trees against each other, names and bits: a judge that is wrong judges nothing."""
    ones, others = dict(flatten(one)), dict(flatten(other))
    assert ones.keys() == others.keys(), sorted(ones.keys() ^ others.keys())
    for name, tensor in ones.items():
        assert tensor.dtype == others[name].dtype, name
        assert torch.equal(tensor, others[name]), name


def whole(state: Mapping[str, Any]) -> State:
    """Gather every sharded tensor of a state dict; all ranks must ask."""
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}


def spawn(world: int, task: Callable[..., None], *args: Any) -> None:
    """Run TASK in as many processes, which are one gloo group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_join, (world, port, task, args), nprocs=world)


def _join(rank: int, world: int, port: int, task: Callable[..., None], args: tuple[Any, ...]) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "LOCAL_SIZE": world}
    os.environ.update(
        {name: str(value) for name, value in places.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        task(*args)
    dist.barrier()
    dist.destroy_process_group()


def pack(folder: Path, target: Path) -> None:
    """Write a sample as one zip: names sorted, no dates."""
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
            if path.is_file():
                entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), LONG_AGO)
                entry.external_attr = MODE << 16
                archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED, 9)

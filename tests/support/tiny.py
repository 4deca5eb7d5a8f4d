"""Checkpoints of a few hundred bytes, damage done to them, and facts about folders.

Written by torch and safetensors, never by the converter, and without a model library. A state dict is tensors of
eight float32 values, so 32 bytes each, in the order of their names.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from converter.dtypes import DType
from converter.formats import read_file as read_placed
from converter.storage import FileRef, Place, place_of
from converter.tensors.base import Storage, WeightsFile
from converter.tensors.view import View, contiguous_strides

State = dict[str, torch.Tensor]
TENSOR_NBYTES = 32
LEFT_BEHIND = ".wconv"


def make_state(names: str = "abcdef", seed: int = 0, dtype: torch.dtype = torch.float32) -> State:
    """Make a tensor for each letter."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(8, generator=generator).to(dtype) for name in names}


def ref_to(path: Path | str) -> FileRef:
    """Name a file that nobody looks at."""
    return FileRef(place_of(path))


def whole_view(dtype: DType, shape: tuple[int, ...], storage: Storage) -> View:
    """Give the view that is all of a storage, in row-major order."""
    return View(dtype, shape, storage, 0, contiguous_strides(shape))


def read_file(path: Place | Path) -> WeightsFile:
    """Read the header of a file by its path, or place."""
    return read_placed(place_of(path))


def save(state: State, path: Path) -> Path:
    """Write one file, as its suffix asks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(state, path, {"format": "pt"})
    else:
        torch.save(state, path)
    return path


def save_shards(
    state: State, folder: Path, parts: Sequence[Sequence[str]], shard: str, index: str | None, **metadata: object
) -> Path:
    """Write shards named by the pattern ``shard``; ``parts`` has the names in each; give the index, or shard 1."""
    weight_map = {}
    for number, names in enumerate(parts, 1):
        file_name = shard.format(number, len(parts))
        save({name: state[name] for name in names}, folder / file_name)
        weight_map.update(dict.fromkeys(names, file_name))
    if index is None:
        return folder / shard.format(1, len(parts))
    return write_json(folder / index, {"metadata": metadata, "weight_map": weight_map})


def save_bin_shards(state: State, folder: Path, parts: Sequence[str] = ("ab", "cd", "ef")) -> Path:
    """Write ``pytorch_model`` shards with an index, as transformers names them."""
    return save_shards(state, folder, parts, "pytorch_model-{:05d}-of-{:05d}.bin", "pytorch_model.bin.index.json")


def save_safetensors_shards(state: State, folder: Path, parts: Sequence[str] = ("ab", "cd", "ef")) -> Path:
    """Write ``model`` shards with an index, as transformers names them."""
    return save_shards(state, folder, parts, "model-{:05d}-of-{:05d}.safetensors", "model.safetensors.index.json")


def save_pipeline(folder: Path, variant: str | None = None) -> Path:
    """Write a Diffusers pipeline folder: a sharded unet, a vae, a text encoder, a tokenizer and a scheduler."""
    dotted = f".{variant}" if variant else ""
    library = {"unet": "diffusers", "vae": "diffusers", "text_encoder": "transformers", "scheduler": "diffusers"}
    write_json(folder / "model_index.json", {"_class_name": "P", **{name: [library[name], "C"] for name in library}})
    save_shards(
        make_state(seed=1),
        folder / "unet",
        ("abc", "def"),
        "diffusion_pytorch_model" + dotted + "-{:05d}-of-{:05d}.bin",
        f"diffusion_pytorch_model.bin.index{dotted}.json",
        total_size=6 * TENSOR_NBYTES,
    )
    write_json(folder / "unet" / "config.json", {"_class_name": "UNet2DConditionModel"})
    save(make_state(seed=2), folder / "vae" / f"diffusion_pytorch_model{dotted}.bin")
    write_json(folder / "vae" / "config.json", {"_class_name": "AutoencoderKL"})
    save(make_state(seed=3), folder / "text_encoder" / f"pytorch_model{dotted}.bin")
    write_json(folder / "text_encoder" / "config.json", {"architectures": ["CLIPTextModel"]})
    write_json(folder / "tokenizer" / "vocab.json", {"a": 0})
    write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler"})
    return folder


def write_json(path: Path, content: object) -> Path:
    """Write JSON as the libraries do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return path


def load_set(folder: Path, stem: str = "model") -> State:
    """Load a safetensors set by its index, or from its single file where it has none."""
    index = folder / f"{stem}.safetensors.index.json"
    if not index.exists():
        return load_file(folder / f"{stem}.safetensors")
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    state: State = {}
    for file_name in sorted(set(weight_map.values())):
        held = load_file(folder / file_name)
        assert {name for name, file in weight_map.items() if file == file_name} == held.keys()
        state.update(held)
    return state


def assert_same(state: State, expected: State) -> None:
    """Hold state dicts against each other, bit for bit."""
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype
        assert state[name].shape == tensor.shape
        assert state[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).contiguous().view(torch.uint8)), name


def is_same(state: State, expected: State) -> bool:
    """Say whether state dicts are the same, bit for bit."""
    try:
        assert_same(state, expected)
    except AssertionError:
        return False
    return True


def snapshot(folder: Path) -> dict[str, str]:
    """Give every entry below a folder with a hash of what it holds; equal snapshots are equal folders."""
    entries = {}
    for path in sorted(folder.rglob("*")):
        held = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
        raw = held if isinstance(held, bytes) else str(held).encode()
        entries[path.relative_to(folder).as_posix()] = hashlib.sha256(raw).hexdigest()
    return entries


def unmeasured() -> dict[str, str]:
    """Give the environment for a program whose memory or modules count: not those of what measures what tests reach."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}


def left_behind(folder: Path) -> list[str]:
    """List what a run should have cleaned up: staging folders and locks."""
    return [name for name in snapshot(folder) if LEFT_BEHIND in name]


def names_in(folder: Path) -> list[str]:
    """List the files below a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def link(path: Path, to: Path, how: str) -> None:
    """Let ``path`` be a link to a file, in one of the layouts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if how == "hard":
        os.link(to, path)
    elif how == "absolute":
        path.symlink_to(to)
    elif how == "relative":
        path.symlink_to(os.path.relpath(to, path.parent))
    else:
        between = to.parent.parent / "between" / to.name
        link(between, to, "absolute")
        link(path, between, "relative")


def put_behind(folder: Path, store: Path, how: str) -> Path:
    """Move all files of a folder into a store, and leave links to them; give the folder."""
    store.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.rglob("*"))):
        if path.is_file():
            kept = path.rename(store / f"{number:064x}")
            link(path, kept, how)
    return folder


def rezip(
    path: Path,
    edits: Mapping[str, bytes | Callable[[bytes], bytes] | None] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """Write an archive anew with records replaced, edited or (None) left out; names are without the root folder."""
    edits = dict(edits or {})
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(records)).partition("/")[0]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            edit = edits.pop(name.removeprefix(f"{root}/"), content)
            if edit is not None:
                archive.writestr(name, edit(content) if callable(edit) else edit)
        for name, added in edits.items():
            assert isinstance(added, bytes)
            archive.writestr(f"{root}/{name}", added)
    return path


def flip_byte(path: Path, content: bytes) -> Path:
    """Flip a bit in the one place of a file where ``content`` lies."""
    raw = path.read_bytes()
    assert raw.count(content) == 1
    place = raw.index(content)
    path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
    return path


@contextlib.contextmanager
def processor_time(seconds: float) -> Iterator[None]:
    """Hold what is done to a time of this process alone: many times what it takes, so that only what grows fails."""
    begun = time.process_time()
    yield
    assert time.process_time() - begun < seconds


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """Give the bytes of a tensor."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())

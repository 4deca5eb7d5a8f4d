"""Small folders of weights for `same_bytes.py`: one function each, named as the table of command lines names it.

torch, safetensors, Diffusers and transformers write them, as they write those of the tests, whose helpers serve here;
the converter takes no part. A function makes what its folder holds; what is random has a fixed seed.
"""

from __future__ import annotations

import functools
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support import builders, original
from support.tiny import (
    flip_byte,
    link,
    make_state,
    raw_bytes,
    rezip,
    save,
    save_bin_shards,
    save_pipeline,
    save_safetensors_shards,
    write_json,
)

Maker = Callable[[Path], object]
SOURCES: dict[str, Maker] = {}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
OTHERS = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
    torch.uint64, torch.complex64,
)  # fmt: skip
# Rounded up and down, to a tie, below what is normal; nothing here is too large for float16.
ODD_VALUES = (1.00048828125, 1.0009765625, -1.00390625, 3e-8, -6e-5, 0.0, -0.0, 65504.0)
GPT2 = {"vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}


def source(make: Maker) -> Maker:
    """Enter a function under its name."""
    SOURCES[make.__name__] = make
    return make


class Foreign:
    """A class of somebody's training script."""


class Opener:
    """What opens a file where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("canary", "w")


# Files of torch.


@source
def bin_file(folder: Path) -> None:
    save(make_state(), folder / "pytorch_model.bin")


@source
def bin_shards(folder: Path) -> None:
    save_bin_shards(make_state(), folder)
    write_json(folder / "config.json", {"model_type": "made-up", "torch_dtype": "float32"})
    (folder / "README.md").write_text("# made up\n")


@source
def old_torch(folder: Path) -> None:
    state = {**make_state(), "t": torch.arange(12.0).reshape(3, 4).T, "half": torch.ones(5).half()}
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


@source
def big_endian(folder: Path) -> None:
    values = torch.randn(40, generator=torch.Generator().manual_seed(1))
    path = save({"a": values, "t": values.reshape(8, 5).T}, folder / "pytorch_model.bin")
    rezip(path, {"data/0": values.numpy().astype(">f4").tobytes(), "byteorder": b"big"})


@source
def deflated(folder: Path) -> None:
    state = {**make_state(), "t": torch.arange(3000.0).reshape(60, 50).T}
    rezip(save(state, folder / "pytorch_model.bin"), compression=zipfile.ZIP_DEFLATED)


@source
def views(folder: Path) -> None:
    whole = torch.randn(6, 8, generator=torch.Generator().manual_seed(2))
    state = {"whole": whole, "t": whole.T, "rows": whole[1:4], "steps": whole[1:, ::2], "again": whole}
    state |= {"expanded": torch.ones(3, 1).expand(3, 4), "none": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}
    state["swapped"] = torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1)
    torch.save(state, folder / "pytorch_model.bin")


@source
def lazy_views(folder: Path) -> None:
    numbers = torch.tensor([[1 + 2j, 3 - 4j], [0.5j, 2.0]])
    torch.save({"conj": numbers.conj(), "neg": numbers.clone().conj().imag, "plain": numbers}, folder / "model.pt")


def every_dtype() -> dict[str, torch.Tensor]:
    numbers = torch.tensor([0.0, 1.0, 0.5, 100.0, 3.0])
    return {str(dtype).removeprefix("torch."): numbers.to(dtype) for dtype in (*FLOATS, *OTHERS)}


@source
def dtypes_bin(folder: Path) -> None:
    torch.save(every_dtype(), folder / "pytorch_model.bin")


@source
def dtypes(folder: Path) -> None:
    save(every_dtype(), folder / "model.safetensors")


@source
def training(folder: Path) -> None:
    state = make_state()
    optimizer = {"state": {0: {"exp_avg": torch.ones(8)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({"state_dict": state, "optimizer": optimizer, "epoch": 3}, folder / "last.ckpt")


@source
def two_states(folder: Path) -> None:
    torch.save({"model": make_state("ab"), "ema": make_state("ab", seed=1)}, folder / "model.pt")


@source
def prefixed(folder: Path) -> None:
    torch.save({f"module.{name}": tensor for name, tensor in make_state().items()}, folder / "pytorch_model.bin")


@source
def foreign(folder: Path) -> None:
    torch.save({"state_dict": make_state("ab"), "options": Foreign()}, folder / "model.pt")


@source
def calls(folder: Path) -> None:
    torch.save({"state_dict": make_state("ab"), "x": Opener()}, folder / "model.pt")


@source
def sparse(folder: Path) -> None:
    torch.save({**make_state("ab"), "s": torch.eye(3).to_sparse()}, folder / "pytorch_model.bin")


@source
def whole_module(folder: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), folder / "model.pt")


@source
def damaged(folder: Path) -> None:
    state = make_state()
    flip_byte(save(state, folder / "pytorch_model.bin"), raw_bytes(state["c"]))


@source
def cut_short(folder: Path) -> None:
    path = save(make_state(), folder / "pytorch_model.bin")
    path.write_bytes(path.read_bytes()[:-300])


# Files of safetensors, and values that a cast must look at.


@source
def safetensors_file(folder: Path) -> None:
    save(make_state(), folder / "model.safetensors")


@source
def safetensors_shards(folder: Path) -> None:
    save_safetensors_shards(make_state(), folder)


@source
def odd_values(folder: Path) -> None:
    special = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1.0]])
    state = {"odd": torch.tensor(ODD_VALUES).reshape(2, 4), "special": special}
    save(state, folder / "model.safetensors")


@source
def too_large(folder: Path) -> None:
    save({**make_state("ab"), "large": torch.tensor([1e5, -7e4, 500.0, 1.0])}, folder / "model.safetensors")


@source
def large(folder: Path) -> None:
    """Write tensors that do not fit into the buffers of a run, one of them transposed."""
    values = np.random.default_rng(3).standard_normal((1500, 1000), dtype=np.float32)
    save({"a": torch.from_numpy(values), "t": torch.from_numpy(values).T}, folder / "pytorch_model.bin")


@source
def behind_links(folder: Path) -> None:
    save(make_state(), folder / "store" / "blob")
    link(folder / "model" / "pytorch_model.bin", folder / "store" / "blob", "relative")


# Models, as their libraries write them.


def model_named(name: str) -> Any:
    """Make a tiny model with random numbers; under the same name the same."""
    if name == "gpt2":
        import transformers

        return builders.shake(transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).eval())
    return builders.shake(builders.MODELS[name]())


def add_models() -> None:
    """Enter each model under its name, in safetensors, and under name_bin as shards of `.bin`."""
    for name in (*builders.MODELS, "gpt2"):
        SOURCES[name] = functools.partial(write_model, name)
        SOURCES[f"{name}_bin"] = functools.partial(write_model_bin, name)


def write_model(name: str, folder: Path) -> None:
    builders.save_safetensors(model_named(name), folder)


def write_model_bin(name: str, folder: Path) -> None:
    builders.save_bin(model_named(name), folder, builders.SHARDS)


def add_single_files() -> None:
    """Enter Stable Diffusion in its own layout: as a checkpoint of a trainer, as safetensors, with averages."""
    for kind in original.ENCODERS:
        for ext in ("ckpt", "safetensors"):
            SOURCES[f"{kind}_{ext}"] = functools.partial(write_single_file, kind, ext)


def write_single_file(kind: str, ext: str, folder: Path) -> None:
    model = builders.shake(builders.make_sdxl() if kind == "sdxl" else builders.make_sd(safety_checker=False))
    model.save_pretrained(folder / "config")
    for name in ("tokenizer", "tokenizer_2"):
        if (folder / "config" / name).exists():
            shutil.rmtree(folder / "config" / name)
            builders.write_tokenizer(folder / "config" / name)
    for path in (folder / "config").rglob("*.safetensors"):
        path.unlink()
    parts = builders.models_in(model)
    states = {
        name: builders.state_as_published(part) if "text" in name else part.state_dict() for name, part in parts.items()
    }
    state = original.as_original(kind, states, {name: part.config for name, part in parts.items()})
    state |= original.averaged(state)
    if ext == "ckpt":
        torch.save({"state_dict": state, "global_step": 470000}, folder / "model.ckpt")
    else:
        save({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")


add_models()
add_single_files()


# Variants, and folders that are broken.


@source
def pipeline_fp16(folder: Path) -> None:
    save_pipeline(folder, "fp16")


@source
def legacy_names(folder: Path) -> None:
    save_pipeline(folder, "fp16")
    builders.respell_legacy(folder / "unet", "fp16", index_too=True)


@source
def no_index(folder: Path) -> None:
    safetensors_shards(folder)
    (folder / "model.safetensors.index.json").unlink()


def edit_index(folder: Path, **changed: Any) -> None:
    """Write three shards, and an index with other content."""
    safetensors_shards(folder)
    path = folder / "model.safetensors.index.json"
    content = {"metadata": {}, "weight_map": dict.fromkeys("abcdef", "model-00001-of-00003.safetensors"), **changed}
    write_json(path, content)


@source
def wrong_index(folder: Path) -> None:
    edit_index(folder)


@source
def wrong_size(folder: Path) -> None:
    safetensors_shards(folder)
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('"metadata": {}', '"metadata": {"total_size": 1}'))


@source
def index_cut_short(folder: Path) -> None:
    safetensors_shards(folder)
    path = folder / "model.safetensors.index.json"
    path.write_bytes(path.read_bytes()[:100])


@source
def shard_missing(folder: Path) -> None:
    safetensors_shards(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


@source
def set_twice(folder: Path) -> None:
    safetensors_shards(folder)
    safetensors_file(folder)


@source
def index_of_nothing(folder: Path) -> None:
    set_twice(folder)
    for path in folder.glob("*-of-*"):
        path.unlink()


@source
def partial_variant(folder: Path) -> None:
    """Write a pipeline whose vae alone has the variant."""
    save_pipeline(folder)
    save(make_state(seed=2, dtype=torch.float16), folder / "vae" / "diffusion_pytorch_model.fp16.safetensors")


@source
def not_numbers(folder: Path) -> None:
    save({"nan": torch.tensor([float("nan"), 1.0]), "zero": torch.zeros(4)}, folder / "model.safetensors")

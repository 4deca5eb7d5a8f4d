"""``wconv to-bin``: names, shards and what Diffusers does not load; the archives themselves are in test_torch_write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.tiny import assert_same, make_state, names_in, save, save_safetensors_shards, snapshot, write_json

STATE = make_state()


def load(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True, mmap=True)


@pytest.mark.parametrize(
    ("source", "written"),
    [
        ("model.safetensors", "pytorch_model.bin"),
        ("model.fp16.safetensors", "pytorch_model.fp16.bin"),
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        ("diffusion_pytorch_model.bf16.safetensors", "diffusion_pytorch_model.bf16.bin"),
        ("lora.safetensors", "lora.bin"),
    ],
)
@pytest.mark.parametrize("place", ["beside", "new"])
def test_names(source: str, written: str, place: str, wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(STATE, tmp_path / "m" / source)
    target = tmp_path / ("m" if place == "beside" else "out")
    wconv("to-bin", tmp_path / "m" / source, *(() if place == "beside" else ("-o", target)))
    assert names_in(target) == sorted([written, *([source] if place == "beside" else [])])
    assert_same(load(target / written), STATE)


def test_an_output_may_be_a_file_name(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(STATE, tmp_path / "m.safetensors")
    wconv("to-bin", tmp_path / "m.safetensors", "-o", tmp_path / "out.pt")
    assert_same(load(tmp_path / "out.pt"), STATE)


def test_every_variant(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(STATE, tmp_path / "model.safetensors")
    save(make_state(seed=1), tmp_path / "model.ema.safetensors")
    wconv("to-bin", tmp_path)
    assert_same(load(tmp_path / "pytorch_model.bin"), STATE)
    assert_same(load(tmp_path / "pytorch_model.ema.bin"), make_state(seed=1))


def test_shards_and_their_index(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_safetensors_shards(STATE, tmp_path / "m")
    wconv("to-bin", tmp_path / "m", "-o", tmp_path / "out")
    index = json.loads((tmp_path / "out" / "pytorch_model.bin.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in STATE.values())
    for number, letters in enumerate(("ab", "cd", "ef"), 1):
        name = f"pytorch_model-0000{number}-of-00003.bin"
        assert_same(load(tmp_path / "out" / name), {letter: STATE[letter] for letter in letters})
        assert all(index["weight_map"][letter] == name for letter in letters)


def test_transformers_shards_load(builders: Any, wconv: Callable[..., Any], tmp_path: Path) -> None:
    model = builders.make_llama(tied=True)
    builders.save_safetensors(model, tmp_path / "m", 3)
    wconv("to-bin", tmp_path / "m", "-o", tmp_path / "out")
    loaded = type(model).from_pretrained(tmp_path / "out", use_safetensors=False)
    assert_same(dict(loaded.state_dict()), dict(model.state_dict()))


def test_a_diffusers_component_loads(builders: Any, wconv: Callable[..., Any], tmp_path: Path) -> None:
    model = builders.make_vae()
    builders.save_safetensors(model, tmp_path / "m", 3)
    wconv("to-bin", tmp_path / "m", "-o", tmp_path / "out", "--max-shard-size", "none")
    loaded = type(model).from_pretrained(tmp_path / "out", use_safetensors=False)
    assert_same(dict(loaded.state_dict()), dict(model.state_dict()))


def test_sharded_bin_for_diffusers_is_refused(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_safetensors_shards(STATE, tmp_path / "m")
    write_json(tmp_path / "m" / "config.json", {"_class_name": "UNet2DConditionModel"})
    before = snapshot(tmp_path)
    outcome = wconv("to-bin", tmp_path / "m", exit_code=4)
    assert outcome.stderr == (
        f"{tmp_path}/m/model.safetensors.index.json: would become sharded .bin, which no Diffusers pipeline loads. "
        "Use --max-shard-size none, or --force.\n"
    )
    assert snapshot(tmp_path) == before
    wconv("to-bin", tmp_path / "m", "--max-shard-size", "none", "-o", tmp_path / "one")
    assert_same(load(tmp_path / "one" / "pytorch_model.bin"), STATE)
    wconv("to-bin", tmp_path / "m", "--force", "-o", tmp_path / "forced")
    assert len(list((tmp_path / "forced").glob("*.bin"))) == 3


def test_recast_on_the_way(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(STATE, tmp_path / "m" / "model.safetensors")
    wconv("to-bin", tmp_path / "m", "--dtype", "fp16", "--variant", "fp16", "--keep-fp32", "b")
    expected = {name: tensor if name == "b" else tensor.half() for name, tensor in STATE.items()}
    assert_same(load(tmp_path / "m" / "pytorch_model.fp16.bin"), expected)


def test_what_is_in_bin_already_stays(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(STATE, tmp_path / "pytorch_model.bin")
    before = snapshot(tmp_path)
    assert "Up to date" in wconv("to-bin", tmp_path).stdout
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("args", [(), ("--dry-run",)])
def test_output_that_exists_is_refused(args: tuple[Any, ...], wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(STATE, tmp_path / "model.safetensors")
    save(make_state(seed=1), tmp_path / "pytorch_model.bin")
    before = snapshot(tmp_path)
    outcome = wconv("to-bin", tmp_path, *args, exit_code=5)
    assert "pytorch_model.bin: exists, and is not what would be written: " in outcome.stderr
    assert snapshot(tmp_path) == before
    if not args:
        wconv("to-bin", tmp_path, "--overwrite")
        assert_same(load(tmp_path / "pytorch_model.bin"), STATE)


def test_what_torch_does_not_have_is_refused(wconv: Callable[..., Any], tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    outcome = wconv("to-bin", tmp_path / "m.safetensors", exit_code=4)
    assert outcome.stderr.count("\n") == 1
    assert "F4" in outcome.stderr
    assert names_in(tmp_path) == ["m.safetensors"]


def test_a_tensor_with_the_name_of_a_format_is_no_tie(wconv: Callable[..., Any], tmp_path: Path) -> None:
    state = {"pt": torch.ones(2), "a": torch.zeros(1)}
    save_file(state, tmp_path / "m.safetensors", {"format": "pt", "b": "a"})
    wconv("to-bin", tmp_path / "m.safetensors", "-o", tmp_path / "out")
    assert torch.load(tmp_path / "out" / "m.bin").keys() == {"pt", "a", "b"}
    save_file({**state, "format": torch.ones(2)}, tmp_path / "other.safetensors")
    assert "format" in wconv("verify", tmp_path / "m.safetensors", tmp_path / "other.safetensors", exit_code=1).stdout

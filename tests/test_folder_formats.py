"""A format of many files in one folder is one row of a table: a made-up one goes the way of all weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import assert_same, make_state, raw_bytes, save, snapshot, whole_view, write_json

from converter.dtypes import DTYPES
from converter.errors import BadFile
from converter.formats import FOLDERS, FolderRow
from converter.formats.torch.state_dict import Reading
from converter.storage import OpenFile
from converter.tensors.base import ByteRange, Tensor, WeightsFile
from converter.tensors.derived import Box, Boxes

STATE = {"w": torch.randn(6, 4), "v": torch.randn(5).half()}
TAGS = {torch.float32: "F32", torch.float16: "F16"}


def read_hive(file: OpenFile, reading: Reading) -> WeightsFile:
    """Read a hive: its map says of each cell, a file of bare rows, which tensor it is of and where it begins."""
    folder = file.ref.place.parent

    def source_of(told: Mapping[str, Any]) -> Boxes:
        dtype = DTYPES[told["dtype"]]
        boxes = []
        for name, start, *shape in told["cells"]:
            info = (folder / name).info()
            if not info:
                raise BadFile(folder / name, "is not there, and hive.map names it")
            stored = ByteRange((folder / name).ref(), 0, info.nbytes)
            boxes.append(Box((start, *(0 for _ in shape[1:])), whole_view(dtype, tuple(shape), stored)))
        return Boxes(dtype, tuple(told["shape"]), tuple(boxes))

    told = json.loads(file.read(0, file.nbytes))
    tensors = tuple(Tensor(name, source_of(of)) for name, of in told.items())
    return WeightsFile(file.ref.place, "hive", tensors, {})


def write_hive(folder: Path, state: Mapping[str, torch.Tensor] = STATE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {}
    for name, tensor in state.items():
        cells: list[tuple[Any, ...]] = []
        for rows in tensor.split(2):
            cell = f"{name}{len(cells)}.cell"
            (folder / cell).write_bytes(raw_bytes(rows))
            cells.append((cell, 2 * len(cells), *rows.shape))
        told[name] = {"dtype": TAGS[tensor.dtype], "shape": tensor.shape, "cells": cells}
    (folder / "hive.map").write_text(json.dumps(told))
    return folder


@pytest.fixture(autouse=True)
def hive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FOLDERS, "hive", FolderRow(r"hive\.map|.+\.cell", r"hive\.map", (), read_hive))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_hive(tmp_path / "m")


def test_a_folder_is_converted(wconv: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_text("about")
    before = snapshot(folder)
    wconv("to-safetensors", folder, "-o", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "model.safetensors"]
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), STATE)
    wconv("to-bin", folder, "-o", tmp_path / "bin")
    assert_same(torch.load(tmp_path / "bin" / "pytorch_model.bin"), STATE)
    assert snapshot(folder) == before
    wconv("verify", folder, tmp_path / "out")
    wconv("verify", folder, tmp_path / "bin")


def test_a_recast_of_it_is_safetensors(wconv: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    wconv("recast", folder, "--dtype", "bf16", "-o", tmp_path / "out")
    read = load_file(tmp_path / "out" / "model.safetensors")
    assert_same(read, {name: tensor.bfloat16() for name, tensor in STATE.items()})
    wconv("recast", folder, "--dtype", "bf16")
    assert_same(load_file(folder / "model.bf16.safetensors"), read)


@pytest.mark.parametrize("named", ["", "hive.map", "w1.cell"])
def test_any_of_its_files_stands_for_all(wconv: Callable[..., Any], folder: Path, named: str) -> None:
    (told,) = json.loads(wconv("inspect", folder / named, "--json").stdout)["weight_sets"]
    assert (told["format"], told["tensors"], told["dtypes"]) == ("hive", 2, {"F32": 1, "F16": 1})
    wconv("to-safetensors", folder / named)
    assert_same(load_file(folder / "model.safetensors"), STATE)


def test_all_of_its_files_are_the_weights(wconv: Callable[..., Any], folder: Path) -> None:
    told = json.loads(wconv("inspect", folder, "--json").stdout)
    assert not any(told[key] for key in ("not_weights", "other_weights", "training_state"))
    before = snapshot(folder)
    told = wconv("to-safetensors", folder, "--delete-source", exit_code=2).stderr
    assert "holds more than weights" in told  # an optimizer, most often
    assert snapshot(folder) == before


def test_it_is_a_component_too(wconv: Callable[..., Any], tmp_path: Path) -> None:
    write_json(tmp_path / "m" / "model_index.json", {"_class_name": "P", "unet": ["diffusers", "UNet2DModel"]})
    write_hive(tmp_path / "m" / "unet")
    wconv("to-safetensors", tmp_path / "m", "-o", tmp_path / "out")
    assert_same(load_file(tmp_path / "out" / "unet" / "model.safetensors"), STATE)


def test_of_the_same_weights_in_safetensors_those_are_read(
    wconv: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    save_file(make_state("ab"), folder / "model.safetensors")
    wconv("recast", folder, "--dtype", "fp32", "-o", tmp_path / "out")
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), make_state("ab"))
    assert len(json.loads(wconv("inspect", folder, "--json").stdout)["weight_sets"]) == 2


def test_the_doctor_leaves_it_alone(wconv: Callable[..., Any], folder: Path) -> None:
    write_json(folder / "config.json", {"architectures": ["LlamaForCausalLM"]})
    before = snapshot(folder)
    told = wconv("doctor", folder).stdout
    assert "Healthy" in told
    assert " hive " in told
    wconv("doctor", folder, "--fix")
    assert snapshot(folder) == before
    told = wconv("doctor", folder, "--fix", "--make-variant", "bf16", exit_code=1).stdout
    assert "no file named pytorch_model.bin" in told  # transformers does not load it by itself
    assert {path.name for path in folder.iterdir()} == {*map(str, before), "model.bf16.safetensors"}


def test_what_is_lost_is_named(wconv: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    (folder / "w1.cell").unlink()
    assert "w1.cell: is not there" in wconv("to-safetensors", folder, "-o", tmp_path / "out", exit_code=3).stderr
    assert "w1.cell" in wconv("inspect", folder, exit_code=3).stderr
    (found,) = json.loads(wconv("doctor", folder, "--json", exit_code=1).stdout)["findings"]
    assert found["code"] == "file-damaged"


def test_it_has_no_variants(wconv: Callable[..., Any], folder: Path) -> None:
    before = snapshot(folder)
    told = wconv("rename-variant", folder, "--from", "none", "--to", "fp32", exit_code=4).stderr
    assert "no variants" in told
    assert snapshot(folder) == before


def test_a_row_may_say_why_nothing_reads_it(
    wconv: Callable[..., Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = FolderRow(r"hive\.map|.+\.cell", r"hive\.map", (), None, "is a hive", "Let the bees out.")
    monkeypatch.setitem(FOLDERS, "hive", row)
    for source in (folder, folder.parent):
        told = wconv("to-safetensors", source, "-o", tmp_path / "out", exit_code=4).stderr
        assert told == f"{folder}: is a hive. Let the bees out.\n"
    (found,) = json.loads(wconv("doctor", folder, "--json", exit_code=1).stdout)["findings"]
    assert found["code"] == "training-piece"
    save(make_state("ab"), folder / "model.safetensors")
    wconv("recast", folder, "--dtype", "bf16")

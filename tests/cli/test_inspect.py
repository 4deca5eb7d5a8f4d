"""``wconv inspect``: components, weight sets, ties, and what is not weights; headers only."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import (
    TENSOR_NBYTES,
    make_state,
    save,
    save_bin_shards,
    save_pipeline,
    save_shards,
    snapshot,
    write_json,
)

from converter.tensors.reader import RangeReader

STATE = make_state()


@pytest.fixture
def inspect(wconv: Callable[..., Any]) -> Any:
    """Run the command and read its JSON."""

    def run(path: Path, *args: str) -> dict[str, Any]:
        return dict(json.loads(wconv("inspect", path, "--json", *args).stdout))

    return run


def test_a_pipeline(inspect: Any, tmp_path: Path) -> None:
    save_pipeline(tmp_path)
    save(STATE, tmp_path / "v1-5.ckpt")
    (tmp_path / "unet" / "model.onnx").write_text("x")
    found = inspect(tmp_path)
    assert (found["path"], found["kind"], found["class"]) == (str(tmp_path), "pipeline", "P")
    assert [(one["component"], one["weights"], len(one["files"])) for one in found["weight_sets"]] == [
        ("text_encoder", "pytorch_model", 1),
        ("unet", "diffusion_pytorch_model", 2),
        ("vae", "diffusion_pytorch_model", 1),
    ]
    assert set(found["other_weights"]) == {"unet/model.onnx", "v1-5.ckpt"}
    assert "tokenizer/vocab.json" in found["not_weights"]


def test_a_weight_set(inspect: Any, tmp_path: Path) -> None:
    state = {**STATE, "g": torch.zeros(3, 4, dtype=torch.float16), "h": torch.tensor(1)}
    save_shards(state, tmp_path, ("abcdef", "gh"), "m-{:05d}-of-{:05d}.fp16.bin", "m.bin.fp16.index.json")
    (one,) = inspect(tmp_path)["weight_sets"]
    assert one == {
        "component": "",
        "weights": "m",
        "format": "torch",
        "variant": "fp16",
        "files": ["m-00001-of-00002.fp16.bin", "m-00002-of-00002.fp16.bin"],
        "index": "m.bin.fp16.index.json",
        "tensors": 8,
        "parameters": 6 * 8 + 12 + 1,
        "nbytes": 6 * TENSOR_NBYTES + 24 + 8,
        "dtypes": {"F32": 6, "F16": 1, "I64": 1},
        "tied": {},
        "quantized": [],
        "notes": [],
        "globals": {},
    }


def test_every_variant_and_format_is_listed(inspect: Any, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "pytorch_model.fp16.bin", "model.safetensors", "other.pt"):
        save(STATE, tmp_path / name)
    assert {(one["weights"], one["variant"], one["format"]) for one in inspect(tmp_path)["weight_sets"]} == {
        ("model", None, "safetensors"),
        ("other", None, "torch"),
        ("pytorch_model", None, "torch"),
        ("pytorch_model", "fp16", "torch"),
    }


def test_one_file_or_index(inspect: Any, tmp_path: Path) -> None:
    index = save_bin_shards(STATE, tmp_path)
    save(STATE, tmp_path / "other.bin")
    for path, files in ((index, 3), (tmp_path / "other.bin", 1)):
        found = inspect(path)
        assert (found["kind"], len(found["weight_sets"][0]["files"])) == ("file", files)
        assert found["other_weights"] == found["not_weights"] == []


def test_ties_are_shown_in_memory_and_as_recorded(inspect: Any, wconv: Callable[..., Any], tmp_path: Path) -> None:
    save({"a": STATE["a"], "t": STATE["a"]}, tmp_path / "pytorch_model.bin")
    wconv("to-safetensors", tmp_path, "--tied", "first")
    assert [one["tied"] for one in inspect(tmp_path)["weight_sets"]] == [{"t": "a"}, {"t": "a"}]
    assert "tied: t is a" in wconv("inspect", tmp_path).stdout


def test_tensors(inspect: Any, wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_bin_shards(STATE, tmp_path)
    (one,) = inspect(tmp_path, "--tensors")["weight_sets"]
    assert [tensor["name"] for tensor in one["all_tensors"]] == list("abcdef")
    assert one["all_tensors"][2] == {
        "name": "c",
        "dtype": "F32",
        "shape": [8],
        "file": "pytorch_model-00002-of-00003.bin",
    }
    shown = wconv("inspect", tmp_path, "--tensors").stdout
    assert re.search(r"^c +F32 +\[8\] +pytorch_model-00002-of-00003\.bin$", shown, re.MULTILINE)


def test_tensors_that_the_index_lacks_are_noted(inspect: Any, wconv: Callable[..., Any], tmp_path: Path) -> None:
    index = save_bin_shards(STATE, tmp_path)
    content = json.loads(index.read_text())
    del content["weight_map"]["f"]
    write_json(index, content)
    (note,) = inspect(tmp_path)["weight_sets"][0]["notes"]
    assert "'f'" in note
    assert note in wconv("inspect", tmp_path).stdout


def test_only_headers_are_read(wconv: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pipeline(tmp_path)
    monkeypatch.setattr(RangeReader, "read_into", lambda *_: pytest.fail("a tensor was read"))
    before = snapshot(tmp_path)
    shown = wconv("inspect", tmp_path).stdout
    assert snapshot(tmp_path) == before
    for name in ("text_encoder", "unet", "vae"):
        assert re.search(rf"^{name} ", shown, re.MULTILINE)
    assert "2 + index" in shown


@pytest.mark.parametrize("config", [{}, {"architectures": []}, {"_class_name": "X\x1b[2J"}, {"architectures": [3]}])
def test_control_characters_do_not_reach_the_terminal(
    config: dict[str, Any], wconv: Callable[..., Any], tmp_path: Path
) -> None:
    save({"a\x1b[31m\nb": STATE["a"], "t\x07": STATE["a"], "\u202e": STATE["b"]}, tmp_path / "pytorch_model.bin")
    (tmp_path / "x\x1b[2J.txt").write_text("x")
    write_json(tmp_path / "config.json", config)
    shown = wconv("inspect", tmp_path, "--tensors").stdout
    assert not re.search("[\x1b\x07\u202e]", shown)
    assert "a\\x1b[31m\\nb" in shown


@pytest.mark.parametrize(
    ("name", "content", "exit_code"),
    [
        ("pytorch_model.bin", b"version https://git-lfs.github.com/spec/v1\n", 3),
        ("pytorch_model.bin", b"", 3),
        ("pytorch_model.bin", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", 3),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0{}", 3),
        ("config.json", b"{}", 3),
    ],
)
@pytest.mark.parametrize("options", [(), ("--json",), ("--tensors",)])
def test_bad_input(
    name: str, content: bytes, exit_code: int, options: tuple[Any, ...], wconv: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    outcome = wconv("inspect", tmp_path, *options, exit_code=exit_code)
    assert outcome.stdout == ""
    assert outcome.stderr.startswith(f"{tmp_path}")
    assert outcome.stderr.count("\n") == 1


def test_an_empty_state_dict(wconv: Callable[..., Any], inspect: Any, tmp_path: Path) -> None:
    save({}, tmp_path / "pytorch_model.bin")
    assert inspect(tmp_path, "--tensors")["weight_sets"][0]["tensors"] == 0
    assert "pytorch_model" in wconv("inspect", tmp_path, "--tensors").stdout


@pytest.mark.parametrize("name", ["n" * 3_000, "\u65e5" * 900, "\x7f", "a\x1b[31m\u202e"])
def test_names_in_json_are_whole(wconv: Callable[..., Any], inspect: Any, tmp_path: Path, name: str) -> None:
    torch.save({name: torch.zeros(1)}, tmp_path / "m.bin")
    (found,) = inspect(tmp_path / "m.bin", "--tensors")["weight_sets"]
    assert [one["name"] for one in found["all_tensors"]] == [name]
    said = wconv("inspect", tmp_path / "m.bin", "--tensors", "--json").stdout
    assert said.replace("\n", "").isprintable()


# What cannot be read hides nothing else.


@pytest.fixture
def partly_bad(tmp_path: Path) -> Path:
    """Give a pipeline in which one part is a pointer, and another has an index that is none."""
    folder = save_pipeline(tmp_path)
    (folder / "vae" / "diffusion_pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    (index,) = (folder / "unet").glob("*.index.json")
    index.write_text("{")
    return folder


def test_bad_files_stand_beside_good_ones(wconv: Callable[..., Any], partly_bad: Path) -> None:
    shown = wconv("inspect", partly_bad, exit_code=3)
    assert re.search(r"^text_encoder +pytorch_model +torch +- +1 +6 ", shown.stdout, re.MULTILINE)
    assert re.search(r"^unet .* 2 \+ index .*index\.json: is not JSON", shown.stdout, re.MULTILINE)
    assert re.search(r"^vae .*: is a git-lfs pointer, not the weights", shown.stdout, re.MULTILINE)
    assert "not weights: " in shown.stdout
    assert [line.partition(": ")[0] for line in shown.stderr.splitlines()] == [
        str(next((partly_bad / "unet").glob("*.index.json"))),
        str(partly_bad / "vae" / "diffusion_pytorch_model.bin"),
    ]


def test_bad_files_are_in_the_json(wconv: Callable[..., Any], partly_bad: Path) -> None:
    found = json.loads(wconv("inspect", partly_bad, "--json", exit_code=3).stdout)
    good, *bad = found["weight_sets"]
    assert (good["component"], good["tensors"], "error" in good) == ("text_encoder", 6, False)
    assert [(one["component"], one["files"] != [], "tensors" in one) for one in bad] == [
        ("unet", True, False),
        ("vae", True, False),
    ]
    assert [one["error"] for one in bad] == found["errors"]
    assert "git-lfs pointer" in bad[1]["error"]


def test_a_bad_config_does_not_hide_the_weights(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(STATE, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{")
    shown = wconv("inspect", tmp_path, exit_code=3)
    assert re.search(r"^\. +pytorch_model ", shown.stdout, re.MULTILINE)
    assert shown.stderr.startswith(f"{tmp_path / 'config.json'}: is not JSON")


def test_the_exit_code_is_that_of_the_worst(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(STATE, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").write_bytes(b"GGUF" + bytes(60))  # of another kind
    wconv("inspect", tmp_path, exit_code=4)
    (tmp_path / "adapter_model.bin").write_bytes(b"")  # damaged
    shown = wconv("inspect", tmp_path, exit_code=3)
    assert len(shown.stderr.splitlines()) == 2
    assert re.search(r"^\. +pytorch_model +torch ", shown.stdout, re.MULTILINE)


def test_a_missing_shard_is_said_in_its_row(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_bin_shards(STATE, tmp_path)
    save(STATE, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model-00002-of-00003.bin").unlink()
    shown = wconv("inspect", tmp_path, exit_code=3).stdout
    assert re.search(
        r"^\. +pytorch_model .* - +- +- +.*names the shard pytorch_model-00002-of-00003", shown, re.MULTILINE
    )
    assert re.search(r"^\. +model +safetensors ", shown, re.MULTILINE)

"""``wconv to-safetensors``: where the output goes, every option, and every bad input.

Bad input gives one line on stderr, ``path: what is wrong. what to do``, an exit code of its own, and changes nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.tiny import (
    TENSOR_NBYTES,
    assert_same,
    flip_byte,
    left_behind,
    load_set,
    make_state,
    names_in,
    raw_bytes,
    rezip,
    save,
    save_bin_shards,
    save_pipeline,
    save_safetensors_shards,
    save_shards,
    snapshot,
    write_json,
)

STATE = make_state()
OTHER = make_state(seed=1)
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
HTML = "<!DOCTYPE html>\n<html><body>404: not found</body></html>\n"


def strict_json(text: str) -> Any:
    """Read JSON as its standard has it: without NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def files_of(folder: Path) -> dict[str, str]:
    """Give the letters in each safetensors file below a folder."""
    return {
        path.relative_to(folder).as_posix(): "".join(load_file(path)) for path in sorted(folder.rglob("*.safetensors"))
    }


# Bad input.


@dataclass(frozen=True)
class Bad:
    """Makes something that cannot be converted below a folder and gives what to name on the command line.

    ``says`` are parts of the message; ``where`` is the file that it begins with, if not the one that was named.
    """

    name: str
    exit_code: int
    build: Callable[[Path], Path]
    says: tuple[str, ...]
    where: str = ""
    args: tuple[str, ...] = ()


def bin_file(folder: Path) -> Path:
    return save(STATE, folder / "pytorch_model.bin")


def truncated(path: Path, nbytes: int) -> Path:
    path.write_bytes(path.read_bytes()[:nbytes])
    return path


def index_with(folder: Path, **changes: str) -> Path:
    """Write shards whose index is changed: these names are said to be in these files."""
    index = save_bin_shards(STATE, folder)
    content = json.loads(index.read_text())
    content["weight_map"].update(changes)
    return write_json(index, content)


def without_shard(folder: Path) -> Path:
    index = save_bin_shards(STATE, folder)
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    return index


def tensor_in_two_shards(folder: Path) -> Path:
    index = save_bin_shards(STATE, folder)
    save({name: STATE[name] for name in "cda"}, folder / "pytorch_model-00002-of-00003.bin")
    return index


def text_file(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / name).write_text(text)
    return folder / name


def plain_zip(folder: Path) -> Path:
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("weights/readme.txt", "x")
    return folder / "pytorch_model.bin"


def torchscript(folder: Path) -> Path:
    return rezip(bin_file(folder), {"constants.pkl": b"\x80\x02).", "code/__torch__.py": b"x"})


def pickle_that_calls(folder: Path) -> Path:
    return rezip(bin_file(folder), {"data.pkl": b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R."})


def short_record(folder: Path) -> Path:
    return rezip(bin_file(folder), {"data/2": lambda raw: raw[:-4]})


def wrong_crc(folder: Path) -> Path:
    return flip_byte(bin_file(folder), raw_bytes(STATE["d"]))


def wrong_crc_beside_a_view(folder: Path) -> Path:
    base = torch.arange(100, dtype=torch.float32)
    path = save({"view": base[10:20]}, folder / "pytorch_model.bin")
    return flip_byte(path, raw_bytes(base[50:52]))


def old_attention(folder: Path) -> Path:
    state = {f"decoder.mid_block.attentions.0.{name}.weight": STATE["a"] for name in ("query", "key", "value")}
    save_shards(
        dict(zip("abc", state.values(), strict=True)),
        folder,
        ("a", "bc"),
        "diffusion_pytorch_model-{:05d}-of-{:05d}.bin",
        "diffusion_pytorch_model.bin.index.json",
    )
    for path in folder.glob("*.bin"):
        renamed = {list(state)["abc".index(name)]: t for name, t in torch.load(path, weights_only=True).items()}
        save(renamed, path)
    index = folder / "diffusion_pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {list(state)["abc".index(n)]: file for n, file in content["weight_map"].items()}
    write_json(index, content)
    write_json(folder / "config.json", {"_class_name": "AutoencoderKL"})
    return folder


def safetensors_with_header(folder: Path, header: bytes, data: bytes = b"") -> Path:
    folder.mkdir(parents=True)
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def sparse(folder: Path) -> Path:
    return save({"w": torch.eye(3).to_sparse()}, folder / "pytorch_model.bin")


def nested(folder: Path) -> Path:
    return save({"state_dict": STATE, "ema": dict(STATE)}, folder / "pytorch_model.bin")


BAD = [
    Bad("missing-shard", 3, without_shard, ("pytorch_model-00002-of-00003.bin", "not there")),
    Bad("shard-outside", 3, lambda f: index_with(f, a="../x.bin"), ("outside", "../x.bin")),
    Bad("shard-lacks-tensor", 3, lambda f: index_with(f, z="pytorch_model-00001-of-00003.bin"), ("'z'", "00001")),
    Bad("two-shards", 3, tensor_in_two_shards, ("'a'", "00001-of"), "m/pytorch_model-00002-of-00003.bin"),
    Bad("index-no-json", 3, lambda f: text_file(f, "pytorch_model.bin.index.json", "{"), ("JSON",)),
    Bad("truncated-bin", 3, lambda f: truncated(bin_file(f), 900), ("incomplete",)),
    Bad("truncated-bin-head", 3, lambda f: truncated(bin_file(f), 40), ("incomplete",)),
    Bad("truncated-safetensors", 3, lambda f: truncated(save(STATE, f / "model.safetensors"), 500), ("incomplete",)),
    Bad("truncated-safetensors-header", 3, lambda f: truncated(save(STATE, f / "model.safetensors"), 60), ("fetch",)),
    Bad("empty", 3, lambda f: text_file(f, "pytorch_model.bin", ""), ("empty", "again")),
    Bad("lfs-bin", 3, lambda f: text_file(f, "pytorch_model.bin", LFS), ("git-lfs pointer", "git lfs pull")),
    Bad("lfs-safetensors", 3, lambda f: text_file(f, "model.safetensors", LFS), ("git-lfs pointer", "git lfs pull")),
    Bad("lfs-other", 3, lambda f: text_file(f, "other.bin", LFS), ("git-lfs pointer", "git lfs pull")),
    Bad("html", 3, lambda f: text_file(f, "pytorch_model.bin", HTML), ("web page",)),
    Bad("other-zip", 3, plain_zip, ("not one that torch.save wrote",)),
    Bad("torchscript", 4, torchscript, ("TorchScript", "state_dict()")),
    Bad("calls", 3, pickle_that_calls, ("posix.system",)),
    Bad("packed", 4, lambda f: rezip(bin_file(f), compression=zipfile.ZIP_BZIP2), ("compressed", "torch.save")),
    Bad("short-record", 3, short_record, ("28 bytes", "32")),
    Bad("wrong-crc", 3, wrong_crc, ("CRC32", "again")),
    Bad("wrong-crc-view", 3, wrong_crc_beside_a_view, ("CRC32", "again")),
    Bad("sparse", 4, sparse, ("sparse",)),
    Bad("nested", 2, nested, ("several", "--key")),
    Bad("name-of-metadata", 4, lambda f: save({"__metadata__": STATE["a"]}, f / "pytorch_model.bin"),
        ("__metadata__",)),
    Bad("name-no-text", 4, lambda f: save({"a\ud800": STATE["a"]}, f / "pytorch_model.bin"), ("ud800",)),
    Bad("old-attention", 4, old_attention, ("query", "--max-shard-size none"),
        "m/diffusion_pytorch_model.bin.index.json"),
    Bad("unknown-dtype", 4,
        lambda f: safetensors_with_header(f, b'{"a":{"dtype":"F7","shape":[],"data_offsets":[0,0]}}'), ("'F7'",)),
    Bad("json-header", 3, lambda f: safetensors_with_header(f, b"{not json"), ("header",)),
    Bad("not-there", 3, lambda f: f / "none.bin", ("does not exist",)),
    Bad("no-weights", 3, lambda f: write_json(f / "config.json", {}).parent, ("no weights", ".safetensors")),
]  # fmt: skip


@pytest.mark.parametrize("place", ["beside", "new"])
@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_bad_input(
    bad: Any, place: str, wconv: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = bad.build(Path("m"))
    before = snapshot(tmp_path)
    output = ("-o", "deep/out") if place == "new" else ()
    outcome = wconv("to-safetensors", source, *output, *bad.args, exit_code=bad.exit_code)
    assert_one_line(outcome, bad.where or source.as_posix(), bad.says)
    assert snapshot(tmp_path) == before


def assert_one_line(outcome: Any, where: str, says: tuple[str, ...] = ()) -> None:
    """Check that a message is one line of the form ``path: what is wrong. what to do`` and says this."""
    assert outcome.stdout == ""
    assert re.fullmatch(re.escape(where) + r": [^\n]*[^\n. ]\. [^\n]+\.\n", outcome.stderr), outcome.stderr
    for part in says:
        assert part in outcome.stderr
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_bad_input_in_a_pipeline_stops_all_of_it(
    bad: Any, wconv: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bad.name in ("not-there", "no-weights", "lfs-other"):
        pytest.skip("is no component")
    source = bad.build(tmp_path / "p" / "unet")
    save_pipeline(tmp_path / "rest")
    for name in ("model_index.json", "vae", "text_encoder"):
        (tmp_path / "rest" / name).rename(tmp_path / "p" / name)
    before = snapshot(tmp_path)
    outcome = wconv("to-safetensors", tmp_path / "p", exit_code=bad.exit_code)
    assert outcome.stderr.count("\n") == 1
    assert str(source) in outcome.stderr or str(source.parent) in outcome.stderr
    assert snapshot(tmp_path) == before


def test_a_folder_of_models_is_told_apart(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(STATE, tmp_path / "one" / "pytorch_model.bin")
    outcome = wconv("to-safetensors", tmp_path, exit_code=3)
    assert_one_line(outcome, str(tmp_path), ("no weights", "Name one of its folders that do: one."))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_no_checkpoint(wconv: Callable[..., Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pytorch_model.bin")
    outcome = wconv("to-safetensors", tmp_path / "pytorch_model.bin", exit_code=3)
    assert "no regular file" in outcome.stderr
    assert "no weights" in wconv("to-safetensors", tmp_path, exit_code=3).stderr


# Output that is there.


@pytest.mark.parametrize("args", [(), ("--dry-run",), ("--delete-source",), ("--max-shard-size", "none")])
def test_output_that_exists_is_refused(args: tuple[Any, ...], wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(STATE, tmp_path / "m" / "pytorch_model.bin")
    save(OTHER, tmp_path / "m" / "model.safetensors")
    before = snapshot(tmp_path)
    outcome = wconv("to-safetensors", tmp_path / "m" / "pytorch_model.bin", *args, exit_code=5)
    assert_one_line(outcome, str(tmp_path / "m" / "model.safetensors"), ("exists", "--overwrite"))
    assert snapshot(tmp_path) == before


def test_a_second_run_writes_nothing(wconv: Callable[..., Any], tmp_path: Path) -> None:
    source = save_bin_shards(STATE, tmp_path / "m").parent
    wconv("to-safetensors", source)
    before = snapshot(tmp_path)
    assert "Up to date: " in wconv("to-safetensors", source).stdout
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("m", "is the source"),
        ("m/.", "is the source"),
        ("m/../m", "is the source"),
        ("link", "is the source"),
        (".", "holds the source"),
        ("full", "not empty"),
        ("file", "is no folder"),
        ("file.safetensors", "exists, and is not what would be written"),
    ],
)
def test_a_folder_that_cannot_be_the_output(
    output: str, says: str, wconv: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_bin_shards(STATE, Path("m"))
    save(OTHER, Path("full/other.bin"))
    for name in ("file", "file.safetensors"):
        Path(name).write_text("x")
    Path("link").symlink_to("m", target_is_directory=True)
    before = snapshot(tmp_path)
    outcome = wconv("to-safetensors", "m", "-o", output, exit_code=5)
    assert_one_line(outcome, Path(output).as_posix(), (says,))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("output", ["file/out", "file/deep/out"])
def test_a_place_below_a_file_cannot_be_the_output(
    output: str, wconv: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_bin_shards(STATE, Path("m"))
    Path("file").write_text("x")
    before = snapshot(tmp_path)
    outcome = wconv("to-safetensors", "m", "-o", output, exit_code=7)
    assert outcome.stderr.count("\n") == 1
    assert snapshot(tmp_path) == before


def test_a_single_set_may_go_into_a_folder_that_is_there(wconv: Callable[..., Any], tmp_path: Path) -> None:
    source = save(STATE, tmp_path / "m" / "pytorch_model.bin")
    save(OTHER, tmp_path / "full" / "other.bin")
    wconv("to-safetensors", source, "-o", tmp_path / "full")
    assert names_in(tmp_path / "full") == ["model.safetensors", "other.bin"]


def test_overwriting_leaves_what_is_not_of_the_set(wconv: Callable[..., Any], tmp_path: Path) -> None:
    source = save_bin_shards(STATE, tmp_path / "m").parent
    save_safetensors_shards(OTHER, source, ("a", "b", "c", "def"))
    save(OTHER, source / "model.fp16.safetensors")
    save(OTHER, source / "other.safetensors")
    write_json(source / "config.json", {})
    wconv("to-safetensors", source / "pytorch_model.bin.index.json", "--overwrite")
    assert_same(load_set(source), STATE)
    assert [name for name in names_in(source) if not name.startswith("pytorch_model")] == [
        "config.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.fp16.safetensors",
        "model.safetensors.index.json",
        "other.safetensors",
    ]


def test_overwriting_a_folder_replaces_its_sets(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_pipeline(tmp_path / "m")
    wconv("to-safetensors", tmp_path / "m", "-o", tmp_path / "out", "--max-shard-size", f"{TENSOR_NBYTES}B")
    (tmp_path / "out" / "README.md").write_text("mine")
    wconv("to-safetensors", tmp_path / "m", "-o", tmp_path / "out", "--overwrite")
    wconv("to-safetensors", tmp_path / "m", "-o", tmp_path / "expected")
    assert set(names_in(tmp_path / "out")) == {*names_in(tmp_path / "expected"), "README.md"}
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


# Where it goes.


def test_beside_the_source_nothing_else_changes(wconv: Callable[..., Any], tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "m")
    before = snapshot(folder)
    wconv("to-safetensors", folder)
    after = snapshot(folder)
    assert before.items() <= after.items()
    assert sorted(after.keys() - before.keys()) == [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]


@pytest.mark.parametrize(
    "output", ["out", "deep/er/out", "m/out", "./out/", "dotted.v1", "äö ü", "empty", "empty_link"]
)
def test_a_new_folder_has_all_that_the_source_has(
    output: str, wconv: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_pipeline(Path("m"))
    Path("m/README.md").write_text("x")
    Path("empty").mkdir()
    Path("other").mkdir()
    Path("empty_link").symlink_to("other", target_is_directory=True)
    before = snapshot(tmp_path / "m")
    wconv("to-safetensors", "m", "-o", output)
    assert names_in(Path(output)) == [
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert {name: held for name, held in snapshot(tmp_path / "m").items() if not name.startswith("out")} == before
    assert not left_behind(tmp_path)


def test_the_current_folder_is_the_source_when_none_is_named(
    wconv: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(STATE, tmp_path / "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    wconv("to-safetensors")
    assert files_of(tmp_path) == {"model.safetensors": "abcdef"}


def test_the_current_folder_may_be_the_new_one(
    wconv: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(STATE, tmp_path / "m" / "pytorch_model.bin")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    wconv("to-safetensors", "../m", "-o", ".")
    assert files_of(tmp_path / "out") == {"model.safetensors": "abcdef"}
    assert not left_behind(tmp_path)


def test_a_folder_inside_the_source_is_not_carried_into_itself(
    wconv: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_bin_shards(STATE, tmp_path / "m").parent
    monkeypatch.chdir(tmp_path)
    wconv("to-safetensors", "m", "-o", source / "out")
    wconv("to-safetensors", "m", "-o", source / "out", "--overwrite")
    assert len(names_in(source / "out")) == 4


@pytest.mark.parametrize(
    ("output", "written"),
    [
        ("x.safetensors", "x.safetensors"),
        ("new/x.safetensors", "new/x.safetensors"),
        ("x.fp16.safetensors", "x.fp16.safetensors"),
        ("pytorch_model.safetensors", "pytorch_model.safetensors"),
        ("a.b.c.safetensors", "a.b.c.safetensors"),
        ("out", "out/model.safetensors"),
        ("out.d/", "out.d/model.safetensors"),
    ],
)
def test_an_output_may_be_a_file_name(
    output: str, written: str, wconv: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = save(STATE, Path("m/pytorch_model.bin"))
    wconv("to-safetensors", source, "-o", output)
    assert list(files_of(tmp_path)) == [written]


def test_a_file_name_makes_one_file_of_shards(wconv: Callable[..., Any], tmp_path: Path) -> None:
    source = save_bin_shards(STATE, tmp_path / "m")
    wconv("to-safetensors", source, "-o", tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.glob("x*")] == ["x.safetensors"]
    assert_same(load_file(tmp_path / "x.safetensors"), STATE)


def test_a_file_name_of_another_format_is_refused(wconv: Callable[..., Any], tmp_path: Path) -> None:
    source = save(STATE, tmp_path / "m" / "pytorch_model.bin")
    outcome = wconv("to-safetensors", source, "-o", tmp_path / "x.bin", exit_code=2)
    assert_one_line(outcome, str(tmp_path / "x.bin"))


# Options.


def two_variants(folder: Path) -> Path:
    save(STATE, folder / "pytorch_model.bin")
    save(OTHER, folder / "pytorch_model.fp16.bin")
    return folder


@pytest.mark.parametrize(
    ("args", "written"),
    [
        ((), ["model.fp16.safetensors", "model.safetensors"]),
        (("--from-variant", "fp16"), ["model.fp16.safetensors"]),
        (("--from-variant", "none"), ["model.safetensors"]),
        (("--from-variant", "fp16", "--variant", "none"), ["model.safetensors"]),
        (("--from-variant", "none", "--variant", "ema"), ["model.ema.safetensors"]),
        (("--from-variant", "fp16", "--variant", "x-1_y"), ["model.x-1_y.safetensors"]),
    ],
)
def test_variants(args: tuple[Any, ...], written: list[str], wconv: Callable[..., Any], tmp_path: Path) -> None:
    wconv("to-safetensors", two_variants(tmp_path / "m"), "-o", tmp_path / "out", *args)
    assert names_in(tmp_path / "out") == written
    first = OTHER if "fp16" in args or not args else STATE
    assert_same(load_file(tmp_path / "out" / written[0]), first)


@pytest.mark.parametrize(
    "args",
    [
        ("--variant", "fp16.ema"),
        ("--variant", "a/b"),
        ("--variant", ""),
        ("--variant", "../x"),
        ("--variant", "x\ny"),
        ("--from-variant", "bf16"),
        ("--from-variant", ""),
        ("--variant", "fp16"),
        ("--component", "unet"),
        ("--max-shard-size", "5XB"),
        ("--max-shard-size", "0"),
        ("--max-shard-size", "5"),
        ("--max-shard-size", "-1"),
        ("--max-shard-size", "1.5"),
        ("--max-shard-size", "GB"),
        ("--max-shard-size", ""),
        ("--max-shard-size", "9" * 400 + "GB"),
        ("--tied", "second"),
        ("--workers", "0"),
        ("--workers", "many"),
        ("--memory", "none"),
        ("--memory", "0"),
        ("--memory", "64"),
        ("--no-such-option",),
    ],
    ids=" ".join,
)
def test_wrong_options(args: tuple[str, ...], wconv: Callable[..., Any], tmp_path: Path) -> None:
    before = snapshot(two_variants(tmp_path / "m"))
    outcome = wconv("to-safetensors", tmp_path / "m", *args, exit_code=2)
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.stderr
    assert snapshot(tmp_path / "m") == before


@pytest.mark.parametrize(
    ("size", "shards"),
    [
        ("none", 1),
        ("NONE", 1),
        ("1TB", 1),
        ("64B", 3),
        ("100 b", 2),
        ("0.064kB", 3),
        ("0.064 KB", 3),
        ("1kib", 1),
        ("0.0001MB", 2),
        ("31B", 6),
    ],
)
def test_shard_sizes(size: str, shards: int, wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(STATE, tmp_path / "m" / "pytorch_model.bin")
    wconv("to-safetensors", tmp_path / "m", "-o", tmp_path / "out", "--max-shard-size", size)
    assert len(files_of(tmp_path / "out")) == shards
    assert_same(load_set(tmp_path / "out"), STATE)


def test_components(wconv: Callable[..., Any], tmp_path: Path) -> None:
    source = save_pipeline(tmp_path / "m")
    wconv("to-safetensors", source, "--component", "vae", "--component", "text_encoder")
    assert list(files_of(source)) == ["text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"]


def test_components_that_are_not_chosen_go_along(wconv: Callable[..., Any], tmp_path: Path) -> None:
    source = save_pipeline(tmp_path / "m")
    wconv("to-safetensors", source, "--component", "vae", "-o", tmp_path / "out")
    for name in ("unet", "text_encoder", "tokenizer"):
        assert snapshot(tmp_path / "out" / name) == snapshot(source / name)
    assert names_in(tmp_path / "out" / "vae") == ["config.json", "diffusion_pytorch_model.safetensors"]


def with_tie(folder: Path, **config: Any) -> Path:
    save({"a": STATE["a"], "b": STATE["b"], "t": STATE["a"]}, folder / "pytorch_model.bin")
    write_json(folder / "config.json", config)
    return folder


@pytest.mark.parametrize(
    ("args", "config", "written"),
    [
        ((), {}, "abt"),
        ((), {"architectures": ["LlamaForCausalLM"]}, "ab"),
        (("--tied", "first"), {}, "ab"),
        ((), {"tie_word_embeddings": False}, "abt"),
        ((), {"_class_name": "UNet2DConditionModel"}, "abt"),
        (("--tied", "duplicate"), {"architectures": ["LlamaForCausalLM"]}, "abt"),
        (("--tied", "first"), {"tie_word_embeddings": False}, "ab"),
    ],
)
def test_tied(
    args: tuple[Any, ...], config: dict[str, Any], written: str, wconv: Callable[..., Any], tmp_path: Path
) -> None:
    source = with_tie(tmp_path / "m", **config)
    outcome = wconv("to-safetensors", source, *args)
    assert files_of(source) == {"model.safetensors": written}
    with safe_open(source / "model.safetensors", "pt") as file:
        ties = {} if written == "abt" else {"t": "a"}
        assert file.metadata() == {"format": "pt", **ties}
    assert ("Tied: t is a" in outcome.stdout) == bool(ties)


def test_deleting_the_source(wconv: Callable[..., Any], tmp_path: Path) -> None:
    source = save_pipeline(tmp_path / "m")
    save(OTHER, source / "other.ckpt")
    outcome = wconv("to-safetensors", source, "--delete-source")
    assert [name for name in names_in(source) if not name.endswith(("json", "safetensors"))] == ["other.ckpt"]
    assert not list(source.rglob("*.bin.index.json"))
    assert "every value compared" in outcome.stdout
    assert_same(load_set(source / "unet", "diffusion_pytorch_model"), make_state(seed=1))


def test_deleting_a_part_of_the_source(wconv: Callable[..., Any], tmp_path: Path) -> None:
    source = two_variants(tmp_path / "m")
    wconv("to-safetensors", source, "--delete-source", "--from-variant", "fp16")
    assert names_in(source) == ["model.fp16.safetensors", "pytorch_model.bin"]


@pytest.mark.parametrize("place", ["beside", "new", "overwrite"])
def test_a_dry_run_writes_nothing(place: str, wconv: Callable[..., Any], tmp_path: Path) -> None:
    source = save_pipeline(tmp_path / "m")
    options: dict[str, tuple[object, ...]] = {
        "beside": (),
        "new": ("-o", tmp_path / "out"),
        "overwrite": ("--overwrite", "--delete-source"),
    }
    args = options[place]
    if place == "overwrite":
        save_safetensors_shards(OTHER, source / "text_encoder")
    before = snapshot(tmp_path)
    shown = wconv("to-safetensors", source, *args, "--dry-run").stdout
    planned = strict_json(wconv("to-safetensors", source, *args, "--dry-run", "--json").stdout)
    wconv("to-safetensors", source, *args, "--dry-run", "-q")
    assert snapshot(tmp_path) == before
    wconv("to-safetensors", source, *args)
    after = snapshot(tmp_path)
    for found in planned["weight_sets"]:
        for file in (*found["files"], {"path": found["index"], "nbytes": None}):
            if file["path"]:
                path = Path(planned["target"], file["path"])
                assert path.is_file()
                assert file["nbytes"] in (None, path.stat().st_size)
                assert file["path"] in shown
    for name in planned["removed"]:
        assert not (Path(planned["target"]) / name).exists()
        assert name in shown
    assert (before.keys() <= after.keys()) == (not planned["removed"])
    assert planned["dry_run"] is True


def test_a_dry_run_tells_memory_and_disk(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(STATE, tmp_path / "m" / "pytorch_model.bin")
    shown = wconv("to-safetensors", tmp_path / "m", "--dry-run").stdout
    assert re.search(
        r"Takes \S+ \w+ of disk \(\S+ \w+ free\) and about \S+ [MG]B of memory\.\nRuns on \d+ threads?: \S+ s of work",
        shown,
    )


@pytest.mark.parametrize("args", [(), ("-o", "out"), ("--dry-run",), ("--verify",), ("--verify", "-o", "out", "-v")])
def test_json_is_json(
    args: tuple[Any, ...], wconv: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_pipeline(Path("m"))
    outcome = wconv("to-safetensors", "m", *args, "--json")
    assert strict_json(outcome.stdout)["weight_sets"]
    assert outcome.stderr == ""


def test_json_when_there_is_nothing_to_do(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(STATE, tmp_path / "model.safetensors")
    assert strict_json(wconv("to-safetensors", tmp_path, "--json").stdout)["weight_sets"] == []
    assert strict_json(wconv("to-safetensors", tmp_path, "--json", "--dry-run").stdout)["weight_sets"] == []


@pytest.mark.parametrize("args", [(), ("-o", "out"), ("--dry-run",), ("--verify",), ("--delete-source",)])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_quiet_prints_nothing(
    args: tuple[Any, ...], name: str, wconv: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(STATE, Path("m") / name)
    outcome = wconv("to-safetensors", "m", *args, "-q")
    assert (outcome.stdout, outcome.stderr) == ("", "")


def test_what_is_in_safetensors_already_stays(wconv: Callable[..., Any], tmp_path: Path) -> None:
    source = save(STATE, tmp_path / "m" / "model.safetensors").parent
    before = snapshot(tmp_path)
    assert "Up to date" in wconv("to-safetensors", source).stdout
    assert "Up to date" in wconv("to-safetensors", source, "--delete-source").stdout
    assert snapshot(tmp_path) == before


def test_the_summary(wconv: Callable[..., Any], tmp_path: Path) -> None:
    source = save_pipeline(tmp_path / "m")
    shown = wconv("to-safetensors", source, "-o", tmp_path / "out", "-v").stdout
    assert re.search(r"Wrote \S+ \w+ to \S+ in \S+ s \(\S+ \w+/s\) with \S+ \w+ of memory\.", shown)
    assert f"DiffusionPipeline.from_pretrained({str(tmp_path / 'out')!r})" in shown
    assert "wrote unet/diffusion_pytorch_model.safetensors.index.json" in shown


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"_class_name": "AutoencoderKL"}, "from diffusers import AutoencoderKL"),
        ({"architectures": ["LlamaForCausalLM"]}, "from transformers import LlamaForCausalLM"),
        ({}, "from safetensors.torch import load_file"),
        ({"architectures": []}, "from safetensors.torch import load_file"),
        ({"architectures": None}, "from safetensors.torch import load_file"),
        ({"_class_name": "X\x1b[2J"}, "Load it with"),
        ({"architectures": ["X; import os\nos.system('x')"]}, "Load it with"),
    ],
)
def test_the_line_that_loads_the_result(
    config: dict[str, Any], line: str, wconv: Callable[..., Any], tmp_path: Path
) -> None:
    save(STATE, tmp_path / ("diffusion_pytorch_model.bin" if "_class_name" in config else "pytorch_model.bin"))
    write_json(tmp_path / "config.json", config)
    shown = wconv("to-safetensors", tmp_path).stdout
    assert line in shown
    assert "\x1b" not in shown
    assert "\nos.system" not in shown


def test_the_loading_line_names_the_variant(wconv: Callable[..., Any], tmp_path: Path) -> None:
    source = save_pipeline(tmp_path / "m", "fp16")
    assert "variant='fp16'" in wconv("to-safetensors", source).stdout


def test_notes_tell_what_is_odd(wconv: Callable[..., Any], tmp_path: Path) -> None:
    index = save_bin_shards(STATE, tmp_path / "m")
    content = json.loads(index.read_text())
    del content["weight_map"]["f"]
    write_json(index, content)
    save(OTHER, tmp_path / "m" / "pytorch_model.fp16.bin")
    (tmp_path / "m" / "model.onnx").write_text("x")
    outcome = wconv("to-safetensors", tmp_path / "m", "--from-variant", "none", "-o", tmp_path / "out")
    assert "does not list 1 tensors" in outcome.stdout
    assert "not carried over: model.onnx, pytorch_model.fp16.bin (other weights)\n" in outcome.stdout
    assert_same(load_set(tmp_path / "out"), STATE)


def test_control_characters_do_not_reach_the_terminal(wconv: Callable[..., Any], tmp_path: Path) -> None:
    state = {"a\x1b[31m\nb": STATE["a"], "t\x07\u202e": STATE["a"], "ü": STATE["b"]}
    save(state, tmp_path / "pytorch_model.bin")
    outcome = wconv("to-safetensors", tmp_path, "-v", "--tied", "first")
    assert not re.search("[\x1b\x07\u202e]", outcome.stdout + outcome.stderr)
    assert load_file(tmp_path / "model.safetensors").keys() == {"a\x1b[31m\nb", "ü"}


def test_names_are_kept_whatever_they_are(wconv: Callable[..., Any], tmp_path: Path) -> None:
    names = ["", " ", "a/b", "..", "\0", "ü\n", '"', "{}", "x" * 1000, "format"]
    state = {name: torch.full((2,), float(number)) for number, name in enumerate(names)}
    save(state, tmp_path / "pytorch_model.bin")
    wconv("to-safetensors", tmp_path)
    assert_same(load_file(tmp_path / "model.safetensors"), state)


def test_torch_and_numpy_are_not_needed(tmp_path: Path) -> None:
    save_bin_shards(STATE, tmp_path / "m")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from converter.cli import main; sys.exit(main(['to-safetensors', 'm', '-o', 'out', '--verify', '-q']))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert_same(load_set(tmp_path / "out"), STATE)
    shutil.rmtree(tmp_path / "out")


def test_names_that_would_not_be_read_again_are_refused(wconv: Callable[..., Any], tmp_path: Path) -> None:
    torch.save({"n" * 1_000: torch.ones(1)}, tmp_path / "m.bin")
    wconv("to-safetensors", tmp_path / "m.bin")
    wconv("verify", tmp_path / "m.bin", tmp_path / "m.safetensors")
    torch.save({"n" * 1_001: torch.ones(1)}, tmp_path / "long.bin")
    assert "a name of 1,001 characters" in wconv("to-safetensors", tmp_path / "long.bin", exit_code=4).stderr

"""``wconv reshard``: shards cut as huggingface_hub cuts them, merged into one file, in place and elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.tiny import (
    assert_same,
    left_behind,
    load_set,
    make_state,
    names_in,
    save,
    save_bin_shards,
    save_pipeline,
    save_safetensors_shards,
    save_shards,
    snapshot,
    write_json,
)
from test_loaders import assert_complete_index, assert_same_weights, load_silently

STATE = make_state()
PLAIN = {"format": "pt"}


def letters_in(folder: Path) -> list[str]:
    """Give the letters in each shard, in order."""
    return ["".join(load_file(path)) for path in sorted(folder.glob("*.safetensors"))]


# Where it cuts.

# Of two empty tensors huggingface_hub thinks that they share their storage, and keeps them together.
SIZES = st.lists(st.integers(0, 40) | st.sampled_from([1, 250, 251, 500]), min_size=1, max_size=12).filter(
    lambda sizes: sizes.count(0) < 2
)


@settings(max_examples=15, deadline=None)
@given(sizes=SIZES, limit=st.integers(1, 600), halves=st.booleans())
def test_any_sizes_are_cut_as_huggingface_hub_cuts_them(
    sizes: Any, limit: Any, halves: Any, scratch: Path, wconv: Callable[..., Any]
) -> None:
    dtype = torch.float16 if halves else torch.float32
    state = {f"t{number:02d}": torch.full((size,), float(number), dtype=dtype) for number, size in enumerate(sizes)}
    shutil.rmtree(scratch / "m", ignore_errors=True)
    shutil.rmtree(scratch / "out", ignore_errors=True)
    save(state, scratch / "m" / "model.safetensors")
    wconv("reshard", scratch / "m", "--max-shard-size", f"{limit}B", "-o", scratch / "out", "-q")
    split = split_torch_state_dict_into_shards(
        state, max_shard_size=limit, filename_pattern="model{suffix}.safetensors"
    )
    written = {path.name: list(load_file(path)) for path in (scratch / "out").glob("*.safetensors")}
    assert {file: set(names) for file, names in written.items()} == {
        file: set(names) for file, names in split.filename_to_tensors.items()
    }
    indexes = list((scratch / "out").glob("*.index.json"))
    assert bool(indexes) == split.is_sharded
    for path in indexes:
        assert_complete_index(path)
    assert_same(load_set(scratch / "out"), state)


@pytest.mark.parametrize(
    ("spelled", "nbytes"),
    [
        ("0.1KB", 100),
        ("1KB", 1000),
        ("0.0005MB", 500),
        ("1mb", 10**6),
        ("0.000001GB", 1000),
        ("1 gb", 10**9),
        ("0.000000001TB", 1000),
        ("0.1KiB", 102),
        ("1KiB", 1024),
        ("0.0005MiB", 524),
        ("0.000001GiB", 1073),
        ("1GiB", 2**30),
    ],
)
def test_units(spelled: str, nbytes: int, wconv: Callable[..., Any], tmp_path: Path) -> None:
    state = {f"t{number:02d}": torch.full((19,), float(number)) for number in range(20)}
    state["last"] = torch.zeros(6, dtype=torch.uint8)
    save(state, tmp_path / "m" / "model.safetensors")
    wconv("reshard", tmp_path / "m", "--max-shard-size", spelled, "-o", tmp_path / "out")
    in_order = dict(load_file(tmp_path / "m" / "model.safetensors"))
    split = split_torch_state_dict_into_shards(
        in_order, max_shard_size=nbytes, filename_pattern="model{suffix}.safetensors"
    )
    written = {path.name: set(load_file(path)) for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(written) == len(split.filename_to_tensors)
    assert sorted(map(sorted, written.values())) == sorted(map(sorted, split.filename_to_tensors.values()))


@pytest.mark.parametrize("limit", ["20KB", "60KB", "none"])
@pytest.mark.parametrize("name", ["llama_tied", "clip", "sd"])
def test_from_pretrained_loads_it(
    name: str, limit: str, builders: Any, wconv: Callable[..., Any], tmp_path: Path
) -> None:
    model = builders.MODELS[name]()
    builders.save_safetensors(model, tmp_path / "m", 3)
    wconv("reshard", tmp_path / "m", "--max-shard-size", limit, "-o", tmp_path / "out")
    assert_same_weights(builders, load_silently(model, tmp_path / "out"), model)
    for path in (tmp_path / "out").rglob("*.index.json"):
        assert_complete_index(path)
    wconv("reshard", tmp_path / "m", "--max-shard-size", limit, "--in-place")
    assert_same_weights(builders, load_silently(model, tmp_path / "m"), model)


# Where it goes.


def test_merged_in_place(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_safetensors_shards(STATE, tmp_path / "m")
    write_json(tmp_path / "m" / "config.json", {"x": 1})
    save(make_state(seed=1), tmp_path / "m" / "model.fp16.safetensors")
    save(make_state(seed=2), tmp_path / "m" / "pytorch_model.bin")
    (tmp_path / "m" / "model-00009-of-00003.notes").write_text("mine")
    kept = {name: hashed for name, hashed in snapshot(tmp_path / "m").items() if "0000" not in name or "notes" in name}
    del kept["model.safetensors.index.json"]
    wconv("reshard", tmp_path / "m", "--max-shard-size", "none", "--in-place")
    assert names_in(tmp_path / "m") == sorted([*kept, "model.safetensors"])
    assert kept.items() <= snapshot(tmp_path / "m").items()
    assert_same(load_file(tmp_path / "m" / "model.safetensors"), STATE)


def test_cut_in_place(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(STATE, tmp_path / "m" / "model.safetensors")
    wconv("reshard", tmp_path / "m", "--max-shard-size", "64B", "--in-place")
    assert letters_in(tmp_path / "m") == ["ab", "cd", "ef"]
    assert "model.safetensors" not in names_in(tmp_path / "m")
    assert_same(load_set(tmp_path / "m"), STATE)


def test_merged_into_the_bytes_that_save_file_writes(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_safetensors_shards(STATE, tmp_path / "m")
    wconv("reshard", tmp_path / "m", "--max-shard-size", "none", "-o", tmp_path / "out")
    save_file(STATE, tmp_path / "expected.safetensors", PLAIN)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_resharded_twice_is_resharded_once(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_safetensors_shards(STATE, tmp_path / "m")
    wconv("reshard", tmp_path / "m", "--max-shard-size", "100B", "-o", tmp_path / "a")
    wconv("reshard", tmp_path / "a", "--max-shard-size", "32B", "-o", tmp_path / "b")
    wconv("reshard", tmp_path / "m", "--max-shard-size", "32B", "-o", tmp_path / "c")
    assert snapshot(tmp_path / "b") == snapshot(tmp_path / "c")


def test_shards_that_come_out_as_they_were_are_the_same_files(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_safetensors_shards(STATE, tmp_path / "m", ("ab", "cd", "e", "f"))
    inodes = {letters: inode_of(tmp_path / "m", number, 4) for number, letters in enumerate(("ab", "cd", "e", "f"), 1)}
    wconv("reshard", tmp_path / "m", "--max-shard-size", "64B", "--in-place")
    assert letters_in(tmp_path / "m") == ["ab", "cd", "ef"]
    assert inode_of(tmp_path / "m", 1, 3) == inodes["ab"]
    assert inode_of(tmp_path / "m", 2, 3) == inodes["cd"]
    assert (tmp_path / "m" / "model-00001-of-00003.safetensors").stat().st_nlink == 1
    assert_same(load_set(tmp_path / "m"), STATE)
    assert left_behind(tmp_path) == []


def inode_of(folder: Path, number: int, count: int) -> int:
    return (folder / f"model-{number:05d}-of-{count:05d}.safetensors").stat().st_ino


def test_a_new_folder_shares_no_file_with_its_source(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_safetensors_shards(STATE, tmp_path / "m", ("ab", "cd", "e", "f"))
    wconv("reshard", tmp_path / "m", "--max-shard-size", "64B", "-o", tmp_path / "out")
    assert all(path.stat().st_nlink == 1 for path in [*(tmp_path / "m").iterdir(), *(tmp_path / "out").iterdir()])


def test_shards_that_are_links_elsewhere_are_not_written_through(wconv: Callable[..., Any], tmp_path: Path) -> None:
    # As in a store that several folders share: the folder holds links, the files lie elsewhere and stay.
    save_safetensors_shards(STATE, tmp_path / "store", ("ab", "cd", "e", "f"))
    before = snapshot(tmp_path / "store")
    (tmp_path / "m").mkdir()
    for path in (tmp_path / "store").iterdir():
        (tmp_path / "m" / path.name).symlink_to(path)
    wconv("reshard", tmp_path / "m", "--max-shard-size", "64B", "--in-place")
    assert_same(load_set(tmp_path / "m"), STATE)
    assert snapshot(tmp_path / "store") == before
    assert letters_in(tmp_path / "m") == ["ab", "cd", "ef"]


def test_what_is_cut_so_already_stays(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_safetensors_shards(STATE, tmp_path / "m")
    before = snapshot(tmp_path)
    outcome = wconv("reshard", tmp_path / "m", "--max-shard-size", "64B", "--in-place")
    assert "Up to date" in outcome.stdout
    assert snapshot(tmp_path) == before


def test_a_variant_keeps_its_tag_and_the_others_their_files(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(STATE, tmp_path / "m" / "model.safetensors")
    save(make_state(seed=1), tmp_path / "m" / "model.fp16.safetensors")
    before = snapshot(tmp_path / "m")
    wconv("reshard", tmp_path / "m", "--max-shard-size", "100B", "--in-place", "--from-variant", "fp16")
    after = snapshot(tmp_path / "m")
    assert after["model.safetensors"] == before["model.safetensors"]
    assert after.keys() == {
        "model.safetensors",
        "model.fp16-00001-of-00002.safetensors",
        "model.fp16-00002-of-00002.safetensors",
        "model.safetensors.index.fp16.json",
    }


@pytest.mark.parametrize("where", [("--in-place",), ("-o", "out")])
def test_every_variant_is_taken(
    where: tuple[str, ...], wconv: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    half = {name: tensor.half() for name, tensor in STATE.items()}
    save_safetensors_shards(STATE, Path("m"))
    shard = "model.fp16-{:05d}-of-{:05d}.safetensors"
    save_shards(half, Path("m"), ("abc", "def"), shard, "model.safetensors.index.fp16.json")
    told = wconv("reshard", "m", "--max-shard-size", "none", *where).stdout
    assert "not carried over" not in told
    out = Path("m" if where == ("--in-place",) else "out")
    assert names_in(out) == ["model.fp16.safetensors", "model.safetensors"]
    assert_same(load_file(out / "model.safetensors"), STATE)
    assert_same(load_file(out / "model.fp16.safetensors"), half)


def test_the_format_stays(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_bin_shards(STATE, tmp_path / "m")
    wconv("reshard", tmp_path / "m", "--max-shard-size", "none", "--in-place")
    assert names_in(tmp_path / "m") == ["pytorch_model.bin"]
    assert_same(torch.load(tmp_path / "m" / "pytorch_model.bin", weights_only=True, mmap=True), STATE)


def test_one_component(wconv: Callable[..., Any], tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "m")
    before = {name: hashed for name, hashed in snapshot(folder).items() if not name.startswith("unet")}
    wconv("reshard", folder, "--max-shard-size", "none", "--in-place", "--component", "unet")
    assert before.items() <= snapshot(folder).items()
    assert [path.name for path in sorted((folder / "unet").iterdir())] == ["config.json", "diffusion_pytorch_model.bin"]


def test_sharded_bin_for_diffusers_is_refused(wconv: Callable[..., Any], tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "m")
    before = snapshot(folder)
    outcome = wconv("reshard", folder, "--max-shard-size", "100B", "--in-place", exit_code=4)
    assert "which no Diffusers pipeline loads" in outcome.stderr
    assert "--force" in outcome.stderr
    assert snapshot(folder) == before


def test_notes_in_headers_go_with_their_tensors(wconv: Callable[..., Any], tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in STATE.items() if name != "f"}
    notes = {**PLAIN, "lm_head": "c", "author": "me"}
    (tmp_path / "m").mkdir()
    save_file(state, tmp_path / "m" / "model.safetensors", notes)
    wconv("reshard", tmp_path / "m", "--max-shard-size", "64B", "--in-place")
    held = [metadata_of(path) for path in sorted((tmp_path / "m").glob("*.safetensors"))]
    assert [metadata.get("lm_head") for metadata in held] == [None, "c", None]
    assert {metadata["author"] for metadata in held} == {"me"}


def metadata_of(path: Path) -> dict[str, str]:
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return header["__metadata__"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "--max-shard-size 5GB"),
        (("--in-place",), "--max-shard-size 5GB"),
        (("--max-shard-size", "5GB"), "-o OUT, or --in-place"),
        (("--max-shard-size", "5GB", "--in-place", "-o", "out"), "Choose one"),
        (("--max-shard-size", "5XB", "--in-place"), "'5XB' is no size"),
        (("--max-shard-size", "0", "--in-place"), "'0' is no size"),
        (("--max-shard-size", "5", "--in-place"), "'5' is 5 bytes. Write it as 5GB, 500MB or 2GiB, or as 5B."),
        (("--max-shard-size", "999999", "--in-place"), "'999999' is 999999 bytes. "),
        (("--max-shard-size", "none", "--in-place", "--from-variant", "ema"), "has no variant 'ema'"),
    ],
)
def test_wrong_options(
    args: tuple[Any, ...], says: str, wconv: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_safetensors_shards(STATE, Path("m"))
    before = snapshot(tmp_path)
    outcome = wconv("reshard", "m", *args, exit_code=2)
    assert says in outcome.stderr
    assert snapshot(tmp_path) == before


def test_a_dry_run_writes_nothing(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_safetensors_shards(STATE, tmp_path / "m")
    before = snapshot(tmp_path)
    outcome = wconv("reshard", tmp_path / "m", "--max-shard-size", "none", "--in-place", "--dry-run")
    assert "model.safetensors" in outcome.stdout
    assert outcome.stdout.count("Would remove") == 4
    assert snapshot(tmp_path) == before


def test_a_single_file_of_another_set_in_the_way_is_refused(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_safetensors_shards(STATE, tmp_path / "m")
    save(make_state(seed=1), tmp_path / "m" / "model.safetensors")
    before = snapshot(tmp_path)
    index = tmp_path / "m" / "model.safetensors.index.json"
    outcome = wconv("reshard", index, "--max-shard-size", "none", "--in-place", exit_code=5)
    assert "model.safetensors: exists, and is not what would be written: " in outcome.stderr
    assert snapshot(tmp_path) == before


def test_shards_named_otherwise_get_the_usual_names(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_shards(STATE, tmp_path / "m", ("abc", "def"), "part{0}.of{1}.safetensors", "model.safetensors.index.json")
    wconv("reshard", tmp_path / "m", "--max-shard-size", "130B", "--in-place")
    assert names_in(tmp_path / "m") == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert_same(load_set(tmp_path / "m"), STATE)

"""``wconv rename-variant``: names and index change, no byte of weights is moved, legacy spellings are mended."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import (
    left_behind,
    make_state,
    names_in,
    save,
    save_pipeline,
    save_safetensors_shards,
    save_shards,
    snapshot,
)

STATE = make_state()


def inodes(folder: Path) -> dict[str, int]:
    """Give the files of a folder that are no JSON, and their inodes."""
    return {path.name: path.stat().st_ino for path in folder.iterdir() if path.suffix != ".json"}


def save_variant(folder: Path, tag: str = "fp16", suffix: str = "safetensors") -> None:
    """Write two shards of a variant under their current names."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    save_shards(
        STATE,
        folder,
        ("abc", "def"),
        f"{stem}.{tag}-{{:05d}}-of-{{:05d}}.{suffix}",
        f"{stem}.{suffix}.index.{tag}.json",
    )


@pytest.mark.parametrize(
    ("before", "after", "shard", "index"),
    [
        ("none", "fp16", "model.fp16-0000{}-of-00003.safetensors", "model.safetensors.index.fp16.json"),
        ("none", "x-1_y", "model.x-1_y-0000{}-of-00003.safetensors", "model.safetensors.index.x-1_y.json"),
    ],
)
def test_shards_get_a_tag_and_lose_it_again(
    before: str, after: str, shard: str, index: str, wconv: Callable[..., Any], tmp_path: Path
) -> None:
    save_safetensors_shards(STATE, tmp_path)
    first, held = snapshot(tmp_path), inodes(tmp_path)
    wconv("rename-variant", tmp_path, "--from", before, "--to", after)
    renamed = [shard.format(number) for number in (1, 2, 3)]
    assert names_in(tmp_path) == sorted([*renamed, index])
    assert [inodes(tmp_path)[name] for name in renamed] == [held[name] for name in sorted(held)]
    content = json.loads((tmp_path / index).read_text())
    assert content["weight_map"] == {name: renamed["abcdef".index(name) // 2] for name in "abcdef"}
    assert all(path.stat().st_nlink == 1 for path in tmp_path.iterdir())
    assert left_behind(tmp_path) == []
    wconv("rename-variant", tmp_path, "--from", after, "--to", before)
    assert inodes(tmp_path) == held
    assert snapshot(tmp_path).keys() == first.keys()


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_one_tag_for_another(suffix: str, wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_variant(tmp_path, suffix=suffix)
    held = inodes(tmp_path)
    wconv("rename-variant", tmp_path, "--from", "fp16", "--to", "half")
    assert sorted(inodes(tmp_path).items()) == sorted(
        (name.replace("fp16", "half"), inode) for name, inode in held.items()
    )
    (index,) = tmp_path.glob("*.json")
    assert index.name.endswith(f".{suffix}.index.half.json")
    assert set(json.loads(index.read_text())["weight_map"].values()) == inodes(tmp_path).keys()


def test_a_whole_pipeline_and_one_component_of_it(wconv: Callable[..., Any], tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "m", "fp16")
    before = snapshot(folder)
    wconv("rename-variant", folder, "--from", "fp16", "--to", "none", "--component", "vae")
    assert set(snapshot(folder)) == {name.replace("vae/diffusion_pytorch_model.fp16", "vae/diffusion_pytorch_model")
                                     for name in before}  # fmt: skip
    wconv("rename-variant", folder, "--from", "fp16", "--to", "none")
    assert set(snapshot(folder)) == set(snapshot(save_pipeline(tmp_path / "expected")))
    contents = {hashed for name, hashed in before.items() if "index" not in name}
    assert contents <= set(snapshot(folder).values())


@pytest.mark.parametrize("legacy_index", [False, True])
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_legacy_spellings_are_mended(
    suffix: str, legacy_index: bool, wconv: Callable[..., Any], tmp_path: Path
) -> None:
    save_variant(tmp_path / "expected", suffix=suffix)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    index = f"{stem}.{suffix}.fp16.index.json" if legacy_index else f"{stem}.{suffix}.index.fp16.json"
    save_shards(STATE, tmp_path / "m", ("abc", "def"), f"{stem}-{{:05d}}-of-{{:05d}}.fp16.{suffix}", index)
    held = inodes(tmp_path / "m")
    wconv("rename-variant", tmp_path / "m", "--from", "fp16", "--to", "fp16")
    assert names_in(tmp_path / "m") == names_in(tmp_path / "expected")
    assert sorted(inodes(tmp_path / "m").values()) == sorted(held.values())
    renamed = json.loads((tmp_path / "m" / f"{stem}.{suffix}.index.fp16.json").read_text())
    expected = json.loads((tmp_path / "expected" / f"{stem}.{suffix}.index.fp16.json").read_text())
    assert renamed["weight_map"] == expected["weight_map"]


def test_legacy_spellings_may_be_given_another_tag(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_shards(
        STATE, tmp_path, ("abc", "def"), "model-{:05d}-of-{:05d}.fp16.safetensors", "model.safetensors.fp16.index.json"
    )
    wconv("rename-variant", tmp_path, "--from", "fp16", "--to", "none")
    save_safetensors_shards(STATE, tmp_path / "expected", ("abc", "def"))
    expected = names_in(tmp_path / "expected")
    assert [name for name in names_in(tmp_path) if "/" not in name] == expected


def test_other_variants_keep_their_names(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(make_state(seed=1), tmp_path / "model.safetensors")
    save(make_state(seed=2), tmp_path / "model.ema.safetensors")
    save_variant(tmp_path)
    before = {name: hashed for name, hashed in snapshot(tmp_path).items() if "fp16" not in name}
    wconv("rename-variant", tmp_path, "--from", "fp16", "--to", "half")
    assert before.items() <= snapshot(tmp_path).items()
    assert not list(tmp_path.glob("*fp16*"))


def test_what_has_that_name_already_stays(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_variant(tmp_path)
    before = snapshot(tmp_path)
    outcome = wconv("rename-variant", tmp_path, "--from", "fp16", "--to", "fp16")
    assert "Up to date" in outcome.stdout
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("args", [(), ("--dry-run",)])
def test_a_name_that_is_taken_is_refused(args: tuple[Any, ...], wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(STATE, tmp_path / "model.safetensors")
    save(make_state(seed=2), tmp_path / "model.fp16.safetensors")
    before = snapshot(tmp_path)
    outcome = wconv("rename-variant", tmp_path, "--from", "none", "--to", "fp16", *args, exit_code=5)
    assert f"{tmp_path}/model.fp16.safetensors: exists. " in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--from", "none", "--to", "a.b"), "'a.b': is no variant. "),
        (("--from", "none", "--to", "a/b"), "'a/b': is no variant. "),
        (("--from", "none", "--to", ""), "is no variant. "),
        (("--from", "bf16", "--to", "fp16"), "has no variant 'bf16'. "),
        (("--from", "none"), "--to"),
        (("--to", "none"), "--from"),
        (("--from", "none", "--to", "fp16", "--component", "vae"), "vae"),
    ],
)
def test_wrong_options(args: tuple[str, ...], says: str, wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_safetensors_shards(STATE, tmp_path)
    before = snapshot(tmp_path)
    outcome = wconv("rename-variant", tmp_path, *args, exit_code=2)
    assert says in outcome.stderr
    assert snapshot(tmp_path) == before


def test_a_dry_run_renames_nothing(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_safetensors_shards(STATE, tmp_path)
    before = snapshot(tmp_path)
    outcome = wconv("rename-variant", tmp_path, "--from", "none", "--to", "fp16", "--dry-run")
    assert "model.fp16-00001-of-00003.safetensors" in outcome.stdout
    assert snapshot(tmp_path) == before


def test_weights_are_not_read(wconv: Callable[..., Any], tmp_path: Path) -> None:
    # However large: a renamed file may as well hold nothing that wconv can open.
    (tmp_path / "model.safetensors").write_bytes(b"no weights at all")
    wconv("rename-variant", tmp_path, "--from", "none", "--to", "fp16")
    assert (tmp_path / "model.fp16.safetensors").read_bytes() == b"no weights at all"


def test_links_stay_links(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(STATE, tmp_path / "blob")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "pytorch_model.bin").symlink_to(tmp_path / "blob")
    wconv("rename-variant", tmp_path / "m", "--from", "none", "--to", "fp16")
    renamed = tmp_path / "m" / "pytorch_model.fp16.bin"
    assert names_in(tmp_path / "m") == ["pytorch_model.fp16.bin"]
    assert torch.load(renamed, weights_only=True)["a"].equal(STATE["a"])
    assert renamed.is_symlink()


def test_a_tag_in_other_capitals_on_a_disk_that_does_not_tell_them_apart(
    tmp_path: Path, wconv: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(STATE, tmp_path / "m" / "model.FP16.safetensors")
    look = os.stat

    def look_in_capitals(path: Any, **how: Any) -> Any:
        return look(path if isinstance(path, int) else str(path).replace("model.fp16", "model.FP16"), **how)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", look_in_capitals)
        said = wconv("rename-variant", tmp_path / "m", "--from", "FP16", "--to", "fp16", exit_code=5).stderr
    assert "is the same name as model.FP16.safetensors on this disk" in said
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["model.FP16.safetensors"]
    wconv("rename-variant", tmp_path / "m", "--from", "FP16", "--to", "fp16")
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["model.fp16.safetensors"]

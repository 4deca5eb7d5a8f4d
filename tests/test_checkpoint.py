"""Weight sets on disk: which names make a set, and index, shards and tensors held against each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny import (
    TENSOR_NBYTES,
    make_state,
    save,
    save_bin_shards,
    save_safetensors_shards,
    save_shards,
    write_json,
)

from converter.errors import BadFile, BadRequest
from converter.models.checkpoint import Checkpoint, open_checkpoint
from converter.models.inventory import find_weight_set, find_weight_sets
from converter.models.sets import is_weight_file
from converter.storage import place_of

STATE = make_state()
SHARDS = tuple(f"pytorch_model-0000{number}-of-00003.bin" for number in (1, 2, 3))


def tensor_names(checkpoint: Checkpoint) -> str:
    return "".join(info.name for info in checkpoint.tensors)


# What is a set.


def test_sets_of_a_folder_are_found_by_name(tmp_path: Path) -> None:
    save_bin_shards(STATE, tmp_path)
    save(STATE, tmp_path / "pytorch_model.fp16.bin")
    save_safetensors_shards(STATE, tmp_path, ("abc", "def"))
    save(STATE, tmp_path / "other.pt")
    found = {weight_set.path.name: weight_set for weight_set in find_weight_sets(tmp_path)}
    assert {name: (s.name.stem, s.name.variant, len(s.file_names)) for name, s in found.items()} == {
        "model.safetensors.index.json": ("model", None, 2),
        "other.pt": ("other", None, 1),
        "pytorch_model.bin.index.json": ("pytorch_model", None, 3),
        "pytorch_model.fp16.bin": ("pytorch_model", "fp16", 1),
    }
    assert found["pytorch_model.bin.index.json"].all_names == (*SHARDS, "pytorch_model.bin.index.json")


@pytest.mark.parametrize(
    "name",
    [
        "training_args.bin",
        "optimizer.pt",
        "optimizer.bin",
        "optimizer_0.bin",
        "scheduler.pt",
        "scheduler.bin",
        "scaler.pt",
        "rng_state.pth",
        "rng_state_3.pth",
        "random_states_0.pt",
        "openvino_model.bin",
    ],
)
def test_what_trainers_leave_is_no_weights(name: str, tmp_path: Path) -> None:
    assert not is_weight_file(place_of(save(STATE, tmp_path / name)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.bin", b"\x01\x02\x03 a table of some kind"),
        ("model.onnx", b"\x08\x07"),
        ("weights.pb", b"\x0a"),
        ("model.msgpack", b"\x81"),
        ("tf_model.h5", b"\x89HDF\r\n"),
        ("model.flashpack", b"flash"),
        ("random_states_0.pkl", b"\x80\x04"),
        ("words.pt", b"text"),
    ],
)
def test_what_does_not_begin_as_weights_do_is_none(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert find_weight_sets(tmp_path) == ()


@pytest.mark.parametrize("name", ["custom.bin", "custom.pt", "custom.pth", "custom.ckpt", "custom.safetensors"])
def test_any_stem_will_do_if_the_first_bytes_are_of_weights(name: str, tmp_path: Path) -> None:
    assert is_weight_file(place_of(save(STATE, tmp_path / name)))


def test_a_folder_named_like_a_file_is_no_weights(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").mkdir()
    assert find_weight_sets(tmp_path) == ()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_standard_name_is_a_set_whatever_is_in_it(name: str, tmp_path: Path) -> None:
    # So that a git-lfs pointer is reported, not passed over.
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    assert len(find_weight_sets(tmp_path)) == 1


def test_a_set_is_found_from_its_index_or_from_any_shard(tmp_path: Path) -> None:
    index = save_bin_shards(STATE, tmp_path)
    expected = find_weight_set(index)
    assert expected.file_names == SHARDS
    assert [find_weight_set(tmp_path / shard) for shard in SHARDS] == [expected] * 3


def test_shards_without_an_index_are_a_set(tmp_path: Path) -> None:
    save_bin_shards(STATE, tmp_path).unlink()
    (found,) = find_weight_sets(tmp_path)
    assert found == find_weight_set(tmp_path / SHARDS[1])
    assert (found.index_name, found.file_names) == (None, SHARDS)
    assert tensor_names(open_checkpoint(found)) == "abcdef"


def test_a_shard_of_two_sets_must_be_named_by_its_index(tmp_path: Path) -> None:
    index = save_bin_shards(STATE, tmp_path)
    (tmp_path / "pytorch_model.bin.index.fp16.json").write_bytes(index.read_bytes())
    with pytest.raises(BadRequest, match="index"):
        find_weight_set(tmp_path / SHARDS[0])


def test_legacy_spellings_are_one_set(tmp_path: Path) -> None:
    save_shards(STATE, tmp_path, ("abc", "def"), "m-{:05d}-of-{:05d}.fp16.bin", "m.bin.fp16.index.json")
    (found,) = find_weight_sets(tmp_path)
    assert (found.name.stem, found.name.variant, found.is_legacy) == ("m", "fp16", True)
    assert len(found.file_names) == 2


def test_any_file_names_will_do_for_shards_if_the_index_lists_them(tmp_path: Path) -> None:
    save_shards(STATE, tmp_path, ("abc", "def"), "part{:d}of{:d}.safetensors", "model.safetensors.index.json")
    (found,) = find_weight_sets(tmp_path)
    assert found.file_names == ("part1of2.safetensors", "part2of2.safetensors")


# Index, shards and tensors.


def test_tensors_are_in_file_order_and_metadata_is_kept(tmp_path: Path) -> None:
    state = dict(reversed(STATE.items()))
    save_shards(state, tmp_path, ("fed", "cba"), "m-{:05d}-of-{:05d}.bin", "m.bin.index.json", total_size=7, note="x")
    opened = open_checkpoint(tmp_path / "m.bin.index.json")
    assert tensor_names(opened) == "fedcba"
    assert opened.index_metadata == {"total_size": 7, "note": "x"}
    assert (opened.format, opened.notes) == ("torch", ())
    assert {info.nbytes for info in opened.tensors} == {TENSOR_NBYTES}


@pytest.mark.parametrize("shard", SHARDS)
def test_a_missing_shard_is_named(shard: Any, tmp_path: Path) -> None:
    index = save_bin_shards(STATE, tmp_path)
    (tmp_path / shard).unlink()
    with pytest.raises(BadFile, match=shard):
        open_checkpoint(index)


@pytest.mark.parametrize("shard", SHARDS)
def test_a_gap_in_the_numbers_is_named(shard: Any, tmp_path: Path) -> None:
    save_bin_shards(STATE, tmp_path).unlink()
    (tmp_path / shard).unlink()
    (found,) = find_weight_sets(tmp_path)
    with pytest.raises(BadFile, match=shard):
        open_checkpoint(found)


@pytest.mark.parametrize("has_index", [True, False])
def test_a_tensor_in_two_shards_is_refused(has_index: bool, tmp_path: Path) -> None:
    index = save_bin_shards(STATE, tmp_path)
    save({name: STATE[name] for name in "cda"}, tmp_path / SHARDS[1])
    if not has_index:
        index.unlink()
    with pytest.raises(BadFile, match=rf"{SHARDS[1]}.*'a'.*{SHARDS[0]}"):
        open_checkpoint(index if has_index else tmp_path / SHARDS[0])


def test_a_tensor_that_its_shard_lacks_is_refused(tmp_path: Path) -> None:
    index = save_bin_shards(STATE, tmp_path)
    save({"c": STATE["c"]}, tmp_path / SHARDS[1])
    with pytest.raises(BadFile, match=rf"{SHARDS[1]}.*'d'"):
        open_checkpoint(index)


def test_a_tensor_in_another_shard_than_the_index_says_is_refused(tmp_path: Path) -> None:
    index = save_bin_shards(STATE, tmp_path)
    content = json.loads(index.read_text())
    content["weight_map"]["a"] = SHARDS[2]
    write_json(index, content)
    with pytest.raises(BadFile, match="'a'"):
        open_checkpoint(index)


def test_tensors_that_the_index_lacks_are_kept_and_noted(tmp_path: Path) -> None:
    index = save_bin_shards(STATE, tmp_path)
    content = json.loads(index.read_text())
    del content["weight_map"]["b"], content["weight_map"]["e"]
    write_json(index, content)
    opened = open_checkpoint(index)
    assert tensor_names(opened) == "abcdef"
    (note,) = opened.notes
    assert "2 tensors" in note
    assert "'b'" in note


@pytest.mark.parametrize("shard", ["../x.bin", "sub/x.bin", "..\\x.bin", "C:x.bin", "/x.bin", "", "..", "x\0.bin", 3])
def test_a_shard_outside_the_folder_is_refused(shard: int | str, tmp_path: Path) -> None:
    save(STATE, tmp_path / "x.bin")
    save(STATE, tmp_path / "model" / "sub" / "x.bin")
    content = {"metadata": {}, "weight_map": dict.fromkeys(STATE, shard)}
    with pytest.raises(BadFile, match="outside"):
        open_checkpoint(write_json(tmp_path / "model" / "pytorch_model.bin.index.json", content))


@pytest.mark.parametrize("content", [[], {}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": "x"}, 3, None])
def test_an_index_without_a_weight_map_is_refused(content: Any, tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="weight_map"):
        open_checkpoint(write_json(tmp_path / "pytorch_model.bin.index.json", content))


def test_shards_may_be_links(tmp_path: Path) -> None:
    save_bin_shards(STATE, tmp_path / "real")
    (tmp_path / "linked").mkdir()
    for path in (tmp_path / "real").iterdir():
        (tmp_path / "linked" / path.name).symlink_to(path)
    (found,) = find_weight_sets(tmp_path / "linked")
    assert tensor_names(open_checkpoint(found)) == "abcdef"


def test_a_shard_that_is_a_dangling_link_is_missing(tmp_path: Path) -> None:
    index = save_bin_shards(STATE, tmp_path)
    (tmp_path / SHARDS[0]).unlink()
    (tmp_path / SHARDS[0]).symlink_to(tmp_path / "blob")
    with pytest.raises(BadFile, match=SHARDS[0]):
        open_checkpoint(index)


def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    missing = Path(tmp_path / "none.bin")
    with pytest.raises(BadFile) as caught:
        open_checkpoint(missing)
    assert caught.value.where == str(missing)

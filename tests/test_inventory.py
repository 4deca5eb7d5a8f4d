"""What lies in a folder, whatever is wrong with it: all is listed, and the first problem is what opening raises."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.steps import refuse_to_list
from support.tiny import make_state, save, save_bin_shards, save_pipeline, save_safetensors_shards, write_json

from converter.errors import BadFile, SystemRefused
from converter.models.component import WeightSet
from converter.models.inventory import find_weight_sets, read_headers, take_inventory
from converter.models.model import open_model
from converter.models.sets import sets_to_read

STATE = make_state()
LEGACY = ("m-00001-of-00002.fp16.bin", "m-00002-of-00002.fp16.bin")
CURRENT = ("m.fp16-00001-of-00002.bin", "m.fp16-00002-of-00002.bin")


def save_all(folder: Path, *names: str) -> None:
    for name in names:
        save(STATE, folder / name)


def test_nothing_inside_makes_it_fail(tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path)
    (folder / "model_index.json").write_text("{")
    (folder / "vae" / "config.json").write_text("[")
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"")
    (index,) = (folder / "unet").glob("*.index.json")
    index.write_text("{}")
    (folder / "text_encoder" / "gone.bin").symlink_to("nowhere")
    inventory = read_headers(take_inventory(folder))
    parts = {part.name: part for part in inventory.parts}
    assert parts.keys() >= {"text_encoder", "unet", "vae"}
    assert inventory.index_error is not None
    assert parts["vae"].config_error is not None
    assert [one.index_error is not None for one in parts["unet"].sets] == [True]
    assert [name for part in parts.values() for name, header in part.headers.items() if header.error] == [
        "gone.bin",
        "diffusion_pytorch_model.bin",
    ]
    assert len(inventory.problems) == 3


@pytest.mark.parametrize("bad", ["model_index.json", "text_encoder/config.json", "unet/model.bin.index.json"])
def test_opening_raises_the_first_problem(bad: str, tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path)
    (folder / bad).write_text("{")
    (folder / "vae" / "config.json").write_text("{")
    first, _ = take_inventory(folder).problems
    with pytest.raises(BadFile) as caught:
        open_model(folder)
    assert str(caught.value) == str(first)
    assert str(folder / bad) in str(first)


def test_a_folder_that_cannot_be_listed_is_a_part_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_pipeline(tmp_path)
    refuse_to_list(monkeypatch, folder / "vae")
    (error,) = take_inventory(folder).problems
    assert [part.error for part in take_inventory(folder).parts if part.name == "vae"] != [None]
    assert "permission denied" in str(error)
    with pytest.raises(SystemRefused, match="vae"):
        open_model(folder)


def test_a_config_that_is_no_object_keeps_no_model_from_being_opened(tmp_path: Path) -> None:
    save(STATE, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", [])
    (part,) = take_inventory(tmp_path).parts
    assert part.config_error is not None
    assert open_model(tmp_path).components[0].config == {}


# What is a set, and what of it is read.


def files_of(sets: tuple[WeightSet, ...]) -> list[tuple[str, ...]]:
    return [one.file_names for one in sets]


def test_shards_spelled_in_two_ways_are_one_set(tmp_path: Path) -> None:
    save_all(tmp_path, LEGACY[0], CURRENT[1])
    assert files_of(find_weight_sets(tmp_path)) == [(LEGACY[0], CURRENT[1])]


def test_shards_that_are_there_in_both_spellings_are_two_sets(tmp_path: Path) -> None:
    save_all(tmp_path, *LEGACY, *CURRENT)
    assert files_of(find_weight_sets(tmp_path)) == [LEGACY, CURRENT]


def test_shards_of_another_split_are_strays_and_not_read(tmp_path: Path) -> None:
    save_bin_shards(STATE, tmp_path)
    save_all(tmp_path, "pytorch_model-00001-of-00002.bin")
    (part,) = take_inventory(tmp_path).parts
    assert files_of(part.strays) == [("pytorch_model-00001-of-00002.bin",)]
    assert [len(one.file_names) for one in part.component.weight_sets] == [3]


def test_what_an_index_of_another_name_lists_is_no_set_of_its_own(tmp_path: Path) -> None:
    index = save_safetensors_shards(STATE, tmp_path, ("abc", "def"))
    index.rename(tmp_path / "model.safetensors.index.fp16.json")
    (part,) = take_inventory(tmp_path).parts
    assert [one.index_name is not None for one in part.sets] == [False, True]
    assert [one.index_name for one in sets_to_read(part.sets)] == ["model.safetensors.index.fp16.json"]


def test_shards_go_with_an_index_of_their_name_that_cannot_be_read(tmp_path: Path) -> None:
    index = save_bin_shards(STATE, tmp_path)
    index.write_text("{")
    (part,) = take_inventory(tmp_path).parts
    assert [(len(one.file_names), one.index_name) for one in part.sets] == [(3, index.name)]
    assert part.sets[0].index_error is not None

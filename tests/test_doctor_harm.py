"""What the doctor must not do: lose a file, overwrite what it does not know, mend what it does not understand, or fail.

Each of these was seen to happen once.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import make_state, names_in, save, save_safetensors_shards, snapshot, write_json

from converter.doctor import diagnose
from converter.libraries.predict import list_folder, predict

STATE = make_state()
OTHER = make_state(seed=1)
CONFIG = {"architectures": ["LlamaForCausalLM"]}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give a folder that ``--fix`` mends: shards, and the same weights in one file, which stays."""
    folder = tmp_path / "place" / "m"
    save_safetensors_shards(STATE, folder)
    save(STATE, folder / "model.safetensors")
    write_json(folder / "config.json", CONFIG)
    return folder


@pytest.fixture
def fix(wconv: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    def run(*args: str, exit_code: int = 0) -> Any:
        return wconv("doctor", folder, "--fix", *args, exit_code=exit_code)

    return run


# Files that are links.


def as_links(folder: Path, blobs: Path) -> None:
    """Replace every file of a folder by a relative link to another place, as the Hub's cache has them."""
    blobs.mkdir()
    for path in sorted(folder.iterdir()):
        path.replace(blobs / path.name)
        path.symlink_to(os.path.relpath(blobs / path.name, folder))


def test_links_come_back_as_links(folder: Path, fix: Callable[..., Any], wconv: Callable[..., Any]) -> None:
    as_links(folder, folder.parent.parent / "elsewhere")
    links = {path.name: path.readlink() for path in folder.iterdir()}
    fix()
    assert not (folder / INDEX).exists()
    wconv("doctor", folder, "--undo")
    assert {path.name: path.readlink() for path in folder.iterdir()} == links
    assert load_file(folder / "model-00001-of-00003.safetensors").keys() == {"a", "b"}


def test_the_cache_of_the_hub_is_not_touched(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    folder = tmp_path / "models--x--y" / "snapshots" / "0123"
    save_safetensors_shards(STATE, folder)
    save(STATE, folder / "model.safetensors")
    write_json(folder / "config.json", CONFIG)
    as_links(folder, tmp_path / "models--x--y" / "blobs")
    before = snapshot(tmp_path)
    assert "cp -rL" in wconv("doctor", folder, "--fix", exit_code=5).stderr
    assert snapshot(tmp_path) == before


def test_a_link_to_nothing_is_found_and_not_counted_on(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    save(STATE, tmp_path / "pytorch_model.bin")
    write_json(tmp_path / "config.json", CONFIG)
    (tmp_path / "model.safetensors").symlink_to("nowhere")
    found = diagnose(tmp_path)
    assert [finding.code for finding in found.findings] == ["file-damaged"]
    assert predict(list_folder(found.inventory), "transformers", None).picks[0].files == ("pytorch_model.bin",)
    wconv("doctor", tmp_path, "--fix", exit_code=1)
    assert (tmp_path / "model.safetensors").is_symlink()


def test_a_folder_by_the_name_of_a_file(tmp_path: Path) -> None:
    save(STATE, tmp_path / "pytorch_model.bin")
    write_json(tmp_path / "config.json", CONFIG)
    (tmp_path / "model.safetensors").mkdir()
    assert predict(list_folder(diagnose(tmp_path).inventory), "transformers", None).picks[0].files == (
        "pytorch_model.bin",
    )


# What no loader looks for.


def test_hidden_files_are_nobodys_weights(folder: Path, fix: Callable[..., Any], wconv: Callable[..., Any]) -> None:
    """Such as macOS leaves beside each file, on disks that have no room for what else it knows of one."""
    (folder / INDEX).unlink()
    for shard in folder.glob("model-*"):
        shard.unlink()
    save(OTHER, folder / ".model.bin")
    (folder / ".broken.safetensors").write_bytes(b"")
    (folder / f"._{INDEX}").write_bytes(b"\0\x05\x16\x07\0\x02\0\0Mac OS X        ")
    assert diagnose(folder).findings == ()
    before = names_in(folder)
    fix("--make-variant", "fp16")
    assert names_in(folder) == sorted([*before, "model.fp16.safetensors"])
    wconv("to-bin", folder)
    assert load_file(folder / "model.safetensors").keys() == torch.load(folder / "pytorch_model.bin").keys()


def test_a_variant_that_is_not_to_stay_is_not_converted(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    unet, encoder = tmp_path / "m" / "unet", tmp_path / "m" / "text_encoder"
    for name in ("diffusion_pytorch_model", "diffusion_pytorch_model.fp16"):
        save(STATE, unet / f"{name}.safetensors")
    save(STATE, encoder / "model.safetensors")
    save(STATE, encoder / "pytorch_model.fp16.bin")
    parts = {"unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": ["transformers", "CLIPTextModel"]}
    write_json(tmp_path / "m" / "model_index.json", {"_class_name": "StableDiffusionPipeline", **parts})
    wconv("doctor", tmp_path / "m", "--fix", "--keep-default")
    assert names_in(unet) == ["diffusion_pytorch_model.safetensors"]
    assert names_in(encoder) == ["model.safetensors"]


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    from transformers import AutoModel

    save(STATE, tmp_path / "adapter_model.safetensors")
    write_json(tmp_path / "config.json", {**CONFIG, "model_type": "llama"})
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModel.from_pretrained(tmp_path)
    assert not predict(list_folder(diagnose(tmp_path).inventory), "transformers", None).works


# A folder that is not as it was left.


def test_a_second_mending_keeps_off_what_was_changed(
    folder: Path, fix: Callable[..., Any], wconv: Callable[..., Any]
) -> None:
    fix("--make-variant", "bf16")
    save(OTHER, folder / "model.bf16.safetensors")
    before = snapshot(folder.parent)
    assert "has changed since" in fix("--keep-default", exit_code=5).stderr
    assert "has changed since" in wconv("doctor", folder, "--undo", exit_code=5).stderr
    assert snapshot(folder.parent) == before
    wconv("doctor", folder, "--purge")
    fix("--keep-default")
    wconv("doctor", folder, "--undo")
    assert load_file(folder / "model.bf16.safetensors").keys() == OTHER.keys()


def test_undo_keeps_off_a_new_file_by_an_old_name(
    folder: Path, fix: Callable[..., Any], wconv: Callable[..., Any]
) -> None:
    fix()
    save(OTHER, folder / "model-00001-of-00003.safetensors")
    before = snapshot(folder.parent)
    wconv("doctor", folder, "--undo", exit_code=5)
    assert snapshot(folder.parent) == before


def test_undo_keeps_off_a_new_folder_by_an_old_name(
    folder: Path, fix: Callable[..., Any], wconv: Callable[..., Any]
) -> None:
    fix("--make-variant", "bf16")
    shutil.rmtree(folder)
    save(OTHER, folder / "model.safetensors")
    before = snapshot(folder.parent)
    wconv("doctor", folder, "--undo", exit_code=5)
    assert snapshot(folder.parent) == before


def test_files_without_a_record_are_no_backup(folder: Path, fix: Callable[..., Any], wconv: Callable[..., Any]) -> None:
    stale = folder.parent / ".wconv-undo" / "m" / "files" / INDEX
    stale.parent.mkdir(parents=True)
    stale.write_text("stale")
    before = snapshot(folder)
    fix()
    wconv("doctor", folder, "--undo")
    assert snapshot(folder) == before


def test_a_kept_file_that_was_changed_through_its_other_name(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    folder = tmp_path / "m"
    save(STATE, folder / "pytorch_model.safetensors")
    write_json(folder / "config.json", CONFIG)
    wconv("doctor", folder, "--fix")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(10)
    (folder / "model.safetensors").rename(folder / "mine")
    assert "is not what was kept there" in wconv("doctor", folder, "--undo", exit_code=3).stderr
    assert (folder / "mine").exists()


def test_undo_of_a_folder_within_one_that_was_mended_too(
    folder: Path, fix: Callable[..., Any], wconv: Callable[..., Any]
) -> None:
    fix("--make-variant", "bf16")
    shutil.move(folder, folder.parent / "outer" / "m")
    outer = folder.parent / "outer"
    write_json(outer / "model_index.json", {"_class_name": "X", "m": ["transformers", "LlamaForCausalLM"]})
    wconv("doctor", outer, "--fix", "--make-variant", "fp16")
    wconv("doctor", outer / "m", "--fix", "--keep-default")
    before = snapshot(outer)
    wconv("doctor", outer, "--undo", exit_code=5)
    assert snapshot(outer) == before


def test_undo_of_nothing_makes_no_folder(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    wconv("doctor", tmp_path / "typo", "--undo", exit_code=2)
    assert not list(tmp_path.iterdir())


# What is not understood is left alone.


def save_vae(builders: Any, folder: Path, dtype: torch.dtype = torch.float32, **how: Any) -> Any:
    model = builders.shake(builders.make_vae()).to(dtype)
    model.save_pretrained(folder, **how)
    return model


def test_no_weights_are_made_for_a_set_that_is_undecided(
    builders: Any, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    folder = tmp_path / "m"
    builders.save_safetensors(builders.shake(builders.make_sana()), folder)
    for name, part in builders.models_in(builders.shake(builders.make_sana())).items():
        part.bfloat16().save_pretrained(folder / name, variant="bf16")
    part = folder / "transformer"
    state = {name: tensor + 1 for name, tensor in load_file(part / "diffusion_pytorch_model.safetensors").items()}
    for number, names in enumerate((sorted(state)[::2], sorted(state)[1::2]), 1):
        shard = part / f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({name: state[name] for name in names}, shard, metadata={"format": "pt"})
    before = snapshot(tmp_path)
    wconv("doctor", folder, "--fix", exit_code=1)
    assert snapshot(tmp_path) == before


def test_an_index_over_files_of_any_name_is_left_alone(
    builders: Any, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    expected = save_vae(builders, tmp_path / "m").state_dict()
    folder = tmp_path / "m"
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    files = ("part1.safetensors", "part2.safetensors", "diffusion_pytorch_model.fp16.safetensors")
    weight_map: dict[str, str] = {}
    for place, name in enumerate(files):
        mine = sorted(state)[place::3]
        save_file({key: state[key] for key in mine}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, name)
    write_json(folder / "diffusion_pytorch_model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    before = snapshot(folder)
    wconv("doctor", folder, "--fix", exit_code=1)
    assert snapshot(folder) == before
    loaded = type(save_vae(builders, tmp_path / "other")).from_pretrained(folder).state_dict()
    assert all(loaded[name].equal(tensor) for name, tensor in expected.items())


def test_shards_take_the_tag_of_their_index(builders: Any, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    from diffusers import AutoencoderKL

    folder = tmp_path / "m"
    limit = builders.shard_limit(builders.make_vae().state_dict(), 3)
    save_vae(builders, folder, max_shard_size=limit)
    half = save_vae(builders, tmp_path / "half", torch.float16)
    half.save_pretrained(tmp_path / "half", max_shard_size=builders.shard_limit(half.state_dict(), 2))
    for path in (tmp_path / "half").glob("*-of-00002.safetensors"):
        path.rename(folder / path.name)
    index = (tmp_path / "half" / "diffusion_pytorch_model.safetensors.index.json").read_text()
    (folder / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(index)
    assert "index-foreign" in {finding.code for finding in diagnose(folder).findings}
    wconv("doctor", folder, "--fix")
    for variant, dtype in ((None, torch.float32), ("fp16", torch.float16)):
        loaded = AutoencoderKL.from_pretrained(folder, variant=variant, dtype=dtype).state_dict()
        expected = builders.shake(builders.make_vae()).to(dtype).state_dict()
        assert all(loaded[name].equal(tensor) for name, tensor in expected.items())


def test_a_tensor_in_two_shards_is_not_mended(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    folder = save_safetensors_shards(STATE, tmp_path / "m")
    save(
        {**{name: STATE[name] for name in "cd"}, "a": STATE["a"] + 1},
        tmp_path / "m" / "model-00002-of-00003.safetensors",
    )
    before = snapshot(tmp_path)
    assert "tensor-twice" in {finding.code for finding in diagnose(tmp_path / "m", deep=True).findings}, folder
    wconv("doctor", tmp_path / "m", "--fix", exit_code=1)
    assert snapshot(tmp_path) == before


def test_one_shard_of_one_gets_an_index(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    save(STATE, tmp_path / "m" / "model-00001-of-00001.safetensors")
    write_json(tmp_path / "m" / "config.json", CONFIG)
    assert [finding.code for finding in diagnose(tmp_path / "m").findings] == ["index-missing"]
    wconv("doctor", tmp_path / "m", "--fix")
    prediction = predict(list_folder(diagnose(tmp_path / "m").inventory), "transformers", None)
    assert prediction.picks[0].files == (INDEX, "model-00001-of-00001.safetensors")


# Odd folders give findings, no tracebacks.


@pytest.mark.parametrize("size", ["123", [1], {}, 10**400, -1, 1.5, True])
def test_a_total_size_of_any_kind(size: Any, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    content = json.loads((folder / INDEX).read_text())
    write_json(folder / INDEX, {**content, "metadata": {"total_size": size}})
    assert [finding.code for finding in diagnose(folder).findings] == ["index-size"]


@pytest.mark.parametrize("name", ["/nonexistent", "../m", "", ".", "a/b", "x" * 300])
def test_a_model_index_with_odd_names(name: str, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    save(STATE, tmp_path / "m" / "unet" / "model.safetensors")
    model_index = {"_class_name": "X", "unet": ["transformers", "LlamaForCausalLM"], name: ["diffusers", "X"]}
    write_json(tmp_path / "m" / "model_index.json", model_index)
    wconv("doctor", tmp_path / "m", "--loader", "diffusers", exit_code=1 if name == "x" * 300 else 0)


def test_a_variant_that_is_no_regular_expression(tmp_path: Path) -> None:
    from diffusers.pipelines.pipeline_loading_utils import variant_compatible_siblings

    save(STATE, tmp_path / "unet" / "model.safetensors")
    write_json(tmp_path / "model_index.json", {"_class_name": "X", "unet": ["transformers", "LlamaForCausalLM"]})
    with pytest.raises(Exception, match="unterminated subpattern"):
        variant_compatible_siblings(["unet/model.safetensors"], variant="(")
    assert "re.error" in predict(list_folder(diagnose(tmp_path).inventory), "diffusers-hub", "(").failure


def test_a_shard_with_too_long_a_name(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"]["z"] = "x" * 300 + ".safetensors"
    write_json(folder / INDEX, content)
    assert [finding.code for finding in diagnose(folder).findings] == ["index-unreadable"]


# No false alarm.


@pytest.mark.parametrize("metadata", [None, {"ss_network_module": "networks.lora"}])
def test_weights_that_no_library_loads_need_no_format(metadata: dict[str, Any] | None, tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "my_lora.safetensors", metadata=metadata)
    save_file(STATE, tmp_path / "consolidated.safetensors", metadata=metadata)
    assert diagnose(tmp_path).findings == ()


def test_a_format_of_another_framework(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors", metadata={"format": "mlx"})
    write_json(tmp_path / "config.json", CONFIG)
    assert diagnose(tmp_path).findings == ()


def test_parts_that_are_no_torch_models(tmp_path: Path) -> None:
    named = {
        "unet": ["transformers", "LlamaForCausalLM"],
        "tokenizer": ["transformers", "TokenizersBackend"],
        "vae": ["diffusers", "OVModel"],
    }
    write_json(tmp_path / "model_index.json", {"_class_name": "X", **named})
    save(STATE, tmp_path / "unet" / "model.safetensors")
    write_json(tmp_path / "tokenizer" / "tokenizer_config.json", {})
    write_json(tmp_path / "tokenizer" / "config.json", {"a": 1})
    write_json(tmp_path / "vae" / "config.json", {"a": 1})
    (tmp_path / "vae" / "openvino_model.bin").write_bytes(b"x")
    found = diagnose(tmp_path)
    assert found.findings == ()
    assert "tokenizer" not in [part.name for part in list_folder(found.inventory).parts]

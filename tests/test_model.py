"""Folders of every kind: what they are taken for, which weights they hold, what else is there, and hints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny import make_state, save, save_bin_shards, save_pipeline, write_json

from converter.errors import BadFile
from converter.libraries import library_of
from converter.libraries.diffusers import DIFFUSERS
from converter.libraries.transformers import TRANSFORMERS
from converter.models.model import Model, open_model
from converter.models.rest import find_rest
from converter.storage import place_of

STATE = make_state()


def sets_of(folder: Model) -> dict[str, list[str]]:
    """Give the names of each component's sets."""
    return {owner.name: [found.path.name for found in owner.weight_sets] for owner in folder.components}


def rest_of(folder: Model, skip: Path | None = None) -> dict[str, bool]:
    """Give what else is there, and whether it holds weights."""
    return {
        one.path.relative_to(folder.root): one.is_weights for one in find_rest(folder, place_of(skip) if skip else None)
    }


# Kinds.


def test_a_file_stands_for_itself(tmp_path: Path) -> None:
    path = save(STATE, tmp_path / "a" / "pytorch_model.bin")
    save(STATE, tmp_path / "a" / "other.bin")
    folder = open_model(path)
    assert (folder.kind, folder.path.path, folder.root.path) == ("file", path, path.parent)
    assert sets_of(folder) == {"": ["pytorch_model.bin"]}


def test_an_index_stands_for_its_set(tmp_path: Path) -> None:
    index = save_bin_shards(STATE, tmp_path)
    folder = open_model(index)
    assert folder.kind == "file"
    assert sets_of(folder) == {"": ["pytorch_model.bin.index.json"]}


def test_a_plain_folder(tmp_path: Path) -> None:
    save(STATE, tmp_path / "weights.pt")
    folder = open_model(tmp_path)
    assert (folder.kind, sets_of(folder)) == ("folder", {"": ["weights.pt"]})


def test_a_transformers_folder(tmp_path: Path) -> None:
    save_bin_shards(STATE, tmp_path)
    write_json(tmp_path / "config.json", {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False})
    folder = open_model(tmp_path)
    assert folder.kind == "transformers"
    assert folder.components[0].class_name == "LlamaForCausalLM"
    assert library_of(folder.components[0]) is TRANSFORMERS


def test_a_diffusers_component(tmp_path: Path) -> None:
    save(STATE, tmp_path / "diffusion_pytorch_model.bin")
    write_json(tmp_path / "config.json", {"_class_name": "AutoencoderKL"})
    folder = open_model(tmp_path)
    assert (folder.kind, folder.components[0].class_name) == ("component", "AutoencoderKL")
    assert library_of(folder.components[0]) is DIFFUSERS


def test_a_pipeline(tmp_path: Path) -> None:
    folder = open_model(save_pipeline(tmp_path))
    assert (folder.kind, folder.class_name) == ("pipeline", "P")
    assert sets_of(folder) == {
        "text_encoder": ["pytorch_model.bin"],
        "unet": ["diffusion_pytorch_model.bin.index.json"],
        "vae": ["diffusion_pytorch_model.bin"],
    }


def test_weights_beside_a_pipeline_are_no_component(tmp_path: Path) -> None:
    save(STATE, save_pipeline(tmp_path) / "v1-5.ckpt")
    folder = open_model(tmp_path)
    assert "" not in sets_of(folder)
    assert rest_of(folder)["v1-5.ckpt"]


def test_a_sentence_transformers_folder(tmp_path: Path) -> None:
    save(STATE, tmp_path / "pytorch_model.bin")
    save(STATE, tmp_path / "2_Dense" / "pytorch_model.bin")
    write_json(tmp_path / "1_Pooling" / "config.json", {})
    write_json(tmp_path / "modules.json", [])
    folder = open_model(tmp_path)
    assert folder.kind == "sentence-transformers"
    assert sets_of(folder) == {"": ["pytorch_model.bin"], "2_Dense": ["pytorch_model.bin"]}


@pytest.mark.parametrize(
    "config",
    [{}, {"architectures": []}, {"architectures": None}, {"architectures": [3]}, {"_class_name": ["a", "b"]}, []],
)
def test_a_config_that_names_no_class(config: dict[str, Any] | list[Any], tmp_path: Path) -> None:
    save(STATE, tmp_path / "pytorch_model.bin")
    write_json(tmp_path / "config.json", config)
    assert open_model(tmp_path).components[0].class_name == ""


def test_every_variant_is_listed(tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "pytorch_model.fp16.bin", "model.fp16.safetensors"):
        save(STATE, tmp_path / name)
    assert sets_of(open_model(tmp_path)) == {
        "": ["model.fp16.safetensors", "pytorch_model.bin", "pytorch_model.fp16.bin"]
    }


# A cache of links, as huggingface_hub makes it.


def cache_of(folder: Path, root: Path) -> Path:
    """Put a folder's files into blobs, and links to them into a snapshot; give the snapshot."""
    for number, path in enumerate(sorted(folder.rglob("*"))):
        if path.is_file():
            blob = root / "blobs" / f"{number:064x}"
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(path.read_bytes())
            link = root / "snapshots" / "0123abc" / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            depth = len(link.relative_to(root).parts) - 1
            link.symlink_to(Path(*[".."] * depth, "blobs", blob.name))
    return root / "snapshots" / "0123abc"


def test_a_cache_of_links_is_like_the_folder(tmp_path: Path) -> None:
    folder = open_model(save_pipeline(tmp_path / "model"))
    linked = open_model(cache_of(folder.path.path, tmp_path / "cache"))
    assert (linked.kind, sets_of(linked), rest_of(linked)) == ("pipeline", sets_of(folder), rest_of(folder))


def test_a_cache_of_links_converts_into_a_new_folder_without_links(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    plain = save_pipeline(tmp_path / "model")
    snapshot = cache_of(plain, tmp_path / "cache")
    wconv("to-safetensors", snapshot, "-o", tmp_path / "out")
    wconv("to-safetensors", plain, "-o", tmp_path / "expected")
    written = {path.relative_to(tmp_path / "out"): path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    expected = {path.relative_to(tmp_path / "expected"): path for path in (tmp_path / "expected").rglob("*.*")}
    assert written.keys() == expected.keys()
    assert all(not path.is_symlink() and path.read_bytes() == expected[name].read_bytes()
               for name, path in written.items())  # fmt: skip


def test_a_link_in_a_cache_may_be_named(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    snapshot = cache_of(save_pipeline(tmp_path / "model"), tmp_path / "cache")
    wconv("to-safetensors", snapshot / "vae" / "diffusion_pytorch_model.bin", "-o", tmp_path / "vae")
    wconv("to-safetensors", snapshot / "unet" / "diffusion_pytorch_model-00001-of-00002.bin", "-o", tmp_path / "unet")
    assert (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()


# The rest.


def test_the_rest_is_all_but_the_components_weights(tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path)
    for name in ("README.md", "unet/model.onnx", ".git/config", "tokenizer/__pycache__/x.pyc", "unet/.keep.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    assert rest_of(open_model(folder)) == {
        "README.md": False,
        "model_index.json": False,
        "scheduler/scheduler_config.json": False,
        "text_encoder/config.json": False,
        "tokenizer/vocab.json": False,
        "unet/.keep.txt": False,
        "unet/config.json": False,
        "unet/model.onnx": True,
        "vae/config.json": False,
    }


def test_the_rest_leaves_out_what_is_skipped(tmp_path: Path) -> None:
    folder = open_model(save_pipeline(tmp_path))
    assert not any(name.startswith("vae") for name in rest_of(folder, skip=tmp_path / "vae"))


def test_a_circle_of_links_ends(tmp_path: Path) -> None:
    save(STATE, tmp_path / "a" / "pytorch_model.bin")
    write_json(tmp_path / "a" / "config.json", {})
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a", target_is_directory=True)
    assert set(rest_of(open_model(tmp_path / "a"))) == {"config.json", "again"}


# Nothing to be found.


def test_a_folder_without_weights_hints_at_its_folders(tmp_path: Path) -> None:
    save(STATE, tmp_path / "b" / "pytorch_model.bin")
    save(STATE, tmp_path / "a" / "x.pt")
    (tmp_path / "c").mkdir()
    with pytest.raises(BadFile, match="no weights") as caught:
        open_model(tmp_path)
    assert caught.value.advice == "Name one of its folders that do: a, b."


def test_a_folder_without_any_weights_says_what_weights_are(tmp_path: Path) -> None:
    save(STATE, tmp_path / "training_args.bin")
    write_json(tmp_path / "config.json", {})
    with pytest.raises(BadFile, match="no weights") as caught:
        open_model(tmp_path)
    assert ".safetensors" in caught.value.advice


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="does not exist"):
        open_model(tmp_path / "none")


@pytest.mark.parametrize("raw", [b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_config_that_is_no_json_is_named(raw: bytes, tmp_path: Path) -> None:
    save(STATE, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(BadFile, match=r"config\.json"):
        open_model(tmp_path)

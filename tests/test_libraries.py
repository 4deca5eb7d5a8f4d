"""Which library loads a folder, and which a part of it: by its config, or by the names of its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny import make_state, save, write_json

from converter.libraries import library_at, library_of, loader_of
from converter.libraries.base import Library
from converter.libraries.diffusers import DIFFUSERS
from converter.libraries.peft import PEFT
from converter.libraries.sentence_transformers import SENTENCE_TRANSFORMERS
from converter.libraries.timm import TIMM
from converter.libraries.transformers import TRANSFORMERS
from converter.models.inventory import take_inventory
from converter.models.model import open_model

UNET = {"_class_name": "UNet2DConditionModel"}
LLAMA = {"architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize(
    ("config", "name", "part", "whole"),
    [
        (UNET, "diffusion_pytorch_model.bin", DIFFUSERS, DIFFUSERS),
        (LLAMA, "model.safetensors", TRANSFORMERS, TRANSFORMERS),
        ({"model_type": "t5"}, "model.safetensors", TRANSFORMERS, TRANSFORMERS),
        ({"architecture": "resnet18"}, "model.safetensors", TIMM, TIMM),
        ({"architecture": "resnet18", **LLAMA}, "model.safetensors", TRANSFORMERS, TRANSFORMERS),
        ({}, "model.safetensors", TRANSFORMERS, TRANSFORMERS),
        ({}, "adapter_model.bin", PEFT, PEFT),
        # The model that an adapter is for says what stays float32 in it.
        (UNET, "adapter_model.safetensors", DIFFUSERS, PEFT),
    ],
)
def test_the_library_of_a_folder(
    config: dict[str, Any], name: str, part: Library, whole: Library, tmp_path: Path
) -> None:
    save(make_state(), tmp_path / name)
    write_json(tmp_path / "config.json", config)
    folder = open_model(tmp_path)
    assert library_of(folder.components[0]) is part
    assert loader_of(folder) is whole


@pytest.mark.parametrize(
    ("name", "expected"), [("model_index.json", DIFFUSERS), ("modules.json", SENTENCE_TRANSFORMERS)]
)
def test_a_folder_of_parts_is_loaded_as_a_whole(name: str, expected: Library, tmp_path: Path) -> None:
    save(make_state(), tmp_path / "text_encoder" / "model.safetensors")
    write_json(tmp_path / "text_encoder" / "config.json", LLAMA)
    write_json(tmp_path / name, {})
    folder = open_model(tmp_path)
    assert loader_of(folder) is expected
    assert library_of(folder.components[-1]) is TRANSFORMERS


@pytest.mark.parametrize(
    ("config", "package", "stem", "expected"),
    [
        (LLAMA, "diffusers", "diffusion_pytorch_model", TRANSFORMERS),
        ({}, "diffusers", "model", DIFFUSERS),
        ({}, "transformers", "diffusion_pytorch_model", TRANSFORMERS),
        ({}, None, "diffusion_pytorch_model", DIFFUSERS),
        ({}, "mine", "model", TRANSFORMERS),
    ],
)
def test_without_a_config_others_tell(
    config: dict[str, Any], package: str | None, stem: str, expected: Library, tmp_path: Path
) -> None:
    save(make_state(), tmp_path / "unet" / f"{stem}.safetensors")
    if config:
        write_json(tmp_path / "unet" / "config.json", config)
    write_json(tmp_path / "model_index.json", {"unet": [package, "X"]} if package else {})
    [part] = take_inventory(tmp_path).parts
    assert library_at(part) is expected


def test_an_adapter_beside_a_config_is_no_model(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(make_state(), tmp_path / "adapter_model.safetensors")
    write_json(tmp_path / "config.json", LLAMA)
    said = wconv("doctor", tmp_path, "--loader", "transformers", exit_code=1).stdout
    assert "no file named pytorch_model.bin" in said

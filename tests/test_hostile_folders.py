"""Folders and small files made to take time or memory by their names, their number, or what their tensors expand to.

The time is the processor's, and the limit that ends a run leaves room for a machine of half the speed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from support.tiny import write_json

ONE = save({"a": torch.ones(1)}, {"format": "pt"})
READ = """
import resource, sys
from converter.cli import main
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
sys.exit(main(sys.argv[1:]))
"""


def run(*args: object) -> int:
    command = [sys.executable, "-c", READ, *map(str, args)]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode


def indexes_cut_short(folder: Path) -> None:
    for number in range(15_000):
        (folder / f"m{number}.bin.index.json").touch()
    (folder / "model.safetensors").write_bytes(ONE)


def variants_in_two_forms(folder: Path) -> None:
    for number in range(3_000):
        (folder / f"model.v{number}.safetensors").write_bytes(ONE)
        (folder / f"pytorch_model.v{number}.bin").write_bytes(ONE)


def variants_and_a_config_of_many_parts(folder: Path) -> None:
    for number in range(150):
        (folder / f"m{number}.fp16.safetensors").write_bytes(ONE)
    write_json(folder / "config.json", {"_class_name": "X", **{f"k{number}": {"a": 1} for number in range(170_000)}})


def a_variant_that_is_a_costly_pattern(folder: Path) -> None:
    write_json(folder / "model_index.json", {"_class_name": "X", "unet": ["diffusers", "UNet2DConditionModel"]})
    (folder / "unet").mkdir()
    for variant in ("(x+x+)+y", "x" * 60):
        (folder / "unet" / f"diffusion_pytorch_model.{variant}.safetensors").write_bytes(ONE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (indexes_cut_short, ()),
        (variants_in_two_forms, ()),
        (variants_and_a_config_of_many_parts, ()),
        (a_variant_that_is_a_costly_pattern, ("--loader", "diffusers-hub")),
    ],
)
def test_the_doctor_looks_at_thousands_of_files(
    tmp_path: Path, make: Callable[[Path], None], options: tuple[str, ...]
) -> None:
    make(tmp_path)
    assert run("doctor", tmp_path, *options) in (0, 1)


@pytest.mark.slow
def test_thousands_of_variants_are_written_again(tmp_path: Path) -> None:
    for number in range(6_000):
        (tmp_path / f"model.v{number}.safetensors").write_bytes(ONE)
    assert run("to-safetensors", tmp_path, "--overwrite", "--dry-run") == 0


@pytest.mark.parametrize("shape", [(1 << 33, 1), (2, 1 << 40)])
def test_tensors_that_expand_without_end_are_not_read(wconv: Any, tmp_path: Path, shape: tuple[int, ...]) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    torch.save({"model.q_proj.weight": torch.ones(1).expand(shape)}, folder / "pytorch_model.bin")
    write_json(folder / "config.json", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    for command in (
        ("quantize", folder, "-o", tmp_path / "out"),
        ("doctor", folder, "--deep"),
        ("verify", folder, folder),
    ):
        assert "'model.q_proj.weight', of" in wconv(*command, exit_code=4).stderr


def test_as_many_rows_as_no_model_has_are_not_quantized(wconv: Any, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    weight = torch.ones(1, dtype=torch.float16).expand(40_000_000, 1)  # 80 MB in full: within what may be written
    torch.save({"model.q_proj.weight": weight}, folder / "pytorch_model.bin")
    write_json(folder / "config.json", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    assert "bytes of scales" in wconv("quantize", folder, "-o", tmp_path / "out", exit_code=3).stderr


def test_an_expanded_tensor_and_what_was_written_of_it_are_the_same(
    wconv: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("converter.models.growth.MAX_GROWTH_NBYTES", 1_000)
    torch.save({"a": torch.ones(1).expand(1_000)}, tmp_path / "a.bin")
    wconv("to-safetensors", tmp_path / "a.bin", "-o", tmp_path / "out", "--expand")
    assert json.loads(wconv("verify", tmp_path / "a.bin", tmp_path / "out", "--json").stdout)["equal"]

"""The section of the bench on single files: Stable Diffusion XL in float16 as one, and back, beside `cp` of that file.

Names and shapes are the published ones; below 4 GB it is Stable Diffusion 1. What comes back is held against what it
came from, byte for byte.
"""

from __future__ import annotations

import filecmp
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_models import GB, ROOT, SEED, Shape
from bench_runs import OK, WRONG, Bench, Figures, Row, made_once, ratios_of, run, run_in_turn, weights_nbytes, within

REACH = 1.15
REACH_MB = 80.0


@dataclass(frozen=True, slots=True)
class Halves:
    """Random float16, drawn when its bytes are asked for: one tensor is in memory at a time."""

    shape: Shape
    seed: int

    @property
    def nbytes(self) -> int:
        return 2 * math.prod(self.shape)

    def tobytes(self) -> bytes:
        return np.random.default_rng((SEED, self.seed)).bytes(self.nbytes)


def measure_single_file(bench: Bench) -> Iterator[Row]:
    """Run `cp` of the file, and wconv there and back, in turn."""
    kind = "sdxl" if bench.gb >= 4 else "sd1"
    pipeline = made_once(bench.folder / kind, lambda folder: write_pipeline(kind, folder))
    files = made_once(bench.folder / f"{kind}-file", lambda folder: make_file(bench, pipeline, folder))
    file, wconv = files / "model.safetensors", bench.trees["now"]
    nbytes = weights_nbytes(files)
    commands = {
        "cp": ["cp", str(file), str(bench.out.parent)],
        "to-single-file": [*wconv, "to-single-file", str(pipeline), "-o", str(bench.out.parent / file.name)],
        "to-diffusers": [*wconv, "to-diffusers", str(file), "-o", str(bench.out)],
    }
    run_in_turn(bench, 1, commands, nbytes)  # for warming up
    runs = run_in_turn(bench, bench.pairs, commands, nbytes)
    yield Row("single file", f"cp of the file ({kind}, {nbytes / GB:.1f} GB)", Figures(runs["cp"]), read_nbytes=nbytes)
    for name in list(commands)[1:]:
        figures, ratios = Figures(runs[name]), ratios_of(runs["cp"], runs[name])
        reach = within((sorted(ratios)[len(ratios) // 2], REACH, "x cp"), (figures.peak_mb, REACH_MB, "MB"))
        yield Row("single file", name, figures, ratios, *reach, read_nbytes=nbytes)
    yield Row("single file", "there and back", verdict=OK if comes_back(bench, pipeline, file) else WRONG)


def comes_back(bench: Bench, pipeline: Path, file: Path) -> bool:
    """Say whether the pipeline that is made of the file has the weights of the one that the file is made of."""
    shutil.rmtree(bench.out, ignore_errors=True)
    run("to-diffusers, to be compared", [*bench.trees["now"], "to-diffusers", str(file), "-o", str(bench.out)])
    names = [path.relative_to(pipeline) for path in pipeline.rglob("*.safetensors")]
    filecmp.clear_cache()
    return all(filecmp.cmp(pipeline / name, bench.out / name, shallow=False) for name in names)


def make_file(bench: Bench, pipeline: Path, folder: Path) -> None:
    command = [*bench.trees["now"], "to-single-file", str(pipeline), "-o", str(folder / "model.safetensors")]
    run("to-single-file, for others", command)


def write_pipeline(kind: str, folder: Path) -> None:
    """Write a pipeline as Diffusers does, with transformers 4: configs as shipped, one file a part."""
    shutil.copytree(ROOT / "converter" / "configs" / kind, folder, dirs_exist_ok=True)
    seed = 0
    for path in sorted(folder.glob("*/config.json")):
        shapes = shapes_of(path)
        stem = "model" if path.parent.name.startswith("text") else "diffusion_pytorch_model"
        tensors = {name: Halves(shape, seed + at) for at, (name, shape) in enumerate(sorted(shapes.items()))}
        write_file(path.with_name(f"{stem}.safetensors"), tensors)
        seed += len(tensors)


def shapes_of(config: Path) -> dict[str, Shape]:
    """Give names and shapes of the model of a config."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    name = config.parent.name
    with torch.device("meta"):
        if name.startswith("text"):
            kind = CLIPTextModel if name == "text_encoder" else CLIPTextModelWithProjection
            state = kind(CLIPTextConfig.from_pretrained(config.parent)).state_dict()
        else:
            model: Any = UNet2DConditionModel if name == "unet" else AutoencoderKL
            state = model.from_config(model.load_config(config.parent)).state_dict()
    prefix = "text_model." if name == "text_encoder" else ""
    return {prefix + key: tuple(tensor.shape) for key, tensor in state.items()}


def write_file(path: Path, tensors: dict[str, Halves]) -> None:
    """Write a safetensors file, a tensor at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F16", "shape": tensor.shape, "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.tobytes())

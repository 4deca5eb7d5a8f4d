"""Pipelines whose model lies at the root, beside model_index.json: what is read and predicted, judged by Diffusers."""

from __future__ import annotations

import ast
import functools
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_doctor
import torch
from safetensors.torch import load_file
from support.tiny import make_state, save, snapshot, write_json
from test_doctor import files_in, opened_by
from test_loaders import assert_same_bits

from converter.doctor import diagnose
from converter.libraries.predict import list_folder, predict
from converter.models.model import open_model

pytestmark = pytest.mark.usefixtures("asked_here")
hub = test_doctor.hub


def flatten(part: Path) -> None:
    """Move what a part's folder holds one up."""
    for path in part.iterdir():
        path.rename(part.parent / path.name)
    part.rmdir()


def save_ddpm(builders: Any, folder: Path, pickled: bool = False) -> Path:
    """Write an unconditional pipeline as those of 2022 lie on the Hub."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, **blocks)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder, safe_serialization=not pickled)
    flatten(folder / "unet")
    flatten(folder / "scheduler")
    return folder


def save_llada(builders: Any, folder: Path) -> Path:
    """Write a text pipeline of 2026: a sharded transformers model at the root, and a scheduler in its folder."""
    from diffusers import BlockRefinementScheduler, LLaDA2Pipeline

    pipeline = LLaDA2Pipeline(model=builders.make_llama(tied=False), scheduler=BlockRefinementScheduler())
    pipeline.save_pretrained(folder, max_shard_size="40KB")
    flatten(folder / "model")
    return folder


def save_half_flat(builders: Any, folder: Path) -> Path:
    """Write a pipeline of which one part lies at the root, and the others in their folders."""
    builders.make_sd(safety_checker=False).save_pretrained(folder)
    flatten(folder / "unet")
    return folder


MAKE: dict[str, Callable[[Any, Path], Path]] = {
    "ddpm": save_ddpm,
    "ddpm-bin": functools.partial(save_ddpm, pickled=True),
    "llada": save_llada,
    "half": save_half_flat,
}


@pytest.fixture(scope="module")
def flat(builders: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("flat")
    return functools.cache(lambda name: MAKE[name](builders, root / name))


def load(folder: Path, **how: Any) -> dict[str, torch.Tensor]:
    """Load a pipeline; give the values of all of its parts."""
    from diffusers import DiffusionPipeline

    return values_of(DiffusionPipeline.from_pretrained(folder, **how))


def values_of(pipeline: Any) -> dict[str, torch.Tensor]:
    parts = pipeline.components.items()
    models = {name: part for name, part in parts if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": value for name, part in models.items() for key, value in part.state_dict().items()}


@pytest.mark.parametrize("name", MAKE)
def test_it_is_read_and_written(
    name: str, flat: Callable[[str], Path], wconv: Callable[..., Any], tmp_path: Path
) -> None:
    source, out = flat(name), tmp_path / "out"
    told = json.loads(wconv("inspect", source, "--json").stdout)
    assert (told["kind"], told["weight_sets"][0]["component"]) == ("pipeline", "")
    assert "DiffusionPipeline.from_pretrained(" in wconv("to-safetensors", source, "-o", out).stdout
    assert_same_bits(load(out, use_safetensors=True), load(source))
    assert wconv("verify", source, out).stdout.startswith("The same: ")
    wconv("reshard", source, "-o", tmp_path / "one", "--max-shard-size", "none")
    assert_same_bits(load(tmp_path / "one"), load(source))


@pytest.mark.parametrize("name", MAKE)
def test_diffusers_opens_what_is_predicted(name: str, flat: Callable[[str], Path], hub: Any) -> None:
    for variant in (None, "fp16"):
        for loader in ("diffusers", "diffusers-hub"):
            assert_predicted(flat(name), loader, variant, hub)


def assert_predicted(folder: Path, loader: Any, variant: str | None, hub: Callable[[Path], Path]) -> None:
    from diffusers import DiffusionPipeline

    prediction = predict(list_folder(diagnose(folder).inventory), loader, variant)
    place, error = folder, ""
    if loader == "diffusers-hub":
        place = hub(folder)
        error = opened_by(functools.partial(DiffusionPipeline.download, "some/model", variant=variant), place)[0]
    error, opened = (error, set()) if error else opened_by(functools.partial(load, place, variant=variant), place)
    assert prediction.works == (not error), (loader, variant, prediction, error)
    assert not prediction.works or opened == files_in(prediction)


@pytest.mark.filterwarnings("ignore:.torch_dtype. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["ddpm", "llada", "half"])
def test_a_recast_takes_names_that_are_found(
    name: str, flat: Callable[[str], Path], wconv: Callable[..., Any], copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder, out = copy_of(flat(name)), tmp_path / "out"
    before = snapshot(folder)
    assert "finds no variants" in wconv("recast", folder, "--dtype", "bf16", exit_code=2).stderr
    assert snapshot(folder) == before
    loaded = run_lines(wconv("recast", folder, "--dtype", "bf16", "-o", out).stdout)
    assert_same_bits(values_of(loaded), load(folder, dtype=torch.bfloat16))
    assert not list(out.rglob("*bf16*"))


def run_lines(said: str) -> Any:
    """Run the lines that load what a command wrote; give what the last one gives."""
    *setup, last = ast.parse(textwrap.dedent(said.split("Load it with:\n")[1])).body
    assert isinstance(last, ast.Expr)
    scope: dict[str, Any] = {}
    exec(compile(ast.Module(setup, []), "<said>", "exec"), scope)
    return eval(compile(ast.Expression(last.value), "<said>", "eval"), scope)


def test_a_variant_is_never_asked_for_at_the_root(
    flat: Callable[[str], Path], hub: Any, copy_of: Callable[[Path], Path], wconv: Callable[..., Any]
) -> None:
    folder = copy_of(flat("half"))
    shown = wconv("recast", folder, "--dtype", "fp16", "--variant", "fp16").stdout
    assert "Note: Diffusers at the root finds no variants" in shown
    for loader in ("diffusers", "diffusers-hub"):
        assert_predicted(folder, loader, "fp16", hub)
    prediction = predict(list_folder(diagnose(folder).inventory), "diffusers", "fp16")
    assert {"diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors"} <= files_in(
        prediction
    )
    assert run_lines(shown).keys() == load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").keys()


@pytest.mark.parametrize("name", ["ddpm", "llada"])
def test_a_tag_at_the_root_is_found_and_taken_off(
    name: str, flat: Callable[[str], Path], hub: Any, copy_of: Callable[[Path], Path], wconv: Callable[..., Any]
) -> None:
    folder = copy_of(flat(name))
    before = load(folder)
    wconv("rename-variant", folder, "--from", "none", "--to", "bf16")
    with pytest.raises(ValueError, match="no such modeling files"):
        load(folder, variant="bf16")
    assert "error name-unread" in wconv("doctor", folder, exit_code=1).stdout
    shown = wconv("doctor", folder, "--fix", "--dry-run", exit_code=1).stdout
    assert "asked for no variant, would then open:" in shown
    wconv("doctor", folder, "--fix")
    assert_same_bits(load(folder), before)
    assert_predicted(folder, "diffusers", None, hub)


def test_only_what_loaders_look_for_is_a_part(tmp_path: Path) -> None:
    write_json(tmp_path / "model_index.json", {"_class_name": "P", "unet": ["diffusers", "UNet2DModel"]})
    write_json(tmp_path / "config.json", {"_class_name": "UNet2DModel"})
    for name in ("diffusion_pytorch_model.safetensors", "v1-5.ckpt"):
        save(make_state(), tmp_path / name)
    (one,) = open_model(tmp_path).components
    assert [found.path.name for found in one.weight_sets] == ["diffusion_pytorch_model.safetensors"]
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    assert [found.code for found in diagnose(tmp_path).findings] == ["component-missing"]


def test_the_class_of_a_custom_pipeline_is_no_part(builders: Any, wconv: Callable[..., Any], tmp_path: Path) -> None:
    folder = save_half_flat(builders, tmp_path / "m")
    (folder / "unet").mkdir()
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (folder / name).rename(folder / "unet" / name)
    content = json.loads((folder / "model_index.json").read_text("utf-8"))
    write_json(folder / "model_index.json", {**content, "_class_name": ["my_pipe", "MyPipe"]})
    wconv("doctor", folder)
    assert "DiffusionPipeline" not in wconv("to-safetensors", folder, "-o", tmp_path / "out").stdout
    assert [one.name for one in open_model(folder).components] == ["text_encoder", "unet", "vae"]

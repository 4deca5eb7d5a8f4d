"""A Diffusers pipeline as one file for UIs, and back: nothing is changed on the way, and the real readers take both."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import original
from support.tiny import write_json
from test_single_file import REST, judge, write_hollow

from converter.errors import WconvError
from converter.models.checkpoint import open_checkpoint
from converter.transforms.single_file.pipeline import CONFIGS, open_single_file

KINDS = ("sd1", "sd2", "sdxl")
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
Made = Callable[[str], tuple[Any, Path]]


@pytest.fixture(scope="module")
def made(builders: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Make a pipeline and its folder, as Diffusers and transformers 5 write it: not to be written to."""

    @cache
    def make(kind: str) -> tuple[Any, Path]:
        model = builders.MODELS["sdxl"]() if kind == "sdxl" else builders.make_sd(safety_checker=False)
        if kind == "sd2":
            config = builders.clip_config()
            config.num_hidden_layers = 23
            model.register_modules(text_encoder=type(model.text_encoder)(config).eval())
        builders.shake(model)
        folder = tmp_path_factory.mktemp(kind) / "model"
        model.save_pretrained(folder)
        return model, folder

    return make


@pytest.fixture
def copied(made: Made, tmp_path: Path) -> Callable[[str], Path]:
    """Give a copy of such a folder, to be damaged."""
    return lambda kind: Path(shutil.copytree(made(kind)[1], tmp_path / "model"))


def edit_json(path: Path, **changes: Any) -> None:
    write_json(path, {**json.loads(path.read_text()), **changes})


def states_of(model: Any, builders: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Give the tensors of each part under the names that published folders have."""
    states = {}
    for name, part in builders.models_in(model).items():
        state = builders.state_as_published(part) if "text" in name else part.state_dict()
        states[name] = {key: tensor for key, tensor in state.items() if "position_ids" not in key}
    return states


def as_original(kind: str, model: Any, builders: Any) -> dict[str, torch.Tensor]:
    """Give what a single file should hold, by rules that are not wconv's: OpenCLIP without what no pipeline has."""
    parts = builders.models_in(model)
    state = original.as_original(kind, states_of(model, builders), {name: part.config for name, part in parts.items()})
    if kind == "sd1":
        return state
    prefix = original.ENCODERS[kind]["text_encoder" if kind == "sd2" else "text_encoder_2"]
    last = f"{prefix}transformer.resblocks.{23 if kind == 'sd2' else 2}."
    more = {f"{prefix}text_projection"} if kind == "sd2" else set()
    return {name: tensor for name, tensor in state.items() if not name.startswith(last) and name not in more}


def equal(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def same_files(one: Path, other: Path) -> set[str]:
    """Give the files of a folder that lie in another one just so, and check that both have the same."""
    names = {path.relative_to(one).as_posix() for path in one.rglob("*") if path.is_file()}
    assert names == {path.relative_to(other).as_posix() for path in other.rglob("*") if path.is_file()}
    return {name for name in names if (one / name).read_bytes() == (other / name).read_bytes()}


# There and back.


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_the_same(
    kind: str, made: Made, builders: Any, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    model, folder = made(kind)
    wconv("to-single-file", folder, "-o", tmp_path / "model.safetensors")
    assert equal(load_file(tmp_path / "model.safetensors"), as_original(kind, model, builders))
    wconv("to-diffusers", tmp_path / "model.safetensors", "--config", folder, "-o", tmp_path / "back")
    same = same_files(folder, tmp_path / "back")
    # transformers 5 leaves out a prefix that version 4 needs, and that is written.
    lacking = {"text_encoder/model.safetensors"}
    assert same >= {path.relative_to(folder).as_posix() for path in folder.rglob("*.*") if path.is_file()} - lacking
    [text] = lacking
    mine = {name.removeprefix("text_model."): one for name, one in load_file(tmp_path / "back" / text).items()}
    assert equal(mine, load_file(folder / text))
    wconv("to-single-file", tmp_path / "back", "-o", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["sd2", "sdxl", pytest.param("sd1", marks=pytest.mark.slow)])
def test_diffusers_loads_it(kind: str, made: Made, builders: Any, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    model, folder = made(kind)
    source = tmp_path / ("model.ckpt" if kind == "sd1" else "model.safetensors")
    told = wconv("to-single-file", folder, "-o", source).stdout
    assert f"Pipeline.from_single_file({str(source)!r})" in told
    assert ("the last layer of the text encoder is in no pipeline" in told) == (kind == "sd2")
    loaded = judge(kind, source, folder)
    for name, part in builders.models_in(model).items():
        assert equal(getattr(loaded, name).state_dict(), part.state_dict()), name
    assert torch.equal(builders.forward(loaded), builders.forward(model))


def test_variants_shards_and_pickles_give_the_same(
    made: Made, builders: Any, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    model, folder = made("sdxl")
    builders.save_bin(model, tmp_path / "bin", shards=3)
    wconv("recast", folder, "--dtype", "fp16", "-o", tmp_path / "both", "--variant", "fp16")
    wconv("to-single-file", folder, "--dtype", "fp16", "-o", tmp_path / "1.safetensors")
    wconv("to-single-file", tmp_path / "both", "--from-variant", "fp16", "-o", tmp_path / "2.safetensors")
    wconv("to-single-file", tmp_path / "bin", "--dtype", "fp16", "-o", tmp_path / "3.safetensors")
    first, second, third = (load_file(tmp_path / f"{number}.safetensors") for number in (1, 2, 3))
    assert equal(first, second)
    ids = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"  # as transformers 4 saved them
    assert torch.equal(third.pop(ids), torch.arange(77).unsqueeze(0))
    assert equal(first, third)
    assert equal(first, {name: one.half() for name, one in as_original("sdxl", model, builders).items()})


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder_2"])
def test_a_part_alone(part: str, made: Made, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    model, folder = made("sdxl")
    source = tmp_path / "part.safetensors"
    told = wconv("to-single-file", folder / part, "-o", source).stdout
    expected = getattr(model, part).state_dict()
    if part == "text_encoder_2":  # UIs know the names that transformers has
        assert equal(load_file(source), expected)
    else:
        kind = UNet2DConditionModel if part == "unet" else AutoencoderKL
        assert f"{kind.__name__}.from_single_file" in told
        loaded = kind.from_single_file(str(source), config=str(folder), subfolder=part, local_files_only=True)
        assert equal(loaded.state_dict(), expected)
    for config in (folder, folder / part) if part == "unet" else (folder / part,):
        wconv("to-diffusers", source, "--config", config, "-o", tmp_path / "out", "--overwrite")
        assert len(same_files(folder / part, tmp_path / "out")) == 2


def test_one_part_of_a_whole_file(made: Made, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    _, folder = made("sdxl")
    source = tmp_path / "model.safetensors"
    wconv("to-single-file", folder, "-o", source)
    told = wconv("to-diffusers", source, "--config", folder / "vae", "-o", tmp_path / "vae").stdout
    assert "the vae is taken, as --config has it; 277 other tensors are left out" in told
    assert len(same_files(folder / "vae", tmp_path / "vae")) == 2
    for words, problem in (("--ema", "--ema is for a diffusion model"), ("--without", "nothing else than what is to")):
        more = [words, "vae"][: 2 if words == "--without" else 1]
        done = wconv("to-diffusers", source, "--config", folder / "vae", *more, "-o", tmp_path / "x", exit_code=2)
        assert problem in done.stderr


def test_a_vae_of_older_names(made: Made, copied: Any, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    folder = copied("sd1")
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    state = load_file(path)
    for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items():
        state = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): one for name, one in state.items()}
    save_file(state, path)
    wconv("to-single-file", made("sd1")[1], "-o", tmp_path / "new.safetensors")
    wconv("to-single-file", folder, "-o", tmp_path / "old.safetensors")
    assert (tmp_path / "old.safetensors").read_bytes() == (tmp_path / "new.safetensors").read_bytes()


# What is left out.


def test_what_is_left_out_is_said(
    made: Made, builders: Any, copied: Any, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    from diffusers import DiffusionPipeline

    model, _ = made("sdxl")
    folder = copied("sdxl")
    builders.make_safety_checker().save_pretrained(folder / "image_encoder")
    edit_json(folder / "model_index.json", image_encoder=["transformers", "CLIPVisionModelWithProjection"])
    (folder / "vae copy").mkdir()
    shutil.copy(folder / "vae/diffusion_pytorch_model.safetensors", folder / "vae copy")
    told = wconv("to-single-file", folder, "--without", "vae", "-o", tmp_path / "model.safetensors").stdout
    assert "left out, as asked: vae" in told
    assert "left out: image_encoder (no single file holds it)" in told
    assert "left out: vae copy (model_index.json does not name it)" in told
    assert f"StableDiffusionXLPipeline.from_single_file('{tmp_path / 'model.safetensors'}', vae=vae)" in told
    shown = wconv("inspect", tmp_path / "model.safetensors").stdout
    assert "layout: a Stable Diffusion XL checkpoint with unet, text_encoder, text_encoder_2, as its trainer" in shown
    names = load_file(tmp_path / "model.safetensors").keys()
    assert names == {name for name in as_original("sdxl", model, builders) if not name.startswith("first_stage")}

    wconv("to-single-file", folder, "-o", tmp_path / "all.safetensors")
    source = tmp_path / "all.safetensors"
    told = wconv("to-diffusers", source, "--config", folder, "--without", "vae", "-o", tmp_path / "no_vae").stdout
    assert "left out, as asked: vae (124 tensors)" in told
    assert f"DiffusionPipeline.from_pretrained('{tmp_path / 'no_vae'}', vae=vae)" in told
    assert "# vae: of the pipeline that it is for" in told
    assert json.loads((tmp_path / "no_vae/model_index.json").read_text())["vae"] == [None, None]
    assert not (tmp_path / "no_vae/vae").exists()
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "no_vae", vae=model.vae)
    assert equal(loaded.unet.state_dict(), model.unet.state_dict())

    told = wconv(
        *("to-diffusers", source, "--config", folder, "--without", "text-encoders"), "-o", tmp_path / "no_text"
    ).stdout
    assert "text_encoder=text_encoder, text_encoder_2=text_encoder_2)" in told
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "no_text")  # XL's are optional there
    assert loaded.text_encoder is loaded.text_encoder_2 is None
    told = wconv(
        *("to-diffusers", source, "--config", folder, "--without", "text-encoders", "--without", "vae"),
        *("-o", tmp_path / "unet"),
    ).stdout
    assert "it becomes the folder of one model" in told
    assert sorted(path.name for path in (tmp_path / "unet").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_averages_and_strangers(made: Made, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    _, folder = made("sd1")
    wconv("to-single-file", folder, "-o", tmp_path / "plain.safetensors")
    state = load_file(tmp_path / "plain.safetensors")
    state |= {**original.averaged(state), **REST}
    save_file(state, tmp_path / "model.safetensors", {"modelspec.title": "x"})
    told = wconv("to-diffusers", tmp_path / "model.safetensors", "--config", folder, "-o", tmp_path / "plain").stdout
    assert "the EMA weights are left out (208 tensors)" in told
    assert "left out, for no part of a pipeline has them: betas and 1 more" in told or "alphas_cumprod" in told
    assert "modelspec.title in its header" in told
    wconv("to-diffusers", tmp_path / "model.safetensors", "--config", folder, "--ema", "-o", tmp_path / "ema")
    name = "unet/diffusion_pytorch_model.safetensors"
    plain, averages = load_file(tmp_path / "plain" / name), load_file(tmp_path / "ema" / name)
    assert equal(averages, {key: one * 2 + 1 for key, one in plain.items()})


def test_what_a_scheduler_predicts_is_marked(copied: Any, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    folder = copied("sdxl")
    scheduler = folder / "scheduler/scheduler_config.json"
    edit_json(scheduler, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    told = wconv("to-single-file", folder, "-o", tmp_path / "model.safetensors").stdout
    assert "its scheduler's prediction_type is v_prediction: the file says so with v_pred" in told
    state = load_file(tmp_path / "model.safetensors")
    assert state["v_pred"].shape == state["ztsnr"].shape == (0,)
    edit_json(scheduler, rescale_betas_zero_snr=1)
    wconv("to-single-file", folder, "-o", tmp_path / "other.safetensors")
    assert "ztsnr" not in load_file(tmp_path / "other.safetensors")


def test_what_no_file_says_is_said(copied: Any, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    folder = copied("sdxl")
    edit_json(folder / "vae/config.json", scaling_factor=0.5, latents_mean=[1.0] * 4)
    edit_json(folder / "text_encoder/config.json", hidden_act="gelu")
    edit_json(folder / "scheduler/scheduler_config.json", _class_name="EDMDPMSolverMultistepScheduler")
    told = wconv("to-single-file", folder, "-o", tmp_path / "model.safetensors").stdout
    assert "its vae's scaling_factor is 0.5, and programs that read files of Stable Diffusion XL take 0.13025" in told
    assert "its vae's latents_mean is [1.0, 1.0, 1.0, 1.0], and programs that" in told
    assert "its text_encoder's hidden_act is 'gelu', and programs that read files of Stable Diffusion XL take q" in told
    assert "its scheduler is a EDMDPMSolverMultistepScheduler, which no file of weights says" in told


def test_a_file_of_another_training_needs_its_config(made: Made, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    _, folder = made("sdxl")
    wconv("to-single-file", folder, "-o", tmp_path / "plain.safetensors")
    source = tmp_path / "model.safetensors"
    for marks, told in (
        ({"edm_mean": torch.ones(1, 4, 1, 1), "edm_std": torch.ones(1, 4, 1, 1)}, "says by 'edm_mean' that it was"),
        ({"edm_vpred.sigma_max": torch.ones(())}, "says by 'edm_vpred.sigma_max' that it was trained otherwise"),
    ):
        save_file({**load_file(tmp_path / "plain.safetensors"), **marks}, source)
        assert told in wconv("to-diffusers", source, "-o", tmp_path / "x", exit_code=4).stderr
        wconv("to-diffusers", source, "--config", folder, "-o", tmp_path / "out", "--overwrite")
    save_file({**load_file(tmp_path / "plain.safetensors"), "v_pred": torch.ones(0)}, source)
    told = wconv("to-diffusers", source, "--config", folder, "-o", tmp_path / "out", "--overwrite").stdout
    assert "prediction_type is v_prediction, as the file says; that of --config, which is taken, is 'epsilon'" in told


def test_a_refiner_has_no_table(copied: Any, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    folder = copied("sdxl")
    without_part("text_encoder")(folder)
    edit_json(folder / "unet/config.json", cross_attention_dim=40)
    words = ("--without", "text_encoder", "-o", tmp_path / "model.safetensors")
    done = wconv("to-single-file", folder, *words, exit_code=4)
    assert "is a StableDiffusionXLPipeline for another purpose, as a refiner is, and no table has that" in done.stderr


# What is shipped.


@pytest.mark.slow
def test_a_mark_goes_into_the_scheduler(tmp_path: Path) -> None:
    states, configs = original.meta_states(CONFIGS / "sdxl")
    marks = {"v_pred": torch.ones(0), "ztsnr": torch.ones(0)}
    write_hollow(tmp_path / "model.safetensors", {**original.as_original("sdxl", states, configs), **marks})
    opened = open_single_file(open_checkpoint(tmp_path / "model.safetensors"))
    content = json.loads(opened.generated["scheduler/scheduler_config.json"])
    assert (content["prediction_type"], content["rescale_betas_zero_snr"]) == ("v_prediction", True)
    assert "its scheduler's prediction_type is v_prediction, as the file says" in opened.notes


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [
        ("sd1", ""),
        pytest.param("sd2", "model.diffusion_model.", marks=pytest.mark.slow),
        pytest.param("sdxl", "", marks=pytest.mark.slow),
    ],
)
def test_a_unet_alone_is_known_by_its_shapes(kind: str, prefix: str, tmp_path: Path) -> None:
    states, configs = original.meta_states(CONFIGS / kind)
    names = original.unet_names(states["unet"], configs["unet"]["layers_per_block"])
    write_hollow(tmp_path / "unet.safetensors", {prefix + names[name]: one for name, one in states["unet"].items()})
    opened = open_single_file(open_checkpoint(tmp_path / "unet.safetensors"))
    [(component, checkpoint)] = opened.checkpoints
    assert (opened.model.kind, component.class_name) == ("component", "UNet2DConditionModel")
    assert [name for name, _ in opened.copied] == ["config.json"]
    assert {one.name for one in checkpoint.tensors} == states["unet"].keys()


# What is refused.

Change = Callable[[Path], Any]


def config(name: str, **changes: Any) -> Change:
    return lambda folder: edit_json(folder / name / "config.json", **changes)


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    def edit(folder: Path) -> None:
        path = folder / name / f"{WEIGHTS.get(name, 'model')}.safetensors"
        save_file(change(load_file(path)), path)

    return edit


def index(**changes: Any) -> Change:
    return lambda folder: edit_json(folder / "model_index.json", **changes)


def without_part(name: str) -> Change:
    def remove(folder: Path) -> None:
        shutil.rmtree(folder / name)
        edit_json(folder / "model_index.json", **{name: [None, None]})

    return remove


def with_controlnet(folder: Path) -> None:
    shutil.copytree(folder / "unet", folder / "controlnet")
    edit_json(folder / "model_index.json", controlnet=["diffusers", "ControlNetModel"])


ONE = torch.ones(1)
QUANTIZED = {"weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1, 1)}


@pytest.mark.parametrize(
    ("change", "problem", "code"),
    [
        (index(_class_name="StableDiffusionXLControlNetPipeline"), "is a StableDiffusionXLControlNetPipeline", 4),
        (index(_class_name=["x"]), "names no class of a pipeline, and no table has that", 4),
        (with_controlnet, "holds a controlnet, which no single file of Stable Diffusion XL has", 4),
        (without_part("text_encoder_2"), "holds no weights, and Stable Diffusion XL has a text_encoder_2", 3),
        (without_part("unet"), "holds no weights, and Stable Diffusion XL has a unet", 3),
        (
            config("unet", block_out_channels=[16, 64]),
            "down_blocks.1.resnets.0.conv1.weight is 32x16x3x3, and should be 64x16x3x3",
            2,
        ),
        (config("unet", cross_attention_dim=7), "is 32x72, and should be 32x7.", 2),
        (config("unet", layers_per_block=[1, 1]), "has a layers_per_block that this cannot be", 2),
        (config("unet", layers_per_block=2), "down_blocks.0.resnets.1.norm1.weight is not there", 2),
        (
            config("unet", up_block_types=["UpBlock2D"] * 2),
            "no unet of Stable Diffusion XL has: up_blocks.0.attentions.0.norm",
            4,
        ),
        (
            config("unet", up_block_types=["CrossAttnUpBlock2D"] * 2),
            "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight is not",
            2,
        ),
        (
            config("unet", up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"] * 2),
            "up_blocks.2.resnets.0.norm1.weight is not",
            2,
        ),
        (
            config("vae", up_block_types=["UpDecoderBlock2D"] * 3),
            "decoder.up_blocks.2.resnets.0.norm1.weight is not",
            2,
        ),
        (config("text_encoder_2", num_hidden_layers="2"), "has a num_hidden_layers that this cannot be", 2),
        (config("text_encoder_2", num_hidden_layers=1), "holds tensors that no text_encoder_2 of", 4),
        (config("unet", up_block_types={}), "has a up_block_types that no single file has: {}", 2),
        (config("vae", quantization_config={"quant_method": "x"}), "says that its weights are quantized", 4),
        (index(vae=["diffusers", "AutoencoderTiny"]), "is a AutoencoderTiny", 4),
        (tensors("unet", lambda state: {**state, "extra.weight": ONE}), "no unet of Stable Diffusion XL has: extra", 4),
        (tensors("unet", lambda state: {**state, **QUANTIZED}), "is quantized", 4),
        (
            tensors("vae", lambda state: {**state, "encoder.mid_block.attentions.0.query.bias": torch.ones(32)}),
            "'encoder.mid_block.attentions.0.to_q.bias', which are one tensor in the other layout",
            3,
        ),
        (
            tensors(
                "text_encoder_2", lambda state: {k: v for k, v in state.items() if "layers.0.self_attn.k_" not in k}
            ),
            "lacks 'text_model.encoder.layers.0.self_attn.k_proj.bias', which goes with it",
            3,
        ),
    ],
)
def test_what_is_not_it_is_refused(
    change: Change, problem: str, code: int, copied: Any, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    folder = copied("sdxl")
    change(folder)
    done = wconv("to-single-file", folder, "-o", tmp_path / "model.safetensors", exit_code=code)
    assert problem in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "problem", "code"),
    [
        (["-o", "out"], "is no name for a single file of weights", 2),
        (["-o", "model-00001-of-00002.safetensors"], "is no name for a single file of weights", 2),
        (["-o", "model.gguf"], "is no name for a single file of weights", 2),
        (["-o", "x.safetensors", "--without", "unet"], "is no part of Stable Diffusion 1 that can be left out", 2),
        (["-o", "x.safetensors", "--without", "text_encoder_2"], "Those are: text-encoders, vae, text_encoder.", 2),
        (["-o", "x.fp16.safetensors", "--dtype", "bf16"], "would be named fp16 and hold bf16", 2),
        (["-o", "x.safetensors", "--from-variant", "ema"], "has no variant 'ema'", 2),
        (["-o", "m/unet/diffusion_pytorch_model.safetensors", "--overwrite"], "is a file that is read", 5),
        (["-o", "m/vae/config.json"], "is no name for a single file of weights", 2),
    ],
)
def test_what_cannot_be_asked_is_refused(
    arguments: list[str], problem: str, code: int, made: Made, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    _, folder = made("sd1")
    words = [str(folder / word[2:]) if word.startswith("m/") else word for word in arguments]
    words = [
        str(tmp_path / word) if before == "-o" else word for before, word in zip(["", *words], words, strict=False)
    ]
    done = wconv("to-single-file", folder, *words, exit_code=code)
    assert problem in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_lora_and_a_single_file_are_no_pipeline(made: Made, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    save_file({"lora_unet_x.lora_up.weight": ONE}, tmp_path / "lora.safetensors")
    done = wconv("to-single-file", tmp_path / "lora.safetensors", "-o", tmp_path / "x.safetensors", exit_code=4)
    assert "is a file, and files are made of folders" in done.stderr
    done = wconv("to-diffusers", made("sd1")[1], "-o", tmp_path / "x", exit_code=2)
    assert "is a folder, and one file becomes a pipeline" in done.stderr
    done = wconv(
        "to-diffusers", made("sd1")[1] / "unet/diffusion_pytorch_model.safetensors", "-o", tmp_path / "x", exit_code=4
    )
    assert "has the names of Diffusers already" in done.stderr


@pytest.mark.parametrize(
    ("change", "problem", "code"),
    [
        (
            lambda state: {**state, "double_blocks.0.img_mod.lin.weight": ONE},
            "holds two diffusion models: 'double_blocks.0.img_mod.lin.weight' and ",
            4,
        ),
        (
            lambda state: {**state, "cond_stage_model.model.ln_final.weight": ONE},
            "holds text encoders of Stable Diffusion 2 and Stable Diffusion 1",
            4,
        ),
        (
            lambda state: {**state, "input_blocks.0.0.weight": torch.ones(16, 4, 3, 3)},
            "holds two diffusion models: 'input_blocks.0.0.weight' and 'model.diffusion_model.input_blocks.0.0.weight'",
            4,
        ),
        (lambda state: {**state, "vae.decoder.conv_in.weight": ONE}, "holds its vae twice", 4),
        (
            lambda state: {name: one for name, one in state.items() if not name.startswith("first_stage_model.")},
            "holds no vae: no name begins with 'first_stage_model.'",
            3,
        ),
        (
            lambda state: {
                name: one for name, one in state.items() if not name.startswith(("first_stage", "cond_stage"))
            },
            "its diffusion model has the size of no Stable Diffusion XL or Stable Diffusion 2 or Stable Diffusion 1",
            4,
        ),
    ],
)
def test_a_file_of_two_or_of_half_a_model_is_refused(
    change: Any, problem: str, code: int, made: Made, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    wconv("to-single-file", made("sd1")[1], "-o", tmp_path / "whole.safetensors")
    save_file(change(load_file(tmp_path / "whole.safetensors")), tmp_path / "model.safetensors")
    done = wconv("to-diffusers", tmp_path / "model.safetensors", "-o", tmp_path / "out", exit_code=code)
    assert problem in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


KEYS = (
    *("_class_name", "architectures", "layers_per_block", "up_block_types", "block_out_channels", "in_channels"),
    *("num_hidden_layers", "hidden_size", "vocab_size", "cross_attention_dim"),
)
VALUES: list[Any] = [None, True, -1, 0, 2**70, 1.5, "x", [], [[]], [None], [16, "x"], {}, {"a": 1}]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder_2"])
def test_a_config_may_say_anything(
    name: str, made: Made, tmp_path: Path, copied: Any, wconv: Callable[..., Any]
) -> None:
    from converter.recipes.request import Request
    from converter.recipes.to_single_file import plan_single_file

    folder = copied("sdxl")
    path = folder / name / "config.json"
    content = json.loads(path.read_text())
    request = Request.of(folder, tmp_path / "model.safetensors")
    for key, value in itertools.product(KEYS, VALUES):
        path.write_text(json.dumps({**content, key: value}))
        with contextlib.suppress(WconvError):
            plan_single_file(request)

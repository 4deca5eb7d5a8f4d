"""A single file in Stable Diffusion's own layout becomes the pipeline that ``from_single_file`` makes of it."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import original
from support.tiny import snapshot

from converter.errors import WconvError
from converter.models.checkpoint import open_checkpoint
from converter.transforms.single_file.pipeline import CONFIGS, open_single_file

KINDS = ("sd1", "sd2", "sdxl")
SAID = {"sd1": "Stable Diffusion 1", "sd2": "Stable Diffusion 2", "sdxl": "Stable Diffusion XL"}
REST = {"betas": torch.ones(10), "alphas_cumprod": torch.ones(10)}


@pytest.fixture
def tiny(builders: Any, tmp_path: Path) -> Callable[[str], tuple[Any, Path, dict[str, torch.Tensor]]]:
    """Make a pipeline, a folder with its configs, and its tensors in the original layout."""

    def make(kind: str) -> tuple[Any, Path, dict[str, torch.Tensor]]:
        model = builders.MODELS["sdxl" if kind == "sdxl" else "sd"]()
        if kind != "sdxl":
            model.register_modules(safety_checker=None, feature_extractor=None)
            model.register_to_config(requires_safety_checker=False)
        builders.shake(model)
        folder = tmp_path / "config"
        model.save_pretrained(folder)
        for name in ("tokenizer", "tokenizer_2"):
            if getattr(model, name, None) is not None:
                shutil.rmtree(folder / name)  # transformers 5 writes a form that 4 cannot read
                builders.write_tokenizer(folder / name)
        parts = builders.models_in(model)
        states = {
            name: builders.state_as_published(part) if "text" in name else part.state_dict()
            for name, part in parts.items()
        }
        for path in folder.rglob("*.safetensors"):
            path.unlink()
        return model, folder, original.as_original(kind, states, {name: part.config for name, part in parts.items()})

    return make


def save(path: Path, state: dict[str, torch.Tensor]) -> Path:
    """Save as trainers do: the state dict among what else they keep."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save({"state_dict": state, "global_step": 470000, "pytorch-lightning_version": "1.4.2"}, path)
    return path


def judge(kind: str, path: Path, config: Path) -> Any:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    return pipeline.from_single_file(str(path), config=str(config), local_files_only=True)


def load_as_apple_does(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder, dtype=torch.float16, variant="fp16", use_safetensors=True)


@pytest.mark.parametrize("ext", ["ckpt", "safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_becomes_what_diffusers_makes_of_it(
    kind: str, ext: str, tiny: Any, builders: Any, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    _, config, state = tiny(kind)
    source = save(tmp_path / f"model.{ext}", {**state, **original.averaged(state), **REST})
    before = snapshot(tmp_path)
    told = wconv("prepare-coreml", source, "--config", config, "-o", tmp_path / "out").stdout
    assert {name: mark for name, mark in snapshot(tmp_path).items() if not name.startswith("out")} == before
    assert f"is a {SAID[kind]} checkpoint" in told
    assert "EMA weights are left out" in told
    assert " and 1 more" in told
    loaded = load_as_apple_does(tmp_path / "out")
    expected = judge(kind, source, config)
    assert loaded.components.keys() == expected.components.keys()
    for name, part in builders.models_in(expected).items():
        mine = getattr(loaded, name).state_dict()
        theirs = part.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key].half()) for key in theirs), name


def test_ema_takes_the_averages(tiny: Any, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    from diffusers import UNet2DConditionModel

    _, config, state = tiny("sd1")
    source = save(tmp_path / "model.ckpt", {**state, **original.averaged(state)})
    wconv("prepare-coreml", source, "--config", config, "--ema", "-o", tmp_path / "out")
    mine = load_file(tmp_path / "out/unet/diffusion_pytorch_model.fp16.safetensors")
    judged = UNet2DConditionModel.from_single_file(
        str(source), config=str(config), subfolder="unet", extract_ema=True, local_files_only=True
    )
    theirs = judged.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], tensor.half()) for name, tensor in theirs.items())
    assert not torch.equal(mine["conv_in.weight"], state["model.diffusion_model.input_blocks.0.0.weight"].half())


def test_keep_default_keeps_the_dtype(tiny: Any, builders: Any, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    from diffusers import StableDiffusionPipeline

    model, config, state = tiny("sd1")
    source = save(tmp_path / "model.ckpt", state)
    wconv("prepare-coreml", source, "--config", config, "--keep-default", "-o", tmp_path / "out")
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    for name, part in builders.models_in(model).items():
        mine = getattr(loaded, name).state_dict()
        assert all(torch.equal(mine[key], tensor) for key, tensor in part.state_dict().items())


# What is shipped.


def write_hollow(path: Path, state: dict[str, Any]) -> None:
    """Write a safetensors file of fp16 tensors that takes no room: its data is a hole."""
    header, place = {}, 0
    for name, tensor in state.items():
        end = place + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + place)


# Parameters as published for stable-diffusion-v1-5, -2-1 and -xl-base-1.0.
PUBLISHED = {
    "sd1": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd2": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}


def open_hollow(kind: str, folder: Path, channels: int = 4) -> tuple[Any, dict[str, Any]]:
    """Open a checkpoint of full size with what is shipped; give its parts as Diffusers has them, too."""
    states, configs = original.meta_states(CONFIGS / kind)
    states["unet"]["conv_in.weight"] = torch.empty(320, channels, 3, 3, device="meta")
    write_hollow(folder / "model.safetensors", original.as_original(kind, states, configs))
    return open_single_file(open_checkpoint(folder / "model.safetensors")), states


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_full_size_fits_the_shipped_config(kind: str, tmp_path: Path) -> None:
    opened, states = open_hollow(kind, tmp_path)
    for component, checkpoint in opened.checkpoints:
        mine = {info.name: info.shape for info in checkpoint.tensors}
        assert mine == {name: tuple(tensor.shape) for name, tensor in states[component.name].items()}
        assert sum(info.numel for info in checkpoint.tensors) == PUBLISHED[kind][component.name]


@pytest.mark.parametrize("kind", KINDS)
def test_nine_channels_are_for_inpainting(kind: str, tmp_path: Path) -> None:
    opened, _ = open_hollow(kind, tmp_path, channels=9)
    assert opened.notes[0] == f"model.safetensors is a {SAID[kind]} checkpoint for inpainting"
    edited = opened.generated
    if kind == "sd2":
        assert json.loads(edited["unet/config.json"])["sample_size"] == 64
        assert json.loads(edited["scheduler/scheduler_config.json"])["prediction_type"] == "epsilon"
    assert json.loads(edited["unet/config.json"])["in_channels"] == 9
    name = "StableDiffusionXLInpaintPipeline" if kind == "sdxl" else "StableDiffusionInpaintPipeline"
    assert json.loads(edited["model_index.json"])["_class_name"] == opened.model.class_name == name


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_tokenizer_is_clips(kind: str, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    opened, _ = open_hollow(kind, tmp_path)
    copied = {name: file.place.path.read_bytes() for name, file in opened.copied}
    for name, content in {**opened.generated, **copied}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    # As OpenAI's own tokenizer numbers them (the example of the model's card).
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer.pad_token == ("!" if kind == "sd2" else "<|endoftext|>")
    assert tokenizer.model_max_length == 77


# What is refused.


def without(prefix: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}


@pytest.mark.parametrize(
    ("change", "problem", "code"),
    [
        (without("model.diffusion_model."), "is no checkpoint that is known: it has no tensor", 4),
        (without("first_stage_model."), "holds no vae: no name begins with 'first_stage_model.'", 3),
        (without("cond_stage_model."), "holds no text_encoder: no name begins with 'cond_stage_model.transformer.'", 3),
        (
            without("cond_stage_model.transformer.text_model.encoder.layers.1"),
            "encoder.layers.1.self_attn.q_proj.weight is not there",
            2,
        ),
        (lambda state: {"lora_unet_down.lora_up.weight": torch.ones(2, 2)}, "is a LoRA", 4),
        (lambda state: {**state, "model.diffusion_model.joint_blocks.0.x": torch.ones(1)}, "that no unet of", 4),
        (
            lambda state: {**state, "model.diffusion_model.input_blocks.0.0.weight": torch.ones(16, 8, 3, 3)},
            "for another purpose than those that are known: input_blocks.0.0.weight is 16x8x3x3",
            4,
        ),
        (lambda state: {**state, "model.diffusion_model.extra.weight": torch.ones(1)}, "that no unet of", 4),
    ],
)
def test_what_is_not_it_is_refused(
    change: Any, problem: str, code: int, tiny: Any, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    _, config, state = tiny("sd1")
    source = save(tmp_path / "model.safetensors", change(state))
    done = wconv("prepare-coreml", source, "--config", config, "-o", tmp_path / "out", exit_code=code)
    assert problem in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "problem", "code"),
    [
        ([], "does not fit the unet of Stable Diffusion 1: conv_in.weight is 16x4x3x3", 2),
        (["--ema", "--config", "config"], "lacks EMA weights", 3),
        (["--config", "empty"], "it has no model_index.json", 3),
        (["--config", "other"], "names text_encoder and text_encoder_2, and Stable Diffusion 1 has text_encoder", 2),
    ],
)
def test_what_does_not_fit_is_said(
    arguments: list[str], problem: str, code: int, tiny: Any, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    _, config, state = tiny("sd1")
    source = save(tmp_path / "model.safetensors", state)
    (tmp_path / "empty").mkdir()
    index = json.loads((config / "model_index.json").read_text())
    index["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
    config.rename(tmp_path / "config2")
    for name in ("config", "other"):
        (tmp_path / name).mkdir()
        for path in (tmp_path / "config2").iterdir():
            if path.name != "model_index.json":
                (tmp_path / name / path.name).symlink_to(path)
    (tmp_path / "config/model_index.json").write_text((tmp_path / "config2/model_index.json").read_text())
    (tmp_path / "other/model_index.json").write_text(json.dumps(index))
    words = [tmp_path / word if word in ("config", "empty", "other") else word for word in arguments]
    done = wconv("prepare-coreml", source, *words, "-o", tmp_path / "out", exit_code=code)
    assert problem in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("layers_per_block", 65, "has a layers_per_block that this cannot be: 65"),
        ("layers_per_block", [2, 2], "has a layers_per_block that this cannot be"),
        ("up_block_types", [], r"has a up_block_types that no single file has: \[\]"),
        ("up_block_types", [1, None], "has a up_block_types that no single file has"),
    ],
)
def test_a_config_may_say_anything(key: str, value: Any, problem: str, tiny: Any, tmp_path: Path) -> None:
    _, config, state = tiny("sd1")
    path = config / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    source = save(tmp_path / "model.safetensors", state)
    with pytest.raises(WconvError, match=problem):
        open_single_file(open_checkpoint(source), config)


def test_ema_and_config_are_for_single_files(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    (tmp_path / "m").mkdir()
    done = wconv("prepare-coreml", tmp_path / "m", "--ema", "-o", tmp_path / "out", exit_code=2)
    assert "--ema is for a single file" in done.stderr


@pytest.mark.parametrize(("turn", "step"), [(0, 7), *(pytest.param(at, 1, marks=pytest.mark.slow) for at in range(3))])
def test_odd_shapes_end_in_one_line(turn: int, step: int, tiny: Any, tmp_path: Path) -> None:
    _, config, state = tiny("sdxl")
    shapes = itertools.cycle([[(), (7,), (3, 1, 1)][turn - at] for at in range(3)])
    for name, shape in zip([*state][::step], shapes, strict=False):
        write_hollow(tmp_path / "model.safetensors", {**state, name: torch.ones(shape)})
        with contextlib.suppress(WconvError):
            open_single_file(open_checkpoint(tmp_path / "model.safetensors"), config)


def test_a_second_tensor_for_one_place_is_refused(tiny: Any, tmp_path: Path) -> None:
    _, config, state = tiny("sd1")
    again = {"model.diffusion_model.input_blocks.2.1.op.weight": torch.ones(2, 2)}
    source = save(tmp_path / "model.safetensors", {**state, **again})
    with pytest.raises(WconvError, match=r"that no unet of Stable Diffusion 1 has: .*input_blocks\.2\.1\.op\.weight"):
        open_single_file(open_checkpoint(source), config)

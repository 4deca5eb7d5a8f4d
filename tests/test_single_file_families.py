"""Files of Flux, Stable Diffusion 3 and Sana, alone or as ComfyUI has all in one, become what Diffusers loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import original
from test_single_file import write_hollow

from converter.dtypes import DTYPES
from converter.errors import BadFile, BadRequest
from converter.models.checkpoint import open_checkpoint
from converter.storage import FileRef, place_of
from converter.tensors.base import ByteRange, Tensor
from converter.tensors.derived import Constant
from converter.tensors.reader import RangeReader
from converter.tensors.view import View, contiguous_strides
from converter.transforms.layouts.rows import put_together
from converter.transforms.single_file.family import Family
from converter.transforms.single_file.flux import FLUX
from converter.transforms.single_file.pipeline import CONFIGS, SingleFile, open_single_file
from converter.transforms.single_file.sd3 import SD3

State = dict[str, torch.Tensor]
F32 = DTYPES["F32"]
PREFIX = "model.diffusion_model."


def values(tensors: Any) -> State:
    made = {}
    with RangeReader() as reader:
        for one in tensors:
            out = bytearray(one.nbytes)
            one.source.read(0, memoryview(out), reader)
            made[one.name] = torch.frombuffer(out, dtype=getattr(torch, one.dtype.torch_name)).reshape(one.shape)
    return made


def as_original(part: Any, state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> State:
    tensors = {
        name: Tensor(name, Constant(F32, tuple(value.shape), value.contiguous().numpy().tobytes()))
        for name, value in state.items()
    }
    wholes, left = put_together(tensors, part.rows(config))
    assert not left
    return values(wholes)


def with_prefix(prefix: str, state: Mapping[str, torch.Tensor]) -> State:
    return {f"{prefix}{name}": value.contiguous().clone() for name, value in state.items()}


def make_flux(builders: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=builders.make_vae(), text_encoder=builders.make_clip(),
        tokenizer=builders.make_tokenizer(), text_encoder_2=builders.make_t5_encoder(),
        tokenizer_2=builders.make_t5_tokenizer(), transformer=transformer.eval(),
    )  # fmt: skip


@pytest.fixture
def flux(builders: Any, tmp_path: Path) -> tuple[Any, Path, State]:
    """Give a pipeline, a folder with its configs, and the file that ComfyUI would have of it."""
    model = builders.shake(make_flux(builders))
    state = {
        **with_prefix(
            PREFIX, as_original(FLUX.parts["transformer"], model.transformer.state_dict(), model.transformer.config)
        ),
        **with_prefix("vae.", original.vae_as_original(model.vae.state_dict(), 2)),
        **with_prefix("text_encoders.clip_l.transformer.", builders.state_as_published(model.text_encoder)),
        **with_prefix("text_encoders.t5xxl.transformer.", model.text_encoder_2.state_dict()),
    }
    return model, configs_of(model, tmp_path / "config"), state


@pytest.fixture
def sd3(builders: Any, tmp_path: Path) -> tuple[Any, Path, State]:
    from transformers import CLIPTextModelWithProjection

    model = builders.MODELS["sd3"]()
    # Diffusers tells the two by their width.
    model.register_modules(text_encoder=CLIPTextModelWithProjection(builders.clip_config(32)).eval())
    config = {key: value for key, value in model.transformer.config.items() if not key.startswith("_")}
    transformer = type(model.transformer)(**{**config, "dual_attention_layers": (0,)})
    model.register_modules(transformer=transformer.eval())
    builders.shake(model)
    with torch.no_grad():
        model.text_encoder.text_projection.weight.copy_(torch.eye(model.text_encoder.text_projection.weight.shape[0]))
    clips = {name: getattr(model, name).state_dict() for name in ("text_encoder", "text_encoder_2")}
    del clips["text_encoder"]["text_projection.weight"]
    state = {
        **with_prefix(
            PREFIX, as_original(SD3.parts["transformer"], model.transformer.state_dict(), model.transformer.config)
        ),
        **with_prefix("first_stage_model.", original.vae_as_original(model.vae.state_dict(), 2)),
        **with_prefix("text_encoders.clip_l.transformer.", clips["text_encoder"]),
        **with_prefix("text_encoders.clip_g.transformer.", clips["text_encoder_2"]),
        **with_prefix("text_encoders.t5xxl.transformer.", model.text_encoder_3.state_dict()),
    }
    return model, configs_of(model, tmp_path / "config"), state


def configs_of(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    return folder


def states_of(folder: Path) -> dict[str, State]:
    """Read what a pipeline's folder has, by its parts."""
    states: dict[str, State] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        states.setdefault(path.parent.name, {}).update(load_file(path))
    return states


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], value) for name, value in other.items())


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def test_flux_goes_there_and_back(flux: Any, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    model, _, state = flux
    folder = saved(model, tmp_path / "model")
    single = tmp_path / "model.safetensors"
    wconv("to-single-file", folder, "-o", single)
    expected = {name: value for name, value in state.items() if "position_ids" not in name}
    assert same(load_file(single), expected)
    told = wconv("to-diffusers", single, "--config", folder, "-o", tmp_path / "back").stdout
    assert "model.safetensors is a Flux checkpoint" in told
    back, before = states_of(tmp_path / "back"), states_of(folder)
    back["text_encoder"] = {name.removeprefix("text_model."): value for name, value in back["text_encoder"].items()}
    assert back.keys() == before.keys()
    assert "encoder.embed_tokens.weight" not in back["text_encoder_2"]
    assert all(same(back[name], before[name]) for name in before)
    wconv("to-single-file", tmp_path / "back", "-o", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == single.read_bytes()


def test_sd3_goes_there_and_back_as_diffusers_does(
    sd3: Any, builders: Any, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    from diffusers import StableDiffusion3Pipeline

    model, config, state = sd3
    folder, single = saved(model, tmp_path / "model"), tmp_path / "model.safetensors"
    told = wconv("to-single-file", folder, "-o", single).stdout
    assert "left out of the text_encoder, for no reader of single files reads it: text_projection.weight" in told
    assert same(load_file(single), state)
    judge = StableDiffusion3Pipeline.from_single_file(str(single), config=str(config), local_files_only=True)
    wconv("to-diffusers", single, "--config", config, "-o", tmp_path / "back")
    loaded = StableDiffusion3Pipeline.from_pretrained(tmp_path / "back")
    for name, part in builders.models_in(judge).items():
        mine = getattr(loaded, name).state_dict()
        assert same(mine, part.state_dict()), name
        assert same(mine, getattr(model, name).state_dict()), name


def test_sana_goes_there_and_back(builders: Any, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    from diffusers import SanaTransformer2DModel

    model = builders.shake(builders.MODELS["sana"]())
    folder, single = saved(model, tmp_path / "model"), tmp_path / "model.safetensors"
    told = wconv("to-single-file", folder, "-o", single).stdout
    assert "pos_embed of the transformer is zeros, for readers of the file look for it" in told
    assert "left out: vae (it is no part of Sana's own files)" in told
    own = folder / "transformer"
    judge = SanaTransformer2DModel.from_single_file(str(single), config=str(own), local_files_only=True, subfolder="")
    assert same(judge.state_dict(), model.transformer.state_dict())
    told = wconv("to-diffusers", single, "--config", own, "-o", tmp_path / "back").stdout
    assert "left out, for Diffusers does not read it: y_embedder.y_embedding" in told
    assert same(states_of(tmp_path / "back")["back"], model.transformer.state_dict())
    assert SanaTransformer2DModel.from_pretrained(tmp_path / "back").config["cross_attention_dim"] == 8


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_a_transformer_alone_has_the_names_of_its_lab(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    model, config, state = request.getfixturevalue(kind)
    folder, single = saved(model.transformer, tmp_path / "transformer"), tmp_path / "alone.safetensors"
    wconv("to-single-file", folder, "-o", single)
    own = {name: value for name, value in state.items() if name.startswith(PREFIX)}
    lone = "" if kind == "flux" else PREFIX
    assert same(load_file(single), {lone + name.removeprefix(PREFIX): value for name, value in own.items()})
    # It is read with and without a prefix.
    for number, prefix in enumerate((PREFIX, "")):
        source = tmp_path / f"{number}.safetensors"
        save_file({prefix + name.removeprefix(PREFIX): value for name, value in own.items()}, source)
        wconv("to-diffusers", source, "--config", config, "-o", tmp_path / f"out{number}")
        assert same(states_of(tmp_path / f"out{number}")[f"out{number}"], model.transformer.state_dict())


def test_a_projection_of_the_first_clip_is_the_identity(sd3: Any, tmp_path: Path) -> None:
    _, config, state = sd3
    name = "text_encoders.clip_l.transformer.text_projection.weight"
    save_file({**state, name: torch.full((40, 32), 3.0)}, tmp_path / "model.safetensors")
    file = open_single_file(open_checkpoint(tmp_path / "model.safetensors"), config)
    made = {component.name: values(checkpoint.tensors) for component, checkpoint in file.checkpoints}
    assert torch.equal(made["text_encoder"]["text_projection.weight"], torch.eye(32))
    assert f"left out, for Diffusers does not read it: {name}" in file.notes


@pytest.mark.parametrize("factor", [1, 2])
def test_an_embedding_of_two_names_is_one(factor: int, flux: Any, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    folder = saved(flux[0], tmp_path / "model")
    path = folder / "text_encoder_2/model.safetensors"
    state = load_file(path)
    save_file({**state, "encoder.embed_tokens.weight": state["shared.weight"] * factor}, path)
    words = ("to-single-file", folder, "-o", tmp_path / "model.safetensors")
    done = wconv(*words, exit_code=0 if factor == 1 else 4)
    said = "is shared.weight once more" if factor == 1 else "encoder.embed_tokens.weight that is not shared.weight"
    assert said in done.stdout + done.stderr
    assert "left out of the text_encoder_2" not in done.stdout


# What is shipped, and what shapes say.


def full_state(family: Family, config: Mapping[str, Any], encoders: tuple[str, ...]) -> tuple[State, dict[str, State]]:
    """Give the names and shapes of a file of full size, and of the pipeline that it is."""
    import diffusers
    import transformers

    folder = CONFIGS / family.folder
    states: dict[str, State] = {}
    with torch.device("meta"):
        states["transformer"] = getattr(diffusers, family.parts["transformer"].classes[0])(**config).state_dict()
        states["vae"] = diffusers.AutoencoderKL.from_config(
            json.loads((folder / "vae/config.json").read_text())
        ).state_dict()
        for name in encoders:
            content = json.loads((folder / name / "config.json").read_text())
            kind = getattr(transformers, content["architectures"][0])
            states[name] = kind(kind.config_class(**content)).state_dict()
    single: State = {}
    for name, state in states.items():
        part, prefix = family.parts[name], family.parts[name].prefixes[0]
        if name == "vae":
            single |= {prefix + short: value for short, value in original.vae_as_original(state, 4).items()}
        elif name == "transformer":
            single |= {
                prefix + one.name: torch.empty(one.shape, device="meta") for one in wholes_of(part, state, config)
            }
        else:
            single |= {
                prefix + short: value for short, value in state.items() if short != UNREAD.get((family.name, name))
            }
    return single, states


UNREAD = {("Stable Diffusion 3", "text_encoder"): "text_projection.weight"}


def wholes_of(part: Any, state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> list[Tensor]:
    storage = ByteRange(FileRef(place_of("m.safetensors")), 0, 1 << 40)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    views = {name: View(F32, shape, storage, 0, contiguous_strides(shape)) for name, shape in shapes.items()}
    return put_together({name: Tensor(name, view) for name, view in views.items()}, part.rows(config))[0]


def open_hollow(path: Path, state: Mapping[str, torch.Tensor], without: tuple[str, ...] = ()) -> SingleFile:
    write_hollow(path, dict(state))
    return open_single_file(open_checkpoint(path), without=without)


SD3_MEDIUM = {
    "num_layers": 2, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192,
}  # fmt: skip


def test_a_whole_sd3_needs_no_config(tmp_path: Path) -> None:
    single, states = full_state(SD3, SD3_MEDIUM, ("text_encoder", "text_encoder_2"))
    file = open_hollow(tmp_path / "model.safetensors", single)
    for component, checkpoint in file.checkpoints:
        mine = {one.name.removeprefix("text_model."): one.shape for one in checkpoint.tensors}
        expected = {name.removeprefix("text_model."): tuple(one.shape) for name, one in states[component.name].items()}
        assert mine == expected
    index = json.loads(file.generated["model_index.json"])
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]
    assert index["text_encoder_2"] == ["transformers", "CLIPTextModelWithProjection"]
    assert json.loads(file.generated["transformer/config.json"])["pos_embed_max_size"] == 192
    assert "it holds no text_encoder_3, and model_index.json says so" in file.notes
    assert {"tokenizer/merges.txt", "tokenizer_2/vocab.json"} <= file.generated.keys()


def test_t5_needs_its_tokenizer(tmp_path: Path) -> None:
    single, _ = full_state(FLUX, {"num_layers": 1, "num_single_layers": 1}, ("text_encoder", "text_encoder_2"))
    with pytest.raises(BadFile, match=r"tokenizer_2: is needed for the text_encoder_2, and is not there"):
        open_hollow(tmp_path / "model.safetensors", single)
    file = open_hollow(tmp_path / "model.safetensors", single, ("text-encoders",))
    scheduler = json.loads(file.generated["scheduler/scheduler_config.json"])
    assert (scheduler["shift"], scheduler["use_dynamic_shifting"]) == (1.0, False)
    index = json.loads(file.generated["model_index.json"])
    assert index["text_encoder"] == index["text_encoder_2"] == [None, None]
    assert [component.name for component, _ in file.checkpoints] == ["transformer", "vae"]
    clips = open_hollow(tmp_path / "model.safetensors", single, ("text_encoder_2",))
    assert [component.name for component, _ in clips.checkpoints] == ["transformer", "vae", "text_encoder"]


@pytest.mark.parametrize(
    ("config", "pipeline", "words"),
    [
        ({"guidance_embeds": True}, "FluxPipeline", "is a Flux checkpoint"),
        ({"guidance_embeds": True, "in_channels": 384, "out_channels": 64}, "FluxFillPipeline", " that fills in"),
        ({"guidance_embeds": True, "in_channels": 128, "out_channels": 64}, "FluxControlPipeline", " that follows"),
    ],
)
def test_what_a_flux_is_for_shows(config: Mapping[str, Any], pipeline: str, words: str, tmp_path: Path) -> None:
    small = {"num_layers": 1, "num_single_layers": 1, **config}
    single, _ = full_state(FLUX, small, ())
    file = open_hollow(tmp_path / "model.safetensors", single)
    assert json.loads(file.generated["model_index.json"])["_class_name"] == file.model.class_name == pipeline
    assert words in file.notes[0]
    made = json.loads(file.generated["transformer/config.json"])
    assert {key: made[key] for key in small} == small


def test_float8_without_scales_is_cast(flux: Any, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    _, config, state = flux
    eighth = {name: value.to(torch.float8_e4m3fn) for name, value in state.items() if name.startswith(PREFIX)}
    save_file(eighth, tmp_path / "model.safetensors")
    wconv("to-diffusers", tmp_path / "model.safetensors", "--config", config, "-o", tmp_path / "kept")
    wconv(
        "to-diffusers", tmp_path / "model.safetensors", "--config", config, "--dtype", "bf16", "-o", tmp_path / "cast"
    )
    kept, made = states_of(tmp_path / "kept")["kept"], states_of(tmp_path / "cast")["cast"]
    assert {value.dtype for value in kept.values()} == {torch.float8_e4m3fn}
    assert same(made, {name: value.to(torch.bfloat16) for name, value in kept.items()})
    name = "transformer_blocks.0.attn.to_k.weight"
    assert torch.equal(made[name].float(), eighth[PREFIX + "double_blocks.0.img_attn.qkv.weight"].float()[32:64])


# What is refused.


def without(name: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "problem", "code"),
    [
        (without(PREFIX + "double_blocks.0.img_mlp.2.bias"), "ff.net.2.bias is not there", 2),
        (without("vae.decoder.conv_out.weight"), "decoder.conv_out.weight is not there", 2),
        (
            without("text_encoders.t5xxl.transformer.encoder.block.1.layer.0.SelfAttention.k.weight"),
            "encoder.block.1.layer.0.SelfAttention.k.weight is not there", 2,
        ),
        (lambda state: {**state, PREFIX + "img_in.alpha": torch.ones(1)}, "that no transformer of", 4),
        (
            lambda state: {**state, PREFIX + "joint_blocks.0.context_block.attn.qkv.weight": torch.ones(3, 1)},
            "holds two diffusion models", 4,
        ),
        (
            lambda state: {**state, "double_blocks.0.img_mod.lin.weight": torch.ones(3, 1)},
            "holds two diffusion models", 4,
        ),
        (lambda state: {**state, "first_stage_model.x": torch.ones(1)}, "holds its vae twice", 4),
        (lambda state: {**state, PREFIX + "double_stream_modulation_img.x": torch.ones(1)}, "is Flux 2", 4),
        (
            lambda state: {**state, PREFIX + "scaled_fp8": torch.ones(2).to(torch.float8_e4m3fn),
                           PREFIX + "img_in.weight": torch.ones(32, 16).to(torch.float8_e4m3fn)},
            "'wconv dequantize' writes it", 4,
        ),
    ],
)  # fmt: skip
def test_what_is_no_flux_is_refused(
    change: Any, problem: str, code: int, flux: Any, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    _, config, state = flux
    save_file(change(state), tmp_path / "model.safetensors")
    done = wconv(
        "to-diffusers", tmp_path / "model.safetensors", "--config", config, "-o", tmp_path / "out", exit_code=code
    )
    assert problem in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_layers", 10**9), ("num_layers", "19"), ("num_single_layers", None), ("num_attention_heads", [2]),
        ("attention_head_dim", -1), ("attention_head_dim", 1e9), ("in_channels", True), ("patch_size", {}),
    ],
)  # fmt: skip
def test_a_config_may_say_anything(key: str, value: Any, flux: Any, tmp_path: Path) -> None:
    _, config, state = flux
    path = config / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(BadRequest, match=f"has a {key} that this cannot be"):
        open_single_file(open_checkpoint(tmp_path / "model.safetensors"), config)


def test_a_projection_that_is_not_the_identity_has_no_place(
    sd3: Any, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    model, _, _ = sd3
    with torch.no_grad():
        model.text_encoder.text_projection.weight[3, 4] = 0.5
    folder, single = saved(model, tmp_path / "model"), tmp_path / "model.safetensors"
    done = wconv("to-single-file", folder, "-o", single, exit_code=4)
    assert "holds a text_projection.weight that is not the identity" in done.stderr
    assert not single.exists()
    wconv("to-single-file", folder, "--without", "text_encoder", "-o", single)
    (folder / "vae/config.json").unlink()
    done = wconv("to-single-file", folder, "-o", tmp_path / "x.safetensors", exit_code=3)
    assert "vae/config.json: is not there, and says how large the model is" in done.stderr

"""Files of Flux, Stable Diffusion 3 and Sana, alone or as ComfyUI has all in one, become what Diffusers loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import original

from converter.dtypes import DTYPES
from converter.models.checkpoint import open_checkpoint
from converter.tensors.base import Tensor
from converter.tensors.derived import Constant
from converter.tensors.reader import RangeReader
from converter.transforms.layouts.rows import put_together
from converter.transforms.single_file.flux import FLUX
from converter.transforms.single_file.pipeline import SingleFile, open_single_file
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
    return values([*wholes, *(part.made_back(config, wholes) if part.made_back else [])])


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


def opened(folder: Path, state: Mapping[str, torch.Tensor], config: Path | None, **options: Any) -> SingleFile:
    save_file(dict(state), folder / "model.safetensors")
    return open_single_file(open_checkpoint(folder / "model.safetensors"), config, **options)


def made_of(file: SingleFile) -> dict[str, State]:
    return {component.name: values(checkpoint.tensors) for component, checkpoint in file.checkpoints}


def test_a_file_of_flux_becomes_its_pipeline(flux: Any, builders: Any, tmp_path: Path) -> None:
    model, config, state = flux
    file = opened(tmp_path, state, config)
    made = made_of(file)
    for name, part in builders.models_in(model).items():
        expected = {key.removeprefix("text_model."): value for key, value in part.state_dict().items()}
        mine = {key.removeprefix("text_model."): value for key, value in made[name].items()}
        mine.pop("embeddings.position_ids", None)
        assert mine.keys() == expected.keys()
        assert all(torch.equal(mine[key], value) for key, value in expected.items())
    assert file.notes[0] == "model.safetensors is a Flux checkpoint"


def test_a_file_of_sd3_becomes_what_diffusers_makes_of_it(sd3: Any, builders: Any, tmp_path: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    model, config, state = sd3
    made = made_of(opened(tmp_path, state, config))
    judge = StableDiffusion3Pipeline.from_single_file(
        str(tmp_path / "model.safetensors"), config=str(config), local_files_only=True
    )
    for name, part in builders.models_in(judge).items():
        expected = part.state_dict()
        assert made[name].keys() == expected.keys(), name
        assert all(torch.equal(made[name][key], value) for key, value in expected.items()), name
        theirs = getattr(model, name).state_dict()
        assert all(torch.equal(made[name][key], value) for key, value in theirs.items()), name


def test_a_projection_of_the_first_clip_is_the_identity(sd3: Any, tmp_path: Path) -> None:
    _, config, state = sd3
    name = "text_encoders.clip_l.transformer.text_projection.weight"
    file = opened(tmp_path, {**state, name: torch.full((40, 32), 3.0)}, config)
    assert torch.equal(made_of(file)["text_encoder"]["text_projection.weight"], torch.eye(32))
    assert f"left out, for Diffusers does not read it: {name}" in file.notes

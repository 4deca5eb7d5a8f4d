"""What the tensors of Stable Diffusion are called and how large they are, held against the classes that have them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_layouts_families import hollow

from converter.errors import BadFile, BadRequest, WconvError
from converter.recipes.request import Request
from converter.recipes.to_diffusers import plan_diffusers
from converter.recipes.to_single_file import plan_single_file
from converter.storage import place_of
from converter.transforms.layouts.rows import put_together, take_apart
from converter.transforms.layouts.stable_diffusion import unet_rows
from converter.transforms.layouts.stable_diffusion_shapes import clip_shapes, unet_shapes, vae_shapes
from converter.transforms.single_file.pipeline import CONFIGS
from converter.transforms.single_file.sizes import check_config
from converter.transforms.single_file.stable_diffusion import UNET

State = dict[str, torch.Tensor]


def state_of(name: str, config: Mapping[str, Any]) -> State:
    """Give the tensors of the real class, without their bytes; CLIP's under the names that transformers 4 has."""
    import diffusers
    import transformers

    with torch.device("meta"):
        if not name.startswith("CLIP"):
            return dict(getattr(diffusers, name).from_config(dict(config)).state_dict())
        state = getattr(transformers, name)(transformers.CLIPTextConfig(**config)).state_dict()
    return {key if key.startswith("text_") else f"text_model.{key}": one for key, one in state.items()}


def shapes_of(state: State) -> dict[str, tuple[int, ...]]:
    return {name: tuple(one.shape) for name, one in state.items()}


def shipped(name: str, **changes: Any) -> dict[str, Any]:
    return {**json.loads((CONFIGS / name / "config.json").read_text()), **changes}


XL = shipped("sdxl/unet")
UNETS = {
    "sd1": shipped("sd1/unet"),
    "sd2": shipped("sd2/unet"),
    "sdxl": XL,
    "the class's own": {},
    "inpainting": shipped("sd1/unet", in_channels=9),
    "refiner": {
        **XL, "block_out_channels": [384, 768, 1536, 1536], "cross_attention_dim": 1280,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [6, 12, 24, 24], "projection_class_embeddings_input_dim": 2560,
        "transformer_layers_per_block": 4,
    },
    "SSD-1B": {
        **XL, "mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [0, 2, 4],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    },
    "KOALA": {**XL, "layers_per_block": 1, "mid_block_type": None, "transformer_layers_per_block": [0, 2, 5]},
    "small-sd": {
        **shipped("sd1/unet"), "layers_per_block": 1, "mid_block_type": None, "block_out_channels": [320, 640, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3, "up_block_types": ["CrossAttnUpBlock2D"] * 3,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", UNETS)
def test_a_unet_has_what_the_class_has(kind: str) -> None:
    config = UNETS[kind]
    check_config(place_of("config.json"), config, UNET.numbers, UNET.words)
    assert unet_shapes(config) == shapes_of(state_of("UNet2DConditionModel", config))


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl", "sd3", "flux"])
def test_what_is_shipped_has_what_the_classes_have(kind: str) -> None:
    assert vae_shapes(shipped(f"{kind}/vae")) == shapes_of(state_of("AutoencoderKL", shipped(f"{kind}/vae")))
    for path in sorted(CONFIGS.glob(f"{kind}/text_encoder*/config.json")):
        config = json.loads(path.read_text())
        if config["model_type"] == "clip_text_model":
            assert clip_shapes(config) == shapes_of(state_of(config["architectures"][0], config))


@st.composite
def unets(draw: st.DrawFn) -> dict[str, Any]:
    """Give a config of a small UNet, of any form that the table knows."""
    blocks, layers = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    looks = draw(st.lists(st.booleans(), min_size=blocks, max_size=blocks))
    depth = st.integers(0, 2)
    depths: Any = draw(st.one_of(st.integers(1, 2), st.lists(depth, min_size=blocks, max_size=blocks)))
    config = {
        "block_out_channels": draw(st.lists(st.sampled_from([16, 32]), min_size=blocks, max_size=blocks)),
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if one else "DownBlock2D" for one in looks],
        "up_block_types": ["CrossAttnUpBlock2D" if one else "UpBlock2D" for one in reversed(looks)],
        "mid_block_type": draw(st.sampled_from(["UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None])),
        "norm_num_groups": 8,
        "cross_attention_dim": draw(st.sampled_from([8, 24])),
        "transformer_layers_per_block": depths,
        "use_linear_projection": draw(st.booleans()),
        "conv_in_kernel": draw(st.sampled_from([1, 3])),
        "in_channels": draw(st.sampled_from([4, 9])),
    }
    if draw(st.booleans()):
        rows = st.one_of(depth, st.lists(depth, min_size=layers + 1, max_size=layers + 1))
        config["reverse_transformer_layers_per_block"] = draw(st.lists(rows, min_size=blocks, max_size=blocks))
    if draw(st.booleans()):
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
        config |= {"projection_class_embeddings_input_dim": 56}
    return config


@settings(max_examples=12)
@given(config=unets())
def test_any_unet_goes_there_and_back(config: dict[str, Any]) -> None:
    check_config(place_of("config.json"), config, UNET.numbers, UNET.words)
    state = state_of("UNet2DConditionModel", config)
    assert unet_shapes(config) == shapes_of(state)
    wholes, left = put_together(hollow(state), unet_rows(config))
    assert not left
    back, left = take_apart({one.name: one for one in wholes}, unet_rows(config))
    assert not left
    assert {one.name: one.shape for one in back} == shapes_of(state)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("only_cross_attention", [True, True]), ("class_embed_type", "timestep"), ("encoder_hid_dim_type", "text_proj"),
        ("time_cond_proj_dim", 256), ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"), ("num_class_embeds", 7),
        ("down_block_types", ["AttnDownBlock2D", "DownBlock2D"]), ("resnet_time_scale_shift", "scale_shift"),
        ("cross_attention_dim", [8, 8]), ("layers_per_block", [1, 1]), ("block_out_channels", []),
        ("block_out_channels", [10**9]), ("transformer_layers_per_block", [[[1]]]), ("flip_sin_to_cos", False),
        ("transformer_layers_per_block", 10**6), ("up_block_types", "UpBlock2D"),
    ],
)  # fmt: skip
def test_what_no_single_file_has_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(BadRequest, match=f"has a {key} that "):
        check_config(place_of("config.json"), {key: value}, UNET.numbers, UNET.words)


# Half a model.


@pytest.fixture(scope="module")
def folder(builders: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sdxl") / "model"
    builders.shake(builders.MODELS["sdxl"]()).save_pretrained(path)
    return path


def test_a_folder_that_lacks_any_tensor_is_refused(folder: Path, tmp_path: Path) -> None:
    request = Request.of(folder, tmp_path / "model.safetensors")
    for path in sorted(folder.rglob("*.safetensors")):
        state = load_file(path)
        for name in [*state][:: 1 if len(state) < 30 else 41]:
            save_file({key: one for key, one in state.items() if key != name}, path)
            with pytest.raises((BadRequest, BadFile), match=r"is not there|lacks"):
                plan_single_file(request)
        save_file(state, path)


def test_a_file_that_lacks_any_tensor_is_refused(folder: Path, tmp_path: Path, wconv: Any) -> None:
    wconv("to-single-file", folder, "-o", tmp_path / "model.safetensors")
    state = load_file(tmp_path / "model.safetensors")
    request = Request.of(tmp_path / "half.safetensors", tmp_path / "out")
    for name in [*state][::29]:
        save_file({key: one for key, one in state.items() if key != name}, tmp_path / "half.safetensors")
        with pytest.raises(WconvError, match=r"is not there|no checkpoint that is known"):
            plan_diffusers(request, place_of(folder))

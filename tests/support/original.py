"""Stable Diffusion's own layout, made from Diffusers' names: what ``from_single_file`` turns back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

StateDict = dict[str, torch.Tensor]

ENCODERS = {
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
_UNET_ENDS = (
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_in", "input_blocks.0.0"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
)
_RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("time_emb_proj", "emb_layers.1"),
    ("conv_shortcut", "skip_connection"),
)


def unet_names(state: StateDict, layers: int) -> dict[str, str]:
    """Give the original name of each of a UNet's tensors, without its prefix."""
    names = {}
    for name in state:
        for new, old in _UNET_ENDS:
            if name.startswith(f"{new}."):
                names[name] = name.replace(new, old, 1)
        found = re.fullmatch(r"(down|up|mid)_blocks?\.(?:(\d+)\.)?(resnets|attentions|\w+samplers)\.(\d+)\.(.+)", name)
        if not found:
            continue
        side, block, kind, place, rest = found.groups()
        if kind == "resnets":
            for new, old in _RESNET:
                rest = re.sub(rf"^{new}\.", f"{old}.", rest)
        if side == "mid":
            names[name] = f"middle_block.{1 if kind == 'attentions' else 2 * int(place)}.{rest}"
            continue
        number = int(block) * (layers + 1) + (layers if kind.endswith("samplers") else int(place)) + (side == "down")
        where = f"{'input' if side == 'down' else 'output'}_blocks.{number}"
        if kind == "downsamplers":
            names[name] = f"{where}.0.op.{rest.removeprefix('conv.')}"
        elif kind == "upsamplers":
            after = any(key.startswith(f"up_blocks.{block}.attentions.") for key in state)
            names[name] = f"{where}.{2 if after else 1}.{rest}"
        else:
            names[name] = f"{where}.{1 if kind == 'attentions' else 0}.{rest}"
    assert names.keys() == state.keys()
    return names


def vae_as_original(state: StateDict, blocks: int) -> StateDict:
    """Give an autoencoder's tensors as its trainer saves them: its attention of convolutions."""
    made = {}
    for name, tensor in state.items():
        old = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        old = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", old)
        old = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", old)
        old = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", old)
        old = re.sub(r"up_blocks\.(\d)\.resnets", lambda found: f"up.{blocks - 1 - int(found[1])}.block", old)
        old = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{blocks - 1 - int(found[1])}.upsample", old)
        if "mid_block.attentions.0" in old:
            old = old.replace("mid_block.attentions.0", "mid.attn_1").replace("to_out.0", "proj_out")
            old = old.replace("group_norm", "norm").replace(".to_", ".")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        made[old] = tensor
    return made


def open_clip_as_original(state: StateDict) -> StateDict:
    """Give a text encoder's tensors as OpenCLIP has them, with one layer more; names as published."""
    made = {}
    joint: dict[str, list[torch.Tensor]] = {}
    for name, tensor in state.items():
        old = name.removeprefix("text_model.").replace("embeddings.token_embedding", "token_embedding")
        old = old.replace("embeddings.position_embedding.weight", "positional_embedding")
        old = old.replace("final_layer_norm", "ln_final").replace("layer_norm", "ln_")
        old = old.replace("encoder.layers", "transformer.resblocks").replace("self_attn", "attn")
        old = old.replace("mlp.fc1", "mlp.c_fc").replace("mlp.fc2", "mlp.c_proj")
        if old == "text_projection.weight":
            made["text_projection"] = tensor.T.contiguous()
        elif found := re.fullmatch(r"(.+attn\.)[qkv]_proj\.(weight|bias)", old):
            joint.setdefault(f"{found[1]}in_proj_{found[2]}", [])
        elif "position_ids" not in old:
            made[old] = tensor
    for old in joint:
        new = old.replace("transformer.resblocks", "text_model.encoder.layers").replace(
            "attn.in_proj_", "self_attn.{}_proj."
        )
        made[old] = torch.cat([state[new.format(which)] for which in "qkv"])
    last = max(int(found[1]) for name in made if (found := re.search(r"resblocks\.(\d+)", name)))
    again = {
        name.replace(f".{last}.", f".{last + 1}."): tensor
        for name, tensor in made.items()
        if f"resblocks.{last}." in name
    }
    made |= {name: tensor.clone() for name, tensor in again.items()}
    width = state["text_model.final_layer_norm.bias"].shape[0]
    made.setdefault(
        "text_projection", torch.ones(width, width, device=state["text_model.final_layer_norm.bias"].device)
    )
    return made


def as_original(kind: str, states: Mapping[str, StateDict], configs: Mapping[str, Any]) -> StateDict:
    """Give a pipeline's tensors, with names as published, as one checkpoint."""
    names = unet_names(states["unet"], configs["unet"]["layers_per_block"])
    made = {f"model.diffusion_model.{names[name]}": tensor for name, tensor in states["unet"].items()}
    vae = vae_as_original(states["vae"], len(configs["vae"]["up_block_types"]))
    made |= {f"first_stage_model.{name}": tensor for name, tensor in vae.items()}
    for name, prefix in ENCODERS[kind].items():
        state = open_clip_as_original(states[name]) if prefix.endswith("model.") else states[name]
        made |= {prefix + old: tensor for old, tensor in state.items()}
    return made


def averaged(state: StateDict) -> StateDict:
    """Give other values for a UNet's tensors, under the names that its trainer's averages have."""
    return {
        "model_ema." + "".join(name.split(".")[1:]): tensor * 2 + 1
        for name, tensor in state.items()
        if name.startswith("model.diffusion_model.")
    }


def meta_states(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give the state dicts of a shipped pipeline, full size, without their values."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    states, configs = {}, {}
    for path in sorted(folder.glob("*/config.json")):
        name = path.parent.name
        with torch.device("meta"):
            if name.startswith("text"):
                kind = CLIPTextModel if name == "text_encoder" else CLIPTextModelWithProjection
                model = kind(CLIPTextConfig.from_pretrained(path.parent))
            else:
                kind = UNet2DConditionModel if name == "unet" else AutoencoderKL
                model = kind.from_config(kind.load_config(path.parent))
        state = model.state_dict()
        prefix = "text_model." if name == "text_encoder" else ""
        states[name] = {prefix + key: tensor for key, tensor in state.items()}
        configs[name] = model.config
    return states, configs

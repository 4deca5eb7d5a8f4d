"""The kinds of Stable Diffusion that single files hold: how each is known, what it is made of, and what size it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from converter.errors import BadFile, BadRequest, Unsupported
from converter.storage import Place
from converter.tensors.base import Tensor
from converter.transforms.layouts import WeightConverter
from converter.transforms.stable_diffusion.tables import Config, clip_rows, open_clip_rows, unet_rows, vae_rows


class Part(NamedTuple):
    """A model in a single file: what its names begin with, and what gives the rows of its table for a config."""

    prefix: str
    rows: Callable[[Config], list[WeightConverter]]


UNET, VAE = Part("model.diffusion_model.", unet_rows), Part("first_stage_model.", vae_rows)
_CONV_IN = f"{UNET.prefix}input_blocks.0.0.weight"


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of checkpoint: its folder in ``configs``, and its text encoders.

    ``inpainting`` is what is other in the configs of its inpainting models.
    """

    name: str
    folder: str
    encoders: Mapping[str, Part]
    inpainting: Mapping[str, Config]

    @property
    def parts(self) -> dict[str, Part]:
        """All that it is made of, by the names that they have in a pipeline."""
        return {"unet": UNET, "vae": VAE, **self.encoders}


_NINE = {"unet/config.json": {"in_channels": 9}}
_NINE_2: Mapping[str, Config] = {
    "unet/config.json": {"in_channels": 9, "sample_size": 64, "upcast_attention": False},
    "vae/config.json": {"sample_size": 512},
    "scheduler/scheduler_config.json": {"prediction_type": "epsilon"},
}
_ENCODERS_XL = {
    "text_encoder": Part("conditioner.embedders.0.transformer.", clip_rows),
    "text_encoder_2": Part("conditioner.embedders.1.model.", open_clip_rows),
}
_ENCODERS_2 = {"text_encoder": Part("cond_stage_model.model.", open_clip_rows)}
_ENCODERS_1 = {"text_encoder": Part("cond_stage_model.transformer.", clip_rows)}
FAMILIES = (
    Family("Stable Diffusion XL", "sdxl", _ENCODERS_XL, _NINE),
    Family("Stable Diffusion 2", "sd2", _ENCODERS_2, _NINE_2),
    Family("Stable Diffusion 1", "sd1", _ENCODERS_1, _NINE),
)
# By the beginning of a name that no other has.
_OTHERS = {
    "lora_": "a LoRA",
    f"{UNET.prefix}joint_blocks.": "Stable Diffusion 3",
    "joint_blocks.": "Stable Diffusion 3",
    f"{UNET.prefix}double_blocks.": "Flux",
    "double_blocks.": "Flux",
    "control_model.": "a ControlNet",
    "conditioner.embedders.0.model.": "a Stable Diffusion XL refiner",
}

_MAX_COUNT = 64  # of layers, of blocks: real ones have up to 32, and a table has rows for each layer of each block
_CONFIG_TYPES = {
    "layers_per_block": int,
    "num_hidden_layers": int,
    "block_out_channels": list,
    "up_block_types": list,
    "architectures": list,
}


def recognise(source: Place, tensors: Mapping[str, Tensor]) -> tuple[Family, bool]:
    """Say what a checkpoint is by names and shapes: its family, and whether it is for inpainting.

    Raises Unsupported for anything else than Stable Diffusion 1, 2 and XL.
    """
    advice = "Name a checkpoint of Stable Diffusion 1, 2 or XL, or the folder of a Diffusers pipeline."
    for prefix, what in _OTHERS.items():
        if any(name.startswith(prefix) for name in tensors):
            raise Unsupported(source, f"is {what}, and no whole model of Stable Diffusion 1, 2 or XL", advice)
    if _CONV_IN not in tensors:
        problem = f"is no Stable Diffusion checkpoint: it has no tensor {_CONV_IN!r}"
        raise Unsupported(source, problem, advice)
    channels = ([*tensors[_CONV_IN].shape, 0, 0])[1]
    if channels not in (4, 9):  # nine are an image, its mask and the masked image
        problem = f"is for another purpose than making or inpainting pictures: its UNet takes {channels} channels"
        raise Unsupported(source, problem, advice)
    for family in FAMILIES:
        if all(any(name.startswith(part.prefix) for name in tensors) for part in family.encoders.values()):
            break
    else:
        raise BadFile(source, "holds a UNet, and no text encoder of Stable Diffusion 1, 2 or XL", advice)
    if not any(name.startswith(VAE.prefix) for name in tensors):
        problem = f"holds no VAE: no name begins with {VAE.prefix!r}"
        raise BadFile(source, problem, "Take a checkpoint with its VAE in it.")
    return family, channels == 9


def check_config(path: Place, config: Config) -> None:
    """Raise BadRequest for a config whose numbers of layers or blocks cannot be."""
    for key, kind in _CONFIG_TYPES.items():
        if key in config and not (type(config[key]) is kind and 0 < _count(config[key]) <= _MAX_COUNT):
            raise BadRequest(path, f"has a {key} that this cannot be: {config[key]!r}", "Give the right --config.")


def _count(value: Any) -> int:
    return len(value) if isinstance(value, list) else int(value)


def check_shapes(source: Place, what: str, config: Config, tensors: Sequence[Tensor]) -> None:
    """Raise BadRequest where a part is not of the size that its config says; ``what`` names the config."""
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    if "cross_attention_dim" in config:
        expected = _unet_shapes(config, shapes)
    elif "latent_channels" in config:
        expected = _vae_shapes(config)
    else:
        # transformers 4 and 5 differ in the prefix.
        shapes = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
        expected = _encoder_shapes(config)
    for name, shape in expected.items():
        if shapes.get(name, ())[:2] != shape:
            size = "x".join(map(str, shapes[name])) if name in shapes else "not there"
            problem = f"does not fit {what}: {name} is {size}, and should begin with {'x'.join(map(str, shape))}"
            raise BadRequest(source, problem, "Give a --config folder that it fits.")


# What a config says of the first two axes of some tensors; it may say anything.
_Shapes = dict[str, tuple[Any, ...]]


def _unet_shapes(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> _Shapes:
    widths = config.get("block_out_channels", (0,))
    expected: _Shapes = {
        "conv_in.weight": (widths[0], config.get("in_channels")),
        "conv_out.weight": (config.get("out_channels"), widths[0]),
    }
    keys = [name for name in shapes if name.endswith("attn2.to_k.weight")]
    expected |= {name: (*shapes[name][:1], config["cross_attention_dim"]) for name in keys}
    return expected | _width_shapes("", widths)


def _vae_shapes(config: Config) -> _Shapes:
    widths = config.get("block_out_channels", (0,))
    ends: _Shapes = {"encoder.conv_in.weight": (widths[0], 3), "decoder.conv_out.weight": (3, widths[0])}
    return ends | _width_shapes("encoder.", widths)


def _width_shapes(prefix: str, widths: Sequence[Any]) -> _Shapes:
    names = (f"{prefix}down_blocks.{at}.resnets.0.conv2.weight" for at in range(len(widths)))
    return {name: (width, width) for name, width in zip(names, widths, strict=True)}


def _encoder_shapes(config: Config) -> _Shapes:
    width, last = config.get("hidden_size"), config.get("num_hidden_layers", 1) - 1
    return {
        "embeddings.token_embedding.weight": (config.get("vocab_size"), width),
        f"encoder.layers.{last}.mlp.fc1.weight": (config.get("intermediate_size"), width),
    }

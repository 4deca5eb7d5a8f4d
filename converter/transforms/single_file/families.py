"""The kinds of Stable Diffusion that single files hold: how each is known, and what it is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from converter.errors import BadFile, Unsupported
from converter.libraries.base import Library
from converter.libraries.diffusers import DIFFUSERS
from converter.libraries.transformers import TRANSFORMERS
from converter.storage import Place
from converter.tensors.base import Tensor
from converter.transforms.layouts.rows import Row
from converter.transforms.layouts.stable_diffusion import Config, clip_rows, open_clip_rows, unet_rows, vae_rows
from converter.transforms.single_file.sizes import Shapes, encoder_shapes, unet_shapes, vae_shapes


class Part(NamedTuple):
    """A model in a single file: what its names begin with, and who loads it.

    For a config, ``rows`` gives those of its table, and ``shapes`` what it says of some of its tensors.
    """

    prefix: str
    library: Library
    rows: Callable[[Config], list[Row]]
    shapes: Callable[[Config, Shapes], Shapes]


def _clip(prefix: str) -> Part:
    return Part(prefix, TRANSFORMERS, clip_rows, encoder_shapes)


def _open_clip(prefix: str) -> Part:
    return Part(prefix, TRANSFORMERS, open_clip_rows, encoder_shapes)


UNET = Part("model.diffusion_model.", DIFFUSERS, unet_rows, unet_shapes)
VAE = Part("first_stage_model.", DIFFUSERS, vae_rows, vae_shapes)
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
    "text_encoder": _clip("conditioner.embedders.0.transformer."),
    "text_encoder_2": _open_clip("conditioner.embedders.1.model."),
}
_ENCODERS_2 = {"text_encoder": _open_clip("cond_stage_model.model.")}
_ENCODERS_1 = {"text_encoder": _clip("cond_stage_model.transformer.")}
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

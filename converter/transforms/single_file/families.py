"""The kinds of checkpoints that single files hold, and which of them a file or a pipeline is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from converter.errors import Unsupported, WconvError, spell_shape
from converter.models.checkpoint import Checkpoint
from converter.storage import Place
from converter.tensors.base import Tensor
from converter.transforms.single_file import alone, stable_diffusion
from converter.transforms.single_file.family import Configs, Family, Kind
from converter.transforms.single_file.flux import FLUX
from converter.transforms.single_file.sd3 import SD3

FAMILIES = (*stable_diffusion.FAMILIES, FLUX, SD3, *alone.FAMILIES)
EMA = "model_ema."
"""What names of averaged weights begin with."""
_BY_BEGIN = {
    "double_stream_modulation_img.": "Flux 2",
    "txt_in.individual_token_refiner.": "HunyuanVideo",
    "cap_embedder.": "Lumina or Z-Image",
    "double_layers.": "AuraFlow",
}
# What is none of these, by the beginning of a name that no other has; and by one that Diffusers' models have.
_OTHERS = {
    "lora_": "a LoRA",
    **{f"{prefix}{begin}": what for prefix in ("model.diffusion_model.", "") for begin, what in _BY_BEGIN.items()},
    "control_model.": "a ControlNet",
    "conditioner.embedders.0.model.": "a Stable Diffusion XL refiner",
}
_INSTEAD = {"a LoRA": "'wconv convert-lora --to diffusers' writes it for Diffusers; 'wconv merge-lora' into a model."}
_DIFFUSERS = ("down_blocks.", "transformer_blocks.", "encoder.down_blocks.", "decoder.up_blocks.")


class Found(NamedTuple):
    """What a single file is: a kind of a family, and what the names of each part that is there begin with."""

    family: Family
    kind: Kind
    prefixes: Mapping[str, str]


def family_of(pipeline: str, configs: Configs) -> Family | None:
    """Give the family of a pipeline of this class, whose parts have these configs; None for none that is known."""
    return next((one for one in FAMILIES if pipeline in one.pipelines and one.owns(configs)), None)


def part_of(class_name: object) -> tuple[Family, str] | None:
    """Give the first family that has a part of this class, and the part's name; its table is that of all others."""
    found = ((family, name) for family in FAMILIES for name, part in family.parts.items() if class_name in part.classes)
    return next(found, None)


def recognise(source: Place, tensors: Mapping[str, Tensor], meant: Family | None = None) -> Found:
    """Say what a checkpoint is by names and shapes; ``meant`` is what a config says that it is, and decides.

    Raises Unsupported for anything that is in no table, and for two models in one file.
    """
    candidates, prefix = _candidates(source, tensors)
    shapes = {name.removeprefix(prefix): tensor.shape for name, tensor in tensors.items() if name.startswith(prefix)}
    family = _choose(source, tensors, candidates, shapes, meant)
    kind = next((one for one in family.kinds if one.fits(shapes)), None)
    if kind is None:
        size = spell_shape(shapes[family.mark])
        problem = f"is a {family.name} model for another purpose than those that are known: {family.mark} is {size}"
        raise Unsupported(source, problem, "Only the model that makes pictures, and that for inpainting, have a table.")
    prefixes = {family.core: prefix}
    for name in family.parts:
        found = _prefixes_in(tensors, family, name) if name != family.core else ()
        if len(found) > 1:
            problem = f"holds its {name} twice: as {' and as '.join(repr(one + '*') for one in found)}"
            raise Unsupported(source, problem, "Drop one of them: wconv to-safetensors --drop.")
        if found:
            prefixes[name] = found[0]
    return Found(family, kind, prefixes)


def name_kind(checkpoint: Checkpoint) -> str:
    """Say in words what a file holds in the layout of its trainer; nothing where that is in no table."""
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors}
    try:
        family, kind, prefixes = recognise(checkpoint.weight_set.path, tensors)
    except WconvError:
        return ""
    if len(prefixes) == 1:
        return f"the {family.core} of {family.name} alone{kind.words}"
    averaged = " and EMA weights" if any(name.startswith(EMA) for name in tensors) else ""
    return f"a {family.name} checkpoint{kind.words} with {', '.join(prefixes)}{averaged}"


def _candidates(source: Place, tensors: Mapping[str, Tensor]) -> tuple[list[Family], str]:
    """Give the families whose diffusion model is there, and what its names begin with."""
    marks = {(one.mark, prefix) for one in FAMILIES for prefix in one.parts[one.core].prefixes}
    found = sorted((mark, prefix) for mark, prefix in marks if prefix + mark in tensors)
    if len(found) > 1:
        names = " and ".join(repr(prefix + mark) for mark, prefix in found)
        raise Unsupported(source, f"holds two diffusion models: {names}", "Keep one: wconv to-safetensors --drop.")
    known = ", ".join(dict.fromkeys(family.name for family in FAMILIES))
    advice = f"Name a checkpoint of one of: {known}."
    for begin, what in _OTHERS.items():
        if any(name.startswith(begin) for name in tensors):
            advice = _INSTEAD.get(what, advice)
            raise Unsupported(source, f"is {what}, or holds some of it, which no table has", advice)
    if found:
        [(mark, prefix)] = found
        return [one for one in FAMILIES if one.mark == mark], prefix
    if any(name.startswith(_DIFFUSERS) for name in tensors):
        advice = "'wconv to-single-file' makes a file for UIs of its folder; 'wconv recast' keeps its names."
        raise Unsupported(source, "has the names of Diffusers already", advice)
    problem = f"is no checkpoint that is known: it has no tensor {FAMILIES[0].parts['unet'].lone + FAMILIES[0].mark!r}"
    advice += " For a VAE or a text encoder, give the folder of one of its kind: --config ./model/vae."
    raise Unsupported(source, f"{problem}, nor that of another diffusion model", advice)


def _choose(
    source: Place,
    tensors: Mapping[str, Tensor],
    candidates: Iterable[Family],
    shapes: Mapping[str, tuple[int, ...]],
    meant: Family | None,
) -> Family:
    """Choose of families with the same diffusion model by the text encoders, by what is meant, or by its shapes."""
    candidates = list(candidates)
    if len(candidates) == 1:
        return candidates[0]
    spoken = [one for one in candidates if any(_prefixes_in(tensors, one, name) for name in one.encoders)]
    if len(spoken) > 1:
        names = " and ".join(one.name for one in spoken)
        raise Unsupported(source, f"holds text encoders of {names}", "Keep one: wconv to-safetensors --drop.")
    fitting = spoken or [one for one in candidates if one is meant] or [one for one in candidates if one.is_of(shapes)]
    if not fitting:
        names = " or ".join(one.name for one in candidates)
        problem = f"holds no text encoder, and its diffusion model has the size of no {names}"
        raise Unsupported(source, problem, "Give the folder of its pipeline: --config.")
    return fitting[0]


def _prefixes_in(tensors: Iterable[str], family: Family, name: str) -> list[str]:
    """Give those of a part's prefixes that names begin with."""
    return [one for one in family.parts[name].prefixes if any(full.startswith(one) for full in tensors)]

"""Core ML, as apple/ml-stable-diffusion's ``torch2coreml.py`` makes it of a pipeline folder: what it needs of that.

Its ``get_pipeline`` calls ``DiffusionPipeline.from_pretrained(..., torch_dtype=float16, variant="fp16",
use_safetensors=True)`` with Diffusers 0.30 (Apple's pin) to 0.36 (MochiDiffusion's), so it needs ``*.fp16.safetensors``
for every part, each in one file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.errors import BadFile, Unsupported, WconvError
from converter.models.component import Component
from converter.models.inventory import is_class
from converter.storage import Place

COREML_VARIANT = "fp16"

# By class: what is put before names that begin with the second. transformers 5 saves models that it made itself without
# a prefix; transformers 4 then loads random weights, with no more than a warning. Both know the longer names
# (``modeling_clip.py``).
_PREFIXES = {
    "CLIPTextModel": ("text_model.", ""),
    "StableDiffusionSafetyChecker": ("vision_model.", "vision_model."),
}
_FLAVOURS = ("", "Img2Img", "Inpaint")
_PIPELINES = {f"StableDiffusion{xl}{flavour}Pipeline" for xl in ("", "XL") for flavour in _FLAVOURS}
_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
# What a part that has no weights is read from; without vocab.json and merges.txt transformers 4 has no tokenizer.
_FILES = {
    "tokenizer": ("vocab.json", "merges.txt"),
    "scheduler": ("scheduler_config.json",),
    "feature_extractor": ("preprocessor_config.json",),
}
_ENCODERS = frozenset({"text_encoder", "text_encoder_2"})


@dataclass(frozen=True, slots=True)
class Lack:
    """One thing that the script would miss; ``error`` is how it is refused."""

    path: Place
    problem: str
    advice: str
    error: type[WconvError] = BadFile


def find_lacks(source: Place, model_index: Mapping[str, Any]) -> Iterator[Lack]:
    """List what a pipeline folder with this model_index.json (none if it cannot be read) lacks beside its weights."""
    if not model_index:
        problem = "is no Diffusers pipeline: it has no model_index.json that can be read"
        yield Lack(source, problem, "Name the folder that has one, with unet, vae and text_encoder below it.")
        return
    class_name = model_index.get("_class_name")
    if not is_convertible(model_index):
        problem = f"is a {class_name}, and torch2coreml converts Stable Diffusion 1, 2 and XL"
        yield Lack(source, problem, "Other pipelines have no way to Core ML here.", Unsupported)
        return
    named = {name: entry for name, entry in model_index.items() if isinstance(entry, list) and entry[1:] != [None]}
    for name in _PARTS:
        if name not in named and not (name == "text_encoder" and "text_encoder_2" in named):
            yield Lack(source / "model_index.json", f"names no {name}", "Fetch the whole pipeline again.")
    for name in sorted(named):
        for file_name in _FILES.get(name.removesuffix("_2"), ()):
            if not (source / name / file_name).is_file():
                yield Lack(source / name / file_name, "is not there", f"Fetch it; it belongs to the {name}.")


def is_convertible(model_index: Mapping[str, Any]) -> bool:
    """Say whether a pipeline is of a kind that the script converts."""
    class_name = model_index.get("_class_name")
    return isinstance(class_name, str) and class_name in _PIPELINES


def has_weights(component: str) -> bool:
    """Say whether a part of a pipeline is one that has weights."""
    return component.removesuffix("_2") not in _FILES


def longer_names(class_name: str, names: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Give what is put before names of tensors, so that transformers 4 knows them, and each name with its new one.

    None where the class needs no prefix, or has it.
    """
    prefix, short = _PREFIXES.get(class_name, ("", ""))
    names = list(names)
    if not prefix or any(name.startswith(prefix + short) for name in names):
        return "", {}
    return prefix, {name: prefix + name if name.startswith(short) else name for name in names}


def old_classes(model_index: Mapping[str, Any]) -> dict[str, Any]:
    """Name classes in a model_index.json as all versions do: without torchvision, transformers 5 writes ``...Pil``."""
    return {
        name: [entry[0], entry[1].removesuffix("Pil")] if name in _FILES and is_class(entry) else entry
        for name, entry in model_index.items()
    }


@dataclass(frozen=True, slots=True)
class NextStep:
    """A command to run next, and what its result is for."""

    purpose: str
    command: tuple[str, ...]


def next_steps(folder: Path, class_name: str, components: Iterable[Component]) -> list[NextStep]:
    """Give the commands that make Core ML models of a pipeline's folder: one for each kind of attention."""
    encoder = ["--convert-text-encoder"] if any(part.name in _ENCODERS for part in components) else []
    convert = ["--convert-unet", *encoder, "--convert-vae-decoder", "--convert-vae-encoder"]
    xl = ["--xl-version"] if "XL" in class_name else []
    rows = (
        ("for the Neural Engine: iPhone, iPad, and Macs that should stay cool", "SPLIT_EINSUM", "CPU_AND_NE"),
        ("for the GPU: Macs, the fastest on large ones", "ORIGINAL", "CPU_AND_GPU"),
    )
    return [
        NextStep(
            purpose,
            ("python", "-m", "python_coreml_stable_diffusion.torch2coreml", "--model-version", str(folder), *xl,
             *convert, "--attention-implementation", attention, "--compute-unit", unit,
             "--bundle-resources-for-swift-cli", "-o", f"{folder}-{attention.lower().replace('_', '-')}"),
        )
        for purpose, attention, unit in rows
    ]  # fmt: skip


def overflows_in_fp16(class_name: str, components: Iterable[Component]) -> bool:
    """Say whether a pipeline's VAE overflows when it runs, as that of SDXL does (``force_upcast`` in its config)."""
    vaes = (component for component in components if component.name == "vae")
    return "XL" in class_name and any(vae.config.get("force_upcast") is True for vae in vaes)

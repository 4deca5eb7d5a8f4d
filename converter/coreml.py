"""The step before Core ML conversion: a pipeline folder as apple/ml-stable-diffusion's ``torch2coreml.py`` loads it.

Its ``get_pipeline`` calls ``DiffusionPipeline.from_pretrained(..., torch_dtype=float16, variant="fp16",
use_safetensors=True)`` with Diffusers 0.30 (Apple's pin) to 0.36 (MochiDiffusion's), so it needs ``*.fp16.safetensors``
for every part, each in one file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from converter.doctor.checks import run_checks
from converter.doctor.findings import Finding
from converter.doctor.loaders import COREML_VARIANT
from converter.doctor.view import look, read_json
from converter.dtypes import BY_ALIAS, OnOverflow
from converter.errors import BadFile, BadRequest, Unsupported
from converter.models.checkpoint import Checkpoint, WeightSet, rename_tensors
from converter.models.folder import Component, ModelFolder, render_json
from converter.models.hub_cache import check_places, snapshot_of
from converter.models.select import Wishes, choose_sets
from converter.plan.make import Plan
from converter.recipes.convert import plan_conversion, plan_rest, plan_single_file, request_of
from converter.run.staging import recover
from converter.transforms.stable_diffusion import open_single_file

# By class: what is put before names that begin with the second.
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
_FATAL = ("file-damaged", "shard-missing", "component-missing", "config-unreadable", "index-unreadable")


@dataclass(frozen=True, slots=True)
class Lack:
    """One thing that the script would miss."""

    path: Path
    problem: str
    advice: str


def find_lacks(source: Path, findings: Iterable[Finding] | None = None) -> Iterator[Lack]:
    """List what a pipeline folder lacks that no conversion of weights can give it. Raises BadFile for no folder.

    ``findings`` are the doctor's, where it has looked already.
    """
    model_index, error = read_json(source / "model_index.json")
    if error or not model_index:
        problem = "is no Diffusers pipeline: it has no model_index.json that can be read"
        yield Lack(source, problem, "Name the folder that has one, with unet, vae and text_encoder below it.")
        return
    class_name = model_index.get("_class_name")
    if not isinstance(class_name, str) or class_name not in _PIPELINES:
        problem = f"is a {class_name}, and torch2coreml converts Stable Diffusion 1, 2 and XL"
        yield Lack(source, problem, "Other pipelines have no way to Core ML here.")
        return
    named = {name: entry for name, entry in model_index.items() if isinstance(entry, list) and entry[1:] != [None]}
    for name in _PARTS:
        if name not in named and not (name == "text_encoder" and "text_encoder_2" in named):
            yield Lack(source / "model_index.json", f"names no {name}", "Fetch the whole pipeline again.")
    for name in sorted(named):
        for file_name in _FILES.get(name.removesuffix("_2"), ()):
            if not (source / name / file_name).is_file():
                yield Lack(source / name / file_name, "is not there", f"Fetch it; it belongs to the {name}.")
    for finding in run_checks(look(source)) if findings is None else findings:
        if finding.code in _FATAL and finding.component.removesuffix("_2") not in _FILES:
            yield Lack(finding.path, finding.problem, finding.kind.mending)


def check_source(source: Path, findings: Iterable[Finding] | None = None) -> None:
    """Raise BadFile or Unsupported for the first thing that a source lacks, with all others named.

    ``findings`` are as in ``find_lacks``: none for a folder that is there for its configs.
    """
    lacks = list(find_lacks(source, findings))
    if not lacks:
        return
    first, *others = lacks
    names = [lack.path.relative_to(source).as_posix() if lack.path != source else str(source) for lack in others]
    more = f" Besides: {', '.join(f'{name} {lack.problem}' for name, lack in zip(names, others, strict=True))}."
    error = Unsupported if "torch2coreml converts" in first.problem else BadFile
    raise error(first.path, first.problem, first.advice + (more if others else ""))


def prepare_coreml(
    source: Path,
    output: Path,
    keep_default: bool,
    on_overflow: OnOverflow,
    overwrite: bool,
    *,
    ema: bool = False,
    config: Path | None = None,
    follow_links: bool = False,
    recovering: bool = True,
) -> tuple[str, Plan | None]:
    """Name a request for ``run_plan`` and plan it; None for the plan if a killed run of it needed just finishing.

    ``ema`` and ``config`` are as in ``open_single_file``, and for such a file only.

    Raises BadFile or Unsupported for what the script would miss, before anything is written.
    """
    check_places(source, output)
    source = snapshot_of(source)
    config = config and snapshot_of(config)
    wishes = Wishes(
        every_variant=False,
        dtype=BY_ALIAS[COREML_VARIANT],
        variant=COREML_VARIANT,
        max_shard_nbytes=math.inf,
        on_overflow=on_overflow,
        overwrite=overwrite,
        follow_links=follow_links,
    )
    request = request_of(source, output, ("coreml", keep_default, ema, str(config), wishes))
    finished = recovering and recover(output, request)

    def make(wishes: Wishes) -> Plan:
        return _plan(source, output, wishes, keep_default, ema, config)

    return request, plan_rest(finished, wishes, make)


def _plan(source: Path, output: Path, wishes: Wishes, keep_default: bool, ema: bool, config: Path | None) -> Plan:
    others = [replace(wishes, dtype=None, variant="none")] if keep_default else []
    if source.is_file():
        if config is not None:
            check_source(config, ())
        opened = open_single_file(source, config, ema, wishes.follow_links)
        return plan_single_file(opened, output, wishes, _adapt, others)
    if ema or config is not None:
        option = "--ema" if ema else "--config"
        raise BadRequest(source, f"is a folder, and {option} is for a single file", "Leave it out.")
    check_source(source)
    return plan_conversion(source, output, wishes, _choose, _adapt, edited=_old_classes(source), others=others)


def _adapt(component: Component, checkpoint: Checkpoint) -> tuple[Component, Checkpoint]:
    """Give a text encoder and a safety checker the names that transformers 4 knows.

    transformers 5 saves those that it made itself without a prefix; transformers 4 then loads random weights, with no
    more than a warning. Both know the longer names (``modeling_clip.py``).
    """
    prefix, short = _PREFIXES.get(component.class_name, ("", ""))
    names = [info.name for info in checkpoint.tensors]
    if not prefix or any(name.startswith(prefix + short) for name in names):
        return component, checkpoint
    longer = {name: prefix + name if name.startswith(short) else name for name in names}
    note = f"{prefix} was put before names in {checkpoint.weight_set.path.name}, as transformers 4 needs it"
    return component, replace(rename_tensors(checkpoint, longer), notes=(*checkpoint.notes, note))


def _old_classes(source: Path) -> dict[str, bytes]:
    """Name classes in model_index.json as all versions do: without torchvision, transformers 5 writes ``...Pil``."""
    content, error = read_json(source / "model_index.json")
    if error:
        raise BadFile(source / "model_index.json", f"cannot be read ({error})", "Fetch the whole pipeline again.")
    edited = {
        name: [entry[0], entry[1].removesuffix("Pil")] if name in _FILES and _is_class(entry) else entry
        for name, entry in content.items()
    }
    return {"model_index.json": render_json(edited)} if edited != content else {}


def _is_class(entry: object) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)


def _choose(folder: ModelFolder, wishes: Wishes) -> list[tuple[Component, WeightSet]]:
    """Of each part take the fp16 weights, else the untagged ones, else what there is; for untagged ones, those."""
    if wishes.variant == "none":
        return choose_sets(folder, replace(wishes, from_variant="none"))
    chosen = []
    for component in folder.components:
        has_variant = any(found.name.variant == COREML_VARIANT for found in component.weight_sets)
        one = replace(wishes, components=(component.name,), from_variant=COREML_VARIANT if has_variant else None)
        chosen += choose_sets(folder, one)
    return chosen


@dataclass(frozen=True, slots=True)
class NextStep:
    """A command to run next, and what its result is for."""

    purpose: str
    command: tuple[str, ...]


def next_steps(plan: Plan) -> list[NextStep]:
    """Give the commands that make Core ML models of what a plan writes: one for each kind of attention."""
    parts = {component.name for component in plan.source.components}
    target = plan.target.folder
    encoder = ["--convert-text-encoder"] if {"text_encoder", "text_encoder_2"} & parts else []
    convert = ["--convert-unet", *encoder, "--convert-vae-decoder", "--convert-vae-encoder"]
    xl = ["--xl-version"] if "XL" in plan.source.class_name else []
    rows = (
        ("for the Neural Engine: iPhone, iPad, and Macs that should stay cool", "SPLIT_EINSUM", "CPU_AND_NE"),
        ("for the GPU: Macs, the fastest on large ones", "ORIGINAL", "CPU_AND_GPU"),
    )
    return [
        NextStep(
            purpose,
            ("python", "-m", "python_coreml_stable_diffusion.torch2coreml", "--model-version", str(target), *xl,
             *convert, "--attention-implementation", attention, "--compute-unit", unit,
             "--bundle-resources-for-swift-cli", "-o", f"{target}-{attention.lower().replace('_', '-')}"),
        )
        for purpose, attention, unit in rows
    ]  # fmt: skip


def upcast_vae(plan: Plan) -> bool:
    """Say whether the VAE overflows in float16 when it runs, as that of SDXL does (``force_upcast`` in its config)."""
    vaes = (component for component in plan.source.components if component.name == "vae")
    return "XL" in plan.source.class_name and any(vae.config.get("force_upcast") is True for vae in vaes)

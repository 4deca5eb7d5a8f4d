"""A single file as a Diffusers pipeline: its tensors sorted into parts, and what else a pipeline holds.

Every tensor gets the name that ``from_single_file`` gives it, and the shape where that differs, as a view of its bytes
in the file. So it is streamed like any other, and neither torch nor Diffusers is needed. What else a pipeline holds
comes from ``configs``, or from a folder of the user's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from converter.errors import BadFile, BadRequest, Unsupported, name_some
from converter.models.checkpoint import Checkpoint
from converter.models.component import Component, WeightSet
from converter.models.configs import read_json, render_json
from converter.models.hub_cache import lies_outside
from converter.models.model import Model
from converter.models.names import WeightsName
from converter.storage import FileRef, Place, place_of
from converter.tensors.base import Tensor
from converter.transforms.layouts.rows import take_apart
from converter.transforms.single_file.families import UNET, Family, recognise
from converter.transforms.single_file.sizes import check_config, check_shapes
from converter.transforms.single_file.tokenizer import tokenizer_files

CONFIGS = Path(__file__).parents[2] / "configs"
_EMA = "model_ema."
_COPIED = (".json", ".txt", ".model")
_ABSENT = ("safety_checker", "feature_extractor", "image_encoder")  # no single file holds them


@dataclass(frozen=True, slots=True)
class SingleFile:
    """A checkpoint as a pipeline: what it is, its parts, the files beside them and the text of some.

    ``copied`` and ``generated`` are as in a Plan.
    """

    model: Model
    checkpoints: tuple[tuple[Component, Checkpoint], ...]
    copied: tuple[tuple[str, FileRef], ...]
    generated: Mapping[str, bytes]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Frame:
    """What a checkpoint is put into: the folder of its family, or the one that is ``given``, with some changes."""

    family: Family
    root: Place
    given: bool
    is_inpainting: bool

    @property
    def changes(self) -> Mapping[str, Mapping[str, Any]]:
        return self.family.inpainting if self.is_inpainting else {}

    def read(self, name: str) -> dict[str, Any]:
        """Read a config, as it is for this checkpoint. Raises BadFile where there is none."""
        content = read_json(self.root / name)
        if not content:
            raise BadFile(self.root / name, "is not there, or no JSON object", "Give a --config folder that has it.")
        return {**content, **self.changes.get(name, {})}


def open_single_file(
    checkpoint: Checkpoint, config: Place | Path | None = None, ema: bool = False, follow_links: bool = False
) -> SingleFile:
    """Sort a checkpoint's tensors into the parts of a pipeline; ``ema`` takes the UNet's averaged weights.

    ``config`` is a pipeline folder, of which the weights are not looked at, nor what else in it lies elsewhere by links
    unless ``follow_links``. Raises Unsupported for another model, BadFile or BadRequest for a part that is missing or
    does not fit its config.
    """
    source = checkpoint.weight_set.path
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors}
    family, is_inpainting = recognise(source, tensors)
    root = place_of(config or CONFIGS / family.folder)
    frame = _Frame(family, root, config is not None, is_inpainting and config is None)
    generated = {name: render_json(frame.read(name)) for name in frame.changes}
    index = _index_of(frame)
    generated["model_index.json"] = render_json(index)
    notes = [f"{source.name} is a {family.name} checkpoint{' for inpainting' if is_inpainting else ''}"]
    if family.folder == "sd2" and config is None and not is_inpainting:
        notes.append("it is taken for one of 768 pixels; for one of 512, give the folder of such a model as --config")
    notes += checkpoint.notes
    parts = []
    for name in family.parts:
        component, part, left = _open_part(checkpoint, tensors, frame, name, ema)
        parts.append((component, part))
        notes += left
    notes += _notes_of_rest(tensors, family, ema)
    copied, linked = _find_copied(frame, index, generated, follow_links)
    notes += linked
    if config is None:
        generated |= tokenizer_files(place_of(CONFIGS / "clip_merges.txt.gz"), index)
    model = Model(source, source.parent, "pipeline", tuple(component for component, _ in parts), index["_class_name"])
    return SingleFile(model, tuple(parts), copied, generated, tuple(notes))


def _index_of(frame: _Frame) -> dict[str, Any]:
    """Give a pipeline's index as it is without what a single file has not. Raises BadRequest for another family's."""
    index = frame.read("model_index.json")
    if frame.is_inpainting:
        index["_class_name"] = index["_class_name"].replace("Pipeline", "InpaintPipeline")
    index.update({name: [None, None] for name in _ABSENT if name in index})
    if "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    wanted = frame.family.encoders
    encoders = [name for name in index if name.startswith("text_encoder") and index[name] != [None, None]]
    if sorted(encoders) != sorted(wanted):
        problem = f"names {' and '.join(encoders) or 'no text encoder'}, and {frame.family.name} has"
        problem += f" {' and '.join(wanted)}"
        raise BadRequest(frame.root / "model_index.json", problem, "Give the right --config.")
    return index


def _open_part(
    checkpoint: Checkpoint, tensors: Mapping[str, Tensor], frame: _Frame, name: str, ema: bool
) -> tuple[Component, Checkpoint, list[str]]:
    """Give a part with the names that its weights have in a pipeline, and notes of what is left out of it."""
    source, part = checkpoint.weight_set.path, frame.family.parts[name]
    path = frame.root / name / "config.json"
    config = frame.read(f"{name}/config.json")
    check_config(path, config)
    mine = {full.removeprefix(part.prefix): tensor for full, tensor in tensors.items() if full.startswith(part.prefix)}
    if name == "unet" and ema:
        mine = _averaged(source, mine, tensors)
    converted, left = take_apart(mine, part.rows(config))
    # transformers 4 and 5 differ in the prefix.
    shapes = {tensor.name.removeprefix("text_model."): tensor.shape for tensor in converted}
    what = str(path) if frame.given else f"the {name} of {frame.family.name}"
    check_shapes(source, what, part.shapes(config, shapes), shapes)
    others = name_some([part.prefix + short for short in left], 1)
    if left and name == "unet":
        problem = f"holds tensors that no UNet of {frame.family.name} has: {others}"
        raise Unsupported(source, problem, "Is it another model, or one with something added?")
    weights_name = WeightsName(part.library.stem("safetensors"), None, "safetensors")
    weight_set = WeightSet(source.parent, weights_name, (source.name,))
    file = replace(checkpoint.files[0], tensors=tuple(converted), metadata={})
    component = Component(name, source.parent / name, (weight_set,), config)
    notes = [f"left out, for no {name} has them: {others}"] if left else []
    return component, Checkpoint(weight_set, (file,), {}), notes


def _averaged(source: Place, plain: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the averaged weights for the plain ones: their names have no dots (``ldm/modules/ema.py``)."""
    flat = {name: _EMA + f"{UNET.prefix}{name}".removeprefix("model.").replace(".", "") for name in plain}
    missing = [name for name in flat.values() if name not in tensors]
    if missing:
        problem = f"lacks EMA weights: {len(missing)} of {len(flat)}, such as {missing[0]!r}"
        raise BadFile(source, problem, "Leave --ema out.")
    return {name: tensors[averaged] for name, averaged in flat.items()}


def _find_copied(
    frame: _Frame, index: Mapping[str, Any], generated: Mapping[str, bytes], follow_links: bool
) -> tuple[tuple[tuple[str, FileRef], ...], list[str]]:
    """Give the files that come along as they are, and notes of those that do not: they lie behind links."""
    files = {name: path for name, path in _files_beside(frame.root, index) if name not in generated}
    root = frame.root.real()
    linked = [] if follow_links else [name for name, path in files.items() if lies_outside(path, root)]
    notes = [f"not carried over: {files.pop(name)} (behind a link: --follow-links carries it)" for name in linked]
    return tuple((name, path.ref()) for name, path in files.items()), notes


def _files_beside(root: Place, index: Mapping[str, Any]) -> Iterator[tuple[str, Place]]:
    """List the files of the parts that a pipeline names, by their names from its folder."""
    for name, entry in index.items():
        if isinstance(entry, list) and entry[:1] != [None] and name.isidentifier() and (root / name).is_folder():
            for path in (root / name).entries():
                if path.name.endswith(_COPIED) and ".index." not in path.name and path.is_file():
                    yield f"{name}/{path.name}", path


def _notes_of_rest(tensors: Iterable[str], family: Family, ema: bool) -> Iterator[str]:
    """Say what becomes of the tensors that are in no part, and of the averaged ones."""
    prefixes = tuple(part.prefix for part in family.parts.values())
    rest = [name for name in tensors if not name.startswith(prefixes)]
    averaged = [name for name in rest if name.startswith(_EMA)]
    others = [name for name in rest if not name.startswith(_EMA)]
    if averaged and not ema:
        yield f"the UNet's EMA weights are left out ({len(averaged)} tensors); --ema takes them in its place"
    if ema:
        yield "the UNet's EMA weights are taken, and its plain ones left out"
    if others:
        yield f"left out, for no part of a pipeline has them: {name_some(others, 1)}"

"""The parts of a pipeline as a single file: every tensor under the name, and in the shape, that its trainer has.

It is ``pipeline`` read backwards, by the same tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from converter.dtypes import DTYPES
from converter.errors import BadFile, BadRequest, Unsupported, name_some
from converter.models.checkpoint import Checkpoint
from converter.models.component import Component
from converter.models.configs import read_json
from converter.storage import place_of
from converter.tensors.base import Tensor
from converter.tensors.derived import Constant
from converter.tensors.reader import RangeReader, read_chunks
from converter.transforms.layouts.rows import put_together
from converter.transforms.layouts.sizes import Sizes
from converter.transforms.single_file.family import SCHEDULER, Config, Configs, Family, Part
from converter.transforms.single_file.pipeline import CONFIGS, as_diffusers, find_strange, notes_of_headers
from converter.transforms.single_file.sizes import check_config

_NAMED = 3
_CHUNK_NBYTES = 1 << 18
# What a config says and no shape does, as the classes take it by default.
_UNTOLD = {
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "hidden_act": "quick_gelu",
    "attention_head_dim": 8,
}


def join(family: Family, opened: Sequence[tuple[str, Component, Checkpoint]]) -> tuple[list[Tensor], list[str]]:
    """Give the tensors of parts, by their names in the family, in one file, and notes of what is left out.

    A part alone has no more of a prefix than its kind of file has. Raises BadRequest for one that is not of the size
    that its config says, Unsupported for a tensor that no row has, BadFile for one that does not fit another.
    """
    tensors: list[Tensor] = []
    notes: list[str] = []
    for name, component, checkpoint in opened:
        part = family.parts[name]
        wholes, left = _as_original(family, name, component, checkpoint)
        made = part.made_back(component.config, wholes) if part.made_back else []
        _refuse_other(family, {tensor.name: tensor for tensor in checkpoint.tensors}, made)
        left = [one for one in left if all(one != tensor.name for tensor, _ in made)]
        notes += (f"{one.name} of the {name} is {what}, for readers of the file look for it" for one, what in made)
        wholes += (one for one, _ in made)
        notes += _find_unlike(part, name, component.config, Sizes(checkpoint.weight_set.path, _shapes_of(wholes)))
        prefix = part.prefixes[0] if len(opened) > 1 else part.lone
        tensors += (tensor._replace(name=prefix + tensor.name) for tensor in wholes)
        unread = [one for one in left if one in part.unread]
        notes += (f"left out of the {name}, for no reader of single files reads it: {one}" for one in unread)
        notes += (f"left out, for it is no weight: {one}" for one in left if one not in unread)
        notes += notes_of_headers(checkpoint)
    return tensors, notes


def _as_original(
    family: Family, name: str, component: Component, checkpoint: Checkpoint
) -> tuple[list[Tensor], list[str]]:
    part, config, path = family.parts[name], component.config, component.path / "config.json"
    if not config:
        raise BadFile(path, "is not there, and says how large the model is", "Fetch all files of the model.")
    check_config(path, config, part.numbers, part.words)
    source, tensors = checkpoint.weight_set.path, {tensor.name: tensor for tensor in checkpoint.tensors}
    wholes, left = put_together(tensors, part.rows(config))
    back, _ = as_diffusers(part, config, {tensor.name: tensor for tensor in wholes})
    strange = [short for short in left if short.rpartition(".")[2] not in part.buffers and short not in part.unread]
    strange += find_strange(source, str(path), part, config, back)
    _refuse_other(family, tensors, ((one, "the identity") for one in back if one.name in part.unread))
    if strange:
        problem = f"holds tensors that no {name} of {family.name} has: {name_some(strange, _NAMED)}"
        raise Unsupported(source, problem, "Is something added to it, or is it another model?")
    return wholes, left


def _find_unlike(part: Part, name: str, config: Config, sizes: Sizes) -> list[str]:
    """Say what a config says otherwise than a file is taken to be by its names and shapes, where they tell."""
    try:
        taken = part.config_of(sizes) if part.config_of else {}
    except BadRequest as error:
        return [f"the {name} {error.problem}"]
    return [
        f"its {name}'s {key} is {config[key]!r:.60}, and programs that read the file take {value!r:.60}"
        for key, value in taken.items()
        if key in config and config[key] != value
    ]


def _shapes_of(tensors: Sequence[Tensor]) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in tensors}


def _refuse_other(family: Family, tensors: Mapping[str, Tensor], made: Iterable[tuple[Tensor, str]]) -> None:
    """Raise Unsupported for a tensor in whose place another is made, which is said what it is, if they are not equal.

    Hardly any model has one: so it may be read.
    """
    for one, what in made:
        theirs = tensors.get(one.name)
        if theirs is not None and not _are_same(one, theirs):
            problem = f"holds a {one.name} that is not {what}, which readers of {family.name}'s files take it for"
            raise Unsupported(theirs.where, problem, "Keep the folder: no single file would say the same.")


def _are_same(one: Tensor, other: Tensor) -> bool:
    if one.source == other.source or (one.dtype, one.shape) != (other.dtype, other.shape):
        return one.source == other.source
    with RangeReader() as reader:
        chunks = (read_chunks(tensor.source, reader, bytearray(_CHUNK_NBYTES)) for tensor in (one, other))
        return all(mine == theirs for mine, theirs in zip(*chunks, strict=True))


def marks_of(family: Family, scheduler: Mapping[str, Any]) -> tuple[list[Tensor], list[str]]:
    """Give the empty tensors that tell a UI what a scheduler's config says, and notes of that, or that nothing does."""
    said = {name: (key, value) for name, (key, value) in family.marks.items() if _is(scheduler.get(key), value)}
    marks = [Tensor(name, Constant(DTYPES["F32"], (0,), b"")) for name in said]
    notes = [f"its scheduler's {key} is {value}: the file says so with {name}" for name, (key, value) in said.items()]
    if scheduler.get("prediction_type") == "v_prediction" and not said:
        notes.append("its scheduler's prediction_type is v_prediction, which no file of weights says: set it in the UI")
    return marks, notes


def find_untold(family: Family, configs: Configs, scheduler: Config) -> list[str]:
    """Say what no file of weights says of a pipeline, and programs that read one take to be as it is published."""
    usual = place_of(CONFIGS / family.folder)
    notes = []
    for name, config in configs.items():
        taken = read_json(usual / name / "config.json")
        for key, default in _UNTOLD.items() if taken else ():
            said, value = config.get(key, default), taken.get(key, default)
            if said != value:
                who = f"programs that read files of {family.name} take {value}"
                notes.append(f"its {name}'s {key} is {said!r:.60}, and {who}")
    kind, shipped = scheduler.get("_class_name"), read_json(usual / SCHEDULER).get("_class_name")
    if isinstance(kind, str) and _method(kind) != _method(str(shipped)):
        notes.append(f"its scheduler is a {kind:.60}, which no file of weights says: set it in the UI")
    return notes


def _method(scheduler: str) -> str:
    """Give what a scheduler's class goes by, which a model is trained to; all others go by the same."""
    return next((one for one in ("EDM", "FlowMatch") if one in scheduler), "")


def _is(said: Any, value: Any) -> bool:
    return type(said) is type(value) and bool(said == value)

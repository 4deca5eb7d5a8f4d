"""What of a model's folder is damaged or missing, so that nothing can be made of it before it is fetched again.

``look`` takes an inventory, headers and all, of the folders that are the model's, and refuses what is no model. Faults
are told apart by a code, under which the doctor says more of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from converter.errors import BadFile, BadRequest, TrainingPiece, Unsupported, WconvError
from converter.formats import refuse_folder
from converter.models.headers import Header
from converter.models.inventory import Inventory, Part, read_headers, take_inventory
from converter.models.model import suggest
from converter.models.names import is_other_runtime, parse_name
from converter.models.sets import ListedSet
from converter.storage import Given, Place

_FETCH = "Fetch the missing or damaged files again; --fix touches nothing while data are missing."
ADVICE = {
    "file-damaged": _FETCH,
    "shard-missing": _FETCH,
    "component-missing": _FETCH,
    "config-unreadable": "Fetch the file again.",
    "index-unreadable": "--fix makes a new one, where all shards are there.",
}
"""What can be done about a fault; those of other codes are no lack, but something else than weights."""


class Fault(NamedTuple):
    """One thing that is wrong with a file or folder: ``problem`` is said of ``path``."""

    code: str
    path: Place
    component: str
    problem: str


def look(given: Given) -> Inventory:
    """See what is in a folder. Raises BadRequest for what is no folder, BadFile for one that holds no weights.

    A folder that cannot be read is an error if it is a part of the model.
    """
    inventory = take_inventory(given)
    path = inventory.path
    if inventory.kind == "file":
        raise BadRequest(path, "is a file", "Name its folder; 'wconv inspect' shows a file.")
    for part in inventory.parts:
        if part.error and part.is_named:
            raise part.error
    parts = (part for part in inventory.parts if not part.error and _is_of_model(inventory, part))
    inventory = replace(inventory, parts=tuple(parts))
    if not any(part.has_weights for part in inventory.parts) and not inventory.absent and not inventory.index_error:
        refuse_folder(path)
        raise BadFile(path, "holds no weights", suggest(path))
    return read_headers(inventory)


def _is_of_model(inventory: Inventory, part: Part) -> bool:
    """Say whether a folder is to be judged: what holds weights, or is said to hold a model; a tokenizer is none."""
    if not part.name:
        return bool(part.sets) or not inventory.is_pipeline
    return part.has_weights or (part.entry is not None and "tokenizer_config.json" not in part.files)


def find_lost(inventory: Inventory) -> Iterator[Fault]:
    """Yield what must be fetched again, or made anew, before a model can be loaded."""
    yield from unreadable_configs(inventory)
    yield from missing_parts(inventory)
    for part in inventory.parts:
        yield from (fault for fault in unreadable_files(part) if fault.code in ADVICE)
        yield from missing_shards(part)
        yield from (fault for listed in part.sets if (fault := unreadable_index(part, listed)))


def unreadable_configs(inventory: Inventory) -> Iterator[Fault]:
    """Yield what is wrong with model_index.json and the config of each part."""
    errors = [(inventory.path / "model_index.json", inventory.index_error)]
    errors += [(part.path / "config.json", part.config_error) for part in inventory.parts]
    for path, error in errors:
        if error:
            yield Fault("config-unreadable", path, "", error.problem)


def missing_parts(inventory: Inventory) -> Iterator[Fault]:
    """Yield the parts of a pipeline that have no folder, or no weights."""
    for name in inventory.absent:
        yield Fault("component-missing", inventory.path / name, name, "is not there, and model_index.json names it")
    for part in inventory.parts if inventory.is_pipeline else ():
        elsewhere = any(map(is_other_runtime, part.files))
        if part.is_named and not (part.headers or part.sets or elsewhere) and part.component.config:
            yield Fault("component-missing", part.path, part.name, "has a config.json and no weights")


def unreadable_files(part: Part) -> Iterator[Fault]:
    """Yield the files of which no weights can be read: damaged ones, and valid ones of another kind."""
    for header in part.headers.values():
        if header.error is not None:
            code = _code_of(header.name, header.error)
            advice = f". {header.error.advice.rstrip('.')}" if code != "file-damaged" and header.error.advice else ""
            yield Fault(code, _place_of(part, header), part.name, header.error.problem + advice)


def _place_of(part: Part, header: Header) -> Place:
    """Give the file that is at fault: of a training checkpoint perhaps another than the one that is named, or all."""
    where = str(header.error.where) if header.error else ""
    inside = where.removeprefix(f"{part.path}/")
    is_of_many = any(listed.is_of_many and header.name in listed.file_names for listed in part.sets)
    return part.path / (inside if is_of_many and inside != where else header.name)


def _code_of(name: str, error: WconvError) -> str:
    """Tell a damaged file from a valid one of another kind; what loaders look for must be weights all the same."""
    parsed = parse_name(name)
    if isinstance(error, TrainingPiece):
        return "training-piece"
    if not isinstance(error, Unsupported):
        return "file-damaged"
    return "file-unread" if parsed and parsed.name.is_standard else "file-other"


def missing_shards(part: Part) -> Iterator[Fault]:
    """Yield the sets of which some files are there and others not."""
    whole = {listed.name for listed in part.sound_sets}
    for listed in (*part.sets, *(stray for stray in part.strays if stray.name not in whole)):
        if listed.file_names and listed.missing:
            count = f"{listed.missing_count:,} of {listed.missing_count + len(listed.file_names):,} shards"
            yield Fault("shard-missing", listed.path, part.name, f"lacks {count}, such as {listed.missing}")


def unreadable_index(part: Part, listed: ListedSet) -> Fault | None:
    """Say why the index of a set cannot be read, if that is so."""
    if not listed.index_error:
        return None
    return Fault("index-unreadable", listed.path, part.name, listed.index_error.problem)

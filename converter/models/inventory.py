"""What lies in a model's folder, by names, indexes and configs: never failing for what is inside.

A Diffusers pipeline has ``model_index.json`` and a folder a component; what has no folder lies at the root.
sentence-transformers has ``modules.json``, and the root is a part too; any other folder is a part by itself. A file or
an index stands for a folder with just that set. First bytes are looked at where a name says little; headers are read
for whoever asks (``read_headers``). What is wrong is kept with what it is wrong with, and in ``problems``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from converter.errors import BadFile, BadRequest, SystemRefused, Unreachable, WconvError
from converter.formats import form_of_many
from converter.models.companions import find_companions
from converter.models.component import Component, WeightSet
from converter.models.configs import NO_OBJECT, look_into
from converter.models.headers import Header, read_all
from converter.models.hub_cache import snapshot_of
from converter.models.names import is_training_state, name_of_other, parse_name
from converter.models.sets import (
    ListedSet,
    group,
    group_below,
    group_whole,
    is_weight_file,
    name_of_many,
    read_indexed,
    sets_to_read,
)
from converter.storage import Given, Place, is_bare, list_entries, place_of

Kind = Literal["file", "folder", "component", "transformers", "pipeline", "sentence-transformers"]

# Classes of a pipeline's parts that have no weights (``LOADABLE_CLASSES`` in ``diffusers/pipelines``).
_NO_MODEL = re.compile(r".*(Tokenizer|TokenizerFast|Scheduler|Processor|Extractor|Pil|Fast)")
# What downloaders call a file that they have not finished.
_PARTIAL = re.compile(r".*\.(incomplete|part|partial|crdownload|aria2|download|tmp)")


@dataclass(frozen=True, slots=True)
class Part:
    """A folder that may hold a component: its entries by name, the weight files among them, and how they go together.

    ``entry`` is what model_index.json says of a model, ``is_named`` whether it names the folder at all.
    ``others`` are entries that are no files: folders, and links to nothing. ``weights`` are the files whose headers are
    of interest, ``broken`` what has the name of one and is none, ``strays`` shards that go with no set. ``unreadable``
    says of which files the first bytes could not be looked at, and ``error`` why the folder cannot be listed.
    ``headers`` are there once they were read, of ``broken`` too.
    """

    component: Component
    entry: tuple[object, str] | None = None
    is_named: bool = True
    files: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    broken: Mapping[str, WconvError] = field(default_factory=dict)
    sets: tuple[ListedSet, ...] = ()
    strays: tuple[ListedSet, ...] = ()
    partial: tuple[str, ...] = ()
    unreadable: tuple[WconvError, ...] = ()
    config_error: WconvError | None = None
    error: WconvError | None = None
    headers: Mapping[str, Header] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.component.name

    @property
    def path(self) -> Place:
        return self.component.path

    @property
    def has_weights(self) -> bool:
        """Whether anything lies here that holds weights, or should."""
        return bool(self.weights or self.broken or self.sets or self.partial)

    @property
    def problems(self) -> Iterator[WconvError]:
        """What keeps the part from being opened: no file that is not there, which a conversion may not ask for."""
        yield from [self.error] if self.error else self.unreadable
        yield from (one.index_error for one in self.sets if one.index_error)
        yield from _unless_no_object(self.config_error)

    @property
    def is_flat(self) -> bool:
        """Whether it lies at the root of a pipeline, where Diffusers never asks for a variant."""
        return not self.name and "model_index.json" in self.files

    def is_sound(self, listed: ListedSet) -> bool:
        """Say whether all files of a set are there and can be read."""
        names = listed.file_names
        return bool(names) and not listed.missing and not any(self.headers[name].error for name in names)

    @property
    def sound_sets(self) -> list[ListedSet]:
        return [listed for listed in self.sets if self.is_sound(listed)]

    def headers_of(self, listed: ListedSet) -> list[Header]:
        return [self.headers[name] for name in listed.file_names]


@dataclass(frozen=True, slots=True)
class Inventory:
    """A folder of weights, or one set in it (``kind`` is then ``file`` and ``path`` what was named).

    ``parts`` are all folders in which there may be weights. ``absent`` are those that model_index.json names and that
    are not there, ``dotless`` the entries of the folders it names that have no dot in their names, and ``index_error``
    is what is wrong with it.
    """

    path: Place
    kind: Kind
    parts: tuple[Part, ...]
    class_name: str = ""
    absent: tuple[str, ...] = ()
    dotless: tuple[str, ...] = ()
    index_error: WconvError | None = None

    @property
    def problems(self) -> list[WconvError]:
        """What keeps a model from being opened, in order."""
        return [*_unless_no_object(self.index_error), *(problem for part in self.parts for problem in part.problems)]

    @property
    def is_pipeline(self) -> bool:
        return self.kind == "pipeline"

    @property
    def loaded_parts(self) -> list[Part]:
        """The parts that a loader loads."""
        return [part for part in self.parts if part.is_named or not self.is_pipeline]

    @property
    def variants(self) -> tuple[str | None, ...]:
        """All variants that any part has, the untagged one first."""
        tags = {one.name.variant for part in self.parts for one in part.sets if one.file_names}
        return tuple(sorted(tags, key=lambda tag: tag or ""))


def take_inventory(given: Given) -> Inventory:
    """See what is at a place: a weight file, an index, or a folder of any known kind.

    A model's name in the Hub's cache stands for its snapshot. Raises BadFile where nothing is.
    """
    place = place_of(given).pinned()
    place = place if place.store.is_far else snapshot_of(place)
    if not place.exists():
        raise BadFile(place, "is a link to nothing" if place.is_link() else "does not exist", "Check the path.")
    if place.is_folder():
        return _look_at_pipeline(place) if (place / "model_index.json").is_file() else _look_at_model(place)
    if not place.is_file():
        raise BadFile(place, "is no regular file", "Name a weight file or a folder.")
    config, error = look_into(place.parent / "config.json")
    component = Component("", place.parent, (find_weight_set(place),), config)
    if component.weight_sets[0].is_of_many and not config:
        component, error = _with_companions(component, place.parent, error)
    return Inventory(place, "file", (Part(component, config_error=error),))


def _with_companions(
    component: Component, around: Place, error: WconvError | None
) -> tuple[Component, WconvError | None]:
    """Give a training checkpoint's component the config and the tokenizer that lie near its folder, if any do."""
    companions, config = find_companions(around)
    component = replace(component, companions=companions)
    return (replace(component, config=config), None) if config else (component, error)


def _unless_no_object(error: WconvError | None) -> list[WconvError]:
    return [error] if error and error.problem != NO_OBJECT else []


def read_headers(inventory: Inventory) -> Inventory:
    """Read the headers of all weight files, those of damaged ones as far as that goes."""
    parts = []
    for part in inventory.parts:
        broken = {name: Header(name, 0, error=error) for name, error in part.broken.items()}
        parts.append(replace(part, headers=read_all(part.path, part.weights) | broken))
    return replace(inventory, parts=tuple(parts))


def _look_at_pipeline(place: Place) -> Inventory:
    content, error = look_into(place / "model_index.json")
    models = {name: entry for name, entry in content.items() if _is_model(name, entry)}
    absent = tuple(sorted(name for name in models if not _is_folder(place / name)))
    # Diffusers loads these from the root (``load_sub_model`` in ``diffusers/pipelines/pipeline_loading_utils.py``).
    parts = [_look_at(place, "", models[name], only_standard=True) for name in absent[:1]]
    is_flat = any(part.sets for part in parts)
    parts += [
        _look_at(folder, folder.name, models.get(folder.name), folder.name in content or error is not None)
        for folder in _model_folders(place, content)
    ]
    named = [
        (part.name, name) for part in parts if part.name in content for name in sorted((*part.files, *part.others))
    ]
    class_name = content.get("_class_name")
    return Inventory(
        place,
        "pipeline",
        tuple(parts),
        class_name if isinstance(class_name, str) else "",
        () if is_flat else absent,
        tuple(f"{part}/{name}" for part, name in named if "." not in name),
        error,
    )


def _look_at_model(place: Place) -> Inventory:
    root = _look_at(place, "")
    kind: Kind = "folder"
    if (place / "modules.json").is_file():
        kind = "sentence-transformers"
    elif root.component.config:
        kind = "component" if "_class_name" in root.component.config else "transformers"
    inner = _model_folders(place) if kind == "sentence-transformers" else []
    return Inventory(place, kind, (root, *(_look_at(folder, folder.name) for folder in inner)))


def _is_model(name: str, entry: Any) -> bool:
    """Say whether an entry of a model_index.json is of a part that has weights."""
    # Of a custom pipeline, ``_class_name`` is a module and a class too.
    if name.startswith("_") or not is_class(entry):
        return False
    return is_bare(name) and not _NO_MODEL.fullmatch(entry[1])


def is_class(entry: Any) -> bool:
    """Say whether an entry of a model_index.json names a class, after its library."""
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)


def _model_folders(place: Place, named: Collection[str] = ()) -> list[Place]:
    """List the folders in a model's folder that may be parts of it: a trainer's checkpoint, unless named, is none."""
    return [folder for folder in subfolders(place) if folder.name in named or not _is_checkpoint(folder)]


def _is_checkpoint(place: Place) -> bool:
    return any(is_training_state(entry.name) for entry in list_entries(place))


def subfolders(place: Place) -> list[Place]:
    """List the folders that lie directly in a folder, hidden ones left out."""
    return [entry for entry in place.entries() if not entry.name.startswith(".") and _is_folder(entry)]


def _is_folder(place: Place) -> bool:
    try:
        return place.is_folder()
    except Unreachable:
        raise
    except SystemRefused:
        return False


# One folder.


def _look_at(folder: Place, name: str, entry: Any = None, is_named: bool = True, only_standard: bool = False) -> Part:
    """See what is in a folder; ``entry`` is what model_index.json says of it.

    With ``only_standard`` only what has a name that loaders look for counts as weights.
    """
    config, config_error = look_into(folder / "config.json")
    component = Component(name, folder, (), config)
    try:
        seen = {place.name: _see(place) for place in folder.entries()}
    except Unreachable:
        raise
    except SystemRefused as refused:
        return Part(component, entry, is_named, error=refused)
    shown = [name for name in seen if not name.startswith(".")]
    known = {name: one for name in seen if (one := parse_name(name)) and (one.name.is_standard or not only_standard)}
    whole, unread = group_whole(folder, () if only_standard else seen)
    taken = {name for one in whole for name in one.all_names}
    parsed = {name: one for name, one in known.items() if seen[name][0] == "weights" and name not in taken}
    listed, strays = group(folder, parsed)
    # No loader looks for what is hidden, and macOS leaves such a name beside any file; it is read where that can be.
    hidden = tuple(one for one in listed if one.label.startswith(".") and not one.index_error)
    sets = (*(one for one in listed if not one.label.startswith(".")), *whole)
    if not only_standard:
        sets = _prefer_those_below(folder, sets, [name for name in shown if seen[name][0] == "other"])
    if not config and any(one.is_of_many for one in sets):
        around = next(one.path for one in sets if one.is_of_many).parent
        component, config_error = _with_companions(component, around, config_error)
    own = [name for name, one in parsed.items() if one.role != "index" and not name.startswith(".")]
    broken = {name: error for name in shown if name in known and (error := seen[name][1]) and name not in parsed}
    return Part(
        replace(component, weight_sets=sets_to_read((*sets, *hidden))),
        entry,
        is_named,
        files=tuple(name for name in shown if seen[name][0] in ("weights", "file")),
        others=tuple(name for name in shown if seen[name][0] in ("broken", "other")),
        weights=tuple(dict.fromkeys((*own, *(name for one in sets for name in one.file_names)))),
        broken={**broken, **unread},
        sets=sets,
        strays=strays,
        partial=tuple(name for name in shown if _PARTIAL.fullmatch(name)),
        unreadable=tuple(error for what, error in seen.values() if error and what != "broken"),
        config_error=config_error,
    )


def _prefer_those_below(folder: Place, sets: tuple[ListedSet, ...], others: list[str]) -> tuple[ListedSet, ...]:
    """Give the training checkpoints of folders below where they are all that is there, or more than is made of them."""
    if not sets:
        return group_below(folder, others)
    # What torch consolidates of the pieces in ``sharded/`` has 0 in place of every tensor without axes.
    found = group_below(folder, [name for name in others if name == "sharded"])
    return tuple(one for one in found if one.name.ext == "DCP in safetensors") or sets


def _see(place: Place) -> tuple[Literal["weights", "file", "broken", "other"], WconvError | None]:
    """Say what an entry is, and what is wrong with one that has the name of weights."""
    is_named = parse_name(place.name) is not None
    try:
        if place.is_file():
            return "weights" if is_named and is_weight_file(place) else "file", None
        if is_named and place.is_link():
            return "broken", BadFile(place, "is a link to nothing", "Fetch the file again.")
        return "other", None
    except Unreachable:
        raise
    except WconvError as error:  # for its reader to tell of
        return ("weights", error) if is_named else ("other", None)


# One set.


def find_weight_sets(folder: Given) -> tuple[WeightSet, ...]:
    """List the weight sets that lie directly in a folder, sorted by name.

    Raises BadFile for an index that cannot be read.
    """
    part = _look_at(place_of(folder), "")
    for problem in replace(part, config_error=None).problems:
        raise problem
    return part.component.weight_sets


def find_weight_set(path: Given) -> WeightSet:
    """Give the set that a file belongs to: itself, or all shards where it is an index or a shard."""
    place = place_of(path)
    parsed = parse_name(place.name)
    if parsed and parsed.role == "index":
        listed = read_indexed(place.parent, place.name, {place.name: parsed})
        if listed.index_error:
            raise listed.index_error
        return sets_to_read([listed])[0]
    form = form_of_many(place.name)
    if (parsed and parsed.role == "shard") or form:
        sets = [one for one in find_weight_sets(place.parent) if place.name in one.all_names]
        if len(sets) > 1:
            raise BadRequest(place, "is a shard of several sets", "Name the index of the one you mean.")
        if sets:
            return sets[0]
    name = name_of_many(form) if form else parsed.name if parsed else name_of_other(place.name)
    return WeightSet(place.parent, name, (place.name,))

"""What lies in a model's folder, by names, indexes and configs: never failing for what is inside.

A Diffusers pipeline has ``model_index.json`` and a folder a component; what has no folder lies at the root.
sentence-transformers has ``modules.json``, and the root is a part too; any other folder is a part by itself. A file or
an index stands for a folder with just that set. First bytes are looked at where a name says little; headers are read
for whoever asks (``read_headers``). What is wrong is kept with what it is wrong with, and in ``problems``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

from converter.errors import BadFile, BadRequest, SystemRefused, WconvError
from converter.formats import could_be_weights
from converter.formats.training import find_dcp
from converter.models.component import Component, WeightSet
from converter.models.configs import NO_OBJECT, look_into
from converter.models.headers import Header, read_all
from converter.models.names import ParsedName, WeightsName, is_other_runtime, is_training_state, parse_name
from converter.models.paths import snapshot_of
from converter.models.sets import ListedSet, group, read_indexed, sets_to_read
from converter.storage import Place, place_of

Kind = Literal["file", "folder", "component", "transformers", "pipeline", "sentence-transformers"]

# Classes of a pipeline's parts that have no weights (``LOADABLE_CLASSES`` in ``diffusers/pipelines``).
_NO_MODEL = re.compile(r".*(Tokenizer|TokenizerFast|Scheduler|Processor|Extractor|Pil|Fast)")
# What downloaders call a file that they have not finished.
_PARTIAL = re.compile(r".*\.(incomplete|part|partial|crdownload|aria2|download|tmp)")
_STANDARD_NAMES = frozenset(
    {
        ("diffusion_pytorch_model", "bin"),
        ("diffusion_pytorch_model", "safetensors"),
        ("pytorch_model", "bin"),
        ("model", "safetensors"),
        ("adapter_model", "bin"),
        ("adapter_model", "safetensors"),
    }
)


@dataclass(frozen=True, slots=True)
class Part:
    """A folder that may hold a component: its entries by name, the weight files among them, and how they go together.

    ``others`` are entries that are no files: folders, and links to nothing. ``weights`` are the files whose headers are
    of interest, ``broken`` what has the name of one and is none, ``strays`` shards that go with no set. ``library`` is
    the loader's, "diffusers" or "transformers". ``unreadable`` says of which files the first bytes could not be looked
    at, and ``error`` why the folder cannot be listed. ``headers`` are there once they were read, of ``broken`` too.
    """

    component: Component
    library: str = "transformers"
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
    def is_flat(self) -> bool:
        """Whether it lies at the root of a pipeline, where Diffusers never asks for a variant."""
        return not self.name and "model_index.json" in self.files

    def is_sound(self, listed: ListedSet) -> bool:
        """Say whether all files of a set are there and can be read."""
        names = listed.file_names
        return bool(names) and not listed.missing and not any(self.headers[name].error for name in names)

    def headers_of(self, listed: ListedSet) -> list[Header]:
        return [self.headers[name] for name in listed.file_names]


@dataclass(frozen=True, slots=True)
class Inventory:
    """A folder of weights, or one set in it (``kind`` is then ``file`` and ``path`` what was named).

    ``absent`` are parts that model_index.json names and that are not there, ``dotless`` the entries of the folders it
    names that have no dot in their names. ``problems`` are what keeps a model from being opened, in order;
    ``index_error`` is what is wrong with model_index.json.
    """

    path: Place
    root: Place
    kind: Kind
    parts: tuple[Part, ...]
    class_name: str = ""
    absent: tuple[str, ...] = ()
    dotless: tuple[str, ...] = ()
    problems: tuple[WconvError, ...] = ()
    index_error: WconvError | None = None

    @property
    def is_pipeline(self) -> bool:
        return self.kind == "pipeline"

    @property
    def variants(self) -> tuple[str | None, ...]:
        """All variants that any part has, the untagged one first."""
        tags = {one.name.variant for part in self.parts for one in part.sets if one.file_names}
        return tuple(sorted(tags, key=lambda tag: tag or ""))


def take_inventory(given: Place | Path | str) -> Inventory:
    """See what is at a place: a weight file, an index, or a folder of any known kind.

    A model's name in the Hub's cache stands for its snapshot. Raises BadFile where nothing is.
    """
    place = _snapshot_of(place_of(given))
    if not place.exists():
        raise BadFile(place, "is a link to nothing" if place.is_link() else "does not exist", "Check the path.")
    if place.is_folder():
        return _look_at_pipeline(place) if (place / "model_index.json").is_file() else _look_at_model(place)
    if not place.is_file():
        raise BadFile(place, "is no regular file", "Name a weight file or a folder.")
    config, error = look_into(place.parent / "config.json")
    part = Part(Component("", place.parent, (find_weight_set(place),), config), config_error=error)
    return Inventory(place, place.parent, "file", (part,), problems=tuple(_problems_of(part)))


def _snapshot_of(place: Place) -> Place:
    spelled = Path(str(place))
    snapshot = snapshot_of(spelled)
    return place if snapshot == spelled else place_of(snapshot)


def read_headers(inventory: Inventory) -> Inventory:
    """Read the headers of all weight files, those of damaged ones as far as that goes."""
    parts = tuple(replace(part, headers=_headers_of(part)) for part in inventory.parts)
    return replace(inventory, parts=parts)


def _headers_of(part: Part) -> dict[str, Header]:
    broken = {name: Header(name, 0, error=error) for name, error in part.broken.items()}
    return read_all(part.path, part.weights) | broken


def _look_at_pipeline(place: Place) -> Inventory:
    content, error = look_into(place / "model_index.json")
    named = {name: entry for name, entry in content.items() if is_model(name, entry)}
    absent = tuple(sorted(name for name in named if not _is_folder(place / name)))
    # Diffusers loads these from the root (``load_sub_model`` in ``diffusers/pipelines/pipeline_loading_utils.py``).
    parts = [_standard_part(_look_at(place, "", named[name])) for name in absent[:1]]
    is_flat = any(part.sets for part in parts)
    parts += [
        _look_at(folder, folder.name, named.get(folder.name), folder.name in content or error is not None)
        for folder in _model_folders(place, content)
    ]
    class_name = content.get("_class_name")
    dotless = [f"{part.name}/{name}" for part in parts if part.name in content for name in _dotless_in(part)]
    first = [error] if error and error.problem != NO_OBJECT else []
    return Inventory(
        place,
        place,
        "pipeline",
        tuple(part for part in parts if part.error or _is_model_part(part, named)),
        class_name if isinstance(class_name, str) else "",
        () if is_flat else absent,
        tuple(dotless),
        (*first, *(problem for part in parts for problem in _problems_of(part))),
        error,
    )


def _is_model_part(part: Part, named: Collection[str]) -> bool:
    if not part.name:
        return bool(part.sets)
    return part.has_weights or (part.name in named and "tokenizer_config.json" not in part.files)


def _dotless_in(part: Part) -> list[str]:
    return sorted(name for name in (*part.files, *part.others) if "." not in name)


def _look_at_model(place: Place) -> Inventory:
    root = _look_at(place, "")
    kind: Kind = "folder"
    if (place / "modules.json").is_file():
        kind = "sentence-transformers"
    elif root.component.config:
        kind = "component" if root.component.is_diffusers else "transformers"
    inner = _model_folders(place) if kind == "sentence-transformers" else []
    parts = [root, *(_look_at(folder, folder.name) for folder in inner)]
    problems = tuple(problem for part in parts for problem in _problems_of(part))
    kept = tuple(part for part in parts if part is root or part.weights or part.broken or part.error)
    return Inventory(place, place, kind, kept, problems=problems)


def is_model(name: str, entry: object) -> bool:
    """Say whether an entry of a model_index.json is of a part that has weights."""
    # Of a custom pipeline, ``_class_name`` is a module and a class too.
    if name.startswith("_") or not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
        return False
    return PureWindowsPath(name).name == name and not _NO_MODEL.fullmatch(entry[1])


def _model_folders(place: Place, named: Collection[str] = ()) -> list[Place]:
    """List the folders in a model's folder that may be parts of it: a trainer's checkpoint, unless named, is none."""
    return [folder for folder in subfolders(place) if folder.name in named or not _is_checkpoint(folder)]


def _is_checkpoint(place: Place) -> bool:
    try:
        return any(is_training_state(entry.name) for entry in place.entries())
    except SystemRefused:
        return False  # to be read later, and then found to be unreadable


def subfolders(place: Place) -> list[Place]:
    """List the folders that lie directly in a folder, hidden ones left out."""
    return [entry for entry in place.entries() if not entry.name.startswith(".") and _is_folder(entry)]


def _is_folder(place: Place) -> bool:
    try:
        return place.is_folder()
    except SystemRefused:
        return False


# One folder.


@dataclass(slots=True)
class _Entries:
    """What lies directly in a folder, by name; hidden entries are but in ``parsed``, the weight files and indexes."""

    files: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    partial: list[str] = field(default_factory=list)
    parsed: dict[str, ParsedName] = field(default_factory=dict)
    broken: dict[str, WconvError] = field(default_factory=dict)
    unreadable: list[WconvError] = field(default_factory=list)

    def add(self, place: Place) -> None:
        name, is_hidden = place.name, place.name.startswith(".")
        parsed = parse_name(name)
        is_file = self._unless_refused(place.is_file, False, parsed is not None)
        if not is_hidden:
            (self.files if is_file else self.others).append(name)
        # What cannot be looked into is for its reader to tell of.
        if parsed and is_file and self._unless_refused(lambda: is_weight_file(place), True, True):
            self.parsed[name] = parsed
        elif parsed and not is_file and not is_hidden and place.is_link():
            self.broken[name] = BadFile(place, "is a link to nothing", "Fetch the file again.")
        elif _PARTIAL.fullmatch(name) and not is_hidden:
            self.partial.append(name)

    def _unless_refused(self, look: Callable[[], bool], otherwise: bool, is_asked: bool) -> bool:
        try:
            return look()
        except SystemRefused as error:
            self.unreadable += [error] if is_asked else []
            return otherwise


def is_weight_file(place: Place) -> bool:
    """Say whether a file is one of a weight set, by its name and, where that says little, by its first bytes."""
    parsed = parse_name(place.name)
    if not parsed or is_training_state(place.name) or is_other_runtime(place.name):
        return False
    standard = (parsed.name.stem, parsed.name.ext) in _STANDARD_NAMES
    return standard or parsed.role == "index" or could_be_weights(place)


def _list(folder: Place) -> _Entries:
    entries = _Entries()
    for place in folder.entries():
        entries.add(place)
    return entries


def _look_at(folder: Place, name: str, entry: Any = None, is_named: bool = True) -> Part:
    """See what is in a folder; ``entry`` is what model_index.json says of it."""
    config, config_error = look_into(folder / "config.json")
    component = Component(name, folder, (), config)
    try:
        entries = _list(folder)
    except SystemRefused as error:
        return Part(component, is_named=is_named, error=error)
    sets, strays = group(folder, entries.parsed)
    piece = find_dcp(folder)
    named = [name for name, parsed in entries.parsed.items() if parsed.role != "index"]
    return Part(
        replace(component, weight_sets=sets_to_read(sets)),
        _library_of(component, entry, sets),
        is_named,
        tuple(entries.files),
        tuple(entries.others),
        tuple(dict.fromkeys((*named, *(name for one in sets for name in one.file_names)))),
        entries.broken | ({".metadata": piece} if piece else {}),
        sets,
        strays,
        tuple(entries.partial),
        tuple(entries.unreadable),
        config_error,
    )


def _library_of(component: Component, entry: Any, sets: tuple[ListedSet, ...]) -> str:
    if component.config:
        return "diffusers" if component.is_diffusers else "transformers"
    if entry and entry[0] in ("diffusers", "transformers"):
        return str(entry[0])
    return "diffusers" if any(one.name.stem == "diffusion_pytorch_model" for one in sets) else "transformers"


def _problems_of(part: Part) -> Iterator[WconvError]:
    """Yield what keeps a part from being opened: no set that lacks a file, which a conversion may not ask for."""
    yield from [part.error] if part.error else part.unreadable
    yield from (one.index_error for one in part.sets if one.index_error)
    if part.config_error and part.config_error.problem != NO_OBJECT:
        yield part.config_error


def _standard_part(part: Part) -> Part:
    """Give what lies at the root of a flat pipeline under names that loaders look for."""

    def is_standard(name: str) -> bool:
        parsed = parse_name(name)
        return parsed is not None and parsed.name.is_standard

    own = tuple(one for one in part.component.weight_sets if one.name.is_standard)
    return replace(
        part,
        component=replace(part.component, weight_sets=own),
        weights=tuple(filter(is_standard, part.weights)),
        broken={name: error for name, error in part.broken.items() if is_standard(name)},
        sets=tuple(one for one in part.sets if one.name.is_standard),
        strays=tuple(one for one in part.strays if one.name.is_standard),
    )


# One set.


def find_weight_sets(folder: Place | Path | str) -> tuple[WeightSet, ...]:
    """List the weight sets that lie directly in a folder, sorted by name.

    Raises BadFile for an index that cannot be read.
    """
    place = place_of(folder)
    entries = _list(place)
    listed, _ = group(place, entries.parsed)
    for error in (*entries.unreadable, *(one.index_error for one in listed if one.index_error)):
        raise error
    return sets_to_read(listed)


def find_weight_set(path: Place | Path | str) -> WeightSet:
    """Give the set that a file belongs to: itself, or all shards where it is an index or a shard."""
    place = place_of(path)
    parsed = parse_name(place.name)
    if parsed and parsed.role == "index":
        listed = read_indexed(place.parent, place.name, {place.name: parsed})
        if listed.index_error:
            raise listed.index_error
        return sets_to_read([listed])[0]
    if parsed and parsed.role == "shard":
        sets = [one for one in find_weight_sets(place.parent) if place.name in one.file_names]
        if len(sets) > 1:
            raise BadRequest(place, "is a shard of several sets", "Name the index of the one you mean.")
        if sets:
            return sets[0]
    name = parsed.name if parsed else WeightsName(place.name, None, "")
    return WeightSet(place.parent, name, (place.name,))

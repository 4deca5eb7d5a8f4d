"""What lies in a folder, seen without ever failing: what ``open_folder`` refuses is what the doctor has to tell of.

Only names, indexes and headers are read; of a header just what the checks ask for is kept, so that a folder of
thousands of files stays small in memory.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from converter.dtypes import DType
from converter.errors import BadFile, BadRequest, HostileFile, WconvError
from converter.formats import read_file
from converter.formats.texts import read_config
from converter.formats.torch.state_dict import Reading
from converter.formats.training import find_dcp, refuse_folder
from converter.models.checkpoint import WeightSet, is_weight_file
from converter.models.folder import Component, absent_models, is_model, model_folders
from converter.models.hub_cache import snapshot_of
from converter.models.index import WeightIndex, read_index
from converter.models.names import ParsedName, WeightsName, parse_name
from converter.storage import place_of
from converter.tensors.base import MAX_TENSORS

LENIENT = Reading(strip_code=True, lenient=True)
_MAX_TENSORS = 2 * MAX_TENSORS  # of all sets in one folder: names and dtypes of all are held at once
# What downloaders call a file that they have not finished.
_PARTIAL = re.compile(r".*\.(incomplete|part|partial|crdownload|aria2|download|tmp)")


@dataclass(frozen=True, slots=True)
class FileView:
    """What a weight file's header says, or why it cannot be read. ``nbytes`` is the file's size."""

    name: str
    nbytes: int
    format: str = ""
    names: tuple[str, ...] = ()
    dtypes: tuple[DType, ...] = ()
    dims: tuple[int, ...] = ()
    tensor_nbytes: int = 0
    storage_nbytes: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)
    foreign: Mapping[str, str] = field(default_factory=dict)
    error: WconvError | None = None


@dataclass(frozen=True, slots=True)
class SetView:
    """Files that belong together by an index, by their numbers, or as a single file; not all of them need be there.

    ``missing`` is the first of ``missing_count`` that are not. ``index`` is None where there is none, or it cannot be
    read (``index_error`` then says why).
    """

    folder: Path
    name: WeightsName
    files: tuple[str, ...]
    missing: str = ""
    missing_count: int = 0
    index_name: str | None = None
    index: WeightIndex | None = None
    index_error: WconvError | None = None
    is_legacy: bool = False

    @property
    def all_names(self) -> tuple[str, ...]:
        return (*self.files, self.index_name) if self.index_name else self.files

    @property
    def own_files(self) -> tuple[str, ...]:
        """The files but those whose names say that they are of another variant or form."""
        mine = (None, (self.name.variant, self.name.ext))
        parsed = ((name, parse_name(name)) for name in self.files)
        return tuple(name for name, one in parsed if (one and (one.name.variant, one.name.ext)) in mine)

    @property
    def label(self) -> str:
        """The name to call the set by: its index, or its first file."""
        return self.index_name or self.files[0]

    @property
    def is_sharded(self) -> bool:
        parsed = parse_name(self.files[0]) if self.files else None
        return self.index_name is not None or (parsed is not None and parsed.role == "shard")

    @property
    def weight_set(self) -> WeightSet:
        """The set to be opened by its files alone, whatever an index says."""
        return WeightSet(self.folder, self.name, self.files)


@dataclass(frozen=True, slots=True)
class ComponentView:
    """A folder of weights: all of its entries by name, what the weight files among them say, and how they go together.

    ``others`` are entries that are no files: folders, and links to nothing. ``strays`` are shards that go with no set.
    ``library`` is the loader's, "diffusers" or "transformers".
    """

    component: Component
    library: str
    is_named: bool
    files: tuple[str, ...]
    others: tuple[str, ...]
    weights: Mapping[str, FileView]
    sets: tuple[SetView, ...]
    strays: tuple[SetView, ...]
    partial: tuple[str, ...]
    config_error: str = ""

    @property
    def name(self) -> str:
        return self.component.name

    @property
    def path(self) -> Path:
        return self.component.path

    @property
    def is_flat(self) -> bool:
        """Whether it lies at the root of a pipeline, where Diffusers never asks for a variant."""
        return not self.name and "model_index.json" in self.files

    def is_sound(self, found: SetView) -> bool:
        """Say whether all files of a set are there and can be read."""
        return bool(found.files) and not found.missing and not any(self.weights[name].error for name in found.files)

    def views_of(self, found: SetView) -> list[FileView]:
        return [self.weights[name] for name in found.files]


@dataclass(frozen=True, slots=True)
class FolderView:
    """A folder as the doctor sees it.

    ``absent`` are parts that model_index.json names and that are not there, ``dotless`` the entries of the folders it
    names that have no dot in their names.
    """

    path: Path
    is_pipeline: bool
    class_name: str
    components: tuple[ComponentView, ...]
    absent: tuple[str, ...] = ()
    dotless: tuple[str, ...] = ()
    config_errors: tuple[tuple[Path, str], ...] = ()

    @property
    def variants(self) -> tuple[str | None, ...]:
        """All variants that any part has, the untagged one first."""
        tags = {found.name.variant for part in self.components for found in part.sets if found.files}
        return tuple(sorted(tags, key=lambda tag: tag or ""))


def look(path: Path) -> FolderView:
    """See what is in a folder. Raises BadRequest for what is no folder, BadFile for one that holds no weights.

    A model's name in the Hub's cache stands for its snapshot.
    """
    path = snapshot_of(path)
    if not path.exists():
        raise BadFile(path, "is a link to nothing" if path.is_symlink() else "does not exist", "Check the path.")
    if not path.is_dir():
        problem = "is a file" if path.is_file() else "is no folder"
        raise BadRequest(path, problem, "Name its folder; 'wconv inspect' shows a file.")
    model_index, error = read_json(path / "model_index.json")
    errors: tuple[tuple[Path, str], ...] = ((path / "model_index.json", error),) if error else ()
    if not (path / "model_index.json").is_file():
        parts = [_look_at(path, "", None)]
        if (path / "modules.json").is_file():
            parts += [part for folder in model_folders(path) if (part := _look_at(folder, folder.name, None)).weights]
        absent: tuple[str, ...] = ()
    else:
        named = {name: entry for name, entry in model_index.items() if is_model(name, entry)}
        absent = tuple(absent_models(path, named))
        parts = [part for name in absent[:1] if (part := _look_at_root(path, named[name])).sets]
        absent = () if parts else absent
        for folder in model_folders(path, model_index):
            is_named = folder.name in model_index or bool(errors)
            try:
                part = _look_at(folder, folder.name, named.get(folder.name), is_named)
            except OSError:
                if is_named:
                    raise
                continue  # not to be looked into, and no part of the model
            has_model = folder.name in named and "tokenizer_config.json" not in part.files
            if part.weights or part.sets or part.partial or has_model:
                parts.append(part)
    if not any(part.weights or part.sets or part.partial for part in parts) and not absent and not errors:
        refuse_folder(place_of(path))
        raise BadFile(path, "holds no weights", "Name a folder that does.")
    errors += tuple((part.path / "config.json", part.config_error) for part in parts if part.config_error)
    class_name = model_index.get("_class_name")
    return FolderView(
        path,
        (path / "model_index.json").is_file(),
        class_name if isinstance(class_name, str) else "",
        tuple(parts),
        absent,
        tuple(_find_dotless(path, model_index)),
        errors,
    )


def _find_dotless(path: Path, model_index: Mapping[str, Any]) -> Iterator[str]:
    for folder in _subfolders(path):
        if folder.name in model_index:
            yield from sorted(f"{folder.name}/{entry.name}" for entry in folder.iterdir() if "." not in entry.name)


def _subfolders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def read_json(path: Path) -> tuple[dict[str, Any], str]:
    """Read a JSON object; give an empty one, and what is wrong, where that fails."""
    if not path.is_file():
        return {}, ""
    try:
        content = read_config(place_of(path))
    except HostileFile as error:
        return {}, error.problem
    except (ValueError, OSError) as error:
        return {}, str(error)
    return (content, "") if isinstance(content, dict) else ({}, "it is no JSON object")


def _look_at_root(path: Path, entry: Any) -> ComponentView:
    """See what lies at the root of a flat pipeline under names that loaders look for."""
    part = _look_at(path, "", entry)
    sets, strays = (tuple(one for one in found if one.name.is_standard) for found in (part.sets, part.strays))
    parsed = ((name, parse_name(name)) for name in part.weights)
    weights = {name: part.weights[name] for name, one in parsed if one and one.name.is_standard}
    return replace(part, sets=sets, strays=strays, weights=weights)


def _look_at(path: Path, name: str, entry: Any, is_named: bool = True) -> ComponentView:
    config, config_error = read_json(path / "config.json")
    component = Component(name, path, (), config)
    files: list[str] = []
    others: list[str] = []
    partial: list[str] = []
    parsed: dict[str, ParsedName] = {}
    broken: dict[str, FileView] = {}
    with os.scandir(path) as entries:
        kinds = sorted(
            (item.name, _is_file(path / item.name), item.is_symlink()) for item in entries if item.name[:1] != "."
        )
    for entry_name, is_file, is_link in kinds:
        (files if is_file else others).append(entry_name)
        found = parse_name(entry_name)
        if found and is_file and _is_weights(path / entry_name):
            parsed[entry_name] = found
        elif found and is_link and not is_file:
            error = BadFile(path / entry_name, "is a link to nothing", "Fetch the file again.")
            broken[entry_name] = FileView(entry_name, 0, error=error)
        elif _PARTIAL.fullmatch(entry_name):
            partial.append(entry_name)
    sets, strays = _group(path, parsed)  # before the headers are read: an index of many tensors takes room for a while
    named = [item for item, found in parsed.items() if found.role != "index"]
    weights = _read_all(path, dict.fromkeys((*named, *(n for one in sets for n in one.files))))
    weights.update(broken)
    piece = find_dcp(place_of(path))
    if piece:
        weights[".metadata"] = FileView(".metadata", 0, error=piece)
    library = _library_of(component, entry, sets)
    return ComponentView(
        component, library, is_named, tuple(files), tuple(others), weights, sets, strays, tuple(partial), config_error
    )


def _is_weights(path: Path) -> bool:
    try:
        return is_weight_file(path)
    except OSError:
        return True  # to be read later, and then found to be unreadable


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _library_of(component: Component, entry: Any, sets: tuple[SetView, ...]) -> str:
    if component.config:
        return "diffusers" if component.is_diffusers else "transformers"
    if entry and entry[0] in ("diffusers", "transformers"):
        return str(entry[0])
    return "diffusers" if any(found.name.stem == "diffusion_pytorch_model" for found in sets) else "transformers"


def _read_all(folder: Path, names: Iterable[str]) -> dict[str, FileView]:
    found: dict[str, FileView] = {}
    room = _MAX_TENSORS
    for name in names:
        view = _read(folder / name)
        room -= len(view.names)
        if room < 0:
            problem = f"is one of several that describe more than {_MAX_TENSORS:,} tensors together"
            view = FileView(name, view.nbytes, error=HostileFile(folder / name, problem))
        found[name] = view
    return found


def _read(path: Path) -> FileView:
    nbytes = path.stat().st_size if path.exists() else 0
    try:
        file = read_file(place_of(path), LENIENT)
    except WconvError as error:
        return FileView(path.name, nbytes, error=error)
    except OSError as error:
        return FileView(path.name, nbytes, error=BadFile(path, f"cannot be read ({error.strerror})"))
    storages = {storage for info in file.tensors for storage in info.source.inputs()}
    return FileView(
        path.name,
        nbytes,
        file.format,
        tuple(sys.intern(info.name) for info in file.tensors),
        tuple(info.dtype for info in file.tensors),
        tuple(len(info.shape) for info in file.tensors),
        sum(info.nbytes for info in file.tensors),
        sum(storage.nbytes for storage in storages),
        file.metadata,
        file.foreign,
    )


def _group(folder: Path, parsed: Mapping[str, ParsedName]) -> tuple[tuple[SetView, ...], tuple[SetView, ...]]:
    """Put files together to sets, and to groups of shards that no set has."""
    sets = [_indexed(folder, name, found, parsed) for name, found in parsed.items() if found.role == "index"]
    taken = {name for found in sets for name in found.own_files}
    indexed = {found.name for found in sets if found.files and found.index}
    shards: dict[tuple[WeightsName, int, bool], dict[int, str]] = defaultdict(dict)
    for name, found in parsed.items():
        if found.role == "single" and name not in taken:
            sets.append(SetView(folder, found.name, (name,)))
        elif found.role == "shard" and name not in taken:
            shards[found.name, found.count, found.is_legacy][found.number] = name
    strays: list[SetView] = []
    for (weights_name, count, is_legacy), members in shards.items():
        spell = next(iter(members.values())) if is_legacy else ""
        gap = next((number for number in range(1, count + 1) if number not in members), None)
        missing = "" if gap is None else _like(spell, gap) if is_legacy else weights_name.shard(gap, count)
        missing_count = count - sum(1 <= number <= count for number in members)
        files = tuple(members[number] for number in sorted(members))
        group = SetView(folder, weights_name, files, missing, missing_count, is_legacy=is_legacy)
        (strays if weights_name in indexed else sets).append(group)
    # An index that cannot be read, or names nothing that is there, goes with the shards that have its name.
    alone: dict[WeightsName, list[SetView]] = defaultdict(list)
    for one in sets:
        if not one.index_name and len(one.files) > 1:
            alone[one.name].append(one)
    joined: list[SetView] = []
    for one in sets:
        if one.index_name and one.index is None and alone[one.name]:
            rest = alone[one.name].pop(0)
            is_legacy = one.is_legacy or rest.is_legacy
            joined.append(replace(one, files=rest.files, missing=rest.missing,
                                  missing_count=rest.missing_count, is_legacy=is_legacy))  # fmt: skip
        elif one.index_name or len(one.files) < 2:
            joined.append(one)
    joined += itertools.chain.from_iterable(alone.values())
    return tuple(sorted(joined, key=lambda found: found.label)), tuple(strays)


def _like(shard: str, number: int) -> str:
    return re.sub(r"-\d{5,}-of-", f"-{number:05d}-of-", shard)


def _indexed(folder: Path, index_name: str, parsed: ParsedName, others: Mapping[str, ParsedName]) -> SetView:
    try:
        index = read_index(folder / index_name)
    except (WconvError, OSError) as error:
        wrong = error if isinstance(error, WconvError) else BadFile(folder / index_name, "cannot be read")
        return SetView(folder, parsed.name, (), index_name=index_name, index_error=wrong, is_legacy=parsed.is_legacy)
    # A name is held once, however often it is listed: of thousands of shards there are hundreds of thousands.
    index = replace(index, weight_map={sys.intern(n): sys.intern(shard) for n, shard in index.weight_map.items()})
    shards = sorted(set(index.weight_map.values()))
    is_there = {shard: shard in others or _is_file(folder / shard) for shard in shards}
    there = tuple(shard for shard in shards if is_there[shard])
    missing = [shard for shard in shards if not is_there[shard]]
    is_legacy = parsed.is_legacy or any(name in others and others[name].is_legacy for name in there)
    first = missing[0] if missing else ""
    return SetView(folder, parsed.name, there, first, len(missing), index_name, index, is_legacy=is_legacy)

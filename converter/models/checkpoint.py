"""One weight set, that is a file, or shards with or without an index, opened as one state dict on disk.

``find_weight_sets`` goes by names (and by first bytes where a name says little), ``open_checkpoint`` reads the headers
and holds index and shards against each other. No tensor is read.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from converter.errors import BadFile, BadRequest, HostileFile
from converter.formats import could_be_weights, read_file
from converter.formats.torch.state_dict import PLAIN, Reading
from converter.models.index import WeightIndex, read_index
from converter.models.names import ParsedName, WeightsName, is_other_runtime, is_training_state, parse_name
from converter.storage import place_of
from converter.storage.local import as_path
from converter.tensors.base import MAX_TENSORS, Tensor, WeightsFile

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
class WeightSet:
    """The files of one set in a folder, not yet opened. Sharded sets have an ``index_name`` or their numbers."""

    folder: Path
    name: WeightsName
    file_names: tuple[str, ...]
    index_name: str | None = None
    is_legacy: bool = False

    @property
    def all_names(self) -> tuple[str, ...]:
        """The set's weight files and its index: all that goes when the set goes."""
        return (*self.file_names, self.index_name) if self.index_name else self.file_names

    @property
    def path(self) -> Path:
        """What one would name to mean this set: its index, or its first file."""
        return self.folder / (self.index_name or self.file_names[0])


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A state dict on disk: the set it was opened from and what its headers say. ``notes`` are worth a user's look."""

    weight_set: WeightSet
    files: tuple[WeightsFile, ...]
    index_metadata: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> WeightsName:
        return self.weight_set.name

    @property
    def format(self) -> str:
        return self.files[0].format

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in file order."""
        return tuple(itertools.chain.from_iterable(file.tensors for file in self.files))

    @property
    def metadata(self) -> dict[str, str]:
        """What the headers note, the shards' notes together."""
        return {key: value for file in self.files for key, value in file.metadata.items()}

    @property
    def ties(self) -> dict[str, str]:
        """The notes that name a tensor: what stands under each name that was left out."""
        notes = self.metadata
        names = {info.name for info in self.tensors} if notes else set()
        return {name: kept for name, kept in notes.items() if kept in names and name != "format"}


def find_weight_sets(folder: Path) -> tuple[WeightSet, ...]:
    """List the weight sets that lie directly in a folder, sorted by name.

    Raises BadFile for an index that cannot be read.
    """
    parsed: dict[str, ParsedName] = {}
    for path in sorted(folder.iterdir()):
        found = parse_name(path.name)
        if found and is_weight_file(path):
            parsed[path.name] = found
    sets = [_indexed_set(folder, name, found) for name, found in parsed.items() if found.role == "index"]
    taken = {name for weight_set in sets for name in weight_set.file_names}
    shards = defaultdict(list)
    for name, found in parsed.items():
        if name in taken:
            continue
        if found.role == "single":
            sets.append(WeightSet(folder, found.name, (name,)))
        elif found.role == "shard":
            shards[found.name, found.count].append((found.number, name, found.is_legacy))
    indexed = {weight_set.name for weight_set in sets if weight_set.index_name}
    for (weights_name, _), members in shards.items():
        if weights_name in indexed:
            continue  # left over from another split: the index does not name them, and no loader reads them
        names = tuple(name for _, name, _ in sorted(members))
        sets.append(WeightSet(folder, weights_name, names, is_legacy=members[0][2]))
    return tuple(sorted(sets, key=lambda weight_set: weight_set.path.name))


def is_weight_file(path: Path) -> bool:
    """Say whether a file is one of a weight set, by its name and, where that says little, by its first bytes."""
    parsed = parse_name(path.name)
    if not parsed or not path.is_file() or is_training_state(path.name) or is_other_runtime(path.name):
        return False
    standard = (parsed.name.stem, parsed.name.ext) in _STANDARD_NAMES
    return standard or parsed.role == "index" or could_be_weights(place_of(path))


def _indexed_set(folder: Path, index_name: str, parsed: ParsedName) -> WeightSet:
    shards = sorted(set(read_index(folder / index_name).weight_map.values()))
    return WeightSet(folder, parsed.name, tuple(shards), index_name, parsed.is_legacy)


def find_weight_set(path: Path) -> WeightSet:
    """Give the set that a file belongs to: itself, or all shards where it is an index or a shard."""
    parsed = parse_name(path.name)
    if parsed and parsed.role == "index":
        return _indexed_set(path.parent, path.name, parsed)
    if parsed and parsed.role == "shard":
        sets = [found for found in find_weight_sets(path.parent) if path.name in found.file_names]
        if len(sets) > 1:
            raise BadRequest(path, "is a shard of several sets", "Name the index of the one you mean.")
        if sets:
            return sets[0]
    name = parsed.name if parsed else WeightsName(path.name, None, "")
    return WeightSet(path.parent, name, (path.name,))


def open_checkpoint(source: Path | str | WeightSet, reading: Reading = PLAIN) -> Checkpoint:
    """Read the headers of a set and hold its index, where it has one, against them.

    ``reading`` says how pickled ones are read. Raises BadFile for a shard that is missing, a tensor that is in two
    shards, or in none.
    """
    weight_set = source if isinstance(source, WeightSet) else find_weight_set(as_path(source))
    index = read_index(weight_set.folder / weight_set.index_name) if weight_set.index_name else None
    _check_shards(weight_set)
    files = tuple(_read_files(weight_set, reading))
    if len(files) > 1:
        _check_names(files)
    notes = tuple(f"{file.place.name}: {note}" for file in files for note in file.notes)
    notes += _check_index(weight_set.path, index, files) if index else ()
    return Checkpoint(weight_set, files, index.metadata if index else {}, notes)


def _read_files(weight_set: WeightSet, reading: Reading) -> Iterator[WeightsFile]:
    room = MAX_TENSORS
    for name in weight_set.file_names:
        file = read_file(place_of(weight_set.folder / name), reading)
        room -= len(file.tensors)
        if room < 0:
            raise HostileFile(weight_set.path, f"describes more than {MAX_TENSORS:,} tensors, and no model has them")
        yield file


def strip_prefix(checkpoint: Checkpoint, prefix: str) -> Checkpoint:
    """Take a prefix off the names of all tensors that have it.

    Raises BadRequest where none has it, or where two tensors would come to one name.
    """
    path = checkpoint.weight_set.path
    before = [info.name for info in checkpoint.tensors]
    after = {name: name.removeprefix(prefix) for name in before}
    if list(after.values()) == before:
        raise BadRequest(
            path, f"has no tensor whose name begins with {prefix!r}", "'wconv inspect --tensors' lists them."
        )
    if len(set(after.values())) < len(after):
        raise BadRequest(path, f"would hold two tensors of one name without the prefix {prefix!r}")
    return rename_tensors(checkpoint, after)


def rename_tensors(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """Give all tensors other names, which must be different from each other."""
    files = tuple(
        replace(file, tensors=tuple(info._replace(name=names[info.name]) for info in file.tensors))
        for file in checkpoint.files
    )
    return replace(checkpoint, files=files)


def _check_shards(weight_set: WeightSet) -> None:
    for name in weight_set.file_names:
        if not (weight_set.folder / name).exists():
            raise BadFile(weight_set.path, f"names the shard {name}, which is not there", "Fetch the missing file.")
    first = parse_name(weight_set.file_names[0])
    if weight_set.index_name or not first or first.role != "shard":
        return
    numbers = {found.number for found in map(parse_name, weight_set.file_names) if found}
    missing = next((number for number in range(1, first.count + 1) if number not in numbers), None)
    if missing:
        gap = first.name.shard(missing, first.count)
        raise BadFile(weight_set.path, f"is one of {first.count} shards, and {gap} is not there", "Fetch it.")


def _check_names(files: Iterable[WeightsFile]) -> None:
    places: dict[str, str] = {}
    for file in files:
        for info in file.tensors:
            first = places.setdefault(info.name, file.place.name)
            if first != file.place.name:
                raise BadFile(
                    file.place, f"holds tensor {info.name!r}, which {first} holds too", "Keep one of the two."
                )


def _check_index(path: Path, index: WeightIndex, files: Iterable[WeightsFile]) -> tuple[str, ...]:
    unlisted: list[str] = []
    held: dict[str, set[str]] = {}
    for file in files:
        names = {info.name for info in file.tensors}
        held[file.place.name] = names
        unlisted.extend(sorted(names - index.weight_map.keys()))
    for name, shard in index.weight_map.items():
        if name not in held[shard]:
            raise BadFile(path, f"says that {shard} holds tensor {name!r}, and it does not", "Fetch index and shards.")
    if not unlisted:
        return ()
    return (f"{path.name} does not list {len(unlisted)} tensors that its shards hold, such as {unlisted[0]!r}",)

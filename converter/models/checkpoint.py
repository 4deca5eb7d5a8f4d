"""One weight set, that is a file, or shards with or without an index, opened as one state dict on disk.

``open_checkpoint`` reads the headers and holds index and shards against each other. No tensor is read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from converter.dtypes import DType
from converter.errors import BadFile, HostileFile
from converter.formats import read_files
from converter.formats.torch.state_dict import PLAIN, Reading
from converter.models.component import WeightSet
from converter.models.index import WeightIndex, read_index
from converter.models.inventory import find_weight_set
from converter.models.names import WeightsName, parse_name
from converter.storage import Given, Place
from converter.tensors.base import MAX_TENSORS, Tensor, WeightsFile


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A state dict on disk: the set it was opened from and what its headers say. ``notes`` are worth a user's look.

    ``kept`` are the tensors that a cast has left in another dtype than was asked for, each with that. It ``is_renamed``
    where the names of tensors are no longer those in the files, or some are left out; ``renamed`` maps the names there
    of those that a user has had renamed to those here.
    """

    weight_set: WeightSet
    files: tuple[WeightsFile, ...]
    index_metadata: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    kept: Mapping[str, DType] = field(default_factory=dict)
    is_renamed: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)

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
        """The notes that name a tensor: what stands under each name that was left out, and is no tensor's own."""
        notes = self.metadata
        names = {info.name for info in self.tensors} if notes else set()
        return {name: kept for name, kept in notes.items() if kept in names and name not in names and name != "format"}


def open_checkpoint(source: Given | WeightSet, reading: Reading = PLAIN) -> Checkpoint:
    """Read the headers of a set and hold its index, where it has one, against them.

    ``reading`` says how pickled ones are read. Raises BadFile for a shard that is missing, a tensor that is in two
    shards, or in none.
    """
    weight_set = source if isinstance(source, WeightSet) else find_weight_set(source)
    index = read_index(weight_set.folder / weight_set.index_name) if weight_set.index_name else None
    _check_shards(weight_set)
    files = tuple(_read_files(weight_set, reading))
    if len(files) > 1:
        _check_names(files)
    named = zip(weight_set.file_names, files, strict=True)
    of_all = f"{weight_set.around}: " if weight_set.around else ""  # and not the name of one of its many files
    prefixes = ((of_all if weight_set.is_of_many else f"{name}: ", file) for name, file in named)
    notes = tuple(f"{prefix}{note}" for prefix, file in prefixes for note in file.notes)
    notes += _check_index(weight_set.path, index, files) if index else ()
    return Checkpoint(weight_set, files, index.metadata if index else {}, notes)


def _read_files(weight_set: WeightSet, reading: Reading) -> Iterator[WeightsFile]:
    room = MAX_TENSORS
    for file in read_files((weight_set.folder / name for name in weight_set.file_names), reading):
        room -= len(file.tensors)
        if room < 0:
            raise HostileFile(weight_set.path, f"describes more than {MAX_TENSORS:,} tensors, and no model has them")
        yield file


def _check_shards(weight_set: WeightSet) -> None:
    gone = [name for name in weight_set.file_names if not (weight_set.folder / name).exists()]
    if gone:
        more = f", and {len(gone) - 1:,} more of its {len(weight_set.file_names):,} are not" if len(gone) > 1 else ""
        advice = "Fetch the missing files." if more else "Fetch the missing file."
        raise BadFile(weight_set.path, f"names the shard {gone[0]}, which is not there{more}", advice)
    first = parse_name(weight_set.file_names[0])
    if weight_set.index_name or weight_set.is_of_many or not first or first.role != "shard":
        return
    numbers = {found.number for found in map(parse_name, weight_set.file_names) if found}
    missing = next((number for number in range(1, first.count + 1) if number not in numbers), None)
    if missing:
        gap = first.name.shard(missing, first.count)
        number = sum(1 <= number <= first.count for number in numbers)
        more, advice = (", nor others", "Fetch them.") if first.count - number > 1 else ("", "Fetch it.")
        raise BadFile(weight_set.path, f"is one of {first.count} shards, and {gap} is not there{more}", advice)


def _check_names(files: Iterable[WeightsFile]) -> None:
    places: dict[str, str] = {}
    for file in files:
        place = file.place.name
        for info in file.tensors:
            first = places.setdefault(info.name, place)
            if first != place:
                raise BadFile(
                    file.place, f"holds tensor {info.name!r}, which {first} holds too", "Keep one of the two."
                )


def _check_index(path: Place, index: WeightIndex, files: Iterable[WeightsFile]) -> tuple[str, ...]:
    unlisted: list[str] = []
    held: dict[str, set[str]] = {}
    for file in files:
        names = {info.name for info in file.tensors}
        held[file.place.name] = names
        # Not ``names - index.weight_map.keys()``, which goes through all keys for each file.
        unlisted.extend(sorted(names.difference(index.weight_map)))
    for name, shard in index.weight_map.items():
        if name not in held[shard]:
            raise BadFile(path, f"says that {shard} holds tensor {name!r}, and it does not", "Fetch index and shards.")
    if not unlisted:
        return ()
    return (f"{path.name} does not list {len(unlisted)} tensors that its shards hold, such as {unlisted[0]!r}",)

"""Which files of a folder go together as a weight set: by an index, by their numbers, or as a single file.

``group`` never fails: a set says itself which of its files are not there, and why its index cannot be read.
``sets_to_read`` is the rule for what a conversion takes of it.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from converter.errors import SystemRefused, Unreachable, WconvError
from converter.formats import could_be_weights, gather
from converter.models.component import WeightSet
from converter.models.index import WeightIndex, read_index
from converter.models.names import (
    STEMS,
    ParsedName,
    WeightsName,
    is_other_runtime,
    is_training_folder,
    is_training_state,
    parse_name,
)
from converter.storage import Place, list_entries

_MAX_LATEST_NBYTES = 1_000


@dataclass(frozen=True, slots=True)
class ListedSet(WeightSet):
    """A set as it lies there: ``file_names`` are those of its files that do.

    ``missing`` is the first of ``missing_count`` that do not. ``index`` is None where there is none, or it cannot be
    read (``index_error`` then says why).
    """

    missing: str = ""
    missing_count: int = 0
    index: WeightIndex | None = None
    index_error: WconvError | None = None

    @property
    def own_names(self) -> tuple[str, ...]:
        """The files but those whose names say that they are of another variant or form."""
        mine = (None, (self.name.variant, self.name.ext))
        parsed = ((name, parse_name(name)) for name in self.file_names)
        return tuple(name for name, one in parsed if (one and (one.name.variant, one.name.ext)) in mine)

    @property
    def listed_names(self) -> tuple[str, ...]:
        """The files that the index names, there or not."""
        return self.index.shards if self.index else ()

    @property
    def is_sharded(self) -> bool:
        parsed = parse_name(self.file_names[0]) if self.file_names and not self.is_of_many else None
        return self.index_name is not None or (parsed is not None and parsed.role == "shard")

    @property
    def without_index(self) -> WeightSet:
        """The set to be opened by its files alone, whatever an index says."""
        return WeightSet(self.folder, self.name, self.file_names, pieces=self.pieces)


def is_weight_file(place: Place) -> bool:
    """Say whether a file is one of a weight set, by its name and, where that says little, by its first bytes."""
    parsed = parse_name(place.name)
    if not parsed or is_training_state(place.name) or is_other_runtime(place.name):
        return False
    return parsed.role == "index" or parsed.name.is_sought or could_be_weights(place)


def sets_to_read(listed: Collection[ListedSet]) -> tuple[WeightSet, ...]:
    """Give the sets that a conversion reads: of an index all that it names, and else the files that no index names.

    Shards beside an index of their name are left over from another split, and no loader reads them.
    """
    taken = {name for one in listed for name in one.listed_names}
    indexed = {one.name for one in listed if one.index_name}
    sets = []
    for one in listed:
        names = one.listed_names or tuple(name for name in one.file_names if name not in taken)
        parsed = parse_name(one.index_name) if one.index_name else one
        if one.index_name or (names and not (one.is_sharded and one.name in indexed)):
            is_legacy = parsed is not None and parsed.is_legacy
            sets.append(WeightSet(one.folder, one.name, names, one.index_name, is_legacy, pieces=one.pieces))
    return tuple(sorted(sets, key=lambda one: one.path.name))


def group(folder: Place, parsed: Mapping[str, ParsedName]) -> tuple[tuple[ListedSet, ...], tuple[ListedSet, ...]]:
    """Put files together to sets, and to groups of shards that no set has."""
    sets = [read_indexed(folder, name, parsed) for name, one in parsed.items() if one.role == "index"]
    taken = {name for one in sets for name in one.own_names}
    whole = {one.name for one in sets if one.file_names and one.index}
    numbered: dict[tuple[WeightsName, int, bool], dict[int, str]] = defaultdict(dict)
    for name, one in parsed.items():
        if one.role == "single" and name not in taken:
            sets.append(ListedSet(folder, one.name, (name,)))
        elif one.role == "shard" and name not in taken:
            current = one.name.shard(one.number, one.count)
            numbered[one.name, one.count, current != name and current in parsed][one.number] = name
    groups = [_of_shards(folder, parsed, members) for members in numbered.values()]
    strays = tuple(one for one in groups if one.name in whole)
    sets = _join(sets, [one for one in groups if one.name not in whole])
    return tuple(sorted(sets, key=lambda one: one.label)), strays


def group_whole(folder: Place, names: Iterable[str]) -> tuple[tuple[ListedSet, ...], dict[str, WconvError]]:
    """Give the sets that files of a folder, by its names, make only together, and what keeps some from being read."""
    sets: list[ListedSet] = []
    unread: dict[str, WconvError] = {}
    for one in gather(names):
        refusal = one.row.refusal(folder)
        if refusal:
            unread[one.head] = refusal
        else:
            sets.append(ListedSet(folder, name_of_many(one.format), (one.head,), pieces=one.pieces))
    return tuple(sets), unread


def name_of_many(form: str) -> WeightsName:
    """Name the weights of a training checkpoint: what is made of them has the name that transformers looks for."""
    return WeightsName(STEMS["transformers"]["torch"], None, form)


def group_below(folder: Place, others: Iterable[str]) -> tuple[ListedSet, ...]:
    """Give the sets of training checkpoints in folders directly below, as a trainer's root has them.

    Of several the one is taken that DeepSpeed's file ``latest`` names (``load_checkpoint`` in its ``engine.py``).
    """
    sets: list[ListedSet] = []
    for name in others:
        inner = folder / name
        if name.startswith(".") or is_training_folder(name) or inner.is_link() or not inner.is_folder():
            continue
        for one in group_whole(inner, [place.name for place in list_entries(inner)])[0]:
            heads, pieces = (tuple(f"{name}/{file}" for file in files) for files in (one.file_names, one.pieces))
            sets.append(replace(one, folder=folder, file_names=heads, pieces=pieces))
    latest = _latest_in(folder) if len(sets) > 1 else ""
    return tuple(one for one in sets if one.file_names[0].startswith(f"{latest}/")) or tuple(sets)


def _latest_in(folder: Place) -> str:
    place = folder / "latest"
    if not place.is_file():
        return ""
    with place.open() as file:
        return file.read(0, _MAX_LATEST_NBYTES).decode("utf-8", "replace").strip()


def _join(sets: list[ListedSet], groups: list[ListedSet]) -> list[ListedSet]:
    """Add groups of shards to the sets; an index that cannot be read goes with the first of its name."""
    unread = {one.name: one for one in sets if one.index_name and one.index is None}
    for shards in groups:
        one = unread.pop(shards.name, None) if len(shards.file_names) > 1 else None
        if one:
            sets = [other for other in sets if other is not one]
            is_legacy = one.is_legacy or shards.is_legacy
            shards = replace(shards, index_name=one.index_name, index_error=one.index_error, is_legacy=is_legacy)
        sets.append(shards)
    return sets


def _of_shards(folder: Place, parsed: Mapping[str, ParsedName], members: Mapping[int, str]) -> ListedSet:
    """Give the set, whole or not, of files that have numbers and one name."""
    names = tuple(members[number] for number in sorted(members))
    name, count = parsed[names[0]].name, parsed[names[0]].count
    gap = next((number for number in range(1, count + 1) if number not in members), 0)
    missing = re.sub(r"-\d{5,}-of-", f"-{gap:05d}-of-", names[0]) if gap else ""
    missing_count = count - sum(1 <= number <= count for number in members)
    is_legacy = any(parsed[one].is_legacy for one in names)
    return ListedSet(folder, name, names, None, is_legacy, missing, missing_count)


def read_indexed(folder: Place, index_name: str, parsed: Mapping[str, ParsedName]) -> ListedSet:
    """Give the set of an index, given what is known by name of the files beside it."""
    own = parsed[index_name]
    try:
        index = read_index(folder / index_name)
    except Unreachable:
        raise
    except WconvError as error:
        return ListedSet(folder, own.name, (), index_name, own.is_legacy, index_error=error)
    # A name is held once, however often it is listed: of thousands of shards there are hundreds of thousands.
    index = replace(index, weight_map={sys.intern(n): sys.intern(shard) for n, shard in index.weight_map.items()})
    is_there = {shard: shard in parsed or _is_file(folder / shard) for shard in index.shards}
    there = tuple(shard for shard, known in is_there.items() if known)
    missing = [shard for shard, known in is_there.items() if not known]
    is_legacy = own.is_legacy or any(name in parsed and parsed[name].is_legacy for name in there)
    first = missing[0] if missing else ""
    return ListedSet(folder, own.name, there, index_name, is_legacy, first, len(missing), index)


def _is_file(place: Place) -> bool:
    try:
        return place.is_file()
    except Unreachable:
        raise
    except SystemRefused:
        return False

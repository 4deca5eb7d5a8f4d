"""Which files of a folder go together as a weight set: by an index, by their numbers, or as a single file.

``group`` never fails: a set says itself which of its files are not there, and why its index cannot be read.
``sets_to_read`` is the rule for which of them a conversion takes.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from converter.errors import SystemRefused, WconvError
from converter.models.component import WeightSet
from converter.models.index import WeightIndex, read_index
from converter.models.names import ParsedName, WeightsName, parse_name
from converter.storage import Place


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
    def label(self) -> str:
        """The name to call the set by: its index, or its first file."""
        return self.path.name

    @property
    def own_names(self) -> tuple[str, ...]:
        """The files but those whose names say that they are of another variant or form."""
        mine = (None, (self.name.variant, self.name.ext))
        parsed = ((name, parse_name(name)) for name in self.file_names)
        return tuple(name for name, one in parsed if (one and (one.name.variant, one.name.ext)) in mine)

    @property
    def listed_names(self) -> tuple[str, ...]:
        """The files that the index names, there or not."""
        return tuple(sorted(set(self.index.weight_map.values()))) if self.index else ()

    @property
    def is_sharded(self) -> bool:
        parsed = parse_name(self.file_names[0]) if self.file_names else None
        return self.index_name is not None or (parsed is not None and parsed.role == "shard")

    @property
    def without_index(self) -> WeightSet:
        """The set to be opened by its files alone, whatever an index says."""
        return WeightSet(self.folder, self.name, self.file_names)


def sets_to_read(listed: Iterable[ListedSet]) -> tuple[WeightSet, ...]:
    """Give the sets that a conversion reads: of an index all that it names, and else the files that no index names.

    Shards beside an index of their name are left over from another split, and no loader reads them.
    """
    listed = list(listed)
    taken = {name for one in listed for name in one.listed_names}
    indexed = {one.name for one in listed if one.index_name}
    sets = []
    for one in listed:
        if one.index_name:
            parsed = parse_name(one.index_name)
            names = one.listed_names or one.file_names
            sets.append(WeightSet(one.folder, one.name, names, one.index_name, parsed is None or parsed.is_legacy))
        elif not (one.is_sharded and one.name in indexed):
            names = tuple(name for name in one.file_names if name not in taken)
            sets += [WeightSet(one.folder, one.name, names, is_legacy=one.is_legacy)] if names else []
    return tuple(sorted(sets, key=lambda one: one.path.name))


def group(folder: Place, parsed: Mapping[str, ParsedName]) -> tuple[tuple[ListedSet, ...], tuple[ListedSet, ...]]:
    """Put files together to sets, and to groups of shards that no set has."""
    sets = [read_indexed(folder, name, parsed) for name, one in parsed.items() if one.role == "index"]
    taken = {name for one in sets for name in one.own_names}
    whole = {one.name for one in sets if one.file_names and one.index}
    shards: dict[tuple[WeightsName, int], dict[str, ParsedName]] = defaultdict(dict)
    for name, one in parsed.items():
        if one.role == "single" and name not in taken:
            sets.append(ListedSet(folder, one.name, (name,)))
        elif one.role == "shard" and name not in taken:
            shards[one.name, one.count][name] = one
    groups = [_of_shards(folder, members) for found in shards.values() for members in _spelled_alike(found)]
    strays = tuple(one for one in groups if one.name in whole)
    return tuple(sorted(_join(sets, groups, whole), key=lambda one: one.label)), strays


def _join(sets: list[ListedSet], groups: list[ListedSet], whole: set[WeightsName]) -> Iterator[ListedSet]:
    """Give sets, and the groups of shards that are sets too: one of them goes with an index that cannot be read."""
    alone: dict[WeightsName, list[ListedSet]] = defaultdict(list)
    for one in groups:
        if one.name not in whole and len(one.file_names) > 1:
            alone[one.name].append(one)
        elif one.name not in whole:
            yield one
    for one in sets:
        if one.index_name and one.index is None and alone[one.name]:
            rest = alone[one.name].pop(0)
            yield replace(rest, index_name=one.index_name, index_error=one.index_error,
                          is_legacy=one.is_legacy or rest.is_legacy)  # fmt: skip
        else:
            yield one
    for rests in alone.values():
        yield from rests


def _spelled_alike(members: Mapping[str, ParsedName]) -> list[dict[str, ParsedName]]:
    """Part shards by the two spellings of their names, but only where a number is there in both."""
    if max(Counter(one.number for one in members.values()).values()) == 1:
        return [dict(members)]
    by_spelling: dict[bool, dict[str, ParsedName]] = defaultdict(dict)
    for name, one in members.items():
        by_spelling[one.is_legacy][name] = one
    return list(by_spelling.values())


def _of_shards(folder: Place, members: Mapping[str, ParsedName]) -> ListedSet:
    by_number = {one.number: name for name, one in members.items()}
    first = next(iter(members.values()))
    is_legacy = any(one.is_legacy for one in members.values())
    gap = next((number for number in range(1, first.count + 1) if number not in by_number), None)
    like = re.sub(r"-\d{5,}-of-", f"-{gap:05d}-of-", next(iter(members))) if gap else ""
    missing = like if is_legacy else first.name.shard(gap, first.count) if gap else ""
    missing_count = first.count - sum(1 <= number <= first.count for number in by_number)
    names = tuple(by_number[number] for number in sorted(by_number))
    return ListedSet(folder, first.name, names, None, is_legacy, missing, missing_count)


def read_indexed(folder: Place, index_name: str, parsed: Mapping[str, ParsedName]) -> ListedSet:
    """Give the set of an index, given what is known by name of the files beside it."""
    own = parsed[index_name]
    try:
        index = read_index(folder / index_name)
    except WconvError as error:
        return ListedSet(folder, own.name, (), index_name, own.is_legacy, index_error=error)
    # A name is held once, however often it is listed: of thousands of shards there are hundreds of thousands.
    index = replace(index, weight_map={sys.intern(n): sys.intern(shard) for n, shard in index.weight_map.items()})
    is_there = {shard: shard in parsed or _is_file(folder / shard) for shard in sorted(set(index.weight_map.values()))}
    there = tuple(shard for shard, known in is_there.items() if known)
    missing = [shard for shard, known in is_there.items() if not known]
    is_legacy = own.is_legacy or any(name in parsed and parsed[name].is_legacy for name in there)
    first = missing[0] if missing else ""
    return ListedSet(folder, own.name, there, index_name, is_legacy, first, len(missing), index)


def _is_file(place: Place) -> bool:
    try:
        return place.is_file()
    except SystemRefused:
        return False

"""The ``*.index.json`` of a sharded checkpoint: which shard holds which tensor.

Read strictly: a name given twice, a shard that is not a bare file name, or a value of another type is an error. What
is written is sorted and ends in a newline, so that the same weights always give the same bytes (diffusers and
transformers dump theirs with ``indent=2, sort_keys=True``).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converter.errors import BadFile, HostileFile, Where
from converter.formats.texts import MAX_TEXT_NBYTES, Pairs, check_depth, parse_json, read_bytes
from converter.storage import Place, is_bare
from converter.tensors.base import MAX_TENSORS

MAX_SHARDS = 10_000  # real ones have up to some hundred
_MAX_FILE_NAME = 255  # as long as any disk takes


@dataclass(frozen=True, slots=True)
class WeightIndex:
    """The content of an index: ``weight_map`` from tensor name to shard file name, and all of its metadata.

    ``has_metadata`` says whether the key was there at all: without it neither loader opens the index.
    """

    weight_map: Mapping[str, str]
    metadata: Mapping[str, Any]
    has_metadata: bool = True

    @property
    def shards(self) -> tuple[str, ...]:
        """The shards that it names, sorted."""
        return tuple(sorted(set(self.weight_map.values())))

    def render(self) -> bytes:
        """Spell the index as the libraries do, ``metadata`` always there (both loaders want the key)."""
        content = {"metadata": dict(self.metadata), "weight_map": dict(self.weight_map)}
        return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def parse_index(raw: bytes, place: Where) -> WeightIndex:
    """Read the content of an index file; raises BadFile for all that a loader would stumble over."""
    try:
        content = parse_json(raw, place, pairs_hook=_refuse_repeats, encoding="utf-8-sig")
        check_depth(content)
    except _RepeatedKeyError as error:
        raise BadFile(place, f"names {error.args[0]!r} twice") from None
    except ValueError as error:
        raise BadFile(place, f"is not JSON ({error})", "Fetch the index again.") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    metadata = content.get("metadata") or {} if isinstance(content, dict) else {}
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise BadFile(place, "is no index of weights: it has no weight_map", "Fetch the index again.")
    shards = set(map(_check_type, weight_map.values()))
    if len(weight_map) > MAX_TENSORS or len(shards) > MAX_SHARDS:
        problem = f"names {len(weight_map):,} tensors in {len(shards):,} shards, which is more than any model has"
        raise HostileFile(place, problem)
    for shard in shards:
        if not isinstance(shard, str) or len(shard) > _MAX_FILE_NAME or not is_bare(shard):
            raise BadFile(place, f"points outside its folder: {shard!r}", "Shards must be bare file names beside it.")
    return WeightIndex(weight_map, metadata, isinstance(content.get("metadata"), dict))


def read_index(place: Place) -> WeightIndex:
    """Open and parse the index at a place."""
    return parse_index(read_bytes(place, MAX_TEXT_NBYTES), place)


def _check_type(value: object) -> str | None:
    return value if isinstance(value, str) else None


class _RepeatedKeyError(ValueError):
    pass


def _refuse_repeats(pairs: Pairs) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = sorted(name for name, _ in pairs)
        raise _RepeatedKeyError(next(name for name, other in itertools.pairwise(names) if name == other))
    return content

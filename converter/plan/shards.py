"""How large shards are, and which tensor goes into which."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from converter.errors import BadRequest

# huggingface_hub knows the powers of ten (``parse_size_to_int``); the powers of two are ours.
_UNITS = {"B": 1}
_UNITS |= {f"{prefix}{unit}": base**power
           for unit, base in (("B", 1000), ("IB", 1024)) for power, prefix in enumerate("KMGT", 1)}  # fmt: skip
# Who types 5 means 5GB; no shard and no buffer is so small.
_LEAST_BARE_NBYTES = 1_000_000


def parse_size(text: str) -> int:
    """Give the bytes that a text such as ``5GB``, ``1.5 GiB`` or ``64B`` means; raises BadRequest.

    >>> parse_size("5GB"), parse_size("2 MiB"), parse_size("5000000")
    (5000000000, 2097152, 5000000)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE | re.ASCII)
    unit = match[2].upper() if match else ""
    number = float(match[1]) * _UNITS.get(unit or "B", math.inf) if match else 0.0
    if not match or not 1 <= number < math.inf or (unit in ("", "B") and "." in match[1]):
        raise BadRequest(repr(text), "is no size", "Write it as 5GB, 500MB or 2GiB.")
    if not unit and number < _LEAST_BARE_NBYTES:
        raise BadRequest(repr(text), f"is {match[1]} bytes", f"Write it as 5GB, 500MB or 2GiB, or as {match[1]}B.")
    return int(number)


def limit_of(given: float | str) -> float:
    """Give the most bytes that a shard may take: a number, a text such as ``5GB``, or ``"none"`` for no limit."""
    if isinstance(given, str):
        return math.inf if given.lower() == "none" else parse_size(given)
    if not isinstance(given, int | float) or not given >= 1:
        raise BadRequest(repr(given), "is no size of a shard", "Give a number of bytes, or a text such as '5GB'.")
    return given


def split_into_shards(sizes: Sequence[int], max_nbytes: float) -> list[list[int]]:
    """Group places of ``sizes`` into shards by huggingface_hub's rule (``split_state_dict_into_shards_factory``).

    In order and greedy; a shard may take just ``max_nbytes``; what is larger is a shard by itself, before the open one.

    >>> split_into_shards([3, 12, 3], 10)
    [[1], [0, 2]]
    """
    shards: list[list[int]] = []
    current: list[int] = []
    filled = 0
    for place, size in enumerate(sizes):
        if size > max_nbytes:
            shards.append([place])
            continue
        if filled + size > max_nbytes:
            shards.append(current)
            current, filled = [], 0
        current.append(place)
        filled += size
    return [*shards, current] if current else shards

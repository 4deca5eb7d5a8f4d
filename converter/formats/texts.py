"""JSON that came with a model, read within bounds: 512 MB of memory and some seconds, whatever it claims.

What Python makes of a text takes up to thirty times its room, and is there before anyone can look at it. So the text
is looked at first: its length, and how many of the marks it has that begin or part values. Only what would be refused
by anyone who wanted a model is refused; each limit says what real files have.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from converter.errors import HostileFile, Where
from converter.storage import Place
from converter.tensors.base import MAX_TENSORS

# Configs have some kB; those that list the labels of 100,000 classes, twice, have 6 MB.
MAX_CONFIG_NBYTES = 8_000_000
# A header of 200,000 tensors takes 30 MB; an index repeats what headers name.
MAX_TEXT_NBYTES = 40_000_000
# The same where a character may take 4 bytes in memory.
_MAX_WIDE_NBYTES = 25_000_000
# There is one for each value and key, each list and dict, and those take 100 bytes or less. An index has two for each
# tensor, a header 12 to 16.
_MARKS = (b",", b":", b"[", b"{")
MAX_MARKS = 4 * MAX_TENSORS
MAX_HEADER_MARKS = 16 * MAX_TENSORS
# Configs nest four or five deep. All that is done with them recurses.
_MAX_DEPTH = 100

Pairs = list[tuple[str, Any]]


def parse_json(
    raw: bytes,
    where: Where,
    what: str = "",
    *,
    max_marks: int = MAX_MARKS,
    pairs_hook: Callable[[Pairs], Any] | None = None,
    encoding: str = "utf-8",
) -> Any:
    """Parse JSON; raises HostileFile where that would take too much, ValueError for what is none.

    ``what`` names what is not the whole file, such as "its header ".
    """
    check_nbytes(len(raw), where, MAX_TEXT_NBYTES if raw.isascii() else _MAX_WIDE_NBYTES, what)
    if sum(map(raw.count, _MARKS)) > max_marks:
        raise HostileFile(where, f"{what}holds more values and brackets than any model needs ({max_marks:,})")
    try:
        return json.loads(raw.decode(encoding), object_pairs_hook=pairs_hook)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_config(place: Place) -> Any:
    """Give what is in a config; raises HostileFile for what no config is, ValueError for what is no JSON."""
    content = parse_json(read_bytes(place, MAX_CONFIG_NBYTES), place)
    check_depth(content)
    return content


def read_bytes(place: Place, max_nbytes: int) -> bytes:
    """Read a text whole; raises HostileFile for a longer one, before it is read."""
    with place.open() as file:
        check_nbytes(file.nbytes, place, max_nbytes)
        return file.read(0, max_nbytes)


def check_nbytes(nbytes: int, where: Where, limit: int, what: str = "") -> None:
    """Raise HostileFile for a text that is longer than one of its kind is."""
    if nbytes > limit:
        raise HostileFile(where, f"{what}is {nbytes:,} bytes long, and no model needs more than {limit:,}")


def check_depth(content: Any) -> None:
    """Raise ValueError for what is nested deeper than anything that is meant."""
    level: list[Any] = [[content]]
    for _ in range(_MAX_DEPTH):
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [value for values in inner for value in values if isinstance(value, (dict, list))]
        if not level:
            return
    raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")

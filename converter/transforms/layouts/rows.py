"""One layout of a model's tensors into another and back, by a table: what is called what, and how shapes differ.

A row is what transformers 5 calls a WeightConverter: a tensor of the one layout, the *whole*, and those of the other
that it is made of, its *parts*. Read forwards it takes wholes apart, read backwards it puts them together; both only
say where bytes lie, and nothing is computed of a number.

Names are matched word by word, ``.`` between them: ``{}`` stands for a number, ``*`` for any word, and what they stand
for goes into the other names in the same order; a word that a row has itself comes first. ``{#}``, in the names of
parts alone, counts from 0 on: the whole holds all of them. Of several rows for one name the first is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from converter.errors import BadFile, Unsupported, Where
from converter.tensors.base import MAX_TENSORS, Tensor
from converter.transforms.layouts.operations import CONCAT, KEEP, Operation


class Row(NamedTuple):
    """The name of a whole, those of its parts, and what makes the one of the others.

    Where names count (``{#}``) the parts are all of the first number, then all of the next.
    """

    whole: str
    parts: tuple[str, ...]
    operation: Operation = KEEP

    @property
    def counts(self) -> bool:
        """Whether there are as many of each part as the whole says."""
        return any(_COUNT in part.split(".") for part in self.parts)


def renamings(names: Mapping[str, str]) -> list[Row]:
    """Give the rows that only rename."""
    return [Row(whole, (part,)) for whole, part in names.items()]


def within(whole: str, part: str, names: Mapping[str, str]) -> list[Row]:
    """Give the rows that rename what is in a module: its name here, there, and what is called how in it."""
    return renamings({f"{whole}.{here}": f"{part}.{there}" for here, there in names.items()})


def modules(names: Mapping[str, str | tuple[str, ...]], operation: Operation | None = None) -> list[Row]:
    """Give the rows for weights and biases: the name of a module here, and that of the one or those it is there.

    Without an ``operation`` a module that is several is these one behind the other.
    """
    rows = []
    for whole, there in names.items():
        parts = (there,) if isinstance(there, str) else there
        how = operation or (KEEP if len(parts) == 1 else CONCAT)
        rows += [Row(f"{whole}.{leaf}", tuple(f"{part}.{leaf}" for part in parts), how) for leaf in ("weight", "bias")]
    return rows


def numbered(whole: str, part: str, numbers: Iterable[int], rows: Sequence[Row]) -> list[Row]:
    """Give the rows for what is in each of some blocks, of which these are the names here and there."""
    return [
        Row(f"{whole}.{at}.{row.whole}", tuple(f"{part}.{at}.{name}" for name in row.parts), row.operation)
        for at in numbers
        for row in rows
    ]


def take_apart(tensors: Mapping[str, Tensor], rows: Iterable[Row]) -> tuple[list[Tensor], list[str]]:
    """Read a table forwards: give the parts of wholes, given by name, and the names that no row has.

    Raises BadFile for a tensor of a shape that its row cannot take, or two that come to one name.
    """
    converted: list[Tensor] = []
    left: list[str] = []
    for name, (row, _), words in _matches(tensors, ((row.whole, (row, 0)) for row in rows), left):
        tensor = tensors[name]
        count = row.operation.count(tensor, len(row.parts)) if row.counts else 1
        if len(converted) + count * len(row.parts) > MAX_TENSORS:
            problem = f"holds {name!r}, with whose {count * len(row.parts):,} parts there would be more than"
            raise BadFile(tensor.where, f"{problem} {MAX_TENSORS:,} tensors, and no model has them")
        names = (fill(part, words, at) for at in range(count) for part in row.parts)
        with _readable(tensor):
            sources = row.operation.apart(tensor, count * len(row.parts))
        converted += (Tensor(*one) for one in zip(names, sources, strict=True))
    _check_names(converted)
    return converted, left


def put_together(tensors: Mapping[str, Tensor], rows: Iterable[Row]) -> tuple[list[Tensor], list[str]]:
    """Read a table backwards: give the wholes of parts, given by name, and the names that no row has.

    Raises BadFile for a part that is missing, parts that do not fit each other, or two that come to one name.
    """
    groups: dict[tuple[str, tuple[str, ...]], tuple[Row, dict[tuple[int, int], Tensor]]] = {}
    left: list[str] = []
    for name, (row, place), words in _matches(tensors, _leaves_of_parts(rows), left):
        number, words = _split_count(row.parts[place], words)
        _, members = groups.setdefault((row.whole, words), (row, {}))
        if (number, place) in members:
            raise _twice(tensors[name].where, members[number, place].name, name)
        members[number, place] = tensors[name]
    converted = []
    for (_, words), (row, members) in groups.items():
        parts = _in_order(row, words, members)
        with _readable(parts[0]):
            converted.append(Tensor(fill(row.whole, words, 0), row.operation.together(parts)))
    _check_names(converted)
    return converted, left


def wholes_of(names: Iterable[str], rows: Iterable[Row]) -> dict[str, str]:
    """Map the names of parts to those of the wholes that they are of; names that no row has are not in it."""
    return {
        name: fill(row.whole, _split_count(row.parts[place], words)[1], 0)
        for name, (row, place), words in _matches(names, _leaves_of_parts(rows), [])
    }


_Leaf = tuple[Row, int]
"""A row, and the place that a part has in it."""


def _leaves_of_parts(rows: Iterable[Row]) -> Iterator[tuple[str, _Leaf]]:
    return ((part, (row, at)) for row in rows for at, part in enumerate(row.parts))


def _matches(
    names: Iterable[str], leaves: Iterable[tuple[str, _Leaf]], left: list[str]
) -> Iterator[tuple[str, _Leaf, tuple[str, ...]]]:
    """Give each name that a leaf has, with that and what stands in its holes; the others are put to the ``left``."""
    tree = tree_of(leaves)
    for name in names:
        match = find_leaf(tree, name.split("."))
        if match is None:
            left.append(name)
        else:
            yield name, *match


def _in_order(row: Row, words: tuple[str, ...], members: Mapping[tuple[int, int], Tensor]) -> list[Tensor]:
    """Give the parts of a whole in their order. Raises BadFile where one is missing."""
    count = len({number for number, _ in members})
    for number, place in itertools.product(range(count), range(len(row.parts))):
        if (number, place) not in members:
            first = next(iter(members.values()))
            lacking = fill(row.parts[place], words, number)
            raise BadFile(first.where, f"holds {first.name!r}, and lacks {lacking!r}, which goes with it", _FETCH)
    return [members[key] for key in sorted(members)]


@contextmanager
def _readable(tensor: Tensor) -> Iterator[None]:
    """Refuse a tensor whose source cannot be seen in another shape: it lies in pieces that go through its rows."""
    try:
        yield
    except ValueError:
        problem = f"holds {tensor.name!r} in pieces that cannot be cut otherwise"
        raise Unsupported(
            tensor.where, problem, "Convert it to safetensors first, and that to the other layout."
        ) from None


_FETCH = "Fetch all files of the model."


def _check_names(tensors: Iterable[Tensor]) -> None:
    names: set[str] = set()
    for tensor in tensors:
        if tensor.name in names:
            raise BadFile(
                tensor.where, f"holds two tensors that would both be called {tensor.name!r} in the other layout"
            )
        names.add(tensor.name)


def _twice(where: Where, first: str, second: str) -> BadFile:
    return BadFile(where, f"holds {first!r} and {second!r}, which are one tensor in the other layout")


# A tree of the words of names: each node has its branches by word, and what no word can be by these.
_Tree = dict[Any, Any]
_NUMBER, _WORD, _LEAF = range(3)
_COUNT = "{#}"
_HOLES = {"{}": _NUMBER, _COUNT: _NUMBER, "*": _WORD}


def fill(name: str, words: Sequence[str], number: int) -> str:
    """Give a name with what stands for its holes."""
    left = iter(words)
    known: dict[str, Callable[[], str]] = {
        "{}": lambda: next(left),
        "*": lambda: next(left),
        _COUNT: lambda: str(number),
    }
    return ".".join(known[word]() if word in known else word for word in name.split("."))


def _split_count(name: str, words: tuple[str, ...]) -> tuple[int, tuple[str, ...]]:
    """Tell the number that a name counts by from the other words in its holes; 0 where it does not count."""
    holes = [word for word in name.split(".") if word in _HOLES]
    if _COUNT not in holes:
        return 0, words
    at = holes.index(_COUNT)
    return int(words[at]), (*words[:at], *words[at + 1 :])


def tree_of(leaves: Iterable[tuple[str, Any]]) -> _Tree:
    """Give a tree in which leaves are found by their names; of several of one name it has the first."""
    tree: _Tree = {}
    for name, leaf in leaves:
        node = tree
        for word in name.split("."):
            node = node.setdefault(_HOLES.get(word, word), {})
        node.setdefault(_LEAF, leaf)
    return tree


def find_leaf(node: _Tree, words: list[str], at: int = 0, filled: tuple[str, ...] = ()) -> Any:
    """Find the leaf for a name's words from ``at`` on, and give it with those that stand in its holes; or None."""
    if at == len(words):
        return (node[_LEAF], filled) if _LEAF in node else None
    word = words[at]
    match = find_leaf(node[word], words, at + 1, filled) if word in node else None
    if match is None and _NUMBER in node and word.isascii() and word.isdecimal():
        match = find_leaf(node[_NUMBER], words, at + 1, (*filled, word))
    if match is None and _WORD in node and word:
        match = find_leaf(node[_WORD], words, at + 1, (*filled, word))
    return match

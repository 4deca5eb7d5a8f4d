"""One layout of a model's tensors into another, by a table: what is called what, and which bytes are seen otherwise.

A row is what transformers 5 calls a WeightConverter. Names are matched word by word, ``.`` between them: ``{}`` stands
for a number, ``*`` for any word, and what they stand for goes into the new names in the same order; a word that a row
has itself comes first. Nothing is computed of a number: where one layout counts otherwise than the other, there is a
row for each. So a table can be read from right to left as well: each operation has one that undoes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from converter.errors import BadFile
from converter.tensors.base import Tensor, TensorSource

Operation = Callable[[Tensor, int], tuple[TensorSource, ...]]
"""What gives so many sources of one tensor: one of those below."""


def keep(tensor: Tensor, count: int) -> tuple[TensorSource, ...]:
    """Give it as it is, for a row that only renames. It is undone by itself."""
    return (tensor.source,)


def chunk(tensor: Tensor, count: int) -> tuple[TensorSource, ...]:
    """Cut it in equal parts along the first axis. It is undone by a concatenation along it."""
    length, *others = tensor.shape or (1,)
    if length % count:
        shape = "x".join(map(str, tensor.shape)) or "one number"
        raise BadFile(tensor.where, f"holds {tensor.name!r}, which cannot be cut in {count}: it is {shape}")
    part = (length // count, *others)
    return tuple(tensor.source.box((at * part[0], *(0 for _ in others)), part) for at in range(count))


def transpose(tensor: Tensor, count: int) -> tuple[TensorSource, ...]:
    """Turn its axes round. It is undone by itself."""
    return (tensor.source.permuted(tuple(reversed(range(len(tensor.shape))))),)


def squeeze(tensor: Tensor, count: int) -> tuple[TensorSource, ...]:
    """Take a convolution of one pixel for a matrix. It is undone by two axes of length 1 at the end."""
    is_pixel = len(tensor.shape) > 2 and set(tensor.shape[2:]) == {1}
    return (tensor.source.permuted((0, 1)) if is_pixel else tensor.source,)


class WeightConverter(NamedTuple):
    """A row: the name in the one layout, those in the other, and what makes the tensors of these from that of it."""

    source: str
    targets: tuple[str, ...]
    operation: Operation = keep


def renamings(names: Mapping[str, str]) -> list[WeightConverter]:
    """Give the rows that only rename."""
    return [WeightConverter(source, (target,)) for source, target in names.items()]


def convert(tensors: Mapping[str, Tensor], rows: Iterable[WeightConverter]) -> tuple[list[Tensor], list[str]]:
    """Give tensors, by their names in the one layout, as those of the other, and the names that no row has.

    Raises BadFile for a tensor of a shape that its row cannot take.
    """
    tree = _tree_of(rows)
    converted: list[Tensor] = []
    left: list[str] = []
    for name, tensor in tensors.items():
        match = _match(tree, name.split("."))
        if match is None:
            left.append(name)
            continue
        row, words = match
        for target, source in zip(row.targets, row.operation(tensor, len(row.targets)), strict=True):
            converted.append(tensor._replace(name=target.replace("*", "{}").format(*words), source=source))
    return converted, left


# A tree of the words of names: each node has its branches by word, and what no word can be by these.
_Tree = dict[Any, Any]
_NUMBER, _WORD, _ROW = range(3)
_HOLES = {"{}": _NUMBER, "*": _WORD}


def _tree_of(rows: Iterable[WeightConverter]) -> _Tree:
    tree: _Tree = {}
    for row in rows:
        node = tree
        for word in row.source.split("."):
            node = node.setdefault(_HOLES.get(word, word), {})
        node[_ROW] = row
    return tree


def _match(node: _Tree, words: list[str], at: int = 0, filled: tuple[str, ...] = ()) -> Any:
    """Find the row for a name's words from ``at`` on, and give it with those that stand in its holes; or None."""
    if at == len(words):
        return (node[_ROW], filled) if _ROW in node else None
    word = words[at]
    match = _match(node[word], words, at + 1, filled) if word in node else None
    if match is None and _NUMBER in node and word.isascii() and word.isdecimal():
        match = _match(node[_NUMBER], words, at + 1, (*filled, word))
    if match is None and _WORD in node and word:
        match = _match(node[_WORD], words, at + 1, (*filled, word))
    return match

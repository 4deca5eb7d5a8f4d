"""What the shapes of a model's tensors say of its config, asked with a line for what is not there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from converter.errors import BadFile, BadRequest, Where, name_some
from converter.transforms.layouts.rows import Row

Config = Mapping[str, Any]
"""A config.json."""
Shapes = dict[str, tuple[int, ...]]
"""The shapes of tensors by their names."""

_FETCH = "Fetch all of it."
MAX_BLOCKS = 64
"""More than any model has: a table has rows for each tensor of each block."""


class Sizes(NamedTuple):
    """The shapes of a model's tensors by their names in its own layout, and the file that they are of."""

    where: Where
    shapes: Mapping[str, tuple[int, ...]]

    def has(self, name: str) -> bool:
        """Say whether there is such a tensor."""
        return name in self.shapes

    def axis(self, name: str, at: int) -> int:
        """Give the length of an axis. Raises BadFile for no such tensor, or none with such an axis."""
        shape = self.shapes.get(name)
        if shape is None:
            raise BadFile(self.where, f"lacks {name!r}, without which it is no whole model", _FETCH)
        if len(shape) <= at or not shape[at]:
            raise BadFile(self.where, f"holds {name!r}, which is no weight: its shape is {list(shape)}")
        return shape[at]

    def count(self, stem: str) -> int:
        """Give how many blocks there are, by the highest number behind ``stem.``; BadFile for none or too many."""
        prefix = f"{stem}."
        words = {name.removeprefix(prefix).partition(".")[0] for name in self.shapes if name.startswith(prefix)}
        numbers = [word for word in words if word.isascii() and word.isdecimal()]
        if not numbers:
            raise BadFile(self.where, f"lacks {prefix + '0'!r}, without which it is no whole model", _FETCH)
        last = max(numbers, key=len)
        if len(last) > 4 or max(map(int, numbers)) >= MAX_BLOCKS:
            raise BadFile(self.where, f"numbers its {stem} up to {last} and on, and no model has so many")
        return 1 + max(map(int, numbers))

    def ratio(self, what: str, whole: int, part: int) -> int:
        """Give how many parts of a size make a whole. Raises BadRequest where none do: it is another kind of model."""
        if whole % part:
            raise self.unknown(f"its {what}: {whole} is no multiple of {part}, as it is of all published ones")
        return whole // part

    def root(self, name: str, at: int) -> int:
        """Give the side of a square of as many places as an axis has. Raises BadFile for what is no square."""
        length = self.axis(name, at)
        side = math.isqrt(length)
        if side * side != length:
            raise BadFile(self.where, f"holds {name!r}, which is for no square: it has {length:,} places")
        return side

    def check(self, rows: Iterable[Row]) -> None:
        """Raise BadFile where a tensor of a table without holes is missing, under all names that it has there."""
        rows = list(rows)
        made = {part for row in rows if row.whole in self.shapes for part in row.parts}
        lacking = list(
            {row.parts: repr(row.whole) for row in reversed(rows) if not made.issuperset(row.parts)}.values()
        )
        if lacking:
            problem = f"lacks {name_some(lacking[::-1], 2)}, without which it is no whole model"
            raise BadFile(self.where, problem, _FETCH)

    def unknown(self, what: str) -> BadRequest:
        """Give the error for what names and shapes do not say."""
        return BadRequest(self.where, f"does not say {what}", "Give the folder of a pipeline of its kind: --config.")


def linears(modules: Mapping[str, tuple[int, ...]]) -> Shapes:
    """Give the shapes of weights and biases of modules by their outputs, inputs and what else their weights have."""
    weights = {f"{name}.weight": shape for name, shape in modules.items()}
    biases = {f"{name}.bias": shape[:1] for name, shape in modules.items()}
    return {**weights, **biases}

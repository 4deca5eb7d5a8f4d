"""Which elements of the ranks' runs make a parameter: end to end at stages 1 and 2, cut over all ranks at stage 3."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, chain

from converter.dtypes import DType
from converter.errors import BadFile, Unsupported
from converter.formats.trained import pieces
from converter.formats.trained.zero.states import SCRIPT, Head, Optimizer
from converter.tensors.base import TensorSource
from converter.tensors.derived import Box, Boxes
from converter.tensors.view import View, contiguous_strides

MAX_BOXES = 2_000_000  # of all parameters, each 200 bytes: 18,000 parameters (of 128 experts) on 100 ranks


class Line:
    """Tensors of one axis, end to end."""

    def __init__(self, sources: Iterable[TensorSource]) -> None:
        self._sources = tuple(sources)
        self._ends = tuple(accumulate(source.shape[0] for source in self._sources))
        self.length = self._ends[-1] if self._ends else 0

    def cut(self, begin: int, end: int, at: int = 0) -> Iterator[Box]:
        """Give what lies between two places, to be put together from ``at`` on."""
        for place in range(bisect_right(self._ends, begin), len(self._ends)):
            if begin >= end:
                return
            source = self._sources[place]
            inner, count = begin - self._ends[place] + source.shape[0], min(end, self._ends[place]) - begin
            if count:
                yield Box(_axis(at), source.box((inner,), _axis(count)))
            begin, at = begin + count, at + count


@lru_cache(1 << 16)  # ranks have parts of one length at the same places of many parameters, and share these
def _axis(number: int) -> tuple[int]:
    """Give the shape, or the begin, of what has one axis."""
    return (number,)


def cut_groups(head: Head, ranks: Sequence[Optimizer]) -> Iterator[tuple[str, TensorSource]]:
    """Give the parameters of stages 1 and 2: each rank's run of a group follows that of the rank before.

    ``_zero2_merge_trainable_params`` of ``zero_to_fp32.py``.
    """
    count, groups, paddings = len(ranks), ranks[0].groups, ranks[0].paddings
    if len(head.groups) != len(groups) or (paddings is not None and [*map(len, paddings)] != [*map(len, head.groups)]):
        problem = f"does not hold the groups of parameters that {head.place.name} describes"
        raise BadFile(ranks[0].place, problem, pieces.MIXED)
    for index, shapes in enumerate(head.groups):
        line = Line(rank.groups[index] for rank in ranks)
        at = 0
        for place, (name, shape) in enumerate(shapes.items()):
            end = at + math.prod(shape)
            if end > line.length:
                raise _too_short(head, name, ranks)
            yield name, unflatten(ranks[0].dtype, shape, line.cut(at, end))
            at = end + (paddings[index][place] if paddings else 0)
        if -(-at // (2 * count)) != -(-line.length // (2 * count)):
            raise _too_long(head, line.length, at, ranks)


def cut_parameters(head: Head, ranks: Sequence[Optimizer]) -> Iterator[tuple[str, TensorSource]]:
    """Give the parameters of stage 3: each is cut over all ranks, the last of which may have padding.

    ``_zero3_merge_trainable_params`` of ``zero_to_fp32.py``.
    """
    count = len(ranks)
    lines = [Line(rank.groups) for rank in ranks]
    shapes = [item for group in head.groups for item in group.items()]
    if (len(shapes) + len(head.frozen)) * count > MAX_BOXES:
        problem = f"describes {len(shapes):,} parameters cut over {count:,} ranks, which is too much to hold"
        raise Unsupported(head.place, problem, SCRIPT)
    at = 0
    for name, shape in shapes:
        numel = math.prod(shape)
        each = -(-numel // count)
        if at + each > lines[0].length:
            raise _too_short(head, name, ranks)
        parts = (line.cut(at, at + min(each, numel - begin), begin)
                 for begin, line in zip(range(0, numel, each or 1), lines, strict=False))  # fmt: skip
        yield name, unflatten(ranks[0].dtype, shape, chain.from_iterable(parts))
        at += each
    if at != lines[0].length:
        raise _too_long(head, lines[0].length, at, ranks)


def _too_short(head: Head, name: str, ranks: Sequence[Optimizer]) -> BadFile:
    problem = f"describes the parameter {name!r}, and the groups of {ranks[0].place.name} end before it does"
    return BadFile(head.place, problem, pieces.MIXED)


def _too_long(head: Head, length: int, at: int, ranks: Sequence[Optimizer]) -> BadFile:
    problem = f"describes {at:,} elements of a group, and there are {length:,} from {ranks[0].place.name} on"
    return BadFile(head.place, problem, pieces.MIXED)


def unflatten(dtype: DType, shape: tuple[int, ...], parts: Iterable[Box]) -> TensorSource:
    """Give a parameter of its parts, of which each is a box of the flattened whole."""
    boxes = tuple(parts)
    if len(boxes) == 1 and type(boxes[0].source) is View and boxes[0].source.is_contiguous:
        return boxes[0].source._replace(shape=shape, strides=contiguous_strides(shape))
    return Boxes(dtype, shape, boxes)

"""How a tensor of the one layout is made of those of the other, and these of it: views and concatenations of bytes.

An operation is a small value with two methods that undo each other. None looks at a number.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from converter.errors import BadFile, spell_shape
from converter.tensors.base import Tensor, TensorSource
from converter.tensors.derived import Box, Boxes
from converter.tensors.shaped import Shuffled, reshaped


class Operation(Protocol):
    """What takes a whole apart, and puts it together again. Both raise BadFile for shapes that cannot be."""

    def count(self, whole: Tensor, parts: int) -> int:
        """Give how many times ``parts`` a whole has, where names count."""

    def apart(self, whole: Tensor, count: int) -> Sequence[TensorSource]:
        """Give the ``count`` parts of a whole, in order."""

    def together(self, parts: Sequence[Tensor]) -> TensorSource:
        """Give the whole of parts, in order."""


class _Uncounted:
    """What has the parts that its row names."""

    __slots__ = ()

    def count(self, whole: Tensor, parts: int) -> int:
        return 1


@dataclass(frozen=True, slots=True)
class Lone(_Uncounted):
    """What has one part: by itself it is that, under another name."""

    def apart(self, whole: Tensor, count: int) -> Sequence[TensorSource]:
        return (whole.source,)

    def together(self, parts: Sequence[Tensor]) -> TensorSource:
        [part] = parts
        return part.source


class Transpose(Lone):
    """Its axes turned round. It is undone by itself."""

    def apart(self, whole: Tensor, count: int) -> Sequence[TensorSource]:
        return (_turned(whole),)

    def together(self, parts: Sequence[Tensor]) -> TensorSource:
        [part] = parts
        return _turned(part)


class Pixel(Lone):
    """A convolution of one pixel, [out, in, 1, 1], whose part is a matrix, [out, in]."""

    def apart(self, whole: Tensor, count: int) -> Sequence[TensorSource]:
        shape = whole.shape
        is_pixel = len(shape) > 2 and set(shape[2:]) == {1}
        return (reshaped(whole.source, whole.dtype, shape[:2]) if is_pixel else whole.source,)

    def together(self, parts: Sequence[Tensor]) -> TensorSource:
        [part] = parts
        is_matrix = len(part.shape) == 2
        return reshaped(part.source, part.dtype, (*part.shape, 1, 1)) if is_matrix else part.source


class Swap(Lone):
    """Its halves along the first axis the other way round, as scale and shift are. It is undone by itself."""

    def apart(self, whole: Tensor, count: int) -> Sequence[TensorSource]:
        return (self._swapped(whole),)

    def together(self, parts: Sequence[Tensor]) -> TensorSource:
        [part] = parts
        return self._swapped(part)

    def _swapped(self, tensor: Tensor) -> TensorSource:
        first, second = _cut(tensor, (1, 1))
        return _joined(tensor, (second, first))


@dataclass(frozen=True, slots=True)
class Rotary(Lone):
    """Rows of queries or keys in the order of their rotation, of ``heads``: in pairs, and in halves as its part.

    Meta's ``apply_rotary_emb`` has pairs, ``rotate_half`` of transformers halves (``permute`` in
    ``transformers/models/llama/convert_llama_weights_to_hf.py``).
    """

    heads: int

    def apart(self, whole: Tensor, count: int) -> Sequence[TensorSource]:
        return (self._shuffled(whole, 2),)

    def together(self, parts: Sequence[Tensor]) -> TensorSource:
        [part] = parts
        half = part.shape[0] // self.heads // 2 if part.shape else 0
        return self._shuffled(part, half)

    def _shuffled(self, tensor: Tensor, stride: int) -> TensorSource:
        rows = tensor.shape[0] if tensor.shape else 1
        if rows % (2 * self.heads):
            shape = spell_shape(tensor.shape)
            raise BadFile(
                tensor.where, f"holds {tensor.name!r}, which is no {self.heads} heads of pairs: it is {shape}"
            )
        return Shuffled(tensor.source, rows // self.heads, stride)


@dataclass(frozen=True, slots=True)
class Concat(_Uncounted):
    """Parts one behind the other along the first axis; ``ratios`` says how long each is, if not all the same."""

    ratios: tuple[int, ...] = ()

    def apart(self, whole: Tensor, count: int) -> Sequence[TensorSource]:
        return _cut(whole, self.ratios or (1,) * count)

    def together(self, parts: Sequence[Tensor]) -> TensorSource:
        ratios = self.ratios or (1,) * len(parts)
        first = parts[0]
        for part, ratio in zip(parts, ratios, strict=True):
            if not part.shape or (part.shape[0] * ratios[0], *part.shape[1:]) != (
                first.shape[0] * ratio,
                *first.shape[1:],
            ):
                raise _misfit(first, part)
        return _joined(first, [part.source for part in parts], parts)


@dataclass(frozen=True, slots=True)
class Stack:
    """Parts one behind the other along a new first axis, ``each`` of them joined along their first one: [n, rows, ...].

    So are experts fused: of each the rows of its gate, then those of its other projection.
    """

    each: int = 1

    def count(self, whole: Tensor, parts: int) -> int:
        if len(whole.shape) < 2:
            shape = spell_shape(whole.shape)
            raise BadFile(whole.where, f"holds {whole.name!r}, which is no stack of tensors: it is {shape}")
        return whole.shape[0]

    def apart(self, whole: Tensor, count: int) -> Sequence[TensorSource]:
        length, rows, *others = whole.shape
        if rows % self.each:
            raise _uneven(whole, self.each)
        part = (rows // self.each, *others)
        starts = ((at, row) for at in range(length) for row in range(0, rows, part[0] or 1))
        zeros = (0,) * len(others)
        boxes = (whole.source.box((*start, *zeros), (1, *part)) for start in starts)
        return [reshaped(box, whole.dtype, part) for box in boxes]

    def together(self, parts: Sequence[Tensor]) -> TensorSource:
        first = parts[0]
        for part in parts:
            if not part.shape or part.shape != first.shape:
                raise _misfit(first, part)
        flat = _joined(first, [part.source for part in parts], parts)
        rows, *others = first.shape
        return reshaped(flat, first.dtype, (len(parts) // self.each, self.each * rows, *others))


KEEP = Lone()
TRANSPOSE = Transpose()
PIXEL = Pixel()
SWAP = Swap()
CONCAT = Concat()


def _turned(tensor: Tensor) -> TensorSource:
    return tensor.source.permuted(tuple(reversed(range(len(tensor.shape)))))


def _cut(tensor: Tensor, ratios: Sequence[int]) -> list[TensorSource]:
    """Cut a tensor along its first axis, into parts whose lengths are in these ratios."""
    length, *others = tensor.shape or (1,)
    unit, rest = divmod(length, sum(ratios))
    if rest or not tensor.shape:
        raise _uneven(tensor, sum(ratios))
    starts = itertools.accumulate(ratios, initial=0)
    return [
        tensor.source.box((start * unit, *(0 for _ in others)), (ratio * unit, *others))
        for start, ratio in zip(starts, ratios, strict=False)
    ]


def _joined(first: Tensor, sources: Iterable[TensorSource], parts: Sequence[Tensor] = ()) -> TensorSource:
    """Put sources together along their first axis; ``parts`` are the tensors that they are of, for what is said."""
    sources = list(sources)
    for part in parts:
        if part.dtype is not first.dtype:
            problem = f"holds {first.name!r} in {first.dtype.short_name} and {part.name!r} in {part.dtype.short_name}"
            raise BadFile(
                part.where, f"{problem}, which are one tensor in the other layout", "Recast them first: --dtype."
            )
    if len(sources) == 1:
        return sources[0]
    starts = itertools.accumulate((source.shape[0] for source in sources), initial=0)
    others = sources[0].shape[1:]
    boxes = [Box((start, *(0 for _ in others)), source) for start, source in zip(starts, sources, strict=False)]
    return Boxes(first.dtype, (sum(source.shape[0] for source in sources), *others), tuple(boxes))


def _misfit(first: Tensor, part: Tensor) -> BadFile:
    whole, other = (f"{one.name!r} of {spell_shape(one.shape)}" for one in (first, part))
    return BadFile(part.where, f"holds {whole} and {other}, which do not fit into one tensor")


def _uneven(tensor: Tensor, count: int) -> BadFile:
    shape = spell_shape(tensor.shape)
    return BadFile(tensor.where, f"holds {tensor.name!r}, which cannot be cut in {count}: it is {shape}")

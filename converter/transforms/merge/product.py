"""Weights with what LoRAs add to them: ``W + weight * alpha / r * B @ A``, in float32, rounded once."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from converter.dtypes import DTYPES
from converter.errors import BadFile
from converter.tensors.base import ByteRange, Reader, Storage, Tensor, TensorSource
from converter.tensors.derived import Box, Boxes, Constant, held
from converter.tensors.shaped import Unboxed, reshaped
from converter.transforms.quantize.codes import Numbers, Widened

_F32 = DTYPES["F32"]
_NBYTES = 4  # of a number
_BLOCK = 1 << 16  # numbers that are computed together: half a MB with what they are added to
_MOST_ROWS = 64  # of a block of long ones: more are no faster
_MOST = 1 << 21  # numbers of a block
_GRAINS = 4  # blocks that are read together
_KEPT_NBYTES = 1 << 23  # of the left factor
MAX_RIGHT_NBYTES = 1 << 28
"""Of all right factors of one weight, which are held while it is written; those of rank 1,024 have a half at most."""


@dataclass(frozen=True, slots=True)
class Factor(Widened):
    """One of the two factors of a LoRA in float32, times ``scale``; ``name`` is its tensor's.

    Raises BadFile, when it is read, for what is NaN, infinite, or so large that a product would be.
    """

    name: str
    scale: float = 1.0

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        from converter.transforms.merge.kernels import scale_factor

        Widened.read(self, begin, out, reader)
        if not scale_factor(out, self.scale):
            problem = f"has NaN, infinity or a number above 1e15 in {self.name!r}, and a merge would spread it"
            raise BadFile(Tensor(self.name, self.source).where, problem, "Take another checkpoint of its training.")


class Product(NamedTuple):
    """What is added to a weight, as two matrices: ``left`` has a row for each of its rows, ``right`` all columns."""

    left: TensorSource
    right: TensorSource


@dataclass(frozen=True, slots=True)
class Merged(Unboxed, Numbers):
    """A weight in float32 plus the product of two matrices; all axes but the first are the columns.

    It is computed in blocks of whole rows, counted from its first, so that each number is the same however it is cut.
    ``span`` is what is needed of ``left``, in bytes.
    """

    left: TensorSource
    right: TensorSource
    span: tuple[int, int] | None = None

    @property
    def _matrix(self) -> tuple[int, int]:
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def _rank(self) -> int:
        return self.right.shape[0]

    @property
    def _block(self) -> int:
        """The rows of a block."""
        width = self._matrix[1]
        return max(1, min(max(_BLOCK // width, min(_MOST_ROWS, self._rank)), _MOST // width))

    @property
    def grain(self) -> int:
        if self.source.grain > 1:
            return self.source.grain
        numbers = self._block * self._matrix[1]
        return numbers * _NBYTES if numbers <= _MOST else 1

    @property
    def window(self) -> int:
        numbers = self._block * self._matrix[1]
        together = _GRAINS * numbers * _NBYTES if numbers <= _MOST else 1
        return max(self.source.window, self.left.window, together)

    @property
    def kept_nbytes(self) -> int:
        kept = (self.source.kept_nbytes, self.left.kept_nbytes, self.right.kept_nbytes)
        return sum(kept) + _nbytes_of(self.right) + min(_KEPT_NBYTES, _nbytes_of(self.left))

    def inputs(self) -> tuple[Storage, ...]:
        return (*self.source.inputs(), *self.left.inputs(), *self.right.inputs())

    def extents(self, begin: int, end: int) -> Iterator[ByteRange]:
        yield from self.right.extents(0, _nbytes_of(self.right))
        yield from self.left.extents(*self._span(begin, end))
        yield from self.source.extents(begin, end)

    def part(self, begin: int, end: int) -> Merged:
        return replace(self, source=self.source.part(begin, end), span=self._span(begin, end))

    def _span(self, begin: int, end: int) -> tuple[int, int]:
        """Give the bytes of the left factor for the blocks that some bytes here lie in."""
        height, width = self._matrix
        row, block = width * _NBYTES, self._block
        first, last = begin // row // block * block, -(-end // (row * block)) * block
        return first * self._rank * _NBYTES, min(height, last) * self._rank * _NBYTES

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        from converter.transforms.merge.kernels import TILE, add_product

        self.source.read(begin, out, reader)
        (height, width), rank, block = self._matrix, self._rank, self._block
        right = reader.kept(self.right, 0, _nbytes_of(self.right))
        low, high = self.span or (0, _nbytes_of(self.left))
        if high - low > _KEPT_NBYTES:
            low, high = self._span(begin, begin + len(out))
        left = reader.kept(self.left, low, high)
        first, done = begin // _NBYTES, 0
        with reader.scratch(block * min(width, TILE) * _NBYTES) as room:
            while done < len(out):
                row = first // width // block * block
                rows = min(block, height - row)
                inside = first - row * width
                count = min(len(out) // _NBYTES - done // _NBYTES, rows * width - inside)
                at = row * rank * _NBYTES - low
                some = left[at : at + rows * rank * _NBYTES]
                add_product(out[done : done + count * _NBYTES], inside, (rows, width), some, right, room)
                first, done = first + count, done + count * _NBYTES


def merged(source: TensorSource, products: Sequence[Product]) -> Merged:
    """Give a weight plus some products of its shape, whose sums are taken in their order."""
    lefts, rights = [one.left for one in products], [one.right for one in products]
    rank = sum(one.shape[0] for one in rights)
    height, width = source.shape[0], math.prod(source.shape[1:])
    left, right = lefts[0], rights[0]
    if len(products) > 1:
        starts = [sum(one.shape[0] for one in rights[:place]) for place in range(len(rights))]
        left = Boxes(_F32, (height, rank), tuple(Box((0, at), one) for at, one in zip(starts, lefts, strict=True)))
        right = Boxes(_F32, (rank, width), tuple(Box((at, 0), one) for at, one in zip(starts, rights, strict=True)))
    return Merged(Widened(source), left, right)


def product_of(up: Tensor, down: Tensor, scale: float, is_turned: bool = False) -> Product:
    """Give ``scale * up @ down`` of a LoRA: [out, r, ...] and [r, in, ...]; ``is_turned`` for a weight of [in, out]."""
    rank = down.shape[0]
    (height, width) = (up.shape[0], math.prod(down.shape[1:]))
    left = Factor(reshaped(up.source, up.dtype, (height, rank)), up.name, scale)
    right = Factor(reshaped(down.source, down.dtype, (rank, width)), down.name)
    if is_turned:
        return Product(held(right.permuted((1, 0))), left.permuted((1, 0)))
    return Product(held(left), right)


def bias_of(bias: Tensor, scale: float) -> Product:
    """Give ``scale * bias``, a vector, as a product."""
    left = Factor(reshaped(bias.source, bias.dtype, (bias.numel, 1)), bias.name, scale)
    return Product(held(left), Constant(_F32, (1, 1), struct.pack("<f", 1.0)))


def right_nbytes(products: Sequence[Product]) -> int:
    """Say how many bytes are held of some products of one weight."""
    return sum(_nbytes_of(one.right) for one in products)


def _nbytes_of(source: TensorSource) -> int:
    return source.dtype.nbytes(math.prod(source.shape))

"""Codes of 3, 5, 6 or 7 bits, one right behind another, so that some lie in two words.

Of 32-bit words that hold a run of such codes, code ``i`` begins at bit ``i * bits``, from the lowest of the first word
on (``pack_to_int32`` in ``compressors/pack_quantized/helpers.py`` of compressed-tensors).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from converter.dtypes import DTYPES, DType
from converter.tensors.base import Reader, TensorSource
from converter.tensors.derived import Computed
from converter.transforms.quantize.codes import Coding, Decoded, Unboxed, in_bytes

_WORD = 4  # bytes
_TOGETHER = 32  # codes that fill as many words as they have bits


def unpacked(words: TensorSource, coding: Coding, shape: tuple[int, ...], axis: int) -> Decoded:
    """Give the numbers of a shape whose codes lie in 32-bit words along an axis: whole, or one right behind another."""
    if 8 * _WORD % coding.bits:
        return Decoded(Dense(words, coding.bits, shape, axis), in_bytes(coding), shape, axis)
    return Decoded(words, coding._replace(width=_WORD), shape, axis)


@dataclass(frozen=True, slots=True)
class Dense(Unboxed, Computed):
    """Codes that lie so along ``axis``, each as a byte of its own; ``of_shape`` is theirs.

    The source is the bytes of words in row-major order, along the axis as many as the codes need.
    """

    bits: int
    of_shape: tuple[int, ...]
    axis: int

    @property
    def dtype(self) -> DType:
        return DTYPES["U8"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of_shape

    @property
    def window(self) -> int:
        return self.source.window

    @property
    def grain(self) -> int:
        return 1 if self.source.grain == 1 else math.prod(self.shape)

    def _runs(self, first: int, count: int) -> Iterator[tuple[int, int, int, int]]:
        """Cut codes into runs of one row each: the run's first word and their number, codes to skip and to take.

        A row is all codes along the axis, with those that lie side by side.
        """
        inner = math.prod(self.shape[self.axis + 1 :])
        row = self.shape[self.axis] * inner
        row_words = -(-self.shape[self.axis] * self.bits // (8 * _WORD)) * inner
        unit, unit_words = _TOGETHER * inner, self.bits * inner
        end = first + count
        while first < end:
            index, inside = divmod(first, row)
            taken = min(end - first, row - inside)
            begin = inside // unit
            words = min(row_words, -(-(inside + taken) // unit) * unit_words) - begin * unit_words
            yield index * row_words + begin * unit_words, words, inside - begin * unit, taken
            first += taken

    def _below(self, begin: int, end: int) -> tuple[int, int]:
        runs = list(self._runs(begin, end - begin)) or [(0, 0, 0, 0)]
        return runs[0][0] * _WORD, (runs[-1][0] + runs[-1][1]) * _WORD

    def part(self, begin: int, end: int) -> Dense:
        source = self.source.part(*self._below(begin, end))
        return self if source is self.source else replace(self, source=source)

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        from converter.transforms.quantize.kernels import unpack_dense

        inner = math.prod(self.shape[self.axis + 1 :])
        done = 0
        for word, words, skipped, count in self._runs(begin, len(out)):
            with reader.scratch(words * _WORD) as chunk:
                self.source.read(word * _WORD, chunk, reader)
                unpack_dense(chunk, self.bits, inner, skipped, out[done : done + count])
            done += count

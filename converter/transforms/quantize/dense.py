"""Codes of 3, 5, 6 or 7 bits, one right behind another, so that some lie in two words.

Of 32-bit words that hold a run of such codes, code ``i`` begins at bit ``i * bits``, from the lowest of the first word
on (``pack_to_int32`` in ``compressors/pack_quantized/helpers.py`` of compressed-tensors).
"""

from __future__ import annotations

from dataclasses import dataclass

from converter.dtypes import DTYPES, DType
from converter.tensors.base import Reader, TensorSource
from converter.tensors.shaped import Unboxed
from converter.transforms.quantize.codes import Coding, Decoded, InWords, in_bytes

_WORD = 4  # bytes
_TOGETHER = 32  # codes that fill as many words as they have bits


def unpacked(words: TensorSource, coding: Coding, shape: tuple[int, ...], axis: int) -> Decoded:
    """Give the numbers of a shape whose codes lie in 32-bit words along an axis: whole, or one right behind another."""
    if 8 * _WORD % coding.bits:
        return Decoded(Dense(words, coding.bits, shape, axis), in_bytes(coding), shape, axis)
    return Decoded(words, coding._replace(width=_WORD), shape, axis)


@dataclass(frozen=True, slots=True)
class Dense(Unboxed, InWords):
    """Codes that lie so, each as a byte of its own."""

    bits: int
    of_shape: tuple[int, ...]
    axis: int

    @property
    def dtype(self) -> DType:
        return DTYPES["U8"]

    @property
    def _unit(self) -> tuple[int, int, int]:
        return _TOGETHER, self.bits, _WORD

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        from converter.transforms.quantize.kernels import unpack_dense

        done = 0
        for at, nbytes, skipped, count in self._runs(begin, len(out)):
            with reader.scratch(nbytes) as chunk:
                self.source.read(at, chunk, reader)
                unpack_dense(chunk, self.bits, self._inner, skipped, out[done : done + count])
            done += count

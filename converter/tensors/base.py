"""What there is to know about a tensor but its values, and where its bytes lie.

Every format ends here: a torch storage and the data range of a safetensors file are both a ``ByteRange``, and a
tensor is a view of one. Offsets are in bytes, ``start`` and ``strides`` in elements, as in torch.

What exists once a tensor is a NamedTuple here and elsewhere: a frozen dataclass takes three times as long to make.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from converter.dtypes import DType
from converter.storage import FileRef, Place

# Of one file, and of one set: the largest models have 208,000. Each takes 2 kB and 40 µs until it is written.
MAX_TENSORS = 220_000
MAX_DIMS = 100  # no weights have a tenth of it, and numbers of elements stay short
MAX_NAME = 1_000  # real ones have up to 200 characters; patterns that are searched in them take the square


class ByteRange(NamedTuple):
    """``nbytes`` bytes at ``offset`` of a file, all of whose ranges share one FileRef.

    ``crc32`` is what they should give, if that is known. With ``packed_nbytes`` they are deflated, and take so many
    bytes of the file. With a ``swap`` of more than 1 each so many bytes are to be turned around: the numbers are
    big-endian. ``content`` is what stands in no file: then ``file`` only says whose it is.
    """

    file: FileRef
    offset: int
    nbytes: int
    crc32: int | None = None
    packed_nbytes: int | None = None
    swap: int = 1
    content: bytes | None = None


class TensorInfo(NamedTuple):
    """A tensor named ``name``: a strided view of a storage. Tensors with the same storage may share memory.

    ``negated`` says whose sign is to be turned (the bits of torch's lazy views): 1 the real part's, 2 the imaginary
    part's, 3 both.

    ``target`` is the dtype in which the tensor is written whatever dtype is asked for. ``scales`` are float32 numbers,
    one for each row of a matrix that goes to int8 or comes from it: the largest magnitude of the row, which is 127;
    with ``scaled_axis`` 1, for a matrix that is turned, one for each column.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    storage: ByteRange
    start: int
    strides: tuple[int, ...]
    negated: int = 0
    target: DType | None = None
    scales: bytes = b""
    scaled_axis: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the tensor's own elements, as they are written out."""
        return self.dtype.nbytes(math.prod(self.shape))

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in row-major order with no gaps (torch's ``is_contiguous``)."""
        return _is_contiguous(self.shape, self.strides)

    @property
    def span(self) -> int:
        """The number of elements from the first to the last that the tensor touches, both included."""
        if self.is_contiguous:
            return self.numel
        return 1 + sum((length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True))


def turned(info: TensorInfo) -> TensorInfo:
    """Give a matrix transposed: the same bytes, seen the other way."""
    return info._replace(shape=info.shape[::-1], strides=info.strides[::-1])


@lru_cache(1024)  # most tensors have one of a few shapes
def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Give the row-major strides of a shape, in elements.

    >>> contiguous_strides((2, 3, 4))
    (12, 4, 1)
    """
    strides = []
    step = 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(length, 1)
    return tuple(reversed(strides))


@lru_cache(1024)
def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    # Axes of length 1 may carry any stride, and an empty tensor any strides at all.
    if 0 in shape:
        return True
    step = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1:
            if stride != step:
                return False
            step *= length
    return True


def find_ties(tensors: Iterable[TensorInfo]) -> dict[str, str]:
    """Map each name whose tensor is the very same view as an earlier one to that earlier name.

    Only an equal storage, start, dtype, shape and strides make a tie: a view that merely overlaps another is a
    tensor of its own. Empty tensors are never tied, and neither are those that stand in no file.
    """
    first: dict[tuple[object, ...], str] = {}
    ties: dict[str, str] = {}
    for info in tensors:
        storage = info.storage
        if 0 in info.shape or storage.content is not None:
            continue
        key = (storage.file, storage.offset, info.start, info.dtype.rank, info.shape, info.strides, info.negated)
        kept = first.setdefault(key, info.name)
        if kept != info.name:
            ties[info.name] = kept
    return ties


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """What the header of one weight file says. ``tensors`` are in file order; a header's own notes are ``metadata``.

    ``notes`` are worth a user's look. ``foreign`` are the globals that a pickle has to do with, though no state dict
    needs them: it ``names``, ``makes`` objects of or ``calls`` them.
    """

    place: Place
    format: str
    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    notes: tuple[str, ...] = ()
    foreign: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tensors of a file to be written go: ``order`` are places in the list that was asked about.

    ``offsets`` (in bytes, of each in that order) are from the start of the file, which ``header`` begins.
    """

    header: bytes
    order: tuple[int, ...]
    offsets: tuple[int, ...]
    nbytes: int


Described = tuple[str, DType, tuple[int, ...]]
"""Name, dtype and shape of a tensor to be written."""

"""What a tensor is: a name and a source of bytes; and where those bytes lie.

A source is a small frozen value that can be pickled: a view of a file (``view``), or made of others (``derived``). It
is read by ranges of its own bytes, which are its elements in row-major order; whoever reads need not know what it is.
Every format ends here: a torch storage and the data range of a safetensors file are both a ``ByteRange``.

What exists once a tensor is a NamedTuple here and elsewhere: a frozen dataclass takes three times as long to make.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, NamedTuple, Protocol, TypeVar

from converter.dtypes import DType
from converter.storage import FileRef, Place

# Of one file, and of one set: the largest models have 208,000. Each takes 2 kB and 40 µs until it is written.
MAX_TENSORS = 220_000
MAX_DIMS = 100  # no weights have a tenth of it, and numbers of elements stay short
MAX_NAME = 1_000  # real ones have up to 200 characters; patterns that are searched in them take the square
_MAX_REMEMBERED = 1_024

_T = TypeVar("_T")


def remembered(make: Callable[..., _T]) -> Callable[..., _T]:
    """Keep what a function of shapes and the like gives, for when it is asked again: most tensors have one of a few.

    It is looked up by text. Of numbers a file could choose such as all hash alike, and each look into a cache would
    compare all of them.
    """
    kept: dict[str, _T] = {}

    @wraps(make)
    def look(*arguments: Any) -> _T:
        text = str(arguments)
        found = kept.get(text)
        if found is None:
            if len(kept) >= _MAX_REMEMBERED:
                kept.clear()
            found = kept[text] = make(*arguments)
        return found

    return look


class ByteRange(NamedTuple):
    """``nbytes`` bytes at ``offset`` of a file; ``crc32`` is what they should give, if that is known.

    The ``lead`` bytes before are the header that says that they begin there, where nobody has looked at it yet.
    """

    file: FileRef
    offset: int
    nbytes: int
    crc32: int | None = None
    lead: int = 0

    @property
    def stored_nbytes(self) -> int:
        """The bytes that it takes of its file."""
        return self.nbytes


class PackedRange(NamedTuple):
    """``nbytes`` bytes that lie deflated in ``stored_nbytes`` bytes at ``offset`` of a file; ``crc32`` is theirs."""

    file: FileRef
    offset: int
    nbytes: int
    crc32: int | None
    stored_nbytes: int

    @property
    def lead(self) -> int:
        """None: where a packed record begins is looked up when its archive is opened."""
        return 0


Storage = ByteRange | PackedRange


class Reader(Protocol):
    """What sources are read through, for one task; ``too_large`` counts the values that a cast could not hold."""

    too_large: int

    def read_into(self, record: Storage, begin: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes from ``begin`` of a range on. Raises BadFile for one that is not as it was.

        Whoever reads from its very begin has its ``lead`` looked at.
        """

    def check_begin(self, record: Storage) -> None:
        """Look at the ``lead`` of a range, of which other parts are read. Raises BadFile where it begins elsewhere."""

    def announce(self, record: Storage, begin: int, nbytes: int) -> None:
        """Say that a part of a range is read next, in small parts."""

    def kept(self, source: TensorSource, begin: int, end: int) -> memoryview:
        """Give bytes of a source that many parts of another need: it is read when it is first asked for."""

    def scratch(self, nbytes: int) -> AbstractContextManager[memoryview]:
        """Give room to work in, for as long as the context is open; what it holds at first is anything."""


class TensorSource(Protocol):
    """A tensor's bytes, wherever they come from. Positions are in bytes of its own, in row-major order.

    ``grain`` is how many bytes one task should read, if not any number; ``window`` how many at a time, at least, or it
    takes far longer; ``kept_nbytes`` what the reader keeps meanwhile. ``computes`` says that its numbers are others
    than those that lie in a file.
    """

    @property
    def dtype(self) -> DType: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def grain(self) -> int: ...
    @property
    def window(self) -> int: ...
    @property
    def kept_nbytes(self) -> int: ...
    @property
    def computes(self) -> bool: ...

    def inputs(self) -> tuple[Storage, ...]:
        """Give the ranges of files that it reads; none for what stands in no file."""

    def extents(self, begin: int, end: int) -> Iterator[ByteRange]:
        """Give the parts of files that its bytes ``begin`` to ``end`` are read from, in order, where that is known."""

    def verbatim(self, begin: int, end: int) -> ByteRange | None:
        """Give where its bytes from ``begin`` on, up to ``end`` or fewer, lie in a file as they are.

        None where they have to be read.
        """

    def part(self, begin: int, end: int) -> TensorSource:
        """Give what reads the same from ``begin`` to ``end``, without what only the rest needs."""

    def box(self, start: tuple[int, ...], shape: tuple[int, ...]) -> TensorSource:
        """Give the box of a shape that begins at ``start``, in elements along each axis."""

    def permuted(self, axes: tuple[int, ...]) -> TensorSource:
        """Give the same with its axes in this order; one of length 1 may be left out."""

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        """Fill ``out``, some whole elements, with the bytes from ``begin`` on."""


class Tensor(NamedTuple):
    """A tensor: its name, and where its bytes come from; ``beside`` names the one whose file it must lie in."""

    name: str
    source: TensorSource
    beside: str = ""

    @property
    def dtype(self) -> DType:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def numel(self) -> int:
        return math.prod(self.source.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of its elements, as they are written."""
        source = self.source
        return source.dtype.nbytes(math.prod(source.shape))

    @property
    def spec(self) -> TensorSpec:
        """It as a header describes it."""
        return TensorSpec(self.name, self.source.dtype, self.source.shape)

    @property
    def is_made(self) -> bool:
        """Whether it is the work of a transform, and in its right dtype for that: computed, or in no file at all."""
        source = self.source
        return source.computes or not (source.inputs() or 0 in source.shape)

    @property
    def file(self) -> Place | None:
        """The first file that it is read from, if any."""
        inputs = self.source.inputs()
        return inputs[0].file.place if inputs else None

    @property
    def where(self) -> Place | str:
        """What to name in a message about it: its file, or itself."""
        return self.file or repr(self.name)


def find_ties(tensors: Iterable[Tensor]) -> dict[str, str]:
    """Map each name whose tensor is the very same source as an earlier one's to that earlier name.

    Only an equal storage, start, dtype, shape and strides make a tie: a view that merely overlaps another is a
    tensor of its own. Empty tensors are never tied, and neither are those that stand in no file.
    """
    first: dict[TensorSource, str] = {}
    ties: dict[str, str] = {}
    for tensor in tensors:
        if 0 in tensor.source.shape or not tensor.source.inputs():
            continue
        kept = first.setdefault(tensor.source, tensor.name)
        if kept != tensor.name:
            ties[tensor.name] = kept
    return ties


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """What the header of one weight file says. ``tensors`` are in file order; a header's own notes are ``metadata``.

    ``notes`` are worth a user's look. ``foreign`` are the globals that a pickle has to do with, though no state dict
    needs them: it ``names``, ``makes`` objects of or ``calls`` them. ``data_nbytes`` are all bytes after a header that
    nothing but tensors follows, one after the other.
    """

    place: Place
    format: str
    tensors: tuple[Tensor, ...]
    metadata: Mapping[str, str]
    notes: tuple[str, ...] = ()
    foreign: Mapping[str, str] = field(default_factory=dict)
    data_nbytes: int | None = None


class TensorSpec(NamedTuple):
    """A tensor to be written, as a header describes it."""

    name: str
    dtype: DType
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tensors of a file to be written go: ``order`` are places in the list that was asked about.

    ``offsets`` (in bytes, of each in that order) are from the start of the file, which ``header`` begins.
    """

    header: bytes
    order: tuple[int, ...]
    offsets: tuple[int, ...]
    nbytes: int

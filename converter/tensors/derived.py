"""Tensors that are made of others, or of nothing: each reads its own inputs, so they nest in any order.

A box of one, or one with other axes, is made of a box of its input, down to the views, which need just other numbers.
What changes only bits is done here; what rounds or computes is in ``kernels``.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from converter.dtypes import DType, OnOverflow
from converter.errors import BadFile
from converter.tensors.base import ByteRange, Reader, Storage, Tensor, TensorSource
from converter.tensors.view import GATHER_NBYTES, blocks_of, contiguous_strides

if TYPE_CHECKING:
    import numpy as np

_D = TypeVar("_D", bound="Derived")
_U = TypeVar("_U", bound="Unfiled")
# What is looked at to see that boxes lie apart: of each so many times, and of few ones all pairs.
_LOOKS = 16
_MORE_LOOKS = 100_000
_WHOLE = 16  # bytes: windows hold whole elements
OF_ONE_STEP = "All ranks have to be of one step of one training: fetch them again."


class Unfiled:
    """What stands in no file."""

    __slots__ = ()
    grain = 1
    window = 1
    kept_nbytes = 0
    computes = False

    def inputs(self) -> tuple[Storage, ...]:
        return ()

    def extents(self, begin: int, end: int) -> Iterator[ByteRange]:
        return iter(())

    def verbatim(self, begin: int, end: int) -> None:
        return None

    def part(self: _U, begin: int, end: int) -> _U:
        return self


@dataclass(frozen=True, slots=True)
class Constant(Unfiled):
    """A tensor that stands in no file: its bytes are known."""

    dtype: DType
    shape: tuple[int, ...]
    content: bytes

    def box(self, start: tuple[int, ...], shape: tuple[int, ...]) -> Constant:
        cut = self._bits()[tuple(slice(at, at + length) for at, length in zip(start, shape, strict=True))]
        return Constant(self.dtype, shape, cut.tobytes())

    def permuted(self, axes: tuple[int, ...]) -> Constant:
        left_out = [axis for axis in range(len(self.shape)) if axis not in axes]
        turned = self._bits().transpose(*axes, *left_out)
        return Constant(self.dtype, turned.shape[: len(axes)], turned.tobytes())

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        out[:] = self.content[begin : begin + len(out)]

    def _bits(self) -> np.ndarray[Any, Any]:
        import numpy as np

        return np.frombuffer(self.content, f"u{self.dtype.itemsize}").reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Zeros(Unfiled):
    """Nothing but zeros, which stand in no file."""

    dtype: DType
    shape: tuple[int, ...]

    def box(self, start: tuple[int, ...], shape: tuple[int, ...]) -> Zeros:
        return replace(self, shape=shape)

    def permuted(self, axes: tuple[int, ...]) -> Zeros:
        return replace(self, shape=tuple(self.shape[axis] for axis in axes))

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        out[:] = bytes(len(out))


@dataclass(frozen=True, slots=True)
class Derived:
    """A tensor that is made of another of its shape, element by element; by itself it is that one."""

    source: TensorSource

    @property
    def dtype(self) -> DType:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def grain(self) -> int:
        return self._scaled(self.source.grain)

    @property
    def window(self) -> int:
        # What a wider one takes more is not worth the room.
        return min(self.source.window, self._scaled(self.source.window))

    @property
    def kept_nbytes(self) -> int:
        return self.source.kept_nbytes

    @property
    def computes(self) -> bool:
        return self.source.computes

    def _scaled(self, nbytes: int) -> int:
        """Give the bytes that so many of the source's are here."""
        if nbytes == 1 or self.dtype is self.source.dtype:
            return nbytes
        return max(1, nbytes * self.dtype.itemsize // self.source.dtype.itemsize)

    def inputs(self) -> tuple[Storage, ...]:
        return self.source.inputs()

    def extents(self, begin: int, end: int) -> Iterator[ByteRange]:
        return self.source.extents(*self._below(begin, end))

    def verbatim(self, begin: int, end: int) -> ByteRange | None:
        return None

    def _below(self, begin: int, end: int) -> tuple[int, int]:
        """Give the bytes of the source that some here are made of."""
        before, after = self.source.dtype.itemsize or 1, self.dtype.itemsize or 1
        return begin // after * before, end // after * before

    def part(self: _D, begin: int, end: int) -> _D:
        source = self.source.part(*self._below(begin, end))
        return self if source is self.source else replace(self, source=source)

    def box(self: _D, start: tuple[int, ...], shape: tuple[int, ...]) -> _D:
        return replace(self, source=self.source.box(start, shape))

    def permuted(self, axes: tuple[int, ...]) -> TensorSource:
        return replace(self, source=self.source.permuted(axes))

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        self.source.read(begin, out, reader)


class Computed(Derived):
    """A tensor of other numbers than its source has."""

    __slots__ = ()

    @property
    def computes(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Swapped(Derived):
    """A tensor whose numbers lie the other way round, ``width`` bytes each: big-endian ones."""

    width: int

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        import numpy as np

        self.source.read(begin, out, reader)
        np.frombuffer(out, f"u{self.width}").byteswap(inplace=True)


@dataclass(frozen=True, slots=True)
class Negated(Derived):
    """A tensor with other signs (the bits of torch's lazy views): 1 the real part's, 2 the imaginary part's, 3 both."""

    parts: int

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        import numpy as np

        self.source.read(begin, out, reader)
        # Elements are whole here, so the first number is a real part.
        is_complex = self.dtype.tag == "C64"
        width = self.dtype.itemsize // (2 if is_complex else 1)
        values = np.frombuffer(out, f"u{width}")
        sign = values.dtype.type(1 << (8 * width - 1))
        if self.parts & 1:
            values[:: 2 if is_complex else 1] ^= sign
        if self.parts & 2 and is_complex:
            values[1::2] ^= sign


@dataclass(frozen=True, slots=True)
class Cast(Computed):
    """A tensor in another dtype, rounded to nearest even; the reader counts what is too large for it."""

    to: DType
    on_overflow: OnOverflow = "error"

    @property
    def dtype(self) -> DType:
        return self.to

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        from converter.tensors.kernels import cast_chunk

        before = self.source.dtype
        with reader.scratch(len(out) // self.to.itemsize * before.itemsize) as values:
            self.source.read(begin // self.to.itemsize * before.itemsize, values, reader)
            reader.too_large += cast_chunk(values, before, out, self.to, self.on_overflow)


@dataclass(frozen=True, slots=True)
class Held(Derived):
    """A tensor that takes long to read in small parts, as a transposed one does: about ``room`` bytes are at a time.

    These the reader keeps, so that what is made of it can be computed in parts that fit a processor's cache. ``span``
    is what is needed of it, in bytes.
    """

    room: int = GATHER_NBYTES
    span: tuple[int, int] | None = None

    @property
    def window(self) -> int:
        return 1

    @property
    def kept_nbytes(self) -> int:
        return min(self.room, self.dtype.nbytes(math.prod(self.shape))) + self.source.kept_nbytes

    def part(self, begin: int, end: int) -> Held:
        return replace(self, source=self.source.part(begin, end), span=(begin, end))

    def box(self, start: tuple[int, ...], shape: tuple[int, ...]) -> Held:
        return replace(self, source=self.source.box(start, shape), span=None)

    def permuted(self, axes: tuple[int, ...]) -> TensorSource:
        return held(self.source.permuted(axes), self.room)

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        first, last = self.span or (0, self.dtype.nbytes(math.prod(self.shape)))
        count = max(1, round((last - first) / self.room))
        room = max(1, -(-(last - first) // (count * _WHOLE))) * _WHOLE
        done = 0
        while done < len(out):
            window, inside = divmod(begin + done - first, room)
            taken = min(room - inside, len(out) - done)
            low = first + window * room
            kept = reader.kept(self.source, low, min(low + room, last))
            out[done : done + taken] = kept[inside : inside + taken]
            done += taken


def held(source: TensorSource, room: int = GATHER_NBYTES) -> TensorSource:
    """Give a tensor that can be read in small parts."""
    return Held(source, room) if source.window > 1 else source


@dataclass(frozen=True, slots=True)
class Replicas(Derived):
    """A tensor of which ``others`` hold the same: all are read together, and BadFile is raised where one differs."""

    others: tuple[TensorSource, ...]
    name: str = field(compare=False)  # tied tensors have two

    @property
    def window(self) -> int:
        return max(source.window for source in (self.source, *self.others))

    @property
    def kept_nbytes(self) -> int:
        return sum(source.kept_nbytes for source in (self.source, *self.others))

    def inputs(self) -> tuple[Storage, ...]:
        return tuple(storage for source in (self.source, *self.others) for storage in source.inputs())

    def extents(self, begin: int, end: int) -> Iterator[ByteRange]:
        for source in (self.source, *self.others):
            yield from source.extents(begin, end)

    def part(self, begin: int, end: int) -> Replicas:
        others = tuple(source.part(begin, end) for source in self.others)
        return replace(self, source=self.source.part(begin, end), others=others)

    def box(self, start: tuple[int, ...], shape: tuple[int, ...]) -> Replicas:
        others = tuple(source.box(start, shape) for source in self.others)
        return replace(self, source=self.source.box(start, shape), others=others)

    def permuted(self, axes: tuple[int, ...]) -> Replicas:
        others = tuple(source.permuted(axes) for source in self.others)
        return replace(self, source=self.source.permuted(axes), others=others)

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        self.source.read(begin, out, reader)
        for other in self.others:
            with reader.scratch(len(out)) as values:
                other.read(begin, values, reader)
                if values != out:
                    raise self._differ(other)

    def _differ(self, other: TensorSource) -> BadFile:
        return differ(self.name, self.source, other)


def differ(name: str, source: TensorSource, other: TensorSource) -> BadFile:
    """Give what is said of a tensor that should be the same in two files and is not."""
    first, second = (storage.file.place for storage in (source.inputs()[0], other.inputs()[0]))
    problem = f"holds other values of tensor {name!r} than {first.name}, and both should be the same"
    return BadFile(second, problem, OF_ONE_STEP)


def cast(tensor: Tensor, dtype: DType, on_overflow: OnOverflow = "error") -> Tensor:
    """Give a tensor in a dtype; one that is in it already as it is."""
    return tensor if tensor.dtype is dtype else tensor._replace(source=Cast(tensor.source, dtype, on_overflow))


class Box(NamedTuple):
    """A part of a whole: ``start`` is where it begins, in elements along each axis, or in the flattened whole."""

    start: tuple[int, ...]
    source: TensorSource


@dataclass(frozen=True, slots=True)
class Boxes:
    """A tensor that is put together from boxes, as checkpoints of many processes and fused weights are.

    Raises ValueError for boxes that reach out of it, overlap, or leave something out. ``longest`` is the length of the
    longest of them along the first axis. Where they are a line each has whole rows, so that their bytes follow each
    other.
    """

    dtype: DType
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    longest: int = field(init=False, repr=False, compare=False)
    is_line: bool = field(init=False, repr=False, compare=False)
    grain = 1

    def __post_init__(self) -> None:
        known = sorted((box for box in self.boxes if 0 not in box.source.shape), key=lambda box: box.start)
        self._take(known)
        if self.dtype.bits % 8 or any(box.source.dtype is not self.dtype for box in known):
            raise ValueError("boxes of other elements than the whole")
        whole = self._whole
        for box in known:
            if not _fits(whole, box):
                raise ValueError(f"a box at {box.start} of shape {box.source.shape} reaches out of {whole}")
        if sum(math.prod(box.source.shape) for box in known) != math.prod(whole):
            raise ValueError(f"boxes that do not fill {whole}")
        _check_apart(known)

    def _take(self, boxes: Sequence[Box]) -> None:
        object.__setattr__(self, "boxes", tuple(boxes))
        object.__setattr__(self, "longest", max((n for box in boxes for n in box.source.shape[:1]), default=0))
        whole = self._whole
        is_line = bool(whole) and all(box.source.shape[1:] == whole[1:] for box in boxes)
        object.__setattr__(self, "is_line", is_line)

    @property
    def _whole(self) -> tuple[int, ...]:
        is_flat = len(self.shape) != 1 and any(len(box.start) == 1 for box in self.boxes)
        return (math.prod(self.shape),) if is_flat else self.shape

    @property
    def window(self) -> int:
        return max((box.source.window for box in self.boxes), default=1)

    @property
    def kept_nbytes(self) -> int:
        return max((box.source.kept_nbytes for box in self.boxes), default=0)

    @property
    def computes(self) -> bool:
        return any(box.source.computes for box in self.boxes)

    def inputs(self) -> tuple[Storage, ...]:
        return tuple(storage for box in self.boxes for storage in box.source.inputs())

    def extents(self, begin: int, end: int) -> Iterator[ByteRange]:
        for _, source in self._between(begin, end):
            yield from source.extents(0, source.dtype.nbytes(math.prod(source.shape)))

    def verbatim(self, begin: int, end: int) -> ByteRange | None:
        if not self.is_line or begin >= end:
            return None
        row = self.dtype.nbytes(math.prod(self._whole[1:]))
        for (at, *_), source in self._between(begin, begin + 1):
            first, last = at * row, (at + source.shape[0]) * row
            if first <= begin < last:
                return source.verbatim(begin - first, min(end, last) - first)
        return None

    def part(self, begin: int, end: int) -> Boxes:
        needed = self._between(begin, end)
        if len(needed) == len(self.boxes):
            return self
        # Those that are left do not fill the whole, which was looked at.
        part: Boxes = object.__new__(Boxes)
        object.__setattr__(part, "dtype", self.dtype)
        object.__setattr__(part, "shape", self.shape)
        part._take(needed)
        return part

    def _between(self, begin: int, end: int) -> tuple[Box, ...]:
        """Give the boxes that bytes of the whole may lie in."""
        whole = self._whole
        if not whole or begin >= end:
            return self.boxes
        row = self.dtype.nbytes(math.prod(whole[1:]))
        return self._along(begin // row, -(-end // row))

    def _along(self, begin: int, end: int) -> tuple[Box, ...]:
        """Give the boxes that may reach into a span of the first axis; they are in the order of their starts."""
        # What is looked for is shorter than a box, so no source is ever compared.
        probes: tuple[Any, Any] = ((begin - self.longest + 1,),), ((end,),)
        first, last = (bisect.bisect_left(self.boxes, probe) for probe in probes)
        return self.boxes[first:last]

    def box(self, start: tuple[int, ...], shape: tuple[int, ...]) -> Boxes:
        whole = self._whole
        if whole != self.shape:
            long = next((axis for axis, length in enumerate(shape) if length != 1), len(shape) - 1)
            if shape[long + 1 :] != self.shape[long + 1 :]:
                raise ValueError("boxes of a flattened whole have no columns")
            steps = contiguous_strides(self.shape)
            start, whole = (sum(at * step for at, step in zip(start, steps, strict=True)),), (math.prod(shape),)
        else:
            whole = shape
        cut = tuple(Box(tuple(at - base for at, base in zip(where, start, strict=True)), source)
                    for where, source in self._cut(start, whole))  # fmt: skip
        return Boxes(self.dtype, shape, cut)

    def permuted(self, axes: tuple[int, ...]) -> Boxes:
        if self._whole != self.shape:
            raise ValueError("boxes of a flattened whole have no axes")
        boxes = (Box(tuple(start[axis] for axis in axes), source.permuted(axes)) for start, source in self.boxes)
        return Boxes(self.dtype, tuple(self.shape[axis] for axis in axes), tuple(boxes))

    def _cut(self, start: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[Box]:
        """Give what of each box lies in a box of the whole; starts are in the whole."""
        for box in self._along(start[0], start[0] + shape[0]) if start else self.boxes:
            sides = zip(box.start, box.source.shape, start, shape, strict=True)
            spans = [(max(at, base), min(at + length, base + size)) for at, length, base, size in sides]
            if all(begin < end for begin, end in spans):
                begins = tuple(begin for begin, _ in spans)
                inner = tuple(begin - at for begin, at in zip(begins, box.start, strict=True))
                yield Box(begins, box.source.box(inner, tuple(end - begin for begin, end in spans)))

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        if self.is_line:
            self._read_line(begin, out, reader)
            return
        size = self.dtype.itemsize
        done = 0
        for start, shape in blocks_of(self._whole, begin // size, len(out) // size):
            nbytes = math.prod(shape) * size
            self._read_block(start, shape, out[done : done + nbytes], reader)
            done += nbytes

    def _read_line(self, begin: int, out: memoryview, reader: Reader) -> None:
        row = self.dtype.nbytes(math.prod(self._whole[1:]))
        end = begin + len(out)
        for (at, *_), source in self._between(begin, end):
            low, high = max(begin, at * row), min(end, (at + source.shape[0]) * row)
            if low < high:
                source.read(low - at * row, out[low - begin : high - begin], reader)

    def _read_block(self, start: tuple[int, ...], shape: tuple[int, ...], out: memoryview, reader: Reader) -> None:
        import numpy as np

        block = np.frombuffer(out, f"u{self.dtype.itemsize}").reshape(shape)
        for where, source in self._cut(start, shape):
            begins = zip(where, start, source.shape, strict=True)
            at: Any = (*(slice(begin - base, begin - base + length) for begin, base, length in begins), ...)
            target = block[at]  # a view, of a single number too
            if target.flags.c_contiguous:
                source.read(0, target.reshape(-1).data.cast("B"), reader)
                continue
            with reader.scratch(target.nbytes) as values:
                source.read(0, values, reader)
                target[...] = np.frombuffer(values, block.dtype).reshape(source.shape)


def _fits(whole: tuple[int, ...], box: Box) -> bool:
    if not len(whole) == len(box.start) == len(box.source.shape):
        return False
    ends = zip(whole, box.start, box.source.shape, strict=True)
    return all(at >= 0 and at + length <= size for size, at, length in ends)


def _check_apart(boxes: list[Box]) -> None:
    """Raise ValueError where two boxes overlap, or where nobody can tell in time.

    Whatever is cut over a mesh of ranks can be parted again, each time along one axis; only what cannot is compared
    by pairs, and a file could hold more of that than there is time for.
    """
    left = _LOOKS * len(boxes) + _MORE_LOOKS
    waiting = [boxes]
    while waiting:
        group = waiting.pop()
        parts = [group]
        for axis in range(len(group[0].start) if len(group) > 1 else 0):
            left -= len(group)
            parts = _part(group, axis)
            if len(parts) > 1:
                break
        if len(parts) > 1:
            waiting += parts
            continue
        left -= math.comb(len(group), 2)
        if left < 0:
            raise ValueError(f"{len(boxes):,} boxes that are in no order")
        for box, other in itertools.combinations(group, 2):
            if _overlap(box, other):
                raise ValueError(f"two boxes that overlap at {max(box.start, other.start)}")


def _part(boxes: list[Box], axis: int) -> list[list[Box]]:
    """Give the groups of boxes between which a cut across an axis goes through no box."""
    parts: list[list[Box]] = []
    end = -1
    for box in sorted(boxes, key=lambda box: box.start[axis]):
        if box.start[axis] >= end:
            parts.append([])
        parts[-1].append(box)
        end = max(end, box.start[axis] + box.source.shape[axis])
    return parts


def _overlap(box: Box, other: Box) -> bool:
    spans = zip(box.start, box.source.shape, other.start, other.source.shape, strict=True)
    return all(at < base + size and base < at + length for at, length, base, size in spans)

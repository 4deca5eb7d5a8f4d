"""What a file of torch's holds, in whichever of its two forms: a value, and where the storages that it names lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from converter.errors import Unsupported
from converter.formats.torch.rebuild import StorageRef, TensorRef
from converter.formats.torch.state_dict import AnyTensor, negated, resolve
from converter.formats.torch.unpickler import Pickled
from converter.storage import FileRef, Place
from converter.tensors.base import PackedRange, Storage, TensorSource
from converter.tensors.view import GATHER_NBYTES, View, span_of

# How often deflated records may be inflated: where each tensor has one to itself it is once. A state dict of views of a
# few large records would take hours; the same of some GB in all, seconds.
_MAX_INFLATED = 8
_SMALL_NBYTES = 2_000_000_000
_SCATTERED_NBYTES = 1 << 16


class Content(NamedTuple):
    """What the pickle of a file says, and ``find``: where a storage lies, if it is there.

    Where it ``is_big``, numbers are big-endian.
    """

    file: FileRef
    pickled: Pickled
    find: Callable[[StorageRef], Storage | None]
    is_big: bool = False

    @property
    def place(self) -> Place:
        return self.file.place

    def without_value(self) -> Content:
        """Give it without the value, all of which is memory too: what is taken of that is in other hands by now."""
        return self._replace(pickled=self.pickled._replace(value=None))

    def notes_on(self, state_dict: Mapping[str, AnyTensor]) -> Iterator[str]:
        """Give notes on what torch takes another way than one would think."""
        if self.is_big:
            yield from _note_unswapped(state_dict)

    def take_sources(self, state_dict: dict[str, AnyTensor]) -> Iterator[tuple[str, TensorSource]]:
        """Take the tensors out of a dict, and yield each with its source.

        Raises BadFile where a storage is not there, or not long enough; Unsupported for what takes hours to unpack.
        """
        packed: list[View] = []
        for name, ref, view in resolve(state_dict, self.find, self.place):
            if type(view.storage) is PackedRange:
                packed.append(view)
            yield name, negated(_swapped(view, ref.storage) if self.is_big else view, ref)
        _check_inflating(packed, self.place)


def _swapped(view: View, storage: StorageRef) -> TensorSource:
    if storage.dtype is None:
        return view  # as torch does (``load_tensor`` in ``torch/serialization.py``): bytes have no order
    from converter.tensors.derived import Swapped  # few files need it

    width = storage.dtype.itemsize // (2 if storage.dtype.tag == "C64" else 1)
    return Swapped(view, width) if width > 1 else view


def _note_unswapped(state_dict: Mapping[str, AnyTensor]) -> Iterator[str]:
    refs = (ref for ref in state_dict.values() if type(ref) is TensorRef)
    untyped = {ref.dtype.tag for ref in refs if ref.storage.dtype is None and ref.dtype.itemsize > 1}
    if untyped:
        yield f"its {' and '.join(sorted(untyped))} tensors are taken as torch takes them: not turned from big-endian"


def _check_inflating(packed: Sequence[View], place: Place) -> None:
    """Refuse tensors that lie in deflated records where those must be inflated again and again.

    Each tensor is read from its record's start, and so is each part that is gathered of one that is not contiguous.
    """
    inflated = sum(map(_inflated_nbytes, packed))
    once = sum(record.nbytes for record in {view.storage for view in packed})
    if inflated > _MAX_INFLATED * once + _SMALL_NBYTES:
        raise Unsupported(
            place,
            f"holds {once:,} bytes of compressed records, which would have to be unpacked {inflated // once:,} times",
            "Load it with torch and save it again with torch.save.",
        )


def _inflated_nbytes(view: View) -> int:
    numel = math.prod(view.shape)
    if not numel:
        return 0
    span = span_of(view.shape, view.strides)
    end = (view.start + span) * view.dtype.itemsize
    if view.is_contiguous:
        return end
    # What leaves nothing out and holds nothing twice is gathered in the order of its bytes, a buffer at a time.
    part = GATHER_NBYTES if span == numel else _SCATTERED_NBYTES
    return end * (1 + view.dtype.nbytes(numel) // part)

"""Tensors that take far more when they are written than what holds them: said, and refused where they fill a disk.

``torch.Tensor.expand`` makes such tensors, and a few bytes of a hostile file may be as many as one likes.
"""

from __future__ import annotations

from collections.abc import Sequence

from converter.errors import Unsupported, Where
from converter.tensors.base import Tensor

# How much more may be written than is held. Masks and buffers that were expanded take some MB; tied embeddings that are
# written under each of their two to four names take GB, but not four times all the rest; a compressed float32 copy of
# bfloat16 weights takes half.
MAX_GROWTH_NBYTES = 1_000_000_000
MAX_GROWTH = 3
_NOTED_GROWTH_NBYTES = 1_000_000


def note_growth(tensors: Sequence[Tensor]) -> tuple[str, ...]:
    """Note how much more tensors take than what holds them: each element is written, however often it is one."""
    grown = (tensor.nbytes - sum([storage.nbytes for storage in tensor.source.inputs()]) for tensor in tensors)
    more = sum(nbytes for nbytes in grown if nbytes > 0)
    if more < _NOTED_GROWTH_NBYTES:
        return ()
    return (f"its expanded tensors take {more:,} bytes more than in the source",)


def refuse_growth(path: Where, tensors: Sequence[Tensor]) -> None:
    """Raise Unsupported for tensors that take far more when they are read in full than what holds them."""
    if error := find_growth(path, tensors):
        raise error


def find_growth(path: Where, tensors: Sequence[Tensor]) -> Unsupported | None:
    """Give the error for tensors that take far more when they are read in full than what holds them."""
    nbytes = sum(tensor.nbytes for tensor in tensors)
    if nbytes <= MAX_GROWTH_NBYTES:
        return None
    storages = {storage for tensor in tensors for storage in tensor.source.inputs()}
    source_nbytes = sum(storage.stored_nbytes for storage in storages)
    if nbytes - source_nbytes <= max(MAX_GROWTH_NBYTES, MAX_GROWTH * source_nbytes):
        return None
    largest = max(tensors, key=lambda tensor: tensor.nbytes - _stored(tensor))
    problem = f"holds {source_nbytes:,} bytes of tensors, which would come out as {nbytes:,}: the largest is "
    problem += f"{largest.name!r}, of {largest.nbytes:,} bytes in {_stored(largest):,}"
    return Unsupported(path, problem, "'wconv to-safetensors --expand' writes them in full.")


def _stored(tensor: Tensor) -> int:
    return sum(storage.stored_nbytes for storage in tensor.source.inputs())

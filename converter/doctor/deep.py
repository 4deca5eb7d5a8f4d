"""What only the values tell: NaN, infinite and all-zero tensors, the same values twice, and shapes that fit no model.

Reads every byte of every sound set once, streaming.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from converter.doctor.facts import find_scales, repeated_name
from converter.doctor.findings import Finding
from converter.dtypes import DTYPES
from converter.errors import Unsupported, name_some
from converter.libraries.ask import LibraryMissing, ask_class
from converter.models.checkpoint import open_checkpoint
from converter.models.component import has_quantization
from converter.models.growth import refuse_growth
from converter.models.headers import LENIENT
from converter.models.inventory import Inventory, Part
from converter.models.sets import ListedSet
from converter.run.tasks import Call, run_tasks
from converter.tensors.base import Tensor, find_ties
from converter.tensors.reader import RangeReader, are_far, piece_nbytes_for, read_chunks
from converter.tensors.shaped import reshaped


class _Looked(NamedTuple):
    """A tensor that is looked at, and whether others are scaled by it."""

    info: Tensor
    is_scale: bool = False


@dataclass(frozen=True, slots=True)
class _Values:
    """What the values of one tensor are like. ``digest`` is of its bytes; ``zeros`` are counted of scales alone."""

    info: Tensor
    nans: int
    infinite: int
    zeros: int
    is_zero: bool
    digest: bytes


def run_deep_checks(inventory: Inventory) -> list[Finding]:
    """Give what the values and the shapes of all sound sets tell."""
    return [
        finding
        for part in inventory.parts
        for found in part.sound_sets
        if not repeated_name(part, found)
        for finding in _check(part, found)
    ]


def _check(part: Part, found: ListedSet) -> Iterator[Finding]:
    tensors = open_checkpoint(found.without_index, LENIENT).tensors
    yield from _check_values(part, found, tensors)
    yield from _check_shapes(part, found, tensors)


def _check_values(part: Part, found: ListedSet, tensors: Sequence[Tensor]) -> Iterator[Finding]:
    refuse_growth(found.path, tensors)
    ties = find_ties(tensors)
    alone = [info for info in tensors if info.name not in ties]
    beside = find_scales({info.name: info.dtype for info in tensors})
    looked_at = run_tasks(_calls([_as_scale(one) if beside.get(one.name) else _Looked(one) for one in alone]))
    values = sorted(itertools.chain.from_iterable(looked_at), key=lambda one: one.info.name)
    twins: dict[tuple[bytes, object, tuple[int, ...]], list[str]] = defaultdict(list)
    for one in values:
        if not one.is_zero and one.info.numel > 1 and one.info.name not in beside:
            twins[one.digest, one.info.dtype, one.info.shape].append(one.info.name)
    of_scales = [one for one in values if beside.get(one.info.name)]
    values = [one for one in values if one.info.name not in beside]
    odd = [f"{one.info.name} ({one.nans + one.infinite:,})" for one in of_scales if one.nans or one.infinite]
    rows = (
        ("scales-odd", "scales that are NaN or infinite", odd),
        ("scales-zero", "scales that are zero", [f"{one.info.name} ({one.zeros:,})" for one in of_scales if one.zeros]),
        ("values-nan", "NaN", [f"{one.info.name} ({one.nans:,})" for one in values if one.nans]),
        ("values-inf", "infinite values", [f"{one.info.name} ({one.infinite:,})" for one in values if one.infinite]),
        ("values-zero", "nothing but zeros", [one.info.name for one in values if one.is_zero and one.info.numel]),
        ("values-equal", "the same values", [" and ".join(names) for names in twins.values() if len(names) > 1]),
    )
    for code, what, names in rows:
        if names:
            yield Finding(code, found.path, part.name, f"holds {what} in {name_some(names, 3)}")


def _as_scale(scale: Tensor) -> _Looked:
    """Give what others are scaled by as the numbers that it is: 2**(byte - 127), where it is bytes."""
    dtype = DTYPES["F8_E8M0"] if scale.dtype.tag == "U8" else scale.dtype
    return _Looked(scale._replace(source=reshaped(scale.source, dtype, scale.shape)), is_scale=True)


def _calls(looked: Sequence[_Looked]) -> Iterator[Call[list[_Looked], list[_Values]]]:
    """Give a task for each tensor; of those that are far, for as many as come well in one stream."""
    sources = [one.info.source for one in looked]
    room = piece_nbytes_for(sources) if are_far(sources) else 0
    batch: list[_Looked] = []
    nbytes = 0
    for one in looked:
        if batch and nbytes + one.info.nbytes > room:
            yield Call(_look_at, batch, nbytes, batch[0].info.name)
            batch, nbytes = [], 0
        batch.append(one)
        nbytes += one.info.nbytes
    if batch:
        yield Call(_look_at, batch, nbytes, batch[0].info.name)


def _look_at(looked: list[_Looked], chunk_nbytes: int) -> list[_Values]:
    with RangeReader() as reader:
        reader.expect(part for info, _ in looked for part in info.source.extents(0, info.nbytes))
        return [_look_at_one(info, is_scale, reader, chunk_nbytes) for info, is_scale in looked]


def _look_at_one(info: Tensor, is_scale: bool, reader: RangeReader, chunk_nbytes: int) -> _Values:
    from converter.tensors.kernels import count_odd, count_zeros

    nans = infinite = zeros = 0
    is_zero = True
    digest = hashlib.blake2b(digest_size=16)
    for chunk in read_chunks(info.source, reader, bytearray(chunk_nbytes)):
        odd = count_odd(chunk, info.dtype)
        nans, infinite, is_zero = nans + odd[0], infinite + odd[1], is_zero and not odd[2]
        zeros += count_zeros(chunk, info.dtype) if is_scale else 0
        digest.update(chunk)
    return _Values(info, nans, infinite, zeros, is_zero, digest.digest())


def _check_shapes(part: Part, found: ListedSet, tensors: Iterable[Tensor]) -> Iterator[Finding]:
    """Hold shapes against those that the class in the config would give, where its library is there to make it."""
    if not part.component.class_name or has_quantization(part.component.config):
        return
    try:
        expected = ask_class(part.component).shapes
    except LibraryMissing:
        return
    except Unsupported as error:
        yield Finding("shapes-unknown", part.path / "config.json", part.name, error.problem)
        return
    held = {info.name: info.shape for info in tensors}
    wrong = [name for name in held if name in expected and held[name] != expected[name]]
    if wrong:
        name = wrong[0]
        shapes = f"{list(held[name])}, the config gives {list(expected[name])}"
        problem = f"holds {len(wrong):,} tensors of another shape than config.json gives, such as {name} ({shapes})"
        yield Finding("config-shape", found.path, part.name, problem)

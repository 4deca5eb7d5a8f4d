"""What only the values tell: NaN, infinite and all-zero tensors, the same values twice, and shapes that fit no model.

Reads every byte of every sound set once, streaming.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from converter.doctor.facts import repeated_name
from converter.doctor.findings import Finding
from converter.errors import Unsupported, name_some
from converter.libraries.ask import LibraryMissing, ask_class
from converter.models.checkpoint import open_checkpoint
from converter.models.growth import refuse_growth
from converter.models.headers import LENIENT
from converter.models.inventory import Inventory, Part
from converter.models.sets import ListedSet
from converter.run.tasks import Call, run_tasks
from converter.tensors.base import Tensor, find_ties
from converter.tensors.reader import RangeReader, are_far, piece_nbytes_for, read_chunks


@dataclass(frozen=True, slots=True)
class _Values:
    """What the values of one tensor are like. ``digest`` is of its bytes."""

    info: Tensor
    nans: int
    infinite: int
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
    looked_at = run_tasks(_calls(alone))
    values = sorted(itertools.chain.from_iterable(looked_at), key=lambda one: one.info.name)
    twins: dict[tuple[bytes, object, tuple[int, ...]], list[str]] = defaultdict(list)
    for one in values:
        if not one.is_zero and one.info.numel > 1:
            twins[one.digest, one.info.dtype, one.info.shape].append(one.info.name)
    rows = (
        ("values-nan", "NaN", [f"{one.info.name} ({one.nans:,})" for one in values if one.nans]),
        ("values-inf", "infinite values", [f"{one.info.name} ({one.infinite:,})" for one in values if one.infinite]),
        ("values-zero", "nothing but zeros", [one.info.name for one in values if one.is_zero and one.info.numel]),
        ("values-equal", "the same values", [" and ".join(names) for names in twins.values() if len(names) > 1]),
    )
    for code, what, names in rows:
        if names:
            yield Finding(code, found.path, part.name, f"holds {what} in {name_some(names, 3)}")


def _calls(tensors: Sequence[Tensor]) -> Iterator[Call[list[Tensor], list[_Values]]]:
    """Give a task for each tensor; of those that are far, for as many as come well in one stream."""
    room = piece_nbytes_for(info.source for info in tensors) if are_far(info.source for info in tensors) else 0
    batch: list[Tensor] = []
    nbytes = 0
    for info in tensors:
        if batch and nbytes + info.nbytes > room:
            yield Call(_look_at, batch, nbytes, batch[0].name)
            batch, nbytes = [], 0
        batch.append(info)
        nbytes += info.nbytes
    if batch:
        yield Call(_look_at, batch, nbytes, batch[0].name)


def _look_at(tensors: list[Tensor], chunk_nbytes: int) -> list[_Values]:
    with RangeReader() as reader:
        reader.expect(part for info in tensors for part in info.source.extents(0, info.nbytes))
        return [_look_at_one(info, reader, chunk_nbytes) for info in tensors]


def _look_at_one(info: Tensor, reader: RangeReader, chunk_nbytes: int) -> _Values:
    from converter.tensors.kernels import count_odd

    nans = infinite = 0
    is_zero = True
    digest = hashlib.blake2b(digest_size=16)
    for chunk in read_chunks(info.source, reader, bytearray(chunk_nbytes)):
        odd = count_odd(chunk, info.dtype)
        nans, infinite, is_zero = nans + odd[0], infinite + odd[1], is_zero and not odd[2]
        digest.update(chunk)
    return _Values(info, nans, infinite, is_zero, digest.digest())


def _check_shapes(part: Part, found: ListedSet, tensors: Iterable[Tensor]) -> Iterator[Finding]:
    """Hold shapes against those that the class in the config would give, where its library is there to make it."""
    if not part.component.class_name or "quantization_config" in part.component.config:
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

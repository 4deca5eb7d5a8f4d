"""Two checkpoints or folders compared tensor by tensor, streaming: are these the same weights, bit for bit?

Components are paired by name, sets by variant, tensors by name; a name that one side has only as a recorded tie stands
for the tensor it is tied to. Chunks are compared as memory; only where they differ are values looked at.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, get_args

from converter.dtypes import DTYPES
from converter.errors import BadRequest
from converter.formats.torch.state_dict import Reading
from converter.models.checkpoint import Checkpoint, open_checkpoint
from converter.models.component import Component, WeightSet
from converter.models.growth import find_growth
from converter.models.model import open_model
from converter.models.names import spelled_variant
from converter.models.schemes import quantized_in
from converter.models.select import Selection, only_set
from converter.run.tasks import DEFAULT_MEMORY_NBYTES, Call, Progress, open_tasks, run_tasks
from converter.run.workers.sight import check_workers
from converter.storage import Given
from converter.tensors.base import ByteRange, Storage, Tensor, find_ties
from converter.tensors.reader import RangeReader, piece_nbytes_for
from converter.transforms.names import with_own_names
from converter.transforms.quantize import find_numbers
from converter.transforms.quantize.codes import steps_of
from converter.transforms.quantize.restore import Restored, dequantized

if TYPE_CHECKING:
    from converter.transforms.quantize.kernels import Rounding

Kind = Literal["missing", "extra", "shape", "dtype", "values"]
_KINDS = get_args(Kind)  # in the order of what matters


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor (or component) that is not the same. ``missing`` is only in A, ``extra`` only in B."""

    kind: Kind
    component: str
    name: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ValueErrors:
    """How far the values of a tensor in B are from those in A, over all of its elements."""

    component: str
    name: str
    differing: int
    max_absolute: float
    max_relative: float


@dataclass(frozen=True, slots=True)
class RoundingErrors:
    """How far the numbers that the codes of a tensor in B stand for are from those in A, over all of its elements.

    ``scheme`` is that of B. ``beyond`` are off by more than half the distance to the next number that B has a code for;
    where its scheme does not take the nearest one it is not ``is_bounded``, and they are those that are not finite.
    ``max_relative`` is the largest error over the largest magnitude, ``mean_relative`` the mean error over the mean
    magnitude.
    """

    component: str
    name: str
    scheme: str
    is_bounded: bool
    beyond: int
    max_relative: float
    mean_relative: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a comparison found: whole components first, then by kind, the largest errors first.

    ``recast`` has the tensors of another dtype, and ``quantized`` those that are codes in B, where these are allowed.
    ``schemes`` is how weights are quantized, ``{"A": ["GPTQ"]}`` where A's alone are.
    """

    tensor_count: int
    nbytes: int
    differences: tuple[Difference, ...]
    recast: tuple[ValueErrors, ...]
    quantized: tuple[RoundingErrors, ...] = ()
    schemes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def is_equal(self) -> bool:
        return not self.differences


class _InCodes(NamedTuple):
    """How a tensor that is numbers here lies in its file."""

    restored: Restored
    scheme: str


class _Side(NamedTuple):
    """The tensors of a set by name, quantized ones as numbers in float32; and ``in_codes`` which these are.

    ``schemes`` are those that the set's weights are in, as numbers or not.
    """

    tensors: Mapping[str, Tensor]
    in_codes: Mapping[str, _InCodes]
    schemes: Iterable[str] = ()


@dataclass(frozen=True, slots=True)
class _Pair:
    """A tensor on both sides. ``was`` and ``codes`` say how A and B have it in codes, where they do."""

    component: str
    a: Tensor
    b: Tensor
    was: _InCodes | None = None
    codes: _InCodes | None = None

    @property
    def key(self) -> _Key:
        return self.component, self.a.name

    @property
    def nbytes(self) -> int:
        """The bytes of its numbers, of the side that has them as such."""
        return (self.b if self.was else self.a).nbytes

    @property
    def slack(self) -> float | None:
        """The share of each number that B may be off besides its step; None where it may be off by any."""
        slack = self.codes.restored.slack if self.codes else 0.0
        return slack if slack is None or self.was is None else slack + _HALF_BF16

    def inputs(self) -> Iterator[Storage]:
        """Give the ranges of files that both are read from."""
        return itertools.chain(self.a.source.inputs(), self.b.source.inputs())


class _Asked(NamedTuple):
    """Whether numbers are meant where a side is quantized, how A is read, and what is taken off its names."""

    quantized: bool
    reading: Reading
    prefix: str


_T = TypeVar("_T")
_Key = tuple[str, str]
_Sides = tuple[str, _Side, _Side]
_Batch = list[tuple[_Pair, int, int]]
"""Pairs for one task, each with the range of elements to compare."""
_Errors = tuple[int, float, float]
_NO_ERRORS = (0, 0.0, 0.0, 0.0, 0.0)
_HALF_BF16 = 2**-8  # what is made of quantized weights is made of their numbers rounded to bf16, or finer


def verify(
    a: Given,
    b: Given,
    *,
    cast: bool = False,
    quantized: bool = False,
    executor: Executor | str | None = None,
    workers: int | None = None,
    memory_nbytes: int = DEFAULT_MEMORY_NBYTES,
    progress: Progress | None = None,
    **of_a: Any,
) -> Comparison:
    """Compare all weights at ``a`` with those at ``b``; any format on either side, shards or not.

    With ``cast``, a tensor of B may have another dtype if it is the rounded one of A. With ``quantized`` that holds
    too, both sides may be quantized, and the numbers count that their codes stand for: what A has in codes is in B what
    'wconv dequantize' gives, in any dtype; what B has in codes may be off by half a step. ``of_a`` are options of
    Selection by name, and ``strip_prefix``: what is meant of A. Raises WconvError for what cannot be read, BadRequest
    where nothing is quantized then.
    """
    differences: list[Difference] = []
    pairs: list[_Pair] = []
    schemes: dict[str, dict[str, None]] = {"A": {}, "B": {}}
    prefix = of_a.pop("strip_prefix", "")
    asked = _Asked(quantized, Selection(**of_a).reading, prefix)
    for component, left, right in _pair_sets(a, b, differences, asked):
        schemes["A"].update(dict.fromkeys(left.schemes))
        schemes["B"].update(dict.fromkeys(right.schemes))
        pairs.extend(_pair_tensors(component, left, right, cast or quantized, differences))
    if quantized and not any(schemes.values()):
        raise BadRequest(b, "has no quantized weights, and A has none either", "Leave out --quantized.")
    in_codes = [pair for pair in pairs if pair.codes]
    with open_tasks(executor, workers, memory_nbytes, progress) as tasks:
        check_workers(tasks.workers, (storage for pair in pairs for storage in pair.inputs()), None)
        compared = tasks.run(_calls(_compare_batch, [pair for pair in pairs if not pair.codes]))
        values = {key: ValueErrors(key[0], key[1], *_merge(parts)) for key, parts in _by_tensor(compared).items()}
        measured = _by_tensor(tasks.run(_calls(_measure_batch, in_codes)))
    roundings = sorted((_rounding_of(pair, measured.get(pair.key, ())) for pair in in_codes), key=_worst_first)
    differences.extend(_wrong_values(values.values(), roundings))
    return Comparison(
        tensor_count=len(pairs),
        nbytes=sum(pair.nbytes for pair in pairs),
        differences=tuple(sorted(differences, key=lambda one: (bool(one.name), _KINDS.index(one.kind)))),
        recast=tuple(values[pair.key] for pair in pairs if pair.key in values and pair.a.dtype is not pair.b.dtype),
        quantized=tuple(roundings),
        schemes={side: tuple(found) for side, found in schemes.items() if found},
    )


def _rounding_of(pair: _Pair, parts: Iterable[Rounding]) -> RoundingErrors:
    """Give how far a tensor that B has in codes is off; of one without elements by nothing."""
    assert pair.codes is not None
    beyond, errors, largest, error_sums, magnitude_sums = zip(_NO_ERRORS, *parts, strict=True)
    relative = max(errors, key=_or_infinite) / (max(largest) or 1.0), sum(error_sums) / (sum(magnitude_sums) or 1.0)
    is_bounded = pair.slack is not None
    return RoundingErrors(pair.component, pair.a.name, pair.codes.scheme, is_bounded, sum(beyond), *relative)


def _or_infinite(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _worst_first(one: RoundingErrors) -> tuple[float, str, str]:
    return -_or_infinite(one.max_relative), one.component, one.name


def _wrong_values(values: Iterable[ValueErrors], roundings: Iterable[RoundingErrors]) -> Iterator[Difference]:
    """Name the tensors with values that are not the same, the largest errors first."""
    for value in sorted(values, key=lambda value: (-value.max_absolute, value.component, value.name)):
        if value.differing:
            detail = f"{value.differing:,} of its values, by up to {value.max_absolute:.3g}"
            yield Difference("values", value.component, value.name, detail)
    for rounding in roundings:
        detail = ""
        if rounding.beyond:
            how = "off by more than half a step" if rounding.is_bounded else "no finite numbers"
            detail = f"{rounding.beyond:,} of its values are {how}"
        elif not rounding.is_bounded and rounding.mean_relative >= 1:
            detail = f"no nearer than zeros would be, in {rounding.scheme}"
        if detail:
            yield Difference("values", rounding.component, rounding.name, detail)


def holds_values(kept: Checkpoint, gone: Checkpoint) -> bool:
    """Say whether each tensor of ``gone`` is in ``kept`` too, bit for bit; of tied ones, under one of their names."""
    differences: list[Difference] = []
    there, wanted = dict(_by_name(kept)), _by_name(gone)
    for name, twin in find_ties(gone.tensors).items():
        for one, other in ((name, twin), (twin, name)):
            if other in there:
                there.setdefault(one, there[other])
    pairs = list(_pair_tensors("", _Side(wanted, {}), _Side(there, {}), False, differences))
    if any(one.kind != "extra" for one in differences):
        return False
    with closing(run_tasks(_calls(_compare_batch, pairs))) as compared:
        return not any(differing for batch in compared for _, (differing, *_) in batch)


def _pair_sets(a: Given, b: Given, differences: list[Difference], asked: _Asked) -> Iterator[_Sides]:
    left, right = open_model(a).components, open_model(b).components
    if len(left) == len(right) == 1:
        yield from _pair_variants(left[0], right[0], differences, asked)
        return
    theirs = {component.name: component for component in right}
    for component in left:
        other = theirs.pop(component.name, None)
        if other is None:
            differences.append(Difference("missing", component.name, "", "the whole component"))
        else:
            yield from _pair_variants(component, other, differences, asked)
    differences.extend(Difference("extra", name, "", "the whole component") for name in theirs)


def _pair_variants(a: Component, b: Component, differences: list[Difference], asked: _Asked) -> Iterator[_Sides]:
    left, right = _by_variant(a), _by_variant(b)
    if not left.keys() & right.keys() and 1 in (len(left), len(right)):
        # One set under another name: it is meant for the other side's untagged one, or its only one.
        left, right = _meant(left), _meant(right)
    for variant in sorted(left.keys() & right.keys()):
        label = f"{a.name} ({variant})" if variant else a.name
        before = with_own_names(open_checkpoint(left[variant], asked.reading), a, asked.prefix)
        after = with_own_names(open_checkpoint(right[variant]), b, "")
        _refuse_bombs(before, after)
        yield label, _side_of(a, before, asked.quantized), _side_of(b, after, asked.quantized)
    for variant in sorted(left.keys() ^ right.keys(), key=lambda one: (one in right, one)):
        which = spelled_variant(variant)
        differences.append(Difference("missing" if variant in left else "extra", a.name, "", which))


def _side_of(component: Component, checkpoint: Checkpoint, as_numbers: bool) -> _Side:
    """Give the tensors of a set, quantized ones ``as_numbers`` where that is asked.

    Raises Unsupported for a scheme that is not dequantized, BadFile for scales that do not fit.
    """
    if not as_numbers:
        return _Side(_by_name(checkpoint), {}, [one.scheme.label for one in quantized_in(checkpoint)])
    found = find_numbers(component, checkpoint)
    in_codes = {one.name: _InCodes(one, found.modules[name].scheme.label) for name, one in found.weights.items()}
    labels = [one.scheme for one in in_codes.values()]
    return _Side(_by_name(dequantized(checkpoint, found, DTYPES["F32"])), in_codes, labels)


def _refuse_bombs(a: Checkpoint, b: Checkpoint) -> None:
    """Raise Unsupported where both sides are far smaller than what is in them: one alone is what ``--expand`` wrote."""
    left, right = (find_growth(one.weight_set.path, one.tensors) for one in (a, b))
    if left and right:
        raise left


def _meant(variants: dict[str, WeightSet]) -> dict[str, WeightSet]:
    return {"": variants.get("") or next(iter(variants.values()))}


def _by_variant(component: Component) -> dict[str, WeightSet]:
    variants: dict[str, list[WeightSet]] = {}
    for weight_set in component.weight_sets:
        variants.setdefault(weight_set.name.variant or "", []).append(weight_set)
    return {variant: only_set(component, sets) for variant, sets in variants.items()}


def _by_name(checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    tensors = {info.name: info for info in checkpoint.tensors}
    ties = {dropped: tensors[kept] for dropped, kept in checkpoint.ties.items()}
    return {**ties, **tensors}


def _pair_tensors(component: str, a: _Side, b: _Side, cast: bool, differences: list[Difference]) -> Iterator[_Pair]:
    differences.extend(Difference("missing", component, name) for name in a.tensors if name not in b.tensors)
    differences.extend(Difference("extra", component, name) for name in b.tensors if name not in a.tensors)
    for name in (name for name in a.tensors if name in b.tensors):
        left, right = a.tensors[name], b.tensors[name]
        if left.shape != right.shape:
            detail = f"{list(left.shape)} became {list(right.shape)}"
            differences.append(Difference("shape", component, name, detail))
        elif left.dtype is not right.dtype and not (cast and _may_be_cast(left) and _may_be_cast(right)):
            differences.append(Difference("dtype", component, name, f"{left.dtype} became {right.dtype}"))
        else:
            yield _Pair(component, left, right, a.in_codes.get(name), b.in_codes.get(name))


def _may_be_cast(tensor: Tensor) -> bool:
    return tensor.dtype.is_floating and tensor.dtype.bits >= 8


def _calls(function: Callable[[_Batch, int], _T], pairs: Iterable[_Pair]) -> Iterator[Call[_Batch, _T]]:
    """Cut pairs into batches of some MB, as calls for ``run_tasks``."""
    batch: _Batch = []
    nbytes = 0
    pairs = list(pairs)
    piece_nbytes = piece_nbytes_for(source for pair in pairs for source in (pair.a.source, pair.b.source))
    for pair in pairs:
        numel = pair.a.numel
        step = max(1, piece_nbytes * 8 // pair.a.dtype.bits) // 16 * 16
        for begin in range(0, numel, step):
            end = min(numel, begin + step)
            batch.append((pair, begin, end))
            nbytes += pair.a.dtype.nbytes(end - begin)
            if nbytes >= piece_nbytes:
                yield Call(function, batch, nbytes, pair.b.name)
                batch, nbytes = [], 0
    if batch:
        yield Call(function, batch, nbytes, batch[0][0].b.name)


def _by_tensor(batches: Iterable[list[tuple[_Key, _T]]]) -> dict[_Key, list[_T]]:
    found: dict[_Key, list[_T]] = {}
    for key, errors in itertools.chain.from_iterable(batches):
        found.setdefault(key, []).append(errors)
    return found


def _extents(batch: _Batch) -> Iterator[ByteRange]:
    """Give what a batch is read from, in order."""
    for pair, begin, end in batch:
        for one in (pair.a, pair.b):
            yield from one.source.extents(one.dtype.nbytes(begin), one.dtype.nbytes(end))


def _compare_batch(batch: _Batch, chunk_nbytes: int) -> list[tuple[_Key, _Errors]]:
    """Compare the pairs of a batch; give errors for those that differ, and for all that were recast."""
    found = []
    room = _room_for(batch, chunk_nbytes)
    left, right = bytearray(room), bytearray(room)
    with RangeReader() as reader:
        reader.expect(_extents(batch))
        for pair, begin, end in batch:
            reader.let_go()
            a, b = pair.a, pair.b
            parts = []
            step = room * 8 // max(a.dtype.bits, b.dtype.bits) // 16 * 16
            for first in range(begin, end, step):
                count = min(step, end - first)
                view_a = memoryview(left)[: a.dtype.nbytes(count)]
                view_b = memoryview(right)[: b.dtype.nbytes(count)]
                a.source.read(a.dtype.nbytes(first), view_a, reader)
                b.source.read(b.dtype.nbytes(first), view_b, reader)
                # startswith compares as memcmp does.
                if a.dtype is not b.dtype or not left.startswith(view_b):
                    parts.append(_value_errors(pair, view_a, view_b))
            if parts:
                found.append((pair.key, _merge(parts)))
    return found


def _room_for(batch: _Batch, chunk_nbytes: int) -> int:
    return max(chunk_nbytes, *(one.source.window for pair, _, _ in batch for one in (pair.a, pair.b)))


def _measure_batch(batch: _Batch, chunk_nbytes: int) -> list[tuple[_Key, Rounding]]:
    """Measure how far the numbers of a batch that B has in codes are from those of A."""
    from converter.transforms.quantize.kernels import rounding_errors

    found = []
    room = _room_for(batch, chunk_nbytes)
    left, right, allowed = (memoryview(bytearray(room)) for _ in range(3))
    with RangeReader() as reader:
        reader.expect(_extents(batch))
        for pair, begin, end in batch:
            reader.let_go()
            a, b = pair.a, pair.b
            steps = steps_of(b.source)
            step = room // max(a.dtype.itemsize, b.dtype.itemsize)
            for first in range(begin, end, step):
                count = min(step, end - first)
                views = left[: a.dtype.nbytes(count)], right[: 4 * count], allowed[: 4 * count]
                a.source.read(a.dtype.nbytes(first), views[0], reader)
                b.source.read(4 * first, views[1], reader)
                steps.read(4 * first, views[2], reader)
                found.append((pair.key, rounding_errors(views[0], a.dtype, views[1], views[2], pair.slack)))
    return found


def _value_errors(pair: _Pair, view_a: memoryview, view_b: memoryview) -> _Errors:
    from converter.tensors.kernels import as_array, as_bits, cast_chunk, errors

    before, after = as_array(view_a, pair.a.dtype), as_array(view_b, pair.b.dtype)
    expected = before
    if pair.a.dtype is not pair.b.dtype:
        rounded = memoryview(bytearray(len(view_b)))
        cast_chunk(view_a, pair.a.dtype, rounded, pair.b.dtype, "inf")
        expected = as_array(rounded, pair.b.dtype)
    wrong = as_bits(expected) != as_bits(after)
    if pair.a.dtype is not pair.b.dtype:
        wrong &= ~((expected != expected) & (after != after))  # a NaN may change its payload in a cast
    return int(wrong.sum()), *errors(before, after)


def _merge(parts: Iterable[_Errors]) -> _Errors:
    differing, absolute, relative = zip(*parts, strict=True)
    return sum(differing), max(absolute), max(relative)

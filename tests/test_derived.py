"""Tensors that are made of others, held against what torch and numpy make of the same."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import raw_bytes, ref_to, whole_view

from converter.dtypes import DTYPES
from converter.errors import BadFile
from converter.tensors.base import ByteRange, Tensor, TensorSource
from converter.tensors.derived import Box, Boxes, Cast, Constant, Negated, Replicas, Swapped, cast
from converter.tensors.reader import RangeReader
from converter.tensors.view import View

I32 = DTYPES["I32"]


def constant(values: torch.Tensor) -> Constant:
    return Constant(I32, tuple(values.shape), raw_bytes(values))


def read(source: TensorSource, chunk_nbytes: int = 1 << 20) -> bytes:
    """Read a whole tensor in chunks, each by what its part knows."""
    nbytes = source.dtype.nbytes(math.prod(source.shape))
    out = bytearray(nbytes)
    with RangeReader() as reader:
        for begin in range(0, nbytes, chunk_nbytes):
            end = min(nbytes, begin + chunk_nbytes)
            source.part(begin, end).read(begin, memoryview(out)[begin:end], reader)
    return bytes(out)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[torch.Tensor, Boxes]:
    """Draw a whole, cut along each axis, and the boxes that it falls into."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    whole = torch.arange(math.prod(shape), dtype=torch.int32).reshape(shape)
    marks = [sorted({0, length, *draw(st.lists(st.integers(0, length), max_size=2))}) for length in shape]
    boxes: list[tuple[tuple[int, ...], torch.Tensor]] = [((), whole)]
    for axis, ends in enumerate(marks):
        boxes = [
            ((*start, begin), part.narrow(axis, begin, end - begin))
            for start, part in boxes
            for begin, end in itertools.pairwise(ends)
        ]
    drawn = draw(st.permutations(boxes))
    return whole, Boxes(I32, shape, tuple(Box(start, constant(part.contiguous())) for start, part in drawn))


@given(cuts(), st.sampled_from([4, 12, 20, 1 << 20]))
def test_boxes_make_the_whole(drawn: tuple[torch.Tensor, Boxes], chunk_nbytes: int) -> None:
    whole, boxes = drawn
    assert read(boxes, chunk_nbytes) == raw_bytes(whole)


@given(cuts(), st.data())
def test_a_box_of_boxes_with_other_axes(drawn: tuple[torch.Tensor, Boxes], data: st.DataObject) -> None:
    whole, boxes = drawn
    axes = tuple(data.draw(st.permutations(range(whole.ndim))))
    spans = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in whole.permute(axes).shape]
    expected = whole.permute(axes)[tuple(slice(begin, end) for begin, end in spans)]
    cut = boxes.permuted(axes).box(tuple(begin for begin, _ in spans), tuple(expected.shape))
    assert cut.shape == expected.shape
    assert read(cut, 12) == expected.numpy().tobytes()


@given(st.lists(st.integers(0, 24), max_size=4), st.sampled_from([4, 20, 96]))
def test_boxes_of_a_flattened_whole(ends: list[int], chunk_nbytes: int) -> None:
    # As ZeRO cuts what it deals out: with no heed of rows.
    whole = torch.arange(24, dtype=torch.int32)
    marks = sorted({0, 24, *ends})
    boxes = [Box((begin,), constant(whole[begin:end])) for begin, end in itertools.pairwise(marks)]
    source = Boxes(I32, (4, 6), tuple(boxes))
    assert read(source, chunk_nbytes) == raw_bytes(whole)
    assert read(source.box((1, 0), (2, 6)), chunk_nbytes) == raw_bytes(whole[6:18])
    stack = Boxes(I32, (2, 4, 3), tuple(boxes))
    assert read(stack.box((1, 1, 0), (1, 2, 3)), chunk_nbytes) == raw_bytes(whole[15:21])
    assert read(stack.box((1, 3, 2), (1, 1, 1)), chunk_nbytes) == raw_bytes(whole[23:24])
    with pytest.raises(ValueError, match="no columns"):
        source.box((0, 1), (4, 2))
    with pytest.raises(ValueError, match="no axes"):
        source.permuted((1, 0))


@pytest.mark.parametrize(
    ("starts", "problem"),
    [
        ([(0, 0)], "do not fill"),
        ([(0, 0), (0, 1)], "overlap"),
        ([(0, 0), (1, 1)], "reaches out"),
        ([(0,), (2,)], "reaches out"),
    ],
)
def test_boxes_that_are_no_whole_are_refused(starts: list[tuple[int, ...]], problem: str) -> None:
    part = constant(torch.zeros(2, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=problem):
        Boxes(I32, (2, 4), tuple(Box(start, part) for start in starts))


def laid(shape: tuple[int, ...], boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> Boxes:
    """Lay boxes, by their begins and shapes, of what takes no room."""
    storage = ByteRange(ref_to("nothing"), 0, 4)
    one = View(I32, (), storage, 0, ())
    placed = (Box(start, one._replace(shape=sides, strides=(0,) * len(sides))) for start, sides in boxes)
    return Boxes(I32, shape, tuple(placed))


PINWHEEL = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]


def test_boxes_that_no_cut_parts() -> None:
    laid((3, 3), PINWHEEL)
    twice = [*PINWHEEL[:4], ((0, 1), (1, 1))]
    with pytest.raises(ValueError, match=r"two boxes that overlap at \(0, 1\)"):
        laid((3, 3), twice)


def test_a_part_takes_along_what_it_needs() -> None:
    rows = laid((600, 2), [((row, at), (1, 1)) for row in range(600) for at in range(2)])
    part = rows.part(8 * 300, 8 * 302)
    assert [box.start for box in part.boxes] == [(300, 0), (300, 1), (301, 0), (301, 1)]
    assert len(pickle.dumps(part)) < len(pickle.dumps(rows)) / 50
    assert len(list(rows.extents(8 * 300, 8 * 302))) == 4
    assert rows.part(0, 8 * 600) is rows
    uneven = laid((5, 1), [((0, 0), (3, 1)), ((3, 0), (1, 1)), ((4, 0), (1, 1))])
    assert [box.start for box in uneven.part(8, 12).boxes] == [(0, 0)]


def test_a_box_of_other_axes_than_the_whole() -> None:
    with pytest.raises(ValueError, match="reaches out"):
        Boxes(I32, (2, 2), (Box((0, 0), constant(torch.tensor(1, dtype=torch.int32))),))


def test_many_boxes_are_looked_at_in_time() -> None:
    columns = [((0, at), (1, 1)) for at in range(6_000)]
    laid((1, 6_000), columns)
    with pytest.raises(ValueError, match="overlap"):
        laid((1, 6_000), [*columns[:-1], columns[7]])
    laid((90, 90), [((row, at), (1, 1)) for row in range(90) for at in range(90)])
    with pytest.raises(ValueError, match="2,000 boxes that are in no order"):
        laid((1, 2_000), columns[:1] * 2_000)


def test_a_box_without_elements_may_begin_at_the_end() -> None:
    part, nothing = torch.arange(6, dtype=torch.int32).reshape(2, 3), torch.zeros(0, 3, dtype=torch.int32)
    source = Boxes(I32, (2, 3), (Box((0, 0), constant(part)), Box((2, 0), constant(nothing))))
    assert read(source) == raw_bytes(part)


def test_a_single_number_is_a_box_of_itself() -> None:
    number = Box((), constant(torch.tensor(7, dtype=torch.int32)))
    assert read(Boxes(I32, (), (number,))) == (7).to_bytes(4, "little")
    with pytest.raises(ValueError, match="do not fill"):
        Boxes(I32, (), (number, number))


def test_what_has_no_elements_is_cast_too() -> None:
    empty = Tensor("a", Boxes(I32, (0, 2), ()))
    assert not empty.is_made
    assert Tensor("a", constant(torch.zeros(1, dtype=torch.int32))).is_made


def test_boxes_of_other_elements_are_refused() -> None:
    with pytest.raises(ValueError, match="other elements"):
        Boxes(DTYPES["F32"], (4,), (Box((0,), constant(torch.zeros(4, dtype=torch.int32))),))


VALUES = torch.linspace(-3, 3, 40).reshape(5, 8)


@pytest.fixture
def stored(tmp_path: Path) -> TensorSource:
    """Give a float32 matrix that lies in a file."""
    (tmp_path / "values").write_bytes(b"before" + raw_bytes(VALUES))
    return whole_view(DTYPES["F32"], (5, 8), ByteRange(ref_to(tmp_path / "values"), 6, VALUES.nbytes))


MADE: dict[str, tuple[Callable[[TensorSource], TensorSource], Callable[[torch.Tensor], torch.Tensor]]] = {
    "cast": (lambda source: Cast(source, DTYPES["BF16"]), lambda values: values.bfloat16()),
    "negated": (lambda source: Negated(source, 1), lambda values: -values),
    "swapped twice": (lambda source: Swapped(Swapped(source, 4), 4), lambda values: values),
    "cast of a transposed one": (
        lambda source: Cast(source.permuted((1, 0)), DTYPES["F16"]),
        lambda values: values.T.contiguous().half(),
    ),
    "negated cast of a cast": (
        lambda source: Negated(Cast(Cast(source, DTYPES["F16"]), DTYPES["F32"]), 1),
        lambda values: -values.half().float(),
    ),
    "joined": (
        lambda source: Boxes(
            DTYPES["F16"], (10, 8), (Box((0, 0), Cast(source, DTYPES["F16"])), Box((5, 0), Cast(source, DTYPES["F16"])))
        ),
        lambda values: torch.cat([values, values]).half(),
    ),
    "replicas": (
        lambda source: Cast(Replicas(source, (Negated(Negated(source, 1), 1),), "w").permuted((1, 0)), DTYPES["F16"]),
        lambda values: values.T.contiguous().half(),
    ),
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("chunk_nbytes", [4, 20, 1 << 20])
def test_what_is_made_of_others(stored: TensorSource, name: str, chunk_nbytes: int) -> None:
    make, judge = MADE[name]
    assert read(make(stored), chunk_nbytes) == raw_bytes(judge(VALUES))


@pytest.mark.parametrize("name", MADE)
def test_boxes_and_other_axes_of_what_is_made(stored: TensorSource, name: str) -> None:
    make, judge = MADE[name]
    source, whole = make(stored), judge(VALUES)
    assert read(source.box((1, 2), (3, 3))) == raw_bytes(whole[1:4, 2:5].contiguous())
    assert read(source.permuted((1, 0))) == raw_bytes(whole.T.contiguous())


@pytest.mark.parametrize("name", MADE)
def test_what_is_made_can_be_sent_elsewhere(stored: TensorSource, name: str) -> None:
    source = MADE[name][0](stored)
    sent = pickle.loads(pickle.dumps(source))
    assert sent == source
    assert sent.dtype is source.dtype
    assert read(sent) == read(source)


def test_an_axis_of_one_may_be_left_out(stored: TensorSource) -> None:
    column = stored.box((0, 3), (5, 1))
    assert column.permuted((0,)).shape == (5,)
    assert read(column.permuted((0,))) == raw_bytes(VALUES[:, 3].contiguous())
    known = Constant(DTYPES["F32"], (5, 1), read(column)).permuted((0,))
    assert (known.shape, read(known)) == ((5,), raw_bytes(VALUES[:, 3].contiguous()))


def test_a_cast_to_its_own_dtype_is_none(stored: TensorSource) -> None:
    tensor = Tensor("x", stored)
    assert cast(tensor, DTYPES["F32"]) is tensor
    assert cast(tensor, DTYPES["F16"]).dtype is DTYPES["F16"]


def test_what_a_cast_cannot_hold_is_counted() -> None:
    source = Cast(Constant(DTYPES["F32"], (3,), np.array([1e5, -1e6, 1], "<f4").tobytes()), DTYPES["F16"], "saturate")
    out = bytearray(6)
    with RangeReader() as reader:
        source.read(0, memoryview(out), reader)
    assert reader.too_large == 2
    assert np.frombuffer(out, "<f2").tolist() == [65504, -65504, 1]


def test_replicas_that_differ_are_found_where_they_do(stored: TensorSource, tmp_path: Path) -> None:
    other = VALUES.clone()
    other[3, 5] += 1
    (tmp_path / "other").write_bytes(raw_bytes(other))
    differing = whole_view(DTYPES["F32"], (5, 8), ByteRange(ref_to(tmp_path / "other"), 0, VALUES.nbytes))
    source = Replicas(stored, (stored, differing), "w")
    assert read(source.box((0, 0), (3, 8))) == raw_bytes(VALUES[:3])
    assert read(source.box((3, 0), (2, 5))) == raw_bytes(VALUES[3:, :5])
    for part in (source, source.box((2, 4), (3, 2)), source.permuted((1, 0)), pickle.loads(pickle.dumps(source))):
        with pytest.raises(BadFile, match="other: holds other values of tensor 'w' than values"):
            read(part, 16)
    assert hash(source) == hash(replace(source, name="tied"))

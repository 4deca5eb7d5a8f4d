"""Strides, contiguity and ties, held against torch's own."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import ref_to

from converter.dtypes import DTYPES
from converter.tensors.base import ByteRange, Tensor, find_ties
from converter.tensors.view import View, contiguous_strides, span_of

SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
FILE = ref_to("model.bin")
RECORD = ByteRange(FILE, 64, 4096)


def info(
    shape: tuple[int, ...] = (2, 3),
    strides: tuple[int, ...] | None = None,
    start: int = 0,
    name: str = "x",
    tag: str = "F32",
    storage: ByteRange = RECORD,
) -> Tensor:
    return Tensor(name, view(shape, strides, start, tag, storage))


def view(
    shape: tuple[int, ...] = (2, 3),
    strides: tuple[int, ...] | None = None,
    start: int = 0,
    tag: str = "F32",
    storage: ByteRange = RECORD,
) -> View:
    return View(DTYPES[tag], shape, storage, start, contiguous_strides(shape) if strides is None else strides)


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    """Draw a strided view, on the meta device: nothing but its shape and strides is looked at."""
    shape = draw(SHAPES)
    natural = torch.empty(shape, device="meta").stride()
    strides = [draw(st.sampled_from([step, step, 0, 1, 7])) for step in natural]
    return torch.empty_strided(shape, strides, device="meta")


@given(SHAPES)
def test_contiguous_strides_are_torchs(shape: tuple[int, ...]) -> None:
    assert contiguous_strides(shape) == torch.empty(shape, device="meta").stride()


@given(views())
def test_contiguous_means_what_it_means_in_torch(drawn: torch.Tensor) -> None:
    assert view(tuple(drawn.shape), drawn.stride()).is_contiguous == drawn.is_contiguous()


@given(views())
def test_the_span_reaches_from_the_first_to_the_last_element(drawn: torch.Tensor) -> None:
    places = [
        sum(place * stride for place, stride in zip(index, drawn.stride(), strict=True))
        for index in itertools.product(*map(range, drawn.shape))
    ]
    assert span_of(tuple(drawn.shape), drawn.stride()) == (max(places) + 1 if places else 0)


@pytest.mark.parametrize(
    ("shape", "tag", "numel", "nbytes"),
    [((), "F32", 1, 4), ((2, 3), "F16", 6, 12), ((0, 5), "I64", 0, 0), ((3,), "F4", 3, 2), ((2, 2), "C64", 4, 32)],
)
def test_sizes(shape: tuple[int, ...], tag: str, numel: int, nbytes: int) -> None:
    tensor = info(shape, tag=tag)
    assert (tensor.numel, tensor.nbytes) == (numel, nbytes)


def test_the_very_same_view_is_a_tie_to_the_first_name() -> None:
    tensors = [info(name="shared"), info(name="other", start=6), info(name="encoder"), info(name="decoder")]
    assert find_ties(tensors) == {"encoder": "shared", "decoder": "shared"}


@pytest.mark.parametrize(
    "other",
    [
        info((2, 3), start=1),
        info((3, 2)),
        info((6,)),
        info((2, 3), strides=(1, 2)),
        info((2, 3), tag="I32"),
        info((2, 3), storage=RECORD._replace(offset=128)),
        info((2, 3), storage=RECORD._replace(file=ref_to("other.bin"))),
    ],
    ids=["start", "shape", "dims", "strides", "dtype", "record", "file"],
)
def test_what_differs_in_anything_is_no_tie(other: Tensor) -> None:
    assert find_ties([info(name="x"), other._replace(name="y")]) == {}


def test_empty_tensors_are_never_tied() -> None:
    assert find_ties([info((0, 3), name="x"), info((0, 3), name="y")]) == {}


def test_ties_are_found_where_torch_says_they_are() -> None:
    base = torch.arange(12.0)
    state = {
        "a": base, "b": base[:], "c": base[1:], "d": base[1:], "e": base.view(3, 4), "f": base.view(3, 4).t(),
        "g": base.view(3, 4).t(), "h": base.clone(), "i": base.expand(2, 12), "j": base.expand(2, 12),
    }  # fmt: skip
    seen = {
        name: info(tuple(t.shape), t.stride(), t.storage_offset(), name, storage=ByteRange(FILE, address_of(t), 48))
        for name, t in state.items()
    }
    assert find_ties(seen.values()) == {"b": "a", "d": "c", "g": "f", "j": "i"}


def address_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize(("value", "field"), [(info(), "name"), (view(), "start"), (RECORD, "offset")])
def test_what_exists_does_not_change(value: object, field: str) -> None:
    with pytest.raises(AttributeError):
        setattr(value, field, 1)


def test_ties_of_views_that_would_hash_alike_are_found_in_time() -> None:
    """Integers hash modulo ``2**61 - 1``, and an axis of one element may have any stride."""
    alike = itertools.islice(itertools.product([way * ((1 << 61) - 1) for way in range(4)], repeat=8), 12_000)
    begin = time.process_time()
    views = [view((1,) * 8, strides) for strides in alike]
    assert all(one.is_contiguous and span_of(one.shape, one.strides) == 1 for one in views)
    assert find_ties(Tensor(str(place), one) for place, one in enumerate(views)) == {}
    assert time.process_time() - begin < 2

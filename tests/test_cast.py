"""Casts against torch: every bit pattern of the small dtypes, and of float32 in the slow test, to every target.

What is not NaN is bit-equal to torch's `.to()`, NaN stays NaN, and the count of values that are too large is exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch

from converter.dtypes import DTYPES
from converter.tensors.kernels import cast_chunk

Bits = npt.NDArray[Any]
OnOverflow = Literal["error", "saturate", "inf"]

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
TARGETS = ["BF16", "F16", "F8_E4M3", "F8_E5M2"]
# What rounds to more than the dtype holds; from here on, but in E4M3, whose largest value is even, beyond.
LIMITS = {"BF16": 2**128 - 2**119, "F16": 65520.0, "F8_E5M2": 61440.0, "F8_E4M3": 464.0}
POLICIES: list[OnOverflow] = ["error", "saturate", "inf"]
# Every cast there is: to a dtype itself is none.
PAIRS = [pair for pair in itertools.product(["F64", "F32", "BF16", "F16"], ["F32", *TARGETS]) if pair[0] != pair[1]]


def unsigned(tag: str) -> Any:
    """Give numpy's dtype for the bits of a dtype."""
    return UNSIGNED[TORCH[tag].itemsize]


def as_torch(bits: Bits, tag: str) -> torch.Tensor:
    """See bits as numbers."""
    return torch.from_numpy(bits.view(bits.dtype.str.replace("u", "i"))).view(TORCH[tag])


def to_bits(numbers: torch.Tensor) -> Bits:
    """See numbers as bits."""
    return numbers.view(SIGNED[numbers.itemsize]).numpy().view(UNSIGNED[numbers.itemsize])


def cast(bits: Bits, before: str, after: str, on_overflow: OnOverflow = "inf") -> tuple[Bits, int]:
    """Cast by wconv; give the bits, and how many values were too large."""
    out = np.full(bits.shape, 0x55, unsigned(after))
    count = cast_chunk(bits.data.cast("B"), DTYPES[before], out.data.cast("B"), DTYPES[after], on_overflow)
    return out, count


def cast_by_torch(bits: Bits, before: str, after: str, on_overflow: OnOverflow = "inf") -> tuple[Bits, int]:
    """Cast by torch; give the bits, and how many values were too large.

    Too large is what torch makes infinite and was not. E4M3 has no infinity: torch makes its largest value of all that
    is too large, and the format's own answer is NaN.
    """
    numbers = as_torch(bits, before)
    result = numbers.to(TORCH[after])
    if after == "F8_E4M3":
        too_large = numbers.to(torch.float32).abs() > LIMITS[after]
        beyond = torch.nan
    else:
        infinity = int(to_bits(torch.tensor([torch.inf]).to(TORCH[after]))[0])
        sign = 1 << (result.itemsize * 8 - 1)
        too_large = torch.from_numpy(to_bits(result) & (sign - 1) == infinity)
        beyond = torch.inf
    if not too_large.any():
        return to_bits(result), 0
    if after != "F8_E4M3":
        too_large &= ~numbers.isinf()
    answer = torch.finfo(TORCH[after]).max if on_overflow == "saturate" else beyond
    signed = torch.copysign(torch.tensor(answer), numbers.to(torch.float32)).to(TORCH[after])
    to_int = SIGNED[result.itemsize]
    result = torch.where(too_large, signed.view(to_int), result.view(to_int)).view(TORCH[after])
    return to_bits(result), int(too_large.sum())


def assert_cast_as_torch(bits: Bits, before: str, after: str, on_overflow: OnOverflow = "inf") -> None:
    """Hold a cast against torch's: all bits of what is no number's NaN, NaN for NaN, and the count."""
    found, count = cast(bits, before, after, on_overflow)
    expected, expected_count = cast_by_torch(bits, before, after, on_overflow)
    wrong = found != expected
    if wrong.any():
        wrong &= ~(is_nan(found, after) & is_nan(expected, after))
    examples = [
        f"{bits[place]:#x} to {found[place]:#x}, not {expected[place]:#x}" for place in np.flatnonzero(wrong)[:5]
    ]
    assert not examples, f"{int(wrong.sum()):,} of {len(bits):,}: {examples}"
    assert count == expected_count


def is_nan(bits: Bits, tag: str) -> npt.NDArray[np.bool_]:
    """Say which bits are NaN, by arithmetic on them."""
    sign = 1 << (bits.dtype.itemsize * 8 - 1)
    mantissa = {"F32": 23, "BF16": 7, "F16": 10, "F8_E4M3": 3, "F8_E5M2": 2}[tag]
    magnitude = bits & (sign - 1)
    if tag == "F8_E4M3":
        return magnitude == 0x7F
    return magnitude > ((sign - 1) >> mantissa << mantissa)


def every_pattern(tag: str) -> Bits:
    """Give all bit patterns of a 16-bit dtype."""
    return np.arange(1 << 16, dtype=np.uint16)


def sample_of_float32() -> Bits:
    """Give float32 patterns of every exponent and sign: what is exact, ties, and their neighbours, for every target.

    A target of m mantissa bits has its ties where the other bits are 100...; denormals of the targets lie at exponents
    of their own, whose ties are at other bits: so every single bit, with and without the bits below it.
    """
    low = {0, 0x7FFFFF}
    for bit in range(23):
        for keep in (0, 1, 2, 3):
            base = (keep << (bit + 1) | 1 << bit) & 0x7FFFFF
            low |= {base, base - 1, (base + 1) & 0x7FFFFF, 0x7FFFFF ^ base}
    mantissas = np.array(sorted(low), np.uint32)
    exponents = np.arange(256, dtype=np.uint32) << np.uint32(23)
    positive = (exponents[:, None] | mantissas[None, :]).ravel()
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, np.uint32)
    return np.concatenate([positive, positive | np.uint32(1 << 31), random])


def sample_of_float64() -> Bits:
    """Give float64 patterns: the float32 sample, its close neighbours, what float32 cannot hold, and random ones."""
    with np.errstate(invalid="ignore"):
        wide = sample_of_float32().view(np.float32).astype(np.float64).view(np.uint64)
    random = np.random.default_rng(1).integers(0, 1 << 64, 1 << 18, np.uint64)
    large = np.array([1e39, -1e39, 3.5e38, 1e308, 5e-324, -5e-324, 1e-46], np.float64).view(np.uint64)
    near = wide[: 1 << 18]
    return np.concatenate([wide, near + np.uint64(1), near - np.uint64(1), random, large])


SAMPLES: dict[str, Callable[[], Bits]] = {
    "F64": sample_of_float64,
    "F32": sample_of_float32,
    "BF16": lambda: every_pattern("BF16"),
    "F16": lambda: every_pattern("F16"),
}


@pytest.mark.parametrize("on_overflow", POLICIES)
@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_a_sample_is_cast_as_torch_casts_it(before: Any, after: Any, on_overflow: OnOverflow) -> None:
    assert_cast_as_torch(SAMPLES[before](), before, after, on_overflow)


FLOAT8 = ["F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"]


@pytest.mark.parametrize("on_overflow", POLICIES)
@pytest.mark.parametrize(
    ("before", "after"), [pair for pair in itertools.product(FLOAT8, ["F32", *TARGETS]) if pair[0] != pair[1]]
)
def test_every_8_bit_float_is_cast_as_torch_casts_it(before: Any, after: Any, on_overflow: OnOverflow) -> None:
    every = np.arange(1 << 8, dtype=np.uint8)
    for bits in (every, np.random.default_rng(0).permutation(np.tile(every, 9))[:2001]):
        assert_cast_as_torch(bits, before, after, on_overflow)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("after", "on_overflow"),
    [("BF16", "inf"), ("F16", "inf"), ("F8_E5M2", "inf"), ("F8_E4M3", "saturate"), ("F8_E4M3", "inf")],
)
def test_all_of_float32_is_cast_as_torch_casts_it(after: str, on_overflow: OnOverflow) -> None:
    step = 1 << 20  # stays in the processor's cache
    for begin in range(0, 1 << 32, step):
        assert_cast_as_torch(np.arange(begin, begin + step, dtype=np.uint32), "F32", after, on_overflow)


@pytest.mark.parametrize(("before", "after"), [(b, a) for b, a in PAIRS if a in LIMITS])
def test_neighbours_of_the_limit(before: Any, after: Any) -> None:
    exact = torch.tensor(LIMITS[after], dtype=torch.float64).to(TORCH[before])
    around = to_bits(exact.reshape(1)).astype(np.int64) + np.arange(-40, 41)
    bits = around.astype(unsigned(before))
    for each in (bits, bits | unsigned(before)(1 << (TORCH[before].itemsize * 8 - 1))):
        for on_overflow in POLICIES:
            assert_cast_as_torch(each, before, after, on_overflow)


@pytest.mark.parametrize("after", ["F32", "F16", "F8_E5M2", "F8_E4M3", "BF16"])
def test_what_float32_rounds_to_a_limit(after: str) -> None:
    # torch goes by way of float32: what that rounds across the limit is on the other side of it.
    limit = {**LIMITS, "F32": 2.0**128 - 2.0**103}[after]
    bits = np.array([limit], np.float64).view(np.int64) + np.arange(-3, 4)
    assert_cast_as_torch(bits.view(np.uint64), "F64", after, "inf")
    assert_cast_as_torch(bits.view(np.uint64), "F64", after, "saturate")


@pytest.mark.parametrize("after", TARGETS)
@pytest.mark.parametrize("odd", [0x7F800001, 0xFF800001, 0x7FFFFFFF, 0x7FC00000, 0x7F80FFFF, 0x7F800000, 0x7F7FFFFF])
def test_one_odd_value_is_seen_wherever_it_lies(after: str, odd: int) -> None:
    # Kernels work in blocks with a tail: one NaN, infinity or too large value at each place of each length.
    for length in [1, 2, 3, 7, 16, 33, 71]:
        for place in range(length):
            bits = np.full(length, 0x3F9E0419, np.uint32)
            bits[place] = odd
            assert_cast_as_torch(bits, "F32", after, "saturate")


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_neither_buffer_need_be_aligned(before: Any, after: Any) -> None:
    bits = SAMPLES[before]()[-1001:]
    expected, _ = cast(bits, before, after)
    for read_at, write_at in [(1, 0), (0, 1), (1, 1), (3, 5)]:
        source, out = bytearray(bits.nbytes + 8), bytearray(b"U" * (expected.nbytes + 8))
        source[read_at : read_at + bits.nbytes] = bits.tobytes()
        view = memoryview(out)[write_at : write_at + expected.nbytes]
        chunk = memoryview(source)[read_at : read_at + bits.nbytes]
        cast_chunk(chunk, DTYPES[before], view, DTYPES[after], "inf")
        assert bytes(view) == expected.tobytes()
        assert out[:write_at] == b"U" * write_at
        assert out[write_at + expected.nbytes :] == b"U" * (8 - write_at)


@pytest.mark.parametrize("after", TARGETS)
@pytest.mark.parametrize("length", [1, 2, 3, 5, 15, 17, 31, 63, 65, 127, 1023])
def test_any_length_is_cast_to_its_end(after: str, length: int) -> None:
    sample = sample_of_float32()[-length:]
    assert_cast_as_torch(sample, "F32", after)


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_nan_stays_nan_with_its_sign(before: Any, after: Any) -> None:
    bits = SAMPLES[before]()
    numbers = as_torch(bits, before)
    nans = bits[numbers.isnan().numpy()]
    assert len(nans) > 10
    found, count = cast(nans, before, after)
    assert is_nan(found, after).all()
    assert count == 0
    assert np.array_equal(found >> (found.dtype.itemsize * 8 - 1), nans >> (nans.dtype.itemsize * 8 - 1))

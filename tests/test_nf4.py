"""The 4-bit forms of bitsandbytes, with the library on the CPU for a judge: their numbers, and what is refused."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Container
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.tiny import raw_bytes

from converter.dtypes import DTYPES
from converter.errors import BadFile, LossyCast, WconvError
from converter.models.checkpoint import Checkpoint, open_checkpoint
from converter.models.inventory import find_weight_set
from converter.tensors.base import Tensor, TensorSource
from converter.tensors.derived import Constant, cast
from converter.tensors.reader import RangeReader
from converter.transforms.quantize import DEQUANTIZERS, QUANTIZERS
from converter.transforms.quantize.codes import steps_of
from converter.transforms.quantize.kernels import rounding_errors
from converter.transforms.quantize.restore import find_restored

OF_DTYPE = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SHAPES = [(64, 128), (5, 13), (7, 10), (3, 66), (1, 1), (130, 1), (2, 3, 34)]
WRITE = QUANTIZERS["nf4"].write


def wide_range(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Make numbers of very different sizes, with blocks of zeros and of what float32 has no reciprocal for."""
    generator = torch.Generator().manual_seed(0)
    numel = math.prod(shape)
    weight = torch.randn(numel, generator=generator)
    sizes = 10.0 ** (torch.arange(numel) // 64 % 9 - 6.0)
    sizes[64:128] = 0
    sizes[128:192] = 1e-39
    return (weight * sizes).reshape(shape).to(dtype)


def judged(weight: torch.Tensor, kind: str = "nf4", **options: Any) -> dict[str, torch.Tensor]:
    """Give what bitsandbytes writes for ``m.weight``."""
    import bitsandbytes.functional as library

    packed, state = library.quantize_4bit(weight, quant_type=kind, **options)
    beside = {f"m.weight.{name}": one for name, one in state.as_dict(packed=True).items()}
    return {"m.weight": packed, **beside}


def numbers_of(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """Give what bitsandbytes makes of tensors again, by its kernel that is right for blocks in two rows too."""
    import bitsandbytes.functional as library
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    beside = {name.removeprefix("m.weight."): one for name, one in state.items() if name != "m.weight"}
    held = library.QuantState.from_dict(beside, torch.device("cpu"))
    absmax = held.absmax
    if held.nested:
        absmax = library.dequantize_blockwise(absmax, held.state2) + held.offset
    packed = state["m.weight"].reshape(-1).view(torch.uint8)
    compute = getattr(_dequantize_4bit_compute, "__wrapped__", _dequantize_4bit_compute)  # compiling takes seconds
    numbers = compute(packed, absmax, held.code, held.blocksize, held.shape, held.dtype)
    assert isinstance(numbers, torch.Tensor)
    return numbers


def saved(folder: Path, state: dict[str, torch.Tensor]) -> Checkpoint:
    path = folder / f"{len(list(folder.iterdir()))}.safetensors"
    save_file(state, path)
    return open_checkpoint(find_weight_set(path))


def restored(checkpoint: Checkpoint, transposed: Container[str] = ()) -> Any:
    found = find_restored(checkpoint, DEQUANTIZERS, {}, lambda _: transposed)
    assert len(found.beside) + 1 == len(checkpoint.tensors)
    return found.weights["m.weight"]


def read(source: TensorSource, begin: int = 0, end: int | None = None) -> bytes:
    """Read a tensor from one place of its bytes to another."""
    out = bytearray((source.dtype.nbytes(math.prod(source.shape)) if end is None else end) - begin)
    with RangeReader() as reader:
        source.read(begin, memoryview(out), reader)
    return bytes(out)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("tag", OF_DTYPE)
def test_numbers_are_those_of_bitsandbytes(tmp_path: Path, kind: str, tag: str) -> None:
    for shape in SHAPES:
        for options in ({}, {"blocksize": 128}, {"compress_statistics": True}):
            state = judged(wide_range(shape, OF_DTYPE[tag]), kind, **options)
            found = restored(saved(tmp_path, state))
            assert (found.name, found.dtype, found.source.shape) == ("m.weight", DTYPES[tag], shape)
            assert read(cast(Tensor("m", found.source), found.dtype).source) == raw_bytes(numbers_of(state))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_all_codes_are_those_that_the_library_runs_with(tmp_path: Path, kind: str) -> None:
    # Blocks in one row are what its own kernel for the CPU does right; signs of zeros differ among its kernels.
    import bitsandbytes.functional as library

    state = judged(torch.ones(16, 64), kind)
    state["m.weight"] = torch.arange(512).to(torch.uint8).reshape(512, 1)
    beside = {name.removeprefix("m.weight."): one for name, one in state.items() if name != "m.weight"}
    held = library.QuantState.from_dict(beside, torch.device("cpu"))
    expected = library.dequantize_4bit(state["m.weight"], held)
    found = torch.frombuffer(bytearray(read(restored(saved(tmp_path, state)).source)), dtype=torch.float32)
    assert torch.equal(found, expected.flatten())


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32, torch.int8])
def test_codes_lie_in_any_dtype(tmp_path: Path, storage: torch.dtype) -> None:
    state = judged(wide_range((8, 96)), quant_storage=storage)
    assert state["m.weight"].dtype == storage
    assert read(restored(saved(tmp_path, state)).source) == raw_bytes(numbers_of(state))


@pytest.mark.parametrize("nested", [False, True])
def test_parts_and_a_transposed_one(tmp_path: Path, nested: bool) -> None:
    state = judged(wide_range((20, 33)), compress_statistics=nested)
    checkpoint = saved(tmp_path, state)
    source = restored(checkpoint).source
    whole = raw_bytes(numbers_of(state))
    for begin in (0, 4, 252, 260, 1000):
        for one in (source, source.part(begin, 2000)):
            assert read(one, begin, 2000) == whole[begin:2000]
    turned = restored(checkpoint, transposed={"m"}).source
    assert turned.shape == (33, 20)
    expected = raw_bytes(numbers_of(state).T)
    assert read(turned) == expected
    assert read(turned, 44, 2000) == expected[44:2000]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("options", [{}, {"compress_statistics": True, "blocksize": 32}], ids=["plain", "double"])
@pytest.mark.parametrize("tag", OF_DTYPE)
def test_each_value_is_within_half_a_step(tmp_path: Path, kind: str, options: Any, tag: str) -> None:
    weight = wide_range((70, 200))
    found = restored(saved(tmp_path, judged(weight.to(OF_DTYPE[tag]), kind, **options)))
    raw, steps = (memoryview(read(one)) for one in (found.source, steps_of(found.source)))
    before = memoryview(raw_bytes(weight))
    assert not rounding_errors(before, DTYPES["F32"], raw, steps, found.slack).beyond
    wrong = bytearray(raw)
    wrong[-8:-4] = raw_bytes(torch.tensor(9.9))
    assert rounding_errors(before, DTYPES["F32"], memoryview(wrong), steps, found.slack).beyond == 1


def test_experts_that_were_quantized_in_place(tmp_path: Path) -> None:
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up = torch.nn.Parameter(torch.randn(3, 8, 64))
            self.gate_up_bias = torch.nn.Parameter(torch.randn(3, 8))

    experts = Experts()
    replace_parameter_4bit(experts, "gate_up", quant_type="fp4")
    state = {f"e.{name}": one for name, one in experts.state_dict().items()}
    found = find_restored(saved(tmp_path, state), DEQUANTIZERS, {})
    assert read(found.weights["e.gate_up"].source) == raw_bytes(experts.gate_up)
    assert found.beside == state.keys() - {"e.gate_up", "e.gate_up_bias"}


# Hostile and odd.

GOOD = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [4, 64]}
DOUBLE = {**GOOD, "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
STATE = "m.weight.quant_state.bitsandbytes__nf4"


def packed_json(said: Any) -> torch.Tensor:
    raw = said if isinstance(said, bytes) else json.dumps(said).encode()
    return torch.tensor(list(raw), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (b"", "is no JSON"),
        (b"\xff{}", "is no JSON"),
        (b"[" * 9000, "is no JSON"),
        (b"[]", "no JSON object"),
        (b"{}" + b" " * 20_000, "20,002 bytes"),
        ({}, "lacks, or should not have, 'blocksize'"),
        ({**GOOD, "absmax": 1}, "should not have, 'absmax'"),
        ({**GOOD, "nested_offset": 0.1}, "lacks, or should not have, 'nested_blocksize', 'nested_dtype'"),
        ({**GOOD, "quant_type": "fp4"}, "quant_type is another"),
        ({**GOOD, "quant_type": ["nf4"]}, "quant_type is another"),
        *(({**GOOD, "blocksize": one}, "a block of .* is none") for one in (0, -64, 64.0, True, "64", None, 1 << 40)),
        *(({**GOOD, "dtype": one}, "dtype is none") for one in ("float64", "torch.float32", 3, ["float32"])),
        *(
            ({**GOOD, "shape": one}, "its shape (is no|has 201)")
            for one in ([1] * 200 + [256], None, 256, "4", [4, 64.0], [True, 256], [-4, -64], [1 << 90, 1], [[4, 64]])
        ),
        *(({**GOOD, "shape": one}, "its shape needs") for one in ([4, 65], [1 << 40, 1 << 40], [0, 4], [])),
        ({**GOOD, "blocksize": 32}, r"absmax' that does not fit .*F32 \[4\], and has to be F32 \[8\]"),
        *(({**DOUBLE, "nested_offset": one}, "nested_offset is no") for one in (float("nan"), 1e39, True, "0")),
        ({**DOUBLE, "nested_dtype": "float16"}, "nested_dtype is not"),
        ({**DOUBLE, "nested_blocksize": 0}, "a block of 0 numbers is none"),
        (DOUBLE, r"absmax' that does not fit .*F32 \[4\], and has to be U8 \[4\]"),
    ],
)  # fmt: skip
def test_json_that_is_no_state_is_refused(tmp_path: Path, said: Any, problem: str) -> None:
    state = judged(torch.ones(4, 64))
    with pytest.raises(BadFile, match=problem):
        restored(saved(tmp_path, {**state, STATE: packed_json(said)}))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("name", "one"),
    [
        ("quant_map", None),
        ("quant_map", torch.linspace(-1, 1, 16)),
        ("quant_map", torch.full((16,), math.nan)),
        ("quant_map", torch.zeros(15)),
        ("quant_map", torch.zeros(16).half()),
        ("absmax", None),
        ("absmax", torch.ones(5)),
        ("absmax", torch.ones(4).half()),
        ("absmax", torch.tensor([1.0, math.inf, 1, 1])),
        ("absmax", torch.tensor([1.0, math.nan, 1, 1])),
        ("nested_absmax", None),
        ("nested_absmax", torch.ones(2)),
        ("nested_absmax", torch.tensor([math.nan])),
        ("nested_quant_map", None),
        ("nested_quant_map", torch.zeros(255)),
        ("nested_quant_map", torch.full((256,), math.inf)),
        ("quant_state.bitsandbytes__nf4", None),
        ("quant_state.bitsandbytes__fp4", torch.zeros(3, dtype=torch.uint8)),
    ],
)
def test_what_is_missing_or_odd_is_named(tmp_path: Path, nested: bool, name: str, one: Any) -> None:
    state = judged(torch.randn(4, 64), compress_statistics=nested)
    if name.startswith("nested") and not nested and one is None:
        return
    state.pop(f"m.weight.{name}", None)
    if one is not None:
        state[f"m.weight.{name}"] = one
    with pytest.raises(BadFile) as raised:
        read(restored(saved(tmp_path, state)).source)
    assert "m.weight." in str(raised.value)


def test_weights_of_another_length_and_unknown_neighbours_are_refused(tmp_path: Path) -> None:
    state = judged(torch.randn(4, 64))
    for weight in (state["m.weight"][:-1], state["m.weight"].T.contiguous(), state["m.weight"].float()):
        with pytest.raises(BadFile, match="its shape needs 128 bytes"):
            restored(saved(tmp_path, {**state, "m.weight": weight}))
    for name in ("m.weight.other", "m.weight.quant_state.bitsandbytes__int8", "m.SCB"):
        with pytest.raises(WconvError, match=name):
            find_restored(saved(tmp_path, {**state, name: torch.ones(2)}), DEQUANTIZERS, {})


def test_scales_that_are_zero_or_negative_are_products(tmp_path: Path) -> None:
    state = judged(torch.randn(4, 64))
    state["m.weight.absmax"] = torch.tensor([0.0, -2.0, 1e-45, 3e38])
    assert read(restored(saved(tmp_path, state)).source) == raw_bytes(numbers_of(state))


# Writing.


def written(weight: Tensor) -> dict[str, TensorSource]:
    return {one.name: one.source for one in WRITE(weight, b"")}


def constant(weight: torch.Tensor, tag: str) -> Tensor:
    return Tensor("m.weight", Constant(DTYPES[tag], tuple(weight.shape), raw_bytes(weight)))


@pytest.mark.parametrize("tag", OF_DTYPE)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) == 2] + [(1000, 67)], ids=str)
def test_what_is_written_is_what_bitsandbytes_writes(tag: str, shape: tuple[int, ...]) -> None:
    weight = wide_range(shape, OF_DTYPE[tag])
    found, expected = written(constant(weight, tag)), judged(weight)
    assert {name: (one.dtype.torch_name, one.shape) for name, one in found.items()} == {
        name: (str(one.dtype).removeprefix("torch."), tuple(one.shape)) for name, one in expected.items()
    }
    assert {name: read(one) for name, one in found.items()} == {name: raw_bytes(one) for name, one in expected.items()}


def test_any_chunks_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = wide_range((97, 41))
    [info] = saved(tmp_path, {"m.weight": weight}).tensors
    expected = judged(weight)
    monkeypatch.setattr("converter.transforms.quantize.bnb_4bit._BAND_NBYTES", 512)
    for source in (
        info.source,
        saved(tmp_path, {"m.weight": weight.T.contiguous()}).tensors[0].source.permuted((1, 0)),
    ):
        for name, one in written(info._replace(source=source)).items():
            raw, size = raw_bytes(expected[name]), one.dtype.itemsize
            for begin in (0, size, 31 * size, 33 * size):
                for end in {begin + size, begin + 29 * size, len(raw)} & set(range(begin, len(raw) + 1)):
                    assert read(one.part(begin, end), begin, end) == raw[begin:end]


def test_float64_goes_by_way_of_float32() -> None:
    weight = wide_range((9, 30)).double() * (1 + 2**-30)
    found, expected = pickle.loads(pickle.dumps(written(constant(weight, "F64")))), judged(weight.float())
    assert {name: read(one) for name, one in found.items()} == {name: raw_bytes(one) for name, one in expected.items()}


def test_ties_go_to_the_lower_code() -> None:
    table = torch.tensor(judged(torch.ones(2))["m.weight.quant_map"].tolist())
    bounds = (table[:-1] + table[1:]) / 2
    weight = torch.cat([bounds, torch.nextafter(bounds, bounds + 1), bounds * 0 + 1, table[:1], table[-1:] * 0 - 0.0])
    weight = weight.reshape(1, -1)
    assert read(written(constant(weight, "F32"))["m.weight"]) == raw_bytes(judged(weight)["m.weight"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 70, 199])
def test_values_that_are_not_finite_are_refused(value: float, place: int) -> None:
    weight = torch.randn(200)
    weight[place] = value
    for name in ("m.weight", "m.weight.absmax"):
        with pytest.raises(LossyCast, match=r"no finite numbers, in 'm\.weight'.*--skip"):
            read(written(constant(weight.reshape(2, 100), "F32"))[name])

"""The numbers of the 8-bit form, with bitsandbytes on the CPU for a judge, and how they are read in parts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import raw_bytes

from converter.dtypes import DTYPES
from converter.errors import BadFile, Unsupported
from converter.models.checkpoint import Checkpoint, open_checkpoint
from converter.models.inventory import find_weight_set
from converter.models.schemes import LLM_INT8
from converter.tensors.base import Tensor, TensorSource
from converter.tensors.derived import Constant, cast
from converter.tensors.reader import RangeReader
from converter.transforms.quantize import DEQUANTIZERS
from converter.transforms.quantize.bnb_int8 import find_scales, quantized
from converter.transforms.quantize.codes import steps_of
from converter.transforms.quantize.kernels import are_finite, rounding_errors
from converter.transforms.quantize.restore import Module, find_restored
from converter.transforms.quantize.write import cut_rows
from converter.transforms.quantize.write_kernels import RowScales, cell_maxima, in_halves, quantize_chunk

DTYPES_OF_WEIGHTS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def judged(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give what bitsandbytes makes of a weight: int8, and scales."""
    import bitsandbytes

    parameter = bitsandbytes.nn.Int8Params(weight.clone(), requires_grad=False).to("cpu")
    return parameter.data, parameter.SCB


def wide_range(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Make a matrix whose rows are of very different sizes: of zeros, of subnormal float16 numbers, of large ones."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.linspace(-9, 4, shape[0], dtype=torch.float64)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64).clamp(-6, 6) * sizes[:, None]
    weight[0] = 0
    return weight


def quantize_in_parts(weight: torch.Tensor, tag: str, cut: int) -> tuple[bytes, bytes]:
    """Give int8 values and scales as wconv makes them, the values in two chunks."""
    raw = memoryview(raw_bytes(weight))
    columns = weight.shape[1]
    scales = in_halves(cell_maxima(raw, DTYPES[tag], (1, columns), columns))
    out = bytearray(weight.numel())
    place = cut * weight.element_size()
    quantize_chunk(raw[:place], DTYPES[tag], memoryview(out)[:cut], RowScales(scales, columns), 0)
    quantize_chunk(raw[place:], DTYPES[tag], memoryview(out)[cut:], RowScales(scales, columns), cut)
    return bytes(out), scales


@pytest.mark.parametrize("tag", DTYPES_OF_WEIGHTS)
@pytest.mark.parametrize("shape", [(7, 13), (64, 2048), (3, 100_000), (500, 5), (9, 1)], ids=str)
def test_numbers_are_those_of_bitsandbytes(tag: str, shape: tuple[int, ...]) -> None:
    weight = wide_range(shape).to(DTYPES_OF_WEIGHTS[tag])
    values, scales = judged(weight)
    for cut in (0, 1, shape[1] + 2):
        found = quantize_in_parts(weight, tag, cut)
        assert found[1] == raw_bytes(scales)
        assert found[0] == raw_bytes(values)


def test_ties_go_to_the_even_step() -> None:
    # torch takes 127 / scale as a product with the reciprocal, rounded twice, so that few ties stay ties.
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5], [254.0, 1.0, 3.0, 5.0, -1.0, -3.0, -253.0]])
    values, scales = judged(weight)
    assert quantize_in_parts(weight, "F32", 0) == (raw_bytes(values), raw_bytes(scales))
    assert values[1].tolist() == [127, 0, 2, 2, 0, -2, -126]


@pytest.mark.parametrize(
    ("value", "finite"), [(65519.0, True), (65520.0, False), (float("inf"), False), (float("nan"), False)]
)
def test_what_float16_cannot_hold_shows_in_the_scales(value: float, finite: bool) -> None:
    weight = torch.tensor([[1.0, value, -2.0], [3.0, 4.0, 5.0]])
    scales = in_halves(cell_maxima(memoryview(raw_bytes(weight)), DTYPES["F32"], (1, 3), 3))
    assert are_finite(memoryview(scales)) is finite


@pytest.mark.parametrize("tag", ["F32", "BF16", "F16"])
def test_the_way_back_is_that_of_bitsandbytes(tag: str) -> None:
    import bitsandbytes

    values, scales = judged(wide_range((40, 33)))
    # What float16 cannot hold is not for this test: the largest row is below.
    expected = bitsandbytes.functional.int8_vectorwise_dequant(values, scales)[:-4].to(DTYPES_OF_WEIGHTS[tag])
    values, scales = values[:-4].contiguous(), scales[:-4]
    widened = widened_rows(values, scales)
    source = cast(Tensor("w", widened), DTYPES[tag]).source
    for first in (0, 5, 33, 70):
        for part in (source, source.part(first * expected.element_size(), expected.nbytes)):
            assert read(part, first * expected.element_size()) == raw_bytes(expected)[first * expected.element_size() :]


def widened_rows(values: torch.Tensor, scales: torch.Tensor) -> TensorSource:
    weight = Tensor("m.weight", Constant(DTYPES["I8"], tuple(values.shape), raw_bytes(values)))
    rows = Tensor("m.SCB", Constant(DTYPES["F32"], tuple(scales.shape), raw_bytes(scales)))
    return DEQUANTIZERS[LLM_INT8](Module(LLM_INT8, "m", weight, {".SCB": rows}, {}, {})).source


def read(source: TensorSource, begin: int = 0) -> bytes:
    """Read a tensor from a place of its bytes to the end."""
    out = bytearray(source.dtype.nbytes(math.prod(source.shape)) - begin)
    with RangeReader() as reader:
        source.read(begin, memoryview(out), reader)
    return bytes(out)


def test_a_transposed_matrix_has_a_scale_for_each_column() -> None:
    values, scales = judged(wide_range((6, 40)).float())
    transposed = widened_rows(values, scales).permuted((1, 0))
    expected = (values * scales[:, None] / 127).T.contiguous()
    for first in (0, 1, 6, 14):
        for part in (transposed, transposed.part(4 * first, expected.nbytes)):
            found = torch.frombuffer(bytearray(read(part, 4 * first)), dtype=torch.float32)
            torch.testing.assert_close(found, expected.flatten()[first:])


def test_a_box_of_a_matrix_has_the_scales_of_its_rows() -> None:
    values, scales = judged(wide_range((6, 40)).float())
    matrix = widened_rows(values, scales)
    whole = torch.frombuffer(bytearray(read(matrix)), dtype=torch.float32).reshape(6, 40)
    box = whole[2:5, 7:20].contiguous()
    assert read(matrix.box((2, 7), (3, 13))) == raw_bytes(box)
    assert read(matrix.permuted((1, 0)).box((7, 2), (13, 3))) == raw_bytes(box.T.contiguous())


@given(st.data())
def test_each_value_comes_back_within_half_a_step(data: Any) -> None:
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    numbers = st.floats(-65504, 65504, width=32)
    weight = torch.tensor(data.draw(st.lists(numbers, min_size=rows * columns, max_size=rows * columns)))
    weight = weight.reshape(rows, columns)
    values, scales = quantize_in_parts(weight, "F32", data.draw(st.integers(0, rows * columns)))
    made = torch.frombuffer(bytearray(values), dtype=torch.int8).reshape(rows, columns)
    matrix = widened_rows(made, torch.frombuffer(bytearray(scales), dtype=torch.float32))
    found = torch.frombuffer(bytearray(read(matrix)), dtype=torch.float32).reshape(rows, columns).double()
    half = torch.frombuffer(bytearray(scales), dtype=torch.float32).double()[:, None] / 254
    rounded = weight.half().double()
    # The product of two float32 numbers is rounded; so is the step.
    assert ((found - rounded).abs() <= half * 1.0001).all()
    raw, steps = (memoryview(read(one)) for one in (matrix, steps_of(matrix)))
    assert not rounding_errors(memoryview(raw_bytes(weight)), DTYPES["F32"], raw, steps, 2**-11).beyond


def test_a_value_beyond_half_a_step_is_counted() -> None:
    weight = torch.tensor([[127.0, 3.0, 0.0]])
    matrix = widened_rows(torch.tensor([[127, 4, 0]], dtype=torch.int8), torch.tensor([127.0]))
    raw, steps = (memoryview(read(one)) for one in (matrix, steps_of(matrix)))
    found = rounding_errors(memoryview(raw_bytes(weight)), DTYPES["F32"], raw, steps, 2**-11)
    assert found == (1, 1.0, 127.0, 1.0, 130.0)
    assert not rounding_errors(memoryview(raw_bytes(weight)), DTYPES["F32"], raw, steps, None).beyond


# In files.


def save_matrix(folder: Path, weight: torch.Tensor, **others: torch.Tensor) -> Checkpoint:
    from safetensors.torch import save_file

    save_file({"m.weight": weight, **others}, folder / "model.safetensors")
    return open_checkpoint(find_weight_set(folder / "model.safetensors"))


@pytest.mark.parametrize("chunk_nbytes", [64, 1000, 1 << 16])
def test_scales_are_found_in_small_chunks(tmp_path: Path, chunk_nbytes: int) -> None:
    # With 64 bytes no row fits the buffer.
    weight = wide_range((30, 37)).float()
    [info] = save_matrix(tmp_path, weight).tensors
    found = [find_scales(block, chunk_nbytes) for block in cut_rows(info)]
    assert b"".join(scales.found for scales in found) == raw_bytes(judged(weight)[1])


def test_the_three_tensors_of_a_module(tmp_path: Path) -> None:
    weight = wide_range((4, 3)).float()
    [info] = save_matrix(tmp_path, weight).tensors
    made = quantized(info, raw_bytes(judged(weight)[1]))
    assert [(one.name, one.dtype.tag, one.shape) for one in made] == [
        ("m.weight", "I8", (4, 3)),
        ("m.SCB", "F32", (4,)),
        ("m.weight_format", "U8", ()),
    ]


@pytest.mark.parametrize(
    ("others", "error", "problem"),
    [
        ({"m.SCB": torch.ones(3)}, BadFile, "does not fit"),
        ({"m.SCB": torch.ones(4).half()}, BadFile, "does not fit"),
        ({"m.SCB": torch.ones(4), "m.weight_format": torch.tensor(2, dtype=torch.uint8)}, Unsupported, "row by row"),
    ],
)
def test_scales_that_do_not_fit_are_refused(
    tmp_path: Path, others: dict[str, Any], error: type[Exception], problem: str
) -> None:
    checkpoint = save_matrix(tmp_path, torch.ones(4, 3, dtype=torch.int8), **others)
    with pytest.raises(error, match=problem):
        find_restored(checkpoint, DEQUANTIZERS, {})

"""The LLM.int8 form of bitsandbytes: what a file holds in place of a linear weight, and how a config says so.

For a linear module ``m``: ``m.weight`` is int8 [out, in], ``m.SCB`` float32 [out], the largest magnitude of each row,
and ``m.weight_format`` a uint8 scalar, 0 for row by row (``Linear8bitLt._save_to_state_dict`` in
``bitsandbytes/nn/modules.py``). A number is int8 * SCB / 127. GPT-2's Conv1D, whose weight is [in, out], is written as
[out, in] too (``Bnb8bitQuantize`` in ``transformers/integrations/bitsandbytes.py``).
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from converter.dtypes import DTYPES, DType
from converter.errors import HostileFile, Unsupported, Where
from converter.tensors.base import Reader, Tensor
from converter.tensors.derived import Constant, Derived
from converter.tensors.reader import RangeReader, piece_nbytes_for
from converter.transforms.quantize.codes import Gridded, Scales, Widened, reshaped
from converter.transforms.quantize.restore import Module, Restored

if TYPE_CHECKING:
    from converter.transforms.quantize.row_kernels import RowScales

_R = TypeVar("_R", bound="_Scaled")

_MAX_SCALES_NBYTES = 128_000_000  # 4 a row: of a model of 400 billion weights 100 MB
_WEIGHT, _SCALES, _FORMAT = ".weight", ".SCB", ".weight_format"
_STEP = struct.pack("<f", 1 / 127)
_HALF = 2**-11  # values are rounded to float16 first


def quantization_config(skipped: Iterable[str]) -> dict[str, Any]:
    """Give what config.json says of a quantized model, as ``BitsAndBytesConfig.to_dict`` of both libraries does."""
    return {
        "_load_in_4bit": False,
        "_load_in_8bit": True,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(skipped),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": False,
        "load_in_8bit": True,
        "quant_method": "bitsandbytes",
    }


@dataclass(frozen=True, slots=True)
class _Scaled(Derived):
    """A matrix by way of ``scales``: float32, one a row from the row ``first`` on; with ``axis`` 1, one a column."""

    scales: bytes
    first: int = 0
    axis: int = 0

    @property
    def computes(self) -> bool:
        return True

    def part(self: _R, begin: int, end: int) -> _R:
        part = Derived.part(self, begin, end)
        if self.axis:
            return part
        row = self.shape[1] * self.dtype.itemsize
        first, last = begin // row, -(-end // row)
        return replace(part, scales=part.scales[4 * (first - self.first) : 4 * (last - self.first)], first=first)

    def box(self: _R, start: tuple[int, ...], shape: tuple[int, ...]) -> _R:
        first = start[self.axis] - self.first
        scales = self.scales[4 * first : 4 * (first + shape[self.axis])]
        return replace(self, source=self.source.box(start, shape), scales=scales, first=0)

    def permuted(self: _R, axes: tuple[int, ...]) -> _R:
        return replace(self, source=self.source.permuted(axes), axis=axes.index(self.axis))

    def row_scales(self) -> RowScales:
        """Give the scales as the kernels want them."""
        from converter.transforms.quantize.row_kernels import RowScales

        return RowScales(self.scales, self.shape[1], self.axis)


class QuantizedRows(_Scaled):
    """A matrix [out, in] in 8 bits."""

    __slots__ = ()

    @property
    def dtype(self) -> DType:
        return DTYPES["I8"]

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        from converter.transforms.quantize.row_kernels import quantize_chunk

        before = self.source.dtype
        with reader.scratch(len(out) * before.itemsize) as values:
            self.source.read(begin * before.itemsize, values, reader)
            quantize_chunk(values, before, out, self.row_scales(), begin - self.first * self.shape[1])


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Rows ``begin`` to ``end`` of a matrix."""

    weight: Tensor
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.weight.dtype.nbytes((self.end - self.begin) * self.weight.shape[1])


def cut_rows(weight: Tensor) -> Iterator[RowBlock]:
    """Cut a matrix into blocks of rows, each of some MB, for one task each."""
    step = max(1, piece_nbytes_for([weight.source]) // weight.dtype.nbytes(weight.shape[1]))
    for begin in range(0, weight.shape[0], step):
        yield RowBlock(weight, begin, min(weight.shape[0], begin + step))


class Measured(NamedTuple):
    """What the rows of a block are scaled by: float32 numbers, which are not finite where float16 is too small."""

    block: RowBlock
    numbers: bytes
    are_finite: bool


def find_scales(block: RowBlock, chunk_nbytes: int) -> Measured:
    """Find the largest magnitude of each row of a block. Raises BadFile for a file that became shorter."""
    from converter.transforms.quantize.row_kernels import are_finite, row_maxima

    weight = block.weight
    dtype, columns = weight.dtype, weight.shape[1]
    buffer = memoryview(bytearray(max(chunk_nbytes, weight.source.window)))
    room = len(buffer) // dtype.itemsize
    found = []
    with RangeReader() as reader:
        reader.expect(weight.source.extents(*(dtype.nbytes(row * columns) for row in (block.begin, block.end))))

        def read(first: int, count: int) -> memoryview:
            view = buffer[: dtype.nbytes(count)]
            weight.source.read(dtype.nbytes(first), view, reader)
            return view

        step = max(1, room // columns)
        for row in range(block.begin, block.end, step):
            numel = (min(block.end, row + step) - row) * columns
            if numel <= room:
                found.append(row_maxima(read(row * columns, numel), dtype, columns))
                continue
            # A row that the buffer does not hold: the largest of its parts' largest.
            cuts = [*range(0, columns, room), columns]
            parts = [
                row_maxima(read(row * columns + begin, end - begin), dtype, end - begin)
                for begin, end in itertools.pairwise(cuts)
            ]
            found.append(row_maxima(memoryview(b"".join(parts)), DTYPES["F32"], len(parts)))
    numbers = b"".join(found)
    return Measured(block, numbers, are_finite(numbers))


def quantized(weight: Tensor, scales: bytes) -> tuple[Tensor, Tensor, Tensor]:
    """Give the three tensors that stand for a weight [out, in]; they must come into one file."""
    module = weight.name.removesuffix(_WEIGHT)
    numbers = Constant(DTYPES["F32"], (weight.shape[0],), scales)
    return (
        weight._replace(source=QuantizedRows(weight.source, scales)),
        Tensor(module + _SCALES, numbers, beside=weight.name),
        Tensor(module + _FORMAT, Constant(DTYPES["U8"], (), b"\0"), beside=weight.name),
    )


def check_scales(path: Where, weights: Iterable[Tensor]) -> None:
    """Raise HostileFile where the scales of weights, one a row, are more than can be held; or they are those scales."""
    if sum(4 * weight.shape[0] for weight in weights) > _MAX_SCALES_NBYTES:
        raise HostileFile(path, f"has more than {_MAX_SCALES_NBYTES:,} bytes of scales, and no model has them")


def restore(module: Module) -> Restored:
    """Give the numbers of an int8 weight, [in, out] where that is what its library has: products in float32.

    As ``int8_vectorwise_dequant`` does in ``bitsandbytes/backends/default/ops.py``. Raises BadFile for scales that do
    not fit, Unsupported for a layout that is not row by row.
    """
    weight, scales = module.weight, module.scale(_SCALES)
    rows = weight.shape[0] if len(weight.shape) == 2 else 0
    if len(weight.shape) != 2 or scales.dtype.tag != "F32" or scales.shape != weight.shape[:1]:
        raise module.misfit(_SCALES, f"it is {scales.dtype} {list(scales.shape)} beside {list(weight.shape)}")
    layout = module.contents.get(_FORMAT, b"")
    if len(layout) > 1:
        raise module.misfit(_FORMAT, "it is no single number")
    if any(layout):
        problem = f"has weights that are not laid out row by row, as {module.base + _FORMAT!r} says"
        raise Unsupported(weight.where, problem, "Load it with the bitsandbytes that wrote it.")
    grid = Scales(reshaped(scales.source, scales.dtype, (rows, 1)), scales.name)
    numbers = Gridded(Widened(weight.source), grid, (1, max(1, weight.shape[1])))
    steps = Gridded(numbers, Constant(DTYPES["F32"], (1, 1), _STEP), tuple(max(1, n) for n in weight.shape))
    return Restored(weight.name, steps.permuted((1, 0)) if module.is_transposed else steps, slack=_HALF)

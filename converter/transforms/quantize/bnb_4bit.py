"""The 4-bit forms of bitsandbytes, nf4 and fp4: what files hold in place of a weight; nf4 is written too.

For a weight ``m.weight`` of n numbers: ``m.weight`` holds their codes, two in a byte, the first in the high half,
[ceil(n / 2), 1] or the same bytes in another dtype; ``m.weight.absmax`` float32, the largest magnitude of each
``blocksize`` numbers of the flattened weight; ``m.weight.quant_map`` what a code stands for, and
``m.weight.quant_state.bitsandbytes__nf4`` JSON with shape, dtype and blocksize (``QuantState.as_dict`` in
``bitsandbytes/functional.py``). A number is map[code] * absmax in float32. With double quantization ``absmax`` is in 8
bits: nested_quant_map[code] * nested_absmax of 256 of them + nested_offset.

That is what ``dequantize_4bit`` in ``bitsandbytes/backends/default/ops.py`` computes. The kernels for CPUs of version
0.50.2 differ from it twice: with AVX512, where a block reaches from one row into the next, and rows are a multiple of
16 long, they take the absmax of another block; and for rows that are none, or without AVX512, the zero of fp4's code 8
is negative, which is positive in ``quant_map``.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from converter.dtypes import DTYPES, DType
from converter.errors import LossyCast, WconvError, name_some
from converter.formats.texts import parse_json
from converter.tensors.base import MAX_DIMS, ByteRange, Reader, Storage, Tensor, TensorSource
from converter.tensors.derived import Computed, Constant
from converter.tensors.shaped import Unboxed, reshaped
from converter.transforms.quantize.bnb_int8 import bitsandbytes_config
from converter.transforms.quantize.codes import Coding, Decoded, Gridded, Numbers, Scales, Widened, coding_of
from converter.transforms.quantize.restore import Module, Restored
from converter.transforms.quantize.write import Writer

# ``get_4bit_type`` in ``bitsandbytes/functional.py``; fp4 is in steps of a twelfth there.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


def _rounded(value: float) -> float:
    """Give the float32 number that is nearest."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


_FP4 = tuple(_rounded(sign * value / 12) + 0.0 for sign in (1, -1) for value in _FP4_TWELFTHS)
_CODINGS = {"nf4": coding_of(4, _NF4, order=(1, 0)), "fp4": coding_of(4, _FP4, order=(1, 0))}

_STATE, _ABSMAX, _MAP = ".quant_state.bitsandbytes__", ".absmax", ".quant_map"
_NESTED_ABSMAX, _NESTED_MAP = ".nested_absmax", ".nested_quant_map"
_DTYPES = {"float32": DTYPES["F32"], "bfloat16": DTYPES["BF16"], "float16": DTYPES["F16"]}
_PLAIN_KEYS = frozenset({"quant_type", "blocksize", "dtype", "shape"})
_NESTED_KEYS = frozenset({"nested_blocksize", "nested_dtype", "nested_offset"})
_MAX_STATE_NBYTES = 1 << 14  # it names a shape
_MAX_BLOCK = 1 << 31
_MAX_OFFSET = 1e38
_BLOCK = 64  # of nf4 as it is written
_BAND_NBYTES = 1 << 20  # of a weight that is read to be quantized, at a time
# What a weight's own dtype took off before it was quantized, a share of it.
_SLACKS = {"F32": 0.0, "BF16": 2**-8, "F16": 2**-11}
_F32, _U8 = DTYPES["F32"], DTYPES["U8"]


class _State(NamedTuple):
    """What the JSON beside a weight says; ``offset`` and ``nested_block`` of one whose absmax is in 8 bits."""

    kind: str
    block: int
    dtype: DType
    shape: tuple[int, ...]
    nested_block: int = 0
    offset: float = 0.0


def restore(module: Module) -> Restored:
    """Give the numbers of a weight, [in, out] where that is what its library has.

    Raises BadFile for JSON and tensors that do not fit it, or are no part of this form.
    """
    end = _state_end(module)
    state = _read_state(module, end)
    count = math.prod(state.shape)
    words = _words_of(module, -(-count // 2))
    coding = _CODINGS[state.kind]
    _check_map(module, coding)
    blocks = -(-count // state.block)
    block = (min(state.block, max(1, count)),)
    codes = Decoded(words, coding, (count,), 0)
    numbers: Gridded
    if state.nested_block:
        numbers = _doubly(module, state, codes, blocks, block)
    else:
        scales = _sized(module, _ABSMAX, _F32, blocks)
        numbers = Gridded(codes, Scales(scales.source, scales.name), block)
    source = reshaped(numbers, _F32, state.shape)
    if module.is_transposed and len(state.shape) == 2:
        source = source.permuted((1, 0))
    return Restored(module.weight.name, source, state.dtype, _SLACKS[state.dtype.tag])


def _state_end(module: Module) -> str:
    """Give the ending of the JSON. Raises BadFile where there is none, or two."""
    ends = [_STATE + kind for kind in _CODINGS if _STATE + kind in module.beside]
    if len(ends) > 1:
        raise module.misfit(ends[1], f"there is {module.base + ends[0]!r} too")
    if not ends:
        module.scale(_STATE + "nf4")  # raises
    return ends[0]


def _read_state(module: Module, end: str) -> _State:
    """Read the JSON beside a weight, whose every value is checked. Raises BadFile for what it should not hold."""
    said = _parse_state(module, end)
    if said["quant_type"] != end.removeprefix(_STATE):
        raise module.misfit(end, "its quant_type is another than its name says")
    dtype = _DTYPES.get(said["dtype"]) if isinstance(said["dtype"], str) else None
    if dtype is None:
        raise module.misfit(end, "its dtype is none of float32, bfloat16 and float16")
    state = _State(said["quant_type"], _block_in(module, end, said["blocksize"]), dtype, _shape_in(module, end, said))
    if "nested_offset" not in said:
        return state
    offset = said["nested_offset"]
    if type(offset) not in (int, float) or not abs(offset) < _MAX_OFFSET:
        raise module.misfit(end, "its nested_offset is no finite number")
    if said["nested_dtype"] != "float32":
        raise module.misfit(end, "its nested_dtype is not float32")
    nested_block = _block_in(module, end, said["nested_blocksize"])
    return state._replace(nested_block=nested_block, offset=_rounded(float(offset)))


def _parse_state(module: Module, end: str) -> dict[str, Any]:
    """Give what the JSON beside a weight says, all of it and no more."""
    raw = module.contents[end]
    if len(raw) > _MAX_STATE_NBYTES:
        raise module.misfit(end, f"its {len(raw):,} bytes are more than any has")
    try:
        said = parse_json(raw, module.scale(end).where)
    except (ValueError, WconvError):
        raise module.misfit(end, "it is no JSON") from None
    if not isinstance(said, dict):
        raise module.misfit(end, "it is no JSON object")
    is_nested = not _NESTED_KEYS.isdisjoint(said) or not {_NESTED_ABSMAX, _NESTED_MAP}.isdisjoint(module.beside)
    odd = sorted(map(repr, said.keys() ^ (_PLAIN_KEYS | _NESTED_KEYS if is_nested else _PLAIN_KEYS)))
    if odd:
        raise module.misfit(end, f"it lacks, or should not have, {name_some(odd, 5)[:500]}")
    return said


def _block_in(module: Module, end: str, said: Any) -> int:
    if type(said) is not int or not 0 < said < _MAX_BLOCK:
        raise module.misfit(end, f"a block of {str(said)[:40]} numbers is none")
    return said


def _shape_in(module: Module, end: str, said: Mapping[str, Any]) -> tuple[int, ...]:
    shape = said["shape"]
    if not isinstance(shape, list) or not all(type(side) is int and 0 <= side < 1 << 48 for side in shape):
        raise module.misfit(end, "its shape is no list of lengths")
    if len(shape) > MAX_DIMS:
        raise module.misfit(end, f"its shape has {len(shape):,} axes")
    return tuple(shape)


def _words_of(module: Module, nbytes: int) -> TensorSource:
    """Give the bytes of a weight's codes. Raises BadFile for a weight of another length, or in columns."""
    weight = module.weight
    if weight.shape[1:] not in ((), (1,)) or weight.nbytes != nbytes:
        end = _state_end(module)
        raise module.misfit(end, f"its shape needs {nbytes:,} bytes, and that is {weight.dtype} {list(weight.shape)}")
    return reshaped(weight.source, _U8, (nbytes,))


def _sized(module: Module, end: str, dtype: DType, length: int) -> Tensor:
    """Give what is beside a weight. Raises BadFile where that is missing, of another dtype or length."""
    one = module.scale(end)
    if one.dtype is not dtype or one.shape != (length,):
        raise module.misfit(end, f"it is {one.dtype} {list(one.shape)}, and has to be {dtype} [{length}]")
    return one


def _check_map(module: Module, coding: Coding) -> None:
    """Raise BadFile where codes stand for other numbers than the library takes them for, which asks no file."""
    _sized(module, _MAP, _F32, len(coding.values))
    numbers = struct.unpack(f"<{len(coding.values)}f", module.contents[_MAP])
    if not all(abs(found - known) < 1e-6 for found, known in zip(numbers, coding.values, strict=True)):
        raise module.misfit(_MAP, "codes stand for other numbers in it")


# Double quantization.


@dataclass(frozen=True, slots=True)
class Mapped(Numbers):
    """The numbers of a ``table`` of 256 that bytes stand for, in float32; or, as ``steps``, how far those are apart."""

    table: TensorSource
    of_steps: bool = False

    def inputs(self) -> tuple[Storage, ...]:
        return (*self.source.inputs(), *self.table.inputs())

    def extents(self, begin: int, end: int) -> Iterator[ByteRange]:
        yield from self.table.extents(0, _F32.nbytes(256))
        yield from self.source.extents(begin // 4, end // 4)

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        from converter.transforms.quantize.kernels import look_up, table_of_steps

        with reader.scratch(_F32.nbytes(256)) as table, reader.scratch(len(out) // 4) as codes:
            self.table.read(0, table, reader)
            self.source.read(begin // 4, codes, reader)
            look_up(codes, memoryview(table_of_steps(table)) if self.of_steps else table, out)


@dataclass(frozen=True, slots=True)
class Doubly(Gridded):
    """Codes times a grid that was rounded itself, by up to ``off`` each."""

    off: TensorSource | None = None

    def steps(self) -> TensorSource:
        """Give how far each number may be off: by its step, and by its code and step times what the grid is off."""
        assert isinstance(self.source, Decoded)
        assert self.off is not None
        coding = self.source.coding
        whole = tuple(-abs(value) - step for value, step in zip(coding.values, coding.steps, strict=True))
        codes = replace(self.source, coding=coding._replace(values=whole))
        plain = Gridded(self.source.steps(), self.grid, self.block)
        return Gridded(plain, Gridded(codes, self.off, self.block), tuple(1 for _ in self.block), by="less")


def _doubly(module: Module, state: _State, codes: Decoded, blocks: int, block: tuple[int, ...]) -> Doubly:
    absmax = _sized(module, _ABSMAX, _U8, blocks)
    nested = _sized(module, _NESTED_ABSMAX, _F32, -(-blocks // state.nested_block))
    table = _sized(module, _NESTED_MAP, _F32, 256).source
    offset = Constant(_F32, (1,), struct.pack("<f", -state.offset))

    def grid(of_steps: bool) -> Gridded:
        mapped = Mapped(absmax.source, table, of_steps)
        return Gridded(mapped, Widened(nested.source), (min(state.nested_block, max(1, blocks)),))

    scales = Gridded(grid(of_steps=False), offset, (max(1, blocks),), by="less")
    return Doubly(codes, Scales(scales, absmax.name), block, off=grid(of_steps=True))


# Writing nf4.


@dataclass(frozen=True, slots=True)
class _Blocks(Unboxed, Computed):
    """A weight, of which whole blocks of ``_BLOCK`` numbers are read at a time; ``name`` is its name."""

    name: str

    @property
    def window(self) -> int:
        return max(1, self.source.window // self.source.dtype.itemsize * self._per_block // _BLOCK)

    @property
    def grain(self) -> int:
        # All of what is deflated: each task would inflate it from its start.
        return self._per_block if self.source.grain == 1 else self.dtype.nbytes(math.prod(self.shape))

    @property
    def _per_block(self) -> int:
        """The bytes here of each block."""
        raise NotImplementedError

    def _below(self, begin: int, end: int) -> tuple[int, int]:
        first, last = begin // self._per_block, -(-end // self._per_block)
        numel = math.prod(self.source.shape)
        return tuple(self.source.dtype.nbytes(min(numel, block * _BLOCK)) for block in (first, last))  # type: ignore[return-value]

    def _bands(self, begin: int, end: int, reader: Reader) -> Iterator[tuple[int, memoryview]]:
        """Read the blocks that some bytes here are made of: the first byte here of each band, and its numbers."""
        size = self.source.dtype.itemsize
        low, high = self._below(begin, end)
        band = max(_BAND_NBYTES, self.source.window) // (size * _BLOCK) * (size * _BLOCK)
        for at in range(low, high, band):
            with reader.scratch(min(band, high - at)) as numbers:
                self.source.read(at, numbers, reader)
                yield at // (size * _BLOCK) * self._per_block, numbers

    def _refuse(self) -> LossyCast:
        """Give what is said of numbers that no block has a scale for."""
        tensor = Tensor(self.name, self.source)
        problem = f"holds values that are no finite numbers, in {self.name!r}"
        return LossyCast(tensor.where, problem, "Leave that module as it is: --skip.")


class Packed(_Blocks):
    """A weight in codes of nf4, two in a byte, [ceil(n / 2), 1]."""

    __slots__ = ()

    @property
    def dtype(self) -> DType:
        return _U8

    @property
    def shape(self) -> tuple[int, ...]:
        return -(-math.prod(self.source.shape) // 2), 1

    @property
    def _per_block(self) -> int:
        return _BLOCK // 2

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        from converter.transforms.quantize.write_kernels import pack_blocks

        end = begin + len(out)
        for at, numbers in self._bands(begin, end, reader):
            packed = pack_blocks(numbers, self.source.dtype, _BLOCK, _NF4)
            if packed is None:
                raise self._refuse()
            low, high = max(begin, at), min(end, at + len(packed))
            out[low - begin : high - begin] = packed[low - at : high - at]


class BlockMaxima(_Blocks, Numbers):
    """The largest magnitude of each block of a weight, in float32."""

    __slots__ = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return (-(-math.prod(self.source.shape) // _BLOCK),)

    @property
    def _per_block(self) -> int:
        return _F32.itemsize

    def read(self, begin: int, out: memoryview, reader: Reader) -> None:
        from converter.transforms.quantize.write_kernels import block_maxima

        for at, numbers in self._bands(begin, begin + len(out), reader):
            maxima = block_maxima(numbers, self.source.dtype, _BLOCK)
            if maxima is None:
                raise self._refuse()
            out[at - begin : at - begin + len(maxima)] = maxima


def quantized(weight: Tensor, found: bytes) -> tuple[Tensor, ...]:
    """Give the four tensors that stand for a weight in nf4; they must come into one file."""
    dtype = weight.dtype if weight.dtype in _DTYPES.values() else _F32
    state = {"quant_type": "nf4", "blocksize": _BLOCK, "dtype": dtype.torch_name, "shape": weight.shape}
    said = json.dumps(state).encode()
    return (
        weight._replace(source=Packed(weight.source, weight.name)),
        Tensor(weight.name + _ABSMAX, BlockMaxima(weight.source, weight.name), beside=weight.name),
        Tensor(weight.name + _MAP, Constant(_F32, (16,), struct.pack("<16f", *_NF4)), beside=weight.name),
        Tensor(f"{weight.name}{_STATE}nf4", Constant(_U8, (len(said),), said), beside=weight.name),
    )


def quantization_config(skipped: Sequence[str], dtype: DType) -> dict[str, Any]:
    """Give what config.json says of a model in nf4, which computes in the dtype of the rest."""
    compute = dtype if dtype in _DTYPES.values() else _F32
    said = {"_load_in_4bit": True, "_load_in_8bit": False, "load_in_4bit": True, "load_in_8bit": False}
    return bitsandbytes_config(skipped, **said, bnb_4bit_compute_dtype=compute.torch_name, bnb_4bit_quant_type="nf4")


NF4 = Writer(
    "nf4",
    "4 bits",
    "bitsandbytes",
    quantized,
    quantization_config,
    "Each value comes out within 15.2 % of the largest of its 64; normal ones are off by 9 % on average.",
    ("It computes in the dtype that config.json has as bnb_4bit_compute_dtype. bitsandbytes must be installed.",),
    casts_first=True,
)

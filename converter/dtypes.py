"""The dtypes that both safetensors and torch know: one table, one row a dtype.

The order of the rows is the order in which safetensors lays tensors out in a file (``Dtype`` in its
``safetensors/src/tensor.rs``, largest alignment first), so a dtype's place in the table is its rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, eq=False)
class DType:
    """One dtype: its safetensors tag, its width, and its names in torch and on the command line."""

    tag: str
    bits: int
    torch_name: str  # as in torch.float32; empty where torch has none
    storage_class: str  # the typed storage that a torch pickle names; empty where only an untyped one exists
    aliases: tuple[str, ...]
    is_floating: bool
    rank: int

    def nbytes(self, numel: int) -> int:
        """Give the bytes that so many elements take; sub-byte dtypes are packed."""
        return (numel * self.bits + 7) // 8

    @property
    def itemsize(self) -> int:
        """The bytes of one element; only for dtypes of whole bytes."""
        return self.bits // 8

    @property
    def short_name(self) -> str:
        """The name that people type and that tags a variant: ``bf16``."""
        return self.aliases[0] if self.aliases else self.tag.lower()

    def __str__(self) -> str:
        return self.tag

    def __reduce__(self) -> tuple[Callable[[str], DType], tuple[str]]:
        return _by_tag, (self.tag,)  # there is one of each, in every process


def _by_tag(tag: str) -> DType:
    return DTYPES[tag]


_ROWS: tuple[tuple[str, int, str, str, tuple[str, ...], bool], ...] = (
    ("U64", 64, "uint64", "", (), False),
    ("I64", 64, "int64", "LongStorage", (), False),
    ("F64", 64, "float64", "DoubleStorage", ("fp64", "float64"), True),
    ("C64", 64, "complex64", "ComplexFloatStorage", (), False),
    ("F32", 32, "float32", "FloatStorage", ("fp32", "float32"), True),
    ("U32", 32, "uint32", "", (), False),
    ("I32", 32, "int32", "IntStorage", (), False),
    ("BF16", 16, "bfloat16", "BFloat16Storage", ("bf16", "bfloat16"), True),
    ("F16", 16, "float16", "HalfStorage", ("fp16", "float16"), True),
    ("U16", 16, "uint16", "", (), False),
    ("I16", 16, "int16", "ShortStorage", (), False),
    ("F8_E5M2FNUZ", 8, "float8_e5m2fnuz", "", (), True),
    ("F8_E4M3FNUZ", 8, "float8_e4m3fnuz", "", (), True),
    ("F8_E8M0", 8, "float8_e8m0fnu", "", (), True),
    ("F8_E4M3", 8, "float8_e4m3fn", "", ("fp8_e4m3fn",), True),
    ("F8_E5M2", 8, "float8_e5m2", "", ("fp8_e5m2",), True),
    ("I8", 8, "int8", "CharStorage", (), False),
    ("U8", 8, "uint8", "ByteStorage", (), False),
    ("F6_E3M2", 6, "", "", (), True),
    ("F6_E2M3", 6, "", "", (), True),
    ("F4", 4, "", "", (), True),
    ("BOOL", 8, "bool", "BoolStorage", (), False),
)

RECAST_SOURCES = frozenset({"F64", "F32", "BF16", "F16", "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E4M3", "F8_E5M2"})
"""What is cast when a dtype is asked for. The smaller ones, and F8_E8M0, stand for nothing without their scales."""

OnOverflow = Literal["error", "saturate", "inf"]
"""What becomes of values that the dtype of a cast cannot hold."""

RECAST_TARGETS = ("fp32", "bf16", "fp16", "fp8_e4m3fn", "fp8_e5m2")

DTYPES: dict[str, DType] = {row[0]: DType(*row, rank) for rank, row in enumerate(_ROWS)}
"""By safetensors tag."""

BY_TORCH_NAME: dict[str, DType] = {dtype.torch_name: dtype for dtype in DTYPES.values() if dtype.torch_name}
"""By the name that torch gives it: ``float32``. Its packed 4-bit type counts pairs, so it is none of ours."""

BY_STORAGE_CLASS: dict[str, DType] = {dtype.storage_class: dtype for dtype in DTYPES.values() if dtype.storage_class}
"""By the class of typed storage in a torch pickle: ``FloatStorage``."""

BY_ALIAS: dict[str, DType] = {alias: dtype for dtype in DTYPES.values() for alias in dtype.aliases}
"""By what people type: ``bf16``, ``bfloat16``."""

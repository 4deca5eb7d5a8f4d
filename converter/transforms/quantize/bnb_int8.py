"""The LLM.int8 form of bitsandbytes: what a file holds in place of a linear weight, and how a config says so.

For a linear module ``m``: ``m.weight`` is int8 [out, in], ``m.SCB`` float32 [out], the largest magnitude of each row,
and ``m.weight_format`` a uint8 scalar, 0 for row by row (``Linear8bitLt._save_to_state_dict`` in
``bitsandbytes/nn/modules.py``). A number is int8 * SCB / 127. GPT-2's Conv1D, whose weight is [in, out], is written as
[out, in] too (``Bnb8bitQuantize`` in ``transformers/integrations/bitsandbytes.py``).
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from converter.dtypes import DTYPES, DType
from converter.errors import BadFile, HostileFile, Unsupported, Where
from converter.models.checkpoint import Checkpoint
from converter.storage import FileRef
from converter.tensors.base import ByteRange, TensorInfo, contiguous_strides, turned
from converter.tensors.reader import GATHER_NBYTES, PIECE_NBYTES, SourceFiles, read_range

_MAX_SCALES_NBYTES = 128_000_000  # 4 a row: of a model of 400 billion weights 100 MB
_WEIGHT, _SCALES, _FORMAT = ".weight", ".SCB", ".weight_format"


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
class RowBlock:
    """Rows ``begin`` to ``end`` of a matrix."""

    info: TensorInfo
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.info.dtype.nbytes((self.end - self.begin) * self.info.shape[1])


def cut_rows(info: TensorInfo) -> Iterator[RowBlock]:
    """Cut a matrix into blocks of rows, each of some MB, for one task each."""
    step = max(1, PIECE_NBYTES // info.dtype.nbytes(info.shape[1]))
    for begin in range(0, info.shape[0], step):
        yield RowBlock(info, begin, min(info.shape[0], begin + step))


class Scales(NamedTuple):
    """What the rows of a block are scaled by: float32 numbers, which are not finite where float16 is too small."""

    block: RowBlock
    numbers: bytes
    are_finite: bool


def find_scales(block: RowBlock, chunk_nbytes: int) -> Scales:
    """Find the largest magnitude of each row of a block. Raises BadFile for a file that became shorter."""
    from converter.tensors.kernels import are_finite, row_maxima

    info = block.info
    columns = info.shape[1]
    buffer = memoryview(bytearray(chunk_nbytes if info.is_contiguous else max(chunk_nbytes, GATHER_NBYTES)))
    room = len(buffer) // info.dtype.itemsize
    found = []
    with SourceFiles() as sources:

        def read(first: int, count: int) -> memoryview:
            view = buffer[: info.dtype.nbytes(count)]
            read_range(info, sources, info.dtype.nbytes(first), view)
            return view

        step = max(1, room // columns)
        for row in range(block.begin, block.end, step):
            numel = (min(block.end, row + step) - row) * columns
            if numel <= room:
                found.append(row_maxima(read(row * columns, numel), info.dtype, columns))
                continue
            # A row that the buffer does not hold: the largest of its parts' largest.
            cuts = [*range(0, columns, room), columns]
            parts = [
                row_maxima(read(row * columns + begin, end - begin), info.dtype, end - begin)
                for begin, end in itertools.pairwise(cuts)
            ]
            found.append(row_maxima(memoryview(b"".join(parts)), DTYPES["F32"], len(parts)))
    numbers = b"".join(found)
    return Scales(block, numbers, are_finite(numbers))


def quantized(weight: TensorInfo, scales: bytes) -> tuple[TensorInfo, TensorInfo, TensorInfo]:
    """Give the three tensors that stand for a weight [out, in], the first of them still to be computed."""
    module = weight.name.removesuffix(_WEIGHT)
    return (
        weight._replace(target=DTYPES["I8"], scales=scales),
        _made(weight, module + _SCALES, DTYPES["F32"], (weight.shape[0],), scales),
        _made(weight, module + _FORMAT, DTYPES["U8"], (), b"\0"),
    )


def _made(weight: TensorInfo, name: str, dtype: DType, shape: tuple[int, ...], content: bytes) -> TensorInfo:
    storage = ByteRange(FileRef(weight.storage.file.place), 0, len(content), content=content)
    return TensorInfo(name, dtype, shape, storage, 0, contiguous_strides(shape), target=dtype)


def scales_in(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """Map the name of each int8 weight to the tensor of its scales.

    Raises Unsupported where an int8 weight has none, BadFile where they do not fit it.
    """
    tensors = {info.name: info for info in checkpoint.tensors}
    found = {}
    for name, info in tensors.items():
        if info.dtype.tag != "I8" or not name.endswith(_WEIGHT):
            continue
        module = name.removesuffix(_WEIGHT)
        scales = tensors.get(module + _SCALES)
        path = info.storage.file.place
        if scales is None:
            advice = "It is in another 8-bit form than that of bitsandbytes, or incomplete."
            raise Unsupported(path, f"has no {module + _SCALES!r} for its int8 weight", advice)
        if len(info.shape) != 2 or scales.dtype.tag != "F32" or scales.shape != info.shape[:1]:
            raise BadFile(path, f"has a {module + _SCALES!r} that does not fit its weight", "Quantize the model again.")
        found[name] = scales
    return found


def check_scales(path: Where, weights: Iterable[TensorInfo]) -> None:
    """Raise HostileFile where the scales of weights, one a row, are more than can be held; or they are those scales."""
    if sum(4 * info.shape[0] for info in weights) > _MAX_SCALES_NBYTES:
        raise HostileFile(path, f"has more than {_MAX_SCALES_NBYTES:,} bytes of scales, and no model has them")


def _check_sizes(checkpoint: Checkpoint, scales: Mapping[str, TensorInfo]) -> None:
    """Raise BadFile for what is read whole here, and is larger than it can be."""
    check_scales(checkpoint.weight_set.path, scales.values())
    for info in checkpoint.tensors:
        if info.name.endswith(_FORMAT) and info.numel > 1:
            raise BadFile(info.storage.file.place, f"has a {info.name!r} that is no single number")


def dequantized(checkpoint: Checkpoint, target: DType, transposed: Container[str]) -> Checkpoint:
    """Let int8 weights be written as numbers in ``target`` again, without what belonged to them.

    Weights of modules in ``transposed`` become [in, out]. Raises as ``scales_in`` does, and Unsupported for a layout
    that is not row by row.
    """
    scales = scales_in(checkpoint)
    _check_sizes(checkpoint, scales)
    with SourceFiles() as sources:

        def read(info: TensorInfo) -> bytes:
            raw = bytearray(info.nbytes)
            read_range(info, sources, 0, memoryview(raw))
            return bytes(raw)

        contents = {name: read(info) for name, info in scales.items()}
        for info in checkpoint.tensors:
            if info.name.endswith(_FORMAT) and any(read(info)):
                problem = f"has weights that are not laid out row by row, as {info.name!r} says"
                raise Unsupported(info.storage.file.place, problem, "Load it with the bitsandbytes that wrote it.")
    modules = {name.removesuffix(_WEIGHT) for name in scales}
    gone = {module + end for module in modules for end in (_SCALES, _FORMAT)}

    def restore(info: TensorInfo) -> TensorInfo:
        if info.name not in contents:
            return info
        info = info._replace(scales=contents[info.name], target=target)
        return turned(info)._replace(scaled_axis=1) if info.name.removesuffix(_WEIGHT) in transposed else info

    files = tuple(
        replace(file, tensors=tuple(restore(info) for info in file.tensors if info.name not in gone))
        for file in checkpoint.files
    )
    return replace(checkpoint, files=files)

"""Quantized weights whose tensors are other than they should be: each is read, or ends in one of wconv's errors."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_schemes import FORMS

from converter.dtypes import BY_TORCH_NAME, DTYPES
from converter.errors import BadFile, Unsupported
from converter.models.checkpoint import open_checkpoint
from converter.tensors.reader import RangeReader
from converter.testing import damaged
from converter.transforms.quantize import DEQUANTIZERS
from converter.transforms.quantize.codes import steps_of
from converter.transforms.quantize.restore import dequantized, find_restored

CONFIGS: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        name: st.sampled_from([None, -1, 0, 1, 2, 3, 4, 8, 32, 2**70, 1.5, True, "", "gptq", [], [8, 8], [0, 1], {}])
        for name in ("quant_method", "weight_block_size", "bits", "group_size", "sym", "desc_act", "checkpoint_format",
                     "version", "config_groups", "format", "zero_point", "quant_algo")
    },
)  # fmt: skip


def read_all(path: Path, config: dict[str, Any]) -> None:
    """Read every value of a file as plain numbers, and how far each may be off."""
    checkpoint = open_checkpoint(path)
    found = find_restored(checkpoint, DEQUANTIZERS, config)
    sources = [tensor.source for tensor in dequantized(checkpoint, found, DTYPES["F32"]).tensors]
    sources += [steps_of(restored.source) for restored in found.weights.values()]
    with RangeReader() as reader:
        for source in sources:
            reader.let_go()
            nbytes = source.dtype.nbytes(math.prod(source.shape))
            assert nbytes < 1 << 20
            if nbytes:
                source.read(0, memoryview(bytearray(nbytes)), reader)


def write_file(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> bytes:
    header: dict[str, Any] = {}
    at = 0
    for name, (tag, shape, content) in tensors.items():
        header[name] = {"dtype": tag, "shape": shape, "data_offsets": [at, at + len(content)]}
        at += len(content)
    text = json.dumps(header).encode()
    raw = len(text).to_bytes(8, "little") + text + b"".join(content for *_, content in tensors.values())
    path.write_bytes(raw)
    return raw


def contents_of(form: str) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    from support.tiny import raw_bytes

    return {
        name: (BY_TORCH_NAME[str(tensor.dtype).removeprefix("torch.")].tag, tuple(tensor.shape), raw_bytes(tensor))
        for name, tensor in FORMS[form][1].items()
    }


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(data=st.data())
def test_odd_tensors_are_read_or_refused(scratch: Path, data: st.DataObject) -> None:
    tensors = contents_of(data.draw(st.sampled_from(sorted(FORMS))))
    for _ in range(data.draw(st.integers(0, 2))):
        name = data.draw(st.sampled_from(sorted(tensors)))
        if data.draw(st.booleans()):
            del tensors[name]
        if not tensors or data.draw(st.booleans()):
            tag = data.draw(st.sampled_from(sorted(tag for tag, dtype in DTYPES.items() if not dtype.bits % 8)))
            shape = tuple(data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 16, 32]), max_size=4)))
            nbytes = DTYPES[tag].nbytes(math.prod(shape))
            tensors[name] = tag, shape, data.draw(st.sampled_from([b"\0", b"\x7f", b"\xff", b"\x38"])) * nbytes
    write_file(scratch / "m.safetensors", tensors)
    with contextlib.suppress(BadFile, Unsupported):
        read_all(scratch / "m.safetensors", data.draw(CONFIGS))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(data=st.data())
def test_damaged_files_are_read_or_refused(scratch: Path, data: st.DataObject) -> None:
    path = scratch / "m.safetensors"
    path.write_bytes(data.draw(damaged(write_file(path, contents_of(data.draw(st.sampled_from(sorted(FORMS))))))))
    with contextlib.suppress(BadFile, Unsupported):
        read_all(path, {})

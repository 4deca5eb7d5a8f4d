"""Hypothesis strategies for whole checkpoints, for tests of whatever reads them. Needs hypothesis.

A state dict is drawn as names, dtypes, shapes and bytes; a file is what wconv writes for it, so torch and safetensors
read it; ``damaged`` changes a file as disks, downloads and malice do.
"""

from __future__ import annotations

from math import prod
from zlib import crc32

from hypothesis import strategies as st

from converter.dtypes import DTYPES, DType
from converter.formats import WRITERS
from converter.tensors.base import TensorSpec

State = dict[str, tuple[DType, tuple[int, ...], bytes]]
"""Dtype, shape and bytes in row-major order, by name."""

_SPECIAL = (b"\0", b"\xff", b"\x80", b"\x7f", b"PK\x03\x04", b"PK\x01\x02", b"\xff\xff\xff\xff", b".", b"R", b"\0" * 8)


def names() -> st.SearchStrategy[str]:
    """Names of tensors, odd ones too, that every format can hold."""
    return st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
        lambda n: n != "__metadata__"
    )


@st.composite
def state_dicts(draw: st.DrawFn, max_tensors: int = 5) -> State:
    """State dicts of a few small tensors of all dtypes that torch and safetensors share."""
    known = [dtype for dtype in DTYPES.values() if dtype.bits >= 8 and dtype.torch_name]
    state: State = {}
    for name in draw(st.lists(names(), max_size=max_tensors, unique=True)):
        dtype = draw(st.sampled_from(known))
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
        nbytes = dtype.nbytes(prod(shape))
        # torch knows two values of a bool.
        values = st.lists(st.integers(0, 1), min_size=nbytes, max_size=nbytes).map(bytes)
        state[name] = dtype, shape, draw(values if dtype.tag == "BOOL" else st.binary(min_size=nbytes, max_size=nbytes))
    return state


def build(state: State, form: str) -> bytes:
    """Give the file, ``safetensors`` or ``torch``, that holds a state dict."""
    writer = WRITERS[form]
    described = [TensorSpec(name, dtype, shape) for name, (dtype, shape, _) in state.items()]
    layout = writer.lay_out(described, {}, {})
    raw = bytearray(layout.nbytes)
    raw[: len(layout.header)] = layout.header
    contents = [state[described[place][0]][2] for place in layout.order]
    for offset, content in zip(layout.offsets, contents, strict=True):
        raw[offset : offset + len(content)] = content
    if writer.frame is not None:
        for offset, piece in writer.frame([described[place] for place in layout.order], {}, [*map(crc32, contents)]):
            raw[offset : offset + len(piece)] = piece
    return bytes(raw)


def files(form: str) -> st.SearchStrategy[tuple[bytes, State]]:
    """Files of a format, each with what it holds."""
    return state_dicts().map(lambda state: (build(state, form), state))


@st.composite
def damaged(draw: st.DrawFn, raw: bytes) -> bytes:
    """The bytes of a file with a few changes: cut, overwritten, inserted, removed, copied elsewhere."""
    changed = bytearray(raw)
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(changed)))
        end = min(len(changed), begin + draw(st.integers(0, 16)))
        how = draw(st.sampled_from(["cut", "overwrite", "insert", "remove", "copy"]))
        if how == "cut":
            del changed[begin:]
        elif how == "overwrite":
            new = draw(st.sampled_from(_SPECIAL) | st.binary(min_size=1, max_size=4))
            changed[begin : begin + len(new)] = new
        elif how == "insert":
            changed[begin:begin] = draw(st.sampled_from(_SPECIAL) | st.binary(max_size=8))
        elif how == "remove":
            del changed[begin:end]
        else:
            place = draw(st.integers(0, len(changed)))
            changed[place:place] = changed[begin:end]
    return bytes(changed)

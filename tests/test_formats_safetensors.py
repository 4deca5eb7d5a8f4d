"""The safetensors format: golden bytes both ways, the reference library as the judge, lies and damage."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.judges import described_by_safetensors, described_by_wconv, saved_by_torch
from support.odd_names import ODD_NAMES
from support.tiny import processor_time, read_file, ref_to, whole_view

from converter.dtypes import BY_TORCH_NAME, DTYPES, DType
from converter.errors import BadFile, Unsupported
from converter.formats.safetensors import build_header, lay_out, parse_header
from converter.storage import place_of
from converter.tensors.base import ByteRange, Tensor, TensorSpec, WeightsFile

PATH = Path("model.safetensors")
PT = {"format": "pt"}

# (tensors by name, dtype and shape, in file order; metadata; the header)
CASES = [
    ([], {}, b"\x08\0\0\0\0\0\0\0{}      "),
    ([], PT, b'\x20\0\0\0\0\0\0\0{"__metadata__":{"format":"pt"}}'),
    ([("a", "F32", (2,))], {}, b'\x38\0\0\0\0\0\0\0{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}  '),
    ([("", "BOOL", ())], {}, b'\x38\0\0\0\0\0\0\0{"":{"dtype":"BOOL","shape":[],"data_offsets":[0,1]}}   '),
    (
        [("w", "BF16", (2, 3)), ("e", "F16", (0, 3)), ("\xe9\n\"\x7f\\", "I8", (1,))],
        {"b": "a", **PT},
        b'\xd8\0\0\0\0\0\0\0{"__metadata__":{"b":"a","format":"pt"},"w":{"dtype":"BF16","shape":[2,3],'
        b'"data_offsets":[0,12]},"e":{"dtype":"F16","shape":[0,3],"data_offsets":[12,12]},'
        b'"\xc3\xa9\\n\\"\x7f\\\\":{"dtype":"I8","shape":[1],"data_offsets":[12,13]}}',
    ),
]  # fmt: skip


def infos(tensors: list[tuple[str, str, tuple[int, ...]]], header_nbytes: int) -> tuple[Tensor, ...]:
    """Describe tensors that lie one after the other behind a header."""
    found = []
    place = header_nbytes
    for name, tag, shape in tensors:
        nbytes = DTYPES[tag].nbytes(torch.Size(shape).numel())
        found.append(Tensor(name, whole_view(DTYPES[tag], shape, ByteRange(ref_to(PATH), place, nbytes))))
        place += nbytes
    return tuple(found)


def framed(content: bytes, data_nbytes: int = 0) -> bytes:
    """Make a file of the JSON of a header and so many zeros."""
    return len(content).to_bytes(8, "little") + content + bytes(data_nbytes)


def parse(raw: bytes) -> WeightsFile:
    return parse_header(raw[8 : 8 + int.from_bytes(raw[:8], "little")], len(raw), ref_to(PATH))


def is_refused_by_the_reference(raw: bytes) -> bool:
    try:
        safetensors.deserialize(raw)
    except safetensors.SafetensorError:
        return True
    return False


def is_refused(raw: bytes) -> bool:
    try:
        parse(raw)
    except (BadFile, Unsupported):
        return True
    return False


@pytest.mark.parametrize(("tensors", "metadata", "header"), CASES)
def test_golden_bytes_both_ways(
    tensors: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str], header: bytes
) -> None:
    planned = [TensorSpec(name, DTYPES[tag], shape) for name, tag, shape in tensors]
    assert build_header(planned, dict(reversed([*metadata.items()]))) == header
    found = infos(tensors, len(header))
    file_nbytes = len(header) + sum(info.nbytes for info in found)
    assert parse_header(header[8:], file_nbytes, ref_to(PATH)) == WeightsFile(
        place_of(PATH), "safetensors", found, metadata, data_nbytes=file_nbytes - len(header)
    )


@pytest.mark.parametrize(("tensors", "metadata", "header"), CASES)
def test_golden_bytes_are_the_references(
    tensors: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str], header: bytes
) -> None:
    state = {name: zeros(DTYPES[tag], shape) for name, tag, shape in tensors}
    if len(metadata) < 2:  # several come in any order
        assert safetensors.torch.save(state, metadata or None)[: len(header)] == header
    assert not is_refused_by_the_reference(header + bytes(sum(info.nbytes for info in infos(tensors, 0))))


def zeros(dtype: DType, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros(shape, dtype=getattr(torch, dtype.torch_name))


@st.composite
def states(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Draw a state dict of every dtype, with scalars and empty tensors, and names in need of escapes."""
    names = draw(st.lists(ODD_NAMES, unique=True, max_size=6))
    state = {}
    for name in names:
        dtype = getattr(torch, draw(st.sampled_from([*BY_TORCH_NAME, "float4_e2m1fn_x2"])))
        least = 1 if dtype == torch.float4_e2m1fn_x2 else 0  # of a scalar there is no last dimension to double
        shape = draw(st.lists(st.integers(0, 3), min_size=least, max_size=3))
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        bits = torch.tensor(list(draw(st.binary(min_size=nbytes, max_size=nbytes))), dtype=torch.uint8)
        state[name] = bits.view(dtype).reshape(shape)
    return state


@given(states())
def test_a_file_is_byte_for_byte_what_save_file_writes(state: dict[str, torch.Tensor]) -> None:
    described = described_by_safetensors(state)
    names = list(described)
    layout = lay_out([TensorSpec(name, DTYPES[tag], shape) for name, (tag, shape, _) in described.items()], {}, {})
    expected = safetensors.torch.save(state, PT)
    assert layout.nbytes == len(expected)
    assert expected.startswith(layout.header)
    assert [described[names[place]][2] for place in layout.order] == [
        expected[begin:end] for begin, end in itertools.pairwise([*layout.offsets, layout.nbytes])
    ]


def test_a_header_of_100_000_tensors_is_the_references() -> None:
    state = {f"block.{number}.é": torch.empty(0, number % 7, dtype=torch.float16) for number in range(100_000)}
    specs = [TensorSpec(name, DTYPES["F16"], tuple(tensor.shape)) for name, tensor in state.items()]
    assert lay_out(specs, {}, {}).header == safetensors.torch.save(state, {"format": "pt"})


def test_ties_and_notes_are_metadata() -> None:
    layout = lay_out([TensorSpec("b", DTYPES["U8"], (1,))], {"a": "b"}, {"note": "x", "format": "tf"})
    assert parse_header(layout.header[8:], layout.nbytes, ref_to(PATH)).metadata == {
        "a": "b",
        "format": "pt",
        "note": "x",
    }


@given(states())
def test_what_save_file_writes_is_read(scratch: Path, state: dict[str, torch.Tensor]) -> None:
    path = scratch / "model.safetensors"
    path.write_bytes(safetensors.torch.save(state, PT))
    assert described_by_wconv(path) == described_by_safetensors(state)
    assert read_file(path).metadata == PT


@pytest.mark.parametrize("name", ["\ud800", "__metadata__"])
def test_a_name_that_no_header_can_hold_is_an_error_of_ours(name: str) -> None:
    with pytest.raises(ValueError, match="no safetensors file can hold"):
        build_header([TensorSpec(name, DTYPES["U8"], (1,))], PT)


@pytest.mark.parametrize(
    ("names", "tied"),
    [
        (["\ud800"], "first"),
        (["a", "\ud800"], "first"),
        (["a", "\ud800"], "duplicate"),
        (["__metadata__"], "first"),
        (["a", "__metadata__"], "duplicate"),
    ],
    ids=ascii,
)
def test_the_command_refuses_it_too(tmp_path: Path, wconv: Callable[..., Any], names: list[str], tied: str) -> None:
    source = tmp_path / "model.bin"
    value = torch.arange(3.0)
    source.write_bytes(saved_by_torch(dict.fromkeys(names, value)))
    outcome = wconv("to-safetensors", source, "--tied", tied, "-o", tmp_path / "out", exit_code=4)
    assert len(outcome.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [source]


# One field of one entry at a time. The file has 11 bytes of data, ``a`` in the first 8.
BASE = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "U8", "shape": [3], "data_offsets": [8, 11]},
}
LIES: dict[str, list[Any]] = {
    "dtype": ["F16", "F64", "U8", "f32", "F33", "float32", "", None, 3, True, ["F32"], {"F32": 1}, {}],
    "shape": [
        [], [0], [1], [3], [2, 2], [1, 3], [-2], [2.0], ["2"], [True, 2], [None], [[2]], 2, "2", "", None, {}, {"2": 1},
        True, [2, 0], [2**64, 0], [2**63, 2], [2**62, 4], [2**32, 2**32], [2**32, 2**32, 2**32], [2**64 + 2],
        [10**4000], [10**4000, 10**4000], [2**63, 2, 0],
    ],
    "data_offsets": [
        [0, 7], [0, 9], [1, 8], [1, 9], [4, 12], [8, 0], [8, 16], [0, 0], [8, 8], [3, 11], [-8, 0], [0.0, 8.0],
        ["0", "8"], [True, 8], [False, 8], [None, 8], [0], [0, 8, 8], [], 8, "08", None, {}, {"0": 8}, {"0": 0, "8": 8},
        [0, 2**64 + 8], [2**64, 2**64 + 8], [10**4000, 10**4000 + 8], [[0], [8]],
    ],
}  # fmt: skip


def test_the_base_of_the_lies_is_true() -> None:
    raw = framed(json.dumps(BASE).encode(), 11)
    assert not is_refused(raw)
    assert not is_refused_by_the_reference(raw)


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in LIES.items() for value in values],
    ids=lambda v: repr(v)[:30],
)
def test_a_lie_in_one_field(field: str, value: Any) -> None:
    raw = framed(json.dumps({**BASE, "a": {**BASE["a"], field: value}}).encode(), 11)
    assert is_refused_by_the_reference(raw)
    with pytest.raises((BadFile, Unsupported)):
        parse(raw)


@pytest.mark.parametrize("shape", [{}, "", [2**64, 0], [0, 2**64], [2**63, 2, 0]], ids=str)
def test_a_lie_that_comes_to_the_right_size(shape: Any) -> None:
    nbytes = 0 if shape else 1
    raw = framed(json.dumps({"a": {"dtype": "U8", "shape": shape, "data_offsets": [0, nbytes]}}).encode(), nbytes)
    assert is_refused_by_the_reference(raw)
    with pytest.raises(BadFile):
        parse(raw)


@pytest.mark.parametrize("field", LIES)
def test_a_missing_field(field: str) -> None:
    entry = {key: value for key, value in BASE["a"].items() if key != field}
    with pytest.raises(BadFile):
        parse(framed(json.dumps({**BASE, "a": entry}).encode(), 11))


@pytest.mark.parametrize("entry", [None, 3, "x", [], {}, ["F32", [2], [0, 8]], True])
def test_an_entry_that_is_none(entry: Any) -> None:
    with pytest.raises(BadFile):
        parse(framed(json.dumps({**BASE, "a": entry}).encode(), 11))


@pytest.mark.parametrize("metadata", [[], "", "x", 0, 1, False, True, {"a": 1}, {"a": None}, {"a": {}}, {"a": ["b"]}])
def test_metadata_that_is_no_map_of_strings(metadata: Any) -> None:
    raw = framed(json.dumps({"__metadata__": metadata, **BASE}).encode(), 11)
    assert is_refused_by_the_reference(raw)
    with pytest.raises(BadFile, match="__metadata__"):
        parse(raw)


ENTRY = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'


@pytest.mark.parametrize(
    "content",
    [
        b"", b" ", b"{", b"[]", b"null", b"3", b'"x"', b"\xff", b'{"\xff":%s}' % ENTRY, b"\xef\xbb\xbf{}",
        b'{"a":%s}x' % ENTRY, b'{"a":%s}\0' % ENTRY, b'{"a":%s,}' % ENTRY, b"{'a':%s}" % ENTRY,
        b'{"\\ud800":%s}' % ENTRY, b'{"__metadata__":{"x":"\\udc00"},"a":%s}' % ENTRY, b"[" * 100_000,
        b'{"a":' * 100_000, b'{"a":{"x":%s%s}}' % (b"[" * 100_000, b"]" * 100_000),
        b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[1e0],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}',
    ],
    ids=lambda content: repr(content[:40]),
)  # fmt: skip
def test_a_header_that_is_no_json_of_tensors(content: bytes) -> None:
    raw = framed(content, 1)
    assert is_refused_by_the_reference(raw)
    with pytest.raises(BadFile):
        parse(raw)


@pytest.mark.parametrize(
    "content",
    [b'{"a":%s,"a":%s}' % (ENTRY, ENTRY), b'{"a":%s,"\\u0061":%s}' % (ENTRY, ENTRY),
     b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
     b'{"__metadata__":{"a":"1","a":"2"},"b":%s}' % ENTRY,
     b'{"__metadata__":{},"__metadata__":{},"b":%s}' % ENTRY],
)  # fmt: skip
def test_what_is_named_twice_is_refused_even_where_the_reference_takes_it(content: bytes) -> None:
    with pytest.raises(BadFile, match="twice"):
        parse(framed(content, 1))


@pytest.mark.parametrize(
    "content",
    [
        b'{"a":%s}' % ENTRY, b'{"a":%s}   ' % ENTRY, b'   {"a":%s}' % ENTRY, b'{"a" : %s\n}' % ENTRY,
        b'{"":%s}' % ENTRY,
        b'{"__metadata__":null,"a":%s}' % ENTRY, b'{"a":%s,"__metadata__":{}}' % ENTRY,
        b'{"a":{"data_offsets":[0,1],"note":[{"x":1.5}],"shape":[1],"dtype":"U8"}}',
        b'{"a":%s,"e":{"dtype":"F32","shape":[0],"data_offsets":[1,1]},"f":{"dtype":"F32","shape":[2,0],"data_offsets":[1,1]}}'
        % ENTRY,
        b'{"e":{"dtype":"F64","shape":[0],"data_offsets":[0,0]},"a":%s}' % ENTRY,
        b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}',
    ],
    ids=lambda content: repr(content[:40]),
)  # fmt: skip
def test_what_is_odd_but_right_is_read(content: bytes) -> None:
    raw = framed(content, 1)
    assert not is_refused_by_the_reference(raw)
    assert parse(raw).tensors


def test_header_order_is_kept_where_the_data_has_another() -> None:
    content = b'{"b":{"dtype":"F32","shape":[1],"data_offsets":[1,5]},"a":%s}' % ENTRY
    raw = framed(content, 5)
    offsets = [(tensor.name, storage.offset) for tensor in parse(raw).tensors for storage in tensor.source.inputs()]
    assert [(name, offset - len(raw) + 5) for name, offset in offsets] == [("b", 1), ("a", 0)]


@pytest.mark.parametrize("shape", [[2, 1], [2, 3, 1], [5]])
def test_a_packed_dtype_ends_at_a_whole_byte(shape: list[int]) -> None:
    nbytes = (torch.Size(shape).numel() * 6 + 7) // 8
    content = json.dumps({"x": {"dtype": "F6_E2M3", "shape": shape, "data_offsets": [0, nbytes]}}).encode()
    assert is_refused_by_the_reference(framed(content, nbytes))
    with pytest.raises(BadFile):
        parse(framed(content, nbytes))


SIZES = st.sampled_from([0, 1, 2, 3, 4, 8, 11, 12, -1, 2**32, 2**63, 2**64, True, 1.0, "1", None])
ENTRIES: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F32", "F4", "BOOL", "F6_E2M3", "x", None]),
        "shape": st.lists(SIZES, max_size=3) | st.sampled_from([None, {}, "", 1]),
        "data_offsets": st.lists(SIZES, min_size=2, max_size=2) | st.sampled_from([None, {}, "01", [0]]),
    }
)


@given(st.dictionaries(st.sampled_from(["a", "b", ""]), ENTRIES, max_size=3), st.integers(0, 12))
def test_what_the_reference_refuses_is_refused_and_nothing_else(entries: dict[str, Any], data_nbytes: int) -> None:
    raw = framed(json.dumps(entries).encode(), data_nbytes)
    assert is_refused(raw) == is_refused_by_the_reference(raw)


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors.torch.save({"a": torch.arange(2.0), "b": torch.arange(3, dtype=torch.uint8)}, PT))
    return path


def test_truncated_anywhere_it_is_refused(small_file: Path) -> None:
    raw = small_file.read_bytes()
    assert len(read_file(small_file).tensors) == 2
    for nbytes in range(len(raw)):
        small_file.write_bytes(raw[:nbytes])
        with pytest.raises(BadFile):
            read_file(small_file)


@pytest.mark.parametrize("tail", [b"\0", b" ", bytes(8)])
def test_bytes_left_over_are_refused(small_file: Path, tail: bytes) -> None:
    small_file.write_bytes(small_file.read_bytes() + tail)
    with pytest.raises(BadFile, match="end at byte"):
        read_file(small_file)


@pytest.mark.parametrize("claimed", [0, -8, -1, 1, 8, 100_000_000, 100_000_001, 2**32, 2**63, 2**64 - 1])
def test_a_lie_about_the_length_of_the_header(small_file: Path, claimed: int) -> None:
    raw = small_file.read_bytes()
    true = int.from_bytes(raw[:8], "little")
    lie = claimed if claimed > 8 or not claimed else true + claimed
    small_file.write_bytes(lie.to_bytes(8, "little") + raw[8:])
    with pytest.raises(BadFile):
        read_file(small_file)


def test_a_shape_of_many_numbers_takes_no_time() -> None:
    # Multiplied out, this number has 380,000 digits, and ten times as many take minutes; the reference stops at once.
    shape = "[" + ",".join(["9999999999999999999"] * 20_000) + "]"
    raw = framed(b'{"a":{"dtype":"U8","shape":%s,"data_offsets":[0,1]}}' % shape.encode(), 1)
    with processor_time(10), pytest.raises(BadFile):
        parse(raw)

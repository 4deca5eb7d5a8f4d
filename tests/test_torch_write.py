"""Archives that wconv writes, opened by torch, mapped and not, and by Python's zipfile."""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.judges import own_copy
from support.tiny import assert_same, make_state, save

from converter.dtypes import DTYPES as DTYPES_BY_TAG
from converter.errors import HostileFile
from converter.formats.torch.rebuild import parse_pickle
from converter.formats.torch.writer import build_pickle, frame, lay_out
from converter.tensors.base import TensorSpec

State = dict[str, torch.Tensor]

TYPED = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.bool,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
]  # fmt: skip
UNTYPED = [
    torch.uint64, torch.uint32, torch.uint16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip
DTYPES = [*TYPED, *UNTYPED]
WITH_NUMPY = [dtype for dtype in DTYPES if dtype != torch.float8_e8m0fnu]
SHAPES = [(), (0,), (1,), (3, 0, 2), (5,), (2, 3, 4), (1, 1, 1, 7)]


def make(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Make a tensor of any bits."""
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    top = 2 if dtype == torch.bool else 256
    bits = torch.randint(0, top, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return bits.view(dtype).reshape(shape)


def load(path: Path, mapped: bool = True) -> State:
    return torch.load(path, weights_only=True, mmap=mapped)


def to_bin(state: State, folder: Path, wconv: Callable[..., Any], metadata: dict[str, str] | None = None) -> Path:
    """Write a state dict by safetensors, make it `.bin`, give that."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "m.safetensors", {"format": "pt", **(metadata or {})})
    wconv("to-bin", folder / "m.safetensors", "--overwrite", "-q")
    return folder / "m.bin"


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_loads_every_dtype_and_shape(
    dtype: torch.dtype, mapped: bool, wconv: Callable[..., Any], tmp_path: Path
) -> None:
    state = {f"t{number}": make(dtype, shape, number) for number, shape in enumerate(SHAPES)}
    found = load(to_bin(state, tmp_path, wconv), mapped)
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].is_contiguous()
        assert not found[name].requires_grad
        assert own_bits(found[name]).equal(own_bits(tensor)), name


def own_bits(tensor: torch.Tensor) -> torch.Tensor:
    return own_copy(tensor).reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("mapped", [False, True])
def test_an_empty_state_dict(mapped: bool, wconv: Callable[..., Any], tmp_path: Path) -> None:
    assert load(to_bin({}, tmp_path, wconv), mapped) == {}


def test_names_of_all_kinds(wconv: Callable[..., Any], tmp_path: Path) -> None:
    names = ["", "a.b", "a/b", "ü", "\U0001f600", "x" * 1000, "a\nb", "storage", "cpu"]
    state = {name: torch.full((2,), float(number)) for number, name in enumerate(names)}
    assert_same(load(to_bin(state, tmp_path, wconv)), state)


@pytest.mark.parametrize("mapped", [False, True])
def test_ties_are_tied_again(mapped: bool, wconv: Callable[..., Any], tmp_path: Path) -> None:
    path = to_bin(make_state("abc"), tmp_path, wconv, {"x": "b", "y": "b", "note": "nothing"})
    found = load(path, mapped)
    assert found.keys() == set("abcxy")
    assert len({found[name].untyped_storage().data_ptr() for name in "bxy"}) == 1
    assert len({found[name].untyped_storage().data_ptr() for name in "abc"}) == 3
    assert_same({name: found[name] for name in "abc"}, make_state("abc"))
    with zipfile.ZipFile(path) as archive:
        assert sum("/data/" in name for name in archive.namelist()) == 3


def test_ties_across_shards_stay_in_the_shard_of_what_they_name(wconv: Callable[..., Any], tmp_path: Path) -> None:
    state = make_state("abcd")
    (tmp_path / "m").mkdir()
    save_file({name: state[name] for name in "ab"}, tmp_path / "m" / "model-00001-of-00002.safetensors", {"x": "b"})
    save_file({name: state[name] for name in "cd"}, tmp_path / "m" / "model-00002-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": {name: f"model-0000{'abcd'.index(name) // 2 + 1}-of-00002.safetensors" for name in "abcd"}}  # fmt: skip # noqa: E501
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    wconv("to-bin", tmp_path / "m", "-o", tmp_path / "out")
    assert load(tmp_path / "out" / "pytorch_model-00001-of-00002.bin").keys() == set("abx")
    written = json.loads((tmp_path / "out" / "pytorch_model.bin.index.json").read_text())
    assert written["weight_map"]["x"] == "pytorch_model-00001-of-00002.bin"


# The archive.


def described(count: int, *shapes: tuple[int, ...], name: str = "layers.%d.weight") -> list[TensorSpec]:
    dtypes = [DTYPES_BY_TAG["F32"], DTYPES_BY_TAG["U16"], DTYPES_BY_TAG["F32"]]
    return [TensorSpec(name % place, dtypes[place % 3], (shapes or ((2, 2), (3,)))[place % (len(shapes) or 2)])
            for place in range(count)]  # fmt: skip


@pytest.mark.parametrize("name", ["layers.%d.weight", "é%d", "x" * 300 + "%d"])
def test_the_steps_of_a_pickle_are_those_that_reading_takes(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    tensors = described(9, (2, 2), (1,) * 9, (), name=name)
    raw = build_pickle(tensors, {"tied": tensors[0][0]})
    fewest = next(steps for steps in range(2_000) if _is_read(monkeypatch, raw, steps))
    monkeypatch.setattr("converter.formats.torch.writer.MAX_OPCODES", fewest - 1)
    with pytest.raises(ValueError, match="too many tensors"):
        build_pickle(tensors, {"tied": tensors[0][0]})
    monkeypatch.setattr("converter.formats.torch.writer.MAX_OPCODES", fewest)
    build_pickle(tensors, {"tied": tensors[0][0]})


def _is_read(monkeypatch: pytest.MonkeyPatch, raw: bytes, steps: int) -> bool:
    monkeypatch.setattr("converter.formats.torch.unpickler.MAX_OPCODES", steps)
    try:
        return bool(parse_pickle(raw, Path("x")))
    except HostileFile:
        return False


@pytest.mark.parametrize(
    ("shape", "problem"),
    [((1,) * 101, "of 101 axes, and a torch file may have 100"), ((0, 2**40, 2**40), "numbers beyond torch's"),
     ((0, *[2**60] * 60), "numbers beyond torch's"), ((0, 2**63), "numbers beyond torch's")],
)  # fmt: skip
def test_a_shape_that_would_not_be_read_again_is_refused(shape: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        lay_out([TensorSpec("x", DTYPES_BY_TAG["F32"], shape)], {}, {})


def test_more_tensors_than_are_read_again_are_refused(
    wconv: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("converter.formats.torch.writer.MAX_TENSORS", 2)
    save_file({name: torch.ones(1) for name in "abc"}, tmp_path / "m.safetensors", {"format": "pt"})
    done = wconv("to-bin", tmp_path / "m.safetensors", exit_code=4)
    assert "more than 2 tensors, too many for one torch file. Write shards: --max-shard-size." in done.stderr
    wconv("to-bin", tmp_path / "m.safetensors", "--max-shard-size", "8B")


def records(path: Path) -> dict[str, tuple[int, int]]:
    """Give the place and the size of each record's payload, by its local header."""
    raw = path.read_bytes()
    found = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
            lengths = struct.unpack_from("<2H", raw, info.header_offset + 26)
            found[info.filename] = (info.header_offset + 30 + sum(lengths), info.file_size)
    return found


def test_records_are_torchs_and_aligned(wconv: Callable[..., Any], tmp_path: Path) -> None:
    state = {f"t{number:03d}": make(DTYPES[number % len(DTYPES)], (number,), number) for number in range(100)}
    path = to_bin(state, tmp_path, wconv)
    found = records(path)
    assert all(place % 64 == 0 for place, _ in found.values())
    roots = {name.partition("/")[0] for name in found}
    assert len(roots) == 1
    inner = [name.partition("/")[2] for name in found]
    assert inner[:4] == ["data.pkl", ".format_version", ".storage_alignment", "byteorder"]
    assert [name for name in inner if name.startswith("data/")] == [f"data/{number}" for number in range(100)]
    assert "version" in inner
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_crcs_are_those_of_the_content_whatever_the_pieces(wconv: Callable[..., Any], tmp_path: Path) -> None:
    state = {"a": make(torch.float32, (3_000_001,)), "b": make(torch.uint8, (7,)), "c": make(torch.float16, (70_001,))}
    path = to_bin(state, tmp_path, wconv)
    for memory in ("1B", "64MB"):
        other = tmp_path / memory / "m.bin"
        wconv("to-bin", tmp_path / "m.safetensors", "-o", other, "--memory", memory, "--workers", "3", "-q")
        assert other.read_bytes() == path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_the_same_bytes_however_it_is_called(wconv: Callable[..., Any], tmp_path: Path) -> None:
    first = to_bin(make_state(), tmp_path / "a", wconv).read_bytes()
    assert to_bin(make_state(), tmp_path / "b", wconv).read_bytes() == first


@pytest.mark.parametrize(
    "count", [65_530, pytest.param(65_529, marks=pytest.mark.slow), pytest.param(65_531, marks=pytest.mark.slow)]
)
def test_more_records_than_an_old_zip_counts(count: int, tmp_path: Path) -> None:
    tensors = [TensorSpec(f"{number:05x}", DTYPES_BY_TAG["F32"], (0,)) for number in range(count)]
    layout = lay_out(tensors, {}, {})
    path = tmp_path / "m.bin"
    with path.open("wb") as file:
        file.write(layout.header)
        file.truncate(layout.nbytes)
        for offset, raw in frame(tensors, {}, [0] * count):
            file.seek(offset)
            file.write(raw)
    assert path.stat().st_size == layout.nbytes
    with zipfile.ZipFile(path) as archive:
        assert len(archive.namelist()) == count + 5


@pytest.mark.slow
@pytest.mark.parametrize("count", [65_529, 65_530, 65_600])
def test_torch_loads_them(count: int, wconv: Callable[..., Any], tmp_path: Path) -> None:
    state = {f"{number:05x}": torch.tensor(float(number)) for number in range(count)}
    found = load(to_bin(state, tmp_path, wconv))
    assert len(found) == count
    assert all(tensor == state[name] for name, tensor in found.items())


# There and back.


@st.composite
def states(draw: st.DrawFn, most: int = 6) -> State:
    """Draw a state dict."""
    shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
    tensors = st.builds(make, st.sampled_from(WITH_NUMPY), shapes, st.integers(0, 9))
    return draw(st.dictionaries(st.text("ab.é", max_size=4), tensors, max_size=most))


@settings(max_examples=15, deadline=None)
@given(state=states())
def test_from_safetensors_and_back_is_the_same_file(state: Any, scratch: Path, wconv: Callable[..., Any]) -> None:
    path = to_bin(state, scratch / "there", wconv)
    assert {name: own_bits(tensor).tolist() for name, tensor in load(path).items()} == {
        name: own_bits(tensor).tolist() for name, tensor in state.items()
    }
    back = scratch / "back"
    shutil.rmtree(back, ignore_errors=True)
    wconv("to-safetensors", path, "-o", back, "--tied", "duplicate", "-q")
    assert (back / "m.safetensors").read_bytes() == (scratch / "there" / "m.safetensors").read_bytes()


@settings(max_examples=15, deadline=None)
@given(state=states(4), data=st.data())
def test_from_bin_and_back_is_the_same_state_dict(
    state: Any, data: Any, scratch: Path, wconv: Callable[..., Any]
) -> None:
    names = sorted(state)
    aliases = data.draw(st.dictionaries(st.text("xyz", min_size=1, max_size=3), st.sampled_from(names), max_size=3)) if names else {}  # fmt: skip # noqa: E501
    whole = {**state, **{alias: state[name] for alias, name in aliases.items()}}
    for place in ("m", "there", "back"):
        shutil.rmtree(scratch / place, ignore_errors=True)
    save(whole, scratch / "m" / "m.bin")
    wconv("to-safetensors", scratch / "m" / "m.bin", "-o", scratch / "there", "--tied", "first", "-q")
    wconv("to-bin", scratch / "there" / "m.safetensors", "-o", scratch / "back", "-q")
    found = load(scratch / "back" / "m.bin")
    assert {name: (tensor.dtype, tensor.shape, own_bits(tensor).tolist()) for name, tensor in found.items()} == {
        name: (tensor.dtype, tensor.shape, own_bits(tensor).tolist()) for name, tensor in whole.items()
    }
    for alias, name in aliases.items():
        if whole[name].numel():
            assert found[alias].untyped_storage().data_ptr() == found[name].untyped_storage().data_ptr()
    assert len(load_file(scratch / "there" / "m.safetensors")) <= len(whole)


# Large.


@pytest.mark.slow
def test_a_record_of_more_than_4_gib_and_one_behind_it(wconv: Callable[..., Any], tmp_path: Path) -> None:
    nbytes = (1 << 32) + 4096
    entries = {"a": ("U8", nbytes, 0, nbytes), "b": ("U8", 4, nbytes, nbytes + 4)}
    header = json.dumps(
        {name: {"dtype": tag, "shape": [size], "data_offsets": [begin, end]} for name, (tag, size, begin, end) in entries.items()}  # noqa: E501
    ).encode()  # fmt: skip
    header += b" " * (-len(header) % 8)
    with (tmp_path / "m.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.seek(nbytes - 3, 1)
        file.write(b"\1\2\3" + b"\4\5\6\7")
    wconv("to-bin", tmp_path / "m.safetensors", "-q")
    for mapped in (True, False):
        found = load(tmp_path / "m.bin", mapped)
        assert found["a"].shape == (nbytes,)
        assert found["a"][-4:].tolist() == [0, 1, 2, 3]
        assert found["b"].tolist() == [4, 5, 6, 7]
        del found
    with zipfile.ZipFile(tmp_path / "m.bin") as archive:
        assert archive.testzip() is None
    wconv("to-safetensors", tmp_path / "m.bin", "-o", tmp_path / "back", "-q")
    assert load_file(tmp_path / "back" / "m.safetensors")["b"].tolist() == [4, 5, 6, 7]

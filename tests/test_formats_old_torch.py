"""The stream that torch wrote before 1.6: read as torch reads it; damaged and dishonest ones are refused."""

from __future__ import annotations

import pickle
import struct
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.archives import ORDERED_DICT, call, items, name_of, number, numbers, pickled, state_dict, text
from support.judges import described_by_safetensors, described_by_torch, described_by_wconv, saved_by_torch
from support.tiny import read_file

from converter.errors import BadFile, HostileFile, Unsupported, WconvError
from converter.formats.torch import legacy

BASE = torch.arange(24.0).reshape(4, 6)


def saved(value: Any) -> bytes:
    return saved_by_torch(value, _use_new_zipfile_serialization=False)


def write(folder: Path, raw: bytes) -> Path:
    path = folder / "old.pth"
    path.write_bytes(raw)
    return path


STATES = {
    "one": {"weight": BASE},
    "many": OrderedDict((f"layers.{i}.weight", BASE + i) for i in range(300)),
    "dtypes": {str(dtype): torch.ones(3, dtype=dtype) for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool, torch.complex64)},
    "views": {"a": BASE, "row": BASE[1], "t": BASE.t(), "column": BASE[:, 2], "same": BASE},
    "empty": {"e": torch.zeros(0, 3), "s": torch.tensor(2.5)},
    "parameters": OrderedDict(w=torch.nn.Parameter(BASE)),
    "buffers": torch.nn.BatchNorm2d(3).state_dict(),
    "none": {},
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_a_stream_is_read_as_torch_reads_it(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, saved(STATES[name]))
    assert described_by_wconv(path) == described_by_torch(path)


@pytest.mark.parametrize("protocol", range(1, 6))
def test_every_protocol_is_read(tmp_path: Path, protocol: int) -> None:
    path = write(
        tmp_path, saved_by_torch(STATES["views"], _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it does not expect most of them
        loaded = torch.load(path, weights_only=False)
    assert described_by_wconv(path) == described_by_safetensors(loaded)


def test_protocol_0_cannot_name_storages(tmp_path: Path) -> None:
    path = write(tmp_path, saved_by_torch(STATES["one"], _use_new_zipfile_serialization=False, pickle_protocol=0))
    with pytest.raises(AssertionError):
        torch.load(path, weights_only=False)
    with pytest.raises(Unsupported, match="protocol 0"):
        read_file(path)


def test_all_pickles_of_a_stream_share_their_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = stream(state_dict(("x", view())), ["0"], FLOATS)
    long = raw.replace(pickle.dumps(1001, 2), b"\x80\x02" + b"N0" * 300 + pickle.dumps(1001, 2)[2:])
    long = long.replace(pickle.dumps(["0"], 2), b"\x80\x02" + b"N0" * 300 + pickle.dumps(["0"], 2)[2:])
    monkeypatch.setattr("converter.formats.torch.unpickler.MAX_OPCODES", 1_000)
    read_file(write(tmp_path, raw))
    with pytest.raises(HostileFile, match="steps"):
        read_file(write(tmp_path, long))


def test_storages_that_are_listed_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legacy, "MAX_STORAGES", 3)
    with pytest.raises(HostileFile, match="more than 3 storages"):
        read_file(write(tmp_path, stream(state_dict(("x", view())), ["0"] * 4, FLOATS * 4)))


def test_a_long_pickle_is_read_in_more_than_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legacy, "_FIRST_NBYTES", 7)
    path = write(tmp_path, saved(STATES["many"]))
    assert described_by_wconv(path) == described_by_torch(path)


def test_truncated_anywhere_it_is_refused(tmp_path: Path) -> None:
    raw = saved({"a": BASE, "b": BASE[0].clone()})
    for nbytes in range(len(raw)):
        with pytest.raises(WconvError):
            read_file(write(tmp_path, raw[:nbytes]))


def test_a_byte_changed_anywhere_is_refused_or_changes_what_torch_sees_too(tmp_path: Path) -> None:
    raw = saved({"a": torch.arange(3.0), "b": torch.arange(2)})
    for place in range(len(raw)):
        changed = bytearray(raw)
        changed[place] ^= 0x15
        try:
            found = described_by_wconv(write(tmp_path, bytes(changed)))
        except WconvError:
            continue
        assert found == described_by_torch(tmp_path / "old.pth")


def stream(
    value: bytes, keys: list[str], storages: bytes, magic: int = legacy.MAGIC, little_endian: bool = True
) -> bytes:
    """Put a stream together by hand."""
    facts = {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": {}}
    head = b"".join(pickle.dumps(one, 2) for one in (magic, 1001, facts))
    return head + pickled(value) + pickle.dumps(keys, 2) + storages


def view(start: int = 0, shape: tuple[int, ...] = (2,), view_of: bytes = b"N", numel: int = 4) -> bytes:
    """Push a tensor of a storage, or of a view of one."""
    identity = items(text("storage"), name_of("torch", "FloatStorage"), text("0"), text("cpu"), number(numel), view_of)
    return call(
        name_of("torch._utils", "_rebuild_tensor_v2"), identity + b"Q", number(start), numbers(*shape), numbers(1),
        b"\x89", ORDERED_DICT,
    )  # fmt: skip


FLOATS = struct.pack("<q4f", 4, 1.0, 2.0, 3.0, 4.0)


def test_a_view_of_a_storage(tmp_path: Path) -> None:
    # As torch 0.3 and before wrote them: (key, start, numel) of the view.
    viewed = view(start=1, view_of=items(text("1"), number(1), number(3)))
    path = write(tmp_path, stream(state_dict(("x", viewed)), ["0"], FLOATS))
    assert described_by_wconv(path) == described_by_safetensors({"x": torch.tensor([3.0, 4.0])})
    assert described_by_torch(path) == described_by_wconv(path)


def test_what_the_machine_was_says_nothing_of_the_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, stream(state_dict(("x", view())), ["0"], FLOATS, little_endian=False))
    assert described_by_wconv(path) == described_by_torch(path)


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (stream(state_dict(("x", view())), ["1"], FLOATS), BadFile),
        (stream(state_dict(("x", view())), [], b""), BadFile),
        (stream(state_dict(("x", view(numel=3))), ["0"], FLOATS), BadFile),
        (stream(state_dict(("x", view(start=3))), ["0"], FLOATS), BadFile),
        (stream(state_dict(("x", view(shape=(5,)))), ["0"], FLOATS), BadFile),
        (stream(state_dict(("x", view(numel=2**62))), ["0"], struct.pack("<q", 2**62)), BadFile),
        (stream(state_dict(("x", view())), ["0"], struct.pack("<q", -4) + FLOATS[8:]), BadFile),
        (stream(state_dict(("x", view())), ["0"], FLOATS, magic=legacy.MAGIC + (1 << 88)), BadFile),
        (stream(state_dict(("x", view(view_of=items(text("1"), number(-1), number(3))))), ["0"], FLOATS), BadFile),
        (stream(state_dict(("x", view()), ("y", view(numel=2))), ["0"], FLOATS), BadFile),
    ],
    ids=[
        "other key",
        "no key",
        "fewer",
        "start",
        "shape",
        "huge",
        "negative",
        "magic",
        "view",
        "two sizes",
    ],
)
def test_a_lie_in_a_stream(tmp_path: Path, raw: bytes, error: type[WconvError]) -> None:
    with pytest.raises(error):
        read_file(write(tmp_path, raw))


def test_a_stream_converts_as_the_archive_does(wconv: Callable[..., Any], tmp_path: Path) -> None:
    state = {"views.a": BASE, "views.t": BASE.t(), "b": BASE.half()}
    for name, modern in (("old", False), ("new", True)):
        torch.save(state, tmp_path / f"{name}.pt", _use_new_zipfile_serialization=modern)
        wconv("to-safetensors", tmp_path / f"{name}.pt", "-o", tmp_path / f"{name}.safetensors", "--verify")
    assert (tmp_path / "old.safetensors").read_bytes() == (tmp_path / "new.safetensors").read_bytes()

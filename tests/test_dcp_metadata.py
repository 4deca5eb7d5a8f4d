"""The .metadata of checkpoints of many processes: how much of it is read, and what hostile ones may take."""

from __future__ import annotations

import contextlib
import io
import itertools
import pickle
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.archives import call, name_of, text
from support.tiny import assert_same
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from converter.errors import BadFile, BadRequest, HostileFile, Unsupported
from converter.formats.torch.rebuild import parse_metadata
from converter.formats.torch.state_dict import Reading
from converter.formats.torch.unpickler import Inert
from converter.formats.trained import dcp
from converter.storage import place_of
from converter.tensors.base import WeightsFile
from converter.tensors.reader import RangeReader, read_chunks
from converter.testing import damaged

FLOAT = TensorProperties(torch.float32)


def told(shape: Sequence[int], *boxes: tuple[Sequence[int], Sequence[int]]) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(begin), torch.Size(sizes)) for begin, sizes in boxes]
    return TensorStorageMetadata(FLOAT, torch.Size(shape), chunks)


def read(folder: Path, raw: bytes | Metadata, strip_code: bool = False) -> WeightsFile:
    path = folder / ".metadata"
    path.write_bytes(raw if isinstance(raw, bytes) else pickle.dumps(raw))
    with place_of(path).open() as file:
        return dcp.read_file(file, Reading(strip_code=strip_code))


def saved(tensor: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def write(folder: Path, state: dict[str, torch.Tensor], ranks: int = 2) -> Path:
    """Write a checkpoint whose tensors are cut by rows, as so many ranks would."""
    folder.mkdir(exist_ok=True)
    files = [bytearray() for _ in range(ranks)]
    tensors: dict[str, Any] = {}
    stored: dict[MetadataIndex, _StorageInfo] = {}
    for name, whole in state.items():
        boxes, row = [], 0
        for rank, part in enumerate(whole.chunk(ranks)):
            begin = [row, *[0] * (whole.dim() - 1)]
            raw = saved(part.clone())
            stored[MetadataIndex(name, begin, rank)] = _StorageInfo(f"__{rank}_0.distcp", len(files[rank]), len(raw))
            files[rank] += raw
            boxes.append((begin, part.shape))
            row += len(part)
        tensors[name] = replace(told(whole.shape, *boxes), properties=TensorProperties(whole.dtype))
    for rank, raw_file in enumerate(files):
        (folder / f"__{rank}_0.distcp").write_bytes(raw_file)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(tensors, None, stored)))
    return folder


def values(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a checkpoint."""
    with place_of(folder / ".metadata").open() as file:
        tensors = dcp.read_file(file, Reading()).tensors
    with RangeReader() as reader:
        raw = {one.name: b"".join(map(bytes, read_chunks(one.source, reader, bytearray(1 << 12)))) for one in tensors}
    dtypes = {"F32": torch.float32, "F16": torch.float16}
    return {
        one.name: torch.frombuffer(bytearray(raw[one.name]), dtype=dtypes[one.dtype.tag]).reshape(one.shape)
        for one in tensors
    }


STATE = {"w": torch.randn(6, 50), "v": torch.randn(5).half(), "again": torch.randn(6, 50), "long": torch.randn(2, 3000)}


SMALL = {"w": torch.randn(4, 3), "v": torch.randn(5).half(), "again": torch.randn(4, 3)}


def test_boxes_are_those_that_torch_saved(tmp_path: Path) -> None:
    assert_same(values(write(tmp_path / "a", STATE, 2)), STATE)
    assert_same(values(write(tmp_path / "b", STATE, 1)), STATE)


@given(data=st.data())
def test_a_damaged_checkpoint_is_refused_or_is_the_same(scratch: Path, data: st.DataObject) -> None:
    folder = write(scratch / "m", SMALL, 2)
    path = folder / data.draw(st.sampled_from([".metadata", "__0_0.distcp", "__1_0.distcp"]))
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    with contextlib.suppress(BadRequest, BadFile, Unsupported):
        read = values(folder)
        # What has another name now may be anything that was there.
        assert_same({name: read[name] for name in read.keys() & SMALL.keys()},
                    {name: SMALL[name] for name in read.keys() & SMALL.keys()})  # fmt: skip


def test_items_that_share_bytes_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"w": torch.randn(2, 3)}, 2)
    boxes = told((2, 3), ((0, 0), (1, 3)), ((1, 0), (1, 3)))
    stored = {MetadataIndex("w", [row, 0]): _StorageInfo("__0_0.distcp", row, 1000) for row in range(2)}
    with pytest.raises(HostileFile, match="lies within another"):
        read(tmp_path, Metadata({"w": boxes}, None, stored))


def test_items_take_steps_and_little_to_describe_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, STATE)
    monkeypatch.setattr(dcp, "_MAX_STEPS", 200)
    with pytest.raises(HostileFile, match="more steps"):
        values(tmp_path)
    monkeypatch.setattr(dcp, "_MAX_STEPS", 10_000)
    monkeypatch.setattr(dcp, "_MAX_KNOWN", 1)
    assert_same(values(tmp_path), STATE)
    monkeypatch.setattr(dcp, "_MAX_PICKLE_NBYTES", 100)
    with pytest.raises(HostileFile, match="to describe one tensor"):
        values(tmp_path)


def write_big(path: Path, names: int, ranks: int) -> None:
    """Write what 70B with Adam looks like on 64 ranks; each rank spells the names anew, as gathering them makes it."""
    tensors: dict[str, Any] = {}
    stored: dict[MetadataIndex, _StorageInfo] = {}
    for place in range(names):
        name = f"{('model', 'optim.exp_avg', 'optim.exp_avg_sq')[place % 3]}.layers.{place // 27}.attn.q{place}.weight"
        tensors[name] = told((128 * ranks, 8192), *[((128 * rank, 0), (128, 8192)) for rank in range(ranks)])
        for rank in range(ranks):
            index = MetadataIndex(name.encode().decode(), [128 * rank, 0], rank)
            stored[index] = _StorageInfo(f"__{rank}_0.distcp", place * 1_000_000, 4_195_904)
    paths = {name: tuple(name.split(".", 1)) for name in tensors}
    path.write_bytes(pickle.dumps(Metadata(tensors, paths, stored), 4))


READ = """
import gc, sys, time
from pathlib import Path
from converter.errors import WconvError
from converter.formats.trained import dcp
from converter.formats.torch.state_dict import Reading
from converter.storage import place_of
gc.disable()  # as the command does
begin = time.process_time()
try:
    with place_of(Path(sys.argv[1])).open() as file:
        dcp.read_file(file, Reading(strip_code=True))
except WconvError as error:
    print(error)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(time.process_time() - begin, int(peak.split()[1]) / 1000)
"""


def cost(path: Path) -> tuple[str, float, float]:
    """Read a checkpoint in a process of its own; give its error, the processor's seconds and the peak in MB."""
    done = subprocess.run([sys.executable, "-c", READ, str(path)], check=True, capture_output=True, text=True)
    *error, last = done.stdout.splitlines()
    seconds, peak = map(float, last.split())
    return "".join(error), seconds, peak


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_large_model_on_64_ranks(tmp_path: Path) -> None:
    write_big(tmp_path / ".metadata", 2169, 64)
    error, seconds, peak = cost(tmp_path / ".metadata")
    assert "__0_0.distcp: is not there" in error
    assert (seconds < 15, peak < 300) == (True, True)


INDEX = name_of("torch.distributed.checkpoint.metadata", "MetadataIndex") + b"q\0"
OBJECT, SIZE = b"ca\nb\nq\x000", name_of("torch", "Size") + b"q\x000"
MANY = 1_000_000
BOMBS: dict[str, Callable[[], bytes]] = {
    "what is there already": lambda: b"N\x940(" + b"h\0" * 15 * MANY + b"t.",
    "nothings": lambda: b"(" + b"N" * 15 * MANY + b"t.",
    "nothings, thrown away": lambda: b"N0" * 8 * MANY + b"N.",
    "tuples": lambda: b"(" + b"N\x85" * 7 * MANY + b"t.",
    "pairs": lambda: b"N" + b"2\x86" * 7 * MANY + b".",
    "numbers": lambda: b"(" + b"M\0\x10" * 15 * MANY + b"t.",
    "texts": lambda: b"(" + (b"\x8c\x3c" + b"a" * 60) * 1_500_000 + b"t.",
    "dicts": lambda: b"](" + b"}NNs" * MANY + b"e.",
    "marked dicts": lambda: b"](" + b"(NNd" * MANY + b"e.",
    "wide dicts": lambda: b"](" + b"}(K\x01NK\x02NK\x03NK\x04NK\x05NK\x06Nu" * 800_000 + b"e.",
    "a dict of numbers": lambda: b"}("
    + b"".join(b"J" + struct.pack("<i", place) + b"N" for place in range(4 * MANY)) + b"u.",
    "objects": lambda: INDEX + b"0](" + b"h\0)\x81" * 3 * MANY + b"e.",
    "fields of objects": lambda: INDEX + b"0}q\1](" + b"h\0)\x81h\1b" * 1_490_000 + b"e.",
    "states that are kept": lambda: INDEX + b"0]("
    + b"".join(b"h\0)\x81}r" + struct.pack("<I", place) + b"NNsb" for place in range(9, 590_000))
    + b"".join(b"j" + struct.pack("<I", place) for place in range(9, 300_000)) + b"e.",
    "marks": lambda: b"(" * 15 * MANY + b".",
    "sizes": lambda: SIZE + b"](K\1eq\1](" + b"h\0h\1\x85R" * 3 * MANY + b"e.",
    "objects of unknown classes": lambda: OBJECT + b"](" + b"h\0)\x81(Ne" * 400_000 + b"e.",
    "far places": lambda: b"N" + b"".join(b"r" + struct.pack("<I", place) for place in range(9, 3 * MANY)) + b".",
    "the memo": lambda: b"N" + b"".join(b"r" + struct.pack("<I", place) for place in range(14 * MANY)) + b"j\0\0\0\0.",
    "letters": lambda: b"(" + b"j" * 99 * MANY,
    "all at once": lambda: b"](" + b"}" * 999_000 + b"N\x85" * 2_600_000 + b"N" * 8 * MANY + b"e.",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_takes_little_time_and_memory(tmp_path: Path, bomb: str) -> None:
    (tmp_path / ".metadata").write_bytes(b"\x80\x04" + BOMBS[bomb]())
    error, seconds, peak = cost(tmp_path / ".metadata")
    assert error
    assert (seconds < 10, peak < 512) == (True, True)


@dataclass(frozen=True)
class Limit:
    """What is made small for a test, and what then is too much."""

    name: str
    raw: bytes
    problem: str


LIMITS = [
    Limit("MAX_METADATA_OPCODES", b"N0" * 60 + b"N.", "more steps"),
    Limit("MAX_METADATA_EXTRAS", b"](" + b"]" * 40 + b"e.", "more steps"),
    Limit("MAX_METADATA_EXTRAS", INDEX + b"0](" + b"h\0)\x81" * 60 + b"e.", "more steps"),
    Limit("MAX_METADATA_EXTRAS", INDEX + b")\x81}q\1b" + b"h\1b" * 60 + b".", "more steps"),
    Limit("MAX_METADATA_EXTRAS", call(name_of("copyreg", "__newobj__"), INDEX, *[b"N"] * 900) + b".", "more steps"),
    *(
        Limit("MAX_METADATA_NBYTES", b"](" + pushed * 60 + b"e.", "more memory")
        for pushed in (b"N\x85", b"NN\x86", b"NNN\x87", b"(t", b"M\0\1", b"J\0\0\0\1", b"\x8a\1\1", b"I7\n", b"L7L\n",
                       b"G" + bytes(8), b"F1\n", text("a"), b"\x8c\1a", b"U\1a", b"Va\n", b"S'a'\n", b"(l", b"(d")
    ),
    Limit("MAX_METADATA_NBYTES", b"}(" + b"".join(b"K" + bytes([n]) + b"N" for n in range(60)) + b"u.", "more memory"),
]  # fmt: skip


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: repr(limit.raw)[:30])
def test_what_is_kept_is_counted(monkeypatch: pytest.MonkeyPatch, limit: Limit) -> None:
    fields = {"torch.distributed.checkpoint.metadata.MetadataIndex": ("fqn", "offset")}
    parse_metadata(limit.raw, "here", False, fields)
    monkeypatch.setattr(f"converter.formats.torch.unpickler.{limit.name}", 2_000 if "NBYTES" in limit.name else 100)
    with pytest.raises(HostileFile, match=limit.problem):
        parse_metadata(limit.raw, "here", False, fields)


def test_metadata_holds_no_tensors(tmp_path: Path) -> None:
    rebuild = name_of("torch._utils", "_rebuild_tensor_v2")
    with pytest.raises(HostileFile, match="_rebuild_tensor_v2"):
        read(tmp_path, call(rebuild, b"N") + b".")
    with pytest.raises(BadFile):
        read(tmp_path, b"(" + text("storage") + name_of("torch", "FloatStorage") + text("0") + text("cpu") + b"K\1tQ.")
    value = parse_metadata(call(rebuild, b"N") + b".", "here", True, {}).value
    assert type(value) is Inert


def test_the_fields_that_are_kept_are_those_of_the_class(tmp_path: Path) -> None:
    index, below, stored = MetadataIndex("w", [0]), MetadataIndex("w", [-1]), _StorageInfo("__0_0.distcp", 0, 9)
    for key, value in ((index, index), ("w", stored), (index, "w"), (index, None), (below, stored)):
        with pytest.raises(BadFile, match="does not describe a checkpoint"):
            read(tmp_path, Metadata({"w": told((2,), ((0,), (2,)))}, None, {key: value}))


def test_too_many_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = told((3,), *[((row,), (1,)) for row in range(3)])
    index = {MetadataIndex("w", [row]): _StorageInfo("a", 9 * row, 9) for row in range(3)}
    monkeypatch.setattr(dcp, "_MAX_BOXES", 3)
    with pytest.raises(BadFile, match="is not there"):
        read(tmp_path, Metadata({"w": rows}, None, index))
    for tensors, paths, stored in (
        ({"w": rows, "v": rows}, None, index),  # one list, handed out
        ({"w": rows}, None, {**index, MetadataIndex("v", [0]): _StorageInfo("a", 0, 9)}),
        ({"w": rows}, {"w": ("a", "b", "c", "d", "e")}, index),
    ):
        with pytest.raises(HostileFile, match="parts of tensors or more"):
            read(tmp_path, Metadata(tensors, paths, stored))


class Pairs:
    """Keys and values that are pickled as a dict, which nobody had to make."""

    def __init__(self, pairs: Iterable[tuple[object, object]]) -> None:
        self.items = lambda: iter(pairs)


class PairsPickler(pickle._Pickler):
    dispatch: ClassVar[dict[Any, Any]] = {**pickle._Pickler.dispatch, Pairs: pickle._Pickler.save_dict}  # type: ignore[attr-defined]


def test_begins_that_would_hash_alike_take_no_time(tmp_path: Path) -> None:
    """Integers hash modulo ``2**61 - 1``."""
    alike = itertools.islice(itertools.product([way * ((1 << 61) - 1) for way in range(4)], repeat=8), 12_000)
    index: Any = Pairs([(MetadataIndex("w", list(begin)), _StorageInfo("a", 0, 9)) for begin in alike])
    pickled = io.BytesIO()
    PairsPickler(pickled).dump(Metadata({"w": told((1,))}, None, index))
    raw = pickled.getvalue()
    begin = time.process_time()
    with pytest.raises(BadFile, match="do not fill"):
        read(tmp_path, raw)
    assert time.process_time() - begin < 3


def test_long_names(tmp_path: Path) -> None:
    for tensors, stored in (
        ({"w" * 1001: told((0,))}, {}),
        ({}, {MetadataIndex("w" * 1001, [0]): _StorageInfo("a", 0, 9)}),
        ({}, {MetadataIndex("w", [0]): _StorageInfo("a" * 1001, 0, 9)}),
    ):
        with pytest.raises(HostileFile, match="a name of 1,001 characters"):
            read(tmp_path, Metadata(tensors, None, stored))


def test_what_packed_a_box_is_named_in_short(tmp_path: Path) -> None:
    doubled: list[Any] = ["stream.zstd/1", "x" * 5_000]
    for _ in range(30):
        doubled = [*doubled, doubled]
    packed = _StorageInfo("a", 0, 9, doubled)
    with pytest.raises(Unsupported, match=r"stream\.zstd/1") as caught:
        read(tmp_path, Metadata({}, None, {MetadataIndex("w", [0]): packed}))
    assert len(str(caught.value)) < 3_000

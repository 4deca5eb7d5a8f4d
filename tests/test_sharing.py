"""What lies in a file as it is to be written: the system copies it, and shares it on disks that can; else it is read.

Real disks say what was shared, and what the same command writes without the system's help says what is right.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.steps import fill_disk
from support.tiny import (
    make_state,
    raw_bytes,
    read_file,
    ref_to,
    save,
    save_bin_shards,
    save_safetensors_shards,
    snapshot,
    whole_view,
    write_json,
)
from test_stores import StoreInMemory

from converter import convert
from converter.dtypes import DTYPES
from converter.errors import BadFile
from converter.plan.types import PlannedFile, PlannedTensor
from converter.run import choice, parts
from converter.run.parts import cut_pieces, write_piece
from converter.run.workers import threads
from converter.storage import Place, place_of
from converter.storage.local import open_staged
from converter.storage.root import Root, can_share, share
from converter.tensors.base import ByteRange, PackedRange, TensorSource
from converter.tensors.derived import Box, Boxes, Cast, Constant, Swapped
from converter.tensors.shaped import reshaped

pytestmark = pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="a function of Linux")

DISK_NBYTES = 320 << 20  # XFS takes no less than 300 MB
BLOCK_NBYTES = 4096
PIECE_NBYTES = 1 << 21
F32 = DTYPES["F32"]
LARGE = {name: torch.arange(number, number + (1 << 20), dtype=torch.float32) for number, name in enumerate("abcdef")}
# Kernels and file systems each have their own.
REFUSALS = ("ENOSYS", "EXDEV", "EINVAL", "EOPNOTSUPP", "EPERM", "EBADF", "ETXTBSY", "EIO", "EINTR")

Copy = Callable[..., int]


@pytest.fixture(params=["btrfs", "xfs"])
def sharing_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Give the root of a file system that shares blocks."""
    root, image = tmp_path / "disk", tmp_path / "image"
    make, tools = f"mkfs.{request.param}", ("mount", "filefrag")
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or not all(map(shutil.which, (make, *tools))):
        pytest.skip(f"only root may mount, with {make} and filefrag")
    root.mkdir()
    with image.open("wb") as file:
        file.truncate(DISK_NBYTES)
    commands = ([make, "-q", str(image)], ["mount", "-o", "loop", str(image), str(root)])
    if any(subprocess.run(command, capture_output=True, check=False).returncode for command in commands):
        pytest.skip("cannot mount")
    try:
        yield root
    finally:
        subprocess.run(["umount", "-l", root], check=True)


def own_nbytes(path: Path) -> int:
    """Give the bytes of a disk that a file has for itself."""
    os.sync()
    said = subprocess.run(["filefrag", "-v", path], capture_output=True, text=True, check=True).stdout
    extents = re.findall(r"^ *\d+: *\d+\.\. *\d+: *\d+\.\. *\d+: *(\d+):(.*)$", said, re.MULTILINE)
    assert extents
    return BLOCK_NBYTES * sum(int(length) for length, flags in extents if "shared" not in flags)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one worker write, as if there were no more than files: where others wait, the system only shares."""
    monkeypatch.setattr(choice, "default_workers", lambda: 1)
    monkeypatch.setattr(threads, "default_workers", lambda: 1)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut files as if they were large ones."""
    monkeypatch.setattr(cut_pieces, "__defaults__", (PIECE_NBYTES,))


@pytest.fixture
def ask_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the system copy whatever it can, however small."""
    monkeypatch.setattr(parts, "_TAKEN_NBYTES", 1)
    monkeypatch.setattr(parts, "_ASKED_NBYTES", 1)


def save_single(folder: Path) -> Path:
    """Save a model as one shard, and name it."""
    save_safetensors_shards(make_state(), folder, ["abcdef"])
    [path] = folder.glob("*.safetensors")
    return path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Note what the system copies: bytes, where they begin, and where they go."""
    copy, noted = os.copy_file_range, []

    def note(source: int, out: int, nbytes: int, begin: int, offset: int) -> int:
        noted.append((nbytes, begin, offset))
        return copy(source, out, nbytes, begin, offset)

    monkeypatch.setattr(os, "copy_file_range", note)
    return noted


@pytest.mark.parametrize("workers", [1, 8])
def test_files_that_come_out_as_they_lie_are_shared(
    workers: int, sharing_disk: Path, small_pieces: None, wconv: Callable[..., Any]
) -> None:
    source, out = sharing_disk / "m", sharing_disk / "out"
    save_safetensors_shards(LARGE, source)
    (source / "tokenizer.model").write_bytes(os.urandom(BLOCK_NBYTES * 100 + 5))
    before = snapshot(source)
    wconv("to-safetensors", source, "-o", out, "--verify", "--workers", workers)
    for path in source.glob("*model*"):
        assert path.suffix == ".json" or (out / path.name).read_bytes() == path.read_bytes()
    assert own_nbytes(out / "tokenizer.model") == 0
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) == 3
    for shard in shards:
        # The header, and a block where one piece ends and the next begins.
        assert own_nbytes(shard) <= (1 + shard.stat().st_size // PIECE_NBYTES) * BLOCK_NBYTES
    with shards[0].open("r+b") as file:
        file.seek(BLOCK_NBYTES * 100)
        file.write(b"changed")
    assert snapshot(source) == before


def test_what_lies_otherwise_is_right_as_well(
    sharing_disk: Path, small_pieces: None, ask_for_all: None, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    save_safetensors_shards(LARGE, sharing_disk / "m")
    write_json(sharing_disk / "m" / "config.json", {"architectures": ["C"]})
    wconv("reshard", sharing_disk / "m", "--max-shard-size", "1GB", "-o", sharing_disk / "out")
    save_safetensors_shards(LARGE, tmp_path / "one", ["abcdef"])
    assert (sharing_disk / "out" / "model.safetensors").read_bytes() == next(
        (tmp_path / "one").glob("*.safetensors")
    ).read_bytes()


def make_source(folder: Path) -> Path:
    """Write shards of which a cast to float16 leaves some tensors as they are."""
    half = {name: tensor.half() for name, tensor in make_state("gh").items()}
    save_safetensors_shards({**make_state(), **half}, folder, ("abg", "cdh", "ef"))
    write_json(folder / "config.json", {"architectures": ["C"]})
    return folder


COMMANDS = {
    "to-safetensors": ([], True),
    "reshard": (["--max-shard-size", "1GB"], True),
    "reshard-small": (["--max-shard-size", "40B"], True),
    "recast": (["--dtype", "fp16"], True),
    "to-bin": ([], False),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_with_and_without_it_the_bytes_are_the_same(
    name: str, ask_for_all: None, calls: list[Any], tmp_path: Path, wconv: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source = make_source(tmp_path / "m")
    before = snapshot(source)
    options, is_copied = COMMANDS[name]
    wconv(name.removesuffix("-small"), source, *options, "-o", tmp_path / "out")
    # A zip has CRC32s, which are of bytes that were seen; what goes along is copied as a whole, from its begin.
    assert any(begin and offset for _, begin, offset in calls) is is_copied
    monkeypatch.delattr(os, "copy_file_range")
    wconv(name.removesuffix("-small"), source, *options, "-o", tmp_path / "without")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "without")
    assert snapshot(source) == before


def test_records_with_a_checksum_are_read(ask_for_all: None, calls: list[Any], tmp_path: Path) -> None:
    source = save_bin_shards(make_state(), tmp_path / "m").parent
    convert(source, tmp_path / "out")
    assert calls == []


def test_tensors_in_a_row_are_copied_at_once(ask_for_all: None, calls: list[Any], tmp_path: Path) -> None:
    source = save_safetensors_shards(make_state(), tmp_path / "m", ("abc", "def")).parent
    convert(source, tmp_path / "out", max_shard_size="1GB")
    assert [nbytes for nbytes, _, _ in calls] == [96, 96]


def test_boxes_of_a_tensor_are_copied_each_by_itself(
    ask_for_all: None, small_pieces: None, calls: list[Any], tmp_path: Path
) -> None:
    names = [f"mlp.experts.{e}.{which}_proj.weight" for which in ("up", "gate", "down") for e in range(3)]
    state = {name: torch.rand(50, 50) for name in names}
    save_file(state, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", {"model_type": "olmoe", "num_experts": 3})
    convert(tmp_path, tmp_path / "out", experts="fused")
    made = load_file(tmp_path / "out" / "model.safetensors")
    for e in range(3):
        gate, up, down = (state[f"mlp.experts.{e}.{which}_proj.weight"] for which in ("gate", "up", "down"))
        assert torch.equal(made["mlp.experts.gate_up_proj"][e], torch.cat([gate, up]))
        assert torch.equal(made["mlp.experts.down_proj"][e], down)
    copied = [nbytes for nbytes, _, _ in calls if nbytes >= 10_000]  # and config.json
    assert sum(copied) == 9 * 50 * 50 * 4


def test_where_others_wait_to_write_it_is_read(ask_for_all: None, calls: list[Any], tmp_path: Path) -> None:
    path = save_single(tmp_path / "m")
    with path.open("rb") as source, (tmp_path / "other").open("wb") as out:
        if can_share(source.fileno(), 0, out.fileno(), 0):
            pytest.skip("is on a disk that shares")
    convert(path.parent, tmp_path / "out", workers=2)
    assert calls == []
    convert(path.parent, tmp_path / "alone", workers=1)
    assert len(calls) == 1
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "alone")


def test_small_parts_are_read(calls: list[Any], tmp_path: Path) -> None:
    convert(save_safetensors_shards(make_state(), tmp_path / "m").parent, tmp_path / "out")
    assert calls == []


@pytest.mark.parametrize("piece_nbytes", [16, 48, 1 << 20])
@pytest.mark.parametrize("order", ["abcdefgh", "hgfedcba", "aabbcdcd", "bcdaehgf"])
def test_tensors_in_any_order_go_where_they_belong(
    order: str, piece_nbytes: int, ask_for_all: None, calls: list[Any], tmp_path: Path
) -> None:
    path = save(make_state("abcdefgh"), tmp_path / "model.safetensors")
    tensors = {tensor.name: tensor for tensor in read_file(path).tensors}
    tensors["b"] = tensors["b"]._replace(source=Cast(tensors["b"].source, F32))
    out = tmp_path / "out"
    # Where nothing is planned, nothing is written: here behind each third one.
    offsets = [40 * place - 8 * (place % 3) for place in range(len(order))]
    planned = [PlannedTensor(tensors[name], offset) for name, offset in zip(order, offsets, strict=True)]
    expected = bytearray(b"\xee" * 320)
    for name, offset in zip(order, offsets, strict=True):
        expected[offset : offset + 32] = raw_bytes(make_state("abcdefgh")[name])
    out.write_bytes(b"\xee" * 320)
    file = PlannedFile("out", "safetensors", b"", tuple(planned), 320, {})
    for piece in cut_pieces(file, place_of(out), piece_nbytes):
        write_piece(piece, 16)
    assert out.read_bytes() == expected
    assert calls


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_system_that_refuses_is_asked_once_a_piece(
    refusal: str, ask_for_all: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = getattr(errno, refusal)
    asked = []

    def refuse(*_: object) -> int:
        asked.append(1)
        raise OSError(number, os.strerror(number))

    source = save_safetensors_shards(make_state(), tmp_path / "m").parent
    (source / "tokenizer.model").write_bytes(b"tokens")
    convert(source, tmp_path / "expected", max_shard_size="1GB")
    monkeypatch.setattr(os, "copy_file_range", refuse)
    convert(source, tmp_path / "out", max_shard_size="1GB")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "expected")
    assert len(asked) == 2  # the piece, and what goes along


@pytest.mark.parametrize("ends_after", [0, 1, 3, 1000])
def test_a_system_that_copies_less_than_it_is_asked_for(
    ends_after: int, ask_for_all: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, counts = os.copy_file_range, iter([5] * ends_after)

    def copy_less(source: int, out: int, nbytes: int, *where: int) -> int:
        return copy(source, out, min(nbytes, next(counts, 0)), *where)

    source = save_safetensors_shards(make_state(), tmp_path / "m").parent
    (source / "tokenizer.model").write_bytes(b"tokens that take more than one turn")
    convert(source, tmp_path / "expected", max_shard_size="1GB")
    monkeypatch.setattr(os, "copy_file_range", copy_less)
    convert(source, tmp_path / "out", max_shard_size="1GB")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "expected")


def test_a_source_that_becomes_shorter_while_it_is_copied(
    ask_for_all: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, path = os.copy_file_range, save_single(tmp_path / "m")

    def cut_and_copy(*args: Any) -> int:
        os.truncate(path, path.stat().st_size - 40)
        return copy(*args)

    monkeypatch.setattr(os, "copy_file_range", cut_and_copy)
    with pytest.raises(BadFile, match="was changed while it was read") as caught:
        convert(path.parent, tmp_path / "out")
    assert caught.value.where == str(path)
    assert list(tmp_path.iterdir()) == [path.parent]


def test_a_source_that_changes_after_it_was_copied(
    ask_for_all: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, path = os.copy_file_range, save_single(tmp_path / "m")

    def copy_and_change(*args: Any) -> int:
        count = copy(*args)
        save_file(make_state(seed=1), path)
        os.utime(path)
        return count

    monkeypatch.setattr(os, "copy_file_range", copy_and_change)
    with pytest.raises(BadFile, match="changed while it was read"):
        convert(path.parent, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path.parent]


def test_a_disk_that_fills_up_while_it_is_copied(
    ask_for_all: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wconv: Callable[..., Any]
) -> None:
    source = save_safetensors_shards(make_state(), tmp_path / "m").parent
    before = snapshot(tmp_path)
    fill_disk(monkeypatch)

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    outcome = wconv("to-safetensors", source, "-o", tmp_path / "out", exit_code=7)
    assert "no space left" in outcome.stderr.lower()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("begin", "offset", "nbytes", "expected"),
    [
        (0, 0, 9000, [(9000, 0, 0)]),
        (100, 4196, 9000, [(3996, 100, 4196), (5004, 4096, 8192)]),
        (100, 100, 50, [(50, 100, 100)]),
        (100, 108, 9000, [(9000, 100, 108)]),
        (4096, 8192, 5000, [(5000, 4096, 8192)]),
    ],
    ids=["whole", "head", "in-a-block", "askew", "blocks"],
)
def test_what_begins_with_a_block_is_asked_for_by_itself(
    begin: int, offset: int, nbytes: int, expected: list[Any], calls: list[Any], tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.write_bytes(os.urandom(20_000))
    out.write_bytes(bytes(20_000))
    block_nbytes = out.stat().st_blksize
    if block_nbytes != BLOCK_NBYTES:
        pytest.skip(f"a disk with blocks of {block_nbytes} bytes")
    with source.open("rb") as file, out.open("r+b") as written:
        assert share(file.fileno(), begin, written.fileno(), offset, nbytes) == nbytes
    assert calls == expected
    assert out.read_bytes()[offset : offset + nbytes] == source.read_bytes()[begin : begin + nbytes]


def test_a_copy_is_whole_wherever_the_file_was_read_to(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"0123456789")
    with Root(tmp_path) as root, root.open("source", os.O_RDONLY) as source:
        os.read(source, 4)
        root.take(source, "copy")
    assert (tmp_path / "copy").read_bytes() == b"0123456789"


def test_what_lies_in_another_store_is_not_the_systems(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_bytes(bytes(4))
    place = Place(StoreInMemory({"f": b"1234"}), "f")
    with open_staged(place_of(out)) as staged, place.open() as source:
        assert not staged.take(0, source, 0, 4)


FILE = ref_to("f")
STORED = ByteRange(FILE, 100, 64)
WHOLE = whole_view(F32, (4, 4), STORED)
# Of two boxes, the one that byte 8 lies in ends at byte 16.
HALVES = reshaped(WHOLE, F32, (8, 2))
STACKED = Boxes(F32, (4, 2), (Box((0, 0), HALVES.box((6, 0), (2, 2))), Box((2, 0), HALVES.box((0, 0), (2, 2)))))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (WHOLE, ByteRange(FILE, 108, 16)),
        (WHOLE.box((2, 0), (2, 4)), ByteRange(FILE, 140, 16)),
        (WHOLE.permuted((1, 0)), None),
        (whole_view(F32, (4, 4), STORED._replace(crc32=1)), None),
        (whole_view(F32, (4, 4), PackedRange(FILE, 100, 64, None, 20)), None),
        (Cast(WHOLE, DTYPES["F16"]), None),
        (Swapped(WHOLE, 4), None),
        (Constant(F32, (4,), bytes(16)), None),
        (Boxes(F32, (0,), ()), None),
        (STACKED, ByteRange(FILE, 156, 8)),
        (reshaped(STACKED, F32, (2, 2, 2)), ByteRange(FILE, 156, 8)),
        (STACKED.permuted((1, 0)), None),
    ],
    ids=[
        *("view", "part", "strided", "crc", "packed", "cast", "swapped", "constant", "boxes"),
        *("stacked", "reshaped", "turned"),
    ],
)
def test_what_lies_in_a_file_as_it_is(source: TensorSource, expected: ByteRange | None) -> None:
    assert source.verbatim(8, 24) == expected

"""Bytes on their way: strided tensors as torch gathers them, pieces that cover a file once, checksums that add up."""

from __future__ import annotations

import dataclasses
import functools
import math
import pickle
import random
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.archives import places
from support.judges import described_by_safetensors, described_by_torch, described_by_wconv, own_copy, saved_by_torch
from support.tiny import read_file, ref_to, rezip

import converter.run.execute
from converter.dtypes import DTYPES, DType
from converter.errors import BadFile
from converter.formats import WRITERS
from converter.models.names import Format
from converter.plan.types import PlannedFile, PlannedTensor
from converter.run.parts import (
    Piece,
    check_record,
    compare_piece,
    cut_pieces,
    rewrite_piece,
    write_piece,
)
from converter.storage import place_of
from converter.storage.local import StagedFile, open_staged
from converter.tensors import view as views_module
from converter.tensors.base import ByteRange, Storage, Tensor, TensorSpec
from converter.tensors.reader import PIECE_NBYTES, CrcPart, RangeReader, read_chunks
from converter.tensors.view import View

PT = {"format": "pt"}
GATHERED = [dtype for dtype in DTYPES.values() if dtype.torch_name]
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture(scope="module", autouse=True)
def small_buffers() -> Iterator[None]:
    """Gather with small buffers: thousands of pieces are read here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views_module, "GATHER_NBYTES", 1 << 12)
        yield


# Gathering


@st.composite
def views(draw: st.DrawFn) -> tuple[DType, torch.Tensor, torch.Tensor]:
    """Draw a dtype, a storage of as many distinct elements as will do, and a view of it, as integers of its width."""
    dtype = draw(st.sampled_from(GATHERED))
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    strides = draw(st.lists(st.sampled_from([0, 1, 1, 2, 3, 5, 12, 40]), min_size=len(shape), max_size=len(shape)))
    start = draw(st.integers(0, 7))
    span = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True) if length)
    bits = torch.arange((start + span) * dtype.itemsize) * 37 % 251
    base = bits.to(torch.uint8).view(INTEGERS[dtype.itemsize])
    return dtype, base, base.as_strided(shape, strides, start)


@st.composite
def rearranged(draw: st.DrawFn) -> tuple[DType, torch.Tensor, torch.Tensor]:
    """Draw what people do to tensors: permuted, sliced with steps, narrowed, expanded."""
    dtype = draw(st.sampled_from(GATHERED))
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    base = (torch.arange(torch.Size(shape).numel() * dtype.itemsize) * 37 % 251).to(torch.uint8)
    base = base.view(INTEGERS[dtype.itemsize])
    view = base.reshape(shape).permute(draw(st.permutations(range(len(shape)))))
    for axis, length in enumerate(view.shape):
        begin = draw(st.integers(0, length - 1))
        view = view[(slice(None),) * axis + (slice(begin, None, draw(st.integers(1, 3))),)]
    return dtype, base, view.expand(draw(st.integers(1, 3)), *view.shape)


def describe(path: Path, dtype: DType, base: torch.Tensor, view: torch.Tensor) -> View:
    """Write a storage with something before it, and describe a view of it."""
    path.write_bytes(b"before" + base.numpy().tobytes())
    record = ByteRange(ref_to(path), 6, base.nbytes)
    return View(dtype, tuple(view.shape), record, view.storage_offset(), view.stride())


def bytes_of(view: torch.Tensor) -> bytes:
    return view.contiguous().numpy().tobytes()


def read_all(view: View, buffer_nbytes: int) -> bytes:
    with RangeReader() as reader:
        return b"".join(map(bytes, read_chunks(view, reader, bytearray(buffer_nbytes))))


@pytest.fixture(scope="class", params=[None, 64, 1])
def slab_nbytes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Cut blocks of any size: what a slab takes decides between one read and many."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param:
            patch.setattr(views_module, "_SLAB_NBYTES", request.param)
        yield


@pytest.mark.usefixtures("slab_nbytes")
class TestGather:
    @given(drawn=views() | rearranged(), buffer_nbytes=st.sampled_from([16, 32, 48, 100, 4096]))
    def test_a_view_is_read_as_torch_makes_it_contiguous(
        self, scratch: Path, drawn: tuple[DType, torch.Tensor, torch.Tensor], buffer_nbytes: int
    ) -> None:
        info = describe(scratch / "storage", *drawn)
        assert read_all(info, buffer_nbytes) == bytes_of(drawn[2])

    @given(drawn=views() | rearranged(), data=st.data())
    def test_any_part_is_read(
        self, scratch: Path, drawn: tuple[DType, torch.Tensor, torch.Tensor], data: st.DataObject
    ) -> None:
        info = describe(scratch / "storage", *drawn)
        size, numel = info.dtype.itemsize, drawn[2].numel()
        begin = data.draw(st.integers(0, numel)) * size
        end = data.draw(st.integers(begin // size, numel)) * size
        part = bytearray(end - begin)
        with RangeReader() as reader:
            info.read(begin, memoryview(part), reader)
        assert part == bytes_of(drawn[2])[begin:end]


LARGE = torch.arange(1500 * 1501, dtype=torch.int32).reshape(1500, 1501)


@pytest.mark.parametrize(
    "view",
    [LARGE.t(), LARGE[::2, ::3], LARGE[:, 7], LARGE[::40, ::50].t(), LARGE[3].expand(900, 1501),
     LARGE.reshape(50, 30, 1501).permute(2, 0, 1)[5:], LARGE.as_strided((1000, 1000), (1, 1)), LARGE[:, :1]],
    ids=["transposed", "steps", "column", "few", "expanded", "permuted", "overlapping", "narrow"],
)  # fmt: skip
def test_a_large_view(tmp_path: Path, view: torch.Tensor) -> None:
    info = describe(tmp_path / "storage", DTYPES["I32"], LARGE, view)
    assert read_all(info, 1 << 20) == bytes_of(view)


def test_more_dimensions_than_numpy_has(tmp_path: Path) -> None:
    view = torch.arange(6.0).reshape([1] * 70 + [2, 3]).transpose(-1, -2)
    path = tmp_path / "model.bin"
    path.write_bytes(saved_by_torch({"x": view}))
    expected = torch.arange(6.0).reshape(2, 3).t().contiguous().numpy().tobytes()
    assert described_by_wconv(path)["x"] == ("F32", tuple(view.shape), expected)


@pytest.mark.parametrize("view", [torch.arange(8.0), torch.arange(8.0)[::2]], ids=["contiguous", "strided"])
def test_a_source_that_becomes_shorter(tmp_path: Path, view: torch.Tensor) -> None:
    info = describe(tmp_path / "storage", DTYPES["F32"], torch.arange(8.0), view)
    with (tmp_path / "storage").open("r+b") as file:
        file.truncate(6 + 20)
    with pytest.raises(BadFile, match="became shorter"):
        read_all(info, 16)


# Pieces


def shard_of(tensors: Sequence[Tensor], form: Format = "safetensors") -> PlannedFile:
    """Plan one file."""
    layout = WRITERS[form].lay_out([TensorSpec(one.name, one.dtype, one.shape) for one in tensors], {}, {})
    ordered = [tensors[place] for place in layout.order]
    planned = tuple(PlannedTensor(one, offset) for one, offset in zip(ordered, layout.offsets, strict=True))
    return PlannedFile("model", form, layout.header, planned, layout.nbytes, {})


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Draw tensors of all widths, some of them views: of a part, of all, strided, and two of one storage."""
    state = {}
    for number in range(draw(st.integers(0, 6))):
        dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float8_e5m2, torch.bool]))
        rows, columns = draw(st.integers(0, 9)), draw(st.integers(0, 9))
        base = torch.arange(rows * columns).reshape(rows, columns).to(dtype)
        views = [base, base[1:], base[:, ::2], base.t(), base.flatten()]
        for twin, view in enumerate(draw(st.lists(st.sampled_from(views), min_size=1, max_size=2))):
            state[f"{number}.{twin}"] = view
    return state


def stage(folder: Path, state: Mapping[str, torch.Tensor]) -> tuple[PlannedFile, Path, bytes]:
    """Save a state dict with torch; give the shard to write, an empty file for it, and what it should become."""
    source, path = folder / "model.bin", folder / "model.safetensors"
    source.write_bytes(saved_by_torch(dict(state)))
    shard = shard_of(read_file(source).tensors)
    path.write_bytes(shard.header.ljust(shard.nbytes, b"\xee"))
    return shard, path, safetensors.torch.save({name: own_copy(tensor) for name, tensor in state.items()}, PT)


PIECES = st.sampled_from([16, 32, 64, 176, 1 << 20])
CHUNKS = st.sampled_from([16, 48, 100, 1 << 18])


def cut(shard: PlannedFile, path: Path, piece_nbytes: int) -> list[Piece]:
    return list(cut_pieces(shard, place_of(path), piece_nbytes=piece_nbytes))


@given(state_dicts(), PIECES)
def test_pieces_cover_each_byte_once(scratch: Path, state: dict[str, torch.Tensor], piece_nbytes: int) -> None:
    shard, path, _ = stage(scratch, state)
    pieces = cut(shard, path, piece_nbytes)
    place = len(shard.header)
    for piece in pieces:
        assert 0 < piece.nbytes <= piece_nbytes
        for step in piece.steps:
            assert step.offset + step.begin == place
            assert step.begin % step.tensor.dtype.itemsize == step.end % step.tensor.dtype.itemsize == 0
            place += step.end - step.begin
    assert place == shard.nbytes


@given(state_dicts(), PIECES, CHUNKS, st.randoms(use_true_random=False))
def test_pieces_in_any_order_make_the_file_that_safetensors_writes(
    scratch: Path, state: dict[str, torch.Tensor], piece_nbytes: int, chunk_nbytes: int, order: random.Random
) -> None:
    shard, path, expected = stage(scratch, state)
    pieces = cut(shard, path, piece_nbytes)
    order.shuffle(pieces)
    for piece in pieces:
        write_piece(piece, chunk_nbytes)
    assert path.read_bytes() == expected
    for piece in pieces:
        compare_piece(piece, chunk_nbytes)


@given(state_dicts(), PIECES, CHUNKS, st.randoms(use_true_random=False))
def test_pieces_in_any_order_make_a_file_that_torch_reads(
    scratch: Path, state: dict[str, torch.Tensor], piece_nbytes: int, chunk_nbytes: int, order: random.Random
) -> None:
    # Here the tensors lie in any order of their dtypes, with headers between them.
    stage(scratch, state)
    path = scratch / "written.bin"
    shard = shard_of(read_file(scratch / "model.bin").tensors, "torch")
    path.write_bytes(shard.header.ljust(shard.nbytes, b"\xee"))
    pieces = cut(shard, path, piece_nbytes)
    order.shuffle(pieces)
    for piece in pieces:
        for step in piece.steps:
            assert step.begin % step.tensor.dtype.itemsize == step.end % step.tensor.dtype.itemsize == 0
        write_piece(piece, chunk_nbytes)
    right = described_by_safetensors(state)
    frame = WRITERS["torch"].frame
    assert frame
    with open_staged(place_of(path)) as file:
        for offset, framed in frame(shard.specs, {}, [zlib.crc32(content) for _, _, content in right.values()]):
            file.write(offset, memoryview(framed))
    assert path.stat().st_size == shard.nbytes
    assert described_by_torch(path) == right
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


@given(state_dicts(), PIECES, CHUNKS)
def test_every_record_is_checked_whole_or_in_parts_that_make_a_whole(
    scratch: Path, state: dict[str, torch.Tensor], piece_nbytes: int, chunk_nbytes: int
) -> None:
    shard, path, _ = stage(scratch, state)
    raw = (scratch / "model.bin").read_bytes()
    sums = [write_piece(piece, chunk_nbytes).read for piece in cut(shard, path, piece_nbytes)]
    parts = [part for one in sums for part in one.parts]
    for part in parts:
        begin = part.of.offset + part.begin
        assert part.crc32 == zlib.crc32(raw[begin : begin + part.nbytes])
    checked = {record for one in sums for record in one.checked} | {
        record for record in {part.of for part in parts} if joined(record, parts) == record.nbytes
    }
    views = [tensor.source for tensor, _ in shard.tensors if isinstance(tensor.source, View)]
    assert len(views) == len(shard.tensors)
    for record in {view.storage for view in views if view.storage.nbytes}:
        # Views that read it from its begin to its end.
        whole = [view for view in views if view.storage == record and view.is_contiguous and not view.start]
        assert not any(view.dtype.nbytes(math.prod(view.shape)) == record.nbytes for view in whole) or record in checked


def joined(record: Storage, parts: Sequence[CrcPart]) -> int:
    """Give how many bytes of a record its parts cover from its begin on."""
    nbytes = 0
    for part in sorted((part for part in parts if part.of == record), key=lambda part: part.begin):
        nbytes += part.nbytes if part.begin == nbytes else 0
    return nbytes


@given(state_dicts(), PIECES, CHUNKS)
def test_checksums_of_what_is_written_are_of_the_file(
    scratch: Path, state: dict[str, torch.Tensor], piece_nbytes: int, chunk_nbytes: int
) -> None:
    shard, path, expected = stage(scratch, state)
    pieces = cut(dataclasses.replace(shard, format="torch"), path, piece_nbytes)
    parts = [part for piece in pieces for part in write_piece(piece, chunk_nbytes).written]
    for part in parts:
        begin = part.offset + part.begin
        assert part.crc32 == zlib.crc32(expected[begin : begin + part.nbytes])
    steps = [(step.offset, step.begin, step.end - step.begin) for piece in pieces for step in piece.steps]
    assert [(part.offset, part.begin, part.nbytes) for part in parts] == steps


@pytest.mark.parametrize("chunk_nbytes", [16, 48, 1 << 18])
def test_a_record_is_checked_by_reading_it(tmp_path: Path, chunk_nbytes: int) -> None:
    path = tmp_path / "record"
    path.write_bytes(b"before" + bytes(range(100)) + b"after")
    file = ref_to(path)
    check_record(ByteRange(file, 6, 100, zlib.crc32(bytes(range(100)))), chunk_nbytes)
    with pytest.raises(BadFile, match="CRC32"):
        check_record(ByteRange(file, 7, 100, zlib.crc32(bytes(range(100)))), chunk_nbytes)
    with pytest.raises(BadFile, match="shorter"):
        check_record(ByteRange(file, 50, 100, 1), chunk_nbytes)


@given(state_dicts(), PIECES, CHUNKS, st.integers(0, 2**64))
def test_what_an_earlier_run_left_is_put_right(
    scratch: Path, state: dict[str, torch.Tensor], piece_nbytes: int, chunk_nbytes: int, damage: int
) -> None:
    shard, path, expected = stage(scratch, state)
    left = bytearray(expected)
    for place in range(len(shard.header), len(left), 1 + damage % 50):
        left[place] ^= 0x55
    path.write_bytes(left)
    pieces = cut(shard, path, piece_nbytes)
    parts = [rewrite_piece(piece, chunk_nbytes).read for piece in pieces]
    assert path.read_bytes() == expected
    assert parts == [write_piece(piece, chunk_nbytes).read for piece in pieces]


def test_the_checksum_of_a_whole_record_is_checked_at_once(tmp_path: Path) -> None:
    _, path, _ = stage(tmp_path, {"x": FULL})
    source = tmp_path / "model.bin"
    source.write_bytes(flip(source.read_bytes(), 9))
    [piece] = cut_pieces(shard_of(read_file(source).tensors), place_of(path))
    for deal_with in (write_piece, rewrite_piece):
        with pytest.raises(BadFile, match="CRC32"):
            deal_with(piece)


def test_only_what_differs_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard, path, expected = stage(tmp_path, {"x": torch.arange(64.0)})
    left = bytearray(expected)
    left[len(shard.header) + 40] ^= 1
    path.write_bytes(left)
    written: list[bytes] = []
    write = StagedFile.write

    def write_and_note(out: StagedFile, offset: int, data: memoryview) -> None:
        written.append(bytes(data))
        write(out, offset, data)

    monkeypatch.setattr(StagedFile, "write", write_and_note)
    for piece in cut_pieces(shard, place_of(path)):
        rewrite_piece(piece, 16)
    assert path.read_bytes() == expected
    assert written == [expected[len(shard.header) + 32 :][:16]]


@pytest.mark.parametrize("state", [{"x": torch.arange(4.0)}, {"x": torch.arange(8.0)[::2]}], ids=["plain", "strided"])
def test_every_wrong_byte_of_a_written_file_is_found(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    shard, path, expected = stage(tmp_path, state)
    [piece] = cut_pieces(shard, place_of(path))
    for place in range(len(shard.header), shard.nbytes):
        changed = bytearray(expected)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(BadFile, match="'x'"):
            compare_piece(piece, 16)
    path.write_bytes(expected[:-1])
    with pytest.raises(BadFile):
        compare_piece(piece, 16)


def test_a_piece_is_picklable(tmp_path: Path) -> None:
    shard, path, _ = stage(tmp_path, {"x": torch.arange(4.0)})
    [piece] = cut_pieces(shard, place_of(path))
    assert isinstance(pickle.loads(pickle.dumps(piece)), Piece)


# A flipped byte of any record is found by the command

FULL = torch.arange(10.0)
FLIPPED: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "a record that is a tensor": lambda: {"x": FULL},
    "a record that is two tensors": lambda: {"x": FULL, "y": FULL},
    "a record and a part of it": lambda: {"x": FULL, "y": FULL[2:5]},
    "parts of a record": lambda: {"x": FULL[:5], "y": FULL[5:]},
    "a small part of a record": lambda: {"x": FULL[4:5]},
    "a strided view": lambda: {"x": FULL[::3]},
    "a transposed view": lambda: {"x": FULL.reshape(2, 5).t()},
    "an expanded view": lambda: {"x": FULL[3].expand(4)},
    "nothing of a record": lambda: {"x": FULL[:0]},
}


def flip(raw: bytes, place: int) -> bytes:
    """Flip a bit of the one record of storage in an archive."""
    begin = raw.index(FULL.numpy().tobytes())
    changed = bytearray(raw)
    changed[begin + place] ^= 0x10
    return bytes(changed)


@pytest.mark.parametrize("piece_nbytes", [PIECE_NBYTES, 16])
@pytest.mark.parametrize("build", FLIPPED.values(), ids=FLIPPED)
def test_a_flipped_byte_of_a_record_is_found(
    tmp_path: Path,
    wconv: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    build: Callable[[], dict[str, torch.Tensor]],
    piece_nbytes: int,
) -> None:
    monkeypatch.setattr(converter.run.execute, "cut_pieces", functools.partial(cut_pieces, piece_nbytes=piece_nbytes))
    source, out = tmp_path / "model.bin", tmp_path / "out"
    raw = saved_by_torch(build())
    for place in (0, 17, 39):
        source.write_bytes(flip(raw, place))
        outcome = wconv("to-safetensors", source, "-o", out, exit_code=3)
        assert "CRC32" in outcome.stderr
        assert sorted(tmp_path.iterdir()) == [source]
    source.write_bytes(raw)
    wconv("to-safetensors", source, "-o", out, "--tied", "duplicate")
    [written] = out.glob("*.safetensors")
    assert described_by_wconv(written) == described_by_safetensors(build())


def test_a_checksum_of_zero_is_none(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        raw = saved_by_torch({"x": FULL})
    finally:
        torch.serialization.set_crc32_options(True)
    source = tmp_path / "model.bin"
    source.write_bytes(flip(raw, 5))
    _, central = places(raw, "archive/data/0")
    assert raw[central + 16 : central + 20] == bytes(4)
    wconv("to-safetensors", source, "-o", tmp_path / "out")


def test_a_wrong_checksum_is_found(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    raw = bytearray(saved_by_torch({"x": FULL}))
    _, central = places(bytes(raw), "archive/data/0")
    raw[central + 16] ^= 1
    source = tmp_path / "model.bin"
    source.write_bytes(raw)
    assert "CRC32" in wconv("to-safetensors", source, exit_code=3).stderr


def test_many_deflated_records_take_the_memory_of_one(tmp_path: Path) -> None:
    # An inflater takes some 50 KB.
    path = tmp_path / "m.bin"
    torch.save({f"w{i}": torch.rand(64) for i in range(400)}, path)
    rezip(path, compression=zipfile.ZIP_DEFLATED)
    tensors = read_file(path).tensors
    buffer = bytearray(4096)
    with RangeReader() as reader:
        tracemalloc.start()
        for info in tensors:
            for _ in read_chunks(info.source, reader, buffer):
                pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1_000_000


def test_two_deflated_archives_are_read_side_by_side(tmp_path: Path) -> None:
    state = {"w": torch.rand(500, 300)}
    infos: list[Tensor] = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}.bin"
        torch.save(state, path)
        infos += read_file(rezip(path, compression=zipfile.ZIP_DEFLATED)).tensors
    expected = state["w"].numpy().tobytes()
    with RangeReader() as reader:
        views = [read_chunks(info.source, reader, bytearray(8192)) for info in infos]
        parts = [(bytes(a), bytes(b)) for a, b in zip(*views, strict=True)]
    assert b"".join(a for a, _ in parts) == b"".join(b for _, b in parts) == expected

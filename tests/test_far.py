"""Where records lie in files that are far: predicted with few reads, and looked up when they are read."""

from __future__ import annotations

import io
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.archives import lie, places
from support.judges import described_by_torch, described_by_wconv, saved_by_torch
from support.tiny import read_file, rezip, save, snapshot
from test_stores import FileInMemory, StoreInMemory
from torch.utils.serialization import config

from converter import convert
from converter.dtypes import DTYPES
from converter.errors import BadFile, HostileFile
from converter.formats import zip_records
from converter.formats.torch import writer
from converter.storage import Place
from converter.storage.local import LocalFile
from converter.tensors.base import ByteRange, TensorSpec, WeightsFile
from converter.tensors.reader import RangeReader

State = dict[str, torch.Tensor]
LARGE: State = {f"{name}.weight": torch.randn(200_000) for name in "abc"}  # each more than the head and the tail have
HEAD_NBYTES = 1 << 16


def weights(count: int, numel: int, name: str = "{}") -> State:
    return {name.format(number): torch.full((numel,), float(number)) for number in range(count)}


def opened(raw: bytes) -> tuple[WeightsFile, StoreInMemory]:
    """Read the header of a file in a store that is far."""
    store = StoreInMemory({"model.bin": raw})
    return read_file(Place(store, "model.bin")), store


def ranges_of(file: WeightsFile) -> list[tuple[str, int, int]]:
    return [(name, stored.offset, stored.nbytes) for name, source, _ in file.tensors for stored in source.inputs()]


def leads_of(file: WeightsFile) -> list[int]:
    return [stored.lead for _, source, _ in file.tensors for stored in source.inputs()]


def values_of(raw: bytes) -> Any:
    return described_by_wconv(Place(StoreInMemory({"model.bin": raw}), "model.bin"))


@contextmanager
def no_sums() -> Iterator[None]:
    """Have torch write no CRC32s."""
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(True)


# Head and tail; then a directory of more than 256 kB, or a pickle of more than 64 kB; a fourth read takes both.
@pytest.mark.parametrize(
    ("state", "count"),
    [
        (LARGE, 2),
        (weights(300, 4096), 2),
        (weights(2000, 30), 3),
        (weights(300, 4096, "x" * 300 + "{}"), 3),
        (weights(6000, 10), 4),
    ],
    ids=["large", "many", "small", "long names", "more than 3,000"],
)
def test_the_header_of_an_archive_takes_few_reads(state: State, count: int, tmp_path: Path) -> None:
    raw = saved_by_torch(state)
    file, store = opened(raw)
    assert len(store.reads) == count
    path = tmp_path / "model.bin"
    path.write_bytes(raw)
    here = read_file(path)
    assert ranges_of(file) == ranges_of(here)
    assert any(leads_of(file))
    assert not any(leads_of(here))
    assert values_of(raw) == described_by_torch(path)


def test_a_long_directory_alone_takes_three_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zip_records, "_FAR_TAIL_NBYTES", 1 << 12)
    file, store = opened(saved_by_torch(weights(300, 4096)))
    assert len(store.reads) == 3
    assert len(file.tensors) == 300


@pytest.mark.parametrize("numel", [0, 3, 1_000])
def test_what_torch_and_wconv_write_is_predicted(numel: int, tmp_path: Path) -> None:
    state = LARGE | {"n": torch.zeros(numel), "after": torch.randn(90_000), "half": torch.ones(90_001).half()}
    path = save(state, tmp_path / "model.bin")
    convert(path, tmp_path / "out", format="torch")
    with config.patch({"save.storage_alignment": 4096}):
        aligned = saved_by_torch(state)
    with no_sums():
        unsummed = saved_by_torch(state)
    [written] = (tmp_path / "out").glob("*.bin")
    expected = described_by_torch(path)
    for raw in (path.read_bytes(), aligned, unsummed, written.read_bytes()):
        file, store = opened(raw)
        assert len(store.reads) == 2
        assert sum(map(bool, leads_of(file))) >= 3
        assert values_of(raw) == expected


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_records_that_lie_otherwise_are_looked_up(method: int, tmp_path: Path) -> None:
    state = LARGE | {"odd": torch.randn(70_001)}
    path = rezip(save(state, tmp_path / "model.bin"), compression=method)
    file, store = opened(path.read_bytes())
    assert leads_of(file) == [0] * len(state)
    assert len(store.reads) > 3
    assert ranges_of(file) == ranges_of(read_file(path))
    assert values_of(path.read_bytes()) == described_by_torch(path)


def test_what_an_archive_begins_with_may_come_last(tmp_path: Path) -> None:
    raw = saved_by_torch(LARGE)
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in (
            *records[4:],
            ("archive/zeros", bytes(1 << 19)),
            *records[:4],
            ("archive/x", bytes(1 << 19)),
        ):
            info = zipfile.ZipInfo(name)
            at = archive.fp.tell() + 34 + len(name)  # type: ignore[union-attr]
            info.extra = b"FB" + (-at % 64).to_bytes(2, "little") + bytes(-at % 64)
            archive.writestr(info, content)
    path = tmp_path / "model.bin"
    path.write_bytes(out.getvalue())
    file, store = opened(path.read_bytes())
    assert len(store.reads) == 3  # the pickle and the order of bytes at once, with the headers before them
    assert all(leads_of(file)[1:])
    assert values_of(path.read_bytes()) == described_by_torch(path)
    refused = lie(path.read_bytes(), "archive/byteorder", {"extra_nbytes": 0})
    with pytest.raises(BadFile, match="has it begin elsewhere than what lies around it"):
        opened(refused)


class Sparse:
    """A file that torch writes into, in which zeros take no room."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")

    def write(self, raw: Any) -> int:
        view = memoryview(raw).cast("B")
        if len(view) > 1 << 24:
            self.file.seek(len(view), os.SEEK_CUR)
        else:
            self.file.write(view)
        return len(view)

    def flush(self) -> None:
        self.file.flush()


def written_by_torch(sizes: Iterable[int], path: Path) -> None:
    sparse = Sparse(path)
    with no_sums(), sparse.file:
        torch.save({f"t{number}": torch.zeros(size, dtype=torch.uint8) for number, size in enumerate(sizes)}, sparse)


def written_by_wconv(sizes: Iterable[int], path: Path) -> None:
    specs = [TensorSpec(f"t{number}", DTYPES["U8"], (size,)) for number, size in enumerate(sizes)]
    with path.open("wb") as file:
        for offset, raw in writer.frame(specs, {}, [0] * len(specs)):
            file.seek(offset)
            file.write(raw)


@pytest.mark.parametrize("write", [written_by_torch, written_by_wconv])
def test_records_of_more_than_4_gb_and_beyond(
    write: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.bin"
    write((300_000, (1 << 32) + 100, 80, 0, 300_000, 300_001), path)
    here = read_file(path)
    monkeypatch.setattr(LocalFile, "is_far", True)
    there = read_file(path)
    assert ranges_of(there) == ranges_of(here)
    assert [lead > 0 for lead in leads_of(there)] == [False] + [True] * 5
    with RangeReader() as reader:
        for tensor in there.tensors:
            tensor.source.read(0, memoryview(bytearray(min(tensor.nbytes, 100))), reader)


ELSEWHERE = (
    "the header of its record at byte N has it begin elsewhere than what lies around it. "
    "If you trust it, fetch the file, and name that."
)
DISAGREE = "its directory and the header of its record at byte N disagree. The file is incomplete: fetch it again."
LIES: dict[str, tuple[dict[str, int], type[BadFile], str]] = {
    "longer": ({"extra_nbytes": 128}, HostileFile, ELSEWHERE),
    "shorter": ({"extra_nbytes": 0}, HostileFile, ELSEWHERE),
    "name": ({"name_nbytes": 3}, HostileFile, ELSEWHERE),
    "signature": ({"signature": 0x02014B50}, BadFile, DISAGREE),
    "method": ({"method": 8}, BadFile, DISAGREE),
}


@pytest.mark.parametrize("lied", LIES)
def test_a_header_that_says_otherwise_is_refused_when_it_is_read(
    lied: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields, error, problem = LIES[lied]
    honest = saved_by_torch(LARGE)
    at, _ = places(honest, "archive/data/1")
    raw = lie(honest, "archive/data/1", fields)
    path = tmp_path / "m" / "pytorch_model.bin"
    path.parent.mkdir()
    path.write_bytes(raw)
    monkeypatch.setattr(LocalFile, "is_far", True)
    before = snapshot(tmp_path)
    with pytest.raises(error) as caught:
        convert(path.parent, tmp_path / "out")
    assert str(caught.value) == f"{path}: {problem.replace('N', f'{at:,}')}"
    assert type(caught.value) is error
    assert snapshot(tmp_path) == before


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "the second half": lambda tensor: tensor[300:],
    "little": lambda tensor: tensor[300, :10],
    "all": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.T,
    "a column": lambda tensor: tensor[:, 5],
}


@pytest.mark.parametrize("view", VIEWS)
def test_who_reads_only_parts_looks_too(view: str) -> None:
    raw = saved_by_torch({"before": torch.zeros(HEAD_NBYTES), "w": VIEWS[view](torch.randn(600, 600))})
    file, _ = opened(raw)
    part = file.tensors[1]
    assert part.source.inputs()[0].lead
    out = memoryview(bytearray(part.nbytes))
    with RangeReader(with_sums=True) as reader:
        for _ in range(2):
            part.source.read(0, out, reader)
    lied = opened(lie(raw, "archive/data/1", {"extra_nbytes": 0}))[0].tensors[1]
    with RangeReader() as reader, pytest.raises(BadFile, match="has it begin elsewhere"):
        lied.source.read(0, out, reader)


def test_a_part_of_a_range_has_no_lead() -> None:
    state = {"before": torch.zeros(HEAD_NBYTES), "w": torch.randn(HEAD_NBYTES), "after": torch.zeros(HEAD_NBYTES)}
    with no_sums():
        raw = saved_by_torch(state)
    source = opened(raw)[0].tensors[1].source
    assert source.verbatim(0, 100) is None  # its header has to be looked at
    [stored] = source.inputs()
    assert isinstance(stored, ByteRange)
    known = source._replace(storage=stored._replace(lead=0))  # type: ignore[attr-defined]
    assert known.verbatim(8, 16) == ByteRange(stored.file, stored.offset + 8, 8)


@pytest.mark.parametrize("numel", [200_000, 1_000])
def test_a_file_cut_short_meanwhile(numel: int) -> None:
    raw = saved_by_torch({"a": torch.zeros(HEAD_NBYTES), "b": torch.randn(numel), "c": torch.zeros(2 * HEAD_NBYTES)})
    file, store = opened(raw)
    source = file.tensors[1].source
    [stored] = source.inputs()
    store.files["model.bin"] = raw[: stored.offset - 1]
    with RangeReader() as reader, pytest.raises(BadFile, match="became shorter while it was read"):
        source.read(0, memoryview(bytearray(4 * numel)), reader)


def stream_of(state: State) -> bytes:
    return saved_by_torch(state, _use_new_zipfile_serialization=False)


def test_the_header_of_a_stream_takes_few_reads(tmp_path: Path) -> None:
    state = weights(300, 4096) | {
        "complex": torch.zeros(5000, dtype=torch.complex64),
        "bytes": torch.ones(9, 3).bool(),
    }
    raw = stream_of(state)
    path = tmp_path / "model.bin"
    path.write_bytes(raw)
    file, store = opened(raw)
    assert len(store.reads) == 2
    assert ranges_of(file) == ranges_of(read_file(path))
    assert set(leads_of(file)) == {0, 8}
    assert values_of(raw) == described_by_torch(path)


def test_counts_of_a_stream_are_looked_at() -> None:
    raw = stream_of(LARGE)
    at = max(offset for _, offset, _ in ranges_of(opened(raw)[0])) - 8
    lied = raw[:at] + (199_999).to_bytes(8, "little") + raw[at + 8 :]
    with pytest.raises(BadFile, match=re.escape(f"its storage at byte {at:,} is cut short, or is not where it")):
        values_of(lied)
    with pytest.raises(RuntimeError):  # so says torch
        torch.load(io.BytesIO(lied), weights_only=True)


def test_counts_of_a_stream_that_ends_elsewhere_are_read() -> None:
    raw = stream_of(LARGE)
    file, store = opened(raw + b"x")
    assert leads_of(file) == [0] * len(LARGE)
    assert len(store.reads) > len(LARGE)
    with pytest.raises(BadFile, match="is cut short"):
        opened(raw[:-1])


def test_what_is_kept_is_not_read_again() -> None:
    store = StoreInMemory({"zeros": bytes(1 << 18)})
    file = FileInMemory(store, Place(store, "zeros"))
    file.keep(0, 1000)
    for offset in (0, 10, 20, 990):
        file.read_small(offset, 10)
    assert store.reads == [(0, 1000)]
    assert file.kept(995, 10) is None

"""Torch archives: what torch.save writes is read as torch reads it; damaged and dishonest ones are refused.

The judge is ``torch.load(weights_only=True)``, and safetensors for the bytes of what it gives. What torch lets pass
(see archives.py) is put together by hand.
"""

from __future__ import annotations

import io
import itertools
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.archives import FLOATS, archive, lie, pickled, places, state_dict, storage, tensor, unicode_path
from support.judges import described_by_safetensors, described_by_torch, described_by_wconv, saved_by_torch, torch_load
from support.tiny import read_file, rezip

from converter.dtypes import BY_TORCH_NAME
from converter.errors import BadFile, HostileFile, Unsupported, WconvError
from converter.formats import zip_records
from converter.formats.torch import content as torch_content
from converter.plan.types import PlannedFile, PlannedTensor
from converter.run.parts import cut_pieces
from converter.storage import place_of

BASE = torch.arange(24.0).reshape(4, 6)
BITS = torch.arange(96, dtype=torch.uint8)


def write(folder: Path, raw: bytes, name: str = "model.bin") -> Path:
    path = folder / name
    path.write_bytes(raw)
    return path


def assert_reads_as_torch_does(path: Path) -> None:
    expected, found = described_by_torch(path), described_by_wconv(path)
    assert found == expected
    assert list(found) == list(expected)


# What torch.save writes


def module_state() -> Mapping[str, Any]:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 2), torch.nn.BatchNorm2d(3), torch.nn.LSTM(3, 2))
    state = module.state_dict()
    assert state._metadata
    return state


def with_attribute(tensor: torch.Tensor) -> torch.Tensor:
    tensor.note = "x"
    return tensor


STATES: dict[str, Callable[[], Mapping[str, Any]]] = {
    "no tensors": dict,
    "ordered": lambda: OrderedDict([("b", BASE), ("a", BASE + 1)]),
    "module": module_state,
    "parameter": lambda: {"x": torch.nn.Parameter(torch.arange(3.0))},
    "parameter without gradient": lambda: {"x": torch.nn.Parameter(torch.arange(3), requires_grad=False)},
    "parameter with attributes": lambda: {"x": with_attribute(torch.nn.Parameter(torch.arange(3.0)))},
    "buffer": lambda: {"x": torch.nn.Buffer(torch.arange(3.0))},
    "tensor with attributes": lambda: {"x": with_attribute(torch.arange(3.0))},
    "requires grad": lambda: {"x": torch.arange(3.0, requires_grad=True)},
    "scalars": lambda: {"x": torch.tensor(1.5), "y": BASE[1, 2], "z": torch.tensor(True)},
    "empty": lambda: {"a": torch.empty(0), "b": torch.empty(0, 3), "c": BASE[4:], "d": BASE[:, 3:3], "e": BASE[9:9]},
    "empty, beyond the end": lambda: {"x": torch.zeros(1, 0)[1:], "y": torch.arange(0).as_strided((0, 2), (2, 1), 9)},
    "view": lambda: {"x": BASE[1:3]},
    "view of one row": lambda: {"x": BASE[2]},
    "column": lambda: {"x": BASE[:, 2]},
    "steps": lambda: {"x": BASE[1::2, ::3]},
    "transposed": lambda: {"x": BASE.t()},
    "channels last": lambda: {"x": torch.arange(120.0).reshape(2, 3, 4, 5).to(memory_format=torch.channels_last)},
    "expanded": lambda: {"x": BASE[0].expand(5, 6), "y": torch.tensor(2.5).expand(2, 3)},
    "overlapping": lambda: {"x": torch.arange(9.0).as_strided((4, 3), (2, 1))},
    "odd strides": lambda: {"x": torch.arange(9.0).as_strided((1, 3, 1), (100, 2, 50)), "y": BASE[:1].t()},
    "tied": lambda: {"x": BASE, "y": BASE, "z": BASE.t()},
    "views of one storage": lambda: {"x": BASE[:2], "y": BASE[2:], "z": BASE[1:3], "w": BASE},
    "reinterpreted": lambda: {"x": BITS.view(torch.float32)[3:5], "y": BITS.view(torch.float32)},
    "odd names": lambda: {
        name: torch.tensor([float(place)])
        for place, name in enumerate(["", "/", "a/b", "é日😀", "\n\"'\\\0", "data.pkl"])
    },
    "many names": lambda: {f"layers.{place}.weight": BASE[place % 4] for place in range(400)},
}  # fmt: skip


@pytest.mark.parametrize("build", STATES.values(), ids=STATES)
def test_a_state_dict_is_read_as_torch_reads_it(tmp_path: Path, build: Callable[[], Mapping[str, Any]]) -> None:
    assert_reads_as_torch_does(write(tmp_path, saved_by_torch(build())))


@pytest.mark.parametrize("name", BY_TORCH_NAME)
def test_every_dtype_is_read(tmp_path: Path, name: str) -> None:
    values = BITS.view(getattr(torch, name)) if name != "bool" else BITS % 3 == 0
    table = values[:12].reshape(3, 4)
    state = {"x": values, "view": values[3:7], "transposed": table.t(), "column": table[:, 1], "scalar": values[5]}
    assert_reads_as_torch_does(write(tmp_path, saved_by_torch(state)))


@pytest.mark.parametrize("protocol", range(1, 6))
def test_every_protocol_is_read(tmp_path: Path, protocol: int) -> None:
    # torch itself loads protocols 2 and 3 only, so what it saved is the judge.
    state = {
        "é\n\\": BASE.t(), "x" * 300: torch.nn.Parameter(BASE[1:]), "e5m2": BITS.view(torch.float8_e5m2), "i": BITS[3],
        "big": torch.zeros(1).expand(70_000, 300, 0),
    }  # fmt: skip
    path = write(tmp_path, saved_by_torch(state, pickle_protocol=protocol))
    found = described_by_wconv(path)
    assert found == described_by_safetensors(state)
    assert list(found) == list(state)


def test_protocol_0_cannot_name_storages(tmp_path: Path) -> None:
    path = write(tmp_path, saved_by_torch({"x": BASE}, pickle_protocol=0))
    with pytest.raises(pickle.UnpicklingError):
        torch_load(path)
    with pytest.raises(WconvError):
        read_file(path)


@pytest.mark.parametrize("stem", ["model", "weights.v1.5", "é日😀 x", "...", "archive", "a" * 150])
def test_the_root_is_what_the_file_was_called_when_it_was_saved(tmp_path: Path, stem: str) -> None:
    saved = tmp_path / f"{stem}.bin"
    torch.save({"x": BASE}, saved)
    for path in (saved, saved.rename(tmp_path / "renamed.pt")):
        if path.exists():
            assert_reads_as_torch_does(path)


def test_checksums_may_be_left_out(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = write(tmp_path, saved_by_torch({"x": BASE}))
    finally:
        torch.serialization.set_crc32_options(True)
    assert_reads_as_torch_does(path)


# Archives of other makers, which torch reads


def test_the_archive_of_the_cases_below_is_right(tmp_path: Path) -> None:
    path = write(tmp_path, archive())
    assert described_by_wconv(path) == {"weight": ("F32", (4,), FLOATS)} == described_by_torch(path)


@pytest.mark.parametrize("root", ["x/", "é日/", "a b/", "data/", "a.b.c/", "./"])
def test_any_root_will_do(tmp_path: Path, root: str) -> None:
    assert_reads_as_torch_does(write(tmp_path, archive(root=root)))


def test_local_headers_of_64_bits(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive())) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            with new.open(name, "w", force_zip64=True) as record:
                record.write(old.read(name))
    assert_reads_as_torch_does(write(tmp_path, buffer.getvalue()))


def test_notes_may_be_missing(tmp_path: Path) -> None:
    raw = archive()
    assert_reads_as_torch_does(write(tmp_path, without(raw, "archive/byteorder")))


def without(raw: bytes, left_out: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            if info.filename != left_out:
                new.writestr(info, old.read(info))
    return buffer.getvalue()


# Damage


def assert_refused_or_right(path: Path, right: object) -> None:
    """Whatever happened to a file, it gives what it gave before, or an error of ours."""
    try:
        found = described_by_wconv(path)
    except WconvError:
        return
    assert found == right


def test_truncated_anywhere_it_is_refused(tmp_path: Path) -> None:
    for raw in (saved_by_torch({"a": torch.arange(2.0)}), archive()):
        for nbytes in range(len(raw)):
            path = write(tmp_path, raw[:nbytes])
            with pytest.raises(BadFile):
                read_file(path)


def test_a_byte_changed_anywhere_is_noticed_or_does_not_matter(tmp_path: Path) -> None:
    # The bytes of storages are checked when they are copied: see test_stream.py.
    raw = archive()
    path = write(tmp_path, raw)
    right = described_by_wconv(path)
    begin = raw.index(FLOATS)
    for place, mask in itertools.product(range(len(raw)), [0x01, 0x08, 0x80, 0xFF]):
        if not begin <= place < begin + len(FLOATS):
            changed = bytearray(raw)
            changed[place] ^= mask
            assert_refused_or_right(write(tmp_path, bytes(changed)), right)


def test_a_damaged_description_is_noticed_by_its_checksum(tmp_path: Path) -> None:
    raw = archive()
    assert raw.count(b"weight") == 1
    with pytest.raises(BadFile):
        read_file(write(tmp_path, raw.replace(b"weight", b"height")))


@pytest.mark.parametrize("left_out", ["archive/data.pkl", "archive/data/0"])
def test_a_missing_record(tmp_path: Path, left_out: str) -> None:
    with pytest.raises(BadFile):
        read_file(write(tmp_path, without(archive(), left_out)))


def test_the_missing_record_of_an_empty_tensor(tmp_path: Path) -> None:
    described = pickled(state_dict(("weight", tensor(storage(numel=0), shape=(0,)))))
    assert_reads_as_torch_does(write(tmp_path, archive(described, {"data/0": b""})))
    with pytest.raises(BadFile, match="missing"):
        read_file(write(tmp_path, archive(described, {})))


@pytest.mark.parametrize("nbytes", [0, 1, 15])
def test_a_record_shorter_than_its_tensors(tmp_path: Path, nbytes: int) -> None:
    with pytest.raises(BadFile, match="'weight'"):
        read_file(write(tmp_path, archive(records={"data/0": FLOATS[:nbytes]})))


def test_a_record_longer_than_its_storage(tmp_path: Path) -> None:
    path = write(tmp_path, archive(records={"data/0": FLOATS + b"more"}))
    with pytest.raises(RuntimeError, match="does not match"):
        torch_load(path)
    with pytest.raises(BadFile):
        read_file(path)


def test_a_name_that_only_some_readers_see(tmp_path: Path) -> None:
    # Python's zipfile takes the other name from 3.12 on; torch never does.
    extra = {"data/0": unicode_path("archive/data/0", "archive/data/1")}
    assert_reads_as_torch_does(write(tmp_path, archive(extras=extra)))


def test_names_that_differ_in_case(tmp_path: Path) -> None:
    path = write(tmp_path, archive(records={"data/0": FLOATS, "DATA/0": FLOATS[::-1]}))
    with pytest.raises(HostileFile, match="two records"):
        read_file(path)


def test_a_name_cut_at_a_nul(tmp_path: Path) -> None:
    raw = archive(records={"data/0": FLOATS, "data/0_tail": b""}).replace(b"data/0_tail", b"data/0\0tail")
    with pytest.raises(HostileFile, match="not all readers see alike"):
        read_file(write(tmp_path, raw))


def test_prefixed_and_extended_files(tmp_path: Path) -> None:
    raw = archive()
    right = described_by_wconv(write(tmp_path, raw))
    for changed in (b"\0" + raw, raw + b"\0", raw + bytes(70_000), raw + raw, raw[:-22], raw[:4] + raw):
        assert_refused_or_right(write(tmp_path, bytes(changed)), right)


# Lies, one field of one header at a time

DATA = "archive/data/0"
LIES: list[tuple[str, dict[str, int], type[WconvError]]] = [
    (DATA, {"flags": 0x1}, Unsupported),
    (DATA, {"flags": 0x41}, Unsupported),
    ("archive/data.pkl", {"flags": 0x1}, Unsupported),
    ("archive/version", {"flags": 0x1}, Unsupported),
    (DATA, {"method": 8}, BadFile),
    (DATA, {"method": 99}, BadFile),
    (DATA, {"nbytes": 15}, BadFile),
    (DATA, {"nbytes": 17}, BadFile),
    (DATA, {"nbytes": 0}, BadFile),
    (DATA, {"packed_nbytes": 15}, BadFile),
    (DATA, {"packed_nbytes": 17}, BadFile),
    (DATA, {"packed_nbytes": 15, "nbytes": 15}, BadFile),
    (DATA, {"packed_nbytes": 17, "nbytes": 17}, HostileFile),
    (DATA, {"packed_nbytes": 60, "nbytes": 60}, HostileFile),
    (DATA, {"packed_nbytes": 2**32 - 2, "nbytes": 2**32 - 2}, BadFile),
    (DATA, {"packed_nbytes": 2**32 - 1, "nbytes": 2**32 - 1}, BadFile),
    ("archive/version", {"packed_nbytes": 3, "nbytes": 3}, BadFile),
    ("archive/data.pkl", {"packed_nbytes": 3, "nbytes": 3}, BadFile),
    ("archive/byteorder", {"packed_nbytes": 5, "nbytes": 5}, WconvError),
    (DATA, {"header_offset": 0}, BadFile),
    (DATA, {"header_offset": 1}, BadFile),
    (DATA, {"header_offset": 2**31}, BadFile),
    (DATA, {"header_offset": 2**32 - 2}, BadFile),
    (DATA, {"header_offset": 2**32 - 1}, BadFile),
    (DATA, {"name_nbytes": 13}, BadFile),
    (DATA, {"name_nbytes": 15}, BadFile),
    (DATA, {"name_nbytes": 0}, BadFile),
    (DATA, {"name_nbytes": 65535}, BadFile),
    (DATA, {"extra_nbytes": 1}, BadFile),
    (DATA, {"extra_nbytes": 65535}, BadFile),
    (DATA, {"signature": 0}, BadFile),
]
LOCAL_LIES: list[tuple[dict[str, int], type[WconvError]]] = [
    ({"signature": 0}, BadFile),
    ({"signature": 0x02014B50}, BadFile),
    ({"method": 8}, BadFile),
    ({"name_nbytes": 13}, BadFile),
    ({"name_nbytes": 65535}, BadFile),
    ({"extra_nbytes": 1}, BadFile),
    ({"extra_nbytes": 65535}, BadFile),
]


@pytest.mark.parametrize(("record", "lies", "error"), LIES, ids=str)
def test_a_lie_in_the_directory(tmp_path: Path, record: str, lies: dict[str, Any], error: type[WconvError]) -> None:
    with pytest.raises(error):
        read_file(write(tmp_path, lie(archive(), record, **lies)))


@pytest.mark.parametrize(("lies", "error"), LOCAL_LIES, ids=str)
def test_a_lie_in_the_header_of_a_record(tmp_path: Path, lies: dict[str, Any], error: type[WconvError]) -> None:
    with pytest.raises(error):
        read_file(write(tmp_path, lie(archive(), DATA, lies)))


@pytest.mark.parametrize(
    "lies",
    [
        {"nbytes": 15},
        {"packed_nbytes": 15},
        {"nbytes": 17, "packed_nbytes": 17},
        {"nbytes": 0},
        {"crc": 1},
        {"flags": 1},
    ],
    ids=str,
)
def test_where_the_two_headers_disagree_torchs_reading_is_not_contradicted(
    tmp_path: Path, lies: dict[str, int]
) -> None:
    path = write(tmp_path, lie(archive(), DATA, lies))
    assert_refused_or_right(path, {"weight": ("F32", (4,), FLOATS)})
    assert described_by_torch(path) == {"weight": ("F32", (4,), FLOATS)}


@pytest.mark.parametrize("offset", [1 << 62, 1 << 63, (1 << 64) - 1])
def test_offsets_that_no_file_has(tmp_path: Path, offset: int) -> None:
    raw = archive()
    end = raw.rindex(b"PK\5\6")
    directory = raw[end - struct.unpack_from("<I", raw, end + 12)[0] : end]
    begin, names = end - len(directory), struct.unpack_from("<H", directory, 28)[0]
    extra = struct.pack("<2HQ", 1, 8, offset)
    first = directory[:30] + struct.pack("<H", len(extra)) + directory[32:42] + b"\xff" * 4
    wide = first + directory[46 : 46 + names] + extra + directory[46 + names :]
    tail = raw[end : end + 12] + struct.pack("<I", len(wide)) + raw[end + 16 :]
    with pytest.raises(HostileFile, match="lies outside the archive"):
        read_file(write(tmp_path, raw[:begin] + wide + tail))
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, offset, 1)
    with pytest.raises(BadFile, match="directory is damaged"):
        read_file(write(tmp_path, raw[:end] + locator + raw[end:]))


@pytest.mark.parametrize("twice", ["data.pkl", "data/0", "byteorder"])
def test_a_record_that_is_there_twice(tmp_path: Path, twice: str) -> None:
    buffer = io.BytesIO(archive())
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "a") as added:
        warnings.simplefilter("ignore")
        added.writestr(f"archive/{twice}", added.read(f"archive/{twice}"))
    path = write(tmp_path, buffer.getvalue())
    assert described_by_torch(path)
    with pytest.raises(HostileFile, match="two records"):
        read_file(path)


def test_a_record_inside_another(tmp_path: Path) -> None:
    described = pickled(state_dict(("a", tensor()), ("b", tensor(storage("1")))))
    raw = archive(described, {"data/0": FLOATS, "data/1": FLOATS})
    first, second = places(raw, DATA)[0], places(raw, "archive/data/1")[0]
    nbytes = second + 30 + len("archive/data/1") + 16 - (first + 30 + len(DATA))
    with pytest.raises(HostileFile, match="overlaps"):
        read_file(write(tmp_path, lie(raw, DATA, packed_nbytes=nbytes, nbytes=nbytes)))


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    raw = archive(records={"data/0": FLOATS, "data/é": b""})
    assert raw.count("é".encode()) == 2
    right = described_by_wconv(write(tmp_path, raw))
    assert described_by_wconv(write(tmp_path, raw.replace("é".encode(), b"\xff\xff"))) == right


def write_deflated(folder: Path, raw: bytes) -> Path:
    return rezip(write(folder, raw), compression=zipfile.ZIP_DEFLATED)


def test_a_deflated_archive(tmp_path: Path) -> None:
    state = {"a": BASE, "t": BASE.t(), "row": BASE[1], "half": BASE.half(), "e": torch.zeros(0),
             "large": torch.arange(100_000), "end": torch.arange(100_000)[70_000:]}  # fmt: skip
    path = write_deflated(tmp_path, saved_by_torch(state))
    assert_reads_as_torch_does(path)
    for nbytes in (16, 4096, 1 << 20):
        assert described_by_wconv(path, nbytes) == described_by_torch(path)


def test_a_deflated_archive_converts(wconv: Any, tmp_path: Path) -> None:
    state = {"a": torch.rand(1000, 700), "t": torch.rand(300, 400).t()}
    path = write_deflated(tmp_path, saved_by_torch(state))
    wconv("to-safetensors", path, "-o", tmp_path / "x.safetensors", "--verify", "--max-shard-size", "none")
    assert described_by_wconv(tmp_path / "x.safetensors") == described_by_torch(path)


def test_a_deflated_archive_that_is_damaged(wconv: Any, tmp_path: Path) -> None:
    raw = write_deflated(tmp_path, saved_by_torch({"a": torch.rand(100, 70)})).read_bytes()
    place = raw.index(b"data/0") + 5000
    path = write(tmp_path, raw[:place] + bytes([raw[place] ^ 0x40]) + raw[place + 1 :])
    wconv("to-safetensors", path, exit_code=3)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_deflated_record_that_is_shorter_than_it_says(tmp_path: Path) -> None:
    raw = write_deflated(tmp_path, archive()).read_bytes()
    with pytest.raises(BadFile):
        described_by_wconv(write(tmp_path, lie(raw, DATA, packed_nbytes=1)))
    with pytest.raises(BadFile):
        described_by_wconv(write(tmp_path, lie(raw, "archive/data.pkl", nbytes=3)))


@pytest.mark.parametrize("kind", ["FloatStorage", "HalfStorage", "LongStorage", "ComplexFloatStorage", "ByteStorage"])
def test_big_endian_numbers(tmp_path: Path, kind: str) -> None:
    described = pickled(state_dict(("weight", tensor(storage(kind=kind)))))
    raw = bytes(range(4 * {"HalfStorage": 2, "ByteStorage": 1, "FloatStorage": 4}.get(kind, 8)))
    path = rezip(write(tmp_path, archive(described, {"data/0": raw})), {"byteorder": b"big"})
    assert_reads_as_torch_does(path)
    assert described_by_wconv(path, 16) == described_by_torch(path)


def test_big_endian_archives_with_untyped_storages(tmp_path: Path) -> None:
    narrow = {"e5m2": BITS.view(torch.float8_e5m2), "float": BASE}
    path = rezip(write(tmp_path, saved_by_torch(narrow)), {"byteorder": b"big"})
    assert_reads_as_torch_does(path)
    assert read_file(path).notes == ()
    # torch turns typed storages only, whatever the tensor's dtype.
    path = rezip(write(tmp_path, saved_by_torch({**narrow, "u16": BITS.view(torch.uint16)})), {"byteorder": b"big"})
    assert_reads_as_torch_does(path)
    assert "U16 tensors are taken as torch takes them" in read_file(path).notes[0]


def test_a_deflated_record_of_many_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    views = {str(place): BASE.view(-1)[place : place + 1] for place in range(24)}
    path = write_deflated(tmp_path, saved_by_torch(views))
    assert_reads_as_torch_does(path)
    monkeypatch.setattr(torch_content, "_SMALL_NBYTES", 0)
    with pytest.raises(Unsupported, match="unpacked 12 times"):
        read_file(path)


def test_a_deflated_record_that_is_gathered_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_deflated(tmp_path, saved_by_torch({"t": torch.zeros(600, 400).t(), "w": torch.zeros(600, 400)}))
    monkeypatch.setattr(torch_content, "_SMALL_NBYTES", 0)
    assert_reads_as_torch_does(path)
    overlapping = torch.zeros(2000).as_strided((1000, 1000), (1, 1))
    with pytest.raises(Unsupported, match="unpacked 61 times"):
        read_file(write_deflated(tmp_path, saved_by_torch({"o": overlapping})))


def test_a_deflated_record_is_inflated_once(tmp_path: Path) -> None:
    path = write_deflated(tmp_path, saved_by_torch({"a": torch.zeros(1000), "b": torch.zeros(1000)}))
    planned = [PlannedTensor(tensor, 4000 * place) for place, tensor in enumerate(read_file(path).tensors)]
    shard = PlannedFile("x", "safetensors", b"", tuple(planned), 8000, {})
    pieces = list(cut_pieces(shard, place_of(path), piece_nbytes=1024))
    assert [[(step.begin, step.end) for step in piece.steps] for piece in pieces] == [[(0, 4000)], [(0, 4000)]]


def test_an_expanded_tensor_is_written_in_full_and_said(wconv: Any, tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1000).expand(1000, 1000), "y": torch.ones(1).expand(3)}, tmp_path / "m.bin")
    dry = wconv("to-safetensors", tmp_path / "m.bin", "--dry-run")
    done = wconv("to-safetensors", tmp_path / "m.bin")
    for outcome in (dry, done):
        assert "its expanded tensors take 3,996,008 bytes more than in the source" in outcome.stdout + outcome.stderr
    assert described_by_wconv(tmp_path / "m.safetensors") == described_by_torch(tmp_path / "m.bin")


def test_a_file_that_would_fill_the_disk(wconv: Any, tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1).expand(1 << 20, 1 << 20)}, tmp_path / "m.bin")
    refused = wconv("to-safetensors", tmp_path / "m.bin", exit_code=4)
    assert len(refused.stderr.splitlines()) == 1
    assert "'x', of 4,398,046,511,104 bytes in 4. 'wconv to-safetensors --expand'" in refused.stderr
    wconv("to-safetensors", tmp_path / "m.bin", "--expand", "--dry-run")


def test_an_archive_of_many_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, archive())
    read_file(path)
    monkeypatch.setattr(zip_records, "MAX_RECORDS", 3)
    with pytest.raises(HostileFile, match="claims 4 records"):
        read_file(path)


def test_a_directory_of_more_records_than_it_counts(tmp_path: Path) -> None:
    raw = bytearray(archive())
    struct.pack_into("<2H", raw, len(raw) - 14, 3, 3)
    with pytest.raises(BadFile, match="has not the 3 records"):
        read_file(write(tmp_path, bytes(raw)))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_packed_archive(tmp_path: Path, method: int) -> None:
    with pytest.raises(Unsupported, match="compressed"):
        read_file(write(tmp_path, archive(method=method)))


@pytest.mark.parametrize("root", ["", "a/b/"])
def test_an_archive_without_its_one_root(tmp_path: Path, root: str) -> None:
    with pytest.raises(BadFile, match="not one that"):
        read_file(write(tmp_path, archive(root=root)))


@pytest.mark.parametrize("content", [{"readme.txt": b"hello"}, {"word/document.xml": b"<x/>"}, {"x/data.pkl/": b""}])
def test_some_other_zip(tmp_path: Path, content: dict[str, bytes]) -> None:
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w") as out:
        for name, raw in content.items():
            out.writestr(name, raw)
    with pytest.raises(BadFile, match="not one that"):
        read_file(path)


def test_torchscript(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(Unsupported, match="TorchScript"):
        read_file(path)


@pytest.mark.parametrize("order", ["Big", "Little", "", "\0"])
def test_another_order_of_bytes(tmp_path: Path, order: str) -> None:
    buffer = io.BytesIO(without(archive(), "archive/byteorder"))
    with zipfile.ZipFile(buffer, "a") as added:
        added.writestr("archive/byteorder", order)
    with pytest.raises(WconvError):
        read_file(write(tmp_path, buffer.getvalue()))


# Lies of the description, one at a time: each is a pickle that torch refuses, too.

LIES_OF_THE_PICKLE = {
    "more elements than the record": tensor(storage(numel=5)),
    "fewer elements than the record": tensor(storage(numel=2), shape=(2,)),
    "more elements than the storage": tensor(storage(numel=2)),
    "wider elements": tensor(storage(kind="DoubleStorage")),
    "no such record": tensor(storage("1")),
    "a record outside data": tensor(storage("../data.pkl")),
    "start beyond the end": tensor(start=1),
    "start far beyond the end": tensor(start=2**62),
    "negative start": tensor(start=-1),
    "shape beyond the end": tensor(shape=(5,)),
    "negative shape": tensor(shape=(-4,)),
    "two negative lengths": tensor(shape=(-2, -2), strides=(2, 1)),
    "strides beyond the end": tensor(strides=(2,)),
    "negative strides": tensor(start=3, strides=(-1,)),
    "fewer strides than lengths": tensor(shape=(2, 2), strides=(1,)),
    "more strides than lengths": tensor(shape=(4,), strides=(1, 1)),
    "more elements than 64 bits count": tensor(shape=(2**40, 2**40), strides=(0, 0)),
    "a length of more than 64 bits": tensor(shape=(2**64 + 4,)),
}


@pytest.mark.parametrize("described", LIES_OF_THE_PICKLE.values(), ids=LIES_OF_THE_PICKLE)
def test_a_lie_in_the_pickle(tmp_path: Path, described: bytes) -> None:
    path = write(tmp_path, archive(pickled(state_dict(("weight", described)))))
    with pytest.raises((RuntimeError, TypeError, ValueError, pickle.UnpicklingError)):
        torch_load(path)
    with pytest.raises(BadFile):
        read_file(path)


def test_a_storage_under_two_dtypes(tmp_path: Path) -> None:
    # torch gives both tensors the dtype that the pickle names first.
    halves = tensor(storage(numel=8, kind="HalfStorage"))
    path = write(tmp_path, archive(pickled(state_dict(("floats", tensor()), ("halves", halves)))))
    assert torch_load(path)["halves"].dtype == torch.float32
    assert_refused_or_right(path, described_by_torch(path))


# What is no state dict of plain tensors


def quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])


TENSORS_OF_OTHER_KINDS: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "sparse coo": (lambda: BASE.to_sparse(), "sparse"),
    "sparse csr": (lambda: BASE.to_sparse_csr(), "sparse"),
    "quantized": (quantized, "quantized"),
    "nested": (nested, "nested"),
    "meta": (lambda: torch.zeros(2, device="meta"), "meta"),
    "complex128": (lambda: torch.zeros(2, dtype=torch.complex128), "complex128"),
    "complex32": (lambda: torch.zeros(2, dtype=torch.complex32), "complex32"),
    "packed pairs": (lambda: BITS.view(torch.float4_e2m1fn_x2), "float4_e2m1fn_x2"),
}


def test_lazy_views_are_resolved(wconv: Any, tmp_path: Path) -> None:
    values = torch.complex(BASE + 1, BASE + 2)
    state = {
        "conj": values.conj(), "neg": values.clone().conj().imag, "both": torch._neg_view(values.conj()),
        "plain": values, "same": values.conj(), "t": values.conj().t(), "neg row": values.clone().conj().imag[1],
    }  # fmt: skip
    path = tmp_path / "lazy.bin"
    torch.save(state, path)
    wconv("to-safetensors", path, "--verify", "--tied", "duplicate")
    resolved = {name: tensor.resolve_conj().resolve_neg() for name, tensor in state.items()}
    assert described_by_wconv(path) == described_by_safetensors(resolved)
    assert described_by_wconv(path, 16) == described_by_safetensors(resolved)
    assert described_by_wconv(tmp_path / "lazy.safetensors") == described_by_safetensors(resolved)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "problem"), TENSORS_OF_OTHER_KINDS.values(), ids=TENSORS_OF_OTHER_KINDS)
def test_a_tensor_of_another_kind(tmp_path: Path, make: Callable[[], torch.Tensor], problem: str) -> None:
    path = write(tmp_path, saved_by_torch({"plain": BASE, "x": make()}))
    with pytest.raises(Unsupported, match=problem):
        read_file(path)


VALUES: dict[str, Callable[[], Any]] = {
    "a tensor": lambda: BASE,
    "a list": lambda: [BASE],
    "nothing": lambda: None,
    "a list of tensors": lambda: {"x": [BASE]},
    "tuples as names": lambda: {("x", 1): BASE},
    "an optimizer's": lambda: {
        "state": {0: {"step": 1, "exp_avg": BASE}},
        "param_groups": [{"lr": 0.1, "params": [0]}],
    },
    "a size": lambda: {"x": BASE.shape},
    "a dtype": lambda: {"x": BASE.dtype},
}


@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES)
def test_a_value_that_is_no_state_dict(tmp_path: Path, make: Callable[[], Any]) -> None:
    with pytest.raises(Unsupported):
        read_file(write(tmp_path, saved_by_torch(make())))

"""Readers need no disk: any store will do, and what a header takes of it is few reads."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from support.judges import described_by_wconv, saved_by_torch
from support.tiny import rezip, save

from converter.errors import BadFile, Unsupported
from converter.formats import could_be_weights, read_file
from converter.storage import FileRef, Info, OpenFile, Place
from converter.storage.base import Tag, changed
from converter.storage.local import place_at
from converter.tensors.reader import RangeReader

FORMS = ("safetensors", "torch", "deflated", "stream")
SMALL = {name: torch.randn(8) for name in "abcdef"}
# So large that neither its head nor its tail has all of it.
LARGE = {f"{name}.weight": torch.randn(100_000) for name in "abcdef"}


class FileInMemory(OpenFile):
    """A file that notes what is read of it."""

    def __init__(self, store: StoreInMemory, place: Place) -> None:
        super().__init__(FileRef(place, store.tag), len(store.files[place.key]))
        self.store = store

    def read_into(self, offset: int, out: memoryview) -> int:
        part = self.store.files[self.ref.place.key][offset : offset + len(out)]
        self.store.reads.append((offset, len(out)))
        out[: len(part)] = part
        return len(part)

    def check(self) -> None:
        if self.ref.tag != self.store.tag:
            raise changed(self.ref.place)

    def close(self) -> None:
        pass


@dataclass(eq=False)
class StoreInMemory:
    """Files by their keys, at no place of any disk."""

    files: dict[str, bytes]
    tag: str = "first"
    reads: list[tuple[int, int]] = field(default_factory=list)
    url = "memory://"

    def absolute(self, key: str) -> Place:
        return Place(self, key)

    def spell(self, key: str) -> str:
        return f"memory://{key}"

    def stat(self, key: str) -> Info | None:
        return Info("file", len(self.files[key]), self.tag) if key in self.files else None

    def target(self, key: str) -> str | None:
        return None

    def real(self, key: str) -> Place:
        return Place(self, key)

    def list(self, key: str) -> list[str]:
        return [name.removeprefix(f"{key}/") for name in sorted(self.files) if name.startswith(f"{key}/")]

    def open(self, place: Place, tag: Tag | None) -> OpenFile:
        if place.key not in self.files:
            raise BadFile(place, "does not exist")
        file = FileInMemory(self, place)
        if tag is not None and tag != self.tag:
            raise changed(place)
        return file


def write(form: str, state: dict[str, torch.Tensor], folder: Path) -> Path:
    """Write a file in one of the forms that are read."""
    path = folder / ("model.safetensors" if form == "safetensors" else "model.bin")
    if form == "stream":
        path.write_bytes(saved_by_torch(state, _use_new_zipfile_serialization=False))
        return path
    save(state, path)
    return rezip(path, compression=zipfile.ZIP_DEFLATED) if form == "deflated" else path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("state", [SMALL, LARGE], ids=["small", "large"])
def test_a_file_of_any_store_is_read(form: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = write(form, state, tmp_path)
    place = Place(StoreInMemory({"m/model": path.read_bytes()}), "m/model")
    assert could_be_weights(place)
    assert described_by_wconv(place) == described_by_wconv(path)


# Beside head and tail: the rest of a directory, what torch's writer puts before the data, a header or count a tensor.
@pytest.mark.parametrize(
    ("form", "small", "large"), [("safetensors", 1, 1), ("torch", 1, 8), ("deflated", 1, 9), ("stream", 1, 7)]
)
def test_a_header_takes_few_reads(form: str, small: int, large: int, tmp_path: Path) -> None:
    for state, most in ((SMALL, small), (LARGE, large)):
        store = StoreInMemory({"model": write(form, state, tmp_path).read_bytes()})
        read_file(Place(store, "model"))
        assert len(store.reads) <= most, store.reads


def test_a_long_header_takes_two_reads(tmp_path: Path) -> None:
    path = write("safetensors", {f"{number:0500}": torch.zeros(1) for number in range(1000)}, tmp_path)
    store = StoreInMemory({"model": path.read_bytes()})
    read_file(Place(store, "model"))
    assert len(store.reads) == 2


@pytest.mark.parametrize("form", FORMS)
def test_what_changes_in_a_store_is_noticed(form: str, tmp_path: Path) -> None:
    store = StoreInMemory({"model": write(form, SMALL, tmp_path).read_bytes()})
    [info, *_] = read_file(Place(store, "model")).tensors
    buffer = memoryview(bytearray(info.nbytes))

    def read(change_to: str) -> None:
        with RangeReader() as reader:
            info.source.read(0, buffer, reader)
            store.tag = change_to

    read("first")
    for _ in range(2):  # while it is read, and before
        with pytest.raises(BadFile, match="memory://model: was changed"):
            read("second")


def test_a_piece_of_a_training_checkpoint_is_known_by_its_siblings() -> None:
    store = StoreInMemory({"run/mp_rank_00_model_states.pt": b"x", "run/mp_rank_01_model_states.pt": b"x"})
    with pytest.raises(Unsupported, match="tensor-parallel DeepSpeed"):
        read_file(Place(store, "run/mp_rank_00_model_states.pt"))


def test_a_place_elsewhere_has_no_path() -> None:
    with pytest.raises(Unsupported, match="memory://model: is not on this machine's disk"):
        os.fspath(Place(StoreInMemory({}), "model"))


def test_places_do_not_depend_on_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    relative, full = place_at(Path("model.bin")), place_at(tmp_path / "model.bin")
    monkeypatch.chdir("/")
    assert (str(relative), relative.path) == ("model.bin", tmp_path / "model.bin")
    assert full == place_at(tmp_path / "model.bin")

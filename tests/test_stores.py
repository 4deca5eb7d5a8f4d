"""Readers need no disk: any store will do, and what a header takes of it is few reads."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
import torch
from support.judges import described_by_wconv
from support.tiny import make_state, names_in, raw_bytes, save_bin_shards, save_pipeline, snapshot
from test_opening import FORMS, save_as

from converter import convert, storage
from converter.errors import BadFile, BadRequest, Unsupported
from converter.formats import could_be_weights, read_file
from converter.recipes.convert import plan_conversion
from converter.recipes.request import Request, prepare
from converter.run.execute import run_plan
from converter.storage import FileRef, Info, OpenFile, Place, Store, place_of
from converter.storage.base import Tag, changed
from converter.storage.local import place_at
from converter.tensors.base import Tensor
from converter.tensors.reader import RangeReader

MADE = {"pipeline": save_pipeline, "shards": lambda folder: save_bin_shards(make_state(), folder).parent}
SMALL = {name: torch.randn(8) for name in "abcdef"}
# So large that neither its head nor its tail has all of it.
LARGE = {f"{name}.weight": torch.randn(100_000) for name in "abcdef"}


class FileInMemory(OpenFile):
    """A file that notes what is read of it."""

    is_far = True

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
class StoreInMemory(Store):
    """Files by their keys, at no place of any disk."""

    files: dict[str, bytes]
    tag: str = "first"
    reads: list[tuple[int, int]] = field(default_factory=list)

    def absolute(self, key: str) -> Place:
        return Place(self, key)

    def spell(self, key: str) -> str:
        return f"memory://{key}"

    def stat(self, key: str) -> Info | None:
        if key in self.files:
            return Info("file", len(self.files[key]), self.tag)
        return Info("folder", 0, "") if self.list(key) else None

    def list(self, key: str) -> list[str]:
        below = (name.removeprefix(f"{key}/") for name in self.files if name.startswith(f"{key}/"))
        return sorted({name.partition("/")[0] for name in below})

    def open(self, place: Place, tag: Tag | None) -> OpenFile:
        if place.key not in self.files:
            raise BadFile(place, "does not exist")
        file = FileInMemory(self, place)
        if tag is not None and tag != self.tag:
            raise changed(place)
        return file


def write(form: str, state: dict[str, torch.Tensor], folder: Path) -> Path:
    """Write a file in one of the forms that are read."""
    return save_as(form, state, folder / ("model.safetensors" if form == "safetensors" else "model.bin"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("state", [SMALL, LARGE], ids=["small", "large"])
def test_a_file_of_any_store_is_read(form: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = write(form, state, tmp_path)
    place = Place(StoreInMemory({"m/model": path.read_bytes()}), "m/model")
    assert could_be_weights(place)
    assert described_by_wconv(place) == described_by_wconv(path)


# Head and tail; of a stream, more of its head; where records do not lie as torch lays them out, a header a tensor.
@pytest.mark.parametrize(
    ("form", "small", "large"), [("safetensors", 1, 1), ("torch", 1, 2), ("deflated", 1, 8), ("stream", 1, 2)]
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


@pytest.mark.parametrize("form", ["safetensors", "torch", "stream"])
def test_small_tensors_in_a_row_take_few_reads(form: str, tmp_path: Path) -> None:
    state = {f"{number:04}": torch.randn(number % 50 + 1) for number in range(2000)}
    raw = write(form, state, tmp_path).read_bytes()
    store = StoreInMemory({"model": raw})
    tensors = read_file(Place(store, "model")).tensors
    few = 4 + len(raw) // 40_000
    assert len(store.reads) <= few
    store.reads.clear()
    in_a_row = sorted(tensors, key=lambda tensor: tensor.source.inputs()[0].offset)
    assert_same_values(in_a_row, state)
    assert len(store.reads) <= few
    random.Random(0).shuffle(in_a_row)
    assert_same_values(in_a_row, state)


def assert_same_values(tensors: list[Tensor], state: dict[str, torch.Tensor]) -> None:
    with RangeReader() as reader:
        for name, source, _ in tensors:
            out = memoryview(bytearray(state[name].nbytes))
            source.read(0, out, reader)
            assert out == raw_bytes(state[name])


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


@pytest.mark.parametrize("url", ["file://data/model", "file://model", "file://", "file://[data/model"])
def test_a_url_of_another_machine_is_no_path_of_this_one(url: str) -> None:
    with pytest.raises(BadRequest, match="names no file of this machine"):
        place_of(url)


@pytest.mark.parametrize("begin", ["file://", "file://localhost", "FILE://"])
def test_a_url_of_this_machine_is_a_path(begin: str, tmp_path: Path) -> None:
    assert place_of(f"{begin}{(tmp_path / 'a b').as_posix().replace(' ', '%20')}") == place_at(tmp_path / "a b")


def copied(folder: Path) -> StoreInMemory:
    """Take a folder's files into a store, where they lie in the folder ``m``."""
    return StoreInMemory({f"m/{name}": (folder / name).read_bytes() for name in names_in(folder)})


@pytest.fixture
def in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], StoreInMemory]:
    """Make a folder, and serve its files under ``memory://m``."""

    def serve(name: str) -> StoreInMemory:
        store = copied(MADE[name](tmp_path / "local"))
        module: Any = ModuleType("converter.storage.memory")
        module.open_url = lambda url: Place(store, url.removeprefix("memory://"))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(cast("MutableMapping[str, str]", storage._STORES), "memory", "memory")
        return store

    return serve


@pytest.mark.parametrize("made", MADE)
def test_a_folder_of_any_store_is_converted(made: str, tmp_path: Path) -> None:
    store = copied(MADE[made](tmp_path / "local"))
    convert(tmp_path / "local", tmp_path / "there", dtype="bf16")
    convert(Place(store, "m"), tmp_path / "here", dtype="bf16")
    assert snapshot(tmp_path / "here") == snapshot(tmp_path / "there")


@pytest.mark.parametrize("made", MADE)
def test_commands_take_a_place_of_any_store(
    made: str, in_memory: Callable[[str], StoreInMemory], wconv: Callable[..., Any], tmp_path: Path
) -> None:
    in_memory(made)
    local, out = tmp_path / "local", tmp_path / "out"
    for command in ("inspect", "doctor"):
        here, there = (wconv(command, source, exit_code=None) for source in ("memory://m", local))
        assert (here.exit_code, here.stdout) == (there.exit_code, there.stdout.replace(str(local), "memory://m"))
    wconv("to-safetensors", "memory://m", "-o", out, "--verify")
    wconv("to-safetensors", "memory://m", "-o", out)  # it is done
    assert "bit for bit" in wconv("verify", "memory://m", out).stdout


@pytest.mark.parametrize(
    ("args", "refused"),
    [
        (("to-safetensors", "memory://m"), "m"),
        (("to-safetensors", "memory://m", "--dry-run"), "m"),
        (("to-safetensors", "memory://m", "-o", "memory://new"), "new"),
        (("to-safetensors", "memory://m", "-o", "OUT", "--delete-source"), "m"),
        (("rename-variant", "memory://m", "--from", "none", "--to", "fp16"), "m"),
        (("doctor", "memory://m", "--fix"), "m"),
        (("doctor", "memory://m", "--undo"), "m"),
        (("doctor", "memory://m", "--purge"), "m"),
    ],
)
def test_nothing_is_written_elsewhere(
    args: tuple[str, ...], refused: str, in_memory: Callable[[str], StoreInMemory], wconv: Callable[..., Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    in_memory("shards")
    said = wconv(*(str(tmp_path / "out") if arg == "OUT" else arg for arg in args), exit_code=4).stderr
    assert said.startswith(f"memory://{refused}: is not on this machine's disk, and ")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_changes_after_it_was_planned_is_refused(tmp_path: Path) -> None:
    store = copied(MADE["shards"](tmp_path / "local"))
    planned = prepare(Request.of(Place(store, "m"), tmp_path / "out"), plan_conversion)
    store.tag = "second"
    assert planned.plan
    with pytest.raises(BadFile, match=r"memory://m/pytorch_model-.*: was changed"):
        run_plan(planned.plan, request=planned.request)
    assert not (tmp_path / "out").exists()


def test_no_folder_holds_what_another_store_has(tmp_path: Path) -> None:
    inner = (tmp_path / "m").as_posix()
    assert place_at(tmp_path / "m").is_below(place_at(tmp_path))
    assert not Place(StoreInMemory({}), inner).is_below(place_at(tmp_path))

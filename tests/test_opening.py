"""Sources are opened with care: what is no file is left alone, what changes is noticed, and few are open at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from support.judges import described_by_wconv, saved_by_torch
from support.tiny import make_state, read_file, rezip, save, save_pipeline, snapshot, write_json

import converter.run.execute
from converter import Request, convert, plan_conversion, run_plan
from converter.errors import BadFile
from converter.run.workers import Workers
from converter.storage import FileRef, OpenFile, place_of
from converter.storage.local import LocalFile
from converter.tensors.base import Storage, Tensor
from converter.tensors.reader import RangeReader
from converter.transforms.quantize.bnb_int8 import find_scales
from converter.transforms.quantize.write import cut_rows

OLD, NEW = make_state(), make_state(seed=1)
FORMS = ("safetensors", "torch", "deflated", "stream")
CHANGES = ("overwritten", "swapped")
CHANGED = "was changed while it was read. Run this again when nobody writes to it.\n"
CONFIG = {"architectures": ["OfNoLibrary"]}  # so that no library is asked for shapes, which takes seconds
HANG_SECONDS = 100  # what takes so long has no end; nothing else is decided by it

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")


def save_as(form: str, state: dict[str, torch.Tensor], path: Path) -> Path:
    """Write a file in one of the forms that are read."""
    if form == "stream":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(saved_by_torch(state, _use_new_zipfile_serialization=False))
        return path
    save(state, path)
    return rezip(path, compression=zipfile.ZIP_DEFLATED) if form == "deflated" else path


def whole(tensor: Tensor) -> Storage:
    """Give the one storage that a tensor is read from."""
    [storage] = tensor.source.inputs()
    return storage


def source_of(form: str, folder: Path) -> tuple[Path, bytes, tuple[str, ...]]:
    """Give a file, what another state of it would be, and a command that reads it and writes elsewhere."""
    name = "model.safetensors" if form == "safetensors" else "pytorch_model.bin"
    path = save_as(form, OLD, folder / "m" / name)
    later = save_as(form, NEW, folder / name)
    raw = later.read_bytes()
    later.unlink()
    command = ("reshard", "--max-shard-size", "none") if form == "safetensors" else ("to-safetensors",)
    return path, raw, (*command, str(path.parent), "-o", str(folder / "out"))


def change(path: Path, raw: bytes, how: str) -> None:
    """Give a file other content, in place or by renaming another over it, with the time that it had."""
    before = path.stat()
    target = path if how == "overwritten" else path.with_name("beside")
    while True:
        target.write_bytes(raw)
        os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
        # Clocks of file systems tick every few ms.
        if target.stat().st_ctime_ns != before.st_ctime_ns:
            break
    target.replace(path)


def once(action: Callable[[], None], function: Callable[..., Any], after: int = 0) -> Callable[..., Any]:
    """Let something happen before a call of a function: the first, or after so many."""
    left = [after + 1]

    def call(*args: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            action()
        return function(*args)

    return call


# What changes.


@pytest.mark.parametrize("when", ["before the data", "within the data", "after the data"])
@pytest.mark.parametrize(("form", "how"), list(product(FORMS, CHANGES)))
def test_a_source_that_changes_while_it_is_read(
    form: Any, how: Any, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wconv: Callable[..., Any]
) -> None:
    path, raw, command = source_of(form, tmp_path)
    owner, name, after = {
        "before the data": (converter.run.execute, "write_piece", 0),
        "within the data": (RangeReader, "read_into", 2),
        "after the data": (converter.run.execute, "check_staged", 0),
    }[when]
    monkeypatch.setattr(owner, name, once(lambda: change(path, raw, how), getattr(owner, name), after))
    assert wconv(*command, exit_code=3).stderr == f"{path}: {CHANGED}"
    assert path.read_bytes() == raw
    assert [entry.relative_to(tmp_path) for entry in tmp_path.rglob("*")] == [Path("m"), Path("m", path.name)]


STOPPING = """
import os, signal, sys, time
from converter.cli import main
from converter.tensors.reader import RangeReader

read_into, left, go = RangeReader.read_into, [3], sys.argv[1]

def stopping(*args):
    read_into(*args)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGSTOP)
        while not os.path.exists(go):  # whichever thread took the signal, this one goes no further
            time.sleep(0.01)

RangeReader.read_into = stopping
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="the system stops no processes")
@pytest.mark.parametrize(("form", "how"), list(product(FORMS, CHANGES)))
def test_a_source_that_changes_while_the_command_is_stopped(form: Any, how: Any, tmp_path: Path) -> None:
    path, raw, command = source_of(form, tmp_path / "work")
    go = tmp_path / "go"
    child = subprocess.Popen((sys.executable, "-c", STOPPING, go, *command), stderr=subprocess.PIPE, text=True)
    assert os.WIFSTOPPED(os.waitpid(child.pid, os.WUNTRACED)[1])
    change(path, raw, how)
    go.touch()
    child.send_signal(signal.SIGCONT)
    assert child.communicate()[1].splitlines(keepends=True)[-1] == f"{path}: {CHANGED}"
    assert child.returncode == 3
    assert path.read_bytes() == raw
    assert list(snapshot(tmp_path / "work")) == ["m", f"m/{path.name}"]


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("command", [("verify", "m", "m2"), ("doctor", "--deep", "m")], ids=["verify", "doctor"])
def test_commands_that_only_read_notice_it_too(
    command: tuple[str, ...], how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wconv: Callable[..., Any]
) -> None:
    path, raw, _ = source_of("safetensors", tmp_path)
    save(OLD, tmp_path / "m2" / path.name)
    write_json(path.with_name("config.json"), CONFIG)
    action = once(lambda: change(tmp_path / path, raw, how), RangeReader.read_into, after=2)
    monkeypatch.setattr(RangeReader, "read_into", action)
    monkeypatch.chdir(tmp_path)
    assert wconv(*command, exit_code=3).stderr.endswith(f"{Path('m', path.name)}: {CHANGED}")


def test_scales_are_not_taken_from_two_states(tmp_path: Path) -> None:
    path = save({"w": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    [info] = read_file(path).tensors
    [block] = cut_rows(info)
    change(path, path.read_bytes(), "overwritten")
    with pytest.raises(BadFile, match="changed while"):
        find_scales(block, 1 << 16)


def test_a_file_that_is_carried_along_is_not_of_two_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(OLD, tmp_path / "m" / "pytorch_model.bin").parent
    carried = write_json(source / "tokenizer.json", {"a": 0})
    look = os.fstat

    def look_and_change(handle: int) -> os.stat_result:
        found = look(handle)
        if found.st_ino == carried.stat().st_ino and found.st_size == carried.stat().st_size:
            change(carried, b"{}", "overwritten")
        return found

    monkeypatch.setattr(os, "fstat", look_and_change)
    with pytest.raises(BadFile, match="changed while") as caught:
        convert(source, tmp_path / "out")
    assert caught.value.where == str(carried)
    assert list(tmp_path.iterdir()) == [source]


def test_one_file_of_two_states_is_not_compared_with_itself(tmp_path: Path) -> None:
    path = save(OLD, tmp_path / "model.safetensors")
    [before, *_] = read_file(path).tensors
    change(path, save(NEW, tmp_path / "new.safetensors").read_bytes(), "swapped")
    [after, *_] = read_file(path).tensors
    buffer = memoryview(bytearray(before.nbytes))
    with RangeReader() as files:
        files.read_into(whole(after), 0, buffer)
        with pytest.raises(BadFile, match="changed while"):
            files.read_into(whole(before), 0, buffer)


def test_what_is_damaged_and_was_not_changed_is_called_damaged(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    path, _, command = source_of("deflated", tmp_path)
    raw = bytearray(path.read_bytes())
    raw[whole(read_file(path).tensors[0]).offset] ^= 0xFF
    path.write_bytes(raw)
    assert "damaged" in wconv(*command, exit_code=3).stderr


# What is no file.


def in_time(function: Callable[[], Any]) -> Any:
    """Give what a function gives, in a thread that may hang."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(function())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(HANG_SECONDS)
    assert results, "it hangs"
    return results[0]


@needs_pipes
def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(OLD, tmp_path / "model.safetensors")
    found = path.stat()
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(Path, "stat", lambda *_, **__: found)
    error = in_time(lambda: FileRef(place_of(path)).open())
    assert isinstance(error, BadFile)
    assert "no regular file" in str(error)


def test_a_device_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(BadFile, match="no regular file"):
        FileRef(place_of(os.devnull)).open()


EACH = """
import contextlib, io, sys
from converter.cli import main
for command in sys.argv[1].split("|"):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            code = main(command.split())
        except SystemExit as stop:
            code = stop.code
    assert "Usage" not in text.getvalue(), text.getvalue()
    print(code, command, text.getvalue() if code == 70 else "", flush=True)
"""
COMMANDS = (
    "inspect {0}",
    "inspect --tensors {0}",
    "doctor {0}",
    "doctor --deep {0}",
    "doctor --fix {0}",
    "doctor --undo {0}",
    "verify {0} {0}",
    "to-safetensors {0} -o {1}1",
    "to-safetensors {0}",
    "to-bin {0} -o {1}2",
    "recast {0} --dtype fp16 -o {1}3",
    "reshard {0} --max-shard-size none -o {1}4",
    "reshard {0} --max-shard-size 1KB --in-place",
    "rename-variant {0} --from none --to fp16",
    "quantize {0} -o {1}5",
    "dequantize {0} --dtype fp16 -o {1}6",
    "prepare-coreml {0} -o {1}7",
)
PIPES = (
    "adapter_model.bin",
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model.fp16.safetensors",
    "model.gguf",
    "model.safetensors.index.json",
    "model_index.json",
    "modules.json",
    "notes",
    "pytorch_model.bin.index.json",
    "unet.safetensors",
    "x.ckpt",
)


@needs_pipes
@pytest.mark.parametrize(
    "named",
    ["", "x.ckpt", "model.safetensors.index.json", "model.gguf", pytest.param("pipeline", marks=pytest.mark.slow)],
)
def test_no_command_waits_for_a_pipe(named: str, tmp_path: Path) -> None:
    if named == "pipeline":
        save_pipeline(tmp_path / "m" / named)
    save(OLD, tmp_path / "m" / "pytorch_model.bin")
    pipes = [tmp_path / "m" / folder / name for folder in ("", "pipeline", "pipeline/unet") for name in PIPES]
    pipes = [path for path in pipes if not path.exists()]
    for path in pipes:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(path)
    commands = [command.format(tmp_path / "m" / named, tmp_path / "out") for command in COMMANDS]
    script = (sys.executable, "-c", EACH, "|".join(commands))
    done = subprocess.run(script, capture_output=True, text=True, timeout=HANG_SECONDS, check=True)
    codes = {line.partition(" ")[2]: int(line.partition(" ")[0]) for line in done.stdout.splitlines()}
    assert set(codes.values()) <= {0, 1, 2, 3, 4, 5}, done.stdout
    assert len(codes) == len(commands)
    assert all(path.is_fifo() for path in pipes)


# How many are open.


class Opened:
    """The source files that were opened again, how many, and those that are still open."""

    def __init__(self) -> None:
        self.count = 0
        self.left: set[int] = set()

    def note(self, file: OpenFile) -> OpenFile:
        self.count += 1
        self.left.add(id(file))
        return file


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
    """Note the source files that are opened again."""
    noted = Opened()
    open_again, close = FileRef.open, LocalFile.close

    def close_and_note(file: LocalFile) -> None:
        close(file)
        noted.left.discard(id(file))

    monkeypatch.setattr(FileRef, "open", lambda ref: noted.note(open_again(ref)))
    monkeypatch.setattr(LocalFile, "close", close_and_note)
    yield noted
    assert not noted.left


@pytest.mark.parametrize("form", ["safetensors", "deflated"])
def test_a_task_keeps_few_files_open(form: str, tmp_path: Path, opened: Opened) -> None:
    suffix = ".safetensors" if form == "safetensors" else ".bin"
    paths = [save_as(form, make_state(seed=seed), tmp_path / f"{seed}{suffix}") for seed in range(7)]
    tensors = [read_file(path).tensors for path in paths]
    with RangeReader() as files:
        for turn in zip(*tensors, strict=True):
            for info, path in zip(turn, paths, strict=True):
                buffer = bytearray(info.nbytes)
                files.read_into(info.source.storage, 0, memoryview(buffer))
                assert buffer == described_by_wconv(path)[info.name][2]
                assert len(opened.left) <= 4


def test_what_changes_is_noticed_when_its_file_is_closed_for_another(tmp_path: Path) -> None:
    paths = [save(OLD, tmp_path / f"{number}.safetensors") for number in range(5)]
    storages = [whole(read_file(path).tensors[0]) for path in paths]
    buffer = memoryview(bytearray(storages[0].nbytes))
    with RangeReader() as files:
        for storage in storages[:4]:
            files.read_into(storage, 0, buffer)
        change(paths[0], paths[0].read_bytes(), "overwritten")
        with pytest.raises(BadFile, match=r"0\.safetensors: was changed while"):
            files.read_into(storages[4], 0, buffer)


def test_two_files_read_by_turns_stay_open(tmp_path: Path, opened: Opened) -> None:
    paths = [save(make_state(seed=seed), tmp_path / f"{seed}.safetensors") for seed in range(2)]
    with RangeReader() as files:
        for infos in zip(*(read_file(path).tensors for path in paths), strict=True):
            for info in infos:
                files.read_into(info.source.storage, 0, memoryview(bytearray(info.nbytes)))
    assert opened.count == 2


FEW_FILES = """
import functools, resource, sys
import converter.recipes.verify, converter.run.execute
from converter.cli import main

resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
converter.recipes.verify.PIECE_NBYTES = 3 << 10  # several tasks, each with more shards than it may open
converter.run.execute.cut_pieces = functools.partial(converter.run.execute.cut_pieces, piece_nbytes=3 << 10)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "command",
    [
        ("verify", "m", "m", "--workers", "8"),
        ("reshard", "m", "-o", "out", "--max-shard-size", "none", "--workers", "8", "--verify"),
        ("doctor", "--deep", "m"),
    ],
    ids=["verify", "reshard", "doctor"],
)
def test_many_shards_where_few_files_may_be_open(command: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("resource")
    weight_map = {}
    for number in range(1, 201):
        # In the order of their names, tensors come from one shard after the other.
        state = {f"{letter}.{number:03d}": torch.full((4,), float(number)) for letter in "abc"}
        name = f"model-{number:05d}-of-00200.safetensors"
        save(state, tmp_path / "m" / name)
        weight_map.update(dict.fromkeys(state, name))
    write_json(tmp_path / "m" / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(tmp_path / "m" / "config.json", CONFIG)
    script = (sys.executable, "-c", FEW_FILES, *command)
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Who is waited for.


def test_futures_that_an_executor_forgets_are_not_waited_for(tmp_path: Path) -> None:
    error = BadFile("x", "is damaged")

    class Forgetful(Executor):
        def __init__(self) -> None:
            self.futures: list[Future[Any]] = []

        def submit(self, *_: Any, **__: Any) -> Future[Any]:
            self.futures.append(Future())
            if len(self.futures) == 2:
                self.futures[0].set_exception(error)
            return self.futures[-1]

    for name in "ab":
        save(OLD, tmp_path / "m" / name / "pytorch_model.bin")
        write_json(tmp_path / "m" / name / "config.json", {"_class_name": "X"})
    write_json(tmp_path / "m" / "model_index.json", {"_class_name": "P"})
    pool = Forgetful()
    plan = plan_conversion(Request.of(tmp_path / "m", tmp_path / "out"))
    assert in_time(lambda: run_plan(plan, Workers(pool, 1))) is error
    assert [future.cancelled() for future in pool.futures] == [False, True]
    assert list(tmp_path.iterdir()) == [tmp_path / "m"]

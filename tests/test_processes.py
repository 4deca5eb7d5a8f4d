"""Worker processes: who starts them and when, in how much memory, and what becomes of them whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch
from support.tiny import make_state, save, snapshot, unmeasured

import converter.run.choice
import converter.run.workers.cores
from converter import Request, convert, plan_conversion
from converter.cli import main
from converter.errors import Unsupported
from converter.run.choice import WORKER_NBYTES, Choice, choose_workers
from converter.run.parts import cut_pieces, write_piece
from converter.run.tasks import buffers_nbytes, most_at_once
from converter.run.workers import open_workers
from converter.run.workers.base import Workers
from converter.run.workers.cores import count_cores, default_workers
from converter.storage import place_of

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes as Linux has them")
WCONV = (sys.executable, "-m", "converter")
HOLLOW_NBYTES = 1 << 30
MANY_NBYTES = 3_000_000_000


def make_hollow(folder: Path, nbytes: int) -> Path:
    """Write a float32 model that takes no room: zeros all over."""
    folder.mkdir()
    header = json.dumps({"w": {"dtype": "F32", "shape": [nbytes // 4], "data_offsets": [0, nbytes]}}).encode()
    header += b" " * (-len(header) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + nbytes)
    return folder


def in_session(session: int) -> list[int]:
    """List what runs in a session: quickly, or what is to be met has ended by then."""
    numbers = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return [number for number in numbers if is_in(number, session)]


def is_in(process: int, session: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        return os.getsid(process) == session and state != "Z"
    except (OSError, IndexError):
        return False


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


# What comes of them.


@pytest.mark.parametrize(
    "command", [("recast", "--dtype", "bf16"), ("to-bin",), ("reshard", "--max-shard-size", "1MB")]
)
def test_they_write_the_same_bytes(command: tuple[str, ...], tmp_path: Path) -> None:
    state = {f"l.{number}": torch.randn(257, 1031) for number in range(4)} | make_state()
    source = save(state, tmp_path / "m" / "model.safetensors").parent
    how = [command[0], str(source), *command[1:], "-q", "-o"]
    assert main([*how, str(tmp_path / "a"), "--executor", "threads"]) == 0
    assert main([*how, str(tmp_path / "b"), "--executor", "processes=2", "--verify"]) == 0
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_what_is_compared_by_them_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(make_state(), tmp_path / "m" / "model.bin").parent
    convert(source, tmp_path / "out")
    assert main(["verify", str(source), str(tmp_path / "out"), "--executor", "processes=2"]) == 0
    assert "The same" in capsys.readouterr().out


# What becomes of them.

KILLED = """
import os, sys
from converter import WconvError, convert
from converter.run.workers import open_workers

def main():
    with open_workers("processes=2") as workers:
        def kill(_):
            os.kill(next(iter(workers._executor._processes)), 9)
        try:
            convert("m", "out", dtype="bf16", executor=workers, progress=kill)
        except WconvError as error:
            sys.exit(f"{type(error).__name__} {error}")

if __name__ == "__main__":
    main()
"""


@linux
def test_one_that_is_killed_is_one_line(tmp_path: Path) -> None:
    make_hollow(tmp_path / "m", HOLLOW_NBYTES // 4)
    (tmp_path / "killed.py").write_text(KILLED)
    before = sorted(tmp_path.iterdir())
    done = subprocess.run([sys.executable, "killed.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "SystemRefused model.safetensors: was under way when a worker was killed. "
        "Perhaps memory ran out: try fewer --workers.\n"
    )
    assert sorted(tmp_path.iterdir()) == before


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_they_end_with_whom_they_work_for(number: signal.Signals, tmp_path: Path) -> None:
    make_hollow(tmp_path / "m", 8 * HOLLOW_NBYTES)
    command = (*WCONV, "recast", "m", "--dtype", "bf16", "-o", "out", "--executor", "processes=2")
    start = (
        f"import os, signal; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv({sys.executable!r}, {command!r})"
    )
    # Who runs the tests in the background of a shell has Ctrl-C ignored.
    listening = (sys.executable, "-c", start)
    process = subprocess.Popen(listening, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: len(in_session(process.pid)) >= 4 or process.poll() is not None)
    # Ctrl-C goes to all that a terminal has started.
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, told = process.communicate(timeout=60)
    wait_for(lambda: not in_session(process.pid))
    if number == signal.SIGKILL:
        assert process.returncode == -number
        return
    assert (process.returncode, told) == (130, "\nInterrupted.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@linux
@pytest.mark.skipif(sys.version_info < (3, 11), reason="has no worker processes")
def test_they_load_nothing_from_the_folder_that_one_is_in(tmp_path: Path) -> None:
    source = save(make_state(), tmp_path / "m" / "model.bin").parent
    names = ("multiprocessing/__init__", "concurrent/__init__", "signal", "socket", "selectors", "numpy", "converter",
             "numkong", "sitecustomize", "threading", "errno")  # fmt: skip
    for name in names:
        path = source / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"open({str(tmp_path / 'run')!r}, 'a').write({name!r})\nraise SystemExit(9)\n")
    # ``-c`` lets the current folder go first too, where wconv's own script does not.
    start = "import sys; del sys.path[0]; from converter.__main__ import main; sys.exit(main())"
    how = ("--dtype", "bf16", "-o", tmp_path / "out", "-q", "--executor", "processes=2")
    home = Path(converter.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(home)}
    command = (sys.executable, "-c", start, "recast", ".", *how)
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "run").exists()


def test_python_310_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 12))
    monkeypatch.setattr(converter.run.choice, "default_workers", lambda: 8)
    place = place_of(make_hollow(tmp_path / "m", MANY_NBYTES))
    assert choose_workers(place, computes=True) == Choice("threads", 8)
    with pytest.raises(Unsupported, match=r"--executor processes: needs Python 3\.11"), open_workers("processes=2"):
        raise AssertionError("it did not look")


# Who starts them.


@pytest.mark.parametrize(
    ("cores", "nbytes", "computes", "asked", "expected"),
    [
        (8, MANY_NBYTES, True, (None, None), Choice("processes", 8)),
        (8, MANY_NBYTES, True, (None, 4), Choice("processes", 4)),
        (8, MANY_NBYTES, True, (None, 2), Choice("threads", 2)),
        (8, MANY_NBYTES, True, ("threads", None), Choice("threads", 8)),
        (8, MANY_NBYTES, False, (None, None), Choice("threads", 8)),
        (8, 1 << 20, True, (None, None), Choice("threads", 8)),
        (2, MANY_NBYTES, True, (None, None), Choice("threads", 2)),
        (2, 1 << 20, True, ("processes", None), Choice("processes", 2)),
        (2, 1 << 20, True, ("processes=5", 3), Choice("processes", 5)),
        (2, MANY_NBYTES, True, ("dask=x.json", None), Choice("dask=x.json", None)),
        (2, MANY_NBYTES, True, ("ray", 3), Choice("ray", 3)),
    ],
)
def test_they_are_for_casts_of_much_on_many_cores(
    cores: int, nbytes: int, computes: bool, asked: Any, expected: Choice, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(converter.run.choice, "default_workers", lambda: cores)
    place = place_of(make_hollow(tmp_path / "m", nbytes))
    assert choose_workers(place, computes, *asked) == expected
    assert choose_workers(place / "model.safetensors", computes, *asked) == expected
    (tmp_path / "p").mkdir()
    (tmp_path / "m").rename(tmp_path / "p" / "unet")
    assert choose_workers(place_of(tmp_path / "p"), computes, *asked) == expected


@linux
def test_a_small_cast_starts_none(tmp_path: Path) -> None:
    save(make_state(), tmp_path / "m" / "model.bin")
    command = (sys.executable, "-X", "importtime", "-m", "converter", "recast", "m", "--dtype", "bf16", "-o", "out")
    done = subprocess.run(command, cwd=tmp_path, env=unmeasured(), capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "converter.tensors.kernels" in imported
    assert not imported & {"multiprocessing.process", "concurrent.futures.process", "psutil"}


def test_cores_are_those_that_this_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "cpu.max"
    monkeypatch.setattr(converter.run.workers.cores, "Path", lambda _: limit)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(40)), raising=False)
    counts = []
    for text in ("max 100000\n", "250000 100000\n", "5000 100000\n", "?"):
        limit.write_text(text)
        counts.append((count_cores(), default_workers()))
    assert counts == [(40, 16), (3, 3), (1, 1), (40, 16)]


# How many work at once, and in how much memory.


class Counting(Workers):
    """Threads that say how many of them wrote at once, at most, and how many tasks waited with those."""

    def __init__(self, pool: Executor, count: int) -> None:
        super().__init__(pool, count)
        self._lock = Lock()
        self._now = self._given = 0
        self.at_once: list[int] = []
        self.given: list[int] = []

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        if function is not write_piece:  # what only reads has small buffers, and nobody to wait for
            return super().submit(function, *args, **kwargs)
        self._given += 1
        self.given.append(self._given)
        future = super().submit(self._count_while, function, *args)
        future.add_done_callback(self._take_off)
        return future

    def _take_off(self, _: object) -> None:
        self._given -= 1

    def _count_while(self, function: Any, *args: Any) -> Any:
        with self._lock:
            self._now += 1
            self.at_once.append(self._now)
        try:
            return function(*args)
        finally:
            with self._lock:
                self._now -= 1


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    monkeypatch.setattr(cut_pieces, "__defaults__", (1 << 12,))
    with ThreadPoolExecutor(8) as pool:
        yield Counting(pool, 8)


def test_as_many_work_at_once_as_memory_is_there_for(counting: Counting, tmp_path: Path) -> None:
    wide = torch.randn(4, 3000).T
    save({f"t.{number}": wide.clone(memory_format=torch.preserve_format) for number in range(40)}, tmp_path / "m.bin")
    plan = plan_conversion(Request.of(tmp_path / "m.bin", tmp_path / "out", dtype="bf16"))
    assert plan.window == 4 << 20  # in bf16; as much again, and twice, for what it is gathered from
    converter.run_plan(plan, counting, memory_nbytes=32 << 20)
    assert most_at_once(32 << 20, 8, plan.window) == 4
    assert 1 < max(counting.at_once) <= 4
    assert buffers_nbytes(32 << 20, 8, plan.window) <= 32 << 20


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [("model.safetensors", {}, 2), ("model.bin", {}, 2), ("model.safetensors", {"dtype": "bf16"}, 6)],
)
def test_few_write_into_one_file_at_once(
    name: str, options: Any, expected: int, counting: Counting, tmp_path: Path
) -> None:
    save({f"t.{number}": torch.randn(64, 64) for number in range(40)}, tmp_path / "m" / name)
    plan = plan_conversion(Request.of(tmp_path / "m", tmp_path / "out", **options))
    converter.run_plan(plan, counting)
    assert max(counting.given) == expected


def test_each_of_many_files_has_one_that_copies(counting: Counting, tmp_path: Path) -> None:
    save({f"t.{number}": torch.randn(64, 64) for number in range(40)}, tmp_path / "m" / "model.safetensors")
    plan = plan_conversion(Request.of(tmp_path / "m", tmp_path / "out", max_shard_size="70kB"))
    assert len(plan.files) == 10
    converter.run_plan(plan, counting)
    assert max(counting.given) == 10


@linux
@pytest.mark.parametrize(("workers", "ceiling_nbytes"), [(2, 100_000_000), (4, 200_000_000)])
def test_all_of_them_together_take_what_the_dry_run_says(workers: int, ceiling_nbytes: int, tmp_path: Path) -> None:
    make_hollow(tmp_path / "m", HOLLOW_NBYTES // 2)
    command = (*WCONV, "recast", "m", "--dtype", "bf16", "-o", "out", "--json", "--executor", f"processes={workers}")

    def peak_of(*more: str) -> int:
        how: dict[str, Any] = {"cwd": tmp_path, "env": unmeasured(), "capture_output": True, "text": True}
        done = subprocess.run([*command, *more], **how, check=True)
        return int(json.loads(done.stdout)["peak_memory_nbytes"])

    expected, peak = peak_of("--dry-run"), peak_of()
    assert WORKER_NBYTES < peak <= expected <= ceiling_nbytes

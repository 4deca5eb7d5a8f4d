"""Who runs tasks: how ``--executor`` names it, and what is asked of workers that may be on other machines.

Threads of this process play them: an executor that is none of the standard library's may be anywhere.
"""

from __future__ import annotations

import platform
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.tiny import left_behind, make_state, save_bin_shards, snapshot

import converter.run.parts
import converter.run.tasks
import converter.run.workers.sight
from converter import __version__, convert
from converter.errors import BadFile, BadRequest, SystemRefused, Unsupported, WconvError
from converter.run.tasks import Call, run_tasks
from converter.run.workers import open_workers, parse
from converter.storage.root import Root

STATE = make_state()


class Far(Executor):
    """Threads that nobody knows to be some; ``around`` is called with the function of each task, on its thread."""

    def __init__(self, count: int = 2, around: Callable[[Any], None] = lambda function: None) -> None:
        self._max_workers = count
        self.pool = ThreadPoolExecutor(count)
        self.around = around
        self.submitted: list[str] = []

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.submitted.append(function.__name__)

        def task() -> Any:
            self.around(function)
            return function(*args, **kwargs)

        return self.pool.submit(task)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.pool.shutdown(wait, cancel_futures=cancel_futures)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_bin_shards(STATE, tmp_path / "m").parent


def refused(tmp_path: Path, executor: Executor) -> WconvError:
    """Give what a conversion on an executor raises, which leaves nothing."""
    before = snapshot(tmp_path)
    with executor, pytest.raises(WconvError) as caught:
        convert(tmp_path / "m", tmp_path / "out", executor=executor)
    assert snapshot(tmp_path) == before
    return caught.value


# How they are named.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("threads", ("threads", "")),
        ("processes", ("processes", "")),
        ("processes=3", ("processes", "3")),
        ("dask=tcp://host:8786", ("dask", "tcp://host:8786")),
        ("dask=a=b.json", ("dask", "a=b.json")),
        ("ray", ("ray", "")),
        ("ray=host:6379", ("ray", "host:6379")),
        ("mpi", ("mpi", "")),
    ],
)
def test_names(text: str, expected: tuple[str, str]) -> None:
    assert parse(text) == expected


LIST = "is none of threads, processes[=N], dask=ADDRESS|FILE, ray[=ADDRESS], mpi"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", LIST),
        ("spark", LIST),
        ("Threads", LIST),
        ("=3", LIST),
        ("threads=3", "is not spelled threads"),
        ("threads=", "is not spelled threads"),
        ("processes=", "is not spelled processes[=N]"),
        ("processes=0", "is not spelled processes[=N]"),
        ("processes=-1", "is not spelled processes[=N]"),
        ("processes=many", "is not spelled processes[=N]"),
        ("dask", "is not spelled dask=ADDRESS|FILE"),
        ("dask=", "is not spelled dask=ADDRESS|FILE"),
        ("ray=", "is not spelled ray[=ADDRESS]"),
        ("mpi=4", "is not spelled mpi"),
    ],
)
def test_wrong_names(text: str, problem: str, source: Path, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    with pytest.raises(BadRequest) as caught:
        parse(text)
    assert str(caught.value) == f"{text!r}: {problem}."
    said = wconv("recast", source, "--dtype", "bf16", "-o", tmp_path / "out", "--executor", text, exit_code=2).stderr
    assert problem in " ".join(said.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("engine", "library"), [("dask=x:1", "distributed"), ("ray", "ray"), ("mpi", "mpi4py")])
def test_what_is_not_installed(
    engine: str,
    library: str,
    source: Path,
    tmp_path: Path,
    wconv: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = engine.partition("=")[0]
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"converter.run.workers.{name}", raising=False)
    command = ("recast", source, "--dtype", "bf16", "-o", tmp_path / "out", "--executor", engine)
    said = wconv(*command, exit_code=Unsupported.exit_code).stderr
    problem = rf"needs what is not installed here \(.*{library}.*\)"
    assert re.fullmatch(rf"--executor {name}: {problem}\. Install it: pip install 'wconv\[{name}\]'\.\n", said)
    assert not left_behind(tmp_path)


# What is asked of those that are far.


def test_a_task_is_a_file(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A file would be three pieces otherwise.
    monkeypatch.setattr(converter.run.parts.cut_pieces, "__defaults__", (32,))
    convert(source, tmp_path / "expected")
    with Far() as far:
        convert(source, tmp_path / "out", executor=far)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "expected")
    assert far.submitted.count("_attempt") == 3
    assert far.submitted.count("_linger") == 2


def test_how_many_they_are_must_be_known(source: Path, tmp_path: Path) -> None:
    far = Far()
    del far._max_workers
    error = refused(tmp_path, far)
    assert isinstance(error, BadRequest)
    assert str(error) == "Far: does not tell how many tasks it does at once. Say so with workers=."
    with Far() as far:
        del far._max_workers
        convert(source, tmp_path / "out", executor=far, workers=3)
    assert far.submitted.count("_linger") == 3


NAME = rf"process \d+ on {re.escape(platform.node())}"
ADVICE = "All workers must see the same disk, under the same path, as the same user."


def on_look(monkeypatch: pytest.MonkeyPatch, **there: Any) -> Callable[[Any], None]:
    """Let things be otherwise where workers are looked at."""

    def around(function: Any) -> None:
        if function.__name__ == "_linger":
            for name, value in there.items():
                monkeypatch.setattr(converter.run.workers.sight, name, value)

    return around


def test_another_version(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused(tmp_path, Far(1, on_look(monkeypatch, __version__="9.9")))
    asks = f"has wconv 9.9, and {__version__} asks. Install wconv {__version__} there."
    assert isinstance(error, SystemRefused)
    assert re.fullmatch(f"worker {NAME}: {re.escape(asks)}", str(error))


def test_another_version_that_comes_later(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def around(function: Any) -> None:
        if function.__name__ == "_attempt":
            monkeypatch.setattr(converter.run.tasks, "__version__", "9.9")

    error = refused(tmp_path, Far(1, around))
    given = f"was given to a worker with wconv 9.9, and {__version__} runs here. Install wconv {__version__} on all."
    assert isinstance(error, SystemRefused)
    assert re.fullmatch(rf"model-0000\d-of-00003\.safetensors: {re.escape(given)}", str(error))


def test_another_file(source: Path, tmp_path: Path) -> None:
    """A worker that sees a file of the same name, but not the same file."""
    shard = source / "pytorch_model-00002-of-00003.bin"
    raw = shard.read_bytes()

    def around(function: Any) -> None:
        if function.__name__ == "_linger":
            shard.unlink()
            shard.write_bytes(raw)

    error = refused(tmp_path, Far(1, around))
    seen = f"does not see what is to be read: {shard} was changed while it was read"
    assert isinstance(error, SystemRefused)
    assert re.fullmatch(f"worker {NAME}: {re.escape(f'{seen}. {ADVICE}')}", str(error))


def test_a_folder_that_cannot_be_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", "out")

    monkeypatch.setattr(Root, "fill", refuse)
    error = refused(tmp_path, Far(1))
    assert isinstance(error, SystemRefused)
    assert re.fullmatch(
        f"worker {NAME}: {re.escape(f'cannot write where the output goes: permission denied. {ADVICE}')}", str(error)
    )


def test_workers_that_fail_in_several_ways(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turn = threading.Lock()
    count = 0

    def look(_: Any) -> Any:
        nonlocal count
        with turn:
            count += 1
            problem = "is too small" if count == 1 else "is too slow"
            return converter.run.workers.sight.Answer(f"w{count}", problem, "Take another.")

    monkeypatch.setattr(converter.run.workers.sight, "look", look)
    error = refused(tmp_path, Far(3))
    assert re.fullmatch(r"worker w[23], w[23]: is too slow; 1 more fail otherwise\. Take another\.", str(error))


def test_workers_that_cannot_load_what_they_are_asked(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(_: Any) -> None:
        raise ModuleNotFoundError("No module named 'converter'")

    monkeypatch.setattr(converter.run.workers.sight, "look", look)
    error = refused(tmp_path, Far(2))
    problem = f"cannot run what this wconv ({__version__}) asks of it (No module named 'converter')"
    advice = f"Install wconv {__version__} there, in the environment that it runs in."
    assert str(error) == f"the executor: {problem}. {advice}"


# What becomes of their errors.


def fail(error: BaseException, _: int) -> None:
    raise error


def test_an_error_of_ours_comes_back_as_a_value() -> None:
    """An engine that is told of it would do the task again, and write a traceback into its log."""
    seen: list[BaseException | None] = []

    class Watched(Far):
        def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            future = super().submit(function, *args, **kwargs)
            future.add_done_callback(lambda done: seen.append(done.exception()))
            return future

    error = BadFile("x", "is damaged")
    with Watched() as far, pytest.raises(BadFile) as caught:
        list(run_tasks([Call(fail, error, 1, "x")], far))
    assert caught.value is error
    assert seen == [None]
    assert far.submitted == ["_attempt"]


def test_an_error_of_the_system_is_raised_there() -> None:
    """An engine may do the task again: a disk elsewhere may have been away for a moment."""
    error = SystemRefused("x", "is away")
    with Far() as far, pytest.raises(SystemRefused) as caught:
        list(run_tasks([Call(fail, error, 1, "x")], far))
    assert caught.value is error


def test_an_error_that_nobody_expected_stays_what_it_is() -> None:
    with Far() as far, pytest.raises(ZeroDivisionError):
        list(run_tasks([Call(fail, ZeroDivisionError(), 1, "x")], far))


KILLED = "was under way when a worker was killed. Perhaps memory ran out: try fewer --workers."


class Broken(Far):
    """Breaks while a file is written, as soon as it is given something or as it ends."""

    def __init__(self, when: str) -> None:
        super().__init__(1)
        self.when = when

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if function.__name__ != "_attempt":
            return super().submit(function, *args, **kwargs)
        if self.when == "submit":
            raise BrokenExecutor("A child process terminated abruptly")
        future: Future[Any] = Future()
        future.set_exception(BrokenExecutor("A child process terminated abruptly"))
        return future


@pytest.mark.parametrize("when", ["submit", "result"])
def test_a_broken_executor(when: str, source: Path, tmp_path: Path) -> None:
    error = refused(tmp_path, Broken(when))
    assert isinstance(error, SystemRefused)
    assert re.fullmatch(rf"model-0000\d-of-00003\.safetensors: {re.escape(KILLED)}", str(error))
    assert error.exit_code == 7


def test_an_executor_that_breaks_while_it_is_looked_at(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(_: Any) -> None:
        raise BrokenExecutor

    monkeypatch.setattr(converter.run.workers.sight, "look", look)
    assert str(refused(tmp_path, Far(1))) == f"the executor: {KILLED}"


def test_threads_of_ours_end_with_the_run() -> None:
    with open_workers("threads", 3) as workers:
        assert workers.count == workers.sharing == 3
        assert not workers.are_far
    with pytest.raises(RuntimeError):
        workers.submit(int)

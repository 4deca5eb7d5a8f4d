"""Clusters on this machine, in the environment of engines, and wconv with them; nothing of them is loaded here."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
BIN = ROOT / ".venv-engines" / "bin"
PYTHON = BIN / "python"
SUPPORT = Path(__file__).parent
HANGS = 300  # seconds after which what is waited for will not come any more
# Nobody's, and no cluster's: a test that forgets its address must not find one that runs here.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RAY_ADDRESS")}


def wait_until(is_so: Callable[[], object], what: str) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + HANGS
    while not is_so():
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(0.02)


def free_port() -> int:
    """Give a port that nobody listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def environment(**more: object) -> dict[str, str]:
    """Give the variables of a child."""
    return {**ENVIRONMENT, "WCONV_STATE": os.environ["WCONV_STATE"], **{key: str(one) for key, one in more.items()}}


@dataclass
class Gate:
    """What workers wait at that are started with ``environment``: see worker_site/sitecustomize.py."""

    folder: Path
    environment: dict[str, object] = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.environment = {"PYTHONPATH": SUPPORT / "worker_site", "WCONV_GATE": self.folder}

    def close(self, passing: int) -> None:
        """Let each worker do so many writes more than it may have done before, counted from its start."""
        (self.folder / "closed.new").write_text(str(passing))
        (self.folder / "closed.new").rename(self.folder / "closed")

    def waiting(self) -> list[int]:
        return [int(path.name) for path in self.folder.iterdir() if path.name.isdecimal()]

    def open(self) -> None:
        (self.folder / "closed").unlink()


@contextlib.contextmanager
def held(log: Path, *command: object, **more: object) -> Iterator[psutil.Process]:
    """Run a command in the background, and end all that comes of it with this."""
    with log.open("ab") as out:
        holder = subprocess.Popen(
            [sys.executable, SUPPORT / "held.py", *map(str, command)],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            env=environment(**more),
            start_new_session=True,
        )
    try:
        yield psutil.Process(holder.pid)
    finally:
        holder.communicate(timeout=HANGS)


def kill(*pids: int) -> None:
    """Kill processes, and wait until they are gone."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(map(_is_alive, pids)), "the end of what was killed")


def _is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def find(holder: psutil.Process, begin: str) -> list[int]:
    """Find what runs under a holder by how its command begins, without the folder of its program."""
    found = []
    for process in holder.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            words = process.cmdline()
            if words and Path(words[0]).name.startswith(begin):
                found.append(process.pid)
    return found


@dataclass(frozen=True)
class Ended:
    """What a run came to."""

    exit_code: int
    stdout: str
    stderr: str


class Driver:
    """A run of wconv that goes on beside us."""

    def __init__(self, arguments: Sequence[object], before: Sequence[object] = (PYTHON, "-m", "converter")) -> None:
        # Whoever starts the tests in the background makes them ignore SIGINT, and all that they start.
        hear = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
        self.process = subprocess.Popen(
            [str(one) for one in (*before, *arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            preexec_fn=hear,
        )

    def end(self) -> Ended:
        try:
            out, err = self.process.communicate(timeout=HANGS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
            raise AssertionError(f"never ended\n{out}{err}") from None
        return Ended(self.process.returncode, out, err)


def run(*arguments: object, before: Sequence[object] = (PYTHON, "-m", "converter")) -> Ended:
    """Run wconv to its end."""
    return Driver(arguments, before).end()


def run_script(text: str, *arguments: object) -> str:
    """Run a script in the environment of engines, and give what it prints."""
    ended = run(*arguments, before=(PYTHON, "-c", text))
    assert ended.exit_code == 0, ended.stderr
    return ended.stdout


@dataclass
class Dask:
    """A scheduler and its workers; ``address`` is what follows ``dask=``."""

    folder: Path
    scheduler: psutil.Process
    stack: contextlib.ExitStack
    more: Mapping[str, object]

    @property
    def file(self) -> Path:
        return self.folder / "scheduler.json"

    @property
    def address(self) -> str:
        address: str = json.loads(self.file.read_text())["address"]
        return address

    def add(self, count: int, *options: object, before: Sequence[object] = (), **more: object) -> psutil.Process:
        """Have so many workers come, each a process."""
        there = len(self.workers())
        command = [*before, BIN / "dask", "worker", self.address, "--nthreads", 1, "--no-dashboard"]
        command += ["--nworkers", count, "--local-directory", self.folder / "local", *options]
        worker = self.stack.enter_context(held(self.folder / "log", *command, **{**self.more, **more}))
        wait_until(lambda: len(self.workers()) == there + count, "workers")
        return worker

    def workers(self) -> dict[str, int]:
        """Give the processes of workers by their addresses."""
        script = "import json, os, sys; from distributed import Client; print(json.dumps(Client(sys.argv[1]).run(os.getpid)))"
        found: dict[str, int] = json.loads(run_script(script, self.address))
        return found


@contextlib.contextmanager
def dask(folder: Path, count: int = 3, *options: object, **more: object) -> Iterator[Dask]:
    """Give a Dask cluster of so many workers."""
    folder.mkdir()
    file = folder / "scheduler.json"
    command = [BIN / "dask", "scheduler", "--host", "127.0.0.1", "--port", 0, "--no-dashboard"]
    with contextlib.ExitStack() as stack:
        scheduler = stack.enter_context(held(folder / "log", *command, "--scheduler-file", file, **more))
        wait_until(file.exists, "a scheduler")
        cluster = Dask(folder, scheduler, stack, more)
        if count:
            cluster.add(count, *options)
        yield cluster

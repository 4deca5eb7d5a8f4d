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
WCONV = (PYTHON, "-m", "converter")
SUPPORT = Path(__file__).parent
HANGS = 300  # seconds after which what is waited for will not come any more
# Nobody's, and no cluster's: a test that forgets its address must not find one that runs here.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RAY_ADDRESS")}
# Waits until so many workers have come to a Dask scheduler.
COME = """
import sys
from distributed import Client
Client(sys.argv[1]).wait_for_workers(int(sys.argv[2]), 100)
"""


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
        """Let each worker do so many writes, counted from its start, and no more."""
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

    def __init__(
        self, arguments: Sequence[object], before: Sequence[object] = WCONV, folder: Path | None = None, **more: object
    ) -> None:
        # Whoever starts the tests in the background makes them ignore SIGINT, and all that they start.
        hear = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
        self.process = subprocess.Popen(
            [str(one) for one in (*before, *arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=environment(**more),
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


def run(*arguments: object, before: Sequence[object] = WCONV, folder: Path | None = None) -> Ended:
    """Run wconv to its end, in a folder."""
    return Driver(arguments, before, folder).end()


@dataclass
class Dask:
    """A scheduler and its workers; ``address`` is what follows ``dask=``."""

    folder: Path
    scheduler: psutil.Process
    stack: contextlib.ExitStack
    more: Mapping[str, object]
    count: int = 0

    @property
    def file(self) -> Path:
        return self.folder / "scheduler.json"

    @property
    def address(self) -> str:
        address: str = json.loads(self.file.read_text())["address"]
        return address

    def add(self, count: int, *options: object, before: Sequence[object] = (), **more: object) -> None:
        """Have so many workers come, each a process of its own."""
        command = [*before, BIN / "dask", "worker", self.address, "--nthreads", 1, "--no-dashboard"]
        command += ["--local-directory", self.folder / "local", *options]
        for _ in range(count):
            self.stack.enter_context(held(self.folder / "log", *command, **{**self.more, **more}))
        self.count += count
        ended = run(self.address, self.count, before=(PYTHON, "-c", COME))
        assert ended.exit_code == 0, ended.stderr


@contextlib.contextmanager
def dask(folder: Path, count: int = 3, *options: object, **more: object) -> Iterator[Dask]:
    """Give a Dask cluster of so many workers; ``options`` are theirs."""
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


@dataclass
class Ray:
    """A head of Ray, which is a node with workers too; ``address`` is what follows ``ray=``."""

    folder: Path
    address: str
    head: psutil.Process
    stack: contextlib.ExitStack

    def add(self, **more: object) -> None:
        """Have another node come, with one worker."""
        log = self.folder / "log-of-other"
        command = [BIN / "ray", "start", "--address", self.address, "--num-cpus", 1, "--disable-usage-stats"]
        self.stack.enter_context(held(log, *command, **more))
        wait_until(lambda: "Ray runtime started" in log.read_text(), "a node")


@contextlib.contextmanager
def ray(folder: Path, count: int = 3, **more: object) -> Iterator[Ray]:
    """Give a Ray cluster of a node with so many workers; ``folder`` must have a short name, for it holds sockets."""
    port = free_port()
    command = [BIN / "ray", "start", "--head", "--node-ip-address", "127.0.0.1", "--port", port, "--num-cpus", count]
    command += ["--include-dashboard", "false", "--disable-usage-stats", "--object-store-memory", 100_000_000]
    with contextlib.ExitStack() as stack:
        head = stack.enter_context(held(folder / "log", *command, "--temp-dir", folder, **more))
        wait_until(lambda: "Ray runtime started" in (folder / "log").read_text(), "a head")
        yield Ray(folder, f"127.0.0.1:{port}", head, stack)

"""Something happens at the k-th step of a run on the file system: the process dies, or the step fails.

A step is what changes a disk: a rename, a removal, a new folder, a file opened to be written. CPython announces each to
audit hooks (``sys.addaudithook``) just before it happens, and what a hook raises, the step raises.

As a script, ``python steps.py TEMPLATE WORK ARGS...``, this kills ``wconv ARGS`` at its first step in a copy of the
folder TEMPLATE, at its second step in another copy, and so on until a run ends by itself; the copies are WORK/001,
WORK/002, ... and the command runs inside of them. Before a ``--`` in ARGS may stand a command that is run
in peace first.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.storage.local import StagedFile

if TYPE_CHECKING:
    import pytest

_EVENTS = frozenset({"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink"})
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
MAX_STEPS = 300


def is_step(event: str, arguments: tuple[Any, ...]) -> bool:
    """Say whether an audit event changes the disk."""
    return event in _EVENTS or (event == "open" and bool(arguments[2] & _WRITING) and arguments[0] != os.devnull)


class _Hook:
    """The one hook of this process: hooks cannot be taken away, so this one can be switched off."""

    def __init__(self) -> None:
        self.action: Callable[[int], None] | None = None
        self.counter = itertools.count(1)
        self.is_added = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.action is not None and is_step(event, arguments):
            self.action(next(self.counter))


_HOOK = _Hook()


@contextmanager
def at_each_step(action: Callable[[int], None]) -> Iterator[None]:
    """Call ``action`` with the number of each step, from 1, before that step happens."""
    if not _HOOK.is_added:
        sys.addaudithook(_HOOK)
        _HOOK.is_added = True
    _HOOK.counter = itertools.count(1)
    _HOOK.action = action
    try:
        yield
    finally:
        _HOOK.action = None


def raise_at(number: int, error: BaseException) -> tuple[Callable[[int], None], list[int]]:
    """Give an action that raises at one step only, and the list that tells whether it came to that."""
    reached: list[int] = []

    def action(step: int) -> None:
        if step == number:
            reached.append(step)
            raise error

    return action, reached


def kill_at(number: int) -> Callable[[int], None]:
    """Give an action that ends this process at a step as ``kill -9`` does."""

    def action(step: int) -> None:
        if step == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return action


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the disk be full after the first bytes that are written into a staged file."""
    write = StagedFile.write

    def refuse(file: StagedFile, offset: int, data: memoryview) -> None:
        write(file, offset, data[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(StagedFile, "write", refuse)


def refuse_to_list(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let nobody list a folder."""
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if os.fspath(path) == str(folder):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)


def load_what_it_loads(template: Path, folder: Path, args: list[str]) -> None:
    """Load the modules that the command does where it runs in peace, so that no child has to."""
    shutil.copytree(template, folder, symlinks=True)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.chdir(folder)
        _run(args)
        with os.fdopen(writing, "w") as names:
            names.write(" ".join(sys.modules))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as names:
        for name in names.read().split():
            if name not in sys.modules:
                import_module(name)
    os.waitpid(child, 0)
    shutil.rmtree(folder)


def _run(args: list[str], action: Callable[[int], None] | None = None) -> int:
    """Run a command, and before it, in peace, what stands before a ``--``."""
    from converter.cli import main

    place = args.index("--") if "--" in args else -1
    if place > 0:
        main(args[:place])
    with at_each_step(action) if action else nullcontext():
        return main(args[place + 1 :])


def run_until_it_ends(template: Path, work: Path, args: list[str]) -> None:
    """Kill the command at every step, each time in a new copy; raise if it does not end, or ends badly."""
    load_what_it_loads(template, work / "000", args)
    for number in range(1, MAX_STEPS):
        folder = work / f"{number:03d}"
        shutil.copytree(template, folder, symlinks=True)
        child = os.fork()
        if not child:
            os.chdir(folder)
            os._exit(_run(args, kill_at(number)))
        status = os.waitpid(child, 0)[1]
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status):
                raise SystemExit(f"step {number}: the command ended with {os.WEXITSTATUS(status)}")
            return
    raise SystemExit(f"the command took more than {MAX_STEPS} steps")


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    os.fsync = lambda fd: None  # a killed process takes nothing with it that was written; a killed system would
    run_until_it_ends(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])

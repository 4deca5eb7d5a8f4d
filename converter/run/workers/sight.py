"""What workers elsewhere are asked before they are given anything: who they are, and whether they see the same disk."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from typing import NamedTuple

from converter import __version__
from converter.errors import SystemRefused, Unreachable, WconvError, name_some
from converter.run.workers.base import Workers
from converter.storage import FileRef, Place
from converter.storage.far import WritableStore
from converter.storage.root import Root
from converter.tensors.base import Storage

_NAMED = 5  # workers, in a message
_INSTALL = f"Install wconv {__version__} there, in the environment that it runs in."


class Sight(NamedTuple):
    """What a worker must see: files as they were when their headers were read, and a folder that it can write."""

    version: str
    files: tuple[FileRef, ...]
    folder: Place | None


class Answer(NamedTuple):
    """What a worker says: its name, and what it cannot do, with advice; or nothing."""

    name: str
    problem: str = ""
    advice: str = ""


def check_workers(workers: Workers, inputs: Iterable[Storage], folder: Place | None) -> None:
    """Raise SystemRefused where a worker that is far has another wconv, or does not see what it will read and write."""
    if not workers.are_far:
        return
    sight = Sight(__version__, tuple({storage.file for storage in inputs}), folder)
    refused: dict[tuple[str, str], list[str]] = {}
    for name, outcome in workers.visit(look, sight):
        if isinstance(outcome, ImportError | AttributeError | TypeError):
            outcome = Answer("", f"cannot run what this wconv ({__version__}) asks of it ({outcome})", _INSTALL)
        if isinstance(outcome, BaseException):
            trouble = workers.explain(outcome)
            if trouble is None:
                raise outcome
            outcome = Answer("", *trouble)
        if outcome.problem:
            who = ", ".join(filter(None, (name, outcome.name)))
            refused.setdefault((outcome.problem, outcome.advice), []).append(who)
    if refused:
        (problem, advice), names = max(refused.items(), key=lambda item: len(item[1]))
        rest = sum(map(len, refused.values())) - len(names)
        more = f"; {rest} more fail otherwise" if rest else ""
        known = list(filter(None, names))
        raise SystemRefused(f"worker {name_some(known, _NAMED)}" if known else workers.engine, problem + more, advice)


def look(sight: Sight) -> Answer:
    """Look, on a worker, whether all is as it must be."""
    name = f"process {os.getpid()} on {platform.node()}"
    if sight.version != __version__:
        return Answer(
            name, f"has wconv {__version__}, and {sight.version} asks", f"Install wconv {sight.version} there."
        )
    advice = "All workers must see the same disk, under the same path, as the same user."
    try:
        for file in sight.files:
            opened = file.open()
            try:
                if opened.is_far:
                    opened.read(0, 1)
                    break  # who may read one may read all
            finally:
                opened.close()
        if sight.folder is not None:
            _try_to_write(sight.folder)
    except Unreachable as error:
        return Answer(name, f"has no way to {error.where}, which {error.problem}", error.advice)
    except WconvError as error:
        return Answer(name, f"does not see what is to be read: {error.where} {error.problem}", advice)
    except OSError as error:
        return Answer(name, f"cannot write where the output goes: {SystemRefused.from_os_error(error).problem}", advice)
    return Answer(name)


def _try_to_write(folder: Place) -> None:
    if isinstance(folder.store, WritableStore):
        folder.store.try_to_write(folder.key)
        return
    name = f"seen-{platform.node()}-{os.getpid()}"
    with Root(folder.path) as root:
        root.fill(name, (b"",))
        root.remove(name)

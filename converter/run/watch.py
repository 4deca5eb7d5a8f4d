"""What a long task is told while it is under way, that it is to stop, and what it tells, how far it is.

Threads of this process hear and tell both, its worker processes hear; on a cluster a task goes on to its end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from converter.storage.far import heeded

_T = TypeVar("_T")
_A = TypeVar("_A")


class StoppedError(Exception):
    """A task was told to stop; nobody waits for what it would have given."""


class Watch:
    """The tasks of one run on threads."""

    def __init__(self) -> None:
        self.is_over = False
        self._lock = threading.Lock()
        self._nbytes = 0

    def advance(self, nbytes: int) -> None:
        """Count bytes that a task is through with."""
        with self._lock:
            self._nbytes += nbytes

    def take(self) -> int:
        """Give the bytes that were counted since the last time."""
        with self._lock:
            nbytes, self._nbytes = self._nbytes, 0
        return nbytes

    def call(self, function: Callable[[_A, int], _T], argument: _A, chunk_nbytes: int) -> _T:
        """Do a task on this thread, under this watch."""
        _current.watch = self
        try:
            return function(argument, chunk_nbytes)
        finally:
            _current.watch = None


class _Current(threading.local):
    watch: Watch | None = None


_current = _Current()
_told: list[Callable[[], bool]] = []


def listen(is_over: Callable[[], bool]) -> None:
    """Have all tasks of this process stop once something is so."""
    _told[:] = [is_over]


def advance(nbytes: int) -> None:
    """Tell that a task is so much further. Raises StoppedError where it is to stop."""
    watch = _current.watch
    if watch is not None:
        watch.advance(nbytes)
    if (watch is not None and watch.is_over) or any(is_over() for is_over in _told):
        raise StoppedError


# Who waits for a network hears it too.
heeded[:] = [lambda: advance(0)]

"""Holding Ctrl-C and SIGTERM back where what a handler raises would do harm.

While futures are waited for it can leave the lock of one taken for ever (within ``Condition.__enter__``), and then
neither its thread nor this one ends; and a commit that has begun is soon through, and half of one is nothing to leave.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


@contextmanager
def signals_held() -> Iterator[Callable[[], None]]:
    """Hold back signals that raise; give what lets those through that have come. They are let through at the end."""
    came: list[int] = []
    before = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    before = {which: handler for which, handler in before.items() if callable(handler)}
    with suppress(ValueError):  # not in the main thread: none is raised here
        for which in before:
            signal.signal(which, lambda number, _: came.append(number))

    def let_through() -> None:
        while came:
            number = came.pop()
            handler = before[signal.Signals(number)]
            if callable(handler):
                handler(number, None)

    try:
        yield let_through
    finally:
        with suppress(ValueError):
            for which, handler in before.items():
                signal.signal(which, handler)
        let_through()

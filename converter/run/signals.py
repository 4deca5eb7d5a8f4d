"""Holding Ctrl-C and SIGTERM back where what a handler raises would do harm.

While futures are waited for it can leave the lock of one taken for ever (within ``Condition.__enter__``), and then
neither its thread nor this one ends; and a commit that has begun is soon through, and half of one is nothing to leave.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress


@contextmanager
def signals_held() -> Iterator[Callable[[], None]]:
    """Hold back signals that raise; give what lets those through that have come. They are let through at the end."""
    came: list[int] = []
    before: dict[int, Callable[..., object]] = {}

    def let_through() -> None:
        while came:
            number = came.pop()
            before[number](number, None)

    try:
        with ExitStack() as restoring:  # each handler, though another raises as soon as it is back
            with suppress(ValueError):  # not in the main thread: none is raised here
                for which in (signal.SIGINT, signal.SIGTERM):
                    handler = signal.getsignal(which)
                    if callable(handler):
                        before[which] = handler
                        signal.signal(which, lambda number, _: came.append(number))
                        restoring.callback(signal.signal, which, handler)
            yield let_through
    finally:
        let_through()

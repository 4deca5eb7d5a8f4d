"""Threads of this process: enough for what is only moved, as the system does that without the interpreter's lock."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from converter.run.workers.base import Workers
from converter.run.workers.cores import default_workers


@contextmanager
def open_engine(_: str, workers: int | None) -> Iterator[Workers]:
    """Give threads that end with this, as many as there are cores where nobody says."""
    count = workers or default_workers()
    pool = ThreadPoolExecutor(count, "wconv")
    try:
        yield Workers(pool, count)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

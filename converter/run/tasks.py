"""How tasks are run, whatever they do: a few under way at once, on any executor, with signals in good hands.

Only a few tasks are under way at once, so memory stays at their buffers and Ctrl-C is heard within a task.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from converter.run.parts import CHUNK_NBYTES
from converter.run.signals import signals_held

DEFAULT_MEMORY_NBYTES = 1 << 26
DEFAULT_WORKERS = 4
_MIN_CHUNK_NBYTES = 1 << 16
_LISTEN_SECONDS = 0.2  # a signal is heard so soon, however long a task takes

Progress = Callable[[int], None]
"""Called with the number of bytes that were dealt with since the last call."""

_T = TypeVar("_T")
_A = TypeVar("_A")


def chunk_nbytes_for(memory_nbytes: int, workers: int) -> int:
    """Share a memory budget among workers as buffers, each of two at most, up to the size that is fastest."""
    share = memory_nbytes // (2 * workers)
    return max(_MIN_CHUNK_NBYTES, min(CHUNK_NBYTES, share // _MIN_CHUNK_NBYTES * _MIN_CHUNK_NBYTES))


@dataclass(frozen=True, slots=True)
class Tasks:
    """How tasks are run: where, how many at once, with what buffers, and who is told."""

    pool: Executor
    limit: int
    chunk_nbytes: int
    progress: Progress

    def run(self, calls: Iterable[tuple[Callable[[_A, int], _T], _A, int]]) -> Generator[_T, None, None]:
        """Run calls of (function, argument, bytes it deals with), a few at once; yield results as they come."""
        queue = iter(calls)
        waiting: dict[Future[_T], int] = {}
        with signals_held() as let_through:
            try:
                while True:
                    for function, argument, nbytes in itertools.islice(queue, self.limit - len(waiting)):
                        waiting[self.pool.submit(function, argument, self.chunk_nbytes)] = nbytes
                    if not waiting:
                        return
                    for future in wait(waiting, _LISTEN_SECONDS, FIRST_COMPLETED).done:
                        nbytes = waiting.pop(future)
                        yield future.result()
                        self.progress(nbytes)
                    let_through()
            finally:
                # What is cancelled is not waited for: some executors never say that they know.
                wait([future for future in waiting if not future.cancel()])

    def finish(self, calls: Iterable[tuple[Callable[[_A, int], object], _A, int]]) -> None:
        """Run calls of which nothing is wanted but an error."""
        for _ in self.run(calls):
            pass


@contextmanager
def open_tasks(
    executor: Executor | None, workers: int | None, memory_nbytes: int, progress: Progress | None
) -> Iterator[Tasks]:
    """Give what runs tasks: on an executor of the caller's, or on threads that end with this."""
    count = workers or DEFAULT_WORKERS
    pool = executor or ThreadPoolExecutor(count, "wconv")
    try:
        yield Tasks(pool, 2 * count, chunk_nbytes_for(memory_nbytes, count), progress or (lambda _: None))
    finally:
        if executor is None:
            pool.shutdown(wait=True, cancel_futures=True)


def run_tasks(
    calls: Iterable[tuple[Callable[[_A, int], _T], _A, int]],
    executor: Executor | None = None,
    workers: int | None = None,
    memory_nbytes: int = DEFAULT_MEMORY_NBYTES,
    progress: Progress | None = None,
) -> Generator[_T, None, None]:
    """Run calls of (function, argument, bytes it deals with) on an executor; each is given a chunk size as well.

    Who may leave before the last result closes this: what a signal raises while an object goes is lost.
    """
    with open_tasks(executor, workers, memory_nbytes, progress) as tasks:
        yield from tasks.run(calls)

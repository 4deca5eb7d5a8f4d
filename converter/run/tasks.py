"""Tasks of a run, whatever they do: a few under way at once, on any executor, with signals in good hands.

Only a few tasks are under way at once, so memory stays at their buffers and Ctrl-C is heard within a task.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from converter import __version__
from converter.errors import SystemRefused, WconvError
from converter.run.parts import CHUNK_NBYTES
from converter.run.signals import signals_held
from converter.run.watch import Watch
from converter.run.workers import Workers, open_workers
from converter.storage.far import stop_waiting

DEFAULT_MEMORY_NBYTES = 1 << 26
_MIN_CHUNK_NBYTES = 1 << 16
_LISTEN_SECONDS = 0.2  # a signal is heard so soon, however long a task takes

Progress = Callable[[int], None]
"""Called with the number of bytes that were dealt with since the last call.

What has a method ``name_file`` is told of each file that is through, where files go as a whole.
"""

_T = TypeVar("_T")
_A = TypeVar("_A")


def chunk_nbytes_for(memory_nbytes: int, sharing: int) -> int:
    """Share a memory budget among tasks as buffers, each of two at most, up to the size that is fastest."""
    share = memory_nbytes // (2 * sharing)
    return max(_MIN_CHUNK_NBYTES, min(CHUNK_NBYTES, share // _MIN_CHUNK_NBYTES * _MIN_CHUNK_NBYTES))


def most_at_once(memory_nbytes: int, sharing: int, window: int) -> int | None:
    """Say how many of the tasks that share a budget of memory it is enough for; None for all of them."""
    most = max(1, memory_nbytes // (2 * window))
    return most if most < sharing else None


def buffers_nbytes(memory_nbytes: int, sharing: int, window: int) -> int:
    """Say how much the buffers of tasks that share a budget take at most."""
    count = most_at_once(memory_nbytes, sharing, window) or sharing
    return count * 2 * max(window, chunk_nbytes_for(memory_nbytes, sharing))


@dataclass(frozen=True, slots=True)
class Call(Generic[_A, _T]):
    """A task: what is called with an argument and a chunk size, the bytes it deals with, and what it is about."""

    function: Callable[[_A, int], _T]
    argument: _A
    nbytes: int
    about: str
    advances: bool = False
    """Whether the task itself tells how far it is, where it can (``watch.advance``)."""


class Failed(NamedTuple):
    """What a task came to that raised an error of ours: no engine tries it again, or writes it into its log."""

    error: WconvError


@dataclass(frozen=True, slots=True)
class Tasks:
    """How tasks are run: by whom, with what budget of memory, and who is told."""

    workers: Workers
    memory_nbytes: int
    progress: Progress

    def name_file(self, text: str) -> None:
        """Tell who wants to know that a file is through, as ``3 of 10: unet/model.safetensors``."""
        tell = getattr(self.progress, "name_file", None)
        if tell:
            tell(text)

    @property
    def chunk_nbytes(self) -> int:
        """How much a task reads at a time."""
        return chunk_nbytes_for(self.memory_nbytes, self.workers.sharing)

    def run(self, calls: Iterable[Call[_A, _T]], window: int = 1, most: int | None = None) -> Generator[_T, None, None]:
        """Run calls, a few at once and no more than ``most``; yield results as they come.

        Each takes twice the ``window``, in bytes, at least: so many run at once as there is memory for.

        Raises what they raise, and SystemRefused for what happens to a worker.
        """
        queue = iter(calls)
        waiting: dict[Future[_T | Failed], Call[_A, _T]] = {}
        watch = Watch() if self.workers.are_threads else None
        self.workers.tell(is_over=False)
        limits = [limit for limit in (most, most_at_once(self.memory_nbytes, self.workers.sharing, window)) if limit]
        with signals_held() as let_through:
            try:
                while True:
                    room = min([2 * self.workers.count, *limits]) - len(waiting)
                    for call in itertools.islice(queue, max(0, room)):
                        waiting[self._submit(call, watch)] = call
                    if not waiting:
                        return
                    done = wait(waiting, _LISTEN_SECONDS, FIRST_COMPLETED).done
                    for future in done:
                        call = waiting.pop(future)
                        yield self._result(future, call)
                        self.progress(0 if watch and call.advances else call.nbytes)
                    if watch and (nbytes := watch.take()):
                        self.progress(nbytes)
                    if not done:
                        self.workers.check()
                    let_through()
            finally:
                if watch:
                    watch.is_over = True
                if waiting:
                    self.workers.tell(is_over=True)
                    stop_waiting()
                # What is cancelled is not waited for: some executors never say that they know.
                wait([future for future in waiting if not future.cancel()])

    def _submit(self, call: Call[_A, _T], watch: Watch | None) -> Future[_T | Failed]:
        with self._explained(call):
            if watch and call.advances:
                return self.workers.submit(watch.call, call.function, call.argument, self.chunk_nbytes)
            if self.workers.are_far:
                return self.workers.submit(_attempt, __version__, call, self.chunk_nbytes)
            return self.workers.submit(call.function, call.argument, self.chunk_nbytes)

    def _result(self, future: Future[_T | Failed], call: Call[_A, _T]) -> _T:
        with self._explained(call):
            result = future.result()
        if isinstance(result, Failed):
            raise result.error
        return result

    @contextmanager
    def _explained(self, call: Call[_A, _T]) -> Iterator[None]:
        """Say in words what has happened to a worker."""
        try:
            yield
        except Exception as error:
            trouble = None if isinstance(error, WconvError) else self.workers.explain(error)
            if trouble is None:
                raise
            raise SystemRefused(call.about, *trouble) from error

    def finish(self, calls: Iterable[Call[_A, object]], window: int = 1) -> None:
        """Run calls of which nothing is wanted but an error."""
        for _ in self.run(calls, window):
            pass


def _attempt(version: str, call: Call[_A, _T], chunk_nbytes: int) -> _T | Failed:
    """Run a task on a worker that may have come since the others were looked at."""
    if version != __version__:
        problem = f"was given to a worker with wconv {__version__}, and {version} runs here"
        return Failed(SystemRefused(call.about, problem, f"Install wconv {version} on all."))
    try:
        return call.function(call.argument, chunk_nbytes)
    except SystemRefused:
        raise  # a disk elsewhere may have been away for a moment
    except WconvError as error:
        return Failed(error)


@contextmanager
def open_tasks(
    executor: Executor | str | None, workers: int | None, memory_nbytes: int, progress: Progress | None
) -> Iterator[Tasks]:
    """Give what runs tasks: on an executor of the caller's, or on workers that end with this."""
    with open_workers(executor, workers) as opened:
        yield Tasks(opened, memory_nbytes, progress or (lambda _: None))


def run_tasks(
    calls: Iterable[Call[_A, _T]],
    executor: Executor | str | None = None,
    workers: int | None = None,
    memory_nbytes: int = DEFAULT_MEMORY_NBYTES,
    progress: Progress | None = None,
) -> Generator[_T, None, None]:
    """Run calls on an executor; yield results as they come.

    Who may leave before the last result closes this: what a signal raises while an object goes is lost.
    """
    with open_tasks(executor, workers, memory_nbytes, progress) as tasks:
        yield from tasks.run(calls)

"""Workers: an Executor, and what a run must know of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from converter.errors import BadRequest

_T = TypeVar("_T")
_A = TypeVar("_A")
_SPREAD_SECONDS = 0.2  # as long as a visit takes, so that each worker gets one


class Trouble(NamedTuple):
    """What is wrong with workers, and what one can do: in words, for an error."""

    problem: str
    advice: str


class Workers(Executor):
    """Runs tasks on an executor.

    ``sharing`` is how many tasks at once share one budget of memory. With ``are_far`` the workers may be on other
    machines: none of them may write a part of a file that another writes (``nfs_can_extend_write`` in Linux' ``fs/nfs``
    writes whole pages, and both have the page at the border), and how well they are is asked first.
    """

    engine = "the executor"

    def __init__(self, executor: Executor, count: int, are_far: bool = False) -> None:
        self._executor = executor
        self._count = count
        self.are_far = are_far

    @property
    def count(self) -> int:
        """How many tasks are done at once, now: a cluster may grow."""
        return self._count

    @property
    def are_threads(self) -> bool:
        """Whether tasks are done in this process."""
        return isinstance(self._executor, ThreadPoolExecutor)

    def tell(self, is_over: bool) -> None:
        """Tell tasks that are under way to stop, or that they need not, where they can hear it."""

    @property
    def sharing(self) -> int:
        return 1 if self.are_far else self._count

    def submit(self, function: Callable[..., _T], /, *args: Any, **kwargs: Any) -> Future[_T]:
        return self._executor.submit(function, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._executor.shutdown(wait, cancel_futures=cancel_futures)

    def visit(self, function: Callable[[_A], _T], argument: _A) -> Iterator[tuple[str, _T | BaseException]]:
        """Call a function on each worker; give the worker's name, if it is known, with the outcome.

        An executor may give two of the calls to one worker and none to another.
        """
        futures = [self.submit(_linger, function, argument) for _ in range(self.count)]
        for future in futures:
            error = future.exception()
            yield "", error or future.result()

    def explain(self, error: BaseException) -> Trouble | None:
        """Say in words what the error of an engine means; None for any other."""
        if isinstance(error, BrokenExecutor):
            return Trouble("was under way when a worker was killed", "Perhaps memory ran out: try fewer --workers.")
        if isinstance(error, CancelledError):
            return Trouble(f"was given up by {self.engine}", "Look into its log.")
        return None

    def check(self) -> None:
        """Raise SystemRefused where nobody is left to wait for."""


def _linger(function: Callable[[_A], _T], argument: _A) -> _T:
    time.sleep(_SPREAD_SECONDS)
    return function(argument)


def workers_of(executor: Executor, count: int | None) -> Workers:
    """Give an executor of the caller's as workers; ``count`` is how many tasks it does at once, if it does not tell.

    Raises BadRequest where nobody says.
    """
    if isinstance(executor, Workers):
        return executor
    if type(executor).__module__.startswith("distributed."):
        from converter.run.workers.dask import DaskWorkers

        return DaskWorkers.of(executor)
    from concurrent.futures import ProcessPoolExecutor  # takes long to load, and most runs have none

    is_near = isinstance(executor, ThreadPoolExecutor | ProcessPoolExecutor)
    # Threads and processes of the standard library and of loky, and mpi4py's.
    count = count or getattr(executor, "_max_workers", None) or getattr(executor, "num_workers", None)
    if not count:
        problem = "does not tell how many tasks it does at once"
        raise BadRequest(type(executor).__name__, problem, "Say so with workers=.")
    return Workers(executor, count, are_far=not is_near)

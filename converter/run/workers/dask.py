"""A Dask cluster: whatever ends in a ``distributed.Client``, which gives an executor of its own."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from distributed import Client
from distributed.comm.core import CommClosedError
from distributed.scheduler import KilledWorker

from converter.errors import SystemRefused
from converter.run.workers.base import Trouble, Workers
from converter.storage import Place
from converter.storage.local import place_at

_T = TypeVar("_T")
_A = TypeVar("_A")
_RETRIES = 3  # of a task whose machine said no: a network file system does for a moment
_CONNECT_SECONDS = 20
_COME_SECONDS = 60
_ASKED_SECONDS = 5.0
_WAIT_SECONDS = 0.1


@contextmanager
def open_engine(address: str, workers: int | None) -> Iterator[Workers]:
    """Give the workers of a scheduler, by its address or the file that it has written.

    Raises SystemRefused where it cannot be reached, or no worker comes.
    """
    for name in list(logging.root.manager.loggerDict):
        # What happens comes as an error, once. A result may come when its task was cancelled (``_cascade_future``).
        if name.partition(".")[0] in ("distributed", "tornado"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    is_file = "://" not in address and address.endswith(".json")
    where = {"scheduler_file" if is_file else "address": address}
    if is_file:
        _wait_for(place_at(Path(address)))
    try:
        client = Client(**where, timeout=_CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        advice = "Look whether it runs, and whether its address is right."
        raise SystemRefused(address, f"is no Dask scheduler that answers ({error})", advice) from None
    with client:
        try:
            client.wait_for_workers(1, timeout=_COME_SECONDS)
        except asyncio.TimeoutError:  # a class of its own until Python 3.11
            problem = f"is a Dask scheduler to which no worker has come in {_COME_SECONDS} s"
            raise SystemRefused(address, problem, "Start some: dask worker ADDRESS.") from None
        yield DaskWorkers(client.get_executor(pure=False, retries=_RETRIES), client)


def _wait_for(file: Place) -> None:
    """Wait for the file of a scheduler that starts meanwhile; the client itself would do so for ever."""
    begun = time.monotonic()
    while not file.is_file():
        if time.monotonic() - begun > _CONNECT_SECONDS:
            problem = f"is no file of a Dask scheduler, after {_CONNECT_SECONDS} s"
            raise SystemRefused(file, problem, "Start one: dask scheduler --scheduler-file FILE.")
        time.sleep(_WAIT_SECONDS)


class DaskWorkers(Workers):
    """The workers of a Dask cluster, which may grow and shrink."""

    engine = "Dask"

    def __init__(self, executor: Executor, client: Client) -> None:
        super().__init__(executor, 1, are_far=True)
        self._client = client
        self._address: str = client.scheduler.addr
        self._threads: dict[str, int] = {}
        self._asked = -_ASKED_SECONDS
        self._seen = time.monotonic()

    @classmethod
    def of(cls, executor: Executor) -> DaskWorkers:
        """Give the workers of what ``Client.get_executor`` gave."""
        return cls(executor, executor._client)  # type: ignore[attr-defined]

    def _ask(self) -> dict[str, int]:
        """Ask how many threads each worker has. A scheduler that says nothing is for ``check``, and for Ctrl-C."""
        if time.monotonic() - self._asked > _ASKED_SECONDS:
            with suppress(OSError, asyncio.TimeoutError):
                self._threads = dict(self._client.nthreads(callback_timeout=_ASKED_SECONDS))
            self._asked = time.monotonic()
            if self._threads:
                self._seen = self._asked
        return self._threads

    @property
    def count(self) -> int:
        return max(1, sum(self._ask().values()))

    @property
    def sharing(self) -> int:
        return max(self._ask().values(), default=1)

    def visit(self, function: Callable[[_A], _T], argument: _A) -> Iterator[tuple[str, _T | BaseException]]:
        for name, outcome in self._client.run(function, argument, on_error="return").items():
            # Where a worker cannot load what it is given, its error comes as a text.
            yield name, ImportError(str(outcome)) if type(outcome) is Exception else outcome

    def explain(self, error: BaseException) -> Trouble | None:
        if isinstance(error, KilledWorker):
            times = error.allowed_failures + 1
            problem = f"was under way when {times} workers were killed, {error.last_worker.address} the last of them"
            return Trouble(problem, "Perhaps memory ran out there: look into the log of that worker.")
        if isinstance(error, CommClosedError | CancelledError):
            return Trouble("was under way when the Dask scheduler went away", "Look into its log, and run this again.")
        return super().explain(error)

    def check(self) -> None:
        if self._client.status not in ("running", "connecting"):
            raise SystemRefused(self._address, "is a Dask scheduler that is gone", "Run this again.")
        if not self._ask() and time.monotonic() - self._seen > _COME_SECONDS:
            problem = f"is a Dask scheduler that has had no worker for {_COME_SECONDS} s"
            raise SystemRefused(self._address, problem, "Look into the logs of those that it had.")

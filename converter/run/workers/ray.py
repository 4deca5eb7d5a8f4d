"""A Ray cluster. Ray gives no executor of its own (its issue 29456, open since 2022), but futures of its tasks."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import (
    NodeDiedError,
    OutOfMemoryError,
    RayError,
    RaySystemError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from converter.errors import SystemRefused
from converter.run.workers.base import Trouble, Workers

_T = TypeVar("_T")
_A = TypeVar("_A")
_RETRIES = 3
_CONNECT_SECONDS = 20
_ASKED_SECONDS = 2.0
_SILENT_SECONDS = 30.0  # it may be started again


@contextmanager
def open_engine(address: str, workers: int | None) -> Iterator[Workers]:
    """Give the workers of a cluster by its address; else of RAY_ADDRESS, or of one that runs on this machine.

    Raises SystemRefused where it cannot be reached.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "auto"  # none: it would start a cluster of its own
    _knock(address)
    handlers = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    try:
        with _elsewhere():
            ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _no_cluster(address, error) from None
    finally:
        with suppress(ValueError):  # not in the main thread
            for which, handler in handlers.items():
                signal.signal(which, handler)
    try:
        yield RayWorkers()
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise SystemRefused where nobody listens: Ray itself would try again for minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
        except OSError as error:
            raise _no_cluster(address, error) from None


@contextmanager
def _elsewhere() -> Iterator[None]:
    """Be in the folder of this Python: workers load modules first from where ``ray.init`` is called (``connect``).

    The current folder may be the model's, which may come with a converter.py.
    """
    before = Path.cwd()
    os.chdir(sys.prefix)
    try:
        yield
    finally:
        os.chdir(before)


def _no_cluster(address: str, error: Exception) -> SystemRefused:
    problem = f"is no Ray cluster that answers ({str(error).splitlines()[0]})"
    return SystemRefused(address, problem, "Start one: ray start --head.")


def _outcome(ref: Any) -> Any:
    try:
        return ray.get(ref)
    except RayError as error:
        return _cause(error)


def _cause(error: BaseException) -> BaseException:
    """Give what a task has raised, of which Ray makes an error that reads as a traceback.

    It is an ImportError where the worker could not load the task: first what it is called with, then what is called.
    """
    if isinstance(error, RayTaskError):
        error = error.cause
    if isinstance(error, RaySystemError) and isinstance(error.client_exc, ImportError | AttributeError):
        return ImportError(str(error.client_exc))
    if isinstance(error, RuntimeError) and "failed to import on the worker" in str(error):
        return ImportError(str(error).splitlines()[-1])
    return error


class RayExecutor(Executor):
    """Tasks on a Ray cluster as futures of ``concurrent.futures``; a task is done again where its worker dies."""

    def __init__(self) -> None:
        # Once: each that is made is told to the head.
        self._remote = ray.remote(_call).options(max_retries=_RETRIES)
        self._refs: dict[Future[Any], Any] = {}

    def submit(self, function: Callable[..., _T], /, *args: Any, **kwargs: Any) -> Future[_T]:
        future: Future[_T] = Future()
        ref = self._refs[future] = self._remote.remote(function, *args, **kwargs)  # what nobody refers to is not done

        def settle(done: Future[_T]) -> None:
            self._refs.pop(future, None)
            if future.set_running_or_notify_cancel():
                error = done.exception()
                if error is None:
                    future.set_result(done.result())
                else:
                    future.set_exception(_cause(error))

        ref.future().add_done_callback(settle)
        future.add_done_callback(self._forget)
        return future

    def _forget(self, future: Future[Any]) -> None:
        ref = self._refs.pop(future, None)
        if ref is not None and future.cancelled():
            ray.cancel(ref)


def _call(function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
    return function(*args, **kwargs)


class RayWorkers(Workers):
    """The workers of the Ray cluster that this process is connected to."""

    engine = "Ray"

    def __init__(self) -> None:
        super().__init__(RayExecutor(), _count_cpus(), are_far=True)
        self._address: str = ray.get_runtime_context().gcs_address
        self._asked = self._answered = time.monotonic()

    def visit(self, function: Callable[[_A], _T], argument: _A) -> Iterator[tuple[str, _T | BaseException]]:
        """Call a function on each node, which runs workers as they are needed."""
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        refs = {}
        for node in nodes:
            strategy = NodeAffinitySchedulingStrategy(node, soft=False)
            refs[node] = ray.remote(function).options(scheduling_strategy=strategy).remote(argument)
        for node, ref in refs.items():
            yield node, _outcome(ref)

    def check(self) -> None:
        """Look whether Ray's head is there, and how large the cluster is now.

        What is asked of a head that is gone waits; after a minute of it Ray ends this process, without a word to us.
        """
        now = time.monotonic()
        if now - self._asked < _ASKED_SECONDS:
            return
        self._asked = now
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), _ASKED_SECONDS).close()
            self._answered = now
            self._count = _count_cpus()
        except OSError:
            if now - self._answered > _SILENT_SECONDS:
                raise SystemRefused(
                    self._address, "is the head of a Ray cluster, and gone", "Run this again."
                ) from None

    def explain(self, error: BaseException) -> Trouble | None:
        if isinstance(error, OutOfMemoryError):
            return Trouble("was under way when memory ran out on its worker", "Let a node run fewer tasks at once.")
        if isinstance(error, WorkerCrashedError | NodeDiedError):
            problem = f"was under way when {_RETRIES + 1} workers were killed"
            return Trouble(problem, "Perhaps memory ran out there: look into Ray's log.")
        if isinstance(error, ImportError):
            return Trouble(f"was given to a worker that cannot load it ({error})", "Install wconv on all.")
        if isinstance(error, RayError):
            return Trouble(f"was given up by Ray ({str(error).splitlines()[0]})", "Look into its log.")
        return super().explain(error)


def _count_cpus() -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 1)))

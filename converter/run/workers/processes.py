"""Worker processes on this machine: for casts, which hold the interpreter's lock for too long to keep many cores busy.

Never forked from this process: a network client in it would hang in the child. On Linux they are forked from a server
that has loaded little more than numpy, and share its memory; elsewhere each starts anew. A worker leaves Ctrl-C to the
process that it works for, and ends with it, however that ends.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import forkserver, get_context, parent_process, resource_tracker
from multiprocessing.synchronize import Event

from converter.errors import Unsupported
from converter.run.watch import listen
from converter.run.workers.base import Workers
from converter.run.workers.cores import SAFE_PYTHON, default_workers

_PRELOADED = ["converter.run.parts", "converter.tensors.kernels"]
_HAS_SERVER = sys.platform == "linux"


@contextmanager
def open_engine(address: str, workers: int | None) -> Iterator[Workers]:
    """Give worker processes, as many as there are cores where nobody says. Raises Unsupported on Python 3.10."""
    count = int(address) if address else workers or default_workers()
    with _safe_path():
        start()
        context = get_context("forkserver" if _HAS_SERVER else "spawn")
        is_over = context.Event()
        pool = ProcessPoolExecutor(count, context, _settle, (is_over,))
        try:
            yield _Processes(pool, count, is_over)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _Processes(Workers):
    def __init__(self, pool: ProcessPoolExecutor, count: int, is_over: Event) -> None:
        super().__init__(pool, count)
        self._is_over = is_over

    def tell(self, is_over: bool) -> None:
        if is_over:
            self._is_over.set()
        else:
            self._is_over.clear()


def start() -> None:
    """Have what workers need loaded, on another core, before there is anything to do."""
    if not _HAS_SERVER:
        return
    with _safe_path():
        forkserver.set_forkserver_preload(_PRELOADED)
        resource_tracker.ensure_running()  # else the server starts it, and lets signals through again for that
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which it inherits, and all workers
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _safe_path() -> Iterator[None]:
    """Keep the current folder, which may be the model's, out of where workers load modules from as they start."""
    if sys.version_info < SAFE_PYTHON:
        problem = "needs Python 3.11, which can keep modules of the current folder out"
        raise Unsupported("--executor processes", problem, "Take threads.")
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def _settle(is_over: Event) -> None:
    listen(is_over.is_set)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

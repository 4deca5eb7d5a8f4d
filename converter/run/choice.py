"""Which workers a run takes where nobody says, before a header is read, and how much memory they take."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple

from converter.models.names import parse_name
from converter.plan.types import Plan
from converter.run.tasks import buffers_nbytes
from converter.run.workers import parse
from converter.run.workers.cores import SAFE_PYTHON, default_workers
from converter.storage import Place, list_entries
from converter.storage.far import TASK_NBYTES, CommittedStore
from converter.tensors.reader import are_far

WORKER_NBYTES = 17_000_000
"""What a worker process takes beside its buffers and what it shares with the others."""

_SHARED_NBYTES = 26_000_000  # what the workers share, and what looks after them

# Threads that cast keep no more than three cores busy, whatever their number: for each chunk they take and give the
# interpreter's lock some ten times. Processes need a quarter of a second before they are there.
_LOCKED_CORES = 3
_WORTH_NBYTES = 2_000_000_000
_XET_NBYTES = 300_000_000  # a process that sends to the Hub, at any size of what it sends
_FAR_TASKS = 4  # one stream of a store brings some 85 MB/s


class Choice(NamedTuple):
    """Who runs tasks: an engine, as ``--executor`` spells it, and how many at once; None where the engine tells."""

    executor: str
    workers: int | None

    def __str__(self) -> str:
        if self.executor not in ("threads", "processes"):
            return f"the workers of {self.executor}"
        one = "thread" if self.executor == "threads" else "worker process"
        return f"1 {one}" if self.workers == 1 else f"{self.workers} {one}{'es' if one.endswith('s') else 's'}"

    def extra_nbytes(self, plan: Plan, memory_nbytes: int) -> int:
        """Say how much memory a run takes beside this process; on a cluster, how much a worker."""
        nbytes = buffers_nbytes(memory_nbytes, self.workers or 1, plan.window)
        if plan.target.folder.store.is_far or are_far(
            tensor.source for file in plan.written for tensor, _ in file.tensors
        ):
            nbytes += TASK_NBYTES * (self.workers or 1)
        if isinstance(plan.target.folder.store, CommittedStore):
            nbytes += _XET_NBYTES * ((self.workers or 1) if self.executor == "processes" else 1)
        apart = _SHARED_NBYTES + WORKER_NBYTES * (self.workers or 1) if self.executor == "processes" else 0
        return nbytes + apart


def choose_workers(source: Place, computes: bool, executor: str | None = None, workers: int | None = None) -> Choice:
    """Choose what is fastest on this machine, as far as nobody has: processes to cast much, threads for the rest."""
    is_far = source.store.is_far
    count = workers or max(default_workers(), _FAR_TASKS if is_far else 1)
    if executor is None:
        is_much = computes and count >= _LOCKED_CORES and source_nbytes(source) >= _WORTH_NBYTES
        executor = "processes" if is_much and sys.version_info >= SAFE_PYTHON else "threads"
    engine, address = parse(executor)
    if engine == "processes":
        return Choice(engine, int(address) if address else count)
    return Choice(executor, count if engine == "threads" else workers)


def source_nbytes(source: Place) -> int:
    """Say how large the weight files of a file, or of a folder and those in it, are, by their names."""
    info = source.info()
    if info is None or info.kind == "file":
        return info.nbytes if info else 0
    return sum(_sizes(source, depth=1))


def _sizes(folder: Place, depth: int) -> Iterator[int]:
    for place in list_entries(folder):
        info = place.info()
        if info is not None and info.kind == "file" and parse_name(place.name) is not None:
            yield info.nbytes
        elif info is not None and info.kind == "folder" and depth:
            yield from _sizes(place, depth - 1)

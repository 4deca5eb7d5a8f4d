"""Which workers a run takes where nobody says, and how much memory that is."""

from __future__ import annotations

from typing import NamedTuple

from converter.plan.types import Plan
from converter.run.tasks import chunk_nbytes_for
from converter.run.workers import parse
from converter.run.workers.cores import count_cores
from converter.run.workers.threads import DEFAULT_WORKERS

WORKER_NBYTES = 24_000_000
"""What a worker process takes beside its buffers; much of it is shared with the others."""

MAX_WORKERS = 16
"""More are not faster: by then memory is as busy as it can be."""

# Threads that cast keep no more than three cores busy, whatever their number: each chunk takes and gives the
# interpreter's lock some ten times. Processes need a quarter of a second before they are there.
_LOCKED_CORES = 3
_WORTH_NBYTES = 2_000_000_000


class Choice(NamedTuple):
    """Who runs the tasks of a plan: an engine, as ``--executor`` spells it, and how many at once; None to ask it."""

    executor: str
    workers: int | None

    @property
    def engine(self) -> str:
        return parse(self.executor)[0]


def choose_workers(plan: Plan, memory_nbytes: int, executor: str | None = None, workers: int | None = None) -> Choice:
    """Choose what is fastest on this machine, as far as nobody has: threads for what is only moved, or is little.

    Casts of much are for processes; what needs more room at a time than there is memory has fewer workers.
    """
    computes = any(file.computes for file in plan.written)
    if executor is None:
        count = workers or default_count(computes)
        is_worth = computes and count >= _LOCKED_CORES and plan.written_nbytes >= _WORTH_NBYTES
        executor = "processes" if is_worth else "threads"
    engine, address = parse(executor)
    if engine not in ("threads", "processes"):
        return Choice(executor, workers)
    count = int(address) if address else workers or default_count(computes)
    if workers is None and not address:
        count = min(count, max(1, memory_nbytes // (2 * window_of(plan))))
    return Choice(engine, count)


def default_count(computes: bool) -> int:
    """Say how many workers there are: as many as cores for casts; copies wait for the disk, or for each other."""
    cores = min(MAX_WORKERS, count_cores())
    return cores if computes else max(DEFAULT_WORKERS, cores)


def window_of(plan: Plan) -> int:
    """Give how much the tensors of a plan are read at a time, at least, in bytes."""
    return max((tensor.source.window for file in plan.written for tensor, _ in file.tensors), default=1)


def extra_nbytes(plan: Plan, choice: Choice, memory_nbytes: int) -> int:
    """Say how much memory a run takes more than this process has, on this machine; on others, how much a worker."""
    count = choice.workers or 1
    buffers = count * 2 * max(window_of(plan), chunk_nbytes_for(memory_nbytes, count))
    return buffers + (count * WORKER_NBYTES if choice.engine == "processes" else 0)

"""The ranks of an MPI job, which mpi4py.futures makes an executor of; ``mpiexec`` starts them all."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mpi4py.futures import MPIPoolExecutor, _core

from converter.errors import SystemRefused
from converter.run.workers.base import Workers
from converter.run.workers.cores import SAFE_PYTHON


@contextmanager
def open_engine(_: str, workers: int | None) -> Iterator[Workers]:
    """Give the ranks but the first as workers. Raises SystemRefused where there are none."""
    if not getattr(_core, "SharedPool", None):  # it would try to start some itself
        safely = (
            "-P " if sys.version_info >= SAFE_PYTHON else ""
        )  # or the current folder's modules go before all others
        advice = f"For four workers: mpiexec -n 5 python {safely}-m mpi4py.futures -m converter ..."
        raise SystemRefused("--executor mpi", "has no ranks that wait for work", advice)
    with MPIPoolExecutor(main=False) as pool:
        yield Workers(pool, pool.num_workers, are_far=True)

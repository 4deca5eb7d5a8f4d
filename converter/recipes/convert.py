"""Conversions from end to end: select, transform, plan, run. The command line is a thin layer over it."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Any

from converter.plan.types import Plan
from converter.recipes.request import Request, prepare
from converter.recipes.steps import make_ready, open_job, open_sets, plan_job, select
from converter.run.execute import Result, run_plan
from converter.run.tasks import DEFAULT_MEMORY_NBYTES, Progress
from converter.storage import Given, Place
from converter.storage.far import FarStore


def plan_conversion(request: Request) -> Plan:
    """Plan a conversion: every set that is selected, in another format, dtype, split or name.

    A plan without sets means that there is nothing to do. Raises WconvError as the commands do.
    """
    job = open_job(request)
    selected = select(job)
    return plan_job(job, selected, make_ready(job, open_sets(job, selected)))


def convert(
    source: Given,
    output: Given | None = None,
    *,
    executor: Executor | str | None = None,
    workers: int | None = None,
    memory_nbytes: int = DEFAULT_MEMORY_NBYTES,
    verify: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Convert the weights of ``source``, by default every set to safetensors, beside it or into ``output``.

    ``options`` are those of Request, by name: ``dtype="bf16"``, ``max_shard_size="5GB"``. All of the output is there
    afterwards, or nothing; the source is never changed unless ``in_place`` or ``delete_source`` says so, and
    then only after every value was compared. Raises WconvError.
    """
    for given in (source, output):  # that may have been looked at long ago
        if isinstance(given, Place) and isinstance(given.store, FarStore):
            given.store.snapshot.forget()
    prepared = prepare(Request.of(source, output, **options), plan_conversion)
    if prepared.plan is None or not prepared.plan.sets:
        return Result(prepared.plan, 0.0)
    return run_plan(
        prepared.plan,
        executor,
        workers=workers,
        memory_nbytes=memory_nbytes,
        verify=verify,
        progress=progress,
        request=prepared.request,
    )

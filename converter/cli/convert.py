"""What all conversion commands do with their options: ask, plan, print or run, and show the result.

``take_run`` takes out of the options that click has parsed how to run; the rest is for ``Request.of``, and what fits
nothing is an error there, not lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from converter.cli.report import Needs, plan_as_json, show_plan, show_result
from converter.cli.terminal import JsonList, memory_in_use, open_meter, show_json
from converter.plan.types import Plan
from converter.recipes.convert import plan_conversion
from converter.recipes.request import Prepared, Request, prepare
from converter.run.choice import Choice, choose_workers
from converter.run.execute import Result, guess_seconds, run_plan
from converter.run.tasks import DEFAULT_MEMORY_NBYTES
from converter.run.upload import traffic_of
from converter.run.workers import Workers, open_workers
from converter.storage import Place
from converter.storage.local import free_nbytes

Options = dict[str, Any]
"""What click gives, by name; some options a command may not have."""


class RunOptions(NamedTuple):
    """How a command is to run and what it is to print, whatever comes of it; ``of_many`` tells of several sources."""

    executor: str | None = None
    workers: int | None = None
    memory: float = DEFAULT_MEMORY_NBYTES
    verify: bool = False
    dry_run: bool = False
    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    keep_going: bool = False
    of_many: JsonList | None = None

    def show_json(self, content: Any) -> None:
        """Print a result, or add it to those of other sources."""
        (self.of_many.add if self.of_many else show_json)(content)

    @property
    def is_told(self) -> bool:
        """Whether people are told of it, in words."""
        return not (self.quiet or self.as_json)


def run_conversion(
    source: Place,
    options: Options,
    make: Callable[[Request], Plan] = plan_conversion,
    more: object = "",
    computes: bool = False,
    **fixed: Any,
) -> None:
    """Carry out what is asked and what the command fixes, and print what came of it; the rest is as in ``prepare``."""
    run = take_run(options)
    request = Request.of(source, **options, **fixed)
    with open_run(request, run, computes) as job:
        run_prepared(prepare(request, make, more, recovering=not run.dry_run), job)


def take_run(options: Options) -> RunOptions:
    """Take out how to run."""
    return RunOptions(**{name: options.pop(name) for name in RunOptions._fields if name in options})


class Run(NamedTuple):
    """A run whose workers are chosen, and there, unless it is dry."""

    options: RunOptions
    choice: Choice
    workers: Workers | None


@contextmanager
def open_run(request: Request, run: RunOptions, computes: bool = False) -> Iterator[Run]:
    """Choose workers, and have those that take time to be there started while headers are read."""
    computes = computes or request.casting.dtype is not None
    choice = choose_workers(request.source, computes, run.executor, run.workers)
    if run.dry_run:
        yield Run(run, choice, None)
        return
    with open_workers(*choice) as workers:
        yield Run(run, choice, workers)


def run_prepared(prepared: Prepared, job: Run, more: Mapping[str, Any] | None = None) -> None:
    """Print a plan, or run it and print what came of it; ``more`` goes into the JSON."""
    request, plan = prepared
    run = job.options
    more = more or {}
    if run.dry_run:
        assert plan is not None
        _show_dry_run(plan, job, more)
        return
    result, peak_nbytes = _run(plan, request, job)
    if run.as_json:
        content = {**plan_as_json(plan), **more} if plan else {}
        content |= {"url": result.told} if result.told else {}
        content = {**content, "too_large": dict(result.too_large), "seconds": result.seconds}
        run.show_json({**content, "peak_memory_nbytes": peak_nbytes, "dry_run": False})
    elif not run.quiet:
        show_result(result, peak_nbytes, run.verbose, is_alone=run.of_many is None)


def _run(plan: Plan | None, request: str, job: Run) -> tuple[Result, int]:
    if plan is None or not plan.sets:
        return Result(plan, 0.0), 0
    run = job.options
    verify = run.verify or plan.destroys_source
    with open_meter(plan.nbytes * (2 if verify else 1), "converting", run.quiet, run.verbose and run.is_told) as meter:
        result = run_plan(
            plan,
            job.workers,
            memory_nbytes=int(run.memory),
            verify=verify,
            progress=meter,
            request=request,
        )
    meter(0)
    return result, meter.peak_nbytes


def _show_dry_run(plan: Plan, job: Run, more: Mapping[str, Any]) -> None:
    run = job.options
    memory_nbytes = memory_in_use()
    read, sent = traffic_of(plan)
    seconds = None if read or sent else guess_seconds(plan)
    if job.choice.executor == "threads":
        memory_nbytes = memory_in_use()  # now with what casts, which others load for themselves
    memory_nbytes += job.choice.extra_nbytes(plan, int(run.memory))
    if plan.is_there:
        _run(plan, "", job)  # nothing is written then, and that all is there must be true
    free = None if plan.target.folder.store.is_far else free_nbytes(plan.target.real.path)
    needs = Needs(str(job.choice), memory_nbytes, free, seconds, read, sent)
    if run.as_json:
        run.show_json({**plan_as_json(plan), **more, "dry_run": True, **needs.as_json()})
    elif run.quiet:
        return
    elif plan.sets and not plan.is_there:
        show_plan(plan, needs, run.verbose)
    else:
        show_result(Result(plan, 0.0), 0, False)

"""What all conversion commands do with their options: plan, print or run, and show the result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil

from converter.cli.report import plan_as_json, show_plan, show_result
from converter.cli.terminal import open_meter, show_json
from converter.plan.types import Plan
from converter.recipes.convert import plan_conversion
from converter.recipes.request import Prepared, Request, prepare
from converter.run.execute import Result, default_workers, peak_buffer_nbytes, run_plan
from converter.run.tasks import DEFAULT_MEMORY_NBYTES

# Options that are about the run, and not about what comes of it.
_OF_RUNS = frozenset({"workers", "memory", "as_json", "quiet", "verbose", "verify", "dry_run"})
_NOTHING: Mapping[str, Any] = MappingProxyType({})


def run_conversion(source: Path, options: dict[str, Any], **fixed: Any) -> None:
    """Carry out a conversion as the options ask, with what the command fixes, and print what came of it."""
    run_prepared(prepare(request_of(source, options, **fixed), plan_conversion, recovering=is_wet(options)), options)


def request_of(source: Path, options: Mapping[str, Any], **fixed: Any) -> Request:
    """Give what the options ask of a conversion, with what the command fixes."""
    asked = {name: value for name, value in options.items() if name not in _OF_RUNS}
    return Request.of(source, **asked, **fixed)


def is_wet(options: Mapping[str, Any]) -> bool:
    """Say whether anything is to be written."""
    return not options["dry_run"]


def run_prepared(prepared: Prepared, options: dict[str, Any], more: Mapping[str, Any] = _NOTHING) -> None:
    """Print a plan, or run it and print what came of it; ``more`` goes into the JSON."""
    request, plan = prepared
    if options["dry_run"]:
        assert plan is not None
        _show_dry_run(plan, options, more)
        return
    result, peak_nbytes = _run(plan, request, options)
    if options["as_json"]:
        content = {**plan_as_json(plan), **more} if plan else {}
        content = {**content, "too_large": dict(result.too_large), "seconds": result.seconds}
        show_json({**content, "peak_memory_nbytes": peak_nbytes, "dry_run": False})
    elif not options["quiet"]:
        show_result(result, peak_nbytes, options["verbose"])


def _run(plan: Plan | None, request: str, options: dict[str, Any]) -> tuple[Result, int]:
    if plan is None or not plan.sets:
        return Result(plan, 0.0), 0
    verify = options.get("verify", False) or plan.destroys_source
    with open_meter(plan.nbytes * (2 if verify else 1), "converting", options["quiet"]) as meter:
        result = run_plan(
            plan,
            workers=options.get("workers"),
            memory_nbytes=_memory_nbytes(options),
            verify=verify,
            progress=meter,
            request=request,
        )
    meter(0)
    return result, meter.peak_nbytes


def _memory_nbytes(options: dict[str, Any]) -> int:
    return int(options.get("memory", DEFAULT_MEMORY_NBYTES))


def _show_dry_run(plan: Plan, options: dict[str, Any], more: Mapping[str, Any]) -> None:
    buffers = peak_buffer_nbytes(plan, _memory_nbytes(options), options.get("workers") or default_workers(plan))
    memory_nbytes = psutil.Process().memory_info().rss + buffers
    if plan.is_there:
        _run(plan, "", options)  # nothing is written then, and that all is there must be true
    if options["as_json"]:
        show_json({**plan_as_json(plan), **more, "dry_run": True, "peak_memory_nbytes": memory_nbytes})
    elif options["quiet"]:
        return
    elif plan.sets and not plan.is_there:
        show_plan(plan, memory_nbytes)
    else:
        show_result(Result(plan, 0.0), 0, False)

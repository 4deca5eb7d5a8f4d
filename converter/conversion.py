"""Conversions from end to end: see what is there, choose, open, plan, run. The command line is a thin layer over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path

from converter.checkpoint import WeightSet, find_weight_sets, open_checkpoint
from converter.errors import BadRequest, OutputRefused
from converter.folder import Component, ModelFolder, find_rest, open_folder
from converter.names import WeightsName, parse_name
from converter.plan import Plan, Target, Wishes, choose_sets, make_plan
from converter.run import DEFAULT_MEMORY_NBYTES, Progress, Result, run_plan
from converter.staging import open_target, recover

_NO_WISHES = Wishes()


def plan_conversion(source: Path, output: Path | None, wishes: Wishes) -> Plan:
    """Plan the conversion of every weight set of ``source`` to safetensors, beside it or into ``output``.

    A plan without sets means that there is nothing to do. Raises WconvError as the commands do.
    """
    folder = open_folder(source)
    output, renamed = _split_output(folder, output)
    target = open_target(folder, output, wishes.overwrite)
    chosen = choose_sets(folder, wishes)
    elsewhere = output is not None and not (output.exists() and output.samefile(folder.root))
    checkpoints = [(component, open_checkpoint(weight_set)) for component, weight_set in chosen]
    if renamed:
        component, checkpoint = checkpoints[0]
        weight_set = dataclasses.replace(checkpoint.weight_set, name=renamed)
        checkpoints = [(component, dataclasses.replace(checkpoint, weight_set=weight_set))]
    carried, notes = _carry(folder, chosen, target) if elsewhere and folder.kind != "file" else ([], [])
    existing = _find_existing(target, [component for component, _ in chosen])
    plan = make_plan(folder, checkpoints, target, wishes, existing, carried, notes)
    if not plan.sets:
        _refuse_beside(chosen)
    return plan


def convert(
    source: Path | str,
    output: Path | str | None = None,
    wishes: Wishes = _NO_WISHES,
    *,
    executor: Executor | None = None,
    workers: int | None = None,
    memory_nbytes: int = DEFAULT_MEMORY_NBYTES,
    verify: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Convert every weight set of ``source`` to safetensors, beside it or into ``output``.

    All of the output is there afterwards, or nothing; the source is never changed unless ``wishes.delete_source`` says
    so, and then only after every value was compared. Raises WconvError.
    """
    request, plan = prepare(Path(source), Path(output) if output is not None else None, wishes)
    if plan is None or not plan.sets:
        return Result(plan, 0.0)
    return run_plan(
        plan,
        executor,
        workers=workers,
        memory_nbytes=memory_nbytes,
        verify=verify,
        progress=progress,
        request=request,
    )


def prepare(source: Path, output: Path | None, wishes: Wishes, recovering: bool = True) -> tuple[str, Plan | None]:
    """Name a request for ``run_plan`` and plan it; None for the plan if a killed run of it needed just finishing.

    Without ``recovering`` (for a dry run), what such a run left is not touched.
    """
    request = repr((str(source.absolute()), str(output.absolute()) if output else "", wishes))
    folder = output or (source if source.is_dir() else source.parent)
    if recovering and recover(folder, request):
        return request, None
    return request, plan_conversion(source, output, wishes)


def _split_output(folder: ModelFolder, output: Path | None) -> tuple[Path | None, WeightsName | None]:
    """Tell an output folder from an output file; the latter gives a single set its name."""
    if output is None or output.suffix != ".safetensors" or output.is_dir():
        return output, None
    if folder.kind != "file":
        raise BadRequest(output, "is a file name, and the source is a folder", "Name a folder for the output.")
    parsed = parse_name(output.name)
    return output.parent, parsed.name if parsed else None


def _refuse_beside(chosen: Sequence[tuple[Component, WeightSet]]) -> None:
    """Refuse, where nothing is left to write, to pass over another form of weights whose output is there."""
    for component, found in chosen:
        if any(other is not found and other.name.as_safetensors() == found.name for other in component.weight_sets):
            raise OutputRefused(found.path, "exists", "Use --overwrite to write it again, or -o for a new folder.")


def _carry(
    folder: ModelFolder, chosen: Sequence[tuple[Component, WeightSet]], target: Target
) -> tuple[list[Path], list[str]]:
    """List what goes along to a new folder, and note what does not."""
    carried: list[Path] = []
    left: list[Path] = []
    for path, is_weights in find_rest(folder, skip=target.folder):
        (left if is_weights else carried).append(path)
    names = {component.name for component, _ in chosen}
    for component in folder.components:
        for weight_set in component.weight_sets:
            paths = [weight_set.folder / name for name in weight_set.all_names]
            if component.name not in names:
                carried.extend(paths)
            elif not any(weight_set == found for _, found in chosen):
                left.extend(paths)
    notes = [f"not carried over: {path.relative_to(folder.root).as_posix()}" for path in sorted(left)]
    return sorted(carried), notes


def _find_existing(target: Target, components: Sequence[Component]) -> dict[str, tuple[WeightSet, ...]]:
    folders = {component.name: target.folder / component.name for component in components}
    return {name: find_weight_sets(folder) for name, folder in folders.items() if folder.is_dir()}

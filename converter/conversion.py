"""Conversions from end to end: see what is there, choose, open, plan, run. The command line is a thin layer over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path

from converter.checkpoint import Checkpoint, WeightSet, find_weight_sets, open_checkpoint, strip_prefix
from converter.choose import Wishes, choose_sets
from converter.errors import BadRequest, OutputRefused
from converter.folder import Component, ModelFolder, find_rest, is_disguised, is_linked, open_folder
from converter.formats.state_dict import Reading
from converter.names import WeightsName, parse_name
from converter.paths import check_places, path_of
from converter.plan import Plan, Target, make_plan
from converter.run import DEFAULT_MEMORY_NBYTES, Progress, Result, run_plan
from converter.single_file import SingleFile
from converter.staging import find_difference, find_strangers, open_target, recover, refuse_links

Choose = Callable[[ModelFolder, Wishes], list[tuple[Component, WeightSet]]]
Adapt = Callable[[Component, Checkpoint], Checkpoint]

_NO_WISHES = Wishes()


def plan_conversion(
    source: Path, output: Path | None, wishes: Wishes, choose: Choose = choose_sets, adapt: Adapt | None = None
) -> Plan:
    """Plan a conversion of ``source``, beside it or into ``output``.

    ``choose`` says which sets are read, ``adapt`` may change what was read of each (never the source itself).

    A plan without sets means that there is nothing to do. Raises WconvError as the commands do.
    """
    if wishes.in_place and output is not None:
        raise BadRequest(output, "is given, and --in-place too", "Choose one.")
    check_places(source, output, wishes.delete_source)
    folder = open_folder(source)
    output, renamed = _split_output(folder, output, wishes)
    target = open_target(folder, output, wishes.overwrite)
    chosen = choose(folder, wishes)
    elsewhere = output is not None and not (output.exists() and output.samefile(folder.root))
    if wishes.dtype and wishes.variant == "none" and not elsewhere:
        raise BadRequest(source, "would hold two sets of untagged weights", "Use --variant none with -o OUT.")
    reading = Reading(wishes.key, wishes.strip_code, wishes.strip_code or wishes.skip_unreadable)
    checkpoints = [(component, open_checkpoint(weight_set, reading)) for component, weight_set in chosen]
    if adapt is not None:
        checkpoints = [(component, adapt(component, opened)) for component, opened in checkpoints]
    if wishes.strip_prefix:
        checkpoints = [(component, strip_prefix(opened, wishes.strip_prefix)) for component, opened in checkpoints]
    if renamed:
        component, checkpoint = checkpoints[0]
        weight_set = dataclasses.replace(checkpoint.weight_set, name=renamed)
        checkpoints = [(component, dataclasses.replace(checkpoint, weight_set=weight_set))]
    carried, notes = _carry(folder, chosen, target, wishes) if elsewhere and folder.kind != "file" else ([], [])
    notes += find_strangers(folder.root, target.folder)
    existing = _find_existing(target, [component for component, _ in chosen])
    plan = make_plan(folder, checkpoints, target, wishes, existing, carried, notes)
    if not plan.sets:
        _refuse_beside(chosen, wishes)
    refuse_links(plan)
    return check_edited(plan) if elsewhere else plan


def plan_single_file(opened: SingleFile, output: Path, wishes: Wishes, adapt: Adapt) -> Plan:
    """Plan the pipeline folder that a single file becomes; ``adapt`` as in ``plan_conversion``."""
    target = open_target(opened.folder, output, wishes.overwrite)
    checkpoints = [(component, adapt(component, checkpoint)) for component, checkpoint in opened.checkpoints]
    existing = _find_existing(target, opened.folder.components)
    notes = (*opened.notes, *find_strangers(opened.folder.root, target.folder))
    plan = make_plan(opened.folder, checkpoints, target, wishes, existing, notes=notes)
    plan = dataclasses.replace(plan, carried=opened.carried, edited=(*plan.edited, *opened.edited))
    refuse_links(plan)
    return plan


def check_edited(plan: Plan) -> Plan:
    """Give a plan for a new folder back; raise OutputRefused where a config to be edited lies elsewhere, by a link."""
    root = plan.source.root
    for name, _ in plan.edited:
        if not plan.wishes.follow_links and (root / name).is_file() and is_linked(plan.source, root / name):
            advice = "--follow-links takes what is in it along, with what changes."
            raise OutputRefused(root / name, "is a link out of the folder, and would be written anew", advice)
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
    """Convert the weights of ``source`` as ``wishes`` say, by default every set to safetensors, beside it or elsewhere.

    All of the output is there afterwards, or nothing; the source is never changed unless ``wishes.delete_source`` says
    so, and then only after every value was compared. Raises WconvError.
    """
    request, plan = prepare(path_of(source), path_of(output) if output is not None else None, wishes)
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
    check_places(source, output, wishes.delete_source)
    request = request_of(source, output, wishes)
    finished = recovering and recover(_folder_of(source, output), request)
    return request, plan_rest(finished, wishes, lambda wishes: plan_conversion(source, output, wishes))


def plan_rest(finished: bool, wishes: Wishes, make: Callable[[Wishes], Plan]) -> Plan | None:
    """Plan what is left to do; None where a killed run for the same request was ``finished``, of the source as it is.

    What was to be removed or replaced is gone by then, and not looked for.
    """
    if finished and (wishes.delete_source or wishes.in_place):
        return None
    plan = unless_done(wishes, make)
    return None if finished and (not plan.sets or plan.is_there or not find_difference(plan)) else plan


def unless_done(wishes: Wishes, make: Callable[[Wishes], Plan]) -> Plan:
    """Plan as ``make`` does; where its output is refused since it is there, and seems right, say so in the plan.

    Raises OutputRefused where what is there is not what would be written.
    """
    try:
        return make(wishes)
    except OutputRefused as refused:
        if wishes.overwrite:
            raise
        plan = make(dataclasses.replace(wishes, overwrite=True))
        difference = find_difference(plan)
        if difference:
            refused.problem = f"{refused.problem}, and is not what would be written: {difference}"
            raise
        return dataclasses.replace(plan, is_there=True)


def request_of(source: Path, output: Path | None, wishes: object) -> str:
    """Name a request, so that a run that was killed is known again."""
    return repr((str(source.absolute()), str(output.absolute()) if output else "", wishes))


def _folder_of(source: Path, output: Path | None) -> Path:
    """Name the folder that a request writes to: for a file, the one that it is to lie in."""
    if output is None:
        return source if source.is_dir() else source.parent
    return output.parent if parse_name(output.name) and not output.is_dir() else output


def _split_output(folder: ModelFolder, output: Path | None, wishes: Wishes) -> tuple[Path | None, WeightsName | None]:
    """Tell an output folder from an output file; the latter gives a single set its name."""
    parsed = parse_name(output.name) if output and not output.is_dir() else None
    if output is None or parsed is None:
        return output, None
    if folder.kind != "file" or parsed.role != "single":
        raise BadRequest(output, "is a file name, and the source is a folder", "Name a folder for the output.")
    if wishes.form and parsed.name.format != wishes.form:
        raise BadRequest(output, f"is no name for a {wishes.form} file", "Name a folder, or give it the right ending.")
    return output.parent, parsed.name


def _refuse_beside(chosen: Sequence[tuple[Component, WeightSet]], wishes: Wishes) -> None:
    """Refuse, where nothing is left to write, to pass over another form of weights whose output is there."""
    for component, found in chosen:
        if any(other is not found and wishes.name_output(other.name) == found.name for other in component.weight_sets):
            raise OutputRefused(found.path, "exists", "Use --overwrite to write it again, or -o for a new folder.")


def _carry(
    folder: ModelFolder, chosen: Sequence[tuple[Component, WeightSet]], target: Target, wishes: Wishes
) -> tuple[list[Path], list[str]]:
    """List what goes along to a new folder, and note what does not."""
    carried: list[Path] = []
    left: list[Path] = []
    linked: list[Path] = []
    for path, is_weights, is_elsewhere in find_rest(folder, target.folder, wishes.follow_links):
        (left if is_weights else linked if is_elsewhere else carried).append(path)
    names = {component.name for component, _ in chosen}
    for component in folder.components:
        for weight_set in component.weight_sets:
            paths = [weight_set.folder / name for name in weight_set.all_names]
            if component.name not in names:
                hidden = [] if wishes.follow_links else [path for path in paths if is_disguised(folder, path)]
                carried.extend(path for path in paths if path not in hidden)
                linked.extend(hidden)
            elif not any(weight_set == found for _, found in chosen):
                left.extend(paths)
    why = "a link to what goes along already" if wishes.follow_links else "behind a link: --follow-links carries it"
    reasons = {**dict.fromkeys(left, ""), **dict.fromkeys(linked, f" ({why})")}
    notes = [f"not carried over: {path.relative_to(folder.root).as_posix()}{reasons[path]}" for path in sorted(reasons)]
    return sorted(carried), notes


def _find_existing(target: Target, components: Sequence[Component]) -> dict[str, tuple[WeightSet, ...]]:
    folders = {component.name: target.folder / component.name for component in components}
    return {name: find_weight_sets(folder) for name, folder in folders.items() if folder.is_dir()}

"""Conversions from end to end: see what is there, choose, open, plan, run. The command line is a thin layer over it."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from types import MappingProxyType

from converter.errors import BadRequest, OutputRefused
from converter.formats.torch.state_dict import Reading
from converter.libraries.ask import ask_kept
from converter.libraries.rules import note_tag, variantless
from converter.models.checkpoint import Checkpoint, WeightSet, find_weight_sets, open_checkpoint, strip_prefix
from converter.models.folder import Component, ModelFolder, Rest, find_rest, is_disguised, is_linked, open_folder
from converter.models.hub_cache import check_places
from converter.models.names import ParsedName, WeightsName, is_other_file, parse_name
from converter.models.select import Wishes, choose_sets
from converter.plan.make import Beside, Plan, Target, make_plan
from converter.recipes.outputs import find_difference, open_target, refuse_links
from converter.run.execute import Result, run_plan
from converter.run.staging import find_strangers, recover
from converter.run.tasks import DEFAULT_MEMORY_NBYTES, Progress
from converter.storage.local import as_path
from converter.transforms.stable_diffusion import SingleFile

Choose = Callable[[ModelFolder, Wishes], list[tuple[Component, WeightSet]]]
Adapt = Callable[[Component, Checkpoint], tuple[Component, Checkpoint]]

_NO_WISHES = Wishes()
_NO_EDITS: Mapping[str, bytes] = MappingProxyType({})


def plan_conversion(
    source: Path | str,
    output: Path | str | None,
    wishes: Wishes,
    choose: Choose = choose_sets,
    adapt: Adapt | None = None,
    *,
    edited: Mapping[str, bytes] = _NO_EDITS,
    others: Sequence[Wishes] = (),
) -> Plan:
    """Plan a conversion of ``source``, beside it or into ``output``.

    ``choose`` says which sets are read, ``adapt`` may change what was read of each, and its config (never the source
    itself). ``edited`` are files with another content than they have, ``others`` wishes for more sets in the same
    output.

    A plan without sets means that there is nothing to do. Raises WconvError as the commands do.
    """
    source, output = as_path(source), None if output is None else as_path(output)
    if wishes.in_place and output is not None:
        raise BadRequest(output, "is given, and --in-place too", "Choose one.")
    check_places(source, output, wishes.delete_source)
    folder = open_folder(source)
    output, renamed, wishes = _split_output(folder, output, wishes)
    target = open_target(folder, output, wishes.overwrite)
    elsewhere = output is not None and not (output.exists() and output.samefile(folder.root))
    wishes = _tagged(folder, wishes, elsewhere)
    asked = [(one, each) for each in (wishes, *others) for one in choose(folder, each)]
    chosen = [one for one, _ in asked]
    if wishes.dtype and wishes.variant == "none" and not elsewhere:
        raise BadRequest(source, "would hold two sets of untagged weights", "Use --variant none with -o OUT.")
    reading = Reading(wishes.key, wishes.strip_code, wishes.strip_code or wishes.skip_unreadable)
    opened = [(component, open_checkpoint(weight_set, reading)) for component, weight_set in chosen]
    kept = _ask_kept((component for component, _ in chosen), wishes)
    adapted = opened if adapt is None else [adapt(component, checkpoint) for component, checkpoint in opened]
    orders = [
        (dataclasses.replace(component, more_fp32=kept[component.name][0]), _rename(checkpoint, wishes, renamed), each)
        for ((component, _), each), (_, checkpoint) in zip(asked, adapted, strict=True)
    ]
    carried, notes = _carry(folder, chosen, target, wishes) if elsewhere and folder.kind != "file" else ([], [])
    beside = Beside(
        carried=tuple((path.relative_to(folder.root).as_posix(), path) for path in carried),
        edited=edited,
        configs={component.name: component.config for component, _ in adapted},
        notes=(
            *notes,
            *dict.fromkeys(note for _, note in kept.values() if note),
            *note_tag(folder, wishes.variant),
            *find_strangers(folder.root, target.folder),
        ),
    )
    existing = _find_existing(target, [component for component, _ in chosen])
    plan = make_plan(folder, orders, target, wishes, existing, beside)
    if renamed:
        _check_named(plan, renamed, existing.get("", ()))
    if not plan.sets:
        _refuse_beside(chosen, wishes)
    refuse_links(plan)
    return _check_edited(plan) if elsewhere else plan


def _rename(checkpoint: Checkpoint, wishes: Wishes, name: WeightsName | None) -> Checkpoint:
    """Give a checkpoint as it is written: its tensors without the prefix that goes, and under another name."""
    if wishes.strip_prefix:
        checkpoint = strip_prefix(checkpoint, wishes.strip_prefix)
    if name is None:
        return checkpoint
    return dataclasses.replace(checkpoint, weight_set=dataclasses.replace(checkpoint.weight_set, name=name))


def plan_single_file(
    opened: SingleFile, output: Path, wishes: Wishes, adapt: Adapt, others: Sequence[Wishes] = ()
) -> Plan:
    """Plan the pipeline folder that a single file becomes; ``adapt`` and ``others`` as in ``plan_conversion``."""
    refuse_file(output)
    target = open_target(opened.folder, output, wishes.overwrite)
    adapted = [adapt(component, checkpoint) for component, checkpoint in opened.checkpoints]
    orders = [(component, checkpoint, each) for each in (wishes, *others) for component, checkpoint in adapted]
    notes = (*opened.notes, *find_strangers(opened.folder.root, target.folder))
    beside = Beside(opened.carried, dict(opened.edited), notes=notes)
    existing = _find_existing(target, opened.folder.components)
    plan = make_plan(opened.folder, orders, target, wishes, existing, beside)
    refuse_links(plan)
    return plan


def _check_edited(plan: Plan) -> Plan:
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
    request, plan = prepare(as_path(source), as_path(output) if output is not None else None, wishes)
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
    return output.parent if file_named(output) else output


def file_named(output: Path | None) -> ParsedName | None:
    """Give what an output's name says, if it is that of a weight file, and not of a folder that is there."""
    return parse_name(output.name) if output and not output.is_dir() else None


def refuse_file(output: Path) -> None:
    """Raise BadRequest for an output that is a file by its name, where a whole folder is written."""
    if file_named(output) or (is_other_file(output.name) and not output.is_dir()):
        raise BadRequest(output, "is a file name, and what is written is a folder", "Name a folder for the output.")


def _split_output(
    folder: ModelFolder, output: Path | None, wishes: Wishes
) -> tuple[Path | None, WeightsName | None, Wishes]:
    """Tell an output folder from an output file; the latter gives a single set its name, and wishes for one file."""
    parsed = file_named(output)
    if output is None or parsed is None:
        if output and is_other_file(output.name) and not output.is_dir():
            advice = "Those end in .safetensors, .bin, .pt, .pth or .ckpt; or name a folder."
            raise BadRequest(output, "has an ending of files that wconv does not write", advice)
        return output, None, wishes
    if folder.kind != "file":
        sets = [weight_set.path for component in folder.components for weight_set in component.weight_sets]
        which = f"its weights as the source, {sets[0]}" if len(sets) == 1 else "one of its files as the source"
        advice = f"Name {which}, or a folder for the output."
        raise BadRequest(output, "is a file name, and the source is a folder", advice)
    if parsed.role != "single":
        advice = "Name a folder, in which shards and index get their names, or one file."
        raise BadRequest(output, f"is the name of {'a shard' if parsed.role == 'shard' else 'an index'}", advice)
    if wishes.form and parsed.name.format != wishes.form:
        raise BadRequest(output, f"is no name for a {wishes.form} file", "Name a folder, or give it the right ending.")
    if wishes.variant is not None and wishes.variant != (parsed.name.variant or "none"):
        problem = f"is the whole name of a file, and --variant {wishes.variant} would change it"
        raise BadRequest(output, problem, "Leave --variant out, or name a folder.")
    limit = math.inf if wishes.max_shard_nbytes is None else wishes.max_shard_nbytes
    named = dataclasses.replace(wishes, variant=None, tag_dtype=False, max_shard_nbytes=limit)
    return output.parent, parsed.name, named


def _ask_kept(components: Iterable[Component], wishes: Wishes) -> dict[str, tuple[tuple[str, ...], str]]:
    """Give, by component, what its library keeps in float32 in a cast and the table lacks, and a note on that."""
    target = wishes.dtype if wishes.dtype and wishes.dtype.bits < 32 else None
    return {
        one.name: ask_kept(one.class_names, one.is_diffusers, target) if target and one.class_names else ((), "")
        for one in components
    }


def _tagged(folder: ModelFolder, wishes: Wishes, elsewhere: bool) -> Wishes:
    """Give wishes with the variant of a recast where they leave it open: a tag where loaders are asked for it.

    Users of Diffusers ask for one; in a new folder all others find plain names with no more words.
    """
    if not wishes.tag_dtype or wishes.dtype is None or wishes.variant is not None:
        return wishes
    library = variantless(folder)
    is_diffusers = folder.kind == "pipeline" or folder.components[0].is_diffusers
    if elsewhere and (library or not is_diffusers):
        return dataclasses.replace(wishes, variant="none")
    tag = wishes.dtype.short_name
    if library and folder.kind != "file":
        problem = f"is loaded by {library}, which finds no variants: weights tagged {tag} would not be found"
        raise BadRequest(folder.path, problem, f"Use -o OUT for a new folder, or --variant {tag} all the same.")
    return dataclasses.replace(wishes, variant=tag)


def _check_named(plan: Plan, name: WeightsName, existing: Sequence[WeightSet]) -> None:
    """Hold a plan for one named file against the name, and against what bears it and is no weight file."""
    path = plan.target.folder / name.single
    if len(plan.shards) > 1:
        problem = f"is one file, and shards of at most {plan.wishes.max_shard_nbytes:,.0f} bytes are {len(plan.shards)}"
        raise BadRequest(path, problem, "Use --max-shard-size none, or name a folder.")
    is_known = any(old.name == name for old in existing)
    if plan.sets and os.path.lexists(path) and not (is_known or plan.wishes.overwrite):
        raise OutputRefused(path, "exists", "Use --overwrite to replace it, or another -o.")


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
    reasons: dict[Path, str] = {}
    shells: dict[Path, list[Rest]] = {}
    for one in find_rest(folder, target.folder, wishes.follow_links):
        if one.shell is not None:
            shells.setdefault(one.shell, []).append(one)
        elif one.is_training:
            reasons[one.path] = f" (training state, {_size_of([one]):,} bytes)"
        else:
            (left if one.is_weights else linked if one.is_linked else carried).append(one.path)
    names = {component.name for component, _ in chosen}
    taken = {weight_set for _, weight_set in chosen}
    for component in folder.components:
        for weight_set in component.weight_sets:
            paths = [weight_set.folder / name for name in weight_set.all_names]
            if component.name not in names:
                hidden = [] if wishes.follow_links else [path for path in paths if is_disguised(folder, path)]
                carried.extend(path for path in paths if path not in hidden)
                linked.extend(hidden)
            elif weight_set not in taken:
                left.extend(paths)
    why = "a link to what goes along already" if wishes.follow_links else "behind a link: --follow-links carries it"
    reasons |= {**dict.fromkeys(left, ""), **dict.fromkeys(linked, f" ({why})")}
    reasons |= {path: _why_left(rest) for path, rest in shells.items()}
    notes = [f"not carried over: {path.relative_to(folder.root).as_posix()}{reasons[path]}" for path in sorted(reasons)]
    return sorted(carried), notes


def _why_left(shell: Sequence[Rest]) -> str:
    """Say why a folder stays behind as a whole, and how much that is."""
    what = "a training checkpoint" if any(one.is_training for one in shell) else "weights that are no part of the model"
    return f"/ ({what}: {len(shell):,} file{'s' * (len(shell) != 1)}, {_size_of(shell):,} bytes)"


def _size_of(rest: Sequence[Rest]) -> int:
    return sum(one.path.stat().st_size for one in rest if one.path.is_file())


def _find_existing(target: Target, components: Sequence[Component]) -> dict[str, tuple[WeightSet, ...]]:
    folders = {component.name: target.folder / component.name for component in components}
    return {name: find_weight_sets(folder) for name, folder in folders.items() if folder.is_dir()}

"""What goes along to a new folder beside the weights that are converted, and what stays behind and is named."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace

from converter.errors import name_some, spell_size
from converter.models.component import Component, WeightSet
from converter.models.model import Model
from converter.models.names import fold_numbers, is_training_folder
from converter.models.rest import Rest, find_rest, is_disguised
from converter.models.sets import group_whole
from converter.plan.make import join
from converter.plan.types import Plan
from converter.storage import UNLISTED, FileRef, Place

_NAMED = 3  # of files that come from another folder
_NAMED_MANY = 8  # of other weights, and of a trainer's files: each rank may have some


def find_copied(
    model: Model, selected: Sequence[tuple[Component, WeightSet]], target: Place, follow_links: bool
) -> tuple[list[tuple[str, FileRef]], list[str]]:
    """List what goes along to a new folder, by its path there, and note what does not."""
    why = "a link to what goes along already" if follow_links else "behind a link: --follow-links carries it"
    copied: list[Place] = []
    reasons: dict[Place, str] = {}
    training: list[Rest] = []
    shells: dict[Place, list[Rest]] = {}
    for one in find_rest(model, target, follow_links):
        if one.shell is not None:
            shells.setdefault(one.shell, []).append(one)
        elif one.is_training:
            training.append(one)
        elif one.is_weights or one.is_linked:
            reasons[one.path] = "" if one.is_weights else f" ({why})"
        else:
            copied.append(one.path)
    taken = [weight_set.path for _, weight_set in selected]
    reasons |= {path: _why_left(path, rest, taken) for path, rest in shells.items()}
    for path, is_others in _other_weights(model, selected):
        is_disguise = is_others and not follow_links and is_disguised(model, path)
        if is_others and not is_disguise:
            copied.append(path)
        else:
            reasons[path] = f" ({why})" if is_disguise else ""
    plain = [path.relative_to(model.root) for path in sorted(reasons) if not reasons[path]]
    notes = [f"not carried over: {name_some(plain, _NAMED_MANY)} (other weights)"] if plain else []
    notes += (f"not carried over: {path.relative_to(model.root)}{why}" for path, why in sorted(reasons.items()) if why)
    if training:
        names = fold_numbers(one.path.relative_to(model.root) for one in training)
        size = spell_size(_size_of(training))
        notes.append(f"not carried over: {name_some(names, _NAMED_MANY)} (training state, {size})")
    if not model.root.store.lists_all:
        notes.append(f"{UNLISTED} carried over")
    companions, told = list_companions([component for component, _ in selected])
    taken_along = {file.place for _, file in companions}
    along = {path.relative_to(model.root): path.ref() for path in sorted(copied) if path not in taken_along}
    return [*(along | dict(companions)).items()], notes + told


def left_behind(plan: Plan, names: Container[str], why: str) -> Plan:
    """Give a plan that carries no files of these names over, and says so, and ``why``."""
    left = [name for name, _ in plan.copied if name in names]
    if not left:
        return plan
    copied = tuple(one for one in plan.copied if one[0] not in names)
    note = f"not carried over: {name_some(left, _NAMED)} ({why})"
    return replace(plan, copied=copied, notes=(*plan.notes, note))


def _other_weights(model: Model, selected: Sequence[tuple[Component, WeightSet]]) -> Iterator[tuple[Place, bool]]:
    """Give the files of sets that are not selected, and whether that is so of all of their component."""
    names = {component.name for component, _ in selected}
    taken = {weight_set for _, weight_set in selected}
    for component in model.components:
        others = (weight_set for weight_set in component.weight_sets if weight_set not in taken)
        for path in (weight_set.folder / name for weight_set in others for name in weight_set.all_names):
            yield path, component.name not in names


def list_companions(components: Sequence[Component]) -> tuple[list[tuple[str, FileRef]], list[str]]:
    """List the configs and tokenizers of components that lie elsewhere, by their paths in the output; note where."""
    files = [(join(component.name, file.name), file) for component in components for file in component.companions]
    folders: dict[Place, list[str]] = {}
    for name, file in files:
        folders.setdefault(file.parent, []).append(name)
    notes = [f"{name_some(names, _NAMED)} taken from {_spelled(folder)}" for folder, names in folders.items()]
    return [(name, file.ref()) for name, file in files], notes


def _why_left(folder: Place, shell: Sequence[Rest], taken: Sequence[Place]) -> str:
    """Say why a folder stays behind as a whole, or but for its weights, and how much that is."""
    advice = ""
    if any(path.is_below(folder) for path in taken):
        what = "all but the weights and what goes with them"
    elif is_training_folder(folder.name):
        what = "the state of an optimizer"
    elif any(one.is_training for one in shell):
        what = "a training checkpoint"
        advice = "; name it to convert its weights" if group_whole(folder, [one.path.name for one in shell])[0] else ""
    else:
        what = "weights that are no part of the model"
    return f"/ ({what}: {len(shell):,} file{'s' * (len(shell) != 1)}, {spell_size(_size_of(shell))}{advice})"


def _spelled(folder: Place) -> str:
    """Give a folder as one would name it from here, where that is shorter."""
    here = os.path.relpath(folder.spelled) if not folder.store.is_far else ""
    return here if here and not here.startswith("..") else str(folder)


def _size_of(rest: Sequence[Rest]) -> int:
    return sum(info.nbytes for one in rest if (info := one.path.info()) and info.kind == "file")

"""All that a model of a ZeRO checkpoint has: parameters, and what no optimizer holds, under all of their names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from converter.errors import BadFile, name_some
from converter.formats.torch.modules import spell_key
from converter.formats.torch.rebuild import Listed, TensorRef, checked
from converter.formats.torch.state_dict import (
    AnyTensor,
    Reading,
    check_lengths,
    join_foreign,
    note_foreign,
    refuse_unreadable,
    unreadable_in,
)
from converter.formats.trained import pieces
from converter.formats.trained.zero.cut import MAX_BOXES, Line, unflatten
from converter.formats.trained.zero.states import DAMAGED, Head, Model, Optimizer, as_written, take_runs
from converter.tensors.base import Tensor, TensorSource, WeightsFile

_MAX_NAMED = 8


def gather(
    form: str,
    head: Head,
    others: Sequence[Model | Optimizer],
    parameters: Mapping[str, TensorSource],
    reading: Reading,
    left: str,
) -> WeightsFile:
    """Give all tensors in DeepSpeed's order: buffers, frozen parameters, others, and the second names of those.

    Whatever else the model has comes last.
    """
    _check_described(head, parameters)
    module = head.module
    buffers = {name: ref for name, ref in module.items() if name in head.buffer_names and type(ref) is TensorRef}
    models = [other for other in others if type(other) is Model]
    frozen = _join_frozen(head, models) if head.is_cut else _find_frozen(head)
    taken: dict[str, Any] = {**buffers, **frozen, **parameters}
    if len(taken) != len(buffers) + len(frozen) + sum(map(len, head.groups)):
        raise BadFile(head.place, "describes a parameter twice", DAMAGED)
    _add_shared(head, taken)
    notes = [*_note_dtypes(head, parameters), *_take_rest(head, taken, reading)]
    refs: dict[str, AnyTensor] = {name: value for name, value in taken.items() if type(value) in (TensorRef, Listed)}
    notes += head.content.notes_on(refs)
    taken.update(head.content.take_sources(refs))
    check_lengths(taken, head.place)
    foreign = join_foreign((head.content.pickled.foreign, *(other.foreign for other in others)))
    notes.append(f"left out: {name_some([left, *head.left], _MAX_NAMED)}")
    tensors = tuple(Tensor(name, source) for name, source in taken.items())
    return WeightsFile(head.place, form, tensors, {}, (*notes, *note_foreign(foreign)), foreign)


def _check_described(head: Head, parameters: Mapping[str, TensorSource]) -> None:
    """Raise BadFile where the module lacks a parameter that is described, or has it in another shape."""
    for name, shape in (*((name, source.shape) for name, source in parameters.items()), *head.frozen.items()):
        own = head.module.get(name)
        if own is None or (not head.is_cut and type(own) is TensorRef and own.shape != shape):
            said = "is not there" if own is None else f"is of shape {list(own.shape)}"
            problem = f"describes a parameter {name!r} of shape {list(shape)}, and in its module it {said}"
            raise BadFile(head.place, problem, DAMAGED)


def _add_shared(head: Head, taken: dict[str, Any]) -> None:
    """Add the second names of parameters that DeepSpeed has noted."""
    for name, kept in head.shared.items():
        if type(name) is not str or type(kept) is not str or kept not in taken or name in taken:
            continue
        own = head.module.get(name)
        if head.is_cut or (type(own) is TensorRef and own.shape == taken[kept].shape):
            taken[name] = taken[kept]


def _find_frozen(head: Head) -> dict[str, TensorRef]:
    """Give the frozen parameters of stages 1 and 2, which the first rank has whole."""
    with as_written(head.place):
        found = {name: checked(head.fragments.get(name) or head.module[name], TensorRef) for name in head.frozen}
    for name, ref in found.items():
        if ref.shape != head.frozen[name]:
            problem = f"holds {name!r} in shape {list(ref.shape)}, and says that it is {list(head.frozen[name])}"
            raise BadFile(head.place, problem, DAMAGED)
    return found


def _join_frozen(head: Head, models: Sequence[Model]) -> dict[str, TensorSource]:
    """Give the frozen parameters of stage 3, cut as all others are (``_zero3_merge_frozen_params``)."""
    with as_written(head.place):
        first = dict(take_runs(head.content, {name: head.fragments[name] for name in head.frozen}, MAX_BOXES))
    count = 1 + len(models)
    joined: dict[str, TensorSource] = {}
    for name, shape in head.frozen.items():
        numel = math.prod(shape)
        each = -(-numel // count)
        parts = [first[name]]
        for model in models:
            part = model.fragments.get(name)
            if part is None or part.dtype is not parts[0].dtype:
                problem = f"lacks its part of {name!r}, of which {head.place.name} has one"
                raise BadFile(model.place, problem, pieces.MIXED)
            parts.append(part)
        if each and any(part.shape != (each,) for part in parts):
            problem = f"says that {name!r} is of shape {list(shape)}, and the {count:,} ranks' parts are of others"
            raise BadFile(head.place, problem, pieces.MIXED)
        joined[name] = unflatten(parts[0].dtype, shape, Line(parts).cut(0, numel))
    return joined


def _take_rest(head: Head, taken: dict[str, Any], reading: Reading) -> Iterator[str]:
    """Take what the model has besides, and give notes on it: second names of tensors, and what no optimizer has.

    Before DeepSpeed noted which are shared, tensors that lie in the same place tell it.
    """
    kept_at = _find_places(head, taken)
    others = {name: own for name, own in head.module.items() if name not in taken}
    no_tensors = {name: own for name, own in others.items() if type(own) not in (TensorRef, Listed)}
    unreadable = unreadable_in(no_tensors, True)
    if unreadable and not reading.skip_unreadable:
        refuse_unreadable(unreadable, head.place)
    rest: list[str] = []
    for name, own in others.items():
        if name in no_tensors:
            continue
        # A Listed goes along for what is said of it where tensors are taken.
        is_empty = type(own) is TensorRef and 0 in own.shape
        kept = kept_at.get(_place_of(head, own)) if type(own) is TensorRef and (head.is_cut or not is_empty) else None
        if head.is_cut and is_empty and not kept:
            raise BadFile(head.place, f"does not say where the elements of {name!r} lie", DAMAGED)
        taken[name] = taken[kept] if kept else own
        rest += [] if kept or type(own) is Listed else [name]
    spelled = [f"{spell_key(name)} ({why})" for name, why in unreadable.items()]
    left = [spell_key(name) for name in no_tensors if name not in unreadable]
    for what, names in (
        ("of no optimizer, so taken as the model itself has it", rest),
        ("tensors that cannot be read are left out", spelled),
        ("no tensors, so left out of the model", left),
    ):
        if names:
            yield f"{what}: {name_some(names, _MAX_NAMED)}"


def _find_places(head: Head, taken: Mapping[str, Any]) -> dict[str, str | None]:
    """Map where the module has its tensors to the names of what was taken; None where two of those are in one."""
    kept_at: dict[str, str | None] = {}
    for name in taken:
        own = head.module.get(name)
        if type(own) is TensorRef:
            at = _place_of(head, own)
            first = kept_at.setdefault(at, name)
            if first and taken[first] is not taken[name]:
                kept_at[at] = None
    return kept_at


def _place_of(head: Head, own: TensorRef) -> str:
    """Give what tells a tensor's place in the module: of one that ZeRO-3 has emptied its storage.

    As a text: of numbers a file could choose such as all hash alike.
    """
    return own.storage.key if head.is_cut and 0 in own.shape else str(own)


def _note_dtypes(head: Head, parameters: Mapping[str, TensorSource]) -> Iterator[str]:
    """Say which of two copies of the weights is taken, and how to have the other."""
    tags = {source.dtype.torch_name for source in parameters.values()}
    own = {ref.dtype.torch_name for name, ref in head.module.items() if name in parameters and type(ref) is TensorRef}
    if tags:
        is_double = not head.is_cut and own != tags
        way = f"; --key module takes the {' and '.join(sorted(own))} copies" if is_double else ""
        yield f"the weights are the optimizer's {' and '.join(sorted(tags))} master copies{way}"

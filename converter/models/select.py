"""Which of a model's weight sets a conversion reads, and how. Pure."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from converter.errors import BadRequest
from converter.formats.torch.state_dict import Reading
from converter.models.component import Component, WeightSet
from converter.models.model import Model
from converter.models.names import Format, Naming, WeightsName, check_variant

Tied = Literal["first", "duplicate"]
"""Whether tied tensors are written once, under the first of their names, or each by its name."""


class TiedName(NamedTuple):
    """The name, as it is to be written, under which a tensor that has several is written once."""

    name: str


_MAX_NAMED = 8


@dataclass(frozen=True, slots=True)
class Selection:
    """Which weights are read: of these ``components`` (all, if none is named), and of a variant.

    ``from_variant`` is a tag, or ``"none"`` for untagged. Without ``every_variant`` each component gives one set, the
    untagged one before others. ``key``, ``flatten``, ``strip_code`` and ``skip_unreadable`` are as in Reading.
    """

    components: tuple[str, ...] = ()
    from_variant: str | None = None
    every_variant: bool = True
    key: str | None = None
    flatten: bool = False
    strip_code: bool = False
    skip_unreadable: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "components", texts_of(self.components))

    @property
    def reading(self) -> Reading:
        """How pickled files are read."""
        skip_unreadable = self.strip_code or self.skip_unreadable
        return Reading(self.key, self.strip_code, skip_unreadable, flatten=self.flatten)


def texts_of(given: str | Iterable[str]) -> tuple[str, ...]:
    """Give texts as a tuple; a single one is one, and not its letters."""
    return (given,) if isinstance(given, str) else tuple(given)


def check_choice(name: str, given: object, choices: object, *more: object) -> None:
    """Raise BadRequest for what is none of the choices that a Literal has, nor one of some more."""
    allowed = (*get_args(choices), *more)
    if given not in allowed:
        raise BadRequest(repr(given), f"is no {name}", f"It is one of {', '.join(map(repr, allowed))}.")


def as_tied(given: object) -> Tied | TiedName | None:
    """Give what is asked of tied tensors: a word of Tied, or a name. Raises BadRequest for what is none."""
    if given is None or isinstance(given, TiedName) or given == "first" or given == "duplicate":
        return given
    if not (isinstance(given, str) and given):
        raise BadRequest(repr(given), "is no tied", "It is one of 'first', 'duplicate', None, or a tensor's name.")
    return TiedName(given)


def compiled(regex: str) -> re.Pattern[str]:
    """Compile what a user gives as a regular expression. Raises BadRequest for what is none."""
    try:
        return re.compile(regex)
    except (re.error, OverflowError, RecursionError) as error:
        raise BadRequest(repr(regex), f"is no regular expression ({error})") from None


def select_sets(
    model: Model, selection: Selection, naming: Naming, overwrite: bool = False
) -> list[tuple[Component, WeightSet]]:
    """Select the sets that a conversion reads, a component at a time, given what its output is called.

    Of several forms of the same weights the safetensors one is taken, unless it is to be overwritten. Raises BadRequest
    where the selection names a component or a variant that is not there, or where it does not decide.
    """
    known = {component.name for component in model.components}
    for name in selection.components:
        if name not in known:
            raise BadRequest(model.path, f"has no component {name!r}", f"It has: {', '.join(sorted(known))}.")
    if selection.from_variant not in (None, "none"):
        check_variant(selection.from_variant)
    components = [c for c in model.components if not selection.components or c.name in selection.components]
    selected = []
    for component in components:
        last = {s for s in component.weight_sets if overwrite and naming.of(s.name) == s.name}
        selected += [(component, weight_set) for weight_set in _select(component, selection, naming.format, last)]
    tag = None if selection.from_variant == "none" else selection.from_variant
    if selection.from_variant and not any(weight_set.name.variant == tag for _, weight_set in selected):
        raise BadRequest(model.path, f"has no variant {selection.from_variant!r}", "'wconv inspect' lists what it has.")
    return selected


def _select(
    component: Component, selection: Selection, form: Format | None, last: Container[WeightSet]
) -> list[WeightSet]:
    by_output: dict[WeightsName, list[WeightSet]] = {}
    for weight_set in component.weight_sets:
        by_output.setdefault(weight_set.name.in_format("safetensors"), []).append(weight_set)
    best = [only_set(component, sets, form, last) for sets in by_output.values()]
    untagged = [weight_set for weight_set in best if weight_set.name.variant is None]
    if selection.from_variant is not None:
        # As Diffusers does it: a component that lacks the variant gives its untagged weights.
        return [s for s in best if s.name.variant == selection.from_variant] or untagged
    if selection.every_variant:
        return best
    if not untagged and len({weight_set.name.variant for weight_set in best}) > 1:
        tags = ", ".join(sorted(weight_set.name.variant or "" for weight_set in best))
        raise BadRequest(component.path, f"has several variants ({tags})", "Choose one with --from-variant.")
    return untagged or best


def only_set(
    component: Component, sets: Sequence[WeightSet], form: Format | None = None, last: Container[WeightSet] = ()
) -> WeightSet:
    """Give the one set that is meant where several hold the same weights: one in ``form``, else the safetensors one.

    Those in ``last`` are taken where there is no other. Raises BadRequest where that does not decide.
    """

    def rank(weight_set: WeightSet) -> tuple[bool, bool]:
        return weight_set in last, weight_set.name.format != (form or "safetensors")

    best = min(map(rank, sets))
    candidates = [weight_set for weight_set in sets if rank(weight_set) == best]
    if len(candidates) > 1:
        are_many = all(weight_set.is_of_many for weight_set in candidates)
        more = len(candidates) - _MAX_NAMED
        named = [one.around or one.label for one in candidates[:_MAX_NAMED]]
        names = " and ".join([*named, *([f"{more:,} more"] if more > 0 else [])])
        what = "several training checkpoints" if are_many else "the same weights twice"
        raise BadRequest(component.path, f"has {what}: {names}", "Name the one you want.")
    return candidates[0]

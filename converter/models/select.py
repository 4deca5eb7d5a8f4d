"""What the user asks of a conversion, and which of a folder's weight sets that means. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from converter.dtypes import BY_ALIAS, RECAST_TARGETS, DType, OnOverflow
from converter.errors import BadRequest
from converter.models.component import Component, WeightSet
from converter.models.model import Model
from converter.models.names import Format, WeightsName, check_variant

Tied = Literal["first", "duplicate"]

_CHOICES: dict[str, tuple[object, ...]] = {
    "form": (*get_args(Format), None),
    "tied": (*get_args(Tied), None),
    "on_overflow": get_args(OnOverflow),
}
# huggingface_hub knows the powers of ten (``parse_size_to_int``); the powers of two are ours.
_UNITS = {"B": 1}
_UNITS |= {f"{prefix}{unit}": base**power
           for unit, base in (("B", 1000), ("IB", 1024)) for power, prefix in enumerate("KMGT", 1)}  # fmt: skip
# Who types 5 means 5GB; no shard and no buffer is so small.
_LEAST_BARE_NBYTES = 1_000_000


def parse_size(text: str) -> int:
    """Give the bytes that a text such as ``5GB``, ``1.5 GiB`` or ``64B`` means; raises BadRequest.

    >>> parse_size("5GB"), parse_size("2 MiB"), parse_size("5000000")
    (5000000000, 2097152, 5000000)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE | re.ASCII)
    unit = match[2].upper() if match else ""
    number = float(match[1]) * _UNITS.get(unit or "B", math.inf) if match else 0.0
    if not match or not 1 <= number < math.inf or (unit in ("", "B") and "." in match[1]):
        raise BadRequest(repr(text), "is no size", "Write it as 5GB, 500MB or 2GiB.")
    if not unit and number < _LEAST_BARE_NBYTES:
        raise BadRequest(repr(text), f"is {match[1]} bytes", f"Write it as 5GB, 500MB or 2GiB, or as {match[1]}B.")
    return int(number)


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user asks of a conversion; most fields are options of the command line.

    ``form`` is the output's format, None for the source's own. ``variant`` and ``from_variant`` are a tag, ``"none"``
    for untagged, or None for the source's own; with ``tag_dtype`` it is, where None, for the dtype and for what finds
    the weights to say. Without ``every_variant`` each component gives one set, the untagged one before others.
    ``max_shard_nbytes`` is None for the source's own shards, ``math.inf`` for a single file. ``key``, ``strip_code``
    and ``skip_unreadable`` are as in Reading, ``strip_prefix`` is taken off the names of tensors that have it. With
    ``expand`` tensors are written however much more they take than what holds them. ``keep_fp32`` are regular
    expressions, searched in tensor names. ``in_place`` lets the output replace the very set that is read.
    ``follow_links`` takes along to a new folder what the source has as links to other places.

    A dtype may be given by its name, and a size as a text: ``Wishes(dtype="bf16", max_shard_nbytes="5GB")``. Raises
    BadRequest for what is none.
    """

    form: Format | None = "safetensors"
    every_variant: bool = True
    dtype: DType | None = None
    variant: str | None = None
    tag_dtype: bool = False
    from_variant: str | None = None
    components: tuple[str, ...] = ()
    max_shard_nbytes: float | None = None
    tied: Tied | None = None
    key: str | None = None
    strip_prefix: str = ""
    strip_code: bool = False
    skip_unreadable: bool = False
    expand: bool = False
    keep_fp32: tuple[str, ...] = ()
    on_overflow: OnOverflow = "error"
    overwrite: bool = False
    in_place: bool = False
    delete_source: bool = False
    force: bool = False
    follow_links: bool = False

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise BadRequest(repr(value), f"is no {name}", f"It is one of {', '.join(map(repr, choices))}.")
        known = {
            "dtype": _dtype_of(self.dtype),
            "max_shard_nbytes": _limit_of(self.max_shard_nbytes),
            "components": texts_of(self.components),
            "keep_fp32": texts_of(self.keep_fp32),
        }
        for name, value in known.items():
            object.__setattr__(self, name, value)

    def name_output(self, name: WeightsName) -> WeightsName:
        """Give the name under which a set of this name is written. Raises BadRequest for a tag that is none."""
        name = name.in_format(self.form)
        if self.variant is None:
            return name
        return replace(name, variant=None if self.variant == "none" else check_variant(self.variant))


def _dtype_of(given: Any) -> DType | None:
    if given is None:
        return None
    dtype = BY_ALIAS.get(given.lower()) if isinstance(given, str) else given
    if not isinstance(dtype, DType) or dtype.short_name not in BY_ALIAS:
        raise BadRequest(repr(given), "is no dtype to cast to", f"It is one of {', '.join(RECAST_TARGETS)}.")
    return dtype


def _limit_of(given: Any) -> float | None:
    if isinstance(given, str):
        return math.inf if given.lower() == "none" else parse_size(given)
    if given is not None and (not isinstance(given, int | float) or not given >= 1):
        raise BadRequest(repr(given), "is no size of a shard", "Give a number of bytes, or a text such as '5GB'.")
    return given


def texts_of(given: str | Iterable[str]) -> tuple[str, ...]:
    """Give texts as a tuple; a single one is one, and not its letters."""
    return (given,) if isinstance(given, str) else tuple(given)


def compiled(regex: str) -> re.Pattern[str]:
    """Compile what a user gives as a regular expression. Raises BadRequest for what is none."""
    try:
        return re.compile(regex)
    except re.error as error:
        raise BadRequest(repr(regex), f"is no regular expression ({error})") from None


def choose_sets(model: Model, wishes: Wishes) -> list[tuple[Component, WeightSet]]:
    """Choose the sets that a conversion reads, a component at a time.

    Of several forms of the same weights the safetensors one is taken, unless it is to be overwritten. Raises BadRequest
    where a wish names a component or a variant that is not there, or where it does not decide.
    """
    known = {component.name for component in model.components}
    for name in wishes.components:
        if name not in known:
            raise BadRequest(model.path, f"has no component {name!r}", f"It has: {', '.join(sorted(known))}.")
    if wishes.from_variant not in (None, "none"):
        check_variant(wishes.from_variant)
    components = [c for c in model.components if not wishes.components or c.name in wishes.components]
    chosen = [(component, found) for component in components for found in _choose(component, wishes)]
    tag = None if wishes.from_variant == "none" else wishes.from_variant
    if wishes.from_variant and not any(weight_set.name.variant == tag for _, weight_set in chosen):
        raise BadRequest(model.path, f"has no variant {wishes.from_variant!r}", "'wconv inspect' lists what it has.")
    return chosen


def _choose(component: Component, wishes: Wishes) -> list[WeightSet]:
    by_output: dict[WeightsName, list[WeightSet]] = {}
    for weight_set in component.weight_sets:
        by_output.setdefault(weight_set.name.in_format("safetensors"), []).append(weight_set)
    overwritten = {s for s in component.weight_sets if wishes.overwrite and wishes.name_output(s.name) == s.name}
    best = [only_set(component, sets, wishes.form, overwritten) for sets in by_output.values()]
    untagged = [weight_set for weight_set in best if weight_set.name.variant is None]
    if wishes.from_variant is not None:
        # As Diffusers does it: a component that lacks the variant gives its untagged weights.
        return [s for s in best if s.name.variant == wishes.from_variant] or untagged
    if wishes.every_variant:
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
        names = " and ".join(weight_set.path.name for weight_set in candidates)
        raise BadRequest(component.path, f"has the same weights twice: {names}", "Name the one you want.")
    return candidates[0]

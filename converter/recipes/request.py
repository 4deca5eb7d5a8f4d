"""What a user asks of a conversion, and what all recipes do with it: name it, finish what was begun, plan the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from converter.errors import BadRequest, OutputExists, OutputRefused, Unsupported
from converter.models.hub_cache import refuse_cache
from converter.models.names import parse_name
from converter.models.select import Selection
from converter.plan.types import Plan, Publishing, Writing
from converter.recipes.outputs import CARDS, find_difference
from converter.run.staging import recover
from converter.run.upload import find_other
from converter.storage import Given, Place, place_of
from converter.storage.far import CommittedStore, WritableStore
from converter.storage.local import is_local
from converter.transforms.dtype import Casting
from converter.transforms.layouts.arrange import Arranging
from converter.transforms.names import TensorNames

_GROUPS = {
    "selection": Selection,
    "names": TensorNames,
    "casting": Casting,
    "arranging": Arranging,
    "writing": Writing,
    "publishing": Publishing,
}


@dataclass(frozen=True, slots=True)
class Request:
    """A source, an output (None for beside it), and what is asked of each step from the one to the other.

    ``config`` is the folder of the config and the tokenizer, where those are not to be looked for.
    """

    source: Place
    output: Place | None = None
    selection: Selection = field(default_factory=Selection)
    casting: Casting = field(default_factory=Casting)
    writing: Writing = field(default_factory=Writing)
    publishing: Publishing = field(default_factory=Publishing)
    names: TensorNames = field(default_factory=TensorNames)
    arranging: Arranging = field(default_factory=Arranging)
    config: Place | None = None

    @classmethod
    def of(cls, source: Given, output: Given | None = None, **options: Any) -> Request:
        """Make a request of options by their names, each of the group that has it (``force``: of each that has it).

        Raises TypeError for an option that no group has, BadRequest for a value that is none.
        """
        mine: dict[str, Any] = {name: options.pop(name) for name in ("config",) if name in options}
        if mine.get("config") is not None:
            mine["config"] = place_of(mine["config"])
        known = {name: {one.name for one in fields(group)} for name, group in _GROUPS.items()}
        unknown = options.keys() - set().union(*known.values())
        if unknown:
            raise TypeError(f"there is no option {sorted(unknown)[0]!r}")
        groups = {
            name: group(**{key: options[key] for key in known[name] & options.keys()})
            for name, group in _GROUPS.items()
        }
        publishing: Any = groups["publishing"]
        if output is None and publishing.pr:
            output = place_of(source)  # where it lies, as a proposal
        place = None if output is None else _as_output(place_of(output), publishing)
        return cls(place_of(source).pinned(), place, **groups, **mine)

    @property
    def folder(self) -> Place:
        """The folder that is written to: for a file, the one that it is to lie in."""
        if self.output is None:
            return self.source if self.source.is_folder() else self.source.parent
        return self.output.parent if names_file(self.output) else self.output


def _as_output(place: Place, publishing: Publishing) -> Place:
    """Give a place as one that is written to. Raises BadRequest for what only the Hub can."""
    asked = publishing.create, publishing.private, publishing.pr
    if isinstance(place.store, CommittedStore):
        return Place(place.store.to_write(*asked), place.key)
    for option, is_asked in zip(("--create", "--private", "--pr"), asked, strict=True):
        if is_asked:
            raise BadRequest(place, f"is not on the Hub, and {option} is for what is", "Write to hf://owner/name.")
    return place


class Prepared(NamedTuple):
    """What ``run_plan`` is to be given; the plan is None where a killed run of the request needed just finishing."""

    request: str
    plan: Plan | None


def prepare(request: Request, make: Callable[[Request], Plan], more: object = "", recovering: bool = True) -> Prepared:
    """Finish what a killed run of a request had begun to publish, and plan what is left to do.

    ``more`` is what else tells the request from others. Without ``recovering`` (for a dry run), what such a run left is
    not touched.
    """
    _refuse_elsewhere(request)
    is_near = is_local(request.folder)
    places = (str(place.absolute()) if place else "" for place in (request.source, request.output))
    groups = (getattr(request, group) for group in _GROUPS)
    asked = (*groups, *((str(request.config),) if request.config else ()))
    name = repr((*places, more, *asked))
    finished = recovering and is_near and recover(request.folder.absolute(), name)
    publishing = request.publishing
    # What was to be removed or replaced is gone by then, and not looked for.
    if finished and (publishing.delete_source or publishing.in_place):
        return Prepared(name, None)
    try:
        plan = _unless_done(request, make, name)
    except BadRequest:
        if finished:  # what it asks for, such as a tag to be renamed, is gone by then too
            return Prepared(name, None)
        raise
    if plan.destroys_source and not is_near and not isinstance(request.folder.store, CommittedStore):
        # Files there are not staged: one that is read would be gone before all that is made of it is there.
        raise OutputRefused(request.folder, "holds what is read, and it would be written over", "Name another: -o NEW.")
    is_done = finished and (not plan.sets or plan.is_there or not find_difference(plan))
    return Prepared(name, None if is_done else plan)


def _refuse_elsewhere(request: Request) -> None:
    """Raise Unsupported for what would be written, or removed, where files are only read."""
    source, output, publishing = request.source, request.output, request.publishing
    if source.store.is_far and (publishing.delete_source or publishing.in_place):
        refuse_cache(source)
    if output is None and not is_local(source):
        advice = "Write to a new place: -o NEW, which may be a folder, a bucket or the Hub."
        raise Unsupported(
            source, "is not on this machine's disk, and nothing is added there unless you name it", advice
        )
    if output is not None and not is_local(output) and not isinstance(output.store, WritableStore):
        problem = "is not on this machine's disk, and cannot be written to"
        raise Unsupported(output, problem, "Name a folder, a bucket (s3://, gs://, az://), or hf://owner/name.")


def _unless_done(request: Request, make: Callable[[Request], Plan], name: str) -> Plan:
    """Plan a request; where its output is refused since it is there, and seems right, say so in the plan.

    Raises OutputRefused where what is there is not what would be written.
    """
    try:
        return make(request)
    except OutputRefused as refused:
        if request.publishing.overwrite or (request.publishing.skip_existing and isinstance(refused, OutputExists)):
            raise
        plan = make(replace(request, publishing=replace(request.publishing, overwrite=True, skip_existing=False)))
        if plan.target.folder.store.keeps_notes:
            lacking, strange = find_other(plan, name)
            if strange:
                what = f"{strange[0]} is of something else, or of another command"
                refused.problem = f"{refused.problem}, and is not what would be written: {what}"
                raise
            return replace(plan, is_there=not lacking, replaced=(), overwrite=False)
        folder = plan.target.folder
        if isinstance(folder.store, CommittedStore):  # those that are there stay
            copied = (one for one in plan.copied if one[0] not in CARDS or not (folder / one[0]).exists())
            plan = replace(plan, copied=tuple(copied))
        difference = find_difference(plan)
        if difference:
            refused.problem = f"{refused.problem}, and is not what would be written: {difference}"
            raise
        return replace(plan, is_there=True)


def names_file(output: Place) -> bool:
    """Say whether an output is that of a weight file by its name, and not of a folder that is there."""
    return parse_name(output.name) is not None and not output.is_folder()

"""The place that output goes to, before anything is written: may it go there, or is all of it there already?"""

from __future__ import annotations

from converter.errors import BadFile, OutputExists, OutputRefused
from converter.models.model import Model
from converter.models.rest import above
from converter.plan.types import Plan, Target
from converter.storage import Info, Place
from converter.storage.far import CommittedStore

CARDS = ("README.md", "LICENSE")
"""What a new repository of the Hub has; it stays as it is, unless it is to be replaced."""


def open_target(model: Model, output: Place | None, overwrite: bool) -> Target:
    """Say where a conversion's files go: beside the source, or to ``output``, which for a folder must be a new one.

    A single set goes into a folder that is there, too. Raises OutputRefused where the output is there, or is the input.
    """
    if output is None:
        return Target.at(model.root)
    if not output.exists():
        return Target.at(output, is_new=True)
    if not output.is_folder():
        raise OutputRefused(output, "exists and is no folder", "Name a folder for the output.")
    is_same = output.is_same(model.root)
    if is_same and isinstance(output.store, CommittedStore):
        return Target.at(output)  # what is there stays in its history
    if model.kind != "file":
        if is_same:
            advice = "Name a new place." if output.store.is_far else "Leave -o out to add files beside it."
            raise OutputRefused(output, "is the source itself", advice)
        if model.root.real().is_below(output.real()):
            raise OutputRefused(output, "holds the source", "Name a new folder.")
        if any(not _is_card(entry) for entry in output.entries()) and not overwrite:
            raise OutputExists(output, "exists and is not empty", "Name a new folder, or use --overwrite.")
    return Target.at(output)


def _is_card(entry: Place) -> bool:
    """Say whether an entry is one of those that a new repository of the Hub has."""
    return isinstance(entry.store, CommittedStore) and entry.name in CARDS


def refuse_links(plan: Plan) -> None:
    """Raise OutputRefused for a plan that writes, renames or removes files in a folder that is a link.

    And for one that writes where a link to nothing is, which no look at what is there has seen, or a folder; or into
    what is none; or that removes what it writes, on a disk that does not tell capitals apart.
    """
    folder = plan.target.folder
    for name in (*plan.replaced, *plan.names):
        _refuse_linked(folder, name)
    for name in () if plan.overwrite else plan.names:
        if name not in plan.replaced and (folder / name).is_link() and not (folder / name).exists():
            raise OutputRefused(folder / name, "is a link to nothing", "Remove it, or use --overwrite.")
    names = {name.casefold(): name for name in plan.names}
    for name in plan.replaced:
        twin = names.get(name.casefold(), name)
        if twin != name and (folder / twin).is_taken() and folder / twin not in (folder / twin).parent.entries():
            advice = "Take a tag in between that differs in more than capitals."
            raise OutputRefused(folder / twin, f"is the same name as {name} on this disk", advice)
    for name in () if plan.target.is_new else plan.names:
        _refuse_blocked(folder, name)
    for place in plan.removed_sources:
        _refuse_linked(plan.source.root, place.relative_to(plan.source.root))


def _refuse_linked(root: Place, name: str) -> None:
    """Raise OutputRefused for a file to be written, renamed or removed in a folder that is a link, by its path."""
    for parent in reversed(above(root / name, root)):
        if parent.is_link():
            advice = "Name that folder itself, or write elsewhere: -o NEW."
            raise OutputRefused(parent, "is a link to another folder, and nothing is changed there", advice)


def _refuse_blocked(folder: Place, name: str) -> None:
    """Raise OutputRefused for a file that cannot be renamed into place, which would stop a commit halfway."""
    if (folder / name).is_folder() and not (folder / name).is_link():
        raise OutputRefused(folder / name, "is a folder, and a file is to go there", "Move it elsewhere.")
    for parent in reversed(above(folder / name, folder)):
        if parent.exists() and not parent.is_folder():
            raise OutputRefused(parent, "is no folder, and files are to go into it", "Move it elsewhere.")


def find_difference(plan: Plan) -> str:
    """Say what of a plan is not there yet; nothing where all is, by its headers and sizes, and younger than its source.

    A source counts as old as its last change of any kind: an archive or a copy may give it an earlier time.
    """
    folder = plan.target.folder
    read = [planned.source.folder / name for planned in plan.sets for name in planned.source.all_names]
    newest = max((_look_at(place).changed_ns for place in read), default=0)
    expected = [(file.path, file.nbytes, file.header, newest) for file in plan.files]
    copied = ((name, _look_at(file.place)) for name, file in plan.copied)
    expected += [(name, found.nbytes, b"", found.changed_ns) for name, found in copied]
    expected += [(name, len(content), content, 0) for name, content in plan.texts]
    for name, nbytes, head, changed_ns in expected:
        wrong = _differs(folder / name, nbytes, head, changed_ns)
        if wrong:
            return f"{name} {wrong}"
    names = set(plan.names)
    going = [*(folder / name for name in plan.replaced if name not in names), *plan.removed_sources]
    return next((f"{place} would be removed" for place in going if place.is_taken()), "")


def _look_at(place: Place) -> Info:
    found = place.info()
    if found is None:
        raise BadFile(place, "is gone", "Run this again when nobody writes to it.")
    return found


def _differs(place: Place, nbytes: int, head: bytes, changed_ns: int) -> str:
    found = place.info()
    if found is None or found.kind != "file" or place.is_link():
        return "is not there"
    if found.nbytes != nbytes:
        return f"has {found.nbytes:,} bytes and not {nbytes:,}"
    if found.modified_ns < changed_ns and found.modified_ns:  # the Hub does not tell
        return "is older than its source"
    with place.open() as file:
        return "" if file.read(0, len(head)) == head else "begins otherwise"

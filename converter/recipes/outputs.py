"""The place that output goes to, before anything is written: may it go there, or is all of it there already?"""

from __future__ import annotations

import os
from pathlib import Path

from converter.errors import OutputRefused
from converter.models.model import Model
from converter.plan.types import Plan, Target
from converter.storage import Place
from converter.storage.local import is_dangling, refuse_linked


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
    if model.kind != "file":
        root, real = model.root.real(), output.real()
        if real == root:
            raise OutputRefused(output, "is the source itself", "Leave -o out to add files beside it.")
        if root.is_below(real):
            raise OutputRefused(output, "holds the source", "Name a new folder.")
        if output.entries() and not overwrite:
            raise OutputRefused(output, "exists and is not empty", "Name a new folder, or use --overwrite.")
    return Target.at(output)


def refuse_links(plan: Plan) -> None:
    """Raise OutputRefused for a plan that writes, renames or removes files in a folder that is a link.

    And for one that writes where a link to nothing is, which no look at what is there has seen, or a folder; or into
    what is none; or that removes what it writes, on a disk that does not tell capitals apart.
    """
    folder = plan.target.folder.spelled
    for name in (*plan.replaced, *plan.names):
        refuse_linked(folder, name)
    for name in () if plan.overwrite else plan.names:
        if name not in plan.replaced and is_dangling(folder / name):
            raise OutputRefused(folder / name, "is a link to nothing", "Remove it, or use --overwrite.")
    names = {name.casefold(): name for name in plan.names}
    for name in plan.replaced:
        twin = names.get(name.casefold(), name)
        if twin != name and _is_same(folder / twin, folder / name):
            advice = "Take a tag in between that differs in more than capitals."
            raise OutputRefused(folder / twin, f"is the same name as {name} on this disk", advice)
    for name in () if plan.target.is_new else plan.names:
        _refuse_blocked(folder, name)
    for place in plan.removed_sources:
        refuse_linked(plan.source.root.spelled, place.relative_to(plan.source.root))


def _is_same(path: Path, other: Path) -> bool:
    return os.path.lexists(path) and os.path.lexists(other) and os.path.samestat(os.lstat(path), os.lstat(other))


def _refuse_blocked(folder: Path, name: str) -> None:
    """Raise OutputRefused for a file that cannot be renamed into place, which would stop a commit halfway."""
    if (folder / name).is_dir() and not (folder / name).is_symlink():
        raise OutputRefused(folder / name, "is a folder, and a file is to go there", "Move it elsewhere.")
    for parent in list(Path(name).parents)[:-1]:
        if (folder / parent).exists() and not (folder / parent).is_dir():
            raise OutputRefused(folder / parent, "is no folder, and files are to go into it", "Move it elsewhere.")


def find_difference(plan: Plan) -> str:
    """Say what of a plan is not there yet; nothing where all is, by its headers and sizes, and younger than its source.

    A source counts as old as its last change of any kind: an archive or a copy may give it an earlier time.
    """
    folder = plan.target.folder
    read = [(planned.source.folder / name).path for planned in plan.sets for name in planned.source.all_names]
    newest = max((_changed_ns(path) for path in read), default=0)
    expected = [(file.path, file.nbytes, file.header, newest) for file in plan.files]
    copied = ((name, file.place.path) for name, file in plan.copied)
    expected += [(name, path.stat().st_size, b"", _changed_ns(path)) for name, path in copied]
    expected += [(name, len(content), content, 0) for name, content in plan.texts]
    for name, nbytes, head, changed_ns in expected:
        wrong = _differs((folder / name).path, nbytes, head, changed_ns)
        if wrong:
            return f"{name} {wrong}"
    written = {name for name, *_ in expected}
    going = [*(folder / name for name in plan.replaced if name not in written), *plan.removed_sources]
    return next((f"{place} would be removed" for place in going if os.path.lexists(place)), "")


def _changed_ns(path: Path) -> int:
    found = path.stat()
    return max(found.st_mtime_ns, found.st_ctime_ns)


def _differs(path: Path, nbytes: int, head: bytes, changed_ns: int) -> str:
    if path.is_symlink() or not path.is_file():
        return "is not there"
    found = path.stat()
    if found.st_size != nbytes:
        return f"has {found.st_size:,} bytes and not {nbytes:,}"
    if found.st_mtime_ns < changed_ns:
        return "is older than its source"
    with path.open("rb") as file:
        return "" if file.read(len(head)) == head else "begins otherwise"

"""The place that output goes to, before anything is written: may it go there, or is all of it there already?"""

from __future__ import annotations

import os
from pathlib import Path

from converter.errors import OutputRefused
from converter.models.model import Model
from converter.plan.make import Plan, Target
from converter.storage.local import is_dangling, refuse_linked


def open_target(model: Model, output: Path | None, overwrite: bool) -> Target:
    """Say where a conversion's files go: beside the source, or to ``output``, which for a folder must be a new one.

    A single set goes into a folder that is there, too. Raises OutputRefused where the output is there, or is the input.
    """
    if output is None:
        return Target(model.root.spelled, is_new=False)
    if not output.exists():
        return Target(output, is_new=True)
    if not output.is_dir():
        raise OutputRefused(output, "exists and is no folder", "Name a folder for the output.")
    if model.kind != "file":
        if output.samefile(model.root):
            raise OutputRefused(output, "is the source itself", "Leave -o out to add files beside it.")
        if model.root.real().path.is_relative_to(output.resolve()):
            raise OutputRefused(output, "holds the source", "Name a new folder.")
        if any(output.iterdir()) and not overwrite:
            raise OutputRefused(output, "exists and is not empty", "Name a new folder, or use --overwrite.")
    return Target(output, is_new=False)


def refuse_links(plan: Plan) -> None:
    """Raise OutputRefused for a plan that writes, renames or removes files in a folder that is a link.

    And for one that writes where a link to nothing is, which no look at what is there has seen, or a folder; or into
    what is none; or that removes what it writes, on a disk that does not tell capitals apart.
    """
    written = [*(shard.path for shard in plan.shards), *(name for name, _ in (*plan.texts, *plan.carried))]
    for name in (*plan.superseded, *written):
        refuse_linked(plan.target.folder, name)
    for name in () if plan.wishes.overwrite else written:
        if name not in plan.superseded and is_dangling(plan.target.folder / name):
            raise OutputRefused(plan.target.folder / name, "is a link to nothing", "Remove it, or use --overwrite.")
    names = {name.casefold(): name for name in written}
    for name in plan.superseded:
        twin = names.get(name.casefold(), name)
        if twin != name and _is_same(plan.target.folder / twin, plan.target.folder / name):
            advice = "Take a tag in between that differs in more than capitals."
            raise OutputRefused(plan.target.folder / twin, f"is the same name as {name} on this disk", advice)
    for name in () if plan.target.is_new else written:
        _refuse_blocked(plan.target.folder, name)
    for path in plan.delete:
        refuse_linked(plan.source.root.spelled, path.relative_to(plan.source.root.spelled).as_posix())


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
    expected = [(shard.path, shard.nbytes, shard.header, newest) for shard in plan.shards]
    expected += [(name, path.stat().st_size, b"", _changed_ns(path)) for name, path in plan.carried]
    expected += [(name, len(content), content, 0) for name, content in plan.texts]
    for name, nbytes, head, changed_ns in expected:
        wrong = _differs(folder / name, nbytes, head, changed_ns)
        if wrong:
            return f"{name} {wrong}"
    written = {name for name, *_ in expected}
    going = [*(folder / name for name in plan.superseded if name not in written), *plan.delete]
    return next((f"{path} would be removed" for path in going if os.path.lexists(path)), "")


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

"""Putting a mended folder back as it was, byte for byte, in one transaction; and letting go of what is kept for it."""

from __future__ import annotations

import stat
from typing import NamedTuple

from converter.errors import BadRequest, SystemRefused
from converter.plan.types import Target
from converter.run.journal import Changes, is_index
from converter.run.kept import UNDO_FOLDER, Keeper, Kept
from converter.run.notes import Notes
from converter.run.staging import Staging, open_staging, recover
from converter.storage import Given, Place, place_of
from converter.storage.root import Root


class Undone(NamedTuple):
    """How many files were put back or removed, their bytes, and what could not be cleared up."""

    files: int
    nbytes: int = 0
    left_over: str = ""


def undo(given: Given) -> Undone:
    """Put everything back as it was before the first mending.

    Raises BadRequest where nothing is kept, OutputRefused where a file has changed since, BadFile where what is kept
    has suffered.
    """
    folder = place_of(given)
    if not folder.is_folder():
        raise BadRequest(folder, "is no folder")
    request = repr(("undo", str(folder.absolute())))
    if recover(folder, request):
        return Undone(0)
    with open_staging(Target.at(folder)) as staging:
        staging.drop_strangers(set())
        with Keeper(staging.notes) as keeper:
            kept = keeper.current()
            if kept is None:
                raise BadRequest(folder, "has nothing to undo", _nothing_kept(folder))
            keeper.check(kept)
            changes = _stage(keeper, kept, staging)
        staging.commit(changes, request)
    return Undone(len(kept.names), left_over=staging.left_over)


def _stage(keeper: Keeper, kept: Kept, staging: Staging) -> Changes:
    """Give what is kept a name in the staging folder, but for what is back."""
    names = sorted(
        (name for name in kept.saved if not keeper.is_back(kept, name)), key=lambda name: (is_index(name), name)
    )
    for name in names:
        staging.link_from(keeper.beside, keeper.place(kept, name), name)
    made = [name for name in kept.made if keeper.root.stat(name) is not None]
    return Changes(tuple(names), (*made, *names), after="forget")


def check_left(folder: Place) -> None:
    """Raise OutputRefused for a folder that has changed since it was mended before, BadFile for what is kept of it."""
    with Keeper(Notes(folder.real().path)) as keeper:
        kept = keeper.read()
        if kept is not None:
            keeper.check(kept)


def purge(given: Given) -> Undone:
    """Remove what is kept of a folder. Raises BadRequest where there is nothing."""
    folder = place_of(given)
    recover(folder, "")
    notes = Notes(folder.real().path)
    try:
        with notes.locked(), Keeper(notes) as keeper:
            kept = keeper.read()
            if kept is None:
                raise BadRequest(folder, "has nothing to purge", _nothing_kept(folder))
            nbytes = _nbytes(keeper.beside, keeper.place(kept))
            keeper.forget(kept)
    except OSError as error:
        raise SystemRefused.from_os_error(error) from None
    return Undone(len(kept.saved), nbytes)


def _nbytes(root: Root, name: str) -> int:
    if root.stat(name) is None:
        return 0
    return sum(found.st_size for _, found in root.walk(name) if stat.S_ISREG(found.st_mode))


def _nothing_kept(folder: Place) -> str:
    place = folder.real().parent / UNDO_FOLDER
    if place.exists():
        return f"{place} is of no mending of yours here, and is ignored."
    return f"'wconv doctor --fix' keeps what it changes in {UNDO_FOLDER}/."

"""What a mended folder was before: a second name of each file that a mending replaces or removes, and a note of it all.

The files lie in ``.wconv-undo`` beside the folder, on its disk; what they are, and how the folder was left, is noted in
the user's state folder alone. All is kept before the first change. A folder that is otherwise than it was left is not
touched again, neither mended nor put back; so nothing is overwritten that is kept nowhere.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from converter.errors import BadFile, OutputRefused
from converter.run.notes import Notes, make_token
from converter.storage.root import Root, is_mine, plain_parts

UNDO_FOLDER = ".wconv-undo"
_MAX_NAME_NBYTES = 150  # of a folder's name; with a token it stays below the 255 that most disks allow

State = list[int]
"""Size and time of a file, and whether it is a link: what tells that it is still the same."""


@dataclass(slots=True)
class Kept:
    """What is noted: ``saved`` are files as they were before the first mending, ``made`` those that were not there.

    ``kept`` are the states of what is kept for the former, ``left`` those of what the last mending left in the folder.
    ``pending`` are names that a mending is about to change, or an undo to put back.
    """

    token: str
    saved: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    kept: dict[str, State] = field(default_factory=dict)
    left: dict[str, State] = field(default_factory=dict)
    pending: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [*self.saved, *self.made]


class Keeper:
    """Keeps what a folder was, and knows whether it is as it was left. Use as a context."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes
        self.root = Root(notes.folder)
        self.beside = Root(notes.folder.parent)

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *_: object) -> None:
        self.root.__exit__(None, None, None)
        self.beside.__exit__(None, None, None)

    def read(self) -> Kept | None:
        """Give what is noted. Raises BadFile for a note that cannot be understood."""
        raw = self.notes.read("undo")
        if raw is None:
            return None
        try:
            kept = Kept(**{name: raw[name] for name in Kept.__dataclass_fields__})
            _check_types(kept)
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise self.notes.unreadable("undo", error) from None
        return kept

    def current(self) -> Kept | None:
        """Give what is kept; what an interrupted ``forget`` has left goes."""
        kept = self.read()
        if kept is not None and not kept.names:
            self.forget(kept)
            return None
        return kept

    def place(self, kept: Kept, name: str = "") -> str:
        """Name where a file is kept, from the folder above."""
        folder = self.notes.folder.name.encode("utf-8", "surrogateescape")[:_MAX_NAME_NBYTES].decode("utf-8", "ignore")
        place = f"{UNDO_FOLDER}/{folder}-{kept.token}"
        return f"{place}/{name}" if name else place

    def check(self, kept: Kept) -> None:
        """Refuse a folder that is not as it was left; what a killed run had begun with may be either way."""
        for name in kept.saved:
            if _state(self.beside, self.place(kept, name)) != kept.kept.get(name):
                path = self.beside.path / self.place(kept, name)
                raise BadFile(path, "is not what was kept there", "It was changed through its other name.")
        for name in kept.names:
            if name not in kept.pending and _state(self.root, name) != kept.left.get(name):
                advice = f"Move it elsewhere and undo, or forget with --purge what {UNDO_FOLDER}/ keeps."
                raise OutputRefused(self.root.path / name, "has changed since the folder was mended", advice)

    def keep(self, names: Iterable[str], before: Kept | None) -> None:
        """Keep what is about to change, all of it on the disk, beside what was kept ``before``."""
        if before is not None:
            self.check(before)
        # Read anew, not copied: the lists of the one grow.
        kept = self.read() or Kept(make_token())
        known = set(kept.names)
        kept.pending = list(dict.fromkeys(names))
        if before is None:
            self.notes.write("undo", asdict(kept))  # what is made from here on is known to be ours
        for name in kept.pending:
            if name not in known and self.root.stat(name) is not None:
                self._keep(kept, name)
            elif name not in known:
                kept.made.append(name)
        self._make_folder(self.place(kept))
        self.beside.sync_tree(self.place(kept))
        self.beside.sync(UNDO_FOLDER)
        self.notes.write("undo", asdict(kept))

    def _keep(self, kept: Kept, name: str) -> None:
        place = self.place(kept, name)
        self._make_folder(place.rpartition("/")[0])
        self.beside.remove(place)
        self.root.link(name, self.beside, place)
        found = _state(self.beside, place)
        assert found is not None
        kept.kept[name] = found
        kept.saved.append(name)

    def _make_folder(self, name: str) -> None:
        found = self.beside.stat(UNDO_FOLDER)
        if found is not None and not (stat.S_ISDIR(found.st_mode) and is_mine(found)):
            # Whose folder it is may put other files in the place of what is kept there.
            path = self.beside.path / UNDO_FOLDER
            raise OutputRefused(path, "is no folder of yours, and what is kept must lie there", "Have it removed.")
        self.beside.make_folder(name, 0o700)

    def take_back(self, before: Kept | None) -> None:
        """Undo a ``keep`` after which nothing was changed."""
        kept = self.read()
        if kept is None:
            return
        if before is None:
            self.forget(kept)
            return
        self.notes.write("undo", asdict(before))
        for name in set(kept.saved) - set(before.saved):
            self.beside.remove(self.place(kept, name))

    def settle(self) -> None:
        """Note how a mending has left the folder."""
        kept = self.read()
        if kept is not None:
            kept.left = {name: found for name in kept.names if (found := _state(self.root, name)) is not None}
            kept.pending = []
            self.notes.write("undo", asdict(kept))

    def is_back(self, kept: Kept, name: str) -> bool:
        """Say whether a file is as it was before the first mending."""
        return _state(self.root, name) == kept.kept.get(name)

    def forget(self, kept: Kept | None = None) -> None:
        """Remove what is kept, once it is noted that nothing is: a run that is killed then leaves no more to do."""
        kept = kept or self.read()
        if kept is None:
            return
        self.notes.write("undo", asdict(Kept(kept.token)))
        self.beside.remove_tree(self.place(kept))
        try:
            self.beside.remove_folder(UNDO_FOLDER)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOTDIR):  # another folder's files, or what is not ours
                raise
        self.notes.remove("undo")


def _check_types(kept: Kept) -> None:
    for names in (kept.saved, kept.made, kept.pending, list(kept.kept), list(kept.left)):
        for name in names:
            plain_parts(name)
    if len(plain_parts(kept.token)) != 1:
        raise ValueError("a token that is none")


def _state(root: Root, name: str) -> State | None:
    found = root.stat(name)
    if found is None:
        return None
    is_link = stat.S_ISLNK(found.st_mode)
    return [found.st_size, 0 if is_link else found.st_mtime_ns, int(is_link)]

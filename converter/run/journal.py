"""The steps of a commit: noted in the user's state folder before the first of them, and each can be done twice.

Replaced indexes go away first, weight files come in, new indexes last, then what they replace goes; so at every
instant the folder holds the old set, the new set, or no index, and never an index over the wrong bytes. A new folder
appears by one rename.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from converter.errors import OutputRefused
from converter.models.names import parse_name
from converter.plan.types import Plan
from converter.run.kept import Keeper
from converter.run.notes import Notes
from converter.storage.local import is_there, place_at, real
from converter.storage.root import Root, plain_parts

SUFFIX = ".wconv"  # with a dot: Diffusers takes the second dotted part of each name in a folder for a variant
TREE = "files"
_COARSE_NS = 2_000_000_000  # what exFAT tells times to
_MY_NAME = re.compile(r"\.staging-[0-9a-f]{32}\.wconv")

After = Literal["", "keep", "forget"]
"""What is to be done with what a mending keeps, once a commit is through."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What a commit does to a folder; names are paths from it.

    ``move`` are staged files that take their places, indexes last. Of the names that they replace indexes go first,
    and what is not written anew goes last; ``sources`` go after that: paths from the folder ``source``. Other names are
    free, or may be overwritten. With ``after`` "keep" what changes is kept before, and with "forget" what was kept goes
    afterwards.
    """

    move: tuple[str, ...]
    replaced: tuple[str, ...] = ()
    overwrite: bool = False
    source: Path | None = None
    sources: tuple[str, ...] = ()
    after: After = ""

    @classmethod
    def of(cls, plan: Plan, keep: bool) -> Changes:
        """Give what a plan does to its target."""
        sources = [place.relative_to(plan.source.root) for place in plan.removed_sources]
        return cls(
            plan.names,
            tuple(dict.fromkeys(plan.replaced)),
            plan.overwrite,
            plan.source.real.path if sources else None,
            tuple(sorted(sources, key=is_index, reverse=True)),  # no index over shards that are gone
            "keep" if keep else "",
        )

    @property
    def first_away(self) -> tuple[str, ...]:
        return tuple(filter(is_index, self.replaced))

    @property
    def last_away(self) -> tuple[str, ...]:
        return tuple(name for name in self.replaced if not is_index(name) and name not in self.move)


def is_index(name: str) -> bool:
    """Say whether a path is that of an index, by its name."""
    parsed = parse_name(name.rpartition("/")[2])
    return parsed is not None and parsed.role == "index"


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or a link as it was when a commit began: what has come in its place since is told from it."""

    name: str
    nbytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def at(cls, root: Root, name: str, staged: str = "") -> Entry | None:
        """Note an entry; one that is ``staged`` is noted by the name that it will have."""
        found = root.stat(staged or name)
        return found and cls.of(name, found)

    @classmethod
    def of(cls, name: str, found: os.stat_result) -> Entry:
        return cls(name, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def is_published(self, root: Root) -> bool:
        """Say whether it has its place: a rename keeps size and time, a copy as far as its disk can tell times."""
        found = root.stat(self.name)
        return bool(found and found.st_size == self.nbytes and abs(found.st_mtime_ns - self.mtime_ns) <= _COARSE_NS)

    def remove(self, root: Root, published: set[tuple[int, int]]) -> None:
        """Remove the file if it is still that one; a second name of a published file has changed by the rename."""
        found = root.stat(self.name)
        if found and (Entry.of(self.name, found) == self or _identity(found) in published):
            root.remove(self.name)


@dataclass(frozen=True, slots=True)
class Journal:
    """The steps of a commit that has begun; each can be done twice. Fields are as in Changes."""

    request: str
    first_away: tuple[Entry, ...]
    move: tuple[Entry, ...]
    last_away: tuple[Entry, ...]
    source: str
    sources: tuple[Entry, ...]
    after: After

    @property
    def destroys(self) -> bool:
        return bool(self.first_away or self.last_away or self.sources)

    @classmethod
    def read(cls, raw: Any) -> Journal:
        entries = {
            key: tuple(Entry(**one) for one in raw[key]) for key in ("first_away", "move", "last_away", "sources")
        }
        for entry in (entry for group in entries.values() for entry in group):
            plain_parts(entry.name)
            if not all(type(number) is int for number in (entry.nbytes, entry.mtime_ns, entry.ctime_ns)):
                raise ValueError("a size or a time that is none")
        return cls(str(raw["request"]), source=str(raw["source"]), after=raw["after"], **entries)


@dataclass(frozen=True, slots=True)
class Run:
    """What is noted of a run: the folder ``name`` below ``place`` that it stages in, and what it began to publish.

    ``finished`` is the request of one that was through, and could not clear up; ``request`` that of one that stages.
    """

    place: str
    name: str
    is_new: bool
    journal: Journal | None = None
    finished: str = ""
    request: str = ""

    @classmethod
    def read(cls, notes: Notes) -> Run | None:
        """Give what is noted. Raises BadFile for a note that cannot be understood."""
        raw = notes.read("run")
        if raw is None:
            return None
        try:
            journal = Journal.read(raw["journal"]) if raw["journal"] is not None else None
            requests = str(raw.get("finished", "")), str(raw.get("request", ""))
            run = cls(raw["place"], raw["name"], raw["is_new"], journal, *requests)
            if not (_MY_NAME.fullmatch(run.name) and Path(run.place).is_absolute() and type(run.is_new) is bool):
                raise ValueError("it names no folder of a run")
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise notes.unreadable("run", error) from None
        return run

    def staged(self, name: str = "") -> str:
        """Name a staged file, from ``place``."""
        return f"{self.name}/{TREE}/{name}" if name else f"{self.name}/{TREE}"

    def clear(self) -> None:
        """Remove all that is staged."""
        with Root(Path(self.place)) as root:
            root.remove_tree(self.name)


class OvertakenError(OutputRefused):
    """What a stopped run had published is another by now: what it replaces must stay."""


def finish(notes: Notes, run: Run) -> bool:
    """Carry out the steps of a journal, those already done included; False if its output has been removed since."""
    journal = run.journal
    assert journal is not None
    with Root(Path(run.place)) as root:
        if run.is_new and root.stat(run.staged()) is not None:
            if is_there(notes.folder):
                advice = "Move it elsewhere, and run this again to finish."
                raise OutputRefused(notes.folder, "was made while a run published its output there", advice)
            root.replace(run.staged(), root, notes.folder.name)
            root.sync()
        if not place_at(notes.folder).is_folder():
            return False  # then nothing that it replaces may go
        with Root(notes.folder) as target:
            if not run.is_new:
                staged = {entry for entry in journal.move if root.stat(run.staged(entry.name)) is not None}
                _check_published(target, set(journal.move) - staged)
                _remove_all(target, journal.first_away, set())
                _move_in(root, run, target, journal.move)
            _check_published(target, journal.move)
            published = {_identity(found) for entry in journal.move if (found := target.stat(entry.name))}
            _remove_all(target, journal.last_away, published)
        if journal.sources and _is_where_it_was(Path(journal.source)):
            with Root(Path(journal.source)) as source:
                _remove_all(source, journal.sources, set())
    if journal.after:
        with Keeper(notes) as keeper:
            keeper.settle() if journal.after == "keep" else keeper.forget()
    return True


def _is_where_it_was(folder: Path) -> bool:
    """Say whether a folder is there by its real path; one that was moved or removed holds nothing that is to go."""
    return place_at(folder).is_folder() and real(folder) == folder


def _move_in(root: Root, run: Run, target: Root, entries: Iterable[Entry]) -> None:
    folders = {""}
    for entry in entries:
        folder = entry.name.rpartition("/")[0]
        if folder not in folders:
            target.make_folder(folder)
            folders.add(folder)
        if root.stat(run.staged(entry.name)) is not None:
            _move(root, run.staged(entry.name), target, entry.name, run.name)
    for folder in sorted(folders):
        target.sync(folder)


def _check_published(target: Root, entries: Iterable[Entry]) -> None:
    lost = next((entry for entry in entries if not entry.is_published(target)), None)
    if lost is not None:
        advice = "Nothing that it replaces was removed. Run this again."
        raise OvertakenError(target.path / lost.name, "was published by a run that was stopped, and is another", advice)


def _remove_all(root: Root, doomed: Iterable[Entry], published: set[tuple[int, int]]) -> None:
    """Remove files, and bring that to the disk."""
    folders = set()
    for one in doomed:
        one.remove(root, published)
        folders.add(one.name.rpartition("/")[0])
    for folder in sorted(folders):
        root.sync(folder)


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _move(root: Root, staged: str, target: Root, name: str, beside: str) -> None:
    """Rename a file into place; where that is on another disk, through a copy beside it."""
    try:
        root.replace(staged, target, name)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        folder = name.rpartition("/")[0]
        copied = f"{folder}/{beside}" if folder else beside
        target.remove(copied)  # of a run that was killed
        root.link(staged, target, copied)  # a copy, or the same link
        target.replace(copied, target, name)
        root.remove(staged)

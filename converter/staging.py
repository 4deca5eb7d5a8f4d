"""Writing beside the target, and publishing all of it or nothing.

A run stages its files in a hidden folder on the target's own disk: beside a new folder, inside one that is there. A
new folder appears by one rename. Into a folder that is there, files are renamed one by one: superseded indexes away,
weight files in, new indexes last, then what they replace removed; so at every instant the folder holds the old set, the
new set, or no index, and never an index over the wrong bytes.

Where a run stages, and the steps of a commit that has begun, is noted in the user's state folder (``state.Notes``)
before it is done; nothing that lies in the target is ever taken for such a note, as it may have come with a download.
After a failure the staging folder is removed. After a hard kill it stays: the next run with the same target finds the
files in it and takes them up (their bytes are held against the source, not trusted), and where the kill fell into the
renames, the note says how to finish those first. What is published over something, or before something is removed, is
brought to the disk first: the data, the note, the renames, and only then is anything removed.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from converter.errors import OutputRefused, SystemRefused, WconvError
from converter.folder import ModelFolder
from converter.kept import Keeper
from converter.local import Root, plain_parts, write_all
from converter.names import parse_name
from converter.paths import is_dangling, real, refuse_linked
from converter.plan import Plan, Target
from converter.signals import signals_held
from converter.state import Notes, make_token

_SUFFIX = ".wconv"  # with a dot: Diffusers takes the second dotted part of each name in a folder for a variant
_TREE = "files"
_COARSE_NS = 2_000_000_000  # what exFAT tells times to
_RESERVE_NBYTES = 1 << 20  # room for the journal and the folders themselves
_MY_NAME = re.compile(r"\.staging-[0-9a-f]{32}\.wconv")
_LIKE_MINE = re.compile(r"\..+\.wconv(\.json)?")  # of this version, or of the first one

After = Literal["", "keep", "forget"]
"""What is to be done with what a mending keeps, once a commit is through."""


def open_target(folder: ModelFolder, output: Path | None, overwrite: bool) -> Target:
    """Say where a conversion's files go: beside the source, or to ``output``, which for a folder must be a new one.

    A single set goes into a folder that is there, too. Raises OutputRefused where the output is there, or is the input.
    """
    if output is None:
        return Target(folder.root, is_new=False)
    if not output.exists():
        return Target(output, is_new=True)
    if not output.is_dir():
        raise OutputRefused(output, "exists and is no folder", "Name a folder for the output.")
    if folder.kind != "file":
        if output.samefile(folder.root):
            raise OutputRefused(output, "is the source itself", "Leave -o out to add files beside it.")
        if folder.root.resolve().is_relative_to(output.resolve()):
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
        refuse_linked(plan.source.root, path.relative_to(plan.source.root).as_posix())


def _is_same(path: Path, other: Path) -> bool:
    return os.path.lexists(path) and os.path.lexists(other) and os.path.samestat(os.lstat(path), os.lstat(other))


def _refuse_blocked(folder: Path, name: str) -> None:
    """Raise OutputRefused for a file that cannot be renamed into place, which would stop a commit halfway."""
    if (folder / name).is_dir() and not (folder / name).is_symlink():
        raise OutputRefused(folder / name, "is a folder, and a file is to go there", "Move it elsewhere.")
    for parent in list(Path(name).parents)[:-1]:
        if (folder / parent).exists() and not (folder / parent).is_dir():
            raise OutputRefused(folder / parent, "is no folder, and files are to go into it", "Move it elsewhere.")


@dataclass(frozen=True, slots=True)
class Changes:
    """What a commit does to a folder; names are paths from it.

    ``move`` are staged files that take their places, indexes last. Of the names that they supersede indexes go first,
    and what is not written anew goes last; ``sources`` go after that: paths from the folder ``source``. Other names are
    free, or may be overwritten. With ``after`` "keep" what changes is kept before, and with "forget" what was kept goes
    afterwards.
    """

    move: tuple[str, ...]
    superseded: tuple[str, ...] = ()
    overwrite: bool = False
    source: Path | None = None
    sources: tuple[str, ...] = ()
    after: After = ""

    @classmethod
    def of(cls, plan: Plan, keep: bool) -> Changes:
        """Give what a plan does to its target."""
        names = (*(name for name, _ in (*plan.carried, *plan.edited)), *(shard.path for shard in plan.shards))
        sources = [path.relative_to(plan.source.root).as_posix() for path in plan.delete]
        return cls(
            tuple(dict.fromkeys((*names, *(name for name, _ in plan.indexes)))),
            tuple(dict.fromkeys(plan.superseded)),
            plan.wishes.overwrite,
            plan.source.real,
            tuple(sorted(sources, key=is_index, reverse=True)),  # no index over shards that are gone
            "keep" if keep else "",
        )

    @property
    def first_away(self) -> tuple[str, ...]:
        return tuple(filter(is_index, self.superseded))

    @property
    def last_away(self) -> tuple[str, ...]:
        return tuple(name for name in self.superseded if not is_index(name) and name not in self.move)


def is_index(name: str) -> bool:
    """Say whether a path is that of an index, by its name."""
    parsed = parse_name(name.rpartition("/")[2])
    return parsed is not None and parsed.role == "index"


@dataclass(frozen=True, slots=True)
class _Entry:
    """A file or a link as it was when a commit began: what has come in its place since is told from it."""

    name: str
    nbytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def at(cls, root: Root, name: str, staged: str = "") -> _Entry | None:
        """Note an entry; one that is ``staged`` is noted by the name that it will have."""
        found = root.stat(staged or name)
        return found and cls(name, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def is_published(self, root: Root) -> bool:
        """Say whether it has its place: a rename keeps size and time, a copy as far as its disk can tell times."""
        found = root.stat(self.name)
        return bool(found and found.st_size == self.nbytes and abs(found.st_mtime_ns - self.mtime_ns) <= _COARSE_NS)

    def remove(self, root: Root, published: set[tuple[int, int]]) -> None:
        """Remove the file if it is still that one; a second name of a published file has changed by the rename."""
        found = root.stat(self.name)
        if found and (_Entry.at(root, self.name) == self or _identity(found) in published):
            root.remove(self.name)


@dataclass(frozen=True, slots=True)
class _Journal:
    """The steps of a commit that has begun; each can be done twice. Fields are as in Changes."""

    request: str
    first_away: tuple[_Entry, ...]
    move: tuple[_Entry, ...]
    last_away: tuple[_Entry, ...]
    source: str
    sources: tuple[_Entry, ...]
    after: After

    @property
    def destroys(self) -> bool:
        return bool(self.first_away or self.last_away or self.sources)

    @classmethod
    def read(cls, raw: Any) -> _Journal:
        entries = {
            key: tuple(_Entry(**one) for one in raw[key]) for key in ("first_away", "move", "last_away", "sources")
        }
        for entry in (entry for group in entries.values() for entry in group):
            plain_parts(entry.name)
            if not all(type(number) is int for number in (entry.nbytes, entry.mtime_ns, entry.ctime_ns)):
                raise ValueError("a size or a time that is none")
        return cls(str(raw["request"]), source=str(raw["source"]), after=raw["after"], **entries)


@dataclass(frozen=True, slots=True)
class _Run:
    """What is noted of a run: the folder ``name`` below ``place`` that it stages in, and what it began to publish.

    ``finished`` is the request of one that was through, and could not clear up.
    """

    place: str
    name: str
    is_new: bool
    journal: _Journal | None = None
    finished: str = ""

    @classmethod
    def read(cls, notes: Notes) -> _Run | None:
        """Give what is noted. Raises BadFile for a note that cannot be understood."""
        raw = notes.read("run")
        if raw is None:
            return None
        try:
            journal = _Journal.read(raw["journal"]) if raw["journal"] is not None else None
            run = cls(raw["place"], raw["name"], raw["is_new"], journal, str(raw.get("finished", "")))
            if not (_MY_NAME.fullmatch(run.name) and Path(run.place).is_absolute() and type(run.is_new) is bool):
                raise ValueError("it names no folder of a run")
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise notes.unreadable("run", error) from None
        return run

    def staged(self, name: str = "") -> str:
        """Name a staged file, from ``place``."""
        return f"{self.name}/{_TREE}/{name}" if name else f"{self.name}/{_TREE}"

    def clear(self) -> None:
        """Remove all that is staged."""
        with Root(Path(self.place)) as root:
            root.remove_tree(self.name)


class Staging:
    """The staging folder of one target, locked against other runs while it is open. Use through ``open_staging``.

    ``finished_request`` is that of a killed run whose commit was finished when it was opened, ``left_over`` says what
    could not be cleared up in the end.
    """

    def __init__(self, target: Target, notes: Notes) -> None:
        self.target = target
        self.notes = notes
        self.left_over = ""
        self._is_through = False
        self._run, self.finished_request = _take_up(target, notes)
        self.folder = Path(self._run.place) / self._run.name
        self.tree = self.folder / _TREE

    def __enter__(self) -> Staging:
        """Make the folder to stage in, which nobody else may look into."""
        self._made = _make_folders(Path(self._run.place))
        try:
            self.root = Root(Path(self._run.place))
            self.root.make_folder(self._run.name, 0o700)
            self.root.make_folder(self._run.staged())
        except BaseException:
            _remove_empty([self.folder, *self._made])
            if not os.path.lexists(self.folder):  # what a killed run has staged there is for the next one
                self.notes.remove("run")
            raise
        return self

    @property
    def is_committing(self) -> bool:
        return self._run.journal is not None

    def path_of(self, name: str) -> Path:
        return self.tree / name

    def has_left_over(self, name: str, nbytes: int) -> bool:
        """Say whether an earlier run left a file of this size, which is no second name of another."""
        found = self.root.stat(self._run.staged(name))
        is_file = found is not None and stat.S_ISREG(found.st_mode)
        return bool(found and is_file and found.st_size == nbytes and found.st_nlink == 1)

    def drop_strangers(self, names: set[str]) -> None:
        """Remove what an earlier run left and this one does not write."""
        for name, found in list(self.root.walk(self._run.staged())):
            if not stat.S_ISDIR(found.st_mode) and name.removeprefix(self._run.staged() + "/") not in names:
                self.root.remove(name)

    def drop_second_names(self) -> None:
        """Remove what an earlier run staged by a second name of a file, which changes what its stamp says.

        And all folders, where that leaves no file.
        """
        files = [(name, found) for name, found in self.root.walk(self._run.staged()) if not stat.S_ISDIR(found.st_mode)]
        second = [name for name, found in files if stat.S_ISREG(found.st_mode) and found.st_nlink > 1]
        for name in second:
            self.root.remove(name)
        if len(second) == len(files):
            self.remove()

    def prepare(self, name: str, header: bytes, nbytes: int) -> None:
        """Make a file of its final size that begins with a header; what an earlier run left of it stays in it."""
        staged = self._make_way(name)
        if not self.has_left_over(name, nbytes):
            self.root.remove(staged)  # perhaps a second name of a source
        with self.root.open(staged, os.O_RDWR | os.O_CREAT) as file:
            write_all(file, header)
            os.ftruncate(file, nbytes)

    def put(self, name: str, content: bytes) -> None:
        """Stage a small file."""
        self.root.put(self._make_way(name), content)

    def copy(self, name: str, source: BinaryIO) -> None:
        """Stage a copy of an open file."""
        self.root.take(source.fileno(), self._make_way(name))

    def link(self, name: str, root: Root, source: str) -> None:
        """Stage a second name of a file, or a second link where it is a link."""
        staged = self._make_way(name)
        self.root.remove(staged)
        root.link(source, self.root, staged)

    def _make_way(self, name: str) -> str:
        staged = self._run.staged(name)
        self.root.make_folder(staged.rpartition("/")[0])
        return staged

    def commit(self, changes: Changes, request: str) -> None:
        """Publish all staged files, then remove what they supersede and the sources that are to go.

        Raises OutputRefused where a file has come in the place of one of them meanwhile, SystemRefused where a staged
        file is gone.
        """
        with ExitStack() as stack:
            target = None if self._run.is_new else stack.enter_context(Root(self.notes.folder))
            self._check(changes, target)
            keeper = stack.enter_context(Keeper(self.notes)) if changes.after == "keep" else None
            before = keeper.current() if keeper else None
            try:
                if keeper:
                    keeper.keep((*changes.superseded, *changes.move))
                journal = self._make_journal(changes, target, request)
                if journal.destroys:
                    # What replaces the only other copy must be on the disk, not in a cache.
                    self.root.sync_tree(self._run.name)
                    self.root.sync()
                with signals_held():
                    self._note(replace(self._run, journal=journal))
                    _finish(self.notes, self._run)
                    self._is_through = True
            except BaseException:
                if keeper and not self.is_committing:
                    keeper.take_back(before)
                raise

    def _note(self, run: _Run) -> None:
        try:
            self.notes.write("run", asdict(run))
        except BaseException:
            # It may be noted all the same: then the next run finishes it.
            if _Run.read(self.notes) == run:
                self._run = run
            raise
        self._run = run

    def _check(self, changes: Changes, target: Root | None) -> None:
        """Look once more whether all is there, and whether anybody has put a file where one is to go."""
        for name in changes.move:
            if self.root.stat(self._run.staged(name)) is None:
                raise SystemRefused(self.path_of(name), "was staged, and is gone", "Run it again.")
        taken = None
        if target is None:
            taken = self.notes.folder if os.path.lexists(self.notes.folder) else None
        elif not changes.overwrite:
            names = (name for name in changes.move if name not in changes.superseded and target.stat(name))
            taken = next((target.path / name for name in names), None)
        if taken is not None:
            raise OutputRefused(taken, "was made while this ran", "Use --overwrite to replace it, or another -o.")

    def _make_journal(self, changes: Changes, target: Root | None, request: str) -> _Journal:
        def note(root: Root | None, names: Iterable[str]) -> tuple[_Entry, ...]:
            return tuple(entry for name in names if root and (entry := _Entry.at(root, name)))

        staged = (_Entry.at(self.root, name, self._run.staged(name)) for name in changes.move)
        with ExitStack() as stack:
            source = stack.enter_context(Root(changes.source)) if changes.sources and changes.source else None
            return _Journal(
                request,
                note(target, changes.first_away),
                tuple(filter(None, staged)),
                note(target, changes.last_away),
                str(source.path) if source else "",
                note(source, changes.sources),
                changes.after,
            )

    def remove(self) -> None:
        """Remove all that is staged."""
        self.root.remove_tree(self._run.staged())

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Clear up, and forget the run; ``left_over`` names what cannot go. What a commit has begun stays."""
        with signals_held():
            self._clear_up(error)

    def _clear_up(self, error: BaseException | None) -> None:
        try:
            if error is None or self._is_through:
                self._close()
            elif not self.is_committing:
                self.remove()
                self._close()
        except OSError as problem:
            noted = self.notes.path_of("run")
            left = f"{self.folder}, noted in {noted}," if os.path.lexists(self.folder) else str(noted)
            self.left_over = f"{left} cannot be removed ({problem.strerror or problem}): the next run here does it"
        finally:
            self.root.__exit__(None, None, None)
        if error is not None:
            _remove_empty(self._made)

    def _close(self) -> None:
        journal = self._run.journal
        if journal is not None:
            try:
                self._run.clear()
            except OSError:
                # The commit is through: the next run must not do it again, just clear up.
                with suppress(OSError):
                    self.notes.write("run", asdict(replace(self._run, journal=None, finished=journal.request)))
                raise
        try:
            self.root.remove_folder(self._run.name)
        except OSError as problem:
            if problem.errno == errno.ENOTEMPTY:
                return  # what is staged there is for the next run
            raise
        self.notes.remove("run")


def _take_up(target: Target, notes: Notes) -> tuple[_Run, str | None]:
    """Find out where a run stages, and note it; finish what a killed run had begun to publish, and give its request."""
    place = notes.folder.parent if target.is_new else notes.folder
    run = _Run.read(notes)
    if run is not None and not Path(run.place).is_dir():
        run = None  # the folder is gone, and what was staged with it
    finished = run.finished or None if run is not None else None
    if run is not None and run.journal is not None:
        try:
            finished = run.journal.request if _finish(notes, run) else None
        except _OvertakenError:
            run.clear()
            notes.remove("run")
            raise
    if run is not None and (
        run.journal is not None or run.finished or (run.place, run.is_new) != (str(place), target.is_new)
    ):
        run.clear()
        run = None
    run = run or _Run(str(place), f".staging-{make_token()}{_SUFFIX}", target.is_new)
    notes.write("run", asdict(run))
    return run, finished


class _OvertakenError(OutputRefused):
    """What a stopped run had published is another by now: what it replaces must stay."""


def _finish(notes: Notes, run: _Run) -> bool:
    """Carry out the steps of a journal, those already done included; False if its output has been removed since."""
    journal = run.journal
    assert journal is not None
    with Root(Path(run.place)) as root:
        if run.is_new and root.stat(run.staged()) is not None:
            if os.path.lexists(notes.folder):
                advice = "Move it elsewhere, and run this again to finish."
                raise OutputRefused(notes.folder, "was made while a run published its output there", advice)
            root.replace(run.staged(), root, notes.folder.name)
            root.sync()
        if not notes.folder.is_dir():
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
                _remove_all(source, journal.sources, published)
    if journal.after:
        with Keeper(notes) as keeper:
            keeper.settle() if journal.after == "keep" else keeper.forget()
    return True


def _is_where_it_was(folder: Path) -> bool:
    """Say whether a folder is there by its real path; one that was moved or removed holds nothing that is to go."""
    return folder.is_dir() and real(folder) == folder


def _move_in(root: Root, run: _Run, target: Root, entries: Iterable[_Entry]) -> None:
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


def _check_published(target: Root, entries: Iterable[_Entry]) -> None:
    lost = next((entry for entry in entries if not entry.is_published(target)), None)
    if lost is not None:
        advice = "Nothing that it replaces was removed. Run this again."
        raise _OvertakenError(
            target.path / lost.name, "was published by a run that was stopped, and is another", advice
        )


def _remove_all(root: Root, doomed: Iterable[_Entry], published: set[tuple[int, int]]) -> None:
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


def find_strangers(*folders: Path) -> tuple[str, ...]:
    """Say of each entry that looks like one of a run's, and is of no run of this user, that it is ignored."""
    found: dict[Path, None] = {}
    for folder in filter(Path.is_dir, folders):
        run = _Run.read(Notes(real(folder)))
        own = run.name if run else ""
        found |= dict.fromkeys(sorted(p for p in folder.iterdir() if _LIKE_MINE.fullmatch(p.name) and p.name != own))
    what = "is of no run that is noted here, and is ignored: look whether it holds weights that you miss, and remove it"
    return tuple(f"{path} {what}" for path in found)


@contextmanager
def open_staging(target: Target) -> Iterator[Staging]:
    """Make a target's staging folder and lock it; on any error remove it again, with the folders made for it.

    Raises OutputRefused while another run holds it, SystemRefused where the place cannot be written.
    """
    staging = None
    try:
        notes = Notes(target.real)
        with notes.locked():
            staging = Staging(target, notes)
            with staging:
                yield staging
    except BaseException as error:
        known = error
        if isinstance(error, OSError) and not isinstance(error, SystemRefused):
            known = SystemRefused.from_os_error(error, error.filename or target.folder)
        if isinstance(known, WconvError) and staging is not None:
            begun = "Its renames had begun: run it again to finish them" if staging.is_committing else ""
            known.advice = " ".join(
                filter(None, (known.advice, *(f"{text}." for text in (begun, staging.left_over) if text)))
            )
        if known is error:
            raise
        raise known from error


def recover(folder: Path, request: str) -> bool:
    """Finish a commit into ``folder`` that a killed run had begun; True if that run was for the same request."""
    run = _Run.read(Notes(real(folder)))
    if run is None:
        return False
    with open_staging(Target(folder, run.is_new)) as staging:
        if run.journal is None and not run.finished:
            staging.drop_second_names()
            return False
        staging.remove()
    if staging.left_over:
        raise SystemRefused(folder, f"is finished, but {staging.left_over}")
    return staging.finished_request == request


def find_difference(plan: Plan) -> str:
    """Say what of a plan is not there yet; nothing where all is, by its headers and sizes, and younger than its source.

    A source counts as old as its last change of any kind: an archive or a copy may give it an earlier time.
    """
    folder = plan.target.folder
    read = [planned.source.folder / name for planned in plan.sets for name in planned.source.all_names]
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


def check_room(staging: Staging, plan: Plan) -> None:
    """Raise SystemRefused where a folder cannot be written, or the disk has less room than the plan still takes."""
    effective = os.access in os.supports_effective_ids
    written = {(plan.target.folder / shard.path).parent for shard in plan.shards}
    for folder in sorted(written | {path.parent for path in plan.delete}):
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK, effective_ids=effective):
            raise SystemRefused(folder, "cannot be written", "Change its permissions, or write elsewhere with -o.")
    missing = sum(
        shard.nbytes
        for shard in plan.shards
        if shard.link is None and not staging.has_left_over(shard.path, shard.nbytes)
    )
    missing += sum(path.stat().st_size for _, path in plan.carried)
    missing += sum(len(content) for _, content in plan.texts) + _RESERVE_NBYTES
    free = shutil.disk_usage(staging.folder).free
    if missing > free:
        raise SystemRefused(
            plan.target.folder,
            f"needs {missing / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB left",
            "Free some room, or write elsewhere with -o.",
        )


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and its parents; give those that were not there, innermost first."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    if missing:
        with Root(missing[-1].parent) as root:
            try:
                root.make_folder(folder.relative_to(root.path).as_posix())
            except OSError:
                _remove_empty(missing)
                raise
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError), Root(folder.parent) as root:
            root.remove_folder(folder.name)

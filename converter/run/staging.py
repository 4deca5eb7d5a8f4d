"""Writing beside the target, and publishing all of it or nothing.

A run stages its files in a hidden folder on the target's own disk: beside a new folder, inside one that is there; then
it publishes them (``journal``).

Where a run stages, and the steps of a commit that has begun, is noted in the user's state folder (``notes.Notes``)
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
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

from converter.errors import OutputRefused, SystemRefused, WconvError
from converter.plan.types import Target
from converter.run.journal import SUFFIX, Changes, Entry, Journal, OvertakenError, Run, finish
from converter.run.kept import Keeper
from converter.run.notes import Notes, make_token
from converter.run.signals import signals_held
from converter.storage import OpenFile, Place
from converter.storage.local import LocalFile, can_write, free_nbytes, is_local, is_there, place_at
from converter.storage.root import Root, make_folders, remove_empty, write_all

_RESERVE_NBYTES = 1 << 20  # room for the journal and the folders themselves
_LIKE_MINE = re.compile(r"\..+\.wconv(\.json)?")  # of this version, or of the first one


class Staging:
    """The staging folder of one target, locked against other runs while it is open. Use through ``open_staging``.

    ``finished_request`` is that of a killed run whose commit was finished when it was opened, ``left_over`` says what
    could not be cleared up in the end.
    """

    def __init__(self, target: Target, notes: Notes, request: str = "") -> None:
        self.target = target
        self.notes = notes
        self.left_over = ""
        self._is_through = False
        self._run, self.finished_request = _take_up(target, notes, request)
        self.folder = Path(self._run.place) / self._run.name

    def __enter__(self) -> Staging:
        """Make the folder to stage in, which nobody else may look into."""
        self._made = make_folders(Path(self._run.place))
        try:
            with ExitStack() as closing:
                self.root = closing.enter_context(Root(Path(self._run.place)))
                self.root.make_folder(self._run.name, 0o700)
                self.root.make_folder(self._run.staged())
                closing.pop_all()  # it stays open until this is left
        except BaseException:
            remove_empty([self.folder, *self._made])
            if not is_there(self.folder):  # what a killed run has staged there is for the next one
                self.notes.remove("run")
            raise
        return self

    @property
    def is_committing(self) -> bool:
        return self._run.journal is not None

    def staged(self, name: str) -> Place:
        return place_at(Path(self._run.place) / self._run.staged(name))

    def expect(self, parts: Mapping[str, int], others: Mapping[str, int], removed: Iterable[Place]) -> None:
        """Remove what an earlier run left and this one does not write, and see whether there is room for the rest.

        Raises SystemRefused where there is not, or a folder cannot be written.
        """
        self.drop_strangers({*parts, *others})
        folders = {(self.target.folder / name).parent for name in (*parts, *others)}
        for folder in sorted(folders.union(place.parent for place in removed)):
            if folder.exists() and not can_write(folder.path):
                raise SystemRefused(folder, "cannot be written", "Change its permissions, or write elsewhere with -o.")
        missing = sum(nbytes for name, nbytes in parts.items() if not self.has_left_over(name, nbytes))
        missing += sum(others.values()) + _RESERVE_NBYTES
        free = free_nbytes(self.folder)
        if missing > free:
            problem = f"needs {missing / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB left"
            raise SystemRefused(self.target.folder, problem, "Free some room, or write elsewhere with -o.")

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

    def prepare(self, name: str, header: bytes, nbytes: int) -> bool:
        """Make a file of its final size that begins with a header; what an earlier run left of it stays in it."""
        staged = self._make_way(name)
        is_left_over = self.has_left_over(name, nbytes)
        if not is_left_over:
            self.root.remove(staged)  # perhaps a second name of a source
        with self.root.open(staged, os.O_RDWR | os.O_CREAT) as file:
            write_all(file, header)
            os.ftruncate(file, nbytes)
        return is_left_over

    def put(self, name: str, content: bytes) -> None:
        """Stage a small file."""
        self.root.fill(self._make_way(name), (content,))

    def copy(self, name: str, source: OpenFile) -> None:
        """Stage a copy of an open file."""
        if isinstance(source, LocalFile):
            self.root.take(source.handle, self._make_way(name))
        else:
            self.root.fill(self._make_way(name), source.chunks())

    def link(self, name: str, source: Place) -> None:
        """Stage a second name of a file, or a second link where it is a link."""
        with Root(source.parent.real().path) as root:
            self.link_from(root, source.name, name)

    def link_from(self, root: Root, source: str, name: str) -> None:
        """Stage a second name of a file below a folder that is open."""
        staged = self._make_way(name)
        self.root.remove(staged)
        root.link(source, self.root, staged)

    def _make_way(self, name: str) -> str:
        staged = self._run.staged(name)
        self.root.make_folder(staged.rpartition("/")[0])
        return staged

    def commit(self, changes: Changes, request: str) -> None:
        """Publish all staged files, then remove what they replace and the sources that are to go.

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
                    keeper.keep((*changes.replaced, *changes.move), before)
                journal = self._make_journal(changes, target, request)
                if journal.destroys:
                    # What replaces the only other copy must be on the disk, not in a cache.
                    self.root.sync_tree(self._run.name)
                    self.root.sync()
                with signals_held():
                    self._note(replace(self._run, journal=journal))
                    finish(self.notes, self._run)
                    self._is_through = True
            except BaseException:
                if keeper and not self.is_committing:
                    keeper.take_back(before)
                raise

    def _note(self, run: Run) -> None:
        try:
            self.notes.write("run", asdict(run))
        except BaseException:
            # It may be noted all the same: then the next run finishes it.
            if Run.read(self.notes) == run:
                self._run = run
            raise
        self._run = run

    def _check(self, changes: Changes, target: Root | None) -> None:
        """Look once more whether all is there, and whether anybody has put a file where one is to go."""
        for name in changes.move:
            if self.root.stat(self._run.staged(name)) is None:
                raise SystemRefused(self.staged(name), "was staged, and is gone", "Run it again.")
        taken = None
        if target is None:
            taken = self.notes.folder if is_there(self.notes.folder) else None
        elif not changes.overwrite:
            names = (name for name in changes.move if name not in changes.replaced and target.stat(name))
            taken = next((target.path / name for name in names), None)
        if taken is not None:
            raise OutputRefused(taken, "was made while this ran", "Use --overwrite to replace it, or another -o.")

    def _make_journal(self, changes: Changes, target: Root | None, request: str) -> Journal:
        def note(root: Root | None, names: Iterable[str]) -> tuple[Entry, ...]:
            return tuple(entry for name in names if root and (entry := Entry.at(root, name)))

        staged = (Entry.at(self.root, name, self._run.staged(name)) for name in changes.move)
        with ExitStack() as stack:
            source = stack.enter_context(Root(changes.source)) if changes.sources and changes.source else None
            return Journal(
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
            left = f"{self.folder}, noted in {noted}," if is_there(self.folder) else str(noted)
            self.left_over = f"{left} cannot be removed ({problem.strerror or problem}): the next run here does it"
        finally:
            self.root.__exit__(None, None, None)
        if error is not None:
            remove_empty(self._made)

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


def _take_up(target: Target, notes: Notes, request: str) -> tuple[Run, str | None]:
    """Find out where a run stages, and note it; finish what a killed run had begun to publish, and give its request.

    What one with another request has staged is not taken up: a worker on another machine may still write into it.
    """
    place = notes.folder.parent if target.is_new else notes.folder
    run = Run.read(notes)
    if run is not None and not place_at(Path(run.place)).is_folder():
        run = None  # the folder is gone, and what was staged with it
    finished = run.finished or None if run is not None else None
    if run is not None and run.journal is not None:
        try:
            finished = run.journal.request if finish(notes, run) else None
        except OvertakenError:
            run.clear()
            notes.remove("run")
            raise
    expected = str(place), target.is_new, request
    if run is not None and (run.journal or run.finished or (run.place, run.is_new, run.request) != expected):
        run.clear()
        run = None
    run = run or Run(str(place), f".staging-{make_token()}{SUFFIX}", target.is_new, request=request)
    notes.write("run", asdict(run))
    return run, finished


def find_strangers(*folders: Place) -> tuple[str, ...]:
    """Say of each entry that looks like one of a run's, and is of no run of this user, that it is ignored."""
    found: list[Place] = []
    for folder in filter(Place.is_folder, filter(is_local, dict.fromkeys(folders))):
        run = Run.read(Notes(folder.real().path))
        own = run.name if run else ""
        found += (entry for entry in folder.entries() if _LIKE_MINE.fullmatch(entry.name) and entry.name != own)
    what = "is of no run that is noted here, and is ignored: look whether it holds weights that you miss, and remove it"
    return tuple(f"{entry} {what}" for entry in found)


@contextmanager
def open_staging(target: Target, request: str = "") -> Iterator[Staging]:
    """Make a target's staging folder and lock it; on any error remove it again, with the folders made for it.

    Raises OutputRefused while another run holds it, SystemRefused where the place cannot be written.
    """
    staging = None
    try:
        notes = Notes(target.real.path)
        with notes.locked():
            staging = Staging(target, notes, request)
            with staging:
                yield staging
    except BaseException as error:
        known = error
        if isinstance(error, OSError):
            known = SystemRefused.from_os_error(error, error.filename or target.folder)
        if isinstance(known, WconvError) and staging is not None:
            begun = "Its renames had begun: run it again to finish them" if staging.is_committing else ""
            known.advice = " ".join(
                filter(None, (known.advice, *(f"{text}." for text in (begun, staging.left_over) if text)))
            )
        if known is error:
            raise
        raise known from error


def recover(folder: Place, request: str) -> bool:
    """Finish a commit into ``folder`` that a killed run had begun; True if that run was for the same request."""
    run = Run.read(Notes(folder.real().path))
    if run is None:
        return False
    with open_staging(Target.at(folder, run.is_new), run.request) as staging:
        if run.journal is None and not run.finished:
            staging.drop_second_names()
            return False
        staging.remove()
    if staging.left_over:
        raise SystemRefused(folder, f"is finished, but {staging.left_over}")
    return staging.finished_request == request

"""Writing beside the target, and publishing all of it or nothing.

A run stages its files in a hidden folder on the target's own disk: beside a new folder, inside one that is there. A
new folder appears by one rename. Into a folder that is there, files are renamed one by one: superseded indexes away,
weight files in, new indexes last, then what they replace removed; so at every instant the folder holds the old set, the
new set, or no index, and never an index over the wrong bytes.

After a failure the staging folder is removed. After a hard kill it stays: the next run with the same target finds the
files in it and takes them up (their bytes are held against the source, not trusted), and where the kill fell into the
renames, a journal says how to finish those first.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from converter.errors import BadFile, OutputRefused, SystemRefused
from converter.folder import ModelFolder
from converter.paths import is_dangling, refuse_linked
from converter.plan import Plan, Target

_SUFFIX = ".wconv"  # with a dot: Diffusers takes the second dotted part of each name in a folder for a variant
_TREE = "files"
_LOCK = "lock"
_RESERVE_NBYTES = 1 << 20  # room for the journal and the folders themselves


def open_target(folder: ModelFolder, output: Path | None, overwrite: bool) -> Target:
    """Say where a conversion's files go: beside the source, or to ``output``, which for a folder must be a new one.

    A single set goes into a folder that is there, too. Raises OutputRefused where the output is there, is the input, or
    is a link that leads to nothing.
    """
    if output is None:
        return Target(folder.root, is_new=False)
    for place in filter(is_dangling, (output, *output.parents)):
        raise OutputRefused(place, "is a link to nothing", "Remove it, or name another folder.")
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

    And for one that writes where a link to nothing is, which no look at what is there has seen.
    """
    written = [*(shard.path for shard in plan.shards), *(name for name, _ in (*plan.texts, *plan.carried))]
    for name in (*plan.superseded, *written):
        refuse_linked(plan.target.folder, name)
    for name in () if plan.wishes.overwrite else written:
        if name not in plan.superseded and is_dangling(plan.target.folder / name):
            raise OutputRefused(plan.target.folder / name, "is a link to nothing", "Remove it, or use --overwrite.")
    for path in plan.delete:
        refuse_linked(plan.source.root, path.relative_to(plan.source.root).as_posix())


@dataclass(frozen=True, slots=True)
class _Doomed:
    """A file that is to go, as it was when that was decided; one that has come in its place since stays."""

    path: str
    nbytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def at(cls, path: Path) -> _Doomed:
        stat = path.lstat()
        return cls(str(path.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)

    def remove(self, published: set[tuple[int, int]]) -> None:
        """Remove the file if it is still that one; a second name of a published file has changed by the rename."""
        path = Path(self.path)
        with suppress(FileNotFoundError):
            stat = path.lstat()
            if _Doomed.at(path) == self or (stat.st_dev, stat.st_ino) in published:
                path.unlink()


@dataclass(frozen=True, slots=True)
class _Journal:
    """The steps of a commit that has begun; each can be done twice."""

    request: str
    is_new: bool
    first_away: tuple[_Doomed, ...]
    move: tuple[str, ...]
    last_away: tuple[_Doomed, ...]


class Staging:
    """The staging folder of one target, locked against other runs while it is open. Use through ``open_staging``."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.folder = _staging_folder(target)
        self.tree = self.folder / _TREE
        self.journal_path = self.folder.with_name(self.folder.name + ".json")
        self.finished_request: str | None = None
        self._staged_journal = self.folder / "journal.new"

    def path_of(self, name: str) -> Path:
        return self.tree / name

    def has_left_over(self, name: str, nbytes: int) -> bool:
        """Say whether an earlier run left a file of this size."""
        path = self.path_of(name)
        return path.is_file() and path.stat().st_size == nbytes

    def drop_strangers(self, names: set[str]) -> None:
        """Remove what an earlier run left and this one does not write."""
        for path in sorted(self.tree.rglob("*"), reverse=True):
            if path.is_file() and path.relative_to(self.tree).as_posix() not in names:
                path.unlink()

    def commit(self, plan: Plan, request: str) -> None:
        """Publish all staged files, then remove what they supersede and the sources that are to go."""
        target = plan.target.folder
        indexes = [name for name, _ in plan.indexes]
        moved = [*(name for name, _ in (*plan.carried, *plan.edited)), *(shard.path for shard in plan.shards), *indexes]
        self._check_free(plan, moved)
        superseded = [name for name in plan.superseded if (target / name).exists() or (target / name).is_symlink()]
        journal = _Journal(
            request=request,
            is_new=plan.target.is_new,
            first_away=tuple(_Doomed.at(target / name) for name in superseded if name.endswith(".json")),
            move=tuple(moved),
            last_away=(
                *(_Doomed.at(target / name) for name in superseded if not name.endswith(".json") and name not in moved),
                *(_Doomed.at(path) for path in plan.delete),
            ),
        )
        if journal.first_away or journal.last_away:
            _sync_tree(self.tree)  # what replaces the only other copy must be on the disk, not in a cache
        self._staged_journal.write_text(json.dumps(asdict(journal)), "utf-8")
        self._staged_journal.replace(self.journal_path)
        self.finish(journal)

    def _check_free(self, plan: Plan, names: list[str]) -> None:
        """Look once more whether anybody has put a file where one is to go."""
        target = plan.target.folder
        taken = target if plan.target.is_new and target.exists() else None
        if not plan.target.is_new and not plan.wishes.overwrite:
            taken = next((target / n for n in names if n not in plan.superseded and (target / n).exists()), None)
        if taken is not None:
            raise OutputRefused(taken, "was made while this ran", "Use --overwrite to replace it, or another -o.")

    def begin(self) -> None:
        """Make the folder ready, after finishing a commit that a killed run had begun."""
        journal = self.read_journal()
        if journal is not None:
            self.finish(journal)
            self.finished_request = journal.request
            self.journal_path.unlink()
        self.tree.mkdir(parents=True, exist_ok=True)

    def finish(self, journal: _Journal) -> None:
        """Carry out the steps of a journal, those already done included."""
        target = self.target.folder
        if journal.is_new:
            if self.tree.exists() and not target.exists():
                self.tree.rename(target)
        else:
            for doomed in journal.first_away:
                doomed.remove(set())
            for name in journal.move:
                if os.path.lexists(self.path_of(name)):  # a link may lead to nothing until it is in its place
                    (target / name).parent.mkdir(parents=True, exist_ok=True)
                    _move(self.path_of(name), target / name)
        published = {_identity(target / name) for name in journal.move if (target / name).exists()}
        for doomed in journal.last_away:
            doomed.remove(published)
        self.remove()

    def remove(self) -> None:
        """Remove all that is staged."""
        shutil.rmtree(self.tree, ignore_errors=True)
        self._staged_journal.unlink(missing_ok=True)

    def read_journal(self) -> _Journal | None:
        """Give the journal of a commit that has begun, if there is one."""
        try:
            raw = json.loads(self.journal_path.read_text("utf-8"))
            doomed = {key: tuple(_Doomed(**one) for one in raw[key]) for key in ("first_away", "last_away")}
            return _Journal(raw["request"], raw["is_new"], move=tuple(raw["move"]), **doomed)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise BadFile(self.journal_path, f"cannot be read ({error})", "Remove it.") from None


def _identity(path: Path) -> tuple[int, int]:
    stat = path.lstat()
    return stat.st_dev, stat.st_ino


def _move(source: Path, destination: Path) -> None:
    """Rename a file into place; where that is on another disk, through a copy beside it."""
    try:
        source.replace(destination)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = destination.with_name(f".{destination.name}{_SUFFIX}")
        shutil.copyfile(source, beside)
        beside.replace(destination)
        source.unlink()


def _staging_folder(target: Target) -> Path:
    """Name the folder in which a target's files are staged."""
    if target.is_new:
        absolute = target.folder.absolute()
        return absolute.parent / f".{absolute.name}{_SUFFIX}"
    return target.folder / f".staging{_SUFFIX}"


@contextmanager
def open_staging(target: Target) -> Iterator[Staging]:
    """Make a target's staging folder and lock it; on any error remove it again, with the folders made for it.

    Raises OutputRefused while another run holds it, SystemRefused where the place cannot be written.
    """
    staging = Staging(target)
    made = _make_folders(staging.folder)
    lock = FileLock(staging.folder / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise OutputRefused(target.folder, "is being written by another run", "Wait until that has ended.") from None
    except OSError as error:
        _remove_empty(made)
        raise SystemRefused.from_os_error(error, target.folder) from None
    done = False
    try:
        staging.begin()
        yield staging
        done = True
    except BaseException as error:
        # A commit that has begun is finished by the next run, not undone.
        if not staging.journal_path.exists():
            staging.remove()
        if isinstance(error, OSError) and not isinstance(error, SystemRefused):
            raise SystemRefused.from_os_error(error, error.filename or target.folder) from error
        raise
    finally:
        _release(lock)
        _remove_empty([staging.folder])
        if done:
            staging.journal_path.unlink(missing_ok=True)  # the very last: up to here, a killed run is taken up
        else:
            _remove_empty(made)


def _release(lock: FileLock) -> None:
    # Where an open file can be removed, it goes while it is held, so that nobody takes a lock that is about to go.
    path = Path(lock.lock_file)
    try:
        with suppress(OSError):
            path.unlink()
    finally:
        lock.release()
    with suppress(OSError):
        path.unlink(missing_ok=True)


def recover(folder: Path, request: str) -> bool:
    """Finish a commit into ``folder`` that a killed run had begun; True if that run was for the same request."""
    same = False
    for target in (Target(folder, is_new=True), Target(folder, is_new=False)):
        staged = Staging(target)
        if staged.journal_path.exists() or (staged.folder.is_dir() and not staged.tree.exists()):
            with open_staging(target) as staging:
                same = same or staging.finished_request == request
                staging.remove()
    return same


def check_room(staging: Staging, plan: Plan) -> None:
    """Raise SystemRefused where a folder cannot be written, or the disk has less room than the plan still takes."""
    effective = os.access in os.supports_effective_ids
    for folder in {(plan.target.folder / shard.path).parent for shard in plan.shards}:
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove_empty(missing)
        raise SystemRefused.from_os_error(error, folder) from None
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _sync_tree(tree: Path) -> None:
    for path in tree.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("r+b") as file:
                os.fsync(file.fileno())

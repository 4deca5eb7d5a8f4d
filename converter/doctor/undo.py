"""What a mended folder was before: kept beside it, so that everything can be put back, byte for byte.

``.wconv-undo/NAME/`` beside the folder NAME holds a second name (a hard link) of each file that a mending replaces or
removes, and a record of how the folder was left. It is complete before the first change. A folder that is otherwise
than it was left is not touched again, neither mended nor put back; so nothing is overwritten that is kept nowhere.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from converter.errors import BadFile, BadRequest, OutputRefused
from converter.plan import Plan, Target
from converter.staging import open_staging

_FOLDER = ".wconv-undo"
_RECORD = "record.json"
_FILES = "files"

_State = list[int]
"""Size and time of a file, and whether it is a link: what tells that it is still the same."""


@dataclass(slots=True)
class _Record:
    """``saved`` are files as they were before the first mending, ``made`` those that were not there.

    ``kept`` are the states of what is kept for the former, ``left`` those of what the last mending left in the folder.
    ``pending`` are names that a mending is about to change, or an undo to put back.
    """

    saved: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    kept: dict[str, _State] = field(default_factory=dict)
    left: dict[str, _State] = field(default_factory=dict)
    pending: list[str] = field(default_factory=list)


def undo_folder(folder: Path) -> Path:
    """Name the place where what a folder was is kept."""
    resolved = folder.resolve()
    return resolved.parent / _FOLDER / resolved.name


@contextmanager
def keeping(folder: Path, plan: Plan) -> Iterator[None]:
    """Keep what a plan changes in a folder before it is carried out, and note afterwards how it was left.

    Raises OutputRefused for a folder that has changed since it was mended before.
    """
    place = undo_folder(folder)
    record = _read(place)
    if record is None:
        _remove(place)  # what a killed run had left
        record = _Record()
    else:
        _check(folder, place, record)
    is_first = not record.saved and not record.made
    known = {*record.saved, *record.made}
    written = [*(shard.path for shard in plan.shards), *(name for name, _ in (*plan.texts, *plan.carried))]
    changed = list(dict.fromkeys((*plan.superseded, *written)))
    try:
        for name in changed:
            if name not in known and _exists(folder / name):
                _copy(folder / name, place / _FILES / name)
                record.kept[name] = _state(place / _FILES / name)
                record.saved.append(name)
        record.made += (name for name in changed if name not in {*known, *record.saved})
        record.pending = changed
        _write(place, record)
        yield
    except BaseException:
        if is_first and all(_is_back(folder, place, record, name) for name in (*record.saved, *record.made)):
            _remove(place)  # nothing was changed
        raise
    record.left = _states(folder, (*record.saved, *record.made))
    record.pending = []
    _write(place, record)


def undo(folder: Path) -> tuple[str, ...]:
    """Put everything back as it was before the first mending; give the names of what was put back or removed.

    Raises BadRequest where nothing is kept, OutputRefused where a file has changed since, BadFile where what is kept
    has suffered.
    """
    if not folder.is_dir():
        raise BadRequest(folder, "is no folder")
    place = undo_folder(folder)
    with open_staging(Target(folder, is_new=False)) as staging:
        staging.remove()
        record = _read(place)
        if record is not None:
            _check(folder, place, record)
            _put_back(folder, place, record)
            return (*record.saved, *record.made)
    if not _remove(place):  # True after a killed run had put everything back
        raise BadRequest(folder, "has nothing to undo", f"'wconv doctor --fix' keeps what it changes in {_FOLDER}/.")
    return ()


def _check(folder: Path, place: Path, record: _Record) -> None:
    """Refuse a folder that is not as it was left; what a killed run had begun with may be either way."""
    for name in record.saved:
        if _states(place / _FILES, [name]).get(name) != record.kept.get(name):
            raise BadFile(place / _FILES / name, "is not what was kept there", "It was changed through its other name.")
    now = _states(folder, (*record.saved, *record.made))
    for name in (*record.saved, *record.made):
        if name not in record.pending and now.get(name) != record.left.get(name):
            advice = f"Move it elsewhere and undo, or forget with --purge what {_FOLDER}/ keeps."
            raise OutputRefused(folder / name, "has changed since the folder was mended", advice)


def _put_back(folder: Path, place: Path, record: _Record) -> None:
    record.pending = [*record.saved, *record.made]
    _write(place, record)
    for name in record.saved:
        path = folder / name
        if not _is_back(folder, place, record, name):
            beside = path.with_name(f".{path.name}.wconv")
            beside.unlink(missing_ok=True)
            _copy(place / _FILES / name, beside)
            beside.replace(path)
            beside.unlink(missing_ok=True)  # where both were one file, nothing was renamed
    for name in record.made:
        (folder / name).unlink(missing_ok=True)
    _remove(place)


def purge(folder: Path) -> int:
    """Remove what is kept of a folder; give the bytes of it. Raises BadRequest where there is nothing."""
    place = undo_folder(folder)
    if not place.exists():
        raise BadRequest(folder, "has nothing to purge")
    nbytes = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    _remove(place)
    return nbytes


def _read(place: Path) -> _Record | None:
    try:
        return _Record(**json.loads((place / _RECORD).read_text("utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise BadFile(place / _RECORD, f"cannot be read ({error})", "Move its folder elsewhere.") from None


def _write(place: Path, record: _Record) -> None:
    place.mkdir(parents=True, exist_ok=True)
    staged = place / f"{_RECORD}.new"
    with staged.open("w", encoding="utf-8") as file:
        json.dump(asdict(record), file)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(place / _RECORD)


def _remove(place: Path) -> bool:
    """Remove what is kept; False where there was nothing, not even what a killed run of this left."""
    was_there = place.exists()
    (place / _RECORD).unlink(missing_ok=True)  # first: what is left over without it says nothing
    shutil.rmtree(place, ignore_errors=True)
    with suppress(OSError):
        place.parent.rmdir()
        was_there = True
    return was_there


def _states(folder: Path, names: Iterable[str]) -> dict[str, _State]:
    return {name: _state(folder / name) for name in names if _exists(folder / name)}


def _state(path: Path) -> _State:
    stat = path.lstat()
    return [stat.st_size, 0 if path.is_symlink() else stat.st_mtime_ns, int(path.is_symlink())]


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _is_back(folder: Path, place: Path, record: _Record, name: str) -> bool:
    """Say whether a file is as it was before the first mending."""
    path, kept = folder / name, place / _FILES / name
    if name in record.made:
        return not _exists(path)
    return _exists(path) and _exists(kept) and _state(path) == _state(kept)


def _copy(source: Path, path: Path) -> None:
    """Give a file a second name, or a link a second link; where the disk has no hard links, copy the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        path.symlink_to(source.readlink())
        return
    try:
        os.link(source, path)
    except OSError:
        half = path.with_name(f"{path.name}.half")
        shutil.copy2(source, half)
        half.replace(path)

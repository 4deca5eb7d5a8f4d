"""What a mended folder was before: kept beside it, so that everything can be put back, byte for byte.

``.wconv-undo/NAME/`` beside the folder NAME holds a second name (a hard link) of each file that a mending replaces or
removes, and a record. It is complete before the first change; putting back can be done twice, so a killed run of
either is just repeated.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from converter.errors import BadFile, BadRequest, OutputRefused
from converter.plan import Plan, Target
from converter.staging import open_staging

_FOLDER = ".wconv-undo"
_RECORD = "record.json"
_FILES = "files"

_State = tuple[int, int]


@dataclass(slots=True)
class _Record:
    """``saved`` are files as they were before the first mending, ``made`` those that were not there.

    ``states`` are sizes and times of what the last mending left in place of either.
    """

    saved: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    states: dict[str, _State] = field(default_factory=dict)


def undo_folder(folder: Path) -> Path:
    """Name the place where what a folder was is kept."""
    resolved = folder.resolve()
    return resolved.parent / _FOLDER / resolved.name


@contextmanager
def keeping(folder: Path, plan: Plan) -> Iterator[None]:
    """Keep what a plan changes in a folder before it is carried out, and note afterwards what it left."""
    place = undo_folder(folder)
    record = _read(place) or _Record()
    known = {*record.saved, *record.made}
    try:
        for name in plan.superseded:
            if name not in known:
                _link(folder / name, place / _FILES / name)
                record.saved.append(name)
        written = [*(shard.path for shard in plan.shards), *(name for name, _ in (*plan.texts, *plan.carried))]
        record.made += (name for name in written if name not in {*known, *plan.superseded})
        before = set(record.states)
        record.states = {
            name: state for name, state in record.states.items() if name not in {*written, *plan.superseded}
        }
        _write(place, record)
        yield
    except BaseException:
        if not known and all(_is_back(folder / name, place / _FILES / name) for name in record.saved):
            _remove(place)  # nothing was changed
        raise
    for name in {*written, *before}:
        if (folder / name).exists():
            record.states[name] = _state(folder / name)
    _write(place, record)


def undo(folder: Path) -> tuple[str, ...]:
    """Put everything back as it was before the first mending; give the names of what was put back or removed.

    Raises BadRequest where nothing is kept, OutputRefused where a file has changed since.
    """
    place = undo_folder(folder)
    with open_staging(Target(folder, is_new=False)) as staging:
        staging.remove()
        record = _read(place)
        if record is not None:
            _put_back(folder, place, record)
            return (*record.saved, *record.made)
    if not _remove(place):  # True after a killed run had put everything back
        raise BadRequest(folder, "has nothing to undo", f"'wconv doctor --fix' keeps what it changes in {_FOLDER}/.")
    return ()


def _put_back(folder: Path, place: Path, record: _Record) -> None:
    for name, state in record.states.items():
        path = folder / name
        if path.exists() and _state(path) != tuple(state) and not _is_back(path, place / _FILES / name):
            raise OutputRefused(path, "has changed since it was mended", "Move it elsewhere, then undo again.")
    for name in record.saved:
        kept, path = place / _FILES / name, folder / name
        if kept.exists() and not _is_back(path, kept):
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f".{path.name}.wconv")
            with suppress(FileNotFoundError):
                beside.unlink()
            _link(kept, beside)
            beside.replace(path)
    for name in record.made:
        (folder / name).unlink(missing_ok=True)
    _remove(place)


def purge(folder: Path) -> int:
    """Remove what is kept of a folder; give the bytes of it. Raises BadRequest where there is nothing."""
    place = undo_folder(folder)
    if _read(place) is None:
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


def _state(path: Path) -> _State:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _is_back(path: Path, kept: Path) -> bool:
    return path.exists() and kept.exists() and _state(path) == _state(kept)


def _link(source: Path, path: Path) -> None:
    """Give a file a second name; where the disk has no such thing, copy it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if not path.exists():
            os.link(source, path)
    except OSError:
        shutil.copy2(source, path)

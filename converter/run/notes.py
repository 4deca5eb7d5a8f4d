"""What this user's own runs have noted about a folder that they write to, kept where no download can plant it.

The notes lie in the user's state folder, ``$WCONV_STATE`` or the one that the system has for it, named by the real path
of the folder that they are about. Nothing that lies in that folder itself tells a run to finish, undo or remove
anything: it may have come with a model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from converter.errors import BadFile, BadRequest, OutputRefused, SystemRefused
from converter.storage.local import place_at, real
from converter.storage.root import Root, half_written, make_folders

Kind = Literal["run", "undo"]

_MAX_NOTE_NBYTES = 100_000_000  # names of files, as many as an index may have
_FORMAT = 1


def state_folder() -> Path:
    """Name the folder that the notes lie in. Raises BadRequest for a ``WCONV_STATE`` that is no full path."""
    named = os.environ.get("WCONV_STATE")
    if named:
        if not Path(named).is_absolute():
            raise BadRequest(repr(named), "is no full path, and WCONV_STATE says so", "Name it from the root.")
        return real(Path(named))
    from platformdirs import user_state_path

    try:
        place = user_state_path("wconv", appauthor=False)
    except RuntimeError:
        place = Path()
    if not place.is_absolute():  # then it would be one below the current folder, which may be a download
        raise BadRequest("HOME", "does not say where your home folder is", "Set it, or let WCONV_STATE name a folder.")
    return real(place)


def make_token() -> str:
    """Make a part of a name that nobody can foretell."""
    return os.urandom(16).hex()


class Notes:
    """The notes about one folder: of a run that is under way or was stopped, and of what a mending has kept."""

    def __init__(self, folder: Path) -> None:
        """Take the notes about a folder, named by its real path."""
        self.folder = folder
        self.place = state_folder()
        self._key = hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:32]

    def path_of(self, kind: Kind) -> Path:
        """Name the file of a note, for a message."""
        return self.place / self._name(kind)

    def _name(self, kind: Kind | Literal["lock"]) -> str:
        return f"{self._key}.{kind}"

    def read(self, kind: Kind) -> dict[str, Any] | None:
        """Give a note, if there is one. Raises BadFile for one that cannot be understood."""
        if not place_at(self.path_of(kind)).exists():
            return None
        try:
            with Root(self.place) as root:
                content = json.loads(root.read(self._name(kind), _MAX_NOTE_NBYTES))
            if content["format"] != _FORMAT or content["folder"] != str(self.folder):
                raise ValueError("it is of another version, or about another folder")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise self.unreadable(kind, error) from None
        assert isinstance(content, dict)
        return content

    def unreadable(self, kind: Kind, error: Exception) -> BadFile:
        """Word that a note cannot be understood, without advice that would lose what it is about."""
        what = "what a stopped run was about to do in" if kind == "run" else "what a mending has changed in"
        advice = "Look through that folder, hidden files too, before you move the note away."
        return BadFile(self.path_of(kind), f"cannot be read ({error}): it says {what} {self.folder}", advice)

    def write(self, kind: Kind, content: dict[str, Any]) -> None:
        """Note something; it is on the disk then."""
        raw = json.dumps({"format": _FORMAT, "folder": str(self.folder), **content}).encode()
        with self._open() as root:
            root.write_atomically(self._name(kind), raw)

    def remove(self, kind: Kind) -> None:
        """Forget a note."""
        with self._open() as root:
            root.remove(self._name(kind))

    @contextmanager
    def _open(self) -> Iterator[Root]:
        try:
            make_folders(self.place.parent)
            make_folders(self.place, 0o700)
            with Root(self.place) as root:
                yield root
        except OSError as error:
            advice = "A run that is killed is taken up by what is noted there: let WCONV_STATE name another folder."
            raise SystemRefused(error.filename or self.place, (error.strerror or str(error)).lower(), advice) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs of this user out of the folder. Raises OutputRefused while one is in it."""
        from filelock import FileLock, Timeout

        with self._open():
            pass
        lock = FileLock(self.place / self._name("lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise OutputRefused(self.folder, "is being written by another run", "Wait until that has ended.") from None
        except OSError as error:
            raise SystemRefused.from_os_error(error, self.place) from None
        try:
            with Root(self.place) as root:
                for name in (self._name("run"), self._name("undo")):
                    root.remove(half_written(name))  # of a run that was killed
            yield
        finally:
            self._release(lock.release)

    def _release(self, release: Callable[[], None]) -> None:
        # Where an open file can be removed, it goes while it is held, so that nobody takes a lock that is about to go.
        try:
            if os.name != "nt":
                self._remove_lock()
        finally:
            release()
        if os.name == "nt":
            self._remove_lock()

    def _remove_lock(self) -> None:
        with suppress(OSError), Root(self.place) as root:
            root.remove(self._name("lock"))

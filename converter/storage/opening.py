"""Opens source files: regular files alone, without ever waiting for one, and each time the same as at first.

Whatever lies under a file's name in a folder may be a pipe, which hangs, or a device, which does things when it is
opened: neither is. What fstat says of the handle whose header is read goes with all byte ranges of the file, as their
Stamp; a later handle that says otherwise is of a file that somebody writes to, and the bytes may be of two states.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from converter.errors import BadFile
from converter.storage.root import Root

# A pipe that takes a file's place after it was looked at is opened at once. Windows has no such flag.
_WITHOUT_WAITING = getattr(os, "O_NONBLOCK", 0)


class Stamp(NamedTuple):
    """What tells that a file is still the one whose header was read; all ranges of a file share one.

    Not the device: workers on other machines see another number for the same network file system.
    """

    inode: int
    nbytes: int
    mtime_ns: int
    ctime_ns: int


class Opened(NamedTuple):
    """A file whose header is to be read, open at its beginning, and what it was like then."""

    path: Path
    file: BinaryIO
    stamp: Stamp


@contextmanager
def open_source(path: Path) -> Iterator[Opened]:
    """Open a file to read its header; raises BadFile for one that is not there, or is no regular file."""
    if not path.exists():
        raise BadFile(path, "does not exist")
    with open_regular(path) as file:
        yield Opened(path, file, stamp_of(file))


@contextmanager
def open_placed(path: Path, place: Path) -> Iterator[Opened]:
    """Open a file by its real path as it was found before: a link that has come there since is not followed.

    Raises OSError for one that has, BadFile for what is no regular file.
    """
    with Root(place.parent) as root, root.open(place.name, os.O_RDONLY | _WITHOUT_WAITING) as handle:
        file = os.fdopen(os.dup(handle), "rb")
    with file:
        _check_kind(path, os.fstat(file.fileno()))
        yield Opened(path, file, stamp_of(file))


def open_regular(path: Path, buffering: int = -1) -> BinaryIO:
    """Open a regular file to read; raises BadFile for anything else, which is not opened."""
    _check_kind(path, path.stat())
    file: BinaryIO = open(path, "rb", buffering, opener=_open_without_waiting)  # noqa: SIM115
    try:
        _check_kind(path, os.fstat(file.fileno()))
    except BadFile:
        file.close()
        raise
    return file


def open_again(path: Path, stamp: Stamp | None) -> BinaryIO:
    """Open a file whose header was read, without a buffer; raises BadFile where it has changed since."""
    file = open_regular(path, buffering=0)
    try:
        check_stamp(path, file, stamp)
    except BadFile:
        file.close()
        raise
    return file


def stamp_of(file: BinaryIO) -> Stamp:
    """Take the stamp of an open file."""
    found = os.fstat(file.fileno())
    return Stamp(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def check_stamp(path: Path, file: BinaryIO, stamp: Stamp | None) -> None:
    """Raise BadFile where an open file is not, or no longer, as its stamp says."""
    if stamp is not None and stamp_of(file) != stamp:
        raise BadFile(path, "was changed while it was read", "Run this again when nobody writes to it.")


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | _WITHOUT_WAITING)


def _check_kind(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise BadFile(path, "is no regular file")

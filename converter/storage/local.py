"""Files of this machine's disks: regular files alone, never waited for, and each time the same as at first.

Whatever lies under a file's name in a folder may be a pipe, which hangs, or a device, which does things when it is
opened: neither is. What fstat says of the handle whose header is read goes with all byte ranges of the file, as their
Stamp; a later handle that says otherwise is of a file that somebody writes to, and the bytes may be of two states.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from converter.errors import BadFile, BadRequest, SystemRefused
from converter.storage.base import FileRef, Info, Kind, OpenFile, Place, Store, Tag, changed
from converter.storage.root import Root, can_share, names_in, share

# A pipe that takes a file's place after it was looked at is opened at once. Windows has no such flag.
_WITHOUT_WAITING = getattr(os, "O_NONBLOCK", 0)
_NOTHING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EBADF)


class Stamp(NamedTuple):
    """What tells that a file is still the one whose header was read; all ranges of a file share one.

    Not the device: workers on other machines see another number for the same network file system.
    """

    inode: int
    nbytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> Stamp:
        return cls(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class LocalStore(Store):
    """All disks of this machine; keys that are no full paths begin at ``base``, the folder the user was in."""

    base: str

    def path(self, key: str) -> Path:
        return Path(self.base, key)

    def absolute(self, key: str) -> Place:
        return place_at(self.path(key))

    def spell(self, key: str) -> str:
        return str(Path(key))

    def stat(self, key: str) -> Info | None:
        """Say what lies at a key. Raises SystemRefused where that cannot be seen."""
        try:
            found = self.path(key).stat()
            changed_ns = max(found.st_mtime_ns, found.st_ctime_ns)
            return Info(_kind_of(found), found.st_size, Stamp.of(found), found.st_mtime_ns, changed_ns)
        except ValueError:  # a NUL in a name
            return None
        except OSError as error:
            if error.errno in _NOTHING:
                return None
            raise SystemRefused.from_os_error(error, self.spell(key)) from None

    def target(self, key: str) -> str | None:
        """Give the key that a link names. Raises SystemRefused where that cannot be seen."""
        try:
            return Path(key).parent.joinpath(self.path(key).readlink()).as_posix()
        except ValueError:  # a NUL in a name
            return None
        except OSError as error:
            if error.errno in (errno.EINVAL, *_NOTHING):
                return None
            raise SystemRefused.from_os_error(error, self.spell(key)) from None

    def real(self, key: str) -> Place:
        return place_at(real(self.path(key)))

    def is_same(self, key: str, other: Place) -> bool:
        if not is_local(other):
            return False
        try:
            return self.path(key).samefile(other)
        except (OSError, ValueError):  # one of them is not there
            return False

    def list(self, key: str) -> list[str]:
        try:
            return names_in(self.path(key))
        except OSError as error:
            raise SystemRefused.from_os_error(error, self.spell(key)) from None

    def open(self, place: Place, tag: Tag | None) -> OpenFile:
        path = self.path(place.key)
        found = self.stat(place.key)
        if found is None and tag is None:
            raise BadFile(place, "is a link to nothing" if path.is_symlink() else "does not exist")
        if found is not None and found.kind != "file":
            raise BadFile(place, "is no regular file")
        try:
            handle = os.open(path, os.O_RDONLY | _WITHOUT_WAITING | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise SystemRefused.from_os_error(error, place) from None
        return _open(handle, place, tag)


@contextmanager
def open_staged(place: Place) -> Iterator[StagedFile]:
    """Open a file that a transaction has prepared, to be written; raises OSError where it is no longer the one.

    Who may rename its folder could have put a link there, or one of theirs with another name of a file of the user's.
    """
    path = place.path
    with Root(path.parent) as root, root.open(path.name, os.O_RDWR) as handle:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            raise OSError(errno.EPERM, "somebody has put another file there", str(path))
        yield StagedFile(FileRef(place), handle, found.st_size)


def _kind_of(found: os.stat_result) -> Kind:
    if stat.S_ISREG(found.st_mode):
        return "file"
    return "folder" if stat.S_ISDIR(found.st_mode) else "other"


def _open(handle: int, place: Place, tag: Tag | None) -> LocalFile:
    """Give an open file by its handle; raises BadFile for what is no regular file, or not as the tag says."""
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise BadFile(place, "is no regular file")
        stamp = Stamp.of(found)
        if tag is not None and tag != stamp:
            raise changed(place)
    except BaseException:
        os.close(handle)
        raise
    return LocalFile(FileRef(place, stamp), handle, found.st_size)


class LocalFile(OpenFile):
    """A file of a disk, by its handle."""

    def __init__(self, ref: FileRef, handle: int, nbytes: int) -> None:
        super().__init__(ref, nbytes)
        self.handle = handle

    def read_into(self, offset: int, out: memoryview) -> int:
        done = 0
        try:
            while done < len(out):
                count = _read_at(self.handle, offset + done, out[done:])
                if not count:
                    break
                done += count
        except OSError as error:
            raise SystemRefused.from_os_error(error, self.ref.place) from None
        return done

    def fetch(self, offset: int, nbytes: int) -> bytes:
        try:
            # Without a second copy: a directory or a pickle has up to 60 MB.
            raw = os.pread(self.handle, nbytes, offset) if hasattr(os, "pread") else b""
        except OSError as error:
            raise SystemRefused.from_os_error(error, self.ref.place) from None
        return raw if len(raw) == nbytes else super().fetch(offset, nbytes)

    def check(self) -> None:
        if Stamp.of(os.fstat(self.handle)) != self.ref.tag:
            raise changed(self.ref.place)

    def close(self) -> None:
        os.close(self.handle)


class _Copy(LocalFile):
    """A copy that a cache has of a file that lies elsewhere."""

    def __init__(self, ref: FileRef, file: LocalFile) -> None:
        super().__init__(ref, file.handle, file.nbytes)
        self._seen = file

    def check(self) -> None:
        self._seen.check()


def open_copy(ref: FileRef, path: str, nbytes: int) -> OpenFile | None:
    """Open the copy of a file, if it is one of its size."""
    place = place_at(Path(path))
    try:
        copy = place.store.open(place, None)
    except (BadFile, SystemRefused):
        return None
    if copy.nbytes != nbytes:
        copy.close()
        return None
    assert isinstance(copy, LocalFile)
    return _Copy(ref, copy)


class StagedFile(LocalFile):
    """A file of a transaction, to be written at any offset and in any order."""

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes at an offset. Raises OSError."""
        while data:
            count = _write_at(self.handle, offset, data)
            offset, data = offset + count, data[count:]

    def take(self, offset: int, source: OpenFile, begin: int, nbytes: int, only_shared: bool = False) -> bool:
        """Have the system copy bytes of another file to an offset, unseen; say whether it did with all of them.

        If they are to be ``only_shared`` it does so only where the disk can share them.
        """
        if not isinstance(source, LocalFile):
            return False
        if only_shared and not can_share(source.handle, begin, self.handle, offset):
            return False
        return share(source.handle, begin, self.handle, offset, nbytes) == nbytes


def _write_at(handle: int, offset: int, data: memoryview) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(handle, data, offset)
    os.lseek(handle, offset, os.SEEK_SET)
    return os.write(handle, data)


def _read_at(handle: int, offset: int, out: memoryview) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(handle, [out], offset)
    os.lseek(handle, offset, os.SEEK_SET)
    raw = os.read(handle, len(out))
    out[: len(raw)] = raw
    return len(raw)


def place_at(path: Path) -> Place:
    """Give the place that a path names; one that is not full begins at the current folder, for good."""
    return Place(LocalStore("" if path.is_absolute() else str(Path.cwd())), path.as_posix())


def open_url(url: str) -> Place:
    """Give the place that a ``file:`` URL names. Raises BadRequest for one that names none of this machine."""
    from urllib.request import url2pathname  # loads what speaks http: not at every start

    host, slash, path = url.partition("://")[2].partition("/")
    if not slash or host.lower() not in ("", "localhost"):
        raise BadRequest(url, "names no file of this machine", "A full path begins with the third slash: file:///data.")
    return place_at(Path(url2pathname(f"/{path}")))


def is_local(place: Place) -> bool:
    """Say whether a place is on this machine, where files can be written."""
    return isinstance(place.store, LocalStore)


def can_write(folder: Path) -> bool:
    """Say whether this user may make and rename files in a folder, as far as the system tells."""
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)


def free_nbytes(folder: Path) -> int:
    """Say how much room there is on the disk of a folder, or on the one where it would come to be."""
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    return shutil.disk_usage(there).free


# Links are files elsewhere: read through, never written into, and what they lead to is never renamed or removed.


def real(path: Path) -> Path:
    """Give where a path leads to; links in a circle, which ``resolve`` fails on, stay as they are."""
    return Path(os.path.realpath(path))


def is_there(path: Path) -> bool:
    """Say whether a path names anything, be it a link to nothing."""
    return os.path.lexists(path)

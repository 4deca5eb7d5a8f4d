"""A folder of this machine's disk, held open: what is made, renamed or removed below it stays below it.

Names are plain paths from the folder, such as ``unet/config.json``. Each step goes through the handle of the folder
that an entry lies in, which is reached part by part and never through a link: a folder that is swapped for a link
between a look and a step leads nowhere. Where a system has no such handles (Windows), the way is looked at just before
each step.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from types import TracebackType

_HAS_HANDLES = {os.open, os.rename, os.unlink, os.mkdir, os.rmdir, os.link, os.symlink, os.stat} <= os.supports_dir_fd
_FOLDER = getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)
# A folder that may be passed through need not be readable.
_WAY = _FOLDER | getattr(os, "O_PATH", os.O_RDONLY)
_BINARY = getattr(os, "O_BINARY", 0)
# Some network and FUSE disks cannot sync a folder, and say so in one of these ways.
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
_SHARE_NBYTES = 1 << 30  # a signal is heard so often
_COPY_NBYTES = 1 << 20
_SHARE_RANGE = 0x4020940D  # FICLONERANGE of Linux' linux/fs.h, whose struct has a file, an offset, a length, an offset


class Root:
    """A folder held open, by its real path; use it as a context. What a step raises is an OSError with a full path.

    Raises OSError where a part of the path is a link.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = -1
        if _HAS_HANDLES:
            try:
                self._handle = _descend(os.open(path.anchor, _WAY), path.parts[1:])
            except OSError as error:
                error.filename = str(path)
                raise

    def __enter__(self) -> Root:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    @contextmanager
    def _reach(self, name: str) -> Iterator[tuple[str, int | None]]:
        """Give what a system call names an entry by: its last part, and the handle of the folder that it lies in."""
        parts = plain_parts(name)
        try:
            if not _HAS_HANDLES:
                yield str(_look_along(self.path, parts)), None
                return
            folder = _descend(os.dup(self._handle), parts[:-1])
            try:
                yield parts[-1] if parts else ".", folder
            finally:
                os.close(folder)
        except OSError as error:
            error.filename = str(self.path / name)
            raise

    def stat(self, name: str) -> os.stat_result | None:
        """Give what the system says of an entry, of a link itself; None where there is none."""
        try:
            with self._reach(name) as (last, folder):
                return os.stat(last, dir_fd=folder, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def names(self, name: str = "") -> list[str]:
        """List a folder."""
        if not _HAS_HANDLES:
            return names_in(_look_along(self.path, plain_parts(name)))
        with self.open(name, _FOLDER | os.O_RDONLY) as handle:
            return names_in(handle)

    def walk(self, name: str) -> Iterator[tuple[str, os.stat_result]]:
        """Yield all that lies below a folder, what is in a folder before the folder itself; links are not followed."""
        for entry in self.names(name):
            inner = f"{name}/{entry}"
            found = self.stat(inner)
            if found is not None:
                if stat.S_ISDIR(found.st_mode):
                    yield from self.walk(inner)
                yield inner, found

    def make_folder(self, name: str, mode: int = 0o777) -> None:
        """Make a folder and those on its way, where they are not there."""
        parts = plain_parts(name)
        for count in range(1, len(parts) + 1):
            with self._reach("/".join(parts[:count])) as (last, folder), suppress(FileExistsError):
                os.mkdir(last, mode, dir_fd=folder)

    def replace(self, name: str, to: Root, new: str) -> None:
        """Rename an entry, into another folder on the same disk if need be; a file that has the new name goes."""
        with self._reach(name) as (last, folder), to._reach(new) as (new_last, new_folder):
            os.replace(last, new_last, src_dir_fd=folder, dst_dir_fd=new_folder)

    def remove(self, name: str) -> None:
        """Remove a file or a link, if it is there."""
        with self._reach(name) as (last, folder), suppress(FileNotFoundError):
            os.unlink(last, dir_fd=folder)

    def remove_folder(self, name: str) -> None:
        """Remove an empty folder, if it is there."""
        with self._reach(name) as (last, folder), suppress(FileNotFoundError):
            os.rmdir(last, dir_fd=folder)

    def remove_tree(self, name: str) -> None:
        """Remove a folder, or a link in its place, and all that lies below it."""
        found = self.stat(name)
        if found is None:
            return
        if not stat.S_ISDIR(found.st_mode):
            self.remove(name)
            return
        for inner, entry in self.walk(name):
            if stat.S_ISDIR(entry.st_mode):
                self.remove_folder(inner)
            else:
                self.remove(inner)
        self.remove_folder(name)

    def link(self, name: str, to: Root, new: str) -> None:
        """Give a file a second name, or a link a second link; where the disk has no hard links, copy the file."""
        found = self.stat(name)
        with self._reach(name) as (last, folder), to._reach(new) as (new_last, new_folder):
            if found is not None and stat.S_ISLNK(found.st_mode):
                os.symlink(os.readlink(last, dir_fd=folder), new_last, dir_fd=new_folder)
                return
            try:
                os.link(last, new_last, src_dir_fd=folder, dst_dir_fd=new_folder, follow_symlinks=False)
                return
            except (OSError, NotImplementedError) as error:
                if isinstance(error, OSError) and error.errno in (errno.EEXIST, errno.ENOENT, errno.EIO):
                    raise
        self._copy(name, to, new)

    def _copy(self, name: str, to: Root, new: str) -> None:
        """Copy a file that is no link, with its times; the copy is on the disk when it has its name."""
        with self.open(name, os.O_RDONLY) as source, to._whole(new, f"{new}.half") as out:
            _copy_bytes(source, out)
            found = os.fstat(source)
            if os.utime in os.supports_fd:
                os.utime(out, ns=(found.st_atime_ns, found.st_mtime_ns))
            _give_mode(out, found)

    @contextmanager
    def _whole(self, name: str, beside: str, mode: int = 0o666) -> Iterator[int]:
        """Open a file to write that has its name once it is whole, and on the disk; until then it is ``beside``."""
        try:
            self.remove(beside)  # of a run that was killed
            with self.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode) as file:
                yield file
                os.fsync(file)
            self.replace(beside, self, name)
        except BaseException:
            with suppress(OSError):
                self.remove(beside)
            raise

    def take(self, source: int, name: str) -> None:
        """Copy what an open file holds, and who may read it; a file that has the name goes."""
        self.remove(name)
        found = os.fstat(source)
        with self.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as out:
            if found.st_size:  # files of /proc say that they are empty, and some of them have no end
                _copy_bytes(source, out)
            _give_mode(out, found)

    def fill(self, name: str, chunks: Iterable[bytes]) -> None:
        """Write a file, piece after piece; one that has the name goes."""
        self.remove(name)
        with self.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as file:
            for chunk in chunks:
                write_all(file, chunk)

    def read(self, name: str, max_nbytes: int) -> bytes:
        """Give what a file of this user holds. Raises OSError for one that is no plain file of theirs, or too long."""
        with self.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)) as file:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode) or not is_mine(found) or found.st_size > max_nbytes:
                raise OSError(errno.EPERM, "it is no file that a run of yours wrote")
            raw = b""
            while len(raw) <= max_nbytes and (chunk := os.read(file, _COPY_NBYTES)):
                raw += chunk
            return raw

    def write_atomically(self, name: str, raw: bytes) -> None:
        """Let a file hold these bytes, all of them or what it held before, and bring it and its folder to the disk.

        For folders that nobody else writes to: what it is called until then can be foretold.
        """
        with self._whole(name, half_written(name), 0o600) as file:
            write_all(file, raw)
        self.sync(PurePosixPath(name).parent.as_posix().removeprefix("."))

    def sync(self, name: str = "") -> None:
        """Bring a folder's entries to the disk."""
        if not _HAS_HANDLES:
            return
        with self.open(name, _FOLDER | os.O_RDONLY) as handle:
            try:
                os.fsync(handle)
            except OSError as error:
                if error.errno not in _CANNOT_SYNC:
                    raise

    def sync_tree(self, name: str) -> None:
        """Bring all that lies below a folder to the disk, and the folder."""
        for inner, found in self.walk(name):
            if stat.S_ISDIR(found.st_mode):
                self.sync(inner)
            elif stat.S_ISREG(found.st_mode):
                # Windows syncs only what is open for writing; elsewhere a file may be read-only.
                with self.open(inner, os.O_RDWR if os.name == "nt" else os.O_RDONLY) as file:
                    os.fsync(file)
        self.sync(name)

    @contextmanager
    def open(self, name: str, flags: int, mode: int = 0o666) -> Iterator[int]:
        """Open a file or folder, not through a link, and give its descriptor."""
        flags |= getattr(os, "O_NOFOLLOW", 0) | _BINARY
        with self._reach(name) as (last, folder):
            file = os.open(last, flags, mode, dir_fd=folder)
            try:
                yield file
            finally:
                os.close(file)


def make_folders(folder: Path, mode: int = 0o777) -> list[Path]:
    """Make a folder of a mode, and those above it; give those that were not there, innermost first."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    if missing:
        with Root(missing[-1].parent) as root:
            try:
                root.make_folder(folder.relative_to(root.path).as_posix(), mode)
            except OSError:
                remove_empty(missing)
                raise
    return missing


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of some folders that are empty."""
    for folder in folders:
        with suppress(OSError), Root(folder.parent) as root:
            root.remove_folder(folder.name)


def is_mine(found: os.stat_result) -> bool:
    """Say whether an entry is of this user, as far as the system can tell."""
    return not hasattr(os, "geteuid") or found.st_uid == os.geteuid()


def half_written(name: str) -> str:
    """Name the file that ``Root.write_atomically`` writes until it is whole."""
    return f"{name}.new"


def plain_parts(name: str) -> list[str]:
    """Take a path from a folder apart; raises OSError for one that is not plain: absolute, with ``..``, or odd.

    >>> plain_parts("unet/config.json")
    ['unet', 'config.json']
    """
    parts = name.split("/") if name else []
    odd = any(part in ("", ".", "..") or "\0" in part for part in parts)
    if odd or (os.name == "nt" and any("\\" in part or ":" in part for part in parts)):
        raise OSError(errno.EINVAL, "no plain path below a folder", name)
    return parts


def _descend(folder: int, parts: Iterable[str]) -> int:
    """Open a folder part by part from one that is open, so that no part can be a link by now, and close that one."""
    for part in parts:
        try:
            inner = os.open(part, _WAY, dir_fd=folder)
        finally:
            os.close(folder)
        folder = inner
    return folder


def names_in(folder: Path | int) -> list[str]:
    """List a folder by its path or descriptor, sorted."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries)


def _look_along(path: Path, parts: list[str]) -> Path:
    for part in parts[:-1]:
        path = path / part
        if path.is_symlink():
            raise OSError(errno.ELOOP, "a link is in the way", str(path))
    return path.joinpath(*parts[-1:])


def _give_mode(file: int, found: os.stat_result) -> None:
    """Let those read and write a file who may another, as far as the system can."""
    if os.chmod in os.supports_fd:
        os.chmod(file, stat.S_IMODE(found.st_mode) & 0o777)


def _copy_bytes(source: int, out: int) -> None:
    done = share(source, 0, out, 0, os.fstat(source).st_size)
    # The rest, or all of it.
    for file in (source, out):
        os.lseek(file, done, os.SEEK_SET)
    while chunk := os.read(source, _COPY_NBYTES):
        write_all(out, chunk)


def share(source: int, begin: int, out: int, offset: int, nbytes: int) -> int:
    """Have the system copy bytes from one open file to another, and share those that it need not copy; say how many.

    Whoever reads and writes the rest finds out what is wrong, if anything is.
    """
    if not hasattr(os, "copy_file_range"):
        return 0
    done = 0
    try:
        for end in (min(_ahead_of_blocks(begin, out, offset), nbytes), nbytes):
            while done < end:
                count = os.copy_file_range(source, out, min(end - done, _SHARE_NBYTES), begin + done, offset + done)
                if not count:  # the file ends, or is one that some systems copy nothing of
                    return done
                done += count
    except OSError:  # other disks, and many that cannot: each has its own number
        pass
    return done


def can_share(source: int, begin: int, out: int, offset: int) -> bool:
    """Say whether bytes of one open file may share blocks with another's, on a disk that can.

    Asked for a single byte, such a disk says that it takes whole blocks alone, and others that they cannot share.
    """
    try:
        import fcntl

        fcntl.ioctl(out, _SHARE_RANGE, struct.pack("=qQQQ", source, begin, 1, offset))
    except (ImportError, OSError) as error:
        return getattr(error, "errno", 0) == errno.EINVAL
    return True


def _ahead_of_blocks(begin: int, out: int, offset: int) -> int:
    """Count the bytes before the first block of a file, where blocks lie as they do in the file they come from.

    File systems share whole blocks, and only what begins with one (``generic_remap_checks`` in ``fs/remap_range.c`` of
    Linux); for what is left behind the last one the system sees by itself.
    """
    block = os.fstat(out).st_blksize or 1
    return 0 if (begin - offset) % block else -offset % block


def write_all(file: int, raw: bytes) -> None:
    """Write to a descriptor, whatever a single call takes."""
    view = memoryview(raw)
    while view:
        view = view[os.write(file, view) :]

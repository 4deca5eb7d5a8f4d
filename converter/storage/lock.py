"""A lock that is a file: one process has it at a time, and it is free again however that process ends.

The lock is the system's own: ``flock``, and on Windows that of the first byte. Not the filelock package, which locks in
the same way, and keeps out whoever uses that: it takes longer to load than a small conversion to run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from converter.storage.root import Root

if sys.platform == "win32":
    import msvcrt

    def _lock(file: int) -> None:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)

    def _unlock(file: int) -> None:
        msvcrt.locking(file, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(file: int) -> None:
        # To close it would not do: a process that was forked meanwhile has it open too.
        fcntl.flock(file, fcntl.LOCK_UN)


# Where an open file can be removed, it goes while it is held, so that nobody takes a lock that is about to go.
_GOES_WHILE_HELD = os.name != "nt"


@contextmanager
def hold(root: Root, name: str) -> Iterator[bool]:
    """Hold the lock of a name while the context is open, and let the file go with it; False where another has it."""
    is_held = False
    try:
        with root.open(name, os.O_RDWR | os.O_CREAT, 0o644) as file:
            is_held = _take(file)
            try:
                yield is_held
            finally:
                if is_held and _GOES_WHILE_HELD:
                    _remove(root, name)
                if is_held:
                    _unlock(file)
    finally:
        if is_held and not _GOES_WHILE_HELD:
            _remove(root, name)


def _take(file: int) -> bool:
    """Lock an open file, and say whether that was free, and is still there: who had it may have removed it."""
    try:
        _lock(file)
    except (BlockingIOError, PermissionError):
        return False
    return os.fstat(file).st_nlink > 0


def _remove(root: Root, name: str) -> None:
    with suppress(OSError):
        root.remove(name)

"""Which files of a folder a piece of code opens, as the kernel tells it (inotify): the judge of what loaders pick."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_IN_OPEN = 0x20
_IN_ISDIR = 0x40000000
_EVENT = struct.Struct("iIII")


@contextmanager
def watched(folder: Path) -> Iterator[set[str]]:
    """Collect, by their path from ``folder``, the files in it and its subfolders that are opened meanwhile."""
    if not sys.platform.startswith("linux"):
        pytest.skip("inotify is Linux's")
    libc = ctypes.CDLL(None, use_errno=True)
    handle = libc.inotify_init1(os.O_NONBLOCK)
    assert handle >= 0, os.strerror(ctypes.get_errno())
    places = {}
    for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        places[libc.inotify_add_watch(handle, os.fsencode(place), _IN_OPEN)] = place
    opened: set[str] = set()
    try:
        yield opened
    finally:
        while True:
            try:
                raw = os.read(handle, 1 << 16)
            except BlockingIOError:
                break
            begin = 0
            while begin < len(raw):
                watch, mask, _, length = _EVENT.unpack_from(raw, begin)
                name = raw[begin + _EVENT.size : begin + _EVENT.size + length].rstrip(b"\0")
                begin += _EVENT.size + length
                if not mask & _IN_ISDIR and watch in places:
                    opened.add((places[watch] / os.fsdecode(name)).relative_to(folder).as_posix())
        os.close(handle)

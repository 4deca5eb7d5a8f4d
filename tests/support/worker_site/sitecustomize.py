"""What workers in tests do beside their work; Python loads this where it is on its path, before all else.

With a folder WCONV_GATE each write of a converted tensor passes a gate: while there is a file ``closed`` in the folder,
which holds a number, a worker that has done so many writes says that it waits, by a file of its number, and waits. With
WCONV_DEADLY a write ends its worker, with WCONV_FULL the disk is full.
"""

from __future__ import annotations

import errno
import itertools
import os
import time
from pathlib import Path

_GATE = os.environ.get("WCONV_GATE")
_pwrite = os.pwrite
_written = itertools.count()


def _write(file: int, data: bytes, offset: int) -> int:
    if "WCONV_DEADLY" in os.environ:
        os._exit(1)
    if "WCONV_FULL" in os.environ:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    count = next(_written)
    while _GATE and _is_closed(Path(_GATE, "closed"), count):
        Path(_GATE, str(os.getpid())).touch()
        time.sleep(0.02)
    return _pwrite(file, data, offset)


def _is_closed(path: Path, count: int) -> bool:
    try:
        return count >= int(path.read_text())
    except FileNotFoundError:
        return False


os.pwrite = _write  # type: ignore[assignment]

"""Run a command until our stdin ends; then end all that it has started, however far that has gone from it.

Ray's processes leave whoever starts them. On Linux they come to us, as orphans, for we say that we take them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import threading

import psutil

PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    """Run, wait, and kill until nobody is left."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    reaper = threading.Thread(target=bury, daemon=True)
    reaper.start()
    sys.stdin.read()
    while reaper.is_alive():
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        reaper.join(0.05)


def bury() -> None:
    """Take leave of those that have ended, until there is none."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


if __name__ == "__main__":
    main()

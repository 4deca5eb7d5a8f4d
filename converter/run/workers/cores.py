"""How many cores this process may use, and how many it takes."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

SAFE_PYTHON = (3, 11)
"""The first that can start processes which load no modules from the current folder."""

MAX_WORKERS = 16
"""More are not faster: by then memory is as busy as it can be."""


def default_workers() -> int:
    """Say how many tasks are done at once where nobody says: more than there are cores wait for each other."""
    return min(MAX_WORKERS, count_cores())


def count_cores() -> int:
    """Give the cores that the system lets this process have: of all, those of its affinity, or its group's share."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # as containers set it; "max" where there is no limit
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        count = min(count, math.ceil(int(quota) / int(period)))
    return max(1, count)

"""How anything is shown: lines, tables, sizes, JSON and the progress bar.

Whatever is printed goes through here, since names come from files: control characters are spelled out. At import this
needs click alone, so that a command's help shows at once; what measures and draws is loaded when a run begins.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

from converter.errors import shorten

if TYPE_CHECKING:
    from converter.storage import Place

_LOOK_SECONDS = 0.1  # to look at many processes takes some milliseconds
_WIDEST = 120  # a longer cell pushes its own line aside, and no other


def echo(text: str = "") -> None:
    """Print lines, without control characters; a reader that has gone (as ``head`` does) is nobody's exit code."""
    _print("\n".join(map(printable, text.split("\n"))))


def _print(text: str) -> None:
    try:
        click.echo(text)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115


def printable(text: str) -> str:
    """Spell out control characters, so that a name in a file cannot steer the terminal, and cut what nobody reads."""
    text = shorten(text)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def show_commits(*places: Place) -> None:
    """Say which state of a repository is read, where a name stands for any number of them."""
    for place in places:
        if place.store.commit_id:
            echo(f"{place} is at commit {place.store.commit_id}.")


def show_bytes(nbytes: float) -> str:
    """Spell a number of bytes for people, in powers of ten as disks and hubs do.

    >>> show_bytes(3_438_000_000), show_bytes(999)
    ('3.44 GB', '999 B')
    """
    return _scale(nbytes, ("B", "kB", "MB", "GB", "TB"))


def show_seconds(seconds: float) -> str:
    """Spell a time for people, roughly.

    >>> show_seconds(0.04), show_seconds(71), show_seconds(5000), show_seconds(40000)
    ('0.1 s', '71 s', '83 min', '11 h')
    """
    if seconds < 10:
        return f"{max(seconds, 0.1):.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.0f} h"


def show_count(count: int) -> str:
    """Spell a count for people.

    >>> show_count(859_520_964), show_count(12)
    ('859.52 M', '12')
    """
    return _scale(count, ("", "k", "M", "G", "T")).rstrip()


def _scale(value: float, units: Sequence[str]) -> str:
    power = 0
    while value >= 999.5 and power < len(units) - 1:
        value /= 1000
        power += 1
    return f"{value:.0f} {units[power]}" if power == 0 else f"{value:.2f} {units[power]}"


def show_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows in columns; one whose cells begin with digits, but for those that are ``-``, is set to the right."""
    cells = [[printable(cell) for cell in row] for row in rows]
    lines = [header, *cells]
    columns = range(len(header))
    widths = [min(_WIDEST, max(len(line[column]) for line in lines)) for column in columns]
    right = [{row[column][:1].isdigit() for row in cells if row[column] != "-"} == {True} for column in columns]
    texts = []
    for line in lines:
        placed = zip(line, widths, right, strict=True)
        text = "  ".join(cell.rjust(width) if to_right else cell.ljust(width) for cell, width, to_right in placed)
        texts.append(text.rstrip())
    echo("\n".join(texts))


def show_json(content: Any) -> None:
    """Print the machine-readable form of a result, of which nothing is cut."""
    import json

    _print(json.dumps(content, indent=2))  # in ASCII, and control characters are spelled


class JsonList:
    """Prints results as one JSON list, each as it comes; where it ``is_shown``, else nothing."""

    def __init__(self, is_shown: bool) -> None:
        self._is_shown = is_shown
        self._before = "["

    @classmethod
    @contextmanager
    def opened(cls, is_shown: bool) -> Iterator[JsonList]:
        """Give a list, whose end is printed whatever happens."""
        results = cls(is_shown)
        try:
            yield results
        finally:
            results.end()

    def add(self, content: Any) -> None:
        """Print one result more."""
        import json

        if self._is_shown:
            _print(f"{self._before}{json.dumps(content, indent=2)}")
            self._before = ","

    def end(self) -> None:
        """Print the end."""
        if self._is_shown:
            _print("[]" if self._before == "[" else "]")


def memory_in_use() -> int:
    """Give the bytes of memory that this process takes, and those that work for it."""
    return _own_memory() + (_workers_memory() if "multiprocessing.process" in sys.modules else 0)


def _workers_memory() -> int:
    """Count what workers share once, where the system tells."""
    import psutil

    total = 0
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            info = child.memory_full_info()
            total += getattr(info, "pss", info.uss)
    return total


def _own_memory() -> int:
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # Linux alone has it; psutil, which knows all systems, takes longer to load than a small run
        import psutil

        return psutil.Process().memory_info().rss


class Meter:
    """Takes the library's progress: moves the bar, where there is one, and looks at the memory in use."""

    def __init__(self, update: Callable[[int], object], name_file: Callable[[str], object]) -> None:
        self._update = update
        self._name_file = name_file
        self._looked = 0.0
        self.peak_nbytes = memory_in_use()

    def __call__(self, nbytes: int) -> None:
        now = time.monotonic()
        if now - self._looked > _LOOK_SECONDS:
            self.peak_nbytes = max(self.peak_nbytes, memory_in_use())
            self._looked = now
        self._update(nbytes)

    def name_file(self, text: str) -> None:
        """Say that a file is through, where files go as a whole."""
        self._name_file(printable(text))


@contextmanager
def open_meter(total_nbytes: int | None, label: str, quiet: bool, verbose: bool = False) -> Iterator[Meter]:
    """Draw a bar by bytes on a terminal, and none elsewhere; there each file is named if that is wanted."""
    if quiet or not sys.stderr.isatty():
        yield Meter(lambda _: None, (lambda text: echo(f"sent {text}")) if verbose else (lambda _: None))
        return
    from tqdm import tqdm

    with tqdm(total=total_nbytes, desc=label, unit="B", unit_scale=True, leave=False, dynamic_ncols=True) as bar:
        yield Meter(bar.update, lambda text: bar.set_postfix_str(text.partition(":")[0]))

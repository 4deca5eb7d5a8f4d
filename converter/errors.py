"""Every exception that wconv raises on purpose, each with the exit code that the command line gives for it.

A message always reads ``path: what is wrong. what to do``: ``where`` is the file, folder or tensor, ``problem``
one clause, ``advice`` what the reader can do next (it may be empty). Anything else that escapes the library is a
bug in wconv.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Collection, Iterable
from pathlib import Path

Where = os.PathLike[str] | str
"""A file or folder by its path or place, or a tensor by its name."""

_MAX_LENGTH = 2_000  # a name in a file may have a million characters


def shorten(text: str) -> str:
    """Leave out the middle of a text that is too long to be read."""
    half = _MAX_LENGTH // 2
    return text if len(text) <= _MAX_LENGTH else f"{text[:half]} ... {text[-half:]}"


def name_some(things: Collection[object], limit: int) -> str:
    """Name the first of many things, and say how many more there are.

    >>> name_some(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    more = f" and {len(things) - limit} more" if len(things) > limit else ""
    return ", ".join(map(str, itertools.islice(things, limit))) + more


def spell_count(number: int, what: str) -> str:
    """Spell how many there are of something.

    >>> spell_count(1, "module"), spell_count(1200, "module")
    ('1 module', '1,200 modules')
    """
    return f"{number:,} {what}{'s' * (number != 1)}"


def spell_shape(shape: Iterable[int]) -> str:
    """Spell the shape of a tensor.

    >>> spell_shape((320, 4, 3, 3)), spell_shape(())
    ('320x4x3x3', 'one number')
    """
    return "x".join(map(str, shape)) or "one number"


def spell_size(nbytes: int) -> str:
    """Spell a number of bytes in a sentence: in full where it is small.

    >>> spell_size(2_052), spell_size(282_086), spell_size(64_100_000_000)
    ('2,052 bytes', '0.3 MB', '64.1 GB')
    """
    if nbytes < 100_000:
        return f"{nbytes:,} bytes"
    return f"{nbytes / 1e6:,.1f} MB" if nbytes < 1e9 else f"{nbytes / 1e9:,.1f} GB"


class WconvError(Exception):
    """The root of wconv's errors; catch it to catch them all."""

    exit_code = 70

    def __init__(self, where: Where, problem: str, advice: str = "") -> None:
        self.where = where if isinstance(where, Path) else shorten(str(where))
        self.problem = shorten(problem)
        self.advice = shorten(advice)
        super().__init__(self.where, self.problem, self.advice)

    def __str__(self) -> str:
        text = f"{self.where}: {self.problem}."
        return f"{text} {self.advice}" if self.advice else text


class BadRequest(WconvError):
    """The options ask for something that cannot be, such as a variant that no file has."""

    exit_code = 2


class BadFile(WconvError):
    """The file is damaged, incomplete, or is not what its name says."""

    exit_code = 3


class HostileFile(BadFile):
    """The file is made to do more than hold weights: it names code, or lies about sizes."""


class Unsupported(WconvError):
    """A valid file that holds something wconv does not convert (sparse tensors, TorchScript, ...)."""

    exit_code = 4


class TrainingPiece(Unsupported):
    """A part of a checkpoint as distributed training wrote it: only all of them make a model."""


class OutputRefused(WconvError):
    """The output exists, is the input, lies behind a link or in the Hub's cache, or is being written by another run."""

    exit_code = 5


class OutputExists(OutputRefused):
    """The output is there already, of whatever run."""


class LossyCast(WconvError):
    """The cast would lose values."""

    exit_code = 6


class SystemRefused(WconvError, OSError):
    """The operating system said no: disk full, permission, read-only."""

    exit_code = 7

    @classmethod
    def from_os_error(cls, error: OSError, where: Where | None = None) -> SystemRefused:
        """Word an OSError as one of ours, if it is none."""
        if isinstance(error, cls):
            return error
        place = where or error.filename or "the operating system"
        problem = (error.strerror or str(error)).lower()
        advice = "Free some room, or write elsewhere with -o." if error.errno == errno.ENOSPC else ""
        return cls(place, problem, advice)


class Unreachable(SystemRefused):
    """A store elsewhere does not answer, or says no: nothing is known of what lies there, and nothing is damaged."""

"""The door that a run writes through: all that it stages appears at once, or nothing of it, wherever that is.

What stages files on a disk is ``staging``. Where files cannot be written in parts, renamed or linked, a transaction
refuses what it cannot do with Unsupported: ``prepare`` and ``link``, and a commit that removes anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from converter.plan.types import Target
from converter.run.journal import Changes
from converter.run.staging import open_staging
from converter.storage import OpenFile, Place


class Transaction(Protocol):
    """Files on their way to a target, by their paths from it; without a commit nothing of them is left."""

    left_over: str
    """What could not be cleared up in the end."""

    def expect(self, parts: Mapping[str, int], others: Mapping[str, int], removed: Iterable[Place]) -> None:
        """Take note of all that will be staged, with its bytes, in parts or at once, and of sources that go then.

        Raises SystemRefused where there is no room for it, or one of the folders cannot be written.
        """

    def prepare(self, name: str, header: bytes, nbytes: int) -> bool:
        """Make a file of its final size that begins with a header; say whether an earlier run had left it there."""

    def staged(self, name: str) -> Place:
        """Name what is staged: ``open_staged`` opens it to be written, in any process, and anybody may read it."""

    def put(self, name: str, content: bytes) -> None:
        """Stage a small file."""

    def copy(self, name: str, source: OpenFile) -> None:
        """Stage a copy of an open file."""

    def link(self, name: str, source: Place) -> None:
        """Stage a second name of a file on the same disk, or a second link where it is a link."""

    def commit(self, changes: Changes, request: str) -> None:
        """Publish all that is staged, then remove what it replaces."""


def begin(target: Target, request: str = "") -> AbstractContextManager[Transaction]:
    """Begin to write into a target; raises OutputRefused while another run does, SystemRefused where none can."""
    return open_staging(target, request)

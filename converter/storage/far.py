"""Files that are read, and written, over a network: long streams in place of many requests, and each look but once.

To ask for bytes takes as long as a megabyte of them does, so whoever reads much says first what (``expect``), in the
order in which it will be read. What follows itself in a file then comes as one stream. What lies near each other in
another order comes into a buffer of some MB. Every request is for the file as it was when it was seen first, by its
tag; where that is another by now, it is a BadFile.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from converter.errors import BadFile, SystemRefused
from converter.storage.base import FileRef, Info, OpenFile, Place, Store

_BUFFER_NBYTES = 16 << 20
_LARGE_NBYTES = _BUFFER_NBYTES // 2  # worth a request of its own
_GAP_NBYTES = 1 << 16  # is read with what is around it
_HEAVY_NBYTES = 1 << 21

heeded: list[Callable[[], object]] = []
"""What is called while somebody waits for a network, and raises where nobody waits for them any more."""

stopping: list[Callable[[], object]] = []
"""What is called where tasks of this process are to stop that wait for a network, and do not hear of it themselves."""

PART_NBYTES = 8 << 20
"""How much goes up at once, at least, where a file goes up in parts."""

TASK_NBYTES = 48_000_000
"""What a task takes, at most, beside its buffers, when it reads and writes over a network."""


class Range(NamedTuple):
    """Bytes of a file, from ``begin`` to ``end``."""

    begin: int
    end: int


class _Window(NamedTuple):
    """Ranges that are held at once, by their places; a single one that is large is read as it comes."""

    ranges: tuple[Range, ...]
    is_held: bool


def _windows_of(wanted: Iterable[Range]) -> Iterator[_Window]:
    """Group ranges, in the order in which they are read."""
    held: list[Range] = []
    for one in _joined(wanted, 0):
        if one.end - one.begin >= _LARGE_NBYTES or sum(end - begin for begin, end in (*held, one)) > _BUFFER_NBYTES:
            if held:
                yield _held(held)
            held = []
        if one.end - one.begin >= _LARGE_NBYTES:
            yield _Window((one,), is_held=False)
        else:
            held.append(one)
    if held:
        yield _held(held)


def heed() -> None:
    """Raise where nobody waits any more for what this thread does."""
    for listen in heeded:
        listen()


def stop_waiting() -> None:
    """Have those stop that wait for a network."""
    for stop in list(stopping):
        stop()


def count_streams(wanted: Iterable[tuple[int, int]]) -> int:
    """Say in how many streams a file comes, given what is read of it, in order: offsets and numbers of bytes."""
    count, at = 0, -1
    for window in _windows_of(Range(offset, offset + nbytes) for offset, nbytes in wanted if nbytes):
        for begin, end in window.ranges:
            count += begin != at
            at = end
    return count


def _held(ranges: Sequence[Range]) -> _Window:
    return _Window(tuple(_joined(sorted(ranges), _GAP_NBYTES)), is_held=len(ranges) > 1)


def _joined(ranges: Iterable[Range], gap: int) -> Iterator[Range]:
    """Join ranges that begin where the last one has ended, or a gap later."""
    last: Range | None = None
    for one in ranges:
        if last is not None and last.begin <= one.begin <= last.end + gap:
            last = Range(last.begin, max(last.end, one.end))
            continue
        if last is not None:
            yield last
        last = one
    if last is not None:
        yield last


class FarFile(OpenFile):
    """A file of a store that is far; ``fetches`` gives its bytes."""

    is_far = True

    def __init__(self, ref: FileRef, nbytes: int) -> None:
        super().__init__(ref, nbytes)
        self._windows: deque[_Window] = deque()
        self._held: list[tuple[int, bytearray]] = []
        self._stream = iter(())  # type: Iterator[memoryview]
        self._rest = memoryview(b"")
        self._at = -1  # the place in the file that the stream has come to
        self._until = -1
        self._is_heavy = False
        self._is_told = False

    @abstractmethod
    def fetches(self, begin: int, end: int) -> Iterator[memoryview]:
        """Give the bytes from ``begin`` to ``end`` as they come, with one request where nothing goes wrong."""

    def expect(self, wanted: Iterable[tuple[int, int]]) -> None:
        """Take note of what will be read, in order: offsets and numbers of bytes."""
        ranges = (Range(offset, min(offset + nbytes, self.nbytes)) for offset, nbytes in wanted)
        self._windows = deque(_windows_of(one for one in ranges if one.begin < one.end))
        self._held = []
        self._is_told = True

    def read_small(self, offset: int, nbytes: int) -> bytes:
        # What lies behind is on its way, where it is wanted.
        return self.read(offset, nbytes) if self._is_told else super().read_small(offset, nbytes)

    def read_into(self, offset: int, out: memoryview) -> int:
        end = min(offset + len(out), self.nbytes)
        at = offset
        while at < end:
            part = out[at - offset : end - offset]
            count = self._from_held(at, part) or self._from_stream(at, part)
            if not count and not self._turn_to(at):
                self._open(at, end)  # nobody has said so
            at += count
        return max(0, end - offset)

    def _from_held(self, at: int, out: memoryview) -> int:
        for begin, raw in self._held:
            if begin <= at < begin + len(raw):
                part = memoryview(raw)[at - begin : at - begin + len(out)]
                out[: len(part)] = part
                return len(part)
        return 0

    def _from_stream(self, at: int, out: memoryview) -> int:
        if at != self._at or at >= self._until:
            return 0
        if not self._rest:
            self._rest = next(self._stream, memoryview(b""))
            if not self._rest:
                problem = "ended while it was read, before all of it was there"
                raise SystemRefused(self.ref.place, problem, "Run this again.")
        count = min(len(out), len(self._rest))
        out[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        self._at += count
        return count

    def _turn_to(self, at: int) -> bool:
        """Open what is expected around a place, passing over what nobody has read; say whether there is any."""
        for place, window in enumerate(self._windows):
            if any(begin <= at < end for begin, end in window.ranges):
                break
        else:
            return False
        for _ in range(place):
            self._windows.popleft()
        self._windows.popleft()
        if window.is_held:
            self._held = []  # goes before the next comes
            for begin, end in window.ranges:
                raw = bytearray(end - begin)
                self._open(begin, self._end_of_stream(window, end))
                self._fill(begin, memoryview(raw))
                self._held.append((begin, raw))
        elif at != self._at:
            self._open(at, self._end_of_stream(window, window.ranges[0].end))
        return True

    def _fill(self, begin: int, out: memoryview) -> None:
        done = 0
        while done < len(out):
            done += self._from_stream(begin + done, out[done:])

    def _end_of_stream(self, window: _Window, end: int) -> int:
        """Say how far a stream may go on: over the windows to come that begin where the last has ended."""
        if end != window.ranges[-1].end:
            return end
        for following in self._windows:
            if following.ranges[0].begin != end:
                break
            end = following.ranges[0].end
            if len(following.ranges) > 1:
                break
        return end

    def _open(self, begin: int, end: int) -> None:
        if begin == self._at and end <= self._until:
            return
        self._let_go()
        self._stream = self.fetches(begin, end)
        self._at, self._until = begin, end

    def _let_go(self) -> None:
        close = getattr(self._stream, "close", None)
        if close:
            close()
        self._stream, self._rest, self._at, self._until = iter(()), memoryview(b""), -1, -1

    def fetch(self, offset: int, nbytes: int) -> bytes:
        if nbytes > _HEAVY_NBYTES and not self._is_heavy:
            _HEAVY.acquire()
            self._is_heavy = True
        return super().fetch(offset, nbytes)

    def check(self) -> None:
        """Look at nothing: each request was for the file as its tag says."""

    def close(self) -> None:
        self._let_go()
        self._held = []
        if self._is_heavy:
            self._is_heavy = False
            _HEAVY.release()


# Headers are read many at once, and what is made of one may take a hundred times its bytes: of long ones, one at once.
_HEAVY = threading.Lock()


class Snapshot:
    """What was seen of a store, so that it is asked once. Whoever is sent it elsewhere begins with nothing."""

    def __init__(self) -> None:
        self.infos: dict[str, Info | None] = {}
        self.folders: dict[str, dict[str, Info]] = {}
        self.asked: set[str] = set()  # folders of which one entry was asked for
        self.lock = threading.RLock()

    def __reduce__(self) -> tuple[type[Snapshot], tuple[()]]:
        return Snapshot, ()

    def forget(self) -> None:
        """Have everything looked at again."""
        with self.lock:
            self.infos.clear()
            self.folders.clear()
            self.asked.clear()


class Receipt(NamedTuple):
    """What a file that was written is known by: its path from the target, its size, and what the store says of it.

    ``sha256`` and ``sample``, its first bytes, are for stores that take files by their hashes.
    """

    name: str
    nbytes: int
    tag: str = ""
    sha256: str = ""
    sample: bytes = b""


class Writer(Protocol):
    """Takes a file in order, from its begin to its end."""

    receipt: Receipt | None
    """What is known of the file once the context was left."""

    def write(self, data: memoryview) -> None:
        """Take the next bytes, all of them."""


@dataclass(frozen=True, slots=True)
class FarStore(Store):
    """A store on other machines; what it was seen to hold is kept for as long as the place that was named."""

    snapshot: Snapshot = field(default_factory=Snapshot, init=False, repr=False, compare=False)

    is_far = True

    def absolute(self, key: str) -> Place:
        return Place(self, key)

    def real(self, key: str) -> Place:
        return Place(self, key)

    def is_same(self, key: str, other: Place) -> bool:
        return Place(self, key) == other

    @abstractmethod
    def look(self, key: str) -> Info | None:
        """Ask what lies at a key, a file or a folder."""

    @abstractmethod
    def look_in(self, key: str) -> dict[str, Info]:
        """Ask what lies in a folder, by its names; nothing for what is none."""

    def stat(self, key: str) -> Info | None:
        """Say what lies at a key. The second time that a folder is asked about, all of it is looked at."""
        seen, (folder, _, name) = self.snapshot, key.rpartition("/")
        with seen.lock:
            if key not in seen.infos:
                if folder in seen.folders or folder in seen.asked:
                    found = self._entries(folder).get(name)
                else:
                    seen.asked.add(folder)
                    found = self.look(key)
                seen.infos[key] = found
            return seen.infos[key]

    def list(self, key: str) -> list[str]:
        return sorted(self._entries("" if key == "." else key))

    def _entries(self, folder: str) -> dict[str, Info]:
        seen = self.snapshot
        with seen.lock:
            if folder not in seen.folders:
                seen.folders[folder] = self.look_in(folder)
            return seen.folders[folder]

    def found(self, place: Place) -> Info:
        """Give what is known of a file that is to be opened; raises BadFile for what is none."""
        info = self.stat(place.key)
        if info is None:
            raise BadFile(place, "does not exist")
        if info.kind != "file":
            raise BadFile(place, "is no file")
        return info


class WritableStore(FarStore):
    """A store that can be written to, a whole file at a time, each by one worker.

    One that ``keeps_notes`` can tell what a file was made of. In one that ``commits`` nothing is seen of what is
    written before all of it is published.
    """

    __slots__ = ()

    keeps_notes = False
    commits = False

    @abstractmethod
    def writer(self, key: str, nbytes: int, note: str) -> AbstractContextManager[Writer]:
        """Write a file that is there, whole, when the context is left, and not at all after an error."""

    def note_of(self, key: str) -> str:
        """Give the note that a file was written with; nothing for one that has none, or is not there."""
        return ""

    def withdraw(self, keys: Sequence[str]) -> None:
        """Remove files that were written, or that others would take for what is written now."""

    def get_ready(self) -> None:
        """Make what is to be written to, where that is wanted."""

    @abstractmethod
    def publish(
        self,
        key: str,
        written: Sequence[Receipt],
        texts: Sequence[tuple[str, bytes, str]],
        removed: Sequence[str],
        message: str,
        replaces: bool,
    ) -> str:
        """Let what was written be seen below a key: small files with their notes, in order; give what is to be told.

        Raises OutputRefused where somebody else has written there meanwhile.
        """

    @abstractmethod
    def try_to_write(self, key: str) -> None:
        """Raise SystemRefused where nothing can be written below a key; nothing is left there."""


class CommittedStore(WritableStore):
    """A store in which all that is written appears with one commit."""

    __slots__ = ()

    commits = True

    @abstractmethod
    def to_write(self, create: bool, private: bool, pr: bool) -> CommittedStore:
        """Give the store as it is to be written to: made where it is not there, for its owner alone, as a proposal."""


def nbytes_of(tag: str) -> int:
    """Give the size of a file by its tag, as ``tag_of`` makes them."""
    return int(tag.partition(":")[0])


def tag_of(nbytes: int, mark: str | None) -> str:
    """Make a tag of a file's size and what its store changes with it, so that it can be opened with no more questions.

    >>> tag_of(12, '"ab"')
    '12:"ab"'
    """
    return f"{nbytes}:{mark or ''}"


def mark_of(tag: str) -> str:
    """Give what a store has changed with a file, by a tag that was made of it."""
    return tag.partition(":")[2]

"""Files that are read, and written, over a network: long streams in place of many requests, and each look but once.

To ask for bytes takes as long as a megabyte of them does, so whoever reads much says first what (``expect``), in the
order in which it will be read, and it comes in few streams (``streams``). Every request is for the file as it was when
it was seen first, by its tag; where that is another by now, it is a BadFile.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

from converter.errors import BadFile, Unreachable
from converter.storage.base import FileRef, Info, OpenFile, Place, Store, Tag
from converter.storage.streams import HELD_NBYTES, Stream, plan_streams

_HEAVY_NBYTES = 1 << 21
_MAX_OPEN = 4  # streams of a file at once
_AT_ONCE = 16  # questions
_A = TypeVar("_A")
_T = TypeVar("_T")

heeded: list[Callable[[], object]] = []
"""What is called while somebody waits for a network, and raises where nobody waits for them any more."""

stopping: list[Callable[[], object]] = []
"""What is called where tasks of this process are to stop that wait for a network, and do not hear of it themselves."""

PART_NBYTES = 8 << 20
"""How much goes up at once, at least, where a file goes up in parts."""

TASK_NBYTES = 56_000_000
"""What a task takes, at most, beside its buffers, when it reads and writes over a network."""


def heed() -> None:
    """Raise where nobody waits any more for what this thread does."""
    for listen in heeded:
        listen()


def stop_waiting() -> None:
    """Have those stop that wait for a network."""
    for stop in stopping.copy():  # one may end meanwhile
        stop()


def at_once(function: Callable[[_A], _T], arguments: Iterable[_A]) -> Iterator[_T]:
    """Give what a function says of each argument, in order; some are asked at once, as each takes its time."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            yield from pool.map(function, arguments)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def look_at_each(function: Callable[[Place], _T], places: Sequence[Place]) -> Iterator[_T]:
    """Give what a function says of each place of one store, in order; of those that are far some are asked at once."""
    return at_once(function, places) if len(places) > 1 and places[0].store.is_far else map(function, places)


class FarFile(OpenFile):
    """A file of a store that is far; ``fetches`` gives its bytes."""

    is_far = True

    def __init__(self, ref: FileRef, nbytes: int) -> None:
        super().__init__(ref, nbytes)
        self._planned: deque[Stream] = deque()
        self._open: list[_Coming] = []
        self._held = _Held()
        self._is_heavy = False
        self._is_told = False

    @abstractmethod
    def fetches(self, begin: int, end: int) -> Iterator[memoryview]:
        """Give the bytes from ``begin`` to ``end`` as they come, with one request where nothing goes wrong.

        Several may be under way at once, in threads of their own.
        """

    def expect(self, wanted: Iterable[tuple[int, int]]) -> None:
        """Take note of what will be read, in order: offsets and numbers of bytes."""
        parts = ((0, offset, min(nbytes, self.nbytes - offset)) for offset, nbytes in wanted)
        self.follow(plan_streams(parts).get(0, []))

    def follow(self, streams: Iterable[Stream]) -> None:
        cut = (stream._replace(end=min(stream.end, self.nbytes)) for stream in streams)
        self._let_go()
        self._planned = deque(stream for stream in cut if stream.begin < stream.end)
        self._is_told = True

    def read_next(self, offset: int, nbytes: int) -> None:
        self._planned.appendleft(Stream(offset, min(offset + nbytes, self.nbytes)))

    def read_small(self, offset: int, nbytes: int) -> bytes:
        # What lies behind is on its way, where it is wanted.
        return self.read(offset, nbytes) if self._is_told else super().read_small(offset, nbytes)

    def read_into(self, offset: int, out: memoryview) -> int:
        end = min(offset + len(out), self.nbytes)
        at = offset
        while at < end:
            part = out[at - offset : end - offset]
            count = self._held.take(at, part)
            if not count:
                count = self._turn_to(at, end).take(at, part, self._held)
                self._open = [coming for coming in self._open if coming.at < coming.end]
            at += count
        return max(0, end - offset)

    def _turn_to(self, at: int, end: int) -> _Coming:
        """Give the stream that comes to a place next, one that is under way if it can be."""
        for coming in self._open:
            if coming.reaches(at):
                return coming
        for place, stream in enumerate(self._planned):
            if stream.begin <= at < stream.end:
                del self._planned[place]
                begin = stream.begin if stream.reaches(stream.begin, at) else at
                return self._begin(stream._replace(begin=begin))
        return self._begin(Stream(at, end))  # nobody has said so

    def _begin(self, stream: Stream) -> _Coming:
        if len(self._open) == _MAX_OPEN:
            oldest = self._open.pop(0)
            oldest.close()
            self._planned.appendleft(oldest.rest._replace(begin=oldest.at))
        coming = _Coming(self, stream)
        self._open.append(coming)
        return coming

    def _let_go(self) -> None:
        for coming in self._open:
            coming.close()
        self._open.clear()
        self._held = _Held()
        self._planned.clear()

    def fetch(self, offset: int, nbytes: int) -> bytes:
        if nbytes > _HEAVY_NBYTES and not self._is_heavy:
            _HEAVY.acquire()
            self._is_heavy = True
        return super().fetch(offset, nbytes)

    def check(self) -> None:
        """Look at nothing: each request was for the file as its tag says."""

    def close(self) -> None:
        self._let_go()
        if self._is_heavy:
            self._is_heavy = False
            _HEAVY.release()


class _Coming:
    """A stream under way; ``at`` is the place in the file that it has come to, and ``end`` where it ends."""

    def __init__(self, file: FarFile, stream: Stream) -> None:
        self.rest = stream
        self._passed = 0  # of what is to be held
        self.at = stream.begin
        self.end = stream.end
        self._place = file.ref.place
        self._parts = file.fetches(stream.begin, stream.end)
        self._part = memoryview(b"")

    def reaches(self, at: int) -> bool:
        """Say whether it comes to a place with little on the way that is not held."""
        return self.rest.reaches(self.at, at, self._passed)

    def take(self, at: int, out: memoryview, held: _Held) -> int:
        """Go on to a place, keep what is to be held on the way, and fill ``out`` as far as its next bytes are there."""
        while self._passed < len(self.rest.held) and self.rest.held[self._passed].begin < at:
            one = self.rest.held[self._passed]
            begin, end = max(one.begin, self.at), min(one.end, at)
            if begin < end:
                self._pass_to(begin)
                raw = bytearray(end - begin)
                self._fill(memoryview(raw))
                held.put(begin, raw)
            self._passed += 1
        self._pass_to(at)
        return self._fill_some(out)

    def close(self) -> None:
        """Ask for no more of it."""
        close = getattr(self._parts, "close", None)
        if close:
            close()

    def _pass_to(self, at: int) -> None:
        while self.at < at:
            self._next_part(at - self.at)

    def _fill(self, out: memoryview) -> None:
        done = 0
        while done < len(out):
            done += self._fill_some(out[done:])

    def _fill_some(self, out: memoryview) -> int:
        part = self._next_part(min(len(out), self.end - self.at))
        out[: len(part)] = part
        return len(part)

    def _next_part(self, nbytes: int) -> memoryview:
        if not self._part:
            self._part = next(self._parts, memoryview(b""))
            if not self._part:
                problem = "ended while it was read, before all of it was there"
                raise Unreachable(self._place, problem, "Run this again.")
        part, self._part = self._part[:nbytes], self._part[nbytes:]
        self.at += len(part)
        return part


class _Held:
    """Parts of a file that came before they are read; each goes when as many bytes were taken of it as it has."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._parts: dict[int, tuple[bytearray, int]] = {}
        self.nbytes = 0

    def put(self, begin: int, raw: bytearray) -> None:
        """Keep a part; where nobody comes for what is there, the oldest goes."""
        self._drop(begin)
        while self._parts and self.nbytes + len(raw) > HELD_NBYTES:
            self._drop(next(iter(self._parts)))
        insort(self._begins, begin)
        self._parts[begin] = raw, len(raw)
        self.nbytes += len(raw)

    def take(self, at: int, out: memoryview) -> int:
        """Fill ``out`` as far as its bytes are here."""
        place = bisect_right(self._begins, at) - 1
        if place < 0:
            return 0
        begin = self._begins[place]
        raw, left = self._parts[begin]
        part = memoryview(raw)[at - begin : at - begin + len(out)]
        out[: len(part)] = part
        self._parts[begin] = raw, left - len(part)
        if left <= len(part):
            self._drop(begin)
        return len(part)

    def _drop(self, begin: int) -> None:
        if begin in self._parts:
            self.nbytes -= len(self._parts.pop(begin)[0])
            del self._begins[bisect_left(self._begins, begin)]


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
    """What a file that was written is known by: its key, its size, and its hash in stores that take files by that."""

    name: str
    nbytes: int
    sha256: str = ""


class Publication(NamedTuple):
    """What makes a set of files that were written: small ``texts``, keys with contents and notes, in order.

    ``removed`` are keys of what goes. Others' files are in the way of texts, unless it ``replaces`` them. ``message``
    says what it is, where that is kept.
    """

    written: Sequence[Receipt]
    texts: Sequence[tuple[str, bytes, str]]
    removed: Sequence[str]
    message: str
    replaces: bool


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
                if key not in ("", ".") and (folder in seen.folders or folder in seen.asked):
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

    def open(self, place: Place, tag: Tag | None) -> OpenFile:
        if tag is None:
            info = self.stat(place.key)
            if info is None:
                raise BadFile(place, "does not exist")
            if info.kind != "file":
                raise BadFile(place, "is no file")
            tag = info.tag
        assert isinstance(tag, str)
        return self.opened(FileRef(place, tag), tag)

    @abstractmethod
    def opened(self, ref: FileRef, tag: str) -> OpenFile:
        """Give a file that is there as its tag says, with no more questions."""


class WritableStore(FarStore):
    """A store that can be written to, a whole file at a time, each by one worker.

    One that ``keeps_notes`` can tell what a file was made of.
    """

    __slots__ = ()

    @abstractmethod
    def writer(self, key: str, nbytes: int, note: str) -> AbstractContextManager[Writer]:
        """Write a file that is there, whole, when the context is left, and not at all after an error."""

    def note_of(self, key: str) -> str:
        """Give the note that a file was written with; nothing for one that has none, or is not there."""
        return ""

    def stored(self, key: str) -> tuple[Info, str] | None:
        """Ask for a file and its note, whatever was seen before; None where there is none."""
        info = self.look(key)
        return (info, self.note_of(key)) if info else None

    def withdraw(self, keys: Sequence[str]) -> None:
        """Remove files that were written, or that others would take for what is written now."""

    def get_ready(self) -> None:
        """Make what is to be written to, where that is wanted."""

    @abstractmethod
    def publish(self, what: Publication) -> str:
        """Let what was written be seen as a set; give what is to be told.

        Raises OutputRefused where somebody else has written there meanwhile.
        """

    @abstractmethod
    def try_to_write(self, key: str) -> None:
        """Raise Unreachable where nothing can be written below a key; nothing is left there."""


class CommittedStore(WritableStore):
    """A store in which nothing is seen of what is written before all of it appears, with one commit."""

    __slots__ = ()

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

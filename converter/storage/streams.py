"""In which streams the bytes of files that are far come, given what will be read, in order.

A request takes as long as a megabyte does, so a stream goes on for as long as it can: what it passes over on its way to
what is read next is held, if it is wanted soon and there is room, and a short gap comes with the rest. A stream is
asked for up to where it is read, and no byte further.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from typing import Generic, NamedTuple, TypeVar

HELD_NBYTES = 3 << 23
"""What is held at once at most, of all files of a task."""

GAP_NBYTES = 1 << 16
"""As much comes with what is around it, though nobody reads it."""

# So much may be of gaps, and one byte in so many, those between records of an archive left out.
_WASTED_NBYTES = 1 << 20
_WASTED_SHARE = 64
_TINY_NBYTES = 128
# So many bytes at most may be held for so many that are read meanwhile. No one limit is best for all models: of long
# lists the first is taken, of others that with the fewest streams.
_HELD_TIMES = tuple(HELD_NBYTES << bits for bits in (23, 20, 21, 22, 24, 25))
_MANY = 5_000
_TRIES = 16  # ranges in a row that are not to be held
_STREAMS = 3  # at once: what lies elsewhere, while a long one waits

_K = TypeVar("_K", bound=Hashable)


class Range(NamedTuple):
    """Bytes of a file, from ``begin`` to ``end``."""

    begin: int
    end: int


class Stream(NamedTuple):
    """Bytes that come with one request; those in ``held`` before they are read."""

    begin: int
    end: int
    held: tuple[Range, ...] = ()

    def reaches(self, at: int, to: int, passed: int = 0) -> bool:
        """Say whether little goes by between two places that is not held; so many of ``held`` have been passed."""
        if not self.begin <= at <= to < self.end:
            return False
        for place in range(passed, len(self.held)):
            begin, end = self.held[place]
            if begin >= to or begin - at > GAP_NBYTES:
                break
            at = max(at, end)
        return to - at <= GAP_NBYTES


def plan_streams(wanted: Iterable[tuple[_K, int, int]]) -> dict[_K, list[Stream]]:
    """Give the streams of each file, in the order in which they begin, for files, offsets and numbers of bytes."""
    ranges = [(key, Range(offset, offset + nbytes)) for key, offset, nbytes in wanted if nbytes > 0]
    times = _HELD_TIMES if len(ranges) <= _MANY else _HELD_TIMES[:1]
    return min((_Planner(ranges, time).run() for time in times), key=_count)


def count_streams(wanted: Iterable[tuple[Hashable, int, int]]) -> int:
    """Say in how many streams it comes what is read, in order, of files: offsets and numbers of bytes."""
    return _count(plan_streams(wanted))


def _count(streams: Mapping[_K, list[Stream]]) -> int:
    return sum(map(len, streams.values()))


class _Growing(Generic[_K]):
    """A stream as far as it has come."""

    __slots__ = ("at", "begin", "held", "key")

    def __init__(self, key: _K, begin: int) -> None:
        self.key = key
        self.begin = self.at = begin
        self.held: list[Range] = []


class _Planner(Generic[_K]):
    """Goes once through what is wanted, as a reader will."""

    def __init__(self, wanted: list[tuple[_K, Range]], held_time: int) -> None:
        self.wanted = wanted
        self.held_time = held_time
        self.before = [0]  # bytes that are read before each
        by_key: dict[_K, list[int]] = defaultdict(list)
        for number, (key, (begin, end)) in enumerate(wanted):
            self.before.append(self.before[-1] + end - begin)
            by_key[key].append(number)
        self.placed = {key: sorted(numbers, key=lambda number: wanted[number][1]) for key, numbers in by_key.items()}
        self.begins = {key: [wanted[number][1].begin for number in placed] for key, placed in self.placed.items()}
        self.is_held = bytearray(len(wanted))
        self.is_settled = bytearray(len(wanted))  # held, or read
        self.room = HELD_NBYTES
        self.waste = _WASTED_NBYTES + self.before[-1] // _WASTED_SHARE
        self.open: list[_Growing[_K]] = []
        self.streams: dict[_K, list[_Growing[_K]]] = defaultdict(list)

    def run(self) -> dict[_K, list[Stream]]:
        for number, (key, one) in enumerate(self.wanted):
            self.is_settled[number] = 1
            if self.is_held[number]:
                self.room += one.end - one.begin
                continue
            stream = self._continued(number) or self._begun(number)
            stream.at = one.end
            if stream not in self.open:
                self.open = [*self.open[1 - _STREAMS :], stream]
                self.streams[key].append(stream)
        return {
            key: [Stream(one.begin, one.at, tuple(one.held)) for one in streams]
            for key, streams in self.streams.items()
        }

    def _continued(self, now: int) -> _Growing[_K] | None:
        """Give an open stream that can go on to what is read now."""
        key, one = self.wanted[now]
        for stream in reversed(self.open):
            if stream.key == key and stream.at <= one.begin and self._passes(stream, now):
                return stream
        return None

    def _passes(self, stream: _Growing[_K], now: int) -> bool:
        """Let a stream go on to what is read now, and hold what is wanted later, where that is not too much."""
        key, (to, _) = self.wanted[now]
        at, waste, tries = stream.at, 0, 0
        room, placed = self.room, self.placed[key]
        passed: list[int] = []
        for place in range(bisect_left(self.begins[key], at), len(placed)):
            number = placed[place]
            one = self.wanted[number][1]
            if one.begin >= to or one.begin - at > GAP_NBYTES or tries > _TRIES or waste > self.waste:
                break
            if one.end > to or one.begin < at or not self._is_worth(number, now, room):
                tries += 1
                continue
            passed.append(number)
            room -= one.end - one.begin
            waste += _lost(one.begin - at)
            at, tries = one.end, 0
        waste += _lost(to - at)
        if to - at > GAP_NBYTES or waste > self.waste:
            return False
        self._hold(stream, passed, waste)
        return True

    def _begun(self, now: int) -> _Growing[_K]:
        """Begin a stream for what is read now, and before that where what is wanted soon lies there."""
        key, one = self.wanted[now]
        begin, waste, tries = one.begin, 0, 0
        room, placed = self.room, self.placed[key]
        before: list[int] = []
        for place in range(bisect_left(self.begins[key], begin) - 1, -1, -1):
            number = placed[place]
            other = self.wanted[number][1]
            lost = _lost(begin - other.end)
            if begin - other.end > GAP_NBYTES or tries > _TRIES or waste + lost > self.waste:
                break
            if other.end > begin or not self._is_worth(number, now, room):
                tries += 1
                continue
            before.append(number)
            room -= other.end - other.begin
            begin, waste, tries = other.begin, waste + lost, 0
        stream = _Growing(key, begin)
        self._hold(stream, before[::-1], waste)
        return stream

    def _is_worth(self, number: int, now: int, room: int) -> bool:
        begin, end = self.wanted[number][1]
        nbytes = end - begin
        is_free = not self.is_settled[number] and nbytes <= room
        return is_free and nbytes * (self.before[number] - self.before[now]) <= self.held_time

    def _hold(self, stream: _Growing[_K], numbers: list[int], waste: int) -> None:
        self.waste -= waste
        for number in numbers:
            begin, end = self.wanted[number][1]
            self.is_held[number] = self.is_settled[number] = 1
            self.room -= end - begin
            stream.held.append(Range(begin, end))


def _lost(gap: int) -> int:
    return gap if gap > _TINY_NBYTES else 0

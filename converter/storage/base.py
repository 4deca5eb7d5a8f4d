"""What all stores have in common: a Place names a file or folder of one, a FileRef is a file as it was seen.

These are values: they can be pickled, compared and sent to another machine, and hold neither handles nor secrets. A
key is a path from where the store begins, with slashes; for messages a place is spelled as the user did.
"""

from __future__ import annotations

import math
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from itertools import starmap
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal, NamedTuple, Protocol

from converter.errors import BadFile, SystemRefused, Unreachable, Unsupported
from converter.storage.streams import Stream

_CHUNK_NBYTES = 1 << 20
# Small parts that lie close together are read at once, with what is between them: to ask takes as long as 20 kB do.
NEAR_NBYTES = 1 << 12
_AHEAD_NBYTES = 1 << 16

UNLISTED = "a web server does not list what it has: files of other names are not"
"""How a note begins on a store that does not list all."""

Kind = Literal["file", "folder", "other"]
Tag = tuple[int, ...] | str
"""What changes when a file does, such as an ETag; two files with the same bytes may have two."""

_MAX_HOPS = 40  # as many links as Linux follows


class Info(NamedTuple):
    """What lies at a place, behind links.

    Its content is as old as ``modified_ns``, all of it as ``changed_ns``: 0 where a store does not tell.
    """

    kind: Kind
    nbytes: int
    tag: Tag
    modified_ns: int = 0
    changed_ns: int = 0


class OpenFile(ABC):
    """A file that is open to be read by ranges, from any offset and in any order; ``nbytes`` is its size.

    Where it ``is_far``, each read may be a request over a network. Its first byte is the byte ``begin`` of what ``ref``
    names.
    """

    is_far: bool = False
    begin: int = 0

    def __init__(self, ref: FileRef, nbytes: int) -> None:
        self.ref = ref
        self.nbytes = nbytes
        self._kept: list[tuple[int, bytes]] = []
        self._ahead = b""
        self._ahead_begin = 0
        self._end = math.inf  # of the small part that was read last

    @abstractmethod
    def read_into(self, offset: int, out: memoryview) -> int:
        """Fill ``out`` from an offset on; give how many bytes there were, fewer only at the file's end."""

    @abstractmethod
    def check(self) -> None:
        """Raise BadFile where the file is not, or no longer, as its tag says."""

    @abstractmethod
    def close(self) -> None:
        """Let the file go."""

    def read(self, offset: int, nbytes: int) -> bytes:
        """Give bytes from an offset on, fewer at the file's end."""
        nbytes = min(nbytes, self.nbytes - offset)
        if nbytes <= 0:
            return b""  # a header may name an offset that no system call takes
        raw = self.kept(offset, nbytes)
        return self.fetch(offset, nbytes) if raw is None else raw

    def fetch(self, offset: int, nbytes: int) -> bytes:
        """Give bytes that are not kept, none of them beyond the file's end."""
        out = bytearray(nbytes)
        count = self.read_into(offset, memoryview(out))
        return bytes(memoryview(out)[:count])

    def keep(self, offset: int, nbytes: int) -> bytes:
        """Read a part that the next reads fall into: each may be a request over a network."""
        raw = self.read(offset, nbytes)
        self.hold(offset, raw)
        return raw

    def hold(self, offset: int, raw: bytes) -> None:
        """Keep a part that was read already."""
        self._kept.append((offset, raw))

    def kept(self, offset: int, nbytes: int) -> bytes | None:
        """Give bytes that are kept, if all of them are."""
        for begin, raw in self._kept:
            if begin <= offset and offset + nbytes <= begin + len(raw):
                return raw[offset - begin : offset - begin + nbytes]
        return None

    def read_small(self, offset: int, nbytes: int) -> bytes:
        """Like ``read``, for small parts: those that lie close behind one another are read at once."""
        is_near = 0 <= offset - self._end <= NEAR_NBYTES
        self._end = offset + nbytes
        begin = offset - self._ahead_begin
        if not 0 <= begin <= len(self._ahead) - nbytes:
            if not is_near or self.kept(offset, nbytes) is not None:
                return self.read(offset, nbytes)
            self._ahead, self._ahead_begin, begin = self.read(offset, max(nbytes, _AHEAD_NBYTES)), offset, 0
        return self._ahead[begin : begin + nbytes]

    # What follows is for those that are far.

    def expect(self, wanted: Iterable[tuple[int, int]]) -> None:  # noqa: B027
        """Take note of what will be read, in order: offsets and numbers of bytes."""

    def read_next(self, offset: int, nbytes: int) -> None:  # noqa: B027
        """Take note of what is read before all that is expected."""

    def follow(self, streams: Iterable[Stream]) -> None:  # noqa: B027
        """Like ``expect``, for what was planned with other files."""

    def read_many(self, ranges: Iterable[tuple[int, int]]) -> Iterator[bytes]:
        """Read small parts, each an offset and so many bytes; a store may ask for all of them at once."""
        return starmap(self.read_small, ranges)

    def chunks(self) -> Iterator[bytes]:
        """Read all of it, from its begin to its end."""
        self.expect(((0, self.nbytes),))
        for offset in range(0, self.nbytes, _CHUNK_NBYTES):
            yield self.read(offset, _CHUNK_NBYTES)


class Window(OpenFile):
    """A part of an open file, as a file of its own; its tag, and where it is closed, are the whole's."""

    def __init__(self, file: OpenFile, begin: int, nbytes: int) -> None:
        super().__init__(file.ref, nbytes)
        self.file = file
        self.is_far = file.is_far
        self.begin = file.begin + begin
        self._begin = begin

    def read_into(self, offset: int, out: memoryview) -> int:
        return self.file.read_into(self._begin + offset, out[: max(0, self.nbytes - offset)])

    def fetch(self, offset: int, nbytes: int) -> bytes:
        return self.file.read(self._begin + offset, nbytes)

    def check(self) -> None:
        self.file.check()

    def close(self) -> None:
        """Nothing: whoever has the whole file open closes it."""


def natural_key(name: str) -> tuple[tuple[int, str], ...]:
    """Give what sorts names with numbers in them by those.

    >>> sorted(["rank_10", "rank_9"], key=natural_key)
    ['rank_9', 'rank_10']
    """
    parts = re.split(r"([0-9]{1,18})", name)
    return tuple((int(part), "") if place % 2 else (-1, part) for place, part in enumerate(parts))


@lru_cache(1024)  # a file may name another 100,000 times
def is_bare(name: str) -> bool:
    """Say whether a name that a file gives is that of an entry of a folder, and leads nowhere else.

    >>> is_bare("model.bin"), is_bare("../model.bin"), is_bare("C:model.bin")
    (True, False, False)
    """
    # PureWindowsPath splits at both kinds of slash and knows drives, on every system.
    return name not in ("", ".", "..") and PureWindowsPath(name).name == name and "\0" not in name


class Store(Protocol):
    """Where files lie: a folder of this machine, a bucket, a repository at one revision. Errors are WconvErrors.

    One that does not ``lists_all`` knows of its files only those whose names are looked for.
    """

    lists_all: bool = True
    keeps_notes: bool = False
    is_far: bool = False
    loaders_name: str = ""
    """What loaders know it by, if they do."""
    commit_id: str = ""
    """Which state of it this is, if it has any number of them."""

    def pinned(self) -> Store:
        """Give the store as it is now, for one whose names stand for something else later."""
        return self

    def absolute(self, key: str) -> Place:
        """Give what lies at a key as a place that says the same wherever one is."""

    def spell(self, key: str) -> str:
        """Name a place to people."""

    def stat(self, key: str) -> Info | None:
        """Say what lies at a key; None for nothing, or a link to nothing."""

    def target(self, key: str) -> str | None:
        """Give the key that a link names; None for what is no link, and in a store that has none."""
        return None

    def real(self, key: str) -> Place:
        """Give the absolute place that a key leads to, behind all links."""
        return self.absolute(key)

    def is_same(self, key: str, other: Place) -> bool:
        """Say whether a key leads to another place."""
        return self.real(key) == other.real()

    def path(self, key: str) -> Path:
        """Give the full path of a key on this machine. Raises Unsupported for a store elsewhere."""
        problem = "is not on this machine's disk, and that is needed here"
        raise Unsupported(self.spell(key), problem, "Fetch it, and name the folder.")

    def list(self, key: str) -> list[str]:
        """List the names of what lies directly in a folder, sorted."""

    def open(self, place: Place, tag: Tag | None) -> OpenFile:
        """Open a file; raises BadFile for what is none, or is not as the tag says."""


@dataclass(frozen=True, slots=True)
class Place:
    """A file or folder of a store, or where one may come to be."""

    store: Store
    key: str

    def __truediv__(self, name: str) -> Place:
        if name in ("", ".") or "/" in name or self.key in (".", "/"):
            return Place(self.store, (PurePosixPath(self.key) / name).as_posix())
        return Place(self.store, f"{self.key}/{name}")  # much faster, and there are folders of thousands

    def __str__(self) -> str:
        return self.store.spell(self.key)

    def __fspath__(self) -> str:
        return str(self.path)

    def __hash__(self) -> int:  # of each tensor's place: a dataclass's own takes five times as long
        return hash(self.key)

    def __lt__(self, other: Place) -> bool:
        return PurePosixPath(self.key) < PurePosixPath(other.key)

    @property
    def name(self) -> str:
        return "" if self.key == "." else self.key.rpartition("/")[2]

    @property
    def parent(self) -> Place:
        return Place(self.store, PurePosixPath(self.key).parent.as_posix())

    def pinned(self) -> Place:
        """Give this place in its store as that is now."""
        store = self.store.pinned()
        return self if store is self.store else Place(store, self.key)

    def absolute(self) -> Place:
        """Give this place by its full key, so that all folders above have their names."""
        return self.store.absolute(self.key)

    @property
    def parents(self) -> Iterator[Place]:
        """The folders above this place, the nearest first."""
        return (Place(self.store, parent.as_posix()) for parent in PurePosixPath(self.key).parents)

    def relative_to(self, folder: Place) -> str:
        """Give the path from a folder to this place below it; raises ValueError for another."""
        return PurePosixPath(self.key).relative_to(folder.key).as_posix()

    @property
    def path(self) -> Path:
        """The full path on this machine's disk. Raises Unsupported for a place that is elsewhere."""
        return self.store.path(self.key)

    @property
    def spelled(self) -> Path:
        """The path on this machine's disk as its user spelled it, from the folder they were in."""
        _ = self.path  # raises for a place that is elsewhere
        return Path(str(self))

    def ref(self) -> FileRef:
        """Give the file that lies here as it is now."""
        found = self.info()
        return FileRef(self, found.tag if found else None)

    def info(self) -> Info | None:
        """Say what lies here; None for nothing, or a link to nothing."""
        return self.store.stat(self.key)

    def is_file(self) -> bool:
        """Say whether a file lies here, behind links or not."""
        found = self.info()
        return found is not None and found.kind == "file"

    def is_folder(self) -> bool:
        """Say whether a folder lies here, behind links or not."""
        found = self.info()
        return found is not None and found.kind == "folder"

    def exists(self) -> bool:
        """Say whether anything lies here; a link to nothing is nothing."""
        return self.info() is not None

    def is_link(self) -> bool:
        """Say whether this is a link, whatever it leads to."""
        return self.store.target(self.key) is not None

    def is_taken(self) -> bool:
        """Say whether anything lies here, be it a link to nothing."""
        return self.exists() or self.is_link()

    def hops(self) -> Iterator[Place]:
        """Give the places that a link leads to, one after another."""
        place = self
        for _ in range(_MAX_HOPS):
            key = self.store.target(place.key)
            if key is None:
                return
            place = Place(self.store, key)
            yield place

    def real(self) -> Place:
        """Give the place that this one leads to, behind all links; links in a circle stay as they are."""
        return self.store.real(self.key)

    def is_same(self, other: Place) -> bool:
        """Say whether two places are one behind all links, whatever other names a disk may have for it."""
        return self.store.is_same(self.key, other)

    def is_below(self, folder: Place) -> bool:
        """Say whether this is a folder, or lies somewhere in it, by names alone."""
        return self.store == folder.store and PurePosixPath(self.key).is_relative_to(folder.key)

    def entries(self) -> list[Place]:
        """List what lies directly in this folder, by name."""
        return [self / name for name in self.store.list(self.key)]

    @contextmanager
    def open(self) -> Iterator[OpenFile]:
        """Open the file that lies here; raises BadFile for what is none."""
        file = self.store.open(self, None)
        try:
            yield file
        finally:
            file.close()


class FileRef(NamedTuple):
    """A file as it was when its header was read: whoever reads more of it later holds its tag against it."""

    place: Place
    tag: Tag | None = None

    def open(self) -> OpenFile:
        """Open the file again; raises BadFile where it has changed since."""
        return self.place.store.open(self.place, self.tag)


def without_secrets(url: str) -> str:
    """Leave out of a URL what may be a secret: who asks, a query, and what follows it.

    >>> without_secrets("https://me:word@host/a?signature=b#c")
    'https://host/a'
    """
    scheme, separator, rest = url.partition("://")
    host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"


def hold_installed(url: str, extra: str, *names: str) -> None:
    """Raise Unsupported where a library is missing that a store needs; the ``extra`` of wconv's brings it."""
    try:
        for name in names:
            import_module(name)
    except ImportError as error:
        problem = f"needs {error.name}, which is not installed here"
        raise Unsupported(url, problem, f"pip install 'wconv[{extra}]'") from None


def list_entries(folder: Place) -> list[Place]:
    """List what lies in a folder; nothing in one that cannot be read."""
    try:
        return folder.entries()
    except Unreachable:
        raise
    except SystemRefused:
        return []


def hold_same(a: Place, b: Place) -> bool:
    """Say whether two files hold the same bytes."""
    with a.open() as one, b.open() as other:
        return one.nbytes == other.nbytes and all(map(operator.eq, one.chunks(), other.chunks()))


def changed(place: Place) -> BadFile:
    """Word that a file is no longer what it was when its header was read."""
    return BadFile(place, "was changed while it was read", "Run this again when nobody writes to it.")

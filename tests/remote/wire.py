"""A wire between a client and a server: an HTTP/1.1 proxy that notes what went over it, and fails when a test says so.

Requests go on as they came, to the byte, so that signatures over the host and the headers hold. Bodies are streamed
both ways, never held. Each connection of a client has one to the server and a thread of its own.

What a fault is, a class below says; ``Wire.fault`` says which requests meet it. Faults of several rules add up in one
request, in the order of the rules. Offsets count the bytes of a body, without its chunks' frames.
"""

from __future__ import annotations

import contextlib
import io
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from types import TracebackType
from typing import Literal
from urllib.parse import parse_qs, unquote, urlsplit

PIECE = 1 << 18  # bytes of a body that are in memory at once
LINGER = 2  # seconds
LATE = 120  # seconds after which a silent server or client is given up
BACKLOG = 256
Way = Literal["request", "answer"]
FORWARD: Way = "request"
BACK: Way = "answer"


@dataclass
class Asked:
    """One request, and what came of it; it changes while the request is under way."""

    method: str
    target: str
    headers: Mapping[str, str]  # names in small letters
    began: float
    status: int | None = None  # what the client was told, if anything
    received: int = 0  # bytes of body from the client
    sent: int = 0  # bytes of body to the client
    answer: Mapping[str, str] = field(default_factory=dict)  # the headers that the client was given
    ended: float | None = None

    @property
    def path(self) -> str:
        return unquote(urlsplit(self.target).path)

    @property
    def query(self) -> dict[str, str]:
        """Give the first value of each parameter."""
        pairs = parse_qs(urlsplit(self.target).query, keep_blank_values=True)
        return {name: values[0] for name, values in pairs.items()}

    @property
    def range(self) -> tuple[int, int] | None:
        """Give the first byte that was asked for and the one after the last; None for a whole or a suffix."""
        unit, _, span = self.headers.get("range", "").partition("=")
        first, _, last = span.partition("-")
        return (int(first), int(last) + 1) if unit == "bytes" and first and last else None


Matches = Callable[[Asked], bool]


@dataclass(frozen=True)
class Answer:
    """Say this instead of what the server would; with ``done`` the server does it, and only its reply is lost."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    done: bool = False


@dataclass(frozen=True)
class Drop:
    """End the connection after so many bytes of a body; None is before the head goes on.

    With a reset the client may lose bytes that it has not read yet; without, the body ends short of its length.
    """

    at: int | None = 0
    reset: bool = True
    way: Way = BACK


@dataclass(frozen=True)
class Shorten:
    """Answer with the first bytes of the body only, as though that were all: the length says so too."""

    to: int


@dataclass(frozen=True)
class Retag:
    """Give an answer another ETag."""

    etag: str


@dataclass(frozen=True)
class Wait:
    """Let a request wait before it goes on."""

    seconds: float


@dataclass(frozen=True)
class Hang:
    """Take a request, and never answer it."""


@dataclass(frozen=True)
class Call:
    """Call a function of the test once so many bytes of a body have passed; None is before the request goes on."""

    hook: Callable[[Asked], object]
    at: int | None = 0
    way: Way = BACK


Fault = Answer | Drop | Shorten | Retag | Wait | Hang | Call


def every(asked: Asked) -> bool:
    """Match any request."""
    return True


@dataclass
class Rule:
    """Which requests meet a fault; ``met`` are those that did."""

    fault: Fault
    matches: Matches
    times: int | None
    after: int
    met: list[Asked] = field(default_factory=list)
    seen: int = 0

    def meets(self, asked: Asked) -> bool:
        """Say whether this request meets the fault, and count it."""
        if not self.matches(asked) or (self.times is not None and len(self.met) >= self.times):
            return False
        self.seen += 1
        if self.seen <= self.after:
            return False
        self.met.append(asked)
        return True


class _CutError(Exception):
    """The connection ends here."""

    def __init__(self, reset: bool = False) -> None:
        self.reset = reset


class _Peer:
    """One end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(LATE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self.file = io.BufferedReader(connection.makefile("rb", buffering=0), PIECE)

    def close(self, reset: bool = False) -> None:
        if reset:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.file.close()
        self.socket.close()

    def shut(self) -> None:
        """Wake up whoever waits for this end."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def has_something(self) -> bool:
        """Say whether something came, or the end did."""
        return bool(select.select([self.socket], [], [], 0)[0])

    def head(self) -> _Head | None:
        """Read the head of a message; None is the end of the connection."""
        lines: list[bytes] = []
        while (line := self.file.readline(1 << 16)) not in (b"\r\n", b"\n"):
            if not line.endswith(b"\n"):
                if lines or line:
                    raise _CutError
                return None
            lines.append(line)
        return _Head(lines)


class _Head:
    """The head of a message, its lines as they came."""

    def __init__(self, lines: Sequence[bytes]) -> None:
        if not lines:
            raise _CutError
        self.start = lines[0].decode("latin-1").split()
        self.lines = list(lines)
        self.headers: dict[str, str] = {}
        for line in lines[1:]:
            name, _, value = line.decode("latin-1").partition(":")
            self.headers[name.strip().lower()] = value.strip()

    def replace(self, name: str, value: str | None) -> None:
        """Give a header another value, if it is there; None removes it."""
        if self.headers.pop(name, None) is None:
            return
        at = next(at for at, line in enumerate(self.lines) if line.lower().startswith(name.encode() + b":"))
        del self.lines[at]
        if value is not None:
            self.headers[name] = value
            self.lines.insert(at, f"{name}: {value}\r\n".encode("latin-1"))

    def raw(self) -> bytes:
        return b"".join(self.lines) + b"\r\n"

    @property
    def is_chunked(self) -> bool:
        return self.headers.get("transfer-encoding", "").lower() == "chunked"

    @property
    def is_last(self) -> bool:
        """Say whether the connection ends with this message."""
        return self.headers.get("connection", "").lower() == "close"

    @property
    def length(self) -> int | None:
        length = self.headers.get("content-length")
        return None if length is None else int(length)

    def is_bare(self, method: str) -> bool:
        """Say whether this answer has no body, whatever it says of one."""
        return method == "HEAD" or self.start[1] in ("204", "304")

    def has_no_end(self, method: str) -> bool:
        """Say whether this answer's body ends with the connection."""
        return self.length is None and not self.is_chunked and not self.is_bare(method)


def _body(peer: _Peer, head: _Head, answers: str | None = None) -> Iterator[tuple[bytes, bool]]:
    """Read the body of a message, and say of each piece whether it counts; ``answers`` is the method answered."""
    if answers is not None and head.is_bare(answers):
        return
    if head.is_chunked:
        yield from _chunks(peer)
    elif head.length is not None:
        yield from _span(peer, head.length)
    elif answers is not None:
        while data := peer.file.read1(PIECE):
            yield data, True


def _span(peer: _Peer, length: int) -> Iterator[tuple[bytes, bool]]:
    while length:
        data = peer.file.read1(min(length, PIECE))
        if not data:
            raise _CutError
        length -= len(data)
        yield data, True


def _chunks(peer: _Peer) -> Iterator[tuple[bytes, bool]]:
    while True:
        line = peer.file.readline()
        if not line.endswith(b"\n"):
            raise _CutError
        yield line, False
        length = int(line.split(b";")[0], 16)
        if length == 0:
            break
        yield from _span(peer, length)
        yield peer.file.readline(), False
    while (line := peer.file.readline()).strip():
        yield line, False
    yield line, False


Mark = Drop | Call


def _marks(met: Sequence[Fault], way: Way) -> list[Mark]:
    """Give what happens at some place of a body, in order."""
    marks = [one for one in met if isinstance(one, Mark) and one.way == way and one.at is not None]
    return sorted(marks, key=lambda one: one.at or 0)


def _cut_at(
    marks: list[Mark], pieces: Iterator[tuple[bytes, bool]], happen: Callable[[Mark], None]
) -> Iterator[tuple[memoryview, int]]:
    """Cut a body at marks, let each happen at its place, and give how much of a piece counts."""
    done = 0

    def reach() -> None:
        while marks and (marks[0].at or 0) <= done:
            happen(marks.pop(0))

    for data, counts in pieces:
        left = memoryview(data)
        if not counts:
            yield left, 0
            continue
        while left:
            reach()
            here = left[: (marks[0].at or 0) - done] if marks else left
            yield here, len(here)
            done += len(here)
            left = left[len(here) :]
    reach()


class Wire:
    """A proxy in front of one server; ``asked`` is its log, ``delay`` is how many seconds each request waits."""

    def __init__(self, to_port: int, host: str = "127.0.0.1") -> None:
        self.to_port = to_port
        self.host = host
        self.port = 0
        self.delay = 0.0
        self.asked: list[Asked] = []
        self.connections = 0  # that clients have made
        self.errors: list[BaseException] = []
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._peers: set[_Peer] = set()
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def fault(self, fault: Fault, matches: Matches = every, times: int | None = 1, after: int = 0) -> Rule:
        """Let requests that match meet a fault: so many ``times`` (None is always), once ``after`` have passed."""
        rule = Rule(fault, matches, times, after)
        with self._lock:
            self._rules.append(rule)
        return rule

    def heal(self) -> None:
        """Forget all faults."""
        with self._lock:
            self._rules.clear()

    def clear(self) -> None:
        """Forget what was asked."""
        with self._lock:
            self.asked.clear()

    def settle(self) -> None:
        """Wait until no request is under way: a client may know its answer before the log knows that this has ended."""
        end = time.monotonic() + LATE
        while any(asked.ended is None for asked in self.asked):
            assert time.monotonic() < end, "a request never ended"
            time.sleep(0.002)

    def up(self) -> Wire:
        """Take connections."""
        with self._lock:
            assert self._listener is None
            self._closing.clear()
            self._listener = socket.create_server(("127.0.0.1", self.port), backlog=BACKLOG)
            self.port = self._listener.getsockname()[1]
        self._start(self._accept, self._listener)
        return self

    def down(self) -> None:
        """Refuse connections, and end those that there are; ``up`` has them taken again, at the same port."""
        with self._lock:
            self._closing.set()
            if self._listener:
                with contextlib.suppress(OSError):
                    self._listener.shutdown(socket.SHUT_RDWR)
                self._listener.close()
                self._listener = None
            for peer in self._peers:
                peer.shut()
            threads, self._threads = self._threads, []
        # A test may call this in the middle of a request, which then goes on until it meets the end of its connections.
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(LATE)

    def __enter__(self) -> Wire:
        return self.up()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.down()
        if self.errors and error is None:
            raise self.errors[0]

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        with self._lock:
            self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            self.connections += 1
            self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        """Serve one connection of a client, whatever happens to it."""
        line = _Line(self, connection)
        reset = False
        try:
            while not self._closing.is_set() and line.exchange():
                pass
        except _CutError as cut:
            reset = cut.reset
        except OSError:
            pass
        except BaseException as error:
            self.errors.append(error)
        finally:
            line.close(reset)

    def _note(self, asked: Asked) -> list[Fault]:
        """Take a request into the log, and give the faults that it meets."""
        with self._lock:
            self.asked.append(asked)
            return [rule.fault for rule in self._rules if rule.meets(asked)]

    def _pause(self, seconds: float | None) -> None:
        if self._closing.wait(seconds):
            raise _CutError


class _Line:
    """One connection of a client, and the one to the server that belongs to it."""

    def __init__(self, wire: Wire, connection: socket.socket) -> None:
        self.wire = wire
        self.client = self._take(connection)
        self.server: _Peer | None = None

    def _take(self, connection: socket.socket) -> _Peer:
        peer = _Peer(connection)
        with self.wire._lock:
            self.wire._peers.add(peer)
            if self.wire._closing.is_set():
                peer.shut()
        return peer

    def _release(self, peer: _Peer, reset: bool = False) -> None:
        with self.wire._lock:
            self.wire._peers.discard(peer)
            peer.close(reset)

    def close(self, reset: bool) -> None:
        if self.server:
            self._release(self.server)
        self._release(self.client, reset)

    def _reach(self) -> _Peer:
        """Give a connection to the server that it has not ended."""
        if self.server and self.server.has_something():
            self._release(self.server)
            self.server = None
        if not self.server:
            self.server = self._take(socket.create_connection(("127.0.0.1", self.wire.to_port), LATE))
        return self.server

    def exchange(self) -> bool:
        """Take a request and give its answer; say whether the connection goes on."""
        head = self.client.head()
        if head is None:
            return False
        asked = Asked(head.start[0], head.start[1], head.headers, time.monotonic())
        met = self.wire._note(asked)
        try:
            return self._pass(head, asked, met)
        finally:
            asked.ended = time.monotonic()

    def _pass(self, head: _Head, asked: Asked, met: Sequence[Fault]) -> bool:
        self._before(asked, met)
        if head.headers.get("expect", "").lower() == "100-continue":
            head.replace("expect", None)
            self.client.socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        said = next((one for one in met if isinstance(one, Answer)), None)
        if said and not said.done:
            self._forward(head, None, asked, met)
            self._say(said, asked)
            return not head.is_last
        server = self._reach()
        server.socket.sendall(head.raw())
        whole = self._forward(head, server, asked, met)
        back = server.head()
        while back and back.start[1].startswith("1"):
            back = server.head()
        if back is None:
            raise _CutError
        if said:
            for _ in _body(server, back, asked.method):
                pass
            self._say(said, asked)
        else:
            self._back(server, back, asked, met)
        if not whole:
            self._linger()
        return whole and not (head.is_last or back.is_last or back.has_no_end(asked.method))

    def _before(self, asked: Asked, met: Sequence[Fault]) -> None:
        """Do what is to be done before a request goes on."""
        self.wire._pause(self.wire.delay + sum(one.seconds for one in met if isinstance(one, Wait)))
        for one in met:
            if isinstance(one, Mark) and one.at is None and (isinstance(one, Call) or one.way == FORWARD):
                self._happen(one, asked)
            elif isinstance(one, Hang):
                self.wire._pause(None)

    def _say(self, said: Answer, asked: Asked) -> None:
        asked.status = said.status
        asked.sent = 0 if asked.method == "HEAD" else len(said.body)
        asked.answer = {name.lower(): value for name, value in said.headers.items()}
        lines = [f"HTTP/1.1 {said.status} {HTTPStatus(said.status).phrase}", f"Content-Length: {len(said.body)}"]
        lines += [f"{name}: {value}" for name, value in said.headers.items()]
        body = b"" if asked.method == "HEAD" else said.body
        self.client.socket.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    def _happen(self, mark: Mark, asked: Asked) -> None:
        if isinstance(mark, Drop):
            raise _CutError(mark.reset)
        try:
            mark.hook(asked)
        except BaseException as error:
            self.wire.errors.append(error)
            raise _CutError from error

    def _forward(self, head: _Head, server: _Peer | None, asked: Asked, met: Sequence[Fault]) -> bool:
        """Pass a request's body on; say whether all of it was taken, for a server may answer before it has heard it."""
        pieces = _cut_at(_marks(met, FORWARD), _body(self.client, head), lambda mark: self._happen(mark, asked))
        for piece, count in pieces:
            asked.received += count
            if server:
                if server.has_something():
                    return False
                server.socket.sendall(piece)
        return True

    def _back(self, server: _Peer, back: _Head, asked: Asked, met: Sequence[Fault]) -> None:
        """Pass the server's answer on, with what befalls it."""
        for drop in met:
            if isinstance(drop, Drop) and drop.at is None and drop.way == BACK:
                raise _CutError(drop.reset)
        told, most = _Head(back.lines), back.length
        for one in met:
            if isinstance(one, Retag):
                told.replace("etag", one.etag)
            elif isinstance(one, Shorten) and most is not None:
                most = min(one.to, most)
                told.replace("content-length", str(most))
        asked.status, asked.answer = int(told.start[1]), told.headers
        self.client.socket.sendall(told.raw())
        pieces = _cut_at(_marks(met, BACK), _body(server, back, asked.method), lambda mark: self._happen(mark, asked))
        for piece, count in pieces:
            here = piece if most is None or not count else piece[: most - asked.sent]
            asked.sent += min(count, len(here))
            self.client.socket.sendall(here)

    def _linger(self) -> None:
        """Let a client read an answer that came early: a connection that ends with something unread is reset."""
        self.client.socket.shutdown(socket.SHUT_WR)
        self.client.socket.settimeout(LINGER)
        with contextlib.suppress(OSError):
            while self.client.file.read1(PIECE):
                pass

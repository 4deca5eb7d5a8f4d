"""Does the wire pass on what it should, note it right, and fail as told?"""

from __future__ import annotations

import http.client
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import urllib3
from urllib3.exceptions import HTTPError, NewConnectionError, ProtocolError, ReadTimeoutError

from remote.wire import Answer, Asked, Call, Drop, Hang, Retag, Shorten, Wait, Wire

DATA = os.urandom(3_000_000)
ETAG = '"one"'


class _Handler(BaseHTTPRequestHandler):
    """Serve DATA; give back in chunks what comes in chunks; refuse what is put, before hearing it."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("ETag", ETAG)
        self.send_header("Content-Length", str(len(DATA)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(DATA)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for chunk in chunks:
            self.wfile.write(b"%x;name=value\r\n%s\r\n" % (len(chunk), chunk))
        self.wfile.write(b"0\r\nTrailer: value\r\n\r\n")

    def do_PUT(self) -> None:
        self.send_response(413)
        self.send_header("Content-Length", "8")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(b"too much")
        self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of connections that were cut."""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with _Server(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.fixture
def wire(port: int) -> Iterator[Wire]:
    with Wire(port) as wire:
        yield wire


@pytest.fixture
def pool() -> Iterator[urllib3.PoolManager]:
    with urllib3.PoolManager(retries=False, maxsize=16, timeout=5) as pool:
        yield pool


def get(pool: urllib3.PoolManager, wire: Wire, method: str = "GET") -> urllib3.BaseHTTPResponse:
    return pool.request(method, wire.url)


def test_what_passes_is_as_it_was_and_noted(wire: Wire, pool: urllib3.PoolManager) -> None:
    assert get(pool, wire).data == DATA
    assert get(pool, wire, "HEAD").headers["Content-Length"] == str(len(DATA))
    assert pool.request("POST", f"{wire.url}/a%20b?x=1&y=", body=iter([b"abc", b"defg"])).data == b"abcdefg"
    whole, head, post = wire.asked
    assert (whole.method, whole.status, whole.sent, whole.received) == ("GET", 200, len(DATA), 0)
    assert (head.method, head.status, head.sent) == ("HEAD", 200, 0)
    assert (post.path, post.query, post.sent, post.received) == ("/a b", {"x": "1", "y": ""}, 7, 7)
    assert post.headers["host"] == f"127.0.0.1:{wire.port}"
    assert whole.answer["etag"] == ETAG
    assert wire.connections == 1


def test_many_at_once(wire: Wire, pool: urllib3.PoolManager) -> None:
    with ThreadPoolExecutor(16) as threads:
        assert all(answer.data == DATA for answer in threads.map(lambda _: get(pool, wire), range(64)))
    assert sum(asked.sent for asked in wire.asked) == 64 * len(DATA)
    assert wire.connections <= 16


def test_an_answer_that_comes_early_arrives(wire: Wire, pool: urllib3.PoolManager) -> None:
    with socket.create_connection(("127.0.0.1", wire.port)) as client:
        client.settimeout(5)
        client.sendall(b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n" + DATA[:100])
        time.sleep(0.1)
        client.sendall(DATA[:1000])
        with client.makefile("rb") as file:
            assert file.readline() == b"HTTP/1.1 413 Request Entity Too Large\r\n"
            assert file.read().endswith(b"too much")


def test_a_status_in_place_of_the_answer(wire: Wire, pool: urllib3.PoolManager) -> None:
    busy = Answer(429, {"Retry-After": "7"}, b"later")
    rule = wire.fault(busy, lambda asked: asked.method == "GET", times=2, after=1)
    assert [get(pool, wire, method).status for method in ("GET", "HEAD", "GET", "GET", "GET")] == [
        200,
        200,
        429,
        429,
        200,
    ]
    assert rule.met == wire.asked[2:4]
    assert rule.met[0].answer["retry-after"] == "7"
    assert rule.met[0].sent == 5
    assert wire.connections == 1


def test_a_status_though_the_server_has_done_it(wire: Wire, pool: urllib3.PoolManager) -> None:
    wire.fault(Answer(500, done=True))
    answer = pool.request("POST", wire.url, body=iter([DATA]))
    assert (answer.status, answer.data) == (500, b"")
    assert get(pool, wire).data == DATA


@pytest.mark.parametrize("reset", [False, True])
def test_a_connection_ends_in_the_answer(wire: Wire, reset: bool) -> None:
    wire.fault(Drop(1_234_567, reset))
    client = http.client.HTTPConnection("127.0.0.1", wire.port, timeout=5)
    client.request("GET", "/")
    with client.getresponse() as answer, pytest.raises(ConnectionResetError if reset else http.client.IncompleteRead):
        answer.read()
    client.close()
    assert wire.asked[0].sent == 1_234_567


@pytest.mark.parametrize(("at", "message"), [(None, "Remote end closed"), (0, "0 bytes read, 3000000 more expected")])
def test_a_connection_ends_around_the_head(wire: Wire, pool: urllib3.PoolManager, at: int | None, message: str) -> None:
    wire.fault(Drop(at, reset=False))
    with pytest.raises(ProtocolError, match=message):
        get(pool, wire)
    assert wire.asked[0].status == (None if at is None else 200)
    assert get(pool, wire).data == DATA


@pytest.mark.parametrize("at", [None, 0, 1_000_000])
def test_a_connection_ends_in_the_request(wire: Wire, pool: urllib3.PoolManager, at: int | None) -> None:
    wire.fault(Drop(at, way="request"))
    with pytest.raises(ProtocolError):
        pool.request("POST", wire.url, body=iter([DATA[:700_000], DATA[700_000:]]))
    assert wire.asked[0].received == (at or 0)


def test_an_answer_is_shorter_and_says_so(wire: Wire, pool: urllib3.PoolManager) -> None:
    wire.fault(Shorten(1000))
    assert get(pool, wire).data == DATA[:1000]
    assert get(pool, wire).data == DATA
    assert [asked.sent for asked in wire.asked] == [1000, len(DATA)]
    assert wire.connections == 1


def test_another_etag_from_now_on(wire: Wire, pool: urllib3.PoolManager) -> None:
    wire.fault(Retag('"two"'), times=None, after=1)
    assert [get(pool, wire, method).headers["ETag"] for method in ("GET", "HEAD", "GET")] == [ETAG, '"two"', '"two"']
    wire.heal()
    assert get(pool, wire).headers["ETag"] == ETAG


def test_requests_wait(wire: Wire, pool: urllib3.PoolManager) -> None:
    wire.delay = 0.05
    wire.fault(Wait(0.2), after=1)
    for _ in range(2):
        get(pool, wire)
    wire.settle()
    first, second = (asked.ended - asked.began for asked in wire.asked if asked.ended)
    assert first >= 0.05
    assert second >= 0.25


def test_no_answer_ever(wire: Wire, pool: urllib3.PoolManager) -> None:
    wire.fault(Hang())
    with pytest.raises(ReadTimeoutError):
        pool.request("GET", wire.url, timeout=0.2)
    assert wire.asked[0].status is None
    wire.fault(Hang())
    threading.Timer(0.2, wire.down).start()
    with pytest.raises(ProtocolError):
        get(pool, wire)


def test_connections_are_refused_while_it_is_down(wire: Wire, pool: urllib3.PoolManager) -> None:
    get(pool, wire)
    wire.down()
    with pytest.raises(NewConnectionError):
        pool.request("GET", wire.url, preload_content=False)
    wire.up()
    assert get(pool, wire).data == DATA


def test_a_test_is_called_in_the_middle(wire: Wire, pool: urllib3.PoolManager) -> None:
    at = []
    wire.fault(Call(lambda asked: at.append((asked.status, asked.sent)), at=1_000_000), times=None, after=1)
    wire.fault(Call(lambda asked: at.append((asked.status, asked.sent)), at=None), after=2)
    for _ in range(3):
        assert get(pool, wire).data == DATA
    assert at == [(200, 1_000_000), (None, 0), (200, 1_000_000)]


def test_the_server_is_cut_off_in_the_middle(wire: Wire, pool: urllib3.PoolManager) -> None:
    wire.fault(Call(lambda asked: wire.down(), at=1_000_000))
    with pytest.raises(HTTPError):
        get(pool, wire)
    assert wire.asked[0].sent < len(DATA)
    wire.up()
    assert get(pool, wire).data == DATA


def test_what_a_test_raises_in_the_middle_comes_out(port: int, pool: urllib3.PoolManager) -> None:
    def fail(asked: Asked) -> None:
        raise ValueError("ours")

    def use() -> None:
        with Wire(port) as wire:
            wire.fault(Call(fail))
            with pytest.raises(HTTPError):
                get(pool, wire)

    with pytest.raises(ValueError, match="ours"):
        use()

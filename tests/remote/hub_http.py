"""HTTP for the Hub's stand-in: what is asked and what is answered, ranges, and a server in threads."""

from __future__ import annotations

import io
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from remote.hub_repos import RefusedError

PIECE = 1 << 20
NOTHING: Mapping[str, str] = {}


@dataclass
class Request:
    """What is asked for; parts of the path are unquoted one by one, for a revision has slashes of its own.

    The names of headers are in small letters.
    """

    method: str
    parts: list[str]
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: io.BufferedIOBase
    length: int

    def one(self, name: str, default: str = "") -> str:
        return self.query.get(name, [default])[0]

    def is_set(self, name: str) -> bool:
        return self.one(name).lower() in ("1", "true")

    def read(self) -> bytes:
        return self.body.read(self.length)

    def json(self) -> Any:
        return json.loads(self.read() or b"{}")


@dataclass
class Reply:
    """What is answered: bytes, or a file."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    path: Path | None = None

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path else len(self.body)

    def pieces(self, first: int, end: int) -> Iterator[bytes]:
        if not self.path:
            yield self.body[first:end]
            return
        with self.path.open("rb") as file:
            file.seek(first)
            while first < end and (data := file.read(min(PIECE, end - first))):
                first += len(data)
                yield data


def said(value: object, status: int = 200, headers: Mapping[str, str] = NOTHING) -> Reply:
    """Give an answer in JSON."""
    return Reply(status, {"Content-Type": "application/json; charset=utf-8", **headers}, json.dumps(value).encode())


def refused(error: RefusedError) -> Reply:
    """Give an answer that the Hub gives to what it does not do."""
    code = {"X-Error-Code": error.code} if error.code else NOTHING
    return said({"error": error.message}, error.status, {"X-Error-Message": error.message, **code})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def handle_any(self) -> None:
        split = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        parts = [unquote(part) for part in split.path.strip("/").split("/")]
        query = parse_qs(split.query, keep_blank_values=True)
        headers = {name.lower(): value for name, value in self.headers.items()}
        body: io.BufferedIOBase = self.rfile
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = io.BytesIO(b"".join(self._chunks()))
            length = len(body.getvalue())
        request = Request(self.command, parts, query, headers, body, length)
        try:
            reply = self.server.answer(request)  # type: ignore[attr-defined]
        except RefusedError as error:
            reply = refused(error)
        except Exception as error:
            self.server.errors.append(error)  # type: ignore[attr-defined]
            reply = refused(RefusedError(500, repr(error)))
        # What was not read is in the way of the next request.
        self.close_connection = length > 0 and reply.status >= 400
        self._send(reply)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _send(self, reply: Reply) -> None:
        first, end = 0, reply.size
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if asked and reply.status == 200:
            begin, last = asked.groups()
            first = int(begin) if begin else max(0, end - int(last))
            if first >= end:
                reply = Reply(416, {"Content-Range": f"bytes */{end}"})
                first = end = 0
            else:
                stop = min(end, int(last) + 1) if begin and last else end
                reply.headers["Content-Range"] = f"bytes {first}-{stop - 1}/{end}"
                reply.status, end = 206, stop
        self.send_response(reply.status)
        if self.close_connection:
            reply.headers["Connection"] = "close"
        for name, value in {**reply.headers, "Content-Length": str(end - first)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            for piece in reply.pieces(first, end):
                self.wfile.write(piece)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, answer: Callable[[Request], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.errors: list[BaseException] = []
        self.port: int = self.server_address[1]
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def handle_error(self, request: object, client_address: object) -> None:
        """Keep what went wrong, but for clients that are gone."""
        error = sys.exception()
        if error and not isinstance(error, OSError):
            self.errors.append(error)

    def end(self) -> None:
        self.shutdown()
        self.server_close()
        self.thread.join()

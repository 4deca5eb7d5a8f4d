from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin

import pytest
import torch
from conftest import Outcome
from support import tiny

from converter.errors import BadRequest, Unsupported
from converter.storage import place_of
from converter.storage import web as store
from remote import models, stores
from remote.test_hub import folder_of
from remote.wire import Answer, Asked, Call, Drop, Fault, Hang, Retag, Shorten

Wconv = Callable[..., Outcome]


pytestmark = pytest.mark.usefixtures("impatient")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return models.save_llama(tmp_path / "model", tiny.save_safetensors_shards)


def serve(web: stores.Web, folder: Path) -> None:
    for name, content in folder_of(folder).items():
        (web.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (web.folder / name).write_bytes(content)


def one_line(outcome: Outcome, *words: str) -> None:
    (line,) = outcome.stderr.splitlines()
    assert all(word in line for word in words), line


# What a folder and a file are.


@pytest.mark.parametrize("save", [tiny.save_safetensors_shards, tiny.save_bin_shards])
def test_a_folder_with_an_index_is_read(wconv: Wconv, web: stores.Web, model: Path, tmp_path: Path, save: Any) -> None:
    save(tiny.make_state(), model)
    serve(web, model)
    wconv("recast", web.url, "--dtype", "bf16", "-o", tmp_path / "out")
    wconv("recast", model, "--dtype", "bf16", "-o", tmp_path / "expected")
    assert folder_of(tmp_path / "out") == folder_of(tmp_path / "expected")
    wconv("verify", model, web.url)


def test_a_pipeline_is_read(wconv: Wconv, web: stores.Web, tmp_path: Path) -> None:
    folder = tiny.save_pipeline(tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    tiny.write_json(folder / "model_index.json", {**index, "tokenizer": ["transformers", "CLIPTokenizer"]})
    serve(web, folder)
    wconv("to-safetensors", f"{web.url}/", "-o", tmp_path / "out")
    wconv("to-safetensors", folder, "-o", tmp_path / "expected")
    assert folder_of(tmp_path / "out") == folder_of(tmp_path / "expected")


def test_a_file_is_read(wconv: Wconv, web: stores.Web, tmp_path: Path) -> None:
    for name in ("my own.bin", "a%20b.bin", "100%.bin", "q?x#y.bin", "ü.bin"):
        path = tiny.save(tiny.make_state(), tmp_path / "f" / name)
        serve(web, path.parent)
        url = f"{web.url}/{quote(name)}"
        wconv("verify", path, url)
        assert "6" in wconv("inspect", url).stdout
        spelled = str(place_of(url))
        assert place_of(spelled) == place_of(url)
    one_line(wconv("inspect", f"{web.url}/nothing.bin", exit_code=3), f"{web.url}/nothing.bin: does not exist")
    one_line(wconv("inspect", f"{web.url}/nothing", exit_code=3), f"{web.url}/nothing: does not exist")


def test_an_index_of_any_name_is_read(wconv: Wconv, web: stores.Web, model: Path) -> None:
    for path in list(model.glob("model*")):
        path.rename(model / path.name.replace("model", "my-own", 1))
    index = model / "my-own.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-', '"my-own-'))
    serve(web, model)
    wconv("verify", index, f"{web.url}/{index.name}")


def test_what_a_server_does_not_list_is_said(wconv: Wconv, web: stores.Web, model: Path, tmp_path: Path) -> None:
    serve(web, model)
    note = "a web server does not list what it has: files of other names are not"
    assert f"{note} carried over" in wconv("to-safetensors", web.url, "-o", tmp_path / "out").stdout
    assert f"note: {note} shown" in wconv("inspect", web.url).stdout
    assert json.loads(wconv("inspect", web.url, "--json").stdout)["notes"] == [f"{note} shown"]
    assert f"note: {note} looked at" in wconv("doctor", web.url, exit_code=None).stdout
    assert note not in wconv("inspect", model).stdout


@pytest.mark.parametrize("name", ["../x.safetensors", "%2e%2e/x", "/x.safetensors", "//host/x", "a/b", "a\\b", "."])
def test_an_index_leads_to_its_own_folder_alone(wconv: Wconv, web: stores.Web, model: Path, name: str) -> None:
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["a"] = name
    tiny.write_json(index, content)
    serve(web, model)
    local = wconv("inspect", model, exit_code=None)
    outcome = wconv("inspect", web.url, exit_code=local.exit_code)
    assert local.exit_code
    assert outcome.stderr.replace(web.url, "X") == local.stderr.replace(str(model), "X")
    begin = f"/{web.folder.name}"
    assert all(asked.path == begin or asked.path.startswith(f"{begin}/") for asked in web.wire.asked)
    assert not [asked for asked in web.wire.asked if ".." in asked.path]


def test_an_index_of_too_much_is_given_up(
    wconv: Wconv, web: stores.Web, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_MAX_SHARDS", 2)
    serve(web, model)
    one_line(wconv("inspect", web.url, exit_code=4), "has an index of more than 2 files")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:secret@host/a", "https://host/a"),
        ("https://host/a?sig=secret", "https://host/a"),
        ("https://host/a#secret", "https://host/a"),
        ("https://me:secret@/a", "https:///a"),
        ("https://?a=secret", "https://"),
        ("ftp://me:secret@host/a?b=secret", "ftp://host/a"),
        ("https://me:secret@[/a", "https://[/a"),
        ("https://host:99999999/a?x=secret", "https://host:99999999/a"),
    ],
)
def test_a_url_that_may_hold_a_secret_is_not_shown(wconv: Wconv, nowhere: None, url: str, shown: str) -> None:
    outcome = wconv("inspect", url, exit_code=2)
    one_line(outcome, f"{shown}: ")
    assert "secret" not in outcome.stderr.replace("may be a secret", "")


@pytest.mark.parametrize("url", ["https://h/a/../b", "https://h/%2e%2e/b", "https://h/a/./b", "https://h/a%0ab"])
def test_a_path_with_odd_parts_is_refused(url: str) -> None:
    with pytest.raises(BadRequest, match="has a part that no folder has"):
        place_of(url)


def test_a_host_of_ipv6_is_asked(model: Path, wconv: Wconv, nowhere: None) -> None:
    with serving(files_in(model), "::1") as url:
        assert url.startswith("http://[::1]:")
        wconv("verify", model, url)


# What goes wrong on the way.


@pytest.mark.parametrize(
    "fault", [Answer(500), Answer(503), Answer(429), Drop(None), Drop(50), Drop(50, reset=False), Shorten(20)], ids=str
)
def test_what_fails_in_passing_is_asked_for_again(
    wconv: Wconv, web: stores.Web, model: Path, tmp_path: Path, fault: Fault
) -> None:
    serve(web, model)
    rule = web.wire.fault(fault, lambda asked: asked.method == "GET", times=6)
    wconv("to-safetensors", web.url, "-o", tmp_path / "out", exit_code=None)
    assert rule.met
    web.wire.heal()
    wconv("verify", model, tmp_path / "out")


@pytest.mark.parametrize("fault", [Drop(None), Drop(0), Answer(503), Answer(500)], ids=str)
def test_what_fails_for_good_is_said(wconv: Wconv, web: stores.Web, model: Path, fault: Fault) -> None:
    serve(web, model)
    web.wire.fault(fault, lambda asked: asked.method == "GET", times=None)
    one_line(wconv("inspect", f"{web.url}/model-00001-of-00003.safetensors", exit_code=7), "after 8 tries")


def test_a_server_that_hardly_speaks_is_given_up(
    wconv: Wconv, nowhere: None, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_SECONDS", 0.2)
    monkeypatch.setattr(store, "_TRIES", 2)

    def drip(handler: Handler) -> None:
        begin = handler.headers.get("Range", "bytes=0-")[6:].partition("-")[0]
        part = {"Content-Range": f"bytes {begin}-999999/1000000"} if handler.command == "GET" else {}
        handler.say(206 if part else 200, {"Content-Length": "1000000", **part})
        while handler.command == "GET":
            handler.wfile.write(b"x")
            time.sleep(0.05)

    with serving(drip) as url:
        one_line(wconv("inspect", f"{url}/a.safetensors", exit_code=7), "cannot be reached", "after 2 tries")


def test_a_server_that_never_answers_is_given_up(
    wconv: Wconv, web: stores.Web, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_SECONDS", 0.2)
    monkeypatch.setattr(store, "_TRIES", 2)
    store._pool.cache_clear()
    serve(web, model)
    web.wire.fault(Hang(), times=None)
    one_line(wconv("inspect", web.url, exit_code=7), "cannot be reached (read timeout), after 2 tries")
    store._pool.cache_clear()


@pytest.mark.parametrize("change", ["size", "bytes"])
def test_a_file_that_changes_is_an_error(
    wconv: Wconv, web: stores.Web, model: Path, tmp_path: Path, change: str
) -> None:
    tiny.save({"a": torch.zeros(3_000_000)}, model / "model.safetensors")
    for path in model.glob("model*0*"):
        path.unlink()
    (model / "model.safetensors.index.json").unlink()
    serve(web, model)
    path = web.folder / "model.safetensors"

    def write(_: Asked) -> None:
        raw = path.read_bytes()
        path.write_bytes(raw + b"more" if change == "size" else raw[:-4] + b"\1\1\1\1")

    web.wire.fault(Call(write, at=None), lambda asked: (asked.range or (0, 0))[1] > 5_000_000, times=1)
    one_line(wconv("to-safetensors", web.url, "-o", tmp_path / "out", exit_code=3), "was changed while it was read")
    assert not (tmp_path / "out").exists()


def test_an_etag_that_changes_is_an_error(wconv: Wconv, web: stores.Web, model: Path) -> None:
    serve(web, model)
    web.wire.fault(Retag('"other"'), lambda asked: asked.method == "GET", times=None)
    one_line(
        wconv("inspect", f"{web.url}/model-00001-of-00003.safetensors", exit_code=3), "was changed while it was read"
    )


def test_a_server_that_wants_to_be_left_alone_is(wconv: Wconv, web: stores.Web, model: Path) -> None:
    serve(web, model)
    rule = web.wire.fault(Answer(503, {"Retry-After": "1"}), lambda asked: asked.path.endswith("/config.json"))
    wconv("inspect", web.url)
    (met,) = rule.met
    again = next(asked for asked in web.wire.asked if asked.target == met.target and asked is not met)
    assert again.began - met.began >= 1
    web.wire.fault(Answer(503, {"Retry-After": "Fri, 31 Dec 2999 23:59:59 GMT"}), times=None)
    one_line(wconv("inspect", web.url, exit_code=7), "wants to be left alone")


# Servers of all kinds.


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def handle_any(self) -> None:
        self.server.answer(self)  # type: ignore[attr-defined]

    do_GET = do_HEAD = handle_any

    def say(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if not {"Content-Length", "Transfer-Encoding"} & {*headers}:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    answer: Any = None

    def handle_error(self, request: object, client_address: object) -> None:
        pass


class _Server6(_Server):
    address_family = socket.AF_INET6


class serving:
    """Serve by a function, as long as the context lasts; give the URL."""

    def __init__(self, answer: Callable[[Handler], None] | type, host: str = "127.0.0.1") -> None:
        kind = _Server6 if ":" in host else _Server
        handler: Any = answer if isinstance(answer, type) else Handler
        self.server = kind((host, 0), handler)
        self.server.answer = answer
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> str:
        self.thread.start()
        return self.url

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def files_in(folder: Path, **how: Any) -> Callable[[Handler], None]:
    """Make a server of a folder that lacks what is said: heads, ranges, lengths; or says more, in ``headers``."""
    heads, ranges, lengths = how.get("heads", True), how.get("ranges", True), how.get("lengths", True)

    def answer(handler: Handler) -> None:
        path = folder / handler.path.lstrip("/")
        headers = dict(how.get("headers", {}))
        if handler.command == "HEAD" and not heads:
            handler.say(405, {})
        elif not path.is_file():
            handler.say(404, {"Content-Type": "text/html"}, b"<html>nothing")
        elif not path.stat().st_size and handler.headers.get("Range"):
            handler.say(416, {"Content-Range": "bytes */0"})
        else:
            raw, asked = path.read_bytes(), handler.headers.get("Range", "")
            status, first = 200, 0
            if asked and ranges:
                first, last = map(int, asked.removeprefix("bytes=").split("-"))
                total, raw, status = len(raw), raw[first : last + 1], 206
                headers["Content-Range"] = f"bytes {first}-{first + len(raw) - 1}/{total}"
            if not lengths:
                headers["Transfer-Encoding"] = "chunked"
                raw = b"%x\r\n%s\r\n0\r\n\r\n" % (len(raw), raw)
            handler.say(status, headers, raw)

    return answer


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"heads": False},
        {"headers": {"ETag": 'W/"weak"', "Last-Modified": "Mon, 01 Jan 2026 00:00:00 GMT"}},
        {"headers": {"Last-Modified": "Mon, 99 Foo 0 99:00:00"}},
        {"headers": {"Last-Modified": "Mon, 01 Jan 99999 00:00:00 GMT"}},
        {"headers": {"Content-Encoding": "identity", "ETag": '"a b"'}},
        {"lengths": False},
    ],
    ids=str,
)
def test_servers_of_all_kinds_are_read(
    wconv: Wconv, nowhere: None, model: Path, tmp_path: Path, how: dict[str, Any]
) -> None:
    with serving(files_in(model, **how)) as url:
        wconv("verify", model, url)
        wconv("to-safetensors", url, "-o", tmp_path / "out")
    wconv("to-safetensors", model, "-o", tmp_path / "expected")
    assert folder_of(tmp_path / "out") == folder_of(tmp_path / "expected")


@pytest.mark.parametrize("heads", [True, False])
def test_a_server_without_ranges_gives_no_parts(
    wconv: Wconv, nowhere: None, model: Path, tmp_path: Path, heads: bool
) -> None:
    with serving(files_in(model, ranges=False, heads=heads)) as url:
        outcome = wconv("to-safetensors", url, "-o", tmp_path / "out", exit_code=4)
        one_line(outcome, "is on a server that gives no parts of files. Fetch it, and name the file.")
    assert not (tmp_path / "out").exists()


def test_pythons_own_server_gives_no_parts(wconv: Wconv, nowhere: None, model: Path, tmp_path: Path) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(model))

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with serving(Quiet) as url:
        one_line(wconv("to-safetensors", url, "-o", tmp_path / "out", exit_code=4), "gives no parts of files")


def test_a_size_that_is_not_told_is_said(wconv: Wconv, nowhere: None, model: Path) -> None:
    with serving(files_in(model, ranges=False, lengths=False)) as url:
        one_line(wconv("inspect", url, exit_code=4), "is on a server that does not say how long it is")


@pytest.mark.parametrize("packing", ["gzip", "br", "zstd"])
def test_what_is_packed_is_not_taken_for_the_file(
    wconv: Wconv, nowhere: None, model: Path, tmp_path: Path, packing: str
) -> None:
    with serving(files_in(model, headers={"Content-Encoding": packing})) as url:
        one_line(wconv("to-safetensors", url, "-o", tmp_path / "out", exit_code=4), f"is sent packed ({packing})")


@pytest.mark.parametrize("length", ["abc", "-5", "9" * 5000, "1, 2", ""])
def test_a_length_that_is_none_is_no_bug(wconv: Wconv, nowhere: None, model: Path, length: str) -> None:
    def answer(handler: Handler) -> None:
        handler.say(200, {"Content-Length": length, "Connection": "close"}, b"x")

    with serving(answer) as url:
        wconv("inspect", f"{url}/a.safetensors", exit_code=None)


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Range": "bytes 0-0/" + "9" * 5000},
        {"Content-Range": "bytes 5-5/100"},
        {"Content-Range": "bytes */100"},
        {"ETag": '"a\r\n b"', "Content-Range": "bytes 0-0/100"},
    ],
    ids=["long", "another", "none", "folded"],
)
def test_a_part_that_is_none_is_no_bug(wconv: Wconv, nowhere: None, headers: dict[str, str]) -> None:
    with serving(lambda handler: handler.say(206, headers, b"x")) as url:
        wconv("inspect", f"{url}/a.safetensors", exit_code=None)


def test_a_page_is_no_file(wconv: Wconv, nowhere: None) -> None:
    def answer(handler: Handler) -> None:
        handler.say(200, {"Content-Type": "text/html; charset=utf-8"}, b"<html>sign in")

    with serving(answer) as url:
        one_line(wconv("inspect", url, exit_code=3), f"{url}: does not exist")
        one_line(wconv("inspect", f"{url}/a.safetensors", exit_code=3), "does not exist")


@pytest.mark.parametrize("status", [401, 403])
def test_what_is_not_for_everybody_is_said(wconv: Wconv, nowhere: None, status: int) -> None:
    with serving(lambda handler: handler.say(status, {})) as url:
        for name in ("", "/a.safetensors"):
            one_line(
                wconv("inspect", url + name, exit_code=7), f"is answered with {status}", "wconv sends no passwords"
            )


def test_a_store_that_refuses_what_it_lacks_is_read(wconv: Wconv, nowhere: None, model: Path) -> None:
    there = files_in(model)

    def answer(handler: Handler) -> None:
        there(handler) if (model / handler.path.lstrip("/")).is_file() else handler.say(403, {})

    with serving(answer) as url:
        wconv("verify", model, url)


def test_an_empty_file_is_one(wconv: Wconv, nowhere: None, model: Path, tmp_path: Path) -> None:
    (model / "merges.txt").touch()
    with serving(files_in(model)) as url:
        wconv("to-safetensors", url, "-o", tmp_path / "out")
    assert (tmp_path / "out" / "merges.txt").read_bytes() == b""


# Where servers lead to.


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed_without_what_is_for_one_host(
    wconv: Wconv, web: stores.Web, model: Path, status: int
) -> None:
    serve(web, model)

    def answer(handler: Handler) -> None:
        handler.say(status, {"Location": f"{web.url}{handler.path}"})

    with serving(answer) as url:
        wconv("verify", model, url)
    headers = {name for asked in web.wire.asked for name in asked.headers}
    assert headers <= {"host", "accept-encoding", "user-agent", "range", "if-match"}


def test_a_redirect_within_a_host_is_followed(wconv: Wconv, nowhere: None, model: Path) -> None:
    there = files_in(model.parent)

    def answer(handler: Handler) -> None:
        if handler.path.startswith("/model/"):
            there(handler)
        else:
            handler.say(302, {"Location": f"model{handler.path}"})

    with serving(answer) as url:
        wconv("verify", model, url)


@pytest.mark.parametrize(
    ("to", "problem"),
    [
        ("file:///etc/passwd", "leads from http:// to file://, which is not followed"),
        ("ftp://localhost/x", "leads from http:// to ftp://, which is not followed"),
        ("data:,x", "leads from http:// to data://, which is not followed"),
        ("http://[", "leads to what is no URL"),
        ("/again", "leads elsewhere more than 5 times"),
    ],
)
def test_a_redirect_that_must_not_be_is_not_followed(wconv: Wconv, nowhere: None, to: str, problem: str) -> None:
    with serving(lambda handler: handler.say(302, {"Location": to})) as url:
        one_line(wconv("inspect", f"{url}/a.safetensors", exit_code=4), problem)


@pytest.mark.parametrize(
    ("before", "to", "problem"),
    [
        ("https://a.com/x", "http://a.com/x", "leads from https:// to http://"),
        ("https://a.com/x", "https://inner/x", "into your own network"),
        ("https://a.com/x", "https://127.0.0.1/x", "into your own network"),
        ("https://a.com/x", "https://169.254.169.254/latest", "into your own network"),
        ("https://a.com/x", "https://[::1]/x", "into your own network"),
        ("https://a.com/x", "https://[::ffff:10.0.0.1]/x", "into your own network"),
        ("https://a.com/x", "https://both/x", "into your own network"),
        ("https://a.com/x", "https://[x", "leads to what is no URL"),
        ("https://a.com/x", "https://b.com/y", ""),
        ("https://a.com/x", "../y", ""),
        ("http://a.com/x", "https://a.com/x", ""),
        ("http://inner/x", "http://127.0.0.1/x", ""),
        ("https://a.com/x", f"https://{'long' * 50}/x", ""),
    ],
)
def test_where_an_answer_may_lead(monkeypatch: pytest.MonkeyPatch, before: str, to: str, problem: str) -> None:
    known = {"a.com": ["93.184.215.14"], "b.com": ["2606:4700::1"], "inner": ["10.1.2.3"], "both": ["8.8.8.8", "::1"]}

    def look_up(host: str, port: object) -> list[tuple[object, ...]]:
        if "long" in host:
            raise UnicodeError("label too long")
        return [(0, 0, 0, "", (address, 0)) for address in known.get(host, [host])]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    store._is_inner.cache_clear()
    place = place_of("https://a.com/x")
    try:
        if problem:
            with pytest.raises(Unsupported, match=problem):
                store.leads_to(place, before, to)
        else:
            assert store.leads_to(place, before, to) == urljoin(before, to)
    finally:
        store._is_inner.cache_clear()


# Proxies.


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch, nowhere: None) -> Iterator[Callable[[Path, str], list[Handler]]]:
    stack = []

    def start(folder: Path, variable: str) -> list[Handler]:
        seen: list[Handler] = []
        there = files_in(folder)

        def answer(handler: Handler) -> None:
            seen.append(handler)
            handler.path = "/" + handler.path.partition("://")[2].partition("/")[2]
            there(handler)

        server = serving(answer)
        monkeypatch.setenv(variable, server.__enter__().replace("http://", "http://me:p%40ss@"))
        stack.append(server)
        return seen

    yield start
    for server in stack:
        server.__exit__()


@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy"])
def test_a_proxy_is_asked(
    wconv: Wconv, model: Path, proxied: Any, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    seen = proxied(model, variable)
    wconv("verify", model, "http://far.example/")
    assert {handler.headers["Proxy-Authorization"] for handler in seen} == {"Basic bWU6cEBzcw=="}
    monkeypatch.setenv("no_proxy", "far.example,127.0.0.1")
    monkeypatch.setattr(store, "_TRIES", 1)
    outcome = wconv("inspect", "http://far.example/", exit_code=7)
    one_line(outcome, "cannot be reached")
    assert "p@ss" not in outcome.stderr


@pytest.mark.parametrize("proxy", ["socks5://me:secret@127.0.0.1:1", "nonsense://x", "http://me:secret@127.0.0.1:1"])
def test_a_proxy_that_is_none_is_said(wconv: Wconv, nowhere: None, monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("http_proxy", proxy)
    outcome = wconv("inspect", "http://far.example/a.bin", exit_code=7)
    one_line(outcome, "http://far.example/a.bin: cannot be reached")
    assert "secret" not in outcome.stderr

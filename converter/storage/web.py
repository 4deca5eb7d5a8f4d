"""Files of web servers, through urllib3: read by ranges, from where a server says that they are.

A redirect is followed to http and https alone, never from https to http, and never from the net into this machine's
own network; no header of one host goes to another. A server that is busy is asked again when it says, a stream that
breaks, or hardly comes, goes on where it was. What an answer says of itself is believed of sizes alone, and what is no
number there is nothing. A web server does not list what it has: in a folder the names are looked for that loaders look
for, and what an index names.
"""

from __future__ import annotations

import ipaddress
import json
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from email.utils import mktime_tz, parsedate_tz
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote, urljoin, urlsplit
from weakref import WeakSet

from converter.errors import BadRequest, Unreachable, Unsupported
from converter.storage.base import FileRef, Info, OpenFile, Place, changed, hold_installed, without_secrets
from converter.storage.far import FarFile, FarStore, heed, mark_of, nbytes_of, stopping, tag_of

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager

_CHUNK_NBYTES = 1 << 20
_SECONDS = 30.0  # without a byte
_TRICKLE_NBYTES = 1 << 14  # a stream that brings no more in that time stands still
_TRIES = 8
_WAIT_SECONDS = 0.25  # twice as long each time
_LONGEST_WAIT = 300.0
_HEED_SECONDS = 0.2  # so soon whoever waits hears that nobody waits for it
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_MISSING = (404, 410)
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_HOPS = 5
_AT_ONCE = 16
_MAX_JSON_NBYTES = 40_000_000  # of a file; of the largest index that is known a third
_MAX_ANSWER_NBYTES = 16_000_000  # of what a service says
_MAX_SHARDS = 10_000
_MAX_PARTS = 100
_PACKED = ("gzip", "x-gzip", "deflate", "compress", "br", "zstd")

_CONFIGS = (
    "config.json", "model_index.json", "modules.json", "generation_config.json", "adapter_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "preprocessor_config.json",
    "processor_config.json", "scheduler_config.json", "README.md", "LICENSE",
)  # fmt: skip
_STEMS = (("model", "safetensors"), ("diffusion_pytorch_model", "safetensors"), ("adapter_model", "safetensors"),
          ("pytorch_model", "bin"), ("diffusion_pytorch_model", "bin"), ("adapter_model", "bin"))  # fmt: skip
_TAGS = ("", ".fp16", ".bf16")

LOOKED_FOR = (
    *_CONFIGS,
    *(f"{stem}{tag}.{end}" for stem, end in _STEMS for tag in _TAGS),
    *(f"{stem}.{end}.index{tag}.json" for stem, end in _STEMS for tag in _TAGS),
)
"""The names that are looked for in a folder of a web server."""


@dataclass(frozen=True, slots=True)
class WebStore(FarStore):
    """A web server, by the beginning of its URLs."""

    root: str

    lists_all = False

    def spell(self, key: str) -> str:
        # What would be read otherwise when it is typed again.
        path = key.replace("%", "%25").replace("?", "%3F").replace("#", "%23")
        return self.root if key in ("", ".") else f"{self.root}/{path}"

    def url(self, key: str) -> str:
        """Give the URL of a key, spelled as a server is asked for it."""
        return f"{self.root}/{quote(key)}"

    def stat(self, key: str) -> Info | None:
        """Say what lies at a key; a file of a name that nobody looks for is asked for by itself."""
        seen, (folder, _, name) = self.snapshot, key.rpartition("/")
        with seen.lock:
            is_odd = "." in name and name not in LOOKED_FOR and key not in (".", "..")
            if is_odd and key not in seen.infos and (folder in seen.asked or folder in seen.folders):
                seen.infos[key] = self._entries(folder).get(name) or self._found(key)
        return super(WebStore, self).stat(key)

    def look(self, key: str) -> Info | None:
        found = self._found(key) if "." in key.rpartition("/")[2] and key != "." else None
        return found or (Info("folder", 0, "") if self._entries("" if key == "." else key) else None)

    def _found(self, key: str) -> Info | None:
        """Ask for a file that is named. Raises Unreachable where it is not for everybody."""
        found = self._ask_for(key)
        if isinstance(found, int):
            raise _refused(Place(self, key), found)
        return found

    def _ask_for(self, key: str) -> Info | int | None:
        """Ask for a file; a page is none, as servers have one for a folder. A status is that of a refusal.

        Raises Unsupported for one whose size is not told.
        """
        place = Place(self, key)
        with ask("HEAD", self.url(key), place) as response:
            if response.status in _MISSING:
                return None
            if response.status == 200 and _length_of(response.headers):
                return _info_of(response.headers, _length_of(response.headers))
        with ask("GET", self.url(key), place, {"Range": "bytes=0-0"}) as response:
            total = headers_total(response.headers)
            if response.status in _MISSING:
                return None
            if total is not None and (response.status == 206 or (response.status == 416 and total == 0)):
                return _info_of(response.headers, total)
            if response.status in (200, 206):
                length = _length_of(response.headers) if response.status == 200 else None
                if length is None and not _is_page(response.headers):
                    raise Unsupported(
                        place, "is on a server that does not say how long it is", "Fetch it, and name the file."
                    )
                return _info_of(response.headers, length)
            return response.status

    def look_in(self, key: str) -> dict[str, Info]:
        prefix = f"{key}/" if key else ""
        refused: list[int] = []
        over = threading.Event()
        pool = ThreadPoolExecutor(_AT_ONCE, initializer=_here.begin, initargs=(over,))
        try:

            def find(names: Iterable[str]) -> dict[str, Info]:
                asked = list(names)
                infos = dict(zip(asked, pool.map(self._ask_for, [prefix + name for name in asked]), strict=True))
                refused.extend(info for info in infos.values() if isinstance(info, int))
                return {name: info for name, info in infos.items() if isinstance(info, Info)}

            found = find(LOOKED_FOR)
            # Where nobody may list, some servers say so of what is not there.
            if 401 in refused or (refused and not found):
                raise _refused(Place(self, key), refused[0])
            named = {shard for name in found if ".index" in name for shard in self._shards(prefix + name, found[name])}
            if len(named) > _MAX_SHARDS:
                raise Unsupported(
                    Place(self, key), f"has an index of more than {_MAX_SHARDS:,} files", "Fetch it first."
                )
            found |= find(sorted(named - found.keys()))
        finally:
            over.set()
            pool.shutdown(wait=False, cancel_futures=True)
        if "model_index.json" in found:
            content = self._json(f"{prefix}model_index.json", found["model_index.json"])
            parts = [name for name, entry in content.items() if isinstance(entry, list) and _is_plain(name)]
            if len(parts) > _MAX_PARTS:
                raise Unsupported(Place(self, key), f"has more than {_MAX_PARTS} components", "Fetch it first.")
            found |= {name: Info("folder", 0, "") for name in parts if self._entries(prefix + name)}
        return found

    def _shards(self, key: str, info: Info) -> Iterator[str]:
        names = self._json(key, info).get("weight_map")
        if isinstance(names, dict):
            yield from (name for name in set(map(str, names.values())) if _is_plain(name))

    def _json(self, key: str, info: Info) -> dict[str, Any]:
        """Give what a file holds, or nothing: whoever reads it next says what is wrong with it."""
        if info.nbytes > _MAX_JSON_NBYTES:
            return {}
        file = self.open(Place(self, key), info.tag)
        try:
            content = json.loads(file.read(0, info.nbytes))
        except (ValueError, RecursionError):
            return {}
        finally:
            file.close()
        return content if isinstance(content, dict) else {}

    def opened(self, ref: FileRef, tag: str) -> OpenFile:
        return WebFile(ref, nbytes_of(tag))


def _is_plain(name: str) -> bool:
    return bool(name) and "/" not in name and "\\" not in name and name not in (".", "..") and name.isprintable()


class WebFile(FarFile):
    """A file of a web server; a store with other ways to a file overrides ``locate``."""

    def locate(self, is_new: bool) -> tuple[str, Mapping[str, str]]:
        """Give the URL of the file, and what goes with a request there; anew where the last one was refused."""
        place = self.ref.place
        assert isinstance(place.store, WebStore)
        return place.store.url(place.key), {}

    can_renew = False
    mark_is_of_url = True
    """Whether the tag has the ETag that the URL answers with."""

    def fetches(self, begin: int, end: int) -> Iterator[memoryview]:
        from urllib3.exceptions import HTTPError

        at, tries, was_renewed, since = begin, 0, False, begin
        url, headers = self.locate(False)
        while at < end:
            part = {**headers, **self._condition(), "Range": f"bytes={at}-{end - 1}"}
            try:
                with ask("GET", url, self.ref.place, part) as response:
                    if response.status in (401, 403) and self.can_renew and not was_renewed:
                        was_renewed = True
                        url, headers = self.locate(True)
                        continue
                    self._check(response, at)
                    for chunk in _read(response, end - at):
                        at += len(chunk)
                        yield memoryview(chunk)
                        if at - since > _TRICKLE_NBYTES:
                            tries, was_renewed, since = 0, False, at
                if at < end:
                    raise HTTPError("ended early")
            except HTTPError as error:
                tries, since = tries + 1, at
                if tries == _TRIES:
                    raise _unreachable(self.ref.place, error, tries) from None
                _wait(tries)

    def _condition(self) -> dict[str, str]:
        assert isinstance(self.ref.tag, str)
        mark = mark_of(self.ref.tag)
        return {"If-Match": mark} if self.mark_is_of_url and mark.startswith('"') and mark.isprintable() else {}

    def _check(self, response: BaseHTTPResponse, at: int) -> None:
        """Raise BadFile where an answer is of another file, or of another part of it."""
        place = self.ref.place
        if response.status in (404, 410, 412):
            raise changed(place)
        if response.status == 200 and at == 0:
            total = _length_of(response.headers)
        elif response.status == 200:
            raise Unsupported(place, "is on a server that gives no parts of files", "Fetch it, and name the file.")
        elif response.status in (206, 416):
            total = headers_total(response.headers)
        else:
            raise _refused(place, response.status)
        if total != self.nbytes:
            raise changed(place)
        if response.status != 200 and not response.headers.get("Content-Range", "").startswith(f"bytes {at}-"):
            raise Unreachable(place, "is answered with another part of it than was asked for", "Fetch it otherwise.")
        packing = response.headers.get("Content-Encoding", "").strip().lower()
        if packing in _PACKED:
            raise Unsupported(place, f"is sent packed ({packing}), and as it is was asked for", "Fetch it otherwise.")
        assert isinstance(self.ref.tag, str)
        mark = mark_of(self.ref.tag)
        if self.mark_is_of_url and mark and _mark_of(response.headers, like=mark) != mark:
            raise changed(place)


def headers_total(headers: Mapping[str, str]) -> int | None:
    """Give the size of a file of which a part is answered."""
    found = re.fullmatch(r"bytes (?:[0-9]+-[0-9]+|\*)/([0-9]{1,18})", headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _length_of(headers: Mapping[str, str]) -> int | None:
    length = headers.get("Content-Length", "")
    return int(length) if re.fullmatch("[0-9]{1,18}", length) else None


def _is_page(headers: Mapping[str, str]) -> bool:
    return "text/html" in headers.get("Content-Type", "").lower()


def _mark_of(headers: Mapping[str, str], like: str = "") -> str:
    """Give what changes with a file, of the kind that another is of: servers have one more for some requests."""
    etag = headers.get("ETag", "")
    if like and not like.endswith('"'):
        etag = ""
    return etag or headers.get("Last-Modified") or ""


def _info_of(headers: Mapping[str, str], nbytes: int | None) -> Info | None:
    """Give what a file is by the answer to a request for it; a page is none."""
    if nbytes is None or _is_page(headers):
        return None
    when = int(_seconds_of(headers.get("Last-Modified", "")) or 0) * 10**9
    return Info("file", nbytes, tag_of(nbytes, _mark_of(headers)), when, when)


def _seconds_of(date: str) -> float | None:
    """Give when a date is that a server names; None for what is none."""
    try:
        parsed = parsedate_tz(date)
        return mktime_tz(parsed) if parsed else None
    except (ValueError, OverflowError):
        return None


def _read(response: BaseHTTPResponse, nbytes: int) -> Iterator[bytes]:
    """Give so many bytes of an answer as they come, fewer at its end. Raises HTTPError where they hardly come."""
    from urllib3.exceptions import HTTPError

    left, since, count = nbytes, time.monotonic(), 0
    while left and (chunk := response.read1(min(_CHUNK_NBYTES, left), decode_content=False)):
        left, count = left - len(chunk), count + len(chunk)
        yield chunk
        now = time.monotonic()
        if count > _TRICKLE_NBYTES:
            since, count = now, 0
        elif now - since > _SECONDS:
            raise HTTPError("hardly comes")


class _Answer:
    """A response that is let go when its context is left, with what was not read of it."""

    def __init__(self, response: BaseHTTPResponse) -> None:
        self.response = response

    def __enter__(self) -> BaseHTTPResponse:
        return self.response

    def __exit__(self, *_: object) -> None:
        if self.response.length_remaining or self.response.length_remaining is None:
            self.response.close()
        self.response.release_conn()


def ask(
    method: str,
    url: str,
    place: Place,
    headers: Mapping[str, str] = {},
    *,
    body: bytes = b"",
    goes_on: bool = True,
    is_once: bool = False,
) -> _Answer:
    """Ask a web server, again where it is busy or does not answer, and where it leads to.

    Headers go to the first host alone, but for those that say what part is wanted, and a body goes to no other. Unless
    it ``goes_on``, the answer that leads to another host is given; what ``is_once`` is not asked again where it may
    have been done. Raises Unreachable where nobody answers, Unsupported for where it must not lead.
    """
    from urllib3.exceptions import HTTPError

    sent = {"Accept-Encoding": "identity", "User-Agent": "wconv", **headers}
    hops, tries = 0, 0
    while True:
        tries += 1
        heed()
        try:
            response = _send(method, url, sent, body)
        except HTTPError as error:
            if tries == _TRIES or not _may_pass(error, is_once):
                raise _unreachable(place, error, tries) from None
            _wait(tries)
            continue
        if response.status in _BUSY and not (is_once and response.status != 429):
            response.close()
            _wait(tries, _seconds_to_wait(place, response, tries))
            continue
        if response.status not in _REDIRECTS or "Location" not in response.headers:
            return _Answer(response)
        try:
            to = leads_to(place, url, response.headers["Location"])
        except Unsupported:
            response.close()
            raise
        is_elsewhere = _host_of(to) != _host_of(url)
        if is_elsewhere and not goes_on:
            return _Answer(response)
        response.close()
        hops += 1
        if hops > _MOST_HOPS:
            raise Unsupported(place, f"leads elsewhere more than {_MOST_HOPS} times", "Fetch it, and name the file.")
        if is_elsewhere and body:
            raise Unreachable(place, "leads what is sent to another host, which is not followed", "Look who runs it.")
        if is_elsewhere:
            kept = ("accept-encoding", "user-agent", "range", "if-match")
            sent = {name: value for name, value in sent.items() if name.lower() in kept}
        url, tries = to, 0


def ask_json(
    method: str,
    url: str,
    place: Place,
    headers: Mapping[str, str],
    check: Callable[[int, Mapping[str, str]], None],
    *,
    body: bytes = b"",
    is_once: bool = False,
) -> tuple[Any, Mapping[str, str]]:
    """Ask a service, and give what it says and the headers of that; ``check`` raises what a status means.

    Raises Unreachable for an answer that is no JSON, or is longer than one can be.
    """
    from urllib3.exceptions import HTTPError

    tries = 0
    while True:
        tries += 1
        try:
            with ask(method, url, place, headers, body=body, is_once=is_once) as response:
                check(response.status, response.headers)
                raw = b"".join(_read(response, _MAX_ANSWER_NBYTES + 1))
                if len(raw) > _MAX_ANSWER_NBYTES:
                    raise Unreachable(place, f"is answered with more than {_MAX_ANSWER_NBYTES:,} bytes", _WHOSE)
                return json.loads(raw), response.headers
        except HTTPError as error:
            if tries == _TRIES or is_once:
                raise _unreachable(place, error, tries) from None
            _wait(tries)
        except (ValueError, RecursionError):
            raise Unreachable(place, "is answered with what is no JSON", _WHOSE) from None


_WHOSE = "Look at the network: a proxy, or a page to sign in to it, may answer in its place."


def _send(method: str, url: str, headers: Mapping[str, str], body: bytes) -> BaseHTTPResponse:
    return _pool(_proxy_for(url)).request(
        method,
        url,
        headers=headers,
        body=body or None,
        redirect=False,
        preload_content=False,
        decode_content=False,
        retries=False,
    )


def _may_pass(error: Exception, is_once: bool) -> bool:
    """Say whether it can help to ask again; what must be done but once, only where nobody has heard of it."""
    from urllib3.exceptions import ConnectTimeoutError, LocationValueError, NewConnectionError

    if isinstance(error, LocationValueError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
        return False
    return not is_once or isinstance(error, (NewConnectionError, ConnectTimeoutError))


def _host_of(url: str) -> str:
    return urlsplit(url).netloc.lower()


def leads_to(place: Place, url: str, location: str) -> str:
    """Give where an answer leads to. Raises Unsupported for where it must not."""
    try:
        to = urljoin(url, location)
        before, after = urlsplit(url), urlsplit(to)
    except ValueError:
        raise Unsupported(place, "leads to what is no URL", "Fetch it, and name the file.") from None
    if after.scheme not in ("http", "https") or (before.scheme == "https" and after.scheme == "http"):
        problem = f"leads from {before.scheme}:// to {after.scheme}://, which is not followed"
        raise Unsupported(place, problem, "Fetch it, and name the file.")
    if _is_inner(after.hostname or "") and not _is_inner(before.hostname or ""):
        raise Unsupported(place, "leads from the net into your own network, which is not followed", "Look who runs it.")
    return to


@lru_cache(256)
def _is_inner(host: str) -> bool:
    """Say whether a host is this machine, or one that only its own network reaches."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return False  # it cannot be asked either
    return any(not ipaddress.ip_address(address.partition("%")[0]).is_global for address in found)


def _seconds_to_wait(place: Place, response: BaseHTTPResponse, tries: int) -> float:
    """Say how long a server that is busy wants to be left alone. Raises Unreachable where that is too long.

    And where it has been asked often enough.
    """
    # The Hub says in its own way when it has had enough.
    limit = re.search(r";t=([0-9]{1,9})", response.headers.get("RateLimit", "")) if response.status == 429 else None
    after = response.headers.get("Retry-After") or (limit[1] if limit else "")
    when = _seconds_of(after)
    seconds = float(after) if re.fullmatch("[0-9]{1,9}", after) else when - time.time() if when else 0.0
    if seconds > _LONGEST_WAIT:
        problem = f"is answered with {response.status}, and wants to be left alone for {seconds:,.0f} s"
        raise Unreachable(place, problem, "Run this again later.")
    if tries == _TRIES:
        raise Unreachable(place, f"is answered with {response.status}, after {tries} tries", "Run this again later.")
    return seconds


class _Here(threading.local):
    """What a thread knows of whoever waits for it."""

    over: threading.Event | None = None

    def begin(self, over: threading.Event) -> None:
        self.over = over


_here = _Here()


def _wait(tries: int, at_least: float = 0.0) -> None:
    end = time.monotonic() + max(_WAIT_SECONDS * 2 ** (tries - 1) * random.uniform(0.75, 1.25), at_least)
    while (left := end - time.monotonic()) > 0:
        heed()
        if _here.over is not None and _here.over.is_set():
            raise CancelledError
        time.sleep(min(left, _HEED_SECONDS))


def _refused(place: Place, status: int) -> Unreachable:
    advice = (
        "It wants to know who asks, and wconv sends no passwords: fetch it otherwise." if status in (401, 403) else ""
    )
    return Unreachable(place, f"is answered with {status}", advice)


def _unreachable(place: Place, error: Exception, tries: int) -> Unreachable:
    """Word what went wrong on the way by what it is called: what it says may name a URL, and that a secret."""
    what = type(error).__name__.removesuffix("Error").removesuffix("Exception")
    words = re.sub(r"(?<!^)(?=[A-Z][a-z])", " ", what).lower()
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return Unreachable(
            place, "is on a server that does not prove who it is", "Look at the network, and at SSL_CERT_FILE."
        )
    many = f", after {tries} tries" if tries > 1 else ""
    how = f" ({words})" if words else ""
    return Unreachable(place, f"cannot be reached{how}{many}", "Look at the network, and run this again.")


def _proxy_for(url: str) -> str:
    """Give the proxy that the environment names for a URL, if any."""
    from urllib.request import getproxies, proxy_bypass

    parts = urlsplit(url)
    if proxy_bypass(parts.hostname or "") or proxy_bypass(parts.netloc):
        return ""
    proxies = getproxies()
    return proxies.get(parts.scheme) or proxies.get("all") or ""


@lru_cache(4)
def _pool(proxy: str) -> PoolManager:
    import urllib3

    how: dict[str, Any] = {"timeout": urllib3.Timeout(connect=_SECONDS, read=_SECONDS), "maxsize": 2 * _AT_ONCE}
    if not proxy:
        return _noting(urllib3.PoolManager(**how))
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    known = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    headers = urllib3.make_headers(proxy_basic_auth=known) if parts.username else None
    address = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return _noting(urllib3.ProxyManager(address, proxy_headers=headers, **how))


_Manager = TypeVar("_Manager", bound="PoolManager")
_SOCKETS: WeakSet[socket.socket] = WeakSet()


def _noting(manager: _Manager) -> _Manager:
    """Have a manager note its sockets, so that those who wait for one can be woken up."""
    import urllib3

    def noting(kind: Any) -> Any:
        def connect(self: Any) -> None:
            kind.ConnectionCls.connect(self)
            _SOCKETS.add(self.sock)

        noted = type("Noted", (kind.ConnectionCls,), {"connect": connect})
        return type("NotedPool", (kind,), {"ConnectionCls": noted})

    pools = {"http": urllib3.HTTPConnectionPool, "https": urllib3.HTTPSConnectionPool}
    manager.pool_classes_by_scheme = {scheme: noting(kind) for scheme, kind in pools.items()}
    return manager


def _cut() -> None:
    for one in list(_SOCKETS):
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


stopping.append(_cut)


# What a browser shows of a model; what lies under ``resolve`` is a file.
_HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_HUB_PAGE = re.compile(r"([\w.-]+/[\w.-]+)(?:/(?:tree|blob|commits?|discussions)(?:/.*)?)?", re.ASCII)


def open_url(url: str) -> Place:
    """Give the place that a URL of the web names. Raises BadRequest for one that has more than a path."""
    shown = without_secrets(url)
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host:
        raise BadRequest(shown, "names no web server", "It is spelled https://host/folder.")
    if shown != url:
        raise BadRequest(shown, "has a password or a query, which may be a secret", "Fetch it, and name the file.")
    key = unquote(parts.path).strip("/")
    page = _HUB_PAGE.fullmatch(key) if host in _HUB_HOSTS else None
    if page:
        raise BadRequest(shown, "is a page of the Hub", f"Name the model itself: hf://{page[1]}.")
    if any(part in (".", "..") or not part.isprintable() for part in key.split("/")):
        raise BadRequest(url, "has a part that no folder has", "Name it plainly.")
    hold_installed(url, "remote", "urllib3")
    return Place(WebStore(f"{parts.scheme}://{parts.netloc}"), key or ".")

"""Files of web servers, through urllib3: read by ranges, from where a server says that they are.

A redirect is followed to http and https alone, never from https to http, and never from the net into this machine's
own network; no header of one host goes to another. A server that is busy is asked again when it says, a stream that
breaks goes on where it was. A web server does not list what it has: in a folder the names are looked for that
loaders look for, and what an index names.
"""

from __future__ import annotations

import ipaddress
import json
import random
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import mktime_tz, parsedate_tz
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urljoin, urlsplit

from converter.errors import BadFile, BadRequest, SystemRefused, Unsupported
from converter.storage.base import FileRef, Info, OpenFile, Place, Tag, changed
from converter.storage.far import FarFile, FarStore, mark_of, nbytes_of, tag_of

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager

_CHUNK_NBYTES = 1 << 20
_SECONDS = 60.0  # without a byte
_TRIES = 8
_WAIT_SECONDS = 0.25  # twice as long each time
_LONGEST_WAIT = 300.0
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_HOPS = 5
_AT_ONCE = 16
_MAX_JSON_NBYTES = 40_000_000

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
        return self.root if key in ("", ".") else f"{self.root}/{key}"

    def url(self, key: str) -> str:
        """Give the URL of a key, spelled as a server is asked for it."""
        return f"{self.root}/{quote(key)}"

    def look(self, key: str) -> Info | None:
        found = self._head(key) if "." in key.rpartition("/")[2] else None
        return found or (Info("folder", 0, "") if self._entries("" if key == "." else key) else None)

    def _head(self, key: str) -> Info | None:
        """Ask for a file; a page is none, as servers have one for a folder."""
        with ask("HEAD", self.url(key), Place(self, key)) as response:
            if response.status in (404, 410):
                return None
            headers = response.headers
            if response.status == 200 and "Content-Length" in headers:
                return None if "text/html" in headers.get("Content-Type", "") else _info_of(headers)
        with ask("GET", self.url(key), Place(self, key), {"Range": "bytes=0-0"}) as response:
            total = headers_total(response.headers)
            if response.status != 206 or total is None:
                return None
            return _info_of(response.headers, total)

    def look_in(self, key: str) -> dict[str, Info]:
        prefix = f"{key}/" if key else ""
        with ThreadPoolExecutor(_AT_ONCE) as pool:

            def find(names: Iterable[str]) -> dict[str, Info]:
                asked = list(names)
                infos = pool.map(self._head, [prefix + name for name in asked])
                return {name: info for name, info in zip(asked, infos, strict=True) if info}

            found = find(LOOKED_FOR)
            named = {shard for name in found if ".index" in name for shard in self._shards(prefix + name, found[name])}
            found |= find(sorted(named - found.keys()))
        if "model_index.json" in found:
            content = self._json(f"{prefix}model_index.json", found["model_index.json"])
            parts = (name for name, entry in content.items() if isinstance(entry, list) and _is_plain(name))
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

    def open(self, place: Place, tag: Tag | None) -> OpenFile:
        if tag is None:
            tag = self.found(place).tag
        assert isinstance(tag, str)
        return WebFile(FileRef(place, tag), nbytes_of(tag))


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

        at, tries, was_renewed = begin, 0, False
        url, headers = self.locate(False)
        while at < end:
            try:
                with ask(
                    "GET", url, self.ref.place, {**headers, **self._condition(), "Range": f"bytes={at}-{end - 1}"}
                ) as response:
                    if response.status in (401, 403) and self.can_renew and not was_renewed:
                        was_renewed = True
                        url, headers = self.locate(True)
                        continue
                    self._check(response, at)
                    while at < end:
                        chunk = response.read(min(_CHUNK_NBYTES, end - at))
                        if not chunk:
                            raise HTTPError("ended early")
                        at += len(chunk)
                        tries, was_renewed = 0, False
                        yield memoryview(chunk)
            except HTTPError as error:
                tries += 1
                if tries == _TRIES:
                    raise _unreachable(self.ref.place, error, tries) from None
                _wait(tries)

    def _condition(self) -> dict[str, str]:
        assert isinstance(self.ref.tag, str)
        mark = mark_of(self.ref.tag)
        return {"If-Match": mark} if self.mark_is_of_url and mark.startswith('"') else {}

    def _check(self, response: BaseHTTPResponse, at: int) -> None:
        """Raise BadFile where an answer is of another file, or of another part of it."""
        place = self.ref.place
        if response.status in (404, 410, 412):
            raise changed(place)
        if response.status == 200 and at == 0:
            total: int | None = int(response.headers.get("Content-Length", -1))
        elif response.status == 200:
            raise Unsupported(place, "is on a server that gives no parts of files", "Fetch it, and name the file.")
        elif response.status in (206, 416):
            total = headers_total(response.headers)
        else:
            raise _refused(place, response.status)
        if total != self.nbytes:
            raise changed(place)
        if response.status != 200 and not response.headers.get("Content-Range", "").startswith(f"bytes {at}-"):
            raise SystemRefused(place, "is answered with another part of it than was asked for", "Fetch it otherwise.")
        assert isinstance(self.ref.tag, str)
        if self.mark_is_of_url and mark_of(self.ref.tag) and _mark_of(response.headers) != mark_of(self.ref.tag):
            raise changed(place)


def headers_total(headers: Mapping[str, str]) -> int | None:
    """Give the size of a file of which a part is answered."""
    found = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _mark_of(headers: Mapping[str, str]) -> str:
    return headers.get("ETag") or headers.get("Last-Modified") or ""


def _info_of(headers: Mapping[str, str], total: int | None = None) -> Info:
    nbytes = int(headers["Content-Length"]) if total is None else total
    parsed = parsedate_tz(headers.get("Last-Modified", ""))
    when = mktime_tz(parsed) * 10**9 if parsed else 0
    return Info("file", nbytes, tag_of(nbytes, _mark_of(headers)), when, when)


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

    Headers go to the first host alone, but for those that say what part is wanted. Unless it ``goes_on``, the answer
    that leads to another host is given; what ``is_once`` may have been done where no answer came. Raises SystemRefused where nobody answers, Unsupported for where it must not
    lead.
    """
    from urllib3.exceptions import HTTPError

    sent = {"Accept-Encoding": "identity", "User-Agent": "wconv", **headers}
    hops, tries = 0, 0
    while True:
        tries += 1
        try:
            response = _pool(_proxy_for(url)).request(
                method,
                url,
                headers=sent,
                body=body or None,
                redirect=False,
                preload_content=False,
                decode_content=False,
                retries=False,
            )
        except HTTPError as error:
            if tries == _TRIES or is_once:
                raise _unreachable(place, error, tries) from None
            _wait(tries)
            continue
        if response.status in _BUSY and not (is_once and response.status != 429):
            limit = re.search(r";t=(\d+)", response.headers.get("RateLimit", ""))  # as the Hub says it
            after = response.headers.get("Retry-After") or (limit[1] if limit else "")
            status = response.status
            response.close()
            if tries == _TRIES:
                raise SystemRefused(place, f"is answered with {status}, after {tries} tries", "Run this again later.")
            _wait(tries, after)
            continue
        if response.status not in _REDIRECTS or "Location" not in response.headers:
            return _Answer(response)
        to = urljoin(url, response.headers["Location"])
        if not goes_on and urlsplit(to).netloc != urlsplit(url).netloc:
            return _Answer(response)
        response.close()
        hops += 1
        _check_redirect(place, url, to, hops)
        if urlsplit(to).netloc != urlsplit(url).netloc:
            kept = ("accept-encoding", "user-agent", "range", "if-match")
            sent = {name: value for name, value in sent.items() if name.lower() in kept}
        url, tries = to, 0


def _check_redirect(place: Place, url: str, to: str, hops: int) -> None:
    before, after = urlsplit(url), urlsplit(to)
    if after.scheme not in ("http", "https") or (before.scheme == "https" and after.scheme == "http"):
        problem = f"leads from {before.scheme}:// to {after.scheme}://, which is not followed"
        raise Unsupported(place, problem, "Fetch it, and name the file.")
    if hops > _MOST_HOPS:
        raise Unsupported(place, f"leads elsewhere more than {_MOST_HOPS} times", "Fetch it, and name the file.")
    if _is_inner(after.hostname or "") and not _is_inner(before.hostname or ""):
        raise Unsupported(place, "leads from the net into your own network, which is not followed", "Look who runs it.")


@lru_cache(256)
def _is_inner(host: str) -> bool:
    """Say whether a host is this machine, or one that only its own network reaches."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False  # it cannot be asked either
    return any(not ipaddress.ip_address(address.partition("%")[0]).is_global for address in found)


def _wait(tries: int, after: str = "") -> None:
    seconds = _WAIT_SECONDS * 2 ** (tries - 1) * random.uniform(0.75, 1.25)
    if after.isdecimal():
        seconds = max(seconds, float(after))
    elif after and (parsed := parsedate_tz(after)):
        seconds = max(seconds, mktime_tz(parsed) - time.time())
    time.sleep(min(seconds, _LONGEST_WAIT))


def _refused(place: Place, status: int) -> SystemRefused:
    advice = (
        "It wants to know who asks, and wconv sends no passwords: fetch it otherwise." if status in (401, 403) else ""
    )
    return SystemRefused(place, f"is answered with {status}", advice)


def _unreachable(place: Place, error: Exception, tries: int) -> SystemRefused:
    what = type(error).__name__.removesuffix("Error")
    words = re.sub(r"(?<!^)(?=[A-Z])", " ", what).lower()
    return SystemRefused(
        place, f"cannot be reached ({words}), after {tries} tries", "Look at the network, and run this again."
    )


def _proxy_for(url: str) -> str:
    """Give the proxy that the environment names for a URL, if any."""
    from urllib.request import getproxies, proxy_bypass

    parts = urlsplit(url)
    return "" if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme, "")


@lru_cache(4)
def _pool(proxy: str) -> PoolManager:
    import urllib3

    timeout = urllib3.Timeout(connect=_SECONDS, read=_SECONDS)
    if proxy:
        return urllib3.ProxyManager(proxy, maxsize=2 * _AT_ONCE, timeout=timeout)
    return urllib3.PoolManager(maxsize=2 * _AT_ONCE, timeout=timeout)


def open_url(url: str) -> Place:
    """Give the place that a URL of the web names. Raises BadRequest for one that has more than a path."""
    parts = urlsplit(url)
    if not parts.hostname:
        raise BadRequest(url, "names no web server", "It is spelled https://host/folder.")
    if parts.username or parts.password or parts.query or parts.fragment:
        shown = f"{parts.scheme}://{parts.hostname}{parts.path}"
        raise BadRequest(shown, "has a password or a query, which may be a secret", "Fetch it, and name the file.")
    key = unquote(parts.path).strip("/")
    if any(part in (".", "..") or not part.isprintable() for part in key.split("/")):
        raise BadRequest(url, "has a part that no folder has", "Name it plainly.")
    check_installed(url)
    return Place(WebStore(f"{parts.scheme}://{parts.netloc}"), key or ".")


def check_installed(url: str) -> None:
    """Raise Unsupported where the library is missing."""
    try:
        import urllib3  # noqa: F401
    except ImportError:
        raise Unsupported(url, "needs urllib3, which is not installed here", "pip install 'wconv[remote]'") from None

"""The Hugging Face Hub: a repository of models at one commit.

A name that is read stands for the commit that it was when it was looked at first. A file is asked for once, and then
read in long ranges from where its bytes lie, whose address is good for some time; what huggingface_hub has in its
cache is read there. Files that are written go into Xet as they come, and nothing of them is seen before the one
commit. Who asks is for huggingface_hub to know: HF_TOKEN, or ``hf auth login``; that goes to the Hub's own host alone.
"""

from __future__ import annotations

import json
import re
import threading
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from converter.errors import BadFile, BadRequest, OutputRefused, Unreachable, Unsupported, WconvError
from converter.storage import web
from converter.storage.base import FileRef, Info, OpenFile, Place, changed, hold_installed, without_secrets
from converter.storage.far import CommittedStore, Publication, Receipt, Writer, mark_of, nbytes_of, stopping, tag_of
from converter.storage.local import open_copy

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = r"[A-Za-z0-9][\w.-]*"
_REPO = re.compile(f"{_NAME}/{_NAME}")
# Revisions with slashes, as HfFileSystem takes them (``hf_file_system.py``); others are spelled with %2F.
_REVISION = re.compile(r"(refs/(?:pr|convert)/[\w.-]+|[^/]+)(?:/(.*))?")
_PROPOSAL = re.compile(r"refs/(?:pr|convert)/[\w.-]+")
_MAX_FILES = 100_000
_MAX_PAGES = 2_000
_MAX_LOCATED = 10_000
_WRONG = (400, 413, 422)
_MAX_SAID = 300
_JSON = {"Content-Type": "application/json"}
_MADE = "was made while this ran"
_SIGN_IN = "Sign in with 'hf auth login', or set HF_TOKEN."


@dataclass(frozen=True, slots=True)
class HubStore(CommittedStore):
    """A repository at a revision, as its user says it, and at the commit that this was, once somebody has looked.

    One that is written to may be made, ``is_private`` or not; ``as_pr`` proposes to its owner what is written.
    """

    repo: str
    revision: str = "main"
    commit: str = ""
    may_be_made: bool = False
    is_private: bool = False
    as_pr: bool = False

    def spell(self, key: str) -> str:
        safe = "/" if _PROPOSAL.fullmatch(self.revision) else ""
        at = "" if self.revision == "main" else f"@{quote(self.revision, safe=safe)}"
        return f"hf://{self.repo}{at}" + ("" if key in ("", ".") else f"/{key}")

    @property
    def commit_id(self) -> str:  # type: ignore[override]
        return self.commit

    @property
    def loaders_name(self) -> str:  # type: ignore[override]
        return self.repo if self.revision == "main" and not self.as_pr else ""

    def is_same(self, key: str, other: Place) -> bool:
        one, there = (self.repo, self.revision, key), other.store
        return isinstance(there, HubStore) and one == (there.repo, there.revision, other.key)

    def pinned(self) -> HubStore:
        if self.commit:
            return self
        found = self.ask_api(f"revision/{quote(self.revision, safe='')}?expand=sha")
        commit = str(found.get("sha", ""))
        if not _COMMIT.fullmatch(commit):
            raise Unreachable(self.spell(""), "has no commit that the Hub names", "Name a revision: @main.")
        return replace(self, commit=commit)

    def is_there(self) -> bool:
        """Say whether the repository is there, and the revision of it."""
        try:
            self.pinned()
        except BadFile:
            return False
        return True

    def look(self, key: str) -> Info | None:
        if key in ("", "."):
            return Info("folder", 0, "") if self.is_there() else None
        folder, _, name = key.rpartition("/")
        return self._entries(folder).get(name)

    def look_in(self, key: str) -> dict[str, Info]:
        folders = self.snapshot.folders
        if "" not in folders:
            folders.update(self._tree())
        return folders.get(key, {})

    def _tree(self) -> dict[str, dict[str, Info]]:
        """List all of the repository: each folder with what is in it."""
        folders: dict[str, dict[str, Info]] = {"": {}}
        if not self.is_there():
            return folders
        for count, entry in enumerate(self._entries_of_tree()):
            if count == _MAX_FILES:
                raise Unsupported(self.spell(""), f"has more than {_MAX_FILES:,} files and folders", "Fetch it first.")
            path = str(entry.get("path"))
            parts = path.split("/")
            if any(part in ("", ".", "..") or part.lower() == ".git" or re.search(r"[\0\\]", part) for part in parts):
                continue  # git has none of these
            for depth in range(1, len(parts)):
                folder, name = "/".join(parts[: depth - 1]), parts[depth - 1]
                folders.setdefault(folder, {})[name] = Info("folder", 0, "")
                folders.setdefault("/".join(parts[:depth]), {})
            if entry.get("type") == "file" and path != ".gitattributes":
                folders.setdefault("/".join(parts[:-1]), {})[parts[-1]] = self._info_of(entry)
        return folders

    def _info_of(self, entry: Mapping[str, Any]) -> Info:
        lfs = entry.get("lfs")
        nbytes, mark = (
            (lfs.get("size"), lfs.get("oid")) if isinstance(lfs, dict) else (entry.get("size"), entry.get("oid"))
        )
        if not isinstance(nbytes, int) or nbytes < 0 or not re.fullmatch("[0-9a-f]{40}(?:[0-9a-f]{24})?", str(mark)):
            raise self._unreadable()
        return Info("file", nbytes, tag_of(nbytes, str(mark)))

    def _entries_of_tree(self) -> Iterator[dict[str, Any]]:
        """List files and folders, a page after another; where the next one is, a server says by its query alone."""
        begin = f"{self._api()}/tree/{quote(self.commit or self.revision, safe='')}?"
        query = "recursive=true&limit=1000"
        for _ in range(_MAX_PAGES):
            content, answered = web.ask_json("GET", begin + query, Place(self, "."), headers(), self.check)
            if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
                raise self._unreadable()
            yield from content
            following = re.match(r'<[^>?]*\?([^>#]+)[^>]*>;\s*rel="next"', answered.get("Link", ""))
            if following is None:
                return
            query = following[1]
        raise Unsupported(self.spell(""), f"is listed on more than {_MAX_PAGES:,} pages", "Fetch it first.")

    def ask_api(self, what: str, content: object = None) -> dict[str, Any]:
        """Ask the Hub about the repository. Raises BadFile where it, or the revision, is not there."""
        url, where = f"{self._api()}/{what}", Place(self, ".")
        if content is None:
            answer, _ = web.ask_json("GET", url, where, headers(), self.check)
        else:
            body = json.dumps(content).encode()
            answer, _ = web.ask_json("POST", url, where, {**headers(), **_JSON}, self.check, body=body)
        if not isinstance(answer, dict):
            raise self._unreadable()
        return answer

    def _unreadable(self) -> Unreachable:
        return Unreachable(self.spell(""), "is described in a way that wconv does not know", "Look at HF_ENDPOINT.")

    def _to_write_by(self, what: str) -> str:
        """Name what is asked of the Hub to write to the repository."""
        return f"{what}/{quote(self.revision, safe='')}{'?create_pr=1' if self.as_pr else ''}"

    def _api(self) -> str:
        return f"{endpoint()}/api/models/{self.repo}"

    def check(self, status: int, answered: Mapping[str, str], key: str = "") -> None:
        """Raise what an answer of the Hub means, if it is not what was asked for."""
        if status < 400:
            return
        code, place = answered.get("X-Error-Code", ""), self.spell(key)
        if code == "RevisionNotFound":
            raise BadFile(place, f"has no revision {self.revision!r}", "Check the branch, tag or commit.")
        if code == "GatedRepo":
            advice = f"Ask for it at {endpoint()}/{self.repo}, then sign in with 'hf auth login', or set HF_TOKEN."
            raise Unreachable(place, "is gated, and its owner has not let you in", advice)
        if code == "EntryNotFound":
            raise BadFile(place, "does not exist")
        if code == "RepoNotFound" or status == 404:
            raise BadFile(place, "is no repository of the Hub that you can see", f"If it is private: {_SIGN_IN}")
        if status in (401, 403):
            # Whoever is known and may not is told 403.
            advice = (
                f"If you are signed in, your token may not do that there. {_SIGN_IN}" if status == 403 else _SIGN_IN
            )
            raise Unreachable(place, f"is refused by the Hub ({status})", advice)
        if status in _WRONG:
            said = re.sub(r"\s+", " ", answered.get("X-Error-Message", ""))[:_MAX_SAID]
            raise Unreachable(place, f"is refused by the Hub ({status}{': ' * bool(said)}{said})", "See what it says.")
        raise Unreachable(place, f"is answered by the Hub with {status}", "Run this again later.")

    def to_write(self, create: bool, private: bool, pr: bool) -> HubStore:
        """Give the repository as it is to be written to. Raises BadRequest where that cannot be.

        What is committed goes on the commit that it is at now, or it is refused.
        """
        if private and not create:
            raise BadRequest(self.spell(""), "is not made here, and --private is for what is", "Say --create too.")
        store = replace(self, may_be_made=create, is_private=private, as_pr=pr)
        if self.commit:
            raise BadRequest(self.spell(""), "is a commit, and those stay as they are", "Name a branch.")
        try:
            pinned = store.pinned()
            if self.revision != "main" and not pr and self.revision in self._tags():
                raise BadRequest(self.spell(""), "is a tag, and those stay where they are", "Name a branch.")
            if private and self.ask_api(f"revision/{pinned.commit}?expand=private").get("private") is False:
                raise BadRequest(
                    self.spell(""), "is there, and everybody sees it", "Leave --private out, or name another."
                )
            return pinned
        except BadFile as error:
            if error.problem.startswith("has no revision"):
                raise BadRequest(error.where, error.problem, "Make the branch first, or leave it out.") from None
            if not create:
                raise BadRequest(error.where, error.problem, f"--create makes it. {error.advice}") from None
            if self.revision != "main" or pr:
                problem = f"is not there, and {'a proposal' if pr else 'a branch'} needs what is"
                raise BadRequest(self.spell(""), problem, "Write to its main branch first.") from None
            return store

    def _tags(self) -> set[str]:
        found = self.ask_api("refs")
        names = {kind: {str(one.get("name")) for one in found.get(kind) or ()} for kind in ("tags", "branches")}
        return names["tags"] - names["branches"]

    def get_ready(self) -> None:
        if self.commit or not self.may_be_made:
            return
        owner, _, name = self.repo.partition("/")
        asked: dict[str, Any] = {"name": name, "organization": owner, "type": "model"}
        asked |= {"private": True} if self.is_private else {}  # else as its owner's new ones are
        url, body = f"{endpoint()}/api/repos/create", json.dumps(asked).encode()
        with web.ask("POST", url, Place(self, "."), {**headers(), **_JSON}, body=body) as response:
            if response.status != 409:
                self.check(response.status, response.headers)
                return
        # Somebody has made it meanwhile, or the first of several tries has.
        self.snapshot.forget()
        if self.list("."):
            raise OutputRefused(self.spell(""), _MADE, "Use --overwrite to replace what it has.")

    @contextmanager
    def writer(self, key: str, nbytes: int, note: str) -> Iterator[Writer]:
        import hf_xet

        known = headers()
        if not known:
            raise Unreachable(self.spell(""), "is written to by those that the Hub knows", _SIGN_IN)
        what = self._to_write_by("xet-write-token")
        token = self.ask_api(what)
        try:
            access: dict[str, Any] = {"endpoint": str(token["casUrl"]), "token": str(token["accessToken"])}
            access |= {"token_expiry_unix_secs": int(token["exp"]), "token_refresh_url": f"{self._api()}/{what}"}
        except (KeyError, ValueError, TypeError):
            raise self._unreadable() from None
        with (
            self._worded(key),
            _session().new_upload_commit(token_refresh_headers=known, **access) as commit,
        ):
            stream = commit.start_upload_stream(name=key, sha256=hf_xet.COMPUTE_SHA256)
            writer = _Writer(stream)
            yield writer
            found = stream.finish().xet_info
        if found.file_size != nbytes:
            raise Unreachable(
                self.spell(key), f"has come to {found.file_size:,} bytes, not {nbytes:,}", "Run it again."
            )
        writer.receipt = Receipt(key, nbytes, found.sha256)

    @contextmanager
    def _worded(self, key: str) -> Iterator[None]:
        """Say in one line what hf_xet says in many."""
        try:
            yield
        except (WconvError, KeyboardInterrupt):
            raise
        except Exception as error:
            if not type(error).__module__.startswith(("hf_xet", "builtins")) or isinstance(
                error, (MemoryError, AssertionError)
            ):
                raise
            status = re.search(r"\(([45]\d\d)\b", str(error))  # as reqwest spells it, after what may have a port
            answer = f" ({status[1]})" if status else ""
            advice = _SIGN_IN if answer and status and status[1] in ("401", "403") else "Run this again."
            # What it says may hold an address that is signed.
            raise Unreachable(self.spell(key), f"cannot be sent to the Hub{answer}", advice) from None

    def publish(self, what: Publication) -> str:
        """Make the one commit that all of it becomes visible with."""
        contents = {name: content for name, content, _ in what.texts}
        receipts = list(what.written)
        for name in self._not_in_git(contents):
            with self.writer(name, len(contents[name]), "") as out:
                out.write(memoryview(contents.pop(name)))
            assert out.receipt is not None
            receipts.append(out.receipt)
        at = self.pinned()
        if not self.commit and not what.replaces and at.list("."):
            raise OutputRefused(self.spell(""), _MADE, "Use --overwrite to replace what it has.")
        lines: list[tuple[str, dict[str, Any]]] = [
            ("header", {"summary": what.message, "description": "", "parentCommit": at.commit}),
            *(("deletedFile", {"path": name}) for name in what.removed),
            *(("lfsFile", {"path": one.name, "algo": "sha256", "oid": one.sha256, "size": one.nbytes})
              for one in receipts),
            *(("file", {"path": name, "content": b64encode(content).decode(), "encoding": "base64"})
              for name, content in contents.items()),
        ]  # fmt: skip
        body = b"".join(json.dumps({"key": key, "value": value}).encode() + b"\n" for key, value in lines)
        url = f"{self._api()}/{self._to_write_by('commit')}"
        sent = {**headers(), "Content-Type": "application/x-ndjson"}
        answer, _ = web.ask_json("POST", url, Place(self, "."), sent, self._check_commit, body=body, is_once=True)
        self.snapshot.forget()
        told = answer if isinstance(answer, dict) else {}
        return str(told.get("pullRequestUrl") or told.get("commitUrl") or "")

    def _check_commit(self, status: int, answered: Mapping[str, str]) -> None:
        if status in (409, 412):
            problem = "has a new commit since it was looked at, and nothing was changed"
            raise OutputRefused(self.spell(""), problem, "Run this again.")
        self.check(status, answered)

    def _not_in_git(self, contents: Mapping[str, bytes]) -> list[str]:
        """Ask which of small files the Hub does not take into git itself."""
        files = [
            {"path": name, "size": len(content), "sample": b64encode(content[:512]).decode()}
            for name, content in contents.items()
        ]
        if not files:
            return []
        modes = self.ask_api(self._to_write_by("preupload"), {"files": files}).get("files")
        if not isinstance(modes, list) or not all(isinstance(one, dict) for one in modes):
            raise self._unreadable()
        return [name for one in modes if (name := str(one.get("path"))) in contents and one.get("uploadMode") == "lfs"]

    def try_to_write(self, key: str) -> None:
        self.ask_api(self._to_write_by("xet-write-token"))

    def opened(self, ref: FileRef, tag: str) -> OpenFile:
        from huggingface_hub import try_to_load_from_cache

        there = try_to_load_from_cache(self.repo, ref.place.key, revision=self.commit) if self.commit else None
        copy = open_copy(ref, there, nbytes_of(tag)) if isinstance(there, str) else None
        return copy or _File(ref, nbytes_of(tag))


class _Writer:
    """Takes the bytes of a file that goes into Xet."""

    receipt: Receipt | None = None

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, data: memoryview) -> None:
        self._stream.write(bytes(data))


class _File(web.WebFile):
    can_renew = True
    mark_is_of_url = False  # it is the SHA-256 of what git has as a pointer, and where the bytes lie answers otherwise

    def locate(self, is_new: bool) -> tuple[str, Mapping[str, str]]:
        """Ask the Hub where the bytes of the file lie, once a file, and again when the address is no longer good."""
        place = self.ref.place
        store = place.store
        assert isinstance(store, HubStore)
        assert isinstance(self.ref.tag, str)
        what = (store, place.key, self.ref.tag)
        if not is_new and (known := _LOCATED.get(what)):
            return known, _own(known)
        url = f"{endpoint()}/{store.repo}/resolve/{store.commit or quote(store.revision, safe='')}/{quote(place.key)}"
        with web.ask("HEAD", url, place, headers(), goes_on=False) as response:
            store.check(response.status, response.headers, place.key)
            mark = (
                (response.headers.get("X-Linked-ETag") or response.headers.get("ETag") or "")
                .removeprefix("W/")
                .strip('"')
            )
            if mark and mark != mark_of(self.ref.tag):
                raise changed(place)
            to = response.headers.get("Location")
        located = web.leads_to(place, url, to) if to else url
        with _LOCATING:
            if len(_LOCATED) >= _MAX_LOCATED:
                _LOCATED.clear()
            _LOCATED[what] = located
        return located, _own(located)


# Where files lie, by what they are; an address may be a secret, and is no part of one.
_LOCATED: dict[tuple[HubStore, str, str], str] = {}
_LOCATING = threading.Lock()


def _own(url: str) -> dict[str, str]:
    """Give the headers that say who asks, for an address of the Hub's own alone."""
    one, own = urlsplit(url), urlsplit(endpoint())
    return headers() if (one.scheme, one.netloc) == (own.scheme, own.netloc) else {}


@lru_cache(1)
def _session() -> Any:
    """Give what speaks with Xet, one a process until somebody stops what it does."""
    import hf_xet

    session = hf_xet.XetSession()

    def stop() -> None:
        with suppress(ValueError):  # somebody else stops it too
            stopping.remove(stop)
        _session.cache_clear()
        session.sigint_abort()

    stopping.append(stop)
    return session


def endpoint() -> str:
    """Give the URL of the Hub, or of what stands in for it."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def headers() -> dict[str, str]:
    """Say to the Hub who asks. Raises Unreachable where that cannot be told, or nobody is to be asked."""
    from huggingface_hub import constants, get_token

    if constants.is_offline_mode():
        raise Unreachable("the Hub", "is not to be asked: HF_HUB_OFFLINE is set", "Unset it, or name a folder.")
    try:
        token = get_token()
    except Exception as error:  # whatever a way to sign in raises; it may hold what is a secret
        problem = f"cannot be told who asks ({type(error).__name__})"
        raise Unreachable("the Hub", problem, "Look at HF_OIDC_RESOURCE, or set HF_TOKEN.") from None
    if token and not re.fullmatch("[!-~]+", token):
        raise Unreachable(
            "HF_TOKEN", "or the token of 'hf auth login', has characters that no token has", "Set it anew."
        )
    return {"Authorization": f"Bearer {token}"} if token else {}


def open_url(url: str) -> Place:
    """Give the place that a ``hf:`` URL names. Raises BadRequest for one that names no repository of models."""
    shown = without_secrets(url) if re.search(r"hf_\w{8}|//[^/@]*:[^/@]*@", url) else url
    path = url.partition("://")[2].rstrip("/").removeprefix("models/")
    parts = path.split("/", 1)
    if parts[0] in ("datasets", "spaces", "buckets"):
        raise Unsupported(url, f"is one of the Hub's {parts[0]}, and wconv reads models", "")
    owner, _, rest = path.partition("/")
    name, at, rest = rest.partition("@") if "@" in rest.partition("/")[0] else (rest, "", "")
    revision, inner = "main", ""
    if at:
        matched = _REVISION.fullmatch(rest)
        revision, inner = (unquote(matched[1]), matched[2] or "") if matched else ("", "")
    else:
        name, _, inner = name.partition("/")
    if not _REPO.fullmatch(f"{owner}/{name}") or not revision or not revision.isprintable() or ".." in revision:
        raise BadRequest(shown, "names no model of the Hub", "It is spelled hf://owner/name@revision/folder.")
    if any(part in (".", "..") or "\0" in part for part in inner.split("/")):
        raise BadRequest(shown, "has a part that no folder has", "Name it plainly.")
    hold_installed(url, "hub", "huggingface_hub", "urllib3")
    commit = revision if _COMMIT.fullmatch(revision) else ""
    return Place(HubStore(f"{owner}/{name}", revision, commit), inner.strip("/") or ".")

"""The repositories of the Hub's stand-in: commits, branches, tags and pull requests, each commit a whole set of files.

There is no git here, but names are git's: a file has the hash of its blob, or of the pointer that stands for it.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
DATE = "2026-01-01T00:00:00.000Z"
_NUMBERS = itertools.count()


class RefusedError(Exception):
    """What the Hub does not do: a status, and the code and the message that go into the headers."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code


def git_hash(data: bytes, kind: str = "blob") -> str:
    """Hash as git does."""
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data).hexdigest()


@dataclass(frozen=True)
class File:
    """A file of a commit: with its bytes, or stored apart under its sha256, and then perhaps in Xet too."""

    size: int
    data: bytes | None = None
    sha256: str | None = None
    xet_hash: str | None = None

    @property
    def oid(self) -> str:
        text = POINTER.format(sha256=self.sha256, size=self.size).encode()
        return git_hash(text if self.data is None else self.data)

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid

    def described(self, path: str) -> dict[str, Any]:
        """Describe this as a listing does."""
        entry: dict[str, Any] = {"type": "file", "path": path, "size": self.size, "oid": self.oid}
        if self.sha256:
            pointer = len(POINTER.format(sha256=self.sha256, size=self.size))
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": pointer}
        if self.xet_hash:
            entry["xetHash"] = self.xet_hash
        return entry


def whole(data: bytes) -> File:
    """Give a file whose bytes are in the repository."""
    return File(len(data), data=data)


@dataclass(frozen=True)
class Commit:
    """A commit; ``parent`` is that of the one before."""

    oid: str
    parent: str | None
    title: str
    files: Mapping[str, File]


def _commit(files: Mapping[str, File], parent: str | None, title: str) -> Commit:
    text = f"{parent}\n{title}\n{next(_NUMBERS)}\n" + "\n".join(f"{path} {files[path].oid}" for path in sorted(files))
    return Commit(git_hash(text.encode(), "commit"), parent, title, dict(files))


@dataclass
class Repo:
    """A repository; ``refs`` are full names, such as ``refs/heads/main``, with the commit that each points to."""

    name: str
    is_private: bool = False
    is_gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.advance(
            "refs/heads/main", {".gitattributes": whole(b"*.safetensors filter=lfs -text\n")}, None, "initial commit"
        )

    def ref(self, revision: str) -> str | None:
        """Give the full name of a branch, a tag or a pull request; None is a commit, or nothing."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def at(self, revision: str) -> Commit:
        """Give the commit that a revision means."""
        ref = self.ref(revision)
        commit = self.commits.get(self.refs[ref] if ref else revision)
        if commit is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def advance(self, ref: str, files: Mapping[str, File], parent: str | None, title: str) -> Commit:
        """Let a reference point to a new commit."""
        commit = _commit(files, parent, title)
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit

    def new_pull_request(self) -> int:
        """Give the number of the next pull request."""
        return 1 + sum(name.startswith("refs/pr/") for name in self.refs)

    def history(self, revision: str) -> Iterable[Commit]:
        """Give commits, the newest first."""
        commit: Commit | None = self.at(revision)
        while commit:
            yield commit
            commit = self.commits.get(commit.parent or "")

    def file(self, revision: str, path: str) -> tuple[Commit, File]:
        """Give a file, and the commit that it was found in."""
        commit = self.at(revision)
        if path not in commit.files:
            raise RefusedError(404, f"Entry not found: {path}", "EntryNotFound")
        return commit, commit.files[path]

    def listing(self, revision: str, folder: str, is_recursive: bool) -> list[dict[str, Any]]:
        """Describe the files and the folders below a folder."""
        begin = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, file in self.at(revision).files.items():
            if not path.startswith(begin):
                continue
            parts = path[len(begin) :].split("/")
            for depth in range(1, len(parts)):
                name = begin + "/".join(parts[:depth])
                entries[name] = {"type": "directory", "path": name, "size": 0, "oid": git_hash(name.encode(), "tree")}
            entries[path] = file.described(path)
        if folder and not entries:
            raise RefusedError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        depth = begin.count("/")
        return [entries[name] for name in sorted(entries) if is_recursive or name.count("/") == depth]

    def described(self, revision: str, with_blobs: bool) -> dict[str, Any]:
        """Describe this as it is at a revision."""
        commit = self.at(revision)
        siblings = []
        for path, file in sorted(commit.files.items()):
            sibling: dict[str, Any] = {"rfilename": path}
            if with_blobs:
                entry = file.described(path)
                sibling |= {"size": file.size, "blobId": file.oid}
                if "lfs" in entry:
                    sibling["lfs"] = {
                        "sha256": file.sha256,
                        "size": file.size,
                        "pointerSize": entry["lfs"]["pointerSize"],
                    }
            siblings.append(sibling)
        return {
            "_id": git_hash(self.name.encode())[:24],
            "id": self.name,
            "modelId": self.name,
            "author": self.name.split("/")[0],
            "sha": commit.oid,
            "private": self.is_private,
            "gated": "manual" if self.is_gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "createdAt": DATE,
            "lastModified": DATE,
            "usedStorage": sum(file.size for file in commit.files.values()),
            "siblings": siblings,
        }

    def described_refs(self) -> dict[str, list[dict[str, str]]]:
        """Name the branches, tags and pull requests, and what each points to."""
        kinds = {
            "branches": "refs/heads/",
            "tags": "refs/tags/",
            "pullRequests": "refs/pr/",
            "converts": "refs/convert/",
        }
        return {
            kind: [
                {"name": name.removeprefix(begin) if kind != "pullRequests" else name, "ref": name, "targetCommit": oid}
                for name, oid in sorted(self.refs.items())
                if name.startswith(begin)
            ]
            for kind, begin in kinds.items()
        }

"""A stand-in of the Hub, in threads of this process, for the real huggingface_hub and the real hf_xet.

It answers at two ports: the API and small files at one, what is large at the other, as the Hub has another host for
that, whose addresses are signed and end some time. What the Hub refuses it refuses with the same status and headers.
``Hub`` is what a test has of it: ``add``, ``files`` and ``download`` go past the wires.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlencode

from remote.hub_cas import LIVES, Store
from remote.hub_http import PIECE, Reply, Request, Server, said
from remote.hub_repos import DATE, Commit, File, RefusedError, Repo, whole
from remote.wire import Asked, Wire

USER = "me"
WRITES, READS = "hf_writes", "hf_reads"  # the tokens, by what they allow
LARGE = 10_000_000  # bytes from which a file is not kept in the repository, whatever its name
LARGE_NAMES = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".ckpt", ".onnx", ".msgpack", ".h5")
LFS_PART = 5 << 20  # bytes of a part of a multipart upload
NEEDS_WRITE = "Forbidden: you must use a write token to upload to a repository."
CONFLICT = "A commit has happened since. Please refresh and try again."


def _revision(parts: list[str]) -> tuple[str, str]:
    """Tell the revision from the path behind it; a pull request's has slashes, which need not be quoted."""
    count = 3 if parts[:1] == ["refs"] else 1
    return "/".join(parts[:count]) or "main", "/".join(parts[count:])


class Hub:
    """The Hub; it is reached at ``wire``, and what is large at ``data``, which is another host.

    ``page`` is how many entries a listing gives at once, ``data_lives`` how many seconds an address of data holds.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(folder / "store")
        self.repos: dict[str, Repo] = {}
        self.owners = {USER, "org"}
        self.tokens = {WRITES: "write", READS: "read"}
        self.page = 1000
        self.data_lives: float = LIVES
        self._secret = secrets.token_bytes(32)
        self._lock = threading.RLock()
        self._servers = [Server(self._answer_api), Server(self._answer_data)]
        self.wire = Wire(self._servers[0].port).up()
        self.data = Wire(self._servers[1].port, "localhost").up()

    def close(self) -> None:
        for wire in (self.wire, self.data):
            wire.down()
        for server in self._servers:
            server.end()
        for errors in (self.wire.errors, self.data.errors, *(server.errors for server in self._servers)):
            for error in errors:
                raise error

    @property
    def endpoint(self) -> str:
        return self.wire.url

    @property
    def token(self) -> str:
        return WRITES

    @property
    def env(self) -> dict[str, str]:
        home = self.folder / "home"
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            "HF_XET_CACHE": str(home / "xet"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def leaks(self) -> list[Asked]:
        """Give the requests that took a token to the other host."""
        secrets = ("'authorization'", *self.tokens)
        return [asked for asked in self.data.asked if any(one in f"{asked.target} {asked.headers}" for one in secrets)]

    def create(self, name: str, is_private: bool = False, is_gated: bool = False) -> Repo:
        """Make a repository, if there is none; it is one's own if its namespace is among ``owners``."""
        return self.repos.setdefault(name, Repo(name, is_private, is_gated))

    def add(self, name: str, folder: Path, revision: str = "main", in_xet: bool = False, title: str = "add") -> str:
        """Commit the files of a folder to a branch, what is large as Git LFS or in Xet; give the commit."""
        repo = self.create(name)
        files = dict(repo.at(revision if repo.ref(revision) else "main").files)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            at, size = path.relative_to(folder).as_posix(), path.stat().st_size
            if self._is_large(at, size):
                sha256 = self.store.keep(path)
                files[at] = File(size, sha256=sha256, xet_hash=self.store.take_to_xet(sha256) if in_xet else None)
            else:
                files[at] = whole(path.read_bytes())
        return self.commit(name, files, revision, title)

    def commit(self, name: str, files: Mapping[str, File], revision: str = "main", title: str = "change") -> str:
        """Make a commit that is exactly these files, as though somebody else did; give its hash."""
        repo = self.create(name)
        ref = repo.ref(revision) or f"refs/heads/{revision}"
        with self._lock:
            return repo.advance(ref, files, repo.refs.get(ref), title).oid

    def tag(self, name: str, tag: str, revision: str = "main") -> None:
        repo = self.repos[name]
        repo.refs[f"refs/tags/{tag}"] = repo.at(revision).oid

    def head(self, name: str, revision: str = "main") -> str:
        return self.repos[name].at(revision).oid

    def commits(self, name: str, revision: str = "main") -> list[Commit]:
        """Give the commits that lead to a revision, the newest first."""
        return list(self.repos[name].history(revision))

    def files(self, name: str, revision: str = "main") -> dict[str, File]:
        return dict(self.repos[name].at(revision).files)

    def download(self, name: str, path: str, revision: str = "main") -> bytes:
        return self._content(self.repos[name].file(revision, path)[1])

    def get_folder(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Give all files of a commit."""
        return {path: self._content(file) for path, file in self.files(name, revision).items()}

    def _content(self, file: File) -> bytes:
        return self.store.open(file.sha256).read_bytes() if file.sha256 else file.data or b""

    @staticmethod
    def _is_large(path: str, size: int) -> bool:
        return size > 0 and (size > LARGE or path.endswith(LARGE_NAMES))

    # Who asks, and whether that may be.

    def _level(self, request: Request) -> str | None:
        """Say what the one who asks may do: write, read, or None of anybody."""
        header = request.headers.get("authorization")
        if header is None:
            return None
        level = self.tokens.get(header.removeprefix("Bearer "))
        if level is None:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return level

    def _repo(self, request: Request, name: str, does_write: bool = False) -> Repo:
        level = self._level(request)
        repo = self.repos.get(name)
        if repo is None or (repo.is_private and (level is None or not self._is_own(name))):
            if level is None:
                raise RefusedError(401, "Invalid username or password.", "RepoNotFound")
            raise RefusedError(404, "Repository not found", "RepoNotFound")
        if does_write:
            self._check_write(level, name, request.is_set("create_pr"))
        return repo

    def _is_own(self, name: str) -> bool:
        return name.split("/")[0] in self.owners

    def _check_write(self, level: str | None, name: str, is_pull_request: bool) -> None:
        if level is None:
            raise RefusedError(401, "Invalid username or password.")
        if level != "write":
            raise RefusedError(403, NEEDS_WRITE)
        if not self._is_own(name) and not is_pull_request:
            raise RefusedError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")

    # The API.

    def _answer_api(self, request: Request) -> Reply:
        match request.parts:
            case ["api", *rest]:
                return self._answer_below_api(request, rest)
            case [owner, name, "resolve", *rest]:
                return self._resolve(request, f"{owner}/{name}", *_revision(rest))
            case [owner, name, "info", "lfs", "objects", "batch"]:
                return self._batch(request, f"{owner}/{name.removesuffix('.git')}")
        raise RefusedError(404, "Repository not found", "RepoNotFound")

    def _answer_below_api(self, request: Request, parts: list[str]) -> Reply:
        match parts:
            case ["whoami-v2"]:
                return self._who(request)
            case ["repos", "create"]:
                return self._create(request)
            case ["validate-yaml"]:
                request.read()
                return said({"errors": [], "warnings": []})
            case ["lfs", "complete", sha256]:
                return self._complete(request, sha256)
            case ["models", owner, name, *rest]:
                return self._answer_model(request, f"{owner}/{name}", rest)
            case ["resolve-cache", "models", owner, name, *rest]:
                return self._resolve(request, f"{owner}/{name}", *_revision(rest), is_last=True)
        raise RefusedError(404, "there is nothing here")

    def _who(self, request: Request) -> Reply:
        if not self._level(request):
            raise RefusedError(401, "Invalid username or password.")
        return said({"type": "user", "id": USER, "name": USER, "fullname": USER, "orgs": [], "auth": {}})

    def _create(self, request: Request) -> Reply:
        asked = request.json()
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        self._check_write(self._level(request), name, is_pull_request=False)
        url = f"{self.endpoint}/{name}"
        with self._lock:
            if name in self.repos:
                error = "You already created this model repo"
                return said({"error": error, "url": url}, 409, {"X-Error-Message": error})
            self.create(name, asked.get("visibility") == "private" or bool(asked.get("private")))
        return said({"url": url, "name": name, "id": self.repos[name].described("main", False)["_id"]})

    def _answer_model(self, request: Request, name: str, rest: list[str]) -> Reply:
        what, *rest = rest or ["revision", "main"]
        answer = getattr(self, f"_model_{what.replace('-', '_')}", None)
        if answer is None:
            raise RefusedError(404, f"there is no {what} here")
        writes = what in ("commit", "preupload", "branch", "tag", "xet-write-token")
        repo = self._repo(request, name, does_write=writes)
        reply: Reply = answer(request, repo, *_revision(rest))
        return reply

    def _model_revision(self, request: Request, repo: Repo, revision: str, path: str) -> Reply:
        known = repo.described(revision, request.is_set("blobs"))
        wanted = request.query.get("expand", [])
        return said({name: known.get(name) for name in ("_id", "id", *wanted)} if wanted else known)

    def _model_auth_check(self, request: Request, repo: Repo, revision: str, path: str) -> Reply:
        self._check_gate(request, repo)
        return said({})

    def _model_refs(self, request: Request, repo: Repo, revision: str, path: str) -> Reply:
        return said(repo.described_refs())

    def _model_commits(self, request: Request, repo: Repo, revision: str, path: str) -> Reply:
        dated = {"date": DATE, "authors": [{"user": USER}], "message": ""}
        return said([{"id": one.oid, "title": one.title, **dated} for one in repo.history(revision)])

    def _model_tree(self, request: Request, repo: Repo, revision: str, path: str) -> Reply:
        entries = repo.listing(revision, path, request.is_set("recursive"))
        begin = int(request.one("cursor", "0"))
        end = begin + int(request.one("limit") or self.page)
        reply = said(entries[begin:end])
        if end < len(entries):
            query = {name: values[0] for name, values in request.query.items()} | {"cursor": str(end)}
            url = "/".join(quote(part, safe="") for part in request.parts)
            reply.headers["Link"] = f'<{self.endpoint}/{url}?{urlencode(query)}>; rel="next"'
        return reply

    def _model_paths_info(self, request: Request, repo: Repo, revision: str, path: str) -> Reply:
        body = request.read()
        is_json = "json" in request.headers.get("content-type", "")
        paths = json.loads(body)["paths"] if is_json else parse_qs(body.decode()).get("paths", [])
        entries = {entry["path"]: entry for entry in repo.listing(revision, "", is_recursive=True)}
        return said([entries[path] for path in paths if path in entries])

    def _model_branch(self, request: Request, repo: Repo, revision: str, path: str) -> Reply:
        return self._point(request, repo, f"refs/heads/{revision}", request.json().get("startingPoint", "main"))

    def _model_tag(self, request: Request, repo: Repo, revision: str, path: str) -> Reply:
        if request.method == "DELETE":
            return self._point(request, repo, f"refs/tags/{revision}", "main")
        return self._point(request, repo, f"refs/tags/{request.json()['tag']}", revision)

    def _point(self, request: Request, repo: Repo, ref: str, revision: str) -> Reply:
        """Make a branch or a tag, or remove it."""
        if request.method == "DELETE":
            del repo.refs[ref]
            return said({})
        if ref in repo.refs:
            raise RefusedError(409, f"{ref} already exists")
        repo.refs[ref] = repo.at(revision).oid
        return said({}, 201)

    def _model_xet_read_token(self, request: Request, repo: Repo, revision: str, path: str) -> Reply:
        self._check_gate(request, repo)
        contents = [file.sha256 for file in repo.at(revision).files.values() if file.xet_hash and file.sha256]
        return self._xet_token(self.store.ready_for_reading(contents))

    def _model_xet_write_token(self, request: Request, repo: Repo, revision: str, path: str) -> Reply:
        if not request.is_set("create_pr"):
            repo.at(revision)
        return self._xet_token(self.store.lend())

    def _xet_token(self, url: str) -> Reply:
        ends, token = int(time.time()) + LIVES, secrets.token_hex(8)
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(ends)}
        return said({"casUrl": url, "accessToken": token, "exp": ends}, headers=headers)

    # Reading a file.

    def _check_gate(self, request: Request, repo: Repo) -> None:
        if repo.is_gated and not self._is_own(repo.name):
            message = f"Access to model {repo.name} is restricted and you are not in the authorized list."
            raise RefusedError(403 if self._level(request) else 401, message, "GatedRepo")

    def _resolve(self, request: Request, name: str, revision: str, path: str, is_last: bool = False) -> Reply:
        repo = self._repo(request, name)
        self._check_gate(request, repo)
        commit, file = repo.file(revision, path)
        headers = {"X-Repo-Commit": commit.oid, "X-Linked-Size": str(file.size), "X-Linked-ETag": f'"{file.etag}"'}
        headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if is_last:
            return Reply(200, {**headers, "Content-Type": "application/octet-stream"}, file.data or b"")
        if not file.sha256:
            where = f"/api/resolve-cache/models/{name}/{commit.oid}/{quote(path)}?etag={quote(file.etag)}"
            return Reply(307, {**headers, "Location": where})
        if file.xet_hash:
            route = f"{self.endpoint}/api/models/{name}/xet-read-token/{commit.oid}"
            headers |= {"X-Xet-Hash": file.xet_hash, "Link": f'<{route}>; rel="xet-auth"'}
        return Reply(302, {**headers, "Location": self._signed("GET", file.sha256)})

    # What is large, at the other host.

    def _signed(self, method: str, sha256: str, **query: object) -> str:
        """Give an address that is good for one thing and for a time."""
        named = {name: str(value) for name, value in query.items()}
        named["Expires"] = f"{time.time() + self.data_lives:.3f}"
        named["Signature"] = self._sign(method, sha256, named)
        return f"{self.data.url}/content/{sha256}?{urlencode(named)}"

    def _sign(self, method: str, sha256: str, query: Mapping[str, str]) -> str:
        text = json.dumps([method, sha256, sorted(query.items())])
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()

    def _answer_data(self, request: Request) -> Reply:
        sha256 = request.parts[-1]
        query = {name: values[0] for name, values in request.query.items()}
        signature = query.pop("Signature", "")
        method = "GET" if request.method == "HEAD" else request.method
        if "authorization" in request.headers:
            return Reply(400, {}, b"<Error><Code>InvalidArgument</Code>Only one auth mechanism allowed</Error>")
        if signature != self._sign(method, sha256, query) or float(query["Expires"]) < time.time():
            return Reply(403, {"Content-Type": "application/xml"}, b"<Error><Code>AccessDenied</Code></Error>")
        if method == "GET" and not self.store.open(sha256).exists():
            return Reply(404, {"Content-Type": "application/xml"}, b"<Error><Code>NoSuchKey</Code></Error>")
        if method == "GET":
            headers = {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
            return Reply(200, headers, path=self.store.open(sha256))
        return self._put(request, sha256, int(query.get("part", 1)), "part" not in query)

    def _put(self, request: Request, sha256: str, number: int, is_all: bool) -> Reply:
        digest = hashlib.md5()
        with (self.store.parts / f"{sha256}.{number}").open("wb") as out:
            left = request.length
            while left and (data := request.body.read(min(left, PIECE))):
                left -= len(data)
                digest.update(data)
                out.write(data)
        if left or (is_all and not self.store.join(sha256, [1])):
            return Reply(400, {}, b"<Error><Code>BadDigest</Code></Error>")
        return Reply(200, {"ETag": f'"{digest.hexdigest()}"'})

    # Writing.

    def _model_preupload(self, request: Request, repo: Repo, revision: str, path: str) -> Reply:
        known = repo.at(revision).files
        modes = []
        for file in request.json()["files"]:
            mode = "lfs" if self._is_large(file["path"], file["size"]) else "regular"
            oid = known[file["path"]].etag if file["path"] in known else None
            modes.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return said({"files": modes})

    def _batch(self, request: Request, name: str) -> Reply:
        # Who may only make a pull request uploads as well, and this request does not say what for.
        self._repo(request, name)
        if self._level(request) != "write":
            raise RefusedError(403, NEEDS_WRITE)
        objects = []
        for one in request.json()["objects"]:
            sha256, count = one["oid"], -(-one["size"] // LFS_PART)
            if self.store.has(sha256):
                objects.append(one)
                continue
            if count > 1:
                parts = {str(part): self._signed("PUT", sha256, part=part) for part in range(1, count + 1)}
                query = {"Signature": self._sign("POST", sha256, {})}
                href = f"{self.endpoint}/api/lfs/complete/{sha256}?{urlencode(query)}"
                upload = {"href": href, "header": {"chunk_size": str(LFS_PART), **parts}}
            else:
                upload = {"href": self._signed("PUT", sha256)}
            objects.append({**one, "actions": {"upload": upload}})
        reply = said({"transfer": "multipart", "objects": objects})
        reply.headers["Content-Type"] = "application/vnd.git-lfs+json"
        return reply

    def _complete(self, request: Request, sha256: str) -> Reply:
        if request.one("Signature") != self._sign("POST", sha256, {}):
            raise RefusedError(403, "Invalid signature")
        if not self.store.join(sha256, [part["partNumber"] for part in request.json()["parts"]]):
            raise RefusedError(400, "The content does not have the hash that it was announced with")
        return said({})

    def _model_commit(self, request: Request, repo: Repo, revision: str, path: str) -> Reply:
        lines = [json.loads(line) for line in request.read().splitlines() if line.strip()]
        header = lines[0]["value"]
        with self._lock:
            ref, parent, number = repo.ref(revision), header.get("parentCommit"), 0
            if request.is_set("create_pr"):
                number = repo.new_pull_request()
                base, ref = repo.at(parent or revision), f"refs/pr/{number}"
            else:
                base = repo.at(revision)
                if ref is None or ref.startswith("refs/tags/"):
                    raise RefusedError(400, f"{revision} is not a branch")
                if parent and parent != base.oid:
                    raise RefusedError(412, CONFLICT)
            files = dict(base.files)
            for line in lines[1:]:
                self._change(files, line["key"], line["value"])
            commit = repo.advance(ref, files, base.oid, header["summary"])
        url = f"{self.endpoint}/{repo.name}"
        made = {"success": True, "commitOid": commit.oid, "commitUrl": f"{url}/commit/{commit.oid}", "hookOutput": ""}
        return said({**made, "pullRequestUrl": f"{url}/discussions/{number}"} if number else made)

    def _change(self, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
        """Do one line of a commit."""
        path = value["path"]
        if key == "file":
            files[path] = whole(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            files[path] = self._known(value["oid"], value.get("size"))
        elif key in ("deletedFile", "deletedFolder"):
            gone = [name for name in files if name == path or name.startswith(f"{path.rstrip('/')}/")]
            if not gone:
                raise RefusedError(404, f"{path} does not exist", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise RefusedError(400, f"there is no {key} in a commit")

    def _known(self, sha256: str, size: int | None) -> File:
        """Find a content that was uploaded."""
        if found := self.store.uploaded(sha256):
            file = File(found.size, sha256=sha256, xet_hash=found.xet_hash)
        elif self.store.has(sha256):
            file = File((self.store.whole / sha256).stat().st_size, sha256=sha256)
        else:
            raise RefusedError(400, f"an LFS pointer pointed to a file that does not exist: {sha256}")
        if size not in (None, file.size):
            raise RefusedError(400, f"{sha256} has {file.size} bytes, not {size}")
        return file

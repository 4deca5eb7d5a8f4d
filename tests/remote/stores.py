"""What a test has of a store: an address, the variables that lead there, the wire on the way, and a look inside.

The look inside goes past the wire, so that neither the log nor the faults of a test meet it, and it signs by itself:
what wconv did is told by another client than wconv's.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import itertools
import xml.etree.ElementTree as ET
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import urllib3

from remote.servers import AZURE_ACCOUNT, AZURE_KEY, S3_REGION, S3_SECRET, S3_USER
from remote.wire import Wire

NOTHING: Mapping[str, str] = {}
_NUMBERS = itertools.count(1)
_Store = TypeVar("_Store", bound="Store")


def new_name() -> str:
    """Give a name that no other bucket or folder has."""
    return f"bucket-{next(_NUMBERS)}"


def _sign(key: bytes, text: str) -> bytes:
    return hmac.new(key, text.encode(), hashlib.sha256).digest()


def _texts(xml: bytes, *names: str) -> Iterator[str]:
    """Give the text of each element that is found by going down these names, whatever their namespaces."""
    yield from (
        one.text or "" for one in ET.fromstring(xml).iterfind(".//" + "/".join(f"{{*}}{name}" for name in names))
    )


@dataclass
class Store(ABC):
    """A bucket of its own; ``env`` is what wconv needs to be told to reach it, by way of ``wire``."""

    port: int
    wire: Wire
    bucket: str = field(default_factory=new_name)

    scheme = ""

    def __post_init__(self) -> None:
        self.pool = urllib3.PoolManager(retries=False)

    def close(self) -> None:
        self.pool.clear()

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.bucket}"

    @property
    @abstractmethod
    def env(self) -> dict[str, str]: ...

    @abstractmethod
    def create(self) -> None: ...

    @abstractmethod
    def ask(
        self, method: str, name: str = "", body: bytes = b"", query: Mapping[str, str] = NOTHING
    ) -> urllib3.BaseHTTPResponse:
        """Make a signed request about an object, or about the bucket."""

    @abstractmethod
    def names(self, prefix: str = "") -> list[str]: ...

    @abstractmethod
    def open_uploads(self) -> list[str]:
        """Name the objects that somebody began to upload and neither completed nor aborted."""

    def another(self: _Store) -> _Store:
        """Give a store in another bucket of the same server, by way of the same wire."""
        store = type(self)(self.port, self.wire)
        store.create()
        return store

    def get(self, name: str) -> bytes:
        return self.ask("GET", name).data

    def put(self, name: str, data: bytes) -> None:
        self.ask("PUT", name, data)

    def delete(self, name: str) -> None:
        self.ask("DELETE", name)

    def etag(self, name: str) -> str:
        return self.ask("HEAD", name).headers["ETag"]

    def put_folder(self, folder: Path, prefix: str = "") -> None:
        """Put all files of a folder below a prefix, which ends with a slash or is empty."""
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.put(prefix + path.relative_to(folder).as_posix(), path.read_bytes())

    def get_folder(self, prefix: str = "") -> dict[str, bytes]:
        """Give what is below a prefix, by its name without that."""
        return {name[len(prefix) :]: self.get(name) for name in self.names(prefix)}

    def _request(
        self, method: str, path: str, body: bytes, query: Mapping[str, str], headers: Mapping[str, str]
    ) -> urllib3.BaseHTTPResponse:
        target = f"http://127.0.0.1:{self.port}{path}?{_canonical(query)}"
        answer = self.pool.request(method, target, body=body or None, headers=dict(headers))
        assert answer.status < 300, f"{method} {target}: {answer.status} {answer.data.decode(errors='replace')}"
        return answer


def _canonical(query: Mapping[str, str]) -> str:
    return "&".join(f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in sorted(query.items()))


class S3(Store):
    """A bucket of Swift."""

    scheme = "s3"

    @property
    def env(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.wire.url,
            "AWS_ACCESS_KEY_ID": S3_USER,
            "AWS_SECRET_ACCESS_KEY": S3_SECRET,
            "AWS_REGION": S3_REGION,
        }

    def create(self) -> None:
        self.ask("PUT")

    def ask(
        self, method: str, name: str = "", body: bytes = b"", query: Mapping[str, str] = NOTHING
    ) -> urllib3.BaseHTTPResponse:
        path = quote(f"/{self.bucket}/{name}" if name else f"/{self.bucket}")
        now = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        digest = hashlib.sha256(body).hexdigest()
        headers = {"host": f"127.0.0.1:{self.port}", "x-amz-content-sha256": digest, "x-amz-date": now}
        names = ";".join(headers)
        lines = "".join(f"{key}:{value}\n" for key, value in headers.items())
        request = "\n".join([method, path, _canonical(query), lines, names, digest])
        scope = f"{now[:8]}/{S3_REGION}/s3/aws4_request"
        text = "\n".join(["AWS4-HMAC-SHA256", now, scope, hashlib.sha256(request.encode()).hexdigest()])
        key = f"AWS4{S3_SECRET}".encode()
        for part in scope.split("/"):
            key = _sign(key, part)
        signature = f"SignedHeaders={names}, Signature={_sign(key, text).hex()}"
        headers["Authorization"] = f"AWS4-HMAC-SHA256 Credential={S3_USER}/{scope}, {signature}"
        return self._request(method, path, body, query, headers)

    def names(self, prefix: str = "") -> list[str]:
        names: list[str] = []
        while True:
            after = {"start-after": names[-1]} if names else {}
            answer = self.ask("GET", query={"list-type": "2", "prefix": prefix, **after})
            found = list(_texts(answer.data, "Contents", "Key"))
            if not found:
                return names
            names += found

    def open_uploads(self) -> list[str]:
        return list(_texts(self.ask("GET", query={"uploads": ""}).data, "Upload", "Key"))


class Azure(Store):
    """A container of Azurite."""

    scheme = "az"

    @property
    def env(self) -> dict[str, str]:
        return {
            "AZURE_STORAGE_ACCOUNT_NAME": AZURE_ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY,
            "AZURE_STORAGE_ENDPOINT": f"{self.wire.url}/{AZURE_ACCOUNT}",
        }

    def create(self) -> None:
        self.ask("PUT", query={"restype": "container"})

    def ask(
        self, method: str, name: str = "", body: bytes = b"", query: Mapping[str, str] = NOTHING
    ) -> urllib3.BaseHTTPResponse:
        path = quote(f"/{AZURE_ACCOUNT}/{self.bucket}/{name}" if name else f"/{AZURE_ACCOUNT}/{self.bucket}")
        now = datetime.now(timezone.utc).strftime("%a, %d %b %Y %H:%M:%S GMT")
        headers = {"x-ms-date": now, "x-ms-version": "2023-11-03"}
        if name and method == "PUT":
            headers["x-ms-blob-type"] = "BlockBlob"
        lines = "".join(f"{key}:{value}\n" for key, value in sorted(headers.items()))
        resource = f"/{AZURE_ACCOUNT}{path}" + "".join(f"\n{key}:{value}" for key, value in sorted(query.items()))
        # The headers that have a line of their own; but for the length and the type none is sent.
        kind = "application/octet-stream" if method == "PUT" else ""
        plain = ["", "", str(len(body) or ""), "", kind, *[""] * 6]
        text = "\n".join([method, *plain, lines + resource])
        signature = base64.b64encode(_sign(base64.b64decode(AZURE_KEY), text)).decode()
        headers["Authorization"] = f"SharedKey {AZURE_ACCOUNT}:{signature}"
        if kind:
            headers["Content-Type"] = kind
        return self._request(method, path, body, query, headers)

    def names(self, prefix: str = "") -> list[str]:
        return self._list({"prefix": prefix})

    def open_uploads(self) -> list[str]:
        return sorted(set(self._list({"include": "uncommittedblobs"})) - set(self.names()))

    def _list(self, query: Mapping[str, str]) -> list[str]:
        names: list[str] = []
        marker = ""
        while True:
            answer = self.ask("GET", query={"restype": "container", "comp": "list", "marker": marker, **query}).data
            names += _texts(answer, "Blob", "Name")
            marker = next(_texts(answer, "NextMarker"), "")
            if not marker:
                return names


@dataclass
class Web:
    """A folder that is served: what a test puts into it, is at ``url``."""

    folder: Path
    url: str
    wire: Wire

"""Do the stores behave as those that they stand for, towards the real clients and by way of the wire?"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
import pytest
import urllib3
from obstore.exceptions import AlreadyExistsError, GenericError, PermissionDeniedError, PreconditionError
from obstore.store import AzureStore, HTTPStore, S3Store
from support.clusters import wait_until

from remote import servers, stores
from remote.wire import Answer, Asked, Drop

PART = 5 << 20
DATA = os.urandom(2 * PART + 100)
CLIENT: Any = {"allow_http": True}
HURRIED: Any = {"max_retries": 0, "retry_timeout": timedelta(seconds=10)}
PATIENT: Any = {"max_retries": 3, "retry_timeout": timedelta(seconds=20)}
SECRETS = {"s3": "AWS_SECRET_ACCESS_KEY", "az": "AZURE_STORAGE_ACCOUNT_KEY"}


@pytest.fixture(params=["s3", "az"])
def bucket(request: pytest.FixtureRequest) -> stores.Store:
    store: stores.Store = request.getfixturevalue(request.param)
    return store


def opened(store: stores.Store, retry: Any = HURRIED) -> S3Store | AzureStore:
    """Open a store as its variables say."""
    kind = S3Store if isinstance(store, stores.S3) else AzureStore
    return kind(store.bucket, client_options=CLIENT, retry_config=retry)


def is_part(asked: Asked) -> bool:
    return asked.method == "PUT" and ("partNumber" in asked.query or asked.query.get("comp") == "block")


def test_it_holds_what_its_client_writes(bucket: stores.Store) -> None:
    client = opened(bucket)
    obstore.put(client, "a b/ü.bin", DATA[:1000])
    with obstore.open_writer(client, "big", buffer_size=PART) as writer:
        writer.write(DATA)
    assert bucket.names() == ["a b/ü.bin", "big"]
    assert bucket.get_folder("a b/") == {"ü.bin": DATA[:1000]}
    assert bucket.get("big") == DATA
    assert bucket.open_uploads() == []
    parts = [asked for asked in bucket.wire.asked if is_part(asked)]
    assert sorted(part.received for part in parts) == [100, PART, PART]
    assert {part.status for part in parts} <= {200, 201}


def test_its_client_reads_what_it_holds(bucket: stores.Store, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.bin").write_bytes(DATA)
    bucket.put_folder(tmp_path, "a/")
    client = opened(bucket)
    assert [one["path"] for page in obstore.list(client) for one in page] == ["a/b/c.bin"]
    bucket.wire.clear()
    assert bytes(obstore.get_range(client, "a/b/c.bin", start=1000, end=3000)) == DATA[1000:3000]
    (asked,) = bucket.wire.asked
    assert (asked.range, asked.status, asked.sent) == ((1000, 3000), 206, 2000)
    assert obstore.head(client, "a/b/c.bin")["e_tag"] == bucket.etag("a/b/c.bin")
    bucket.delete("a/b/c.bin")
    with pytest.raises(FileNotFoundError):
        obstore.head(client, "a/b/c.bin")


def test_buckets_are_apart(bucket: stores.Store) -> None:
    bucket.put("x", b"1")
    other = bucket.another()
    other.put("x", b"2")
    assert (bucket.get("x"), other.get("x")) == (b"1", b"2")
    assert bytes(obstore.get(opened(other), "x").bytes()) == b"2"
    assert other.wire is bucket.wire


def test_a_wrong_secret_is_refused(bucket: stores.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    variable = SECRETS[bucket.scheme]
    monkeypatch.setenv(variable, "A" + bucket.env[variable][1:])
    with pytest.raises(PermissionDeniedError):
        obstore.put(opened(bucket), "x", b"1")
    assert bucket.wire.asked[-1].status == 403
    assert bucket.names() == []


def test_conditions_are_heard(bucket: stores.Store) -> None:
    client = opened(bucket)
    tag = obstore.put(client, "x", b"1", mode="create")["e_tag"]
    with pytest.raises(AlreadyExistsError):
        obstore.put(client, "x", b"2", mode="create")
    assert obstore.get(client, "x", options={"if_match": tag}).bytes() == b"1"
    bucket.put("x", b"3")
    with pytest.raises(PreconditionError):
        obstore.get(client, "x", options={"if_match": tag})
    assert bucket.get("x") == b"3"


def test_an_open_upload_is_seen(s3: stores.S3) -> None:
    def write() -> None:
        with obstore.open_writer(opened(s3), "x", buffer_size=PART, max_concurrency=1) as writer:
            writer.write(DATA)
            assert s3.open_uploads() == ["x"]
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        write()
    assert s3.open_uploads() == []
    assert s3.names() == []


def test_blocks_that_were_not_committed_are_seen(az: stores.Azure) -> None:
    def write() -> None:
        with obstore.open_writer(opened(az), "x", buffer_size=PART, max_concurrency=1) as writer:
            writer.write(DATA)
            wait_until(lambda: 201 in [asked.status for asked in az.wire.asked], "a block")
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        write()
    # There is no way to abort; Azure forgets them after a week.
    assert az.open_uploads() == ["x"]
    assert az.names() == []
    with obstore.open_writer(opened(az), "x", buffer_size=PART) as writer:
        writer.write(DATA)
    assert az.open_uploads() == []


def test_a_client_meets_faults(bucket: stores.Store) -> None:
    bucket.put("x", DATA)
    cut = bucket.wire.fault(Drop(PART, reset=False), lambda asked: asked.method == "GET")
    assert bytes(obstore.get(opened(bucket, PATIENT), "x").bytes()) == DATA
    assert cut.met[0].sent == PART
    assert bucket.wire.asked[-1].range == (PART, len(DATA))
    bucket.wire.fault(Answer(503), is_part, times=1, after=1)
    with obstore.open_writer(opened(bucket, PATIENT), "y", buffer_size=PART) as writer:
        writer.write(DATA)
    assert bucket.get("y") == DATA
    assert sum(map(is_part, bucket.wire.asked)) == 4
    bucket.wire.down()
    with pytest.raises(GenericError):
        obstore.get(opened(bucket), "x")


def test_a_folder_is_served_in_ranges(web: stores.Web) -> None:
    (web.folder / "a b").mkdir()
    (web.folder / "a b" / "x.bin").write_bytes(DATA)
    client = HTTPStore(web.url, client_options=CLIENT)
    assert bytes(obstore.get_range(client, "a b/x.bin", start=1000, end=3000)) == DATA[1000:3000]
    (asked,) = web.wire.asked
    assert (asked.range, asked.status, asked.sent) == ((1000, 3000), 206, 2000)
    with urllib3.PoolManager(retries=False) as pool:
        url = f"{web.url}/a%20b/x.bin"
        head = pool.request("HEAD", url)
        assert (head.status, head.headers["Content-Length"]) == (200, str(len(DATA)))
        assert pool.request("GET", url, headers={"Range": f"bytes={len(DATA)}-"}).status == 416
        (web.folder / "a b" / "x.bin").write_bytes(DATA[1:])
        assert pool.request("GET", url, headers={"If-Match": head.headers["ETag"]}).status == 412
        assert pool.request("GET", f"{web.url}/other").status == 404


def test_a_folder_is_served_late(needs_servers: None, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1")
    log = tmp_path.with_suffix(".log")
    with servers.web(tmp_path, log, latency_ms=200) as port, urllib3.PoolManager(retries=False) as pool:
        url = f"http://127.0.0.1:{port}/x"
        assert pool.request("GET", url).data == b"1"
        with pytest.raises(urllib3.exceptions.ReadTimeoutError):
            pool.request("GET", url, timeout=0.15)

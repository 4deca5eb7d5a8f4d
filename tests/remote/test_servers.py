from __future__ import annotations

from datetime import timedelta
from typing import Any

import obstore
import pytest
from obstore.store import AzureStore, HTTPStore, S3Store

from remote import stores

DATA = bytes(range(256)) * 4096 * 6  # 6 MiB, more than one part
CLIENT: Any = {"allow_http": True}
HURRIED: Any = {"max_retries": 0, "retry_timeout": timedelta(seconds=10)}


def opened(store: stores.Store, retry: Any = HURRIED) -> S3Store | AzureStore:
    """Open a store as its variables say."""
    if isinstance(store, stores.S3):
        return S3Store(store.bucket, client_options=CLIENT, retry_config=retry)
    return AzureStore(store.bucket, client_options=CLIENT, retry_config=retry)


@pytest.fixture(params=["s3", "az"])
def bucket(request: pytest.FixtureRequest) -> stores.Store:
    return request.getfixturevalue(request.param)


def test_a_store_holds_what_its_client_writes(bucket: stores.Store) -> None:
    client = opened(bucket)
    obstore.put(client, "a b/ü.bin", DATA[:1000])
    with obstore.open_writer(client, "big", buffer_size=5 << 20) as writer:
        writer.write(DATA)
        writer.write(DATA)
    assert bucket.names() == ["a b/ü.bin", "big"]
    assert bucket.get_folder("a b/") == {"ü.bin": DATA[:1000]}
    assert bucket.get("big") == 2 * DATA
    assert bucket.open_uploads() == []


def test_a_folder_is_served_in_ranges(web: stores.Web) -> None:
    (web.folder / "x.bin").write_bytes(DATA)
    client = HTTPStore(web.url, client_options=CLIENT)
    assert bytes(obstore.get_range(client, "x.bin", start=1000, end=3000)) == DATA[1000:3000]
    (asked,) = web.wire.asked
    assert asked.method == "GET"
    assert asked.range == (1000, 3000)
    assert (asked.status, asked.sent, asked.received) == (206, 2000, 0)

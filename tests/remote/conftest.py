"""Fixtures for tests of what is elsewhere: servers for the whole run, and for each test a bucket and a wire of its own.

A fixture sets the variables that lead to its server, and takes away all that would lead anywhere else.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from remote import servers, stores
from remote.hub_server import Hub
from remote.wire import Wire

AMBIENT = ("AWS_", "AZURE_", "AZURITE_", "GOOGLE_", "HF_", "HUGGING", "HUGGINGFACE_")
HERE = Path(__file__).parent
LEFT_OPEN = "Exception ignored in. <socket"
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
_Store = TypeVar("_Store", bound=stores.Store)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in this folder."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.remote)
            # What clients keep open for the next request goes when they do, and that may be in any test.
            item.add_marker(pytest.mark.filterwarnings(f"ignore:{LEFT_OPEN}:pytest.PytestUnraisableExceptionWarning"))


@pytest.fixture(scope="session")
def needs_servers() -> None:
    """Skip what needs servers that are not installed."""
    if not servers.is_ready():
        pytest.skip("the servers are not installed: make test-remote")


@pytest.fixture(scope="session")
def swift_port(needs_servers: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Give the port of the run's Swift."""
    with servers.swift(tmp_path_factory.mktemp("swift")) as port:
        yield port


@pytest.fixture(scope="session")
def azurite_port(needs_servers: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Give the port of the run's Azurite."""
    if not servers.has_azurite():
        pytest.skip("Azurite is not installed: have node and npm, remove .venv-servers, and make test-remote again")
    with servers.azurite(tmp_path_factory.mktemp("azurite")) as port:
        yield port


@pytest.fixture(scope="session")
def web_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder that the run's web server serves."""
    return tmp_path_factory.mktemp("web")


@pytest.fixture(scope="session")
def web_port(needs_servers: None, web_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Give the port of the run's web server."""
    with servers.web(web_root, tmp_path_factory.mktemp("web_log") / "log") as port:
        yield port


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away all variables that lead to a store."""
    for name in list(os.environ):
        if name.startswith(AMBIENT) or name.lower() in PROXIES:
            monkeypatch.delenv(name)
    # Where a client asks that has no credentials; nobody listens there.
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")


@pytest.fixture
def s3(swift_port: int, nowhere: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[stores.S3]:
    """Give an empty bucket."""
    with _opened(stores.S3, swift_port, monkeypatch) as store:
        yield store


@pytest.fixture
def az(azurite_port: int, nowhere: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[stores.Azure]:
    """Give an empty container."""
    with _opened(stores.Azure, azurite_port, monkeypatch) as store:
        yield store


@contextlib.contextmanager
def _opened(kind: type[_Store], port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Store]:
    with Wire(port) as wire:
        store = kind(port, wire)
        store.create()
        for name, value in store.env.items():
            monkeypatch.setenv(name, value)
        yield store
        store.close()


@pytest.fixture
def web(web_port: int, web_root: Path, nowhere: None) -> Iterator[stores.Web]:
    """Give an empty folder that is served."""
    with Wire(web_port) as wire:
        name = stores.new_name()
        (web_root / name).mkdir()
        yield stores.Web(web_root / name, f"{wire.url}/{name}", wire)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask what fails in passing again at once."""
    monkeypatch.setattr("converter.storage.web._WAIT_SECONDS", 0.001)


@pytest.fixture
def hub(nowhere: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Give a Hub without repositories; whoever asks in this process may write to those of ``me`` and ``org``."""
    from huggingface_hub import close_session, constants

    hub = Hub(tmp_path / "hub")
    for name, value in {**hub.env, "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"}.items():
        monkeypatch.setenv(name, value)
    # What the library read when it was loaded, which may be long ago.
    home = constants.HF_HOME
    for name, value in list(vars(constants).items()):
        if isinstance(value, str) and value.startswith(home):
            monkeypatch.setattr(constants, name, hub.env["HF_HOME"] + value.removeprefix(home))
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    yield hub
    close_session()
    hub.close()

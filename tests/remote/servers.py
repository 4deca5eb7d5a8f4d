"""Servers on this machine, each for as long as its context lasts: Swift as S3, Azurite as Azure, snailmail for the web.

They run in the environment of servers; nothing of them is loaded here. Whatever happens to a test, and to us, they end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import urllib3
from support.clusters import ROOT, free_port, held

ENVIRONMENT = ROOT / ".venv-servers"
PYTHON = ENVIRONMENT / "bin" / "python"
SNAILMAIL = ENVIRONMENT / "bin" / "snailmail"
AZURITE = ENVIRONMENT / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
SWIFT_NODE = Path(__file__).parent / "swift_node.py"
# Swift's one user, and Azurite's one account, which its documentation names.
S3_USER, S3_SECRET, S3_REGION = "test:tester", "testtest", "us-east-1"
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
LATEST = 60  # seconds after which a server that has not answered never will


def is_ready() -> bool:
    """Say whether the environment of servers is here."""
    return (ENVIRONMENT / "installed").exists()


def has_azurite() -> bool:
    """Say whether Azurite can be run: it comes with npm, which not everybody has."""
    return AZURITE.exists() and shutil.which("node") is not None


@contextlib.contextmanager
def serving(log: Path, port: int, *command: object) -> Iterator[psutil.Process]:
    """Run a server in the background, and wait until it answers."""
    with held(log, *command) as holder, urllib3.PoolManager(retries=False, timeout=1) as pool:
        end = time.monotonic() + LATEST
        while not _answers(pool, port):
            assert time.monotonic() < end, f"{command} does not answer\n{log.read_text()}"
            time.sleep(0.05)
        yield holder


def _answers(pool: urllib3.PoolManager, port: int) -> bool:
    try:
        pool.request("GET", f"http://127.0.0.1:{port}/")
    except urllib3.exceptions.HTTPError:
        return False
    return True


@contextlib.contextmanager
def swift(folder: Path) -> Iterator[int]:
    """Give the port of a Swift with the S3 API."""
    _check_attributes(folder)
    port = free_port()
    command = [PYTHON, "-W", "ignore", SWIFT_NODE, folder / "node", port, S3_USER, S3_SECRET, S3_REGION]
    with serving(folder / "log", port, *command):
        yield port


def _check_attributes(folder: Path) -> None:
    """Refuse a folder whose files can have no attributes of a user's: Swift keeps there what it knows of an object."""
    (file := folder / "attributes").touch()
    try:
        os.setxattr(file, "user.swift", b"")
    except OSError as error:
        raise AssertionError(f"Swift cannot be in {folder}: have PYTEST_ARGS=--basetemp=build/tmp") from error


@contextlib.contextmanager
def azurite(folder: Path) -> Iterator[int]:
    """Give the port of an Azurite that serves blobs."""
    port = free_port()
    command = ["node", AZURITE, "--blobHost", "127.0.0.1", "--blobPort", port, "--location", folder / "blobs"]
    with serving(folder / "log", port, *command, "--skipApiVersionCheck", "--disableTelemetry"):
        yield port


@contextlib.contextmanager
def web(folder: Path, log: Path, latency_ms: float | None = None) -> Iterator[int]:
    """Give the port of a server of a folder that knows ranges, each answer as late as asked for."""
    port = free_port()
    latency = [] if latency_ms is None else ["--dist", "fixed", "--value-ms", latency_ms]
    with serving(log, port, SNAILMAIL, folder, "--port", port, *latency):
        yield port

"""Workers of a cluster with no disk in common: each has its own way to the store, and its own credentials."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import clusters
from support.clusters import WCONV, Driver

from converter import convert
from remote import models, stores

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not clusters.PYTHON.exists(), reason="needs .venv-engines, which make test-all installs"),
]


def test_files_go_from_bucket_to_bucket(s3: stores.S3, tmp_path: Path) -> None:
    source = models.save_sharded(tmp_path / "m")
    convert(source, tmp_path / "expected", dtype="bf16")
    s3.put_folder(source, "m/")
    with clusters.dask(tmp_path / "cluster", 2, **s3.env) as dask:
        command = ("recast", f"{s3.url}/m", "--dtype", "bf16", "-o", f"{s3.url}/out", "--executor", f"dask={dask.file}")
        ended = Driver(command, WCONV, None, **s3.env).end()
    assert ended.exit_code == 0, ended.stderr
    assert s3.get_folder("out/") == models.contents(tmp_path / "expected")


def test_a_worker_without_credentials_is_named(s3: stores.S3, tmp_path: Path) -> None:
    s3.put_folder(models.save_sharded(tmp_path / "m"), "m/")
    lacking = {**s3.env, "AWS_SECRET_ACCESS_KEY": "wrong"}
    with clusters.dask(tmp_path / "cluster", 2, **lacking) as dask:
        command = ("recast", f"{s3.url}/m", "--dtype", "bf16", "-o", f"{s3.url}/out", "--executor", f"dask={dask.file}")
        ended = Driver(command, WCONV, None, **s3.env).end()
    assert ended.exit_code == 7
    (line,) = ended.stderr.splitlines()
    assert line.startswith("worker tcp://")
    assert "is refused by S3 (SignatureDoesNotMatch)" in line
    assert not s3.names("out/")

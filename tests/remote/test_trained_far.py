"""Training checkpoints in buckets and on the web: the files that the same conversion on this machine writes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.training import unpack

from remote import models, stores

SAMPLES = ("trainer-fsdp2-sharded", "ranks-verl", "trainer-zero3", "dcp-hf")


@pytest.mark.parametrize("name", SAMPLES)
def test_from_bucket_to_bucket(wconv: Callable[..., Any], s3: stores.S3, tmp_path: Path, name: str) -> None:
    folder, _, _ = unpack(name, tmp_path)
    wconv("to-safetensors", folder, "-o", tmp_path / "out", "--dtype", "bf16")
    s3.put_folder(folder, "from/checkpoint-2/")
    wconv("to-safetensors", f"{s3.url}/from/checkpoint-2", "-o", f"{s3.url}/to", "--dtype", "bf16")
    assert s3.get_folder("to/") == models.contents(tmp_path / "out")
    wconv("verify", f"{s3.url}/from/checkpoint-2", f"{s3.url}/to", "--cast")


def test_the_web_lists_nothing_and_metadata_names_all(
    wconv: Callable[..., Any], web: stores.Web, tmp_path: Path
) -> None:
    folder, _, _ = unpack("dcp-fsdp", tmp_path)
    shutil.copytree(folder, web.folder / "m")
    wconv("to-safetensors", folder, "-o", tmp_path / "here")
    wconv("to-safetensors", f"{web.url}/m/.metadata", "-o", tmp_path / "out")
    assert models.contents(tmp_path / "out") == models.contents(tmp_path / "here")

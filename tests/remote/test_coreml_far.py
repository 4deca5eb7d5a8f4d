"""What is made ready for Core ML may lie in a bucket: the same files, and what is to be done next."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.clusters import ROOT

from remote import models, stores


def test_a_pipeline_is_made_ready_in_a_bucket(s3: stores.S3, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    subprocess.run([sys.executable, ROOT / "scripts" / "make_sample.py", tmp_path / "m"], check=True)
    wconv("prepare-coreml", tmp_path / "m", "-o", tmp_path / "expected")
    s3.put_folder(tmp_path / "m", "m/")
    outcome = wconv("prepare-coreml", f"{s3.url}/m", "-o", f"{s3.url}/out")
    assert s3.get_folder("out/") == models.contents(tmp_path / "expected")
    assert f"Fetch {s3.url}/out to a Mac" in outcome.stdout
    assert not outcome.stderr

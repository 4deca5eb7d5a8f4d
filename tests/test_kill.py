"""kill -9 at random moments of real runs: the same command, run again, ends with the bytes of an undisturbed run."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.tiny import snapshot

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="kill -9")]

MOMENTS = 30
COMMANDS = {
    "to-safetensors": ["to-safetensors", ".", "-o", "out"],
    "recast": ["recast", ".", "--dtype", "bf16"],
    "reshard in place": ["reshard", ".", "--max-shard-size", "none", "--in-place"],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with 200 MB in four shards."""
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    for number in range(1, 5):
        state = {f"layers.{number}.{i}.weight": torch.rand(1250, 1000) for i in range(10)}
        torch.save(state, folder / f"pytorch_model-{number:05d}-of-00004.bin")
    return folder


def copy(source: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return shutil.copytree(source, folder)


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "converter", *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_random_moments(name: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(name)
    folder = copy(source, tmp_path / "model")
    begun = time.perf_counter()
    with start(COMMANDS[name], folder) as undisturbed:
        assert undisturbed.wait() == 0
    seconds = time.perf_counter() - begun
    expected = snapshot(folder)
    before = snapshot(source)
    killed = taken_up = finished = 0
    reused_mb = 0.0
    while killed < MOMENTS:
        folder = copy(source, tmp_path / "model")
        with start(COMMANDS[name], folder) as child:
            time.sleep(chance.uniform(0, seconds))
            child.kill()
        killed += child.returncode != 0
        if not child.returncode:
            seconds *= 0.9  # so that there are moments enough, however fast runs have become
        left = snapshot(folder)
        # What has a final name is whole: as it was, or as it will be.
        for path, digest in left.items():
            if not any(part.startswith(".") for part in Path(path).parts):
                assert digest in (before.get(path), expected.get(path)), path
        assert "--in-place" in COMMANDS[name] or before.items() <= left.items()
        with start(COMMANDS[name], folder) as again:
            said, complained = again.communicate()
        assert again.returncode in ((0, 5) if left == expected else (0,)), complained
        assert snapshot(folder) == expected
        finished += "finished now" in said
        reused = re.search(r"Took up ([\d.]+) (kB|MB) that", said)
        taken_up += bool(reused)
        reused_mb += float(reused[1]) / (1 if reused[2] == "MB" else 1000) if reused else 0
    with capsys.disabled():
        print(
            f"\n{name}: {killed} killed in time; {taken_up} second runs took up {reused_mb:.0f} MB, "
            f"{finished} had only the last renames left"
        )

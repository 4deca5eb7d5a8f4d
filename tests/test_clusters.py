"""Runs on clusters of this machine: the same bytes, or one line and nothing left; whoever is killed meanwhile."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import clusters
from support.clusters import PYTHON, Dask, Driver, Gate, kill, run, wait_until
from support.tiny import flip_byte, left_behind, raw_bytes, snapshot

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="takes orphans in as Linux does"),
    pytest.mark.skipif(not PYTHON.exists(), reason="needs .venv-engines, which make test-all installs"),
]

SHARDS = 12
WORKERS = 3
# A file is written in 16 chunks then; each worker has done one, and is in its second, where it is held up.
MEMORY = ("--memory", "256kB")
PASSING = 20


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(1, SHARDS + 1):
        state = {f"layers.{number}.{i}.weight": torch.randn(512, 512, generator=generator) for i in range(4)}
        save_file(state, folder / f"model-{number:05d}-of-{SHARDS:05d}.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def expected(source: Path) -> dict[str, str]:
    out = source.parent / "expected"
    assert run("recast", source, "--dtype", "bf16", "-o", out).exit_code == 0
    return snapshot(out)


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dask]:
    with clusters.dask(tmp_path_factory.mktemp("dask") / "cluster", WORKERS) as cluster:
        yield cluster


def recast(source: Path, out: Path, executor: str) -> list[object]:
    return ["recast", source, "--dtype", "bf16", "-o", out, *MEMORY, "--executor", executor]


def said(ended: clusters.Ended, exit_code: int) -> str:
    """Give the one line that a run has said of what went wrong."""
    assert ended.exit_code == exit_code, ended
    assert ended.stderr.startswith("wconv: error: ") and ended.stderr.count("\n") == 1, ended.stderr
    return ended.stderr.removeprefix("wconv: error: ").rstrip("\n")


LOCAL = """
import sys
from distributed import LocalCluster
from converter import convert
if __name__ == "__main__":
    with LocalCluster(n_workers=3, threads_per_worker=1, dashboard_address=None) as cluster:
        with cluster.get_client() as client:
            convert(sys.argv[1], sys.argv[2], dtype="bf16", executor=client.get_executor(pure=False))
"""


def test_dask_local(source, expected, tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(LOCAL)
    ended = run(source, tmp_path / "out", before=(PYTHON, script))
    print("LOCAL", ended)
    assert snapshot(tmp_path / "out") == expected

def test_dask_plain(cluster: Dask, source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    for n, address in enumerate((cluster.address, cluster.file)):
        ended = run(*recast(source, tmp_path / f"out{n}", f"dask={address}"))
        print(ended)
        assert snapshot(tmp_path / f"out{n}") == expected
    ended = run("verify", "--cast", source, tmp_path / "out0", "--executor", f"dask={cluster.address}")
    print(ended)
    ended = run("verify", "--cast", source, tmp_path / "out0")
    print(ended)

def show(name, ended, tmp_path):
    print("CASE", name, ended.exit_code, ended.stderr, ended.stdout[-300:], left_behind(tmp_path)[:3], os.listdir(tmp_path))

@pytest.mark.parametrize("who", ["one", "all", "scheduler", "driver", "int", "cut", "gone"])
def test_dask_killed(who, gate: Gate, source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "m")
    opts = ["--no-nanny"] if who == "gone" else []
    with clusters.dask(tmp_path / "dask", WORKERS, *opts, **gate.environment) as cluster:
        gate.close(PASSING)
        args = recast(tmp_path / "m", tmp_path / "out", f"dask={cluster.address}")
        driver = Driver(args)
        wait_until(lambda: len(gate.waiting()) == WORKERS, "workers at the gate")
        if who == "one":
            kill(gate.waiting()[0])
        elif who in ("all", "gone"):
            kill(*gate.waiting())
        elif who == "scheduler":
            kill(*clusters.find(cluster.scheduler, "python"))
            show(who, driver.end(), tmp_path)
        elif who == "driver":
            driver.process.kill()
            show(who, driver.end(), tmp_path)
        elif who == "int":
            driver.process.send_signal(signal.SIGINT)
            show(who, driver.end(), tmp_path)
        elif who == "cut":
            f = tmp_path / "m" / "model-00012-of-00012.safetensors"
            os.truncate(f, f.stat().st_size - 10)
        gate.open()
        show(who, driver.end(), tmp_path)
        if who == "driver":
            show(who, run(*args), tmp_path)
    if who in ("one", "all", "driver"):
        assert snapshot(tmp_path / "out") == expected

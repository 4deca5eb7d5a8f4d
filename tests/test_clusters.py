"""Runs on clusters of this machine: the same bytes, or one line and nothing left, whoever is killed meanwhile.

Workers are held up at a gate within a file, so that nobody has to guess when they are at work.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import clusters
from support.clusters import PYTHON, ROOT, SUPPORT, WCONV, Dask, Driver, Ended, Gate, Ray, find, kill, run, wait_until
from support.tiny import flip_byte, left_behind, raw_bytes, snapshot

from converter import __version__

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="orphans are taken in as Linux does it"),
    pytest.mark.skipif(not PYTHON.exists(), reason="needs .venv-engines, which make test-all installs"),
]

SHARDS = 12
WORKERS = 3
# A file is written in 16 chunks then. Each worker has done one, and is held up in its second.
MEMORY = ("--memory", "256kB")
PASSING = 20
LAST = f"model-{SHARDS:05d}-of-{SHARDS:05d}.safetensors"
SHARD = rf"model-\d+-of-{SHARDS:05d}\.safetensors"
SAFELY = ("-P",) if sys.version_info >= (3, 11) else ()
MPI = (clusters.BIN / "mpiexec", "-n", WORKERS, PYTHON, *SAFELY, "-m", "mpi4py.futures", "-m", "converter")
# wconv, which waits for workers, or for Ray's head, no longer than three seconds.
IMPATIENT = (
    PYTHON,
    "-c",
    """
import sys
from importlib import import_module
from converter.cli import main
for name, constant in (("dask", "_COME_SECONDS"), ("ray", "_SILENT_SECONDS")):
    setattr(import_module(f"converter.run.workers.{name}"), constant, 3)
sys.exit(main(sys.argv[1:]))
""",
)
LOCAL_CLUSTER = """
import sys
from distributed import LocalCluster
from converter import convert
if __name__ == "__main__":
    with LocalCluster(n_workers=3, threads_per_worker=1, dashboard_address=":0") as cluster:
        with cluster.get_client() as client:
            convert(sys.argv[1], sys.argv[2], dtype="bf16", executor=client.get_executor(pure=False))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give a model of 50 MB, which is the same when all is done."""
    folder = tmp_path_factory.mktemp("source") / "model"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(1, SHARDS + 1):
        state = {f"layers.{number}.{i}.weight": torch.randn(512, 512, generator=generator) for i in range(4)}
        save_file(state, folder / f"model-{number:05d}-of-{SHARDS:05d}.safetensors", {"format": "pt"})
    before = snapshot(folder)
    yield folder
    assert snapshot(folder) == before


@pytest.fixture(scope="module")
def expected(source: Path) -> dict[str, str]:
    out = source.parent / "expected"
    assert run("recast", source, "--dtype", "bf16", "-o", out).exit_code == 0
    return snapshot(out)


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


@pytest.fixture(scope="module")
def dask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dask]:
    """Give a Dask cluster that nothing is done to."""
    with clusters.dask(tmp_path_factory.mktemp("dask") / "cluster", WORKERS) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def ray() -> Iterator[Ray]:
    """Give a Ray cluster that nothing is done to."""
    with tempfile.TemporaryDirectory(prefix="ray") as folder, clusters.ray(Path(folder), WORKERS) as cluster:
        yield cluster


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """Give a folder with a module in it that nobody should load, as a download may have one."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    (folder / "converter.py").write_text(f"open({str(folder / 'obeyed')!r}, 'w')")
    return folder


@pytest.fixture
def short_path() -> Iterator[Path]:
    """Give a folder whose path leaves room for Ray's sockets, of which Linux takes 107 characters."""
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        yield Path(folder)


def recast(source: Path, folder: Path, executor: str) -> list[object]:
    return ["recast", source, "--dtype", "bf16", "-o", folder / "out", *MEMORY, "--executor", executor]


def start_held_up(arguments: Sequence[object], gate: Gate, before: Sequence[object] = WCONV) -> Driver:
    """Start a run whose workers have each done a file, and are held up within the next."""
    gate.close(PASSING)
    driver = Driver(arguments, before)
    wait_until(lambda: len(gate.waiting()) == WORKERS, "workers at the gate")
    return driver


def assert_done(ended: Ended, folder: Path, expected: dict[str, str]) -> None:
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert snapshot(folder / "out") == expected
    assert not left_behind(folder)


def assert_taken_up(command: Sequence[object], gate: Gate, folder: Path, expected: dict[str, str]) -> None:
    """Kill a run in the middle of a file, and have the same command finish what it had begun."""
    driver = start_held_up(command, gate)
    driver.process.kill()
    driver.end()
    assert left_behind(folder)
    gate.open()
    again = run(*command)
    assert_done(again, folder, expected)
    assert "that an earlier run had left" in again.stdout


def assert_refused(ended: Ended, exit_code: int, line: str, folder: Path) -> None:
    """Hold what a run said against a pattern: one line, with nothing left behind."""
    assert ended.exit_code == exit_code, ended
    assert re.fullmatch(line + "\n", ended.stderr), ended.stderr
    assert not (folder / "out").exists()
    assert not left_behind(folder)


def cut_short(folder: Path) -> None:
    os.truncate(folder / LAST, (folder / LAST).stat().st_size - 8)


def save_damaged(folder: Path) -> list[object]:
    """Write a torch file with a bit that is wrong; give how it is converted."""
    state = {"a.weight": torch.randn(100, 100), "b.weight": torch.randn(100, 100)}
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    flip_byte(folder / "pytorch_model.bin", raw_bytes(state["b.weight"])[:64])
    return ["to-safetensors", folder, "-o", folder.parent / "out"]


DAMAGED = r"\S*/pytorch_model\.bin: its bytes [\d,]+ to [\d,]+ do not give the CRC32 that it notes\. .*"
FULL = rf"\S+{SHARD}: no space left on device\. Free some room, or write elsewhere with -o\."
LACKS_WCONV = (
    rf"cannot run what this wconv \({__version__}\) asks of it \(.*No module named 'converter'.*\)\. "
    rf"Install wconv {__version__} there, in the environment that it runs in\."
)
CUT_SHORT = rf"\S*/{LAST}: was changed while it was read\. Run this again when nobody writes to it\."


def other_version(folder: Path) -> Path:
    """Make a wconv of another version; put on the path of a worker it goes before the installed one."""
    shutil.copytree(ROOT / "converter", folder / "converter", ignore=shutil.ignore_patterns("__pycache__"))
    init = folder / "converter" / "__init__.py"
    init.write_text(init.read_text().replace(f'__version__ = "{__version__}"', '__version__ = "9.9"'))
    return folder


def no_wconv(folder: Path) -> Path:
    """Make what keeps a worker whose path it is on from loading wconv, as if it was not installed."""
    folder.mkdir()
    name = "converter"
    (folder / f"{name}.py").write_text(f'raise ModuleNotFoundError("No module named {name!r}", name="{name}")')
    return folder


# Dask.


def test_dask_in_a_program(source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(LOCAL_CLUSTER)
    assert_done(run(source, tmp_path / "out", before=(PYTHON, script)), tmp_path, expected)


@pytest.mark.parametrize("by", ["address", "file"])
def test_dask(by: str, dask: Dask, source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    assert_done(run(*recast(source, tmp_path, f"dask={getattr(dask, by)}")), tmp_path, expected)
    compare = ["verify", "--cast", source, tmp_path / "out"]
    here, there = run(*compare), run(*compare, "--executor", f"dask={dask.address}")
    assert there == here
    assert here.exit_code == 0


def test_dask_damaged(dask: Dask, tmp_path: Path) -> None:
    ended = run(*save_damaged(tmp_path / "m"), "--executor", f"dask={dask.address}")
    assert_refused(ended, 3, DAMAGED, tmp_path)


def test_dask_overflow(dask: Dask, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    save_file({"a.weight": torch.full((100, 100), 1e9)}, tmp_path / "m" / "model.safetensors")
    command = ["recast", tmp_path / "m", "--dtype", "fp16", "-o", tmp_path / "out"]
    ended = run(*command, "--executor", f"dask={dask.address}")
    assert_refused(ended, 6, r"\S*/m: holds values that are too large for F16: a\.weight \(10,000\)\. .*", tmp_path)


@pytest.mark.parametrize("who", ["one worker", "all workers"])
def test_dask_workers_killed(who: str, gate: Gate, source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    with clusters.dask(tmp_path / "dask", WORKERS, **gate.environment) as cluster:
        driver = start_held_up(recast(source, tmp_path, f"dask={cluster.address}"), gate)
        kill(*gate.waiting()[: 1 if who == "one worker" else WORKERS])
        gate.open()
        assert_done(driver.end(), tmp_path, expected)


def test_dask_workers_gone(gate: Gate, source: Path, tmp_path: Path) -> None:
    with clusters.dask(tmp_path / "dask", WORKERS, "--no-nanny", **gate.environment) as cluster:
        driver = start_held_up(recast(source, tmp_path, f"dask={cluster.address}"), gate, IMPATIENT)
        kill(*gate.waiting())
        line = (
            r"tcp://\S+: is a Dask scheduler that has had no worker for 3 s\. Look into the logs of those that it had\."
        )
        assert_refused(driver.end(), 7, line, tmp_path)


def test_dask_scheduler_killed(gate: Gate, source: Path, tmp_path: Path) -> None:
    with clusters.dask(tmp_path / "dask", WORKERS, **gate.environment) as cluster:
        driver = start_held_up(recast(source, tmp_path, f"dask={cluster.address}"), gate)
        kill(*find(cluster.scheduler, "python"))
        line = "was under way when the Dask scheduler went away. Look into its log, and run this again."
        assert_refused(driver.end(), 7, f"{SHARD}: {re.escape(line)}", tmp_path)
        gate.open()
    assert not left_behind(tmp_path)  # of what workers were in the middle of


def test_dask_driver_killed(gate: Gate, source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    with clusters.dask(tmp_path / "dask", WORKERS, **gate.environment) as cluster:
        assert_taken_up(recast(source, tmp_path, f"dask={cluster.address}"), gate, tmp_path, expected)


def test_dask_interrupted(gate: Gate, source: Path, tmp_path: Path) -> None:
    with clusters.dask(tmp_path / "dask", WORKERS, **gate.environment) as cluster:
        driver = start_held_up(recast(source, tmp_path, f"dask={cluster.address}"), gate)
        driver.process.send_signal(signal.SIGINT)
        assert_refused(driver.end(), 130, r"\s*Interrupted\.", tmp_path)
        gate.open()
    assert not left_behind(tmp_path)


def test_dask_scheduler_says_nothing(gate: Gate, source: Path, tmp_path: Path) -> None:
    with clusters.dask(tmp_path / "dask", WORKERS, **gate.environment) as cluster:
        driver = start_held_up(recast(source, tmp_path, f"dask={cluster.address}"), gate)
        (scheduler,) = find(cluster.scheduler, "python")
        os.kill(scheduler, signal.SIGSTOP)
        time.sleep(7)  # until wconv has asked it something
        driver.process.send_signal(signal.SIGINT)
        assert_refused(driver.end(), 130, r"\s*Interrupted\.", tmp_path)


def test_dask_source_cut_short(gate: Gate, source: Path, tmp_path: Path) -> None:
    model = shutil.copytree(source, tmp_path / "m")
    with clusters.dask(tmp_path / "dask", WORKERS, **gate.environment) as cluster:
        driver = start_held_up(recast(model, tmp_path, f"dask={cluster.address}"), gate)
        cut_short(model)
        gate.open()
        assert_refused(driver.end(), 3, CUT_SHORT, tmp_path)


def test_dask_scheduler_file_that_does_not_come(source: Path, tmp_path: Path) -> None:
    ended = run(*recast(source, tmp_path, f"dask={tmp_path / 'none.json'}"))
    line = (
        r"\S+none\.json: is no file of a Dask scheduler, after 20 s\. Start one: dask scheduler --scheduler-file FILE\."
    )
    assert_refused(ended, 7, line, tmp_path)


def test_dask_task_that_kills(source: Path, tmp_path: Path) -> None:
    site = SUPPORT / "worker_site"
    with clusters.dask(tmp_path / "dask", 2, PYTHONPATH=site, WCONV_DEADLY=1) as cluster:
        ended = run(*recast(source, tmp_path, f"dask={cluster.address}"))
    line = r"was under way when 4 workers were killed, tcp://\S+ the last of them\. Perhaps memory ran out there: .*"
    assert_refused(ended, 7, f"{SHARD}: {line}", tmp_path)


def test_dask_other_version(source: Path, tmp_path: Path) -> None:
    with clusters.dask(tmp_path / "dask", 1) as cluster:
        cluster.add(1, PYTHONPATH=other_version(tmp_path / "other"))
        ended = run(*recast(source, tmp_path, f"dask={cluster.address}"))
    line = rf"has wconv 9\.9, and {__version__} asks\. Install wconv {__version__} there\."
    assert_refused(ended, 7, rf"worker tcp://\S+, process \d+ on \S+: {line}", tmp_path)


def test_dask_other_version_that_comes_late(gate: Gate, source: Path, tmp_path: Path) -> None:
    gate.close(0)
    with clusters.dask(tmp_path / "dask", 1, **gate.environment) as cluster:
        driver = Driver(recast(source, tmp_path, f"dask={cluster.address}"))
        wait_until(gate.waiting, "a worker at the gate")
        cluster.add(1, PYTHONPATH=other_version(tmp_path / "other"))
        line = rf"was given to a worker with wconv 9\.9, and {__version__} runs here\. Install wconv .* on all\."
        assert_refused(driver.end(), 7, f"{SHARD}: {line}", tmp_path)


def test_dask_without_wconv(source: Path, tmp_path: Path) -> None:
    with clusters.dask(tmp_path / "dask", 1) as cluster:
        cluster.add(1, PYTHONPATH=no_wconv(tmp_path / "other"))
        ended = run(*recast(source, tmp_path, f"dask={cluster.address}"))
    assert_refused(ended, 7, rf"worker tcp://\S+: {LACKS_WCONV}", tmp_path)


def test_dask_without_wconv_that_comes_late(gate: Gate, source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """Dask lets such a worker end; the others do its work."""
    gate.close(0)
    with clusters.dask(tmp_path / "dask", 1, **gate.environment) as cluster:
        driver = Driver(recast(source, tmp_path, f"dask={cluster.address}"))
        wait_until(gate.waiting, "a worker at the gate")
        cluster.add(1, PYTHONPATH=no_wconv(tmp_path / "other"))
        gate.open()
        assert_done(driver.end(), tmp_path, expected)


@pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode != 0,
    reason="may not hide a folder from a process",
)
def test_dask_other_disk(source: Path, tmp_path: Path) -> None:
    hide = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', source)
    with clusters.dask(tmp_path / "dask", 1) as cluster:
        cluster.add(1, before=hide)
        ended = run(*recast(source, tmp_path, f"dask={cluster.address}"))
    advice = "All workers must see the same disk, under the same path, as the same user."
    line = rf"does not see what is to be read: {re.escape(str(source))}/{SHARD} no such file or directory\. {advice}"
    assert_refused(ended, 7, rf"worker tcp://\S+, process \d+ on \S+: {line}", tmp_path)


def test_dask_without_a_scheduler(source: Path, tmp_path: Path) -> None:
    ended = run(*recast(source, tmp_path, f"dask=tcp://127.0.0.1:{clusters.free_port()}"))
    line = r"is no Dask scheduler that answers \(.*\)\. Look whether it runs, and whether its address is right\."
    assert_refused(ended, 7, rf"tcp://127\.0\.0\.1:\d+: {line}", tmp_path)


def test_dask_without_workers(source: Path, tmp_path: Path) -> None:
    with clusters.dask(tmp_path / "dask", 0) as cluster:
        ended = run(*recast(source, tmp_path, f"dask={cluster.address}"), before=IMPATIENT)
    line = r"is a Dask scheduler to which no worker has come in 3 s\. Start some: dask worker ADDRESS\."
    assert_refused(ended, 7, rf"tcp://\S+: {line}", tmp_path)


# Ray.


def test_ray(ray: Ray, source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    assert_done(run(*recast(source, tmp_path, f"ray={ray.address}")), tmp_path, expected)
    compare = ["verify", "--cast", source, tmp_path / "out"]
    assert run(*compare, "--executor", f"ray={ray.address}") == run(*compare)


def test_ray_damaged(ray: Ray, tmp_path: Path) -> None:
    ended = run(*save_damaged(tmp_path / "m"), "--executor", f"ray={ray.address}")
    assert_refused(ended, 3, DAMAGED, tmp_path)


@pytest.mark.parametrize("who", ["one worker", "all workers"])
def test_ray_workers_killed(
    who: str, gate: Gate, source: Path, expected: dict[str, str], short_path: Path, tmp_path: Path
) -> None:
    with clusters.ray(short_path, WORKERS, **gate.environment) as cluster:
        driver = start_held_up(recast(source, tmp_path, f"ray={cluster.address}"), gate)
        kill(*gate.waiting()[: 1 if who == "one worker" else WORKERS])
        gate.open()
        assert_done(driver.end(), tmp_path, expected)


def test_ray_head_killed(gate: Gate, source: Path, short_path: Path, tmp_path: Path) -> None:
    """Nodes go on without it for a while, but here nothing comes of it."""
    with clusters.ray(short_path, WORKERS, **gate.environment) as cluster:
        driver = start_held_up(recast(source, tmp_path, f"ray={cluster.address}"), gate, IMPATIENT)
        kill(*find(cluster.head, "gcs_server"))
        line = r"is the head of a Ray cluster, and gone\. Run this again\."
        assert_refused(driver.end(), 7, rf"\S+:\d+: {line}", tmp_path)


def test_ray_node_killed(gate: Gate, source: Path, short_path: Path, tmp_path: Path) -> None:
    with clusters.ray(short_path, WORKERS, **gate.environment) as cluster:
        driver = start_held_up(recast(source, tmp_path, f"ray={cluster.address}"), gate)
        kill(*find(cluster.head, "raylet"))
        line = r"was given up by Ray \(The task's local raylet died\. .*\)\. Look into its log\."
        # Ray has lines of its own to say of this, in C++.
        assert_refused(driver.end(), 7, rf"(\[.*\n)*{SHARD}: {line}", tmp_path)


def test_ray_driver_killed(
    gate: Gate, source: Path, expected: dict[str, str], short_path: Path, tmp_path: Path
) -> None:
    with clusters.ray(short_path, WORKERS, **gate.environment) as cluster:
        assert_taken_up(recast(source, tmp_path, f"ray={cluster.address}"), gate, tmp_path, expected)


def test_ray_interrupted(gate: Gate, source: Path, short_path: Path, tmp_path: Path) -> None:
    with clusters.ray(short_path, WORKERS, **gate.environment) as cluster:
        driver = start_held_up(recast(source, tmp_path, f"ray={cluster.address}"), gate)
        driver.process.send_signal(signal.SIGINT)
        assert_refused(driver.end(), 130, r"\s*Interrupted\.", tmp_path)
        gate.open()
    assert not left_behind(tmp_path)


def test_ray_source_cut_short(gate: Gate, source: Path, short_path: Path, tmp_path: Path) -> None:
    model = shutil.copytree(source, tmp_path / "m")
    with clusters.ray(short_path, WORKERS, **gate.environment) as cluster:
        driver = start_held_up(recast(model, tmp_path, f"ray={cluster.address}"), gate)
        cut_short(model)
        gate.open()
        assert_refused(driver.end(), 3, CUT_SHORT, tmp_path)


def test_ray_task_that_kills(source: Path, short_path: Path, tmp_path: Path) -> None:
    site = SUPPORT / "worker_site"
    with clusters.ray(short_path, WORKERS, PYTHONPATH=site, WCONV_DEADLY=1) as cluster:
        ended = run(*recast(source, tmp_path, f"ray={cluster.address}"))
    line = r"was under way when 4 workers were killed\. Perhaps memory ran out there: look into Ray's log\."
    assert_refused(ended, 7, f"{SHARD}: {line}", tmp_path)


def test_dask_disk_full(source: Path, tmp_path: Path) -> None:
    with clusters.dask(tmp_path / "dask", 1, PYTHONPATH=SUPPORT / "worker_site", WCONV_FULL=1) as cluster:
        ended = run(*recast(source, tmp_path, f"dask={cluster.address}"))
    assert_refused(ended, 7, FULL, tmp_path)


def test_ray_disk_full(source: Path, short_path: Path, tmp_path: Path) -> None:
    with clusters.ray(short_path, 1, PYTHONPATH=SUPPORT / "worker_site", WCONV_FULL=1) as cluster:
        ended = run(*recast(source, tmp_path, f"ray={cluster.address}"))
    assert_refused(ended, 7, FULL, tmp_path)


def test_ray_other_version(source: Path, short_path: Path, tmp_path: Path) -> None:
    with clusters.ray(short_path, 1) as cluster:
        cluster.add(PYTHONPATH=other_version(tmp_path / "other"))
        ended = run(*recast(source, tmp_path, f"ray={cluster.address}"))
    line = rf"has wconv 9\.9, and {__version__} asks\. Install wconv {__version__} there\."
    assert_refused(ended, 7, rf"worker \w+, process \d+ on \S+: {line}", tmp_path)


def test_ray_without_wconv(source: Path, short_path: Path, tmp_path: Path) -> None:
    with clusters.ray(short_path, 1, PYTHONPATH=no_wconv(tmp_path / "other")) as cluster:
        ended = run(*recast(source, tmp_path, f"ray={cluster.address}"))
    assert_refused(ended, 7, rf"worker \w+: {LACKS_WCONV}", tmp_path)


def test_ray_in_a_hostile_folder(
    ray: Ray, source: Path, expected: dict[str, str], hostile: Path, tmp_path: Path
) -> None:
    """Ray would let workers load modules from where wconv runs before all others."""
    command = recast(source, tmp_path, f"ray={ray.address}")
    assert_done(run(*command, before=(clusters.BIN / "wconv",), folder=hostile), tmp_path, expected)
    assert not (hostile / "obeyed").exists()


def test_ray_without_a_cluster(source: Path, tmp_path: Path) -> None:
    ended = run(*recast(source, tmp_path, f"ray=127.0.0.1:{clusters.free_port()}"))
    line = r"is no Ray cluster that answers \(.*refused.*\)\. Start one: ray start --head\."
    assert_refused(ended, 7, rf"127\.0\.0\.1:\d+: {line}", tmp_path)


# MPI.


def test_mpi(source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    assert_done(run(*recast(source, tmp_path, "mpi"), before=MPI), tmp_path, expected)


def test_mpi_damaged(tmp_path: Path) -> None:
    ended = run(*save_damaged(tmp_path / "m"), "--executor", "mpi", before=MPI)
    # What ends all ranks says so.
    assert_refused(ended, 3, rf"{DAMAGED}(\nAbort\(3\).*)*", tmp_path)


def test_mpi_without_ranks(source: Path, tmp_path: Path) -> None:
    command = " ".join(("python", *SAFELY, "-m mpi4py.futures -m converter ..."))
    line = f"--executor mpi: has no ranks that wait for work. For four workers: mpiexec -n 5 {command}"
    assert_refused(run(*recast(source, tmp_path, "mpi")), 7, re.escape(line), tmp_path)


@pytest.mark.skipif(not SAFELY, reason="before Python 3.11 -m lets the current folder go first")
def test_mpi_in_a_hostile_folder(source: Path, expected: dict[str, str], hostile: Path, tmp_path: Path) -> None:
    assert_done(run(*recast(source, tmp_path, "mpi"), before=MPI, folder=hostile), tmp_path, expected)
    assert not (hostile / "obeyed").exists()


def test_mpi_rank_killed(gate: Gate, source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """MPI then ends all ranks; what they have done is taken up."""
    gate.close(PASSING)
    driver = Driver(recast(source, tmp_path, "mpi"), MPI, None, **gate.environment)
    wait_until(lambda: len(gate.waiting()) == WORKERS - 1, "workers at the gate")
    kill(gate.waiting()[0])
    assert driver.end().exit_code == signal.SIGKILL
    assert left_behind(tmp_path)
    again = run(*recast(source, tmp_path, "mpi"), before=MPI)
    assert_done(again, tmp_path, expected)
    assert "that an earlier run had left" in again.stdout

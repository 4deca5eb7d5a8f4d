"""Recast, reshard and rename-variant stopped at every step, on a full disk, and under a memory ceiling.

At every moment all tensors are there, and what a loader finds by an index is one whole set; the same command again ends
as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from support.steps import fill_disk
from support.tiny import is_same, make_state, put_behind, save, save_safetensors_shards, save_shards, snapshot
from test_crash import how_it_ends, kill_at_every_step
from test_run import PEAK_OF

pytestmark = pytest.mark.usefixtures("no_fsync")

STATE = make_state()
RECAST_CEILING_NBYTES = 80_000_000
OTHER = make_state(seed=1, dtype=torch.float16)


@dataclass(frozen=True)
class Scenario:
    """A folder ``m`` and a command that is run beside it."""

    name: str
    build: Callable[[Path], object]
    command: tuple[str, ...]
    adds_only: bool = False

    def make(self, root: Path) -> Path:
        self.build(root / "m")
        save(OTHER, root / "m" / "model.ema.safetensors")
        return root


def save_legacy(folder: Path) -> None:
    """Write a variant's shards in their old spelling."""
    save_shards(
        STATE,
        folder,
        ("ab", "cd", "ef"),
        "model-{:05d}-of-{:05d}.fp16.safetensors",
        "model.safetensors.fp16.index.json",
    )


def save_three(folder: Path) -> None:
    """Write three shards."""
    save_safetensors_shards(STATE, folder)


def save_four(folder: Path) -> None:
    """Write shards of which two come out as they were."""
    save_safetensors_shards(STATE, folder, ("ab", "cd", "e", "f"))


def save_links(folder: Path) -> None:
    """Write shards of which two come out as they were, and leave relative links to them all."""
    save_four(folder)
    put_behind(folder, folder.parent / "store", "relative")


IN_PLACE = ("--in-place", "--from-variant", "none")
SCENARIOS = [
    Scenario("recast-beside", save_three,
             ("recast", "m", "--dtype", "bf16"), adds_only=True),
    Scenario("reshard-merge", save_three, ("reshard", "m", "--max-shard-size", "none", *IN_PLACE)),
    Scenario("reshard-cut", lambda m: save(STATE, m / "model.safetensors"),
             ("reshard", "m", "--max-shard-size", "64B", *IN_PLACE)),
    Scenario("reshard-link", save_four, ("reshard", "m", "--max-shard-size", "64B", *IN_PLACE)),
    Scenario("rename", save_three, ("rename-variant", "m", "--from", "none", "--to", "fp16")),
    Scenario("reshard-links", save_links, ("reshard", "m", "--max-shard-size", "64B", *IN_PLACE)),
    Scenario("rename-legacy", save_legacy, ("rename-variant", "m", "--from", "fp16", "--to", "fp16")),
]  # fmt: skip
IDS = [scenario.name for scenario in SCENARIOS]


def assert_nothing_is_lost(root: Path, scenario: Scenario, template: Path) -> None:
    """Check what must hold at every moment."""
    if scenario.adds_only:
        assert snapshot(template).items() <= snapshot(root).items()
        return
    assert is_same(load_file(root / "m" / "model.ema.safetensors"), OTHER)
    held = set()
    for path in (root / "m").rglob("*.safetensors"):
        # What is staged may be half written, or a link that leads to nothing until it is in its place.
        with contextlib.suppress(SafetensorError, FileNotFoundError):
            state = load_file(path)
            held |= {name for name in state if name in STATE and state[name].equal(STATE[name])}
    assert held == STATE.keys()
    for path in (root / "m").glob("*.index*.json"):
        files = set(json.loads(path.read_text())["weight_map"].values())
        missing = [name for name in files if not (root / "m" / name).exists()]
        assert not missing, f"{path.name} names {missing}, which are not there"
        whole = {name: tensor for file in files for name, tensor in load_file(root / "m" / file).items()}
        assert is_same(whole, STATE), f"{path.name} is over the wrong bytes"


@pytest.mark.parametrize("scenario", SCENARIOS, ids=IDS)
def test_killed_at_any_step(
    scenario: Any, wconv: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = scenario.make(tmp_path / "template")
    finished = scenario.make(tmp_path / "finished")
    monkeypatch.chdir(finished)
    wconv(*scenario.command, "-q")
    expected = snapshot(finished)
    problems: dict[str, str] = {}
    for copy in kill_at_every_step(scenario.command, template, tmp_path / "killed"):
        try:
            assert_nothing_is_lost(copy, scenario, template)
        except AssertionError as error:
            problems[f"{copy.name} killed"] = str(error).splitlines()[0]
        monkeypatch.chdir(copy)
        problems[f"{copy.name} again"] = how_it_ends((*scenario.command, "-q"), copy, expected)
    assert not {step: problem for step, problem in problems.items() if problem}


@pytest.mark.parametrize("scenario", SCENARIOS[:4], ids=IDS[:4])
def test_a_disk_that_fills_up_on_the_way(
    scenario: Any, wconv: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(scenario.make(tmp_path))
    before = snapshot(tmp_path)
    fill_disk(monkeypatch)
    outcome = wconv(*scenario.command, exit_code=7)
    assert "no space left" in outcome.stderr.lower()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("command", [scenario.command for scenario in SCENARIOS[:5]], ids=IDS[:5])
@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs users")
def test_a_folder_that_may_not_be_written_to(
    command: Any, wconv: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    monkeypatch.chdir(SCENARIOS[0].make(tmp_path))
    (tmp_path / "m").chmod(0o555)
    before = snapshot(tmp_path)
    wconv(*command, exit_code=7)
    assert snapshot(tmp_path) == before
    (tmp_path / "m").chmod(0o755)


# Memory.


def sparse_tensor(path: Path, nbytes: int) -> None:
    """Write one float32 tensor of zeros that takes no room."""
    header = b'{"w":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (nbytes // 4, nbytes)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + nbytes)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8_e4m3fn"])
@pytest.mark.parametrize("nbytes", [1 << 27, pytest.param(1 << 30, marks=pytest.mark.slow)], ids=["128MB", "1GB"])
def test_a_recast_takes_little_memory(nbytes: int, dtype: str, tmp_path: Path) -> None:
    sparse_tensor(tmp_path / "big.safetensors", nbytes)
    command = [sys.executable, "-c", PEAK_OF, "recast", "big.safetensors", "--dtype", dtype, "-o", "out", "-q"]
    done = subprocess.run([*command, "--memory", "64MB"], check=True, cwd=tmp_path, capture_output=True, text=True)
    written = next((tmp_path / "out").iterdir()).stat().st_size
    shutil.rmtree(tmp_path / "out")
    assert written > nbytes // 4
    assert int(done.stdout.split("peak ")[1]) <= RECAST_CEILING_NBYTES

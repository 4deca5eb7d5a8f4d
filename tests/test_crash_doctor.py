"""The doctor's mending and its undo stopped at every step: nothing is lost, and the same command again ends right."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import run_main
from safetensors import SafetensorError
from safetensors.torch import load_file
from support import steps
from support.tiny import make_state, save, save_safetensors_shards, save_shards, snapshot, write_json
from test_crash import how_it_ends, kill_at_every_step

from converter.run.notes import Kind, Notes

pytestmark = pytest.mark.usefixtures("no_fsync")

STATE = make_state()
OTHER = make_state(seed=1, dtype=torch.float16)
FIX = ("doctor", "m", "--fix", "-q")
UNDO = ("doctor", "m", "--undo", "-q")


def make_broken(root: Path) -> Path:
    """Make a folder with the same weights twice, a variant in an old spelling, and an index of nothing."""
    folder = root / "m"
    save_safetensors_shards(STATE, folder, ("abc", "def"))
    save(STATE, folder / "model.safetensors")
    save_shards(OTHER, folder, ("abc", "def"), "model-{:05d}-of-{:05d}.fp16.safetensors",
                "model.safetensors.fp16.index.json")  # fmt: skip
    write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": {"a": "gone.bin"}})
    write_json(folder / "config.json", {"architectures": ["LlamaForCausalLM"]})
    return root


def assert_nothing_is_lost(root: Path) -> None:
    """Check that every tensor is still somewhere."""
    for state in (STATE, OTHER):
        held = set()
        for path in root.rglob("*.safetensors"):
            with contextlib.suppress(SafetensorError):
                found = load_file(path)
                held |= {name for name in found if found[name].equal(state[name])}
        assert held == state.keys()


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    return make_broken(tmp_path / "broken")


@pytest.fixture
def mended(tmp_path: Path, wconv: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    root = make_broken(tmp_path / "mended")
    monkeypatch.chdir(root)
    wconv(*FIX)
    return root


def test_mending_killed_at_any_step(
    broken: Path,
    mended: Path,
    wconv: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = snapshot(mended / "m")
    assert expected != snapshot(broken / "m")
    ends: dict[str, str] = {}
    for copy in kill_at_every_step(FIX[:-1], broken, tmp_path / "killed"):
        assert_nothing_is_lost(copy)
        aside = tmp_path / "aside"
        shutil.copytree(copy, aside)
        paths = [Notes(copy / "m").path_of(kind) for kind in get_args(Kind)]
        noted = {path: path.read_bytes() for path in paths if path.exists()}
        monkeypatch.chdir(copy)
        problem = how_it_ends(FIX, copy / "m", expected)
        wconv(*UNDO)
        if problem or snapshot(copy) != snapshot(broken):
            ends[copy.name] = problem or f"undone: {snapshot(copy).keys() ^ snapshot(broken).keys()}"
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(copy)
        aside.rename(copy)
        for path in paths:
            path.unlink(missing_ok=True)
        for path, raw in noted.items():
            path.write_bytes(raw)
        monkeypatch.chdir(copy)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            assert run_main(list(UNDO)) in (0, 2), said.getvalue()
        if snapshot(copy) != snapshot(broken):
            ends[f"{copy.name}, undone at once"] = str(snapshot(copy).keys() ^ snapshot(broken).keys())
    assert not ends


def test_undo_killed_at_any_step(broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = snapshot(broken)
    ends: dict[str, str] = {}
    for copy in kill_at_every_step((*FIX, "--", *UNDO[:-1]), broken, tmp_path / "killed"):
        assert_nothing_is_lost(copy)
        monkeypatch.chdir(copy)
        ends[copy.name] = how_it_ends(UNDO, copy, expected)
    assert not {step: end for step, end in ends.items() if end}


def test_what_was_changed_since_is_not_overwritten(mended: Path, wconv: Callable[..., Any]) -> None:
    save(make_state(seed=2), mended / "m" / "model.safetensors")
    save(make_state(seed=3), mended / "m" / "model.fp16-00001-of-00002.safetensors")
    before = snapshot(mended)
    assert "has changed since" in wconv(*UNDO, exit_code=5).stderr
    assert snapshot(mended) == before


def test_two_mendings_are_undone_together(
    broken: Path, wconv: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(broken)
    monkeypatch.chdir(broken)
    wconv(*FIX)
    write_json(broken / "m" / "model.safetensors.index.ema.json", {"metadata": {}, "weight_map": {"a": "gone.bin"}})
    wconv(*FIX)
    wconv(*UNDO)
    (broken / "m" / "model.safetensors.index.ema.json").unlink()
    assert snapshot(broken) == before


@pytest.mark.parametrize("has_links", [True, False], ids=["links", "no-links"])
def test_mending_refused_at_any_step_can_be_undone(
    has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_links:

        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.EPERM, "no hard links on this disk")

        monkeypatch.setattr(os, "link", refuse)
    ends: dict[int, str] = {}
    for number in range(1, steps.MAX_STEPS):
        root = make_broken(tmp_path / f"{number:03d}")
        before = snapshot(root)
        monkeypatch.chdir(root)
        action, reached = steps.raise_at(number, PermissionError(errno.EACCES, "permission denied"))
        with contextlib.redirect_stderr(io.StringIO()), steps.at_each_step(action):
            run_main(list(FIX))
        assert_nothing_is_lost(root)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            code = run_main(list(UNDO))
        if snapshot(root) != before or code not in (0, 2):
            ends[number] = f"{code} {said.getvalue()} {sorted(snapshot(root).items() ^ before.items())}"
        if not reached:
            break
    assert number > 50
    assert not ends

"""Runs stopped at every step on the file system: killed, interrupted, or refused by the system.

Whatever the moment, the source is unharmed, the target holds the old set, the new set, or no index, and the same
command again ends as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import run_main
from safetensors.torch import load_file
from support import steps
from support.tiny import (
    TENSOR_NBYTES,
    State,
    is_same,
    load_set,
    make_state,
    save,
    save_bin_shards,
    save_pipeline,
    save_safetensors_shards,
    snapshot,
    write_json,
)

import converter.run.execute
import converter.run.parts

pytestmark = pytest.mark.usefixtures("no_fsync")

STEPS = Path(__file__).with_name("support") / "steps.py"
NEW, OLD = make_state(seed=0), make_state(seed=1)
LIMIT = 2 * TENSOR_NBYTES


@dataclass(frozen=True)
class Scenario:
    """A folder ``m`` and the command that is run beside it; ``output`` is where it writes."""

    name: str
    build: Callable[[Path], object]
    args: tuple[object, ...]
    output: str = "m"

    @property
    def deletes_source(self) -> bool:
        return "--delete-source" in self.args

    def make(self, root: Path) -> Path:
        self.build(root / "m")
        write_json(root / "m" / "config.json", {"tie_word_embeddings": False})
        return root


def both(old: Callable[[Path], object]) -> Callable[[Path], None]:
    """Build a folder with sharded ``.bin`` weights, and older safetensors of other values beside them."""

    def build(folder: Path) -> None:
        save_bin_shards(NEW, folder)
        old(folder)

    return build


SCENARIOS = [
    Scenario("new-folder", lambda m: save_bin_shards(NEW, m), ("m", "-o", "out"), "out"),
    Scenario("beside", lambda m: save_bin_shards(NEW, m), ("m",)),
    Scenario(
        "sharded-to-sharded",
        both(lambda m: save_safetensors_shards(OLD, m, ("a", "bcde", "f"))),
        ("m", "--overwrite"),
    ),
    Scenario(
        "sharded-to-fewer",
        both(lambda m: save_safetensors_shards(OLD, m, ("a", "b", "cde", "f"))),
        ("m", "--overwrite", "--max-shard-size", f"{3 * TENSOR_NBYTES}B"),
    ),
    Scenario(
        "single-to-sharded",
        both(lambda m: save(OLD, m / "model.safetensors")),
        ("m", "--overwrite"),
    ),
    Scenario(
        "sharded-to-single",
        both(lambda m: save_safetensors_shards(OLD, m)),
        ("m", "--overwrite", "--max-shard-size", "none"),
    ),
    Scenario(
        "over-its-source",
        lambda m: save_safetensors_shards(NEW, m),
        ("m", "--overwrite", "--max-shard-size", f"{LIMIT * 2}B"),
    ),
    Scenario(
        "one-named-file",
        lambda m: save_bin_shards(NEW, m),
        ("m/pytorch_model.bin.index.json", "-o", "m/model.safetensors", "--delete-source"),
    ),
    Scenario("delete-source", lambda m: save_bin_shards(NEW, m), ("m", "--delete-source")),
    Scenario(
        "new-folder-delete-source", lambda m: save_bin_shards(NEW, m), ("m", "-o", "out", "--delete-source"), "out"
    ),
    Scenario(
        "delete-source-over-old",
        both(lambda m: save_safetensors_shards(OLD, m, ("abcde", "f"))),
        ("m", "--overwrite", "--delete-source"),
    ),
]
IDS = [scenario.name for scenario in SCENARIOS]


@pytest.fixture(scope="module")
def undisturbed(wconv: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Scenario], Path]:
    """Give the folder in which a scenario's command ran in peace."""
    done: dict[str, Path] = {}

    def run(scenario: Scenario) -> Path:
        if scenario.name not in done:
            root = scenario.make(tmp_path_factory.mktemp("undisturbed"))
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(root)
                wconv("to-safetensors", *scenario.args)
            done[scenario.name] = root
        return done[scenario.name]

    return run


def assert_nothing_is_lost(root: Path, scenario: Scenario, template: Path, finished: Path) -> None:
    """Check what must hold at every moment."""
    target = root / scenario.output
    is_whole = assert_target_is_sound(target, finished / scenario.output)
    for path in (template / "m").iterdir():
        now = root / "m" / path.name
        if now.exists() and path.suffix == ".bin":
            assert now.read_bytes() == path.read_bytes()
        if not now.exists() and path.name.startswith("pytorch_model"):
            assert scenario.deletes_source
            assert is_whole, f"{path.name} is gone, and the new weights are not there"


def assert_target_is_sound(target: Path, finished: Path) -> bool:
    """Check that a loader would find the old set, the new one, or none; say whether it is the new one."""
    files = sorted(target.glob("*.safetensors")) if target.exists() else []
    for path in files:
        state = load_file(path)
        assert is_part(state, NEW) or is_part(state, OLD), f"{path.name} is neither old nor new"
    names = {path.name for path in files}
    if (target / "model.safetensors.index.json").exists():
        held = load_set(target)
        assert is_same(held, NEW) or is_same(held, OLD), "the index joins old and new shards"
    if "model.safetensors" in names:
        single = load_file(target / "model.safetensors")
        assert is_same(single, NEW) or is_same(single, OLD)
    written = {path.name: path.read_bytes() for path in finished.glob("model*")}
    return all((target / name).exists() and (target / name).read_bytes() == raw for name, raw in written.items())


def is_part(state: State, whole: State) -> bool:
    return state.keys() <= whole.keys() and is_same(state, {name: whole[name] for name in state})


# kill -9


def kill_at_every_step(command: Sequence[object], template: Path, work: Path) -> list[Path]:
    """Give a copy of a folder for each step at which the command was killed there."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    work.mkdir()
    killing = [sys.executable, *map(str, (STEPS, template, work, *command)), "-q"]
    done = subprocess.run(killing, capture_output=True, text=True, check=False, cwd=work)
    assert not done.returncode, done.stderr
    *copies, last = sorted(work.iterdir())
    shutil.rmtree(last)  # of the run that ended by itself
    assert len(copies) > 5
    return copies


@pytest.mark.parametrize("scenario", SCENARIOS, ids=IDS)
def test_killed_at_any_step(
    scenario: Any,
    undisturbed: Callable[[Scenario], Path],
    wconv: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    template, finished = scenario.make(tmp_path / "template"), undisturbed(scenario)
    expected = snapshot(finished)
    ends: dict[str, str] = {}
    for copy in kill_at_every_step(("to-safetensors", *scenario.args), template, tmp_path / "killed"):
        assert_nothing_is_lost(copy, scenario, template, finished)
        monkeypatch.chdir(copy)
        ends[copy.name] = how_it_ends(("to-safetensors", *scenario.args, "-q"), copy, expected)
    assert not {step: end for step, end in ends.items() if end}


def how_it_ends(command: tuple[object, ...], folder: Path, expected: dict[str, str]) -> str:
    """Run a command again, unless it had just ended; say what is not as if nothing had happened."""
    if snapshot(folder) == expected:
        return ""  # some commands, with their source gone, cannot be run again
    problems = io.StringIO()
    with contextlib.redirect_stderr(problems):
        code = run_main(list(map(str, command)))
    found = snapshot(folder)
    others = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    return f"{code} {problems.getvalue()} {others}" if code or others else ""


@pytest.mark.parametrize("name", ["new-folder", "sharded-to-sharded"])
def test_killed_a_run_with_other_options_ends_right_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = SCENARIOS[IDS.index(name)]
    command = ("to-safetensors", *scenario.args, "--overwrite", "--max-shard-size", f"{TENSOR_NBYTES}B", "-q")
    peaceful = scenario.make(tmp_path / "peaceful")
    monkeypatch.chdir(peaceful)
    assert not run_main(list(map(str, command)))
    ends = {}
    for copy in kill_at_every_step(
        ("to-safetensors", *scenario.args), scenario.make(tmp_path / "template"), tmp_path / "killed"
    ):
        monkeypatch.chdir(copy)
        ends[copy.name] = how_it_ends(command, copy, snapshot(peaceful))
    assert not {step: end for step, end in ends.items() if end}


def test_killed_what_came_back_since_is_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The user fetches the deleted source again, and then asks for something that deletes nothing.
    scenario = SCENARIOS[IDS.index("delete-source")]
    template = scenario.make(tmp_path / "template")
    for copy in kill_at_every_step(("to-safetensors", *scenario.args), template, tmp_path / "killed"):
        if not list((copy / "m").glob("*.bin")):
            shutil.copytree(template, copy, dirs_exist_ok=True)
            monkeypatch.chdir(copy)
            assert run_main(["to-safetensors", "m", "--variant", "ema", "-q"]) == 0
            assert snapshot(template).items() <= snapshot(copy).items(), copy.name


# Ctrl-C, and a system that says no.


@pytest.mark.parametrize("name", ["new-folder", "sharded-to-sharded", "delete-source"])
@pytest.mark.parametrize(
    ("error", "exit_code"), [(KeyboardInterrupt(), 130), (PermissionError(errno.EACCES, "permission denied"), 7)]
)
def test_stopped_at_any_step(
    name: str,
    error: Any,
    exit_code: int,
    undisturbed: Callable[[Scenario], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scenario = SCENARIOS[IDS.index(name)]
    template, finished = scenario.make(tmp_path / "template"), undisturbed(scenario)
    command = ("to-safetensors", *scenario.args, "-q")
    ends = {}
    for number in range(1, steps.MAX_STEPS):
        folder = scenario.make(tmp_path / f"{number:03d}")
        monkeypatch.chdir(folder)
        action, reached = steps.raise_at(number, error)
        with steps.at_each_step(action):
            code = run_main(list(map(str, command)))
        if not reached:
            break
        assert_nothing_is_lost(folder, scenario, template, finished)
        # What fails while clearing up after all is done is no failure.
        assert code in ((exit_code, 0) if has_all(folder, finished) else (exit_code,))
        if code:
            assert_told_rightly(capsys.readouterr().err, is_untouched=snapshot(folder) == snapshot(template))
            ends[number] = how_it_ends(command, folder, snapshot(finished))
    assert not {step: end for step, end in ends.items() if end}


def has_all(folder: Path, finished: Path) -> bool:
    return snapshot(finished).items() <= snapshot(folder).items()


def assert_told_rightly(complaint: str, is_untouched: bool) -> None:
    assert complaint.endswith("\n")
    assert complaint.strip().count("\n") == 0
    assert "othing was changed" not in complaint or is_untouched


@pytest.mark.parametrize("where", ["beside", "new"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "no space left")], ids=["ctrl-c", "full"])
def test_stopped_at_any_piece_nothing_is_left(
    where: str, error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_pipeline(tmp_path / "m")
    args = ["to-safetensors", str(folder), *(["-o", str(tmp_path / "deep" / "out")] if where == "new" else [])]
    before = snapshot(tmp_path)
    write = converter.run.parts.write_piece
    for stop in range(1, 6):
        written: list[object] = []

        def write_or_fail(piece: Any, chunk_nbytes: Any, written: Any = written, stop: Any = stop) -> Any:
            written.append(piece)
            if len(written) == stop:
                raise error
            return write(piece, chunk_nbytes)

        monkeypatch.setattr(converter.run.execute, "write_piece", write_or_fail)
        code = run_main(args)
        if len(written) < stop:
            assert code == 0
            return
        assert code == (130 if isinstance(error, KeyboardInterrupt) else 7), capsys.readouterr().err
        assert snapshot(tmp_path) == before
    raise AssertionError("the command has four pieces")

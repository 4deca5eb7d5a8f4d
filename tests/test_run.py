"""Carrying out a plan: on any executor, in little memory, always with the same bytes, all of it or nothing."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.steps import fill_disk
from support.tiny import (
    assert_same,
    flip_byte,
    left_behind,
    load_set,
    make_state,
    raw_bytes,
    save,
    save_bin_shards,
    save_pipeline,
    save_safetensors_shards,
    snapshot,
    write_json,
)

import converter.run.execute
import converter.run.parts
from converter import Request, convert, plan_conversion, prepare, run_plan
from converter.cli import main
from converter.errors import BadFile, OutputRefused, SystemRefused
from converter.models.checkpoint import open_checkpoint
from converter.plan.types import Target
from converter.recipes.verify import holds_values
from converter.run.signals import signals_held
from converter.run.staging import open_staging
from converter.storage import place_of
from converter.tensors.reader import RangeReader

STATE = make_state()
MEMORY_CEILING_NBYTES = 46_000_000  # as promised; the interpreter takes most of it, and 7 MB more while it is measured
TMPFS_NBYTES = 1 << 23


def make_varied(folder: Path) -> Path:
    """Write a sharded model of every kind of tensor: several dtypes, strided, tied, empty, longer than a chunk."""
    generator = torch.Generator().manual_seed(3)
    wide = torch.randn(300, 700, generator=generator)
    state = {
        "a.transposed": wide.T,
        "b.wide": wide,
        "c.tied": wide,
        "d.ints": torch.arange(1001),
        "e.half": torch.randn(999, generator=generator).half(),
        "f.empty": torch.zeros(0, 4),
        "g.scalar": torch.tensor(True),
        "h.every_third": torch.randn(3000, generator=generator)[::3],
        "i.bytes": torch.arange(200_003).to(torch.uint8),
    }
    names = list(state)
    save({name: state[name] for name in names[:6]}, folder / "pytorch_model-00001-of-00002.bin")
    save({name: state[name] for name in names[6:]}, folder / "pytorch_model-00002-of-00002.bin")
    return folder


# Executors.


@contextlib.contextmanager
def processes() -> Iterator[Executor]:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        yield pool


@pytest.fixture(scope="module")
def process_pool() -> Iterator[Executor]:
    with processes() as pool:
        yield pool


@pytest.fixture(params=["none", "threads", "processes"])
def executor(request: pytest.FixtureRequest, process_pool: Executor) -> Iterator[Executor | None]:
    if request.param == "threads":
        with ThreadPoolExecutor(3) as pool:
            yield pool
    else:
        yield process_pool if request.param == "processes" else None


def test_any_executor_gives_the_same_bytes(executor: Executor | None, tmp_path: Path) -> None:
    source = make_varied(tmp_path / "m")
    convert(source, tmp_path / "expected", workers=1)
    plan = plan_conversion(Request.of(source, tmp_path / "out"))
    seen: list[int] = []
    result = run_plan(plan, executor, verify=True, progress=seen.append)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "expected")
    assert result.verified
    assert sum(seen) == 2 * sum(tensor.nbytes for shard in plan.files for tensor, _ in shard.tensors)


def test_an_executor_that_is_given_stays_open(tmp_path: Path) -> None:
    make_varied(tmp_path / "m")
    with ThreadPoolExecutor(1) as pool:
        convert(tmp_path / "m", tmp_path / "a", executor=pool)
        convert(tmp_path / "m", tmp_path / "b", executor=pool)
        assert pool.submit(int, "3").result() == 3


def test_errors_come_through_processes(process_pool: Executor, tmp_path: Path) -> None:
    flip_byte(save(STATE, tmp_path / "m" / "pytorch_model.bin"), raw_bytes(STATE["c"]))
    before = snapshot(tmp_path)
    with pytest.raises(BadFile, match="CRC32"):
        convert(tmp_path / "m", tmp_path / "out", executor=process_pool)
    plan = plan_conversion(Request.of(save(STATE, tmp_path / "x.bin"), tmp_path / "out"))
    (tmp_path / "x.bin").unlink()
    with pytest.raises(SystemRefused, match=r"x\.bin: no such file"):
        run_plan(plan, process_pool)
    assert snapshot(tmp_path) == before


# The same bytes, whatever the circumstances.


@pytest.mark.parametrize(
    ("workers", "memory_nbytes", "verify"), list(itertools.product([1, 3], [1, 1 << 17, 1 << 26], [False, True]))
)
def test_workers_and_memory_change_nothing(workers: Any, memory_nbytes: Any, verify: Any, tmp_path: Path) -> None:
    source = make_varied(tmp_path / "m")
    options: dict[str, Any] = {"tied": "duplicate", "max_shard_size": 500_000}
    convert(source, tmp_path / "expected", **options)
    convert(source, tmp_path / "out", **options, workers=workers, memory_nbytes=memory_nbytes, verify=verify)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "expected")


def test_values_and_bytes_are_those_of_save_file(tmp_path: Path) -> None:
    source = make_varied(tmp_path / "m")
    convert(source, tmp_path / "out", tied="duplicate")
    for number in (1, 2):
        state = torch.load(source / f"pytorch_model-0000{number}-of-00002.bin", weights_only=True)
        copied = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
        save_file(copied, tmp_path / "judge.safetensors", {"format": "pt"})
        written = tmp_path / "out" / f"model-0000{number}-of-00002.safetensors"
        assert written.read_bytes() == (tmp_path / "judge.safetensors").read_bytes()


def test_the_hash_seed_changes_nothing(tmp_path: Path) -> None:
    save_pipeline(tmp_path / "m")
    make_varied(tmp_path / "m" / "text_encoder_2")
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "converter", "to-safetensors", "m", "-o", seed, "-q"]
        subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "PYTHONHASHSEED": seed})
    assert snapshot(tmp_path / "1") == snapshot(tmp_path / "2")


def test_what_is_converted_twice_is_as_if_once(tmp_path: Path) -> None:
    source = make_varied(tmp_path / "m")
    convert(source, tmp_path / "sharded", max_shard_size=300_000)
    convert(tmp_path / "sharded", tmp_path / "again", max_shard_size=float("inf"))
    convert(source, tmp_path / "once", max_shard_size=float("inf"))
    assert_same(load_file(tmp_path / "again" / "model.safetensors"), load_file(tmp_path / "once" / "model.safetensors"))


@pytest.mark.skipif(os.name != "posix", reason="needs a umask")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_and_folders_follow_the_umask(umask: int, tmp_path: Path) -> None:
    save_pipeline(tmp_path / "m")
    before = os.umask(umask)
    try:
        convert(tmp_path / "m", tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.suffix: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out" / "unet").iterdir()}
    assert modes[".safetensors"] == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "out" / "unet").stat().st_mode) == 0o777 & ~umask
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask


# Memory.


PEAK_OF = """
import sys
from converter.cli import main
code = main(sys.argv[1:])
status = open("/proc/self/status").read()
print("peak", int(status.split("VmHWM:")[1].split()[0]) * 1024)
sys.exit(code)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("verify", [[], ["--verify"]], ids=["plain", "verify"])
def test_a_tensor_of_256_mb_takes_no_more_memory_than_a_small_one(verify: list[Any], tmp_path: Path) -> None:
    header = b'{"w":{"dtype":"F32","shape":[8192,8192],"data_offsets":[0,268435456]}}'
    with (tmp_path / "big.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 28))
    command = [sys.executable, "-c", PEAK_OF, "to-safetensors", "big.safetensors", "-o", "out", "-q", *verify]
    done = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True)
    shutil.rmtree(tmp_path / "out")
    assert int(done.stdout.split("peak ")[1]) <= MEMORY_CEILING_NBYTES


@pytest.mark.parametrize(
    "command",
    [pytest.param(["to-safetensors"], marks=pytest.mark.slow), ["recast", "--dtype", "bf16"]],
    ids=["plain", "cast"],
)
def test_no_piece_waits_for_the_collector_of_circles(command: list[str], tmp_path: Path) -> None:
    # It is off while a command runs.
    def left_over(rows: int) -> int:
        source, output = str(tmp_path / f"{rows}.safetensors"), str(tmp_path / f"out-{rows}")
        save({"w": torch.zeros(rows, 1 << 18)}, Path(source))
        gc.collect()
        gc.disable()
        try:
            assert main([command[0], source, "-o", output, "-q", "--workers", "1", *command[1:]]) == 0
            return gc.collect()
        finally:
            gc.enable()

    left_over(1)
    few, many = left_over(8), left_over(80)  # MB
    assert many <= few


# What goes wrong.


def test_a_staged_file_that_changes_is_caught(tmp_path: Path) -> None:
    source = save_bin_shards(STATE, tmp_path / "m").parent
    before = snapshot(tmp_path)

    def change(_: int) -> None:
        for staged in tmp_path.rglob("model-00002-of-00003.safetensors"):
            if raw_bytes(STATE["d"]) in staged.read_bytes():
                flip_byte(staged, raw_bytes(STATE["d"]))

    for output in (tmp_path / "out", None):
        with pytest.raises(BadFile, match=r"model-00002-of-00003\.safetensors.*'d'"):
            convert(source, output, delete_source=output is None, verify=output is not None, progress=change)
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize("damage", ["short", "garbage", "another"])
def test_a_staged_file_that_is_wrong_is_a_bug(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wconv: Callable[..., Any]
) -> None:
    source = save(STATE, tmp_path / "m" / "pytorch_model.bin").parent
    before = snapshot(tmp_path)
    write = converter.run.parts.write_piece

    def write_wrongly(piece: Any, chunk_nbytes: Any) -> Any:
        parts = write(piece, chunk_nbytes)
        if damage == "short":
            os.truncate(piece.place.path, piece.place.path.stat().st_size - 1)
        elif damage == "garbage":
            piece.place.path.write_bytes(b"\0" * piece.place.path.stat().st_size)
        else:
            save_file({"a": STATE["a"]}, piece.place.path)
        return parts

    monkeypatch.setattr(converter.run.execute, "write_piece", write_wrongly)
    assert "bug in wconv" in wconv("to-safetensors", source, "-o", tmp_path / "out", exit_code=70).stderr
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_a_source_cut_short_while_it_is_read(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(STATE, tmp_path / "m" / f"model{suffix}")
    write = converter.run.parts.write_piece

    def cut_and_write(piece: Any, chunk_nbytes: Any) -> Any:
        os.truncate(source, piece.steps[-1].tensor.source.storage.offset + 3)
        return write(piece, chunk_nbytes)

    monkeypatch.setattr(converter.run.execute, "write_piece", cut_and_write)
    with pytest.raises(BadFile, match="changed while it was read") as caught:
        convert(source, tmp_path / "out")
    assert caught.value.where == str(source)
    assert list(tmp_path.iterdir()) == [source.parent]


def test_a_source_that_goes_away_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(STATE, tmp_path / "m" / "model.bin")
    plan = plan_conversion(Request.of(source, tmp_path / "out"))
    source.unlink()
    with pytest.raises(SystemRefused, match=r"model\.bin"):
        run_plan(plan)
    assert list(tmp_path.iterdir()) == [source.parent]


def test_a_disk_that_is_full_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wconv: Callable[..., Any]
) -> None:
    source = save(STATE, tmp_path / "m" / "pytorch_model.bin").parent
    before = snapshot(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(converter.run.execute, "write_piece", lambda *_: pytest.fail("a byte was written"))
    outcome = wconv("to-safetensors", source, exit_code=7)
    assert "GB" in outcome.stderr or "MB" in outcome.stderr
    assert snapshot(tmp_path) == before


def test_a_disk_that_fills_up_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wconv: Callable[..., Any]
) -> None:
    source = save_bin_shards(STATE, tmp_path / "m").parent
    before = snapshot(tmp_path)
    fill_disk(monkeypatch)
    for output in ([], ["-o", tmp_path / "out"]):
        outcome = wconv("to-safetensors", source, *output, exit_code=7)
        assert "no space left" in outcome.stderr.lower()
        assert outcome.stderr.strip().count("\n") == 0
        assert snapshot(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Give the root of a file system of 8 MB."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("only root may mount")
    root = tmp_path / "disk"
    root.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_NBYTES}", "tmpfs", str(root)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount")
    try:
        yield root
    finally:
        subprocess.run(["umount", "-l", root], check=True)


def test_a_small_disk_is_refused_before_the_first_byte(
    small_disk: Path, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    source = save({"w": torch.ones(TMPFS_NBYTES // 4)}, tmp_path / "m" / "pytorch_model.bin")
    outcome = wconv("to-safetensors", source, "-o", small_disk / "deep" / "out", exit_code=7)
    assert "needs" in outcome.stderr
    assert not list(small_disk.iterdir())


def test_a_small_disk_that_another_fills_up(small_disk: Path, tmp_path: Path) -> None:
    names = "abcdef"
    state = {name: torch.ones(TMPFS_NBYTES // 4 // 10) for name in names}
    source = save_bin_shards(state, tmp_path / "m").parent
    other = small_disk / "other"

    def fill_up(nbytes: int) -> None:
        with contextlib.suppress(OSError), other.open("ab") as file:
            file.write(bytes(TMPFS_NBYTES))

    with pytest.raises(SystemRefused, match=r"(?i)no space left"):
        convert(source, small_disk / "out", progress=fill_up, workers=1)
    assert list(small_disk.iterdir()) == [other]
    other.unlink()
    convert(source, small_disk / "out")
    assert_same(load_set(small_disk / "out"), state)


def test_a_disk_may_be_the_new_folder(small_disk: Path, tmp_path: Path) -> None:
    source = save_bin_shards(STATE, tmp_path / "m").parent
    convert(source, small_disk)
    assert_same(load_set(small_disk), STATE)
    assert not left_behind(tmp_path)


def test_a_component_may_lie_on_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_pipeline(tmp_path / "m")
    convert(source, tmp_path / "expected")
    rename = os.replace

    def rename_on_one_disk(old: Any, new: Any, *, src_dir_fd: Any = None, dst_dir_fd: Any = None) -> None:
        between = None not in (src_dir_fd, dst_dir_fd) and not os.path.sameopenfile(src_dir_fd, dst_dir_fd)
        if between and new.startswith("diffusion"):
            raise OSError(errno.EXDEV, "another disk", old)
        rename(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "replace", rename_on_one_disk)
    convert(source)
    for path in (tmp_path / "expected").rglob("*.safetensors*"):
        assert (source / path.relative_to(tmp_path / "expected")).read_bytes() == path.read_bytes()
    assert not left_behind(source)


@pytest.fixture
def as_somebody(tmp_path: Path, wconv: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Become an ordinary user, where root would not be refused anything; give a folder that is this user's."""
    if os.name != "posix":
        pytest.skip("needs POSIX permissions")
    # Such a user may not be allowed to read this interpreter's own files: nothing may be left to import.
    wconv("to-safetensors", save_bin_shards(STATE, tmp_path / "first"))
    root = Path(tempfile.mkdtemp(prefix="wconv-test-"))
    root.chmod(0o777)
    state = Path(tempfile.mkdtemp(prefix="wconv-test-state-"))
    state.chmod(0o777)
    monkeypatch.setenv("WCONV_STATE", str(state))
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield root
    finally:
        if is_root:
            os.seteuid(0)
        for path in root.rglob("*"):
            if path.is_dir():
                path.chmod(0o755)
        shutil.rmtree(root)
        shutil.rmtree(state)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    folder.chmod(0o555)
    yield
    folder.chmod(0o755)


def test_a_read_only_folder(as_somebody: Path, wconv: Callable[..., Any]) -> None:
    source = save_bin_shards(STATE, as_somebody / "m").parent
    before = snapshot(as_somebody)
    with read_only(source):
        outcome = wconv("to-safetensors", source, exit_code=7)
        assert "permission denied" in outcome.stderr
        assert outcome.stderr.strip().count("\n") == 0
        wconv("to-safetensors", source, "-o", source / "out", exit_code=7)
        wconv("to-safetensors", source, "-o", source / "deep" / "out", exit_code=7)
        assert snapshot(as_somebody) == before
        wconv("to-safetensors", source, "-o", as_somebody / "out")
    assert_same(load_set(as_somebody / "out"), STATE)


def test_a_read_only_folder_of_a_component(as_somebody: Path, wconv: Callable[..., Any]) -> None:
    source = save_pipeline(as_somebody / "m")
    before = snapshot(as_somebody)
    with read_only(source / "unet"):
        outcome = wconv("to-safetensors", source, exit_code=7)
        assert outcome.stderr.startswith(f"{source / 'unet'}")
        assert snapshot(as_somebody) == before
    wconv("to-safetensors", source)


def test_a_source_that_may_not_be_read(as_somebody: Path, wconv: Callable[..., Any]) -> None:
    source = save(STATE, as_somebody / "m" / "pytorch_model.bin")
    before = snapshot(as_somebody)
    source.chmod(0o000)
    for path in (source, source.parent):
        outcome = wconv("to-safetensors", path, "-o", as_somebody / "out", exit_code=7)
        assert outcome.stderr.startswith(f"{source}: permission denied")
    source.chmod(0o644)
    assert snapshot(as_somebody) == before


def test_read_only_files_that_a_killed_run_left_are_taken_up(as_somebody: Path, wconv: Callable[..., Any]) -> None:
    source = save_bin_shards(STATE, as_somebody / "m").parent
    write_json(source / "config.json", {}).chmod(0o444)
    with open_staging(Target.at(place_of(as_somebody / "out"), is_new=True)) as staging:
        shutil.copy(source / "config.json", staging.staged("config.json"))
    wconv("to-safetensors", source, "-o", as_somebody / "out")
    assert_same(load_set(as_somebody / "out"), STATE)


# Taking up what a killed run left.


def leave_behind(source: Path, output: Path, damage: Callable[[Path], object]) -> None:
    """Leave a staging folder as a killed run does, its files damaged."""
    request, plan = prepare(Request.of(source, output), plan_conversion)
    assert plan is not None
    convert(source, output)
    with open_staging(plan.target, request) as staging:
        tree = staging.staged(".").path
        shutil.copytree(output, tree, dirs_exist_ok=True)
        damage(tree)
    shutil.rmtree(output)


@pytest.mark.parametrize(
    ("damage", "reused"),
    [
        (lambda tree: None, 3),
        (lambda tree: flip_byte(tree / "model-00002-of-00003.safetensors", raw_bytes(STATE["c"])), 3),
        (lambda tree: (tree / "model-00001-of-00003.safetensors").write_bytes(b"x"), 2),
        (lambda tree: (tree / "model-00003-of-00003.safetensors").unlink(), 2),
        (lambda tree: (tree / "stranger.txt").write_text("x"), 3),
        (lambda tree: (tree / "model.safetensors.index.json").write_text("{}"), 3),
    ],
    ids=["whole", "flipped", "short", "missing", "stranger", "wrong-index"],
)
def test_what_a_killed_run_left_is_taken_up_and_not_trusted(
    damage: Callable[..., Any], reused: int, tmp_path: Path
) -> None:
    source = save_bin_shards(STATE, tmp_path / "m").parent
    convert(source, tmp_path / "expected")
    leave_behind(source, tmp_path / "out", damage)
    result = convert(source, tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "expected")
    size = (tmp_path / "out" / "model-00001-of-00003.safetensors").stat().st_size
    assert result.reused_nbytes == reused * size
    assert not left_behind(tmp_path)


def test_what_a_killed_run_left_of_another_source_is_not_mixed_in(tmp_path: Path) -> None:
    other = save_bin_shards(make_state(seed=5), tmp_path / "other").parent
    source = save_bin_shards(STATE, tmp_path / "m").parent
    leave_behind(other, tmp_path / "out", lambda tree: None)
    convert(source, tmp_path / "out")
    assert_same(load_set(tmp_path / "out"), STATE)


def test_what_a_killed_run_left_of_another_request_is_not_taken_up(tmp_path: Path) -> None:
    # A worker on another machine may still write into it, and both have the same size.
    source = save({"a": torch.randn(1000)}, tmp_path / "m" / "pytorch_model.bin").parent
    request, plan = prepare(Request.of(source, tmp_path / "out", dtype="bf16"), plan_conversion)
    assert plan is not None
    with open_staging(plan.target, request) as staging:
        staging.prepare(plan.files[0].path, plan.files[0].header, plan.files[0].nbytes)
        late = staging.staged(plan.files[0].path).path.open("r+b")
    with late:
        result = convert(source, tmp_path / "out", dtype="fp16")
        late.write(b"x" * 2000)
    assert result.reused_nbytes == 0
    assert b"xxx" not in (tmp_path / "out" / "model.safetensors").read_bytes()
    assert not left_behind(tmp_path)


def test_a_second_name_of_a_source_that_a_killed_run_left_is_not_written_into(tmp_path: Path) -> None:
    folder = save_safetensors_shards(STATE, tmp_path / "m", ("a", "bc", "def")).parent
    name = "model-00001-of-00003.safetensors"
    with open_staging(Target.at(place_of(folder))) as staging:
        os.link(folder / name, staging.staged(name))
    options: dict[str, Any] = {"format": None, "in_place": True, "max_shard_size": 64}
    with contextlib.suppress(BadFile):  # it has a name less than when its header was read: that is a change too
        convert(folder, **options)
    convert(folder, **options)
    assert_same(load_set(folder), STATE)


# Two at once, and others who come between.


def test_two_runs_into_one_output(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    source = save_bin_shards(STATE, tmp_path / "m").parent
    for output in (None, tmp_path / "out"):
        refused: list[str] = []
        args = ["-o", output] if output else []

        def run_another(nbytes: int, args: list[Any] = args, refused: list[str] = refused) -> None:
            refused.append(wconv("to-safetensors", source, *args, exit_code=5).stderr)

        convert(source, output, progress=run_another)
        assert refused
        assert all("another run" in line and line.count("\n") == 1 for line in refused)
        assert_same(load_set(output or source), STATE)
    assert not left_behind(tmp_path)


def test_two_processes_into_one_output(tmp_path: Path) -> None:
    source = save_bin_shards(STATE, tmp_path / "m").parent
    with open_staging(Target.at(place_of(tmp_path / "out"), is_new=True)) as staging:
        command = [sys.executable, "-m", "converter", "to-safetensors", str(source), "-o", str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        staging.remove()
    assert (done.returncode, done.stderr.count("\n")) == (5, 1)
    assert not (tmp_path / "out").exists()
    assert not left_behind(tmp_path)


def test_a_new_folder_that_another_makes_meanwhile(tmp_path: Path) -> None:
    source = save_bin_shards(STATE, tmp_path / "m").parent
    foreign = tmp_path / "out" / "theirs.txt"

    def come_between(nbytes: int) -> None:
        foreign.parent.mkdir(exist_ok=True)
        foreign.write_text("x")

    with pytest.raises((OutputRefused, SystemRefused)):
        convert(source, tmp_path / "out", progress=come_between)
    assert sorted(snapshot(tmp_path / "out")) == ["theirs.txt"]
    assert not left_behind(tmp_path)
    shutil.rmtree(tmp_path / "out")
    convert(source, tmp_path / "out")
    assert_same(load_set(tmp_path / "out"), STATE)


def test_output_that_another_writes_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    source = save(STATE, tmp_path / "m" / "pytorch_model.bin").parent

    def come_between(nbytes: int) -> None:
        save(make_state(seed=9), source / "model.safetensors")

    with contextlib.suppress(OutputRefused, SystemRefused):
        convert(source, progress=come_between)
    assert_same(load_set(source), make_state(seed=9))


# Where the output is the source under another name.


def spellings(folder: Path, link: Path) -> list[Path]:
    """Spell a folder in other ways."""
    link.symlink_to(folder, target_is_directory=True)
    return [folder / ".." / folder.name, Path(os.path.relpath(folder)), link]


@pytest.mark.parametrize("number", range(3), ids=["dotted", "relative", "link"])
def test_deleting_the_source_spares_the_output_however_it_is_spelled(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_safetensors_shards(STATE, tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    output = spellings(source.parent, tmp_path / "link")[number]
    convert(source, output, overwrite=True, delete_source=True, max_shard_size=64)
    assert_same(load_set(source.parent), STATE)


@pytest.mark.parametrize("number", range(3), ids=["dotted", "relative", "link"])
def test_replacing_the_source_is_verified_however_it_is_spelled(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(STATE, tmp_path / "m" / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    output = spellings(source.parent, tmp_path / "link")[number]
    assert convert(source, output, overwrite=True, max_shard_size=64).verified
    assert_same(load_set(source.parent), STATE)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_heard_where_a_comparison_ends_early(
    which: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What it raised while the generator of results went was lost.
    sets = [open_checkpoint(save(make_state(seed=seed), tmp_path / f"{seed}.bin")) for seed in range(2)]
    read_into = RangeReader.read_into

    def signal_and_read(*args: Any) -> Any:
        os.kill(os.getpid(), which)
        return read_into(*args)

    monkeypatch.setattr(RangeReader, "read_into", signal_and_read)
    before = signal.signal(which, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            holds_values(*sets)
        assert signal.getsignal(which) is interrupt
    finally:
        signal.signal(which, before)


@pytest.mark.parametrize("number", range(2), ids=["first", "second"])
def test_each_signal_has_its_handler_back_though_another_raises(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    both = (signal.SIGINT, signal.SIGTERM)
    set_handler = signal.signal
    sent: list[signal.Signals] = []

    def set_and_send(which: Any, handler: Any) -> Any:
        result = set_handler(which, handler)
        if handler is interrupt and len(sent) == number:  # as if it came the moment that it can be heard
            sent.append(which)
            signal.raise_signal(which)
        elif handler is interrupt:
            sent.append(which)
        return result

    before = [set_handler(which, interrupt) for which in both]
    monkeypatch.setattr(signal, "signal", set_and_send)
    try:
        with pytest.raises(KeyboardInterrupt), signals_held():
            pass
        assert [signal.getsignal(which) for which in both] == [interrupt, interrupt]
    finally:
        for which, handler in zip(both, before, strict=True):
            set_handler(which, handler)


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_not_raised_inside_of_an_executor(which: signal.Signals, tmp_path: Path) -> None:
    # Raised within Condition.__enter__, it left a future's lock taken, and the command hung.
    begun, ended = [], []

    class Signalling(ThreadPoolExecutor):
        def submit(self, *args: Any, **how: Any) -> Any:
            begun.append(1)
            os.kill(os.getpid(), which)
            for _ in range(1000):
                pass
            ended.append(1)
            return super().submit(*args, **how)

    save_bin_shards(STATE, tmp_path / "m")
    before = signal.signal(which, interrupt)
    try:
        with Signalling(1) as pool, pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "m", tmp_path / "out", executor=pool)
        assert signal.getsignal(which) is interrupt
    finally:
        signal.signal(which, before)
    assert begun == ended
    assert [path.name for path in tmp_path.iterdir()] == ["m"]

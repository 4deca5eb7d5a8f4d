"""Notes of runs in the user's state folder, commits that were cut off, and finished commands that are typed again."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import torch
from conftest import run_main
from support import steps
from support.tiny import (
    left_behind,
    make_state,
    save,
    save_bin_shards,
    save_pipeline,
    save_safetensors_shards,
    snapshot,
    write_json,
)

from converter import convert
from converter.errors import SystemRefused, WconvError
from converter.plan.types import Target
from converter.run.journal import Changes
from converter.run.staging import open_staging
from converter.storage import place_of
from converter.storage.root import Root

STATE = make_state()
OLD = make_state(seed=1)


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a state folder of the test's own."""
    monkeypatch.setenv("WCONV_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


class _Cut(BaseException):
    pass


def cut_off(args: list[str], is_moment: Callable[[], bool]) -> None:
    """Run a command that ends, as if killed, at the first step at which something holds; then nothing is cleared up."""
    child = os.fork()
    if not child:

        def action(_: int) -> None:
            if is_moment():
                os._exit(9)

        with steps.at_each_step(action):
            run_main(args)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


# What is noted.


def test_a_run_leaves_no_note(notes: Path, tmp_path: Path) -> None:
    source = save_bin_shards(STATE, tmp_path / "m").parent
    convert(source, tmp_path / "out")
    assert list(notes.iterdir()) == []
    assert notes.stat().st_mode & 0o777 == 0o700 or os.name == "nt"


def test_the_staging_folder_is_private_and_what_comes_out_is_not(notes: Path, tmp_path: Path) -> None:
    source = save_bin_shards(STATE, tmp_path / "m").parent
    modes: set[int] = set()

    def look(_: int) -> None:
        modes.update(path.stat().st_mode & 0o777 for path in tmp_path.glob(".staging*"))

    convert(source, tmp_path / "out", progress=look)
    mask = os.umask(0)
    os.umask(mask)
    assert modes == {0o700}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask


def test_names_of_staging_folders_are_never_the_same(notes: Path, tmp_path: Path) -> None:
    names = set()
    for number in range(3):
        with open_staging(Target.at(place_of(tmp_path / str(number)), is_new=True)) as staging:
            names.add(staging.folder.name)
            staging.remove()
    assert len(names) == 3


@pytest.mark.parametrize("place", ["relative", ""])
def test_a_state_folder_that_is_no_full_path(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wconv: Callable[..., Any]
) -> None:
    source = save_bin_shards(STATE, tmp_path / "m").parent
    monkeypatch.setenv("WCONV_STATE", place)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    outcome = wconv("to-safetensors", source, "-o", tmp_path / "out", exit_code=2 if place else 0)
    assert "WCONV_STATE" in outcome.stderr or not place
    assert (tmp_path / "out").exists() == (not place)


@pytest.mark.parametrize("place", [Path("~/.local/state/wconv"), RuntimeError("no home")])
def test_a_home_that_is_not_known_is_not_the_current_folder(
    place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wconv: Callable[..., Any]
) -> None:
    def user_state_path(*_: object, **__: object) -> Path:
        if isinstance(place, Exception):
            raise place
        return place

    source = save(STATE, tmp_path / "m" / "pytorch_model.bin").parent
    monkeypatch.delenv("WCONV_STATE")
    monkeypatch.setattr(platformdirs, "user_state_path", user_state_path)
    monkeypatch.chdir(source)
    assert "let WCONV_STATE name a folder" in wconv("to-safetensors", source, exit_code=2).stderr
    assert [path.name for path in source.iterdir()] == ["pytorch_model.bin"]


def test_a_state_folder_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wconv: Callable[..., Any]
) -> None:
    source = save_bin_shards(STATE, tmp_path / "m").parent
    (tmp_path / "file").write_text("x")
    before = snapshot(tmp_path)
    monkeypatch.setenv("WCONV_STATE", str(tmp_path / "file" / "state"))
    outcome = wconv("to-safetensors", source, "-o", tmp_path / "out", exit_code=7)
    assert "WCONV_STATE" in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert snapshot(tmp_path) == before


ODD = {
    "empty": b"",
    "no JSON": b"{",
    "deep": b"[" * 1_000_000,
    "a list": b"[]",
    "null": b"null",
    "another version": b'{"format":2}',
    "bare": {},
    "a place that is none": {"place": 1, "name": ".staging-" + "0" * 32 + ".wconv", "is_new": False, "journal": None},
    "a name that is none": {"place": "/", "name": "tmp", "is_new": False, "journal": None},
    "a name with a path": {
        "place": "/",
        "name": "../.staging-" + "0" * 32 + ".wconv",
        "is_new": False,
        "journal": None,
    },
    "a journal of text": {"place": "/", "name": ".staging-" + "0" * 32 + ".wconv", "is_new": False, "journal": "x"},
    "a way out": {"move": [{"name": "../x", "nbytes": 1, "mtime_ns": 1, "ctime_ns": 1}]},
    "a full path": {"last_away": [{"name": "/etc/x", "nbytes": 1, "mtime_ns": 1, "ctime_ns": 1}]},
    "a size that is none": {"move": [{"name": "x", "nbytes": "1", "mtime_ns": 1, "ctime_ns": 1}]},
    "too many fields": {"move": [{"name": "x", "nbytes": 1, "mtime_ns": 1, "ctime_ns": 1, "more": 1}]},
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("odd", ODD)
def test_a_note_that_cannot_be_understood_is_refused_and_what_is_staged_stays(
    odd: str, notes: Path, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    source = save_bin_shards(STATE, tmp_path / "m").parent
    save_safetensors_shards(OLD, source)
    cut_off(
        ["to-safetensors", str(source), "--overwrite"], lambda: not (source / "model.safetensors.index.json").exists()
    )
    [note] = notes.glob("*.run")
    content: Any = ODD[odd]
    if isinstance(content, dict):
        run = json.loads(note.read_text())
        is_step = content.keys() & {"move", "last_away"}
        run = (
            {**run, "journal": {**run["journal"], **content}}
            if is_step
            else {"format": 1, "folder": run["folder"], **content}
        )
        content = json.dumps(run).encode()
    note.write_bytes(content)
    next(notes.glob("*.lock")).unlink()
    before = snapshot(tmp_path)
    for command in (
        ("to-safetensors", source, "--overwrite"),
        ("doctor", source, "--undo"),
        ("recast", source, "--dtype", "bf16"),
    ):
        said = wconv(*command, exit_code=3).stderr
        assert said.startswith(f"{note}: cannot be read")
        assert said.count("\n") == 1
        assert "emove it" not in said
    assert snapshot(tmp_path) == before


# Commits that were cut off.


def has_no_index(folder: Path) -> Callable[[], bool]:
    """Say when a commit is between two indexes."""
    return lambda: not (folder / "model.safetensors.index.json").exists()


@pytest.fixture
def cut(notes: Path, tmp_path: Path) -> Path:
    """Give a folder whose old weights were being replaced when the run was killed."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    source = save_bin_shards(STATE, tmp_path / "m").parent
    save_safetensors_shards(OLD, source, ("abc", "def"))
    cut_off(["to-safetensors", str(source), "--overwrite"], has_no_index(source))
    return source


def test_it_is_finished_by_any_command_that_writes(cut: Path, wconv: Callable[..., Any]) -> None:
    wconv("recast", cut, "--dtype", "bf16", exit_code=None)
    assert not left_behind(cut)
    assert json.loads((cut / "model.safetensors.index.json").read_text())["weight_map"]["f"].endswith(
        "of-00003.safetensors"
    )


def test_it_is_not_finished_over_what_came_since(cut: Path, wconv: Callable[..., Any]) -> None:
    # The user removes the staging folder by hand, and fetches the old weights again.
    for path in cut.glob(".staging*"):
        shutil.rmtree(path)
    shutil.rmtree(cut)
    save_bin_shards(STATE, cut)
    save_safetensors_shards(OLD, cut, ("abc", "def"))
    before = snapshot(cut)
    outcome = wconv("to-safetensors", cut, exit_code=5)
    assert "was published by a run that was stopped" in outcome.stderr
    assert snapshot(cut) == before
    wconv("to-safetensors", cut, "--overwrite")
    assert len(list(cut.glob("*.safetensors"))) == 3


def test_nothing_is_removed_for_output_that_somebody_removed(
    notes: Path, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    source = save_bin_shards(STATE, tmp_path / "m").parent
    output = tmp_path / "out"
    command = ["to-safetensors", str(source), "-o", str(output), "--delete-source"]
    cut_off(command, output.exists)
    shutil.rmtree(output)
    before = snapshot(source)
    wconv("recast", source, "--dtype", "bf16", "-o", output)
    assert snapshot(source) == before
    assert not left_behind(tmp_path)


def test_a_folder_made_where_a_killed_run_was_to_publish(
    notes: Path, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    source = save_bin_shards(STATE, tmp_path / "m").parent
    output = tmp_path / "out"
    command = ["to-safetensors", str(source), "-o", str(output), "--delete-source"]
    cut_off(command, lambda: any('"journal": {' in note.read_text() for note in notes.glob("*.run")))
    output.mkdir()
    (output / "mine.txt").write_text("x")
    before = snapshot(source)
    assert "Move it elsewhere" in wconv(*command, exit_code=5).stderr
    assert snapshot(source) == before
    output.rename(tmp_path / "elsewhere")
    wconv(*command)
    assert len(list(output.glob("*.safetensors"))) == 3
    assert not list(source.glob("*.bin"))


def is_noted(notes: Path) -> Callable[[], bool]:
    """Say when a commit has begun."""
    return lambda: any('"journal": {' in note.read_text() for note in notes.glob("*.run"))


@pytest.mark.parametrize("moment", ["noted", "published", "removed"])
def test_output_into_a_file_is_taken_up_too(
    moment: str, notes: Path, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    source, output = save(STATE, tmp_path / "m" / "model.bin"), tmp_path / "out" / "x.safetensors"
    command = ["to-safetensors", str(source), "-o", str(output), "--delete-source"]
    moments = {"noted": is_noted(notes), "published": output.exists, "removed": lambda: not source.exists()}
    cut_off(command, moments[moment])
    assert "that is finished now" in wconv(*command).stdout
    assert (output.exists(), source.exists()) == (True, False)
    assert not left_behind(tmp_path)
    assert not list(notes.glob("*.run"))


def test_what_was_finished_of_another_source_is_not_said_to_be_done(
    notes: Path, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    source, output = save_bin_shards(STATE, tmp_path / "m").parent, tmp_path / "out"
    cut_off(["to-safetensors", str(source), "-o", str(output)], output.exists)
    save_bin_shards(OLD, source)
    assert "is not what would be written" in wconv("to-safetensors", source, "-o", output, exit_code=5).stderr
    assert not left_behind(tmp_path)


@pytest.mark.parametrize("how", ["gone", "moved"])
def test_sources_that_are_elsewhere_by_now_do_not_keep_it_from_ending(
    how: str, notes: Path, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    source, output = save_bin_shards(STATE, tmp_path / "m").parent, tmp_path / "out"
    cut_off(["to-safetensors", str(source), "-o", str(output), "--delete-source"], output.exists)
    source.rename(tmp_path / "moved")
    if how == "moved":
        source.symlink_to(tmp_path / "moved")
    before = snapshot(tmp_path / "moved")
    wconv("recast", output, "--dtype", "bf16")
    assert snapshot(tmp_path / "moved") == before
    assert not list(notes.glob("*.run"))


def test_what_is_staged_stays_noted_when_it_cannot_be_taken_up(
    notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wconv: Callable[..., Any]
) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    source = save_bin_shards(STATE, tmp_path / "m").parent
    command = ["to-safetensors", str(source)]
    cut_off(command, lambda: any(source.glob(".staging*/files/*.safetensors")))
    with monkeypatch.context() as patch:
        patch.setattr(Root, "make_folder", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "input/output error")))
        wconv(*command, exit_code=7)
    wconv(*command)
    assert not left_behind(tmp_path)


def test_an_interrupt_waits_for_a_commit_that_has_begun(notes: Path, tmp_path: Path) -> None:
    source = save_bin_shards(STATE, tmp_path / "m").parent
    sent: list[int] = []

    def interrupt(_: int) -> None:
        if not sent and is_noted(notes)():
            sent.append(1)
            os.kill(os.getpid(), signal.SIGINT)

    # Whoever starts the tests in the background makes them ignore Ctrl-C, and then the command does.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with steps.at_each_step(interrupt):
            assert run_main(["rename-variant", str(source), "--from", "none", "--to", "fp16"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert sent
    assert len(list(source.glob("*.fp16*"))) == len(list(source.iterdir())) == 4
    assert not list(notes.iterdir())


@pytest.mark.parametrize("blocked", ["file", "folder"])
def test_what_cannot_be_renamed_into_place_is_refused_before_anything_is(
    blocked: str, notes: Path, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    source, output = save_bin_shards(STATE, tmp_path / "m").parent, tmp_path / "out"
    write_json(source / "tokenizer" / "vocab.json", {})
    if blocked == "file":
        (output / "model-00002-of-00003.safetensors").mkdir(parents=True)
    else:
        output.mkdir()
        (output / "tokenizer").write_text("mine")
    before = snapshot(output)
    for more in ((), ("--dry-run",)):
        said = wconv("to-safetensors", source, "-o", output, "--overwrite", *more, exit_code=5).stderr
        assert "Move it elsewhere" in said
    assert snapshot(output) == before


def test_a_staged_file_that_is_gone_is_an_error(notes: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with open_staging(Target.at(place_of(tmp_path / "m"))) as staging:
        staging.put("a", b"x")
        with pytest.raises(SystemRefused, match="was staged, and is gone"):
            staging.commit(Changes(("a", "b")), "")
        staging.remove()
    assert list((tmp_path / "m").iterdir()) == []


@pytest.mark.parametrize("name", ["../a", "/a", "a//b", "./a", "a/..", "a\0", ""])
def test_names_that_are_not_plain_are_not_used(name: str, notes: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(WconvError), open_staging(Target.at(place_of(tmp_path / "m"))) as staging:
        staging.put(name, b"x")
    assert [path.name for path in tmp_path.iterdir() if path != notes] == ["m"]


# A finished command, typed again.

AGAIN: dict[str, tuple[str, ...]] = {
    "beside": ("to-safetensors", "m"),
    "new": ("to-safetensors", "m", "-o", "out"),
    "a file": ("to-safetensors", "m/unet/diffusion_pytorch_model.bin.index.json", "-o", "out"),
    "recast": ("recast", "m", "--dtype", "bf16"),
    "recast new": ("recast", "m", "--dtype", "fp16", "-o", "out"),
    "reshard": ("reshard", "m", "--max-shard-size", "none", "-o", "out"),
    "to-bin": ("to-bin", "out0", "--max-shard-size", "none"),
    "quantize": ("quantize", "q", "-o", "out", "--include", "x"),
    "dequantize": ("dequantize", "q8", "-o", "out", "--dtype", "fp32"),
}


@pytest.fixture
def models(tmp_path: Path, wconv: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    import torch

    save_pipeline(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    wconv("to-safetensors", "m", "-o", "out0")
    save({"x.weight": torch.ones(8, 4)}, tmp_path / "q" / "model.safetensors")
    write_json(tmp_path / "q" / "config.json", {"architectures": ["Mine"]})
    wconv("quantize", "q", "-o", "q8", "--include", "x")
    return tmp_path


@pytest.mark.parametrize("name", AGAIN)
def test_a_finished_command_says_so(name: str, models: Path, wconv: Callable[..., Any]) -> None:
    wconv(*AGAIN[name])
    before = {path: path.stat().st_mtime_ns for path in models.rglob("*")}
    for more in ((), ("--dry-run",)):
        assert "Up to date: " in wconv(*AGAIN[name], *more).stdout
    assert {path: path.stat().st_mtime_ns for path in models.rglob("*")} == before


def make_older(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def change_a_value(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


CHANGES: dict[str, Callable[[Path], object]] = {
    "near tensor": change_a_value,
    "is older than its source": make_older,
    "is not there": Path.unlink,
    "begins otherwise": lambda path: path.write_bytes(b"\0" + path.read_bytes()[1:]),
    "bytes and not": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
}


@pytest.mark.parametrize("why", CHANGES)
def test_what_would_be_written_otherwise_is_refused(why: str, models: Path, wconv: Callable[..., Any]) -> None:
    wconv("to-safetensors", "m", "-o", "out")
    CHANGES[why](models / "out" / "vae" / "diffusion_pytorch_model.safetensors")
    before = snapshot(models)
    said = wconv("to-safetensors", "m", "-o", "out", exit_code=5).stderr
    assert "vae/diffusion_pytorch_model.safetensors" in said
    assert why in said
    assert "--overwrite" in said
    assert snapshot(models) == before


@pytest.mark.parametrize("change", ["config", "source", "carried", "link"])
def test_what_was_changed_since_is_not_up_to_date(change: str, models: Path, wconv: Callable[..., Any]) -> None:
    wconv("recast", "m", "--dtype", "bf16", "--variant", "none", "-o", "out")
    if change == "config":
        (models / "out" / "model_index.json").write_text("{}")
    elif change == "source":
        path = next((models / "m" / "vae").glob("*.bin"))
        raw, found = path.read_bytes(), path.stat()
        path.write_bytes(raw)
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))  # as an archive's, or a sync's
    elif change == "carried":
        write_json(models / "m" / "model_index.json", json.loads((models / "m" / "model_index.json").read_text()))
    else:
        path = next((models / "out" / "vae").glob("*.safetensors"))
        path.rename(models / "elsewhere")
        path.symlink_to(models / "elsewhere")
    assert (
        "is not what would be written"
        in wconv("recast", "m", "--dtype", "bf16", "--variant", "none", "-o", "out", exit_code=5).stderr
    )


def test_other_options_are_not_up_to_date(models: Path, wconv: Callable[..., Any]) -> None:
    wconv("to-safetensors", "m", "-o", "out")
    wconv("to-safetensors", "m", "-o", "out", "--max-shard-size", "none", exit_code=5)
    wconv("recast", "m", "--dtype", "fp16", "-o", "out", exit_code=5)
    wconv("to-safetensors", "m", "-o", "out", "--delete-source", exit_code=5)


@pytest.mark.parametrize("how", ["source", "key", "overflow", "carried"])
def test_other_values_are_not_up_to_date(how: str, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    first, again = ["to-safetensors", "m"], ["to-safetensors", "m"]
    source = tmp_path / "m"
    if how == "key":
        source = tmp_path / "m.ckpt"
        save({"model": STATE, "ema": OLD}, source)
        first, again = (["to-safetensors", "m", "--key", key] for key in ("model", "ema"))
    elif how == "overflow":
        save({"a": torch.full((9,), 1e6)}, source / "model.safetensors")
        first, again = (["recast", "m", "--dtype", "fp16", "--on-overflow", what] for what in ("saturate", "inf"))
    else:
        save_bin_shards(STATE, source)
        (source / "LICENSE").write_text("a")
    other = tmp_path / "other"
    if how in ("source", "carried"):
        save_bin_shards(STATE if how == "carried" else OLD, other)
        (other / "LICENSE").write_text("b" if how == "carried" else "a")
    first[1], again[1] = str(source), str(other if other.exists() else source)
    wconv(*first, "-o", tmp_path / "out")
    said = wconv(*again, "-o", tmp_path / "out", exit_code=5).stderr
    assert (
        "LICENSE: exists, and is not what would be written" if how == "carried" else "other values near tensor"
    ) in said


def test_in_python(models: Path) -> None:
    assert convert("m", "out").plan is not None
    again = convert("m", "out")
    assert again.plan is not None
    assert again.plan.is_there
    assert again.verified
    assert not convert("m", "out", overwrite=True).plan.is_there  # type: ignore[union-attr]

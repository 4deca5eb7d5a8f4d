"""Folders that ship what looks like wconv's own leavings, to have it do harm: they are data, and are not obeyed.

Each plant lies in a model's folder, or beside it, as a download or another user could have left it; a folder elsewhere
holds what must stay as it is.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_main
from safetensors.torch import save_file
from support import steps
from support.tiny import make_state, save, save_bin_shards, save_safetensors_shards, snapshot, write_json

from converter import BadFile, convert
from converter.run import execute as run
from converter.run import kept
from converter.run.parts import cut_pieces

STATE = make_state()
TOKEN = "0123456789abcdef" * 2
HARMLESS = b"alias ls='ls -l'\n"


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Give a folder with a model ``models/m``, its 8-bit form ``models/int8``, and a home with files of the user's."""
    model = tmp_path / "models" / "m"
    save_bin_shards(STATE, model)
    save_safetensors_shards(STATE, model)
    save(make_state(seed=1, dtype=torch.float16), model / "model.fp16.safetensors")
    save_file({"x.weight": torch.ones(8, 4)}, model / "linear.safetensors", {"format": "pt"})
    write_json(model / "config.json", {"architectures": ["Mine"]})
    home = tmp_path / "home"
    home.mkdir()
    (home / ".bashrc").write_bytes(HARMLESS)
    for name in ("config.json", "model.safetensors", "pytorch_model-00001-of-00003.bin", "files"):
        (home / name).write_text("mine")
    return tmp_path


def doomed(path: Path) -> dict[str, object]:
    """Describe a file as the journals of the first version did."""
    found = path.lstat()
    return {"path": str(path), "nbytes": found.st_size, "mtime_ns": found.st_mtime_ns,
            "ctime_ns": found.st_ctime_ns}  # fmt: skip


def journal(model: Path, move: Sequence[str] = (), first: Sequence[object] = (), last: Sequence[object] = ()) -> None:
    content = {"request": "x", "is_new": False, "first_away": list(first), "move": list(move), "last_away": list(last)}
    (model / ".staging.wconv" / "files").mkdir(parents=True, exist_ok=True)
    write_json(model / ".staging.wconv.json", content)


def moves_out(model: Path) -> None:
    journal(model, ["../../home/.bashrc"])
    (model / "home").mkdir()
    (model / "home" / ".bashrc").write_text("evil")


def moves_behind_a_link(model: Path) -> None:
    journal(model, ["link/.bashrc"])
    (model / "link").symlink_to("../../home")
    (model / ".staging.wconv" / "files" / "link").mkdir()
    (model / ".staging.wconv" / "files" / "link" / ".bashrc").write_text("evil")


def removes_elsewhere(model: Path) -> None:
    home = model.parent.parent / "home"
    journal(model, [], [doomed(home / ".bashrc")], [doomed(home / "config.json")])


def passes_a_guard(model: Path) -> None:
    home = model.parent.parent / "home"
    journal(model, [str(home / ".bashrc")], [], [doomed(home / ".bashrc")])


def staging_is_a_link(model: Path) -> None:
    (model / ".staging.wconv").symlink_to("../../home", target_is_directory=True)
    (model / f".staging-{TOKEN}.wconv").symlink_to("../../home", target_is_directory=True)


def staged_config(model: Path) -> None:
    journal(model, ["config.json"])
    for name in (".staging.wconv", f".staging-{TOKEN}.wconv"):
        (model / name / "files").mkdir(parents=True, exist_ok=True)
        write_json(model / name / "files" / "config.json", {"auto_map": "evil"})


def deep_journal(model: Path) -> None:
    (model / ".staging.wconv.json").write_bytes(b"[" * 5_000_000)


def empty_journal(model: Path) -> None:
    journal(model)
    (model / ".staging.wconv.json").write_bytes(b"")


def links_in_staging(model: Path) -> None:
    (model / ".staging.wconv").mkdir()
    (model / ".staging.wconv" / "files").symlink_to("../../../home", target_is_directory=True)
    (model / ".staging.wconv" / "journal.new").symlink_to("../../../home/.bashrc")
    (model / ".staging.wconv" / "lock").symlink_to("../../../home/.bashrc")


def a_link_among_staged_files(model: Path) -> None:
    journal(model)
    for name in ("model.safetensors", "config.json"):
        (model / ".staging.wconv" / "files" / name).symlink_to(f"../../../../home/{name}")


def fifos(model: Path) -> None:
    (model / ".staging.wconv").mkdir()
    for name in (".staging.wconv.json", ".staging.wconv/journal.new", ".staging.wconv/lock", ".wconv-undo"):
        os.mkfifo(model / name)
    os.mkfifo(model.parent / ".wconv-undo")


def undo_record(model: Path) -> None:
    state = {".bashrc": [4, 0, 0]}
    record = {"saved": ["../../home/.bashrc"], "made": ["../../home/config.json", "config.json"], "kept": state,
              "left": {}, "pending": ["../../home/.bashrc", "../../home/config.json", "config.json"]}  # fmt: skip
    for place in (
        model / ".wconv-undo" / "m",
        model.parent / ".wconv-undo" / "m",
        model.parent / ".wconv-undo" / "int8",
    ):
        (place / "files").mkdir(parents=True)
        write_json(place / "record.json", record)
        (place / "files" / "config.json").write_text("evil")


def undo_is_a_link(model: Path) -> None:
    (model.parent / ".wconv-undo").symlink_to("../home", target_is_directory=True)


def beside_the_output(model: Path) -> None:
    home = model.parent.parent / "home"
    for name in ("out", "out.safetensors"):
        content = {
            "request": "x",
            "is_new": True,
            "first_away": [],
            "move": [],
            "last_away": [doomed(home / ".bashrc")],
        }
        (model.parent / f".{name}.wconv" / "files").mkdir(parents=True)
        write_json(model.parent / f".{name}.wconv" / "files" / "config.json", {"auto_map": "evil"})
        write_json(model.parent / f".{name}.wconv.json", content)


PLANTS = [
    moves_out, moves_behind_a_link, removes_elsewhere, passes_a_guard, staging_is_a_link, staged_config, deep_journal,
    empty_journal, links_in_staging, a_link_among_staged_files, fifos, undo_record, undo_is_a_link, beside_the_output,
]  # fmt: skip
COMMANDS = [
    ("to-safetensors", "m", "--overwrite"),
    ("to-safetensors", "m", "-o", "out"),
    ("to-safetensors", "m/pytorch_model.bin.index.json", "--delete-source", "--overwrite"),
    ("recast", "m", "--dtype", "bf16"),
    ("recast", "m", "--dtype", "bf16", "--dry-run"),
    ("reshard", "m/model.safetensors.index.json", "--max-shard-size", "none", "--in-place"),
    ("rename-variant", "m", "--from", "fp16", "--to", "half"),
    ("to-bin", "m/model.safetensors.index.json", "--overwrite"),
    ("quantize", "m/../q", "-o", "out", "--include", "x"),
    ("dequantize", "int8", "-o", "out", "--dtype", "fp32"),
    ("prepare-coreml", "m", "-o", "out"),
    ("doctor", "m", "--fix", "--keep-default"),
    ("doctor", "m", "--undo"),
    ("doctor", "m", "--purge"),
    ("inspect", "m"),
    ("doctor", "m"),
]


@pytest.mark.skipif(os.name == "nt", reason="links and FIFOs")
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_nothing_that_a_folder_ships_is_obeyed(
    plant: Any, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends: dict[str, int] = {}
    for number, command in enumerate(COMMANDS):
        place = world / f"{number:02d}"
        make_copy(world, place)
        monkeypatch.chdir(place / "models")
        plant(place / "models" / "m")
        home, shipped = snapshot(place / "home"), planted(place / "models")
        config = (place / "models" / "m" / "config.json").read_bytes()
        with no_waiting():
            ends[" ".join(command)] = run_main(list(command))
        said = capsys.readouterr()
        assert snapshot(place / "home") == home, command
        assert shipped.items() <= planted(place / "models").items(), command
        assert (place / "models" / "m" / "config.json").read_bytes() == config, command
        out = place / "models" / "out"
        assert not list(out.rglob("*wconv*")) if out.exists() else True, command
        assert "evil" not in "".join(path.read_text("utf-8", "replace") for path in out.rglob("*.json")), command
        assert "Traceback" not in said.err, command
    # What can be done is done all the same.
    done = {command for command, code in ends.items() if not code}
    assert len(done) >= 8, ends
    assert set(ends.values()) <= {0, 1, 2, 3, 4, 5}, ends


def make_copy(world: Path, place: Path) -> None:
    """Copy the world, with a folder that can be quantized and one that is."""
    for name in ("home", "models"):
        shutil.copytree(world / name, place / name)
    (place / "models" / "q").mkdir()
    (place / "models" / "m" / "linear.safetensors").rename(place / "models" / "q" / "model.safetensors")
    write_json(place / "models" / "q" / "config.json", {"architectures": ["Mine"]})
    models = place / "models"
    assert not run_main(["quantize", str(models / "q"), "-o", str(models / "int8"), "--include", "x", "-q"])


def planted(models: Path) -> dict[str, str]:
    """Give all that looks like wconv's own, by content; FIFOs are not opened."""
    return {name: digest for name, digest in snapshot(models).items() if "wconv" in name}


class _HungError(BaseException):
    pass


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Let a command that waits for a FIFO fail; a minute is forever here."""

    def hung(*_: object) -> None:
        raise _HungError

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# Folders that are swapped for links while a command runs.

SWAPPED = {
    "beside": ("to-safetensors", "models/m", "--overwrite"),
    "new": ("to-safetensors", "models/m", "-o", "models/out"),
    "deleting": ("to-safetensors", "models/m", "--overwrite", "--delete-source"),
    "in place": ("reshard", "models/m", "--max-shard-size", "none", "--in-place"),
    "renaming": ("rename-variant", "models/m", "--from", "fp16", "--to", "half"),
    "mending": ("doctor", "models/m", "--fix"),
    "undoing": ("doctor", "models/m", "--undo"),
}


def make_pipeline(root: Path) -> None:
    """Make a pipeline to convert and to mend, and a home whose files have the same names."""
    model = root / "models" / "m"
    named = {name: ["diffusers", "UNet2DConditionModel"] for name in ("unet", "vae")}
    write_json(model / "model_index.json", {"_class_name": "StableDiffusionPipeline", **named})
    for name in named:
        save(STATE, model / name / "diffusion_pytorch_model.bin")
        save(make_state(seed=2), model / name / "diffusion_pytorch_model.safetensors")
        save(make_state(dtype=torch.float16), model / name / "diffusion_pytorch_model.fp16.safetensors")
        write_json(model / name / "diffusion_pytorch_model.bin.index.json", {"weight_map": {"a": "gone.bin"}})
        write_json(model / name / "config.json", {"_class_name": "UNet2DConditionModel"})
    shutil.copytree(model, root / "home" / "m")
    shutil.copytree(model / "unet", root / "home" / "unet")


@pytest.mark.skipif(os.name == "nt", reason="links")
@pytest.mark.parametrize("name", SWAPPED)
@pytest.mark.parametrize("swapped", ["models", "models/m", "models/m/unet"])
def test_a_folder_that_is_swapped_for_a_link_leads_nowhere(
    swapped: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(1, steps.MAX_STEPS):
        root = tmp_path / f"{number:03d}"
        make_pipeline(root)
        home = root / "home" if swapped == "models" else root / "home" / Path(swapped).name
        monkeypatch.chdir(root)
        if name == "undoing":
            assert run_main(["doctor", "models/m", "--fix", "-q"]) == 0
        before = snapshot(root / "home")
        reached: list[int] = []

        def swap(step: int, root: Any = root, home: Any = home, number: Any = number, reached: Any = reached) -> None:
            if step == number:
                reached.append(step)
                (root / swapped).rename(root / "aside")
                (root / swapped).symlink_to(home, target_is_directory=True)

        with steps.at_each_step(swap):
            run_main([*SWAPPED[name], "-q"])
        assert snapshot(root / "home") == before, number
        assert "Traceback" not in capsys.readouterr().err
        shutil.rmtree(root)
        if not reached:
            return
    raise AssertionError("the command did not end")


@pytest.mark.skipif(os.name == "nt", reason="links")
@pytest.mark.parametrize("command", ["to-safetensors", "to-bin"])
@pytest.mark.parametrize("how", ["link", "second name"])
def test_a_staging_folder_that_is_swapped_leads_nowhere(
    how: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / ".bashrc").write_bytes(HARMLESS * 1000)
    source = save(STATE, tmp_path / "m" / ("model.safetensors" if command == "to-bin" else "model.bin")).parent

    def swap(shard: Any, staged: Any, *more: Any) -> Any:
        path = staged.path
        if path.parent.is_symlink() or path.stat().st_nlink != 1:
            return cut_pieces(shard, staged, *more)
        path.parent.rename(tmp_path / "aside")
        evil = tmp_path / "evil" if how == "link" else path.parent
        evil.mkdir()
        if how == "link":
            (evil / path.name).symlink_to(home / ".bashrc")
            path.parent.symlink_to(evil)
        else:
            (evil / path.name).hardlink_to(home / ".bashrc")
        return cut_pieces(shard, staged, *more)

    monkeypatch.setattr(run, "cut_pieces", swap)
    assert run_main([command, str(source), "-o", str(tmp_path / "out")]) == 7
    assert (home / ".bashrc").read_bytes() == HARMLESS * 1000
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="links")
@pytest.mark.parametrize("swapped", ["m/tok", "m/tok/t.json", "m"])
def test_what_is_swapped_before_it_is_copied_is_not_passed_on(swapped: str, tmp_path: Path) -> None:
    source = save(STATE, tmp_path / "m" / "model.bin").parent
    write_json(source / "tok" / "t.json", {})
    shutil.copytree(source, tmp_path / "home" / "m")
    (tmp_path / "home" / "m" / "tok" / "t.json").write_text("a secret")

    def swap(_: int) -> None:  # the weights are written then, all else is not
        (tmp_path / swapped).rename(tmp_path / "aside")
        (tmp_path / swapped).symlink_to(tmp_path / "home" / swapped)

    with pytest.raises(BadFile, match=r"t\.json: was changed while it was read"):
        convert(source, tmp_path / "out", progress=swap)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs owners")
def test_nothing_is_kept_in_a_folder_of_another_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wconv: Callable[..., Any]
) -> None:
    source = save(STATE, tmp_path / "m" / "model.bin").parent
    write_json(source / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": {"a": "gone.bin"}})
    write_json(tmp_path / ".wconv-undo" / "theirs", {})
    before = snapshot(tmp_path)
    monkeypatch.setattr(kept, "is_mine", lambda found: False)
    assert "is no folder of yours" in wconv("doctor", source, "--fix", exit_code=5).stderr
    assert snapshot(tmp_path) == before

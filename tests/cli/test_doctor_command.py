"""``wconv doctor`` at the terminal: what it shows, its exit codes, its choices, and odd folders.

What it finds and mends is tested, against the real loaders, in ``tests/test_doctor.py``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import make_state, save, save_pipeline, save_safetensors_shards, snapshot, write_json

from converter.cli.doctor import command
from converter.cli.doctor_modes import asked_of
from converter.storage import place_of

STATE = make_state()
CONFIG = {"architectures": ["LlamaForCausalLM"]}


@pytest.fixture
def twins(tmp_path: Path) -> Path:
    """Give a folder with two sets of one name and other values."""
    folder = tmp_path / "m"
    save_safetensors_shards(STATE, folder)
    save(make_state(seed=1), folder / "model.safetensors")
    write_json(folder / "config.json", CONFIG)
    return folder


def test_a_healthy_folder(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_safetensors_shards(STATE, tmp_path)
    outcome = wconv("doctor", tmp_path)
    assert outcome.stdout.splitlines()[-1] == "Healthy."
    assert "3 + index" in outcome.stdout
    assert wconv("doctor", tmp_path, "-q").stdout == ""
    assert wconv("doctor", tmp_path, "--fix").stdout == outcome.stdout
    assert not (tmp_path.parent / ".wconv-undo").exists()


def test_findings_are_shown_worst_first(wconv: Callable[..., Any], twins: Path) -> None:
    (twins / "model.fp16.safetensors.part").write_bytes(b"")
    shown = wconv("doctor", twins, exit_code=1).stdout
    assert shown.index("error sets-twice") < shown.index("warning download-partial")
    assert "Diffusers loads the one with the index, transformers the single file." in shown
    assert shown.splitlines()[-1] == "1 error, 1 warning."


def test_notes_are_counted_and_shown_on_request(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(STATE, tmp_path / "model.safetensors")
    save(STATE, tmp_path / "pytorch_model.bin")
    assert wconv("doctor", tmp_path).stdout.splitlines()[-1] == "Healthy: 1 note (-v shows notes)."
    assert "note forms-redundant" in wconv("doctor", tmp_path, "-v").stdout


def test_what_a_loader_opens(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_pipeline(tmp_path / "m", variant="fp16")
    shown = wconv("doctor", tmp_path / "m", "--loader", "diffusers", "--variant", "fp16", exit_code=1).stdout
    assert "diffusers (diffusers 0.32 to 0.42, from a local folder), asked for variant='fp16', opens:" in shown
    assert "vae: diffusion_pytorch_model.fp16.bin" in shown
    assert "unet: fails: no file named diffusion_pytorch_model.fp16.bin" in shown
    told = json.loads(wconv("doctor", tmp_path / "m", "--loader", "coreml", "--json", exit_code=1).stdout)
    assert [one["works"] for one in told["loads"]] == [False]
    assert told["loads"][0]["variant"] == "fp16"


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("--loader", "transformers"), 0, "opens:"),
        (("--loader", "transformers", "--variant", "fp16"), 1, "fails: no file named pytorch_model.fp16.bin"),
        (("--variant", "fp16"), 1, "fails: "),
        (("--loader", "coreml"), 1, "fails: is no pipeline"),
        ((), 0, "Healthy."),
    ],
)
def test_a_loader_that_fails_is_a_failure(
    wconv: Callable[..., Any], tmp_path: Path, args: tuple[Any, ...], code: int, said: str
) -> None:
    save_safetensors_shards(STATE, tmp_path)
    write_json(tmp_path / "config.json", CONFIG)
    assert said in wconv("doctor", tmp_path, *args, exit_code=code).stdout
    loads = json.loads(wconv("doctor", tmp_path, *args, "--json", exit_code=code).stdout)["loads"]
    assert all(one["works"] for one in loads) == (code == 0)


def test_a_folder_with_nothing_for_transformers(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(STATE, tmp_path / "diffusion_pytorch_model.safetensors")
    shown = wconv("doctor", tmp_path, "--loader", "transformers", exit_code=1).stdout
    assert "fails: has no transformers model" in shown


@pytest.mark.parametrize("damage", [False, True])
def test_strays_with_other_values_go_on_request_and_come_back(
    wconv: Callable[..., Any], tmp_path: Path, damage: bool
) -> None:
    folder = tmp_path / "m"
    save_safetensors_shards(STATE, folder)
    write_json(folder / "config.json", CONFIG)
    for number in (1, 4):
        path = save(make_state(seed=number), folder / f"model-{number:05d}-of-00005.safetensors")
        path.write_bytes(path.read_bytes()[: -3 if damage else None])
    before = snapshot(folder)
    assert "--drop-strays" in wconv("doctor", folder, exit_code=1).stdout
    wconv("doctor", folder, "--fix", exit_code=1)
    assert snapshot(folder) == before
    shown = wconv("doctor", folder, "--fix", "--drop-strays", "--dry-run", exit_code=1).stdout
    assert "move model-00001-of-00005.safetensors away: --drop-strays" in shown
    assert "Would write 0 B." in shown
    wconv("doctor", folder, "--fix", "--drop-strays")
    assert not list(folder.glob("*-of-00005*"))
    assert len(list(folder.iterdir())) == 5
    wconv("doctor", folder, "--undo")
    assert snapshot(folder) == before


def test_strays_stay_where_the_set_is_not_whole(wconv: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    save_safetensors_shards(STATE, folder)
    save(STATE, folder / "model-00001-of-00005.safetensors")
    (folder / "model-00002-of-00003.safetensors").unlink()
    before = snapshot(folder)
    shown = wconv("doctor", folder, "--fix", "--drop-strays", exit_code=1).stdout
    assert "Nothing is touched while data are missing" in shown
    assert snapshot(folder) == before


class Engine:
    """A trainer's own."""


def write_others(folder: Path) -> dict[str, str]:
    """Write valid files that hold no model; give what each is."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(str(folder / "scripted.pt"))
        torch.export.save(torch.export.export(module, (torch.ones(1, 2),)), folder / "exported.pt2")
    (folder / "exported.pt2").rename(folder / "exported.pt")
    torch.save({"epoch": 3, "engine": Engine()}, folder / "wrapped.pt")
    torch.save(torch.ones(2), folder / "alone.pt")
    return {
        "alone.pt": "holds a tensor, not a state dict",
        "exported.pt": "is a program that torch.export.save wrote",
        "scripted.pt": "is a TorchScript archive (code and weights). torch.jit.load reads it",
        "wrapped.pt": f"It holds: epoch, engine (an object of the class {__name__}.Engine). Where you trust it",
    }


def test_valid_files_of_other_kinds_are_no_damage(wconv: Callable[..., Any], tmp_path: Path) -> None:
    said = write_others(tmp_path)
    save(STATE, tmp_path / "model.safetensors")
    told = json.loads(wconv("doctor", tmp_path, "--json").stdout)
    assert {one["code"] for one in told["findings"]} == {"file-other"}
    assert {Path(one["path"]).name for one in told["findings"]} == said.keys()
    for one in told["findings"]:
        assert said[Path(one["path"]).name] in one["problem"]
    for name, what in said.items():
        assert what in wconv("to-safetensors", tmp_path / name, "-o", tmp_path / "x", exit_code=4).stderr


def test_a_valid_file_of_another_kind_that_a_loader_would_pick(wconv: Callable[..., Any], tmp_path: Path) -> None:
    torch.save(torch.ones(2), tmp_path / "pytorch_model.bin")
    write_json(tmp_path / "config.json", CONFIG)
    told = json.loads(wconv("doctor", tmp_path, "--json", exit_code=1).stdout)
    assert [one["code"] for one in told["findings"]] == ["file-unread"]
    (tmp_path / "pytorch_model.bin").write_bytes((tmp_path / "pytorch_model.bin").read_bytes()[:-100])
    told = json.loads(wconv("doctor", tmp_path, "--json", exit_code=1).stdout)
    assert [one["code"] for one in told["findings"]] == ["file-damaged"]


def test_a_dry_run_says_what_would_be_opened(wconv: Callable[..., Any], twins: Path) -> None:
    before = snapshot(twins)
    shown = wconv("doctor", twins, "--fix", "--dry-run", "--keep", "shards", exit_code=1).stdout
    assert "move model.safetensors away: --keep shards" in shown
    assert "asked for no variant, would then open:" in shown
    assert "model.safetensors.index.json, model-00001-of-00003.safetensors" in shown
    assert snapshot(twins) == before


def test_without_a_choice_nothing_is_moved(wconv: Callable[..., Any], twins: Path) -> None:
    before = snapshot(twins)
    assert "nothing here that --fix can mend" in wconv("doctor", twins, "--fix", exit_code=1).stdout
    assert snapshot(twins) == before


def test_what_is_missing_stops_a_mending(wconv: Callable[..., Any], twins: Path) -> None:
    (twins / "model-00002-of-00003.safetensors").unlink()
    before = snapshot(twins)
    shown = wconv("doctor", twins, "--fix", exit_code=1).stdout
    assert "Nothing is touched while data are missing: " in shown
    assert snapshot(twins) == before


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(
    ("answer", "gone"), [("shards", "model.safetensors"), ("single", "model.safetensors.index.json")]
)
def test_on_a_terminal_it_asks(twins: Path, answer: str, gone: str) -> None:
    import pty

    master, slave = pty.openpty()
    command = [sys.executable, "-m", "converter", "doctor", str(twins), "--fix"]
    with subprocess.Popen(command, stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        os.write(master, f"{answer}\n".encode())
        out, err = process.communicate()
    os.close(slave)
    os.close(master)
    assert not process.returncode, out + err
    assert "Two sets of one variant: keep which?" in err
    assert not (twins / gone).exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_what_it_asks_has_no_control_characters(tmp_path: Path) -> None:
    import pty

    tag = "x\x1b[31m"
    save_pipeline(tmp_path / "m")
    for part in ("unet", "vae"):
        save(STATE, tmp_path / "m" / part / f"diffusion_pytorch_model.{tag}.bin")
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "converter", "doctor", str(tmp_path / "m"), "--fix"]
    with subprocess.Popen(command, stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        os.write(master, b"x\\x1b[31m\n")
        out, err = process.communicate()
    os.close(slave)
    os.close(master)
    assert b"(add, default, x\\x1b[31m) [add]:" in err
    assert b"\x1b" not in out + err


def test_json_of_a_mending(wconv: Callable[..., Any], twins: Path) -> None:
    told = json.loads(wconv("doctor", twins, "--fix", "--keep", "single", "--json").stdout)
    assert told["healthy"]
    assert told["fix"]["steps"] == [".: move model.safetensors.index.json away: --keep single"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--keep-default",), "That goes with --fix."),
        (("--fix", "--undo"), "Choose one of --fix, --undo and --purge."),
        (("--fix", "--only-variant", "fp16"), "has no variant 'fp16'"),
        (("--fix", "--make-variant", "best"), "names no dtype"),
        (("--undo",), "has nothing to undo"),
        (("--purge",), "has nothing to purge"),
    ],
)
def test_requests_that_cannot_be(wconv: Callable[..., Any], twins: Path, args: tuple[str, ...], said: str) -> None:
    before = snapshot(twins)
    assert said in wconv("doctor", twins, *args, exit_code=2).stderr
    assert snapshot(twins) == before


def test_no_folder_of_weights(wconv: Callable[..., Any], tmp_path: Path) -> None:
    assert "does not exist" in wconv("doctor", tmp_path / "gone", exit_code=3).stderr
    assert "holds no weights" in wconv("doctor", tmp_path, exit_code=3).stderr
    path = save(STATE, tmp_path / "model.bin")
    assert "is a file" in wconv("doctor", path, exit_code=2).stderr


def test_names_that_would_steer_the_terminal(wconv: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    save_safetensors_shards(STATE, folder)
    write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": {"a": "\x1b[2J.bin"}})
    shown = wconv("doctor", folder, "--loader", "transformers", exit_code=1).stdout
    assert "\x1b" not in shown
    assert "\\x1b[2J.bin" in shown


def test_a_variant_is_made_on_request(wconv: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    save(STATE, folder / "model.safetensors")
    wconv("doctor", folder, "--fix", "--make-variant", "bf16")
    assert (folder / "model.bf16.safetensors").exists()
    wconv("doctor", folder, "--fix", "--only-variant", "bf16")
    assert not (folder / "model.safetensors").exists()
    wconv("doctor", folder, "--undo")
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]


def test_a_variant_that_overflows_is_refused(wconv: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    save({name: tensor * 1e6 for name, tensor in STATE.items()}, folder / "model.safetensors")
    before = snapshot(tmp_path)
    said = wconv("doctor", folder, "--fix", "--make-variant", "fp16", exit_code=6).stderr
    assert "too large for F16" in said
    assert "wconv recast" in said
    assert snapshot(tmp_path) == before


def test_a_copied_folder_knows_nothing_of_the_first_ones_undo(
    wconv: Callable[..., Any], twins: Path, tmp_path: Path
) -> None:
    wconv("doctor", twins, "--fix", "--keep", "single")
    copy = shutil.copytree(twins, tmp_path / "copy")
    wconv("doctor", copy, "--undo", exit_code=2)


def test_an_option_that_nothing_takes_is_an_error() -> None:
    options = {param.name: None for param in command.params if param.name not in ("source", "fix", "undo", "purge")}
    assert asked_of(place_of("."), **options).source == place_of(".")
    with pytest.raises(TypeError, match="'varient'"):
        asked_of(place_of("."), **options, varient=None)

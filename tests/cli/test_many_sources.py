"""Several sources of one command: where each goes, what is said of those that fail, and what is skipped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import assert_same, load_set, make_state, names_in, save, save_bin_shards, snapshot

from converter import run_plan

pytestmark = pytest.mark.usefixtures("no_fsync")
STATES = {name: make_state(seed=number) for number, name in enumerate("abc")}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a folder with three files and a model's folder, and be there."""
    monkeypatch.chdir(tmp_path)
    for name, state in STATES.items():
        save(state, Path(f"{name}.pt"))
    save_bin_shards(STATES["a"], Path("model"))
    Path("model/config.json").write_text("{}")
    return tmp_path


def test_each_file_and_folder_has_its_place_in_the_output(files: Path, wconv: Callable[..., Any]) -> None:
    outcome = wconv("to-safetensors", "a.pt", "b.pt", "c.pt", "model/", "-o", "OUT/deep")
    for name, state in STATES.items():
        assert_same(load_file(files / "OUT" / "deep" / f"{name}.safetensors"), state)
    assert_same(load_set(files / "OUT" / "deep" / "model"), STATES["a"])
    assert (files / "OUT" / "deep" / "model" / "config.json").exists()
    assert outcome.stdout.endswith("\n4 of 4 converted.\n")
    assert "Load it with" not in outcome.stdout


@pytest.mark.parametrize("command", [("to-safetensors",), ("recast", "--dtype", "bf16", "--variant", "none")])
def test_without_an_output_each_goes_beside_its_source(
    command: tuple[str, ...], files: Path, wconv: Callable[..., Any]
) -> None:
    (files / "x").mkdir()
    (files / "b.pt").rename(files / "x" / "a.pt")  # the same name elsewhere is another place
    if command[0] == "recast":
        assert "--variant none" in wconv(*command, "a.pt", "x/a.pt", exit_code=2).stderr
        return
    wconv(*command, "a.pt", "x/a.pt", "model")
    assert_same(load_file(files / "a.safetensors"), STATES["a"])
    assert_same(load_file(files / "x" / "a.safetensors"), STATES["b"])
    assert len(list((files / "model").glob("*.safetensors"))) == 3


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (("recast", "--dtype", "fp16"), {"a.safetensors", "b.safetensors"}),
        (("reshard", "--max-shard-size", "none"), {"a.pt", "b.pt"}),
        (("to-bin",), {"a.pt", "b.pt"}),
        (("quantize", "--scheme", "fp8-scaled", "--include", "[ab]"), {"a.safetensors", "b.safetensors"}),
        (("dequantize",), {"a.safetensors", "b.safetensors"}),
    ],
)
def test_all_commands_that_write_weights_take_several(
    command: tuple[str, ...], names: set[str], files: Path, wconv: Callable[..., Any]
) -> None:
    sources = ["a.pt", "b.pt"]
    if "quantize" in command[0]:
        for name in sources:
            save({"a.weight": torch.randn(16, 16)}, files / name)
    if command[0] == "dequantize":
        wconv("quantize", *sources, "-o", "q", "--scheme", "fp8-scaled", "--include", "a")
        sources = ["q/a.safetensors", "q/b.safetensors"]
    wconv(command[0], *sources, "-o", "OUT", *command[1:])
    assert set(names_in(files / "OUT")) == names


@pytest.mark.parametrize(
    ("args", "exit_code", "said"),
    [
        (("a.pt", "b.pt", "-o", "x.safetensors"), 2, "x.safetensors: is a file name, and there are 2 sources. "),
        (("a.pt", "./a.pt"), 2, "a.pt: is named twice. Name it once."),
        (("a.pt", "link.pt"), 2, "link.pt: is named twice, as a.pt too. Name it once."),
        (("a.pt", "a.bin"), 2, "a.bin: would become a.safetensors, as a.pt would. "),
        (("a.pt", "x/a.pt", "-o", "OUT"), 2, "x/a.pt: would become OUT/a.safetensors, as a.pt would. "),
        (("model", "x/model", "-o", "OUT"), 2, "x/model: would become OUT/model, as model would. "),
        (("model", "model/pytorch_model-00001-of-00003.bin"), 2, "lies in model, which is named too. "),
        (("model/pytorch_model-00001-of-00003.bin", "model/pytorch_model-00002-of-00003.bin", "-o", "OUT"), 2,
         "would become OUT/model.safetensors, as model/pytorch_model-00001-of-00003.bin would. "),
        (("a.pt", "gone"), 3, "gone: does not exist. Check the path; where to write to is -o OUT."),
        (("*.pth", "a.pt"), 3, "*.pth: does not exist. Check the path"),
        (("*.pth",), 3, "*.pth: does not exist. Check the path."),
        (("empty",), 3, "empty: holds no weights. "),
        (("a.pt", "model", "-o", "model"), 2, "model: is model, which is a source. "),
        (("a.pt", "model", "-o", "model/x"), 2, "model/x: lies in model, which is a source. "),
        (("a.pt", "b.pt", "--skip-existing", "--overwrite"), 2, "leaves what --overwrite replaces. Choose one."),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_before_anything_is_written(
    args: tuple[str, ...], exit_code: int, said: str, files: Path, wconv: Callable[..., Any]
) -> None:
    save(STATES["a"], files / "a.bin")
    save(STATES["b"], files / "x" / "a.pt")
    save(STATES["b"], files / "x" / "model" / "model.bin")
    (files / "link.pt").symlink_to("a.pt")
    (files / "empty").mkdir()
    before = snapshot(files)
    outcome = wconv("to-safetensors", *args, exit_code=exit_code)
    assert said in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert snapshot(files) == before


def test_it_stops_at_the_first_error_or_goes_on(files: Path, wconv: Callable[..., Any]) -> None:
    (files / "b.pt").write_bytes(b"PK\x03\x04 and no more")
    save({"x": torch.ones(2).to_sparse()}, files / "d.pt")
    sources = ("a.pt", "b.pt", "c.pt", "d.pt", "gone.pt")
    outcome = wconv("to-safetensors", *sources[:4], "-o", "OUT", exit_code=3)
    assert names_in(files / "OUT") == ["a.safetensors"]
    outcome = wconv("to-safetensors", *sources, "-o", "OUT", "--keep-going", "--skip-existing", exit_code=4)
    assert names_in(files / "OUT") == ["a.safetensors", "c.safetensors"]
    assert [line.partition(":")[0] for line in outcome.stderr.splitlines()] == ["b.pt", "d.pt", "gone.pt"]
    assert outcome.stdout.endswith("\n1 of 5 converted; 1 there already; 3 failed.\n")
    assert "Skipped: OUT/a.safetensors is there already.\n" in outcome.stdout
    outcome = wconv("to-safetensors", *sources, "-o", "OUT", "--keep-going", "--skip-existing", "-q", exit_code=4)
    assert outcome.stdout == ""
    assert outcome.stderr.count("\n") == 3


def test_json_is_one_list(files: Path, wconv: Callable[..., Any]) -> None:
    (files / "b.pt").write_bytes(b"PK\x03\x04 and no more")
    wconv("to-safetensors", "a.pt", "-o", "OUT")
    options = ("-o", "OUT", "--keep-going", "--skip-existing", "--json")
    outcome = wconv("to-safetensors", "a.pt", "b.pt", "c.pt", *options, exit_code=3)
    skipped, failed, done = json.loads(outcome.stdout)
    assert skipped == {"source": "a.pt", "skipped": "OUT/a.safetensors"}
    assert failed.keys() == {"source", "error", "exit_code"}
    assert (failed["source"], failed["exit_code"], failed["error"]) == ("b.pt", 3, outcome.stderr.rstrip("\n"))
    assert (done["source"], done["dry_run"], len(done["weight_sets"])) == ("c.pt", False, 1)
    [failed] = json.loads(wconv("to-safetensors", "b.pt", "c.pt", "--json", exit_code=3).stdout)
    assert failed["source"] == "b.pt"
    assert json.loads(wconv("to-safetensors", "a.pt", "-o", "OUT", "--skip-existing", "--json").stdout) == skipped


def test_an_interrupt_ends_it(files: Path, wconv: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("converter.cli.convert.run_plan", interrupt)
    outcome = wconv("to-safetensors", "a.pt", "b.pt", "--keep-going", "--json", exit_code=130)
    assert json.loads(outcome.stdout) == []
    assert outcome.stderr.strip() == "Interrupted."


def test_a_bug_in_one_keeps_none_of_the_others(
    files: Path, wconv: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []

    def fail_once(*args: Any, **how: Any) -> Any:
        seen.append(args)
        if len(seen) == 1:
            raise ZeroDivisionError
        return run_plan(*args, **how)

    monkeypatch.setattr("converter.cli.convert.run_plan", fail_once)
    outcome = wconv("to-safetensors", "a.pt", "b.pt", "--keep-going", exit_code=70)
    assert "This is a bug in wconv." in outcome.stderr
    assert (files / "b.safetensors").exists()


def test_of_one_source_what_is_there_is_skipped_and_the_rest_is_not(
    files: Path, wconv: Callable[..., Any], tmp_path: Path
) -> None:
    save(STATES["b"], files / "a.safetensors")  # not what a.pt would become
    before = snapshot(files)
    assert "exists" in wconv("to-safetensors", "a.pt", exit_code=5).stderr
    outcome = wconv("to-safetensors", "a.pt", "--skip-existing")
    assert outcome.stdout.replace("./", "") == "Skipped: a.safetensors is there already.\n"
    assert "Skipped: " in wconv("to-safetensors", "a.pt", "-o", "a.safetensors", "--skip-existing").stdout
    assert snapshot(files) == before
    wconv("to-safetensors", "model", "-o", "OUT")
    assert "Skipped: OUT is there" in wconv("to-safetensors", "model", "-o", "OUT", "--skip-existing").stdout
    assert "is the source" in wconv("to-safetensors", "model", "-o", "model", "--skip-existing", exit_code=5).stderr


def test_a_set_that_is_there_is_left_and_others_are_written(files: Path, wconv: Callable[..., Any]) -> None:
    for tag in ("", ".fp16"):
        save({"m.a": torch.ones(2)}, files / "p" / f"pytorch_model{tag}.bin")
    save(STATES["b"], files / "p" / "model.fp16.safetensors")
    command = ("to-safetensors", "p", "--strip-prefix", "m.", "--skip-existing")
    assert "model.fp16.safetensors is there already, and stays as it is" in wconv(*command).stdout
    assert load_file(files / "p" / "model.safetensors").keys() == {"a"}
    assert_same(load_file(files / "p" / "model.fp16.safetensors"), STATES["b"])
    assert "Skipped: p/model" in wconv(*command).stdout

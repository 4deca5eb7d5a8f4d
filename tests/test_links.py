"""Links: nothing behind one is changed or given away, and the cache of the Hub stays as it is, whatever is asked."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.steps import refuse_to_list
from support.tiny import (
    assert_same,
    link,
    load_set,
    make_state,
    names_in,
    put_behind,
    save,
    save_bin_shards,
    save_pipeline,
    save_safetensors_shards,
    snapshot,
    write_json,
)

import converter.models.rest
from converter import Choices, Request, convert, diagnose, mend, open_model, plan_mending, plan_rename, verify
from converter.errors import BadRequest, OutputRefused, SystemRefused

STATE = make_state()
LAYOUTS = ("relative", "absolute", "chained", "hard")
CONFIG = {"architectures": ["LlamaForCausalLM"]}

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs links")


@pytest.fixture(autouse=True)
def never_hangs() -> Iterator[None]:
    """Fail where a command waits for ever, as for a writer of a FIFO."""

    def complain(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, complain)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def cache_of(folder: Path, how: str) -> Path:
    """Make a folder ``hub`` of the Hub's cache, beside a folder, that holds it as a snapshot; give the snapshot."""
    repo = folder.parent / "hub" / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0123abc")
    (repo / "snapshots").mkdir()
    shutil.copytree(folder, repo / "snapshots" / "0123abc")
    return put_behind(repo / "snapshots" / "0123abc", repo / "blobs", how)


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    """Load all weights below a folder, each under its component and name."""
    found = {}
    for file in sorted(path.rglob("*")):
        load = {".safetensors": load_file, ".bin": lambda one: torch.load(one, weights_only=True)}.get(file.suffix)
        if load is not None:
            found.update({f"{file.parent.relative_to(path)}/{name}": value for name, value in load(file).items()})
    return found


# The cache of the Hub.

BESIDE = (
    ["to-safetensors"],
    ["to-safetensors", "--delete-source"],
    ["to-bin", "--overwrite", "--max-shard-size", "none"],
    ["recast", "--dtype", "bf16"],
    ["reshard", "--max-shard-size", "none", "--in-place"],
    ["rename-variant", "--from", "none", "--to", "fp16"],
    ["doctor", "--fix"],
)
INTO = (
    ["to-safetensors"],
    ["quantize"],
    ["dequantize", "--dtype", "fp16"],
    ["prepare-coreml"],
)


def refused(wconv: Callable[..., Any], *args: object) -> str:
    """Run a command that is to refuse, in one line and before it prints anything; give the line."""
    done = wconv(*args, exit_code=5)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    return str(done.stderr)


@pytest.mark.parametrize("how", LAYOUTS)
def test_the_cache_of_the_hub_is_never_changed(how: str, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    place = cache_of(save_pipeline(tmp_path / "model"), how)
    before = snapshot(tmp_path)
    spelled = tmp_path / "by-link"
    spelled.symlink_to(place, target_is_directory=True)
    for source in (place, place / "vae", place / "vae" / "diffusion_pytorch_model.bin", place.parent.parent, spelled):
        for command, *options in BESIDE:
            if command == "doctor" and source.is_file():
                continue
            for dry in ([], ["--dry-run"]):
                said = refused(wconv, command, source, *options, *dry)
                assert "cache of the Hub" in said
                advice = "cp -rL" if command in ("doctor", "rename-variant") else "-o NEW"
                assert advice in said
    for command, *options in INTO:
        for output in (place / "new", place, place.parent / "new", place.parent.parent / "new", spelled / "new"):
            refused(wconv, command, place, "-o", output, *options, "--dry-run")
            refused(wconv, command, tmp_path / "model", "-o", output, *options)
    said = refused(wconv, "to-safetensors", place, "-o", tmp_path / "new", "--delete-source")
    assert "Leave --delete-source out" in said
    spelled.unlink()
    assert snapshot(tmp_path) == before


def test_a_cache_is_known_before_it_is_read(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    place = cache_of(save_bin_shards(STATE, tmp_path / "model").parent, "relative")
    (place / "pytorch_model.bin.index.json").resolve().write_text("{")
    refused(wconv, "recast", place, "--dtype", "bf16", "--dry-run")
    refused(wconv, "doctor", place, "--fix", "--dry-run")


def test_the_library_refuses_the_cache_as_well(tmp_path: Path) -> None:
    place = cache_of(save_bin_shards(STATE, tmp_path / "model").parent, "relative")
    before = snapshot(tmp_path)
    for call in (
        lambda: convert(place),
        lambda: convert(tmp_path / "model", place / "out"),
        lambda: convert(place, tmp_path / "out", delete_source=True),
        lambda: plan_rename(Request.of(place, from_variant="none", variant="fp16")),
        lambda: mend(place, plan_mending(diagnose(place).inventory, (), Choices())),
    ):
        with pytest.raises(OutputRefused, match="cache of the Hub"):
            call()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("how", LAYOUTS)
def test_a_cache_is_read_into_a_new_folder_without_links(how: str, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    model = save_pipeline(tmp_path / "model")
    place = cache_of(model, how)
    before = snapshot(tmp_path / "hub")
    for command, *options in (
        ["to-safetensors"],
        ["to-bin", "--max-shard-size", "none"],
        ["reshard", "--max-shard-size", "none"],
        ["recast", "--dtype", "fp32", "--variant", "none"],
    ):
        wconv(command, place, "-o", tmp_path / command, *options)
        assert_same(weights_of(tmp_path / command), weights_of(model))
        assert not any(path.is_symlink() for path in (tmp_path / command).rglob("*"))
        others = {name for name in names_in(model) if not name.endswith((".bin", ".index.json"))}
        assert others <= set(names_in(tmp_path / command))
        wconv("verify", place, tmp_path / command, *(["--cast"] if command == "recast" else []))
    wconv("inspect", place)
    wconv("doctor", place, exit_code=1)
    assert snapshot(tmp_path / "hub") == before


@pytest.mark.parametrize("how", ["relative", "absolute", "chained"])
def test_a_folder_of_links_into_the_cache_is_of_the_cache(how: str, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    blob = tmp_path / "hub" / "models--org--name" / "blobs" / "0123"
    save(STATE, tmp_path / "pytorch_model.bin")
    blob.parent.mkdir(parents=True)
    shutil.move(tmp_path / "pytorch_model.bin", blob)
    link(tmp_path / "mine" / "pytorch_model.bin", blob, how)
    save(make_state("x"), tmp_path / "mine" / "other.bin")
    before = snapshot(tmp_path)
    for source in ("mine", "mine/pytorch_model.bin"):
        said = refused(wconv, "to-safetensors", tmp_path / source, "--delete-source")
        assert "mine/pytorch_model.bin: " in said
        assert "the cache of the Hub" in said
    refused(wconv, "doctor", tmp_path / "mine", "--fix", "--dry-run")
    assert snapshot(tmp_path) == before
    wconv("to-safetensors", tmp_path / "mine" / "other.bin")


# The names of models in the cache.


def test_a_model_of_the_cache_means_its_snapshot(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    place = cache_of(save_pipeline(tmp_path / "model"), "relative")
    (place.parent / "older").mkdir()
    for name in (tmp_path / "hub", tmp_path / "hub" / "models--org--name", place.parent):
        assert open_model(name).root.path == place
        assert diagnose(name).inventory.path.path == place
        assert str(place) in wconv("inspect", name).stdout
        wconv("doctor", name, "--loader", "coreml", exit_code=1)
        wconv("to-safetensors", name, "-o", tmp_path / "out", "--overwrite")
        wconv("verify", name, tmp_path / "out")


@pytest.mark.parametrize("main", [None, "gone", "../../../elsewhere", "..", "x" * 5_000, ""])
def test_several_snapshots_are_listed(main: str | None, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    place = cache_of(save_bin_shards(STATE, tmp_path / "model").parent, "relative")
    (place.parent.parent / "refs" / "main").unlink()
    assert open_model(tmp_path / "hub").root.path == place  # the only one
    (place.parent / "older").mkdir()
    if main is not None:
        (place.parent.parent / "refs" / "main").write_text(main)
    said = wconv("inspect", tmp_path / "hub", exit_code=2).stderr
    assert f"Name one: {place}, {place.parent / 'older'}." in said


def test_several_models_are_listed(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    place = cache_of(save_bin_shards(STATE, tmp_path / "model").parent, "relative")
    shutil.copytree(place.parent.parent, tmp_path / "hub" / "models--org--other", symlinks=True)
    (tmp_path / "hub" / "CACHEDIR.TAG").write_text("x")
    (tmp_path / "hub" / ".locks").mkdir()
    for command in ("inspect", "doctor"):
        said = wconv(command, tmp_path / "hub", exit_code=2).stderr
        assert "models--org--name" in said
        assert "models--org--other" in said
    refused(wconv, "to-safetensors", tmp_path / "hub")
    save(STATE, tmp_path / "hub" / "mine.bin")  # a folder of one's own with a cache in it is no cache
    wconv("to-safetensors", tmp_path / "hub")


def test_a_model_without_snapshots_says_so(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    (tmp_path / "models--a--b" / "snapshots").mkdir(parents=True)
    assert "holds no snapshot" in wconv("inspect", tmp_path / "models--a--b", exit_code=3).stderr


# Other links: read through, and never changed behind.


@pytest.fixture(params=LAYOUTS)
def linked(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Give a folder of links to shards in a store, with an index and a config."""
    folder = save_safetensors_shards(STATE, tmp_path / "model").parent
    write_json(folder / "config.json", CONFIG)
    return put_behind(folder, tmp_path / "store", request.param)


def test_renaming_links_moves_the_links_alone(linked: Path, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    before = snapshot(tmp_path / "store")
    was_link = (linked / "model-00001-of-00003.safetensors").is_symlink()
    wconv("rename-variant", linked, "--from", "none", "--to", "fp16")
    shard = linked / "model.fp16-00001-of-00003.safetensors"
    assert shard.is_symlink() == was_link
    assert_same(weights_of(linked), {f"./{name}": value for name, value in STATE.items()})
    assert len(names_in(linked)) == 5
    wconv("rename-variant", linked, "--from", "fp16", "--to", "none")
    assert_same(load_set(linked), STATE)
    assert snapshot(tmp_path / "store") == before


@pytest.mark.parametrize("nbytes", ["none", "64B", "96B"])
def test_resharding_links_in_place_leaves_the_store(
    nbytes: str, linked: Path, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    before = snapshot(tmp_path / "store")
    wconv("reshard", linked, "--max-shard-size", nbytes, "--in-place")
    assert_same(load_set(linked), STATE)
    assert snapshot(tmp_path / "store") == before


@pytest.mark.parametrize("how", LAYOUTS)
def test_a_shard_that_stays_stays_a_link(how: str, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    folder = save_safetensors_shards(STATE, tmp_path / "model", ("ab", "cd", "e", "f")).parent
    put_behind(folder, tmp_path / "store", how)
    before = snapshot(tmp_path / "store")
    wconv("reshard", folder, "--max-shard-size", "64B", "--in-place")
    assert_same(load_set(folder), STATE)
    assert (folder / "model-00002-of-00003.safetensors").is_symlink() == (how != "hard")
    assert snapshot(tmp_path / "store") == before


def test_mending_links_keeps_them_and_puts_them_back(linked: Path, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    for path in sorted(linked.glob("*-of-*")):
        path.rename(linked / path.name.replace(".safetensors", ".fp16.safetensors"))
    (linked / "model.safetensors.index.json").unlink()
    before = snapshot(tmp_path)
    wconv("doctor", linked, "--fix", "--dry-run", exit_code=1)
    assert snapshot(tmp_path) == before
    wconv("doctor", linked, "--fix", exit_code=None)
    assert_same(weights_of(linked), {f"./{name}": value for name, value in STATE.items()})
    assert snapshot(tmp_path / "store") == {
        name.removeprefix("store/"): held for name, held in before.items() if name.startswith("store/")
    }
    wconv("doctor", linked, "--undo")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("output", [[], ["-o", "new"]])
@pytest.mark.parametrize("how", LAYOUTS)
def test_deleting_a_source_of_links_leaves_the_store(
    how: str, output: list[Any], tmp_path: Path, wconv: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = put_behind(save_bin_shards(STATE, tmp_path / "model").parent, tmp_path / "store", how)
    before = snapshot(tmp_path / "store")
    wconv("to-safetensors", folder, "--delete-source", *output)
    assert_same(load_set(tmp_path / "new" if output else folder), STATE)
    assert not list(folder.glob("*.bin*"))
    assert snapshot(tmp_path / "store") == before


@pytest.mark.parametrize("how", LAYOUTS)
def test_output_in_the_place_of_a_link_replaces_the_link(how: str, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    save(STATE, tmp_path / "model" / "pytorch_model.bin")
    save(make_state(seed=1), tmp_path / "store" / "x" / "model.safetensors")
    link(tmp_path / "model" / "model.safetensors", tmp_path / "store" / "x" / "model.safetensors", how)
    wconv("to-safetensors", tmp_path / "model" / "pytorch_model.bin", "--overwrite")
    assert_same(load_set(tmp_path / "model"), STATE)
    assert not (tmp_path / "model" / "model.safetensors").is_symlink()
    assert_same(load_set(tmp_path / "store" / "x"), make_state(seed=1))


# A component that lies elsewhere.


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """Give a pipeline whose unet is a link to a folder elsewhere."""
    folder = save_pipeline(tmp_path / "model")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(folder / "unet", tmp_path / "elsewhere" / "unet")
    (tmp_path / "elsewhere" / "unet" / "notes.txt").write_text("private")
    (tmp_path / "elsewhere" / "unet" / "more").mkdir()
    (tmp_path / "elsewhere" / "unet" / "more" / "deep.txt").write_text("private")
    (folder / "unet").symlink_to(Path("..", "elsewhere", "unet"), target_is_directory=True)
    return folder


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize("asked", [*BESIDE, ["to-safetensors", "-o", "OUT", "--delete-source"]], ids=" ".join)
def test_nothing_is_changed_in_a_component_that_is_a_link(
    asked: list[str], dry: list[Any], pipeline: Path, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    before = snapshot(tmp_path)
    words = [tmp_path / "out" if word == "OUT" else word for word in asked[1:]]
    done = wconv(asked[0], pipeline, *words, *dry, exit_code=5)
    assert done.stderr.count("\n") == 1
    assert f"{pipeline / 'unet'}: is a link to another folder" in done.stderr
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("where", ["elsewhere", "within"])
def test_a_link_in_the_output_is_not_written_through(where: str, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    save_pipeline(tmp_path / "model")
    (tmp_path / "out").mkdir()
    place = tmp_path / "elsewhere" if where == "elsewhere" else tmp_path / "out" / "vae"
    place.mkdir()
    (tmp_path / "out" / "unet").symlink_to(place, target_is_directory=True)
    before = snapshot(tmp_path)
    wconv("to-safetensors", tmp_path / "model", "-o", tmp_path / "out", "--overwrite", exit_code=5)
    assert snapshot(tmp_path) == before


def test_a_component_that_is_a_link_is_read(pipeline: Path, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    told = wconv("to-safetensors", pipeline, "-o", tmp_path / "out").stdout
    assert_same(weights_of(tmp_path / "out"), weights_of(pipeline) | weights_of_unet(tmp_path))
    assert (tmp_path / "out" / "unet" / "config.json").is_file()
    assert "unet/notes.txt" not in names_in(tmp_path / "out")
    for name in ("unet/notes.txt", "unet/more"):
        assert f"not carried over: {name} (behind a link: --follow-links carries it)" in told
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    wconv("to-safetensors", pipeline, "-o", tmp_path / "all", "--follow-links")
    assert {"unet/notes.txt", "unet/more/deep.txt"} <= set(names_in(tmp_path / "all"))


def test_what_lies_behind_links_is_shown(pipeline: Path, wconv: Callable[..., Any]) -> None:
    (pipeline / "docs").symlink_to(pipeline.parent, target_is_directory=True)
    found = json.loads(wconv("inspect", pipeline, "--json").stdout)
    assert found["linked"] == ["docs", "unet/more", "unet/notes.txt"]
    assert "unet/config.json" in found["not_weights"]


def weights_of_unet(tmp_path: Path) -> dict[str, torch.Tensor]:
    """``Path.rglob`` goes behind no link."""
    return {f"unet/{name.partition('/')[2]}": v for name, v in weights_of(tmp_path / "elsewhere" / "unet").items()}


def test_other_weights_of_a_component_that_is_a_link_come_along(
    pipeline: Path, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    wconv("to-safetensors", pipeline, "--component", "vae", "-o", tmp_path / "out")
    assert len(list((tmp_path / "out" / "unet").glob("*.bin*"))) == 3


# What is a link to another place is not given away.


@pytest.fixture
def with_secrets(tmp_path: Path) -> Path:
    """Give a pipeline that has links out: to a file, to a folder, and to what it calls weights."""
    folder = save_pipeline(tmp_path / "model")
    (tmp_path / "home" / "docs").mkdir(parents=True)
    (tmp_path / "home" / "key").write_text("secret")
    (tmp_path / "home" / "docs" / "letter.txt").write_text("secret")
    (folder / "tokenizer" / "tokenizer.json").symlink_to(tmp_path / "home" / "key")
    (folder / "scheduler" / "way.json").symlink_to(Path("..", "..", "home", "key"))
    (folder / "docs").symlink_to(tmp_path / "home" / "docs", target_is_directory=True)
    (folder / "here.json").symlink_to("model_index.json")
    (folder / "vae" / "diffusion_pytorch_model.bin").unlink()
    (folder / "vae" / "diffusion_pytorch_model.bin").symlink_to(tmp_path / "home" / "key")
    return folder


def test_links_out_are_named_and_not_carried_over(
    with_secrets: Path, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    told = wconv("to-safetensors", with_secrets, "--component", "unet", "-o", tmp_path / "out").stdout
    assert not any("secret" in path.read_text("latin-1") for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert (tmp_path / "out" / "here.json").read_bytes() == (with_secrets / "model_index.json").read_bytes()
    for name in ("tokenizer/tokenizer.json", "scheduler/way.json", "docs", "vae/diffusion_pytorch_model.bin"):
        assert f"not carried over: {name} (behind a link" in told
        assert not (tmp_path / "out" / name).exists()


def test_links_out_are_carried_over_when_that_is_asked_for(
    with_secrets: Path, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    wconv("to-safetensors", with_secrets, "--component", "unet", "-o", tmp_path / "out", "--follow-links")
    for name in ("tokenizer/tokenizer.json", "scheduler/way.json", "docs/letter.txt"):
        assert (tmp_path / "out" / name).read_text() == "secret"
        assert not (tmp_path / "out" / name).is_symlink()


@pytest.mark.parametrize(
    "asked", [["recast", "--dtype", "bf16", "--variant", "none"], ["dequantize", "--dtype", "fp16"]]
)
def test_a_config_elsewhere_is_not_written_anew_into_the_output(
    asked: list[str], tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    state: dict[str, torch.Tensor] = dict(STATE)
    if asked[0] == "dequantize":
        state = {"a.weight": torch.ones(2, 2, dtype=torch.int8), "a.SCB": torch.ones(2)}
    save(state, tmp_path / "model" / "model.safetensors")
    quantized = {"quantization_config": {"load_in_8bit": True, "quant_method": "bitsandbytes"}}
    write_json(tmp_path / "home.json", {**CONFIG, **quantized, "dtype": "float32", "auth": "secret"})
    (tmp_path / "model" / "config.json").symlink_to(Path("..", "home.json"))
    command, *options = [*asked, "--force"] if asked[0] == "recast" else asked
    out = tmp_path / "out"
    said = wconv(command, tmp_path / "model", "-o", out, *options, exit_code=5).stderr
    assert "config.json: is a link out of the folder" in said
    assert not out.exists()
    wconv(command, tmp_path / "model", "-o", out, *options, "--follow-links")
    assert "secret" in (out / "config.json").read_text()


def test_what_runs_leave_is_not_carried_over(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    save(STATE, tmp_path / "model" / "pytorch_model.bin")
    left = (".staging.wconv.json", ".staging.wconv-0f3a.json", ".out.wconv", ".out.wconv.json", ".wconv-undo", ".notes")
    for name in left:
        (tmp_path / "model" / name).write_text("x")
    (tmp_path / "model" / "sub").mkdir()
    (tmp_path / "model" / "sub" / ".x.wconv").write_text("x")
    wconv("to-safetensors", tmp_path / "model", "-o", tmp_path / "out")
    assert names_in(tmp_path / "out") == [".notes", "model.safetensors"]


@pytest.mark.parametrize("follow", [[], ["--follow-links"]])
def test_links_in_circles_end(follow: list[Any], tmp_path: Path, wconv: Callable[..., Any]) -> None:
    folder = save(STATE, tmp_path / "model" / "pytorch_model.bin").parent
    for number in range(24):  # 2 to the power of 24 paths
        (folder / f"d{number}").mkdir()
        for side in "ab":
            (folder / f"d{number}" / side).symlink_to(Path("..", f"d{(number + 1) % 24}"), target_is_directory=True)
    (folder / "self").symlink_to("self")
    (folder / "up").symlink_to(tmp_path, target_is_directory=True)
    (folder / "d0" / "x.txt").write_text("x")
    wconv("to-safetensors", folder, "-o", tmp_path / "out", *follow)
    wconv("inspect", folder)
    assert 2 <= len(names_in(tmp_path / "out")) <= 3


def test_too_much_behind_links_is_refused(
    tmp_path: Path, wconv: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converter.models.rest, "_MAX_BEHIND_LINKS", 10)
    folder = save(STATE, tmp_path / "model" / "pytorch_model.bin").parent
    (tmp_path / "many").mkdir()
    for number in range(11):
        (tmp_path / "many" / f"{number}.txt").touch()
    (folder / "docs").symlink_to(tmp_path / "many", target_is_directory=True)
    wconv("to-safetensors", folder, "-o", tmp_path / "out")
    said = wconv("to-safetensors", folder, "-o", tmp_path / "all", "--follow-links", exit_code=3).stderr
    assert "docs: leads to more than 10 files" in said


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_link_to_a_process_ends(tmp_path: Path, wconv: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converter.models.rest, "_MAX_BEHIND_LINKS", 1_000)
    folder = save(STATE, tmp_path / "model" / "pytorch_model.bin").parent
    (folder / "docs").symlink_to("/proc/self", target_is_directory=True)
    wconv("to-safetensors", folder, "-o", tmp_path / "out")
    wconv("to-safetensors", folder, "-o", tmp_path / "all", "--follow-links", exit_code=None)
    (folder / "docs").unlink()
    (folder / "map.json").symlink_to("/proc/self/pagemap")  # says it is empty, and has no end
    wconv("to-safetensors", folder, "-o", tmp_path / "map", "--follow-links")
    assert (tmp_path / "map" / "map.json").read_bytes() == b""


@pytest.mark.parametrize("name", ["sub", "sub/deep"])
def test_a_folder_that_cannot_be_read_is_no_silence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(STATE, tmp_path / "model" / "pytorch_model.bin").parent
    (folder / "sub" / "deep").mkdir(parents=True)
    refuse_to_list(monkeypatch, folder / name)
    for made in ("plain", "pipeline"):
        with pytest.raises(SystemRefused, match=f"{name}: permission denied"):
            convert(folder, tmp_path / "out")
        if made == "plain":
            save_pipeline(folder)
    assert not (tmp_path / "out").exists()


# What is no file is passed over.


@pytest.fixture
def pipes(tmp_path: Path) -> Path:
    """Give a pipeline with FIFOs, a socket and a device by names that would be read."""
    folder = save_pipeline(tmp_path / "model")
    for name in ("a.bin", "model.safetensors", "x.gguf", "notes.txt", "vae/model.fp16.safetensors", "vae/dotless",
                 "vae/diffusion_pytorch_model.safetensors.index.json", "tokenizer/tokenizer.json",
                 "text_encoder/config.json"):  # fmt: skip
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    (folder / "zero.bin").symlink_to("/dev/zero")
    here = Path.cwd()
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(folder)  # the path of a socket must be short
        server.bind("socket.bin")
        os.chdir(here)
    return folder


@pytest.mark.parametrize(
    "asked",
    [["inspect"], ["doctor"], ["doctor", "--fix"], ["verify", "SRC"], ["to-safetensors", "-o", "OUT"],
     ["to-safetensors"], ["recast", "--dtype", "bf16"], ["to-bin", "--overwrite"],
     ["quantize", "-o", "OUT", "--dry-run"], ["dequantize", "-o", "OUT", "--dtype", "fp16"],
     ["prepare-coreml", "-o", "OUT"], ["rename-variant", "--from", "none", "--to", "fp16"],
     ["reshard", "--in-place", "--max-shard-size", "none"]],
    ids=" ".join,
)  # fmt: skip
def test_no_command_opens_a_pipe(asked: list[str], pipes: Path, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    named = {"SRC": pipes, "OUT": tmp_path / "out"}
    wconv(asked[0], pipes, *(named.get(word, word) for word in asked[1:]), exit_code=None)
    if (tmp_path / "out").exists():
        assert all(path.is_dir() or path.is_file() for path in (tmp_path / "out").rglob("*"))
        assert not {"notes.txt", "zero.bin"} & set(names_in(tmp_path / "out"))


@pytest.mark.parametrize(
    "name", ["a.bin", "model.safetensors", "model.safetensors.index.json", "model-00001-of-00002.bin"]
)
def test_a_pipe_is_refused_in_one_line(name: str, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    pipe = tmp_path / name
    os.mkfifo(pipe)
    out = ["-o", tmp_path / "out"]
    for command, *options in (["inspect"], ["doctor"], ["verify", pipe], ["to-safetensors"], ["quantize", *out],
                              ["dequantize", *out, "--dtype", "fp16"], ["prepare-coreml", *out],
                              ["rename-variant", "--from", "none", "--to", "a"]):  # fmt: skip
        done = wconv(command, pipe, *options, exit_code=None)
        assert done.exit_code in (2, 3)
        assert (done.stdout, done.stderr.count("\n")) == ("", 1)


# Paths that are none.


@pytest.mark.parametrize(
    "words",
    [["to-safetensors", "", "--delete-source"], ["to-safetensors", ".", "-o", ""], ["inspect", ""], ["doctor", ""],
     ["verify", "", "."], ["verify", ".", ""], ["quantize", "", "-o", "x"], ["quantize", ".", "-o", ""],
     ["dequantize", ".", "-o", "", "--dtype", "fp16"], ["prepare-coreml", ".", "-o", ""],
     ["prepare-coreml", ".", "-o", "x", "--config", ""], ["rename-variant", "", "--from", "none", "--to", "x"]],
    ids=" ".join,
)  # fmt: skip
def test_an_empty_text_is_no_path(
    words: list[str], tmp_path: Path, wconv: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(STATE, tmp_path / "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    assert "An empty text is no path" in wconv(*words, exit_code=2).stderr
    assert snapshot(tmp_path) == before


def run_bound(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder whose ``n`` is another name of its ``m``."""
    (folder / "n").mkdir()
    run = f"mount --bind m n && echo bound && {sys.executable} -m converter {command}"
    said = subprocess.run(
        [shutil.which("unshare") or "false", "-rm", "sh", "-c", run],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if not said.stdout.startswith("bound"):
        pytest.skip("the system lets nobody bind folders")
    return said


@pytest.mark.parametrize("command", ["to-safetensors", "recast --dtype bf16", "quantize"])
def test_the_source_is_known_by_another_name_of_its_disk(command: str, tmp_path: Path) -> None:
    save(STATE, tmp_path / "m" / "pytorch_model.bin")
    before = snapshot(tmp_path / "m")
    assert "n: is the source itself" in run_bound(tmp_path, f"{command} m -o n --overwrite").stderr
    assert snapshot(tmp_path / "m") == before


def test_what_was_just_written_is_not_removed_as_the_source(tmp_path: Path) -> None:
    save(STATE, tmp_path / "m" / "model.safetensors")
    command = "recast m/model.safetensors --dtype bf16 -o n/model.safetensors --overwrite --delete-source"
    assert run_bound(tmp_path, command).returncode == 0
    assert load_file(tmp_path / "m" / "model.safetensors")["a"].dtype is torch.bfloat16


@pytest.mark.parametrize("output", ["m/out", "FULL/m/out", "m/../m/out"])
def test_an_output_in_the_source_is_not_carried_into_itself(
    output: str, tmp_path: Path, wconv: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(STATE, tmp_path / "m" / "pytorch_model.bin")
    (tmp_path / "m" / "out").mkdir()
    (tmp_path / "m" / "out" / "notes.txt").write_text("of before")
    monkeypatch.chdir(tmp_path)
    wconv("to-safetensors", "m", "-o", output.replace("FULL", str(tmp_path)), "--overwrite")
    assert {path.name for path in Path("m/out").iterdir()} == {"model.safetensors", "notes.txt"}


def test_an_empty_text_is_no_path_for_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(STATE, tmp_path / "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    for call in (
        lambda: convert("", delete_source=True),
        lambda: convert(".", ""),
        lambda: verify("", "."),
        lambda: verify(".", ""),
        lambda: diagnose(""),
    ):
        with pytest.raises(BadRequest, match="is no path"):
            call()
    assert names_in(tmp_path) == ["pytorch_model.bin"]


@pytest.mark.parametrize("to", ["nowhere", "link"])
@pytest.mark.parametrize("below", ["", "new", "new.safetensors"])
def test_output_on_a_link_to_nothing_is_refused(below: str, to: str, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    save(STATE, tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "link").symlink_to(to)
    before = snapshot(tmp_path)
    for source in ("model", "model/pytorch_model.bin")[bool(below.endswith("s")) :]:
        for dry in ([], ["--dry-run"]):
            said = refused(wconv, "to-safetensors", tmp_path / source, "-o", tmp_path / "link" / below, *dry)
            assert f"{tmp_path / 'link'}: is a link to nothing" in said
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("to", ["nowhere", "model"])
def test_a_source_that_is_a_link_to_nothing_is_said(to: str, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    (tmp_path / "model").symlink_to(to)
    for command, *options in (["inspect"], ["doctor"], ["doctor", "--fix"], *BESIDE):
        assert "is a link to nothing" in wconv(command, tmp_path / "model", *options, exit_code=3).stderr
        wconv(command, tmp_path / "model" / "below", *options, exit_code=3)


def test_mending_makes_no_file_of_a_link(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    folder = save_pipeline(tmp_path / "model", "fp16")
    (tmp_path / "key").write_text("secret")
    (folder / "vae" / "LICENSE").symlink_to(Path("..", "..", "key"))
    (folder / "vae" / "NOTICE").write_text("x")
    before = snapshot(tmp_path)
    wconv("doctor", folder, "--fix", exit_code=None)
    assert (folder / "vae" / "LICENSE.txt").readlink() == Path("..", "..", "key")
    assert (folder / "vae" / "NOTICE.txt").read_text() == "x"
    assert not (folder / "vae" / "NOTICE").exists()
    wconv("doctor", folder, "--undo")
    assert snapshot(tmp_path) == before


def test_the_doctor_looks_past_a_link_to_itself(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    save(STATE, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").symlink_to("model.safetensors")
    assert "is a link to nothing" in wconv("doctor", tmp_path, exit_code=1).stdout


def test_output_in_the_place_of_a_link_to_nothing_is_refused(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    save(STATE, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").symlink_to("nowhere")
    before = snapshot(tmp_path)
    for dry in ([], ["--dry-run"]):
        said = refused(wconv, "to-safetensors", tmp_path / "pytorch_model.bin", *dry)
        assert "model.safetensors: is a link to nothing" in said
    assert snapshot(tmp_path) == before
    wconv("to-safetensors", tmp_path, "--overwrite")
    assert_same(load_set(tmp_path), STATE)
    assert not (tmp_path / "nowhere").exists()


def test_folders_in_folders_without_end_are_refused(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    source = save_bin_shards(make_state(), tmp_path / "m").parent
    (source / "/".join("d" * 200)).mkdir(parents=True)
    assert "has folders in folders" in wconv("to-safetensors", source, "-o", tmp_path / "out", exit_code=3).stderr
    assert not (tmp_path / "out").exists()

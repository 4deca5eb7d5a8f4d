"""From anywhere to anywhere: the files that a conversion on this machine writes, byte for byte, and no others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from support import tiny

from remote import models, stores
from remote.models import Contents

Wconv = Callable[..., Any]

RUNS = {
    "to-safetensors": ("bins", ["to-safetensors"]),
    "recast": ("sharded", ["recast", "--dtype", "bf16"]),
    "reshard": ("sharded", ["reshard", "--max-shard-size", "9MB"]),
    "one file": ("bins", ["reshard", "--max-shard-size", "none"]),
    "to-bin": ("sharded", ["to-bin"]),
    "pipeline": ("pipeline", ["to-safetensors"]),
    "int8": ("linear", ["quantize"]),
}
PAIRS = [
    *((run, "local", "s3") for run in RUNS),
    *((run, "s3", "local") for run in ("to-safetensors", "recast", "pipeline")),
    *((run, "s3", "s3") for run in ("to-safetensors", "recast", "reshard", "to-bin", "int8")),
    *((run, "az", "s3") for run in ("to-safetensors", "pipeline")),
    *((run, "s3", "az") for run in ("recast", "one file")),
    *((run, "local", "az") for run in ("reshard", "pipeline")),
    *((run, "web", "s3") for run in ("to-safetensors", "recast")),
    ("recast", "web", "local"),
    *((run, "hub", "s3") for run in ("to-safetensors", "pipeline")),
    *((run, "s3", "hub") for run in ("to-safetensors", "recast")),
]
OF_THE_HUB = (".gitattributes", "README.md")


@dataclass
class Ends:
    """Where conversions begin and end, by kinds: each is a fixture, or a folder of the test."""

    request: pytest.FixtureRequest
    folder: Path

    def take(self, kind: str, folder: Path) -> str:
        """Have a model lie somewhere; say where."""
        if kind == "local":
            return str(folder)
        end = self.request.getfixturevalue(kind)
        if kind == "hub":
            end.add("me/source", folder)
            return "hf://me/source"
        if kind == "web":
            shutil.copytree(folder, end.folder / "m")
            names = [name for name in tiny.names_in(folder) if name.endswith("index.json")]
            return f"{end.url}/m/{names[0]}"
        end.put_folder(folder, "from/m/")
        return f"{end.url}/from/m"

    def target(self, kind: str) -> str:
        if kind == "local":
            return str(self.folder / "out")
        end = self.request.getfixturevalue(kind)
        return "hf://me/new" if kind == "hub" else f"{end.url}/to/m"

    def got(self, kind: str) -> Contents:
        """Read what was written."""
        if kind == "local":
            return models.contents(self.folder / "out")
        end = self.request.getfixturevalue(kind)
        if kind == "hub":
            return {name: data for name, data in end.get_folder("me/new").items() if name not in OF_THE_HUB}
        assert end.open_uploads() == []
        found: Contents = end.get_folder("to/m/")
        assert [name for name in end.names() if not name.startswith("from/")] == [f"to/m/{name}" for name in found]
        return found


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {name: saver(folder / name) for name, saver in models.SAVERS.items()}


@pytest.fixture(scope="module")
def expected(
    sources: dict[str, Path], wconv: Wconv, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Contents]:
    """Give what a run makes on this machine of a source, or of its weights alone."""
    folder = tmp_path_factory.mktemp("expected")

    def give(run: str) -> Contents:
        out = folder / run
        source, (command, *options) = sources[RUNS[run][0]], RUNS[run][1]
        if not out.exists():
            wconv(command, source, *options, "-o", out)
        return models.contents(out)

    return give


@pytest.fixture
def ends(request: pytest.FixtureRequest, tmp_path: Path) -> Ends:
    return Ends(request, tmp_path)


@pytest.mark.usefixtures("asked_here")
@pytest.mark.parametrize(("run", "begin", "end"), PAIRS)
def test_pairs(
    run: str,
    begin: str,
    end: str,
    ends: Ends,
    sources: dict[str, Path],
    expected: Callable[..., Contents],
    wconv: Wconv,
) -> None:
    model, (command, *options) = RUNS[run]
    source = ends.take(begin, sources[model])
    more = ["--create"] if end == "hub" else []
    wconv(command, source, *options, "-o", ends.target(end), *more)
    # Where a server of files is told apart from its folders by nobody, what else lies there is not known.
    assert ends.got(end) == (weights_of(expected(run)) if begin == "web" else expected(run))


def weights_of(files: Contents) -> Contents:
    return {name: data for name, data in files.items() if ".safetensors" in name or ".bin" in name}


SHARD_NAMES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def written(store: stores.Store) -> list[str]:
    """Name what was asked to be written or removed, in order; the parts of a file by its name."""
    asked = (one for one in store.wire.asked if one.method in ("PUT", "POST", "DELETE") and "uploads" not in one.query)
    found: list[str] = []
    for one in asked:
        name = one.path.removeprefix(f"/{store.bucket}/")
        if "delete" in one.query:
            name = "deletion"
        if name not in found:
            found.append(name)
    return found


def test_one_file(s3: stores.S3, sources: dict[str, Path], wconv: Wconv, tmp_path: Path) -> None:
    source = sources["linear"] / "model.safetensors"
    wconv("recast", source, "--dtype", "fp16", "-o", tmp_path / "out" / "some.safetensors")
    s3.put("x/other.safetensors", b"another's")
    url = f"{s3.url}/x/some.safetensors"
    wconv("recast", source, "--dtype", "fp16", "-o", url)
    there = {
        "other.safetensors": b"another's",
        "some.safetensors": (tmp_path / "out" / "some.safetensors").read_bytes(),
    }
    assert s3.get_folder("x/") == there
    s3.wire.clear()
    assert "Up to date" in wconv("recast", source, "--dtype", "fp16", "-o", url).stdout
    assert "exists" in wconv("recast", source, "--dtype", "bf16", "-o", url, exit_code=5).stderr
    assert written(s3) == []
    assert s3.get_folder("x/") == there
    wconv("recast", source, "--dtype", "bf16", "-o", url, "--overwrite")
    assert load(s3.get("x/some.safetensors"))["embed_tokens.weight"].dtype == torch.bfloat16
    assert s3.names() == ["x/other.safetensors", "x/some.safetensors"]


def test_one_file_in_the_bucket_itself(s3: stores.S3, sources: dict[str, Path], wconv: Wconv) -> None:
    source = sources["linear"] / "model.safetensors"
    wconv("recast", source, "--dtype", "fp16", "-o", f"{s3.url}/model.safetensors")
    assert s3.names() == ["model.safetensors"]
    said = wconv("to-safetensors", sources["bins"], "-o", s3.url, exit_code=5).stderr
    assert said.startswith(f"{s3.url}: exists and is not empty")
    assert s3.names() == ["model.safetensors"]


@pytest.mark.parametrize("run", ["recast", "to-bin"])
def test_what_is_written_is_read_back(
    run: str, s3: stores.S3, sources: dict[str, Path], expected: Callable[..., Contents], wconv: Wconv
) -> None:
    model, (command, *options) = RUNS[run]
    wconv(command, sources[model], *options, "-o", f"{s3.url}/x", "--verify")
    assert s3.get_folder("x/") == expected(run)
    read = sum(one.sent for one in s3.wire.asked if one.method == "GET" and one.path.startswith(f"/{s3.bucket}/x/"))
    header_nbytes = 50_000
    assert read > sum(map(len, weights_of(expected(run)).values())) - header_nbytes


def test_overwriting_another_set(
    s3: stores.S3, sources: dict[str, Path], expected: Callable[..., Contents], wconv: Wconv, tmp_path: Path
) -> None:
    url = f"{s3.url}/x"
    old = models.contents(models.save_shards(tmp_path / "old", 4, 1000))
    s3.put_folder(tmp_path / "old", "x/")
    wconv("recast", sources["sharded"], "--dtype", "bf16", "-o", url, exit_code=5)
    assert s3.get_folder("x/") == old
    s3.wire.clear()
    wconv("recast", sources["sharded"], "--dtype", "bf16", "-o", url, "--overwrite")
    assert s3.get_folder("x/") == expected("recast")
    order = written(s3)
    # The old index goes before a shard comes; what else is old goes when all shards are there; the new index is last.
    assert order[0] == "deletion"
    assert order[-1] == f"x/{INDEX}"
    assert all(order.index(f"x/{name}") < order.index("x/config.json") for name in SHARD_NAMES)


def test_what_leads_to_the_rest_comes_last(s3: stores.S3, sources: dict[str, Path], wconv: Wconv) -> None:
    wconv("recast", sources["pipeline"], "--dtype", "fp16", "--variant", "none", "-o", f"{s3.url}/x")
    order = written(s3)
    index = "x/unet/diffusion_pytorch_model.safetensors.index.json"
    assert order[-2:] == [index, "x/model_index.json"]
    weights = [at for at, name in enumerate(order) if name.endswith(".safetensors")]
    configs = [at for at, name in enumerate(order) if name.endswith("config.json")]
    assert max(weights) < min(configs)


def test_overwriting_what_is_read_is_refused(s3: stores.S3, sources: dict[str, Path], wconv: Wconv) -> None:
    s3.put_folder(sources["linear"], "x/")
    before = s3.get_folder()
    url = f"{s3.url}/x/model.safetensors"
    for out in (url, f"{s3.url}/x"):
        s3.wire.clear()
        said = wconv("recast", url, "--dtype", "bf16", "--variant", "none", "-o", out, "--overwrite", exit_code=None)
        assert said.exit_code in (2, 5), said
        assert said.stderr.count("\n") == 1
        assert written(s3) == []
    assert s3.get_folder() == before


def test_other_commands(s3: stores.S3, sources: dict[str, Path], wconv: Wconv) -> None:
    s3.put_folder(sources["sharded"], "x/")
    s3.put_folder(sources["pipeline"], "p/")
    here = json.loads(wconv("inspect", sources["sharded"], "--json").stdout)
    there = json.loads(wconv("inspect", f"{s3.url}/x", "--json").stdout)
    assert str(there).replace(f"{s3.url}/x", str(sources["sharded"])) == str(here)
    wconv("verify", f"{s3.url}/x", sources["sharded"])
    wconv("verify", sources["pipeline"], f"{s3.url}/p")
    wconv("doctor", f"{s3.url}/x", exit_code=None)
    s3.put(f"x/{SHARD_NAMES[0]}", s3.get(f"x/{SHARD_NAMES[0]}")[:-1])
    said = wconv("verify", f"{s3.url}/x", sources["sharded"], exit_code=3).stderr
    assert said.startswith(f"{s3.url}/x/{SHARD_NAMES[0]}: ")
    assert written(s3) == []


def test_worker_processes(s3: stores.S3, sources: dict[str, Path], expected: Callable[..., Contents]) -> None:
    s3.put_folder(sources["sharded"], "from/")
    for source, target in ((sources["sharded"], "a"), (f"{s3.url}/from", "b")):
        arguments = ["recast", source, "--dtype", "bf16", "-o", f"{s3.url}/{target}", "--executor", "processes=2"]
        ended = models.drive(s3, *arguments).end()
        assert ended.exit_code == 0, ended.stderr
        assert s3.get_folder(f"{target}/") == expected("recast")
    assert s3.open_uploads() == []

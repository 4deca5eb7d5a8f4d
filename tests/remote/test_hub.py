from __future__ import annotations

import contextlib
import json
import os
import pickle
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome
from safetensors.torch import load_file
from support import tiny
from support.clusters import ROOT

from converter.storage import place_of
from remote import models
from remote.hub_repos import whole
from remote.hub_server import READS, WRITES, Hub
from remote.wire import Answer, Asked, Call, Drop, Fault, Shorten

Wconv = Callable[..., Outcome]
NAME = "org/model"
URL = f"hf://{NAME}"


pytestmark = pytest.mark.usefixtures("impatient")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Make a model with what it needs and what it does not."""
    folder = models.save_llama(tmp_path / "model")
    (folder / "README.md").write_text("A model.\n")
    return folder


def folder_of(path: Path) -> dict[str, bytes]:
    return {one.relative_to(path).as_posix(): one.read_bytes() for one in path.rglob("*") if one.is_file()}


def without_attributes(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name != ".gitattributes"}


def converted(wconv: Wconv, source: Path, tmp_path: Path, *options: object) -> dict[str, bytes]:
    """Give what a conversion makes of a local folder."""
    wconv("to-safetensors", source, "-o", tmp_path / "expected", *options)
    return folder_of(tmp_path / "expected")


def resolved(hub: Hub) -> list[str]:
    """Give the files that the Hub was asked for."""
    found = (re.search("/resolve/[^/]+/(.*)", asked.path) for asked in hub.wire.asked if asked.method == "HEAD")
    return [one[1] for one in found if one]


def said_once(outcome: Outcome, *words: str) -> None:
    """Hold an error against being one line, of these words, and of no secret."""
    (line,) = outcome.stderr.splitlines()
    assert all(word in line for word in words), line
    no_secret(outcome.stdout + outcome.stderr)


def no_secret(text: str) -> None:
    assert not re.search(r"hf_writes|hf_reads|Signature|Bearer|Expires", text), text


# Reading.


@pytest.mark.parametrize("in_xet", [False, True])
def test_a_repository_is_read_as_its_folder(wconv: Wconv, hub: Hub, model: Path, tmp_path: Path, in_xet: bool) -> None:
    hub.add(NAME, model, in_xet=in_xet)
    assert "pytorch_model" in wconv("inspect", URL).stdout
    assert wconv("doctor", URL, exit_code=None).exit_code in (0, 1)
    wconv("verify", model, URL)
    wconv("to-safetensors", URL, "-o", tmp_path / "out")
    assert folder_of(tmp_path / "out") == converted(wconv, model, tmp_path)
    wconv("recast", URL, "--dtype", "bf16", "-o", tmp_path / "cast")
    wconv("recast", model, "--dtype", "bf16", "-o", tmp_path / "local")
    assert folder_of(tmp_path / "cast") == folder_of(tmp_path / "local")
    assert hub.leaks() == []


@pytest.mark.parametrize("spelled", ["dev", "a%2Fb", "v1", "refs/pr/1", "commit", "refs%2Fpr%2F1"])
def test_a_revision_is_read(wconv: Wconv, hub: Hub, model: Path, tmp_path: Path, spelled: str) -> None:
    hub.create(NAME)
    for revision in ("dev", "a/b"):
        commit = hub.add(NAME, model, revision)
    hub.tag(NAME, "v1", "dev")
    hub.repos[NAME].refs["refs/pr/1"] = commit
    at = commit if spelled == "commit" else spelled
    wconv("to-safetensors", f"{URL}@{at}", "-o", tmp_path / "out")
    assert folder_of(tmp_path / "out") == converted(wconv, model, tmp_path)
    said_once(wconv("inspect", f"{URL}@nothing", exit_code=3), "has no revision 'nothing'")
    assert wconv("inspect", URL, exit_code=3).stderr.count("\n") == 1  # main has no weights


def test_a_folder_and_a_file_of_a_repository_are_read(wconv: Wconv, hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.add(NAME, model.parent)
    assert folder_of(model) == {k.removeprefix("model/"): v for k, v in hub.get_folder(NAME).items() if "/" in k}
    expected = converted(wconv, model, tmp_path)
    wconv("to-safetensors", f"{URL}/model", "-o", tmp_path / "out")
    assert folder_of(tmp_path / "out") == expected
    one = f"{URL}/model/pytorch_model-00001-of-00003.bin"
    wconv("inspect", f"{URL}@main/model/pytorch_model.bin.index.json")
    wconv("to-safetensors", one, "-o", tmp_path / "one.safetensors", exit_code=None)
    said_once(wconv("inspect", f"{URL}/nothing", exit_code=3), f"{URL}/nothing: does not exist")


def test_of_a_repository_only_what_is_needed_is_read(wconv: Wconv, hub: Hub, model: Path, tmp_path: Path) -> None:
    for variant in ("fp16", "ema"):
        tiny.save(tiny.make_state(), model / f"pytorch_model.{variant}.bin")
    (model / "flax_model.msgpack").write_bytes(bytes(100_000))
    tiny.save(tiny.make_state(), model / "unrelated.bin")
    hub.add(NAME, model)
    wconv("to-safetensors", URL, "--from-variant", "none", "-o", tmp_path / "out")
    shards = [name for name in os.listdir(model) if re.fullmatch("pytorch_model-.*bin", name)]  # noqa: PTH208
    asked = resolved(hub)
    assert sorted(asked) == sorted({*asked}), "each file is asked for once"
    assert {*asked} >= {*shards, "config.json", "pytorch_model.bin.index.json"}
    assert not {*asked} & {"flax_model.msgpack"}
    sizes = {name: (model / name).stat().st_size for name in shards}
    of_shards = {one.target for one in hub.data.asked if one.sent > 4000}
    assert len(of_shards) <= len(shards) + 3
    assert sum(one.sent for one in hub.data.asked) < 2 * sum(sizes.values()) + 20_000


def test_a_branch_that_moves_meanwhile_is_read_as_it_was(wconv: Wconv, hub: Hub, model: Path, tmp_path: Path) -> None:
    commit = hub.add(NAME, model)

    def move(_: Asked) -> None:
        hub.commit(NAME, {"config.json": whole(b"{}")})

    hub.wire.fault(Call(move, at=None), lambda asked: "/tree/" in asked.path)
    wconv("to-safetensors", URL, "-o", tmp_path / "out")
    assert folder_of(tmp_path / "out") == converted(wconv, model, tmp_path)
    assert len(hub.commits(NAME)) == 3
    first, *later = [asked.path for asked in hub.wire.asked]
    assert first == f"/api/models/{NAME}/revision/main"
    assert all(commit in path for path in later)


@pytest.mark.parametrize("where", ["wire", "data"])
@pytest.mark.parametrize(
    "fault",
    [Answer(500), Answer(503), Answer(429), Drop(None), Drop(50), Drop(50, reset=False), Shorten(20)],
    ids=str,
)
def test_what_fails_in_passing_is_asked_for_again(
    wconv: Wconv, hub: Hub, model: Path, tmp_path: Path, fault: Fault, where: str
) -> None:
    hub.add(NAME, model)
    # A document that is cut is no document, and the Hub does not say so.
    spared = ("/revision/", "/tree/") if isinstance(fault, Shorten) else ("/nothing/",)
    wire = getattr(hub, where)
    rule = wire.fault(fault, lambda asked: not any(one in asked.path for one in spared), times=6, after=1)
    wconv("to-safetensors", URL, "-o", tmp_path / "out")
    assert rule.met
    assert folder_of(tmp_path / "out") == converted(wconv, model, tmp_path)


@pytest.mark.parametrize("where", ["wire", "data"])
@pytest.mark.parametrize("headers", [{"Retry-After": "1"}, {"RateLimit": '"api";r=0;t=1'}], ids=str)
def test_who_is_asked_to_wait_waits(wconv: Wconv, hub: Hub, model: Path, where: str, headers: dict[str, str]) -> None:
    hub.add(NAME, model)
    wire = getattr(hub, where)
    rule = wire.fault(Answer(429, headers))
    wconv("inspect", URL)
    (met,) = rule.met
    again = next(asked for asked in wire.asked if asked.target == met.target and asked is not met)
    assert again.began - met.began >= 1  # the other side may note late that it has ended


def test_who_is_asked_to_wait_long_says_so(wconv: Wconv, hub: Hub, model: Path) -> None:
    hub.add(NAME, model)
    hub.wire.fault(Answer(429, {"Retry-After": "3000"}), times=None)
    said_once(wconv("inspect", URL, exit_code=7), "429", "3,000 s")


def test_an_address_that_is_no_longer_good_is_asked_for_anew(
    wconv: Wconv, hub: Hub, model: Path, tmp_path: Path
) -> None:
    hub.add(NAME, model)
    shard = f"/{'pytorch_model-00002-of-00003.bin'}"
    sha256 = hub.files(NAME)[shard[1:]].sha256
    rule = hub.data.fault(Answer(403), lambda asked: str(sha256) in asked.path, after=1)
    wconv("to-safetensors", URL, "-o", tmp_path / "out")
    assert rule.met
    assert sum(shard in f"/{name}" for name in resolved(hub)) == 2
    assert folder_of(tmp_path / "out") == converted(wconv, model, tmp_path)


def test_addresses_that_are_never_good_are_an_error(wconv: Wconv, hub: Hub, model: Path) -> None:
    hub.add(NAME, model)
    hub.data_lives = -1
    said_once(wconv("inspect", URL, exit_code=7), "403")


def test_no_network_is_said(wconv: Wconv, hub: Hub, model: Path) -> None:
    hub.add(NAME, model)
    hub.wire.down()
    said_once(wconv("inspect", URL, exit_code=7), URL, "cannot be reached (new connection), after 8 tries")
    said_once(wconv("to-safetensors", model, "-o", "hf://me/new", "--create", exit_code=7), "cannot be reached")


def test_what_is_not_for_everybody_is_said(
    wconv: Wconv, hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("other/gated", model)
    hub.create("other/gated").is_gated = True
    hub.add("org/private", model)
    hub.create("org/private").is_private = True
    ways = f"Ask for it at {hub.endpoint}/other/gated, then sign in with 'hf auth login', or set HF_TOKEN."
    said_once(wconv("to-safetensors", "hf://other/gated", "-o", "x", exit_code=7), "is gated", ways)
    wconv("inspect", "hf://org/private")
    missing = "is no repository of the Hub that you can see. If it is private: Sign in"
    said_once(wconv("inspect", "hf://other/nothing", exit_code=3), missing)
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrong")
    outcome = wconv("inspect", "hf://org/private", exit_code=7)
    said_once(outcome, "is refused by the Hub (401). Sign in with 'hf auth login', or set HF_TOKEN.")
    assert "hf_wrong" not in outcome.stderr
    monkeypatch.delenv("HF_TOKEN")
    said_once(wconv("inspect", "hf://org/private", exit_code=3), missing)
    said_once(wconv("inspect", "hf://other/gated", exit_code=7), "is gated", ways)


@pytest.mark.parametrize("token", ["hf_\x01control", "hf_späte", "two words"])
def test_a_token_that_is_none_is_not_shown(
    wconv: Wconv, hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    hub.add(NAME, model)
    monkeypatch.setenv("HF_TOKEN", token)
    outcome = wconv("inspect", URL, exit_code=7)
    said_once(outcome, "has characters that no token has")
    assert token[3:] not in outcome.stderr


def test_the_token_of_who_has_signed_in_is_taken(
    wconv: Wconv, hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub.add("org/private", model)
    hub.create("org/private").is_private = True
    monkeypatch.delenv("HF_TOKEN")
    path = Path(constants.HF_TOKEN_PATH)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(READS + "\n")
    wconv("inspect", "hf://org/private")
    assert {asked.headers.get("authorization") for asked in hub.wire.asked} == {f"Bearer {READS}"}
    assert hub.leaks() == []


def test_who_is_not_to_ask_the_hub_does_not(
    wconv: Wconv, hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub.add(NAME, model)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said_once(wconv("inspect", URL, exit_code=7), "HF_HUB_OFFLINE is set")
    assert hub.wire.asked == []


def test_what_the_cache_has_is_read_there(wconv: Wconv, hub: Hub, model: Path, tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download

    hub.add(NAME, model)
    names = sorted(name for name in hub.files(NAME) if name.startswith("pytorch_model-"))
    paths = {name: Path(hf_hub_download(NAME, name)) for name in names}
    hub.wire.clear()
    hub.data.clear()
    wconv("to-safetensors", URL, "-o", tmp_path / "out")
    assert folder_of(tmp_path / "out") == converted(wconv, model, tmp_path)
    assert hub.data.asked == []
    assert not {*resolved(hub)} & {*names}
    with paths[names[0]].resolve().open("ab") as file:
        file.write(b"more")
    shutil.rmtree(tmp_path / "out")
    wconv("to-safetensors", URL, "-o", tmp_path / "out")
    assert folder_of(tmp_path / "out") == folder_of(tmp_path / "expected")
    assert {*resolved(hub)} & {*names} == {names[0]}


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_token_follows_no_redirect_to_another_host(wconv: Wconv, hub: Hub, model: Path, status: int) -> None:
    hub.add(NAME, model)
    elsewhere = Answer(status, {"Location": f"{hub.data.url}/api/models/{NAME}/revision/main"})
    hub.wire.fault(elsewhere, lambda asked: "/revision/" in asked.path)
    said_once(wconv("inspect", URL, exit_code=None), URL)
    assert len(hub.data.asked) == 1
    assert hub.leaks() == []


@pytest.mark.parametrize(
    ("to", "problem", "code"),
    [
        ("file:///etc/passwd", "leads from http:// to file://", 4),
        ("ftp://localhost/x", "leads from http:// to ftp://", 4),
        ("http://[", "leads to what is no URL", 4),
    ],
)
def test_the_hub_leads_to_the_web_alone(wconv: Wconv, hub: Hub, model: Path, to: str, problem: str, code: int) -> None:
    hub.add(NAME, model)
    hub.wire.fault(Answer(302, {"Location": to}), lambda asked: "/resolve/" in asked.path, times=None)
    said_once(wconv("inspect", URL, exit_code=code), problem)


def test_a_file_that_is_not_what_was_listed_is_an_error(wconv: Wconv, hub: Hub, model: Path) -> None:
    hub.add(NAME, model)
    answer = Answer(200, {"X-Linked-ETag": '"' + "0" * 64 + '"', "ETag": '"1"'})
    hub.wire.fault(answer, lambda asked: "/resolve/" in asked.path and ".bin" in asked.path, times=None)
    assert "was changed while it was read" in wconv("inspect", URL, exit_code=3).stderr


JSON = {"Content-Type": "application/json"}
COMMIT = "1" * 40
LESS_THAN_NONE = json.dumps([{"type": "file", "path": "a", "size": -1, "oid": COMMIT}]).encode()
UNKNOWN = "in a way that wconv does not know"
ANSWERS = {
    "page": ("/revision/", Answer(200, JSON, b"<html>"), "is answered with what is no JSON"),
    "deep": ("/revision/", Answer(200, JSON, b"[" * 100_000), "is answered with what is no JSON"),
    "list": ("/revision/", Answer(200, JSON, b"[]"), UNKNOWN),
    "branch": ("/revision/", Answer(200, JSON, b'{"sha": "main"}'), "has no commit that the Hub names"),
    "object": ("/tree/", Answer(200, JSON, b"{}"), UNKNOWN),
    "number": ("/tree/", Answer(200, JSON, b"[1]"), UNKNOWN),
    "no size": ("/tree/", Answer(200, JSON, b'[{"type": "file", "path": "a"}]'), UNKNOWN),
    "less than none": ("/tree/", Answer(200, JSON, LESS_THAN_NONE), UNKNOWN),
    "long": ("/tree/", Answer(200, JSON, b" " * 16_000_001), "more than 16,000,000 bytes"),
    "wrong": ("/tree/", Answer(400, {"X-Error-Message": "no such\tthing"}), "(400: no such thing)"),
    "strange": ("/tree/", Answer(418), "is answered by the Hub with 418"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_an_answer_that_is_none_is_said(wconv: Wconv, hub: Hub, model: Path, case: str) -> None:
    where, answer, problem = ANSWERS[case]
    hub.add(NAME, model)
    hub.wire.fault(answer, lambda asked: where in asked.path, times=None)
    said_once(wconv("inspect", URL, exit_code=7), problem)


def test_pages_without_end_are_given_up(wconv: Wconv, hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from converter.storage import hub as store

    monkeypatch.setattr(store, "_MAX_PAGES", 20)
    hub.add(NAME, model)
    endless = Answer(200, {**JSON, "Link": f'<{hub.data.url}/elsewhere?cursor=a>; rel="next"'}, b"[]")
    hub.wire.fault(endless, lambda asked: "/tree/" in asked.path, times=None)
    said_once(wconv("inspect", URL, exit_code=4), "is listed on more than 20 pages")
    assert hub.data.asked == []


def test_files_without_end_are_given_up(wconv: Wconv, hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from converter.storage import hub as store

    monkeypatch.setattr(store, "_MAX_FILES", 3)
    hub.add(NAME, model)
    said_once(wconv("inspect", URL, exit_code=4), "has more than 3 files and folders")


def test_pages_are_listed_to_the_last(wconv: Wconv, hub: Hub, model: Path, tmp_path: Path) -> None:
    for number in range(1003):
        (model / f"{number}.txt").touch()
    hub.add(NAME, model)
    wconv("to-safetensors", URL, "-o", tmp_path / "out")
    assert folder_of(tmp_path / "out") == converted(wconv, model, tmp_path)


@pytest.mark.parametrize(
    "path", ["../out.txt", "/etc/x", "a/../../x", "a//b", "./x", ".git/hooks/x", "a\\..\\b", "x\0y"]
)
def test_a_listing_leads_nowhere_else(wconv: Wconv, hub: Hub, model: Path, tmp_path: Path, path: str) -> None:
    hub.add(NAME, model)
    hub.commit(NAME, {**hub.files(NAME), path: whole(b"evil")})
    wconv("to-safetensors", URL, "-o", tmp_path / "out")
    assert folder_of(tmp_path / "out") == converted(wconv, model, tmp_path)


def test_odd_names_go_along(wconv: Wconv, hub: Hub, model: Path, tmp_path: Path) -> None:
    for name in ("a b.txt", "100%25.txt", "q?x#y.txt", "ü\u3000\u200b.txt", "@x&y=z;.txt", "new\nline.txt"):
        (model / "extra" / name).parent.mkdir(exist_ok=True)
        (model / "extra" / name).write_text(name)
    hub.add(NAME, model)
    wconv("to-safetensors", URL, "-o", tmp_path / "out")
    assert folder_of(tmp_path / "out") == converted(wconv, model, tmp_path)


@pytest.mark.parametrize(
    "spelled",
    [
        "hf://a/b", "hf://a/b@dev", "hf://a/b@refs/pr/12/x y", "hf://a/b@x%2Fpr%2F1/unet", "hf://a/b@1%25/x%20y",
        "hf://a/b/x@y/z", "hf://a/b@refs/convert/parquet", f"hf://a/b@{COMMIT}/x", "hf://a/b@x%40y%20z",
    ],
)  # fmt: skip
def test_what_is_spelled_can_be_typed_again(hub: Hub, spelled: str) -> None:
    assert str(place_of(spelled)) == spelled
    assert place_of(str(place_of(spelled))) == place_of(spelled)


@pytest.mark.parametrize(
    "wrong", ["hf://a", "hf://a/b@", "hf://a/b@../x", "hf://a/b/../c", "hf://", "hf://-a/b", "hf://a/b@x%0Ay"]
)
def test_what_is_no_repository_is_refused(wconv: Wconv, hub: Hub, wrong: str) -> None:
    said_once(wconv("inspect", wrong, exit_code=2), wrong)
    assert hub.wire.asked == []


def test_a_token_in_a_url_is_not_shown(wconv: Wconv, hub: Hub) -> None:
    for url in ("hf://me:hf_writes123@a/b", "hf://a?token=hf_writes123"):
        said_once(wconv("inspect", url, exit_code=2), "names no model of the Hub")
    said_once(wconv("inspect", "hf://datasets/a/b", exit_code=4), "wconv reads models")


def test_a_place_on_the_hub_holds_no_secret(wconv: Wconv, hub: Hub, model: Path) -> None:
    from converter.recipes.convert import plan_conversion
    from converter.recipes.request import Request, prepare

    hub.add(NAME, model)
    request = Request.of(URL, "hf://me/new", create=True)
    plan = prepare(request, plan_conversion).plan
    raw = pickle.dumps((request, plan))
    assert not [secret for secret in (WRITES, "Signature", "Bearer") if secret.encode() in raw]
    wconv("to-safetensors", URL, "-o", "hf://me/new", "--create", "--dry-run", "--json")


def test_an_address_is_of_one_content_alone(wconv: Wconv, hub: Hub, model: Path) -> None:
    first = hub.add(NAME, model)
    wconv("verify", URL, model)
    tiny.save_bin_shards(tiny.make_state(seed=5), model)
    assert hub.add(NAME, model) != first
    wconv("verify", URL, model)
    wconv("verify", f"{URL}@{first}", model, exit_code=1)


# The doctor, and bare names.


@pytest.fixture(scope="module")
def sana(builders: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a pipeline in two dtypes, whose transformer has shards of both that its index does not tell apart."""
    import torch

    folder = tmp_path_factory.mktemp("sana") / "m"
    model = builders.shake(builders.make_sana())
    builders.save_safetensors(model, folder, 3)
    for name, part in builders.models_in(model.to(torch.bfloat16)).items():
        limit = builders.shard_limit(part.state_dict(), 2)
        part.save_pretrained(folder / name, variant="bf16", max_shard_size=limit)
    part = folder / "transformer"
    for path in [*part.glob("*.bf16-*"), *part.glob("*.bf16.json")]:
        # As they lie in the repository that wconv was begun for.
        path.rename(path.with_name(path.name.replace(".bf16", "", 1)))
    for path in folder.rglob("*.safetensors"):
        # How a file begins is read in one piece, and all of one is that is smaller.
        tiny.save({**load_file(path), "padding": torch.zeros(100_000)}, path)
    return folder


@pytest.mark.parametrize("in_xet", [False, True])
@pytest.mark.parametrize("options", [(), ("--loader", "diffusers"), ("--loader", "diffusers", "--variant", "bf16")])
def test_the_doctor_says_the_same_as_of_a_folder(
    wconv: Wconv, hub: Hub, sana: Path, in_xet: bool, options: tuple[str, ...]
) -> None:
    hub.add("org/sana", sana, in_xet=in_xet)
    there, here = (wconv("doctor", source, "--json", *options, exit_code=1) for source in ("hf://org/sana", sana))
    expected = {**json.loads(here.stdout), "commit": hub.head("org/sana")}
    assert json.loads(there.stdout.replace("hf://org/sana", str(sana))) == expected
    assert json.loads(here.stdout)["findings"]
    weights = sum(path.stat().st_size for path in sana.rglob("*.safetensors"))
    assert weights > 4_000_000
    assert sum(asked.sent for asked in hub.data.asked) < weights / 4


def test_a_bare_name_is_not_taken_for_one_of_the_hub(
    wconv: Wconv, hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, model)
    monkeypatch.chdir(tmp_path)
    advice = f"{NAME}: does not exist. If it is a model of the Hub, name it {URL}."
    said_once(wconv("inspect", NAME, exit_code=3), advice)
    assert hub.wire.asked == []
    shutil.copytree(model, tmp_path / NAME)
    wconv("inspect", NAME)
    assert hub.wire.asked == []


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("n", 3)])
def test_who_sits_at_a_terminal_is_asked_what_a_bare_name_is(
    hub: Hub, model: Path, tmp_path: Path, answer: str, code: int
) -> None:
    hub.add(NAME, model)
    ours, theirs = pty.openpty()
    environment = {**os.environ, **hub.env, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "converter", "inspect", NAME]
    run = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=tmp_path)
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # nobody writes any more
        while data := os.read(ours, 1 << 16):
            if b"[y/N]" in said + data and b"[y/N]" not in said:
                os.write(ours, answer.encode() + b"\n")
            said += data
    os.close(ours)
    assert run.wait(60) == code
    assert f"{NAME} is no path here. Take it from the Hub?" in said.decode()
    assert bool(hub.wire.asked) is (code == 0)

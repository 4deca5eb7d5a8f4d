from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome
from safetensors.torch import load_file
from support import tiny

from converter import convert
from converter.errors import SystemRefused
from remote import models, stores
from remote.hub_http import Request
from remote.hub_repos import whole
from remote.hub_server import READS, WRITES, Hub
from remote.test_hub import folder_of, no_secret, said_once, without_attributes
from remote.wire import Answer, Asked, Call, Drop, Fault, Hang

Wconv = Callable[..., Outcome]
NAME = "me/new"
URL = f"hf://{NAME}"
LATEST = 60  # seconds


pytestmark = pytest.mark.usefixtures("impatient")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = models.save_llama(tmp_path / "model")
    (folder / "notes" / "a b.txt").parent.mkdir()
    (folder / "notes" / "a b.txt").write_text("kept")
    return folder


@pytest.fixture
def expected(wconv: Wconv, model: Path, tmp_path: Path) -> dict[str, bytes]:
    wconv("to-safetensors", model, "-o", tmp_path / "expected")
    return folder_of(tmp_path / "expected")


def written(hub: Hub, name: str = NAME, revision: str = "main") -> dict[str, bytes]:
    """Give what a repository has, but for its card and what each new one has."""
    files = without_attributes(hub.get_folder(name, revision))
    return {path: content for path, content in files.items() if path != "README.md"}


def commits(hub: Hub, name: str = NAME, revision: str = "main") -> int:
    return len(hub.commits(name, revision))


@pytest.mark.parametrize("is_private", [False, True])
def test_a_new_repository_gets_all_with_one_commit(
    wconv: Wconv, hub: Hub, model: Path, expected: dict[str, bytes], is_private: bool
) -> None:
    outcome = wconv("to-safetensors", model, "-o", URL, exit_code=2)
    said_once(outcome, f"{URL}: is no repository of the Hub that you can see. --create makes it.")
    assert NAME not in hub.repos
    private = ["--private"] if is_private else []
    said_once(wconv("to-safetensors", model, "-o", URL, "--private", exit_code=2), "Say --create too.")
    wconv("to-safetensors", model, "-o", URL, "--create", "--dry-run")
    assert NAME not in hub.repos
    outcome = wconv("to-safetensors", model, "-o", URL, "--create", *private)
    no_secret(outcome.stdout + outcome.stderr)
    assert hub.head(NAME) in outcome.stdout
    assert written(hub) == expected
    assert commits(hub) == 2
    assert hub.repos[NAME].is_private is is_private
    files = hub.files(NAME)
    for name in (name for name in expected if name.endswith(".safetensors")):
        assert files[name].sha256 == hashlib.sha256(expected[name]).hexdigest()
        assert files[name].xet_hash
    assert hub.leaks() == []
    outcome = wconv("to-safetensors", model, "-o", URL, "--create", *private)
    assert outcome.stdout == f"Up to date: {URL} is as it would be.\n"
    assert commits(hub) == 2


def test_nothing_is_seen_before_the_commit(wconv: Wconv, hub: Hub, model: Path, expected: dict[str, bytes]) -> None:
    hub.create(NAME)
    before: list[dict[str, bytes]] = []
    rule = hub.wire.fault(Call(lambda _: before.append(written(hub)), at=None), lambda asked: "/commit/" in asked.path)
    wconv("to-safetensors", model, "-o", URL)
    assert len(rule.met) == 1
    assert before == [{}]
    assert written(hub) == expected


def test_what_a_new_repository_has_is_no_hindrance(
    wconv: Wconv, hub: Hub, model: Path, expected: dict[str, bytes]
) -> None:
    hub.create(NAME)
    hub.commit(NAME, {**hub.files(NAME), "README.md": whole(b"mine"), "LICENSE": whole(b"mine")})
    wconv("to-safetensors", model, "-o", URL)
    assert written(hub) == {**expected, "LICENSE": b"mine"}
    assert hub.download(NAME, "README.md") == b"mine"


def test_what_is_there_is_replaced_where_that_is_asked(
    wconv: Wconv, hub: Hub, model: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    old = tmp_path / "old"
    tiny.save_safetensors_shards(tiny.make_state(seed=3), old, ("abc", "def"))
    tiny.write_json(old / "other.json", {})
    hub.add(NAME, old)
    before = hub.head(NAME)
    said_once(wconv("to-safetensors", model, "-o", URL, exit_code=5), URL, "exists and is not empty")
    assert hub.head(NAME) == before
    wconv("to-safetensors", model, "-o", URL, "--overwrite")
    assert written(hub) == {**expected, "other.json": (old / "other.json").read_bytes()}
    assert hub.commits(NAME)[0].parent == before


def test_a_branch_is_written_to(wconv: Wconv, hub: Hub, model: Path, expected: dict[str, bytes]) -> None:
    hub.create(NAME)
    said_once(wconv("to-safetensors", model, "-o", f"{URL}@a%2Fb", exit_code=2), "has no revision 'a/b'")
    hub.commit(NAME, hub.files(NAME), "a/b")
    hub.tag(NAME, "v1")
    wconv("to-safetensors", model, "-o", f"{URL}@a%2Fb")
    assert written(hub, revision="a/b") == expected
    assert written(hub) == {}
    said_once(wconv("to-safetensors", model, "-o", f"{URL}@v1", exit_code=2), "is a tag")
    said_once(wconv("to-safetensors", model, "-o", f"{URL}@{hub.head(NAME)}", exit_code=2), "is a commit")


def test_another_branch_is_another_place(wconv: Wconv, hub: Hub, model: Path) -> None:
    """The configs of one do not go with the weights of another."""
    hub.add(NAME, model)
    hub.commit(NAME, {**hub.files(NAME), "config.json": whole(b'{"model_type": "llama", "dev": 1}')}, "dev")
    before = hub.head(NAME)
    outcome = wconv("recast", f"{URL}@dev", "--dtype", "bf16", "-o", URL, exit_code=5)
    said_once(outcome, f"{URL}: exists and is not empty")
    assert hub.head(NAME) == before
    wconv("recast", f"{URL}@dev", "--dtype", "bf16", "-o", URL, "--overwrite")
    assert json.loads(hub.download(NAME, "config.json"))["dev"] == 1


def test_a_new_repository_is_as_its_owner_has_them(
    wconv: Wconv, hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An organisation may want its new ones private."""
    asked: list[dict[str, Any]] = []

    def noting(request: Request) -> Any:
        asked.append(json.loads(request.read()))
        return asked[-1]

    monkeypatch.setattr(Request, "json", noting)
    wconv("to-safetensors", model, "-o", URL, "--create")
    assert asked[0] == {"name": "new", "organization": "me", "type": "model"}


def test_what_is_to_be_private_goes_nowhere_else(wconv: Wconv, hub: Hub, model: Path) -> None:
    hub.create(NAME)
    outcome = wconv("to-safetensors", model, "-o", URL, "--create", "--private", exit_code=2)
    said_once(outcome, f"{URL}: is there, and everybody sees it.")
    assert written(hub) == {}


def test_a_folder_of_a_repository_is_written_to(
    wconv: Wconv, hub: Hub, model: Path, expected: dict[str, bytes]
) -> None:
    hub.create(NAME)
    wconv("to-safetensors", model, "-o", f"{URL}/a b/c")
    assert written(hub) == {f"a b/c/{name}": content for name, content in expected.items()}


def test_a_variant_is_proposed_to_its_owner(wconv: Wconv, hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny.save(tiny.make_state(), folder / "diffusion_pytorch_model.safetensors")
    tiny.write_json(folder / "config.json", {"_class_name": "UNet2DConditionModel"})
    before = hub.add("other/m", folder)
    outcome = wconv("recast", "hf://other/m", "--dtype", "bf16", "--pr")
    assert "/discussions/1" in outcome.stdout
    assert hub.head("other/m") == before
    name = "diffusion_pytorch_model.bf16.safetensors"
    wconv("recast", folder, "--dtype", "bf16")
    proposed = written(hub, "other/m", "refs/pr/1")
    assert proposed[name] == (folder / name).read_bytes()
    assert proposed.keys() == {name, "config.json", "diffusion_pytorch_model.safetensors"}
    assert commits(hub, "other/m", "refs/pr/1") == commits(hub, "other/m") + 1
    said_once(wconv("recast", "hf://other/m", "--dtype", "bf16", "-o", "hf://other/m", exit_code=7), "403")
    assert hub.head("other/m") == before


def test_a_commit_of_somebody_else_is_not_undone(wconv: Wconv, hub: Hub, model: Path) -> None:
    hub.create(NAME)

    def push(_: Asked) -> None:
        hub.commit(NAME, {**hub.files(NAME), "config.json": whole(b"theirs")})

    hub.wire.fault(Call(push, at=None), lambda asked: "/commit/" in asked.path)
    outcome = wconv("to-safetensors", model, "-o", URL, exit_code=5)
    said_once(outcome, URL, "has a new commit since it was looked at, and nothing was changed. Run this again.")
    assert written(hub) == {"config.json": b"theirs"}


def test_a_push_to_a_repository_that_was_just_made_is_not_undone(wconv: Wconv, hub: Hub, model: Path) -> None:
    def push(_: Asked) -> None:
        hub.commit(NAME, {**hub.files(NAME), "config.json": whole(b"theirs")})

    hub.wire.fault(Call(push, at=None), lambda asked: "/preupload/" in asked.path)
    said_once(wconv("to-safetensors", model, "-o", URL, "--create", exit_code=5), "was made while this ran")
    assert written(hub) == {"config.json": b"theirs"}


def test_a_repository_of_somebody_else_is_not_filled(wconv: Wconv, hub: Hub, model: Path) -> None:
    def push(_: Asked) -> None:
        hub.commit(NAME, {"config.json": whole(b"theirs")})

    hub.wire.fault(Call(push, at=None), lambda asked: "/repos/create" in asked.path)
    said_once(wconv("to-safetensors", model, "-o", URL, "--create", exit_code=5), "was made while this ran")
    assert written(hub) == {"config.json": b"theirs"}


@pytest.mark.parametrize("what", ["create", "xet-write-token", "preupload", "commit"])
@pytest.mark.parametrize("status", [401, 403, 400, 429, 503])
def test_what_the_hub_refuses_is_said(
    wconv: Wconv, hub: Hub, model: Path, expected: dict[str, bytes], what: str, status: int
) -> None:
    rule = hub.wire.fault(Answer(status), lambda asked: f"/{what}" in asked.path, times=None)
    outcome = wconv("to-safetensors", model, "-o", URL, "--create", exit_code=7)
    assert rule.met
    said_once(outcome, URL, str(status))
    if status in (401, 403):
        said_once(outcome, "Sign in with 'hf auth login', or set HF_TOKEN.")
    assert NAME not in hub.repos or written(hub) == {}
    hub.wire.heal()
    wconv("to-safetensors", model, "-o", URL, "--create")
    assert written(hub) == expected
    assert commits(hub) == 2


@pytest.mark.parametrize("what", ["create", "xet-write-token", "preupload"])
@pytest.mark.parametrize("fault", [Answer(503), Answer(200, done=True), Drop(None), Drop(3)], ids=str)
def test_what_fails_in_passing_is_done_in_the_end(
    wconv: Wconv, hub: Hub, model: Path, expected: dict[str, bytes], what: str, fault: Any
) -> None:
    if fault == Answer(200, done=True):
        fault = Answer(503, done=True)  # it was done, and the answer is lost
    hub.wire.fault(fault, lambda asked: f"/{what}" in asked.path, times=2)
    wconv("to-safetensors", model, "-o", URL, "--create")
    assert written(hub) == expected
    assert commits(hub) == 2


@pytest.mark.parametrize("fault", [Answer(502, done=True), Drop(None), Drop(3)], ids=str)
def test_a_commit_whose_answer_is_lost_is_not_made_twice(
    wconv: Wconv, hub: Hub, model: Path, expected: dict[str, bytes], fault: Any
) -> None:
    hub.create(NAME)
    rule = hub.wire.fault(fault, lambda asked: "/commit/" in asked.path, times=None)
    said_once(wconv("to-safetensors", model, "-o", URL, exit_code=7), URL)
    assert len(rule.met) == 1
    hub.wire.heal()
    assert written(hub) == expected
    wconv("to-safetensors", model, "-o", URL)
    assert commits(hub) == 2


def test_who_may_only_read_is_told(wconv: Wconv, hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.create(NAME)
    monkeypatch.setenv("HF_TOKEN", READS)
    said_once(wconv("to-safetensors", model, "-o", URL, exit_code=7), "403", "set HF_TOKEN")
    monkeypatch.delenv("HF_TOKEN")
    said_once(wconv("to-safetensors", model, "-o", URL, exit_code=7), "Sign in with 'hf auth login', or set HF_TOKEN.")
    assert written(hub) == {}


def test_large_texts_go_where_the_hub_wants_them(wconv: Wconv, hub: Hub, model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.json").write_bytes(os.urandom(2_000_000))  # is streamed
    (model / "extra.onnx").write_bytes(b"small, and of a name that does not go into git")
    wconv("to-safetensors", model, "-o", tmp_path / "expected")
    wconv("to-safetensors", model, "-o", URL, "--create")
    assert written(hub) == folder_of(tmp_path / "expected")
    assert commits(hub) == 2


def test_a_damaged_source_leaves_nothing(wconv: Wconv, hub: Hub, model: Path) -> None:
    hub.create(NAME)
    path = model / "pytorch_model-00002-of-00003.bin"
    content = path.read_bytes()
    at = content.index(torch.load(path)["c"].numpy().tobytes())
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    said_once(wconv("to-safetensors", model, "-o", URL, exit_code=3), "pytorch_model-00002-of-00003.bin")
    assert commits(hub) == 1


def test_stores_hold_the_same(wconv: Wconv, hub: Hub, s3: stores.S3, model: Path, expected: dict[str, bytes]) -> None:
    s3.put_folder(model, "m/")
    hub.add("org/m", model)
    wconv("to-safetensors", f"{s3.url}/m", "-o", URL, "--create")
    assert written(hub) == expected
    wconv("to-safetensors", "hf://org/m", "-o", f"{s3.url}/out")
    assert s3.get_folder("out/") == expected
    wconv("to-safetensors", "hf://org/m", "-o", "hf://me/another", "--create")
    assert written(hub, "me/another") == expected
    wconv("verify", URL, f"{s3.url}/out")
    assert hub.leaks() == []


def test_the_real_libraries_load_what_is_written(wconv: Wconv, hub: Hub, saved_model: Any) -> None:
    import diffusers
    import transformers
    from huggingface_hub import hf_hub_download, snapshot_download

    _, folder = saved_model("llama_tied", 2)
    wconv("to-safetensors", folder, "-o", URL, "--create")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(NAME)
    local = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), local.parameters(), strict=True))
    assert load_file(hf_hub_download(NAME, "model-00001-of-00002.safetensors"))
    model, folder = saved_model("sd")
    hub.add("org/sd", folder)
    wconv("to-safetensors", "hf://org/sd", "-o", "hf://me/sd", "--create")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(snapshot_download("me/sd"), use_safetensors=True)
    for one, other in zip(pipeline.unet.parameters(), model.unet.parameters(), strict=True):
        assert torch.equal(one, other)


# Runs that end too soon.


def start(hub: Hub, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "converter", *map(str, args)],
        env={**os.environ, **hub.env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["xet-write-token", "commit"])
def test_a_run_that_ends_too_soon_leaves_nothing(
    hub: Hub, model: Path, expected: dict[str, bytes], how: signal.Signals, where: str
) -> None:
    hub.create(NAME)
    process: list[subprocess.Popen[str]] = []
    after = 1 if where == "xet-write-token" else 0  # the first look is whether anything can be written
    hub.wire.fault(Call(lambda _: process[0].send_signal(how), at=None), lambda a: f"/{where}" in a.path, after=after)
    hub.wire.fault(Hang(), lambda asked: f"/{where}" in asked.path, after=after)
    process.append(start(hub, "to-safetensors", model, "-o", URL))
    stdout, stderr = process[0].communicate(timeout=LATEST)
    assert written(hub) == {}
    no_secret(stdout + stderr)
    if how == signal.SIGKILL:
        assert process[0].returncode == -signal.SIGKILL
    else:
        assert (process[0].returncode, stderr.strip()) == (130, "Interrupted.")
    hub.wire.heal()
    again = start(hub, "to-safetensors", model, "-o", URL)
    stdout, stderr = again.communicate(timeout=LATEST)
    assert again.returncode == 0, stderr
    assert written(hub) == expected
    assert commits(hub) == 2


def lead_to_cas(hub: Hub, *faults: Fault) -> None:
    """Have Xet's content store be a server that does what it should not."""
    token = {"casUrl": hub.data.url, "accessToken": "xet_secret", "exp": int(time.time()) + 3600}
    answer = Answer(200, {"Content-Type": "application/json"}, json.dumps(token).encode())
    hub.wire.fault(answer, lambda asked: "/xet-write-token/" in asked.path, times=None)
    for fault in faults:
        hub.data.fault(fault, times=None)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_who_waits_for_xet_is_interrupted(hub: Hub, model: Path, how: signal.Signals) -> None:
    hub.create(NAME)
    process: list[subprocess.Popen[str]] = []
    lead_to_cas(hub, Call(lambda _: process[0].send_signal(how), at=None), Hang())
    process.append(start(hub, "to-safetensors", model, "-o", URL))
    _, stderr = process[0].communicate(timeout=LATEST)
    assert (process[0].returncode, stderr.strip()) == (130, "Interrupted.")
    assert written(hub) == {}


@pytest.mark.parametrize("status", [401, 403, 500, 503])
def test_what_xet_refuses_is_said(wconv: Wconv, hub: Hub, model: Path, status: int) -> None:
    hub.create(NAME)
    lead_to_cas(hub, Answer(status))
    outcome = wconv("to-safetensors", model, "-o", URL, exit_code=7)
    said_once(outcome, URL, f"cannot be sent to the Hub ({status})")
    assert "xet_secret" not in outcome.stderr
    assert written(hub) == {}


def test_what_xet_says_is_not_passed_on(hub: Hub, model: Path) -> None:
    hub.create(NAME)
    lead_to_cas(hub, Answer(403))
    with pytest.raises(SystemRefused) as refused:
        convert(model, URL)
    assert hub.data.url not in "".join(traceback.format_exception(refused.value))


@pytest.mark.parametrize("token", [WRITES])
def test_no_secret_is_in_what_is_said_of_a_run(hub: Hub, model: Path, token: str, tmp_path: Path) -> None:
    hub.create(NAME)
    for options in (["--json"], ["-v"], ["--dry-run", "--json"]):
        run = start(hub, "to-safetensors", model, "-o", URL, *options)
        stdout, stderr = run.communicate(timeout=LATEST)
        assert run.returncode == 0, stderr
        no_secret(stdout + stderr)
        assert token not in stdout + stderr

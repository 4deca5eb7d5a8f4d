"""Names in a bucket, and who it is that asks: nothing is read or written but what is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converter.errors import BadFile, BadRequest, SystemRefused
from converter.storage import objects, place_of
from remote import models, stores

Wconv = Callable[..., Any]
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return models.save_linear(tmp_path / "m")


def line(outcome: Any) -> str:
    assert outcome.stderr.count("\n") == 1, outcome.stderr
    text: str = outcome.stderr.rstrip("\n")
    return text


@pytest.mark.parametrize(
    "name",
    [
        *("../x/model.safetensors", "/x/model.safetensors", "a//model.safetensors", "..\\model.safetensors"),
        *("%2e%2e/x/model.safetensors", "./model.safetensors", "s3://other/model.safetensors", "a\nb.safetensors"),
        *("", ".", ".."),
    ],
)
def test_an_index_that_names_what_is_elsewhere(name: str, s3: stores.S3, model: Path, wconv: Wconv) -> None:
    s3.put("x/model.safetensors", (model / "model.safetensors").read_bytes())
    s3.put(f"y/{INDEX}", json.dumps({"metadata": {}, "weight_map": {"embed_tokens.weight": name}}).encode())
    s3.put("y/config.json", b"{}")
    s3.wire.clear()
    outcome = wconv("recast", f"{s3.url}/y", "--dtype", "fp16", "-o", f"{s3.url}/z", exit_code=3)
    assert line(outcome).startswith(f"{s3.url}/y/")
    assert s3.names("z") == []
    asked = [one for one in s3.wire.asked if one.path != f"/{s3.bucket}"]
    assert all(one.path == f"/{s3.bucket}/z" or one.path.startswith(f"/{s3.bucket}/y") for one in asked)
    assert all(one.query["prefix"].startswith(("y", "z")) for one in s3.wire.asked if one.path == f"/{s3.bucket}")


@pytest.mark.parametrize(
    "url", ["s3://", "s3:///x", "s3://b", "s3://bü/x", "s3://-b/x", "az://c@account/x", "gs://b c/x"]
)
def test_urls_without_a_bucket(url: str) -> None:
    with pytest.raises(BadRequest) as caught:
        place_of(url)
    assert "names no bucket" in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:hidden@bucket/x",
        "s3://key:a/hidden@bucket/x",
        "az://container/x?sv=1&sig=hidden",
        "s3://bucket/x?X-Amz-Signature=hidden",
        "s3://bucket/x?Signature=hidden",
        "gs://bucket/x?a=b&X-Goog-Signature=hidden",
    ],
)
def test_what_may_be_a_secret_is_not_taken_nor_told(url: str) -> None:
    with pytest.raises(BadRequest) as caught:
        place_of(url)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("key", ["a//b", "../x", "a/../b", "a/./b", "a\nb", "/a"])
def test_urls_of_no_folder(key: str) -> None:
    with pytest.raises(BadRequest) as caught:
        place_of(f"s3://bucket/{key}")
    assert "has a part that no folder has" in str(caught.value)


@pytest.mark.parametrize(
    ("url", "spelled"),
    [
        ("S3A://bucket/a/b/", "s3://bucket/a/b"),
        ("gcs://bucket", "gs://bucket"),
        ("azure://container/x", "az://container/x"),
        ("abfs://container/x", "az://container/x"),
        ("s3://bucket/a b/ü+%2e", "s3://bucket/a b/ü+%2e"),
    ],
)
def test_how_places_are_spelled(url: str, spelled: str) -> None:
    assert str(place_of(url)) == spelled


@pytest.mark.parametrize("folder", ["a b", "ü", "a+b", "a%b", "%2e%2e", "a#b", "a?b", "a&b=c", "*", "a\\b", "'\"", "~"])
@pytest.mark.parametrize("store", ["s3", "az"])
def test_odd_names(store: str, folder: str, model: Path, wconv: Wconv, request: pytest.FixtureRequest) -> None:
    bucket: stores.Store = request.getfixturevalue(store)
    url = f"{bucket.url}/{folder}/out"
    if store == "az" and "\\" in folder:
        assert "has a backslash, which Azure takes for a slash" in line(wconv("to-bin", model, "-o", url, exit_code=2))
        return
    wconv("to-bin", model, "-o", url)
    assert {name.rpartition("/")[0] for name in bucket.names()} == {f"{folder}/out"}
    wconv("verify", url, model)
    assert "Up to date" in wconv("to-bin", model, "-o", url).stdout


@pytest.mark.parametrize("store", ["s3", "az"])
def test_what_begins_alike_is_another(store: str, model: Path, wconv: Wconv, request: pytest.FixtureRequest) -> None:
    bucket: stores.Store = request.getfixturevalue(store)
    bucket.put_folder(model, "model2/")
    bucket.put("model.txt", b"another's")
    before = bucket.get_folder()
    wconv("to-bin", model, "-o", f"{bucket.url}/model")
    assert {name: data for name, data in bucket.get_folder().items() if not name.startswith("model/")} == before
    assert line(wconv("inspect", f"{bucket.url}/mode", exit_code=3)).startswith(f"{bucket.url}/mode: does not exist")
    wconv("to-bin", model, "-o", f"{bucket.url}/model", "--overwrite", "--max-shard-size", "none")
    assert {name: data for name, data in bucket.get_folder().items() if not name.startswith("model/")} == before


def test_objects_that_stand_for_folders(s3: stores.S3, model: Path, wconv: Wconv) -> None:
    for name in ("x/", "x/vae/", "new/", "plain"):
        s3.put(name, b"")
    s3.put_folder(model, "x/")
    s3.put_folder(model, "plain/")
    for folder in ("x", "plain"):
        wconv("verify", f"{s3.url}/{folder}", model)
    wconv("to-bin", f"{s3.url}/x", "-o", f"{s3.url}/new")
    assert s3.names("new/") == ["new/", "new/config.json", "new/pytorch_model.bin"]


def test_names_that_no_folder_has(s3: stores.S3, model: Path, wconv: Wconv) -> None:
    s3.put_folder(model, "x/")
    s3.put("x//y", b"")
    problem = "holds an object whose name has an empty part or control characters"
    said = line(wconv("inspect", f"{s3.url}/x", exit_code=3))
    assert said == f"{s3.url}/x: {problem}. Rename it, or copy what is meant elsewhere."
    assert problem in line(wconv("to-bin", model, "-o", f"{s3.url}/x", exit_code=3))
    s3.put("/y", b"")
    wconv("to-bin", model, "-o", f"{s3.url}/new")


def test_a_folder_of_many_pages(s3: stores.S3, model: Path, wconv: Wconv) -> None:
    for number in range(130):
        s3.put(f"x/{number:03d}.txt", b"")
    s3.put_folder(model, "x/")
    place = place_of(f"{s3.url}/x")
    assert len(place.entries()) == 132
    wconv("verify", f"{s3.url}/x", model)
    assert line(wconv("to-bin", model, "-o", f"{s3.url}/x", exit_code=5)).startswith(
        f"{s3.url}/x: exists and is not empty"
    )


@pytest.mark.parametrize("end", ["source", "target"])
def test_a_dry_run_writes_nothing(end: str, s3: stores.S3, wconv: Wconv, tmp_path: Path) -> None:
    model = models.save_shards(tmp_path / "m", 3, 1 << 20)
    s3.put_folder(model, "from/")
    before = s3.get_folder()
    ends = (f"{s3.url}/from", tmp_path / "out") if end == "source" else (model, f"{s3.url}/to")
    s3.wire.clear()
    shown = json.loads(wconv("recast", ends[0], "--dtype", "bf16", "-o", ends[1], "--dry-run", "--json").stdout)
    assert {one.method for one in s3.wire.asked} <= {"HEAD", "GET"}
    assert s3.get_folder() == before
    assert not (tmp_path / "out").exists()
    planned = len(s3.wire.asked)
    s3.wire.clear()
    wconv("recast", ends[0], "--dtype", "bf16", "-o", ends[1])
    done = [one for one in s3.wire.asked if (one.method == "GET") == (end == "source")]
    what = "read" if end == "source" else "sent"
    nbytes = sum(one.sent if end == "source" else one.received for one in done)
    assert shown[f"{what}_nbytes"] <= nbytes <= shown[f"{what}_nbytes"] + 200_000
    assert shown[f"{what}_requests"] / 2 <= len(done) <= 2 * (shown[f"{what}_requests"] + planned)


# Profiles of AWS.

CREDENTIALS = """
[default]
aws_access_key_id = one
aws_secret_access_key = s1
[work]
aws_access_key_id = two
aws_secret_access_key = s2
aws_session_token = t2
"""
CONFIG = """
[default]
region = eu-west-1
aws_access_key_id = not this
[profile work]
region = eu-north-1
endpoint_url = http://127.0.0.1:9
s3 =
  max_concurrent_requests = 20
[profile other]
role_arn = arn:aws:iam::1:role/x
[work]
region = not this
"""
ONE = {"aws_access_key_id": "one", "aws_secret_access_key": "s1"}
TWO = {"aws_access_key_id": "two", "aws_secret_access_key": "s2", "aws_session_token": "t2"}


@pytest.fixture
def home(nowhere: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home" / ".aws"
    folder.mkdir(parents=True)
    (folder / "credentials").write_text(CREDENTIALS)
    (folder / "config").write_text(CONFIG)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return folder


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, {**ONE, "region": "eu-west-1"}),
        ({"AWS_PROFILE": "work"}, {**TWO, "region": "eu-north-1", "endpoint": "http://127.0.0.1:9"}),
        ({"AWS_DEFAULT_PROFILE": "work", "AWS_REGION": "x"}, {**TWO, "endpoint": "http://127.0.0.1:9"}),
        ({"AWS_ACCESS_KEY_ID": "k"}, {"region": "eu-west-1"}),
        ({"AWS_ACCESS_KEY_ID": "k", "AWS_DEFAULT_REGION": "x"}, {}),
        ({"AWS_ACCESS_KEY_ID": "k", "AWS_PROFILE": "work"}, {"region": "eu-north-1", "endpoint": "http://127.0.0.1:9"}),
        ({"AWS_CONFIG_FILE": "/none", "AWS_SHARED_CREDENTIALS_FILE": "/none"}, {}),
    ],
)
def test_profiles(env: dict[str, str], expected: dict[str, str], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert objects._profile() == expected


def test_profiles_that_are_not_there(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(SystemRefused) as caught:
        objects._profile()
    files = f"They are {home / 'credentials'} and {home / 'config'}."
    assert str(caught.value) == f"profile nobody: is in none of the files of AWS. {files}"
    (home / "config").write_text("what is this")
    with pytest.raises(BadFile) as bad:
        objects._profile()
    assert str(bad.value).startswith(f"{home / 'config'}: cannot be read as profiles of AWS. ")


def test_a_profile_leads_to_a_store(
    s3: stores.S3, home: Path, model: Path, wconv: Wconv, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = s3.env
    for name in env:
        monkeypatch.delenv(name)
    keys = f"aws_access_key_id = {env['AWS_ACCESS_KEY_ID']}\naws_secret_access_key = {env['AWS_SECRET_ACCESS_KEY']}\n"
    (home / "credentials").write_text(f"[lab]\n{keys}")
    (home / "config").write_text(f"[profile lab]\nregion = us-east-1\nendpoint_url = {s3.wire.url}\n")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    wconv("to-bin", model, "-o", f"{s3.url}/x")
    assert s3.names() == ["x/config.json", "x/pytorch_model.bin"]

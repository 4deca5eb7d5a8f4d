"""Does the stand-in of the Hub answer the real clients, and refuse them, as the Hub does?"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import urllib3

from remote.hub_repos import whole
from remote.hub_server import READS, Hub
from remote.wire import Answer, Call, Drop

WEIGHTS = os.urandom(12 << 20)
NAMES = ("config.json", "model.safetensors", "vae/model.safetensors")
# A process that streams a file into Xet, as a worker does, and says what it was.
UPLOAD = """
import sys, hf_xet
path, url, token = sys.argv[1:]
headers = {"Authorization": f"Bearer {token}"}
with hf_xet.XetSession().new_upload_commit(token_refresh_url=url, token_refresh_headers=headers) as commit:
    stream = commit.start_upload_stream(name=path, sha256=hf_xet.COMPUTE_SHA256)
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            stream.write(piece)
    print(stream.finish().xet_info.sha256)
"""


@pytest.fixture
def api(hub: Hub) -> Any:
    from huggingface_hub import HfApi

    return HfApi(hub.endpoint)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "m" / "vae").mkdir(parents=True)
    for name, data in zip(NAMES, (b"{}", WEIGHTS, WEIGHTS[:1000]), strict=True):
        (tmp_path / "m" / name).write_bytes(data)
    return tmp_path / "m"


def commit(api: Any, name: str, files: dict[str, bytes], **more: Any) -> Any:
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    return api.create_commit(name, operations, commit_message="ours", **more)


def commit_by_hand(hub: Hub, changes: Sequence[tuple[str, str, str]], **header: str) -> urllib3.BaseHTTPResponse:
    """Commit contents that are there already."""
    lines: list[dict[str, Any]] = [{"key": "header", "value": {"summary": "by hand", **header}}]
    lines += [{"key": key, "value": {"path": path, "algo": "sha256", "oid": oid}} for key, path, oid in changes]
    body = "\n".join(map(json.dumps, lines))
    headers = {"Authorization": f"Bearer {hub.token}", "Content-Type": "application/x-ndjson"}
    return urllib3.request("POST", f"{hub.endpoint}/api/models/me/m/commit/main", body=body, headers=headers)


@pytest.mark.parametrize("in_xet", [False, True])
def test_what_is_added_is_downloaded_by_the_real_client(hub: Hub, api: Any, folder: Path, in_xet: bool) -> None:
    head = hub.add("other/m", folder, in_xet=in_xet)
    for name in NAMES:
        path = Path(api.hf_hub_download("other/m", name))
        assert path.read_bytes() == (folder / name).read_bytes()
        assert f"/{head}/" in path.as_posix()
        assert path.is_relative_to(hub.folder)
    assert bool(hub.data.asked) is not in_xet
    assert hub.leaks() == []


# The library warns of how it sends an open file.
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@pytest.mark.parametrize("is_lfs", [False, True])
def test_what_the_real_client_commits_is_there(hub: Hub, api: Any, folder: Path, is_lfs: bool) -> None:
    from huggingface_hub import CommitOperationAdd

    api.create_repo("me/new")
    parent = api.model_info("me/new").sha
    with contextlib.ExitStack() as stack:
        paths = [folder / name for name in NAMES]
        sources = [stack.enter_context(path.open("rb")) for path in paths] if is_lfs else paths
        operations = [CommitOperationAdd(name, source) for name, source in zip(NAMES, sources, strict=True)]
        api.create_commit("me/new", operations, commit_message="new", parent_commit=parent)
    files = hub.files("me/new")
    assert files.keys() == {".gitattributes", *NAMES}
    assert (files["model.safetensors"].xet_hash is None) is is_lfs
    assert hub.download("me/new", "model.safetensors") == WEIGHTS
    assert [one.title for one in hub.commits("me/new")] == ["new", "initial commit"]
    assert hub.leaks() == []


def test_several_processes_stream_into_one_commit(hub: Hub, api: Any, folder: Path) -> None:
    from huggingface_hub import CommitOperationDelete

    hub.add("me/m", folder)
    url = f"{hub.endpoint}/api/models/me/m/xet-write-token/main"
    (folder / "other.bin").write_bytes(WEIGHTS[::-1])
    paths = [folder / "model.safetensors", folder / "other.bin"]
    commands = [[sys.executable, "-c", UPLOAD, str(path), url, hub.token] for path in paths]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    try:
        hashes = [worker.communicate(timeout=60)[0].strip() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert hashes == [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert len(hub.commits("me/m")) == 2
    changes = [("lfsFile", f"new/{path.name}", sha256) for path, sha256 in zip(paths, hashes, strict=True)]
    assert commit_by_hand(hub, changes, parentCommit=hub.head("me/m")).status == 200
    api.create_commit("me/m", [CommitOperationDelete("vae", is_folder=True)], commit_message="less")
    files = hub.get_folder("me/m")
    assert files.keys() == {
        ".gitattributes",
        "config.json",
        "model.safetensors",
        "new/model.safetensors",
        "new/other.bin",
    }
    assert files["new/other.bin"] == WEIGHTS[::-1]
    assert Path(api.hf_hub_download("me/m", "new/other.bin")).read_bytes() == WEIGHTS[::-1]


def test_what_was_not_uploaded_is_not_committed(hub: Hub) -> None:
    hub.create("me/m")
    answer = commit_by_hand(hub, [("lfsFile", "x", "0" * 64)])
    assert answer.status == 400
    assert "pointed to a file that does not exist" in answer.headers["X-Error-Message"]
    assert len(hub.commits("me/m")) == 1


def test_a_commit_on_an_old_parent_is_refused(hub: Hub, api: Any) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    hub.create("me/m")
    parent = hub.head("me/m")
    theirs = {"theirs": whole(b"1")}
    hub.wire.fault(Call(lambda asked: hub.commit("me/m", theirs), at=None), lambda asked: "/commit/" in asked.path)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as raised:
        commit(api, "me/m", {"ours": b"2"}, parent_commit=parent)
    assert raised.value.response.status_code == 412
    assert hub.files("me/m").keys() == {"theirs"}


def test_a_pull_request_has_a_revision_of_its_own(hub: Hub, api: Any, folder: Path) -> None:
    hub.add("other/m", folder)
    made = commit(api, "other/m", {"x.bin": WEIGHTS, "y": b"1"}, create_pr=True)
    assert made.pr_revision == "refs/pr/1"
    assert "x.bin" not in hub.files("other/m")
    assert hub.head("other/m", "refs/pr/1") == made.oid
    assert Path(api.hf_hub_download("other/m", "x.bin", revision="refs/pr/1")).read_bytes() == WEIGHTS
    assert Path(api.hf_hub_download("other/m", "y", revision="refs/pr/1")).read_bytes() == b"1"
    assert {one.path for one in api.list_repo_tree("other/m", revision="refs/pr/1")} > {"x.bin", "vae"}
    refs = api.list_repo_refs("other/m", include_pull_requests=True)
    assert [one.ref for one in refs.pull_requests] == ["refs/pr/1"]
    assert commit(api, "other/m", {"z": b"2"}, create_pr=True).pr_num == 2


def test_what_is_committed_later_is_read_with_a_new_token(hub: Hub, api: Any) -> None:
    hub.create("me/m")
    for data in (WEIGHTS, WEIGHTS[::-1]):
        commit(api, "me/m", {"x.bin": data})
        assert Path(api.hf_hub_download("me/m", "x.bin")).read_bytes() == data
    assert hub.data.asked == []


def test_branches_and_tags(hub: Hub, api: Any, folder: Path) -> None:
    first = hub.add("me/m", folder)
    api.create_branch("me/m", branch="dev/x")
    api.create_tag("me/m", tag="v1")
    commit(api, "me/m", {"new": b"1"}, revision="dev/x")
    assert hub.head("me/m") == first == hub.head("me/m", "v1")
    assert Path(api.hf_hub_download("me/m", "new", revision="dev/x")).read_bytes() == b"1"
    assert api.model_info("me/m", revision="v1").sha == first
    assert [one.title for one in api.list_repo_commits("me/m", revision="dev/x")] == ["ours", "add", "initial commit"]
    hub.tag("me/m", "v2", "dev/x")
    assert {one.name for one in api.list_repo_refs("me/m").tags} == {"v1", "v2"}


def test_listings(hub: Hub, api: Any, folder: Path) -> None:
    hub.add("me/m", folder)
    hub.page = 2
    tree = list(api.list_repo_tree("me/m", recursive=True))
    assert [one.path for one in tree] == [".gitattributes", "config.json", "model.safetensors", "vae", NAMES[2]]
    assert len([asked for asked in hub.wire.asked if "/tree/" in asked.path]) == 3
    assert [one.path for one in api.list_repo_tree("me/m", "vae")] == [NAMES[2]]
    assert tree[2].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    (info,) = api.get_paths_info("me/m", ["model.safetensors", "other"])
    assert (info.size, info.lfs.sha256) == (len(WEIGHTS), tree[2].lfs.sha256)
    known = api.model_info("me/m", files_metadata=True)
    assert {one.rfilename: one.size for one in known.siblings}["model.safetensors"] == len(WEIGHTS)
    assert api.model_info("me/m", expand=["sha"]).siblings is None
    assert api.whoami()["name"] == "me"


@pytest.mark.parametrize(
    ("name", "revision", "path", "status", "code"),
    [
        ("other/none", "main", "x", 404, "RepoNotFound"),
        ("other/private", "main", "x", 404, "RepoNotFound"),
        ("other/gated", "main", "x", 403, "GatedRepo"),
        ("me/m", "none", "x", 404, "RevisionNotFound"),
        ("me/m", "main", "none", 404, "EntryNotFound"),
    ],
)
def test_what_is_refused(hub: Hub, name: str, revision: str, path: str, status: int, code: str) -> None:
    hub.create("me/m")
    hub.create("other/gated", is_gated=True)
    hub.create("other/private", is_private=True)
    url = f"{hub.endpoint}/{name}/resolve/{revision}/{path}"
    known = urllib3.request("HEAD", url, headers={"Authorization": f"Bearer {hub.token}"})
    assert (known.status, known.headers["X-Error-Code"]) == (status, code)
    nobody = urllib3.request("HEAD", url)
    assert (nobody.status, nobody.headers["X-Error-Code"]) == (401 if name.startswith("other") else status, code)
    wrong = urllib3.request("HEAD", url, headers={"Authorization": "Bearer hf_other"})
    assert (wrong.status, wrong.headers["X-Error-Message"]) == (401, "Invalid credentials in Authorization header")


def test_who_may_not_write(hub: Hub) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    hub.create("me/m")
    hub.create("other/m")
    for name, token in (("me/m", READS), ("other/m", hub.token)):
        with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
            commit(HfApi(hub.endpoint, token), name, {"x": b"1"})
    with pytest.raises(HfHubHTTPError, match="401"):
        commit(HfApi(hub.endpoint, token=False), "me/m", {"x": b"1"})
    with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
        HfApi(hub.endpoint, READS).create_repo("me/new")
    assert not hub.files("me/m").keys() & {"x"}


def test_a_repository_is_made_once(hub: Hub, api: Any) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    api.create_repo("me/m", private=True)
    api.create_repo("me/m", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo("me/m")
    assert hub.repos["me/m"].is_private


def test_an_address_of_data_ends_some_time(hub: Hub, folder: Path) -> None:
    hub.add("me/m", folder)
    hub.data_lives = 0.2
    head = urllib3.request("HEAD", f"{hub.endpoint}/me/m/resolve/main/model.safetensors", redirect=False)
    url = head.headers["Location"]
    assert (head.status, head.headers["X-Linked-Size"]) == (302, str(len(WEIGHTS)))
    assert head.headers["X-Repo-Commit"] == hub.head("me/m")
    assert url.startswith(hub.data.url)
    part = urllib3.request("GET", url, headers={"Range": "bytes=5-9"})
    assert (part.status, part.data, part.headers["Content-Range"]) == (206, WEIGHTS[5:10], f"bytes 5-9/{len(WEIGHTS)}")
    assert urllib3.request("GET", url.replace("Expires=1", "Expires=2")).status == 403
    time.sleep(0.25)
    assert urllib3.request("GET", url).status == 403
    assert hub.leaks() == []


def test_a_token_that_is_taken_elsewhere_is_noticed(hub: Hub, folder: Path) -> None:
    hub.add("me/m", folder)
    url = f"{hub.endpoint}/me/m/resolve/main/model.safetensors"
    location = urllib3.request("HEAD", url, redirect=False).headers["Location"]
    answer = urllib3.request("GET", location, headers={"Authorization": f"Bearer {hub.token}"})
    assert answer.status == 400
    assert hub.leaks() == hub.data.asked[-1:]


def test_small_files_are_behind_a_redirect_too(hub: Hub, folder: Path) -> None:
    hub.add("me/m", folder)
    url = f"{hub.endpoint}/me/m/resolve/main/config.json"
    head = urllib3.request("HEAD", url, redirect=False)
    assert head.status == 307
    assert head.headers["Location"].startswith("/api/resolve-cache/models/me/m/")
    assert urllib3.request("GET", url).data == b"{}"


def test_faults_of_the_hub(hub: Hub, api: Any, folder: Path) -> None:
    hub.add("me/m", folder)
    busy = hub.wire.fault(Answer(429, {"Retry-After": "1"}), lambda asked: "/tree/" in asked.path)
    cut = hub.data.fault(Drop(1_000_000, reset=False))
    assert len(list(api.list_repo_tree("me/m"))) == 4
    assert Path(api.hf_hub_download("me/m", "model.safetensors")).read_bytes() == WEIGHTS
    assert len(busy.met) == 1
    assert cut.met[0].sent == 1_000_000
    assert hub.leaks() == []


def test_what_goes_wrong_inside_comes_out(nowhere: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path)
    hub.create("me/m")
    monkeypatch.setattr(hub.store, "lend", lambda: 1 / 0)
    url = f"{hub.endpoint}/api/models/me/m/xet-write-token/main"
    assert urllib3.request("GET", url, headers={"Authorization": f"Bearer {hub.token}"}).status == 500
    with pytest.raises(ZeroDivisionError):
        hub.close()

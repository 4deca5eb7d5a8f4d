from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest

from remote.hub_server import Hub

WEIGHTS = os.urandom(12 << 20)


@pytest.fixture
def api(hub: Hub) -> Any:
    from huggingface_hub import HfApi

    return HfApi(hub.endpoint)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "m" / "vae").mkdir(parents=True)
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "model.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "m" / "vae" / "model.safetensors").write_bytes(WEIGHTS[:1000])
    return tmp_path / "m"


@pytest.mark.parametrize("in_xet", [False, True])
def test_what_is_added_is_downloaded_by_the_real_client(hub: Hub, api: Any, folder: Path, in_xet: bool) -> None:
    commit = hub.add("other/m", folder, in_xet=in_xet)
    for name in ("config.json", "model.safetensors", "vae/model.safetensors"):
        path = Path(api.hf_hub_download("other/m", name))
        assert path.read_bytes() == (folder / name).read_bytes()
        assert path.parts[-1 - name.count("/") - 1] == commit
    assert hub.leaks() == []
    assert bool(hub.data.asked) is not in_xet


# The library warns of how it sends an open file.
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@pytest.mark.parametrize("is_lfs", [False, True])
def test_what_the_real_client_commits_is_there(hub: Hub, api: Any, folder: Path, is_lfs: bool) -> None:
    from huggingface_hub import CommitOperationAdd

    api.create_repo("me/new")
    parent = api.model_info("me/new").sha
    names = ("config.json", "model.safetensors", "vae/model.safetensors")
    with contextlib.ExitStack() as stack:
        paths = [folder / name for name in names]
        sources = [stack.enter_context(path.open("rb")) for path in paths] if is_lfs else paths
        operations = [CommitOperationAdd(name, source) for name, source in zip(names, sources, strict=True)]
        api.create_commit("me/new", operations, commit_message="new", parent_commit=parent)
    files = hub.files("me/new")
    assert files.keys() == {".gitattributes", *names}
    assert (files["model.safetensors"].xet_hash is None) is is_lfs
    assert hub.download("me/new", "model.safetensors") == WEIGHTS
    assert [one.title for one in hub.commits("me/new")] == ["new", "initial commit"]
    assert hub.leaks() == []

"""The model card of a repository that is written to: what it says, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from support.tiny import make_state, save_bin_shards, write_json

from remote.hub_repos import whole
from remote.hub_server import Hub

SOURCE = "org/model"
CARD = "README.md"
MINE = "---\nlicense: mit\ntags:\n- small\n---\n\n# A model\n\nIts words.\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = save_bin_shards(make_state(), tmp_path / "model").parent
    write_json(folder / "config.json", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    return folder


def card_of(hub: Hub, name: str) -> str:
    return hub.download(name, CARD).decode()


def test_a_new_repository_says_what_it_is_made_from(wconv: Callable[..., Any], hub: Hub, model: Path) -> None:
    commit = hub.add(SOURCE, model)
    wconv("recast", f"hf://{SOURCE}", "--dtype", "bf16", "-o", "hf://me/small", "--create")
    card = ModelCard(card_of(hub, "me/small"))
    assert card.data.base_model == SOURCE
    assert f"`hf://{SOURCE}` at commit `{commit}`" in card.text
    assert "- safetensors, bf16, from `pytorch_model.bin.index.json`" in card.text


def test_the_card_of_the_source_keeps_its_words(wconv: Callable[..., Any], hub: Hub, model: Path) -> None:
    (model / CARD).write_text(MINE)
    commit = hub.add(SOURCE, model)
    wconv("to-safetensors", f"hf://{SOURCE}", "-o", "hf://me/copy", "--create")
    text = card_of(hub, "me/copy")
    assert text.startswith(MINE)
    assert text.count("## Conversion") == 1
    assert commit in text
    assert ModelCard(text).data.license == "mit"


def test_a_card_that_is_longer_than_any_is_not_lost(wconv: Callable[..., Any], hub: Hub, model: Path) -> None:
    (model / CARD).write_text(MINE + "x" * 1_000_000)
    wconv("to-safetensors", model, "-o", "hf://me/copy", "--create")
    assert card_of(hub, "me/copy") == MINE + "x" * 1_000_000


def test_a_card_that_is_there_stays(wconv: Callable[..., Any], hub: Hub, model: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / CARD).write_text("Made by hand.\n")
    hub.add("me/mine", theirs)
    (model / CARD).write_text(MINE)
    outcome = wconv("to-safetensors", model, "-o", "hf://me/mine")
    assert card_of(hub, "me/mine") == "Made by hand.\n"
    assert "hf://me/mine/README.md is there already, and stays" in outcome.stdout


def test_a_card_is_no_reason_to_write_again(wconv: Callable[..., Any], hub: Hub, model: Path) -> None:
    (model / CARD).write_text(MINE)
    (model / "LICENSE").write_text("MIT")
    command = ("to-safetensors", model, "-o", "hf://me/copy", "--create")
    wconv(*command)
    hub.commit("me/copy", {**hub.files("me/copy"), "LICENSE": whole(b"another")})
    assert wconv(*command).stdout == "Up to date: hf://me/copy is as it would be.\n"
    hub.commit("me/copy", {**hub.files("me/copy"), "config.json": whole(b"{}")})
    wconv(*command, exit_code=5)


def test_a_proposal_changes_no_card(wconv: Callable[..., Any], hub: Hub, model: Path) -> None:
    (model / CARD).write_text(MINE)
    hub.add(SOURCE, model)
    wconv("recast", f"hf://{SOURCE}", "--dtype", "bf16", "--pr")
    assert hub.download(SOURCE, CARD, "refs/pr/1").decode() == MINE


def test_nothing_of_this_machine_is_told(wconv: Callable[..., Any], hub: Hub, model: Path) -> None:
    wconv("to-safetensors", model, "-o", "hf://me/model", "--create")
    assert "converted by wconv" in card_of(hub, "me/model")
    for content in (card_of(hub, "me/model"), *(commit.title for commit in hub.commits("me/model"))):
        assert str(model) not in content


@pytest.mark.parametrize("raw", [b"\xff\xfe not a text", b"---\nno: end"])
def test_a_card_that_is_odd_is_kept_or_refused(raw: bytes, wconv: Callable[..., Any], hub: Hub, model: Path) -> None:
    (model / CARD).write_bytes(raw)
    outcome = wconv("to-safetensors", model, "-o", "hf://me/model", "--create", exit_code=None)
    if outcome.exit_code:
        assert outcome.exit_code == 3
        assert "README.md: is no text" in outcome.stderr
    else:
        assert hub.download("me/model", CARD).startswith(raw)

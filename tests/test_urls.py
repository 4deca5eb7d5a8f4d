"""Places that are named by URLs: what is no URL, though it was meant to be one, is said before anything is asked."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny import make_state, save

from converter.errors import BadRequest
from converter.storage import place_of


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("s3:/bucket/m", "s3://bucket/m"),
        ("s3:bucket/m", "s3://bucket/m"),
        ("hf:org/model", "hf://org/model"),
        ("hf:/org/model", "hf://org/model"),
        ("HTTPS:/host/x", "https://host/x"),
        (Path("hf://org/model"), "hf://org/model"),
    ],
)
def test_a_slip_of_a_url_is_no_path(text: str | Path, meant: str) -> None:
    with pytest.raises(BadRequest, match=re.escape(f"is no URL. It is spelled {meant}.")):
        place_of(text)


def test_what_is_there_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wconv: Callable[..., Any]) -> None:
    monkeypatch.chdir(tmp_path)
    save(make_state(), Path("s3:") / "m.bin")
    wconv("inspect", "s3:/m.bin")
    wconv("to-safetensors", "s3:/m.bin", "-o", "s3:/m.safetensors")
    assert (tmp_path / "s3:" / "m.safetensors").is_file()


@pytest.mark.parametrize("page", ["", "/", "/tree/main", "/blob/main/model.safetensors", "/commit/abc", "/discussions"])
def test_a_page_of_the_hub_is_no_file(page: str) -> None:
    with pytest.raises(BadRequest, match=r"is a page of the Hub\. Name the model itself: hf://org/my\.model\."):
        place_of(f"https://huggingface.co/org/my.model{page}")


def test_a_file_of_the_hub_is_a_file() -> None:
    url = "https://huggingface.co/org/model/resolve/main/model.safetensors"
    assert str(place_of(url)) == url

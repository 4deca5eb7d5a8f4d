"""By what a file in a bucket is known to be of the very same command: what it is made of, and how."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import tiny

from converter.recipes.convert import plan_conversion
from converter.recipes.request import Request
from converter.run import upload

NAME = "model.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny.save({"a": torch.full((8,), 1e6), "b": torch.zeros(8)}, tmp_path / "m" / NAME)
    return tmp_path / "m"


def note_of(source: Path, out: Path, **options: object) -> str:
    """Give the note of a file where nobody says what was asked."""
    return upload.notes_of(plan_conversion(Request.of(source, out, **options)), "")[NAME]


def test_what_comes_out_otherwise_has_another_note(model: Path, tmp_path: Path) -> None:
    """Their headers are the same."""
    notes = {note_of(model, tmp_path / "out", dtype="fp16", on_overflow=how) for how in ("error", "saturate", "inf")}
    assert len(notes) == 3


def test_another_wconv_may_make_it_otherwise(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = note_of(model, tmp_path / "out")
    monkeypatch.setattr(upload, "__version__", "0.0.1")
    assert note_of(model, tmp_path / "out") != before


def test_where_one_is_makes_no_difference(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = note_of(model, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    assert note_of(model, tmp_path / "out") == before


def test_of_many_small_files_few_are_held(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        (model / f"{number}.txt").write_bytes(bytes(100 - number))
    (model / "config.json").write_text("{}")
    monkeypatch.setattr(upload, "_HELD_NBYTES", 200)
    uploads, texts = upload._split(plan_conversion(Request.of(model, tmp_path / "out")), "")
    assert [key.rpartition("/")[2] for key, *_ in texts] == ["config.json", "4.txt", "3.txt"]
    assert {one.place.name for one in uploads} == {NAME, "0.txt", "1.txt", "2.txt"}

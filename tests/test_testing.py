"""The strategies that wconv ships: what they make is right, and what they damage is refused or still right."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.judges import described_by_torch, described_by_wconv

from converter.errors import BadFile, BadRequest, Unsupported
from converter.testing import State, damaged, files


def described(state: State) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (dtype.tag, shape, raw) for name, (dtype, shape, raw) in state.items()}


@pytest.mark.parametrize("form", ["safetensors", "torch"])
@given(data=st.data())
def test_a_file_holds_what_it_says(scratch: Path, form: str, data: st.DataObject) -> None:
    raw, state = data.draw(files(form))
    path = scratch / "model"
    path.write_bytes(raw)
    assert described_by_wconv(path) == described(state)
    if form == "torch":
        assert described_by_torch(path) == described(state)


@pytest.mark.parametrize("form", ["safetensors", "torch"])
@given(data=st.data())
def test_a_damaged_file_is_refused_or_is_one_of_tensors(scratch: Path, form: str, data: st.DataObject) -> None:
    raw, _ = data.draw(files(form))
    path = scratch / "model"
    path.write_bytes(data.draw(damaged(raw)))
    with contextlib.suppress(BadRequest, BadFile, Unsupported):
        assert all(isinstance(name, str) for name in described_by_wconv(path))

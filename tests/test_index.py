"""The index of a sharded checkpoint: what the libraries write is read and written alike, what is broken is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.odd_names import ODD_NAMES

from converter.errors import BadFile
from converter.models import index
from converter.models.index import WeightIndex, parse_index, read_index
from converter.storage import place_of

PATH = Path("model.safetensors.index.json")
GOLDEN = b"""{
  "metadata": {
    "total_size": 12
  },
  "weight_map": {
    "a.weight": "model-00001-of-00002.safetensors",
    "b.weight": "model-00002-of-00002.safetensors"
  }
}
"""
CONTENT = WeightIndex(
    {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"},
    {"total_size": 12},
)


def with_shard(shard: Any) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": {"a": "model-00001-of-00002.bin", "b": shard}}).encode()


def test_golden_bytes_both_ways() -> None:
    assert parse_index(GOLDEN, PATH) == CONTENT
    assert CONTENT.render() == GOLDEN


def test_order_of_making_does_not_show() -> None:
    backwards = WeightIndex(dict(reversed([*CONTENT.weight_map.items()])), CONTENT.metadata)
    assert backwards.render() == GOLDEN


@pytest.mark.parametrize("name", ["unet", "llama"])
def test_what_the_libraries_write_is_rendered_byte_for_byte(builders: Any, tmp_path: Path, name: str) -> None:
    model = builders.make_unet() if name == "unet" else builders.make_llama(tied=False)
    model.save_pretrained(tmp_path, max_shard_size=builders.shard_limit(model.state_dict(), 3))
    [path] = tmp_path.glob("*.index.json")
    parsed = read_index(place_of(path))
    assert parsed.weight_map.keys() == model.state_dict().keys()
    assert parsed.render() == path.read_bytes()


def test_metadata_is_there_even_when_empty() -> None:
    # Both libraries look the key up, and fail without it.
    assert json.loads(WeightIndex({"a": "x.bin"}, {}).render())["metadata"] == {}


@pytest.mark.parametrize(
    "raw", [b'{"weight_map": {"a": "x.bin"}}', b'{"metadata": null, "weight_map": {"a": "x.bin"}}']
)
def test_metadata_may_be_missing(raw: bytes) -> None:
    assert parse_index(raw, PATH) == WeightIndex({"a": "x.bin"}, {}, has_metadata=False)


def test_unknown_metadata_is_kept() -> None:
    raw = (
        b'{"metadata": {"total_size": 4, "dtype": "bfloat16", "deep": {"x": [1, null]}}, "weight_map": {"a": "x.bin"}}'
    )
    assert parse_index(raw, PATH).metadata == {"total_size": 4, "dtype": "bfloat16", "deep": {"x": [1, None]}}


def test_a_byte_order_mark_is_read_over() -> None:
    assert parse_index(b"\xef\xbb\xbf" + GOLDEN, PATH) == CONTENT


@pytest.mark.parametrize(
    "shard", ["x.bin", "model v2.bin", "...bin", "é.bin", "model-00001-of-00002.bin", ".hidden.bin"]
)
def test_a_bare_file_name_is_a_shard(shard: str) -> None:
    assert parse_index(with_shard(shard), PATH).weight_map["b"] == shard


@pytest.mark.parametrize(
    "shard",
    ["", ".", "..", "../x.bin", "a/x.bin", "a/", "/x.bin", "/etc/passwd", "..\\x.bin", "a\\x.bin", "\\x.bin",
     "\\\\host\\share\\x.bin", "C:x.bin", "C:\\x.bin", "c:/x.bin", "./x.bin", "x.bin/", "x.bin/..", "x\0.bin",
     None, 3, 1.5, True, ["x.bin"], {"x": "x.bin"}, {}],
    ids=repr,
)  # fmt: skip
def test_a_shard_that_is_no_bare_file_name_is_refused(shard: Any) -> None:
    with pytest.raises(BadFile):
        parse_index(with_shard(shard), PATH)


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"\xff\xfe", b"\x80", b"<html>", b"version https://git-lfs.github.com/spec/v1", b"null", b"3", b'"x"',
     b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": null}', b'{"weight_map": ["x.bin"]}', b'{"weight_map": "x"}',
     b'{"metadata": {}}', b'{"metadata": [1], "weight_map": {"a": "x.bin"}}',
     b'{"metadata": "x", "weight_map": {"a": "x.bin"}}', b'{"weight_map": {"a": "x.bin"}} {}', b"[" * 100_000,
     b'{"a":' * 100_000, b'{"weight_map": {"a": "x.bin"}, "n": ' + b"9" * 5000 + b"}",
     GOLDEN.decode().encode("utf-16")],
    ids=lambda raw: repr(raw[:40]),
)  # fmt: skip
def test_what_is_no_index_is_refused(raw: bytes) -> None:
    with pytest.raises(BadFile, match="index"):
        parse_index(raw, PATH)


@pytest.mark.parametrize(
    "raw",
    [b'{"weight_map": {"a": "x.bin", "b": "x.bin", "a": "y.bin"}}', b'{"weight_map": {"a": "x.bin", "a": "x.bin"}}',
     b'{"weight_map": {"a": "x.bin"}, "weight_map": {"a": "y.bin"}}',
     b'{"weight_map": {"a": "x.bin", "\\u0061": "y"}}'],
)  # fmt: skip
def test_a_name_given_twice_is_refused(raw: bytes) -> None:
    with pytest.raises(BadFile, match="twice"):
        parse_index(raw, PATH)


def test_truncated_anywhere_it_is_refused() -> None:
    whole = GOLDEN.rstrip()
    for nbytes in range(len(whole)):
        with pytest.raises(BadFile):
            parse_index(whole[:nbytes], PATH)


def test_an_index_too_long_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / PATH
    path.write_bytes(GOLDEN)
    monkeypatch.setattr(index, "MAX_TEXT_NBYTES", len(GOLDEN) - 1)
    with pytest.raises(BadFile, match="bytes long"):
        read_index(place_of(path))
    monkeypatch.setattr(index, "MAX_TEXT_NBYTES", len(GOLDEN))
    assert read_index(place_of(path)) == CONTENT


@given(
    st.dictionaries(ODD_NAMES, st.sampled_from(["x.bin", "y.bin", "é 1.bin"]), min_size=1),
    st.dictionaries(ODD_NAMES, st.integers() | ODD_NAMES | st.none() | st.floats(allow_nan=False)),
)
def test_what_is_rendered_is_read_back(weight_map: dict[str, str], metadata: dict[str, Any]) -> None:
    written = WeightIndex(weight_map, metadata)
    assert parse_index(written.render(), PATH) == written

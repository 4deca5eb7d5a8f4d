"""A file's format is what its first bytes say, whatever its name; what people have in place of weights is called so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support.judges import saved_by_torch
from support.tiny import read_file

from converter.errors import BadFile, Unsupported, WconvError
from converter.formats import could_be_weights
from converter.storage import place_of

STATE = {"x": torch.arange(3.0)}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 3\n"
OLD = saved_by_torch(STATE, _use_new_zipfile_serialization=False)
TAR = b"pickle".ljust(257, b"\0") + b"ustar\0" + b"00" + bytes(247)

LOOKALIKES = {
    "empty": (b"", BadFile, "is empty"),
    "git-lfs": (LFS, BadFile, "git-lfs pointer.*git lfs pull"),
    "html": (b"<!DOCTYPE html>\n<html><body>404</body></html>", BadFile, "web page"),
    "html, small": (b"\n  <html><head>", BadFile, "web page"),
    "html, with a mark": (b"\xef\xbb\xbf<!doctype html>", BadFile, "web page"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', BadFile, "web page"),
    "zeros": (bytes(4096), BadFile, "zeros"),
    "json": (b'{"error": "Repository not found"}', BadFile, "JSON"),
    "text": (b"Access denied\n", BadFile, "no weight file"),
    "one byte": (b"P", BadFile, "no weight file"),
    "pickle": (b"\x80\x04\x95\x05\0\0\0\0\0\0\0}\x94.", BadFile, "no weight file"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(16), Unsupported, "GGUF"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(16), Unsupported, "HDF5"),
    "before torch 1.6, cut short": (OLD[:-1], BadFile, "cut short"),
    "before torch 0.2": (TAR, Unsupported, "before 0.1.10"),
}


@pytest.mark.parametrize(("raw", "error", "problem"), LOOKALIKES.values(), ids=LOOKALIKES)
def test_what_is_there_in_place_of_weights(tmp_path: Path, raw: bytes, error: type[WconvError], problem: str) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(raw)
    with pytest.raises(error, match=problem):
        read_file(path)


@pytest.mark.parametrize("name", ["x.bin", "x.safetensors", "x.gguf", "x", "x.html"])
def test_the_name_says_nothing(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for raw, form in ((saved_by_torch(STATE), "torch"), (safetensors.torch.save(STATE), "safetensors")):
        path.write_bytes(raw)
        assert read_file(path).format == form


@pytest.mark.parametrize(
    ("raw", "expected"),
    [(saved_by_torch(STATE), True), (safetensors.torch.save(STATE), True), (OLD, True), (TAR, True), (LFS, False),
     (b"", False), (b"GGUF", False), (bytes(600), False)],
    ids=["torch", "safetensors", "old", "tar", "git-lfs", "empty", "gguf", "zeros"],
)  # fmt: skip
def test_what_could_be_weights(tmp_path: Path, raw: bytes, expected: bool) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(raw)
    assert could_be_weights(place_of(path)) == expected


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="no regular file"):
        read_file(tmp_path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="does not exist"):
        read_file(tmp_path / "x.bin")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    os.mkfifo(path)
    with pytest.raises(BadFile, match="no regular file"):
        read_file(path)


def test_a_link_is_followed(tmp_path: Path) -> None:
    blob, link = tmp_path / "blob", tmp_path / "model.bin"
    blob.write_bytes(saved_by_torch(STATE))
    try:
        link.symlink_to(blob)
    except OSError:
        pytest.skip("the system gives no links")
    assert read_file(link).tensors[0].name == "x"

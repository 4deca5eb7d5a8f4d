"""Archives of numpy are read as numpy reads them, which is the judge; what is no plain array is refused by its name."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.archives import lie

from converter.errors import BadFile, Unsupported
from converter.formats.torch.state_dict import Reading
from converter.models.checkpoint import open_checkpoint

NUMBERS = np.arange(24.0)
ARRAYS: dict[str, Any] = {
    "c": NUMBERS.reshape(2, 3, 4),
    "fortran": np.asfortranarray(NUMBERS.reshape(4, 6), np.float32),
    "layers/0/w": np.asfortranarray(NUMBERS.reshape(2, 3, 4), np.float16),
    "big": NUMBERS.astype(">f4").reshape(4, 6),
    "big.fortran": np.asfortranarray(NUMBERS.astype(">i2").reshape(4, 6)),
    "big.complex": (NUMBERS + 1j).astype(">c8"),
    "number": np.float32(3.5),
    "empty": np.zeros((0, 3), np.int8),
    "yes": np.array([True, False]),
    "bytes": np.arange(5, dtype=np.uint8),
    "long": np.arange(3),
    "one": np.ones((1, 1), np.uint32),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_it_is_converted(wconv: Callable[..., Any], tmp_path: Path, save: Callable[..., None]) -> None:
    save(tmp_path / "model.npz", **ARRAYS)
    assert "npz" in wconv("inspect", tmp_path / "model.npz").stdout
    wconv("to-safetensors", tmp_path / "model.npz", "--verify")
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        native = np.asarray(array, array.dtype.newbyteorder("="))
        assert (found[name].dtype, found[name].shape) == (native.dtype, native.shape)
        assert np.array_equal(found[name], native)
    wconv("verify", tmp_path / "model.npz", tmp_path / "model.safetensors")
    wconv("recast", tmp_path / "model.npz", "--dtype", "bf16", "-o", tmp_path / "small")


def test_bytes_that_are_not_what_they_were(wconv: Callable[..., Any], tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", a=NUMBERS)
    raw = bytearray((tmp_path / "m.npz").read_bytes())
    raw[raw.index(NUMBERS.tobytes()) + 9] ^= 1
    (tmp_path / "m.npz").write_bytes(raw)
    assert "CRC32" in wconv("to-safetensors", tmp_path / "m.npz", exit_code=3).stderr
    assert not (tmp_path / "m.safetensors").exists()


ODD: dict[str, tuple[Any, str]] = {
    "objects": (np.array([{}], object), "is of Python objects"),
    "text": (np.array(["a"]), "is of the dtype <U1"),
    "bfloat16": (np.ones(2, ml_dtypes.bfloat16), "is of the dtype <V2"),
    "complex": (np.ones(2, complex), "is of the dtype <c16"),
    "fields": (np.ones(2, [("a", "f4"), ("b", "i2")]), "has fields"),
}


@pytest.mark.parametrize(("array", "why"), ODD.values(), ids=ODD)
def test_what_is_no_tensor(wconv: Callable[..., Any], tmp_path: Path, array: Any, why: str) -> None:
    np.savez(tmp_path / "m.npz", w=NUMBERS, odd=array)
    failed = wconv("to-safetensors", tmp_path / "m.npz", exit_code=4).stderr
    assert f"array 'odd' {why}" in failed
    assert f"odd ({why}" in wconv("to-safetensors", tmp_path / "m.npz", "--skip-unreadable").stdout
    assert load_file(tmp_path / "m.safetensors").keys() == {"w"}


def packed(*records: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as out:
        for name, raw in records:
            out.writestr(name, raw)
    return buffer.getvalue()


def described(text: str, content: bytes = bytes(16), version: bytes = b"\1\0") -> bytes:
    header = text.encode()
    length = len(header).to_bytes(2 if version[:1] == b"\1" else 4, "little")
    return b"\x93NUMPY" + version + length + header + content


FLOATS = "{'descr': '<f4', 'fortran_order': False, 'shape': (4,), }"
DAMAGED = {
    "no header": (b"x" * 200, "has not the header of one"),
    "a later version": (described(FLOATS, version=b"\x09\0"), "has not the header of one"),
    "an expression": (described(FLOATS.replace("(4,)", "(2*2,)")), "does not describe one"),
    "code": (described(FLOATS.replace("False", "exit()")), "does not describe one"),
    "a header that never ends": (described(FLOATS + " " * 9_000), "does not describe one"),
    "too little": (described(FLOATS, bytes(15)), "has 15 bytes, and its header claims 16"),
    "too much": (described(FLOATS, bytes(17)), "has 17 bytes, and its header claims 16"),
    "sizes beyond all": (described(FLOATS.replace("(4,)", f"({2**62}, {2**62})")), "beyond numpy's"),
    "many axes": (described(FLOATS.replace("(4,)", f"({'1, ' * 200})")), "beyond numpy's"),
}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
@pytest.mark.parametrize(("raw", "said"), DAMAGED.values(), ids=DAMAGED)
def test_damage(tmp_path: Path, raw: bytes, said: str, method: int) -> None:
    path = tmp_path / "m.npz"
    path.write_bytes(packed(("a.npy", raw), method=method))
    with pytest.raises(BadFile) as error:
        open_checkpoint(path)
    assert said in str(error.value)


def test_later_versions_and_python_2(tmp_path: Path) -> None:
    old = FLOATS.replace("(4,)", "(4L,)")
    path = tmp_path / "m.npz"
    path.write_bytes(packed(("a.npy", described(FLOATS, version=b"\3\0")), ("b.npy", described(old)), ("notes", b"x")))
    opened = open_checkpoint(path)
    assert [(one.name, one.shape) for one in opened.tensors] == [("a", (4,)), ("b", (4,))]
    assert "left out: notes" in opened.notes[0]


def test_one_that_is_packed_and_not_aligned(tmp_path: Path) -> None:
    path = tmp_path / "m.npz"
    path.write_bytes(packed(("a.npy", described(FLOATS)), method=zipfile.ZIP_DEFLATED))
    with pytest.raises(Unsupported, match="not aligned"):
        open_checkpoint(path)
    path.write_bytes(lie(path.read_bytes(), "a.npy", {"method": 12}, method=12))
    with pytest.raises(Unsupported, match="another way"):
        open_checkpoint(path, Reading(skip_unreadable=True))


def test_in_a_folder_it_is_another_runtimes(wconv: Callable[..., Any], tmp_path: Path) -> None:
    np.savez(tmp_path / "weights.npz", a=NUMBERS)
    assert "holds no weights" in wconv("to-safetensors", tmp_path, exit_code=3).stderr


def test_a_packed_record_that_ends_early_and_goes_on(wconv: Callable[..., Any], tmp_path: Path) -> None:
    """What follows the end was asked for again and again, without an end."""
    whole = described(FLOATS.replace("(4,)", "(4000,)").ljust(118), bytes(16_000))
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    stored = packer.compress(whole[:9_000]) + packer.flush() + b"and more of it"
    record = {"method": zipfile.ZIP_DEFLATED, "nbytes": len(whole)}
    path = tmp_path / "m.npz"
    path.write_bytes(lie(packed(("a.npy", stored)), "a.npy", record, **record))
    assert "compressed record that is damaged" in wconv("to-safetensors", path, exit_code=3).stderr

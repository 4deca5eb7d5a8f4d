"""Torch archives and pickles made by hand, for what torch.save never writes: lies, damage and malice.

A pickle is put together from opcodes, an archive from records with Python's own zipfile; ``lie`` then changes single
fields of a record's two headers.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping

# Fields by (offset, struct format) from a record's signature: APPNOTE.TXT 4.3.7 and 4.3.12.
LOCAL_FIELDS = {
    "signature": (0, "<I"), "flags": (6, "<H"), "method": (8, "<H"), "crc": (14, "<I"),
    "packed_nbytes": (18, "<I"), "nbytes": (22, "<I"), "name_nbytes": (26, "<H"), "extra_nbytes": (28, "<H"),
}  # fmt: skip
CENTRAL_FIELDS = {
    "signature": (0, "<I"), "needs_version": (6, "<H"), "flags": (8, "<H"), "method": (10, "<H"), "crc": (16, "<I"),
    "packed_nbytes": (20, "<I"), "nbytes": (24, "<I"), "name_nbytes": (28, "<H"), "extra_nbytes": (30, "<H"),
    "header_offset": (42, "<I"),
}  # fmt: skip


def text(value: str) -> bytes:
    """Push a str (BINUNICODE)."""
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    """Push an int (LONG1)."""
    nbytes = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([nbytes]) + value.to_bytes(nbytes, "little", signed=True)


def items(*pushed: bytes) -> bytes:
    """Push a tuple of what is pushed."""
    return b"(" + b"".join(pushed) + b"t"


def numbers(*values: int) -> bytes:
    """Push a tuple of ints."""
    return items(*map(number, values))


def name_of(module: str, name: str) -> bytes:
    """Push what a module has under a name (GLOBAL)."""
    return f"c{module}\n{name}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    """Call what is pushed (REDUCE)."""
    return function + items(*arguments) + b"R"


def storage(key: str = "0", numel: int = 4, kind: str = "FloatStorage", device: str = "cpu") -> bytes:
    """Push a storage by its persistent id."""
    return items(text("storage"), name_of("torch", kind), text(key), text(device), number(numel)) + b"Q"


ORDERED_DICT = name_of("collections", "OrderedDict") + b")R"


def tensor(
    of: bytes | None = None, start: int = 0, shape: tuple[int, ...] = (4,), strides: tuple[int, ...] = (1,)
) -> bytes:
    """Push a tensor as torch.save describes it."""
    return call(
        name_of("torch._utils", "_rebuild_tensor_v2"),
        storage() if of is None else of,
        number(start),
        numbers(*shape),
        numbers(*strides),
        b"\x89",
        ORDERED_DICT,
    )


def pickled(value: bytes) -> bytes:
    """End a pickle of one value."""
    return b"\x80\x02" + value + b"."


def state_dict(*entries: tuple[str, bytes]) -> bytes:
    """Push a state dict."""
    return b"}(" + b"".join(text(name) + value for name, value in entries) + b"u"


FLOATS = struct.pack("<4f", 1.0, -2.0, 3.5, 0.0)


def archive(
    pickle: bytes | None = None,
    records: Mapping[str, bytes] | None = None,
    root: str = "archive/",
    method: int = zipfile.ZIP_STORED,
    extras: Mapping[str, bytes] | None = None,
) -> bytes:
    """Give an archive as torch.save lays it out; by default of one tensor ``weight`` that is ``FLOATS``.

    ``extras`` are the extra fields of records.
    """
    content = {
        "data.pkl": pickled(state_dict(("weight", tensor()))) if pickle is None else pickle,
        "byteorder": b"little",
        **({"data/0": FLOATS} if records is None else records),
        "version": b"3\n",
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as out:
        for name, raw in content.items():
            info = zipfile.ZipInfo(root + name)
            info.extra = (extras or {}).get(name, b"")
            out.writestr(info, raw, method)
    return buffer.getvalue()


def unicode_path(name: str, other: str) -> bytes:
    """Spell the extra field that gives a record another name (APPNOTE.TXT 4.6.9)."""
    content = b"\x01" + struct.pack("<I", zlib.crc32(name.encode())) + other.encode()
    return struct.pack("<HH", 0x7075, len(content)) + content


def places(raw: bytes, record: str) -> tuple[int, int]:
    """Find a record's local and central header."""
    with zipfile.ZipFile(io.BytesIO(raw)) as opened:
        info = opened.getinfo(record)
        central = raw.index(b"PK\x01\x02", opened.start_dir)
    while raw[central + 46 :][: len(record)] != record.encode():
        central = raw.index(b"PK\x01\x02", central + 1)
    return info.header_offset, central


def lie(raw: bytes, record: str, local: Mapping[str, int] | None = None, **central: int) -> bytes:
    """Change fields of a record's central header, and those of its local one."""
    patched = bytearray(raw)
    for place, table, lies in zip(
        places(raw, record), (LOCAL_FIELDS, CENTRAL_FIELDS), (local or {}, central), strict=True
    ):
        for field, value in lies.items():
            offset, form = table[field]
            struct.pack_into(form, patched, place + offset, value)
    return bytes(patched)

"""The content store of the Hub's stand-in: what was uploaded as Git LFS, and what hf_xet keeps in folders of its own.

hf_xet takes a folder (``local://``) for its content store, and one process at a time may hold one. So each token leads
to a folder of its own, which begins as a copy of the main one. What an upload left there, its shards say: they list
each file with its Xet hash, and with the sha256 under which it will be committed, as the real store tells the real Hub.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A shard: a header, then for each file this entry, as many segments, as many checks, and one entry with its sha256.
ENTRY = 48
LAST = b"\xff" * 32
HAS_CHECKS, HAS_SHA256 = 1 << 31, 1 << 30
INSIDE = Path("xet/xorbs")
LOOK_UP = "global_dedup_lookup.redb"
LIVES = 3600  # seconds
PIECE = 1 << 20


@dataclass(frozen=True)
class Uploaded:
    """A file that a shard lists."""

    sha256: str
    xet_hash: str
    size: int
    folder: Path


def _hexadecimal(raw: bytes) -> str:
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


def files_of_shard(data: bytes, folder: Path) -> Iterator[Uploaded]:
    """Give the files that a shard lists with a sha256."""
    at = ENTRY
    while data[at : at + 32] != LAST:
        xet_hash = _hexadecimal(data[at : at + 32])
        flags, count = struct.unpack_from("<II", data, at + 32)
        segments = range(at + ENTRY, at + ENTRY * (1 + count), ENTRY)
        size = sum(struct.unpack_from("<I", data, segment + 36)[0] for segment in segments)
        at += ENTRY * (1 + count * (2 if flags & HAS_CHECKS else 1))
        if flags & HAS_SHA256:
            yield Uploaded(_hexadecimal(data[at : at + 32]), xet_hash, size, folder)
            at += ENTRY


class Store:
    """Contents by their sha256, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.whole = folder / "whole"
        self.parts = folder / "parts"
        self.lent = folder / "lent"
        self.main = folder / "main"
        for one in (self.whole, self.parts, self.lent, self.main):
            one.mkdir(parents=True)
        self._uploaded: dict[str, Uploaded] = {}
        self._read: set[Path] = set()
        self._in_main: set[str] = set()
        self._count = 0
        self._lock = threading.RLock()

    def has(self, sha256: str) -> bool:
        return (self.whole / sha256).exists()

    def keep(self, path: Path) -> str:
        """Keep a copy of a file."""
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if not self.has(sha256):
            shutil.copyfile(path, self.whole / sha256)
        return sha256

    def join(self, sha256: str, numbers: list[int]) -> bool:
        """Make one content of its parts; say whether it is what it should be."""
        with self._lock:
            new = self.parts / f"{sha256}.whole"
            digest = hashlib.sha256()
            with new.open("wb") as out:
                for number in numbers:
                    data = (self.parts / f"{sha256}.{number}").read_bytes()
                    digest.update(data)
                    out.write(data)
            if digest.hexdigest() != sha256:
                return False
            new.rename(self.whole / sha256)
            return True

    def uploaded(self, sha256: str) -> Uploaded | None:
        """Find what was uploaded to Xet under this hash."""
        with self._lock:
            if sha256 in self._uploaded:
                return self._uploaded[sha256]
            for shard in self.lent.glob(f"*/{INSIDE}/shards/*.mdb"):
                if shard not in self._read:
                    self._read.add(shard)
                    for file in files_of_shard(shard.read_bytes(), self.lent / shard.relative_to(self.lent).parts[0]):
                        self._uploaded.setdefault(file.sha256, file)
            return self._uploaded.get(sha256)

    def open(self, sha256: str) -> Path:
        """Give the file that holds a content, which may have to be fetched from Xet first."""
        with self._lock:
            path = self.whole / sha256
            file = None if path.exists() else self.uploaded(sha256)
            if file:
                digest = hashlib.sha256()
                with (new := self.parts / f"{sha256}.xet").open("wb") as out:
                    for piece in self._stream(file):
                        digest.update(piece)
                        out.write(piece)
                assert digest.hexdigest() == sha256, f"{file} is not what it was said to be"
                new.rename(path)
            return path

    def lend(self) -> str:
        """Give a fresh copy of the main folder, as an address."""
        return f"local://{self._copy(self.main)}"

    def take_to_xet(self, sha256: str) -> str:
        """Have a content in the main folder too; give its Xet hash."""
        import hf_xet

        with self._lock:
            path = self.open(sha256)
            session = hf_xet.XetSession()
            with session.new_upload_commit(endpoint=f"local://{self.main}", **_token()) as commit:
                stream = commit.start_upload_stream(name=sha256, sha256=sha256)
                with path.open("rb") as file:
                    while piece := file.read(PIECE):
                        stream.write(piece)
                xet_hash: str = stream.finish().xet_info.hash
            self._in_main.add(sha256)
            return xet_hash

    def ready_for_reading(self, contents: list[str]) -> str:
        """Lend a copy of the main folder that holds all of these."""
        with self._lock:
            for sha256 in contents:
                if sha256 not in self._in_main:
                    self.take_to_xet(sha256)
            return self.lend()

    def _stream(self, file: Uploaded) -> Iterator[bytes]:
        import hf_xet

        folder = self._copy(file.folder)
        group = hf_xet.XetSession().new_download_stream_group(endpoint=f"local://{folder}", **_token())
        yield from group.download_stream(hf_xet.XetFileInfo(file.xet_hash, file.size))

    def _copy(self, folder: Path) -> Path:
        with self._lock:
            self._count += 1
            copy = self.lent / str(self._count)
            for name in ("xorbs", "shards"):
                (copy / INSIDE / name).mkdir(parents=True)
                if (folder / INSIDE / name).exists():
                    for path in (folder / INSIDE / name).iterdir():
                        os.link(path, copy / INSIDE / name / path.name)
            if (folder / INSIDE / LOOK_UP).exists():
                shutil.copyfile(folder / INSIDE / LOOK_UP, copy / INSIDE / LOOK_UP)
            return copy


def _token() -> dict[str, Any]:
    return {"token": "ours", "token_expiry_unix_secs": int(time.time()) + LIVES}

"""The formats that wconv reads and writes: a table of each, one row a format.

What reads a file is chosen by its first bytes and never by its name; what reads a folder, whose files make weights only
together, by the names in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module

from converter.errors import BadFile, TrainingPiece, Unsupported
from converter.formats import safetensors
from converter.formats.torch import files, writer
from converter.formats.torch.state_dict import PLAIN, Reading
from converter.formats.trained import pieces
from converter.storage import OpenFile, Place, list_entries, natural_key
from converter.storage.far import look_at_each
from converter.tensors.base import Layout, TensorSpec, WeightsFile

ReadFile = Callable[[OpenFile, Reading], WeightsFile]
"""Reads the header of a file."""


@dataclass(frozen=True, slots=True)
class Writer:
    """What writes a format: ``lay_out`` says where tensors go, given the ties and the notes of a header.

    ``frame`` gives, once the bytes of all tensors are there, what else the format wants in the file: offsets and bytes,
    given the CRC32s of tensors.
    """

    lay_out: Callable[[Sequence[TensorSpec], Mapping[str, str], Mapping[str, str]], Layout]
    frame: Callable[[Sequence[TensorSpec], Mapping[str, str], Sequence[int]], Iterable[tuple[int, bytes]]] | None = None


_HEAD_NBYTES = 512
_KEPT_NBYTES = 1 << 16  # most headers are within it, and need no second request over a network


def _is_safetensors(head: bytes) -> bool:
    return len(head) > 8 and head[8:9] in b"{ " and int.from_bytes(head[:8], "little") <= safetensors.MAX_HEADER_NBYTES


def _is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"


def _is_npz(head: bytes) -> bool:
    """Say whether the first record of an archive is an array of numpy (APPNOTE.TXT 4.3.7)."""
    return head.startswith(b"PK\x03\x04") and head[30 : 30 + int.from_bytes(head[26:28], "little")].endswith(b".npy")


def _late(module: str, file: OpenFile, reading: Reading) -> WeightsFile:
    """Read a file with a module of this package that few need."""
    read: ReadFile = import_module(f"converter.formats.{module}").read_file
    return read(file, reading)


# By the first bytes of a file. The first row that matches reads it.
FILES: tuple[tuple[Callable[[bytes], bool], ReadFile], ...] = (
    (_is_safetensors, lambda file, _: safetensors.read_file(file)),
    (_is_npz, partial(_late, "npz")),
    (lambda head: head.startswith(files.HEADS), files.read_file),
)
WRITERS: Mapping[str, Writer] = {
    "safetensors": Writer(safetensors.lay_out),
    "torch": Writer(writer.lay_out, writer.frame),
}


@dataclass(frozen=True, slots=True)
class FolderRow:
    """One format of many files: by which names in a folder it is recognised, and what reads it, or why nothing does.

    ``pieces`` is a pattern of the names of all its files; a group ``of`` in it tells several checkpoints in one folder
    apart. ``head`` is a pattern of the file that says what is in the others, and ``read_file`` reads that. Of each
    pattern ``beside`` something lies there too. Where there is no reader, ``problem`` and ``advice`` are said of the
    folder.
    """

    pieces: str
    head: str
    beside: tuple[str, ...] = ()
    read_file: ReadFile | None = None
    problem: str = ""
    advice: str = ""

    def refusal(self, folder: Place) -> TrainingPiece | None:
        """Say why a folder of this format is not read, if it is not."""
        return None if self.read_file else TrainingPiece(folder, self.problem, self.advice)

    def is_beside(self, names: Collection[str]) -> bool:
        """Say whether all that has to lie in the folder does, by the names in it."""
        return all(any(re.fullmatch(pattern, name) for name in names) for pattern in self.beside)

    def find(self, names: Collection[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Give, of each checkpoint of this format in a folder with these names, its head and its other files."""
        members: dict[str, list[str]] = {}
        for name in names:
            match = re.fullmatch(self.pieces, name)
            if match:
                members.setdefault(match.groupdict().get("of") or "", []).append(name)
        if not members or not self.is_beside(names):
            return
        for of_one in members.values():
            ordered = sorted(of_one, key=natural_key)
            head = next((name for name in ordered if re.fullmatch(self.head, name)), None)
            if head is not None:
                yield head, tuple(name for name in ordered if name != head)


_READ_ZERO = partial(_late, "trained.zero.checkpoint")

# The first row that matches a file speaks of it.
FOLDERS: dict[str, FolderRow] = {
    "DCP, by ranks": FolderRow(r"__\d+\.metadata|.+\.distcp", r"__\d+\.metadata", (), None, *pieces.DCP_BY_RANKS),
    "DCP of Megatron": FolderRow(r"\.metadata|.+\.distcp", r"\.metadata", (r"metadata\.json", r"common\.pt"),
                                 None, *pieces.DCP_OF_MEGATRON),
    "DCP": FolderRow(r"\.metadata|.+\.distcp", r"\.metadata", (), partial(_late, "trained.dcp")),
    "DCP in safetensors": FolderRow(pieces.DCP_SHARD, pieces.DCP_SHARD, (), partial(_late, "trained.dcp_safetensors")),
    "DCP, unfinished": FolderRow(r".+\.distcp", r".+\.distcp", (), None, *pieces.DCP_UNFINISHED),
    "FSDP ranks": FolderRow(pieces.RANKS, pieces.RANKS, (), partial(_late, "trained.ranks")),
    "ZeRO": FolderRow(pieces.ZERO_PIECES, pieces.ZERO_HEAD, (pieces.ZERO_OPTIMIZER,), _READ_ZERO),
    "ZeRO, universal": FolderRow(pieces.ZERO_PIECES, pieces.ZERO_HEAD, (pieces.ZERO_UNIVERSAL,), _READ_ZERO),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Gathered:
    """Files of a folder that make weights only together: their format, the one to be read, and the others."""

    format: str
    head: str
    pieces: tuple[str, ...]

    @property
    def row(self) -> FolderRow:
        return FOLDERS[self.format]


_LFS = "Run 'git lfs pull' in its repository, or fetch the file itself."
_FETCH = "Fetch the file again."

# What people have in place of weights, and what to do about it. The first row that matches speaks.
_LOOKALIKES: tuple[tuple[Callable[[bytes], bool], type[BadFile] | type[Unsupported], str, str], ...] = (
    (lambda head: not head, BadFile, "is empty", _FETCH),
    (lambda head: head.startswith(b"version https://git-lfs"), BadFile, "is a git-lfs pointer, not the weights", _LFS),
    (lambda head: head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml")), BadFile,
     "is a web page (perhaps an error message), not weights", _FETCH),
    (lambda head: len(head) >= 16 and not head.strip(b"\0"), BadFile, "begins with zeros: its download never finished",
     _FETCH),
    (lambda head: head.startswith(b"GGUF"), Unsupported, "is a GGUF file, which wconv does not read", ""),
    (lambda head: head.startswith(b"\x89HDF"), Unsupported, "is an HDF5 file (TensorFlow), which wconv does not read",
     ""),
    (_is_tar, Unsupported, "is a tar archive, as PyTorch wrote before 0.1.10",
     "Where you trust it, load it with torch.load(..., weights_only=False) and save its state_dict() with torch.save."),
    (lambda head: b'"' in head and head.lstrip()[:1] in (b"{", b"["), BadFile, "is JSON text, not weights", _FETCH),
)  # fmt: skip


def could_be_weights(place: Place) -> bool:
    """Say by its first bytes whether a file may hold weights of torch's, readable here or not."""
    with place.open() as file:
        head = file.read(0, _HEAD_NBYTES)
    return _is_tar(head) or any(matches(head) for matches, _ in FILES)


def gather(names: Iterable[str]) -> Iterator[Gathered]:
    """Give the checkpoints of many files that lie in a folder with these names."""
    left = set(names)
    for form, row in FOLDERS.items():
        for head, others in row.find(left):
            left.difference_update((head, *others))
            yield Gathered(form, head, others)


def form_of_many(name: str) -> str:
    """Give the format of many files that a file may be one of, by its name; nothing for any other."""
    forms = (form for form, row in FOLDERS.items() if row.read_file and re.fullmatch(row.pieces, name))
    return next(forms, "")


def refuse_folder(folder: Place) -> None:
    """Raise TrainingPiece for a folder, without weights that wconv reads, that holds pieces or folders of them."""
    for inner in (folder, *filter(Place.is_folder, folder.entries())):
        entries = list_entries(inner)
        read: set[str] = set()
        for one in gather([place.name for place in entries]):
            refusal = one.row.refusal(inner)
            if refusal:
                raise refusal
            read.update((one.head, *one.pieces))
        for place in entries:
            if place.name.endswith(".pt") and place.name not in read:
                pieces.check_name(place)


def read_files(places: Iterable[Place], reading: Reading = PLAIN) -> Iterator[WeightsFile]:
    """Read the headers of files, in order; of those that are far some at once, as each takes its time to come."""
    return look_at_each(partial(read_file, reading=reading), list(places))


def _is_head(place: Place, row: FolderRow) -> bool:
    if not re.fullmatch(row.head, place.name):
        return False
    return not row.beside or row.is_beside([entry.name for entry in list_entries(place.parent)])


def read_file(place: Place, reading: Reading = PLAIN) -> WeightsFile:
    """Read the header of a weight file in whatever format it is; ``reading`` is for pickled ones.

    The head of a folder's format tells of all its files. Raises BadFile or Unsupported for a file that is none, and
    says what it is instead; TrainingPiece for a part of one.
    """
    read = next((row.read_file for row in FOLDERS.values() if row.read_file and _is_head(place, row)), None)
    if not read:
        pieces.check_name(place)
    with place.open() as file:
        head = file.keep(0, _KEPT_NBYTES)[:_HEAD_NBYTES]
        read = read or next((read_file for matches, read_file in FILES if matches(head)), None)
        if read:
            weights = read(file, reading)
            pieces.check_content(weights)
            return weights
    for matches, error, problem, advice in _LOOKALIKES:
        if matches(head):
            raise error(place, problem, advice)
    raise BadFile(place, "is no weight file: its first bytes are of no known format", _FETCH)

"""What the headers of many weight files say, as far as anyone asks, so that thousands of them stay small in memory."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from converter.dtypes import DType
from converter.errors import BadFile, HostileFile, SystemRefused, Unreachable, WconvError
from converter.formats import read_file
from converter.formats.torch.state_dict import Reading
from converter.storage import Place
from converter.storage.far import look_at_each
from converter.tensors.base import MAX_TENSORS

LENIENT = Reading(strip_code=True, lenient=True)
_MAX_TENSORS = 2 * MAX_TENSORS  # of all sets in one folder: names and dtypes of all are held at once


@dataclass(frozen=True, slots=True)
class Header:
    """What a weight file's header says, or why it cannot be read. ``nbytes`` is the file's size."""

    name: str
    nbytes: int
    format: str = ""
    names: tuple[str, ...] = ()
    dtypes: tuple[DType, ...] = ()
    dims: tuple[int, ...] = ()
    tensor_nbytes: int = 0
    storage_nbytes: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)
    foreign: Mapping[str, str] = field(default_factory=dict)
    error: WconvError | None = None


def read_all(folder: Place, names: Iterable[str]) -> dict[str, Header]:
    """Read the headers of files in a folder; those that would be too much together are errors."""
    headers: dict[str, Header] = {}
    room = _MAX_TENSORS
    names = list(names)
    for name, header in zip(names, look_at_each(_read, [folder / name for name in names]), strict=True):
        room -= len(header.names)
        if room < 0:
            problem = f"is one of several that describe more than {_MAX_TENSORS:,} tensors together"
            header = Header(name, header.nbytes, error=HostileFile(folder / name, problem))
        headers[name] = replace(header, name=name)  # that may lie in a folder below
    return headers


def _read(place: Place) -> Header:
    nbytes = 0
    try:
        info = place.info()
        nbytes = info.nbytes if info else 0
        file = read_file(place, LENIENT)
    except Unreachable:
        raise
    except SystemRefused as error:
        return Header(place.name, nbytes, error=BadFile(place, f"cannot be read ({error.problem})"))
    except WconvError as error:
        return Header(place.name, nbytes, error=error)
    storages = {storage for tensor in file.tensors for storage in tensor.source.inputs()}
    return Header(
        place.name,
        nbytes,
        file.format,
        tuple(sys.intern(info.name) for info in file.tensors),
        tuple(info.dtype for info in file.tensors),
        tuple(len(info.shape) for info in file.tensors),
        sum(info.nbytes for info in file.tensors),
        sum(storage.nbytes for storage in storages),
        file.metadata,
        file.foreign,
    )

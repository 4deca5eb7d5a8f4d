"""Files that ``torch.save`` wrote, told apart by their first bytes, and what is taken of them."""

from __future__ import annotations

from functools import partial

from converter.formats.torch import archive, legacy
from converter.formats.torch.content import Content
from converter.formats.torch.rebuild import parse_pickle
from converter.formats.torch.state_dict import Reading, choose_state_dict
from converter.formats.trained.pieces import check_pickled
from converter.storage import OpenFile
from converter.tensors.base import Tensor, WeightsFile

HEADS = (b"PK\x03\x04", *legacy.HEADS)
_HEAD_NBYTES = max(map(len, HEADS))


def open_content(file: OpenFile, strip_code: bool = False) -> Content:
    """Read what a file holds, but for its storages. Raises BadFile for what is none of torch's."""
    if file.read(0, _HEAD_NBYTES).startswith(legacy.HEADS):
        return legacy.open_content(file, strip_code)
    return archive.open_content(file, partial(parse_pickle, strip_code=strip_code))


def read_file(file: OpenFile, reading: Reading) -> WeightsFile:
    """Read which tensors a file holds, and where; no storage is read."""
    content = open_content(file, reading.strip_code)
    place = content.place
    check_pickled(content.pickled.value, place)
    state_dict, notes, foreign = choose_state_dict(content.pickled, place, reading)
    notes += tuple(content.notes_on(state_dict))
    content = content.without_value()
    tensors = tuple(Tensor(name, source) for name, source in content.take_sources(state_dict))
    return WeightsFile(place, "torch", tensors, {}, notes, foreign)

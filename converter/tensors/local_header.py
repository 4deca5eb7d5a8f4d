"""The header right before each record of a zip archive. How long it is says where the record begins.

Records are found by it when an archive is opened. Where that would take a request over a network for each tensor, it is
predicted from what lies around instead (``ByteRange.lead``), and held against the header when the record is read.
"""

from __future__ import annotations

import struct

from converter.errors import BadFile, HostileFile
from converter.tensors.base import ByteRange

STORED = 0
LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # APPNOTE.TXT 4.3.7
INCOMPLETE = "The file is incomplete: fetch it again."


def lengths_after(raw: bytes, method: int) -> tuple[int, int] | None:
    """Give how long the name and the extra field after a header are; None for no header of a record packed so."""
    signature, _, _, same_method, _, _, _, _, _, name_nbytes, extra_nbytes = LOCAL_HEADER.unpack_from(raw)
    return (name_nbytes, extra_nbytes) if signature == b"PK\x03\x04" and same_method == method else None


def check_lead(record: ByteRange, raw: bytes) -> None:
    """Raise BadFile where the bytes right before a record are not the header of one that begins there.

    torch goes by that header (``getRecordOffset`` in ``caffe2/serialize/inline_container.cc``), and none of what it
    takes for a tensor may be read as another.
    """
    place, at = record.file.place, record.offset - record.lead
    if len(raw) < record.lead:
        raise BadFile(place, "became shorter while it was read", "Fetch the file again.")
    lengths = lengths_after(raw, STORED)
    if lengths is None:
        raise BadFile(place, f"its directory and the header of its record at byte {at:,} disagree", INCOMPLETE)
    if LOCAL_HEADER.size + sum(lengths) != record.lead:
        problem = f"the header of its record at byte {at:,} has it begin elsewhere than all others do"
        raise HostileFile(place, problem, "If you trust it, fetch the file, and name that.")

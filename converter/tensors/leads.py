"""What lies right before a range of bytes, and says that it begins there.

In a zip archive that is the header of a record: how long it is says where the record begins. In torch's old streams it
is the number of a storage's elements. It is read when a file is opened. Where that would take a request over a network
for each tensor, it is predicted from what lies around instead (``ByteRange.lead``), and looked up when the range is
read.
"""

from __future__ import annotations

import struct

from converter.errors import BadFile, HostileFile
from converter.tensors.base import ByteRange

STORED = 0
LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # APPNOTE.TXT 4.3.7
COUNT_NBYTES = 8  # less than any header of a record
_ITEM_NBYTES = (1, 2, 4, 8, 16)
INCOMPLETE = "The file is incomplete: fetch it again."


def lengths_after(raw: bytes, method: int) -> tuple[int, int] | None:
    """Give how long the name and the extra field after a header are; None for no header of a record packed so."""
    signature, _, _, same_method, _, _, _, _, _, name_nbytes, extra_nbytes = LOCAL_HEADER.unpack_from(raw)
    return (name_nbytes, extra_nbytes) if signature == b"PK\x03\x04" and same_method == method else None


def check_lead(record: ByteRange, raw: bytes) -> None:
    """Raise BadFile where the bytes right before a range do not say that it begins there.

    torch goes by them (``getRecordOffset`` in ``caffe2/serialize/inline_container.cc``, and ``THPStorage_setFromFile``
    of ``torch/csrc/StorageMethods.cpp``), and nothing may be read here that torch would not.
    """
    place, at = record.file.place, record.offset - record.lead
    if len(raw) < record.lead:
        raise BadFile(place, "became shorter while it was read", "Fetch the file again.")
    if record.lead == COUNT_NBYTES:
        count = int.from_bytes(raw, "little")
        # Whether it is that of this dtype, torch looks too, and reads no other.
        if record.nbytes not in (count * nbytes for nbytes in _ITEM_NBYTES):
            raise BadFile(place, f"its storage at byte {at:,} is cut short, or is not where it should be", INCOMPLETE)
        return
    lengths = lengths_after(raw, STORED)
    if lengths is None:
        raise BadFile(place, f"its directory and the header of its record at byte {at:,} disagree", INCOMPLETE)
    if LOCAL_HEADER.size + sum(lengths) != record.lead:
        problem = f"the header of its record at byte {at:,} has it begin elsewhere than what lies around it"
        raise HostileFile(place, problem, "If you trust it, fetch the file, and name that.")

"""Pickles and archives made to take time and memory: whatever they claim, reading them takes less than 10 s and 512 MB.

The time is the processor's, and the limit that ends a run leaves room for a machine of half the speed.
"""

from __future__ import annotations

import io
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.archives import (
    ORDERED_DICT,
    archive,
    items,
    name_of,
    number,
    numbers,
    pickled,
    state_dict,
    storage,
    tensor,
    text,
)

from converter.formats.torch.legacy import MAGIC

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")]

REBUILD = name_of("torch._utils", "_rebuild_tensor_v2")
ARGUMENTS = items(storage(), number(0), numbers(2, 2), numbers(2, 1), b"\x89", ORDERED_DICT)
TENSOR = REBUILD + b"q\x000" + ARGUMENTS + b"q\x010"
BOMBS = {
    "names": b"ctorch\nFloatStorage\n0" * 4_000_000 + b"N.",
    "foreign names": b"".join(b"ca\n%d\n0" % number for number in range(1_000_000)) + b"N.",
    "objects": b"ca\nb\nq\x00](" + b"h\x00)\x81" * 1_240_000 + b"e.",
    "stripped calls": b"cos\nsystem\nq\x00](" + b"h\x00)R" * 1_240_000 + b"e.",
    "tensors, thrown away": TENSOR + b"h\x00h\x01R0" * 1_240_000 + b"N.",
    "tensors, kept": TENSOR + b"](" + b"h\x00h\x01R" * 1_660_000 + b"e.",
    "tensors, named": TENSOR + b"h\x00h\x01Rq\x020}(" + b"".join(
        b"J" + place.to_bytes(4, "little") + b"h\x02" for place in range(2_400_000)) + b"u.",
    "lists": b"](" + b"]" * 2_490_000 + b"e.",
    "dicts": b"](" + b"}" * 2_490_000 + b"e.",
    "a deep list": b"]" * 1_600_000 + b"a" * 1_599_999 + b".",
    "a deep tuple": b"N" + b"\x85" * 4_900_000 + b".",
    "marks": b"(" * 4_900_000 + b".",
    "short texts": b"(" + b"\x8c\x0fabcdefghijklmno" * 4_900_000 + b"t.",
    "wide texts": b"(" + b"\x8c\x04\xf0\x9f\x98\x80" * 2_400_000 + b"t.",
    "a long wide text": b"X" + struct.pack("<I", 99_000_000) + b"a" * 98_999_996 + b"\xf0\x9f\x98\x80.",
    "a long name": b"}X" + struct.pack("<I", 95_000_000) + b"a" * 95_000_000 + tensor() + b"s.",
    "long numbers": b"(" + (b"\x8a\x10" + b"\x11" * 16) * 4_900_000 + b"t.",
    "far places of the memo": b"N" + b"".join(b"r" + struct.pack("<I", place) for place in range(9, 4_900_000)) + b".",
    "items of an object": b"ca\nb\n)\x81(" + b"N" * 4_900_000 + b"e.",
    "keys that are no text": b"}(" + b")N" * 2_400_000 + b"u.",
    "pairs": b"(" + b"".join(text(str(place)) + b"N\x86" for place in range(10_000)) + b"tq\x000"
    + name_of("collections", "OrderedDict") + b"q\x010](" + b"h\x01h\0\x85R" * 300_000 + b"e.",
    "sizes of bytes": b"B" + struct.pack("<I", 1_000_000) + bytes(1_000_000) + b"q\x000" + name_of("torch", "Size")
    + b"q\x010](" + b"h\x01h\0\x85R" * 1_000 + b"e.",
    "a long name in a module": text("a" * 1_000_000) + b"q\x000](" + b"h\x00h\x00\x93" * 90_000 + b"e.",
    "objects of a long name": text("a" * 1_000) + b"q\x000h\x00h\x00\x93q\x010](" + b"h\x01)\x81" * 1_240_000 + b"e.",
    "a long key of many dicts": text("a" * 1_000_000) + b"q\x000](" + b"}h\x00}s" * 190_000 + b"e.",
    "a long list that is handed out": b"(" + b"N" * 1_000_000 + b"lq\x000](" + b"h\x00" * 1_000_000 + b"e.",
    "long shapes": REBUILD + b"q\x000" + items(storage(), number(0), numbers(*[1] * 100), numbers(*[1] * 100), b"\x89",
    ORDERED_DICT) + b"q\x010](" + b"h\x00h\x01R" * 1_600_000 + b"e.",
    "empty tensors of huge numbers": REBUILD + b"q\x000" + items(storage(), number(0), numbers(*[2**62] * 99, 0),
    numbers(*[2**62] * 100), b"\x89", ORDERED_DICT) + b"q\x010}(" + b"".join(
        b"J" + place.to_bytes(4, "little") + b"h\x00h\x01R" for place in range(160_000)) + b"u.",
    "texts and tensors": b"(" + b"\x8c\x0fabcdefghijklmno" * 4_000_000 + b"t" + tensor() + b"q\x000}(" + b"".join(
        b"J" + place.to_bytes(4, "little") + b"h\x00" for place in range(199_000)) + b"u\x86.",
}  # fmt: skip
READ = """
import resource, sys
from converter.cli import main
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
code = main([*sys.argv[1:], "-q"])
# The peak of this process; ru_maxrss is also that of its parent, before exec.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(code, peak.split()[1])
"""


def deflated(described: bytes) -> bytes:
    """Give an archive with a deflated storage of 100 MB of zeros."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("archive/data.pkl", described)
        out.writestr("archive/data/0", bytes(100_000_000))
    return buffer.getvalue()


def falling() -> bytes:
    """Describe 100,000 tensors of one storage, each before the last."""
    parts = (storage(numel=25_000_000), REBUILD, numbers(4), numbers(1), ORDERED_DICT)
    named = b"".join(part + b"q" + bytes([place]) + b"0" for place, part in enumerate(parts))
    tensors = b"".join(
        text(f"{place:06}") + b"h\x01(h\x00J" + struct.pack("<i", 4 * (100_000 - place)) + b"h\x02h\x03\x89h\x04tR"
        for place in range(100_000)
    )
    return pickled(named + b"}(" + tensors + b"u")


def stream(*pickles: bytes) -> bytes:
    return pickle.dumps(MAGIC, 2) + b"".join(pickles)


def empty_records(count: int) -> bytes:
    """Give an archive of so many empty records."""
    names = [b"a/%06x" % place for place in range(count)]
    local = b"".join(struct.pack("<4s5H3I2H", b"PK\3\4", *[0] * 8, 8, 0) + name for name in names)
    entries = b"".join(
        struct.pack("<4s6H3I5H2I", b"PK\1\2", *[0] * 9, 8, *[0] * 5, 38 * place) + name
        for place, name in enumerate(names)
    )
    begin, nbytes = len(local), len(entries)
    end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, nbytes, begin)
    end += struct.pack("<4sIQI", b"PK\6\7", 0, begin + nbytes, 1)
    return local + entries + end + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, nbytes, begin, 0)


FACTS = pickle.dumps(1001, 2) + pickle.dumps({}, 2)
EMPTY = tensor(storage(numel=0), shape=(0,))
FILES = {
    "falling offsets": lambda: deflated(falling()),
    "rows that overlap": lambda: deflated(pickled(state_dict(
        ("x", tensor(storage(numel=25_000_000), shape=(3000, 3000), strides=(4000, 3999)))))),
    "an expanded tensor": lambda: archive(pickled(state_dict(("x", tensor(shape=(1 << 20, 1 << 20), strides=(0, 0)))))),
    "records": lambda: empty_records(1_100_000),
    "as many records as may be": lambda: empty_records(249_000),
    "pickles of a stream": lambda: stream(*[b"\x80\x02](" + b"\x8c\x0fabcdefghijklmno" * 4_000_000 + b"e."] * 5),
    "storages of a stream": lambda: stream(
        FACTS, pickled(state_dict(("x", EMPTY))),
        b"\x80\x02" + text("0") + b"q\x000](" + b"h\x00" * 2_400_000 + b"e.", bytes(8 * 2_400_000)),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_in_little_time_and_memory(tmp_path: Path, bomb: str) -> None:
    run(tmp_path, archive(b"\x80\x02" + BOMBS[bomb]), "to-safetensors", "--strip-code")


@pytest.mark.parametrize("command", ["inspect", "to-bin", "doctor"])
@pytest.mark.parametrize("bomb", ["texts and tensors", "short texts", "a long key of many dicts"])
def test_whatever_the_command(tmp_path: Path, bomb: str, command: str) -> None:
    run(tmp_path, archive(b"\x80\x02" + BOMBS[bomb]), command)


@pytest.mark.parametrize("bomb", FILES)
def test_a_file_that_is_a_bomb(tmp_path: Path, bomb: str) -> None:
    run(tmp_path, FILES[bomb](), "to-safetensors")


def run(folder: Path, raw: bytes, command: str, *options: str) -> None:
    (folder / "model.bin").write_bytes(raw)
    source = "." if command == "doctor" else "model.bin"
    arguments = [sys.executable, "-c", READ, command, source, *options]
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=True)
    code, peak = done.stdout.split()
    assert code != "70", done.stderr
    assert code == "0" or len(list(folder.iterdir())) == 1
    assert int(peak) * 1024 < 512_000_000

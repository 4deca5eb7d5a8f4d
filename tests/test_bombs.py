"""Pickles made to take time and memory: whatever they claim, reading them takes less than 10 s (of the processor) and
512 MB.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from archives import ORDERED_DICT, archive, items, name_of, number, numbers, storage

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
}  # fmt: skip
READ = """
import time
from converter.cli import main
before = time.process_time()
code = main(["to-safetensors", "model.bin", "--strip-code"])
# The peak of this process; ru_maxrss is also that of its parent, before exec.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(code, time.process_time() - before, peak.split()[1])
"""


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_in_little_time_and_memory(tmp_path: Path, bomb: str) -> None:
    (tmp_path / "model.bin").write_bytes(archive(b"\x80\x02" + BOMBS[bomb]))
    done = subprocess.run([sys.executable, "-c", READ], cwd=tmp_path, capture_output=True, text=True, check=True)
    code, seconds, peak = done.stdout.split()
    assert code in ("2", "3", "4"), done.stderr
    assert float(seconds) < 10
    assert int(peak) * 1024 < 512_000_000
    assert len(list(tmp_path.iterdir())) == 1

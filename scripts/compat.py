#!/usr/bin/env python3
"""Make one file of each kind that people have, give it to each reader, and write down what comes out.

Writes docs/compatibility.rst. Needs torch and safetensors (``.venv``), and mergekit (``pip install --no-deps mergekit
pydantic pydantic_core annotated_types typing_inspection``). Each reader runs in a process of its own.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
WEIGHT = torch.arange(12.0).reshape(3, 4)
STATE = {"a": WEIGHT, "b": WEIGHT.half()}


class Options:
    """A class of somebody's training script."""

    def __init__(self) -> None:
        self.rate = 0.1


class Canary:
    """What makes a file where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("canary", "w")


def saved(value: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **how)
    return buffer.getvalue()


def records(raw: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rezipped(raw: bytes, method: int = zipfile.ZIP_STORED, **changed: bytes | None) -> bytes:
    """Write an archive anew, with some records changed or left out; ``data_0`` is ``data/0``."""
    content = records(raw)
    for key, value in changed.items():
        name = next(name for name in content if name.endswith("/" + key.replace("_", "/")))
        content.pop(name) if value is None else content.update({name: value})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as out:
        for name, data in content.items():
            out.writestr(name, data)
    return buffer.getvalue()


def wrong_crc() -> bytes:
    raw = bytearray(saved({"a": torch.full((64,), 1.5)}))
    place = raw.index(struct.pack("<2f", 1.5, 1.5))
    raw[place] ^= 1
    return bytes(raw)


def big_endian() -> bytes:
    raw = saved({"a": WEIGHT})
    return rezipped(raw, data_0=WEIGHT.numpy().astype(">f4").tobytes(), byteorder=b"big")


def safetensors_file() -> bytes:
    from safetensors.torch import save

    return save(STATE, {"format": "pt"})


A = {"a": WEIGHT}
# What the file is; its bytes; the tensors that are right, None where there are none that a reader should give.
KINDS: list[tuple[str, Callable[[], bytes], dict[str, torch.Tensor] | None]] = [
    ("safetensors", safetensors_file, STATE),
    ("zip, state dict", lambda: saved(STATE), STATE),
    ("zip, pickle protocol 4", lambda: saved(STATE, pickle_protocol=4), STATE),
    ("zip, deflated", lambda: rezipped(saved(A), zipfile.ZIP_DEFLATED), A),
    ("zip, big-endian", big_endian, A),
    ("zip, uint16 and fp8", lambda: saved({"u": torch.ones(3, dtype=torch.uint16),
                                           "f": torch.ones(3).to(torch.float8_e4m3fn)}),
     {"u": torch.ones(3, dtype=torch.uint16), "f": torch.ones(3).to(torch.float8_e4m3fn)}),
    ("zip, transposed and sliced views", lambda: saved({"t": WEIGHT.t(), "s": WEIGHT[1:, ::2]}),
     {"t": WEIGHT.t(), "s": WEIGHT[1:, ::2]}),
    ("zip, tied tensors", lambda: saved({"a": WEIGHT, "b": WEIGHT}), {"a": WEIGHT, "b": WEIGHT}),
    ("zip, parameters", lambda: saved(OrderedDict(a=torch.nn.Parameter(WEIGHT))), A),
    ("before 1.6: stream of pickles", lambda: saved(STATE, _use_new_zipfile_serialization=False), STATE),
    ("under state_dict, with epoch", lambda: saved({"state_dict": A, "epoch": 3}), A),
    ("under model, with an optimizer", lambda: saved(
        {"model": A, "optimizer": {"state": {0: {"exp_avg": WEIGHT}}, "param_groups": [{"lr": 0.1}]}}), A),
    ("model and ema: two state dicts", lambda: saved({"model": A, "ema": {"a": WEIGHT + 1}}), None),
    ("with an object of a foreign class", lambda: saved({"state_dict": A, "options": Options()}), A),
    ("a whole module", lambda: saved(torch.nn.Linear(2, 2)), None),
    ("a sparse tensor", lambda: saved({"a": WEIGHT.to_sparse()}), None),
    ("a call of open(), beside weights", lambda: saved({"state_dict": A, "x": Canary()}), None),
    ("a call of open(), bare pickle", lambda: pickle.dumps(Canary()), None),
    ("a byte changed (its CRC32 is wrong)", wrong_crc, None),
    ("a record cut short", lambda: rezipped(saved(A), data_0=bytes(20)), None),
    ("a record missing", lambda: rezipped(saved(A), data_0=None), None),
    ("cut off in the middle", lambda: saved({"a": torch.zeros(4000)})[:9000], None),
    ("a git-lfs pointer", lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", None),
]  # fmt: skip

LOADERS = {
    "wconv": """
from converter import convert
from safetensors.torch import load_file
convert(path, "out.safetensors", tied="duplicate")
state = load_file("out.safetensors")
""",
    "torch.load": "state = torch.load(path, weights_only=True)",
    "torch.load, mmap": "state = torch.load(path, weights_only=True, mmap=True)",
    # What bindings/python/convert.py of safetensors does to a file.
    "safetensors' convert.py": """
from safetensors.torch import load_file, save_file
loaded = torch.load(path, map_location="cpu", weights_only=True)
loaded = loaded.get("state_dict", loaded)
save_file({k: v.contiguous().clone() for k, v in loaded.items()}, "out.safetensors", {"format": "pt"})
state = load_file("out.safetensors")
""",
    "mergekit, lazy": """
from mergekit.io.loader import TensorLoader
loader = TensorLoader.get(path, use_lazy_unpickle=True)
state = {key: loader.get_tensor(key) for key in loader.keys()}
""",
}
JUDGE = """
import sys, warnings, torch
warnings.simplefilter("ignore")
path, right = sys.argv[1:]
{loader}
expected = torch.load(right) if right else {{}}
same = state.keys() == expected.keys() and all(
    isinstance(state[k], torch.Tensor) and state[k].dtype == t.dtype and state[k].shape == t.shape
    and torch.equal(state[k].view(torch.uint8) if t.itemsize == 1 else state[k],
                    t.view(torch.uint8) if t.itemsize == 1 else t) for k, t in expected.items())
is_as_saved = any(isinstance(value, dict) or value.is_sparse for value in state.values())
print("right" if same and right else "nested" if is_as_saved else "other")
"""


def ask(loader: str, raw: bytes, suffix: str, expected: dict[str, torch.Tensor] | None) -> str:
    """Say in a few words what a reader makes of a file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / f"model{suffix}").write_bytes(raw)
        if expected is not None:
            torch.save({name: tensor.detach() for name, tensor in expected.items()}, folder / "right.pt")
        code = JUDGE.format(loader=LOADERS[loader])
        command = [sys.executable, "-c", code, f"model{suffix}", "right.pt" if expected is not None else ""]
        environment = {"PYTHONPATH": ":".join([str(ROOT), *sys.path])}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if (folder / "canary").exists():
            return "**runs it**"
    if done.returncode:
        return "refused" if "WconvError" in done.stderr or "converter.errors" in done.stderr else "error"
    return {"right": "right", "nested": "as saved", "other": "**wrong**"}[done.stdout.split()[-1]]


def versions() -> str:
    return ", ".join(
        f"{package} {version(package).partition('+')[0]}" for package in ("torch", "safetensors", "mergekit")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Say what each reader makes of each kind of file.")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "compatibility.rst")
    options = parser.parse_args()
    rows = []
    for what, make, expected in KINDS:
        raw = make()
        suffix = ".safetensors" if what == "safetensors" else ".bin"
        rows.append([what, *(ask(loader, raw, suffix, expected) for loader in LOADERS)])
        print(json.dumps(rows[-1]), file=sys.stderr)
    header = ["file", *LOADERS]
    widths = [max(len(line[place]) for line in [header, *rows]) for place in range(len(header))]
    rule = " ".join("=" * width for width in widths)
    table = [rule, *(" ".join(map(str.ljust, line, widths)).rstrip() for line in [header]), rule]
    table += [" ".join(map(str.ljust, line, widths)).rstrip() for line in rows] + [rule]
    options.output.write_text(
        f"""What reads what
===============

What wconv and others make of the files that people have, by ``scripts/compat.py`` ({versions()}).

{chr(10).join(table)}

right
    all tensors, bit for bit, under their names.
as saved
    the value as it was saved, a dict with dicts inside or a sparse tensor: what a program expects, but no state dict.
refused
    one line that says what is wrong and what to do; nothing is written.
error
    an exception, of whatever kind.
**wrong**
    other tensors than were saved, or a file taken that is damaged or that needs a choice, and nothing said.
**runs it**
    what is in the file is run.
""",
        "utf-8",
    )


if __name__ == "__main__":
    main()

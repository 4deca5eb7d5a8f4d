#!/usr/bin/env python3
"""Fuzz the readers: whatever the bytes, they give tensors or an error of wconv's, within 512 MB and 10 s.

Each target runs in a process of its own, from the corpus in tests/corpus/TARGET. What it finds new goes to
build/fuzz/TARGET, an input that breaks it to build/fuzz/TARGET-crash-*. Needs atheris (``pip install -e ".[fuzz]"``).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("zip", "stream", "pickle", "safetensors", "dcp", "ranks", "zero")
MAX_LEN = 4096


def reader(target: str) -> Callable[[Path, bytes], object]:
    """Give what a target does with the bytes it is fed."""
    from converter.formats import safetensors
    from converter.formats.torch import files
    from converter.formats.torch.rebuild import parse_pickle
    from converter.formats.torch.state_dict import Reading, choose_state_dict
    from converter.formats.trained import dcp, ranks
    from converter.formats.trained.zero import checkpoint as zero
    from converter.storage import OpenFile, place_of
    from converter.tensors.base import WeightsFile
    from converter.tensors.reader import RangeReader, read_chunks

    lenient = Reading(strip_code=True, lenient=True)
    flat = Reading(strip_code=True, flatten=True)

    def read_pickle(path: Path, raw: bytes) -> object:
        return choose_state_dict(parse_pickle(raw, path), path, flat if len(raw) % 2 else lenient)

    def read_values(path: Path, read: Callable[[OpenFile], WeightsFile]) -> None:
        buffer = bytearray(1 << 16)
        with place_of(path).open() as file:
            tensors = read(file).tensors
        with RangeReader() as reader:
            for info in tensors:
                for chunk, _ in zip(read_chunks(info.source, reader, buffer), range(4), strict=False):
                    len(chunk)

    def read_dcp(path: Path, raw: bytes) -> None:
        # A pickle ends where it says so: behind it lie the boxes that it names, in the same bytes under another name.
        metadata = path.with_name(".metadata")
        metadata.write_bytes(raw)
        read_values(metadata, lambda file: dcp.read_file(file, lenient))

    def read_ranks(path: Path, raw: bytes) -> None:
        first, second = (path.with_name(f"model_world_size_2_rank_{rank}.pt") for rank in range(2))
        first.write_bytes((ROOT / "tests" / "corpus" / "ranks" / "rank_0").read_bytes())
        second.write_bytes(raw)
        read_values(first, lambda file: ranks.read_file(file, lenient))

    def read_zero(path: Path, raw: bytes) -> None:
        # Model states or the optimizer's, of the second rank or of the first, beside those of the corpus.
        seeds = {
            path.with_name(f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt"): f"{kind}_{rank}"
            for kind in ("model", "optim")
            for rank in range(2)
        }
        kind, rank = "model" if b"param_shapes" in raw else "optim", len(raw) % 2
        for place, seed in seeds.items():
            is_fed = seed == f"{kind}_{rank}"
            place.write_bytes(raw if is_fed else (ROOT / "tests" / "corpus" / "zero" / seed).read_bytes())
        read_values(next(iter(seeds)), lambda file: zero.read_file(file, lenient))

    return {
        "dcp": read_dcp,
        "ranks": read_ranks,
        "zero": read_zero,
        "zip": lambda path, _: read_values(path, lambda file: files.read_file(file, lenient)),
        "stream": lambda path, _: read_values(path, lambda file: files.read_file(file, lenient)),
        "pickle": read_pickle,
        "safetensors": lambda path, _: read_values(path, safetensors.read_file),
    }[target]


def run_target(target: str, arguments: list[str]) -> None:
    """Feed one target until libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["converter"]):
        read = reader(target)
        from converter.errors import WconvError
    path = Path(tempfile.mkdtemp()) / "model.bin"

    def feed(raw: bytes) -> None:
        path.write_bytes(raw)
        try:
            read(path, raw)
        except WconvError as error:
            if error.exit_code == WconvError.exit_code:  # a bug of ours
                raise

    atheris.Setup([sys.argv[0], *arguments], feed)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz the readers.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)} (default: all)")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default: 60)")
    parser.add_argument("--run", metavar="TARGET", choices=TARGETS, help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args()
    if options.run:
        run_target(options.run, rest)
        return
    failed = []
    for target in options.targets or TARGETS:
        found = ROOT / "build" / "fuzz" / target
        found.mkdir(parents=True, exist_ok=True)
        limits = [f"-max_total_time={options.seconds}", "-rss_limit_mb=512", "-timeout=10", f"-max_len={MAX_LEN}"]
        corpora = [str(found), str(ROOT / "tests" / "corpus" / target)]
        crash = f"-artifact_prefix={found.parent}/{target}-"
        command = [sys.executable, __file__, f"--run={target}", *limits, "-print_final_stats=1", crash, *corpora]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        runs = [line.split()[-1] for line in done.stdout.splitlines() if "number_of_executed_units" in line]
        print(
            f"{target}: {'found nothing' if done.returncode == 0 else 'BROKEN'} in {(runs or ['?'])[0]} runs",
            flush=True,
        )
        if done.returncode:
            print(done.stdout[-3000:])
            failed.append(target)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

"""Measure wconv against `cp` and against what people use today: time, peak memory, and what a kill leaves behind.

Strategy: a sharded float32 `.bin` checkpoint with Llama's names and shapes is written once and kept. `cp` of its
weight files and a conversion then run in turn, each in a process of its own; outputs are removed and the disk is synced
between them, outside of the timed span. A ratio belongs to one pair, so that a machine that slows down slows down both;
the median of the ratios counts. Times go from the start of the process to its end, imports included; CPU seconds are
those of all its processes. With `--before`, an older checkout runs in the same turns.

MB and GB are powers of ten. A peak is that of the largest process, but in the scaling section, where it is that of all
together. One below that of the launcher, some 9 MB, shows as the launcher's: `cp` needs less. What comes out wrong ends
with exit code 1; a time or a size out of reach is marked in the table, no more. Needs `cp` and `os.wait4`: Linux or
macOS.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from bench_lora import measure_merged
from bench_models import GB, ROOT, write_small
from bench_quantized import measure_dequantized
from bench_runs import (
    CASES,
    OK,
    WRONG,
    Bench,
    Case,
    Figures,
    Row,
    Run,
    RunFailed,
    clear,
    label_of,
    llama,
    made_once,
    missing_room,
    ratios_of,
    run,
    run_in_turn,
    say,
    source_of,
    wconv_of,
    weights_nbytes,
    within,
)
from bench_scaling import measure_scaling
from bench_single_file import measure_single_file
from make_sample import write_json
from safetensors import safe_open

SMALL_RUNS = 3
START_RUNS = 11  # of a third of a second each
START_CASES = ("to-safetensors", "recast to bf16")
START_TENSORS = 10
SMALL_SECONDS_REACH = 5.0
RSS_SPREAD_REACH_MB = 4.0
KILL_POINTS = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 0.95)  # of the time that an undisturbed conversion takes

Hashes = dict[str, str]  # file, relative to its folder -> sha256

# Run with the source and the output as arguments.
TORCH_BASELINE = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
source, out = map(Path, sys.argv[1:])
out.mkdir()
for path in sorted(source.glob("*.bin")):
    state_dict = torch.load(path, mmap=True, weights_only=True)
    name = path.stem.replace("pytorch_model", "model") + ".safetensors"
    save_file(state_dict, out / name, {"format": "pt"})
    del state_dict
"""
TRANSFORMERS_BASELINE = """
import sys
from transformers import AutoModelForCausalLM
source, out = sys.argv[1:]
AutoModelForCausalLM.from_pretrained(source, dtype="float32").save_pretrained(out)
"""
INT8_BASELINE = """
import sys
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
source, out = sys.argv[1:]
config = BitsAndBytesConfig(load_in_8bit=True)
AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map="cpu").save_pretrained(out)
"""
BASELINES = {
    "torch.load(mmap=True) + save_file": ("torch", TORCH_BASELINE),
    "transformers load + save": ("transformers", TRANSFORMERS_BASELINE),
    "transformers load in 8 bits + save": ("bitsandbytes", INT8_BASELINE),
}


# The sections.


def measure_ratio(bench: Bench) -> Iterator[Row]:
    """Run `cp` and each case in turn."""
    for case in bench.cases:
        source = source_of(bench, case, bench.gb)
        nbytes = weights_nbytes(source)
        commands = {"cp": bench.copy_command(source), case.name: bench.command(case, source)}
        run_in_turn(bench, 1, commands, nbytes)  # for warming up
        copies, conversions = run_in_turn(bench, bench.pairs, commands, nbytes).values()
        ratios, figures = ratios_of(copies, conversions), Figures(conversions)
        reach = within(
            (statistics.median(ratios), case.ratio_reach, "x cp"),
            (figures.peak_mb, case.rss_reach_mb, "MB"),
        )
        yield Row("ratio", f"cp (beside {case.name})", Figures(copies), read_nbytes=nbytes)
        yield Row("ratio", case.name, figures, ratios, *reach, read_nbytes=nbytes)


def measure_baselines(bench: Bench) -> Iterator[Row]:
    """Run the other ways to do it."""
    source = llama(bench, bench.gb)
    nbytes = weights_nbytes(source)
    for name, (module, code) in BASELINES.items():
        if not find_spec(module):
            yield Row("baselines", name, note=f"{module} is not installed")
            continue
        command = [sys.executable, "-c", code, str(source), str(bench.out)]
        runs = run_in_turn(bench, bench.baseline_runs, {"cp": bench.copy_command(source), name: command}, nbytes)
        judged = judge_by_torch(bench, source, name, command) if module == "torch" else ("", "")
        yield Row("baselines", name, Figures(runs[name]), ratios_of(*runs.values()), *judged, read_nbytes=nbytes)


def judge_by_torch(bench: Bench, source: Path, name: str, command: list[str]) -> tuple[str, str]:
    """Hold what torch and safetensors write against what wconv writes."""
    clear(bench)
    run(name, command)
    theirs = hash_files(bench.out)
    clear(bench)
    run(CASES[0].name, bench.command(CASES[0], source))
    ours = hash_files(bench.out)
    if theirs and theirs.items() <= ours.items():
        return "wconv's files are the same, byte for byte", OK
    return "wconv's files are not the same", WRONG


def measure_rss(bench: Bench) -> Iterator[Row]:
    """Hold the peaks at several sizes against each other."""
    for case in bench.cases:
        peaks = []
        for gb in bench.rss_sizes:
            name = f"{case.name}, {gb:g} GB"
            if missing := missing_room(bench, gb):
                yield Row("rss", name, note=f"left out: the disk lacks {missing / GB:.1f} GB")
                continue
            source = source_of(bench, case, gb)
            clear(bench)
            converted = run(name, bench.command(case, source))
            peaks.append(converted.peak_mb)
            note, verdict = within((converted.peak_mb, case.rss_reach_mb, "MB"))
            yield Row("rss", name, Figures((converted,)), note=note, verdict=verdict)
        if len(peaks) > 1:
            spread = max(peaks) - min(peaks)
            note, verdict = within((spread, RSS_SPREAD_REACH_MB, "MB"))
            yield Row("rss", f"{case.name}, all sizes", note=f"{spread:.1f} MB apart, {note}", verdict=verdict)


def measure_start(bench: Bench) -> Iterator[Row]:
    """Convert what is so small that it is the start that is measured."""
    cases = [case for case in bench.cases if case.name in START_CASES]
    for name, now, before in measure_tensors(bench, START_TENSORS, START_RUNS, cases):
        yield Row("start", name, now, before=before)


def measure_small(bench: Bench) -> Iterator[Row]:
    """Convert a checkpoint whose tensors are many and small."""
    cases = [case for case in bench.cases if case.source not in ("model", "unet")]
    for name, now, before in measure_tensors(bench, bench.small_tensors, SMALL_RUNS, cases):
        note, verdict = within((now.seconds, SMALL_SECONDS_REACH, "s"))
        yield Row("small", name, now, note=note, verdict=verdict, before=before)


def measure_tensors(bench: Bench, count: int, rounds: int, cases: list[Case]) -> Iterator[tuple[str, Figures, Figures]]:
    """Convert one file with so many small tensors, by each tree in turn."""
    source = made_once(bench.folder / f"small-{count}", lambda folder: write_small(folder, count))
    for case in cases:
        name = f"{case.name}, {count:,} tensors"
        commands = {label_of(name, tree): bench.command(case, source, tree=tree) for tree in bench.trees}
        runs = run_in_turn(bench, rounds, commands)
        yield name, Figures(runs[name]), Figures(runs.get(label_of(name, "before"), ()))


def check_kills(bench: Bench) -> Iterator[Row]:
    """Kill a conversion at several moments, see what is there, and run the same command again."""
    for case in bench.cases:
        source = source_of(bench, case, bench.gb)
        command = bench.command(case, source)
        clear(bench, weights_nbytes(source))
        undisturbed = run(case.name, command)
        expected = hash_files(bench.out)
        clear(bench, weights_nbytes(source))
        undisturbed = min(undisturbed, run(case.name, command), key=lambda run: run.seconds)
        faults = [*unreadable(bench.out), *differences("the second run's", expected, hash_files(bench.out))]
        yield kill_row(f"{case.name}, twice", [undisturbed], "twice the same bytes, safetensors opens them", faults)
        in_the_middle = 0
        for point in KILL_POINTS:
            row, left = kill_once(bench, case, source, point * undisturbed.seconds, expected)
            in_the_middle += left
            yield replace(row, name=f"{case.name}, killed at {point:.0%}")
        if not in_the_middle:
            yield kill_row(case.name, [], "", ["no kill came while it wrote. choose a larger --gb"])


def kill_once(bench: Bench, case: Case, source: Path, seconds: float, expected: Hashes) -> tuple[Row, bool]:
    """Kill one conversion and run it again; say also whether the kill came while it wrote."""
    command = bench.command(case, source)
    before = hash_files(source)
    clear(bench, weights_nbytes(source))  # as the undisturbed run had it, or the moments do not fit
    killed = kill_after(seconds, command)
    left = ", ".join(sorted(path.name for path in bench.out.parent.iterdir()))
    if bench.out.exists():  # then all of it must be there, and the same command would be refused
        note = f"killed after the commit, left {left}" if killed else "ended before the kill"
        faults = differences("the output's", expected, hash_files(bench.out))
        faults += differences("the source's", before, hash_files(source))
        return kill_row("", [], note, faults), False
    faults = differences("the source's", before, hash_files(source))
    runs = []
    try:
        runs.append(run(f"{case.name}, after a kill at {seconds:.2f} s", command))
    except RunFailed as error:
        faults.append(str(error))
    faults += differences("the output's", expected, hash_files(bench.out))
    faults += differences("the source's", before, hash_files(source))
    faults += [f"{path.name} is left over" for path in bench.out.parent.iterdir() if path != bench.out]
    return kill_row("", runs, f"left {left or 'nothing'}; the same again ends right", faults), bool(left)


def kill_row(name: str, runs: list[Run], note: str, faults: list[str]) -> Row:
    return Row("kill", name, Figures(tuple(runs)), note="; ".join(faults) or note, verdict=WRONG if faults else OK)


def kill_after(seconds: float, command: list[str]) -> bool:
    """Start a process and kill it and its children; say whether it was still running."""
    child = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return child.returncode == -signal.SIGKILL


def hash_files(folder: Path) -> Hashes:
    return {str(path.relative_to(folder)): hash_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(4 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def differences(what: str, expected: Hashes, found: Hashes) -> list[str]:
    """Say which files are missing, new or changed."""
    return [
        f"{what} {name} is {'missing' if name not in found else 'new' if name not in expected else 'different'}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]


def unreadable(folder: Path) -> list[str]:
    """Open every file with safetensors' own reader, which checks that header and size agree."""
    paths = sorted(folder.rglob("*.safetensors"))
    return list(filter(None, map(fault_of, paths))) if paths else ["no *.safetensors in the output"]


def fault_of(path: Path) -> str | None:
    try:
        with safe_open(path, "np"):
            return None
    except Exception as error:  # whatever it raises is a fault of the file
        return f"{path.name}: {error}"


SECTIONS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "ratio": measure_ratio,
    "scaling": measure_scaling,
    "baselines": measure_baselines,
    "dequantize": measure_dequantized,
    "single-file": measure_single_file,
    "merge-lora": measure_merged,
    "rss": measure_rss,
    "start": measure_start,
    "small": measure_small,
    "kill": check_kills,
}


def run_section(bench: Bench, section: str) -> Iterator[Row]:
    """Go on with the next section where a process fails."""
    try:
        yield from SECTIONS[section](bench)
    except RunFailed as error:
        yield Row(section, "broken off", note=str(error), verdict=WRONG)


# The report.


def show(rows: list[Row]) -> None:
    """Print the table, without the columns that no row fills."""
    head = ("", "", "seconds", "x cp, median [min, max]", "x as many cp", "CPU s", "CPU s/GB", "peak MB", "")
    columns = [column for column in zip(head, *map(cells, rows), strict=True) if any(column[1:])]
    is_text = [column[0] == "" for column in columns]
    widths = [max(map(len, column)) for column in columns]
    print()
    for line in zip(*columns, strict=True):
        aligned = zip(line, widths, is_text, strict=True)
        print("  ".join(f"{cell:{'<' if text else '>'}{width}}" for cell, width, text in aligned).rstrip())
    if any(row.before.runs for row in rows):
        print("\nIn brackets: what the older tree took, in turn with this one.")


def cells(row: Row) -> tuple[str, ...]:
    return (
        row.section,
        row.name,
        of_both(row, lambda figures: f"{figures.seconds:.2f}"),
        spread(row.ratios),
        spread(row.parallel_ratios),
        of_both(row, lambda figures: f"{figures.cpu_seconds:.2f}"),
        of_both(row, lambda figures: f"{figures.cpu_seconds * GB / row.read_nbytes:.3f}") if row.read_nbytes else "",
        of_both(row, lambda figures: f"{figures.peak_mb:.1f}"),
        ": ".join(filter(None, (row.verdict, row.note))),
    )


def of_both(row: Row, text: Callable[[Figures], str]) -> str:
    """Return a figure of a row, and in brackets that of the older tree."""
    now, before = (text(figures) if figures.runs else "" for figures in (row.now, row.before))
    return f"{now} ({before})" if before else now


def spread(ratios: tuple[float, ...]) -> str:
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]" if ratios else ""


def machine() -> dict[str, Any]:
    """Say what the figures depend on, without names of hosts or folders."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / GB, 1),
        "python": platform.python_version(),
    }


def write_report(path: Path, bench: Bench, rows: list[Row]) -> None:
    wishes = {"gb": bench.gb, "pairs": bench.pairs, "small_tensors": bench.small_tensors}
    write_json(path, {"machine": machine(), "wishes": wishes, "rows": [asdict(row) for row in rows]})


def sizes(text: str) -> tuple[float, ...]:
    return tuple(float(size) for size in text.split(","))


def parse_arguments() -> tuple[Bench, list[str], Path | None]:
    parser = argparse.ArgumentParser(description="Measure wconv against cp and the usual ways.")
    parser.add_argument("--dir", type=Path, default=ROOT / "build" / "bench", help="work folder (default: build/bench)")
    parser.add_argument("--gb", type=float, default=4.0, help="size of the checkpoint (default: 4)")
    parser.add_argument("--pairs", type=int, default=5, help="counted pairs of cp and conversion (default: 5)")
    parser.add_argument("--baseline-runs", type=int, default=1, help="runs of each other way (default: 1)")
    parser.add_argument("--rss-sizes", type=sizes, default=(1.0, 4.0, 8.0), metavar="GB,GB", help="default: 1,4,8")
    parser.add_argument("--small-tensors", type=int, default=100_000, metavar="N", help="default: 100000")
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="can be repeated")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="run this section; can be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--wconv", type=shlex.split, metavar="COMMAND", help="measure this, not the working tree")
    parser.add_argument("--before", type=Path, metavar="TREE", help="hold some sections against this checkout")
    options = parser.parse_args()
    if min(options.gb, options.pairs, options.baseline_runs, options.small_tensors, *options.rss_sizes) <= 0:
        parser.error("sizes and counts must be above 0")
    if not hasattr(os, "wait4") or not shutil.which("cp"):
        parser.error("needs cp and os.wait4: Linux or macOS")
    if options.before and not (options.before / "converter").is_dir():
        parser.error(f"{options.before}: no checkout of wconv")
    trees = {"now": options.wconv or wconv_of(ROOT)}
    if options.before:
        trees["before"] = wconv_of(options.before.resolve())
    bench = Bench(
        folder=options.dir.resolve(),
        gb=options.gb,
        pairs=options.pairs,
        baseline_runs=options.baseline_runs,
        rss_sizes=options.rss_sizes,
        small_tensors=options.small_tensors,
        cases=tuple(case for case in CASES if case.name in (options.case or [case.name])),
        trees=trees,
    )
    return bench, options.only or list(SECTIONS), options.json


def main() -> None:
    bench, sections, json_path = parse_arguments()
    bench.folder.mkdir(parents=True, exist_ok=True)
    if missing := missing_room(bench, bench.gb):
        sys.exit(f"{bench.folder}: the disk lacks {missing / GB:.1f} GB. choose a smaller --gb or another --dir")
    rows: list[Row] = []
    try:
        for section in sections:
            say(f"{section}:")
            rows += run_section(bench, section)
    finally:
        shutil.rmtree(bench.out.parent, ignore_errors=True)
    show(rows)
    if json_path:
        write_report(json_path, bench, rows)
    if any(row.verdict == WRONG for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()

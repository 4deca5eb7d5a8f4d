"""What the sections of the bench share: the cases, a process that is timed, and what a row of the table holds.

Times go from the start of the process to its end. CPU seconds are those of all processes that it started, also of those
that it did not wait for: the launcher takes them over as they are left behind, and waits for them.
"""

from __future__ import annotations

import math
import os
import random
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
from bench_models import GB, ROOT, write_llama, write_unet

MB = 1_000_000

# As a user's Python does it: modules are compiled once, not for every run.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

OK, OUT_OF_REACH, WRONG = "ok", "OUT OF REACH", "WRONG"

Source = Literal["torch", "safetensors", "model", "unet"]  # "model" is "torch" for what needs its config
Arguments = Callable[[Path, Path], list[str]]


@dataclass(frozen=True, slots=True)
class Case:
    """A conversion to measure: what follows `wconv`, given the source and the output, and what it should reach."""

    name: str
    arguments: Arguments
    ratio_reach: float  # infinity where none is set
    rss_reach_mb: float
    source: Source = "torch"


def conversion(command: str, *options: str) -> Arguments:
    """Return what follows `wconv` for a command with these options."""
    return lambda source, out: [command, str(source), "-o", str(out), *options]


def in_shards(command: str, count: int) -> Arguments:
    """Return what follows `wconv` for a command that cuts the source into so many shards."""

    def arguments(source: Path, out: Path) -> list[str]:
        # Half as much again as an even share: tensors do not fill a shard to the brim.
        nbytes = weights_nbytes(source) * 3 // (2 * count)
        return [command, str(source), "-o", str(out), "--max-shard-size", f"{nbytes}B" if count > 1 else "none"]

    return arguments


CASES = (
    Case("to-safetensors", conversion("to-safetensors"), 1.1, 40.0),
    Case("recast to bf16", conversion("recast", "--dtype", "bf16"), 0.65, 80.0),
    Case("recast to fp16", conversion("recast", "--dtype", "fp16"), 0.65, 80.0),
    Case("reshard 5 to 2", in_shards("reshard", 2), 1.1, 80.0, source="safetensors"),
    Case("reshard 5 to 1", in_shards("reshard", 1), 1.1, 80.0, source="safetensors"),
    Case("prepare-coreml", conversion("prepare-coreml"), 0.65, 80.0, source="unet"),
    Case("to-bin", conversion("to-bin"), 1.2, 80.0, source="safetensors"),
    Case("quantize to int8", conversion("quantize"), math.inf, 100.0, source="model"),
)


@dataclass(frozen=True, slots=True)
class Run:
    seconds: float
    cpu_seconds: float
    peak_mb: float  # of the largest process; of all processes together in a run that was watched
    pss_mb: float = 0.0  # of all processes together, in a run that was watched


class Memory(NamedTuple):
    """What processes take together.

    Of a page that n processes have, PSS counts an nth for each, whoever they are: that of libraries gets smaller with
    every Python that runs beside. ``nbytes`` counts them whole, once: as many as that process has which has most.
    """

    nbytes: int = 0
    pss_nbytes: int = 0

    def larger(self, other: Memory) -> Memory:
        return Memory(*map(max, self, other))


class RunFailed(Exception):
    """A process that should have ended well did not."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What a command took: its timed runs, and the one that was watched, if any."""

    runs: tuple[Run, ...] = ()
    watched: Run | None = None

    @property
    def seconds(self) -> float:
        return statistics.median(run.seconds for run in self.runs)

    @property
    def cpu_seconds(self) -> float:
        return statistics.median(run.cpu_seconds for run in self.runs)

    @property
    def peak_mb(self) -> float:
        return self.watched.peak_mb if self.watched else max(run.peak_mb for run in self.runs)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    section: str
    name: str
    now: Figures = field(default_factory=Figures)
    ratios: tuple[float, ...] = ()  # to one cp
    note: str = ""
    verdict: str = ""  # OK, OUT_OF_REACH, WRONG or nothing
    parallel_ratios: tuple[float, ...] = ()  # to as many cp at once as there are workers
    before: Figures = field(default_factory=Figures)  # the same of an older tree
    read_nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Bench:
    """What the user asked for."""

    folder: Path
    gb: float
    pairs: int
    baseline_runs: int
    rss_sizes: tuple[float, ...]
    small_tensors: int
    cases: tuple[Case, ...]
    trees: dict[str, list[str]]  # "now", and perhaps "before" -> how its wconv is started

    @property
    def out(self) -> Path:
        """Return the output path, alone in its folder, so that anything beside it is a left-over."""
        return self.folder / "out" / "model"

    def command(self, case: Case, source: Path, *options: str, tree: str = "now") -> list[str]:
        return [*self.trees[tree], *case.arguments(source, self.out), *options]

    def copy_command(self, source: Path, count: int = 1) -> list[str]:
        """Return what copies the weights of a source, so many files at once."""
        paths, folder = list(map(str, weights_of(source))), str(self.out.parent)
        if count == 1:
            return ["cp", *paths, folder]
        script = f"printf '%s\\0' \"$@\" | xargs -0 -P {count} -I @ cp @ {shlex.quote(folder)}"
        return ["sh", "-c", script, "sh", *paths]


def label_of(name: str, tree: str) -> str:
    return name if tree == "now" else f"{name}, {tree}"


def wconv_of(tree: Path) -> list[str]:
    """Return how the wconv of a checkout is started, whichever is installed and wherever this is run."""
    return ["env", f"PYTHONPATH={tree}", sys.executable, "-P", "-m", "converter"]


def made_once(folder: Path, write: Callable[[Path], None]) -> Path:
    """Return the folder, written first unless an earlier run did."""
    if not folder.exists():
        say(f"writing {folder.name}")
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        partial.rename(folder)
    return folder


def llama(bench: Bench, gb: float) -> Path:
    return made_once(bench.folder / f"llama-{gb:g}gb", lambda folder: write_llama(folder, gb))


def source_of(bench: Bench, case: Case, gb: float) -> Path:
    if case.source == "unet":
        return made_once(bench.folder / f"unet-{gb:g}gb", lambda folder: write_unet(folder, gb))
    source = llama(bench, gb)
    if case.source != "safetensors":
        return source
    name = f"{source.name}-safetensors"
    return made_once(bench.folder / name, lambda folder: make_safetensors(bench, source, folder))


def make_safetensors(bench: Bench, source: Path, folder: Path) -> None:
    folder.rmdir()
    run("to-safetensors, for other cases", [*bench.trees["now"], "to-safetensors", str(source), "-o", str(folder)])


def weights_of(source: Path) -> list[Path]:
    return sorted(path for path in source.rglob("*") if path.suffix in (".bin", ".safetensors"))


def weights_nbytes(source: Path) -> int:
    return sum(path.stat().st_size for path in weights_of(source))


def missing_room(bench: Bench, gb: float) -> int:
    """Return how many bytes the disk lacks for a source of so many GB and one output."""
    nbytes = (1 if (bench.folder / f"llama-{gb:g}gb").exists() else 2) * gb * GB
    return max(0, round(1.1 * nbytes) - shutil.disk_usage(bench.folder).free)


# Runs.

# Starts a process and reports on it from a process of its own that is as small as can be: Linux counts into a child's
# peak what the process that started it held at that moment. Worker processes come from a server that the command does
# not wait for. On Linux they become children of the launcher (PR_SET_CHILD_SUBREAPER, 36 in linux/prctl.h), or their
# time would be counted nowhere; elsewhere there is no such server.
LAUNCHER = """
import ctypes, os, resource, sys, time
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(36, 1)
start = time.perf_counter()
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
_, status, usage = os.wait4(pid, 0)
seconds = time.perf_counter() - start
try:
    while True:
        os.wait()
except ChildProcessError:
    pass
everyone = resource.getrusage(resource.RUSAGE_CHILDREN)
cpu_seconds = everyone.ru_utime + everyone.ru_stime
print(seconds, cpu_seconds, usage.ru_maxrss, os.waitstatus_to_exitcode(status))
"""
MAXRSS_NBYTES = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss: bytes on macOS, KiB on Linux
WATCH_SECONDS = 0.02

# A virtual machine may give memory that was freed back to its host, and then pays for every page again, several times
# what copying costs. So the pages that an output will need are all written to before a run that is timed.
WARM_MEMORY = "import sys, numpy; numpy.ones(int(sys.argv[1]), 'u1')"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def clear(bench: Bench, warm_nbytes: int = 0) -> None:
    """Remove outputs, wait until the disk is at rest, and warm memory: twice as much, for not all is used again."""
    shutil.rmtree(bench.out.parent, ignore_errors=True)
    bench.out.parent.mkdir(parents=True)
    os.sync()
    # More than is free would push the source out of memory.
    warm_nbytes = min(2 * warm_nbytes, psutil.virtual_memory().free * 3 // 4)
    if warm_nbytes:
        subprocess.run([sys.executable, "-c", WARM_MEMORY, str(warm_nbytes)], check=True)


def run(label: str, command: list[str], is_watched: bool = False) -> Run:
    """Time one process that ends well, and take its peak memory; of all its processes if it is watched (Linux)."""
    watched = Memory()
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", LAUNCHER, *command],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as launcher:
        while True:
            try:
                stdout, stderr = launcher.communicate(timeout=WATCH_SECONDS if is_watched else None)
                break
            except subprocess.TimeoutExpired:
                watched = watched.larger(memory_below(launcher.pid))
    words = stdout.split()
    if launcher.returncode or words[3] != "0":
        say(f"{shlex.join(command)}\n{stderr}")
        raise RunFailed(f"{label} failed with exit code {words[3] if words else launcher.returncode}")
    peak_nbytes = watched.nbytes or int(words[2]) * MAXRSS_NBYTES
    result = Run(float(words[0]), float(words[1]), peak_nbytes / MB, watched.pss_nbytes / MB)
    say(f"  {label:<40} {result.seconds:7.2f} s {result.cpu_seconds:7.2f} CPU s {result.peak_mb:8.1f} MB")
    return result


def memory_below(pid: int) -> Memory:
    """Say how much memory the processes take together that a process has started."""
    try:
        descendants = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return Memory()
    kept = [memory for child in descendants if (memory := read_memory(child.pid))]
    own = sum(memory["Pss_Anon"] + memory["Pss_Shmem"] for memory in kept)
    files = max((memory["RssFile"] for memory in kept), default=0)
    return Memory(own + files, sum(memory["Pss"] for memory in kept))


def read_memory(pid: int) -> dict[str, int]:
    """Read what Linux counts for a process, in bytes; nothing if it has ended."""
    try:
        text = "".join(Path(f"/proc/{pid}/{name}").read_text() for name in ("smaps_rollup", "status"))
    except OSError:
        return {}
    counted = re.findall(r"^(Pss\w*|RssFile):\s+(\d+) kB$", text, re.MULTILINE)
    memory = {name: int(kib) * 1024 for name, kib in counted}
    return memory if "RssFile" in memory else {}  # a process that is about to end has none


def run_in_turn(
    bench: Bench, rounds: int, commands: Mapping[str, list[str]], warm_nbytes: int = 0
) -> dict[str, tuple[Run, ...]]:
    """Run all commands several times, each time in another order: what comes before one leaves its mark on memory."""
    runs: dict[str, list[Run]] = {label: [] for label in commands}
    for i in range(rounds):
        for label in random.Random(i).sample(list(commands), len(commands)):
            clear(bench, warm_nbytes)
            runs[label].append(run(label, commands[label]))
    return {label: tuple(of_one) for label, of_one in runs.items()}


def ratios_of(copies: tuple[Run, ...], others: tuple[Run, ...]) -> tuple[float, ...]:
    return tuple(other.seconds / copy.seconds for copy, other in zip(copies, others, strict=True))


def within(*reaches: tuple[float, float, str]) -> tuple[str, str]:
    """Return note and verdict for values, each with what it should reach at most and its unit."""
    note = ", ".join(f"at most {reach:g} {unit}" for _, reach, unit in reaches if math.isfinite(reach))
    return note, OK if all(value <= reach for value, reach, _ in reaches) else OUT_OF_REACH


def rows_in_turn(
    bench: Bench, section: str, copied: str, commands: Mapping[str, list[str]], nbytes: int, reach_mb: float
) -> Iterator[Row]:
    """Run `cp`, the first of some commands, and the others in turn; give a row each, that of `cp` as ``copied``."""
    runs = run_in_turn(bench, bench.pairs, commands, nbytes)
    yield Row(section, copied, Figures(runs["cp"]), read_nbytes=nbytes)
    for name in list(commands)[1:]:
        figures = Figures(runs[name])
        reach = within((figures.peak_mb, reach_mb, "MB"))
        yield Row(section, name, figures, ratios_of(runs["cp"], runs[name]), *reach, read_nbytes=nbytes)

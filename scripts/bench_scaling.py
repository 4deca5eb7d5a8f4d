"""How a conversion grows with its workers, against one `cp` of the same files and as many at once as there are workers.

Strategy: each conversion runs once for each count of workers with its memory watched, which warms everything up too.
Then all counts, the default, and the copies run in turn, and ratios are of runs of one round. Memory is that of all
processes together, sampled in /proc: elsewhere than on Linux it is that of the largest.
"""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

from bench_models import ROOT
from bench_runs import (
    ENVIRONMENT,
    Bench,
    Case,
    Figures,
    Row,
    Run,
    clear,
    label_of,
    ratios_of,
    run,
    run_in_turn,
    source_of,
    weights_nbytes,
    within,
)

from converter.run.workers.cores import count_cores, default_workers

COUNTS = (1, 2, 4, 8, 16)
SCALED = ("to-safetensors", "recast to bf16", "reshard 5 to 1", "quantize to int8")
PEAK_REACH_MB = {2: 100.0, 4: 200.0}  # of all processes together; count of workers -> MB


class Wish(NamedTuple):
    """How many workers are asked for, or taken where nobody asks."""

    workers: int
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join(self.options) or "default"


def wishes() -> list[Wish]:
    counts = [count for count in COUNTS if count <= max(2, count_cores())]
    return [*(Wish(count, ("--workers", str(count))) for count in counts), Wish(default_workers())]


def measure_scaling(bench: Bench) -> Iterator[Row]:
    """Run each case with one worker and with more."""
    for case in bench.cases:
        if case.name in SCALED:
            yield from scale(bench, case)


def scale(bench: Bench, case: Case) -> Iterator[Row]:
    """Run copies and a conversion in turn, both with each count of workers."""
    source = source_of(bench, case, bench.gb)
    nbytes = weights_nbytes(source)
    copies = {wish.workers: f"{wish.workers} cp (beside {case.name})" for wish in wishes()}
    conversions = {
        name_of(case, wish, tree): bench.command(case, source, *wish.options, tree=tree)
        for wish in wishes()
        for tree in bench.trees
    }
    watched = {}
    for name, command in conversions.items():
        clear(bench, nbytes)
        watched[name] = run(f"{name}, watched", command, is_watched=True)
    commands = {name: bench.copy_command(source, count) for count, name in copies.items()} | conversions
    runs = run_in_turn(bench, bench.pairs, commands, nbytes)
    figures = {name: Figures(runs[name], watched.get(name)) for name in commands}
    clear(bench)  # a dry run looks whether there is an output

    one = runs[copies[1]]
    for name in copies.values():
        ratios = ratios_of(one, runs[name]) if runs[name] is not one else ()
        yield Row("scaling", name, figures[name], ratios, read_nbytes=nbytes)
    for wish in wishes():
        name = name_of(case, wish)
        yield Row(
            "scaling",
            name,
            figures[name],
            ratios_of(one, runs[name]),
            *judge_peak(wish, watched[name], who_works(bench.command(case, source, *wish.options))),
            parallel_ratios=ratios_of(runs[copies[wish.workers]], runs[name]),
            before=figures.get(name_of(case, wish, "before"), Figures()),
            read_nbytes=nbytes,
        )


def name_of(case: Case, wish: Wish, tree: str = "now") -> str:
    return label_of(f"{case.name}, {wish}", tree)


def who_works(command: list[str]) -> str:
    """Ask a dry run; an old wconv does not tell."""
    asked = [*command, "--dry-run"]
    answer = subprocess.run(asked, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    workers = re.search(r"^Runs on ([^:]+):", answer.stdout, re.MULTILINE)
    return workers[1] if workers else ""


def judge_peak(wish: Wish, watched: Run, workers: str) -> tuple[str, str]:
    """Return note and verdict for the memory of all processes."""
    reach, verdict = within((watched.peak_mb, PEAK_REACH_MB.get(wish.workers, math.inf), "MB"))
    pss = f"PSS {watched.pss_mb:.1f} MB" if watched.pss_mb else ""
    return ", ".join(filter(None, (workers, pss, reach))), verdict if reach else ""

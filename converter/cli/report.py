"""What is said of plans and results: for people, in tables and sentences, and for programs, as JSON."""

from __future__ import annotations

import shlex
from typing import Any, NamedTuple

from converter.cli.terminal import echo, printable, show_bytes, show_commits, show_seconds, show_table
from converter.errors import name_some
from converter.models.names import fold_modules
from converter.plan.types import Plan, PlannedSet
from converter.recipes.loading import loading_lines
from converter.run.execute import Result
from converter.run.parts import name_counts
from converter.run.upload import Traffic
from converter.storage import Place

_LISTED = 20  # of the tensors that are kept; of more those are one that differ in numbers alone
_NAMED = 5  # of what is carried over; -v lists all


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """Give the machine-readable form of a plan."""
    return {
        "source": str(plan.source.path),
        **({"source_commit": commit} if (commit := plan.source.path.store.commit_id) else {}),
        "target": str(plan.target.folder),
        "weight_sets": [
            {
                "component": planned.component,
                "source": planned.source.label,
                "variant": planned.name.variant,
                "files": [{"path": shard.path, "nbytes": shard.nbytes} for shard in planned.files],
                "index": planned.index[0] if planned.index else None,
                "tensors": planned.tensor_count,
                "tied": dict(planned.ties),
                "renamed": dict(planned.renamed),
                "kept_fp32": [name for name, dtype in planned.kept.items() if dtype.tag == "F32"],
                "kept": {name: dtype.short_name for name, dtype in planned.kept.items()},
            }
            for planned in plan.sets
        ],
        "carried": [name for name, _ in plan.copied],
        "carried_nbytes": _carried_nbytes(plan),
        "removed": list(plan.removed),
        "notes": [*plan.notes, *(note for planned in plan.sets for note in planned.notes)],
        "nbytes": plan.nbytes,
        "up_to_date": plan.is_there or not plan.sets,
        "load_with": loading_lines(plan),
    }


class Needs(NamedTuple):
    """What a plan would take: who would carry it out, in how much memory, on a disk with how much room.

    ``seconds`` is how long one worker would take, without what it takes to write. What is ``read`` and ``sent`` over a
    network is known in its place, where anything is.
    """

    workers: str
    memory_nbytes: int
    free_nbytes: int | None
    seconds: float | None
    read: Traffic | None = None
    sent: Traffic | None = None

    def as_json(self) -> dict[str, Any]:
        """Give the machine-readable form."""
        return {
            "workers": self.workers,
            "peak_memory_nbytes": self.memory_nbytes,
            "free_nbytes": self.free_nbytes,
            "worker_seconds": self.seconds,
            **{
                f"{what}_{name}": value
                for what, traffic in (("read", self.read), ("sent", self.sent))
                if traffic is not None
                for name, value in traffic._asdict().items()
            },
        }


def show_plan(plan: Plan, needs: Needs, verbose: bool = False) -> None:
    """Print what a plan would write, and what that takes; of other names all, if ``verbose``."""
    rows = [(shard.path, str(len(shard.tensors)), show_bytes(shard.nbytes)) for shard in plan.files]
    rows += [(name, "", show_bytes(len(content))) for name, content in plan.texts]
    show_commits(plan.source.path)
    echo(f"Would write into {plan.target.folder}:\n")
    show_table(("file", "tensors", "size"), rows)
    echo()
    if plan.copied:
        echo(printable(f"Would carry over {_carried(plan)}."))
    for name in plan.removed:
        echo(printable(f"Would remove {name}"))
    _show_renamed(plan, None if verbose else _LISTED)
    _show_remarks(plan, every=True)
    nbytes = plan.nbytes + _carried_nbytes(plan)
    where = ""
    if needs.free_nbytes is not None:
        room = f"{'only ' if nbytes > needs.free_nbytes else ''}{show_bytes(needs.free_nbytes)} free"
        where = f"{show_bytes(nbytes)} of disk ({room}) and "
    echo(f"Takes {where}about {show_bytes(needs.memory_nbytes)} of memory.")
    for traffic, verb, place in ((needs.read, "Reads", plan.source.path), (needs.sent, "Sends", plan.target.folder)):
        if traffic is not None:
            what = f"{show_bytes(traffic.nbytes)} {'from' if verb == 'Reads' else 'to'} {place}"
            more = " and those for headers" if verb == "Reads" else ""
            echo(printable(f"{verb} {what}, in about {traffic.requests:,} requests{more}."))
    if needs.seconds is None:
        echo(f"Runs on {needs.workers}.")
        return
    seconds = show_seconds(needs.seconds)
    echo(f"Runs on {needs.workers}: {seconds} of work for one of them, and what the disk takes to write.")


def show_result(result: Result, peak_nbytes: int, verbose: bool, is_alone: bool = True) -> None:
    """Print what was written and how fast; how to load it, where that ``is_alone``, and not one of many."""
    plan = result.plan
    if plan is None:
        echo("An earlier run had been stopped while it published its files; that is finished now.")
        return
    if not plan.sets or plan.is_there:
        echo(printable(f"Up to date: {_written_to(plan)} is as it would be."))
        return
    show_commits(plan.source.path)
    show_table(("component", "source", "", "output", "tensors", "size"), map(_row_of, plan.sets))
    echo()
    if verbose:
        for name in [*(shard.path for shard in plan.files), *(name for name, _ in (*plan.texts, *plan.copied))]:
            echo(f"wrote {printable(name)}")
    _show_renamed(plan, None if verbose else 0)
    _show_remarks(plan, verbose)
    for name in plan.removed:
        echo(printable(f"Removed {name}"))
    if result.too_large:
        became = "infinite" if plan.on_overflow == "inf" else "the largest that there is"
        total = sum(result.too_large.values())
        echo(printable(f"Too large, and now {became}: {total:,} values of {name_counts(result.too_large)}"))
    if plan.copied:
        echo(printable(f"Carried over {_carried(plan)}."))
    if result.reused_nbytes:
        echo(f"Took up {show_bytes(result.reused_nbytes)} that an earlier run had left.")
        if plan.target.folder.store.is_far:
            echo(
                "If that was killed, parts of files may lie there unseen: docs/remote.rst says how a bucket drops them."
            )
    echo(_how_it_went(result, peak_nbytes))
    if result.left_over:
        echo(printable(f"Left over: {result.left_over}."))
    if is_alone:
        _show_next(plan, result.told)


def _show_next(plan: Plan, told: str) -> None:
    """Say where what was written can be seen, and how it is loaded."""
    if told:
        echo(printable(f"See {told}"))
    lines = loading_lines(plan)
    if told and not lines:
        return
    target = plan.target.folder
    if plan.source.kind == "file" and len(plan.files) == 1:
        target = target / plan.files[0].path
    echo("\nLoad it with:\n" if lines else "\nLook at it with:\n")
    for line in lines or [f"wconv inspect {shlex.quote(str(target))}"]:
        echo(f"    {printable(line)}")


def _row_of(planned: PlannedSet) -> tuple[str, ...]:
    output = f"{len(planned.files)} files" if len(planned.files) > 1 else planned.name.single
    count = f"{planned.tensor_count:,}" if planned.tensor_count else ""
    source = planned.source
    is_one = source.index_name or source.is_of_many or len(source.file_names) == 1
    read = source.label if is_one else f"{len(source.file_names)} files"
    return planned.component or ".", read, "->", output, count, show_bytes(planned.nbytes)


def _carried(plan: Plan) -> str:
    names = [name for name, _ in plan.copied]
    files = f"{len(names)} other file{'s' * (len(names) != 1)}"
    return f"{files}, {show_bytes(_carried_nbytes(plan))}: {name_some(names, _NAMED)}"


def _carried_nbytes(plan: Plan) -> int:
    # A link that is made again as it reads may lead to nothing by then.
    return sum(info.nbytes for _, file in plan.copied if (info := file.place.info()))


def _how_it_went(result: Result, peak_nbytes: int) -> str:
    assert result.plan is not None
    written = result.plan.written_nbytes
    linked = result.plan.nbytes - written
    if not written:
        return f"Renamed {show_bytes(linked)} of weights in {result.plan.target.folder}; none were written."
    rate = show_bytes(written / max(result.seconds, 1e-3))
    kept = f", kept {show_bytes(linked)} as they were" if linked else ""
    checked = ", every value compared with the source" if result.verified else ""
    return (
        f"Wrote {show_bytes(written)} to {_written_to(result.plan)}{kept} in {result.seconds:.1f} s ({rate}/s) "
        f"with {show_bytes(peak_nbytes)} of memory{checked}."
    )


def _written_to(plan: Plan) -> Place:
    """Give where output lies: the folder, or the one file if nothing else comes of a file."""
    names = [*(file.path for file in plan.files), *(name for name, _ in (*plan.texts, *plan.copied))]
    return plan.target.folder / names[0] if plan.source.kind == "file" and len(names) == 1 else plan.target.folder


def _show_renamed(plan: Plan, most: int | None) -> None:
    """Say which tensors get other names: those that differ in numbers alone as one, and so many at most; None: all."""
    for planned in plan.sets:
        if not planned.renamed:
            continue
        pairs = [f"{old} -> {new}" for old, new in planned.renamed.items()]
        told = pairs if most is None else list(fold_modules(pairs)) if most else []
        hint = " (-v lists them)" if most == 0 else ""
        echo(printable(f"Renamed in {planned.source.label}: {_tensors(len(pairs))}{hint}"))
        for line in told[:most]:
            echo(printable(f"    {line}"))
        if most and len(told) > most:
            echo(f"    and {len(told) - most:,} more (-v lists them)")


def _tensors(count: int) -> str:
    return f"{count:,} tensor{'s' * (count != 1)}"


def _show_remarks(plan: Plan, every: bool) -> None:
    for planned in plan.sets:
        how = "under both names" if planned.name.format == "torch" else "and noted in the header"
        for dropped, kept in planned.ties.items():
            echo(printable(f"Tied: {dropped} is {kept}, written once {how}"))
        for dtype in dict.fromkeys(planned.kept.values()):
            names = [name for name, other in planned.kept.items() if other is dtype]
            told = names if len(names) <= _LISTED else list(fold_modules(names))
            listed = ", ".join(map(printable, told if every else told[:3]))
            more = "" if every or len(told) <= 3 else ", ... (-v lists them)"
            echo(f"Kept in {dtype.short_name} in {printable(planned.source.label)}: {len(names):,} ({listed}{more})")
        for note in planned.notes:
            echo(printable(f"Note: {note}"))
    for note in plan.notes:
        echo(printable(f"Note: {note}"))

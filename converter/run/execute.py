"""Carries out a Plan: pieces of files as tasks of any ``concurrent.futures.Executor``, then checks, then publishes.

The tasks are plain functions of picklable values, so threads, processes and the executors of other engines will do.
They go in turn over the files: threads that write one file wait for each other.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TypeVar

from converter.errors import BadFile, OutputRefused, WconvError
from converter.formats import WRITERS, read_file
from converter.plan.types import Plan, PlannedFile
from converter.run.journal import Changes
from converter.run.parts import (
    MismatchError,
    Piece,
    Report,
    WrittenCrc,
    check_record,
    combine,
    compare_piece,
    cut_pieces,
    find_unread,
    rewrite_piece,
    too_large_error,
    try_piece,
    write_piece,
)
from converter.run.tasks import DEFAULT_MEMORY_NBYTES, Call, Progress, Tasks, open_tasks
from converter.run.transaction import Transaction, begin
from converter.run.upload import upload_plan
from converter.run.workers.sight import check_workers
from converter.storage import Place, hold_same
from converter.storage.local import open_staged
from converter.tensors.base import Storage
from converter.tensors.reader import Sums, are_far

_T = TypeVar("_T")
# Tasks of one file at once, those included that wait for a worker: more were not faster on 16 cores.
_COPIERS = 2
_CASTERS = 6
_PARSED_NBYTES = 4_000_000  # of a header: one of 10 MB takes 80 to be parsed again. No shard that is known has as much


@dataclass(frozen=True, slots=True)
class Result:
    """What a run did. ``reused_nbytes`` lay there from an earlier run that was killed; ``seconds`` is wall time.

    ``plan`` is None where that earlier run had only its last renames left. ``left_over`` names what could not be
    cleared up, ``told`` is what a store says of what it has taken, ``too_large`` how many values of which tensors a
    cast could not hold.
    """

    plan: Plan | None
    seconds: float
    reused_nbytes: int = 0
    verified: bool = False
    left_over: str = ""
    told: str = ""
    too_large: Mapping[str, int] = field(default_factory=dict)


def run_plan(
    plan: Plan,
    executor: Executor | str | None = None,
    *,
    workers: int | None = None,
    memory_nbytes: int = DEFAULT_MEMORY_NBYTES,
    verify: bool = False,
    progress: Progress | None = None,
    request: str = "",
    keep: bool = False,
) -> Result:
    """Write what a plan says; all of it is there afterwards, or nothing. With ``keep``, ``undo`` can put all back.

    ``verify`` reads every byte back and holds it against the source before anything is published; a plan that removes
    or replaces what it reads always does. Where all of it is there already, it is read back and compared, and nothing
    is written. An ``executor``, or a text as ``--executor`` takes it, is of workers that see the same disk; ``workers``
    is their number, if it does not tell. Where they may be on other machines a task is a whole file, and the memory a
    worker's. Raises BadFile for a source that is damaged or changes, OutputRefused and SystemRefused.
    """
    begun = time.perf_counter()
    verify = verify or plan.destroys_source
    if plan.target.folder.store.is_far:
        with open_tasks(executor, workers, memory_nbytes, progress) as tasks:
            return _run_far(plan, tasks, request, verify, begun)
    if plan.is_there:
        with open_tasks(executor, workers, memory_nbytes, progress) as tasks:
            check_workers(tasks.workers, _storages(plan.files), None)
            _check_output(plan, tasks)
        return Result(plan, time.perf_counter() - begun, verified=True)
    with begin(plan.target, request) as output, open_tasks(executor, workers, memory_nbytes, progress) as tasks:
        output.expect(*_expected(plan), plan.removed_sources)
        check_workers(tasks.workers, _storages(plan.files), output.staged(""))
        reused, too_large = _write_files(plan, output, tasks)
        for planned in plan.written:
            check_staged(planned, output.staged(planned.path))
        if verify:
            _compare(plan, output.staged, tasks)
        _write_others(plan, output)
        _check_sources(plan)
        for name, source in _second_names(plan):  # only now: they change what a file's stamp says
            output.link(name, source)
        output.commit(Changes.of(plan, keep), request)
    return Result(plan, time.perf_counter() - begun, reused, verify, output.left_over, too_large=too_large)


def _run_far(plan: Plan, tasks: Tasks, request: str, verify: bool, begun: float) -> Result:
    """Write what a plan says into a store that is far, or look whether all of it is there."""
    folder = plan.target.folder
    check_workers(tasks.workers, _storages(plan.files), None if plan.is_there else folder)
    if plan.is_there:
        if verify or not folder.store.keeps_notes:
            _check_output(plan, tasks)
        return Result(plan, time.perf_counter() - begun, verified=True)
    reused, too_large, told = upload_plan(plan, tasks, request, verify)
    return Result(plan, time.perf_counter() - begun, reused, verify, too_large=too_large, told=told)


def guess_seconds(plan: Plan) -> float:
    """Say how long one worker would take, without what writing takes: by a trial with some of the largest file."""
    largest = max(plan.written, key=lambda planned: planned.nbytes, default=None)
    pieces = list(itertools.islice(cut_pieces(largest, plan.target.folder / largest.path), 2)) if largest else []
    seconds = 0.0
    for piece in pieces:  # for the first, what casts has to be loaded as well
        begun = time.perf_counter()
        try_piece(piece)
        seconds = (time.perf_counter() - begun) / piece.nbytes
    return seconds * plan.written_nbytes


def reads_far(plan: Plan) -> bool:
    """Say whether a plan reads anything over a network."""
    return are_far(tensor.source for planned in plan.written for tensor, _ in planned.tensors)


def _most_writers(plan: Plan, is_crowded: bool) -> int | None:
    """Say how many tasks may write at once: those of one file wait for each other, and use up a core while they do.

    Those that read over a network wait for that.
    """
    if reads_far(plan):
        return None
    copiers = _COPIERS if is_crowded else 1
    return sum(_CASTERS if planned.computes else copiers for planned in plan.written)


def _call(function: Callable[[Piece, int], _T], piece: Piece) -> Call[Piece, _T]:
    return Call(function, piece, piece.nbytes, piece.place.name)


def _expected(plan: Plan) -> tuple[dict[str, int], dict[str, int]]:
    """Give the bytes of files that are written in parts, and of all others; second names take none."""
    parts = {planned.path: planned.nbytes for planned in plan.written}
    others = {planned.path: 0 for planned in plan.files if planned.link is not None}
    others |= {name: info.nbytes if (info := file.place.info()) else 0 for name, file in plan.copied}
    return parts, others | {name: len(content) for name, content in plan.texts}


def _write_files(plan: Plan, output: Transaction, tasks: Tasks) -> tuple[int, Counter[str]]:
    """Stage what is written; give the bytes that an earlier run had left, and what was too large for a cast."""
    writers: dict[Place, Callable[[Piece, int], Report]] = {}
    reused = 0
    for planned in plan.written:
        taken_up = output.prepare(planned.path, planned.header, planned.nbytes)
        writers[output.staged(planned.path)] = rewrite_piece if taken_up else write_piece
        reused += planned.nbytes if taken_up else 0
    sums = Sums()
    written: dict[tuple[Place, int], list[WrittenCrc]] = defaultdict(list)
    too_large: Counter[str] = Counter()
    # Whether several workers write into one file at once.
    is_crowded = not tasks.workers.are_far and len(plan.written) < tasks.workers.count
    pieces = (replace(piece, is_crowded=is_crowded) for piece in _pieces(plan, output.staged, tasks))
    calls = (_call(writers[piece.place], piece) for piece in pieces)
    for report in tasks.run(calls, plan.window, _most_writers(plan, is_crowded)):
        too_large += report.too_large
        sums.checked += report.read.checked
        sums.parts += report.read.parts
        for part in report.written:
            written[part.place, part.offset].append(part)
    if too_large and plan.on_overflow == "error":
        raise too_large_error(plan.source.path, plan.files, too_large)
    unread = find_unread(plan.written, sums)
    tasks.finish(Call(check_record, record, 0, str(record.file.place)) for record in unread)
    for planned in plan.written:
        frame = WRITERS[planned.format].frame
        if frame is not None:
            staged = output.staged(planned.path)
            crcs = [combine(written[staged, offset])[0] for _, offset in planned.tensors]
            with open_staged(staged) as file:
                for offset, raw in frame(planned.specs, planned.ties, crcs):
                    file.write(offset, memoryview(raw))
    return reused, too_large


def _storages(files: Iterable[PlannedFile]) -> Iterator[Storage]:
    return (storage for file in files for tensor, _ in file.tensors for storage in tensor.source.inputs())


def _pieces(plan: Plan, place_for: Callable[[str], Place], tasks: Tasks) -> Iterator[Piece]:
    """Take a piece of each file in turn, as it lies at a place; for workers that are far a file is one."""

    def cut(planned: PlannedFile) -> Iterator[Piece]:
        place = place_for(planned.path)
        return cut_pieces(planned, place, planned.nbytes) if tasks.workers.are_far else cut_pieces(planned, place)

    rows = list(map(cut, plan.written))
    while rows:
        for row in list(rows):
            piece = next(row, None)
            if piece is None:
                rows.remove(row)
            else:
                yield piece


def _compare(plan: Plan, place_for: Callable[[str], Place], tasks: Tasks) -> None:
    """Hold files that were written against their source; raises MismatchError where they differ."""
    tasks.finish((_call(compare_piece, piece) for piece in _pieces(plan, place_for, tasks)), plan.window)


def _check_output(plan: Plan, tasks: Tasks) -> None:
    """Raise OutputRefused where what is there holds something else than what would be written."""
    folder = plan.target.folder
    problem = "exists, and is not what would be written"
    advice = "Use --overwrite to write it again, or -o for a new folder."
    try:
        _compare(plan, folder.__truediv__, tasks)
    except MismatchError as error:
        raise OutputRefused(error.where, f"{problem}: other values near tensor {error.tensor!r}", advice) from None
    for name, file in plan.copied:
        if not hold_same(file.place, folder / name):
            raise OutputRefused(folder / name, problem, advice)


def _check_sources(plan: Plan) -> None:
    """Look a last time whether a source was changed while it was read."""
    for file in {storage.file for storage in _storages(plan.files)}:
        file.open().close()


def _write_others(plan: Plan, output: Transaction) -> None:
    renamed = {name for name, _ in _second_names(plan)}
    for name, source in plan.copied:
        if name not in renamed:
            with closing(source.open()) as file:
                output.copy(name, file)
                file.check()
    for name, content in plan.texts:
        output.put(name, content)


def _second_names(plan: Plan) -> list[tuple[str, Place]]:
    """Give the files that keep their content and get another name, or the same, in the folder that they are in.

    A link among them is made again as it reads.
    """
    names = [(file.path, file.link) for file in plan.files if file.link is not None]
    copied = ((name, file.place) for name, file in plan.copied)
    return names + [(name, place) for name, place in copied if place.parent == (plan.target.folder / name).parent]


def check_staged(planned: PlannedFile, staged: Place) -> None:
    """Read a staged file again and hold it against the plan; raises WconvError for a bug of ours."""
    try:
        with staged.open() as file:
            is_planned = file.read(0, len(planned.header)) == planned.header
        # The reader is as strict as the reference reader of a format: names, dtypes, shapes and places are right.
        if is_planned and len(planned.header) <= _PARSED_NBYTES:
            tensors = read_file(staged).tensors
            found = [one.spec for one in tensors if one.name not in planned.ties]
            is_planned = found == planned.specs
    except BadFile as error:
        problem = f"was written wrongly ({error})"
        raise WconvError(staged, problem, "This is a bug in wconv: please report it.") from error
    if not is_planned:
        raise WconvError(staged, "does not hold what was planned", "This is a bug in wconv: please report it.")

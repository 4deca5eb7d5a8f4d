"""Several sources of one command: where each one's output goes, and what becomes of all where some fail."""

from __future__ import annotations

import gc
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import click

from converter.cli import code_of, tell_error
from converter.cli.convert import Options, run_conversion, take_run
from converter.cli.terminal import JsonList, echo, printable
from converter.errors import BadFile, BadRequest, OutputExists
from converter.models.names import Format, name_of_other, parse_name
from converter.recipes.request import names_file
from converter.storage import Place


def run_conversions(sources: Sequence[Place], options: Options, **fixed: Any) -> int:
    """Carry out what is asked of each source, as ``run_conversion`` does; the rest is as in ``run_each``."""
    return run_each(sources, options, partial(run_conversion, **fixed), fixed.get("format", "safetensors"))


def run_each(
    sources: Sequence[Place],
    options: Options,
    run_one: Callable[[Place, Options], object],
    form: Format | None = "safetensors",
) -> int:
    """Do the same with each source, and give the exit code: the highest, where it goes on after an error.

    Of several each gives a file or a folder by its own name in the output; ``form`` is the format of what is written,
    None for the source's own. Raises BadRequest, before anything is done, where two would come to one place; and the
    first error, unless it is to go on, or to skip output that is there.
    """
    if len(sources) == 1:
        _run_or_skip(sources[0], options, run_one)
        return 0
    jobs = _outputs_of(sources, options, form)
    del sources  # what was seen of a store elsewhere goes with each
    run = take_run(dict(options))
    counts: Counter[str] = Counter()
    worst, total = 0, len(jobs)
    with JsonList.opened(run.as_json) as results:
        while jobs:
            source, output = jobs.popleft()
            own = {**options, "output": output, "of_many": results}
            if run.is_told:
                echo(f"{'' if total == len(jobs) + 1 else chr(10)}{source}:")
            try:
                counts[_run_or_skip(source, own, run_one)] += 1
            except (click.Abort, click.ClickException):
                raise
            except Exception as error:
                code = code_of(error)
                results.add({"source": str(source), "error": str(error), "exit_code": code})
                if not run.keep_going:
                    raise
                worst = max(worst, tell_error(error))
                counts["failed"] += 1
            gc.collect(1)  # of what this source made; nobody does otherwise, and there may be thousands
    if run.is_told:
        echo(_summary(counts, total, run.dry_run))
    return worst


def _summary(counts: Mapping[str, int], total: int, dry_run: bool) -> str:
    """Say what became of several sources."""
    done = f"{counts['done']:,} of {total:,} {'would be ' if dry_run else ''}converted"
    others = ((counts["skipped"], "there already"), (counts["failed"], "failed"))
    return "\n" + "; ".join([done, *(f"{count:,} {what}" for count, what in others if count)]) + "."


def _run_or_skip(source: Place, options: Options, run_one: Callable[[Place, Options], object]) -> str:
    """Do it for a source and give ``done``; or ``skipped`` where its output is there, and that is asked for."""
    run, skips = take_run(dict(options)), options.get("skip_existing")
    try:
        run_one(source, dict(options))
    except OutputExists as refused:
        if not skips:
            raise
        if run.as_json:
            run.show_json({"source": str(source), "skipped": str(refused.where)})
        elif run.is_told:
            echo(printable(f"Skipped: {refused.where} is there already."))
        return "skipped"
    return "done"


def _outputs_of(sources: Sequence[Place], options: Options, form: Format | None) -> deque[tuple[Place, Place | None]]:
    """Give each source with its output. Raises BadRequest where one is named twice, or two would come to one place."""
    output = options.get("output")
    if output is not None and names_file(output):
        problem = f"is a file name, and there are {len(sources):,} sources"
        raise BadRequest(output, problem, "Name a folder, in which each gets a place of its own.")
    jobs: deque[tuple[Place, Place | None]] = deque()
    seen: dict[str, Place] = {}
    taken: dict[tuple[str, str], Place] = {}
    is_tagged = bool(options.get("variant") or options.get("dtype"))
    if not options.get("keep_going"):
        for source in sources:
            if not source.exists():
                raise BadFile(source, "does not exist", "Check the path; where to write to is -o OUT.")
    for source in sources:
        first = seen.setdefault(str(source.real()), source)
        if first is not source:
            raise BadRequest(source, f"is named twice{'' if first == source else f', as {first} too'}", "Name it once.")
        is_folder = source.is_folder()
        name = _name_of(source) if is_folder else _file_of(source, form, is_tagged)
        around = output if output is not None else source if is_folder else source.parent
        assert around is not None
        place = (str(around.real()), name if output is not None or not is_folder else "")
        first = taken.setdefault(place, source)
        if first is not source:
            there = around / name
            raise BadRequest(source, f"would become {there}, as {first} would", "Convert them one by one.")
        jobs.append((source, output / name if output is not None and is_folder else output))
    if output is None:
        _refuse_nested(seen)
    else:
        _refuse_inside(output, seen)
    return jobs


def _name_of(folder: Place) -> str:
    """Give the name of a folder. Raises BadRequest for one that has none, or that of a weight file."""
    name = folder.real().name or folder.store.loaders_name.rpartition("/")[2]
    if not name or parse_name(name):
        what = "has the name of a weight file" if name else "has no name"
        raise BadRequest(folder, f"is a folder that {what}", "Convert it by itself.")
    return name


def _file_of(source: Place, form: Format | None, is_tagged: bool) -> str:
    """Give the name of what a file becomes; where it gets a tag, without any."""
    parsed = parse_name(source.name)
    name = (parsed.name if parsed else name_of_other(source.name)).in_format(form)
    return replace(name, variant=None if is_tagged else name.variant).single


def _refuse_inside(output: Place, places: Mapping[str, Place]) -> None:
    """Raise BadRequest for an output in a source, as the globbed names beside it may give: others would change that."""
    real = output.real()
    for folder in (real, *real.parents):
        source = places.get(str(folder))
        if source is not None:
            what = "is" if folder == real else "lies in"
            raise BadRequest(output, f"{what} {source}, which is a source", "Name a folder elsewhere, or leave it out.")


def _refuse_nested(places: Mapping[str, Place]) -> None:
    """Raise BadRequest for a source in another one, beside whose weights both would be written."""
    for real, source in places.items():
        for folder in source.real().parents:
            other = places.get(str(folder))
            if other is not None and str(folder) != real:
                raise BadRequest(source, f"lies in {other}, which is named too", "Name one of the two.")

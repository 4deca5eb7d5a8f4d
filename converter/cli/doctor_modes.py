"""What ``wconv doctor`` does, a function a mode: show what is found, fix it, undo that, or purge what is kept for it.

Each gives the exit code; where a folder can be mended in several ways, a user at a terminal is asked.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

import click

from converter.cli.terminal import echo, open_meter, printable, show_bytes, show_commits, show_json, show_table
from converter.doctor import Diagnosis, Finding, Mending, diagnose, finish_mending, mend, plan_mending
from converter.doctor.findings import SEVERITIES
from converter.doctor.goals import Choices, Keep
from converter.doctor.undo import Undone
from converter.doctor.undo import purge as purge_kept
from converter.doctor.undo import undo as put_back
from converter.libraries.coreml import Lack
from converter.libraries.predict import Loader, Prediction, list_folder, predict_all, variants_in
from converter.models.hub_cache import refuse_cache
from converter.recipes.prepare_coreml import find_lacks
from converter.storage import UNLISTED, Place


@dataclass(frozen=True, slots=True)
class Asked:
    """What the options ask: which folder, what to look at, how to mend it, and what to print."""

    source: Place
    choices: Choices
    loader: Loader | None
    variant: str | None
    deep: bool
    dry_run: bool
    as_json: bool
    quiet: bool
    verbose: bool

    @property
    def is_of_fixing(self) -> bool:
        """Whether anything is asked that only a mending can do."""
        return self.dry_run or self.choices != Choices()

    @property
    def is_told(self) -> bool:
        """Whether people are told what is done."""
        return not (self.quiet or self.as_json)


def asked_of(source: Place, **options: Any) -> Asked:
    """Sort the options; one that belongs nowhere is a TypeError."""
    choices = Choices(**{field.name: options.pop(field.name) for field in fields(Choices)})
    return Asked(source, choices, **options)


def show(asked: Asked) -> int:
    """Say what is wrong with a folder."""
    return _report(asked, diagnose(asked.source, deep=asked.deep))


def fix(asked: Asked) -> int:
    """Mend a folder, or say how, and what is wrong with it afterwards."""
    refuse_cache(asked.source)
    if not asked.dry_run and finish_mending(asked.source) and asked.is_told:
        echo("An earlier run had been stopped while it published its files; that is finished now.\n")
    diagnosis = diagnose(asked.source, deep=asked.deep)
    if diagnosis.is_healthy and asked.choices == Choices():
        return _report(asked, diagnosis)
    choices = asked.choices
    if sys.stdin.isatty() and asked.is_told and not asked.dry_run:
        choices = _ask(diagnosis, choices)
    mending = plan_mending(diagnosis.inventory, diagnosis.findings, choices)
    if asked.is_told:
        _show_mending(mending, asked.dry_run)
    if mending.plan and not asked.dry_run:
        _mend(asked, mending)
        diagnosis = diagnose(asked.source, deep=asked.deep)
    return _report(asked, diagnosis, mending)


def undo(asked: Asked) -> int:
    """Put a mended folder back as it was."""
    refuse_cache(asked.source)
    done = put_back(asked.source)
    return _tell(asked, done, f"Put {done.files} files back.")


def purge(asked: Asked) -> int:
    """Remove what mendings have kept."""
    refuse_cache(asked.source)
    done = purge_kept(asked.source)
    return _tell(asked, done, f"Removed {show_bytes(done.nbytes)}.")


def _tell(asked: Asked, done: Undone, what: str) -> int:
    if not asked.quiet:
        echo(what)
    if done.left_over:
        echo(printable(f"Left over: {done.left_over}."))
    return 0


# Mending.


def _ask(diagnosis: Diagnosis, choices: Choices) -> Choices:
    """Ask on a terminal where there are several ways, and none was chosen."""
    codes = {finding.code for finding in diagnosis.findings}
    if choices.keep is None and codes & {"sets-twice", "forms-differ"}:
        ways = get_args(Keep)[:2] if "sets-twice" in codes else get_args(Keep)[2:]
        question = "Two sets of one variant: keep which?"
        answer = click.prompt(question, type=click.Choice([*ways, "neither"]), default="neither", err=True)
        choices = replace(choices, keep=None if answer == "neither" else answer)
    if codes & {"variant-single", "variant-partial"} and not (choices.keep_default or choices.only_variant):
        tags = {printable(tag): tag for tag in diagnosis.inventory.variants if tag}
        question = "Untagged weights and variants do not fit: add what is missing, or keep just one?"
        answer = click.prompt(question, type=click.Choice(("add", "default", *tags)), default="add", err=True)
        if answer == "default":
            choices = replace(choices, keep_default=True)
        elif answer in tags:
            choices = replace(choices, only_variant=tags[answer])
    return choices


def _show_mending(mending: Mending, dry_run: bool) -> None:
    if mending.refused:
        echo(printable(f"Nothing is touched while data are missing: {mending.refused}.") + "\n")
    elif not mending.plan:
        echo("There is nothing here that --fix can mend.\n")
    else:
        echo("Would do:\n" if dry_run else "Mending:\n")
        for step in mending.steps:
            echo(printable(f"  {step}"))
        echo(f"\n{'Would write' if dry_run else 'Writes'} {show_bytes(mending.plan.written_nbytes)}.\n")


def _mend(asked: Asked, mending: Mending) -> None:
    assert mending.plan is not None
    total = mending.plan.nbytes * (2 if mending.plan.destroys_source else 1)
    with open_meter(total, "mending", not asked.is_told) as meter:
        left_over = mend(asked.source, mending, progress=meter)
    if asked.is_told:
        echo("What was replaced is kept: --undo puts it back, --purge removes it.\n")
    if left_over:
        click.echo(printable(f"Left over: {left_over}."), err=True)


# What is found.


def _report(asked: Asked, diagnosis: Diagnosis, mending: Mending | None = None) -> int:
    inventory = diagnosis.inventory
    is_later = mending is not None and asked.dry_run
    predicted = _predict(asked, diagnosis, mending)
    lacks = list(find_lacks(inventory.path, inventory)) if asked.loader == "coreml" else []
    if asked.as_json:
        show_json(_as_json(asked, diagnosis, mending, predicted, lacks))
    elif not asked.quiet:
        if not is_later:
            _show(diagnosis, asked.verbose)
        _show_predictions(predicted, is_later)
        for lack in lacks:
            echo(printable(f"    lacks {lack.path.relative_to(inventory.path)}: {lack.problem}. {lack.advice}"))
    return 0 if diagnosis.is_healthy and not lacks and all(one.works for one in predicted) else 1


def _predict(asked: Asked, diagnosis: Diagnosis, mending: Mending | None) -> list[Prediction]:
    """Say what loaders would open, where that is asked or something changes; of a dry run, what they would then."""
    if asked.loader is None and asked.variant is None and mending is None:
        return []
    variants = None if asked.variant is None else (None if asked.variant == "none" else asked.variant,)
    if mending is not None and asked.dry_run:
        return predict_all(mending.after, variants_in(mending.after), asked.loader, variants)
    inventory = diagnosis.inventory
    return predict_all(list_folder(inventory), inventory.variants, asked.loader, variants)


def _show(diagnosis: Diagnosis, verbose: bool) -> None:
    root = diagnosis.inventory.path
    show_commits(root)
    _show_sets(diagnosis)
    shown = [finding for finding in diagnosis.findings if verbose or finding.severity != "note"]
    for finding in shown:
        where = finding.path.relative_to(root)
        echo(printable(f"{finding.severity} {finding.code}: {where if where != '.' else root}"))
        echo(printable(f"    {finding.problem}."))
        for text in filter(None, (finding.kind.effect, finding.kind.mending)):
            echo(click.wrap_text(text, 96, "    ", "    "))
    if not root.store.lists_all:
        echo(f"note: {UNLISTED} looked at")
    hint = " (-v shows notes)" if len(shown) < len(diagnosis.findings) else ""
    echo(("\n" if shown else "") + _sum_up(diagnosis) + hint + ".")
    if shown and root.store.is_far:
        echo("--fix is for folders of this machine: convert to a new place (-o NEW), or propose weights with --pr.")


def _show_sets(diagnosis: Diagnosis) -> None:
    rows = []
    for part in diagnosis.inventory.parts:
        for one in part.sets:
            headers = part.headers_of(one)
            dtypes = dict.fromkeys(dtype.tag for header in headers for dtype in header.dtypes)
            files = str(len(one.file_names) + len(one.pieces)) + (" + index" if one.index_name else "")
            size = show_bytes(sum(header.tensor_nbytes if one.is_of_many else header.nbytes for header in headers))
            rows.append((part.name or ".", one.name.variant or "-", one.format, files, size, ", ".join(dtypes) or "-"))
    show_table(("component", "variant", "format", "files", "size", "dtypes"), rows)
    echo()


def _sum_up(diagnosis: Diagnosis) -> str:
    counts = [(name, sum(finding.severity == name for finding in diagnosis.findings)) for name in SEVERITIES]
    said = ", ".join(f"{count} {name}{'s' * (count != 1)}" for name, count in counts if count)
    return said if not diagnosis.is_healthy else f"Healthy: {said}" if said else "Healthy"


def _show_predictions(predictions: list[Prediction], is_later: bool) -> None:
    for one in predictions:
        asked = f"variant={one.variant!r}" if one.variant else "no variant"
        what = f"fails: {one.failure}" if one.failure else "would then open:" if is_later else "opens:"
        echo()
        echo(printable(f"{one.loader} ({one.versions}), asked for {asked}, {what}"))
        for pick in one.picks:
            what = printable(f"fails: {pick.failure}") if pick.failure else ", ".join(map(printable, pick.files))
            echo(f"    {printable(pick.component or '.')}: {what}")
        if one.warning:
            echo(printable(f"    It warns of {one.warning}."))


# For programs.


def _as_json(
    asked: Asked, diagnosis: Diagnosis, mending: Mending | None, predicted: list[Prediction], lacks: list[Lack]
) -> dict[str, Any]:
    content: dict[str, Any] = {
        "path": str(diagnosis.inventory.path),
        **({"commit": commit} if (commit := diagnosis.inventory.path.store.commit_id) else {}),
        "healthy": diagnosis.is_healthy,
        "findings": [_finding_as_json(finding) for finding in diagnosis.findings],
    }
    if mending:
        content["fix"] = {"steps": list(mending.steps), "refused": mending.refused, "dry_run": asked.dry_run}
    content["loads"] = [_loads_as_json(one) for one in predicted]
    content["lacks"] = [{"path": str(lack.path), "problem": lack.problem, "advice": lack.advice} for lack in lacks]
    return content


def _finding_as_json(finding: Finding) -> dict[str, Any]:
    return {
        "code": finding.code,
        "severity": finding.severity,
        "path": str(finding.path),
        "component": finding.component,
        "problem": finding.problem,
        "effect": finding.kind.effect,
        "mending": finding.kind.mending,
    }


def _loads_as_json(one: Prediction) -> dict[str, Any]:
    return {
        "loader": one.loader,
        "versions": one.versions,
        "variant": one.variant,
        "works": one.works,
        "failure": one.failure,
        "warning": one.warning,
        "parts": {pick.component: {"files": list(pick.files), "failure": pick.failure} for pick in one.picks},
    }

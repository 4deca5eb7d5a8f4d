"""``wconv doctor``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import click

from converter.cli.options import output_options, source_arg

if TYPE_CHECKING:
    from converter.doctor import Diagnosis
    from converter.doctor.goals import Choices
    from converter.doctor.repair import Mending
    from converter.libraries.base import FolderListing
    from converter.libraries.coreml import Lack
    from converter.libraries.predict import Prediction
    from converter.storage import Place


@click.command("doctor", short_help="Say what is wrong with a folder of weights, and mend it.")
@source_arg
@click.option(
    "--loader",
    type=click.Choice(["diffusers", "diffusers-hub", "transformers", "coreml"]),
    help="Say which files this loader would open.",
)
@click.option("--variant", metavar="TAG|none", help="... when it is asked for this variant (default: each).")
@click.option("--deep", is_flag=True, help="Read all values too: NaN, infinite, all zero, the same twice; and shapes.")
@click.option("--fix", is_flag=True, help="Mend what can be mended; what is replaced is kept beside the folder.")
@click.option("--undo", is_flag=True, help="Put everything back as it was before --fix.")
@click.option("--purge", is_flag=True, help="Remove what --fix has kept.")
@click.option("--keep-default", is_flag=True, help="With --fix: keep the untagged weights, move all variants away.")
@click.option("--only-variant", metavar="TAG", help="With --fix: keep this variant, move all else away.")
@click.option("--make-variant", metavar="TAG", help="With --fix: cast this variant, such as fp16, where it is missing.")
@click.option(
    "--keep",
    type=click.Choice(["single", "shards", "safetensors", "bin"]),
    help="With --fix: of two sets of one variant keep this one.",
)
@click.option(
    "--drop-strays", is_flag=True, help="With --fix: move shards that no index names away, whatever they hold."
)
@click.option("--dry-run", is_flag=True, help="With --fix: print what would be done, and do nothing.")
@output_options
def command(
    source: Path, loader: str | None, variant: str | None, deep: bool, fix: bool, undo: bool, purge: bool,
    keep_default: bool, only_variant: str | None, make_variant: str | None, keep: str | None, drop_strays: bool,
    dry_run: bool, as_json: bool, quiet: bool, verbose: bool,
) -> int:  # fmt: skip
    """Say what is wrong with the weights in folder SRC, what loaders make of it, and how to mend it.

    Reads names, indexes and headers. Exit code 1 if there are errors or warnings, or if a loader that is shown fails.

    \b
    wconv doctor ./model --loader diffusers --variant fp16     which files would be opened?
    wconv doctor ./model --fix --dry-run                       how can it be mended?
    """
    from converter.cli.output import echo, printable, show_bytes, show_json
    from converter.doctor import diagnose, finish_mending
    from converter.doctor.goals import Choices, Keep
    from converter.models.hub_cache import refuse_cache
    from converter.storage import place_of

    choices = Choices(keep_default, only_variant, make_variant, cast("Keep | None", keep), drop_strays)
    if sum((fix, undo, purge)) > 1:
        raise click.UsageError("Choose one of --fix, --undo and --purge.")
    if not fix and (choices != Choices() or dry_run):
        raise click.UsageError("That goes with --fix.")
    if fix or undo or purge:
        refuse_cache(place_of(source))
    if undo or purge:
        from converter.doctor.undo import purge as purge_kept
        from converter.doctor.undo import undo as put_back

        done = put_back(source) if undo else purge_kept(source)
        if not quiet:
            echo(f"Put {done.files} files back." if undo else f"Removed {show_bytes(done.nbytes)}.")
        if done.left_over:
            echo(printable(f"Left over: {done.left_over}."))
        return 0
    if fix and not dry_run and finish_mending(source) and not (quiet or as_json):
        echo("An earlier run had been stopped while it published its files; that is finished now.\n")
    found = diagnose(source, deep=deep)
    content: dict[str, Any] = {}
    mending = None
    if fix and not found.is_fine(choices):
        mending = _fix(source, found, choices, dry_run, quiet or as_json)
        content["fix"] = {"steps": list(mending.steps), "refused": mending.refused, "dry_run": dry_run}
        if mending.plan and not dry_run:
            found = diagnose(source, deep=deep)
    listing = mending.after if mending and dry_run else None
    predicted = _predictions(listing, found, loader, variant, always=mending is not None)
    lacks = _lacks(found.inventory.path, found) if loader == "coreml" else []
    if as_json:
        content["loads"] = [_loads_as_json(one) for one in predicted]
        content["lacks"] = [{"path": str(lack.path), "problem": lack.problem, "advice": lack.advice} for lack in lacks]
        show_json({**_as_json(found), **content})
    elif not quiet:
        if not listing:
            _show(found, verbose)
        _show_predictions(predicted, listing is not None)
        for lack in lacks:
            where = lack.path.relative_to(found.inventory.path)
            echo(printable(f"    lacks {where}: {lack.problem}. {lack.advice}"))
    return 0 if found.is_healthy and not lacks and all(one.works for one in predicted) else 1


def _lacks(source: Place, found: Diagnosis) -> list[Lack]:
    from converter.recipes.prepare_coreml import find_lacks

    return list(find_lacks(source, found.inventory))


def _fix(source: Path, found: Diagnosis, choices: Choices, dry_run: bool, quiet: bool) -> Mending:
    from converter.cli.output import echo, open_meter, printable, show_bytes
    from converter.doctor import mend
    from converter.doctor.repair import plan_mending

    choices = _ask(found, choices) if sys.stdin.isatty() and not (quiet or dry_run) else choices
    mending = plan_mending(found.inventory, found.findings, choices)
    if not quiet:
        if mending.refused:
            echo(printable(f"Nothing is touched while data are missing: {mending.refused}.") + "\n")
        elif not mending.plan:
            echo("There is nothing here that --fix can mend.\n")
        else:
            echo("Would do:\n" if dry_run else "Mending:\n")
            for step in mending.steps:
                echo(printable(f"  {step}"))
            echo(f"\n{'Would write' if dry_run else 'Writes'} {show_bytes(mending.plan.written_nbytes)}.\n")
    if mending.plan and not dry_run:
        total = mending.plan.nbytes * (2 if mending.plan.destroys_source else 1)
        with open_meter(total, "mending", quiet) as meter:
            left_over = mend(source, mending, progress=meter)
        if not quiet:
            echo("What was replaced is kept: --undo puts it back, --purge removes it.\n")
        if left_over:
            click.echo(printable(f"Left over: {left_over}."), err=True)
    return mending


def _ask(found: Diagnosis, choices: Choices) -> Choices:
    """Ask on a terminal where there are several ways, and none was chosen."""
    from dataclasses import replace

    from converter.cli.output import printable
    from converter.doctor.goals import Keep

    codes = {finding.code for finding in found.findings}
    if choices.keep is None and codes & {"sets-twice", "forms-differ"}:
        ways = get_args(Keep)[:2] if "sets-twice" in codes else get_args(Keep)[2:]
        question = "Two sets of one variant: keep which?"
        answer = click.prompt(question, type=click.Choice([*ways, "neither"]), default="neither", err=True)
        choices = replace(choices, keep=None if answer == "neither" else answer)
    if codes & {"variant-single", "variant-partial"} and not (choices.keep_default or choices.only_variant):
        tags = {printable(tag): tag for tag in found.inventory.variants if tag}
        ways = ("add", "default", *tags)
        question = "Untagged weights and variants do not fit: add what is missing, or keep just one?"
        answer = click.prompt(question, type=click.Choice(ways), default="add", err=True)
        if answer == "default":
            choices = replace(choices, keep_default=True)
        elif answer in tags:
            choices = replace(choices, only_variant=tags[answer])
    return choices


def _predictions(
    listing: FolderListing | None, found: Diagnosis, loader: str | None, variant: str | None, always: bool = False
) -> list[Prediction]:
    from converter.libraries.coreml import COREML_VARIANT
    from converter.libraries.predict import Loader, likely_loaders, list_folder, predict, variants_in

    if loader is None and variant is None and not always:
        return []
    inventory = found.inventory
    tags = variants_in(listing) if listing else inventory.variants
    if variant is not None:
        tags = (None if variant == "none" else variant,)
    listing = listing or list_folder(inventory)
    loaders = (cast("Loader", loader),) if loader else likely_loaders(listing)
    return [
        predict(listing, one, tag)
        for one in loaders
        for tag in ((COREML_VARIANT,) if one == "coreml" and variant is None else tags)
    ]


def _show(found: Diagnosis, verbose: bool) -> None:
    from converter.cli.output import echo, printable, show_bytes, show_table

    rows = []
    for part in found.inventory.parts:
        for one in part.sets:
            headers = part.headers_of(one)
            dtypes = dict.fromkeys(dtype.tag for header in headers for dtype in header.dtypes)
            files = str(len(one.file_names)) + (" + index" if one.index_name else "")
            size = show_bytes(sum(header.nbytes for header in headers))
            rows.append(
                (part.name or ".", one.name.variant or "-", one.name.format, files, size, ", ".join(dtypes) or "-")
            )
    show_table(("component", "variant", "format", "files", "size", "dtypes"), rows)
    echo()
    shown = [finding for finding in found.findings if verbose or finding.severity != "note"]
    for finding in shown:
        where = finding.path.relative_to(found.inventory.path)
        echo(printable(f"{finding.severity} {finding.code}: {where if where != '.' else found.inventory.path}"))
        echo(printable(f"    {finding.problem}."))
        for text in (finding.kind.effect, finding.kind.mending):
            if text:
                click.echo(click.wrap_text(text, 96, "    ", "    "))
    counts = [
        (name, sum(finding.severity == name for finding in found.findings)) for name in ("error", "warning", "note")
    ]
    said = ", ".join(f"{count} {name}{'s' * (count != 1)}" for name, count in counts if count)
    hint = " (-v shows notes)" if len(shown) < len(found.findings) else ""
    echo(("\n" if shown else "") + (f"Healthy: {said}{hint}." if found.is_healthy and said else
         "Healthy." if found.is_healthy else f"{said[0].upper()}{said[1:]}{hint}."))  # fmt: skip


def _show_predictions(predictions: list[Prediction], later: bool) -> None:
    from converter.cli.output import echo, printable

    for one in predictions:
        asked = f"variant={one.variant!r}" if one.variant else "no variant"
        what = f"fails: {one.failure}" if one.failure else "would then open:" if later else "opens:"
        echo()
        echo(printable(f"{one.loader} ({one.versions}), asked for {asked}, {what}"))
        for pick in one.picks:
            what = printable(f"fails: {pick.failure}") if pick.failure else ", ".join(map(printable, pick.files))
            echo(f"    {printable(pick.component or '.')}: {what}")
        if one.warning:
            echo(printable(f"    It warns of {one.warning}."))


def _as_json(found: Diagnosis) -> dict[str, Any]:
    return {
        "path": str(found.inventory.path),
        "healthy": found.is_healthy,
        "findings": [
            {
                "code": finding.code,
                "severity": finding.severity,
                "path": str(finding.path),
                "component": finding.component,
                "problem": finding.problem,
                "effect": finding.kind.effect,
                "mending": finding.kind.mending,
            }
            for finding in found.findings
        ],
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

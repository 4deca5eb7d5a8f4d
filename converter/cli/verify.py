"""``wconv verify``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from converter.cli.options import PlaceType, output_options, reading_options, run_options
from converter.cli.terminal import echo, open_meter, show_bytes, show_commits, show_json, show_table

if TYPE_CHECKING:
    from converter.recipes.verify import Comparison, ValueErrors
    from converter.storage import Place

_SHOWN = 20
_WHAT = {
    "missing": "only in A",
    "extra": "only in B",
    "shape": "another shape",
    "dtype": "another dtype",
    "values": "other values",
}


@click.command("verify")
@click.argument("a", type=PlaceType(is_read=True))
@click.argument("b", type=PlaceType(is_read=True))
@click.option("--cast", is_flag=True, help="Allow another dtype in B, if its values are those of A, rounded.")
@click.option(
    "--quantized",
    is_flag=True,
    help="Compare the numbers that quantized weights of A or B stand for, and show the errors of those in B.",
)
@reading_options
@run_options
@output_options
def command(
    a: Place,
    b: Place,
    cast: bool,
    quantized: bool,
    workers: int | None,
    executor: str | None,
    memory: float,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **of_a: Any,
) -> int:
    """Compare all weights at A with those at B, bit for bit; exit code 1 if they differ.

    A and B are files, indexes or folders, or URLs of them, in any of the formats that wconv reads. --key, --flatten and
    the like are for A: as they were given when B was made of it.
    """
    from converter.recipes.verify import verify

    a, b = a.pinned(), b.pinned()
    with open_meter(None, "comparing", quiet) as meter:
        how = partial(verify, executor=executor, workers=workers, memory_nbytes=int(memory), progress=meter)
        found = how(a, b, cast=cast, quantized=quantized, **of_a)
    if as_json:
        show_json({"equal": found.is_equal, **asdict(found, dict_factory=_finite)})
    elif not quiet:
        show_commits(a, b)
        _show(found, quantized, verbose)
    return 0 if found.is_equal else 1


def _finite(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON has no infinity."""
    return {key: str(value) if isinstance(value, float) and not math.isfinite(value) else value for key, value in pairs}


def _show(found: Comparison, of_numbers: bool, verbose: bool) -> None:
    recast = sorted(_changed(found), key=lambda error: -error.max_relative)
    rows = [(e.component or ".", e.name, f"{e.max_absolute:.3g}", f"{e.max_relative:.3g}") for e in recast]
    _show_some(("component", "tensor", "max abs error", "max rel error"), rows, verbose)
    coded = [
        (e.component or ".", e.name, e.scheme, f"{e.max_relative:.3g}", f"{e.mean_relative:.3g}")
        for e in found.quantized
    ]
    _show_some(("component", "tensor", "in B", "max rel error", "mean rel error"), coded, verbose)
    rows = [(one.component or ".", one.name or "-", _WHAT[one.kind], one.detail) for one in found.differences]
    _show_some(("component", "tensor", "difference", ""), rows, verbose)
    if rows:
        told = f"{len(rows):,} differences, {found.tensor_count:,} tensors compared"
        echo(f"Not the same: {told}.{_hint(found, of_numbers)}")
        return
    if found.quantized:
        echo("The max error is over the largest value of the tensor, the mean error over its mean value.")
    echo(f"{_verdict(found)}: {found.tensor_count:,} tensors, {show_bytes(found.nbytes)}{_how(found, of_numbers)}.")


def _hint(found: Comparison, of_numbers: bool) -> str:
    """Give the option that may be missing."""
    kinds = {one.kind for one in found.differences}
    if kinds - {"values"} and found.schemes and not of_numbers:
        of_each = " and ".join(f"{side} is in {' and '.join(schemes)}" for side, schemes in found.schemes.items())
        return f" {of_each}: --quantized compares the numbers that these stand for."
    return " --cast allows B to be rounded." if kinds == {"dtype"} else ""


def _verdict(found: Comparison) -> str:
    unjudged = dict.fromkeys(one.scheme for one in found.quantized if not one.is_bounded)
    if unjudged:
        return f"No bound is broken, and there is none for {' and '.join(unjudged)}, which is not the nearest"
    return "The same within half a step of the codes in B" if found.quantized else "The same"


def _how(found: Comparison, of_numbers: bool) -> str:
    if found.quantized:
        return ""
    if of_numbers:
        how = "rounded" if _changed(found) else "exactly"
        return f", the numbers of A ({' and '.join(found.schemes['A'])}), {how}"
    if _changed(found):
        return ", each the rounded one"
    return ", in another dtype, with no value changed" if found.recast else ", bit for bit"


def _changed(found: Comparison) -> list[ValueErrors]:
    """List the tensors in which a cast rounded something off."""
    return [error for error in found.recast if error.max_absolute]


def _show_some(header: Sequence[str], rows: Sequence[Sequence[str]], verbose: bool) -> None:
    if rows:
        show_table(header, rows if verbose else rows[:_SHOWN])
        if not verbose and len(rows) > _SHOWN:
            echo(f"... and {len(rows) - _SHOWN:,} more (-v shows all)")
        echo()

"""``wconv doctor``: its options; what it does with them is in ``doctor_modes.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from converter.cli.options import output_options, source_arg

if TYPE_CHECKING:
    from converter.storage import Place


@click.command("doctor")
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
def command(source: Place, fix: bool, undo: bool, purge: bool, **options: Any) -> int:
    """Say what is wrong with the weights in folder SRC, what loaders make of it, and how to mend it.

    Reads names, indexes and headers. Exit code 1 if there are errors or warnings, or if a loader that is shown fails.

    \b
    wconv doctor ./model --loader diffusers --variant fp16    which files?
    wconv doctor ./model --fix --dry-run                      what mends it?
    """
    from converter.cli import doctor_modes

    asked = doctor_modes.asked_of(source, **options)
    if sum((fix, undo, purge)) > 1:
        raise click.UsageError("Choose one of --fix, --undo and --purge.")
    if not fix and asked.is_of_fixing:
        raise click.UsageError("That goes with --fix.")
    if fix:
        return doctor_modes.fix(asked)
    if undo:
        return doctor_modes.undo(asked)
    return doctor_modes.purge(asked) if purge else doctor_modes.show(asked)

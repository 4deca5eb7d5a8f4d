"""``wconv rename-variant``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from converter.cli.options import output_options, source_arg

if TYPE_CHECKING:
    from converter.storage import Place


@click.command("rename-variant")
@source_arg
@click.option("--from", "from_variant", required=True, metavar="TAG|none", help="The variant to rename.")
@click.option("--to", "variant", required=True, metavar="TAG|none", help="Its new tag; none takes the tag away.")
@click.option("--component", "components", multiple=True, metavar="NAME", help="Rename only in this component.")
@click.option("--dry-run", is_flag=True, help="Print what would be renamed, and rename nothing.")
@output_options
def command(source: Place, **options: Any) -> None:
    """Give the weights of one variant in SRC another tag, all files and the index at once.

    The same tag twice gives legacy spellings (model-00001-of-00002.fp16.safetensors) their current form.

    \b
    wconv rename-variant ./model --from none --to fp16
    """
    from converter.cli.convert import run_conversion
    from converter.recipes.rename import plan_rename

    run_conversion(source, options, plan_rename, "rename", in_place=True)

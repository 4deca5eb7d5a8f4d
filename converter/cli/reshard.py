"""``wconv reshard``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from converter.cli.options import conversion_options, layout_options, sources_arg

if TYPE_CHECKING:
    from converter.storage import Place


@click.command("reshard")
@sources_arg
@click.option("--in-place", is_flag=True, help="Replace the weights that are read, once all is verified.")
@layout_options
@conversion_options
def command(sources: tuple[Place, ...], **options: Any) -> int:
    """Write every weight set of SRC in shards of another size, into a new folder or in place; the format stays.

    Shards are cut as save_pretrained cuts them. One shard is one plain file without an index.

    \b
    wconv reshard ./model --max-shard-size 2GB -o ./model-2gb
    wconv reshard ./model --max-shard-size none --in-place     merge into one file
    """
    from converter.cli.many import run_conversions

    if options["max_shard_size"] is None:
        raise click.UsageError("Say how large a shard may be: --max-shard-size 5GB, or none.")
    if options["output"] is None and not (options["in_place"] or options["pr"]):
        raise click.UsageError("Say where to write: -o OUT, or --in-place.")
    return run_conversions(sources, options, format=None)

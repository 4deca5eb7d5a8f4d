"""``wconv recast``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from converter.cli.options import conversion_options, layout_options, sources_arg

if TYPE_CHECKING:
    from converter.storage import Place


@click.command("recast")
@sources_arg
@layout_options
@conversion_options
def command(sources: tuple[Place, ...], **options: Any) -> int:
    """Write the floating tensors of SRC in another dtype, as a variant beside it or into a new folder.

    Beside the source, and in a new folder for Diffusers, the files are tagged with the dtype's name, so that loaders
    find them with variant="bf16"; in other new folders they have plain names, and config.json names the dtype.
    Integers and booleans stay as they are, and so does what the model's own library keeps in fp32; 8 bits leave norms
    and biases as they are, too. Values are rounded to nearest even.

    SRC and OUT may be URLs, such as hf://owner/name or s3://bucket/folder.

    \b
    wconv recast ./model --dtype bf16               add a bf16 variant
    wconv recast ./model --dtype fp16 -o ./small    a new folder with that alone
    wconv recast ./model --dtype bf16 --variant none -o ./small  plain names
    """
    from converter.cli.many import run_conversions

    if options["dtype"] is None:
        raise click.UsageError("Say which dtype: --dtype bf16, for example.")
    return run_conversions(sources, options, every_variant=False, tag_dtype=True)

"""``wconv to-bin``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from converter.cli.options import conversion_options, sources_arg

if TYPE_CHECKING:
    from converter.storage import Place


@click.command("to-bin")
@sources_arg
@conversion_options
def command(sources: tuple[Place, ...], **options: Any) -> int:
    """Write every weight set of SRC as torch .bin files, beside it or into a new folder.

    Any torch since 1.6 opens them, with weights_only=True and mmap=True. Tied tensors noted in a header are tied again.

    \b
    wconv to-bin ./model -o ./for-an-old-tool
    wconv to-bin ./model/unet --max-shard-size none    Diffusers: no shards
    """
    from converter.cli.many import run_conversions

    return run_conversions(sources, options, format="torch")

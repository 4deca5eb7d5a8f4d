"""``wconv dequantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from converter.cli.options import FULL_TARGETS, DTypeName, PlaceType, some_conversion_options, source_arg


@click.command("dequantize", short_help="Write an 8-bit model in fp16, bf16 or fp32 again.")
@source_arg
@click.option("-o", "--output", type=PlaceType(), metavar="OUT", required=True, help="The new folder.")
@click.option("--dtype", type=DTypeName(FULL_TARGETS), metavar="DTYPE", required=True, help="fp32, bf16 or fp16.")
@some_conversion_options(
    "from-variant",
    "component",
    "max-shard-size",
    "keep-fp32",
    "on-overflow",
    "overwrite",
    "follow-links",
    "verify",
    "dry-run",
)
def command(source: Path, **options: Any) -> None:
    """Write the 8-bit modules of SRC (LLM.int8 of bitsandbytes) as numbers again, and the rest in the same dtype.

    What the rounding to 8 bits took off stays lost; the folder loads without bitsandbytes, anywhere.

    \b
    wconv dequantize ./model-int8 -o ./model-fp16 --dtype fp16
    """
    from converter.cli.convert import run_planned, wishes_of
    from converter.recipes.quantize import prepare_dequantized

    done = prepare_dequantized(source, options["output"], wishes_of(options), recovering=not options["dry_run"])
    run_planned(done.plan, done.request, options)

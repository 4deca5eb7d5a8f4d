"""``wconv dequantize``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from converter.cli.options import FULL_TARGETS, DTypeName, new_folder_option, some_conversion_options, source_arg

if TYPE_CHECKING:
    from converter.storage import Place


@click.command("dequantize")
@source_arg
@new_folder_option
@click.option("--dtype", type=DTypeName(FULL_TARGETS), metavar="DTYPE", required=True, help="fp32, bf16 or fp16.")
@some_conversion_options(
    "from-variant", "component", "max-shard-size", "keep-fp32", "on-overflow", "overwrite", "follow-links", "create",
    "private", "pr", "verify", "dry-run",
)  # fmt: skip
def command(source: Place, **options: Any) -> None:
    """Write the 8-bit modules of SRC (LLM.int8 of bitsandbytes) as numbers again, and the rest in the same dtype.

    What the rounding to 8 bits took off stays lost; the folder loads without bitsandbytes, anywhere.

    \b
    wconv dequantize ./model-int8 -o ./model-fp16 --dtype fp16
    """
    from converter.cli.convert import run_conversion
    from converter.recipes.quantize import plan_dequantized

    run_conversion(source, options, plan_dequantized, "dequantize")

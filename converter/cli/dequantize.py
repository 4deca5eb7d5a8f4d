"""``wconv dequantize``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from converter.cli.options import FULL_TARGETS, DTypeName, PlaceType, some_conversion_options, source_arg

if TYPE_CHECKING:
    from converter.storage import Place


@click.command("dequantize")
@source_arg
@click.option(
    "-o", "--output", type=PlaceType(), metavar="OUT", required=True, help="The new folder, or of one file a file."
)
@click.option("--dtype", type=DTypeName(FULL_TARGETS), metavar="DTYPE", required=True, help="fp32, bf16 or fp16.")
@some_conversion_options(
    "from-variant", "component", "max-shard-size", "keep-fp32", "on-overflow", "overwrite", "follow-links", "create",
    "private", "pr", "verify", "dry-run",
)  # fmt: skip
def command(source: Place, **options: Any) -> None:
    """Write the quantized modules of SRC as numbers again, and the rest in the same dtype.

    What the rounding to few bits took off stays lost; what is written loads anywhere.

    \b
    wconv dequantize ./model-int8 -o ./model-fp16 --dtype fp16
    wconv dequantize flux-fp8.safetensors -o flux.safetensors --dtype bf16      of ComfyUI, and for it
    """
    from converter.cli.convert import run_conversion
    from converter.recipes.quantize import plan_dequantized

    run_conversion(source, options, plan_dequantized, "dequantize")

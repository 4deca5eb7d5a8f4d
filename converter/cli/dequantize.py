"""``wconv dequantize``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from converter.cli.options import (
    FULL_TARGETS,
    MANY_OPTIONS,
    NAMES_OPTIONS,
    DTypeName,
    folder_or_file_option,
    some_conversion_options,
    sources_arg,
)

if TYPE_CHECKING:
    from converter.storage import Place


@click.command("dequantize")
@sources_arg
@folder_or_file_option
@click.option(
    "--dtype",
    type=DTypeName(FULL_TARGETS),
    metavar="DTYPE",
    help="Write all in this: fp32, bf16 or fp16 (default: what was quantized as config.json names it, or as its "
    "scheme has it; the rest as it is).",
)
@some_conversion_options(
    "from-variant", "component", "max-shard-size", *NAMES_OPTIONS, "keep-fp32", "on-overflow", "overwrite",
    *MANY_OPTIONS, "follow-links", "create", "private", "pr", "verify", "dry-run",
)  # fmt: skip
def command(sources: tuple[Place, ...], **options: Any) -> int:
    """Write the quantized weights of SRC, a folder or a file, as plain numbers again.

    The result loads anywhere, without the library that quantized it, and can be trained and converted; what rounding
    to fewer bits took off stays lost. Each number is the one that the scheme's own library computes, bit for bit. Which
    weights are quantized, and how, is seen by what lies beside them, whatever config.json says; that and the other
    files of the quantizer are written without it, or left out. Scales of activations and of a KV cache are left out,
    and counted.

    \b
    wconv dequantize ./DeepSeek-V3 -o ./DeepSeek-V3-bf16
    wconv dequantize ./model-int8 -o ./model-fp16 --dtype fp16
    wconv dequantize flux-fp8.safetensors -o flux-bf16.safetensors
    """
    from converter.cli.many import run_each

    return run_each(sources, options, _dequantize)


def _dequantize(source: Place, options: dict[str, Any]) -> None:
    from converter.cli.convert import run_conversion
    from converter.recipes.dequantize import plan_dequantized

    run_conversion(source, options, plan_dequantized, "dequantize", computes=True)

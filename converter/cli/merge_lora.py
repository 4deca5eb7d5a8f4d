"""``wconv merge-lora``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

from converter.cli.options import (
    FULL_TARGETS,
    DTypeName,
    PlaceType,
    folder_or_file_option,
    some_conversion_options,
)

if TYPE_CHECKING:
    from converter.recipes.merge_lora import WeightedAdapter
    from converter.storage import Place

# What stands behind the last colon; a path of Windows, or a URL, has something else there.
_WEIGHT = re.compile(r"(.+):([+-]?(?:(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|nan|inf|infinity))", re.IGNORECASE | re.DOTALL)


class _Weighted(click.ParamType["WeightedAdapter"]):
    """An adapter, and its weight behind a colon."""

    name = "ADAPTER[:WEIGHT]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> WeightedAdapter:
        from converter.recipes.merge_lora import WeightedAdapter
        from converter.storage import place_of

        if not isinstance(value, str):
            return WeightedAdapter.of(value)
        match = _WEIGHT.fullmatch(value)
        if match and "://" not in value and place_of(value).is_taken():
            match = None  # a name of its own
        text, weight = match.groups() if match else (value, "1")
        return WeightedAdapter.of(PlaceType(is_read=True).convert(text, param, ctx), float(weight))


@click.command("merge-lora")
@click.argument("source", metavar="BASE", type=PlaceType(is_read=True))
@click.argument("adapters", metavar="ADAPTER[:WEIGHT]...", nargs=-1, required=True, type=_Weighted())
@folder_or_file_option
@click.option(
    "--dtype",
    type=DTypeName(FULL_TARGETS),
    metavar="DTYPE",
    help="Write all in this: fp32, bf16 or fp16 (default: each weight in the dtype that it has).",
)
@some_conversion_options(
    "from-variant", "component", "max-shard-size", "keep-fp32", "on-overflow", "overwrite", "follow-links", "create",
    "private", "pr", "verify", "dry-run",
)  # fmt: skip
def command(source: Place, adapters: tuple[WeightedAdapter, ...], **options: Any) -> None:
    """Write BASE, a folder or a file, with LoRA adapters merged into its weights.

    Each weight becomes W + weight * alpha / r * B @ A, computed in float32 and rounded once, however many adapters
    there are; what none of them is for is copied as it is. Adapters are PEFT's (a folder), Diffusers' or kohya's; their
    weight is 1 unless one is given. An adapter for another base is refused, and so is what is no plain LoRA.

    \b
    wconv merge-lora ./Llama-3-8B ./my-adapter -o ./Llama-3-8B-mine
    wconv merge-lora ./sdxl a.safetensors:0.8 b.safetensors:0.5 -o ./sdxl-ab
    wconv merge-lora model.safetensors a.safetensors -o model-a.safetensors
    wconv merge-lora hf://owner/base hf://owner/adapter -o s3://bucket/merged
    """
    from functools import partial

    from converter.cli.convert import run_conversion
    from converter.recipes.merge_lora import plan_merged

    asked = [(str(one.place.absolute()), one.weight) for one in adapters]
    run_conversion(source, options, partial(plan_merged, asked=adapters), ("merge-lora", asked), computes=True)

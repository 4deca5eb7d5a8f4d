"""``wconv to-single-file``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from converter.cli.options import PlaceType, dtype_option, some_conversion_options, source_arg

if TYPE_CHECKING:
    from converter.storage import Place


@click.command("to-single-file")
@source_arg
@click.option(
    "-o",
    "--output",
    type=PlaceType(),
    metavar="FILE",
    required=True,
    help="The file to be written, or URL of one: .safetensors, or .ckpt for programs that read no other.",
)
@dtype_option
@click.option(
    "--without",
    multiple=True,
    metavar="PART",
    help="Leave this out: vae, text-encoders, or the name of one such as text_encoder_2; repeatable.",
)
@some_conversion_options("from-variant", "on-overflow", "overwrite", "create", "private", "pr", "verify", "dry-run")
def command(source: Place, output: Place, without: tuple[str, ...], **options: Any) -> None:
    """Write the Diffusers pipeline SRC as one file, with the names that ComfyUI and A1111 know.

    SRC is its folder, or that of one of its models, such as ./model/unet. Each tensor keeps its numbers, and its dtype
    unless another is asked for. 'wconv to-diffusers' is the way back.

    \b
    wconv to-single-file ./model -o model.safetensors
    wconv to-single-file ./model --dtype fp16 --without vae -o m.safetensors
    wconv to-single-file ./model/unet --dtype fp16 -o unet.safetensors
    """
    from functools import partial

    from converter.cli.convert import run_conversion
    from converter.recipes.to_single_file import plan_single_file

    make = partial(plan_single_file, without=without)
    run_conversion(source, options, make, ("to-single-file", without), output=output)

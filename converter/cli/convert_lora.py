"""``wconv convert-lora``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from converter.cli.options import PlaceType, some_conversion_options

if TYPE_CHECKING:
    from converter.storage import Place


@click.command("convert-lora")
@click.argument("source", metavar="ADAPTER", type=PlaceType(is_read=True))
@click.option(
    "--to",
    required=True,
    type=click.Choice(["kohya", "diffusers", "peft"]),
    help="Whose names: kohya's, which A1111, Forge and ComfyUI read as well; Diffusers'; PEFT's.",
)
@click.option(
    "-o",
    "--output",
    type=PlaceType(),
    metavar="OUT",
    required=True,
    help="The new file, or folder, or URL of one; for PEFT a folder.",
)
@some_conversion_options("overwrite", "create", "private", "pr", "verify", "dry-run")
def command(source: Place, to: str, **options: Any) -> None:
    """Write a LoRA adapter under the names of another program.

    ADAPTER is a file, .safetensors or .bin, or a folder of PEFT, with adapter_config.json; for Stable Diffusion 1, 2,
    XL, 3 or Flux, and their text encoders. Its numbers stay as they are, and so do its scales (alpha), wherever each
    program has them. What is no plain LoRA, such as DoRA or LoHa, is refused.

    \b
    wconv convert-lora civitai.safetensors --to diffusers -o lora.safetensors
    wconv convert-lora lora.safetensors --to kohya -o for-comfyui.safetensors
    wconv convert-lora ./my-peft-lora --to diffusers -o ./lora
    """
    from functools import partial

    from converter.cli.convert import run_conversion
    from converter.recipes.convert_lora import plan_lora

    run_conversion(source, options, partial(plan_lora, to=to), ("lora", to))

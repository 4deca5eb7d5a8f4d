"""``wconv to-diffusers``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from converter.cli.options import PlaceType, dtype_option, new_folder_option, some_conversion_options, source_arg

if TYPE_CHECKING:
    from converter.storage import Place


@click.command("to-diffusers")
@source_arg
@new_folder_option
@dtype_option
@click.option("--ema", is_flag=True, help="Take the averaged weights of the diffusion model.")
@click.option(
    "--without",
    multiple=True,
    metavar="PART",
    help="Leave this out: vae, text-encoders, or the name of one such as text_encoder_2; repeatable.",
)
@click.option(
    "--config",
    type=PlaceType(exists=True, file_okay=False),
    metavar="DIR",
    help="A pipeline folder to take configs, tokenizer and scheduler from (default: those that wconv has); or that of "
    "one model, which alone is taken.",
)
@some_conversion_options(
    "max-shard-size", "on-overflow", "overwrite", "follow-links", "create", "private", "pr", "verify", "dry-run"
)
def command(
    source: Place, output: Place, ema: bool, without: tuple[str, ...], config: Place | None, **options: Any
) -> None:
    """Write the single file SRC, as CivitAI and ComfyUI have them, as the folder of a Diffusers pipeline.

    SRC is a .safetensors or .ckpt file. Which model it is shows by the names and shapes of its tensors; each keeps its
    numbers, and its dtype unless another is asked for. A diffusion model alone becomes the folder of that model. What
    is left out, such as the averaged weights, is named.

    \b
    wconv to-diffusers model.safetensors -o ./model
    wconv to-diffusers v1-5-pruned.ckpt --ema --dtype fp16 -o ./model
    wconv to-diffusers model.safetensors --without vae -o ./model
    """
    from functools import partial

    from converter.cli.convert import run_conversion
    from converter.recipes.to_diffusers import plan_diffusers

    make = partial(plan_diffusers, config=config, ema=ema, without=without)
    run_conversion(source, options, make, ("to-diffusers", config, ema, without), output=output)

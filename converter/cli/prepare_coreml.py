"""``wconv prepare-coreml``."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from converter.cli.options import PlaceType, new_folder_option, some_conversion_options, source_arg
from converter.cli.terminal import echo, show_bytes

if TYPE_CHECKING:
    from converter.plan.types import Plan
    from converter.storage import Place

# Of the fp16 weights: the packages, and what is compiled from them.
_DISK_SHARE = 2
# With coremltools 9.0 on Linux, converting a UNet took 0.9 GB and 2.7 times its fp16 weights; the other parts are in
# memory as well.
_MEMORY_NBYTES = 1_000_000_000
_MEMORY_SHARE = 4


@click.command("prepare-coreml")
@source_arg
@new_folder_option
@click.option("--ema", is_flag=True, help="Of a single file, take the UNet's averaged weights.")
@click.option(
    "--config",
    type=PlaceType(exists=True, file_okay=False),
    metavar="DIR",
    help="For a single file: a pipeline folder to take configs, tokenizer and scheduler from.",
)
@click.option("--keep-default", is_flag=True, help="Write the untagged weights as well, in their own dtype.")
@some_conversion_options("on-overflow", "overwrite", "follow-links", "create", "private", "pr", "verify", "dry-run")
def command(source: Place, output: Place, ema: bool, config: Place | None, keep_default: bool, **options: Any) -> None:
    """Make a Stable Diffusion pipeline ready for Core ML: in fp16, tagged, one file a part, in a new folder.

    SRC is its folder, or a single file as CivitAI has them: .safetensors or .ckpt, of Stable Diffusion 1, 2 or XL.

    That is what torch2coreml of apple/ml-stable-diffusion loads, and MochiDiffusion's conversion with it. What that
    would miss is said before anything is written; the commands to run next come last.

    \b
    wconv prepare-coreml ./model -o ./model-coreml
    wconv prepare-coreml model.ckpt --ema -o ./model-coreml
    """
    from functools import partial

    from converter.cli.convert import open_run, run_prepared, take_run
    from converter.recipes.prepare_coreml import plan_coreml, request_coreml
    from converter.recipes.request import prepare

    run = take_run(options)
    request = request_coreml(source, output, **options)
    make = partial(plan_coreml, keep_default=keep_default, ema=ema, config=config)
    with open_run(request, run, computes=True) as job:
        prepared = prepare(request, make, ("coreml", keep_default, ema, config), recovering=not run.dry_run)
        run_prepared(prepared, job)
    plan = prepared.plan
    if plan is not None and plan.sets and run.is_told:
        _show_next(plan)


def _show_next(plan: Plan) -> None:
    from converter.libraries.coreml import COREML_VARIANT, next_steps, overflows_in_fp16

    class_name, components = plan.source.class_name, plan.source.components
    if overflows_in_fp16(class_name, components):
        echo("\nThe VAE of this model gives black images in float16 (its config says force_upcast).")
        echo("Take one made for it: add --custom-vae-version madebyollin/sdxl-vae-fp16-fix to these commands.")
    folder = plan.target.folder
    if folder.store.is_far:
        echo(f"\nFetch {folder} to a Mac with apple/ml-stable-diffusion installed; what to do there, this says:")
        echo("\n    wconv doctor --loader coreml FOLDER")
        return
    echo("\nNext, on a Mac with apple/ml-stable-diffusion installed, one of:")
    for step in next_steps(folder.spelled, class_name, components):
        echo(f"\n    # {step.purpose}\n    {shlex.join(step.command)}")
    fp16 = [planned for planned in plan.sets if planned.name.variant == COREML_VARIANT]
    disk = _DISK_SHARE * sum(planned.nbytes for planned in fp16)
    memory = _MEMORY_NBYTES + _MEMORY_SHARE * max(planned.nbytes for planned in fp16)
    echo(f"\nEach takes some {show_bytes(disk)} of disk and up to {show_bytes(memory)} of memory.")
    echo("It compiles the models into the folder Resources of its output: that goes among MochiDiffusion's models.")

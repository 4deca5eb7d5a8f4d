"""``wconv to-safetensors``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from converter.cli.options import conversion_options, layout_options, sources_arg

if TYPE_CHECKING:
    from converter.storage import Place


@click.command("to-safetensors")
@sources_arg
@layout_options
@conversion_options
def command(sources: tuple[Place, ...], **options: Any) -> int:
    """Write every weight set of SRC in safetensors, beside it or into a new folder.

    SRC is a weight file, an index, a model folder, a Diffusers pipeline folder or a training checkpoint (FSDP,
    DeepSpeed, verl, ...); the current folder if left out. It and OUT may be URLs: hf://owner/name, s3://, gs://, az://,
    and SRC https://. The source stays as it is, names of tensors and values too. Nothing in a pickle is run.

    \b
    wconv to-safetensors ./model                 beside the .bin files
    wconv to-safetensors ./model -o ./converted  a new folder, with configs
    wconv to-safetensors ./model --max-shard-size none   one file a component
    wconv to-safetensors ./checkpoint-500 -o ./converted --config ./base-model
    wconv to-safetensors hf://org/model -o s3://bucket/model
    wconv to-safetensors ./fused -o ./for-vllm --experts separate
    wconv to-safetensors last.pt -o model.safetensors --strip-prefix model.
    """
    from converter.cli.many import run_conversions

    return run_conversions(sources, options)

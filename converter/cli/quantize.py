"""``wconv quantize``."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
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
from converter.cli.terminal import echo, open_meter, printable, show_bytes, show_table

if TYPE_CHECKING:
    from converter.plan.types import Plan, QuantizedPart
    from converter.storage import Place
    from converter.transforms.quantize.modules import ModuleChoice
    from converter.transforms.quantize.write import Writer

_NAMED = 8  # of the modules that stay; -v lists all
SCHEMES = ("int8", "nf4", "fp8-block", "fp8-scaled")  # the names in QUANTIZERS, which is not loaded for a help text

# Of other schemes that people ask for: what writes them, or which of these is near.
_WRITTEN_BY = {
    "awq": "AWQ needs examples to run the model on: llm-compressor writes it.",
    "gptq": "GPTQ needs examples to run the model on: GPTQModel and llm-compressor write it.",
    "gguf": "GGUF is what convert_hf_to_gguf.py of llama.cpp writes of a folder in bf16.",
    "nvfp4": "NVFP4 is what ModelOpt and llm-compressor write.",
    "mxfp4": "MXFP4 is what llm-compressor writes.",
    "mlx": "MLX's form is what mlx_lm.convert -q writes of a folder in bf16.",
    "fp4": "Of 4 bits there is nf4.",
    "int4": "Of 4 bits there is nf4; int4 for vLLM is what llm-compressor writes.",
    "fp8": "Of float8 there are fp8-scaled, for vLLM and for ComfyUI's files, and fp8-block, for transformers.",
}


class _SchemeName(click.Choice[str]):
    """A scheme that is written; of others it is said what serves."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        known = super().get_invalid_choice_message(value, ctx)
        asked = str(value).lower().replace("-", "").replace("_", "")
        key = next((key for key in _WRITTEN_BY if key in asked), "gguf" if re.match(r"i?q\d", asked) else "")
        return f"{known} {_WRITTEN_BY[key]}" if key else known


@click.command("quantize")
@sources_arg
@folder_or_file_option
@click.option("--scheme", type=_SchemeName(SCHEMES), default="int8", show_default=True, help="What it is written in.")
@click.option(
    "--include", multiple=True, metavar="REGEX", help="Quantize only linear modules of these names; repeatable."
)
@click.option("--skip", multiple=True, metavar="REGEX", help="Leave modules of these names as they are; repeatable.")
@click.option(
    "--component",
    "components",
    multiple=True,
    metavar="NAME",
    help="Quantize this component (default: transformer, unet and text encoders); may be given again.",
)
@click.option(
    "--dtype",
    type=DTypeName(FULL_TARGETS),
    metavar="DTYPE",
    help="Cast what stays: fp32, bf16 or fp16 (default: as it is).",
)
@click.option("--strict", is_flag=True, help="Refuse a model with weights that the scheme cannot hold.")
@some_conversion_options(
    "from-variant",
    "max-shard-size",
    *NAMES_OPTIONS,
    "keep-fp32",
    "on-overflow",
    "overwrite",
    *MANY_OPTIONS,
    "follow-links",
    "create",
    "private",
    "pr",
    "verify",
    "dry-run",
)
def command(
    sources: tuple[Place, ...],
    scheme: str,
    include: tuple[str, ...],
    skip: tuple[str, ...],
    strict: bool,
    **options: Any,
) -> int:
    """Write the linear modules of SRC, a model's or a pipeline's folder, or a file, in 8 or 4 bits.

    int8 is LLM.int8 of bitsandbytes, and nf4 its 4 bits, in blocks of 64 that share a scale.
    fp8-block is float8 in blocks of 128 x 128, as transformers has it; fp8-scaled is float8 with a scale for each row,
    for compressed-tensors and vLLM. Of a single file fp8-scaled makes one for ComfyUI: of the matrices in its blocks,
    with one scale for each.

    The new folder loads in a half or a quarter of the memory of the fp16 one; the numbers are those that the library
    gives when it quantizes at load time. Which modules, the model's library decides, as it does then; config.json says
    so. A module that the scheme cannot hold is left as it is, and named; nf4 refuses it.

    \b
    wconv quantize ./model -o ./model-int8
    wconv quantize ./model -o ./model-nf4 --scheme nf4
    wconv quantize flux.safetensors -o flux-fp8.safetensors --scheme fp8-scaled
    wconv quantize ./sana -o ./sana-int8 --dtype bf16    all the rest in bf16
    wconv quantize ./model -o ./model-int8 --skip 'layers\\.0\\.'
    """
    from functools import partial

    from converter.cli.many import run_each
    from converter.transforms.quantize.modules import ModuleChoice

    return run_each(sources, options, partial(_quantize, scheme=scheme, choice=ModuleChoice(include, skip, strict)))


def _quantize(source: Place, options: dict[str, Any], scheme: str, choice: ModuleChoice) -> None:
    from functools import partial

    from converter.cli.convert import open_run, run_prepared, take_run
    from converter.recipes.quantize import Measuring, plan_quantized, writer_of
    from converter.recipes.request import Request, prepare

    writer = writer_of(scheme, source)
    run = take_run(options)
    request = Request.of(source, **options)
    with open_run(request, run, computes=True) as job:
        with open_meter(None, "looking", run.quiet) as meter:
            measuring = Measuring(job.workers, int(run.memory), meter)
            plan = partial(plan_quantized, choice=choice, measuring=measuring, scheme=scheme)
            prepared = prepare(request, plan, ("quantize", scheme, choice), recovering=not run.dry_run)
        parts = prepared.plan.quantized if prepared.plan else ()
        if run.is_told:
            _show_parts(parts, writer, run.dry_run or run.verbose, run.verbose)
        run_prepared(prepared, job, {"quantized": _as_json(parts, scheme)})
    if run.is_told and prepared.plan is not None and prepared.plan.sets and not run.dry_run:
        _show_hints(prepared.plan, writer)


def _as_json(parts: Iterable[QuantizedPart], scheme: str) -> list[dict[str, Any]]:
    return [
        {
            "component": part.component,
            "scheme": scheme,
            "modules": [
                {"name": name, "nbytes_before": before, "nbytes_after": after} for name, before, after in part.modules
            ],
            "skip_modules": list(part.skipped),
        }
        for part in parts
    ]


def _show_parts(parts: Collection[QuantizedPart], writer: Writer, shows_modules: bool, verbose: bool) -> None:
    """Say what is quantized; modules that differ in numbers alone are one line, but for the verbose."""
    from converter.errors import name_some
    from converter.models.names import fold_modules

    for part in parts:
        if shows_modules:
            show_table(("module", "before", "after"), _rows_of(part, verbose))
            echo()
        before = show_bytes(sum(before for _, before, _ in part.modules))
        after = show_bytes(sum(after for _, _, after in part.modules))
        name = part.component or "The model"
        echo(printable(f"{name}: {len(part.modules)} modules in {writer.bits}, {before} before and {after} after."))
        if part.skipped:
            skipped = part.skipped if verbose else tuple(fold_modules(part.skipped))
            told = name_some(skipped, len(skipped) if verbose else _NAMED)
            echo(printable(f"Its config.json lists as left alone: {told}."))
    if parts:
        echo(f"{writer.accuracy}\n")


def _rows_of(part: QuantizedPart, verbose: bool) -> list[tuple[str, str, str]]:
    from converter.models.names import fold_modules

    sizes = {name: (before, after) for name, before, after in part.modules}
    folded = {name: [name] for name in sizes} if verbose else fold_modules(sizes)
    rows = []
    for name, same in folded.items():
        before, after = (show_bytes(sum(sizes[one][which] for one in same)) for which in (0, 1))
        rows.append((name, before, after))
    return rows


def _show_hints(plan: Plan, writer: Writer) -> None:
    from converter.libraries import library_of

    quantized = {part.component for part in plan.quantized}
    libraries = [library_of(component) for component in plan.source.components if component.name in quantized]
    notes = (library.note_quantized(writer.package) for library in libraries)
    hints = dict.fromkeys(filter(None, (*writer.hints, *notes)))
    if hints:
        echo("\n" + "\n".join(hints))

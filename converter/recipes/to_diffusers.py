"""A single file, as UIs have them, becomes the folder of a Diffusers pipeline, or of the one model that it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from converter.errors import BadFile, BadRequest, Unsupported
from converter.models.checkpoint import Checkpoint, open_checkpoint
from converter.models.hub_cache import check_places, snapshot_of
from converter.models.schemes import quantized_in
from converter.plan.types import Plan, Rest
from converter.recipes.request import Request
from converter.recipes.steps import make_ready, open_job, plan_job
from converter.storage import Place
from converter.transforms.single_file.pipeline import open_single_file


def plan_diffusers(
    request: Request, config: Place | None = None, ema: bool = False, without: Sequence[str] = ()
) -> Plan:
    """Plan a folder that ``from_pretrained`` loads; the rest is as in ``open_single_file``.

    Raises BadRequest for what is no single file, Unsupported for one that no table has.
    """
    check_places(request.source, request.output)
    request = replace(request, source=snapshot_of(request.source))
    config = config and snapshot_of(config)
    if not request.source.exists():
        raise BadFile(request.source, "does not exist", "Check the path.")
    if not request.source.is_file():
        problem = "is a folder, and one file becomes a pipeline"
        raise BadRequest(request.source, problem, "Name the .safetensors or .ckpt file.")
    if request.output is not None and request.output.is_same(request.source.parent):
        raise BadRequest(request.output, "is the folder of the source", "Name a new one.")
    checkpoint = open_checkpoint(request.source)
    refuse_quantized(checkpoint)
    opened = open_single_file(checkpoint, config, ema, without, request.publishing.follow_links)
    job = open_job(request, opened.model)
    selected = [(component, part.weight_set) for component, part in opened.checkpoints]
    orders = make_ready(job, list(opened.checkpoints))
    return plan_job(job, selected, orders, Rest(opened.copied, opened.generated, opened.notes))


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise Unsupported for weights that others scale: in the other layout they would not stand beside each other."""
    for one in quantized_in(checkpoint):
        raise Unsupported(checkpoint.weight_set.path, f"is quantized ({one}): its layout stays", one.advice)

"""The dtype of each tensor that is written, and what is refused with it: tags that would lie, quantized weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from converter.dtypes import DTYPES, RECAST_SOURCES, RECAST_TARGETS, DType
from converter.errors import BadRequest, Unsupported, Where
from converter.libraries import library_of
from converter.models.checkpoint import Checkpoint
from converter.models.component import Component
from converter.models.names import WeightsName
from converter.models.schemes import find_belongings, quantized_in
from converter.models.select import compiled
from converter.tensors.base import Tensor


def check_asked(path: Where, checkpoints: Iterable[Checkpoint], dtype: DType | None, keep_fp32: Sequence[str]) -> None:
    """Raise BadRequest for a dtype that nothing is cast to, and for names to be kept in float32 that no tensor has."""
    if dtype and dtype.short_name not in RECAST_TARGETS:
        raise BadRequest(repr(dtype.short_name), "is no dtype to cast to", f"Take {', '.join(RECAST_TARGETS)}.")
    if keep_fp32 and dtype is None:
        raise BadRequest(path, "is not cast, and --keep-fp32 is for casts", "Leave it out, or say which --dtype.")
    infos = (info for checkpoint in checkpoints for info in checkpoint.tensors) if keep_fp32 else ()
    names = [info.name for info in infos if not info.is_made and info.dtype.tag in RECAST_SOURCES]
    for regex in keep_fp32:
        if not any(map(compiled(regex).search, names)):
            problem = f"has no tensor to be cast whose name holds {regex!r}, as --keep-fp32 has it"
            raise BadRequest(path, problem, "'wconv inspect --tensors' lists them.")


def find_kept(component: Component, dtype: DType | None, keep_fp32: Iterable[str] = ()) -> Callable[[str], bool]:
    """Say which tensors stay float32 in a cast: those of the model's library, and those that are asked for."""
    if dtype is None or dtype.bits >= 32:
        return lambda name: False
    keep = library_of(component).keeps_fp32(component, dtype)
    patterns = list(map(compiled, keep_fp32))
    return lambda name: keep(name) or any(pattern.search(name) for pattern in patterns)


def check_tag(path: Where, name: WeightsName, written: Iterable[DType], dtype: DType | None) -> None:
    """Refuse to name weights for a dtype that they do not have, by a tag that is asked for or stays in a recast."""
    named = name.tagged_dtype
    floats = sorted({held.short_name for held in written if held.is_floating})
    held = dtype.short_name if dtype else " and ".join(floats)
    if named is None or not floats or named.short_name in ([held] if dtype else floats):
        return
    advice = f"Use --dtype {named.short_name}, or --variant {dtype.short_name if dtype else floats[0]}."
    raise BadRequest(path, f"would be named {name.variant} and hold {held}", advice)


def target_dtype(info: Tensor, dtype: DType | None, keep: Callable[[str], bool]) -> DType:
    """Give the dtype in which a tensor is written; integers, booleans and packed floats stay as they are."""
    if dtype is None or info.is_made or info.dtype.tag not in RECAST_SOURCES:
        return info.dtype
    if keep(info.name):
        return DTYPES["F32"]
    return info.dtype if stays_wider(info.dtype, len(info.shape), dtype) else dtype


def stays_wider(dtype: DType, dims: int, target: DType) -> bool:
    """Say whether a tensor keeps its dtype where 8 bits are asked for: norms, biases and scalars do.

    They take next to no room, and no library computes with them in 8 bits.
    """
    return target.bits == 8 and dims < 2 and dtype.bits > 8


def check_quantized(component: Component, checkpoint: Checkpoint, dtype: DType | None, force: bool) -> frozenset[str]:
    """Refuse to cast what tensors or config show to be quantized; name what stays as it is if that is forced."""
    found = quantized_in(checkpoint) if dtype else []
    if dtype and not force and (found or "quantization_config" in component.config):
        how = str(found[0]) if found else "its config.json has a quantization_config"
        advice = "Recast the model it was made from, or use --force."
        if found:
            advice = f"{found[0].advice} To cast only what is not quantized, use --force."
        raise Unsupported(checkpoint.weight_set.path, f"is quantized ({how}): a cast would ruin it", advice)
    return find_belongings(found, (info.name for info in checkpoint.tensors))

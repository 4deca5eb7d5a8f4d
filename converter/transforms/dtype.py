"""Another dtype for the floating tensors of a checkpoint, but for those that must not be cast."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from converter.dtypes import DTYPES, RECAST_SOURCES, DType, OnOverflow, dtype_of
from converter.errors import BadRequest, Unsupported, Where
from converter.libraries import library_of
from converter.models.checkpoint import Checkpoint
from converter.models.component import Component, has_quantization
from converter.models.schemes import find_belongings, quantized_in
from converter.models.select import check_choice, compiled, texts_of
from converter.tensors.base import Tensor


@dataclass(frozen=True, slots=True)
class Casting:
    """What a cast is to do; without a ``dtype`` there is none.

    ``keep_fp32`` are regular expressions, searched in the names of tensors that stay in float32 as those of the model's
    library do. With ``force`` quantized models are cast, but for what is quantized. Raises BadRequest for what is none.
    """

    dtype: DType | None = None
    keep_fp32: tuple[str, ...] = ()
    on_overflow: OnOverflow = "error"
    force: bool = False

    def __post_init__(self) -> None:
        check_choice("on_overflow", self.on_overflow, OnOverflow)
        object.__setattr__(self, "dtype", None if self.dtype is None else dtype_of(self.dtype))
        object.__setattr__(self, "keep_fp32", texts_of(self.keep_fp32))


def check_names(where: Where, checkpoints: Iterable[Checkpoint], casting: Casting) -> None:
    """Raise BadRequest for names to be kept in float32 that no tensor has."""
    if casting.keep_fp32 and casting.dtype is None:
        raise BadRequest(where, "is not cast, and --keep-fp32 is for casts", "Leave it out, or say which --dtype.")
    names: list[str] = []
    for checkpoint in checkpoints if casting.keep_fp32 else ():
        cast_too = {tensor.name for tensor in checkpoint.tensors if _is_cast(tensor)}
        names += (*cast_too, *(old for old, new in checkpoint.renamed.items() if new in cast_too))
    for regex in casting.keep_fp32:
        if not any(map(compiled(regex).search, names)):
            problem = f"has no tensor to be cast whose name holds {regex!r}, as --keep-fp32 has it"
            raise BadRequest(where, problem, "'wconv inspect --tensors' lists them.")


def recast(component: Component, checkpoint: Checkpoint, casting: Casting) -> Checkpoint:
    """Cast the floating tensors of a checkpoint, but for what stays as it is, and note what was kept.

    What a transform has made before is in its right dtype. Raises Unsupported for a quantized model.
    """
    dtype = casting.dtype
    if dtype is None:
        return checkpoint
    from converter.tensors.derived import cast  # here, as most conversions are none

    untouched = _check_quantized(component, checkpoint, casting.force)
    keep = find_kept(component, dtype, casting.keep_fp32)
    old_names = {new: old for old, new in checkpoint.renamed.items()}

    def keeps(name: str) -> bool:  # by either name: one of the two is that of the model's class
        return keep(name) or (name in old_names and keep(old_names[name]))

    def write(tensor: Tensor) -> Tensor:
        if tensor.name in untouched:
            return tensor
        return cast(tensor, _target_of(tensor, dtype, keeps), casting.on_overflow)

    files = tuple(replace(file, tensors=tuple(map(write, file.tensors))) for file in checkpoint.files)
    written = replace(checkpoint, files=files)
    pairs = list(zip(checkpoint.tensors, written.tensors, strict=True))
    kept = {new.name: new.dtype for old, new in pairs if new.dtype is not dtype and not old.is_made}
    notes = checkpoint.notes
    if all(new is old and not old.source.computes for old, new in pairs):
        is_there = any(old.dtype is dtype for old, _ in pairs)
        notes += (f"already {dtype.short_name}: nothing to cast" if is_there else "holds nothing to cast",)
    return replace(written, kept=kept, notes=notes)


def find_kept(component: Component, dtype: DType | None, keep_fp32: Iterable[str] = ()) -> Callable[[str], bool]:
    """Say which tensors stay float32 in a cast: those of the model's library, and those that are asked for."""
    if dtype is None or dtype.bits >= 32:
        return lambda name: False
    keep = library_of(component).keeps_fp32(component, dtype)
    patterns = list(map(compiled, keep_fp32))
    if not patterns:
        return keep
    return lambda name: keep(name) or any(pattern.search(name) for pattern in patterns)


def stays_wider(dtype: DType, dims: int, target: DType) -> bool:
    """Say whether a tensor keeps its dtype where 8 bits are asked for: norms, biases and scalars do.

    They take next to no room, and no library computes with them in 8 bits.
    """
    return target.bits == 8 and dims < 2 and dtype.bits > 8


def _is_cast(tensor: Tensor) -> bool:
    """Say whether a tensor may be cast; integers, booleans and packed floats stay as they are."""
    return not tensor.is_made and tensor.dtype.tag in RECAST_SOURCES


def _target_of(tensor: Tensor, dtype: DType, keep: Callable[[str], bool]) -> DType:
    if not _is_cast(tensor):
        return tensor.dtype
    if keep(tensor.name):
        return DTYPES["F32"]
    return tensor.dtype if stays_wider(tensor.dtype, len(tensor.shape), dtype) else dtype


def _check_quantized(component: Component, checkpoint: Checkpoint, force: bool) -> frozenset[str]:
    """Refuse to cast what tensors or config show to be quantized; name what stays as it is if that is forced."""
    found = quantized_in(checkpoint)
    if not force and (found or has_quantization(component.config)):
        how, advice = "its config.json has a quantization_config", "Recast the model it was made from, or use --force."
        if found:
            how, advice = str(found[0]), f"{found[0].advice} To cast only what is not quantized, use --force."
        raise Unsupported(checkpoint.weight_set.path, f"is quantized ({how}): a cast would ruin it", advice)
    return find_belongings(found, (tensor.name for tensor in checkpoint.tensors))

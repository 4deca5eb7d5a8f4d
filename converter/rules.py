"""What the models' own loaders ask of a set that is written: ties, dtypes, shard counts, configs. Pure.

Each rule names the loader that makes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from converter.checkpoint import Checkpoint
from converter.choose import Tied, Wishes
from converter.dtypes import DTYPES, RECAST_SOURCES, DType
from converter.errors import BadRequest, Unsupported
from converter.folder import Component
from converter.keep_fp32 import keep_rule
from converter.names import Format, WeightsName
from converter.schemes import Quantized, find_belongings, find_quantized
from converter.tensors import TensorInfo
from converter.tensors import find_ties as find_equal_views

# Renamed on load, but only where the checkpoint is one file (``_fix_state_dict_keys_on_load`` and its call in
# ``diffusers/models/modeling_utils.py``): in shards these tensors are silently not used.
_OLD_ATTENTION_CLASSES = frozenset({"AutoencoderKL", "VQModel", "UNet2DModel"})
_OLD_ATTENTION_NAME = re.compile(r".*\.attentions\.\d+\.(query|key|value|proj_attn)\.(weight|bias)")


# How much more may be written than is held. Masks and buffers that were expanded take some MB; tied embeddings that are
# written under each of their two to four names take GB, but not four times all the rest; a compressed float32 copy of
# bfloat16 weights takes half.
MAX_GROWTH_NBYTES = 1_000_000_000
MAX_GROWTH = 3
_NOTED_GROWTH_NBYTES = 1_000_000


def choose_ties(component: Component, checkpoint: Checkpoint, form: Format, wishes: Wishes) -> dict[str, str]:
    """Map the names that are not written to those that are; in a torch file they stay, as a second name."""
    if form == "torch":
        names = {info.name for info in checkpoint.tensors}
        recorded = {name: kept for name, kept in checkpoint.metadata.items() if kept in names and name not in names}
        return {} if wishes.tied == "duplicate" else {**find_equal_views(checkpoint.tensors), **recorded}
    ties = find_equal_views(checkpoint.tensors) if (wishes.tied or default_tied(component)) == "first" else {}
    if "format" in ties:
        raise Unsupported(checkpoint.weight_set.path, "has a tied tensor named 'format'", "Use --tied duplicate.")
    return ties


def default_tied(component: Component) -> Tied:
    """Say whether tied tensors are written once or each by its name, where the user does not.

    A transformers model ties again what its config says is tied; where the config says it does not, and in Diffusers,
    which never ties, a name that is not in the file is a missing weight.
    """
    if component.is_diffusers or component.config.get("tie_word_embeddings") is False:
        return "duplicate"
    return "first"


def find_kept(component: Component, wishes: Wishes) -> Callable[[str], bool]:
    """Say which tensors stay float32 in a recast: those of the model's library, and those that are asked for."""
    if wishes.dtype is None or wishes.dtype.bits >= 32:
        return lambda name: False
    try:
        patterns = [re.compile(pattern) for pattern in wishes.keep_fp32]
    except re.error as error:
        raise BadRequest(repr(error.pattern), f"is no regular expression ({error})") from None
    rules = [keep_rule(name, component.is_diffusers, wishes.dtype) for name in component.class_names]
    return lambda name: any(rule(name) for rule in rules) or any(pattern.search(name) for pattern in patterns)


def target_dtype(info: TensorInfo, wishes: Wishes, keep: Callable[[str], bool]) -> DType:
    """Give the dtype in which a tensor is written; integers, booleans and packed floats stay as they are."""
    if info.target is not None:
        return info.target
    if wishes.dtype is None or info.dtype.tag not in RECAST_SOURCES:
        return info.dtype
    return DTYPES["F32"] if keep(info.name) else wishes.dtype


def check_quantized(component: Component, checkpoint: Checkpoint, wishes: Wishes) -> frozenset[str]:
    """Refuse to cast what tensors or config show to be quantized; name what stays as it is if that is forced."""
    found = quantized_in(checkpoint) if wishes.dtype else []
    if wishes.dtype and not wishes.force and (found or "quantization_config" in component.config):
        how = str(found[0]) if found else "its config.json has a quantization_config"
        advice = "Recast the model it was made from, or use --force."
        if found:
            advice = f"{found[0].advice} To cast only what is not quantized, use --force."
        raise Unsupported(checkpoint.weight_set.path, f"is quantized ({how}): a cast would ruin it", advice)
    return find_belongings(found, (info.name for info in checkpoint.tensors))


def quantized_in(checkpoint: Checkpoint) -> list[Quantized]:
    """List the weights of a checkpoint that other tensors scale, but for those that are written as numbers again."""
    return find_quantized({info.name: info.dtype for info in checkpoint.tensors if info.target is None})


def check_growth(checkpoint: Checkpoint, written: Sequence[TensorInfo], wishes: Wishes) -> tuple[str, ...]:
    """Note how much more the tensors that are written take than what holds them; refuse what would fill a disk.

    A tensor that ``torch.Tensor.expand`` made holds its elements many times over, and each is written.
    """
    views = [info for info in written if info.storage.content is None]
    nbytes = sum(info.nbytes for info in views)
    if nbytes > MAX_GROWTH_NBYTES and not wishes.expand:
        held = {info.storage: info.storage.packed_nbytes or info.storage.nbytes for info in views}
        source_nbytes = sum(held.values())
        if nbytes - source_nbytes > max(MAX_GROWTH_NBYTES, MAX_GROWTH * source_nbytes):
            largest = max(views, key=lambda info: info.nbytes - held[info.storage])
            raise Unsupported(
                checkpoint.weight_set.path,
                f"holds {source_nbytes:,} bytes of tensors, which would come out as {nbytes:,}: the largest is "
                f"{largest.name!r}, of {largest.nbytes:,} bytes in {held[largest.storage]:,}",
                "'wconv to-safetensors --expand' writes them in full.",
            )
    more = [info.nbytes - info.storage.nbytes for info in views if info.nbytes > info.storage.nbytes]
    if sum(more) < _NOTED_GROWTH_NBYTES:
        return ()
    return (f"its expanded tensors take {sum(more):,} bytes more than in the source",)


def check_shard_count(
    component: Component, checkpoint: Checkpoint, name: WeightsName, count: int, wishes: Wishes
) -> None:
    """Refuse shards that no loader, or not the model's, reads."""
    if count == 1 or wishes.force:
        return
    path = checkpoint.weight_set.path
    if name.format == "torch" and component.is_diffusers:
        raise Unsupported(
            path,
            "would become sharded .bin, which no Diffusers pipeline loads",
            "Use --max-shard-size none, or --force.",
        )
    old = find_old_attention(component, (info.name for info in checkpoint.tensors))
    if old:
        raise Unsupported(
            path,
            f"has tensors with old names, such as {old!r}, which Diffusers reads from a single file only",
            "Use --max-shard-size none.",
        )


def find_old_attention(component: Component, names: Iterable[str]) -> str | None:
    """Give a name, if there is one, that the class's loader knows only in a checkpoint of one file."""
    if component.class_name not in _OLD_ATTENTION_CLASSES:
        return None
    return next((name for name in names if _OLD_ATTENTION_NAME.fullmatch(name)), None)


def with_dtype(config: Any, name: str) -> Any:
    """Give a config with another dtype, its sub-configs' too; transformers 5 writes ``dtype``, 4 ``torch_dtype``."""
    if not isinstance(config, dict):
        return config
    named = ("dtype", "torch_dtype")
    return {
        key: name if key in named and isinstance(value, str) else with_dtype(value, name)
        for key, value in config.items()
    }

"""What the models' own loaders ask of a set that is written: ties, dtypes, shard counts, configs. Pure.

Each rule names the loader that makes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from converter.dtypes import BY_ALIAS, DTYPES, RECAST_SOURCES, RECAST_TARGETS, DType
from converter.errors import BadRequest, Unsupported
from converter.libraries.keep_fp32 import keep_matches, keep_rule, keep_segments
from converter.models.checkpoint import Checkpoint
from converter.models.folder import Component, ModelFolder
from converter.models.names import Format, WeightsName
from converter.models.schemes import Quantized, find_belongings, find_quantized
from converter.models.select import Tied, Wishes
from converter.tensors.base import Tensor
from converter.tensors.base import find_ties as find_equal_views

# Renamed on load, but only where the checkpoint is one file (``_fix_state_dict_keys_on_load`` and its call in
# ``diffusers/models/modeling_utils.py``): in shards these tensors are silently not used.
_OLD_ATTENTION_CLASSES = frozenset({"AutoencoderKL", "VQModel", "UNet2DModel"})
_OLD_ATTENTION_NAME = re.compile(r".*\.attentions\.\d+\.(query|key|value|proj_attn)\.(weight|bias)")

# What ``from_pretrained`` of each library looks for (``WEIGHTS_NAME`` and ``SAFETENSORS_WEIGHTS_NAME`` in their
# ``utils``), and PEFT (``peft/utils/constants.py``).
_DIFFUSERS_NAMES = {"safetensors": "diffusion_pytorch_model", "bin": "diffusion_pytorch_model"}
_TRANSFORMERS_NAMES = {"safetensors": "model", "bin": "pytorch_model"}
_DTYPE_KEYS = ("dtype", "torch_dtype")  # transformers 5 reads both, 4 only the second
_ADAPTER_NAMES = {"safetensors": "adapter_model", "bin": "adapter_model"}

# How much more may be written than is held. Masks and buffers that were expanded take some MB; tied embeddings that are
# written under each of their two to four names take GB, but not four times all the rest; a compressed float32 copy of
# bfloat16 weights takes half.
MAX_GROWTH_NBYTES = 1_000_000_000
MAX_GROWTH = 3
_NOTED_GROWTH_NBYTES = 1_000_000


def note_tag(folder: ModelFolder, variant: str | None) -> tuple[str, ...]:
    """Say so where weights get a tag under which the folder's library does not find them."""
    library = variantless(folder)
    if not library or variant in (None, "none"):
        return ()
    return (f"{library} finds no variants: what is tagged {variant} is loaded by the name of its file alone",)


def choose_ties(component: Component, checkpoint: Checkpoint, form: Format, wishes: Wishes) -> dict[str, str]:
    """Map the names that are not written to those that are; in a torch file they stay, as a second name."""
    if form == "torch":
        names = {info.name for info in checkpoint.tensors}
        recorded = {name: kept for name, kept in checkpoint.ties.items() if name not in names}
        return {} if wishes.tied == "duplicate" else {**find_equal_views(checkpoint.tensors), **recorded}
    tied = wishes.tied or default_tied(component, checkpoint.name.in_format(form))
    ties = find_equal_views(checkpoint.tensors) if tied == "first" else {}
    if "format" in ties:
        raise Unsupported(checkpoint.weight_set.path, "has a tied tensor named 'format'", "Use --tied duplicate.")
    return ties


def default_tied(component: Component, name: WeightsName) -> Tied:
    """Say whether tied tensors are written once or each by its name, where the user does not.

    A transformers model ties again what its config says is tied (``tie_weights`` in
    ``transformers/modeling_utils.py``). Where the config says it does not, in a file that is not named as transformers
    looks for it, and in every other library, a name that is not in the file is a missing weight.
    """
    is_tied = is_transformers(component) and finds(component, name) and not _unties(component.config)
    return "first" if is_tied else "duplicate"


def is_transformers(component: Component) -> bool:
    """Say whether a component's config is that of a transformers model."""
    names_model = bool(component.class_name) or isinstance(component.config.get("model_type"), str)
    return names_model and not component.is_diffusers


def finds(component: Component, name: WeightsName) -> bool:
    """Say whether ``from_pretrained`` of a component's library looks for weights of a name, its variant asked for."""
    names = _DIFFUSERS_NAMES if component.is_diffusers else _TRANSFORMERS_NAMES if is_transformers(component) else {}
    return names.get(name.ext) == name.stem


def is_adapter(name: WeightsName) -> bool:
    """Say whether weights of a name are what PEFT looks for."""
    return _ADAPTER_NAMES.get(name.ext) == name.stem


def variantless(folder: ModelFolder) -> str:
    """Give the library that loads from a folder and finds no variants in it; nothing where it finds them, or is none.

    ``hf_load_state_dict`` of timm, ``load_torch_weights`` of sentence-transformers, ``load_peft_weights`` of PEFT,
    ``_identify_model_variants`` of Diffusers.
    """
    if folder.kind == "sentence-transformers":
        return "sentence-transformers"
    root = folder.components[0]
    if folder.kind == "pipeline":
        return "" if root.name else "Diffusers at the root"
    if root.weight_sets and all(is_adapter(found.name) for found in root.weight_sets):
        return "PEFT"
    has_class = root.is_diffusers or is_transformers(root)
    return "timm" if isinstance(root.config.get("architecture"), str) and not has_class else ""


def _unties(config: dict[str, Any]) -> bool:
    """Say whether a config, or where it is silent that of a part, says that embeddings are not tied."""
    own = config.get("tie_word_embeddings")
    if own is not None:
        return own is False
    return any(_unties(value) for value in config.values() if isinstance(value, dict))


def find_kept(component: Component, wishes: Wishes) -> Callable[[str], bool]:
    """Say which tensors stay float32 in a recast: those of the model's library, and those that are asked for."""
    if wishes.dtype is None or wishes.dtype.bits >= 32:
        return lambda name: False
    patterns = list(map(compiled, wishes.keep_fp32))
    rules = [keep_rule(name, component.is_diffusers, wishes.dtype) for name in component.class_names]
    rules.append((keep_segments if component.is_diffusers else keep_matches)(component.more_fp32))
    return lambda name: any(rule(name) for rule in rules) or any(pattern.search(name) for pattern in patterns)


def check_asked(path: Path, checkpoints: Iterable[Checkpoint], wishes: Wishes) -> None:
    """Raise BadRequest for a dtype that nothing is cast to, and for names to be kept in float32 that no tensor has."""
    if wishes.dtype and wishes.dtype.short_name not in RECAST_TARGETS:
        raise BadRequest(repr(wishes.dtype.short_name), "is no dtype to cast to", f"Take {', '.join(RECAST_TARGETS)}.")
    if wishes.keep_fp32 and wishes.dtype is None:
        raise BadRequest(path, "is not cast, and --keep-fp32 is for casts", "Leave it out, or say which --dtype.")
    infos = (info for checkpoint in checkpoints for info in checkpoint.tensors) if wishes.keep_fp32 else ()
    names = [info.name for info in infos if not info.is_made and info.dtype.tag in RECAST_SOURCES]
    for regex in wishes.keep_fp32:
        if not any(map(compiled(regex).search, names)):
            problem = f"has no tensor to be cast whose name holds {regex!r}, as --keep-fp32 has it"
            raise BadRequest(path, problem, "'wconv inspect --tensors' lists them.")


def compiled(regex: str) -> re.Pattern[str]:
    """Compile what a user gives as a regular expression. Raises BadRequest for what is none."""
    try:
        return re.compile(regex)
    except re.error as error:
        raise BadRequest(repr(regex), f"is no regular expression ({error})") from None


def tag_dtype(name: WeightsName) -> DType | None:
    """Give the dtype that a variant's tag names, if it names one."""
    return BY_ALIAS.get((name.variant or "").lower())


def check_tag(path: Path, name: WeightsName, written: Iterable[DType], wishes: Wishes) -> None:
    """Refuse to name weights for a dtype that they do not have, by a tag that is asked for or stays in a recast."""
    named = tag_dtype(name)
    floats = sorted({dtype.short_name for dtype in written if dtype.is_floating})
    held = wishes.dtype.short_name if wishes.dtype else " and ".join(floats)
    if named is None or not floats or named.short_name in ([held] if wishes.dtype else floats):
        return
    advice = f"Use --dtype {named.short_name}, or --variant {wishes.dtype.short_name if wishes.dtype else floats[0]}."
    raise BadRequest(path, f"would be named {name.variant} and hold {held}", advice)


def target_dtype(info: Tensor, wishes: Wishes, keep: Callable[[str], bool]) -> DType:
    """Give the dtype in which a tensor is written; integers, booleans and packed floats stay as they are."""
    if wishes.dtype is None or info.is_made or info.dtype.tag not in RECAST_SOURCES:
        return info.dtype
    if keep(info.name):
        return DTYPES["F32"]
    return info.dtype if stays_wider(info.dtype, len(info.shape), wishes.dtype) else wishes.dtype


def stays_wider(dtype: DType, dims: int, target: DType) -> bool:
    """Say whether a tensor keeps its dtype where 8 bits are asked for: norms, biases and scalars do.

    They take next to no room, and no library computes with them in 8 bits.
    """
    return target.bits == 8 and dims < 2 and dtype.bits > 8


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
    return find_quantized({info.name: info.dtype for info in checkpoint.tensors if not info.is_made})


def check_growth(checkpoint: Checkpoint, written: Sequence[Tensor], wishes: Wishes) -> tuple[str, ...]:
    """Note how much more the tensors that are written take than what holds them; refuse what would fill a disk.

    A tensor that ``torch.Tensor.expand`` made holds its elements many times over, and each is written.
    """
    read = [tensor for tensor in written if not tensor.is_made]
    if not wishes.expand:
        refuse_growth(checkpoint.weight_set.path, read)
    more = [tensor.nbytes - held for tensor in read if tensor.nbytes > (held := _held_nbytes(tensor))]
    if sum(more) < _NOTED_GROWTH_NBYTES:
        return ()
    return (f"its expanded tensors take {sum(more):,} bytes more than in the source",)


def refuse_growth(path: Path, tensors: Sequence[Tensor]) -> None:
    """Raise Unsupported for tensors that take far more when they are read in full than what holds them."""
    error = find_growth(path, tensors)
    if error:
        raise error


def find_growth(path: Path, tensors: Sequence[Tensor]) -> Unsupported | None:
    """Give the error for tensors that take far more when they are read in full than what holds them."""
    nbytes = sum(tensor.nbytes for tensor in tensors)
    if nbytes <= MAX_GROWTH_NBYTES:
        return None
    held = {storage: storage.stored_nbytes for tensor in tensors for storage in tensor.source.inputs()}
    source_nbytes = sum(held.values())
    if nbytes - source_nbytes > max(MAX_GROWTH_NBYTES, MAX_GROWTH * source_nbytes):
        largest = max(tensors, key=lambda tensor: tensor.nbytes - _held_nbytes(tensor, stored=True))
        return Unsupported(
            path,
            f"holds {source_nbytes:,} bytes of tensors, which would come out as {nbytes:,}: the largest is "
            f"{largest.name!r}, of {largest.nbytes:,} bytes in {_held_nbytes(largest, stored=True):,}",
            "'wconv to-safetensors --expand' writes them in full.",
        )
    return None


def _held_nbytes(tensor: Tensor, stored: bool = False) -> int:
    return sum(storage.stored_nbytes if stored else storage.nbytes for storage in tensor.source.inputs())


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


def cast_config(component: Component, config: dict[str, Any], dtype: DType) -> dict[str, Any]:
    """Give the config of a component whose weights are cast to a dtype, with the one that it is to be loaded in.

    transformers 5 takes it from there. No model runs in 8 bits, so of those nothing is said.
    """
    if dtype.bits < 16:
        return config
    edited: dict[str, Any] = with_dtype(config, dtype.torch_name)
    if not is_transformers(component) or any(isinstance(edited.get(key), str) for key in _DTYPE_KEYS):
        return edited
    return {**edited, _DTYPE_KEYS[1]: dtype.torch_name}


def with_dtype(config: Any, name: str) -> Any:
    """Give a config with another dtype, its sub-configs' too; transformers 5 writes ``dtype``, 4 ``torch_dtype``."""
    if not isinstance(config, dict):
        return config
    return {
        key: name if key in _DTYPE_KEYS and isinstance(value, str) else with_dtype(value, name)
        for key, value in config.items()
    }

"""Parts of checkpoints as distributed training writes them: what they are called, and what each alone is refused with.

A piece is a valid file, and often reads like a whole model: tensors of 0 elements, boxes of tensors under the names of
the whole, one rank's rows. So each is known by what it is called where its writer decides that, and by what it holds
where it may be renamed, and refused with the name of what reads it: the folder of all of them, or another tool.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatch
from itertools import islice
from typing import Any, NamedTuple

from converter.errors import BadFile, TrainingPiece, Where
from converter.formats.torch.rebuild import TensorRef
from converter.storage import Place, list_entries
from converter.tensors.base import Tensor, WeightsFile

_MAX_NAMED = 8
_ALL_RANKS = "Name the folder in which the *_model_states.pt and *_optim_states.pt of all ranks lie: wconv reads that."
_ALL_OF_DCP = "Name the folder in which .metadata and all of its .distcp files lie: wconv reads that."
_EMPTIED = (
    "The weights lie in the checkpoint of the training: name its folder, in which the *_model_states.pt and "
    "*_optim_states.pt of all ranks lie."
)
ACCELERATE = "Load it with accelerate, as it was trained, and save a FULL_STATE_DICT."
_SHARDED = (
    "Name the folder in which all of them lie, each called shard-00001-model-00001-of-00001.safetensors, as torch does."
)
_MEGATRON = "Megatron-LM's tools/checkpoint/convert.py, or Megatron-Bridge, makes a model of all ranks."
_META = "convert_llama_weights_to_hf.py of transformers makes a model of all of them."
_MISSING = "Put the files of all ranks into one folder: where ranks had disks of their own, each has some."
MIXED = "The folder holds files of several checkpoints: fetch one of them anew."
DEEPSPEED = "DeepSpeed's own checkpoint tools (ds_to_universal.py) read all ranks."

TENSOR_PARALLEL = ("is one rank's part of a tensor-parallel DeepSpeed checkpoint", DEEPSPEED)

# A rank's file of torch's writer for Hugging Face (``SHARDED_FILE_NAME`` in ``checkpoint/_hf_utils.py``).
DCP_SHARD = r"shard-(?P<rank>\d{5,9})-model-\d{5,9}-of-\d{5,9}\.safetensors"

# The note in its header that says where its boxes begin (``CUSTOM_METADATA_KEY`` there).
DCP_INFO = "DCP_SHARDING_INFO"

# DeepSpeed's files (``_get_zero_ckpt_prefix`` and others in ``deepspeed/runtime/engine.py``, ``ckpt_layer_path`` in
# ``pipe/module.py``; very old ones lack a ``_``), and the folder that a universal checkpoint has for its parameters.
ZERO_PIECES = (
    r"((bf16_|fp16_)?zero_pp_rank_\d+_|expp_rank_\d+_|(layer_\d+_)?expert_\d+_)?mp_rank_\d+_?(model|optim)_states\.pt"
    r"|layer_\d+-model_\d+.*-model_states\.pt"
)
ZERO_HEAD = r"(zero_pp_rank_\d+_)?mp_rank_\d+_model_states\.pt"
ZERO_MODEL = r"zero_pp_rank_(\d{1,9})_mp_rank_0+_model_states\.pt"
ZERO_OPTIMIZER = r"(?:bf16_|fp16_)?zero_pp_rank_(\d{1,9})_mp_rank_0+_?optim_states\.pt"
ZERO_UNIVERSAL = "zero"

# What is said of folders, and what to do about it.
DCP_OF_MEGATRON = ("is a checkpoint of Megatron (torch_dist)", _MEGATRON)
DCP_BY_RANKS = (
    "is a checkpoint of torch.distributed.checkpoint (DCP) of which each rank keeps its own .metadata",
    "Load it with torch.distributed.checkpoint, as it was saved, and save it with use_collectives=True.",
)
DCP_UNFINISHED = (
    "holds pieces of torch.distributed.checkpoint (DCP) and no .metadata: it was never finished",
    "Take a checkpoint of an earlier step.",
)

# By verl and SkyRL, and by accelerate; ``of`` is all that those of one checkpoint share.
RANKS = (
    r"(?P<of>model_world_size_(?P<world>\d{1,6})_rank_(?=\d+\.pt)|pytorch_model_fsdp(_\d+)?_rank(?=\d+\.bin))"
    r"(?P<rank>0|[1-9]\d{0,5})\.(pt|bin)"
)


class _Name(NamedTuple):
    """A name that a trainer gives to a piece; with a ``sibling`` only where that lies beside it, by a pattern."""

    pattern: str
    problem: str
    advice: str
    sibling: str = ""


# Of a file, after that of its folder. ``deepspeed/runtime/engine.py`` and ``pipe/module.py``, ``accelerate/utils/
# fsdp_utils.py``, ``verl/utils/checkpoint/fsdp_checkpoint_manager.py``, ``megatron/training/checkpointing.py``, Meta's
# ``llama/generation.py``, ``vllm/model_executor/model_loader/sharded_state_loader.py``.
_NAMES = (
    _Name(r".*/(layer_\d+(-model_\d+|_expert_\d+_mp_rank_\d+)|(expp_rank|expert)_\d+_mp_rank_\d+).*"
          r"[-_](model|optim)_states\.pt",
          "is one layer's or one expert's part of a DeepSpeed checkpoint", DEEPSPEED),
    _Name(r".*/([a-z0-9]+_)*mp_rank_0*[1-9]\d*_?(model|optim)_states\.pt", *TENSOR_PARALLEL),
    _Name(r".*/mp_rank_0+_model_states\.pt", *TENSOR_PARALLEL, "mp_rank_*1_model_states.pt"),
    _Name(r".*/zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt",
          "is one rank's part of a DeepSpeed ZeRO-3 checkpoint, whose tensors are empty here", _ALL_RANKS),
    _Name(r".*/(bf16_|fp16_)?zero_pp_rank_\d+_mp_rank_\d+_?optim_states\.pt",
          "is one rank's part of a DeepSpeed optimizer, with the float32 weights cut up", _ALL_RANKS),
    _Name(r".*/(pytorch_model|model)_fsdp(_\d+)?_rank_?\d+\.(bin|pt)",
          "is one rank's part of a model, as accelerate's FSDP saves it", ACCELERATE),
    _Name(r".*/(optim|extra_state)_world_size_\d+_rank_\d+\.pt",
          "is what one rank's trainer goes on from, as verl saves it",
          "The weights are in the files model_world_size_*: name their folder, or one of them."),
    _Name(r"mp_rank_\d+(_\d+)*/.*\.(pt|pth|bin)",
          "is one rank's part of a Megatron checkpoint", _MEGATRON, "../mp_rank_*1*"),
    _Name(r".*/consolidated\.\d+\.pth",
          "is one of several parts that each hold slices of the same tensors, as Meta cuts its models", _META,
          "consolidated.*1.pth"),
    _Name(r".*/model-rank-\d+-part-\d+\.safetensors",
          "is one rank's part of a model, as vLLM cuts it", "vLLM loads it with load_format='sharded_state'.",
          "model-rank-1-part-*.safetensors"),
    _Name(r".*/[^/]+\.distcp", "is a piece of a checkpoint of torch.distributed.checkpoint (DCP)", _ALL_OF_DCP),
    _Name(r".*/[^/]+\.nemo", "is an archive of NeMo, which holds its config and checkpoint as files",
          "Unpack it with tar; Megatron-Bridge or NeMo's export makes a Hugging Face model of it."),
)  # fmt: skip


def check_name(place: Place) -> None:
    """Raise TrainingPiece for a file that is called as a trainer calls a piece."""
    folder = place.absolute().parent
    spelled = f"{folder.name}/{place.name}"
    for row in _NAMES:
        if re.fullmatch(row.pattern, spelled) and (not row.sibling or _is_there(folder, row.sibling)):
            raise TrainingPiece(place, row.problem, row.advice)


def _is_there(folder: Place, pattern: str) -> bool:
    up, _, name = pattern.rpartition("/")
    return any(fnmatch(entry.name, name) for entry in list_entries(folder.parent if up else folder))


def check_ranks(folder: Place, what: str, names: Mapping[int, str], world: int) -> None:
    """Raise BadFile where not just so many ranks have a file; there may be far more than can be gone through."""
    missing = world - sum(rank < world for rank in names)
    if missing:
        lost = (rank for rank in range(world) if rank not in names)
        spelled = [f"{rank:,}" for rank in islice(lost, min(missing, _MAX_NAMED))]
        spelled += [f"{missing - _MAX_NAMED:,} more"] if missing > _MAX_NAMED else []
        *but_last, last = spelled
        ranks = f"ranks {', '.join(but_last)} and {last}" if but_last else f"rank {last}"
        raise BadFile(folder, f"is not whole: the {what} of {ranks} of {world:,} are not there", _MISSING)
    if len(names) > world:
        raise BadFile(folder, f"was saved by {world:,} ranks, and holds {names[max(names)]} too", MIXED)


def check_content(file: WeightsFile) -> None:
    """Raise TrainingPiece for a file whose header, or whose tensors, say that it is a piece."""
    if DCP_INFO in file.metadata:
        problem = "holds pieces of tensors under the names of the whole, as torch.distributed.checkpoint cuts them"
        raise TrainingPiece(file.place, problem, _SHARDED)
    emptied = _find_emptied(file.tensors)
    if emptied:
        problem = f"was saved under DeepSpeed ZeRO-3 without its weights: {len(emptied):,} tensors have no elements"
        raise TrainingPiece(file.place, f"{problem}, such as {emptied[0]!r}", _EMPTIED)


def _find_emptied(tensors: Iterable[Tensor]) -> list[str]:
    """Name weights of the one shape ``[0]``, which ZeRO-3 leaves of what it has moved away; none if it is but one."""
    names = [name for name, source, _ in tensors if source.shape == (0,) and name.endswith("weight")]
    return names if len(names) > 1 else []


def _is_zero_3(value: Mapping[Any, Any]) -> bool:
    module = value.get("module")
    held = module.values() if "param_shapes" in value and isinstance(module, dict) else ()
    return any(type(one) is TensorRef and 0 in one.shape for one in held)


def _is_zero_optimizer(value: Mapping[Any, Any]) -> bool:
    inner = value.get("optimizer_state_dict")
    return isinstance(inner, dict) and "partition_count" in inner


def _is_tensor_parallel(value: Mapping[Any, Any]) -> bool:
    count = value.get("mp_world_size")
    return "module" in value and type(count) is int and count > 1


_CONTENTS: tuple[tuple[Callable[[Mapping[Any, Any]], bool], str, str], ...] = (
    (_is_zero_3, "is one rank's part of a DeepSpeed ZeRO-3 checkpoint, whose tensors are empty here", _ALL_RANKS),
    (_is_zero_optimizer, "is one rank's part of a DeepSpeed optimizer, with the float32 weights cut up", _ALL_RANKS),
    (_is_tensor_parallel, *TENSOR_PARALLEL),
)


def check_pickled(value: Any, where: Where) -> None:
    """Raise TrainingPiece for what a pickle holds if a trainer's own keys say that it is a piece."""
    for is_piece, problem, advice in _CONTENTS if isinstance(value, dict) else ():
        if is_piece(value):
            raise TrainingPiece(where, problem, advice)

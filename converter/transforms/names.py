"""Other names for tensors: a prefix that goes, what wrappers have put into them, or any others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from converter.errors import BadRequest, Unsupported
from converter.models.checkpoint import Checkpoint
from converter.models.component import Component
from converter.tensors.base import WeightsFile

# The attribute under which each keeps what it wraps: ``OptimizedModule`` (``torch/_dynamo/eval_frame.py``),
# ``FullyShardedDataParallel`` (``torch/distributed/fsdp/_common_utils.py``) and ``CheckpointWrapper``
# (``torch/distributed/algorithms/_checkpoint/checkpoint_wrapper.py``). No model has such a name of its own, so they go
# wherever they stand, as in ``fsdp2_canonicalize_names`` of ``accelerate/utils/fsdp_utils.py``.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# That of ``DataParallel``, ``DistributedDataParallel`` and DeepSpeed's engine; a model's own part may be called so.
_DATA_PARALLEL = "module"


def with_own_names(checkpoint: Checkpoint, component: Component, prefix: str) -> Checkpoint:
    """Take off names a prefix that is asked for, if any, and what wrappers put into them; raises what these two do."""
    if prefix:
        checkpoint = strip_prefix(checkpoint, prefix)
    return unwrap(checkpoint, bool(component.class_names))


def strip_prefix(checkpoint: Checkpoint, prefix: str) -> Checkpoint:
    """Take a prefix off the names of all tensors that have it.

    Raises BadRequest where none has it, or where two tensors would come to one name.
    """
    path = checkpoint.weight_set.path
    before = [tensor.name for tensor in checkpoint.tensors]
    if not any(name.startswith(prefix) for name in before):
        problem = f"has no tensor whose name begins with {prefix!r}"
        raise BadRequest(path, problem, "'wconv inspect --tensors' lists them.")
    names = {name: name.removeprefix(prefix) for name in (*before, *checkpoint.ties)}
    if len({names[name] for name in before}) < len(before):
        raise BadRequest(path, f"would hold two tensors of one name without the prefix {prefix!r}")
    return rename_tensors(checkpoint, names)


def unwrap(checkpoint: Checkpoint, is_known: bool) -> Checkpoint:
    """Take off what wrappers of torch put into the names of tensors, where it ``is_known`` which model that is.

    ``module.`` goes where all names begin with it. A note says what was taken off, or how it would be. Raises
    Unsupported where two tensors would come to one name.
    """
    before = [tensor.name for tensor in checkpoint.tensors]
    names = _without_wrappers((*before, *checkpoint.ties))
    changed = sum(names[name] != name for name in before)
    if not changed:
        return checkpoint
    if not is_known:
        return replace(checkpoint, notes=(*checkpoint.notes, _note_wrappers(before)))
    if len({names[name] for name in before}) < len(before):
        problem = "holds two tensors that come to one name once what wrappers put into their names is taken off"
        raise Unsupported(checkpoint.weight_set.path, problem, "Save the model that is wrapped.")
    found = f"{_wrappers_in(before)} is taken off the names of {changed:,} tensors"
    note = f"{found}: a wrapper's, and no part of what the model's own class has"
    return replace(rename_tensors(checkpoint, names), notes=(*checkpoint.notes, note))


def find_wrappers(names: Sequence[str]) -> str:
    """List what would be taken off names as a wrapper's; nothing where they are a model's own."""
    inner = _without_wrappers(names)
    return _wrappers_in(names) if any(inner[name] != name for name in names) else ""


def _without_wrappers(names: Sequence[str]) -> dict[str, str]:
    inner = {name: _without(name) if any(one in name for one in _WRAPPERS) else name for name in names}
    prefix = f"{_DATA_PARALLEL}."
    while inner and all(name.startswith(prefix) for name in inner.values()):
        inner = {name: left.removeprefix(prefix) for name, left in inner.items()}
    return inner


def _without(name: str) -> str:
    *path, last = name.split(".")
    return ".".join((*(part for part in path if part not in _WRAPPERS), last))


def _wrappers_in(names: Sequence[str]) -> str:
    """List what wrappers are known by in names."""
    parts = {part for name in names for part in name.split(".")[:-1]}
    leading = [_DATA_PARALLEL] if _DATA_PARALLEL in _leading_wrappers(names).split(".") else []
    return ", ".join(f"{part}." for part in (*leading, *(part for part in _WRAPPERS if part in parts)))


def _leading_wrappers(names: Sequence[str]) -> str:
    """Give what all names begin with, as far as that is wrappers'."""
    prefix = ""
    for part in names[0].split(".")[:-1]:
        longer = f"{prefix}{part}."
        if part not in (_DATA_PARALLEL, *_WRAPPERS) or not all(name.startswith(longer) for name in names):
            break
        prefix = longer
    return prefix


def _note_wrappers(names: Sequence[str]) -> str:
    prefix = _leading_wrappers(names)
    if prefix:
        return f"names of its tensors begin with {prefix}, as a wrapper has them: --strip-prefix {prefix} takes it off"
    found = _wrappers_in(names)
    return f"names of its tensors hold {found} as wrappers have it: it is taken off where a config.json names a class"


def rename_tensors(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """Give all tensors other names, which must be different from each other, in the notes on ties too."""
    ties = checkpoint.ties

    def rename(file: WeightsFile) -> WeightsFile:
        notes = {key: note for key, note in file.metadata.items() if key not in ties}
        notes |= {names.get(key, key): names[ties[key]] for key in file.metadata if key in ties}
        tensors = tuple(tensor._replace(name=names[tensor.name]) for tensor in file.tensors)
        return replace(file, tensors=tensors, metadata=notes)

    return replace(checkpoint, files=tuple(map(rename, checkpoint.files)), is_renamed=True)

"""Other names for tensors: a prefix that goes, or any others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from converter.errors import BadRequest
from converter.models.checkpoint import Checkpoint
from converter.tensors.base import WeightsFile


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


def rename_tensors(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """Give all tensors other names, which must be different from each other, in the notes on ties too."""
    ties = checkpoint.ties

    def rename(file: WeightsFile) -> WeightsFile:
        notes = {key: note for key, note in file.metadata.items() if key not in ties}
        notes |= {names.get(key, key): names[ties[key]] for key in file.metadata if key in ties}
        tensors = tuple(tensor._replace(name=names[tensor.name]) for tensor in file.tensors)
        return replace(file, tensors=tensors, metadata=notes)

    return replace(checkpoint, files=tuple(map(rename, checkpoint.files)), is_renamed=True)

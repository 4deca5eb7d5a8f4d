"""Other names for tensors: a prefix that goes, or any others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from converter.errors import BadRequest
from converter.models.checkpoint import Checkpoint


def strip_prefix(checkpoint: Checkpoint, prefix: str) -> Checkpoint:
    """Take a prefix off the names of all tensors that have it.

    Raises BadRequest where none has it, or where two tensors would come to one name.
    """
    path = checkpoint.weight_set.path
    before = [tensor.name for tensor in checkpoint.tensors]
    after = {name: name.removeprefix(prefix) for name in before}
    if list(after.values()) == before:
        raise BadRequest(
            path, f"has no tensor whose name begins with {prefix!r}", "'wconv inspect --tensors' lists them."
        )
    if len(set(after.values())) < len(after):
        raise BadRequest(path, f"would hold two tensors of one name without the prefix {prefix!r}")
    return rename_tensors(checkpoint, after)


def rename_tensors(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """Give all tensors other names, which must be different from each other."""
    files = tuple(
        replace(file, tensors=tuple(tensor._replace(name=names[tensor.name]) for tensor in file.tensors))
        for file in checkpoint.files
    )
    return replace(checkpoint, files=files)

"""A whole checkpoint by a table of rows, each tensor in the file of the first that it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from converter.errors import BadFile
from converter.models.checkpoint import Checkpoint
from converter.tensors.base import Tensor
from converter.transforms.layouts.rows import Row, put_together, take_apart, wholes_of


def rearranged(checkpoint: Checkpoint, rows: Sequence[Row], apart: bool) -> Checkpoint:
    """Take the wholes of a checkpoint ``apart`` by a table, or put its parts together; the rest stays as it is.

    Names that ties note change with the others. Raises BadFile for tensors that a row cannot take, or that come to one
    name.
    """
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors}
    converted, left = _read(tensors, rows, apart)
    made = {tensor.name: tensor for tensor in converted}
    for name in left:
        if name in made:
            problem = f"holds {name!r}, and other tensors that would be called so in the other layout"
            raise BadFile(checkpoint.weight_set.path, problem)
    wholes = wholes_of(made if apart else tensors, rows)
    behind: dict[str, list[Tensor]] = {}  # what comes in the place of which tensor
    if apart:
        for name, tensor in made.items():
            behind.setdefault(wholes[name], []).append(tensor)
    else:
        firsts: dict[str, str] = {}
        for name in tensors:
            if name in wholes:
                firsts.setdefault(wholes[name], name)
        behind = {first: [made[whole]] for whole, first in firsts.items()}
    stays = set(left)
    noted = _renamed_ties(checkpoint, tensors, rows, apart)
    files = (
        replace(
            file,
            tensors=tuple(
                new for old in file.tensors for new in ([old] if old.name in stays else behind.get(old.name, ()))
            ),
            metadata={noted.get(key, key): noted.get(note, note) if key in noted else note
                      for key, note in file.metadata.items()},
        )
        for file in checkpoint.files
    )  # fmt: skip
    return replace(checkpoint, files=tuple(files), is_renamed=True)


def _read(tensors: Mapping[str, Tensor], rows: Sequence[Row], apart: bool) -> tuple[list[Tensor], list[str]]:
    return take_apart(tensors, rows) if apart else put_together(tensors, rows)


def _renamed_ties(
    checkpoint: Checkpoint, tensors: Mapping[str, Tensor], rows: Sequence[Row], apart: bool
) -> dict[str, str]:
    """Map the names in the notes on ties, of both tensors, to those that they have in the other layout."""
    renamed: dict[str, str] = {}
    for dropped, kept in checkpoint.ties.items():
        for name in (dropped, kept):
            converted, _ = _read({name: tensors[kept]._replace(name=name)}, rows, apart)
            renamed[name] = converted[0].name if len(converted) == 1 else name
    return renamed

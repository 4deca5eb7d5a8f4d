"""A whole checkpoint by a table of rows, each tensor in the file of the first that it is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from converter.errors import BadFile
from converter.models.checkpoint import Checkpoint
from converter.tensors.base import Tensor, WeightsFile
from converter.transforms.layouts.rows import Row, put_together, take_apart, wholes_of


def rearranged(checkpoint: Checkpoint, rows: Sequence[Row], apart: bool) -> Checkpoint:
    """Take the wholes of a checkpoint ``apart`` by a table, or put its parts together; the rest stays as it is.

    Names that are noted as ties change with the others. Raises BadFile for tensors that a row cannot take, or that come
    to one name.
    """
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors}
    converted, left = _read(tensors, rows, apart)
    made = {tensor.name: tensor for tensor in converted}
    for name in left:
        if name in made:
            problem = f"holds {name!r}, and other tensors that would be called so in the other layout"
            raise BadFile(checkpoint.weight_set.path, problem)
    becomes = _new_names(tensors, made, rows, apart)
    noted = _renamed_ties(checkpoint, tensors, rows, apart)

    def placed(file: WeightsFile) -> Iterator[Tensor]:
        for old in file.tensors:
            if old.name not in becomes:
                yield old
            # What is made of several comes in the place of the first of them.
            yield from (made.pop(name) for name in becomes.get(old.name, ()) if name in made)

    def converted_file(file: WeightsFile) -> WeightsFile:
        notes = {noted.get(key, key): noted[note] if key in noted else note for key, note in file.metadata.items()}
        return replace(file, tensors=tuple(placed(file)), metadata=notes)

    files = tuple(map(converted_file, checkpoint.files))
    asked = {old: becomes.get(new, (new,)) for old, new in checkpoint.renamed.items()}
    renamed = {old: new[0] for old, new in asked.items() if len(new) == 1}
    return replace(checkpoint, files=files, is_renamed=True, renamed=renamed)


def _read(tensors: Mapping[str, Tensor], rows: Sequence[Row], apart: bool) -> tuple[list[Tensor], list[str]]:
    return take_apart(tensors, rows) if apart else put_together(tensors, rows)


def _new_names(
    tensors: Mapping[str, Tensor], made: Mapping[str, Tensor], rows: Sequence[Row], apart: bool
) -> dict[str, tuple[str, ...]]:
    """Map the names of all tensors that do not stay as they are to those of what is made of them."""
    if not apart:
        return {part: (whole,) for part, whole in wholes_of(tensors, rows).items()}
    parts: dict[str, list[str]] = {}
    for part, whole in wholes_of(made, rows).items():
        parts.setdefault(whole, []).append(part)
    return {whole: tuple(names) for whole, names in parts.items()}


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

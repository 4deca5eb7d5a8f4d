"""A whole checkpoint by a table of rows, each tensor in the file of the first that it is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from converter.errors import BadFile, Unsupported
from converter.models.checkpoint import Checkpoint
from converter.tensors.base import Tensor, WeightsFile
from converter.transforms.layouts.operations import KEEP, Operation
from converter.transforms.layouts.rows import Row, fill, find_leaf, put_together, take_apart, tree_of, wholes_of


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
    noted = _renamed_ties(checkpoint, rows, apart)

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


def _renamed_ties(checkpoint: Checkpoint, rows: Sequence[Row], apart: bool) -> dict[str, str]:
    """Map the names in the notes on ties, of both tensors, to those that they have in the other layout.

    Raises Unsupported where what has two names is not one tensor there.
    """
    tree = tree_of((name, row) for row in rows for name in ((row.whole,) if apart else row.parts))
    renamed: dict[str, str] = {}

    def operation_on(name: str) -> Operation | None:
        row, words = find_leaf(tree, name.split(".")) or (None, ())
        renamed[name] = fill(row.parts[0] if apart else row.whole, words, 0) if row else name
        return (row.operation if len(row.parts) == 1 and not row.counts else None) if row else KEEP

    for dropped, kept in checkpoint.ties.items():
        done = operation_on(dropped), operation_on(kept)
        if done[0] != done[1] or done[0] is None:
            problem = f"notes that {dropped!r} is {kept!r}, and they are not one tensor in the other layout"
            raise Unsupported(checkpoint.weight_set.path, problem, "Convert it with --tied duplicate first.")
    return renamed

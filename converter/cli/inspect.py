"""``wconv inspect``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converter.cli.options import source_arg

if TYPE_CHECKING:
    from converter.models.checkpoint import Checkpoint
    from converter.models.folder import Component, ModelFolder

_KINDS = {
    "file": "a weight set",
    "folder": "a folder of weights",
    "component": "a Diffusers model",
    "transformers": "a transformers model",
    "pipeline": "a Diffusers pipeline",
    "sentence-transformers": "a sentence-transformers model",
}
# What a pickle does with a global that no state dict needs, and what becomes of that here.
_HOW = {
    "names": "names what it does not use",
    "makes": "makes an object, left out here, of",
    "calls": "would call, and never does here",
}


@click.command("inspect", short_help="Show which weights a file or folder holds; reads headers only.")
@source_arg
@click.option("--tensors", "with_tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(source: Path, with_tensors: bool, as_json: bool) -> None:
    """Show which weights SRC holds, by component and variant, and what else is there. Reads headers only."""
    from converter.cli.output import show_json
    from converter.formats.torch.state_dict import Reading
    from converter.models.checkpoint import open_checkpoint
    from converter.models.folder import open_folder

    folder = open_folder(source)
    reading = Reading(strip_code=True, skip_unreadable=True, lenient=True)
    sets = [
        _describe(component, open_checkpoint(weight_set, reading), with_tensors)
        for component in folder.components
        for weight_set in component.weight_sets
    ]
    content = {
        "path": str(folder.path),
        "kind": folder.kind,
        "class": folder.class_name or folder.components[0].class_name,
        "weight_sets": sets,
        **_describe_rest(folder),
    }
    if as_json:
        show_json(content)
    else:
        _show(content)


def _describe(component: Component, checkpoint: Checkpoint, with_tensors: bool) -> dict[str, Any]:
    from converter.tensors.base import find_ties

    tensors = checkpoint.tensors
    content: dict[str, Any] = {
        "component": component.name,
        "weights": checkpoint.name.stem,
        "format": checkpoint.format,
        "variant": checkpoint.name.variant,
        "files": list(checkpoint.weight_set.file_names),
        "index": checkpoint.weight_set.index_name,
        "tensors": len(tensors),
        "parameters": sum(info.numel for info in tensors),
        "nbytes": sum(info.nbytes for info in tensors),
        "dtypes": dict(Counter(info.dtype.tag for info in tensors).most_common()),
        "tied": {**find_ties(tensors), **checkpoint.ties},
        "notes": list(checkpoint.notes),
        "globals": {name: how for file in checkpoint.files for name, how in file.foreign.items()},
    }
    if with_tensors:
        content["all_tensors"] = [
            {"name": i.name, "dtype": i.dtype.tag, "shape": list(i.shape), "file": i.file.name if i.file else ""}
            for i in tensors
        ]
    return content


def _describe_rest(folder: ModelFolder) -> dict[str, list[str]]:
    from converter.models.folder import find_rest

    rest: dict[str, list[str]] = {"not_weights": [], "other_weights": [], "training_state": [], "linked": []}
    for one in find_rest(folder) if folder.kind != "file" else ():
        marks = (("training_state", one.is_training), ("other_weights", one.is_weights), ("linked", one.is_linked))
        kind = next((name for name, is_so in marks if is_so), "not_weights")
        rest[kind].append(one.path.relative_to(folder.root).as_posix())
    return rest


def _show(content: dict[str, Any]) -> None:
    from converter.cli.output import echo, printable, show_bytes, show_count, show_table

    suffix = f" ({content['class']})" if content["class"] else ""
    echo(printable(f"{content['path']}: {_KINDS[content['kind']]}{suffix}") + "\n")
    header = ("component", "weights", "format", "variant", "files", "tensors", "parameters", "size", "dtypes")
    rows = []
    for found in content["weight_sets"]:
        files = str(len(found["files"])) + (" + index" if found["index"] else "")
        rows.append(
            (found["component"] or ".", found["weights"], found["format"], found["variant"] or "-", files,
             f"{found['tensors']:,}", show_count(found["parameters"]), show_bytes(found["nbytes"]),
             ", ".join(found["dtypes"]) or "-")
        )  # fmt: skip
    show_table(header, rows)
    echo()
    for found in content["weight_sets"]:
        for dropped, kept in found["tied"].items():
            echo(printable(f"tied: {dropped} is {kept}"))
        for note in found["notes"]:
            echo(printable(f"note: {note}"))
        for name, how in found["globals"].items():
            echo(printable(f"its pickle {_HOW[how]}: {name}"))
    if content["other_weights"]:
        echo(f"other weights: {', '.join(map(printable, content['other_weights']))}")
    if content["training_state"]:
        echo(f"training state: {', '.join(map(printable, content['training_state']))}")
    if content["not_weights"]:
        echo(f"not weights: {', '.join(map(printable, content['not_weights']))}")
    if content["linked"]:
        echo(f"links to other places: {', '.join(map(printable, content['linked']))}")
    for found in content["weight_sets"]:
        if "all_tensors" in found:
            echo("\n" + printable(f"{found['component'] or '.'} {found['weights']} {found['variant'] or ''}").rstrip())
            tensors = found["all_tensors"]
            show_table(
                ("tensor", "dtype", "shape", "file"),
                [(one["name"], one["dtype"], str(one["shape"]), one["file"]) for one in tensors],
            )

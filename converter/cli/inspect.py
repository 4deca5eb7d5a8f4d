"""``wconv inspect``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from converter.cli.options import source_arg
from converter.cli.terminal import echo, printable, show_bytes, show_commits, show_count, show_json, show_table
from converter.errors import name_some

if TYPE_CHECKING:
    from converter.errors import WconvError
    from converter.models.checkpoint import Checkpoint
    from converter.models.component import Component, WeightSet
    from converter.models.model import Model
    from converter.storage import Place
    from converter.tensors.base import Tensor
    from converter.transforms.lora.describe import Description

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
    "holds": "holds modules, whose tensors are taken, of the classes",
}
_MAX_NAMED = 8  # of the globals of a pickle; --json has all
# What else lies in a folder, in the order that it is shown.
_REST = {
    "other_weights": "other weights",
    "training_state": "training state",
    "not_weights": "not weights",
    "linked": "links to other places",
}


@click.command("inspect")
@source_arg
@click.option("--tensors", "with_tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(source: Place, with_tensors: bool, as_json: bool) -> int:
    """Show which weights SRC holds, by component and variant, and what else is there. Reads headers only.

    SRC is a file, an index or a folder, or a URL of one, such as hf://owner/name or s3://bucket/folder. Of quantized
    weights the few bytes are read too that say how, and the numbers are counted that they stand for; of a LoRA adapter
    its alphas.

    What cannot be read is shown with what is wrong; the exit code is then that of the worst.
    """
    from converter.models.inventory import take_inventory
    from converter.models.model import model_of
    from converter.storage import UNLISTED

    inventory = take_inventory(source)
    model = model_of(inventory)
    described = [_describe(owner, one, with_tensors) for owner in model.components for one in owner.weight_sets]
    errors = {str(error): error for _, error in described if error}
    if len(described) == len(errors) == 1:
        raise next(iter(errors.values()))  # there is nothing that it hides
    rest, error = _describe_rest(model)
    errors |= {str(error): error for error in (*inventory.problems, error) if error}
    content = {
        "path": str(model.path),
        **({"commit": model.path.store.commit_id} if model.path.store.commit_id else {}),
        "kind": model.kind,
        "class": model.class_name or model.components[0].class_name,
        "weight_sets": [found for found, _ in described],
        **rest,
        **({"notes": [f"{UNLISTED} shown"]} if model.kind != "file" and not model.root.store.lists_all else {}),
        **({"errors": list(errors)} if errors else {}),
    }
    if as_json:
        show_json(content)
    else:
        show_commits(model.path)
        _show(content)
    for text in errors:
        click.echo(printable(text), err=True)
    return min((error.exit_code for error in errors.values()), default=0)


def _describe(
    component: Component, weight_set: WeightSet, with_tensors: bool
) -> tuple[dict[str, Any], WconvError | None]:
    """Say what a set holds; of one that cannot be read what its names say, and why."""
    from converter.errors import WconvError
    from converter.formats.torch.state_dict import Reading
    from converter.models.checkpoint import open_checkpoint

    content: dict[str, Any] = {
        "component": component.name,
        "weights": weight_set.name.stem,
        "format": weight_set.format,
        "variant": weight_set.name.variant,
        "files": [*weight_set.file_names, *weight_set.pieces],
        "index": weight_set.index_name,
    }
    try:
        checkpoint = open_checkpoint(weight_set, Reading(strip_code=True, skip_unreadable=True, lenient=True))
    except WconvError as error:
        return {**content, "error": str(error)}, error
    return {**content, **_describe_tensors(component, checkpoint, with_tensors)}, None


def _totals(tensors: Sequence[Tensor]) -> dict[str, Any]:
    return {
        "tensors": len(tensors),
        "parameters": sum(info.numel for info in tensors),
        "nbytes": sum(info.nbytes for info in tensors),
        "dtypes": dict(Counter(info.dtype.tag for info in tensors).most_common()),
    }


def _describe_tensors(component: Component, checkpoint: Checkpoint, with_tensors: bool) -> dict[str, Any]:
    from converter.models.names import fold_modules
    from converter.tensors.base import find_ties
    from converter.transforms.quantize.stock import take_stock

    tensors = checkpoint.tensors
    adapter = _describe_adapter(component, checkpoint)
    stock = take_stock(component, checkpoint)
    content: dict[str, Any] = {
        "format": checkpoint.format,
        **_totals(tensors),
        "parameters": stock.parameters,
        "tied": {**find_ties(tensors), **checkpoint.ties},
        "quantized": [{**share._asdict(), "bits_per_weight": share.bits_per_weight} for share in stock.shares],
        "notes": [
            *checkpoint.notes,
            *([f"quantized weights are not counted: {stock.error.where} {stock.error.problem}"] if stock.error else ()),
            *(_say_unknown(component) if not stock.shares else ()),
            *(adapter.problems if adapter else ()),
        ],
        "globals": {name: how for file in checkpoint.files for name, how in file.foreign.items()},
    }
    layout = "" if component.class_name or adapter else _name_layout(checkpoint)
    if layout:
        content["layout"] = layout
    if adapter:
        content["adapter"] = {name: value for name, value in adapter._asdict().items() if name != "problems"}
    if stock.shares:
        content["plain"] = {
            **_totals(stock.plain),
            "names": list(fold_modules(info.name for info in sorted(stock.plain, key=lambda info: -info.nbytes))),
        }
    if with_tensors:
        content["all_tensors"] = [
            {"name": i.name, "dtype": i.dtype.tag, "shape": list(i.shape), "file": i.file.name if i.file else ""}
            for i in tensors
        ]
    return content


def _name_layout(checkpoint: Checkpoint) -> str:
    """Say what a file is in the layout of its trainer, if it is; the tables are loaded for what no config names."""
    from converter.transforms.single_file.families import name_kind

    return name_kind(checkpoint)


def _describe_adapter(component: Component, checkpoint: Checkpoint) -> Description | None:
    """Describe a LoRA adapter, if a set is one."""
    from converter.models.adapters import find_adapter, may_be_adapter, open_adapter_config

    if not may_be_adapter(checkpoint):
        return None
    adapter = find_adapter(checkpoint, open_adapter_config(component))
    if adapter is None:
        return None
    from converter.transforms.lora.describe import describe

    return describe(adapter)


def _say_unknown(component: Component) -> list[str]:
    """Say that a config has weights quantized of which none are known to be."""
    from converter.models.component import quantization_of

    said = quantization_of(component.config)
    if not said:
        return []
    name = str(said.get("quant_method", ""))[:60]
    return [f"its config.json says that it is quantized ({name!r}), and no weights are in a form that wconv knows"]


def _describe_rest(model: Model) -> tuple[dict[str, list[str]], WconvError | None]:
    """Give what else is in a folder, by kinds, and what kept more of it from being seen."""
    from converter.errors import WconvError
    from converter.models.rest import find_rest

    rest: dict[str, list[str]] = {"not_weights": [], "other_weights": [], "training_state": [], "linked": []}
    try:
        for one in find_rest(model) if model.kind != "file" else ():
            marks = (("training_state", one.is_training), ("other_weights", one.is_weights), ("linked", one.is_linked))
            kind = next((name for name, is_so in marks if is_so), "not_weights")
            rest[kind].append(one.path.relative_to(model.root))
    except WconvError as error:
        return rest, error
    return rest, None


def _show(content: dict[str, Any]) -> None:
    from converter.models.names import fold_numbers

    suffix = f" ({content['class']})" if content["class"] else ""
    echo(printable(f"{content['path']}: {_KINDS[content['kind']]}{suffix}") + "\n")
    header = ("component", "weights", "format", "variant", "files", "tensors", "parameters", "size", "dtypes")
    show_table(header, map(_row_of, content["weight_sets"]))
    echo()
    for described in content["weight_sets"]:
        if "error" not in described:
            _show_remarks(described)
    for key, title in _REST.items():
        if content[key]:
            echo(f"{title}: {', '.join(map(printable, fold_numbers(content[key])))}")
    for note in content.get("notes", ()):
        echo(f"note: {note}")
    for described in content["weight_sets"]:
        if "all_tensors" in described:
            _show_tensors(described)


def _row_of(described: dict[str, Any]) -> tuple[str, ...]:
    files = str(len(described["files"])) + (" + index" if described["index"] else "")
    # A training checkpoint has no name of its own, but for the folder around it.
    around = "" if described["index"] else described["files"][0].rpartition("/")[0]
    named = (around or described["weights"], described["format"], described["variant"] or "-")
    row = (described["component"] or ".", *named, files)
    if "error" in described:
        return (*row, "-", "-", "-", described["error"])
    counts = (f"{described['tensors']:,}", _show_parameters(described["parameters"]), show_bytes(described["nbytes"]))
    return (*row, *counts, ", ".join(described["dtypes"]) or "-")


def _show_parameters(count: int | None) -> str:
    return "-" if count is None else show_count(count)


def _show_quantized(described: dict[str, Any]) -> None:
    of = f" of {described['component']}" if described["component"] else ""
    for share in described["quantized"]:
        count, bits = share["parameters"], share["bits_per_weight"]
        known = f", {show_count(count)} parameters in {bits:.4g} bits a weight" if count else ""
        told = f"{share['weights']:,} weights{known}, {show_bytes(share['nbytes'])}: {share['scheme']}"
        echo(printable(f"quantized{of}: {told}"))
    if described["quantized"]:
        plain = described["plain"]
        held = (
            f"{plain['tensors']:,} tensors, {show_count(plain['parameters'])} parameters, {show_bytes(plain['nbytes'])}"
        )
        dtypes = ", ".join(plain["dtypes"]) or "none"
        names = f": {name_some(plain['names'], _MAX_NAMED)}" if plain["names"] else ""
        echo(printable(f"plain{of}: {held} ({dtypes}){names}"))


# Whose names an adapter has.
_FORMS = {"peft": "PEFT", "diffusers": "Diffusers", "kohya": "kohya", "comfyui": "the trainer of its model"}


def _show_adapter(described: dict[str, Any]) -> None:
    """Say what an adapter is, in a line."""
    adapter = described.get("adapter")
    if not adapter:
        return
    from converter.errors import spell_count

    base = f" for {adapter['base']}" if adapter["base"] else ""
    parts = ", ".join(f"{count:,} of {part}" for part, count in adapter["parts"].items())
    modules = f"{spell_count(adapter['modules'], 'module')}{f' ({parts})' if len(adapter['parts']) > 1 else ''}"
    sizes = [f"{name} {_show_counts(adapter[key])}" for name, key in (("rank", "ranks"), ("alpha", "alphas"))]
    of = f" of {described['component']}" if described["component"] else ""
    told = f"{adapter['method']}{base}, in the names of {_FORMS[adapter['form']]}: {modules}, {', '.join(sizes)}"
    echo(printable(f"adapter{of}: {told}"))


def _show_counts(counts: dict[float, int]) -> str:
    """Name the most common of some numbers, and the others with how often they come."""
    first, *others = [f"{number:.6g}" for number in counts] or ["-"]
    more = [f"{count:,} of {number}" for number, count in zip(others, list(counts.values())[1:], strict=True)]
    return f"{first} ({name_some(more, _MAX_NAMED)})" if more else first


def _show_remarks(described: dict[str, Any]) -> None:
    if "layout" in described:
        echo(printable(f"layout: {described['layout']}, as its trainer names them"))
    _show_adapter(described)
    _show_quantized(described)
    for dropped, kept in described["tied"].items():
        echo(printable(f"tied: {dropped} is {kept}"))
    for note in described["notes"]:
        echo(printable(f"note: {note}"))
    for how, words in _HOW.items():
        names = [name for name, what in described["globals"].items() if what == how]
        if names:
            echo(printable(f"its pickle {words}: {name_some(names, _MAX_NAMED)}"))


def _show_tensors(described: dict[str, Any]) -> None:
    title = f"{described['component'] or '.'} {described['weights']} {described['variant'] or ''}"
    echo("\n" + printable(title).rstrip())
    rows = [(row["name"], row["dtype"], str(row["shape"]), row["file"]) for row in described["all_tensors"]]
    show_table(("tensor", "dtype", "shape", "file"), rows)

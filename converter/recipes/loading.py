"""The Python lines that load what a plan writes: what is to be known of it, for the libraries to say how."""

from __future__ import annotations

from pathlib import Path

from converter.libraries import LIBRARIES, loader_of
from converter.libraries.diffusers import load_single_file
from converter.libraries.transformers import TRANSFORMERS, names_model
from converter.libraries.written import Written, WrittenSet, is_bare, load_files
from converter.plan.types import Plan, PlannedSet
from converter.storage import Place

_IF_KNOWN = "# where the model's class has the names that its tensors have now"
_MOST_SETS = 8  # more lines than that nobody reads


def loading_lines(plan: Plan) -> list[str]:
    """Give the Python lines that load what a plan writes; comments say what of it they leave to the reader."""
    lines = _lines_for(plan)
    is_renamed = any(planned.renamed for planned in plan.sets) and any(".from_pretrained(" in line for line in lines)
    return [_IF_KNOWN, *lines] if is_renamed else lines


def _lines_for(plan: Plan) -> list[str]:
    folder = _loaded_from(plan)
    if folder is None:
        return []
    if plan.source.kind == "file" and plan.source.class_name and not plan.target.folder.store.is_far:
        [file] = plan.files
        return load_single_file(plan.source.class_name, folder / file.path, plan.source.passed)
    loader = loader_of(plan.source)
    sets = tuple(_describe(plan, planned) for planned in plan.sets)
    is_variantless = bool(loader.no_variants(plan.source))
    written = Written(plan.source, folder, plan.target.is_new, is_variantless, plan.dtype, sets)
    lines = loader.load_folder(written)
    if lines:
        return lines
    if plan.target.folder.store.is_far:
        sets = tuple(one for one in sets if not one.component.name and _library_lines(written, one))
    for one in sets[:_MOST_SETS]:
        lines += (line for line in _lines_of(written, one) if line not in lines)
    more = len(sets) - _MOST_SETS
    return [*lines, f"# and so on, for {more} more"] if more > 0 else lines


def _loaded_from(plan: Plan) -> Path | None:
    """Give what loaders are told: a folder of this machine, or a repository at its main branch; they know no bucket."""
    folder = plan.target.folder
    if not folder.store.is_far:
        return folder.spelled
    name = folder.store.loaders_name
    return Path(name) if name and folder.key == "." else None


def _spelled(place: Place) -> Path:
    return Path(str(place)) if place.store.is_far else place.spelled


def _describe(plan: Plan, planned: PlannedSet) -> WrittenSet:
    component = next(component for component in plan.source.components if component.name == planned.component)
    files = tuple(_spelled(plan.target.folder / file.path) for file in planned.files)
    is_quantized = any(part.component == component.name for part in plan.quantized)
    return WrittenSet(component, planned.name, files, is_quantized)


def _lines_of(written: Written, one: WrittenSet) -> list[str]:
    """Give the lines of the first library that finds a set by itself, else those that load its files."""
    return _library_lines(written, one) or [*_say_why(written, one), *load_files(one)]


def _say_why(written: Written, one: WrittenSet) -> list[str]:
    """Say in a comment that from_pretrained would load a set too, where no line may: its class has no name, or is code.

    What a folder has as code is run by nothing that is printed here.
    """
    has_code = "auto_map" in one.component.config and written.source.kind != "file"
    if has_code and TRANSFORMERS.finds(one.component, one.name) and one.name.variant is None:
        return ["# or from_pretrained with trust_remote_code=True, which runs the code that lies in the folder"]
    is_nameless = names_model(one.component) and not one.component.class_name and not is_bare(written, one)
    if not is_nameless or not TRANSFORMERS.finds(one.component, one.name) or written.is_variantless:
        return []
    return ["# or from_pretrained of the model's class, which config.json does not name"]


def _library_lines(written: Written, one: WrittenSet) -> list[str]:
    return next(filter(None, (library.load_set(written, one) for library in LIBRARIES)), [])

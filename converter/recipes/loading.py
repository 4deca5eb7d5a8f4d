"""The Python lines that load what a plan writes: what is to be known of it, for the libraries to say how."""

from __future__ import annotations

from converter.libraries import LIBRARIES, loader_of
from converter.libraries.written import Written, WrittenSet, load_files
from converter.plan.make import Plan, SetPlan

_MOST_SETS = 8  # more lines than that nobody reads


def loading_lines(plan: Plan) -> list[str]:
    """Give the Python lines that load what a plan writes; comments say what of it they leave to the reader."""
    loader = loader_of(plan.source)
    sets = tuple(_describe(plan, planned) for planned in plan.sets)
    is_variantless = bool(loader.no_variants(plan.source))
    written = Written(plan.source, plan.target.folder, plan.target.is_new, is_variantless, plan.wishes.dtype, sets)
    lines = loader.load_folder(written)
    if lines:
        return lines
    for one in sets[:_MOST_SETS]:
        lines += (line for line in _lines_of(written, one) if line not in lines)
    more = len(sets) - _MOST_SETS
    return [*lines, f"# and so on, for {more} more"] if more > 0 else lines


def _describe(plan: Plan, planned: SetPlan) -> WrittenSet:
    component = next(component for component in plan.source.components if component.name == planned.component)
    files = tuple(plan.target.folder / shard.path for shard in planned.shards)
    copies = (copy for shard in planned.shards for copy in shard.copies)
    is_int8 = any(copy.dtype.tag == "I8" and copy.source.scales for copy in copies)
    return WrittenSet(component, planned.name, files, is_int8)


def _lines_of(written: Written, one: WrittenSet) -> list[str]:
    """Give the lines of the first library that finds a set by itself, else those that load its files."""
    found = filter(None, (library.load_set(written, one) for library in LIBRARIES))
    return next(found, None) or load_files(one)

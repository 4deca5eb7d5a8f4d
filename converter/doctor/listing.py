"""A folder as the doctor sees it, in the form in which loaders see it."""

from __future__ import annotations

from converter.doctor.view import ComponentView, FolderView
from converter.libraries.base import FolderListing, IndexListing, PartListing


def list_folder(view: FolderView) -> FolderListing:
    """Give what a loader sees of a folder."""
    parts = tuple(_list_part(part) for part in view.components if part.is_named or not view.is_pipeline)
    return FolderListing(view.path, view.is_pipeline, parts, view.absent, view.dotless)


def _list_part(part: ComponentView) -> PartListing:
    indexes = {}
    for found in part.sets:
        if found.index_name:
            shards = tuple(sorted(set(found.index.weight_map.values()))) if found.index else ()
            problem = f"cannot read {found.index_name}" if found.index is None else ""
            if found.index and not found.index.has_metadata:
                problem = "KeyError: 'metadata'"
            indexes[found.index_name] = IndexListing(shards, problem)
    return PartListing(part.name, part.path, part.library, frozenset(part.files), indexes, frozenset(part.others))

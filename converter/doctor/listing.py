"""A folder as the doctor sees it, in the form in which loaders see it."""

from __future__ import annotations

from converter.libraries import library_at
from converter.libraries.base import FolderListing, IndexListing, PartListing
from converter.models.inventory import Inventory, Part


def list_folder(inventory: Inventory) -> FolderListing:
    """Give what a loader sees of a folder."""
    parts = tuple(_list_part(part) for part in inventory.parts if part.is_named or not inventory.is_pipeline)
    return FolderListing(inventory.path, inventory.is_pipeline, parts, inventory.absent, inventory.dotless)


def _list_part(part: Part) -> PartListing:
    indexes = {}
    for listed in part.sets:
        if listed.index_name:
            problem = f"cannot read {listed.index_name}" if listed.index is None else ""
            if listed.index and not listed.index.has_metadata:
                problem = "KeyError: 'metadata'"
            indexes[listed.index_name] = IndexListing(listed.listed_names, problem)
    library = library_at(part)
    return PartListing(part.name, part.path, library, frozenset(part.files), indexes, frozenset(part.others))

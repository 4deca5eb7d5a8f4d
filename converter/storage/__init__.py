"""Where bytes lie: the only package that opens, lists, renames and syncs.

A store is chosen by the beginning of what the user names: a row of ``_STORES`` each. What has no such beginning is a
path of this machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from converter.errors import BadRequest
from converter.storage import local
from converter.storage.base import (
    UNLISTED,
    FileRef,
    Info,
    OpenFile,
    Place,
    Store,
    Window,
    hold_same,
    is_bare,
    list_entries,
    natural_key,
    without_secrets,
)

__all__ = [
    "UNLISTED",
    "FileRef",
    "Given",
    "Info",
    "OpenFile",
    "Place",
    "Store",
    "Window",
    "hold_same",
    "is_bare",
    "list_entries",
    "natural_key",
    "place_of",
]

Given = Place | Path | str
"""What a caller names a file or folder by."""

# Which module of this package reads URLs that begin so: one is loaded when it is needed.
_STORES: Mapping[str, str] = {
    "file": "local",
    **dict.fromkeys(("s3", "s3a", "gs", "gcs", "az", "azure", "abfs"), "objects"),
    **dict.fromkeys(("https", "http"), "web"),
    "hf": "hub",
}
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)

_SLIP = re.compile(r"([a-z][a-z0-9]+):/?(?!/)(.+)", re.IGNORECASE)  # a URL that lacks a slash, or two


def place_of(given: Given) -> Place:
    """Give the place that a caller names. Raises BadRequest for one that nobody can read."""
    if isinstance(given, Place):
        return given
    if given == "":  # what a variable holds if it is unset
        raise BadRequest("''", "is no path", "Name a file or folder; the current folder is '.'.")
    if isinstance(given, str) and (scheme := _SCHEME.match(given)):
        module = _STORES.get(scheme[1].lower())
        if module is None:
            problem = f"is a URL, and wconv reads none of {scheme[0]}"
            raise BadRequest(without_secrets(given), problem, "Fetch it, and name the folder.")
        place = import_module(f"converter.storage.{module}").open_url(given)
        assert isinstance(place, Place)
        return place
    place = local.place_at(Path(given))
    slip = _SLIP.match(str(given))
    if slip and slip[1].lower() in _STORES and not place.is_taken() and not place.parent.is_folder():
        raise BadRequest(without_secrets(str(given)), "is no URL", f"It is spelled {slip[1].lower()}://{slip[2]}.")
    return place

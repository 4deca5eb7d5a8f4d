"""What each model's own library wants of its weights: a module a library, and here which one it is. See ``base.py``."""

from __future__ import annotations

from collections.abc import Iterable

from converter.libraries.base import Library
from converter.libraries.diffusers import DIFFUSERS
from converter.libraries.peft import PEFT
from converter.libraries.sentence_transformers import SENTENCE_TRANSFORMERS
from converter.libraries.timm import TIMM
from converter.libraries.transformers import TRANSFORMERS
from converter.models.folder import Component, ModelFolder
from converter.models.names import WeightsName

# The first that owns a component loads it; the last one takes what is left.
LIBRARIES: tuple[Library, ...] = (DIFFUSERS, PEFT, TIMM, TRANSFORMERS)
# Of folders that have parts, what loads all of them at once.
_OF_FOLDERS: dict[str, Library] = {"pipeline": DIFFUSERS, "sentence-transformers": SENTENCE_TRANSFORMERS}


def library_of(component: Component) -> Library:
    """Give the library that loads a component."""
    return next(library for library in LIBRARIES if library.owns(component))


def loader_of(folder: ModelFolder) -> Library:
    """Give the library that opens a folder: PEFT for an adapter, whatever model's config lies beside it."""
    root = folder.components[0]
    return _OF_FOLDERS.get(folder.kind) or (PEFT if PEFT.owns(root) else library_of(root))


def guess_library(component: Component, package: object, names: Iterable[WeightsName]) -> Library:
    """Give the library of a component that may have no config: by what a model_index.json says, or by its weights."""
    if component.config:
        return library_of(component)
    named = next((library for library in (DIFFUSERS, TRANSFORMERS) if library.package == package), None)
    if named is None and any(name.stem == DIFFUSERS.stem("safetensors") for name in names):
        named = DIFFUSERS
    return named or TRANSFORMERS


def note_tag(folder: ModelFolder, variant: str | None) -> tuple[str, ...]:
    """Say so where weights get a tag under which the folder's library does not find them."""
    library = loader_of(folder).no_variants(folder)
    if not library or variant in (None, "none"):
        return ()
    return (f"{library} finds no variants: what is tagged {variant} is loaded by the name of its file alone",)

"""What each model's own library wants of its weights: a module a library, and here which one it is. See ``base.py``."""

from __future__ import annotations

from converter.libraries.base import Library
from converter.libraries.diffusers import DIFFUSERS
from converter.libraries.peft import PEFT
from converter.libraries.sentence_transformers import SENTENCE_TRANSFORMERS
from converter.libraries.timm import TIMM
from converter.libraries.transformers import TRANSFORMERS
from converter.models.component import Component
from converter.models.inventory import Part
from converter.models.model import Model

# The first that owns a component loads it; the last one takes what is left.
LIBRARIES: tuple[Library, ...] = (DIFFUSERS, PEFT, TIMM, TRANSFORMERS)
# Of folders that have parts, what loads all of them at once.
_OF_FOLDERS: dict[str, Library] = {"pipeline": DIFFUSERS, "sentence-transformers": SENTENCE_TRANSFORMERS}


def library_of(component: Component) -> Library:
    """Give the library that loads a component."""
    return next(library for library in LIBRARIES if library.owns(component))


def loader_of(model: Model) -> Library:
    """Give the library that opens a folder: PEFT for an adapter, whatever model's config lies beside it."""
    root = model.components[0]
    return _OF_FOLDERS.get(model.kind) or (PEFT if PEFT.owns(root) else library_of(root))


def library_at(part: Part) -> Library:
    """Give the library of a part that may have no config: by what model_index.json says, or by its weights' names."""
    if part.component.config:
        return library_of(part.component)
    for library in (DIFFUSERS, TRANSFORMERS):
        if part.entry and part.entry[0] == library.package:
            return library
    has_stem = any(listed.name.stem == DIFFUSERS.stem("safetensors") for listed in part.sets)
    return DIFFUSERS if has_stem else TRANSFORMERS


def note_tag(folder: Model, variant: str | None) -> tuple[str, ...]:
    """Say so where weights get a tag under which the folder's library does not find them."""
    library = loader_of(folder).no_variants(folder)
    if not library or variant in (None, "none"):
        return ()
    return (f"{library} finds no variants: what is tagged {variant} is loaded by the name of its file alone",)

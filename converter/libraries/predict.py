"""Which files a loader would open of a folder, and how it would fail, on names and indexes alone.

What is opened of one part is for its library to say (``Library.pick``). Here is what goes before that: the loader of a
whole pipeline, from a folder or from the Hub. The tests hold all of it against the real ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from converter.libraries import library_at
from converter.libraries.base import FolderListing, IndexListing, PartListing, Pick
from converter.libraries.coreml import COREML_VARIANT
from converter.models.inventory import Inventory, Part
from converter.models.names import parse_name

Loader = Literal["diffusers", "diffusers-hub", "transformers", "coreml"]
LOADERS: dict[Loader, str] = {
    "diffusers": "diffusers 0.32 to 0.42, from a local folder",
    "diffusers-hub": "diffusers 0.33 to 0.42, from the Hub",
    "transformers": "transformers 4.44 to 5.24",
    "coreml": "torch2coreml with diffusers 0.30 to 0.42",
}

# What ``variant_compatible_siblings`` in ``diffusers/pipelines/pipeline_loading_utils.py`` takes for weights.
_SHARD = r"\d{5}-of-\d{5}"
_STEMS = "diffusion_pytorch_model|model|weights|pytorch_model"
_ENDINGS = "bin|safetensors|onnx|pb"
# What lets a regular expression try again and again; without it one takes a look at each character.
_REPEATS = re.compile(r"[*+?{|]")


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a loader does when it is asked for a variant; ``failure`` is what it says where it does not begin at all."""

    loader: Loader
    variant: str | None
    picks: tuple[Pick, ...] = ()
    failure: str = ""
    warning: str = ""

    @property
    def versions(self) -> str:
        """The versions of the loader that this holds for."""
        return LOADERS[self.loader]

    @property
    def works(self) -> bool:
        return not self.failure and not any(pick.failure for pick in self.picks)


def list_folder(inventory: Inventory) -> FolderListing:
    """Give what a loader sees of a folder."""
    parts = tuple(map(_list_part, inventory.loaded_parts))
    return FolderListing(inventory.is_pipeline, parts, inventory.absent, inventory.dotless)


def _list_part(part: Part) -> PartListing:
    indexes = {}
    for listed in part.sets:
        if listed.index_name:
            problem = f"cannot read {listed.index_name}" if listed.index is None else ""
            if listed.index and not listed.index.has_metadata:
                problem = "KeyError: 'metadata'"
            indexes[listed.index_name] = IndexListing(listed.listed_names, problem)
    files, others = frozenset(part.files), frozenset(part.others)
    return PartListing(part.name, part.path, library_at(part), files, indexes, others)


def variants_in(listing: FolderListing) -> tuple[str | None, ...]:
    """Give the variants that any part has files of, the untagged one first."""
    parsed = (parse_name(name) for part in listing.parts for name in part.names)
    tags = {one.name.variant for one in parsed if one and one.role != "index"}
    return tuple(sorted(tags, key=lambda tag: tag or ""))


def predict_all(
    listing: FolderListing,
    there: Iterable[str | None],
    loader: Loader | None = None,
    asked: Iterable[str | None] | None = None,
) -> list[Prediction]:
    """Say what a loader opens, or those that a folder is for, asked for some variants.

    Else for each that is ``there``, and torch2coreml for the one that it always asks for.
    """
    return [
        predict(listing, one, tag)
        for one in ((loader,) if loader else likely_loaders(listing))
        for tag in (asked or ((COREML_VARIANT,) if one == "coreml" else there))
    ]


def likely_loaders(listing: FolderListing) -> tuple[Loader, ...]:
    """Give the loaders that a folder is for."""
    if listing.is_pipeline:
        return ("diffusers", "diffusers-hub")
    return ("transformers",) if all(map(_is_for_transformers, listing.parts)) else ("diffusers",)


def _is_for_transformers(part: PartListing) -> bool:
    return part.library.package == "transformers"


def predict(listing: FolderListing, loader: Loader, variant: str | None) -> Prediction:
    """Say which files a loader opens for a variant (None for the untagged one), part by part."""
    if loader == "transformers":
        parts = list(filter(_is_for_transformers, listing.parts))
        if not parts:
            return Prediction(loader, variant, failure="has no transformers model")
        return Prediction(loader, variant, tuple(part.library.pick(part, variant) for part in parts))
    if not listing.is_pipeline:
        if loader == "coreml":
            return Prediction(loader, variant, failure="is no pipeline: it has no model_index.json")
        return Prediction(loader, variant, tuple(part.library.pick(part, variant) for part in listing.parts))
    if listing.absent:
        return Prediction(loader, variant, failure=f"has no folder {listing.absent[0]}, which model_index.json names")
    if loader == "diffusers-hub":
        return _predict_download(listing, variant)
    return _predict_pipeline(listing, loader, variant)


def _predict_pipeline(listing: FolderListing, loader: Loader, variant: str | None) -> Prediction:
    """Follow ``DiffusionPipeline.from_pretrained`` and its ``_identify_model_variants``."""
    tagged = set()
    if variant is not None:
        if listing.dotless:
            # Not where the variant comes first as the folder is listed, in whatever order that is.
            failure = f"IndexError: list index out of range ({listing.dotless[0]} has no dot in its name)"
            return Prediction(loader, variant, failure=failure)
        for part in listing.parts:
            # One at the root is never asked for a variant.
            if part.name and any(name.split(".")[1].startswith(variant) for name in part.names | part.others):
                tagged.add(part.name)
        if not tagged:
            return Prediction(loader, variant, failure=f"ValueError: no modeling files of variant={variant}")
    pickles = loader != "coreml"
    picks = tuple(part.library.pick(part, variant if part.name in tagged else None, pickles) for part in listing.parts)
    return Prediction(loader, variant, picks)


def _predict_download(listing: FolderListing, variant: str | None) -> Prediction:
    """Follow ``DiffusionPipeline.download``: what is fetched, and then what is opened of it."""
    try:
        re.compile(f"({variant})")  # as it stands, in the loader as here
    except re.error as error:
        return Prediction("diffusers-hub", variant, failure=f"re.error: {error}")
    if _REPEATS.search(variant or ""):
        failure = f"takes {variant} for a regular expression, which may take for ever"
        return Prediction("diffusers-hub", variant, failure=failure)
    heavy = [part for part in listing.parts if _weights_in(part)]
    safe = all(_has_safetensors(part, variant) for part in [part for part in heavy if part.name] or heavy)
    left = ".bin" if safe else ".safetensors"
    fetched: dict[str, frozenset[str]] = {}
    tagged = set()
    for part in listing.parts:
        usable = [name for name in part.names if not name.endswith((left, ".msgpack"))]
        fetched[part.name], is_tagged = _compatible(usable, variant)
        if is_tagged:
            tagged.add(part.name)
    if variant is not None and not tagged:
        return Prediction("diffusers-hub", variant, failure=f"ValueError: no modeling files of variant={variant}")
    mixed = sorted(name for name, files in fetched.items() if files and name not in tagged)
    warning = f"a mixture of {variant} and non-{variant} filenames: {', '.join(mixed)}" if variant and mixed else ""
    parts = []
    for part in listing.parts:
        names = frozenset(n for n in fetched[part.name] if not n.endswith(f"{left}.index.json"))
        parts.append(PartListing(part.name, part.path, part.library, names | {"config.json"}, part.indexes))
    # Of a folder with weights only these and its config are fetched, of any other folder everything.
    heavy_names = {part.name for part in heavy}
    dotless = tuple(name for name in listing.dotless if name.partition("/")[0] not in heavy_names)
    found = _predict_pipeline(FolderListing(True, tuple(parts), (), dotless), "diffusers-hub", variant)
    return Prediction("diffusers-hub", variant, found.picks, found.failure, warning)


def _weights_in(part: PartListing) -> list[str]:
    return [name for name in part.names if name.endswith((".bin", ".safetensors", ".onnx", ".pb", ".flashpack"))]


def _has_safetensors(part: PartListing, variant: str | None) -> bool:
    """Follow ``is_safetensors_compatible`` for one part."""
    tagged = rf"({_STEMS})\.({variant}|{variant}-{_SHARD})\.({_ENDINGS})$"
    matched = list(_matching(_weights_in(part), tagged)) if variant else []
    matched = matched or list(_matching(_weights_in(part), rf"({_STEMS})(-{_SHARD})?\.({_ENDINGS})$"))
    return any(name.endswith(".safetensors") for name in matched)


def _compatible(names: Sequence[str], variant: str | None) -> tuple[frozenset[str], bool]:
    """Follow ``variant_compatible_siblings`` for one part: the names to fetch, and whether they are tagged."""
    if variant is not None:
        files = set(_matching(names, rf"({_STEMS})\.({variant}|{variant}-{_SHARD})\.({_ENDINGS})$"))
        index = rf"({_STEMS})\.({_ENDINGS})\.index\.{variant}\.json$"
        if not files:
            files = set(_matching(names, rf".*-{_SHARD}\.{variant}\.[a-z]+$"))
            index = rf"({_STEMS})\.({_ENDINGS})\.{variant}\.index\.json$"
        if files:
            return frozenset(files | set(_matching(names, index))), True
    plain = set(_matching(names, rf"({_STEMS})(-{_SHARD})?\.({_ENDINGS})$"))
    return frozenset(plain | set(_matching(names, rf"({_STEMS})\.({_ENDINGS})\.index\.json"))), False


def _matching(names: Iterable[str], pattern: str) -> Iterator[str]:
    compiled = re.compile(pattern)
    return (name for name in names if compiled.match(name))

"""The cache of the Hub, where other programs look for the same files: read through, and never changed.

The name of a model in it stands for its snapshot, whose files are links to the blobs beside it. Any other link that
leads out of a model's folder may be to anybody's secret, and what it leads to is not passed on.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from converter.errors import BadFile, BadRequest, OutputRefused, Unsupported, name_some
from converter.models.names import WEIGHT_EXTENSIONS, parse_name
from converter.storage import Given, Place, list_entries, place_of

_BLOBS = "blobs"
_SNAPSHOTS = "snapshots"
# ``REPO_TYPES`` of huggingface_hub, and what it puts into the cache beside them (``file_download.py``).
_REPO = re.compile(r"(model|dataset|space)s--.+")
_CACHE_FILES = frozenset({"CACHEDIR.TAG", "version.txt", "version_diffusers_cache.txt"})
_REVISION = re.compile(r"[0-9A-Za-z_][0-9A-Za-z._-]{0,254}")
_MAX_CHOICES = 10
_READ_ENDINGS = (".json", *(f".{ext}" for ext in WEIGHT_EXTENSIONS))


def check_places(source: Given, output: Given | None, removes: bool = False) -> None:
    """Raise OutputRefused where a conversion would change the Hub's cache, or write where a link leads to nothing."""
    if output is None:
        refuse_cache(source, "Write to a new folder: -o NEW.")
        return
    place = place_of(output)
    if place.store.is_far:
        return
    for dangling in (one for one in (place, *place.parents) if one.is_link() and not one.exists()):
        raise OutputRefused(dangling, "is a link to nothing", "Remove it, or name another folder.")
    refuse_cache(place, "Name another folder: -o NEW.")
    if removes:
        refuse_cache(source, "Leave --delete-source out.")


def refuse_cache(given: Given, advice: str = "") -> None:
    """Raise OutputRefused for a place in the Hub's cache, or a model whose files are links into it.

    And Unsupported for what is on no disk of this machine. Without other advice, a copy is to be worked on.
    """
    place = place_of(given)
    if place.store.is_far:
        problem = "is not on this machine's disk, and only what is there is changed where it lies"
        raise Unsupported(place, problem, "Fetch it first, or have a conversion write to a new place: -o NEW.")
    advice = advice or f"Copy it first: cp -rL {shlex.quote(str(place))} NEW."
    spelled, real = place.absolute(), place.real()
    if any(map(_is_of_cache, (spelled, *spelled.parents, real, *real.parents))) or _repos_in(place):
        raise OutputRefused(place, "lies in the cache of the Hub, which others use too", advice)
    for link in _links_of(place):
        if any(_BLOBS in (hop.parent.name, hop.parent.real().name) for hop in link.hops()):
            raise OutputRefused(link, "is a link into the cache of the Hub, which others use too", advice)


def _is_of_cache(folder: Place) -> bool:
    if _REPO.fullmatch(folder.name):
        return (folder / _SNAPSHOTS).is_folder() or (folder / _BLOBS).is_folder()
    both = (_SNAPSHOTS, _BLOBS)
    return folder.name in both and all((folder.parent / name).is_folder() for name in both)


def _links_of(place: Place) -> Iterator[Place]:
    """List the links among a model's weights, indexes and configs; of a shard or index, those beside it."""
    if not place.is_folder():
        parsed = parse_name(place.name)
        is_alone = parsed is None or parsed.role == "single"
        yield from _links_in(place.parent, place.name if is_alone else None)
        return
    yield from _links_in(place)
    if any((place / name).is_taken() for name in ("model_index.json", "modules.json")):
        for folder in filter(Place.is_folder, list_entries(place)):
            yield from _links_in(folder)


def _links_in(folder: Place, only: str | None = None) -> Iterator[Place]:
    for entry in list_entries(folder):
        if (entry.name == only if only else entry.name.endswith(_READ_ENDINGS)) and entry.is_link():
            yield entry


def snapshot_of(place: Place) -> Place:
    """Give the snapshot that the name of a model in the Hub's cache, or the cache itself, stands for; else the place.

    Raises BadRequest where there are several to choose from.
    """
    repos = _repos_in(place)
    if len(repos) > 1:
        problem = "is the cache of the Hub, and holds several models"
        raise BadRequest(place, problem, f"Name one: {name_some(repos, _MAX_CHOICES)}.")
    if repos:
        return snapshot_of(repos[0])
    spelled = place.absolute()
    folder = place.parent if spelled.name == _SNAPSHOTS and _REPO.fullmatch(spelled.parent.name) else place
    if not _REPO.fullmatch(folder.absolute().name) or not (folder / _SNAPSHOTS).is_folder():
        return place
    revision = _main_of(folder)
    if revision is not None and (folder / _SNAPSHOTS / revision).is_folder():
        return folder / _SNAPSHOTS / revision
    snapshots = [entry for entry in (folder / _SNAPSHOTS).entries() if entry.is_folder()]
    if not snapshots:
        raise BadFile(place, "holds no snapshot", "Fetch the model again.")
    if revision is None and len(snapshots) == 1:
        return snapshots[0]
    raise BadRequest(place, "has no snapshot that refs/main names", f"Name one: {name_some(snapshots, _MAX_CHOICES)}.")


def _main_of(repo: Place) -> str | None:
    """Give the revision that a model's ``refs/main`` names, if it is a plain name."""
    place = repo / "refs" / "main"
    if not place.is_file():
        return None
    with place.open() as file:
        text = file.read(0, 1 << 10).decode("utf-8", "replace").strip()
    return text if _REVISION.fullmatch(text) else None


def _repos_in(place: Place) -> list[Place]:
    """List the models in a folder that is a cache of the Hub: one that holds nothing else."""
    repos = []
    for entry in list_entries(place):
        if _REPO.fullmatch(entry.name):
            repos += [entry] if (entry / _SNAPSHOTS).is_folder() else []
        elif entry.name not in _CACHE_FILES and not entry.name.startswith(".") and not entry.is_folder():
            return []
    return repos


def lies_outside(path: Place, root: Place) -> bool:
    """Say whether a path below a folder leads out of it, other than to what the Hub's cache has for a snapshot.

    ``root`` is the real path of the folder.
    """
    target = path.real()
    is_blob = target.parent.name == _BLOBS and (target.parent.parent / _SNAPSHOTS).is_folder()
    return not is_blob and not target.is_below(root)

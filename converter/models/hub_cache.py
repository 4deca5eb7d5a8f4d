"""The cache of the Hub, where other programs look for the same files: read through, and never changed.

The name of a model in it stands for its snapshot, whose files are links to the blobs beside it. Any other link that
leads out of a model's folder may be to anybody's secret, and what it leads to is not passed on.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from converter.errors import BadFile, BadRequest, OutputRefused, name_some
from converter.models.names import WEIGHT_EXTENSIONS, parse_name
from converter.storage import Place, place_of
from converter.storage.local import is_dangling, real

_BLOBS = "blobs"
_SNAPSHOTS = "snapshots"
# ``REPO_TYPES`` of huggingface_hub, and what it puts into the cache beside them (``file_download.py``).
_REPO = re.compile(r"(model|dataset|space)s--.+")
_CACHE_FILES = frozenset({"CACHEDIR.TAG", "version.txt", "version_diffusers_cache.txt"})
_REVISION = re.compile(r"[0-9A-Za-z_][0-9A-Za-z._-]{0,254}")
_MAX_HOPS = 40  # as many links as Linux follows
_MAX_CHOICES = 10
_READ_ENDINGS = (".json", *(f".{ext}" for ext in WEIGHT_EXTENSIONS))


def check_places(source: Place, output: Place | None, removes: bool = False) -> None:
    """Raise OutputRefused where a conversion would change the Hub's cache, or write where a link leads to nothing."""
    if output is None:
        refuse_cache(source, "Write to a new folder: -o NEW.")
        return
    for path in filter(is_dangling, (output.spelled, *output.spelled.parents)):
        raise OutputRefused(path, "is a link to nothing", "Remove it, or name another folder.")
    refuse_cache(output, "Name another folder: -o NEW.")
    if removes:
        refuse_cache(source, "Leave --delete-source out.")


def refuse_cache(place: Place, advice: str = "") -> None:
    """Raise OutputRefused for a place in the Hub's cache, or a model whose files are links into it.

    Without other advice, a copy is to be worked on.
    """
    if not place.is_local:
        return
    path = place.spelled
    advice = advice or f"Copy it first: cp -rL {shlex.quote(str(path))} NEW."
    spelled = path.absolute()
    if any(map(_is_of_cache, (spelled, *spelled.parents, real(path), *real(path).parents))) or _repos_in(path):
        raise OutputRefused(path, "lies in the cache of the Hub, which others use too", advice)
    for link in _links_of(path):
        if any(_BLOBS in (step.parent.name, real(step.parent).name) for step in _hops(link)):
            raise OutputRefused(link, "is a link into the cache of the Hub, which others use too", advice)


def _is_of_cache(folder: Path) -> bool:
    if _REPO.fullmatch(folder.name):
        return (folder / _SNAPSHOTS).is_dir() or (folder / _BLOBS).is_dir()
    return folder.name in (_SNAPSHOTS, _BLOBS) and all((folder.parent / one).is_dir() for one in (_SNAPSHOTS, _BLOBS))


def _links_of(path: Path) -> Iterator[Path]:
    """List the links among a model's weights, indexes and configs; of a shard or index, those beside it."""
    if not path.is_dir():
        parsed = parse_name(path.name)
        is_alone = parsed is None or parsed.role == "single"
        yield from _links_in(path.parent, path.name if is_alone else None)
        return
    yield from _links_in(path)
    if any(os.path.lexists(path / name) for name in ("model_index.json", "modules.json")):
        for folder in filter(Path.is_dir, _entries(path)):
            yield from _links_in(folder)


def _links_in(folder: Path, only: str | None = None) -> Iterator[Path]:
    for entry in _entries(folder):
        if entry.is_symlink() and (entry.name == only if only else entry.name.endswith(_READ_ENDINGS)):
            yield entry


def _entries(folder: Path) -> list[Path]:
    """List a folder; one that cannot be read is for its reader to tell of."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _hops(link: Path) -> Iterator[Path]:
    """Give the places that a link leads to, one after another."""
    place = link
    for _ in range(_MAX_HOPS):
        if not place.is_symlink():
            return
        place = place.parent / place.readlink()
        yield place


def snapshot_of(place: Place) -> Place:
    """Give the snapshot that the name of a model in the Hub's cache, or the cache itself, stands for; else the place.

    Raises BadRequest where there are several to choose from.
    """
    if not place.is_local:
        return place
    snapshot = _snapshot_of(place.spelled)
    return place if snapshot == place.spelled else place_of(snapshot)


def _snapshot_of(path: Path) -> Path:
    repos = _repos_in(path)
    if repos:
        return _only(path, "is the cache of the Hub, and holds several models", repos)
    folder = path.absolute()
    folder = path.parent if folder.name == _SNAPSHOTS and _REPO.fullmatch(folder.parent.name) else path
    if not _REPO.fullmatch(folder.absolute().name) or not (folder / _SNAPSHOTS).is_dir():
        return path
    revision = _main_of(folder)
    if revision is not None and (folder / _SNAPSHOTS / revision).is_dir():
        return folder / _SNAPSHOTS / revision
    snapshots = sorted(entry for entry in (folder / _SNAPSHOTS).iterdir() if entry.is_dir())
    if not snapshots:
        raise BadFile(path, "holds no snapshot", "Fetch the model again.")
    if revision is None and len(snapshots) == 1:
        return snapshots[0]
    raise BadRequest(path, "has no snapshot that refs/main names", f"Name one: {name_some(snapshots, _MAX_CHOICES)}.")


def _only(path: Path, problem: str, repos: list[Path]) -> Path:
    if len(repos) > 1:
        raise BadRequest(path, problem, f"Name one: {name_some(repos, _MAX_CHOICES)}.")
    return _snapshot_of(repos[0])


def _main_of(repo: Path) -> str | None:
    """Give the revision that a model's ``refs/main`` names, if it is a plain name."""
    path = repo / "refs" / "main"
    if not path.is_file():
        return None
    with path.open("rb") as file:
        text = file.read(1 << 10).decode("utf-8", "replace").strip()
    return text if _REVISION.fullmatch(text) else None


def _repos_in(path: Path) -> list[Path]:
    """List the models in a folder that is a cache of the Hub: one that holds nothing else."""
    repos = []
    for entry in _entries(path):
        if _REPO.fullmatch(entry.name):
            repos += [entry] if (entry / _SNAPSHOTS).is_dir() else []
        elif entry.name not in _CACHE_FILES and not entry.name.startswith(".") and not entry.is_dir():
            return []
    return repos


def lies_outside(path: Place, root: Place) -> bool:
    """Say whether a path below a folder leads out of it, other than to what the Hub's cache has for a snapshot."""
    target = path.real()
    is_blob = target.parent.name == _BLOBS and (target.parent.parent / _SNAPSHOTS).is_folder()
    return not is_blob and not target.is_below(root.real())

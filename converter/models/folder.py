"""What is in a folder before anyone chooses: its kind, its components, and the weight sets in each.

A Diffusers pipeline has ``model_index.json`` and a folder a component; what has no folder lies at the root.
sentence-transformers has ``modules.json``, and the root is a component too; any other folder is a component by itself.
A file or an index stands for a folder with just that set.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Any, Literal, NamedTuple

from converter.errors import BadFile, HostileFile, SystemRefused
from converter.formats import could_be_weights
from converter.formats.texts import read_config
from converter.formats.training import refuse_folder
from converter.models.checkpoint import WeightSet, find_weight_set, find_weight_sets, is_weight_file
from converter.models.hub_cache import lies_outside, snapshot_of
from converter.models.names import is_other_runtime, is_training_state
from converter.storage import place_of
from converter.storage.local import as_path, real

Kind = Literal["file", "folder", "component", "transformers", "pipeline", "sentence-transformers"]

# Classes of a pipeline's parts that have no weights (``LOADABLE_CLASSES`` in ``diffusers/pipelines``).
_NO_MODEL = re.compile(r".*(Tokenizer|TokenizerFast|Scheduler|Processor|Extractor|Pil|Fast)")
# What runs of wconv leave when they are killed, or keep for an undo.
_LEFT_BY_RUNS = re.compile(r"\.wconv.*|\..+\.wconv.*")
_MAX_BEHIND_LINKS = 100_000  # entries; more than any model has, and listed in a second
_MAX_DEPTH = 100  # folders in folders: each step of Python's own walk goes one call deeper
_MAX_CLASSES = 16  # those that hear, see and speak have four or five; each asks about the name of every tensor


@dataclass(frozen=True)  # without slots, for what is looked for once
class Component:
    """One folder that holds weights: ``name`` is ``unet``, or empty for the folder itself.

    ``more_fp32`` is what its installed library keeps in float32 beyond what our table says.
    """

    name: str
    path: Path
    weight_sets: tuple[WeightSet, ...]
    config: dict[str, Any]
    more_fp32: tuple[str, ...] = ()

    @property
    def class_name(self) -> str:
        """The class that its config names: Diffusers' ``_class_name``, or transformers' first architecture."""
        architectures = self.config.get("architectures")
        first = architectures[0] if architectures and isinstance(architectures, list) else ""
        name = self.config.get("_class_name") or first
        # What is no identifier is no class either, and may be made to be pasted into a shell.
        return name if isinstance(name, str) and name.isidentifier() else ""

    @cached_property
    def class_names(self) -> set[str]:
        """The classes that its config and all nested ones name: a transformers model may be made of others."""
        named = (config for config in nested(self.config) if "_class_name" in config or "architectures" in config)
        names = {name for config in named if (name := Component("", self.path, (), config).class_name)}
        if len(names) > _MAX_CLASSES:
            raise HostileFile(self.path / "config.json", f"names {len(names):,} classes, which no model is made of")
        return names

    @property
    def is_diffusers(self) -> bool:
        return "_class_name" in self.config


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder of weights, or one set in it (``kind`` is then ``file`` and ``path`` what was named).

    ``real`` is the real path of ``root`` when it was looked at.
    """

    path: Path
    root: Path
    kind: Kind
    components: tuple[Component, ...]
    class_name: str = ""
    real: Path = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "real", real(self.root))


def open_folder(path: Path | str) -> ModelFolder:
    """See what is at ``path``: a weight file, an index, or a folder of any known kind.

    A model's name in the Hub's cache stands for its snapshot. Raises BadFile where there are no weights.
    """
    path = snapshot_of(as_path(path))
    if not path.exists():
        raise BadFile(path, "is a link to nothing" if path.is_symlink() else "does not exist", "Check the path.")
    if not path.is_dir():
        if not path.is_file():
            raise BadFile(path, "is no regular file", "Name a weight file or a folder.")
        weight_set = find_weight_set(path)
        component = Component("", path.parent, (weight_set,), read_json(path.parent / "config.json"))
        return ModelFolder(path, path.parent, "file", (component,))
    model_index = path / "model_index.json"
    modules = path / "modules.json"
    if model_index.is_file():
        content = read_json(model_index)
        class_name = content.get("_class_name")
        found = [_open_flat(path)] if absent_models(path, content) else []
        found += [_open_component(folder, folder.name) for folder in model_folders(path, content)]
        kind: Kind = "pipeline"
    else:
        class_name = None
        found = [_open_component(path, "")]
        kind = _kind_of(found[0])
        if modules.is_file():
            kind = "sentence-transformers"
            found += [_open_component(folder, folder.name) for folder in model_folders(path)]
    components = tuple(component for component in found if component.weight_sets)
    if not components:
        refuse_folder(place_of(path))
        raise BadFile(path, "holds no weights", _suggest(path))
    return ModelFolder(path, path, kind, components, class_name if isinstance(class_name, str) else "")


def _kind_of(component: Component) -> Kind:
    if component.is_diffusers:
        return "component"
    return "transformers" if component.config else "folder"


def _open_component(path: Path, name: str) -> Component:
    try:
        return Component(name, path, find_weight_sets(path), read_json(path / "config.json"))
    except OSError as error:
        raise SystemRefused.from_os_error(error, error.filename or path) from None


def absent_models(path: Path, model_index: Mapping[str, Any]) -> list[str]:
    """List the models that a model_index.json names and that have no folder.

    Diffusers loads these from the root (``load_sub_model`` in ``diffusers/pipelines/pipeline_loading_utils.py``).
    """
    return sorted(name for name, entry in model_index.items() if is_model(name, entry) and not _is_folder(path / name))


def is_model(name: str, entry: object) -> bool:
    """Say whether an entry of a model_index.json is of a part that has weights."""
    # Of a custom pipeline, ``_class_name`` is a module and a class too.
    if name.startswith("_") or not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
        return False
    return PureWindowsPath(name).name == name and not _NO_MODEL.fullmatch(entry[1])


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _open_flat(path: Path) -> Component:
    """Open the part of a pipeline that lies at its root, of which only names that loaders look for are weights."""
    found = _open_component(path, "")
    return replace(found, weight_sets=tuple(one for one in found.weight_sets if one.name.is_standard))


def model_folders(path: Path, named: Collection[str] = ()) -> list[Path]:
    """List the folders in a model's folder that may be parts of it: a trainer's checkpoint, unless named, is none."""
    return [folder for folder in _subfolders(path) if folder.name in named or not _is_checkpoint(folder)]


def _is_checkpoint(path: Path) -> bool:
    try:
        return any(is_training_state(entry.name) for entry in path.iterdir())
    except OSError:
        return False  # to be read later, and then found to be unreadable


def _subfolders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _suggest(path: Path) -> str:
    with_weights = [folder.name for folder in _subfolders(path) if find_weight_sets(folder)]
    if with_weights:
        return f"Name one of its folders that do: {', '.join(with_weights)}."
    return "A weight file ends in .safetensors, .bin, .pt, .pth or .ckpt."


def read_json(path: Path) -> dict[str, Any]:
    """Give the object in a JSON file, an empty one where there is no such file. Raises BadFile for what is no JSON."""
    if not path.is_file():
        return {}
    try:
        content = read_config(place_of(path))
    except ValueError as error:
        raise BadFile(path, f"is not JSON ({error})", "Fetch it again.") from None
    return content if isinstance(content, dict) else {}


def render_json(content: Mapping[str, Any]) -> bytes:
    """Give a config's content as its file has it."""
    return (json.dumps(content, indent=2) + "\n").encode()


class Rest(NamedTuple):
    """Something in a folder beside the components' own weights.

    ``is_weights`` says whether it holds weights all the same: a checkpoint beside a pipeline, another runtime's form.
    ``is_linked`` says that it lies behind a link, elsewhere, and so is not taken for a part of the model.
    ``is_training`` says that it is for a trainer to go on from. ``shell`` is the outermost folder around it, if
    there is one, that is no component and holds such things: what else is in it means little without them.
    """

    path: Path
    is_weights: bool
    is_linked: bool
    is_training: bool = False
    shell: Path | None = None


def find_rest(folder: ModelFolder, skip: Path | None = None, follow_links: bool = False) -> Iterator[Rest]:
    """Walk all files but the components' own weights, ``skip``, hidden folders and what runs left, left out.

    What has no mark goes along when the model goes elsewhere. Folders that are links are not walked, but for
    components, of which config.json goes along too; with ``follow_links`` they are, each but once, and nothing counts
    as linked. Raises SystemRefused for a folder that cannot be read, BadFile where links lead to too much.
    """
    sets = (weight_set for component in folder.components for weight_set in component.weight_sets)
    own = {weight_set.folder / name for weight_set in sets for name in weight_set.all_names}
    found: list[Rest] = []
    for path in _walk(folder, skip, _Links(follow_links)):
        if path in own or _LEFT_BY_RUNS.fullmatch(path.name):
            continue
        if path.is_dir():
            found.append(Rest(path, False, True))
        elif path.is_file():
            is_weights = is_weight_file(path) or is_other_runtime(path.name)
            is_elsewhere = not follow_links and is_linked(folder, path)
            found.append(Rest(path, is_weights, is_elsewhere, is_training_state(path.name)))
    shells = _find_shells(folder, found)
    for one in found:
        around = next((parent for parent in reversed(one.path.parents) if parent in shells), None)
        yield one._replace(shell=around)


def _find_shells(folder: ModelFolder, found: Iterable[Rest]) -> set[Path]:
    """Give the folders that are not the model's own and hold weights, or what a trainer goes on from."""
    parts = {folder.root, *(component.path for component in folder.components)}
    own = {place for part in parts for place in (part, *part.parents)}
    shells = {one.path.parent for one in found if one.is_weights or one.is_training}
    shells |= {place for one in found for place in one.path.parents if is_other_runtime(place.name)}
    return shells - own


def is_linked(folder: ModelFolder, path: Path) -> bool:
    """Say whether a file that is no weight file, of a component's folder or any other, lies elsewhere by a link.

    Of a component that lies elsewhere as a whole, config.json is a part of the model: it says how the weights are read.
    """
    of = [part.path for part in folder.components if path == part.path / "config.json" and part.path.is_symlink()]
    return lies_outside(path, of[0] if of else folder.root)


def is_disguised(folder: ModelFolder, path: Path) -> bool:
    """Say whether a file of a weight set is a link to something that holds no weights, elsewhere."""
    return not path.name.endswith(".json") and lies_outside(path, folder.root) and not could_be_weights(place_of(path))


@dataclass(slots=True)
class _Links:
    """Which folders that are links are walked, and how much was found behind them."""

    are_followed: bool
    count: int = 0
    seen: set[Path] = field(default_factory=set)

    def enter(self, path: Path) -> bool:
        """Say whether to walk a folder behind a link: none twice, and none that holds the link itself."""
        place = real(path)
        if not self.are_followed or place in self.seen or real(path.parent).is_relative_to(place):
            return False
        self.seen.add(place)
        return True

    def pay(self, path: Path, count: int) -> None:
        """Count entries behind links. Raises BadFile for too many."""
        self.count += count
        if self.count > _MAX_BEHIND_LINKS:
            problem = f"leads to more than {_MAX_BEHIND_LINKS:,} files and folders elsewhere"
            raise BadFile(path, problem, "Leave --follow-links out, or remove the link.")


def _walk(folder: ModelFolder, skip: Path | None, links: _Links) -> Iterator[Path]:
    """Give all files, and the folders that are links and not walked, sorted in each folder."""
    parts = {component.path for component in folder.components}
    behind: set[Path] = set()
    for top, folders, names in os.walk(folder.root, onerror=_refuse_unreadable, followlinks=True):
        here = Path(top)
        if len(here.parts) - len(folder.root.parts) > _MAX_DEPTH:
            raise BadFile(folder.root, f"has folders in folders, more than {_MAX_DEPTH} deep", "Remove them.")
        known = [name for name in sorted(folders) if not name.startswith((".", "__pycache__")) and here / name != skip]
        linked = {name for name in known if (here / name).is_symlink() or (here in behind and not links.are_followed)}
        folders[:] = [name for name in known if name not in linked or here / name in parts or links.enter(here / name)]
        if here in behind and links.are_followed:
            links.pay(here, len(known) + len(names))
        behind.update(here / name for name in folders if name in linked or here in behind)
        yield from (here / name for name in (*(name for name in known if name not in folders), *sorted(names)))


def _refuse_unreadable(error: OSError) -> None:
    raise SystemRefused.from_os_error(error)


def nested(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Give a config and all that are in it."""
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from nested(value)

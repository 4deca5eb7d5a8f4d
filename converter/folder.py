"""What is in a folder before anyone chooses: its kind, its components, and the weight sets in each.

A Diffusers pipeline has ``model_index.json`` and a folder a component; sentence-transformers has ``modules.json``,
and the root is a component too; any other folder is a component by itself. A file or an index stands for a folder
with just that set.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from converter.checkpoint import WeightSet, find_weight_set, find_weight_sets, is_weight_file
from converter.errors import BadFile, HostileFile
from converter.texts import read_config

Kind = Literal["file", "folder", "component", "transformers", "pipeline", "sentence-transformers"]

# Weights in forms of other runtimes: neither converted nor carried over.
_OTHER_WEIGHTS = re.compile(r".*\.(onnx|onnx_data|pb|msgpack|h5|ot|gguf|ggml|flashpack|tflite|mlmodel)")
_MAX_CLASSES = 16  # those that hear, see and speak have four or five; each asks about the name of every tensor


@dataclass(frozen=True, slots=True)
class Component:
    """One folder that holds weights: ``name`` is ``unet``, or empty for the folder itself."""

    name: str
    path: Path
    weight_sets: tuple[WeightSet, ...]
    config: dict[str, Any]

    @property
    def class_name(self) -> str:
        """The class that its config names: Diffusers' ``_class_name``, or transformers' first architecture."""
        architectures = self.config.get("architectures")
        first = architectures[0] if architectures and isinstance(architectures, list) else ""
        name = self.config.get("_class_name") or first
        # What is no identifier is no class either, and may be made to be pasted into a shell.
        return name if isinstance(name, str) and name.isidentifier() else ""

    @property
    def class_names(self) -> set[str]:
        """The classes that its config and all nested ones name: a transformers model may be made of others."""
        names = {name for config in _nested(self.config) if (name := Component("", self.path, (), config).class_name)}
        if len(names) > _MAX_CLASSES:
            raise HostileFile(self.path / "config.json", f"names {len(names):,} classes, which no model is made of")
        return names

    @property
    def is_diffusers(self) -> bool:
        return "_class_name" in self.config


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder of weights, or one set in it (``kind`` is then ``file`` and ``path`` what was named)."""

    path: Path
    root: Path
    kind: Kind
    components: tuple[Component, ...]
    class_name: str = ""


def open_folder(path: Path) -> ModelFolder:
    """See what is at ``path``: a weight file, an index, or a folder of any known kind.

    Raises BadFile where there are no weights.
    """
    if not path.exists():
        raise BadFile(path, "does not exist", "Check the path.")
    if not path.is_dir():
        weight_set = find_weight_set(path)
        component = Component("", path.parent, (weight_set,), read_json(path.parent / "config.json"))
        return ModelFolder(path, path.parent, "file", (component,))
    model_index = path / "model_index.json"
    modules = path / "modules.json"
    if model_index.is_file():
        class_name = read_json(model_index).get("_class_name")
        found = [_open_component(folder, folder.name) for folder in _subfolders(path)]
        kind: Kind = "pipeline"
    else:
        class_name = None
        found = [_open_component(path, "")]
        kind = _kind_of(found[0])
        if modules.is_file():
            kind = "sentence-transformers"
            found += [_open_component(folder, folder.name) for folder in _subfolders(path)]
    components = tuple(component for component in found if component.weight_sets)
    if not components:
        raise BadFile(path, "holds no weights", _suggest(path))
    return ModelFolder(path, path, kind, components, class_name if isinstance(class_name, str) else "")


def _kind_of(component: Component) -> Kind:
    if component.is_diffusers:
        return "component"
    return "transformers" if component.config else "folder"


def _open_component(path: Path, name: str) -> Component:
    return Component(name, path, find_weight_sets(path), read_json(path / "config.json"))


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
        content = read_config(path)
    except ValueError as error:
        raise BadFile(path, f"is not JSON ({error})", "Fetch it again.") from None
    return content if isinstance(content, dict) else {}


def render_json(content: Mapping[str, Any]) -> bytes:
    """Give a config's content as its file has it."""
    return (json.dumps(content, indent=2) + "\n").encode()


def find_rest(folder: ModelFolder, skip: Path | None = None) -> Iterator[tuple[Path, bool]]:
    """Walk all files but the components' own weights, ``skip`` and hidden folders left out.

    The flag says whether a file holds weights all the same (a checkpoint beside a pipeline, another runtime's form);
    what does not goes along when the model goes elsewhere.
    """
    sets = (weight_set for component in folder.components for weight_set in component.weight_sets)
    own = {weight_set.folder / name for weight_set in sets for name in weight_set.all_names}
    for top, folders, names in os.walk(folder.root, followlinks=True):
        here = Path(top)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith((".", "__pycache__")) and here / name != skip and not _is_loop(here, name)
        )
        for name in sorted(names):
            path = here / name
            if path not in own and path.is_file():
                yield path, is_weight_file(path) or _OTHER_WEIGHTS.fullmatch(name) is not None


def _nested(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _nested(value)


def _is_loop(folder: Path, name: str) -> bool:
    """Say whether an entry is a link back to its own folder, or to one above it."""
    return (folder / name).is_symlink() and folder.resolve().is_relative_to((folder / name).resolve())

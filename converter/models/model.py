"""A model opened strictly: its inventory, with the first problem raised, and the components that hold weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from converter.errors import BadFile, Unreachable, WconvError, name_some
from converter.formats import refuse_folder
from converter.models.component import Component
from converter.models.inventory import Inventory, Kind, find_weight_sets, subfolders, take_inventory
from converter.storage import Given, Place

_NAMED = 8  # folders that are suggested
_MAX_LOOKED_AT = 200  # folders of one folder; to look at each takes a moment, and far away a request


@dataclass(frozen=True, slots=True)
class Model:
    """A folder of weights, or one set in it (``kind`` is then ``file`` and ``path`` what was named).

    ``passed`` are the parts that its class has to be given, as it is not there, each with what it is given in Python.
    ``real`` is the real path of ``root`` when it was looked at.
    """

    path: Place
    root: Place
    kind: Kind
    components: tuple[Component, ...]
    class_name: str = ""
    passed: Mapping[str, str] = field(default_factory=dict)
    real: Place = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "real", self.root.real())


def open_model(given: Given) -> Model:
    """See what is at a place: a weight file, an index, or a folder of any known kind.

    A model's name in the Hub's cache stands for its snapshot. Raises BadFile where there are no weights.
    """
    inventory = take_inventory(given)
    for problem in inventory.problems:
        raise problem
    return model_of(inventory)


def model_of(inventory: Inventory) -> Model:
    """Give what can be read of what lies in a folder. Raises the first problem, or BadFile, where that is nothing."""
    components = tuple(part.component for part in inventory.parts if part.component.weight_sets)
    path = inventory.path
    if not components:
        for problem in inventory.problems:
            raise problem
        refuse_folder(path)
        raise BadFile(path, "holds no weights", suggest(path))
    root = path.parent if inventory.kind == "file" else path
    return Model(path, root, inventory.kind, components, inventory.class_name)


def suggest(path: Place) -> str:
    """Say which folders to name instead of one without weights: those below that have some, or those below these."""
    folders = subfolders(path)[:_MAX_LOOKED_AT]
    found = _with_weights(folders) or _with_weights([inner for one in folders for inner in _below(one)])
    if found:
        return f"Name one of its folders that do: {name_some([one.relative_to(path) for one in found], _NAMED)}."
    return "A weight file ends in .safetensors, .bin, .pt, .pth or .ckpt."


def _below(folder: Place) -> list[Place]:
    return [] if folder.is_link() else subfolders(folder)[:_MAX_LOOKED_AT]


def _with_weights(folders: Sequence[Place]) -> list[Place]:
    """Give the folders that hold weights, the last of a run first: ``checkpoint-1000``, then ``checkpoint-500``."""
    return sorted(filter(_holds_weights, folders[:_MAX_LOOKED_AT]), key=_step_of)


def _step_of(folder: Place) -> tuple[int, str]:
    number = re.search(r"\d{1,18}$", folder.name)
    return (-int(number[0]) if number else 0), str(folder)


def _holds_weights(folder: Place) -> bool:
    try:
        return bool(find_weight_sets(folder))
    except Unreachable:
        raise
    except WconvError:  # something is there, and wrong: what, is said of it when it is named
        return True

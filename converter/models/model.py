"""A model opened strictly: its inventory, with the first problem raised, and the components that hold weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from converter.errors import BadFile
from converter.formats import refuse_folder
from converter.models.component import Component
from converter.models.inventory import Inventory, Kind, find_weight_sets, subfolders, take_inventory
from converter.storage import Given, Place


@dataclass(frozen=True, slots=True)
class Model:
    """A folder of weights, or one set in it (``kind`` is then ``file`` and ``path`` what was named).

    ``real`` is the real path of ``root`` when it was looked at.
    """

    path: Place
    root: Place
    kind: Kind
    components: tuple[Component, ...]
    class_name: str = ""
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
        raise BadFile(path, "holds no weights", _suggest(path))
    root = path.parent if inventory.kind == "file" else path
    return Model(path, root, inventory.kind, components, inventory.class_name)


def _suggest(path: Place) -> str:
    with_weights = [folder.name for folder in subfolders(path) if find_weight_sets(folder)]
    if with_weights:
        return f"Name one of its folders that do: {', '.join(with_weights)}."
    return "A weight file ends in .safetensors, .bin, .pt, .pth or .ckpt."

"""What else is in a model's folder: what goes along when the model goes elsewhere, and what stays behind.

Weights of other runtimes, a trainer's state and what lies elsewhere by links are told from the rest. Links are walked
only where they are to be followed, each but once, and not without end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple

from converter.errors import BadFile
from converter.formats import could_be_weights, form_of_many
from converter.models.hub_cache import lies_outside
from converter.models.model import Model
from converter.models.names import is_other_runtime, is_training_folder, is_training_state
from converter.models.sets import is_weight_file
from converter.storage import Place

# What runs of wconv leave when they are killed, or keep for an undo.
_LEFT_BY_RUNS = re.compile(r"\.wconv.*|\..+\.wconv.*")
_MAX_BEHIND_LINKS = 100_000  # entries; more than any model has, and listed in a second
_MAX_DEPTH = 100  # folders in folders: each step of the walk goes one call deeper


class Rest(NamedTuple):
    """Something in a folder beside the components' own weights.

    ``is_weights`` says whether it holds weights all the same: a checkpoint beside a pipeline, another runtime's form.
    ``is_linked`` says that it lies behind a link, elsewhere, and so is not taken for a part of the model.
    ``is_training`` says that it is for a trainer to go on from. ``shell`` is the outermost folder around it, if
    there is one, that is no component and holds such things: what else is in it means little without them.
    """

    path: Place
    is_weights: bool
    is_linked: bool
    is_training: bool = False
    shell: Place | None = None


def find_rest(model: Model, skip: Place | None = None, follow_links: bool = False) -> Iterator[Rest]:
    """Walk all files but the components' own weights, ``skip``, hidden folders and what runs left, left out.

    What has no mark goes along when the model goes elsewhere. Folders that are links are not walked, but for
    components, of which config.json goes along too; with ``follow_links`` they are, each but once, and nothing counts
    as linked. Raises SystemRefused for a folder that cannot be read, BadFile where links lead to too much.
    """
    sets = (weight_set for component in model.components for weight_set in component.weight_sets)
    own = {weight_set.folder / name for weight_set in sets for name in weight_set.all_names}
    rest: list[Rest] = []
    for path in _Walk(model, skip, follow_links).entries(model.root):
        if path in own or _LEFT_BY_RUNS.fullmatch(path.name):
            continue
        found = path.info()
        if found and found.kind == "folder":
            rest.append(Rest(path, False, True))
        elif found and found.kind == "file":
            is_weights = is_weight_file(path) or is_other_runtime(path.name)
            is_elsewhere = not follow_links and is_linked(model, path)
            is_training = is_training_state(path.name) or is_training_folder(path.parent.name)
            rest.append(Rest(path, is_weights, is_elsewhere, is_training or form_of_many(path.name) != ""))
    shells = _find_shells(model, rest)
    for one in rest:
        around = next((folder for folder in reversed(above(one.path, model.root)) if folder in shells), None)
        yield one._replace(shell=around)


def above(path: Place, root: Place) -> list[Place]:
    """List the folders around a place, from the innermost to that below the root."""
    return [root / str(parent) for parent in PurePosixPath(path.relative_to(root)).parents][:-1]


def _find_shells(model: Model, rest: Iterable[Rest]) -> set[Place]:
    """Give the folders that are not the model's own and hold weights, or what a trainer goes on from."""
    parts = [component.path for component in model.components if component.path != model.root]
    own = {model.root, *(folder for part in parts for folder in (part, *above(part, model.root)))}
    shells = {one.path.parent for one in rest if one.is_weights or one.is_training}
    shells |= {folder for one in rest for folder in above(one.path, model.root) if is_other_runtime(folder.name)}
    return shells - own


def is_linked(model: Model, path: Place) -> bool:
    """Say whether a file that is no weight file, of a component's folder or any other, lies elsewhere by a link.

    Of a component that lies elsewhere as a whole, config.json is a part of the model: it says how the weights are read.
    """
    of = [part.path for part in model.components if path == part.path / "config.json" and part.path.is_link()]
    return lies_outside(path, of[0].real() if of else model.real)


def is_disguised(model: Model, path: Place) -> bool:
    """Say whether a file of a weight set is a link to something that holds no weights, elsewhere."""
    return not path.name.endswith(".json") and lies_outside(path, model.real) and not could_be_weights(path)


@dataclass(slots=True)
class _Walk:
    """A walk of a model's folder: which folders that are links it enters, and how much it found behind them."""

    model: Model
    skip: Place | None
    follows: bool
    count: int = 0
    seen: set[Place] = field(default_factory=set)

    def entries(self, here: Place, depth: int = 0, is_behind: bool = False) -> Iterator[Place]:
        """Give all files, and the folders that are links and not walked, sorted in each folder.

        Raises BadFile for too many behind links, or too deep a tree.
        """
        if depth > _MAX_DEPTH:
            raise BadFile(self.model.root, f"has folders in folders, more than {_MAX_DEPTH} deep", "Remove them.")
        entries = [(entry, entry.is_folder()) for entry in here.entries()]
        files = [entry for entry, is_folder in entries if not is_folder]
        folders = (entry for entry, is_folder in entries if is_folder and not (self.skip and entry.is_same(self.skip)))
        known = [entry for entry in folders if not entry.name.startswith((".", "__pycache__"))]
        linked = {entry for entry in known if entry.is_link() or (is_behind and not self.follows)}
        walked = [entry for entry in known if entry not in linked or self._enters(entry)]
        if is_behind and self.follows:
            self.count += len(known) + len(files)
            if self.count > _MAX_BEHIND_LINKS:
                problem = f"leads to more than {_MAX_BEHIND_LINKS:,} files and folders elsewhere"
                raise BadFile(here, problem, "Leave --follow-links out, or remove the link.")
        yield from (entry for entry in known if entry not in walked)
        yield from files
        for entry in walked:
            yield from self.entries(entry, depth + 1, is_behind or entry in linked)

    def _enters(self, link: Place) -> bool:
        """Say whether to walk a folder behind a link: a part, and else none twice, and none that holds the link."""
        if any(link == component.path for component in self.model.components):
            return True
        real = link.real()
        if not self.follows or real in self.seen or link.parent.real().is_below(real):
            return False
        self.seen.add(real)
        return True

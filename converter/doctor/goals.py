"""What a folder's weight sets shall be after a mending: goals, which repairs make, change, add and let go of.

A goal says where its values come from, what it is to be called, and what becomes of the bytes, if anything. What goes
is named apart; that what is held nowhere else does not go is for the repairs to see to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from converter.dtypes import DType
from converter.models.inventory import Inventory, Part
from converter.models.names import WeightsName
from converter.models.sets import ListedSet

Keep = Literal["single", "shards", "safetensors", "bin"]


@dataclass(frozen=True, slots=True)
class Choices:
    """What the user wants where a folder can be mended in several ways.

    ``keep_default`` moves all variants away, ``only_variant`` everything but one; ``make_variant`` casts one that is
    missing; ``keep`` decides between two sets of one variant. ``drop_strays`` moves shards away that no index names,
    where the set that has their name is sound, whatever they hold.
    """

    keep_default: bool = False
    only_variant: str | None = None
    make_variant: str | None = None
    keep: Keep | None = None
    drop_strays: bool = False


class Change(NamedTuple):
    """How a set is written anew: in a dtype, in one file; or just with another header, or in another format."""

    dtype: DType | None = None
    is_merged: bool = False


@dataclass(slots=True)
class Goal:
    """A set that shall be there: ``source`` gives the values, ``change`` says what becomes of them, if anything.

    Where the bytes stay, ``is_renamed`` gives the files the names that go with the set's name, and ``is_reindexed``
    writes their index.
    """

    source: ListedSet
    name: WeightsName
    change: Change | None = None
    is_new: bool = False  # the source stays as it is
    is_renamed: bool = False
    is_reindexed: bool = False

    @property
    def count(self) -> int:
        """How many files the source has."""
        return len(self.source.file_names)


@dataclass(slots=True)
class PartGoals:
    """One part on its way: the goals, the sets that are left as they are, and the files that go."""

    part: Part
    sets: list[Goal] = field(default_factory=list)
    left: list[ListedSet] = field(default_factory=list)  # not to be touched, nor any file of theirs
    gone: set[str] = field(default_factory=set)
    steps: list[str] = field(default_factory=list)

    def let_go(self, listed: ListedSet, why: str) -> None:
        """Move a set away, but for files that others share; a training checkpoint, which holds more, never goes."""
        if listed.is_of_many:
            return
        self.sets = [goal for goal in self.sets if goal.source is not listed or goal.is_new]
        shared = {name for goal in self.sets if goal.source is not listed for name in goal.source.file_names}
        self.gone.update(name for name in listed.all_names if name not in shared)
        self.say(f"move {listed.label} away: {why}")

    def say(self, step: str) -> None:
        """Note what is done, for people."""
        self.steps.append(f"{self.part.name or '.'}: {step}")

    def default(self) -> Goal | None:
        """Give the goal for the untagged weights, as safetensors before others."""
        if any(listed.name.variant is None for listed in self.left):
            return None
        untagged = [goal for goal in self.sets if goal.name.variant is None]
        return min(untagged, key=lambda goal: goal.name.format != "safetensors", default=None)

    def has(self, variant: str | None) -> bool:
        """Say whether there is a set of a variant, or shall be."""
        return variant in (*(goal.name.variant for goal in self.sets), *(listed.name.variant for listed in self.left))


@dataclass(slots=True)
class FolderGoals:
    """A folder on its way: its parts, what the user chose, and what else of it changes.

    ``renamed`` maps the paths of files that get another name to it, ``dtypes`` the names of parts to the dtype that
    their config shall name.
    """

    inventory: Inventory
    choices: Choices
    parts: list[PartGoals]
    renamed: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)

    @property
    def loaded(self) -> list[PartGoals]:
        """The parts that a loader loads, and that have something to be loaded."""
        names = {part.name for part in self.inventory.loaded_parts}
        return [goals for goals in self.parts if goals.sets and goals.part.name in names]

    @property
    def all_steps(self) -> tuple[str, ...]:
        """What is done, part by part, and then to the folder."""
        return (*(step for one in self.parts for step in one.steps), *self.steps)

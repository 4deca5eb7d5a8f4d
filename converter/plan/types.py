"""What a plan is: every file that is written, copied or removed, and what is asked of it. Plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from converter.dtypes import DType, OnOverflow
from converter.errors import BadRequest
from converter.models.checkpoint import Checkpoint
from converter.models.component import Component, WeightSet
from converter.models.model import Model
from converter.models.names import Format, Naming, WeightsName
from converter.models.select import Tied, TiedName, as_tied, check_choice
from converter.plan.shards import limit_of
from converter.storage import FileRef, Place
from converter.tensors.base import Tensor, TensorSpec


@dataclass(frozen=True, slots=True)
class Writing:
    """How weights are written: in which format (None for the source's own), and under which tag.

    ``variant`` is a tag, ``"none"`` for untagged, or None for the source's own; with ``tag_dtype`` it is, where None,
    for the dtype and for what finds the weights to say. ``max_shard_size`` is None for the source's own shards,
    ``math.inf`` for a single file, or a text such as ``5GB``. ``tied`` tensors are written once, under the ``"first"``
    of their names or a name that is given here, or each by its name (``"duplicate"``); None leaves that to what loads
    them. With ``expand`` tensors are written however much more they take than what holds them, with ``force`` what only
    some loaders read. Raises BadRequest for what is none.
    """

    format: Format | None = "safetensors"
    variant: str | None = None
    tag_dtype: bool = False
    max_shard_size: float | None = None
    tied: Tied | TiedName | None = None
    expand: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        check_choice("format", self.format, Format, None)
        object.__setattr__(self, "tied", as_tied(self.tied))
        if self.max_shard_size is not None:
            object.__setattr__(self, "max_shard_size", limit_of(self.max_shard_size))

    @property
    def naming(self) -> Naming:
        """What sets are called."""
        return Naming(self.format, self.variant)


@dataclass(frozen=True, slots=True)
class Publishing:
    """What may become of what is there: ``overwrite`` what is in the way, the very set that is read ``in_place``.

    What is there of an output is left as it is with ``skip_existing``. ``delete_source`` removes what was read. With
    ``follow_links`` a new folder gets what the source has as links to other places. A repository of the Hub that is
    written to may be made by that (``create``, ``private``), or be proposed to (``pr``).
    """

    overwrite: bool = False
    in_place: bool = False
    delete_source: bool = False
    follow_links: bool = False
    create: bool = False
    private: bool = False
    pr: bool = False
    skip_existing: bool = False

    def __post_init__(self) -> None:
        if self.skip_existing and self.overwrite:
            raise BadRequest("--skip-existing", "leaves what --overwrite replaces", "Choose one.")

    @property
    def keeps_output_last(self) -> bool:
        """Whether weights that lie where they would be written are read only where there are no others."""
        return self.overwrite or self.skip_existing


class Order(NamedTuple):
    """A set to be written: of a component with the config that it is to have, all of it as it is to be.

    ``ties`` maps names that are not written to those that are. ``dtype`` is what was asked for, ``is_beside`` whether
    the component's folder is the one that is written to.
    """

    component: Component
    checkpoint: Checkpoint
    name: WeightsName
    ties: Mapping[str, str]
    dtype: DType | None = None
    is_beside: bool = False

    def with_config(self, config: dict[str, Any]) -> Order:
        """Give the same with another config."""
        return self._replace(component=replace(self.component, config=config))


class PlannedTensor(NamedTuple):
    """A tensor as it is written, at ``offset`` of its file."""

    tensor: Tensor
    offset: int


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One weight file to be written: ``path`` from the target folder, and the tensors in file order.

    ``header`` begins the file; what else a format needs between and after the tensors is written when their bytes are
    there. ``ties`` are names left out, each with the name in this file that it stands for. With a ``link`` the file
    comes out as the one that is there, byte for byte.
    """

    path: str
    format: Format
    header: bytes
    tensors: tuple[PlannedTensor, ...]
    nbytes: int
    ties: Mapping[str, str]
    link: Place | None = None

    @property
    def specs(self) -> list[TensorSpec]:
        """The tensors as a header describes them."""
        return [tensor.spec for tensor, _ in self.tensors]

    @property
    def computes(self) -> bool:
        """Whether a tensor has other numbers than those that lie in its source."""
        return any(tensor.source.computes for tensor, _ in self.tensors)


@dataclass(frozen=True, slots=True)
class PlannedSet:
    """One weight set to be written, from one that was read.

    ``ties`` maps each name left out to the name that stays, ``kept`` the tensors that a recast leaves in another dtype
    than the one that was asked for to that dtype, ``renamed`` names as they were to those that are written.
    """

    component: str
    source: WeightSet
    name: WeightsName
    files: tuple[PlannedFile, ...]
    index: tuple[str, bytes] | None
    ties: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, DType] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def tensor_count(self) -> int:
        return sum(len(file.tensors) for file in self.files)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a plan's files go: ``is_new`` for a folder that appears whole, else one to which files are added.

    ``real`` is its real place when it was looked at: one that is swapped for a link after that is not followed.
    ``existing`` are the sets that lie there, by component.
    """

    folder: Place
    is_new: bool
    real: Place
    existing: Mapping[str, Sequence[WeightSet]] = field(default_factory=dict)

    @classmethod
    def at(cls, folder: Place, is_new: bool = False) -> Target:
        """Give a folder as a target, by its real place of now."""
        return cls(folder, is_new, folder.real())


class QuantizedPart(NamedTuple):
    """What becomes of one component: its quantized modules with their bytes before and after, and its skip list."""

    component: str
    modules: tuple[tuple[str, int, int], ...]
    skipped: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rest:
    """What a plan has beside its sets: files to be copied and texts to be written, by their paths; and notes."""

    copied: Sequence[tuple[str, FileRef]] = ()
    generated: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    quantized: tuple[QuantizedPart, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a conversion writes, copies and removes; a name is a path from the target folder.

    ``copied`` are names with the file that each is copied from, ``generated`` names with content; ``replaced`` are
    names that go once the new files are there; ``removed_sources`` are source files that go last. ``dtype`` is what was
    asked for, ``overwrite`` whether files may be in the way. ``destroys_source`` where a file that is read is removed,
    or replaced, in the end. ``is_there`` where all of it lies there already, as far as headers, sizes and times tell.
    """

    source: Model
    target: Target
    sets: tuple[PlannedSet, ...]
    copied: tuple[tuple[str, FileRef], ...] = ()
    generated: tuple[tuple[str, bytes], ...] = ()
    replaced: tuple[str, ...] = ()
    removed_sources: tuple[Place, ...] = ()
    notes: tuple[str, ...] = ()
    dtype: DType | None = None
    on_overflow: OnOverflow = "error"
    overwrite: bool = False
    destroys_source: bool = False
    is_there: bool = False
    quantized: tuple[QuantizedPart, ...] = ()

    @property
    def files(self) -> tuple[PlannedFile, ...]:
        """All weight files."""
        return tuple(file for planned in self.sets for file in planned.files)

    @property
    def written(self) -> tuple[PlannedFile, ...]:
        """The weight files that are written anew; the others keep their content."""
        return tuple(file for file in self.files if file.link is None)

    @property
    def window(self) -> int:
        """How many bytes its tensors are read at a time, where a buffer has less; a task takes twice as many."""
        sources = (tensor.source for file in self.written for tensor, _ in file.tensors)
        return max((max(source.window, source.kept_nbytes // 2) for source in sources), default=1)

    @property
    def indexes(self) -> tuple[tuple[str, bytes], ...]:
        """The indexes, as names with content."""
        return tuple(planned.index for planned in self.sets if planned.index)

    @property
    def texts(self) -> tuple[tuple[str, bytes], ...]:
        """All files whose content is known now, as names with content."""
        return (*self.generated, *self.indexes)

    @property
    def names(self) -> tuple[str, ...]:
        """All files that are there in the end, in the order in which they take their places: indexes last."""
        others = (name for name, _ in (*self.copied, *self.generated))
        indexes = (name for name, _ in self.indexes)
        return tuple(dict.fromkeys((*others, *(file.path for file in self.files), *indexes)))

    @property
    def removed(self) -> tuple[str, ...]:
        """The files that are gone in the end: relative paths are from the target folder."""
        written = set(self.names)
        return (*(name for name in self.replaced if name not in written), *map(str, self.removed_sources))

    @property
    def written_nbytes(self) -> int:
        """The bytes of weight files that are written anew; what is linked is not."""
        return sum(file.nbytes for file in self.written)

    @property
    def nbytes(self) -> int:
        """The bytes of all weight files that are there in the end."""
        return sum(planned.nbytes for planned in self.sets)

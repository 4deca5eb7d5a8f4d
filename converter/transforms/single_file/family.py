"""What a kind of checkpoint is: its parts, what they are called in a single file and in a pipeline, how it is known.

All that is said of one is data, and is read in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from converter.libraries.base import Library
from converter.tensors.base import Tensor
from converter.transforms.layouts.rows import Row
from converter.transforms.layouts.sizes import Sizes

Config = Mapping[str, Any]
"""A config.json, of which nothing has been checked but what ``check_config`` looks at."""
Configs = Mapping[str, Config]
"""Those of a pipeline's parts, by the names of these."""
ABSENT = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of a pipeline that no single file holds."""
SCHEDULER = "scheduler/scheduler_config.json"
"""Where a pipeline says how it makes pictures, by its path."""
Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of tensors by their names."""


class Part(NamedTuple):
    """A model in a single file.

    ``classes`` are the names of its class in a config. ``prefixes`` are what its names begin with: the first is
    written, the others are read as well; in a file of its own it is ``lone``. For a config, ``rows`` gives those of its
    table, and ``shapes`` those of all tensors of its class. ``config_of`` gives a config for tensors of a single file,
    by their names without a prefix, where none is shipped. ``numbers`` are what has to be such in a config, as its
    class takes them where it has none, and ``words`` what else it may say, first that where it says nothing.
    ``buffers`` are last words of names that are no weights: a tensor of that name that no row has is left out. An
    optional part may be missing from a file and from a pipeline, and that is said.

    Either may have ``unread`` names that the other has not, which are left out and named. For a config and the tensors
    that there are, ``made`` are those that a pipeline has besides, and ``made_back`` those that readers of a single
    file look for, with what each is.
    """

    classes: tuple[str, ...]
    prefixes: tuple[str, ...]
    library: Library
    rows: Callable[[Config], list[Row]]
    shapes: Callable[[Config], Shapes]
    lone: str = ""
    config_of: Callable[[Sizes], dict[str, Any]] | None = None
    numbers: Config = MappingProxyType({})
    words: Mapping[str, Sequence[Any]] = MappingProxyType({})
    buffers: tuple[str, ...] = ()
    is_optional: bool = False
    unread: tuple[str, ...] = ()
    made: Callable[[Config, Sequence[Tensor]], list[Tensor]] | None = None
    made_back: Callable[[Config, Sequence[Tensor]], list[tuple[Tensor, str]]] | None = None


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of a family's models, by what the diffusion model is like.

    ``fits`` is asked of its shapes in a single file, by names without a prefix. ``pipeline`` is the class that runs it,
    ``words`` what is said of it, ``changes`` what is other in the configs that are shipped, by their paths.
    """

    pipeline: str
    fits: Callable[[Shapes], bool]
    words: str = ""
    changes: Configs = field(default_factory=dict)


def _always(_: Any) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of checkpoint.

    ``parts`` are those that have weights, by their names in a pipeline, the diffusion model first. It has a tensor
    ``mark``, by its name without a prefix; of several families with it that one is meant whose text encoders are there,
    or else that which ``is_of`` the shapes of the diffusion model; none of ``kinds`` fits what is for another purpose.
    A pipeline is of it by its class, which is that of a kind or one of ``others``, if it ``owns`` the configs in it.
    ``folder`` is that in ``configs`` where those of a pipeline are shipped, all of them or some. ``apart`` are parts of
    a pipeline that are files of their own beside the single one. ``marks`` are names of empty tensors by which a UI is
    told what else the scheduler's config says: a key and its value. ``turns`` are names of tensors by which a UI is
    told that a file is of a model that was trained otherwise than what is shipped says. ``remark`` is what there is to
    say of a file that is made of a pipeline.
    """

    name: str
    mark: str
    parts: Mapping[str, Part]
    kinds: tuple[Kind, ...]
    is_of: Callable[[Shapes], bool] = field(default=_always)
    owns: Callable[[Configs], bool] = field(default=_always)
    others: tuple[str, ...] = ()
    folder: str = ""
    apart: tuple[str, ...] = ()
    marks: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    turns: tuple[str, ...] = ()
    remark: str = ""

    @property
    def core(self) -> str:
        """The name of the diffusion model."""
        return next(iter(self.parts))

    @property
    def encoders(self) -> tuple[str, ...]:
        """The names of the text encoders."""
        return tuple(name for name in self.parts if name.startswith("text_encoder"))

    def passed(self, names: Iterable[str]) -> dict[str, str]:
        """Give what a pipeline's class is given in Python for parts that are not there, of these names."""
        return {name: "None" if self.parts[name].is_optional else name for name in names}

    @property
    def pipelines(self) -> tuple[str, ...]:
        """The classes of pipelines that are of it, if it owns their configs."""
        return (*(kind.pipeline for kind in self.kinds), *self.others)

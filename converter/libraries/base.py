"""What each model's own loader wants: one question a method, and a module a library that answers.

A rule names the loader that makes it. What is seen of a folder (``FolderListing``) and what of it is opened (``Pick``)
are plain values here, so that no pick looks at a disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from converter.dtypes import DType
from converter.libraries.written import Written, WrittenSet, from_pretrained, is_bare
from converter.models.component import Component
from converter.models.model import Model
from converter.models.names import STEMS, Format, WeightsName
from converter.models.select import Tied
from converter.storage import Place

DTYPE_KEYS = ("dtype", "torch_dtype")  # transformers 5 reads both, 4 only the second
Keeps = Callable[[str], bool]
"""Says of a tensor's name whether it stays float32."""


class Library(Protocol):
    """What a library wants of the weights of its models.

    ``package`` is the one that has their classes. ``tags_recasts`` where its users ask for a dtype by a variant,
    ``reads_dtype`` where a model is loaded in the dtype that its config names. ``quantized_dtype`` is what
    the rest of a quantized model is loaded in, where that must be said.
    """

    package: str
    tags_recasts: bool = False
    reads_dtype: bool = False
    quantized_dtype: str = ""

    def owns(self, component: Component) -> bool:
        """Say whether the library loads a component."""

    def stem(self, form: Format) -> str:
        """Give what the names of weights begin with that its loader looks for."""
        return STEMS[self.package][form]

    def is_sought(self, name: WeightsName) -> bool:
        """Say whether its loader looks for weights of a name, their variant asked for."""
        return name.ext in ("safetensors", "bin") and self.stem(name.format) == name.stem

    def finds(self, component: Component, name: WeightsName) -> bool:
        """Say whether its loader finds the weights of a component by their name, and by the config that goes with."""
        return self.owns(component) and self.is_sought(name)

    def no_variants(self, folder: Model) -> str:
        """Name the loader that opens a folder, in a sentence, where it finds no variants; nothing where it does."""
        return ""

    def ties(self, component: Component, name: WeightsName) -> Tied:
        """Say whether tied tensors are written once or each by its name, where the user does not.

        Written once, they must be tied again on load: where they are not, a name that is not in the file is a missing
        weight.
        """
        return "duplicate"

    def refuses(
        self, component: Component, name: WeightsName, count: int, tensors: Iterable[str]
    ) -> tuple[str, str] | None:
        """Say why its loader does not read a set of so many files that hold these tensors, and what to do then."""
        return None

    def reads_shards(self, form: Format) -> bool:
        """Say whether its loader reads shards in a format."""
        return True

    def find_old_name(self, component: Component, tensors: Iterable[str]) -> str | None:
        """Give a tensor, if there is one, that its loader knows only in a set of one file."""
        return None

    def keeps_fp32(self, component: Component, dtype: DType) -> Keeps:
        """Say which tensors of a component it keeps in float32 when it loads them in a smaller dtype.

        A model that is made of others keeps what its parts keep, and its config says what they are.
        """
        rules = {self.keep_rule(name, dtype) for name in component.class_names} | {self.matches(component.more_fp32)}
        rules.discard(keep_nothing)
        return (lambda name: any(rule(name) for rule in rules)) if rules else keep_nothing

    def keep_rule(self, class_name: str, dtype: DType) -> Keeps:
        """Say which tensors of a class it keeps in float32 when it loads them in a dtype."""
        if dtype.bits >= 32 or not dtype.is_floating:
            return keep_nothing
        return self.matches(self.kept_entries(class_name, dtype))

    def kept_entries(self, class_name: str, dtype: DType) -> list[str]:
        """Give what the tables list for a class that is loaded in a dtype."""
        return [entry for lists in self.kept_lists(class_name) for entry in self.entries_for(lists, dtype)]

    def kept_lists(self, class_name: str) -> Iterable[Sequence[Sequence[str]]]:
        """Give a class's two lists, for float16 and for every smaller dtype, of each row of the tables that has it."""

    def entries_for(self, lists: Sequence[Sequence[str]], dtype: DType) -> list[str]:
        """Give the entries of two such lists that hold for a dtype."""
        fp16, every = lists
        return [*fp16, *every]

    def matches(self, entries: Iterable[str]) -> Keeps:
        """Say which tensors are meant by the entries of such a list."""

    def is_skipped(self, module: str, entries: Iterable[str]) -> bool:
        """Say whether its loader leaves a linear module as it is, given the entries of its skip list."""

    def spell_skipped(self, component: Component, module: str, weight: str) -> tuple[str, ...]:
        """Give the entries that make its loader skip a module, whose weight has a name of its own in the file.

        The first is needed, the others are for versions that know the module by another name.
        """
        return (module,)

    def cast_config(self, component: Component, config: dict[str, Any], dtype: DType) -> dict[str, Any]:
        """Give the config of a component whose weights are cast, with the dtype that it is to be loaded in.

        No model runs in 8 bits, so of those nothing is said.
        """
        return config if dtype.bits < 16 else with_dtype(config, dtype.torch_name)

    def pick(self, part: PartListing, variant: str | None, pickles: bool = True) -> Pick:
        """Say which files its loader opens of a part for a variant (None for the untagged one)."""

    def note_quantized(self, package: str) -> str:
        """Say what else there is to know of a model that a package has quantized before its loader is called."""
        return ""

    def load_folder(self, written: Written) -> list[str]:
        """Give the Python lines that load all of a folder at once, none where that cannot be."""
        return []

    def load_set(self, written: Written, one: WrittenSet) -> list[str]:
        """Give the Python lines that load one set of a folder, none where the library does not find it by itself."""
        name = one.component.class_name  # AutoModel would take what the bare model has, and leave its head
        if not name or is_bare(written, one) or written.is_variantless or not self.finds(one.component, one.name):
            return []
        folder = written.folder / one.component.name
        return from_pretrained(written, [one], folder, self.home_of(name), name, self.quantized_dtype)

    def home_of(self, class_name: str) -> str:
        """Give the module that a class is imported from."""
        return self.package


def keep_nothing(_: str) -> bool:
    """Say of every tensor that it is cast."""
    return False


def with_dtype(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Give a config with another dtype, its sub-configs' too; transformers 5 writes ``dtype``, 4 ``torch_dtype``."""

    def changed(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return with_dtype(value, name)
        return name if key in DTYPE_KEYS and isinstance(value, str) else value

    return {key: changed(key, value) for key, value in config.items()}


# What a loader sees of a folder, and what it opens.


@dataclass(frozen=True, slots=True)
class IndexListing:
    """What matters of an index to a loader: the shards it names, and why it would not be opened."""

    shards: tuple[str, ...]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class PartListing:
    """One folder that a model is loaded from: its files by name, what its indexes name, and its other entries."""

    name: str
    path: Place
    library: Library
    names: frozenset[str]
    indexes: Mapping[str, IndexListing]
    others: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class FolderListing:
    """What a loader sees of a folder: ``parts`` are what it loads weights from.

    ``absent`` are parts that model_index.json names and that are not there, ``dotless`` the entries of the folders it
    names that have no dot in their names.
    """

    is_pipeline: bool
    parts: tuple[PartListing, ...]
    absent: tuple[str, ...] = ()
    dotless: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Pick:
    """The weight files that a loader opens for one part, its index among them; or how that fails."""

    component: str
    files: tuple[str, ...] = ()
    failure: str = ""


def pick_shards(part: PartListing, index_name: str) -> Pick:
    """Pick what an index names, as every loader does."""
    index = part.indexes.get(index_name, IndexListing((), f"cannot read {index_name}"))
    if index.problem:
        return Pick(part.name, (index_name,), index.problem)
    missing = [shard for shard in index.shards if shard not in part.names]
    if missing:
        return Pick(part.name, (index_name,), f"no file named {missing[0]}, which {index_name} names")
    return Pick(part.name, (index_name, *index.shards))


def pick_single(part: PartListing, names: list[str]) -> Pick:
    """Pick the first of some files that is there."""
    for name in names:
        if name in part.names:
            return Pick(part.name, (name,))
    return Pick(part.name, (), f"no file named {names[-1]}")

"""The plain values that plans carry: a component of a model, and the weight sets that lie in its folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from converter.errors import HostileFile
from converter.models.configs import read_json
from converter.models.names import WEIGHT_EXTENSIONS, WeightsName
from converter.storage import Place

_MAX_CLASSES = 16  # those that hear, see and speak have four or five; each asks about the name of every tensor


@dataclass(frozen=True, slots=True)
class WeightSet:
    """The files of one set in a folder, not yet opened. Sharded sets have an ``index_name`` or their numbers.

    ``pieces`` are files that only the one in ``file_names`` says how to read.
    """

    folder: Place
    name: WeightsName
    file_names: tuple[str, ...]
    index_name: str | None = None
    is_legacy: bool = False
    pieces: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def all_names(self) -> tuple[str, ...]:
        """The set's weight files and its index: all that goes when the set goes."""
        return (*self.file_names, *self.pieces, *([self.index_name] if self.index_name else ()))

    @property
    def format(self) -> str:
        """The format, as far as names say it."""
        return self.name.ext if self.is_of_many else self.name.format

    @property
    def is_of_many(self) -> bool:
        """Whether it is a training checkpoint, of files that are read together."""
        return self.name.ext not in ("", *WEIGHT_EXTENSIONS)  # a single file may have any name

    @property
    def label(self) -> str:
        """What one would name in its folder to mean this set: its index, or its first file."""
        return self.index_name or self.file_names[0]

    @property
    def around(self) -> str:
        """The folder below its own in which a training checkpoint lies, as below a trainer's root; empty for none."""
        return self.label.rpartition("/")[0] if self.is_of_many else ""

    @property
    def path(self) -> Place:
        """Where that lies."""
        return self.folder / self.label


Companions = tuple[Place, ...]
"""Files that belong beside weights, under the names that they have."""


@dataclass(frozen=True)  # without slots, for what is looked for once
class Component:
    """One folder that holds weights: ``name`` is ``unet``, or empty for the folder itself.

    ``more_fp32`` is what its installed library keeps in float32 beyond what our table says. ``companions`` are its
    config and its tokenizer, where those lie in another folder.
    """

    name: str
    path: Place
    weight_sets: tuple[WeightSet, ...]
    config: dict[str, Any]
    more_fp32: tuple[str, ...] = ()
    companions: Companions = ()

    @property
    def class_name(self) -> str:
        """The class that its config names: Diffusers' ``_class_name``, or transformers' first architecture."""
        return _class_in(self.config)

    @cached_property
    def class_names(self) -> set[str]:
        """The classes that its config and all nested ones name: a transformers model may be made of others."""
        named = (config for config in nested(self.config) if "_class_name" in config or "architectures" in config)
        names = {name for config in named if (name := _class_in(config))}
        if len(names) > _MAX_CLASSES:
            raise HostileFile(self.path / "config.json", f"names {len(names):,} classes, which no model is made of")
        return names


def _class_in(config: dict[str, Any]) -> str:
    architectures = config.get("architectures")
    first = architectures[0] if architectures and isinstance(architectures, list) else ""
    name = config.get("_class_name") or first
    # What is no identifier is no class either, and may be made to be pasted into a shell.
    return name if isinstance(name, str) and name.isidentifier() else ""


# compressed-tensors' older name for it is the second.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")


def has_quantization(config: dict[str, Any]) -> bool:
    """Say whether a config, or one in it, says that its weights are quantized."""
    return any(key in one for one in nested(config) for key in QUANTIZATION_KEYS)


def quantization_of(config: dict[str, Any]) -> dict[str, Any]:
    """Give what a config, or one in it, says of how its weights are quantized; empty where none does."""
    said = (one[key] for one in nested(config) for key in QUANTIZATION_KEYS if isinstance(one.get(key), dict))
    return next(said, {})


# Where auto_gptq and autoawq put it before config.json had it; and what else quantizers write beside that: ModelOpt,
# and one of compressed-tensors' older tools.
_OWN_CONFIGS = ("quantize_config.json", "quant_config.json")
QUANTIZER_CONFIGS = (*_OWN_CONFIGS, "hf_quant_config.json", "quantization_config.json")


def quantization_beside(component: Component) -> dict[str, Any]:
    """Give what a config says of how its weights are quantized, or else a file beside it. Raises BadFile."""
    said = quantization_of(component.config)
    for name in () if said else _OWN_CONFIGS:
        said = said or read_json(component.path / name)
    return said


def nested(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Give a config and all that are in it."""
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from nested(value)

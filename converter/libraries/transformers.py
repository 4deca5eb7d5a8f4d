"""transformers: a model whose config names an architecture or a ``model_type``; and what no other library owns.

Its models tie weights again on load, keep tensors by regular expressions, and take from their config the dtype that
they are loaded in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from converter.dtypes import DType
from converter.errors import Unsupported
from converter.libraries import keep_fp32
from converter.libraries.base import (
    DTYPE_KEYS,
    Keeps,
    Library,
    PartListing,
    Pick,
    keep_nothing,
    pick_shards,
    pick_single,
)
from converter.models.component import Component
from converter.models.names import STEMS, WeightsName
from converter.models.select import Tied

# Models of transformers that Diffusers has, for pipelines of its own.
_DIFFUSERS_HOMES = {
    "IFSafetyChecker": "diffusers.pipelines.deepfloyd_if",
    "StableDiffusionSafetyChecker": "diffusers.pipelines.stable_diffusion",
}
_PLAIN = re.compile(r"[^\\^$*+?{}\[\]|()]+")  # a name that is a regular expression for itself
# What names in a file may begin with and those in the class not (``base_model_prefix`` of transformers' classes).
_BASES = ("model.", "transformer.", "text_model.")


class Transformers(Library):
    """A model of transformers; also one of no known library, which no loader finds by its name."""

    package = "transformers"
    reads_dtype = True

    def owns(self, component: Component) -> bool:
        return True

    def finds(self, component: Component, name: WeightsName) -> bool:
        return names_model(component) and self.is_sought(name)

    def ties(self, component: Component, name: WeightsName) -> Tied:
        """A model ties again what its config says is tied (``tie_weights`` in ``transformers/modeling_utils.py``)."""
        return "first" if self.finds(component, name) and not _unties(component.config) else "duplicate"

    def kept_lists(self, class_name: str) -> Iterable[Sequence[Sequence[str]]]:
        rows = (*keep_fp32.TRANSFORMERS, *keep_fp32.MORE_TRANSFORMERS)
        return [(fp16.split(), strict.split()) for fp16, strict, classes in rows if class_name in classes.split()]

    def entries_for(self, lists: Sequence[Sequence[str]], dtype: DType) -> list[str]:
        """``_keep_in_fp32_modules`` is for float16 alone, ``_keep_in_fp32_modules_strict`` for bfloat16 too.

        ``_get_dtype_plan`` in ``transformers/modeling_utils.py``. Neither is for float8, where what is not known to
        fit is kept.
        """
        return list(lists[1]) if dtype.tag == "BF16" else super().entries_for(lists, dtype)

    def keep_rule(self, class_name: str, dtype: DType) -> Keeps:
        keep = super().keep_rule(class_name, dtype)
        spared = self.matches(e for e, classes in keep_fp32.NOT_TRANSFORMERS if class_name in classes.split())
        return keep if spared is keep_nothing else lambda name: keep(name) and not spared(name)

    def matches(self, entries: Iterable[str]) -> Keeps:
        """An entry is a regular expression for any part of a name, with ``*`` for ``.*``.

        ``build_glob_alternation`` and its ``search`` in ``transformers/core_model_loading.py``.
        """
        patterns = [entry.replace("*", ".*") for entry in entries]
        if not patterns:
            return keep_nothing
        pattern = re.compile("|".join(f"(?:{body})" for body in patterns))
        return lambda name: pattern.search(name) is not None

    def is_skipped(self, module: str, entries: Iterable[str]) -> bool:
        """An entry is the end of the name, or a regular expression for its begin, up to a dot.

        ``should_convert_module`` in ``transformers/quantizers/quantizers_utils.py``.
        """
        boundary = r"(?:(?<=\.)|(?=\.|$))"
        return any(module.endswith(entry) or re.match(f"(?:{entry}){boundary}", module) for entry in entries)

    def spell_skipped(self, component: Component, module: str, weight: str) -> tuple[str, ...]:
        """As the class has it, as the file does, and without the name of a base model: versions differ in that."""
        if not _PLAIN.fullmatch(module):
            problem = f"has the module {module!r}, and transformers takes what it skips for regular expressions"
            raise Unsupported(component.path, problem, "Rename it.")
        longer = weight.removesuffix(".weight")
        shorter = (longer.removeprefix(base) for base in _BASES if longer.startswith(base))
        return (module, longer, *shorter) if longer else (module,)

    def cast_config(self, component: Component, config: dict[str, Any], dtype: DType) -> dict[str, Any]:
        """Say the dtype where the config did not: transformers 5 takes it from there."""
        edited = super().cast_config(component, config, dtype)
        is_said = any(isinstance(edited.get(key), str) for key in DTYPE_KEYS)
        if dtype.bits < 16 or is_said or not names_model(component):
            return edited
        return {**edited, DTYPE_KEYS[1]: dtype.torch_name}

    def pick(self, part: PartListing, variant: str | None, pickles: bool = True) -> Pick:
        """Follow ``_get_resolved_checkpoint_files``: the single file before the index, safetensors before pickles.

        It looks for a model even where there is but an adapter.
        """
        safe = WeightsName(STEMS[self.package]["safetensors"], variant, "safetensors")
        names = [safe, safe.in_format("torch")] if pickles else [safe]
        for name in names:
            if name.single in part.names:
                return Pick(part.name, (name.single,))
            if name.index in part.names:
                return pick_shards(part, name.index)
        return pick_single(part, [name.single for name in names])

    def home_of(self, class_name: str) -> str:
        return _DIFFUSERS_HOMES.get(class_name, self.package)


TRANSFORMERS = Transformers()


def names_model(component: Component) -> bool:
    """Say whether a component's config is that of a transformers model."""
    has_model = bool(component.class_name) or isinstance(component.config.get("model_type"), str)
    return has_model and "_class_name" not in component.config


def _unties(config: dict[str, Any]) -> bool:
    """Say whether a config, or where it is silent that of a part, says that embeddings are not tied."""
    own = config.get("tie_word_embeddings")
    if own is not None:
        return own is False
    return any(_unties(value) for value in config.values() if isinstance(value, dict))

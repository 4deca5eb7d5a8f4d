"""Diffusers: a model whose config names a ``_class_name``, and pipelines of such.

Its users ask for a dtype by a variant. Its models keep their tensors by whole names, look for an index before they look
for a single file, and read no shards of pickles.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from converter.libraries import keep_fp32
from converter.libraries.base import Keeps, Library, PartListing, Pick, keep_nothing, pick_shards, pick_single
from converter.libraries.written import Written, WrittenSet, from_pretrained, must_be_torch
from converter.models.component import Component
from converter.models.model import Model
from converter.models.names import Format, WeightsName

# Renamed on load, but only where the checkpoint is one file (``_fix_state_dict_keys_on_load`` and its call in
# ``diffusers/models/modeling_utils.py``): in shards these tensors are silently not used.
_OLD_ATTENTION_CLASSES = frozenset({"AutoencoderKL", "VQModel", "UNet2DModel"})
_OLD_ATTENTION_NAME = re.compile(r".*\.attentions\.\d+\.(query|key|value|proj_attn)\.(weight|bias)")
_LORA_STEM = "pytorch_lora_weights"  # ``LORA_WEIGHT_NAME`` in ``diffusers/loaders/lora_base.py``


class Diffusers(Library):
    """A model of Diffusers, or a pipeline."""

    package = "diffusers"
    tags_recasts = True
    quantized_dtype = "float16"

    def owns(self, component: Component) -> bool:
        return "_class_name" in component.config

    def no_variants(self, folder: Model) -> str:
        """See ``_identify_model_variants`` in ``diffusers/pipelines/pipeline_loading_utils.py``."""
        return "Diffusers at the root" if folder.kind == "pipeline" and not folder.components[0].name else ""

    def refuses(
        self, component: Component, name: WeightsName, count: int, tensors: Iterable[str]
    ) -> tuple[str, str] | None:
        if count == 1:
            return None
        if not self.reads_shards(name.format):
            advice = "Use --max-shard-size none, or --force."
            return "would become sharded .bin, which no Diffusers pipeline loads", advice
        old = self.find_old_name(component, tensors)
        if old is None:
            return None
        problem = f"has tensors with old names, such as {old!r}, which Diffusers reads from a single file only"
        return problem, "Use --max-shard-size none."

    def reads_shards(self, form: Format) -> bool:
        """See ``ModelMixin.from_pretrained`` in ``diffusers/models/modeling_utils.py``."""
        return form != "torch"

    def find_old_name(self, component: Component, tensors: Iterable[str]) -> str | None:
        if component.class_name not in _OLD_ATTENTION_CLASSES:
            return None
        return next((name for name in tensors if _OLD_ATTENTION_NAME.fullmatch(name)), None)

    def kept_lists(self, class_name: str) -> Iterable[Sequence[Sequence[str]]]:
        return [((), entries.split()) for entries, classes in keep_fp32.DIFFUSERS if class_name in classes.split()]

    def matches(self, entries: Iterable[str]) -> Keeps:
        """An entry is a whole segment between the dots of a name, for whatever dtype.

        ``load_model_dict_into_meta`` in ``diffusers/models/model_loading_utils.py``.
        """
        kept = frozenset(entries)
        return (lambda name: not kept.isdisjoint(name.split("."))) if kept else keep_nothing

    def is_skipped(self, module: str, entries: Iterable[str]) -> bool:
        """An entry is the last part of the name, a part of it that ends at a dot, or all of it.

        ``_replace_with_bnb_linear`` in ``diffusers/quantizers/bitsandbytes/utils.py``.
        """
        last = module.rpartition(".")[2]
        return any(entry in (last, module) or f"{entry}." in module for entry in entries)

    def pick(self, part: PartListing, variant: str | None, pickles: bool = True) -> Pick:
        """Follow ``ModelMixin.from_pretrained``: the index before the single file; pickles in one file only."""
        name = WeightsName(self.stem("safetensors"), variant, "safetensors")
        index = name.index
        if variant is not None and index not in part.names:
            # ``_fetch_index_file_legacy`` cuts the path at its dots, and so finds nothing below a folder with one.
            legacy = f"{name.stem}.{name.ext}.{variant}.index.json"
            index = legacy if "." not in str(part.path) else index
        if index in part.names:
            return pick_shards(part, index)
        return pick_single(part, [name.single, *([name.in_format("torch").single] if pickles else [])])

    def note_quantized(self, package: str) -> str:
        said = f"Diffusers loads what {package} has quantized on a machine with a GPU only."
        return said if package == "bitsandbytes" else ""

    def load_folder(self, written: Written) -> list[str]:
        if not self._loads_whole(written):
            return []
        arguments = ("DiffusionPipeline", self.quantized_dtype, "balanced")
        passed = written.source.passed
        lines = from_pretrained(written, written.sets, written.folder, self.package, *arguments, passed=passed)
        return [*_say_passed(passed), *lines]

    def _loads_whole(self, written: Written) -> bool:
        """Say whether the pipeline's loader takes what is written, and not another form of it that lies beside it.

        It does not begin where the pipeline's class is code in the folder, and asks for no variant at the root.
        """
        if written.source.kind != "pipeline" or not written.source.class_name:
            return False
        if any(one.name.variant and not one.component.name for one in written.sets):
            return False
        if not any(must_be_torch(written, one) for one in written.sets):
            return True
        pickled = {one.component.name for one in written.sets if one.name.format == "torch"}
        return pickled == {component.name for component in written.source.components}

    def load_set(self, written: Written, one: WrittenSet) -> list[str]:
        if one.name.stem == _LORA_STEM and len(one.files) == 1:
            arguments = f"{str(written.folder / one.component.name)!r}, weight_name={one.files[0].name!r}"
            return ["# pipe is the pipeline that it is for", f"pipe.load_lora_weights({arguments})"]
        return super().load_set(written, one)


def load_single_file(class_name: str, path: Path, passed: Mapping[str, str]) -> list[str]:
    """Give the Python lines that load a single file with one of its classes, with what that has to be given."""
    arguments = ", ".join([repr(str(path)), *(f"{name}={value}" for name, value in passed.items())])
    return [
        *_say_passed(passed), f"from diffusers import {class_name}", f"{class_name}.from_single_file({arguments})"
    ]  # fmt: skip


def _say_passed(passed: Mapping[str, str]) -> list[str]:
    """Say in a comment what names stand for that the reader has to fill in."""
    models = [name for name, value in passed.items() if value == name]
    return [f"# {' and '.join(models)}: of the pipeline that it is for"] if models else []


DIFFUSERS = Diffusers()

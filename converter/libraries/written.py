"""What was written, as far as the Python lines that load it go by it, and lines that several libraries share.

What a library finds by itself is loaded by its own loader: a pipeline, a model, an adapter. It goes by names, so what
is named otherwise is loaded file by file, which gives the state dict of any set. No line makes a library run code that
lies in the folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from converter.dtypes import DType
from converter.models.component import Component
from converter.models.model import Model
from converter.models.names import WeightsName


class WrittenSet(NamedTuple):
    """One set: ``files`` are its weight files, ``is_quantized`` where some of it is written as quantized weights."""

    component: Component
    name: WeightsName
    files: tuple[Path, ...]
    is_quantized: bool


class Written(NamedTuple):
    """What lies in a folder that was made from ``source``, or (not ``is_new``) among what had been there.

    ``dtype`` is the one that was asked for; ``is_variantless`` where the source's loader finds no variants.
    """

    source: Model
    folder: Path
    is_new: bool
    is_variantless: bool
    dtype: DType | None
    sets: tuple[WrittenSet, ...]


def must_be_torch(written: Written, one: WrittenSet) -> bool:
    """Say whether loaders take a set only if they are told to: they look for safetensors first, of shards for no other.

    ``ModelMixin.from_pretrained`` in ``diffusers/models/modeling_utils.py``.
    """
    return one.name.format == "torch" and (not written.is_new or len(one.files) > 1)


def is_found_plain(written: Written, one: WrittenSet) -> bool:
    """Say whether a library without variants, that looks for safetensors before it looks for .bin, finds a set."""
    return one.name.variant is None and not must_be_torch(written, one)


def is_bare(written: Written, one: WrittenSet) -> bool:
    """Say whether no library is to load a set: it is a file by itself, or its class is code in the folder."""
    is_file = written.source.kind == "file" and not one.component.companions
    return is_file or "auto_map" in one.component.config


def from_pretrained(
    written: Written,
    sets: Sequence[WrittenSet],
    folder: Path,
    module: str,
    class_name: str,
    quantized_dtype: str = "",
    device_map: str = "auto",
    passed: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """Load sets of a folder with a class; what is quantized needs a ``device_map``, and ``quantized_dtype`` if any.

    ``passed`` are parts that are not there, and what the class is given for them.

    ``torch_dtype`` is known to every version of both libraries; the newest ones say that ``dtype`` is to replace it.
    """
    variants = sorted(one.name.variant or "" for one in sets)
    is_quantized = any(one.is_quantized for one in sets)
    arguments = [repr(str(folder))]
    if variants and variants[0]:
        arguments.append(f"variant={variants[0]!r}")
    if any(must_be_torch(written, one) for one in sets):
        arguments.append("use_safetensors=False")
    dtype = written.dtype.torch_name if written.dtype is not None and written.dtype.bits >= 16 else ""
    dtype = dtype or (quantized_dtype if is_quantized else "")
    if dtype:
        arguments.append(f"torch_dtype=torch.{dtype}")
    if is_quantized:
        arguments.append(f'device_map="{device_map}"')
    arguments += (f"{name}={value}" for name, value in passed.items())
    imports = ["import torch"] if dtype else []
    return [*imports, f"from {module} import {class_name}", f"{class_name}.from_pretrained({', '.join(arguments)})"]


def load_files(one: WrittenSet) -> list[str]:
    """Load the state dict of a set, whatever its files are called."""
    is_torch = one.name.format == "torch"
    imported = "import torch" if is_torch else "from safetensors.torch import load_file"
    load = "torch.load({}, weights_only=True, mmap=True)" if is_torch else "load_file({})"
    if len(one.files) == 1:
        return [imported, load.format(repr(str(one.files[0])))]
    first, last = str(one.files[0]).rsplit("-00001-", 1)
    numbered = f'[{first + "-"!r} + f"{{number:05d}}" + {"-" + last!r} for number in range(1, {len(one.files) + 1})]'
    each = load.format("path")
    return [imported, f"paths = {numbered}", f"{{name: tensor for path in paths for name, tensor in {each}.items()}}"]

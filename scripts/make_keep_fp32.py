"""Write the tables of converter/libraries/keep_fp32.py from the classes of diffusers and transformers themselves.

``--check`` only says whether they are up to date. ``--missed`` builds every transformers model from its default config
(without weights, some minutes) and says where its loader keeps other names than the rules do: for the rows by hand.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from converter.dtypes import BY_ALIAS
from converter.libraries.transformers import TRANSFORMERS

MODULE = Path(__file__).resolve().parent.parent / "converter" / "libraries" / "keep_fp32.py"
BEGIN = "# Written by scripts/make_keep_fp32.py."
END = "# End of what scripts/make_keep_fp32.py writes.\n"

Lists = tuple[tuple[str, ...], ...]
"""Diffusers: the one list of a class; transformers: that for float16 and the strict one."""


def import_all() -> list[str]:
    """Import every module with models of both libraries; give those that cannot be, with the reason."""
    packages = ["diffusers.models", "diffusers.pipelines", "transformers.models"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = [name for package in packages for name in find_modules(package)]
        return [failure for name in names if (failure := try_import(name))]


def try_import(name: str) -> str:
    """Import a module; give the reason if it cannot be."""
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever an optional dependency does
        return f"{name}: {error}"
    return ""


def find_modules(package: str) -> Iterator[str]:
    """List the modules below a package: of transformers those with models, of Diffusers all but the pipelines' own."""
    path = importlib.import_module(package).__path__
    for module in pkgutil.walk_packages(path, f"{package}.", onerror=lambda _: None):
        last = module.name.rpartition(".")[2]
        if last.startswith("modeling_") if package.startswith("transformers") else not last.startswith("pipeline_"):
            yield module.name


def find_classes(base: type) -> list[Any]:
    """List the classes that can stand in a config, of those imported so far."""
    found: set[type[Any]] = set()
    waiting: list[type[Any]] = [base]
    while waiting:
        for derived in waiting.pop().__subclasses__():
            # Another `...PretrainedModel` is a model.
            if derived.__module__.startswith(("diffusers.", "transformers.")) and derived not in found:
                found.add(derived)
                waiting.append(derived)
    return sorted((c for c in found if not c.__name__.endswith("PreTrainedModel")), key=lambda c: c.__name__)


def diffusers_lists() -> dict[str, Lists]:
    """Give what the Diffusers classes imported so far keep in float32, by class name."""
    return {
        found.__name__: (as_tuple(found._keep_in_fp32_modules),)
        for found in find_classes(diffusers.ModelMixin)
        if found._keep_in_fp32_modules
    }


def transformers_lists() -> dict[str, Lists]:
    """Give what the transformers classes imported so far keep in float32, by class name."""
    return {
        found.__name__: (as_tuple(found._keep_in_fp32_modules), as_tuple(found._keep_in_fp32_modules_strict))
        for found in find_classes(transformers.PreTrainedModel)
        if found._keep_in_fp32_modules or found._keep_in_fp32_modules_strict
    }


def as_tuple(listed: Any) -> tuple[str, ...]:
    """Give the entries of an attribute that may be a string, a list, a set or None."""
    if isinstance(listed, str):
        return (listed,)
    return tuple(sorted(listed) if isinstance(listed, set) else listed or ())


def render() -> str:
    """Give the part of the module that is written."""
    versions = f'"diffusers": "{diffusers.__version__}", "transformers": "{transformers.__version__}"'
    rows = "".join(
        [
            "DIFFUSERS: tuple[tuple[str, str], ...] = (\n",
            *render_rows(diffusers_lists()),
            ")\n\nTRANSFORMERS: tuple[tuple[str, str, str], ...] = (\n",
            *render_rows(transformers_lists()),
            ")\n",
        ]
    )
    return f"{BEGIN}\nMADE_FROM = {{{versions}}}\n{rows}{END}"


def render_rows(lists: dict[str, Lists]) -> Iterator[str]:
    """Give a row for each set of lists, with the classes that have it."""
    classes: dict[Lists, list[str]] = {}
    for name, kept in sorted(lists.items()):
        classes.setdefault(kept, []).append(name)
    for kept, names in classes.items():
        strings = [" ".join(words) for words in (*kept, names)]
        row = "    (" + ", ".join(f'"{string}"' for string in strings) + "),\n"
        yield row if len(row) <= 121 else "    (\n" + "".join(map(render_string, strings)) + "    ),\n"


def render_string(string: str) -> str:
    """Give words as a string literal over as many lines as it takes."""
    *lines, last = textwrap.wrap(string, 108, break_long_words=False, break_on_hyphens=False) or [""]
    return "".join(f'        "{line} "\n' for line in lines) + f'        "{last}",\n'


def split_module() -> tuple[str, str, str]:
    """Give the module before, in and after the part that is written."""
    text = MODULE.read_text("utf-8")
    begin, end = text.index(BEGIN), text.index(END) + len(END)
    return text[:begin], text[begin:end], text[end:]


def build(model_class: Any) -> Any:
    """Build a transformers model from its default config, as its loader does for bfloat16, without weights."""
    from transformers.modeling_utils import local_torch_dtype

    with torch.device("meta"), local_torch_dtype(torch.bfloat16):
        return model_class(model_class.config_class())


def loader_rule(model: Any, dtype: torch.dtype) -> tuple[list[str], Callable[[str], bool]]:
    """Give the names that a model's file has, and the predicate that the loader makes one float32.

    The steps of ``convert_and_load_state_dict_in_model`` in ``transformers/core_model_loading.py``.
    """
    from transformers import core_model_loading as core
    from transformers.conversion_mapping import get_model_conversion_mapping

    state = model.state_dict()
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, core.WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, core.WeightConverter)]
    dtype_plan = model._get_dtype_plan(dtype)
    listed = core.build_glob_alternation(list(dtype_plan))[0] if dtype_plan else None
    model._weight_conversions = conversions
    held = core.revert_weight_conversion(model, dict(state))
    names = [name for name, tensor in held.items() if tensor.is_floating_point()]

    def is_kept(name: str) -> bool:
        renamed, _ = core.rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if listed and listed.search(renamed):
            return True
        return renamed in state and state[renamed].dtype == torch.float32

    return names, is_kept


def find_missed(model_class: Any) -> dict[str, list[str]]:
    """Say which names our rule and the loader of a transformers class see differently, by what is wrong with ours."""
    missed: dict[str, set[str]] = {}
    model = build(model_class)
    for alias in ("fp16", "bf16"):
        target = BY_ALIAS[alias]
        names, is_kept = loader_rule(model, getattr(torch, target.torch_name))
        keep = TRANSFORMERS.keep_rule(model_class.__name__, target)
        # One layer, one expert stands for all.
        for pattern, name in {re.sub(r"\d+", "N", name): name for name in names}.items():
            if keep(name) != is_kept(name):
                wrong = "not kept" if is_kept(name) else "kept"
                missed.setdefault(f"{alias} {wrong}", set()).add(pattern)
    return {wrong: sorted(names) for wrong, names in missed.items()}


def report_missed() -> None:
    """Print what the rules miss of the transformers classes that can be built from their default config."""
    transformers.logging.set_verbosity_error()
    for model_class in find_classes(transformers.PreTrainedModel):
        try:
            missed = find_missed(model_class)
        except Exception as error:  # what a default config lacks
            print(f"{model_class.__name__}: cannot be built: {str(error).strip().splitlines()[:1]}")
            continue
        for wrong, names in missed.items():
            print(f"{model_class.__name__}: {wrong}: {' '.join(names)}", flush=True)


def main() -> int:
    """Write the tables, check them, or report."""
    for failure in import_all():
        print(f"left out: {failure}", file=sys.stderr)
    if "--missed" in sys.argv[1:]:
        report_missed()
        return 0
    before, written, after = split_module()
    text = render()
    if "--check" in sys.argv[1:]:
        if written == text:
            return 0
        print("converter/libraries/keep_fp32.py is out of date: run scripts/make_keep_fp32.py", file=sys.stderr)
        return 1
    MODULE.write_text(before + text + after, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The process that makes a class from a config, for ``ask.py``: a request on its stdin, the answer on its stdout.

Only models of diffusers and transformers themselves are made, on the meta device. While one is, an audit hook refuses
sockets and processes, and limits end what takes too long: of its processor time, its memory, and its modules.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import Any

# Libraries take some 6 s and 0.4 GB to load, 100,000 modules 12 s and 0.3 GB.
_CPU_SECONDS = 60
_DATA_NBYTES = 3 << 30
# The largest models of today have some 60,000 linear modules, all experts counted, and a weight for each.
_MOST_PARTS = 400_000
_REFUSED_EVENTS = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "os.startfile",
    "pty.", "webbrowser.", "urllib.", "http.", "ftplib.",
)  # fmt: skip


class _Refused(Exception):
    pass


def main() -> None:
    """Answer one request, and print nothing else, whatever the libraries print."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    set_limits()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.loads(sys.stdin.buffer.read())
    with out:
        json.dump(answer_to(request), out)


def answer_to(request: dict[str, Any]) -> dict[str, Any]:
    """Give what ``ask.Answer`` has, or a ``cause``, which is empty where the library is not installed."""
    try:
        if "keeps" in request:
            return {"keeps": dict(list_kept(request["keeps"], request["library"]))}
        return describe(request["class"], request["library"], request["config"], request.get("names", ()))
    except _Refused as error:
        return {"cause": str(error)}
    except BaseException as error:
        if isinstance(error, ModuleNotFoundError) and error.name in ("torch", "diffusers", "transformers"):
            return {"cause": ""}
        return {"cause": " ".join(f"{type(error).__name__} {error}".split())}


def set_limits() -> None:
    """Bound what this process may take, where the system can."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_DATA, (_DATA_NBYTES, _DATA_NBYTES))


def describe(class_name: str, library: str, config: dict[str, Any], names: Iterable[str] = ()) -> dict[str, Any]:
    """Give what ``ask.Answer`` has of a class that is made from a config; ``names`` are those in a file."""
    model = make_on_meta(class_name, library, config)
    state = model.state_dict()
    found = _ask_diffusers(model) if library == "diffusers" else _ask_transformers(model)
    homes, joined = _find_homes(model, names, state) if library == "transformers" else ({}, [])
    shapes = {name: list(tensor.shape) for name, tensor in state.items()}
    return {**found, "homes": homes, "joined": joined, "shapes": shapes}


def list_kept(class_names: list[str], library: str) -> Iterator[tuple[str, list[list[str]]]]:
    """Give of each class that is a model of its library what that keeps in float32: for float16, and always."""
    for name in class_names:
        with contextlib.suppress(_Refused):
            cls = _find_class(name, library)
            always = getattr(cls, "_keep_in_fp32_modules_strict", None)
            yield name, [_listed(cls._keep_in_fp32_modules), _listed(always)]


def _listed(names: Any) -> list[str]:
    return [names] if isinstance(names, str) else sorted(names or ())


def _ask_diffusers(model: Any) -> dict[str, Any]:
    from torch import nn

    return {
        "linear": [name for name, module in model.named_modules() if isinstance(module, nn.Linear)],
        "transposed": [],
        "skipped": [],
        "kept": _listed(model._keep_in_fp32_modules),
        "others": [],
        "experts": [],
        "remade": {},
    }


def _ask_transformers(model: Any) -> dict[str, Any]:
    """Go by ``replace_with_bnb_linear`` in ``transformers/integrations/bitsandbytes.py`` and by its caller.

    ``others`` are what ``match_named_modules`` of compressed-tensors takes for Linear too, and ``experts`` those that
    ``replace_with_fp8_linear`` in ``transformers/integrations/finegrained_fp8.py`` does.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer

    transposed = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    names = {name for name, module in model.named_modules() if type(module) is nn.Linear} | transposed
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {
        "linear": sorted(names),
        "transposed": sorted(transposed),
        "skipped": sorted(HfQuantizer.get_modules_to_not_convert(model, None, None)),
        "kept": _listed(model._keep_in_fp32_modules),
        "others": sorted(linear - names),
        "experts": [name for name, _ in model.named_modules() if name.endswith(".experts")],
        "remade": _list_remade(model),
    }


def _list_remade(model: Any) -> dict[str, list[str]]:
    """Name the modules that a loader of quantized weights makes anew, of other tensors, by its method.

    ``_convert_model_for_quantization`` in ``transformers/quantizers/base.py``.
    """
    try:
        from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION as REMADE
    except ImportError:
        return {}
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        for method in REMADE.get(type(module).__name__, {}).get("quantization_methods", ()):
            found.setdefault(str(method.value), []).append(name)
    return found


def _find_homes(model: Any, names: Iterable[str], state: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Map names in a file to those in the class, and name those whose tensors are joined or cut on the way.

    ``convert_and_load_state_dict_in_model`` in ``transformers/core_model_loading.py``.
    """
    try:
        from transformers import core_model_loading as loading
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return {}, []
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, loading.WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, loading.WeightConverter)]
    homes, joined = {}, []
    for name in names:
        home, converted = loading.rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if home not in state and name in state:
            home, converted = loading.rename_source_key(name, [], [], model.base_model_prefix, state)
        if home in state:
            homes[name] = home
            if converted is not None:
                joined.append(name)
    return homes, joined


def make_on_meta(class_name: str, library: str, config: dict[str, Any]) -> Any:
    """Make a model of a library's own, without weights; raises whatever the library does."""
    import torch

    cls = _find_class(class_name, library)
    with torch.device("meta"), _fenced():
        if library == "diffusers":
            return cls.from_config(config)
        import transformers

        return cls(transformers.AutoConfig.for_model(**config))


def _find_class(name: str, library: str) -> Any:
    if library == "diffusers":
        import diffusers

        return _class_of(diffusers, name, diffusers.ModelMixin)
    import transformers

    return _class_of(transformers, name, transformers.PreTrainedModel)


def _class_of(library: Any, name: str, base: Any) -> Any:
    cls = getattr(library, name, None) if name[:1].isupper() else None
    is_model = isinstance(cls, type) and issubclass(cls, base) and cls is not base
    if not is_model or not cls.__module__.startswith(f"{library.__name__}.models."):
        raise _Refused(f"{library.__name__} {library.__version__} has no model of that name")
    return cls


@contextlib.contextmanager
def _fenced() -> Iterator[None]:
    """Refuse the network, other programs, and more parts than any model has, while a class is made."""
    from torch.nn.modules import module

    count = 0

    def count_part(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > _MOST_PARTS:
            raise _Refused(f"it has more than {_MOST_PARTS:,} modules and weights")

    fence = _fence()
    fence.is_up = True
    hooks = [
        module.register_module_module_registration_hook(count_part),
        module.register_module_parameter_registration_hook(count_part),
    ]
    try:
        yield
    finally:
        fence.is_up = False
        for hook in hooks:
            hook.remove()


class _Fence:
    """An audit hook that refuses while it is up."""

    is_up = False

    def __call__(self, event: str, _: Any) -> None:
        if self.is_up and event.startswith(_REFUSED_EVENTS):
            raise _Refused(f"it asks for {event}")


@functools.cache
def _fence() -> _Fence:
    """Give the one fence of this process: a hook cannot be taken away again."""
    fence = _Fence()
    sys.addaudithook(fence)
    return fence

"""What the class that a config names has inside, by its own library: asked in a child process, and not trusted.

A config comes with the weights, and a library that makes a class from it can be led far: to code in the folder
(``auto_map``), to the Hub (names of backbones, of kernels), to a model of any size. So a child makes it on the meta
device, from the config alone: without such keys, offline, with limits on its time, its memory and the number of
modules, and only a model of the library itself. What it answers is data too, and checked. ``asked.py`` is its side.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from converter.dtypes import DType
from converter.errors import Unsupported
from converter.libraries import library_of
from converter.libraries.base import Library
from converter.libraries.keep_fp32 import MADE_FROM
from converter.models.component import Component

_T = TypeVar("_T")

# Names in the answer for the largest models take some MB.
_ANSWER_NBYTES = 32_000_000
# A line of the library's own error, if it is short.
_CAUSE_LENGTH = 300
# For a child that waits: what computes ends at the limit of the processor's time, which asked.py sets.
_WAIT_SECONDS = 300
_DEEPEST = 20
# What the libraries look up, run, or only note; none of it says what a model has inside.
_DROPPED = frozenset(
    ("auto_map", "backbone", "backbone_kwargs", "custom_pipelines", "detectron2_config_args", "name_or_path",
     "pretrained_model_name_or_path", "quantization_config", "trust_remote_code", "use_kernels",
     "use_pretrained_backbone", "use_timm_backbone")
)  # fmt: skip
# timm makes these, by a name that may be one of the Hub's.
_TIMM_TYPES = ("timm_backbone", "timm_wrapper")
_OFFLINE = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DIFFUSERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
}  # fmt: skip
_LISTS = ("linear", "transposed", "skipped", "kept", "others", "experts", "joined")
_MAKES_NO_SENSE = "what its library answers makes no sense"
_NONSENSE = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
# ``-I`` keeps the current folder, which may be the model's, and the variables for Python out.
_CHILD = "import sys; sys.path[:] = sys.argv[1:]; from converter.libraries.asked import main; main()"


class Answer(NamedTuple):
    """Names of modules as ``modules.Linears`` has them, and the shape of each tensor.

    ``homes`` maps the names that a file has to those in the class; in ``joined`` are those of which the loader makes
    other tensors.
    """

    linear: tuple[str, ...]
    transposed: tuple[str, ...]
    skipped: tuple[str, ...]
    kept: tuple[str, ...]
    others: tuple[str, ...]
    experts: tuple[str, ...]
    remade: dict[str, tuple[str, ...]]
    homes: dict[str, str]
    joined: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]


class LibraryMissing(Unsupported):
    """A library that would have to be asked is not installed."""


def ask_class(component: Component, names: Iterable[str] = ()) -> Answer:
    """Say what a component's class has inside, and where tensors of such ``names`` in a file go.

    Raises Unsupported, with the cause, where it cannot be made.
    """
    path = component.path / "config.json"
    if not component.class_name:
        raise Unsupported(path, "names no class")
    try:
        config = cleaned(component.config)
    except _Unasked as error:
        raise Unsupported(path, str(error)) from None
    library = library_of(component).package
    request = {"class": component.class_name, "library": library, "config": config, "names": list(names)}
    answer = _ask(json.dumps(request))
    if isinstance(answer, Answer):
        return answer
    if not answer:
        raise LibraryMissing(path, f"names {component.class_name}, and its library is not installed")
    raise Unsupported(path, f"names {component.class_name}, which could not be made: {answer}")


class _Unasked(Exception):
    pass


def cleaned(value: Any, depth: int = 0) -> Any:
    """Give a config without what leads to code or to the network, at any depth.

    Infinity and NaN come as the numbers that ``_decode_special_floats`` of transformers makes of them.
    """
    if depth > _DEEPEST:
        raise _Unasked(f"is nested more than {_DEEPEST} deep")
    if isinstance(value, list):
        return [cleaned(one, depth + 1) for one in value]
    if not isinstance(value, dict):
        return value
    if value.get("backbone") or value.get("model_type") in _TIMM_TYPES:
        raise _Unasked("asks for a backbone by its name, which is not looked up")
    if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
        return float(value["__float__"])
    return {key: cleaned(one, depth + 1) for key, one in value.items() if not _is_dropped(key)}


def _is_dropped(key: str) -> bool:
    # What is private to a library is its own note; ``attn_implementation`` and its like name kernels on the Hub.
    return key.startswith("_") or key.endswith("_implementation") or key in _DROPPED


def ask_kept(library: Library, class_names: Iterable[str], target: DType) -> tuple[tuple[str, ...], str]:
    """Give what a library that is newer than the table keeps in float32 beyond it, and a note that says so.

    Nothing is asked where the library is not installed, or not newer: that takes seconds.
    """
    name = library.package
    version = _version_of(name)
    if _numbers(version) <= _numbers(MADE_FROM[name]):
        return (), ""
    found = _ask_lists(json.dumps({"keeps": sorted(class_names), "library": name}))
    which = f"what {name} {version} keeps in fp32 is looked up in a table made from {MADE_FROM[name]}"
    if isinstance(found, str):
        return (), f"{which}, and could not be asked of itself: {found}" if found else ""
    known = {entry for one in found for entry in library.kept_entries(one, target)}
    asked = [entry for lists in found.values() for entry in library.entries_for(lists, target)]
    more = tuple(dict.fromkeys(entry for entry in asked if entry not in known))
    return more, f"{which}, which lacks {', '.join(more)}: these are kept too" if more else ""


@lru_cache  # asked twice of each set, and it takes milliseconds
def _version_of(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    """Give what orders releases; one before a release counts as it."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


@lru_cache(maxsize=8)
def _ask_lists(request: str) -> dict[str, tuple[tuple[str, ...], ...]] | str:
    raw = _answer_of_child(request)
    return raw if isinstance(raw, str) else _checked(raw, _kept_lists)


def _kept_lists(answer: Any) -> dict[str, tuple[tuple[str, ...], ...]]:
    return {str(name): (_strings(first), _strings(second)) for name, (first, second) in answer["keeps"].items()}


@lru_cache(maxsize=8)
def _ask(request: str) -> Answer | str:
    """Give what the child answers, or the cause why it does not: none where its library is not there."""
    raw = _answer_of_child(request)
    return raw if isinstance(raw, str) else checked(raw)


def _answer_of_child(request: str) -> bytes | str:
    try:
        with tempfile.TemporaryFile() as said, _started_child(said) as child:
            assert child.stdin
            assert child.stdout
            with contextlib.suppress(BrokenPipeError), child.stdin:
                child.stdin.write(request.encode())
            raw = child.stdout.read(_ANSWER_NBYTES + 1)
            if len(raw) > _ANSWER_NBYTES:
                return "it has too many modules"
            code = child.wait()
            return raw if code == 0 else _why_ended(code, said)
    except OSError as error:
        return f"no process for it could be started ({error.strerror})"


def _why_ended(code: int, said: BinaryIO) -> str:
    """Give the cause why a child ended early: a limit or a crash, or else its own last words."""
    if code < 0:
        return f"it takes too much time or memory, or its library crashed (the process was ended by signal {-code})"
    said.seek(max(0, said.seek(0, os.SEEK_END) - _CAUSE_LENGTH))
    words = said.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
    return f"the process for it ended with {code}{f': {words}' if words else ''}"


@contextlib.contextmanager
def _started_child(said: BinaryIO) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-I", "-B", "-c", _CHILD, *_search_path()]
    pipe = subprocess.PIPE
    environment = os.environ | _OFFLINE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=said, env=environment) as child:
        alarm = threading.Timer(_WAIT_SECONDS, child.kill)
        alarm.start()
        try:
            yield child
        finally:
            alarm.cancel()
            child.kill()


def _search_path() -> list[str]:
    """Give where this process imports from, but the current folder: a model's folder may hold a ``torch.py``."""
    own = str(Path(__file__).parents[2])
    here = {"", str(Path.cwd())} - {own}
    return [entry for entry in sys.path if entry not in here]


def checked(raw: bytes) -> Answer | str:
    """Give a child's answer if it is one, or the cause that it names."""
    return _checked(raw, _described)


def _described(answer: Any) -> Answer:
    names = {key: _strings(answer[key]) for key in _LISTS}
    return Answer(
        **names,
        remade={method: _strings(modules) for method, modules in answer["remade"].items()},
        homes=dict(zip(answer["homes"], _strings([*answer["homes"].values()]), strict=True)),
        shapes={name: _shape(one) for name, one in answer["shapes"].items()},
    )


def _checked(raw: bytes, read: Callable[[Any], _T]) -> _T | str:
    try:
        answer = json.loads(raw)
        return str(answer["cause"])[:_CAUSE_LENGTH] if "cause" in answer else read(answer)
    except _NONSENSE:
        return _MAKES_NO_SENSE


def _strings(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise TypeError
    return tuple(value)


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(one) is int and one >= 0 for one in value):
        raise TypeError
    return tuple(value)

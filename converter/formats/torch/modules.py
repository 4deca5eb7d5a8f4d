"""What lies nested in a pickle's value under names joined by dots: in whole modules of torch, in dicts and in lists.

``torch.save(model)`` pickles objects whose state holds parameters, buffers and inner modules in three dicts
(``torch/nn/modules/module.py``). No class of theirs is needed to know what ``state_dict()`` of them gives, unless it
has a way of its own. Inner modules are gone through without recursion, and of what a file lists again and again no more
is taken than a model may have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from converter.errors import BadFile, HostileFile, Where
from converter.formats.torch.rebuild import Unreadable
from converter.formats.torch.unpickler import Inert, KeptObject

_MAX_KEY_LENGTH = 200  # of what is spelled to people, or looked at for what it is
_MAX_DEPTH = 100  # models nest a dozen modules
_MAX_ENTRIES = 1_500_000  # of all that is gone through: a pickle of all the steps there are has 50,000 modules
_MODULE_ENTRIES = 20  # what a module counts for at least: real ones have as many attributes
_PLAIN = frozenset({int, float, str, bytes, bool, type(None)})
_PLAIN_AN_ENTRY = 32  # of those, which are only looked at
_MAX_LETTERS = 100_000_000  # of their names: as many as a pickle may have
_CONTENT = ("_parameters", "_buffers", "_modules")
# What torch makes of an object of C++, which quantized modules keep their weights in (``torch.ao.nn.quantized``).
_SCRIPT_OBJECT = "torch.ScriptObject"
# Modules whose own ``_save_to_state_dict`` or ``state_dict`` adds what their weights mean nothing without, and which
# pickle it as attributes of the weights (``bitsandbytes/nn/modules.py``, ``hqq/core/quantize.py``).
_QUANTIZED = re.compile(r"bitsandbytes\.nn\..*(8bit|4bit|NF4|FP4|Int8).*|hqq\..*\.HQQLinear.*")
_PACKED = Unreadable("is a ScriptObject, as quantized modules keep their weights in")

_Entry = tuple[str, Any, bool]
"""What one level holds: a name, what it names, and whether that is a level itself."""


def _state_of(value: Any) -> Mapping[Any, Any]:
    state = value.state if type(value) in (Inert, KeptObject) else None
    if type(state) is tuple and state:
        state = state[0]  # of a class that has slots too
    return state if type(state) is dict else {}


def is_module(value: Any) -> bool:
    """Say whether a value is an object that has the state of a module, and no quantized one."""
    state = _state_of(value)
    has_content = bool(state) and all(isinstance(state.get(name), dict) for name in _CONTENT)
    return has_content and not _QUANTIZED.fullmatch(value.name)


def is_level(value: Any) -> bool:
    """Say whether names may lie below a value: it is a module, a dict, a list or a tuple, or like one and not empty."""
    return type(value) in (dict, list, tuple) or (type(value) is Inert and len(value) > 0) or is_module(value)


def spell_key(key: Any) -> str:
    """Spell a key, as far as people would read it: one long text may be the key of many dicts."""
    return str(key[:_MAX_KEY_LENGTH] if isinstance(key, (str, bytes)) else key)


class Walk:
    """Goes through what is nested in a value, in order; all walks through one file share its limits.

    Raises HostileFile for what is beyond them, and BadFile for what holds itself.
    """

    def __init__(self, where: Where) -> None:
        self.where = where
        self._classes: set[str] = set()
        self._entries_left = _MAX_ENTRIES
        self._letters_left = _MAX_LETTERS

    def take_classes(self) -> frozenset[str]:
        """Give the classes of the modules that were met since this was asked last."""
        classes = frozenset(self._classes)
        self._classes.clear()
        return classes

    def leaves(self, value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
        """Give all that is nested in a level and is none itself, or holds only numbers, under its whole name."""
        if self._is_plain(value):
            return
        above = {id(value)}
        levels = [(prefix, id(value), self.entries(value))]
        while levels:
            prefix, identity, entries = levels[-1]
            for key, inner, is_nested in entries:
                name = prefix + key
                self._charge(1, len(name))
                if not is_nested or self._is_plain(inner):
                    yield name, inner
                    continue
                if id(inner) in above:
                    raise BadFile(self.where, f"holds a module or a dict that is a part of itself: {spell_key(name)!r}")
                if len(levels) == _MAX_DEPTH:
                    raise HostileFile(self.where, f"its modules or dicts are nested more than {_MAX_DEPTH} deep")
                above.add(id(inner))
                levels.append((f"{name}.", id(inner), self.entries(inner)))
                break
            else:
                levels.pop()
                above.remove(identity)

    def _is_plain(self, level: Any) -> bool:
        """Say whether a dict or a list holds nothing but numbers and text, as a long log does: it is one leaf then."""
        if is_module(level):
            return False
        values = level.values() if isinstance(level, dict) else level
        self._charge(len(values) // _PLAIN_AN_ENTRY, 0)
        return _PLAIN.issuperset(map(type, values))

    def entries(self, value: Any) -> Iterator[_Entry]:
        """Give what is directly in a level. What a dict has under a key that is no name stands as None."""
        if is_module(value):
            yield from self._entries_of_module(value)
        elif isinstance(value, dict):
            for key, inner in value.items():
                is_name = isinstance(key, (str, int))
                yield str(key) if is_name else spell_key(key), inner if is_name else None, is_name and is_level(inner)
        else:
            yield from ((str(place), inner, is_level(inner)) for place, inner in enumerate(value))

    def _entries_of_module(self, module: Any) -> Iterator[_Entry]:
        """Give what ``Module._save_to_state_dict`` and ``Module.state_dict`` do, in their order."""
        state = _state_of(module)
        self._classes.add(module.name)
        passing = state.get("_non_persistent_buffers_set") or ()  # absent before torch 1.6: then all are kept
        passing = passing if isinstance(passing, (list, dict)) else ()
        self._charge(max(len(state), _MODULE_ENTRIES) + len(passing), 0)
        left_out = {name for name in (passing.values() if isinstance(passing, dict) else passing) if type(name) is str}
        for name, tensor in state["_parameters"].items():
            if tensor is not None:
                yield self._checked(name), tensor, False
        for name, tensor in state["_buffers"].items():
            if tensor is not None and name not in left_out:
                yield self._checked(name), tensor, False
        for name, value in state.items():
            if type(value) is Inert and value.name == _SCRIPT_OBJECT:
                yield self._checked(name), _PACKED, False
        for name, inner in state["_modules"].items():
            if inner is not None:
                is_one = is_module(inner)
                yield self._checked(name), inner if is_one else _stranger(inner), is_one

    def _checked(self, name: Any) -> str:
        if type(name) is not str:
            raise BadFile(self.where, f"holds a module with a part whose name is no text ({spell_key(name)})")
        return name

    def _charge(self, entries: int, letters: int) -> None:
        self._entries_left -= entries
        self._letters_left -= letters
        if self._entries_left < 0 or self._letters_left < 0:
            raise HostileFile(self.where, "lists more parts of modules, or under longer names, than any model has")


def _stranger(value: Any) -> Unreadable:
    if type(value) in (Inert, KeptObject):
        return Unreadable(f"is of the class {value.name}, which keeps its weights in a way of its own")
    return Unreadable("stands in the place of a module and is none")

"""How large the parts of a pipeline are, as their configs say, and whether the tensors of a single file are that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from converter.errors import BadRequest, spell_shape
from converter.storage import Place
from converter.transforms.single_file.family import Config, Shapes

_LONGEST = 64  # of a list of numbers; and there are not more layers, of which a table has rows for each
_MOST = {
    "sample_size": 512,  # of a picture's side, whose positions are a table
    "layers_per_block": 16,
    **dict.fromkeys(("num_layers", "num_single_layers", "num_hidden_layers", "approximator_layers"), _LONGEST),
}
_WIDEST = 1 << 20
_MOST_BLOCKS = 16
_BLOCKS = ("down_block_types", "up_block_types")
# What a config says of all blocks at once, or of each, or of each layer in each.
_NESTED = ("transformer_layers_per_block", "reverse_transformer_layers_per_block")


def check_config(path: Place, config: Config, numbers: Config, words: Mapping[str, Sequence[Any]]) -> None:
    """Raise BadRequest for a config whose numbers cannot be, or that says what no single file is of.

    ``numbers`` are a part's own by their defaults, ``words`` what else it may say: a value, or a list of such.
    """
    wrong = next((key for key, default in numbers.items() if not _may_be(key, config.get(key, default), default)), None)
    if wrong is not None:
        raise BadRequest(path, f"has a {wrong} that this cannot be: {config[wrong]!r:.60}", "Give the right --config.")
    for key, allowed in words.items():
        if key in config and not _may_say(key, config[key], allowed):
            problem = f"has a {key} that no single file has: {config[key]!r:.60}"
            raise BadRequest(path, problem, f"Those of single files have {' or '.join(map(repr, allowed))}.")


def _may_be(key: str, value: Any, default: Any) -> bool:
    """Say whether a config's value can be in the place of a default: a number, some numbers, or none."""
    if value is None:
        return default is None or key == "out_channels"
    if key in _NESTED:
        return _is_depth(value, 0)
    if isinstance(default, list):
        is_list = isinstance(value, list) and bool(value or not default) and len(value) <= _LONGEST
        return is_list and all(_is_place(one) for one in value)
    is_number = type(value) in ((int, float) if isinstance(default, float) else (int,))
    return is_number and 0 < value <= _MOST.get(key, _WIDEST)


def _may_say(key: str, said: Any, allowed: Sequence[Any]) -> bool:
    """Say whether a config may say this: the kinds of blocks are a list, and what each of them looks at may be one."""
    several = said if isinstance(said, list) and key in (*_BLOCKS, "only_cross_attention") else [said]
    is_kind = key not in _BLOCKS or (isinstance(said, list) and 0 < len(said) <= _MOST_BLOCKS)
    return is_kind and all(one in allowed for one in several)


def _is_place(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _WIDEST


def _is_depth(value: Any, level: int) -> bool:
    if isinstance(value, list) and level < 2:
        return 0 < len(value) <= _MOST_BLOCKS + 1 and all(_is_depth(one, level + 1) for one in value)
    return type(value) is int and 0 <= value <= _MOST_BLOCKS


def check_shapes(source: Place, what: str, expected: Shapes, shapes: Shapes) -> None:
    """Raise BadRequest where a tensor is not of the size that is expected; ``what`` names the config that says so."""
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            size = spell_shape(shapes[name]) if name in shapes else "not there"
            problem = f"does not fit {what}: {name} is {size}, and should be {spell_shape(shape)}"
            raise BadRequest(source, problem, "Fetch all of it, or give a --config folder that it fits.")

"""Random weights under random names, by random rules, against a plain model of what the rules mean."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from support.tiny import write_json

from converter import WconvError, convert

pytestmark = pytest.mark.usefixtures("no_fsync")
WORDS = st.sampled_from(["a", "b", "module", "_orig_mod", "0", "1", "format", "weight"])
NAMES = st.lists(WORDS, min_size=1, max_size=3).map(".".join)
REGEXES = st.sampled_from(["^a", "b$", r"\.", "weight", "0|1", "a.b", "(a|b)", "^module", "^", "$", "x*", "format"])
REPLACEMENTS = st.sampled_from(["", "a", "b.", ".", r"\g<0>\g<0>", "format", "c"])
PREFIXES = st.sampled_from(["", "", "a", "a.", "module.", "b.0."])


class Weights(NamedTuple):
    """The number that stands under each name; those that are tied to another stand there under its name alone."""

    numbers: dict[str, float]
    ties: dict[str, str]


@st.composite
def weights(draw: st.DrawFn) -> Weights:
    names = draw(st.lists(NAMES, min_size=1, max_size=6, unique=True))
    own = draw(st.integers(1, len(names)))
    numbers = {name: float(number) for number, name in enumerate(names[:own])}
    kept = [name for name in numbers if name != "format"] or list(numbers)
    return Weights(numbers, {name: draw(st.sampled_from(kept)) for name in names[own:] if name != "format"})


def expected_of(held: Weights, rules: dict[str, Any]) -> dict[str, float] | None:
    """Give the numbers by the names that rules make, or None where they are to be refused."""
    state = {**held.numbers, **{name: held.numbers[of] for name, of in held.ties.items()}}
    for option in ("only", "drop"):
        if any(not any(re.search(regex, name) for name in state) for regex in rules[option]):
            return None
    kept = [name for name in state if not rules["only"] or any(re.search(one, name) for one in rules["only"])]
    kept = [name for name in kept if not any(re.search(one, name) for one in rules["drop"])]
    prefix = rules["strip_prefix"]
    if not kept or (prefix and not any(name.startswith(prefix) for name in kept)):
        return None
    names = {name: name.removeprefix(prefix) for name in kept}
    if not are_names(names.values()):
        return None
    for regex, new in rules["rename"]:
        if not any(re.search(regex, name) for name in names.values()):
            return None
        names = {old: re.sub(regex, new, name) for old, name in names.items()}
    names = {old: rules["add_prefix"] + name for old, name in names.items()}
    return {new: state[old] for old, new in names.items()} if are_names(names.values()) else None


def are_names(names: Any) -> bool:
    return len(set(names)) == len(names) and all(names)


def written_as_torch(held: Weights, folder: Path, split: int) -> Path:
    tensors = {name: torch.tensor([number]) for name, number in held.numbers.items()}
    torch.save({**tensors, **{name: tensors[of] for name, of in held.ties.items()}}, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def written_as_shards(held: Weights, folder: Path, split: int) -> Path:
    names = list(held.numbers)
    parts = [part for part in (names[:split], names[split:]) if part]
    folder = folder / "model"
    folder.mkdir()
    where: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        shard = f"model-{number:05}-of-{len(parts):05}.safetensors"
        ties = {name: of for name, of in held.ties.items() if of in part}
        save_file({name: torch.tensor([held.numbers[name]]) for name in part}, folder / shard, {"format": "pt", **ties})
        where |= dict.fromkeys(part, shard)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    return folder


def names_in_header(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def read(folder: Path) -> dict[str, float]:
    """Give what stands under each name in all files of a folder, and hold its index against them."""
    state: dict[str, float] = {}
    where: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            own = {name: file.get_tensor(name).item() for name in names_in_header(path)}
            notes = {name: own[of] for name, of in file.metadata().items() if name != "format"}
        where |= dict.fromkeys(own, path.name)
        assert not state.keys() & (own | notes).keys()
        assert not own.keys() & notes.keys()
        state |= own | notes
    for path in sorted(folder.glob("*.bin")):
        own = {name: tensor.item() for name, tensor in torch.load(path).items()}
        assert not state.keys() & own.keys()
        state |= own
        where |= dict.fromkeys(own, path.name)
    for index in folder.glob("*.index.json"):
        assert json.loads(index.read_text())["weight_map"] == where
    return state


@pytest.mark.slow
@pytest.mark.parametrize("write", [written_as_torch, written_as_shards])
@settings(max_examples=300)
@given(data=st.data())
def test_rules_mean_what_they_say(write: Callable[[Weights, Path, int], Path], data: st.DataObject) -> None:
    held = data.draw(weights())
    rules: dict[str, Any] = {
        "only": data.draw(st.lists(REGEXES, max_size=2)),
        "drop": data.draw(st.lists(REGEXES, max_size=1)),
        "strip_prefix": data.draw(PREFIXES),
        "rename": data.draw(st.lists(st.tuples(REGEXES, REPLACEMENTS), max_size=2)),
        "add_prefix": data.draw(PREFIXES),
    }
    expected = expected_of(held, rules)
    tied = data.draw(st.sampled_from([None, "first", "duplicate", *sorted(expected or ())]))
    more: dict[str, Any] = data.draw(st.sampled_from([{}, {"max_shard_size": 4}, {"max_shard_size": "none"}]))
    form = data.draw(st.sampled_from(["safetensors", "torch"]))
    with tempfile.TemporaryDirectory() as folder:
        source = write(held, Path(folder), data.draw(st.integers(0, 3)))
        output = Path(folder) / "out"
        refusal = ""
        try:
            convert(source, output, tied=tied, format=form, verify=True, **rules, **more)
        except WconvError as error:
            refusal = str(error)
        if refusal:
            assert not output.exists()
            assert expected is None or (tied and "--tied" in refusal) or "'format'" in refusal
            return
        assert read(output) == expected
        if tied and expected and tied in expected and form == "safetensors":
            assert any(tied in names_in_header(path) for path in output.glob("*.safetensors"))

"""A table turns tensors of one layout into another's, and can be read from right to left."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from support import original

from converter.dtypes import DTYPES
from converter.errors import BadFile
from converter.tensors.base import Tensor
from converter.tensors.derived import Constant
from converter.transforms.layouts import Operation, WeightConverter, chunk, convert, keep, renamings, squeeze, transpose
from converter.transforms.stable_diffusion.families import FAMILIES, Part
from converter.transforms.stable_diffusion.pipeline import CONFIGS

ROWS = [
    *renamings({"block.{}.*": "layers.{}.*", "block.7.*": "last.*", "head": "lm_head.weight"}),
    WeightConverter("block.{}.qkv.*", ("layers.{}.q.*", "layers.{}.k.*", "layers.{}.v.*"), chunk),
    WeightConverter("projection", ("projection.weight",), transpose),
    WeightConverter("pixel.weight", ("matrix.weight",), squeeze),
]


def make(*names: str, shape: tuple[int, ...] = (6, 2)) -> dict[str, Tensor]:
    return {name: from_torch(name, torch.rand(shape)) for name in names}


def from_torch(name: str, value: torch.Tensor) -> Tensor:
    return Tensor(name, Constant(DTYPES["F32"], tuple(value.shape), value.contiguous().numpy().tobytes()))


def to_torch(tensor: Tensor) -> torch.Tensor:
    assert isinstance(tensor.source, Constant)
    return torch.frombuffer(bytearray(tensor.source.content), dtype=torch.float32).reshape(tensor.shape)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("block.3.weight", ["layers.3.weight"]),
        ("block.03.weight", ["layers.03.weight"]),
        ("block.7.weight", ["last.weight"]),
        ("block.7.qkv.bias", ["layers.7.q.bias", "layers.7.k.bias", "layers.7.v.bias"]),
        ("head", ["lm_head.weight"]),
    ],
)
def test_a_row_gives_the_names(name: str, expected: list[str]) -> None:
    converted, left = convert(make(name), ROWS)
    assert [tensor.name for tensor in converted] == expected
    assert not left


@pytest.mark.parametrize(
    "name",
    ["", ".", "block", "block.x.weight", "block.².weight", "block.{}.weight", "block.3.", "block.3.a.b", "head."],
)
def test_a_name_of_no_row_is_left(name: str) -> None:
    assert convert(make(name), ROWS) == ([], [name])


@pytest.mark.parametrize("leaf", ["{}", "*", "{0}"])
def test_a_name_may_hold_what_a_pattern_does(leaf: str) -> None:
    [tensor], _ = convert(make(f"block.3.{leaf}"), ROWS)
    assert tensor.name == f"layers.3.{leaf}"


def test_an_operation_sees_the_bytes_otherwise() -> None:
    tensors = {**make("block.0.qkv.weight", "projection"), **make("pixel.weight", shape=(4, 3, 1, 1))}
    converted, _ = convert(tensors, ROWS)
    made = {tensor.name: to_torch(tensor) for tensor in converted}
    before = {name: to_torch(tensor) for name, tensor in tensors.items()}
    assert torch.equal(torch.cat([made[f"layers.0.{which}.weight"] for which in "qkv"]), before["block.0.qkv.weight"])
    assert torch.equal(made["projection.weight"].T, before["projection"])
    assert torch.equal(made["matrix.weight"][:, :, None, None], before["pixel.weight"])


def test_a_matrix_is_no_pixel_and_stays() -> None:
    [tensor], _ = convert(make("pixel.weight"), ROWS)
    assert tensor.shape == (6, 2)


@pytest.mark.parametrize("shape", [(), (7,), (7, 3)])
def test_what_cannot_be_cut_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadFile, match=r"block\.0\.qkv\.weight.* cannot be cut in 3"):
        convert(make("block.0.qkv.weight", shape=shape), ROWS)


# Stable Diffusion's tables.

KINDS = {family.folder: family for family in FAMILIES}
UNDO: dict[Operation, Callable[[list[torch.Tensor]], torch.Tensor]] = {
    keep: lambda parts: parts[0],
    chunk: torch.cat,
    transpose: lambda parts: parts[0].T,
    squeeze: lambda parts: parts[0][:, :, None, None],
}
# What has no row: OpenCLIP's last layer, its projection where the class has none, and numbers that are no weights.
LEFT = re.compile(r"transformer\.resblocks\.\d+\..+|text_projection|text_model\.embeddings\.position_ids")


def invert(rows: Iterable[WeightConverter]) -> list[WeightConverter]:
    return [WeightConverter(target, (row.source,)) for row in rows for target in row.targets]


def turn_there_and_back(tensors: Mapping[str, Tensor], rows: Iterable[WeightConverter]) -> dict[str, list[Tensor]]:
    """Give the tensors that a table makes, by the names that it has for them from right to left."""
    converted, _ = convert(tensors, rows)
    there = {tensor.name: tensor for tensor in converted}
    assert len(there) == len(converted)
    back, left = convert(there, invert(rows))
    assert not left
    made: dict[str, list[Tensor]] = {}
    for tensor in back:
        made.setdefault(tensor.name, []).append(tensor)
    return made


def of_part(part: Part, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(part.prefix): value for name, value in state.items() if name.startswith(part.prefix)}


@pytest.mark.parametrize("kind", KINDS)
def test_each_tensor_comes_back(kind: str, builders: Any) -> None:
    parts = builders.models_in(builders.shake(builders.MODELS["sdxl" if kind == "sdxl" else "sd"]()))
    states = {
        name: builders.state_as_published(part) if "text" in name else part.state_dict() for name, part in parts.items()
    }
    state = original.as_original(kind, states, {name: part.config for name, part in parts.items()})
    for name, part in KINDS[kind].parts.items():
        config = parts[name].config
        content = config.to_dict() if "text" in name else config
        rows = part.rows({**content, "architectures": [type(parts[name]).__name__]})
        expected = of_part(part, state)
        tensors = {short: from_torch(short, value) for short, value in expected.items()}
        _, left = convert(tensors, rows)
        assert all(LEFT.fullmatch(short) for short in left)
        back: set[str] = set()
        for operation, undo in UNDO.items():
            made = turn_there_and_back(tensors, [row for row in rows if row.operation is operation])
            assert not back & made.keys()
            back |= made.keys()
            for short, pieces in made.items():
                assert torch.equal(undo([to_torch(piece) for piece in pieces]), expected[short]), short
        assert back == tensors.keys() - set(left)


@pytest.mark.parametrize("kind", KINDS)
def test_each_name_of_a_full_size_comes_back(kind: str) -> None:
    states, configs = original.meta_states(CONFIGS / kind)
    state = original.as_original(kind, states, configs)
    for name, part in KINDS[kind].parts.items():
        rows = part.rows(json.loads((CONFIGS / kind / name / "config.json").read_text()))
        tensors = make(*of_part(part, state), shape=(3, 1))
        there, left = convert(tensors, rows)
        assert {tensor.name for tensor in there} == states[name].keys()
        assert all(LEFT.fullmatch(short) for short in left)
        assert turn_there_and_back(tensors, rows).keys() == tensors.keys() - set(left)


def overlap(one: str, other: str) -> bool:
    """Say whether there is a name that two patterns take."""
    pairs = list(zip(one.split("."), other.split("."), strict=True))
    return all(
        here == there or "*" in (here, there) or ("{}" in (here, there) and (here + there).strip("{}").isdecimal())
        for here, there in pairs
    )


def holes(pattern: str) -> list[str]:
    return [word for word in pattern.split(".") if word in ("{}", "*")]


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_rows_claim_one_name(kind: str) -> None:
    for name, part in KINDS[kind].parts.items():
        rows = part.rows(json.loads((CONFIGS / kind / name / "config.json").read_text()))
        assert all(holes(row.source) == holes(target) for row in rows for target in row.targets)
        for patterns in ([row.source for row in rows], [target for row in rows for target in row.targets]):
            by_form: dict[tuple[str, int], list[str]] = {}
            for pattern in patterns:
                by_form.setdefault((pattern.partition(".")[0], pattern.count(".")), []).append(pattern)
            for alike in by_form.values():
                assert not [pair for pair in itertools.combinations(alike, 2) if overlap(*pair)]

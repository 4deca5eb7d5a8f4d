"""A table turns tensors of one layout into another's, and can be read from right to left."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from support import original

from converter.dtypes import DTYPES
from converter.errors import BadFile
from converter.tensors.base import Tensor
from converter.tensors.derived import Constant
from converter.tensors.reader import RangeReader
from converter.transforms.layouts import rows
from converter.transforms.layouts.operations import CONCAT, PIXEL, SWAP, TRANSPOSE, Concat, Rotary, Stack
from converter.transforms.layouts.rows import Row, put_together, renamings, take_apart
from converter.transforms.single_file.family import Part
from converter.transforms.single_file.pipeline import CONFIGS
from converter.transforms.single_file.stable_diffusion import FAMILIES

ROWS = [
    *renamings({"block.{}.*": "layers.{}.*", "block.7.*": "last.*", "head": "lm_head.weight"}),
    Row("block.{}.qkv.*", ("layers.{}.q.*", "layers.{}.k.*", "layers.{}.v.*"), CONCAT),
    Row("projection", ("projection.weight",), TRANSPOSE),
    Row("pixel.weight", ("matrix.weight",), PIXEL),
]


def make(*names: str, shape: tuple[int, ...] = (6, 2)) -> dict[str, Tensor]:
    return {name: from_torch(name, torch.rand(shape)) for name in names}


def from_torch(name: str, value: torch.Tensor) -> Tensor:
    return Tensor(name, Constant(DTYPES["F32"], tuple(value.shape), value.contiguous().numpy().tobytes()))


def to_torch(tensor: Tensor) -> torch.Tensor:
    out = bytearray(tensor.nbytes)
    with RangeReader() as reader:
        tensor.source.read(0, memoryview(out), reader)
    return torch.frombuffer(out, dtype=torch.float32).reshape(tensor.shape)


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
    converted, left = take_apart(make(name), ROWS)
    assert [tensor.name for tensor in converted] == expected
    assert not left


@pytest.mark.parametrize(
    "name",
    ["", ".", "block", "block.x.weight", "block.².weight", "block.{}.weight", "block.3.", "block.3.a.b", "head."],
)
def test_a_name_of_no_row_is_left(name: str) -> None:
    assert take_apart(make(name), ROWS) == ([], [name])


@pytest.mark.parametrize("leaf", ["{}", "*", "{0}"])
def test_a_name_may_hold_what_a_pattern_does(leaf: str) -> None:
    [tensor], _ = take_apart(make(f"block.3.{leaf}"), ROWS)
    assert tensor.name == f"layers.3.{leaf}"


def test_an_operation_sees_the_bytes_otherwise() -> None:
    tensors = {**make("block.0.qkv.weight", "projection"), **make("pixel.weight", shape=(4, 3, 1, 1))}
    converted, _ = take_apart(tensors, ROWS)
    made = {tensor.name: to_torch(tensor) for tensor in converted}
    before = {name: to_torch(tensor) for name, tensor in tensors.items()}
    assert torch.equal(torch.cat([made[f"layers.0.{which}.weight"] for which in "qkv"]), before["block.0.qkv.weight"])
    assert torch.equal(made["projection.weight"].T, before["projection"])
    assert torch.equal(made["matrix.weight"][:, :, None, None], before["pixel.weight"])


def test_a_matrix_is_no_pixel_and_stays() -> None:
    [tensor], _ = take_apart(make("pixel.weight"), ROWS)
    assert tensor.shape == (6, 2)


@pytest.mark.parametrize("shape", [(), (7,), (7, 3)])
def test_what_cannot_be_cut_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadFile, match=r"block\.0\.qkv\.weight.* cannot be cut in 3"):
        take_apart(make("block.0.qkv.weight", shape=shape), ROWS)


EXPERTS = [
    Row("layers.{}.experts.gate_up_proj", ("block.{}.{#}.gate", "block.{}.{#}.up"), Stack(2)),
    Row("layers.{}.experts.down_proj", ("block.{}.{#}.down",), Stack()),
    Row("mlp.*", ("mlp.q.*", "mlp.rest.*"), Concat((1, 3))),
    Row("swap", ("swapped",), SWAP),
    Row("rotated", ("halves",), Rotary(3)),
]


def test_what_is_taken_apart_comes_together() -> None:
    tensors = {
        **make("layers.3.experts.gate_up_proj", "layers.11.experts.gate_up_proj", shape=(3, 8, 5)),
        **make("layers.3.experts.down_proj", shape=(3, 2, 4)),
        **make("mlp.weight", shape=(8, 2)),
        **make("mlp.bias", shape=(8,)),
        **make("swap", "rotated", shape=(12, 2)),
    }
    values = {name: to_torch(tensor) for name, tensor in tensors.items()}
    apart, left = take_apart(tensors, EXPERTS)
    made = {tensor.name: to_torch(tensor) for tensor in apart}
    assert not left
    assert torch.equal(made["block.3.2.up"], values["layers.3.experts.gate_up_proj"][2, 4:])
    assert torch.equal(made["block.3.1.down"], values["layers.3.experts.down_proj"][1])
    assert torch.equal(made["mlp.rest.bias"], values["mlp.bias"][2:])
    assert torch.equal(made["swapped"], torch.cat(values["swap"].chunk(2)[::-1]))
    assert torch.equal(made["halves"], values["rotated"].view(3, 2, 2, 2).transpose(1, 2).reshape(12, 2))
    back = there_and_back(dict(reversed(tensors.items())), EXPERTS)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(to_torch(tensor), values[name]) for name, tensor in back.items())


def test_rows_in_another_order_are_read_in_any_parts() -> None:
    [tensor] = make("rotated", shape=(24, 3)).values()
    [turned], _ = take_apart({"rotated": tensor}, EXPERTS)
    whole = to_torch(turned).numpy().tobytes()
    for begin, end in ((0, 12), (4, 288), (92, 196), (96, 192), (284, 288)):
        out = bytearray(end - begin)
        with RangeReader() as reader:
            turned.source.part(begin, end).read(begin, memoryview(out), reader)
        assert out == whole[begin:end]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"block.3.1.up": None}, r"holds 'block\.3\.0\.gate', and lacks 'block\.3\.1\.up'"),
        ({"block.3.0.gate": None, "block.3.0.up": None}, r"holds 'block\.3\.1\.gate', and lacks 'block\.3\.0\.gate'"),
        ({"block.3.1.up": (4, 2)}, r"'block\.3\.0\.gate' of 4x3 and 'block\.3\.1\.up' of 4x2, which do not fit"),
        ({"block.3.01.up": (4, 3)}, r"'block\.3\.1\.up' and 'block\.3\.01\.up', which are one tensor"),
        ({"mlp.q.weight": (4, 3), "mlp.rest.weight": (4, 3)}, r"'mlp\.q\.weight' of 4x3 .* do not fit"),
        ({"mlp.q.weight": (), "mlp.rest.weight": ()}, r"of one number .* do not fit"),
        ({"halves": (8, 2)}, r"'halves', which is no 3 heads of pairs: it is 8x2"),
        ({"swapped": (3, 2)}, r"'swapped', which cannot be cut in 2: it is 3x2"),
    ],
)
def test_parts_that_do_not_make_a_whole_are_refused(changes: Mapping[str, Any], problem: str) -> None:
    shapes: dict[str, Any] = {f"block.3.{at}.{which}": (4, 3) for at in (0, 1) for which in ("gate", "up")} | {
        **changes
    }
    tensors = {
        name: one for name, shape in shapes.items() if shape is not None for one in make(name, shape=shape).values()
    }
    with pytest.raises(BadFile, match=problem):
        put_together(tensors, EXPERTS)


def test_parts_of_two_dtypes_are_refused() -> None:
    tensors = make("mlp.q.bias", shape=(1,)) | {
        "mlp.rest.bias": Tensor("mlp.rest.bias", Constant(DTYPES["BF16"], (3,), bytes(6)))
    }
    with pytest.raises(BadFile, match=r"'mlp\.q\.bias' in fp32 and 'mlp\.rest\.bias' in bf16, which are one tensor"):
        put_together(tensors, EXPERTS)


def test_more_parts_than_any_model_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Tensor("layers.0.experts.down_proj", Constant(DTYPES["F32"], (10**9, 0, 4), b""))
    with pytest.raises(BadFile, match="1,000,000,000 parts there would be more than 220,000 tensors, and no model has"):
        take_apart({whole.name: whole}, EXPERTS)
    monkeypatch.setattr(rows, "MAX_TENSORS", 10)
    stacks = make("layers.0.experts.down_proj", "layers.1.experts.down_proj", shape=(6, 1, 1))
    with pytest.raises(BadFile, match=r"'layers\.1\.experts\.down_proj', with whose 6 parts there would be more"):
        take_apart(stacks, EXPERTS)


# Stable Diffusion's tables.

KINDS = {family.folder: family for family in FAMILIES}
# What has no row: OpenCLIP's last layer, and its projection where the class has none.
LEFT = re.compile(r"transformer\.resblocks\.\d+\..+|text_projection")


def there_and_back(tensors: Mapping[str, Tensor], rows: Sequence[Row]) -> dict[str, Tensor]:
    """Give tensors that a table takes apart, put together again."""
    there, _ = take_apart(tensors, rows)
    back, left = put_together({tensor.name: tensor for tensor in there}, rows)
    assert not left
    return {tensor.name: tensor for tensor in back}


def of_part(part: Part, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefix = part.prefixes[0]
    return {name.removeprefix(prefix): value.float() for name, value in state.items() if name.startswith(prefix)}


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
        _, left = take_apart(tensors, rows)
        assert all(LEFT.fullmatch(short) for short in left)
        back = there_and_back(tensors, rows)
        assert back.keys() == tensors.keys() - set(left)
        assert all(torch.equal(to_torch(tensor), expected[short]) for short, tensor in back.items())


@pytest.mark.parametrize("kind", KINDS)
def test_each_name_of_a_full_size_comes_back(kind: str) -> None:
    states, configs = original.meta_states(CONFIGS / kind)
    state = original.as_original(kind, states, configs)
    for name, part in KINDS[kind].parts.items():
        rows = part.rows(json.loads((CONFIGS / kind / name / "config.json").read_text()))
        tensors = make(*of_part(part, state), shape=(3, 1))
        there, left = take_apart(tensors, rows)
        assert {tensor.name for tensor in there} == states[name].keys()
        assert all(LEFT.fullmatch(short) for short in left)
        assert there_and_back(tensors, rows).keys() == tensors.keys() - set(left)


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
    for name in ("unet", "vae"):  # CLIP's names have several forms, of which the first is written
        rows = KINDS[kind].parts[name].rows(json.loads((CONFIGS / kind / name / "config.json").read_text()))
        assert all(holes(row.whole) == holes(part) for row in rows for part in row.parts)
        wholes = list(dict.fromkeys(row.whole for row in rows))  # a VAE's attention had other names, which are read
        for patterns in (wholes, [part for row in rows for part in row.parts]):
            by_form: dict[tuple[str, int], list[str]] = {}
            for pattern in patterns:
                by_form.setdefault((pattern.partition(".")[0], pattern.count(".")), []).append(pattern)
            for alike in by_form.values():
                assert not [pair for pair in itertools.combinations(alike, 2) if overlap(*pair)]

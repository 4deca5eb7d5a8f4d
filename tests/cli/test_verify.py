"""``wconv verify``: the same weights, whatever their form; what differs; and recasts, which must be rounded right.

torch is the judge of what rounding right is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import (
    State,
    make_state,
    save,
    save_bin_shards,
    save_pipeline,
    save_safetensors_shards,
    save_shards,
    snapshot,
)

STATE = make_state()


class _Either:
    """The exit code of a comparison, whatever its outcome; the next call is strict."""

    def __eq__(self, other: object) -> bool:
        return other in (0, 1)

    def __hash__(self) -> int:
        return 0


EITHER = _Either()


def strict_json(text: str) -> Any:
    """Read JSON as its standard has it: without NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def differences(wconv: Callable[..., Any], tmp_path: Path) -> Any:
    """Verify two state dicts; give what differs, having looked at the table too."""

    def run(a: State, b: State, *args: str) -> list[tuple[str, str]]:
        paths = save(a, tmp_path / "a.bin"), save(b, tmp_path / "b.safetensors")
        found = strict_json(wconv("verify", *paths, *args, "--json", exit_code=EITHER).stdout)
        assert found["equal"] == (not found["differences"])
        shown = wconv("verify", *paths, *args, exit_code=int(not found["equal"])).stdout
        assert ("The same" if found["equal"] else "Not the same") in shown
        assert wconv("verify", *paths, *args, "-q", exit_code=int(not found["equal"])).stdout == ""
        return [(one["kind"], one["name"]) for one in found["differences"]]

    return run


# The same.


def test_any_form_on_either_side(wconv: Callable[..., Any], tmp_path: Path) -> None:
    paths = [
        save(STATE, tmp_path / "single.bin"),
        save(STATE, tmp_path / "single.safetensors"),
        save_bin_shards(STATE, tmp_path / "bin"),
        save_bin_shards(STATE, tmp_path / "bin"),
        save_safetensors_shards(STATE, tmp_path / "safe", ("a", "bcdef")).parent,
        save_shards(STATE, tmp_path / "bare", ("abc", "def"), "x-{:05d}-of-{:05d}.pt", None),
    ]
    for a in paths:
        for b in paths:
            wconv("verify", a, b)


def test_a_conversion(wconv: Callable[..., Any], tmp_path: Path) -> None:
    source = save_pipeline(tmp_path / "m")
    wconv("to-safetensors", source, "-o", tmp_path / "out")
    before = snapshot(tmp_path)
    found = json.loads(wconv("verify", source, tmp_path / "out", "--json").stdout)
    nothing: dict[str, object] = {"differences": [], "recast": [], "quantized": [], "schemes": {}}
    assert found == {"equal": True, "tensor_count": 18, "nbytes": 18 * 32, **nothing}
    assert "18 tensors" in wconv("verify", tmp_path / "out", source).stdout
    assert snapshot(tmp_path) == before


def test_strided_and_contiguous_are_the_same(differences: Any) -> None:
    wide = torch.arange(600.0).reshape(20, 30)
    state = {"t": wide.T, "s": wide[::2, 1::3], "e": torch.ones(1).expand(7, 5), "z": wide[:0]}
    assert differences(state, {name: tensor.clone().contiguous() for name, tensor in state.items()}) == []


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        torch.tensor([True, False]),
        torch.tensor([-(2**63), 2**63 - 1]),
        torch.tensor([1 + 2j, complex("nan")], dtype=torch.complex64),
        torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn),
        torch.tensor([1, 65535], dtype=torch.uint16),
        torch.tensor(3, dtype=torch.int8),
    ],
    ids=lambda values: str(values.dtype),
)
def test_every_dtype_has_its_bits_compared(values: Any, differences: Any) -> None:
    assert differences({"x": values}, {"x": values.clone()}) == []
    raw = values.clone().reshape(-1).view(torch.uint8)
    raw[-1] ^= 1
    assert differences({"x": values}, {"x": raw.view(values.dtype).reshape(values.shape)}) == [("values", "x")]


def test_a_recorded_tie_stands_for_its_tensor(wconv: Callable[..., Any], tmp_path: Path) -> None:
    source = save({"a": STATE["a"], "t": STATE["a"]}, tmp_path / "m" / "pytorch_model.bin")
    wconv("to-safetensors", source, "--tied", "first", "-o", tmp_path / "first")
    wconv("to-safetensors", source, "--tied", "duplicate", "-o", tmp_path / "both")
    for a in (source, tmp_path / "first", tmp_path / "both"):
        for b in (source, tmp_path / "first", tmp_path / "both"):
            found = json.loads(wconv("verify", a, b, "--json").stdout)
            assert found["tensor_count"] == 2


# Not the same.


def changed(**tensors: torch.Tensor | None) -> State:
    """Give the state dict with some tensors changed, added, or (None) left out."""
    return {name: tensor for name, tensor in {**STATE, **tensors}.items() if tensor is not None}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"c": STATE["c"] + 1}, [("values", "c")]),
        ({"c": STATE["c"].flip(0), "e": STATE["e"] * 2}, [("values", "c"), ("values", "e")]),
        ({"c": STATE["c"].reshape(2, 4)}, [("shape", "c")]),
        ({"c": STATE["c"].half()}, [("dtype", "c")]),
        ({"c": STATE["c"].view(torch.int32)}, [("dtype", "c")]),
        ({"c": None}, [("missing", "c")]),
        ({"x": STATE["c"].clone()}, [("extra", "x")]),
        ({"c": None, "x": STATE["c"].clone()}, [("missing", "c"), ("extra", "x")]),
    ],
)
def test_what_differs_is_named(change: dict[str, Any], expected: list[tuple[str, ...]], differences: Any) -> None:
    assert differences(STATE, changed(**change)) == expected


def test_zero_and_minus_zero_are_not_the_same(differences: Any) -> None:
    assert differences({"x": torch.tensor([0.0])}, {"x": torch.tensor([-0.0])}) == [("values", "x")]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.tensor([float("nan")]), torch.tensor([1.0])),
        (torch.tensor([1.0]), torch.tensor([float("inf")])),
        (torch.tensor([0.0]), torch.tensor([1.0])),
        (torch.tensor([float("inf")]), torch.tensor([float("-inf")])),
    ],
)
def test_what_has_no_finite_error_is_json_all_the_same(a: Any, b: Any, differences: Any) -> None:
    assert differences({"x": a}, {"x": b}) == [("values", "x")]


def test_the_last_element_of_a_long_tensor_counts(differences: Any) -> None:
    long = torch.zeros(700_001, dtype=torch.float16)
    other = long.clone()
    other[-1] = 1
    assert differences({"x": long}, {"x": other}) == [("values", "x")]


def test_components_and_variants(wconv: Callable[..., Any], tmp_path: Path) -> None:
    a, b = save_pipeline(tmp_path / "a"), save_pipeline(tmp_path / "b")
    for path in (b / "vae").glob("*"):
        path.unlink()
    save(STATE, b / "text_encoder" / "pytorch_model.fp16.bin")
    save(STATE, a / "image_encoder" / "pytorch_model.bin")
    save(STATE, b / "unet_2" / "pytorch_model.bin")
    found = json.loads(wconv("verify", a, b, "--json", exit_code=1).stdout)["differences"]
    assert {(one["kind"], one["component"], one["detail"]) for one in found} == {
        ("extra", "text_encoder", "the variant fp16"),
        ("extra", "unet_2", "the whole component"),
        ("missing", "image_encoder", "the whole component"),
        ("missing", "vae", "the whole component"),
    }


def test_many_differences_are_cut_short(wconv: Callable[..., Any], tmp_path: Path) -> None:
    a = save({f"t{number:03d}": torch.zeros(1) for number in range(50)}, tmp_path / "a.bin")
    b = save({f"t{number:03d}": torch.ones(1) for number in range(50)}, tmp_path / "b.bin")
    short = wconv("verify", a, b, exit_code=1).stdout
    assert ("t019" in short, "t020" in short, "30 more" in short) == (True, False, True)
    assert "t049" in wconv("verify", a, b, "-v", exit_code=1).stdout


# Recasts.


SHORT_DTYPES = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
VALUES = torch.tensor(
    [0.0, -0.0, 1.0, 1 / 3, -2.7, 1e-6, 6e-8, 3e-8, 100.5, 400.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11]
)


@pytest.mark.parametrize("dtype", SHORT_DTYPES, ids=str)
def test_a_recast_needs_its_option(dtype: torch.dtype, differences: Any) -> None:
    assert differences({"x": VALUES}, {"x": VALUES.to(dtype)}) == [("dtype", "x")]


@pytest.mark.parametrize("dtype", SHORT_DTYPES, ids=str)
@pytest.mark.parametrize("before", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_recast_that_is_rounded_right(dtype: torch.dtype, before: torch.dtype, differences: Any) -> None:
    values = VALUES.to(before)
    assert differences({"x": values, **STATE}, {"x": values.to(dtype), **STATE}, "--cast") == []


@pytest.mark.parametrize("dtype", SHORT_DTYPES, ids=str)
def test_a_recast_that_is_off_by_one_bit(dtype: torch.dtype, differences: Any) -> None:
    raw = VALUES.to(dtype).view(torch.uint8).clone()
    raw[0] ^= 1
    assert differences({"x": VALUES}, {"x": raw.view(dtype)}, "--cast") == [("values", "x")]


def test_a_recast_that_is_cut_off_is_not_rounded(differences: Any) -> None:
    cut = (VALUES.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    assert differences({"x": VALUES}, {"x": cut}, "--cast") == [("values", "x")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_nan_may_change_its_payload_and_no_more(dtype: torch.dtype, differences: Any) -> None:
    nans = torch.tensor([0x7FC00001, -0x400001, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert nans.isnan().all()
    assert differences({"x": nans}, {"x": torch.full((3,), float("nan"), dtype=dtype)}, "--cast") == []
    for other in (0.0, float("inf")):
        wrong = torch.full((3,), other, dtype=dtype)
        assert differences({"x": nans}, {"x": wrong}, "--cast") == [("values", "x")]
    assert differences({"x": torch.ones(3)}, {"x": torch.full((3,), float("nan"), dtype=dtype)}, "--cast") == [
        ("values", "x")
    ]


def test_overflow_to_infinity_is_what_rounding_gives(differences: Any) -> None:
    values = torch.tensor([65504.0, 65519.0, 65520.0, -1e30])
    assert differences({"x": values}, {"x": values.half()}, "--cast") == []


def test_whole_numbers_are_never_recast(differences: Any) -> None:
    numbers = torch.tensor([1, 2])
    assert differences({"x": numbers}, {"x": numbers.float()}, "--cast") == [("dtype", "x")]
    assert differences({"x": numbers.float()}, {"x": numbers}, "--cast") == [("dtype", "x")]


def test_errors_of_a_recast_are_told(wconv: Callable[..., Any], tmp_path: Path) -> None:
    values = torch.tensor([1.0, 1 + 2**-9, 100.25, 0.0])
    a, b = save({"x": values, "y": STATE["a"]}, tmp_path / "a.bin"), tmp_path / "b.safetensors"
    save({"x": values.bfloat16(), "y": STATE["a"]}, b)
    (error,) = strict_json(wconv("verify", a, b, "--cast", "--json").stdout)["recast"]
    gap = (values.double() - values.bfloat16().double()).abs()
    assert error == {
        "component": "",
        "name": "x",
        "differing": 0,
        "max_absolute": gap.max().item(),
        "max_relative": (gap[:3] / values[:3]).max().item(),
    }
    assert "0.25" in wconv("verify", a, b, "--cast").stdout


@pytest.mark.parametrize("args", [("--workers", "1"), ("--workers", "4"), ("--memory", "1KB")], ids=" ".join)
def test_workers_and_memory_change_nothing(args: tuple[str, ...], wconv: Callable[..., Any], tmp_path: Path) -> None:
    state = {"x": torch.randn(300, 900).T, "y": torch.randn(400_000), **STATE}
    a = save(state, tmp_path / "a.bin")
    wrong = state["y"].bfloat16()
    wrong[123_456] += 1
    b = save({**{name: t.contiguous().bfloat16() for name, t in state.items()}, "y": wrong}, tmp_path / "b.safetensors")
    plain = json.loads(wconv("verify", a, b, "--cast", "--json", exit_code=1).stdout)
    found = json.loads(wconv("verify", a, b, "--cast", "--json", *args, exit_code=1).stdout)
    assert found["differences"] == plain["differences"]
    assert sorted(found["recast"], key=str) == sorted(plain["recast"], key=str)
    assert [one["name"] for one in found["differences"]] == ["y"]


# Bad input.


def test_bad_input(wconv: Callable[..., Any], tmp_path: Path) -> None:
    good = save(STATE, tmp_path / "a.bin")
    (tmp_path / "bad.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    for paths in ((good, tmp_path / "bad.bin"), (tmp_path / "bad.bin", good), (good, tmp_path / "none")):
        outcome = wconv("verify", *paths, exit_code=3)
        assert (outcome.stdout, outcome.stderr.count("\n")) == ("", 1)
    wconv("verify", good, exit_code=2)


def test_the_same_weights_twice_are_not_guessed_at(wconv: Callable[..., Any], tmp_path: Path) -> None:
    good = save(STATE, tmp_path / "a.bin")
    save(STATE, tmp_path / "m" / "pytorch_model.bin")
    save(STATE, tmp_path / "m" / "model.pt")
    assert "twice" in wconv("verify", good, tmp_path / "m", exit_code=2).stderr


def test_control_characters_do_not_reach_the_terminal(wconv: Callable[..., Any], tmp_path: Path) -> None:
    a = save({"a\x1b[31m": STATE["a"]}, tmp_path / "a.bin")
    b = save({"b\x1b[31m": STATE["a"]}, tmp_path / "b.bin")
    assert "\x1b" not in wconv("verify", a, b, exit_code=1).stdout


def test_a_folder_with_both_forms_is_compared_by_its_safetensors(wconv: Callable[..., Any], tmp_path: Path) -> None:
    source = save_bin_shards(STATE, tmp_path / "m").parent
    wconv("to-safetensors", source)
    wconv("verify", source, Path(source, "pytorch_model.bin.index.json"))

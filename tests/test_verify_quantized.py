"""verify --quantized: what codes stand for is compared, on either side, in any scheme that is dequantized."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import State, save, write_json

from converter.models.schemes import FP8
from converter.recipes.verify import verify
from converter.transforms.quantize import DEQUANTIZERS

F8 = torch.float8_e4m3fn


def plain(dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(0)
    return {
        "m.weight": torch.randn(200, 136, generator=generator).to(dtype),
        "n.weight": torch.randn(4, 8, generator=generator).to(dtype),
        "norm.weight": torch.ones(8, dtype=dtype),
    }


def to_fp8(state: State, *names: str) -> State:
    """Give a state with some weights in float8, a scale for each block of 128 x 128, rounded to nearest."""
    made = dict(state)
    for name in names:
        weight = state[name].float()
        rows, columns = (-(-side // 128) for side in weight.shape)
        padded = torch.zeros(rows * 128, columns * 128)
        padded[: weight.shape[0], : weight.shape[1]] = weight
        blocks = padded.reshape(rows, 128, columns, 128)
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).reshape(padded.shape)
        made[name] = codes[: weight.shape[0], : weight.shape[1]].to(F8)
        made[name + "_scale_inv"] = scale
    return made


def to_int8(state: State, *names: str) -> State:
    """Give a state with some weights in the form of bitsandbytes."""
    made = dict(state)
    for name in names:
        weight = state[name].half().float()
        scale = weight.abs().amax(1)
        made[name] = (weight * (127 / scale[:, None])).round().to(torch.int8)
        made[name.replace(".weight", ".SCB")] = scale
        made[name.replace(".weight", ".weight_format")] = torch.zeros((), dtype=torch.uint8)
    return made


FORMS = {"float8 with scales": to_fp8, "LLM.int8 of bitsandbytes": to_int8}


@pytest.mark.parametrize(("label", "form"), FORMS.items(), ids=FORMS)
def test_codes_in_b_are_within_half_a_step(
    wconv: Callable[..., Any], tmp_path: Path, label: str, form: Callable[..., State]
) -> None:
    a = save(plain(), tmp_path / "a.safetensors")
    coded = form(plain(), "m.weight", "n.weight")
    b = save(coded, tmp_path / "b.safetensors")
    found = json.loads(wconv("verify", a, b, "--quantized", "--json").stdout)
    assert found["schemes"] == {"B": [label]}
    assert {(one["name"], one["scheme"], one["beyond"]) for one in found["quantized"]} == {
        ("m.weight", label, 0), ("n.weight", label, 0)
    }  # fmt: skip
    errors = [one["max_relative"] for one in found["quantized"]]
    assert errors == sorted(errors, reverse=True)
    assert 0 < errors[0] < 0.05
    shown = wconv("verify", a, b, "--quantized").stdout
    assert label in shown
    assert "The same within half a step of the codes in B: 3 tensors" in shown
    raw = coded["m.weight"].view(torch.uint8)
    raw[150, 3] = raw[150, 3] + 2  # two codes off
    save(coded, b)
    shown = wconv("verify", a, b, "--quantized", exit_code=1).stdout
    assert "1 of its values are off by more than half a step" in shown


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_what_was_dequantized_is_the_same(
    wconv: Callable[..., Any], tmp_path: Path, form: Callable[..., State], dtype: str
) -> None:
    save(form(plain(torch.bfloat16), "m.weight"), tmp_path / "a" / "model.safetensors")
    write_json(tmp_path / "a" / "config.json", {"model_type": "llama"})
    wconv("dequantize", tmp_path / "a", "-o", tmp_path / "b", "--dtype", dtype)
    shown = wconv("verify", tmp_path / "a", tmp_path / "b", "--quantized").stdout
    assert "The same: 3 tensors" in shown
    assert "the numbers of A" in shown
    hint = wconv("verify", tmp_path / "a", tmp_path / "b", exit_code=1).stdout
    assert "--quantized compares the numbers" in hint
    made = load_file(tmp_path / "b" / "model.safetensors")
    made["m.weight"].view(torch.int16)[3, 5] += 1
    save(made, tmp_path / "b" / "model.safetensors")
    found = verify(tmp_path / "a", tmp_path / "b", quantized=True)
    assert [(one.kind, one.name) for one in found.differences] == [("values", "m.weight")]


def test_both_may_be_quantized(wconv: Callable[..., Any], tmp_path: Path) -> None:
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save(to_fp8(plain(), "m.weight"), a)
    found = verify(a, a, quantized=True)
    assert (found.is_equal, [one.max_relative for one in found.quantized]) == (True, [0])
    rounded = to_fp8(plain(), "m.weight")
    scales = rounded["m.weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)[:200, :136]
    numbers = {**plain(), "m.weight": (rounded["m.weight"].float() * scales).bfloat16()}
    save(to_int8(numbers, "m.weight"), b)
    found = verify(a, b, quantized=True)
    assert not found.differences
    assert (found.is_equal, dict(found.schemes)) == (
        True, {"A": ("float8 with scales",), "B": ("LLM.int8 of bitsandbytes",)}
    )  # fmt: skip


def test_nothing_quantized_is_a_bad_request(wconv: Callable[..., Any], tmp_path: Path) -> None:
    a = save(plain(), tmp_path / "a.safetensors")
    assert "Leave out --quantized" in wconv("verify", a, a, "--quantized", exit_code=2).stderr


def test_scales_of_a_that_do_not_fit_are_named(wconv: Callable[..., Any], tmp_path: Path) -> None:
    good = save(plain(), tmp_path / "good.safetensors")
    bad = save({**to_fp8(plain(), "m.weight"), "m.weight_scale_inv": torch.ones(3, 2)}, tmp_path / "bad.safetensors")
    for pair in ((good, bad), (bad, good)):
        assert "'m.weight_scale_inv'" in wconv("verify", *pair, "--quantized", exit_code=3).stderr


def test_numbers_of_4_bits_are_not_taken_for_bytes(wconv: Callable[..., Any], tmp_path: Path) -> None:
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    header = b'{"m":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}'
    a.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    save({"m": torch.zeros(4)}, b)
    assert "F4 became F32" in wconv("verify", a, b, "--cast", exit_code=1).stdout


@pytest.mark.parametrize("memory", ["1KB", "256MB"])
def test_memory_changes_nothing(tmp_path: Path, memory: str) -> None:
    a = save(plain(), tmp_path / "a.safetensors")
    b = save(to_fp8(plain(), "m.weight"), tmp_path / "b.safetensors")
    nbytes = {"1KB": 1_000, "256MB": 256_000_000}[memory]
    for one, other in ((a, b), (b, a)):
        found = verify(one, other, quantized=True, memory_nbytes=nbytes)
        assert found.is_equal == (one is a)


def test_without_a_bound_errors_are_told_and_zeros_are_no_match(
    wconv: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated = {**DEQUANTIZERS, FP8: lambda module: DEQUANTIZERS[FP8](module)._replace(slack=None)}
    monkeypatch.setattr("converter.transforms.quantize.DEQUANTIZERS", calibrated)
    coded = to_fp8(plain(), "m.weight")
    a, b = save(plain(), tmp_path / "a.safetensors"), tmp_path / "b.safetensors"
    save({**coded, "m.weight_scale_inv": coded["m.weight_scale_inv"] * 1.5}, b)
    shown = wconv("verify", a, b, "--quantized").stdout
    assert "No bound is broken, and there is none for float8 with scales" in shown
    (one,) = verify(a, b, quantized=True).quantized
    assert (one.is_bounded, one.beyond) == (False, 0)
    assert 0.48 < one.mean_relative < 0.52
    save({**coded, "m.weight_scale_inv": coded["m.weight_scale_inv"] * -1}, b)
    assert "no nearer than zeros" in wconv("verify", a, b, "--quantized", exit_code=1).stdout
    coded["m.weight"].view(torch.uint8)[3, 5] = 0x7F  # NaN
    save(coded, b)
    (difference,) = verify(a, b, quantized=True).differences
    assert difference.detail == "1 of its values are no finite numbers"
    assert json.loads(wconv("verify", a, b, "--quantized", "--json", exit_code=1).stdout)["quantized"][0]["beyond"] == 1

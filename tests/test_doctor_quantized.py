"""What the doctor finds in quantized folders: scales and weights that do not go together, and wrong configs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import State, save, write_json

from converter.doctor import Finding, diagnose
from converter.doctor.facts import find_scales
from converter.dtypes import DTYPES

F8 = torch.float8_e4m3fn
PLAIN = {"norm.weight": torch.ones(8, dtype=torch.bfloat16)}


def fp8(module: str) -> State:
    return {f"{module}.weight": torch.ones(8, 16).to(F8), f"{module}.weight_scale_inv": torch.ones(1, 1)}


def int8(module: str) -> State:
    return {
        f"{module}.weight": torch.ones(8, 16, dtype=torch.int8),
        f"{module}.SCB": torch.ones(8),
        f"{module}.weight_format": torch.zeros((), dtype=torch.uint8),
    }


def mxfp4(module: str) -> State:
    blocks = torch.ones(2, 8, 1, 16, dtype=torch.uint8)
    return {f"{module}_blocks": blocks, f"{module}_scales": torch.full((2, 8, 1), 120, dtype=torch.uint8)}


GOOD: State = {**PLAIN, **fp8("a"), **fp8("b")}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
BNB = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}


def found_in(folder: Path, state: State, said: Any = FP8, deep: bool = False) -> dict[str, Finding]:
    save(state, folder / "model.safetensors")
    config = {"model_type": "llama"} if said is None else {"model_type": "llama", "quantization_config": said}
    write_json(folder / "config.json", config)
    return {one.code: one for one in diagnose(folder, deep=deep).findings}


def without(state: State, *names: str) -> State:
    return {name: one for name, one in state.items() if name not in names}


def test_what_is_right_is_only_noted(tmp_path: Path) -> None:
    for number, (state, said) in enumerate(((GOOD, FP8), ({**PLAIN, **int8("a")}, BNB))):
        assert found_in(tmp_path / str(number), state, said, deep=True).keys() <= {"quantized", "values-equal"}


DAMAGE: dict[str, tuple[State, Any, str, str]] = {
    "no scale": (without(GOOD, "b.weight_scale_inv"), FP8, "scales-missing", "b.weight"),
    "no scales at all": (without(GOOD, "a.weight_scale_inv", "b.weight_scale_inv"), FP8, "scales-missing", "a.weight"),
    "no weight": (without(GOOD, "b.weight"), FP8, "scales-stray", "b.weight_scale_inv"),
    "cast weights": ({**GOOD, "b.weight": torch.ones(8, 16)}, FP8, "scales-unused", "b.weight_scale_inv"),
    "all cast": ({**PLAIN, "a.weight": torch.ones(8, 16), "a.weight_scale_inv": torch.ones(1, 1)}, None,
                 "scales-unused", "a.weight_scale_inv"),
    "shape": ({**GOOD, "b.weight_scale_inv": torch.ones(2, 3)}, FP8, "scales-misfit", "'b.weight_scale_inv'"),
    "cast SCB": ({**PLAIN, **int8("a"), "a.SCB": torch.ones(8).half()}, BNB, "scales-misfit", "'a.SCB'"),
    "cast scales": ({**GOOD, "a.weight_scale_inv": torch.ones(1, 1).half()}, FP8, "scales-cast", "F16"),
    "another scheme": (GOOD, BNB, "config-scheme", "names bitsandbytes"),
    "another width": ({**PLAIN, **int8("a")}, {**BNB, "load_in_8bit": False, "load_in_4bit": True}, "config-scheme",
                      "without load_in_8bit"),
    "nothing quantized": (PLAIN, BNB, "config-quantized", "no weights are quantized"),
    "unsaid": (GOOD, None, "quantized-unsaid", "does not say so"),
}  # fmt: skip


@pytest.mark.parametrize(("state", "said", "code", "words"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_found(tmp_path: Path, state: State, said: Any, code: str, words: str) -> None:
    found = found_in(tmp_path, state, said)
    assert words in found[code].problem
    others = {"quantized", "dtype-mixed", "config-quantized"} | {code}
    assert found.keys() <= others


def test_float_models_with_such_names_are_healthy(tmp_path: Path) -> None:
    honest = {"a.weight": torch.ones(8, 16), "a.weight_scale": torch.ones(8), "b.scales": torch.ones(2)}
    assert not found_in(tmp_path, honest, None)


def test_what_modelopt_says_beside_is_said(tmp_path: Path) -> None:
    write_json(tmp_path / "hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}})
    assert "quantized-unsaid" not in found_in(tmp_path, GOOD, None)


@pytest.mark.parametrize("said", [
    {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {"g": {"weights": {}}}},
    {"quant_method": "compressed-tensors", "config_groups": {}}, {"quant_method": "unheard of"}, {"quant_method": 3},
    {"quant_method": ["fp8"]}, {"quant_method": "fp8", "config_groups": {"a": 3}}, "fp8", 7,
])  # fmt: skip
def test_odd_configs_are_no_finding(tmp_path: Path, said: Any) -> None:
    assert not {"config-quantized", "config-scheme"} & found_in(tmp_path, PLAIN, said).keys()


def test_odd_scales_are_found_deep(tmp_path: Path) -> None:
    nan, zero = torch.tensor([[float("nan")]]), torch.zeros(1, 1)
    found = found_in(tmp_path, {**GOOD, "a.weight_scale_inv": nan, "b.weight_scale_inv": zero}, deep=True)
    assert "a.weight_scale_inv (1)" in found["scales-odd"].problem
    assert "b.weight_scale_inv (1)" in found["scales-zero"].problem
    assert not {"values-nan", "values-zero"} & found.keys()
    state = {**PLAIN, **mxfp4("m.down_proj")}
    state["m.down_proj_scales"][1, 2, 0] = 255
    found = found_in(tmp_path / "mx", state, {"quant_method": "mxfp4"}, deep=True)
    assert "m.down_proj_scales (1)" in found["scales-odd"].problem


def test_tables_of_codes_and_bytes_are_no_scales() -> None:
    tags = {"weight": "U8", "weight.absmax": "U8", "weight.nested_absmax": "F32", "weight.quant_map": "F32",
            "weight.quant_state.bitsandbytes__nf4": "U8"}  # fmt: skip
    found = find_scales({f"m.{name}": DTYPES[tag] for name, tag in tags.items()})
    assert {name for name, is_scale in found.items() if is_scale} == {"m.weight.nested_absmax"}
    assert len(found) == 4


def test_the_command_that_serves_is_named(wconv: Callable[..., Any], tmp_path: Path) -> None:
    found_in(tmp_path / "a", GOOD)
    assert "'wconv dequantize SRC -o NEW'" in wconv("doctor", tmp_path / "a", "-v").stdout
    hqq = {"a.W_q": torch.ones(8, 16, dtype=torch.uint8), "a.meta": torch.ones(3), **PLAIN}
    assert "hqq loads it" in found_in(tmp_path / "b", hqq, {"quant_method": "hqq"})["quantized"].problem


def test_numbers_of_shards_that_the_index_does_not_go_by_are_no_misfit(tmp_path: Path) -> None:
    states = {"model-00001-of-00003.safetensors": {**PLAIN, **fp8("a")}, "model-00002-of-00003.safetensors": fp8("b")}
    for name, state in states.items():
        save(state, tmp_path / name)
    weight_map = {name: file for file, state in states.items() for name in state}
    write_json(tmp_path / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(tmp_path / "config.json", {"model_type": "llama", "quantization_config": FP8})
    assert "scales-misfit" not in {one.code for one in diagnose(tmp_path).findings}

"""ComfyUI's quantized files as plain numbers, held against what its own code makes of them.

The files are from ``scripts/samples_comfy.py``, made with comfy_kitchen, convert_to_quant and ComfyUI.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.tiny import assert_same, raw_bytes

from converter.models.checkpoint import open_checkpoint
from converter.tensors.reader import RangeReader
from converter.transforms.quantize import DEQUANTIZERS
from converter.transforms.quantize.restore import find_restored

CORPUS = Path(__file__).parent / "corpus" / "quantized" / "comfy"
NAMES = ("comfy_quant", "convert_to_quant", "scaled_fp8_e4m3fn", "scaled_fp8_e5m2")
State = dict[str, torch.Tensor]


def described(**said: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_those_of_its_own_code(wconv: Callable[..., Any], tmp_path: Path, name: str) -> None:
    source = CORPUS / f"{name}.safetensors"
    judged = load_file(CORPUS / f"{name}.judge.safetensors")
    others = {key: one for key, one in load_file(source).items() if key in ("norm.weight",) or key.endswith(".bias")}
    for dtype, full in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        out = tmp_path / f"{dtype}.safetensors"
        wconv("dequantize", source, "-o", out, "--dtype", dtype)
        written = load_file(out)
        assert_same(written, {key: one.to(full) for key, one in (judged | others).items()})
        if dtype == "fp32":
            wconv("verify", out, source, "--quantized")


@pytest.mark.parametrize("name", NAMES)
def test_any_part_can_be_read(name: str) -> None:
    checkpoint = open_checkpoint(CORPUS / f"{name}.safetensors")
    judged = load_file(CORPUS / f"{name}.judge.safetensors")
    found = find_restored(checkpoint, DEQUANTIZERS, {})
    with RangeReader() as reader:
        for key, restored in found.weights.items():
            expected, columns = raw_bytes(judged[key]), judged[key].shape[1]
            for begin, end in (
                (0, 1),
                (5, 2 * columns + 3),
                (columns, len(expected) // 4),
                (len(expected) // 4 - 1, None),
            ):
                cut = expected[4 * begin : 4 * end if end else None]
                for source in (restored.source, restored.source.part(4 * begin, 4 * begin + len(cut))):
                    out = bytearray(len(cut))
                    source.read(4 * begin, memoryview(out), reader)
                    assert out == cut


def test_a_header_may_describe_them(wconv: Callable[..., Any], tmp_path: Path) -> None:
    """Of a model in a file with a prefix, and with the note of no module; nothing of it is left."""
    state = load_file(CORPUS / "comfy_quant.safetensors")
    prefix = "model.diffusion_model."
    said = {key.removesuffix(".comfy_quant"): json.loads(bytes(one.tolist())) for key, one in state.items()
            if key.endswith(".comfy_quant")}  # fmt: skip
    note = json.dumps({"format_version": "1.0", "layers": {**said, "gone": {"format": "nvfp4"}}})
    bare = {prefix + key: one for key, one in state.items() if not key.endswith(".comfy_quant")}
    save_file(bare, tmp_path / "m.safetensors", {"_quantization_metadata": note, "title": "x"})
    wconv("dequantize", tmp_path / "m.safetensors", "-o", tmp_path / "out.safetensors", "--dtype", "fp32")
    judged = load_file(CORPUS / "comfy_quant.judge.safetensors")
    assert_same(load_file(tmp_path / "out.safetensors"), {prefix + key: one for key, one in judged.items()})
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "title": "x"}
    told = wconv("recast", tmp_path / "m.safetensors", "--dtype", "bf16", exit_code=4).stderr
    assert "comfy_quant" in told


def test_rows_that_were_turned(wconv: Callable[..., Any], tmp_path: Path) -> None:
    """The library's float32 sums are rounded as they grow; here they are the ones that float64 has, rounded once."""
    source, out = CORPUS / "convrot.safetensors", tmp_path / "out.safetensors"
    wconv("dequantize", source, "-o", out, "--dtype", "fp32")
    written, judged, state = load_file(out), load_file(CORPUS / "convrot.judge.safetensors"), load_file(source)
    assert written.keys() == judged.keys()
    four = torch.ones(4, 4, dtype=torch.float64) - 2 * torch.eye(4, dtype=torch.float64).flip(0)
    for name, found in written.items():
        torch.testing.assert_close(found, judged[name], rtol=1e-5, atol=1e-6)
        group, matrix = int(name.partition(".")[0]), four / 2
        while len(matrix) < group:
            matrix = torch.kron(matrix, four / 2)
        codes = state[name].double().reshape(-1, group) @ matrix
        exact = codes.reshape(found.shape) * state[f"{name}_scale"].double()
        assert torch.equal(found, exact.float())
    wconv("verify", out, source, "--quantized")
    with RangeReader() as reader:
        for name, restored in find_restored(open_checkpoint(source), DEQUANTIZERS, {}).weights.items():
            cut = raw_bytes(written[name])[20:100]
            part = restored.source.part(20, 100)
            read = bytearray(len(cut))
            part.read(20, memoryview(read), reader)
            assert read == cut


F8 = torch.float8_e4m3fn
EIGHT = torch.arange(32.0).reshape(4, 8).to(F8)
ONE = torch.tensor(0.5)
FP8 = {"m.weight": EIGHT, "m.weight_scale": ONE, "m.comfy_quant": described(format="float8_e4m3fn")}
ROW = torch.tensor([1.0, 2.0, 3.0, 4.0])
INT8 = {"m.weight": torch.ones(4, 8, dtype=torch.int8), "m.comfy_quant": described(format="int8_tensorwise")}
NVFP4 = {"m.weight": torch.ones(4, 8, dtype=torch.uint8), "m.weight_scale": torch.ones(128, 4).to(F8),
         "m.weight_scale_2": ONE, "m.comfy_quant": described(format="nvfp4")}  # fmt: skip
REFUSED = {
    "no scale": ({**FP8, "m.weight_scale": None}, 3, "has no 'm.weight_scale'"),
    "NaN": ({**FP8, "m.weight_scale": torch.tensor(torch.nan)}, 3, "'m.weight_scale'"),
    "scale of 8 bits": ({**FP8, "m.weight_scale": ONE.to(F8)}, 3, "it is F8_E4M3"),
    "scales of columns": ({**FP8, "m.weight_scale": torch.ones(8)}, 3, "it is [8] beside [4, 8]"),
    "other dtype": ({**FP8, "m.comfy_quant": described(format="float8_e5m2")}, 3, "it is F8_E4M3"),
    "no JSON": ({**FP8, "m.comfy_quant": torch.zeros(4, dtype=torch.uint8)}, 3, "it is not JSON"),
    "no format": ({**FP8, "m.comfy_quant": described(format=3)}, 3, "it names no format"),
    "a list": ({**FP8, "m.comfy_quant": torch.tensor(list(b"[]"), dtype=torch.uint8)}, 3, "it names no format"),
    "deep": ({**FP8, "m.comfy_quant": torch.tensor(list(b"[" * 9000), dtype=torch.uint8)}, 3, "it is not JSON"),
    "strange format": ({**FP8, "m.comfy_quant": described(format="svdquant_w4a4")}, 4, "'svdquant_w4a4'"),
    "strange word": ({**FP8, "m.comfy_quant": described(format="float8_e4m3fn", new=1)}, 4, "'new'"),
    "turned by 3": ({**INT8, "m.weight_scale": ONE, "m.comfy_quant": described(
        format="int8_tensorwise", convrot=True, convrot_groupsize=3)}, 3, "of 3"),
    "turned by 256": ({**INT8, "m.weight_scale": ROW[:, None],
                       "m.comfy_quant": described(format="int8_tensorwise", params={"convrot": True})}, 3, "of 256"),
    "turned floats": ({**FP8, "m.comfy_quant": described(format="float8_e4m3fn", convrot=True)}, 4, "'convrot'"),
    "group": ({**FP8, "m.comfy_quant": described(format="float8_e4m3fn_blockwise", group_size=3)}, 3, "blocks of 3"),
    "no group": ({**FP8, "m.comfy_quant": described(format="float8_e4m3fn_blockwise", group_size="x")}, 3, "'x'"),
    "huge group": ({**FP8, "m.comfy_quant": described(format="mxfp8", group_size=10**30)}, 3, "its group_size"),
    "zero group": ({**FP8, "m.comfy_quant": described(format="float8_e4m3fn_blockwise", group_size=0)}, 3, "'0'"),
    "other group": ({**FP8, "m.comfy_quant": described(format="mxfp8", group_size=0)}, 3, "its group_size"),
    "smoothed": ({**NVFP4, "m.pre_quant_scale": torch.ones(16)}, 4, "m.pre_quant_scale"),
    "not in tiles": ({**NVFP4, "m.weight_scale": torch.ones(4, 1).to(F8)}, 3, "need U8 or F8_E4M3 [128, 4]"),
    "two of one": ({**NVFP4, "m.weight_scale_2": torch.ones(2)}, 3, "and no number"),
    "mxfp8 of inf": ({"m.weight": torch.ones(4, 32).to(F8), "m.comfy_quant": described(format="mxfp8"),
                      "m.weight_scale": torch.full((128, 4), 255, dtype=torch.uint8)}, 3, "no finite number"),
    "marked, odd scale": ({"m.weight": EIGHT, "m.scale_weight": torch.ones(3), "scaled_fp8": torch.zeros(2).to(F8)},
                          3, "it is [3] beside [4, 8]"),
    "scale of bf16": ({"m.weight": EIGHT, "m.scale_weight": ONE, "n.weight": torch.ones(4, 8).bfloat16(),
                       "n.scale_weight": ONE.clone()}, 4, "n.scale_weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused(wconv: Callable[..., Any], tmp_path: Path, name: str) -> None:
    state, exit_code, said = REFUSED[name]
    save_file({key: one for key, one in state.items() if one is not None}, tmp_path / "m.safetensors")
    out = tmp_path / "out.safetensors"
    told = wconv("dequantize", tmp_path / "m.safetensors", "-o", out, "--dtype", "bf16", exit_code=exit_code).stderr
    assert said in told
    assert not out.exists()


@pytest.mark.parametrize("note", ["[", "[]", '{"layers": {"m": "nvfp4"}}', '{"layers": {"n": {"format": "x"}}}',
                                  '{"layers": {"m": {"format": "float8_e5m2"}}}'])  # fmt: skip
def test_a_note_that_does_not_fit_is_refused(wconv: Callable[..., Any], tmp_path: Path, note: str) -> None:
    state = {**FP8, "n.weight": torch.ones(4, 8), "n.bias": torch.ones(4)}
    save_file(state, tmp_path / "m.safetensors", {"_quantization_metadata": note})
    out = tmp_path / "out.safetensors"
    wconv("dequantize", tmp_path / "m.safetensors", "-o", out, "--dtype", "bf16", exit_code=3)


def test_an_integer_has_a_scale_a_row_in_one_axis_too(wconv: Callable[..., Any], tmp_path: Path) -> None:
    """``int8_linear`` of comfy_kitchen takes one for each row, of any shape."""
    for scale in (ROW, ROW[:, None]):
        save_file({**INT8, "m.weight_scale": scale.contiguous()}, tmp_path / "m.safetensors")
        out = tmp_path / "out.safetensors"
        wconv("dequantize", tmp_path / "m.safetensors", "-o", out, "--dtype", "fp32", "--overwrite")
        assert torch.equal(load_file(out)["m.weight"], ROW[:, None].expand(4, 8))


def test_a_marked_file_may_have_float8_that_nothing_scales(wconv: Callable[..., Any], tmp_path: Path) -> None:
    """Tensors whose names begin as such a one's do not belong to it."""
    state = {
        "scaled_fp8": torch.zeros(0).to(F8),
        "pos": EIGHT,
        "pos_scale.weight": torch.ones(3),
        "m.bias": EIGHT[0].clone(),
    }
    save_file(state, tmp_path / "m.safetensors")
    out = tmp_path / "out.safetensors"
    wconv("dequantize", tmp_path / "m.safetensors", "-o", out, "--dtype", "bf16")
    expected = {key: one.bfloat16() for key, one in state.items() if key != "scaled_fp8"}
    assert_same(load_file(out), expected)


def test_float8_beside_what_is_described_is_as_it_is(wconv: Callable[..., Any], tmp_path: Path) -> None:
    """``_load_quantized_module`` casts the weights of modules that nothing describes."""
    save_file({**FP8, "n.weight": EIGHT.clone()}, tmp_path / "m.safetensors")
    wconv("dequantize", tmp_path / "m.safetensors", "-o", tmp_path / "out.safetensors", "--dtype", "fp16")
    expected = {"m.weight": (EIGHT.float() / 2).half(), "n.weight": EIGHT.half()}
    assert_same(load_file(tmp_path / "out.safetensors"), expected)


@pytest.mark.parametrize("ends", [("scale_weight", "scale_input"), ("weight_scale", "input_scale")])
def test_scales_of_inputs_are_left_out_and_counted(
    wconv: Callable[..., Any], tmp_path: Path, ends: tuple[str, str]
) -> None:
    save_file({"m.weight": EIGHT, **{f"m.{end}": torch.tensor(0.5) for end in ends}}, tmp_path / "m.safetensors")
    told = wconv("dequantize", tmp_path / "m.safetensors", "-o", tmp_path / "out.safetensors").stdout
    assert f"left out: 1 scale of activations ({ends[1]})" in told

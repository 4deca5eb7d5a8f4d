"""Float8 and FP4 with scales, the ops of transformers for a judge; what is left out, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.tiny import assert_same, load_set, raw_bytes, save, save_pipeline, save_shards, write_json

from converter.dtypes import BY_TORCH_NAME, DTYPES
from converter.errors import BadFile, Unsupported
from converter.models.schemes import FP4, FP4_OF_EXPERTS, FP8, FP8_OF_EXPERTS, FP8_OF_FUSED, find_quantized
from converter.tensors.base import Tensor, TensorSource
from converter.tensors.derived import Constant, cast
from converter.tensors.reader import RangeReader
from converter.transforms.quantize import DEQUANTIZERS
from converter.transforms.quantize.restore import Module

F8 = torch.float8_e4m3fn
E8 = torch.float8_e8m0fnu
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
OUT = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def codes(*shape: int, dtype: torch.dtype = F8) -> torch.Tensor:
    """Make a weight of all codes that are numbers, in no order; of FP4 all pairs of them."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    if dtype == F8:
        raw[(raw & 0x7F) == 0x7F] = 0x7E
    return raw.view(dtype)


def scales(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Make scales of very different sizes, a negative one and a zero among them where the dtype has those."""
    generator = torch.Generator().manual_seed(1)
    if dtype in (E8, torch.uint8):
        return torch.randint(100, 140, shape, generator=generator, dtype=torch.uint8).view(dtype)
    made = torch.rand(shape, generator=generator) * 10.0 ** torch.randint(-4, 1, shape, generator=generator)
    if made.numel() > 3:
        made.view(-1)[1], made.view(-1)[2] = -made.view(-1)[1], 0
    return made.to(dtype)


def tensor_of(name: str, value: torch.Tensor) -> Tensor:
    dtype = BY_TORCH_NAME[str(value.dtype).removeprefix("torch.")]
    return Tensor(name, Constant(dtype, tuple(value.shape), raw_bytes(value)))


def restored(weight: torch.Tensor, scale: torch.Tensor, config: dict[str, Any] | None = None) -> TensorSource:
    """Give the float32 numbers of a weight as wconv makes them."""
    scheme, end = (FP8 if weight.dtype.itemsize == 1 and weight.is_floating_point() else FP4), ".weight_scale_inv"
    beside = {end: tensor_of("m.weight_scale_inv", scale)}
    module = Module(scheme, "m", tensor_of("m.weight", weight), beside, {}, config or {})
    return DEQUANTIZERS[scheme](module).source


def read(source: TensorSource, begin: int = 0) -> bytes:
    out = bytearray(source.dtype.nbytes(math.prod(source.shape)) - begin)
    with RangeReader() as reader:
        source.read(begin, memoryview(out), reader)
    return bytes(out)


def judged(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Give what transformers makes of it."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    result: torch.Tensor = Fp8Dequantize(None)._dequantize_one(weight, scale, output_dtype=dtype)
    return result.contiguous()


def official(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, block: int = 128) -> torch.Tensor:
    """Do what ``weight_dequant_kernel`` of DeepSeek does, block by block; compressed-tensors has to agree."""
    from compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer import FP8BlockDequantizer

    made = torch.empty(weight.shape, dtype=dtype)
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            part = slice(row * block, (row + 1) * block), slice(column * block, (column + 1) * block)
            made[part] = (weight[part].float() * scale[row, column].float()).to(dtype)
    padded = FP8BlockDequantizer(weight_block_size=(block, block), dtype=dtype)
    assert torch.equal(padded._create_dequantized_weight(weight, scale), made)
    return made


# What the ops are asked: weight, scales, and what the config says.
CASES = {
    **{f"blocks, {dtype}": (codes(256, 384), scales(2, 3, dtype=dtype), BLOCKS)
       for dtype in (torch.float32, torch.bfloat16, torch.float16, E8, torch.uint8)},
    "one block": (codes(7, 5), scales(1, 1), BLOCKS),
    "experts": (codes(3, 256, 128), scales(3, 2, 1), BLOCKS),
    "scalar": (codes(7, 5), scales(), {}),
    "one": (codes(7, 5), scales(1), {"weight_block_size": None}),
    "one for each expert": (codes(5, 6, 8), scales(5), {}),
    "one for each expert, with axes": (codes(5, 6, 8), scales(5, 1, 1), BLOCKS),
    "one for gate and one for up": (codes(5, 6, 8), scales(5, 2, 1), BLOCKS),
    "blocks of gate and of up": (codes(5, 100, 256), scales(5, 2, 2), BLOCKS),
    "rows": (codes(150, 40), scales(150, 1), BLOCKS),
    "MXFP8": (codes(6, 256), scales(6, 8, dtype=torch.uint8), {"weight_block_size": [1, 32]}),
    "MXFP8 in a model of other blocks": (codes(6, 256), scales(6, 8, dtype=E8), BLOCKS),
    "blocks that nothing says": (codes(192, 128), scales(3, 2), {}),
    "FP4": (codes(6, 64, dtype=torch.int8), scales(6, 4, dtype=E8), BLOCKS),
    "FP4 experts": (codes(3, 6, 16, dtype=torch.int8), scales(3, 6, 1, dtype=torch.uint8), {}),
    "FP4 with float32": (codes(6, 64, dtype=torch.int8), scales(6, 4), BLOCKS),
}  # fmt: skip


@pytest.mark.parametrize(("weight", "scale", "config"), CASES.values(), ids=CASES)
def test_numbers_are_those_of_transformers(weight: Any, scale: Any, config: dict[str, Any]) -> None:
    source = restored(weight, scale, config)
    for tag, dtype in OUT.items():
        # What is too large for float16 is infinite in torch.
        found = cast(Tensor("m", source), DTYPES[tag], "inf").source
        expected = raw_bytes(judged(weight, scale, dtype))
        assert read(found) == expected
        begin = dtype.itemsize * 19
        assert read(found.part(begin, len(expected)), begin) == expected[begin:]


@pytest.mark.parametrize("shape", [(576, 130), (1, 1), (127, 257)])
def test_ragged_sides_are_those_of_deepseek(shape: tuple[int, int]) -> None:
    weight, scale = codes(*shape), scales(-(-shape[0] // 128), -(-shape[1] // 128))
    source = restored(weight, scale, BLOCKS)
    expected = official(weight, scale, torch.bfloat16)
    assert read(cast(Tensor("m", source), DTYPES["BF16"]).source) == raw_bytes(expected)
    turned = cast(Tensor("m", source.permuted((1, 0))), DTYPES["BF16"]).source
    assert read(turned) == raw_bytes(expected.T.contiguous())


def test_a_scale_for_each_row_may_lack_its_second_axis() -> None:
    weight, scale = codes(150, 40), scales(150)
    assert read(restored(weight, scale)) == raw_bytes(weight.float() * scale[:, None])


def test_nan_stays_nan_and_the_largest_codes_are_exact() -> None:
    weight = torch.tensor([[0x7F, 0xFF, 0x7E, 0xFE, 0x01, 0x80, 0x00, 0x08]], dtype=torch.uint8).view(F8)
    found = torch.frombuffer(bytearray(read(restored(weight, torch.tensor(2.0**-10)))), dtype=torch.float32)
    assert found[:2].isnan().all()
    assert found[2:].tolist() == [0.4375, -0.4375, 2.0**-19, 0, 0, 2.0**-16]
    assert math.copysign(1, found[5]) == -1


# What is said beforehand, of headers and configs alone.
BAD_BLOCKS: list[Any] = [
    [0, 128], [128], "128", [128, -1], [1 << 70, 1], [True, 128], [1.5, 1], {}, [[1], 2], 10**400,
]  # fmt: skip
MISFITS = {
    "too few blocks": (codes(576, 256), scales(4, 2), BLOCKS, r"\[4, 2\].*blocks of \[128, 128\].*need \[5, 2\]"),
    "turned": (codes(512, 128), scales(1, 4), BLOCKS, "does not fit"),
    "of another weight": (codes(256, 256), scales(2, 2, 1), BLOCKS, "does not fit"),
    "blocks of experts and rows alone": (codes(5, 6, 8), scales(5, 1), {}, "does not fit"),
    "a bias": (codes(8), scales(8), {}, "does not fit"),
    "none": (codes(8, 8), scales(0), {}, "does not fit"),
    "other blocks than the config's": (codes(256, 256), scales(4, 4), BLOCKS, "does not fit"),
    "in float8": (codes(8, 8), scales(1).to(torch.float8_e5m2), {}, "it is F8_E5M2"),
    "in float64": (codes(8, 8), scales(1).double(), {}, "it is F64"),
    "in integers": (codes(8, 8), torch.ones(1, dtype=torch.int32), {}, "it is I32"),
    "halves of three": (codes(5, 7, 8), scales(5, 2, 1), BLOCKS, "does not fit"),
    "FP4 that does not divide": (codes(6, 20, dtype=torch.int8), scales(6, 3, dtype=E8), BLOCKS, "does not fit"),
    **{
        f"weight_block_size {said!r}"[:60]: (codes(8, 8), scales(1, 1), {"weight_block_size": said}, "in blocks of")
        for said in BAD_BLOCKS
    },
}  # fmt: skip


@pytest.mark.parametrize(("weight", "scale", "config", "problem"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_named(weight: Any, scale: Any, config: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadFile, match=problem) as raised:
        restored(weight, scale, config)
    assert "m.weight" in str(raised.value) or "m'" in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz])
def test_other_float8_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(Unsupported, match="no model is published in"):
        restored(torch.ones(8, 8).to(dtype), scales(1), {})


def test_what_is_empty_needs_no_scale() -> None:
    assert restored(codes(0, 8), scales(1)).shape == (0, 8)
    assert restored(codes(8, 0), scales(1, 0)).shape == (8, 0)


# Files and folders.

PLAIN = {"norm.weight": torch.full((8,), 1 / 3), "n.weight": torch.ones(4, 8).half()}
WEIGHT = {"m.weight": codes(8, 16), "m.weight_scale_inv": scales(1, 1)}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
NUMBERS = (WEIGHT["m.weight"].float() * WEIGHT["m.weight_scale_inv"]).bfloat16()


def save_model(folder: Path, state: dict[str, torch.Tensor], **config: Any) -> Path:
    save(state, folder / "model.safetensors")
    write_json(folder / "config.json", {**LLAMA, **config})
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


BAD_SCALES = {"NaN": math.nan, "infinite": math.inf, "-infinite": -math.inf}


@pytest.mark.parametrize("value", BAD_SCALES.values(), ids=BAD_SCALES)
def test_scales_that_are_no_numbers_are_named(wconv: Callable[..., Any], tmp_path: Path, value: float) -> None:
    scale = torch.tensor([[1.0], [value], [1.0]])
    source = save({"m.weight": codes(300, 16), "m.weight_scale_inv": scale}, tmp_path / "m.safetensors")
    told = wconv("dequantize", source, "-o", tmp_path / "out.safetensors", exit_code=3).stderr
    assert "no finite number, in 'm.weight_scale_inv'" in told
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("dtype", [torch.uint8, E8])
def test_the_exponent_that_is_none_is_named(wconv: Callable[..., Any], tmp_path: Path, dtype: torch.dtype) -> None:
    scale = torch.full((1, 1), 255, dtype=torch.uint8).view(dtype)
    source = save({**WEIGHT, "m.weight_scale_inv": scale}, tmp_path / "m.safetensors")
    told = wconv("dequantize", source, "-o", tmp_path / "out.safetensors", exit_code=3).stderr
    assert "no finite number, in 'm.weight_scale_inv'" in told


def test_what_is_too_large_is_counted(wconv: Callable[..., Any], tmp_path: Path) -> None:
    state = {"m.weight": torch.tensor([[448.0, 1.0]]).to(F8), "m.weight_scale_inv": torch.tensor(1000.0)}
    source = save(state, tmp_path / "m.safetensors")
    out = ("-o", tmp_path / "out.safetensors")
    wconv("dequantize", source, *out, "--dtype", "fp16", exit_code=6)
    wconv("dequantize", source, *out, "--dtype", "fp16", "--on-overflow", "saturate")
    assert load_file(out[1])["m.weight"].tolist() == [[65504, 1000]]


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_a_file_becomes_a_file(wconv: Callable[..., Any], tmp_path: Path, ending: str) -> None:
    source = save({**PLAIN, **WEIGHT}, tmp_path / f"m{ending}")
    told = wconv("dequantize", source, "-o", tmp_path / "out" / "plain.safetensors", "--verify").stdout
    assert "dequantized to bf16: 1 weight (float8 with scales)" in told
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["plain.safetensors"]
    assert_same(load_file(tmp_path / "out" / "plain.safetensors"), {**PLAIN, "m.weight": NUMBERS})
    wconv("dequantize", source, "-o", tmp_path / "folder", "--dtype", "fp32")
    [written] = (tmp_path / "folder").glob("*.safetensors")
    assert {one.dtype for one in load_file(written).values()} == {torch.float32}
    assert "is no name for" in wconv("dequantize", source, "-o", tmp_path / "x.bin", exit_code=2).stderr


def test_a_file_of_a_folder_leaves_its_config_alone(wconv: Callable[..., Any], tmp_path: Path) -> None:
    source = save_model(tmp_path / "m", WEIGHT, dtype="float16", quantization_config=BLOCKS)
    before = (source / "config.json").read_bytes()
    wconv("dequantize", source / "model.safetensors", "-o", source / "plain.safetensors")
    assert (source / "config.json").read_bytes() == before
    assert load_file(source / "plain.safetensors")["m.weight"].dtype == torch.float16
    told = wconv("dequantize", source, "-o", source / "plain.safetensors", exit_code=2).stderr
    assert "is one file, and" in told
    assert "or name a folder for the output" in told
    told = wconv("dequantize", source / "model.safetensors", "-o", source, "--overwrite", exit_code=2).stderr
    assert "is the folder of the source" in told
    assert_same(load_file(source / "model.safetensors"), WEIGHT)


SAID: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "none": ({}, torch.bfloat16),
    "dtype": ({"dtype": "float16"}, torch.float16),
    "torch_dtype": ({"torch_dtype": "float32"}, torch.float32),
    "of the text": ({"vision_config": {"dtype": "float32"}, "text_config": {"dtype": "float16"}}, torch.float16),
    "in float8": ({"dtype": "float8_e4m3fn"}, torch.bfloat16),
    "no dtype": ({"dtype": ["float16"], "torch_dtype": "auto"}, torch.bfloat16),
}  # fmt: skip


@pytest.mark.parametrize(("said", "dtype"), SAID.values(), ids=SAID)
def test_the_dtype_is_the_one_that_the_config_names(
    wconv: Callable[..., Any], tmp_path: Path, said: dict[str, Any], dtype: torch.dtype
) -> None:
    quantized = {**said, "quantization_config": BLOCKS}
    source = save_model(tmp_path / "m", {**PLAIN, **WEIGHT}, **quantized)
    wconv("dequantize", source, "-o", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.pop("m.weight").dtype == dtype
    assert_same(written, PLAIN)
    if said.get("dtype") == "float8_e4m3fn":
        said = {"dtype": "bfloat16"}
    assert config_of(tmp_path / "out") == {**LLAMA, **said}


def test_the_scales_tell_the_dtype_where_no_config_does(wconv: Callable[..., Any], tmp_path: Path) -> None:
    state = {"a.weight": codes(8, 16), "a.weight_scale_inv": scales(1, 1).half(), **WEIGHT}
    told = wconv("dequantize", save(state, tmp_path / "m.safetensors"), "-o", tmp_path / "out.safetensors").stdout
    written = load_file(tmp_path / "out.safetensors")
    assert [written[name].dtype for name in ("a.weight", "m.weight")] == [torch.float16, torch.bfloat16]
    assert "dequantized to fp16: 1 weight" in told
    assert "dequantized to bf16: 1 weight" in told


def test_a_dtype_casts_all(wconv: Callable[..., Any], tmp_path: Path) -> None:
    nested = {"text_config": {"torch_dtype": "bfloat16", "quantization_config": BLOCKS}, "compression_config": {}}
    source = save_model(tmp_path / "m", {**PLAIN, **WEIGHT}, **nested)
    wconv("dequantize", source, "-o", tmp_path / "out", "--dtype", "fp32", "--keep-fp32", "norm", exit_code=0)
    assert {one.dtype for one in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}
    assert config_of(tmp_path / "out")["text_config"] == {"torch_dtype": "float32"}
    assert "compression_config" not in config_of(tmp_path / "out")


def test_what_describes_the_quantization_is_left_out(wconv: Callable[..., Any], tmp_path: Path) -> None:
    source = save_model(tmp_path / "m", WEIGHT, quantization_config=BLOCKS)
    noted = {"format": "pt", "_quantization_metadata": '{"layers": {}}', "made_by": "me"}
    save_file(WEIGHT, source / "model.safetensors", noted)
    for name in ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json"):
        write_json(source / name, {})
    write_json(source / "params.json", {"dim": 8, "quantization": {"qformat_weight": "fp8_e4m3"}})
    write_json(source / "tokenizer.json", {})
    told = wconv("dequantize", source, "-o", tmp_path / "out").stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "model.safetensors", "params.json", "tokenizer.json"
    }  # fmt: skip
    assert "not carried over: hf_quant_config.json, quant_config.json" in told
    assert "left out of the header: _quantization_metadata" in told
    assert json.loads((tmp_path / "out" / "params.json").read_text()) == {"dim": 8}
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "made_by": "me"}


def test_scales_of_activations_and_of_the_cache_are_counted(wconv: Callable[..., Any], tmp_path: Path) -> None:
    one = torch.ones(1)
    names = ("q_proj.input_scale", "k_proj.input_scale", "k_scale", "v_scale", "k_proj.k_scale", "v_proj.output_scale",
             "k_proj.activation_scale")  # fmt: skip
    state = {f"l.attn.{part}_proj.{name}": WEIGHT[f"m.{name}"].clone() for part in "qkv"
             for name in ("weight", "weight_scale_inv")}  # fmt: skip
    honest = {"l.attn.q_scale": torch.ones(8), "other.k_scale": torch.ones(1)}
    state |= {f"l.attn.{name}": one.clone() for name in names} | honest
    source = save_model(tmp_path / "m", state)
    told = wconv("dequantize", source, "-o", tmp_path / "out").stdout
    assert "left out: 3 scales of activations (activation_scale, input_scale)" in told
    assert "left out: 4 scales of the KV cache (k_scale, output_scale, v_scale)" in told
    kept = {f"l.attn.{part}_proj.weight" for part in "qkv"} | honest.keys()
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == kept
    save_model(tmp_path / "m", state, quantization_config={**BLOCKS, "kv_cache_scheme": {"num_bits": 8}})
    wconv("dequantize", source, "-o", tmp_path / "said")
    assert load_file(tmp_path / "said" / "model.safetensors").keys() == kept - honest.keys()


def test_scales_may_lie_in_another_shard(wconv: Callable[..., Any], tmp_path: Path) -> None:
    pattern, index = "model-{:05d}-of-{:05d}.safetensors", "model.safetensors.index.json"
    state = {**PLAIN, **WEIGHT}
    parts = [["m.weight", "n.weight"], ["m.weight_scale_inv", "norm.weight"]]
    save_shards(state, tmp_path / "m", parts, pattern, index, total_size=1)
    write_json(tmp_path / "m" / "config.json", LLAMA)
    wconv("dequantize", tmp_path / "m", "-o", tmp_path / "out", "--workers", "2")
    expected = {**PLAIN, "m.weight": NUMBERS}
    assert_same(load_set(tmp_path / "out"), expected)
    written = json.loads((tmp_path / "out" / index).read_text())
    assert written["metadata"]["total_size"] == sum(one.nbytes for one in expected.values())
    assert written["weight_map"].keys() == expected.keys()
    wconv("dequantize", tmp_path / "m", "-o", tmp_path / "small", "--max-shard-size", "100B")
    assert len(list((tmp_path / "small").glob("*.safetensors"))) == 2
    assert_same(load_set(tmp_path / "small"), expected)


def test_of_a_pipeline_only_what_is_quantized_is_written(wconv: Callable[..., Any], tmp_path: Path) -> None:
    source = save_pipeline(tmp_path / "p")
    for path in (source / "unet").glob("*.bin*"):
        path.unlink()
    save(WEIGHT, source / "unet" / "diffusion_pytorch_model.safetensors")
    (source / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"nothing that is read")
    write_json(source / "unet" / "config.json", {"_class_name": "X", "quantization_config": BLOCKS})
    told = wconv("dequantize", source, "-o", tmp_path / "out").stdout
    assert "vae was not looked at, and goes along as it is" in told
    written = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert_same(written, {"m.weight": NUMBERS})
    assert (tmp_path / "out" / "vae" / "diffusion_pytorch_model.bin").read_bytes() == b"nothing that is read"
    assert (tmp_path / "out" / "text_encoder" / "pytorch_model.bin").exists()
    assert config_of(tmp_path / "out" / "unet") == {"_class_name": "X"}
    told = wconv("dequantize", source, "-o", tmp_path / "no", "--component", "text_encoder", exit_code=4).stderr
    assert "holds no quantized weights" in told
    # What no config says is found by content.
    write_json(source / "unet" / "config.json", {"_class_name": "X"})
    (source / "vae" / "diffusion_pytorch_model.bin").unlink()
    save(PLAIN, source / "vae" / "diffusion_pytorch_model.bin")
    wconv("dequantize", source, "-o", tmp_path / "unsaid")
    assert (tmp_path / "unsaid" / "text_encoder" / "pytorch_model.bin").exists()


OTHERS = {f"o.{name}": one for name, one in (("weight", codes(8, 16)), ("weight_scale_inv", scales(1, 1)))}
LACKING = {
    "float8 without a scale": ({"lone.weight": codes(8, 16)}, "has no scale for 'lone.weight', which is F8_E4M3"),
    "experts without one": ({"e.gate_up_proj": codes(2, 8, 16)}, "has no scale for 'e.gate_up_proj'"),
    "packed without one": ({"lone.qweight": torch.ones(4, 4).int()}, "has no scale for 'lone.qweight'"),
    "int8 without one": ({"lone.weight": torch.ones(4, 4).char()}, "has no scale for 'lone.weight', which is I8"),
    "a scale alone": ({"lone.weight_scale_inv": scales(1)}, "has the scale 'lone.weight_scale_inv', and there is no"),
    "a scale beside numbers": ({"n.weight_scale_inv": scales(1)}, "'n.weight' is F16: no weight that it is for"),
    "the scale of experts alone": ({"e.down_proj_scale_inv": scales(1)}, "there is no 'e.down_proj'"),
    "an exponent alone": ({"lone.scale": scales(1, dtype=E8)}, "'lone.scale', and there is no 'lone.weight'"),
    "an exponent of nothing": ({"lone": scales(1, dtype=E8)}, "has the scale 'lone', and 'lone' is F8_E8M0"),
    "a byte alone": ({"lone.scale": scales(1, dtype=torch.uint8)}, "there is no 'lone.weight'"),
    "blocks alone": ({"e.up_blocks": torch.ones(2, 8, dtype=torch.uint8)}, "has no scale for 'e.up_blocks'"),
    "scales of no blocks": ({"e.up_scales": scales(2, 8, dtype=torch.uint8)}, "there is no 'e.up_blocks'"),
    "two scales": ({"o.scale": scales(1, 1)}, "has 'o.weight_scale_inv' and 'o.scale' for 'o.weight'"),
    "what is not known": ({"o.weight_factor": scales(1)}, "wconv does not know what for"),
}  # fmt: skip


@pytest.mark.parametrize(("more", "problem"), LACKING.values(), ids=LACKING)
def test_what_is_not_whole_is_named(wconv: Callable[..., Any], tmp_path: Path, more: Any, problem: str) -> None:
    source = save({**PLAIN, **OTHERS, **more}, tmp_path / "m.safetensors")
    told = wconv("dequantize", source, "-o", tmp_path / "out.safetensors", exit_code=None)
    assert problem in told.stderr
    assert told.exit_code in (BadFile.exit_code, Unsupported.exit_code)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.usefixtures("asked_here")
def test_two_schemes_in_one_file(wconv: Callable[..., Any], tmp_path: Path) -> None:
    int8 = {"i.weight": torch.full((2, 4), 127, dtype=torch.int8), "i.SCB": torch.tensor([1.0, 3.0])}
    fp4 = {"e.weight": codes(6, 64, dtype=torch.int8), "e.scale": scales(6, 4, dtype=E8)}
    source = save_model(
        tmp_path / "m", {**PLAIN, **WEIGHT, **int8, **fp4}, architectures=[], quantization_config=BLOCKS
    )
    told = wconv("dequantize", source, "-o", tmp_path / "out").stdout
    for label in ("float8 with scales", "LLM.int8 of bitsandbytes", "FP4 with scales"):
        assert f"dequantized to bf16: 1 weight ({label})" in told
    assert "config.json says" not in told
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert_same({"m": written["m.weight"]}, {"m": NUMBERS})
    assert written["i.weight"].tolist() == [[1.0] * 4, [3.0] * 4]
    assert_same({"e": written["e.weight"]}, {"e": judged(fp4["e.weight"], fp4["e.scale"], torch.bfloat16)})


def test_a_config_of_another_scheme_is_noted(wconv: Callable[..., Any], tmp_path: Path) -> None:
    source = save_model(tmp_path / "m", WEIGHT, quantization_config={"quant_method": "gptq", "bits": 4})
    told = wconv("dequantize", source, "-o", tmp_path / "out").stdout
    assert "config.json says 'gptq', and the weights are float8 with scales: they were read as that" in told
    assert "quantization_config" not in config_of(tmp_path / "out")


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_config_that_says_it_of_plain_weights_is_refused(wconv: Callable[..., Any], tmp_path: Path, key: str) -> None:
    source = save_model(tmp_path / "m", PLAIN, text_config={key: {"quant_method": "fp8"}})
    told = wconv("dequantize", source, "-o", tmp_path / "out", exit_code=4).stderr
    assert "holds no quantized weights that wconv knows, and its config.json says that it is quantized (fp8)" in told
    save({"lone.weight": codes(8, 16)}, source / "model.safetensors")
    told = wconv("dequantize", source, "-o", tmp_path / "out", exit_code=4).stderr
    assert "there is no scale for lone.weight" in told


def test_8_bit_integers_with_a_scale_are_no_fp4() -> None:
    for dtype, label in (("F32", "numbers with scales"), ("F8_E8M0", "FP4 with scales"), ("U8", "FP4 with scales")):
        [found] = find_quantized({"m.weight": DTYPES["I8"], "m.scale": DTYPES[dtype]})
        assert found.scheme.label == label
    [found] = find_quantized({"m.up": DTYPES["I8"], "m.up_scale_inv": DTYPES["F32"]})
    assert found.scheme == FP4_OF_EXPERTS
    [found] = find_quantized({"m.up": DTYPES["F8_E4M3"], "m.up_scale_inv": DTYPES["U8"]})
    assert found.scheme == FP8_OF_EXPERTS
    [found] = find_quantized({"m.w13_weight": DTYPES["F8_E4M3"], "m.w13_weight_scale": DTYPES["U8"]})
    assert found.scheme == FP8_OF_FUSED


# Whole models, which the library loads in numbers.


def quantize_file(folder: Path, quantize: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]) -> None:
    """Put a model's weights in float8 into its file, and say so in its config."""
    state = load_file(folder / "model.safetensors")
    quantized = [quantize(name, one) for name, one in state.items()]
    save({name: one for part in quantized for name, one in part.items()}, folder / "model.safetensors")
    said = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    write_json(folder / "config.json", {**config_of(folder), "quantization_config": said})


def as_transformers_does(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Give what ``save_pretrained`` of a model that was quantized on a GPU writes for a weight."""
    from types import SimpleNamespace

    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    if "proj" not in name:
        return {name: weight}
    said = SimpleNamespace(weight_block_size=[128, 128], scale_fmt=None)
    made: dict[str, torch.Tensor] = Fp8Quantize(SimpleNamespace(quantization_config=said))._quantize_one(name, weight)
    return made


def make_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, head_dim=64))


def make_qwen_moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 32, "num_experts": 4,
             "num_experts_per_tok": 2}  # fmt: skip
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))


def make_deepseek_v3() -> Any:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32, "n_routed_experts": 2, "n_group": 1,
             "topk_group": 1, "num_experts_per_tok": 1, "first_k_dense_replace": 1, "q_lora_rank": 128,
             "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64}  # fmt: skip
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes))


def make_deepseek_v4() -> Any:
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    sizes = {"hidden_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
             "vocab_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 2, "q_lora_rank": 64, "o_lora_rank": 64,
             "o_groups": 2, "head_dim": 64, "index_n_heads": 2, "index_head_dim": 64, "sliding_window": 16,
             "num_hash_layers": 1, "max_position_embeddings": 256}  # fmt: skip
    return DeepseekV4ForCausalLM(DeepseekV4Config(**sizes))


def saved(model: Any, folder: Path) -> Path:
    model.to(torch.bfloat16).eval().save_pretrained(folder)
    return folder


def assert_same_models(one: Path, other: Path, class_: Any) -> None:
    """Hold what the library loads of a quantized folder against what it loads of a plain one: all of it, and logits."""
    judge, found = (class_.from_pretrained(folder).eval() for folder in (one, other))
    assert_same(found.state_dict(), judge.state_dict())
    inputs = torch.arange(24)[None]
    with torch.no_grad():
        assert torch.equal(found(inputs).logits, judge(inputs).logits)


@pytest.mark.usefixtures("builders")
@pytest.mark.parametrize(
    "make", [make_llama, pytest.param(make_qwen_moe, marks=pytest.mark.slow)], ids=["Llama", "Qwen3-MoE"]
)
def test_a_whole_model(wconv: Callable[..., Any], tmp_path: Path, make: Callable[[], Any]) -> None:
    model = make()
    quantize_file(saved(model, tmp_path / "m"), as_transformers_does)
    wconv("dequantize", tmp_path / "m", "-o", tmp_path / "out")
    assert_same_models(tmp_path / "m", tmp_path / "out", type(model))


@pytest.mark.slow
@pytest.mark.usefixtures("builders")
def test_deepseek_v3_with_rows_that_no_block_divides(wconv: Callable[..., Any], tmp_path: Path) -> None:
    """Transformers does not load its float8: 576 rows have five scales."""

    def quantize(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        if "proj" not in name:
            return {name: weight}
        sides = [-(-length // 128) for length in weight.shape]
        return {name: weight.to(F8), f"{name}_scale_inv": torch.rand(sides) + 0.5}

    model = make_deepseek_v3()
    quantize_file(saved(model, tmp_path / "m"), quantize)
    quantized = load_file(tmp_path / "m" / "model.safetensors")
    ragged = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert quantized[ragged].shape[0] == 576
    wconv("dequantize", tmp_path / "m", "-o", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, one in written.items():
        scale = quantized.get(f"{name}_scale_inv")
        expected = quantized[name] if scale is None else official(quantized[name], scale, torch.bfloat16)
        assert_same({name: one}, {name: expected})
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.state_dict()[ragged], written[ragged])
    assert loaded(torch.arange(24)[None]).logits.isfinite().all()


@pytest.mark.slow
@pytest.mark.usefixtures("builders")
def test_deepseek_v4_with_fp4_experts(wconv: Callable[..., Any], tmp_path: Path) -> None:
    def quantize(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        base = name.removesuffix(".weight")
        if ".experts." in name:
            packed = codes(weight.shape[0], weight.shape[1] // 2, dtype=torch.int8)
            exponents = torch.full((weight.shape[0], weight.shape[1] // 32), 120, dtype=torch.uint8)
            return {name: packed, f"{base}.scale": exponents.view(E8)}
        if ".attn.w" in name:
            sides = [-(-length // 128) for length in weight.shape]
            exponents = torch.full(sides, 126, dtype=torch.uint8)
            return {name: weight.to(F8), f"{base}.scale": exponents.view(E8)}
        return {name: weight}

    model = make_deepseek_v4()
    quantize_file(saved(model, tmp_path / "m"), quantize)
    told = wconv("dequantize", tmp_path / "m", "-o", tmp_path / "out").stdout
    assert "dequantized to bf16: 36 weights (FP4 with scales)" in told
    assert "dequantized to bf16: 15 weights (float8 with scales)" in told
    assert_same_models(tmp_path / "m", tmp_path / "out", type(model))

"""What compressed-tensors writes as plain numbers, held against its own ``decompress``; and whole models of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import raw_bytes

from converter.dtypes import BY_TORCH_NAME, DTYPES
from converter.errors import BadFile, Unsupported
from converter.models.checkpoint import open_checkpoint
from converter.models.inventory import find_weight_set
from converter.tensors.base import TensorSource
from converter.tensors.derived import cast
from converter.tensors.reader import RangeReader
from converter.transforms.quantize import DEQUANTIZERS
from converter.transforms.quantize.codes import steps_of
from converter.transforms.quantize.kernels import rounding_errors
from converter.transforms.quantize.restore import Found, find_restored

CORPUS = Path(__file__).parent / "corpus" / "quantized" / "compressed"
State = dict[str, torch.Tensor]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
FLOAT8: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
NVFP4: dict[str, Any] = {
    "num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16,
    "scale_dtype": "torch.float8_e4m3fn",
}  # fmt: skip
GROUP_32: dict[str, Any] = {"strategy": "group", "group_size": 32}
BLOCK_128: dict[str, Any] = {"strategy": "block", "block_structure": [128, 128]}
CHANNEL, TENSOR = {"strategy": "channel"}, {"strategy": "tensor"}


def ints(bits: int, symmetric: bool = True) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": symmetric}


def mx(bits: int) -> dict[str, Any]:
    return {"num_bits": bits, "type": "float", "symmetric": True, **GROUP_32, "scale_dtype": "torch.uint8"}


class Case(NamedTuple):
    """How a weight is quantized: the library's format, its arguments, the scales' dtype and the weight's shape."""

    format: str
    args: dict[str, Any]
    scale: torch.dtype = BF16
    shape: tuple[int, int] = (48, 128)


CASES = {
    "fp8 tensor": Case("naive-quantized", {**FLOAT8, **TENSOR}, F32),
    "fp8 channel": Case("float-quantized", {**FLOAT8, **CHANNEL}),
    "fp8 group": Case("float-quantized", {**FLOAT8, **GROUP_32}, F16),
    "fp8 block": Case("float-quantized", {**FLOAT8, **BLOCK_128}, F32, (200, 300)),
    "int8 tensor": Case("int-quantized", {**ints(8), **TENSOR}),
    "int8 channel": Case("int-quantized", {**ints(8), **CHANNEL}, F32),
    "int8 group": Case("int-quantized", {**ints(8), **GROUP_32}, F16),
    "int8 tensor asym": Case("int-quantized", {**ints(8, False), **TENSOR}, F16),
    "int8 channel asym": Case("int-quantized", {**ints(8, False), **CHANNEL}),
    "int8 group asym": Case("int-quantized", {**ints(8, False), **GROUP_32}, F32),
    "int4 group": Case("pack-quantized", {**ints(4), **GROUP_32}),
    "int4 group asym": Case("pack-quantized", {**ints(4, False), **GROUP_32}, F32, (44, 96)),
    "int4 channel": Case("pack-quantized", {**ints(4), **CHANNEL}, F16, (7, 100)),
    "int4 channel asym": Case("pack-quantized", {**ints(4, False), **CHANNEL}, BF16, (44, 100)),
    "int4 tensor asym": Case("pack-quantized", {**ints(4, False), **TENSOR}, F32),
    "int8 packed": Case("pack-quantized", {**ints(8), **GROUP_32}),
    "int2 asym": Case("pack-quantized", {**ints(2, False), **GROUP_32}, BF16, (20, 96)),
    "int1": Case("pack-quantized", {**ints(1), **CHANNEL}, F32, (5, 70)),
    "int3 asym": Case("pack-quantized", {**ints(3, False), **GROUP_32}, BF16, (44, 160)),
    "int5": Case("pack-quantized", {**ints(5), **CHANNEL}, F32, (5, 333)),
    "int6 asym": Case("pack-quantized", {**ints(6, False), **CHANNEL}, F32, (44, 100)),
    "int7 asym": Case("pack-quantized", {**ints(7, False), **GROUP_32}, F16, (33, 64)),
    "nvfp4": Case("nvfp4-pack-quantized", NVFP4),
    "mxfp4": Case("mxfp4-pack-quantized", mx(4)),
    "mxfp6": Case("mxfp6-pack-quantized", mx(6)),
    "mxfp8": Case("mxfp8-quantized", mx(8)),
}  # fmt: skip


def scheme_of(args: dict[str, Any]) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))


def compressor_of(form: str) -> Any:
    from compressed_tensors.compressors import BaseCompressor

    return BaseCompressor.get_value_from_registry(form)


def scales_for(weight: torch.Tensor, args: Any) -> State:
    """Give scales, zero points and a scale of scales as the library's observers would."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    full, state = weight.float(), {}
    if args.strategy == "tensor":
        parts = full.reshape(1, -1)
    elif args.strategy == "channel":
        parts = full[:, None]
    elif args.strategy == "block":
        height, width = args.block_structure
        padded = torch.nn.functional.pad(full, (0, -full.shape[1] % width, 0, -full.shape[0] % height))
        parts = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height)).transpose(1, 2).flatten(-2)
    else:
        parts = full.unflatten(-1, (-1, args.group_size))
    least, most = parts.amin(-1), parts.amax(-1)
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = generate_gparam(least.min().reshape(1), most.max().reshape(1))
    scale, zero = calculate_qparams(least, most, args, global_scale=state.get("weight_global_scale"))
    return state | {"weight_scale": scale, "weight_zero_point": zero}


def compressed(case: Case, weight: torch.Tensor) -> State:
    """Give what the library writes for a weight."""
    scheme = scheme_of(case.args)
    state = scales_for(weight, scheme.weights)
    if scheme.weights.scale_dtype is None:
        state["weight_scale"] = state["weight_scale"].to(case.scale)
    made: State = compressor_of(case.format).compress({"weight": weight, **state}, scheme)
    return {name: one.contiguous() for name, one in made.items()}


def config_of(*args: dict[str, Any]) -> dict[str, Any]:
    groups = {f"group_{index}": {"targets": ["Linear"], "weights": one} for index, one in enumerate(args)}
    return {"quant_method": "compressed-tensors", "config_groups": groups}


def found_in(folder: Path, state: State, config: dict[str, Any]) -> Found:
    """Find the numbers of a module ``m`` in a file."""
    save_file({f"m.{name}": one for name, one in state.items()}, folder / "model.safetensors")
    checkpoint = open_checkpoint(find_weight_set(folder / "model.safetensors"))
    return find_restored(checkpoint, DEQUANTIZERS, config)


def read(source: TensorSource, begin: int = 0, end: int | None = None) -> bytes:
    size = source.dtype.itemsize
    total = size * math.prod(source.shape)
    out = bytearray((total if end is None else size * end) - size * begin)
    with RangeReader() as reader:
        source.read(size * begin, memoryview(out), reader)
    return bytes(out)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_numbers_are_those_of_the_library(tmp_path: Path, case: Case) -> None:
    weight = torch.randn(case.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight[3] = 0
    state = compressed(case, weight)
    judged = compressor_of(case.format).decompress(dict(state), scheme_of(case.args))["weight"]
    for config in (config_of(case.args), {}):
        [restored] = found_in(tmp_path, state, config).weights.values()
        assert restored.name == "m.weight"
        assert (restored.dtype or DTYPES["F32"]).torch_name == str(judged.dtype).removeprefix("torch.")
        made = cast(restored_tensor(restored), BY_TORCH_NAME[str(judged.dtype).removeprefix("torch.")]).source
        assert read(made) == raw_bytes(judged)
    # Wherever one begins and ends.
    count, columns, size = weight.numel(), case.shape[1], made.dtype.itemsize
    for begin, end in ((1, 2), (columns - 3, 2 * columns + 5), (count - 1, count)):
        assert read(made.part(size * begin, size * end), begin, end) == raw_bytes(judged.reshape(-1)[begin:end])
    # What was rounded to the nearest is within half a step.
    raw, steps = (memoryview(read(one)) for one in (restored.source, steps_of(restored.source)))
    assert not rounding_errors(memoryview(raw_bytes(weight)), DTYPES["BF16"], raw, steps, restored.slack).beyond


def restored_tensor(restored: Any) -> Any:
    from converter.tensors.base import Tensor

    return Tensor(restored.name, restored.source)


def test_experts_that_are_one_tensor_are_packed_one_by_one(tmp_path: Path) -> None:
    args = {**ints(3, False), **GROUP_32}
    weight = torch.randn(3, 44, 160, generator=torch.Generator().manual_seed(0)).bfloat16()
    scheme = scheme_of(args)
    beside = scales_for(weight, scheme.weights)
    beside["weight_scale"] = beside["weight_scale"].bfloat16()
    state = compressor_of("pack-quantized").compress({"weight": weight, **beside}, scheme)
    judged = compressor_of("pack-quantized").decompress(dict(state), scheme)["weight"]
    [restored] = found_in(tmp_path, {name: one.contiguous() for name, one in state.items()}, {}).weights.values()
    assert read(cast(restored_tensor(restored), DTYPES["BF16"]).source) == raw_bytes(judged)


def test_blocks_are_those_of_the_config(tmp_path: Path) -> None:
    """Of several groups the one that fits the shapes, of the same type; without a config blocks are not guessed."""
    block = {**FLOAT8, "strategy": "block", "block_structure": [32, 32]}
    state = compressed(Case("float-quantized", block, F32), torch.ones(40, 100))
    other = {**FLOAT8, "strategy": "block", "block_structure": "64x64"}
    whole = {**ints(8), "strategy": "block", "block_structure": [16, 32]}
    assert len(found_in(tmp_path, state, config_of(other, block, whole)).weights) == 1
    for config, error, said in (
        ({}, BadFile, "is not that many blocks of 128 x 128"),
        (config_of(other), BadFile, "is not that many blocks of 64 x 64"),
        (config_of(block, {**block, "block_structure": [32, 33]}), Unsupported, "several sizes of blocks"),
    ):
        with pytest.raises(error, match=said):
            found_in(tmp_path, state, config)


def test_exponents_of_all_bytes(tmp_path: Path) -> None:
    """The library's power in bf16 gives what the byte means, from 2**-127 on; 255 is none."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(255, 1)
    scales = torch.arange(255, dtype=torch.uint8)[:, None]
    state = {"weight_packed": codes, "weight_scale": scales}
    judged = compressor_of("mxfp4-pack-quantized").decompress(dict(state), scheme_of(mx(4)))["weight"]
    [restored] = found_in(tmp_path, state, {}).weights.values()
    assert read(cast(restored_tensor(restored), DTYPES["BF16"]).source) == raw_bytes(judged)
    [restored] = found_in(tmp_path, {**state, "weight_scale": scales + 1}, {}).weights.values()
    with pytest.raises(BadFile, match=r"no finite number, in 'm\.weight_scale'"):
        read(restored.source)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_the_largest_codes_and_zero_points(tmp_path: Path, dtype: torch.dtype) -> None:
    """-128 less 127 has nine bits, which bf16 holds; scales are negative and 0 too."""
    weight = torch.arange(-128, 128, dtype=torch.int8).repeat(4, 1)
    scale = torch.tensor([[1.1], [-0.3], [0.0], [3e-5]]).to(dtype)
    zero = torch.tensor([[127], [-128], [5], [0]], dtype=torch.int8)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    judged = compressor_of("int-quantized").decompress(dict(state), scheme_of({**ints(8, False), **CHANNEL}))["weight"]
    [restored] = found_in(tmp_path, state, {}).weights.values()
    assert read(cast(restored_tensor(restored), BY_TORCH_NAME[str(dtype)[6:]]).source) == raw_bytes(judged)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_float8_less_a_zero_point_is_rounded_as_the_library_does(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.arange(256, dtype=torch.uint8)[None].view(torch.float8_e4m3fn)
    state = {"weight": weight, "weight_scale": torch.tensor([[0.37]]).to(dtype)}
    state["weight_zero_point"] = torch.tensor([[0.013671875]]).to(torch.float8_e4m3fn)
    judged = compressor_of("float-quantized").decompress(dict(state), scheme_of({**FLOAT8, **CHANNEL}))["weight"]
    [restored] = found_in(tmp_path, state, {}).weights.values()
    made = read(cast(restored_tensor(restored), BY_TORCH_NAME[str(dtype)[6:]]).source)
    found = torch.frombuffer(bytearray(made), dtype=dtype).reshape(judged.shape)
    torch.testing.assert_close(found, judged, rtol=0, atol=0, equal_nan=True)


def packed(case: Case = CASES["int4 group"]) -> State:
    return compressed(case, torch.randn(case.shape, generator=torch.Generator().manual_seed(0)).bfloat16())


INT4, INT4_ASYM, FP4 = CASES["int4 group"], CASES["int4 group asym"], CASES["nvfp4"]
ODD: dict[str, tuple[Case, dict[str, torch.Tensor | None], type[Exception], str]] = {
    "no scale of scales": (FP4, {"weight_global_scale": None}, BadFile, r"has no 'm\.weight_global_scale'"),
    "two scales of scales": (FP4, {"weight_global_scale": torch.ones(2)}, BadFile, "not one F32"),
    "zero point of floats": (FP4, {"weight_zero_point": torch.zeros(48, 8).to(torch.int8)}, BadFile, "have none"),
    "groups of floats": (FP4, {"weight_scale": torch.ones(48, 7).to(torch.float8_e4m3fn)}, BadFile, "groups of 16"),
    "no shape": (INT4, {"weight_shape": None}, BadFile, r"has no 'm\.weight_shape'"),
    "shape of others": (INT4, {"weight_shape": torch.tensor([47, 128])}, BadFile, "there are"),
    "negative shape": (INT4, {"weight_shape": torch.tensor([48, -128])}, BadFile, "there are"),
    "floating shape": (INT4, {"weight_shape": torch.tensor([48.0, 128.0])}, BadFile, "it is F32"),
    "long shape": (INT4, {"weight_shape": torch.ones(3, dtype=torch.int64)}, BadFile, r"it is I64 \[3\]"),
    "wide shape": (INT4, {"weight_shape": torch.tensor([48, 2**62])}, BadFile, "there are"),
    "other widths": (INT4, {"weight_shape": torch.tensor([48, 200])}, BadFile, "do not fill 16 words"),
    "few scales": (INT4, {"weight_scale": torch.ones(48, 3).bfloat16()}, BadFile, "is not that many blocks of 1 x 32"),
    "scales of others": (INT4, {"weight_scale": torch.ones(47, 4).bfloat16()}, BadFile, "blocks"),
    "whole scales": (INT4, {"weight_scale": torch.ones(48, 4).to(torch.int32)}, BadFile, "it is I32"),
    "doubles": (INT4, {"weight_scale": torch.ones(48, 4).double()}, BadFile, "it is F64"),
    "zero points": (INT4_ASYM, {"weight_zero_point": torch.zeros(5, 3, dtype=torch.int32)}, BadFile, "need"),
    "long zero points": (INT4_ASYM, {"weight_zero_point": torch.zeros(44, 3).long()}, BadFile, "it is I64"),
    "order of columns": (INT4, {"weight_g_idx": torch.arange(128).int() // 33}, BadFile, "32 columns in each group"),
    "order of none": (INT4, {"weight_g_idx": torch.arange(128).int() // 32 - 1}, BadFile, "32 columns in each group"),
    "odd order": (INT4, {"weight_g_idx": torch.zeros(127).int()}, BadFile, r"it is I32 \[127\]"),
    "unknown": (INT4, {"weight_outliers": torch.zeros(3)}, Unsupported, "does not know what for"),
    "scaled inputs": (CASES["int8 group"], {"pre_quant_scale": torch.ones(128)}, Unsupported, "multiplies the inputs"),
    "no numbers": (CASES["fp8 tensor"], {"weight": torch.ones(0, 4).to(torch.float8_e4m3fn)}, BadFile, r"\[0, 4\]"),
    "exponents of ints": (CASES["int8 channel"], {"weight_scale": torch.ones(48, 4).byte()}, BadFile, "it is U8"),
}  # fmt: skip


@pytest.mark.parametrize(("case", "changed", "error", "said"), ODD.values(), ids=ODD)
def test_what_does_not_fit_is_refused_by_name(
    tmp_path: Path, case: Case, changed: dict[str, torch.Tensor | None], error: type[Exception], said: str
) -> None:
    state = {name: one for name, one in {**packed(case), **changed}.items() if one is not None}
    with pytest.raises(error, match=said):
        found_in(tmp_path, state, config_of(case.args))


def test_an_order_that_is_none_is_no_matter(tmp_path: Path) -> None:
    for order in (torch.arange(128).int() // 32, torch.full((128,), -1).int()):
        assert found_in(tmp_path, {**packed(), "weight_g_idx": order}, {}).weights


def test_columns_may_be_in_groups_in_any_order() -> None:
    """Held against compressed-tensors 0.12.2, by ``scripts/samples_actorder.py``."""
    checkpoint = open_checkpoint(find_weight_set(CORPUS / "actorder.safetensors"))
    judged = load_file(CORPUS / "actorder.judge.safetensors")["m.weight"]
    [restored] = find_restored(checkpoint, DEQUANTIZERS, {}).weights.values()
    made = cast(restored_tensor(restored), DTYPES["BF16"]).source
    assert read(made) == raw_bytes(judged)
    assert read(made.part(2 * 100, 2 * 333), 100, 333) == raw_bytes(judged.reshape(-1)[100:333])
    assert set(read(steps_of(restored.source))) != {0}


@pytest.mark.parametrize("config", [
    {"config_groups": 3}, {"config_groups": {"a": 3, "W4A16": ["Linear"]}}, {"transform_config": {}},
    {"config_groups": {"a": {"weights": 5}, "b": {"weights": {"type": {}, "num_bits": []}}}},
    config_of({**ints(4), "strategy": "block", "block_structure": ["0", -1, {}]}, {**ints(4), "group_size": -1}),
    config_of({**ints(4), "group_size": True}, {**ints(4), "group_size": 10**30}, {"type": [], "num_bits": 4}),
])  # fmt: skip
def test_odd_configs_say_nothing(tmp_path: Path, config: dict[str, Any]) -> None:
    assert found_in(tmp_path, packed(), config).weights


@pytest.mark.parametrize(("config", "said"), [
    ({"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}, "rotated"),
    ({"config_groups": {str(index): {} for index in range(65)}}, "more than 64"),
    (config_of({**ints(4), "num_bits": "4"}), "as its config.json says 0"),
    (config_of(ints(3)), "as its config.json says 3"),
])  # fmt: skip
def test_configs_that_are_not_understood_are_refused(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    with pytest.raises((BadFile, Unsupported), match=said):
        found_in(tmp_path, packed(), config)


def test_widths_that_may_be_several_are_refused(tmp_path: Path) -> None:
    state = compressed(Case("pack-quantized", {**ints(4), **CHANNEL}), torch.randn(8, 8).bfloat16())
    with pytest.raises(Unsupported, match="several widths"):
        found_in(tmp_path, state, {})
    assert found_in(tmp_path, state, config_of({**ints(4), **CHANNEL})).weights
    # As many words as the library had for them when it put ten into each.
    three = {**ints(3), **CHANNEL}
    state = compressed(Case("pack-quantized", three), torch.randn(8, 100).bfloat16())
    with pytest.raises(Unsupported, match="in two ways"):
        found_in(tmp_path, state, config_of(three))


def test_scales_that_are_no_numbers_are_found_as_they_are_read(tmp_path: Path) -> None:
    for case, name in ((INT4, "weight_scale"), (CASES["fp8 channel"], "weight_scale"), (FP4, "weight_global_scale")):
        for value in (math.nan, math.inf):
            state = packed(case)
            state[name][0] = value
            [restored] = found_in(tmp_path, state, {}).weights.values()
            with pytest.raises(BadFile, match=rf"no finite number, in 'm\.{name}'"):
                read(restored.source)
    state = packed(FP4)
    state["weight_global_scale"] *= 0
    [restored] = found_in(tmp_path, state, {}).weights.values()
    with pytest.raises(BadFile, match="no finite number"):
        read(restored.source)


SPARSE = {
    "marlin-24": {"weight_packed": torch.ones(4, 4).int(), "scale_packed": torch.ones(1, 4).half(),
                  "meta": torch.ones(4, 2).short()},
    "sparse-24-bitmask": {"weight.compressed": torch.ones(4, 2).bfloat16(), "weight.bitmask": torch.ones(4, 1).byte(),
                          "weight.shape": torch.tensor([4, 4])},
}  # fmt: skip


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_forms_are_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(Unsupported, match=name):
        found_in(tmp_path, SPARSE[name], {})


# Whole models.


def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).bfloat16().eval()


def tiny_moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=64,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).bfloat16().eval()


def save_quantized(model: Any, folder: Path, case: Case, inputs: dict[str, Any] | None = None) -> None:
    """Quantize a model in place, and save it, as llm-compressor has the library do."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, apply_quantization_config

    scheme = scheme_of(case.args)
    scheme.input_activations = QuantizationArgs(**inputs) if inputs else None
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None):
            for name, made in scales_for(module.weight, scheme.weights).items():
                if hasattr(module, name):
                    here = getattr(module, name)
                    here.data = made.to(made.dtype if scheme.weights.scale_dtype else here.dtype)
            if hasattr(module, "input_scale"):
                module.input_scale.data.fill_(0.5)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format=case.format)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))


def save_mixed(model: Any, folder: Path, experts: Case, rest: Case) -> None:
    """Save a model with its experts quantized one by one, as Kimi's and others' are: transformers joins them."""
    model.save_pretrained(folder)
    state: State = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        base = name.rpartition(".")[0]
        if not base.endswith("_proj"):
            state[name] = weight
            continue
        made = compressed(experts if "experts" in base else rest, weight)
        state |= {f"{base}.{end}": one for end, one in made.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    groups = {
        key: {
            "targets": [target],
            "weights": scheme_of(case.args).weights.model_dump(mode="json"),
            "format": case.format,
        }
        for key, target, case in (("group_0", "re:.*experts.*", experts), ("group_1", "Linear", rest))
    }
    said["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups,
        "ignore": ["lm_head"], "quantization_status": "compressed",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(said))


def check_model(wconv: Callable[..., Any], folder: Path, out: Path) -> str:
    """Hold the model that was dequantized against what transformers dequantizes as it loads; give what was said."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    told: str = wconv("dequantize", folder, "-o", out, "--dtype", "bf16").stdout
    dequantizing = CompressedTensorsConfig(dequantize=True)
    judged = AutoModelForCausalLM.from_pretrained(folder, quantization_config=dequantizing, dtype=BF16).eval()
    loaded, info = AutoModelForCausalLM.from_pretrained(out, dtype=BF16, output_loading_info=True)
    assert not any(info.values())
    expected = judged.state_dict()
    for name, one in loaded.eval().state_dict().items():
        assert torch.equal(one, expected[name]), name
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, judged(tokens).logits)
    assert "quantization_config" not in (out / "config.json").read_text()
    return told


MODELS: dict[str, tuple[Case, dict[str, Any] | None]] = {
    "fp8 tensor": (CASES["fp8 tensor"]._replace(format="float-quantized"), {**FLOAT8, **TENSOR}),
    "fp8 channel": (CASES["fp8 channel"], {**FLOAT8, "strategy": "token", "dynamic": True}),
    "int8 channel": (CASES["int8 channel"], {**ints(8), "strategy": "token", "dynamic": True}),
    "int4 group": (CASES["int4 group"], None),
    "int4 group asym": (CASES["int4 group asym"], None),
    "nvfp4": (CASES["nvfp4"], {**NVFP4, "dynamic": "local"}),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_the_library(wconv: Callable[..., Any], tmp_path: Path, name: str) -> None:
    case, inputs = MODELS[name]
    save_quantized(tiny_llama(), tmp_path / "m", case, inputs)
    plain = tmp_path / "plain"
    tiny_llama().save_pretrained(plain)
    told = check_model(wconv, tmp_path / "m", tmp_path / "out")
    assert ("input_scale" in told) == (name == "fp8 tensor")
    wconv("verify", plain, tmp_path / "m", "--quantized")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_model_of_experts_in_two_forms(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_mixed(tiny_moe(), tmp_path / "m", CASES["int4 group"], CASES["fp8 channel"])
    check_model(wconv, tmp_path / "m", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_experts_in_nvfp4(wconv: Callable[..., Any], tmp_path: Path) -> None:
    """Held against the compressor: what transformers 5.24 makes of such experts has lost their global scales."""
    save_mixed(tiny_moe(), tmp_path / "m", FP4, FP4)
    wconv("dequantize", tmp_path / "m", "-o", tmp_path / "out", "--dtype", "bf16")
    state, written = load_file(tmp_path / "m" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    bases = [name.removesuffix("weight_packed") for name in state if name.endswith("weight_packed")]
    for base in bases:
        beside = {name.removeprefix(base): one for name, one in state.items() if name.startswith(base)}
        judged = compressor_of(FP4.format).decompress(beside, scheme_of(FP4.args))["weight"]
        assert raw_bytes(written[f"{base}weight"]) == raw_bytes(judged)
    assert len(bases) == 32

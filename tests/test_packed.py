"""GPTQ, AWQ and MXFP4: held bit for bit against what the libraries made of them, whole and in parts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.tiny import raw_bytes, save, write_json

from converter.dtypes import BY_TORCH_NAME, DTYPES
from converter.errors import BadFile, Unsupported, WconvError
from converter.models.checkpoint import open_checkpoint
from converter.storage import place_of
from converter.tensors.base import Tensor, TensorSource
from converter.tensors.derived import Constant, cast, held
from converter.tensors.reader import RangeReader
from converter.transforms.quantize import DEQUANTIZERS
from converter.transforms.quantize.codes import E2M1, Coding, Decoded, steps_of
from converter.transforms.quantize.restore import Restored, find_restored

State = dict[str, torch.Tensor]
CORPUS = Path(__file__).parent / "corpus" / "quantized"
SAMPLES = sorted(
    path for name in ("gptq", "awq") for path in (CORPUS / name).glob("*.safetensors") if ".judge" not in path.name
)


def restored(path: Path, config: Mapping[str, Any], transposed: tuple[str, ...] = ()) -> Restored:
    [found] = find_restored(
        open_checkpoint(place_of(path)), DEQUANTIZERS, config, lambda _: transposed
    ).weights.values()
    return found


def read(source: TensorSource, begin: int = 0, end: int | None = None, chunk: int = 1 << 20) -> bytes:
    """Read some bytes as a task does: its part of the source, a chunk at a time."""
    end = source.dtype.nbytes(math.prod(source.shape)) if end is None else end
    part, out = source.part(begin, end), bytearray(end - begin)
    with RangeReader() as reader:
        for at in range(0, len(out), chunk):
            part.read(begin + at, memoryview(out)[at : at + chunk], reader)
    return bytes(out)


def check(found: Restored, expected: torch.Tensor) -> None:
    """Hold a weight against what it should be: at once, in odd chunks, and in parts that begin anywhere."""
    raw = raw_bytes(expected)
    assert found.dtype is not None
    source = cast_to(found)
    assert (source.dtype, source.shape) == (found.dtype, tuple(expected.shape))
    assert read(source) == raw
    size = source.dtype.itemsize
    assert read(source, chunk=size * 1777) == raw
    for begin, end in ((0, size), (size * 101, len(raw)), (size * 33, size * 34), (size * 90, len(raw) - 3 * size)):
        assert read(source, begin, end, size * 2500) == raw[begin:end]


def cast_to(found: Restored) -> TensorSource:
    assert found.dtype is not None
    return cast(Tensor(found.name, found.source), found.dtype).source


def said_of(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return dict(json.loads(file.metadata()["quantization_config"])) if file.metadata() else {}


def judged(path: Path) -> torch.Tensor:
    return load_file(path.with_suffix(".judge.safetensors"))["m.weight"]


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: f"{path.parent.name} {path.stem}")
def test_numbers_are_those_of_the_library(path: Path) -> None:
    found = restored(path, said_of(path))
    assert (found.name, found.slack) == ("m.weight", None)
    assert steps_of(found.source).shape == found.source.shape
    check(found, judged(path))


@pytest.mark.parametrize("name", ["auto_gptq-2", "auto_gptq-3", "auto_gptq-4", "auto_gptq-8"])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_symmetric_weights_need_no_config(tmp_path: Path, name: str, version: str) -> None:
    path = CORPUS / "gptq" / f"{name}.safetensors"
    state = load_file(path)
    bits = int(name[-1])
    if version == "gptq_v2":
        middle = sum(1 << (bits * (at + 1) - 1) for at in range(64))
        raw = bytearray(middle.to_bytes(8 * bits, "little"))
        state["m.qzeros"] = torch.frombuffer(raw, dtype=torch.int32).repeat(3, 1)
    check(restored(save(state, tmp_path / "m.safetensors"), {}), judged(path))


def test_inputs_in_order_need_no_index(tmp_path: Path) -> None:
    path = CORPUS / "gptq" / "v2-4.safetensors"
    state = load_file(path)
    del state["m.g_idx"]
    check(restored(save(state, tmp_path / "m.safetensors"), said_of(path)), judged(path))
    problem = "its config says that the inputs are in any order"
    refuse(tmp_path, state, {**said_of(path), "desc_act": True}, problem, BadFile)


@pytest.mark.parametrize("name", ["gptq/v2-4", "gptq/v1-3", "gptq/act-order-8", "awq/gemm"])
def test_a_conv1d_has_its_inputs_first(name: str) -> None:
    path = CORPUS / f"{name}.safetensors"
    found = restored(path, said_of(path), transposed=("m",))
    assert read(cast_to(found)) == raw_bytes(judged(path).T.contiguous())


def with_zeros(bits: int, stored: int) -> torch.Tensor:
    """Give the zero points of 64 outputs in three groups, all the same."""
    row = sum(stored << (bits * at) for at in range(64)).to_bytes(8 * bits, "little")
    return torch.frombuffer(bytearray(row), dtype=torch.int32).repeat(3, 1)


def refuse(folder: Path, state: State, config: dict[str, Any], problem: str, kind: type[WconvError] = BadFile) -> None:
    """Have a module refused in one line, when it is looked at or when it is read."""
    with pytest.raises(kind, match=problem) as told:
        read(restored(save(state, folder / "m.safetensors"), config).source)
    assert "\n" not in str(told.value)


V2 = {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}
GEMM = {"quant_method": "awq", "bits": 4, "version": "gemm"}
ODD: dict[str, tuple[str, dict[str, Any], dict[str, Any], str, type[WconvError]]] = {
    "NaN": ("gptq/v2-4", {"scales": torch.full((3, 64), math.nan).half()}, V2, "number, in 'm.scales'", BadFile),
    "Inf": ("awq/gemm", {"scales": torch.full((3, 64), math.inf).half()}, GEMM, "no finite number", BadFile),
    "scales of others": ("gptq/v2-4", {"scales": torch.ones(3, 63).half()}, V2, "'m.scales' that does", BadFile),
    "scales in one row": ("gptq/v2-4", {"scales": torch.ones(64).half()}, V2, "no matrix of floats", BadFile),
    "whole scales": ("gptq/v2-4", {"scales": torch.ones(3, 64).int()}, V2, "no matrix of floats", BadFile),
    "no groups": ("gptq/v2-4", {"scales": torch.ones(0, 64).half(), "qzeros": torch.ones(0, 8).int()}, V2, "not fit",
                  BadFile),
    "zeros of others": ("gptq/v2-4", {"qzeros": torch.ones(3, 7).int()}, V2, "are of no number of bits", BadFile),
    "zeros of fewer": ("awq/gemm", {"qzeros": torch.ones(2, 8).int()}, GEMM, "'m.qzeros' that does not fit", BadFile),
    "no zeros": ("gptq/v2-4", {"qzeros": None}, V2, "has no 'm.qzeros'", BadFile),
    "words of 8 bits": ("gptq/v2-4", {"qweight": torch.ones(12, 64).char()}, V2, "no matrix of I32", BadFile),
    "words of others": ("gptq/v2-4", {"qweight": torch.ones(13, 64).int()}, V2, "are of no number of bits", BadFile),
    "an index beyond": ("gptq/v2-4", {"g_idx": torch.full((96,), 3).int()}, V2, "not from 0 to 2", BadFile),
    "an index below": ("gptq/v2-4", {"g_idx": torch.full((96,), -1).int()}, V2, "not from 0 to 2", BadFile),
    "an index of floats": ("gptq/v2-4", {"g_idx": torch.ones(96)}, V2, "no list of whole numbers", BadFile),
    "a short index": ("gptq/v2-4", {"g_idx": torch.ones(80).int()}, V2, "are of no number of bits", BadFile),
    "marlin": ("gptq/v2-4", {}, {**V2, "checkpoint_format": "marlin"}, "the format 'marlin'", Unsupported),
    "a list": ("gptq/v2-4", {}, {**V2, "checkpoint_format": ["gptq"]}, "the format", Unsupported),
    "rotated": ("gptq/v2-4", {}, {**V2, "rotation": "hadamard"}, "rotation 'hadamard'", Unsupported),
    "auto-round": ("gptq/v2-4", {}, {"quant_method": "auto-round"}, "says 'auto-round'", Unsupported),
    "a zero of 0": ("gptq/v1-4", {"qzeros": with_zeros(4, 15)}, {"bits": 4}, "zero points of 0", Unsupported),
    "unknown zeros": ("gptq/v2-4", {}, {}, "two versions read in two ways", Unsupported),
    "all one zero": ("gptq/v2-4", {"qzeros": with_zeros(4, 9)}, {}, "two versions read in two ways", Unsupported),
    "gemv": ("awq/gemm", {}, {**GEMM, "version": "gemv"}, "the version 'gemv'", Unsupported),
    "8 bits": ("awq/gemm", {}, {**GEMM, "bits": 8}, "8 bits", Unsupported),
    "gemv, unsaid": ("awq/gemm", {"qweight": torch.ones(64, 12).int(), "scales": torch.ones(64, 8).half(),
                                  "qzeros": torch.ones(64, 1).int()}, {}, "neither as AWQ's gemm", BadFile),
    "odd groups": ("awq/gemm", {"scales": torch.ones(5, 64).half(), "qzeros": torch.ones(5, 8).int()}, GEMM, "5 groups",
                   BadFile),
}  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "config", "problem", "kind"), ODD.values(), ids=ODD)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], config: dict[str, Any], problem: str, kind: type[WconvError]
) -> None:
    state = load_file(CORPUS / f"{name}.safetensors")
    state |= {f"m.{end}": one for end, one in changes.items()}
    refuse(tmp_path, {key: one for key, one in state.items() if one is not None}, config, problem, kind)


def test_scales_of_zero_and_below_are_numbers(tmp_path: Path) -> None:
    state = load_file(CORPUS / "gptq" / "v2-4.safetensors")
    weight = restored(save(state, tmp_path / "m.safetensors"), V2)
    before = torch.frombuffer(bytearray(read(weight.source)), dtype=torch.float32)
    state["m.scales"] = -state["m.scales"]
    after = torch.frombuffer(
        bytearray(read(restored(save(state, tmp_path / "m.safetensors"), V2).source)), dtype=torch.float32
    )
    assert torch.equal(before, -after)
    state["m.scales"][:] = 0
    assert not any(
        torch.frombuffer(
            bytearray(read(restored(save(state, tmp_path / "m.safetensors"), V2).source)), dtype=torch.float32
        )
    )


def test_embeddings_are_refused(tmp_path: Path) -> None:
    state = load_file(CORPUS / "gptq" / "v2-4.safetensors")
    for name in ("model.embed_tokens", "wte"):
        refuse(
            tmp_path,
            {key.replace("m.", f"{name}.", 1): one for key, one in state.items()},
            V2,
            "embeddings",
            Unsupported,
        )


# Whole folders.


def make_llama(folder: Path) -> State:
    """Write a tiny Llama of which two linears are a sample's; give its weights as they should be."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32)).half().save_pretrained(folder)
    expected = load_file(folder / "model.safetensors")
    state = dict(expected)
    sample = CORPUS / "gptq" / "act-order-4.safetensors"
    for leaf in ("gate_proj", "up_proj"):
        module = f"model.layers.0.mlp.{leaf}"
        del state[f"{module}.weight"]
        state |= {key.replace("m.", f"{module}.", 1): one for key, one in load_file(sample).items()}
        expected[f"{module}.weight"] = judged(sample)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "quantization_config": V2})
    return expected


@pytest.mark.slow
def test_a_llama_loads_with_the_numbers_of_the_library(wconv: Callable[..., Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    expected = make_llama(tmp_path / "in")
    told = wconv("dequantize", tmp_path / "in", "-o", tmp_path / "out").stdout
    assert "dequantized to fp16: 2 weights (GPTQ)" in told
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float16
    assert not hasattr(model.config, "quantization_config")
    state = model.state_dict()
    assert all(torch.equal(state[key], one) for key, one in expected.items())


@pytest.mark.parametrize("name", ["config.json", "quantize_config.json"])
def test_a_conv1d_is_known_by_the_class(wconv: Callable[..., Any], tmp_path: Path, name: str) -> None:
    """Its matrix lies as [in, out], and codes are called otherwise than the weight is."""
    state = load_file(CORPUS / "gptq" / "v2-4.safetensors")
    save({key.replace("m.", "h.0.mlp.c_fc.", 1): one for key, one in state.items()}, tmp_path / "in/model.safetensors")
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    is_said = name == "config.json"
    write_json(tmp_path / "in/config.json", {**config, "quantization_config": V2} if is_said else config)
    write_json(tmp_path / "in" / name, V2) if not is_said else None
    wconv("dequantize", tmp_path / "in", "-o", tmp_path / "out")
    [weight] = load_file(tmp_path / "out/model.safetensors").values()
    assert torch.equal(weight, judged(CORPUS / "gptq" / "v2-4.safetensors").T)


# MXFP4.


def mxfp4(experts: int, rows: int, groups: int, low: int = 0, high: int = 255) -> State:
    generator = torch.Generator().manual_seed(0)
    return {
        "m.x_blocks": torch.randint(0, 256, (experts, rows, groups, 16), dtype=torch.uint8, generator=generator),
        "m.x_scales": torch.randint(low, high, (experts, rows, groups), dtype=torch.uint8, generator=generator),
    }


@pytest.mark.parametrize("shape", [(3, 8, 4), (1, 5, 1), (2, 40, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_experts_are_those_of_transformers(tmp_path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    state = mxfp4(*shape, *((100, 140) if dtype == torch.float16 else (0, 255)))
    found = restored(save(state, tmp_path / "m.safetensors"), {})
    assert found.name == "m.x"
    expected = convert_moe_packed_tensors(state["m.x_blocks"], state["m.x_scales"], dtype=dtype)
    check(found._replace(dtype=BY_TORCH_NAME[str(dtype).removeprefix("torch.")]), expected)
    rows = {key.replace("_", "."): one for key, one in state.items()}
    turned = restored(save(rows, tmp_path / "m.safetensors"), {})._replace(dtype=found.dtype)
    check(turned, convert_moe_packed_tensors(*state.values(), dtype=torch.bfloat16).transpose(1, 2).contiguous())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"m.x_scales": torch.full((3, 8, 4), 255, dtype=torch.uint8)}, "no finite number, in 'm.x_scales'"),
        ({"m.x_scales": torch.ones(3, 8, 3, dtype=torch.uint8)}, "'m.x_scales' that does not fit"),
        ({"m.x_scales": torch.ones(3, 8, 4)}, "'m.x_scales' that does not fit"),
        ({"m.x_blocks": torch.ones(3, 8, 4, 8, dtype=torch.uint8)}, r"not \[experts, rows, groups, 16\]"),
        ({"m.x_blocks": torch.ones(3, 8, 64, dtype=torch.uint8)}, r"not \[experts, rows, groups, 16\]"),
    ],
)
def test_blocks_and_scales_that_do_not_fit_are_refused(tmp_path: Path, changes: State, problem: str) -> None:
    refuse(tmp_path, {**mxfp4(3, 8, 4), **changes}, {}, problem)


@pytest.mark.slow
def test_a_tiny_gpt_oss_gives_the_same(wconv: Callable[..., Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, Mxfp4Config

    torch.manual_seed(0)
    config = GptOssConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, num_local_experts=3, num_experts_per_tok=2, vocab_size=32, layer_types=["full_attention"],
    )  # fmt: skip
    GptOssForCausalLM(config).bfloat16().save_pretrained(tmp_path / "in")
    path = tmp_path / "in/model.safetensors"
    state = load_file(path)
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, rows = state.pop(name).shape
        made = mxfp4(experts, rows, inputs // 32, 110, 126)
        state |= {key.replace("m.x", name): one for key, one in made.items()}
    save_file(state, path, {"format": "pt"})
    said = json.loads((tmp_path / "in/config.json").read_text())
    write_json(tmp_path / "in/config.json", {**said, "quantization_config": {"quant_method": "mxfp4"}})
    wconv("dequantize", tmp_path / "in", "-o", tmp_path / "out")
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "in", quantization_config=Mxfp4Config(dequantize=True))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(quantized(tokens).logits, plain(tokens).logits)


# How what is transposed is read.


def test_what_is_transposed_is_read_in_windows(tmp_path: Path) -> None:
    """Any part of it, whatever a window holds, and each byte of the file few times."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randint(0, 256, (700, 900), dtype=torch.uint8, generator=generator)
    [tensor] = open_checkpoint(place_of(save({"m": matrix}, tmp_path / "m.safetensors"))).tensors
    expected = raw_bytes(matrix.T.contiguous())
    for room in (64, 1000, 100_000, 1 << 20):
        source = held(tensor.source.permuted((1, 0)), room)
        for begin, end in ((0, 700), (699, 2101), (600_000, 630_000), (629_999, 630_000)):
            assert read(source, begin, end, 333) == expected[begin:end]
    source = held(tensor.source.permuted((1, 0)), 100_000)
    assert read(source.permuted((1, 0))) == raw_bytes(matrix)
    assert read(source.box((5, 6), (7, 8))) == raw_bytes(matrix[6:14, 5:12].T.contiguous())

    class Counting(RangeReader):
        reads = nbytes = 0

        def read_into(self, record: Any, begin: int, out: memoryview) -> None:
            self.reads, self.nbytes = self.reads + 1, self.nbytes + len(out)
            super().read_into(record, begin, out)

    counting = Counting()
    with counting as reader:
        # Three columns: not byte by byte, and all at most twice.
        source.read(0, memoryview(bytearray(2100)), reader)
    assert counting.reads < 30
    assert counting.nbytes <= 2 * matrix.nbytes


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((20, 300), (1, 20_000)), ((300, 20), (0, 1)), ((4, 5, 7), (1, 1, 50_000)), ((3, 40), (1, 30_000))],
)
def test_views_that_lie_far_apart_or_overlap(tmp_path: Path, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    span = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    storage = (torch.arange(span) % 251).to(torch.uint8)
    expected = storage.as_strided(shape, strides)
    torch.save({"m": expected}, tmp_path / "m.pt")
    [tensor] = open_checkpoint(place_of(tmp_path / "m.pt")).tensors
    assert tensor.source.window > 1
    assert read(tensor.source) == raw_bytes(expected.contiguous())


def test_codes_are_decoded_with_any_number_side_by_side() -> None:
    """The lower half of a byte is the row before; what comes together is cut where the room ends."""
    generator = torch.Generator().manual_seed(0)
    for width in (1, 3, 33_000):
        raw = torch.randint(0, 256, (3, width), dtype=torch.uint8, generator=generator)
        codes = torch.stack([raw & 15, raw >> 4], 1).reshape(6, width)
        words = Constant(DTYPES["U8"], (3, width), raw_bytes(raw))
        whole = Coding(4, tuple(float(code - 8) for code in range(16)), (0.5,) * 16)
        for coding in (E2M1, whole):
            expected = torch.tensor(coding.values)[codes.long()]
            source = Decoded(words, coding, (6, width), 0)
            assert read(source) == raw_bytes(expected)
            assert read(source, 4 * width, 20 * width, 4 * 999) == raw_bytes(expected)[4 * width : 20 * width]

"""Float8 as it is written: the very files that transformers, compressed-tensors and ComfyUI make of the same models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import assert_same, raw_bytes, save, write_json

from converter.dtypes import DTYPES
from converter.tensors.base import Tensor
from converter.tensors.derived import Constant
from converter.transforms.quantize.write import Cell, RowBlock, cut_rows, find_maxima

CORPUS = Path(__file__).parent / "corpus" / "quantized" / "comfy"
State = dict[str, torch.Tensor]


def make_llama(hidden: int = 128, **wishes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sides = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_attention_heads": 4, **wishes}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_key_value_heads=4, vocab_size=64, **sides))
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight[3], weight[4], weight[5, 6] = 0, 1e-7, -0.0
        weight[:, :128] *= torch.linspace(0, 3, 128 if hidden > 128 else hidden)
    return model


def make_moe(width: int) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(hidden_size=128, intermediate_size=128, moe_intermediate_size=width, num_experts=2,
                            num_experts_per_tok=1, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                            head_dim=64, vocab_size=64, decoder_sparse_step=1, mlp_only_layers=[])  # fmt: skip
    return Qwen3MoeForCausalLM(config).bfloat16()


def logits_of(folder: Path, **options: Any) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(folder, **options)(torch.arange(12)[None]).logits
    assert isinstance(found, torch.Tensor)
    return found


def config_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers quantize without a GPU: it would compute all the same, and refuses."""
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *args, **kwargs: None)


def assert_written_alike(wconv: Callable[..., Any], folder: Path, scheme: str, asked: str | None) -> None:
    """Quantize the model in a folder's ``in``: the bytes are those that the library has written to its ``judge``."""
    casting = ("--dtype", asked) if asked else ()
    wconv("quantize", folder / "in", "-o", folder / "out", "--scheme", scheme, *casting)
    judged, written = (folder / one / "model.safetensors" for one in ("judge", "out"))
    assert written.read_bytes() == judged.read_bytes()


@pytest.mark.parametrize(("dtype", "asked"), [("float32", None), ("bfloat16", None), ("float32", "bf16")], ids=str)
@pytest.mark.usefixtures("on_the_cpu")
def test_blocks_are_those_of_transformers(
    wconv: Callable[..., Any], tmp_path: Path, dtype: str, asked: str | None
) -> None:
    from transformers import FineGrainedFP8Config, LlamaForCausalLM

    make_llama(256).to(getattr(torch, dtype)).save_pretrained(tmp_path / "in")
    loaded = torch.bfloat16 if asked else "auto"
    model = LlamaForCausalLM.from_pretrained(tmp_path / "in", quantization_config=FineGrainedFP8Config(), dtype=loaded)
    model.save_pretrained(tmp_path / "judge")
    assert_written_alike(wconv, tmp_path, "fp8-block", asked)
    expected = config_in(tmp_path / "judge")
    expected["quantization_config"]["modules_to_not_convert"] = ["lm_head"]  # the default, which transformers has null
    assert config_in(tmp_path / "out") == expected
    wconv("verify", tmp_path / "in", tmp_path / "out", "--quantized")


def test_blocks_are_loaded(wconv: Callable[..., Any], tmp_path: Path) -> None:
    """Of a model without a GPU transformers makes plain numbers: those that 'dequantize' writes."""
    make_llama(256).save_pretrained(tmp_path / "in")
    wconv("quantize", tmp_path / "in", "-o", tmp_path / "out", "--scheme", "fp8-block")
    wconv("dequantize", tmp_path / "out", "-o", tmp_path / "plain", "--dtype", "fp32")
    assert torch.equal(logits_of(tmp_path / "out"), logits_of(tmp_path / "plain"))


def lay_out_experts(folder: Path, sides: tuple[int, int] = (128, 128), fused: bool = False) -> None:
    """Lay out a mixture whose class is in the table, so that no library is asked."""
    layer = "model.layers.0"
    names = {f"{layer}.mlp.experts.{one}.{proj}_proj.weight" for one in (0, 1) for proj in ("gate", "up", "down")}
    state = {name: torch.ones(sides) for name in sorted(names)}
    if fused:
        state = {f"{layer}.mlp.experts.gate_up_proj": torch.ones(2, 256, 128)}
    state[f"{layer}.self_attn.q_proj.weight"] = torch.ones(128, 128)
    state |= {
        f"{layer}.mlp.shared_experts.up_proj.weight": torch.ones(128, 128),
        "lm_head.weight": torch.ones(128, 128),
    }
    save(state, folder / "model.safetensors")
    write_json(folder / "config.json", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})


EXPERTS = "model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("options", "skip", "skipped"),
    [
        ({}, "nothing", []),
        ({"sides": (128, 192)}, "nothing", [EXPERTS]),
        ({"fused": True}, "nothing", [EXPERTS]),
        ({}, r"experts\.1\.up", [EXPERTS]),
    ],
    ids=str,
)
def test_experts_are_one_module_for_blocks(
    wconv: Callable[..., Any], tmp_path: Path, options: Any, skip: str, skipped: list[str]
) -> None:
    lay_out_experts(tmp_path / "in", **options)
    run = ("quantize", tmp_path / "in", "-o", tmp_path / "out", "--scheme", "fp8-block", "--skip", skip)
    told = wconv(*run).stdout
    said = config_in(tmp_path / "out")["quantization_config"]["modules_to_not_convert"]
    assert said == ["lm_head", *skipped]
    written = load_file(tmp_path / "out" / "model.safetensors")
    in_float8 = {name for name, one in written.items() if one.dtype == torch.float8_e4m3fn}
    assert len(in_float8) == (2 if skipped else 8)
    assert len(written) == len(load_file(tmp_path / "in" / "model.safetensors")) + len(in_float8)
    assert ("has all experts in one form" in told) == (skip != "nothing")


def test_experts_are_named_by_one_expression_for_rows(wconv: Callable[..., Any], tmp_path: Path) -> None:
    """Modules that stay are named in full: an entry is no end of a name for compressed-tensors."""
    lay_out_experts(tmp_path / "in")
    run = ("--scheme", "fp8-scaled", "--skip", r"\.experts\.|shared_experts")
    wconv("quantize", tmp_path / "in", "-o", tmp_path / "out", *run)
    ignored = config_in(tmp_path / "out")["quantization_config"]["ignore"]
    each = [f"{EXPERTS}.{one}.{proj}_proj" for one in (0, 1) for proj in ("down", "gate", "up")]
    shared = "model.layers.0.mlp.shared_experts.up_proj"
    assert ignored == ["lm_head", *each, shared, r"re:.*\.experts\.\d+\..*"]


@pytest.mark.slow
@pytest.mark.parametrize("width", [128, 192])
def test_experts_are_all_in_blocks_or_none(wconv: Callable[..., Any], tmp_path: Path, width: int) -> None:
    """What has sides of 192 stays plain, and so do the experts beside it: transformers has one module for all."""
    make_moe(width).save_pretrained(tmp_path / "in")
    told = wconv("quantize", tmp_path / "in", "-o", tmp_path / "out", "--scheme", "fp8-block").stdout
    written = load_file(tmp_path / "out" / "model.safetensors")
    experts = {name: one for name, one in written.items() if ".experts." in name}
    skipped = config_in(tmp_path / "out")["quantization_config"]["modules_to_not_convert"]
    if width == 128:
        assert {name.rpartition(".")[2] for name in experts} == {"weight", "weight_scale_inv"}
        assert skipped == ["lm_head"]
    else:
        assert {one.dtype for one in experts.values()} == {torch.bfloat16}
        assert skipped == ["lm_head", "model.layers.0.mlp.experts"]
        assert "128 does not divide their sides" in told
    wconv("dequantize", tmp_path / "out", "-o", tmp_path / "plain", "--dtype", "bf16")
    assert torch.equal(logits_of(tmp_path / "out"), logits_of(tmp_path / "plain"))


@pytest.mark.slow
def test_fused_experts_stay(wconv: Callable[..., Any], tmp_path: Path) -> None:
    make_moe(128).save_pretrained(tmp_path / "in", save_original_format=False)
    wconv("quantize", tmp_path / "in", "-o", tmp_path / "out", "--scheme", "fp8-block")
    assert config_in(tmp_path / "out")["quantization_config"]["modules_to_not_convert"] == ["lm_head", EXPERTS]
    wconv("dequantize", tmp_path / "out", "-o", tmp_path / "plain", "--dtype", "bf16")
    assert torch.equal(logits_of(tmp_path / "out"), logits_of(tmp_path / "plain"))


def compress(folder: Path, out: Path, dtype: torch.dtype) -> None:
    """Quantize a model with compressed-tensors by its own preset."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    scheme = preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            weight = module.weight
            least, most = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
            module.weight_scale.data.copy_(calculate_qparams(least, most, scheme.weights)[0])
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(out)


@pytest.mark.parametrize(
    ("dtype", "asked"), [("float32", None), ("bfloat16", None), ("float16", None), ("float32", "bf16")], ids=str
)
def test_rows_are_those_of_compressed_tensors(
    wconv: Callable[..., Any], tmp_path: Path, dtype: str, asked: str | None
) -> None:
    pytest.importorskip("compressed_tensors")
    full = getattr(torch, dtype)
    make_llama(48).to(full).save_pretrained(tmp_path / "in")
    compress(tmp_path / "in", tmp_path / "judge", torch.bfloat16 if asked else full)
    assert_written_alike(wconv, tmp_path, "fp8-scaled", asked)
    expected = config_in(tmp_path / "judge")
    del expected["quantization_config"]["moe_sparsity_config"]  # null, and older ones do not know it
    assert config_in(tmp_path / "out") == expected
    assert torch.equal(logits_of(tmp_path / "out"), logits_of(tmp_path / "judge"))
    wconv("verify", tmp_path / "in", tmp_path / "out", "--quantized")


@pytest.mark.slow
def test_rows_of_all_but_experts(wconv: Callable[..., Any], tmp_path: Path) -> None:
    """transformers has those as no Linear; other loaders have."""
    make_moe(64).save_pretrained(tmp_path / "in")
    wconv("quantize", tmp_path / "in", "-o", tmp_path / "out", "--scheme", "fp8-scaled", "--skip", r"\.k_proj")
    ignored = config_in(tmp_path / "out")["quantization_config"]["ignore"]
    assert ignored == ["lm_head", "model.layers.0.self_attn.k_proj", r"re:.*\.experts\.\d+\..*"]
    written = load_file(tmp_path / "out" / "model.safetensors")
    in_float8 = {name for name, one in written.items() if one.dtype == torch.float8_e4m3fn}
    assert in_float8 == {f"model.layers.0.self_attn.{one}_proj.weight" for one in "qvo"}
    assert torch.isfinite(logits_of(tmp_path / "out")).all()


# In one file.


def test_a_file_is_as_comfyui_has_it(wconv: Callable[..., Any], tmp_path: Path) -> None:
    source, out = CORPUS / "plain.safetensors", tmp_path / "out.safetensors"
    wconv("quantize", source, "-o", out, "--scheme", "fp8-scaled")
    assert_same(load_file(out), load_file(CORPUS / "plain.judge.safetensors"))
    wconv("verify", source, out, "--quantized")
    wconv("dequantize", out, "-o", tmp_path / "plain.safetensors", "--dtype", "fp32")
    assert not any(
        "scale" in name.rpartition(".")[2] for name in load_file(tmp_path / "plain.safetensors") if "norm" not in name
    )
    told = wconv("quantize", out, "-o", tmp_path / "twice.safetensors", "--scheme", "fp8-scaled", exit_code=4).stderr
    assert "is quantized already" in told


def test_what_of_a_file(wconv: Callable[..., Any], tmp_path: Path) -> None:
    ones, odd = torch.ones(4, 8), {"d": torch.nan, "e": 1e-40}
    state = {"a.weight": ones, "blocks.0.b.weight": torch.zeros(4, 8), "blocks.0.c.weight": ones.clone()}
    state |= {f"blocks.1.{name}.weight": torch.full((4, 8), value) for name, value in odd.items()}
    source = save(state, tmp_path / "m.safetensors")
    run = ("quantize", source, "--scheme", "fp8-scaled", "-o")
    told = wconv(*run, tmp_path / "out.safetensors").stdout
    assert "no finite numbers, in blocks.1.d" in told
    written = load_file(tmp_path / "out.safetensors")
    assert {name for name, one in written.items() if one.dtype == torch.float8_e4m3fn} == {
        f"blocks.{one}.weight" for one in ("0.b", "0.c", "1.e")
    }
    assert written["blocks.0.b.weight_scale"] == written["blocks.1.e.weight_scale"] == 1
    wconv(*run, tmp_path / "strict.safetensors", "--strict", exit_code=6)
    wconv(*run, tmp_path / "some.safetensors", "--include", "^a$", "--skip", "c")
    assert load_file(tmp_path / "some.safetensors").keys() == {*state, "a.weight_scale", "a.comfy_quant"}
    assert "both name" in wconv(*run, tmp_path / "x.safetensors", "--include", "c", "--skip", "c", exit_code=2).stderr
    told = wconv(*run, tmp_path / "x.safetensors", "--include", "nothing", exit_code=2).stderr
    assert "has no module that would be quantized" in told
    told = wconv("quantize", source, "-o", tmp_path / "x", "--scheme", "fp8-block", exit_code=2).stderr
    assert "is one file" in told


def test_diffusers_has_no_loader_for_it(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save({"proj.weight": torch.ones(4, 8)}, tmp_path / "m" / "diffusion_pytorch_model.safetensors")
    write_json(tmp_path / "m" / "config.json", {"_class_name": "FluxTransformer2DModel"})
    for scheme in ("fp8-block", "fp8-scaled"):
        told = wconv("quantize", tmp_path / "m", "-o", tmp_path / "out", "--scheme", scheme, exit_code=4).stderr
        assert f"does not load {scheme}" in told
        assert "int8 and nf4" in told


@pytest.mark.parametrize("cell", [(128, 128), (1, 0), (0, 0), (2, 3)], ids=str)
@pytest.mark.parametrize("chunk_nbytes", [60, 1000, 1 << 18])
def test_magnitudes_are_found_in_small_chunks(cell: tuple[int, int], chunk_nbytes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, columns = (256, 384) if cell[0] == 128 else (6, 300)
    weight = torch.randn(rows, columns, generator=generator).half()
    source = Tensor("m.weight", Constant(DTYPES["F16"], (rows, columns), raw_bytes(weight)))
    high, wide = cell[0] or rows, cell[1] or columns
    expected = weight.abs().float().reshape(rows // high, high, columns // wide, wide).amax((1, 3))
    found = find_maxima(RowBlock(source, 0, rows), chunk_nbytes, Cell(*cell))
    assert found.found == raw_bytes(expected.contiguous())
    assert found.is_fit
    weight[rows - 1, columns - 1] = torch.inf
    odd = source._replace(source=Constant(DTYPES["F16"], (rows, columns), raw_bytes(weight)))
    assert not find_maxima(RowBlock(odd, 0, rows), chunk_nbytes, Cell(*cell)).is_fit


def test_rows_of_a_block_stay_together() -> None:
    columns = 1 << 15
    source = Tensor("m.weight", Constant(DTYPES["F16"], (1000, columns), b""))
    blocks = list(cut_rows(source, 128))
    assert len(blocks) > 1
    assert all(block.begin % 128 == 0 for block in blocks)
    assert [block.end for block in blocks[:-1]] == [block.begin for block in blocks[1:]]
    assert blocks[-1].end == 1000

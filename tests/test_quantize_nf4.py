"""Models and pipelines in nf4: the bytes of the libraries' own, loaded and run by them on the CPU; and the way back."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import left_behind, load_set, names_in

from converter.cli.quantize import SCHEMES
from converter.errors import BadRequest, LossyCast
from converter.plan.types import Plan
from converter.recipes.dequantize import plan_dequantized
from converter.recipes.quantize import plan_quantized
from converter.recipes.request import Request
from converter.recipes.verify import verify
from converter.run.execute import run_plan
from converter.transforms.quantize import QUANTIZERS

pytestmark = pytest.mark.usefixtures("asked_here")


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    """Load bitsandbytes, whose import talks much."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes  # noqa: F401
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def make_model(builders: Any, name: str) -> Any:
    """Make a tiny model whose every number is random."""
    import transformers

    torch.manual_seed(0)
    gpt2 = {"vocab_size": 64, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 4, "bos_token_id": 0,
            "eos_token_id": 1}  # fmt: skip
    makers = {
        "llama": lambda: builders.make_llama(tied=False),
        "t5": builders.make_t5,
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt2)),
    }
    return builders.shake(makers[name]().eval())


def quantized_to(source: Path, output: Path, **options: Any) -> Plan:
    plan = plan_quantized(Request.of(source, output, **options), scheme="nf4")
    run_plan(plan, verify=True)
    assert left_behind(output.parent) == []
    return plan


def theirs_of(cls: Any, folder: Path, output: Path, dtype: torch.dtype, **options: Any) -> Any:
    """Have transformers quantize a folder as it loads it, and save that."""
    from transformers import BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, **options
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = cls.from_pretrained(folder, device_map="cpu", dtype=dtype, quantization_config=how)
        model.save_pretrained(output)
    return model


def loaded(cls: Any, folder: Path) -> Any:
    """Load a folder; every tensor in it has its place, and every place a tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, told = cls.from_pretrained(folder, device_map="cpu", output_loading_info=True)
    assert not any(told.values()), told
    return model


def said_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]


def modules_in_4_bits(model: Any) -> set[str]:
    return {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}


def outputs_of(model: Any) -> torch.Tensor:
    tokens = torch.tensor([[1, 5, 6, 2]])
    more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        logits = model(tokens, **more).logits
    assert isinstance(logits, torch.Tensor)
    return logits


@pytest.mark.parametrize(
    ("name", "held", "asked"),
    [
        ("llama", torch.float32, None),
        ("llama", torch.bfloat16, None),
        ("llama", torch.float32, "bf16"),
        ("gpt2", torch.float16, None),
        ("gpt2", torch.float32, "fp16"),
        ("t5", torch.bfloat16, None),
    ],
)
def test_the_bytes_and_the_numbers_are_those_of_transformers(
    builders: Any, tmp_path: Path, name: str, held: torch.dtype, asked: str | None
) -> None:
    model = make_model(builders, name).to(held)
    model.save_pretrained(tmp_path / "model")
    plan = quantized_to(tmp_path / "model", tmp_path / "ours", **({"dtype": asked} if asked else {}))
    dtype = {None: held, "bf16": torch.bfloat16, "fp16": torch.float16}[asked]
    theirs = theirs_of(type(model), tmp_path / "model", tmp_path / "theirs", dtype)
    ours = loaded(type(model), tmp_path / "ours")
    assert modules_in_4_bits(ours) == modules_in_4_bits(theirs) != set()
    assert {module for module, *_ in plan.quantized[0].modules} == modules_in_4_bits(ours)
    assert torch.equal(outputs_of(ours), outputs_of(theirs))
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (
        tmp_path / "theirs" / "model.safetensors"
    ).read_bytes()
    skipped = {"llm_int8_skip_modules": None}
    assert {**said_of(tmp_path / "ours"), **skipped} == {**said_of(tmp_path / "theirs"), **skipped}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("nested", [False, True])
def test_the_way_back_is_that_of_transformers(builders: Any, tmp_path: Path, name: str, nested: bool) -> None:
    import bitsandbytes

    model = make_model(builders, name)
    model.save_pretrained(tmp_path / "model")
    theirs = theirs_of(
        type(model), tmp_path / "model", tmp_path / "theirs", torch.bfloat16, bnb_4bit_use_double_quant=nested
    )
    run_plan(plan_dequantized(Request.of(tmp_path / "theirs", tmp_path / "back", dtype="bf16")), verify=True)
    assert "quantization_config" not in (tmp_path / "back" / "config.json").read_text("utf-8")
    back = load_set(tmp_path / "back")
    assert back.keys() == load_set(tmp_path / "model").keys()
    parameters = dict(theirs.named_parameters())
    for module in modules_in_4_bits(theirs):
        weight = parameters[f"{module}.weight"]
        # Where blocks reach from row to row, the library's kernel for AVX512 takes wrong scales: only one row is right.
        flat = weight.quant_state
        flat.shape = torch.Size((1, flat.shape.numel()))
        numbers = bitsandbytes.functional.dequantize_4bit(weight.data, flat)
        found = back[f"{module}.weight"]
        found = found.T if name == "gpt2" else found
        assert torch.equal(found.reshape(1, -1), numbers)
    found = verify(tmp_path / "model", tmp_path / "theirs", quantized=True)
    assert found.is_equal
    assert len(found.quantized) == len(modules_in_4_bits(theirs))
    assert 0.05 < found.quantized[0].max_relative < 0.16


def test_verify_finds_a_code_that_is_another(builders: Any, tmp_path: Path) -> None:
    model = make_model(builders, "llama")
    model.save_pretrained(tmp_path / "model")
    quantized_to(tmp_path / "model", tmp_path / "ours")
    path = tmp_path / "ours" / "model.safetensors"
    state = load_file(path)
    wrong = next(name for name in state if name.endswith("q_proj.weight"))
    state[wrong][3] ^= 0x20
    save_file(state, path, {"format": "pt"})
    [difference] = verify(tmp_path / "model", tmp_path / "ours", quantized=True).differences
    assert (difference.name, difference.detail) == (wrong, "1 of its values are off by more than half a step")


def test_a_sana_pipeline(builders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers
    import transformers
    from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer as Quantizer

    # All else of Diffusers' loader runs on the CPU.
    monkeypatch.setattr(Quantizer, "validate_environment", lambda *_, **__: None)
    monkeypatch.setattr(Quantizer, "update_device_map", lambda _, device_map: device_map or {"": "cpu"})
    sana = tmp_path / "model"
    builders.shake(builders.make_sana()).save_pretrained(sana)
    plan = quantized_to(sana, tmp_path / "ours")
    assert [part.component for part in plan.quantized] == ["text_encoder", "transformer"]
    assert sorted(names_in(sana)) == sorted(names_in(tmp_path / "ours"))
    theirs_of(transformers.Gemma2Model, sana / "text_encoder", tmp_path / "theirs" / "text_encoder", torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        how = diffusers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        theirs = diffusers.SanaTransformer2DModel.from_pretrained(
            sana / "transformer", quantization_config=how, torch_dtype=torch.float32
        )
        theirs.save_pretrained(tmp_path / "theirs" / "transformer")
        pipeline = diffusers.SanaPipeline.from_pretrained(tmp_path / "ours", torch_dtype=torch.float32)
    for part in ("text_encoder/model.safetensors", "transformer/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "ours" / part).read_bytes() == (tmp_path / "theirs" / part).read_bytes()
    found, expected = (said_of(folder / "transformer") for folder in (tmp_path / "ours", tmp_path / "theirs"))
    skipped = {"llm_int8_skip_modules": None}
    assert {**found, **skipped} == {**expected, **skipped}
    assert modules_in_4_bits(pipeline.transformer) == modules_in_4_bits(theirs) != set()
    latents, states = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    with torch.no_grad():
        ours, other = (
            model(latents, encoder_hidden_states=states, timestep=torch.tensor([3])).sample
            for model in (pipeline.transformer, theirs)
        )
    assert torch.equal(ours, other)
    assert pipeline.text_encoder(torch.tensor([[1, 5]]))[0].isfinite().all()


def test_a_module_with_a_nan_is_refused_by_name(builders: Any, wconv: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model(builders, "llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(LossyCast, match=r"no finite numbers, in 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        quantized_to(tmp_path / "model", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    arguments = ("quantize", tmp_path / "model", "-o", tmp_path / "ours", "--scheme", "nf4", "--skip", "1.mlp.up_proj")
    shown = wconv(*arguments).stdout
    assert "modules in 4 bits" in shown
    assert "within 15.2 %" in shown
    assert "bnb_4bit_compute_dtype" in shown
    assert load_set(tmp_path / "ours")["model.layers.1.mlp.up_proj.weight"].isnan().any()


def test_the_schemes_that_the_command_offers(tmp_path: Path) -> None:
    assert tuple(QUANTIZERS) == SCHEMES
    with pytest.raises(BadRequest, match=r"cannot be written as 'int3'\. There are int8, nf4"):
        plan_quantized(Request.of(tmp_path, tmp_path / "out"), scheme="int3")

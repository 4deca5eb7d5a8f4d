"""Models quantized by wconv, loaded by the libraries with bitsandbytes on the CPU; refusals; and the way back."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.judges import assert_close_outputs
from support.tiny import assert_same, left_behind, load_set, make_state, names_in, save, snapshot, write_json

from converter.errors import BadRequest, LossyCast, Unsupported, WconvError
from converter.libraries import ask
from converter.plan.types import Plan
from converter.recipes import quantize
from converter.recipes.dequantize import plan_dequantized
from converter.recipes.quantize import Measuring, plan_quantized
from converter.recipes.request import Request, prepare
from converter.recipes.verify import verify
from converter.run.execute import run_plan
from converter.transforms.quantize.modules import ModuleChoice

pytestmark = pytest.mark.usefixtures("asked_here")

NO_CHOICE = ModuleChoice()
# Of a model in 8 bits the inputs are rounded to 127 steps as well: where one falls on the other side, it is off by one.
INT8_SHARE = 0.05
LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj")


def make_model(builders: Any, name: str) -> Any:
    """Make a tiny model whose every number is random."""
    import transformers

    torch.manual_seed(0)
    small = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    gpt2 = {
        "vocab_size": 64,
        "n_positions": 16,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    opt = {
        "vocab_size": 64,
        "hidden_size": 16,
        "word_embed_proj_dim": 8,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    }
    makers = {
        "llama": lambda: builders.make_llama(tied=False),
        "llama_tied": lambda: builders.make_llama(tied=True),
        "gemma2": builders.make_gemma2,
        "gemma2_lm": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**small)),
        "t5": builders.make_t5,
        "t5_encoder": builders.make_t5_encoder,
        "clip": builders.make_clip,
        "clip_projection": builders.make_clip_with_projection,
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt2)),
        "opt": lambda: transformers.OPTForCausalLM(transformers.OPTConfig(**opt)),
    }
    return builders.shake(makers[name]().eval())


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    """Load bitsandbytes, whose import and casts talk much."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes  # noqa: F401
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def plan_8_bits(source: Path, output: Path, choice: ModuleChoice = NO_CHOICE, **options: Any) -> Plan:
    """Plan to quantize a folder."""
    return plan_quantized(Request.of(source, output, **options), choice)


def quantized_to(source: Path, output: Path, choice: ModuleChoice = NO_CHOICE, **options: Any) -> Plan:
    """Quantize a folder as a command does; every byte is read back."""
    prepared = prepare(Request.of(source, output, **options), lambda request: plan_quantized(request, choice), choice)
    assert prepared.plan is not None
    run_plan(prepared.plan, verify=True, request=prepared.request)
    assert left_behind(output.parent) == []
    return prepared.plan


def dequantized_to(source: Path, output: Path, dtype: str) -> None:
    run_plan(plan_dequantized(Request.of(source, output, dtype=dtype)), verify=True)


def load_8bit(cls: Any, folder: Path, **options: Any) -> Any:
    """Load a model on the CPU; every tensor in the folder has its place, and every place a tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, told = cls.from_pretrained(folder, device_map="cpu", output_loading_info=True, **options)
    assert not any(told.values()), told
    return model


def quantized_on_the_fly(cls: Any, folder: Path) -> Any:
    from transformers import BitsAndBytesConfig

    return load_8bit(cls, folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def modules_in_8_bits(model: Any) -> set[str]:
    return {name for name, module in model.named_modules() if type(module).__name__ == "Linear8bitLt"}


def config_of(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "config.json").read_text("utf-8"))
    assert isinstance(content, dict)
    return content


def skip_list(folder: Path) -> list[str]:
    return list(config_of(folder)["quantization_config"]["llm_int8_skip_modules"])


MODELS = (
    "llama",
    "llama_tied",
    "gemma2",
    "gemma2_lm",
    "t5",
    "t5_encoder",
    "clip",
    "clip_projection",
    "gpt2",
    "opt",
)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in MODELS), *((name, torch.bfloat16) for name in ("llama", "t5", "gpt2"))],
)
def test_the_same_as_quantizing_on_the_fly(builders: Any, tmp_path: Path, name: Any, dtype: Any) -> None:
    model = make_model(builders, name).to(dtype)
    model.save_pretrained(tmp_path / "model")
    quantized_to(tmp_path / "model", tmp_path / "ours")
    theirs = quantized_on_the_fly(type(model), tmp_path / "model")
    ours = load_8bit(type(model), tmp_path / "ours")
    assert modules_in_8_bits(ours) == modules_in_8_bits(theirs) != set()
    assert_close_outputs(builders.forward(ours), builders.forward(theirs), INT8_SHARE)
    theirs.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (
        tmp_path / "theirs" / "model.safetensors"
    ).read_bytes()
    expected = config_of(tmp_path / "theirs")["quantization_config"]
    found = config_of(tmp_path / "ours")["quantization_config"]
    assert {**found, "llm_int8_skip_modules": None} == {**expected, "llm_int8_skip_modules": None}


@pytest.mark.parametrize("name", ["llama_tied", "t5", "clip"])
def test_published_bin_shards_give_the_same(builders: Any, tmp_path: Path, name: str) -> None:
    # transformers 5 has other names for CLIP's modules than files have.
    model = make_model(builders, name)
    model.save_pretrained(tmp_path / "model")
    builders.save_bin(model, tmp_path / "bin", 3)
    quantized_to(tmp_path / "bin", tmp_path / "ours")
    names = [name for name in names_in(tmp_path / "ours") if name.endswith(".safetensors")]
    assert len(names) == 3
    theirs = quantized_on_the_fly(type(model), tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = type(model).from_pretrained(tmp_path / "ours", device_map="cpu")
    assert modules_in_8_bits(ours) == modules_in_8_bits(theirs)
    assert_same(ours.state_dict(), theirs.state_dict())
    assert_close_outputs(builders.forward(ours), builders.forward(theirs), INT8_SHARE)


@pytest.mark.parametrize("name", ["llama", "t5", "clip"])
@pytest.mark.parametrize("skip", [r"\.0\.", r"(q|wo|fc1|q_proj)$", "lm_head"])
def test_modules_that_are_skipped_load_as_they_are(builders: Any, tmp_path: Path, name: str, skip: str) -> None:
    model = make_model(builders, name)
    builders.save_bin(model, tmp_path / "model")
    plan = quantized_to(tmp_path / "model", tmp_path / "ours", ModuleChoice(skip=(skip,)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = type(model).from_pretrained(tmp_path / "ours", device_map="cpu")
    wanted = {module.removeprefix("text_model.") for module, _, _ in plan.quantized[0].modules}
    assert modules_in_8_bits(ours) == wanted
    assert builders.forward(ours).isfinite().all()


def test_a_class_that_the_table_lacks_is_asked_itself(
    builders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(builders, "opt").save_pretrained(tmp_path / "model")
    assert len(quantized_to(tmp_path / "model", tmp_path / "ours").quantized[0].modules) == 14
    monkeypatch.setattr(ask, "_ask", lambda _: "")
    with pytest.raises(Unsupported, match=r"is a OPTForCausalLM, and whether .* is linear is not known. Install torch"):
        quantized_to(tmp_path / "model", tmp_path / "again")
    monkeypatch.setattr(ask, "_ask", lambda _: "no luck")
    with pytest.raises(Unsupported, match=r"names OPTForCausalLM, which could not be made: no luck\. Name the linear"):
        quantized_to(tmp_path / "model", tmp_path / "again")
    embeddings = ModuleChoice(skip=("embed", "lm_head"))
    quantized_to(tmp_path / "model", tmp_path / "named", embeddings)
    assert_same(load_set(tmp_path / "named"), load_set(tmp_path / "ours"))


def test_a_rest_in_another_dtype(builders: Any, tmp_path: Path) -> None:
    make_model(builders, "t5").save_pretrained(tmp_path / "model")
    quantized_to(tmp_path / "model", tmp_path / "ours", dtype="fp16")
    dtypes = {name: tensor.dtype for name, tensor in load_set(tmp_path / "ours").items()}
    assert {dtype for name, dtype in dtypes.items() if name.endswith(".SCB")} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if name.endswith(".wo.weight")} == {torch.float32}
    assert dtypes["shared.weight"] == torch.float16
    assert config_of(tmp_path / "ours")["dtype"] == "float16"
    load_8bit(type(make_model(builders, "t5")), tmp_path / "ours")


@pytest.mark.parametrize("limit", [700, 3000, 20_000])
def test_the_tensors_of_a_module_are_in_one_shard(builders: Any, tmp_path: Path, limit: int) -> None:
    model = make_model(builders, "llama")
    model.save_pretrained(tmp_path / "model")
    quantized_to(tmp_path / "model", tmp_path / "ours", max_shard_size=limit)
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text("utf-8"))
    shards = index["weight_map"]
    for name in shards:
        if name.endswith(".SCB"):
            module = name.removesuffix(".SCB")
            assert shards[name] == shards[f"{module}.weight"] == shards[f"{module}.weight_format"]
    assert index["metadata"]["total_parameters"] == model.num_parameters()
    load_8bit(type(model), tmp_path / "ours")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("columns", [5, 997, 70_000])
def test_chunks_that_end_within_a_row(tmp_path: Path, transposed: bool, columns: int) -> None:
    import bitsandbytes

    weight = torch.randn(1_000_000 // columns, columns) * torch.rand(1_000_000 // columns, 1)
    save({"h.0.c_fc.weight": weight.T.contiguous() if transposed else weight}, tmp_path / "model" / "model.safetensors")
    name = "GPT2Model" if transposed else "NoSuchModel"
    write_json(tmp_path / "model" / "config.json", {"architectures": [name]})
    choice = ModuleChoice(include=("c_fc",))
    plan = plan_quantized(Request.of(tmp_path / "model", tmp_path / "ours"), choice, Measuring(memory_nbytes=1))
    run_plan(plan, memory_nbytes=1, verify=True)
    judge = bitsandbytes.nn.Int8Params(weight, requires_grad=False).to("cpu")
    found = load_set(tmp_path / "ours")
    assert torch.equal(found["h.0.c_fc.weight"], judge.data)
    assert torch.equal(found["h.0.c_fc.SCB"], judge.SCB)
    assert found["h.0.c_fc.weight_format"].item() == 0
    run_plan(plan_dequantized(Request.of(tmp_path / "ours", tmp_path / "back", dtype="fp32")), memory_nbytes=1)
    numbers = bitsandbytes.functional.int8_vectorwise_dequant(judge.data, judge.SCB)
    assert torch.equal(load_set(tmp_path / "back")["h.0.c_fc.weight"], numbers.T if transposed else numbers)
    assert verify(tmp_path / "model", tmp_path / "ours", quantized=True, memory_nbytes=1).is_equal


# Values that float16 cannot hold.


@pytest.mark.parametrize("value", [70_000.0, float("inf"), float("nan")])
def test_a_module_beyond_float16_is_left_and_named(builders: Any, tmp_path: Path, value: float) -> None:
    model = make_model(builders, "clip")
    with torch.no_grad():
        model.encoder.layers[1].mlp.fc1.weight[3, 4] = value
    builders.save_bin(model, tmp_path / "model")
    plan = quantized_to(tmp_path / "model", tmp_path / "ours")
    [note] = plan.sets[0].notes
    assert "float16 cannot hold, in text_model.encoder.layers.1.mlp.fc1: left as they are" in note
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = type(model).from_pretrained(tmp_path / "ours", device_map="cpu")
    assert modules_in_8_bits(ours) == {module.removeprefix("text_model.") for module, _, _ in plan.quantized[0].modules}
    assert type(ours.encoder.layers[1].mlp.fc1) is torch.nn.Linear
    torch.testing.assert_close(
        ours.encoder.layers[1].mlp.fc1.weight, model.encoder.layers[1].mlp.fc1.weight, equal_nan=True
    )
    before = snapshot(tmp_path)
    with pytest.raises(LossyCast, match=r"layers\.1\.mlp\.fc1\. Without --strict") as raised:
        plan_8_bits(tmp_path / "model", tmp_path / "strict", ModuleChoice(strict=True))
    assert raised.value.exit_code == 6
    assert snapshot(tmp_path) == before


# What is refused.


def llama_folder(folder: Path, **config: Any) -> Path:
    """Write a model of a few tensors with Llama's names."""
    state = {f"model.layers.0.mlp.{leaf}.weight": torch.randn(4, 8) for leaf in LEAVES}
    state["model.embed_tokens.weight"] = torch.randn(8, 4)
    save(state, folder / "model.safetensors")
    write_json(folder / "config.json", {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **config})
    return folder


@pytest.mark.parametrize(
    ("choice", "error", "problem"),
    [
        (
            ModuleChoice(("q_proj",), ("k_proj",)),
            BadRequest,
            "which neither --include nor --skip names. Name it in one",
        ),
        (ModuleChoice(("_proj",), ("k_proj",)), BadRequest, "which --include and --skip both name. Choose one"),
        (ModuleChoice(skip=("_proj",)), BadRequest, "has no module that would be quantized. See --include, --skip and"),
        (ModuleChoice(include=("(",)), BadRequest, "is no regular expression"),
    ],
)
def test_a_choice_that_does_not_decide_is_refused(
    tmp_path: Path, choice: Any, error: type[Exception], problem: str
) -> None:
    source = llama_folder(tmp_path / "model")
    with pytest.raises(error, match=problem):
        plan_8_bits(source, tmp_path / "ours", choice)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_only_what_is_included_is_quantized(tmp_path: Path) -> None:
    source = llama_folder(tmp_path / "model")
    plan = quantized_to(source, tmp_path / "ours", ModuleChoice(include=("q_proj", "k_proj")))
    assert [module for module, _, _ in plan.quantized[0].modules] == [
        f"model.layers.0.mlp.{x}" for x in ("k_proj", "q_proj")
    ]
    left = [f"{base}layers.0.mlp.{leaf}" for base in ("", "model.") for leaf in ("o_proj", "v_proj")]
    assert skip_list(tmp_path / "ours") == sorted(["lm_head", *left])


def test_a_module_that_the_table_does_not_have_must_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(ask, "_ask", lambda _: "")
    source = llama_folder(tmp_path / "model")
    state = {**load_file(source / "model.safetensors"), "score.weight": torch.randn(4, 8)}
    save(state, source / "model.safetensors")
    for skip in ((), ("q_proj",)):
        with pytest.raises(Unsupported, match="is a LlamaForCausalLM, and whether 'score' is linear is not known"):
            plan_8_bits(source, tmp_path / "ours", ModuleChoice(skip=skip))
    plan = quantized_to(source, tmp_path / "ours", ModuleChoice(skip=("score",)))
    assert len(plan.quantized[0].modules) == 4
    assert skip_list(tmp_path / "ours") == ["lm_head", "score"]


def test_a_name_that_means_others_too_leaves_them_all(tmp_path: Path) -> None:
    # Diffusers goes by the last part of a name: where the proj_out at the top is skipped, all are.
    state = {name: torch.randn(4, 8) for name in ("proj_out.weight", "a.0.proj_out.weight", "a.0.attn.to_q.weight")}
    save(state, tmp_path / "model" / "diffusion_pytorch_model.safetensors")
    write_json(tmp_path / "model" / "config.json", {"_class_name": "SanaTransformer2DModel"})
    plan = quantized_to(tmp_path / "model", tmp_path / "ours", ModuleChoice(skip=("^proj_out",)))
    assert [module for module, _, _ in plan.quantized[0].modules] == ["a.0.attn.to_q"]
    assert plan.sets[0].notes == ("left as they are, as a name in the skip list means them too: a.0.proj_out",)


@pytest.mark.parametrize("what", ["config", "int8", "float8"])
def test_what_is_quantized_is_refused(tmp_path: Path, what: str) -> None:
    source = llama_folder(tmp_path / "model", **({"quantization_config": {}} if what == "config" else {}))
    if what != "config":
        dtype = torch.int8 if what == "int8" else torch.float8_e4m3fn
        save({"model.layers.0.mlp.up_proj.weight": torch.ones(4, 4).to(dtype)}, source / "model.safetensors")
    with pytest.raises(Unsupported, match="is quantized already") as raised:
        plan_8_bits(source, tmp_path / "ours")
    assert "Quantize the model" in raised.value.advice
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_its_own_output_is_refused(tmp_path: Path) -> None:
    quantized_to(llama_folder(tmp_path / "model"), tmp_path / "ours")
    with pytest.raises(Unsupported, match=r"is quantized already, as its config\.json says"):
        plan_8_bits(tmp_path / "ours", tmp_path / "again")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("model.gguf", b"GGUF" + bytes(40), "is a GGUF file"),
        ("model.safetensors", None, "is one file, and not a model's"),
    ],
)
def test_a_file_is_refused(tmp_path: Path, name: str, content: bytes | None, problem: str) -> None:
    path = tmp_path / "model" / name
    path.parent.mkdir()
    if content is None:
        save(make_state(), path)
    else:
        path.write_bytes(content)
    with pytest.raises(WconvError, match=problem):
        plan_8_bits(path, tmp_path / "ours")


def test_a_folder_of_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model-q8_0.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(Unsupported, match=r"model-q8_0\.gguf: is a GGUF file, whose weights are quantized"):
        plan_8_bits(tmp_path / "model", tmp_path / "ours")


def test_the_source_is_no_output(tmp_path: Path) -> None:
    source = llama_folder(tmp_path / "model")
    before = snapshot(source)
    with pytest.raises(BadRequest, match="is the source itself"):
        plan_8_bits(source, source, overwrite=True)
    assert snapshot(source) == before


def test_a_module_without_a_weight_is_refused(builders: Any, tmp_path: Path) -> None:
    make_model(builders, "opt").save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    state = load_file(path)
    del state["model.decoder.layers.0.fc1.weight"]
    save_file(state, path, {"format": "pt"})
    with pytest.raises(
        Unsupported, match=r"has no weight for 'model\.decoder\.layers\.0\.fc1', which OPTForCausalLM has"
    ):
        plan_8_bits(tmp_path / "model", tmp_path / "ours")


def test_a_tied_weight_stays(tmp_path: Path) -> None:
    weight = torch.randn(4, 8)
    state = {"layers.0.q_proj.weight": weight, "layers.1.q_proj.weight": weight, "layers.2.q_proj.weight": weight + 1}
    save(state, tmp_path / "model" / "pytorch_model.bin")
    write_json(tmp_path / "model" / "config.json", {"architectures": ["LlamaModel"], "model_type": "llama"})
    plan = quantized_to(tmp_path / "model", tmp_path / "ours")
    assert [module for module, _, _ in plan.quantized[0].modules] == ["layers.2.q_proj"]
    assert {"layers.0.q_proj", "layers.1.q_proj"} <= set(skip_list(tmp_path / "ours"))


# Pipelines.


@pytest.fixture(scope="module")
def sana(builders: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a Sana pipeline's folder; not to be written to."""
    folder = tmp_path_factory.mktemp("sana") / "model"
    builders.shake(builders.make_sana()).save_pretrained(folder)
    return folder


@pytest.fixture
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take out Diffusers' demand for a GPU: all else of its 8-bit loader runs on the CPU."""
    from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB8BitDiffusersQuantizer as Quantizer

    monkeypatch.setattr(Quantizer, "validate_environment", lambda *_, **__: None)
    monkeypatch.setattr(Quantizer, "update_device_map", lambda _, device_map: device_map or {"": "cpu"})


def test_a_sana_pipeline(builders: Any, sana: Path, tmp_path: Path, no_gpu_needed: Any) -> None:
    import diffusers
    import transformers

    plan = quantized_to(sana, tmp_path / "ours")
    assert [part.component for part in plan.quantized] == ["text_encoder", "transformer"]
    assert sorted(names_in(sana)) == sorted(names_in(tmp_path / "ours"))
    before, after = snapshot(sana), snapshot(tmp_path / "ours")
    changed = {name for name in before if before[name] != after[name]}
    weights = {"text_encoder": "model.safetensors", "transformer": "diffusion_pytorch_model.safetensors"}
    assert changed == {f"{part}/{name}" for part, weight in weights.items() for name in ("config.json", weight)}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = diffusers.SanaTransformer2DModel.from_pretrained(
            sana / "transformer",
            quantization_config=diffusers.BitsAndBytesConfig(load_in_8bit=True),
            torch_dtype=torch.float32,
        )
        theirs.save_pretrained(tmp_path / "theirs" / "transformer")
        encoder = transformers.Gemma2Model.from_pretrained(
            sana / "text_encoder",
            quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True),
            device_map="cpu",
        )
        encoder.save_pretrained(tmp_path / "theirs" / "text_encoder")
        pipeline = diffusers.SanaPipeline.from_pretrained(tmp_path / "ours", torch_dtype=torch.float32)
    for part, weight in weights.items():
        ours = (tmp_path / "ours" / part / weight).read_bytes()
        assert ours == (tmp_path / "theirs" / part / weight).read_bytes()
    assert modules_in_8_bits(pipeline.transformer) == modules_in_8_bits(theirs)
    assert modules_in_8_bits(pipeline.text_encoder) == modules_in_8_bits(encoder)
    latents, states = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    with torch.no_grad():
        outputs = [
            model(latents, encoder_hidden_states=states, timestep=torch.tensor([3])).sample
            for model in (pipeline.transformer, theirs)
        ]
        tokens = torch.tensor([[1, 5, 6, 2]])
        hidden = [model(tokens)[0] for model in (pipeline.text_encoder, encoder)]
    assert (outputs[0] - outputs[1]).abs().max() == 0
    assert (hidden[0] - hidden[1]).abs().max() == 0


@pytest.mark.parametrize("name", ["unet", "unet_xl", "sd3", "wan"])
def test_models_of_diffusers(builders: Any, tmp_path: Path, no_gpu_needed: Any, name: str) -> None:
    import diffusers

    makers = {
        "unet": builders.make_unet,
        "unet_xl": lambda: builders.make_sdxl().unet,
        "sd3": lambda: builders.make_sd3().transformer,
        "wan": lambda: builders.make_wan().transformer,  # not in the table, and with parts that are kept in float32
    }
    model = builders.shake(makers[name]())
    model.save_pretrained(tmp_path / "model")
    quantized_to(tmp_path / "model", tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = type(model).from_pretrained(
            tmp_path / "model",
            quantization_config=diffusers.BitsAndBytesConfig(load_in_8bit=True),
            torch_dtype=torch.float32,
        )
        ours = type(model).from_pretrained(tmp_path / "ours", torch_dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    file_name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "ours" / file_name).read_bytes() == (tmp_path / "theirs" / file_name).read_bytes()
    assert modules_in_8_bits(ours) == modules_in_8_bits(theirs)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "wan"])
def test_other_pipelines(builders: Any, tmp_path: Path, no_gpu_needed: Any, name: str) -> None:
    from diffusers import DiffusionPipeline

    builders.save_bin(builders.shake(builders.MODELS[name]()), tmp_path / "model")
    plan = quantized_to(tmp_path / "model", tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"use_safetensors": None, "torch_dtype": torch.float32}
        pipeline = DiffusionPipeline.from_pretrained(tmp_path / "ours", **options)
    expected = {name for name in pipeline.components if name.startswith(("text_encoder", "unet", "transformer"))}
    parts = {part.component: part for part in plan.quantized}
    assert parts.keys() == {name for name in expected if getattr(pipeline, name) is not None}
    for component, part in parts.items():
        model = getattr(pipeline, component)
        wanted = {module.removeprefix("text_model.") for module, _, _ in part.modules}
        assert {module.removeprefix("text_model.") for module in modules_in_8_bits(model)} == wanted
        assert not any(parameter.is_meta for parameter in model.parameters())


def test_one_component(sana: Path, tmp_path: Path) -> None:
    plan = quantized_to(sana, tmp_path / "ours", components=("transformer",))
    assert [part.component for part in plan.quantized] == ["transformer"]
    assert "quantization_config" not in config_of(tmp_path / "ours" / "text_encoder")
    before, after = snapshot(sana), snapshot(tmp_path / "ours")
    assert {name for name in before if before[name] != after[name]} == {
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    }


def test_the_other_parts_in_another_dtype(sana: Path, tmp_path: Path) -> None:
    quantized_to(sana, tmp_path / "ours", dtype="bf16")
    state = load_file(tmp_path / "ours" / "vae" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    transformer = load_file(tmp_path / "ours" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in transformer.values()} == {torch.int8, torch.float32, torch.uint8, torch.bfloat16}
    assert config_of(tmp_path / "ours" / "text_encoder")["dtype"] == "bfloat16"


# The way back.


@pytest.mark.parametrize("name", ["llama", "t5", "gpt2", "clip"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_way_back(builders: Any, tmp_path: Path, name: str, dtype: str) -> None:
    model = make_model(builders, name)
    model.save_pretrained(tmp_path / "model")
    quantized_to(tmp_path / "model", tmp_path / "ours")
    dequantized_to(tmp_path / "ours", tmp_path / "back", dtype)
    before, after = load_set(tmp_path / "model"), load_set(tmp_path / "back")
    assert before.keys() == after.keys()
    assert "quantization_config" not in config_of(tmp_path / "back")
    scales = load_set(tmp_path / "ours")
    for key, tensor in before.items():
        largest = scales.get(key.removesuffix(".weight") + ".SCB")
        if largest is None:
            continue
        if name == "gpt2":
            largest, found = largest[None, :], after[key].double()
        else:
            largest, found = largest[:, None], after[key].double()
        # Half a step, what float16 took off before, and what the dtype takes off now.
        slack = {"fp32": 1e-6, "fp16": 2**-11, "bf16": 2**-8}[dtype]
        assert ((found - tensor.double()).abs() <= largest * (1 / 254 + 2**-11 + slack)).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = type(model).from_pretrained(tmp_path / "back")
    assert not modules_in_8_bits(loaded)
    assert builders.forward(loaded).isfinite().all()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_verify_measures_the_errors(builders: Any, tmp_path: Path, name: str) -> None:
    model = make_model(builders, name)
    model.save_pretrained(tmp_path / "model")
    quantized_to(tmp_path / "model", tmp_path / "ours", dtype="bf16")
    found = verify(tmp_path / "model", tmp_path / "ours", quantized=True)
    assert found.is_equal
    worst = [one.max_relative for one in found.quantized]
    assert worst == sorted(worst, reverse=True)
    assert 0.003 < worst[0] < 1 / 254 + 2**-11
    assert all(0 < one.mean_relative < 0.02 for one in found.quantized)
    path = tmp_path / "ours" / "model.safetensors"
    state = load_file(path)
    wrong = next(name for name in state if name.endswith(".SCB")).removesuffix(".SCB") + ".weight"
    state[wrong][1, 2] ^= 4
    save_file(state, path, {"format": "pt"})
    found = verify(tmp_path / "model", tmp_path / "ours", quantized=True)
    [difference] = found.differences
    assert (difference.name, difference.detail) == (wrong, "1 of its values are off by more than half a step")


def test_a_pipeline_goes_back_but_for_what_was_never_quantized(sana: Path, tmp_path: Path) -> None:
    quantized_to(sana, tmp_path / "ours")
    dequantized_to(tmp_path / "ours", tmp_path / "back", "fp32")
    assert names_in(tmp_path / "back") == names_in(sana)
    found = verify(sana, tmp_path / "back")
    assert {difference.component for difference in found.differences} == {"text_encoder", "transformer"}
    assert {difference.kind for difference in found.differences} == {"values"}


def test_what_has_no_8_bit_weights_does_not_go_back(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="holds no quantized weights"):
        dequantized_to(llama_folder(tmp_path / "model"), tmp_path / "back", "fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# Runs that are cut off.


def test_a_run_that_was_stopped_is_taken_up(tmp_path: Path) -> None:
    source = llama_folder(tmp_path / "model")
    quantized_to(source, tmp_path / "whole")
    plan = plan_8_bits(source, tmp_path / "ours")
    with pytest.raises(KeyboardInterrupt):
        run_plan(plan, progress=_stop)
    assert not (tmp_path / "ours").exists()
    quantized_to(source, tmp_path / "ours")
    assert snapshot(tmp_path / "ours") == snapshot(tmp_path / "whole")


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_source_that_is_cut_between_its_two_readings_is_refused(tmp_path: Path) -> None:
    source = llama_folder(tmp_path / "model")
    plan = plan_8_bits(source, tmp_path / "ours")
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(WconvError, match="changed while it was read"):
        run_plan(plan)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_parts_of_a_pipeline() -> None:
    names = ("transformer", "transformer_2", "unet", "text_encoder", "text_encoder_3")
    assert all(quantize._PARTS.fullmatch(name) for name in names)
    assert not any(quantize._PARTS.fullmatch(name) for name in ("vae", "image_encoder", "safety_checker", "vqvae"))


@pytest.mark.parametrize("doubtful", ["embed_tokens", "mlp.gate", "mlp.experts.0.up_proj"])
def test_of_an_unknown_class_what_may_not_be_linear_must_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doubtful: str
) -> None:
    monkeypatch.setattr(ask, "_ask", lambda _: "")
    state = {f"model.{name}.weight": torch.randn(4, 8) for name in ("q_proj", "k_proj", doubtful)}
    save(state, tmp_path / "model" / "model.safetensors")
    write_json(tmp_path / "model" / "config.json", {"architectures": ["OtherForCausalLM"], "model_type": "other"})
    with pytest.raises(Unsupported, match=f"whether 'model.{doubtful}' is linear is not known"):
        plan_8_bits(tmp_path / "model", tmp_path / "ours", ModuleChoice(skip=("k_proj",)))
    for choice in (ModuleChoice(skip=("k_proj", doubtful)), ModuleChoice(include=("q_proj", doubtful))):
        plan = plan_8_bits(tmp_path / "model", tmp_path / "ours", choice)
        modules = {module for module, _, _ in plan.quantized[0].modules}
        assert modules == {"model.q_proj"} | ({f"model.{doubtful}"} if choice.include else set())

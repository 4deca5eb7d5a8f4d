"""LoRAs that are odd, and bases that are: what PEFT and trainers write beside the usual, and what is made up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.tiny import raw_bytes, write_json

from converter.dtypes import DTYPES
from converter.tensors.derived import Constant, held
from converter.tensors.reader import RangeReader
from converter.transforms.merge.product import Factor, Product, merged

State = dict[str, torch.Tensor]
Q = "model.layers.0.self_attn.q_proj"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def pair(module: str, out: int, inner: int, rank: int = 2) -> State:
    return {f"{module}.lora_A.weight": random(rank, inner), f"{module}.lora_B.weight": random(out, rank)}


def delta(state: State, module: str, scale: float = 1.0) -> torch.Tensor:
    return scale * (state[f"{module}.lora_B.weight"] @ state[f"{module}.lora_A.weight"])


def write_base(folder: Path, state: State, class_name: str, **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", {"architectures": [class_name] if class_name else [], **config})
    return folder


def write_peft(folder: Path, state: State, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"base_model.model.{name}": one for name, one in state.items()}, folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **config})
    return folder


@pytest.fixture
def merge(wconv: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Give what merges, and gives the tensors and config of the result, or the exit code and what was said."""

    def run(base: Path, *adapters: Path) -> Any:
        out = tmp_path / "merged" / adapters[-1].stem / (base.name if base.is_file() else "")
        done = wconv("merge-lora", base, *adapters, "-o", out, exit_code=None)
        if done.exit_code:
            assert not out.exists()
            return done.exit_code, done.stderr
        file = out if base.is_file() else out / "model.safetensors"
        return load_file(file), {} if base.is_file() else json.loads((out / "config.json").read_text())

    return run


CONFIGS: list[dict[str, Any]] = [
    {"lora_alpha": "much"}, {"lora_alpha": 10**400}, {"rank_pattern": [1]}, {"alpha_pattern": "q"},
    {"alpha_pattern": {"(a+)+": 3}}, {"alpha_pattern": {"q_proj": None}}, {"r": [2]},
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
def test_inspect_says_what_is_no_number(config: dict[str, Any], tmp_path: Path, wconv: Callable[..., Any]) -> None:
    told = wconv("inspect", write_peft(tmp_path / "a", pair(Q, 6, 8), **config))
    assert told.exit_code == 0
    assert told.stdout.count("note: it says") == 1


def test_a_classifier_of_either_name(merge: Any, tmp_path: Path) -> None:
    # PEFT notes both names for it, and saves what there is.
    state = {"bert.q.weight": random(6, 8), "classifier.weight": random(2, 8), "classifier.bias": random(2)}
    base = write_base(tmp_path / "base", state, "BertForSequenceClassification")
    head = {"classifier.weight": random(2, 8, seed=1), "classifier.bias": random(2, seed=1)}
    adapter = write_peft(tmp_path / "a", {**pair("bert.q", 6, 8), **head}, modules_to_save=["classifier", "score"])
    found, _ = merge(base, adapter)
    assert torch.equal(found["classifier.bias"], head["classifier.bias"])
    code, said = merge(base, write_peft(tmp_path / "b", pair("bert.q", 6, 8), modules_to_save=["classifier", "score"]))
    assert (code, "lacks 'classifier'" in said) == (3, True)


def test_both_of_a_tie_that_peft_keeps(merge: Any, tmp_path: Path) -> None:
    words = random(10, 8)
    base = write_base(tmp_path / "base", {"model.embed_tokens.weight": words}, "LlamaForCausalLM")
    saved = {"model.embed_tokens.weight": words + 1, "lm_head.weight": words + 1}
    config = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    code, said = merge(base, write_peft(tmp_path / "one", {**pair("lm_head", 10, 8)}, ensure_weight_tying=True))
    assert (code, "for one alone of the head and the table of words" in said) == (4, True)
    code, said = merge(base, write_peft(tmp_path / "none", saved, **config))
    assert (code, "holds no pair" in said) == (3, True)
    base = write_base(
        tmp_path / "more", {"model.embed_tokens.weight": words, f"{Q}.weight": random(6, 8)}, "LlamaForCausalLM"
    )
    found, told = merge(base, write_peft(tmp_path / "both", {**pair(Q, 6, 8), **saved}, **config))
    assert torch.equal(found["lm_head.weight"], words + 1)
    assert told["tie_word_embeddings"] is False


TIED: list[tuple[str, str, dict[str, Any], bool]] = [
    ("MambaForCausalLM", "backbone.embeddings", {}, True),
    ("SomeForCausalLM", "model.table", {"vocab_size": 10}, False),
    ("BioGptForCausalLM", "biogpt.embed_tokens", {}, False),  # its head is output_projection
    ("WhisperForCausalLM", "model.decoder.embed_tokens", {}, False),
    ("GPT2DoubleHeadsModel", "transformer.wte", {}, False),
]


@pytest.mark.parametrize(("class_name", "table", "config", "is_known"), TIED)
def test_tables_of_words_of_many_names(
    class_name: str, table: str, config: dict[str, Any], is_known: bool, merge: Any, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", {f"{table}.weight": random(10, 8)}, class_name, **config)
    halves = {f"{table}.lora_embedding_A": random(2, 10), f"{table}.lora_embedding_B": random(8, 2)}
    found, told = merge(base, write_peft(tmp_path / "a", halves))
    if is_known:
        assert torch.equal(found["lm_head.weight"], random(10, 8))
        assert told["tie_word_embeddings"] is False
    else:
        assert (found, "may be tied to other weights" in told) == (4, True)


@pytest.mark.parametrize(("class_name", "is_taken"), [("GPT2LMHeadModel", True), ("", True), ("LlamaModel", False)])
def test_only_a_conv1d_is_turned(class_name: str, is_taken: bool, merge: Any, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"h.0.mlp.c_fc.weight": random(8, 6)}, class_name)
    added = pair("h.0.mlp.c_fc", 6, 8)
    found, told = merge(base, write_peft(tmp_path / "a", added))
    if is_taken:
        expected = random(8, 6) + delta(added, "h.0.mlp.c_fc").T
        assert torch.allclose(found["h.0.mlp.c_fc.weight"], expected, atol=1e-6)
    else:
        assert (found, "for another base" in told) == (2, True)


# Single files, which have the names of the trainer, and an adapter in Diffusers' names: its modules, which rows each
# has of which weight, and how many that has.
FILES: dict[str, tuple[dict[str, tuple[str, slice]], int]] = {
    "Stable Diffusion 1": (
        {
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
                "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q", slice(4),
            ),
            "text_encoder.text_model.encoder.layers.0.mlp.fc1": (
                "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1", slice(4),
            ),
        },
        4,
    ),
    "Flux": (
        {
            "transformer.transformer_blocks.0.attn.to_q": ("double_blocks.0.img_attn.qkv", slice(4)),
            "transformer.transformer_blocks.0.attn.to_v": ("double_blocks.0.img_attn.qkv", slice(8, 12)),
        },
        12,
    ),
    "Stable Diffusion 3": (
        {
            "transformer.transformer_blocks.0.attn.to_k": (
                "model.diffusion_model.joint_blocks.0.x_block.attn.qkv", slice(4, 8),
            ),
            "text_encoder.text_model.encoder.layers.0.mlp.fc1": (
                "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1", slice(12),
            ),
        },
        12,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_names_of_diffusers_in_a_single_file(name: str, merge: Any, tmp_path: Path) -> None:
    modules, rows = FILES[name]
    width = 1536 if name.endswith("3") else 3072
    state = {f"{whole}.weight": random(rows, width) for whole, _ in modules.values()}
    base = tmp_path / "model.safetensors"
    save_file(state, base)
    expected = dict(state)
    added: State = {}
    for module, (whole, some) in modules.items():
        one = pair(module, len(range(*some.indices(rows))), width)
        more = torch.zeros(rows, width)
        more[some] = delta(one, module)
        added |= one
        expected[f"{whole}.weight"] = expected[f"{whole}.weight"] + more
    save_file(added, tmp_path / "lora.safetensors")
    found, told = merge(base, tmp_path / "lora.safetensors")
    assert not isinstance(found, int), told
    for key, values in found.items():
        assert torch.allclose(values, expected[key], atol=1e-5)


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_alphas_come_back_as_they_were(to: str, wconv: Callable[..., Any], tmp_path: Path) -> None:
    alphas = {
        "down": torch.tensor(4, dtype=torch.int16), "mid": torch.tensor([4], dtype=torch.uint8), "up": None,
        "te": torch.tensor([[0.5]], dtype=torch.float16),
    }  # fmt: skip
    names = {"down": "unet_down_blocks_0", "mid": "unet_mid_block", "up": "unet_up_blocks_1"}
    state: State = {}
    for key, alpha in alphas.items():
        name = (
            f"lora_{names[key]}_attentions_0_proj_in" if key in names else "lora_te_text_model_encoder_layers_0_mlp_fc1"
        )
        state |= {f"{name}.lora_down.weight": random(2, 8), f"{name}.lora_up.weight": random(8, 2)}
        state |= {f"{name}.alpha": alpha} if alpha is not None else {}
    save_file(state, tmp_path / "lora.safetensors")
    there = tmp_path / ("there" if to == "peft" else "there.safetensors")
    wconv("convert-lora", tmp_path / "lora.safetensors", "--to", to, "-o", there)
    wconv("convert-lora", there, "--to", "kohya", "-o", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == state.keys()
    for name, values in state.items():
        assert (back[name].dtype, back[name].shape) == (values.dtype, values.shape)
        assert torch.equal(back[name], values)


def test_what_is_said_of_a_base_that_lacks_some(wconv: Callable[..., Any], tmp_path: Path) -> None:
    clip = "text_model.encoder.layers.0.mlp.fc1"
    added = {**pair("unet.conv_in", 8, 8), **pair(f"text_encoder_2.{clip}", 8, 8)}
    save_file(added, tmp_path / "lora.safetensors")
    unet, of_clip = {"model.diffusion_model.input_blocks.0.0.weight": random(8, 8)}, "conditioner.embedders.1.model.ln"
    save_file(unet, tmp_path / "unet.safetensors")
    save_file({**unet, f"{of_clip}.weight": random(8)}, tmp_path / "xl.safetensors")
    says = {
        "lora": "The base is an adapter itself", "xl": "make a pipeline of it first, with 'wconv to-diffusers'",
        "unet": "It is for text_encoder_2 too: name the folder of a pipeline",
    }  # fmt: skip
    for base, words in says.items():
        source = tmp_path / f"{base}.safetensors"
        told = wconv("merge-lora", source, tmp_path / "lora.safetensors", "-o", tmp_path / "out", exit_code=2)
        assert words in told.stderr


def test_an_adapter_is_not_written_over(wconv: Callable[..., Any], tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {f"{Q}.weight": random(6, 8)}, "LlamaForCausalLM")
    folder = tmp_path / "loras"
    folder.mkdir()
    save_file(pair(Q, 6, 8), folder / "model.safetensors")
    told = wconv("merge-lora", base, folder / "model.safetensors", "-o", folder, "--overwrite", exit_code=2)
    assert "is an adapter that is to be merged, or holds it" in told.stderr


def test_an_alpha_of_zero_is_two_things(wconv: Callable[..., Any], tmp_path: Path) -> None:
    name = "lora_unet_mid_block_attentions_0_proj_in"
    state = {f"{name}.lora_down.weight": random(2, 8), f"{name}.lora_up.weight": random(8, 2)}
    save_file({**state, f"{name}.alpha": torch.tensor(0.0)}, tmp_path / "lora.safetensors")
    new = tmp_path / "new.safetensors"
    told = wconv("convert-lora", tmp_path / "lora.safetensors", "--to", "diffusers", "-o", new, exit_code=4)
    assert "of 0, which some programs take for the rank" in told.stderr
    folder = write_peft(tmp_path / "a", pair("mid_block.attentions.0.proj_in", 8, 8), lora_alpha=0)
    told = wconv("convert-lora", folder, "--to", "kohya", "-o", new, exit_code=4)
    assert "has an alpha of 0" in told.stderr


def test_comfyui_names_text_encoders_too(wconv: Callable[..., Any], tmp_path: Path) -> None:
    clip = "text_model.encoder.layers.0.mlp.fc1"
    added = pair("diffusion_model.double_blocks.0.img_attn.proj", 3072, 3072)
    added |= pair(f"text_encoders.clip_l.transformer.{clip}", 8, 8)
    save_file(added, tmp_path / "lora.safetensors")
    wconv("convert-lora", tmp_path / "lora.safetensors", "--to", "diffusers", "-o", tmp_path / "new.safetensors")
    new = {name.removesuffix(".lora_A.weight") for name in load_file(tmp_path / "new.safetensors")}
    assert {"transformer.transformer_blocks.0.attn.to_out.0", f"text_encoder.{clip}"} < new


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_double_blocks_19_img_attn_qkv",
        "lora_unet_single_blocks_38_linear2",
        "transformer_blocks.59.attn.to_q",
    ],
)
def test_more_blocks_than_flux_has(name: str, wconv: Callable[..., Any], tmp_path: Path) -> None:
    # HunyuanVideo and Qwen-Image have the same names.
    ends = ("lora_A", "lora_B") if "." in name else ("lora_down", "lora_up")
    halves = {f"{name}.{ends[0]}.weight": random(2, 3072), f"{name}.{ends[1]}.weight": random(9216, 2)}
    save_file(halves, tmp_path / "lora.safetensors")
    source, new = tmp_path / "lora.safetensors", tmp_path / "new"
    assert "for another model" in wconv("convert-lora", source, "--to", "peft", "-o", new, exit_code=4).stderr


def test_a_scale_is_not_guessed(merge: Any, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {f"{Q}.weight": random(6, 8)}, "LlamaForCausalLM")
    save_file(pair(Q, 6, 8), tmp_path / "lora.safetensors")
    code, said = merge(base, tmp_path / "lora.safetensors")
    assert (code, "has not the names of PEFT" in said) == (4, True)


# What PEFT calls the modules of models of images and words since version 4.52 of transformers, and their files.
VLMS = {
    "LlavaForConditionalGeneration": {
        "model.language_model.layers.0.q_proj": "language_model.model.layers.0.q_proj",
        "model.vision_tower.layers.0.q_proj": "vision_tower.layers.0.q_proj",
    },
    "Qwen2_5_VLForConditionalGeneration": {
        "model.language_model.layers.0.q_proj": "model.layers.0.q_proj",
        "model.visual.blocks.0.attn.qkv": "visual.blocks.0.attn.qkv",
    },
}  # fmt: skip


@pytest.mark.parametrize("class_name", VLMS)
def test_models_of_images_and_words(class_name: str, merge: Any, tmp_path: Path) -> None:
    names = VLMS[class_name]
    state = {f"{name}.weight": random(6, 8, seed=at) for at, name in enumerate(names.values())}
    state["mm_soft_emb_norm.weight"] = random(8)
    base = write_base(tmp_path / "base", state, class_name, tie_word_embeddings=False)
    added = {key: one for name in names for key, one in pair(name, 6, 8).items()}
    found, told = merge(base, write_peft(tmp_path / "a", added))
    assert not isinstance(found, int), told
    for name, own in names.items():
        assert torch.allclose(found[f"{own}.weight"], state[f"{own}.weight"] + delta(added, name), atol=1e-5)
    code, said = merge(base, write_peft(tmp_path / "b", pair("model.audio_tower.q_proj", 6, 8)))
    assert (code, "It may be for another base" in said) == (2, True)


def test_folders_of_peft_for_each_part(wconv: Callable[..., Any], tmp_path: Path) -> None:
    # Both text encoders have the modules of either; how wide they are, or the folder's name, tells which is meant.
    base, fc1 = tmp_path / "base", "text_model.encoder.layers.0.mlp.fc1"
    parts = {"text_encoder": 8, "text_encoder_2": 12, "text_encoder_3": 12}
    index = {part: ["transformers", "CLIPTextModelWithProjection"] for part in parts}
    states = {part: {f"{fc1}.weight": random(width, 8)} for part, width in parts.items()}
    added = {part: pair(fc1, width, 8) for part, width in parts.items()}
    for part in parts:
        write_base(base / part, states[part], "CLIPTextModelWithProjection")
        write_peft(tmp_path / "lora" / part, added[part])
    write_json(base / "model_index.json", {"_class_name": "StableDiffusion3Pipeline", **index})
    told = wconv("merge-lora", base, tmp_path / "lora", "-o", tmp_path / "out")
    assert "merged: lora/text_encoder_3, weight 1" in told.stdout
    for part in parts:
        found = load_file(tmp_path / "out" / part / "model.safetensors")[f"{fc1}.weight"]
        assert torch.allclose(found, states[part][f"{fc1}.weight"] + delta(added[part], fc1), atol=1e-6)
    write_peft(tmp_path / "two", added["text_encoder_2"])
    told = wconv("merge-lora", base, tmp_path / "two", "-o", tmp_path / "x", exit_code=2)
    assert "may be for each of text_encoder_2 and text_encoder_3" in told.stderr


@pytest.mark.slow
@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_cut_of_any_shape_gives_the_same_bits(data: Any) -> None:
    height, width = data.draw(st.integers(1, 300)), data.draw(st.one_of(st.integers(1, 70), st.integers(1000, 40000)))
    height = min(height, 600_000 // width + 1)
    ranks = data.draw(st.lists(st.integers(1, 130), min_size=1, max_size=3))
    seed = data.draw(st.integers(0, 1000))

    def constant(*shape: int) -> Constant:
        return Constant(DTYPES["F32"], shape, raw_bytes(random(*shape, seed=seed)))

    weight = random(height, width, seed=seed).bfloat16()
    products = [
        Product(held(Factor(constant(height, rank), "B", 0.3)), Factor(constant(rank, width), "A")) for rank in ranks
    ]
    source = merged(Constant(DTYPES["BF16"], (height, width), raw_bytes(weight)), products)

    def read(begin: int, end: int) -> bytes:
        out = bytearray(end - begin)
        one = source.part(begin, end) if data.draw(st.booleans()) else source
        with RangeReader() as reader:
            one.read(begin, memoryview(out), reader)
        return bytes(out)

    nbytes = 4 * height * width
    whole = read(0, nbytes)
    for _ in range(4):
        begin = data.draw(st.integers(0, nbytes // 4 - 1))
        end = data.draw(st.integers(begin + 1, nbytes // 4))
        assert read(4 * begin, 4 * end) == whole[4 * begin : 4 * end]

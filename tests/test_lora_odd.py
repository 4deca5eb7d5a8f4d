"""LoRAs that are odd, and bases that are: what PEFT and trainers write beside the usual, and what is made up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import write_json

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

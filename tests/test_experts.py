"""Experts fused and separate: what transformers writes in the one form is made of what it writes in the other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from support.tiny import State, assert_same, load_set, save, save_shards, write_json
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from converter.errors import BadFile, BadRequest, Unsupported
from converter.recipes.convert import convert
from converter.transforms.layouts.experts import FAMILIES

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TINY: dict[str, Any] = {
    **dict.fromkeys(COUNTS, 3),
    **dict.fromkeys(("moe_k", "moe_topk", "num_experts_per_tok", "topk_group"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads", "index_n_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 24,
    "intermediate_size": 12,
    "head_dim": 8,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "index_head_dim": 16,
    "index_topk": 8,
}
SOME_LINEAR = ["linear_attention", "full_attention", "full_attention"]
MORE: dict[str, dict[str, Any]] = {
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4},
    "lfm2_moe": {"layer_types": ["conv", *SOME_LINEAR[1:]], "num_dense_layers": 1},
    "minimax": {"layer_types": SOME_LINEAR, "block_size": 8},
    "qwen3_next": {"layer_types": SOME_LINEAR},
    "qwen3_5_moe_text": {"layer_types": SOME_LINEAR},
    "qwen3_5_moe": {"layer_types": SOME_LINEAR},
    "mimo_v2_flash": {"num_attention_heads": 4},
    "dots1": {"n_shared_experts": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0},
}
SEEING = ("glm4v_moe", "qwen3_5_moe")
VISION = {"depth": 1, "num_heads": 2, "num_position_embeddings": 16, "patch_size": 4, "out_hidden_size": 16}
FAST = ("mixtral", "deepseek_v3")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """Give a model of a type, and a folder with it in both forms; it is made once."""
    known: dict[str, tuple[Any, Path]] = {}

    def make(kind: str) -> tuple[Any, Path]:
        if kind not in known:
            torch.manual_seed(0)
            tiny = {**TINY, **MORE.get(kind, {})}
            if "deepseek" in kind or kind in ("axk1", "glm4_moe_lite", "glm_moe_dsa"):
                tiny.pop("head_dim")  # it is that of what is rotated
            if kind in SEEING:
                rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}
                vision = {**VISION, "hidden_size": 16, "intermediate_size": 16}
                tiny = {"text_config": {**tiny, "rope_parameters": rope}, "vision_config": vision}
            maker = AutoModelForImageTextToText if kind in SEEING else AutoModelForCausalLM
            model = maker.from_config(CONFIG_MAPPING[kind](**tiny)).eval()
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
            folder = tmp_path_factory.mktemp(kind)
            model.save_pretrained(folder / "separate")
            model.save_pretrained(folder / "fused", save_original_format=False)
            known[kind] = model, folder
        return known[kind]

    return make


@pytest.mark.parametrize(
    "kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in FAMILIES]
)
def test_transformers_loads_both_forms_and_writes_the_same(
    made: Callable[[str], tuple[Any, Path]], tmp_path: Path, kind: str
) -> None:
    model, folder = made(kind)
    tokens = torch.arange(3, 9)[None]
    for form, other in (("fused", "separate"), ("separate", "fused")):
        convert(folder / other, tmp_path / form, experts=form)
        written, expected = (one / "model.safetensors" for one in (tmp_path / form, folder / form))
        assert written.read_bytes() == expected.read_bytes()
        loaded = type(model).from_pretrained(tmp_path / form).eval()
        with torch.no_grad():
            assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("ext", ["safetensors", "bin"])
def test_experts_of_several_shards_come_into_the_first_s(
    wconv: Callable[..., Any], made: Callable[[str], tuple[Any, Path]], tmp_path: Path, ext: str
) -> None:
    _, folder = made("mixtral")
    state = load_file(folder / "separate" / "model.safetensors")
    names = sorted(state)
    parts = [names[at::3] for at in range(3)]
    stem = "model" if ext == "safetensors" else "pytorch_model"
    save_shards(state, tmp_path / "s", parts, f"{stem}-{{:05d}}-of-{{:05d}}.{ext}", f"{stem}.{ext}.index.json")
    shutil.copy(folder / "separate" / "config.json", tmp_path / "s")
    wconv("to-safetensors", tmp_path / "s", "-o", tmp_path / "fused", "--experts", "fused")
    assert_same(load_set(tmp_path / "fused"), load_file(folder / "fused" / "model.safetensors"))
    wconv("reshard", tmp_path / "fused", "-o", tmp_path / "back", "--experts", "separate", "--max-shard-size", "9KB")
    assert_same(load_set(tmp_path / "back"), state)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:.*TypedStorage")
def test_a_training_checkpoint_is_written_as_vllm_reads_it(
    wconv: Callable[..., Any], made: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    model, folder = made("mixtral")
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "step-1", no_dist=True)
    options = ("--experts", "separate", "--config", folder / "separate")
    wconv("to-safetensors", tmp_path / "step-1", "-o", tmp_path / "out", *options)
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), load_file(folder / "separate" / "model.safetensors"))


def test_a_vision_model_s_experts_lie_deeper(tmp_path: Path) -> None:
    layer = "model.language_model.layers.1.mlp.experts"
    state = {f"{layer}.gate_up_proj": torch.rand(2, 6, 4), f"{layer}.down_proj": torch.rand(2, 4, 3)}
    save(state, tmp_path / "vl" / "model.safetensors")
    text = {"model_type": "glm4v_moe_text", "n_routed_experts": 2}
    write_json(tmp_path / "vl" / "config.json", {"model_type": "glm4v_moe", "text_config": text})
    convert(tmp_path / "vl", tmp_path / "out", experts="separate")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written[f"{layer}.1.up_proj.weight"], state[f"{layer}.gate_up_proj"][1, 3:])
    convert(tmp_path / "out", tmp_path / "back", experts="fused")
    assert_same(load_file(tmp_path / "back" / "model.safetensors"), state)


def test_what_is_so_already_is_said(made: Callable[[str], tuple[Any, Path]], tmp_path: Path) -> None:
    _, folder = made("mixtral")
    result = convert(folder / "fused", tmp_path / "out", experts="fused")
    assert result.plan is not None
    assert "its experts are fused already" in result.plan.sets[0].notes


def test_an_option_of_python_is_held_against_its_values(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="no form of experts"):
        convert(tmp_path, tmp_path / "out", experts="merged")


EXPERT = "model.layers.1.block_sparse_moe.experts"
FUSED = "model.layers.1.mlp.experts"
Change = Callable[[State, dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda state, _: state.pop(f"{EXPERT}.1.w3.weight"), BadFile, "lacks .*1.w3.weight"),
        (lambda state, _: [state.pop(f"{EXPERT}.2.{one}.weight") for one in ("w1", "w2", "w3")], BadFile, "says 3"),
        (lambda state, _: [state.pop(f"{EXPERT}.{e}.w2.weight") for e in range(3)], BadFile, "lacks down_proj"),
        (lambda state, _: state.update({f"{EXPERT}.1.w1.weight": torch.rand(5, 16)}), BadFile, "do not fit"),
        (lambda state, _: state.update({f"{EXPERT}.1.w1.weight": torch.rand(12, 16).half()}), BadFile, "Recast"),
        (lambda state, _: state.update({f"{EXPERT}.01.w1.weight": torch.rand(12, 16)}), Unsupported, "no such tensor"),
        (lambda state, _: state.update({f"{EXPERT}.1.w1.bias": torch.rand(12)}), Unsupported, "no such tensor"),
        (lambda state, _: state.update({f"{FUSED}.down_proj": torch.rand(3, 16, 12)}), BadFile, "others that are not"),
        (
            lambda state, _: state.update({"model.layers.1.mlp.gate.weight": torch.rand(3, 16)}),
            BadFile,
            "would be called",
        ),
        (
            lambda state, _: state.update(
                {
                    f"{EXPERT}.1.w1.weight": torch.zeros(12, 16, dtype=torch.float8_e4m3fn),
                    f"{EXPERT}.1.w1.weight_scale_inv": torch.ones(1, 1),
                }
            ),
            Unsupported,
            "quantized experts.*wconv dequantize",
        ),
        (lambda _, config: config.update(num_local_experts=0), BadFile, "num_local_experts 0"),
        (lambda _, config: config.update(num_local_experts="3"), BadFile, "num_local_experts '3'"),
        (lambda _, config: config.update(num_local_experts=10**9), BadFile, "num_local_experts 1000000000"),
        (lambda _, config: config.pop("num_local_experts"), BadFile, "does not say how many experts"),
        (lambda _, config: config.update(num_experts=4), BadFile, "two numbers of experts"),
        (lambda _, config: config.update(model_type="gpt_oss"), Unsupported, "gpt_oss, whose experts are one tensor"),
        (lambda _, config: config.update(model_type="llama"), Unsupported, "'llama', whose experts"),
        (lambda _, config: config.pop("model_type"), BadRequest, "--config"),
        (lambda state, _: [state.pop(name) for name in list(state) if "expert" in name], Unsupported, "no experts"),
    ],
)
def test_what_is_not_whole_is_refused(
    made: Callable[[str], tuple[Any, Path]], tmp_path: Path, change: Change, error: type[Exception], words: str
) -> None:
    _, folder = made("mixtral")
    state = load_file(folder / "separate" / "model.safetensors")
    config = {"model_type": "mixtral", "num_local_experts": 3}
    change(state, config)
    save(state, tmp_path / "m" / "model.safetensors")
    write_json(tmp_path / "m" / "config.json", config)
    with pytest.raises(error, match=words):
        convert(tmp_path / "m", tmp_path / "out", experts="fused")


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((3, 8, 12), (3, 6, 8)), "shapes 3x8x12 and 3x6x8"),
        (((3, 8), (3, 6, 8)), "shapes 3x8 and"),
        (((2, 12, 8), (3, 8, 6)), "holds 2 and 3 experts"),
        (((), (3, 8, 6)), "shapes one number|shapes  and"),
    ],
)
def test_experts_in_other_shapes_are_refused(tmp_path: Path, shapes: tuple[tuple[int, ...], ...], words: str) -> None:
    outer, inner = (torch.zeros(shape) for shape in shapes)
    save({f"{FUSED}.gate_up_proj": outer, f"{FUSED}.down_proj": inner}, tmp_path / "m" / "model.safetensors")
    write_json(tmp_path / "m" / "config.json", {"model_type": "qwen2_moe", "num_experts": 3})
    with pytest.raises((BadFile, Unsupported), match=words):
        convert(tmp_path / "m", tmp_path / "out", experts="separate")


def test_the_config_stays(made: Callable[[str], tuple[Any, Path]], tmp_path: Path) -> None:
    _, folder = made("mixtral")
    convert(folder / "separate", tmp_path / "out", experts="fused")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (folder / "separate" / "config.json").read_text()
    )

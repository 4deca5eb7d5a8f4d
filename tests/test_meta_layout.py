"""Llama under the names and in the rows of Meta's code, and of transformers: both give the same numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from support.tiny import State, assert_same, load_set, save, write_json
from transformers import LlamaConfig, LlamaForCausalLM

from converter.errors import BadFile, BadRequest, Unsupported
from converter.recipes.convert import convert

HEADS, GROUPS, LENGTH, DIM, THETA = 4, 2, 8, 32, 10000.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Path]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        intermediate_size=48,
        num_hidden_layers=2,
        vocab_size=40,
    )
    made = LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("llama") / "hf"
    made.save_pretrained(folder)
    return made, folder


def forward(state: State, tokens: torch.Tensor) -> torch.Tensor:
    """Give the logits of Meta's Llama: numbers are rotated in pairs, as complex ones."""

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * state[name]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * angles[:, None]).flatten(2)

    count = len(tokens)
    steps = 1 / THETA ** (torch.arange(0, LENGTH, 2).float() / LENGTH)
    angles = torch.polar(torch.ones(count, LENGTH // 2), torch.outer(torch.arange(count).float(), steps))
    h = state["tok_embeddings.weight"][tokens]
    for layer in range(2):
        at = f"layers.{layer}"
        x = normed(h, f"{at}.attention_norm.weight")
        q, k, v = (x @ state[f"{at}.attention.w{one}.weight"].T for one in "qkv")
        q, k, v = (one.view(count, -1, LENGTH) for one in (q, k, v))
        q, k = rotated(q), rotated(k)
        k, v = (one.repeat_interleave(HEADS // GROUPS, 1) for one in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) / LENGTH**0.5
        scores += torch.full((count, count), float("-inf")).triu(1)
        h = h + torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1) @ state[f"{at}.attention.wo.weight"].T
        x = normed(h, f"{at}.ffn_norm.weight")
        gate, up = (x @ state[f"{at}.feed_forward.{one}.weight"].T for one in ("w1", "w3"))
        h = h + (torch.nn.functional.silu(gate) * up) @ state[f"{at}.feed_forward.w2.weight"].T
    return normed(h, "norm.weight") @ state["output.weight"].T


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """As ``permute`` of convert_llama_weights_to_hf.py has it."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def to_meta(source: Path, out: Path, **options: Any) -> State:
    convert(source, out, layout="meta", **options)
    return load_file(out / "consolidated.safetensors")


def test_meta_s_code_computes_the_same(model: tuple[LlamaForCausalLM, Path], tmp_path: Path) -> None:
    made, folder = model
    state = to_meta(folder, tmp_path / "meta")
    hf = load_file(folder / "model.safetensors")
    assert torch.equal(
        permute(state["layers.1.attention.wk.weight"], GROUPS), hf["model.layers.1.self_attn.k_proj.weight"]
    )
    tokens = torch.tensor([3, 1, 4, 1, 5, 9])
    with torch.no_grad():
        torch.testing.assert_close(forward(state, tokens), made(tokens[None]).logits[0], rtol=1e-4, atol=1e-5)
    assert not (tmp_path / "meta" / "model.safetensors").exists()  # which transformers would take for its own
    convert(tmp_path / "meta", tmp_path / "back", layout="transformers")
    back = tmp_path / "back" / "model.safetensors"
    assert back.read_bytes() == (folder / "model.safetensors").read_bytes()


def test_consolidated_becomes_what_transformers_finds(model: tuple[LlamaForCausalLM, Path], tmp_path: Path) -> None:
    made, folder = model
    state = to_meta(folder, tmp_path / "meta")
    source = tmp_path / "llama" / "consolidated.00.pth"
    save({**state, "rope.freqs": torch.rand(LENGTH // 2)}, source)
    write_json(source.parent / "params.json", {"dim": DIM, "n_heads": HEADS, "n_kv_heads": GROUPS, "n_layers": 2})
    result = convert(source.parent, tmp_path / "bare", layout="transformers")
    assert result.plan is not None
    notes = "\n".join(note for one in result.plan.sets for note in one.notes)
    assert "rope.freqs" in notes
    assert "--config" in notes
    assert_same(load_file(tmp_path / "bare" / "model.safetensors"), load_file(folder / "model.safetensors"))
    convert(source, tmp_path / "whole", layout="transformers", config=folder)
    tokens = torch.tensor([[2, 7, 1]])
    with torch.no_grad():
        assert torch.equal(
            LlamaForCausalLM.from_pretrained(tmp_path / "whole").eval()(tokens).logits, made(tokens).logits
        )


def test_names_of_meta_are_said_where_no_layout_is_asked_for(
    model: tuple[LlamaForCausalLM, Path], tmp_path: Path, wconv: Any
) -> None:
    to_meta(model[1], tmp_path / "meta")
    source = tmp_path / "meta" / "consolidated.safetensors"
    told = wconv("recast", source, "--dtype", "bf16", "-o", tmp_path / "b.safetensors").stdout
    assert "its names are Meta's: 'wconv to-safetensors --layout transformers' gives it those of transformers" in told


def test_tied_embeddings_are_the_head_too(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=8,
        num_attention_heads=2,
        intermediate_size=8,
        num_hidden_layers=1,
        vocab_size=8,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    state = to_meta(tmp_path / "hf", tmp_path / "meta")
    assert torch.equal(state["output.weight"], state["tok_embeddings.weight"])
    convert(tmp_path / "meta", tmp_path / "back", layout="transformers")
    assert LlamaForCausalLM.from_pretrained(tmp_path / "back").lm_head.weight.shape == (8, 8)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"num_attention_heads": 0}, BadFile, "num_attention_heads 0"),
        ({"num_attention_heads": "8"}, BadFile, "num_attention_heads '8'"),
        ({"num_attention_heads": 10**9}, BadFile, "num_attention_heads 1000000000"),
        ({"num_attention_heads": None}, BadFile, "does not say num_attention_heads"),
        ({"num_key_value_heads": 4}, BadFile, "says 4 heads of 8"),
        ({"num_attention_heads": 2, "head_dim": None}, BadFile, "says 2 heads"),
        ({"head_dim": True}, BadFile, "head_dim True"),
        ({"model_type": "qwen2"}, Unsupported, "'qwen2'"),
        ({"model_type": ["llama"]}, Unsupported, "llama"),
    ],
)
def test_heads_that_do_not_fit_are_refused(
    model: tuple[LlamaForCausalLM, Path], tmp_path: Path, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    config = json.loads((model[1] / "config.json").read_text()) | changes
    write_json(tmp_path / "m" / "config.json", config)
    (tmp_path / "m" / "model.safetensors").write_bytes((model[1] / "model.safetensors").read_bytes())
    with pytest.raises(error, match=words):
        convert(tmp_path / "m", tmp_path / "out", layout="meta")


def test_what_is_not_all_of_a_model_is_refused(model: tuple[LlamaForCausalLM, Path], tmp_path: Path) -> None:
    state = load_file(model[1] / "model.safetensors")
    source = tmp_path / "m" / "consolidated.00.pth"
    save({"tok_embeddings.weight": state["lm_head.weight"]}, source)
    with pytest.raises(BadRequest, match="--config"):
        convert(source, tmp_path / "out", layout="transformers")
    with pytest.raises(BadRequest, match="--in-place"):
        convert(source.parent, layout="transformers", in_place=True)
    save({}, source.parent / "consolidated.01.pth")
    with pytest.raises(Unsupported, match="slices of the same tensors"):
        convert(source, tmp_path / "out", layout="transformers")
    write_json(tmp_path / "odd" / "config.json", json.loads((model[1] / "config.json").read_text()))
    for more, words in (("norm.weight", "two layouts"), ("layers.0.attention.wq.bias", "wq.bias")):
        save({**state, more: torch.rand(DIM)}, tmp_path / "odd" / "model.safetensors")
        with pytest.raises((BadFile, Unsupported), match=words):
            convert(tmp_path / "odd", tmp_path / "out", layout="transformers")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:.*TypedStorage")
def test_what_torchtitan_has_trained_is_written_for_transformers(
    wconv: Callable[..., Any], model: tuple[LlamaForCausalLM, Path], tmp_path: Path
) -> None:
    _, folder = model
    state = to_meta(folder, tmp_path / "meta")
    dcp.save({**state, "freqs_cis": torch.rand(4, 4)}, checkpoint_id=tmp_path / "step-10", no_dist=True)
    options = ("--layout", "transformers", "--config", folder)
    ran = wconv("to-safetensors", tmp_path / "step-10", "-o", tmp_path / "out", *options)
    assert "left out, as it is computed again where it is loaded: freqs_cis" in ran.stdout
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_shards_and_pickles_have_their_names(
    wconv: Callable[..., Any], model: tuple[LlamaForCausalLM, Path], tmp_path: Path
) -> None:
    _, folder = model
    expected = load_file(folder / "model.safetensors")
    wconv("reshard", folder, "-o", tmp_path / "meta", "--layout", "meta", "--max-shard-size", "30KB")
    assert (tmp_path / "meta" / "consolidated.safetensors.index.json").exists()
    wconv("to-safetensors", tmp_path / "meta", "-o", tmp_path / "back", "--layout", "transformers")
    assert_same(load_set(tmp_path / "back"), expected)
    save(expected, tmp_path / "bin" / "pytorch_model.bin")
    write_json(tmp_path / "bin" / "config.json", json.loads((folder / "config.json").read_text()))
    wconv("reshard", tmp_path / "bin", "-o", tmp_path / "pth", "--layout", "meta", "--max-shard-size", "none")
    wconv("reshard", tmp_path / "pth", "-o", tmp_path / "again", "--layout", "transformers", "--max-shard-size", "none")
    assert_same(torch.load(tmp_path / "pth" / "consolidated.00.pth"), load_set(tmp_path / "meta", "consolidated"))
    assert_same(torch.load(tmp_path / "again" / "pytorch_model.bin"), expected)


def test_names_that_are_asked_for_come_first(
    wconv: Callable[..., Any], model: tuple[LlamaForCausalLM, Path], tmp_path: Path
) -> None:
    _, folder = model
    state = {f"net.{name}": value for name, value in load_file(folder / "model.safetensors").items()}
    save(state, tmp_path / "net" / "model.safetensors")
    write_json(tmp_path / "net" / "config.json", json.loads((folder / "config.json").read_text()))
    options = ("--strip-prefix", "net.", "--layout", "meta", "--dry-run")
    ran = wconv("to-safetensors", tmp_path / "net", "-o", tmp_path / "out", *options)
    assert "net.lm_head.weight -> output.weight" in ran.stdout


@pytest.mark.parametrize("lacking", ["output.weight", "lm_head.weight"])
def test_a_head_that_is_not_there_is_missed(model: tuple[LlamaForCausalLM, Path], tmp_path: Path, lacking: str) -> None:
    folder = model[1]
    layout = "meta"
    if lacking == "output.weight":
        to_meta(folder, tmp_path / "meta")
        folder, layout = tmp_path / "meta", "transformers"
    [path] = folder.glob("*.safetensors")
    state = load_file(path)
    del state[lacking]
    save(state, tmp_path / "m" / path.name)
    write_json(tmp_path / "m" / "config.json", json.loads((folder / "config.json").read_text()))
    with pytest.raises(BadFile, match=f"holds no {lacking}"):
        convert(tmp_path / "m", tmp_path / "out", layout=layout)

"""LoRAs merged into a base: held against float64 and PEFT, the same however it is cut, and what is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import raw_bytes, save, write_json

from converter.cli import main
from converter.cli.merge_lora import _Weighted
from converter.dtypes import DTYPES
from converter.tensors.base import TensorSource
from converter.tensors.derived import Constant
from converter.tensors.reader import RangeReader
from converter.transforms.merge.product import Factor, Product, merged

State = dict[str, torch.Tensor]
BITS = {torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
Q, HEAD, EMBED = "model.layers.0.self_attn.q_proj", "lm_head", "model.embed_tokens"


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def write_base(folder: Path, state: State | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True)
    state = state or {
        f"{Q}.weight": random(6, 8, dtype=torch.bfloat16),
        f"{HEAD}.weight": random(10, 8, dtype=torch.bfloat16),
        f"{EMBED}.weight": random(10, 8, dtype=torch.bfloat16, seed=1),
        "model.norm.weight": random(8, dtype=torch.bfloat16),
    }
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", {**LLAMA, **config})
    return folder


def write_peft(folder: Path, state: State, **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file({f"base_model.model.{name}": one for name, one in state.items()}, folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 3, **config})
    return folder


def pair(module: str, out: int, inner: int, rank: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> State:
    return {
        f"{module}.lora_A.weight": random(rank, inner, seed=seed, dtype=dtype),
        f"{module}.lora_B.weight": random(out, rank, seed=seed + 1, dtype=dtype),
    }


def delta(state: State, module: str, scale: float) -> torch.Tensor:
    return scale * (state[f"{module}.lora_B.weight"].double() @ state[f"{module}.lora_A.weight"].double())


def step_at(top: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Give the distance between numbers of a dtype that are as large as these."""
    return torch.exp2(torch.floor(torch.log2(top.abs().clamp_min(2.0**-14))) - BITS[dtype])


def assert_rounded(found: torch.Tensor, expected: torch.Tensor, base: torch.Tensor, steps: float = 0.51) -> None:
    """Hold numbers against exact ones: at most so many roundings of the largest number that went into them apart.

    And what a sum in float32 may be off by.
    """
    before, exact = base.double(), expected.double()
    top = torch.maximum(torch.maximum(before.abs(), (exact - before).abs()), exact.abs())
    allowed = steps * step_at(top, found.dtype) + 1e-6 * top.max()
    assert ((found.double() - exact).abs() <= allowed).all()


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    code = main(["merge-lora", *map(str, args)])
    said = capsys.readouterr()
    return code, said.out + said.err


# The source.


def constant(values: torch.Tensor) -> Constant:
    return Constant(DTYPES["F32"], tuple(values.shape), raw_bytes(values))


def read_in(source: TensorSource, nbytes: int, size: int, as_part: bool = False) -> bytes:
    out = bytearray(nbytes)
    for begin in range(0, nbytes, size):
        end = min(nbytes, begin + size)
        one = source.part(begin, end) if as_part else source
        with RangeReader() as reader:
            one.read(begin, memoryview(out)[begin:end], reader)
    return bytes(out)


@pytest.mark.parametrize(("shape", "rank"), [((70, 1100), 100), ((5, 17000), 17), ((3000, 3), 5), ((5, 2, 3, 3), 2)])
def test_all_cuts_give_the_same_bits(shape: tuple[int, ...], rank: int) -> None:
    # With ranks such as 100 BLAS gives other bits for a block of one or three rows than for more.
    width = math.prod(shape[1:])
    weight, left, right = random(*shape), random(shape[0], rank), random(rank, width)
    products = [Product(Factor(constant(left), "B", 0.5), Factor(constant(right), "A"))]
    source = merged(constant(weight), products)
    nbytes = 4 * weight.numel()
    whole = read_in(source, nbytes, nbytes)
    assert_rounded(
        torch.frombuffer(bytearray(whole), dtype=torch.float32).reshape(shape),
        weight.double() + 0.5 * (left.double() @ right.double()).reshape(shape),
        weight,
    )
    for size in (nbytes // 7 // 4 * 4, 3 * width * 4 + 4):
        if nbytes // size < 30:
            assert read_in(source, nbytes, size) == whole
            assert read_in(source, nbytes, size, as_part=True) == whole


# The command.


def test_each_weight_is_rounded_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_base(tmp_path / "base")
    first, second = pair(Q, 6, 8), {**pair(Q, 6, 8, 3, seed=5), **pair(HEAD, 10, 8, 3, seed=6)}
    a = write_peft(tmp_path / "a", first)
    b = write_peft(tmp_path / "b", second, r=3, use_rslora=True)
    out = tmp_path / "out"
    code, said = run(capsys, base, f"{a}:-0.5", f"{b}:1.25", "-o", out)
    assert code == 0
    assert "merged: a, weight -0.5, rank 2, 1 module" in said
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    scale = 1.25 * 3 / math.sqrt(3)
    expected = before[f"{Q}.weight"].double() + delta(first, Q, -0.5 * 3 / 2) + delta(second, Q, scale)
    assert_rounded(after[f"{Q}.weight"], expected, before[f"{Q}.weight"])
    expected = before[f"{HEAD}.weight"].double() + delta(second, HEAD, scale)
    assert_rounded(after[f"{HEAD}.weight"], expected, before[f"{HEAD}.weight"])
    for name in (f"{EMBED}.weight", "model.norm.weight"):
        assert raw_bytes(after[name]) == raw_bytes(before[name])
    assert json.loads((out / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    # In another order of workers, and in another dtype.
    assert run(capsys, base, f"{a}:-0.5", f"{b}:1.25", "-o", tmp_path / "wide", "--dtype", "fp32")[0] == 0
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    assert {one.dtype for one in wide.values()} == {torch.float32}
    assert torch.equal(wide[f"{Q}.weight"].bfloat16(), after[f"{Q}.weight"])


def test_a_weight_of_zero_merges_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = write_base(tmp_path / "base"), write_peft(tmp_path / "a", pair(Q, 6, 8))
    code, said = run(capsys, base, f"{adapter}:0", "-o", tmp_path / "out")
    assert code == 0
    assert "has the weight 0" in said
    assert (tmp_path / "out/model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


@pytest.mark.parametrize("lacks", [HEAD, None])
def test_what_is_tied_is_untied(lacks: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = random(10, 8)
    state = {f"{EMBED}.weight": words, f"{Q}.weight": random(6, 8), f"{HEAD}.weight": words}
    base = tmp_path / "base"
    if lacks:
        write_base(base, {name: one for name, one in state.items() if not name.startswith(lacks)})
    else:
        write_base(base)
        (base / "model.safetensors").unlink()
        save(state, base / "pytorch_model.bin")  # the same storage twice
    write_json(base / "config.json", {**LLAMA, "tie_word_embeddings": True})
    added = {"lora_embedding_A": random(2, 10), "lora_embedding_B": random(8, 2)}
    stored = {**{f"{EMBED}.{name}": one for name, one in added.items()}, f"{EMBED}.base_layer.weight": words}
    code, said = run(capsys, base, f"{write_peft(tmp_path / 'a', stored)}:0.5", "-o", tmp_path / "out")
    assert code == 0
    assert "no longer tied" in said
    after = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(after[f"{HEAD}.weight"], words)
    expected = words.double() + 0.75 * (added["lora_embedding_B"].double() @ added["lora_embedding_A"].double()).T
    assert_rounded(after[f"{EMBED}.weight"], expected, words)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_names_of_another_class_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # GPT-2's square Conv1D lies [in, out], and its file has the names of the model without a head.
    weight = random(8, 8)
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    base = write_base(tmp_path / "base", {"h.0.attn.c_proj.weight": weight, "wte.weight": random(9, 8)}, **config)
    added = pair("transformer.h.0.attn.c_proj", 8, 8)
    assert run(capsys, base, write_peft(tmp_path / "a", added), "-o", tmp_path / "out")[0] == 0
    after = load_file(tmp_path / "out/model.safetensors")["h.0.attn.c_proj.weight"]
    assert_rounded(after, weight.double() + delta(added, "transformer.h.0.attn.c_proj", 1.5).T, weight)


def test_what_peft_has_beside_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {f"{Q}.weight": random(6, 8), f"{Q}.bias": random(6), f"{HEAD}.weight": random(10, 8)}
    base = write_base(tmp_path / "base", state)
    added = {**pair(Q, 6, 8), f"{Q}.lora_B.bias": random(6, seed=3), f"{HEAD}.weight": random(10, 8, seed=4)}
    adapter = write_peft(tmp_path / "a", added, lora_bias=True, modules_to_save=[HEAD])
    assert run(capsys, base, adapter, "-o", tmp_path / "out")[0] == 0
    after = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(after[f"{HEAD}.weight"], added[f"{HEAD}.weight"])
    expected = state[f"{Q}.bias"].double() + 1.5 * added[f"{Q}.lora_B.bias"].double()
    assert_rounded(after[f"{Q}.bias"], expected, state[f"{Q}.bias"])


def write_pipeline(folder: Path) -> Path:
    """Write what stands for a pipeline: a UNet with a convolution, and a text encoder without ``text_model.``."""
    write_json(folder / "model_index.json", {
        "_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
    })  # fmt: skip
    write_json(folder / "unet/config.json", {"_class_name": "UNet2DConditionModel"})
    write_json(folder / "text_encoder/config.json", {"architectures": ["CLIPTextModel"]})
    unet = {"conv_in.weight": random(4, 3, 3, 3), "down_blocks.0.attentions.0.proj_in.weight": random(5, 4, 1, 1)}
    save_file(unet, folder / "unet/diffusion_pytorch_model.safetensors", {"format": "pt"})
    for variant in ("", ".fp16"):
        text = {"encoder.layers.0.mlp.fc1.weight": random(7, 5).half() if variant else random(7, 5)}
        save_file(text, folder / f"text_encoder/model{variant}.safetensors", {"format": "pt"})
    return folder


def test_kohya_and_diffusers_name_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_pipeline(tmp_path / "base")
    conv, point, text = (
        (random(2, 3, 3, 3), random(4, 2, 1, 1)),
        (random(2, 4), random(5, 2)),
        (random(2, 5), random(7, 2)),
    )
    kohya: State = {}
    diffusers: State = {}
    names = {
        ("unet.conv_in", "lora_unet_conv_in"): conv,
        ("unet.down_blocks.0.attentions.0.proj_in", "lora_unet_down_blocks_0_attentions_0_proj_in"): point,
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "lora_te_text_model_encoder_layers_0_mlp_fc1"): text,
    }
    for (theirs, own), (down, up) in names.items():
        kohya |= {f"{own}.lora_down.weight": down, f"{own}.lora_up.weight": up, f"{own}.alpha": torch.tensor(2.0)}
        diffusers |= {f"{theirs}.lora_A.weight": down, f"{theirs}.lora_B.weight": up}
    save_file(kohya, tmp_path / "k.safetensors")
    save_file(diffusers, tmp_path / "d.safetensors")
    for name in ("k", "d"):
        code, said = run(capsys, base, f"{tmp_path / name}.safetensors:0.5", "-o", tmp_path / f"out_{name}")
        assert code == 0, said
    file = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(base / file), load_file(tmp_path / "out_k" / file)
    added = 0.5 * torch.einsum("or,rihw->oihw", conv[1][..., 0, 0].double(), conv[0].double())
    assert_rounded(after["conv_in.weight"], before["conv_in.weight"].double() + added, before["conv_in.weight"])
    added = 0.5 * (point[1].double() @ point[0].double())[..., None, None]
    name = "down_blocks.0.attentions.0.proj_in.weight"
    assert_rounded(after[name], before[name].double() + added, before[name])
    found = {path.relative_to(tmp_path / "out_k"): path.read_bytes() for path in (tmp_path / "out_k").rglob("*.*")}
    assert found == {
        path.relative_to(tmp_path / "out_d"): path.read_bytes() for path in (tmp_path / "out_d").rglob("*.*")
    }
    # A part that is quantized is in nobody's way, unless an adapter is for it.
    config = {"_class_name": "UNet2DConditionModel", "quantization_config": {"quant_method": "fp8"}}
    write_json(base / "unet/config.json", config)
    code, said = run(capsys, base, tmp_path / "k.safetensors", "-o", tmp_path / "x")
    assert (code, "is quantized" in said) == (4, True)
    save_file({name: one for name, one in kohya.items() if "_te_" in name}, tmp_path / "te.safetensors")
    assert run(capsys, base, tmp_path / "te.safetensors", "-o", tmp_path / "x")[0] == 0
    # The other variant of what was changed is not the merged one, so it does not go along.
    assert sorted(path.name for path in (tmp_path / "out_k/text_encoder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_adapters_beside_the_base_stay_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # transformers would look for the weights of one that has its config in the folder.
    base, adapter = write_base(tmp_path / "base"), write_peft(tmp_path / "a", pair(Q, 6, 8))
    for path in adapter.iterdir():
        path.rename(base / path.name)
    code, _ = run(capsys, base, base, "-o", tmp_path / "out")
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert load_file(tmp_path / "out/model.safetensors").keys() == load_file(base / "model.safetensors").keys()


# Weights by their names in one layout, and the pair that is for them in another; and which rows of ``up`` each gets.
TRAINERS: dict[str, tuple[dict[str, str], dict[str, tuple[int, int]], str, dict[str, slice]]] = {
    "XL": (
        {"_class_name": "UNet2DConditionModel"},
        {
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (4, 6),
            "mid_block.attentions.0.proj_in": (4, 6),
        },
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        {"down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": slice(4)},
    ),
    "Flux": (
        {"_class_name": "FluxTransformer2DModel"},
        {f"transformer_blocks.0.attn.to_{which}": (4, 6) for which in "qkv"},
        "lora_unet_double_blocks_0_img_attn_qkv",
        {f"transformer_blocks.0.attn.to_{which}": slice(4 * at, 4 * at + 4) for at, which in enumerate("qkv")},
    ),
    "a single file": (
        {},
        {"model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q": (4, 6)},
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
        {"model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q": slice(4)},
    ),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_names_of_the_trainer_are_found(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, shapes, module, rows = TRAINERS[name]
    state = {f"{one}.weight": random(*shape) for one, shape in shapes.items()}
    base = tmp_path / "base"
    base.mkdir()
    file = base / ("diffusion_pytorch_model.safetensors" if config else "sd.safetensors")
    save_file(state, file)
    if config:
        write_json(base / "config.json", config)
    up, down = random(4 * len(rows), 2), random(2, 6)
    added = {f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down, f"{module}.alpha": torch.tensor(1.0)}
    save_file(added, tmp_path / "a.safetensors")
    out = tmp_path / "out"
    code, said = run(
        capsys, base if config else file, tmp_path / "a.safetensors", "-o", out if config else out / file.name
    )
    assert code == 0, said
    after = load_file(out / file.name)
    for one in shapes:
        before = state[f"{one}.weight"].double()
        expected = before + 0.5 * (up[rows[one]].double() @ down.double()) if one in rows else before
        assert_rounded(after[f"{one}.weight"], expected, before)


# What is refused.

FULL = pair(Q, 6, 8)
A_NAN = {**FULL, f"{Q}.lora_A.weight": torch.full((2, 8), math.nan)}
REFUSED: dict[str, tuple[State, dict[str, Any], int, str]] = {
    "another base": (pair("model.layers.7.q", 6, 8), {}, 2, "'model.layers.7.q', and the base has no such weight"),
    "another width": (pair(Q, 6, 9), {}, 2, "which is 6x8 in the base"),
    "other ranks": ({**FULL, f"{Q}.lora_A.weight": random(3, 8)}, {}, 3, "whose halves do not fit"),
    "the rank of its config": (FULL, {"r": 4}, 3, "of the rank 2, and its config says 4"),
    "half a pair": ({f"{Q}.lora_A.weight": random(2, 8)}, {}, 3, "whose other half (up) is not there"),
    "DoRA": (FULL, {"use_dora": True}, 4, "use_dora = True"),
    "magnitudes": ({**FULL, f"{Q}.lora_magnitude_vector": random(6)}, {}, 4, "DoRA"),
    "replication": (FULL, {"layer_replication": [[0, 1]]}, 4, "layer_replication"),
    "parameters": (FULL, {"target_parameters": ["experts.gate"]}, 4, "target_parameters"),
    "tokens": (FULL, {"trainable_token_indices": [1, 2]}, 4, "trainable_token_indices"),
    "biases of the base": (FULL, {"bias": "all"}, 4, "bias = all"),
    "another method": (FULL, {"peft_type": "LOHA"}, 4, "LOHA"),
    "a bias that the base has not": (
        {**FULL, f"{Q}.lora_B.bias": random(6)}, {"lora_bias": True}, 2, "has none in the base",
    ),
    "a larger vocabulary": (
        {**FULL, f"{HEAD}.weight": random(12, 8)}, {"modules_to_save": [HEAD]}, 4, "12x8, and the base has 10x8",
    ),
    "a module that is not there": (FULL, {"modules_to_save": ["score"]}, 3, "lacks 'score'"),
    "no list": (FULL, {"modules_to_save": {"a": 1}}, 3, "no list of names"),
    "float8": (pair(Q, 6, 8, dtype=torch.float8_e4m3fn), {}, 4, "no dtype of an adapter"),
    "NaN": (A_NAN, {}, 3, "has NaN, infinity or a number above 1e15"),
    "a flag that is none": (FULL, {"use_rslora": "no"}, 3, "use_rslora = no, which is no flag"),
    "a number for a flag": (FULL, {"use_rslora": 1}, 3, "use_rslora = 1, which is no flag"),
    "the base's own, of no pair": ({**FULL, f"{EMBED}.base_layer.weight": random(10, 8)}, {}, 3, "and no pair"),
    "an alpha that is none": (FULL, {"lora_alpha": "much"}, 3, "lora_alpha = much"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_plain_lora_is_refused(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, config, code, said = REFUSED[what]
    base, adapter = write_base(tmp_path / "base"), write_peft(tmp_path / "a", state, **config)
    found, text = run(capsys, base, adapter, "-o", tmp_path / "out")
    assert (found, said in text) == (code, True), text
    assert not (tmp_path / "out").exists()


def test_bases_that_nothing_is_merged_into(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = write_peft(tmp_path / "a", FULL)
    quantized = write_base(tmp_path / "q", None, quantization_config={"quant_method": "fp8"})
    code, said = run(capsys, quantized, adapter, "-o", tmp_path / "out")
    assert (code, "'wconv dequantize' makes plain numbers" in said) == (4, True)
    double = write_base(tmp_path / "d", {f"{Q}.weight": random(6, 8).double()})
    code, said = run(capsys, double, adapter, "-o", tmp_path / "out")
    assert (code, "fp64" in said) == (4, True), said
    shared = write_base(tmp_path / "t", {"shared.weight": random(6, 8)}, architectures=["T5ForConditionalGeneration"])
    code, said = run(capsys, shared, write_peft(tmp_path / "s", pair("shared", 6, 8)), "-o", tmp_path / "out")
    assert (code, "may be tied to other weights" in said) == (4, True)
    code, said = run(capsys, shared, shared, "-o", tmp_path / "out")
    assert (code, "holds no LoRA" in said) == (4, True)
    large = write_base(tmp_path / "l", {f"{Q}.weight": torch.full((6, 8), 6e4).half()})
    many = write_peft(
        tmp_path / "m", {f"{Q}.lora_A.weight": torch.ones(2, 8), f"{Q}.lora_B.weight": torch.ones(6, 2) * 9e3}
    )
    code, said = run(capsys, large, many, "-o", tmp_path / "out")
    assert (code, f"too large for F16: {Q}.weight (48)" in said) == (6, True)
    assert run(capsys, large, many, "-o", tmp_path / "out", "--on-overflow", "saturate")[0] == 0
    assert load_file(tmp_path / "out/model.safetensors")[f"{Q}.weight"].max() == 65504


def test_weights_are_behind_the_last_colon(tmp_path: Path) -> None:
    take: Callable[[str], Any] = lambda text: _Weighted().convert(text, None, None)  # noqa: E731
    odd = tmp_path / "a:0.5"
    odd.mkdir()
    known = {
        f"{tmp_path}/a:0.8": (f"{tmp_path}/a", 0.8), f"{tmp_path}/b:-1e-1": (f"{tmp_path}/b", -0.1),
        "hf://o/n": ("hf://o/n", 1.0), "hf://o/n@main:.5": ("hf://o/n", 0.5),
        "s3://bucket/v1.5": ("s3://bucket/v1.5", 1.0),
        r"C:\loras\a.safetensors": (r"C:\loras\a.safetensors", 1.0), str(odd): (str(odd), 1.0),
        f"{odd}:2": (str(odd), 2.0),
    }  # fmt: skip
    for text, (place, weight) in known.items():
        assert (str(take(text).place), take(text).weight) == (place, weight)
    for wrong in ("nan", "inf", "1e999"):
        with pytest.raises(Exception, match="is to be merged with the weight"):
            take(f"{tmp_path}/a:{wrong}")


# PEFT as the judge.


def randomized(model: Any, config: Any, folder: Path) -> None:
    from peft import get_peft_model

    tuned = get_peft_model(model, config)
    for name, weight in tuned.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(weight, std=0.1)
    tuned.save_pretrained(folder)


CASES: dict[str, dict[str, Any]] = {
    "linear": {"lora_alpha": 8, "target_modules": ["q_proj", "down_proj", "lm_head"]},
    "rslora": {"lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 5},
    },
    "bias": {"lora_alpha": 3, "target_modules": ["q_proj", "k_proj"], "lora_bias": True},
    "embedding": {"lora_alpha": 3, "target_modules": ["q_proj", "embed_tokens"]},
    "saved": {"lora_alpha": 3, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "gpt2": {"lora_alpha": 3, "target_modules": ["c_attn", "c_proj", "c_fc"]},
}  # fmt: skip


def make_model(name: str, dtype: torch.dtype, tied: bool = False) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16)).to(dtype)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, attention_bias=True, tie_word_embeddings=tied, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    for key, weight in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(weight)
    return model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("name", CASES)
def test_it_is_what_peft_merges(
    name: str, dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import LoraConfig, PeftModel

    base, adapter = tmp_path / "base", tmp_path / "a"
    model = make_model(name, dtype)
    model.save_pretrained(base)
    kind = type(model)
    randomized(kind.from_pretrained(base, dtype=dtype), LoraConfig(r=3, **CASES[name]), adapter)
    assert run(capsys, base, adapter, "-o", tmp_path / "out")[0] == 0
    judge = PeftModel.from_pretrained(kind.from_pretrained(base, dtype=dtype), adapter).merge_and_unload()
    judge.save_pretrained(tmp_path / "peft")
    before, ours, theirs = (load_file(tmp_path / one / "model.safetensors") for one in ("base", "out", "peft"))
    assert ours.keys() == theirs.keys()
    for key, found in ours.items():
        assert found.dtype is dtype
        # PEFT rounds what it adds to a table of words before it adds it; a product of float32 is summed in any order.
        assert_rounded(found, theirs[key], before[key], 1)
    kind.from_pretrained(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_untied_model_computes_what_the_adapter_does(
    name: str, targets: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import LoraConfig, PeftModel

    model = make_model(name, torch.float32, tied=True)
    model.save_pretrained(tmp_path / "base")
    kind = type(model)
    names = ["wte" if name == "gpt2" and one == "embed_tokens" else one for one in targets]
    randomized(model, LoraConfig(r=3, lora_alpha=3, target_modules=names), tmp_path / "a")
    assert run(capsys, tmp_path / "base", tmp_path / "a", "-o", tmp_path / "out")[0] == 0
    judge = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "a").eval()
    found, told = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.allclose(found.eval()(ids).logits, judge(ids).logits, atol=1e-4)
        # PEFT's own merge adds to both.
        assert not torch.allclose(judge.merge_and_unload()(ids).logits, found(ids).logits, atol=1e-2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", BITS)
def test_it_is_what_diffusers_fuses(dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=8,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    unet.to(dtype).save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_k", "to_out.0", "conv1", "conv2", "proj_in"])
    unet.add_adapter(config)
    for name, weight in unet.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    noted = unet.peft_config["default"].to_dict()
    pairs = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(tmp_path / "a", pairs, unet_lora_adapter_metadata=noted)
    code, said = run(capsys, tmp_path / "base", f"{tmp_path / 'a'}:0.8", "-o", tmp_path / "out")
    assert code == 0, said
    judge = UNet2DConditionModel.from_pretrained(tmp_path / "base", torch_dtype=dtype)
    state, alphas, found = StableDiffusionPipeline.lora_state_dict(
        tmp_path / "a", unet_config=judge.config, return_lora_metadata=True
    )
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, judge, metadata=found)
    judge.fuse_lora(0.8)
    judge.unload_lora()
    theirs = judge.state_dict()
    file = "diffusion_pytorch_model.safetensors"
    before, ours = load_file(tmp_path / "base" / file), load_file(tmp_path / "out" / file)
    assert sum(not torch.equal(before[name], ours[name]) for name in ours) == len(pairs) / 2
    for name, values in ours.items():
        # Diffusers rounds the halves to the dtype of the base, and what it adds.
        assert_rounded(values, theirs[name], before[name], 1 if dtype is torch.float32 else 2)

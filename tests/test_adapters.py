"""What an adapter is: its form, its pairs and alphas by PEFT's own rules, and what is no plain LoRA."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from converter.errors import WconvError
from converter.models.adapters import Adapter, find_adapter, read_alphas
from converter.models.checkpoint import open_checkpoint

State = dict[str, torch.Tensor]
PEFT = "base_model.model."
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def pair(down: str, up: str, rank: int = 4, size: int = 8) -> State:
    return {down: torch.randn(rank, size), up: torch.randn(size, rank)}


def peft(module: str = MODULE, rank: int = 4) -> State:
    return pair(f"{PEFT}{module}.lora_A.weight", f"{PEFT}{module}.lora_B.weight", rank)


def kohya(module: str = "lora_unet_mid_block_attentions_0_proj_in", rank: int = 4, alpha: Any = 2.0) -> State:
    halves = pair(f"{module}.lora_down.weight", f"{module}.lora_up.weight", rank)
    return halves if alpha is None else {**halves, f"{module}.alpha": torch.as_tensor(alpha)}


def diffusers(module: str = f"unet.{MODULE}", rank: int = 4) -> State:
    return pair(f"{module}.lora_A.weight", f"{module}.lora_B.weight", rank)


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Adapter | None]:
    def write(state: State, config: dict[str, Any] | None = None, metadata: Any = None, name: str = "") -> Any:
        path = tmp_path / (name or ("adapter_model.safetensors" if config else "lora.safetensors"))
        if path.suffix == ".safetensors":
            save_file(state, path, metadata=metadata)
        else:
            torch.save(state, path)
        return find_adapter(open_checkpoint(path), config or {})

    return write


@pytest.mark.parametrize(
    ("state", "form", "modules"),
    [
        (peft(), "peft", [MODULE]),
        (pair("base_model.model.a.lora_A.default.weight", "base_model.model.a.lora_B.default.weight"), "peft", ["a"]),
        (diffusers(), "diffusers", [f"unet.{MODULE}"]),
        (pair("unet.a.lora.down.weight", "unet.a.lora.up.weight"), "diffusers", ["unet.a"]),
        (
            pair("unet.m.attn1.processor.to_out_lora.down.weight", "unet.m.attn1.processor.to_out_lora.up.weight"),
            "diffusers",
            ["unet.m.attn1.to_out.0"],
        ),
        (
            pair("text_encoder.l.self_attn.to_q_lora.down.weight", "text_encoder.l.self_attn.to_q_lora.up.weight"),
            "diffusers",
            ["text_encoder.l.self_attn.q_proj"],
        ),
        (
            pair("text_encoder.q.lora_linear_layer.down.weight", "text_encoder.q.lora_linear_layer.up.weight"),
            "diffusers",
            ["text_encoder.q"],
        ),
        (kohya(), "kohya", ["lora_unet_mid_block_attentions_0_proj_in"]),
        (
            pair("diffusion_model.a.lora_down.weight", "diffusion_model.a.lora_up.weight"),
            "comfyui",
            ["diffusion_model.a"],
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["", "lora.bin"])
def test_each_form_is_known(state: State, form: str, modules: list[str], name: str, opened: Any) -> None:
    adapter = opened(state, PLAIN if form == "peft" else None, name=name)
    assert (adapter.form, [one.module for one in adapter.pairs], adapter.problems) == (form, modules, ())
    assert adapter.pairs[0].down.shape == (4, 8)
    assert adapter.pairs[0].up.shape == (8, 4)


def test_a_model_is_no_adapter(opened: Any) -> None:
    assert opened({"lora_layer.weight": torch.ones(2, 2), "exploration.down.weight": torch.ones(1)}) is None
    assert opened({"a.alpha": torch.ones(1), "a.weight": torch.ones(1)}) is None


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32]
)
def test_alphas_of_tensors(dtype: torch.dtype, opened: Any) -> None:
    states = [kohya(alpha=torch.tensor(3, dtype=dtype)), kohya("lora_te_b", alpha=torch.tensor([16], dtype=dtype))]
    adapter = opened({**states[0], **states[1], **kohya("lora_te_c", 2, alpha=None)})
    assert sorted(read_alphas(adapter).values()) == [2.0, 3.0, 16.0]


def test_alphas_are_those_that_peft_takes(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = torch.nn.ModuleDict(
        {name: torch.nn.ModuleDict({"proj": torch.nn.Linear(8, 8), "to_out": torch.nn.Linear(8, 8)}) for name in "ab"}
    )
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["proj", "to_out"],
        rank_pattern={"^b.proj": 2, "to.out": 3},  # to PEFT a dot is any character
        alpha_pattern={"proj": 5, r"^a\.to.out": 7, "to_out": 1.5},
    )
    tuned = get_peft_model(model, config)
    tuned.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    adapter = find_adapter(open_checkpoint(tmp_path / "adapter_model.safetensors"), said)
    assert adapter is not None
    assert adapter.problems == ()
    layers = {name: layer for name, layer in tuned.base_model.model.named_modules() if hasattr(layer, "scaling")}
    ranks = {one.module: one.rank for one in adapter.pairs}
    alphas = read_alphas(adapter)
    assert {name: alphas[name] / ranks[name] for name in alphas} == {
        name: layer.scaling["default"] for name, layer in layers.items()
    }


def test_alphas_that_diffusers_notes(opened: Any) -> None:
    noted = {"unet.r": 4, "unet.lora_alpha": 2, "unet.alpha_pattern": {f"^{MODULE}": 1}, "unet.rank_pattern": {}}
    state = {**diffusers(), **diffusers("unet.conv_in"), **diffusers("text_encoder.a")}
    adapter = opened(state, metadata={"lora_adapter_metadata": json.dumps(noted)})
    assert read_alphas(adapter) == {f"unet.{MODULE}": 1.0, "unet.conv_in": 2.0, "text_encoder.a": 4.0}


ODD = {
    "half": ({"lora_unet_a.lora_down.weight": torch.ones(4, 8)}, None, 3, "whose other half (up) is not there"),
    "two forms": ({**kohya(), **diffusers()}, None, 4, "names of two forms of adapters, diffusers and kohya"),
    "ranks": (
        {"lora_unet_a.lora_down.weight": torch.ones(4, 8), "lora_unet_a.lora_up.weight": torch.ones(8, 5)},
        None, 3, "whose halves do not fit",
    ),
    "no shape": (
        {"lora_unet_a.lora_down.weight": torch.ones(()), "lora_unet_a.lora_up.weight": torch.ones(())},
        None, 3, "whose halves do not fit",
    ),
    "integers": (
        {name: tensor.to(torch.int8) for name, tensor in kohya(alpha=None).items()},
        None, 4, "which is no dtype of an adapter",
    ),
    "XLabs": (
        pair("double_blocks.0.processor.qkv_lora1.down.weight", "double_blocks.0.processor.qkv_lora1.up.weight"),
        None,
        4,
        "(LoRA of XLabs)",
    ),
    "alphas": (kohya(alpha=torch.ones(2)), None, 3, "which is no single number: it is fp32 of 2"),
    "DoRA": ({**kohya(), "lora_unet_a.dora_scale": torch.ones(8)}, None, 4, "'lora_unet_a.dora_scale' (DoRA)"),
    "LoHa": ({"lora_unet_a.hada_w1_a": torch.ones(8, 4)}, None, 4, "(LoHa)"),
    "LoKr": ({"lora_unet_a.lokr_w1": torch.ones(8, 4)}, None, 4, "(LoKr)"),
    "LoCon": ({**kohya(), "lora_unet_a.lora_mid.weight": torch.ones(8, 4)}, None, 4, "(LoCon with a middle"),
    "others": ({**kohya(), "epoch": torch.ones(1)}, None, 4, "what is no part of an adapter: 'epoch'"),
    "two adapters": (
        {**pair(f"{PEFT}a.lora_A.x.weight", f"{PEFT}a.lora_B.x.weight"),
         **pair(f"{PEFT}b.lora_A.y.weight", f"{PEFT}b.lora_B.y.weight")},
        PLAIN, 4, "holds several adapters: 'x', 'y'",
    ),
    "no config": (peft(), None, 3, "and no adapter_config.json beside it"),
    "method": (peft(), {**PLAIN, "peft_type": "IA3"}, 4, "another method of PEFT than LoRA: 'IA3'"),
    "use_dora": (peft(), {**PLAIN, "use_dora": True}, 4, "its config says use_dora = True"),
    "use_rslora": (peft(), {**PLAIN, "use_rslora": True}, 4, "its config says use_rslora = True"),
    "bias": (peft(), {**PLAIN, "bias": "all"}, 4, "its config says bias = all"),
    "pissa": (peft(), {**PLAIN, "init_lora_weights": "pissa_niter_4"}, 4, "init_lora_weights = pissa_niter_4"),
    "modules_to_save": (peft(), {**PLAIN, "modules_to_save": ["head"]}, 4, "modules_to_save = ['head']"),
    "unknown": (peft(), {**PLAIN, "use_new_thing": 3}, 4, "use_new_thing = 3"),
    "rank": (peft(), {**PLAIN, "r": "four"}, 3, "says r = four"),
    "alpha": (peft(), {**PLAIN, "lora_alpha": float("nan")}, 3, "says lora_alpha = nan"),
    "regex": (peft(), {**PLAIN, "alpha_pattern": {"(a+)+$": 3}}, 4, "of a regular expression, '(a+)+$'"),
    "pattern": (peft(), {**PLAIN, "alpha_pattern": [1]}, 3, "says alpha_pattern = [1], which is no JSON object"),
    "prefix": (pair("a.lora_A.weight", "a.lora_B.weight"), PLAIN, 3, "by which PEFT loads none of them"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_plain_lora_is_said(kind: str, opened: Any) -> None:
    state, config, code, words = ODD[kind]
    adapter = opened(state, config)
    with pytest.raises(WconvError) as caught:
        adapter.check()
    assert caught.value.exit_code == code
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [({**PLAIN, "r": 2}, "of the rank 4, and its config says 2"), ({**PLAIN, "rank_pattern": {"to_q": 8}}, "says 8")],
)
def test_a_config_of_other_ranks(config: dict[str, Any], words: str, opened: Any) -> None:
    with pytest.raises(WconvError, match=words):
        read_alphas(opened(peft(), config))


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_no_number(alpha: float, opened: Any) -> None:
    with pytest.raises(WconvError, match="which is no alpha"):
        read_alphas(opened(kohya(alpha=torch.tensor(alpha))))


@pytest.mark.parametrize("raw", ["{", "[]", '{"a":' * 200 + "1" + "}" * 200])
def test_a_header_that_notes_nonsense(raw: str, opened: Any) -> None:
    with pytest.raises(WconvError):
        opened(diffusers(), metadata={"lora_adapter_metadata": raw}).check()


def test_inspect_says_what_it_is(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    module = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k"
    state = {**kohya(module), **kohya(f"{module}_x"), **kohya("lora_te2_a", 2, 1.0)}
    save_file(state, tmp_path / "style.safetensors")
    told = wconv("inspect", tmp_path / "style.safetensors")
    assert told.exit_code == 0
    assert "adapter: LoRA, in the names of kohya: 3 modules, rank 4 (1 of 2), alpha 2 (1 of 1)" in told.stdout
    save_file(kohya(module), tmp_path / "style.safetensors")
    told = wconv("inspect", tmp_path / "style.safetensors")
    assert "adapter: LoRA for Stable Diffusion XL, in the names of kohya: 1 module," in told.stdout
    [described] = json.loads(wconv("inspect", "--json", tmp_path / "style.safetensors").stdout)["weight_sets"]
    assert described["adapter"]["ranks"] == {"4": 1}
    save_file({"lora_unet_a.hada_w1_a": torch.ones(8, 4)}, tmp_path / "loha.safetensors")
    told = wconv("inspect", tmp_path / "loha.safetensors")
    assert "adapter: LoHa, in the names of kohya" in told.stdout
    assert "note: it is no plain LoRA" in told.stdout

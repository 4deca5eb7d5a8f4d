"""``wconv convert-lora``: the readers of each form take what it writes and make the same of it, and back is the same.

Judges: Diffusers' own readers of kohya's names, its pipelines and PEFT on tiny models, and the sum ``W + s B A`` here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]
CLIP = "text_model_encoder_layers_0_mlp_fc1"
WIDE = 3072  # Diffusers' reader of Flux takes no other


def make_unet(kind: str) -> Any:
    """Make a tiny UNet with all blocks of the real one."""
    from diffusers import UNet2DConditionModel

    same = {"sample_size": 8, "layers_per_block": 2, "norm_num_groups": 4, "cross_attention_dim": 16}
    cross, plain = "CrossAttn{}Block2D", "{}Block2D"
    downs: tuple[str, ...]
    ups: tuple[str, ...]
    if kind == "sd1":
        downs, ups = (cross, cross, cross, plain), (plain, cross, cross, cross)
        more: dict[str, Any] = {"attention_head_dim": 4}
    else:
        downs, ups = (plain, cross, cross), (cross, cross, plain)
        more = {"attention_head_dim": (2, 4, 4), "transformer_layers_per_block": (1, 2, 2)}
        more |= {"use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8}
        more |= {"projection_class_embeddings_input_dim": 64}
    return UNet2DConditionModel(
        **same,
        **more,
        block_out_channels=(8,) * len(downs),
        down_block_types=[one.format("Down") for one in downs],
        up_block_types=[one.format("Up") for one in ups],
    ).eval()


def make_clip(with_projection: bool = False) -> Any:
    """Make a tiny text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=60,
        projection_dim=16, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config).eval()


def modules_in(model: Any) -> dict[str, Any]:
    """Give all that a LoRA may be of."""
    return {name: one for name, one in model.named_modules() if isinstance(one, torch.nn.Linear | torch.nn.Conv2d)}


def pair_for(name: str, module: Any, rank: int, dtype: torch.dtype = torch.float32) -> State:
    """Make a pair for a module, in PEFT's names."""
    out, *others = module.weight.shape
    ones = (1,) * (len(others) - 1)
    halves = torch.randn(rank, *others) * 0.1, torch.randn(out, rank, *ones) * 0.1
    return {f"{name}.lora_{which}.weight": half.to(dtype) for which, half in zip("AB", halves, strict=True)}


def make_pairs(model: Any) -> State:
    """Make a pair for each module of a model."""
    return {name: one for at, (path, module) in enumerate(modules_in(model).items())
            for name, one in pair_for(path, module, 2 + at % 2).items()}  # fmt: skip


def make_adapter(parts: dict[str, Any], ranks: tuple[int, ...] = (4, 2), every: int = 1) -> State:
    """Make an adapter in Diffusers' names of every so many of the modules, with ranks in turn."""
    state: State = {}
    for part, model in parts.items():
        for at, (name, module) in enumerate(list(modules_in(model).items())[::every]):
            long = name if part == "unet" or name.startswith("text_") else f"text_model.{name}"
            state |= pair_for(f"{part}.{long}", module, ranks[at % len(ranks)])
    return state


def merged(model: Any, state: State, scale: Callable[[str, int], float]) -> Any:
    """Add to each weight what an adapter's pair says, whose names are those of the model."""
    for name, module in modules_in(model).items():
        down, up = state.get(f"{name}.lora_A.weight"), state.get(f"{name}.lora_B.weight")
        if down is not None and up is not None:
            change = up.flatten(1) @ down.flatten(1) * scale(name, down.shape[0])
            module.weight.data += change.reshape(module.weight.shape)
    return model


def forward(unet: Any) -> Any:
    """Run a UNet on the same noise."""
    noise = torch.Generator().manual_seed(1)
    more = {}
    if unet.config.addition_embed_type:
        made = {"text_embeds": torch.randn(1, 16, generator=noise), "time_ids": torch.ones(1, 6)}
        more = {"added_cond_kwargs": made}
    sample, prompt = (torch.randn(*shape, generator=noise) for shape in ((1, 4, 8, 8), (1, 7, 16)))
    with torch.no_grad():
        return unet(sample, torch.tensor([5]), encoder_hidden_states=prompt, **more).sample


def under(state: State, prefix: str) -> State:
    """Give what begins with a prefix, without it."""
    return {name.removeprefix(prefix): one for name, one in state.items() if name.startswith(prefix)}


def same(first: State, second: State) -> bool:
    """Say whether two files hold the same, bit for bit."""
    pairs = ((first[name], second[name]) for name in first)
    return first.keys() == second.keys() and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def header(path: Path) -> Any:
    """Give what a header notes."""
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.fixture
def lora(wconv: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    def convert(source: Path, to: str, name: str, *more: str) -> Path:
        wconv("convert-lora", source, "--to", to, "-o", tmp_path / name, "-q", *more)
        return tmp_path / name

    return convert


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_diffusers_reads_kohyas_names_as_what_they_were(kind: str, lora: Any, tmp_path: Path) -> None:
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )
    from diffusers.utils.state_dict_utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    parts = {"unet": make_unet(kind), "text_encoder": make_clip()}
    if kind == "sdxl":
        parts["text_encoder_2"] = make_clip(with_projection=True)
    state = make_adapter(parts)
    save_file(state, tmp_path / "lora.safetensors")
    kohya = lora(tmp_path / "lora.safetensors", "kohya", "kohya.safetensors", "--verify")
    written = load_file(kohya)
    prefixes = {name.partition("_text_")[0] for name in written if "lora_te" in name}
    assert prefixes == ({"lora_te1", "lora_te2"} if kind == "sdxl" else {"lora_te"})
    assert any("input_blocks_4_1" in name for name in written) == (kind == "sdxl")
    read = _maybe_map_sgm_blocks_to_diffusers(dict(written), parts["unet"].config)
    read, alphas = _convert_non_diffusers_lora_to_diffusers(read)
    assert set(alphas.values()) == {4.0, 2.0}
    back: State = {}
    for part in parts:
        mine = under(read, f"{part}.")
        turn = convert_unet_state_dict_to_peft if part == "unet" else convert_state_dict_to_peft
        back |= {f"{part}.{name}": one for name, one in turn(mine).items()}
    # Its reader has other names for the projection of a text encoder.
    ends = {"text_projection.lora.down": "text_projection.lora_A", "text_projection.lora.up": "text_projection.lora_B"}
    for end, new in ends.items():
        back = {name.replace(end, new): one for name, one in back.items()}
    assert same(back, state)
    again = lora(kohya, "diffusers", "again.safetensors")
    assert same(load_file(again), state)
    assert header(again) == {"format": "pt"}


def test_what_diffusers_writes_as_kohyas_is_read(lora: Any, tmp_path: Path) -> None:
    from diffusers.utils import convert_state_dict_to_kohya

    state = make_adapter({"unet": make_unet("sd1"), "text_encoder": make_clip()}, (4,), every=3)
    save_file(state, tmp_path / "lora.safetensors")
    theirs = convert_state_dict_to_kohya(dict(state))
    save_file({name: one.contiguous() for name, one in theirs.items()}, tmp_path / "theirs.safetensors")
    ours = load_file(lora(tmp_path / "lora.safetensors", "kohya", "kohya.safetensors"))
    named = {name.replace("lora_te1_", "lora_te_"): one for name, one in theirs.items()}
    assert ours.keys() == named.keys()
    assert all(torch.equal(ours[name].double(), named[name].double()) for name in ours)
    back = lora(tmp_path / "theirs.safetensors", "diffusers", "back.safetensors")
    assert same(load_file(back), state)
    again = load_file(lora(back, "kohya", "again.safetensors"))
    assert same(again, theirs)  # the text encoder has a number, and alphas are integers, as they were


@pytest.mark.parametrize(
    "modules",
    [
        ("lora_unet_input_blocks_4_1_proj_in",),  # SDXL or not
        ("lora_unet_input_blocks_1_1_proj_in", "lora_unet_output_blocks_2_1_conv", f"lora_te_{CLIP}"),
        ("lora_unet_output_blocks_2_2_conv", "lora_unet_input_blocks_7_1_transformer_blocks_9_ff_net_2"),
        ("lora_unet_down_blocks_2_attentions_0_transformer_blocks_9_ff_net_2", f"lora_te2_{CLIP}"),
        (f"lora_te1_{CLIP}",),
        (f"lora_te_{CLIP}", f"lora_te2_{CLIP}"),
        ("lora_transformer_single_transformer_blocks_0_attn_to_q", f"lora_te1_{CLIP}"),
        ("lora_unet_transformer_blocks_0_attn_add_q_proj", "lora_unet_single_transformer_blocks_0_proj_mlp"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("to", ["diffusers", pytest.param("peft", marks=pytest.mark.slow)])
def test_back_to_the_very_names(modules: tuple[str, ...], to: str, lora: Any, tmp_path: Path) -> None:
    state = {f"{name}.lora_{which}.weight": torch.ones(2, 2) for name in modules for which in ("down", "up")}
    state |= {f"{name}.alpha": torch.tensor(1.0) for name in modules}
    save_file(state, tmp_path / "kohya.safetensors")
    there = lora(tmp_path / "kohya.safetensors", to, to if to == "peft" else "new.safetensors")
    assert same(load_file(lora(there, "kohya", "back.safetensors")), state)


@pytest.mark.parametrize("kind", [pytest.param("sd1", marks=pytest.mark.slow), "sdxl"])
def test_each_form_does_the_same_to_a_unet(kind: str, lora: Any, tmp_path: Path) -> None:
    from diffusers.loaders.unet import UNet2DConditionLoadersMixin
    from peft import PeftModel

    unet = make_unet(kind)
    weights = {name: one.clone() for name, one in unet.state_dict().items()}
    state = make_adapter({"unet": unet}, every=9)
    save_file(state, tmp_path / "plain.safetensors")
    kohya = load_file(lora(tmp_path / "plain.safetensors", "kohya", "plain_kohya.safetensors"))
    values = {name: 1.0 + at % 3 for at, name in enumerate(kohya) if name.endswith(".alpha")}
    kohya |= {name: torch.tensor(value) for name, value in values.items()}
    save_file(kohya, tmp_path / "kohya.safetensors", metadata={"ss_network_dim": "4", "sshs_model_hash": "ab"})
    new = lora(tmp_path / "kohya.safetensors", "diffusers", "new.safetensors")
    assert same(load_file(new), state)
    assert header(new).keys() == {"format", "ss_network_dim", "lora_adapter_metadata"}
    assert same(load_file(lora(new, "kohya", "back.safetensors")), kohya)
    # The name of each module there, found by what it holds.
    downs = {one.sum().item(): name for name, one in kohya.items() if name.endswith("lora_down.weight")}
    alphas = {
        name.removesuffix(".lora_A.weight"): values[downs[one.sum().item()].partition(".")[0] + ".alpha"]
        for name, one in under(state, "unet.").items()
        if name.endswith("lora_A.weight")
    }
    wanted = forward(merged(unet, under(state, "unet."), lambda name, rank: alphas[name] / rank))

    fresh = make_unet(kind)
    fresh.load_state_dict(weights)
    assert isinstance(fresh, UNet2DConditionLoadersMixin)
    noted = json.loads(header(new)["lora_adapter_metadata"])
    fresh.load_lora_adapter(load_file(new), prefix="unet", metadata=noted)
    torch.testing.assert_close(forward(fresh), wanted, rtol=1e-4, atol=1e-5)

    folder = lora(tmp_path / "kohya.safetensors", "peft", "peft")
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (
        json.loads((folder / "adapter_config.json").read_text())["auto_mapping"]["base_model_class"]
        == "UNet2DConditionModel"
    )
    other = make_unet(kind)
    other.load_state_dict(weights)
    torch.testing.assert_close(forward(PeftModel.from_pretrained(other, folder)), wanted, rtol=1e-4, atol=1e-5)
    assert same(load_file(lora(folder, "kohya", "peft_kohya.safetensors")), kohya)
    assert same(load_file(lora(folder, "diffusers", "peft_diffusers.safetensors")), state)


def test_peft_has_a_folder_for_each_part(lora: Any, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    parts = {"unet": make_unet("sdxl"), "text_encoder": make_clip(), "text_encoder_2": make_clip(with_projection=True)}
    state = make_adapter(parts, every=9)
    save_file(state, tmp_path / "lora.safetensors")
    folder = lora(tmp_path / "lora.safetensors", "peft", "peft")
    assert sorted(path.name for path in folder.iterdir()) == sorted(parts)
    assert same(load_file(lora(folder, "diffusers", "back.safetensors")), state)
    kohya = lora(folder, "kohya", "kohya.safetensors")
    assert kohya.read_bytes() == lora(tmp_path / "lora.safetensors", "kohya", "other.safetensors").read_bytes()
    told = wconv("convert-lora", kohya, "--to", "peft", "-o", tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == sorted(parts)
    assert "text_encoder: names begin with text_model., as CLIPTextModel of transformers 4" in told.stdout


def flux_of_kohya(dtype: torch.dtype) -> State:
    """Make an adapter of some modules of Flux as kohya's trainer does, with joined ones."""
    modules = {
        "lora_unet_double_blocks_0_img_attn_qkv": (3 * WIDE, WIDE, 4, 2.0),
        "lora_unet_double_blocks_0_txt_attn_proj": (WIDE, WIDE, 4, 4.0),
        "lora_unet_single_blocks_3_linear1": (7 * WIDE, WIDE, 2, 1.0),
        "lora_unet_single_blocks_3_linear2": (WIDE, 5 * WIDE, 2, 8.0),
        "lora_unet_single_blocks_3_modulation_lin": (3 * WIDE, WIDE, 2, 8.0),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": (32, 16, 4, 4.0),
    }
    state: State = {}
    for name, (out, into, rank, alpha) in modules.items():
        state |= {f"{name}.lora_down.weight": torch.randn(rank, into).to(dtype)}
        state |= {f"{name}.lora_up.weight": torch.randn(out, rank).to(dtype)}
        state |= {f"{name}.alpha": torch.tensor(alpha, dtype=dtype)}
    return state


def scales_of(path: Path) -> Callable[[str, int], float]:
    """Give what Diffusers scales a module by, as its header notes it: by PEFT's own rules."""
    from peft.utils.other import get_pattern_key

    noted = json.loads(header(path).get("lora_adapter_metadata", "{}"))

    def scale(name: str, rank: int) -> float:
        if not noted:
            return 1.0
        part, _, module = name.partition(".")
        found = []
        for what, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
            patterns = noted[f"{part}.{pattern}"]
            found.append(patterns.get(get_pattern_key(patterns, module), noted[f"{part}.{what}"]))
        assert found[0] == rank
        return float(found[1] / rank)

    return scale


def products(state: State, scale: Callable[[str, int], float]) -> Iterator[tuple[str, torch.Tensor]]:
    """Give what each pair of an adapter makes of the same vector."""
    for name, down in state.items():
        module, is_down, _ = name.partition(".lora_A.weight")
        if is_down:
            vector = torch.linspace(-1, 1, down.shape[1], dtype=torch.float64)
            up = state[f"{module}.lora_B.weight"].double()
            yield module, up @ (down.double() @ vector) * scale(module, down.shape[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_flux_of_kohya(dtype: torch.dtype, lora: Any, tmp_path: Path) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    state = flux_of_kohya(dtype)
    save_file(state, tmp_path / "kohya.safetensors")
    new = lora(tmp_path / "kohya.safetensors", "diffusers", "new.safetensors", "--verify")
    read = _convert_kohya_flux_lora_to_diffusers({name: one.clone().double() for name, one in state.items()})
    read = {name: one for name, one in read.items() if name.startswith("transformer.")}
    theirs = dict(products(read, lambda *_: 1.0))
    ours = {name: one for name, one in products(load_file(new), scales_of(new)) if name.startswith("transformer.")}
    assert len(ours) == 3 + 1 + 4 + 1 + 1
    assert ours.keys() == theirs.keys()
    for name, one in ours.items():
        torch.testing.assert_close(one, theirs[name])
    back = lora(new, "kohya", "back.safetensors", "--verify")
    assert same(load_file(back), state)
    assert set(header(back)) <= {"format"}


def flux_of_diffusers() -> State:
    """Make an adapter of Flux as Diffusers' trainers do: each module by itself, some of them not at all."""
    modules = {f"transformer_blocks.0.attn.{name}": (32, 32, 2) for name in ("to_q", "to_k", "to_v")}
    modules |= {
        "single_transformer_blocks.0.attn.to_v": (32, 32, 3),
        "single_transformer_blocks.0.proj_mlp": (128, 32, 6),
    }
    modules |= {"norm_out.linear": (64, 32, 2), "proj_out": (16, 32, 2)}
    state: State = {}
    for name, (out, into, rank) in modules.items():
        state |= pair_for(f"transformer.{name}", torch.nn.Linear(into, out), rank, torch.bfloat16)
    return state


def test_flux_of_diffusers(lora: Any, tmp_path: Path) -> None:
    state = flux_of_diffusers()
    save_file(state, tmp_path / "lora.safetensors")
    kohya = lora(tmp_path / "lora.safetensors", "kohya", "kohya.safetensors", "--verify")
    written = load_file(kohya)
    assert written["lora_unet_single_blocks_0_linear1.lora_down.weight"].shape == (9, 32)
    assert written["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (7 * 32, 9)
    assert written["lora_unet_single_blocks_0_linear1.alpha"] == 9
    vector = torch.linspace(-1, 1, 32, dtype=torch.float64)
    apart = dict(products(state, lambda *_: 1.0))
    block = "single_transformer_blocks.0"
    for module, names in {
        "double_blocks_0_img_attn_qkv": [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")],
        "single_blocks_0_linear1": ["", "", f"{block}.attn.to_v", f"{block}.proj_mlp"],
    }.items():
        up, down = (written[f"lora_unet_{module}.lora_{which}.weight"].double() for which in ("up", "down"))
        wanted = torch.cat([apart.get(f"transformer.{name}", torch.zeros(32).double()) for name in names])
        torch.testing.assert_close(up @ (down @ vector), wanted)
    swapped = written["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"]
    assert torch.equal(swapped, state["transformer.norm_out.linear.lora_B.weight"].roll(32, 0))
    back = lora(kohya, "diffusers", "back.safetensors", "--verify")
    assert same(load_file(back), state)
    folder = lora(kohya, "peft", "peft")
    assert same(load_file(lora(folder, "diffusers", "from_peft.safetensors")), state)
    # Without the note each part has all columns, and does the same.
    save_file(written, tmp_path / "bare.safetensors")
    bare = lora(tmp_path / "bare.safetensors", "diffusers", "bare_back.safetensors")
    for name, one in products(load_file(bare), lambda *_: 1.0):
        torch.testing.assert_close(one, apart.get(name, torch.zeros_like(one)))


def test_stable_diffusion_3(lora: Any, tmp_path: Path) -> None:
    # The last block has but a shift and a scale for its text, the other way round.
    rows = {"0_context_block_adaLN_modulation_1": 6, "23_context_block_adaLN_modulation_1": 2, "0_x_block_attn2_qkv": 3}
    names = {f"lora_unet_joint_blocks_{name}": count * 1536 for name, count in rows.items()}
    state = {f"{name}.lora_down.weight": torch.randn(2, 1536) for name in names}
    state |= {f"{name}.lora_up.weight": torch.randn(out, 2) for name, out in names.items()}
    state |= {f"{name}.alpha": torch.tensor(2.0) for name in names}
    for encoder, module in (
        ("te2", "text_model_encoder_layers_0_mlp_fc1"),
        ("te3", "encoder_block_0_layer_0_SelfAttention_q"),
    ):
        state |= {f"lora_{encoder}_{module}.lora_{which}.weight": torch.randn(2, 2) for which in ("down", "up")}
        state |= {f"lora_{encoder}_{module}.alpha": torch.tensor(1.0)}
    save_file(state, tmp_path / "kohya.safetensors")
    new = lora(tmp_path / "kohya.safetensors", "diffusers", "new.safetensors")
    read = load_file(new)
    ups = [f"transformer.transformer_blocks.{at}.norm1_context.linear.lora_B.weight" for at in (0, 23)]
    first, last = (
        state[f"lora_unet_joint_blocks_{at}_context_block_adaLN_modulation_1.lora_up.weight"] for at in (0, 23)
    )
    assert torch.equal(read[ups[0]], first)
    assert torch.equal(read[ups[1]], last.roll(1536, 0))
    assert "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight" in read
    assert same(load_file(lora(new, "kohya", "back.safetensors")), state)


@pytest.mark.parametrize(
    ("key", "words"),
    [("lora_unet_single_blocks_0_linear1.lora_up.weight", "zero outside its blocks, and it is not"), ("empty", "zero")],
)
def test_a_note_is_not_believed(key: str, words: str, lora: Any, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    save_file(flux_of_diffusers(), tmp_path / "lora.safetensors")
    kohya = lora(tmp_path / "lora.safetensors", "kohya", "kohya.safetensors")
    state, noted = load_file(kohya), header(kohya)
    up = state["lora_unet_single_blocks_0_linear1.lora_up.weight"]
    up[(0, 0) if key == "empty" else (70, 8)] = 1  # of a part without a pair; in the columns of another
    save_file(state, kohya, metadata=noted)
    done = wconv("convert-lora", kohya, "--to", "diffusers", "-o", tmp_path / "back.safetensors", exit_code=3)
    assert words in done.stderr
    assert not (tmp_path / "back.safetensors").exists()


def test_copies_are_not_believed(lora: Any, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    state = {f"{name}.lora_down.weight": torch.randn(4, 8), f"{name}.lora_up.weight": torch.randn(24, 4)}
    save_file(state, tmp_path / "kohya.safetensors")
    new = lora(tmp_path / "kohya.safetensors", "diffusers", "new.safetensors")
    changed, noted = load_file(new), header(new)
    changed["transformer.transformer_blocks.0.attn.to_k.lora_A.weight"][1, 1] = 9
    save_file(changed, new, metadata=noted)
    done = wconv("convert-lora", new, "--to", "kohya", "-o", tmp_path / "back.safetensors", exit_code=3)
    assert "copies of one matrix, and they differ" in done.stderr


def attn(which: str, rank: int = 2, alpha: float | None = None, blocks: str = "lora_unet_down_blocks_0") -> State:
    name = f"{blocks}_attentions_0_transformer_blocks_0_attn1_{which}"
    state = {f"{name}.lora_down.weight": torch.ones(rank, 8), f"{name}.lora_up.weight": torch.ones(8, rank)}
    return state if alpha is None else {**state, f"{name}.alpha": torch.tensor(alpha)}


REFUSED: dict[str, tuple[State, str, int, str]] = {
    "another base": ({"lora_unet_blocks_3_self_attn_q.lora_down.weight": torch.ones(2, 8),
                      "lora_unet_blocks_3_self_attn_q.lora_up.weight": torch.ones(8, 2)}, "diffusers", 4,
                     "has no module of the name 'lora_unet_blocks_3_self_attn_q'"),
    "some of another": ({**attn("to_q"), **attn("to_x")}, "diffusers", 4, "Stable Diffusion has no module of the name"),
    "twice": ({**attn("to_q"),
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight": torch.ones(2, 8),
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_up.weight": torch.ones(8, 2)},
        "diffusers", 4, "under names of two layouts"),
    "same": (attn("to_q"), "kohya", 2, "has the names of kohya already"),
    "no adapter": ({"weight": torch.ones(2)}, "diffusers", 4, "is no LoRA adapter"),
    "Flux or SD3": ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 8),
                     "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(8, 2)}, "kohya", 4,
                    "is of Flux or Stable Diffusion 3 or Stable Diffusion 3.5 Large, which"),
    "a convolution": ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 8, 1, 1),
                       "transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(8, 2, 1, 1)},
                      "kohya", 3, "that does not fit into single_blocks.0.linear1"),
    "T5 alone": ({"lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight": torch.ones(2, 8),
                  "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight": torch.ones(8, 2)}, "diffusers", 4,
                 "none that tell of which pipeline"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_converted(kind: str, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    state, to, code, words = REFUSED[kind]
    save_file(state, tmp_path / "lora.safetensors")
    source, new = tmp_path / "lora.safetensors", tmp_path / "new.safetensors"
    done = wconv("convert-lora", source, "--to", to, "-o", new, exit_code=code)
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_scales_that_kohya_cannot_have(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    state = flux_of_diffusers()
    noted = {"transformer.r": 2, "transformer.lora_alpha": 2, "transformer.alpha_pattern": {"attn.to_q": 1}}
    noted["transformer.rank_pattern"] = {"single_transformer_blocks.0.attn.to_v": 3, "proj_mlp": 6}
    save_file(state, tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": json.dumps(noted)})
    source, new = tmp_path / "lora.safetensors", tmp_path / "new.safetensors"
    done = wconv("convert-lora", source, "--to", "kohya", "-o", new, exit_code=4)
    assert "of another scale (alpha / rank)" in done.stderr


@pytest.mark.parametrize(
    "raw",
    [
        "{",
        "[]",
        '{"shared": 1}',
        '{"joined": {"a": ["b"]}}',
        '{"more": 1}',
        '{"alpha": 2}',
        '{"alphas": {"a": "x1x1x1x1x1"}}',
    ],
)
def test_a_note_of_nonsense(raw: str, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    save_file(attn("to_q"), tmp_path / "lora.safetensors", metadata={"wconv_lora": raw})
    source, new = tmp_path / "lora.safetensors", tmp_path / "new.safetensors"
    done = wconv("convert-lora", source, "--to", "diffusers", "-o", new, exit_code=3)
    assert "that wconv did not write" in done.stderr


def test_older_names_of_diffusers(lora: Any, tmp_path: Path) -> None:
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    layer = "text_encoder.text_model.encoder.layers.0"
    names = {
        f"unet.{module}.processor.to_out_lora": f"unet.{module}.to_out.0",
        f"unet.{module}.to_q.lora": f"unet.{module}.to_q",
        f"{layer}.self_attn.to_q_lora": f"{layer}.self_attn.q_proj",
        f"{layer}.mlp.fc1.lora_linear_layer": f"{layer}.mlp.fc1",
    }
    old = {f"{name}.{which}.weight": torch.randn(2, 2) for name in names for which in ("down", "up")}
    torch.save(old, tmp_path / "pytorch_lora_weights.bin")
    new = load_file(lora(tmp_path / "pytorch_lora_weights.bin", "diffusers", "new.safetensors"))
    assert same(new, {f"{new}.lora_{end}.weight": old[f"{name}.{which}.weight"] for name, new in names.items()
                      for end, which in (("A", "down"), ("B", "up"))})  # fmt: skip
    back = load_file(lora(tmp_path / "pytorch_lora_weights.bin", "kohya", "kohya.safetensors"))
    assert back["lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha"] == 2


@pytest.mark.slow
def test_a_tiny_flux_takes_what_was_kohyas(lora: Any, tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip
    weights = {name: one.clone() for name, one in model.state_dict().items()}
    state = {f"transformer.{name}": one for name, one in make_pairs(model).items()}
    save_file(state, tmp_path / "lora.safetensors")
    kohya = lora(tmp_path / "lora.safetensors", "kohya", "kohya.safetensors")
    changed = {name: one * 3 if name.endswith(".alpha") else one for name, one in load_file(kohya).items()}
    save_file(changed, kohya, metadata=header(kohya))
    new = lora(kohya, "diffusers", "new.safetensors")

    def run() -> Any:
        noise = torch.Generator().manual_seed(1)
        hidden, text, pooled = (torch.randn(1, *shape, generator=noise) for shape in ((4, 4), (3, 16), (8,)))
        ids = torch.zeros(4, 3), torch.zeros(3, 3)
        with torch.no_grad():
            return model(hidden, text, pooled, torch.tensor([1.0]), *ids[::-1]).sample

    merged(model, under(state, "transformer."), lambda *_: 3.0)
    wanted = run()
    model.load_state_dict(weights)
    model.load_lora_adapter(
        load_file(new), prefix="transformer", metadata=json.loads(header(new)["lora_adapter_metadata"])
    )
    torch.testing.assert_close(run(), wanted, rtol=1e-4, atol=1e-5)


def test_outputs(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    source = tmp_path / "style.safetensors"
    save_file(attn("to_q", alpha=1.0), source)

    def run(to: str, output: Path, *more: str) -> Any:
        return wconv("convert-lora", source, "--to", to, "-o", output, *more, exit_code=None)

    assert run("diffusers", tmp_path / "folder").exit_code == 0
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["pytorch_lora_weights.safetensors"]
    assert run("diffusers", tmp_path / "folder" / "pytorch_lora_weights.safetensors").exit_code == 0  # it is there
    assert run("peft", tmp_path / "x.safetensors").exit_code == 2
    assert run("diffusers", tmp_path / "x.bin").exit_code == 2
    assert run("diffusers", source).exit_code == 5
    told = run("diffusers", tmp_path / "y.safetensors", "--dry-run")
    assert (told.exit_code, (tmp_path / "y.safetensors").exists()) == (0, False)
    assert "a LoRA for Stable Diffusion 1 or 2 of 1 module, from kohya to diffusers" in told.stdout
    assert "Diffusers reads from 0.34 on" in told.stdout
    (tmp_path / "loras").mkdir()
    for name in "ab":
        save_file(attn("to_q"), tmp_path / "loras" / f"{name}.safetensors")
    done = wconv("convert-lora", tmp_path / "loras", "--to", "diffusers", "-o", tmp_path / "z", exit_code=2)
    assert "holds several sets of weights (a.safetensors, b.safetensors)" in done.stderr


def test_tables_name_each_module_once() -> None:
    from converter.transforms.lora.bases import bases

    for base in bases():
        wholes: dict[str, set[tuple[str, ...]]] = {}
        for row in base.rows:
            for name in {row.whole, *row.parts}:
                wholes.setdefault(name.replace("_", "."), set()).add(row.parts)
        assert {name: parts for name, parts in wholes.items() if len(parts) > 1} == {}, base.name

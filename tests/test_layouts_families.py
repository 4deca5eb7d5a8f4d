"""The tables of transformers that draw: each held against Diffusers' own converter, both ways, and its models."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from converter.dtypes import DTYPES
from converter.errors import BadFile, BadRequest, WconvError
from converter.storage import FileRef, place_of
from converter.tensors.base import ByteRange, Tensor
from converter.tensors.derived import Constant
from converter.tensors.reader import RangeReader
from converter.tensors.shaped import identity
from converter.tensors.view import View, contiguous_strides
from converter.transforms.layouts.chroma import chroma_config, chroma_rows, chroma_shapes
from converter.transforms.layouts.flux import flux_config, flux_rows, flux_shapes
from converter.transforms.layouts.rows import Row, put_together, take_apart
from converter.transforms.layouts.sana import UNREAD, sana_config, sana_rows, sana_shapes, sana_stand_ins
from converter.transforms.layouts.sd3 import sd3_config, sd3_rows, sd3_shapes
from converter.transforms.layouts.sizes import Shapes, Sizes
from converter.transforms.layouts.t5 import TIED, t5_rows, t5_shapes
from converter.transforms.layouts.wan import wan_config, wan_rows, wan_shapes

F32 = DTYPES["F32"]
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # Chroma's own
State = dict[str, torch.Tensor]


class Case(NamedTuple):
    """A class of models as published, and a size of it in a few numbers."""

    model: str
    judge: str
    rows: Callable[[Any], list[Row]]
    shapes: Callable[[Any], Shapes]
    config_of: Callable[[Sizes], dict[str, Any]]
    config: Mapping[str, Any]
    small: Mapping[str, Any]


FLUX = Case(
    "FluxTransformer2DModel", "convert_flux_transformer_checkpoint_to_diffusers", flux_rows, flux_shapes, flux_config,
    {"axes_dims_rope": [16, 56, 56]}, {"num_layers": 2, "num_single_layers": 1},
)  # fmt: skip
SD3 = Case(
    "SD3Transformer2DModel", "convert_sd3_transformer_checkpoint_to_diffusers", sd3_rows, sd3_shapes, sd3_config,
    {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
    {"num_layers": 3},
)  # fmt: skip
SANA = Case(
    "SanaTransformer2DModel", "convert_sana_transformer_to_diffusers", sana_rows, sana_shapes, sana_config,
    {}, {"num_layers": 2},
)  # fmt: skip

CHROMA = Case(
    "ChromaTransformer2DModel", "convert_chroma_transformer_checkpoint_to_diffusers", chroma_rows, chroma_shapes,
    chroma_config, {"axes_dims_rope": [16, 56, 56]}, {"num_layers": 2, "num_single_layers": 1},
)  # fmt: skip
WAN = Case(
    "WanTransformer3DModel", "convert_wan_transformer_to_diffusers", wan_rows, wan_shapes, wan_config, {},
    {"num_layers": 2},
)  # fmt: skip


def like(case: Case, small: Mapping[str, Any] = {}, /, **config: Any) -> Case:
    return case._replace(config={**case.config, **config}, small={**case.small, **small})


SANA_600M = {
    "num_attention_heads": 36, "num_layers": 28, "num_cross_attention_heads": 16, "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}  # fmt: skip
RMS = {"qk_norm": "rms_norm"}
CASES = {
    "flux-schnell": FLUX,
    "flux-dev": like(FLUX, guidance_embeds=True),
    "flux-fill": like(FLUX, guidance_embeds=True, in_channels=384, out_channels=64),
    "flux-depth": like(FLUX, guidance_embeds=True, in_channels=128, out_channels=64),
    "sd3": SD3,
    "sd3.5-large": like(SD3, **RMS, num_layers=38, num_attention_heads=38, caption_projection_dim=2432),
    "sd3.5-medium": like(
        SD3, {"dual_attention_layers": (0, 1)}, **RMS, pos_embed_max_size=384, dual_attention_layers=[*range(13)]
    ),
    "chroma": CHROMA,
    "wan-t2v": WAN,
    "wan-1.3b": like(WAN, num_attention_heads=12, ffn_dim=8960, num_layers=30),
    "wan-i2v": like(WAN, in_channels=36, image_dim=1280, added_kv_proj_dim=5120),
    "sana": SANA,
    "sana-600m": like(SANA, **SANA_600M, sample_size=16),
    "sana-4k": like(SANA, sample_size=128, interpolation_scale=2.0),
    "sana-1.5": like(SANA, num_layers=60, qk_norm="rms_norm_across_heads"),
}
FLF2V = like(CASES["wan-i2v"], pos_embed_seq_len=514)  # which Diffusers' converter of single files leaves as it is
SPRINT = like(SANA, guidance_embeds=True, qk_norm="rms_norm_across_heads")


def meta_state(case: Case, config: Mapping[str, Any]) -> tuple[State, dict[str, Any]]:
    """Give the tensors of the real class, without their bytes, and its config."""
    return _meta_state(case.model, json.dumps(dict(config)))


@functools.cache
def _meta_state(model: str, config: str) -> tuple[State, dict[str, Any]]:
    import diffusers

    with torch.device("meta"):
        made = getattr(diffusers, model)(**json.loads(config))
    return made.state_dict(), dict(made.config)


def tensor(name: str, value: torch.Tensor) -> Tensor:
    return Tensor(name, Constant(F32, tuple(value.shape), value.contiguous().numpy().tobytes()))


def hollow(state: Mapping[str, torch.Tensor]) -> dict[str, Tensor]:
    """Give tensors that have shapes, and no bytes that could be read."""
    storage = ByteRange(FileRef(place_of("m.safetensors")), 0, 1 << 40)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    return {
        name: Tensor(name, View(F32, shape, storage, 0, contiguous_strides(shape))) for name, shape in shapes.items()
    }


def values(tensors: list[Tensor]) -> State:
    made = {}
    with RangeReader() as reader:
        for one in tensors:
            out = bytearray(one.nbytes)
            one.source.read(0, memoryview(out), reader)
            made[one.name] = torch.frombuffer(out, dtype=torch.float32).reshape(one.shape)
    return made


@pytest.mark.parametrize("kind", [*CASES, "wan-flf2v", "sana-sprint"])
@pytest.mark.parametrize("is_small", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["small", "whole"])
def test_a_table_has_what_the_class_has(kind: str, is_small: bool) -> None:
    case = {**CASES, "wan-flf2v": FLF2V, "sana-sprint": SPRINT}[kind]
    asked = {**case.config, **(case.small if is_small else {})}
    state, config = meta_state(case, asked)
    assert {part for row in case.rows(config) for part in row.parts} == state.keys()
    shapes = case.shapes(config)
    assert shapes == {name: tuple(state[name].shape) for name in state}
    # What a config leaves out is what the class takes.
    given = {name: value for name, value in asked.items() if value is not None}
    assert case.shapes(given) == shapes


def narrow(state: Mapping[str, torch.Tensor]) -> State:
    """Give random tensors of as many rows, and one of all else: the converters look at rows alone."""
    return {name: torch.rand((*value.shape[:1], *(1 for _ in value.shape[1:]))) for name, value in state.items()}


@pytest.mark.parametrize("kind", sorted(CASES.keys() - {"sana-1.5"}))  # only a script knows that
def test_the_table_says_what_diffusers_does(kind: str) -> None:
    from diffusers.loaders import single_file_utils

    case = CASES[kind]
    meta, config = meta_state(case, {**case.config, **case.small})
    state = narrow(meta)
    rows = case.rows(config)
    wholes, left = put_together({name: tensor(name, value) for name, value in state.items()}, rows)
    assert not left
    original = values(wholes)
    extra = {name: torch.zeros(1) for name in UNREAD[:2]} if case.model.startswith("Sana") else {}
    judged = getattr(single_file_utils, case.judge)({**original, **extra})
    assert judged.keys() == state.keys()
    assert all(torch.equal(judged[name], value) for name, value in state.items())
    # With the prefix that it has in ComfyUI's files it says the same.
    prefixed = {f"model.diffusion_model.{name}": value for name, value in {**original, **extra}.items()}
    assert getattr(single_file_utils, case.judge)(prefixed).keys() == state.keys()
    parts, left = take_apart({name: tensor(name, value) for name, value in original.items()}, rows)
    assert not left
    back = values(parts)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def original_of(case: Case, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    meta, full = meta_state(case, config)
    wholes, _ = put_together(hollow(meta), case.rows(full))
    if case.model.startswith("Sana"):
        wholes += (one for one, _ in sana_stand_ins(full, wholes))
    return {one.name: one for one in wholes}, full


def sizes_of(tensors: Mapping[str, Tensor]) -> Sizes:
    return Sizes("m.safetensors", {name: one.shape for name, one in tensors.items()})


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("is_small", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["small", "whole"])
def test_shapes_say_the_config(kind: str, is_small: bool) -> None:
    case = CASES[kind]
    original, expected = original_of(case, {**case.config, **(case.small if is_small else {})})
    made = case.config_of(sizes_of(original))
    differ = {key: (value, expected[key]) for key, value in made.items() if key in expected and value != expected[key]}
    assert {key: both for key, both in differ.items() if list(both[0] or ()) != list(both[1] or ())} == {}
    public = {key for key in expected if not key.startswith("_")}
    assert public - made.keys() <= {"guidance_embeds_scale", "timestep_scale"}
    assert made["_class_name"] == case.model


TINY = {
    "flux": like(FLUX, num_layers=1, num_single_layers=1),
    "sd3": like(SD3, num_layers=2, **RMS),
    "sana": like(SANA, num_layers=1),
}
FIRST = {
    "flux": "double_blocks.0.img_attn.qkv.weight",
    "sd3": "joint_blocks.1.x_block.attn.ln_k.weight",
    "sana": "blocks.0.cross_attn.kv_linear.bias",
}


@pytest.mark.parametrize("kind", TINY)
def test_half_a_model_is_refused(kind: str) -> None:
    original, _ = original_of(TINY[kind], TINY[kind].config)
    lone = {name: one for name, one in original.items() if name != FIRST[kind]}
    with pytest.raises(BadFile, match=re.escape(f"lacks {FIRST[kind]!r}, without which it is no whole model")):
        TINY[kind].config_of(sizes_of(lone))


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("turn", [0, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 2, 3, 4))])
def test_odd_shapes_end_in_one_line(kind: str, turn: int) -> None:
    case = TINY[kind]
    original, _ = original_of(case, case.config)
    shapes: list[tuple[int, ...]] = [(), (0,), (7,), (3, 5), (1, 1, 1, 0)]
    for at, name in enumerate(original):
        odd = {**original, **hollow({name: torch.empty(shapes[(turn + at) % len(shapes)])})}
        try:
            made = case.config_of(sizes_of(odd))
            parts, _ = take_apart(odd, case.rows(made))
        except WconvError:
            continue
        # What can be read so far is not what its config says.
        expected = case.shapes(made)
        assert name in UNREAD or any(one.shape[: len(expected[one.name])] != expected[one.name] for one in parts)


@pytest.mark.parametrize(
    ("kind", "name", "shape", "problem"),
    [
        ("flux", "double_blocks.0.img_attn.norm.query_norm.scale", (64,), r"how positions are encoded in heads of 64"),
        ("flux", "img_in.weight", (3000, 64), r"does not say its heads: 3000 is no multiple of 128"),
        ("sd3", "x_embedder.proj.weight", (1537, 16, 2, 2), r"does not say its heads: 1537 is no multiple of 64"),
        ("sd3", "final_layer.linear.weight", (63, 1536), r"does not say its channels: 63 is no multiple of 4"),
        ("sana", "x_embedder.proj.weight", (640, 32, 1, 1), r"how many heads read the text: .* 2240 or 1152"),
        ("sana", "cfg_embedder.mlp.0.weight", (2240, 256), r"does not say how its steps are counted"),
    ],
)  # fmt: skip
def test_what_shapes_do_not_say_needs_a_config(kind: str, name: str, shape: tuple[int, ...], problem: str) -> None:
    original, _ = original_of(TINY[kind], TINY[kind].config)
    with pytest.raises(BadRequest, match=problem):
        TINY[kind].config_of(sizes_of({**original, **hollow({name: torch.empty(shape, device="meta")})}))


@pytest.mark.parametrize(
    ("kind", "name", "problem"),
    [
        ("sd3", "joint_blocks.64.x", "numbers its joint_blocks up to 64 and on, and no model has so many"),
        ("sana", "blocks.99999999999999999999.x", "and no model has so many"),
        ("flux", "single_blocks.3.x", "lacks 'single_blocks.1.linear2.weight', .* and 22 more"),
        ("sd3", "pos_embed", "'pos_embed', which is for no square: it has 7 places"),
    ],
)
def test_blocks_that_no_model_has(kind: str, name: str, problem: str) -> None:
    original, _ = original_of(TINY[kind], TINY[kind].config)
    with pytest.raises(BadFile, match=problem):
        TINY[kind].config_of(sizes_of({**original, **hollow({name: torch.empty(1, 7)})}))


def test_flux_that_comfyui_saved_has_other_norms() -> None:
    original, config = original_of(TINY["flux"], TINY["flux"].config)
    renamed = {re.sub(r"_norm\.scale$", "_norm.weight", name): one for name, one in original.items()}
    assert renamed.keys() != original.keys()
    made = flux_config(sizes_of(renamed))
    parts, left = take_apart(renamed, flux_rows(made))
    assert not left
    assert {one.name for one in parts} == flux_shapes(config).keys()


def test_norms_under_both_names_are_refused() -> None:
    original, config = original_of(TINY["flux"], TINY["flux"].config)
    name = "single_blocks.0.norm.key_norm."
    with pytest.raises(BadFile, match="two tensors that would both be called"):
        take_apart({**original, **hollow({f"{name}weight": torch.empty(128)})}, flux_rows(config))


@pytest.mark.parametrize("leaf", ["scale_weight", "weight_scale", "lora_A.weight", "alpha"])
def test_what_is_no_weight_is_left(leaf: str) -> None:
    name = f"double_blocks.0.img_attn.qkv.{leaf}"
    assert take_apart(hollow({name: torch.empty(())}), flux_rows({})) == ([], [name])


@pytest.mark.parametrize("feed_forward", ["gated-gelu", "relu"])
def test_t5_has_what_the_class_has(feed_forward: str) -> None:
    from transformers import T5Config, T5EncoderModel

    published = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": feed_forward}
    with torch.device("meta"):
        state = T5EncoderModel(T5Config(**published)).state_dict()
    parts, left = take_apart(hollow(state), t5_rows(published))
    assert left == [TIED]
    assert [one.name for one in parts] == [name for name in state if name != TIED]
    assert t5_shapes(published) == {one.name: one.shape for one in parts}


def test_an_identity_takes_no_room() -> None:
    eye = identity(F32, 5)
    assert torch.equal(values([Tensor("eye", eye)])["eye"], torch.eye(5))
    whole = torch.eye(5).numpy().tobytes()
    with RangeReader() as reader:
        for begin in range(0, 100, 4):
            out = bytearray(100 - begin)
            eye.part(begin, 100).read(begin, memoryview(out), reader)
            assert out == whole[begin:]


def test_what_sana_is_not_read_for_is_zeros() -> None:
    made = sana_stand_ins({"sample_size": 4, "num_attention_heads": 1}, [tensor("x", torch.ones(1))])
    position, text = (one for one, _ in made)
    assert (position.name, position.shape) == ("pos_embed", (1, 16, 32))
    assert (text.name, text.shape) == ("y_embedder.y_embedding", (300, 2304))
    assert not any(value.any() for value in values([position, text]).values())


# Models that draw, as Diffusers loads them.

LOADED: dict[str, tuple[Case, dict[str, Any], dict[str, Any]]] = {
    "sd3": (
        SD3,
        {
            "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 8,
            "num_attention_heads": 2, "caption_projection_dim": 16, "joint_attention_dim": 12,
            "pooled_projection_dim": 20, "pos_embed_max_size": 8, "dual_attention_layers": (0,), **RMS,
        },
        {
            "hidden_states": torch.ones(1, 4, 8, 8), "encoder_hidden_states": torch.ones(1, 3, 12),
            "pooled_projections": torch.ones(1, 20), "timestep": torch.ones(1),
        },
    ),
    "sana": (
        SANA,
        {
            "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 4,
            "num_cross_attention_heads": 2, "cross_attention_head_dim": 4, "cross_attention_dim": 8,
            "caption_channels": 16, "sample_size": 8,
        },
        {
            "hidden_states": torch.ones(1, 4, 8, 8), "encoder_hidden_states": torch.ones(1, 3, 16),
            "timestep": torch.ones(1),
        },
    ),
    "wan": (
        WAN,
        {
            "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
            "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32,
        },
        {
            "hidden_states": torch.ones(1, 4, 1, 4, 4), "encoder_hidden_states": torch.ones(1, 3, 16),
            "timestep": torch.ones(1),
        },
    ),
    "flux": (
        FLUX,
        # Its converter knows one width.
        {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 12, "pooled_projection_dim": 20},
        {
            "hidden_states": torch.ones(1, 4, 64), "encoder_hidden_states": torch.ones(1, 3, 12),
            "pooled_projections": torch.ones(1, 20), "timestep": torch.ones(1), "img_ids": torch.ones(4, 3),
            "txt_ids": torch.zeros(3, 3),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["sd3", "sana", "wan", pytest.param("flux", marks=pytest.mark.slow)])
def test_diffusers_loads_what_is_put_together(kind: str, builders: Any, tmp_path: Path) -> None:
    import diffusers

    case, config, inputs = LOADED[kind]
    torch.manual_seed(0)
    model = getattr(diffusers, case.model)(**config).eval()
    if kind != "flux":
        builders.shake(model)
    wholes, _ = put_together(
        {name: tensor(name, value) for name, value in model.state_dict().items()}, case.rows(model.config)
    )
    if kind == "sana":
        wholes += [one for one, _ in sana_stand_ins(model.config, wholes)]
    save_file(values(wholes), tmp_path / "model.safetensors")
    model.save_config(tmp_path / "config")
    loaded = type(model).from_single_file(
        str(tmp_path / "model.safetensors"), config=str(tmp_path / "config"), subfolder="", local_files_only=True
    )
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).sample, model(**inputs).sample)

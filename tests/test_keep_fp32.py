"""What stays float32, judged by diffusers and transformers: their attributes, and what their loaders really do."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers

from converter.dtypes import BY_ALIAS
from converter.libraries import keep_fp32
from converter.libraries.base import Library
from converter.libraries.diffusers import DIFFUSERS
from converter.libraries.transformers import TRANSFORMERS

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "make_keep_fp32.py"
SMALLER = ["bf16", "fp16", "fp8_e4m3fn", "fp8_e5m2"]
# Their default configs are not complete.
NOT_BUILT = {
    "EsmForMaskedLM",
    "EsmForSequenceClassification",
    "EsmForTokenClassification",
    "EsmModel",
    "ReformerModelWithLMHead",
}


@pytest.fixture(scope="module")
def script() -> Any:
    """Give the module that writes the tables."""
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_class(rows: Iterable[tuple[str, ...]]) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Give the lists of a table by class name; no class is there twice."""
    pairs = [(name, tuple(tuple(kept.split()) for kept in row[:-1])) for row in rows for name in row[-1].split()]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def make_wan() -> Any:
    """Make a Wan transformer."""
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )


def make_sana() -> Any:
    """Make a Sana transformer: it keeps nothing."""
    return diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
    )


def t5_config() -> transformers.T5Config:
    """Give the config of a T5 of two layers."""
    return transformers.T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)


def make_t5() -> Any:
    """Make a T5 encoder: its list is for float16 alone."""
    return transformers.T5EncoderModel(t5_config())


def make_blip2() -> Any:
    """Make a BLIP-2 whose language model is a T5: it keeps what its parts keep."""
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Blip2Config(
        vision_config={**small, "image_size": 8, "patch_size": 4},
        qformer_config={**small, "encoder_hidden_size": 16, "vocab_size": 50},
        text_config={**t5_config().to_dict(), "architectures": ["T5ForConditionalGeneration"]},
        num_query_tokens=2,
    )
    return transformers.Blip2ForConditionalGeneration(config)


def make_hunyuan() -> Any:
    """Make a model of experts: what it keeps has another name in its files."""
    return transformers.HYV3ForCausalLM(
        transformers.HYV3Config(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            moe_intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
        )
    )


def make_xlnet() -> Any:
    """Make an XLNet: it has no list, but parameters that are made as float32."""
    return transformers.XLNetModel(transformers.XLNetConfig(vocab_size=50, d_model=16, n_layer=1, n_head=2, d_inner=24))


def make_clip() -> Any:
    """Make a CLIP text model: it keeps nothing."""
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
        )
    )


KEPT = [
    (make_wan, {"bf16": "time_embedder scale_shift_table norm2", "fp16": "time_embedder scale_shift_table norm2"}),
    (make_sana, {"bf16": "", "fp16": ""}),
    (make_t5, {"bf16": "", "fp16": "wo"}),
    (make_blip2, {"bf16": "", "fp16": "query_tokens qformer wo"}),
    (make_hunyuan, {"bf16": "expert_bias", "fp16": "expert_bias"}),
    (make_xlnet, {"bf16": "mask_emb q k v o r", "fp16": "mask_emb q k v o r"}),
    (make_clip, {"bf16": "", "fp16": ""}),
]


@pytest.mark.parametrize("alias", ["bf16", "fp16"])
@pytest.mark.parametrize(("make", "kept"), KEPT, ids=[make.__name__ for make, _ in KEPT])
def test_the_rule_names_what_the_loader_keeps(
    make: Callable[[], Any], kept: dict[str, str], alias: str, builders: Any, tmp_path: Path
) -> None:
    target = BY_ALIAS[alias]
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text("utf-8"))
    loaded = load(type(model), tmp_path / "source", getattr(torch, target.torch_name))
    # Saved again it is a file with the loader's own dtypes, under the names that files have.
    loaded.save_pretrained(tmp_path / "loaded")
    tags = tags_in(tmp_path / "loaded")
    assert tags.keys() == tags_in(tmp_path / "source").keys()
    assert set(tags.values()) <= {"F32", target.tag}
    library = DIFFUSERS if "_class_name" in config else TRANSFORMERS
    rules = [library.keep_rule(name, target) for name in class_names(config)]
    expected = {name for name, tag in tags.items() if tag == "F32"}
    assert {name for name in tags if any(keep(name) for keep in rules)} == expected
    assert set(kept[alias].split()) <= {segment for name in expected for segment in name.split(".")}
    assert bool(kept[alias]) == bool(expected)


def load(model_class: Any, folder: Path, dtype: torch.dtype) -> Any:
    """Load a model as people do; the two libraries call the option differently."""
    if issubclass(model_class, diffusers.ModelMixin):
        return model_class.from_pretrained(folder, torch_dtype=dtype)
    return model_class.from_pretrained(folder, dtype=dtype)


def tags_in(folder: Path) -> dict[str, str]:
    """Read the dtype of each tensor from the header of the one safetensors file of a folder."""
    (path,) = folder.glob("*.safetensors")
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}


def class_names(config: dict[str, Any]) -> Iterator[str]:
    """List the classes that a config names, for the model and for its parts."""
    yield from [config["_class_name"]] if "_class_name" in config else config.get("architectures") or []
    for part in config.values():
        if isinstance(part, dict):
            yield from class_names(part)


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "SanaTransformer2DModel", "UNet2DConditionModel"])
def test_a_diffusers_class_is_as_in_the_table(name: str) -> None:
    listed = by_class(keep_fp32.DIFFUSERS).get(name, ((),))
    assert listed == (tuple(getattr(diffusers, name)._keep_in_fp32_modules or ()),)


@pytest.mark.parametrize(
    "name",
    [
        "T5EncoderModel",
        "T5ForConditionalGeneration",
        "UMT5EncoderModel",
        "Blip2ForConditionalGeneration",
        "DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM",
        "GptOssForCausalLM",
        "CLIPTextModel",
        "LlamaForCausalLM",
        "Qwen2ForCausalLM",
    ],
)
def test_a_transformers_class_is_as_in_the_table(name: str) -> None:
    found = getattr(transformers, name)
    listed = by_class(keep_fp32.TRANSFORMERS).get(name, ((), ()))
    assert listed == (
        tuple(found._keep_in_fp32_modules or ()),
        tuple(found._keep_in_fp32_modules_strict or ()),
    )


@pytest.mark.slow
def test_every_class_is_as_in_the_tables(script: Any) -> None:
    script.import_all()
    assert by_class(keep_fp32.DIFFUSERS) == script.diffusers_lists()
    assert by_class(keep_fp32.TRANSFORMERS) == script.transformers_lists()


@pytest.mark.slow
def test_nothing_is_missed_where_attributes_do_not_say_it_all(script: Any) -> None:
    script.import_all()
    found = {model.__name__: model for model in script.find_classes(transformers.PreTrainedModel)}
    names = {name for row in keep_fp32.MORE_TRANSFORMERS for name in row[-1].split()}
    missed = {name: script.find_missed(found[name]) for name in sorted(names - NOT_BUILT)}
    assert {name: wrong for name, wrong in missed.items() if wrong} == {}


@pytest.mark.parametrize("alias", SMALLER)
def test_diffusers_keeps_for_every_smaller_dtype(alias: str) -> None:
    keep = DIFFUSERS.keep_rule("WanTransformer3DModel", BY_ALIAS[alias])
    assert keep("blocks.0.norm2.weight")
    assert not keep("blocks.0.attn1.to_q.weight")


def test_float8_keeps_what_float16_keeps() -> None:
    name = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    kept = {alias: TRANSFORMERS.keep_rule("T5EncoderModel", BY_ALIAS[alias])(name) for alias in SMALLER}
    assert kept == {"bf16": False, "fp16": True, "fp8_e4m3fn": True, "fp8_e5m2": True}


@pytest.mark.parametrize("alias", ["fp32", "fp64"])
def test_what_is_not_smaller_keeps_nothing(alias: str) -> None:
    assert not DIFFUSERS.keep_rule("WanTransformer3DModel", BY_ALIAS[alias])("blocks.0.norm2.weight")


@pytest.mark.parametrize("library", [DIFFUSERS, TRANSFORMERS])
@pytest.mark.parametrize("name", ["", "NoSuchModel", "T5", "T5EncoderModel T5Model"])
def test_an_unknown_class_keeps_nothing(name: str, library: Library) -> None:
    keep = library.keep_rule(name, BY_ALIAS["fp16"])
    assert not any(keep(tensor) for tensor in ["", "wo", "norm1", "a.wo.weight"])


def test_a_class_is_looked_up_in_its_own_library() -> None:
    assert not TRANSFORMERS.keep_rule("WanTransformer3DModel", BY_ALIAS["fp16"])("norm1")
    assert not DIFFUSERS.keep_rule("T5EncoderModel", BY_ALIAS["fp16"])("wo")


def test_diffusers_matches_whole_segments() -> None:
    keep = DIFFUSERS.matches(["norm", "proj.in"])
    assert keep("blocks.0.norm.weight")
    assert keep("norm")
    assert not keep("blocks.0.norm1.weight")
    assert not keep("proj.in.weight")


def test_transformers_matches_anywhere() -> None:
    keep = TRANSFORMERS.matches(["wo", "mlp.gate.weight", "layers*router"])
    assert keep("a.wo.weight")
    assert keep("word_embeddings.weight")
    assert keep("layers.0.mlp.gate.weight")
    assert keep("layers.0.mlp.router.bias")
    assert not keep("layers.0.mlp.gate_proj.weight")


def test_no_library_is_imported() -> None:
    code = "import sys, converter.libraries\nprint({'torch', 'diffusers', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"

"""Which modules are linear: the table against what the libraries themselves say of many configs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import ref_to, whole_view

from converter.dtypes import DTYPES
from converter.libraries import asked, library_of, modules
from converter.libraries.diffusers import DIFFUSERS
from converter.libraries.modules import find_linears
from converter.libraries.transformers import TRANSFORMERS
from converter.models.component import Component
from converter.storage import place_of
from converter.tensors.base import ByteRange, Tensor

pytestmark = pytest.mark.usefixtures("asked_here")

DECODER = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLIP = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
GPT2 = {
    "vocab_size": 50,
    "n_positions": 16,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

CONFIGS: dict[str, dict[str, Any]] = {
    **{
        f"{family}{kind}": {"architectures": [f"{family}{kind}"], "model_type": family.lower(), **DECODER}
        for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2")
        for kind in ("ForCausalLM", "Model")
    },
    "T5EncoderModel": {"architectures": ["T5EncoderModel"], "model_type": "t5", **T5},
    "T5 gated": {"architectures": ["T5EncoderModel"], "model_type": "t5", "feed_forward_proj": "gated-gelu", **T5},
    "T5 untied": {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "tie_word_embeddings": False,
        **T5,
    },
    "MT5EncoderModel": {"architectures": ["MT5EncoderModel"], "model_type": "mt5", **T5},
    "UMT5EncoderModel": {"architectures": ["UMT5EncoderModel"], "model_type": "umt5", **T5},
    "CLIPTextModel": {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **CLIP},
    "CLIP projection": {"architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model", **CLIP},
    "GPT2Model": {"architectures": ["GPT2Model"], "model_type": "gpt2", **GPT2},
    "GPT2LMHeadModel": {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **GPT2},
    "Sana": {"_class_name": "SanaTransformer2DModel", "num_layers": 1},
    "Sana guided": {"_class_name": "SanaTransformer2DModel", "num_layers": 1, "guidance_embeds": True},
    "SD3": {"_class_name": "SD3Transformer2DModel", "num_layers": 2},
    "SD3.5": {
        "_class_name": "SD3Transformer2DModel",
        "num_layers": 2,
        "dual_attention_layers": [0],
        "qk_norm": "rms_norm",
    },
    "Flux": {"_class_name": "FluxTransformer2DModel", "num_layers": 1, "num_single_layers": 1, "guidance_embeds": True},
    "PixArt": {"_class_name": "PixArtTransformer2DModel", "num_layers": 1},
    "PixArt 1024": {"_class_name": "PixArtTransformer2DModel", "num_layers": 1, "use_additional_conditions": True},
    "UNet": {"_class_name": "UNet2DConditionModel"},
    "UNet SDXL": {
        "_class_name": "UNet2DConditionModel",
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 88,
        "use_linear_projection": True,
    },
    "UNet classes": {"_class_name": "UNet2DConditionModel", "num_class_embeds": 10},
    "UNet timestep": {"_class_name": "UNet2DConditionModel", "class_embed_type": "timestep"},
}


def component_of(config: dict[str, Any]) -> Component:
    return Component("", place_of("."), (), config)


def tensors_of(config: dict[str, Any]) -> list[Tensor]:
    """Describe what a file of such a model holds: tied tensors once."""
    component = component_of(config)
    model = asked.make_on_meta(component.class_name, library_of(component).package, copy.deepcopy(config))
    tied = getattr(model, "all_tied_weights_keys", {})
    return [
        Tensor(name, whole_view(DTYPES["F32"], tuple(tensor.shape), ByteRange(ref_to(Path()), 0, 0)))
        for name, tensor in model.state_dict().items()
        if name not in tied
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_says_what_the_library_says(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    component, tensors = component_of(CONFIGS[name]), tensors_of(CONFIGS[name])
    table = find_linears(component, tensors)
    assert not table.unknown
    monkeypatch.setattr(modules, "_TABLE", ())
    library = find_linears(component, tensors)
    weights = {module: weight for module, weight in library.weights.items() if weight}
    assert table.weights == weights
    assert table.transposed == library.transposed
    for module in library.weights:
        ours, theirs = (
            library_of(component).is_skipped(module, (*found.skipped, *found.kept)) for found in (table, library)
        )
        assert ours == theirs, module


def test_every_class_of_the_table_is_tested() -> None:
    classes = {name for row in modules._TABLE for name in row.classes.split()}
    assert classes == {component_of(config).class_name for config in CONFIGS.values()}


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_without_the_libraries_the_table_is_enough(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = tensors_of(CONFIGS["LlamaModel"])
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    assert len(find_linears(component_of(CONFIGS["LlamaModel"]), tensors).weights) == 14
    found = find_linears(component_of({"architectures": ["NoSuchModel"]}), tensors)
    assert not found.weights
    assert len(found.unknown) == 15


def test_a_prefix_that_only_the_file_has_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS["CLIPTextModel"]
    tensors = [info._replace(name=f"text_model.{info.name}") for info in tensors_of(config)]
    monkeypatch.setattr(modules, "_TABLE", ())
    found = find_linears(component_of(config), tensors)
    assert found.weights["encoder.layers.0.mlp.fc1"] == "text_model.encoder.layers.0.mlp.fc1.weight"


NAMES = [
    "lm_head",
    "model.lm_head",
    "layers.1.fc",
    "layers.11.fc",
    "proj",
    "q_proj",
    "a.proj",
    "a.proj.b",
    "a.b.proj_out",
]
ENTRIES = ["lm_head", "layers.1", "layers.*", "proj", "a", "proj_out", "a.b", r"^proj$", "fc|b"]


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", NAMES)
def test_skipping_is_the_libraries_own(name: str, entry: str) -> None:
    from diffusers.quantizers.bitsandbytes import utils
    from transformers.quantizers.quantizers_utils import should_convert_module

    assert TRANSFORMERS.is_skipped(name, [entry]) == (not should_convert_module(name, [entry]))
    assert DIFFUSERS.is_skipped(name, [entry]) == (not _converted_by_diffusers(utils, name, entry))


def _converted_by_diffusers(utils: Any, name: str, entry: str) -> bool:
    import bitsandbytes
    from diffusers import BitsAndBytesConfig

    root = torch.nn.Module()
    module = root
    *parents, last = name.split(".")
    for parent in parents:
        module.add_module(parent, torch.nn.Module())
        module = module.get_submodule(parent)
    module.add_module(last, torch.nn.Linear(2, 2))
    utils._replace_with_bnb_linear(root, [entry], quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    return isinstance(root.get_submodule(name), bitsandbytes.nn.Linear8bitLt)

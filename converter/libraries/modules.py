"""Which modules of a model are linear, and which of those its library quantizes: a table, and else the library itself.

The table has the common architectures, so that none of the libraries need be installed; a test holds it against what
they say. A class that is in none is asked itself (``ask.py``), where its library is installed. That takes seconds and
some hundred MB, so the table is asked first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from converter.errors import Unsupported
from converter.libraries.ask import LibraryMissing, ask_class
from converter.models.component import Component
from converter.tensors.base import Tensor

_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class Linears:
    """What is known of the modules of a checkpoint that have a matrix for a weight.

    ``weights`` maps the name that each linear module has in its class to that of its weight in the file, empty where
    the file has none; those in ``transposed`` are Conv1D, whose weight is [in, out]. ``skipped`` are the entries of
    the loader's own skip list, which holds where a config has none, ``kept`` those that it adds to any. ``unknown``
    maps modules that may be linear or not, and ``cause`` says why their class was not made, where it might be.

    ``others`` are of a class that is Linear's child, which only some loaders take for linear; ``experts`` the modules
    that a class has for all experts of a layer, and ``homes`` the names in the class of the file's tensors that are
    joined in these. ``remade`` are modules of which the loader of a method has others, with other tensors.
    """

    weights: Mapping[str, str]
    transposed: frozenset[str] = frozenset()
    skipped: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    unknown: Mapping[str, str] = field(default_factory=dict)
    cause: str = ""
    others: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    homes: Mapping[str, str] = field(default_factory=dict)
    remade: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class _Row(NamedTuple):
    """Ends of module names: ``linear`` ones, and ``others`` that have a matrix too; entries as in Linears."""

    classes: str
    linear: str
    others: str
    skipped: str = ""
    kept: str = ""
    transposed: str = ""


# Held against diffusers 0.42.1 and transformers 5.24.0 by tests/test_modules.py.
_TABLE = (
    _Row(
        "LlamaForCausalLM LlamaModel MistralForCausalLM MistralModel Qwen2ForCausalLM Qwen2Model Qwen3ForCausalLM "
        "Qwen3Model Gemma2ForCausalLM Gemma2Model",
        "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head",
        "embed_tokens",
        skipped="lm_head",
    ),
    _Row(
        "T5EncoderModel T5ForConditionalGeneration MT5EncoderModel UMT5EncoderModel",
        "q k v o wi wi_0 wi_1 wo lm_head",
        "shared embed_tokens relative_attention_bias",
        skipped="lm_head",
        kept="wo",
    ),
    _Row(
        "CLIPTextModel CLIPTextModelWithProjection",
        "q_proj k_proj v_proj out_proj fc1 fc2 text_projection",
        "token_embedding position_embedding",
        skipped="text_projection",
    ),
    _Row(
        "GPT2LMHeadModel GPT2Model",
        "c_attn c_proj c_fc lm_head",
        "wte wpe",
        skipped="lm_head",
        transposed="c_attn c_proj c_fc",
    ),
    _Row("SanaTransformer2DModel", "linear linear_1 linear_2 proj_out to_q to_k to_v to_out.0", ""),
    _Row(
        "SD3Transformer2DModel FluxTransformer2DModel",
        "linear linear_1 linear_2 proj proj_mlp proj_out net.2 context_embedder x_embedder to_q to_k to_v to_out.0 "
        "add_q_proj add_k_proj add_v_proj to_add_out",
        "",
    ),
    _Row("PixArtTransformer2DModel", "linear linear_1 linear_2 proj proj_out net.2 to_q to_k to_v to_out.0", ""),
    _Row(
        "UNet2DConditionModel",
        "linear_1 linear_2 time_emb_proj proj proj_in proj_out net.2 to_q to_k to_v to_out.0 add_k_proj add_v_proj "
        "image_proj image_embeds",
        "class_embedding",
    ),
)


def find_linears(component: Component, tensors: Iterable[Tensor]) -> Linears:
    """Say which of a component's modules are linear; all are ``unknown`` where neither table nor library knows."""
    # A dict, not a list: each module looks up its weight, and models have up to 60,000.
    matrices = {one.name: None for one in tensors if len(one.shape) == 2 and one.name.endswith(_WEIGHT)}
    found = _by_table(component.class_name, matrices)
    if found and not found.unknown:
        return found
    asked = _by_library(component, matrices)
    if isinstance(asked, Linears):
        return asked
    unknown = {name.removesuffix(_WEIGHT): name for name in matrices}
    return replace(found or Linears({}, unknown=unknown), cause=asked)


def _by_table(class_name: str, matrices: Iterable[str]) -> Linears | None:
    row = next((row for row in _TABLE if class_name in row.classes.split()), None)
    if row is None:
        return None
    weights, unknown = {}, {}
    for name in matrices:
        module = name.removesuffix(_WEIGHT)
        if _ends_in(module, row.linear):
            weights[module] = name
        elif not _ends_in(module, row.others):
            unknown[module] = name
    transposed = frozenset(module for module in weights if _ends_in(module, row.transposed))
    return Linears(weights, transposed, tuple(row.skipped.split()), tuple(row.kept.split()), unknown)


def _ends_in(module: str, ends: str) -> bool:
    return any(f".{module}".endswith(f".{end}") for end in ends.split())


def _by_library(component: Component, matrices: Collection[str]) -> Linears | str:
    """Ask the class itself; gives the cause where it cannot be made, none where its library is not installed."""
    try:
        answer = ask_class(component, matrices)
    except LibraryMissing:
        return ""
    except Unsupported as error:
        return error.problem
    weights = {module: _weight_of(module, matrices) for module in answer.linear}
    joined = frozenset(answer.joined)
    for name, home in answer.homes.items():
        if home.removesuffix(_WEIGHT) in weights:
            weights[home.removesuffix(_WEIGHT)] = "" if name in joined else name
    held = [name for name in weights.values() if name]
    if len(set(held)) < len(held):
        return "names a class that has several modules of one name in the file"
    return Linears(
        weights,
        frozenset(answer.transposed),
        answer.skipped,
        answer.kept,
        others=answer.others,
        experts=answer.experts,
        homes={name: answer.homes[name] for name in joined},
        remade=answer.remade,
    )


def _weight_of(module: str, matrices: Collection[str]) -> str:
    """Give the name in the file of a module's weight: a base model's prefix may be on either side alone."""
    wanted = module + _WEIGHT
    if wanted in matrices:
        return wanted
    longer = [name for name in matrices if name.endswith(f".{wanted}")]
    if len(longer) == 1:
        return longer[0]
    return next((name for name in matrices if wanted.endswith(f".{name}")), "")

"""Experts of a mixture: fused, one tensor for all of a layer, or separate, a tensor of each expert and projection.

A table by ``model_type``, in the words of ``transformers/conversion_mapping.py``. Version 5 of transformers loads both
forms and writes the separate one, unless ``save_original_format=False``; version 4 and most programs that serve models
load the separate one alone, and what trains with version 5 has the fused one in its checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from converter.errors import BadFile, BadRequest, Unsupported, Where, spell_shape
from converter.models.checkpoint import Checkpoint
from converter.models.component import Component
from converter.models.schemes import quantized_in
from converter.tensors.base import Tensor
from converter.transforms.layouts.arrange import ExpertsForm
from converter.transforms.layouts.checkpoints import rearranged
from converter.transforms.layouts.operations import Stack
from converter.transforms.layouts.rows import Row, renamings, wholes_of


class _Family(NamedTuple):
    """How models call their experts: in which module of a layer they are in the one form, and in the other.

    ``gate``, ``up`` and ``down`` are an expert's own; ``others`` what else has two names, by those of the fused form.
    """

    fused: str = "mlp"
    separate: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    others: Mapping[str, str] = {}

    def rows(self, layer: str) -> list[Row]:
        """Give the rows of what is in a layer, whose name it is."""
        here, there = f"{layer}{self.fused}.experts", f"{layer}{self.separate}.experts.{{#}}"
        names = {f"{layer}{whole}": f"{layer}{part}" for whole, part in self.others.items()}
        return [
            Row(f"{here}.gate_up_proj", (f"{there}.{self.gate}.weight", f"{there}.{self.up}.weight"), Stack(2)),
            Row(f"{here}.down_proj", (f"{there}.{self.down}.weight",), Stack()),
            *renamings(names),
        ]


_QWEN = _Family()
_MIXTRAL = _Family(
    separate="block_sparse_moe",
    gate="w1",
    up="w3",
    down="w2",
    others={"mlp.gate.weight": "block_sparse_moe.gate.weight"},
)
# Each is what its entry in ``conversion_mapping.py`` says of a layer: those of a family have nothing but it there.
FAMILIES: Mapping[str, _Family] = {
    **dict.fromkeys(
        (
            *("qwen2_moe", "qwen3_moe", "qwen3_next", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe"),
            *("glm4_moe_lite", "glm_moe_dsa", "olmoe", "flex_olmo", "dots1", "afmoe", "hunyuan_v1_moe", "solar_open"),
            *("cohere2_moe", "mellum", "qwen3_5_moe", "qwen3_5_moe_text", "glm4v_moe"),
        ),
        _QWEN,
    ),
    **dict.fromkeys(("mixtral", "minimax"), _MIXTRAL),
    "minimax_m2": _MIXTRAL._replace(
        others={
            **_MIXTRAL.others,
            "mlp.e_score_correction_bias": "block_sparse_moe.e_score_correction_bias",
        }
    ),
    "phimoe": _MIXTRAL._replace(others={"mlp.router.weight": "block_sparse_moe.gate.weight"}),
    "ernie4_5_moe": _Family(
        others={"mlp.gate.moe_statics.e_score_correction_bias": "mlp.moe_statics.e_score_correction_bias"}
    ),
    "exaone_moe": _Family(others={"mlp.gate.e_score_correction_bias": "mlp.e_score_correction_bias"}),
    "hy_v3": _Family(
        others={
            "mlp.gate.weight": "mlp.router.gate.weight",
            "mlp.e_score_correction_bias": "mlp.expert_bias",
            "mlp.shared_experts.*.weight": "mlp.shared_mlp.*.weight",
        }
    ),
    "flint": _Family(others={"self_attn.sinks": "self_attn.softmax_offset"}),
    "mimo_v2_flash": _Family(others={"self_attn.sinks": "self_attn.attention_sink_bias"}),
    "axk1": _Family(others={"mlp.post_mlp_layernorm.weight": "post_mlp_layernorm.weight"}),
    "jamba": _Family("feed_forward", "feed_forward"),
    "lfm2_moe": _Family("feed_forward", "feed_forward", "w1", "w3", "w2"),
}
"""The families that are known, by the ``model_type`` of a config."""
# What configs call the number of experts of a layer.
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_MAX_EXPERTS = 100_000
# They see as well, and have the config of their language model in theirs.
_WITH_TEXT = frozenset({"glm4v_moe", "qwen3_5_moe"})
# Models whose experts are one tensor wherever they lie: transposed, with columns in turn, or with biases.
_ALWAYS_FUSED = frozenset({"gpt_oss", "llama4", "llama4_text", "qwen3_vl_moe", "qwen3_vl_moe_text"})


class _Found(NamedTuple):
    """The names of a checkpoint's experts, by their form, those of its layers, and what is neither form's."""

    fused: dict[str, None]
    separate: dict[str, None]
    layers: dict[str, None]
    strange: list[str]


def with_experts(checkpoint: Checkpoint, component: Component, form: ExpertsForm) -> Checkpoint:
    """Bring a checkpoint's experts into a form; a note says what was done.

    Raises Unsupported for a model whose experts are not known, or quantized; BadFile for experts that are not whole.
    """
    path = checkpoint.weight_set.path
    kind, config = _kind_of(component, path)
    family = FAMILIES[kind]
    count = _count_in(config, kind, component)
    found = _find(checkpoint.tensors, family)
    _check_found(checkpoint, kind, found)
    before, after = (found.separate, "fused") if form == "fused" else (found.fused, "separate")
    if not before:
        note = f"its experts are {after} already"
        return replace(checkpoint, notes=(*checkpoint.notes, note))
    rows = [row for layer in found.layers for row in family.rows(layer)]
    if form == "separate":
        _check_wholes(path, (one for one in checkpoint.tensors if one.name in before), count)
    arranged = rearranged(checkpoint, rows, apart=form == "separate")
    if form == "fused":
        names = set(wholes_of(before, rows).values())
        _check_wholes(path, (one for one in arranged.tensors if one.name in names), count)
    note = f"{len(before):,} tensors of experts that were {'separate' if after == 'fused' else 'fused'} are {after} now"
    return replace(arranged, notes=(*arranged.notes, note))


def _kind_of(component: Component, path: Where) -> tuple[str, Mapping[str, Any]]:
    """Give the ``model_type`` that a config names, and the config, or the one in it, that says how many experts.

    Raises Unsupported for a type that is not in the table.
    """
    kind, inner = component.config.get("model_type"), component.config.get("text_config")
    if not isinstance(kind, str):
        problem = "has no config.json that names its model_type, which says what its experts are called"
        raise BadRequest(path, problem, "Name the folder of one: --config FOLDER.")
    if kind in _ALWAYS_FUSED:
        problem = f"is of the type {kind}, whose experts are one tensor in every file that transformers reads"
        raise Unsupported(path, problem, "Leave --experts out.")
    if kind not in FAMILIES:
        problem = f"is of the type {kind!r}, whose experts wconv does not know"
        raise Unsupported(path, problem, f"Known are {', '.join(sorted(FAMILIES))}.")
    return kind, inner if kind in _WITH_TEXT and isinstance(inner, dict) else component.config


def _find(tensors: Iterable[Tensor], family: _Family) -> _Found:
    found = _Found({}, {}, {}, [])
    layer = r"(?P<layer>(?:\w+\.)*)"
    fused = re.compile(rf"{layer}{family.fused}\.experts\.(?:gate_up_proj|down_proj)", re.ASCII)
    own = "|".join((family.gate, family.up, family.down))
    separate = re.compile(rf"{layer}{family.separate}\.experts\.(?:0|[1-9][0-9]{{0,5}})\.(?:{own})\.weight", re.ASCII)
    around = tuple(dict.fromkeys(f".{module}.experts." for module in (family.fused, family.separate)))
    for name, *_ in tensors:
        if not any(module in f".{name}" for module in around):
            continue
        for pattern, names in ((fused, found.fused), (separate, found.separate)):
            if match := pattern.fullmatch(name):
                names[name] = None
                found.layers[re.sub(r"(?<![^.])[0-9]+(?=\.)", "{}", match["layer"])] = None
                break
        else:
            found.strange.append(name)
    return found


def _check_found(checkpoint: Checkpoint, kind: str, found: _Found) -> None:
    path = checkpoint.weight_set.path
    experts = {**found.fused, **found.separate, **dict.fromkeys(found.strange)}
    quantized = next((one for one in quantized_in(checkpoint) if one.weight in experts), None)
    if quantized:
        raise Unsupported(path, f"holds quantized experts: {quantized}", quantized.advice)
    if found.strange:
        problem = f"holds {found.strange[0]!r}, and the experts of {kind} have no such tensor"
        raise Unsupported(path, problem, "Leave --experts out.")
    if found.fused and found.separate:
        names = f"{next(iter(found.fused))!r} and {next(iter(found.separate))!r}"
        raise BadFile(path, f"holds experts that are fused, and others that are not: {names}", "Fetch all its files.")
    if not experts:
        problem = f"holds no experts, and its config.json is that of a model with some ({kind})"
        raise Unsupported(path, problem, "Leave --experts out, or name the right config: --config FOLDER.")


def _check_wholes(path: Where, wholes: Iterable[Tensor], count: int) -> None:
    """Hold the two tensors of each layer against each other, and against the number of experts."""
    layers: dict[str, dict[str, Tensor]] = {}
    for whole in wholes:
        layer, _, leaf = whole.name.rpartition(".")
        layers.setdefault(layer, {})[leaf] = whole
    for layer, held in layers.items():
        lacking = next((leaf for leaf in ("gate_up_proj", "down_proj") if leaf not in held), None)
        if lacking:
            advice = "Fetch all files of the model."
            raise BadFile(path, f"holds {next(iter(held.values())).name!r}, and lacks {lacking} beside it", advice)
        outer, inner = held["gate_up_proj"].shape, held["down_proj"].shape
        lengths = {shape[0] for shape in (outer, inner) if shape}
        if lengths != {count}:
            found = " and ".join(map(str, sorted(lengths)))
            problem = f"holds {found} experts in {layer!r}, and its config.json says {count}"
            raise BadFile(path, problem, "Fetch all files of the model.")
        if not len(outer) == len(inner) == 3 or outer[1:] != (2 * inner[2], inner[1]):
            shapes = " and ".join(spell_shape(shape) for shape in (outer, inner))
            problem = f"holds experts in {layer!r} of the shapes {shapes}, and not [experts, 2 x inner, outer] and back"
            raise Unsupported(path, problem, "Other programs have them transposed; wconv does not know which ones.")


def _count_in(config: Mapping[str, Any], kind: str, component: Component) -> int:
    """Give the number of experts of a layer that a config says. Raises BadFile where it says none, or two."""
    where = component.path / "config.json"
    said = {key: config[key] for key in _COUNTS if config.get(key) is not None}
    if not said:
        raise BadFile(where, f"does not say how many experts a layer of {kind} has: {_COUNTS[0]}", "Fetch it again.")
    for key, value in said.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MAX_EXPERTS:
            raise BadFile(where, f"says {key} {value!r}, and that is no number of experts", "Fetch it again.")
    if len(set(said.values())) > 1:
        spelled = " and ".join(f"{key} {value}" for key, value in said.items())
        raise BadFile(where, f"says two numbers of experts: {spelled}", "Fetch it again.")
    return int(next(iter(said.values())))

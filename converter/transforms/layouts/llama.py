"""Llama and Mistral as Meta's code, torchtitan and Mistral's own files have them, and as transformers has them.

The names differ, and the rows of queries and keys: Meta rotates numbers in pairs, transformers in halves. Each table is
what ``transformers/models/llama/convert_llama_weights_to_hf.py`` does, and torchtitan's ``state_dict_adapter.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from converter.errors import BadFile, BadRequest, Unsupported, name_some, spell_shape
from converter.models.checkpoint import Checkpoint
from converter.models.component import Component
from converter.models.configs import read_json
from converter.models.names import STEMS, WEIGHT_EXTENSIONS
from converter.models.schemes import quantized_in
from converter.storage import Place
from converter.tensors.base import Tensor, WeightsFile
from converter.transforms.layouts.arrange import LlamaLayout
from converter.transforms.layouts.checkpoints import rearranged
from converter.transforms.layouts.operations import Rotary
from converter.transforms.layouts.rows import Row, renamings, wholes_of

_KINDS = ("llama", "mistral")
_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    **{
        f"layers.{{}}.{whole}.weight": f"model.layers.{{}}.{part}.weight"
        for whole, part in {
            "attention.wv": "self_attn.v_proj",
            "attention.wo": "self_attn.o_proj",
            "feed_forward.w1": "mlp.gate_proj",
            "feed_forward.w2": "mlp.down_proj",
            "feed_forward.w3": "mlp.up_proj",
            "attention_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
        }.items()
    },
}
_QUERIES = "layers.{}.attention.wq.weight", "model.layers.{}.self_attn.q_proj.weight"
_KEYS = "layers.{}.attention.wk.weight", "model.layers.{}.self_attn.k_proj.weight"
# What each computes again as it is loaded.
_COMPUTED = re.compile(r"(?:.*\.)?(?:rope\.freqs|freqs_cis|rotary_emb\.inv_freq)")
_OF_META = re.compile(r"consolidated(?:\.[0-9]+)?")
_EMBEDDINGS, _HEAD = "tok_embeddings.weight", "output.weight"
_MAX_HEADS = 100_000
_ADVICE = "Name the folder of the model's config.json: --config FOLDER."


class _Heads(NamedTuple):
    """How many heads queries and keys have, and how long each is, as far as ``place`` says it."""

    place: Place
    queries: int
    keys: int
    length: int | None
    are_tied: bool

    def rows(self) -> list[Row]:
        """Give the table for them: the wholes are Meta's."""
        of_queries, of_keys = (Row(whole, (part,), Rotary(heads)) for (whole, part), heads in self._rotated())
        return [of_queries, of_keys, *renamings(_NAMES)]

    def _rotated(self) -> list[tuple[tuple[str, str], int]]:
        return [(_QUERIES, self.queries), (_KEYS, self.keys)]

    def check(self, tensors: Iterable[Tensor]) -> None:
        """Raise BadFile for a tensor of rotated rows that is not of so many heads of this length."""
        heads = {f".{name.split('.')[-2]}.": count for names, count in self._rotated() for name in names}
        for tensor in tensors:
            count = next((count for end, count in heads.items() if end in tensor.name), None)
            if count is None:
                continue
            rows, width = tensor.shape if len(tensor.shape) == 2 else (0, 0)
            length = self.length or width // self.queries
            if not rows or rows != count * length or length % 2:
                shape = spell_shape(tensor.shape)
                problem = f"holds {tensor.name!r} of {shape}, and {self.place} says {count} heads"
                raise BadFile(tensor.where, f"{problem} of {length}", "Name the model's own config: --config FOLDER.")


def with_llama_layout(checkpoint: Checkpoint, component: Component, layout: LlamaLayout) -> Checkpoint:
    """Give weights of Llama or Mistral the names and rows that Meta's code has, or transformers.

    What is computed as they are loaded is left out, and named in a note. Raises Unsupported for another model, BadFile
    for heads that do not fit its tensors.
    """
    path = checkpoint.weight_set.path
    heads = _heads_of(component, path)
    rows = heads.rows()
    checkpoint = _without_computed(checkpoint)
    names = [tensor.name for tensor in checkpoint.tensors]
    parts = wholes_of(names, rows)
    wholes = wholes_of(names, [Row(row.parts[0], (row.whole,)) for row in rows])
    here, there = (wholes, parts) if layout == "transformers" else (parts, wholes)
    quantized = next(iter(quantized_in(checkpoint)), None)
    if quantized:
        raise Unsupported(path, f"holds quantized weights: {quantized}", quantized.advice)
    strange = next((name for name in names if name not in parts and name not in wholes), None)
    if strange is not None:
        kinds = " and ".join(_KINDS)
        problem = f"holds {strange!r}, and what wconv knows under the names of Meta and transformers are {kinds} alone"
        raise Unsupported(path, problem, "Leave --layout out; --rename gives tensors other names.")
    if here and there:
        problem = f"holds {next(iter(here))!r} and {next(iter(there))!r}, which are of two layouts"
        raise BadFile(path, problem, "Fetch all its files.")
    if not here:
        return _noted(checkpoint, f"its names are those of {layout} already")
    heads.check(checkpoint.tensors)
    arranged = rearranged(checkpoint, rows, apart=layout == "transformers")
    if layout == "transformers":
        _check_head(arranged, component)
        return _noted(_called(arranged, layout), *([] if component.config else [_NO_CONFIG]))
    note = "its names and rows are Meta's now: transformers does not load them"
    return _noted(_called(_with_head(arranged, heads), layout), note)


_NO_CONFIG = "no config.json is written, and transformers needs one: --config FOLDER takes it from the same model"


def _noted(checkpoint: Checkpoint, *notes: str) -> Checkpoint:
    return replace(checkpoint, notes=(*checkpoint.notes, *notes))


def _heads_of(component: Component, path: Place) -> _Heads:
    """Take the heads from a model's config.json, or where it has none from Meta's params.json."""
    config = component.config
    if "model_type" in config:
        kind = config["model_type"]
        if kind not in _KINDS:
            problem = f"is of the type {kind!r}, and Meta's layout is known of {' and '.join(_KINDS)}"
            raise Unsupported(path, problem, "Leave --layout out.")
        keys = "num_attention_heads", "num_key_value_heads"
        return _read_heads(component.path / "config.json", config, keys, config.get("tie_word_embeddings") is True)
    place = path.parent / "params.json"
    params = read_json(place)
    inner = params.get("model", params)
    if not isinstance(inner, dict) or "n_heads" not in inner:
        problem = "has no config.json of Llama or Mistral that says how many heads it has, and no params.json"
        raise BadRequest(path, problem, _ADVICE)
    return _read_heads(place, inner, ("n_heads", "n_kv_heads"), are_tied=False)


def _read_heads(place: Place, config: Mapping[str, Any], keys: tuple[str, str], are_tied: bool) -> _Heads:
    of_queries, of_keys = keys
    queries = _number(place, config, of_queries)
    groups = _number(place, config, of_keys)
    if queries is None or (groups is None and config.get("model_type") == "mistral"):
        raise BadFile(place, f"does not say {of_queries if queries is None else of_keys}", _ADVICE)
    return _Heads(place, queries, groups or queries, _number(place, config, "head_dim"), are_tied)


def _number(place: Place, config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MAX_HEADS:
        raise BadFile(place, f"says {key} {value!r}, and that is no number of them", _ADVICE)
    return value


def _without_computed(checkpoint: Checkpoint) -> Checkpoint:
    names = [tensor.name for tensor in checkpoint.tensors if _COMPUTED.fullmatch(tensor.name)]
    if not names:
        return checkpoint

    def spared(file: WeightsFile) -> WeightsFile:
        left_out = set(names)
        return replace(file, tensors=tuple(one for one in file.tensors if one.name not in left_out))

    left = replace(checkpoint, files=tuple(map(spared, checkpoint.files)))
    return _noted(left, f"left out, as it is computed again where it is loaded: {name_some(names, 3)}")


def _with_head(checkpoint: Checkpoint, heads: _Heads) -> Checkpoint:
    """Give the embeddings as the head, too, where a model has them tied: Meta's code has both.

    Raises BadFile where there is no head, and no config says that the embeddings are it.
    """
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors}
    if _HEAD in tensors:
        return checkpoint
    embeddings = tensors.get(_EMBEDDINGS)
    if embeddings is None or not (heads.are_tied or checkpoint.ties.get(_HEAD) == _EMBEDDINGS):
        problem = "holds no lm_head.weight, and its config.json does not say that its embeddings are tied"
        raise BadFile(checkpoint.weight_set.path, problem, "Fetch all files of the model.")
    head = Tensor(_HEAD, embeddings.source)

    def with_head(file: WeightsFile) -> WeightsFile:
        metadata = {key: note for key, note in file.metadata.items() if key != _HEAD}
        tensors = tuple(one for old in file.tensors for one in ((old, head) if old is embeddings else (old,)))
        return replace(file, tensors=tensors, metadata=metadata)

    return replace(checkpoint, files=tuple(map(with_head, checkpoint.files)))


def _check_head(checkpoint: Checkpoint, component: Component) -> None:
    """Raise BadFile where there is no head, and the config that goes with it has it as a weight of its own."""
    has_head = any(tensor.name == _NAMES[_HEAD] for tensor in checkpoint.tensors) or _NAMES[_HEAD] in checkpoint.ties
    if component.config and not has_head and component.config.get("tie_word_embeddings") is not True:
        problem = f"holds no {_HEAD}, and its config.json does not say that its embeddings are tied"
        raise BadFile(checkpoint.weight_set.path, problem, "Fetch all files of the model.")


def _called(checkpoint: Checkpoint, layout: LlamaLayout) -> Checkpoint:
    """Let files that transformers looks for have the name that Meta and Mistral give them, consolidated; or back.

    So nobody takes the one for the other.
    """
    weight_set = checkpoint.weight_set
    name = weight_set.name
    is_torch = name.ext in WEIGHT_EXTENSIONS and name.format == "torch"
    if layout == "transformers" and _OF_META.fullmatch(name.stem):
        name = replace(name, stem="pytorch_model" if is_torch else "model", ext="bin" if is_torch else name.ext)
    elif layout == "meta" and name.stem in STEMS["transformers"].values():
        name = replace(
            name, stem="consolidated.00" if is_torch else "consolidated", ext="pth" if is_torch else name.ext
        )
    return replace(checkpoint, weight_set=replace(weight_set, name=name))

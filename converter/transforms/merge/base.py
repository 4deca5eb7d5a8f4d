"""The base that adapters are merged into: its weights by their modules, and what is tied to what."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from converter.errors import Unsupported
from converter.libraries.modules import find_linears
from converter.models.checkpoint import Checkpoint
from converter.models.component import Component
from converter.tensors.base import Tensor, find_ties

WEIGHT = ".weight"
# Models of transformers that have Conv1D, whose weight is [in, out], call themselves so.
_MAY_HAVE_CONV1D = re.compile(r"GPT|Clvp|DecisionTransformer")


class Part:
    """A component of the base, and its weights by their modules."""

    def __init__(self, component: Component, checkpoint: Checkpoint) -> None:
        self.component = component
        self.checkpoint = checkpoint
        self.tensors = {tensor.name: tensor for tensor in checkpoint.tensors}
        self.modules = [name.removesuffix(WEIGHT) for name in self.tensors if name.endswith(WEIGHT)]
        self._transposed: frozenset[str] | None = None
        self._spelled: dict[str, list[str]] | None = None

    def weight(self, name: str) -> Tensor | None:
        """Give a tensor by its name, or the head that is tied."""
        if name in self.tensors:
            return self.tensors[name]
        head = tied_head(self)
        return head if head is not None and head.name == name else None

    def is_transposed(self, name: str, is_said: bool, is_square: bool) -> bool:
        """Say whether a weight is a Conv1D's; where nobody knows its class, what PEFT's config says, or its shape."""
        class_name = self.component.class_name
        may_be = is_said or bool(_MAY_HAVE_CONV1D.search(class_name))
        if not is_square or not may_be:
            return not is_square and (may_be or not class_name)
        if self._transposed is None:
            linears = find_linears(self.component, self.checkpoint.tensors)
            self._transposed = frozenset(linears.weights[module] for module in linears.transposed)
            if linears.unknown and is_said:
                self._transposed |= frozenset(linears.unknown.values())
        return name in self._transposed

    def spelled(self, module: str) -> str | None:
        """Give the module that a name with ``_`` for ``.`` stands for, if it is one alone."""
        if self._spelled is None:
            self._spelled = {}
            for own in self.modules:
                self._spelled.setdefault(own.replace(".", "_"), []).append(own)
        found = self._spelled.get(module.replace(".", "_"), [])
        return found[0] if len(found) == 1 else None


_SHARED = "shared"  # T5's, which its encoder and its decoder have too
TABLES = (
    "embed_tokens", "wte", "word_embeddings", "word_embedding", "embed_in", "tok_embeddings", "tokens_embed",
    "embeddings", _SHARED,
)  # fmt: skip
HEAD = "lm_head"
_CAUSAL = ("ForCausalLM", "LMHeadModel")
# What lm_head is tied to in those, by ``_tied_weights_keys`` of transformers; others have a head of another name.
_TIED_TO_HEAD = re.compile(
    r"model\.(decoder\.)?embed_tokens|transformer\.(wte|word_embeddings|tokens_embed)|gpt_neox\.embed_in"
    r"|backbone\.embeddings"
)
_OTHER_HEAD = ("TrOCR", "Whisper")
# What has no head that a table of embeddings could be tied to.
_HEADLESS = re.compile(
    r"(?!.*(?:DoubleHeads|EncoderDecoder|FSMT)).*"
    r"(?:Model|ForSequenceClassification|ForTokenClassification|ForQuestionAnswering|WithProjection)"
)


def _embedding_of(part: Part) -> Tensor | None:
    """Give the one weight of a component that its lm_head is tied to, if it is."""
    found = [module for module in part.modules if _TIED_TO_HEAD.fullmatch(module)]
    is_one = len(found) == 1 and not part.component.class_name.startswith(_OTHER_HEAD)
    return part.tensors[found[0] + WEIGHT] if is_one else None


def tied_head(part: Part) -> Tensor | None:
    """Give the head that a causal model has not in its file, as its embedding is it, under its own name."""
    if not part.component.class_name.endswith(_CAUSAL) or HEAD in part.modules:
        return None
    embedding = _embedding_of(part)
    return embedding and embedding._replace(name=HEAD + WEIGHT)


class Untied(NamedTuple):
    """Tensors of which one is changed, and which are no longer one: ``heads`` are added, each beside another's name."""

    heads: Mapping[str, str]
    names: frozenset[str]


def find_untied(component: Component, checkpoint: Checkpoint, changed: Collection[str]) -> Untied | None:
    """Say what has to be untied, so that a change of a table of words is none of the head, or the other way round.

    PEFT's ``merge_and_unload`` adds to both, and advises to untie them before (``_check_merge_allowed`` in
    ``tuners/tuners_utils.py``): so no weight is changed but that which was trained. Raises Unsupported where it is not
    known what is tied to what.
    """
    part = Part(component, checkpoint)
    ties = {**find_ties(checkpoint.tensors), **checkpoint.ties}
    tied = {name for pair in ties.items() if not {*pair}.isdisjoint(changed) for name in pair}
    size = component.config.get("vocab_size")
    words = {
        name
        for name in changed
        if leaf_of(name) in (*TABLES, HEAD) or (name in part.tensors and part.tensors[name].shape[0] == size)
    }
    is_causal = component.class_name.endswith(_CAUSAL)
    is_apart = bool(_HEADLESS.fullmatch(component.class_name)) and _SHARED not in map(leaf_of, words)
    if is_causal:
        is_apart = component.config.get("tie_word_embeddings") is False
    if not tied and (not words or is_apart):
        return None
    embedding = _embedding_of(part)
    head = tied_head(part)
    known = {HEAD + WEIGHT, *([embedding.name] if embedding else [])}
    is_known = is_causal and embedding is not None and tied <= known
    if not is_known or (head is None and HEAD not in part.modules):
        first = min(tied or words)
        what = component.class_name or "an unknown one"
        problem = f"has {first!r}, which may be tied to other weights, and a merge into one is none into those ({what})"
        raise Unsupported(checkpoint.weight_set.path, problem, "Untie them before, or merge it with PEFT.")
    assert embedding is not None
    return Untied({} if head is None else {head.name: embedding.name}, frozenset(known))


def leaf_of(name: str) -> str:
    """Give the last word of a module's path, or of that of a weight."""
    return name.removesuffix(WEIGHT).rpartition(".")[2]

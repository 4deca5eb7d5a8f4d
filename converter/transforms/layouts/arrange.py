"""The layouts that a user asks for of a checkpoint whose names are its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from converter.errors import BadRequest
from converter.models.checkpoint import Checkpoint
from converter.models.component import Component
from converter.models.select import Tied

ExpertsForm = Literal["fused", "separate"]
"""Whether the experts of a layer are one tensor, or each one of its own."""

LlamaLayout = Literal["meta", "transformers"]
"""Whose names and order of rows a model has."""


_METAS_OWN = "tok_embeddings.weight"
_NOTE_META = "its names are Meta's: 'wconv to-safetensors --layout transformers' gives it those of transformers"


@dataclass(frozen=True, slots=True)
class Arranging:
    """The form that ``experts`` are to be in, and whose ``layout`` a model; None leaves them as they are.

    Raises BadRequest for what is no form, or no layout.
    """

    experts: ExpertsForm | None = None
    layout: LlamaLayout | None = None

    def __post_init__(self) -> None:
        if self.experts not in (None, "fused", "separate"):
            raise BadRequest(repr(self.experts), "is no form of experts", "They are fused, or separate.")
        if self.layout not in (None, "meta", "transformers"):
            raise BadRequest(repr(self.layout), "is no layout", "It is meta, or transformers.")

    @property
    def tied(self) -> Tied | None:
        """How tied tensors have to be written, where the layout says so: Meta's code wants each by its name."""
        return "duplicate" if self.layout == "meta" else None


def with_layout(checkpoint: Checkpoint, component: Component, arranging: Arranging) -> Checkpoint:
    """Bring a checkpoint into the layout that is asked for; raises what these two do.

    Where none is, a note says how Meta's would become that of transformers.
    """
    if not arranging.layout and any(tensor.name == _METAS_OWN for tensor in checkpoint.tensors):
        checkpoint = replace(checkpoint, notes=(*checkpoint.notes, _NOTE_META))
    # Tables load what other conversions do not need.
    if arranging.layout:
        from converter.transforms.layouts.llama import with_llama_layout

        checkpoint = with_llama_layout(checkpoint, component, arranging.layout)
    if arranging.experts:
        from converter.transforms.layouts.experts import with_experts

        checkpoint = with_experts(checkpoint, component, arranging.experts)
    return checkpoint

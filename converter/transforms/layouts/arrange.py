"""The layouts that a user asks for of a checkpoint whose names are its own."""

from __future__ import annotations

from dataclasses import dataclass

from converter.errors import BadRequest
from converter.models.checkpoint import Checkpoint
from converter.models.component import Component
from converter.transforms.layouts.experts import ExpertsForm, with_experts


@dataclass(frozen=True, slots=True)
class Arranging:
    """The form that ``experts`` are to be in; None leaves them as they are. Raises BadRequest for what is none."""

    experts: ExpertsForm | None = None

    def __post_init__(self) -> None:
        if self.experts not in (None, "fused", "separate"):
            raise BadRequest(repr(self.experts), "is no form of experts", "They are fused, or separate.")


def with_layout(checkpoint: Checkpoint, component: Component, arranging: Arranging) -> Checkpoint:
    """Bring a checkpoint into the layout that is asked for; raises what ``with_experts`` does."""
    return with_experts(checkpoint, component, arranging.experts) if arranging.experts else checkpoint

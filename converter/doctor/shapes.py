"""The shapes that a model's own class gives its tensors, where its library is installed."""

from __future__ import annotations

from converter.libraries.ask import LibraryMissing, ask_class
from converter.models.component import Component


def expected_shapes(component: Component) -> dict[str, tuple[int, ...]]:
    """Give the shape of each tensor that the class in a component's config would have, none without its library.

    Raises Unsupported, with the cause, where it cannot be made.
    """
    if not component.class_name or "quantization_config" in component.config:
        return {}
    try:
        return ask_class(component).shapes
    except LibraryMissing:
        return {}

"""The shapes that a model's own class gives its tensors, where its library is installed.

The class is made on the meta device, from the config alone; no weights and no code of the folder's are loaded.
"""

from __future__ import annotations

from converter.folder import Component
from converter.modules import make_on_meta


def expected_shapes(component: Component) -> dict[str, tuple[int, ...]]:
    """Give the shape of each tensor that the class in a component's config would have; none where it cannot be made."""
    if not component.class_name or "quantization_config" in component.config:
        return {}
    try:
        model = make_on_meta(component)
    except Exception:
        # No library, none that has the class, or a config that it does not take: then there is nothing to compare.
        return {}
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

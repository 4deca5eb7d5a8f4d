"""The shapes that a model's own class gives its tensors: the one place where the libraries are asked, if installed.

The class is made on the meta device, from the config alone; no weights and no code of the folder's are loaded.
"""

from __future__ import annotations

import copy
from typing import Any

from converter.folder import Component


def expected_shapes(component: Component) -> dict[str, tuple[int, ...]]:
    """Give the shape of each tensor that the class in a component's config would have; none where it cannot be made."""
    if not component.class_name or "quantization_config" in component.config:
        return {}
    try:
        import torch

        with torch.device("meta"):
            model = _make(component)
    except Exception:
        # No library, none that has the class, or a config that it does not take: then there is nothing to compare.
        return {}
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _make(component: Component) -> Any:
    if component.is_diffusers:
        import diffusers

        return getattr(diffusers, component.class_name).from_config(copy.deepcopy(component.config))
    import transformers

    config = transformers.AutoConfig.for_model(**copy.deepcopy(component.config))
    return getattr(transformers, component.class_name)(config)

"""timm: a config that names an ``architecture`` and no class. It is loaded by name or file, and finds no variants."""

from __future__ import annotations

from converter.libraries.transformers import Transformers, names_model
from converter.models.component import Component
from converter.models.model import Model


class Timm(Transformers):
    """A model of timm, whose files are named as those of transformers (timm's ``save_for_hf``)."""

    def owns(self, component: Component) -> bool:
        return isinstance(component.config.get("architecture"), str) and not names_model(component)

    def no_variants(self, folder: Model) -> str:
        """See timm's ``hf_load_state_dict``."""
        return "timm"


TIMM = Timm()

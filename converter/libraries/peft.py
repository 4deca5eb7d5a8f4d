"""PEFT: adapters, which lie in one file of a fixed name beside an ``adapter_config.json``."""

from __future__ import annotations

from converter.libraries.transformers import Transformers
from converter.libraries.written import Written, WrittenSet, is_bare, is_found_plain
from converter.models.component import Component
from converter.models.configs import read_json
from converter.models.model import Model
from converter.models.names import STEMS, Format, WeightsName
from converter.models.select import Tied

# What ``AutoPeftModel`` has a class of its own for (``peft/auto.py``); it makes the base model too.
_TASKS = {
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForSeq2SeqLM",
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "ForFeatureExtraction",
}


class Peft(Transformers):
    """An adapter, for a model that is mostly one of transformers."""

    def owns(self, component: Component) -> bool:
        return bool(component.weight_sets) and all(self.is_sought(one.name) for one in component.weight_sets)

    def stem(self, form: Format) -> str:
        return STEMS["peft"][form]

    def finds(self, component: Component, name: WeightsName) -> bool:
        return self.is_sought(name)

    def no_variants(self, folder: Model) -> str:
        """See ``load_peft_weights`` in ``peft/utils/save_and_load.py``."""
        return "PEFT"

    def ties(self, component: Component, name: WeightsName) -> Tied:
        """An adapter's own tensors are not tied again (``set_peft_model_state_dict``, in the same file)."""
        return "duplicate"

    def load_set(self, written: Written, one: WrittenSet) -> list[str]:
        """Load an adapter with the model that its config names, or, where it names none, its weights."""
        is_found = self.is_sought(one.name) and len(one.files) == 1 and is_found_plain(written, one)
        if not is_found or is_bare(written, one):
            return []
        folder = str(written.folder / one.component.name)
        config = read_json(one.component.path / "adapter_config.json")
        if not config.get("base_model_name_or_path"):
            return ["from peft import load_peft_weights", f"load_peft_weights({folder!r})"]
        name = "AutoPeftModel" + _TASKS.get(str(config.get("task_type")), "")
        return [f"from peft import {name}", f"{name}.from_pretrained({folder!r})"]


PEFT = Peft()

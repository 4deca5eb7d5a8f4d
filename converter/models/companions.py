"""The config and the tokenizer of a training checkpoint, which trainers keep in another folder than its weights.

verl and SkyRL have them in ``huggingface/`` beside the ranks' files (``fsdp_checkpoint_manager.py``); the Trainer of
transformers has them in ``checkpoint-500/`` or in the folder around it, and accelerate and torch in folders below.
"""

from __future__ import annotations

import re
from typing import Any

from converter.errors import BadFile
from converter.models.component import Companions
from converter.models.configs import look_into
from converter.models.hub_cache import lies_outside
from converter.models.names import is_other_runtime, is_training_state, parse_name
from converter.storage import Place, list_entries

# What ``save_pretrained`` of transformers' configs, tokenizers and processors writes, and the code of a config's own.
_NAMES = re.compile(
    r"(config|generation_config|adapter_config|configuration|special_tokens_map|added_tokens)\.json|"
    r"(tokenizer|vocab)[\w.-]*\.(json|txt|model|bpe|vocab|spm|tiktoken)|tokenizer\.model\.v\d+\w*|"
    r"merges\.txt|.*\.tiktoken|(spiece|sentencepiece.*|source|target)\.(model|spm)|chat_template.*|"
    r"(\w+_)?(pre)?processor_config\.json|audio_tokenizer_config\.json|(modeling|configuration|tokenization|processing)_\w+\.py"
)
# One of these is in the config of a model of transformers, or of Diffusers.
_NAMING = ("model_type", "architectures", "auto_map", "_class_name")
_BELOW = "huggingface"
# Folders that hold one checkpoint of a run: what lies around them belongs to it.
_OF_A_RUN = re.compile(
    r"pytorch_model(_fsdp)?(_\d+)?|sharded|(tmp-)?checkpoint[-_]?\d+|(global_)?step[-_]?\d+|iter[-_]?\d+|epoch[-_]?\d+|"
    r"actor|model|weights"
)
_MAX_UP = 3


def find_companions(folder: Place) -> tuple[Companions, dict[str, Any]]:
    """Look for the config of a training checkpoint: give it and what goes with it, and its content; or nothing.

    It is looked for in ``huggingface/``, and around the folder as far as that is one of a run. What says of no model
    which it is, as other programs have a ``config.json``, is none.
    """
    for _ in range(_MAX_UP + 1):
        for place in (folder, folder / _BELOW):
            config = place / "config.json"
            if config.is_file() and not lies_outside(config, folder.real()) and (content := _read_naming(config)):
                files = _list(place)
                return files, content if config in files else {}
        if not _OF_A_RUN.fullmatch(folder.absolute().name):
            break
        folder = folder.absolute().parent
    return (), {}


def _read_naming(place: Place) -> dict[str, Any]:
    """Give the content of a config that names a model, and nothing of any other."""
    content, _ = look_into(place)
    return content if any(key in content for key in _NAMING) else {}


def companions_in(folder: Place) -> Companions:
    """Give the config in a folder that a user names, and what goes with it. Raises BadFile where there is none."""
    if folder.name == "config.json" and folder.is_file():
        folder = folder.parent
    if not folder.is_folder():
        raise BadFile(folder, "is no folder", "Name the folder with the config.json of the model.")
    companions = _list(folder)
    if not any(file.name == "config.json" for file in companions):
        raise BadFile(folder, "has no config.json", "Name the folder with the config.json of the model.")
    return companions


def _list(folder: Place) -> Companions:
    real = folder.real()
    return tuple(file for file in list_entries(folder) if _is_one(file) and not lies_outside(file, real))


def _is_one(file: Place) -> bool:
    name = file.name
    is_other = is_training_state(name) or is_other_runtime(name) or parse_name(name) is not None
    return _NAMES.fullmatch(name) is not None and not is_other and file.is_file()

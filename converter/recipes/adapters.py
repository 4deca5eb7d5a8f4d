"""Adapters by the places that are named: a file, PEFT's folder, or one that has PEFT's folder for each part."""

from __future__ import annotations

from converter.errors import BadRequest, name_some
from converter.models.adapters import ADAPTER_CONFIG
from converter.models.checkpoint import Checkpoint, open_checkpoint
from converter.models.component import Component
from converter.models.model import open_model
from converter.models.names import STEMS, Naming
from converter.models.select import Selection, select_sets
from converter.plan.make import join
from converter.storage import Place
from converter.transforms.lora.bases import PARTS

_NAMED = 6


def places_of(source: Place) -> list[Place]:
    """Give the folders that PEFT has for each part of a pipeline in a folder, or the place itself."""
    folders = [source / part for part in PARTS] if source.is_folder() else []
    folders = [folder for folder in folders if (folder / ADAPTER_CONFIG).is_file()]
    return folders if folders and not (source / ADAPTER_CONFIG).is_file() else [source]


def open_adapter(source: Place, advice: str = "Name the file of one.") -> tuple[Component, Checkpoint]:
    """Open the set of weights that is an adapter; it may lie beside its base. Raises BadRequest for more than one."""
    sets = select_sets(open_model(source), Selection(every_variant=False), Naming("safetensors", None))
    sets = [one for one in sets if one[1].name.stem in STEMS["peft"].values()] or sets
    if len(sets) != 1:
        labels = name_some([join(component.name, weight_set.label) for component, weight_set in sets], _NAMED)
        raise BadRequest(source, f"holds several sets of weights ({labels})", advice)
    [(component, weight_set)] = sets
    return component, open_checkpoint(weight_set)

"""What is said of an adapter: whose names it has, what it is for, and how large its pairs are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from converter.errors import WconvError
from converter.models.adapters import Adapter, read_alphas
from converter.transforms.lora.parts import describe_base, find_changes


class Description(NamedTuple):
    """An adapter in words and numbers: ``parts`` are of a pipeline, with how many modules each; ``base`` is the model.

    ``ranks`` and ``alphas`` are counted, the most common first. ``problems`` are why it is not converted or merged.
    """

    method: str
    form: str
    base: str
    parts: Mapping[str, int]
    modules: int
    ranks: Mapping[int, int]
    alphas: Mapping[float, int]
    extras: Mapping[str, int]
    problems: tuple[str, ...]


def describe(adapter: Adapter) -> Description:
    """Describe an adapter; the few bytes of its alphas are read."""
    sound = adapter.sound
    problems = [_say(one) for one in adapter.problems]
    base, parts = _named_base(adapter), {}
    alphas: Mapping[float, int] = {}
    try:
        alphas = dict(Counter(read_alphas(sound).values()).most_common())
    except WconvError as error:
        problems.append(_say(error))
    try:
        changes = find_changes(sound)
    except WconvError:
        pass  # it is for a model whose names wconv does not know, as most of PEFT's are
    else:
        base = base or describe_base(adapter, changes)
        held = {(change.part, change.up.name) for change in changes.all}  # a joined module is one here
        parts = {part: sum(one == part for one, _ in held) for part in changes.parts}
    extras = {kind: len(names) for kind, names in adapter.extras.items()}
    method = _method_of(adapter)
    return Description(
        method,
        adapter.form,
        base,
        parts,
        len(adapter.pairs),
        sound.ranks,
        alphas,
        extras,
        tuple(dict.fromkeys(problems)),
    )


def _say(error: WconvError) -> str:
    """Say what is wrong without the file, which stands above."""
    return f"it {error.problem}"


def _method_of(adapter: Adapter) -> str:
    """Name the method of training."""
    if adapter.form == "peft" and adapter.config.get("peft_type", "LORA") != "LORA":
        return str(adapter.config["peft_type"])[:40]
    if adapter.config.get("use_dora") is True:
        return "DoRA"
    return next(iter(adapter.extras), "LoRA")


def _named_base(adapter: Adapter) -> str:
    """Give the model that PEFT's config names, with its task."""
    named = adapter.config.get("base_model_name_or_path") if adapter.form == "peft" else None
    if not isinstance(named, str) or not named:
        return ""
    task = adapter.config.get("task_type")
    return f"{named[:200]} ({task[:40]})" if isinstance(task, str) else named[:200]

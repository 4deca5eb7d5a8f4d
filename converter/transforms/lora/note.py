"""What a header keeps of an adapter that was converted, so that the way back gives the same bytes and names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from converter.errors import BadFile
from converter.formats.texts import check_depth, parse_json
from converter.models.adapters import MAX_ALPHA_AXES, Pair
from converter.models.checkpoint import Checkpoint

NOTE_KEY = "wconv_lora"
"""Under which a header keeps a Note."""

ORIGINAL, DIFFUSERS = "original", "diffusers"
_SETS = ("shared", "short", "prefixes")
_TEXTS = ("alpha", "blocks")
NO_ALPHA = "none"
# A dtype, where it is not that of the weights, and an axis for each 1.
_ALPHA = re.compile(rf"{NO_ALPHA}|[A-Z0-9]{{0,4}}(?:x1){{0,{MAX_ALPHA_AXES}}}")


class Note(NamedTuple):
    """What names alone do not say.

    Of modules in the trainer's names: which are ``shared``, that is whose parts have copies of one ``down``; and which
    are ``joined`` of parts of these ranks, 0 for one that has none. In the ``short`` parts names lack ``text_model.``,
    as version 5 of transformers has them. Of kohya's names, where they are others than his trainer gives: what they
    begin with (``prefixes``), and whose ``blocks`` they have. ``alpha`` is how most alphas are written (see
    ``spell_alpha``), and ``alphas`` how those of some modules are.
    """

    shared: frozenset[str] = frozenset()
    joined: Mapping[str, tuple[int, ...]] = {}
    short: frozenset[str] = frozenset()
    alpha: str = ""
    alphas: Mapping[str, str] = {}
    prefixes: frozenset[str] = frozenset()
    blocks: str = ""

    def render(self) -> dict[str, str]:
        """Give what a header says of it, if there is anything to be said."""
        said: dict[str, Any] = {key: sorted(getattr(self, key)) for key in _SETS if getattr(self, key)}
        said |= {"joined": {name: list(ranks) for name, ranks in self.joined.items()}} if self.joined else {}
        said |= {"alphas": dict(sorted(self.alphas.items()))} if self.alphas else {}
        said |= {key: getattr(self, key) for key in _TEXTS if getattr(self, key)}
        return {NOTE_KEY: json.dumps(said)} if said else {}


def spell_alpha(pair: Pair) -> str:
    """Spell how an alpha is written: its dtype, where it is not that of the weights, and its shape; or that none is.

    An int64 of one axis is ``I64x1``.
    """
    if pair.alpha is None:
        return NO_ALPHA
    tag = "" if pair.alpha.dtype is pair.down.dtype else pair.alpha.dtype.tag
    return tag + "x1" * len(pair.alpha.shape)


def read_note(checkpoint: Checkpoint) -> Note:
    """Give what a header notes of a conversion. Raises BadFile for what no conversion has noted."""
    raw = checkpoint.metadata.get(NOTE_KEY)
    if raw is None:
        return Note()
    where = checkpoint.weight_set.path
    wrong = BadFile(where, f"has a note {NOTE_KEY} in its header that wconv did not write", "Take it out.")
    try:
        said = parse_json(raw.encode(errors="replace"), where, f"{NOTE_KEY} in its header ")
        check_depth(said)
    except ValueError:
        raise wrong from None
    if not isinstance(said, dict) or said.keys() - set(Note._fields):
        raise wrong
    sets, texts = {key: said.get(key, []) for key in _SETS}, {key: said.get(key, "") for key in _TEXTS}
    joined, alphas = said.get("joined", {}), said.get("alphas", {})
    if not isinstance(joined, dict) or not all(isinstance(one, list) for one in (*sets.values(), *joined.values())):
        raise wrong
    spelled = [texts["alpha"], *alphas.values()] if isinstance(alphas, dict) else [None]
    if not all(isinstance(one, str) and _ALPHA.fullmatch(one) for one in spelled):
        raise wrong
    names = (*texts.values(), *(name for names in sets.values() for name in names))
    ranks = (rank for ranks in joined.values() for rank in ranks)
    if not all(isinstance(name, str) for name in names) or not all(type(rank) is int and rank >= 0 for rank in ranks):
        raise wrong
    found: dict[str, Any] = {key: frozenset(names) for key, names in sets.items()}
    return Note(joined={name: tuple(ranks) for name, ranks in joined.items()}, alphas=alphas, **found, **texts)

"""What an adapter does, written as kohya, Diffusers or PEFT have it.

A scale is never put into numbers: it goes where the form has its alphas, so all matrices stay as they are.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Any, Literal, NamedTuple

from converter.dtypes import DTYPES, DType
from converter.errors import BadFile, Unsupported
from converter.models.adapters import ALPHA_LETTERS, METADATA_KEY, PEFT_PREFIX
from converter.tensors.base import Tensor, TensorSource
from converter.tensors.derived import Box, Boxes, Constant, Zeros
from converter.tensors.sparse import Copies
from converter.transforms.layouts.operations import Concat
from converter.transforms.lora.bases import (
    FLUX,
    SD3,
    SD35_LARGE,
    T5_PREFIX,
    Found,
    clip_modules,
    original_of,
    t5_modules,
)
from converter.transforms.lora.note import DIFFUSERS, NO_ALPHA, NOTE_KEY, ORIGINAL, Note
from converter.transforms.lora.parts import (
    KOHYA_PREFIXES,
    Change,
    Changes,
    is_usually_original,
    kind_of_unet,
    usual_prefixes,
)

Target = Literal["kohya", "diffusers", "peft"]

_CLASSES = {
    "unet": ("UNet2DConditionModel", "diffusers.models.unets.unet_2d_condition"),
    FLUX: ("FluxTransformer2DModel", "diffusers.models.transformers.transformer_flux"),
    **dict.fromkeys((SD3, SD35_LARGE), ("SD3Transformer2DModel", "diffusers.models.transformers.transformer_sd3")),
}


class Written(NamedTuple):
    """An adapter to be written: its tensors, what its header notes, and the config beside it, of each ``part``.

    ``part`` is empty where all of it lies together. ``notes`` are for people.
    """

    part: str
    tensors: tuple[Tensor, ...]
    metadata: Mapping[str, str]
    config: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def write(changes: Changes, to: Target) -> list[Written]:
    """Give an adapter in a form. Raises Unsupported for what that form cannot say."""
    kept = _header_of(changes)
    if to == "kohya":
        tensors, joined = _as_kohya(changes)
        return [Written("", tuple(tensors), kept | Note(joined=joined, short=changes.note.short).render(), {})]
    note = changes.note._replace(joined={}, short=frozenset()).render()
    if to == "diffusers":
        tensors = [tensor for change in changes.all for tensor in _halves(f"{change.part}.{change.path}", change)]
        metadata, told = _metadata_of(changes)
        return [Written("", _checked(changes, tensors), kept | note | metadata, {}, told)]
    parts = changes.parts
    written: list[Written] = []
    for part in parts:
        mine = [change for change in changes.all if change.part == part]
        tensors = [tensor for change in mine for tensor in _halves(f"{PEFT_PREFIX}{change.path}", change)]
        config = _config_of(part, changes, mine)
        name = part if len(parts) > 1 else ""
        written.append(Written(name, _checked(changes, tensors), kept | note, config, _note_long(part, mine)))
    return written


def _note_long(part: str, mine: Sequence[Change]) -> tuple[str, ...]:
    """Note which names a class of transformers 5 does not have; PEFT leaves out in silence what it does not find."""
    if part != "text_encoder" or not any(change.path.startswith("text_model.") for change in mine):
        return ()
    note = "names begin with text_model., as CLIPTextModel of transformers 4 has them, and that of version 5 has not"
    return (f"{part}: {note}",)


def _checked(changes: Changes, tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    tensors = tuple(tensors)
    for name, count in Counter(tensor.name for tensor in tensors).items():
        if count > 1:
            raise BadFile(changes.adapter.where, f"holds two tensors that would both be called {name!r}")
    return tensors


def _header_of(changes: Changes) -> dict[str, str]:
    """Give what a header says that is not of the names."""
    metadata = changes.adapter.checkpoint.metadata
    return {key: text for key, text in metadata.items() if key not in ("format", METADATA_KEY, NOTE_KEY)}


def _halves(name: str, change: Change) -> tuple[Tensor, Tensor]:
    return (
        Tensor(f"{name}.lora_A.weight", change.down.source),
        Tensor(f"{name}.lora_B.weight", change.up.source),
    )


# Diffusers and PEFT: alphas in a config.


def _metadata_of(changes: Changes) -> tuple[dict[str, str], tuple[str, ...]]:
    """Give what a header says of the scales, where there are any but 1, which is what is taken without it.

    Diffusers makes a LoraConfig of what is noted of each part, and of all parts where of one
    (``load_lora_adapter`` in ``loaders/peft.py``, ``_load_lora_into_text_encoder`` in ``loaders/lora_base.py``).
    """
    if all(change.scale == 1 for change in changes.all):
        return {}, ()
    said: dict[str, Any] = {}
    for part in changes.parts:
        mine = [change for change in changes.all if change.part == part]
        said |= {f"{part}.{key}": value for key, value in _numbers_of(part, mine).items()}
    note = f"alphas are in {METADATA_KEY} of the header, which Diffusers reads from 0.34 on; older ones take them for 1"
    return {METADATA_KEY: json.dumps(said, indent=2, sort_keys=True)}, (note,)


def _numbers_of(part: str, mine: Sequence[Change]) -> dict[str, Any]:
    """Give the ranks and alphas of a LoraConfig: the most common, and a pattern for each other.

    A ``^`` keeps a path from being taken for the end of a longer one. What transformers 4 has below ``text_model.``
    version 5 has without it, so there a path is given as the end that both have.
    """

    def spelled(path: str) -> str:
        return path.removeprefix("text_model.")

    mark = "" if part.startswith("text_encoder") else "^"
    rank = Counter(change.rank for change in mine).most_common(1)[0][0]
    alpha = Counter(change.alpha for change in mine).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {f"{mark}{spelled(one.path)}": one.rank for one in mine if one.rank != rank},
        "alpha_pattern": {f"{mark}{spelled(one.path)}": _plain(one.alpha) for one in mine if one.alpha != alpha},
        "target_modules": sorted(spelled(one.path) for one in mine),
    }


def _plain(alpha: float) -> int | float:
    return int(alpha) if alpha == int(alpha) else alpha


def _config_of(part: str, changes: Changes, mine: Sequence[Change]) -> dict[str, Any]:
    """Give the adapter_config.json of a part."""
    found = _CLASSES.get(part) or (_CLASSES.get(changes.base.name) if part == "transformer" and changes.base else None)
    said = changes.adapter.config
    return {
        "auto_mapping": {"base_model_class": found[0], "parent_library": found[1]} if found else None,
        "base_model_name_or_path": said.get("base_model_name_or_path") if changes.adapter.form == "peft" else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
        **_numbers_of(part, mine),
    }


# kohya: alphas as tensors, and the modules that its trainer's model has.


def _as_kohya(changes: Changes) -> tuple[list[Tensor], dict[str, tuple[int, ...]]]:
    """Give the tensors, and which modules were joined of parts of which ranks."""
    prefixes = _prefixes_of(changes)
    blocks = changes.note.blocks or (ORIGINAL if is_usually_original(changes) else DIFFUSERS)
    made, joined = as_trained(changes) if blocks == ORIGINAL else (changes.all, {})
    tensors = [tensor for change in made for tensor in _of_kohya(changes, _spell(change, prefixes), change)]
    return list(_checked(changes, tensors)), joined


def as_trained(changes: Changes) -> tuple[list[Change], dict[str, tuple[int, ...]]]:
    """Give what is done to the modules that the trainer's layout of a model has, text encoders as they are.

    And which of those were joined of parts of which ranks. Raises Unsupported for parts that cannot be.
    """
    base = changes.base
    joined: dict[str, tuple[int, ...]] = {}
    groups: dict[str, tuple[Found, dict[int, Change]]] = {}
    made: list[Change] = []
    is_xl = kind_of_unet(changes) in ("XL", "")
    for change in changes.all:
        found = None
        if base is not None and change.part == base.part:
            found = original_of(base.name, is_xl).find(change.path)
        if found is None:
            made.append(change)
        else:
            groups.setdefault(found.whole, (found, {}))[1][found.place or 0] = change
    for whole, (found, members) in groups.items():
        change, ranks = _join(changes, whole, found, members)
        if ranks:
            joined[whole] = ranks
        made.append(change)
    return made, joined


def _spell(change: Change, prefixes: Mapping[str, str]) -> str:
    """Give a path as kohya's names have it; that of a CLIP's module with the ``text_model.`` of transformers 4."""
    clip = clip_modules().find(change.path) if change.part.startswith("text_encoder") else None
    if clip is not None:
        return f"{prefixes[change.part]}{clip.path}"
    return f"{T5_PREFIX if t5_modules().find(change.path) else prefixes[change.part]}{change.path}"


def _prefixes_of(changes: Changes) -> dict[str, str]:
    """Give what names begin with in each part, by the note or as is usual."""
    prefixes = usual_prefixes(changes)
    for prefix in sorted(changes.note.prefixes & KOHYA_PREFIXES.keys()):
        part = KOHYA_PREFIXES[prefix] or (changes.base.part if changes.base else "")
        prefixes |= {part: prefix} if part in prefixes else {}
    return prefixes


def _of_kohya(changes: Changes, path: str, change: Change) -> Iterator[Tensor]:
    name = path.replace(".", "_")
    yield Tensor(f"{name}.lora_down.weight", change.down.source)
    yield Tensor(f"{name}.lora_up.weight", change.up.source)
    if not change.alpha:
        problem = f"has an alpha of 0 for {change.part}.{change.path}, which kohya's trainer takes for the rank"
        raise Unsupported(changes.adapter.where, problem, "Take the pair out, which does nothing.")
    how = changes.note.alphas.get(name, changes.note.alpha)
    if how == NO_ALPHA and change.scale == 1:
        return
    tag, *axes = how.split("x")
    dtype, content = _pack(change.alpha, (tag, change.down.dtype.tag, "F32", "F64"))
    yield Tensor(f"{name}.alpha", Constant(dtype, (1,) * len(axes), content))


def _pack(alpha: float, tags: Iterable[str]) -> tuple[DType, bytes]:
    """Give an alpha in the first dtype that holds it exactly: kohya's trainer writes that of the weights."""
    for tag in tags:
        try:
            content = _pack_as(alpha, tag)
        except (OverflowError, struct.error, KeyError):
            continue
        if content is not None:
            return DTYPES[tag], content
    raise AssertionError("a float is a float64")


def _pack_as(alpha: float, tag: str) -> bytes | None:
    letter = ALPHA_LETTERS[tag]
    is_whole = letter not in ("<d", "<f", "<e")
    if is_whole and alpha != int(alpha):
        return None
    content = struct.pack(letter, int(alpha) if is_whole else alpha)
    if tag == "BF16":
        return content[2:] if struct.unpack(letter, content)[0] == alpha and content[:2] == b"\0\0" else None
    return content if struct.unpack(letter, content)[0] == alpha else None


def _join(changes: Changes, whole: str, found: Found, members: Mapping[int, Change]) -> tuple[Change, tuple[int, ...]]:
    """Give what is done to all parts of a module as what is done to it, and their ranks where they were joined.

    Parts that share their ``down`` have their rows one behind the other. Others have each its own columns, and zeros
    everywhere else: as many as all have together, which is exact.
    """
    first = next(iter(members.values()))
    parts = [members.get(place) for place in range(len(found.row.parts))]
    held = [one for one in parts if one is not None]
    where = changes.adapter.where
    if len(parts) == 1:
        up = found.row.operation.together([first.up])
        return Change(first.part, whole, first.down, Tensor(first.up.name, up), first.alpha), ()
    for one in held[1:]:
        if one.scale != first.scale or one.down.dtype is not first.down.dtype or one.up.dtype is not first.up.dtype:
            what = "scale (alpha / rank)" if one.scale != first.scale else "dtype"
            problem = (
                f"has {first.path} of another {what} than {one.path}, and they are one module in the trainer's names"
            )
            raise Unsupported(where, problem, "PEFT's and Diffusers' names can say that, the trainer's cannot.")
    for one in held:
        if one.down.shape[1:] != first.down.shape[1:] or len(one.up.shape) != 2:
            problem = f"has a pair for {one.path} that does not fit into {whole}: its halves are of other shapes"
            raise BadFile(where, problem)
    if len(held) == len(parts) and _are_shared(changes, whole, held):
        up = found.row.operation.together([one.up for one in held])
        others = tuple(one.down.source for one in held[1:] if one.down.source != first.down.source)
        down = Copies(first.down.source, others, repr(whole)) if others else first.down.source
        return Change(first.part, whole, Tensor(whole, down), Tensor(whole, up), first.alpha), ()
    return _join_blocks(changes, whole, found, parts, held)


def _are_shared(changes: Changes, whole: str, held: Sequence[Change]) -> bool:
    first = held[0]
    is_same = all(one.down.source == first.down.source for one in held)
    return is_same or (whole in changes.note.shared and all(one.down.shape == first.down.shape for one in held))


def _join_blocks(
    changes: Changes, whole: str, found: Found, parts: Sequence[Change | None], held: Sequence[Change]
) -> tuple[Change, tuple[int, ...]]:
    first = held[0]
    dtype, width = first.up.dtype, first.down.shape[1]
    ranks = tuple(one.rank if one else 0 for one in parts)
    lengths = _lengths(changes, found, parts)
    rank, rows = sum(ranks), sum(lengths)
    downs, ups = [], []
    columns = 0
    for part, length, row in zip(parts, lengths, accumulate(lengths, initial=0), strict=False):
        if part is None:
            ups.append(Box((row, 0), Zeros(dtype, (length, rank))))
            continue
        downs.append(Box((columns, 0), part.down.source))
        for start, source in _line(dtype, length, rank, columns, part):
            ups.append(Box((row, start), source))
        columns += part.rank
    down = Boxes(first.down.dtype, (rank, width), tuple(downs))
    alpha = first.scale * rank
    if Fraction(float(alpha)) != alpha:
        problem = f"has an alpha of {first.path} that, over the rank of what it is joined to, no number holds exactly"
        raise Unsupported(changes.adapter.where, problem, "PEFT's and Diffusers' names can say it, kohya's cannot.")
    up = Boxes(dtype, (rows, rank), tuple(ups))
    return Change(first.part, whole, Tensor(whole, down), Tensor(whole, up), float(alpha)), ranks


def _line(dtype: DType, length: int, rank: int, first: int, part: Change) -> Iterator[tuple[int, TensorSource]]:
    """Give the boxes of a part's rows: its columns, from ``first`` on, and zeros before and after."""
    last = first + part.rank
    if first:
        yield 0, Zeros(dtype, (length, first))
    yield first, part.up.source
    if last < rank:
        yield last, Zeros(dtype, (length, rank - last))


def _lengths(changes: Changes, found: Found, parts: Sequence[Change | None]) -> list[int]:
    """Give how many rows each part has, of one that is not there too. Raises BadFile where they do not fit."""
    operation = found.row.operation
    assert isinstance(operation, Concat)
    ratios = operation.ratios or (1,) * len(parts)
    units = {Fraction(one.up.shape[0], ratio) for one, ratio in zip(parts, ratios, strict=True) if one is not None}
    if len(units) > 1 or any(unit.denominator != 1 for unit in units):
        raise BadFile(changes.adapter.where, f"has parts of {found.whole} that do not fit into one module")
    [unit] = units
    return [int(unit) * ratio for ratio in ratios]

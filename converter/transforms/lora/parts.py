"""An adapter of any form as what it does to each module of a pipeline, in Diffusers' names.

The rows of a module that the trainer's layout has joined are cut into those of its parts, all with the one ``down``:
that is exact. What cannot be told by names is noted in the header by whoever joins (``Note``), and looked at as it is
read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import NamedTuple

from converter.errors import BadFile, Unsupported, name_some
from converter.models.adapters import ORIGINAL_PREFIXES, Adapter, Pair, read_alphas
from converter.tensors.base import Tensor
from converter.tensors.sparse import Columns
from converter.transforms.lora.bases import (
    DENOISER_PREFIXES,
    ENCODERS,
    FLUX,
    PARTS,
    SD3,
    SD35_LARGE,
    T5_PREFIX,
    Base,
    Found,
    Modules,
    bases,
    clip_modules,
    modules_of,
    t5_modules,
)
from converter.transforms.lora.note import DIFFUSERS, ORIGINAL, Note, read_note, spell_alpha

_MAX_NAMED = 3
DENOISER = ""
"""A part of the pipeline that is still to be told: its UNet or its transformer."""
# What kohya's names begin with, and the part that each is of.
KOHYA_PREFIXES = {**dict.fromkeys(DENOISER_PREFIXES, DENOISER), **ENCODERS, T5_PREFIX: T5_PREFIX}
# What ComfyUI calls the text encoders (``model_lora_keys_clip`` in ``comfy/lora.py``).
OF_COMFY = {
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": T5_PREFIX,
}
_CLASSES = {
    "UNet2DConditionModel": "unet", "FluxTransformer2DModel": "transformer", "SD3Transformer2DModel": "transformer",
    "CLIPTextModel": "text_encoder", "CLIPTextModelWithProjection": "text_encoder_2",
}  # fmt: skip
# What tells models of the same names apart: a class, how their trainer's blocks begin, what kohya's trainer notes in a
# header (``library/sai_model_spec.py``, ``train_network.py``), and how wide their hidden states are.
_OF_SD3 = (SD3, SD35_LARGE)
_BASES_OF_CLASS = {"FluxTransformer2DModel": (FLUX,), "SD3Transformer2DModel": _OF_SD3}
_BASES_OF_BLOCKS = {"double_blocks": (FLUX,), "single_blocks": (FLUX,), "joint_blocks": _OF_SD3}
_NOTED_MODELS = ("modelspec.architecture", "ss_base_model_version")
_BASES_OF_NOTE = {"flux": (FLUX,), "stable-diffusion-3": _OF_SD3, "sd3": _OF_SD3}
_BASES_OF_WIDTH = {3072: (FLUX,), 12288: (FLUX,), 1536: (SD3,), 2432: (SD35_LARGE,)}


class Change(NamedTuple):
    """What an adapter does to a module: ``up @ down`` times alpha / rank is added to its weight."""

    part: str
    path: str
    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> Fraction:
        return Fraction(self.alpha) / self.rank


@dataclass(frozen=True, slots=True)
class Changes:
    """All that an adapter does, the model that it is for (None where it changes text encoders alone), and its note."""

    adapter: Adapter
    base: Base | None
    all: tuple[Change, ...]
    note: Note = field(default_factory=Note)

    @property
    def parts(self) -> list[str]:
        """The parts of a pipeline that it changes, in the order of PARTS."""
        held = {change.part for change in self.all}
        return [part for part in PARTS if part in held]


def find_changes(adapter: Adapter, hint: str = "") -> Changes:
    """Say what an adapter does to which modules. ``hint`` is the part that an adapter of PEFT is of, if that is known.

    Raises what is wrong with it, Unsupported for one that is for another model.
    """
    adapter.check()
    if not adapter.pairs:
        raise BadFile(adapter.where, "holds no pair of matrices, and so changes nothing", "Fetch it again.")
    note = read_note(adapter.checkpoint)
    placed = [(pair, *part_of(adapter, pair, hint)) for pair in adapter.pairs]
    base, found = _find_base(adapter, note, [(pair, path) for pair, part, path in placed if part == DENOISER])
    alphas = read_alphas(adapter)
    changes: list[Change] = []
    shared: set[str] = set()
    short: set[str] = set()
    unknown: list[str] = []
    short |= note.short if adapter.form == "kohya" else set()
    for pair, part, path in placed:
        where = found.get(pair.module) if part == DENOISER else _find_encoder(part, path, adapter.form)
        if where is None:
            unknown.append(pair.module)
            continue
        alpha = alphas[pair.module]
        if part != DENOISER and where.place is None and adapter.form != "kohya":
            short.add(part)
        if where.place is None and len(where.row.parts) > 1 and where.whole not in note.joined:
            shared.add(where.whole)
        changes += _cut(pair, _part_in(adapter, part, base), where, alpha, note, part in short)
    _refuse_unknown(adapter, base, unknown)
    _refuse_twice(adapter, changes)
    note = note._replace(shared=note.shared | shared, short=frozenset(short))
    changes_made = Changes(adapter, base, tuple(changes), note)
    return replace(changes_made, note=_with_spelling(changes_made, found)) if adapter.form == "kohya" else changes_made


def _with_spelling(changes: Changes, found: Mapping[str, Found]) -> Note:
    """Note of kohya's names what is not as his trainer has it today, and how alphas are written."""
    adapter, note = changes.adapter, changes.note
    spelled = {pair.module: spell_alpha(pair) for pair in adapter.pairs}
    most = Counter(spelled.values()).most_common(1)[0][0]
    modules = [pair.module for pair in adapter.pairs]
    held = {prefix for prefix in KOHYA_PREFIXES if any(module.startswith(prefix) for module in modules)}
    blocks = {
        ORIGINAL if one.place is None else DIFFUSERS for one in found.values() if (one.whole,) != tuple(one.paths)
    }
    usual = ORIGINAL if is_usually_original(changes) else DIFFUSERS
    return note._replace(
        alpha=most,
        alphas={module: how for module, how in spelled.items() if how != most},
        prefixes=frozenset(held - set(usual_prefixes(changes).values())),
        blocks=blocks.pop() if len(blocks) == 1 and blocks != {usual} else "",
    )


def part_of(adapter: Adapter, pair: Pair, hint: str = "") -> tuple[str, str]:
    """Tell which part of a pipeline a pair is of, and the rest of its name: DENOISER, a text encoder, or T5_PREFIX.

    Raises Unsupported for a name of kohya's that begins as none does.
    """
    module = pair.module
    if adapter.form == "kohya":
        prefixes = KOHYA_PREFIXES
        prefix = next((one for one in prefixes if module.startswith(one)), "")
        if not prefix:
            advice = f"kohya's begin with {', '.join(prefixes)}."
            raise Unsupported(adapter.where, f"is of no model that wconv knows: it holds {module!r}", advice)
        return prefixes[prefix], module.removeprefix(prefix)
    if adapter.form == "comfyui":
        prefixes = {**dict.fromkeys(ORIGINAL_PREFIXES, DENOISER), **OF_COMFY}
        prefix = next((one for one in prefixes if module.startswith(one)), "")
        return prefixes.get(prefix, DENOISER), module.removeprefix(prefix)
    if adapter.form == "peft":
        part = hint or _part_of_peft(adapter, module, pair)
        return DENOISER if part in ("unet", "transformer") else part, module
    first, _, rest = module.partition(".")
    if first in PARTS:
        return DENOISER if first in ("unet", "transformer") else first, rest
    return DENOISER, module


def _part_of_peft(adapter: Adapter, path: str, pair: Pair) -> str:
    """Tell the part by the class that a config names, or by the module and how wide it is."""
    mapping = adapter.config.get("auto_mapping")
    named = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if isinstance(named, str) and named in _CLASSES:
        return _CLASSES[named]
    if clip_modules().find(path):
        return "text_encoder_2" if 1280 in (pair.down.shape[1], pair.up.shape[0]) else "text_encoder"
    return "unet"


def _part_in(adapter: Adapter, part: str, base: Base | None) -> str:
    if part == DENOISER:
        assert base is not None
        return base.part
    if part == T5_PREFIX:
        if base is None:
            problem = "holds pairs of a T5, and none that tell of which pipeline"
            raise Unsupported(adapter.where, problem, "It is the second text encoder of Flux and the third of SD3.")
        return "text_encoder_2" if base.name == FLUX else "text_encoder_3"
    return part


def _find(modules: Modules, path: str, form: str) -> Found | None:
    return modules.find_kohya(path) if form == "kohya" else modules.find(path)


def _find_encoder(part: str, path: str, form: str) -> Found | None:
    """Find a module of a text encoder: a CLIP, or a T5, which only some parts can be."""
    found = None if part == T5_PREFIX else _find(clip_modules(), path, form)
    return found or (_find(t5_modules(), path, form) if part not in ENCODERS.values() or form != "kohya" else None)


def _find_base(adapter: Adapter, note: Note, pairs: list[tuple[Pair, str]]) -> tuple[Base | None, dict[str, Found]]:
    """Tell which model's modules the pairs are of: by their names, and by how wide they are where two have those."""
    if not pairs:
        return None, {}
    candidates = []
    for base in bases():
        modules = modules_of(base.name)
        found = {pair.module: one for pair, path in pairs if (one := _find(modules, path, adapter.form))}
        candidates.append((base, found))
    most = max(len(found) for _, found in candidates)
    best = [(base, found) for base, found in candidates if len(found) == most]
    if not most:
        _refuse_unknown(adapter, None, [pair.module for pair, _ in pairs])
    for told in _evidence(adapter, note, [pair for pair, _ in pairs]):
        best = [(base, found) for base, found in best if base.name in told] or best
    if len(best) > 1:
        names = " or ".join(base.name for base, _ in best)
        raise Unsupported(adapter.where, f"is of {names}, which its names and shapes do not tell", "")
    return best[0]


def _evidence(adapter: Adapter, note: Note, pairs: list[Pair]) -> Iterator[tuple[str, ...]]:
    """Give the models that each thing tells of: what is noted of them, and how wide the pairs are."""
    mapping = adapter.config.get("auto_mapping")
    named = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    yield _BASES_OF_CLASS.get(str(named), ())
    for name in (*note.shared, *note.joined):
        yield _BASES_OF_BLOCKS.get(name.partition(".")[0], ())
    for key in _NOTED_MODELS:
        text = adapter.checkpoint.metadata.get(key, "").lower()
        yield next((bases for mark, bases in _BASES_OF_NOTE.items() if mark in text), ())
    for width in {width for pair in pairs for width in (pair.down.shape[1], pair.up.shape[0])}:
        yield _BASES_OF_WIDTH.get(width, ())


def _refuse_unknown(adapter: Adapter, base: Base | None, unknown: list[str]) -> None:
    if not unknown:
        return
    of = base.name if base else "Stable Diffusion 1, 2, XL, 3 or Flux"
    named = name_some(list(map(repr, unknown)), _MAX_NAMED)
    problem = f"is for another model, or more than one: {of} has no module of the name {named}"
    raise Unsupported(adapter.where, problem, "wconv converts the names of adapters of those models.")


def _refuse_twice(adapter: Adapter, changes: list[Change]) -> None:
    counts = Counter((change.part, change.path) for change in changes)
    for (part, path), count in counts.items():
        if count > 1:
            problem = f"holds {count} pairs for one module, {part}.{path}, under names of two layouts"
            raise Unsupported(adapter.where, problem, "Keep those of one.")


def _cut(pair: Pair, part: str, found: Found, alpha: float, note: Note, is_short: bool) -> Iterator[Change]:
    """Give what a pair does to each module that its own is made of."""
    if is_short:
        yield Change(part, found.whole, pair.down, pair.up, alpha)
        return
    if found.place is not None:
        yield Change(part, found.path, pair.down, pair.up, alpha)
        return
    count = len(found.paths)
    ups = [Tensor(pair.up.name, one) for one in found.row.operation.apart(pair.up, count)]
    ranks = note.joined.get(found.whole, ())
    if len(ranks) != count or sum(ranks) != pair.rank or not any(ranks):
        for path, up in zip(found.paths, ups, strict=True):
            yield Change(part, path, pair.down, up, alpha)
        return
    first = 0
    empty = tuple(up.source for up, rank in zip(ups, ranks, strict=True) if not rank)
    for path, up, rank in zip(found.paths, ups, ranks, strict=True):
        if rank:
            zeros = (0,) * (len(pair.down.shape) - 1)
            down = pair.down.source.box((first, *zeros), (rank, *pair.down.shape[1:]))
            columns = Columns(up.source, first, rank, repr(pair.up.name), empty)
            share = Fraction(alpha) * rank / pair.rank
            yield Change(part, path, Tensor(pair.down.name, down), Tensor(pair.up.name, columns), float(share))
            empty = ()
        first += rank


def describe_base(adapter: Adapter, changes: Changes) -> str:
    """Name the model that an adapter is for, as far as its names and shapes tell."""
    base = changes.base
    if base is None or base.part != "unet":
        return base.name if base else ""
    kind = kind_of_unet(changes)
    return f"{base.name} {kind}".rstrip()


def kind_of_unet(changes: Changes) -> str:
    """Tell Stable Diffusion 1, 2 and XL apart: by parts and blocks that only one has, or how wide its prompts are."""
    paths = [change.path for change in changes.all if change.part == "unet"]
    widths = {
        change.down.shape[1]
        for change in changes.all
        if change.part == "unet" and change.path.endswith(("attn2.to_k", "attn2.to_v"))
    }
    of_xl = ("add_embedding.", "up_blocks.0.attentions.")
    others = ("down_blocks.0.attentions.", "up_blocks.3.", "down_blocks.3.", "down_blocks.2.downsamplers.")
    depth = (path.partition(".transformer_blocks.")[2].partition(".")[0] for path in paths)
    if "text_encoder_2" in changes.parts or widths == {2048} or any(path.startswith(of_xl) for path in paths):
        return "XL"
    if any(number not in ("", "0") for number in depth):
        return "XL"
    if widths == {1024}:
        return "2"
    return "1" if widths == {768} else "1 or 2" if any(path.startswith(others) for path in paths) else ""


def is_usually_original(changes: Changes) -> bool:
    """Say whether kohya has the modules of a model in its trainer's names: of all but Stable Diffusion 1 and 2."""
    base = changes.base
    return base is not None and (base.part != "unet" or kind_of_unet(changes) == "XL")


def usual_prefixes(changes: Changes) -> dict[str, str]:
    """Give what kohya's names begin with in each part; the text encoders have numbers where there may be two."""
    is_one = not is_usually_original(changes) and "text_encoder_2" not in changes.parts
    numbered = {part: prefix for prefix, part in ENCODERS.items()}  # lora_te1_ comes after lora_te_
    encoders = {**numbered, **({"text_encoder": "lora_te_"} if is_one else {})}
    return {"unet": "lora_unet_", "transformer": "lora_unet_", "text_encoder_3": T5_PREFIX, **encoders}

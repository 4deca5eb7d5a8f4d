"""Which weights of a model an adapter is for: its modules by their names, and what PEFT adds beside those."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from converter.errors import BadFile, BadRequest, Unsupported, Where, name_some, spell_shape
from converter.libraries.transformers import names_model
from converter.models.adapters import (
    ADAPTER_CONFIG,
    ORIGINAL_PREFIXES,
    PEFT_PREFIX,
    Adapter,
    Pair,
    find_adapter,
    read_alphas,
)
from converter.models.checkpoint import Checkpoint
from converter.models.component import Component
from converter.tensors.base import Tensor
from converter.transforms.lora.bases import T5_PREFIX
from converter.transforms.lora.forms import as_trained
from converter.transforms.lora.parts import DENOISER, OF_COMFY, find_changes, part_of
from converter.transforms.merge.base import HEAD, TABLES, WEIGHT, Part, leaf_of, tied_head
from converter.transforms.merge.product import MAX_RIGHT_NBYTES, Product, bias_of, product_of, right_nbytes

_NAMED = 3
_BIAS = ".bias"
_OTHER_BASE = "It may be for another base: name the one that it was trained on."
_MERGED_DTYPES = ("F32", "BF16", "F16")
_CLASSIFIERS = ("classifier", "score")
# The components of a pipeline that a part of it may be; Flux has T5 as its second text encoder.
_COMPONENTS = {DENOISER: ("unet", "transformer"), T5_PREFIX: ("text_encoder_3", "text_encoder_2")}
# What the names of a part begin with in a single file.
_OF_FILES = {
    **dict.fromkeys(ORIGINAL_PREFIXES, DENOISER),
    **dict.fromkeys(("cond_stage_model.transformer.", "conditioner.embedders.0.transformer."), "text_encoder"),
    **OF_COMFY,
}
_OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.1.model.")
# What modules are called since version 4.52 of transformers, and in the files, which keep the names from before: of
# LLaVA and its like, and of Qwen2-VL (``conversion_mapping.py``).
_IN_MEMORY = (
    {"model.language_model.": "language_model.model.", "lm_head": "language_model.lm_head", "model.": ""},
    {"model.language_model.": "model.", "model.visual.": "visual."},
)

Opened = Sequence[tuple[Component, Checkpoint]]


@dataclass(frozen=True, slots=True)
class Weighted:
    """An adapter that is to be merged, times ``weight``; ``label`` is what it is called in notes.

    ``embeddings`` are the modules among its pairs that look rows up, ``biases`` what is added to biases by module.
    ``replaced`` are tensors that take the place of the base's, by their names.
    """

    adapter: Adapter
    weight: float
    label: str
    scales: Mapping[str, float]
    embeddings: frozenset[str] = frozenset()
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    replaced: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def where(self) -> Where:
        """The file to name in a message."""
        return self.adapter.checkpoint.weight_set.path


class Merge(NamedTuple):
    """What becomes of one tensor of the base: products are added, to what is ``replaced`` by another first."""

    products: tuple[Product, ...] = ()
    replaced: Tensor | None = None


def take_adapter(checkpoint: Checkpoint, config: Mapping[str, Any], weight: float, label: str) -> Weighted:
    """Read what a set holds as an adapter that can be merged. Raises Unsupported or BadFile where it cannot be.

    What PEFT has beside the pairs of linear modules is taken out before those are looked at: LoRAs of embeddings,
    biases of LoRAs, whole modules (``modules_to_save``), and the base's own embeddings.
    """
    where = checkpoint.weight_set.path
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(one, str) for one in saved):
        raise BadFile(where.parent / ADAPTER_CONFIG, "says a modules_to_save that is no list of names")
    for flag in ("use_rslora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying"):
        if type(config.get(flag, False)) not in (bool, type(None)):
            raise BadFile(where.parent / ADAPTER_CONFIG, f"says {flag} = {str(config[flag])[:60]}, which is no flag")
    is_tied = config.get("ensure_weight_tying") is True
    of_words = (*TABLES, HEAD) if is_tied else ()
    plain, embeddings, biases, replaced, own = _sort_out(checkpoint, config, frozenset([*saved, *of_words]))
    # ``update_layer`` in ``peft/tuners/lora/layer.py``: rsLoRA has another scale, and nothing else.
    rest = {key: value for key, value in config.items() if key not in ("use_rslora", "lora_bias", "modules_to_save")}
    adapter = find_adapter(plain, rest)
    if adapter is None:
        raise Unsupported(
            where, "holds no LoRA", "The base comes first, and then its adapters; 'wconv inspect' says what a file is."
        )
    adapter.check()
    if not adapter.pairs:
        raise BadFile(where, "holds no pair of a LoRA", "Fetch it again.")
    whole = sorted(replaced.keys() - own)
    there = {end for name in whole for end in _ends_of(name.rpartition(".")[0])}
    # For a classifier PEFT names both that there are (``peft_model.py``).
    there |= set(_CLASSIFIERS) if not there.isdisjoint(_CLASSIFIERS) else set()
    lacking = [one for one in saved if one not in there]
    if lacking:
        raise BadFile(where, f"lacks {lacking[0]!r}, which its config has in modules_to_save", "Fetch it again.")
    if whole and weight != 1:
        problem = f"has whole modules ({name_some(whole, _NAMED)}), which have no weight other than 1"
        raise Unsupported(where, problem, "Leave the weight out.")
    is_rooted = config.get("use_rslora") is True
    alphas = read_alphas(adapter)
    scales = {
        pair.module: weight * alphas[pair.module] / (math.sqrt(pair.rank) if is_rooted else pair.rank)
        for pair in adapter.pairs
    }
    leaves = set(map(leaf_of, [*scales, *(name.rpartition(".")[0] for name in replaced)]))
    if is_tied and (HEAD in leaves) is leaves.isdisjoint(TABLES):
        problem = "says ensure_weight_tying, and holds what is for one alone of the head and the table of words"
        raise Unsupported(where.parent / ADAPTER_CONFIG, problem, "Save it again with PEFT, which saves both.")
    stray = sorted((biases.keys() | {name.removesuffix(WEIGHT) for name in own}) - scales.keys())
    if stray:
        raise BadFile(where, f"holds a bias, or the base's weight, for {stray[0]!r}, and no pair", "Fetch it again.")
    return Weighted(adapter, weight, label, scales, frozenset(embeddings), biases, replaced)


def _sort_out(
    checkpoint: Checkpoint, config: Mapping[str, Any], saved: frozenset[str]
) -> tuple[Checkpoint, set[str], dict[str, Tensor], dict[str, Tensor], set[str]]:
    """Give the set with pairs alone, the modules that are embeddings, the biases by module, and what is replaced.

    And the names of those among the last that are the base's own.
    """
    embeddings: set[str] = set()
    biases: dict[str, Tensor] = {}
    replaced: dict[str, Tensor] = {}
    own: set[str] = set()
    has_biases = config.get("lora_bias") is True

    def sort(tensor: Tensor) -> Tensor | None:
        name = tensor.name
        if not name.startswith(PEFT_PREFIX):
            return tensor
        module, _, leaf = name.removeprefix(PEFT_PREFIX).rpartition(".")
        if leaf in ("lora_embedding_A", "lora_embedding_B"):
            embeddings.add(module)
            return tensor._replace(name=f"{PEFT_PREFIX}{module}.lora_{leaf[-1]}.weight")
        of_base = module.endswith(".base_layer") and leaf == "weight"
        name = f"{module.removesuffix('.base_layer') if of_base else module}.{leaf}"
        if has_biases and leaf == "bias" and module.endswith(".lora_B"):
            biases[module.removesuffix(".lora_B")] = tensor
        elif name in replaced:
            return tensor
        elif of_base:
            # Of embeddings that are trained ``get_peft_model_state_dict`` saves the base's own too.
            own.add(name)
            replaced[name] = tensor
        elif leaf in ("weight", "bias") and not saved.isdisjoint(_ends_of(module)):
            replaced[name] = tensor
        else:
            return tensor
        return None

    files = (replace(file, tensors=tuple(filter(None, map(sort, file.tensors)))) for file in checkpoint.files)
    return replace(checkpoint, files=tuple(files)), embeddings, biases, replaced, own


def _ends_of(module: str) -> Iterator[str]:
    """Give the names by which modules_to_save may mean a module: its path, and each end of it (``_set_trainable``)."""
    words = module.split(".")
    return (".".join(words[at:]) for at in range(len(words)))


def find_merges(weighted: Sequence[Weighted], opened: Opened) -> dict[str, dict[str, Merge]]:
    """Give what becomes of which tensor, by component and name. Raises BadRequest for what is for another base.

    Raises Unsupported for a weight that nothing can be merged into.
    """
    merges: dict[str, dict[str, Merge]] = {}
    parts = [Part(component, checkpoint) for component, checkpoint in opened]
    for one in weighted:
        placed = _place_whole(one, parts) if one.adapter.form == "peft" else _place_each(one, parts)
        _check_twice(one, placed)
        for aim in placed:
            _add(one, aim, merges.setdefault(aim.part.component.name, {}))
        if one.replaced:
            _replace(one, placed[0].part, merges[placed[0].part.component.name])
    for mine in merges.values():
        for name, merge in mine.items():
            if right_nbytes(merge.products) > MAX_RIGHT_NBYTES:
                problem = f"would be merged into with {right_nbytes(merge.products):,} bytes of factors"
                raise Unsupported(repr(name), problem, "Merge fewer adapters at once.")
    return merges


class _Aim(NamedTuple):
    """A pair of an adapter with its scale, and the module of the base that it is for: ``own`` in a part."""

    pair: Pair
    scale: float
    part: Part
    own: str


def _place_each(one: Weighted, parts: Sequence[Part]) -> list[_Aim]:
    """Find the module of each pair of Diffusers' or kohya's form. Raises BadRequest where one is not there."""
    if all(names_model(part.component) and not _is_text(part) for part in parts):
        problem = (
            "has not the names of PEFT, which begin with base_model.model., and the base is a model of transformers"
        )
        raise Unsupported(one.where, problem, "Its scale would be guessed: save it with PEFT.")
    errors: list[tuple[int, BadRequest]] = []
    for adapter, pairs in _spellings(one, parts):
        placed, lost = _place_all(adapter, pairs, parts)
        if not lost:
            return placed
        of_lost, of_placed = (
            {part_of(adapter, pair)[0] for pair in some} for some in (lost, [aim.pair for aim in placed])
        )
        others = sorted(of or "unet or transformer" for of in of_lost) if of_lost.isdisjoint(of_placed) else []
        modules = [pair.module for pair in lost]
        errors.append((len(lost), _not_there(one, modules, len(pairs), parts, others if placed else [])))
    raise min(errors, key=lambda error: error[0])[1]


def _spellings(one: Weighted, parts: Sequence[Part]) -> Iterator[tuple[Adapter, list[tuple[Pair, float]]]]:
    """Give the pairs with their scales, as they are named, and as the tables of the layouts say that they may be.

    An adapter in the names of the trainer of its model has those of Diffusers too, and the other way round; a base in
    the trainer's is a single file, without a config.
    """
    yield one.adapter, [(pair, one.scales[pair.module]) for pair in one.adapter.pairs]
    try:
        changes = find_changes(one.adapter)
    except Unsupported:
        return
    named = replace(one.adapter, form="diffusers")
    is_file = not any(part.component.class_name for part in parts)
    for all_of in (changes.all, *([as_trained(changes)[0]] if is_file else [])):
        pairs = [(Pair(f"{it.part}.{it.path}", it.down, it.up), one.weight * float(it.scale)) for it in all_of]
        yield named, pairs


def _place_all(
    adapter: Adapter, scaled: Iterable[tuple[Pair, float]], parts: Sequence[Part]
) -> tuple[list[_Aim], list[Pair]]:
    """Give the modules of pairs with their scales, and those that are not there."""
    found = [(pair, scale, _find_module(adapter, pair, parts)) for pair, scale in scaled]
    placed = [_Aim(pair, scale, *place) for pair, scale, place in found if place]
    return placed, [pair for pair, _, place in found if not place]


def _check_twice(one: Weighted, placed: Iterable[_Aim]) -> None:
    seen: dict[tuple[str, str], str] = {}
    for aim in placed:
        first = seen.setdefault((aim.part.component.name, aim.own), aim.pair.module)
        if first != aim.pair.module:
            problem = f"has {first!r} and {aim.pair.module!r}, and both are {aim.own!r} in the base"
            raise BadFile(one.where, problem, "Take one of them out.")


def _not_there(
    one: Weighted, modules: Sequence[str], count: int, parts: Sequence[Part], others: Sequence[str] = ()
) -> BadRequest:
    """Say which modules the base has not; ``others`` are the parts of a pipeline that all of these are of."""
    named = name_some([repr(module) for module in modules], _NAMED)
    some = f"{len(modules):,} of its {count:,} modules are not there" if count > len(modules) else "nor any of it"
    advice = _OTHER_BASE
    if any(find_adapter(part.checkpoint, {}) for part in parts):
        advice = "The base is an adapter itself: name a model first, then its adapters."
    elif any(module.startswith(_OPEN_CLIP) for part in parts for module in part.modules):
        advice = "In a single file it has OpenCLIP's names: make a pipeline of it first, with 'wconv to-diffusers'."
    elif others:
        advice = f"It is for {' and '.join(others)} too: name the folder of a pipeline that has all of them."
    return BadRequest(one.where, f"is for {named}, and the base has no such weight ({some})", advice)


def _place_whole(one: Weighted, parts: Sequence[Part]) -> list[_Aim]:
    """Find the one component that has all modules of an adapter of PEFT. Raises BadRequest where none has."""
    modules = [pair.module for pair in one.adapter.pairs]
    best: list[tuple[Part, dict[str, str]]] = []
    lost = modules
    for part in parts:
        found = _aligned(modules, part)
        missing = [module for module in modules if module not in found]
        if not missing:
            best.append((part, found))
        elif len(missing) < len(lost):
            lost = missing
    if len(best) > 1:
        best = _likely(one, best)
    if len(best) > 1:
        names = " and ".join(part.component.name for part, _ in best)
        raise BadRequest(one.where, f"may be for each of {names}", "Choose with --component.")
    if not best:
        raise _not_there(one, lost, len(modules), parts)
    [(part, found)] = best
    return [_Aim(pair, one.scales[pair.module], part, found[pair.module]) for pair in one.adapter.pairs]


def _likely(one: Weighted, best: Sequence[tuple[Part, dict[str, str]]]) -> list[tuple[Part, dict[str, str]]]:
    """Choose among components that have all modules: by shapes, and by what the adapter's folder is called."""

    def fits(part: Part, own: str, pair: Pair) -> bool:
        weight = part.weight(own + WEIGHT)
        return weight is not None and pair.up.shape[0] in weight.shape

    fitting = [
        (part, found) for part, found in best if all(fits(part, found[pair.module], pair) for pair in one.adapter.pairs)
    ]
    named = [it for it in fitting if it[0].component.name == one.adapter.checkpoint.weight_set.folder.name]
    return named or fitting or list(best)


def _aligned(modules: Sequence[str], part: Part) -> dict[str, str]:
    """Map modules to those of the base, which may be named from another class: some words more in front, or fewer.

    ``transformer.h.0.attn.c_attn`` of GPT2LMHeadModel is ``h.0.attn.c_attn`` in a file of GPT2Model. Or they are those
    of a model of images and words, whose file has other names than it itself (``_IN_MEMORY``).
    """
    head = tied_head(part)
    known = {*part.modules, *([HEAD] if head else [])}
    found = {module: module for module in modules if module in known}
    if len(found) == len(modules):
        return found
    first = next(module for module in modules if module not in known)
    words = first.split(".")
    shorter = [".".join(words[at:]) for at in range(1, len(words)) if ".".join(words[at:]) in known]
    longer = [name for name in part.modules if name.endswith(f".{first}")]
    candidates: list[Callable[[str], str]] = []
    if len(shorter) == 1:
        cut = len(first) - len(shorter[0])
        candidates.append(lambda module: module.removeprefix(first[:cut]))
    if len(longer) == 1:
        more = longer[0].removesuffix(first)
        candidates.append(lambda module: more + module)
    candidates += [partial(_renamed, names) for names in _IN_MEMORY]
    for spell in candidates:
        mapped = {module: spell(module) if module not in known else module for module in modules}
        if all(own in known for own in mapped.values()) and len(set(mapped.values())) == len(modules):
            return mapped
    return found


def _renamed(names: Mapping[str, str], module: str) -> str:
    """Give a module with another beginning: by the first of these that it has."""
    old = next((old for old in names if module.startswith(old)), "")
    return names.get(old, "") + module.removeprefix(old)


def _find_module(adapter: Adapter, pair: Pair, parts: Sequence[Part]) -> tuple[Part, str] | None:
    first, _, rest = pair.module.partition(".")
    part, path = part_of(adapter, pair)
    if any(first == one.component.name for one in parts):
        part, path = first, rest
    names = _COMPONENTS.get(part, (part,))
    short = path.replace(".", "_").removeprefix("text_model_")
    above = ["", *(prefix for prefix, of in _OF_FILES.items() if of == part)]
    spelled = [f"{prefix}{more}{short}" for prefix in above for more in ("", "text_model_")]
    for one in parts:
        if one.component.name in names or (one.component.name == "" and _may_be(one, names)):
            own = next(filter(None, map(one.spelled, spelled)), None)
            if own is not None:
                return one, own
    return None


def _may_be(part: Part, names: Collection[str]) -> bool:
    """Say whether a component that is named by itself may be one of these in its pipeline."""
    return not part.component.class_name or _is_text(part) == all(name.startswith("text_encoder") for name in names)


def _is_text(part: Part) -> bool:
    """Say whether a component is a text encoder."""
    return "Text" in part.component.class_name or part.component.class_name.endswith("EncoderModel")


def _add(one: Weighted, aim: _Aim, merges: dict[str, Merge]) -> None:
    """Add what a pair makes of a component's tensors to what others do."""
    pair, scale, part, own = aim
    weight = part.weight(own + WEIGHT)
    assert weight is not None
    _append(merges, weight.name, product_of(pair.up, pair.down, scale, _is_turned(one, aim, weight)))
    if pair.module in one.biases:
        _append(merges, own + _BIAS, _bias_product(one, aim))


def _replace(one: Weighted, part: Part, merges: dict[str, Merge]) -> None:
    """Let tensors of the base be others; what is added comes on top of that."""
    found = _aligned(sorted({name.rpartition(".")[0] for name in one.replaced}), part)
    for name, tensor in one.replaced.items():
        module, _, leaf = name.rpartition(".")
        base = part.weight(f"{found[module]}.{leaf}") if module in found else None
        if base is None:
            problem = f"holds {name!r} in whole (modules_to_save), and the base has no such weight"
            raise BadRequest(one.where, problem, "Save the base of the class that has it first, or merge it with PEFT.")
        if base.shape != tensor.shape:
            problem = f"holds {name!r} of {spell_shape(tensor.shape)}, and the base has {spell_shape(base.shape)}"
            raise Unsupported(one.where, problem, "PEFT merges it into a base whose vocabulary, or head, is as large.")
        _check_dtype(tensor)
        _check_dtype(base)
        before = merges.get(base.name, Merge())
        if before.replaced is not None:
            raise Unsupported(one.where, f"replaces {name!r}, which another adapter does too", "Merge one of them.")
        merges[base.name] = before._replace(replaced=tensor)


def _check_dtype(tensor: Tensor) -> None:
    if tensor.dtype.tag not in _MERGED_DTYPES:
        problem = f"holds {tensor.name!r} in {tensor.dtype.short_name}, and fp32, bf16 and fp16 are merged"
        raise Unsupported(tensor.where, problem, "'wconv recast --dtype bf16' makes such numbers of it.")


def _append(merges: dict[str, Merge], name: str, product: Product) -> None:
    before = merges.get(name, Merge())
    merges[name] = before._replace(products=(*before.products, product))


def _is_turned(one: Weighted, aim: _Aim, weight: Tensor) -> bool:
    """Say whether a weight lies as [in, out] for a pair. Raises BadRequest for one of another shape."""
    pair = aim.pair
    height, inner = pair.up.shape[0], _trimmed(pair.down.shape[1:])
    for tensor in (weight, pair.up, pair.down):
        _check_dtype(tensor)
    is_plain = weight.shape[:1] == (height,) and _trimmed(weight.shape[1:]) == inner
    is_other = len(weight.shape) == 2 and len(inner) == 1 and weight.shape == (inner[0], height)
    if pair.module in one.embeddings:
        if is_other:
            return True
    elif is_other and aim.part.is_transposed(weight.name, one.adapter.config.get("fan_in_fan_out") is True, is_plain):
        return True
    elif is_plain:
        return False
    shapes = f"{spell_shape(pair.up.shape)} and {spell_shape(pair.down.shape)}"
    problem = f"holds {shapes} for {weight.name!r}, which is {spell_shape(weight.shape)} in the base"
    raise BadRequest(one.where, problem, _OTHER_BASE)


def _bias_product(one: Weighted, aim: _Aim) -> Product:
    bias, base = one.biases[aim.pair.module], aim.part.tensors.get(aim.own + _BIAS)
    if base is None:
        raise BadRequest(one.where, f"has a bias for {aim.own!r}, which has none in the base", _OTHER_BASE)
    if base.shape != bias.shape:
        problem = f"holds {bias.name!r} of {spell_shape(bias.shape)}, and the base has {spell_shape(base.shape)}"
        raise BadRequest(one.where, problem, _OTHER_BASE)
    _check_dtype(base)
    _check_dtype(bias)
    return bias_of(bias, aim.scale)


def _trimmed(shape: Iterable[int]) -> tuple[int, ...]:
    """Give a shape without the ones at its end, as a convolution of one pixel has two of."""
    sides = list(shape)
    while len(sides) > 1 and sides[-1] == 1:
        sides.pop()
    return tuple(sides)

"""LoRA adapters: what their tensors are, by names, dtypes, shapes and what is noted of them; no weight is read.

Of a module with the weight W an adapter holds two small matrices, and W + alpha/r * up @ down is meant; r is the rank.
Who trained it has its own names for them::

    base_model.model.<path>.lora_A.weight    peft: PEFT's own, with alphas in an adapter_config.json beside
    unet.<path>.lora_A.weight                diffusers: after the part of a pipeline; alphas in the header, or none
    lora_unet_<path_with_underscores>.lora_down.weight, .alpha    kohya: of sd-scripts, for A1111, Forge, ComfyUI
    diffusion_model.<path>.lora_A.weight     comfyui: by the names of the trainer of the model

See ``peft/utils/save_and_load.py``, ``diffusers/loaders/lora_base.py``, ``networks/lora.py`` of kohya-ss/sd-scripts and
``comfy/lora.py``.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from converter.errors import BadFile, HostileFile, Unsupported, WconvError, name_some, spell_shape
from converter.formats.texts import check_depth, parse_json
from converter.models.checkpoint import Checkpoint
from converter.models.component import Component
from converter.models.configs import read_json
from converter.models.names import STEMS
from converter.tensors.base import Tensor
from converter.tensors.reader import RangeReader

Form = Literal["peft", "diffusers", "kohya", "comfyui"]
"""Whose names an adapter has."""

ADAPTER_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."
METADATA_KEY = "lora_adapter_metadata"
"""Under which Diffusers keeps the config of each part in a safetensors header (``loaders/lora_base.py``)."""

ORIGINAL_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
ENCODERS_OF_COMFY = "text_encoders."
_MAX_NAMED = 3

# How the halves of a pair end: PEFT's, with the name of an adapter where its state dict was saved as it is; kohya's;
# those of Diffusers before 0.22 (``utils/state_dict_utils.py``).
_HALF = re.compile(
    r"(?P<module>.+)\.(?:"
    r"lora_(?P<letter>[AB])(?:\.(?P<adapter>[^.]+))?"
    r"|lora_(?P<kohya>down|up)"
    r"|lora(?:_linear_layer)?\.(?P<older>down|up)"
    r"|(?P<processor>to_q|to_k|to_v|to_out)_lora\.(?P<oldest>down|up)"
    r")\.weight"
)
_ALPHA = ".alpha"
# Of the older names: what the module is called that an attention processor had, in a UNet and in a text encoder.
_PROCESSED = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
# What is no plain LoRA, by what is in the names of its tensors: LyCORIS and sd-scripts, PEFT's other methods.
_KINDS = {
    re.compile(r"\.dora_scale$|lora_magnitude_vector"): "DoRA",
    re.compile(r"\.processor\.\w+_lora\d?\.(down|up)\.weight$"): "LoRA of XLabs",
    re.compile(r"\.lora_mid\.weight$"): "LoCon with a middle (Tucker)",
    re.compile(r"\.hada_[wt]\d"): "LoHa",
    re.compile(r"\.lokr_[wt]\d"): "LoKr",
    re.compile(r"\.(oft_|boft_)"): "OFT",
    re.compile(r"\.ia3_|\.on_input$"): "IA3",
    re.compile(r"\.vera_lambda_"): "VeRA",
    re.compile(r"\.(a|b)[12]\.weight$"): "GLoRA",
    re.compile(r"\.diff(_b)?$|\.set_weight$"): "whole differences of weights",
    re.compile(r"\.lora_embedding_[AB]"): "LoRA of an embedding",
    re.compile(r"\.lora_[AB](\.[^.]+)?\.bias$"): "LoRA with a bias",
    re.compile(r"\.modules_to_save\."): "whole modules (modules_to_save)",
}
# What is in the names of all of these, and of few others.
_MARK = re.compile(r"lora_|_lora\d\.|\.lora\.|_lora\.|dora_scale|hada_|lokr_|oft_|ia3_")
# Names of GLoRA and of differences may be any model's; they tell nothing without a name that only adapters have.
_TELLING = (
    "DoRA",
    "LoCon with a middle (Tucker)",
    "LoHa",
    "LoKr",
    "OFT",
    "IA3",
    "VeRA",
    "LoRA of an embedding",
    "LoRA of XLabs",
)

# Of PEFT's LoraConfig: what says nothing of how W changes once it is trained, or is read here.
_NEUTRAL = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha", "alpha_pattern", "lora_dropout",
    "lora_ga_config", "loftq_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "fan_in_fan_out", "bias",
    "init_lora_weights", "use_rslora", "use_dora", "peft_config_version",
})  # fmt: skip
# What PEFT begins training with; others change the weights of the base model too (``update_layer`` in
# ``tuners/lora/layer.py``).
_PLAIN_BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")
_MAX_RANK = 1 << 20
# struct's letters for the dtypes that an alpha may have; BF16 is the upper half of a float.
ALPHA_LETTERS = {
    "F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U8": "<B", "BF16": "<f"
}  # fmt: skip
MAX_ALPHA_AXES = 4


class Pair(NamedTuple):
    """The two matrices of a module: ``down`` [r, in, ...] and ``up`` [out, r, ...]; a convolution's have four axes.

    ``module`` is its path with what stands before it in the adapter, ``unet.conv_in`` or ``lora_unet_conv_in``; that of
    PEFT is without ``base_model.model.``. ``alpha`` is the tensor that holds it, where one does.
    """

    module: str
    down: Tensor
    up: Tensor
    alpha: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter: its form, its pairs, and what is said of them.

    ``config`` is PEFT's, or what the header notes of the parts of Diffusers' (keys after the part: ``unet.r``).
    ``extras`` are what is no plain LoRA, by kind, each with the names of its tensors; ``others`` what is not known at
    all. ``problems`` are why it is not to be converted or merged; there are none of a plain LoRA.
    """

    checkpoint: Checkpoint
    form: Form
    pairs: tuple[Pair, ...]
    config: Mapping[str, Any]
    extras: Mapping[str, tuple[str, ...]]
    others: tuple[str, ...]
    problems: tuple[WconvError, ...]

    def check(self) -> None:
        """Raise the first problem, if there is one."""
        for problem in self.problems:
            raise problem

    @property
    def ranks(self) -> dict[int, int]:
        """How many pairs have which rank, the most common first."""
        return dict(Counter(pair.rank for pair in self.pairs if pair.down.shape).most_common())

    @property
    def sound(self) -> Adapter:
        """What of it is plain LoRA, whatever is wrong with the rest."""
        pairs = tuple(pair for pair in self.pairs if _misfit_of_pair(self, pair) is None)
        return replace(self, pairs=pairs, problems=())

    @property
    def where(self) -> Any:
        """The file to name in a message."""
        return self.checkpoint.weight_set.path


def open_adapter_config(component: Component) -> dict[str, Any]:
    """Give PEFT's config beside an adapter; an empty one where there is none. Raises BadFile for what is no JSON."""
    return read_json(component.path / ADAPTER_CONFIG)


def may_be_adapter(checkpoint: Checkpoint) -> bool:
    """Say whether a set may be an adapter, by its name and those of its tensors, before a config is looked for."""
    return _is_named_by_peft(checkpoint) or any(_MARK.search(tensor.name) for tensor in checkpoint.tensors)


def _is_named_by_peft(checkpoint: Checkpoint) -> bool:
    return checkpoint.name.stem == STEMS["peft"]["safetensors"]


def find_adapter(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Adapter | None:
    """Give what a set holds as an adapter, or None where no name in it is one's.

    ``config`` is the adapter_config.json beside it, or empty.
    """
    if not may_be_adapter(checkpoint):
        return None
    is_peft = "peft_type" in config and _is_named_by_peft(checkpoint)
    sorted_out = _sort_out(checkpoint.tensors)
    is_told = any(kind in sorted_out.extras for kind in _TELLING) or is_peft
    if not sorted_out.halves and not is_told:
        return None
    pairs = tuple(
        Pair(module, halves["down"], halves["up"], sorted_out.alphas.get(module))
        for module, halves in sorted_out.halves.items()
        if len(halves) == 2
    )
    form = sorted_out.forms.most_common(1)[0][0] if sorted_out.forms else _form_of_others(checkpoint, config)
    noted, error = _noted(checkpoint) if form == "diffusers" else ({}, None)
    said = config if form == "peft" else noted
    adapter = Adapter(checkpoint, form, pairs, said, sorted_out.extras, sorted_out.others, ())
    problems = (*([error] if error else ()), *_find_problems(adapter, sorted_out))
    if form == "diffusers" and is_peft:
        problem = f"has names without {PEFT_PREFIX!r}, by which PEFT loads none of them"
        problems = (*problems, BadFile(checkpoint.weight_set.path, problem, f"--add-prefix {PEFT_PREFIX} puts it on."))
    return replace(adapter, problems=tuple(problems))


class _Sorted(NamedTuple):
    """Tensors by what they are: ``halves`` by module, then ``down`` or ``up``; names that come ``twice``."""

    halves: dict[str, dict[str, Tensor]]
    alphas: dict[str, Tensor]
    extras: dict[str, tuple[str, ...]]
    others: tuple[str, ...]
    forms: Counter[Form]
    adapters: set[str]
    twice: list[str]


def _sort_out(tensors: Iterable[Tensor]) -> _Sorted:
    halves: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, Tensor] = {}
    extras: dict[str, list[str]] = {}
    others: list[str] = []
    twice: list[str] = []
    forms: Counter[Form] = Counter()
    adapters: set[str] = set()
    for tensor in tensors:
        name = tensor.name
        match = _HALF.fullmatch(name) if "lora" in name else None
        if match:
            form, module = _spelled(match)
            forms[form] += 1
            adapters |= {match["adapter"]} - {None}
            half = (
                {"A": "down", "B": "up"}.get(match["letter"] or "")
                or match["kohya"]
                or match["older"]
                or match["oldest"]
            )
            mine = halves.setdefault(module, {})
            if half in mine:
                twice.append(name)
            mine[half] = tensor
        elif name.endswith(_ALPHA):
            alphas[name.removesuffix(_ALPHA).removeprefix(PEFT_PREFIX)] = tensor
        else:
            kind = next((kind for pattern, kind in _KINDS.items() if pattern.search(name)), "")
            (extras.setdefault(kind, []) if kind else others).append(name)
    if not extras:  # LoHa and LoKr have alphas too
        others += [tensor.name for module, tensor in alphas.items() if module not in halves]
    known = {kind: tuple(names) for kind, names in extras.items()}
    return _Sorted(halves, alphas, known, tuple(others), forms, adapters, twice)


def _spelled(match: re.Match[str]) -> tuple[Form, str]:
    """Say whose name the half of a pair has, and give its module's path as the newest of that form have it."""
    module = match["module"]
    if module.startswith(PEFT_PREFIX):
        return "peft", module.removeprefix(PEFT_PREFIX)
    if match["processor"]:
        is_text = module.endswith(".self_attn")
        last = match["processor"]
        spelled = _PROCESSED[last] if is_text else {"to_out": "to_out.0"}.get(last, last)
        module = f"{module.removesuffix('.processor')}.{spelled}"
    if match["older"] and module.endswith(".processor"):
        module = module.removesuffix(".processor")
    if "." not in module and match["kohya"]:
        return "kohya", module
    if module.startswith((*ORIGINAL_PREFIXES, ENCODERS_OF_COMFY)):
        return "comfyui", module
    return "diffusers", module


def _form_of_others(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Form:
    if "peft_type" in config:
        return "peft"
    return (
        "kohya" if any(tensor.name.startswith(("lora_", "lycoris_")) for tensor in checkpoint.tensors) else "diffusers"
    )


def _noted(checkpoint: Checkpoint) -> tuple[dict[str, Any], WconvError | None]:
    """Give what a header notes of an adapter of Diffusers, and what is wrong with it."""
    raw = checkpoint.metadata.get(METADATA_KEY)
    if raw is None:
        return {}, None
    where = checkpoint.weight_set.path
    try:
        noted = parse_json(raw.encode(errors="replace"), where, f"{METADATA_KEY} in its header ")
        check_depth(noted)
    except WconvError as error:
        return {}, error
    except ValueError as error:
        return {}, BadFile(where, f"notes a {METADATA_KEY} that is not JSON ({error})", "Fetch it again.")
    if not isinstance(noted, dict):
        return {}, BadFile(where, f"notes a {METADATA_KEY} that is no JSON object", "Fetch it again.")
    return noted, None


def _find_problems(adapter: Adapter, sorted_out: _Sorted) -> Iterator[WconvError]:
    """List why an adapter is no plain LoRA, or a damaged one."""
    where = adapter.where
    advice = "wconv knows plain LoRA only."
    for kind, names in adapter.extras.items():
        named = name_some(list(map(repr, names)), _MAX_NAMED)
        yield Unsupported(where, f"is no plain LoRA: it holds {named} ({kind})", advice)
    yield from _misfits_of_config(adapter)
    if len(sorted_out.forms) > 1:
        forms = " and ".join(sorted(sorted_out.forms))
        yield Unsupported(where, f"has names of two forms of adapters, {forms}", "Keep the tensors of one.")
    if len(sorted_out.adapters) > 1:
        several = name_some(sorted(map(repr, sorted_out.adapters)), _MAX_NAMED)
        yield Unsupported(where, f"holds several adapters: {several}", "Save each by itself.")
    for again in sorted_out.twice[:1]:
        yield BadFile(where, f"holds half of a pair twice: {again!r} is another name for one of them", "Keep one.")
    halves = [found for found in sorted_out.halves.values() if len(found) == 1]
    for found in halves[:1]:
        [(half, tensor)] = found.items()
        lacks = "up" if half == "down" else "down"
        more = f", nor are {len(halves) - 1:,} others" if len(halves) > 1 else ""
        yield BadFile(where, f"holds {tensor.name!r}, whose other half ({lacks}) is not there{more}", "Fetch it again.")
    if adapter.others:
        named = name_some(list(map(repr, adapter.others)), _MAX_NAMED)
        yield Unsupported(where, f"holds what is no part of an adapter: {named}", "Take it out before.")
    yield from (problem for pair in adapter.pairs if (problem := _misfit_of_pair(adapter, pair)))


def _misfit_of_pair(adapter: Adapter, pair: Pair) -> WconvError | None:
    where, down, up = adapter.where, pair.down, pair.up
    for tensor in (down, up):
        if not tensor.dtype.is_floating or tensor.dtype.bits < 16:
            problem = f"holds {tensor.name!r} in {tensor.dtype.short_name}, which is no dtype of an adapter"
            return Unsupported(where, problem, "Recast it before: 'wconv recast --dtype bf16'.")
    shapes = f"{spell_shape(down.shape)} and {spell_shape(up.shape)}"
    fits = len(down.shape) == len(up.shape) >= 2 and down.shape[0] == up.shape[1] and set(up.shape[2:]) <= {1}
    if not fits or 0 in down.shape or 0 in up.shape:
        return BadFile(where, f"holds a pair whose halves do not fit: {down.name!r} and its other are {shapes}")
    if down.shape[0] > _MAX_RANK:
        return HostileFile(where, f"holds {down.name!r} of a rank of {down.shape[0]:,}, which no adapter has")
    alpha = pair.alpha
    is_number = alpha is None or (alpha.numel == 1 and len(alpha.shape) <= MAX_ALPHA_AXES)
    if alpha is not None and not (is_number and alpha.dtype.tag in ALPHA_LETTERS):
        shown = f"{alpha.dtype.short_name} of {spell_shape(alpha.shape)}"
        return BadFile(where, f"holds {alpha.name!r}, which is no single number: it is {shown}")
    return None


def _misfits_of_config(adapter: Adapter) -> Iterator[WconvError]:
    """List what a config says that makes of it another method than plain LoRA, or what no config says."""
    is_peft = adapter.form == "peft"
    if is_peft and not adapter.config:
        problem = f"has the names of PEFT, and no {ADAPTER_CONFIG} beside it, which says the scale"
        yield BadFile(adapter.where, problem, "Fetch it too.")
        return
    where = adapter.checkpoint.weight_set.folder / ADAPTER_CONFIG if is_peft else adapter.where
    method = adapter.config.get("peft_type", "LORA") if is_peft else "LORA"
    if method != "LORA":
        yield Unsupported(where, f"is of another method of PEFT than LoRA: {str(method)[:60]!r}", "")
        return
    for prefix in _parts_noted(adapter):
        said = adapter.config if is_peft else _under(adapter.config, prefix)
        for key, value in said.items():
            if _changes_meaning(key, value):
                told = f"{str(key)[:60]} = {str(value)[:60]}"
                yield Unsupported(where, f"is no plain LoRA: its config says {told}", "wconv knows plain LoRA only.")
        yield from _wrong_numbers(where, said)


def _parts_noted(adapter: Adapter) -> list[str]:
    if adapter.form == "peft":
        return [""]
    return list(dict.fromkeys(str(key).partition(".")[0] for key in adapter.config if "." in key)) or [""]


def _under(config: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Give what a header of Diffusers notes of one part."""
    if not prefix:
        return dict(config)
    return {key.removeprefix(f"{prefix}."): value for key, value in config.items() if key.startswith(f"{prefix}.")}


def _changes_meaning(key: str, value: Any) -> bool:
    """Say whether what a LoraConfig says makes of it another method; what is unknown does where it says anything."""
    if key == "bias":
        return value not in ("none", None)
    if key == "init_lora_weights":
        return not any(value is one or (isinstance(one, str) and value == one) for one in _PLAIN_BEGINNINGS)
    if key in ("use_rslora", "use_dora") or key not in _NEUTRAL:
        return bool(value)
    return False


def _wrong_numbers(where: Any, said: Mapping[str, Any]) -> Iterator[WconvError]:
    """List what should be a rank or an alpha and is none."""
    for key, pattern, check in (("r", "rank_pattern", _is_rank), ("lora_alpha", "alpha_pattern", _is_alpha)):
        patterns = said.get(pattern) or {}
        if key in said and not check(said[key]):
            yield BadFile(where, f"says {key} = {str(said[key])[:60]}, which is none")
        if not isinstance(patterns, dict):
            yield BadFile(where, f"says {pattern} = {str(patterns)[:60]}, which is no JSON object")
            continue
        for module, value in patterns.items():
            if not check(value):
                yield BadFile(where, f"says {pattern} = {str(value)[:60]} of {module[:200]!r}, which is none")
                break
            if not re.fullmatch(r"\^?[\w.\-]+", module.replace("\\.", ".")):
                advice = "wconv reads such a pattern only where it is the path of a module."
                yield Unsupported(where, f"says {pattern} of a regular expression, {module[:200]!r}", advice)
                break


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= _MAX_RANK


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # and no NaN


def read_alphas(adapter: Adapter) -> dict[str, float]:
    """Give the alpha of each pair, by module: its scale is alpha / rank. Reads the few bytes of those that are tensors.

    A pair without any has its rank. Raises BadFile for one that is no finite number, or where a config says another
    rank than a pair has, or numbers that are none; Unsupported for a tensor of 0.
    """
    held = [pair for pair in adapter.pairs if pair.alpha is not None]
    alphas = _read_tensors(adapter, held)
    find = _finder(adapter)
    for pair in adapter.pairs:
        if pair.module not in alphas:
            alphas[pair.module] = find(pair)
    return alphas


def _read_tensors(adapter: Adapter, held: Iterable[Pair]) -> dict[str, float]:
    alphas: dict[str, float] = {}
    tensors = [(pair.module, pair.alpha) for pair in held if pair.alpha is not None]
    with RangeReader() as reader:
        reader.expect(part for _, one in tensors for part in one.source.extents(0, one.nbytes))
        for module, tensor in tensors:
            raw = bytearray(tensor.nbytes)
            tensor.source.read(0, memoryview(raw), reader)
            content = b"\0\0" + raw if tensor.dtype.tag == "BF16" else raw
            [alpha] = struct.unpack(ALPHA_LETTERS[tensor.dtype.tag], content)
            if not _is_alpha(alpha):
                raise BadFile(adapter.where, f"holds {tensor.name!r}, which is no alpha: {alpha}", "Fetch it again.")
            if not alpha:
                # ``LoRAModule`` in ``networks/lora.py`` of sd-scripts takes the rank, ``comfy/lora.py`` nothing.
                problem = f"holds {tensor.name!r} of 0, which some programs take for the rank, and others for no effect"
                raise Unsupported(adapter.where, problem, "Take the tensor out, which means the rank, or the pair.")
            alphas[module] = float(alpha)
    return alphas


def _finder(adapter: Adapter) -> Callable[[Pair], float]:
    """Give what says the alpha of a pair by the config of its adapter, as PEFT's ``update_layer`` has it.

    A pattern is the whole path of a module, or the end of one, and a dot in it any character, if no ``\\`` is before
    it; the first that fits speaks (``get_pattern_key`` in ``peft/utils/other.py``).
    """
    prefixes = _parts_noted(adapter)
    parts = {
        prefix: adapter.config if adapter.form == "peft" else _under(adapter.config, prefix) for prefix in prefixes
    }
    for said in parts.values():
        for error in _wrong_numbers(adapter.where, said):
            raise error
    looks = {
        prefix: (_by_path(said.get("rank_pattern") or {}), _by_path(said.get("alpha_pattern") or {}))
        for prefix, said in parts.items()
    }

    def find(pair: Pair) -> float:
        prefix = next((one for one in prefixes if one and pair.module.startswith(f"{one}.")), "")
        said = parts.get(prefix, {})
        if not said:
            return float(pair.rank)
        path = pair.module.removeprefix(f"{prefix}.")
        ranks, alphas = looks[prefix]
        rank = ranks(path, said.get("r", 8))
        if rank != pair.rank:
            problem = f"holds {pair.down.name!r} of the rank {pair.rank}, and its config says {rank}"
            raise BadFile(adapter.where, problem, "Fetch both again.")
        return float(alphas(path, said.get("lora_alpha", 8)))

    return find


def _by_path(patterns: Mapping[str, Any]) -> Callable[[str, Any], Any]:
    """Give what looks a module's path up among patterns, each of which is a path, whole (``^``) or its end.

    They are found by their letters and digits alone, and then held against the path.
    """
    places: dict[str, list[tuple[int, str, Any]]] = {}
    for place, (pattern, value) in enumerate(patterns.items()):
        places.setdefault(_plain(pattern.removeprefix("^")), []).append((place, pattern, value))

    def look(path: str, default: Any) -> Any:
        words = path.split(".")
        found = [
            (place, value)
            for end in (".".join(words[at:]) for at in range(len(words)))
            for place, pattern, value in places.get(_plain(end), ())
            if re.fullmatch(pattern.removeprefix("^"), end) and (end == path or not pattern.startswith("^"))
        ]
        return min(found, key=lambda one: one[0])[1] if found else default

    return look


def _plain(path: str) -> str:
    """Give the letters and digits of a path, or of a pattern of one."""
    return re.sub(r"[\W_]", "", path)

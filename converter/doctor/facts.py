"""What is asked of a folder and its parts: each fact has one function here, for what is found and for its repair.

A fact is a plain value, and says nothing of whether it is bad: ``checks.py`` words findings, ``rules.py`` mends.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from converter.dtypes import BY_TORCH_NAME, RECAST_SOURCES, DType
from converter.errors import Unreachable, Unsupported, WconvError
from converter.libraries import library_at
from converter.models.checkpoint import open_checkpoint
from converter.models.component import (
    QUANTIZER_CONFIGS,
    has_quantization,
    quantization_of,
)
from converter.models.headers import LENIENT
from converter.models.inventory import Inventory, Part
from converter.models.names import WeightsName
from converter.models.schemes import (
    COMFY,
    EXPONENTS,
    LLM_INT8,
    METHODS,
    Quantized,
    find_belongings,
    find_owners,
    find_quantized,
    holds_codes,
    names_other,
    weight_of,
)
from converter.models.sets import ListedSet
from converter.tensors.base import find_ties
from converter.transforms.dtype import find_kept, stays_wider
from converter.transforms.quantize import find_unasked

# What no float model calls a parameter of its own.
_NOTHING_ELSE = ("_scale_inv", ".SCB", ".absmax", ".qzeros", ".g_idx")
# Scales whose names do not say so; never bytes, which are codes there.
_FLOAT_SCALES = frozenset({"SCB", "absmax", "nested_absmax"})
# The dtypes that libraries write scales in, by what ends their names; all others are written in the model's own.
_WRITTEN = (
    ("_scale_inv", {"F32", "BF16"} | EXPONENTS),
    (".SCB", {"F32"}),
    (".nested_absmax", {"F32"}),
    (".absmax", {"F32", "U8"}),
    (".quant_map", {"F32"}),
    (".nested_quant_map", {"F32"}),
    (".weight_scale_2", {"F32"}),
    (".weight_global_scale", {"F32"}),
    ("_scales", {"F16", "BF16", "F32"} | EXPONENTS),
)

# Of names.


def right_name(part: Part, name: WeightsName) -> WeightsName:
    """Give the name under which the part's own library looks for such weights; the same where that is not known."""
    if not part.component.config or name.tail is None or name.ext not in ("safetensors", "bin"):
        return name
    right = library_at(part).stem(name.format)
    tag = "_".join(filter(None, (name.tail.replace(".", "_"), name.variant))) or None
    if part.is_flat and not any(listed.name.variant is None for listed in part.sets):
        tag = None
    return WeightsName(right, tag, name.ext)


def is_foreign(listed: ListedSet) -> bool:
    """Say whether an index names files of another variant or form than its own."""
    return listed.index_name is not None and listed.own_names != listed.file_names


# Of tensors.


def held_names(part: Part, listed: ListedSet) -> dict[str, str]:
    """Map the tensors that the files of a set hold to their file."""
    return {name: header.name for header in part.headers_of(listed) for name in header.names}


def repeated_name(part: Part, listed: ListedSet) -> str | None:
    """Give the name of a tensor that two files of a set hold, if there is one."""
    if len(listed.file_names) < 2:
        return None
    counts = Counter(name for header in part.headers_of(listed) for name in header.names)
    return next((name for name, count in counts.items() if count > 1), None)


def index_faults(part: Part, listed: ListedSet) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the content of an index whose files are sound: a code, and the words for it."""
    assert listed.index is not None
    held = held_names(part, listed)
    weight_map = listed.index.weight_map
    ghosts = [name for name in weight_map if name not in held]
    orphans = [name for name in held if name not in weight_map]
    wrong = [name for name in weight_map if name in held and weight_map[name] != held[name]]
    if ghosts:
        yield "index-ghost", f"lists {len(ghosts):,} tensors that no shard holds, such as {ghosts[0]}"
    if orphans:
        yield "index-orphan", f"does not list {len(orphans):,} tensors that its shards hold, such as {orphans[0]}"
    if wrong:
        yield "index-misplaced", f"names the wrong shard for {len(wrong):,} tensors, such as {wrong[0]}"
    if not listed.index.has_metadata:
        yield "index-metadata", "has no metadata"
    size = listed.index.metadata.get("total_size")
    headers = part.headers_of(listed)
    nbytes = sum(header.tensor_nbytes for header in headers)
    if size is not None and size not in (nbytes, sum(header.storage_nbytes for header in headers)):
        yield "index-size", f"gives a total_size of {size!r:.30}, its tensors take {nbytes} bytes"


def dtypes_in(part: Part, listed: ListedSet) -> dict[str, DType]:
    """Map the tensors of a set to their dtypes."""
    pairs = (zip(header.names, header.dtypes, strict=True) for header in part.headers_of(listed))
    return dict(chain.from_iterable(pairs))


def quantized_in(part: Part, listed: ListedSet) -> list[Quantized]:
    """List the weights of a set that other tensors scale."""
    return find_quantized(dtypes_in(part, listed))


def dtype_shares(part: Part, listed: ListedSet, dtype: DType | None = None) -> Counter[DType]:
    """Count the floating tensors of a set by dtype, those left out that a cast to ``dtype`` leaves in a wider one."""
    keep = find_kept(part.component, dtype)
    counts: Counter[DType] = Counter()
    for header in part.headers_of(listed):
        for name, held, dims in zip(header.names, header.dtypes, header.dims, strict=True):
            stays = (held.tag == "F32" and keep(name)) or (dtype is not None and stays_wider(held, dims, dtype))
            if held.tag in RECAST_SOURCES and not stays:
                counts[held] += 1
    return counts


def is_kept_mixture(part: Part, listed: ListedSet) -> bool:
    """Say whether a set is of several dtypes just as a cast would leave it."""
    narrow = [dtype for dtype in dtype_shares(part, listed) if dtype.bits <= 16]
    return any(len(dtype_shares(part, listed, dtype)) == 1 for dtype in narrow)


def belies_tag(part: Part, listed: ListedSet) -> DType | None:
    """Give the dtype that most tensors of a set have, where that is not the one its tag names."""
    dtype = listed.name.tagged_dtype
    if dtype is None or not part.is_sound(listed) or quantized_in(part, listed):
        return None
    counts = dtype_shares(part, listed, dtype).most_common(1)
    return counts[0][0] if counts and counts[0][0] is not dtype else None


def config_dtype(part: Part) -> tuple[DType, DType] | None:
    """Give the dtype that the config names, and the only one that weights have, where these are not the same."""
    named = part.component.config.get("dtype") or part.component.config.get("torch_dtype")
    dtype = BY_TORCH_NAME.get(named) if isinstance(named, str) else None
    sets = part.sound_sets
    if not library_at(part).reads_dtype or dtype is None or says_quantized(part):
        return None
    if not sets or any(listed.name.variant or quantized_in(part, listed) for listed in sets):
        return None
    counts = sum((dtype_shares(part, listed) for listed in sets), Counter())
    if len(counts) != 1 or dtype in counts:
        return None
    (held,) = counts
    return (dtype, held) if held.bits > 8 else None  # no model runs in 8 bits: a config names what they become


def lacks_format(part: Part, listed: ListedSet) -> list[str]:
    """List the files of a set, of those that a model's library loads, whose headers have no format."""
    headers = part.headers_of(listed) if part.component.config and listed.name.tail is not None else []
    return [header.name for header in headers if header.format == "safetensors" and "format" not in header.metadata]


# Of quantized weights.


def says_quantized(part: Part) -> bool:
    """Say whether the config of a part says that its weights are quantized, or a file beside it that is for that."""
    return has_quantization(part.component.config) or any(name in part.files for name in QUANTIZER_CONFIGS)


def _names_unknown(part: Part) -> bool:
    """Say whether the config of a part names a scheme that is none of those known by their weights."""
    method = quantization_of(part.component.config).get("quant_method")
    return isinstance(method, str) and method not in METHODS


class Alone(NamedTuple):
    """What of a set does not go together: codes without scales, scales without weights, scales of plain weights."""

    codes: list[str]
    scales: list[str]
    unused: list[str]


def find_alone(part: Part, dtypes: Mapping[str, DType], found: Sequence[Quantized]) -> Alone:
    """List what of a set, in which some weights were found, does not go together.

    Float models may have parameters with the names of scales, but for a few that nothing else is called; and ComfyUI
    reads plain float8 as well. What a config calls otherwise than the schemes that are known may have them elsewhere.
    """
    is_quantized = bool(found) or (says_quantized(part) and not _names_unknown(part))
    has_codes = is_quantized and not any(one.scheme in COMFY for one in found)
    known = find_belongings(found, dtypes)
    rest = [name for name in dtypes if name not in known]
    named = ((name, weight_of(name, dtypes[name])) for name in rest)
    alone = [(name, weight) for name, weight in named if weight and (is_quantized or name.endswith(_NOTHING_ELSE))]
    return Alone(
        [name for name in rest if has_codes and holds_codes(name, dtypes[name])],
        [name for name, weight in alone if weight == name or weight not in dtypes],
        [name for name, weight in alone if weight != name and weight in dtypes],
    )


def misfit(part: Part, listed: ListedSet) -> str:
    """Say what of the quantized weights of a set does not fit, as dequantizing it would; empty where all does.

    Reads the few bytes that say how they are to be read.
    """
    try:
        # The files alone: what their index lacks is another finding, and so is what is missing by their names.
        checkpoint = open_checkpoint(listed.without_index, LENIENT)
    except Unreachable:
        raise
    except WconvError:
        return ""
    try:
        find_unasked(part.component, checkpoint)
    except Unreachable:
        raise
    except Unsupported:  # which is said of what is quantized
        return ""
    except WconvError as error:
        return error.problem
    return ""


def find_scales(dtypes: Mapping[str, DType]) -> dict[str, bool]:
    """Name the tensors beside quantized weights, and say which are scales: floats, and bytes that are exponents."""
    owners = find_owners(find_quantized(dtypes), dtypes)

    def is_scale(name: str) -> bool:
        dtype, leaf = dtypes[name], name.rpartition(".")[2]
        return (dtype.is_floating and leaf in _FLOAT_SCALES) or (
            "scale" in leaf and (dtype.is_floating or dtype.tag == "U8")
        )

    return {name: is_scale(name) for name in owners}


def cast_scales(dtypes: Mapping[str, DType], found: Sequence[Quantized]) -> list[str]:
    """List the scales of weights that are of a dtype that no library writes them in: something has cast them."""
    owners = find_owners(found, dtypes)
    written = ((name, next((tags for end, tags in _WRITTEN if name.endswith(end)), None)) for name in owners)
    return [name for name, tags in written if tags and dtypes[name].tag not in tags]


def other_method(part: Part, found: Sequence[Quantized]) -> tuple[str, str] | None:
    """Give the scheme that the config names and those that some weights are in, where these are not the same."""
    said = quantization_of(part.component.config)
    method = said.get("quant_method")
    schemes = {one.scheme for one in found}
    if not isinstance(method, str) or not schemes:
        return None
    held = " and ".join(sorted({scheme.label for scheme in schemes}))
    if method in METHODS and names_other(method, schemes):
        return method[:60], held
    bits = "8" if LLM_INT8 in schemes else "4"
    is_other = method == "bitsandbytes" and len(schemes) == 1 and said.get(f"load_in_{bits}bit") is False
    return (f"{method} without load_in_{bits}bit", held) if is_other else None


def promised_method(part: Part) -> str:
    """Give the scheme in which the config of a part says that weights are, if it is one that would be known by them."""
    said = quantization_of(part.component.config)
    method, groups = said.get("quant_method"), said.get("config_groups")
    is_known = isinstance(method, str) and method in METHODS
    has_weights = not isinstance(groups, dict) or any(
        isinstance(one, dict) and one.get("weights") for one in groups.values()
    )
    return str(method) if is_known and has_weights and said.get("format") != "dense" else ""


# Of sets beside each other.


def lacks(inventory: Inventory, variant: str | None) -> list[Part]:
    """List the parts that have weights, and none of this variant."""
    parts = [(part, {one.name.variant for one in part.sets if one.file_names}) for part in inventory.loaded_parts]
    return [part for part, held in parts if held and variant not in held]


def lacks_safetensors(forms: Mapping[str, Sequence[WeightsName]], variant: str | None) -> list[str]:
    """List the parts, given the names of the sets of each, that for a variant are .bin while others are safetensors.

    A part without that variant counts with its untagged set (``is_safetensors_compatible``).
    """
    formats = {}
    for part, names in forms.items():
        meant = [name for name in names if name.variant == variant] or [n for n in names if n.variant is None]
        formats[part] = {name.format for name in meant}
    without = [part for part, held in formats.items() if held == {"torch"}]
    return without if any("safetensors" in held for held in formats.values()) else []


def forms_of(part: Part) -> Iterator[tuple[ListedSet, ListedSet]]:
    """Yield pairs of sound sets of one variant, the first as .bin and the second as safetensors."""
    sound: dict[WeightsName, list[ListedSet]] = defaultdict(list)
    for listed in part.sound_sets:
        if not is_foreign(listed):
            sound[listed.name].append(listed)
    for name in [name for name in sound if name.format == "torch"]:
        for pickled in sound[name]:
            yield from ((pickled, safe) for safe in sound.get(name.in_format("safetensors"), ()))


def same_tensors(a: ListedSet, b: ListedSet) -> bool | None:
    """Say whether the headers of two sets describe the same tensors; None where one cannot be opened.

    Of tied tensors, one name is enough.
    """
    try:
        opened = [open_checkpoint(listed.without_index, LENIENT) for listed in (a, b)]
    except Unreachable:
        raise
    except WconvError:
        return None
    left, right = ({info.name: (info.dtype, info.shape) for info in one.tensors} for one in opened)
    for mine, checkpoint, other in ((left, opened[0], right), (right, opened[1], left)):
        ties = find_ties(checkpoint.tensors)
        for name in [name for name in mine if name not in other]:
            if ties.get(name) in other or any(ties.get(twin) == name for twin in other):
                del mine[name]
    return left == right

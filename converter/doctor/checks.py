"""The checks: a table of small functions, each of which asks for one fact, and yields what is wrong by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from converter.doctor import facts
from converter.doctor.findings import Finding
from converter.dtypes import BY_ALIAS, DType
from converter.errors import TrainingPiece, name_some
from converter.libraries import library_of
from converter.models import faults
from converter.models.inventory import Inventory, Part
from converter.models.names import WeightsName, spelled_variant
from converter.models.schemes import Quantized, find_quantized
from converter.models.sets import ListedSet
from converter.transforms.names import find_wrappers

_NAMED = 3  # of files, and of what a pickle names

Check = Callable[[Inventory], Iterator[Finding | faults.Fault]]
_PartCheck = Callable[[Part], Iterator[Finding | faults.Fault]]


def run_checks(inventory: Inventory) -> list[Finding]:
    """Give all that the checks find, in their order."""
    found = [finding for check in _FOLDER_CHECKS for finding in check(inventory)]
    found += [finding for part in inventory.parts for check in _PART_CHECKS for finding in check(part)]
    return [Finding(*one) if isinstance(one, faults.Fault) else one for one in found]


# Of the whole folder.


def _unnamed_parts(inventory: Inventory) -> Iterator[Finding]:
    for part in inventory.parts if inventory.is_pipeline else ():
        if not part.is_named:
            yield Finding("component-unnamed", part.path, part.name, "holds weights, and model_index.json names it not")


def _dotless_entries(inventory: Inventory) -> Iterator[Finding]:
    if any(inventory.variants):
        for name in inventory.dotless:
            yield Finding("entry-dotless", inventory.path / name, name.partition("/")[0], "has no dot in its name")


def _partial_variants(inventory: Inventory) -> Iterator[Finding]:
    for variant in inventory.variants if inventory.is_pipeline else ():
        if variant is not None and variant.lower() not in BY_ALIAS:
            continue  # such as non_ema: of one part on purpose
        without = facts.lacks(inventory, variant)
        if without and len(without) < len(inventory.loaded_parts):
            code = "variant-partial" if variant else "default-partial"
            what = spelled_variant(variant)
            names = ", ".join(part.name for part in without)
            yield Finding(code, inventory.path, without[0].name, f"has {what} in some parts only: not in {names}")


def _mixed_forms(inventory: Inventory) -> Iterator[Finding]:
    parts = inventory.loaded_parts if inventory.is_pipeline else []
    forms = {part.name: [listed.name for listed in part.sets if listed.file_names] for part in parts}
    without = {name for variant in inventory.variants for name in facts.lacks_safetensors(forms, variant)}
    if without:
        problem = f"has safetensors in some parts, and the same variant only as .bin in {', '.join(sorted(without))}"
        yield Finding("forms-mixed", inventory.path, min(without), problem)


def _config_dtypes(inventory: Inventory) -> Iterator[Finding]:
    for part in () if inventory.is_pipeline else inventory.parts:
        dtypes = facts.config_dtype(part)
        if dtypes:
            problem = f"names {dtypes[0].torch_name}, and the weights are {dtypes[1].torch_name}"
            yield Finding("config-dtype", part.path / "config.json", part.name, problem)


# Of one part.


def _partial_downloads(part: Part) -> Iterator[Finding]:
    for name in part.partial:
        yield Finding("download-partial", part.path / name, part.name, "was left by a download that did not finish")


def _indexes(part: Part) -> Iterator[Finding | faults.Fault]:
    for listed in part.sets:
        path = listed.path
        if unread := faults.unreadable_index(part, listed):
            yield unread
        elif listed.index_name and not listed.file_names:
            yield Finding("index-dangling", path, part.name, f"names {listed.missing} and no file that is there")
        elif facts.is_foreign(listed):
            names = name_some(listed.file_names, _NAMED)
            yield Finding("index-foreign", path, part.name, f"names files of another variant: {names}")
        elif part.is_sound(listed) and (twice := facts.repeated_name(part, listed)):
            yield Finding("tensor-twice", path, part.name, f"is a set in which two shards hold {twice}")
        elif listed.index_name and part.is_sound(listed):
            for code, problem in facts.index_faults(part, listed):
                yield Finding(code, path, part.name, problem)
        elif not listed.index_name and not listed.missing and listed.is_sharded and not _is_of_pieces(part, listed):
            problem = f"is one of {len(listed.file_names)} shards that have no index"
            yield Finding("index-missing", path, part.name, problem)


def _is_of_pieces(part: Part, listed: ListedSet) -> bool:
    return any(isinstance(header.error, TrainingPiece) for header in part.headers_of(listed))


def _training_checkpoints(part: Part) -> Iterator[Finding]:
    for listed in part.sound_sets:
        if listed.is_of_many:
            count = len(listed.pieces) + 1
            problem = f"is the head of a training checkpoint ({listed.format}, {count:,} file{'s' * (count != 1)})"
            yield Finding("training-checkpoint", listed.path, part.name, problem)


def _twins(part: Part) -> Iterator[Finding]:
    seen: dict[WeightsName, ListedSet] = {}
    for listed in part.sets:
        if listed.is_of_many:  # several steps of a training; no loader looks for any
            continue
        first = seen.setdefault(listed.name, listed) if listed.file_names else listed
        if first is not listed and not listed.is_of_many:
            problem = f"holds {spelled_variant(listed.name.variant)} twice: {first.label} and {listed.label}"
            yield Finding("sets-twice", part.path, part.name, problem)


def _strays(part: Part) -> Iterator[Finding]:
    whole = {listed.name for listed in part.sound_sets}
    for listed in part.strays:
        if not listed.missing or listed.name in whole:
            others = f", nor {len(listed.file_names) - 1} more" if len(listed.file_names) > 1 else ""
            yield Finding("shards-stray", listed.path, part.name, f"is named by no index{others}")


def _single_variants(part: Part) -> Iterator[Finding]:
    default = next(
        (f for f in part.sets if f.file_names and not f.name.variant and f.is_sharded and not facts.is_foreign(f)), None
    )
    for listed in part.sets:
        if default and listed.name.variant and not listed.is_sharded and listed.name.ext == default.name.ext:
            problem = f"is one file, beside the untagged shards of {default.label}"
            yield Finding("variant-single", listed.path, part.name, problem)


def _names(part: Part) -> Iterator[Finding]:
    taken = {listed.name for listed in part.sets}
    for listed in part.sets:
        right = facts.right_name(part, listed.name)
        hub_index = listed.index_name == f"{listed.name.single}.index.json" and listed.name.variant is not None
        if (right != listed.name and right not in taken) or (hub_index and listed.file_names):
            problem = f"is a name that no loader looks for (it should be {right.index if hub_index else right.single})"
            yield Finding("name-unread", listed.path, part.name, problem)
        elif listed.is_legacy and listed.file_names:
            yield Finding("name-legacy", listed.path, part.name, "is spelled as it was in earlier years")


def _sharded_bins(part: Part) -> Iterator[Finding]:
    safe = {listed.name.variant for listed in part.sets if listed.name.format == "safetensors" and listed.file_names}
    for listed in part.sets:
        is_bin = listed.name.format == "torch" and listed.file_names and listed.is_sharded
        reads = library_of(part.component).reads_shards(listed.name.format)
        if is_bin and not reads and listed.name.variant not in safe:
            problem = f"is a set of {len(listed.file_names)} .bin shards, which Diffusers does not load"
            yield Finding("bin-sharded", listed.path, part.name, problem)


def _two_forms(part: Part) -> Iterator[Finding]:
    for pickled, safe in facts.forms_of(part):
        is_same = facts.same_tensors(pickled, safe)
        if is_same is False:
            problem = f"holds other tensors than {safe.label}, and both are {spelled_variant(safe.name.variant)}"
            yield Finding("forms-differ", pickled.path, part.name, problem)
        elif is_same:
            size = sum(header.nbytes for header in part.headers_of(pickled)) / 1e9
            problem = f"holds the same tensors as {safe.label}, in {size:,.2f} GB"
            yield Finding("forms-redundant", pickled.path, part.name, problem)


def _dtypes(part: Part) -> Iterator[Finding]:
    for listed in part.sound_sets:
        belied = facts.belies_tag(part, listed)
        counts = facts.dtype_shares(part, listed, listed.name.tagged_dtype)
        if belied:
            problem = f"is tagged {listed.name.variant}, and most of its tensors are {belied.torch_name}"
            yield Finding("dtype-tag", listed.path, part.name, problem)
        elif len(counts) > 1 and not facts.is_kept_mixture(part, listed) and not facts.quantized_in(part, listed):
            names = ", ".join(f"{count:,} {dtype.torch_name}" for dtype, count in counts.most_common())
            yield Finding("dtype-mixed", listed.path, part.name, f"holds tensors of {names}")


def _quantized(part: Part) -> Iterator[Finding]:
    sets = [(listed, facts.dtypes_in(part, listed)) for listed in part.sound_sets]
    held = [(listed, dtypes, find_quantized(dtypes)) for listed, dtypes in sets]
    for listed, dtypes, found in held:
        if found:
            yield _what_is_quantized(part, listed, found)
        alone = facts.find_alone(part, dtypes, found)
        yield from _alone(part, listed, alone)
        if found and not any(alone) and not facts.repeated_name(part, listed):
            yield from _misfits(part, listed, dtypes, found)
    yield from _config_schemes(part, [(listed, found) for listed, _, found in held])


def _what_is_quantized(part: Part, listed: ListedSet, found: list[Quantized]) -> Finding:
    more = f", and so are {len(found) - 1:,} more" if len(found) > 1 else ""
    code = "quantized-unsaid" if part.component.config and not facts.says_quantized(part) else "quantized"
    problem = f"is quantized ({found[0]}{more})"
    problem += ", and its config.json does not say so" if code == "quantized-unsaid" else ""
    unread = next((one.scheme for one in found if not one.scheme.is_dequantized), None)
    problem += f"; wconv does not dequantize that, {unread.reader} loads it" if unread else ""
    return Finding(code, listed.path, part.name, problem)


def _alone(part: Part, listed: ListedSet, alone: facts.Alone) -> Iterator[Finding]:
    rows = (
        ("scales-missing", "holds quantized weights that have no scales: ", alone.codes),
        ("scales-stray", "holds scales of weights that are not there: ", alone.scales),
        ("scales-unused", "holds scales beside weights that are plain numbers: ", alone.unused),
    )
    for code, what, names in rows:
        if names:
            yield Finding(code, listed.path, part.name, what + name_some(names, _NAMED))


def _misfits(part: Part, listed: ListedSet, dtypes: Mapping[str, DType], found: list[Quantized]) -> Iterator[Finding]:
    if problem := facts.misfit(part, listed):
        yield Finding("scales-misfit", listed.path, part.name, problem)
    elif names := facts.cast_scales(dtypes, found):
        problem = f"holds scales that were cast, to {dtypes[names[0]]}: {name_some(names, _NAMED)}"
        yield Finding("scales-cast", listed.path, part.name, problem)


def _config_schemes(part: Part, held: list[tuple[ListedSet, list[Quantized]]]) -> Iterator[Finding]:
    path = part.path / "config.json"
    for listed, found in held:
        if other := facts.other_method(part, found):
            problem = f"names {other[0]} in its quantization_config, and {listed.label} is {other[1]}"
            yield Finding("config-scheme", path, part.name, problem)
    method = facts.promised_method(part)
    if method and held and not any(found for _, found in held):
        problem = f"has a quantization_config ({method}), and no weights are quantized"
        yield Finding("config-quantized", path, part.name, problem)


def _old_attention(part: Part) -> Iterator[Finding]:
    for listed in part.sound_sets:
        name = library_of(part.component).find_old_name(part.component, facts.held_names(part, listed))
        if name and len(listed.file_names) > 1:
            problem = f"holds tensors with old names, such as {name}, in {len(listed.file_names)} shards"
            yield Finding("old-attention", listed.path, part.name, problem)


def _wrapped(part: Part) -> Iterator[Finding]:
    for listed in part.sound_sets if part.component.class_names else ():
        found = find_wrappers([name for header in part.headers_of(listed) for name in header.names])
        if found:
            yield Finding("names-wrapped", listed.path, part.name, f"has {found} in the names of its tensors")


def _headers(part: Part) -> Iterator[Finding]:
    for listed in part.sets:
        for name in facts.lacks_format(part, listed):
            yield Finding("header-format", part.path / name, part.name, "has no format in its header")


def _pickles(part: Part) -> Iterator[Finding]:
    for header in part.headers.values():
        if header.foreign:
            problem = f"has to do with more than tensors: {name_some(header.foreign, _NAMED)}"
            yield Finding("pickle-code", part.path / header.name, part.name, problem)


_FOLDER_CHECKS: tuple[Check, ...] = (
    faults.unreadable_configs, faults.missing_parts, _unnamed_parts, _dotless_entries, _partial_variants, _mixed_forms,
    _config_dtypes,
)  # fmt: skip
_PART_CHECKS: tuple[_PartCheck, ...] = (
    faults.unreadable_files, _partial_downloads, faults.missing_shards, _indexes, _training_checkpoints, _twins,
    _strays, _single_variants, _names, _sharded_bins, _two_forms, _dtypes, _quantized,
    _old_attention, _wrapped, _headers, _pickles,
)  # fmt: skip

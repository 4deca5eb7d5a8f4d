"""The checks: a table of small functions, each of which looks for one thing in a folder and yields what it finds."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from converter.doctor.findings import Finding
from converter.dtypes import BY_TORCH_NAME, RECAST_SOURCES, DType
from converter.errors import BadFile, BadRequest, TrainingPiece, Unsupported, WconvError
from converter.formats.training import refuse_folder
from converter.libraries import library_at, library_of
from converter.models.checkpoint import Checkpoint, open_checkpoint
from converter.models.component import nested
from converter.models.headers import LENIENT
from converter.models.inventory import Inventory, Part, read_headers, take_inventory
from converter.models.names import WeightsName, is_other_runtime, parse_name
from converter.models.schemes import Quantized, find_quantized
from converter.models.sets import ListedSet
from converter.storage import Place
from converter.tensors.base import find_ties
from converter.transforms.dtype import find_kept, stays_wider

Check = Callable[[Inventory], Iterator[Finding]]
_PartCheck = Callable[[Part], Iterator[Finding]]


def look(given: Place | Path | str) -> Inventory:
    """See what is in a folder. Raises BadRequest for what is no folder, BadFile for one that holds no weights.

    A folder that cannot be read is an error if it is a part of the model.
    """
    inventory = take_inventory(given)
    path = inventory.path
    if inventory.kind == "file":
        raise BadRequest(path, "is a file", "Name its folder; 'wconv inspect' shows a file.")
    for part in inventory.parts:
        if part.error and part.is_named:
            raise part.error
    parts = (part for part in inventory.parts if not part.error and _is_of_model(inventory, part))
    inventory = replace(inventory, parts=tuple(parts))
    if not any(part.has_weights for part in inventory.parts) and not inventory.absent and not inventory.index_error:
        refuse_folder(path)
        raise BadFile(path, "holds no weights", "Name a folder that does.")
    return read_headers(inventory)


def _is_of_model(inventory: Inventory, part: Part) -> bool:
    """Say whether a folder is to be judged: what holds weights, or is said to hold a model; a tokenizer is none."""
    if not part.name:
        return bool(part.sets) or not inventory.is_pipeline
    return part.has_weights or (part.entry is not None and "tokenizer_config.json" not in part.files)


def run_checks(inventory: Inventory) -> list[Finding]:
    """Give all that the checks find, in their order."""
    found = [finding for check in _FOLDER_CHECKS for finding in check(inventory)]
    return found + [finding for part in inventory.parts for check in _PART_CHECKS for finding in check(part)]


def right_name(part: Part, name: WeightsName) -> WeightsName:
    """Give the name under which the part's own library looks for such weights; the same where that is not known."""
    if not part.component.config or name.tail is None or name.ext not in ("safetensors", "bin"):
        return name
    right = library_at(part).stem(name.format)
    tag = "_".join(filter(None, (name.tail.replace(".", "_"), name.variant))) or None
    if part.is_flat and not any(found.name.variant is None for found in part.sets):
        tag = None
    return WeightsName(right, tag, name.ext)


def lacks(inventory: Inventory, variant: str | None) -> list[Part]:
    """List the parts that have weights, and none of this variant."""
    parts = [part for part in loaded_parts(inventory) if any(found.file_names for found in part.sets)]
    return [
        part for part in parts if not any(found.name.variant == variant and found.file_names for found in part.sets)
    ]


def loaded_parts(inventory: Inventory) -> list[Part]:
    """List the parts that a loader loads."""
    return [part for part in inventory.parts if part.is_named or not inventory.is_pipeline]


def spelled_variant(name: WeightsName) -> str:
    """Name a variant in a sentence."""
    return f"the variant {name.variant}" if name.variant else "the untagged weights"


def is_foreign(found: ListedSet) -> bool:
    """Say whether an index names files of another variant or form than its own."""
    return found.index_name is not None and found.own_names != found.file_names


def held_names(part: Part, found: ListedSet) -> dict[str, str]:
    """Map the tensors that the files of a set hold to their file."""
    return {name: header.name for header in part.headers_of(found) for name in header.names}


def index_faults(part: Part, found: ListedSet) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the content of an index whose files are sound: a code, and the words for it."""
    assert found.index is not None
    held = held_names(part, found)
    listed = found.index.weight_map
    ghosts = [name for name in listed if name not in held]
    orphans = [name for name in held if name not in listed]
    wrong = [name for name in listed if name in held and listed[name] != held[name]]
    if ghosts:
        yield "index-ghost", f"lists {len(ghosts):,} tensors that no shard holds, such as {ghosts[0]}"
    if orphans:
        yield "index-orphan", f"does not list {len(orphans):,} tensors that its shards hold, such as {orphans[0]}"
    if wrong:
        yield "index-misplaced", f"names the wrong shard for {len(wrong):,} tensors, such as {wrong[0]}"
    if not found.index.has_metadata:
        yield "index-metadata", "has no metadata"
    size = found.index.metadata.get("total_size")
    headers = part.headers_of(found)
    nbytes = sum(header.tensor_nbytes for header in headers)
    if size is not None and size not in (nbytes, sum(header.storage_nbytes for header in headers)):
        yield "index-size", f"gives a total_size of {size!r:.30}, its tensors take {nbytes} bytes"


def repeated_name(part: Part, found: ListedSet) -> str | None:
    """Give the name of a tensor that two files of a set hold, if there is one."""
    counts = (
        Counter(name for header in part.headers_of(found) for name in header.names) if len(found.file_names) > 1 else {}
    )
    return next((name for name, count in counts.items() if count > 1), None)


def quantized_in(part: Part, found: ListedSet) -> list[Quantized]:
    """List the weights of a set that other tensors scale."""
    views = part.headers_of(found)
    return find_quantized({n: dtype for header in views for n, dtype in zip(header.names, header.dtypes, strict=True)})


def dtype_shares(part: Part, found: ListedSet, dtype: DType | None = None) -> Counter[DType]:
    """Count the floating tensors of a set by dtype, those left out that a cast to ``dtype`` leaves in a wider one."""
    keep = find_kept(part.component, dtype)
    counts: Counter[DType] = Counter()
    for header in part.headers_of(found):
        for name, held, dims in zip(header.names, header.dtypes, header.dims, strict=True):
            stays = (held.tag == "F32" and keep(name)) or (dtype is not None and stays_wider(held, dims, dtype))
            if held.tag in RECAST_SOURCES and not stays:
                counts[held] += 1
    return counts


def belies_tag(part: Part, found: ListedSet) -> DType | None:
    """Give the dtype that most tensors of a set have, where that is not the one its tag names."""
    dtype = found.name.tagged_dtype
    if dtype is None or not part.is_sound(found) or quantized_in(part, found):
        return None
    counts = dtype_shares(part, found, dtype).most_common(1)
    return counts[0][0] if counts and counts[0][0] is not dtype else None


def config_dtype(part: Part) -> tuple[DType, DType] | None:
    """Give the dtype that the config names, and the only one that weights have, where these are not the same."""
    named = part.component.config.get("dtype") or part.component.config.get("torch_dtype")
    dtype = BY_TORCH_NAME.get(named) if isinstance(named, str) else None
    sets = [found for found in part.sets if part.is_sound(found)]
    if not library_at(part).reads_dtype or dtype is None or "quantization_config" in part.component.config:
        return None
    if not sets or any(found.name.variant or quantized_in(part, found) for found in sets):
        return None
    counts = sum((dtype_shares(part, found) for found in sets), Counter())
    if len(counts) != 1 or dtype in counts:
        return None
    (held,) = counts
    return (dtype, held) if held.bits > 8 else None  # no model runs in 8 bits: a config names what they become


def same_names(a: Checkpoint, b: Checkpoint) -> bool:
    """Say whether two checkpoints describe the same tensors; of tied ones, one name is enough."""
    left, right = ({info.name: (info.dtype, info.shape) for info in one.tensors} for one in (a, b))
    for mine, checkpoint, other in ((left, a, right), (right, b, left)):
        ties = find_ties(checkpoint.tensors)
        for name in [name for name in mine if name not in other]:
            if ties.get(name) in other or any(ties.get(twin) == name for twin in other):
                del mine[name]
    return left == right


# Of the whole folder.


def _configs(inventory: Inventory) -> Iterator[Finding]:
    errors = [(inventory.path / "model_index.json", inventory.index_error)]
    errors += [(part.path / "config.json", part.config_error) for part in inventory.parts]
    for path, error in errors:
        if error:
            yield Finding("config-unreadable", path, "", error.problem)


def _missing_parts(inventory: Inventory) -> Iterator[Finding]:
    for name in inventory.absent:
        yield Finding("component-missing", inventory.path / name, name, "is not there, and model_index.json names it")
    for part in inventory.parts if inventory.is_pipeline else ():
        elsewhere = any(map(is_other_runtime, part.files))
        if part.is_named and not (part.headers or part.sets or elsewhere) and part.component.config:
            yield Finding("component-missing", part.path, part.name, "has a config.json and no weights")


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
        if variant is not None and WeightsName("", variant, "").tagged_dtype is None:
            continue  # such as non_ema: of one part on purpose
        without = lacks(inventory, variant)
        if without and len(without) < len(loaded_parts(inventory)):
            code = "variant-partial" if variant else "default-partial"
            what = spelled_variant(WeightsName("", variant, ""))
            names = ", ".join(part.name for part in without)
            yield Finding(code, inventory.path, without[0].name, f"has {what} in some parts only: not in {names}")


def _mixed_forms(inventory: Inventory) -> Iterator[Finding]:
    parts = loaded_parts(inventory) if inventory.is_pipeline else []
    forms = {part.name: [found.name for found in part.sets if found.file_names] for part in parts}
    without = {name for variant in inventory.variants for name in lacks_safetensors(forms, variant)}
    if without:
        problem = f"has safetensors in some parts, and the same variant only as .bin in {', '.join(sorted(without))}"
        yield Finding("forms-mixed", inventory.path, min(without), problem)


def lacks_safetensors(forms: Mapping[str, Sequence[WeightsName]], variant: str | None) -> list[str]:
    """List the parts, given the names of the sets of each, that for a variant are .bin while others are safetensors.

    A part without that variant counts with its untagged set (``is_safetensors_compatible``).
    """
    formats = {}
    for part, names in forms.items():
        meant = [name for name in names if name.variant == variant] or [n for n in names if n.variant is None]
        formats[part] = {name.format for name in meant}
    without = [part for part, found in formats.items() if found == {"torch"}]
    return without if any("safetensors" in found for found in formats.values()) else []


def _config_dtypes(inventory: Inventory) -> Iterator[Finding]:
    for part in () if inventory.is_pipeline else inventory.parts:
        found = config_dtype(part)
        if found:
            problem = f"names {found[0].torch_name}, and the weights are {found[1].torch_name}"
            yield Finding("config-dtype", part.path / "config.json", part.name, problem)


# Of one part.


def _damaged_files(part: Part) -> Iterator[Finding]:
    for header in part.headers.values():
        if header.error is not None:
            code = _code_of(header.name, header.error)
            advice = f". {header.error.advice.rstrip('.')}" if code != "file-damaged" and header.error.advice else ""
            yield Finding(code, part.path / header.name, part.name, header.error.problem + advice)


def _code_of(name: str, error: WconvError) -> str:
    """Tell a damaged file from a valid one of another kind; what loaders look for must be weights all the same."""
    parsed = parse_name(name)
    if isinstance(error, TrainingPiece):
        return "training-piece"
    if not isinstance(error, Unsupported):
        return "file-damaged"
    return "file-unread" if parsed and parsed.name.is_standard else "file-other"


def _partial_downloads(part: Part) -> Iterator[Finding]:
    for name in part.partial:
        yield Finding("download-partial", part.path / name, part.name, "was left by a download that did not finish")


def _missing_shards(part: Part) -> Iterator[Finding]:
    whole = _whole(part)
    for found in (*part.sets, *(stray for stray in part.strays if stray.name not in whole)):
        if found.file_names and found.missing:
            count = f"{found.missing_count:,} of {found.missing_count + len(found.file_names):,} shards"
            problem = f"lacks {count}, such as {found.missing}"
            yield Finding("shard-missing", found.path, part.name, problem)


def _whole(part: Part) -> set[WeightsName]:
    return {found.name for found in part.sets if part.is_sound(found)}


def _indexes(part: Part) -> Iterator[Finding]:
    for found in part.sets:
        path = found.path
        if found.index_name and found.index is None:
            problem = found.index_error.problem if found.index_error else "cannot be read"
            yield Finding("index-unreadable", path, part.name, problem)
        elif found.index_name and not found.file_names:
            yield Finding("index-dangling", path, part.name, f"names {found.missing} and no file that is there")
        elif is_foreign(found):
            names = ", ".join(found.file_names[:3]) + (", ..." if len(found.file_names) > 3 else "")
            yield Finding("index-foreign", path, part.name, f"names files of another variant: {names}")
        elif part.is_sound(found) and (twice := repeated_name(part, found)):
            yield Finding("tensor-twice", path, part.name, f"is a set in which two shards hold {twice}")
        elif found.index_name and part.is_sound(found):
            for code, problem in index_faults(part, found):
                yield Finding(code, path, part.name, problem)
        elif not found.index_name and not found.missing and found.is_sharded and not _is_of_pieces(part, found):
            problem = f"is one of {len(found.file_names)} shards that have no index"
            yield Finding("index-missing", path, part.name, problem)


def _is_of_pieces(part: Part, found: ListedSet) -> bool:
    return any(isinstance(header.error, TrainingPiece) for header in part.headers_of(found))


def _twins(part: Part) -> Iterator[Finding]:
    seen: dict[WeightsName, ListedSet] = {}
    for found in part.sets:
        first = seen.setdefault(found.name, found) if found.file_names else found
        if first is not found:
            problem = f"holds {spelled_variant(found.name)} twice: {first.label} and {found.label}"
            yield Finding("sets-twice", part.path, part.name, problem)


def _strays(part: Part) -> Iterator[Finding]:
    whole = _whole(part)
    for found in part.strays:
        if not found.missing or found.name in whole:
            others = f", nor {len(found.file_names) - 1} more" if len(found.file_names) > 1 else ""
            yield Finding("shards-stray", found.path, part.name, f"is named by no index{others}")


def _single_variants(part: Part) -> Iterator[Finding]:
    default = next(
        (f for f in part.sets if f.file_names and not f.name.variant and f.is_sharded and not is_foreign(f)), None
    )
    for found in part.sets:
        if default and found.name.variant and not found.is_sharded and found.name.ext == default.name.ext:
            problem = f"is one file, beside the untagged shards of {default.label}"
            yield Finding("variant-single", found.path, part.name, problem)


def _names(part: Part) -> Iterator[Finding]:
    taken = {found.name for found in part.sets}
    for found in part.sets:
        right = right_name(part, found.name)
        hub_index = found.index_name == f"{found.name.single}.index.json" and found.name.variant is not None
        if (right != found.name and right not in taken) or (hub_index and found.file_names):
            problem = f"is a name that no loader looks for (it should be {right.index if hub_index else right.single})"
            yield Finding("name-unread", found.path, part.name, problem)
        elif found.is_legacy and found.file_names:
            yield Finding("name-legacy", found.path, part.name, "is spelled as it was in earlier years")


def _sharded_bins(part: Part) -> Iterator[Finding]:
    safe = {found.name.variant for found in part.sets if found.name.format == "safetensors" and found.file_names}
    for found in part.sets:
        is_bin = found.name.format == "torch" and found.file_names and found.is_sharded
        reads = library_of(part.component).reads_shards(found.name.format)
        if is_bin and not reads and found.name.variant not in safe:
            problem = f"is a set of {len(found.file_names)} .bin shards, which Diffusers does not load"
            yield Finding("bin-sharded", found.path, part.name, problem)


def _two_forms(part: Part) -> Iterator[Finding]:
    for pickled, safe in forms_of(part):
        opened = [_open(found) for found in (pickled, safe)]
        if opened[0] is None or opened[1] is None:
            continue
        if not same_names(opened[0], opened[1]):
            problem = f"holds other tensors than {safe.label}, and both are {spelled_variant(safe.name)}"
            yield Finding("forms-differ", pickled.path, part.name, problem)
        else:
            size = sum(header.nbytes for header in part.headers_of(pickled)) / 1e9
            problem = f"holds the same tensors as {safe.label}, in {size:,.2f} GB"
            yield Finding("forms-redundant", pickled.path, part.name, problem)


def forms_of(part: Part) -> Iterator[tuple[ListedSet, ListedSet]]:
    """Yield pairs of sound sets of one variant, the first as .bin and the second as safetensors."""
    sound: dict[WeightsName, list[ListedSet]] = defaultdict(list)
    for found in part.sets:
        if part.is_sound(found) and not is_foreign(found):
            sound[found.name].append(found)
    for name in [name for name in sound if name.format == "torch"]:
        for pickled in sound[name]:
            yield from ((pickled, safe) for safe in sound.get(name.in_format("safetensors"), ()))


def _open(found: ListedSet) -> Checkpoint | None:
    try:
        return open_checkpoint(found.without_index, LENIENT)
    except WconvError:
        return None


def _dtypes(part: Part) -> Iterator[Finding]:
    for found in part.sets:
        if not part.is_sound(found):
            continue
        belied = belies_tag(part, found)
        counts = dtype_shares(part, found, found.name.tagged_dtype)
        if belied:
            problem = f"is tagged {found.name.variant}, and most of its tensors are {belied.torch_name}"
            yield Finding("dtype-tag", found.path, part.name, problem)
        elif len(counts) > 1 and not _is_kept_mixture(part, found) and not quantized_in(part, found):
            names = ", ".join(f"{count:,} {dtype.torch_name}" for dtype, count in counts.most_common())
            yield Finding("dtype-mixed", found.path, part.name, f"holds tensors of {names}")


def _quantized(part: Part) -> Iterator[Finding]:
    is_said = any("quantization_config" in config for config in nested(part.component.config))
    for found in part.sets:
        weights = quantized_in(part, found) if part.is_sound(found) else []
        if weights:
            more = f", and so are {len(weights) - 1:,} more" if len(weights) > 1 else ""
            code = "quantized-unsaid" if part.component.config and not is_said else "quantized"
            problem = f"is quantized ({weights[0]}{more})"
            problem += ", and its config.json does not say so" if code == "quantized-unsaid" else ""
            yield Finding(code, found.path, part.name, problem)


def _is_kept_mixture(part: Part, found: ListedSet) -> bool:
    narrow = [dtype for dtype in dtype_shares(part, found) if dtype.bits <= 16]
    return any(len(dtype_shares(part, found, dtype)) == 1 for dtype in narrow)


def _old_attention(part: Part) -> Iterator[Finding]:
    for found in part.sets:
        if part.is_sound(found) and len(found.file_names) > 1:
            name = library_of(part.component).find_old_name(part.component, held_names(part, found))
            if name:
                problem = f"holds tensors with old names, such as {name}, in {len(found.file_names)} shards"
                yield Finding("old-attention", found.path, part.name, problem)


def _headers(part: Part) -> Iterator[Finding]:
    for found in part.sets:
        for name in lacks_format(part, found):
            yield Finding("header-format", part.path / name, part.name, "has no format in its header")


def lacks_format(part: Part, found: ListedSet) -> list[str]:
    """List the files of a set, of those that a model's library loads, whose headers have no format."""
    headers = part.headers_of(found) if part.component.config and found.name.tail is not None else []
    return [header.name for header in headers if header.format == "safetensors" and "format" not in header.metadata]


def _pickles(part: Part) -> Iterator[Finding]:
    for header in part.headers.values():
        if header.foreign:
            names = ", ".join(list(header.foreign)[:3]) + (", ..." if len(header.foreign) > 3 else "")
            yield Finding(
                "pickle-code", part.path / header.name, part.name, f"has to do with more than tensors: {names}"
            )


_FOLDER_CHECKS: tuple[Check, ...] = (
    _configs, _missing_parts, _unnamed_parts, _dotless_entries, _partial_variants, _mixed_forms, _config_dtypes,
)  # fmt: skip
_PART_CHECKS: tuple[_PartCheck, ...] = (
    _damaged_files, _partial_downloads, _missing_shards, _indexes, _twins, _strays, _single_variants, _names,
    _sharded_bins, _two_forms, _dtypes, _quantized, _old_attention, _headers, _pickles,
)  # fmt: skip

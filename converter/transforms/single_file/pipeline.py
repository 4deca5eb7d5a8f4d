"""A single file as a Diffusers pipeline: its tensors sorted into parts, and what else a pipeline holds.

Every tensor gets the name that ``from_single_file`` gives it, and the shape where that differs, as a view of its bytes
in the file. So it is streamed like any other, and neither torch nor Diffusers is needed. What else a pipeline holds
comes from ``configs``, or from a folder of the user's. A diffusion model alone becomes the folder of that one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from converter.errors import BadFile, BadRequest, Unsupported, name_some
from converter.models.checkpoint import Checkpoint
from converter.models.component import Component, WeightSet
from converter.models.configs import read_json, render_json
from converter.models.hub_cache import lies_outside
from converter.models.inventory import is_class
from converter.models.model import Model
from converter.models.names import WeightsName
from converter.storage import FileRef, Place, place_of
from converter.tensors.base import Tensor
from converter.transforms.layouts.rows import take_apart, wholes_of
from converter.transforms.layouts.sizes import Sizes
from converter.transforms.single_file.families import EMA, Found, family_of, part_of, recognise
from converter.transforms.single_file.family import ABSENT, SCHEDULER, Config, Family, Part
from converter.transforms.single_file.sizes import check_config, check_shapes
from converter.transforms.single_file.tokenizer import tokenizer_files

CONFIGS = Path(__file__).parents[2] / "configs"
_COPIED = (".json", ".txt", ".model")
_NULL = [None, None]
_CLIP = "CLIPTokenizer"  # whose files follow from what is shipped
_MOST_PARTS = 32  # of a pipeline; real ones have up to twelve


@dataclass(frozen=True, slots=True)
class SingleFile:
    """A checkpoint as a pipeline, or as one model: what it is, its parts, files beside them and the text of some.

    ``copied`` and ``generated`` are as in a Plan.
    """

    model: Model
    checkpoints: tuple[tuple[Component, Checkpoint], ...]
    copied: tuple[tuple[str, FileRef], ...]
    generated: Mapping[str, bytes]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Frame:
    """What a checkpoint is put into: the folder of its family, or the one that is ``given``, with some changes.

    Where none is given and none is shipped there is no ``root``. ``marks`` are what the file says of its scheduler.
    """

    found: Found
    root: Place | None
    given: bool
    marks: Mapping[str, Any]

    @property
    def changes(self) -> Mapping[str, Mapping[str, Any]]:
        if self.given:
            return {}
        changes = dict(self.found.kind.changes)
        if self.marks:
            changes[SCHEDULER] = {**changes.get(SCHEDULER, {}), **self.marks}
        return changes

    def read(self, name: str) -> dict[str, Any]:
        """Read a config, as it is for this checkpoint. Raises BadFile where there is none."""
        if self.root is None:
            problem = f"is needed for a whole pipeline of {self.found.family.name}, and none is shipped"
            raise BadFile(name, problem, "Give the folder of a pipeline of its kind: --config.")
        content = read_json(self.root / name)
        if not content:
            raise BadFile(self.root / name, "is not there, or no JSON object", "Give a --config folder that has it.")
        return {**content, **self.changes.get(name, {})}

    def config_place(self, name: str) -> Place | None:
        """Give where the config of a part lies: in its folder, or in the root if that is the part's own."""
        if self.root is None:
            return None
        place = self.root / name / "config.json"
        is_own = self.given and not place.exists() and not (self.root / "model_index.json").exists()
        place = self.root / "config.json" if is_own else place
        return place if self.given or place.exists() else None


def open_single_file(
    checkpoint: Checkpoint,
    config: Place | Path | None = None,
    ema: bool = False,
    without: Sequence[str] = (),
    follow_links: bool = False,
) -> SingleFile:
    """Sort a checkpoint's tensors into the parts of a pipeline; ``ema`` takes the diffusion model's averaged weights.

    ``config`` is a pipeline folder, of which the weights are not looked at, nor what else in it lies elsewhere by links
    unless ``follow_links``; or that of one model, which alone is then taken. Parts in ``without`` are left out:
    ``vae``, ``text-encoders``, or the name of one. Raises Unsupported for another model, BadFile or BadRequest for a
    part that is missing or does not fit its config.
    """
    source = checkpoint.weight_set.path
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors}
    given = place_of(config) if config is not None else None
    meant, alone = (None, "") if given is None else _meant(given)
    if meant is not None and alone not in ("", meant.core):
        found = Found(meant, meant.kinds[0], {alone: _prefix_of(tensors, meant, alone)})
    else:
        found = recognise(source, tensors, meant)
    family = found.family
    shipped = place_of(CONFIGS / family.folder) if family.folder else None
    marks = {name: said for name, said in family.marks.items() if name in tensors}
    frame = _Frame(found, given or shipped, given is not None, dict(marks.values()))
    kept = _kept_parts(source, found, without)
    turn = next((name for name in family.turns if name in tensors), None)
    if turn and given is None and len(kept) > 1:
        problem = f"says by {turn!r} that it was trained otherwise than {family.name}"
        raise Unsupported(source, problem, "Give the folder of such a pipeline: --config.")
    if ema and family.core not in kept:
        raise BadRequest(source, f"gives its {kept[0]} alone, and --ema is for a diffusion model", "Leave it out.")
    sorted_tensors, rest = sort_tensors(tensors, found.prefixes)
    rest = [name for name in rest if name not in marks]
    is_extract = kept[0] != family.core and len(kept) == 1
    notes = [*_notes_of_kind(source, frame, kept, len(rest)), *checkpoint.notes, *notes_of_headers(checkpoint)]
    parts = []
    for name in kept:
        mine = sorted_tensors[name]
        if name == family.core and ema:
            mine = _averaged(source, mine, tensors, found.prefixes[name])
        component, part, left = _open_part(checkpoint, mine, frame, name)
        parts.append((component, part))
        notes += left
    left_out = [(name, len(sorted_tensors[name])) for name in found.prefixes if name not in kept]
    notes += [f"left out, as asked: {name} ({count} tensors)" for name, count in left_out]
    notes += () if is_extract else _notes_of_rest(rest, ema)
    if len(kept) == 1:
        return _alone(source, frame, parts, tuple(notes))
    return _whole(source, frame, parts, notes, follow_links)


def _meant(folder: Place) -> tuple[Family | None, str]:
    """Give the family of a pipeline's folder, as its configs say; of a model's folder any that has it, and its name."""
    index = read_json(folder / "model_index.json")
    class_name = index.get("_class_name")
    if not index:
        found = part_of(Component("", folder, (), read_json(folder / "config.json")).class_name)
        return found or (None, "")
    names = [name for name, entry in index.items() if is_class(entry) and name.isidentifier()]
    configs = {name: read_json(folder / name / "config.json") for name in names[:_MOST_PARTS]}
    return (family_of(class_name, configs) if isinstance(class_name, str) else None), ""


def _prefix_of(tensors: Iterable[str], family: Family, name: str) -> str:
    """Give what the names of a part begin with in a file that holds it, or nothing else."""
    names = list(tensors)
    part = family.parts[name]
    return next((one for one in part.prefixes if any(full.startswith(one) for full in names)), part.lone)


def chosen(family: Family, names: Iterable[str], without: Iterable[str]) -> tuple[str, ...]:
    """Give those of the parts that are there which are not left out. Raises BadRequest for what it has not at all."""
    left: set[str] = set()
    for one in without:
        parts = family.encoders if one == "text-encoders" else (one,)
        if family.core in parts or not set(parts) <= family.parts.keys():
            has = ", ".join(["text-encoders", *(name for name in family.parts if name != family.core)])
            problem = f"is no part of {family.name} that can be left out"
            raise BadRequest(repr(one), problem, f"Those are: {has}.")
        left |= set(parts)
    return tuple(name for name in family.parts if name in names and name not in left)


def _kept_parts(source: Place, found: Found, without: Sequence[str]) -> tuple[str, ...]:
    """Give the parts that are written, as a diffusion model may be alone in its file. Raises BadFile for half a one."""
    family = found.family
    kept = chosen(family, found.prefixes, without)
    if len(found.prefixes) == 1:
        if not kept:
            raise BadRequest(source, "has nothing else than what is to be left out", "Leave --without out.")
        return kept
    wanted = chosen(family, family.parts, without)
    lacking = [name for name in wanted if name not in kept and not family.parts[name].is_optional]
    if lacking:
        problem = f"holds no {lacking[0]}: no name begins with {family.parts[lacking[0]].prefixes[0]!r}"
        if lacking[1:]:
            problem += f"; nor has it {' and '.join(lacking[1:])}"
        advice = "Take a checkpoint with all parts in it; 'wconv to-diffusers --without' leaves some out."
        raise BadFile(source, problem, advice)
    return kept


def sort_tensors(
    tensors: Mapping[str, Tensor], prefixes: Mapping[str, str]
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Give the tensors of each part by their names without its prefix, and the names that are in no part.

    The longest prefix decides: a diffusion model may have none.
    """
    by_prefix = sorted(((prefix, name) for name, prefix in prefixes.items()), key=lambda one: -len(one[0]))
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in prefixes}
    rest = []
    for full, tensor in tensors.items():
        begin, name = next((one for one in by_prefix if full.startswith(one[0])), ("", ""))
        if name and not full.startswith(EMA):
            parts[name][full.removeprefix(begin)] = tensor
        else:
            rest.append(full)
    return parts, rest


def _notes_of_kind(source: Place, frame: _Frame, kept: Sequence[str], holds_more: int) -> Iterator[str]:
    """Say what a checkpoint is, which ``holds_more`` tensors than those of its parts, and what of that was assumed."""
    family, kind, _ = frame.found
    alone = "text encoder" if kept[0] in family.encoders else kept[0]
    what = f"{family.name} checkpoint" if len(kept) > 1 else f"{alone} alone"
    what = what if len(kept) > 1 or frame.given else f"{family.name} {what}"
    if len(kept) == 1 and kept[0] != family.core and holds_more:
        yield f"of {source.name}, the {alone} is taken, as --config has it; {holds_more:,} other tensors are left out"
    else:
        yield f"{source.name} is a {what}{kind.words}"
    if family.folder == "sd2" and not frame.given and not kind.changes:
        yield "it is taken for one of 768 pixels; for one of 512, give the folder of such a model as --config"
    if frame.marks and len(kept) > 1 and frame.root is not None:
        scheduler = read_json(frame.root / SCHEDULER) if frame.given else frame.marks
        for key, value in frame.marks.items():
            said = scheduler.get(key)
            yield f"its scheduler's {key} is {value}, as the file says" + (
                "" if said == value else f"; that of --config, which is taken, is {said!r:.60}"
            )
    lacking = [name for name in family.parts if name not in frame.found.prefixes and family.parts[name].is_optional]
    if lacking and len(kept) > 1:
        yield f"it holds no {' and no '.join(lacking)}, and model_index.json says so"


def _alone(
    source: Place, frame: _Frame, parts: list[tuple[Component, Checkpoint]], notes: tuple[str, ...]
) -> SingleFile:
    """Give a diffusion model, or another one, as the one of a folder."""
    [(component, checkpoint)] = parts
    place = frame.config_place(component.name)
    component = replace(component, name="", path=source.parent)
    generated = {"config.json": render_json(component.config)}
    is_as_it_lies = place is not None and read_json(place) == component.config
    copied = (("config.json", place.ref()),) if place is not None and is_as_it_lies else ()
    said = f"it becomes the folder of one model: {component.class_name}.from_pretrained loads it"
    model = Model(source, source.parent, "component", (component,))
    return SingleFile(model, ((component, checkpoint),), copied, {} if copied else generated, (*notes, said))


def _whole(
    source: Place,
    frame: _Frame,
    parts: list[tuple[Component, Checkpoint]],
    notes: list[str],
    follow_links: bool,
) -> SingleFile:
    """Give parts as a pipeline, with what else that holds."""
    names = [component.name for component, _ in parts]
    index = _index_of(frame, names)
    changed = [name for name in frame.changes if index.get(name.partition("/")[0]) != _NULL]
    generated = {name: render_json(frame.read(name)) for name in changed}
    generated["model_index.json"] = render_json(index)
    assert frame.root is not None  # its index was read
    shipped = {component.name: render_json(component.config) for component, _ in parts}
    generated |= {f"{name}/config.json": text for name, text in shipped.items() if frame.config_place(name) is None}
    copied, linked = _find_copied(frame.root, index, generated, follow_links)
    notes += linked
    if not frame.given:
        tokenizers = [name for name, entry in index.items() if is_class(entry) and entry[1].startswith(_CLIP)]
        generated |= tokenizer_files(place_of(CONFIGS / "clip_merges.txt.gz"), tokenizers)
    family = frame.found.family
    lacking = [name for name in family.parts if name not in names and name in index]
    if lacking:
        them = "them" if len(lacking) > 1 else "it"
        notes.append(f"model_index.json names no {' and no '.join(lacking)}: from_pretrained has to be given {them}")
    components, passed = tuple(one for one, _ in parts), family.passed(lacking)
    model = Model(source, source.parent, "pipeline", components, index["_class_name"], passed)
    return SingleFile(model, tuple(parts), copied, generated, tuple(notes))


def _index_of(frame: _Frame, kept: Sequence[str]) -> dict[str, Any]:
    """Give a pipeline's index as it is without what is not there. Raises BadRequest for another family's."""
    assert frame.root is not None
    index, family = frame.read("model_index.json"), frame.found.family
    if not frame.given:
        index["_class_name"] = frame.found.kind.pipeline
    index.update({name: _NULL for name in ABSENT if name in index})
    if "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    encoders = [name for name in index if name.startswith("text_encoder") and index[name] != _NULL]
    needed = {name for name in family.encoders if name in kept or not family.parts[name].is_optional}
    if not needed <= set(encoders) <= set(family.encoders):
        problem = f"names {' and '.join(encoders) or 'no text encoder'}, and {family.name} has"
        problem += f" {' and '.join(family.encoders)}"
        raise BadRequest(frame.root / "model_index.json", problem, "Give the right --config.")
    index.update({name: _NULL for name in family.parts if name in index and name not in kept})
    for name, entry in index.items():
        if name.startswith("tokenizer") and is_class(entry) and not (frame.root / name).is_folder():
            encoder = name.replace("tokenizer", "text_encoder")
            if encoder in kept and not (entry[1].startswith(_CLIP) and not frame.given):
                problem = f"is needed for the {encoder}, and is not there"
                raise BadFile(frame.root / name, problem, "Give a --config folder that has it, or --without it.")
            index[name] = _NULL
    return index


def _open_part(
    checkpoint: Checkpoint, mine: Mapping[str, Tensor], frame: _Frame, name: str
) -> tuple[Component, Checkpoint, list[str]]:
    """Give a part with the names that its weights have in a pipeline, and notes of what is left out of it."""
    source, family = checkpoint.weight_set.path, frame.found.family
    part, prefix = family.parts[name], frame.found.prefixes[name]
    config, what = _config_of(source, frame, name, mine)
    converted, left = as_diffusers(part, config, mine)
    unread = [short for short in left if short in part.unread]
    left = [short for short in left if short not in part.unread]
    strange = find_strange(source, what, part, config, converted)
    converted = [tensor for tensor in converted if tensor.name not in strange]
    left += wholes_of(strange, part.rows(config)).values()
    others = name_some([prefix + short for short in left], 1)
    if left and (name == family.core or len(frame.found.prefixes) == 1):
        problem = f"holds tensors that no {name} of {family.name} has: {others}"
        raise Unsupported(source, problem, "Is it another model, or one with something added?")
    weights_name = WeightsName(part.library.stem("safetensors"), None, "safetensors")
    weight_set = WeightSet(source.parent, weights_name, (source.name,))
    file = replace(checkpoint.files[0], tensors=tuple(converted), metadata={})
    component = Component(name, source.parent / name, (weight_set,), config)
    notes = [f"left out, for no {name} has them: {others}"] if left else []
    notes += [f"left out, for Diffusers does not read it: {prefix}{short}" for short in unread]
    return component, Checkpoint(weight_set, (file,), {}), notes


def as_diffusers(part: Part, config: Config, wholes: Mapping[str, Tensor]) -> tuple[list[Tensor], list[str]]:
    """Give a part's tensors as a pipeline has them, of those of a single file, and the names that no row has."""
    converted, left = take_apart(wholes, part.rows(config))
    return converted + (part.made(config, converted) if part.made else []), left


def find_strange(source: Place, what: str, part: Part, config: Config, converted: Sequence[Tensor]) -> list[str]:
    """Name those tensors of a part, as a pipeline has it, that its class has not.

    ``what`` is what to call its config. Raises BadRequest where one of its class is missing, or not of its size.
    """
    expected = part.shapes(config)
    shapes = {tensor.name: tensor.shape for tensor in converted}
    check_shapes(source, what, expected, shapes)
    return [name for name in shapes if name not in expected and name.rpartition(".")[2] not in part.buffers]


def _config_of(source: Place, frame: _Frame, name: str, mine: Mapping[str, Tensor]) -> tuple[dict[str, Any], str]:
    """Give a part's config, and what to call it; of tensors where none is given or shipped."""
    family = frame.found.family
    part, place = family.parts[name], frame.config_place(name)
    if place is None and part.config_of is not None:
        config = part.config_of(Sizes(source, {short: tensor.shape for short, tensor in mine.items()}))
        return config, f"what its shapes say of the {name}"
    assert frame.root is not None
    assert place is not None
    config = frame.read(str(place.relative_to(frame.root)))
    check_config(place, config, part.numbers, part.words)
    _check_class(place, config, part.classes)
    return config, str(place) if frame.given else f"the {name} of {family.name}"


def _check_class(place: Place, config: Config, classes: Sequence[str]) -> None:
    """Raise BadRequest for a config of Diffusers that names another class than these."""
    named = config.get("_class_name")
    if named is not None and named not in classes:
        problem = f"is that of a {named!s:.60}, and a {' or '.join(classes)} is needed"
        raise BadRequest(place, problem, "Give the right --config.")


def _averaged(
    source: Place, plain: Mapping[str, Tensor], tensors: Mapping[str, Tensor], prefix: str
) -> dict[str, Tensor]:
    """Give the averaged weights for the plain ones: their names have no dots (``ldm/modules/ema.py``)."""
    flat = {name: EMA + f"{prefix}{name}".removeprefix("model.").replace(".", "") for name in plain}
    missing = [name for name in flat.values() if name not in tensors]
    if missing:
        problem = f"lacks EMA weights: {len(missing)} of {len(flat)}, such as {missing[0]!r}"
        raise BadFile(source, problem, "Leave --ema out.")
    return {name: tensors[averaged] for name, averaged in flat.items()}


def _find_copied(
    root: Place, index: Mapping[str, Any], generated: Mapping[str, bytes], follow_links: bool
) -> tuple[tuple[tuple[str, FileRef], ...], list[str]]:
    """Give the files that come along as they are, and notes of those that do not: they lie behind links."""
    files = {name: path for name, path in _files_beside(root, index) if name not in generated}
    real = root.real()
    linked = [] if follow_links else [name for name, path in files.items() if lies_outside(path, real)]
    notes = [f"not carried over: {files.pop(name)} (behind a link: --follow-links carries it)" for name in linked]
    return tuple((name, path.ref()) for name, path in files.items()), notes


def _files_beside(root: Place, index: Mapping[str, Any]) -> Iterator[tuple[str, Place]]:
    """List the files of the parts that a pipeline names, by their names from its folder."""
    for name, entry in index.items():
        if isinstance(entry, list) and entry[:1] != [None] and name.isidentifier() and (root / name).is_folder():
            for path in (root / name).entries():
                if path.name.endswith(_COPIED) and ".index." not in path.name and path.is_file():
                    yield f"{name}/{path.name}", path


def notes_of_headers(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Say which notes of headers are left out: they are of the file as it was."""
    keys = sorted(checkpoint.metadata.keys() - {"format"})
    return (f"left out, as it is said of the file that is read: {name_some(keys, 3)} in its header",) if keys else ()


def _notes_of_rest(rest: Sequence[str], ema: bool) -> Iterator[str]:
    """Say what becomes of the tensors that are in no part, and of the averaged ones."""
    averaged = [name for name in rest if name.startswith(EMA)]
    others = [name for name in rest if not name.startswith(EMA)]
    if averaged and not ema:
        yield f"the EMA weights are left out ({len(averaged)} tensors); --ema takes them in place of the plain ones"
    if ema:
        yield "the EMA weights are taken, and the plain ones left out"
    if others:
        yield f"left out, for no part of a pipeline has them: {name_some(others, 1)}"

"""Which tensors are written, and under which names: some alone, without a prefix or what wrappers added, any others."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from converter.errors import BadFile, BadRequest, Unsupported, Where, name_some
from converter.formats.safetensors import METADATA_KEY
from converter.models.checkpoint import Checkpoint
from converter.models.component import QUANTIZER_CONFIGS, Component, quantization_of
from converter.models.configs import read_json
from converter.models.names import fold_modules
from converter.models.schemes import (
    COMFY,
    COMFY_MARKED,
    COMFY_NOTE,
    Quantized,
    find_owners,
    is_mark,
    modules_noted,
    note_without,
    quantized_in,
)
from converter.models.select import compiled, texts_of
from converter.tensors.base import MAX_NAME, WeightsFile

# The attribute under which each keeps what it wraps: ``OptimizedModule`` (``torch/_dynamo/eval_frame.py``),
# ``FullyShardedDataParallel`` (``torch/distributed/fsdp/_common_utils.py``) and ``CheckpointWrapper``
# (``torch/distributed/algorithms/_checkpoint/checkpoint_wrapper.py``). No model has such a name of its own, so they go
# wherever they stand, as in ``fsdp2_canonicalize_names`` of ``accelerate/utils/fsdp_utils.py``.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# That of ``DataParallel``, ``DistributedDataParallel`` and DeepSpeed's engine; a model's own part may be called so.
_DATA_PARALLEL = "module"
_LISTED = "'wconv inspect --tensors' lists them."
_PLAIN = "It is plain text, and no regular expression: --strip-prefix model."
_APART = r"Keep them apart: --drop leaves one out, and NEW of --rename may have \1 for the first group of its REGEX."
_TOGETHER = "Keep both, or drop both."
_NAMED = 8  # of the tensors, or kinds of them, of which a note tells

Opened = Sequence[tuple[Component, Checkpoint]]
Renaming = Sequence[tuple[str, str]] | Mapping[str, str] | Callable[[str], str]


@dataclass(frozen=True, slots=True)
class TensorNames:
    """Which tensors are written, by their names in the source, and under which names.

    ``only`` and ``drop`` are regular expressions, searched in the names as they are in the source: what one of the
    first finds is kept, and of that not what one of the others finds. ``strip_prefix`` is taken off names that have it.
    ``rename`` are pairs of a regular expression and what is put in the place of all that it finds, one after the other
    (``re.sub``); or a mapping of whole names, or a function of one. ``add_prefix`` is put before all names. Raises
    BadRequest for what is none.
    """

    only: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    strip_prefix: str = ""
    rename: Renaming = ()
    add_prefix: str = ""

    def __post_init__(self) -> None:
        for option in ("only", "drop"):
            regexes = texts_of(getattr(self, option) or ())
            object.__setattr__(self, option, regexes)
            for regex in regexes:
                compiled(regex)
        for option in ("strip_prefix", "add_prefix"):
            object.__setattr__(self, option, getattr(self, option) or "")
        rename = self.rename or ()
        if not (callable(rename) or isinstance(rename, Mapping)):
            rename = tuple(_as_pair(one) for one in rename)
        object.__setattr__(self, "rename", rename)

    @property
    def picks(self) -> bool:
        """Whether some tensors may be left out."""
        return bool(self.only or self.drop)

    @property
    def renames(self) -> bool:
        """Whether tensors may get other names."""
        return bool(self.strip_prefix or self.rename or self.add_prefix)


def _as_pair(given: object) -> tuple[str, str]:
    """Give a pair of a regular expression and a replacement. Raises BadRequest for what is none."""
    if not (isinstance(given, (tuple, list)) and len(given) == 2 and all(isinstance(one, str) for one in given)):
        raise BadRequest(repr(given), "is no pair of a regular expression and a replacement")
    regex, replacement = given
    try:
        compiled(regex).sub(replacement, "")  # which reads the replacement, whatever is found
    except (re.error, IndexError) as error:
        raise BadRequest(repr(replacement), f"is no replacement for {regex!r} ({error})") from None
    return regex, replacement


_NONE_ASKED = TensorNames()


def name_sets(
    opened: Opened, names: TensorNames, where: Where, unwraps: bool = True
) -> list[tuple[Component, Checkpoint]]:
    """Leave out tensors and give others names, as asked; and take off what wrappers of torch put into names.

    In this order: ``only`` and ``drop``, ``strip_prefix``, what wrappers added, ``rename``, ``add_prefix``. Names that
    a header ties to a tensor follow. Raises BadRequest for what matches nothing in any of the sets, would leave a set
    without tensors, give two tensors one name or one a name that cannot be, or take apart what is quantized;
    Unsupported as ``unwrap`` does.
    """
    asked = _Asked(names)
    picked = [asked.pick(checkpoint) for _, checkpoint in opened]
    asked.refuse_unmatched(where, "--only", "--drop")
    for (_, before), checkpoint in zip(opened, picked, strict=True):
        if before.tensors and not checkpoint.tensors:
            problem = "would be left without tensors, as --only and --drop have it"
            advice = "--component names the parts that are meant." if len(opened) > 1 else "Leave out fewer."
            raise BadRequest(before.weight_set.path, problem, advice)
    pairs = zip(opened, picked, strict=True)
    changed = [asked.rename(component, checkpoint, unwraps) for (component, _), checkpoint in pairs]
    asked.refuse_unmatched(where, "--strip-prefix", "--rename")
    named = []
    for (component, before), checkpoint, after in zip(opened, picked, changed, strict=True):
        if after is before:
            named.append((component, before))
            continue
        origins = {new: old for old, new in checkpoint.renamed.items()}
        both = zip(checkpoint.tensors, after.tensors, strict=True)
        new_names = {origins.get(one.name, one.name): new.name for one, new in both}
        if names != _NONE_ASKED:
            _check_quantized(component, before, after, new_names)
        renamed = {old: new for old, new in new_names.items() if old != new}
        named.append((component, replace(after, renamed=renamed)))
    return named


class _Asked:
    """What is asked of names, and which of it has matched nothing yet."""

    def __init__(self, names: TensorNames) -> None:
        self._names = names
        self._only = [(regex, compiled(regex).search) for regex in names.only]
        self._drop = [(regex, compiled(regex).search) for regex in names.drop]
        self._rules = list(_rules_of(names.rename))
        texts = {
            "--only": [(0, regex) for regex in names.only],
            "--drop": [(0, regex) for regex in names.drop],
            "--strip-prefix": [(0, names.strip_prefix)] if names.strip_prefix else [],
            "--rename": [(number, text) for number, rule in enumerate(self._rules) for text in rule.texts],
        }
        self._unmatched = {option: dict.fromkeys(given) for option, given in texts.items()}

    def refuse_unmatched(self, where: Where, *options: str) -> None:
        """Raise BadRequest for what has matched nothing, if anything has not."""
        for option in options:
            for _, text in self._unmatched[option]:
                how = "begins with" if option == "--strip-prefix" else "holds"
                problem = f"has no tensor whose name {how} '{text}', as {option} has it"
                raise BadRequest(where, problem, _PLAIN if option == "--strip-prefix" and text[0] == "^" else _LISTED)

    def pick(self, checkpoint: Checkpoint) -> Checkpoint:
        """Leave out what is not asked for. Where that goes, the first by name of what is tied to a tensor has it."""
        if not self._names.picks:
            return checkpoint
        ties = checkpoint.ties
        before = [tensor.name for tensor in checkpoint.tensors]
        kept = set(filter(self._is_kept, (*before, *ties)))
        left = [name for name in (*before, *ties) if name not in kept]
        if not left:
            return checkpoint
        heirs: dict[str, str] = {}
        for name, of in sorted(ties.items()):
            if name in kept and of not in kept:
                heirs.setdefault(of, name)
        now = {name: heirs.get(name, name) for name in before if name in kept or name in heirs}
        gone = {name for name in before if name not in now}
        files = tuple(_with_some(file, now, ties, kept - set(heirs.values()), gone) for file in checkpoint.files)
        told = name_some(fold_modules(left), _NAMED)
        note = f"left out, as --only and --drop have it: {len(left):,} of {len(before) + len(ties):,} names ({told})"
        return replace(
            checkpoint,
            files=files,
            notes=(*checkpoint.notes, note),
            renamed={**checkpoint.renamed, **heirs},
            is_renamed=True,
        )

    def _is_kept(self, name: str) -> bool:
        is_wanted = self._finds("--only", self._only, name) or not self._only
        return not self._finds("--drop", self._drop, name) and is_wanted

    def _finds(self, option: str, searches: Iterable[tuple[str, Callable[[str], object]]], name: str) -> bool:
        found = [regex for regex, search in searches if search(name)]
        for regex in found:
            self._unmatched[option].pop((0, regex), None)
        return bool(found)

    def rename(self, component: Component, checkpoint: Checkpoint, unwraps: bool) -> Checkpoint:
        """Give tensors the names that are asked for, those that ``unwrap`` gives in between."""
        prefix = self._names.strip_prefix
        if prefix and any(name.startswith(prefix) for name in _all_names(checkpoint)):
            self._unmatched["--strip-prefix"].clear()
            checkpoint = strip_prefix(checkpoint, prefix)
        if unwraps:
            checkpoint = unwrap(checkpoint, bool(component.class_names))
        if not (self._rules or self._names.add_prefix):
            return checkpoint
        path = checkpoint.weight_set.path
        prefix = self._names.add_prefix
        return _checked(checkpoint, {name: prefix + self._ruled(path, name) for name in _all_names(checkpoint)})

    def _ruled(self, path: Where, name: str) -> str:
        """Give the name that all rules make of one."""
        new = name
        for number, rule in enumerate(self._rules):
            found = rule.apply(new)
            if found is None:
                continue
            text, made = found
            self._unmatched["--rename"].pop((number, text), None)
            if not isinstance(made, str):
                raise BadRequest(path, f"would have a tensor {name!r} renamed to {made!r}, which is no text")
            new = made
            if len(new) > MAX_NAME:
                break  # which is refused
        return new


class _Rule(NamedTuple):
    """A step of a renaming: gives the text that matched a name, and the new name; ``texts`` are all that have to."""

    apply: Callable[[str], tuple[str, str] | None]
    texts: tuple[str, ...] = ()


def _rules_of(rename: Renaming) -> Iterable[_Rule]:
    if callable(rename):
        return [_Rule(lambda name: ("", rename(name)))]
    if isinstance(rename, Mapping):
        return [_Rule(lambda name: (name, rename[name]) if name in rename else None, tuple(rename))]
    return [_Rule(partial(_replaced, compiled(regex), replacement), (regex,)) for regex, replacement in rename]


def _replaced(pattern: re.Pattern[str], replacement: str, name: str) -> tuple[str, str] | None:
    new, count = pattern.subn(replacement, name)
    return (pattern.pattern, new) if count else None


def _with_some(
    file: WeightsFile, now: Mapping[str, str], ties: Mapping[str, str], tied: Container[str], gone: Container[str]
) -> WeightsFile:
    """Give a file with the tensors that stay, by their names ``now``, and of the ``ties`` the names in ``tied``.

    A note by the name of a tensor that has ``gone`` would tie that to another, and goes too.
    """
    notes = {
        key: now[ties[key]] if key in ties else note
        for key, note in file.metadata.items()
        if (key in tied if key in ties else not (key in gone and note in now))
    }
    if COMFY_NOTE in notes:
        notes[COMFY_NOTE] = note_without(notes[COMFY_NOTE], gone)
    tensors = tuple(tensor._replace(name=now[tensor.name]) for tensor in file.tensors if tensor.name in now)
    return replace(file, tensors=tensors, metadata=notes)


def _checked(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """Give tensors, and names that are tied to them, other names. Raises BadRequest for names that cannot be."""
    path, ties = checkpoint.weight_set.path, checkpoint.ties
    taken: dict[str, str] = {}
    for old, new in names.items():
        first = taken.setdefault(new, old)
        if first != old:
            raise BadRequest(path, f"would have two tensors named {new!r}: {first!r} and {old!r}", _APART)
        if not new:
            raise BadRequest(path, f"would have the tensor {old!r} without a name")
        if len(new) > MAX_NAME:
            problem = f"would give the tensor {old!r} a name of {len(new):,} characters, and {MAX_NAME:,} may be"
            raise BadRequest(path, problem)
        if new == METADATA_KEY:
            raise BadRequest(path, f"would have the tensor {old!r} named {new!r}, as headers call their own notes")
    others = {"format", *checkpoint.metadata} - ties.keys()
    for old in ties:
        if names[old] in others:
            raise BadRequest(path, f"would have a tied tensor {old!r} named {names[old]!r}, as its header has a note")
    renamed = rename_tensors(checkpoint, names)
    for note in renamed.ties.keys() - {names[old] for old in ties}:
        problem = f"would have a tensor named {renamed.ties[note]!r}, which is what its header notes as {note!r}"
        raise BadRequest(path, problem)
    return renamed


def _check_quantized(component: Component, before: Checkpoint, after: Checkpoint, new_names: Mapping[str, str]) -> None:
    """Raise BadRequest where quantized weights lose what they go with, or are no longer known by their names.

    ``new_names`` are those of the tensors that stay, by the old ones.
    """
    found = quantized_in(before)
    if not found:
        return
    path, names = before.weight_set.path, [tensor.name for tensor in before.tensors]
    owners = find_owners(found, names)
    parts = [*owners.items(), *((one.companion, one.weight) for one in found if one.scheme is not COMFY_MARKED)]
    parts += _marked(found, names, new_names)
    for part, weight in parts:
        if part in names and (part in new_names) != (weight in new_names):
            stays, goes = (weight, part) if weight in new_names else (part, weight)
            raise BadRequest(path, f"would have {stays!r} without {goes!r}, which it means nothing without", _TOGETHER)
    still = quantized_in(after)
    known = {one.weight: one.scheme for one in still}
    for one in found:
        new = new_names.get(one.weight)
        if new is not None and known.pop(new, None) != one.scheme:
            raise BadRequest(path, f"would have the quantized weight {one.weight!r} as {new!r}, and not be known by it")
    for weight in known:
        raise BadRequest(path, f"would have a weight {weight!r} that seems to be quantized, and is not")
    for part, weight in owners.items():
        if part in new_names and new_names[part] != _beside(new_names[weight], weight, part):
            problem = f"would have {part!r} as {new_names[part]!r}, and not beside {new_names[weight]!r}"
            raise BadRequest(path, problem, "Rename both alike.")
    _check_noted(before, after, new_names)
    if any(old != new for old, new in new_names.items()) and _lists_modules(component):
        problem = "is quantized, and its config lists modules by the names that they have"
        raise BadRequest(path, problem, "Dequantize it first, or rename a file without that config.")


def _beside(new: str, weight: str, part: str) -> str | None:
    """Give the name of what stands beside a weight where that is ``new``: what differs in their names stays so."""
    differs = (at for at, (one, other) in enumerate(zip(weight, part, strict=False)) if one != other)
    same = next(differs, min(len(weight), len(part)))
    own = weight[same:]
    return new.removesuffix(own) + part[same:] if new.endswith(own) else None


def _marked(found: Iterable[Quantized], names: Iterable[str], kept: Container[str]) -> Iterator[tuple[str, str]]:
    """Give each mark of ComfyUI's in a file with a weight that needs it, if one stays."""
    weight = next((one.weight for one in found if one.scheme in COMFY and one.weight in kept), None)
    for name in filter(is_mark, names) if weight else ():
        assert weight
        yield name, weight


def _check_noted(before: Checkpoint, after: Checkpoint, new_names: Mapping[str, str]) -> None:
    """Raise BadRequest where a note in a header no longer names the quantized modules that it did."""
    try:
        noted = [f"{module}.weight" for module in modules_noted(before)]
    except BadFile:  # whoever reads numbers by it says so
        return
    now = {f"{module}.weight" for module in modules_noted(after)} if noted else set()
    for weight in noted:
        if weight in new_names and new_names[weight] not in now:
            problem = (
                f"would have {weight!r} as {new_names[weight]!r}, and its header notes that the first is quantized"
            )
            raise BadRequest(before.weight_set.path, problem, "Dequantize it first.")


def _lists_modules(component: Component) -> bool:
    """Say whether what says how a component is quantized has names of modules in it."""
    beside = (read_json(component.path / name) for name in QUANTIZER_CONFIGS)
    return any(map(_has_texts, (quantization_of(component.config), *beside)))


def _has_texts(said: Any) -> bool:
    """Say whether a config has a list of texts, however deep."""
    if isinstance(said, dict):
        return any(map(_has_texts, said.values()))
    return isinstance(said, list) and any(isinstance(one, str) or _has_texts(one) for one in said)


def with_own_names(checkpoint: Checkpoint, component: Component, prefix: str) -> Checkpoint:
    """Take off names a prefix that is asked for, if any, and what wrappers put into them; raises what these two do."""
    if prefix:
        checkpoint = strip_prefix(checkpoint, prefix)
    return unwrap(checkpoint, bool(component.class_names))


def strip_prefix(checkpoint: Checkpoint, prefix: str) -> Checkpoint:
    """Take a prefix off the names of all tensors that have it.

    Raises BadRequest where none has it, or for names that cannot be.
    """
    path = checkpoint.weight_set.path
    before = _all_names(checkpoint)
    if not any(name.startswith(prefix) for name in before):
        problem = f"has no tensor whose name begins with {prefix!r}"
        raise BadRequest(path, problem, _LISTED)
    return _checked(checkpoint, {name: name.removeprefix(prefix) for name in before})


def _all_names(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Give the names of all tensors, and those that are tied to one."""
    return (*(tensor.name for tensor in checkpoint.tensors), *checkpoint.ties)


def unwrap(checkpoint: Checkpoint, is_known: bool) -> Checkpoint:
    """Take off what wrappers of torch put into the names of tensors, where it ``is_known`` which model that is.

    ``module.`` goes where all names begin with it. A note says what was taken off, or how it would be. Raises
    Unsupported where two tensors would come to one name.
    """
    before = [tensor.name for tensor in checkpoint.tensors]
    names = _without_wrappers((*before, *checkpoint.ties))
    changed = sum(names[name] != name for name in before)
    if not changed:
        return checkpoint
    if not is_known:
        return replace(checkpoint, notes=(*checkpoint.notes, _note_wrappers(before)))
    if len({names[name] for name in before}) < len(before):
        problem = "holds two tensors that come to one name once what wrappers put into their names is taken off"
        raise Unsupported(checkpoint.weight_set.path, problem, "Save the model that is wrapped.")
    found = f"{_wrappers_in(before)} is taken off the names of {changed:,} tensors"
    note = f"{found}: a wrapper's, and no part of what the model's own class has"
    return replace(rename_tensors(checkpoint, names), notes=(*checkpoint.notes, note))


def find_wrappers(names: Sequence[str]) -> str:
    """List what would be taken off names as a wrapper's; nothing where they are a model's own."""
    inner = _without_wrappers(names)
    return _wrappers_in(names) if any(inner[name] != name for name in names) else ""


def _without_wrappers(names: Sequence[str]) -> dict[str, str]:
    inner = {name: _without(name) if any(one in name for one in _WRAPPERS) else name for name in names}
    prefix = f"{_DATA_PARALLEL}."
    while inner and all(name.startswith(prefix) for name in inner.values()):
        inner = {name: left.removeprefix(prefix) for name, left in inner.items()}
    return inner


def _without(name: str) -> str:
    *path, last = name.split(".")
    return ".".join((*(part for part in path if part not in _WRAPPERS), last))


def _wrappers_in(names: Sequence[str]) -> str:
    """List what wrappers are known by in names."""
    parts = {part for name in names for part in name.split(".")[:-1]}
    leading = [_DATA_PARALLEL] if _DATA_PARALLEL in _leading_wrappers(names).split(".") else []
    return ", ".join(f"{part}." for part in (*leading, *(part for part in _WRAPPERS if part in parts)))


def _leading_wrappers(names: Sequence[str]) -> str:
    """Give what all names begin with, as far as that is wrappers'."""
    prefix = ""
    for part in names[0].split(".")[:-1]:
        longer = f"{prefix}{part}."
        if part not in (_DATA_PARALLEL, *_WRAPPERS) or not all(name.startswith(longer) for name in names):
            break
        prefix = longer
    return prefix


def _note_wrappers(names: Sequence[str]) -> str:
    prefix = _leading_wrappers(names)
    if prefix:
        return f"names of its tensors begin with {prefix}, as a wrapper has them: --strip-prefix {prefix} takes it off"
    found = _wrappers_in(names)
    return f"names of its tensors hold {found} as wrappers have it: it is taken off where a config.json names a class"


def rename_tensors(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """Give all tensors other names, which must be different from each other, in the notes on ties too.

    A note that ties a name to a tensor, and is wrong since a tensor of that name is there, goes.
    """
    ties = checkpoint.ties

    def rename(file: WeightsFile) -> WeightsFile:
        notes = {key: note for key, note in file.metadata.items() if not (key in names and note in names)}
        notes |= {names.get(key, key): names[ties[key]] for key in file.metadata if key in ties}
        tensors = tuple(tensor._replace(name=names[tensor.name]) for tensor in file.tensors)
        return replace(file, tensors=tensors, metadata=notes)

    return replace(checkpoint, files=tuple(map(rename, checkpoint.files)), is_renamed=True)

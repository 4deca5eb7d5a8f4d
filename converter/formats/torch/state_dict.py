"""The state dict in what a checkpoint holds, found by what it is: a mapping of names to tensors.

A whole module is one too, by what its ``state_dict()`` would give; and so is all that lies nested below a key, where
that is asked for.
"""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from converter.dtypes import DType
from converter.errors import BadFile, BadRequest, HostileFile, TrainingPiece, Unsupported, Where, name_some, spell_size
from converter.formats.torch.globals import is_array, is_tensor
from converter.formats.torch.modules import Walk, is_level, is_module, spell_key
from converter.formats.torch.rebuild import Left, Listed, Part, StorageRef, TensorRef, Unreadable
from converter.formats.torch.unpickler import Inert, KeptObject, Pickled
from converter.tensors.base import Storage, TensorSource, remembered
from converter.tensors.view import View, span_of

AnyTensor = TensorRef | Listed

_MAX_DEPTH = 16  # trainers nest two or three
_MAX_CONTAINERS = 200_000  # an optimizer keeps one or two for each tensor, and three tensors more
MAX_TENSORS = 200_000  # in all dicts together; a pickle of all the steps there are describes 160,000
MAX_NAME_LENGTH = 100_000  # of a tensor: no module is nested so deep
MAX_NAMES_LENGTH = 25_000_000  # of all tensors together: the most there may be, of 125 characters each
_CONTAINERS = (dict, list, tuple, KeptObject)  # a TensorRef is one of them
_SHORT = 8
_MAX_NAMED = 8
# What serves where there is no state dict: an object of a class, and anything else.
_ADVICE = {
    True: "Where you trust it and have its class, torch.load(..., weights_only=False) makes it: save the state_dict() "
    "of the model in it.",
    False: "Save a state dict: names to tensors.",
}
_NO_OPTIMIZER = "Name the file or the folder with the weights; --key takes what is in it all the same."
_META = "Save it from a model whose weights were loaded."
_TENSORS = frozenset({TensorRef, Listed})
_RANKED = "It is one rank's part of a tensor: name the folder in which the files of all ranks lie."
_INCOMPLETE = "The file is incomplete: fetch it again."

# What trainers keep beside the weights (Lightning's ``dump_checkpoint``, accelerate, mmengine): no state dict of theirs
# is taken for the model's.
_TRAINING = ("optim", "sched", "scaler", "callback", "loops", "rng", "hyper_param", "hparams", "criterion")
_TRAINING_NAMES = frozenset({"amp", "args", "cfg", "config", "dataloader", "train_state"})


@dataclass(frozen=True, slots=True)
class Reading:
    """How a pickled checkpoint is read: ``key`` chooses one of several state dicts in it, by the path of its keys.

    With ``flatten`` all that is nested below that key, or at all, is one state dict. With ``strip_code`` calls of
    functions that no state dict needs are left out, rather than refused, and with ``skip_unreadable`` tensors that are
    none of ours; with ``lenient`` the largest state dict is taken where several are there.
    """

    key: str | None = None
    strip_code: bool = False
    skip_unreadable: bool = False
    lenient: bool = False
    flatten: bool = False


PLAIN = Reading()


@dataclass(frozen=True, slots=True)
class _Found:
    path: tuple[str, ...]
    tensors: Mapping[str | int, AnyTensor]
    unreadable: Mapping[str | int, str]  # and why, of each
    beside: tuple[Any, ...]  # the keys of what the dict holds but those tensors
    is_training: bool
    wholes: tuple[tuple[str, str], ...] = ()  # of whole modules, where each is, and its class
    classes: frozenset[str] = frozenset()  # of those and all modules in them

    @property
    def key(self) -> str:
        return ".".join(self.path)

    @property
    def nbytes(self) -> int:
        return sum(ref.dtype.nbytes(prod(ref.shape)) for ref in self.tensors.values())

    @property
    def is_lone_number(self) -> bool:
        """Whether it holds one tensor of one element, as a trainer's best loss is."""
        return not self.unreadable and [prod(ref.shape) for ref in self.tensors.values()] == [1]

    def __str__(self) -> str:
        count = len(self.tensors)
        return f"{self.key or 'the top level'} ({count:,} tensor{'s' * (count != 1)}, {spell_size(self.nbytes)})"


class Chosen(NamedTuple):
    """The one state dict in a pickle's value, notes on what is left out, and globals that it does not need.

    Those are as in Pickled; the classes of modules that were taken ``hold`` tensors.
    """

    state_dict: dict[str, AnyTensor]
    notes: tuple[str, ...]
    foreign: Mapping[str, str]


def choose_state_dict(pickled: Pickled, where: Where, reading: Reading) -> Chosen:
    """Choose the names and tensors of the one state dict that is meant.

    Raises BadRequest where several could be meant, or the key names none; Unsupported where there is none.
    """
    value = pickled.value
    if not (is_module(value) or type(value) in (dict, list, tuple)):
        raise Unsupported(where, f"holds {_kind(value)}, not a state dict", _ADVICE[type(value) in (Inert, KeptObject)])
    found = list(_find(value, where))
    if reading.key is None and not reading.flatten and _is_optimizers(value):
        raise Unsupported(where, "holds the state of an optimizer, and no weights", _NO_OPTIMIZER)
    if reading.flatten:
        chosen = _flatten(value, found, where, reading)
    elif found:
        chosen = _choose(found, where, reading)
    elif value == {}:
        return Chosen({}, (), pickled.foreign)
    else:
        raise Unsupported(where, "holds no tensors under names of their own", _describe(value))
    if chosen.unreadable and not reading.skip_unreadable:
        refuse_unreadable(chosen.unreadable, where)
    check_lengths(map(str, chosen.tensors), where)
    state_dict: dict[str, AnyTensor] = {}
    for key, tensor in chosen.tensors.items():
        name = str(key)
        if name in state_dict:
            raise BadFile(where, f"holds two tensors named {name!r}")
        state_dict[name] = tensor
    foreign = {name: "holds" if name in chosen.classes else how for name, how in pickled.foreign.items()}
    return Chosen(state_dict, tuple(_notes(value, foreign, chosen, found)), foreign)


def _is_optimizers(value: Any) -> bool:
    """Say whether a pickle holds what an optimizer's ``state_dict()`` gives, by itself or under its name, alone."""
    if not isinstance(value, dict):
        return False
    return {*value} == {"state", "param_groups"} or (len(value) == 1 and "optim" in spell_key(next(iter(value))))


def check_lengths(names: Iterable[str], where: Where) -> None:
    """Raise HostileFile for names of tensors that are longer than any real ones."""
    length = 0
    for name in names:
        length += len(name)
        if len(name) > MAX_NAME_LENGTH or length > MAX_NAMES_LENGTH:
            raise HostileFile(where, f"gives its tensors names of {length:,} characters and more")


def refuse_unreadable(unreadable: Mapping[str | int, str], where: Where) -> None:
    """Raise Unsupported, and name the first tensor that cannot be read."""
    name, why = next(iter(unreadable.items()))
    more = f", and {len(unreadable) - 1:,} more cannot be read" if len(unreadable) > 1 else ""
    advice = "Save it as a plain tensor; 'wconv to-safetensors --skip-unreadable' leaves such tensors out."
    raise Unsupported(where, f"tensor {spell_key(name)!r} {why}{more}", advice)


def resolve(
    state_dict: dict[str, AnyTensor], find: Callable[[StorageRef], Storage | None], where: Where
) -> Iterator[tuple[str, TensorRef, View]]:
    """Take the tensors out of a dict, and yield each with the view that it is, given where each storage lies.

    Raises BadFile where a storage is not there, or not long enough, and TrainingPiece for a part of a tensor.
    """
    dtypes: dict[str, DType] = {}
    # Each entry goes as its view comes: the one takes the other's memory.
    for name in list(state_dict):
        ref = state_dict.pop(name)
        if isinstance(ref, Listed):
            kind = ref.of.kind if type(ref.of) is Part else "another file"
            raise TrainingPiece(where, f"tensor {name!r} is of the class {kind}", _RANKED)
        storage = ref.storage
        if storage.dtype and dtypes.setdefault(storage.key, storage.dtype) is not storage.dtype:
            raise BadFile(where, f"tensor {name!r} takes its storage for another dtype than a tensor before it")
        if storage.device == "meta":
            raise Unsupported(where, f"tensor {name!r} is on the meta device: it has no values", _META)
        record = find(storage)
        if record is None:
            raise BadFile(where, f"the record of tensor {name!r} is missing (data/{storage.key})", _INCOMPLETE)
        nbytes = storage.nbytes
        if nbytes != record.nbytes:
            problem = f"the record of tensor {name!r} has {record.nbytes:,} bytes, its storage claims {nbytes:,}"
            raise BadFile(where, problem, _INCOMPLETE)
        shape, strides, numel, span, most = _measure(ref.shape, ref.strides)
        if not numel and most >= 1 << 63:
            raise BadFile(where, f"tensor {name!r} is empty, but its shape has numbers beyond torch's")
        end = (ref.start + span) * ref.dtype.bits if numel else 0
        if end > nbytes * 8 or numel >= 1 << 63:
            raise BadFile(where, f"tensor {name!r} reaches past the end of its record")
        yield name, ref, View(ref.dtype, shape, record, ref.start, strides)


@remembered
def _measure(
    shape: tuple[int, ...], strides: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], int, int, int]:
    """Give a shape and strides, the elements, those that are spanned, and how many they were if no axis were empty."""
    return shape, strides, prod(shape), span_of(shape, strides), prod(length or 1 for length in shape)


def negated(source: TensorSource, ref: TensorRef) -> TensorSource:
    """Give what a tensor reads with the signs that its bits of lazy views ask for."""
    if not ref.negated:
        return source
    from converter.tensors.derived import Negated  # few files need it

    return Negated(source, ref.negated)


def _find(value: Any, where: Where) -> Iterator[_Found]:
    seen: set[int] = set()
    plain: set[int] = set()
    count = 0
    walk = Walk(where)

    def is_plain(content: Any) -> bool:
        # A trainer's log has a dict or a tuple a step, of numbers alone: there is nothing to be found in those. What
        # is long may be handed out many times, and is looked through once.
        if id(content) in plain:
            return True
        values = content.values() if isinstance(content, dict) else content
        if any(isinstance(value, _CONTAINERS) for value in values):
            return False
        if len(content) > _SHORT:
            plain.add(id(content))
        return True

    waiting: deque[tuple[tuple[str, ...], Any, bool]] = deque([((), value, False)])
    while waiting:
        path, content, is_training = waiting.popleft()
        if id(content) in seen or len(path) > _MAX_DEPTH:
            continue
        seen.add(id(content))
        one = _tensors_in(path, content, is_training, walk)
        count += len(one.tensors) + len(one.unreadable)
        _check_count(count, where)
        if one.tensors or one.unreadable:
            yield one
        for key, inner in _levels_in(content):
            if is_module(inner) or not is_plain(inner):
                is_trainers = isinstance(content, dict) and is_training_key(key)
                waiting.append(((*path, spell_key(key)), inner, is_training or is_trainers))
                if len(seen) + len(waiting) > _MAX_CONTAINERS:
                    raise HostileFile(where, f"its pickle holds more than {_MAX_CONTAINERS:,} dicts and lists")


def _check_count(count: int, where: Where) -> None:
    if count > MAX_TENSORS:
        raise HostileFile(where, f"its pickle describes more than {MAX_TENSORS:,} tensors")


def _levels_in(content: Any) -> Iterator[tuple[Any, Any]]:
    """Give what may hold state dicts and is in a dict or a list; a module is one, with all that is in it."""
    if is_module(content):
        return iter(())
    entries = _other_than_tensors(content).items() if isinstance(content, dict) else enumerate(content)
    return ((key, inner) for key, inner in entries if is_level(inner))


def _tensors_in(path: tuple[str, ...], content: Any, is_training: bool, walk: Walk) -> _Found:
    """Give the tensors that a module holds, or a dict as its own; a list has none."""
    if is_module(content):
        tensors, others = _sort(walk.leaves(content), walk.where)
        unreadable = {name: _why_no_weight(inner) for name, inner in others.items()}
        wholes = ((".".join(path), content.name),)
        return _Found(path, tensors, unreadable, (), is_training, wholes, walk.take_classes())
    if not isinstance(content, dict):
        return _Found(path, {}, {}, (), is_training)
    return _in_dict(path, content, is_training)


def _in_dict(path: tuple[str, ...], content: Mapping[Any, Any], is_training: bool) -> _Found:
    others = _other_than_tensors(content)
    tensors = _tensors_of(content, others)
    unreadable = unreadable_in(others, bool(tensors))
    beside = tuple(key for key in others if key not in unreadable)
    is_beside = path == () and bool(beside) and all(map(is_training_key, tensors or unreadable))
    return _Found(path, tensors, unreadable, beside, is_training or is_beside)


def _sort(leaves: Iterable[tuple[str, Any]], where: Where) -> tuple[dict[str | int, AnyTensor], dict[str | int, Any]]:
    """Tell tensors from what else there is under names. Raises BadFile for a name that stands twice."""
    tensors: dict[str | int, AnyTensor] = {}
    others: dict[str | int, Any] = {}
    for name, inner in leaves:
        if name in tensors or name in others:
            raise BadFile(where, f"holds two tensors named {spell_key(name)!r}")
        (tensors if type(inner) in _TENSORS else others)[name] = inner
        _check_count(len(tensors), where)
    return tensors, others


def _flatten(value: Any, found: list[_Found], where: Where, reading: Reading) -> _Found:
    """Give all tensors below a key, or in all but what is a trainer's, under their paths from there.

    Places in lists are names too, as ``flatten_state_dict`` of ``torch/distributed/checkpoint/_nested_dict.py`` has
    them.
    """
    walk = Walk(where)
    path, level = ((), value) if reading.key is None else _find_level(value, reading.key, walk, found)
    tensors: dict[str | int, AnyTensor] = {}
    unreadable: dict[str | int, str] = {}
    beside: list[str] = []
    is_all = reading.key is not None or is_module(level)
    for key, inner, is_nested in walk.entries(level):
        if not is_all and is_training_key(key):
            beside.append(key)
            continue
        own, others = _sort(walk.leaves(inner, f"{key}.") if is_nested else [(key, inner)], where)
        why = {name: why for name, other in others.items() if (why := _why_unreadable(other) or _why_no_tensor(other))}
        for name in (*own, *why):
            if name in tensors or name in unreadable:
                advice = "Take one of them alone, with --key."
                raise Unsupported(where, f"holds two tensors that would be named {spell_key(name)!r}", advice)
        tensors.update(own)
        unreadable.update(why)
        # Where there is none in what stands under a key, that names it all.
        beside.extend([str(name) for name in others if name not in why] if own or why else [key])
        _check_count(len(tensors) + len(unreadable), where)
    if not tensors and not unreadable:
        raise Unsupported(where, "holds no tensors there, but for a trainer's", "--key names what is flattened.")
    if not is_all:
        _refuse_trainers_below(found, where)
    wholes = (one for one in found if one.path[: len(path)] == path or path[: len(one.path)] == one.path)
    wholes = (one for one in wholes if is_all or not one.is_training)
    named = tuple(itertools.chain.from_iterable(one.wholes for one in wholes))
    return _Found(path, tensors, unreadable, tuple(beside), False, named, walk.take_classes())


def _refuse_trainers_below(found: list[_Found], where: Where) -> None:
    """Raise BadRequest where a trainer's tensors lie deeper, as in ``{"app": {"model": ..., "optim": ...}}``."""
    own = [one for one in found if one.is_training and not any(map(is_training_key, one.path[:1]))]
    own = [one for one in own if any(map(is_training_key, one.path[1:]))]
    if own:
        problem = f"holds what is a trainer's within what would be flattened: {_list(own)}"
        raise BadRequest(where, problem, "Name what is meant with --key KEY --flatten.")


def _find_level(value: Any, key: str, walk: Walk, found: list[_Found]) -> tuple[tuple[str, ...], Any]:
    """Give what a key names, of which dots may be a part, and its path. Raises BadRequest where that is nothing."""
    waiting: list[tuple[tuple[str, ...], Any, str]] = [((), value, key)]
    while waiting:
        path, level, left = waiting.pop()
        for name, inner, is_nested in walk.entries(level):
            if is_nested and name == left:
                return (*path, name), inner
            if is_nested and left.startswith(f"{name}.") and len(path) < _MAX_DEPTH:
                waiting.append(((*path, name), inner, left.removeprefix(f"{name}.")))
    raise BadRequest(walk.where, f"has no dict at {key!r}", f"It has: {_list(found)}.")


def _other_than_tensors(content: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Give what a dict holds but tensors under names of their own."""
    return {k: inner for k, inner in content.items() if type(inner) not in _TENSORS or not isinstance(k, (str, int))}


def _tensors_of(content: Mapping[Any, Any], others: Mapping[Any, Any]) -> Mapping[str | int, AnyTensor]:
    """Give what a dict holds but the ``others``; most hold nothing else."""
    return {key: inner for key, inner in content.items() if key not in others} if others else content


def unreadable_in(others: Mapping[Any, Any], has_tensors: bool) -> dict[str | int, str]:
    """Map the names of tensors that are none of ours to why; arrays and storages only where they stand with tensors."""
    names = {k: inner for k, inner in others.items() if type(inner) not in _TENSORS and isinstance(k, (str, int))}
    found = {key: why for key, inner in names.items() if (why := _why_unreadable(inner))}
    others = {key: why for key, inner in names.items() if has_tensors and (why := _why_no_tensor(inner))}
    return {**found, **others}


def _why_unreadable(value: Any) -> str:
    if type(value) is Unreadable:
        return value.why
    is_one = type(value) in (Inert, KeptObject) and is_tensor(value.name) and not is_module(value)
    return f"is of the class {value.name}" if is_one else ""


def _why_no_tensor(value: Any) -> str:
    if type(value) is StorageRef:
        return "is a storage, and no tensor"
    if type(value) in (list, tuple):  # as torch packs the weights of its quantized modules
        return next((f"holds one that {one.why}" for one in value[:_MAX_NAMED] if type(one) is Unreadable), "")
    return "is an array of numpy" if type(value) is Inert and is_array(value.name) else ""


def _why_no_weight(value: Any) -> str:
    """Say why what a module holds in the place of a tensor cannot be read."""
    return _why_unreadable(value) or _why_no_tensor(value) or f"is {_kind(value)}, and no tensor"


def is_training_key(key: Any) -> bool:
    """Say whether what a dict holds under a key is a trainer's, and no weights."""
    # Optimizers number the tensors that they keep a state of.
    if type(key) is int:
        return True
    spelled = spell_key(key).lower()
    return spelled in _TRAINING_NAMES or any(word in spelled for word in _TRAINING)


def _choose(found: list[_Found], where: Where, reading: Reading) -> _Found:
    if reading.key is not None:
        named = [one for one in found if one.key == reading.key]
        if not named:
            raise BadRequest(where, f"has no state dict at {reading.key!r}", f"It has: {_list(found)}.")
        return named[0]
    likely = [one for one in found if not one.is_training]
    likely = [one for one in likely if not _is_beside_another(one, likely)]
    if reading.lenient:
        return max(likely or found, key=lambda one: one.nbytes)
    if len(likely) != 1:
        if not likely:
            raise Unsupported(where, "holds no state dict of a model", f"--key takes another: {_list(found)}.")
        raise BadRequest(
            where, f"holds several state dicts: {_list(likely)}", f"Choose one with --key{_or_all(likely)}."
        )
    return likely[0]


def _is_beside_another(one: _Found, likely: Iterable[_Found]) -> bool:
    """Say whether a dict has but a number of its own, and holds a state dict: it is no state dict then."""
    if not one.is_lone_number:
        return False
    depth = len(one.path)
    below = (other for other in likely if len(other.path) > depth and other.path[:depth] == one.path)
    return any(not other.is_lone_number for other in below)


def _or_all(likely: list[_Found]) -> str:
    """Say how several dicts are taken in one, where they lie in one, or none at the top is like another."""
    first, last = min(one.path for one in likely), max(one.path for one in likely)
    common = next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    branches: dict[tuple[str, ...], set[Any]] = defaultdict(set)
    for one in likely:
        branches[one.path[:1]].update((one.path[1:], name, ref.shape) for name, ref in one.tensors.items())
    if not common and len(set(map(frozenset, branches.values()))) < len(branches):
        return ""
    key = f" --key {'.'.join(first[:common])}" if common else ""
    return f", or take all of them in one with{key} --flatten"


def _notes(value: Any, foreign: Mapping[str, str], chosen: _Found, found: list[_Found]) -> Iterator[str]:
    others = _list_others(chosen, found)
    if others:
        yield f"only {chosen} is taken, and not {_list(others)}"
    for key, name in chosen.wholes[:_MAX_NAMED]:
        yield (
            f"{key or 'it'} is a whole {name}: taken as its state_dict() would give it, parameters and buffers alone; "
            "its class was never imported"
        )
    beside = list(_left_beside(value, chosen))
    if beside:
        seen: set[int] = set()
        named = [_spell_left(*one, nbytes_in(one[-1], seen)) for one in beside[:_MAX_NAMED]]
        yield f"left out: {name_some([*named, *beside[_MAX_NAMED:]], _MAX_NAMED)}"
    if chosen.unreadable:
        named = [f"{spell_key(name)} ({why})" for name, why in itertools.islice(chosen.unreadable.items(), _MAX_NAMED)]
        yield f"tensors that cannot be read are left out ({len(chosen.unreadable):,} in all): {_list(named)}"
    yield from note_foreign(foreign)


def join_foreign(many: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Join what the pickles of several files do with globals: whatever one of them calls, all do."""
    joined: dict[str, str] = {}
    for foreign in many:
        joined |= {name: how for name, how in foreign.items() if joined.get(name) != "calls"}
    return joined


def note_foreign(foreign: Mapping[str, str]) -> Iterator[str]:
    """Say what a pickle makes, or calls, that no state dict needs."""
    for what, note in (
        ("makes", "objects of unknown classes were left out"),
        ("calls", "functions that its pickle calls were not called"),
    ):
        names = [name for name, how in foreign.items() if how == what]
        if names:
            yield f"{note}: {_list(names)}"


def _list_others(chosen: _Found, found: list[_Found]) -> list[_Found]:
    """List the state dicts that could have been meant, but for those whose tensors are taken or named by themselves."""
    depth = len(chosen.path)
    is_flat = all(one is not chosen for one in found)
    others = (one for one in found if one is not chosen and not one.is_training)
    others = (one for one in others if one.path or not one.is_lone_number)
    return [one for one in others if not is_flat or one.path[:depth] != chosen.path]


def _left_beside(value: Any, chosen: _Found) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Give what lies beside a state dict, on the way to it and in it: the path to that, its key, and what it is."""
    level = value
    for depth, step in enumerate(chosen.path):
        taken = None
        for key, inner in _entries_of(level):
            if spell_key(key) == step:
                taken = inner
            else:
                yield chosen.path[:depth], key, inner
        level = taken
    known = dict(_entries_of(level))
    yield from ((chosen.path, key, known.get(key)) for key in chosen.beside)


def _spell_left(path: tuple[str, ...], key: Any, _: Any, nbytes: int) -> str:
    name = ".".join((*path, spell_key(key)))
    return f"{name} ({spell_size(nbytes)})" if nbytes else name


def _entries_of(level: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(level, dict):
        return level.items()
    return enumerate(level) if type(level) in (list, tuple) else ()


def nbytes_in(value: Any, seen: set[int]) -> int:
    """Give the bytes of all that is known to be nested in a value, but for what was ``seen`` already.

    Those are the storages of its tensors, and what a listing says of tensors and the rest.
    """
    nbytes = 0
    storages: dict[str, int] = {}
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        if type(inner) is TensorRef:
            storages[inner.storage.key] = inner.storage.nbytes
        elif type(inner) is Listed:
            nbytes += inner.dtype.nbytes(prod(inner.shape))
        elif type(inner) is Left:
            nbytes += inner.nbytes
        elif isinstance(inner, _CONTAINERS) and id(inner) not in seen:
            seen.add(id(inner))
            if isinstance(inner, (Inert, KeptObject)):
                waiting.append(inner.state)
            if not isinstance(inner, KeptObject):
                values = inner.values() if isinstance(inner, dict) else inner
                waiting.extend(one for one in values if isinstance(one, _CONTAINERS))
    return nbytes + sum(storages.values())


def _list(things: list[Any]) -> str:
    return name_some([*map(spell_key, things[:_MAX_NAMED]), *things[_MAX_NAMED:]], _MAX_NAMED)


def _describe(value: Any) -> str:
    if not isinstance(value, dict) or not value:
        return _ADVICE[False]
    objects = any(type(inner) is Inert for inner in value.values())
    named = [f"{spell_key(key)} ({_kind(inner)})" if type(inner) is Inert else key for key, inner in value.items()]
    return f"It holds: {_list(named)}." + (f" {_ADVICE[True]}" if objects else "")


def _kind(value: Any) -> str:
    if type(value) in (Inert, KeptObject):
        return f"{'a whole' if is_module(value) else 'an object of the class'} {value.name}"
    kinds = {
        TensorRef: "a tensor",
        Listed: "a tensor",
        Unreadable: "a tensor",
        StorageRef: "a storage",
        type(None): "None",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")

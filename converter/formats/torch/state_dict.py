"""The state dict in what a checkpoint holds, found by what it is: a mapping of names to tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from math import prod
from typing import Any

from converter.dtypes import DType
from converter.errors import BadFile, BadRequest, HostileFile, TrainingPiece, Unsupported, Where, name_some
from converter.formats.torch.globals import is_array, is_tensor
from converter.formats.torch.rebuild import Left, Listed, Part, StorageRef, TensorRef, Unreadable
from converter.formats.torch.unpickler import Inert, KeptObject, Pickled
from converter.tensors.base import Storage, TensorSource
from converter.tensors.view import View, span_of

AnyTensor = TensorRef | Listed

_MAX_DEPTH = 16  # trainers nest two or three
_MAX_CONTAINERS = 200_000  # an optimizer keeps one or two for each tensor, and three tensors more
MAX_TENSORS = 200_000  # in all dicts together; a pickle of all the steps there are describes 160,000
MAX_NAME_LENGTH = 100_000  # of a tensor: no module is nested so deep
MAX_NAMES_LENGTH = 25_000_000  # of all tensors together: the most there may be, of 125 characters each
_CONTAINERS = (dict, list, tuple)  # a TensorRef is one of them
_SHORT = 8
_MAX_KEY_LENGTH = 200  # of what is spelled to people, or looked at for what it is
_MAX_NAMED = 8
# What serves where there is no state dict: an object of a class, and anything else.
_ADVICE = {
    True: "Where you trust it and have its class, torch.load(..., weights_only=False) makes it: save its state_dict().",
    False: "Save a state dict: names to tensors.",
}
_META = "Save it from a model whose weights were loaded."
_TENSORS = frozenset({TensorRef, Listed})
_LEAVES = (TensorRef, Listed, Unreadable, StorageRef, Left)  # tuples, and no containers
_RANKED = "It is one rank's part of a tensor: name the folder in which the files of all ranks lie."
_INCOMPLETE = "The file is incomplete: fetch it again."

# What trainers keep beside the weights (Lightning's ``dump_checkpoint``, accelerate, mmengine): no state dict of theirs
# is taken for the model's.
_TRAINING = ("optim", "sched", "scaler", "callback", "loops", "rng", "hyper_param", "hparams", "criterion")
_TRAINING_NAMES = frozenset({"amp", "args", "cfg", "config", "dataloader", "train_state"})


@dataclass(frozen=True, slots=True)
class Reading:
    """How a pickled checkpoint is read: ``key`` chooses one of several state dicts in it, by the path of its keys.

    With ``strip_code`` calls of functions that no state dict needs are left out, rather than refused, and with
    ``skip_unreadable`` tensors that are none of ours; with ``lenient`` the largest state dict is taken where several
    are there.
    """

    key: str | None = None
    strip_code: bool = False
    skip_unreadable: bool = False
    lenient: bool = False


PLAIN = Reading()


@dataclass(frozen=True, slots=True)
class _Found:
    path: tuple[str, ...]
    tensors: Mapping[str | int, AnyTensor]
    unreadable: Mapping[str | int, str]  # and why, of each
    beside: tuple[Any, ...]  # the keys of what the dict holds but those tensors
    is_training: bool

    @property
    def key(self) -> str:
        return ".".join(self.path)

    @property
    def nbytes(self) -> int:
        return sum(ref.dtype.nbytes(prod(ref.shape)) for ref in self.tensors.values())

    def __str__(self) -> str:
        count = len(self.tensors)
        return f"{self.key or 'the top level'} ({count:,} tensor{'s' * (count != 1)}, {_spell_size(self.nbytes)})"


def choose_state_dict(pickled: Pickled, where: Where, reading: Reading) -> tuple[dict[str, AnyTensor], tuple[str, ...]]:
    """Give the names and tensors of the one state dict in a pickle's value, and notes on what is left out.

    Raises BadRequest where several could be meant, or the key names none; Unsupported where there is none.
    """
    value = pickled.value
    if not isinstance(value, _CONTAINERS) or type(value) in (*_LEAVES, Inert):
        raise Unsupported(where, f"holds {_kind(value)}, not a state dict", _ADVICE[type(value) is Inert])
    found = list(_find(value, where))
    if not found:
        if value == {}:
            return {}, ()
        raise Unsupported(where, "holds no tensors under names of their own", _describe(value))
    chosen = _choose(found, where, reading)
    if chosen.unreadable and not reading.skip_unreadable:
        refuse_unreadable(chosen.unreadable, where)
    check_lengths(map(str, chosen.tensors), where)
    state_dict: dict[str, AnyTensor] = {}
    for key, tensor in chosen.tensors.items():
        name = str(key)
        if name in state_dict:
            raise BadFile(where, f"holds two tensors named {name!r}")
        state_dict[name] = tensor
    return state_dict, tuple(_notes(pickled, chosen, found))


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
    raise Unsupported(where, f"tensor {_spell(name)!r} {why}{more}", advice)


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


@lru_cache(1024)  # most tensors have one of a few shapes, and then share it
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
        is_mapping = isinstance(content, dict)
        others = _other_than_tensors(content) if is_mapping else {}
        tensors = _tensors_of(content, others) if is_mapping else {}
        unreadable = unreadable_in(others, bool(tensors))
        count += len(tensors) + len(unreadable)
        if count > MAX_TENSORS:
            raise HostileFile(where, f"its pickle describes more than {MAX_TENSORS:,} tensors")
        if tensors or unreadable:
            beside = tuple(key for key in others if key not in unreadable)
            is_beside = path == () and bool(beside) and all(map(is_training_key, tensors or unreadable))
            yield _Found(path, tensors, unreadable, beside, is_training or is_beside)
        for key, inner in others.items() if is_mapping else enumerate(content):
            if isinstance(inner, _CONTAINERS) and type(inner) not in _LEAVES and not is_plain(inner):
                waiting.append(((*path, _spell(key)), inner, is_training or (is_mapping and is_training_key(key))))
                if len(seen) + len(waiting) > _MAX_CONTAINERS:
                    raise HostileFile(where, f"its pickle holds more than {_MAX_CONTAINERS:,} dicts and lists")


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
    return f"is of the class {value.name}" if type(value) in (Inert, KeptObject) and is_tensor(value.name) else ""


def _why_no_tensor(value: Any) -> str:
    if type(value) is StorageRef:
        return "is a storage, and no tensor"
    if type(value) in (list, tuple):  # as torch packs the weights of its quantized modules
        return next((f"holds one that {one.why}" for one in value[:_MAX_NAMED] if type(one) is Unreadable), "")
    return "is an array of numpy" if type(value) is Inert and is_array(value.name) else ""


def is_training_key(key: Any) -> bool:
    """Say whether what a dict holds under a key is a trainer's, and no weights."""
    # Optimizers number the tensors that they keep a state of.
    if type(key) is int:
        return True
    spelled = _spell(key).lower()
    return spelled in _TRAINING_NAMES or any(word in spelled for word in _TRAINING)


def _spell(key: Any) -> str:
    """Spell a key, as far as people would read it: one long text may be the key of many dicts."""
    return str(key[:_MAX_KEY_LENGTH] if isinstance(key, (str, bytes)) else key)


def _choose(found: list[_Found], where: Where, reading: Reading) -> _Found:
    if reading.key is not None:
        named = [one for one in found if one.key == reading.key]
        if not named:
            raise BadRequest(where, f"has no state dict at {reading.key!r}", f"It has: {_list(found)}.")
        return named[0]
    likely = [one for one in found if not one.is_training]
    if reading.lenient:
        return max(likely or found, key=lambda one: one.nbytes)
    if len(likely) != 1:
        if not likely:
            raise Unsupported(where, "holds no state dict of a model", f"--key takes another: {_list(found)}.")
        raise BadRequest(where, f"holds several state dicts: {_list(likely)}", "Choose one with --key.")
    return likely[0]


def _notes(pickled: Pickled, chosen: _Found, found: list[_Found]) -> Iterator[str]:
    value = pickled.value
    others = [one for one in found if one is not chosen and not one.is_training]
    if others:
        yield f"only {chosen} is taken, and not {_list(others)}"
    entries = value.items() if isinstance(value, dict) else ()
    beside = {key: inner for key, inner in entries if chosen.path and _spell(key) != chosen.path[0]}
    beside |= {key: value[key] for key in chosen.beside} if chosen.path == () else dict.fromkeys(chosen.beside)
    if beside:
        nbytes = {key: _nbytes_below(key, inner, found) for key, inner in beside.items()}
        yield f"left out: {_list([f'{_spell(k)} ({_spell_size(n)})' if n else k for k, n in nbytes.items()])}"
    if chosen.unreadable:
        named = [f"{_spell(name)} ({why})" for name, why in islice(chosen.unreadable.items(), _MAX_NAMED)]
        yield f"tensors that cannot be read are left out ({len(chosen.unreadable):,} in all): {_list(named)}"
    yield from note_foreign(pickled.foreign)


def note_foreign(foreign: Mapping[str, str]) -> Iterator[str]:
    """Say what a pickle makes, or calls, that no state dict needs."""
    for what, note in (
        ("makes", "objects of unknown classes were left out"),
        ("calls", "functions that its pickle calls were not called"),
    ):
        names = [name for name, how in foreign.items() if how == what]
        if names:
            yield f"{note}: {_list(names)}"


def _nbytes_below(key: Any, value: Any, found: list[_Found]) -> int:
    """Say how many bytes what is under a key of the top takes: tensors, and what is known of the rest."""
    of_tensors = sum(one.nbytes for one in found if one.path[:1] == (_spell(key),))
    return of_tensors + (value.nbytes if type(value) is Left else 0)


def _spell_size(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 100_000 else f"{nbytes:,} bytes"


def _list(things: list[Any]) -> str:
    return name_some([*map(_spell, things[:_MAX_NAMED]), *things[_MAX_NAMED:]], _MAX_NAMED)


def _describe(value: Any) -> str:
    if not isinstance(value, dict) or not value:
        return _ADVICE[False]
    objects = any(type(inner) is Inert for inner in value.values())
    named = [f"{_spell(key)} ({_kind(inner)})" if type(inner) is Inert else key for key, inner in value.items()]
    return f"It holds: {_list(named)}." + (f" {_ADVICE[True]}" if objects else "")


def _kind(value: Any) -> str:
    if type(value) is Inert:
        return f"a whole {value.name}"
    kinds = {
        TensorRef: "a tensor",
        Listed: "a tensor",
        Unreadable: "a tensor",
        StorageRef: "a storage",
        type(None): "None",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")

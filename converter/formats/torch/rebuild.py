"""What the pickle in a torch checkpoint says of tensors: a closed table of exact (module, name) pairs, and no more.

What the table gives is data, or one of the few functions below that rebuild a tensor's description (``torch/_utils.py``
has the originals). Any other global stands for itself, and is never looked up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from sys import intern
from typing import Any, NamedTuple, TypeVar

from converter.dtypes import BY_STORAGE_CLASS, BY_TORCH_NAME, DTYPES, DType
from converter.errors import Where
from converter.formats.torch.unpickler import (
    CONTAINER_STEPS,
    Global,
    Kept,
    Pickled,
    Rebuild,
    Steps,
    allow_metadata,
    allow_steps,
    run_pickle,
)
from converter.tensors.base import MAX_DIMS, remembered

_T = TypeVar("_T")

AXES_A_STEP = 4
_CHARACTERS_A_STEP = 16  # of the name of a class, which is spelled anew
_PAIR_STEPS = 2  # what an entry of a dict takes, and the place of its value
MAX_STORAGES = 200_000  # a pickle of all the steps there are describes 160,000
_MAX_KEY_LENGTH = 1_000  # of a storage: torch counts them, and the name of a record may have 65,535 bytes


class StorageRef(NamedTuple):
    """A storage as a pickle names it: ``key`` is its record. ``dtype`` is None where the storage is untyped bytes.

    ``start`` is that of the view, in elements, where it is a view of a storage.
    """

    dtype: DType | None
    key: str
    device: str
    numel: int
    start: int = 0

    @property
    def nbytes(self) -> int:
        return self.numel * (self.dtype.itemsize if self.dtype else 1)


class TensorRef(NamedTuple):
    """A tensor as a pickle describes it; ``start`` and ``strides`` in elements of ``dtype``."""

    storage: StorageRef
    dtype: DType
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    negated: int = 0  # as in Negated


class Listed(NamedTuple):
    """A tensor of which this file says the dtype and the shape alone; ``of`` tells its reader where the rest lies."""

    dtype: DType
    shape: tuple[int, ...]
    of: Any


class Part(NamedTuple):
    """What a rank's file holds of a tensor that all ranks hold together: the class of it, and that class's state."""

    kind: str
    state: Any


class Left(NamedTuple):
    """What stands for something that is no tensor, and takes so many bytes of another file."""

    nbytes: int


class Unreadable(NamedTuple):
    """What stands for a tensor that is none of ours; ``why`` is said of it."""

    why: str


def parse_pickle(
    raw: bytes,
    where: Where,
    strip_code: bool = False,
    storages: dict[str, StorageRef] | None = None,
    steps: Steps | None = None,
) -> Pickled:
    """Read the pickle that ``raw`` begins with: dicts, lists, tuples, strings, numbers, TensorRefs and inert objects.

    Tensors that are not strided views of a storage, or in a dtype of their own, are Unreadable. Raises BadFile where
    the stream is damaged, and HostileFile where it calls what is outside the closed table (not with ``strip_code``).
    What it takes is taken from ``steps``, which all pickles of a file share; all storages that it names are put into
    ``storages``.
    """
    steps = steps or allow_steps()
    if storages is None:
        return run_pickle(raw, where, _find, _find_persistent, strip_code, steps)

    def find(identity: Any, where: Where) -> StorageRef | Global | Kept:
        storage = _find_persistent(identity, where)
        if type(storage) is not StorageRef:
            return storage
        first = storages.setdefault(storage.key, storage)
        if (first.dtype, first.numel) != (storage.dtype, storage.numel):
            raise ValueError("a storage of two kinds")
        return storage

    return run_pickle(raw, where, _find, find, strip_code, steps)


def parse_metadata(raw: bytes, where: Where, strip_code: bool, fields: Mapping[str, tuple[str, ...]]) -> Pickled:
    """Read a pickle that describes a checkpoint of many files: plain values, sizes, dtypes and objects that are kept.

    Of those of the classes in ``fields``, these fields are kept. It may be far longer than that of a state dict, and
    holds no tensor. Raises what ``parse_pickle`` does.
    """

    def find(named: Global, where: Where) -> Any:
        name = str(named)
        if name in fields:
            return Kept(name, fields[name])
        found = _find(named, where)
        if type(found) is not Rebuild or found.rebuild is _leave_out:
            return found
        return _WITHOUT_TENSORS.get(name, named)

    return run_pickle(raw, where, find, _find_nothing, strip_code, allow_metadata())


def _find_nothing(identity: Any, where: Where) -> Any:
    raise ValueError("a storage in what holds no tensors")


@dataclass(frozen=True, slots=True)
class _StorageClass:
    dtype: DType | None


@dataclass(frozen=True, slots=True)
class _TensorClass:
    """A class that adds nothing to a tensor that weights could lose."""


def _ordered_dict(arguments: tuple[Any, ...], where: Where) -> dict[Any, Any]:
    # Python 2 gives the items here; Python 3 gives none and sets them one by one.
    content: dict[Any, Any] = {}
    for key, value in _items(arguments) if arguments else ():
        if type(key) is not str:
            raise TypeError("an OrderedDict with a key that is no text")
        content[key] = value
    return content


def _items(arguments: tuple[Any, ...]) -> list[Any] | tuple[Any, ...]:
    """Give the list or tuple that is the first argument."""
    items: list[Any] | tuple[Any, ...] = arguments[0]
    if type(items) not in (list, tuple):
        raise TypeError("items that are in no list")
    return items


def _rebuild_tensor(arguments: tuple[Any, ...], where: Where) -> TensorRef | Unreadable:
    """Describe what ``torch._utils._rebuild_tensor(_v2)`` would build: (storage, start, shape, strides, ...)."""
    storage = arguments[0]
    if type(storage) is not StorageRef or storage.dtype is None:
        raise TypeError("a tensor without a typed storage")
    return _tensor(storage, storage.dtype, arguments, arguments[6:7])


def _rebuild_tensor_v3(arguments: tuple[Any, ...], where: Where) -> TensorRef | Unreadable:
    """The form for dtypes without a typed storage: the dtype is the seventh argument."""
    dtype = arguments[6]
    if type(dtype) is not DType:
        raise TypeError("a dtype that is none")
    return _tensor(arguments[0], dtype, arguments, arguments[7:8])


def _tensor(
    storage: StorageRef, dtype: DType, arguments: tuple[Any, ...], flags: tuple[Any, ...]
) -> TensorRef | Unreadable:
    start, shape, strides = arguments[1:4]
    if type(storage) is not StorageRef:
        raise TypeError("a tensor without a storage")
    if type(shape) is not tuple or type(strides) is not tuple or not len(shape) == len(strides) <= MAX_DIMS:
        raise TypeError("a shape that does not fit its strides")
    for number in (start, *shape, *strides):
        if type(number) is not int or not 0 <= number < 1 << 63:
            raise ValueError("a size that is no whole number")
    if dtype.tag not in DTYPES:
        return of_other_dtype(dtype)
    negated = 0
    if flags and flags[0]:
        # The bits of lazy views (``torch._utils.set_tensor_metadata``).
        bits = flags[0]
        if (
            not isinstance(bits, dict)
            or not bits.keys() <= {"conj", "neg"}
            or not dtype.is_floating | (dtype.tag == "C64")
        ):
            return Unreadable("has a property that no state dict needs")
        negated = 2 * bool(bits.get("conj")) ^ 3 * bool(bits.get("neg"))
    return TensorRef(storage, dtype, storage.start + start, *_shared(shape, strides), negated)


def of_other_dtype(dtype: DType) -> Unreadable:
    """Give what stands for a tensor of a dtype that is none of ours."""
    return Unreadable(f"is {dtype.torch_name}, a dtype that safetensors does not have")


@remembered
def _shared(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Give a shape and strides that many tensors have."""
    return shape, strides


def _rebuild_parameter(arguments: tuple[Any, ...], where: Where) -> TensorRef | Unreadable:
    if type(arguments[0]) not in (TensorRef, Unreadable):
        raise TypeError("a parameter without a tensor")
    tensor: TensorRef | Unreadable = arguments[0]
    return tensor


def _rebuild_subclass(arguments: tuple[Any, ...], where: Where) -> Listed | Unreadable:
    """A tensor that holds others: (class, dtype, sizes, ...); what it holds is its state."""
    kind, dtype, shape = arguments[:3]
    if type(kind) is not Kept:
        return _of_class(kind)
    return Listed(checked(dtype, DType), shape_of(shape), Part(kind.name, None))


def checked(value: Any, kind: type[_T]) -> _T:
    """Give a value that is of a kind. Raises TypeError for another."""
    if type(value) is not kind:
        raise TypeError(f"no {kind.__name__}")
    return value


def shape_of(sizes: Any) -> tuple[int, ...]:
    """Give a shape, or the begin of a box. Raises TypeError or ValueError for what is none."""
    if type(sizes) is not tuple or len(sizes) > MAX_DIMS:
        raise TypeError("a shape that is none")
    for number in sizes:
        if type(number) is not int or not 0 <= number < 1 << 63:
            raise ValueError("a size that is no whole number")
    return sizes


def size_of(number: Any) -> int:
    """Give a number that an axis may have. Raises what ``shape_of`` does."""
    return shape_of((number,))[0]


def _of_class(kind: Any) -> Unreadable:
    if type(kind) not in (Global, Kept):
        raise TypeError("a tensor of no class")
    return Unreadable(intern(f"is of the class {kind}"))


def _rebuild_from_type(arguments: tuple[Any, ...], where: Where) -> TensorRef | Listed | Unreadable:
    """A tensor of a plain type that carries attributes (a buffer does): (function, type, its arguments, attributes)."""
    function, kind, inner = arguments[:3]
    if type(kind) is Kept and type(function) is Rebuild and function.rebuild is _rebuild_subclass:
        part: Listed | Unreadable = function.rebuild(inner, where)
        return part._replace(of=Part(kind.name, arguments[3])) if type(part) is Listed else part
    if type(kind) in (Global, Kept):
        return _of_class(kind)
    if (
        type(function) is not Rebuild
        or function.rebuild is _rebuild_from_type
        or type(kind) is not _TensorClass
        or type(inner) is not tuple
    ):
        raise TypeError("a tensor of another type")
    return _rebuild_parameter((function.rebuild(inner, where),), where)


def _size(arguments: tuple[Any, ...], where: Where) -> tuple[Any, ...]:
    return tuple(_items(arguments)) if arguments else ()


def _set(arguments: tuple[Any, ...], where: Where) -> list[Any]:
    items = arguments[0] if arguments else ()
    return list(items) if type(items) in (list, tuple) else []


def _leave_out(arguments: tuple[Any, ...], where: Where) -> None:
    """What torch says of a tensor beside its dtype and shape: where it was, in which layout."""


def _stage(arguments: tuple[Any, ...], where: Where) -> int:
    return checked(arguments[0], int)


def _find_persistent(identity: Any, where: Where) -> StorageRef | Global | Kept:
    """Read a persistent id: ("storage", class, key, device, numel), as ``torch.serialization._save`` makes it.

    ``_legacy_save`` adds (key, start, numel) of a view of the storage, or None; of a module's class it makes
    ("module", class, source file, source), which stands for the class.
    """
    if type(identity) is tuple and identity[0] == "module" and isinstance(identity[1], (Global, Kept)):
        return identity[1]
    kind, storage_class, key, device, numel = identity[:5]
    start = identity[5][1] if len(identity) > 5 and identity[5] is not None else 0
    if (
        kind != "storage"
        or type(storage_class) is not _StorageClass
        or type(key) is not str
        or len(key) > _MAX_KEY_LENGTH
    ):
        raise TypeError("a persistent id that is no storage")
    if type(numel) is not int or numel < 0 or type(device) is not str or type(start) is not int or start < 0:
        raise ValueError("a storage without a size")
    return StorageRef(storage_class.dtype, key, device, numel, start)


def _count_items(arguments: tuple[Any, ...]) -> int:
    return _PAIR_STEPS * len(arguments[0]) if arguments else 0


def _count_sizes(arguments: tuple[Any, ...]) -> int:
    return 0 if arguments and type(arguments[0]) is tuple else _count_items(arguments)  # a tuple is taken as it is


def _count_set(arguments: tuple[Any, ...]) -> int:
    return len(arguments[0]) // _PAIR_STEPS if arguments and type(arguments[0]) in (list, tuple) else 0


def _count_axes(arguments: tuple[Any, ...]) -> int:
    return len(arguments[2]) // AXES_A_STEP


def _count_class(arguments: tuple[Any, ...]) -> int:
    return len(str(arguments[0])) // _CHARACTERS_A_STEP


def _count_inner(arguments: tuple[Any, ...]) -> int:
    function, kind, inner = arguments[:3]
    if type(kind) in (Global, Kept):
        return _count_class((kind,))
    return 0 if function.rebuild is _rebuild_from_type else function.count_steps(inner)


def _count_nothing(_: tuple[Any, ...]) -> int:
    return 0


_KNOWN: dict[tuple[str, str], Any] = {
    **{
        (module, name): Rebuild(f"{module}.{name}", rebuild, count)
        for module, name, rebuild, count in (
            ("collections", "OrderedDict", _ordered_dict, _count_items),
            ("torch", "Size", _size, _count_sizes),
            ("builtins", "set", _set, _count_set),
            ("__builtin__", "set", _set, _count_set),
            ("deepspeed.runtime.zero.config", "ZeroStageEnum", _stage, _count_nothing),
            ("torch", "device", _leave_out, _count_nothing),
            ("torch.serialization", "_get_layout", _leave_out, _count_nothing),
            ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING", _leave_out, _count_nothing),
            ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING", _leave_out, _count_nothing),
            ("torch._tensor", "_rebuild_from_type_v2", _rebuild_from_type, _count_inner),
            ("torch._utils", "_rebuild_parameter", _rebuild_parameter, _count_nothing),
            ("torch._utils", "_rebuild_parameter_with_state", _rebuild_parameter, _count_nothing),
            ("torch._utils", "_rebuild_wrapper_subclass", _rebuild_subclass, _count_class),
            ("torch._utils", "_rebuild_tensor", _rebuild_tensor, _count_axes),
            ("torch._utils", "_rebuild_tensor_v2", _rebuild_tensor, _count_axes),
            ("torch._utils", "_rebuild_tensor_v3", _rebuild_tensor_v3, _count_axes),
        )
    },
    ("torch", "Tensor"): _TensorClass(),
    ("torch.nn.parameter", "Parameter"): _TensorClass(),
    ("torch.nn.parameter", "Buffer"): _TensorClass(),
    ("torch.storage", "UntypedStorage"): _StorageClass(None),
    ("torch", "UntypedStorage"): _StorageClass(None),
    **{("torch", name): _StorageClass(dtype) for name, dtype in BY_STORAGE_CLASS.items()},
    **{("torch", name): dtype for name, dtype in BY_TORCH_NAME.items()},
}

# What a pickle without tensors may call.
_WITHOUT_TENSORS = {
    rebuild.name: rebuild
    for rebuild in (
        Rebuild("collections.OrderedDict", _ordered_dict, lambda arguments: CONTAINER_STEPS + _count_items(arguments)),
        Rebuild("torch.Size", _size, _count_sizes),
    )
}

# As ``Tensor._reduce_ex_internal`` does it for XLA, HPU, MAIA and the like, by way of numpy or of a tensor on the CPU.
_OF_ANOTHER_DEVICE = "was saved from a device of another kind (XLA, HPU): move the model to the CPU, then save it"
# Tensors of these kinds are no strided view of one storage; the same names in every torch (``torch/_utils.py``).
_UNREADABLE = {
    ("torch._utils", "_rebuild_sparse_tensor"): "is sparse",
    ("torch._utils", "_rebuild_sparse_csr_tensor"): "is sparse",
    ("torch._utils", "_rebuild_qtensor"): "is quantized by torch",
    ("torch._utils", "_rebuild_nested_tensor"): "is nested",
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): _OF_ANOTHER_DEVICE,
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _OF_ANOTHER_DEVICE,
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): "is a meta tensor: it has no values",
    ("torch.nn.parameter", "UninitializedParameter"): "is not initialized: it has no values",
    ("torch.nn.parameter", "UninitializedBuffer"): "is not initialized: it has no values",
}
# Dtypes that safetensors does not have, with their bits and, of old torch, their storages.
_OTHER_DTYPES = {
    dtype.torch_name: dtype
    for dtype in (
        DType(name, bits, name, storage_class, (), False, -1)
        for name, bits, storage_class in (
            ("complex128", 128, "ComplexDoubleStorage"),
            ("complex32", 32, "ComplexHalfStorage"),
            ("qint8", 8, "QInt8Storage"),
            ("quint8", 8, "QUInt8Storage"),
            ("qint32", 32, "QInt32Storage"),
            ("quint4x2", 8, "QUInt4x2Storage"),
            ("quint2x4", 8, "QUInt2x4Storage"),
            ("float4_e2m1fn_x2", 8, ""),
        )
    )
}
_OTHER_STORAGES = {dtype.storage_class: dtype for dtype in _OTHER_DTYPES.values() if dtype.storage_class}
# Where the classes are of which tensors of many processes are made, and what describes checkpoints of those: data.
_KEPT_MODULES = ("torch.distributed.", "deepspeed.")
_DTYPE = re.compile(r"(q?u?int|float|complex|bits)\d{1,3}(x\d|_\w{1,20})?")  # of those that a later torch may have


def _find(named: Global, where: Where) -> Any:
    known = _KNOWN.get((named.module, named.name))
    if known is not None:
        return known
    if named.module.startswith(_KEPT_MODULES):
        return Kept(str(named))
    why = _UNREADABLE.get((named.module, named.name))
    if why:
        unreadable = Unreadable(why)
        return Rebuild(str(named), lambda arguments, where: unreadable, _count_nothing)
    if named.module == "torch" and named.name in _OTHER_STORAGES:
        return _StorageClass(_OTHER_STORAGES[named.name])
    if named.module == "torch" and _DTYPE.fullmatch(named.name):
        return _OTHER_DTYPES.get(named.name) or DType(named.name, 8, named.name, "", (), False, -1)
    return named

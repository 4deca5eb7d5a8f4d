"""What the pickle in a torch checkpoint says of tensors: a closed table of exact (module, name) pairs, and no more.

What the table gives is data, or one of the few functions below that rebuild a tensor's description (``torch/_utils.py``
has the originals). Any other global stands for itself, and is never looked up.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from converter.dtypes import BY_STORAGE_CLASS, BY_TORCH_NAME, DType
from converter.errors import Unsupported
from converter.formats.pickle_machine import Global, Pickled, Rebuild, Steps, allow_steps, run_pickle

MAX_DIMS = 100  # no weights have a tenth of it, and numbers of elements stay short
AXES_A_STEP = 4
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
    negated: int = 0  # as in TensorInfo


def parse_pickle(
    raw: bytes,
    path: Path,
    strip_code: bool = False,
    storages: dict[str, StorageRef] | None = None,
    steps: Steps | None = None,
) -> Pickled:
    """Read the pickle that ``raw`` begins with: dicts, lists, tuples, strings, numbers, TensorRefs and inert objects.

    Raises BadFile where the stream is damaged, HostileFile where it calls what is outside the closed table (not with
    ``strip_code``), and Unsupported for tensors that are not strided views of a storage. What it takes is taken from
    ``steps``, which all pickles of a file share; all storages that it names are put into ``storages``.
    """
    steps = steps or allow_steps()
    if storages is None:
        return run_pickle(raw, path, _find, _find_persistent, strip_code, steps)

    def find(identity: Any, path: Path) -> StorageRef | Global:
        storage = _find_persistent(identity, path)
        if type(storage) is not StorageRef:
            return storage
        first = storages.setdefault(storage.key, storage)
        if (first.dtype, first.numel) != (storage.dtype, storage.numel):
            raise ValueError("a storage of two kinds")
        return storage

    return run_pickle(raw, path, _find, find, strip_code, steps)


@dataclass(frozen=True, slots=True)
class _StorageClass:
    dtype: DType | None


@dataclass(frozen=True, slots=True)
class _TensorClass:
    """A class that adds nothing to a tensor that weights could lose."""


def _ordered_dict(arguments: tuple[Any, ...], path: Path) -> dict[Any, Any]:
    # Python 2 gives the items here; Python 3 gives none and sets them one by one.
    content: dict[Any, Any] = {}
    for key, value in _items(arguments):
        if type(key) is not str:
            raise TypeError("an OrderedDict with a key that is no text")
        content[key] = value
    return content


def _items(arguments: tuple[Any, ...]) -> list[Any] | tuple[Any, ...]:
    """Give the list or tuple that is the first argument, if there is one."""
    items = arguments[0] if arguments else ()
    if type(items) not in (list, tuple):
        raise TypeError("items that are in no list")
    return items


def _rebuild_tensor(arguments: tuple[Any, ...], path: Path) -> TensorRef:
    """Describe what ``torch._utils._rebuild_tensor(_v2)`` would build: (storage, start, shape, strides, ...)."""
    storage = arguments[0]
    if type(storage) is not StorageRef or storage.dtype is None:
        raise TypeError("a tensor without a typed storage")
    return _tensor(storage, storage.dtype, arguments, path, arguments[6:7])


def _rebuild_tensor_v3(arguments: tuple[Any, ...], path: Path) -> TensorRef:
    """The form for dtypes without a typed storage: the dtype is the seventh argument."""
    dtype = arguments[6]
    if type(dtype) is not DType:
        raise TypeError("a dtype that is none")
    return _tensor(arguments[0], dtype, arguments, path, arguments[7:8])


def _tensor(
    storage: StorageRef, dtype: DType, arguments: tuple[Any, ...], path: Path, flags: tuple[Any, ...]
) -> TensorRef:
    start, shape, strides = arguments[1:4]
    if type(storage) is not StorageRef:
        raise TypeError("a tensor without a storage")
    if type(shape) is not tuple or type(strides) is not tuple or not len(shape) == len(strides) <= MAX_DIMS:
        raise TypeError("a shape that does not fit its strides")
    for number in (start, *shape, *strides):
        if type(number) is not int or not 0 <= number < 1 << 63:
            raise ValueError("a size that is no whole number")
    negated = 0
    if flags and flags[0]:
        # The bits of lazy views (``torch._utils.set_tensor_metadata``).
        bits = flags[0]
        if (
            not isinstance(bits, dict)
            or not bits.keys() <= {"conj", "neg"}
            or not dtype.is_floating | (dtype.tag == "C64")
        ):
            raise Unsupported(path, "holds a tensor with a property that no state dict needs")
        negated = 2 * bool(bits.get("conj")) ^ 3 * bool(bits.get("neg"))
    return TensorRef(storage, dtype, storage.start + start, shape, strides, negated)


def _rebuild_parameter(arguments: tuple[Any, ...], path: Path) -> TensorRef:
    if type(arguments[0]) is not TensorRef:
        raise TypeError("a parameter without a tensor")
    return arguments[0]


def _rebuild_from_type(arguments: tuple[Any, ...], path: Path) -> TensorRef:
    """A tensor of a plain type that carries attributes (a buffer does): (function, type, its arguments, attributes)."""
    function, kind, inner = arguments[:3]
    if (
        type(function) is not Rebuild
        or function.rebuild is _rebuild_from_type
        or type(kind) is not _TensorClass
        or type(inner) is not tuple
    ):
        raise TypeError("a tensor of another type")
    return _rebuild_parameter((function.rebuild(inner, path),), path)


def _size(arguments: tuple[Any, ...], path: Path) -> tuple[Any, ...]:
    return tuple(_items(arguments))


def _find_persistent(identity: Any, path: Path) -> StorageRef | Global:
    """Read a persistent id: ("storage", class, key, device, numel), as ``torch.serialization._save`` makes it.

    ``_legacy_save`` adds (key, start, numel) of a view of the storage, or None; of a module's class it makes
    ("module", class, source file, source), which stands for the class.
    """
    if type(identity) is tuple and identity[0] == "module" and type(identity[1]) is Global:
        return identity[1]
    kind, storage_class, key, device, numel, *view = identity
    start = view[0][1] if view and view[0] is not None else 0
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


def _count_axes(arguments: tuple[Any, ...]) -> int:
    return len(arguments[2]) // AXES_A_STEP


def _count_inner(arguments: tuple[Any, ...]) -> int:
    function, _, inner = arguments[:3]
    return 0 if function.rebuild is _rebuild_from_type else function.count_steps(inner)


def _count_nothing(_: tuple[Any, ...]) -> int:
    return 0


_KNOWN: dict[tuple[str, str], Any] = {
    **{
        (module, name): Rebuild(f"{module}.{name}", rebuild, count)
        for module, name, rebuild, count in (
            ("collections", "OrderedDict", _ordered_dict, _count_items),
            ("torch", "Size", _size, _count_items),
            ("torch._tensor", "_rebuild_from_type_v2", _rebuild_from_type, _count_inner),
            ("torch._utils", "_rebuild_parameter", _rebuild_parameter, _count_nothing),
            ("torch._utils", "_rebuild_parameter_with_state", _rebuild_parameter, _count_nothing),
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

# Tensors of these kinds are no strided view of one storage; the same names in every torch (``torch/_utils.py``).
_UNSUPPORTED = {
    "_rebuild_sparse_tensor": "sparse tensors",
    "_rebuild_sparse_csr_tensor": "sparse tensors",
    "_rebuild_qtensor": "quantized tensors",
    "_rebuild_nested_tensor": "nested tensors",
    "_rebuild_wrapper_subclass": "tensors of a subclass",
    "_rebuild_device_tensor_from_numpy": "tensors saved by way of numpy",
    "_rebuild_device_tensor_from_cpu_tensor": "tensors saved by way of another",
    "_rebuild_meta_tensor_no_storage": "meta tensors, which have no values",
    "QInt8Storage": "quantized tensors",
    "QUInt8Storage": "quantized tensors",
    "QInt32Storage": "quantized tensors",
    "ComplexDoubleStorage": "complex128 tensors",
    "complex128": "complex128 tensors",
    "complex32": "complex32 tensors",
    "ComplexHalfStorage": "complex32 tensors",
    "qint8": "quantized tensors",
    "quint8": "quantized tensors",
    "qint32": "quantized tensors",
    "float4_e2m1fn_x2": "packed 4-bit tensors",
}


def _find(named: Global, path: Path) -> Any:
    known = _KNOWN.get((named.module, named.name))
    if known is not None:
        return known
    if named.module in ("torch", "torch._utils") and named.name in _UNSUPPORTED:
        raise Unsupported(path, f"it holds {_UNSUPPORTED[named.name]}", "safetensors has no place for them.")
    return named

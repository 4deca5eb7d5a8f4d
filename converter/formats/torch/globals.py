"""Names that pickles of checkpoints have beside those of tensors: what they are, so that none is ever looked up."""

from __future__ import annotations

# Functions that make a new object of the class that is their first argument (``copyreg.py`` of CPython).
RECONSTRUCTORS = frozenset(
    f"{module}.{name}"
    for module in ("copyreg", "copy_reg")
    for name in ("_reconstructor", "__newobj__", "__newobj_ex__")
)

# Modules whose classes reach the system, or the machine that reads the pickle.
SYSTEM = frozenset(
    {
        "__builtin__", "_pickle", "bdb", "builtins", "cPickle", "cProfile", "code", "codeop", "commands",
        "ctypes", "ftplib", "functools", "httplib", "imp", "importlib", "inspect", "marshal", "multiprocessing",
        "nt", "os", "pdb", "pickle", "pkgutil", "platform", "posix", "posixpath", "profile", "pty", "pydoc",
        "runpy", "shutil", "signal", "smtplib", "socket", "ssl", "subprocess", "sys", "tempfile", "threading",
        "timeit", "trace", "types", "urllib", "urllib2", "venv", "webbrowser", "zipimport",
    }
)  # fmt: skip

_BUILTINS = ("bytearray", "bytes", "complex", "frozenset", "list", "object", "range", "slice", "xrange")
_PATHS = ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath")
_DATES = ("date", "datetime", "time", "timedelta", "timezone")
_ARRAYS = ("multiarray.scalar", "multiarray._reconstruct", "numeric._frombuffer")

# Classes and functions whose call makes a value and does nothing else; the value is no weight.
HARMLESS = frozenset(
    {
        *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in _BUILTINS),
        *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS),
        *(f"numpy.{core}.{name}" for core in ("core", "_core") for name in _ARRAYS),
        *(f"datetime.{name}" for name in _DATES),
        *(f"collections.{name}" for name in ("defaultdict", "deque", "Counter")),
        "_codecs.encode",
        "argparse.Namespace",
        "decimal.Decimal",
        "fractions.Fraction",
        "numpy.dtype",
        "numpy.ndarray",
        "torch.Generator",
        "types.SimpleNamespace",
        "uuid.UUID",
    }
)


def is_array(name: str) -> bool:
    """Say whether a pickle makes an array of numpy by this name."""
    module, _, last = name.rpartition(".")
    return module.startswith("numpy") and last in ("_reconstruct", "_frombuffer", "ndarray")


def is_tensor(name: str) -> bool:
    """Say whether a class, by its name, is one of tensors: weights that are kept in a way of their own."""
    return name.endswith(("Tensor", "Parameter", "Params4bit", "Int8Params"))

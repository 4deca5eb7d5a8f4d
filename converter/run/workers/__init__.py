"""Where tasks run: on threads, on processes of this machine, or on the workers of a cluster.

An engine is a module with ``open_engine(address, workers)``, which gives Workers, and a row in ``_ENGINES``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from typing import NamedTuple

from converter.errors import BadRequest, Unsupported
from converter.run.workers.base import Workers as Workers
from converter.run.workers.base import workers_of


class _Engine(NamedTuple):
    """What follows the name of an engine in ``--executor``, and the extra that it is installed with."""

    address: str = ""
    extra: str = ""


_ENGINES = {
    "threads": _Engine(),
    "processes": _Engine("[=N]"),
    "dask": _Engine("=ADDRESS|FILE", "dask"),
    "ray": _Engine("[=ADDRESS]", "ray"),
    "mpi": _Engine("", "mpi"),
}


def parse(text: str) -> tuple[str, str]:
    """Split what names an engine into its name and its address. Raises BadRequest for what names none."""
    name, equals, address = text.partition("=")
    engine = _ENGINES.get(name)
    if engine is None:
        spelled = ", ".join(known + engine.address for known, engine in _ENGINES.items())
        raise BadRequest(repr(text), f"is none of {spelled}")
    lacks = not address and (equals or engine.address.startswith("="))
    is_number = name != "processes" or not address or (address.isdecimal() and int(address) > 0)
    if lacks or (equals and not engine.address) or not is_number:
        raise BadRequest(repr(text), f"is not spelled {name}{engine.address}")
    return name, address


@contextmanager
def open_workers(executor: Executor | str | None = None, workers: int | None = None) -> Iterator[Workers]:
    """Give what tasks run on, until this is left: as ``--executor`` spells it, or an executor of the caller's.

    ``workers`` is how many tasks are done at once, where neither tells. Raises BadRequest for a text that names no
    engine, Unsupported where its library is not installed, SystemRefused where it cannot be reached.
    """
    if isinstance(executor, Executor):
        yield workers_of(executor, workers)
        return
    name, address = parse(executor or "threads")
    with _opener(name)(address, workers) as opened:
        yield opened


def _opener(name: str) -> Callable[[str, int | None], AbstractContextManager[Workers]]:
    try:
        opener: Callable[[str, int | None], AbstractContextManager[Workers]]
        opener = import_module(f"converter.run.workers.{name}").open_engine
    except ImportError as error:
        advice = f"Install it: pip install 'wconv[{_ENGINES[name].extra}]'."
        raise Unsupported(f"--executor {name}", f"needs what is not installed here ({error})", advice) from None
    return opener

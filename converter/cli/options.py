"""Every option that commands share, once, and the types of their values."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from converter.dtypes import BY_ALIAS, RECAST_TARGETS, DType

if TYPE_CHECKING:
    from converter.storage import Place

_F = TypeVar("_F", bound=Callable[..., Any])


class Size(click.ParamType[float]):
    """A number of bytes; with ``allow_none``, ``none`` is no limit at all."""

    name = "SIZE"

    def __init__(self, allow_none: bool = False) -> None:
        self.allow_none = allow_none

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if not isinstance(value, str):
            return float(value)
        if self.allow_none and value.lower() == "none":
            return math.inf
        from converter.errors import BadRequest
        from converter.plan.shards import parse_size

        try:
            return parse_size(value)
        except BadRequest as error:
            or_none = " Or none." if self.allow_none else ""
            self.fail(f"{value!r} {error.problem}. {error.advice}{or_none}", param, ctx)


class DTypeName(click.ParamType[DType]):
    """A dtype to cast to, of those that are named."""

    name = "DTYPE"

    def __init__(self, targets: Sequence[str] = RECAST_TARGETS) -> None:
        self.targets = targets

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> DType:
        if isinstance(value, DType):
            return value
        dtype = BY_ALIAS.get(value.lower())
        if dtype is None or dtype.short_name not in self.targets:
            self.fail(f"{value!r} is none of {', '.join(self.targets)}.", param, ctx)
        return dtype


class ExecutorName(click.ParamType[str]):
    """An engine with its address."""

    name = "NAME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from converter.errors import BadRequest
        from converter.run.workers import parse

        try:
            parse(value)
        except BadRequest as error:
            self.fail(f"{error.where} {error.problem}.", param, ctx)
        return str(value)


class Replacement(click.ParamType[tuple[str, str]]):
    """A regular expression and what is put in the place of all that it finds, with a ``=`` between: the last one."""

    name = "REGEX=NEW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if not isinstance(value, str):
            return tuple(value)
        regex, equals, replacement = value.rpartition("=")
        if not (equals and regex):
            self.fail(f"{value!r} is no REGEX=NEW, such as '^model\\.='.", param, ctx)
        return regex, replacement


class PlaceType(click.Path):
    """A file or folder; the empty text that a variable holds if it is unset is none, and least the current folder.

    One that ``is_read`` may be the bare name of a model on the Hub, where a user says that it is meant.
    """

    def __init__(self, is_read: bool = False, **how: Any) -> None:
        super().__init__(**how)
        self.is_read = is_read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("An empty text is no path; the current folder is '.'.", param, ctx)
        from converter.storage import place_of
        from converter.storage.local import is_local

        place = place_of(value)
        if self.is_read and isinstance(value, str) and is_local(place) and not place.is_taken():
            place = _meant(value, place)
        if is_local(place):
            super().convert(str(place), param, ctx)  # which refuses what is not there, if it must be
        return place


def _meant(text: str, place: Place) -> Place:
    """Give the model of the Hub that a name may stand for that is no path here, if the user says so.

    Raises BadFile where nobody can be asked.
    """
    import re
    import sys

    from converter.errors import BadFile
    from converter.storage import place_of

    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text) or place.parent.exists():
        return place
    if sys.stdin.isatty() and click.confirm(f"{text} is no path here. Take it from the Hub?", err=True):
        return place_of(f"hf://{text}")
    raise BadFile(text, "does not exist", f"If it is a model of the Hub, name it hf://{text}.")


FULL_TARGETS = ("fp32", "bf16", "fp16")
"""The dtypes that a model runs in."""

source_arg = click.argument("source", metavar="[SRC]", default=".", type=PlaceType(is_read=True))


def _or_here(ctx: click.Context, param: click.Parameter, places: tuple[Place, ...]) -> tuple[Place, ...]:
    """Give the current folder where nothing is named."""
    return places or (param.type.convert(".", param, ctx),)


sources_arg = click.argument("sources", metavar="[SRC]...", nargs=-1, type=PlaceType(is_read=True), callback=_or_here)

new_folder_option = click.option(
    "-o", "--output", type=PlaceType(), metavar="OUT", required=True, help="The new folder, or URL of one."
)

folder_or_file_option = click.option(
    "-o",
    "--output",
    type=PlaceType(),
    metavar="OUT",
    required=True,
    help="The new folder, or URL of one; or a file for a file; of several SRC, the folder around what each gives.",
)

_RUN_OPTIONS = (
    click.option(
        "--workers",
        type=click.IntRange(1, 64),
        metavar="N",
        help="Tasks at once: how many cores this may take (default: all, up to 16).",
    ),
    click.option(
        "--executor",
        type=ExecutorName(),
        metavar="NAME",
        help="Who does them: threads, processes[=N], dask=ADDRESS|FILE, ray[=ADDRESS], mpi (default: fastest here).",
    ),
    click.option(
        "--memory",
        type=Size(),
        default="64MB",
        show_default=True,
        help="Memory for the buffers of all workers together; on a cluster, of each.",
    ),
)
_OUTPUT_OPTIONS = (
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
    click.option("-v", "--verbose", is_flag=True, help="Print every file."),
)
dtype_option = click.option(
    "--dtype", type=DTypeName(), metavar="DTYPE", help=f"Cast floating tensors: {', '.join(RECAST_TARGETS)}."
)
_CONVERSION_OPTIONS = {
    "output": click.option(
        "-o",
        "--output",
        type=PlaceType(),
        metavar="OUT",
        help="Write to this new folder (or file), or URL of one, instead of beside the source; of several SRC, the "
        "folder around what each gives.",
    ),
    "variant": click.option(
        "--variant", metavar="TAG|none", help="Tag the output's names with this; none takes a tag away."
    ),
    "from-variant": click.option("--from-variant", metavar="TAG|none", help="Convert only this variant of the source."),
    "component": click.option(
        "--component",
        "components",
        multiple=True,
        metavar="NAME",
        help="Convert only this component; may be given again.",
    ),
    "max-shard-size": click.option(
        "--max-shard-size",
        "max_shard_size",
        type=Size(allow_none=True),
        metavar="SIZE|none",
        help="Split into shards of this size at most; none makes one file (default: shards as they are).",
    ),
    "tied": click.option(
        "--tied",
        metavar="first|duplicate|NAME",
        help="Write tied tensors once, under their first name or this one, or under each (default: as the model's "
        "loader wants it).",
    ),
    "key": click.option(
        "--key",
        metavar="PATH",
        help="Of several state dicts in a checkpoint take the one under this key, such as ema or model.net.",
    ),
    "flatten": click.option(
        "--flatten",
        is_flag=True,
        help="Take all tensors in the dicts of a checkpoint, or in those below --key, under names joined by dots.",
    ),
    "config": click.option(
        "--config",
        type=PlaceType(is_read=True),
        metavar="FOLDER",
        help="Take config and tokenizer from this folder (default: what lies with SRC, or a trainer keeps near it).",
    ),
    "only": click.option(
        "--only",
        multiple=True,
        metavar="REGEX",
        help="Write only tensors in whose names, as they are in SRC, this is found; repeatable.",
    ),
    "drop": click.option(
        "--drop", multiple=True, metavar="REGEX", help="Leave out tensors in whose names this is found; repeatable."
    ),
    "strip-prefix": click.option(
        "--strip-prefix",
        default="",
        metavar="PREFIX",
        help="Take this off the names of tensors, such as module. or _orig_mod.",
    ),
    "rename": click.option(
        "--rename",
        multiple=True,
        type=Replacement(),
        metavar="REGEX=NEW",
        help=r"Put NEW (which may hold \1) in the place of what this finds in names; repeatable, one after the other.",
    ),
    "add-prefix": click.option(
        "--add-prefix", default="", metavar="PREFIX", help="Put this before the names of all tensors, last of all."
    ),
    "strip-code": click.option(
        "--strip-code",
        is_flag=True,
        help="Convert the plain tensors of a pickle that calls functions (none is called); leave out what is else.",
    ),
    "skip-unreadable": click.option(
        "--skip-unreadable",
        is_flag=True,
        help="Leave out tensors that cannot be written, such as sparse ones, and name them.",
    ),
    "expand": click.option(
        "--expand", is_flag=True, help="Write expanded tensors in full, though they take GB more than the source."
    ),
    "keep-fp32": click.option(
        "--keep-fp32",
        multiple=True,
        metavar="REGEX",
        help="Leave tensors of these names in fp32, as well as those of the model's library; repeatable.",
    ),
    "on-overflow": click.option(
        "--on-overflow",
        type=click.Choice(["error", "saturate", "inf"]),
        default="error",
        show_default=True,
        help="What becomes of values that the dtype cannot hold.",
    ),
    "force": click.option("--force", is_flag=True, help="Recast quantized models; write what only some loaders read."),
    "overwrite": click.option("--overwrite", is_flag=True, help="Replace output that is there."),
    "skip-existing": click.option(
        "--skip-existing", is_flag=True, help="Leave output that is there as it is, say so, and go on."
    ),
    "keep-going": click.option(
        "--keep-going",
        is_flag=True,
        help="Of several SRC convert the others where one fails; the exit code is the highest of all.",
    ),
    "delete-source": click.option(
        "--delete-source", is_flag=True, help="Remove the converted files once every value was compared."
    ),
    "follow-links": click.option(
        "--follow-links", is_flag=True, help="With -o: carry over what SRC has as links to other places, too."
    ),
    "create": click.option(
        "--create",
        is_flag=True,
        help="With -o hf://owner/name: make that repository, which all can see, where it is not there.",
    ),
    "private": click.option("--private", is_flag=True, help="With --create: one that only its owner sees."),
    "pr": click.option(
        "--pr", is_flag=True, help="Propose the output as a pull request: to -o hf://owner/name, or where SRC lies."
    ),
    "verify": click.option(
        "--verify", is_flag=True, help="Read the output back and compare every value before publishing it."
    ),
    "dry-run": click.option("--dry-run", is_flag=True, help="Print what would be written, and write nothing."),
}


_LAYOUT_OPTIONS = (
    click.option(
        "--experts",
        type=click.Choice(["fused", "separate"]),
        help="Write experts as one tensor a layer, or each by itself (default: as they are).",
    ),
    click.option(
        "--layout",
        type=click.Choice(["meta", "transformers"]),
        help="Write Llama or Mistral with the names and rows of Meta and torchtitan, or of transformers.",
    ),
)


def layout_options(command: _F) -> _F:
    """Give a command the options on how a model's weights are arranged."""
    return _apply(_LAYOUT_OPTIONS, command)


def reading_options(command: _F) -> _F:
    """Give a command the options on what is read of a pickled checkpoint, and under which names."""
    names = ("key", "flatten", "strip-prefix", "strip-code", "skip-unreadable")
    return _apply(tuple(_CONVERSION_OPTIONS[name] for name in names), command)


NAMES_OPTIONS = ("only", "drop", "strip-prefix", "rename", "add-prefix", "tied")
"""Those on which tensors are written, and under which names."""

MANY_OPTIONS = ("skip-existing", "keep-going")
"""Those for several sources."""


def run_options(command: _F) -> _F:
    """Give a command the options on how to run."""
    return _apply(_RUN_OPTIONS, command)


def output_options(command: _F) -> _F:
    """Give a command the options on what to print."""
    return _apply(_OUTPUT_OPTIONS, command)


def conversion_options(command: _F) -> _F:
    """Give a command all options of a conversion."""
    return _apply((dtype_option, *_CONVERSION_OPTIONS.values(), *_RUN_OPTIONS, *_OUTPUT_OPTIONS), command)


def some_conversion_options(*names: str) -> Callable[[_F], _F]:
    """Give a command some options of a conversion, named without dashes in front, and those on running and printing."""
    chosen = [_CONVERSION_OPTIONS[name] for name in names]
    return lambda command: _apply((*chosen, *_RUN_OPTIONS, *_OUTPUT_OPTIONS), command)


def _apply(options: tuple[Callable[[Any], Any], ...], command: _F) -> _F:
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), command)

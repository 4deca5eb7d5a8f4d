"""The command line: a group whose commands load when they are called, and the one place that gives exit codes."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import click

from converter import __version__
from converter.errors import SystemRefused, WconvError

# Each command, whose module has its name, and its summary: here, so that the list of commands imports none.
COMMANDS = {
    "to-safetensors": "Write every weight set of a model in safetensors.",
    "recast": "Write a variant of a model in another dtype, such as bf16.",
    "quantize": "Write a model in 8 or 4 bits: int8, nf4, float8.",
    "dequantize": "Write a quantized model in bf16, fp16 or fp32 again.",
    "merge-lora": "Write a model with LoRA adapters merged into its weights.",
    "reshard": "Write a model in shards of another size, or in one file.",
    "rename-variant": "Give a variant another tag; no weights are moved.",
    "to-bin": "Write weight sets as torch .bin, the way back.",
    "to-single-file": "Write a Diffusers pipeline as one file for ComfyUI or A1111.",
    "to-diffusers": "Write such a file as a Diffusers pipeline.",
    "prepare-coreml": "Make a pipeline ready for conversion to Core ML.",
    "convert-lora": "Write a LoRA adapter under the names of another program.",
    "doctor": "Say what is wrong with a folder of weights, and mend it.",
    "inspect": "Show which weights a file or folder holds; reads headers only.",
    "verify": "Compare two files or folders of weights, value by value.",
}

EXIT_INTERRUPTED = 130
EXIT_BUG = 70


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"converter.cli.{cmd_name.replace('-', '_')}").command
        assert isinstance(command, click.Command)
        command.short_help = COMMANDS[cmd_name]  # what a shell shows when it completes a name
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            from converter.cli.guesses import guess_command

            ctx.fail(f"No such command {args[0]!r}.{guess_command(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="'wconv COMMAND --help' says more about each.",
)
@click.version_option(__version__, prog_name="wconv")
def cli() -> None:
    """Convert model weights, as fast as a copy, without loading the model or running what is in a pickle."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit code; errors are one line on stderr."""
    try:
        with _own_process():
            code = cli.main(args=list(args) if args is not None else None, prog_name="wconv", standalone_mode=False)
            _flush()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, click.Abort):
        _complain("Interrupted.")
        return EXIT_INTERRUPTED
    except click.ClickException as error:
        (_guess_option(error) if isinstance(error, click.NoSuchOption) else error).show()
        return 2
    except Exception as error:
        return tell_error(error)


def _guess_option(error: click.NoSuchOption) -> click.ClickException:
    """Name in an error what a command calls an option that it has not, where that is known."""
    if error.ctx is None:
        return error
    from converter.cli.guesses import guess_option

    options = [name for param in error.ctx.command.params for name in param.opts if name.startswith("-")]
    arguments = [str(param.metavar) for param in error.ctx.command.params if isinstance(param, click.Argument)]
    meant = guess_option(error.option_name, options, arguments)
    return click.UsageError(f"No such option {error.option_name!r}.{meant}", error.ctx) if meant else error


def tell_error(error: Exception) -> int:
    """Say what went wrong, in one line on stderr unless it is a bug, and give the exit code."""
    return _report(_ours(error))


def code_of(error: Exception) -> int:
    """Give the exit code of an error."""
    ours = _ours(error)
    return ours.exit_code if isinstance(ours, WconvError) else EXIT_BUG


def _ours(error: Exception) -> Exception:
    """Give an error as one of ours, where it is not a bug."""
    if isinstance(error, WconvError):
        return error
    if isinstance(error, OSError):
        return SystemRefused.from_os_error(error)
    lacking = _what_is_lacking(error)
    advice = "Raise the limit (ulimit), or close programs."
    return SystemRefused("the operating system", f"gives no more {lacking}", advice) if lacking else error


# As the loader of libraries says it (``_dl_map_segments`` and ``_dl_signal_error`` in glibc's ``elf/``).
_NO_ROOM = re.compile("failed to map segment|out of memory|Cannot allocate memory")


def _what_is_lacking(error: BaseException | None) -> str:
    """Name what the system gave too little of, if that is what an error comes from; Python has words of its own."""
    while error:
        if isinstance(error, MemoryError) or (isinstance(error, ImportError) and _NO_ROOM.search(str(error))):
            return "memory"
        if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
            return "threads"
        error = error.__cause__ or error.__context__
    return ""


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output has seen enough (as `head` does); Python would complain once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _own_process() -> Iterator[None]:
    """Set the process up for one command, and back again for whoever calls ``main`` from a program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot spell is no error
    # wconv makes hundreds of thousands of small objects and no cycles: collecting them would double the time to open
    # a checkpoint of many tensors.
    collecting = gc.isenabled()
    gc.disable()
    handler: Any = None
    with contextlib.suppress(ValueError):  # not in the main thread
        handler = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        if collecting:
            gc.enable()
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)


def _report(error: Exception) -> int:
    if isinstance(error, WconvError) and error.exit_code != EXIT_BUG:
        _complain(str(error))
        return error.exit_code
    for line in "".join(traceback.format_exception(error)).splitlines():
        _complain(line)
    _complain("This is a bug in wconv. Please report it with the lines above.")
    return EXIT_BUG


def _complain(message: str) -> None:
    from converter.cli.terminal import printable

    click.echo(printable(message), err=True)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt

"""The program around the commands: help, exit codes, signals, pipes, terminals, and errors that nobody expected."""

from __future__ import annotations

import gc
import inspect
import json
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from support.tiny import make_state, names_in, save, save_bin_shards, save_pipeline, snapshot

import converter
import converter.cli.convert
from converter.cli import COMMANDS, cli
from converter.cli.convert import Options, RunOptions, take_run
from converter.errors import BadFile, BadRequest, LossyCast, OutputRefused, SystemRefused, Unsupported
from converter.recipes.request import Request

STATE = make_state()
HANGS = 600  # seconds after which a command will not end any more
WCONV = (sys.executable, "-m", "converter")

# Runs a command whose every piece takes a while, and says of each that it has begun; with UNTIL_HEARD each waits for a
# signal first, so that none comes too late, however busy the machine is.
# Whoever starts the tests in the background makes them ignore SIGINT, and all that they start.
SLOW = """
import os, signal, sys, threading, time
heard = threading.Event()
def hear(*_):
    heard.set()
    raise KeyboardInterrupt
signal.signal(signal.SIGINT, hear)
import converter.cli
import converter.run.execute
from converter.cli import main
converter.cli._interrupt = hear
write = converter.run.execute.write_piece
def write_slowly(piece, chunk_nbytes):
    os.write(1, b"begun\\n")
    if "UNTIL_HEARD" in os.environ:
        heard.wait(60)
    time.sleep(0.2)
    return write(piece, chunk_nbytes)
converter.run.execute.write_piece = write_slowly
sys.exit(main(sys.argv[1:]))
"""


# Help.


def test_the_list_of_commands(wconv: Callable[..., Any]) -> None:
    shown = wconv("--help").stdout
    assert shown == wconv("-h").stdout
    listed = re.search(r"Commands:\n(.*?)\n\n", shown + "\n\n", re.DOTALL)
    assert listed
    flat = " ".join(listed[1].split())
    assert flat == " ".join(f"{name} {summary}" for name, summary in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_matches_the_list(name: Any, wconv: Callable[..., Any]) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command
    assert (command.name, command.short_help) == (name, COMMANDS[name])
    shown = wconv(name, "--help").stdout
    assert f"wconv {name}" in shown
    assert command.help
    assert all(option.help for option in command.params if option.param_type_name == "option")
    assert command.callback
    assert command.callback.__doc__


def test_every_command_has_its_module_and_nothing_else() -> None:
    folder = Path(converter.cli.convert.__file__).parent
    modules = {path.stem for path in folder.glob("*.py")}
    shared = {"__init__", "convert", "doctor_modes", "guesses", "many", "options", "report", "terminal"}
    assert modules - shared == {name.replace("-", "_") for name in COMMANDS}


def test_the_version(wconv: Callable[..., Any]) -> None:
    assert wconv("--version").stdout == f"wconv, version {converter.__version__}\n"


@pytest.mark.parametrize("args", [("no-such-command",), ("inspect", "a", "b"), ("--no-such-option",), ("verify",)])
def test_wrong_usage(args: tuple[str, ...], wconv: Callable[..., Any]) -> None:
    outcome = wconv(*args, exit_code=2)
    assert outcome.stdout == ""
    assert outcome.stderr.startswith("Usage: wconv")


def test_an_option_that_nothing_takes_is_an_error() -> None:
    with pytest.raises(TypeError, match="'varient'"):
        Request.of(".", tied=None, varient="fp16")
    options: Options = {"quiet": True, "worker": 1}
    with pytest.raises(TypeError, match="'worker'"):
        RunOptions(**options)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "doctor"])  # that is no conversion
def test_every_option_is_taken(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command
    assert command.callback
    explicit = set(inspect.signature(command.callback).parameters)
    options: Options = {str(param.name): None for param in command.params if param.name not in explicit | {"scheme"}}
    take_run(options)
    options |= dict.fromkeys(options.keys() & {"components", "keep_fp32", "only", "drop", "rename"}, ())
    options |= {"on_overflow": "error"}
    Request.of(".", **options)


# Exit codes.


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (BadRequest("x", "is wrong", "Do this."), 2),
        (BadFile("x", "is bad", "Do this."), 3),
        (Unsupported("x", "is odd", "Do this."), 4),
        (OutputRefused("x", "exists", "Do this."), 5),
        (LossyCast("x", "overflows", "Do this."), 6),
        (SystemRefused("x", "is full", "Do this."), 7),
        (PermissionError(13, "Permission denied", "x"), 7),
        (MemoryError(), 7),
        (RuntimeError("can't start new thread"), 7),
        (ImportError("lib.so: failed to map segment from shared object"), 7),
        (ImportError("Original error was: lib.so: out of memory: Cannot allocate memory"), 7),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_error_has_its_exit_code_and_one_line(
    error: Any, exit_code: int, wconv: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: Any, **_options: Any) -> None:
        raise error

    monkeypatch.setattr(converter.cli.convert, "prepare", fail)
    outcome = wconv("to-safetensors", tmp_path, exit_code=exit_code)
    assert outcome.stdout == ""
    assert outcome.stderr.strip().count("\n") == 0
    assert outcome.stderr.startswith(("x: ", "the operating system: gives no ")) or exit_code == 130


@pytest.mark.parametrize("error", [RuntimeError("oh"), KeyError("x"), AssertionError()], ids=repr)
def test_an_unexpected_error_is_a_bug_with_its_traceback(
    error: Any, wconv: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: Any, **_options: Any) -> None:
        raise error

    monkeypatch.setattr(converter.cli.convert, "prepare", fail)
    outcome = wconv("to-safetensors", tmp_path, exit_code=70)
    assert outcome.stdout == ""
    assert outcome.stderr.startswith("Traceback")
    assert type(error).__name__ in outcome.stderr
    assert "report" in outcome.stderr.splitlines()[-1]


def test_the_messages_of_the_system_are_printable(wconv: Callable[..., Any], tmp_path: Path) -> None:
    outcome = wconv("to-safetensors", tmp_path / "x\x1b[31m\ny", exit_code=3)
    assert "\x1b" not in outcome.stderr
    assert outcome.stderr.count("\n") == 1


# Signals.


def begin_slowly(folder: Path, *args: str) -> subprocess.Popen[str]:
    """Start a slow command; return when it has begun to write."""
    process = subprocess.Popen(
        (sys.executable, "-c", SLOW, *args),
        cwd=folder,
        env={**os.environ, "UNTIL_HEARD": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "begun\n", process.communicate()[1]
    return process


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT], ids=["term", "int"])
@pytest.mark.parametrize("args", [("m",), ("m", "-o", "deep/out"), ("m", "--delete-source", "--json")], ids=" ".join)
def test_a_signal_ends_it_cleanly(which: signal.Signals, args: tuple[str, ...], tmp_path: Path) -> None:
    save_pipeline(tmp_path / "m")
    before = snapshot(tmp_path)
    process = begin_slowly(tmp_path, "to-safetensors", *args)
    process.send_signal(which)
    _, complaint = process.communicate(timeout=HANGS)
    assert process.returncode == 130
    assert "Interrupted" in complaint
    assert complaint.strip().count("\n") == 0
    assert snapshot(tmp_path) == before


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_an_interrupt_is_heard_within_a_piece(tmp_path: Path) -> None:
    save_bin_shards(STATE, tmp_path / "m", tuple("abcdef"))
    process = begin_slowly(tmp_path, "to-safetensors", "m", "--workers", "1")
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=HANGS)
    assert process.returncode == 130
    assert shown.count("begun") <= 2  # of the five that were left


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_a_kill_leaves_no_file_with_a_final_name(wconv: Callable[..., Any], tmp_path: Path) -> None:
    source = save_bin_shards(STATE, tmp_path / "m").parent
    process = begin_slowly(tmp_path, "to-safetensors", "m")
    process.kill()
    process.communicate(timeout=HANGS)
    assert process.returncode == -signal.SIGKILL
    assert [name for name in names_in(source) if "/" not in name and not name.startswith((".", "pytorch_model"))] == []
    wconv("to-safetensors", source)
    assert not list(source.glob(".*"))


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_verify_is_interrupted_too(tmp_path: Path) -> None:
    save(STATE, tmp_path / "a.bin")
    slow = SLOW.replace("converter.run.execute.write_piece", "converter.recipes.verify._compare_batch").replace(
        "import converter.run.execute\n", "import converter.recipes.verify\n"
    )
    process = subprocess.Popen(
        (sys.executable, "-c", slow, "verify", "a.bin", "a.bin"),
        cwd=tmp_path,
        env={**os.environ, "UNTIL_HEARD": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=HANGS)
    assert (process.returncode, complaint.strip()) == (130, "Interrupted.")


# Pipes and terminals.


def test_output_through_a_pipe_that_closes(tmp_path: Path) -> None:
    save({f"t{number:05d}" * 20: STATE["a"] for number in range(2000)}, tmp_path / "pytorch_model.bin")
    process = subprocess.Popen(
        (*WCONV, "inspect", "--tensors"), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stderr
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=HANGS) == 0
    process.stderr.close()


def run_unheard(folder: Path, *args: str) -> tuple[int, str]:
    """Run a command whose output nobody reads; give its exit code and what it says on stderr."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            (*WCONV, *args), cwd=folder, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writer)
    return done.returncode, done.stderr


def test_a_conversion_whose_output_nobody_reads_is_done_all_the_same(tmp_path: Path) -> None:
    save_bin_shards(STATE, tmp_path / "m")
    assert run_unheard(tmp_path, "to-safetensors", "m", "-o", "out") == (0, "")
    assert len(names_in(tmp_path / "out")) == 4


def test_a_comparison_whose_output_nobody_reads_has_its_exit_code(tmp_path: Path) -> None:
    for name, seed in (("a.bin", 0), ("b.bin", 0), ("c.bin", 1)):
        save(make_state(seed=seed), tmp_path / name)
    assert run_unheard(tmp_path, "verify", "a.bin", "b.bin") == (0, "")
    assert run_unheard(tmp_path, "verify", "a.bin", "c.bin") == (1, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_names_that_the_output_cannot_spell(encoding: str, tmp_path: Path) -> None:
    save({"ü": STATE["a"], "重み": STATE["b"]}, tmp_path / "重み.bin")
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    for args in (("inspect", "--tensors"), ("inspect", "--json"), ("to-safetensors", "--dry-run"), ("to-safetensors",)):
        done = subprocess.run((*WCONV, *args), cwd=tmp_path, capture_output=True, env=environment, check=False)
        assert (done.returncode, done.stderr) == (0, b""), args


def test_errors_that_the_output_cannot_spell(tmp_path: Path) -> None:
    (tmp_path / "重み.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = (*WCONV, "inspect", "重み.bin")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr.count(b"\n")) == (3, 1)


def read_terminal(args: tuple[str, ...], folder: Path) -> bytes:
    """Run a slow command whose stderr is a terminal; give what it shows there."""
    import fcntl
    import pty
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    command = (sys.executable, "-c", SLOW, *args)
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=slave) as process:
        os.close(slave)
        shown = b""
        while True:
            try:
                part = os.read(master, 4096)
            except OSError:  # Linux says so when the other end is closed
                break
            if not part:
                break
            shown += part
    os.close(master)
    assert process.returncode == 0
    return shown


@pytest.mark.skipif(os.name != "posix", reason="needs pseudo-terminals")
def test_a_bar_is_drawn_on_a_terminal_only(tmp_path: Path) -> None:
    save_bin_shards(STATE, tmp_path / "m")
    shown = read_terminal(("to-safetensors", "m", "-o", "out"), tmp_path)
    assert b"converting" in shown
    assert b"B/s" in shown
    assert read_terminal(("to-safetensors", "m", "-o", "quiet", "-q"), tmp_path) == b""
    command = (*WCONV, "to-safetensors", "m", "-o", "plain")
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stderr == b""


# As a module, and from a program.


def test_the_module_is_the_command(tmp_path: Path) -> None:
    save(STATE, tmp_path / "pytorch_model.bin")
    done = subprocess.run((*WCONV, "inspect", "--json"), cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["kind"] == "folder"


def test_a_program_that_calls_it_is_as_it_was(tmp_path: Path) -> None:
    save(STATE, tmp_path / "pytorch_model.bin")
    before = gc.isenabled(), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), Path.cwd()
    for source in (tmp_path, tmp_path / "none"):
        converter.cli.main(["to-safetensors", str(source), "-q"])
    assert before == (gc.isenabled(), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), Path.cwd())


def test_it_may_be_called_from_a_thread(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    save(STATE, tmp_path / "pytorch_model.bin")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(converter.cli.main, ["to-safetensors", str(tmp_path), "-q"]).result() == 0
    assert (tmp_path / "model.safetensors").exists()


# Ctrl-C while Python starts. ``click`` is what takes the longest.

STOPPED = """
import os, signal
os.kill(os.getpid(), signal.SIGINT)
raise ImportError("went on")
"""
# Whoever starts the tests in the background makes them ignore SIGINT, and all that they start.
LISTENING = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(
    "start",
    ["import runpy; runpy.run_module('converter', run_name='__main__')", "from converter.__main__ import main; main()"],
)
def test_ctrl_c_while_modules_load_is_silent(start: str, tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text(STOPPED)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {LISTENING}{start}"
    done = subprocess.run((sys.executable, "-c", code, "--help"), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_after_that_is_told() -> None:
    stop = "import converter.cli as c, os; c.cli.main = lambda **_: os.kill(os.getpid(), signal.SIGINT)"
    code = f"{LISTENING}{stop}; from converter.__main__ import main; sys.exit(main())"
    done = subprocess.run((sys.executable, "-c", f"import sys; {code}"), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_who_ignores_ctrl_c_goes_on() -> None:
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); from converter.__main__ import main; main()"
    code += "; assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN"
    subprocess.run((sys.executable, "-c", code, "--version"), check=True, capture_output=True)


def test_the_command_begins_there() -> None:
    import configparser

    setup = configparser.ConfigParser()
    setup.read(Path(converter.__file__).parents[1] / "setup.cfg")
    assert setup["options.entry_points"]["console_scripts"].strip() == "wconv = converter.__main__:main"


def test_modules_in_the_current_folder_are_not_imported(tmp_path: Path) -> None:
    for name in ("click", "json", "gc"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('planted')")
    root = str(Path(converter.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    subprocess.run((*WCONV, "--version"), cwd=tmp_path, env=environment, check=True)


# Too little memory. What the system gives up at first depends on the machine: which limits those are, too.

LITTLE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]), int(sys.argv[1])))
del sys.argv[1]
from converter.__main__ import main
sys.exit(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs the limits of Linux")
def test_too_little_address_space_is_one_line(tmp_path: Path) -> None:
    save(STATE, tmp_path / "model.bin")
    for nbytes in (70_000_000, 80_000_000, 90_000_000):
        command = [sys.executable, "-c", LITTLE, str(nbytes), "recast", "model.bin", "--dtype", "bf16", "-o", "out"]
        done = subprocess.run([*command, "-q"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode != 70
        assert "Traceback" not in done.stderr
        if done.returncode == 7:
            assert done.stderr.count("\n") == 1
            assert names_in(tmp_path) == ["model.bin"]


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("to-safetensor",), "'to-safetensors'"),
        (("Merge_LoRA",), "'merge-lora'"),
        (("rename",), "'to-safetensors --rename' or 'rename-variant'"),
        (("to-single-file", "x", "--half"), "'--dtype fp16'"),
        (("to-single-file", "x", "--no-vae"), "'--without vae'"),
        (("merge-lora", "x", "y", "--scale", "2"), "'ADAPTER:WEIGHT'"),
    ],
)
def test_what_is_guessed_is_answered(words: tuple[str, ...], meant: str, wconv: Callable[..., Any]) -> None:
    assert f"Did you mean {meant}" in wconv(*words, exit_code=2).stderr


def test_a_guess_names_only_what_there_is(wconv: Callable[..., Any]) -> None:
    assert "--dtype" not in wconv("inspect", "--half", exit_code=2).stderr
    assert "Did you mean" not in wconv("unheard-of", exit_code=2).stderr

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

import pytest
from support.tiny import make_state, names_in, save, save_bin_shards, save_pipeline, snapshot

import converter
import converter.cli.convert
from converter.cli import COMMANDS, cli
from converter.cli.convert import RunOptions, take_request, take_run
from converter.errors import BadFile, BadRequest, LossyCast, OutputRefused, SystemRefused, Unsupported

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

"""Fixtures for the whole suite: the command in this process, and tiny models saved by the real libraries.

The libraries take seconds to import, so only the fixtures that need them do.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Machines that run tests are slow now and then.
settings.register_profile("wconv", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("wconv")


@dataclass(frozen=True)
class Outcome:
    """What one run of the command left: its exit code and what it printed."""

    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def no_fsync() -> Iterator[None]:
    """Leave the disk in peace: some tests sync hundreds of files, and no power fails here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Let no test note anything in the state folder of whoever runs it."""
    folder = tmp_path_factory.mktemp("state")
    os.environ["WCONV_STATE"] = str(folder)
    return folder


@pytest.fixture
def asked_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask the libraries in this process, which has them loaded: what a child does is for test_ask.py."""
    from converter.libraries import ask, asked

    def answer(request: str) -> Any:
        return ask.checked(json.dumps(asked.answer_to(json.loads(request))).encode())

    monkeypatch.setattr(ask, "_ask", answer)


@pytest.fixture(scope="session")
def wconv() -> Callable[..., Outcome]:
    """Run `wconv` in this process and check its exit code; None is for any but that of a bug."""

    def run(*args: object, exit_code: int | None = 0) -> Outcome:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run_main([str(arg) for arg in args])
        outcome = Outcome(code, out.getvalue(), err.getvalue())
        assert code != 70 if exit_code is None else code == exit_code, (
            f"wconv {args} ended with {code}\n{outcome.stdout}{outcome.stderr}"
        )
        return outcome

    return run


def run_main(args: list[str]) -> int:
    """Return the exit code of the command, whether it returns it or exits with it; undo what it does to its process."""
    from converter.cli import main

    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        code: object = main(args)
    except SystemExit as stop:
        code = stop.code
    finally:
        gc.enable()
        signal.signal(signal.SIGTERM, on_terminate)
    return code if isinstance(code, int) else 0 if code is None else 1


@pytest.fixture(scope="session")
def builders() -> Any:
    """Give `tests/support/builders.py`, with the libraries' progress bars off and one thread for models this small."""
    import torch
    from diffusers.utils import logging as diffusers_logging
    from support import builders
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    return builders


@pytest.fixture(scope="session")
def saved_model(builders: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Path]]:
    """Give a model of `builders.MODELS` and its `.bin` folder, in so many shards: built once, not to be written to."""

    @cache
    def build(name: str, shards: int = 1) -> tuple[Any, Path]:
        model = builders.MODELS[name]()
        return model, builders.save_bin(model, tmp_path_factory.mktemp(name) / "model", shards)

    return build


@pytest.fixture(scope="session")
def founding_folders(builders: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Give the two pipelines with a sharded `.bin` UNet of the founding report: not to be written to."""
    root = tmp_path_factory.mktemp("founding")
    return {
        "sd_bin_sharded": builders.save_sd_bin_sharded(root / "sd_bin_sharded"),
        "sd_bin_sharded_today": builders.save_sd_bin_sharded_today(root / "sd_bin_sharded_today"),
    }


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Copy a folder into the test's own, where it may be written to."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / "source"))

    return copy


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder for files that are written again and again, as property tests do."""
    return tmp_path_factory.mktemp("scratch")

"""The lock that keeps two runs out of one folder: who has it, and when it is free again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from converter.storage import lock
from converter.storage.lock import hold
from converter.storage.root import Root

HOLD = """
import sys, time
from pathlib import Path
from converter.storage.lock import hold
from converter.storage.root import Root
with Root(Path(sys.argv[1])) as root, hold(root, "it.lock") as is_held:
    print(is_held, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path.resolve()


def test_one_holds_it_at_a_time(folder: Path) -> None:
    with Root(folder) as root:
        for _ in range(2):
            with hold(root, "it.lock") as first, hold(root, "it.lock") as second, hold(root, "other.lock") as other:
                assert (first, second, other) == (True, False, True)
                assert (folder / "it.lock").exists()
            assert not list(folder.iterdir())


def test_it_is_let_go_when_something_goes_wrong(folder: Path) -> None:
    with Root(folder) as root:
        with pytest.raises(KeyError), hold(root, "it.lock"):
            raise KeyError
        with hold(root, "it.lock") as is_held:
            assert is_held


def test_a_process_that_is_killed_holds_it_no_longer(folder: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, Root(folder) as root:
        assert process.stdout
        assert process.stdout.readline() == "True\n"
        with hold(root, "it.lock") as is_held:
            assert not is_held
        process.kill()
        process.wait()
        assert (folder / "it.lock").exists()
        with hold(root, "it.lock") as is_held:
            assert is_held
    assert not list(folder.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_process_that_was_forked_meanwhile_does_not_keep_it(folder: Path) -> None:
    with Root(folder) as root:
        with hold(root, "it.lock"):
            child = os.fork()
            if not child:
                signal.pause()
                os._exit(0)
        try:
            with hold(root, "it.lock") as is_held:
                assert is_held
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.mark.skipif(os.name == "nt", reason="an open file cannot be removed")
def test_a_lock_whose_file_its_holder_has_just_removed_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def remove_first(file: int) -> None:
        (folder / "it.lock").unlink()

    monkeypatch.setattr(lock, "_lock", remove_first)
    with Root(folder) as root, hold(root, "it.lock") as is_held:
        assert not is_held


@pytest.mark.skipif(os.name == "nt", reason="needs links")
def test_a_link_in_its_place_is_not_followed(folder: Path) -> None:
    (folder / "mine").write_bytes(b"x")
    (folder / "it.lock").symlink_to("mine")
    with Root(folder) as root, pytest.raises(OSError, match=r"it\.lock"), hold(root, "it.lock"):
        pass
    assert (folder / "mine").read_bytes() == b"x"

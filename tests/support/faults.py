"""A fault at every system call of a command, in turn: it fails, all fail from there on, or the process dies.

As a script, ``python faults.py ROOT``, with ``fault_shim.c`` preloaded: carries out the scenario in
ROOT/scenario.json and writes ROOT/results.json. The folder ROOT/world, in which the command runs, is made anew for each
fault from ROOT/template, always at the same place. This process has imported all that the command needs, and forks.

After each fault the world is as it was, or as an undisturbed run leaves it, or the same command once more makes it so.
``Judge`` says what else must hold. wconv's own files are told by their names (a dot in front, ``wconv`` in it) and by
lying in the folder WCONV_STATE.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

TEMPLATE, EXTRA, WORLD, STATE = "template", "extra", "world", "state"
SCENARIO, RESULTS, LOG = "scenario.json", "results.json", "log"
KILLS = ("kill", "kill-after")
_HANGS_AFTER_SECONDS = 120
_NAMED_AT_MOST = 3
_CHANGE, _ROOM, _READ = range(3)  # as in fault_shim.c
_WEIGHTS = (".safetensors", ".bin")
_EXIT_CODES = (0, 3, 5, 7)


@dataclass(frozen=True)
class Scenario:
    """A command that runs in a copy of ROOT/template, once ``before`` has run there and ROOT/extra was copied over it.

    ``undo`` is the command that takes it all back to what the template and the extra files were. ``tensors`` are the
    bytes, in hexadecimals, of what must never be lost.
    """

    command: tuple[str, ...]
    before: tuple[tuple[str, ...], ...] = ()
    undo: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """What came of one fault: ``outcome`` is old, new, taken up or other, the last for the reason ``problem``.

    ``unnamed`` are files of wconv's own that a run left which failed, and did not name.
    """

    mode: str
    number: int
    call: str
    outcome: str
    problem: str
    unnamed: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.mode} at {self.number} ({self.call}): {self.problem}"


class Step(NamedTuple):
    """A call that was counted."""

    number: int
    function: str
    kind: int
    path: str


class Fault(NamedTuple):
    """What happens at which call; none at call 0."""

    mode: str = "off"
    number: int = 0


class Ended(NamedTuple):
    """How a process ended: by an exit code, or below zero by a signal."""

    code: int
    said: str


class Look(NamedTuple):
    """What the world holds: a hash of each thing that is the user's; wconv's own things by content, and their names."""

    shown: dict[str, str]
    own: Counter[str]
    own_names: frozenset[str]

    def is_like(self, other: Look) -> bool:
        return (self.shown, self.own) == (other.shown, other.own)

    def left_since(self, other: Look) -> tuple[str, ...]:
        """Name what is wconv's own here, and not there."""
        return () if self.own == other.own else tuple(sorted(self.own_names - other.own_names))


NO_FAULT = Fault()


class Stage:
    """Where the runs of one scenario happen."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.world = root / WORLD
        self.scenario = Scenario(**json.loads((root / SCENARIO).read_text("utf-8")))
        self.shim = ctypes.CDLL(os.environ["LD_PRELOAD"])

    def restore(self, *, is_prepared: bool = True) -> None:
        """Make the world anew, as it is before the command."""
        shutil.rmtree(self.world, ignore_errors=True)
        shutil.copytree(self.root / TEMPLATE, self.world, symlinks=True)
        for command in self.scenario.before if is_prepared else ():
            ended = self.run(command)
            assert not ended.code, ended.said
        if (self.root / EXTRA).exists():
            shutil.copytree(self.root / EXTRA, self.world, dirs_exist_ok=True)

    def run(self, command: tuple[str, ...], fault: Fault = NO_FAULT, *, noting_modules: bool = False) -> Ended:
        """Run a command in a process of its own."""
        said = self.root / "said"
        os.truncate(self.root / LOG, 0)
        child = os.fork()
        if not child:
            self._be_child(command, fault, said, noting_modules)
        status = os.waitpid(child, 0)[1]
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        return Ended(code, said.read_text("utf-8", "replace"))

    def _be_child(self, command: tuple[str, ...], fault: Fault, said: Path, noting_modules: bool) -> None:
        code = 70
        try:
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 1)
            os.dup2(1, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.chdir(self.world)
            signal.alarm(_HANGS_AFTER_SECONDS)
            code = self._call_main(command, fault)
            if noting_modules:
                (self.root / "modules").write_text("\n".join(sys.modules), "utf-8")
        except BaseException:
            traceback.print_exc()
        finally:
            self.shim.fault_arm(0, b"off")
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _call_main(self, command: tuple[str, ...], fault: Fault) -> int:
        from converter.cli import main

        self.shim.fault_arm(fault.number, fault.mode.encode())
        return main(command)

    def steps(self) -> list[Step]:
        """Give the calls of the last run that were counted."""
        lines = (line.split(" ", 3) for line in (self.root / LOG).read_text("utf-8").splitlines())
        return [Step(int(number), function, int(kind), path) for number, function, kind, path in lines]

    def look(self) -> Look:
        """See what is there."""
        shown: dict[str, str] = {}
        own: Counter[str] = Counter()
        names = set()
        for path in sorted(self.world.rglob("*")):
            name = path.relative_to(self.world).as_posix()
            digest = _digest(path)
            if name.partition("/")[0] == STATE:
                # Folders and locks may stay there; what else is there differs from run to run (times, random names).
                if digest != "folder" and "lock" not in path.name:
                    own[f"{STATE} {path.suffix}"] += 1
                    names.add(_without_tokens(name))
            elif any(part.startswith(".") and "wconv" in part for part in Path(name).parts):
                own[digest] += 1
                names.add(_without_tokens(name))
            else:
                shown[name] = digest
        return Look(shown, own, frozenset(names))


def _digest(path: Path) -> str:
    if path.is_symlink():
        return f"link to {path.readlink()}"
    return "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()


class Judge:
    """Knows the old state and the new one, and says what came of a fault."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.scenario = stage.scenario
        self.tensors = [bytes.fromhex(tensor) for tensor in self.scenario.tensors]
        stage.restore(is_prepared=False)
        self.undone = stage.look()
        stage.restore()
        self.old = stage.look()
        ended = stage.run(self.scenario.command, Fault("count"))
        assert not ended.code, ended.said
        self.steps = stage.steps()
        self.new = stage.look()
        assert self.harm(self.new) == "", self.harm(self.new)
        assert not self.new.is_like(self.old)

    def faults(self) -> Iterator[tuple[Fault, Step]]:
        """Give every fault there can be.

        A death after a call leaves the disk as one before the next call does, so that is tried for the last one only.
        """
        for step in self.steps:
            yield from ((Fault(mode, step.number), step) for mode in ("eio", "eio-on", "kill"))
            if step.kind == _ROOM:
                yield Fault("enospc", step.number), step
        yield Fault("kill-after", self.steps[-1].number), self.steps[-1]
        self.stage.restore()
        self.stage.run(self.scenario.command, Fault("read"))
        yield from ((Fault("read", step.number), step) for step in self.stage.steps() if step.kind == _READ)

    def judge(self, fault: Fault, step: Step) -> Result:
        """Let a fault happen; see what it left, and what runs after it make of that."""
        first, now = self._strike(fault)
        outcome = "old" if now.is_like(self.old) else "new" if now.is_like(self.new) else "taken up"
        left = now.left_since(self.new if first.code == 0 else self.old)
        unnamed = () if fault.mode in KILLS else tuple(name for name in left if not _is_named(name, first.said))
        problem = self.harm(now) or self._bad_end(fault, first, now, unnamed)
        if not problem and outcome == "taken up":
            problem = self._run(self.scenario.command, self.new, "again")
        if not problem and self.scenario.undo:
            problem = self._undo(fault, outcome)
        call = f"{step.function} {Path(step.path).relative_to(self.stage.world)}"
        return Result(*fault, call, "other" if problem else outcome, problem, unnamed)

    def _strike(self, fault: Fault) -> tuple[Ended, Look]:
        self.stage.restore()
        return self.stage.run(self.scenario.command, fault), self.stage.look()

    def _bad_end(self, fault: Fault, ended: Ended, now: Look, unnamed: tuple[str, ...]) -> str:
        """Say what is wrong with how a run ended by itself."""
        if fault.mode in KILLS:
            return "" if ended.code == -signal.SIGKILL else f"was not killed, ended with {ended.code}"
        if ended.code == -signal.SIGALRM:
            return "hung"
        if "Traceback" in ended.said:
            return f"traceback: {ended.said.splitlines()[-2]}"
        # A folder that cannot be read is a finding of the doctor's.
        if ended.code not in (*_EXIT_CODES, *((1,) if fault.mode == "read" and self._is_doctor else ())):
            return f"ended with {ended.code}: {ended.said.splitlines()[-1:]}"
        if ended.code:
            return ""
        if now.shown != self.new.shown:
            return f"ended with 0, but {_difference(now, self.new)}"
        return f"ended with 0, left and did not name {_some(unnamed)}" if unnamed else ""

    @property
    def _is_doctor(self) -> bool:
        return self.scenario.command[0] == "doctor"

    def _undo(self, fault: Fault, outcome: str) -> str:
        """Take a mending back, once after it was carried out after all, and once right after the fault."""
        if outcome == "old":
            self.stage.run(self.scenario.command)
        problem = self._run(self.scenario.undo, self.undone, "undone after it was mended again")
        if problem:
            return problem
        _, now = self._strike(fault)
        # Where nothing of the user's was changed, there is nothing to undo, and what was begun goes all the same.
        codes = (2,) if now.is_like(self.undone) else (0, 2) if now.shown == self.undone.shown else (0,)
        return self._run(self.scenario.undo, self.undone, "undone at once", codes)

    def _run(self, command: tuple[str, ...], expected: Look, when: str, codes: tuple[int, ...] = (0,)) -> str:
        """Run a command with no fault; say what is not as it should be."""
        ended = self.stage.run(command)
        now = self.stage.look()
        if ended.code not in codes:
            return f"{when}: ended with {ended.code}: {ended.said.splitlines()[-1:]}"
        return "" if now.is_like(expected) else f"{when}: {_difference(now, expected)}"

    def harm(self, now: Look) -> str:
        """Say what must not be at any moment, and is."""
        both = self.old.shown.items() & self.new.shown.items()
        for name, digest in sorted(both):
            if now.shown.get(name) != digest:
                return f"{name} is not what it was before and would be afterwards"
        for name, digest in now.shown.items():
            if digest not in ("folder", self.old.shown.get(name), self.new.shown.get(name)):
                return f"{name} is neither old nor new"
        return self._mixed_index(now) or self._lost_tensor()

    def _mixed_index(self, now: Look) -> str:
        """Name an index that joins other files than it did before, or will afterwards."""
        for name in now.shown:
            if ".index" in name and name.endswith(".json"):
                path = self.stage.world / name
                files = {(path.parent / shard).relative_to(self.stage.world).as_posix()
                         for shard in json.loads(path.read_text("utf-8"))["weight_map"].values()}  # fmt: skip
                states = [{file: look.shown.get(file) for file in (name, *files)} for look in (now, self.old, self.new)]
                if states[0] not in states[1:]:
                    return f"{name} joins old and new shards, or some that are not there"
        return ""

    def _lost_tensor(self) -> str:
        contents = [path.read_bytes() for path in self.stage.world.rglob("*") if path.suffix in _WEIGHTS]
        lost = sum(not any(tensor in content for content in contents) for tensor in self.tensors)
        return f"{lost} tensors are lost" if lost else ""


def _is_named(name: str, said: str) -> bool:
    """Say whether a text names a file, or a folder that it lies in."""
    said = _without_tokens(said)
    return any(part in said for part in Path(name).parts if part.startswith(".") or part == Path(name).name)


def _without_tokens(text: str) -> str:
    """Give a text without what is another one in each run."""
    return re.sub(r"[0-9a-f]{32}", "TOKEN", text)


def _difference(now: Look, expected: Look) -> str:
    """Name what differs."""
    shown = {name for name, _ in now.shown.items() ^ expected.shown.items()}
    more, less = now.own_names - expected.own_names, expected.own_names - now.own_names
    said = (("differs in", shown), ("also has", more), ("lacks", less))
    told = " and ".join(f"{verb} {_some(sorted(names))}" for verb, names in said if names)
    return told or "what wconv keeps there has other content"


def _some(names: Sequence[str]) -> str:
    """Name the first of many."""
    more = f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
    return ", ".join(names[:_NAMED_AT_MOST]) + more


def import_all(stage: Stage) -> None:
    """Import what the command imports, so that no child has to; let it use one thread, for the same calls each time."""
    stage.restore()
    stage.run(stage.scenario.command, noting_modules=True)
    for name in (stage.root / "modules").read_text("utf-8").splitlines():
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    importlib.import_module("converter.run.execute").DEFAULT_WORKERS = 1  # type: ignore[attr-defined]


def main(root: Path) -> None:
    """Carry out a scenario."""
    stage = Stage(root)
    import_all(stage)
    judge = Judge(stage)
    results: list[dict[str, Any]] = [asdict(judge.judge(fault, step)) for fault, step in list(judge.faults())]
    (root / RESULTS).write_text(json.dumps({"steps": len(judge.steps), "results": results}), "utf-8")


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    main(Path(sys.argv[1]))

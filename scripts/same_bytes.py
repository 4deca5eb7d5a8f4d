"""Hold this tree against another commit: the same command lines must give the same bytes and exit codes.

The commit, by default the last release's (cd00303), is checked out into a temporary folder. Every row of ROWS is run
by both trees in a folder that is made anew in the same place; then exit codes, all files below that folder by name,
and what is printed as JSON are compared, and with ``--messages`` all else that is printed. The source must be as it
was, but for commands that are there to change it. What has been changed on purpose since a release stands in CHANGES:
a row that differs in anything else, or not in that, ends in exit code 1. Needs what the tests need.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from same_rows import CHANGES, ROWS, Change, Row, rows_of

ROOT = Path(__file__).resolve().parents[1]
RELEASE = "cd00303"
# Commands that may change what they read.
CHANGES_SOURCE = ("--in-place", "--fix", "--undo", "rename-variant", "--delete-source", "--overwrite")
# What no two runs have in common: how long a run took, how fast it was, its memory, and names drawn at random.
PASSING = re.compile(
    r"[\d.]+ s(?= |,|\.?$)|[\d.]+ \w?B/s|[\d.]+ \w?B(?= of memory)|(?<=peak memory )[\d.]+ \w?B|\b[0-9a-f]{32}\b",
    re.MULTILINE,
)
# Of a row that differs in everything.
MOST_LINES = 20
PASSING_KEYS = ("#seconds", "#peak_memory_nbytes")

FOLDER = "folder"
Facts = dict[str, str]  # what is compared: its name -> a hash, or the text where it is JSON


class Outcome(NamedTuple):
    """What a row left in one tree."""

    facts: Facts
    exits: str
    keeps_source: bool


@contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """Give a work tree of a commit while it is needed."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def wconv(tree: Path, folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Run a command line of a tree's wconv in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "WCONV_STATE": str(folder.parent / "state"), "COLUMNS": "200"}
    command_line = [sys.executable, "-m", "converter", *shlex.split(command)]
    return subprocess.run(command_line, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def facts_of(folder: Path) -> Facts:
    """Give all that lies below a folder: hashes of files, the text of JSON, targets of links."""
    facts = {}
    for path in sorted(folder.rglob("*")):
        name = PASSING.sub("~", path.relative_to(folder).as_posix())
        if path.is_symlink():
            facts[name] = f"link to {path.readlink()}"
        elif path.is_dir():
            facts[name] = FOLDER
        else:
            raw = path.read_bytes()
            facts[name] = raw.decode() if path.suffix == ".json" else hashlib.sha256(raw).hexdigest()
    return facts


def outcome_of(row: Row, tree: Path, source: Path, folder: Path, messages: bool) -> Outcome:
    """Run a row in a folder that is made anew."""
    shutil.rmtree(folder.parent, ignore_errors=True)
    shutil.copytree(source, folder / "src", symlinks=True)
    before = facts_of(folder)
    told: Facts = {}
    exits = []
    for number, command in enumerate(row.commands, 1):
        done = wconv(tree, folder, command)
        exits.append(str(done.returncode))
        told[f"exit {number}"] = exits[-1]
        if messages or "--json" in command:
            told |= parts_of(PASSING.sub("~", done.stdout), f"stdout {number}")
        if messages or done.returncode == 70:
            told |= parts_of(PASSING.sub("~", done.stderr), f"stderr {number}")
    after = facts_of(folder)
    shutil.rmtree(folder.parent)
    return Outcome({**told, **after}, " ".join(exits), before.items() <= after.items())


def parts_of(text: str, name: str) -> Facts:
    """Split a text: JSON into its values, by their way there, what is printed into lines."""
    try:
        return leaves(json.loads(text), name)
    except ValueError:
        return {f"{name}#{number}": line for number, line in enumerate(text.splitlines())}


def leaves(content: Any, name: str) -> Facts:
    """Give every value of JSON but those that are another each time."""
    if isinstance(content, dict) and content:
        pairs = [(str(key), value) for key, value in content.items()]
    elif isinstance(content, list) and content:
        pairs = [(str(number), value) for number, value in enumerate(content)]
    else:
        return {} if name.endswith(PASSING_KEYS) else {name: json.dumps(content)}
    return {leaf: text for key, value in pairs for leaf, text in leaves(value, f"{name}#{key}").items()}


def differing(old: Facts, new: Facts) -> dict[str, str]:
    """Give what is not the same, with both values: files under another name by both, of JSON the values in it."""
    left = {text: name for name, text in old.items() if name not in new}
    moved = {left[text]: name for name, text in new.items() if name not in old and text in left and text != FOLDER}
    found = {f"{name} is now {other}": "" for name, other in moved.items()}
    for name in {**old, **new}:
        before, after = old.get(name), new.get(name)
        if before == after or name in moved or name in moved.values():
            continue
        is_json = name.endswith(".json") and before and after
        parts = differing(parts_of(before or "", name), parts_of(after or "", name)) if is_json else {}
        found.update(parts or {name: f"{shorten(before or 'nothing')} -> {shorten(after or 'nothing')}"})
    return found


def shorten(text: str) -> str:
    return text if len(text) <= 160 else text[:80] + "..." + text[-80:]


def judged(row: Row, found: Mapping[str, str], changes: tuple[Change, ...]) -> tuple[bool, list[str]]:
    """Say whether a row differs just in what was changed on purpose, and what is to be told of it."""
    mine = [change for change in changes if re.search(change.rows, str(row))]
    patterns = [pattern for change in mine for pattern in change.facts]
    other = [name for name in found if not any(fnmatchcase(name, pattern) for pattern in patterns)]
    unmet = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in found)]
    faults = [f"{name}: {found[name]}" for name in other] + [f"{pattern}: is the same" for pattern in unmet]
    return not faults, faults or [change.why for change in mine]


def changes_since(commit: str) -> tuple[Change, ...]:
    """Give the changes that a commit does not have."""
    git = ["git", "-C", str(ROOT), "merge-base", "--is-ancestor"]
    made = {last: subprocess.run([*git, last, commit], check=False).returncode == 0 for last in CHANGES}
    return tuple(change for last, changes in CHANGES.items() if not made[last] for change in changes)


def make_sources(names: set[str], folder: Path) -> None:
    """Write each source once."""
    from same_sources import SOURCES

    for name in names:
        (folder / name).mkdir(parents=True)
        SOURCES[name](folder / name)


def compare(row: Row, number: int, trees: tuple[Path, Path], top: Path, messages: bool) -> tuple[Outcome, Outcome]:
    """Run a row in both trees, in the same place."""
    folder = top / f"row{number}" / "work"
    old, new = (outcome_of(row, tree, top / "sources" / row.source, folder, messages) for tree in trees)
    return old, new


def report(row: Row, outcomes: tuple[Outcome, Outcome], changes: tuple[Change, ...]) -> bool:
    """Print a row's line, and what differs; say whether all is well."""
    old, new = outcomes
    found = differing(old.facts, new.facts)
    is_right, told = judged(row, found, changes)
    may_change = any(word in command for command in row.commands for word in CHANGES_SOURCE)
    if not new.keeps_source and not may_change:
        is_right, told = False, ["the source was changed", *told]
    verdict = "DIFFERENT" if not is_right else "as meant" if found else "same"
    more = [f"and {len(told) - MOST_LINES} more"] if len(told) > MOST_LINES else []
    print(f"{verdict:9}  {new.exits:7} {len(new.facts):4}  {row}")
    print(*(f"{'':24}{line}" for line in [*told[:MOST_LINES], *more]), sep="\n", end="\n" if told else "", flush=True)
    return is_right


def main() -> None:
    parser = argparse.ArgumentParser(description="Hold this tree's output against another commit's, byte by byte.")
    parser.add_argument("commit", nargs="?", default=RELEASE, help=f"default: {RELEASE}, the last release")
    parser.add_argument("--row", default="", metavar="REGEX", help="run only rows that this is found in")
    parser.add_argument("--messages", action="store_true", help="compare all that is printed as well")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="rows at a time (default: 2)")
    options = parser.parse_args()
    rows = [row for row in rows_of(ROWS) if re.search(options.row, str(row))]
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name, checked_out(options.commit, Path(name) / "old") as old:
        top = Path(name).resolve()
        make_sources({row.source for row in rows}, top / "sources")
        run = functools.partial(compare, trees=(old, ROOT), top=top, messages=options.messages)
        print(f"{'':9}  exit   facts")
        with ThreadPoolExecutor(options.jobs) as pool:
            outcomes = pool.map(run, rows, range(len(rows)))
            changes = changes_since(options.commit)
            right = [report(row, pair, changes) for row, pair in zip(rows, outcomes, strict=True)]
    seconds = time.monotonic() - begun
    print(f"{right.count(True)} of {len(right)} rows are right, against {options.commit}, in {seconds:.0f} s")
    sys.exit(not all(right))


if __name__ == "__main__":
    main()

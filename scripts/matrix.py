"""Install wconv with each Python that it promises to run on, and convert a small model there and back.

Looks for each of PYTHONS on the PATH, and then with pyenv; makes a fresh environment of each below FOLDER, installs
this tree into it with what it needs and no more (no torch), and runs STEPS on a folder that make_sample.py writes.
Ends with 1 where a step fails, or where no Python was there; a Python that was not is said, and is no failure.
Only the standard library is used, so that any Python runs this.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# From setup.cfg's python_requires to the newest that there is.
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
# Torch files and safetensors are read and written, numbers cast, and all of it compared and looked at.
STEPS = (
    "to-safetensors model -o converted -q",
    "verify model converted -q",
    "to-bin converted -o back --max-shard-size none --verify -q",
    "verify model back -q",
    "recast converted --dtype bf16 -o small -q",
    "verify --cast converted small -q",
    "inspect small --json",
    "doctor converted -q",
)
# This tree must not be found but as it is installed.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}


def find_python(version: str) -> str | None:
    """Give the program of a Python that can make environments, if there is one."""
    pyenv = shutil.which("pyenv")
    prefix = _output_of([pyenv, "prefix", version]) if pyenv else None
    candidates = (f"python{version}", f"{prefix}/bin/python" if prefix else None)
    check = f"import ensurepip, sys; print(sys.version_info[:2] == ({version.replace('.', ', ')}))"
    return next((name for name in candidates if name and _output_of([name, "-c", check]) == "True"), None)


def _output_of(command: list[str]) -> str | None:
    """Give what a command prints, or None where it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def try_python(program: str, folder: Path) -> str | None:
    """Install and convert with a Python; give what went wrong."""
    shutil.rmtree(folder, ignore_errors=True)
    bin_folder = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = str(bin_folder / "python")
    commands = [
        [program, "-m", "venv", str(folder / "venv")],
        [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", str(ROOT)],
        [python, str(ROOT / "scripts" / "make_sample.py"), "model"],
        *([str(bin_folder / "wconv"), *step.split()] for step in STEPS),
    ]
    folder.mkdir(parents=True)
    for command in commands:
        done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}"
    return None


def main() -> int:
    """Try each Python, and say what came of it."""
    parser = argparse.ArgumentParser(
        description="Install wconv and convert a small model with each Python that it is for."
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where environments are made; what is there goes")
    parser.add_argument("--python", action="append", metavar="3.X", help="only this; may be given again")
    options = parser.parse_args()
    tried: dict[str, str | None] = {}
    for version in options.python or PYTHONS:
        program, began = find_python(version), time.monotonic()
        if program is None:
            print(f"Python {version}: is not here")
            continue
        tried[version] = try_python(program, options.folder.resolve() / version)
        print(f"Python {version}: {tried[version] or 'ok'} ({time.monotonic() - began:.0f} s)", flush=True)
    return int(not tried or any(tried.values()))


if __name__ == "__main__":
    sys.exit(main())

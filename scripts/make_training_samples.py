"""Make small checkpoints as training libraries leave them, each with what the library's own reader makes of it.

    .venv-trainers/bin/python scripts/make_training_samples.py build/training --pack tests/corpus/training

OUT gets a folder for each sample, see ``samples_common.py`` for what is in it; ``--pack`` also writes each as a zip.
"""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

from samples_common import pack

# Each a module beside this one, in which ``make`` writes the samples that begin with its name.
FAMILIES = ("dcp", "ranks", "zero", "trainer", "modules", "nested")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--only", action="append", choices=FAMILIES, help="make this family (more than once: these)")
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="also write each sample as a zip into FOLDER")
    args = parser.parse_args()
    packed = args.pack and args.pack.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    # Libraries write the paths that they were given into their files: these are short and the same everywhere.
    os.chdir(args.out)
    for family in args.only or FAMILIES:
        importlib.import_module(f"samples_{family}").make()
        for folder in sorted(Path().glob(f"{family}-*")):
            nbytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            print(f"{nbytes:9,d}  {folder}")
            if packed:
                packed.mkdir(parents=True, exist_ok=True)
                pack(folder, packed / f"{folder.name}.zip")


if __name__ == "__main__":
    main()

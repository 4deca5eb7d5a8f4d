"""Load converted pipelines with the diffusers and transformers versions that people have.

    python scripts/loader_versions.py WORK_FOLDER [ENVIRONMENT ...]

Makes one virtual environment a loader set below WORK_FOLDER (they stay, and are used again), builds the two pipelines
with a sharded `.bin` UNet of the founding report with today's libraries, converts each with `wconv to-safetensors`, and
loads source and results in every environment: the whole pipeline, the pipeline with a tokenizer given (transformers 5
saves none that transformers 4 reads, which no conversion of weights can mend), and the UNet alone. A load is `ok` only
when every tensor is the source's: old transformers fill in names they do not find with random numbers, and only warn.

Ends with 1 when a conversion fails, or a pipeline loads in some environment neither as converted nor merged with
`--max-shard-size none`.
Takes several GB of disk and, the first time, half an hour of pip; needs Python 3.11. No part of `make test`.
"""

from __future__ import annotations

import argparse
import configparser
import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
TODAY = "today"
# accelerate is not pinned by the reports: the release of the same weeks, so that it never asks for another hub.
ENVIRONMENTS = {
    "d023": [
        "diffusers==0.23.1",
        "transformers==4.34.1",
        "huggingface_hub==0.17.3",
        "safetensors==0.4.4",
        "accelerate==0.24.1",
        "numpy<2",
    ],
    "apple": [
        "diffusers==0.30.2",
        "transformers==4.44.2",
        "huggingface_hub==0.24.6",
        "accelerate==0.34.2",
        "numpy==1.26.4",
    ],
    "d032": [
        "diffusers==0.32.2",
        "transformers==4.48.3",
        "huggingface_hub==0.29.3",
        "accelerate==1.3.0",
        "numpy<2",
    ],
    "d033": [
        "diffusers==0.33.1",
        "transformers==4.51.3",
        "huggingface_hub==0.31.4",
        "accelerate==1.6.0",
        "numpy<2",
    ],
    TODAY: [
        "diffusers==0.42.1",
        "transformers==5.24.0",
        "huggingface_hub==2.4.0",
        "accelerate==1.15.0",
        "safetensors==0.8.0",
    ],
}
PIPELINES = ["sd_bin_sharded", "sd_bin_sharded_today"]
FORMS: dict[str, list[str] | None] = {
    "source": None,
    "beside": [],
    "new": [],
    "merged": ["--max-shard-size", "none"],
    "new merged": ["--max-shard-size", "none"],
}


def main() -> int:
    """Make the environments and folders, load everything everywhere, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for the environments and the models")
    parser.add_argument("environments", nargs="*", help=f"some of: {', '.join(ENVIRONMENTS)} (default: all)")
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.probe:
        print(json.dumps(probe(args.work)))
        return 0
    names = args.environments or list(ENVIRONMENTS)
    if unknown := set(names) - ENVIRONMENTS.keys():
        parser.error(f"no such environment: {', '.join(sorted(unknown))}")
    return run(args.work.resolve(), names)


def run(work: Path, names: list[str]) -> int:
    """Return 0 when every pipeline loads in every environment that installs, sharded or merged."""
    wanted = dict.fromkeys([TODAY, *names])
    pythons = {name: make_environment(work / "envs" / name, ENVIRONMENTS[name]) for name in wanted}
    today = pythons[TODAY]
    if today is None:
        print("today's libraries do not install: nothing to convert with", file=sys.stderr)
        return 1
    models = work / "models"
    failures = build_models(models, today)
    results = {name: ask(python, models) for name in names if (python := pythons[name])}
    print_table(results)
    print_failures(failures, [name for name in names if not pythons[name]])
    return int(bool(failures) or any(unloadable(rows) for rows in results.values()))


def make_environment(folder: Path, requirements: list[str]) -> Path | None:
    """Return the Python of an environment with these requirements, made unless it is there; None when pip fails."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ready = folder / "requirements.txt"
    requirements = [*requirements, *(own_requirements() if folder.name == TODAY else [])]
    wanted = "\n".join([TORCH, *requirements, ""])
    if ready.exists() and ready.read_text(encoding="utf-8") == wanted:
        return python
    print(f"{folder.name}: installing", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True, clear=True)
    # torch alone first: asked for with the others, pip may settle on another build of it.
    for step in ([TORCH], [TORCH, *requirements]):
        done = call([python, "-m", "pip", "install", "--quiet", *step])
        if done.returncode:
            print(f"{folder.name}: {last_line(done.stderr)}", file=sys.stderr)
            return None
    ready.write_text(wanted, encoding="utf-8")
    return python


def own_requirements() -> list[str]:
    """Return what wconv itself needs, from setup.cfg."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config["options"]["install_requires"].split()


def build_models(models: Path, python: Path) -> list[str]:
    """Write both source pipelines and every converted form; return which conversions failed, and how."""
    failures = []
    shutil.rmtree(models, ignore_errors=True)
    for name in PIPELINES:
        source = models / name / "source"
        source.parent.mkdir(parents=True)
        build = f"import sys, pathlib; from support import builders; builders.save_{name}(pathlib.Path(sys.argv[1]))"
        check([python, "-c", build, source], PYTHONPATH=os.pathsep.join((str(ROOT), str(ROOT / "tests"))))
        for form, options in FORMS.items():
            done = None if options is None else convert(python, source, models / name / form, options)
            if done and done.returncode:
                failures.append(f"{name}/{form}: wconv ended with {done.returncode}: {last_line(done.stderr)}")
    return failures


def convert(python: Path, source: Path, folder: Path, options: list[str]) -> subprocess.CompletedProcess[str]:
    """Run `wconv to-safetensors`: into a new folder for forms of that name, else beside a copy of the source."""
    command: list[str | Path] = [python, "-m", "converter", "to-safetensors", "--quiet", *options]
    if folder.name.startswith("new"):
        return call([*command, source, "-o", folder], PYTHONPATH=str(ROOT))
    shutil.copytree(source, folder)
    return call([*command, folder], PYTHONPATH=str(ROOT))


def call(command: list[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command."""
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def check(command: list[str | Path], **environment: str) -> str:
    """Run a command and return what it printed; end this script with its errors when it fails."""
    done = call(command, **environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout


def ask(python: Path, models: Path) -> dict[str, dict[str, str]]:
    """Return what each load says in one environment: a row for each pipeline and form, a column for each call."""
    offline = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    return json.loads(check([python, __file__, "--probe", models], **offline).splitlines()[-1])


def print_table(results: dict[str, dict[str, dict[str, str]]]) -> None:
    """Print one line for each environment, folder and call."""
    for name, rows in results.items():
        print(f"\n{name}: {', '.join(ENVIRONMENTS[name][:2])}")
        for row, cells in rows.items():
            for call, said in cells.items():
                print(f"  {row:<32} {call:<26} {said}")


def print_failures(failures: list[str], missing: list[str]) -> None:
    """Say which conversions failed and which environments could not be made."""
    for line in [*failures, *(f"{name}: does not install" for name in missing)]:
        print(f"\n{line}")


def unloadable(rows: dict[str, dict[str, str]]) -> list[str]:
    """Return the pipelines that load neither as converted nor merged."""
    return [name for name in PIPELINES if not any(loads(rows, name, form) for form in FORMS if form != "source")]


def loads(rows: dict[str, dict[str, str]], name: str, form: str) -> bool:
    """Say whether the UNet and the pipeline of one folder were ok, the latter with its own tokenizer or another."""
    said = rows[f"{name}/{form}"]
    return said["unet"] == "ok" and "ok" in (said["pipeline"], said["pipeline, tokenizer given"])


def probe(models: Path) -> dict[str, dict[str, str]]:
    """Load every folder with the libraries of this Python."""
    import diffusers
    import transformers

    tokenizer = transformers.CLIPTokenizer.from_pretrained(models / PIPELINES[0] / "source" / "tokenizer")
    pipeline = diffusers.StableDiffusionPipeline
    calls: dict[str, Callable[[Path], Any]] = {
        "pipeline": pipeline.from_pretrained,
        "pipeline, tokenizer given": lambda folder: pipeline.from_pretrained(folder, tokenizer=tokenizer),
        "unet": lambda folder: diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
    }
    rows = {}
    for name in PIPELINES:
        truth = read_truth(models / name / "source")
        for form in FORMS:
            folder = models / name / form
            rows[f"{name}/{form}"] = {call: try_load(load, folder, truth) for call, load in calls.items()}
    return rows


def try_load(load: Callable[[Path], Any], folder: Path, truth: dict[str, dict[str, str]]) -> str:
    """Return `ok`, which components came out with other tensors, or the error's first line."""
    try:
        loaded = load(folder)
    except Exception as error:  # whatever a library raises is what the table is about
        return f"{type(error).__name__}: {first_line(error).replace(str(folder), folder.name)}"
    parts = {"unet": loaded} if hasattr(loaded, "state_dict") else loaded.components
    wrong = [name for name, digests in truth.items() if name in parts and digests != digest_state(parts[name])]
    return f"loads with wrong tensors: {', '.join(wrong)}" if wrong else "ok"


def read_truth(source: Path) -> dict[str, dict[str, str]]:
    """Return the digest of every tensor in a source's files, by component."""
    return {name: dict(read_digests(source / name)) for name in ("unet", "vae", "text_encoder")}


def read_digests(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield name and digest of every tensor in the weights files of one folder."""
    import torch
    from safetensors.torch import load_file

    for path in [*folder.glob("*.bin"), *folder.glob("*.safetensors")]:
        state = torch.load(path, weights_only=True) if path.suffix == ".bin" else load_file(path)
        yield from digest_tensors(state)


def digest_state(model: Any) -> dict[str, str]:
    """Return the digest of every tensor in a loaded model."""
    return dict(digest_tensors(model.state_dict()))


def digest_tensors(state: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield name and digest; the names as transformers 5 has them in memory, without CLIP's prefix and position ids."""
    for name, tensor in state.items():
        if not name.endswith("position_ids"):
            raw = tensor.detach().contiguous().numpy().tobytes()
            yield name.removeprefix("text_model."), hashlib.sha256(raw).hexdigest()


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0]


def last_line(text: str) -> str:
    """Return the last line of a program's output."""
    lines = text.strip().splitlines() or [""]
    return lines[-1]


if __name__ == "__main__":
    sys.exit(main())

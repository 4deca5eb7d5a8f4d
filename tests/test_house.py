"""The house rules: which module may import which, what is never imported, a fast start, and docstrings."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import make_state, save

import converter

ROOT = Path(converter.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

# Each may import from the layers before its own; what shares a line does not import each other.
LAYERS = (
    ("errors",),
    ("dtypes",),
    ("tensors",),
    ("texts",),
    ("names", "index", "keep_fp32"),
    ("formats",),
    ("checkpoint",),
    ("folder",),
    ("choose", "modules", "single_file"),
    ("rules",),
    ("plan",),
    ("cast", "sources"),
    ("stream", "staging"),
    ("run", "rename", "int8"),
    ("conversion", "compare"),
    ("quantize",),
    ("doctor",),
    ("coreml",),
    ("cli", "testing"),
)
RANKS = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
ANYWHERE = {"__init__", "__main__"}

# Who may import these; all others must not.
HOMES = {
    "click": ("cli/",),
    "tqdm": ("cli/",),
    "psutil": ("cli/",),
    "numpy": ("sources.py", "cast.py"),
    "ml_dtypes": ("cast.py",),
    "numkong": ("cast.py",),
    "torch": ("modules.py",),
    "transformers": ("modules.py",),
    "diffusers": ("modules.py",),
    "pickle": (),
    "hypothesis": ("testing.py",),
}
START_RATIO = 2.5


def layer_of(path: Path) -> str:
    """Name the part of the package that a file belongs to: its module, or its subpackage."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Give every module that a tree imports anywhere, by its full name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_imports_go_one_way(path):
    mine = layer_of(path)
    if mine in ANYWHERE:
        return
    assert mine in RANKS, f"{mine} has no place in the order of imports"
    parts = [name.split(".") for name in imports_of(parse(path)) if name.startswith("converter.")]
    theirs = {part[1] for part in parts if part[1] != "__version__"}
    wrong = {name for name in theirs - {mine} if RANKS[name] >= RANKS[mine]}
    assert not wrong


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_libraries_stay_where_they_belong(path):
    imported = {name.partition(".")[0] for name in imports_of(parse(path))}
    wrong = {name for name in imported & HOMES.keys() if not module_of(path).startswith(HOMES[name])}
    assert not wrong


@pytest.mark.parametrize("name", ["sources.py", "stream.py"])
def test_numpy_is_loaded_only_when_numbers_are_needed(name):
    tree = parse(ROOT / name)
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not {"numpy", "converter.cast"} & set(imports_of(tree))


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_what_is_public_has_a_docstring(path):
    tree = parse(path)
    assert ast.get_docstring(tree), "the module"
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def test_all_that_is_promised_is_there():
    assert sorted(converter.__all__) == converter.__all__
    assert all(getattr(converter, name) for name in converter.__all__)


# What a start takes.


def loaded_by(code: str) -> set[str]:
    """Give the top-level modules that are loaded after some code has run."""
    code += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run((sys.executable, "-c", code), check=True, capture_output=True, text=True)
    return set(done.stdout.splitlines()[-1].split())


def test_the_command_line_starts_with_little():
    loaded = loaded_by("import converter.cli")
    assert "click" in loaded
    assert not loaded & {"torch", "numpy", "ml_dtypes", "safetensors", "tqdm", "psutil", "zlib_ng", "concurrent"}


def test_help_loads_no_command():
    loaded = loaded_by("import converter.cli as c; c.main(['--help'])")
    assert not loaded & {"torch", "numpy", "safetensors", "tqdm", "psutil", "filelock", "zlib_ng"}


def test_the_library_starts_with_nothing():
    assert not loaded_by("import converter") & {"torch", "numpy", "click", "safetensors"}


def test_a_conversion_imports_no_torch(tmp_path):
    save(make_state(), tmp_path / "pytorch_model.bin")
    command = (sys.executable, "-X", "importtime", "-m", "converter", "to-safetensors", tmp_path)
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in listed.splitlines()}
    assert "safetensors" in imported
    assert not imported & {"torch", "transformers", "diffusers", "ml_dtypes"}
    assert (tmp_path / "model.safetensors").exists()


def median_seconds(command: tuple[str, ...], runs: int = 7) -> float:
    """Give the median time that a command takes."""
    seconds = []
    for _ in range(runs):
        begun = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def test_help_is_fast():
    ratios = []
    for _ in range(5):  # other work on the machine may fall on one side only
        base = median_seconds((sys.executable, "-c", "import click"))
        ratios.append(median_seconds((sys.executable, "-m", "converter", "--help")) / base)
        if ratios[-1] <= START_RATIO:
            return
    raise AssertionError(f"{ratios} times as long as importing click")

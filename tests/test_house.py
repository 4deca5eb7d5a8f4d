"""The house rules: which module may import which, what is never imported, a start with little, and docstrings."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from support.tiny import make_state, save, unmeasured

import converter

ROOT = Path(converter.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

# Each may import from the layers before its own; what shares a line does not import each other.
LAYERS = (
    ("errors",),
    ("dtypes",),
    ("storage",),
    ("tensors",),
    ("formats",),
    ("models",),
    ("libraries",),
    ("transforms", "plan"),
    ("run",),
    ("recipes",),
    ("doctor",),
    ("cli", "testing"),
)
RANKS = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
ANYWHERE = {"__init__", "__main__"}

# Who may import these; all others must not.
HOMES = {
    "click": ("cli/",),
    "tqdm": ("cli/",),
    "psutil": ("cli/",),
    "filelock": ("run/notes.py",),
    "platformdirs": ("run/notes.py",),
    "numpy": (
        "tensors/view.py",
        "tensors/derived.py",
        "tensors/shaped.py",
        "tensors/kernels.py",
        "transforms/merge/kernels.py",
        "transforms/quantize/write_kernels.py",
        "transforms/quantize/kernels.py",
    ),
    "ml_dtypes": ("tensors/kernels.py",),
    "numkong": ("tensors/kernels.py", "transforms/quantize/write_kernels.py", "transforms/quantize/kernels.py"),
    "torch": ("libraries/asked.py",),
    "transformers": ("libraries/asked.py",),
    "diffusers": ("libraries/asked.py",),
    "pickle": (),
    "safetensors": (),
    "hypothesis": ("testing.py",),
    "multiprocessing": ("run/workers/processes.py",),
    "distributed": ("run/workers/dask.py",),
    "ray": ("run/workers/ray.py",),
    "mpi4py": ("run/workers/mpi.py",),
}
# What only storage does to a disk; all others ask a Place, or a Root. A ``stat`` without arguments, or an ``open`` of a
# mode, is a Path's.
DISK_MODULES = {"filecmp", "glob", "shutil", "tempfile"}
DISK_FUNCTIONS = {
    "access", "exists", "fsync", "getsize", "isdir", "isfile", "islink", "lexists", "link", "listdir", "lstat",
    "makedirs", "mkdir", "open", "readlink", "realpath", "remove", "rename", "replace", "rmdir", "samefile",
    "samestat", "scandir", "stat", "symlink", "truncate", "unlink", "utime", "walk",
}  # fmt: skip
PATH_METHODS = {
    "glob", "hardlink_to", "is_dir", "is_symlink", "iterdir", "lstat", "mkdir", "read_bytes", "read_text", "readlink",
    "resolve", "rglob", "rmdir", "samefile", "symlink_to", "touch", "unlink", "write_bytes", "write_text",
}  # fmt: skip
# The null device in place of a closed stream, a folder of their own for programs that are asked, and what the system
# says of itself.
ON_DISK = {"cli/__init__.py", "cli/terminal.py", "libraries/ask.py", "run/workers/cores.py"}
# So many modules more than click itself does the command load to show its help; they were 17.
MOST_MODULES = 30


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
def test_imports_go_one_way(path: Any) -> None:
    mine = layer_of(path)
    if mine in ANYWHERE:
        return
    assert mine in RANKS, f"{mine} has no place in the order of imports"
    parts = [name.split(".") for name in imports_of(parse(path)) if name.startswith("converter.")]
    theirs = {part[1] for part in parts if part[1] != "__version__"}
    wrong = {name for name in theirs - {mine} if RANKS[name] >= RANKS[mine]}
    assert not wrong


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_libraries_stay_where_they_belong(path: Any) -> None:
    imported = {name.partition(".")[0] for name in imports_of(parse(path))}
    wrong = {name for name in imported & HOMES.keys() if not module_of(path).startswith(HOMES[name])}
    assert not wrong


@pytest.mark.parametrize(
    "path", [path for path in MODULES if "numkong" in path.read_text(encoding="utf-8")], ids=module_of
)
def test_numpy_is_loaded_first(path: Any) -> None:
    """What is written in C loads it from its midst, and a thread that loads it at the same time finds half of it."""
    imported = [name for name in imports_of(parse(path)) if name in ("numpy", "numkong", "ml_dtypes")]
    assert imported[0] == "numpy"


def touches_disk(node: ast.AST) -> bool:
    """Say whether a call is one that only storage makes."""
    if not isinstance(node, ast.Call):
        return False
    called = node.func
    if isinstance(called, ast.Name):
        return called.id == "open"
    if not isinstance(called, ast.Attribute):
        return False
    if ast.unparse(called.value) in ("os", "os.path"):
        return called.attr in DISK_FUNCTIONS
    has_mode = bool(node.args) and isinstance(node.args[0], ast.Constant)
    is_open = called.attr == "open" and has_mode
    return is_open or called.attr in PATH_METHODS or (called.attr == "stat" and not node.args)


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_only_storage_touches_a_disk(path: Any) -> None:
    tree = parse(path)
    touching = [ast.unparse(node) for node in ast.walk(tree) if touches_disk(node)]
    touching += DISK_MODULES & set(imports_of(tree))
    if layer_of(path) != "storage":
        assert bool(touching) == (module_of(path) in ON_DISK), touching


@pytest.mark.parametrize("name", ["tensors/view.py", "tensors/derived.py", "transforms/quantize/codes.py"])
def test_numpy_is_loaded_only_when_numbers_are_needed(name: str) -> None:
    tree = parse(ROOT / name)
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not {"numpy", "converter.tensors.kernels", "converter.transforms.quantize.write_kernels"} & set(
        imports_of(tree)
    )


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_what_is_public_has_a_docstring(path: Any) -> None:
    tree = parse(path)
    assert ast.get_docstring(tree), "the module"
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def test_all_that_is_promised_is_there() -> None:
    assert sorted(converter.__all__) == converter.__all__
    assert all(getattr(converter, name) for name in converter.__all__)
    assert set(converter.__all__) <= set(dir(converter))


def test_what_type_checkers_see_is_what_is_there() -> None:
    [guarded] = [node for node in parse(ROOT / "__init__.py").body if isinstance(node, ast.If)]
    assert ast.unparse(guarded.test) == "TYPE_CHECKING"
    homes: dict[str, list[str]] = {}
    for node in guarded.body:
        assert isinstance(node, ast.ImportFrom)
        [alias] = node.names
        assert alias.name == alias.asname
        homes.setdefault(str(node.module), []).append(alias.name)
    assert homes == {f"converter.{home}": names.split() for home, names in converter._HOMES.items()}


# What a start takes.


def modules_after(code: str) -> set[str]:
    """Give the modules that are loaded after some code has run."""
    code += "\nimport sys; print(*sys.modules)"
    done = subprocess.run((sys.executable, "-c", code), check=True, capture_output=True, text=True)
    return set(done.stdout.splitlines()[-1].split())


def loaded_by(code: str) -> set[str]:
    """Give the top-level modules that are loaded after some code has run."""
    return {name.partition(".")[0] for name in modules_after(code)}


def test_the_command_line_starts_with_little() -> None:
    loaded = loaded_by("import converter.cli")
    assert "click" in loaded
    assert not loaded & {"torch", "numpy", "ml_dtypes", "safetensors", "tqdm", "psutil", "zlib_ng", "concurrent"}


def test_help_loads_no_command() -> None:
    loaded = loaded_by("import converter.cli as c; c.main(['--help'])")
    assert not loaded & {"torch", "numpy", "safetensors", "tqdm", "psutil", "filelock", "zlib_ng"}


def test_the_library_starts_with_nothing() -> None:
    assert not loaded_by("import converter") & {"torch", "numpy", "click", "safetensors"}


@pytest.mark.parametrize("form", ["pytorch_model.bin", "model.safetensors"])
def test_a_conversion_loads_what_it_uses(tmp_path: Path, form: str) -> None:
    (save if form.endswith(".bin") else save_file)(make_state("abc"), tmp_path / form)
    command = (sys.executable, "-X", "importtime", "-m", "converter", "to-safetensors", tmp_path)
    done = subprocess.run(
        (*command, "-o", tmp_path / "out"), env=unmeasured(), check=True, capture_output=True, text=True
    )
    listed = done.stderr
    imported = {line.rpartition("|")[2].strip() for line in listed.splitlines()}
    assert {"zlib_ng", "converter.run.execute"} <= imported
    assert not imported & {"torch", "transformers", "diffusers", "ml_dtypes", "numpy", "safetensors", "tqdm"}
    assert not imported & {"email", "importlib.metadata", "multiprocessing.process", "concurrent.futures.process"}
    assert not imported & {"converter.doctor", "converter.libraries.ask", "converter.tensors.derived"}
    assert "psutil" not in imported or sys.platform != "linux"
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_help_loads_little() -> None:
    # That is what makes it fast: by the clock, 1.2 times as long as importing click.
    loaded = modules_after("import converter.cli as c; c.main(['--help'])") - modules_after("import click")
    assert {name for name in loaded if name.startswith("converter")} == {
        "converter",
        "converter.cli",
        "converter.errors",
    }
    assert not {
        name for name in loaded if name.partition(".")[0] not in sys.stdlib_module_names | {"click", "converter"}
    }
    assert len(loaded) < MOST_MODULES


def test_the_help_of_commands_loads_none_of_their_work() -> None:
    code = "import converter.cli as c; [c.main([name, '--help']) for name in c.COMMANDS]"
    loaded = modules_after(code) - modules_after("import click")
    mine = {name for name in loaded if name.startswith("converter.")}
    assert {name for name in mine if not name.startswith("converter.cli")} == {"converter.dtypes", "converter.errors"}
    assert not mine & {"converter.cli.convert", "converter.cli.report"}
    assert {name.partition(".")[0] for name in loaded} <= sys.stdlib_module_names | {"click", "converter"}
    assert "json" not in loaded

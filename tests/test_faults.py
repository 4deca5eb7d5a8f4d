"""Every command that writes, with a fault at each system call: the old state, the new, or taken up by the next run.

The faults come from a library preloaded before the C library (``fault_shim.c``); ``faults.py`` runs and judges.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from support.faults import EXTRA, LOG, RESULTS, SCENARIO, STATE, TEMPLATE, WORLD, Result, Scenario
from support.tiny import (
    TENSOR_NBYTES,
    State,
    make_state,
    raw_bytes,
    save_bin_shards,
    save_pipeline,
    save_safetensors_shards,
    write_json,
)
from test_crash_doctor import OTHER, make_broken
from test_crash_doctor import STATE as BROKEN

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="the shim is made for Linux")]

OUTCOMES = ("old", "new", "taken up", "other")
NEW, OLD = make_state(seed=0), make_state(seed=1)
FIX, UNDO = ("doctor", "m", "--fix"), ("doctor", "m", "--undo")


@dataclass(frozen=True)
class Case:
    """How a scenario's template is made, and its command.

    ``build`` is given a folder and the builders of models; ``states`` are what must not be lost.
    """

    name: str
    build: Callable[[Path, Any], object]
    command: tuple[str, ...]
    before: tuple[tuple[str, ...], ...] = ()
    undo: tuple[str, ...] = ()
    states: tuple[State, ...] = (NEW,)
    extra: Callable[[Path], object] | None = None
    needs_models: bool = False

    @property
    def scenario(self) -> Scenario:
        tensors = tuple(raw_bytes(tensor).hex() for state in self.states for tensor in state.values())
        return Scenario(self.command, self.before, self.undo, tensors)


def build_over_old(world: Path, _: Any) -> None:
    """Make a folder, and an output that holds other values in other shards."""
    save_bin_shards(NEW, world / "m")
    save_safetensors_shards(OLD, world / "out", ("a", "b", "cde", "f"))


def build_model(world: Path, builders: Any) -> None:
    """Make a language model with linear modules."""
    builders.save_safetensors(builders.shake(builders.make_llama(tied=False).eval()), world / "m")


def build_model_in_8_bits(world: Path, builders: Any) -> None:
    """Make a language model in 8 bits."""
    from converter.cli import main

    build_model(world, builders)
    assert not main(["quantize", str(world / "m"), "-o", str(world / "int8"), "-q"])
    shutil.rmtree(world / "m")
    (world / "int8").rename(world / "m")


def build_stable_diffusion(world: Path, builders: Any) -> None:
    """Make a pipeline with a tokenizer as Apple's script wants it."""
    model = builders.shake(builders.MODELS["sd"]())
    builders.write_tokenizer(world / "m" / "tokenizer")
    builders.save_bin(model, world / "m", 1)


def break_again(world: Path) -> None:
    """Break a mended folder in another way."""
    write_json(world / "m" / "model.safetensors.index.ema.json", {"metadata": {}, "weight_map": {"a": "gone.bin"}})


def save_four(world: Path, _: Any) -> None:
    """Write shards of which two come out as they were."""
    save_safetensors_shards(NEW, world / "m", ("ab", "cd", "e", "f"))


BOTH = (BROKEN, OTHER)
CASES = [
    Case("to-safetensors beside", lambda w, _: save_bin_shards(NEW, w / "m"), ("to-safetensors", "m")),
    Case("to-safetensors -o", lambda w, _: save_pipeline(w / "m"), ("to-safetensors", "m", "-o", "deep/out"),
         states=()),
    Case("to-safetensors --delete-source", lambda w, _: save_bin_shards(NEW, w / "m"),
         ("to-safetensors", "m", "--delete-source")),
    Case("to-safetensors -o --delete-source", lambda w, _: save_bin_shards(NEW, w / "m"),
         ("to-safetensors", "m", "-o", "out", "--delete-source")),
    Case("to-safetensors -o --overwrite", build_over_old, ("to-safetensors", "m", "-o", "out", "--overwrite")),
    Case("recast", lambda w, _: save_safetensors_shards(NEW, w / "m"), ("recast", "m", "--dtype", "bf16")),
    Case("reshard -o", lambda w, _: save_safetensors_shards(NEW, w / "m"),
         ("reshard", "m", "-o", "out", "--max-shard-size", "none")),
    Case("reshard --in-place, fewer", save_four,
         ("reshard", "m", "--in-place", "--max-shard-size", f"{2 * TENSOR_NBYTES}B")),
    Case("reshard --in-place, one", lambda w, _: save_safetensors_shards(NEW, w / "m"),
         ("reshard", "m", "--in-place", "--max-shard-size", "none")),
    Case("rename-variant", lambda w, _: save_safetensors_shards(NEW, w / "m"),
         ("rename-variant", "m", "--from", "none", "--to", "fp16")),
    Case("to-bin", lambda w, _: save_safetensors_shards(NEW, w / "m"), ("to-bin", "m")),
    Case("quantize -o", build_model, ("quantize", "m", "-o", "out"), states=(), needs_models=True),
    Case("dequantize -o", build_model_in_8_bits, ("dequantize", "m", "-o", "out", "--dtype", "fp16"), states=(),
         needs_models=True),
    Case("prepare-coreml -o", build_stable_diffusion, ("prepare-coreml", "m", "-o", "out"), states=(),
         needs_models=True),
    Case("doctor --fix", lambda w, _: make_broken(w), FIX, undo=UNDO, states=BOTH),
    Case("doctor --fix, the second", lambda w, _: make_broken(w), FIX, (FIX,), UNDO, BOTH, break_again),
    Case("doctor --undo", lambda w, _: make_broken(w), UNDO, (FIX,), states=BOTH),
    Case("doctor --purge", lambda w, _: make_broken(w), ("doctor", "m", "--purge"), (FIX,), states=BOTH),
]  # fmt: skip


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the library that makes calls fail."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library = tmp_path_factory.mktemp("shim") / "fault_shim.so"
    source = Path(__file__).with_name("support") / "fault_shim.c"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl", "-lpthread"], check=True
    )
    return library


def strike(case: Case, root: Path, shim: Path, builders: Any) -> tuple[int, list[Result]]:
    """Let every fault happen to a case; give the number of its steps, and what came of each fault."""
    case.build(root / TEMPLATE, builders)
    if case.extra:
        case.extra(root / EXTRA)
    write_json(root / SCENARIO, asdict(case.scenario))
    (root / LOG).touch()
    world = root.resolve() / WORLD  # as the library spells it
    variables = {"LD_PRELOAD": shim, "FAULT_ROOTS": world, "FAULT_LOG": root / LOG, "WCONV_STATE": world / STATE}
    command = [sys.executable, str(Path(__file__).with_name("support") / "faults.py"), str(root.resolve())]
    done = subprocess.run(command, env={**os.environ, **{key: str(path) for key, path in variables.items()}},
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert not done.returncode, done.stderr
    content = json.loads((root / RESULTS).read_text("utf-8"))
    return content["steps"], [Result(**result) for result in content["results"]]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_fault_at_every_step(
    case: Case, shim: Path, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    steps, results = strike(case, tmp_path, shim, request.getfixturevalue("builders") if case.needs_models else None)
    counts = Counter(result.outcome for result in results)
    unnamed = sum(bool(result.unnamed) for result in results)
    told = ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES)
    with capsys.disabled():
        print(f"\n{case.name}: {steps} steps, {len(results)} runs: {told}; {unnamed} failed and left unnamed files")
    assert steps > 5
    bad = [str(result) for result in results if result.outcome == "other"]
    assert not bad, "\n".join(bad)

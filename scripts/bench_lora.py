"""The section of the bench on LoRAs: adapters of rank 16 and 128 merged into a Llama in bf16, beside what PEFT does."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from bench_models import llama_config, llama_shapes
from bench_quantized import Codes, write_file, write_safetensors
from bench_runs import (
    Arguments,
    Bench,
    Case,
    Figures,
    Row,
    made_once,
    ratios_of,
    rows_in_turn,
    run_in_turn,
    weights_nbytes,
)
from make_sample import write_json

REACH_MB = 200.0
RANKS = (16, 128)

MERGE = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="bfloat16")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def write_base(folder: Path, gb: float) -> None:
    """Write a Llama of so many GB in bf16."""
    config = llama_config(2 * gb)
    tensors = {name: Codes("BF16", shape, seed) for seed, (name, shape) in enumerate(llama_shapes(config))}
    write_safetensors(folder, tensors, config | {"torch_dtype": "bfloat16"})


def write_adapter(folder: Path, gb: float, rank: int) -> None:
    """Write an adapter of PEFT for all linear layers of that, but for the head."""
    tensors: dict[str, Codes] = {}
    for seed, (name, shape) in enumerate(llama_shapes(llama_config(2 * gb))):
        if "proj" in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = Codes("BF16", (rank, shape[1]), seed)
            tensors[f"{module}.lora_B.weight"] = Codes("BF16", (shape[0], rank), 10_000 + seed)
    write_file(folder / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "task_type": "CAUSAL_LM", "bias": "none"}
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    write_json(folder / "adapter_config.json", config | {"target_modules": modules})


def merging(adapter: Path) -> Arguments:
    """Return what follows `wconv` to merge an adapter."""
    return lambda source, out: ["merge-lora", str(source), str(adapter), "-o", str(out)]


def measure_merged(bench: Bench) -> Iterator[Row]:
    """Run `cp` of the base, wconv with one worker and by default, and PEFT, in turn."""
    base = made_once(bench.folder / f"llama-{bench.gb:g}gb-bf16", partial(write_base, gb=bench.gb))
    nbytes = weights_nbytes(base)
    for rank in RANKS:
        folder = bench.folder / f"llama-{bench.gb:g}gb-lora-{rank}"
        adapter = made_once(folder, partial(write_adapter, gb=bench.gb, rank=rank))
        case = Case(f"merge-lora, rank {rank}", merging(adapter), math.inf, REACH_MB)
        commands = {
            "cp": bench.copy_command(base),
            case.name: bench.command(case, base),
            f"{case.name}, one worker": bench.command(case, base, "--workers", "1"),
        }
        yield from rows_in_turn(bench, "merge-lora", f"cp of the base (rank {rank})", commands, nbytes, REACH_MB)
        name = f"PEFT load + merge + save, rank {rank}"
        if not find_spec("peft"):
            yield Row("merge-lora", name, note="peft is not installed")
            continue
        command = [sys.executable, "-c", MERGE, str(base), str(adapter), str(bench.out)]
        others = run_in_turn(bench, bench.baseline_runs, {"cp": commands["cp"], name: command}, nbytes)
        yield Row("merge-lora", name, Figures(others[name]), ratios_of(*others.values()), read_nbytes=nbytes)

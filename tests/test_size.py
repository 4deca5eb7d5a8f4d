"""Plans of the largest models that there are: files that take no room, with the names and shapes of real ones."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.tiny import write_json

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="looks at memory as Linux tells")]

# Of each tensor that is planned: its name, its place and what it becomes; and as much again for those that are read.
TENSOR_NBYTES = 1_500
START_NBYTES = 40_000_000
PROGRAM = """
import re, sys
from pathlib import Path
from converter.cli import main
code = main(sys.argv[1:])
print(re.search("VmHWM: *\\t* *(\\d+)", Path("/proc/self/status").read_text())[1], file=sys.stderr)
sys.exit(code)
"""

Shape = tuple[int, ...]


def made_up() -> Iterator[tuple[str, str, Shape]]:
    """Give 100,000 float32 tensors of 1 TB."""
    for number in range(100_000):
        yield f"model.layers.{number // 500}.part.{number % 500}.weight", "F32", (1250, 2000)


def mixture(layers: int, dense: int, experts: int, heads: int, vocab: int) -> Iterator[tuple[str, str, Shape]]:
    """Give what the releases of DeepSeek-V3 and of Kimi-K2 hold, as their config.json has it: blocks in 8 bits."""

    def quantized(name: str, rows: int, columns: int) -> Iterator[tuple[str, str, Shape]]:
        yield f"{name}.weight", "F8_E4M3", (rows, columns)
        yield f"{name}.weight_scale_inv", "F32", (math.ceil(rows / 128), math.ceil(columns / 128))

    def mlp(name: str, inner: int) -> Iterator[tuple[str, str, Shape]]:
        yield from quantized(f"{name}.gate_proj", inner, 7168)
        yield from quantized(f"{name}.up_proj", inner, 7168)
        yield from quantized(f"{name}.down_proj", 7168, inner)

    yield "model.embed_tokens.weight", "BF16", (vocab, 7168)
    for layer in range(layers):
        name = f"model.layers.{layer}"
        yield from quantized(f"{name}.self_attn.q_a_proj", 1536, 7168)
        yield f"{name}.self_attn.q_a_layernorm.weight", "BF16", (1536,)
        yield from quantized(f"{name}.self_attn.q_b_proj", heads * 192, 1536)
        yield from quantized(f"{name}.self_attn.kv_a_proj_with_mqa", 576, 7168)
        yield f"{name}.self_attn.kv_a_layernorm.weight", "BF16", (512,)
        yield from quantized(f"{name}.self_attn.kv_b_proj", heads * 256, 512)
        yield from quantized(f"{name}.self_attn.o_proj", 7168, heads * 128)
        yield f"{name}.input_layernorm.weight", "BF16", (7168,)
        yield f"{name}.post_attention_layernorm.weight", "BF16", (7168,)
        if layer < dense:
            yield from mlp(f"{name}.mlp", 18432)
            continue
        yield f"{name}.mlp.gate.weight", "BF16", (experts, 7168)
        yield f"{name}.mlp.gate.e_score_correction_bias", "F32", (experts,)
        for expert in range(experts):
            yield from mlp(f"{name}.mlp.experts.{expert}", 2048)
        yield from mlp(f"{name}.mlp.shared_experts", 2048)
    yield "model.norm.weight", "BF16", (7168,)
    yield "lm_head.weight", "BF16", (vocab, 7168)


WIDTHS = {"F32": 4, "BF16": 2, "F8_E4M3": 1}
RESHARD = ("reshard", "--max-shard-size", "10GB")
MODELS: dict[str, tuple[Any, int, tuple[str, ...], int, int]] = {
    # Tensors, shards, the command; how many tensors and parameters there are. Those of the releases are as published,
    # without the layer that predicts further tokens.
    "made up": (made_up, 200, ("recast", "--dtype", "bf16"), 100_000, 250_000_000_000),
    "deepseek-v3": (partial(mixture, 61, 3, 256, 128, 129_280), 163, RESHARD, 90_427, 671_026_419_200),
    "kimi-k2": (partial(mixture, 61, 1, 384, 64, 163_840), 61, RESHARD, 139_583, 1_026_408_232_448),
}


def write_hollow(folder: Path, tensors: list[tuple[str, str, Shape]], count: int) -> int:
    """Write tensors into shards of holes, with an index; give their bytes."""
    folder.mkdir()
    total = sum(math.prod(shape) * WIDTHS[dtype] for _, dtype, shape in tensors)
    weight_map: dict[str, str] = {}
    header: dict[str, Any] = {}
    number = end = done = 0

    def flush() -> None:
        nonlocal number, end
        number += 1
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        raw = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + end)
        weight_map.update(dict.fromkeys(header, name))
        header.clear()
        end = 0

    for name, dtype, shape in tensors:
        nbytes = math.prod(shape) * WIDTHS[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (end, end + nbytes)}
        end += nbytes
        done += nbytes
        if done >= total * (number + 1) // count and number < count - 1:
            flush()
    flush()
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


@pytest.mark.parametrize("name", MODELS)
def test_the_largest_models_are_planned(name: str, tmp_path: Path) -> None:
    make, shards, command, count, parameters = MODELS[name]
    made = list(make())
    assert len(made) == count
    assert sum(math.prod(shape) for name, _, shape in made if not name.endswith("_scale_inv")) == parameters
    total = write_hollow(tmp_path / "m", made, shards)
    arguments = (command[0], "m", *command[1:], "-o", "out", "--dry-run", "--json")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    plan = json.loads(done.stdout)
    [planned] = plan["weight_sets"]
    assert planned["tensors"] == count
    data = total // 2 if command[0] == "recast" else total
    headers = plan["nbytes"] - data
    assert 60 * count < headers < 250 * count
    assert plan["free_nbytes"] > 0
    assert plan["worker_seconds"] > 0
    assert 1024 * int(done.stderr) < START_NBYTES + TENSOR_NBYTES * count

"""Measure wconv against `cp` and against what people use today: time, peak memory, and what a kill leaves behind.

Strategy: a sharded float32 `.bin` checkpoint with Llama's names and shapes is written once and kept. `cp` of its
weight files and a conversion then run in turn, each in a process of its own; outputs are removed and the disk is synced
between them, outside of the timed span. A ratio belongs to one pair, so that a machine that slows down slows down both;
the median of the ratios counts. Times go from the start of the process to its end, imports included.

MB and GB are powers of ten. A peak below that of the launcher, some 9 MB, shows as the launcher's: `cp` needs less.
What comes out wrong ends with exit code 1; a time or a size out of reach is marked in the table, no more. Needs `cp`
and `os.wait4`: Linux or macOS.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
from make_sample import write_json, write_shards, write_torch_file
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "converter" / "configs" / "sd1"
MB = 1_000_000
GB = 1_000_000_000

SEED = 2
SHARDS = 5
SMALL_RUNS = 3
SMALL_SECONDS_REACH = 5.0
RSS_SPREAD_REACH_MB = 4.0
KILL_POINTS = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 0.95)  # of the time that an undisturbed conversion takes

# As a user's Python does it: modules are compiled once, not for every run.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

OK, OUT_OF_REACH, WRONG = "ok", "OUT OF REACH", "WRONG"

Shape = tuple[int, ...]
Source = Literal["torch", "safetensors", "model", "unet"]  # "model" is "torch" for what needs its config
Arguments = Callable[[Path, Path], list[str]]
Hashes = dict[str, str]  # file, relative to its folder -> sha256


@dataclass(frozen=True, slots=True)
class Case:
    """A conversion to measure: what follows `wconv`, given the source and the output, and what it should reach."""

    name: str
    arguments: Arguments
    ratio_reach: float  # infinity where none is set
    rss_reach_mb: float
    source: Source = "torch"


def conversion(command: str, *options: str) -> Arguments:
    """Return what follows `wconv` for a command with these options."""
    return lambda source, out: [command, str(source), "-o", str(out), *options]


def in_shards(command: str, count: int) -> Arguments:
    """Return what follows `wconv` for a command that cuts the source into so many shards."""

    def arguments(source: Path, out: Path) -> list[str]:
        # Half as much again as an even share: tensors do not fill a shard to the brim.
        nbytes = weights_nbytes(source) * 3 // (2 * count)
        return [command, str(source), "-o", str(out), "--max-shard-size", f"{nbytes}B" if count > 1 else "none"]

    return arguments


CASES = (
    Case("to-safetensors", conversion("to-safetensors"), 1.1, 40.0),
    Case("recast to bf16", conversion("recast", "--dtype", "bf16"), 0.65, 80.0),
    Case("recast to fp16", conversion("recast", "--dtype", "fp16"), 0.65, 80.0),
    Case("reshard 5 to 2", in_shards("reshard", 2), 1.1, 80.0, source="safetensors"),
    Case("reshard 5 to 1", in_shards("reshard", 1), 1.1, 80.0, source="safetensors"),
    Case("prepare-coreml", conversion("prepare-coreml"), 0.65, 80.0, source="unet"),
    Case("to-bin", conversion("to-bin"), 1.2, 80.0, source="safetensors"),
    Case("quantize to int8", conversion("quantize"), math.inf, 100.0, source="model"),
)

# Run with the source and the output as arguments.
TORCH_BASELINE = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
source, out = map(Path, sys.argv[1:])
out.mkdir()
for path in sorted(source.glob("*.bin")):
    state_dict = torch.load(path, mmap=True, weights_only=True)
    name = path.stem.replace("pytorch_model", "model") + ".safetensors"
    save_file(state_dict, out / name, {"format": "pt"})
    del state_dict
"""
TRANSFORMERS_BASELINE = """
import sys
from transformers import AutoModelForCausalLM
source, out = sys.argv[1:]
AutoModelForCausalLM.from_pretrained(source, dtype="float32").save_pretrained(out)
"""
INT8_BASELINE = """
import sys
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
source, out = sys.argv[1:]
config = BitsAndBytesConfig(load_in_8bit=True)
AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map="cpu").save_pretrained(out)
"""
BASELINES = {
    "torch.load(mmap=True) + save_file": ("torch", TORCH_BASELINE),
    "transformers load + save": ("transformers", TRANSFORMERS_BASELINE),
    "transformers load in 8 bits + save": ("bitsandbytes", INT8_BASELINE),
}


@dataclass(frozen=True, slots=True)
class Run:
    seconds: float
    peak_mb: float


class RunFailed(Exception):
    """A process that should have ended well did not."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    section: str
    name: str
    runs: tuple[Run, ...] = ()
    ratios: tuple[float, ...] = ()
    note: str = ""
    verdict: str = ""  # OK, OUT_OF_REACH, WRONG or nothing

    @property
    def seconds(self) -> float:
        return statistics.median(run.seconds for run in self.runs)

    @property
    def peak_mb(self) -> float:
        return max(run.peak_mb for run in self.runs)


@dataclass(frozen=True, slots=True)
class Bench:
    """What the user asked for."""

    folder: Path
    gb: float
    pairs: int
    baseline_runs: int
    rss_sizes: tuple[float, ...]
    small_tensors: int
    cases: tuple[Case, ...]
    wconv: list[str] = field(repr=False)

    @property
    def out(self) -> Path:
        """Return the output path, alone in its folder, so that anything beside it is a left-over."""
        return self.folder / "out" / "model"

    def command(self, case: Case, source: Path) -> list[str]:
        return [*self.wconv, *case.arguments(source, self.out)]


# The checkpoints.


@dataclass(frozen=True, slots=True)
class RandomTensor:
    """Normal float32 values, drawn when their bytes are asked for: one tensor is in memory at a time."""

    shape: Shape
    seed: int

    @property
    def nbytes(self) -> int:
        return 4 * math.prod(self.shape)

    def tobytes(self) -> bytes:
        values = np.random.default_rng((SEED, self.seed)).standard_normal(self.shape, dtype=np.float32)
        return (values * np.float32(0.02)).astype("<f4", copy=False).tobytes()


def llama_config(gb: float) -> dict[str, Any]:
    """Choose as many layers as come nearest to so many GB of float32."""
    hidden = 2048 if gb >= 0.8 else 512
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": 11 * hidden // 4,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": hidden // 64,
        "num_hidden_layers": 0,
        "num_key_value_heads": hidden // 256,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": 32000,
    }
    without, with_one = (
        sum(4 * math.prod(shape) for _, shape in llama_shapes(config | {"num_hidden_layers": n})) for n in (0, 1)
    )
    layers = max(1, round((gb * GB - without) / (with_one - without)))
    return config | {"num_hidden_layers": layers}


def llama_shapes(config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Yield names and shapes in the order of `LlamaForCausalLM.state_dict()`."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    key_value = config["num_key_value_heads"] * config["head_dim"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for i in range(config["num_hidden_layers"]):
        block = f"model.layers.{i}"
        yield f"{block}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{block}.self_attn.k_proj.weight", (key_value, hidden)
        yield f"{block}.self_attn.v_proj.weight", (key_value, hidden)
        yield f"{block}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{block}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{block}.mlp.up_proj.weight", (inner, hidden)
        yield f"{block}.mlp.down_proj.weight", (hidden, inner)
        yield f"{block}.input_layernorm.weight", (hidden,)
        yield f"{block}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def write_llama(folder: Path, gb: float) -> None:
    """Write config, index and shards: SHARDS, or fewer where one tensor is larger than its share."""
    config = llama_config(gb)
    tensors = {name: RandomTensor(shape, i) for i, (name, shape) in enumerate(llama_shapes(config))}
    write_json(folder / "config.json", config)
    write_shards(folder, "pytorch_model", cut_evenly(tensors))


def cut_evenly(tensors: dict[str, RandomTensor]) -> list[dict[str, RandomTensor]]:
    """Cut tensors into shards of about the same size."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, RandomTensor]] = [{} for _ in range(SHARDS)]
    before = 0
    for name, tensor in tensors.items():
        shards[before * SHARDS // total][name] = tensor
        before += tensor.nbytes
    return [shard for shard in shards if shard]


def write_unet(folder: Path, gb: float) -> None:
    """Write a Stable Diffusion 1 pipeline that is all UNet: 3.4 GB of it for 4, narrower ones for less."""
    import torch
    from diffusers import UNet2DConditionModel

    shutil.copytree(CONFIGS, folder, dirs_exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).write_text("{}")
    config = json.loads((CONFIGS / "unet" / "config.json").read_text())
    width = max(32, round(320 * math.sqrt(gb / 4) / 32) * 32)
    config["block_out_channels"] = [width, 2 * width, 4 * width, 4 * width]
    with torch.device("meta"):
        state = UNet2DConditionModel.from_config(config).state_dict()
    tensors = {name: RandomTensor(tuple(tensor.shape), i) for i, (name, tensor) in enumerate(state.items())}
    write_json(folder / "unet" / "config.json", config)
    write_shards(folder / "unet", "diffusion_pytorch_model", cut_evenly(tensors))
    for name in ("vae/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"):
        write_torch_file(folder / name, {"weight": RandomTensor((8, 8), 0)})


def write_small(folder: Path, tensors: int) -> None:
    """Write one file with many tensors of 16 to 256 elements."""
    sides = np.random.default_rng(SEED).integers(4, 17, (tensors, 2)).tolist()
    state_dict = {f"blocks.{i}.weight": RandomTensor((rows, columns), i) for i, (rows, columns) in enumerate(sides)}
    write_torch_file(folder / "pytorch_model.bin", state_dict)


def made_once(folder: Path, write: Callable[[Path], None]) -> Path:
    """Return the folder, written first unless an earlier run did."""
    if not folder.exists():
        say(f"writing {folder.name}")
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        partial.rename(folder)
    return folder


def llama(bench: Bench, gb: float) -> Path:
    return made_once(bench.folder / f"llama-{gb:g}gb", lambda folder: write_llama(folder, gb))


def source_of(bench: Bench, case: Case, gb: float) -> Path:
    if case.source == "unet":
        return made_once(bench.folder / f"unet-{gb:g}gb", lambda folder: write_unet(folder, gb))
    source = llama(bench, gb)
    if case.source != "safetensors":
        return source
    name = f"{source.name}-safetensors"
    return made_once(bench.folder / name, lambda folder: make_safetensors(bench, source, folder))


def make_safetensors(bench: Bench, source: Path, folder: Path) -> None:
    folder.rmdir()
    run("to-safetensors, for other cases", [*bench.wconv, "to-safetensors", str(source), "-o", str(folder)])


def weights_of(source: Path) -> list[Path]:
    return sorted(path for path in source.rglob("*") if path.suffix in (".bin", ".safetensors"))


def weights_nbytes(source: Path) -> int:
    return sum(path.stat().st_size for path in weights_of(source))


def missing_room(bench: Bench, gb: float) -> int:
    """Return how many bytes the disk lacks for a source of so many GB and one output."""
    nbytes = (1 if (bench.folder / f"llama-{gb:g}gb").exists() else 2) * gb * GB
    return max(0, round(1.1 * nbytes) - shutil.disk_usage(bench.folder).free)


# Runs.

# Starts a process and reports on it from a process of its own that is as small as can be: Linux counts into a child's
# peak what the process that started it held at that moment.
LAUNCHER = """
import os, sys, time
start = time.perf_counter()
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
_, status, usage = os.wait4(pid, 0)
print(time.perf_counter() - start, usage.ru_maxrss, os.waitstatus_to_exitcode(status))
"""
MAXRSS_NBYTES = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss: bytes on macOS, KiB on Linux


# A virtual machine may give memory that was freed back to its host, and then pays for every page again, several times
# what copying costs. So the pages that an output will need are all written to before a run that is timed.
WARM_MEMORY = "import sys, numpy; numpy.ones(int(sys.argv[1]), 'u1')"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def clear(bench: Bench, warm_nbytes: int = 0) -> None:
    """Remove outputs, wait until the disk is at rest, and warm memory: twice as much, for not all is used again."""
    shutil.rmtree(bench.out.parent, ignore_errors=True)
    bench.out.parent.mkdir(parents=True)
    os.sync()
    # More than is free would push the source out of memory.
    warm_nbytes = min(2 * warm_nbytes, psutil.virtual_memory().free * 3 // 4)
    if warm_nbytes:
        subprocess.run([sys.executable, "-c", WARM_MEMORY, str(warm_nbytes)], check=True)


def run(label: str, command: list[str]) -> Run:
    """Time one process that ends well, and take its peak memory."""
    launcher = subprocess.run(
        [sys.executable, "-I", "-S", "-c", LAUNCHER, *command],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    words = launcher.stdout.split()
    if launcher.returncode or words[2] != "0":
        say(f"{shlex.join(command)}\n{launcher.stderr}")
        raise RunFailed(f"{label} failed with exit code {words[2] if words else launcher.returncode}")
    result = Run(float(words[0]), int(words[1]) * MAXRSS_NBYTES / MB)
    say(f"  {label:<40} {result.seconds:7.2f} s {result.peak_mb:8.1f} MB")
    return result


def run_pairs(bench: Bench, count: int, source: Path, label: str, command: list[str]) -> tuple[list[Run], list[Run]]:
    """Run `cp` and a command in turn."""
    copies, others = [], []
    for _ in range(count):
        clear(bench, weights_nbytes(source))
        bench.out.mkdir()
        copies.append(run("cp", ["cp", *map(str, weights_of(source)), str(bench.out)]))
        clear(bench, weights_nbytes(source))
        others.append(run(label, command))
    return copies, others


def ratios_of(copies: list[Run], others: list[Run]) -> tuple[float, ...]:
    return tuple(other.seconds / copy.seconds for copy, other in zip(copies, others, strict=True))


def within(*reaches: tuple[float, float, str]) -> tuple[str, str]:
    """Return note and verdict for values, each with what it should reach at most and its unit."""
    note = ", ".join(f"at most {reach:g} {unit}" for _, reach, unit in reaches if math.isfinite(reach))
    return note, OK if all(value <= reach for value, reach, _ in reaches) else OUT_OF_REACH


# The sections.


def measure_ratio(bench: Bench) -> Iterator[Row]:
    """Run `cp` and each case in turn."""
    for case in bench.cases:
        source = source_of(bench, case, bench.gb)
        command = bench.command(case, source)
        run_pairs(bench, 1, source, f"{case.name}, warm-up", command)
        copies, conversions = run_pairs(bench, bench.pairs, source, case.name, command)
        ratios = ratios_of(copies, conversions)
        peak_mb = max(run.peak_mb for run in conversions)
        reach = within(
            (statistics.median(ratios), case.ratio_reach, "x cp"),
            (peak_mb, case.rss_reach_mb, "MB"),
        )
        yield Row("ratio", f"cp (beside {case.name})", tuple(copies))
        yield Row("ratio", case.name, tuple(conversions), ratios, *reach)


def measure_baselines(bench: Bench) -> Iterator[Row]:
    """Run the other ways to do it."""
    source = llama(bench, bench.gb)
    for name, (module, code) in BASELINES.items():
        if not find_spec(module):
            yield Row("baselines", name, note=f"{module} is not installed")
            continue
        command = [sys.executable, "-c", code, str(source), str(bench.out)]
        copies, others = run_pairs(bench, bench.baseline_runs, source, name, command)
        judged = judge_by_torch(bench, source) if module == "torch" else ("", "")
        yield Row("baselines", name, tuple(others), ratios_of(copies, others), *judged)


def judge_by_torch(bench: Bench, source: Path) -> tuple[str, str]:
    """Hold what torch and safetensors have just written against what wconv writes."""
    theirs = hash_files(bench.out)
    clear(bench)
    run(CASES[0].name, bench.command(CASES[0], source))
    ours = hash_files(bench.out)
    if theirs and theirs.items() <= ours.items():
        return "wconv's files are the same, byte for byte", OK
    return "wconv's files are not the same", WRONG


def measure_rss(bench: Bench) -> Iterator[Row]:
    """Hold the peaks at several sizes against each other."""
    for case in bench.cases:
        peaks = []
        for gb in bench.rss_sizes:
            name = f"{case.name}, {gb:g} GB"
            if missing := missing_room(bench, gb):
                yield Row("rss", name, note=f"left out: the disk lacks {missing / GB:.1f} GB")
                continue
            source = source_of(bench, case, gb)
            clear(bench)
            converted = run(name, bench.command(case, source))
            peaks.append(converted.peak_mb)
            note, verdict = within((converted.peak_mb, case.rss_reach_mb, "MB"))
            yield Row("rss", name, (converted,), note=note, verdict=verdict)
        if len(peaks) > 1:
            spread = max(peaks) - min(peaks)
            note, verdict = within((spread, RSS_SPREAD_REACH_MB, "MB"))
            yield Row("rss", f"{case.name}, all sizes", note=f"{spread:.1f} MB apart, {note}", verdict=verdict)


def measure_small(bench: Bench) -> Iterator[Row]:
    """Convert a checkpoint whose tensors are many and small."""
    count = bench.small_tensors
    source = made_once(bench.folder / f"small-{count}", lambda folder: write_small(folder, count))
    for case in bench.cases:
        if case.source in ("model", "unet"):
            continue
        label = f"{case.name}, {count:,} tensors"
        runs = []
        for _ in range(SMALL_RUNS):
            clear(bench)
            runs.append(run(label, bench.command(case, source)))
        seconds = statistics.median(run.seconds for run in runs)
        note, verdict = within((seconds, SMALL_SECONDS_REACH, "s"))
        yield Row("small", label, tuple(runs), note=note, verdict=verdict)


def check_kills(bench: Bench) -> Iterator[Row]:
    """Kill a conversion at several moments, see what is there, and run the same command again."""
    for case in bench.cases:
        source = source_of(bench, case, bench.gb)
        command = bench.command(case, source)
        clear(bench, weights_nbytes(source))
        undisturbed = run(case.name, command)
        expected = hash_files(bench.out)
        clear(bench, weights_nbytes(source))
        undisturbed = min(undisturbed, run(case.name, command), key=lambda run: run.seconds)
        faults = [*unreadable(bench.out), *differences("the second run's", expected, hash_files(bench.out))]
        yield kill_row(f"{case.name}, twice", [undisturbed], "twice the same bytes, safetensors opens them", faults)
        in_the_middle = 0
        for point in KILL_POINTS:
            row, left = kill_once(bench, case, source, point * undisturbed.seconds, expected)
            in_the_middle += left
            yield replace(row, name=f"{case.name}, killed at {point:.0%}")
        if not in_the_middle:
            yield kill_row(case.name, [], "", ["no kill came while it wrote. choose a larger --gb"])


def kill_once(bench: Bench, case: Case, source: Path, seconds: float, expected: Hashes) -> tuple[Row, bool]:
    """Kill one conversion and run it again; say also whether the kill came while it wrote."""
    command = bench.command(case, source)
    before = hash_files(source)
    clear(bench, weights_nbytes(source))  # as the undisturbed run had it, or the moments do not fit
    killed = kill_after(seconds, command)
    left = ", ".join(sorted(path.name for path in bench.out.parent.iterdir()))
    if bench.out.exists():  # then all of it must be there, and the same command would be refused
        note = f"killed after the commit, left {left}" if killed else "ended before the kill"
        faults = differences("the output's", expected, hash_files(bench.out))
        faults += differences("the source's", before, hash_files(source))
        return kill_row("", [], note, faults), False
    faults = differences("the source's", before, hash_files(source))
    runs = []
    try:
        runs.append(run(f"{case.name}, after a kill at {seconds:.2f} s", command))
    except RunFailed as error:
        faults.append(str(error))
    faults += differences("the output's", expected, hash_files(bench.out))
    faults += differences("the source's", before, hash_files(source))
    faults += [f"{path.name} is left over" for path in bench.out.parent.iterdir() if path != bench.out]
    return kill_row("", runs, f"left {left or 'nothing'}; the same again ends right", faults), bool(left)


def kill_row(name: str, runs: list[Run], note: str, faults: list[str]) -> Row:
    return Row("kill", name, tuple(runs), note="; ".join(faults) or note, verdict=WRONG if faults else OK)


def kill_after(seconds: float, command: list[str]) -> bool:
    """Start a process and kill it and its children; say whether it was still running."""
    child = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return child.returncode == -signal.SIGKILL


def hash_files(folder: Path) -> Hashes:
    return {str(path.relative_to(folder)): hash_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(4 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def differences(what: str, expected: Hashes, found: Hashes) -> list[str]:
    """Say which files are missing, new or changed."""
    return [
        f"{what} {name} is {'missing' if name not in found else 'new' if name not in expected else 'different'}"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]


def unreadable(folder: Path) -> list[str]:
    """Open every file with safetensors' own reader, which checks that header and size agree."""
    paths = sorted(folder.rglob("*.safetensors"))
    return list(filter(None, map(fault_of, paths))) if paths else ["no *.safetensors in the output"]


def fault_of(path: Path) -> str | None:
    try:
        with safe_open(path, "np"):
            return None
    except Exception as error:  # whatever it raises is a fault of the file
        return f"{path.name}: {error}"


SECTIONS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "ratio": measure_ratio,
    "baselines": measure_baselines,
    "rss": measure_rss,
    "small": measure_small,
    "kill": check_kills,
}


def run_section(bench: Bench, section: str) -> Iterator[Row]:
    """Go on with the next section where a process fails."""
    try:
        yield from SECTIONS[section](bench)
    except RunFailed as error:
        yield Row(section, "broken off", note=str(error), verdict=WRONG)


# The report.


def show(rows: list[Row]) -> None:
    """Print the table."""
    width = max(len(row.name) for row in rows)
    print(f"\n{'':9} {'':{width}} {'seconds':>8} {'x cp, median [min, max]':>24} {'peak MB':>8}")
    for row in rows:
        ratios = row.ratios and f"{statistics.median(row.ratios):.2f} [{min(row.ratios):.2f}, {max(row.ratios):.2f}]"
        seconds, peak = (f"{row.seconds:.2f}", f"{row.peak_mb:.1f}") if row.runs else ("", "")
        said = ": ".join(filter(None, (row.verdict, row.note)))
        print(f"{row.section:9} {row.name:{width}} {seconds:>8} {ratios or '':>24} {peak:>8}  {said}".rstrip())


def machine() -> dict[str, Any]:
    """Say what the figures depend on, without names of hosts or folders."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / GB, 1),
        "python": platform.python_version(),
    }


def write_report(path: Path, bench: Bench, rows: list[Row]) -> None:
    wishes = {"gb": bench.gb, "pairs": bench.pairs, "small_tensors": bench.small_tensors}
    write_json(path, {"machine": machine(), "wishes": wishes, "rows": [asdict(row) for row in rows]})


def sizes(text: str) -> tuple[float, ...]:
    return tuple(float(size) for size in text.split(","))


def parse_arguments() -> tuple[Bench, list[str], Path | None]:
    parser = argparse.ArgumentParser(description="Measure wconv against cp and the usual ways.")
    parser.add_argument("--dir", type=Path, default=ROOT / "build" / "bench", help="work folder (default: build/bench)")
    parser.add_argument("--gb", type=float, default=4.0, help="size of the checkpoint (default: 4)")
    parser.add_argument("--pairs", type=int, default=5, help="counted pairs of cp and conversion (default: 5)")
    parser.add_argument("--baseline-runs", type=int, default=1, help="runs of each other way (default: 1)")
    parser.add_argument("--rss-sizes", type=sizes, default=(1.0, 4.0, 8.0), metavar="GB,GB", help="default: 1,4,8")
    parser.add_argument("--small-tensors", type=int, default=100_000, metavar="N", help="default: 100000")
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="can be repeated")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="run this section; can be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--wconv", type=shlex.split, metavar="COMMAND", help="measure this, not the working tree")
    options = parser.parse_args()
    if min(options.gb, options.pairs, options.baseline_runs, options.small_tensors, *options.rss_sizes) <= 0:
        parser.error("sizes and counts must be above 0")
    if not hasattr(os, "wait4") or not shutil.which("cp"):
        parser.error("needs cp and os.wait4: Linux or macOS")
    bench = Bench(
        folder=options.dir.resolve(),
        gb=options.gb,
        pairs=options.pairs,
        baseline_runs=options.baseline_runs,
        rss_sizes=options.rss_sizes,
        small_tensors=options.small_tensors,
        cases=tuple(case for case in CASES if case.name in (options.case or [case.name])),
        wconv=options.wconv or [sys.executable, "-m", "converter"],
    )
    return bench, options.only or list(SECTIONS), options.json


def main() -> None:
    bench, sections, json_path = parse_arguments()
    bench.folder.mkdir(parents=True, exist_ok=True)
    if missing := missing_room(bench, bench.gb):
        sys.exit(f"{bench.folder}: the disk lacks {missing / GB:.1f} GB. choose a smaller --gb or another --dir")
    rows: list[Row] = []
    try:
        for section in sections:
            say(f"{section}:")
            rows += run_section(bench, section)
    finally:
        shutil.rmtree(bench.out.parent, ignore_errors=True)
    show(rows)
    if json_path:
        write_report(json_path, bench, rows)
    if any(row.verdict == WRONG for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()

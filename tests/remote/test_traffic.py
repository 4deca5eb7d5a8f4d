"""What goes over the wire: so many requests, and hardly a byte more than is needed."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file

from converter.storage.far import TASK_NBYTES
from remote import stores
from remote.hub_server import Hub
from remote.wire import Asked, Wire

State = dict[str, torch.Tensor]
MB64 = 64 << 20
SHARDS = 200


def llama(layers: range, hidden: int = 384, inner: int = 1024) -> dict[str, tuple[int, ...]]:
    """Give the shapes of a Llama's layers, as its state dict has them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        prefix = f"model.layers.{layer}."
        for name in ("q", "k", "v", "o"):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (hidden, hidden)
        shapes |= {f"{prefix}mlp.gate_proj.weight": (inner, hidden), f"{prefix}mlp.up_proj.weight": (inner, hidden)}
        shapes |= {f"{prefix}mlp.down_proj.weight": (hidden, inner)}
        shapes |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return shapes


def unet(blocks: range, width: int = 512) -> dict[str, tuple[int, ...]]:
    """Give the shapes of blocks such as a UNet has, in the order of their definition, each weight before its bias."""
    shapes: dict[str, tuple[int, ...]] = {}
    for block in blocks:
        prefix = f"down_blocks.{block}."
        for name in ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut"):
            inner = {"time_emb_proj": (width, width), "conv_shortcut": (width, width, 1, 1)}
            shape = (width,) if "norm" in name else inner.get(name, (width, width, 3, 3))
            shapes |= {f"{prefix}{name}.weight": shape, f"{prefix}{name}.bias": (width,)}
    return shapes


def small(layers: range) -> dict[str, tuple[int, ...]]:
    """Give many small shapes, which lie as numbers go and are written as their digits do."""
    names = ("norm.weight", "norm.bias", "fc2.weight", "fc2.bias", "fc1.weight", "fc1.bias")
    return {f"blocks.{layer}.{name}": (layer % 97 + 1, 64 if "fc" in name else 1) for layer in layers for name in names}


MODELS: dict[str, list[dict[str, tuple[int, ...]]]] = {
    "llama": [llama(range(6)), llama(range(6, 12))],
    "unet": [unet(range(2)), unet(range(2, 4))],
    "small": [small(range(400))],
}


def made(shapes: Mapping[str, tuple[int, ...]]) -> State:
    """Make tensors of random numbers, of which there are few distinct."""
    numbers = torch.randn(1 << 20)
    state = {}
    for place, (name, shape) in enumerate(shapes.items()):
        count = math.prod(shape)
        begin = place * 4099 % (len(numbers) // 2)
        some = numbers[begin : begin + count]
        state[name] = some.repeat(-(-count // len(some)))[:count].reshape(shape).clone()
    return state


def write_shards(states: Sequence[State], folder: Path, suffix: str) -> Path:
    """Write shards with an index, in the order of their state dicts where the format has one."""
    folder.mkdir()
    stem, ends = ("pytorch_model", "bin") if suffix == ".bin" else ("model", "safetensors")
    weight_map: dict[str, str] = {}
    for number, state in enumerate(states, 1):
        name = f"{stem}-{number:05}-of-{len(states):05}.{ends}"
        if suffix == ".bin":
            torch.save(state, folder / name)
        else:
            save_file(state, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(state, name)
    index = {"metadata": {"total_size": sum(map(nbytes_of, states))}, "weight_map": weight_map}
    (folder / f"{stem}.{ends}.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def nbytes_of(state: State) -> int:
    return sum(tensor.nbytes for tensor in state.values())


def is_weights(name: str) -> bool:
    return name.endswith((".bin", ".safetensors"))


class Log:
    """What a wire has noted of the weight files that were read: of their headers, and of what is in them."""

    def __init__(self, wires: Iterable[Wire], name_of: Callable[[Asked], str] = lambda asked: asked.path) -> None:
        self.asked = [asked for wire in wires for asked in wire.asked]
        self.read = [one for one in self.asked if one.method in ("GET", "HEAD") and is_weights(name_of(one))]
        self.sent = sum(one.sent for one in self.read)
        self.of_each = Counter(name_of(one) for one in self.read)
        self.others = len(self.asked) - len(self.read)

    def __str__(self) -> str:
        return f"{len(self.read)} requests for weights, {self.others} others, {self.sent:,} bytes"


def longest_row(asked: Iterable[Asked]) -> int:
    """Say how many requests there were at most of which each began when the one before had ended."""
    rows: list[tuple[float, int]] = []
    for one in sorted(asked, key=lambda one: one.began):
        before = max((count for ended, count in rows if ended <= one.began), default=0)
        rows.append((one.ended or math.inf, before + 1))
    return max(count for _, count in rows)


def assert_few(log: Log, nbytes: Mapping[str, int], headers: int = 3, streams: int = 1) -> None:
    """Hold the requests and the bytes against what the files, by the ends of their names, have."""
    assert log.sent <= 1.05 * sum(nbytes.values()), log
    for name, size in nbytes.items():
        count = sum(count for path, count in log.of_each.items() if path.endswith(name))
        assert 1 <= count <= headers + streams * math.ceil(size / MB64), (name, count, str(log))


def sizes_in(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir() if is_weights(path.name)}


@pytest.fixture(scope="module", params=[".bin", ".safetensors"])
def many(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder of many shards."""
    states = [{f"model.{number}.{name}": torch.randn(4) for name in "ab"} for number in range(SHARDS)]
    return write_shards(states, tmp_path_factory.mktemp("many") / "m", request.param)


def put_many(store: stores.Store, folder: Path, prefix: str) -> None:
    """Put the files of a folder, a few at once."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: store.put(prefix + path.name, path.read_bytes()), folder.iterdir()))


def test_the_headers_of_a_bucket_take_few_requests(s3: stores.S3, many: Path, wconv: Any) -> None:
    put_many(s3, many, "m/")
    s3.wire.clear()
    s3.wire.delay = 0.02
    wconv("inspect", f"{s3.url}/m")
    log = Log([s3.wire])
    assert len(log.read) == SHARDS, log
    assert log.others <= 9, log  # the folder twice, 100 names a page, the config, the index twice
    assert longest_row(log.asked) <= SHARDS // 4


def test_the_headers_of_a_repository_take_few_requests(hub: Hub, many: Path, wconv: Any) -> None:
    hub.add("org/m", many)
    hub.wire.clear()
    hub.data.clear()
    wconv("inspect", "hf://org/m")
    headers = len([one for one in hub.wire.asked if is_weights(one.path)])
    assert len(hub.data.asked) == SHARDS
    assert SHARDS <= headers <= 1.1 * SHARDS  # a connection that the other side has closed is noticed by asking
    assert len(hub.wire.asked) - headers <= 12


@pytest.fixture(scope="module", params=MODELS)
def states(request: pytest.FixtureRequest) -> list[State]:
    return list(map(made, MODELS[request.param]))


@pytest.fixture
def bins(states: list[State], tmp_path: Path) -> Path:
    return write_shards(states, tmp_path / "bins", ".bin")


def assert_written(files: Mapping[str, bytes], states: Sequence[State], dtype: torch.dtype) -> None:
    found: State = {}
    for name, content in files.items():
        if is_weights(name):
            found |= load(content)
    expected = {name: tensor for state in states for name, tensor in state.items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in expected.items())


def read_of(wires: Iterable[Wire]) -> Log:
    """Give what was read of weights, but for what was written before."""
    return Log(wires, lambda asked: "" if "/out/" in asked.path else asked.path)


def files_at(target: Path | str, s3: stores.S3 | None = None) -> dict[str, bytes]:
    if isinstance(target, Path):
        return {path.name: path.read_bytes() for path in target.iterdir()}
    assert s3 is not None
    return s3.get_folder("out/")


@pytest.mark.parametrize("to", ["here", "s3"])
def test_what_a_bin_is_read_with(
    to: str, s3: stores.S3, states: list[State], bins: Path, tmp_path: Path, wconv: Any
) -> None:
    s3.put_folder(bins, "m/")
    s3.wire.clear()
    target = f"{s3.url}/out" if to == "s3" else tmp_path / "out"
    wconv("to-safetensors", f"{s3.url}/m", "-o", target)
    assert_few(read_of([s3.wire]), sizes_in(bins))
    assert_written(files_at(target, s3), states, torch.float32)


def test_a_dry_run_counts_what_each_worker_takes(s3: stores.S3, tmp_path: Path, wconv: Any) -> None:
    s3.put_folder(write_shards([made(small(range(10)))], tmp_path / "m", ".safetensors"), "m/")
    taken = {}
    for workers in (1, 5):
        target = f"{s3.url}/out"
        told = wconv(
            "recast", f"{s3.url}/m", "--dtype", "bf16", "-o", target, "--workers", workers, "--dry-run", "--json"
        )
        taken[workers] = json.loads(told.stdout)
    assert taken[5]["peak_memory_nbytes"] - taken[1]["peak_memory_nbytes"] >= 4 * TASK_NBYTES
    assert taken[5]["read_requests"] == 1


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[State]]:
    """Give a folder of two shards, and what they hold."""
    states = list(map(made, MODELS["unet"]))
    return write_shards(states, tmp_path_factory.mktemp("two") / "m", ".safetensors"), states


@pytest.mark.parametrize("to", ["here", "s3"])
def test_what_shards_in_a_bucket_are_read_with(
    to: str, s3: stores.S3, two: tuple[Path, list[State]], tmp_path: Path, wconv: Any
) -> None:
    s3.put_folder(two[0], "m/")
    s3.wire.clear()
    target = f"{s3.url}/out" if to == "s3" else tmp_path / "out"
    wconv("recast", f"{s3.url}/m", "--dtype", "bf16", "-o", target)
    assert_few(read_of([s3.wire]), sizes_in(two[0]), headers=1)
    assert_written(files_at(target, s3), two[1], torch.bfloat16)


def test_what_shards_of_a_web_server_are_read_with(
    web: stores.Web, s3: stores.S3, two: tuple[Path, list[State]], wconv: Any
) -> None:
    for path in two[0].iterdir():
        (web.folder / path.name).write_bytes(path.read_bytes())
    wconv("recast", web.url, "--dtype", "bf16", "-o", f"{s3.url}/out")
    log = Log([web.wire])
    for name in sizes_in(two[0]):
        asked = [one for one in log.read if one.path.endswith(name) and one.status != 404]
        assert [one.method for one in asked] == ["HEAD", "GET", "GET"]
    assert log.sent <= 1.05 * sum(sizes_in(two[0]).values())
    assert_written(files_at(s3.url, s3), two[1], torch.bfloat16)


def test_what_shards_of_the_hub_are_read_with(
    hub: Hub, two: tuple[Path, list[State]], tmp_path: Path, wconv: Any
) -> None:
    hub.add("org/m", two[0])
    wconv("recast", "hf://org/m", "--dtype", "bf16", "-o", tmp_path / "out")
    assert Log([hub.wire, hub.data]).sent <= 1.05 * sum(sizes_in(two[0]).values())
    assert len([one for one in hub.data.asked if one.method == "GET"]) == 4  # a header and a stream each
    assert len([one for one in hub.wire.asked if is_weights(one.path)]) == 2
    assert_written(files_at(tmp_path / "out"), two[1], torch.bfloat16)


def test_what_a_comparison_reads(s3: stores.S3, two: tuple[Path, list[State]], wconv: Any) -> None:
    s3.put_folder(two[0], "m/")
    s3.put_folder(two[0], "n/")
    s3.wire.clear()
    wconv("verify", f"{s3.url}/m", f"{s3.url}/n")
    log = Log([s3.wire])
    assert log.sent <= 1.05 * 2 * sum(sizes_in(two[0]).values())
    assert len(log.read) <= 8


def test_what_a_deep_look_reads(s3: stores.S3, two: tuple[Path, list[State]], wconv: Any) -> None:
    s3.put_folder(two[0], "m/")
    s3.wire.clear()
    wconv("doctor", "--deep", f"{s3.url}/m", exit_code=None)
    log = Log([s3.wire])
    assert log.sent <= 1.05 * sum(sizes_in(two[0]).values()), log
    assert len(log.read) <= 6, log  # the headers twice, and a stream each


@pytest.mark.parametrize("to", ["here", "s3"])
def test_what_is_quantized_is_read_once_with_its_scales(to: str, s3: stores.S3, tmp_path: Path, wconv: Any) -> None:
    state: State = {}
    for layer in range(6):
        name = f"layers.{layer}.{'down' if layer % 2 else 'up'}_proj.weight"
        state[name] = torch.randn(1400, 2100).to(torch.float8_e4m3fn)
        state[f"{name}_scale_inv"] = torch.rand(11, 17)
    state["norm.weight"] = torch.rand(2100)
    folder = write_shards([state, {"head.weight": torch.rand(100, 2100)}], tmp_path / "m", ".safetensors")
    s3.put_folder(folder, "m/")
    s3.wire.clear()
    target = f"{s3.url}/out" if to == "s3" else tmp_path / "out"
    wconv("dequantize", f"{s3.url}/m", "-o", target, "--dtype", "bf16")
    assert_few(read_of([s3.wire]), sizes_in(folder), headers=1, streams=2)
    found = {
        name: one
        for content in files_at(target, s3).values()
        if b"__metadata__" in content[:99]
        for name, one in load(content).items()
    }
    for name, scales in ((name, scales) for name, scales in state.items() if name.endswith("_scale_inv")):
        weight = state[name.removesuffix("_scale_inv")].float()
        whole = scales.repeat_interleave(128, 0)[:1400].repeat_interleave(128, 1)[:, :2100]
        assert torch.equal(found[name.removesuffix("_scale_inv")], (weight * whole).bfloat16())

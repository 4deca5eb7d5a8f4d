"""JSON made to take time and memory: whatever a header, an index, a config or a name claims, both stay small."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_main
from support import original
from support.tiny import ref_to

from converter.errors import BadFile, HostileFile, shorten
from converter.formats.safetensors import parse_header
from converter.formats.texts import MAX_CONFIG_NBYTES, MAX_HEADER_MARKS, MAX_MARKS, MAX_TEXT_NBYTES
from converter.models import checkpoint, headers
from converter.models.configs import read_json
from converter.models.faults import look
from converter.models.names import parse_name
from converter.storage import place_of
from converter.tensors.base import MAX_DIMS, MAX_NAME, MAX_TENSORS

MAX_MEMORY_NBYTES = 512_000_000
MAX_SECONDS = 10
PATH = Path("model.safetensors")
EMPTY = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
TENSOR = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
SHARD = "model-00001-of-00002.safetensors"

Bomb = Callable[[Path], object]


def write_header(path: Path, header: str, nbytes: int = 0) -> None:
    raw = header.encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(nbytes))


def describe(count: int, entry: str = EMPTY) -> str:
    return "{" + ",".join(f'"{place}":{entry}' for place in range(count)) + "}"


def header(make: Callable[[], str]) -> Bomb:
    return lambda folder: write_header(folder / "model.safetensors", make())


def text(name: str, make: Callable[[], str], nbytes: int = 0) -> Bomb:
    """Write a text beside weights; ``nbytes`` of it are a hole."""

    def write(folder: Path) -> None:
        (folder / "unet").mkdir()
        for place in (folder, folder / "unet"):
            write_header(place / SHARD, f'{{"a":{TENSOR}}}', 8)
        (folder / name).write_text(make(), encoding="utf-8")
        if nbytes:
            os.truncate(folder / name, nbytes)

    return write


def with_extra(value: str, count: int) -> str:
    extra = ",".join([value] * count)
    return f'{{"a":{{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":[{extra}]}}}}'


def with_metadata(content: str) -> str:
    return f'{{"__metadata__":{content},"a":{EMPTY}}}'


def index(names: str, metadata: str = "{}") -> str:
    return f'{{"metadata":{metadata},"weight_map":{{{names}}}}}'


INDEX = "model.safetensors.index.json"
# Each takes gigabytes or minutes where nothing bounds it.
LARGE: dict[str, Bomb] = {
    "shapes of a million ones": header(lambda: describe(18, f'{{"dtype":"U8","shape":[{"1," * 1_000_000}1]}}')),
    "huge numbers": header(lambda: describe(9_000, f'{{"dtype":"U8","shape":[{"9" * 4_300}]}}')),
    "strides without end": header(
        lambda: describe(1, f'{{"dtype":"U8","shape":[0{f",{1 << 63}" * 40_000}],"data_offsets":[0,0]}}')
    ),
    "notes": header(lambda: with_metadata(describe(1_000_000, '"x"'))),
    "one wide note": header(lambda: with_metadata('{"x":"' + "a" * (MAX_TEXT_NBYTES - 1000) + '\\ud83d\\ude00"}')),
    "empty tensors": header(lambda: describe(1_200_000)),
    "lists and dicts": header(lambda: with_extra('{"a":[]}', 4_000_000)),
    "as many dicts as are taken": header(lambda: with_extra('{"ab":{}}', MAX_HEADER_MARKS // 4 - 10)),
    "wide text": header(lambda: with_metadata('{"x":"' + "😀" * 6_000_000 + '"}')),
    "a header of 100 MB": header(lambda: with_metadata('{"x":"' + "a" * 99_999_000 + '"}')),
    "names in an index": text(INDEX, lambda: index(describe(1_000_000, f'"{SHARD}"')[1:-1])),
    "dicts in an index": text(INDEX, lambda: index(f'"a":"{SHARD}"', f"[{'{},' * 12_000_000}1]")),
    "shards that are not there": text(
        INDEX, lambda: index(",".join(f'"{place}":"model-{place}-of-100000.bin"' for place in range(100_000)))
    ),
    "a config with a hole": text("config.json", lambda: "{", 20 << 30),
    "a pipeline with a hole": text("model_index.json", lambda: "{", 20 << 30),
    "an index with a hole": text(INDEX, lambda: "{", 20 << 30),
    "dicts in a config": text(
        "config.json", lambda: f'{{"torch_dtype":"float32","x":{describe(MAX_MARKS // 3 - 10, "{}")}}}'
    ),
    "classes in a config": text(
        "config.json",
        lambda: "{" + ",".join(f'"{place}":{{"architectures":["A{place}"]}}' for place in range(100_000)) + "}",
    ),
    "a number of shards": lambda folder: write_header(
        folder / "model-00001-of-99999999.safetensors", f'{{"a":{TENSOR}}}', 8
    ),
    "as many tensors as are taken": header(lambda: describe(MAX_TENSORS)),
}  # fmt: skip
COMMANDS = (
    ("inspect", "."),
    ("inspect", ".", "--json", "--tensors"),
    ("doctor", "."),
    ("doctor", ".", "--fix"),
    ("recast", ".", "--dtype", "bf16", "-o", "../out"),
    ("to-bin", ".", "-o", "../out"),
)
RUN = """
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
from converter.cli import main
code = main(sys.argv[1:])
# The peak of this process; ru_maxrss is also that of its parent, before exec.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(code, peak.split()[1], file=sys.stderr)
"""


def check_bounds(folder: Path, command: tuple[str, ...]) -> None:
    """Run a command as a process of its own, which may take 10 s of processor time and 512 MB, and say little."""
    done = subprocess.run((sys.executable, "-c", RUN, *command), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, (command, done.stderr[-2000:])
    *lines, figures = done.stderr.splitlines()
    code, peak = map(int, figures.split())
    assert code <= 7, (command, done.stderr[-2000:])
    assert peak * 1024 < MAX_MEMORY_NBYTES, command
    assert len("".join(lines)) < 10_000


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("bomb", LARGE)
def test_whatever_it_claims_it_takes_little_time_and_memory(bomb: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    LARGE[bomb](folder)
    for command in COMMANDS[: 5 if bomb == "as many tensors as are taken" else None]:
        check_bounds(folder, command)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("bomb", ["a config with a hole", "a number of shards", "strides without end"])
@pytest.mark.parametrize("command", [("inspect", "."), ("doctor", ".", "--fix")], ids=lambda command: command[0])
def test_some_of_them_at_once(bomb: str, command: tuple[str, ...], tmp_path: Path) -> None:
    LARGE[bomb](tmp_path)
    check_bounds(tmp_path, command)


# Where the bounds are.


def parse(header: str) -> object:
    return parse_header(header.encode(), 8 + len(header.encode()), ref_to(PATH))


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (f"[{'1,' * (MAX_DIMS - 2)}0]", f"[{'1,' * MAX_DIMS}0]"),
        (f"[0,{2**62}]", f"[0,{2**63}]"),
        (f"[0,{2**31},{2**31}]", f"[0,{2**31},{2**32}]"),
    ],
)
def test_shapes_are_of_what_torch_can_count(good: str, bad: str) -> None:
    parse(f'{{"a":{EMPTY.replace("[0]", good)}}}')
    with pytest.raises(BadFile):
        parse(f'{{"a":{EMPTY.replace("[0]", bad)}}}')


def test_a_name_is_no_longer_than_names_are() -> None:
    parse(f'{{"{"a" * MAX_NAME}":{EMPTY}}}')
    with pytest.raises(HostileFile, match="spells a name in 1,000,000 characters") as caught:
        parse(f'{{"{"a" * 1_000_000}":{EMPTY}}}')
    assert len(str(caught.value)) < 300


def test_configs_with_many_labels_are_read_and_none_that_are_longer(tmp_path: Path) -> None:
    labels = {str(place): f"the label of class {place}" for place in range(100_000)}
    config = {"id2label": labels, "label2id": {label: int(place) for place, label in labels.items()}}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert read_json(place_of(path)) == config
    os.truncate(path, MAX_CONFIG_NBYTES + 1)
    with pytest.raises(HostileFile, match="bytes long"):
        read_json(place_of(path))


@pytest.mark.parametrize("form", ['{"a":%s}', "[%s]"])
def test_configs_are_not_nested_without_end(form: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for depth, is_taken in ((90, True), (110, False), (900, False), (100_000, False)):
        begin, end = form.split("%s")
        path.write_text(f'{{"x":{begin * depth}1{end * depth}}}')
        if is_taken:
            assert read_json(place_of(path))
            continue
        with pytest.raises(BadFile, match="nested"):
            read_json(place_of(path))


def test_tensors_are_counted_over_all_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(1, 5):
        write_header(tmp_path / f"model-0000{number}-of-00004.safetensors", f'{{"{number}":{EMPTY}}}')
    path = tmp_path / "model-00001-of-00004.safetensors"
    for limit in (4, 3):
        monkeypatch.setattr(checkpoint, "MAX_TENSORS", limit)
        monkeypatch.setattr(headers, "_MAX_TENSORS", limit)
        bad = [one.name for one in look(tmp_path).parts[0].headers.values() if one.error]
        if limit == 4:
            assert len(checkpoint.open_checkpoint(path).tensors) == 4
            assert not bad
    assert bad == ["model-00004-of-00004.safetensors"]
    with pytest.raises(HostileFile, match="more than 3 tensors"):
        checkpoint.open_checkpoint(path)


def test_scales_are_read_only_where_they_are_what_they_should_be(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    entry = {"dtype": "I8", "shape": [2, 2], "data_offsets": [0, 4]}
    scales = {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}
    form = {"dtype": "U8", "shape": [1 << 34], "data_offsets": [12, 12 + (1 << 34)]}
    path = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text('{"quantization_config": {}, "architectures": ["LlamaForCausalLM"]}')
    write_header(path, json.dumps({"q_proj.weight": entry, "q_proj.SCB": scales, "q_proj.weight_format": form}))
    os.truncate(path, path.stat().st_size + 12 + (1 << 34))
    arguments = ("dequantize", tmp_path, "--dtype", "fp16", "-o", tmp_path / "out")
    assert "and no model has them" in wconv(*arguments, exit_code=3).stderr
    entry = {"dtype": "I8", "shape": [1 << 30, 0], "data_offsets": [0, 0]}
    scales = {"dtype": "F32", "shape": [1 << 30], "data_offsets": [0, 1 << 32]}
    write_header(path, json.dumps({"q_proj.weight": entry, "q_proj.SCB": scales}))
    os.truncate(path, path.stat().st_size + (1 << 32))
    assert "scales that do not fit" in wconv(*arguments, exit_code=3).stderr


# What is said of it.


def test_messages_are_cut() -> None:
    assert shorten("x" * 2000) == "x" * 2000
    error = BadFile("y" * 1_000_000, "a" * 1_000_000 + "b", "c" * 1_000_000 + "d")
    assert len(str(error)) < 7000
    assert error.problem.startswith("aaa")
    assert error.problem.endswith("b")
    assert str(error).endswith("d")


def test_one_long_name_does_not_widen_a_table(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    long = "b" * MAX_NAME
    entries = {**{f"a{place}": json.loads(EMPTY) for place in range(100)}, long: json.loads(EMPTY)}
    write_header(tmp_path / "model.safetensors", json.dumps(entries))
    shown = wconv("inspect", tmp_path, "--tensors").stdout
    assert long in shown
    assert len(shown) < 40_000


# Values of types that nobody expects.

ODD: list[Any] = [None, -1, 0, "x" * 10_000, "\ud800", [], [[]], [0], {"a": {"a": []}}]
PIPELINE = {
    "_class_name": "StableDiffusionPipeline",
    **{name: ["diffusers", "X"] for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")},
}
UNET = {
    "in_channels": 4, "out_channels": 4, "block_out_channels": [8], "layers_per_block": 1, "cross_attention_dim": 6,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "model_index.json": PIPELINE,
    "unet/config.json": {"_class_name": "UNet2DConditionModel", **UNET},
    "vae/config.json": {"latent_channels": 4, "block_out_channels": [8], "up_block_types": ["UpDecoderBlock2D"]},
    "text_encoder/config.json": {
        "architectures": ["CLIPTextModel"], "hidden_size": 6, "num_hidden_layers": 1, "torch_dtype": "float32",
        "vocab_size": 9, "intermediate_size": 8, "tie_word_embeddings": True,
    },
}  # fmt: skip
BESIDE = ("tokenizer/vocab.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json")
# What else the classes need to be of these sizes.
MORE: dict[str, dict[str, Any]] = {
    "unet/config.json": {
        "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "norm_num_groups": 4,
        "attention_head_dim": 4,
    },
    "vae/config.json": {"down_block_types": ["DownEncoderBlock2D"], "norm_num_groups": 4, "layers_per_block": 1},
    "text_encoder/config.json": {"num_attention_heads": 2, "max_position_embeddings": 7},
}  # fmt: skip


def checkpoint_shapes() -> dict[str, list[int]]:
    """Give the shapes of a checkpoint that the configs fit."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    configs = {name.partition("/")[0]: {**CONFIGS[name], **more} for name, more in MORE.items()}
    with torch.device("meta"):
        models = {
            "unet": UNet2DConditionModel.from_config(configs["unet"]),
            "vae": AutoencoderKL.from_config(configs["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
        }
    states = {name: model.state_dict() for name, model in models.items()}
    states["text_encoder"] = {f"text_model.{name}": tensor for name, tensor in states["text_encoder"].items()}
    state = original.as_original("sd1", states, {name: model.config for name, model in models.items()})
    return {name: list(tensor.shape) for name, tensor in state.items()}


def write_tensors(path: Path, shapes: dict[str, list[int]]) -> None:
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    write_header(path, json.dumps(entries), end)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder that every command takes, and beside it a checkpoint that its configs fit."""
    folder = tmp_path_factory.mktemp("odd") / "pipeline"
    configs = {name: {**config, **MORE.get(name, {})} for name, config in CONFIGS.items()}
    for name, content in {**configs, **{beside: {} for beside in BESIDE}}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    # Names that the table of linear modules knows: no library is asked.
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        tensor = "mid.q_proj.weight" if name.startswith("text") else "mid.to_q.weight"
        write_tensors(folder / f"{name}.safetensors", {tensor: [4, 4]})
    write_tensors(folder.parent / "sd.safetensors", checkpoint_shapes())
    return folder


@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize(
    ("turn", "name", "key"),
    [
        (turn, name, key)
        for name, config in CONFIGS.items()
        for turn, key in enumerate((*config, "quantization_config"))
    ],
)
def test_a_value_of_any_type_ends_in_one_line(
    turn: int, name: str, key: str, pipeline: Path, wconv: Callable[..., Any]
) -> None:
    out = pipeline.parent / "out"
    commands: tuple[tuple[object, ...], ...] = (
        ("inspect", pipeline),
        ("doctor", pipeline, "--loader", "coreml"),
        ("recast", pipeline, "--dtype", "bf16", "-o", out, "--dry-run"),
        ("quantize", pipeline, "-o", out, "--include", "q", "--dry-run"),
        ("prepare-coreml", pipeline, "-o", out, "--dry-run"),
        ("prepare-coreml", pipeline.parent / "sd.safetensors", "--config", pipeline, "-o", out, "--dry-run"),
    )
    wconv(*commands[2])
    wconv(*commands[-1])
    config = {**CONFIGS[name], **MORE.get(name, {})}
    for at, value in enumerate(ODD):
        (pipeline / name).write_text(json.dumps({**config, key: value}))
        for command in commands[(at + turn) % 2 :: 2]:  # the others get it with the next key
            said = io.StringIO()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
                code = run_main([str(word) for word in command])
            assert code <= 7, (command, value, said.getvalue())
            assert len(said.getvalue()) < 10_000
    (pipeline / name).write_text(json.dumps(config))


def test_numbers_in_names_have_no_thousand_digits(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    digits = "1" * 5_000
    parsed = parse_name(f"model-{digits}-of-{digits}.bin")
    assert parsed is not None
    assert parsed.role == "single"
    shard = f"model-{digits}-of-{digits}.safetensors"
    write_header(tmp_path / SHARD, f'{{"a":{TENSOR}}}', 8)
    (tmp_path / INDEX).write_text(index(f'"a":"{shard}"'))
    for command in ("inspect", "doctor"):
        wconv(command, tmp_path, exit_code=3 if command == "inspect" else 1)


def test_a_module_that_is_no_regular_expression_is_refused(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    write_tensors(tmp_path / "model.safetensors", {"layers.0.q_proj.weight": [4, 4], "a(.k_proj.weight": [4, 4]})
    done = wconv("quantize", tmp_path, "-o", tmp_path / "out", "--include", "q_proj", "--dry-run", exit_code=4)
    assert "takes what it skips for regular expressions" in done.stderr

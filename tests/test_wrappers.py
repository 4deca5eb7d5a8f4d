"""What wrappers of torch put into the names of tensors is known, and taken off where a config says what model it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names
from safetensors.torch import load_file, save_file
from support.tiny import write_json
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

OWN = ("embed.weight", "layers.0.mlp.weight", "layers.1.mlp.weight", "head.weight")
STATE = {name: torch.full((2,), float(at)) for at, name in enumerate(OWN)}
WRAPPED: dict[str, Callable[[str], str]] = {
    "module.": lambda name: f"module.{name}",
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "module., _orig_mod.": lambda name: f"module._orig_mod.module.{name}",
    "_fsdp_wrapped_module.": lambda name: f"_fsdp_wrapped_module.{name}".replace("mlp", "_fsdp_wrapped_module.mlp"),
    "_checkpoint_wrapped_module.": lambda name: name.replace("mlp", "_checkpoint_wrapped_module.mlp"),
    "_orig_mod., _checkpoint_wrapped_module.": lambda n: n.replace("mlp", "_orig_mod._checkpoint_wrapped_module.mlp"),
}  # fmt: skip


def written(folder: Path, wrap: Callable[[str], str], class_name: str | None = "LlamaForCausalLM", **more: Any) -> Path:
    folder.mkdir()
    torch.save({**{wrap(name): tensor for name, tensor in STATE.items()}, **more}, folder / "pytorch_model.bin")
    if class_name:
        write_json(folder / "config.json", {"model_type": "llama", "architectures": [class_name]})
    return folder


@pytest.mark.parametrize(("found", "wrap"), WRAPPED.items(), ids=WRAPPED)
def test_it_is_taken_off_where_the_model_is_known(
    wconv: Callable[..., Any], tmp_path: Path, found: str, wrap: Callable[[str], str]
) -> None:
    source = written(tmp_path / "m", wrap)
    said = wconv("to-safetensors", source, "-o", tmp_path / "out").stdout
    count = sum(wrap(name) != name for name in OWN)
    assert f"{found} is taken off the names of {count} tensors" in said
    codes = [
        [one["code"] for one in json.loads(wconv("doctor", where, "--json", exit_code=None).stdout)["findings"]]
        for where in (source, tmp_path / "out")
    ]
    assert "names-wrapped" in codes[0]
    assert "names-wrapped" not in codes[1]
    kept = load_file(tmp_path / "out" / "model.safetensors")
    assert kept.keys() == STATE.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in STATE.items())
    told = json.loads(wconv("verify", source, tmp_path / "out", "--json").stdout)
    assert told["equal"]
    assert told["tensor_count"] == len(OWN)
    wconv("recast", source, "--dtype", "bf16", "-o", tmp_path / "small")
    wconv("verify", source, tmp_path / "small", "--cast")


@pytest.mark.parametrize(
    "found", [name for name in WRAPPED if "module." not in name.split(", ") and "fsdp" not in name]
)
def test_accelerate_takes_the_same_off(found: str) -> None:
    assert fsdp2_canonicalize_names({WRAPPED[found](name): 0 for name in OWN}).keys() == STATE.keys()


def test_it_is_named_where_the_model_is_not_known(wconv: Callable[..., Any], tmp_path: Path) -> None:
    source = written(tmp_path / "m", WRAPPED["module., _orig_mod."], None)
    said = wconv("to-safetensors", source, "-o", tmp_path / "out").stdout
    assert "--strip-prefix module._orig_mod.module. takes it off" in said
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == {f"module._orig_mod.module.{n}" for n in OWN}
    option = ("--strip-prefix", "module._orig_mod.module.")
    wconv("to-safetensors", source, "-o", tmp_path / "plain", *option)
    wconv("verify", source, tmp_path / "plain", *option)
    wconv("verify", source, tmp_path / "plain", exit_code=1)
    middle = written(tmp_path / "n", WRAPPED["_checkpoint_wrapped_module."], None)
    said = wconv("to-safetensors", middle, "-o", tmp_path / "x").stdout
    assert "hold _checkpoint_wrapped_module. as wrappers have it" in said
    assert "--strip-prefix" not in said


@pytest.mark.parametrize(
    "wrap",
    [lambda n: n.replace("layers", "module"), lambda n: n if n == "head.weight" else f"module.{n}", lambda n: n],
    ids=["inner", "some", "none"],
)
def test_a_part_of_a_model_that_is_called_so_stays(
    wconv: Callable[..., Any], tmp_path: Path, wrap: Callable[[str], str]
) -> None:
    said = wconv("to-safetensors", written(tmp_path / "m", wrap), "-o", tmp_path / "out").stdout
    assert "wrapper" not in said
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == set(map(wrap, OWN))


def test_two_that_come_to_one_name(wconv: Callable[..., Any], tmp_path: Path) -> None:
    wrap = WRAPPED["_checkpoint_wrapped_module."]
    source = written(tmp_path / "m", wrap, **{"layers.0.mlp.weight": torch.ones(2)})
    assert "two tensors that come to one name" in wconv("to-safetensors", source, exit_code=4).stderr


def test_ties_follow(wconv: Callable[..., Any], tmp_path: Path) -> None:
    source = tmp_path / "m"
    source.mkdir()
    write_json(source / "config.json", {"architectures": ["LlamaForCausalLM"]})
    state = {f"module.{name}": tensor for name, tensor in STATE.items() if name != "head.weight"}
    save_file(state, source / "model.safetensors", {"format": "pt", "module.head.weight": "module.embed.weight"})
    wconv("to-bin", source, "-o", tmp_path / "out")
    assert torch.load(tmp_path / "out" / "pytorch_model.bin").keys() == STATE.keys()


def test_the_names_are_those_that_torch_gives(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    """A checkpoint wrapper takes its own off in ``state_dict()``; what is pickled whole has it."""
    model = nn.DataParallel(nn.Sequential(nn.Linear(2, 2), CheckpointWrapper(nn.Linear(2, 2))))
    torch.save(model, tmp_path / "pytorch_model.bin")
    write_json(tmp_path / "config.json", {"architectures": ["LlamaForCausalLM"]})
    wconv("to-safetensors", tmp_path, "--strip-code")
    assert load_file(tmp_path / "model.safetensors").keys() == model.module.state_dict().keys()

"""State dicts inside what trainers save: found by what they are, chosen by a key, and the rest named."""

from __future__ import annotations

import argparse
import datetime
import enum
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from support.judges import described_by_safetensors, described_by_wconv

from converter.errors import BadFile, BadRequest, HostileFile, Unsupported
from converter.formats.torch.state_dict import Reading
from converter.models.checkpoint import open_checkpoint

WEIGHTS = OrderedDict(weight=torch.arange(6.0).reshape(2, 3), bias=torch.ones(2))
OTHER = OrderedDict(weight=torch.zeros(2, 3), bias=torch.zeros(2))


class Stage(enum.Enum):
    """A class of the trainer's own."""

    FIT = "fit"


class Options:
    """Another."""

    def __init__(self) -> None:
        self.rate = 0.1


def optimizer_state() -> dict[str, Any]:
    layer = torch.nn.Linear(3, 2)
    adam = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    adam.step()
    return adam.state_dict()


def saved(folder: Path, value: Any, **how: Any) -> Path:
    path = folder / "last.ckpt"
    torch.save(value, path, **how)
    return path


CHECKPOINTS = {
    "at the top": WEIGHTS,
    "state_dict": {"state_dict": WEIGHTS},
    "any name": {"some_net": WEIGHTS, "epoch": 3},
    "two levels": {"model": {"generator": WEIGHTS}, "args": {"lr": 0.1}},
    "in a list": {"models": [WEIGHTS]},
    "numbers beside": {**WEIGHTS, "step": 3, "loss": None},
    "lightning": {
        "epoch": 1, "global_step": 10, "pytorch-lightning_version": "2.4.0", "state_dict": WEIGHTS, "loops": {"x": {}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best": torch.tensor(1.0)}},
        "optimizer_states": [optimizer_state()], "lr_schedulers": [{"last": torch.tensor([0.1])}],
        "hyper_parameters": argparse.Namespace(rate=0.1, path=Path("x"), day=datetime.date(2020, 1, 1)),
    },
    "objects": {"state_dict": WEIGHTS, "options": Options(), "when": datetime.datetime(2020, 1, 1), "set": {1, 2},
                "numpy": np.float64(0.5), "array": np.arange(3), "counts": defaultdict(int, a=1),
                "rng_state": torch.ByteTensor([1, 2]), "device": torch.device("cpu"), (1, 2): 3, 2.5: 1,
                "cls": Options},
    "with an optimizer": {"model": WEIGHTS, "optimizer": optimizer_state(), "scaler": {"scale": torch.tensor(2.0)}},
}  # fmt: skip


@pytest.mark.parametrize("modern", [True, False], ids=["zip", "stream"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_state_dict_is_found(tmp_path: Path, name: str, modern: bool) -> None:
    path = saved(tmp_path, CHECKPOINTS[name], _use_new_zipfile_serialization=modern)
    assert described_by_wconv(path) == described_by_safetensors(WEIGHTS)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocols(tmp_path: Path, protocol: int) -> None:
    path = saved(tmp_path, CHECKPOINTS["objects"], pickle_protocol=protocol)
    assert described_by_wconv(path) == described_by_safetensors(WEIGHTS)


def test_what_is_left_out_is_named(wconv: Callable[..., Any], tmp_path: Path) -> None:
    path = saved(tmp_path, CHECKPOINTS["lightning"])
    said = wconv("to-safetensors", path).stdout
    for word in ("epoch", "optimizer_states", "hyper_parameters", "callbacks", "argparse.Namespace"):
        assert word in said
    assert load_file(tmp_path / "last.safetensors").keys() == WEIGHTS.keys()


def test_of_several_one_is_chosen_by_its_key(wconv: Callable[..., Any], tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": WEIGHTS, "ema": {"shadow": OTHER}, "epoch": 1})
    failed = wconv("to-safetensors", path, exit_code=2)
    assert "model (2 tensors" in failed.stderr
    assert "ema.shadow (2 tensors" in failed.stderr
    assert "--key" in failed.stderr
    assert not (tmp_path / "last.safetensors").exists()
    said = wconv("to-safetensors", path, "--key", "ema.shadow").stdout
    assert "and not model" in said
    assert torch.equal(load_file(tmp_path / "last.safetensors")["bias"], OTHER["bias"])
    assert "no state dict at 'ema'" in wconv("to-safetensors", path, "--key", "ema", exit_code=2).stderr


def test_an_optimizer_alone_is_no_model(tmp_path: Path) -> None:
    path = saved(tmp_path, optimizer_state())
    with pytest.raises(Unsupported, match="holds the state of an optimizer, and no weights"):
        open_checkpoint(path)
    assert open_checkpoint(path, Reading(key="state.0")).tensors


def test_inspect_shows_all_the_same(wconv: Callable[..., Any], tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": WEIGHTS, "ema": OTHER, "options": Options()})
    said = wconv("inspect", path).stdout
    assert "only model" in said
    assert f"makes an object, left out here, of: {Options.__module__}.Options" in said


def test_numbers_as_names(tmp_path: Path) -> None:
    path = saved(tmp_path, {0: torch.ones(2), 1: torch.zeros(2)})
    assert described_by_wconv(path).keys() == {"0", "1"}


def test_a_call_of_unknown_code_is_refused_unless_it_is_stripped(wconv: Callable[..., Any], tmp_path: Path) -> None:
    path = saved(tmp_path, {"state_dict": WEIGHTS, "stage": Stage.FIT})
    with pytest.raises(HostileFile, match=r"\.Stage.*--strip-code"):
        open_checkpoint(path)
    said = wconv("to-safetensors", path, "--strip-code").stdout
    assert "Stage" in said
    assert load_file(tmp_path / "last.safetensors").keys() == WEIGHTS.keys()
    assert "would call, and never does here" in wconv("inspect", path).stdout


def test_a_prefix_is_taken_off(wconv: Callable[..., Any], tmp_path: Path) -> None:
    path = saved(tmp_path, {f"module.{name}": tensor for name, tensor in WEIGHTS.items()} | {"plain": torch.ones(1)})
    wconv("to-safetensors", path, "--strip-prefix", "module.")
    assert load_file(tmp_path / "last.safetensors").keys() == {*WEIGHTS, "plain"}


def test_a_prefix_is_taken_off_in_the_same_folder(wconv: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"m.a": torch.ones(2), "m.b": torch.zeros(2)}, path)
    command = ("to-safetensors", tmp_path, "--strip-prefix", "m.")
    assert "--overwrite" in wconv(*command, exit_code=5).stderr
    wconv(*command, "--overwrite")
    assert load_file(path).keys() == {"a", "b"}


def test_a_prefix_is_taken_off_ties_too(wconv: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"m.a": torch.ones(2)}, path, {"m.head": "m.a"})
    wconv("to-bin", path, "--strip-prefix", "m.")
    assert torch.load(tmp_path / "pytorch_model.bin").keys() == {"a", "head"}


@pytest.mark.parametrize(
    ("state", "prefix", "said"),
    [
        (WEIGHTS, "module.", "begins with 'module.', as --strip-prefix has it"),
        ({"m.a": WEIGHTS["bias"], "a": WEIGHTS["bias"]}, "m.", "would have two tensors named 'a': 'm.a' and 'a'."),
    ],
)
def test_a_prefix_that_does_not_fit(
    tmp_path: Path, wconv: Callable[..., Any], state: dict[str, torch.Tensor], prefix: str, said: str
) -> None:
    path = saved(tmp_path, state)
    assert said in wconv("to-safetensors", path, "--strip-prefix", prefix, exit_code=2).stderr


def test_many_references_to_one_list_take_no_time(tmp_path: Path) -> None:
    value: Any = [WEIGHTS]
    for _ in range(12):
        value = {"a": value, "b": value}
    assert described_by_wconv(saved(tmp_path, value)) == described_by_safetensors(WEIGHTS)


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="two tensors named"):
        open_checkpoint(saved(tmp_path, {0: torch.ones(1), "0": torch.ones(1)}))


def test_a_key_for_a_plain_safetensors_file_is_no_harm(tmp_path: Path) -> None:
    path = saved(tmp_path, {"state_dict": WEIGHTS})
    with pytest.raises(BadRequest):
        open_checkpoint(path, Reading(key=""))


def test_a_tensor_under_a_key_that_is_no_name_is_left_out_and_said(wconv: Callable[..., Any], tmp_path: Path) -> None:
    path = saved(tmp_path, {**WEIGHTS, ("x", 1): torch.ones(1)})
    assert described_by_wconv(path) == described_by_safetensors(WEIGHTS)
    assert "left out: tuple" in wconv("to-safetensors", path).stdout


def test_a_long_log_of_numbers_beside_the_weights(tmp_path: Path) -> None:
    log = [(step, 0.5) for step in range(250_000)]
    path = saved(tmp_path, {"state_dict": {**WEIGHTS, "losses": [0.5] * 1_000}, "log": log})
    assert [info.name for info in open_checkpoint(path).tensors] == ["weight", "bias"]
    flat = open_checkpoint(path, Reading(flatten=True))
    assert [info.name for info in flat.tensors] == ["state_dict.weight", "state_dict.bias"]
    assert flat.notes == ("last.ckpt: left out: state_dict.losses, log",)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_is_left_out_is_named_at_every_depth(tmp_path: Path) -> None:
    moments = {"optim": {"state": {0: {"exp_avg": torch.zeros(200_000), "runs": [torch.ones(5)]}}}, "step": 7}
    content = {"app": {"model": {**WEIGHTS, "_extra": 3}, **moments}, "rng": {"cpu": torch.zeros(8).byte()}}
    (note,) = open_checkpoint(saved(tmp_path, content)).notes
    assert note == "last.ckpt: left out: rng (8 bytes), app.optim (0.8 MB), app.step, app.model._extra"
    dcp.save(content, checkpoint_id=tmp_path / "dcp", no_dist=True)
    (note,) = open_checkpoint(tmp_path / "dcp" / ".metadata").notes
    assert note.startswith("left out: rng (8 bytes), app.optim (0.8 MB), app.step (")


NANO = {"model": WEIGHTS, "optimizer": optimizer_state(), "iter_num": 3, "best_val_loss": torch.tensor(1.5)}


def test_a_number_beside_a_state_dict_is_no_second_one(wconv: Callable[..., Any], tmp_path: Path) -> None:
    """As nanoGPT saves it (``train.py``)."""
    path = saved(tmp_path, NANO)
    said = wconv("to-safetensors", path).stdout
    assert "left out: optimizer (72 bytes), iter_num, best_val_loss" in said
    assert "only model" not in said
    assert load_file(tmp_path / "last.safetensors").keys() == WEIGHTS.keys()
    assert [one.name for one in open_checkpoint(path, Reading(key="")).tensors] == ["best_val_loss"]
    deeper = open_checkpoint(saved(tmp_path, {"state": {"best": torch.ones(1), "model": WEIGHTS}}))
    assert [one.name for one in deeper.tensors] == list(WEIGHTS)
    assert "not state (1 tensor" in deeper.notes[0]


def test_what_lies_deeper_beside_the_weights_is_named(tmp_path: Path) -> None:
    """As the ``AppState`` of PyTorch's own tutorial on torch.distributed.checkpoint nests it."""
    app = {"model": WEIGHTS, "optim": optimizer_state(), "extra": {"rng": 5}}
    path = saved(tmp_path, {"app": app, "step": 3, "runs": [{"log": 1}]})
    opened = open_checkpoint(path)
    assert [one.name for one in opened.tensors] == list(WEIGHTS)
    assert opened.notes == ("last.ckpt: left out: step, runs, app.optim (72 bytes), app.extra",)
    with pytest.raises(BadRequest, match=r"a trainer's within what would be flattened: app\.optim\.state"):
        open_checkpoint(path, Reading(flatten=True))
    opened = open_checkpoint(path, Reading(key="app.model", flatten=True))
    assert [one.name for one in opened.tensors] == list(WEIGHTS)
    listed = open_checkpoint(saved(tmp_path, [{"lr": 1}, {"model": WEIGHTS, "sched": 2}]))
    assert listed.notes == ("last.ckpt: left out: 0, 1.sched",)


@pytest.mark.parametrize("value", [{"a": torch.ones(1), "b": {"c": torch.ones(1)}}, {"a": torch.ones(2), "b": WEIGHTS}])
def test_what_may_be_a_second_one(tmp_path: Path, value: Any) -> None:
    with pytest.raises(BadRequest, match="several state dicts"):
        open_checkpoint(saved(tmp_path, value))


HEAD = {"weight": torch.ones(4, 3), "bias": torch.ones(4)}
PARTS = {
    "encoder": {"conv": WEIGHTS, "blocks": [HEAD, {"w": WEIGHTS["bias"]}], "depth": 3},
    "head": HEAD,
    "scale": torch.ones(1),
}
FLAT = {
    "encoder.conv.weight": WEIGHTS["weight"], "encoder.conv.bias": WEIGHTS["bias"],
    "encoder.blocks.0.weight": HEAD["weight"], "encoder.blocks.0.bias": HEAD["bias"],
    "encoder.blocks.1.w": WEIGHTS["bias"], "head.weight": HEAD["weight"], "head.bias": HEAD["bias"],
    "scale": PARTS["scale"],
}  # fmt: skip


@pytest.mark.parametrize("key", [None, "model"])
def test_nested_dicts_of_one_model(wconv: Callable[..., Any], tmp_path: Path, key: str | None) -> None:
    log = {"optimizer": optimizer_state(), "log": [(step, 0.5) for step in range(9)], "epoch": 3}
    path = saved(tmp_path, {**PARTS, **log} if key is None else {"model": PARTS, "ema": {"x": WEIGHTS}, **log})
    assert "or take all of them in one with --flatten" in wconv("to-safetensors", path, exit_code=2).stderr
    options = ("--flatten",) if key is None else ("--key", key, "--flatten")
    said = wconv("to-safetensors", path, *options).stdout
    for word in ("optimizer", "log", "epoch", "depth"):
        assert word in said
    assert ("and not ema.x" in said) == (key is not None)
    kept = load_file(tmp_path / "last.safetensors")
    assert described_by_safetensors(kept).keys() == FLAT.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in FLAT.items())
    wconv("verify", path, tmp_path / "last.safetensors", *options)


def test_what_is_said_of_all_in_one(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="in one with --key model --flatten"):
        open_checkpoint(saved(tmp_path, {"model": {"a": WEIGHTS, "b": OTHER}, "epoch": 1}))
    with pytest.raises(BadRequest, match=r"Choose one with --key\.$"):
        open_checkpoint(saved(tmp_path, {"model": WEIGHTS, "ema": OTHER}))


def test_flat_names_are_those_of_torch(tmp_path: Path) -> None:
    from torch.distributed.checkpoint._nested_dict import flatten_state_dict

    names, _ = flatten_state_dict(PARTS)
    opened = open_checkpoint(saved(tmp_path, PARTS), Reading(flatten=True))
    assert [one.name for one in opened.tensors] == [name for name in names if isinstance(names[name], torch.Tensor)]


def test_a_key_with_dots_and_what_is_below_it(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a.b": {"c": {"d": WEIGHTS}}, "a": {"b": 1}})
    opened = open_checkpoint(path, Reading(key="a.b.c", flatten=True))
    assert [one.name for one in opened.tensors] == ["d.weight", "d.bias"]
    with pytest.raises(BadRequest, match=r"no dict at 'a\.x'.*a\.b\.c\.d"):
        open_checkpoint(path, Reading(key="a.x", flatten=True))


def test_modules_in_flattened_dicts(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    opened = open_checkpoint(saved(tmp_path, {"nets": {"g": layer, "d": {"x": layer}}}), Reading(flatten=True))
    names = ["nets.g.weight", "nets.g.bias", "nets.d.x.weight", "nets.d.x.bias"]
    assert [one.name for one in opened.tensors] == names
    assert "nets.g is a whole torch.nn.modules.linear.Linear" in " ".join(opened.notes)


def holding_itself() -> dict[str, Any]:
    value: dict[str, Any] = {"a": dict(WEIGHTS)}
    value["a"]["again"] = value["a"]
    return value


ODD_NESTS: dict[str, tuple[Any, str]] = {
    "two of one name": ({"a": {"b": torch.ones(1)}, "a.b": torch.ones(2)}, r"two tensors that would be named 'a\.b'"),
    "a part of itself": (holding_itself(), r"a part of itself: 'a\.again'"),
    "an unreadable one": ({"a": {"b": torch.ones(2).to_sparse(), **WEIGHTS}}, r"tensor 'a\.b' is sparse"),
    "an array": ({"a": {"b": np.ones(2)}, **WEIGHTS}, r"tensor 'a\.b' is an array of numpy"),
    "a trainer's alone": ({"optimizer": optimizer_state()}, "holds no tensors there"),
}


@pytest.mark.parametrize(("value", "said"), ODD_NESTS.values(), ids=ODD_NESTS)
def test_what_cannot_be_flattened(tmp_path: Path, value: Any, said: str) -> None:
    with pytest.raises((BadFile, Unsupported), match=said):
        open_checkpoint(saved(tmp_path, value), Reading(flatten=True))


def test_a_bomb_of_dicts_is_no_matter(tmp_path: Path) -> None:
    value: Any = {"w": torch.ones(1)}
    for _ in range(30):
        value = {"a": value, "b": value}
    with pytest.raises(HostileFile, match="more than 200,000 tensors"):
        open_checkpoint(saved(tmp_path, value), Reading(flatten=True))

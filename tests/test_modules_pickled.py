"""Whole modules in a pickle are what ``state_dict()`` gives of them, to the byte and in order: torch is the judge."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.archives import archive, name_of, number, pickled, state_dict, tensor, text
from support.judges import described_by_safetensors, described_by_wconv
from support.training import NAMES, unpack
from torch import nn

from converter.errors import BadFile, HostileFile, Unsupported
from converter.formats.torch.state_dict import Reading
from converter.models.checkpoint import open_checkpoint
from converter.recipes.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore")


class Odd(nn.Module):
    """A bit of all that a module may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.register_module("empty", None)
        self.register_parameter("no_parameter", None)
        self.register_buffer("no_buffer", None)
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.tied = nn.Linear(3, 4)
        self.tied.weight = self.a.weight
        self.listed = nn.ModuleList([nn.Conv2d(1, 2, 3).to(memory_format=torch.channels_last), nn.BatchNorm2d(2)])
        self.named = nn.ModuleDict({"x": nn.LSTM(3, 4, 2), "y": nn.MultiheadAttention(4, 2)})
        self.plain = torch.randn(5)
        self.parameters_listed = nn.ParameterList([nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(3))])
        self.parameters_named = nn.ParameterDict({"k": nn.Parameter(torch.randn(2))})
        self.normed = nn.utils.weight_norm(nn.Linear(2, 2))
        self.same = self.listed[1]
        self.half = nn.Linear(2, 2).half()
        self.sequence = nn.Sequential(OrderedDict(one=nn.Linear(1, 1), two=nn.ReLU()))


class Slotted(nn.Module):
    """One whose state is a dict, and slots."""

    __slots__ = ("beside",)

    def __init__(self) -> None:
        super().__init__()
        self.add_module("inner", nn.Linear(2, 2))
        self.beside = 3


class Extra(nn.Module):
    """One that stores more than tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))

    def get_extra_state(self) -> dict[str, int]:
        return {"n": 1}


def saved(folder: Path, value: Any, **how: Any) -> Path:
    path = folder / "best.pt"
    torch.save(value, path, **how)
    return path


def judged(module: nn.Module) -> Any:
    tensors = {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    return described_by_safetensors(tensors)


@pytest.fixture(scope="module")
def odd() -> Odd:
    torch.manual_seed(0)
    return Odd()


HOWS = {
    "zip": {}, "protocol 4": {"pickle_protocol": 4}, "stream": {"_use_new_zipfile_serialization": False},
    "stream, protocol 4": {"_use_new_zipfile_serialization": False, "pickle_protocol": 4},
}  # fmt: skip


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_names_order_and_bytes(tmp_path: Path, odd: Odd, how: dict[str, Any]) -> None:
    found = described_by_wconv(saved(tmp_path, odd, **how))
    assert found == judged(odd)
    assert list(found) == list(odd.state_dict())
    assert "passing" not in found
    assert "plain" not in found


MODULES: dict[str, Callable[[], nn.Module]] = {
    "DataParallel": lambda: nn.DataParallel(nn.Linear(2, 3)),
    "an averaged one": lambda: torch.optim.swa_utils.AveragedModel(nn.Linear(2, 3)),
    "slots": Slotted,
    "more than tensors": Extra,
    "spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(2, 3)),
    "a quantizer's observer": lambda: torch.ao.quantization.FakeQuantize(),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_kinds_of_modules(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    module = make()
    path = saved(tmp_path, module)
    opened = open_checkpoint(path, Reading(strip_code=True))
    assert [one.name for one in opened.tensors] == list(judged(module))


def test_it_is_named_and_its_class_never_imported(wconv: Callable[..., Any], tmp_path: Path, odd: Odd) -> None:
    path = saved(tmp_path, {"model": odd, "ema": None, "epoch": 3, "optimizer": {"state": {0: torch.ones(3)}}})
    said = wconv("to-safetensors", path).stdout
    assert f"model is a whole {Odd.__module__}.Odd: taken as its state_dict() would give it" in said
    assert "its class was never imported" in said
    assert "left out: ema, epoch, optimizer (12 bytes)" in said
    assert "torch.nn.modules" not in said
    assert load_file(tmp_path / "best.safetensors").keys() == odd.state_dict().keys()
    shown = wconv("inspect", path).stdout
    assert "tied: tied.weight is a.weight" in shown
    assert f"of the classes: {Odd.__module__}.Odd, torch.nn.modules.linear.Linear" in shown
    assert wconv("doctor", tmp_path, exit_code=None).exit_code in (0, 1)


def test_one_of_several(wconv: Callable[..., Any], tmp_path: Path, odd: Odd) -> None:
    other = nn.Linear(2, 2)
    path = saved(tmp_path, {"nets": [odd, other], "criterion": nn.CrossEntropyLoss(torch.ones(3))})
    failed = wconv("to-safetensors", path, exit_code=2).stderr
    assert "nets.0 (39 tensors" in failed
    assert "nets.1 (2 tensors" in failed
    said = wconv("to-safetensors", path, "--key", "nets.1").stdout
    assert "only nets.1" in said
    assert load_file(tmp_path / "best.safetensors").keys() == {"weight", "bias"}


def test_what_cannot_be_read_is_named(wconv: Callable[..., Any], tmp_path: Path) -> None:
    from torch.ao.nn import quantized

    plain = nn.Linear(2, 2)
    path = saved(tmp_path, nn.Sequential(plain, quantized.Linear(3, 3), quantized.Conv2d(1, 2, 3)))
    failed = wconv("to-safetensors", path, exit_code=4).stderr
    assert "tensor '1._packed_params._packed_params' is a ScriptObject" in failed
    said = wconv("to-safetensors", path, "--skip-unreadable").stdout
    assert "2 (is of the class torch.ao.nn.quantized.modules.conv.Conv2d, which keeps its weights" in said
    assert load_file(tmp_path / "best.safetensors").keys() == {"0.weight", "0.bias"}
    plain.register_buffer("odd", torch.ones(2, 2).to_sparse())
    assert "tensor 'odd' is sparse" in wconv("to-safetensors", saved(tmp_path, plain), exit_code=4).stderr


def test_quantized_ones_of_bitsandbytes(wconv: Callable[..., Any], tmp_path: Path) -> None:
    """Each pickles its scales as an attribute of a plain parameter: the numbers alone would be wrong weights."""
    import bitsandbytes as bnb

    layers = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu"), bnb.nn.Linear4bit(64, 32).to("cpu")
    path = saved(tmp_path, nn.Sequential(*layers, bnb.nn.StableEmbedding(4, 4)))
    failed = wconv("to-safetensors", path, exit_code=4).stderr
    assert "tensor '0' is of the class bitsandbytes.nn.modules.Linear8bitLt, which keeps its weights" in failed
    wconv("to-safetensors", path, "--skip-unreadable")
    assert load_file(tmp_path / "best.safetensors").keys() == {"2.weight", "2.norm.weight", "2.norm.bias"}
    for layer in layers:
        failed = wconv("to-safetensors", saved(tmp_path, {"model": layer}), "-o", tmp_path / "x", exit_code=4).stderr
        assert f"model (an object of the class bitsandbytes.nn.modules.{type(layer).__name__})" in failed


@pytest.mark.parametrize("module", [nn.ReLU(), {"model": nn.ReLU(), "epoch": 1}], ids=["alone", "in a dict"])
def test_one_without_tensors(tmp_path: Path, module: Any) -> None:
    with pytest.raises(Unsupported, match="holds no tensors"):
        open_checkpoint(saved(tmp_path, module))


def test_an_object_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"an object of the class .*Namespace, not a state dict.*of the model in it"):
        open_checkpoint(saved(tmp_path, argparse.Namespace(model=1)))


# By hand, what torch never writes.

NEW = name_of("some.code", "Net") + b")\x81"


def module(*modules: tuple[str, bytes], **more: bytes) -> bytes:
    """Push a module of others."""
    content = {"_parameters": b"}", "_buffers": b"}", "_modules": state_dict(*modules), **more}
    return NEW + state_dict(*content.items()) + b"b"


def opened(folder: Path, value: bytes) -> Any:
    path = folder / "m.pt"
    path.write_bytes(archive(pickled(value)))
    return open_checkpoint(path)


def test_one_by_hand(tmp_path: Path) -> None:
    found = opened(tmp_path, module(("a", module(_parameters=state_dict(("w", tensor()), ("none", b"N"))))))
    assert [one.name for one in found.tensors] == ["a.w"]


def test_before_torch_1_6_there_were_no_passing_buffers(tmp_path: Path) -> None:
    found = opened(tmp_path, module(_buffers=state_dict(("b", tensor()))))
    assert [one.name for one in found.tensors] == ["b"]


WRONG = {
    "a child that is none": (module(("a", number(3))), "tensor 'a' stands in the place of a module and is none"),
    "a child of another class": (module(("a", NEW)), "tensor 'a' is of the class some.code.Net, which keeps"),
    "a parameter that is none": (module(_parameters=state_dict(("w", number(3)))), "tensor 'w' is a int, and no t"),
    "a parameter that is a module": (module(_parameters=state_dict(("w", module()))), "tensor 'w' is a whole some."),
    "a name that is none": (module(_parameters=b"}(" + number(3) + tensor() + b"u"), "whose name is no text (3)"),
    "two of one name": (module(_parameters=state_dict(("w", tensor())), _buffers=state_dict(("w", tensor()))),
                        "two tensors named 'w'"),
    "buffers in no dict": (module(_buffers=b"]", _parameters=state_dict(("w", tensor()))), "an object of the class"),
}  # fmt: skip


@pytest.mark.parametrize(("value", "said"), WRONG.values(), ids=WRONG)
def test_what_a_module_cannot_hold(tmp_path: Path, value: bytes, said: str) -> None:
    with pytest.raises((BadFile, Unsupported)) as error:
        opened(tmp_path, value)
    assert said in str(error.value)


def test_one_that_holds_its_parent(tmp_path: Path) -> None:
    inner = (
        NEW + state_dict(("_parameters", b"}"), ("_buffers", b"}"), ("_modules", state_dict(("up", b"h\x01")))) + b"b"
    )
    content = state_dict(("_parameters", b"}"), ("_buffers", b"}"), ("_modules", state_dict(("down", inner))))
    with pytest.raises(BadFile, match=r"a part of itself: 'down\.up'"):
        opened(tmp_path, NEW + b"q\x01" + content + b"b")
    parent = nn.Linear(2, 2)
    parent.child = nn.Linear(2, 2)
    parent.child.seen = [parent]  # as an attribute alone it is no matter
    assert list(described_by_wconv(saved(tmp_path, parent))) == list(parent.state_dict())


def nested(depth: int, *more: tuple[str, bytes], key: bytes = text("a")) -> bytes:
    """Push modules in modules, each of them with more in it."""
    value = module(_parameters=state_dict(("w", tensor())))
    for at in range(depth):
        others = b"".join(text(name) + inner for name, inner in more)
        value = module(_modules=b"}(" + key + value + b"q" + bytes([at]) + others.replace(b"?", bytes([at])) + b"u")
    return value


LONG = "a" * 2_000_000
BOMBS = {
    "deep": (nested(120), "nested more than 100 deep"),
    "each twice": (nested(40, ("b", b"h?")), "than any model has"),
    "long names": (text(LONG) + b"r\x00\x01\x00\x000" + nested(99, key=b"j\x00\x01\x00\x00"), "than any model has"),
}


@pytest.mark.parametrize(("value", "said"), BOMBS.values(), ids=BOMBS)
def test_what_is_nested_again_and_again(tmp_path: Path, value: bytes, said: str) -> None:
    with pytest.raises(HostileFile, match=said):
        opened(tmp_path, value)


SAMPLES = {
    **{name: (name, Reading()) for name in NAMES if name.startswith("modules-")},
    "nested-lightning": ("nested-lightning", Reading()),
    "nested-nanogpt": ("nested-nanogpt", Reading()),
    "nested-flax": ("nested-flax", Reading(flatten=True)),
    "nested-megatron": ("nested-megatron", Reading(key="model", flatten=True)),
}


@pytest.mark.parametrize(("name", "reading"), SAMPLES.values(), ids=SAMPLES)
def test_samples_of_real_libraries(tmp_path: Path, name: str, reading: Reading) -> None:
    """ultralytics, transformers and torch wrote them; the judge has the whole tree, its keys joined by dots."""
    folder, judge, order = unpack(name, tmp_path)
    (path,) = (place for place in folder.rglob("*") if place.is_file())
    opened = open_checkpoint(path, reading)
    names = [one.name for one in opened.tensors]
    prefix = next(one.removesuffix(names[0]) for one in order if one.endswith(names[0]))
    assert [f"{prefix}{name}" for name in names] == [one for one in order if one.startswith(prefix)]
    save_file({name: judge[f"{prefix}{name}"] for name in names}, tmp_path / "judge.safetensors")
    assert verify(path, tmp_path / "judge.safetensors", key=reading.key, flatten=reading.flatten).is_equal
    with_code = any("its class was never imported" in note for note in opened.notes)
    assert with_code == name.startswith("modules-")

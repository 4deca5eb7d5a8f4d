"""Samples of pickled whole modules, by torch.save of the object itself.

The judge is ``state_dict()`` of the same object. Where the file holds more than the module, the names begin with the
key that it stands under.
"""

from __future__ import annotations

import collections
import importlib
import importlib.metadata
import os
import sys
import tempfile
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from samples_common import judge, start
from torch import nn
from transformers import BertConfig, BertModel

TORCHVISION = "0.28.0"  # what ultralytics wants to see beside this torch; nothing of it is called


class Odd(nn.Module):
    """Everything that a module can hold: absent parts, ties, containers, buffers of both sorts, other layouts."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 4)
        self.nothing = None
        self.register_module("absent", None)
        self.register_parameter("no_parameter", None)
        self.register_buffer("no_buffer", None)
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("dropped", torch.ones(2), persistent=False)
        self.tied = nn.Linear(3, 4)
        self.tied.weight = self.line.weight
        last = nn.Conv2d(3, 2, 3).to(memory_format=torch.channels_last)
        self.listed = nn.ModuleList([last, nn.BatchNorm2d(2)])
        self.named = nn.ModuleDict({"rnn": nn.LSTM(3, 4, 2), "attention": nn.MultiheadAttention(4, 2)})
        self.plain = torch.randn(5)
        self.parameters_list = nn.ParameterList([nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(3))])
        self.parameters_dict = nn.ParameterDict({"key": nn.Parameter(torch.randn(2))})
        self.normed = nn.utils.weight_norm(nn.Linear(2, 2))
        self.again = self.listed[1]
        self.float16 = nn.Linear(2, 2).half()
        self.act = nn.GELU()
        self.ordered = nn.Sequential(collections.OrderedDict(one=nn.Linear(1, 1), two=nn.ReLU()))
        self.scalar = nn.Parameter(torch.tensor(2.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        view = torch.randn(4, 5)
        self.register_buffer("view", view[1:3, ::2])
        self.register_buffer("turned", view.t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Extra(nn.Module):
    """A module with a state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def get_extra_state(self) -> dict[str, int]:
        return {"n": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def save(name: str, content: Any, reference: Any, **options: Any) -> None:
    """Write one file and what its module, or modules by key, give."""
    checkpoint = start(f"modules-{name}")
    torch.save(content, checkpoint / "model.pt", **options)
    judge(checkpoint, reference)


def torch_modules() -> None:
    torch.manual_seed(0)
    odd = Odd()
    state = odd.state_dict()
    save("odd", odd, state)
    # The old stream holds the source of each class with its path: one that is the same everywhere.
    source = mock.Mock(return_value=(["class Odd(nn.Module): ...\n"], 1, "models.py"))
    with mock.patch("torch.serialization.get_source_lines_and_file", source):
        save("odd-legacy", odd, state, _use_new_zipfile_serialization=False)
    save("odd-protocol-4", odd, state, pickle_protocol=4)
    save("data-parallel", nn.DataParallel(odd), nn.DataParallel(odd).state_dict())
    save("extra-state", Extra(), Extra().state_dict())
    optimizer = torch.optim.SGD(odd.parameters(), lr=0.1, momentum=0.9)
    save("wrapped", {"model": odd, "epoch": 3, "optimizer": optimizer.state_dict()}, {"model": state})
    save("bert", *with_state(BertModel(bert())))


def bert() -> BertConfig:
    return BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=20,
        max_position_embeddings=16,
    )


def with_state(module: nn.Module) -> tuple[nn.Module, Any]:
    return module, module.state_dict()


def yolo_tasks() -> Any:
    """Import ultralytics' models without torchvision, of which there is none for this torch."""
    stub = ModuleType("torchvision")
    stub.__version__ = TORCHVISION  # type: ignore[attr-defined]
    sys.modules["torchvision"] = stub
    known = importlib.metadata.version
    os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp()
    with mock.patch("importlib.metadata.version", lambda name: TORCHVISION if name == "torchvision" else known(name)):
        return importlib.import_module("ultralytics.nn.tasks")


def small_yolo() -> Any:
    """Build YOLOv8n from its own description, far narrower and with one class."""
    tasks = yolo_tasks()
    description = tasks.yaml_model_load("yolov8n.yaml")
    description.update(scales={"n": [0.33, 0.02, 1024]}, nc=1)
    model = tasks.DetectionModel(description, verbose=False)
    with torch.no_grad():
        for start_at, value in enumerate(model.parameters()):
            # The head is wide whatever the description says: numbers that deflate well, and differ from layer to layer.
            value.copy_(((torch.arange(value.numel()) * 7 + start_at) % 61 / 64).reshape(value.shape))
    return model


def yolo() -> None:
    """Write the files that ultralytics leaves: best.pt with the model, last.pt with its average alone."""
    model = small_yolo().half()
    state = model.state_dict()
    about = {"train_args": {"task": "detect"}, "date": "2026-01-01T00:00:00", "version": "8.4.190"}
    best = {"epoch": -1, "best_fitness": None, "model": model, "ema": None, "updates": None, "optimizer": None, **about}
    save("yolo", best, {"model": state})
    moments = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.01, "params": [0]}]}
    last = {"epoch": 5, "best_fitness": 0.5, "model": None, "ema": model, "updates": 7, "optimizer": moments, **about}
    save("yolo-ema", last, {"ema": state})


def make() -> None:
    """Write all samples of this family into the current folder."""
    torch_modules()
    yolo()

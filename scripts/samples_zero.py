"""Samples of DeepSpeed's ZeRO, written by its engine on CPUs.

The judge is DeepSpeed's ``get_fp32_state_dict_from_zero_checkpoint``. What that leaves out although the model has it,
such as frozen parameters at stage 1, is in ``left_out.safetensors``, as the engine's module holds it. It is held
against the float32 weights of the engine; where DeepSpeed refuses its own folder, those are the judge.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from samples_common import judge, same, spawn, start, write_state
from torch import nn

TAG = "global_step1"
LIVE = "live.pt"  # the engine's own float32 weights, until the judge has been held against them


class Case(NamedTuple):
    """How a sample is trained: its stage, dtype, number of groups of parameters and of ranks."""

    stage: int
    dtype: str
    groups: int
    world: int
    fp32_gradients: bool = False  # with bf16 and stage 1: DeepSpeed's BF16_Optimizer, which its own reader refuses

    @property
    def name(self) -> str:
        if self.fp32_gradients:
            return "zero-1-bf16-optimizer"
        return f"zero-{self.stage}-{self.dtype}-{self.groups}-groups-{self.world}-ranks"


CASES = (
    Case(0, "bf16", 1, 2),
    Case(1, "bf16", 1, 3),
    Case(1, "fp32", 2, 2),
    Case(2, "bf16", 2, 3),
    Case(2, "fp32", 1, 2),
    Case(3, "bf16", 1, 2),
    Case(3, "bf16", 2, 3),
    Case(3, "fp32", 2, 2),
    Case(1, "bf16", 2, 3, fp32_gradients=True),
)
UNIVERSAL = (CASES[3], CASES[6])


class Net(nn.Module):
    """Odd sizes, a tie, frozen parameters and three sorts of buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 5)
        self.line = nn.Linear(5, 5)
        self.frozen = nn.Linear(5, 3)
        self.odd = nn.Parameter(torch.randn(11))
        self.scalar = nn.Parameter(torch.tensor([0.5]))
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.emb.weight
        self.register_buffer("floats", torch.arange(4.0))
        self.register_buffer("ids", torch.arange(3))
        self.register_buffer("not_kept", torch.ones(2), persistent=False)
        for parameter in self.frozen.parameters():
            parameter.requires_grad = False

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.line(self.emb(ids)))
        return self.head(hidden).sum() + self.frozen(hidden).sum() + self.odd.sum() * self.scalar


def deepspeed() -> Any:
    """Import DeepSpeed for CPUs; it would compile an operator for shared memory, which gloo does without."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    library = importlib.import_module("deepspeed")
    vars(importlib.import_module("deepspeed.comm.torch"))["build_shm_op"] = lambda: None
    return library


def train(case: Case) -> None:
    """Train for one step and let the engine save."""
    torch.manual_seed(0)
    library = deepspeed()
    model = Net()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: Any = trained
    if case.groups > 1:
        groups = [{"params": trained[:2]}, {"params": trained[2:], "weight_decay": 0.0}]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": case.stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if case.dtype != "fp32":
        config[case.dtype] = {"enabled": True}
    if case.fp32_gradients:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    library.init_distributed(dist_backend="gloo")
    engine, *_ = library.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config)
    loss = engine(torch.arange(7))
    engine.backward(loss)
    engine.step()
    engine.save_checkpoint(f"{case.name}/checkpoint", tag=TAG)
    copies = importlib.import_module("deepspeed.utils").safe_get_full_fp32_param
    state = {name: copies(value) for name, value in engine.module.named_parameters() if value.requires_grad}
    if dist.get_rank() == 0 and case.stage:
        torch.save({name: value.detach().clone() for name, value in state.items()}, f"{case.name}/{LIVE}")
    dist.barrier()


def on_ranks(cases: tuple[Case, ...]) -> None:
    for case in cases:
        train(case)


def without_code(checkpoint: Path) -> None:
    """Empty the scripts that DeepSpeed copies into every folder: their names count, not their lines."""
    for script in checkpoint.rglob("zero_to_*.py"):
        script.write_text("# DeepSpeed's script, left out here\n")


def zero_reader() -> Any:
    """Give DeepSpeed's own reader of a ZeRO folder."""
    deepspeed()
    return importlib.import_module("deepspeed.utils.zero_to_fp32").get_fp32_state_dict_from_zero_checkpoint


def judge_zero(checkpoint: Path, case: Case) -> None:
    ranks = sorted((checkpoint / TAG).glob("*mp_rank_00_model_states.pt"))
    module = torch.load(ranks[0], weights_only=False)["module"]
    if case.stage == 0:
        judge(checkpoint, module)
        return
    live_path = checkpoint.parent / LIVE
    live = torch.load(live_path)
    live_path.unlink()
    if case.fp32_gradients:
        state = live
    else:
        state = dict(zero_reader()(str(checkpoint), tag=TAG))
        same(live, {name: state[name] for name in live})
    judge(checkpoint, state)
    if left_out := {name: tensor for name, tensor in module.items() if name not in state}:
        write_state(checkpoint.parent / "left_out.safetensors", left_out)


def universal(case: Case) -> None:
    """Write the same as a universal checkpoint, by DeepSpeed's own converter."""
    deepspeed()
    converter = importlib.import_module("deepspeed.checkpoint.ds_to_universal")
    source = Path(case.name)
    checkpoint = start(f"zero-universal-{case.stage}")
    options = argparse.Namespace(
        input_folder=str(source / "checkpoint" / TAG),
        output_folder=str(checkpoint / f"{TAG}_universal"),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    converter.main(options)
    for name in ("judge.safetensors", "order.json", "left_out.safetensors"):
        if (source / name).exists():
            shutil.copy(source / name, checkpoint.parent / name)


def make() -> None:
    """Write all samples of this family into the current folder."""
    for case in CASES:
        start(case.name)
    for world in (2, 3):
        spawn(world, on_ranks, tuple(case for case in CASES if case.world == world))
    for case in CASES:
        checkpoint = Path(case.name) / "checkpoint"
        without_code(checkpoint)
        judge_zero(checkpoint, case)
    for case in UNIVERSAL:
        universal(case)

"""Made-up checkpoints as DeepSpeed lays them out: one dict for each file, to be changed before they are written."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

VERSION = "0.19.8"
State = dict[str, torch.Tensor]


@dataclass
class Zero:
    """What the ranks save, model states, at stage 3 each its own, and optimizer's; ``expected`` is what is read."""

    stage: int
    models: list[dict[str, Any]]
    optimizers: list[dict[str, Any]]
    expected: State = field(default_factory=dict)

    def write(self, folder: Path, prefix: str = "bf16_", ending: str = "_optim_states.pt") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for rank, state in enumerate(self.models):
            name = f"zero_pp_rank_{rank}_mp_rank_00" if self.stage == 3 else "mp_rank_00"
            torch.save(state, folder / f"{name}_model_states.pt")
        for rank, state in enumerate(self.optimizers):
            torch.save(state, folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00{ending}")
        return folder


def make_zero(
    stage: int,
    world: int = 2,
    groups: Sequence[Mapping[str, Sequence[int]]] = ({"a.weight": (3, 5), "a.bias": (5,)}, {"s": (), "b": (11,)}),
    frozen: Mapping[str, Sequence[int]] | None = None,
    tied: Mapping[str, str] | None = None,
    paddings: Sequence[Sequence[int]] | None = None,
    sub_group: int = 0,
) -> Zero:
    """Make a checkpoint of random master copies, whose module is their bfloat16.

    ``paddings`` follow the parameters of stages 1 and 2; ``sub_group`` cuts the runs of stage 3 after so many elements.
    """
    generator = torch.Generator().manual_seed(stage)

    def draw(shapes: Mapping[str, Sequence[int]]) -> State:
        return {name: torch.randn(tuple(shape), generator=generator) for name, shape in shapes.items()}

    masters = [draw(group) for group in groups]
    fixed = {name: tensor.bfloat16() for name, tensor in draw(frozen or {}).items()}
    buffers: State = {"steps": torch.arange(3)}
    expected = {**buffers, **fixed, **{name: tensor for group in masters for name, tensor in group.items()}}
    module = {name: tensor.bfloat16() for name, tensor in expected.items() if name != "steps"}
    for name, kept in (tied or {}).items():
        expected[name], module[name] = expected[kept], module[kept]
    if stage == 3:
        empty = {name: torch.zeros(0).bfloat16() for name in module}
        module = {name: empty[(tied or {}).get(name, name)] for name in module}
    shapes = [OrderedDict((name, tensor.shape) for name, tensor in group.items()) for group in masters]

    def part(tensor: torch.Tensor, rank: int) -> torch.Tensor:
        each = math.ceil(tensor.numel() / world)
        piece = tensor.reshape(-1)[each * rank : each * (rank + 1)]
        return torch.cat([piece, piece.new_zeros(each - piece.numel())])

    def model_of(rank: int) -> dict[str, Any]:
        fragments = {name: part(tensor, rank) if stage == 3 else tensor for name, tensor in fixed.items()}
        return {
            "module": OrderedDict({**module, **buffers}),
            "buffer_names": ["steps"],
            "optimizer": None,
            "param_shapes": shapes,
            "frozen_param_shapes": OrderedDict((name, tensor.shape) for name, tensor in fixed.items()),
            "frozen_param_fragments": OrderedDict(fragments),
            "shared_params": dict(tied or {}) if rank == 0 else {},
            "lr_scheduler": {"last_epoch": 5},
            "global_steps": 5,
            "dp_world_size": world,
            "mp_world_size": 1,
            "ds_version": VERSION,
        }

    def runs_of(rank: int) -> list[torch.Tensor]:
        if stage == 3:
            runs = [torch.cat([part(tensor, rank) for tensor in group.values()]) for group in masters]
            return [piece.clone() for run in runs for piece in (run.split(sub_group) if sub_group else [run])]
        cut = []
        for index, group in enumerate(masters):
            behind = paddings[index] if paddings else [0] * len(group)
            spaced = [one for tensor, gap in zip(group.values(), behind, strict=True)
                      for one in (tensor.reshape(-1), torch.ones(gap))]  # fmt: skip
            flat = torch.cat(spaced)
            each = 2 * math.ceil(flat.numel() / (2 * world))
            run = flat[each * rank : each * (rank + 1)].clone()
            # All but the last rank's have their padding (``_get_groups_without_padding`` of ``stage_1_and_2.py``).
            cut.append(run if rank == world - 1 else torch.cat([run, torch.zeros(each - run.numel())]))
        return cut

    def optimizer_of(rank: int) -> dict[str, Any]:
        runs = runs_of(rank)
        base = {"state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.zeros(1000)}}, "param_groups": [{"lr": 0.1}]}
        told: dict[str, Any] = {"zero_stage": stage, "loss_scaler": None}
        if stage == 3:
            told |= {"partition_count": world, "optimizer_state_dict": base, "fp32_flat_groups": runs}
        else:
            told |= {"partition_count": [world] * len(groups), "base_optimizer_state": base}
            told |= {"single_partition_of_fp32_groups": runs}
            told |= {"param_alignment_paddings": [list(one) for one in paddings]} if paddings else {}
        return {"optimizer_state_dict": told, "ds_config": {}, "ds_version": VERSION}

    models = [model_of(rank) for rank in range(world if stage == 3 else 1)]
    return Zero(stage, models, [optimizer_of(rank) for rank in range(world)], expected)

"""Parts of checkpoints that distributed training wrote are refused by name, by every command, and never converted."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.tiny import make_state, save, snapshot, write_json

from converter.errors import TrainingPiece
from converter.models.checkpoint import open_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:.*TypedStorage")

EMPTY = {"l1.weight": torch.zeros(0), "l1.bias": torch.zeros(0), "l2.weight": torch.zeros(0).bfloat16()}
SHAPES = [OrderedDict({name: torch.Size([4, 4]) for name in EMPTY})]


def zero_model_states(stage: int = 3, **more: Any) -> dict[str, Any]:
    """Give what DeepSpeed's engine puts into a model_states file (``_get_zero_ckpt_prefix``, ``_save_checkpoint``)."""
    module = EMPTY if stage == 3 else {name: torch.ones(4, 4) for name in EMPTY}
    module = {**module, "buf": torch.arange(4.0)}
    return {"module": module, "buffer_names": ["buf"], "optimizer": None, "param_shapes": SHAPES, "shared_params": {},
            "frozen_param_shapes": None, "frozen_param_fragments": None, "ds_version": "0.19.8", "mp_world_size": 1,
            "dp_world_size": 2, **more}  # fmt: skip


OPTIM = {"optimizer_state_dict": {"zero_stage": 3, "partition_count": 2, "fp32_flat_groups": [torch.ones(16)]},
         "ds_version": "0.19.8"}  # fmt: skip
# The file, what is in it, and a part of what names its reader; of those after a bar, files that lie beside it.
FILES = {
    "ZeRO-3": ("zero_pp_rank_0_mp_rank_00_model_states.pt", zero_model_states(), "of all ranks"),
    "ZeRO-3, renamed": ("model.pt", zero_model_states(), "of all ranks"),
    "ZeRO-3, with frozen ones": (
        "model.pt", zero_model_states(frozen_param_fragments={"f.weight": torch.ones(2)}), "of all ranks"),
    "ZeRO, optimizer": ("bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", OPTIM, "of all ranks"),
    "ZeRO, optimizer, renamed": ("a.pt", OPTIM, "of all ranks"),
    "DeepSpeed, tensor-parallel": ("mp_rank_01_model_states.pt", zero_model_states(1), "DeepSpeed"),
    "DeepSpeed, first of two": ("mp_rank_00_model_states.pt|mp_rank_01_model_states.pt", zero_model_states(1), "DeepS"),
    "DeepSpeed, tensor-parallel, renamed": ("a.pt", zero_model_states(1, mp_world_size=2), "DeepSpeed"),
    "DeepSpeed, a layer": ("layer_03-model_00-model_states.pt", make_state("ab"), "DeepSpeed"),
    "a model saved under ZeRO-3": ("pytorch_model.bin", {**EMPTY, "norm.weight": torch.ones(4)}, "of all ranks"),
    "the same in safetensors": ("model.safetensors", {**EMPTY, "norm.weight": torch.ones(4)}, "of all ranks"),
    "accelerate, by another name": ("model_fsdp_rank_0.pt", make_state("ab"), "FULL_STATE_DICT"),
    "Megatron": ("mp_rank_01/model_optim_rng.pt|mp_rank_00/x.pt", {"model": make_state("ab")}, "Megatron"),
    "Megatron, pipeline": ("mp_rank_00_000/model_optim_rng.pt|mp_rank_00_001/x.pt", make_state(), "Megatron"),
    "Llama of Meta": ("consolidated.00.pth|consolidated.01.pth", make_state("ab"), "convert_llama_weights_to_hf.py"),
    "vLLM": ("model-rank-0-part-0.safetensors|model-rank-1-part-0.safetensors", make_state("ab"), "vLLM"),
    "NeMo": ("m.nemo", make_state("ab"), "NeMo"),
}  # fmt: skip
# What looks like a piece and is a whole.
WHOLES = {
    "ZeRO-2": ("mp_rank_00_model_states.pt", zero_model_states(2), ("--key", "module")),
    "the only rank of verl": ("model_world_size_1_rank_0.pt", make_state("ab"), ()),
    "FULL_STATE_DICT": ("pytorch_model_fsdp.bin", make_state("ab"), ()),
    "the only part of Meta's": ("consolidated.00.pth", make_state("ab"), ()),
    "the only rank of Megatron": ("mp_rank_00/model_optim_rng.pt", {"model": make_state("ab")}, ()),
    "some empty tensors": ("model.bin", {"a.weight": torch.zeros(0), "b.bias": torch.zeros(0), **make_state("c")}, ()),
}


def made(folder: Path, spelled: str, content: Any) -> Path:
    names = spelled.split("|")
    for name in reversed(names):
        save(content, folder / name)
    return folder / names[0]


@pytest.mark.parametrize(("spelled", "content", "said"), FILES.values(), ids=FILES)
def test_a_piece_is_refused_and_its_reader_named(
    wconv: Callable[..., Any], tmp_path: Path, spelled: Any, content: Any, said: Any
) -> None:
    path = made(tmp_path / "in", spelled, content)
    before = snapshot(tmp_path)
    for command in (("to-safetensors", path), ("inspect", path), ("recast", path, "--dtype", "bf16")):
        done = wconv(*command, exit_code=4)
        assert said in done.stderr
        assert "etch" not in done.stderr
        assert len(done.stderr.splitlines()) == 1
    if path.suffix != ".nemo":
        assert said in wconv("to-safetensors", path.parent, "-o", tmp_path / "out", exit_code=4).stderr
        found = json.loads(wconv("doctor", path.parent, "--json", exit_code=1).stdout)["findings"]
        assert {one["code"] for one in found} == {"training-piece"}
        assert said in found[0]["problem"]
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(("spelled", "content", "options"), WHOLES.values(), ids=WHOLES)
def test_a_whole_is_none(wconv: Callable[..., Any], tmp_path: Path, spelled: Any, content: Any, options: Any) -> None:
    path = made(tmp_path / "in", spelled, content)
    wconv("to-safetensors", path, *options)
    wconv("doctor", path.parent, exit_code=None)


def test_a_folder_of_dcp_that_was_never_finished(wconv: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-5" / "pytorch_model_fsdp_0"
    dcp.save({"model": make_state("ab")}, checkpoint_id=folder, no_dist=True)
    (folder / ".metadata").unlink()
    for source in (folder, folder.parent):
        assert "never finished" in wconv("inspect", source, exit_code=4).stderr
    found = json.loads(wconv("doctor", folder, "--json", exit_code=1).stdout)["findings"]
    assert [one["code"] for one in found] == ["training-piece"]


def test_weights_beside_pieces_in_other_folders_are_read(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(make_state("ab"), tmp_path / "m" / "model.safetensors")
    dcp.save({"model": make_state()}, checkpoint_id=tmp_path / "m" / "pytorch_model_fsdp_0", no_dist=True)
    wconv("recast", tmp_path / "m", "--dtype", "bf16")


def test_a_trainers_folder_with_zero_in_it(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(zero_model_states(), tmp_path / "c" / "global_step5" / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    write_json(tmp_path / "c" / "config.json", {"architectures": ["LlamaForCausalLM"]})
    assert "of all ranks" in wconv("to-safetensors", tmp_path / "c", exit_code=4).stderr


def test_in_python(tmp_path: Path) -> None:
    with pytest.raises(TrainingPiece, match="rank's part"):
        open_checkpoint(save(make_state(), tmp_path / "model_fsdp_rank_3.pt"))

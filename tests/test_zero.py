"""Checkpoints of DeepSpeed's ZeRO are read in their folder, bit for bit as DeepSpeed's own script reads them."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.tiny import assert_same, save, snapshot
from support.training import NAMES, unpack
from support.zero import Zero, make_zero
from test_stores import StoreInMemory

from converter.errors import BadFile, BadRequest, HostileFile, TrainingPiece, Unsupported, WconvError
from converter.formats.torch.state_dict import Reading
from converter.models.checkpoint import Checkpoint, open_checkpoint
from converter.models.inventory import find_weight_sets
from converter.storage import Place
from converter.tensors.base import find_ties
from converter.tensors.reader import RangeReader
from converter.testing import damaged

TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64}
SCRIPT = Path(__file__).parents[1] / ".venv-trainers" / "bin" / "python"
FROZEN = {"f.weight": (4, 3), "f.bias": (5,)}
TIED = {"head.weight": "a.weight"}


def opened(folder: Path | Place, reading: Reading | None = None) -> Checkpoint:
    (weight_set,) = find_weight_sets(folder)
    return open_checkpoint(weight_set, reading or Reading())


def read(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Read all tensors, with their CRC32s."""
    state = {}
    with RangeReader(with_sums=True) as reader:
        for tensor in checkpoint.tensors:
            raw = bytearray(tensor.nbytes)
            tensor.source.read(0, memoryview(raw), reader)
            state[tensor.name] = torch.frombuffer(raw or bytearray(8), dtype=TORCH[tensor.dtype.tag])
            state[tensor.name] = state[tensor.name][: tensor.numel].reshape(tensor.shape)
    return state


# As DeepSpeed wrote it.


@pytest.mark.parametrize("name", [name for name in NAMES if "zero" in name and "-0-" not in name])
def test_real_checkpoints(name: str, tmp_path: Path) -> None:
    folder, judged, order = unpack(name, tmp_path)
    left_out = tmp_path / name / "left_out.safetensors"
    (inner,) = (path for path in folder.iterdir() if path.is_dir())
    checkpoint = opened(inner)
    found = read(checkpoint)
    assert [one for one in found if one in judged] == order
    expected = {**judged, **(load_file(left_out) if left_out.exists() else {})}
    if "head.weight" in expected:  # left out where DeepSpeed's script does not read, and then as the module has it
        expected["head.weight"] = expected["emb.weight"]
    assert_same(found, expected)
    assert checkpoint.format == ("ZeRO, universal" if "universal" in name else "ZeRO")
    assert "float32 master copies" in checkpoint.notes[0]
    assert "left out: " in checkpoint.notes[-1]
    if "head.weight" in found:
        assert find_ties(checkpoint.tensors) == {"head.weight": "emb.weight"}


def test_a_real_folder_is_converted(wconv: Callable[..., Any], tmp_path: Path) -> None:
    folder, judged, _ = unpack("zero-3-bf16-2-groups-3-ranks", tmp_path)
    inner = folder / "global_step1"
    before = snapshot(folder)
    for source in (inner, inner / "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt"):
        wconv("to-safetensors", source, "-o", tmp_path / "out", "--overwrite")
        written = load_file(tmp_path / "out" / "model.safetensors")
        tied = {**written, "head.weight": written["emb.weight"]}
        assert_same(tied, judged)
    wconv("verify", inner, tmp_path / "out")
    wconv("recast", inner, "--dtype", "bf16", "-o", tmp_path / "half")
    assert snapshot(folder) == before
    told = wconv("to-safetensors", inner, "--key", "module", exit_code=2).stderr
    assert "stage 3" in told


def test_the_copies_of_the_module(wconv: Callable[..., Any], tmp_path: Path) -> None:
    folder, _, _ = unpack("zero-1-bf16-1-groups-3-ranks", tmp_path)
    inner = folder / "global_step1"
    told = json.loads(wconv("inspect", inner, "--json").stdout)["weight_sets"][0]
    assert "--key module takes the bfloat16 copies" in str(told)
    wconv("to-safetensors", inner, "--key", "module", "-o", tmp_path / "out")
    module = torch.load(inner / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    assert_same({**load_file(tmp_path / "out" / "model.safetensors"), "head.weight": module["emb.weight"]}, module)


# As it lays them out.

LAYOUTS: dict[str, dict[str, Any]] = {
    "stage 1": {"stage": 1, "frozen": FROZEN, "tied": TIED},
    "stage 2": {"stage": 2, "world": 3, "frozen": FROZEN, "tied": TIED},
    "stage 2, parameters that are padded": {"stage": 2, "world": 3, "paddings": ((3, 0), (7, 2))},
    "stage 2, less than ranks have": {"stage": 2, "world": 8, "groups": ({"a": (3,)},)},
    "stage 3": {"stage": 3, "frozen": FROZEN, "tied": TIED},
    "stage 3, ranks with nothing": {"stage": 3, "world": 4, "groups": ({"a": (5,), "b": (1,)},), "frozen": {"f": (2,)}},
    "stage 3, parts of groups": {"stage": 3, "world": 3, "sub_group": 3},
    "stage 3, one rank": {"stage": 3, "world": 1, "frozen": FROZEN},
    "eleven ranks": {"stage": 3, "world": 11, "groups": ({"a": (50, 3)},), "frozen": FROZEN},
    "eleven ranks, stage 1": {"stage": 1, "world": 11, "groups": ({"a": (50, 3)},)},
    "parameters of no elements": {"stage": 3, "groups": ({"a": (4,), "e": (0, 3), "b": (5,)},), "frozen": {"n": (0,)}},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(tmp_path: Path, layout: Any) -> None:
    made = make_zero(**layout)
    checkpoint = opened(made.write(tmp_path))
    assert [tensor.name for tensor in checkpoint.tensors] == list(made.expected)
    assert_same(read(checkpoint), made.expected)


@pytest.mark.parametrize("stage", [2, 3])
def test_old_ones(tmp_path: Path, stage: int) -> None:
    made = make_zero(stage, groups=({"a.weight": (3, 5), "b": (3,)},), tied=TIED)
    for told in made.models:
        told["param_shapes"] = told["param_shapes"][0]
        for key in ("shared_params", "frozen_param_shapes", "frozen_param_fragments", "ds_version", "global_steps"):
            del told[key]
    for told in made.optimizers:
        del told["ds_version"]
    assert_same(read(opened(made.write(tmp_path, "", "optim_states.pt"))), made.expected)


def test_bf16_optimizer_says_no_stage(tmp_path: Path) -> None:
    made = make_zero(1)
    for told in made.optimizers:
        del told["optimizer_state_dict"]["zero_stage"]
    assert_same(read(opened(made.write(tmp_path, "fp16_"))), made.expected)


def test_what_no_optimizer_has(tmp_path: Path) -> None:
    made = make_zero(1, frozen=FROZEN)
    made.models[0] |= {"frozen_param_shapes": None, "frozen_param_fragments": None, "buffer_names": [], "epoch": 3}
    made.models[0]["module"]["_extra"] = {"x": 1}
    checkpoint = opened(made.write(tmp_path))
    assert_same(read(checkpoint), made.expected)
    notes = " / ".join(checkpoint.notes)
    assert "of no optimizer, so taken as the model itself has it: f.weight, f.bias, steps /" in notes
    assert "no tensors, so left out of the model: _extra" in notes
    assert "optimizer_state_dict (8,008 bytes), lr_scheduler, global_steps, epoch" in notes


# What does not go together.


class OddTensor:
    """Stands for tensors of a library's own class."""


def rank_of(made: Zero, rank: int = 1) -> Any:
    return made.optimizers[rank]["optimizer_state_dict"]


def drop(made: Zero, *keys: str) -> None:
    for key in keys:
        del made.models[0][key]


def put(made: Zero, **more: Any) -> None:
    made.models[0].update(more)


def of_rank(made: Zero, **more: Any) -> None:
    rank_of(made).update(more)


def of_all(made: Zero, **more: Any) -> None:
    for rank in range(len(made.optimizers)):
        rank_of(made, rank).update(more)


GROUP = "single_partition_of_fp32_groups"
RUN = torch.zeros(20)


def runs(made: Zero, groups: list[Any]) -> None:
    of_all(made, **{GROUP: groups})


def pad(made: Zero, paddings: list[list[int]]) -> None:
    of_all(made, param_alignment_paddings=paddings)


SHAPES = [{"a.weight": torch.Size((3, 5)), "a.bias": torch.Size((5,))}, {"s": torch.Size(()), "b": torch.Size((11,))}]
# The stage, what is changed, and what is said of it.
WRONG: dict[str, tuple[int, Callable[[Zero], Any], type[WconvError], str]] = {
    "another stage": (2, lambda z: of_rank(z, zero_stage=1), BadFile, "another ZeRO stage"),
    "no such stage": (2, lambda z: of_all(z, zero_stage=4), BadFile, "stage 4, which there is not"),
    "a stage that is none": (2, lambda z: of_all(z, zero_stage=[2]), BadFile, "not as DeepSpeed writes it"),
    "the stage of others": (2, lambda z: of_all(z, zero_stage=3, fp32_flat_groups=[RUN], partition_count=2), BadFile,
                            "is of ZeRO stage 3, and mp_rank_00_model_states.pt is not"),
    "another version": (3, lambda z: z.optimizers[1].update(ds_version="0.1"), BadFile, "is of DeepSpeed 0.1, and"),
    "another version, module": (3, lambda z: z.models[1].update(ds_version="0.1"), BadFile, "is of DeepSpeed 0.1, and"),
    "another step": (3, lambda z: z.models[1].update(global_steps=4), BadFile, "is of step 4, and"),
    "the optimizer's": (1, lambda z: of_rank(z, base_optimizer_state={"state": {0: {"step": torch.tensor(4.0)}}}),
                        BadFile, "another step than .* (4.0, and there 5.0)"),
    "the same as a number": (1, lambda z: of_rank(z, base_optimizer_state={"param_groups": [{"step": 4}]}), BadFile,
                             "another step than"),
    "more ranks": (3, lambda z: of_all(z, partition_count=8), BadFile, "ranks 2, 3, 4, 5, 6 and 7 of 8 are not there"),
    "a million ranks": (3, lambda z: of_all(z, partition_count=1 << 62), BadFile, "and 4,611,686,018,427,387,894 more"),
    "fewer ranks": (2, lambda z: of_all(z, partition_count=[1, 1]), BadFile, "saved by 1 ranks, and holds bf16_"),
    "no rank": (2, lambda z: of_all(z, partition_count=[]), BadFile, "not as DeepSpeed"),
    "ranks of no number": (2, lambda z: of_all(z, partition_count=-1), BadFile, "not as DeepSpeed"),
    "experts": (2, lambda z: of_all(z, partition_count=[2, 1]), TrainingPiece, "experts"),
    "no groups": (2, lambda z: runs(z, []), BadFile, "not as DeepSpeed"),
    "groups that are no tensors": (2, lambda z: runs(z, [None, "x"]), BadFile, "not"),
    "groups of two axes": (2, lambda z: runs(z, [torch.ones(2, 2)]), BadFile, "not"),
    "groups of numbers": (2, lambda z: runs(z, [torch.arange(9)]), BadFile, "not as"),
    "strided groups": (2, lambda z: runs(z, [torch.ones(90)[::2]]), BadFile, "not as"),
    "one group twice": (2, lambda z: runs(z, [RUN, RUN]), BadFile, "not as DeepSpeed"),
    "fewer groups": (2, lambda z: runs(z, [RUN]), BadFile, "not hold the groups"),
    "a rank of others": (2, lambda z: of_rank(z, **{GROUP: [RUN]}), BadFile, "number of groups"),
    "a rank of more": (3, lambda z: of_rank(z, fp32_flat_groups=[RUN, RUN.clone()]), BadFile, "20 elements of group 0"),
    "another dtype": (3, lambda z: of_rank(z, fp32_flat_groups=[RUN.half(), RUN.half()]), BadFile, "another dtype"),
    "too short": (2, lambda z: runs(z, [RUN[:2].clone(), RUN[:6].clone()]), BadFile,
                  "'a.weight', and the groups of .* end before"),
    "too long": (2, lambda z: runs(z, [RUN.clone(), RUN.clone()]), BadFile,
                 "20 elements of a group, and there are 40"),
    "too short, stage 3": (3, lambda z: of_all(z, fp32_flat_groups=[RUN[:9].clone()]), BadFile, "end before it does"),
    "too long, stage 3": (3, lambda z: of_all(z, fp32_flat_groups=[RUN.clone()]), BadFile,
                          "18 elements of a group, and there are 20"),
    "paddings of others": (2, lambda z: pad(z, [[0], [0]]), BadFile, "not hold the groups"),
    "huge paddings": (2, lambda z: pad(z, [[1 << 62, 0], [0, 0]]), BadFile, "end before"),
    "paddings below 0": (2, lambda z: pad(z, [[-1, 0], [0, 0]]), BadFile, "not as DeepS"),
    "one rank's paddings": (2, lambda z: of_rank(z, param_alignment_paddings=[[0, 0], [0, 0]]), BadFile, "paddings"),
    "no shapes": (2, lambda z: drop(z, "param_shapes"), BadFile, "not as DeepSpeed"),
    "no buffers' names": (2, lambda z: drop(z, "buffer_names"), BadFile, "not as DeepSpeed"),
    "a shape below 0": (2, lambda z: put(z, param_shapes=[{"a.weight": (-3, 5)}, {}]), BadFile, "not as DeepSpeed"),
    "a shape that is none": (2, lambda z: put(z, param_shapes=[{"a.weight": "35"}, {}]), BadFile, "not as DeepSpeed"),
    "a huge shape": (3, lambda z: put(z, param_shapes=[{"a.weight": (1 << 62, 1 << 62)}]), BadFile, "end before"),
    "another shape": (2, lambda z: put(z, param_shapes=[{**SHAPES[0], "a.weight": (5, 3)}, SHAPES[1]]), BadFile,
                      "of shape [3, 5]"),
    "a parameter twice": (3, lambda z: put(z, param_shapes=[SHAPES[0], {"a.weight": (11,), "s": ()}]), BadFile, "tw"),
    "a name that the module lacks": (3, lambda z: z.models[0]["module"].pop("b"), BadFile, "parameter 'b' of"),
    "weights that lie nowhere": (3, lambda z: z.models[0]["module"].update(x=torch.zeros(0)), BadFile, "of 'x' lie"),
    "ties in a circle": (3, lambda z: z.models[0].update(module={**z.models[0]["module"], "x": torch.zeros(0)},
                                                           shared_params={"x": "y", "y": "x"}), BadFile, "of 'x' lie"),
    "a sparse one": (2, lambda z: z.models[0]["module"].update(x=torch.eye(2).to_sparse()), Unsupported, "is sparse"),
    "one of its own class": (3, lambda z: z.models[0]["module"].update(x=OddTensor()), Unsupported, "OddTensor"),
    "a part that is missing": (3, lambda z: z.models[1]["frozen_param_fragments"].pop("f.bias"), BadFile, "lacks its"),
    "a part of another size": (3, lambda z: z.models[1]["frozen_param_fragments"].update({"f.bias": RUN.bfloat16()}),
                               BadFile, "parts are of others"),
    "a frozen one of another shape": (2, lambda z: put(z, frozen_param_shapes={"f.bias": (4,)}), BadFile, "shape [5]"),
    "a pipeline": (2, lambda z: put(z, module=None), TrainingPiece, "pipeline"),
    "a pipeline of whole ones": (2, lambda z: put(z, checkpoint_parallel_dimensions={"pp_degree": 2}),
                                 TrainingPiece, "pipeline"),
    "tensor-parallel": (2, lambda z: put(z, mp_world_size=2), TrainingPiece, "tensor-parallel"),
    "AutoEP": (3, lambda z: put(z, ds_autoep_layers=[{"x": 1}]), TrainingPiece, "AutoEP"),
    "nothing": (2, lambda z: z.models[0].clear(), BadFile, "not as DeepSpeed"),
    "no optimizer's": (2, lambda z: z.optimizers[0].clear(), BadFile, "not as DeepSpeed"),
}  # fmt: skip


@pytest.mark.parametrize(("stage", "change", "error", "said"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_refused(tmp_path: Path, stage: int, change: Any, error: Any, said: str) -> None:
    made = make_zero(stage, frozen=FROZEN)
    change(made)
    with pytest.raises(error) as caught:
        opened(made.write(tmp_path))
    assert type(caught.value) is error
    for part in said.split(".*"):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["zero-1-bf16-1-groups-3-ranks", "zero-3-bf16-2-groups-3-ranks"])
def test_one_rank_s_file_under_the_names_of_two(tmp_path: Path, name: str) -> None:
    folder = next(unpack(name, tmp_path)[0].glob("global_step*"))
    zero, one = sorted(folder.glob("*_optim_states.pt"))[:2]
    one.write_bytes(zero.read_bytes())
    with pytest.raises(BadFile, match=r"holds the same weights as .*rank_0"):
        opened(folder)


@pytest.mark.parametrize("key", ["param_shapes", "param_alignment_paddings", GROUP])
def test_one_thing_a_hundred_thousand_times(tmp_path: Path, key: str) -> None:
    made = make_zero(2)
    many = {"param_shapes": {str(n): torch.Size((1,)) for n in range(1000)}, GROUP: RUN}.get(key, [0] * 1000)
    (put if key == "param_shapes" else of_all)(made, **{key: [many] * 100_000})
    with pytest.raises(BadFile, match="not as DeepSpeed"):
        opened(made.write(tmp_path))


class Code:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def test_code_among_the_optimizers_states(tmp_path: Path) -> None:
    made = make_zero(2)
    of_rank(made, loss_scaler=Code())
    folder = made.write(tmp_path)
    with pytest.raises(HostileFile, match=r"rank_1.*print"):
        opened(folder)
    checkpoint = opened(folder, Reading(strip_code=True))
    assert_same(read(checkpoint), made.expected)
    assert "were not called: __builtin__.print" in checkpoint.notes[-1]


def test_a_parameter_of_a_universal_one_elsewhere(tmp_path: Path) -> None:
    folder, _, _ = unpack("zero-universal-3", tmp_path)
    inner = folder / "global_step1_universal"
    path = inner / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    told = torch.load(path, weights_only=False)
    (inner / "zero" / "odd" / "fp32.pt").unlink()
    with pytest.raises(BadFile, match=r"odd.fp32\.pt: is not there"):
        opened(inner)
    strided = torch.randn(22)[::2]
    torch.save(strided, inner / "zero" / "odd" / "fp32.pt")
    assert read(opened(inner))["odd"].equal(strided)
    torch.save(torch.zeros(12), inner / "zero" / "odd" / "fp32.pt")
    with pytest.raises(BadFile, match=r"is of shape \[12\], and the model states say \[11\]"):
        opened(inner)
    told["param_shapes"][0]["../odd"] = torch.Size((11,))
    torch.save(told, path)
    with pytest.raises(HostileFile, match="no name of a folder"):
        opened(inner)


@given(data=st.data())
def test_a_damaged_checkpoint_is_refused_or_is_the_same(scratch: Path, data: st.DataObject) -> None:
    made = make_zero(3, groups=({"a": (3,)},), frozen={"f": (2,)})
    folder = made.write(scratch / "m")
    path = folder / data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    with contextlib.suppress(BadRequest, BadFile, Unsupported):
        found = read(opened(folder))
        assert_same({name: found[name] for name in found.keys() & made.expected.keys()},
                    {name: made.expected[name] for name in found.keys() & made.expected.keys()})  # fmt: skip


# Which files there are.

OTHERS = {
    "mp_rank_01_model_states.pt": "tensor-parallel",
    "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt": "tensor-parallel",
    "layer_03-model_00-model_states.pt": "one layer's",
    "layer_0_expert_3_mp_rank_00_model_states.pt": "one expert's",
    "expp_rank_0_mp_rank_00_optim_states.pt": "one expert's",
    "zero_pp_rank_0_mp_rank_00_model_states.pt": "of two kinds",
    "zero_pp_rank_1_mp_rank_00_optim_states.pt": "holds two files of rank 1: bf16_zero",
    "bf16_zero_pp_rank_9_mp_rank_00_optim_states.pt": "was saved by 2 ranks, and holds bf16_zero_pp_rank_9",
}


@pytest.mark.parametrize(("name", "said"), OTHERS.items())
def test_files_of_other_kinds(tmp_path: Path, name: str, said: str) -> None:
    folder = make_zero(2).write(tmp_path)
    save({"a": torch.ones(2)}, folder / name)
    with pytest.raises(WconvError, match=said):
        opened(folder)


@pytest.mark.parametrize("what", ["model", "optim"])
def test_ranks_that_are_missing(wconv: Callable[..., Any], tmp_path: Path, what: str) -> None:
    folder = make_zero(3, world=8).write(tmp_path / "m")
    for rank in (3, 5):
        for path in folder.glob(f"*zero_pp_rank_{rank}_*_{what}_states.pt"):
            path.unlink()
    for source in (folder, folder / "zero_pp_rank_1_mp_rank_00_model_states.pt"):
        told = wconv("to-safetensors", source, exit_code=3).stderr
        assert "states of ranks 3 and 5 of 8 are not there" in told
    (found,) = json.loads(wconv("doctor", folder, "--json", exit_code=1).stdout)["findings"]
    assert "ranks 3 and 5" in found["problem"]


def test_model_states_without_an_optimizer_are_plain(tmp_path: Path) -> None:
    made = make_zero(1)
    folder = made.write(tmp_path)
    with pytest.raises(BadRequest, match="no state dict at 'x'"):
        opened(folder, Reading(key="x"))
    for path in folder.glob("*optim*"):
        path.unlink()
    checkpoint = open_checkpoint(folder / "mp_rank_00_model_states.pt")
    assert checkpoint.format == "torch"
    assert_same(read(checkpoint), dict(made.models[0]["module"]))
    shutil.copy(folder / "mp_rank_00_model_states.pt", folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(TrainingPiece, match="of all ranks lie"):
        open_checkpoint(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")


def test_a_folder_that_is_far(tmp_path: Path) -> None:
    made = make_zero(3, world=4, groups=({"a.weight": (3000, 100), "b": (7,)},), frozen=FROZEN)
    made.write(tmp_path)
    store = StoreInMemory({f"m/{path.name}": path.read_bytes() for path in tmp_path.iterdir()})
    checkpoint = opened(Place(store, "m"))
    # Of each to see what it is; of those of the model the head, of those of the optimizer the tail too, and its step.
    assert len(store.reads) <= 8 + 4 + 4 * 3
    assert_same(read(checkpoint), made.expected)


# Held against DeepSpeed, and large.

JUDGE = """
import os, sys
os.environ["DS_ACCELERATOR"] = "cpu"
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as read
for folder in sys.argv[1:]:
    torch.save(dict(read(folder, tag="step")), folder + "/judge.pt")
"""


@pytest.mark.slow
@pytest.mark.skipif(not SCRIPT.exists(), reason="make .venv-trainers/installed")
def test_deepspeed_reads_the_same(tmp_path: Path) -> None:
    layouts = [
        {**layout, "frozen": FROZEN} for layout in LAYOUTS.values() if 0 not in layout.get("frozen", {}).values()
    ]
    folders = [tmp_path / str(index) for index in range(len(layouts))]
    for layout, folder in zip(layouts, folders, strict=True):
        make_zero(**layout).write(folder / "step")
    subprocess.run([SCRIPT, "-c", JUDGE, *folders], check=True, capture_output=True)
    for folder in folders:
        judged = torch.load(folder / "judge.pt")
        checkpoint = opened(folder / "step")
        assert [tensor.name for tensor in checkpoint.tensors] == list(judged)
        assert_same(read(checkpoint), judged)


@pytest.mark.slow
def test_many_ranks_take_little(tmp_path: Path) -> None:
    made = make_zero(3, world=64, groups=({f"layers.{n}.weight": (16, 9) for n in range(200)},))
    folder = made.write(tmp_path)
    tracemalloc.start()
    checkpoint = opened(folder)
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 5e6  # 200 bytes for each part of a parameter
    assert most < 10e6
    assert_same(read(checkpoint), made.expected)

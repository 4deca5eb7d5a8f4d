"""What trainers leave beside a model stays where it is: outputs of the real Trainer, of accelerate, and of Diffusers'.

The judge of what is left of a model is its own loader.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny import make_state, names_in, save, save_pipeline, write_json
from support.training import unpack

CARRIED = {"config.json", "generation_config.json", "model.safetensors"}


def train(model: Any, folder: Path) -> None:
    """Let the Trainer train for two steps, with a checkpoint at each, and save the model and its state."""
    import torch
    from transformers import Trainer, TrainingArguments

    ids = torch.arange(8)
    how = TrainingArguments(
        output_dir=str(folder), max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        logging_strategy="no", per_device_train_batch_size=1, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, how, train_dataset=[{"input_ids": ids, "labels": ids}] * 2)
    trainer.train()
    trainer.save_model()
    trainer.save_state()


def save_state(model: Any, folder: Path) -> None:
    """Let accelerate save a model and all that a run goes on from: beside it, and in a checkpoint's folder."""
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    accelerator.prepare(model, optimizer, scheduler)
    model.save_pretrained(folder)
    accelerator.save_state(str(folder / "step_4"), safe_serialization=False)
    accelerator.save_state(str(folder))


@pytest.fixture(scope="module")
def trained(builders: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Give folders by the library that wrote them."""
    root = tmp_path_factory.mktemp("trained")
    logging.disable()
    try:
        for name, write in (("trainer", train), ("accelerate", save_state)):
            write(builders.make_llama(tied=False).train(), root / name)
    finally:
        logging.disable(logging.NOTSET)
    return {path.name: path for path in root.iterdir()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "left"),
    [
        (
            "trainer",
            [
                "not carried over: checkpoint-1/ (a training checkpoint: 8 files",
                "not carried over: checkpoint-2/",
                "trainer_state.json",
            ],
        ),
        (
            "accelerate",
            [
                "not carried over: optimizer.bin, random_states_0.pkl, scheduler.bin (training state, ",
                "not carried over: step_4/ (a training",
            ],
        ),
    ],
)
def test_training_state_is_left_behind(
    name: str, left: list[str], trained: dict[str, Path], builders: Any, wconv: Callable[..., Any], tmp_path: Path
) -> None:
    for args in (("--dry-run",), ()):
        shown = wconv("to-safetensors", trained[name], "-o", tmp_path / "out", *args).stdout
        for path in left:
            assert path in shown
        assert "2 other files, " in shown
        assert ": config.json, generation_config.json." in shown
    assert set(names_in(tmp_path / "out")) == CARRIED
    told = json.loads(wconv("recast", trained[name], "--dtype", "bf16", "-o", tmp_path / "b", "--json").stdout)
    assert told["carried_nbytes"] == sum((trained[name] / path).stat().st_size for path in told["carried"])
    assert not any("optimizer" in path for path in names_in(tmp_path / "b"))
    loaded = builders.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.state_dict().keys() == builders.make_llama(tied=False).state_dict().keys()


def test_it_is_shown_for_what_it_is(trained: dict[str, Path], wconv: Callable[..., Any]) -> None:
    told = json.loads(wconv("inspect", trained["trainer"], "--json").stdout)
    assert {"training_args.bin", "checkpoint-1/optimizer.pt", "checkpoint-1/rng_state.pth"} <= set(
        told["training_state"]
    )
    assert "checkpoint-1/model.safetensors" in told["other_weights"]


def test_a_checkpoint_in_a_pipeline_is_no_part_of_it(wconv: Callable[..., Any], tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "m")
    for path in ("pytorch_lora_weights.safetensors", "optimizer.bin", "random_states_0.pkl"):
        save(make_state(), folder / "checkpoint-500" / path)
    save(make_state(), folder / "checkpoint-600" / "unet" / "diffusion_pytorch_model.safetensors")
    for path in ("checkpoint-600/optimizer.bin", "checkpoint-600/unet/config.json", "scheduler/notes.txt"):
        write_json(folder / path, {})
    shown = wconv("to-safetensors", folder, "-o", tmp_path / "out").stdout
    assert not any("checkpoint" in name for name in names_in(tmp_path / "out"))
    assert "not carried over: checkpoint-500/ (a training checkpoint: 3 files, " in shown
    assert {"scheduler/scheduler_config.json", "scheduler/notes.txt"} <= set(names_in(tmp_path / "out"))
    assert "checkpoint" not in wconv("doctor", folder, exit_code=1).stdout


def test_a_checkpoint_in_a_sentence_transformers_model_is_no_part_of_it(
    wconv: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    for path in ("model.safetensors", "2_Dense/model.safetensors", "checkpoint-5/model.safetensors"):
        save(make_state(), folder / path)
    for path in ("modules.json", "1_Pooling/config.json", "checkpoint-5/trainer_state.json"):
        write_json(folder / path, {})
    wconv("to-safetensors", folder, "-o", tmp_path / "out")
    assert names_in(tmp_path / "out") == [
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "model.safetensors",
        "modules.json",
    ]


@pytest.mark.parametrize(
    "path",
    ["onnx/model.onnx", "openvino/openvino_model.bin", "coreml/m.mlpackage/Data/weight.bin", "fsdp_0/__0_0.distcp"],
)
def test_a_folder_whose_weights_stay_behind_stays_behind(path: str, wconv: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    save(make_state(), folder / "model.safetensors")
    (folder / path).parent.mkdir(parents=True)
    (folder / path).write_bytes(b"\0" * 50)
    write_json((folder / path).parent / "config.json", {})
    write_json(folder / "1_Pooling" / "config.json", {})
    shown = wconv("to-safetensors", folder, "-o", tmp_path / "out").stdout
    assert set(names_in(tmp_path / "out")) == {"model.safetensors", "1_Pooling/config.json"}
    what = "a training checkpoint" if path.endswith(".distcp") else "weights that are no part of the model"
    assert f"({what}: 2 files, 53 bytes)" in shown
    shutil.rmtree(tmp_path / "out")


def test_what_one_types_at_the_wrong_level(wconv: Callable[..., Any], tmp_path: Path) -> None:
    run = tmp_path / "runs" / "exp1"
    for step in (500, 1000):
        shutil.copytree(
            unpack("dcp-fsdp", tmp_path / str(step))[0], run / f"checkpoint-{step}" / "pytorch_model_fsdp_0"
        )
    for command in ("inspect", "doctor", "to-safetensors"):
        said = wconv(command, run, exit_code=3).stderr
        assert "Name one of its folders that do: checkpoint-1000, checkpoint-500." in said
        said = wconv(command, run.parent, exit_code=3).stderr
        assert "A weight file ends in" not in said
        assert "Name one of its folders that do: exp1/checkpoint-1000, exp1/checkpoint-500." in said


def test_an_optimizers_folder_is_shown_for_none_with_weights(wconv: Callable[..., Any], tmp_path: Path) -> None:
    folder = unpack("trainer-fsdp2-sharded", tmp_path)[0]
    for command in ("inspect", "to-safetensors"):
        said = wconv(command, folder / "optimizer_0", exit_code=4).stderr
        assert "holds the state of an optimizer, and no weights. Name the file or the folder with the weights" in said


def test_sets_of_one_folder_are_told_apart(wconv: Callable[..., Any], tmp_path: Path) -> None:
    for name in ("actor", "critic"):
        shutil.copytree(unpack("ranks-verl", tmp_path / name)[0], tmp_path / "step" / name)
    shown = wconv("inspect", tmp_path / "step").stdout
    assert re.search(r"\.  +actor  +FSDP ranks", shown)
    assert re.search(r"\.  +critic  +FSDP ranks", shown)
    assert "actor/extra_state_world_size_4_rank_*.pt (4)" in shown
    said = wconv("to-safetensors", tmp_path / "step", "-o", tmp_path / "out", exit_code=2).stderr
    assert "has several training checkpoints: actor and critic. Name the one you want." in said
    assert "twice" not in wconv("doctor", tmp_path / "step").stdout
    shutil.rmtree(tmp_path / "step" / "critic")
    told = wconv("to-safetensors", tmp_path / "step", "-o", tmp_path / "out").stdout
    assert "not carried over: actor/ (all but the weights and what goes with them: 13 files, " in told


def test_what_has_no_config_is_told_how_to_have_one(wconv: Callable[..., Any], tmp_path: Path) -> None:
    folder = unpack("trainer-fsdp2-sharded", tmp_path)[0]
    assert "no config.json was found" in wconv("to-safetensors", folder, "-o", tmp_path / "out").stdout
    assert "config.json" not in wconv("to-safetensors", folder / "pytorch_model_fsdp_0" / ".metadata", "-o",
                                      tmp_path / "one.safetensors").stdout  # fmt: skip


@pytest.mark.parametrize("name", ["pytorch_model_fsdp_0/__0_0.distcp", "plain.bin"])
def test_a_config_goes_with_a_file_too(wconv: Callable[..., Any], tmp_path: Path, name: str) -> None:
    folder = unpack("trainer-fsdp2-sharded", tmp_path)[0]
    save(make_state(), folder / "plain.bin")
    write_json(tmp_path / "base" / "config.json", {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float32"})
    wconv("to-safetensors", folder / name, "-o", tmp_path / "out", "--config", tmp_path / "base", "--dtype", "bf16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    one = tmp_path / "one" / "model.safetensors"
    told = wconv("to-safetensors", folder / name, "-o", one, "--config", tmp_path / "base").stdout
    assert names_in(one.parent) == ["model.safetensors"]
    assert "load_file" in told


def test_masters_are_loaded_as_float32(wconv: Callable[..., Any], tmp_path: Path) -> None:
    """The config says bfloat16, in which it was trained, and transformers 5 would round the masters to that."""
    folder = unpack("trainer-zero3", tmp_path)[0]
    for number, path in enumerate((".", "global_step2/zero_pp_rank_0_mp_rank_00_model_states.pt")):
        source, out = folder / path, tmp_path / str(number)
        wconv("to-safetensors", source, "-o", out)
        assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
        assert "Healthy" in wconv("doctor", out).stdout
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_doctor_names_the_file_that_is_not_there(wconv: Callable[..., Any], tmp_path: Path) -> None:
    folder = unpack("trainer-fsdp2-sharded", tmp_path)[0]
    (folder / "pytorch_model_fsdp_0" / "__1_0.distcp").unlink()
    assert "file-damaged: pytorch_model_fsdp_0/__1_0.distcp" in wconv("doctor", folder, exit_code=1).stdout


def test_gathered_weights_beside_masters_say_where_those_are(wconv: Callable[..., Any], tmp_path: Path) -> None:
    folder = unpack("trainer-zero2", tmp_path)[0]
    told = wconv("to-safetensors", folder, "-o", tmp_path / "out").stdout
    assert "global_step2/ (a training checkpoint: 3 files, 0.1 MB; name it to convert its weights)" in told
    told = wconv("verify", folder, folder / "global_step2", exit_code=1).stdout
    assert "--cast allows B to be rounded." in told

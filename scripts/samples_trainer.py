"""Samples of what the HF Trainer leaves in ``checkpoint-N``: FSDP by accelerate, and DeepSpeed's ZeRO.

A very small Llama is trained for two steps. The judge is its whole state dict, gathered by torch or DeepSpeed, and in
``logits.safetensors`` what a model with these weights answers to ``input_ids``. ``model/`` beside the checkpoint has
the config and the tokenizer that the model began with, for the checkpoints that hold none.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from samples_common import State, judge, spawn, start, whole, write_state
from samples_ranks import small_tokenizer
from samples_zero import deepspeed, without_code, zero_reader
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
)

STEPS = 2
VOCABULARY = 64


class Case(NamedTuple):
    """How a sample is trained: by FSDP or ZeRO with these options, on as many ranks."""

    name: str
    world: int
    fsdp: dict[str, Any] | None = None
    zero: dict[str, Any] | None = None
    tied: bool = False
    moe: bool = False
    bf16: bool = False
    tokenizer: bool = False


CASES = (
    Case("trainer-fsdp2-sharded", 2, fsdp={"state_dict_type": "SHARDED_STATE_DICT"}, bf16=True, tokenizer=True),
    Case("trainer-fsdp2-full", 2, fsdp={"state_dict_type": "FULL_STATE_DICT"}, tokenizer=True),
    Case(
        "trainer-fsdp1-sharded",
        2,
        fsdp={"state_dict_type": "SHARDED_STATE_DICT", "version": 1, "sync_module_states": False},
    ),
    Case("trainer-zero2", 2, zero={"stage": 2}, bf16=True, tokenizer=True),
    Case("trainer-zero3", 2, zero={"stage": 3}, bf16=True),
    Case(
        "trainer-zero3-gathered",
        2,
        zero={"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
        tied=True,
        bf16=True,
    ),
    Case("trainer-fsdp2-moe", 2, fsdp={"state_dict_type": "SHARDED_STATE_DICT"}, moe=True),
    Case("trainer-fsdp2-sharded-tied", 4, fsdp={"state_dict_type": "SHARDED_STATE_DICT"}, tied=True),
)


def fresh(case: Case) -> PreTrainedModel:
    """Make the model of a sample as it is before training, always the same."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": case.tied,
    }
    if case.moe:
        # In memory, and so in DCP, its experts are stacked; save_pretrained writes them one by one.
        return Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**options, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
        )
    return LlamaForCausalLM(LlamaConfig(**options))


class Sentences(torch.utils.data.Dataset):
    """A few made-up sentences, always the same."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(8) * 7 + index) % VOCABULARY
        return {"input_ids": ids, "labels": ids}


@contextmanager
def fsdp_on_cpus() -> Iterator[None]:
    """Let accelerate take FSDP on CPUs, which torch can and accelerate allows for accelerators only."""
    plain = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.device = PartialState._shared_state["device"] = torch.device("cpu")  # FSDP1 knows no "cpu:0"
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    with mock.patch.object(AcceleratorState, "__init__", init):
        yield


def arguments(case: Case) -> TrainingArguments:
    options: dict[str, Any] = {
        "output_dir": f"{case.name}/checkpoint",
        "max_steps": STEPS,
        "save_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "bf16": case.bf16,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 0,
    }
    layer = "Qwen3MoeDecoderLayer" if case.moe else "LlamaDecoderLayer"
    if case.fsdp is not None:
        options["fsdp"] = "full_shard auto_wrap" if case.fsdp.get("version") == 1 else True
        options |= {"fsdp_config": {**case.fsdp, "transformer_layer_cls_to_wrap": [layer]}}
    else:
        options["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "zero_optimization": case.zero,
            "bf16": {"enabled": case.bf16},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    return TrainingArguments(**options)


def gathered(case: Case, model: Any) -> State:
    """Give the whole trained state dict on every rank."""
    if case.fsdp is not None and case.fsdp.get("version") == 1:
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
            return {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return whole(model.state_dict())


def train(case: Case) -> None:
    """Train and save, and leave the judge's answers."""
    if case.zero is not None:
        deepspeed()
    place = Path(case.name)
    model = fresh(case)
    tokenizer = small_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    if dist.get_rank() == 0:
        model.config.save_pretrained(place / "model")
        tokenizer.save_pretrained(place / "model")
    with fsdp_on_cpus():
        trainer = Trainer(
            model,
            arguments(case),
            train_dataset=Sentences(),
            processing_class=tokenizer if case.tokenizer else None,
        )
        trainer.train()
    if case.fsdp is not None:
        state = gathered(case, trainer.model)
        if dist.get_rank() == 0:
            judge(place / "checkpoint", state)
            answer(case, state)


def answer(case: Case, state: State) -> None:
    """Write what a model with these weights says."""
    model = fresh(case)
    model.load_state_dict(state)
    ids = torch.arange(10).reshape(1, 10) * 5 % VOCABULARY
    with torch.no_grad():
        logits = model.float().eval()(input_ids=ids).logits
    write_state(Path(case.name) / "logits.safetensors", {"input_ids": ids, "logits": logits})


def tidy(case: Case) -> None:
    """Make checkpoint-N the checkpoint, and read what only DeepSpeed can read."""
    place = Path(case.name)
    run = place / "checkpoint"
    assert [path.name for path in run.iterdir()] == [f"checkpoint-{STEPS}"], list(run.iterdir())
    run.rename(place / "run")
    (place / "run" / f"checkpoint-{STEPS}").rename(run)
    shutil.rmtree(place / "run")
    if case.zero is not None:
        without_code(run)
        state = dict(zero_reader()(str(run)))
        judge(run, state)
        answer(case, state)


def make() -> None:
    """Write all samples of this family into the current folder."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    for case in CASES:
        start(case.name)
        spawn(case.world, train, case)
        tidy(case)

"""From what a trainer leaves to a model that transformers loads, with the logits of the trained one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import snapshot
from support.training import unpack

# The folder of the checkpoint to convert, and whether it has a config of its own.
TRAINED = {
    "trainer-fsdp1-sharded": ("", False),
    "trainer-fsdp2-sharded": ("", False),
    "trainer-fsdp2-sharded-tied": ("", False),
    "trainer-fsdp2-moe": ("", False),
    "trainer-zero2": ("global_step2", True),
    "trainer-zero3": ("", True),
}


def logits_of(folder: Path, told: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model(told["input_ids"]).logits


@pytest.mark.parametrize("name", TRAINED)
def test_what_was_trained_loads_and_answers_as_it_did(wconv: Callable[..., Any], tmp_path: Path, name: str) -> None:
    inner, has_config = TRAINED[name]
    folder, judge, _ = unpack(name, tmp_path)
    told = load_file(folder.parent / "logits.safetensors")
    before = snapshot(folder)
    config = () if has_config else ("--config", folder.parent / "model")
    wconv("to-safetensors", folder / inner, "-o", tmp_path / "out", *config)
    assert torch.equal(logits_of(tmp_path / "out", told, torch.float32), told["logits"])
    wconv("to-safetensors", folder / inner, "-o", tmp_path / "half", "--dtype", "bf16", *config)
    halves = load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(halves[one], judge[one].bfloat16()) for one in halves)
    # In bfloat16 it answers as the trained model does once it is cast.
    again = logits_of(tmp_path / "out", told, torch.bfloat16)
    assert torch.equal(logits_of(tmp_path / "half", told, torch.bfloat16), again)
    wconv("verify", folder / inner, tmp_path / "half", "--cast")
    assert snapshot(folder) == before

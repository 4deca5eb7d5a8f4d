"""Samples of plain torch files in which the model lies deeper, or not alone.

The judge is what ``torch.load`` gives, all of its tensors, named by their path.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from samples_common import judge, start


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def megatron() -> Any:
    """Lay out a checkpoint as Megatron-LM did before torch_dist: mp_rank_00/model_optim_rng.pt."""
    encoder = {
        "layers.0.self_attention.query_key_value.weight": numbers(12, 4),
        "layers.0.self_attention.query_key_value.bias": numbers(12),
        "layers.0.self_attention.dense.weight": numbers(4, 4).half(),
        "final_layernorm.weight": numbers(4),
    }
    embedding = {"word_embeddings": {"weight": numbers(8, 4)}, "position_embeddings": {"weight": numbers(6, 4)}}
    return {
        "args": argparse.Namespace(num_layers=1, hidden_size=4, tensor_model_parallel_size=1),
        "checkpoint_version": 3.0,
        "iteration": 20,
        "model": {"language_model": {"embedding": embedding, "encoder": encoder}},
        "optimizer": {"optimizer": {"state": {0: {"step": 20, "exp_avg": numbers(12, 4)}}, "param_groups": []}},
        "opt_param_scheduler": {"max_lr": 1e-3, "num_steps": 20},
        "rng_state": [{"torch_rng_state": torch.get_rng_state()[:16]}],
    }


def flax() -> Any:
    """Nest parameters as Flax does: a dict for each module, down to kernel and bias."""
    block = {
        "attention": {name: {"kernel": numbers(4, 4), "bias": numbers(4)} for name in ("query", "key", "value")},
        "norm": {"scale": numbers(4), "bias": numbers(4)},
    }
    return {
        "params": {"embed": {"embedding": numbers(8, 4)}, "blocks": {"0": block}, "head": {"kernel": numbers(4, 8)}},
        "batch_stats": {"norm": {"mean": numbers(4), "var": numbers(4)}},
    }


def nano_gpt() -> Any:
    """Lay out nanoGPT's ckpt.pt: the model under the prefix of torch.compile, and a tensor that is a loss."""
    model = {
        "_orig_mod.transformer.wte.weight": numbers(8, 4),
        "_orig_mod.transformer.h.0.attn.c_attn.weight": numbers(12, 4),
        "_orig_mod.transformer.ln_f.weight": numbers(4),
    }
    model["_orig_mod.lm_head.weight"] = model["_orig_mod.transformer.wte.weight"]
    return {
        "model": model,
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": numbers(8, 4)}},
            "param_groups": [{"lr": 1e-3}],
        },
        "model_args": {"n_layer": 1, "n_head": 1, "n_embd": 4, "block_size": 8, "bias": False, "vocab_size": 8},
        "iter_num": 3,
        "best_val_loss": torch.tensor(1e9),
        "config": {"out_dir": "out", "eval_interval": 2000},
    }


def lightning() -> Any:
    """Lay out a Lightning .ckpt with an average of the weights beside them."""
    state = {"net.weight": numbers(3, 4), "net.bias": numbers(3), "criterion.weight": numbers(3)}
    return {
        "epoch": 1,
        "global_step": 20,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"EMA": {"weights": [tensor * 0.5 for tensor in state.values()]}},
        "optimizer_states": [{"state": {0: {"exp_avg": numbers(3, 4)}}, "param_groups": [{"params": [0]}]}],
        "lr_schedulers": [],
        "hyper_parameters": {"lr": 1e-3},
    }


SAMPLES = (
    ("nested-megatron", "iter_0000020/mp_rank_00/model_optim_rng.pt", megatron),
    ("nested-flax", "params.pt", flax),
    ("nested-nanogpt", "ckpt.pt", nano_gpt),
    ("nested-lightning", "last.ckpt", lightning),
)


def make() -> None:
    """Write all samples of this family into the current folder."""
    for name, file, content in SAMPLES:
        torch.manual_seed(0)
        checkpoint = start(name)
        path = checkpoint / file
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content(), path)
        judge(checkpoint, torch.load(path, weights_only=False))

# mypy: ignore-errors
# ruff: noqa
"""Flux and Stable Diffusion 3, until their layouts are there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converter.transforms.layouts.operations import CONCAT, SWAP, Concat
from converter.transforms.layouts.rows import Row


def flux_rows(config: Mapping[str, Any]) -> list[Row]:
    """Give the rows of a transformer."""
    B, S, T = "transformer_blocks.{}.", "single_transformer_blocks.{}.", "time_text_embed."
    rows: list[Row] = []
    for o, d in (
        ("time_in", "timestep_embedder"),
        ("vector_in", "text_embedder"),
        ("guidance_in", "guidance_embedder"),
    ):
        rows += [Row(f"{o}.in_layer.*", (f"{T}{d}.linear_1.*",)), Row(f"{o}.out_layer.*", (f"{T}{d}.linear_2.*",))]
    rows += [Row("txt_in.*", ("context_embedder.*",)), Row("img_in.*", ("x_embedder.*",))]
    for o, d in {
        "img_mod.lin": ["norm1.linear"],
        "txt_mod.lin": ["norm1_context.linear"],
        "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
        "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        "img_mlp.0": ["ff.net.0.proj"],
        "img_mlp.2": ["ff.net.2"],
        "txt_mlp.0": ["ff_context.net.0.proj"],
        "txt_mlp.2": ["ff_context.net.2"],
        "img_attn.proj": ["attn.to_out.0"],
        "txt_attn.proj": ["attn.to_add_out"],
    }.items():
        rows.append(Row(f"double_blocks.{{}}.{o}.*", tuple(f"{B}{x}.*" for x in d), CONCAT))
    rows.append(Row("single_blocks.{}.modulation.lin.*", (S + "norm.linear.*",)))
    rows.append(
        Row(
            "single_blocks.{}.linear1.*",
            tuple(f"{S}{x}.*" for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
            Concat((1, 1, 1, 4)),
        )
    )
    rows.append(Row("single_blocks.{}.linear2.*", (S + "proj_out.*",)))
    rows.append(Row("final_layer.linear.*", ("proj_out.*",)))
    rows.append(Row("final_layer.adaLN_modulation.1.*", ("norm_out.linear.*",), SWAP))
    return rows


def sd3_rows(config: Mapping[str, Any]) -> list[Row]:
    """Give the rows of a transformer."""
    X, C, B, T = (
        "joint_blocks.{}.x_block.",
        "joint_blocks.{}.context_block.",
        "transformer_blocks.{}.",
        "time_text_embed.",
    )
    rows: list[Row] = []
    for o, d in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder")):
        rows += [Row(f"{o}.mlp.0.*", (f"{T}{d}.linear_1.*",)), Row(f"{o}.mlp.2.*", (f"{T}{d}.linear_2.*",))]
    rows.append(Row("context_embedder.*", ("context_embedder.*",)))
    rows.append(Row("x_embedder.proj.*", ("pos_embed.proj.*",)))
    for o, d in {
        "attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
        "attn.proj": ["attn.to_out.0"],
        "attn2.qkv": ["attn2.to_q", "attn2.to_k", "attn2.to_v"],
        "attn2.proj": ["attn2.to_out.0"],
        "adaLN_modulation.1": ["norm1.linear"],
        "mlp.fc1": ["ff.net.0.proj"],
        "mlp.fc2": ["ff.net.2"],
    }.items():
        rows.append(Row(f"{X}{o}.*", tuple(f"{B}{x}.*" for x in d), CONCAT))
    for o, d in {
        "attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        "attn.proj": ["attn.to_add_out"],
        "mlp.fc1": ["ff_context.net.0.proj"],
        "mlp.fc2": ["ff_context.net.2"],
    }.items():
        rows.append(Row(f"{C}{o}.*", tuple(f"{B}{x}.*" for x in d), CONCAT))
    rows.append(Row("final_layer.linear.*", ("proj_out.*",)))
    rows.append(Row("final_layer.adaLN_modulation.1.*", ("norm_out.linear.*",), SWAP))
    return rows

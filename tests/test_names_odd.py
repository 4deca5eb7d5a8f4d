"""Odd weights under other names: notes that lie, ties in headers only, what else a header says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.tiny import assert_same, names_in, write_json

pytestmark = pytest.mark.usefixtures("no_fsync")
CORPUS = Path(__file__).parent / "corpus" / "quantized"
A, B = torch.zeros(2), torch.ones(2)


def notes_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return {key: note for key, note in file.metadata().items() if key != "format"}


@pytest.mark.parametrize(
    ("options", "expected", "notes"),
    [
        (("--drop", "b"), {"a": A}, {"a": "b"}),  # which ties it to nothing
        (("--drop", "a"), {"b": B}, {}),
        (("--rename", "a=q"), {"q": A, "b": B}, {}),
        (("--rename", "b=q"), {"a": A, "q": B}, {}),
        (("--tied", "first"), {"a": A, "b": B}, {"a": "b"}),
        (("--tied", "duplicate"), {"a": A, "b": B}, {"a": "b"}),
    ],
)
def test_a_tensor_that_a_note_has_as_tied_is_its_own(
    options: tuple[str, ...],
    expected: dict[str, torch.Tensor],
    notes: dict[str, str],
    wconv: Callable[..., Any],
    tmp_path: Path,
) -> None:
    save_file({"a": A, "b": B}, tmp_path / "m.safetensors", {"a": "b"})
    wconv("to-safetensors", tmp_path / "m.safetensors", "-o", tmp_path / "out.safetensors", *options)
    assert_same(load_file(tmp_path / "out.safetensors"), expected)
    assert notes_of(tmp_path / "out.safetensors") == notes


def test_a_tensor_that_a_note_has_as_tied_is_not_taken_for_it(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_file({"a": A, "b": B}, tmp_path / "m.safetensors", {"a": "b"})
    said = wconv(
        "to-safetensors", tmp_path / "m.safetensors", "-o", tmp_path / "out", "--tied", "a", exit_code=2
    ).stderr
    assert "has no tied tensors of which one is named 'a'" in said
    assert names_in(tmp_path) == ["m.safetensors"]


@pytest.mark.parametrize("command", ["to-safetensors", "to-bin"])
def test_what_a_header_ties_is_written_under_each_name(command: str, wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_file({"a": A, "b": B}, tmp_path / "model.safetensors", {"c": "b", "d": "b", "e": "f"})
    wconv(command, tmp_path / "model.safetensors", "-o", tmp_path / "out", "--tied", "duplicate", "--verify")
    [path] = (tmp_path / "out").iterdir()
    if command == "to-bin":
        state = torch.load(path)
    else:
        state = load_file(path)
        assert notes_of(path) == {"e": "f"}
    assert_same(state, {"a": A, "b": B, "c": B, "d": B})
    wconv("verify", tmp_path / "model.safetensors", tmp_path / "out")


def test_of_a_pickle_it_is_not_said_that_a_header_notes_its_ties(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_file({"b": B}, tmp_path / "model.safetensors", {"c": "b"})
    said = wconv("to-bin", tmp_path / "model.safetensors", "-o", tmp_path / "out").stdout
    assert "Tied: c is b, written once under both names\n" in said


def test_in_place_what_a_header_ties_is_written_under_each_name(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_file({"a": A, "b": B}, tmp_path / "model.safetensors", {"c": "b"})
    wconv("reshard", tmp_path / "model.safetensors", "--in-place", "--max-shard-size", "none", "--tied", "duplicate")
    assert_same(load_file(tmp_path / "model.safetensors"), {"a": A, "b": B, "c": B})


def test_a_name_that_only_a_header_has_begins_with_a_prefix(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_file({"b": B}, tmp_path / "m.safetensors", {"model.c": "b"})
    wconv("to-safetensors", tmp_path / "m.safetensors", "-o", tmp_path / "out", "--strip-prefix", "model.")
    assert notes_of(tmp_path / "out" / "m.safetensors") == {"c": "b"}


def test_a_tied_tensor_called_format_stays_under_that_name(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_file({"format": B}, tmp_path / "m.safetensors", {"a": "format"})
    said = wconv(
        "to-safetensors", tmp_path / "m.safetensors", "-o", tmp_path / "out", "--tied", "a", exit_code=4
    ).stderr
    assert "has a tied tensor named 'format'" in said


def test_a_tie_that_the_other_layout_has_not_is_refused(wconv: Callable[..., Any], tmp_path: Path) -> None:
    layer = "model.layers.0.mlp.experts"
    experts = {f"{layer}.{at}.{leaf}.weight": torch.ones(2, 2) for at in "01" for leaf in ("gate_proj", "up_proj")}
    experts |= {f"{layer}.{at}.down_proj.weight": torch.ones(2, 2) for at in "01"}
    write_json(tmp_path / "m" / "config.json", {"model_type": "qwen3_moe", "num_experts": 2})
    model, fused = tmp_path / "m" / "model.safetensors", tmp_path / "fused"
    for kept, exit_code in ((f"{layer}.1.up_proj.weight", 4), ("lm_head.weight", 0)):
        save_file({**experts, "lm_head.weight": A}, model, {"x": kept})
        said = wconv("to-safetensors", tmp_path / "m", "-o", fused, "--experts", "fused", exit_code=exit_code).stderr
        assert exit_code == 0 or f"notes that 'x' is {kept!r}, and they are not one tensor in the other layout" in said
    assert notes_of(fused / "model.safetensors") == {"x": "lm_head.weight"}
    save_file(load_file(fused / "model.safetensors"), fused / "model.safetensors", {"x": f"{layer}.down_proj"})
    said = wconv("to-safetensors", fused, "-o", tmp_path / "apart", "--experts", "separate", exit_code=4).stderr
    assert "notes that 'x' is" in said


def test_sets_of_one_variant_are_chosen_by_their_files(wconv: Callable[..., Any], tmp_path: Path) -> None:
    write_json(tmp_path / "m" / "config.json", {})
    for name in ("model", "consolidated"):
        save_file({"a": A}, tmp_path / "m" / f"{name}.safetensors")
    said = wconv("to-safetensors", tmp_path / "m", "-o", tmp_path / "out.safetensors", exit_code=2).stderr
    names = ", ".join(str(tmp_path / "m" / f"{name}.safetensors") for name in ("consolidated", "model"))
    assert f"2 names. Name one of them as the source ({names}), or name a folder for the output." in said


def test_what_is_there_and_is_no_weight_file_is_seen_before_anything_is_written(
    wconv: Callable[..., Any], tmp_path: Path
) -> None:
    for name in "ab":
        save_file({"x": A}, tmp_path / f"{name}.safetensors")
    half = tmp_path / "out" / "a.safetensors"
    write_json(half, "half")
    sources = [tmp_path / f"{name}.safetensors" for name in "ab"]
    said = wconv("to-safetensors", sources[0], "-o", tmp_path / "out", exit_code=5).stderr
    assert f"{half}: exists, and is not what would be written: a.safetensors has 7 bytes and not " in said
    said = wconv("to-safetensors", *sources, "-o", tmp_path / "out", "--skip-existing").stdout
    assert said.endswith("\n1 of 2 converted; 1 there already.\n")
    assert half.read_text() == '"half"\n'
    wconv("to-safetensors", sources[0], "-o", tmp_path / "out", "--overwrite")
    assert_same(load_file(half), {"x": A})
    assert names_in(tmp_path / "out") == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize(
    ("file", "part"),
    [("awq/gemm", "m.scales"), ("comfy/convrot", "256.weight_scale"), ("compressed/actorder", "m.weight_g_idx")],
)
def test_what_stands_beside_a_quantized_weight_is_still_called_so(
    file: str, part: str, wconv: Callable[..., Any], tmp_path: Path
) -> None:
    source, out = CORPUS / f"{file}.safetensors", tmp_path / "out.safetensors"
    said = wconv("to-safetensors", source, "-o", out, "--rename", f"^{part}$={part}_x", exit_code=2).stderr
    assert f"would have {part!r} as '{part}_x', and not beside " in said
    module = part.partition(".")[0]
    wconv("to-safetensors", source, "-o", out, "--rename", rf"^{module}\.=n.o.")
    wconv("dequantize", out, "-o", tmp_path / "numbers.safetensors")

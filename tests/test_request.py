"""What is asked for and cannot be, or means nothing, is refused, on the command line and in Python.

And whatever takes a path takes a text, whatever takes a dtype its name.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import assert_same, is_same, make_state, save, snapshot, write_json

from converter import (
    BadRequest,
    Casting,
    ModuleChoice,
    Publishing,
    Request,
    Selection,
    Writing,
    convert,
    diagnose,
    open_checkpoint,
    open_model,
    place_of,
    plan_conversion,
    plan_dequantized,
    plan_quantized,
    plan_rename,
    prepare,
    run_plan,
    verify,
)
from converter.dtypes import DTYPES
from converter.run.journal import Run
from converter.transforms.names import TensorNames

STATE = make_state()
HALF = {name: tensor.half() for name, tensor in STATE.items()}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"on_overflow": "clip"}, "'clip': is no on_overflow. It is one of 'error', 'saturate', 'inf'."),
        ({"format": "gguf"}, "'gguf': is no format. It is one of 'safetensors', 'torch', None."),
        ({"tied": 3}, "3: is no tied. It is one of 'first', 'duplicate', None, or a tensor's name."),
        ({"only": "("}, "'(': is no regular expression "),
        ({"rename": [("(a", "b")]}, "'(a': is no regular expression "),
        ({"rename": [("a", r"\1")]}, "is no replacement for 'a' (invalid group reference 1 "),
        ({"rename": [("a", r"\g<b>")]}, "is no replacement for 'a' ("),
        ({"rename": ["a=b"]}, "'a=b': is no pair of a regular expression and a replacement."),
        ({"overwrite": True, "skip_existing": True}, "--skip-existing: leaves what --overwrite replaces. Choose one."),
        ({"dtype": "bf17"}, "'bf17': is no dtype to cast to. It is one of fp32, bf16, fp16, fp8_e4m3fn, fp8_e5m2."),
        ({"dtype": DTYPES["I64"]}, "is no dtype to cast to. "),
        ({"dtype": torch.float16}, "torch.float16: is no dtype to cast to. "),
        ({"max_shard_size": -1}, "-1: is no size of a shard. "),
        ({"max_shard_size": 0}, "0: is no size of a shard. "),
        ({"max_shard_size": math.nan}, "nan: is no size of a shard. "),
        ({"max_shard_size": "5XB"}, "'5XB': is no size. Write it as 5GB, 500MB or 2GiB."),
        ({"max_shard_size": "-5GB"}, "'-5GB': is no size. "),
        ({"max_shard_size": "5"}, "'5': is 5 bytes. Write it as 5GB, 500MB or 2GiB, or as 5B."),
    ],
    ids=str,
)
def test_options_that_are_none_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRequest) as caught:
        Request.of("m", **options)
    assert said in str(caught.value)


def test_an_option_that_there_is_not_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="there is no option 'max_shard_nbytes'"):
        Request.of("m", max_shard_nbytes=1)
    with pytest.raises(TypeError, match="there is no option 'wishes'"):
        convert("m", wishes=None)


def test_each_option_goes_to_the_group_that_has_it() -> None:
    asked = Request.of("m", "out", components="unet", dtype="bf16", variant="x", overwrite=True, strip_prefix="a.")
    assert asked == Request(
        place_of("m"),
        place_of("out"),
        Selection(components=("unet",)),
        Casting(DTYPES["BF16"]),
        Writing(variant="x"),
        Publishing(overwrite=True),
        TensorNames(strip_prefix="a."),
    )
    forced = Request.of("m", force=True)
    assert (forced.casting.force, forced.writing.force) == (True, True)
    assert Request.of("m") == Request(place_of("m"))


def test_texts_are_taken_for_what_they_name() -> None:
    given = Request.of("m", dtype="BF16", max_shard_size="5GB", components="unet", keep_fp32="norm")
    assert given == Request.of(
        "m", dtype=DTYPES["BF16"], max_shard_size=5_000_000_000, components=("unet",), keep_fp32=("norm",)
    )
    assert Request.of("m", max_shard_size="none").writing.max_shard_size == math.inf
    assert ModuleChoice(include="q_proj", skip=["lm_head"]) == ModuleChoice(("q_proj",), ("lm_head",))  # type: ignore[arg-type]


def test_what_a_plan_cannot_do_without_is_asked_for(tmp_path: Path) -> None:
    save(make_state(), tmp_path / "m" / "model.safetensors")
    with pytest.raises(BadRequest, match="needs a variant to rename, and its new tag"):
        plan_rename(Request.of(tmp_path / "m", from_variant="none"))
    with pytest.raises(BadRequest, match="needs a folder to be written to"):
        plan_quantized(Request.of(tmp_path / "m"))


def test_paths_may_be_texts_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(STATE, Path("m/model.safetensors"))
    assert open_model("m").components[0].weight_sets
    assert len(open_checkpoint("m/model.safetensors").tensors) == 6
    assert plan_rename(Request.of("m", from_variant="none", variant="ema")).sets
    assert diagnose("m").is_healthy
    run_plan(plan_conversion(Request.of("m", "planned", dtype="bf16", variant="none")))
    assert_same(load_file("planned/model.safetensors"), {name: tensor.bfloat16() for name, tensor in STATE.items()})
    convert("m", "converted", max_shard_size="5GB")
    assert verify("m", "converted").is_equal


def test_8_bits_take_texts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save({"fc.weight": torch.randn(8, 8), "fc.bias": torch.randn(8)}, Path("m/model.safetensors"))
    write_json(Path("m/config.json"), {"architectures": ["Unheard"]})
    choice = ModuleChoice(include="fc")  # type: ignore[arg-type]
    prepared = prepare(Request.of("m", "small"), lambda request: plan_quantized(request, choice), choice)
    assert prepared.plan is not None
    run_plan(prepared.plan, request=prepared.request)
    prepared = prepare(Request.of("small", "back", dtype="fp32"), plan_dequantized)
    assert prepared.plan is not None
    run_plan(prepared.plan, request=prepared.request)
    assert load_file("back/model.safetensors")["fc.weight"].dtype is torch.float32
    # Neither the request nor the config says a dtype.
    [written] = plan_dequantized(Request.of("small", "again")).sets
    assert written.notes == ("dequantized to bf16: 1 weight (LLM.int8 of bitsandbytes)",)


def test_8_bits_are_of_the_key_that_is_asked_for(tmp_path: Path) -> None:
    state = {"fc.weight": torch.randn(8, 8)}
    (tmp_path / "m").mkdir()
    torch.save({"model": {"fc.weight": torch.zeros(8, 8)}, "ema": state}, tmp_path / "m" / "pytorch_model.bin")
    write_json(tmp_path / "m" / "config.json", {"architectures": ["Unheard"]})
    asked = Request.of(tmp_path / "m", tmp_path / "small", key="ema")
    run_plan(plan_quantized(asked, ModuleChoice(include=("fc",))))
    assert load_file(tmp_path / "small" / "model.safetensors")["fc.weight"].any()


def test_a_rename_that_was_finished_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Run) -> None:
        raise OSError(errno.EBUSY, "somebody looks into it")

    save(STATE, tmp_path / "m" / "model.safetensors")
    asked = Request.of(tmp_path / "m", from_variant="none", variant="fp32")
    prepared = prepare(asked, plan_rename, "rename")
    assert prepared.plan is not None
    with monkeypatch.context() as patched:
        patched.setattr(Run, "clear", fail)
        assert run_plan(prepared.plan, request=prepared.request).left_over
    assert prepare(asked, plan_rename, "rename").plan is None
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["model.fp32.safetensors"]
    with pytest.raises(BadRequest, match="has no variant 'none'"):
        prepare(asked, plan_rename, "rename")


# Names that belie the dtype.


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("recast", "m", "--dtype", "bf16", "--variant", "fp16"),
         "would be named fp16 and hold bf16. Use --dtype fp16, or --variant bf16."),
        (("to-safetensors", "m", "-o", "out", "--variant", "fp16"),
         "would be named fp16 and hold fp32. Use --dtype fp16, or --variant fp32."),
        (("recast", "m/model.safetensors", "-o", "y.fp16.safetensors", "--dtype", "bf16"),
         "would be named fp16 and hold bf16. Use --dtype fp16, or --variant bf16."),
        (("to-safetensors", "both", "-o", "out", "--dtype", "bf16"),
         "would be named fp16 and hold bf16. Use --dtype fp16, or --variant bf16."),
    ],
)  # fmt: skip
def test_a_tag_of_another_dtype_is_refused(
    args: tuple[str, ...], said: str, wconv: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(STATE, Path("m/model.safetensors"))
    save(STATE, Path("both/pytorch_model.bin"))
    save(HALF, Path("both/pytorch_model.fp16.bin"))
    before = snapshot(tmp_path)
    assert said in wconv(*args, exit_code=2).stderr
    assert snapshot(tmp_path) == before


def test_tags_that_fit_or_name_no_dtype_are_taken(
    wconv: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mixed = {**HALF, "norm": torch.ones(4)}
    save(mixed, Path("m/model.safetensors"))
    wconv("to-safetensors", "m", "-o", "fits", "--variant", "fp16")
    wconv("to-safetensors", "m", "-o", "none", "--variant", "ema")
    wconv("recast", "m", "-o", "cast", "--dtype", "bf16", "--variant", "bfloat16", "--keep-fp32", "norm")
    assert is_same(load_file("fits/model.fp16.safetensors"), mixed)
    assert load_file("cast/model.bfloat16.safetensors")["norm"].dtype is torch.float32


def test_a_tag_that_was_wrong_before_is_for_the_doctor(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(STATE, tmp_path / "m" / "pytorch_model.fp16.bin")
    wconv("to-safetensors", tmp_path / "m")
    assert_same(load_file(tmp_path / "m" / "model.fp16.safetensors"), STATE)


# Names to be kept in float32.


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("recast", "--dtype", "bf16", "--keep-fp32", "nrom"),
         "m: has no tensor to be cast whose name holds 'nrom', as --keep-fp32 has it. 'wconv inspect --tensors' "),
        (("recast", "--dtype", "bf16", "--keep-fp32", "norm", "--keep-fp32", "count"), "whose name holds 'count'"),
        (("recast", "--dtype", "bf16", "--keep-fp32", "("), "is no regular expression"),
        (("to-safetensors", "--keep-fp32", "norm"), "m: is not cast, and --keep-fp32 is for casts. Leave it out, or "),
    ],
)  # fmt: skip
def test_keeping_what_is_not_there_is_refused(
    args: tuple[str, ...], said: str, wconv: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state = {"norm.weight": torch.ones(4), "a": torch.ones(4), "count": torch.ones(4, dtype=torch.int64)}
    Path("m").mkdir()
    save_file(state, "m/pytorch.safetensors", {"format": "pt"})
    name, *options = args
    assert said in wconv(name, "m", *options, "-o", "out", exit_code=2).stderr
    assert not Path("out").exists()


def test_a_name_of_one_part_alone_is_kept_there(wconv: Callable[..., Any], tmp_path: Path) -> None:
    for part, name in (("unet", "norm.weight"), ("vae", "a")):
        save({name: torch.ones(4)}, tmp_path / "m" / part / "diffusion_pytorch_model.safetensors")
    write_json(tmp_path / "m" / "model_index.json", {"_class_name": "X"})
    wconv("recast", tmp_path / "m", "--dtype", "bf16", "--keep-fp32", "norm", "-o", tmp_path / "out")
    path = tmp_path / "out" / "unet" / "diffusion_pytorch_model.bf16.safetensors"
    assert load_file(path)["norm.weight"].dtype is torch.float32

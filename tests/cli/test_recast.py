"""``wconv recast``: variants and where they go, what stays as it is, what is refused, and config.json."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import (
    assert_same,
    load_set,
    make_state,
    names_in,
    save,
    save_pipeline,
    save_safetensors_shards,
    snapshot,
    write_json,
)

STATE = make_state()
HALF = {name: tensor.to(torch.float16) for name, tensor in STATE.items()}
BRAIN = {name: tensor.to(torch.bfloat16) for name, tensor in STATE.items()}
LARGE = {
    "a": torch.tensor([1.0, 7e4, -7e4, 65519.0]),
    "b": torch.tensor([65520.0]),
    "c": torch.tensor([torch.inf, -torch.inf, torch.nan, 65504.0]),
}


def assert_one_line(outcome: Any, *says: str) -> None:
    """Check the form of a complaint, ``path: what. what to do``, and that it says these."""
    assert outcome.stdout == ""
    assert re.fullmatch(r"\S+: [^\n]*[^\n. ]\. [^\n]+\.\n", outcome.stderr), outcome.stderr
    for part in says:
        assert part in outcome.stderr


# Names and places.


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8_e4m3fn", "fp8_e5m2"])
def test_the_variant_has_the_dtypes_name(dtype: str, wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(STATE, tmp_path / "m" / "model.safetensors")
    wconv("recast", tmp_path / "m", "--dtype", dtype)
    assert names_in(tmp_path / "m") == sorted(["model.safetensors", f"model.{dtype}.safetensors"])


@pytest.mark.parametrize(
    ("alias", "tag"), [("bfloat16", "bf16"), ("float16", "fp16"), ("BF16", "bf16"), ("float32", "fp32")]
)
def test_other_names_of_dtypes(alias: str, tag: str, wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(HALF, tmp_path / "m" / "model.safetensors")
    wconv("recast", tmp_path / "m", "--dtype", alias)
    assert f"model.{tag}.safetensors" in names_in(tmp_path / "m")


@pytest.mark.parametrize("form", ["bin", "safetensors"])
@pytest.mark.parametrize(
    ("args", "written"),
    [
        ((), "model.safetensors"),
        (("--variant", "none"), "model.safetensors"),
        (("--variant", "half"), "model.half.safetensors"),
    ],
)
def test_into_a_new_folder(
    form: str, args: tuple[Any, ...], written: str, wconv: Callable[..., Any], tmp_path: Path
) -> None:
    save(STATE, tmp_path / "m" / f"{'pytorch_' if form == 'bin' else ''}model.{form}")
    wconv("recast", tmp_path / "m", "--dtype", "fp16", "-o", tmp_path / "out", *args)
    assert names_in(tmp_path / "out") == [written]
    assert_same(load_file(tmp_path / "out" / written), HALF)


def test_shards_and_their_index_are_tagged(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_safetensors_shards(STATE, tmp_path / "m")
    before = snapshot(tmp_path / "m")
    wconv("recast", tmp_path / "m", "--dtype", "bf16")
    assert names_in(tmp_path / "m") == sorted(
        [
            *before,
            *(f"model.bf16-0000{number}-of-00003.safetensors" for number in (1, 2, 3)),
            "model.safetensors.index.bf16.json",
        ]
    )
    index = json.loads((tmp_path / "m" / "model.safetensors.index.bf16.json").read_text())
    assert index["weight_map"] == {
        name: f"model.bf16-0000{'abcdef'.index(name) // 2 + 1}-of-00003.safetensors" for name in "abcdef"
    }
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in BRAIN.values())


def test_shard_size_and_dtype_in_one_pass(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_safetensors_shards(STATE, tmp_path / "m")
    # The limit is for what is written: 16 bytes a tensor.
    wconv("recast", tmp_path / "m", "--dtype", "bf16", "--max-shard-size", "48B", "-o", tmp_path / "out")
    assert [
        "".join(load_file(tmp_path / "out" / name)) for name in names_in(tmp_path / "out") if "index" not in name
    ] == ["abc", "def"]


def test_in_the_current_folder(wconv: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(STATE, tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    wconv("recast", "--dtype", "bf16")
    assert_same(load_file("model.bf16.safetensors"), BRAIN)


def test_it_adds_only_where_the_variant_lacks(wconv: Callable[..., Any], tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "m")
    wconv("recast", folder, "--dtype", "fp16", "--component", "vae")
    before = snapshot(folder)
    assert [name for name in before if name.endswith("fp16.safetensors")] == [
        "vae/diffusion_pytorch_model.fp16.safetensors"
    ]
    outcome = wconv("recast", folder, "--dtype", "fp16")
    after = snapshot(folder)
    assert before.items() <= after.items()
    assert "vae/diffusion_pytorch_model.fp16.safetensors is there already, and stays as it is" in outcome.stdout
    assert {Path(name).parts[0] for name in after.keys() - before.keys()} == {"unet", "text_encoder"}


def test_components_may_be_several(wconv: Callable[..., Any], tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "m")
    before = snapshot(folder)
    wconv("recast", folder, "--dtype", "fp16", "--component", "vae", "--component", "text_encoder")
    added = snapshot(folder).keys() - before.keys()
    assert added == {"vae/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors"}


def test_other_variants_are_not_touched(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save_safetensors_shards(STATE, tmp_path / "m")
    for tag, seed in [("ema", 3), ("fp16", 4)]:
        save(make_state(seed=seed), tmp_path / "m" / f"model.{tag}.safetensors")
    before = snapshot(tmp_path / "m")
    wconv("recast", tmp_path / "m", "--dtype", "bf16")
    assert before.items() <= snapshot(tmp_path / "m").items()
    wconv("recast", tmp_path / "m", "--dtype", "bf16", "--overwrite", "--max-shard-size", "none")
    assert before.items() <= snapshot(tmp_path / "m").items()
    assert_same(load_file(tmp_path / "m" / "model.bf16.safetensors"), BRAIN)
    assert len(names_in(tmp_path / "m")) == len(before) + 1


def test_of_two_forms_the_safetensors_is_read(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(STATE, tmp_path / "m" / "model.safetensors")
    save(make_state(seed=9), tmp_path / "m" / "pytorch_model.bin")
    wconv("recast", tmp_path / "m", "--dtype", "bf16")
    assert_same(load_file(tmp_path / "m" / "model.bf16.safetensors"), BRAIN)


def test_from_another_variant(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(STATE, tmp_path / "m" / "model.safetensors")
    save(make_state(seed=5, dtype=torch.float16), tmp_path / "m" / "model.ema.safetensors")
    wconv("recast", tmp_path / "m", "--dtype", "fp32", "--from-variant", "ema", "--variant", "ema-full")
    expected = {name: tensor.float() for name, tensor in make_state(seed=5, dtype=torch.float16).items()}
    assert_same(load_file(tmp_path / "m" / "model.ema-full.safetensors"), expected)


# What is cast, and what is not.


def test_what_is_no_float_passes(wconv: Callable[..., Any], tmp_path: Path) -> None:
    state = {
        "bool": torch.tensor([True, False, True]),
        "complex": torch.tensor([1 + 2j], dtype=torch.complex64),
        "float": torch.tensor([1.1]),
        "double": torch.tensor([1.1], dtype=torch.float64),
        "e4m3": torch.tensor([1.5]).to(torch.float8_e4m3fn),
        "half": torch.tensor([1.1], dtype=torch.float16),
        "int8": torch.tensor([-3], dtype=torch.int8),
        "int64": torch.tensor([2**60]),
        "uint16": torch.tensor([65535], dtype=torch.uint16),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(1.1),
    }
    save(state, tmp_path / "m" / "model.safetensors")
    wconv("recast", tmp_path / "m", "--dtype", "bf16")
    cast = {"float", "double", "half", "e4m3", "empty", "scalar"}
    expected = {name: tensor.to(torch.bfloat16) if name in cast else tensor for name, tensor in state.items()}
    found = load_file(tmp_path / "m" / "model.bf16.safetensors")
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        name: tensor.dtype for name, tensor in expected.items()
    }
    assert_same(found, expected)


def test_kept_by_regular_expressions(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(STATE, tmp_path / "m" / "model.safetensors")
    wconv("recast", tmp_path / "m", "--dtype", "fp16", "--keep-fp32", "^a", "--keep-fp32", "[ef]$")
    expected = {name: tensor if name in "aef" else tensor.half() for name, tensor in STATE.items()}
    assert_same(load_file(tmp_path / "m" / "model.fp16.safetensors"), expected)


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_dry_run_lists_what_stays(options: tuple[Any, ...], wconv: Callable[..., Any], tmp_path: Path) -> None:
    state = {
        f"blocks.{number}.{name}.weight": torch.ones(2)
        for number in range(3)
        for name in ("norm1", "norm2", "attn", "ffn")
    }
    save(state, tmp_path / "m" / "diffusion_pytorch_model.safetensors")
    write_json(tmp_path / "m" / "config.json", {"_class_name": "WanTransformer3DModel"})
    before = snapshot(tmp_path)
    outcome = wconv("recast", tmp_path / "m", "--dtype", "bf16", "--keep-fp32", r"2\.ffn", "--dry-run", *options)
    kept = {name for name in state if "norm" in name or "2.ffn" in name}
    if options:
        assert set(json.loads(outcome.stdout)["weight_sets"][0]["kept_fp32"]) == kept
    else:
        assert {name for name in state if name in outcome.stdout} == kept
    assert snapshot(tmp_path) == before


FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "e4m3fnuz": torch.float8_e4m3fnuz}


@pytest.mark.parametrize(("dtype", "wide"), [("fp16", torch.float16), ("fp32", torch.float32)])
def test_float8_without_scales_is_cast_like_any_float(
    dtype: str, wide: torch.dtype, wconv: Callable[..., Any], tmp_path: Path
) -> None:
    state = {name: (torch.randn(4, 8) * 3).to(narrow) for name, narrow in FLOAT8.items()}
    save(state, tmp_path / "x.safetensors")
    wconv("recast", tmp_path / "x.safetensors", "--dtype", dtype, "--verify")
    expected = {name: tensor.to(wide) for name, tensor in state.items()}
    assert_same(load_file(tmp_path / f"x.{dtype}.safetensors"), expected)


def test_what_stays_in_another_dtype_is_said(wconv: Callable[..., Any], tmp_path: Path) -> None:
    state = {"weight": torch.randn(4, 8), "ids": torch.arange(4), "scale": torch.ones(2, 2).to(torch.float8_e8m0fnu)}
    save(state, tmp_path / "x.safetensors")
    outcome = wconv("recast", tmp_path / "x.safetensors", "--dtype", "fp16")
    assert "Kept in i64 in x.safetensors: 1 (ids)" in outcome.stdout
    assert "Kept in f8_e8m0 in x.safetensors: 1 (scale)" in outcome.stdout


@pytest.mark.parametrize(("held", "said"), [(torch.bfloat16, "already bf16: nothing to cast"), (torch.int32, "holds")])
def test_a_recast_that_casts_nothing_says_so(
    held: torch.dtype, said: str, wconv: Callable[..., Any], tmp_path: Path
) -> None:
    save({"weight": torch.ones(4, 8, dtype=held)}, tmp_path / "x.safetensors")
    assert f"Note: {said}" in wconv("recast", tmp_path / "x.safetensors", "--dtype", "bf16").stdout


@pytest.mark.parametrize("narrow", ["fp8_e4m3fn", "fp8_e5m2"])
def test_8_bits_leave_norms_and_biases_as_they_are(narrow: str, wconv: Callable[..., Any], tmp_path: Path) -> None:
    state = {"proj.weight": torch.randn(4, 8), "proj.bias": torch.randn(4), "norm.weight": torch.randn(8).bfloat16()}
    save(state, tmp_path / "x.safetensors")
    outcome = wconv("recast", tmp_path / "x.safetensors", "--dtype", narrow)
    written = load_file(tmp_path / f"x.{narrow}.safetensors")
    assert_same(
        {name: written.pop(name) for name in ("proj.bias", "norm.weight")},
        {name: state[name] for name in ("proj.bias", "norm.weight")},
    )
    assert [str(tensor.dtype) for tensor in written.values()] == ["torch." + narrow.replace("fp8", "float8")]
    assert "Kept in fp32 in x.safetensors: 1 (proj.bias)" in outcome.stdout
    assert "Kept in bf16 in x.safetensors: 1 (norm.weight)" in outcome.stdout


def test_the_doctor_sees_a_tag_that_float8_belies(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save({"a.weight": torch.ones(4, 8).to(torch.float8_e4m3fn)}, tmp_path / "m" / "model.fp16.safetensors")
    write_json(tmp_path / "m" / "config.json", {"architectures": ["LlamaForCausalLM"]})
    assert "dtype-tag" in wconv("doctor", tmp_path / "m", exit_code=1).stdout


def test_the_doctor_finds_norms_right_in_what_8_bits_left(wconv: Callable[..., Any], tmp_path: Path) -> None:
    names = ("norm.weight", "proj.bias", "proj.weight", "ffn.bias")
    state = {name: torch.ones(4, 8) if name == "proj.weight" else torch.ones(8) for name in names}
    save(state, tmp_path / "m" / "model.safetensors")
    write_json(tmp_path / "m" / "config.json", {"architectures": ["LlamaForCausalLM"]})
    wconv("recast", tmp_path / "m", "--dtype", "fp8_e4m3fn")
    found = json.loads(wconv("doctor", tmp_path / "m", "--json").stdout)["findings"]
    assert not [finding for finding in found if "dtype" in finding["code"]]


@pytest.mark.parametrize("folder", ["m", "quantized/model"])
def test_quantized_models_are_refused(
    folder: str, wconv: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(STATE, Path(folder) / "model.safetensors")
    write_json(Path(folder) / "config.json", {"quantization_config": {"quant_method": "bitsandbytes"}})
    before = snapshot(tmp_path)
    outcome = wconv("recast", folder, "--dtype", "bf16", exit_code=4)
    assert_one_line(outcome, f"{folder}/model.safetensors: is quantized", "--force")
    assert snapshot(tmp_path) == before
    wconv("recast", folder, "--dtype", "bf16", "--force")
    assert_same(load_file(Path(folder) / "model.bf16.safetensors"), BRAIN)


# What does not fit.


def test_what_does_not_fit_is_named_and_counted(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(LARGE, tmp_path / "m" / "model.safetensors")
    before = snapshot(tmp_path)
    outcome = wconv("recast", tmp_path / "m", "--dtype", "fp16", exit_code=6)
    assert_one_line(outcome, f"{tmp_path}/m", "a (2), b (1).", "--on-overflow saturate")
    assert snapshot(tmp_path) == before


def test_of_many_tensors_that_do_not_fit_some_are_named(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save({f"t{number:02d}": torch.full((number + 1,), 1e6) for number in range(12)}, tmp_path / "m.safetensors")
    outcome = wconv("recast", tmp_path / "m.safetensors", "--dtype", "fp16", "-o", tmp_path / "out", exit_code=6)
    assert_one_line(outcome, "t11 (12), t10 (11), t09 (10), t08 (9), t07 (8) and 7 more tensors.")
    assert names_in(tmp_path) == ["m.safetensors"]


def test_counts_are_exact_in_any_memory(wconv: Callable[..., Any], tmp_path: Path) -> None:
    values = torch.arange(300_000, dtype=torch.float32)
    save({"a": values, "b": -values}, tmp_path / "m" / "model.safetensors")
    count = f"{300_000 - 65_520:,}"
    for memory in ("1B", "64MB"):
        outcome = wconv("recast", tmp_path / "m", "--dtype", "fp16", "--memory", memory, exit_code=6)
        assert_one_line(outcome, f"a ({count}), b ({count}).")


@pytest.mark.parametrize(("policy", "value"), [("saturate", 65504.0), ("inf", torch.inf)])
def test_what_does_not_fit_is_made_what_is_asked(
    policy: str, value: Any, wconv: Callable[..., Any], tmp_path: Path
) -> None:
    save(LARGE, tmp_path / "m" / "model.safetensors")
    shown = wconv("recast", tmp_path / "m", "--dtype", "fp16", "--on-overflow", policy).stdout
    became = "the largest that there is" if policy == "saturate" else "infinite"
    assert f"Too large, and now {became}: 3 values of a (2), b (1)" in shown
    found = load_file(tmp_path / "m" / "model.fp16.safetensors")
    assert found["a"].tolist() == [1.0, value, -value, 65504.0]
    assert found["b"].tolist() == [value]
    assert found["c"][2].isnan()
    assert found["c"][[0, 1, 3]].tolist() == [torch.inf, -torch.inf, 65504.0]


def test_what_is_kept_fits(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(LARGE, tmp_path / "m" / "model.safetensors")
    wconv("recast", tmp_path / "m", "--dtype", "fp16", "--keep-fp32", "[ab]")
    found = load_file(tmp_path / "m" / "model.fp16.safetensors")
    assert_same({name: found[name] for name in "ab"}, {name: LARGE[name] for name in "ab"})


# config.json.


CONFIGS = {
    "text_encoder": {"architectures": ["X"], "dtype": "float32", "text_config": {"dtype": "float32", "dtype_of": 1}},
    "unet": {"_class_name": "X", "torch_dtype": "float32", "layers": [1, 2]},
    "vae": {"_class_name": "Y", "dtype": None},
}


def pipeline_with_configs(folder: Path) -> Path:
    save_pipeline(folder)
    for component, config in CONFIGS.items():
        write_json(folder / component / "config.json", config)
    return folder


def test_an_untagged_set_in_a_new_folder_changes_its_config(wconv: Callable[..., Any], tmp_path: Path) -> None:
    folder = pipeline_with_configs(tmp_path / "m")
    wconv("recast", folder, "--dtype", "bf16", "--variant", "none", "-o", tmp_path / "out")
    told = {name: json.loads((tmp_path / "out" / name / "config.json").read_text()) for name in CONFIGS}
    assert told == {
        "text_encoder": {
            "architectures": ["X"],
            "dtype": "bfloat16",
            "text_config": {"dtype": "bfloat16", "dtype_of": 1},
        },
        "unet": {"_class_name": "X", "torch_dtype": "bfloat16", "layers": [1, 2]},
        "vae": {"_class_name": "Y", "dtype": None},
    }


@pytest.mark.parametrize("args", [(), ("-o", "out"), ("-o", "out", "--variant", "half")])
def test_a_variant_changes_no_config(
    args: tuple[Any, ...], wconv: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = pipeline_with_configs(tmp_path / "m")
    before = snapshot(folder)
    wconv("recast", "m", "--dtype", "bf16", *args)
    after = snapshot(tmp_path / ("out" if args else "m"))
    assert {name: hashed for name, hashed in after.items() if name.endswith("config.json")} == {
        name: hashed for name, hashed in before.items() if name.endswith("config.json")
    }
    assert before.items() <= snapshot(folder).items()


def test_a_component_that_is_not_recast_keeps_its_config(wconv: Callable[..., Any], tmp_path: Path) -> None:
    folder = pipeline_with_configs(tmp_path / "m")
    args = ("--variant", "none", "-o", tmp_path / "out", "--component", "unet")
    wconv("recast", folder, "--dtype", "bf16", *args)
    told = json.loads((tmp_path / "out" / "text_encoder" / "config.json").read_text())
    assert told == CONFIGS["text_encoder"]


# What is refused.


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "--dtype bf16"),
        (("--dtype", "int8"), "'int8' is none of fp32, bf16, fp16, fp8_e4m3fn, fp8_e5m2"),
        (("--dtype", "fp64"), "'fp64' is none of"),
        (("--dtype", ""), "is none of"),
        (("--dtype", "bf16", "--variant", "a.b"), "'a.b': is no variant. "),
        (("--dtype", "bf16", "--variant", "a/b"), "'a/b': is no variant. "),
        (("--dtype", "bf16", "--variant", ""), "is no variant. "),
        (("--dtype", "bf16", "--variant", "none"), "-o OUT"),
        (("--dtype", "bf16", "--keep-fp32", "("), "'(': is no regular expression"),
        (("--dtype", "bf16", "--component", "unet"), "has no component 'unet'. "),
        (("--dtype", "bf16", "--from-variant", "fp16"), "has no variant 'fp16'. "),
        (("--dtype", "bf16", "--on-overflow", "wrap"), "'wrap'"),
        (("--dtype", "bf16", "--in-place"), "--in-place"),
    ],
)
def test_wrong_options(
    args: tuple[Any, ...], says: str, wconv: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(STATE, Path("m/model.safetensors"))
    before = snapshot(tmp_path)
    outcome = wconv("recast", "m", *args, exit_code=2)
    assert says in outcome.stderr
    assert outcome.stdout == ""
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("args", [(), ("--dry-run",)])
def test_a_variant_that_is_there_is_refused(args: tuple[Any, ...], wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(STATE, tmp_path / "m" / "model.safetensors")
    save(make_state(seed=2, dtype=torch.bfloat16), tmp_path / "m" / "model.bf16.safetensors")
    before = snapshot(tmp_path)
    outcome = wconv("recast", tmp_path / "m", "--dtype", "bf16", *args, exit_code=5)
    problem = "model.bf16.safetensors: exists, and is not what would be written: other values near tensor "
    assert_one_line(outcome, problem, "--overwrite")
    assert snapshot(tmp_path) == before


def test_a_folder_that_is_there_is_refused(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(STATE, tmp_path / "m" / "model.safetensors")
    save(STATE, tmp_path / "out" / "model.fp16.safetensors")
    before = snapshot(tmp_path)
    assert_one_line(wconv("recast", tmp_path / "m", "--dtype", "fp16", "-o", tmp_path / "out", exit_code=5))
    assert snapshot(tmp_path) == before


def test_the_line_that_loads_the_result(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(STATE, tmp_path / "m" / "model.safetensors")
    write_json(tmp_path / "m" / "config.json", {"architectures": ["LlamaForCausalLM"]})
    said = wconv("recast", tmp_path / "m", "--dtype", "bf16").stdout
    assert said.rstrip().split("\n")[-1].startswith("    LlamaForCausalLM.from_pretrained(")
    assert "variant='bf16'" in said.rstrip().split("\n")[-1]
    assert "bfloat16" in said.rstrip().split("\n")[-1]


def test_from_a_legacy_variant_of_shards(wconv: Callable[..., Any], tmp_path: Path) -> None:
    state = make_state(dtype=torch.float16)
    save_safetensors_shards(state, tmp_path / "m", ("abc", "def"))
    for path in sorted((tmp_path / "m").glob("*-of-*")):
        path.rename(path.with_suffix(".fp16.safetensors"))
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    index["weight_map"] = {
        name: file.replace(".safetensors", ".fp16.safetensors") for name, file in index["weight_map"].items()
    }
    (tmp_path / "m" / "model.safetensors.index.json").unlink()
    write_json(tmp_path / "m" / "model.safetensors.index.fp16.json", index)
    wconv("recast", tmp_path / "m", "--dtype", "bf16", "-o", tmp_path / "out", "--variant", "none")
    assert_same(load_set(tmp_path / "out"), {name: tensor.to(torch.bfloat16) for name, tensor in state.items()})

"""The real libraries as outside judges of `wconv recast`.

Tiny models of every family, in bf16 and fp16, beside their source and into new folders: each tensor is torch's cast of
the source's, but for those that the model's own library keeps in float32 (read off its classes here, not off our
table), and loading the result is, parameter for parameter, loading the source in that dtype.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_loaders import (
    assert_complete_index,
    assert_same_bits,
    assert_same_weights,
    digests,
    load_silently,
    read_bins,
    read_header,
)

StateDict = dict[str, torch.Tensor]

MODEL_NAMES = ["sd", "sdxl", "sana", "sd3", "wan", "t5", "llama_tied", "llama_untied"]
TORCH_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
PLACES = ["beside", "new", "untagged"]


@dataclass(frozen=True)
class Recast:
    """A recast folder, and what it was made from; ``place`` is ``untagged`` where the files have plain names."""

    dtype: str
    place: str
    model: Any
    source: Path
    folder: Path

    @property
    def wishes(self) -> dict[str, Any]:
        """What loads it."""
        variant = None if self.place == "untagged" else self.dtype
        return {"dtype": TORCH_DTYPES[self.dtype], "variant": variant}

    def files(self, component: str) -> list[Path]:
        """List the weights of a component that were written."""
        dotted = "" if self.place == "untagged" else rf"\.{self.dtype}"
        named = re.compile(rf"[a-z_]+{dotted}(-\d+-of-\d+)?\.safetensors")
        return sorted(path for path in (self.folder / component).iterdir() if named.fullmatch(path.name))


@pytest.fixture(scope="module")
def shaken(builders: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Any, Path]]:
    """Give a model of random weights and its folder, of single `.bin` files or of safetensors shards."""

    @cache
    def build(name: str, form: str) -> tuple[Any, Path]:
        model = builders.shake(builders.MODELS[name]())
        folder = tmp_path_factory.mktemp(name) / "model"
        return model, builders.save_bin(model, folder) if form == "bin" else builders.save_safetensors(model, folder, 3)

    return build


def source_form(place: str, dtype: str) -> str:
    """Choose the form of a case's source, so that each place and each dtype sees both."""
    return "shards" if (place == "beside") == (dtype == "bf16") else "bin"


CASES = list(itertools.product(MODEL_NAMES, ["bf16", "fp16"], PLACES))
TAGGED_ALONE = [case for case in CASES if case[2] == "new"]
UNTAGGED = [case for case in CASES if case[2] == "untagged"]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def recast(
    request: pytest.FixtureRequest,
    wconv: Callable[..., Any],
    builders: Any,
    shaken: Callable[[str, str], tuple[Any, Path]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Recast:
    name, dtype, place = request.param
    model, source = shaken(name, source_form(place, dtype))
    folder = tmp_path_factory.mktemp("recast") / "model"
    if place == "beside":
        shutil.copytree(source, folder)
        wconv("recast", folder, "--dtype", dtype)
    else:
        wconv("recast", source, "--dtype", dtype, "-o", folder, *(("--variant", "none") if place == "untagged" else ()))
    if place == "new" and isinstance(model, builders.PreTrainedModel):
        place = "untagged"  # as transformers finds it with no more words
    return Recast(dtype, place, model, source, folder)


def test_it_loads_silently_as_the_source_does_in_that_dtype(recast: Recast, builders: Any) -> None:
    loaded = load_silently(recast.model, recast.folder, **recast.wishes)
    expected = type(recast.model).from_pretrained(recast.source, dtype=TORCH_DTYPES[recast.dtype])
    assert_same_weights(builders, loaded, expected)


def test_every_tensor_is_torchs_cast(recast: Recast, builders: Any) -> None:
    for name, part in builders.models_in(recast.model).items():
        stored, ties = read_written(recast.files(name))
        expected = cast_as_the_library_keeps(part, read_source(recast.source / name), recast.dtype)
        assert {dropped: expected[kept].equal(expected[dropped]) for dropped, kept in ties.items()} == dict.fromkeys(
            ties, True
        )
        assert_same_bits(stored, {name: tensor for name, tensor in expected.items() if name not in ties})


@pytest.mark.parametrize("recast", TAGGED_ALONE, ids="-".join, indirect=True)
def test_no_key_is_missing_or_left_over(recast: Any, builders: Any) -> None:
    for name, part in builders.models_in(recast.model).items():
        _, report = type(part).from_pretrained(recast.folder / name, output_loading_info=True, **recast.wishes)
        assert not any(report.values()), report


def test_each_set_has_an_index_if_it_has_shards(recast: Recast, builders: Any) -> None:
    for name in builders.models_in(recast.model):
        indexes = [path for path in (recast.folder / name).glob("*.index*.json") if is_of(path.name, recast)]
        assert len(indexes) == (len(recast.files(name)) > 1)
        if recast.place != "beside":
            assert_complete_indexes(recast, name)


def is_of(name: str, recast: Recast) -> bool:
    """Say whether an index is of the set that was written."""
    tag = "" if recast.place == "untagged" else f".{recast.dtype}"
    return name.endswith(f".safetensors.index{tag}.json")


def assert_complete_indexes(recast: Recast, component: str) -> None:
    for path in (recast.folder / component).glob("*.index*.json"):
        assert_complete_index(path)


def test_what_was_there_stays_as_it_was(recast: Recast) -> None:
    before, after = digests(recast.source), digests(recast.folder)
    carried = {name for name in before if not is_weights(name)}
    if recast.place == "beside":
        assert before.items() <= after.items()
        assert all(f".{recast.dtype}" in name for name in after.keys() - before.keys())
        return
    edited = {name for name in carried if Path(name).name == "config.json"} if recast.place == "untagged" else set()
    assert {name: after[name] for name in carried - edited} == {name: before[name] for name in carried - edited}
    assert {name for name in after if not is_weights(name)} == carried


def is_weights(name: str) -> bool:
    """Say whether a path is one of weights or of an index."""
    return name.endswith((".bin", ".safetensors")) or ".index." in name


@pytest.mark.parametrize("recast", UNTAGGED, ids="-".join, indirect=True)
def test_an_untagged_set_says_its_dtype(recast: Any, builders: Any) -> None:
    told = str(TORCH_DTYPES[recast.dtype]).removeprefix("torch.")
    for name, part in builders.models_in(recast.model).items():
        before = (recast.source / name / "config.json").read_text()
        after = (recast.folder / name / "config.json").read_text()
        expected = json.loads(re.sub(r'(dtype": )"float32"', rf'\1"{told}"', before))
        if isinstance(part, builders.PreTrainedModel):
            expected |= {} if "dtype" in expected else {"torch_dtype": told}
        assert json.loads(after) == expected
        if isinstance(part, builders.PreTrainedModel):
            assert load_silently(part, recast.folder / name).dtype == TORCH_DTYPES[recast.dtype]


@pytest.mark.parametrize("dtype", ["fp8_e4m3fn", "fp8_e5m2"])
@pytest.mark.parametrize("name", ["sd", "wan", "t5", "llama_untied"])
def test_eight_bit_floats_are_torchs_cast(
    name: str,
    dtype: str,
    builders: Any,
    shaken: Callable[[str, str], tuple[Any, Path]],
    wconv: Callable[..., Any],
    tmp_path: Path,
) -> None:
    model, source = shaken(name, "bin")
    wconv("recast", source, "--dtype", dtype, "-o", tmp_path / "out")
    for component, part in builders.models_in(model).items():
        stored, ties = read_written(sorted((tmp_path / "out" / component).glob("*.safetensors")))
        expected = cast_as_the_library_keeps(part, read_source(source / component), dtype)
        assert_same_bits(stored, {name: tensor for name, tensor in expected.items() if name not in ties})


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_both_variants_beside_one_source_load(
    dtype: str,
    builders: Any,
    shaken: Callable[[str, str], tuple[Any, Path]],
    copy_of: Callable[[Path], Path],
    wconv: Callable[..., Any],
) -> None:
    model, source = shaken("wan", "shards")
    folder = copy_of(source)
    for each in ("bf16", "fp16"):
        wconv("recast", folder, "--dtype", each)
    loaded = load_silently(model, folder, variant=dtype, dtype=TORCH_DTYPES[dtype])
    assert_same_weights(builders, loaded, type(model).from_pretrained(source, dtype=TORCH_DTYPES[dtype]))
    assert_same_weights(builders, load_silently(model, folder), model)


@pytest.mark.parametrize("name", ["sd3", "llama_tied"])
def test_recast_bin_in_one_pass_loads(
    name: str, builders: Any, shaken: Callable[[str, str], tuple[Any, Path]], wconv: Callable[..., Any], tmp_path: Path
) -> None:
    model, source = shaken(name, "shards")
    wconv("to-bin", source, "--dtype", "fp16", "--max-shard-size", "none", "-o", tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.safetensors*"))
    expected = builders.models_in(type(model).from_pretrained(source, dtype=torch.float16))
    for component, part in expected.items():
        loaded = type(part).from_pretrained(tmp_path / "out" / component, use_safetensors=False, dtype=torch.float16)
        assert_same_bits(loaded.state_dict(), part.state_dict())


def cast_as_the_library_keeps(part: Any, state: StateDict, dtype: str) -> StateDict:
    """Cast a state dict by torch, with the rules that the model's class has in its library."""
    keeps = keep_rule_of(part, dtype)
    return {
        name: tensor if stays(tensor, dtype) or keeps(name) else tensor.to(TORCH_DTYPES[dtype])
        for name, tensor in state.items()
    }


def stays(tensor: torch.Tensor, dtype: str) -> bool:
    """Say whether a tensor is no number to cast, or a norm or a bias where 8 bits are asked for."""
    return not tensor.is_floating_point() or (dtype.startswith("fp8") and tensor.ndim < 2)


def keep_rule_of(part: Any, dtype: str) -> Callable[[str], bool]:
    """Read off a model what its library keeps in float32; what is for float16 alone we hold to for 8 bits too."""
    always = part._keep_in_fp32_modules or ()
    if type(part).__module__.startswith("diffusers.models"):
        return lambda name: not set(always).isdisjoint(name.split("."))
    entries = {*(part._keep_in_fp32_modules_strict or ()), *(always if dtype != "bf16" else ())}
    return lambda name: any(re.search(entry.replace("*", ".*"), name) for entry in entries)


def read_source(folder: Path) -> StateDict:
    """Read the only weights of a folder."""
    state = read_bins(folder.glob("*.bin"))
    for path in folder.glob("*.safetensors"):
        state.update(load_file(path))
    return state


def read_written(paths: list[Path]) -> tuple[StateDict, dict[str, str]]:
    """Read some safetensors files, and the ties that their headers note."""
    state: StateDict = {}
    ties: dict[str, str] = {}
    for path in paths:
        state.update(load_file(path))
        ties.update(read_header(path)[1])
    assert state
    assert ties.pop("format") == "pt"
    return state, ties

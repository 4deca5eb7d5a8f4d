"""Names of weight files: every spelling that is found, held against the libraries that write and read them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given
from hypothesis import strategies as st

from converter.errors import BadRequest
from converter.models.names import WEIGHT_EXTENSIONS, WeightsName, check_variant, parse_name

LIBRARIES = ["diffusers.utils.hub_utils", "transformers.modeling_utils"]
STEMS = ["diffusion_pytorch_model", "pytorch_model", "model", "adapter_model"]
VARIANTS = [None, "fp16", "bf16", "fp8_e4m3fn", "non_ema", "my-own"]
PARTS = [
    "model", "pytorch_model", "unet", "v1-5", ".fp16", ".bf16", ".ema", ".", "-", "-00001-of-00002", "-00012-of-00345",
    ".index", ".json", ".safetensors", ".bin", ".ckpt", "x", "é", "\n",
]  # fmt: skip

# (file name, stem, variant, extension, role, shard number and count, whether the spelling is an old one)
SPELLINGS = [
    ("model.safetensors", "model", None, "safetensors", "single", 0, 0, False),
    ("model.fp16.safetensors", "model", "fp16", "safetensors", "single", 0, 0, False),
    ("model-00001-of-00002.safetensors", "model", None, "safetensors", "shard", 1, 2, False),
    ("model.fp16-00002-of-00002.safetensors", "model", "fp16", "safetensors", "shard", 2, 2, False),
    ("model-00002-of-00002.fp16.safetensors", "model", "fp16", "safetensors", "shard", 2, 2, True),
    ("model-100000-of-123456.bin", "model", None, "bin", "shard", 100000, 123456, False),
    ("model-00001-of-000163.safetensors", "model", None, "safetensors", "shard", 1, 163, False),
    ("model.safetensors.index.json", "model", None, "safetensors", "index", 0, 0, False),
    ("model.safetensors.index.fp16.json", "model", "fp16", "safetensors", "index", 0, 0, False),
    ("model.safetensors.fp16.index.json", "model", "fp16", "safetensors", "index", 0, 0, True),
    ("model.fp16.safetensors.index.json", "model", "fp16", "safetensors", "index", 0, 0, True),
    ("model.fp16.safetensors.index.fp16.json", "model", "fp16", "safetensors", "index", 0, 0, True),
    ("pytorch_model.bin", "pytorch_model", None, "bin", "single", 0, 0, False),
    ("pytorch_model.non_ema.bin", "pytorch_model", "non_ema", "bin", "single", 0, 0, False),
    ("pytorch_model.bin.index.json", "pytorch_model", None, "bin", "index", 0, 0, False),
    ("pytorch_model.bin.index.fp16.json", "pytorch_model", "fp16", "bin", "index", 0, 0, False),
    ("diffusion_pytorch_model.custom.bin", "diffusion_pytorch_model", "custom", "bin", "single", 0, 0, False),
    ("adapter_model.bin", "adapter_model", None, "bin", "single", 0, 0, False),
    ("v1-5-pruned-emaonly.ckpt", "v1-5-pruned-emaonly", None, "ckpt", "single", 0, 0, False),
    ("v1-5-pruned.ema.ckpt", "v1-5-pruned", "ema", "ckpt", "single", 0, 0, False),
    ("sd_xl_base_1.0.safetensors", "sd_xl_base_1.0", None, "safetensors", "single", 0, 0, False),
    ("sd_xl_base_1.0.fp16.safetensors", "sd_xl_base_1.0", "fp16", "safetensors", "single", 0, 0, False),
    ("consolidated.00.pth", "consolidated.00", None, "pth", "single", 0, 0, False),
    ("lora.pt", "lora", None, "pt", "single", 0, 0, False),
]


@pytest.mark.parametrize(
    ("file_name", "stem", "variant", "ext", "role", "number", "count", "is_legacy"), SPELLINGS, ids=lambda value: value
)
def test_every_spelling_is_read(
    file_name: str, stem: str, variant: str | None, ext: str, role: str, number: int, count: int, is_legacy: bool
) -> None:
    parsed = parse_name(file_name)
    assert parsed is not None
    assert parsed.name == WeightsName(stem, variant, ext)
    assert (parsed.role, parsed.number, parsed.count, parsed.is_legacy) == (role, number, count, is_legacy)


@pytest.mark.parametrize(
    "file_name",
    ["config.json", "model_index.json", "model.index.json", "model.onnx", "weights.pb", "model.safetensors.tmp", "",
     "safetensors", ".safetensors", "model.bin.index.json.bak", "README.md", "vocab.txt", "model.SAFETENSORS",
     "model.bin.index.a.b.json"],
)  # fmt: skip
def test_other_files_are_no_weights(file_name: str) -> None:
    assert parse_name(file_name) is None


@pytest.fixture(params=LIBRARIES)
def add_variant(request: pytest.FixtureRequest) -> Callable[[str, str | None], str]:
    """Give a library's own function; imported here, for that takes seconds."""
    return import_module(request.param)._add_variant


def test_written_names_are_the_libraries(add_variant: Callable[[str, str | None], str]) -> None:
    for stem, variant, ext in itertools.product(STEMS, VARIANTS, ["safetensors", "bin"]):
        name = WeightsName(stem, variant, ext)
        assert name.single == add_variant(f"{stem}.{ext}", variant)
        assert name.index == add_variant(f"{stem}.{ext}.index.json", variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_shards_are_numbered_as_huggingface_hub_does(variant: str | None) -> None:
    # diffusers and transformers put "{suffix}" before the extension of the name with its variant.
    name = WeightsName("model", variant, "safetensors")
    state = {str(number): torch.zeros(4) for number in range(12)}
    pattern = name.single.removesuffix(".safetensors") + "{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(state, filename_pattern=pattern, max_shard_size=16)
    assert name.files(12) == tuple(split.filename_to_tensors)
    assert name.files(1) == (name.single,)


@given(
    st.sampled_from(STEMS),
    st.none() | st.lists(st.text("aZ09_", min_size=1, max_size=6), min_size=1, max_size=3).map("-".join),
    st.sampled_from(WEIGHT_EXTENSIONS),
    st.integers(1, 123_456),
)
def test_what_is_written_is_read_back(stem: str, variant: str | None, ext: str, count: int) -> None:
    name = WeightsName(stem, variant, ext)
    for file_name in (name.single, name.index, name.shard(count, count)):
        parsed = parse_name(file_name)
        assert parsed is not None
        assert (parsed.name, parsed.is_legacy) == (name, False)


@given(st.lists(st.sampled_from(PARTS), max_size=7).map("".join))
def test_a_name_that_is_not_an_old_one_is_spelled_as_it_was(file_name: str) -> None:
    parsed = parse_name(file_name)
    if parsed and not parsed.is_legacy:
        spelled = {
            "single": parsed.name.single,
            "index": parsed.name.index,
            "shard": parsed.name.shard(parsed.number, parsed.count),
        }
        assert spelled[parsed.role] == file_name


@pytest.mark.parametrize(
    ("stem", "expected"),
    [("pytorch_model", "model"), ("diffusion_pytorch_model", "diffusion_pytorch_model"), ("model", "model"),
     ("v1-5-pruned", "v1-5-pruned"), ("adapter_model", "adapter_model")],
)  # fmt: skip
def test_the_stem_in_safetensors(stem: str, expected: str) -> None:
    assert WeightsName(stem, "fp16", "bin").in_format("safetensors") == WeightsName(expected, "fp16", "safetensors")


@pytest.mark.parametrize(
    ("library", "constant"), [("diffusers", "SAFETENSORS_WEIGHTS_NAME"), ("transformers", "SAFE_WEIGHTS_NAME")]
)
def test_the_stems_in_safetensors_are_the_libraries(library: str, constant: str) -> None:
    module = import_module(f"{library}.utils")
    name = WeightsName(module.WEIGHTS_NAME.removesuffix(".bin"), None, "bin")
    assert name.single == module.WEIGHTS_NAME
    assert name.in_format("safetensors").single == getattr(module, constant)


@pytest.mark.parametrize("tag", ["fp16", "bf16", "fp8_e4m3fn", "non_ema", "my-own", "A1", "00001-of-00002"])
def test_a_variant_that_diffusers_finds(tag: str) -> None:
    assert check_variant(tag) == tag
    assert WeightsName("model", tag, "bin").single.split(".")[1] == tag


@pytest.mark.parametrize(
    "tag",
    ["", ".", "..", "fp8.e4m3", "a b", "a/b", "a\\b", "-a", "a-", "fp16\n", "é", "C:x", "x-00001-of-00002"],
)  # fmt: skip
def test_a_variant_that_some_loader_would_not_find(tag: str) -> None:
    with pytest.raises(BadRequest):
        check_variant(tag)

"""The real loaders as outside judges: what `wconv to-safetensors` writes is what they would have written.

Every tiny model, from single and from sharded `.bin`, beside its source and into a new folder: `from_pretrained` loads
it without a word, every tensor has the source's bits, a forward pass gives the same numbers but for rounding, and each
file has the bytes that `safetensors.torch.save_file` writes.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import itertools
import json
import logging
import shutil
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.judges import Listener, assert_close_outputs

StateDict = dict[str, torch.Tensor]

MODEL_NAMES = ["sd", "sdxl", "t5", "llama_tied", "llama_untied", "clip"]
LIBRARIES = ["diffusers", "transformers", "accelerate", "huggingface_hub"]
PLAIN_METADATA = {"format": "pt"}
TIES = {
    "t5": {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
        "lm_head.weight": "shared.weight",
    },
    "llama_tied": {"lm_head.weight": "model.embed_tokens.weight"},
}


@dataclass(frozen=True)
class Conversion:
    """A converted folder, the model in memory it must equal, the `.bin` folder it came from, what wconv said."""

    name: str
    shards: int
    model: Any
    source: Path
    folder: Path
    said: str


CASES = list(itertools.product(MODEL_NAMES, [1, 3], ["beside", "new"]))
BESIDE = [case for case in CASES if case[2] == "beside"]
SHARDED_BESIDE = [case for case in BESIDE if case[1] > 1]


def case_id(case: tuple[str, int, str]) -> str:
    """Name a case: model, shards, place."""
    return "-".join(map(str, case))


@pytest.fixture(scope="module", params=CASES, ids=case_id)
def conversion(
    request: pytest.FixtureRequest,
    wconv: Callable[..., Any],
    saved_model: Callable[..., tuple[Any, Path]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Conversion:
    name, shards, place = request.param
    model, source = saved_model(name, shards)
    folder = tmp_path_factory.mktemp("converted") / "model"
    if place == "new":
        outcome = wconv("to-safetensors", source, "-o", folder)
    else:
        shutil.copytree(source, folder)
        outcome = wconv("to-safetensors", folder)
    return Conversion(name, shards, model, source, folder, outcome.stdout)


def test_loads_silently_with_the_same_bits_and_numbers(conversion: Conversion, builders: Any) -> None:
    loaded = load_silently(conversion.model, conversion.folder)
    assert_same_weights(builders, loaded, conversion.model)
    assert_close_outputs(builders.forward(loaded), builders.forward(conversion.model))


@pytest.mark.parametrize("conversion", BESIDE, ids=case_id, indirect=True)
def test_beside_the_source_it_is_not_the_bin_that_loads(conversion: Any, builders: Any) -> None:
    loaded = load_silently(conversion.model, conversion.folder, use_safetensors=True)
    assert_same_weights(builders, loaded, conversion.model)


@pytest.mark.parametrize("conversion", SHARDED_BESIDE, ids=case_id, indirect=True)
def test_the_printed_line_loads_it(conversion: Any, builders: Any) -> None:
    *setup, load = ast.parse(textwrap.dedent(conversion.said.split("Load it with:\n")[1])).body
    assert isinstance(load, ast.Expr)
    scope: dict[str, Any] = {}
    exec(compile(ast.Module(setup, []), "<said>", "exec"), scope)
    loaded = eval(compile(ast.Expression(load.value), "<said>", "eval"), scope)
    assert type(loaded) is type(conversion.model)
    assert_same_weights(builders, loaded, conversion.model)


def test_no_key_is_missing_or_left_over(conversion: Conversion, builders: Any) -> None:
    for name, part in builders.models_in(conversion.model).items():
        _, report = type(part).from_pretrained(conversion.folder / name, output_loading_info=True)
        assert not any(report.values()), report


def test_every_component_has_as_many_files_as_before(conversion: Conversion, builders: Any) -> None:
    for name in builders.models_in(conversion.model):
        files = sorted((conversion.folder / name).glob("*.safetensors"))
        assert len(files) == conversion.shards


def test_each_file_has_the_bytes_that_save_file_writes(conversion: Conversion, tmp_path: Path) -> None:
    state_dicts: dict[Path, Any] = {folder.parent: {} for folder in conversion.source.rglob("*.bin")}
    for folder, state in state_dicts.items():
        state.update(read_bins(folder.glob("*.bin")))
        written = list((conversion.folder / folder.relative_to(conversion.source)).glob("*.safetensors"))
        assert written
        for path in written:
            assert_as_save_file_writes(path, state, tmp_path / "reference.safetensors")


def test_index_is_complete(conversion: Conversion, builders: Any) -> None:
    for name in builders.models_in(conversion.model):
        indexes = list((conversion.folder / name).glob("*.safetensors.index.json"))
        assert len(indexes) == (conversion.shards > 1)
        for path in indexes:
            assert_complete_index(path)


def test_ties_are_recorded_where_the_kept_name_is(conversion: Conversion) -> None:
    recorded = {}
    for path in conversion.folder.rglob("*.safetensors"):
        names, metadata = read_header(path)
        ties = {dropped: kept for dropped, kept in metadata.items() if dropped != "format"}
        assert metadata == {**PLAIN_METADATA, **ties}
        assert set(ties.values()) <= names
        recorded.update(ties)
    assert recorded == TIES.get(conversion.name, {})


def test_source_stays_as_it_was(conversion: Conversion) -> None:
    before = digests(conversion.source)
    assert not [path for path in before if path.endswith(".safetensors")]
    here = conversion.folder if (conversion.folder / "config.json").exists() else conversion.folder / "unet"
    beside = any(here.glob("*.bin"))
    assert {path: digest for path, digest in digests(conversion.folder).items() if path in before} == {
        path: digest for path, digest in before.items() if beside or not weights_file(path)
    }


@pytest.mark.parametrize("place", ["beside", "new"])
@pytest.mark.parametrize("name", ["sd_bin_sharded", "sd_bin_sharded_today"])
@pytest.mark.parametrize("options", [(), ("--max-shard-size", "none")], ids=["shards", "merged"])
def test_founding_folders_load(
    name: str,
    options: tuple[Any, ...],
    place: str,
    founding_folders: dict[str, Path],
    builders: Any,
    copy_of: Callable[[Path], Path],
    wconv: Callable[..., Any],
) -> None:
    folder = copy_of(founding_folders[name])
    pipeline_class = builders.StableDiffusionPipeline
    with pytest.raises(OSError, match=r"no file named diffusion_pytorch_model\.bin found in directory .*unet"):
        pipeline_class.from_pretrained(folder)
    if place == "new":
        source, folder = folder, folder.with_name("out")
        wconv("to-safetensors", source, "-o", folder, *options)
    else:
        wconv("to-safetensors", folder, *options)
    expected = builders.make_sd(safety_checker=False)
    loaded = load_silently(expected, folder)
    assert_same_weights(builders, loaded, expected)
    assert_close_outputs(builders.forward(loaded), builders.forward(expected))
    assert len(list((folder / "unet").glob("*.safetensors"))) == (1 if options else builders.SHARDS)
    assert len(list((folder / "unet").glob("*.safetensors.index.json"))) == (0 if options else 1)


SPELLINGS = ["single", "current", "legacy", "legacy_index"]


def add_variant(builders: Any, model: Any, folder: Path, spelling: str) -> None:
    """Add the model in fp16 to a folder, tagged, under one of the spellings that were ever written."""
    builders.save_bin(model, folder, 1 if spelling == "single" else 3, "fp16")
    for path in [folder, *folder.iterdir()] if spelling.startswith("legacy") else []:
        if path.is_dir():
            builders.respell_legacy(path, "fp16", index_too=spelling == "legacy_index")


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", ["sd", "clip", "llama_tied"])
def test_both_sets_load_beside_their_source(
    name: str,
    spelling: str,
    builders: Any,
    saved_model: Callable[..., tuple[Any, Path]],
    copy_of: Callable[[Path], Path],
    wconv: Callable[..., Any],
) -> None:
    full, source = saved_model(name, 3)
    half = builders.MODELS[name]().to(dtype=torch.float16)
    folder = copy_of(source)
    add_variant(builders, half, folder, spelling)
    wconv("to-safetensors", folder)
    wishes = {"variant": "fp16", "dtype": torch.float16, "use_safetensors": True}
    assert_same_weights(builders, type(half).from_pretrained(folder, **wishes), half)
    # diffusers warns of shards in the legacy spelling for as long as the source is there.
    remove_bins(folder)
    assert_same_weights(builders, load_silently(half, folder, **wishes), half)
    assert_same_weights(builders, load_silently(full, folder), full)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", ["sd", "clip"])
def test_a_folder_with_only_a_variant_loads(
    name: str, spelling: str, builders: Any, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    half = builders.MODELS[name]().to(dtype=torch.float16)
    add_variant(builders, half, tmp_path / "source", spelling)
    folder = tmp_path / "out"
    wconv("to-safetensors", tmp_path / "source", "-o", folder)
    loaded = load_silently(half, folder, variant="fp16", dtype=torch.float16)
    assert_same_weights(builders, loaded, half)


def test_one_variant_of_two_into_a_new_folder(
    builders: Any,
    saved_model: Callable[..., tuple[Any, Path]],
    copy_of: Callable[[Path], Path],
    wconv: Callable[..., Any],
) -> None:
    half = builders.MODELS["sd"]().to(dtype=torch.float16)
    source = copy_of(saved_model("sd", 1)[1])
    add_variant(builders, half, source, "current")
    folder = source.with_name("out")
    wconv("to-safetensors", source, "-o", folder, "--from-variant", "fp16")
    loaded = load_silently(half, folder, variant="fp16", dtype=torch.float16)
    assert_same_weights(builders, loaded, half)
    assert not list(folder.rglob("model.safetensors")) + list(folder.rglob("diffusion_pytorch_model.safetensors"))


@pytest.mark.parametrize("shards", [1, 3])
def test_aliases_of_a_model_that_is_not_tied_are_all_written(
    shards: int, builders: Any, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    model = builders.make_llama(tied=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    builders.save_bin(model, tmp_path / "source", shards)
    assert json.loads((tmp_path / "source/config.json").read_text())["tie_word_embeddings"] is False
    folder = tmp_path / "out"
    wconv("to-safetensors", tmp_path / "source", "-o", folder)
    assert_nothing_dropped(folder, model.state_dict())
    assert_same_weights(builders, load_silently(model, folder), model)


def test_a_lone_file_has_every_name_that_load_state_dict_wants(tmp_path: Path, wconv: Callable[..., Any]) -> None:
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 4), "head": torch.nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    wconv("to-safetensors", tmp_path / "plain.pt")
    model.load_state_dict(load_file(tmp_path / "plain.safetensors"))


@pytest.mark.parametrize("shards", [1, 3])
def test_aliases_in_a_diffusers_component_are_all_written(
    shards: int, builders: Any, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    model = builders.make_unet()
    model.mid_block.resnets[1].norm1.weight = model.mid_block.resnets[0].norm1.weight
    state = model.state_dict()
    builders.save_model_bin(model, tmp_path / "source")
    (tmp_path / "source/diffusion_pytorch_model.bin").unlink()
    builders.save_state_bin(state, tmp_path / "source", "diffusion_pytorch_model", shards)
    folder = tmp_path / "out"
    wconv("to-safetensors", tmp_path / "source", "-o", folder)
    assert_nothing_dropped(folder, state)
    assert_same_weights(builders, load_silently(model, folder), model)


def test_tied_duplicate_writes_every_name(
    builders: Any, saved_model: Callable[..., tuple[Any, Path]], tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    model, source = saved_model("t5", 3)
    folder = tmp_path / "out"
    wconv("to-safetensors", source, "-o", folder, "--tied", "duplicate")
    assert_nothing_dropped(folder, model.state_dict())
    assert_same_weights(builders, load_silently(model, folder), model)


@pytest.mark.parametrize("limit", ["50KB", "300KB", "10GB"])
def test_shards_are_cut_where_huggingface_hub_cuts_them(
    limit: str, saved_model: Callable[..., tuple[Any, Path]], tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    _, source = saved_model("sd", 1)
    wconv("to-safetensors", source / "unet", "-o", tmp_path / "out", "--max-shard-size", limit)
    state = torch.load(source / "unet/diffusion_pytorch_model.bin", weights_only=True)
    split = split_torch_state_dict_into_shards(
        dict(state), max_shard_size=limit, filename_pattern="diffusion_pytorch_model{suffix}.safetensors"
    )
    written = {path.name: read_header(path)[0] for path in (tmp_path / "out").glob("*.safetensors")}
    assert written == {file: set(names) for file, names in split.filename_to_tensors.items()}


def load_silently(like: Any, folder: Path, **wishes: Any) -> Any:
    """Load with `from_pretrained` of the model's own class; nothing may be logged, warned or printed."""
    with heard() as said:
        loaded = type(like).from_pretrained(folder, **wishes)
    assert said == []
    return loaded


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """Collect every Python warning, and every library log record from WARNING on."""
    said: list[str] = []
    handler = Listener(said)
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for logger in loggers:
            logger.addHandler(handler)
        try:
            yield said
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
            said += [f"{item.category.__name__}: {item.message}" for item in caught]


def assert_same_weights(builders: Any, one: Any, other: Any) -> None:
    """Check that two models, or all components of two pipelines, hold the same bits under the same names."""
    parts, others = builders.models_in(one), builders.models_in(other)
    assert parts.keys() == others.keys()
    for name, part in parts.items():
        assert_same_bits(part.state_dict(), others[name].state_dict())


def assert_same_bits(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    """Check names, dtypes, shapes and bits."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        assert torch.equal(bits(tensor), bits(other[name])), name


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor's bytes, so that NaN equals NaN and 0 is not -0."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_as_save_file_writes(path: Path, state: StateDict, reference: Path) -> None:
    """Check a file's bytes against `save_file`; where ties are recorded, all but the order of the metadata."""
    names, metadata = read_header(path)
    save_file({name: state[name] for name in names}, reference, metadata=metadata)
    assert_same_bits(load_file(path), {name: state[name] for name in names})
    if metadata == PLAIN_METADATA:
        assert path.read_bytes() == reference.read_bytes()
    else:
        assert split_file(path) == split_file(reference)


def split_file(path: Path) -> tuple[list[tuple[str, Any]], bytes]:
    """Return the header's tensors in their order, and the data."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    assert header.pop("__metadata__")
    return list(header.items()), raw[end:]


def assert_complete_index(path: Path) -> None:
    """Check that an index names exactly what its shards store, in order, and counts it."""
    raw = path.read_text(encoding="utf-8")
    index = json.loads(raw)
    stored: dict[str, str] = {}
    tensors: StateDict = {}
    for shard in path.parent.glob("*.safetensors"):
        tensors.update(load_file(shard))
        stored.update(dict.fromkeys(read_header(shard)[0], shard.name))
    assert index["weight_map"] == stored
    assert list(index["weight_map"]) == sorted(stored)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert raw == json.dumps(index, indent=2, sort_keys=True) + "\n"


def assert_nothing_dropped(folder: Path, state: StateDict) -> None:
    """Check that every name of the state dict is stored and no tie recorded."""
    headers = [read_header(path) for path in folder.glob("*.safetensors")]
    assert set().union(*(names for names, _ in headers)) == state.keys()
    assert all(metadata == PLAIN_METADATA for _, metadata in headers)


def read_header(path: Path) -> tuple[set[str], dict[str, str]]:
    """Return a safetensors file's names and metadata, by its own reader."""
    with safe_open(path, framework="pt") as file:
        return set(file.keys()), file.metadata()


def read_bins(paths: Iterator[Path]) -> StateDict:
    """Return the tensors of some `.bin` files, by torch."""
    state: StateDict = {}
    for path in paths:
        state.update(torch.load(path, weights_only=True))
    return state


def remove_bins(folder: Path) -> None:
    """Remove every `.bin` and every index of some."""
    for path in [*folder.rglob("*.bin"), *folder.rglob("*.bin*.json")]:
        path.unlink()


def weights_file(path: str) -> bool:
    """Say whether a path is a `.bin` or its index."""
    return path.endswith((".bin", ".bin.index.json"))


def digests(folder: Path) -> dict[str, str]:
    """Return the digest of every file by its path below the folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }

"""Checkpoints of torch.distributed.checkpoint: torch wrote them, and what torch's reader gives is the judge."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from support.tiny import assert_same, make_state, snapshot
from support.training import NAMES, unpack
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from converter.errors import BadFile
from converter.formats.torch.state_dict import Reading
from converter.models.checkpoint import open_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:.*TypedStorage")

# What is chosen by --key, and what its names begin with in the whole; what is left out begins otherwise.
CHOICES: dict[str, tuple[tuple[str | None, str], ...]] = {
    "dcp-ema": (("model", "model."), ("ema", "ema.")),
    "dcp-plain": (("model", "model."), ("list.2", "list.2."), ("optim.state.0.bias", "optim.state.0.bias.")),
}
REFUSED = {
    "dcp-per-rank": "of which each rank keeps its own .metadata",
    "dcp-zstd": "is packed (stream.zstd/1)",
    "dcp-safetensors-items": "holds safetensors, and .metadata does not fit that",
}
SAMPLES = [name for name in NAMES if name.startswith("dcp") and name not in REFUSED]
LEFT_OUT = ("optimizer.", "train_state.")


@pytest.mark.parametrize("name", SAMPLES)
def test_what_torch_wrote_is_read_as_torch_reads_it(wconv: Callable[..., Any], tmp_path: Path, name: str) -> None:
    folder, judge, order = unpack(name, tmp_path)
    before = snapshot(folder)
    is_below = all(key.startswith("model.") for key in order)
    for number, (key, prefix) in enumerate(CHOICES.get(name, ((None, "model." if is_below else ""),))):
        names = [one for one in order if one.startswith(prefix) and not one.startswith(LEFT_OUT)]
        output = tmp_path / str(number)
        wconv("to-safetensors", folder, "-o", output, *(("--key", key) if key else ()))
        assert_same(load_file(output / "model.safetensors"), {one.removeprefix(prefix): judge[one] for one in names})
        if "hf" not in name:  # which sorts them by size
            read = [tensor.name for tensor in open_checkpoint(folder / ".metadata", Reading(key)).tensors]
            assert read == [one.removeprefix(prefix) for one in names]
    assert snapshot(folder) == before


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_name(wconv: Callable[..., Any], tmp_path: Path, name: str) -> None:
    folder, _, _ = unpack(name, tmp_path)
    assert REFUSED[name] in wconv("to-safetensors", folder, "-o", tmp_path / "out", exit_code=4).stderr
    assert not (tmp_path / "out").exists()
    wconv("doctor", folder, exit_code=None)


def test_several_state_dicts_are_listed(wconv: Callable[..., Any], tmp_path: Path) -> None:
    folder, _, _ = unpack("dcp-ema", tmp_path)
    said = wconv("to-safetensors", folder, "-o", tmp_path / "out", exit_code=2).stderr
    assert "holds several state dicts: model (8 tensors, 188 bytes), ema (8 tensors, 184 bytes)" in said
    assert "Choose one with --key." in said


def test_what_is_left_out_is_named_with_its_size(wconv: Callable[..., Any], tmp_path: Path) -> None:
    folder, _, _ = unpack("dcp-torchtitan", tmp_path)
    told = json.loads(wconv("inspect", folder, "--json").stdout)
    ((one,), notes) = told["weight_sets"], told["weight_sets"][0]["notes"]
    assert (one["format"], one["tensors"], len(one["files"])) == ("DCP", 8, 5)
    assert any("left out: optimizer (98,165 bytes), lr_scheduler (2,522 bytes)" in note for note in notes)
    assert "objects" not in str(notes)  # of what every .metadata has


# A trainer's folder, with the config and the tokenizer near it.


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run of a trainer: the last step in a folder of its own, the config around it."""
    root = tmp_path / "run"
    dcp.save({"model": make_state("ab")}, checkpoint_id=root / "checkpoint-5" / "pytorch_model_fsdp_0", no_dist=True)
    dcp.save({"optimizer": make_state("ab")}, checkpoint_id=root / "checkpoint-5" / "optimizer_0", no_dist=True)
    (root / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (root / "tokenizer.json").write_text("{}")
    (root / "training_args.bin").write_bytes(b"?")
    (root / "checkpoint-5" / "trainer_state.json").write_text("{}")
    return root


@pytest.mark.parametrize("inner", ["checkpoint-5", "checkpoint-5/pytorch_model_fsdp_0"])
def test_config_and_tokenizer_come_from_around(
    wconv: Callable[..., Any], trained: Path, tmp_path: Path, inner: str
) -> None:
    before = snapshot(trained)
    told = wconv("to-safetensors", trained / inner, "-o", tmp_path / "out", "--dtype", "bf16").stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert f"config.json, tokenizer.json taken from {trained}" in told
    assert "LlamaForCausalLM.from_pretrained" in told
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    bf16 = {name: tensor.bfloat16() for name, tensor in make_state("ab").items()}
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), bf16)
    assert snapshot(trained) == before
    wconv("verify", trained / inner, tmp_path / "out", "--cast")


def test_torch_loads_what_comes_out_into_a_new_run(wconv: Callable[..., Any], trained: Path, tmp_path: Path) -> None:
    """The other way is no work: its reader for Hugging Face takes any folder of safetensors, shards too."""
    wconv("to-safetensors", trained / "checkpoint-5", "-o", tmp_path / "out", "--max-shard-size", "40B")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
    state = {name: torch.zeros_like(tensor) for name, tensor in make_state("ab").items()}
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path / "out")), no_dist=True)
    assert_same(state, make_state("ab"))


def test_what_stays_behind_is_named(wconv: Callable[..., Any], trained: Path, tmp_path: Path) -> None:
    told = wconv("to-safetensors", trained / "checkpoint-5", "-o", tmp_path / "out").stdout
    assert "not carried over: optimizer_0/ (the state of an optimizer: 2 files, " in told
    assert "the weights are float32, as they were trained: --dtype bf16 halves the size" in told
    assert "holds no weights. Name one of its folders that do: checkpoint-5." in wconv(
        "to-safetensors", trained, "-o", tmp_path / "other", exit_code=3).stderr  # fmt: skip


def test_beside_the_source_the_config_comes_too(wconv: Callable[..., Any], trained: Path) -> None:
    (trained / "checkpoint-5" / "tokenizer.json").write_text('{"mine": 1}')
    wconv("to-safetensors", trained / "checkpoint-5")
    assert (trained / "checkpoint-5" / "config.json").is_file()
    assert (trained / "checkpoint-5" / "model.safetensors").is_file()
    assert (trained / "checkpoint-5" / "tokenizer.json").read_text() == '{"mine": 1}'
    wconv("inspect", trained / "checkpoint-5")


def test_the_config_may_be_named(wconv: Callable[..., Any], trained: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    source = trained / "checkpoint-5"
    refused = wconv("to-safetensors", source, "-o", tmp_path / "out", "--config", base, exit_code=3)
    assert "has no config.json" in refused.stderr
    (base / "config.json").write_text('{"architectures": ["MistralForCausalLM"]}')
    (base / "model.safetensors").write_bytes(b"no weights go along")
    (base / "README.md").write_text("nor this")
    (base / "vocab.txt").symlink_to(trained / "training_args.bin")
    told = wconv("to-safetensors", source, "-o", tmp_path / "out", "--config", base).stdout
    assert "MistralForCausalLM.from_pretrained" in told
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    assert "Mistral" in (tmp_path / "out" / "config.json").read_text()


def test_a_folder_of_hugging_face_beside_the_weights_goes_first(
    wconv: Callable[..., Any], trained: Path, tmp_path: Path
) -> None:
    inner = trained / "checkpoint-5" / "huggingface"
    inner.mkdir()
    (inner / "config.json").write_text('{"architectures": ["Qwen2ForCausalLM"]}')
    (inner / "merges.txt").write_text("")
    wconv("to-safetensors", trained / "checkpoint-5", "-o", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "merges.txt", "model.safetensors"}
    assert "Qwen2" in (tmp_path / "out" / "config.json").read_text()


def test_a_config_that_is_no_models_or_elsewhere_is_not_found(
    wconv: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    """A folder called ``model`` leads up to a home folder, and one that a stranger made to wherever its links do."""
    home = tmp_path / "home"
    model = Path(shutil.copytree(folder, home / "model"))
    (home / "config.json").write_text('{"editor": "vi"}')
    (home / "tokenizer.json").write_text("{}")
    wconv("to-safetensors", model, "-o", tmp_path / "a")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "private" / "vocab.json").write_text("{}")
    (model / "huggingface").symlink_to(tmp_path / "private")
    wconv("to-safetensors", model, "-o", tmp_path / "b")
    (model / "huggingface").unlink()
    (model / "huggingface").mkdir()
    (model / "huggingface" / "config.json").symlink_to(tmp_path / "private" / "config.json")
    wconv("to-safetensors", model, "-o", tmp_path / "c")
    for out in "abc":
        assert [path.name for path in (tmp_path / out).iterdir()] == ["model.safetensors"]
    (home / "config.json").write_text('{"model_type": "llama"}')
    (home / "vocabulary of mine.odt").write_text("")
    wconv("to-safetensors", model, "-o", tmp_path / "d")
    taken = {path.name for path in (tmp_path / "d").iterdir()}
    assert taken == {"config.json", "tokenizer.json", "model.safetensors"}


def test_the_doctor_says_what_it_is(wconv: Callable[..., Any], trained: Path) -> None:
    told = json.loads(wconv("doctor", trained / "checkpoint-5", "--json").stdout)
    (one,) = told["findings"]
    assert (one["code"], one["severity"]) == ("training-checkpoint", "note")
    assert "(DCP, 2 files)" in one["problem"]
    before = snapshot(trained)
    wconv("doctor", trained / "checkpoint-5", "--fix")
    assert snapshot(trained) == before


@pytest.mark.parametrize("options", [(), ("--keep", "single"), ("--keep", "bin"), ("--only-variant", "bf16")])
def test_the_doctor_moves_no_training_checkpoint_away(
    wconv: Callable[..., Any], folder: Path, options: Sequence[str], tmp_path: Path
) -> None:
    """Of two steps that have the same weights each has an optimizer's state of its own."""
    for step in ("step-1", "step-2"):
        shutil.copytree(folder, tmp_path / "run" / step)
    wconv("to-safetensors", tmp_path / "run" / "step-1")
    shutil.copytree(tmp_path / "run" / "step-1", tmp_path / "one")
    if "--only-variant" in options:
        wconv("recast", tmp_path / "one" / "model.safetensors", "--dtype", "bf16", "--variant", "bf16")
        (tmp_path / "one" / "model.safetensors").unlink()
    (tmp_path / "run" / "step-1" / "model.safetensors").unlink()
    before = snapshot(tmp_path)
    assert "sets-twice" not in wconv("doctor", tmp_path / "run").stdout
    for place in ("run", "one"):
        wconv("doctor", tmp_path / place, "--fix", *options, exit_code=None)
        assert snapshot(tmp_path) == before


# Malice and damage. torch's own reader would run what is in these pickles.


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tensor of 4 x 6 in two boxes, and one of bytes."""
    folder, _, _ = unpack("dcp-mesh2d", tmp_path_factory.mktemp("dcp"))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "m"))


def edited(folder: Path, edit: Callable[[Any], object]) -> Path:
    """Change what .metadata says, as torch's own classes."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, 4))
    return folder


def chunks_of(metadata: Any, name: str = "a") -> Any:
    return metadata.state_dict_metadata[name].chunks


def items_of(metadata: Any, name: str = "a") -> list[Any]:
    return [stored for key, stored in metadata.storage_data.items() if key.fqn == name]


def box(*numbers: int) -> ChunkStorageMetadata:
    half = len(numbers) // 2
    return ChunkStorageMetadata(torch.Size(numbers[:half]), torch.Size(numbers[half:]))


def move(metadata: Any, name: str, place: int, *start: int) -> None:
    """Have a box begin elsewhere, in both tables."""
    chunk = chunks_of(metadata, name)[place]
    old = next(key for key in metadata.storage_data if (key.fqn, key.offset) == (name, chunk.offsets))
    metadata.storage_data[MetadataIndex(name, torch.Size(start))] = metadata.storage_data.pop(old)
    chunk.offsets = torch.Size(start)


def resize(metadata: Any, *size: int) -> None:
    metadata.state_dict_metadata["a"].size = torch.Size(size)


EDITS: dict[str, tuple[Callable[[Any], object], str]] = {
    "overlap": (lambda m: move(m, "a", 1, 0, 2), "overlap"),
    "outside": (lambda m: move(m, "a", 1, 0, 4), "a"),
    "hole": (lambda m: chunks_of(m).pop(), "'a'"),
    "larger": (lambda m: resize(m, 9, 6), "'a'"),
    "huge": (lambda m: resize(m, 1 << 40, 1 << 40), "'a'"),
    "a box twice": (lambda m: chunks_of(m).append(chunks_of(m)[0]), "do not fill"),
    "no item": (lambda m: m.storage_data.pop(next(k for k in m.storage_data if k.fqn == "a")), "does not say where"),
    "another file": (lambda m: setattr(items_of(m)[0], "relative_path", "__9_0.distcp"), "is not there"),
    "beyond the file": (lambda m: setattr(items_of(m)[0], "offset", 1 << 50), "ends before"),
    "an item too short": (lambda m: setattr(items_of(m)[0], "length", 100), "__0_0.distcp"),
    "an item of another": (lambda m: setattr(items_of(m)[0], "offset", items_of(m, "b")[0].offset), "within another"),
    "another dtype": (lambda m: setattr(m.state_dict_metadata["a"].properties, "dtype", torch.int32), "'a'"),
    "negative offset": (lambda m: setattr(items_of(m)[0], "offset", -1), "does not describe a checkpoint"),
    "no numbers": (lambda m: setattr(items_of(m)[0], "length", "many"), "does not describe a checkpoint"),
    "above": (lambda m: setattr(items_of(m)[0], "relative_path", "../m/__0_0.distcp"), "which is no name of a file"),
    "absolute": (lambda m: setattr(items_of(m)[0], "relative_path", "/etc/passwd"), "which is no name of a file"),
    "this folder": (lambda m: setattr(items_of(m)[0], "relative_path", "."), "which is no name of a file"),
    "no tables": (lambda m: setattr(m, "storage_data", None), "does not describe a checkpoint"),
    "no path": (lambda m: m.planner_data.update(a=()), "does not describe a checkpoint"),
    "a path through a tensor": (lambda m: m.planner_data.update(a=("b", "x")), "in the place of"),
    "two of one path": (lambda m: m.planner_data.update(a=("b",)), "in the place of"),
    "a deep path": (lambda m: m.planner_data.update(a=("x",) * 1000), "does not describe a checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "said"), EDITS.values(), ids=EDITS)
def test_what_is_wrong_is_refused(
    wconv: Callable[..., Any], folder: Path, tmp_path: Path, edit: Callable[[Any], object], said: str
) -> None:
    told = wconv("to-safetensors", edited(folder, edit), "-o", tmp_path / "out", exit_code=3).stderr
    assert said in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_boxes_without_elements_may_begin_anywhere(folder: Path, tmp_path: Path, wconv: Callable[..., Any]) -> None:
    edited(folder, lambda m: chunks_of(m).append(box(1 << 40, 0, 0, 6)))
    wconv("to-safetensors", folder, "-o", tmp_path / "out")


def test_code_in_metadata_is_not_run(wconv: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    edited(folder, lambda m: setattr(m, "planner_data", _Touch(canary)))
    for command in (("to-safetensors", folder, "-o", tmp_path / "out"), ("inspect", folder), ("doctor", folder)):
        wconv(*command, exit_code=None)
    said = wconv("to-safetensors", folder, "-o", tmp_path / "out", exit_code=3).stderr
    assert "Nothing in it was run." in said
    assert not canary.exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert canary.exists()  # as it would have been


def test_code_in_an_item_is_not_run(wconv: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    raw = io.BytesIO()
    torch.save(_Touch(canary), raw)
    path = folder / "__0_0.distcp"
    nbytes = path.stat().st_size
    path.write_bytes(path.read_bytes() + raw.getvalue())

    def point(metadata: Any) -> None:
        stored = items_of(metadata)[0]
        stored.relative_path, stored.offset, stored.length = path.name, nbytes, len(raw.getvalue())

    edited(folder, point)
    assert "__0_0.distcp" in wconv("to-safetensors", folder, "-o", tmp_path / "out", exit_code=3).stderr
    assert not canary.exists()


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_file_cut_short(wconv: Callable[..., Any], folder: Path, tmp_path: Path, name: str) -> None:
    raw = (folder / name).read_bytes()
    (folder / name).write_bytes(raw[: len(raw) // 2])
    assert name in wconv("to-safetensors", folder, "-o", tmp_path / "out", exit_code=3).stderr


def test_a_link_below_is_not_followed(wconv: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    outer.mkdir()
    (outer / "pytorch_model_fsdp_0").symlink_to(folder)
    assert "holds no weights" in wconv("to-safetensors", outer, "-o", tmp_path / "out", exit_code=3).stderr


def test_of_several_of_deepspeed_the_latest(wconv: Callable[..., Any], tmp_path: Path) -> None:
    for step, letters in ((1, "ab"), (2, "cd")):
        dcp.save({"model": make_state(letters)}, checkpoint_id=tmp_path / "m" / f"step-{step}", no_dist=True)
    said = wconv("to-safetensors", tmp_path / "m", "-o", tmp_path / "out", exit_code=2).stderr
    assert "has several training checkpoints: step-1 and step-2." in said
    (tmp_path / "m" / "latest").write_text("step-9")
    wconv("to-safetensors", tmp_path / "m", "-o", tmp_path / "out", exit_code=2)
    (tmp_path / "m" / "latest").write_text("step-2\n")
    wconv("to-safetensors", tmp_path / "m", "-o", tmp_path / "out")
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), make_state("cd"))


# In safetensors.


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder, _, _ = unpack("dcp-hf", tmp_path)
    return folder


def test_a_rank_that_is_missing(wconv: Callable[..., Any], shards: Path, tmp_path: Path) -> None:
    (shards / "shard-00002-model-00001-of-00001.safetensors").unlink()
    said = wconv("to-safetensors", shards, "-o", tmp_path / "out", exit_code=3).stderr
    assert "has files of ranks up to 4, and none of rank 2" in said


def test_what_the_consolidated_files_lack_comes_from_the_pieces(wconv: Callable[..., Any], tmp_path: Path) -> None:
    """``consolidate_safetensors_files`` of torch 2.13 writes 0.0 for a tensor without axes."""
    folder, judge, _ = unpack("dcp-hf-scalar", tmp_path)
    wrong = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
    assert wrong["scalar"] == 0 != judge["scalar"]
    told = wconv("to-safetensors", folder, "-o", tmp_path / "out").stdout
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), judge)
    assert "not carried over: model-00001-of-00002.safetensors" in told


def test_a_piece_alone_is_refused(wconv: Callable[..., Any], shards: Path, tmp_path: Path) -> None:
    piece = next(shards.iterdir()).rename(tmp_path / "model.safetensors")
    assert "holds pieces of tensors" in wconv("recast", piece, "--dtype", "bf16", exit_code=4).stderr


def test_starts_that_are_none(wconv: Callable[..., Any], shards: Path, tmp_path: Path) -> None:
    path = shards / "shard-00002-model-00001-of-00001.safetensors"
    raw = path.read_bytes()
    for wrong in (b"[99", b'["x', b"[-9"):
        path.write_bytes(raw.replace(b"[2,", wrong, 1) if b"[2," in raw else raw.replace(b"[2", wrong, 1))
        if path.read_bytes() != raw:
            wconv("to-safetensors", shards, "-o", tmp_path / "out", exit_code=3)


def test_a_set_opened_by_the_name_of_a_piece(folder: Path) -> None:
    with pytest.raises(BadFile, match="which is not there"):
        open_checkpoint(folder / "gone.distcp")
    assert len(open_checkpoint(folder / "__1_0.distcp").tensors) == 11

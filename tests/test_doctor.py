"""The doctor on broken folders: what it finds, what the real loaders do with them, the mending, and the way back.

Each case breaks a folder that the real libraries have saved. The judge of every prediction is the loader itself:
whether it loads, and which files the kernel saw it open.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.judges import Listener
from support.opened import watched
from support.tiny import make_state, names_in, processor_time, save, write_json

from converter.doctor import Choices, diagnose
from converter.doctor.findings import KINDS
from converter.doctor.goals import FolderGoals, PartGoals
from converter.doctor.rules import REPAIRS
from converter.dtypes import DTYPES
from converter.libraries.predict import Prediction, likely_loaders, list_folder, predict
from converter.tensors.base import TensorSpec

Break = Callable[[Path], None]
pytestmark = pytest.mark.usefixtures("asked_here")

STEM = "diffusion_pytorch_model"


@dataclass(frozen=True)
class Case:
    """A folder to be broken, the codes of the errors and warnings then, and how it ends.

    ``fix`` are options for ``--fix``; None where it must leave everything as it is. ``same`` says that the model's
    values afterwards are those of before.
    """

    base: str
    break_it: Break
    codes: set[str]
    fix: tuple[str, ...] | None = ()
    deep: bool = False
    variants: tuple[str | None, ...] = (None,)
    same: bool = True


CASES: dict[str, Case] = {}


def case(base: str, *codes: str, **how: Any) -> Callable[[Break], Break]:
    """Make a case of a function that breaks a folder."""

    def add(break_it: Break) -> Break:
        CASES[break_it.__name__] = Case(base, break_it, set(codes), **how)
        return break_it

    return add


# The bases: small models as the libraries save them.


@pytest.fixture(scope="module")
def bases(builders: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("bases")

    def save(name: str) -> None:
        kind, _, form = name.partition("-")
        make = {"vae": builders.make_vae, "llama": lambda: builders.make_llama(tied=False), "sana": builders.make_sana}
        model = builders.shake(make[kind]())
        shards = 3 if "sharded" in form else 1
        if form == "bin":
            builders.save_bin(model, root / name, 3)
        else:
            builders.save_safetensors(model, root / name, shards)
        if "bf16" in form:
            for part_name, part in builders.models_in(model.to(torch.bfloat16)).items():
                limit = builders.shard_limit(part.state_dict(), 2) if "bf16sharded" in form else "10GB"
                part.save_pretrained(root / name / part_name, variant="bf16", max_shard_size=limit)
        if kind != "vae":
            # All variants share the config, and the one saved last has written its dtype into it.
            config = root / name / ("text_encoder" if kind == "sana" else "") / "config.json"
            edit_json(config, lambda content: content.update(dtype="float32"))

    def get(name: str) -> Path:
        if not (root / name).exists():
            save(name)
        return root / name

    return get


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")


def index_of(folder: Path) -> Path:
    """The untagged safetensors index of a folder."""
    return next(folder.glob("*.safetensors.index.json"))


def merge(folder: Path, name: str) -> None:
    """Write one file of all untagged shards; those stay."""
    state: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob(f"{name}-0*.safetensors")):
        state |= load_file(path)
    save_file(state, folder / f"{name}.safetensors", metadata={"format": "pt"})


def keep_only_bf16(folder: Path) -> None:
    """Remove the untagged weights of a folder."""
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        if ".bf16" not in path.name:
            path.unlink()


# Variants.


@case("sana-bf16sharded", "variant-single", variants=(None, "bf16"))
def a_variant_in_one_file_beside_shards(folder: Path) -> None:
    part = folder / "transformer"
    state: dict[str, torch.Tensor] = {}
    for path in sorted(part.glob("*.bf16-0*.safetensors")):
        state |= load_file(path)
        path.unlink()
    (part / f"{STEM}.safetensors.index.bf16.json").unlink()
    save_file(state, part / f"{STEM}.bf16.safetensors", metadata={"format": "pt"})


def split_untagged(part: Path) -> None:
    """Write the one untagged file of a Diffusers part as two shards with an index."""
    state = load_file(part / f"{STEM}.safetensors")
    (part / f"{STEM}.safetensors").unlink()
    names = sorted(state)
    weight_map: dict[str, str] = {}
    for number, mine in enumerate((names[::2], names[1::2]), 1):
        shard = f"{STEM}-{number:05d}-of-00002.safetensors"
        save_file({name: state[name] for name in mine}, part / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, shard)
    total = sum(tensor.nbytes for tensor in state.values())
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (part / f"{STEM}.safetensors.index.json").write_text(json.dumps(content))


@case("sana-bf16", "index-foreign", variants=(None, "bf16"))
def an_index_that_does_not_tell_them_apart(folder: Path) -> None:
    # The founding case: one bf16 file, untagged shards, and an index over all of them.
    part = folder / "transformer"
    split_untagged(part)
    names = sorted(load_file(part / f"{STEM}.bf16.safetensors"))
    tagged = dict.fromkeys(names[:5], f"{STEM}.bf16.safetensors")
    edit_json(index_of(part), lambda content: content["weight_map"].update(tagged))


@case("vae-bf16sharded", "index-foreign", "index-missing", variants=("bf16",))
def an_untagged_index_over_tagged_shards(folder: Path) -> None:
    keep_only_bf16(folder)
    (folder / f"{STEM}.safetensors.index.bf16.json").rename(folder / f"{STEM}.safetensors.index.json")


@case("sana-bf16", "variant-partial", variants=(None, "bf16"))
def a_variant_that_two_parts_lack(folder: Path) -> None:
    for part in ("vae", "text_encoder"):
        next((folder / part).glob("*.bf16.safetensors")).unlink()


@case("sana-bf16", "default-partial", variants=(None, "bf16"), same=False)
def untagged_weights_that_one_part_lacks(folder: Path) -> None:
    keep_only_bf16(folder / "transformer")


@case("sana-bf16", "default-partial", "variant-partial", variants=(None, "bf16"), same=False)
def a_tagged_part_beside_untagged_ones(folder: Path) -> None:
    keep_only_bf16(folder / "transformer")
    for part in ("vae", "text_encoder"):
        next((folder / part).glob("*.bf16.safetensors")).unlink()


@case("sana-bf16", "variant-partial", fix=("--keep-default",))
def a_variant_that_is_not_wanted(folder: Path) -> None:
    a_variant_that_two_parts_lack(folder)


@case("sana-bf16", "default-partial", fix=("--only-variant", "bf16"), variants=("bf16",), same=False)
def untagged_weights_that_are_not_wanted(folder: Path) -> None:
    keep_only_bf16(folder / "transformer")


# Two sets, and what is left of one.


@case("vae-sharded", "sets-twice")
def one_file_beside_its_shards(folder: Path) -> None:
    merge(folder, STEM)


@case("llama-sharded", "sets-twice")
def one_file_beside_its_shards_of_transformers(folder: Path) -> None:
    merge(folder, "model")


@case("vae-sharded", "sets-twice", fix=("--keep", "shards"))
def one_file_that_is_not_its_shards(folder: Path) -> None:
    merge(folder, STEM)
    single = folder / f"{STEM}.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(single).items()}, single, metadata={"format": "pt"})


@case("vae-sharded", "sets-twice", fix=None)
def one_file_that_is_not_its_shards_and_no_choice(folder: Path) -> None:
    one_file_that_is_not_its_shards(folder)


@case("vae-bf16sharded", "name-legacy", "sets-twice", variants=(None, "bf16"))
def two_indexes_over_the_same_shards(folder: Path) -> None:
    index = folder / f"{STEM}.safetensors.index.bf16.json"
    shutil.copy(index, folder / f"{STEM}.safetensors.bf16.index.json")


@case("vae-sharded", "index-dangling")
def an_index_that_save_pretrained_left(folder: Path) -> None:
    # Diffusers' own bug: one file saved over shards leaves their index.
    load(folder).save_pretrained(folder)
    assert (folder / f"{STEM}.safetensors").exists()
    assert not list(folder.glob("*-of-*"))
    assert index_of(folder).exists()


@case("vae-bf16sharded", "index-dangling")
def a_variant_that_save_pretrained_removed(folder: Path) -> None:
    # Diffusers' own bug: untagged shards saved over a sharded variant remove its shards, and leave its index.
    load(folder).save_pretrained(folder, max_shard_size="100KB")
    assert (folder / f"{STEM}.safetensors.index.bf16.json").exists()
    assert not list(folder.glob("*.bf16-0*"))
    (folder / f"{STEM}.safetensors").unlink(missing_ok=True)


@case("vae-bin", "index-dangling")
def a_bin_index_that_save_pretrained_left(folder: Path) -> None:
    # Diffusers' own bug: safetensors saved over .bin shards remove these, and leave their index.
    load(folder, use_safetensors=False).save_pretrained(folder)
    assert (folder / f"{STEM}.bin.index.json").exists()
    assert not list(folder.glob("*.bin"))


@case("vae-sharded", "shards-stray")
def shards_of_an_earlier_split(folder: Path) -> None:
    state = load_file(folder / f"{STEM}-00001-of-00003.safetensors")
    save_file(state, folder / f"{STEM}-00001-of-00005.safetensors", metadata={"format": "pt"})


@case("vae-sharded", "shard-missing", fix=None)
def a_shard_that_is_gone(folder: Path) -> None:
    (folder / f"{STEM}-00002-of-00003.safetensors").unlink()


@case("llama-sharded", "shard-missing", fix=None)
def shards_with_a_gap_and_no_index(folder: Path) -> None:
    index_of(folder).unlink()
    (folder / "model-00002-of-00003.safetensors").unlink()


# Indexes.


@case("vae-sharded", "index-missing")
def shards_without_an_index(folder: Path) -> None:
    index_of(folder).unlink()


@case("llama-bf16sharded", "index-missing", variants=(None, "bf16"))
def tagged_shards_without_an_index(folder: Path) -> None:
    (folder / "model.safetensors.index.bf16.json").unlink()


@case("vae-sharded", "index-ghost")
def an_index_with_a_tensor_too_many(folder: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["weight_map"]["a.ghost.weight"] = f"{STEM}-00001-of-00003.safetensors"

    edit_json(index_of(folder), change)


@case("vae-sharded", "index-orphan")
def an_index_with_a_tensor_too_few(folder: Path) -> None:
    edit_json(index_of(folder), lambda content: content["weight_map"].pop("decoder.conv_in.weight"))


@case("llama-sharded", "index-misplaced")
def an_index_that_names_the_wrong_shard(folder: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        places = content["weight_map"]
        name = next(name for name in places if places[name] == "model-00001-of-00003.safetensors")
        places[name] = "model-00002-of-00003.safetensors"

    edit_json(index_of(folder), change)


@case("vae-sharded", "index-metadata")
def an_index_without_metadata(folder: Path) -> None:
    edit_json(index_of(folder), lambda content: content.pop("metadata"))


@case("llama-sharded", "index-metadata")
def an_index_without_metadata_of_transformers(folder: Path) -> None:
    edit_json(index_of(folder), lambda content: content.pop("metadata"))


@case("vae-sharded", "index-size")
def an_index_of_another_size(folder: Path) -> None:
    edit_json(index_of(folder), lambda content: content["metadata"].update(total_size=1))


@case("vae-sharded", "index-unreadable")
def an_index_cut_short(folder: Path) -> None:
    path = index_of(folder)
    path.write_bytes(path.read_bytes()[:200])


@case("vae-sharded", "index-unreadable")
def an_index_that_points_elsewhere(folder: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["weight_map"] = {name: f"../{shard}" for name, shard in content["weight_map"].items()}

    edit_json(index_of(folder), change)


# Files.


@case("vae-safe", "file-damaged", fix=None)
def a_file_cut_short(folder: Path) -> None:
    path = folder / f"{STEM}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@case("llama-safe", "file-damaged", fix=None)
def a_git_lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


@case("vae-safe", "download-partial", fix=None)
def what_a_download_left(folder: Path) -> None:
    (folder / f"{STEM}.fp16.safetensors.incomplete").write_bytes(b"\0" * 100)


@case("llama-safe", "header-format")
def a_header_without_a_format(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path), path)


@case("llama-safe", "pickle-code", fix=None)
def a_pickle_with_more_than_tensors(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    torch.save({**state, "args": argparse.Namespace(lr=1)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


# Names.


@case("vae-bf16sharded", "name-legacy", variants=(None, "bf16"))
def shards_in_an_old_spelling(folder: Path) -> None:
    from support import builders

    for path in sorted(folder.glob("*.bf16-*.safetensors")):
        path.rename(path.with_name(builders.legacy_shard(path.name, "bf16")))
    index = folder / f"{STEM}.safetensors.index.bf16.json"

    def change(content: dict[str, Any]) -> None:
        content["weight_map"] = {n: builders.legacy_shard(f, "bf16") for n, f in content["weight_map"].items()}

    edit_json(index, change)


@case("llama-bf16", "name-unread", variants=(None, "bf16"))
def safetensors_by_the_name_of_a_pickle(folder: Path) -> None:
    (folder / "model.bf16.safetensors").rename(folder / "pytorch_model.bf16.safetensors")


@case("vae-safe", "name-unread")
def a_diffusers_model_by_the_name_of_transformers(folder: Path) -> None:
    (folder / f"{STEM}.safetensors").rename(folder / "model.safetensors")


@case("llama-bf16sharded", "name-unread", variants=(None, "bf16"))
def an_index_as_huggingface_hub_spells_it(folder: Path) -> None:
    (folder / "model.safetensors.index.bf16.json").rename(folder / "model.bf16.safetensors.index.json")


@case("vae-bf16", "name-unread", variants=(None, "ema_bf16"))
def a_tag_with_a_dot(folder: Path) -> None:
    (folder / f"{STEM}.bf16.safetensors").rename(folder / f"{STEM}.ema.bf16.safetensors")


@case("sana-bf16", "entry-dotless", variants=(None, "bf16"))
def a_licence_in_a_part(folder: Path) -> None:
    (folder / "scheduler" / "LICENSE").write_text("as you like")


# Dtypes.


@case("vae-safe", "dtype-tag")
def a_tag_that_lies(folder: Path) -> None:
    (folder / f"{STEM}.safetensors").rename(folder / f"{STEM}.fp16.safetensors")


@case("vae-safe", "dtype-tag", variants=(None, "fp16"))
def a_tag_that_lies_beside_the_same_weights(folder: Path) -> None:
    shutil.copy(folder / f"{STEM}.safetensors", folder / f"{STEM}.fp16.safetensors")


@case("llama-bf16", "config-dtype", same=False)
def a_config_that_names_another_dtype(folder: Path) -> None:
    (folder / "model.bf16.safetensors").replace(folder / "model.safetensors")


@case("vae-safe", "config-shape", deep=True, fix=None)
def a_config_of_another_model(folder: Path) -> None:
    edit_json(folder / "config.json", lambda content: content.update(latent_channels=8))


@case("llama-safe", "values-nan", "values-inf", deep=True, fix=None)
def values_that_are_no_numbers(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    state["lm_head.weight"][0, 0] = float("nan")
    state["model.norm.weight"][0] = float("-inf")
    save_file(state, path, metadata={"format": "pt"})


# Forms.


@case("vae-bin", "bin-sharded")
def sharded_bin_in_diffusers(folder: Path) -> None:
    pass


@case("sana-safe", "forms-mixed")
def bin_in_one_part_only(folder: Path) -> None:
    part = folder / "vae"
    torch.save(load_file(part / f"{STEM}.safetensors"), part / f"{STEM}.bin")
    (part / f"{STEM}.safetensors").unlink()


@case("vae-safe", "forms-differ", fix=("--keep", "safetensors"))
def a_bin_with_other_tensors(folder: Path) -> None:
    state = load_file(folder / f"{STEM}.safetensors")
    state.popitem()
    torch.save(state, folder / f"{STEM}.bin")


# The model's own.


@case("vae-sharded", "old-attention")
def old_names_in_shards(folder: Path) -> None:
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old(name: str) -> str:
        for after, before in new.items():
            name = name.replace(f".{after}.", f".{before}.")
        return name

    for path in folder.glob("*.safetensors"):
        save_file({old(name): t for name, t in load_file(path).items()}, path, metadata={"format": "pt"})

    def change(content: dict[str, Any]) -> None:
        content["weight_map"] = {old(name): shard for name, shard in content["weight_map"].items()}

    edit_json(index_of(folder), change)


@case("sana-safe", "component-unnamed", fix=None)
def a_folder_that_nobody_names(folder: Path) -> None:
    shutil.copytree(folder / "vae", folder / "vae copy")


@case("sana-safe", "component-missing", fix=None)
def a_part_that_is_gone(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


@case("vae-safe", "config-unreadable", fix=None)
def a_config_cut_short(folder: Path) -> None:
    (folder / "config.json").write_text('{"_class_name": "Auto')


# What the loaders do.


def load(folder: Path, variant: str | None = None, **how: Any) -> Any:
    """Load a folder as its users would."""
    import diffusers
    import transformers

    if (folder / "model_index.json").exists():
        return diffusers.DiffusionPipeline.from_pretrained(folder, variant=variant)
    name = "LlamaForCausalLM" if "LlamaForCausalLM" in (folder / "config.json").read_text() else "AutoencoderKL"
    library = transformers if name == "LlamaForCausalLM" else diffusers
    return getattr(library, name).from_pretrained(folder, variant=variant, **how)


@dataclass(frozen=True)
class Loaded:
    """What a loader did: the model or the error, and the weight files and indexes that it opened."""

    model: Any
    error: str
    opened: set[str]
    said: list[str]


def try_to_load(folder: Path, variant: str | None) -> Loaded:
    models: list[Any] = []
    said: list[str] = []
    handler = Listener(said)
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
    try:
        error, opened = opened_by(lambda: models.append(load(folder, variant)), folder)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
    return Loaded(models[0] if models else None, error, opened, said)


def predicted_for(folder: Path, variant: str | None) -> Prediction:
    listing = list_folder(diagnose(folder).inventory)
    return predict(listing, likely_loaders(listing)[0], variant)


def files_in(prediction: Prediction) -> set[str]:
    return {f"{pick.component}/{name}".lstrip("/") for pick in prediction.picks for name in pick.files}


def state_of(model: Any, builders: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, part in builders.models_in(model).items()
        for key, tensor in part.state_dict().items()
    }


def hashes(folder: Path) -> dict[str, str]:
    """Hash all files in a folder, and beside it what the doctor keeps."""
    paths = [path for path in folder.parent.rglob("*") if path.is_file()]
    return {path.relative_to(folder.parent).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


# Files that are wrong inside are picked all the same: their loaders fail, or load them wrongly, after they opened them.
WRONG_INSIDE = {
    "a_file_cut_short", "a_git_lfs_pointer", "a_config_cut_short", "a_config_of_another_model",
    "a_pickle_with_more_than_tensors", "a_diffusers_model_by_the_name_of_transformers",
}  # fmt: skip


@pytest.fixture
def broken(request: pytest.FixtureRequest, bases: Callable[[str], Path], tmp_path: Path) -> tuple[Case, Path]:
    found = CASES[request.param]
    folder = tmp_path / "place" / "model"
    shutil.copytree(bases(found.base), folder)
    found.break_it(folder)
    return found, folder


every_case = pytest.mark.parametrize("broken", CASES, indirect=True)


@every_case
def test_it_is_found(broken: tuple[Case, Path], wconv: Callable[..., Any]) -> None:
    found, folder = broken
    before = hashes(folder)
    findings = diagnose(folder, deep=found.deep).findings
    assert {finding.code for finding in findings if finding.severity != "note"} == found.codes
    told = json.loads(wconv("doctor", folder, "--json", *(["--deep"] if found.deep else []), exit_code=1).stdout)
    assert {one["code"] for one in told["findings"]} >= found.codes
    assert hashes(folder) == before


@every_case
def test_the_loader_does_what_is_predicted(broken: tuple[Case, Path], request: pytest.FixtureRequest) -> None:
    found, folder = broken
    for variant in dict.fromkeys((*found.variants, None, "bf16")):
        prediction, real = predicted_for(folder, variant), try_to_load(folder, variant)
        if request.node.callspec.params["broken"] in WRONG_INSIDE:
            continue
        assert prediction.works == (not real.error), (variant, prediction, real.error)
        if prediction.works:
            assert real.opened == files_in(prediction), variant


@every_case
def test_it_is_mended_and_put_back(broken: tuple[Case, Path], bases: Any, builders: Any, wconv: Any) -> None:
    found, folder = broken
    before = hashes(folder)
    if found.fix is None:
        wconv("doctor", folder, "--fix", *(["--deep"] if found.deep else []), exit_code=1)
        assert hashes(folder) == before
        return
    wconv("doctor", folder, "--fix", "--dry-run", *found.fix, exit_code=1)
    assert hashes(folder) == before
    wconv("doctor", folder, "--fix", *found.fix)
    wconv("doctor", folder, *(["--deep"] if found.deep else []))
    assert not list(folder.rglob(".*"))
    expected = state_of(load(bases(found.base.partition("-")[0] + "-safe")), builders)
    for variant in found.variants:
        prediction, real = predicted_for(folder, variant), try_to_load(folder, variant)
        assert prediction.works
        assert not real.error
        assert not real.said
        assert real.opened == files_in(prediction)
        assert all("bf16" in name for name in real.opened) == (variant is not None and "bf16" in variant)
        state = state_of(real.model, builders)
        for name, tensor in expected.items():
            right = tensor.bfloat16().float() if variant and "bf16" in variant else tensor
            right = tensor.half().float() if variant == "fp16" else right
            assert not found.same or torch.equal(state[name].float(), right.float()), name
    wconv("doctor", folder, "--undo")
    assert hashes(folder) == before


def test_what_is_kept_can_be_purged(bases: Callable[[str], Path], tmp_path: Path, wconv: Any) -> None:
    folder = tmp_path / "place" / "model"
    shutil.copytree(bases("vae-sharded"), folder)
    an_index_cut_short(folder)
    wconv("doctor", folder, "--fix")
    assert [path.name[:6] for path in (folder.parent / ".wconv-undo").iterdir()] == ["model-"]
    wconv("doctor", folder, "--purge")
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    wconv("doctor", folder, "--undo", exit_code=2)


# From the Hub, and as Core ML conversion asks.


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Path], Path]:
    """Let Diffusers take a folder for a repository of the Hub; gives where it then downloads to."""
    from types import SimpleNamespace

    from diffusers.pipelines import pipeline_utils
    from huggingface_hub.utils import filter_repo_objects

    def serve(folder: Path) -> Path:
        files = names_in(folder)
        place = tmp_path / "snapshot"
        first = tmp_path / "first"
        for one in (place, first):
            shutil.rmtree(one, ignore_errors=True)
            one.mkdir()
        shutil.copy(folder / "model_index.json", first)

        def download(*_: Any, allow_patterns: list[str], ignore_patterns: list[str], **__: Any) -> str:
            for name in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(folder / name, place / name)
            return str(place)

        siblings = [SimpleNamespace(rfilename=name) for name in files]
        info = SimpleNamespace(siblings=siblings, pipeline_tag=None)
        monkeypatch.setattr(pipeline_utils, "model_info", lambda *_, **__: info)
        monkeypatch.setattr(pipeline_utils, "hf_hub_download", lambda *_, **__: str(first / "model_index.json"))
        monkeypatch.setattr(pipeline_utils, "snapshot_download", download)
        return place

    return serve


def opened_by(code: Callable[[], Any], folder: Path) -> tuple[str, set[str]]:
    """Run a loader; give its error, and the weight files and indexes that it opened in a folder."""
    error = ""
    with watched(folder) as opened:
        try:
            code()
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
    return error, {name for name in opened if name.endswith((".safetensors", ".bin")) or ".index." in name}


@pytest.mark.parametrize("broken", [name for name, one in CASES.items() if one.base.startswith("sana")], indirect=True)
def test_from_the_hub_the_loader_does_what_is_predicted(broken: tuple[Case, Path], hub: Callable[[Path], Path]) -> None:
    from diffusers import DiffusionPipeline

    _, folder = broken
    for variant in (None, "bf16", "fp16"):
        place = hub(folder)
        prediction = predict(list_folder(diagnose(folder).inventory), "diffusers-hub", variant)

        fetch = functools.partial(DiffusionPipeline.download, "some/model", variant=variant)
        load_it = functools.partial(DiffusionPipeline.from_pretrained, place, variant=variant)
        error = opened_by(fetch, place)[0]
        if not error:
            error, opened = opened_by(load_it, place)
        assert prediction.works == (not error), (variant, prediction, error)
        if prediction.works:
            assert opened == files_in(prediction)


@pytest.mark.parametrize("broken", [name for name, one in CASES.items() if one.base.startswith("sana")], indirect=True)
def test_the_core_ml_script_gets_what_is_predicted(broken: tuple[Case, Path]) -> None:
    from diffusers import DiffusionPipeline

    _, folder = broken
    for variant in ("bf16", "fp16"):
        prediction = predict(list_folder(diagnose(folder).inventory), "coreml", variant)
        how = {"dtype": torch.float16, "variant": variant, "use_safetensors": True}
        error, opened = opened_by(functools.partial(DiffusionPipeline.from_pretrained, folder, **how), folder)
        assert prediction.works == (not error), (variant, prediction, error)
        if prediction.works:
            assert opened == files_in(prediction)


# What the loaders say of what they open.

SAID = {
    "an_index_that_save_pretrained_left": "FileNotFoundError",
    "a_shard_that_is_gone": "FileNotFoundError",
    "shards_with_a_gap_and_no_index": "no file named model.safetensors",
    "shards_without_an_index": f"no file named {STEM}.bin",
    "an_index_with_a_tensor_too_many": "were not used",
    "an_index_with_a_tensor_too_few": "were not initialized",
    "an_index_without_metadata": "KeyError: 'metadata'",
    "an_index_without_metadata_of_transformers": "KeyError: 'metadata'",
    "an_index_cut_short": "JSONDecodeError",
    "an_index_that_points_elsewhere": "contains a path separator",
    "a_file_cut_short": "Unable to load weights",
    "a_git_lfs_pointer": "header too large",
    "a_pickle_with_more_than_tensors": "Weights only load failed",
    "a_diffusers_model_by_the_name_of_transformers": f"no file named {STEM}.bin",
    "a_config_of_another_model": "expected shape",
    "a_config_cut_short": "is not a valid JSON",
    "a_part_that_is_gone": "no file named config.json",
    "sharded_bin_in_diffusers": f"no file named {STEM}.bin",
    "old_names_in_shards": "were not initialized",
    "untagged_weights_that_one_part_lacks": f"no file named {STEM}.bin",
}


@pytest.mark.parametrize("broken", SAID, indirect=True)
def test_the_loader_fails_as_the_finding_says(broken: tuple[Case, Path], request: pytest.FixtureRequest) -> None:
    real = try_to_load(broken[1], None)
    assert SAID[request.node.callspec.params["broken"]] in " ".join([real.error, *real.said])


@pytest.mark.parametrize("broken", ["an_index_that_does_not_tell_them_apart"], indirect=True)
def test_the_loader_takes_rounded_values_in_silence(
    broken: tuple[Case, Path], bases: Callable[[str], Path], builders: Any
) -> None:
    real = try_to_load(broken[1], None)
    assert not real.error
    assert not real.said
    state, expected = (state_of(model, builders) for model in (real.model, load(bases("sana-safe"))))
    names = [name for name in expected if name.startswith("transformer.")]
    assert any(not state[name].equal(expected[name]) for name in names)
    assert all(state[name].equal(expected[name].bfloat16().float()) for name in names)


@pytest.mark.parametrize("broken", ["a_config_that_names_another_dtype"], indirect=True)
def test_the_loader_goes_by_the_config(broken: tuple[Case, Path], wconv: Any) -> None:
    assert load(broken[1]).dtype == torch.float32
    wconv("doctor", broken[1], "--fix")
    assert load(broken[1]).dtype == torch.bfloat16


# What is found, and what is done about it.

MENDED = {code for _, codes in REPAIRS for code in codes}


@pytest.mark.parametrize("code", KINDS)
def test_what_is_said_to_be_mended_has_a_repair(code: str) -> None:
    says_so = "--fix" in KINDS[code].mending and "--fix touches nothing" not in KINDS[code].mending
    assert (code in MENDED) == (says_so or "--keep" in KINDS[code].mending)


def test_each_repair_is_of_findings() -> None:
    assert all(codes and set(codes) <= MENDED for _, codes in REPAIRS)
    assert KINDS.keys() >= MENDED


def choices_of(options: tuple[str, ...]) -> Choices:
    chosen: dict[str, Any] = {}
    for option, after in zip(options, (*options, "--")[1:], strict=True):
        if option.startswith("--"):
            chosen[option[2:].replace("-", "_")] = True if after.startswith("--") else after
    return Choices(**chosen)


@every_case
def test_no_repair_does_anything_without_its_finding(broken: tuple[Case, Path]) -> None:
    case, folder = broken
    diagnosis = diagnose(folder, deep=case.deep)
    found = {finding.code for finding in diagnosis.findings}
    if found & {"file-damaged", "shard-missing"}:
        return  # then nothing is done at all
    if "index-foreign" in found:
        found.add("variant-single")  # of shards that were taken for another variant's, once they are sets of their own
    parts = [PartGoals(part) for part in diagnosis.inventory.parts]
    goals = FolderGoals(diagnosis.inventory, choices_of(case.fix or ()), parts)
    steps: set[str] = set()
    for repair, codes in REPAIRS:
        repair(goals)
        more = set(goals.all_steps) - steps
        steps |= more
        assert not more or found & set(codes), more


# No false alarm.


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "sana", "wan", "t5", "llama_tied", "llama_untied", "clip"])
@pytest.mark.parametrize("shards", [1, 3])
def test_what_the_libraries_save_is_healthy(
    name: str, shards: int, builders: Any, tmp_path: Path, wconv: Callable[..., Any]
) -> None:
    folder = builders.save_safetensors(builders.MODELS[name](), tmp_path / "m", shards)
    assert json.loads(wconv("doctor", folder, "--json").stdout)["findings"] == []
    for dtype, tag in ((torch.float16, "fp16"), (torch.bfloat16, "bf16")):
        for part_name, part in builders.models_in(builders.MODELS[name]().to(dtype)).items():
            limit = builders.shard_limit(part.state_dict(), shards) if shards > 1 else "10GB"
            part.save_pretrained(folder / part_name, variant=tag, max_shard_size=limit)
    assert json.loads(wconv("doctor", folder, "--json").stdout)["findings"] == []
    deep = json.loads(wconv("doctor", folder, "--json", "--deep").stdout)["findings"]
    assert {one["code"] for one in deep} <= {"values-zero", "values-equal", "shapes-unknown"}


# Values.


def test_zeros_and_the_same_values_twice(bases: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(bases("llama-safe"), tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["model.norm.weight"] = torch.zeros_like(state["model.norm.weight"])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    found = {finding.code: finding.problem for finding in diagnose(folder, deep=True).findings}
    assert found == {
        "values-zero": "holds nothing but zeros in model.norm.weight",
        "values-equal": "holds the same values in lm_head.weight and model.embed_tokens.weight",
    }


def test_a_folder_of_thousands_of_shards(tmp_path: Path) -> None:
    # 10,000 shards with 100,000 tensors take some 2.5 seconds and 87 MB.
    from converter.formats.safetensors import build_header

    weight_map: dict[str, str] = {}
    for number in range(1, 1001):
        names = [f"layers.{number}.{place}.weight" for place in range(10)]
        shard = f"model-{number:05d}-of-01000.safetensors"
        header = build_header([TensorSpec(name, DTYPES["F32"], (2, 2)) for name in names], {"format": "pt"})
        (tmp_path / shard).write_bytes(header + bytes(160))
        weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {"total_size": 160_000}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with processor_time(15):
        assert diagnose(tmp_path).findings == ()


def test_why_shapes_were_not_looked_at_is_said(tmp_path: Path) -> None:
    save(make_state(), tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", {"architectures": ["NoSuchModel"], "model_type": "llama"})
    found = {finding.code: finding for finding in diagnose(tmp_path, deep=True).findings}
    assert "has no model of that name" in found["shapes-unknown"].problem
    assert found["shapes-unknown"].severity == "note"

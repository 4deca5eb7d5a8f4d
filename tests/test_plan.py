"""Planning: which sets are taken, what they become, where shards end, and what is refused. No file is touched.

huggingface_hub's own planner is the judge of shard boundaries.
"""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.serialization._base import split_state_dict_into_shards_factory
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import ref_to, whole_view

from converter.dtypes import DTYPES
from converter.errors import BadRequest, OutputRefused, Unsupported
from converter.libraries import library_of
from converter.models.checkpoint import Checkpoint
from converter.models.component import Component, WeightSet
from converter.models.index import parse_index
from converter.models.model import Model
from converter.models.names import WeightsName, parse_name
from converter.models.select import select_sets
from converter.plan.make import make_plan
from converter.plan.shards import split_into_shards
from converter.plan.types import Plan, Target
from converter.recipes.request import Request
from converter.recipes.steps import make_order
from converter.storage import place_of
from converter.tensors.base import ByteRange, PackedRange, Tensor, WeightsFile
from converter.tensors.view import View

HERE = Path("model")
F32 = DTYPES["F32"]
NUMEL = 8
NBYTES = 4 * NUMEL


def tensor(name: str, file: str = "pytorch_model.bin", place: int = 0, numel: int = NUMEL) -> Tensor:
    """Describe a float32 tensor that is all of the storage at ``place``."""
    storage = ByteRange(ref_to(HERE / file), place, 4 * numel)
    return Tensor(name, whole_view(F32, (numel,), storage))


def weight_set(*files: str, index: str | None = None, folder: Path = HERE) -> WeightSet:
    """Name a set as ``find_weight_sets`` would."""
    parsed = parse_name(index or files[0])
    assert parsed
    return WeightSet(place_of(folder), parsed.name, files, index, parsed.is_legacy)


def checkpoint(files: dict[str, str], index: str | None = None, **metadata: Any) -> Checkpoint:
    """Describe an opened set: for each file the letters that name its tensors."""
    opened = tuple(
        WeightsFile(
            place_of(HERE / file), "torch", tuple(tensor(name, file, place) for place, name in enumerate(names)), {}
        )
        for file, names in files.items()
    )
    return Checkpoint(weight_set(*files, index=index), opened, metadata)


def component(*sets: WeightSet, name: str = "", **config: Any) -> Component:
    return Component(name, place_of(HERE / name), sets, config)


def folder(*components: Component) -> Model:
    return Model(place_of(HERE), place_of(HERE), "folder", components)


def plan(*checkpoints: Checkpoint, config: dict[str, Any] | None = None, **options: Any) -> Plan:
    """Plan the sets of one component into a new folder."""
    owner = component(*(opened.weight_set for opened in checkpoints), **(config or {}))
    return plan_into(Target.at(place_of("out"), is_new=True), owner, *checkpoints, **options)


def plan_into(target: Target, owner: Component, *checkpoints: Checkpoint, **options: Any) -> Plan:
    """Plan sets of one component into a folder: the one they are in, unless it is new."""
    request = Request.of(HERE, target.folder, **options)
    naming, casting, writing = request.writing.naming, request.casting, request.writing
    orders = [
        make_order(owner, opened, naming.of(opened.name), casting, writing, not target.is_new) for opened in checkpoints
    ]
    return make_plan(folder(owner), orders, target, writing, request.publishing)


def into_source(*existing: WeightSet) -> Target:
    """Give the folder of the source as a target, with sets that lie there."""
    return replace(Target.at(place_of(HERE)), existing={"": existing})


def select(model: Model, overwrite: bool = False, **options: Any) -> list[tuple[Component, WeightSet]]:
    """Select the sets that are read for safetensors."""
    request = Request.of(HERE, **options)
    return select_sets(model, request.selection, request.writing.naming, overwrite)


def layout(planned: Plan) -> dict[str, str]:
    """Give the tensors of each file."""
    return {shard.path: "".join(tensor.name for tensor, _ in shard.tensors) for shard in planned.files}


# What takes more than the source holds.


def expanded(nbytes: int, held: int, packed: int | None = None) -> Checkpoint:
    """Describe a checkpoint of one tensor of bytes, expanded from fewer."""
    file = ref_to(HERE / "pytorch_model.bin")
    storage = PackedRange(file, 0, held, None, packed) if packed else ByteRange(file, 0, held)
    mask = Tensor("mask", View(DTYPES["U8"], (nbytes // held, held), storage, 0, (0, 1)))
    return Checkpoint(weight_set("pytorch_model.bin"), (WeightsFile(file.place, "torch", (mask,), {}),), {})


def test_a_tensor_that_would_fill_the_disk_is_refused_unless_it_is_asked_for() -> None:
    bomb = expanded(10**15, 10**3)
    with pytest.raises(Unsupported) as caught:
        plan(bomb)
    assert str(caught.value) == (
        "model/pytorch_model.bin: holds 1,000 bytes of tensors, which would come out as 1,000,000,000,000,000: "
        "the largest is 'mask', of 1,000,000,000,000,000 bytes in 1,000. "
        "'wconv to-safetensors --expand' writes them in full."
    )
    asked = plan(bomb, expand=True)
    assert asked.written_nbytes > 10**15
    assert asked.sets[0].notes == ("its expanded tensors take 999,999,999,999,000 bytes more than in the source",)


@pytest.mark.parametrize(
    ("nbytes", "held", "refused"),
    [(10**9, 10**3, False), (10**9 + 2 * 10**3, 10**3, True), (4 * 10**9, 10**9, False), (5 * 10**9, 10**9, True)],
)
def test_how_much_may_be_written_more_than_is_held(nbytes: int, held: int, refused: bool) -> None:
    if refused:
        with pytest.raises(Unsupported, match="--expand"):
            plan(expanded(nbytes, held))
    else:
        assert "bytes more than in the source" in plan(expanded(nbytes, held)).sets[0].notes[0]


def test_what_is_deflated_takes_what_it_takes_in_the_file() -> None:
    assert plan(expanded(5 * 10**9, 5 * 10**9, 2 * 10**9))
    with pytest.raises(Unsupported, match="5,000,000,000 bytes in 5,000,000"):
        plan(expanded(5 * 10**9, 5 * 10**9, 5 * 10**6))


def test_small_buffers_that_are_expanded_are_no_news() -> None:
    assert plan(expanded(512 * 512, 512)).sets[0].notes == ()


def test_one_storage_under_many_names_is_counted_once() -> None:
    names = [chr(ord("A") + place) for place in range(6)]
    tensors = tuple(tensor(name, numel=10**9) for name in names)
    tied = Checkpoint(weight_set("pytorch_model.bin"), (WeightsFile(place_of(HERE / "x"), "torch", tensors, {}),), {})
    assert plan(tied, tied="first")
    with pytest.raises(Unsupported, match="4,000,000,000 bytes of tensors, which would come out as 24,000,000,000"):
        plan(tied, tied="duplicate")


# Shard boundaries.


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(1, 100))
def test_shards_end_where_huggingface_hub_ends_them(sizes: Any, limit: Any) -> None:
    judged = split_state_dict_into_shards_factory(
        {str(place): size for place, size in enumerate(sizes)},
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    expected = [[int(name) for name in names] for names in judged.filename_to_tensors.values()]
    assert split_into_shards(sizes, limit) == expected


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 100))
def test_shards_hold_each_place_once_and_obey_the_limit(sizes: Any, limit: Any) -> None:
    shards = split_into_shards(sizes, limit)
    assert sorted(place for shard in shards for place in shard) == list(range(len(sizes)))
    assert all(shards)
    assert all(len(shard) == 1 or sum(sizes[place] for place in shard) <= limit for shard in shards)


def test_no_limit_is_one_shard() -> None:
    assert split_into_shards([5, 10**15], math.inf) == [[0, 1]]


def test_the_names_of_shards_are_those_of_huggingface_hub() -> None:
    planned = plan(checkpoint({"pytorch_model.bin": "abcde"}), max_shard_size=2 * NBYTES)
    judged = split_state_dict_into_shards_factory(
        dict.fromkeys("abcde", NBYTES),
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=2 * NBYTES,
    )
    assert layout(planned) == {file: "".join(names) for file, names in judged.filename_to_tensors.items()}


def test_shards_stay_as_they_are_unless_asked() -> None:
    source = checkpoint({"pytorch_model-00001-of-00002.bin": "abc", "pytorch_model-00002-of-00002.bin": "d"})
    assert layout(plan(source)) == {
        "model-00001-of-00002.safetensors": "abc",
        "model-00002-of-00002.safetensors": "d",
    }


def test_a_tensor_over_the_limit_has_a_shard_to_itself() -> None:
    big = tensor("z", place=9, numel=10 * NUMEL)
    source = checkpoint({"pytorch_model.bin": "ab"})
    source = replace(source, files=(replace(source.files[0], tensors=(*source.files[0].tensors, big)),))
    assert list(layout(plan(source, max_shard_size=2 * NBYTES)).values()) == ["z", "ab"]


# Names.


@pytest.mark.parametrize(
    ("source", "single", "shard", "index"),
    [
        ("pytorch_model.bin", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        (
            "pytorch_model.fp16.bin",
            "model.fp16.safetensors",
            "model.fp16-00001-of-00002.safetensors",
            "model.safetensors.index.fp16.json",
        ),
        (
            "diffusion_pytorch_model.bin",
            "diffusion_pytorch_model.safetensors",
            "diffusion_pytorch_model-00001-of-00002.safetensors",
            "diffusion_pytorch_model.safetensors.index.json",
        ),
        (
            "diffusion_pytorch_model.non_ema.bin",
            "diffusion_pytorch_model.non_ema.safetensors",
            "diffusion_pytorch_model.non_ema-00001-of-00002.safetensors",
            "diffusion_pytorch_model.safetensors.index.non_ema.json",
        ),
        (
            "v1-5-pruned-emaonly.ckpt",
            "v1-5-pruned-emaonly.safetensors",
            "v1-5-pruned-emaonly-00001-of-00002.safetensors",
            "v1-5-pruned-emaonly.safetensors.index.json",
        ),
    ],
)
def test_what_a_set_becomes(source: str, single: str, shard: str, index: str) -> None:
    whole = plan(checkpoint({source: "ab"}))
    split = plan(checkpoint({source: "ab"}), max_shard_size=NBYTES)
    assert [file.path for file in whole.files] == [single]
    assert whole.texts == ()
    assert split.files[0].path == shard
    assert split.texts[0][0] == index


@pytest.mark.parametrize(
    ("shard", "index"),
    [
        ("diffusion_pytorch_model-0000{}-of-00002.fp16.bin", "diffusion_pytorch_model.bin.index.fp16.json"),
        ("diffusion_pytorch_model-0000{}-of-00002.fp16.bin", "diffusion_pytorch_model.bin.fp16.index.json"),
        ("diffusion_pytorch_model.fp16-0000{}-of-00002.bin", "diffusion_pytorch_model.fp16.bin.index.json"),
    ],
)
def test_legacy_spellings_become_current_ones(shard: str, index: str) -> None:
    planned = plan(checkpoint({shard.format(1): "a", shard.format(2): "b"}, index=index))
    assert layout(planned) == {
        "diffusion_pytorch_model.fp16-00001-of-00002.safetensors": "a",
        "diffusion_pytorch_model.fp16-00002-of-00002.safetensors": "b",
    }
    assert planned.texts[0][0] == "diffusion_pytorch_model.safetensors.index.fp16.json"


@pytest.mark.parametrize(
    ("source", "variant", "expected"),
    [
        ("pytorch_model.bin", "fp32", "model.fp32.safetensors"),
        ("pytorch_model.fp16.bin", "ema", "model.ema.safetensors"),
        ("pytorch_model.fp16.bin", "none", "model.safetensors"),
        ("pytorch_model.bin", "none", "model.safetensors"),
    ],
)
def test_the_variant_that_is_asked_for_replaces_the_tag(source: str, variant: str, expected: str) -> None:
    assert list(layout(plan(checkpoint({source: "a"}), variant=variant))) == [expected]


@pytest.mark.parametrize("tag", ["fp16.ema", "a/b", "..", "../x", "a b", "", "x-00001-of-00002", "é", "a\n"])
def test_a_tag_that_no_loader_finds_is_refused(tag: str) -> None:
    with pytest.raises(BadRequest):
        plan(checkpoint({"pytorch_model.bin": "a"}), variant=tag)


def test_a_component_has_its_files_in_its_folder() -> None:
    source = checkpoint({"diffusion_pytorch_model.bin": "ab"})
    owner = component(source.weight_set, name="unet")
    planned = plan_into(Target.at(place_of("out"), is_new=True), owner, source, max_shard_size=NBYTES)
    assert {shard.path.partition("/")[0] for shard in planned.files} == {"unet"}
    assert planned.texts[0][0] == "unet/diffusion_pytorch_model.safetensors.index.json"


# The index.


def test_index_content() -> None:
    names = {"pytorch_model-00001-of-00002.bin": "ab", "pytorch_model-00002-of-00002.bin": "c"}
    source = checkpoint(names, "pytorch_model.bin.index.json", total_size=1, dtype="bfloat16", total_parameters=7)
    ((_, raw),) = plan(source).texts
    assert json.loads(raw) == {
        "metadata": {"total_size": 3 * NBYTES, "dtype": "bfloat16", "total_parameters": 7},
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00001-of-00002.safetensors",
            "c": "model-00002-of-00002.safetensors",
        },
    }
    assert raw.decode() == json.dumps(json.loads(raw), indent=2, sort_keys=True) + "\n"


def test_index_counts_parameters_where_the_source_does_not() -> None:
    ((_, raw),) = plan(checkpoint({"pytorch_model.bin": "abc"}), max_shard_size=NBYTES).texts
    assert parse_index(raw, HERE).metadata == {"total_parameters": 3 * NUMEL, "total_size": 3 * NBYTES}


def test_index_names_exactly_what_is_stored() -> None:
    shared = tensor("tied")._replace(source=tensor("a").source)
    source = checkpoint({"pytorch_model.bin": "abc"})
    source = replace(source, files=(replace(source.files[0], tensors=(*source.files[0].tensors, shared)),))
    planned = plan(source, tied="first", max_shard_size=NBYTES)
    index = parse_index(planned.texts[0][1], HERE)
    assert set(index.weight_map) == set("abc") == set("".join(layout(planned).values()))
    assert index.metadata["total_size"] == 3 * NBYTES


def test_one_file_has_no_index_though_the_source_had_one() -> None:
    names = {"pytorch_model-00001-of-00002.bin": "ab", "pytorch_model-00002-of-00002.bin": "c"}
    planned = plan(checkpoint(names, "pytorch_model.bin.index.json"), max_shard_size=math.inf)
    assert layout(planned) == {"model.safetensors": "abc"}
    assert planned.texts == ()


# Which sets are taken.


BIN, SAFE = weight_set("pytorch_model.bin"), weight_set("model.safetensors")
BIN_FP16, SAFE_FP16 = weight_set("pytorch_model.fp16.bin"), weight_set("model.fp16.safetensors")


@pytest.mark.parametrize(
    ("held", "options", "expected"),
    [
        ([BIN], {}, [BIN]),
        ([BIN, BIN_FP16], {}, [BIN, BIN_FP16]),
        ([BIN, SAFE], {}, [SAFE]),
        ([BIN, SAFE], {"overwrite": True}, [BIN]),
        ([SAFE], {"overwrite": True}, [SAFE]),
        ([BIN, SAFE_FP16], {}, [BIN, SAFE_FP16]),
        ([BIN, BIN_FP16], {"from_variant": "fp16"}, [BIN_FP16]),
        ([BIN, BIN_FP16], {"from_variant": "none"}, [BIN]),
        ([BIN_FP16], {}, [BIN_FP16]),
    ],
)
def test_which_sets_are_read(held: list[Any], options: dict[str, Any], expected: list[Any]) -> None:
    chosen = select(folder(component(*held)), **options)
    assert [found for _, found in chosen] == expected


def test_a_component_without_the_variant_gives_its_untagged_weights() -> None:
    both = folder(component(BIN, BIN_FP16, name="unet"), component(BIN, name="vae"))
    chosen = select(both, from_variant="fp16")
    assert [(owner.name, found) for owner, found in chosen] == [("unet", BIN_FP16), ("vae", BIN)]


@pytest.mark.parametrize("held", [[BIN], [BIN, SAFE]])
def test_a_variant_that_is_nowhere_is_refused(held: list[Any]) -> None:
    with pytest.raises(BadRequest, match="fp16"):
        select(folder(component(*held)), from_variant="fp16")


def test_components_are_chosen_by_name() -> None:
    pipeline = folder(component(BIN, name="unet"), component(BIN, name="vae"), component(BIN, name="text_encoder"))
    chosen = select(pipeline, components=("vae", "unet"))
    assert [owner.name for owner, _ in chosen] == ["unet", "vae"]
    with pytest.raises(BadRequest, match=r"'vea'.*text_encoder, unet, vae"):
        select(pipeline, components=("vea",))


def test_the_same_weights_twice_in_one_format_are_refused() -> None:
    single, sharded = SAFE, weight_set("model-00001-of-00001.safetensors", index="model.safetensors.index.json")
    with pytest.raises(BadRequest, match=r"model\.safetensors and model\.safetensors\.index\.json"):
        select(folder(component(single, sharded)))
    with pytest.raises(BadRequest, match=r"pytorch_model\.bin and model\.pt"):
        select(folder(component(BIN, weight_set("model.pt"))))


# Ties.


def with_tie() -> Checkpoint:
    """Give a checkpoint whose tensor ``t`` is its tensor ``a``."""
    source = checkpoint({"pytorch_model.bin": "ab"})
    tied = tensor("t")._replace(source=tensor("a").source)
    return replace(source, files=(replace(source.files[0], tensors=(*source.files[0].tensors, tied)),))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "duplicate"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "first"),
        ({"model_type": "t5"}, "first"),
        ({"architecture": "resnet18", "tie_word_embeddings": True}, "duplicate"),
        ({"model_type": "llama", "tie_word_embeddings": True}, "first"),
        ({"model_type": "llama", "tie_word_embeddings": False}, "duplicate"),
        ({"model_type": "llava", "text_config": {"tie_word_embeddings": False}}, "duplicate"),
        ({"model_type": "llava", "tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, "first"),
        ({"_class_name": "UNet2DConditionModel"}, "duplicate"),
    ],
)
def test_default_tied(config: dict[str, Any], expected: str) -> None:
    part = component(BIN, **config)
    assert library_of(part).ties(part, BIN.name) == expected
    ties = plan(with_tie(), config=config).sets[0].ties
    assert ties == ({"t": "a"} if expected == "first" else {})


def test_a_file_that_no_library_looks_for_has_every_name() -> None:
    named = weight_set("last.ckpt")
    part = component(named, architectures=["T5ForConditionalGeneration"])
    assert library_of(part).ties(part, named.name) == "duplicate"


def test_tied_tensors_are_written_once_and_noted() -> None:
    planned = plan(with_tie(), tied="first")
    assert layout(planned) == {"model.safetensors": "ab"}
    assert header_of(planned, 0)["__metadata__"] == {"format": "pt", "t": "a"}


def test_tied_tensors_are_written_under_each_name() -> None:
    planned = plan(with_tie(), tied="duplicate")
    assert layout(planned) == {"model.safetensors": "abt"}
    assert header_of(planned, 0)["__metadata__"] == {"format": "pt"}


def test_a_tie_is_noted_where_the_kept_tensor_is() -> None:
    planned = plan(with_tie(), tied="first", max_shard_size=NBYTES)
    assert [header_of(planned, place)["__metadata__"] for place in (0, 1)] == [
        {"format": "pt", "t": "a"},
        {"format": "pt"},
    ]


def test_a_tied_tensor_named_format_is_refused() -> None:
    source = with_tie()
    tensors = (*source.files[0].tensors[:2], source.files[0].tensors[2]._replace(name="format"))
    source = replace(source, files=(replace(source.files[0], tensors=tensors),))
    with pytest.raises(Unsupported, match="--tied duplicate"):
        plan(source, tied="first")
    assert layout(plan(source, tied="duplicate")) == {"model.safetensors": "abformat"}


def header_of(planned: Plan, number: int) -> dict[str, Any]:
    """Read the JSON of a planned header."""
    return dict(json.loads(planned.files[number].header[8:]))


# What is refused.


OLD_NAME = "decoder.mid_block.attentions.0.query.weight"


def old_attention(name: str = OLD_NAME) -> Checkpoint:
    source = checkpoint({"diffusion_pytorch_model.bin": "ab"})
    tensors = (source.files[0].tensors[0]._replace(name=name), source.files[0].tensors[1])
    return replace(source, files=(replace(source.files[0], tensors=tensors),))


@pytest.mark.parametrize("class_name", ["AutoencoderKL", "VQModel", "UNet2DModel"])
@pytest.mark.parametrize("part", ["query.weight", "key.bias", "value.weight", "proj_attn.bias"])
def test_old_attention_names_in_shards_are_refused(class_name: str, part: str) -> None:
    source = old_attention(f"encoder.mid_block.attentions.12.{part}")
    with pytest.raises(Unsupported, match="--max-shard-size none"):
        plan(source, config={"_class_name": class_name}, max_shard_size=NBYTES)


def test_old_attention_names_are_kept_in_one_file() -> None:
    planned = plan(old_attention(), config={"_class_name": "AutoencoderKL"}, max_shard_size=math.inf)
    assert OLD_NAME in {tensor.name for tensor, _ in planned.files[0].tensors}


@pytest.mark.parametrize(
    ("class_name", "name"),
    [("UNet2DConditionModel", OLD_NAME), ("AutoencoderKL", "decoder.mid_block.attentions.0.to_q.weight")],
)
def test_other_classes_and_current_names_may_be_split(class_name: str, name: str) -> None:
    planned = plan(old_attention(name), config={"_class_name": class_name}, max_shard_size=NBYTES)
    assert len(planned.files) == 2


def test_two_sets_of_one_output_are_refused() -> None:
    untagged, tagged = checkpoint({"pytorch_model.bin": "a"}), checkpoint({"pytorch_model.fp16.bin": "a"})
    with pytest.raises(BadRequest, match="--from-variant"):
        plan(untagged, tagged, variant="ema")


@pytest.mark.parametrize(
    "old",
    [
        weight_set("model.safetensors"),
        weight_set("model-00001-of-00001.safetensors", index="model.safetensors.index.json"),
        weight_set("model-00001-of-00002.safetensors"),
    ],
)
def test_output_that_is_there_is_refused_or_replaced_whole(old: Any) -> None:
    source = checkpoint({"pytorch_model.bin": "a"})
    owner = component(source.weight_set, old)
    with pytest.raises(OutputRefused, match="--overwrite"):
        plan_into(into_source(old), owner, source)
    planned = plan_into(into_source(old), owner, source, overwrite=True)
    assert planned.replaced == old.all_names


def test_another_variant_or_format_is_never_replaced() -> None:
    source = checkpoint({"pytorch_model.bin": "a"})
    owner = component(source.weight_set)
    others = [weight_set("model.fp16.safetensors"), weight_set("pytorch_model.bin"), weight_set("other.safetensors")]
    planned = plan_into(into_source(*others), owner, source, overwrite=True)
    assert planned.replaced == ()


def test_deleting_the_source_names_all_of_its_files() -> None:
    names = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
    source = checkpoint(dict(zip(names, "ab", strict=True)), index="pytorch_model.bin.index.json")
    planned = plan(source, delete_source=True)
    assert planned.removed_sources == tuple(place_of(HERE / name) for name in (*names, "pytorch_model.bin.index.json"))
    assert planned.destroys_source


# A plan is a value.


def test_a_plan_survives_pickling() -> None:
    planned = plan(with_tie(), checkpoint({"pytorch_model.fp16.bin": "ab"}), max_shard_size=NBYTES)
    assert pickle.loads(pickle.dumps(planned)) == planned


def test_offsets_and_sizes_follow_from_the_header() -> None:
    (shard,) = plan(checkpoint({"pytorch_model.bin": "abc"})).files
    assert [offset for _, offset in shard.tensors] == [len(shard.header) + place * NBYTES for place in range(3)]
    assert shard.nbytes == len(shard.header) + 3 * NBYTES
    assert int.from_bytes(shard.header[:8], "little") == len(shard.header) - 8


def test_an_empty_state_dict_is_a_file_without_tensors() -> None:
    (shard,) = plan(checkpoint({"pytorch_model.bin": ""}), max_shard_size=NBYTES).files
    assert shard.path == "model.safetensors"
    assert shard.nbytes == len(shard.header)


def test_names_of_files_come_from_one_place() -> None:
    planned = plan(checkpoint({"pytorch_model.bin": "abc"}), max_shard_size=NBYTES)
    assert tuple(shard.path for shard in planned.files) == WeightsName("model", None, "safetensors").files(3)

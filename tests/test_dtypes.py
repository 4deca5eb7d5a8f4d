"""The table of dtypes against the two libraries whose names it holds."""

from __future__ import annotations

import io
import pickletools
import zipfile

import pytest
import safetensors
import safetensors.torch
import torch
from support.judges import saved_by_torch, split_safetensors

from converter.dtypes import BY_ALIAS, BY_STORAGE_CLASS, BY_TORCH_NAME, DTYPES, DType

IN_TORCH = [dtype for dtype in DTYPES.values() if dtype.torch_name]
# torch's own type counts pairs of these, so the table does not name it.
PACKED = "float4_e2m1fn_x2"


def torch_tensor(torch_name: str) -> torch.Tensor:
    torch_dtype = getattr(torch, torch_name)
    return torch.zeros(2 * torch_dtype.itemsize, dtype=torch.uint8).view(torch_dtype)


def globals_in(raw: bytes) -> set[str]:
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        pickle = archive.read("archive/data.pkl")
    return {str(argument) for opcode, argument, _ in pickletools.genops(pickle) if opcode.name == "GLOBAL"}


def test_the_order_is_that_of_a_safetensors_file() -> None:
    # Named backwards, so that no order by name looks like one by dtype.
    ordered = [*IN_TORCH, DTYPES["F4"]]
    state = {f"{99 - dtype.rank:02d}": torch_tensor(dtype.torch_name or PACKED) for dtype in ordered}
    entries, _ = split_safetensors(safetensors.torch.save(state))
    by_offset = sorted(entries.values(), key=lambda entry: entry["data_offsets"])
    assert [entry["dtype"] for entry in by_offset] == [d.tag for d in sorted(ordered, key=lambda d: d.rank)]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_the_width_is_the_reference_readers(dtype: DType) -> None:
    header = f'{{"x":{{"dtype":"{dtype.tag}","shape":[8],"data_offsets":[0,{dtype.bits}]}}}}'.encode()
    raw = len(header).to_bytes(8, "little") + header + bytes(dtype.bits)
    [(_, entry)] = safetensors.deserialize(raw)
    assert len(entry["data"]) == dtype.nbytes(8)


@pytest.mark.parametrize("dtype", IN_TORCH, ids=str)
def test_a_tag_means_the_torch_dtype_of_its_row(dtype: DType) -> None:
    entries, data = split_safetensors(safetensors.torch.save({"x": torch_tensor(dtype.torch_name)}))
    assert entries["x"]["dtype"] == dtype.tag
    [numel] = entries["x"]["shape"]
    assert len(data) == dtype.nbytes(numel)


def test_no_dtype_that_safetensors_reads_is_missing() -> None:
    known = {*BY_TORCH_NAME, PACKED}
    assert {str(dtype).removeprefix("torch.") for dtype in safetensors.torch._TYPES.values()} <= known


@pytest.mark.parametrize("dtype", IN_TORCH, ids=str)
def test_widths_and_kinds_are_torchs(dtype: DType) -> None:
    torch_dtype = getattr(torch, dtype.torch_name)
    assert dtype.itemsize == torch_dtype.itemsize
    assert dtype.nbytes(3) == 3 * torch_dtype.itemsize
    assert dtype.is_floating == torch_dtype.is_floating_point


@pytest.mark.parametrize(("tag", "nbytes"), [("F4", [0, 1, 1, 2]), ("F6_E2M3", [0, 1, 2, 3]), ("U8", [0, 1, 2, 3])])
def test_narrow_dtypes_are_packed(tag: str, nbytes: list[int]) -> None:
    assert [DTYPES[tag].nbytes(numel) for numel in range(4)] == nbytes


@pytest.mark.parametrize("dtype", IN_TORCH, ids=str)
def test_the_storage_class_is_what_torch_pickles(dtype: DType) -> None:
    named = globals_in(saved_by_torch({"x": torch_tensor(dtype.torch_name)}))
    if dtype.storage_class:
        assert f"torch {dtype.storage_class}" in named
        assert BY_STORAGE_CLASS[dtype.storage_class] is dtype
    else:
        assert {"torch.storage UntypedStorage", f"torch {dtype.torch_name}"} <= named


def test_every_name_means_one_dtype() -> None:
    aliases = [alias for dtype in DTYPES.values() for alias in dtype.aliases]
    assert len(set(aliases)) == len(aliases) == len(BY_ALIAS)
    assert len(BY_TORCH_NAME) == len(IN_TORCH)


@pytest.mark.parametrize(
    ("alias", "tag"),
    [("fp32", "F32"), ("float32", "F32"), ("bf16", "BF16"), ("bfloat16", "BF16"), ("fp16", "F16"), ("float16", "F16"),
     ("fp8_e4m3fn", "F8_E4M3"), ("fp8_e5m2", "F8_E5M2")],
)  # fmt: skip
def test_what_people_type(alias: str, tag: str) -> None:
    assert BY_ALIAS[alias].tag == tag


def test_a_short_name_tags_a_variant() -> None:
    assert [DTYPES[tag].short_name for tag in ("BF16", "F16", "F8_E4M3", "I8")] == ["bf16", "fp16", "fp8_e4m3fn", "i8"]

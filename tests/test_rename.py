"""Which tensors are written, and under which names: ``--only``, ``--drop``, ``--rename``, prefixes, ``--tied NAME``.

Also what follows from it: ties in headers, quantized weights and their scales, hashes in headers that become stale.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.tiny import assert_same, load_set, make_state, names_in, save, save_pipeline, snapshot, write_json

from converter import BadRequest, convert

State = dict[str, torch.Tensor]
LAYERS = {f"model.layers.{number}.{leaf}": torch.full((4,), float(number)) for number in range(4) for leaf in "qk"}
STATE: State = {**LAYERS, "model_ema.decay": torch.ones(1), "lm_head.weight": torch.ones(2, 2)}


def renamed(state: State, **new: str) -> State:
    return {new.get(name, name): tensor for name, tensor in state.items()}


def header_notes(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--rename", r"^model\.=", "--rename", r"layers\.(\d+)=blocks.\1"),
         lambda name: name.replace("model.layers", "blocks")),
        (("--rename", "(?<=layers)[.]=-", "--add-prefix", "net."),
         lambda name: "net." + name.replace("layers.", "layers-")),
        (("--drop", "ema", "--strip-prefix", "model.", "--add-prefix", "model.diffusion_model."),
         lambda name: None if "ema" in name else "model.diffusion_model." + name.removeprefix("model.")),
        (("--only", "layers", "--only", "head", "--drop", r"\.[13]\.", "--drop", "k$"),
         lambda name: name if name.endswith(("0.q", "2.q", "weight")) else None),
        (("--strip-prefix", "model.", "--rename", r"^layers\.0\.q=first"),
         lambda name: {"model.layers.0.q": "first"}.get(name, name.removeprefix("model."))),
    ],
)  # fmt: skip
def test_tensors_come_under_the_names_that_are_asked_for(
    options: tuple[str, ...], expected: Callable[[str], str | None], wconv: Callable[..., Any], tmp_path: Path
) -> None:
    save(STATE, tmp_path / "m.pt")
    wconv("to-safetensors", tmp_path / "m.pt", "-o", tmp_path / "out.safetensors", *options)
    names = {name: expected(name) for name in STATE}
    assert_same(load_file(tmp_path / "out.safetensors"), {new: STATE[old] for old, new in names.items() if new})


def test_it_is_left_open_whether_a_class_has_the_new_names(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(STATE, tmp_path / "m" / "pytorch_model.bin")
    write_json(tmp_path / "m" / "config.json", {"architectures": ["LlamaForCausalLM"]})
    known = "# where the model's class has the names that its tensors have now"
    assert known not in wconv("to-safetensors", tmp_path / "m", "-o", tmp_path / "same").stdout
    told = wconv("to-safetensors", tmp_path / "m", "-o", tmp_path / "out", "--add-prefix", "x.").stdout
    assert f"{known}\n    from transformers import LlamaForCausalLM" in told


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--rename", "nothing=x"), "has no tensor whose name holds 'nothing', as --rename has it. 'wconv inspect"),
        (("--rename", "lm_head=x", "--rename", "lm_head=y"), "holds 'lm_head', as --rename has it"),
        (("--only", "lm_head", "--only", "none"), "has no tensor whose name holds 'none', as --only has it"),
        (("--drop", "none"), "has no tensor whose name holds 'none', as --drop has it"),
        (("--strip-prefix", "none."), "has no tensor whose name begins with 'none.', as --strip-prefix has it"),
        (("--drop", "."), "m.pt: would be left without tensors, as --only and --drop have it. "),
        (("--rename", "[qk]$=x"), "would have two tensors named 'model.layers.0.x': 'model.layers.0.q' and "),
        (("--rename", "^lm_head.weight$="), "would have the tensor 'lm_head.weight' without a name."),
        (("--add-prefix", "x" * 1000), " characters, and 1,000 may be"),
        (("--rename", "^lm_head.weight$=__metadata__"), "named '__metadata__', as headers call their own notes"),
        (("--rename", "lm_head"), "'lm_head' is no REGEX=NEW"),
        (("--rename", "=x"), "'=x' is no REGEX=NEW"),
        (("--rename", "(=x"), "'(': is no regular expression "),
        (("--drop", "a{99999999999}"), "is no regular expression (the repetition number is too large)"),
        (("--rename", r"a=\2"), "is no replacement for 'a' "),
        (("--tied", "lm_head.weight"), "has no tied tensors of which one is named 'lm_head.weight', as --tied has it"),
    ],
)  # fmt: skip
def test_names_that_cannot_be(
    options: tuple[str, ...], said: str, wconv: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(STATE, Path("m.pt"))
    before = snapshot(tmp_path)
    outcome = wconv("to-safetensors", "m.pt", *options, exit_code=2)
    assert said in outcome.stderr.replace("\n", " ")
    assert "Traceback" not in outcome.stderr
    assert snapshot(tmp_path) == before


def test_what_matches_in_one_set_of_a_pipeline_is_enough(wconv: Callable[..., Any], tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "p")
    save({"enc.a": torch.ones(3), "enc.b": torch.ones(4)}, pipeline / "vae" / "diffusion_pytorch_model.bin")
    wconv("to-safetensors", pipeline, "-o", tmp_path / "out", "--drop", r"^enc\.b", "--strip-prefix", "enc.")
    assert load_file(tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors").keys() == {"a"}
    unet = tmp_path / "out" / "unet"
    assert_same(load_set(unet, "diffusion_pytorch_model"), make_state(seed=1))
    said = wconv("to-safetensors", pipeline, "-o", tmp_path / "no", "--only", "^enc", exit_code=2).stderr
    assert "would be left without tensors" in said
    assert not (tmp_path / "no").exists()


def test_python_takes_pairs_mappings_and_functions(tmp_path: Path) -> None:
    save(STATE, tmp_path / "m.pt")
    swap = {"model.layers.0.q": "model.layers.0.k", "model.layers.0.k": "model.layers.0.q"}
    for number, rename in enumerate(
        ([("0.q$", "0.x"), ("0.k$", "0.q"), ("0.x$", "0.k")], swap, lambda n: swap.get(n, n))
    ):
        out = tmp_path / f"{number}.safetensors"
        convert(tmp_path / "m.pt", out, rename=rename, only="layers")
        assert_same(load_file(out), renamed(LAYERS, **swap))
    with pytest.raises(BadRequest, match="'gone', as --rename has it"):
        convert(tmp_path / "m.pt", tmp_path / "x", rename={"gone": "x"})
    with pytest.raises(BadRequest, match="renamed to None, which is no text"):
        convert(tmp_path / "m.pt", tmp_path / "x", rename=lambda name: None)


def test_shards_stay_and_the_index_follows(wconv: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for number in (1, 2):
        save_file(
            {f"a.{number}": torch.ones(2), f"b.{number}": torch.ones(3)},
            folder / f"model-0000{number}-of-00002.safetensors",
        )
    weight_map = {f"{leaf}.{number}": f"model-0000{number}-of-00002.safetensors" for leaf in "ab" for number in (1, 2)}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    wconv("reshard", folder, "--max-shard-size", "20B", "-o", tmp_path / "r", "--rename", "^a=c")
    wconv("to-safetensors", folder, "-o", tmp_path / "out", "--rename", "^a=c", "--drop", "b.2")
    for out, names in (("r", {"c.1", "c.2", "b.1", "b.2"}), ("out", {"c.1", "c.2", "b.1"})):
        assert load_set(tmp_path / out).keys() == names
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * (2 + 2 + 3)
    assert sorted(set(index["weight_map"].values())) == names_in(folder)[:2]


def test_in_place_what_is_dropped_goes(wconv: Callable[..., Any], tmp_path: Path) -> None:
    """With the tensors that stay as they lie there, nothing was written, and the dropped ones stayed."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2), "z": torch.ones(2)}, path)
    wconv("reshard", tmp_path, "--max-shard-size", "none", "--in-place", "--drop", "z")
    assert load_file(path).keys() == {"a"}


@pytest.mark.parametrize(
    ("options", "tensor", "notes"),
    [
        (("--rename", "^head=lm_head"), "embed", {"lm_head": "embed", "other": "embed"}),
        (("--rename", "^embed=wte"), "wte", {"head": "wte", "other": "wte"}),
        (("--drop", "^head$"), "embed", {"other": "embed"}),
        (("--drop", "embed"), "head", {"other": "head"}),
        (("--only", "other"), "other", {}),
        (("--tied", "other"), "other", {"head": "other", "embed": "other"}),
        (("--tied", "embed"), "embed", {"head": "embed", "other": "embed"}),
        (("--tied", "m.other", "--add-prefix", "m."), "m.other", {"m.head": "m.other", "m.embed": "m.other"}),
    ],
)  # fmt: skip
def test_names_that_a_header_ties_follow(
    options: tuple[str, ...], tensor: str, notes: dict[str, str], wconv: Callable[..., Any], tmp_path: Path
) -> None:
    source, out = tmp_path / "m.safetensors", tmp_path / "out.safetensors"
    save_file({"embed": torch.ones(3)}, source, {"format": "pt", "head": "embed", "other": "embed", "title": "x"})
    wconv("to-safetensors", source, "-o", out, *options)
    assert load_file(out).keys() == {tensor}
    assert header_notes(out) == {"format": "pt", "title": "x", **notes}
    wconv("to-bin", source, "-o", tmp_path / "out.bin", *options)
    assert torch.load(tmp_path / "out.bin").keys() == {tensor, *notes}


@pytest.mark.parametrize("new", ["format", "title", "embed"])
def test_a_tied_name_takes_no_other_note(new: str, wconv: Callable[..., Any], tmp_path: Path) -> None:
    source = tmp_path / "m.safetensors"
    save_file({"embed": torch.ones(3), "b": torch.ones(1)}, source, {"format": "pt", "head": "embed", "title": "x"})
    said = wconv("to-safetensors", source, "-o", tmp_path / "o", "--rename", f"head={new}", exit_code=2).stderr
    assert repr(new) in said
    assert "'head'" in said
    assert "'title'" in wconv("to-bin", source, "--rename", "^b$=x", exit_code=2).stderr


@pytest.mark.parametrize("kept", ["lm_head.weight", "shared"])
def test_the_tied_tensor_to_keep(kept: str, wconv: Callable[..., Any], tmp_path: Path) -> None:
    shared, bias = torch.ones(3, 2), torch.ones(2)
    state = {"embed": shared, "bias": bias, "lm_head.weight": shared, "shared": shared, "bias.too": bias}
    save(state, tmp_path / "m.pt")
    outcome = wconv("to-safetensors", tmp_path / "m.pt", "--tied", kept, "--json")
    [written] = json.loads(outcome.stdout)["weight_sets"]
    others = {"embed", "lm_head.weight", "shared"} - {kept}
    assert written["tied"] == {**dict.fromkeys(others, kept), "bias.too": "bias"}
    assert load_file(tmp_path / "m.safetensors").keys() == {kept, "bias"}
    wconv("to-bin", tmp_path / "m.pt", "--tied", kept, "-o", tmp_path / "again.bin")
    assert torch.load(tmp_path / "again.bin").keys() == state.keys()
    wconv("verify", tmp_path / "m.pt", tmp_path / "again.bin")


def test_float32_is_kept_by_the_names_that_the_class_knows(wconv: Callable[..., Any], tmp_path: Path) -> None:
    """What is renamed for another program stays float32, as what is renamed for the class does."""
    write_json(tmp_path / "m" / "config.json", {"architectures": ["T5ForConditionalGeneration"]})
    state = {"encoder.block.0.layer.1.DenseReluDense.wo.weight": torch.ones(2, 2), "shared.weight": torch.ones(2, 2)}
    save(state, tmp_path / "m" / "model.safetensors")
    wconv(
        "recast", tmp_path / "m", "--dtype", "fp16", "-o", tmp_path / "out", "--rename", r"DenseReluDense\.wo=ff.down"
    )
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written["encoder.block.0.layer.1.ff.down.weight"].dtype is torch.float32
    assert written["shared.weight"].dtype is torch.float16


def test_the_dry_run_lists_old_and_new_names(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(STATE, tmp_path / "m.pt")
    command = ("to-safetensors", tmp_path / "m.pt", "--strip-prefix", "model.", "--drop", "ema")
    said = wconv(*command, "--dry-run").stdout
    assert "Renamed in m.pt: 8 tensors\n    model.layers.*.q -> layers.*.q (4)\n" in said
    assert "left out, as --only and --drop have it: 1 of 10 names (model_ema.decay)" in said
    assert "    model.layers.3.k -> layers.3.k\n" in wconv(*command, "--dry-run", "-v").stdout
    [planned] = json.loads(wconv(*command, "--dry-run", "--json").stdout)["weight_sets"]
    assert planned["renamed"] == {name: name.removeprefix("model.") for name in LAYERS}
    assert "Renamed in m.pt: 8 tensors (-v lists them)" in wconv(*command).stdout


F8 = torch.ones(4, 4).to(torch.float8_e4m3fn)
QUANTIZED: State = {
    **{f"blocks.{number}.w.weight": F8.clone() for number in (0, 1)},
    **{f"blocks.{number}.w.weight_scale": torch.ones(1) for number in (0, 1)},
    "blocks.0.w.bias": torch.ones(4),
    "norm": torch.ones(4),
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--drop", r"0\.w\.weight_scale"), "would have 'blocks.0.w.weight' without 'blocks.0.w.weight_scale', which"),
        (("--drop", r"1\.w\.weight$"), "would have 'blocks.1.w.weight_scale' without 'blocks.1.w.weight', which"),
        (("--rename", r"weight_scale$=scale_of"), "would have the quantized weight 'blocks.0.w.weight' as "),
        (("--rename", r"0\.w\.weight$=0.v.weight"), "the quantized weight 'blocks.0.w.weight' as 'blocks.0.v.weight'"),
    ],
)  # fmt: skip
def test_quantized_weights_are_not_taken_apart(
    options: tuple[str, ...], said: str, wconv: Callable[..., Any], tmp_path: Path
) -> None:
    save_file(QUANTIZED, tmp_path / "q.safetensors")
    assert (
        said in wconv("to-safetensors", tmp_path / "q.safetensors", "-o", tmp_path / "o", *options, exit_code=2).stderr
    )


def test_quantized_weights_of_a_file_are_renamed_whole(wconv: Callable[..., Any], tmp_path: Path) -> None:
    source, out = tmp_path / "q" / "q.safetensors", tmp_path / "out.safetensors"
    source.parent.mkdir()
    save_file(QUANTIZED, source)
    wconv("to-safetensors", source, "-o", out, "--add-prefix", "net.", "--drop", "blocks.1")
    kept = {name: tensor for name, tensor in QUANTIZED.items() if "blocks.1" not in name}
    assert_same(load_file(out), {f"net.{name}": tensor for name, tensor in kept.items()})
    wconv("dequantize", source, "-o", tmp_path / "plain.safetensors", "--rename", r"\.w\.=.", "--only", "weight")
    plain = load_file(tmp_path / "plain.safetensors")
    assert {name: tensor.dtype for name, tensor in plain.items()} == dict.fromkeys(
        ("blocks.0.weight", "blocks.1.weight"), torch.bfloat16
    )
    write_json(source.parent / "config.json", {"quantization_config": {"quant_method": "fp8", "ignore": ["lm_head"]}})
    said = wconv("to-safetensors", source.parent, "-o", tmp_path / "no", "--add-prefix", "a.", exit_code=2).stderr
    assert "is quantized, and its config lists modules by the names that they have" in said
    wconv("dequantize", source.parent, "-o", tmp_path / "of-folder.safetensors", "--add-prefix", "a.")
    assert load_file(tmp_path / "of-folder.safetensors").keys() == {
        f"a.{name}" for name in QUANTIZED if not name.endswith("scale")
    }
    assert not (tmp_path / "config.json").exists()


def test_a_mark_and_a_note_of_comfyui_stay_with_what_they_mark(wconv: Callable[..., Any], tmp_path: Path) -> None:
    source, out = tmp_path / "c.safetensors", tmp_path / "out.safetensors"
    state = {"a.weight": F8, "a.scale_weight": torch.ones(1), "b.weight": F8.clone(), "scaled_fp8": F8[0, :2].clone()}
    save_file(state, source)
    for options in (("--drop", "scaled_fp8"), ("--rename", "scaled_fp8=mark")):
        wconv("to-safetensors", source, "-o", out, *options, exit_code=2)
    wconv("to-safetensors", source, "-o", out, "--add-prefix", "model.diffusion_model.")
    layers = {name: {"format": "float8_e4m3fn"} for name in ("x.a", "x.b")}
    state = {
        f"{name}.{what}": value
        for name in layers
        for what, value in (("weight", F8.clone()), ("weight_scale", torch.ones(())))
    }
    save_file(state, source, {"_quantization_metadata": json.dumps({"layers": layers, "v": 1})})
    wconv(
        "to-safetensors", source, "-o", out, "--drop", r"x\.b", "--add-prefix", "model.diffusion_model.", "--overwrite"
    )
    assert json.loads(header_notes(out)["_quantization_metadata"]) == {
        "layers": {"x.a": {"format": "float8_e4m3fn"}},
        "v": 1,
    }
    said = wconv("to-safetensors", source, "-o", tmp_path / "no", "--rename", r"x\.a=y.a", exit_code=2).stderr
    assert "'x.a.weight' as 'y.a.weight'" in said


def test_names_come_before_a_quantization(wconv: Callable[..., Any], tmp_path: Path) -> None:
    save(
        {f"model.blocks.{n}.ff.weight": torch.randn(16, 16) for n in range(2)} | {"ema.x": torch.ones(2)},
        tmp_path / "m.safetensors",
    )
    out = tmp_path / "q.safetensors"
    names = ("--strip-prefix", "model.", "--drop", "^ema", "--rename", r"ff\.=mlp.")
    wconv("quantize", tmp_path / "m.safetensors", "-o", out, "--scheme", "fp8-scaled", *names)
    assert {name for name in load_file(out) if name.endswith(".weight")} == {f"blocks.{n}.mlp.weight" for n in range(2)}


HASHES = {"modelspec.hash_sha256": "0xaa", "sshs_model_hash": "bb", "sshs_legacy_hash": "cc"}


@pytest.mark.parametrize(
    ("args", "gone"),
    [
        (("to-safetensors",), ()),
        (("to-safetensors", "--add-prefix", "m."), ("sshs_legacy_hash",)),
        (("to-safetensors", "--rename", "^a=z"), tuple(HASHES)),  # it comes after the others
        (("to-safetensors", "--drop", "a"), tuple(HASHES)),
        (("recast", "--dtype", "bf16"), tuple(HASHES)),
        (("reshard", "--max-shard-size", "10B"), tuple(HASHES)),
    ],
)  # fmt: skip
def test_hashes_that_become_stale_are_left_out(
    args: tuple[str, ...], gone: tuple[str, ...], wconv: Callable[..., Any], tmp_path: Path
) -> None:
    source, out = tmp_path / "m.safetensors", tmp_path / "out"
    save_file({"a": torch.ones(3), "b": torch.zeros(3)}, source, {"format": "pt", "ss_steps": "3", **HASHES})
    said = wconv(args[0], source, "-o", out, *args[1:]).stdout
    for path in out.glob("*.safetensors"):
        assert header_notes(path).keys() == {"format", "ss_steps", *HASHES} - set(gone)
    assert (f"left out of the header: {', '.join(gone)}" in said) == bool(gone)
    data = [path.read_bytes() for path in (source, *out.glob("*.safetensors"))]
    same = len({raw[8 + int.from_bytes(raw[:8], "little") :] for raw in data}) == 1
    assert same == ("sshs_model_hash" not in gone)


@pytest.mark.parametrize("source", ["m", "p"])
def test_one_file_of_a_folder(source: str, wconv: Callable[..., Any], tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "p")
    save_pipeline(tmp_path / "p", "fp16")
    unet = pipeline / "unet"
    unet.rename(tmp_path / "m") if source == "m" else None
    chosen = ("--from-variant", "none", *(("--component", "unet") if source == "p" else ()))
    out = tmp_path / "one.safetensors"
    folder = tmp_path / "m" if source == "m" else unet
    before = set(names_in(tmp_path))
    outcome = wconv("to-safetensors", tmp_path / source, "-o", out, *chosen, "--add-prefix", "model.diffusion_model.")
    assert set(names_in(tmp_path)) - before == {"one.safetensors"}
    assert_same(load_file(out), {f"model.diffusion_model.{name}": t for name, t in make_state(seed=1).items()})
    assert f"one file is written, and nothing goes with it: {folder} keeps config.json" in outcome.stdout
    inside = folder / "inside.safetensors"  # beside what is read
    wconv("to-safetensors", tmp_path / source, "-o", inside, *chosen)
    assert_same(load_file(inside), make_state(seed=1))

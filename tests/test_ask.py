"""Configs that lead a library to code, to the network or to more than fits, and the child that makes their class."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import save, write_json

from converter.dtypes import BY_ALIAS
from converter.errors import Unsupported
from converter.libraries import ask, asked
from converter.libraries.ask import LibraryMissing, ask_class, checked, cleaned
from converter.libraries.base import Library
from converter.libraries.diffusers import DIFFUSERS
from converter.libraries.transformers import TRANSFORMERS
from converter.models.component import Component
from converter.storage import place_of

LLAMA = {"model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
VIT = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
       "intermediate_size": 16, "image_size": 16, "patch_size": 8}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50, "add_cross_attention": True,
        "is_decoder": True}  # fmt: skip
DETR = {"model_type": "detr", "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 3,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
CODE = {"auto_map": {"AutoModel": "evil/evil--planted.Evil", "AutoConfig": "planted.Evil"}, "trust_remote_code": True}
LOOK_UPS: dict[str, tuple[str, dict[str, Any]]] = {
    "auto_map": ("LlamaModel", {**LLAMA, **CODE}),
    "auto_map, nested": ("VisionEncoderDecoderModel", {
        "model_type": "vision-encoder-decoder", "encoder": {**VIT, **CODE}, "decoder": {**GPT2, **CODE}}),
    "a backbone of the Hub": ("DetrForObjectDetection", {
        **DETR, "backbone": "evil/evil", "use_timm_backbone": False, "use_pretrained_backbone": True}),
    "a backbone of timm": ("DetrForObjectDetection", {
        **DETR, "backbone": "hf-hub:evil/evil", "use_timm_backbone": True}),
    "a backbone of timm, nested": ("DetrForObjectDetection", {
        **DETR, "backbone_config": {"model_type": "timm_backbone", "backbone": "hf-hub:evil/evil"}}),
    "a kernel": ("LlamaModel", {**LLAMA, "attn_implementation": "evil/evil"}),
    "a kernel, private": ("LlamaModel", {**LLAMA, "_attn_implementation": "evil/evil"}),
    "experts": ("LlamaModel", {**LLAMA, "experts_implementation": "evil/evil"}),
    "a name": ("LlamaModel", {**LLAMA, "_name_or_path": "evil/evil", "name_or_path": "evil/evil"}),
    "quantized": ("LlamaModel", {**LLAMA, "quantization_config": {"quant_method": "evil"}}),
}  # fmt: skip
LISTS = ("linear", "transposed", "skipped", "kept", "others", "experts", "joined")
NOTHING: dict[str, Any] = {**{key: [] for key in LISTS}, "remade": {}, "homes": {}, "shapes": {}}
# One process asks about all of them, with a module to be fooled by on its path.
WATCHED = """
import json, sys
seen = []
watched = ("socket.connect", "socket.getaddrinfo", "socket.sendto", "subprocess.Popen", "os.exec", "os.system")
sys.addaudithook(lambda event, args: seen.append(f"{event} {args}") if event.startswith(watched) else None)
from pathlib import Path
from converter.libraries import ask
from converter.libraries import asked
from converter.models.component import Component
from converter.storage import place_of
ask._ask = lambda request: ask.checked(json.dumps(asked.answer_to(json.loads(request))).encode())
said = {}
for name, (class_name, config) in json.load(sys.stdin).items():
    del seen[:]
    try:
        asking = Component("", place_of("m"), (), {**config, "architectures": [class_name]})
        answer = len(ask.ask_class(asking).shapes) > 0
    except ask.Unsupported as error:
        answer = str(error)
    said[name] = answer, list(seen), "planted" in sys.modules
print(json.dumps(said))
"""


def component_of(config: dict[str, Any], class_name: str = "LlamaModel") -> Component:
    return Component("", place_of("m"), (), {"architectures": [class_name], **config})


def test_nothing_is_looked_up_and_nobodys_code_runs(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text("class Evil: pass")
    code = f"import sys; sys.path[:0] = {[str(Path(ask.__file__).parents[2]), str(tmp_path)]}\n{WATCHED}"
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(LOOK_UPS), capture_output=True, text=True, check=True
    )
    said = json.loads(done.stdout.splitlines()[-1])
    assert said.keys() == LOOK_UPS.keys()
    for name, (answer, seen, is_planted) in said.items():
        assert (seen, is_planted) == ([], False), name
        assert (answer is True) != ("backbone" in name), (name, answer)
        assert answer is True or "asks for a backbone by its name, which is not looked up" in answer


def test_what_is_left_of_a_config() -> None:
    config = {"a": [{"auto_map": 1, "b": {"_private": 1, "use_timm_backbone": False, "c": 2}}], "backbone": None}
    assert cleaned(config) == {"a": [{"b": {"c": 2}}]}
    deep: Any = 1
    for _ in range(100):
        deep = {"a": deep}
    with pytest.raises(Unsupported, match="nested more than 20 deep"):
        ask_class(component_of(deep))


NO_MODELS = {
    "transformers": "AutoConfig AutoModel Trainer models __loader__ LlamaConfig pipeline PreTrainedModel",
    "diffusers": "AutoModel StableDiffusionPipeline DDIMScheduler ModelMixin loaders",
}


@pytest.mark.parametrize(
    ("class_name", "library"), [(name, library) for library, names in NO_MODELS.items() for name in names.split()]
)
def test_only_a_librarys_own_models_are_made(class_name: str, library: str) -> None:
    answer = asked.answer_to({"class": class_name, "library": library, "config": dict(LLAMA)})
    assert "has no model of that name" in answer["cause"]


def test_while_a_class_is_made_nothing_else_can_be_done() -> None:
    with asked._fenced(), pytest.raises(asked._Refused, match=r"asks for subprocess\.Popen"):
        subprocess.run([sys.executable, "--version"], check=True)
    subprocess.run([sys.executable, "--version"], check=True, stdout=subprocess.DEVNULL)


def test_a_model_of_too_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    request = {"class": "LlamaModel", "library": "transformers", "config": {**LLAMA, "num_hidden_layers": 10_000}}
    monkeypatch.setattr(asked, "_MOST_PARTS", 200)
    assert asked.answer_to(request)["cause"] == "it has more than 200 modules and weights"


# What a library that is newer than the table keeps in float32.


@pytest.fixture
def older_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the table be of older libraries, which had no lists."""
    monkeypatch.setattr(ask, "MADE_FROM", {"diffusers": "0.1.0", "transformers": "4.9"})
    monkeypatch.setattr(Library, "kept_entries", lambda *_: [])


def test_a_newer_library_is_asked_and_the_table_is_said_to_be_behind(
    older_table: None, wconv: Any, tmp_path: Path
) -> None:
    save({"a.wo.weight": torch.ones(4, 4), "a.wi.weight": torch.ones(4, 4)}, tmp_path / "m" / "model.safetensors")
    write_json(tmp_path / "m" / "config.json", {"architectures": ["T5EncoderModel"]})
    said = wconv("recast", tmp_path / "m", "--dtype", "fp16").stdout
    assert "is looked up in a table made from 4.9, which lacks wo: these are kept too" in said
    held = load_file(tmp_path / "m" / "model.fp16.safetensors")
    assert [str(held[name].dtype) for name in sorted(held)] == ["torch.float16", "torch.float32"]


@pytest.mark.parametrize(
    ("classes", "library", "alias", "expected"),
    [
        ({"T5EncoderModel"}, TRANSFORMERS, "fp16", ("wo",)),
        pytest.param({"T5EncoderModel"}, TRANSFORMERS, "bf16", (), marks=pytest.mark.slow),
        pytest.param({"NoSuchModel", "AutoModel"}, TRANSFORMERS, "fp16", (), marks=pytest.mark.slow),
        pytest.param({"UNet2DConditionModel"}, DIFFUSERS, "bf16", (), marks=pytest.mark.slow),
    ],
)
def test_what_a_newer_library_keeps(
    classes: set[str], library: Library, alias: str, expected: tuple[str, ...], older_table: None
) -> None:
    more, note = ask.ask_kept(library, classes, BY_ALIAS[alias])
    assert more == expected
    assert bool(note) == bool(expected)


def test_a_newer_library_that_gives_no_answer(older_table: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "_CHILD", "print('{}')")
    ask._ask_lists.cache_clear()
    more, note = ask.ask_kept(TRANSFORMERS, {"T5EncoderModel"}, BY_ALIAS["fp16"])
    ask._ask_lists.cache_clear()
    assert more == ()
    assert note.endswith("could not be asked of itself: what its library answers makes no sense")


def test_a_library_of_the_tables_own_version_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "_ask_lists", None)
    monkeypatch.setattr(ask, "MADE_FROM", {"diffusers": "0.42.1", "transformers": "999.0"})
    assert ask.ask_kept(TRANSFORMERS, {"T5EncoderModel"}, BY_ALIAS["fp16"]) == ((), "")


# The child.


def test_a_child_answers_what_is_answered_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It does not import from the current folder, as a model's folder may be.
    for name in ("torch", "json", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('planted')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = ask_class(component_of(LLAMA))
    monkeypatch.undo()
    config = cleaned(component_of(LLAMA).config)
    expected = asked.answer_to({"class": "LlamaModel", "library": "transformers", "config": config})
    assert found == checked(json.dumps(expected).encode())
    assert len(found.linear) == 14
    assert found.shapes["embed_tokens.weight"] == (64, 16)


def test_infinity_is_a_number_again() -> None:
    """As transformers writes it, and reads it."""
    config = {"limits": [0.0, {"__float__": "Infinity"}], "odd": [{"__float__": [1]}, {"__float__": "1", "x": 2}]}
    assert cleaned(config) == {"limits": [0.0, float("inf")], "odd": [{}, {"x": 2}]}


def test_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "_search_path", lambda: [entry for entry in sys.path if "site-packages" not in entry])
    with pytest.raises(LibraryMissing, match="its library is not installed"):
        ask_class(component_of({**LLAMA, "vocab_size": 65}))


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("print('{}')", "makes no sense"),
        ("print('[' * 100_000)", "makes no sense"),
        (f"print({json.dumps({**NOTHING, 'linear': [1]})!r})", "makes no sense"),
        (f"print({json.dumps({**NOTHING, 'shapes': {'a': [-1]}})!r})", "makes no sense"),
        ("while True: print('x' * 1_000_000)", "too many modules"),
        ("import os; os.abort()", "too much time or memory, or its library crashed"),
        ("import sys; sys.stdin.close(); sys.exit(1)", r"the process for it ended with 1\.$"),
        ("1 / 0", "the process for it ended with 1: ZeroDivisionError: division by zero"),
    ],
)  # fmt: skip
def test_answers_that_are_none(code: str, cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "_CHILD", code)
    ask._ask.cache_clear()
    with pytest.raises(Unsupported, match=cause):
        ask_class(component_of(LLAMA))
    ask._ask.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs the limits of Linux")
@pytest.mark.parametrize(
    ("change", "cause"),
    [({"num_hidden_layers": 100_000}, "more than 400,000 modules"), ({"num_labels": 10**10}, "MemoryError|too much")],
)
def test_a_model_of_any_size_ends(change: dict[str, int], cause: str) -> None:
    with pytest.raises(Unsupported, match=cause):
        ask_class(component_of({**LLAMA, **change}))

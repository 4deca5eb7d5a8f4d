"""The lines that commands print to load what they wrote: each is run, for every kind of model.

Where the source stays beside the output, its files are emptied first: a line that takes them fails.
What it gives holds each tensor that was written.
"""

from __future__ import annotations

import ast
import json
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import make_state, names_in, save, save_bin_shards, save_safetensors_shards, write_json

WEIGHTS = (".safetensors", ".bin", ".pt")
ODD = 'it\'s {a} 100% [b] "é"'


class Kind(NamedTuple):
    """A kind of model: what makes it, the command, and words of the line that is expected."""

    make: Callable[[Any, Path], object]
    args: tuple[str, ...]
    says: str


def llama(builders: Any, folder: Path, **config: Any) -> None:
    """Write a Llama in safetensors; None takes a key out of its config."""
    builders.save_safetensors(builders.shake(builders.make_llama(tied=False).eval()), folder)
    content = {**json.loads((folder / "config.json").read_text()), **config}
    write_json(folder / "config.json", {key: value for key, value in content.items() if value is not None})


def adapter(builders: Any, folder: Path, **config: Any) -> None:
    """Write an adapter for a Llama that lies beside it."""
    peft = pytest.importorskip("peft")
    llama(builders, folder.parent / "base")
    base = builders.LlamaForCausalLM.from_pretrained(folder.parent / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    write_json(path, {**json.loads(path.read_text()), **config})


def sentences(builders: Any, folder: Path) -> None:
    """Write a sentence-transformers folder of a BERT, a pooling and a dense layer."""
    st = pytest.importorskip("sentence_transformers")
    parts = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    from transformers import BertConfig, BertModel, BertTokenizerFast

    (folder.parent / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    config = BertConfig(vocab_size=7, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertModel(config).save_pretrained(folder.parent / "bert")
    BertTokenizerFast(vocab_file=str(folder.parent / "vocab.txt")).save_pretrained(folder.parent / "bert")
    modules = [parts.Transformer(str(folder.parent / "bert")), parts.Pooling(8), parts.Dense(8, 4)]
    st.SentenceTransformer(modules=modules).save(str(folder))


def plain(*names: str) -> Callable[[Any, Path], None]:
    """Give what writes files of these names, with other values each."""

    def write(_: Any, folder: Path) -> None:
        for number, name in enumerate(names):
            save(make_state(seed=number), folder / name)

    return write


def timm(_: Any, folder: Path) -> None:
    """Write a folder as timm's ``save_for_hf`` does."""
    save(make_state(), folder / "model.safetensors")
    write_json(folder / "config.json", {"architecture": "resnet18", "num_classes": 10, "pretrained_cfg": {}})


def model(name: str, form: str = "bin") -> Callable[[Any, Path], object]:
    """Give what writes a model of ``builders``."""
    return lambda builders, folder: getattr(builders, f"save_{form}")(builders.shake(builders.MODELS[name]()), folder)


def part(name: str) -> Callable[[Any, Path], object]:
    """Give what writes one part of a pipeline."""
    return lambda builders, folder: builders.save_bin(builders.shake(getattr(builders, f"make_{name}")()), folder)


BF16 = ("recast", "--dtype", "bf16")
KINDS = {
    "pipeline": Kind(model("sd"), ("to-safetensors", "-o"), "DiffusionPipeline"),
    "pipeline, a variant beside": Kind(model("sd"), BF16, "variant='bf16'"),
    "pipeline, a variant alone": Kind(model("sd"), (*BF16, "-o"), "variant='bf16'"),
    "pipeline, .bin beside": Kind(model("sd", "safetensors"), ("to-bin",), "use_safetensors=False"),
    "pipeline, .bin of one part": Kind(
        model("sd", "safetensors"), ("to-bin", "--component", "unet"), "UNet2DConditionModel"
    ),
    "pipeline for Core ML": Kind(model("sd"), ("prepare-coreml", "-o"), "variant='fp16'"),
    "Diffusers": Kind(part("vae"), ("to-safetensors",), "from diffusers import AutoencoderKL"),
    "Diffusers, .bin shards": Kind(
        part("unet"),
        ("reshard", "--max-shard-size", "200KB", "--force", "-o"),
        "use_safetensors=False",
    ),
    "transformers": Kind(llama, (*BF16, "-o"), "from transformers import LlamaForCausalLM"),
    "transformers beside": Kind(llama, BF16, "variant='bf16'"),
    "transformers, float8": Kind(llama, ("recast", "--dtype", "fp8_e4m3fn", "-o"), "LlamaForCausalLM"),
    "transformers, .bin beside": Kind(llama, ("to-bin",), "use_safetensors=False"),
    "transformers, renamed": Kind(llama, ("rename-variant", "--from", "none", "--to", "a_b"), "variant='a_b'"),
    "transformers, no class": Kind(lambda b, f: llama(b, f, architectures=None), (*BF16, "-o"), "load_file"),
    "transformers, 8 bits": Kind(llama, ("quantize", "-o"), 'device_map="auto"'),
    "code of its own": Kind(
        lambda b, f: llama(b, f, architectures=["Mine"], auto_map={"AutoModel": "mine.Mine"}), BF16, "load_file"
    ),
    "a model of Diffusers' own": Kind(part("safety_checker"), ("to-safetensors", "-o"), "from diffusers.pipelines"),
    "PEFT": Kind(adapter, (*BF16, "-o"), "AutoPeftModel."),
    "PEFT with a task": Kind(
        lambda b, f: adapter(b, f, task_type="CAUSAL_LM"), (*BF16, "-o"), "AutoPeftModelForCausalLM"
    ),
    "PEFT, .bin beside": Kind(adapter, ("to-bin",), "torch.load"),
    "PEFT, .bin": Kind(adapter, ("to-bin", "-o"), "AutoPeftModel"),
    "PEFT, a variant": Kind(adapter, (*BF16, "--variant", "bf16"), "load_file"),
    "PEFT without its model": Kind(
        lambda b, f: adapter(b, f, base_model_name_or_path=None), (*BF16, "-o"), "load_peft_weights"
    ),
    "LoRA of Diffusers": Kind(plain("pytorch_lora_weights.safetensors"), (*BF16, "-o"), "load_lora_weights"),
    "LoRA of Diffusers beside": Kind(plain("pytorch_lora_weights.safetensors"), BF16, "lora_weights.bf16.safetensors"),
    "sentence-transformers": Kind(sentences, (*BF16, "-o"), "SentenceTransformer"),
    "sentence-transformers, .bin beside": Kind(sentences, ("to-bin",), "torch.load"),
    "timm": Kind(timm, (*BF16, "-o"), "load_file"),
    "files": Kind(plain("a.pt", "b.pt", "c.bin"), ("to-safetensors", "-o"), "load_file"),
    "files to .bin": Kind(plain("a.safetensors", "x'y.safetensors"), ("to-bin",), "torch.load"),
    "shards": Kind(lambda _, f: save_safetensors_shards(make_state(), f), (*BF16, "-o"), "for path in paths"),
    "shards to .bin": Kind(lambda _, f: save_safetensors_shards(make_state(), f), ("to-bin",), "torch.load(path"),
    "shards of .bin": Kind(lambda _, f: save_bin_shards(make_state(), f), ("to-safetensors",), "load_file(path"),
    "odd names": Kind(
        plain("it's {0} 100% [b].pt"), ("to-safetensors", "--max-shard-size", "70B", "-o"), "for path in paths"
    ),
}

# What one of these files is, by itself.
FILES = {
    "safetensors": ("x.safetensors", (*BF16,), "load_file"),
    "to .bin": ("x.safetensors", ("to-bin",), "torch.load"),
    "of an adapter": ("adapter_model.bin", ("to-safetensors",), "load_file"),
    "named as a model": ("model.safetensors", BF16, "load_file"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_the_printed_lines_load_what_was_written(
    kind: str, builders: Any, wconv: Callable[..., Any], tmp_path: Path
) -> None:
    make, args, says = KINDS[kind]
    source = tmp_path / ODD / "source"
    source.parent.mkdir()
    make(builders, source)
    before = set(names_in(source))
    command, *options = args
    target = source.parent / "out" if args[-1] == "-o" else source
    said = wconv(command, source, *options, *([target] if target != source else [])).stdout
    written = [name for name in names_in(target) if target != source or name not in before]
    check(said, [target / name for name in written if name.endswith(WEIGHTS)], says)


@pytest.mark.parametrize("kind", FILES)
def test_the_printed_lines_load_a_file(kind: str, wconv: Callable[..., Any], tmp_path: Path) -> None:
    name, (command, *options), says = FILES[kind]
    save(make_state(), tmp_path / name)
    said = wconv(command, tmp_path / name, *options).stdout
    check(said, [path for path in tmp_path.iterdir() if path.name != name], says)


def check(said: str, written: list[Path], says: str) -> None:
    """Run what was said, with all other weights beside the written ones emptied, and hold it against these."""
    states = [read(path) for path in written]
    assert states
    for path in {path for one in written for path in one.parent.iterdir()} - set(written):
        if path.name.endswith(WEIGHTS):
            path.write_bytes(b"")
    blocks = said.split("Load it with:\n\n")[1].split("\n\n")
    assert says in blocks[0]
    loaded = {held for value in run(textwrap.dedent(blocks[0])) for held in contents(value)}
    missing = [
        name
        for state in states
        for name, tensor in state.items()
        if content(tensor) not in loaded and not is_place(tensor)
    ]
    assert not missing


def run(text: str) -> Iterator[Any]:
    """Run lines, and give the value of each that is an expression."""
    pipe = SimpleNamespace(load_lora_weights=lambda folder, weight_name: load_file(Path(folder) / weight_name))
    scope: dict[str, Any] = {"pipe": pipe}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for line in ast.parse(text).body:
            if isinstance(line, ast.Expr):
                yield eval(compile(ast.Expression(line.value), "<said>", "eval"), scope)
            else:
                exec(compile(ast.Module([line], []), "<said>", "exec"), scope)


def read(path: Path) -> dict[str, torch.Tensor]:
    """Read a file by the library that its ending names."""
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def contents(value: Any) -> Iterator[bytes]:
    """Give the content of all tensors of a state dict, a model, or a pipeline."""
    if hasattr(value, "components"):
        for each in value.components.values():
            if isinstance(each, torch.nn.Module):
                yield from contents(each)
        return
    for tensor in (value if isinstance(value, dict) else value.state_dict()).values():
        if isinstance(tensor, torch.Tensor):
            yield content(tensor)


def is_place(tensor: torch.Tensor) -> bool:
    """Say whether a tensor counts places: models make such buffers by themselves."""
    return tensor.dtype == torch.int64


def content(tensor: torch.Tensor) -> bytes:
    """Give the numbers of a tensor, of whatever dtype they were cast to on load."""
    return tensor.detach().cpu().float().contiguous().view(-1).view(torch.uint8).numpy().tobytes()

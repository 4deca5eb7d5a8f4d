"""Write a small Stable Diffusion pipeline folder as Diffusers lays it out, with torch `.bin` weights.

The weights are random, always the same, and have the names and shapes that diffusers and transformers give these
classes with these configs; the unet is in two shards with an index. The `.bin` files hold the records that
`torch.save` writes, in its order, but torch is not needed: the zip comes from `zipfile`, the pickle from `pickle`, with
two stand-ins for the names of torch that stand in it.
"""

import argparse
import io
import json
import math
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol
from unittest import mock

import numpy as np

SEED = 20
SHARD_NBYTES = 14_000_000  # cuts the unet in two

Json = dict[str, Any]
Shapes = Iterator[tuple[str, tuple[int, ...]]]


class Values(Protocol):
    """What numbers of a tensor are asked for: an array has it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...

    def tobytes(self) -> bytes: ...


StateDict = Mapping[str, Values]

# The words the tokenizer knows in one piece. Every other word is spelled out in bytes.
WORDS = "a an the of on in with and photo painting drawing cat dog horse house astronaut moon red blue green"

UNET: Json = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.42.1",
    "attention_head_dim": 8,
    "block_out_channels": [64, 128, 128],
    "cross_attention_dim": 128,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 1,
    "out_channels": 4,
    "sample_size": 32,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
VAE: Json = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.42.1",
    "block_out_channels": [32, 64, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "out_channels": 3,
    "sample_size": 256,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TEXT_ENCODER: Json = {
    "architectures": ["CLIPTextModel"],
    "dtype": "float32",
    "hidden_size": 128,
    "intermediate_size": 512,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
}
SCHEDULER: Json = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.42.1",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
PIPELINE: Json = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


# Names and shapes, in the order of each class's `state_dict()`.


def layer(name: str, *shape: int, bias: bool = True) -> Shapes:
    """Name the tensors of a linear layer, a convolution or a norm: SHAPE is the weight's."""
    yield f"{name}.weight", shape
    if bias:
        yield f"{name}.bias", shape[:1]


def under(prefix: str, shapes: Shapes) -> Shapes:
    for name, shape in shapes:
        yield f"{prefix}.{name}", shape


def resnet(n_in: int, n_out: int, n_time: int = 0) -> Shapes:
    yield from layer("norm1", n_in)
    yield from layer("conv1", n_out, n_in, 3, 3)
    if n_time:
        yield from layer("time_emb_proj", n_out, n_time)
    yield from layer("norm2", n_out)
    yield from layer("conv2", n_out, n_out, 3, 3)
    if n_in != n_out:
        yield from layer("conv_shortcut", n_out, n_in, 1, 1)


def attention(n: int, n_context: int, bias: bool) -> Shapes:
    yield from layer("to_q", n, n, bias=bias)
    yield from layer("to_k", n, n_context, bias=bias)
    yield from layer("to_v", n, n_context, bias=bias)
    yield from layer("to_out.0", n, n)


def transformer(n: int, n_context: int) -> Shapes:
    yield from layer("norm", n)
    yield from layer("proj_in", n, n, 1, 1)
    yield from under("transformer_blocks.0", transformer_block(n, n_context))
    yield from layer("proj_out", n, n, 1, 1)


def transformer_block(n: int, n_context: int) -> Shapes:
    yield from layer("norm1", n)
    yield from under("attn1", attention(n, n, bias=False))
    yield from layer("norm2", n)
    yield from under("attn2", attention(n, n_context, bias=False))
    yield from layer("norm3", n)
    yield from layer("ff.net.0.proj", 8 * n, n)
    yield from layer("ff.net.2", n, 4 * n)


def unet(config: Json) -> Shapes:
    channels, layers, n_context = (
        config["block_out_channels"],
        config["layers_per_block"],
        config["cross_attention_dim"],
    )
    first, last, n_time = channels[0], channels[-1], 4 * channels[0]
    yield from layer("conv_in", first, config["in_channels"], 3, 3)
    yield from layer("time_embedding.linear_1", n_time, first)
    yield from layer("time_embedding.linear_2", n_time, n_time)
    n, skips = first, [first]
    for i, (kind, n_out) in enumerate(zip(config["down_block_types"], channels, strict=True)):
        block = f"down_blocks.{i}"
        if kind.startswith("CrossAttn"):
            for j in range(layers):
                yield from under(f"{block}.attentions.{j}", transformer(n_out, n_context))
        for j in range(layers):
            yield from under(f"{block}.resnets.{j}", resnet(n, n_out, n_time))
            n = n_out
            skips.append(n)
        if i < len(channels) - 1:
            yield from layer(f"{block}.downsamplers.0.conv", n, n, 3, 3)
            skips.append(n)
    for i, (kind, n_out) in enumerate(zip(config["up_block_types"], reversed(channels), strict=True)):
        block = f"up_blocks.{i}"
        if kind.startswith("CrossAttn"):
            for j in range(layers + 1):
                yield from under(f"{block}.attentions.{j}", transformer(n_out, n_context))
        for j in range(layers + 1):
            yield from under(f"{block}.resnets.{j}", resnet(n + skips.pop(), n_out, n_time))
            n = n_out
        if i < len(channels) - 1:
            yield from layer(f"{block}.upsamplers.0.conv", n, n, 3, 3)
    yield from under("mid_block.attentions.0", transformer(last, n_context))
    for j in range(2):
        yield from under(f"mid_block.resnets.{j}", resnet(last, last, n_time))
    yield from layer("conv_norm_out", first)
    yield from layer("conv_out", config["out_channels"], first, 3, 3)


def vae(config: Json) -> Shapes:
    channels, layers, n_latent = config["block_out_channels"], config["layers_per_block"], config["latent_channels"]
    yield from under("encoder", vae_half(config["in_channels"], channels, layers, 2 * n_latent, "down"))
    yield from under("decoder", vae_half(n_latent, channels[::-1], layers + 1, config["out_channels"], "up"))
    yield from layer("quant_conv", 2 * n_latent, 2 * n_latent, 1, 1)
    yield from layer("post_quant_conv", n_latent, n_latent, 1, 1)


def vae_half(n_in: int, channels: list[int], layers: int, n_out: int, way: str) -> Shapes:
    """Name the tensors of the encoder (WAY is "down") or the decoder ("up")."""
    yield from layer("conv_in", channels[0], n_in, 3, 3)
    for i, (before, n) in enumerate(pairwise([channels[0], *channels])):
        for j in range(layers):
            yield from under(f"{way}_blocks.{i}.resnets.{j}", resnet(n if j else before, n))
        if i < len(channels) - 1:
            yield from layer(f"{way}_blocks.{i}.{way}samplers.0.conv", n, n, 3, 3)
    deepest = max(channels[0], channels[-1])
    yield from layer("mid_block.attentions.0.group_norm", deepest)
    yield from under("mid_block.attentions.0", attention(deepest, deepest, bias=True))
    for j in range(2):
        yield from under(f"mid_block.resnets.{j}", resnet(deepest, deepest))
    yield from layer("conv_norm_out", channels[-1])
    yield from layer("conv_out", n_out, channels[-1], 3, 3)


def text_encoder(config: Json) -> Shapes:
    """Names as transformers before 5 spells them; 5 reads these too, older ones read no others."""
    yield from under("text_model", text_model(config))


def text_model(config: Json) -> Shapes:
    n, n_inner = config["hidden_size"], config["intermediate_size"]
    yield from layer("embeddings.token_embedding", config["vocab_size"], n, bias=False)
    yield from layer("embeddings.position_embedding", config["max_position_embeddings"], n, bias=False)
    for i in range(config["num_hidden_layers"]):
        block = f"encoder.layers.{i}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from layer(f"{block}.self_attn.{name}", n, n)
        yield from layer(f"{block}.layer_norm1", n)
        yield from layer(f"{block}.mlp.fc1", n_inner, n)
        yield from layer(f"{block}.mlp.fc2", n, n_inner)
        yield from layer(f"{block}.layer_norm2", n)
    yield from layer("final_layer_norm", n)


def make_state_dict(shapes: Shapes, rng: np.random.Generator) -> StateDict:
    """Draw float32 values of a scale that keeps a forward pass finite."""
    state_dict = {}
    for name, shape in shapes:
        values = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) > 1:
            values /= np.float32(math.sqrt(math.prod(shape[1:])))
        else:  # biases near 0, the weights of norms near 1
            values = values * np.float32(0.02) + np.float32(name.endswith(".weight"))
        state_dict[name] = values.astype("<f4")
    return state_dict


# torch's file format.


class FloatStorage:
    """Stand-in for `torch.FloatStorage`: only its name gets into the pickle."""

    __module__ = "torch"


def _rebuild_tensor_v2(*args: Any) -> None:
    """Stand-in for `torch._utils._rebuild_tensor_v2`: only its name gets into the pickle."""


_rebuild_tensor_v2.__module__ = "torch._utils"


class Storage(tuple[Any, ...]):
    """The persistent id of a storage: its kind, class, record key, device and number of elements."""


class Tensor:
    """Stand-in for a contiguous `torch.Tensor` with a storage of its own."""

    def __init__(self, key: str, shape: tuple[int, ...]) -> None:
        self.key = key
        self.shape = shape

    def __reduce__(self) -> tuple[Any, ...]:
        strides = tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        storage = Storage(("storage", FloatStorage, self.key, "cpu", math.prod(self.shape)))
        return _rebuild_tensor_v2, (storage, 0, self.shape, strides, False, OrderedDict())


class StateDictPickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return tuple(obj) if isinstance(obj, Storage) else None


def pickle_state_dict(state_dict: StateDict) -> bytes:
    """Pickle tensors as `torch.save` does: their bytes are in the records `data/0`, `data/1`, ..."""
    buffer = io.BytesIO()
    # pickle looks a global up in its module before it writes the name, so the modules must seem to be there.
    stand_ins = SimpleNamespace(FloatStorage=FloatStorage, _rebuild_tensor_v2=_rebuild_tensor_v2)
    with mock.patch.dict(sys.modules, {"torch": stand_ins, "torch._utils": stand_ins}):
        tensors = {name: Tensor(str(i), values.shape) for i, (name, values) in enumerate(state_dict.items())}
        StateDictPickler(buffer, protocol=2).dump(tensors)
    return buffer.getvalue()


def write_torch_file(path: Path, state_dict: StateDict) -> None:
    """Write a torch zip archive: every record stored, with its CRC32."""
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:

        def add(record: str, payload: bytes) -> None:
            entry = zipfile.ZipInfo(f"{path.stem}/{record}")  # stored, dated 1980, as torch's are
            # torch aligns every payload to 64 bytes with an extra field "FB" in the local header, 30 bytes + name.
            padding = -(file.tell() + 30 + len(entry.filename.encode()) + 4) % 64
            entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
            archive.writestr(entry, payload)

        add("data.pkl", pickle_state_dict(state_dict))
        add(".format_version", b"1")
        add(".storage_alignment", b"64")
        add("byteorder", b"little")
        for i, values in enumerate(state_dict.values()):
            add(f"data/{i}", values.tobytes())
        add("version", b"3\n")
        add(".data/serialization_id", b"0" * 40)


# The folder.


def write_json(path: Path, content: Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def fill_shards(state_dict: StateDict) -> list[StateDict]:
    """Cut a state dict into shards, filled in order up to SHARD_NBYTES."""
    shards: list[dict[str, Values]] = [{}]
    for name, values in state_dict.items():
        if sum(other.nbytes for other in shards[-1].values()) + values.nbytes > SHARD_NBYTES:
            shards.append({})
        shards[-1][name] = values
    return [*shards]


def write_shards(folder: Path, stem: str, shards: Sequence[StateDict]) -> None:
    """Write shards and their index."""
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file_name = f"{stem}-{i:05d}-of-{len(shards):05d}.bin"
        write_torch_file(folder / file_name, shard)
        weight_map |= dict.fromkeys(shard, file_name)
    total_size = sum(values.nbytes for shard in shards for values in shard.values())
    write_json(folder / f"{stem}.bin.index.json", {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def write_tokenizer(folder: Path) -> int:
    """Write a CLIP byte pair tokenizer that knows WORDS; say how large its vocabulary is."""
    # The printable bytes stand for themselves, the others for the characters from 256 on (GPT-2, `bytes_to_unicode`).
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(code) for code in [*printable, *range(256, 256 + 256 - len(printable))]]
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS.split():
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges[pieces[0], pieces[1]] = None
            pieces[:2] = [pieces[0] + pieces[1]]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    special = {"bos_token": tokens[-2], "eos_token": tokens[-1], "pad_token": tokens[-1], "unk_token": tokens[-1]}
    config = {"do_lower_case": True, "model_max_length": TEXT_ENCODER["max_position_embeddings"]}
    write_json(folder / "tokenizer_config.json", special | config | {"tokenizer_class": "CLIPTokenizer"})
    write_json(folder / "special_tokens_map.json", special)
    (folder / "vocab.json").write_text(
        json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False), encoding="utf-8"
    )
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(tokens)


def make_sample(folder: Path) -> None:
    """Write the whole pipeline folder."""
    rng = np.random.default_rng(SEED)
    write_json(folder / "model_index.json", PIPELINE)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)

    n_tokens = write_tokenizer(folder / "tokenizer")
    specials = {"bos_token_id": n_tokens - 2, "eos_token_id": n_tokens - 1, "pad_token_id": n_tokens - 1}
    text_config = TEXT_ENCODER | specials | {"vocab_size": n_tokens}
    write_json(folder / "text_encoder" / "config.json", text_config)
    write_torch_file(folder / "text_encoder" / "pytorch_model.bin", make_state_dict(text_encoder(text_config), rng))

    write_json(folder / "vae" / "config.json", VAE)
    write_torch_file(folder / "vae" / "diffusion_pytorch_model.bin", make_state_dict(vae(VAE), rng))

    write_json(folder / "unet" / "config.json", UNET)
    write_shards(folder / "unet", "diffusion_pytorch_model", fill_shards(make_state_dict(unet(UNET), rng)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a small Stable Diffusion pipeline folder with .bin weights.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to; must not exist yet")
    folder = parser.parse_args().folder
    if folder.exists():
        parser.error(f"{folder}: exists already. name another folder, or remove it")
    make_sample(folder)


if __name__ == "__main__":
    main()

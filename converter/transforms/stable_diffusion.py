"""Stable Diffusion in a single file, in the layout of its own trainer, as the parts of a Diffusers pipeline.

Every tensor gets the name that ``from_single_file`` gives it (``diffusers/loaders/single_file_utils.py``), and the
shape where that differs, as a view of its bytes in the file. So it is streamed like any other, and neither torch nor
Diffusers is needed. What else a pipeline holds comes from ``configs``, or from a folder of the user's.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from converter.errors import BadFile, BadRequest, Unsupported, name_some
from converter.libraries.diffusers import DIFFUSERS
from converter.libraries.transformers import TRANSFORMERS
from converter.models.checkpoint import Checkpoint, open_checkpoint
from converter.models.component import Component, WeightSet
from converter.models.configs import read_json, render_json
from converter.models.hub_cache import lies_outside
from converter.models.model import Model
from converter.models.names import WeightsName
from converter.models.schemes import find_quantized
from converter.storage import FileRef, Place, place_of
from converter.tensors.base import Tensor, WeightsFile

CONFIGS = Path(__file__).parents[1] / "configs"
_UNET, _VAE, _EMA = "model.diffusion_model.", "first_stage_model.", "model_ema."
_CONV_IN = f"{_UNET}input_blocks.0.0.weight"
_CARRIED = (".json", ".txt", ".model")
_ABSENT = ("safety_checker", "feature_extractor", "image_encoder")  # no single file holds them


_MAX_COUNT = 1_000  # of layers, of blocks: real ones have up to 32
_CONFIG_TYPES = {
    "layers_per_block": int,
    "num_hidden_layers": int,
    "block_out_channels": list,
    "up_block_types": list,
    "architectures": list,
}


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of checkpoint: its folder in ``configs``, and what the names of its text encoders begin with.

    ``inpainting`` is what is other in the configs of its inpainting models.
    """

    name: str
    folder: str
    encoders: Mapping[str, str]
    inpainting: Mapping[str, Mapping[str, Any]]


_NINE = {"unet/config.json": {"in_channels": 9}}
_NINE_2: Mapping[str, Mapping[str, Any]] = {
    "unet/config.json": {"in_channels": 9, "sample_size": 64, "upcast_attention": False},
    "vae/config.json": {"sample_size": 512},
    "scheduler/scheduler_config.json": {"prediction_type": "epsilon"},
}
_XL = {"text_encoder": "conditioner.embedders.0.transformer.", "text_encoder_2": "conditioner.embedders.1.model."}
FAMILIES = (
    Family("Stable Diffusion XL", "sdxl", _XL, _NINE),
    Family("Stable Diffusion 2", "sd2", {"text_encoder": "cond_stage_model.model."}, _NINE_2),
    Family("Stable Diffusion 1", "sd1", {"text_encoder": "cond_stage_model.transformer."}, _NINE),
)
# By the beginning of a name that no other has.
_OTHERS = {
    "lora_": "a LoRA",
    f"{_UNET}joint_blocks.": "Stable Diffusion 3",
    "joint_blocks.": "Stable Diffusion 3",
    f"{_UNET}double_blocks.": "Flux",
    "double_blocks.": "Flux",
    "control_model.": "a ControlNet",
    "conditioner.embedders.0.model.": "a Stable Diffusion XL refiner",
}


@dataclass(frozen=True, slots=True)
class SingleFile:
    """A checkpoint as a pipeline: what it is, its parts, the files beside them and the text of some.

    ``copied`` and ``generated`` are as in a Plan.
    """

    model: Model
    checkpoints: tuple[tuple[Component, Checkpoint], ...]
    copied: tuple[tuple[str, FileRef], ...]
    generated: Mapping[str, bytes]
    notes: tuple[str, ...]


def open_single_file(
    given: Place | Path, config: Place | Path | None = None, ema: bool = False, follow_links: bool = False
) -> SingleFile:
    """Read a checkpoint's header and sort its tensors into parts; ``ema`` takes the UNet's averaged weights.

    ``config`` is a pipeline folder, of which the weights are not looked at, nor what else in it lies elsewhere by links
    unless ``follow_links``. Raises Unsupported for another model, BadFile or BadRequest for a part that is missing or
    does not fit its config.
    """
    source = place_of(given)
    checkpoint = open_checkpoint(source)
    tensors = {info.name: info for info in checkpoint.tensors}
    for one in find_quantized({name: info.dtype for name, info in tensors.items()}):
        raise Unsupported(source, f"is quantized ({one}), which Core ML does not take", one.advice)
    family, channels = recognise(source, tensors)
    root = place_of(config or CONFIGS / family.folder)
    notes = [f"{source.name} is a {family.name} checkpoint{' for inpainting' if channels == 9 else ''}"]
    is_inpainting = config is None and channels == 9
    if config is None and not is_inpainting and family.folder == "sd2":
        notes.append("it is taken for one of 768 pixels; for one of 512, give the folder of such a model as --config")
    notes += checkpoint.notes
    changes = family.inpainting if is_inpainting else {}
    edited = {name: render_json({**_read(root / name), **change}) for name, change in changes.items()}
    index = _index_of(root / "model_index.json", family, is_inpainting)
    edited["model_index.json"] = render_json(index)
    parts: list[tuple[Component, Checkpoint]] = []
    prefixes = {"unet": _UNET, "vae": _VAE, **family.encoders}
    for name, prefix in prefixes.items():
        path = root / name / "config.json"
        content = {**_read(path), **changes.get(f"{name}/config.json", {})}
        _check_config(path, content)
        mine = {full.removeprefix(prefix): info for full, info in tensors.items() if full.startswith(prefix)}
        if name == "unet" and ema:
            mine = _averaged(source, mine, tensors)
        converted, left = _convert(source, family, name, mine, content, _rule_of(name, prefix))
        if left:
            notes.append(f"left out, for no {name} has them: {name_some([prefix + short for short in left], 1)}")
        _check_shapes(source, str(path) if config else f"the {name} of {family.name}", content, converted)
        file = replace(checkpoint.files[0], tensors=tuple(converted), metadata={})
        parts.append(_part_of(source, name, content, file))
    notes += _notes_of_rest([name for name in tensors if not name.startswith(tuple(prefixes.values()))], ema)
    components = tuple(component for component, _ in parts)
    model = Model(source, source.parent, "pipeline", components, index["_class_name"])
    carried = {name: path for name, path in _files_beside(root, index) if name not in edited}
    linked = [] if follow_links else [name for name, path in carried.items() if lies_outside(path, root)]
    notes += (f"not carried over: {carried.pop(name)} (behind a link: --follow-links carries it)" for name in linked)
    if config is None:
        edited.update(_tokenizer_files(index))
    return SingleFile(
        model,
        tuple(parts),
        tuple((name, place.ref()) for name, place in carried.items()),
        edited,
        tuple(notes),
    )


def _index_of(path: Place, family: Family, is_inpainting: bool) -> dict[str, Any]:
    """Give a pipeline's index as it is without what a single file has not. Raises BadRequest for another family's."""
    index = _read(path)
    if is_inpainting:
        index["_class_name"] = index["_class_name"].replace("Pipeline", "InpaintPipeline")
    index.update({name: [None, None] for name in _ABSENT if name in index})
    if "requires_safety_checker" in index:
        index["requires_safety_checker"] = False
    encoders = [name for name in index if name.startswith("text_encoder") and index[name] != [None, None]]
    if sorted(encoders) != sorted(family.encoders):
        problem = f"names {' and '.join(encoders) or 'no text encoder'}, and {family.name} has"
        problem += f" {' and '.join(family.encoders)}"
        raise BadRequest(path, problem, "Give the right --config.")
    return index


def _part_of(source: Place, name: str, config: dict[str, Any], file: WeightsFile) -> tuple[Component, Checkpoint]:
    """Give a part with the name that its weights have in a pipeline."""
    library = DIFFUSERS if name in ("unet", "vae") else TRANSFORMERS
    named = WeightsName(library.stem("safetensors"), None, "safetensors")
    weight_set = WeightSet(source.parent, named, (source.name,))
    return Component(name, source.parent / name, (weight_set,), config), Checkpoint(weight_set, (file,), {})


def recognise(source: Place, tensors: Mapping[str, Tensor]) -> tuple[Family, int]:
    """Say what a checkpoint is by names and shapes: its family, and how many channels its UNet takes.

    Nine are an image, its mask and the masked image: inpainting. Raises Unsupported for anything else.
    """
    advice = "Name a checkpoint of Stable Diffusion 1, 2 or XL, or the folder of a Diffusers pipeline."
    for prefix, what in _OTHERS.items():
        if any(name.startswith(prefix) for name in tensors):
            raise Unsupported(source, f"is {what}, which has no way to Core ML here", advice)
    if _CONV_IN not in tensors:
        problem = f"is no Stable Diffusion checkpoint: it has no tensor {_CONV_IN!r}"
        raise Unsupported(source, problem, advice)
    channels = ([*tensors[_CONV_IN].shape, 0, 0])[1]
    if channels not in (4, 9):
        problem = f"is for another purpose than making or inpainting pictures: its UNet takes {channels} channels"
        raise Unsupported(source, problem, advice)
    for family in FAMILIES:
        if all(any(name.startswith(prefix) for name in tensors) for prefix in family.encoders.values()):
            break
    else:
        raise BadFile(source, "holds a UNet, and no text encoder of Stable Diffusion 1, 2 or XL", advice)
    if not any(name.startswith(_VAE) for name in tensors):
        raise BadFile(source, f"holds no VAE: no name begins with {_VAE!r}", "Take a checkpoint with its VAE in it.")
    return family, channels


def _averaged(source: Place, plain: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the averaged weights for the plain ones: their names have no dots (``ldm/modules/ema.py``)."""
    flat = {name: _EMA + f"{_UNET}{name}".removeprefix("model.").replace(".", "") for name in plain}
    missing = [name for name in flat.values() if name not in tensors]
    if missing:
        problem = f"lacks EMA weights: {len(missing)} of {len(flat)}, such as {missing[0]!r}"
        raise BadFile(source, problem, "Leave --ema out.")
    return {name: tensors[averaged] for name, averaged in flat.items()}


# Names. Each rule gives the new names of a tensor, each with its view; none for what no Diffusers model has.

_Views = Iterator[Tensor]
_Rule = Callable[[str, Tensor, Mapping[str, Any]], _Views]

_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET_BLOCK = re.compile(r"(input|middle|output)_blocks?\.(\d{1,9})\.(?:(\d+)\.)?(.+)")
_UNET_MIDDLE = ("resnets.0", "attentions.0", "resnets.1")


def _unet(name: str, info: Tensor, config: Mapping[str, Any]) -> _Views:
    stem, _, leaf = name.rpartition(".")
    if stem in _UNET_ENDS:
        yield info._replace(name=f"{_UNET_ENDS[stem]}.{leaf}")
        return
    found = _UNET_BLOCK.fullmatch(name)
    if not found:
        return
    side, number, place, rest = found.groups()
    if side == "middle":
        where = f"mid_block.{_UNET_MIDDLE[int(number)]}" if int(number) < 3 else ""
    else:
        block, layer = divmod(int(number) - (side == "input"), int(config.get("layers_per_block", 2)) + 1)
        where = f"{'down' if side == 'input' else 'up'}_blocks.{block}"
        sampler, _, end = rest.partition(".")
        if sampler in ("op", "conv"):
            yield info._replace(name=f"{where}.{'down' if side == 'input' else 'up'}samplers.0.conv.{end}")
            return
        where = f"{where}.{'attentions' if place == '1' else 'resnets'}.{layer}"
    stem, _, leaf = rest.rpartition(".")
    if ".resnets." in where:
        rest = f"{_UNET_RESNET[stem]}.{leaf}" if stem in _UNET_RESNET else ""
    if where and rest:
        yield info._replace(name=f"{where}.{rest}")


_VAE_SAME = ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out", "quant_conv")
_VAE_ENDS = {
    **{name: name for name in (*_VAE_SAME, "post_quant_conv")},
    "encoder.norm_out": "encoder.conv_norm_out",
    "decoder.norm_out": "decoder.conv_norm_out",
}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_VAE_BLOCK = re.compile(r"(encoder\.down|decoder\.up)\.(\d{1,9})\.(?:block\.(\d+)|(?:down|up)sample)\.(.+)")
_VAE_MIDDLE = re.compile(r"(encoder|decoder)\.mid\.(?:block_([12])|attn_1)\.(.+)")


def _vae(name: str, info: Tensor, config: Mapping[str, Any]) -> _Views:
    stem, _, leaf = name.rpartition(".")
    if stem in _VAE_ENDS:
        yield info._replace(name=f"{_VAE_ENDS[stem]}.{leaf}")
    elif found := _VAE_BLOCK.fullmatch(name):
        side, number, layer, rest = found.groups()
        # The decoder's blocks are counted from its end.
        block = int(number) if side == "encoder.down" else len(config.get("up_block_types", ())) - 1 - int(number)
        kind = f"resnets.{layer}" if layer else f"{side.rpartition('.')[2]}samplers.0"
        yield info._replace(name=f"{side}_blocks.{block}.{kind}.{rest.replace('nin_shortcut', 'conv_shortcut')}")
    elif found := _VAE_MIDDLE.fullmatch(name):
        side, number, rest = found.groups()
        if number:
            rest = rest.replace("nin_shortcut", "conv_shortcut")
            yield info._replace(name=f"{side}.mid_block.resnets.{int(number) - 1}.{rest}")
            return
        stem, _, leaf = rest.rpartition(".")
        if stem in _VAE_ATTENTION:
            # A convolution of one pixel is a matrix.
            is_matrix = len(info.shape) > 2 and set(info.shape[2:]) == {1}
            view = info._replace(source=info.source.permuted((0, 1))) if is_matrix else info
            yield view._replace(name=f"{side}.mid_block.attentions.0.{_VAE_ATTENTION[stem]}.{leaf}")


_CLIP_NAME = re.compile(r"(text_model\.)?(embeddings|encoder|final_layer_norm)\.")


def _clip(name: str, info: Tensor, config: Mapping[str, Any]) -> _Views:
    if _CLIP_NAME.match(name) and not name.endswith("position_ids"):
        yield info._replace(name=name)


_OPEN_CLIP_ENDS = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_OPEN_CLIP_BLOCK = re.compile(r"transformer\.resblocks\.(\d{1,9})\.(?:attn\.in_proj_(weight|bias)|(.+)\.(weight|bias))")


def _open_clip(name: str, info: Tensor, config: Mapping[str, Any]) -> _Views:
    if name in _OPEN_CLIP_ENDS:
        yield info._replace(name=_OPEN_CLIP_ENDS[name])
    elif name == "text_projection" and "CLIPTextModelWithProjection" in config.get("architectures", ()):
        yield Tensor(f"{name}.weight", info.source.permuted(tuple(reversed(range(len(info.shape))))))
    elif found := _OPEN_CLIP_BLOCK.fullmatch(name):
        number, joint, stem, leaf = found.groups()
        where = f"text_model.encoder.layers.{number}"
        if int(number) >= config.get("num_hidden_layers", 0):
            return  # Stable Diffusion 2 reads the layer before the last
        if joint and info.shape:
            rows = info.shape[0] // 3
            for place, which in enumerate(("q_proj", "k_proj", "v_proj")):
                start = (place * rows, *(0 for _ in info.shape[1:]))
                third = info.source.box(start, (rows, *info.shape[1:]))
                yield Tensor(f"{where}.self_attn.{which}.{joint}", third)
        elif stem and stem in _OPEN_CLIP_LAYER:
            yield info._replace(name=f"{where}.{_OPEN_CLIP_LAYER[stem]}.{leaf}")


def _rule_of(name: str, prefix: str) -> _Rule:
    if name in ("unet", "vae"):
        return _unet if name == "unet" else _vae
    return _open_clip if prefix.endswith(".model.") else _clip


def _convert(
    source: Place,
    family: Family,
    part: str,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    rule: _Rule,
) -> tuple[list[Tensor], list[str]]:
    """Give the tensors of a part under their new names, and the old names of those that it has no use for.

    Raises Unsupported for two that come to one name, and for any that a UNet does not have.
    """
    converted: list[Tensor] = []
    left: list[str] = []
    for name, info in tensors.items():
        views = list(rule(name, info, config))
        converted += views
        if not views:
            left.append(name)
    advice = "Is it another model, or one with something added?"
    if len({info.name for info in converted}) < len(converted):
        raise Unsupported(source, f"holds two tensors that come to one name in the {part}", advice)
    if left and part == "unet":
        problem = f"holds tensors that no UNet of {family.name} has: {name_some([_UNET + name for name in left], 1)}"
        raise Unsupported(source, problem, advice)
    return converted, left


def _check_config(path: Place, config: Mapping[str, Any]) -> None:
    for key, kind in _CONFIG_TYPES.items():
        if key in config and not (type(config[key]) is kind and 0 < _count(config[key]) <= _MAX_COUNT):
            raise BadRequest(path, f"has a {key} that this cannot be: {config[key]!r}", "Give the right --config.")


def _count(value: Any) -> int:
    return len(value) if isinstance(value, list) else int(value)


def _check_shapes(source: Place, what: str, config: Mapping[str, Any], tensors: Sequence[Tensor]) -> None:
    """Raise BadRequest where a part is not of the size that its config says; ``what`` names the config."""
    shapes = {info.name: info.shape for info in tensors}
    widths = config.get("block_out_channels", (0,))
    if "cross_attention_dim" in config:
        expected: dict[str, tuple[Any, Any]] = {
            "conv_in.weight": (widths[0], config.get("in_channels")),
            "conv_out.weight": (config.get("out_channels"), widths[0]),
        }
        keys = [name for name in shapes if name.endswith("attn2.to_k.weight")]
        expected |= {name: (*shapes[name][:1], config["cross_attention_dim"]) for name in keys}
        expected |= {f"down_blocks.{at}.resnets.0.conv2.weight": (width, width) for at, width in enumerate(widths)}
    elif "latent_channels" in config:
        expected = {"encoder.conv_in.weight": (widths[0], 3), "decoder.conv_out.weight": (3, widths[0])}
        expected |= {
            f"encoder.down_blocks.{at}.resnets.0.conv2.weight": (width, width) for at, width in enumerate(widths)
        }
    else:
        # transformers 4 and 5 differ in the prefix.
        shapes = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
        width, last = config.get("hidden_size"), config.get("num_hidden_layers", 1) - 1
        expected = {
            "embeddings.token_embedding.weight": (config.get("vocab_size"), width),
            f"encoder.layers.{last}.mlp.fc1.weight": (config.get("intermediate_size"), width),
        }
    for name, shape in expected.items():
        if shapes.get(name, ())[:2] != shape:
            found = "x".join(map(str, shapes[name])) if name in shapes else "not there"
            problem = f"does not fit {what}: {name} is {found}, and should begin with {'x'.join(map(str, shape))}"
            raise BadRequest(source, problem, "Give a --config folder that it fits.")


# What is beside the weights.


def _files_beside(root: Place, index: Mapping[str, Any]) -> Iterator[tuple[str, Place]]:
    """List the files of the parts that a pipeline names, by their names from its folder."""
    for name, entry in index.items():
        if isinstance(entry, list) and entry[:1] != [None] and name.isidentifier() and (root / name).is_folder():
            for path in (root / name).entries():
                if path.name.endswith(_CARRIED) and ".index." not in path.name and path.is_file():
                    yield f"{name}/{path.name}", path


def _tokenizer_files(index: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Give CLIP's vocabulary for each tokenizer: all of them share it."""
    with place_of(CONFIGS / "clip_merges.txt.gz").open() as file:
        merges = gzip.decompress(b"".join(file.chunks()))
    vocabulary = json.dumps(_vocabulary(merges.decode().splitlines()[1:]), ensure_ascii=False).encode()
    for name in index:
        if name.startswith("tokenizer"):
            yield f"{name}/merges.txt", merges
            yield f"{name}/vocab.json", vocabulary


def _vocabulary(merges: Sequence[str]) -> dict[str, int]:
    """Number CLIP's tokens: every byte, the same at a word's end, what each merge gives, and the two marks.

    Bytes that do not print stand for themselves 256 higher (``clip/simple_tokenizer.py``).
    """
    prints = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [*map(chr, prints), *(chr(256 + count) for count in range(256 - len(prints)))]
    joined = [merge.replace(" ", "") for merge in merges]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *joined, "<|startoftext|>", "<|endoftext|>"]
    return {token: place for place, token in enumerate(tokens)}


def _notes_of_rest(names: Sequence[str], ema: bool) -> Iterator[str]:
    averaged = [name for name in names if name.startswith(_EMA)]
    others = [name for name in names if not name.startswith(_EMA)]
    if averaged and not ema:
        yield f"the UNet's EMA weights are left out ({len(averaged)} tensors); --ema takes them in its place"
    if ema:
        yield "the UNet's EMA weights are taken, and its plain ones left out"
    if others:
        yield f"left out, for no part of a pipeline has them: {name_some(others, 1)}"


def _read(path: Place) -> dict[str, Any]:
    content = read_json(path)
    if not content:
        raise BadFile(path, "is not there, or no JSON object", "Give a --config folder that has it.")
    return content

"""The only place that spells or parses the name of a weight file or of its index.

Current spellings, as diffusers and transformers write them (``_add_variant`` in ``diffusers/utils/hub_utils.py`` and
``transformers/utils/hub.py``)::

    model.safetensors             model-00001-of-00002.safetensors       model.safetensors.index.json
    model.fp16.safetensors        model.fp16-00001-of-00002.safetensors  model.safetensors.index.fp16.json

Read as well, never written: ``model-00001-of-00002.fp16.safetensors`` and ``model.safetensors.fp16.index.json``
(diffusers up to 0.30) and ``model.fp16.safetensors.index.json`` (huggingface_hub).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

from converter.dtypes import BY_ALIAS, DType
from converter.errors import BadRequest

Format = Literal["safetensors", "torch"]
"""The two that are written; what is read is for the first bytes of a file to say."""

WEIGHT_EXTENSIONS = ("safetensors", "bin", "pt", "pth", "ckpt")

# What loaders look for: ``WEIGHTS_NAME`` and ``SAFETENSORS_WEIGHTS_NAME`` in the ``utils`` of Diffusers and of
# transformers, which names the same weights by their format, and in ``peft/utils/constants.py``.
STEMS: Mapping[str, Mapping[Format, str]] = {
    "diffusers": {"safetensors": "diffusion_pytorch_model", "torch": "diffusion_pytorch_model"},
    "transformers": {"safetensors": "model", "torch": "pytorch_model"},
    "peft": {"safetensors": "adapter_model", "torch": "adapter_model"},
}
# The whole state dict of a sharded model (``FSDP_MODEL_NAME`` in ``accelerate/utils/constants.py``).
_FULL_FSDP = "pytorch_model_fsdp"
# Of these every dotted tail is a variant; of another stem it is one only if it is a well-known tag.
_STANDARD_STEMS = frozenset(stem for stems in STEMS.values() for stem in stems.values())
_STANDARD_NAMES = frozenset(
    name for stems in STEMS.values() for name in ((stems["safetensors"], "safetensors"), (stems["torch"], "bin"))
)
# Of a model, with what has been put between the stem and the ending.
_MODEL_STEM = re.compile(
    rf"({'|'.join({stem for library in ('diffusers', 'transformers') for stem in STEMS[library].values()})})(\.(.+))?"
)
_KNOWN_TAGS = re.compile(r"(?:fp|bf|f|int)\d+\w*|(?:non_?)?ema", re.IGNORECASE)

# What trainers leave beside the weights, to go on from: ``transformers/trainer.py``, ``accelerate/checkpointing.py``,
# ``deepspeed/runtime/engine.py``, ``verl/utils/checkpoint/fsdp_checkpoint_manager.py``. It is no weights, and takes
# twice their room and more.
_TRAINING_STATE = re.compile(
    r"(training_args|optimizer|scheduler|scaler|sampler|rng_state|random_states|training_state|trainer_state|"
    r"dl_state_dict|custom_checkpoint).*\.(bin|pt|pth|pkl|ckpt|safetensors)(\.index\.json)?|"
    r"(optim|extra_state)_world_size_\d+_rank_\d+\.pt|(trainer|training)_state\.json|zero_to_(fp32|torch)\.py|"
    r"fsdp_config\.json|data\.pt|latest(_universal)?"
)
# Folders of an optimizer alone, such as accelerate's (``OPTIMIZER_NAME`` in ``accelerate/utils/constants.py``).
_TRAINING_FOLDER = re.compile(r"optim(izer)?(_states?)?(_\d+)?")
_NUMBER = re.compile(r"\d+")
_LAST_NUMBER = re.compile(r"\d+(?=\D*$)")
# The endings of weights in forms of other runtimes: ONNX Runtime, TensorFlow with Keras and LiteRT, Flax, rust-bert,
# llama.cpp, Diffusers with FlashPack, Core ML, NeMo, TensorRT, ExecuTorch, and torch where there are many processes.
_RUNTIME_ENDINGS = "onnx|pb|h5|keras|tflite|msgpack|ot|gguf|ggml|flashpack|mlmodel|nemo|engine|pte|distcp"
# What else they have: folders of Core ML, what ONNX keeps beside its files, what OpenVINO and MLX call their own.
_OTHER_RUNTIMES = re.compile(
    rf".*\.({_RUNTIME_ENDINGS}|mlmodelc|mlpackage|onnx[._]data.*)|openvino.*|(model|weights)\b.*\.npz"
)

_EXT = "|".join(WEIGHT_EXTENSIONS)
_INDEX = re.compile(rf"(?P<base>.+)\.(?P<ext>{_EXT})(?P<old>\.[^.]+)?\.index(?P<new>\.[^.]+)?\.json")
_SHARD = re.compile(rf"(?P<base>.+)-(?P<number>\d{{5,9}})-of-(?P<count>\d{{5,9}})(?P<old>\.[^.]+)?\.(?P<ext>{_EXT})")
_SINGLE = re.compile(rf"(?P<base>.+)\.(?P<ext>{_EXT})")
# Files, and no folders: our own endings spelled otherwise, what other runtimes read, archives.
_OTHER_FILE = re.compile(
    rf".+\.({_EXT}|safetensor|sft|{_RUNTIME_ENDINGS}|np[yz]|pkl|pickle|json|zip|tar|t?gz)", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class WeightsName:
    """The name of a weight set: gives the file names of its single file, its shards and its index.

    >>> name = WeightsName("model", "fp16", "safetensors")
    >>> name.single, name.shard(1, 2), name.index
    ('model.fp16.safetensors', 'model.fp16-00001-of-00002.safetensors', 'model.safetensors.index.fp16.json')
    """

    stem: str
    variant: str | None
    ext: str

    @property
    def _tagged(self) -> str:
        return f"{self.stem}.{self.variant}" if self.variant else self.stem

    @property
    def single(self) -> str:
        return f"{self._tagged}.{self.ext}"

    def shard(self, number: int, count: int) -> str:
        """Name shard ``number`` of ``count``, counted from 1."""
        return f"{self._tagged}-{number:05d}-of-{count:05d}.{self.ext}"

    @property
    def index(self) -> str:
        return f"{self.stem}.{self.ext}.index.{self.variant}.json" if self.variant else f"{self.single}.index.json"

    def files(self, count: int) -> tuple[str, ...]:
        """Name the weight files of a set of ``count``: one has neither number nor index."""
        if count == 1:
            return (self.single,)
        return tuple(self.shard(number, count) for number in range(1, count + 1))

    def in_format(self, form: Format | None) -> WeightsName:
        """Name the same weights in a format: ``pytorch_model.bin`` becomes ``model.safetensors`` and back.

        None stands for their own, where that is written, and else for safetensors.
        """
        if self.ext in WEIGHT_EXTENSIONS and form in (None, self.format):
            return self
        form = form or "safetensors"
        stems = {stems[self.format]: stems[form] for stems in STEMS.values()}
        stems[_FULL_FSDP] = STEMS["transformers"][form]
        ext = "safetensors" if form == "safetensors" else "bin"
        return replace(self, stem=stems.get(self.stem, self.stem), ext=ext)

    @property
    def is_standard(self) -> bool:
        """Whether ``from_pretrained`` of a library looks for such names."""
        return self.stem in _STANDARD_STEMS

    @property
    def is_sought(self) -> bool:
        """Whether a loader looks for just this name, and so takes what bears it for weights."""
        return (self.stem, self.ext) in _STANDARD_NAMES

    @property
    def tail(self) -> str | None:
        """What follows a stem that loaders of models look for, and is no part of it; None for any other stem."""
        match = _MODEL_STEM.fullmatch(self.stem)
        return (match[3] or "") if match else None

    @property
    def tagged_dtype(self) -> DType | None:
        """The dtype that the variant names, if it names one."""
        return BY_ALIAS.get((self.variant or "").lower())

    @property
    def format(self) -> Format:
        return "safetensors" if self.ext == "safetensors" else "torch"


class Naming(NamedTuple):
    """What the sets of an output are called: in a format, and tagged with a variant, ``"none"`` for untagged.

    None stands for the source's own.
    """

    format: Format | None = None
    variant: str | None = None

    def of(self, name: WeightsName) -> WeightsName:
        """Give the name under which a set of this name is written. Raises BadRequest for a tag that is none."""
        name = name.in_format(self.format)
        if self.variant is None:
            return name
        return replace(name, variant=None if self.variant == "none" else check_variant(self.variant))


@dataclass(frozen=True, slots=True)
class ParsedName:
    """What a file name says: the set it belongs to, and its part in it. ``number`` and ``count`` are a shard's."""

    name: WeightsName
    role: Literal["single", "shard", "index"]
    number: int = 0
    count: int = 0
    is_legacy: bool = False


@lru_cache(1 << 14)  # asked several times of each file, and there are folders of thousands
def parse_name(file_name: str) -> ParsedName | None:
    """Read a file name in any known spelling; None if it is no weight file and no index.

    >>> parse_name("model-00001-of-00002.fp16.bin").name
    WeightsName(stem='model', variant='fp16', ext='bin')
    >>> parse_name("config.json")
    """
    if match := _INDEX.fullmatch(file_name):
        stem, inner = _split_variant(match["base"])
        tag = match["new"] or match["old"]
        variant = tag[1:] if tag else inner
        name = WeightsName(stem if variant == inner else match["base"], variant, match["ext"])
        return ParsedName(name, "index", is_legacy=name.index != file_name)
    if match := _SHARD.fullmatch(file_name):
        stem, inner = (match["base"], match["old"][1:]) if match["old"] else _split_variant(match["base"])
        name = WeightsName(stem, inner, match["ext"])
        # More zeros before a number are no legacy: DeepSeek's ``-of-000163``, which an index names, and loaders open.
        return ParsedName(name, "shard", int(match["number"]), int(match["count"]), is_legacy=match["old"] is not None)
    if match := _SINGLE.fullmatch(file_name):
        stem, inner = _split_variant(match["base"])
        return ParsedName(WeightsName(stem, inner, match["ext"]), "single")
    return None


def name_of_other(file_name: str) -> WeightsName:
    """Give the name of the set that a file of any name makes, where a user names it.

    >>> name_of_other("weights.npz").in_format("safetensors").single
    'weights.safetensors'
    """
    return WeightsName(file_name.removesuffix(".npz"), None, "")


def is_other_file(file_name: str) -> bool:
    """Say whether a name is that of a file, by its ending, and of none that is written.

    >>> is_other_file("model.gguf"), is_other_file("MODEL.BIN"), is_other_file("model.bin"), is_other_file("v1.5")
    (True, True, False, False)
    """
    return parse_name(file_name) is None and _OTHER_FILE.fullmatch(file_name) is not None


def is_training_state(file_name: str) -> bool:
    """Say whether a file is a trainer's own, to go on from.

    >>> is_training_state("optimizer.pt"), is_training_state("scheduler_config.json")
    (True, False)
    """
    return _TRAINING_STATE.fullmatch(file_name) is not None


def is_training_folder(name: str) -> bool:
    """Say whether a folder holds the state of an optimizer alone.

    >>> is_training_folder("optimizer_0")
    True
    """
    return _TRAINING_FOLDER.fullmatch(name) is not None


def fold_numbers(names: Iterable[str]) -> list[str]:
    """Name files that differ in one number, their last, as one, where there are three or more.

    >>> fold_numbers(["latest", "rng_state_0.pth", "rng_state_1.pth", "rng_state_2.pth"])
    ['latest', 'rng_state_*.pth (3)']
    """
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_LAST_NUMBER.sub("*", name), []).append(name)
    folded = ([f"{pattern} ({len(same):,})"] if len(same) > 2 else same for pattern, same in alike.items())
    return [name for same in folded for name in same]


def fold_modules(names: Iterable[str]) -> dict[str, list[str]]:
    """Group modules or tensors that differ in nothing but numbers, where there are three or more, under one name.

    >>> fold_modules(["a.0.b", "a.1.b", "a.2.b", "c.0", "c.1"])
    {'a.*.b (3)': ['a.0.b', 'a.1.b', 'a.2.b'], 'c.0': ['c.0'], 'c.1': ['c.1']}
    >>> list(fold_modules(["h.0.ln_1", "h.1.ln_1", "h.2.ln_1"]))
    ['h.*.ln_1 (3)']
    """
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_NUMBER.sub("*", name), []).append(name)
    folded: dict[str, list[str]] = {}
    for same in alike.values():
        folded |= {f"{_starred(same)} ({len(same):,})": same} if len(same) > 2 else {name: [name] for name in same}
    return folded


def _starred(same: Sequence[str]) -> str:
    """Write names that differ in numbers alone as one, with a star for each number that is not the same in all."""
    columns = iter([set(column) for column in zip(*map(_NUMBER.findall, same), strict=True)])
    return _NUMBER.sub(lambda found: found[0] if len(next(columns)) == 1 else "*", same[0])


def is_other_runtime(name: str) -> bool:
    """Say whether a file or folder holds weights in another runtime's form, which is neither read nor carried over.

    >>> is_other_runtime("model.onnx"), is_other_runtime("openvino_model.bin")
    (True, True)
    """
    return _OTHER_RUNTIMES.fullmatch(name) is not None


def _split_variant(base: str) -> tuple[str, str | None]:
    stem, dot, tail = base.rpartition(".")
    if dot and tail and (stem in _STANDARD_STEMS or _KNOWN_TAGS.fullmatch(tail)):
        return stem, tail
    return base, None


def check_variant(tag: str) -> str:
    """Return a variant tag that every loader can read, or raise BadRequest.

    diffusers takes the second dot-separated segment of a file name for the variant (``_identify_model_variants``),
    so a tag with a dot in it is never found.
    """
    if not re.fullmatch(r"[A-Za-z0-9_]+(-[A-Za-z0-9_]+)*", tag) or _SHARD.fullmatch(f"x.{tag}.bin"):
        raise BadRequest(repr(tag), "is no variant", "A tag holds letters, digits, _ and -, such as fp16.")
    return tag


def spelled_variant(variant: str | None) -> str:
    """Name a variant in a sentence."""
    return f"the variant {variant}" if variant else "the untagged weights"

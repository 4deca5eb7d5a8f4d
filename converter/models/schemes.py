"""Which tensors are quantized weights, and what belongs to them: a table of schemes, by names and dtypes alone. Pure.

No config is asked: single files have none, and folders lose it. Numbers in 8 bits or fewer mean nothing without their
scales, so a weight counts as quantized only where its companions stand beside it: of a float model, ``logit_scale``,
``layer_scale`` or a norm's ``scale`` are weights like any others, and float8 that a plain cast made has no companions.
"""

from __future__ import annotations

import bisect
import itertools
import json
import re
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from converter.dtypes import DType
from converter.errors import BadFile
from converter.formats.texts import parse_json
from converter.models.checkpoint import Checkpoint

_F8 = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
_PACKED = _F8 | {"I8", "U8", "I16", "I32", "U32", "F4", "F6_E2M3", "F6_E3M2"}


class Scheme(NamedTuple):
    """A way to quantize: ``weight`` ends the names of its weights, ``companions`` what stands in its place beside them.

    A weight of one of ``dtypes`` that has one of the companions is in this scheme. ``others`` may stand beside it as
    well, and mean nothing without it; ``small`` are those of all these whose bytes say how it is to be read. ``scales``
    are the dtypes that the companions have to be of, where names alone do not tell; ``methods`` what configs call it
    (``quant_method``). ``may_be_turned`` where some of its modules may be a Conv1D, whose weight its library has as
    [in, out]. ``reader`` loads what 'wconv dequantize' does not.
    """

    label: str
    weight: str
    dtypes: frozenset[str]
    companions: tuple[str, ...]
    others: tuple[str, ...] = ()
    small: tuple[str, ...] = ()
    scales: frozenset[str] = frozenset()
    methods: tuple[str, ...] = ()
    may_be_turned: bool = False
    reader: str = ""

    @property
    def is_dequantized(self) -> bool:
        """Whether 'wconv dequantize' makes numbers of its weights."""
        return not self.reader

    @property
    def beside(self) -> tuple[str, ...]:
        """What may stand beside a weight in its place."""
        return (*self.companions, *self.others)


LLM_INT8 = Scheme(
    "LLM.int8 of bitsandbytes", ".weight", frozenset({"I8"}), (".SCB",), others=(".weight_format",),
    small=(".weight_format",), methods=("bitsandbytes",), may_be_turned=True,
)  # fmt: skip
# What an activation was scaled by when the model was measured; weights are whole without it.
_OF_LINEAR = (
    *(f".{what}_{end}" for what in ("input", "output") for end in ("scale", "zero_point", "global_scale")),
    ".input_scale_ub",
)
OF_ACTIVATIONS = (
    ".activation_scale", "_activation_scale", ".qscale_act", "_input_scale", "_output_scale", ".scale_input",
    *_OF_LINEAR,
)  # fmt: skip
# What the cache of keys and values is scaled by as it is filled: no weight is (``maybe_remap_kv_scale_name`` in vLLM's
# ``model_loader/weight_utils.py``, and what ``get_cache_scale`` of its quantizations takes for the same).
_OF_CACHE = re.compile(
    r"(?:attn\.)?(?:[qkv]|kv|prob)_(?:scale|zero_point|global_scale)|prob_output_scale"
    r"|[qkv]_proj\.(?:[kv]_scale|output_scale|output_zero_point)|(?:[qkv]|kv)_fake_quantizer\.qscale_act"
)
_CACHE_ENDS = ("_scale", "_zero_point", ".qscale_act")  # of all of those
FP8 = Scheme(
    "float8 with scales", ".weight", _F8, (".weight_scale_inv", ".scale", ".qscale_weight"),
    others=(".activation_scale", ".qscale_act", *_OF_LINEAR), methods=("fp8", "mxfp8"),
)  # fmt: skip
FP8_OF_EXPERTS = FP8._replace(weight="", companions=("_scale_inv",), others=("_activation_scale",))
# Inkling's, which are renamed to those as they are loaded (``conversion_mapping.py`` of transformers).
FP8_OF_FUSED = FP8._replace(weight="_weight", companions=("_weight_scale",), others=("_input_scale",))
# Two numbers a byte, as transformers takes all I8 beside these scales; ``.scale`` may be of any 8-bit numbers.
EXPONENTS = frozenset({"F8_E8M0", "U8"})
FP4 = FP8._replace(label="FP4 with scales", dtypes=frozenset({"I8"}), companions=(".weight_scale_inv",))
FP4_OF_EXPERTS = FP4._replace(weight="", companions=("_scale_inv",), others=("_activation_scale",))
FP4_OF_DEEPSEEK = FP4._replace(companions=(".scale",), scales=EXPONENTS)
# ModelOpt, AutoFP8, FBGEMM and Quark write float8 and int8 by these names as well, and they mean the same.
CT_FP8 = Scheme(
    "float8 with scales", ".weight", _F8, (".weight_scale",),
    others=(".weight_zero_point", ".pre_quant_scale", *_OF_LINEAR),
    methods=("compressed-tensors", "modelopt", "fp8", "fbgemm_fp8", "quark"),
)  # fmt: skip
CT_INT8 = CT_FP8._replace(label="8-bit numbers with scales", dtypes=frozenset({"I8"}))
CT_PACKED = Scheme(
    "packed numbers of compressed-tensors", ".weight_packed", frozenset({"I32", "U8"}), (".weight_scale",),
    others=(".weight_shape", ".weight_zero_point", ".weight_global_scale", ".weight_g_idx", *_OF_LINEAR),
    small=(".weight_shape", ".weight_g_idx"), methods=("compressed-tensors",),
)  # fmt: skip
NVFP4 = Scheme(
    "NVFP4 of ModelOpt", ".weight", frozenset({"U8"}), (".weight_scale_2",),
    others=(".weight_scale", ".pre_quant_scale", *_OF_LINEAR), methods=("modelopt", "modelopt_fp4"),
)  # fmt: skip
# Experts that are one tensor have all of it under a longer name, and their rows along the last axis.
NVFP4_OF_EXPERTS = NVFP4._replace(
    weight="", companions=("_weight_scale_2",), others=("_weight_scale", "_input_scale", "_output_scale")
)
MODELOPT_FP8_OF_EXPERTS = CT_FP8._replace(
    weight="", companions=("_weight_scale",), others=("_input_scale", "_output_scale"), methods=("modelopt",)
)
MODELOPT_4BIT = NVFP4._replace(
    label="4-bit numbers of ModelOpt or Quark", companions=(".weight_scale",),
    others=(".pre_quant_scale", *_OF_LINEAR), methods=(*NVFP4.methods, "quark"),
)  # fmt: skip
GPTQ = Scheme(
    "GPTQ", ".qweight", _PACKED, (".g_idx",), others=(".qzeros", ".scales"), methods=("gptq",), may_be_turned=True
)
# Newer files of GPTQ have no ``g_idx`` where inputs are in order; shapes tell the two.
AWQ = GPTQ._replace(label="AWQ or GPTQ", companions=(".qzeros", ".scales"), others=(), methods=("awq", "gptq"))
MXFP4 = Scheme("MXFP4", "_blocks", frozenset({"U8"}), ("_scales",), methods=("mxfp4",))
MXFP4_ROWS = MXFP4._replace(weight=".blocks", companions=(".scales",))
# In whatever dtype the 4-bit numbers are stored; what is beside them has the whole name of the weight before it
# (``as_dict`` in ``bitsandbytes/functional.py``).
_BNB_STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
BNB_4BIT = Scheme(
    "4 bits of bitsandbytes", "", frozenset({"U8", "I8", "BF16", "F16", "F32", "F64", "I16", "I32", "I64"}),
    (*_BNB_STATES, ".absmax"), others=(".quant_map", ".nested_absmax", ".nested_quant_map"),
    small=(*_BNB_STATES, ".quant_map"), methods=("bitsandbytes",), may_be_turned=True,
)  # fmt: skip
COMFY_QUANT = Scheme(
    "the form of ComfyUI that comfy_quant describes", ".weight", _PACKED, (".comfy_quant",),
    others=(".weight_scale", ".weight_scale_2", ".input_scale"), small=(".comfy_quant",),
)  # fmt: skip
COMFY_FP8 = Scheme("float8 with scales of ComfyUI", ".weight", _F8, (".scale_weight",), others=(".scale_input",))
# What has no scale in a file in which others have one is as it is.
COMFY_MARKED = Scheme("float8 in a file of ComfyUI", "", _F8, ())
COMFY = (COMFY_QUANT, COMFY_FP8, COMFY_MARKED)
# What no module of a float model has.
_COMFY_LEAVES = frozenset({"scale_weight", "scale_input", "comfy_quant"})
# One for all of a model in a file (``convert_old_quants`` in ``comfy/utils.py``).
_MARK = "scaled_fp8"
# What a header notes of quantized modules, and what may stand before the names that it has of them (the same function;
# ``unet_prefix_from_state_dict`` in ``comfy/model_detection.py``).
COMFY_NOTE = "_quantization_metadata"
_COMFY_PREFIXES = ("", "model.diffusion_model.", "model.model.", "net.")

# The first row that fits speaks; the last ones are for what nobody has told of.
TABLE = (
    LLM_INT8,
    BNB_4BIT,
    COMFY_QUANT,
    COMFY_FP8,
    GPTQ,
    AWQ,
    MXFP4,
    MXFP4_ROWS,
    CT_PACKED,
    Scheme("marlin-24 of compressed-tensors", ".weight_packed", frozenset({"I32"}), (".scale_packed",), reader="vLLM"),
    Scheme("sparse-24-bitmask of compressed-tensors", ".bitmask", frozenset({"U8"}), (".compressed",),
           reader="the compressed-tensors that wrote it"),
    Scheme("packed numbers of compressed-tensors", "_packed", _PACKED, ("_scale",), reader="compressed-tensors"),
    NVFP4,
    NVFP4_OF_EXPERTS,
    Scheme("NVFP4 of ModelOpt", "", frozenset({"U8"}), ("_scale_2",), reader="vLLM or TensorRT-LLM"),
    FP8,
    FP8_OF_EXPERTS,
    FP8_OF_FUSED,
    FP4,
    FP4_OF_EXPERTS,
    FP4_OF_DEEPSEEK,
    CT_FP8,
    CT_INT8,
    MODELOPT_FP8_OF_EXPERTS,
    MODELOPT_4BIT,
    Scheme("float8 with scales", "", _F8, ("_scale",), reader="vLLM, or transformers with compressed-tensors"),
    Scheme("8-bit numbers with scales", "", frozenset({"I8", "U8"}), ("_scale",), reader="the library that wrote it"),
    Scheme("torchao", "qdata", _PACKED, ("scale",), reader="torchao"),
    Scheme("optimum-quanto", "._data", _PACKED, ("._scale",), reader="optimum-quanto"),
    Scheme("HQQ", ".W_q", _PACKED, (".scale", ".meta"), reader="hqq"),
    Scheme("MLX", ".weight", frozenset({"U32"}), (".scales",),
           reader="MLX ('mlx_lm.convert --dequantize' writes numbers)"),
    Scheme("EXL2", ".q_weight", frozenset({"I32"}), (".q_scale",), reader="ExLlamaV2"),
    Scheme("EXL3", ".trellis", frozenset({"I16"}), (".suh", ".su"), reader="ExLlamaV3"),
    Scheme("Marlin of auto_gptq", ".B", frozenset({"I32"}), (".s",), reader="vLLM"),
    Scheme("AQLM", ".codes", frozenset({"I8", "I16", "U8"}), (".codebooks",), reader="transformers with aqlm"),
    Scheme("EETQ", ".weight", frozenset({"I8"}), (".weight_scales",), reader="transformers with eetq"),
    Scheme("numbers with scales", ".weight", _PACKED,
           (".scale", ".scales", ".qscale_weight", ".absmax", ".weight_scale"), reader="the library that wrote it"),
    COMFY_MARKED,
)  # fmt: skip


def _by_ends(tag: str) -> Iterator[tuple[str, tuple[tuple[Scheme, str], ...]]]:
    """Give the rows for weights of a dtype, in order: what ends their names, and each row with each companion."""
    rows = (row for row in TABLE if tag in row.dtypes)
    for end, alike in itertools.groupby(rows, lambda row: row.weight):
        yield end, tuple((row, companion) for row in alike for companion in row.companions)


_BY_DTYPE = {tag: tuple(_by_ends(tag)) for tag in {tag for row in TABLE for tag in row.dtypes}}
# What ends the names of scales in a quantized model: with what ends their weight's.
_SCALE_ENDS = (
    (".weight_scale_inv", ".weight"), ("_scale_inv", ""), (".qscale_weight", ".weight"), (".scale_weight", ".weight"),
    (".weight_scale", ".weight"), (".weight_scale_2", ".weight"), (".SCB", ".weight"), (".qzeros", ".qweight"),
    (".g_idx", ".qweight"), (".weight.absmax", ".weight"),
)  # fmt: skip
_EXPONENT_ENDS = ((".scale", ".weight"), ("_scale", ""), ("_scales", "_blocks"), (".scales", ".blocks"))
# What ends the names of weights that are no numbers by themselves; integers may be a float model's under others.
_CODES = tuple({scheme.weight for scheme in TABLE} - {""})
METHODS = frozenset(method for scheme in TABLE for method in scheme.methods)
"""What configs call the schemes that are known by their weights; what they call otherwise may be in any form."""


class Quantized(NamedTuple):
    """A quantized weight, what belongs to it, and the scheme that both are in."""

    scheme: Scheme
    weight: str
    companion: str

    @property
    def advice(self) -> str:
        """Say what makes plain numbers of it."""
        if self.scheme.is_dequantized:
            return "'wconv dequantize' writes it in fp16, bf16 or fp32."
        ways = f"take the model it was made from, or load it with {self.scheme.reader}."
        return f"wconv copies such weights as they are, and does not dequantize them yet: {ways}"

    def __str__(self) -> str:
        return f"{self.scheme.label}: {self.weight!r} goes with {self.companion!r}"


def find_quantized(dtypes: Mapping[str, DType], noted: Collection[str] = ()) -> list[Quantized]:
    """List the quantized weights among tensors, in order; ``noted`` modules are so by what ComfyUI's headers note."""
    marks = (name for name in dtypes if is_mark(name) or name.endswith(COMFY_QUANT.companions))
    mark = next(marks, COMFY_NOTE if noted else None)
    found = (_look_at(name, dtype, dtypes, mark, noted) for name, dtype in dtypes.items())
    return [one for one in found if one]


def quantized_in(checkpoint: Checkpoint) -> list[Quantized]:
    """List the weights of a checkpoint that other tensors scale, but for those that are written as numbers again."""
    dtypes = {info.name: info.dtype for info in checkpoint.tensors if not info.is_made}
    try:
        noted = modules_noted(checkpoint)
    except BadFile:  # whoever reads numbers by it says so
        noted = {}
    return find_quantized(dtypes, noted)


def is_mark(name: str) -> bool:
    """Say whether a tensor marks all float8 of a model as ComfyUI's: it is no module's, and means nothing else."""
    return name.endswith(_MARK) and name.rpartition(".")[2] == _MARK


def modules_noted(checkpoint: Checkpoint) -> dict[str, Any]:
    """Map modules to what ComfyUI's note in a header says of each. Raises BadFile for a note that is none."""
    found: dict[str, Any] = {}
    for file in checkpoint.files:
        if COMFY_NOTE not in file.metadata:
            continue
        try:
            note = parse_json(file.metadata[COMFY_NOTE].encode(), file.place, f"its note {COMFY_NOTE} ")
            layers = note.get("layers", {}) if isinstance(note, dict) else None
        except ValueError:
            layers = None
        if not isinstance(layers, dict):
            raise BadFile(file.place, f"has a note {COMFY_NOTE} that names no modules", "Fetch the file again.")
        names = {tensor.name for tensor in file.tensors}
        for layer, said in layers.items():
            prefix = next((one for one in _COMFY_PREFIXES if f"{one}{layer}.weight" in names), "")
            found[prefix + layer] = said
    return found


def note_without(note: str, gone: Container[str]) -> str:
    """Give ComfyUI's note without the modules whose weights are ``gone``; what is none stays as it is."""
    try:
        said = json.loads(note)
    except (ValueError, RecursionError):
        return note
    layers = said.get("layers") if isinstance(said, dict) else None
    if not isinstance(layers, dict):
        return note

    def is_gone(layer: str) -> bool:
        return any(f"{prefix}{layer}.weight" in gone for prefix in _COMFY_PREFIXES)

    left = {layer: value for layer, value in layers.items() if not is_gone(layer)}
    return note if len(left) == len(layers) else json.dumps({**said, "layers": left})


def names_other(method: str, schemes: Iterable[Scheme]) -> bool:
    """Say whether what a config calls a scheme (``quant_method``) is none of those that weights are in."""
    return all(scheme.methods and method not in scheme.methods for scheme in schemes)


def holds_codes(name: str, dtype: DType) -> bool:
    """Say whether a tensor of a quantized model is no numbers by itself: floats of 8 bits or fewer, packed integers."""
    return dtype.tag in _PACKED and (dtype.is_floating or name.endswith(_CODES))


def weight_of(name: str, dtype: DType) -> str | None:
    """Give the name of the weight that a tensor scales, by its own and its dtype; None for what may be anything.

    What is nothing but an exponent scales something: where its name does not tell what, it is given itself.
    """
    ends = (*_SCALE_ENDS, *_EXPONENT_ENDS) if dtype.tag in EXPONENTS else _SCALE_ENDS
    end = next((end for end in ends if name.endswith(end[0])), None)
    if end is None:
        return name if dtype.tag == "F8_E8M0" else None
    return name.removesuffix(end[0]) + end[1]


def cached_by(name: str) -> tuple[str, ...]:
    """Name the modules whose cache of keys and values a tensor may scale, by its name; none for other names."""
    if not name.endswith(_CACHE_ENDS):
        return ()
    parts = name.rsplit(".", 2)
    tails = (".".join(parts[at:]) for at in range(1, len(parts)))
    return tuple(name[: -len(tail) - 1] for tail in tails if _OF_CACHE.fullmatch(tail))


def _look_at(
    name: str, dtype: DType, dtypes: Mapping[str, DType], mark: str | None, noted: Collection[str]
) -> Quantized | None:
    if noted and dtype.tag in _PACKED and name.endswith(".weight") and name.removesuffix(".weight") in noted:
        return Quantized(COMFY_QUANT, name, COMFY_NOTE)
    for end, rows in _BY_DTYPE.get(dtype.tag, ()):
        if name.endswith(end):
            base = name.removesuffix(end)
            for scheme, companion in rows:
                found = dtypes.get(base + companion)
                if found is not None and _scales(found, dtype, scheme.scales):
                    return Quantized(scheme, name, base + companion)
    is_scale = is_mark(name) or name.endswith(COMFY_QUANT.others)
    return Quantized(COMFY_MARKED, name, mark) if mark and dtype.tag in _F8 and not is_scale else None


def _scales(dtype: DType, weight: DType, tags: Container[str]) -> bool:
    """Say whether a tensor may scale a weight; what a plain cast made float8 is as coarse as the weight itself."""
    if dtype is weight and weight.tag in _F8:
        return False
    return not tags or dtype.tag in tags


def find_belongings(found: Collection[Quantized], names: Iterable[str]) -> frozenset[str]:
    """Name all tensors that lose their meaning in a cast: quantized weights, and what stands beside them but a bias."""
    names = list(names)
    of_comfy = _COMFY_LEAVES if any(one.scheme in COMFY for one in found) else ()
    marks = (name for name in names if is_mark(name) or name.rpartition(".")[2] in of_comfy) if found else ()
    return frozenset((*(one.weight for one in found), *find_owners(found, names), *marks))


def find_owners(found: Collection[Quantized], names: Iterable[str]) -> dict[str, str]:
    """Map each tensor that stands beside a quantized weight to that: what means nothing without it, so no bias.

    What holds several weights, as experts that are fused do, has beside each what begins with its name. Diffusers reads
    shard by shard, and looks for both in one (``create_quantized_param`` in
    ``diffusers/quantizers/bitsandbytes/bnb_quantizer.py``).
    """
    # What only a mark says is quantized has nothing beside it.
    parted = [(one, *one.weight.rpartition(".")) for one in found if one.scheme is not COMFY_MARKED]
    weights = {one.weight for one in found}
    of_modules = (row for row in parted if row[3] == "weight" or row[0].scheme.weight.startswith("."))
    modules = {module: one.weight for one, module, *_ in of_modules}
    stems = {
        one.weight.removesuffix(one.scheme.weight): one.weight for one, module, *_ in parted if module not in modules
    }
    stem_of = _Prefixes(stems).find
    owners = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        if name not in weights and not (leaf == "bias" or leaf.endswith("_bias")):
            inside = next((one for one in _parents(name) if one in weights), modules.get(module))
            owner = inside or stems.get(stem_of(name))
            if owner:
                owners[name] = owner
    return owners


class _Prefixes:
    """Texts that others may begin with, of which there may be as many: each is looked up, and not held against all."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts: list[str] = []
        for text in sorted(texts):
            if not (self._texts and text.startswith(self._texts[-1])):
                self._texts.append(text)

    def find(self, name: str) -> str:
        """Give the one of them that a name begins with, or nothing."""
        at = bisect.bisect_right(self._texts, name)
        return self._texts[at - 1] if at and name.startswith(self._texts[at - 1]) else ""


def _parents(name: str) -> Iterator[str]:
    """Give what a name begins with, up to each of its dots."""
    at = name.find(".")
    while at >= 0:
        yield name[:at]
        at = name.find(".", at + 1)

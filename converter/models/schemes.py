"""Which tensors are quantized weights, and what belongs to them: a table of schemes, by names and dtypes alone. Pure.

No config is asked: single files have none, and folders lose it. Numbers in 8 bits or fewer mean nothing without their
scales, so a weight counts as quantized only where its companions stand beside it: of a float model, ``logit_scale``,
``layer_scale`` or a norm's ``scale`` are weights like any others, and float8 that a plain cast made has no companions.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from typing import NamedTuple

from converter.dtypes import DType
from converter.models.checkpoint import Checkpoint

_F8 = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
_PACKED = _F8 | {"I8", "U8", "I16", "I32", "U32", "F4", "F6_E2M3", "F6_E3M2"}


class Scheme(NamedTuple):
    """A way to quantize: ``weight`` ends the names of its weights, ``companions`` what stands in its place beside them.

    A weight of one of ``dtypes`` that has one of the companions is in this scheme. ``reader`` loads it;
    ``is_dequantized`` where 'wconv dequantize' does too. ``others`` may stand beside it as well, and mean nothing
    without it; ``small`` are those of all these whose bytes say how it is to be read. ``scales`` are the dtypes that
    the companions have to be of, where names alone do not tell; ``methods`` what configs call it (``quant_method``).
    """

    label: str
    weight: str
    dtypes: frozenset[str]
    companions: tuple[str, ...]
    reader: str
    others: tuple[str, ...] = ()
    small: tuple[str, ...] = ()
    is_dequantized: bool = False
    scales: frozenset[str] = frozenset()
    methods: tuple[str, ...] = ()

    @property
    def beside(self) -> tuple[str, ...]:
        """What may stand beside a weight in its place."""
        return (*self.companions, *self.others)


LLM_INT8 = Scheme(
    "LLM.int8 of bitsandbytes",
    ".weight",
    frozenset({"I8"}),
    (".SCB",),
    "bitsandbytes",
    others=(".weight_format",),
    small=(".weight_format",),
    is_dequantized=True,
    methods=("bitsandbytes",),
)
# What an activation was scaled by when the model was measured; weights are whole without it.
_OF_LINEAR = (
    *(f".{what}_{end}" for what in ("input", "output") for end in ("scale", "zero_point", "global_scale")),
    ".input_scale_ub",
)
OF_ACTIVATIONS = (".activation_scale", "_activation_scale", ".qscale_act", *_OF_LINEAR)
# What the cache of keys and values is scaled by as it is filled: no weight is (``maybe_remap_kv_scale_name`` in vLLM's
# ``model_loader/weight_utils.py``, and what ``get_cache_scale`` of its quantizations takes for the same).
OF_CACHE = re.compile(
    r"(.*)\.(?:(?:attn\.)?(?:[qkv]|kv|prob)_(?:scale|zero_point|global_scale)|prob_output_scale"
    r"|[qkv]_proj\.(?:[kv]_scale|output_scale|output_zero_point)|(?:[qkv]|kv)_fake_quantizer\.qscale_act)"
)
_FINE_GRAINED = "transformers, with FineGrainedFP8Config(dequantize=True)"
FP8 = Scheme(
    "float8 with scales", ".weight", _F8, (".weight_scale_inv", ".scale", ".qscale_weight"), _FINE_GRAINED,
    others=(".input_scale", ".activation_scale", ".qscale_act"), is_dequantized=True, methods=("fp8",),
)  # fmt: skip
FP8_OF_EXPERTS = FP8._replace(weight="", companions=("_scale_inv",), others=("_activation_scale",))
# Two numbers a byte, as transformers takes all I8 beside these scales; ``.scale`` may be of any 8-bit numbers.
_EXPONENTS = frozenset({"F8_E8M0", "U8"})
FP4 = FP8._replace(label="FP4 with scales", dtypes=frozenset({"I8"}), companions=(".weight_scale_inv",))
FP4_OF_EXPERTS = FP4._replace(weight="", companions=("_scale_inv",), others=("_activation_scale",))
FP4_OF_DEEPSEEK = FP4._replace(companions=(".scale",), scales=_EXPONENTS)
# ModelOpt, AutoFP8 and FBGEMM write float8 and int8 by these names as well, and they mean the same.
CT_FP8 = Scheme(
    "float8 with scales", ".weight", _F8, (".weight_scale",), "vLLM, or transformers with compressed-tensors",
    others=(".weight_zero_point", ".pre_quant_scale", *_OF_LINEAR), is_dequantized=True,
    methods=("compressed-tensors", "modelopt", "fp8", "fbgemm_fp8"),
)  # fmt: skip
CT_INT8 = CT_FP8._replace(label="8-bit numbers with scales", dtypes=frozenset({"I8"}))
CT_PACKED = Scheme(
    "packed numbers of compressed-tensors", ".weight_packed", frozenset({"I32", "U8"}), (".weight_scale",),
    CT_FP8.reader,
    others=(".weight_shape", ".weight_zero_point", ".weight_global_scale", ".weight_g_idx", *_OF_LINEAR),
    small=(".weight_shape", ".weight_g_idx"), is_dequantized=True, methods=("compressed-tensors",),
)  # fmt: skip
NVFP4 = Scheme(
    "NVFP4 of ModelOpt", ".weight", frozenset({"U8"}), (".weight_scale_2",), "vLLM or TensorRT-LLM",
    others=(".weight_scale", ".pre_quant_scale", *_OF_LINEAR), is_dequantized=True,
    methods=("modelopt", "modelopt_fp4"),
)  # fmt: skip
MODELOPT_4BIT = NVFP4._replace(
    label="4-bit numbers of ModelOpt", companions=(".weight_scale",), others=(".pre_quant_scale", *_OF_LINEAR)
)
GPTQ = Scheme(
    "GPTQ", ".qweight", _PACKED, (".g_idx",), "transformers with GPTQModel, or vLLM", others=(".qzeros", ".scales"),
    is_dequantized=True, methods=("gptq",),
)  # fmt: skip
# Newer files of GPTQ have no ``g_idx`` where inputs are in order; shapes tell the two.
AWQ = GPTQ._replace(label="AWQ or GPTQ", companions=(".qzeros", ".scales"), others=(), methods=("awq", "gptq"))
MXFP4 = Scheme(
    "MXFP4", "_blocks", frozenset({"U8"}), ("_scales",), "transformers, with Mxfp4Config(dequantize=True)",
    is_dequantized=True, methods=("mxfp4",),
)  # fmt: skip
MXFP4_ROWS = MXFP4._replace(weight=".blocks", companions=(".scales",), reader="gpt-oss")
_BNB_4BIT = Scheme("4 bits of bitsandbytes", ".weight", frozenset(), (), "transformers or Diffusers with bitsandbytes")
_MARKED = Scheme("float8 with scales of ComfyUI", "", _F8, (), "ComfyUI")
# Beside ``m.weight``, in whatever dtype the 4-bit numbers are stored (``as_dict`` in ``bitsandbytes/functional.py``).
_BNB_STATE = ".quant_state.bitsandbytes__"
# One for the whole file (``detect_layer_quantization`` in ``comfy/utils.py``).
_MARK = "scaled_fp8"

# The first row that fits speaks; the last ones are for what nobody has told of.
TABLE = (
    LLM_INT8,
    Scheme("the form of ComfyUI that comfy_quant describes", ".weight", _PACKED, (".comfy_quant",), "ComfyUI"),
    Scheme("float8 with scales of ComfyUI", ".weight", _F8, (".scale_weight",), "ComfyUI"),
    GPTQ,
    AWQ,
    MXFP4,
    MXFP4_ROWS,
    CT_PACKED,
    Scheme("marlin-24 of compressed-tensors", ".weight_packed", frozenset({"I32"}), (".scale_packed",), "vLLM"),
    Scheme("sparse-24-bitmask of compressed-tensors", ".bitmask", frozenset({"U8"}), (".compressed",),
           "the compressed-tensors that wrote it"),
    Scheme("packed numbers of compressed-tensors", "_packed", _PACKED, ("_scale",), "compressed-tensors"),
    NVFP4,
    Scheme("NVFP4 of ModelOpt", "", frozenset({"U8"}), ("_scale_2",), "vLLM or TensorRT-LLM"),
    FP8,
    FP8_OF_EXPERTS,
    FP4,
    FP4_OF_EXPERTS,
    FP4_OF_DEEPSEEK,
    CT_FP8,
    CT_INT8,
    MODELOPT_4BIT,
    Scheme("float8 with scales", "", _F8, ("_scale",), "vLLM, or transformers with compressed-tensors"),
    Scheme("8-bit numbers with scales", "", frozenset({"I8", "U8"}), ("_scale",), "the library that wrote it"),
    Scheme("torchao", "qdata", _PACKED, ("scale",), "torchao"),
    Scheme("optimum-quanto", "._data", _PACKED, ("._scale",), "optimum-quanto"),
    Scheme("HQQ", ".W_q", _PACKED, (".scale", ".meta"), "hqq"),
    Scheme("MLX", ".weight", frozenset({"U32"}), (".scales",), "MLX"),
    Scheme("numbers with scales", ".weight", _PACKED, (".scale", ".scales", ".qscale_weight", ".absmax"),
           "the library that wrote it"),
)  # fmt: skip
# What ends the names of scales that no float model has: with what ends their weight's.
_SCALE_ENDS = (
    (".weight_scale_inv", ".weight"), ("_scale_inv", ""), (".qscale_weight", ".weight"), (".scale_weight", ".weight"),
    (".weight_scale", ".weight"), (".weight_scale_2", ".weight"), (".SCB", ".weight"), (".qzeros", ".qweight"),
    (".g_idx", ".qweight"), (".weight.absmax", ".weight"),
)  # fmt: skip
# What ends the names of weights that are no numbers by themselves; integers may be a float model's under others.
_CODES = tuple({scheme.weight for scheme in TABLE} - {""})


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


def find_quantized(dtypes: Mapping[str, DType]) -> list[Quantized]:
    """List the quantized weights among tensors, in order."""
    mark = next((name for name in dtypes if name.endswith(_MARK) and name.rpartition(".")[2] == _MARK), None)
    found = (_look_at(name, dtype, dtypes, mark) for name, dtype in dtypes.items())
    return [one for one in found if one]


def quantized_in(checkpoint: Checkpoint) -> list[Quantized]:
    """List the weights of a checkpoint that other tensors scale, but for those that are written as numbers again."""
    return find_quantized({info.name: info.dtype for info in checkpoint.tensors if not info.is_made})


def holds_codes(name: str, dtype: DType) -> bool:
    """Say whether a tensor of a quantized model is no numbers by itself: floats of 8 bits or fewer, packed integers."""
    return dtype.tag in _PACKED and (dtype.is_floating or name.endswith(_CODES))


def weight_of(name: str) -> str | None:
    """Give the name of the weight that a tensor scales, by its own name alone; None for what may be anything."""
    end = next((end for end in _SCALE_ENDS if name.endswith(end[0])), None)
    return None if end is None else name.removesuffix(end[0]) + end[1]


def _look_at(name: str, dtype: DType, dtypes: Mapping[str, DType], mark: str | None) -> Quantized | None:
    weight, is_state, _ = name.partition(_BNB_STATE)
    if is_state:
        return Quantized(_BNB_4BIT, weight, name) if weight in dtypes else None
    if dtype.tag not in _PACKED:
        return None
    for scheme in TABLE:
        if dtype.tag in scheme.dtypes and name.endswith(scheme.weight):
            base = name.removesuffix(scheme.weight)
            ends = (base + end for end in scheme.companions)
            companion = next((end for end in ends if _scales(end, dtype, dtypes, scheme.scales)), None)
            if companion:
                return Quantized(scheme, name, companion)
    return Quantized(_MARKED, name, mark) if mark and mark != name and dtype.tag in _F8 else None


def _scales(name: str, weight: DType, dtypes: Mapping[str, DType], tags: Container[str]) -> bool:
    """Say whether a tensor may scale a weight; what a plain cast made float8 is as coarse as the weight itself."""
    dtype = dtypes.get(name)
    if dtype is None or (dtype is weight and weight.tag in _F8):
        return False
    return not tags or dtype.tag in tags


def find_belongings(found: Iterable[Quantized], names: Iterable[str]) -> frozenset[str]:
    """Name all tensors that lose their meaning in a cast: quantized weights, and what stands beside them but a bias.

    What holds several weights, as experts that are fused do, has beside each what begins with its name.
    """
    found = list(found)
    weights = {one.weight for one in found}
    parted = [(one, *one.weight.rpartition(".")) for one in found]
    modules = {module for one, module, _, leaf in parted if leaf == "weight" or one.scheme.weight.startswith(".")}
    stems = tuple({one.weight.removesuffix(one.scheme.weight) for one, module, *_ in parted if module not in modules})

    def belongs(name: str) -> bool:
        module, _, leaf = name.rpartition(".")
        if leaf == _MARK or name in weights or module in weights:
            return True
        if leaf == "bias" or leaf.endswith("_bias"):
            return False
        return module in modules or name.startswith(stems)

    return frozenset(name for name in names if belongs(name)) if weights else frozenset()


def find_owners(found: Iterable[Quantized], names: Iterable[str]) -> dict[str, str]:
    """Map each tensor that stands beside a quantized weight to that: what means nothing without it, so no bias.

    Diffusers reads shard by shard, and looks for both in one (``create_quantized_param`` in
    ``diffusers/quantizers/bitsandbytes/bnb_quantizer.py``).
    """
    found = list(found)
    weights = {one.weight for one in found}
    exact, modules = {}, {}
    for one in found:
        base, (module, _, leaf) = one.weight.removesuffix(one.scheme.weight), one.weight.rpartition(".")
        exact.update({base + end: one.weight for end in one.scheme.beside})
        if leaf == "weight" or one.scheme.weight.startswith(".") or base.endswith(".weight"):
            modules[module] = one.weight
    owners = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        stated = name.partition(_BNB_STATE)[0]
        owner = exact.get(name) or next((one for one in (stated, parent) if one in weights), modules.get(parent))
        if owner and name not in weights and not leaf.endswith("bias"):
            owners[name] = owner
    return owners

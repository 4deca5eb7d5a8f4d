"""Which tensors are quantized weights, and what belongs to them: a table of schemes, by names and dtypes alone. Pure.

No config is asked: single files have none, and folders lose it. Numbers in 8 bits or fewer mean nothing without their
scales, so a weight counts as quantized only where its companions stand beside it: of a float model, ``logit_scale``,
``layer_scale`` or a norm's ``scale`` are weights like any others, and float8 that a plain cast made has no companions.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any, NamedTuple

from converter.dtypes import DType
from converter.errors import BadFile
from converter.formats.texts import parse_json
from converter.models.checkpoint import Checkpoint

_F8 = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
_PACKED = _F8 | {"I8", "U8", "I16", "I32", "U32", "F4", "F6_E2M3", "F6_E3M2"}


class Scheme(NamedTuple):
    """A way to quantize: ``weight`` ends the names of its weights, ``companions`` what stands in its place beside them.

    A weight of one of ``dtypes`` that has one of the companions is in this scheme. ``reader`` loads it;
    ``is_dequantized`` where 'wconv dequantize' does too. ``others`` may stand beside it as well, and mean nothing
    without it; ``small`` are those of all these whose bytes say how it is to be read.
    """

    label: str
    weight: str
    dtypes: frozenset[str]
    companions: tuple[str, ...]
    reader: str
    others: tuple[str, ...] = ()
    small: tuple[str, ...] = ()
    is_dequantized: bool = False

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
)
# What an activation was scaled by when the model was measured; weights are whole without it.
_OF_INPUTS = (".input_scale", ".activation_scale")
FP8 = Scheme(
    "float8 with scales", ".weight", _F8, (".weight_scale_inv",),
    "transformers, with FineGrainedFP8Config(dequantize=True)", others=_OF_INPUTS, is_dequantized=True,
)  # fmt: skip
FP8_OF_EXPERTS = FP8._replace(weight="", companions=("_scale_inv",), others=())
_BNB_4BIT = Scheme("4 bits of bitsandbytes", ".weight", frozenset(), (), "transformers or Diffusers with bitsandbytes")
COMFY_QUANT = Scheme(
    "the form of ComfyUI that comfy_quant describes", ".weight", _PACKED, (".comfy_quant",), "ComfyUI",
    others=(".weight_scale", ".weight_scale_2", ".input_scale"), small=(".comfy_quant",), is_dequantized=True,
)  # fmt: skip
COMFY_FP8 = Scheme(
    "float8 with scales of ComfyUI", ".weight", _F8, (".scale_weight",), "ComfyUI",
    others=(".scale_input",), is_dequantized=True,
)  # fmt: skip
COMFY_MARKED = Scheme("float8 in a file that ComfyUI scales", "", _F8, (), "ComfyUI", is_dequantized=True)
_COMFY = (COMFY_QUANT, COMFY_FP8, COMFY_MARKED)
# What no module of a float model has.
_COMFY_LEAVES = frozenset({"scale_weight", "scale_input", "comfy_quant"})
# Beside ``m.weight``, in whatever dtype the 4-bit numbers are stored (``as_dict`` in ``bitsandbytes/functional.py``).
_BNB_STATE = ".quant_state.bitsandbytes__"
# One for all of a model in a file (``convert_old_quants`` in ``comfy/utils.py``).
_MARK = "scaled_fp8"
# What a header notes of quantized modules, and what may stand before the names that it has of them (the same function;
# ``unet_prefix_from_state_dict`` in ``comfy/model_detection.py``).
COMFY_NOTE = "_quantization_metadata"
_COMFY_PREFIXES = ("", "model.diffusion_model.", "model.model.", "net.")

# The first row that fits speaks; the last ones are for what nobody has told of.
TABLE = (
    LLM_INT8,
    COMFY_QUANT,
    COMFY_FP8,
    Scheme("GPTQ", ".qweight", _PACKED, (".g_idx",), "transformers with GPTQModel, or vLLM"),
    Scheme("AWQ or GPTQ", ".qweight", _PACKED, (".qzeros", ".scales"), "transformers with GPTQModel, or vLLM"),
    Scheme("MXFP4", "_blocks", frozenset({"U8"}), ("_scales",), "transformers, with Mxfp4Config(dequantize=True)"),
    Scheme("packed numbers of compressed-tensors", "_packed", _PACKED, ("_scale",), "compressed-tensors"),
    Scheme("NVFP4 of ModelOpt", "", frozenset({"U8"}), ("_scale_2",), "vLLM or TensorRT-LLM"),
    FP8,
    FP8_OF_EXPERTS,
    Scheme("float8 with scales", "", _F8, ("_scale",), "vLLM, or transformers with compressed-tensors"),
    Scheme("8-bit numbers with scales", "", frozenset({"I8", "U8"}), ("_scale",), "the library that wrote it"),
    Scheme("torchao", "qdata", _PACKED, ("scale",), "torchao"),
    Scheme("optimum-quanto", "._data", _PACKED, ("._scale",), "optimum-quanto"),
    Scheme("HQQ", ".W_q", _PACKED, (".scale", ".meta"), "hqq"),
    Scheme("MLX", ".weight", frozenset({"U32"}), (".scales",), "MLX"),
    Scheme("numbers with scales", ".weight", _PACKED, (".scale", ".scales", ".qscale_weight", ".absmax"),
           "the library that wrote it"),
    COMFY_MARKED,
)  # fmt: skip


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


def find_quantized(dtypes: Mapping[str, DType], noted: Container[str] = ()) -> list[Quantized]:
    """List the quantized weights among tensors, in order; ``noted`` modules are so by what ComfyUI's headers note."""
    mark = next(iter(find_marks(dtypes)), None)
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


def find_marks(names: Iterable[str]) -> list[str]:
    """List the tensors that mark all float8 of a model as ComfyUI's: numbers of their own, and no module's."""
    return [name for name in names if name.endswith(_MARK) and name.rpartition(".")[2] == _MARK]


def modules_noted(checkpoint: Checkpoint) -> dict[str, Any]:
    """Map modules to what ComfyUI's note in a header says of each. Raises BadFile for a note that is none."""
    found: dict[str, Any] = {}
    for file in checkpoint.files:
        if COMFY_NOTE not in file.metadata:
            continue
        try:
            note = parse_json(file.metadata[COMFY_NOTE].encode(), file.place, f"its note {COMFY_NOTE} ")
            layers = note["layers"] if isinstance(note, dict) else None
        except (ValueError, KeyError):
            layers = None
        if not isinstance(layers, dict):
            raise BadFile(file.place, f"has a note {COMFY_NOTE} that names no modules", "Fetch the file again.")
        names = {tensor.name for tensor in file.tensors}
        for layer, said in layers.items():
            prefix = next((one for one in _COMFY_PREFIXES if f"{one}{layer}.weight" in names), "")
            found[prefix + layer] = said
    return found


def _look_at(
    name: str, dtype: DType, dtypes: Mapping[str, DType], mark: str | None, noted: Container[str]
) -> Quantized | None:
    weight, is_state, _ = name.partition(_BNB_STATE)
    if is_state:
        return Quantized(_BNB_4BIT, weight, name) if weight in dtypes else None
    if dtype.tag not in _PACKED:
        return None
    if name.endswith(".weight") and name.removesuffix(".weight") in noted:
        return Quantized(COMFY_QUANT, name, COMFY_NOTE)
    for scheme in TABLE:
        if dtype.tag in scheme.dtypes and name.endswith(scheme.weight):
            base = name.removesuffix(scheme.weight)
            companion = next((base + end for end in scheme.companions if _scales(base + end, dtype, dtypes)), None)
            if companion:
                return Quantized(scheme, name, companion)
    is_marked = mark is not None and dtype.tag in _F8 and name.rpartition(".")[2] != _MARK
    return Quantized(COMFY_MARKED, name, mark) if mark and is_marked else None


def _scales(name: str, weight: DType, dtypes: Mapping[str, DType]) -> bool:
    """Say whether a tensor may scale a weight; what a plain cast made float8 is as coarse as the weight itself."""
    dtype = dtypes.get(name)
    return dtype is not None and not (dtype is weight and weight.tag in _F8)


def find_belongings(found: Iterable[Quantized], names: Iterable[str]) -> frozenset[str]:
    """Name all tensors that lose their meaning in a cast: quantized weights, and what stands beside them but a bias.

    What holds several weights, as experts that are fused do, has beside each what begins with its name.
    """
    found = list(found)
    weights = {one.weight for one in found}
    # What only a mark says is quantized has nothing beside it.
    parted = [(one, *one.weight.rpartition(".")) for one in found if one.scheme is not COMFY_MARKED]
    of_comfy = _COMFY_LEAVES if any(one.scheme in _COMFY for one in found) else ()
    modules = {module for one, module, _, leaf in parted if leaf == "weight" or one.scheme.weight.startswith(".")}
    stems = tuple({one.weight.removesuffix(one.scheme.weight) for one, module, *_ in parted if module not in modules})

    def belongs(name: str) -> bool:
        module, _, leaf = name.rpartition(".")
        if leaf == _MARK or leaf in of_comfy or name in weights or module in weights:
            return True
        if leaf == "bias" or leaf.endswith("_bias"):
            return False
        return module in modules or name.startswith(stems)

    return frozenset(name for name in names if belongs(name)) if weights else frozenset()

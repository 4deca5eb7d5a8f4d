"""wconv converts model weights from one on-disk form into another, streaming, without torch.

The public API; what is not listed here may change. Submodules load on first use, so that the command line starts
fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from converter.doctor import Diagnosis, diagnose, mend
    from converter.doctor.repair import Choices, plan_mending
    from converter.dtypes import DType
    from converter.errors import (
        BadFile,
        BadRequest,
        HostileFile,
        LossyCast,
        OutputRefused,
        SystemRefused,
        Unsupported,
        WconvError,
    )
    from converter.models.checkpoint import Checkpoint, WeightSet, open_checkpoint
    from converter.models.folder import Component, ModelFolder, open_folder
    from converter.models.index import WeightIndex
    from converter.models.names import WeightsName
    from converter.models.select import Wishes
    from converter.plan.make import Plan, PlannedTensor, Shard, make_plan
    from converter.recipes.convert import convert, plan_conversion
    from converter.recipes.quantize import ModuleChoice, Quantization, prepare_dequantized, prepare_quantized
    from converter.recipes.rename import plan_rename
    from converter.recipes.verify import verify
    from converter.run.execute import Result, run_plan
    from converter.tensors.base import ByteRange, Tensor

_HOMES = {
    "models.checkpoint": ("Checkpoint", "WeightSet", "open_checkpoint"),
    "recipes.convert": ("convert", "plan_conversion"),
    "doctor": ("Choices", "Diagnosis", "diagnose", "mend", "plan_mending"),
    "dtypes": ("DType",),
    "errors": (
        "BadFile",
        "BadRequest",
        "HostileFile",
        "LossyCast",
        "OutputRefused",
        "SystemRefused",
        "Unsupported",
        "WconvError",
    ),
    "models.folder": ("Component", "ModelFolder", "open_folder"),
    "models.index": ("WeightIndex",),
    "models.names": ("WeightsName",),
    "models.select": ("Wishes",),
    "plan.make": ("Plan", "PlannedTensor", "Shard", "make_plan"),
    "recipes.quantize": ("ModuleChoice", "Quantization", "prepare_dequantized", "prepare_quantized"),
    "recipes.rename": ("plan_rename",),
    "run.execute": ("Result", "run_plan"),
    "tensors.base": ("ByteRange", "Tensor"),
    "recipes.verify": ("verify",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BadFile",
    "BadRequest",
    "ByteRange",
    "Checkpoint",
    "Choices",
    "Component",
    "DType",
    "Diagnosis",
    "HostileFile",
    "LossyCast",
    "ModelFolder",
    "ModuleChoice",
    "OutputRefused",
    "Plan",
    "PlannedTensor",
    "Quantization",
    "Result",
    "Shard",
    "SystemRefused",
    "Tensor",
    "Unsupported",
    "WconvError",
    "WeightIndex",
    "WeightSet",
    "WeightsName",
    "Wishes",
    "convert",
    "diagnose",
    "make_plan",
    "mend",
    "open_checkpoint",
    "open_folder",
    "plan_conversion",
    "plan_mending",
    "plan_rename",
    "prepare_dequantized",
    "prepare_quantized",
    "run_plan",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(f"converter.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'converter' has no attribute {name!r}")

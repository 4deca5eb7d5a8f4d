"""wconv converts model weights from one on-disk form into another, streaming, without torch.

The public API; what is not listed here may change. ``convert`` does all in one call, ``verify`` compares, ``diagnose``
and ``mend`` are the doctor's; a ``Request`` may be planned (``prepare``), looked at, and run (``run_plan``).
Submodules load on first use, so that the command line starts fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from converter.doctor import Choices as Choices
    from converter.doctor import Diagnosis as Diagnosis
    from converter.doctor import diagnose as diagnose
    from converter.doctor import mend as mend
    from converter.doctor import plan_mending as plan_mending
    from converter.dtypes import DType as DType
    from converter.errors import BadFile as BadFile
    from converter.errors import BadRequest as BadRequest
    from converter.errors import HostileFile as HostileFile
    from converter.errors import LossyCast as LossyCast
    from converter.errors import OutputExists as OutputExists
    from converter.errors import OutputRefused as OutputRefused
    from converter.errors import SystemRefused as SystemRefused
    from converter.errors import Unsupported as Unsupported
    from converter.errors import WconvError as WconvError
    from converter.models.checkpoint import Checkpoint as Checkpoint
    from converter.models.checkpoint import open_checkpoint as open_checkpoint
    from converter.models.component import Component as Component
    from converter.models.component import WeightSet as WeightSet
    from converter.models.index import WeightIndex as WeightIndex
    from converter.models.model import Model as Model
    from converter.models.model import open_model as open_model
    from converter.models.names import WeightsName as WeightsName
    from converter.models.select import Selection as Selection
    from converter.plan.types import Plan as Plan
    from converter.plan.types import PlannedFile as PlannedFile
    from converter.plan.types import PlannedSet as PlannedSet
    from converter.plan.types import PlannedTensor as PlannedTensor
    from converter.plan.types import Publishing as Publishing
    from converter.plan.types import Writing as Writing
    from converter.recipes.convert import convert as convert
    from converter.recipes.convert import plan_conversion as plan_conversion
    from converter.recipes.convert_lora import plan_lora as plan_lora
    from converter.recipes.dequantize import plan_dequantized as plan_dequantized
    from converter.recipes.merge_lora import WeightedAdapter as WeightedAdapter
    from converter.recipes.merge_lora import plan_merged as plan_merged
    from converter.recipes.quantize import Measuring as Measuring
    from converter.recipes.quantize import plan_quantized as plan_quantized
    from converter.recipes.rename import plan_rename as plan_rename
    from converter.recipes.request import Request as Request
    from converter.recipes.request import prepare as prepare
    from converter.recipes.to_diffusers import plan_diffusers as plan_diffusers
    from converter.recipes.to_single_file import plan_single_file as plan_single_file
    from converter.recipes.verify import verify as verify
    from converter.run.execute import Result as Result
    from converter.run.execute import run_plan as run_plan
    from converter.storage import Place as Place
    from converter.storage import place_of as place_of
    from converter.tensors.base import ByteRange as ByteRange
    from converter.tensors.base import Tensor as Tensor
    from converter.transforms.dtype import Casting as Casting
    from converter.transforms.layouts.arrange import Arranging as Arranging
    from converter.transforms.names import TensorNames as TensorNames
    from converter.transforms.quantize.modules import ModuleChoice as ModuleChoice

# The same for whoever runs it; a test holds the two together.
_HOMES = {
    "doctor": "Choices Diagnosis diagnose mend plan_mending",
    "dtypes": "DType",
    "errors": "BadFile BadRequest HostileFile LossyCast OutputExists OutputRefused SystemRefused Unsupported "
    "WconvError",
    "models.checkpoint": "Checkpoint open_checkpoint",
    "models.component": "Component WeightSet",
    "models.index": "WeightIndex",
    "models.model": "Model open_model",
    "models.names": "WeightsName",
    "models.select": "Selection",
    "plan.types": "Plan PlannedFile PlannedSet PlannedTensor Publishing Writing",
    "recipes.convert": "convert plan_conversion",
    "recipes.convert_lora": "plan_lora",
    "recipes.dequantize": "plan_dequantized",
    "recipes.merge_lora": "WeightedAdapter plan_merged",
    "recipes.quantize": "Measuring plan_quantized",
    "recipes.rename": "plan_rename",
    "recipes.request": "Request prepare",
    "recipes.to_diffusers": "plan_diffusers",
    "recipes.to_single_file": "plan_single_file",
    "recipes.verify": "verify",
    "run.execute": "Result run_plan",
    "storage": "Place place_of",
    "tensors.base": "ByteRange Tensor",
    "transforms.dtype": "Casting",
    "transforms.layouts.arrange": "Arranging",
    "transforms.names": "TensorNames",
    "transforms.quantize.modules": "ModuleChoice",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(f"converter.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

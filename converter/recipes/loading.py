"""The Python lines that load what a plan writes, each by the library that the weights are for.

What a library finds by itself is loaded by its own loader: a pipeline, a model, an adapter. It goes by names, so what
is named otherwise is loaded file by file, which gives the state dict of any set. No line makes a library run code that
lies in the folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from converter.libraries.rules import finds, is_adapter, variantless
from converter.models.folder import Component, read_json
from converter.plan.make import Plan, SetPlan

# What ``AutoPeftModel`` has a class of its own for (``peft/auto.py``); it makes the base model too.
_PEFT_TASKS = {
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForSeq2SeqLM",
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "ForFeatureExtraction",
}
# Models of transformers that Diffusers has, for pipelines of its own.
_DIFFUSERS_HOMES = {
    "IFSafetyChecker": "diffusers.pipelines.deepfloyd_if",
    "StableDiffusionSafetyChecker": "diffusers.pipelines.stable_diffusion",
}
_LORA_STEM = "pytorch_lora_weights"  # ``LORA_WEIGHT_NAME`` in ``diffusers/loaders/lora_base.py``
_MOST_SETS = 8  # more lines than that nobody reads


def loading_lines(plan: Plan) -> list[str]:
    """Give the Python lines that load what a plan writes; comments say what of it they leave to the reader."""
    target = str(plan.target.folder)
    if plan.source.kind == "pipeline" and _is_loaded_whole(plan):
        return _from_pretrained(plan, plan.sets, "diffusers", "DiffusionPipeline", target)
    if plan.source.kind == "sentence-transformers" and all(_is_found_plain(plan, planned) for planned in plan.sets):
        return ["from sentence_transformers import SentenceTransformer", f"SentenceTransformer({target!r})"]
    lines: list[str] = []
    for planned in plan.sets[:_MOST_SETS]:
        lines += (line for line in _lines_of(plan, planned) if line not in lines)
    more = len(plan.sets) - _MOST_SETS
    return [*lines, f"# and so on, for {more} more"] if more > 0 else lines


def _is_loaded_whole(plan: Plan) -> bool:
    """Say whether the pipeline's loader takes what is written, and not another form of it that lies beside it.

    It does not begin where the pipeline's class is code in the folder, and asks for no variant at the root.
    """
    if not plan.source.class_name or any(planned.name.variant and not planned.component for planned in plan.sets):
        return False
    if not any(_must_be_torch(plan, planned) for planned in plan.sets):
        return True
    written = {planned.component for planned in plan.sets if planned.name.format == "torch"}
    return written == {component.name for component in plan.source.components}


def _must_be_torch(plan: Plan, planned: SetPlan) -> bool:
    """Say whether loaders take a set only if they are told to: they look for safetensors first, of shards for no other.

    ``ModelMixin.from_pretrained`` in ``diffusers/models/modeling_utils.py``.
    """
    return planned.name.format == "torch" and (not plan.target.is_new or len(planned.shards) > 1)


def _is_found_plain(plan: Plan, planned: SetPlan) -> bool:
    """Say whether a library without variants, that looks for safetensors before it looks for .bin, finds a set."""
    return planned.name.variant is None and not _must_be_torch(plan, planned)


def _lines_of(plan: Plan, planned: SetPlan) -> list[str]:
    component = next(found for found in plan.source.components if found.name == planned.component)
    folder = str(plan.target.folder / planned.component)
    paths = [plan.target.folder / shard.path for shard in planned.shards]
    if planned.name.stem == _LORA_STEM and len(paths) == 1:
        arguments = f"{folder!r}, weight_name={paths[0].name!r}"
        return ["# pipe is the pipeline that it is for", f"pipe.load_lora_weights({arguments})"]
    if plan.source.kind == "file" or "auto_map" in component.config:
        return _load_files(planned, paths)
    if is_adapter(planned.name) and len(paths) == 1 and _is_found_plain(plan, planned):
        return _load_adapter(component, folder)
    name = component.class_name  # AutoModel would take what the bare model has, and leave its head
    if not name or variantless(plan.source) or not finds(component, planned.name):
        return _load_files(planned, paths)
    library = "diffusers" if component.is_diffusers else _DIFFUSERS_HOMES.get(name, "transformers")
    return _from_pretrained(plan, [planned], library, name, folder)


def _from_pretrained(plan: Plan, sets: Sequence[SetPlan], library: str, name: str, folder: str) -> list[str]:
    variants = sorted(planned.name.variant or "" for planned in sets)
    tensors = (tensor for planned in sets for shard in planned.shards for tensor, _ in shard.tensors)
    is_int8 = any(tensor.dtype.tag == "I8" and tensor.source.computes for tensor in tensors)
    dtype = plan.wishes.dtype
    arguments = [repr(folder)]
    if variants and variants[0]:
        arguments.append(f"variant={variants[0]!r}")
    if any(_must_be_torch(plan, planned) for planned in sets):
        arguments.append("use_safetensors=False")
    asked = dtype.torch_name if dtype is not None and dtype.bits >= 16 else ""
    if is_int8 and library == "diffusers":
        asked = asked or "float16"
    if asked:
        # Every version of both libraries knows this name; the newest ones say that ``dtype`` is to replace it.
        arguments.append(f"torch_dtype=torch.{asked}")
    if is_int8:
        arguments.append(f'device_map="{"balanced" if name == "DiffusionPipeline" else "auto"}"')
    imports = ["import torch"] if asked else []
    return [*imports, f"from {library} import {name}", f"{name}.from_pretrained({', '.join(arguments)})"]


def _load_adapter(component: Component, folder: str) -> list[str]:
    """Load an adapter with the model that its config names, or, where it names none, its weights."""
    config = read_json(component.path / "adapter_config.json")
    if not config.get("base_model_name_or_path"):
        return ["from peft import load_peft_weights", f"load_peft_weights({folder!r})"]
    name = "AutoPeftModel" + _PEFT_TASKS.get(str(config.get("task_type")), "")
    return [f"from peft import {name}", f"{name}.from_pretrained({folder!r})"]


def _load_files(planned: SetPlan, paths: Sequence[Path]) -> list[str]:
    """Load the state dict of a set, whatever its files are called."""
    is_torch = planned.name.format == "torch"
    imported = "import torch" if is_torch else "from safetensors.torch import load_file"
    load = "torch.load({}, weights_only=True, mmap=True)" if is_torch else "load_file({})"
    if len(paths) == 1:
        return [imported, load.format(repr(str(paths[0])))]
    first, last = str(paths[0]).rsplit("-00001-", 1)
    numbered = f'[{first + "-"!r} + f"{{number:05d}}" + {"-" + last!r} for number in range(1, {len(paths) + 1})]'
    each = load.format("path")
    return [imported, f"paths = {numbered}", f"{{name: tensor for path in paths for name, tensor in {each}.items()}}"]

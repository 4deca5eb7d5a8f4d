"""Which linear modules are quantized: as the loader would choose them, or as the user does; and how a config says so.

The loader must find quantized weights just where it makes a module for them: so modules are chosen by its own rule, and
the skip list that config.json gets is held against that rule once more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from converter.errors import BadRequest, Unsupported
from converter.libraries import library_of
from converter.libraries.modules import Linears
from converter.models.checkpoint import Checkpoint
from converter.models.component import Component
from converter.models.select import compiled, texts_of
from converter.storage import Place
from converter.tensors.base import Tensor, find_ties

# Experts of a mixture as files have them, for which a class has one module (``replace_with_fp8_linear`` in
# ``transformers/integrations/finegrained_fp8.py``).
_EXPERT = re.compile(r"(.+\.experts)\.\d+\.[^.]+")
_OF_EXPERTS = re.compile(r"(.+?\.experts)\.")
_ALL_EXPERTS = r"re:.*\.experts\.\d+\..*"
# What is no linear module in most classes, by its name: embeddings, what chooses among experts; or experts themselves,
# of which newer ones have one module (``conversion_mapping.py`` of transformers).
_DOUBTFUL = re.compile(
    r"emb|(^|\.)(wte|wpe|shared|relative_attention_bias|gate|router)$|\.experts\.\d+\.", re.IGNORECASE
)
# What ComfyUI has as Linear in a file: in a block of a stack; norms, embeddings and modulation stay, as the files that
# it publishes have them, and what lies before and behind the blocks (``MODEL_FILTERS`` in convert_to_quant's
# ``constants.py``).
_IN_BLOCK = re.compile(r"(^|\.)\w*(block|blocks|layer|layers|refiner)\.\d+\.")
# What chooses among experts is no Linear there (``MoEGate`` in ``comfy/ldm/hidream/model.py``). A LoRA and a VAE are
# loaded without regard to scales.
_STAYS = re.compile(
    r"norm|_mod(\.|$)|modulation|adaln|emb|(^|\.)shared\.|relative_attention_bias|scale_shift|gate_logits"
    r"|(^|\.)(gate|router)(\.|$)"
    r"|(^|[._])(lora|loha|lokr|hada)[._]|(^|\.)(en|de)coder\.(down|mid|up)(\.|_block)"
    r"|^(cond_stage_model|conditioner|text_encoders|first_stage_model|vae)\.",
    re.IGNORECASE,
)

# ComfyUI gives the tensors of these its own names, by a list without scales: the names of Diffusers, of which all of a
# row are there (``convert_diffusers_mmdit`` and ``unet_config_from_diffusers_unet`` in ``comfy/model_detection.py``).
_OF_DIFFUSERS = (
    {"joint_transformer_blocks.0.attn.add_k_proj.weight"},
    {"adaln_single.emb.timestep_embedder.linear_1.bias", "pos_embed.proj.bias"},
    {"noise_refiner.0.attention.norm_k.weight"},
    {"x_embedder.weight", "transformer_blocks.0.attn.to_q.weight"},
    {"transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.proj.weight"},
    {"conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"},
)
# It loads a ControlNet (``comfy/controlnet.py``) without regard to scales, too.
_OF_CONTROLNET = re.compile(r"(^|\.)(controlnet_\w+|input_hint_block|zero_convs|control_model)\.")


@dataclass(frozen=True, slots=True)
class ModuleChoice:
    """Which linear modules to quantize: regular expressions that are searched in their names.

    With none, those that the loader would quantize itself. With ``include``, those alone; ``skip`` takes some away, and
    of a class that nobody knows all others are taken for linear then, but for names that speak against it.
    With both, each module must match one of them. ``strict`` refuses a weight that the scheme cannot hold.
    """

    include: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    strict: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "include", texts_of(self.include))
        object.__setattr__(self, "skip", texts_of(self.skip))


def choose_modules(
    component: Component, checkpoint: Checkpoint, linears: Linears, choice: ModuleChoice, is_known: bool
) -> tuple[list[str], list[str]]:
    """Give the modules to quantize, and notes; where the class is not known, all are that nobody leaves out.

    Raises BadRequest or Unsupported for what is not decided, or cannot be.
    """
    path = checkpoint.weight_set.path
    is_included, is_excluded = _matcher(choice.include), _matcher(choice.skip)
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors}
    library = library_of(component)
    is_tied = library.ties(component, checkpoint.name.in_format("safetensors")) == "first"
    ties = find_ties(tensors.values()) if is_tied else {}
    tied = {*ties, *ties.values()}
    wanted: list[str] = []
    notes: list[str] = []
    unnamed = [module for module in linears.unknown if not (is_included(module) or is_excluded(module))]
    if unnamed and not choice.include and (is_known or not choice.skip):
        raise _unknown(component, path, unnamed[0], linears.cause)
    for module, name in {**linears.weights, **linears.unknown}.items():
        included, excluded = is_included(module), is_excluded(module)
        if included and excluded:
            raise BadRequest(path, f"has the module {module!r}, which --include and --skip both name", "Choose one.")
        if choice.include and choice.skip and not (included or excluded):
            advice = "Name it in one of them, or leave one of them out."
            raise BadRequest(path, f"has the module {module!r}, which neither --include nor --skip names", advice)
        by_default = not library.is_skipped(module, linears.skipped)
        if excluded or not (included or (by_default and not choice.include)):
            continue
        if not included and module in linears.unknown and _DOUBTFUL.search(module):
            raise _unknown(component, path, module, linears.cause)
        if library.is_skipped(module, linears.kept):
            if included:
                notes.append(f"{module} is left as it is: its library never quantizes it")
        elif name in tied:
            notes.append(f"{module} is left as it is: its weight is tied to another")
        elif not name:
            advice = "Quantize it with its library, or name it with --skip."
            raise Unsupported(path, f"has no weight for {module!r}, which {component.class_name} has", advice)
        elif tensors[name].numel:
            wanted.append(module)
    return wanted, notes


def _unknown(component: Component, path: Place, module: str, cause: str) -> Unsupported:
    """Say that nobody knows whether a module is linear, and what to do about it."""
    kind = component.class_name or "model of no known class"
    known = f"is a {kind}, and whether {module!r} is linear is not known"
    names = "ame the linear modules with --include, or all others with --skip."
    if cause:
        return Unsupported(path, f"{known}: config.json {cause}", f"N{names}")
    return Unsupported(path, known, f"Install torch and {library_of(component).package}, or n{names}")


def _matcher(regexes: Sequence[str]) -> Callable[[str], bool]:
    patterns = list(map(compiled, regexes))
    return lambda name: any(pattern.search(name) for pattern in patterns)


def list_skipped(
    component: Component, linears: Linears, weights: Mapping[str, str], wanted: Iterable[str]
) -> tuple[str, ...]:
    """Give the entries that make the loader leave alone all modules but the wanted ones.

    Of its own entries those that mean none of them (a tied lm_head is a module too, though no file has it); other
    modules by their full names.
    """
    library = library_of(component)
    wanted = set(wanted)

    def is_free(entry: str) -> bool:
        return not any(library.is_skipped(module, [entry]) for module in wanted)

    entries = [entry for entry in (*linears.skipped, *linears.kept) if is_free(entry)]
    for module in (*linears.weights, *linears.unknown):
        if module not in wanted and not library.is_skipped(module, entries):
            entry, *spellings = library.spell_skipped(component, module, weights.get(module, ""))
            entries += [entry, *filter(is_free, spellings)]
    return tuple(sorted(set(entries)))


def name_skipped(linears: Linears, wanted: Collection[str], names: Iterable[str]) -> tuple[str, ...]:
    """Give the full names of all linear modules but the wanted ones, as compressed-tensors takes them.

    As the class has them, which transformers goes by, and as the file has, which others do.
    Experts, which transformers has as none, by a regular expression that other loaders need.
    """
    known = set(wanted)
    weights = {**linears.weights, **linears.unknown}
    left = {module for module in (*weights, *linears.others) if module not in known}
    left |= {weights[module].removesuffix(".weight") for module in left if weights.get(module)} - known
    if expert_modules(names) and not any(map(_EXPERT.fullmatch, known)):
        left.add(_ALL_EXPERTS)
    return tuple(sorted(left.union(linears.skipped)))


def find_experts(tensors: Iterable[Tensor]) -> dict[str, str]:
    """Map each linear module of an expert to the one module that its class has for all of them."""
    matrices = (one.name for one in tensors if len(one.shape) == 2 and one.name.endswith(".weight"))
    found = ((name, _EXPERT.fullmatch(name.removesuffix(".weight"))) for name in matrices)
    return {name.removesuffix(".weight"): match[1] for name, match in found if match}


def expert_modules(names: Iterable[str]) -> set[str]:
    """Name the modules that a class has for all experts of a layer, whether a file has each of those or all as one."""
    return {match[1] for name in names if (match := _OF_EXPERTS.match(name))}


def parted_experts(experts: Mapping[str, str], wanted: Collection[str]) -> set[str]:
    """Name the modules of experts of which some are wanted, and others not."""
    known = set(wanted)
    left = {group for module, group in experts.items() if module not in known}
    return left & {group for module, group in experts.items() if module in known}


def choose_in_file(checkpoint: Checkpoint, choice: ModuleChoice) -> dict[str, Tensor]:
    """Give the modules of a single file that are quantized, each with its weight, by their names alone.

    Raises BadRequest for a module that is both included and skipped, Unsupported for a file of which ComfyUI would
    leave out the scales.
    """
    _refuse_unscaled(checkpoint.weight_set.path, {tensor.name for tensor in checkpoint.tensors})
    is_included, is_excluded = _matcher(choice.include), _matcher(choice.skip)
    chosen = {}
    for tensor in checkpoint.tensors:
        module = tensor.name.removesuffix(".weight")
        if module == tensor.name or len(tensor.shape) != 2 or not tensor.numel or not tensor.dtype.is_floating:
            continue
        included, excluded = is_included(module), is_excluded(module)
        if included and excluded:
            path = checkpoint.weight_set.path
            raise BadRequest(path, f"has the module {module!r}, which --include and --skip both name", "Choose one.")
        by_default = not choice.include and _IN_BLOCK.search(module) and not _STAYS.search(module)
        if included or (by_default and not excluded):
            chosen[module] = tensor
    return chosen


def _refuse_unscaled(path: Place, names: Collection[str]) -> None:
    if any(all(name in names for name in row) for row in _OF_DIFFUSERS):
        problem = "has the names of Diffusers, and ComfyUI would take its weights without their scales"
        raise Unsupported(path, problem, "Quantize a file with the model's own names, or the folder in int8 or nf4.")
    if any(map(_OF_CONTROLNET.search, names)):
        raise Unsupported(path, "is a ControlNet, whose scales ComfyUI does not read", "Leave it as it is.")
